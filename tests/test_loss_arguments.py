"""What losses are made of: numbers, sizes and matchers of every kind, and clear errors for what is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import ClassMemoryLoss, PairwiseMatchingLoss, QAConv, SoftmaxTripletLoss, TripletLoss
from qaconv_triton.losses import MatcherLoss

CHANNELS, HEIGHT, WIDTH, NUM_CLASSES = 5, 2, 3, 9
LABELS = [2, 2, 2, 5, 0, 0, 8]


def make_matcher(**options: Any) -> QAConv:
    torch.manual_seed(0)
    return QAConv(CHANNELS, HEIGHT, WIDTH, **options).double()


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels, visibility."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(len(LABELS), CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    visible = torch.rand(len(LABELS), 1, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return feature.requires_grad_(), torch.tensor(LABELS), visible


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


OPTIONS: dict[str, Callable[[Any], MatcherLoss]] = {
    "TripletLoss margin": lambda value: TripletLoss(make_matcher(), value),
    "SoftmaxTripletLoss margin": lambda value: SoftmaxTripletLoss(
        make_matcher(num_classes=NUM_CLASSES, k_nearest=3), value
    ),
    "SoftmaxTripletLoss triplet_weight": lambda value: SoftmaxTripletLoss(
        make_matcher(num_classes=NUM_CLASSES, k_nearest=3), triplet_weight=value
    ),
}
every_option = pytest.mark.parametrize("option", OPTIONS)


@every_option
@pytest.mark.parametrize(
    ("value", "error", "restated"),
    [
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        (-math.inf, ValueError, "-inf"),
        (-0.5, ValueError, "-0.5"),
        (np.float32("nan"), ValueError, "nan"),
        (10**400, ValueError, "1000"),
        ("1", TypeError, "str '1'"),
        (None, TypeError, "NoneType"),
        (True, TypeError, "bool True"),
        (np.bool_(True), TypeError, "bool"),
        (1j, TypeError, "complex 1j"),
        ([1.0], TypeError, r"list \[1.0\]"),
        (torch.tensor(1.0), TypeError, "Tensor"),
    ],
)
def test_a_number_that_is_none_is_refused_at_construction(
    option: str, value: Any, error: type[Exception], restated: str
) -> None:
    with pytest.raises(error, match=f"{option.split()[1]}.*{restated}"):
        OPTIONS[option](value)


@every_option
@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), Fraction(2)])
def test_numbers_of_every_kind_are_the_same(option: str, value: Any) -> None:
    feature, target, _ = make_batch()
    for actual, expected in zip(
        OPTIONS[option](value)(feature, target), OPTIONS[option](2)(feature, target), strict=True
    ):
        assert torch.equal(actual, expected)


LOSS_CLASSES: dict[str, Callable[[Any], MatcherLoss]] = {
    "MatcherLoss": MatcherLoss,
    "PairwiseMatchingLoss": PairwiseMatchingLoss,
    "TripletLoss": TripletLoss,
    "SoftmaxTripletLoss": SoftmaxTripletLoss,
    "ClassMemoryLoss": lambda matcher: ClassMemoryLoss(matcher, NUM_CLASSES, CHANNELS, HEIGHT, WIDTH),
}


@pytest.mark.parametrize("make", LOSS_CLASSES.values(), ids=LOSS_CLASSES.keys())
@pytest.mark.parametrize(
    ("matcher", "restated"),
    [
        (None, "NoneType"),
        (QAConv, "QAConv"),
        ("matcher", "str 'matcher'"),
        (torch.ones(2), "Tensor"),
        (nn.Linear(2, 2), "Linear"),
        (lambda probe, gallery: probe, "function"),
    ],
    ids=["none", "class", "string", "tensor", "module of one argument", "function"],
)
def test_a_matcher_that_is_none_is_refused(make: Callable[[Any], MatcherLoss], matcher: Any, restated: str) -> None:
    with pytest.raises(TypeError, match=f"matcher: .*{restated}"):
        make(matcher)


def test_a_matcher_without_classes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"class_scores.*CosineMatcher"):
        SoftmaxTripletLoss(CosineMatcher())  # type: ignore[arg-type]


class CosineMatcher(nn.Module):
    """A matcher that knows two feature maps, and nothing of visibility or graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64, device="cpu"))
        self.norm = nn.BatchNorm1d(1, dtype=torch.float64, device="cpu")

    def forward(self, prob_fea: Tensor, gal_fea: Tensor) -> Tensor:
        score = F.normalize(prob_fea.flatten(1)) @ F.normalize(gal_fea.flatten(1)).mT
        return self.scale * self.norm(score.view(-1, 1)).view_as(score)

    def reset_running_stats(self) -> None:
        self.norm.reset_running_stats()


