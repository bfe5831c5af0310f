"""Rows of results as pictures: how time and memory grow with one size, and how far from the roof the library is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .graph import OURS
from .table import Row, of_gpu, rate

AXES = {"graph": "NDK", "classes": "BNKCHWM", "pairs": "PGCHW"}  # the letters of a case's sizes
NAMES = {
    "graph": "Class graph", "classes": "Class path", "pairs": "All pairs",
    "N": "classes N", "D": "numbers of a class D", "K": "neighbours K", "B": "maps of a batch B", "P": "probes P",
    "G": "gallery maps G", "C": "channels C", "H": "height H", "W": "width W", "M": "maps of a class M",
}  # fmt: skip
PALETTE = [colormaps["tab10"](number) for number in range(10)]
MARKERS = "osD^vPXh<>"
DPI = 110
POINTS = 3  # of a sweep, at least
GIGA, TERA = 1e9, 1e12

Style = tuple[tuple[float, ...], str]  # colour and marker


class Sweep(NamedTuple):
    """Rows whose cases differ in one size, `axis`: by provider and by that size; `fixed` are the other sizes."""

    op: str
    part: str
    dtype: str
    threads: int | None
    axis: str
    fixed: tuple[int, ...]
    points: dict[str, dict[int, Row]]

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [row for points in self.points.values() for row in points.values()]

    @property
    def held(self) -> str:
        """The other sizes, by their letters."""
        return _named([letter for letter in AXES[self.op] if letter != self.axis], self.fixed)


def sizes(row: Row) -> tuple[int, ...]:
    """The sizes of a row's case, none where they have no letters."""
    found = tuple(int(size) for size in row.case.split("x") if size.isdecimal())
    return found if len(found) == len(AXES.get(row.op, "")) else ()


def named(row: Row) -> str:
    """The sizes of a row's case, by their letters."""
    return _named(AXES.get(row.op, ""), sizes(row))


def _named(letters: Iterable[str], numbers: Sequence[int]) -> str:
    return ", ".join(f"{letter}={number:,}" for letter, number in zip(letters, numbers, strict=False))


def threads(row: Row) -> int | None:
    """Threads, where they matter to a time."""
    return None if of_gpu(row) else row.threads


def sweeps(found: Sequence[Row]) -> list[Sweep]:
    """The longest sweep of every axis, op, part and dtype, of the providers that have three sizes of it or more.

    What has no number counts as a size of its provider; one provider at least has three numbers.
    """
    families: dict[tuple[str, str, str, int | None, str], dict[tuple[int, ...], dict[str, dict[int, Row]]]] = {}
    for row in found:
        numbers = sizes(row)
        for place, size in enumerate(numbers):
            key = (row.op, row.part, row.dtype, threads(row), AXES[row.op][place])
            fixed = (*numbers[:place], *numbers[place + 1 :])
            families.setdefault(key, {}).setdefault(fixed, {}).setdefault(row.provider, {})[size] = row
    sweeps = []
    for key, candidates in families.items():
        measured = {
            fixed: max(sum(row.median_s is not None for row in points.values()) for points in providers.values())
            for fixed, providers in candidates.items()
        }
        fixed = max(candidates, key=lambda fixed: (measured[fixed], fixed))
        if measured[fixed] >= POINTS:
            kept = {name: points for name, points in candidates[fixed].items() if len(points) >= POINTS}
            kept = {name: dict(sorted(points.items())) for name, points in kept.items()}
            sweeps.append(Sweep(*key, fixed, kept))
    return sweeps


def styles(found: Iterable[Sweep]) -> dict[str, Style]:
    """A colour and a marker for every provider of some sweeps, the library's the first."""
    others = sorted({name for sweep in found for name in sweep.points} - {OURS})
    return {
        name: (PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)])
        for number, name in enumerate([OURS, *others])
    }


def draw_time(path: Path, sweep: Sweep, style: dict[str, Style]) -> None:
    """Medians of the times over the sweep's axis, with quartiles, and write them to a file."""
    figure, axes = _figure(sweep, "time")
    medians = [row.median_s for row in sweep.rows if row.median_s is not None]
    unit, name = (1e3, "ms") if statistics.median(medians) < 0.5 else (1.0, "s")
    for provider, points in sweep.points.items():
        shown = {size: row for size, row in points.items() if row.median_s is not None}
        middle = [unit * (row.median_s or 0.0) for row in shown.values()]
        lower = [unit * ((row.median_s or 0.0) - (row.lower_s or row.median_s or 0.0)) for row in shown.values()]
        upper = [unit * ((row.upper_s or row.median_s or 0.0) - (row.median_s or 0.0)) for row in shown.values()]
        colour, marker = style[provider]
        axes.errorbar(
            list(shown),
            middle,
            [lower, upper],
            label=provider,
            color=colour,
            marker=marker,
            capsize=3,
            **_line(provider),
        )
    _finish(axes, sweep, f"Time of a call, {name}")
    _save(figure, path)


