"""Matchers, batches and every loss, in fp64 on the CPU, for the tests of losses; a training step and all it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import CPU, C, H, N, W, make_matcher, maps, visibility
from torch import Tensor, nn

from qaconv_triton import ClassMemoryLoss, PairwiseMatchingLoss, QAConv, SoftmaxTripletLoss, TripletLoss
from qaconv_triton.losses import MatcherLoss

TARGETS = {
    "pairs": [0, 3, 0, 3, 7, 7],
    "singletons": [1, 2, 3, 4, 5, 6],
    "one class": [7, 7, 7, 7],
    "mixed": [2, 2, 2, 5, 0, 0, 7],
}


def loss_matcher(**options: Any) -> QAConv:
    """A matcher whose scores spread widely, so that triplets are right and wrong."""
    matcher = make_matcher(torch.float64, device=CPU, **options)
    with torch.no_grad():
        matcher.logit_bn.weight.mul_(2)
    return matcher


def loss_batch(labels: list[int], occluded: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, labels, and visibility or none."""
    feature = maps(len(labels), len(labels), torch.float64, device=CPU).requires_grad_()
    visible = visibility(len(labels), 1 + len(labels), torch.float64, CPU) if occluded else None
    return feature, torch.tensor(labels, dtype=torch.int64), visible


def loss_gradients(loss: Tensor, feature: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of a weighted sum of `loss`, so that no two samples' gradients can be mixed up."""
    weight = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
    for parameter in (feature, *module.parameters()):
        parameter.grad = None
    (loss * weight).sum().backward()
    found = {name.removeprefix("matcher."): parameter.grad for name, parameter in module.named_parameters()}
    return {"feature": feature.grad, **found}


def training_step(
    loss: SoftmaxTripletLoss, feature: Tensor, target: Tensor, visible: Tensor | None = None
) -> dict[str, Tensor]:
    """Run one training step's forward and backward; everything that it makes or changes."""
    feature = feature.detach().clone().requires_grad_()
    loss.zero_grad()
    outputs = loss(feature, target, visible)
    outputs[2].mean().backward()
    assert feature.grad is not None
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)} | {"feature": feature.grad}
    found |= {
        f"gradient of {name}": parameter.grad.to_dense()
        for name, parameter in loss.named_parameters()
        if parameter.grad is not None
    }
    return found | {name: buffer.clone() for name, buffer in loss.named_buffers()}


def assert_same_state(before: dict[str, Tensor], module: nn.Module) -> None:
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def class_memory_loss(matcher: QAConv, mem_batch_size: int = 16) -> ClassMemoryLoss:
    return ClassMemoryLoss(matcher, N, C, H, W, mem_batch_size).to(matcher.fc.weight.dtype)


CLASSES = {"num_classes": N, "k_nearest": 3}
LOSSES: dict[str, Callable[[], MatcherLoss]] = {
    "pairwise": lambda: PairwiseMatchingLoss(loss_matcher()),
    "triplet": lambda: TripletLoss(loss_matcher()),
    "softmax": lambda: SoftmaxTripletLoss(loss_matcher(**CLASSES)),
    "softmax ignore": lambda: SoftmaxTripletLoss(loss_matcher(**CLASSES, include_self=True), background="ignore"),
    "memory": lambda: class_memory_loss(loss_matcher(), 3),
}
every_loss = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES.keys())