class VisibleMatcher(CosineMatcher):
    def forward(
        self, prob_fea: Tensor, gal_fea: Tensor, prob_occ: Tensor | None = None, gal_occ: Tensor | None = None
    ) -> Tensor:
        assert prob_occ is not None
        assert gal_occ is not None
        return super().forward(prob_fea * prob_occ, gal_fea * gal_occ)


@pytest.mark.parametrize("make", [PairwiseMatchingLoss, TripletLoss])
def test_pair_losses_take_any_matcher(make: Callable[[nn.Module], MatcherLoss]) -> None:
    feature, target, visible = make_batch()
    loss, accuracy = make(CosineMatcher())(feature, target)
    expected = make(VisibleMatcher())(feature, target, torch.ones_like(visible))
    assert torch.equal(loss, expected[0])
    assert torch.equal(accuracy, expected[1])
    assert loss.std() > 0.1
    loss.sum().backward()
    assert gradient_of(feature).abs().max() > 1e-3
    assert not torch.equal(make(VisibleMatcher())(feature, target, visible)[0], loss)
    with pytest.raises(TypeError, match="prob_occ"):
        make(CosineMatcher())(feature, target, visible)


def test_class_memory_loss_takes_any_matcher() -> None:
    module = ClassMemoryLoss(CosineMatcher(), NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, 4)
    feature, target, _ = make_batch()
    first = module(feature, target)[0]
    loss, _ = module(feature, target)
    (first + loss).sum().backward()  # the memory that the first forward worked on is overwritten by now
    assert not first.any()
    assert loss.std() > 0.1
    assert gradient_of(feature).abs().max() > 1e-3
    module.reset_running_stats()
    assert not module.valid_class.any()


def test_scores_of_another_shape_are_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, prob_fea: Tensor, gal_fea: Tensor) -> Tensor:
            return prob_fea.sum(dim=(1, 2, 3)).unsqueeze(1)

    feature, target, _ = make_batch()
    with pytest.raises(ValueError, match=r"Wrong: expected scores of shape \[7, 7\], got \[7, 1\]"):
        TripletLoss(Wrong())(feature, target)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_losses_do_not_depend_on_the_default_dtype_or_device(default: torch.dtype | str) -> None:
    feature, target, _ = make_batch()
    feature = feature.detach().float()

    def results() -> list[Tensor]:
        matcher = CosineMatcher().float()
        memory = ClassMemoryLoss(matcher, NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, 4)
        outputs = [*PairwiseMatchingLoss(matcher)(feature, target), *TripletLoss(matcher)(feature, target)]
        for _ in range(2):
            outputs += memory(feature, target)
        return [*outputs, memory.class_memory, memory.valid_class]

    expected = results()
    before = torch.get_default_dtype()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        actual = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for one, another in zip(actual, expected, strict=True):
        assert one.dtype == another.dtype == torch.float32
        assert torch.equal(one, another)


@pytest.mark.parametrize("number", [np.int64, np.uint8])
def test_class_memory_loss_takes_sizes_with_an_index(number: Any) -> None:
    sizes = (NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, 4)
    module = ClassMemoryLoss(make_matcher(), *(number(size) for size in sizes))
    expected = ClassMemoryLoss(make_matcher(), *sizes)
    feature, target, _ = make_batch()
    for _ in range(2):
        assert torch.equal(module(feature, target)[0], expected(feature, target)[0])
    with pytest.raises(TypeError, match="mem_batch_size: expected an int, got float"):
        ClassMemoryLoss(make_matcher(), *sizes[:4], 4.0)  # type: ignore[arg-type]
