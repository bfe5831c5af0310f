"""The demo, small: it trains, measures, draws and reports."""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import torch_default

EXAMPLE = Path(__file__).parents[1] / "examples" / "glyphs.py"


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.slow
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


@pytest.mark.slow
def test_demo_in_bf16_stops_after_some_batches(tmp_path: Path) -> None:
    options = ["--classes", "40", "--epochs", "4", "--seeds", "1", "--k-nearest", "5", "--output", str(tmp_path)]
    run = run_demo(*options, "--bf16", "--steps", "3")
    assert "\r" not in run.stderr  # no progress bar in a log
    assert re.findall(r"^seed 1, \((.)\).*: epoch (\d) of 2, loss \d+", run.stdout, re.MULTILINE) == [
        (method, epoch) for method in "abc" for epoch in "12"
    ]
    with (tmp_path / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    methods = ("pooled", "random", "graph")
    assert [(row["method"], row["seed"], row["batch"]) for row in rows] == [
        (method, "1", str(batch)) for method in methods for batch in range(3)
    ]
    assert all(0.0 < float(row["loss"]) < 20.0 and 0.0 <= float(row["accuracy"]) <= 1.0 for row in rows)


def test_the_demo_prepares_the_same_under_another_default_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    demo, data, pictures = (importlib.import_module(name) for name in ("glyphs", "glyph_data", "glyph_pictures"))
    images = torch.randint(256, (20, len(data.FACES), data.SIZE, data.SIZE), dtype=torch.uint8)
    glyphs = data.Glyphs([chr(65 + i) for i in range(20)], images, torch.ones(20, len(data.FACES), dtype=torch.bool))

    def prepare() -> tuple[object, ...]:
        seen, unseen = demo.split(glyphs, 15, seed=3)
        test = demo.make_test_set(unseen, seen, 3, torch.device("cpu"))
        table = demo.make_table({"a": [[0.12345, 0.98765], [0.12355, 0.98775]]}, {}, "note")
        ends = pictures.center(torch.tensor([0, 48], device="cpu"))
        return seen.characters, *vars(test).values(), table, ends

    expected = prepare()
    with torch_default(torch.bfloat16), torch_default("meta"):
        found = prepare()
    for got, true in zip(found, expected, strict=True):
        assert got == true if not isinstance(true, torch.Tensor) else torch.equal(got, true) and got.dtype == true.dtype
