"""The GPU check on made-up stages and commands, its workloads on the CPU, and a dry run of all of it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu_check, matching, measure, optional, workloads
from bench.gpu_check import Check, Failed, Outcome, Ran, Skipped, Stopped, TimedOut, perform
from qaconv_triton import functional, ops

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    made = Check(tmp_path, "cpu", dry=True)
    made.begin("stage", 60)
    return made


def python(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def printing(monkeypatch: pytest.MonkeyPatch, check: Check, code: int, printed: str) -> None:
    """Whatever the check runs from now on ends like this."""
    check.dry = False
    monkeypatch.setattr(check, "run", lambda command, **more: Ran(code, printed))


# --- processes


def test_a_command_that_ends_well(check: Check) -> None:
    text = "import os, sys; print('out', os.environ['MORE']); print('err', file=sys.stderr)"
    first = check.run(python(text), MORE="1")
    assert (first.code, sorted(first.printed.split("\n"))) == (0, ["", "err", "out 1"])
    assert check.run(python("print('second')")).printed == "second\n"  # of its own output, not of the log
    log = check.log.read_text(encoding="utf-8")
    assert "out 1" in log
    assert log.count("$ ") == 2


def test_a_dry_run_interprets_kernels_where_they_are_meant(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "other")
    shown = "import os; print(*(os.environ.get(n) for n in ('TRITON_INTERPRET', 'QACONV_TRITON_BACKEND')))"
    assert check.python("-c", shown) == "1 triton\n"
    assert check.python("-c", shown, kernels=False) == "None None\n"
    check.dry = False
    assert check.python("-c", shown) == "None None\n"


def test_a_command_that_fails(check: Check) -> None:
    assert check.run(python("raise SystemExit(3)")).code == 3
    with pytest.raises(Failed, match="exit status 1: ValueError: 7"):
        check.python("-c", "raise ValueError(7)")


def test_a_command_that_is_not_there(check: Check) -> None:
    with pytest.raises(Skipped, match="needs no-such-program"):
        check.run(["no-such-program", "--version"])


CHILD = "import os, time; print('child', os.getpid(), flush=True); time.sleep(600)"
STARTS_A_CHILD = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {CHILD!r}]"
STARTS_A_DAEMON = STARTS_A_CHILD + ", start_new_session=True"


def children(log: Path) -> list[int]:
    """The processes that have printed that they run."""
    return [int(found) for found in re.findall(r"^child (\d+)$", log.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("start", [STARTS_A_CHILD, STARTS_A_DAEMON])
def test_a_command_that_hangs_is_ended_with_its_children(
    start: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "monotonic", lambda: 2.0 * bool(children(check.log)))
    check.deadline = 1.0
    with pytest.raises(TimedOut):
        check.run(python(start + "); child.wait()"))
    (child,) = children(check.log)
    assert not _runs(child)


@pytest.mark.parametrize("start", [STARTS_A_CHILD, STARTS_A_DAEMON])
def test_no_background_child_outlives_its_command(start: str, check: Check) -> None:
    ran = check.run(python(start + ", stdout=subprocess.PIPE); sys.stdout.buffer.write(child.stdout.readline())"))
    assert ran.code == 0
    (child,) = children(check.log)
    assert not _runs(child)


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def ending(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that raises if the check does not catch it, instead of ending the tests."""

    def uncaught(number: int, frame: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name} was not caught")

    before = signal.signal(request.param, uncaught)
    yield request.param
    assert signal.signal(request.param, before) is uncaught  # the check has put it back


