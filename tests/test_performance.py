"""The perf checks of bench/perf.py: `pytest --benchmark` runs them, and them alone; without it they are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import perf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.name, marks=pytest.mark.benchmark(group=check.group, timer=perf.clock))
        for check in perf.checks(DEVICE)
    ],
)
def test_performance(check: perf.Check, benchmark: Any, request: pytest.FixtureRequest) -> None:
    perf.run(check, benchmark, DEVICE)
    if request.config.getoption("--perf-gate"):
        assert benchmark.extra_info, "pytest-benchmark is disabled: there is no time to judge"
        wrong = perf.verdict(benchmark.extra_info, DEVICE)
        assert not wrong, wrong
