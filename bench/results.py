"""Rows of results: their CSV files and their tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .cases import LETTERS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of results: times in seconds, `ratio` to the provider `base`, None where there is no figure."""

    op: str
    case: str
    part: str = field(default="", kw_only=True)
    provider: str
    dtype: str
    status: str
    repeats: int | None = None
    median_s: float | None = None
    lower_s: float | None = None
    upper_s: float | None = None
    ratio: float | None = None
    base: str = ""
    peak_bytes: int | None = None
    tflops: float | None = None
    matmul_tflops: float | None = None
    share_of_matmul: float | None = None
    copy_gbs: float | None = None
    share_of_copy: float | None = field(default=None, kw_only=True)  # useful bytes per second over `copy_gbs`
    recall: float | None = None
    products: str = ""
    note: str = ""
    commit: str = ""
    torch: str = ""
    triton: str = ""
    device: str = ""
    threads: int | None = None
    date: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU, by its name. AMD makes CPUs, too, some of them "with Radeon Graphics"."""
        return re.match(r"(NVIDIA|Tesla|GeForce|Quadro|AMD Instinct|AMD Radeon)\b", self.device) is not None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the case by their letters."""
        return dict(zip(LETTERS[self.op], map(int, self.case.split("x")), strict=True))


def save(measured: Sequence[Row], directory: Path = RESULTS) -> Path:
    """Write an op's rows to `<directory>/<device>/<op>.csv`; each replaces that of the same case, part and provider."""
    path = directory / slug(measured[0].device) / f"{measured[0].op}.csv"
    known = read(path) if path.exists() else []
    kept = {(row.case, row.part, row.dtype, row.provider, row.threads): row for row in [*known, *measured]}
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = path.with_suffix(".new")  # an interrupted run loses no rows
    with complete.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in kept.values())
    complete.replace(path)
    return path


def slug(device: str) -> str:
    """The folder of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path) -> list[Row]:
    """The rows of a file that `save` wrote; what is empty or missing gets its default."""
    kinds = {"str": str, "int | None": int, "float | None": float}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [
        Row(**{each.name: kinds[str(each.type)](line[each.name]) for each in fields(Row) if line.get(each.name)})
        for line in lines
    ]


def title(row: Row) -> str:
    """Op, case, part and dtype."""
    return " ".join(filter(None, [row.op, row.case, row.part, row.dtype]))


def markdown(measured: Sequence[Row]) -> str:
    """The rows of one case as a table, below what they were measured with."""
    first = measured[0]
    return f"{title(first)}: {first.device}, {conditions(measured)}\n\n{grid(columns(measured))}"


def conditions(measured: Sequence[Row]) -> str:
    """Threads, versions, commit, day, and what a matrix product and a copy reached in the same runs."""

    def values(name: str) -> str:
        return " and ".join(sorted({str(getattr(row, name)) for row in measured}))

    parts = [] if measured[0].is_gpu else [f"{values('threads')} threads"]
    parts += [f"torch {values('torch')}", f"triton {values('triton')}", f"commit {values('commit')}"]
    parts += [" and ".join(sorted({row.date[:10] for row in measured}))]
    for products in sorted({row.products for row in measured}):
        if reached := [row.matmul_tflops for row in measured if row.products == products and row.matmul_tflops]:
            parts.append(f"`torch.mm` {products} {rate(max(reached))} TFLOP/s")
    if copies := [row.copy_gbs for row in measured if row.copy_gbs]:
        parts.append(f"copy {rate(max(copies))} GB/s")
    return ", ".join(parts)


def columns(measured: Sequence[Row]) -> dict[str, list[str]]:
    """The columns of a table of rows, without the empty ones."""
    base = next((row.base for row in measured if row.ratio is not None), "")
    every = {
        "provider": [row.provider for row in measured],
        "median": [time(row.median_s) for row in measured],
        "quartiles": [f"{time(row.lower_s)} to {time(row.upper_s)}" if row.median_s else "" for row in measured],
        "rounds": [_shown(row.repeats, "{:.0f}") for row in measured],
        f"time / {base}": [_shown(row.ratio, "{:.2f}") for row in measured],
        "peak MB": [_shown(row.peak_bytes and row.peak_bytes / 1e6, "{:,.1f}") for row in measured],
        "useful TFLOP/s": [_shown(row.tflops, "{:.3g}") for row in measured],
        "of torch.mm": [_shown(row.share_of_matmul, "{:.0%}") for row in measured],
        "of copy": [_shown(row.share_of_copy, "{:.0%}") for row in measured],
        "recall": [_shown(row.recall, "{:.5f}") for row in measured],
        "note": ["; ".join(filter(None, ["" if row.status == "ok" else row.status, row.note])) for row in measured],
    }
    return {name: cells for name, cells in every.items() if any(cells)}


def grid(shown: dict[str, list[str]]) -> str:
    """Columns of cells as a Markdown table."""
    lines = [list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    cells = ([cell.replace("\n", " ").replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def rate(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time(seconds: float | None) -> str:
    """Seconds or milliseconds; empty for None."""
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"