def test_a_signal_ends_the_child_and_leaves_a_summary(
    ending: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sends = CHILD.replace("time.sleep", f"os.kill(os.getppid(), {int(ending)}); time.sleep")

    def hang(check: Check) -> str:
        return check.python("-c", sends)

    made = {"first": (lambda check: "figure", 1.0), "second": (hang, 1.0), "third": (hang, 1.0)}
    monkeypatch.setattr(gpu_check, "STAGES", made)
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--output", str(tmp_path)])
    (log,) = tmp_path.glob("*/gpu-check/second.txt")
    (child,) = children(log)
    assert not _runs(child)
    (path,) = tmp_path.glob("*/summary.md")
    text = path.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| first | ok | 0 | figure |" in text
    assert re.search(rf"\| second \| stopped \| \d+ \| by {ending.name} \|", text)
    assert "| third | not run | 0 |  |" in text


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")  # what is ended but not yet waited for does not run
    return not (status.exists() and "State:\tZ" in status.read_text(encoding="utf-8"))


# --- stages


@pytest.mark.parametrize(
    ("raised", "status", "figure"),
    [
        (None, "ok", "7 results"),
        (Failed("wrong"), "failed", "wrong"),
        (Skipped("needs X"), "skipped", "needs X"),
        (TimedOut("stopped"), "timed out", "after 5 s: stopped"),
        (KeyError("key"), "failed", "KeyError: 'key'"),
        (SystemExit(2), "failed", "SystemExit: 2"),
        (Stopped("by SIGTERM"), "stopped", "by SIGTERM"),
    ],
)
def test_outcomes(check: Check, raised: BaseException | None, status: str, figure: str) -> None:
    def stage(given: Check) -> str:
        assert given is check
        check.run(python("print('ran')"))
        if raised:
            raise raised
        return "7 results"

    outcome = perform(check, "name", stage, 5)
    assert (outcome.name, outcome.status, outcome.figure) == ("name", status, figure)
    assert (check.folder / "gpu-check" / "name.txt").read_text(encoding="utf-8").endswith("\nran\n")


def test_of_a_large_log_the_end_is_kept(check: Check) -> None:
    perform(check, "name", lambda given: given.python("-c", "for i in range(30000): print('line', i)"), 60)
    kept = check.log.read_text(encoding="utf-8")
    assert len(kept) < gpu_check.LOG_BYTES + 100
    assert kept.startswith("(only the last")
    assert kept.endswith("line 29999\n")


def test_needs() -> None:
    gpu_check.needs("torch")
    with pytest.raises(Skipped, match="needs no_such_package, nor_this"):
        gpu_check.needs("torch", "no_such_package", "nor_this")


def test_one_hash_that_differs_fails(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    same, other = {"loss": "1", "graph": "2"}, {"loss": "1", "graph": "3"}
    printing(monkeypatch, check, 0, f"noise\nhashes: {json.dumps([same, same])}\nnoise")
    assert gpu_check.bit_identity(check).startswith("2 tensors the same")
    printing(monkeypatch, check, 0, f"hashes: {json.dumps([same, other])}\n")
    with pytest.raises(Failed, match="1 of 2 tensors differ, the first: graph"):
        gpu_check.bit_identity(check)
    assert "- graph" in check.report


def test_the_sanitizer_may_refuse_the_device(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    printing(monkeypatch, check, 1, "========= Error: Device not supported. See the notes.\n")
    with pytest.raises(Skipped, match="refused the device"):
        gpu_check.memcheck(check)
    printing(monkeypatch, check, 0, "graph: ok\n========= ERROR SUMMARY: 0 errors\n")
    assert gpu_check.memcheck(check) == "ERROR SUMMARY: 0 errors"
    printing(monkeypatch, check, 42, "graph: ok\n========= RACECHECK SUMMARY: 2 hazards displayed\n")
    with pytest.raises(Failed, match="2 hazards"):
        gpu_check.racecheck(check)


def test_the_sanitizer_must_have_looked_at_right_results(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, printed, said in (
        (0, "graph: ok\n", "no summary: graph: ok"),  # it never attached
        (0, "========= ERROR SUMMARY: 0 errors\n", "0 errors"),  # nothing was exercised
        (1, "graph: off by 1\n========= ERROR SUMMARY: 0 errors\n", "exit status 1 of what was looked at"),
    ):
        printing(monkeypatch, check, code, printed)
        with pytest.raises(Failed, match=said):
            gpu_check.memcheck(check)


def test_counters_may_be_unreadable(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    printing(monkeypatch, check, 1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
    with pytest.raises(Skipped, match="ERR_NVGPUCTRPERM"):
        gpu_check.profile(check)
    printing(monkeypatch, check, 0, "    Compute (SM) Throughput           %        61.27\n")
    assert "_append_kernel: 61.27 %" in gpu_check.profile(check)
    printing(monkeypatch, check, 0, "==WARNING== No kernels were profiled.\n")
    with pytest.raises(Failed, match="No kernels"):
        gpu_check.profile(check)


def test_failures_of_tests_are_told(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    printing(monkeypatch, check, 1, "FAILED tests/a.py::test_b - assert 1\n=== 1 failed, 9 passed in 3.21s ===\n")
    with pytest.raises(Failed, match="1 failed, 9 passed"):
        gpu_check.tests(check)
    assert "- `FAILED tests/a.py::test_b - assert 1`" in check.report


def test_without_some_test_packages_the_other_tests_run(tmp_path: Path, check: Check) -> None:
    (tmp_path / "test_demo.py").write_text("import torchmetrics")
    (tmp_path / "test_properties.py").write_text("""
import pytest
from hypothesis import given, settings, strategies as st

@st.composite
def cases(draw):
    return draw(st.integers(1, 3))

@settings(deadline=None)
@given(cases())
def test_a_property(case):
    raise AssertionError

@pytest.mark.benchmark
def test_something_else():
    pass
""")
    hidden = ("hypothesis", "pytest_benchmark", "torchmetrics")
    text = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ("-p", "bench.optional", "-p", "no:cacheprovider", "--strict-markers", "-c", str(tmp_path / "none.toml"))
    (tmp_path / "none.toml").touch()
    ran = check.run(python(text, *options, str(tmp_path)), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONPATH=str(ROOT))
    assert ran.code == 0, ran.printed
    assert "1 passed, 1 skipped" in ran.printed


def test_the_files_that_are_left_out_exist() -> None:
    for name in (*optional.NEEDS, *gpu_check.WITHOUT_A_GPU):
        assert (ROOT / "tests" / name).exists()


@pytest.mark.parametrize("name", ["B=48 compiled", ""])
def test_kernels_are_counted(name: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check.dry = False
    batches: list[str] = []

    def compile_kernels(*arguments: str, **more: str) -> str:
        batches.append(arguments[2])
        Path(more["TRITON_CACHE_DIR"]).mkdir(exist_ok=True)
        for binary in ["first"] if len(batches) == 1 else [name] * bool(name):
            (Path(more["TRITON_CACHE_DIR"]) / f"{binary}.cubin").touch()
        return ""

    monkeypatch.setattr(check, "workload", compile_kernels)
    if name:
        with pytest.raises(Failed, match=r"1 kernels, then 1 more: triton/B=48 compiled\.cubin"):
            gpu_check.compiled_once(check)
    else:
        assert gpu_check.compiled_once(check).startswith("1 kernels for B = 64")
    assert batches == ["64", "48"]


def test_losses_must_fall_and_be_finite(tmp_path: Path) -> None:
    def curve(first: float, last: float) -> Path:
        path = tmp_path / "losses.csv"
        rows = [f"{m},1,{i},{loss},0" for m in ("random", "graph") for i, loss in enumerate([first] * 30 + [last] * 30)]
        path.write_text("\n".join(["method,seed,batch,loss,accuracy", *rows]), encoding="utf-8")
        return path

    assert gpu_check.falling(curve(2.0, 1.0)).startswith("random: loss 2.00 to 1.00 in 60 batches")
    for bad in (curve(1.0, 1.0), curve(1.0, float("nan"))):
        with pytest.raises(Failed, match=r"random|does not fall"):
            gpu_check.falling(bad)


def test_a_study_that_is_stopped_keeps_its_rows(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> str:
        for op, status in (("graph", "ok"), ("pairs", found)):
            row = measure.Row(op, "1x2", "qaconv_triton", "float32", status, **measure.environment(CPU))
            gpu_check.table.save([row], check.folder.parent)
        raise TimedOut("stopped")

    name = measure.environment(CPU)["device"]
    check.folder = check.folder / gpu_check.table.slug(name)
    monkeypatch.setattr(check, "python", stopped)
    found = "ok"
    assert gpu_check.study(check) == "2 rows, then the time was over: more with --minutes 30"
    found = "wrong: scores are off"
    with pytest.raises(Failed, match="1 of 2 rows: wrong"):
        gpu_check.study(check)
    monkeypatch.setattr(gpu_check.table, "read", lambda path: [])
    with pytest.raises(TimedOut, match="no case has come to its end"):
        gpu_check.study(check)


# --- the command


def stages(monkeypatch: pytest.MonkeyPatch, *statuses: str) -> None:
    def stage(status: str) -> str:
        if status != "ok":
            raise {"failed": Failed, "skipped": Skipped, "timed out": TimedOut}[status]("a | b")
        return "figure"

    made = {f"stage-{i}": (lambda check, status=status: stage(status), 1.0) for i, status in enumerate(statuses)}
    monkeypatch.setattr(gpu_check, "STAGES", made)


def test_exit_status_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages(monkeypatch, "ok", "skipped")
    command.main(["gpu-check", "--dry-run", "--output", str(tmp_path)])
    stages(monkeypatch, "failed", "ok")
    with pytest.raises(SystemExit) as ended:
        command.main(["gpu-check", "--dry-run", "--output", str(tmp_path)])
    assert ended.value.code == 1
    (path,) = tmp_path.glob("*/summary.md")
    text = path.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert text.startswith("# Dry run of the GPU check: nothing was measured on a GPU\n")
    assert "| stage-0 | failed | 0 | a / b |" in text
    assert "| stage-1 | ok | 0 | figure |" in text  # a failure does not end the run
    stages(monkeypatch, "timed out")
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--output", str(tmp_path)])


def test_later_stages_get_what_earlier_ones_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(gpu_check, "STAGES", {name: (lambda check: "", 1.0) for name in "abcd"})
    monkeypatch.setattr(gpu_check, "monotonic", lambda: 10.0 * len(given))  # each takes ten seconds

    def told(check: Check, name: str, stage: object, seconds: float) -> Outcome:
        given.append(seconds)
        return Outcome(name, "ok", 0.0, "")

    monkeypatch.setattr(gpu_check, "perform", told)
    gpu_check.main(["--dry-run", "--minutes", "2", "--output", str(tmp_path)])
    assert given == pytest.approx([120 / 4, 110 / 3, 100 / 2, 90])
    given.clear()
    gpu_check.main(["--dry-run", "--minutes", "2", "--output", str(tmp_path), "--stages", "c", "b"])
    assert given == pytest.approx([120 / 2, 110])
    given.clear()
    gpu_check.main(["--dry-run", "--output", str(tmp_path)])
    assert given == [math.inf] * 4  # a dry run is not cut by the clock


def broken(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something fail that is no stage: the second stage's log, or the summary after it."""
    if what == "log of a stage":
        begin = Check.begin
        monkeypatch.setattr(
            Check, "begin", lambda check, name, s: begin(check, name, s) if name != "stage-1" else 1 / 0
        )
    elif what == "closed pipe":

        def write(*text: str, **more: object) -> None:
            if text[0].startswith("stage-1: ok"):
                raise BrokenPipeError
            sys.stdout.write(f"{text[0]}\n")

        monkeypatch.setattr(gpu_check, "print", write, raising=False)
    elif what == "removed log":
        monkeypatch.setattr(gpu_check, "_cut", lambda log: log.with_name("nothing").stat())
    else:
        made = gpu_check.summary
        seen: list[int] = []
        monkeypatch.setattr(
            gpu_check, "summary", lambda *given: made(*given) if seen.append(1) or len(seen) != 2 else 1 / 0
        )


@pytest.mark.parametrize("what", ["log of a stage", "removed log", "summary", "closed pipe"])
def test_no_error_outside_a_stage_loses_the_summary(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages(monkeypatch, "ok", "ok", "ok")
    broken(what, monkeypatch)
    with suppress(SystemExit, ZeroDivisionError, BrokenPipeError):
        gpu_check.main(["--dry-run", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*/summary.md")
    text = path.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| stage-0 | ok | 0 | figure |" in text
    assert re.findall(r"^\| (stage-\d) ", text, re.MULTILINE) == ["stage-0", "stage-1", "stage-2"]


def test_a_summary_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages(monkeypatch, "ok")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--output", str(tmp_path / "file")])
    printed = capsys.readouterr().out
    assert "cannot be written" in printed
    assert "| stage-0 | failed | 0 | NotADirectoryError" in printed


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2
    assert "--dry-run" in capsys.readouterr().err


# --- what the stages run


def test_exercise(capsys: pytest.CaptureFixture[str]) -> None:
    workloads.exercise(CPU, tiny=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 16
    assert all(line.endswith(": ok") for line in lines)


@pytest.mark.parametrize("name", ["cosine_topk", "max_correlation", "pair_sums"])
def test_exercise_notices_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, name)

    def wrong(*arguments: object) -> object:
        result = right(*arguments)
        return 1.1 * result if name == "pair_sums" else (result[0] + 0.01 * torch.rand_like(result[0]), *result[1:])

    monkeypatch.setattr(ops, name, wrong)
    with pytest.raises(AssertionError, match="graph" if name == "cosine_topk" else "classes"):
        workloads.exercise(CPU, tiny=True)


def test_exercise_notices_a_wrong_gradient() -> None:
    case = matching.Case((6, 13, 5, 33, 3, 2, 2))
    right = dict(workloads.matched("classes", case, None, CPU))
    assert set(right.values()) == {""}
    backward = matching.check_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            matching, "check_gradients", lambda true, limit, found: backward(true, limit, [-found[0], *found[1:]])
        )
        assert "gradient of probes" in dict(workloads.matched("classes", case, None, CPU))["gradients"]


def test_wrong_neighbors_are_noticed() -> None:
    table = workloads.unlucky_table()[:200]
    similarities, ids = functional.class_neighbors(table, 7, return_similarities=True)

    def found(values: torch.Tensor, indices: torch.Tensor) -> str:
        return workloads.wrong_neighbors(table, table, values, indices, exclude_self=True)

    assert found(similarities, ids) == ""
    other = ids.clone()
    other[3, 6] = next(i for i in range(200) if i != 3 and i not in ids[3])
    assert "off by" in found(similarities, other)
    assert "twice" in found(similarities, ids[:, [0, 0, 2, 3, 4, 5, 6]])
    assert "own" in found(similarities, torch.cat([torch.arange(200)[:, None], ids[:, :6]], dim=1).where(ids >= 0, ids))


def test_hashes_repeat_and_follow_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (workloads.hashes(CPU, tiny=True) for _ in range(2))
    assert first == second
    assert any("gradients" in name for name in first)
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seed(number + 1))
    third = workloads.hashes(CPU, tiny=True)
    assert third.keys() == first.keys()
    assert third["torch.bfloat16 match 0"] != first["torch.bfloat16 match 0"]


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "bench", "gpu-check", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/summary.md")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Dry run")
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert {cells[0].removeprefix("| ") for cells in table} == set(gpu_check.STAGES)
    assert {cells[1] for cells in table} <= {"ok", "skipped"}
    assert {path.name for path in tmp_path.glob("*/*.csv")} == {"graph.csv", "classes.csv", "pairs.csv"}
