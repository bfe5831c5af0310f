"""Rows of results: their CSV files and their tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "triton", "commit", "date")


@dataclass(frozen=True)
class Row:
    """One line of results: times in seconds, `ratio` to the provider `base`, None where there is no number."""

    op: str
    case: str
    part: str = field(default="", kw_only=True)  # of the case's computation, where it is taken apart
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


def save(found: Iterable[Row], directory: Path = RESULTS) -> list[Path]:
    """Write rows to `<directory>/<device>/<op>.csv`; each replaces that of the same case, part and provider."""

    def key(row: Row) -> tuple[object, ...]:
        return row.case, row.part, row.dtype, row.provider, row.threads

    files: dict[Path, list[Row]] = {}
    for row in found:
        files.setdefault(directory / slug(row.device) / f"{row.op}.csv", []).append(row)
    for path, new in files.items():
        kept = {key(row): row for row in (read(path) if path.exists() else [])}
        kept |= {key(row): row for row in new}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".new")  # a run that is ended meanwhile costs no rows
        with whole.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in kept.values())
        whole.replace(path)
    return list(files)


def slug(device: str) -> str:
    """The folder of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path) -> list[Row]:
    """The rows of a file that `save` wrote; a column that the file does not have is left at its default."""
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int | None": lambda text: int(text) if text else None,
        "float | None": lambda text: float(text) if text else None,
    }
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [
        Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row) if field.name in line})
        for line in lines
    ]


def markdown(found: Sequence[Row]) -> str:
    """The rows of one case as a small table, under what they were measured with."""
    first = found[0]
    title = " ".join(filter(None, [first.op, first.case, first.part, first.dtype]))
    return (
        f"{title}: {first.device}, {measured(found)}\nCeilings in this run: {ceilings(found)}\n\n{grid(columns(found))}"
    )


def of_gpu(row: Row) -> bool:
    """Whether a row's device is a GPU, by its name: AMD makes CPUs, too, some of them with graphics."""
    return re.match(r"(NVIDIA|Tesla|GeForce|Quadro|AMD Instinct|AMD Radeon)\b", row.device) is not None


def measured(found: Sequence[Row]) -> str:
    """Threads, versions, commit and date of rows; several where they differ."""

    def each(values: Iterable[object]) -> str:
        return " and ".join(sorted({str(value) for value in values}))

    threads = "" if of_gpu(found[0]) else f"{each(row.threads for row in found)} threads, "
    torch, triton, commit, date = (each(getattr(row, name) for row in found) for name in VERSIONS)
    return f"{threads}torch {torch}, triton {triton}, commit {commit}, {date} UTC"


def ceilings(found: Sequence[Row]) -> str:
    """What products and a copy reached in the same runs; the least and the most where there were several."""
    reached: dict[str, set[float]] = {}
    for row in sorted(found, key=lambda row: row.products):
        if row.matmul_tflops is not None:
            reached.setdefault(f"torch.mm {row.products} {{}} TFLOP/s", set()).add(row.matmul_tflops)
    reached["copy {} GB/s"] = {row.copy_gbs for row in found if row.copy_gbs is not None}
    ends = ((form, dict.fromkeys((rate(min(values)), rate(max(values))))) for form, values in reached.items() if values)
    return ", ".join(form.format(" to ".join(shown)) for form, shown in ends)


def columns(found: Sequence[Row]) -> dict[str, list[str]]:
    """The columns of a table of rows; those of nothing are left out."""
    ratio = next((f"time / {row.base}" for row in found if row.ratio is not None), "ratio")
    every = {
        "provider": [row.provider for row in found],
        "median": [time(row.median_s) for row in found],
        "quartiles": [_quartiles(row) for row in found],
        "rounds": [_shown(row.repeats, "{:.0f}") for row in found],
        ratio: [_shown(row.ratio, "{:.2f}") for row in found],
        "peak MB": [megabytes(row.peak_bytes) for row in found],
        "useful TFLOP/s": [_shown(row.tflops, "{:.3g}") for row in found],
        "of torch.mm": [_shown(row.share_of_matmul, "{:.0%}") for row in found],
        "of copy": [_shown(row.share_of_copy, "{:.0%}") for row in found],
        "recall": [_shown(row.recall, "{:.5f}") for row in found],
        "note": ["; ".join(filter(None, [row.status if row.status != "ok" else "", row.note])) for row in found],
    }
    return {name: cells for name, cells in every.items() if any(cells)}


def grid(shown: dict[str, list[str]]) -> str:
    """Columns of cells as a Markdown table."""
    lines = [list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    cells = ([cell.replace("\n", " ").replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _quartiles(row: Row) -> str:
    return "" if row.median_s is None else f"{time(row.lower_s)} to {time(row.upper_s)}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def megabytes(size: float | None) -> str:
    """A number of bytes in millions; nothing where there is none."""
    return _shown(None if size is None else size / 1e6, "{:,.1f}")


def rate(value: float) -> str:
    """A number per second, to three digits, and never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time(seconds: float | None) -> str:
    """A time in seconds or milliseconds; nothing where there is none."""
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"
