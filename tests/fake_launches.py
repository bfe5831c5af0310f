"""For tests of tuning: launches that stand in for a kernel's, and tuning switched on with a cache of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from qaconv_triton.kernels import tuning
from qaconv_triton.kernels.config import Config

CONFIGS = [Config({"BC": 2**power}, num_warps=4, num_stages=3) for power in range(4)]


def table(locations: int) -> list[Config]:
    return CONFIGS


class Launches:
    """A launch that records its configurations, of which some spill, or find too little shared memory."""

    def __init__(self, spills: dict[int, int] | None = None, too_large: tuple[int, ...] = ()) -> None:
        self.calls: list[int] = []
        self.spills, self.too_large = spills or {}, too_large

    def __call__(self, config: Config) -> SimpleNamespace:
        number = CONFIGS.index(config)
        self.calls.append(number)
        if number in self.too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return SimpleNamespace(n_spills=self.spills.get(number, 0))


def select(launches: Launches, operations: float = 1e15, variant: str = "tf32") -> int:
    """The number of the configuration that is selected."""
    return CONFIGS.index(tuning.select_config(table, (49,), variant, operations, launches))


def tune(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch tuning on, with nothing selected yet; a configuration takes 10 ms less its BC."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(tuning.TUNE_VARIABLE, "1")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(cache))
    monkeypatch.setattr(tuning, "selected", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: 10.0 - run.args[0].tiles["BC"])
