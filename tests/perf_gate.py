"""`pytest --benchmark`: the library beside a baseline, and with `--perf-gate` the ratio that it must not fall below.

Both are checked against fp64, then timed in turn, A B A B. floors.json has ratios: a ratio holds on another machine of
the same kind, a time does not. A pytest plugin, loaded by conftest.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench import graph, measure, results, scores
from bench.cases import OURS, TRAINING, Case

FLOORS = Path(__file__).parent / "floors.json"
SLACK = 0.8  # of the measured ratio: shared machines vary as much from run to run
WARM_UP_ROUNDS = 2


class Check(NamedTuple):
    """A part of a case, and the provider that the library is compared with."""

    group: str
    case: Case
    part: str
    baseline: str

    @property
    def name(self) -> str:
        """Its name in test ids and in floors.json."""
        dtype = str(self.case.dtype).removeprefix("torch.")
        return " ".join(filter(None, [self.case.op, self.case.name, self.part, dtype]))


def checks(device: torch.device) -> list[Check]:
    """The checks of a device."""
    if device.type == "cuda":
        make, baseline = partial(Case, dtype=torch.bfloat16, repeats=20), "cuBLAS strips + topk"
        tables = [make("graph", sizes) for sizes in graph.CUDA_SIZES[::3]]
        sizes = (256, 10572, 256, 512, 7, 7, 4), (256, 256, 512, 7, 7), (256, 2048, 512, 24, 8)
    else:
        make, baseline = partial(Case, repeats=7), "blocked mm + topk"
        tables = [Case("graph", (2048, 8192, 32)), Case("graph", (6000, 512, 64))]
        sizes = (64, 2000, 64, 512, 7, 7, 4), (64, 64, 512, 7, 7), (16, 128, 512, 24, 8)
    classes, pairs, match = map(make, ("classes", "pairs", "pairs"), sizes)
    return [
        *(Check("graph", case, "", baseline) for case in tables),
        *(Check(f"class path, {part}", classes, part, scores.VECTORISED) for part in TRAINING),
        *(Check("all pairs", pairs, part, scores.TUNED) for part in ("forward", "step")),
        Check("inference", match, "match", scores.TUNED),
    ]


def prepare(check: Check, device: torch.device) -> tuple[measure.Provider, measure.Call, measure.Call]:
    """The library's provider, its function and the baseline's.

    Raises:
        AssertionError: a result is wrong.
    """
    op, functions = check.case.module, []
    providers = {each.name: each for each in op.providers(check.case, check.part, op.build(check.case, device))}
    for name in (OURS, check.baseline):
        functions.append(providers[name].prepare())
        try:
            providers[name].check(functions[-1]())
        except AssertionError as error:
            raise AssertionError(f"{check.name}, {name}: {error}; a wrong result has no time") from error
    return providers[OURS], *functions


class Clock:
    """A clock for pytest-benchmark that advances only by what `measure.stopwatch` says of a call."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def time(self, device: torch.device, function: Callable[[], Any]) -> None:
        self.seconds += _watch(device)(function)


@cache
def _watch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    return measure.stopwatch(device)


clock = Clock()


