"""Which configuration of config.py a launch takes: the default, or the fastest on the GPU at hand.

A launch that is large enough to matter benchmarks the configurations of its shape class once, before its real work.
Configurations that spill are skipped unless all spill. The fastest is kept, in this process by device, and on disk by
the name of the GPU, for all later ones; of processes that tune at the same time the first to finish decides for all. An
error in a configuration only excludes it, and a benchmark that lack of memory cuts short is not kept on disk.

A configuration decides the order of sums, so another one may change the last bits of a result. Deleting the cache may
do so too, for the next benchmark may end differently. `QACONV_TRITON_TUNE=0` pins the defaults: the same call then
gives the same bits on this machine, whatever the cache holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import norms
from .config import INTERPRETED, Config, generation, operands

TUNE_VARIABLE = "QACONV_TRITON_TUNE"
CACHE_VARIABLE = "QACONV_TRITON_CACHE_DIR"
MIN_TUNED_FLOPS = 2.0**34  # operations of a launch that is tuned for; a smaller one takes what a launch takes anyway
LONG_LAUNCH_MS = 100.0  # milliseconds of a launch that is not repeated for its time
MAX_FILE_BYTES = 2**16  # of a choice on disk, which takes about 2 KiB
PREFIX, SUFFIX = ".choice-", ".tmp"  # of a file that is being written
STALE_SECONDS = 86_400  # age from which its writer was killed
COMPILE_SECONDS = 1.0  # of a launch on the host that must have compiled its kernel

ListConfigs = Callable[..., list[Config]]  # a function of config.py
logger = logging.getLogger(__name__)
selected: dict[tuple[object, ...], Config] = {}  # in this process
benchmark_lock = threading.Lock()  # benchmarks disturb each other's times
launched: set[str] = set()  # names of kernels, in this process


def is_on() -> bool:
    """Whether launches may be tuned for.

    By default where kernels are compiled, unless results are wanted that are the same on every machine
    (`torch.use_deterministic_algorithms`).

    Raises:
        ValueError: `QACONV_TRITON_TUNE` is neither empty, "0" nor "1".
    """
    wanted = os.environ.get(TUNE_VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"{TUNE_VARIABLE}: expected '0' or '1', got {wanted!r}")
    if wanted == "0" or torch.are_deterministic_algorithms_enabled():
        return False
    return wanted == "1" if INTERPRETED else torch.cuda.is_available()


def select_config(
    list_configs: ListConfigs, shape: tuple[int, ...], variant: str, operations: float, run: Callable[[Config], Any]
) -> Config:
    """The configuration for a launch.

    Args:
        list_configs: the function of config.py that lists configurations, the default first.
        shape: its arguments, the launch's shape class.
        variant: what else changes the code of the kernel.
        operations: of this launch.
        run: launches it with a configuration, as often as it is called to the same effect, and returns the compiled
            kernel.
    """
    if operations < MIN_TUNED_FLOPS or not is_on():  # by size alone, so that a launch takes the same in every run
        return _configs(list_configs, shape, generation())[0]
    key = (list_configs.__name__, shape, variant, 0 if INTERPRETED else torch.cuda.current_device())
    if key not in selected:
        if not INTERPRETED and torch.cuda.is_current_stream_capturing():  # which allows no clock
            return _configs(list_configs, shape, generation())[0]
        with benchmark_lock:
            if key not in selected:
                selected[key] = _cached_or_fastest(list_configs, shape, variant, run)
    return selected[key]


def variant(probe: Tensor, gallery: Tensor, flags: list[str]) -> str:
    """What changes a kernel's code besides its tiles, in words."""
    precision = operands(probe.dtype, gallery.dtype)["PRECISION"]
    layout = "" if gallery.stride(2) == 1 else "channels first"
    return " ".join(filter(None, [f"{probe.dtype} {gallery.dtype} {precision}", layout, *flags]))


def launch_announced(name: str, launch: Callable[[], Any]) -> Any:
    """Launch a kernel; where the first launch of this process had to compile it, a warning says how long that took."""
    if name in launched:
        return launch()
    launched.add(name)
    started = perf_counter()
    kernel = launch()
    seconds = perf_counter() - started
    if seconds >= COMPILE_SECONDS and not INTERPRETED:
        logger.warning(
            "compiled the %s kernel in %.1f s; python -m qaconv_triton.warmup does it before training", name, seconds
        )
    return kernel


@cache
def _configs(list_configs: ListConfigs, shape: tuple[int, ...], architecture: int) -> list[Config]:
    return list_configs(*shape)


def _cached_or_fastest(
    list_configs: ListConfigs, shape: tuple[int, ...], variant: str, run: Callable[[Config], Any]
) -> Config:
    """The configuration on disk, if it launches, or the fastest, which is put there."""
    configs = _configs(list_configs, shape, generation())
    cache_key = {
        "op": list_configs.__name__, "shape": list(shape), "variant": variant, "device": _device_name(),
        "triton": triton.__version__, "kernels": _kernels(), "configs": [config._asdict() for config in configs],
    }  # fmt: skip
    path = _path(cache_key)
    cached = None if path is None else _read(path, cache_key)
    if cached is not None:
        try:
            run(configs[cached])
            return configs[cached]
        except Exception as error:  # another driver, or no memory at present
            logger.warning("%s: %s does not launch (%s): choosing anew", path, configs[cached], error)
    logger.warning(
        "tuning %s %s %s for this GPU, once; python -m qaconv_triton.warmup does it before training, %s=0 does without",
        list_configs.__name__, shape, variant, TUNE_VARIABLE,
    )  # fmt: skip
    started = perf_counter()
    times, is_complete = benchmark_configs(configs, run)
    if not times:  # then the launch itself says what is wrong
        return configs[0]
    best = min(times, key=lambda number: times[number])
    logger.info("%s: number %d of %s ms, in %.1f s", list_configs.__name__, best, times, perf_counter() - started)
    if path is None or not is_complete:
        logger.warning("the choice of a configuration is for this process only")
        return configs[best]
    return configs[_publish(path, cache_key, times, best)]


