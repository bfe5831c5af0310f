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
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .config import INTERPRETED, Config, generation

TUNE_VARIABLE = "QACONV_TRITON_TUNE"
CACHE_VARIABLE = "QACONV_TRITON_CACHE_DIR"
WORTH = 2.0**34  # operations of a launch that is tuned for; a smaller one takes what a launch takes anyway

Table = Callable[..., list[Config]]  # a function of config.py
logger = logging.getLogger(__name__)
chosen: dict[tuple[object, ...], Config] = {}  # in this process


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
    if operations < WORTH or not is_on():
        return _configs(table, shape, generation())[0]
    key = (table.__name__, shape, variant)
    if key not in chosen:
        if not INTERPRETED and torch.cuda.is_current_stream_capturing():  # which allows no clock
            return _configs(table, shape, generation())[0]
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
        "triton": triton.__version__, "configs": [config._asdict() for config in configs],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]
    path = cache_directory() / f"{table.__name__}-{name}.json"
    known = _read(path, configs)
    if known is not None:
        return known
    logger.info("tuning %s %s for %s: %d configurations", table.__name__, variant, _device_name(), len(configs))
    started = perf_counter()
    try:
        times = contest(configs, run)
    except torch.OutOfMemoryError as error:  # of the flush, in a training that leaves no memory
        logger.warning("no memory to tune %s: it runs as shipped (%s)", table.__name__, error)
        return configs[0]
    best = min(times, key=lambda number: times[number])
    logger.info("%s: number %d of %s ms, in %.1f s", table.__name__, best, times, perf_counter() - started)
    _write(path, question | {"milliseconds": times, "best": best})
    return _read(path, configs) or configs[best]  # another process may have been first


def contest(configs: list[Config], run: Callable[[Config], Any]) -> dict[int, float]:
    """Milliseconds of each configuration, by its place, of those that the GPU has room for.

    One that spills registers to memory takes part only if all do.

    Raises:
        OutOfResources: there is room for none.
    """
    spills: dict[int, int] = {}
    for number, config in enumerate(configs):
        try:
            spills[number] = getattr(run(config), "n_spills", None) or 0
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PassManager" not in str(error):  # as a compiler pass fails
                raise
            logger.debug("configuration %s: %s", config, error)
            if number == len(configs) - 1 and not spills:
                raise
    least = min(spills.values())
    kept = [number for number, spilled in spills.items() if not spilled or least]
    return {number: _milliseconds(partial(run, configs[number])) for number in kept}


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a launch: by events, after a flush of the L2 cache."""
    if not INTERPRETED:
        return float(triton.testing.do_bench(run, return_mode="median"))
    started = perf_counter()
    run()
    return 1e3 * (perf_counter() - started)


def cache_directory() -> Path:
    """Where choices are kept: `QACONV_TRITON_CACHE_DIR`, or qaconv_triton in the user's cache directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qaconv_triton"


def _device_name() -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name()


def _read(path: Path, configs: list[Config]) -> Config | None:
    """A choice on disk; None if there is none, or none that can be read, which is then removed."""
    try:
        return configs[json.loads(path.read_text(encoding="utf-8"))["best"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s holds no choice of a configuration (%s): choosing anew", path, error)
        with suppress(OSError):
            path.unlink()
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Put a choice on disk, unless there is one: a file appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            json.dump(content, file, indent=1)
        with suppress(FileExistsError):
            os.link(file.name, path)
        os.unlink(file.name)
    except OSError as error:
        logger.warning("the choice of a configuration is for this process only: %s", error)
