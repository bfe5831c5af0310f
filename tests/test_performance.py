"""The perf checks: `pytest --benchmark` runs them and nothing else; without it they are skipped."""

from __future__ import annotations

from typing import Any

import perf_gate
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.name, marks=pytest.mark.benchmark(group=check.group, timer=perf_gate.clock))
        for check in perf_gate.checks(DEVICE)
    ],
)
def test_performance(check: perf_gate.Check, benchmark: Any, request: pytest.FixtureRequest) -> None:
    perf_gate.run(check, benchmark, DEVICE)
    if request.config.getoption("--perf-gate"):
        assert benchmark.extra_info, "pytest-benchmark is disabled: there are no times"
        perf_gate.assert_floor(benchmark.extra_info, DEVICE)
