"""The perf checks behind `pytest --benchmark`: an operation, its baseline, and the ratio it must not fall below.

A check times the library and a baseline in turn, A B A B, each right against fp64 first. What is committed, in
floors.json, is the ratio of their times: that of one machine is worth something on the next, a time is not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import graph, measure, scores, table
from .matching import Case, build, truth, work

FLOORS = Path(__file__).parent / "floors.json"
SLACK = 0.8  # of the measured ratio: what shared machines make of it from one run to the next
WARM_UP = 2  # rounds besides the checked call


class Check(NamedTuple):
    """A part of a case, and the provider that the library is compared with."""

    group: str
    op: str
    case: graph.Case | Case
    part: str
    baseline: str

    @property
    def name(self) -> str:
        """What it is called in test ids and in floors.json."""
        return " ".join(filter(None, [self.op, self.case.name, self.part, str(self.case.dtype).removeprefix("torch.")]))


def checks(device: torch.device) -> list[Check]:
    """The checks of a device."""
    if device.type == "cuda":
        half, rounds = torch.bfloat16, 20
        tables = [(graph.Case(*sizes, half, rounds), "cuBLAS strips + topk") for sizes in graph.CUDA_SIZES[::3]]
        class_path = Case((256, 10572, 256, 512, 7, 7, 4), dtype=half, repeats=rounds)
        all_pairs = Case((256, 256, 512, 7, 7), dtype=half, repeats=rounds)
        inference = Case((256, 2048, 512, 24, 8), dtype=half, repeats=rounds)
    else:
        tables = [(graph.Case(*sizes), "blocked mm + topk") for sizes in ((2048, 8192, 32), (6000, 512, 64))]
        class_path = Case((64, 2000, 64, 512, 7, 7, 4), repeats=7)
        all_pairs = Case((64, 64, 512, 7, 7), repeats=7)
        inference = Case((16, 128, 512, 24, 8), repeats=7)
    return [
        *(Check("graph", "graph", case, "", baseline) for case, baseline in tables),
        *(Check(f"class path, {part}", "classes", class_path, part, scores.VECTORISED) for part in scores.TRAINING),
        *(Check("all pairs", "pairs", all_pairs, part, scores.TUNED) for part in ("forward", "step")),
        Check("inference", "pairs", inference, "match", scores.TUNED),
    ]


class Prepared(NamedTuple):
    """What is timed, ours and the baseline, with the useful operations of either."""

    ours: measure.Provider
    baseline: measure.Provider
    flops: float


def prepare(check: Check, device: torch.device) -> Prepared:
    """Build a check's problem and its two providers.

    Raises:
        AssertionError: a result is wrong.
    """
    case = check.case._replace(only=(scores.OURS, check.baseline))
    if isinstance(case, graph.Case):
        found = list(graph.providers(case, graph.table(case, device)))
        flops = graph.work(case)[0]
    else:
        problem, true = build(check.op, case, device), cache(truth)
        found = list(scores.providers(check.op, case, check.part, problem, true))
        flops = work(problem, check.part)[0]
    ours, baseline = found
    for provider in found:
        wrong = provider.check(provider.function()).wrong
        assert not wrong, f"{check.name}, {provider.name}: {wrong}; a wrong result has no time"
    return Prepared(ours, baseline, flops)


class Clock:
    """A clock for pytest-benchmark that goes on only while a call is timed, by as much as `measure.stopwatch` says."""

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
    """Time a check with pytest-benchmark's fixture; what it found besides is in `extra_info`.

    Raises:
        AssertionError: a result is wrong.
    """
    prepared = prepare(check, device)
    times: list[float] = []
    benchmark.pedantic(
        partial(clock.time, device, prepared.ours.function),
        setup=lambda: times.append(_watch(device)(prepared.baseline.function)),
        rounds=check.case.repeats,
        warmup_rounds=WARM_UP,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    own = benchmark.stats.stats.data
    theirs = times[WARM_UP : WARM_UP + len(own)]
    around = measure.environment(device)
    tflops = 1e-12 * prepared.flops / statistics.median(own)
    benchmark.extra_info |= {
        "check": check.name,
        "baseline": check.baseline,
        "baseline_median_s": statistics.median(theirs),
        "ratio": statistics.median(their / ours for their, ours in zip(theirs, own, strict=True)),
        "peak_bytes": None if prepared.ours.peak is None else prepared.ours.peak(),
        "tflops": tflops,
        "matmul_tflops": measure.matmul_ceiling(device, prepared.ours.products or check.case.dtype),
        "copy_gbs": measure.copy_ceiling(device),
        **{name: around[name] for name in ("commit", "torch", "triton", "device", "threads")},
    }


def machine(device: torch.device) -> str:
    """Whose floors hold on a device: those of the GPU's name, or those of any CPU."""
    return "cpu" if device.type != "cuda" else table.slug(torch.cuda.get_device_name(device))


def _committed() -> dict[str, dict[str, Any]]:
    """What floors.json holds: entries by machine and check."""
    return json.loads(FLOORS.read_text(encoding="utf-8")) if FLOORS.exists() else {}


def floors(device: torch.device) -> dict[str, float]:
    """The committed ratios of a machine, by the checks' names."""
    return {name: entry["floor"] for name, entry in _committed().get(machine(device), {}).items()}


def save_floors(found: list[dict[str, Any]], device: torch.device) -> None:
    """Make the ratios just measured, less some slack, the floors of their checks."""
    known = _committed()
    own = known.setdefault(machine(device), {})
    for info in found:
        own[info["check"]] = {
            "floor": round(SLACK * info["ratio"], 2),
            "ratio": round(info["ratio"], 2),
            **{name: info[name] for name in ("baseline", "commit", "device")},
        }
    FLOORS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def verdict(info: dict[str, Any], device: torch.device) -> str:
    """What is wrong with a check's ratio; empty if nothing is."""
    floor = floors(device).get(info["check"])
    if floor is None:
        return f"{info['check']}: no ratio is committed for {machine(device)}; --perf-gate-save writes one"
    if not info["ratio"] >= floor:
        return (
            f"{info['check']}: {info['ratio']:.2f} times as fast as {info['baseline']}, "
            f"below the committed {floor:.2f} of {machine(device)}"
        )
    return ""
