"""The page of the benchmarks, with its plots, from the CSV files of results; the same files give the same page.

python -m bench report --output docs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from . import plots, table
from .graph import OURS
from .table import Row

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURES = "benchmarks.md", "benchmarks"
SUMMARY = 14  # lines of a device's at most, before those in a second dtype go
WHOLE = ("", "step", "match")  # parts that a user waits for, unlike forward or backward alone
FORMS = {
    "graph": ("The class graph", "`NxDxK`: the K nearest of N classes for each of them, D numbers a class."),
    "classes": (
        "The class path",
        "`BxNxKxCxHxWxM`: a batch of B maps of C channels, H high and W wide, M of each class, against a table of N "
        "such maps, each sample against the K neighbours of its class.",
    ),
    "pairs": ("All pairs", "`PxGxCxHxW`: P probes against G gallery maps of C channels, H high and W wide."),
}
INTRODUCTION = """# Benchmarks

Written by `python -m bench report` from the CSV files under `bench/results/`. Do not edit: measure again with the
command beside a number, then write the page anew.

- **Checked first.** A result is compared with the same computation in fp64 before it is timed; one that is wrong, or
  that raises, has no number.
- **Times.** Providers run in turn in one process, A B C A B C …, after a warm-up, so that a change of clock or load
  strikes all of them alike: by the wall clock on a CPU with its threads fixed, by events after a flush of the L2 cache
  on a GPU. Given are medians with their quartiles, and the median of the ratios within a round.
- **Peak memory** is what a call needs above its inputs, its result included: resident memory in a fresh process on a
  CPU, what torch's allocator hands out on a GPU, where other libraries' own allocations are not seen.
- **Ceilings** are a large copy and a large square `torch.mm` in the dtype of the products, timed in the same run.
- **Useful work** is counted the same for every provider. Of the graph it is every unordered pair of classes once,
  N (N - 1) D operations, the table read once, and similarities and ids written once. Of the others it is 2 S S C
  operations for every pair of maps with S = H W locations, twice that for a backward pass and three times for a step;
  every map is read once, and pooled values, scores and gradients are written once. Shares of `torch.mm` and of the copy
  are this work in the measured time; backward passes on a CPU are not made of products, and have no share of
  `torch.mm`.
"""
NO_GPU = """## GPU

GPU figures are **not measured yet**. On a machine with a GPU, these commands measure them, the first in ten minutes:

```sh
make gpu-check
python -m bench --device cuda
python -m bench report
```
"""

COMPILATION = """What the first call of a kernel waits for, unless Triton has it in its cache: its compilation, on this
machine, for the architecture beside its name. A new batch size, number of classes or K compiles nothing new.
`qaconv_triton.warmup` does it ahead of a training.

```sh
python -m bench static --times
```"""

Drawings = dict[str, Callable[[Path], None]]  # by the file's path below the output directory


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser("python -m bench report", description=__doc__)
    options.add_argument("--results", type=Path, default=table.RESULTS, help="directory of the CSV files")
    options.add_argument("--output", type=Path, default=DOCS, help=f"where {PAGE} and {PICTURES}/ are written")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Write the page and its plots, and remove the plots of an earlier page that it no longer shows."""
    options = parser().parse_args(arguments)
    text, drawings = page(options.results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / PAGE).write_text(text, encoding="utf-8")
    for name, draw in drawings.items():
        draw(options.output / name)
    for path in (options.output / PICTURES).glob("*/*.png"):
        if path.relative_to(options.output).as_posix() not in drawings:
            path.unlink()
    print(f"{options.output / PAGE} and {len(drawings)} plots")


