"""All that there is to see on a machine with a CUDA GPU, by one command, offline, in about ten minutes.

    python -m bench gpu-check                  all of it
    python -m bench gpu-check --minutes 30     with time for every case of the study
    python -m bench gpu-check --dry-run        the same stages, small, on the CPU: does all of this work?

Results are in bench/results/<device>/: summary.md, a log of every stage in gpu-check/, and the CSV files of the study.
Every stage runs in processes of its own with a time limit (none in a dry run) and a log: one that fails or hangs costs
the others nothing, and no process outlives its stage. A signal ends the run with a summary of what there is. The GPU's
settings are read, never changed. The exit status is 0 if every stage was run or skipped, and none failed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from types import FrameType

import torch

from . import measure, optional, table

ROOT = Path(__file__).parents[1]
LOG_BYTES = 200_000  # of a log that are kept, its end
OURS = "qaconv_triton"
MINUTES = 9.0  # for all stages together, but in a dry run
POLL_SECONDS = 0.05
ENDING_ROUNDS = 100  # of looking for processes that are to end: some start others meanwhile
WINDOW = 20  # batches at the start and at the end of a training whose mean losses are compared
# tests of this check itself, of what compilers make for GPUs that are not there, of files, and of perf checks on a CPU
WITHOUT_A_GPU = ("test_gpu_check.py", "test_static.py", "test_report.py", "test_perf_gate.py")
# why a profiler may not be able to read the counters
UNREADABLE = r"ERR_NVGPUCTRPERM|permission|not supported|[Dd]river resource|in use by|LibraryNotLoaded"


class Skipped(Exception):
    """There is no way to run a stage here."""


class Failed(Exception):
    """A stage ran, and something is wrong."""


class TimedOut(Exception):
    """A stage did not end within its limit."""


class Stopped(Exception):
    """A signal asks for the end."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; `figure`: what is worth knowing, or why.

    `status` is "ok", "failed", "timed out", "skipped", "stopped" (by a signal) or "not run".
    """

    name: str
    status: str
    seconds: float
    figure: str


@dataclass(frozen=True)
class Ran:
    """The exit status of a process and what it printed."""

    code: int
    printed: str

    @property
    def last_line(self) -> str:
        return (self.printed.strip().splitlines() or ["no output"])[-1][:200]


class Check:
    """What the stages share: the device, the folder of results, and a way to run a process within a stage's limit."""

    def __init__(self, folder: Path, device: str, dry: bool) -> None:
        self.folder, self.device, self.dry = folder, device, dry
        self.log = folder / "gpu-check" / "stage.txt"
        self.deadline = monotonic()
        self.report: list[str] = []  # lines for the summary, beyond the table
        self.signal: int | None = None  # that has asked for the end
        self.mark = f"GPU_CHECK_{secrets.token_hex(8)}"  # in the environment of all processes that are started

    def begin(self, name: str, seconds: float) -> None:
        """Start a stage: its log is new, and its processes have this long together."""
        self.log = self.folder / "gpu-check" / f"{name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        self.deadline = monotonic() + seconds

    def run(self, command: Sequence[str | Path], *, kernels: bool = True, **more: str) -> Ran:
        """Run a command; the log has what it prints, too. Whatever happens, it ends, and all that it has started.

        Args:
            command: the program and its arguments.
            kernels: whether a dry run sends the CPU's tensors through the kernels, interpreted.
            more: environment variables.

        Raises:
            Skipped: there is no such program.
            TimedOut: the stage's time is over.
            Stopped: a signal asks for the end.
        """
        own = {"TRITON_INTERPRET": "1", "QACONV_TRITON_BACKEND": "triton"}
        inherited = {name: value for name, value in os.environ.items() if name not in own}
        environment = inherited | {"PYTHONUNBUFFERED": "1"} | (own if self.dry and kernels else {})
        threads = {"OMP_NUM_THREADS": "1"} if self.dry else {}  # what is small gains nothing by more
        environment |= threads | more | {self.mark: "1"}
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            start = log.tell()
            process = None
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                while process.poll() is None:
                    self.check_signal()
                    if monotonic() >= self.deadline:
                        raise TimedOut("stopped")
                    sleep(POLL_SECONDS)
            except FileNotFoundError as error:
                raise Skipped(f"needs {command[0]}") from error
            finally:
                if process is not None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                end_processes(self.mark)
        with self.log.open("rb") as log:
            log.seek(start)
            return Ran(process.returncode, log.read().decode(errors="replace"))

    def check_signal(self) -> None:
        """Raise `Stopped` if a signal has asked for the end."""
        if self.signal is not None:
            raise Stopped(f"by {signal.Signals(self.signal).name}")

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Note a signal that would end this process, for a moment when it can end; one that is ignored stays so."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number

        handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        before = {each: handler for each, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
        try:
            for each in before:
                signal.signal(each, note)
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def python(self, *arguments: str | Path, kernels: bool = True, **more: str) -> str:
        """What this Python prints; Failed is raised where its exit status is not 0."""
        ran = self.run([sys.executable, *arguments], kernels=kernels, **more)
        if ran.code:
            raise Failed(f"exit status {ran.code}: {ran.last_line}")
        return ran.printed

    def workload(self, *arguments: str, **more: str) -> str:
        """Run something of `bench.workloads`, small in a dry run."""
        return self.python("-m", "bench.workloads", *self.sized(*arguments), **more)

    def sized(self, *arguments: str) -> list[str]:
        return [*arguments, "--device", self.device, *(["--tiny"] if self.dry else [])]


def end_processes(mark: str) -> None:
    """End all processes with this variable in their environment.

    What a stage has started may be in another process group or session by then, and its parent may have ended.
    """
    for _ in range(ENDING_ROUNDS):
        found = [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if _has_variable(path, mark)]
        if not found:
            return
        for number in found:
            with suppress(OSError):
                os.kill(int(number), signal.SIGKILL)
        sleep(POLL_SECONDS)


def _has_variable(environ: Path, name: str) -> bool:
    try:
        return f"{name}=".encode() in environ.read_bytes()
    except OSError:  # another user's process, or one that has ended
        return False


def needs(*packages: str) -> None:
    """Skip the stage where one of these cannot be imported."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Skipped(f"needs {', '.join(missing)}")


def environment(check: Check) -> str:
    found = dict(re.findall(r"^(\w+): (.*)$", check.workload("environment"), re.MULTILINE))
    check.report.append("```\n" + check.log.read_text(encoding="utf-8").split("\n", 1)[1].strip() + "\n```")
    return ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "cuda", "python", "commit"))


def bit_identity(check: Check) -> str:
    runs: list[dict[str, str]] = []
    for _ in range(2):
        printed = re.search(r"^hashes: (.*)$", check.workload("hashes"), re.MULTILINE)
        if printed is None:
            raise Failed("no hashes were printed")
        runs += json.loads(printed[1])
    names = sorted({name for run in runs for name in run})
    if not names:
        raise Failed("no tensor was hashed")
    if differ := [name for name in names if len({run.get(name) for run in runs}) > 1]:
        check.report += ["Tensors that are not bit-identical in every run:", *(f"- {name}" for name in differ[:50])]
        raise Failed(f"{len(differ)} of {len(names)} tensors differ, the first: {differ[0]}")
    return f"{len(names)} tensors the same, twice in each of two processes"


def tests(check: Check) -> str:
    needs("pytest")
    selected = ["-m", "slow or not slow", *(f"--ignore=tests/{name}" for name in WITHOUT_A_GPU)]
    if check.dry:
        files = [f"tests/test_{name}.py" for name in ("inverted_index", "max_correlation")]
        selected = [*files, "-k", "inverted or small_maps and 17-16"]
    workers = min(2 if check.dry else 16, os.cpu_count() or 1)
    spread = ["-n", str(workers), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.optional",
        *spread,
        *selected,
    ]
    try:
        ran = check.run(command, kernels=False, OMP_NUM_THREADS="1")
    except TimedOut as error:
        printed = check.log.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"FAILED (?:\[ *\d+%\] )?(tests/\S+)", printed)
        check.report += (
            ["Tests that had failed by then:", *(f"- `{name[:300]}`" for name in failed[:30])] if failed else []
        )
        raise TimedOut(f"{printed.count(' PASSED ')} passed, {len(failed)} failed by then") from error
    counts = re.findall(r"^=*\s*(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", ran.printed, re.MULTILINE)
    if ran.code:
        failures = re.findall(r"^(?:FAILED|ERROR) .*$", ran.printed, re.MULTILINE)
        check.report += ["Failures of the tests:", *(f"- `{line[:300]}`" for line in failures[:30])]
        raise Failed(counts[-1] if counts else ran.last_line)
    without = f"; without {', '.join(missing)}, which some tests need" if (missing := optional.missing()) else ""
    return f"{counts[-1] if counts else 'passed'}, {workers if spread else 1} at a time{without}"


def exercise(check: Check) -> str:
    right = check.workload("exercise").count(": ok")
    if not right:
        raise Failed("nothing was exercised")
    return f"{right} results agree with the reference in fp64"


def sanitized(check: Check, tool: str, **more: str) -> str:
    if check.dry:
        raise Skipped("dry run: the exercise ran without it")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "42", "--target-processes", "application-only"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "-m", "bench.workloads", *check.sized("exercise")]
    ran = check.run(command, **more)
    if refused := re.search(r".*Device not supported.*", ran.printed):
        raise Skipped(f"refused the device: {refused[0].strip()}")
    told = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", ran.printed, re.MULTILINE)
    if ran.code not in (0, 42):
        raise Failed(f"exit status {ran.code} of what was looked at: {ran.last_line}")
    if ran.code or not told or ": ok" not in ran.printed:
        raise Failed(told[-1] if told else f"no summary: {ran.last_line}")
    return told[-1]


def memcheck(check: Check) -> str:
    return sanitized(check, "memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # each tensor has bounds of its own


def racecheck(check: Check) -> str:
    return sanitized(check, "racecheck")


@contextmanager
def fresh_caches() -> Iterator[tuple[Path, dict[str, str]]]:
    """Folders in which nothing is compiled or tuned yet, and the variables that name them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        variables = {"TRITON_CACHE_DIR": str(path / "triton"), "QACONV_TRITON_CACHE_DIR": str(path / "tuned")}
        yield path, variables


def warm_up(check: Check) -> str:
    sizes = {"channels": 512, "height": 7, "width": 7, "num-classes": 10572, "k-nearest": 256}
    if check.dry:
        sizes = {"channels": 16, "height": 2, "width": 2, "num-classes": 8, "k-nearest": 3, "batch-size": 4}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    options += ["--dtype", "bfloat16"] if check.dry else []
    with fresh_caches() as (_, variables):
        started = monotonic()
        check.python("-m", "qaconv_triton.warmup", *options, "--device", check.device, **variables)
        return f"{monotonic() - started:.1f} s from an empty cache"


def compiled_once(check: Check) -> str:
    first, batches, neighbors = ("64", ("48", "17", "1"), ("20", "19", "7"))
    if check.dry:
        first, batches, neighbors = ("3", ("1",), ("3", "2"))
    with fresh_caches() as (folder, variables):
        check.workload("steps", "--batch", first, "--neighbors", neighbors[0], **variables)
        before = _binaries(folder)
        check.workload("steps", "--batch", *batches, "--neighbors", *neighbors, **variables)
        new = _binaries(folder) - before
    if check.dry:
        return "the steps ran; interpreted kernels are not compiled"
    if not before:
        raise Failed("no compiled kernel in the cache: nothing was counted")
    if new:
        check.report += ["Kernels that another batch size or K compiled:", *(f"- {name}" for name in sorted(new))]
        raise Failed(f"{len(before)} kernels, then {len(new)} more: {sorted(new)[0]}")
    sizes = f"B = {', '.join(batches)} and K = {', '.join(neighbors)}"
    return f"{len(before)} kernels for B = {first}, K = {neighbors[0]}; none more for {sizes}"


def _binaries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for ending in ("cubin", "hsaco") for path in folder.rglob(f"*.{ending}")}


