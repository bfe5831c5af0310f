"""The oldest torch and Triton that the library supports, and the error where an older one is installed.

The ranges in `pyproject.toml` say the same, but bind only where pip resolves them.
"""

from __future__ import annotations

import re
from importlib import metadata

import torch

MIN_TORCH = (2, 8)
MIN_TRITON = (3, 4)


def check_installed() -> None:
    """Require the torch and the Triton of this environment to be supported. Without Triton there is the CPU path.

    Raises:
        ImportError: naming the versions that are needed and those that were found.
    """
    try:
        triton = metadata.version("triton")  # importing it takes longer
    except metadata.PackageNotFoundError:
        triton = None
    check_versions(torch.__version__, triton)


def check_versions(torch_version: str, triton_version: str | None) -> None:
    """Require versions that the library supports.

    Args:
        torch_version: as in `torch.__version__`. Pre-releases, nightly and local builds count as their release.
        triton_version: likewise; None where it is not installed.

    Raises:
        ImportError: naming the versions that are needed and those that were found.
    """
    versions = (("torch", torch_version, MIN_TORCH), ("triton", triton_version, MIN_TRITON))
    too_old = [(name, version, minimum) for name, version, minimum in versions if is_older(version, minimum)]
    if too_old:
        needed = " and ".join(f"{name} >= {minimum[0]}.{minimum[1]}" for name, _, minimum in too_old)
        found = " and ".join(f"{name} {version}" for name, version, _ in too_old)
        raise ImportError(f"qaconv_triton needs {needed}, found {found}")


def is_older(version: str | None, minimum: tuple[int, int]) -> bool:
    """Whether a version is below `minimum`; of one that has no numbers nothing is known."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")  # builds from source may have any other version
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < minimum
