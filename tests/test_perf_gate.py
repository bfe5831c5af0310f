"""`pytest --benchmark` and `--perf-gate` on one tiny check, as a user runs them, and on results that are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import graph, measure, perf, scores
from bench.matching import Case

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NAME = "pairs 5x7x16x3x2 match float32"
# a plugin that leaves one small check, and floors of its own; {spoil} may spoil its result
PLUGIN = """
from pathlib import Path
from bench import perf, scores
from bench.matching import Case

perf.FLOORS = Path(__file__).with_name("floors.json")
tiny = perf.Check("inference", "pairs", Case((5, 7, 16, 3, 2), ("match",), repeats=3), "match", scores.TUNED)
perf.checks = lambda device: [tiny]
{spoil}
"""
SPOIL = "from bench import eager; eager.PAIRS, right = 4, eager._score; eager._score = lambda *a: 2 * right(*a)"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def pytest_run(*options: str, floor: float | None = None, spoil: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / "one_check.py").write_text(PLUGIN.format(spoil=spoil))
        if floor is not None:
            (tmp_path / "floors.json").write_text(json.dumps({"cpu": {NAME: {"floor": floor}}}))
        command = [sys.executable, "-m", "pytest", "-p", "one_check", "-p", "no:cacheprovider", "tests", *options]
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = inherited | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return pytest_run


def only_perf(*options: str) -> list[str]:
    return ["--benchmark", f"--ignore-glob={ROOT}/tests/test_[!p]*", "--benchmark-storage", *options]


@pytest.mark.slow
def test_a_check_from_the_command_line_to_the_saved_file(run: Any, tmp_path: Path) -> None:
    storage = str(tmp_path / "kept")
    done = run(*only_perf(storage, "--benchmark-save=first", "--perf-gate"), floor=1e-6)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert f"{NAME}: " in done.stdout
    assert "(committed: 0.00)" in done.stdout
    (path,) = Path(storage).glob("*/*_first.json")
    (row,) = json.loads(path.read_text())["benchmarks"]
    info = row["extra_info"]
    assert row["group"] == "inference"
    assert row["stats"]["rounds"] == 3
    assert info["check"] == NAME
    assert info["baseline"] == scores.TUNED
    assert min(info["ratio"], info["tflops"], info["matmul_tflops"], info["copy_gbs"]) > 0
    assert info["peak_bytes"] >= 0
    assert info["tflops"] == pytest.approx(2 * 5 * 7 * 36 * 16 / row["stats"]["median"] / 1e12)
    again = run(*only_perf(storage, "--benchmark-compare"), floor=1e-6)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0001_first" in again.stdout
    assert "NOW" in again.stdout


@pytest.mark.slow
def test_the_gate_fails_below_its_floor_and_can_be_set(run: Any, tmp_path: Path) -> None:
    storage = str(tmp_path / "kept")
    failed = run(*only_perf(storage, "--perf-gate"), floor=1e6)
    assert failed.returncode == 1
    assert f"below the committed {1e6:.2f} of cpu" in failed.stdout
    saved = run(*only_perf(storage, "--perf-gate-save"))
    assert saved.returncode == 0, saved.stdout + saved.stderr
    entry = json.loads((tmp_path / "floors.json").read_text())["cpu"][NAME]
    assert entry["floor"] == pytest.approx(perf.SLACK * entry["ratio"], abs=0.01)
    assert entry["baseline"] == scores.TUNED
    ungated = run(*only_perf(storage), floor=1e6)
    assert ungated.returncode == 0, ungated.stdout


@pytest.mark.slow
def test_a_wrong_result_has_no_time(run: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run(*only_perf(str(tmp_path), f"--benchmark-json={report}"), spoil=SPOIL)
    assert done.returncode == 1
    assert "a wrong result has no time" in done.stdout
    assert not report.exists() or json.loads(report.read_text())["benchmarks"] == []


def test_without_the_option_perf_checks_are_skipped(run: Any) -> None:
    done = run("--ignore-glob", f"{ROOT}/tests/test_[!p]*", "-k", "test_performance")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert "a perf check: pytest --benchmark" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--perf-gate"], "pytest --benchmark --perf-gate"),
        (["--perf-gate-save"], "pytest --benchmark --perf-gate-save"),
        (["--benchmark", "-n", "2"], "leave -n out"),
        (["--benchmark", "--perf-gate", "--perf-gate-save"], "either checked or saved"),
        (["--benchmark", "--perf-gate", "--benchmark-disable"], "there are no times"),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Any, options: list[str], said: str) -> None:
    done = run(*options)
    assert done.returncode == 4
    assert said in done.stderr


def info(ratio: float, check: str = NAME) -> dict[str, Any]:
    return {"check": check, "ratio": ratio, "baseline": "eager", "commit": "abc", "device": "some CPU"}


def test_the_gate_compares_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf, "FLOORS", tmp_path / "floors.json")
    assert "no ratio is committed for cpu" in perf.verdict(info(9.0), CPU)
    perf.save_floors([info(2.0), info(3.0, "other")], CPU)
    assert perf.floors(CPU) == {NAME: 1.6, "other": 2.4}
    assert perf.verdict(info(1.6), CPU) == ""
    assert perf.verdict(info(1.59), CPU) == f"{NAME}: 1.59 times as fast as eager, below the committed 1.60 of cpu"
    assert perf.verdict(info(float("nan")), CPU) != ""
    perf.save_floors([info(4.0)], CPU)
    assert perf.floors(CPU) == {NAME: 3.2, "other": 2.4}


def test_every_check_of_a_cpu_has_a_committed_ratio() -> None:
    assert set(perf.floors(CPU)) == {check.name for check in perf.checks(CPU)}


def test_the_groups_of_either_device() -> None:
    parts = {f"class path, {part}" for part in ("forward", "backward", "step")}
    for device in (CPU, torch.device("cuda")):
        found = perf.checks(device)
        assert {check.group for check in found} == {"graph", "all pairs", "inference", *parts}
        assert len({check.name for check in found}) == len(found)
        for check in found:
            if isinstance(check.case, graph.Case):
                names = set(graph.methods(check.case, device))
            else:
                names = set(scores.methods(check.op, check.part, device))
            assert {scores.OURS, check.baseline} <= names


def test_the_clock_goes_on_by_what_a_call_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "stopwatch", lambda device: lambda function: function())
    perf._watch.cache_clear()
    clock = perf.Clock()
    clock.time(CPU, lambda: 2.5)
    clock.time(CPU, lambda: 0.25)
    assert clock() == 2.75
    perf._watch.cache_clear()


def test_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    own = [0.5, 2.0]

    class Fixture:
        stats = SimpleNamespace(stats=SimpleNamespace(data=own))
        extra_info: dict[str, Any] = {}  # noqa: RUF012

        def pedantic(self, target: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
            for _ in range(rounds + warmup_rounds):
                setup()
                target()

    def provider(name: str) -> SimpleNamespace:
        return SimpleNamespace(function=lambda: calls.append(name), peak=lambda: 7, products=None)

    monkeypatch.setattr(perf, "_watch", lambda device: lambda function: (function(), 3.0)[1])
    prepared = perf.Prepared(provider("ours"), provider("theirs"), 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr(perf, "prepare", lambda check, device: prepared)
    case = Case((5, 7, 16, 3, 2), repeats=2)
    fixture = Fixture()
    perf.run(perf.Check("inference", "pairs", case, "match", scores.TUNED), fixture, CPU)
    assert calls == ["theirs", "ours"] * (2 + perf.WARM_UP)
    assert fixture.extra_info["ratio"] == (3.0 / 0.5 + 3.0 / 2.0) / 2
    assert fixture.extra_info["baseline_median_s"] == 3.0
    assert fixture.extra_info["peak_bytes"] == 7