def study(check: Check) -> str:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    options = check.sized("--output", str(check.folder.parent))
    if check.dry:
        options += ["--no-memory", "--repeats", "1"]
    is_whole = True
    try:
        for op in ("classes", "pairs", "graph"):
            check.python("-m", "bench", op, *options, kernels=False)
    except TimedOut:
        is_whole = False
    rows = [row for path in check.folder.glob("*.csv") for row in table.read(path) if row.date >= started]
    if wrong := [row for row in rows if row.provider.startswith(OURS) and row.status != "ok"]:
        check.report += ["Rows of the library that are not ok:"]
        check.report += [f"- {row.op} {row.case} {row.part} {row.dtype}, {row.provider}: {row.status}" for row in wrong]
        raise Failed(f"{len(wrong)} of {len(rows)} rows: {wrong[0].status}")
    if not rows:
        raise TimedOut("no case has come to its end")
    return f"{len(rows)} rows" + ("" if is_whole else ", then the time was over: more with --minutes 30")


def report(check: Check) -> str:
    """The page that is to be committed with the rows of the study."""
    if check.folder.parent != table.RESULTS:
        raise Skipped(f"for rows in {table.RESULTS} only")
    needs("matplotlib", "numpy")
    check.python("-m", "bench", "report", kernels=False)
    return "docs/benchmarks.md"


