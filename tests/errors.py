"""Inputs on the CPU for calls that are refused, and the assertion that a refused call changes nothing.

On the CPU everywhere: on CUDA labels are not read back, so they raise nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from inputs import CPU, C, H, W, make_class_matcher
from torch import Tensor

from qaconv_triton import QAConv

LABELS = [3, 0, 3, 7]
B = len(LABELS)
META = torch.device("meta")


def class_matcher(**options: Any) -> QAConv:
    return make_class_matcher(device=CPU, **options)


def features(*shape: int, seed: int = 1) -> Tensor:
    """Maps `shape`, or `[B, C, H, W]`."""
    return torch.randn(shape or (B, C, H, W), generator=torch.Generator().manual_seed(seed))


def labels(*values: int) -> Tensor:
    """The given labels, or B valid ones."""
    return torch.tensor(values or LABELS)


def state_of(matcher: QAConv) -> dict[str, Any]:
    """Everything that an error must not change."""
    state: dict[str, Any] = {name: value.clone() for name, value in matcher.state_dict().items()}
    state |= {f"id of {name}": id(parameter) for name, parameter in matcher.named_parameters()}
    state |= {f"grad of {name}": parameter.grad for name, parameter in matcher.named_parameters()}
    state |= {f"mode of {name}": module.training for name, module in matcher.named_modules()}
    graph = matcher.class_neighbors
    state |= {"graph": graph, "graph's values": None if graph is None else graph.clone()}
    state |= {"previous graph": matcher._last_graph}
    state |= {"kernel": matcher._pending_gallery, "warned": matcher._warned_of_gallery_visibility}
    state |= {"k_nearest": matcher.k_nearest, "rng": torch.get_rng_state()}
    return state


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert isinstance(after[name], Tensor), name
            assert torch.equal(value.nan_to_num(), after[name].nan_to_num()), name
        else:
            assert value is after[name] or value == after[name], name
    for name in ("graph", "previous graph", "kernel"):
        assert before[name] is after[name], name


@contextmanager
def refused(error: type[BaseException], restated: tuple[str, ...], matcher: QAConv | None = None) -> Iterator[None]:
    """Expect exactly `error`, whose message contains `restated`, and no change of the matcher or the generator."""
    rng = torch.get_rng_state()
    before = None if matcher is None else state_of(matcher)
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    message = str(caught.value)
    for part in restated:
        assert part in message, f"{part!r} is not in {message!r}"
    assert torch.equal(torch.get_rng_state(), rng)
    if matcher is not None and before is not None:
        assert_unchanged(before, state_of(matcher))
