"""What losses take, and refuse with a clear error: features, labels, numbers, sizes, and matchers of every kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from errors import META, refused
from inputs import C, H, N, W, gradient_of, torch_default
from loss_cases import CLASSES, LOSSES, TARGETS, assert_same_state, every_loss, loss_batch, loss_matcher
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import ClassMemoryLoss, PairwiseMatchingLoss, QAConv, SoftmaxTripletLoss, TripletLoss
from qaconv_triton.losses import MatcherLoss

# --- bad input


def misused(feature: Tensor, target: Tensor) -> dict[str, tuple[Any, Any, type[Exception], tuple[str, ...]]]:
    """Features and labels that are refused, the error, and what it restates."""
    return {
        "H and W swapped": (feature.mT, target, ValueError, ("[7, 5, 3, 2]",)),
        "3-D": (feature.flatten(2), target, ValueError, ("[7, 5, 6]",)),
        "integer features": (feature.long(), target, TypeError, ("torch.int64",)),
        "another device": (feature.to(META), target.to(META), ValueError, ("meta", "cpu")),
        "short labels": (feature, target[:2], ValueError, ("[7]", "[2]")),
        "labels in a column": (feature, target[:, None], ValueError, ("[7]", "[7, 1]")),
        "float labels": (feature, target.double(), TypeError, ("torch.float64",)),
    }


@every_loss
@pytest.mark.parametrize("kind", misused(torch.ones(7, C, H, W), torch.ones(7, dtype=torch.int64)))
def test_bad_input_is_refused_before_anything_changes(make_loss: Callable[[], MatcherLoss], kind: str) -> None:
    module = make_loss()
    feature, target, _ = loss_batch(TARGETS["mixed"])
    bad_feature, bad_target, error, restated = misused(feature.detach(), target)[kind]
    before = copy.deepcopy(module.state_dict())
    with refused(error, restated, module.matcher):
        module(bad_feature, bad_target)
    assert_same_state(before, module)


@pytest.mark.parametrize("label", [-1, N])
@pytest.mark.parametrize("name", ["softmax", "memory"])
def test_a_label_outside_the_classes_is_refused(name: str, label: int) -> None:
    module = LOSSES[name]()
    before = copy.deepcopy(module.state_dict())
    feature, target, _ = loss_batch([0, label])
    with refused(IndexError, ("[0, 8)", f"[{label}]"), module.matcher):
        module(feature, target)
    assert_same_state(before, module)


def test_an_error_in_the_pairs_leaves_the_class_path_undone() -> None:
    """SoftmaxTripletLoss scores classes, then pairs: what fails the second must not have changed the first."""
    module = SoftmaxTripletLoss(loss_matcher(num_classes=N, k_nearest=2))
    feature, target, _ = loss_batch([3])
    with refused(ValueError, ("got 1",), module.matcher):
        module(feature, target)


def test_bad_options_are_refused() -> None:
    matcher = loss_matcher(**CLASSES)
    with refused(ValueError, ("background", "'mean'"), matcher):
        SoftmaxTripletLoss(matcher, background="mean")  # type: ignore[arg-type]
    with refused(ValueError, ("ignore", "include_self=False"), matcher):
        SoftmaxTripletLoss(matcher, background="ignore")
    with refused(ValueError, ("mem_batch_size", "got 0"), matcher):
        ClassMemoryLoss(matcher, N, C, H, W, mem_batch_size=0)
    with refused(ValueError, ("num_classes", "got 0"), matcher):
        ClassMemoryLoss(matcher, 0, C, H, W)


# --- numbers, sizes and matchers


OPTIONS: dict[str, Callable[[Any], MatcherLoss]] = {
    "TripletLoss margin": lambda value: TripletLoss(loss_matcher(), value),
    "SoftmaxTripletLoss margin": lambda value: SoftmaxTripletLoss(loss_matcher(**CLASSES), value),
    "SoftmaxTripletLoss triplet_weight": lambda value: SoftmaxTripletLoss(
        loss_matcher(**CLASSES), triplet_weight=value
    ),
}
NO_NUMBERS: list[tuple[Any, type[Exception], str]] = [
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
]
FIRST, *OTHERS = OPTIONS


@pytest.mark.parametrize(
    ("option", "value", "error", "restated"),
    [(FIRST, *case) for case in NO_NUMBERS] + [(option, math.nan, ValueError, "nan") for option in OTHERS],
)
def test_what_is_no_finite_number_is_refused_at_construction(
    option: str, value: Any, error: type[Exception], restated: str
) -> None:
    with pytest.raises(error, match=f"{option.split()[1]}.*{restated}"):
        OPTIONS[option](value)


@pytest.mark.parametrize(
    ("option", "value"),
    [(FIRST, value) for value in (2.0, np.float32(2), np.float64(2), np.int64(2), Fraction(2))]
    + [(option, np.float32(2)) for option in OTHERS],
)
def test_numbers_of_any_type_are_the_same(option: str, value: Any) -> None:
    feature, target, _ = loss_batch(TARGETS["mixed"])
    for actual, expected in zip(
        OPTIONS[option](value)(feature, target), OPTIONS[option](2)(feature, target), strict=True
    ):
        assert torch.equal(actual, expected)


LOSS_CLASSES: dict[str, Callable[[Any], MatcherLoss]] = {
    "MatcherLoss": MatcherLoss,
    "PairwiseMatchingLoss": PairwiseMatchingLoss,
    "TripletLoss": TripletLoss,
    "SoftmaxTripletLoss": SoftmaxTripletLoss,
    "ClassMemoryLoss": lambda matcher: ClassMemoryLoss(matcher, N, C, H, W),
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
def test_what_is_no_matcher_is_refused(make: Callable[[Any], MatcherLoss], matcher: Any, restated: str) -> None:
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
    feature, target, visible = loss_batch(TARGETS["mixed"], occluded=True)
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
    module = ClassMemoryLoss(CosineMatcher(), N, C, H, W, 4)
    feature, target, _ = loss_batch(TARGETS["mixed"], occluded=True)
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

    feature, target, _ = loss_batch(TARGETS["mixed"], occluded=True)
    with pytest.raises(ValueError, match=r"Wrong: expected scores of shape \[7, 7\], got \[7, 1\]"):
        TripletLoss(Wrong())(feature, target)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_losses_do_not_depend_on_the_default_dtype_or_device(default: torch.dtype | str) -> None:
    feature, target, _ = loss_batch(TARGETS["mixed"], occluded=True)
    feature = feature.detach().float()

    def results() -> list[Tensor]:
        matcher = CosineMatcher().float()
        memory = ClassMemoryLoss(matcher, N, C, H, W, 4)
        outputs = [*PairwiseMatchingLoss(matcher)(feature, target), *TripletLoss(matcher)(feature, target)]
        for _ in range(2):
            outputs += memory(feature, target)
        return [*outputs, memory.class_memory, memory.valid_class]

    expected = results()
    with torch_default(default):
        actual = results()
    for one, another in zip(actual, expected, strict=True):
        assert one.dtype == another.dtype == torch.float32
        assert torch.equal(one, another)


@pytest.mark.parametrize("number", [np.int64, np.uint8])
def test_class_memory_loss_takes_sizes_with_an_index(number: Any) -> None:
    sizes = (N, C, H, W, 4)
    module = ClassMemoryLoss(loss_matcher(), *(number(size) for size in sizes)).double()
    expected = ClassMemoryLoss(loss_matcher(), *sizes).double()
    feature, target, _ = loss_batch(TARGETS["mixed"], occluded=True)
    for _ in range(2):
        assert torch.equal(module(feature, target)[0], expected(feature, target)[0])
    with pytest.raises(TypeError, match="mem_batch_size: expected an int, got float"):
        ClassMemoryLoss(loss_matcher(), *sizes[:4], 4.0)  # type: ignore[arg-type]
