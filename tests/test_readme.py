"""The code of the README and of the pages beside it runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"
COMING_FROM_QACONV = README.parent / "docs" / "coming-from-qaconv.md"


def test_training_script_of_the_readme() -> None:
    (script,) = re.findall(r"```python\n(import torch\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["scores"].shape == (5, 96)
    assert torch.isfinite(names["loss"]).all()
    assert names["matcher"].bn.num_batches_tracked == 2 * 2 * 24  # two forwards for each class's batch, two epochs


def test_code_for_those_who_come_from_qaconv() -> None:
    blocks = re.findall(r"```python\n(.*?)```", COMING_FROM_QACONV.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert names["scores"].shape == (8, 8)
    assert names["vector"].numel() > names["N"] * names["C"] * names["H"] * names["W"]
    assert names["threshold"].isfinite()
