"""Times, peak memory and ceilings, the same way for every op; what fails its check has no number.

An op's module describes its candidates as `Provider`s; `rows` checks them, times them in turn, and accounts for them.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import re
import statistics
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .table import Row

WRITTEN = ("bench/results", "bench/floors.json", "docs/benchmarks.md", "docs/benchmarks")  # by the benchmarks
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU: what a call reads comes from memory
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
CEILING_REPEATS = 5


class Verdict(NamedTuple):
    """What a check says: what is wrong, empty if nothing is, and the share of the truth that was found."""

    wrong: str = ""
    recall: float | None = None


class Provider(NamedTuple):
    """One way to compute a case: timed is `function`, and only if `check` finds its result right."""

    name: str
    function: Callable[[], Any]
    check: Callable[[Any], Verdict]
    note: str = ""
    products: torch.dtype | None = None  # dtype of its products, where it is not that of the case
    peak: Callable[[], int | None] | None = None  # bytes above the inputs
    rounds: int | None = None  # that it takes part in at most, where it is too slow for all
    flops: float | None = None  # useful operations, where it does another's work than the case's
    moved: float | None = None  # useful bytes, likewise


def attempt(prepare: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """What `prepare` returns; if it raises, a function that raises the same, so that it ends in a row, not the run."""
    try:
        return prepare()
    except Exception as error:
        failure = error.with_traceback(None)  # which would keep alive what the attempt has left behind

    def fail() -> None:
        raise failure

    return fail


@dataclass(frozen=True)
class Timing:
    """The account of one provider: `seconds` in rising order, none unless `status` is "ok"."""

    status: str
    recall: float | None = None
    seconds: tuple[float, ...] = ()
    ratio: float | None = None

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """Lower quartile, median and upper quartile of the times."""
        if len(self.seconds) < 2:
            return self.seconds * 3 if self.seconds else None  # type: ignore[return-value]
        lower, median, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, median, upper


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that times one call: by events after an L2 flush on CUDA, else by the wall clock."""
    if device.type != "cuda":
        return _wall_seconds
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            flush.zero_()
            start.record()
            function()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def _wall_seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    result = function()
    seconds = perf_counter() - start
    del result  # after the clock has stopped: giving memory back is not part of the call
    return seconds


def compare(providers: Sequence[Provider], *, base: str, repeats: int, device: torch.device) -> dict[str, Timing]:
    """Check the result of each provider's warm-up, then time the right ones in turn, A B C A B C.

    `ratio` is the median over the rounds of a provider's time over that of `base` in the same round. A provider that
    raises or whose result is wrong has a status that says so, and no times.
    """
    status: dict[str, str] = {}
    recall: dict[str, float | None] = {}
    for provider in providers:
        try:
            verdict = provider.check(provider.function())
        except Exception as error:  # whatever a candidate raises is its row's affair, not the run's
            verdict = Verdict()
            status[provider.name] = f"failed: {_told(error)}"
        else:
            status[provider.name] = f"wrong: {verdict.wrong}" if verdict.wrong else "ok"
        recall[provider.name] = verdict.recall
        _release(device)
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    watch = stopwatch(device)
    for number in range(repeats):
        for provider in providers:
            if status[provider.name] != "ok" or (provider.rounds is not None and number >= provider.rounds):
                continue
            try:
                times[provider.name].append(watch(provider.function))
            except Exception as error:
                status[provider.name] = f"failed: {_told(error)}"
    good = {name: rounds for name, rounds in times.items() if status[name] == "ok"}
    timings = {}
    for provider in providers:
        rounds = good.get(provider.name, [])
        ratios = [own / other for own, other in zip(rounds, good.get(base, []), strict=False)]
        ratio = statistics.median(ratios) if ratios else None
        name = provider.name
        timings[name] = Timing(status[name], recall[name], tuple(sorted(rounds)), ratio)
    return timings