def benchmark_configs(configs: list[Config], run: Callable[[Config], Any]) -> tuple[dict[int, float], bool]:
    """Time the configurations that compile and that fit the GPU.

    Those that spill registers to memory are skipped unless all do. An error in a configuration only excludes it.

    Returns:
        Milliseconds of each configuration, by its number, and whether another benchmark would exclude the same ones:
        false if one could not be timed, or lacked memory.
    """
    spills, is_complete = {}, True
    for number, config in enumerate(configs):
        try:
            spills[number] = _spilled(run(config))
        except Exception as error:  # out of (shared) memory, or a compiler that gives up, each version in its own way
            is_complete = is_complete and not _is_shortage(error)
            logger.info("no trial of %s: %s", config, error)
    least = min(spills.values(), default=0)
    times = {}
    for number in (number for number, spilled in spills.items() if not spilled or least):
        try:
            times[number] = _milliseconds(partial(run, configs[number]))
        except Exception as error:
            is_complete = False
            logger.warning("cannot time %s: %s", configs[number], error)
    return times, is_complete


def _is_shortage(error: Exception) -> bool:
    """Whether a launch failed for lack of memory or disk space, by no fault of its configuration."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, OSError)) or "out of memory" in str(error).lower()


def _spilled(kernel: Any) -> int:
    return getattr(kernel, "n_spills", None) or 0


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a launch: by events, after a flush of the L2 cache; of a long one the better of two."""
    if INTERPRETED:
        started = perf_counter()
        run()
        return 1e3 * (perf_counter() - started)
    times = []
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times) if min(times) > LONG_LAUNCH_MS else float(triton.testing.do_bench(run, return_mode="median"))


def cache_directory() -> Path | None:
    """Where choices are kept: `QACONV_TRITON_CACHE_DIR`, or qaconv_triton in the user's cache directory.

    None where that would be in the home directory, and there is none.
    """
    given = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME", "")
    default = os.path.join(base if os.path.isabs(base) else "~/.cache", "qaconv_triton")
    try:
        path = Path(given or default).expanduser()
    except RuntimeError:  # a user without a home directory
        return None
    return path if given or path.is_absolute() else None


def _device_name() -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name()


@cache
def _kernels() -> str:
    """What stands for the kernels' source: another source is another benchmark."""
    sources = sorted([*Path(__file__).parent.glob("*.py"), *Path(norms.__file__).parent.glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _path(cache_key: dict[str, Any]) -> Path | None:
    """The file of a cache key."""
    name = hashlib.sha256(json.dumps(cache_key).encode()).hexdigest()[:16]
    directory = cache_directory()
    return None if directory is None else directory / f"{cache_key['op']}-{name}.json"


def _read(path: Path, cache_key: dict[str, Any]) -> int | None:
    """The choice on disk, a number of the key's configurations; None if there is none that can be used.

    Anything may lie at the path: only a small regular file is read, never through a link, and nothing waits.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                raise ValueError(f"no regular file of at most {MAX_FILE_BYTES} bytes")
            text = os.read(descriptor, MAX_FILE_BYTES)
        finally:
            os.close(descriptor)
        return _cached_number(json.loads(text), cache_key)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
    except (ValueError, RecursionError) as error:
        logger.warning("%s holds no choice of a configuration (%s)", path, error)
    return None


def _cached_number(content: object, cache_key: dict[str, Any]) -> int:
    """The choice that a file's content makes.

    Raises:
        ValueError: it is of another cache key, or holds none.
    """
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in cache_key.items()):
        raise ValueError("it is of another cache key")
    best = content.get("best")
    if type(best) is not int or not 0 <= best < len(cache_key["configs"]):
        raise ValueError(f"best: expected a number from 0 to {len(cache_key['configs']) - 1}, got {best!r:.40}")
    return best


def _publish(path: Path, cache_key: dict[str, Any], times: dict[int, float], best: int) -> int:
    """Put a choice on disk, whole or not at all, and return it; if there is one that launches here, return that."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, suffix=SUFFIX, dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                with suppress(OSError, AttributeError):  # others who may enter the directory may read it
                    os.fchmod(descriptor, 0o644 & path.parent.stat().st_mode)
                json.dump(cache_key | {"milliseconds": times, "best": best}, file, indent=1)
            try:
                os.link(name, path)
            except (OSError, AttributeError):  # there is something already, or no hard links
                present = _read(path, cache_key)
                if present in times:
                    return present
                os.replace(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        logger.warning("the choice of a configuration is for this process only: %s", error)
    return best


def _remove_stale(directory: Path) -> None:
    """Remove what killed processes have left half-written."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                        os.unlink(entry)
