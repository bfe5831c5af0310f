"""Rows of results: their CSV files and their tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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
        device = re.sub(r"[^a-z0-9]+", "-", row.device.lower()).strip("-")
        files.setdefault(directory / device / f"{row.op}.csv", []).append(row)
    for path, new in files.items():
        kept = {key(row): row for row in (read(path) if path.exists() else [])}
        kept |= {key(row): row for row in new}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in kept.values())
    return list(files)


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
    """The rows of one case as a small table, under what they were measured with; columns of nothing are left out."""
    first = found[0]
    title = " ".join(filter(None, [first.op, first.case, first.part, first.dtype]))
    threads = "" if first.device.startswith("NVIDIA") else f", {first.threads} threads"
    ceilings = sorted({(row.products, row.matmul_tflops) for row in found if row.matmul_tflops is not None})
    reached = ", ".join(f"torch.mm {name} {value:.3g} TFLOP/s" for name, value in ceilings)
    ratio = next((f"time / {row.base}" for row in found if row.ratio is not None), "ratio")
    columns = {
        "provider": [row.provider for row in found],
        "median": [_time(row.median_s) for row in found],
        "quartiles": [_quartiles(row) for row in found],
        ratio: [_shown(row.ratio, "{:.2f}") for row in found],
        "peak MB": [_shown(row.peak_bytes and row.peak_bytes / 1e6, "{:.1f}") for row in found],
        "useful TFLOP/s": [_shown(row.tflops, "{:.3g}") for row in found],
        "of torch.mm": [_shown(row.share_of_matmul, "{:.0%}") for row in found],
        "of copy": [_shown(row.share_of_copy, "{:.0%}") for row in found],
        "recall": [_shown(row.recall, "{:.5f}") for row in found],
        "note": ["; ".join(filter(None, [row.status if row.status != "ok" else "", row.note])) for row in found],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(kept), ["---"] * len(kept), *zip(*kept.values(), strict=True)]
    return "\n".join(
        [
            f"{title}: {first.device}{threads}, torch {first.torch}, triton {first.triton}, "
            f"commit {first.commit}, {first.date} UTC",
            f"Ceilings in this run: {', '.join(filter(None, [reached, f'copy {first.copy_gbs or 0:.3g} GB/s']))}",
            "",
            *("| " + " | ".join(line).replace("\n", " ") + " |" for line in lines),
        ]
    )


def _quartiles(row: Row) -> str:
    return "" if row.median_s is None else f"{_time(row.lower_s)} to {_time(row.upper_s)}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