def _told(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def _release(device: torch.device) -> None:
    """Give back what a candidate has left, so that the next one does not run out of memory for it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_peak(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's CUDA allocator that a call needs at its peak, its output included, above what is there before.

    What other libraries allocate behind torch's back is not seen.
    """
    _release(device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def resident_peak(build: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> int | None:
    """Bytes of resident memory that a call needs at its peak, its output included, above its inputs.

    Measured in a fresh process of as many threads, so that nothing freed earlier is silently used again. There, `build`
    (picklable) makes the inputs and returns a small call, which loads libraries and their buffers, and the call to
    measure, run once. None where the system has no /proc.
    """
    if not Path("/proc/self/status").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, build, torch.get_num_threads()).result()


def _resident_peak(build: Callable[[], tuple[Callable[[], object], Callable[[], object]]], threads: int) -> int:
    torch.set_num_threads(threads)
    small, call = build()
    small()
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc alone has it: pages that are free but still resident go back
        ctypes.CDLL(None).malloc_trim(0)
    before = _memory("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the high-water mark back
    if _memory("VmHWM") > before + 2**20:  # it was not: some containers do not let us
        return max(_sampled_peak(call) - before, 0)
    result = call()
    peak = _memory("VmHWM")
    del result
    return max(peak - before, 0)


def _memory(name: str) -> int:
    """A size in bytes from this process's status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, name
    return 1024 * int(found[1])


def _sampled_peak(call: Callable[[], object]) -> int:
    """The largest resident size seen by a thread that looks every millisecond."""
    seen, done = [_memory("VmRSS")], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], _memory("VmRSS"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    peak = max(seen[0], _memory("VmRSS"))
    del result
    return peak


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square torch.mm, at torch's setting of fp32 precision: what a product here can reach."""
    size = MATMUL_SIZE[device.type]
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2e-12 * size**3 / _typical_seconds(lambda: torch.mm(left, right), device)


@cache
def copy_ceiling(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and bytes written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()
    return 2e-9 * source.numel() / _typical_seconds(lambda: target.copy_(source), device)


def _typical_seconds(function: Callable[[], object], device: torch.device) -> float:
    watch = stopwatch(device)
    return statistics.median([watch(function) for _ in range(CEILING_REPEATS + 1)][1:])


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the code of the case."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


@cache
def _commit() -> str:
    """The commit that is checked out, "-dirty" if the sources differ from it; results themselves do not count."""

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", *(f":(exclude,top){path}" for path in WRITTEN))
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
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
    flops: float,
    moved: float | None = None,
    part: str = "",
    memory: bool = True,
) -> list[Row]:
    """Measure the providers of one case, or of a part of it.

    Args:
        op: whose case it is.
        case: its name.
        dtype: of its inputs.
        providers: what to measure.
        base: the provider whose time the others are compared with.
        repeats: rounds.
        device: where the inputs are.
        flops: useful operations, whatever a provider does, unless it has its own.
        moved: useful bytes, read or written once, likewise.
        part: what of the case is measured.
        memory: whether to measure peak memory.
    """
    around = environment(device)
    copy_gbs = copy_ceiling(device)
    found = []
    for provider, timing in zip(
        providers, compare(providers, base=base, repeats=repeats, device=device).values(), strict=True
    ):
        name = str(provider.products or dtype).removeprefix("torch.")
        row: dict[str, Any] = {"products": name, "note": provider.note, "copy_gbs": copy_gbs, "recall": timing.recall}
        if timing.quartiles is not None:
            lower, median, upper = timing.quartiles
            ceiling = matmul_ceiling(device, provider.products or dtype)
            tflops = 1e-12 * (provider.flops or flops) / median
            row |= {"repeats": len(timing.seconds), "median_s": median, "lower_s": lower, "upper_s": upper}
            row |= {"ratio": timing.ratio, "base": base, "tflops": tflops, "matmul_tflops": ceiling}
            row |= {"share_of_matmul": tflops / ceiling}
            if useful := provider.moved or moved:
                row["share_of_copy"] = 1e-9 * useful / median / copy_gbs
            if memory and provider.peak is not None:
                try:
                    row["peak_bytes"] = provider.peak()
                except Exception as error:
                    row["note"] = "; ".join(filter(None, [provider.note, f"peak memory failed: {_told(error)}"]))
        given = str(dtype).removeprefix("torch.")
        found.append(Row(op, case, provider.name, given, timing.status, part=part, **row, **around))
    return found
