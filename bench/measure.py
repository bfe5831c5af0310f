"""Times, peak memory and ceilings, the same way for every op. A wrong result has no time.

An op's module describes what it compares as `Provider`s; `rows` checks them, times them in turn and reports them.
"""

import gc
import importlib.util
import multiprocessing
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy
import torch

from .cases import OURS, Case
from .results import Row

SOURCES = (":/bench/*.py", ":/kernels", ":/qaconv_triton")
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU: a call reads its inputs from memory
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
CEILING_REPEATS = 5

Call = Callable[[], Any]


class Provider(NamedTuple):
    """One way to compute a case: `prepare` does what is not timed and returns what is, if `check` accepts its result.

    `check` returns the recall, if there is one, and raises AssertionError for a wrong result.
    """

    name: str
    prepare: Callable[[], Call]
    check: Callable[[Any], float | None]
    work: tuple[float, float]  # useful FLOPs and bytes
    note: str = ""
    products: torch.dtype | None = None  # dtype of its matrix products, if not that of the case
    has_peak: bool = True  # whether its peak memory can be measured
    is_compiled: bool = False  # by torch, for the sizes of its first call


@dataclass
class Timing:
    """The times of one provider's function, round by round; none unless `status` is "ok"."""

    function: Call | None = None
    status: str = "ok"
    recall: float | None = None
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def record_failure(self) -> Iterator[None]:
        """Turn what is raised inside into the status."""
        try:
            yield
        except Exception as error:
            kind = "wrong" if isinstance(error, AssertionError) else f"failed: {type(error).__name__}"
            self.status = f"{kind}: {(str(error).strip().splitlines() or [''])[0][:160]}"
            self.seconds.clear()


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


def compare(providers: Sequence[Provider], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Check each provider's first result, then time the correct ones in turn, A B C A B C."""
    timings = {provider.name: Timing() for provider in providers}
    for provider in providers:
        timing = timings[provider.name]
        with timing.record_failure():
            timing.function = provider.prepare()
            timing.recall = provider.check(timing.function())
        _free_memory()
    watch = stopwatch(device)
    for _ in range(repeats):
        for timing in timings.values():
            if timing.status == "ok":
                with timing.record_failure():
                    timing.seconds.append(watch(timing.function))
    return timings


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # where CUDA is in use


def peak_bytes(case: Case, part: str, provider: Provider, function: Call, device: torch.device) -> int | None:
    """Return the bytes that the call of a provider needs at its peak, output included, above its inputs."""
    if device.type == "cuda":
        return device_peak(function, device)
    tiny = next(tiny for tiny in case.module.TINY if tiny.op == case.op)._replace(dtype=case.dtype)
    return resident_peak(partial(_prepare, part, provider.name), case if provider.is_compiled else tiny, case)


def _prepare(part: str, name: str, case: Case) -> Call:
    problem = case.module.build(case, torch.device("cpu"))
    return next(each for each in case.module.providers(case, part, problem) if each.name == name).prepare()


def device_peak(function: Call, device: torch.device) -> int:
    """The peak of a call by torch's CUDA allocator alone."""
    _free_memory()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def resident_peak(make: Callable[[Any], Call], small: Any, size: Any) -> int | None:
    """The peak of resident memory in a new process, where no freed memory is reused; None except on Linux.

    There `make` (picklable) makes the inputs of a size and returns the call. A call of a small size comes first: it
    loads libraries and their buffers.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, make, small, size, torch.get_num_threads()).result()


def _resident_peak(make: Callable[[Any], Call], small: Any, size: Any, threads: int) -> int | None:
    torch.set_num_threads(threads)
    call = make(size)
    (call if small == size else make(small))()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what is resident
    except OSError:
        return None
    before = _peak_of_process()
    call()
    return _peak_of_process() - before


def _peak_of_process() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


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
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


@cache
def _commit() -> str:
    """The commit that is checked out, "-dirty" if the sources differ from it."""
    git = partial(subprocess.check_output, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True)
    try:
        is_changed = git(["git", "status", "--porcelain", "--", *SOURCES])
        return git(["git", "rev-parse", "--short", "HEAD"]).strip() + ("-dirty" if is_changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def rows(
    case: Case,
    part: str,
    providers: Sequence[Provider],
    device: torch.device,
    repeats: int | None = None,
    memory: bool = True,
    base: str = OURS,
) -> list[Row]:
    """Measure the providers of a part of a case, in `repeats` rounds or those of the case.

    Ratios to the provider `base` are medians over the rounds, of times of the same round.
    """
    common = environment(device) | {"copy_gbs": copy_ceiling(device), "part": part}
    has_ceiling = device.type == "cuda" or part not in ("backward", "step")  # gradients on a CPU are no matrix products
    timings = compare(providers, repeats or case.repeats, device)
    measured = []
    for provider in providers:
        timing, products = timings[provider.name], provider.products or case.dtype
        own = {"recall": timing.recall, "products": _name(products), "note": provider.note}
        row = Row(case.op, case.name, provider.name, _name(case.dtype), timing.status, **own, **common)
        if timing.seconds:
            lower, median, upper = numpy.quantile(timing.seconds, (0.25, 0.5, 0.75)).tolist()
            in_base = timings[base].seconds if base in timings else []
            ratios = [time / other for time, other in zip(timing.seconds, in_base, strict=False)]
            flops, moved = provider.work
            tflops, ceiling = 1e-12 * flops / median, matmul_ceiling(device, products)
            measures_peak = memory and provider.has_peak
            peak = peak_bytes(case, part, provider, timing.function, device) if measures_peak else None
            row = replace(
                row,
                repeats=len(timing.seconds),
                median_s=median,
                lower_s=lower,
                upper_s=upper,
                ratio=statistics.median(ratios) if ratios else None,
                base=base,
                peak_bytes=peak,
                tflops=tflops,
                matmul_tflops=ceiling,
                share_of_matmul=tflops / ceiling if has_ceiling else None,
                share_of_copy=1e-9 * moved / median / row.copy_gbs,
            )
        measured.append(row)
    return measured


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
