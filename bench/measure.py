"""Times, peak memory and ceilings, the same way for every op. A wrong result has no time.

An op's module describes what it compares as `Provider`s; `rows` checks them, times them in turn and reports them.
"""

from __future__ import annotations

import gc
import multiprocessing
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .results import Row

GENERATED = ("bench/results", "tests/floors.json", "docs/benchmarks.md", "docs/benchmarks")
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU: a call reads its inputs from memory
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
CEILING_REPEATS = 5

Call = Callable[[], Any]


class Provider(NamedTuple):
    """One way to compute a case: `function` is timed only if `check` accepts its result."""

    name: str
    function: Call
    check: Callable[
        [Any], float | None
    ]  # returns the recall, if there is one; raises AssertionError for a wrong result
    note: str = ""
    products: torch.dtype | None = None  # dtype of its matrix products, if not that of the case
    peak: Callable[[], int | None] | None = None  # bytes above the inputs
    rounds: int | None = None  # the most rounds it takes part in, if it is too slow for all
    work: tuple[float, float] | None = None  # useful FLOPs and bytes, if not those of the case


@dataclass(frozen=True)
class Timing:
    """The times of one provider in ascending order, empty unless `status` is "ok"."""

    status: str
    recall: float | None = None
    seconds: tuple[float, ...] = ()
    ratio: float | None = None

    @property
    def quartiles(self) -> tuple[float, ...] | None:
        """Lower quartile, median and upper quartile of the times."""
        if len(self.seconds) < 2:
            return self.seconds * 3 or None
        return tuple(statistics.quantiles(self.seconds, n=4, method="inclusive"))


def attempt(prepare: Callable[[], Call]) -> Call:
    """Return what `prepare` returns; if it raises, a function that raises the same, so that only this row fails."""
    try:
        return prepare()
    except Exception as error:
        failure = error.with_traceback(None)  # a traceback would keep tensors alive

    def fail() -> None:
        raise failure

    return fail


def stopwatch(device: torch.device) -> Callable[[Call], float]:
    """Return a function that times one call: by events after an L2 flush on CUDA, else by the wall clock."""
    if device.type != "cuda":
        return _wall_seconds
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(function: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            flush.zero_()
            start.record()
            function()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def _wall_seconds(function: Call) -> float:
    start = perf_counter()
    result = function()
    seconds = perf_counter() - start
    del result  # freed after the clock has stopped
    return seconds


def compare(providers: Sequence[Provider], *, base: str, repeats: int, device: torch.device) -> dict[str, Timing]:
    """Check each provider's first result, then time the correct ones in turn, A B C A B C.

    `ratio` is the median over the rounds of a provider's time over that of `base` in the same round.
    """
    status: dict[str, str] = {}
    recall: dict[str, float | None] = {}
    for provider in providers:
        recall[provider.name] = None
        try:
            recall[provider.name] = provider.check(provider.function())
            status[provider.name] = "ok"
        except AssertionError as error:
            status[provider.name] = f"wrong: {_first_line(error)}"
        except Exception as error:
            status[provider.name] = f"failed: {type(error).__name__}: {_first_line(error)}"
        _free_cached_memory(device)
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    watch = stopwatch(device)
    for round_number in range(repeats):
        for provider in providers:
            if status[provider.name] != "ok" or round_number >= (provider.rounds or repeats):
                continue
            try:
                times[provider.name].append(watch(provider.function))
            except Exception as error:
                status[provider.name] = f"failed: {type(error).__name__}: {_first_line(error)}"
    measured = {name: rounds if status[name] == "ok" else [] for name, rounds in times.items()}
    timings = {}
    for name, rounds in measured.items():
        ratios = [own / other for own, other in zip(rounds, measured.get(base, []), strict=False)]
        ratio = statistics.median(ratios) if ratios else None
        timings[name] = Timing(status[name], recall[name], tuple(sorted(rounds)), ratio)
    return timings


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _free_cached_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_peak(function: Call, device: torch.device) -> int:
    """Return the bytes that a call needs at its peak, output included, by torch's CUDA allocator alone."""
    _free_cached_memory(device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def resident_peak(build: Callable[[], tuple[Call, Call]]) -> int | None:
    """Return the resident bytes that a call needs at its peak, output included, above its inputs; None without /proc.

    Measured in a new process, where no freed memory is reused. There `build` (picklable) makes the inputs and returns
    a small call, which loads libraries and their buffers, and the call to measure.
    """
    if not Path("/proc/self/status").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, build, torch.get_num_threads()).result()


def _resident_peak(build: Callable[[], tuple[Call, Call]], threads: int) -> int:
    torch.set_num_threads(threads)
    small, call = build()
    small()
    gc.collect()
    before, sizes, done = _resident_bytes(), [0], Event()

    def sample() -> None:
        while not done.wait(0.0005):
            sizes.append(_resident_bytes())

    thread = Thread(target=sample, daemon=True)
    thread.start()
    result = call()
    sizes.append(_resident_bytes())
    done.set()
    thread.join()
    del result
    return max(max(sizes) - before, 0)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square `torch.mm`, with torch's setting of fp32 precision."""
    size = MATMUL_SIZE[device.type]
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2e-12 * size**3 / _median_seconds(lambda: torch.mm(left, right), device)


@cache
def copy_ceiling(device: torch.device) -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()
    return 2e-9 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(function: Call, device: torch.device) -> float:
    watch = stopwatch(device)
    return statistics.median([watch(function) for _ in range(CEILING_REPEATS + 1)][1:])


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides its case."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


@cache
def _commit() -> str:
    """The commit that is checked out, "-dirty" if the sources differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", *(f":(exclude,top){path}" for path in GENERATED))
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def rows(
    op: str,
    case: str,
    dtype: torch.dtype,
    providers: Sequence[Provider],
    *,
    base: str,
    repeats: int,
    device: torch.device,
    work: tuple[float, float],
    part: str = "",
    memory: bool = True,
) -> list[Row]:
    """Measure the providers of one case.

    Args:
        op: `graph`, `classes` or `pairs`.
        case: the case's sizes, joined by x.
        dtype: of the inputs.
        providers: what to measure.
        base: the provider whose time the others are compared with.
        repeats: rounds.
        device: of the inputs.
        work: useful FLOPs and bytes of the case, the same for every provider that has none of its own.
        part: `forward`, `backward`, `step` or `match`.
        memory: whether to measure peak memory.
    """
    around, copy_gbs = environment(device), copy_ceiling(device)
    timings = compare(providers, base=base, repeats=repeats, device=device)
    measured = []
    for provider in providers:
        timing, products = timings[provider.name], provider.products or dtype
        row: dict[str, Any] = {"products": _name(products), "note": provider.note, "copy_gbs": copy_gbs}
        row["recall"] = timing.recall
        if timing.quartiles is not None:
            lower, median, upper = timing.quartiles
            flops, moved = provider.work or work
            ceiling, tflops = matmul_ceiling(device, products), 1e-12 * flops / median
            row |= {"repeats": len(timing.seconds), "median_s": median, "lower_s": lower, "upper_s": upper}
            row |= {"ratio": timing.ratio, "base": base, "tflops": tflops, "matmul_tflops": ceiling}
            row |= {"share_of_matmul": tflops / ceiling, "share_of_copy": 1e-9 * moved / median / copy_gbs}
            if memory and provider.peak is not None:
                row["peak_bytes"] = provider.peak()
        measured.append(Row(op, case, provider.name, _name(dtype), timing.status, part=part, **row, **around))
    return measured


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
