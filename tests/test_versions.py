"""The supported versions: one floor everywhere, a clear error below it, and a package that holds all it needs."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import qaconv_triton
from qaconv_triton import versions

ROOT = Path(__file__).parents[1]


def _read(name: str) -> str:
    return ROOT.joinpath(name).read_text(encoding="utf-8")


def _pins(name: str) -> dict[str, tuple[int, ...]]:
    return {package: _numbers(version) for package, version in re.findall(r"^([\w-]+)==(\S+)$", _read(name), re.M)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _pretend(monkeypatch: pytest.MonkeyPatch, torch_version: str, triton_version: str | None) -> None:
    def version(name: str) -> str:
        assert name == "triton"
        if triton_version is None:
            raise metadata.PackageNotFoundError(name)
        return triton_version

    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "message"),
    [
        ("2.7.1+cu126", "3.4.0", r"needs torch >= 2\.8, found torch 2\.7\.1\+cu126$"),
        ("1.13.1", None, r"needs torch >= 2\.8, found torch 1\.13\.1$"),
        ("2.8.0", "3.3.1", r"needs triton >= 3\.4, found triton 3\.3\.1$"),
        (
            "2.6.0a0+git1c2593e", "3.2.0",
            r"needs torch >= 2\.8 and triton >= 3\.4, found torch 2\.6\.0a0\+git1c2593e and triton 3\.2\.0$",
        ),
    ],
)  # fmt: skip
def test_import_refuses_a_version_below_the_floor(
    torch_version: str, triton_version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, torch_version, triton_version)
    with pytest.raises(ImportError, match=message):
        importlib.reload(qaconv_triton)


@pytest.mark.parametrize(
    ("torch_version", "triton_version"),
    [
        ("2.8.0a0+git1c2593e", "3.4.0"),
        ("2.8.0+cu128", "3.4.0+git96316ce5"),
        ("2.13.0+cpu", None),
        ("2.10.0.dev20251001+rocm6.4", "3.10.0"),
        ("3.0.0rc1", "4.0.0"),
        ("unknown", "main"),
    ],
)
def test_import_takes_a_supported_version(
    torch_version: str, triton_version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, torch_version, triton_version)
    importlib.reload(qaconv_triton)


def test_all_files_name_the_same_floor() -> None:
    ranges = re.findall(r'"([\w-]+)>=([\d.]+)[;"]', _read("pyproject.toml"))
    floors = {package: _numbers(version) for package, version in ranges}
    assert floors["torch"] == versions.MIN_TORCH
    assert floors["triton"] == versions.MIN_TRITON
    for file in ("README.md", "CONTRIBUTING.md"):
        found = re.findall(r"(torch|triton) >= ([\d.]*\d)", _read(file), re.IGNORECASE)
        assert {(name.lower(), _numbers(version)) for name, version in found} == {
            ("torch", versions.MIN_TORCH), ("triton", versions.MIN_TRITON),
        }, file  # fmt: skip


@pytest.mark.parametrize("extra", ["dependencies", "demo", "metric-learning", "plot", "test"])
def test_the_oldest_of_every_range_is_pinned(extra: str) -> None:
    (section,) = re.findall(rf"^{extra} = \[(.*?)\]$", _read("pyproject.toml").replace("triton[demo]", ""), re.M | re.S)
    ranges = re.findall(r'"([\w-]+)>=([\d.]+)[;"]', section)
    assert ranges
    oldest, tested = _pins("constraints-oldest.txt"), _pins("constraints.txt")
    for package, version in ranges:
        minimum = _numbers(version)
        assert oldest[package][: len(minimum)] == minimum, package
        assert not any(oldest[package][len(minimum) :]), package
        assert tested[package] >= minimum, package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` installs, built from a copy of the sources: a build leaves files among them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qaconv_triton", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(target)], cwd=source, check=True, capture_output=True)
    (found,) = target.glob("*.whl")
    return found


def test_wheel_holds_library_and_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        (file,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        requirements = re.findall(r"^Requires-Dist: (.*)$", archive.read(file).decode(), re.M)
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.joinpath("qaconv_triton").rglob("*.py")}
    expected |= {f"qaconv_triton/kernels/{path.name}" for path in ROOT.joinpath("kernels").glob("*.py")}
    assert expected | {"qaconv_triton/py.typed"} == found
    assert f"torch>={'.'.join(map(str, versions.MIN_TORCH))}" in requirements


@pytest.mark.slow
def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import qaconv_triton.kernels, qaconv_triton.kernels.cosine_topk\n"
        "print(qaconv_triton.__file__, qaconv_triton.kernels.__file__)"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert all(Path(name).is_relative_to(tmp_path) for name in found.stdout.split()), found.stdout
