"""Checkpoints of published QAConv 2.x, whose `fc` is shared by both halves of the pooled values."""

from __future__ import annotations

from typing import Any

import torch


def convert_shared_fc(state_dict: dict[str, Any], prefix: str, locations: int) -> None:
    """Rewrite a published `fc` of `prefix` in place to the same function over the concatenated halves.

    Published QAConv applies `Linear(S, 1)` to each half and adds the two logits, so the bias counts twice:
    `fc.weight [1, S]` becomes `cat(w, w) [1, 2S]` and `fc.bias` becomes `2 b`. Anything else is left alone.

    Args:
        state_dict: the mapping being loaded.
        prefix: the matcher's prefix in it, "" or ending in a dot.
        locations: S = H*W.

    Example:
        >>> state = {"fc.weight": torch.ones(1, 4), "fc.bias": torch.ones(1)}
        >>> convert_shared_fc(state, "", locations=4)
        >>> state["fc.weight"].shape, state["fc.bias"]
        (torch.Size([1, 8]), tensor([2.]))
    """
    weight = state_dict.get(prefix + "fc.weight")
    if isinstance(weight, torch.Tensor) and tuple(weight.shape) == (1, locations):
        state_dict[prefix + "fc.weight"] = torch.cat([weight, weight], dim=1)
        if prefix + "fc.bias" in state_dict:
            state_dict[prefix + "fc.bias"] = 2 * state_dict[prefix + "fc.bias"]
