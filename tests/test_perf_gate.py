"""`pytest --benchmark` and `--perf-gate` on one tiny check, as a user runs them, and the gate on known ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import perf_gate
import pytest
import torch

from bench import graph, scores
from bench.cases import Case

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NAME = "pairs 5x7x16x3x2 match float32"
# a plugin that leaves one small check, with floors of its own and small ceilings
PLUGIN = """
from pathlib import Path
import torch
from bench import baselines, measure, scores
from bench.cases import Case

def pytest_configure(config):
    import perf_gate
    perf_gate.FLOORS = Path(__file__).with_name("floors.json")
    tiny = Case("pairs", (5, 7, 16, 3, 2), repeats=3)
    perf_gate.checks = lambda device: [perf_gate.Check("inference", tiny, "match", scores.TUNED)]
    measure.MATMUL_SIZE["cpu"] = 128
    {change}
"""
WRONG = "score = baselines._score; baselines._score = lambda *arguments: 2 * score(*arguments)"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def pytest_run(*options: str, floor: float | None = None, change: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / "one_check.py").write_text(PLUGIN.format(change=change))
        if floor is not None:
            floors = {perf_gate.machine(CPU): {NAME: {"floor": floor}}}
            (tmp_path / "floors.json").write_text(json.dumps(floors))
        command = [sys.executable, "-m", "pytest", "-p", "one_check", "-p", "no:cacheprovider", "--benchmark", "tests"]
        command += [f"--ignore-glob={ROOT}/tests/test_[!p]*", "--benchmark-storage", str(tmp_path / "kept"), *options]
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = inherited | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return pytest_run


@pytest.mark.slow
def test_a_check_from_the_command_line_to_the_saved_file(run: Any, tmp_path: Path) -> None:
    done = run("--benchmark-save=first", "--perf-gate", floor=1e-6)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert f"{NAME}: " in done.stdout
    assert "(floor: 0.00)" in done.stdout
    (path,) = (tmp_path / "kept").glob("*/*_first.json")
    (row,) = json.loads(path.read_text())["benchmarks"]
    info = row["extra_info"]
    assert row["stats"]["rounds"] == 3
    assert (row["group"], info["check"], info["baseline"]) == ("inference", NAME, scores.TUNED)
    assert min(info["ratio"], info["matmul_tflops"]) > 0
    assert info["peak_bytes"] >= 0
    assert info["tflops"] == pytest.approx(2 * 5 * 7 * 36 * 16 / row["stats"]["median"] / 1e12)


@pytest.mark.slow
def test_the_gate_fails_below_its_floor_and_can_be_saved(run: Any, tmp_path: Path) -> None:
    failed = run("--perf-gate", floor=1e6)
    assert failed.returncode == 1
    assert f"below the committed {1e6:.2f}x of cpu" in failed.stdout
    saved = run("--perf-gate-save")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    entry = json.loads((tmp_path / "floors.json").read_text())[perf_gate.machine(CPU)][NAME]
    assert entry["floor"] == pytest.approx(perf_gate.SLACK * entry["ratio"], abs=0.01)


@pytest.mark.slow
def test_a_wrong_result_has_no_time(run: Any, tmp_path: Path) -> None:
    done = run(f"--benchmark-json={tmp_path / 'report.json'}", change=WRONG)
    assert done.returncode == 1
    assert "a wrong result has no time" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--perf-gate"}, "pytest --benchmark --perf-gate"),
        ({"--benchmark", "numprocesses"}, "leave -n out"),
        ({"--benchmark", "--perf-gate", "--perf-gate-save"}, "either checked or saved"),
        ({"--benchmark", "--perf-gate", "--benchmark-disable"}, "there are no times"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: set[str], message: str) -> None:
    config: Any = SimpleNamespace(getoption=lambda name, default=None: name in options)
    with pytest.raises(pytest.UsageError, match=message):
        perf_gate.pytest_configure(config)


def info(ratio: float, check: str = NAME) -> dict[str, Any]:
    return {"check": check, "ratio": ratio, "baseline": "eager", "commit": "abc", "device": "some CPU"}


def test_the_gate_compares_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_gate, "FLOORS", tmp_path / "floors.json")
    with pytest.raises(AssertionError, match="no ratio is committed for cpu"):
        perf_gate.assert_floor(info(9.0), CPU)
    perf_gate.save_floors([info(2.0), info(3.0, "other")], CPU)
    perf_gate.save_floors([info(4.0)], CPU)
    assert perf_gate.floors(CPU) == {NAME: 3.2, "other": 2.4}
    perf_gate.assert_floor(info(3.2), CPU)
    for ratio in (3.19, float("nan")):
        with pytest.raises(AssertionError, match=rf"{ratio:.2f}x the speed of eager, below the committed 3.20x of cpu"):
            perf_gate.assert_floor(info(ratio), CPU)


def test_every_check_has_a_floor_and_providers() -> None:
    committed = json.loads(perf_gate.FLOORS.read_text(encoding="utf-8"))
    for machine, floors in committed.items():
        device = CPU if machine.startswith("cpu") else torch.device("cuda")
        assert set(floors) == {check.name for check in perf_gate.checks(device)}
    for device in (CPU, torch.device("cuda")):
        for check in perf_gate.checks(device):
            if check.case.op == "graph":
                names = set(graph.methods(check.case, device))
            else:
                names = set(scores.methods(check.case.op, check.part, device))
            assert {scores.OURS, check.baseline} <= names


def test_times_are_taken_in_turn_by_the_stopwatch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Fixture:
        stats = SimpleNamespace(stats=SimpleNamespace(data=[0.5, 2.0]))
        extra_info: dict[str, Any] = {}  # noqa: RUF012

        def pedantic(self, target: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
            for _ in range(rounds + warmup_rounds):
                setup()
                target()

    ours = SimpleNamespace(has_peak=False, products=None, work=(1.0, 1.0))
    functions = (partial(calls.append, name) for name in ("ours", "baseline"))
    clock = perf_gate.Clock()
    monkeypatch.setattr(perf_gate, "clock", clock)
    monkeypatch.setattr(perf_gate, "_watch", lambda device: lambda function: (function(), 3.0)[1])
    monkeypatch.setattr(perf_gate, "prepare", lambda check, device: (ours, *functions))
    fixture, case = Fixture(), Case("pairs", (5, 7, 16, 3, 2), repeats=2)
    perf_gate.run(perf_gate.Check("inference", case, "match", scores.TUNED), fixture, CPU)
    assert calls == ["baseline", "ours"] * (2 + perf_gate.WARM_UP_ROUNDS)
    assert clock() == 3.0 * (2 + perf_gate.WARM_UP_ROUNDS)
    assert fixture.extra_info["ratio"] == (3.0 / 0.5 + 3.0 / 2.0) / 2
    assert fixture.extra_info["baseline_median_s"] == 3.0
