"""The demo, small: it trains, measures, draws and reports."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "glyphs.py"


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run


def test_demo_writes_its_table_and_pictures(tmp_path: Path) -> None:
    options = ["--classes", "60", "--epochs", "2", "--seeds", "1", "--k-nearest", "5", "--output", str(tmp_path)]
    run = run_demo(*options)
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table.strip() in run.stdout
    rows = re.findall(r"^\| \(([a-d])\).*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
    assert [name for name, *_ in rows] == ["a", "b", "c", "d"]
    for _, *cells in rows:
        assert all(0.0 < float(cell) <= 1.0 for cell in cells)
        assert float(cells[0]) > 1.5 / 12  # rank-1 of clean queries: twelve unseen characters, so better than chance
    for picture in ("neighbors.png", "correspondences.png", "training.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_demo_in_bf16_stops_after_some_batches(tmp_path: Path) -> None:
    options = ["--classes", "40", "--epochs", "4", "--seeds", "1", "--k-nearest", "5", "--output", str(tmp_path)]
    run_demo(*options, "--bf16", "--steps", "3")
    with (tmp_path / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    methods = ("pooled", "random", "graph")
    assert [(row["method"], row["seed"], row["batch"]) for row in rows] == [
        (method, "1", str(batch)) for method in methods for batch in range(3)
    ]
    assert all(0.0 < float(row["loss"]) < 20.0 and 0.0 <= float(row["accuracy"]) <= 1.0 for row in rows)
