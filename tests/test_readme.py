"""The code of the README and of the pages beside it runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def run(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other, and return what they define."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    return names


def test_code_of_the_readme() -> None:
    names = run(README)
    assert names["scores"].shape == (16, 16)
    assert names["maps"].grad.abs().sum() > 0


def test_training_script() -> None:
    names = run(DOCS / "training.md")
    assert names["scores"].shape == (5, 96)
    assert torch.isfinite(names["loss"]).all()
    assert names["matcher"].bn.num_batches_tracked == 2 * 2 * 24  # two forwards for each class's batch, two epochs


def test_code_for_those_who_come_from_qaconv() -> None:
    names = run(DOCS / "coming-from-qaconv.md")
    assert names["scores"].shape == (8, 8)
    assert names["vector"].numel() > names["N"] * names["C"] * names["H"] * names["W"]
    assert names["threshold"].isfinite()
