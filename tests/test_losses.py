"""The losses over pairs and over classes against loops and dense formulations of the same: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from eager import with_occlusion
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import N, gradient_of
from loss_cases import LOSSES, TARGETS, assert_same_state, loss_batch, loss_gradients, loss_matcher
from pairwise import pairwise
from tolerances import assert_all_close, assert_close
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import ClassScores, losses
from qaconv_triton.losses import (
    PairwiseMatchingLoss,
    SoftmaxTripletLoss,
    TripletLoss,
    batch_hard_hinge,
    hardest_pairs,
    neighbor_cross_entropy,
    predicted_class,
)

every_target = pytest.mark.parametrize("labels", TARGETS.values(), ids=TARGETS.keys())


def loop_of_hardest(score: Tensor, labels: list[int]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Hardest positive and negative of every sample, None where there is none."""
    hardest: list[tuple[Tensor | None, Tensor | None]] = []
    for i, label in enumerate(labels):
        positives = [score[i, j] for j, other in enumerate(labels) if other == label and j != i]
        negatives = [score[i, j] for j, other in enumerate(labels) if other != label]
        hardest.append(
            (
                torch.stack(positives).min() if positives else None,
                torch.stack(negatives).max() if negatives else None,
            )
        )
    return hardest


def loop_of_triplets(score: Tensor, labels: list[int], margin: float) -> tuple[Tensor, Tensor]:
    loss, accuracy = [], []
    for positive, negative in loop_of_hardest(score, labels):
        if positive is None or negative is None:
            loss.append(score.sum() * 0)
            accuracy.append(1.0)
        else:
            loss.append(torch.clamp(margin - positive + negative, min=0))
            accuracy.append(float(positive >= negative))
    return torch.stack(loss), torch.tensor(accuracy, dtype=score.dtype)


@with_occlusion
@every_target
def test_pairwise_matching_loss_is_the_loop_over_pairs(labels: list[int], occluded: bool) -> None:
    module, dense = PairwiseMatchingLoss(loss_matcher()), loss_matcher()
    feature, target, visible = loss_batch(labels, occluded)
    loss, accuracy = module(feature, target, visible)
    actual = loss_gradients(loss, feature, module)

    score = dense(feature, feature, prob_occ=visible, gal_occ=visible)
    rows = []
    for i, label in enumerate(labels):
        probability = score[i].sigmoid()
        terms = [-torch.log(probability[j] if other == label else 1 - probability[j]) for j, other in enumerate(labels)]
        rows.append(torch.stack(terms).sum())
    expected_loss = torch.stack(rows)
    expected_accuracy = torch.tensor(
        [float(p is None or n is None or bool(p > n)) for p, n in loop_of_hardest(score, labels)],
        dtype=score.dtype,
    )
    assert_close(loss, expected_loss, torch.float64)
    assert torch.equal(accuracy, expected_accuracy)
    assert not accuracy.requires_grad
    assert_all_close(actual, loss_gradients(expected_loss, feature, dense), torch.float64)


@pytest.mark.parametrize(("batch", "margin", "occluded"), pairwise(list(TARGETS), [0.5, 16], [False, True]))
def test_triplet_loss_is_the_loop_over_samples(batch: str, margin: float, occluded: bool) -> None:
    labels = TARGETS[batch]
    module, dense = TripletLoss(loss_matcher(), margin), loss_matcher()
    feature, target, visible = loss_batch(labels, occluded)
    loss, accuracy = module(feature, target, visible)
    actual = loss_gradients(loss, feature, module)

    score = dense(feature, feature, prob_occ=visible, gal_occ=visible)
    expected_loss, expected_accuracy = loop_of_triplets(score, labels, margin)
    assert_close(loss, expected_loss, torch.float64)
    assert torch.equal(accuracy, expected_accuracy)
    assert not accuracy.requires_grad
    assert_all_close(actual, loss_gradients(expected_loss, feature, dense), torch.float64)


@pytest.mark.parametrize("labels", [TARGETS["singletons"], TARGETS["one class"], [4]])
def test_triplet_loss_without_triplets_is_exactly_zero_and_differentiable(labels: list[int]) -> None:
    feature, target, _ = loss_batch(labels)
    # A single pair has no batch statistics.
    loss, accuracy = TripletLoss(loss_matcher()).train(len(labels) > 1)(feature, target)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(accuracy, torch.ones_like(accuracy))
    loss.sum().backward()
    assert torch.equal(gradient_of(feature), torch.zeros_like(feature))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_triplet_are_zero_whatever_their_scores(value: float) -> None:
    # Row 0 has no positive; its scores, and all with it, are no numbers.
    score = torch.randn(4, 4, dtype=torch.float64)
    score[0] = value
    score.requires_grad_()
    loss, accuracy = batch_hard_hinge(score, torch.tensor([5, 1, 1, 1]), margin=9.0)
    assert loss[0] == 0
    assert accuracy[0] == 1
    assert loss[1:].isfinite().all()
    assert (loss[1:] > 1).all()
    loss.sum().backward()
    assert gradient_of(score)[0].eq(0).all()
    assert gradient_of(score)[1:].isfinite().all()
    assert (gradient_of(score)[1:] != 0).sum() == 6

    one_class = torch.full((3, 3), value, dtype=torch.float64, requires_grad=True)
    loss, accuracy = batch_hard_hinge(one_class, torch.tensor([2, 2, 2]), margin=9.0)
    assert loss.tolist() == [0, 0, 0]
    assert accuracy.tolist() == [1, 1, 1]
    loss.sum().backward()
    assert gradient_of(one_class).eq(0).all()


