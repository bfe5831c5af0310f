"""The head of a score: its gradient is the derivative of its scores, and takes few operations."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from inputs import make_matcher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qaconv_triton import QAConv, head
from qaconv_triton.head import pair_scores, update_running_statistics

PAIRS, NEIGHBORS, VALUES = 4, 3, 12
INVALID = torch.tensor([False, True, False, False])
VIEWS = ("view", "expand", "detach", "alias", "slice", "select", "squeeze", "aten.t.default", "unbind", "split")


def make_head(mode: tuple[bool, bool], affine: bool = True) -> QAConv:
    matcher = make_matcher(torch.float64).cpu()
    if not affine:
        matcher.bn, matcher.logit_bn = (torch.nn.BatchNorm1d(1, affine=False, dtype=torch.float64) for _ in range(2))
    matcher.bn.train(mode[0])
    matcher.logit_bn.train(mode[1])
    return matcher


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("invalid", [None, INVALID], ids=["all", "one invalid"])
@pytest.mark.parametrize("mode", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_gradient_is_the_derivative(mode: tuple[bool, bool], invalid: Tensor | None, affine: bool) -> None:
    matcher = make_head(mode, affine)
    parameters = [each for name, each in matcher.named_parameters() if name != "class_embed"]
    pooled = torch.rand(PAIRS, NEIGHBORS, VALUES, dtype=torch.float64).requires_grad_()
    counted = slice(None) if invalid is None else ~invalid

    def scores(pooled: Tensor, *_: Tensor) -> Tensor:
        return pair_scores(pooled, matcher._head, invalid=invalid)[0][counted]

    assert torch.autograd.gradcheck(scores, (pooled, *parameters))
    if mode[1]:  # a shift of all logits changes no score
        assert matcher.fc.bias.grad is None
        scores(pooled).square().sum().backward()
        assert matcher.fc.bias.grad == 0
    if invalid is not None:
        scores(pooled).square().sum().backward()
        assert pooled.grad is not None
        assert pooled.grad[invalid].eq(0).all()


class Operations(TorchDispatchMode):
    """Counts operations that do more than to make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(word in str(function) for word in VIEWS):
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_few_operations() -> None:
    """Each takes the host of a GPU some 40 microseconds, which is what a training step waits for."""
    matcher = make_head((True, True))
    pooled = torch.rand(PAIRS, NEIGHBORS, VALUES, dtype=torch.float64).requires_grad_()
    with Operations() as forward:
        scores, statistics = pair_scores(pooled, matcher._head)
    with Operations() as update:
        update_running_statistics(statistics)
    weight = torch.rand_like(scores)
    with Operations() as backward:
        scores.backward(weight)
    assert 0 < sum(forward.found.values()) <= 18, forward.found
    assert 0 < sum(update.found.values()) <= 4, update.found
    assert 0 < sum(backward.found.values()) <= 18, backward.found


@pytest.mark.parametrize(("mean", "deviation"), [(0.9, 0.01), (20.0, 0.05)])
def test_the_variance_over_ranks_is_as_exact_as_that_of_one(
    mean: float, deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squares of values far from zero are summed in fp64."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)  # of one rank
    values = mean + deviation * torch.randn(64, 50)
    norm = head._Norm(1e-5, num_values=torch.tensor(float(values.numel())), group=object())
    found = head._statistics(values, norm)
    torch.testing.assert_close(found[0].double(), values.double().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), values.double().var(correction=0), rtol=1e-5, atol=0)
