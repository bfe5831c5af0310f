"""The demo, small: it trains, measures, draws and reports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "glyphs.py"


def test_demo_writes_its_table_and_pictures(tmp_path: Path) -> None:
    options = ["--classes", "60", "--epochs", "2", "--seeds", "1", "--k-nearest", "5", "--output", str(tmp_path)]
    run = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table.strip() in run.stdout
    rows = re.findall(r"^\| \(([a-d])\).*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
    assert [name for name, *_ in rows] == ["a", "b", "c", "d"]
    for _, *cells in rows:
        assert all(0.0 < float(cell) <= 1.0 for cell in cells)
        assert float(cells[0]) > 1.5 / 12  # rank-1 of clean queries: twelve unseen characters, so better than chance
    for picture in ("neighbors.png", "correspondences.png", "training.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