def page(results: Path) -> tuple[str, Drawings]:
    """The page's text, and what draws its plots."""
    devices: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*/*.csv")):
        devices.setdefault(path.parent.name, []).extend(table.read(path))
    devices = {name: found for name, found in devices.items() if found}
    order = sorted(devices, key=lambda name: (not table.of_gpu(devices[name][0]), name))
    sweeps = {name: plots.sweeps(devices[name]) for name in order}
    styles = plots.styles(sweep for found in sweeps.values() for sweep in found)
    drawings: Drawings = {}
    sections = [INTRODUCTION]
    if not any(table.of_gpu(found[0]) for found in devices.values()):
        sections.append(NO_GPU)
    sections += [_device(name, devices[name], sweeps[name], styles, drawings) for name in order]
    return "\n".join(sections), drawings


def _device(
    name: str, found: list[Row], sweeps: list[plots.Sweep], styles: dict[str, plots.Style], drawings: Drawings
) -> str:
    groups = list(_groups(found).values())
    swept = {row for sweep in sweeps for row in sweep.rows}
    largest = {row for sweep in sweeps for row in _last(sweep)}
    alone = [group for group in groups if not swept.issuperset(group)]
    main = [group for group in groups if not swept.issuperset(group) or not largest.isdisjoint(group)]
    lines = [f"## {found[0].device}", ""]
    if summary := _summary(main):
        lines += ["### Summary", "", summary, ""]
    lines += _roofline(name, found, drawings)
    known = [op for op in FORMS if any(row.op == op for row in found)]
    for op in [*known, *sorted({row.op for row in found} - set(known))]:
        title, form = FORMS.get(op, ("", ""))
        lines += [f"### {title}: `{op}`" if form else f"### `{op}`", ""]
        lines += [f"Sizes are {form}", ""] if form else []
        for sweep in sweeps:
            lines += _sweep(name, sweep, styles, drawings) if sweep.op == op else []
        of_op = [group for group in alone if group[0].op == op]
        for group in of_op if form else []:
            lines += _case(group)
        lines += [] if form else _plain([row for group in of_op for row in group])
    return "\n".join(lines)


def _groups(found: Iterable[Row]) -> dict[tuple[object, ...], list[Row]]:
    """Rows of the same measurement: those to be compared with one another."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row.op, row.case, row.dtype, row.part, plots.threads(row)), []).append(row)
    return groups


def _last(sweep: plots.Sweep) -> list[Row]:
    largest = max(size for points in sweep.points.values() for size in points)
    return [points[largest] for points in sweep.points.values() if largest in points]


def command(found: Sequence[Row]) -> str:
    """What measures these rows again, of one op, part and dtype; empty for an op that has no sizes to be named by."""
    first = found[0]
    if not all(plots.sizes(row) for row in found):
        return ""
    words = ["python -m bench", first.op, "--cases", *dict.fromkeys(row.case for row in found)]
    words += ["--parts", first.part] if first.part else []
    words += ["--dtype", first.dtype, "--device", "cuda" if table.of_gpu(first) else "cpu"]
    if plots.threads(first):
        words += ["--threads", str(first.threads)]
    return " ".join(words)


def _measured(found: Sequence[Row]) -> list[str]:
    """The command, and what the rows were measured with."""
    text = command(found)
    ceilings = table.ceilings(found)
    said = table.measured(found)
    said = f"{said[:1].upper()}{said[1:]}." + (f" In the same run: {ceilings}." if ceilings else "")
    return [*(["```sh", text, "```", ""] if text else []), said, ""]


def _case(found: Sequence[Row]) -> list[str]:
    """The table of one case, or of a part of it."""
    first = found[0]
    title = ", ".join(filter(None, [first.case, first.part, first.dtype]))
    at = "" if not plots.threads(first) else f", {first.threads} threads"
    sizes = [f"{plots.named(first)}.", ""] if plots.named(first) else []
    return [f"#### {title}{at}", "", *sizes, *_measured(found), table.grid(table.columns(found)), ""]


def _plain(found: Sequence[Row]) -> list[str]:
    """All rows of an op without sizes in one table."""
    shown = {"case": [" ".join(filter(None, [row.case, row.part])) for row in found]} | table.columns(found)
    said = [COMPILATION, ""] if found[0].op == "compile" else []
    return [*said, *_measured(found), table.grid(shown), ""]


def _sweep(name: str, sweep: plots.Sweep, styles: dict[str, plots.Style], drawings: Drawings) -> list[str]:
    """A sweep's plots, the command that measures it, and its points in one table."""
    first = sweep.rows[0]
    at = f"{first.threads}-threads" if plots.threads(first) else ""
    stem = "-".join(filter(None, [sweep.op, sweep.part, sweep.dtype, at]))
    title = ", ".join(filter(None, [f"Against {sweep.axis}", sweep.part, sweep.dtype, at.replace("-", " ")]))
    lines = [f"#### {title}", "", f"{sweep.held}.", ""]
    draws = {"time": plots.draw_time}
    if any(row.peak_bytes for row in sweep.rows):
        draws["memory"] = plots.draw_memory
    for what, draw in draws.items():
        path = f"{PICTURES}/{name}/{stem}-{what}-by-{sweep.axis}.png"
        drawings[path] = partial(draw, sweep=sweep, style=styles)
        lines += [f"![{plots.NAMES[sweep.op]}: {what} against {sweep.axis}]({path})", ""]
    ordered = sorted(sweep.rows, key=plots.sizes)
    rounds = " or ".join(map(str, sorted({row.repeats for row in ordered if row.repeats})))
    lines += [*_measured(ordered), f"Medians of {rounds} rounds, and peak memory above the inputs:", ""]
    lines += [_points(sweep), ""]
    bad = [f"- {row.case}, {row.provider}: {row.status}" for row in ordered if row.status != "ok"]
    return lines + ([*bad, ""] if bad else [])


def _points(sweep: plots.Sweep) -> str:
    """The points of a sweep, a line for each size."""
    every = sorted({size for points in sweep.points.values() for size in points})
    shown = {sweep.axis: [f"{size:,}" for size in every]}
    for provider, points in sweep.points.items():
        rows = [points.get(size) for size in every]
        shown[provider] = ["" if row is None else table.time(row.median_s) or _verdict(row) for row in rows]
        memory = ["" if row is None else table.megabytes(row.peak_bytes) for row in rows]
        if any(memory):
            shown[f"{provider}, MB"] = memory
    return table.grid(shown)


def _verdict(row: Row) -> str:
    """The first word of a status that is not "ok"."""
    return row.status.split(":")[0]


def _summary(groups: Sequence[Sequence[Row]]) -> str:
    """The library beside the others, a line for each case as a whole; its own variants are in the tables below."""
    lines: dict[tuple[object, ...], tuple[str, str, str, str]] = {}
    for group in sorted(groups, key=lambda group: [*FORMS, group[0].op].index(group[0].op)):
        own = next((row for row in group if row.provider == OURS), None)
        others = [row for row in group if not row.provider.startswith(OURS)]
        if own is None or not others or own.part not in WHOLE or own.op not in FORMS:
            continue
        case = " ".join(filter(None, [own.op, own.case, own.part, own.dtype]))
        key = (own.op, own.case, own.part, plots.threads(own))
        told = "<br>".join(f"{row.provider}: {_beside(row)}" for row in others)
        time = table.time(own.median_s) or _verdict(own)
        lines[(*key, own.dtype)] = (case, time, table.megabytes(own.peak_bytes), told)
    kept = list(lines)
    if len(kept) > SUMMARY:
        kept = list({key[:-1]: key for key in reversed(kept)}.values())[::-1]
    titles = ("case", OURS, "peak MB", f"others: time / {OURS}'s, peak memory")
    cells = zip(*(lines[key] for key in kept), strict=True)
    return table.grid({title: list(column) for title, column in zip(titles, cells, strict=True)}) if kept else ""


def _beside(row: Row) -> str:
    """Another provider's ratio and memory, or that it has no number."""
    if row.median_s is None:
        return _verdict(row)
    ratio = f"{row.ratio:.2f} ×" if row.ratio is not None and row.base == OURS else table.time(row.median_s)
    return ratio + (f", {table.megabytes(row.peak_bytes)} MB" if row.peak_bytes else "")


def _roofline(name: str, found: Sequence[Row], drawings: Drawings) -> list[str]:
    points = plots.under_the_roof(found)
    if not points:
        return []
    path = f"{PICTURES}/{name}/roofline.png"
    drawings[path] = partial(plots.draw_roofline, found=points)
    copy, products = plots.roof(points)
    reached = ", ".join(f"{table.rate(peak / plots.TERA)} TFLOP/s ({dtype})" for dtype, peak in products.items())
    return [
        "### Roofline",
        "",
        f"![{OURS} under the measured roof]({path})",
        "",
        f"Every point is a row of `{OURS}` that has a share of both ceilings. The roof is what a copy, "
        f"{table.rate(copy / plots.GIGA)} GB/s, and `torch.mm`, {reached}, reached: medians over these rows, as "
        "ceilings differ a little from run to run.",
        "",
    ]