def test_nan_stays_where_there_is_a_triplet() -> None:
    score = torch.zeros(3, 3, dtype=torch.float64)
    score[0, 1] = math.nan
    loss, accuracy = batch_hard_hinge(score, torch.tensor([0, 0, 1]), margin=1.0)
    assert loss.isnan().tolist() == [True, False, False]
    assert accuracy.tolist() == [0, 1, 1]


@pytest.mark.parametrize("labels", [TARGETS["singletons"], TARGETS["one class"]], ids=["singletons", "one class"])
@pytest.mark.parametrize("name", ["pairwise", "triplet", "softmax"])
def test_accuracy_without_a_triplet_is_one_even_of_nan(name: str, labels: list[int]) -> None:
    feature, target, _ = loss_batch(labels)
    outputs = LOSSES[name]().eval()(feature.detach() * math.nan, target)
    assert outputs[-1].tolist() == [1] * len(labels)
    if name != "pairwise":
        assert outputs[{"triplet": 0, "softmax": 1}[name]].tolist() == [0] * len(labels)


def test_tied_scores_give_the_gradient_to_one_pair_each() -> None:
    score = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    loss, accuracy = batch_hard_hinge(score, torch.tensor([0, 0, 0, 1]), margin=1.0)
    loss.sum().backward()
    assert loss.tolist() == [1, 1, 1, 0]
    assert accuracy.tolist() == [1, 1, 1, 1]
    assert gradient_of(score).tolist() == [[0, -1, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, 1], [0, 0, 0, 0]]


def test_a_tie_of_positive_and_negative_counts_as_right_for_triplets_alone() -> None:
    feature, _, _ = loss_batch([0])
    target = torch.tensor([0, 0, 1])
    matcher = loss_matcher().eval()
    assert TripletLoss(matcher)(feature.expand(3, -1, -1, -1), target)[1].tolist() == [1, 1, 1]
    assert PairwiseMatchingLoss(matcher)(feature.expand(3, -1, -1, -1), target)[1].tolist() == [0, 0, 1]


def test_hardest_pairs_by_hand() -> None:
    score = torch.tensor([[9.0, 2.0, 5.0], [3.0, 9.0, 1.0], [5.0, 1.0, 9.0]])
    positive, negative = hardest_pairs(score, torch.tensor([0, 0, 1]))
    assert positive.tolist() == [2, 3, math.inf]
    assert negative.tolist() == [5, 1, 5]


CLASS_PATHS = [
    pytest.param({"k_nearest": 3}, "zero", id="zero"),
    pytest.param({"k_nearest": 3, "include_self": True}, "zero", id="zero, own class"),
    pytest.param({"k_nearest": N - 1}, "zero", id="zero, all but own class"),
    pytest.param({"k_nearest": N - 1, "include_self": True}, "zero", id="zero, all classes"),
    pytest.param({"k_nearest": 3, "include_self": True}, "ignore", id="ignore"),
    pytest.param({"k_nearest": N - 1, "include_self": True}, "ignore", id="ignore, all classes"),
]


@with_occlusion
@pytest.mark.parametrize(("options", "background"), CLASS_PATHS)
@pytest.mark.parametrize("labels", [TARGETS["mixed"], TARGETS["singletons"]], ids=["mixed", "singletons"])
def test_softmax_triplet_loss_is_the_dense_one(
    labels: list[int], options: dict[str, Any], background: losses.Background, occluded: bool
) -> None:
    matcher, dense = (loss_matcher(num_classes=N, **options) for _ in range(2))
    module = SoftmaxTripletLoss(matcher, margin=0.7, triplet_weight=0.4, background=background)
    feature, target, visible = loss_batch(labels, occluded)
    outputs = module(feature, target, visible)
    cls_loss, triplet_loss, loss, cls_accuracy, triplet_accuracy = outputs
    assert all(output.shape == target.shape for output in outputs)
    actual = loss_gradients(loss, feature, module)

    fill = 0.0 if background == "zero" else -math.inf
    logits = dense.class_scores(feature, target, prob_occ=visible).to_dense(fill)
    assert logits.shape == (len(labels), N)
    expected_cls_loss = F.cross_entropy(logits, target, reduction="none")
    score = dense(feature, feature, prob_occ=visible, gal_occ=visible)
    expected_triplet_loss, expected_triplet_accuracy = loop_of_triplets(score, labels, 0.7)
    expected_loss = expected_cls_loss + 0.4 * expected_triplet_loss.sum() / len(labels)

    assert_close(cls_loss, expected_cls_loss, torch.float64)
    assert_close(triplet_loss, expected_triplet_loss, torch.float64)
    assert_close(loss, expected_loss, torch.float64)
    assert torch.equal(cls_accuracy, (logits.argmax(1) == target).double())
    assert torch.equal(triplet_accuracy, expected_triplet_accuracy)
    assert not cls_accuracy.requires_grad
    assert not triplet_accuracy.requires_grad
    assert_all_close(actual, loss_gradients(expected_loss, feature, dense), torch.float64)


