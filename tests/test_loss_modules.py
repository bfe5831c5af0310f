"""What all losses promise: full gradients, resets, state, recovery from failures, activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from inputs import C, H, N, W, gradient_of
from loss_cases import LOSSES, TARGETS, assert_same_state, every_loss, loss_batch
from tolerances import assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qaconv_triton import ClassMemoryLoss, QAConv, SoftmaxTripletLoss
from qaconv_triton.losses import MatcherLoss


def assert_feature_gradient_is_that_of_the_values(evaluate: Callable[[Tensor], Tensor], feature: Tensor) -> None:
    """Compare with a central difference along a random direction: any detached path would show."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(feature.shape, generator=generator, dtype=feature.dtype)
    step = 1e-6
    with torch.no_grad():
        change = evaluate(feature + step * direction).sum() - evaluate(feature - step * direction).sum()
    (gradient,) = torch.autograd.grad(evaluate(feature).sum(), feature)
    numeric = change / (2 * step)
    assert abs(numeric) > 1e-3
    # a difference of step 1e-6 is as exact as this, and no more
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-8)


@every_loss
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_reach_the_features_in_full(make_loss: Callable[[], MatcherLoss], training: bool) -> None:
    module = make_loss().train(training)
    feature, target, _ = loss_batch(TARGETS["mixed"])
    if isinstance(module, ClassMemoryLoss):
        module(feature, target)

    def evaluate(part: int, maps: Tensor) -> Tensor:
        loss: Tensor = copy.deepcopy(module)(maps, target)[part]
        return loss

    for part in (0, 1, 2) if isinstance(module, SoftmaxTripletLoss) else (0,):
        assert_feature_gradient_is_that_of_the_values(partial(evaluate, part), feature)


@every_loss
def test_an_empty_batch_has_an_empty_loss(make_loss: Callable[[], MatcherLoss]) -> None:
    feature, target, _ = loss_batch([])
    outputs = make_loss()(feature, target.long())
    assert all(output.shape == (0,) for output in outputs)
    outputs[0].sum().backward()
    assert gradient_of(feature).shape == feature.shape


@every_loss
def test_a_loss_resets_its_matcher(make_loss: Callable[[], MatcherLoss]) -> None:
    module = make_loss()
    feature, target, _ = loss_batch(TARGETS["pairs"])
    for _ in range(2):  # the class memory is empty at first
        module(feature, target)
    fresh = QAConv(C, H, W).double().state_dict()
    statistics = [name for name in fresh if "running" in name or "tracked" in name]
    assert len(statistics) == 6
    assert not any(torch.equal(module.matcher.state_dict()[name], fresh[name]) for name in statistics)
    module.reset_running_stats()
    assert all(torch.equal(module.matcher.state_dict()[name], fresh[name]) for name in statistics)
    weight = module.matcher.fc.weight
    assert weight.std() > 0.1
    module.reset_parameters()
    assert torch.equal(weight, torch.full_like(weight, 1 / (H * W)))
    if isinstance(module, ClassMemoryLoss):
        module(feature, target)
        module.reset_running_stats()
        assert not module.class_memory.any()
        assert not module.valid_class.any()


@every_loss
def test_the_state_dict_holds_the_matcher_once(make_loss: Callable[[], MatcherLoss]) -> None:
    module = make_loss()
    expected = {f"matcher.{name}" for name in module.matcher.state_dict()}
    if isinstance(module, ClassMemoryLoss):
        expected |= {"class_memory", "valid_class"}
    assert module.state_dict().keys() == expected


@every_loss
def test_labels_may_be_int32(make_loss: Callable[[], MatcherLoss]) -> None:
    feature, target, _ = loss_batch(TARGETS["mixed"])
    for of_int64, of_int32 in zip(make_loss()(feature, target), make_loss()(feature, target.int()), strict=True):
        assert torch.equal(of_int64, of_int32)


@every_loss
def test_a_forward_that_fails_midway_changes_nothing(
    make_loss: Callable[[], MatcherLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if memory ran out at the n-th call of the matcher, or after the last: the next forward is right."""
    module, expected = make_loss(), make_loss()
    feature, target, _ = loss_batch(TARGETS["pairs"])
    for one in (module, expected):
        if isinstance(one, ClassMemoryLoss):
            one(feature, target)
    before = copy.deepcopy(module.state_dict())
    graph = module.matcher.class_neighbors

    def fail_after(calls: int) -> Callable[..., Tensor]:
        forward, left = QAConv.forward, [calls]

        def limited(*arguments: Any, **options: Any) -> Tensor:
            score = forward(*arguments, **options)
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("no memory left")
            return score

        return limited

    for calls in range(3 if isinstance(module, ClassMemoryLoss) else 1):
        with monkeypatch.context() as patch:
            patch.setattr(QAConv, "forward", fail_after(calls))
            with pytest.raises(torch.OutOfMemoryError):
                module(feature, target)
        assert_same_state(before, module)
        assert module.matcher.class_neighbors is graph
    for actual, wanted in zip(module(feature, target), expected(feature, target), strict=True):
        assert torch.equal(actual, wanted)
    assert_same_state(expected.state_dict(), module)


@every_loss
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_the_statistics_count_a_checkpointed_forward_once(
    make_loss: Callable[[], MatcherLoss], use_reentrant: bool
) -> None:
    module, expected = make_loss(), make_loss()
    feature, target, _ = loss_batch(TARGETS["mixed"])
    for _ in range(2):
        checkpoint(module, feature, target, use_reentrant=use_reentrant)[0].sum().backward()
        actual = gradient_of(feature).clone()
        feature.grad = None
        expected(feature, target)[0].sum().backward()
        assert_close(actual, gradient_of(feature), torch.float64)
        feature.grad = None
    assert_same_state(expected.state_dict(), module)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["softmax", "softmax ignore", "memory"])
def test_on_cuda_invalid_labels_are_nan_and_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("QACONV_TRITON_CHECKS", raising=False)
    module = LOSSES[name]().float().cuda()
    feature, target, _ = loss_batch([0, 3, -1, 3, N, 7])
    feature, target = feature.detach().float().cuda().requires_grad_(), target.cuda()
    module(feature, target.clamp(0, N - 1))  # builds the class graph, compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = module(feature, target)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan().tolist() == [False, False, True, False, True, False]
