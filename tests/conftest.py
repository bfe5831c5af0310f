"""What all tests rely on: kernels that run without a GPU too, poisoned memory, fixed seeds.

Tests run on CUDA where there is one, with compiled kernels, else on the CPU, with interpreted ones. With `--benchmark`
the perf checks run instead, by pytest-benchmark, and without what would slow them.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before CUDA starts: without it cuBLAS refuses to work deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels' decorator reads it

import sum_orders

BACKEND_VARIABLE = "QACONV_TRITON_BACKEND"


def pytest_report_header(config: pytest.Config) -> str:
    kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    sums = "mixed" if config.getoption("--mixed-sums") else f"{torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, kernels {kernels}, device {name}, sums {sums}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mixed-sums", action="store_true", help="Sum products in another order at every place: see sum_orders.py."
    )
    group = parser.getgroup("performance")
    group.addoption("--benchmark", action="store_true", help="Run the perf checks, and nothing else.")
    group.addoption(
        "--perf-gate", action="store_true", help="Fail where a ratio to a baseline is below the committed one."
    )
    group.addoption("--perf-gate-save", action="store_true", help="Write the ratios just measured to be committed.")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        import interpreter

        interpreter.speed_up()
    if config.getoption("--benchmark"):
        if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
            raise pytest.UsageError("--benchmark: times of processes beside each other mean nothing, leave -n out")
        gates = config.getoption("--perf-gate"), config.getoption("--perf-gate-save")
        if all(gates):
            raise pytest.UsageError("--perf-gate and --perf-gate-save: a ratio is either checked or saved")
        if any(gates) and config.getoption("--benchmark-disable", False):
            raise pytest.UsageError("--perf-gate: with --benchmark-disable there are no times")
        return
    for option in ("--perf-gate", "--perf-gate-save"):
        if config.getoption(option):
            raise pytest.UsageError(f"{option} is about the perf checks: pytest --benchmark {option}")
    os.environ.setdefault("QACONV_TRITON_TUNE", "0")  # tests see the default configurations
    if config.getoption("--mixed-sums"):
        sum_orders.mix_orders()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--benchmark` nothing but the perf checks is imported; without it they are there, and skipped."""
    is_other = collection_path.suffix == ".py" and collection_path.name != "test_performance.py"
    return True if config.getoption("--benchmark") and is_other else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("benchmark") and not config.getoption("--benchmark"):
            item.add_marker(pytest.mark.skip(reason="a perf check: pytest --benchmark"))
        elif item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [bench.extra_info for bench in session.benchmarks if "ratio" in bench.extra_info] if session else []
    if not config.getoption("--benchmark") or not found:
        return
    from bench import perf

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    floors = perf.floors(device)
    terminalreporter.section("times as fast as the baseline")
    for info in found:
        floor = f"{floors[info['check']]:.2f}" if info["check"] in floors else "none"
        peak = "" if info["peak_bytes"] is None else f", {info['peak_bytes'] / 1e6:.1f} MB"
        terminalreporter.write_line(
            f"{info['check']}: {info['ratio']:.2f} x {info['baseline']} (committed: {floor})"
            f"{peak}, {info['tflops']:.3g} of {info['matmul_tflops']:.3g} TFLOP/s"
        )
    if config.getoption("--perf-gate-save"):
        perf.save_floors(found, device)
        terminalreporter.write_line(f"saved in {perf.FLOORS}")


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
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: they take no CPU tensors")
    return backend
