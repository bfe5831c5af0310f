"""Which configuration of config.py a launch takes: the shipped one, or the fastest on the GPU at hand.

A launch that is large enough to matter tries the configurations of its shape class once, before its real work: those
that the compiler finds room for without a spill are timed, and the fastest is kept, in this process and on disk for all
later ones. Of processes that tune at the same time the first to finish decides for all. Results do not depend on the
choice but for rounding; pin it with `QACONV_TRITON_TUNE=0` where even that must be the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import triton

from .config import INTERPRETED, Config, generation

TUNE_VARIABLE = "QACONV_TRITON_TUNE"
CACHE_VARIABLE = "QACONV_TRITON_CACHE_DIR"
WORTH = 2.0**34  # operations of a launch that is tuned for; a smaller one takes what a launch takes anyway
LONG = 100.0  # milliseconds of a launch that is not repeated for its time

Table = Callable[..., list[Config]]  # a function of config.py
logger = logging.getLogger(__name__)
chosen: dict[tuple[object, ...], Config] = {}  # in this process
one_at_a_time = threading.Lock()  # contests disturb each other's times


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


def choose(
    table: Table, shape: tuple[int, ...], variant: str, operations: float, run: Callable[[Config], Any]
) -> Config:
    """The configuration for a launch.

    Args:
        table: the function of config.py that lists configurations, the shipped one first.
        shape: its arguments, the launch's shape class.
        variant: what else changes the code of the kernel.
        operations: of this launch.
        run: launches it with a configuration, as often as it is called to the same effect, and returns the compiled
            kernel.
    """
    if operations < WORTH or not is_on():  # by size alone, so that a launch takes the same in every run
        return _configs(table, shape, generation())[0]
    key = (table.__name__, shape, variant, 0 if INTERPRETED else torch.cuda.current_device())
    if key not in chosen:
        if not INTERPRETED and torch.cuda.is_current_stream_capturing():  # which allows no clock
            return _configs(table, shape, generation())[0]
        with one_at_a_time:
            if key not in chosen:
                chosen[key] = _found(table, shape, variant, run)
    return chosen[key]


@cache
def _configs(table: Table, shape: tuple[int, ...], architecture: int) -> list[Config]:
    return table(*shape)


def _found(table: Table, shape: tuple[int, ...], variant: str, run: Callable[[Config], Any]) -> Config:
    """The choice on disk, or that of a contest, which is put there."""
    configs = _configs(table, shape, generation())
    question = {
        "table": table.__name__, "shape": shape, "variant": variant, "device": _device_name(),
        "triton": triton.__version__, "kernels": _kernels(), "configs": [config._asdict() for config in configs],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]
    path = cache_directory() / f"{table.__name__}-{name}.json"
    known = _read(path, configs)
    if known is not None:
        return known
    logger.warning(
        "tuning %s %s %s for this GPU, once; python -m qaconv_triton.warmup does it before training, %s=0 does without",
        table.__name__, shape, variant, TUNE_VARIABLE,
    )  # fmt: skip
    started = perf_counter()
    times = contest(configs, run)
    if not times:
        return configs[0]
    best = min(times, key=lambda number: times[number])
    logger.info("%s: number %d of %s ms, in %.1f s", table.__name__, best, times, perf_counter() - started)
    _write(path, question | {"milliseconds": times, "best": best})
    return _read(path, configs) or configs[best]  # another process may have been first


def contest(configs: list[Config], run: Callable[[Config], Any]) -> dict[int, float]:
    """Milliseconds of each configuration, by its place, of those that compile and that the GPU has room for.

    One that spills registers to memory takes part only if all do. The shipped one is launched first, as it would be
    without a contest, and what it raises is raised; whatever is wrong with another costs that one its place only.
    """
    spills = {0: _spilled(run(configs[0]))}
    for number, config in enumerate(configs[1:], start=1):
        try:
            spills[number] = _spilled(run(config))
        except Exception as error:  # no room, no memory, or a compiler that gives up, each version in its own way
            logger.info("no trial of %s: %s", config, error)
    least = min(spills.values())
    times = {}
    for number in (number for number, spilled in spills.items() if not spilled or least):
        try:
            times[number] = _milliseconds(partial(run, configs[number]))
        except torch.OutOfMemoryError as error:  # of the flush, in a training that leaves no memory
            logger.warning("no memory to time %s (%s)", configs[number], error)
    return times


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
    return min(times) if min(times) > LONG else float(triton.testing.do_bench(run, return_mode="median"))


def cache_directory() -> Path:
    """Where choices are kept: `QACONV_TRITON_CACHE_DIR`, or qaconv_triton in the user's cache directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qaconv_triton"


def _device_name() -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name()


@cache
def _kernels() -> str:
    """What stands for the kernels' source: another source is another contest."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _read(path: Path, configs: list[Config]) -> Config | None:
    """A choice on disk; None if there is none that can be read. One that means nothing is removed."""
    try:
        return configs[json.loads(path.read_text(encoding="utf-8"))["best"]]
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("%s holds no choice of a configuration (%s): choosing anew", path, error)
        with suppress(OSError):
            path.unlink()
    return None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Put a choice on disk, unless there is one: a file appears whole or not at all."""
    whole = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(json.dumps(content, indent=1), encoding="utf-8")
        try:
            os.link(whole, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            whole.replace(path)
    except OSError as error:
        logger.warning("the choice of a configuration is for this process only: %s", error)
    finally:
        with suppress(OSError):
            whole.unlink()