def demo(check: Check) -> str:
    needs("matplotlib", "numpy", "torchmetrics", "tqdm")
    options = ["--bf16", "--seeds", "1", "--device", check.device, "--steps", "16" if check.dry else "200"]
    if check.dry:
        options += ["--classes", "40", "--epochs", "8", "--k-nearest", "5"]
    with tempfile.TemporaryDirectory() as folder:
        check.python("examples/glyphs.py", *options, "--output", folder, kernels=False)
        losses = check.log.with_name("demo-losses.csv")
        shutil.copy(Path(folder) / "losses.csv", losses)
    return falling(losses)


def falling(losses: Path) -> str:
    """Mean losses at the start and at the end of every training of QAConv.

    Raises:
        Failed: a loss that is not finite, or that has not fallen.
    """
    with losses.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    told = []
    for method in ("random", "graph"):
        curve = [float(row["loss"]) for row in rows if row["method"] == method]
        if not curve or not torch.tensor(curve).isfinite().all():
            raise Failed(f"{method}: a loss that is not finite, or none at all")
        window = max(1, min(WINDOW, len(curve) // 2))
        start, end = statistics.fmean(curve[:window]), statistics.fmean(curve[-window:])
        told.append(f"{method}: loss {start:.2f} to {end:.2f} in {len(curve)} batches")
        if not end < start:
            raise Failed(f"the loss does not fall; {told[-1]}")
    return "; ".join(told)


def profile(check: Check) -> str:
    if check.dry:
        raise Skipped("dry run: there is no GPU to profile")
    told = []
    for part, kernel in (("classes", "_forward_kernel"), ("graph", "_append_kernel")):
        command = ["ncu", "--kernel-name", f"regex:{kernel}", "--launch-skip", "2", "--launch-count", "1"]
        command += ["--clock-control", "none"]  # the card's settings are left alone
        command += ["--set", "basic", "--section", "ComputeWorkloadAnalysis", "--section", "MemoryWorkloadAnalysis"]
        command += ["--section", "WarpStateStats", "--target-processes", "application-only"]
        command += [sys.executable, "-m", "bench.workloads", *check.sized("profile", "--part", part)]
        ran = check.run(command, QACONV_TRITON_TUNE="0")  # whose trials would be launches, too
        reached = re.search(r"Compute \(SM\) Throughput\s+%\s+([\d.,]+)", ran.printed)
        refused = re.search(rf"^==(?:ERROR|WARNING)==.*(?:{UNREADABLE}).*$", ran.printed, re.MULTILINE)
        if reached is None and refused:
            raise Skipped(refused[0][:200])
        if ran.code or reached is None:
            raise Failed(f"{kernel}: {ran.last_line}")
        told.append(f"{kernel}: {reached[1]} % of the compute throughput")
    return "; ".join(told)


# in the order in which they run; each with its share of the time
STAGES: dict[str, tuple[Callable[[Check], str], float]] = {
    "environment": (environment, 3),
    "bit-identity": (bit_identity, 10),
    "tests": (tests, 32),
    "exercise": (exercise, 9),
    "memcheck": (memcheck, 10),
    "racecheck": (racecheck, 8),
    "warm-up": (warm_up, 6),
    "compiled-once": (compiled_once, 7),
    "study": (study, 22),
    "report": (report, 1),
    "demo": (demo, 8),
    "profile": (profile, 5),
}


def perform(check: Check, name: str, stage: Callable[[Check], str], seconds: float) -> Outcome:
    """Run a stage; whatever goes wrong in it is its outcome."""
    started = monotonic()
    try:
        check.begin(name, seconds)
        status, figure = "ok", stage(check)
    except Skipped as reason:
        status, figure = "skipped", str(reason)
    except TimedOut as reason:
        status, figure = "timed out", f"after {seconds:.0f} s: {reason}"
    except Failed as reason:
        status, figure = "failed", str(reason)
    except Stopped as reason:
        status, figure = "stopped", str(reason)
    except (Exception, SystemExit) as error:  # a stage of this check that does not understand what it reads
        status, figure = "failed", f"{type(error).__name__}: {error}"
    with suppress(OSError):
        _cut(check.log)
    return Outcome(name, status, monotonic() - started, figure)


def _cut(log: Path) -> None:
    """Keep the end of a log that is too large, and nothing of an empty one."""
    if not log.stat().st_size:
        log.unlink()
    elif log.stat().st_size > LOG_BYTES:
        end = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        log.write_text(f"(only the last {LOG_BYTES} bytes)\n{end.split(chr(10), 1)[-1]}", encoding="utf-8")


def summary(outcomes: Sequence[Outcome], check: Check, title: str) -> str:
    """The summary in Markdown."""
    cells = [(each.name, each.status, f"{each.seconds:.0f}", each.figure) for each in outcomes]
    lines = ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in cells]
    header = [f"# {title}", "", "| stage | | seconds | |", "|---|---|---:|---|"]
    return "\n".join([*header, *lines, "", *check.report, ""])


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, write the summary, and exit with 1 if one of them failed or timed out."""
    parser = argparse.ArgumentParser(
        "python -m bench gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, help=f"for all stages together (default: {MINUTES:.0f}, in a dry run no limit)"
    )
    parser.add_argument("--output", type=Path, help="where the device's folder is (default: bench/results)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), metavar="STAGE", help=f"only {', '.join(STAGES)}")
    parser.add_argument("--dry-run", dest="dry", action="store_true", help="small, on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU here; --dry-run runs the stages, small, on the CPU")
    device = "cpu" if options.dry else "cuda"
    name = measure.environment(torch.device(device))["device"]
    output = options.output or (ROOT / "out" / "gpu-check" if options.dry else table.RESULTS)
    check = Check((output / table.slug(name)).absolute(), device, options.dry)
    title = "Dry run of the GPU check: nothing was measured on a GPU" if options.dry else f"GPU check: {name}"
    minutes = options.minutes or (math.inf if options.dry else MINUTES)
    summary_name = "summary-of-some.md" if options.stages else "summary.md"
    end = monotonic() + 60 * minutes
    left = {stage: share for stage, (_, share) in STAGES.items() if not options.stages or stage in options.stages}
    outcomes: list[Outcome] = []
    try:
        with check.catching_signals():
            for stage in list(left):
                # what earlier stages have not used belongs to the later ones
                seconds = max(1.0, end - monotonic()) * left[stage] / sum(left.values())
                print(f"{stage}:" + (f" up to {seconds:.0f} s" if math.isfinite(seconds) else ""), flush=True)
                outcomes.append(perform(check, stage, STAGES[stage][0], seconds))
                del left[stage]
                print(
                    f"{stage}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s: {outcomes[-1].figure}", flush=True
                )
                _save(check.folder / summary_name, summary(outcomes, check, title))
                if check.signal is not None:
                    break
    finally:
        outcomes += [Outcome(stage, "not run", 0.0, "") for stage in left]
        told = summary(outcomes, check, title)
        _save(check.folder / summary_name, told)
        print(f"\n{told}\nin {check.folder}", flush=True)
    if any(outcome.status not in ("ok", "skipped") for outcome in outcomes):
        raise SystemExit(1)


def _save(path: Path, text: str) -> None:
    """Write a summary; where that is impossible it is printed alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{path} cannot be written: {error}", flush=True)


if __name__ == "__main__":
    main()
