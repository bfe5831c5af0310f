"""docs/benchmarks.md and its plots, from the CSV files of results; the same files give the same page.

python -m bench report --output docs
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path

from matplotlib.figure import Figure

from . import results
from .cases import LETTERS, OURS
from .results import Row

DOCS = Path(__file__).parents[1] / "docs"
TABLES = Path(__file__).parents[1] / "tests" / "static" / "tables"
HEADINGS = {
    "graph": "Class graph: the K nearest of N classes for each of them, D dimensions",
    "classes": "Class path: B maps of C channels, H x W, M of a class, each against the K of N classes near its own",
    "pairs": "All pairs: P probes against G gallery maps of C channels, H x W",
    "compile": "Compilation: the wait at the first call of a kernel, unless it is in Triton's cache",
}
MIN_POINTS = 3  # of a plot
INTRODUCTION = """# Benchmarks

Written by `python -m bench report` from the CSV files under `bench/results/`. To change a figure, run the command
beside it, then write the page again.

- **Checked first.** Each result is compared with the same computation in fp64. A wrong one has no time.
- **Times.** Providers run in turn in one process, A B C A B C ..., after a warm-up, so that a change of load affects
  all: by the wall clock on a CPU with fixed threads, by events after a flush of the L2 cache on a GPU. We report
  medians with quartiles, and the median of the ratios within a round.
- **Peak memory** is what a call needs above its inputs, its result included: resident memory in a new process on a CPU,
  torch's allocator on a GPU.
- **Useful FLOPs** are the same for every provider. The graph: every unordered pair of classes once, N (N - 1) D. The
  others: 2 S S C for every pair of maps with S = H W locations, twice that for a backward pass, three times for a step.
  Useful bytes: every map, pooled value, score and gradient once. Both are compared with what a large square `torch.mm`
  and a large copy reach in the same run. Backward passes on a CPU are not matrix products and have no share of
  `torch.mm`.
"""
COMPILED = """## Kernels as compiled, without a GPU

`python -m bench static --cycles --save` estimates from machine code what a tile of similarities (class graph), or a
pair of maps with all channels, takes of a multiprocessor: cycles of its tensor cores, and cycles to issue all
instructions. The larger number bounds the time from below; neither includes waits. Registers and static instructions
are a thread's, barriers and bytes those of a tile or pair. Before the arrow: commit 77da667, before the first
run on a GPU.
"""
NO_GPU = """
GPU figures are **not measured yet**. On a machine with a GPU, `make gpu-check` measures them and writes this page.
"""


def main(arguments: list[str] | None = None) -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="directory of the CSV files")
    parser.add_argument("--output", type=Path, default=DOCS, help="of benchmarks.md and benchmarks/")
    options = parser.parse_args(arguments)
    every = [row for path in sorted(options.results.glob("*/*.csv")) for row in results.read(path)]
    sections = [INTRODUCTION] if any(row.is_gpu for row in every) else [INTRODUCTION, NO_GPU]
    sections += [_device(rows, options.output) for rows in _grouped(every, attrgetter("device"))]
    sections += [COMPILED, _compiled()]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "benchmarks.md").write_text("\n".join(sections), encoding="utf-8")


def _compiled() -> str:
    """What kernels took then and take now, of the tables of tests/static."""
    then, now = (
        {(line["case"], line["arch"]): line for path in sorted(TABLES.glob(f"*/{name}.csv")) for line in _lines(path)}
        for name in ("cycles-77da667", "cycles")
    )
    columns = {"case": [case for case, _ in then], "arch": [arch for _, arch in then]}
    for name in ("registers", "static_instructions", "barriers", "tensor_cycles", "issue_cycles", "bytes"):
        columns[name.replace("_", " ")] = [f"{int(then[key][name]):,} → {int(now[key][name]):,}" for key in then]
    return results.grid(columns) + "\n"


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _device(rows: list[Row], output: Path) -> str:
    lines = [f"## {rows[0].device}", ""]
    for op, heading in HEADINGS.items():
        of_op = [row for row in rows if row.op == op]
        if not of_op:
            continue
        lines += [f"### {heading}", ""]
        if op == "compile":  # one row a kernel
            shown = {"kernel": [row.case for row in of_op]} | results.columns(of_op)
            lines += ["`python -m bench static --times`", "", results.grid(shown), ""]
            continue
        lines += [f"Sizes are `{'x'.join(LETTERS[op])}`.", ""]
        for letter in LETTERS[op]:
            lines += _plot(letter, of_op, output)
        for group in _grouped(of_op, attrgetter("case", "part", "dtype", "threads")):
            lines += _case(group)
    return "\n".join(lines)


def _case(group: list[Row]) -> list[str]:
    """The table of one case, with the command that measures it again."""
    first = group[0]
    command = f"python -m bench {first.op} --cases {first.case}" + (f" --parts {first.part}" if first.part else "")
    command += f" --dtype {first.dtype} --device {'cuda' if first.is_gpu else 'cpu'}"
    command += "" if first.is_gpu else f" --threads {first.threads}"
    table = results.grid(results.columns(group))
    heading = f"#### {results.title(first).removeprefix(first.op).strip()}"
    return [heading, "", f"`{command}`", "", f"{results.conditions(group)}.", "", table, ""]


def _plot(letter: str, rows: list[Row], output: Path) -> list[str]:
    """Time and peak memory of every provider over one size, for the most rows that have all other sizes in common."""

    def others(row: Row) -> tuple[object, ...]:
        sizes = tuple(size for name, size in row.sizes.items() if name != letter)
        return sizes, row.part, row.dtype, row.threads

    swept = [group for group in _grouped(rows, others) if len({row.case for row in group}) >= MIN_POINTS]
    if not swept:
        return []
    group = max(reversed(swept), key=len)
    first = group[0]
    name = "-".join(filter(None, [first.op, first.part, first.dtype, f"by-{letter}.png"]))
    path = f"benchmarks/{results.slug(first.device)}/{name}"
    (output / path).parent.mkdir(parents=True, exist_ok=True)
    _draw(group, letter, output / path)
    return [f"![{first.op} {first.part}: time and memory over {letter}]({path})", ""]


def _draw(group: list[Row], letter: str, path: Path) -> None:
    first = group[0]
    title = " ".join(filter(None, [first.op, first.part, first.dtype]))
    fixed = ", ".join(f"{name}={size:,}" for name, size in first.sizes.items() if name != letter)
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{title}, {fixed}\n{first.device}, {first.threads} threads", fontsize=10)
    left, right = figure.subplots(1, 2, subplot_kw={"xscale": "log", "yscale": "log", "xlabel": letter})
    for axes, label, column, unit in (
        (left, "Seconds", "median_s", 1),
        (right, "Peak memory above the inputs, MB", "peak_bytes", 1e6),
    ):
        axes.set_ylabel(label)
        for provider in sorted({row.provider for row in group}, key=lambda name: (name != OURS, name)):
            of_provider = [row for row in group if row.provider == provider and getattr(row, column)]
            points = sorted((row.sizes[letter], getattr(row, column) / unit) for row in of_provider)
            if len(points) > 1:
                width = 2.5 if provider == OURS else 1.2
                axes.plot(*zip(*points, strict=True), marker="o", label=provider, linewidth=width)
        axes.set_xticks(sorted({row.sizes[letter] for row in group}))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_minor_formatter("")
        axes.tick_params(labelsize=8)
        axes.grid(True, color="0.9")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