def run(check: Check, benchmark: Any, device: torch.device) -> None:
    """Time a check with pytest-benchmark's fixture; the ratio and the rest are in its `extra_info`.

    Raises:
        AssertionError: a result is wrong.
    """
    ours, function, baseline = prepare(check, device)
    times: list[float] = []
    benchmark.pedantic(
        partial(clock.time, device, function),
        setup=lambda: times.append(_watch(device)(baseline)),
        rounds=check.case.repeats,
        warmup_rounds=WARM_UP_ROUNDS,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    own = benchmark.stats.stats.data
    others = times[WARM_UP_ROUNDS : WARM_UP_ROUNDS + len(own)]
    around = measure.environment(device)
    peak = measure.peak_bytes(check.case, check.part, ours, function, device) if ours.has_peak else None
    benchmark.extra_info |= {
        "check": check.name,
        "baseline": check.baseline,
        "baseline_median_s": statistics.median(others),
        "ratio": statistics.median(other / time for other, time in zip(others, own, strict=True)),
        "peak_bytes": peak,
        "tflops": 1e-12 * ours.work[0] / statistics.median(own),
        "matmul_tflops": measure.matmul_ceiling(device, ours.products or check.case.dtype),
        **{name: around[name] for name in ("commit", "torch", "triton", "device", "threads")},
    }


def machine(device: torch.device) -> str:
    """Whose floors hold on a device: those of the GPU's name, or of CPUs with the same vector instructions."""
    if device.type == "cuda":
        return results.slug(torch.cuda.get_device_name(device))
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _committed() -> dict[str, dict[str, Any]]:
    return json.loads(FLOORS.read_text(encoding="utf-8")) if FLOORS.exists() else {}


def floors(device: torch.device) -> dict[str, float]:
    """The committed ratios of a machine, by the checks' names."""
    return {name: entry["floor"] for name, entry in _committed().get(machine(device), {}).items()}


def save_floors(measured: list[dict[str, Any]], device: torch.device) -> None:
    """Make the measured ratios, less some slack, the floors of their checks."""
    committed = _committed()
    own = committed.setdefault(machine(device), {})
    for info in measured:
        own[info["check"]] = {
            "floor": round(SLACK * info["ratio"], 2),
            "ratio": round(info["ratio"], 2),
            **{name: info[name] for name in ("baseline", "commit", "device")},
        }
    FLOORS.write_text(json.dumps(committed, indent=2) + "\n", encoding="utf-8")


def assert_floor(info: dict[str, Any], device: torch.device) -> None:
    """Assert that a check's ratio is not below the committed one."""
    floor = floors(device).get(info["check"])
    assert floor is not None, f"{info['check']}: no ratio is committed for {machine(device)}: --perf-gate-save"
    assert info["ratio"] >= floor, (
        f"{info['check']}: {info['ratio']:.2f}x the speed of {info['baseline']}, "
        f"below the committed {floor:.2f}x of {machine(device)}"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("performance")
    group.addoption("--benchmark", action="store_true", help="Run the perf checks, and nothing else.")
    group.addoption(
        "--perf-gate", action="store_true", help="Fail if a ratio to a baseline is below the committed one."
    )
    group.addoption("--perf-gate-save", action="store_true", help="Write the measured ratios to tests/floors.json.")


def pytest_configure(config: pytest.Config) -> None:
    gates = [option for option in ("--perf-gate", "--perf-gate-save") if config.getoption(option)]
    if not config.getoption("--benchmark"):
        if gates:
            raise pytest.UsageError(f"{gates[0]} is an option of the perf checks: pytest --benchmark {gates[0]}")
        return
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark: processes side by side disturb each other's times, leave -n out")
    if len(gates) > 1:
        raise pytest.UsageError("--perf-gate and --perf-gate-save: a ratio is either checked or saved")
    if gates and config.getoption("--benchmark-disable", False):
        raise pytest.UsageError(f"{gates[0]}: with --benchmark-disable there are no times")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--benchmark` only the perf checks are imported."""
    is_other = collection_path.suffix == ".py" and collection_path.name != "test_performance.py"
    return True if config.getoption("--benchmark") and is_other else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("benchmark") and not config.getoption("--benchmark"):
            item.add_marker(pytest.mark.skip(reason="a perf check: pytest --benchmark"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    measured = [bench.extra_info for bench in session.benchmarks if "ratio" in bench.extra_info] if session else []
    if not config.getoption("--benchmark") or not measured:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    committed = floors(device)
    terminalreporter.section("speed relative to the baseline")
    for info in measured:
        floor = f"{committed[info['check']]:.2f}" if info["check"] in committed else "none"
        peak = "" if info["peak_bytes"] is None else f", {info['peak_bytes'] / 1e6:.1f} MB"
        terminalreporter.write_line(
            f"{info['check']}: {info['ratio']:.2f}x {info['baseline']} (floor: {floor}){peak}, "
            f"{info['tflops']:.3g} of {info['matmul_tflops']:.3g} TFLOP/s"
        )
    if config.getoption("--perf-gate-save"):
        save_floors(measured, device)
        terminalreporter.write_line(f"saved in {FLOORS}")