def draw_memory(path: Path, sweep: Sweep, style: dict[str, Style]) -> None:
    """Peak memory over the sweep's axis, and write it to a file."""
    figure, axes = _figure(sweep, "peak memory")
    for provider, points in sweep.points.items():
        shown = {size: row.peak_bytes / 1e6 for size, row in points.items() if row.peak_bytes}
        colour, marker = style[provider]
        if shown:
            axes.plot(list(shown), list(shown.values()), label=provider, color=colour, marker=marker, **_line(provider))
    _finish(axes, sweep, "Peak memory above the inputs, MB")
    _save(figure, path)


def _line(provider: str) -> dict[str, float]:
    """The library's line is the one to find first."""
    ours = provider == OURS
    return {"linewidth": 2.2 if ours else 1.5, "markersize": 6.0 if ours else 5.0, "zorder": 4.0 if ours else 3.0}


def _figure(sweep: Sweep, what: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    title = ", ".join(filter(None, [NAMES[sweep.op], sweep.part]))
    _title(axes, f"{title}: {what} against {sweep.axis}", sweep.held, sweep.dtype, _where(sweep.rows[0]))
    return figure, axes


def _title(axes: Axes, title: str, *said: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20)
    axes.text(0, 1.02, ", ".join(said), transform=axes.transAxes, fontsize=8.5, color="0.35")


def _where(row: Row) -> str:
    return row.device if threads(row) is None else f"{row.device}, {row.threads} threads"


def _finish(axes: Axes, sweep: Sweep, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({size for points in sweep.points.values() for size in points})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{NAMES[sweep.axis][:1].upper()}{NAMES[sweep.axis][1:]}")
    axes.set_ylabel(label)
    axes.margins(y=0.12)  # room for the legend
    _ticks(axes)
    _plain(axes)
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=9)


def _ticks(axes: Axes) -> None:
    """Numbers one can read on the vertical axis: the closer, the shorter it is."""
    low, high = axes.get_ylim()
    subs = (1.0, 1.5, *range(2, 9)) if high / low < 10 else (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(axes: Axes) -> None:
    axes.grid(True, which="major", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=9, color="0.6")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("0.6")


def under_the_roof(found: Iterable[Row]) -> list[Row]:
    """The library's rows that have shares of both ceilings: points of the roofline."""
    return [row for row in found if row.provider == OURS and row.tflops and row.share_of_copy and row.share_of_matmul]


def roof(found: Sequence[Row]) -> tuple[float, dict[str, float]]:
    """Bytes per second of a copy, operations per second of a product by dtype: medians of what the rows' runs saw."""
    copy = GIGA * statistics.median(row.copy_gbs for row in found if row.copy_gbs)
    by_dtype: dict[str, list[float]] = {}
    for row in found:
        if row.matmul_tflops:
            by_dtype.setdefault(row.products, []).append(TERA * row.matmul_tflops)
    return copy, {name: statistics.median(values) for name, values in sorted(by_dtype.items())}


def intensity(row: Row) -> float:
    """Useful operations per useful byte."""
    assert row.tflops is not None
    assert row.share_of_copy is not None
    assert row.copy_gbs is not None
    return TERA * row.tflops / (GIGA * row.share_of_copy * row.copy_gbs)


def draw_roofline(path: Path, found: Sequence[Row]) -> None:
    """Useful operations per second over operations per byte, below what a copy and a product reach, to a file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    copy, products = roof(found)
    peaks = {name: peak / TERA for name, peak in products.items()}
    across = [*(peak / copy for peak in products.values()), *(intensity(row) for row in found)]
    upward = [*peaks.values(), *(row.tflops for row in found if row.tflops)]
    left, right = min(across) / 3, 3 * max(across)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min(upward) / 3, 2 * max(upward))
    for name, peak in peaks.items():
        axes.plot([left, products[name] / copy, right], [left * copy / TERA, peak, peak], color="0.25", linewidth=1.5)
        below = any(peak < other < 1.4 * peak for other in peaks.values())  # so near that one would hide the other
        said, offset = f"torch.mm {name}, {rate(peak)} TFLOP/s", (-2, -11 if below else 3)
        axes.annotate(said, (right, peak), offset, textcoords="offset points", ha="right", fontsize=8.5, color="0.25")
    for number, (kind, points) in enumerate(sorted(_kinds(found).items())):
        axes.plot(
            [intensity(row) for row in points],
            [row.tflops for row in points],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            color=PALETTE[number % len(PALETTE)],
            label=kind,
            markeredgecolor="white",
            markeredgewidth=0.5,
            markersize=7.5,
        )
    axes.set_xlabel("Useful operations per useful byte")
    axes.set_ylabel("Useful TFLOP/s")
    _title(axes, f"{OURS} under the measured roof", f"slope: copy, {rate(copy / GIGA)} GB/s", _where(found[0]))
    _ticks(axes)
    _plain(axes)
    figure.legend(frameon=False, fontsize=8.5, loc="outside right upper")
    _save(figure, path)


def _kinds(found: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what they have in common but for their sizes."""
    kinds: dict[str, list[Row]] = {}
    for row in found:
        kinds.setdefault(" ".join(filter(None, [row.op, row.part, row.dtype])), []).append(row)
    return kinds


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # which would change with matplotlib's version
