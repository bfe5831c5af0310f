"""Under `torch.autocast` the correlation runs in the autocast dtype, all else in fp32; the class graph stays exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import DEVICE, ids, make_class_matcher, maps
from loss_cases import TARGETS, training_step
from tolerances import assert_all_close, assert_close, assert_rounded, assert_rounded_gradients
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qaconv_triton import QAConv, SoftmaxTripletLoss, functional

LABELS = TARGETS["pairs"]
B = len(LABELS)


class SeenDtypes(TorchDispatchMode):
    """The dtypes of the probes that reach the correlation."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.qaconv_triton.max_correlation.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[QAConv, Tensor], Tensor]] = {
    "classes": lambda matcher, feature: matcher.class_scores(feature, ids(LABELS)).values,
    "dense": lambda matcher, feature: matcher(feature, labels=ids(LABELS)),
    "every class": lambda matcher, feature: matcher(feature),
    "gallery": lambda matcher, feature: matcher(feature, maps(4, 9)),
    "same": lambda matcher, feature: matcher(feature, "same"),
}


@pytest.mark.parametrize("kind", ["classes", "gallery"])
def test_autocast(backend: str, kind: str) -> None:
    matcher = make_class_matcher(include_self=True).eval()
    results = []
    for enabled in (True, False):
        matcher.zero_grad()
        feature = maps(B, 1).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            scores = CALLS[kind](matcher, feature)
            weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
            total = (scores * weight).sum()
        assert scores.dtype == torch.float32
        total.backward()
        gradients = {name: parameter.grad for name, parameter in matcher.named_parameters() if "logit" not in name}
        results.append((scores.detach(), {"feature": feature.grad, **gradients}))
    (actual, actual_gradients), (expected, expected_gradients) = results
    assert not torch.equal(actual, expected)
    assert_rounded(actual, expected, torch.bfloat16)
    assert_rounded_gradients(actual_gradients, expected_gradients, torch.bfloat16)
    assert all(found is None or found.dtype == torch.float32 for found in actual_gradients.values())


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_the_correlation(kind: str, dtype: torch.dtype) -> None:
    matcher = make_class_matcher(include_self=True)
    with SeenDtypes() as seen:
        with torch.autocast(DEVICE.type, dtype):
            CALLS[kind](matcher, maps(B, 1))
        CALLS[kind](matcher, maps(B, 1))
    assert seen.dtypes == [dtype, torch.float32]


def test_autocast_leaves_the_graph_exact(backend: str) -> None:
    table = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = functional.class_neighbors(table, 20, return_similarities=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = functional.class_neighbors(table, 20, return_similarities=True)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_autocast_around_the_backward_pass_too() -> None:
    gradients = []
    for enabled in (True, False):
        matcher, feature = make_class_matcher(include_self=True), maps(B, 1).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = matcher(feature, labels=ids(LABELS)).square().sum()
            if enabled:
                loss.backward()
        if not enabled:
            loss.backward()
        assert matcher.class_embed is not None
        gradients.append({"feature": feature.grad, "table": matcher.class_embed.grad})
    assert_all_close(*gradients, torch.float32)


def test_autocast_of_a_whole_training_step() -> None:
    loss, cast = (SoftmaxTripletLoss(make_class_matcher(include_self=True)) for _ in range(2))
    expected = training_step(loss, maps(B, 1), ids(LABELS))
    feature = maps(B, 1).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = cast(feature, ids(LABELS))
    outputs[2].mean().backward()
    assert all(output.dtype == torch.float32 for output in outputs)
    assert feature.grad is not None
    assert float(F.cosine_similarity(feature.grad.flatten(), expected["feature"].flatten(), dim=0)) > 0.99
    for name, buffer in cast.named_buffers():
        assert buffer.dtype == expected[name].dtype
        assert_close(buffer, expected[name], torch.bfloat16, name)


def test_autocast_leaves_double_alone() -> None:
    matcher = make_class_matcher(torch.float64, include_self=True).eval()
    feature = maps(B, 1, torch.float64)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        scores = matcher(feature, "same")
    assert scores.dtype == torch.float64
    assert torch.equal(scores, matcher(feature, "same"))
