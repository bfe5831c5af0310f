"""Verification beside the definition, written as loops over thresholds; ROC and EER beside torchmetrics."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

from qaconv_triton.evaluation import verification_metrics


def pairs(count: int, seed: int, levels: int) -> tuple[Tensor, Tensor]:
    """Scores, of either sign and with ties, larger for the same identity; and the truth."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(count, generator=generator) < 0.4
    scores = torch.randn(count, generator=generator) + 1.5 * same
    return (scores * levels).round() / levels, same


def rates(scores: list[float], same: list[bool], threshold: float) -> tuple[int, int]:
    """False and true accepts."""
    accepted = [truth for score, truth in zip(scores, same, strict=True) if score >= threshold]
    return accepted.count(False), accepted.count(True)


def best_threshold(scores: list[float], same: list[bool]) -> float:
    """The highest with the most right answers."""
    best, most = math.inf, same.count(False)
    for threshold in sorted(set(scores), reverse=True):
        false, true = rates(scores, same, threshold)
        if true + same.count(False) - false > most:
            best, most = threshold, true + same.count(False) - false
    return best


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("count", [10, 157, 400])
def test_metrics_are_those_of_the_definition(count: int, levels: int) -> None:
    scores, same = pairs(count, count, levels)
    metrics = verification_metrics(scores, same)
    values, truth = scores.tolist(), same.tolist()
    thresholds = [math.inf, *sorted(set(values), reverse=True)]
    accepts = [rates(values, truth, threshold) for threshold in thresholds]
    positives, negatives = truth.count(True), truth.count(False)
    assert metrics.thresholds.tolist() == thresholds
    assert metrics.far.tolist() == pytest.approx([false / negatives for false, _ in accepts])
    assert metrics.tar.tolist() == pytest.approx([true / positives for _, true in accepts])
    assert metrics.threshold == best_threshold(values, truth)
    for rate, tar in metrics.tar_at_far.items():
        if negatives < round(1 / rate):
            assert math.isnan(tar)
        else:
            allowed = [true for false, true in accepts if false * round(1 / rate) <= negatives]
            assert tar == pytest.approx(max(allowed) / positives)
    assert list(metrics.tar_at_far) == [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]

    bounds = [0]
    for fold in range(10):
        bounds.append(bounds[-1] + count // 10 + (fold < count % 10))
    accuracies = []
    for start, end in itertools.pairwise(bounds):
        threshold = best_threshold(values[:start] + values[end:], truth[:start] + truth[end:])
        right = [(score >= threshold) == true for score, true in zip(values[start:end], truth[start:end], strict=True)]
        accuracies.append(sum(right) / len(right))
    assert metrics.accuracy == pytest.approx(statistics.mean(accuracies))
    assert metrics.accuracy_std == pytest.approx(statistics.stdev(accuracies))


@pytest.mark.parametrize("levels", [2, 1000])
def test_roc_is_that_of_torchmetrics(levels: int) -> None:
    scores, same = pairs(300, 1, levels)
    metrics = verification_metrics(scores, same)
    far, tar, thresholds = binary_roc(scores.sigmoid(), same.long())  # which takes scores outside [0, 1] for logits
    torch.testing.assert_close(metrics.far.float(), far)
    torch.testing.assert_close(metrics.tar.float(), tar)
    torch.testing.assert_close(metrics.thresholds[1:].sigmoid().float(), thresholds[1:])


@pytest.mark.parametrize("levels", [1, 1000])
def test_equal_error_rate_is_where_the_roc_meets_the_falling_diagonal(levels: int) -> None:
    """Found by halving, along the points of the ROC and the straight lines between them."""
    metrics = verification_metrics(*pairs(300, 2, levels))
    far, tar = metrics.far.tolist(), metrics.tar.tolist()

    def point(place: float) -> tuple[float, float]:
        before = min(int(place), len(far) - 2)
        share = place - before
        false, true = (values[before] + share * (values[before + 1] - values[before]) for values in (far, tar))
        return false, true

    low, high = 0.0, len(far) - 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(point(middle)) < 1 else (low, middle)
    assert metrics.eer == pytest.approx(point(low)[0])
    assert 0.1 < metrics.eer < 0.4


def test_by_hand() -> None:
    """Three accepted before the first error; a tie of both kinds is accepted or refused as a whole."""
    scores = torch.tensor([-1.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.5])
    same = torch.tensor([0, 1, 1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    metrics = verification_metrics(scores, same)
    assert metrics.threshold == 3.0
    assert metrics.far.tolist() == pytest.approx([0, 0, 0, 0, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert metrics.tar.tolist() == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    # between (0, 3/4) and (1/3, 1): FAR x, and 1 - TAR = 1/4 - 3/4 x, are equal at 1/7
    assert metrics.eer == pytest.approx(1 / 7)
    assert all(math.isnan(tar) for tar in metrics.tar_at_far.values())


def test_a_thousand_negatives_determine_a_thousandth() -> None:
    scores = torch.cat([torch.arange(1000.0), torch.tensor([998.5, 999.5])])
    metrics = verification_metrics(scores, torch.arange(1002) >= 1000)
    assert metrics.tar_at_far[1e-2] == 1
    assert metrics.tar_at_far[1e-3] == 1  # one false accept, at 999, and both true ones
    assert math.isnan(metrics.tar_at_far[1e-4])
    fewer = verification_metrics(scores[1:], torch.arange(1, 1002) >= 1000)
    assert math.isnan(fewer.tar_at_far[1e-3])


def test_what_pairs_do_not_determine_is_nan() -> None:
    for same in (torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)):
        metrics = verification_metrics(torch.arange(12.0), same)
        assert math.isnan(metrics.eer)
        assert (metrics.far if same.all() else metrics.tar).isnan().all()
        assert metrics.accuracy == pytest.approx(0.9 if same.all() else 1)  # one fold lies below all others
    few = verification_metrics(torch.arange(9.0), torch.arange(9) > 4)
    assert few.eer == 0
    assert math.isnan(few.accuracy)
    assert math.isnan(few.accuracy_std)
    perfect = verification_metrics(torch.arange(400.0).half(), torch.arange(400) >= 200)
    assert perfect.eer == 0
    assert perfect.tar_at_far[1e-2] == 1


def test_pairs_may_be_lists_and_arrays() -> None:
    scores, same = pairs(50, 3, 1000)
    scores = scores.double() + 1e-12 * torch.arange(50)  # which fp32 cannot tell apart
    expected = verification_metrics(scores, same)
    for given in ((scores.tolist(), same.tolist()), (scores.numpy(), same.numpy()), (scores, same.numpy().tolist())):
        metrics = verification_metrics(*given)
        assert torch.equal(metrics.thresholds, expected.thresholds)
        assert metrics[3:] == expected[3:]
    for integers in ([3, 2, 1], np.array([3, 2, 1]), torch.tensor([3, 2, 1])):
        assert verification_metrics(integers, [True, False, True]).tar.tolist() == [0, 0.5, 0.5, 1]


WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (["a"], torch.tensor([True]), TypeError, r"scores: expected a tensor, an array or a list \[B\], got list"),
    ([1.0], None, TypeError, r"same: expected a tensor, an array or a list \[B\], got NoneType"),
    ([1.0], [1], TypeError, r"same: expected torch\.bool, got torch\.int64"),
    (torch.ones(2), torch.ones(2), TypeError, r"same: expected torch\.bool, got torch\.float32"),
    ([True], [True], TypeError, r"scores: expected real numbers, got torch\.bool"),
    (torch.ones(2).cfloat(), torch.ones(2).bool(), TypeError, r"scores: expected real numbers, got torch\.complex64"),
    (torch.ones(2), torch.ones(3).bool(), ValueError, r"got \[2\] and \[3\]"),
    (torch.ones(2, 1), torch.ones(2, 1).bool(), ValueError, r"got \[2, 1\] and \[2, 1\]"),
    (torch.ones(0), torch.ones(0).bool(), ValueError, r"B >= 1, got \[0\]"),
    (torch.tensor([1.0, torch.nan]), torch.ones(2).bool(), ValueError, "scores: NaN or infinite in 1 of 2"),
    (torch.tensor([torch.inf, -torch.inf, 1.0]), torch.ones(3).bool(), ValueError, "scores: NaN or infinite in 2 of 3"),
]


@pytest.mark.parametrize(("scores", "same", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input_is_refused(scores: Any, same: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verification_metrics(scores, same)
