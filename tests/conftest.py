"""What all tests rely on: kernels that run without a GPU too, poisoned memory, fixed seeds.

Tests run on CUDA if there is a device, with compiled kernels, else on the CPU with interpreted ones, or, with
`QACONV_TESTS_KERNELS=emulated`, with compiled ones that are emulated: see compiled/launch.py. With `--benchmark` the
perf checks run instead: see perf_gate.py.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

# Before CUDA starts: without it cuBLAS refuses to work deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if os.environ.get("QACONV_TESTS_KERNELS") == "emulated":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: emulated kernels take tensors on the CPU

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("QACONV_TESTS_KERNELS") != "emulated":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels' decorator reads it

import sum_orders

pytest_plugins = ["perf_gate"]

BACKEND_VARIABLE = "QACONV_TRITON_BACKEND"
EMULATED = os.environ.get("QACONV_TESTS_KERNELS") == "emulated"


def pytest_report_header(config: pytest.Config) -> str:
    kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "emulated" if EMULATED else "compiled"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    sums = "mixed" if config.getoption("--mixed-sums") else f"{torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, kernels {kernels}, device {name}, sums {sums}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mixed-sums", action="store_true", help="Sum products in another order at every place: see sum_orders.py."
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        import interpreter

        interpreter.speed_up()
    if (kernels := os.environ.get("QACONV_TESTS_KERNELS", "")) not in ("", "emulated"):
        raise pytest.UsageError(f"QACONV_TESTS_KERNELS: expected 'emulated' or nothing, got {kernels!r}")
    if EMULATED:
        from compiled import hooks, launch

        if not launch.can_build():
            raise pytest.UsageError("QACONV_TESTS_KERNELS=emulated needs a g++ that compiles tests/compiled/runtime.h")
        hooks.install()
    if config.getoption("--benchmark"):
        return
    os.environ.setdefault("QACONV_TRITON_TUNE", "0")  # tests see the default tiles
    if config.getoption("--mixed-sums"):
        sum_orders.mix_orders()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what `torch.empty` and its like return with NaN and the largest integers: what is not written shows."""
    if request.node.get_closest_marker("benchmark"):  # filling takes time
        yield
        return
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


@pytest.fixture
def cpu_backend(backend: str) -> str:
    """As `backend`, for tensors on the CPU, which compiled kernels cannot take."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1" and not EMULATED:
        pytest.skip("kernels are compiled here: they take no CPU tensors")
    return backend