@st.composite
def compact_scores(draw: st.DrawFn) -> tuple[ClassScores, Tensor]:
    """Scores full of ties, also with the zero of the classes that were not scored."""
    num_classes = draw(st.integers(1, 6))
    num_scored = draw(st.integers(1, num_classes))
    batch = draw(st.integers(0, 4))
    value = st.sampled_from([-1.5, -0.0, 0.0, 0.5, math.nan])
    classes = [draw(st.permutations(range(num_classes)))[:num_scored] for _ in range(batch)]
    values = [[draw(value) for _ in range(num_scored)] for _ in range(batch)]
    target = [draw(st.integers(0, num_classes - 1)) for _ in range(batch)]
    return (
        ClassScores(
            torch.tensor(values, dtype=torch.float64).reshape(batch, num_scored),
            torch.tensor(classes, dtype=torch.int64).reshape(batch, num_scored),
            num_classes,
        ),
        torch.tensor(target, dtype=torch.int64),
    )


@given(compact_scores())
@settings(deadline=None, max_examples=100)
def test_predicted_class_is_the_dense_argmax(case: tuple[ClassScores, Tensor]) -> None:
    scores, _ = case
    batch, scored = scores.values.shape
    for background, fill in ((scores.num_classes - scored, 0.0), (0, -math.inf)):
        dense = torch.full((batch, scores.num_classes), fill, dtype=torch.float64)
        dense.scatter_(1, scores.classes, scores.values)
        assert torch.equal(predicted_class(scores, background), dense.argmax(dim=1))


@given(compact_scores())
@settings(deadline=None, max_examples=100)
def test_neighbor_cross_entropy_is_the_dense_one(case: tuple[ClassScores, Tensor]) -> None:
    scores, target = case
    batch, scored = scores.values.shape
    dense = torch.zeros(batch, scores.num_classes, dtype=torch.float64)
    dense.scatter_(1, scores.classes, scores.values)
    loss = neighbor_cross_entropy(scores, target, scores.num_classes - scored)
    assert_close(loss, F.cross_entropy(dense, target, reduction="none"), torch.float64)


@pytest.mark.parametrize("unscored", [0, 4])
@pytest.mark.parametrize("invalid", [-1, 7, 10**12])
def test_an_invalid_label_gives_nan_in_its_row_only(invalid: int, unscored: int) -> None:
    # What the matcher returns on a GPU, where labels are not read back.
    values = torch.tensor([[math.nan] * 3, [1.0, 2.0, 3.0]], dtype=torch.float64)
    scores = ClassScores(values, torch.tensor([[-1] * 3, [4, 2, 0]]), 3 + unscored)
    target = torch.tensor([invalid, 2])
    loss = neighbor_cross_entropy(scores, target, unscored)
    assert loss[0].isnan()
    assert loss[1].item() == pytest.approx(math.log(unscored + sum(map(math.exp, (1, 2, 3)))) - 2)
    assert (predicted_class(scores, unscored) == target).tolist() == [False, False]


def test_softmax_triplet_loss_runs_the_class_path_before_the_pairs() -> None:
    matcher, forward_order, reverse_order = (loss_matcher(num_classes=N, k_nearest=3) for _ in range(3))
    feature, target, _ = loss_batch(TARGETS["pairs"])
    SoftmaxTripletLoss(matcher)(feature, target)
    forward_order.class_scores(feature, target)
    forward_order(feature, "same")
    reverse_order(feature, "same")
    reverse_order.class_scores(feature, target)
    assert_same_state(forward_order.state_dict(), matcher)
    with pytest.raises(AssertionError):
        assert_same_state(reverse_order.state_dict(), matcher)


def test_softmax_triplet_loss_never_builds_dense_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("dense scores were built")

    monkeypatch.setattr(ClassScores, "to_dense", refuse)
    feature, target, _ = loss_batch(TARGETS["pairs"])
    SoftmaxTripletLoss(loss_matcher(num_classes=N, k_nearest=3))(feature, target)
