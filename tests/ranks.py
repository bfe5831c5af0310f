"""Runs a function on several ranks, in processes that train together over gloo."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

SECONDS = 300  # that the ranks may take


def on_ranks(function: Callable[[int], Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What `function(rank)`, picklable, returns on each rank, as `torch.save` keeps it.

    Skips the test where processes cannot train together at all, as in a sandbox without a network.
    """
    arguments = (function, folder, ranks)
    started = multiprocessing.start_processes(_run, arguments, nprocs=ranks, join=False, start_method="spawn")
    end = time.monotonic() + SECONDS
    try:
        while not started.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f"{ranks} ranks have not ended after {SECONDS} s")
    except Exception as error:
        if not all((folder / f"{rank} trains").exists() for rank in range(ranks)):
            pytest.skip(f"DistributedDataParallel does not work here: {str(error).strip().splitlines()[-1]}")
        raise
    finally:
        for process in started.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _run(rank: int, function: Callable[[int], Any], folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    # Ranks that a mesh does not have wait for those that it has.
    distributed.init_process_group("gloo", store, timedelta(seconds=SECONDS), rank=rank, world_size=ranks)
    _train_two_numbers(rank, ranks)
    (folder / f"{rank} trains").touch()
    torch.save(function(rank), folder / f"{rank}.pt")
    distributed.barrier()
    # Nothing is destroyed: a process group that goes with its DistributedDataParallel joins, under Python's lock, a
    # thread that may wait for this lock to free a tensor (seen with torch 2.13; neither process ends then).
    os._exit(0)


def _train_two_numbers(rank: int, ranks: int) -> None:
    """What every training on several ranks needs, without the library."""
    model = DistributedDataParallel(nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    distributed.all_gather([torch.zeros(2) for _ in range(ranks)], torch.full((2,), float(rank)))


def peak_of(call: Callable[[], Any]) -> int:
    """How much the resident memory of this process grows while it is called, in bytes."""

    def read(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read("VmRSS")
    call()
    return read("VmHWM") - before
