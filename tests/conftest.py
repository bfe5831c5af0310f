"""What every test stands on: kernels that run without a GPU too, poisoned memory, fixed seeds.

Tests run on CUDA where there is one, with compiled kernels, else on the CPU, with interpreted ones.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

# Before CUDA starts: without it cuBLAS refuses to work deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels' decorator reads it

BACKEND_VARIABLE = "QACONV_TRITON_BACKEND"


def pytest_report_header() -> str:
    kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"torch {torch.__version__}, kernels {kernels}, device {name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its like return with NaN and the largest integers: what is not written shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
    if importlib.util.find_spec("numpy"):
        import numpy as np

        np.random.seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device of the tests' tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Send every op to one backend: plain torch, or the Triton kernels."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return request.param
