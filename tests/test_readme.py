"""The README's training script runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_training_script_of_the_readme() -> None:
    (script,) = re.findall(r"```python\n(import torch\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["scores"].shape == (5, 96)
    assert torch.isfinite(names["loss"]).all()
    assert names["matcher"].bn.num_batches_tracked == 2 * 2 * 24  # two forwards for each class's batch, two epochs
