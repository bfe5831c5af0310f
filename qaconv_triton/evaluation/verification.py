"""Metrics of verification: whether two pictures show one identity, by a threshold on the score of the pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .sources import CPU, as_tensor

if TYPE_CHECKING:
    import numpy as np

FALSE_ACCEPT_RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FOLDS = 10


class VerificationMetrics(NamedTuple):
    """How well a threshold tells pairs of one identity from pairs of two. A pair is accepted at a score >= threshold.

    Attributes:
        far: false accept rate fp64 `[T]`, ascending from 0 to 1: the accepted share of pairs of two identities.
        tar: true accept rate fp64 `[T]`, likewise of pairs of one identity. `tar` over `far` is the ROC.
        thresholds: fp64 `[T]`, descending: infinity, then every score once.
        eer: equal error rate, where `far` equals `1 - tar` on the straight line between two points of the ROC.
        tar_at_far: the largest `tar` whose `far` is at most 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, by that bound; NaN where one
            of the pairs of two identities is more than that share of them.
        accuracy: mean of the accuracy on ten folds, each at the best threshold of the nine others, as on LFW; the
            highest of equally good ones.
        accuracy_std: their standard deviation, with 9 degrees of freedom.
        threshold: the highest threshold with the best accuracy on all pairs.

    Examples:
        >>> point = torch.tensor([0.0, 1.0])
        >>> VerificationMetrics(point, point, -point, 0.5, {1e-2: 0.0}, 0.5, 0.1, 0.3).tar_at_far[1e-2]
        0.0
    """

    far: Tensor
    tar: Tensor
    thresholds: Tensor
    eer: float
    tar_at_far: dict[float, float]
    accuracy: float
    accuracy_std: float
    threshold: float


def verification_metrics(
    scores: Tensor | Sequence[float] | np.ndarray[Any, Any], same: Tensor | Sequence[bool] | np.ndarray[Any, Any]
) -> VerificationMetrics:
    """Compute ROC, equal error rate, TAR at fixed FAR, and ten-fold accuracy of scored pairs.

    Args:
        scores: real numbers `[B]`, larger for the same identity, as `matcher.match_pairs` returns them: a tensor, an
            array or a list.
        same: bool `[B]`, whether the pair shows one identity, likewise. The ten folds of the accuracy are tenths of the
            pairs in the order given, as the list of LFW has them: each should have pairs of both kinds, so shuffle
            pairs that are ordered by kind.

    Returns:
        `VerificationMetrics`, on the CPU. Equal scores are accepted together. What the pairs do not determine is NaN:
        `tar` without pairs of one identity, `far` without pairs of two, both and `eer` then; the accuracy of fewer than
        ten pairs.

    Raises:
        TypeError: other dtypes.
        ValueError: other shapes, no pairs, scores that are not finite.

    Examples:
        >>> from qaconv_triton.evaluation import verification_metrics
        >>> metrics = verification_metrics(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False]))
        >>> metrics.eer, metrics.tar.tolist(), metrics.far.tolist()
        (0.5, [0.0, 0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5, 1.0])
    """
    expected = "a tensor, an array or a list [B]"
    scores, same = as_tensor(scores, "scores", expected), as_tensor(same, "same", expected)
    if scores.is_complex() or scores.dtype == torch.bool:
        raise TypeError(f"scores: expected real numbers, got {scores.dtype}")
    if same.dtype != torch.bool:
        raise TypeError(f"same: expected torch.bool, got {same.dtype}")
    if scores.dim() != 1 or scores.shape != same.shape or len(scores) == 0:
        raise ValueError(f"expected scores and same [B], B >= 1, got {list(scores.shape)} and {list(same.shape)}")
    if not (is_finite := scores.isfinite()).all():  # an infinite score is no threshold: infinity refuses all pairs
        raise ValueError(f"scores: NaN or infinite in {int((~is_finite).sum())} of {len(scores)}")
    values, order = scores.detach().cpu().double().sort(descending=True, stable=True)
    is_same = same.cpu()[order]
    is_last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool, device=CPU)])  # of equal scores

    def accepted(counted: Tensor) -> Tensor:
        """How many of the pairs `counted` (bool, sorted) every threshold accepts, int64 `[T]`."""
        return torch.cat([torch.zeros(1, dtype=torch.int64, device=CPU), counted.cumsum(0)[is_last]])

    thresholds = torch.cat([values.new_tensor([torch.inf]), values[is_last]])
    true_accepts, false_accepts = accepted(is_same), accepted(~is_same)
    tar, far = (count.double() / count[-1] for count in (true_accepts, false_accepts))  # 0 / 0 is NaN
    threshold = thresholds[(true_accepts - false_accepts).argmax()].item()  # the first, so the highest, of the best
    accuracies = []
    if len(scores) >= FOLDS:
        fold = torch.empty(len(scores), dtype=torch.int64, device=CPU)
        for number, rows in enumerate(torch.arange(len(scores), device=CPU).tensor_split(FOLDS)):
            fold[rows] = number
        fold = fold[order]
        for number in range(FOLDS):
            held_out = fold == number
            gain = accepted(is_same & ~held_out) - accepted(~is_same & ~held_out)
            right = (values[held_out] >= thresholds[gain.argmax()]) == is_same[held_out]
            accuracies.append(right.double().mean())
    accuracy = torch.stack(accuracies) if accuracies else values.new_full((2,), torch.nan)
    at_far = {rate: _tar_at(rate, false_accepts, tar) for rate in FALSE_ACCEPT_RATES}
    error_rate = _equal_error_rate(far, tar)
    return VerificationMetrics(
        far, tar, thresholds, error_rate, at_far, accuracy.mean().item(), accuracy.std().item(), threshold
    )


def _tar_at(rate: float, false_accepts: Tensor, tar: Tensor) -> float:
    """The largest TAR at a FAR of at most `rate`."""
    allowed = int(rate * int(false_accepts[-1]) + 1e-9)
    return tar[false_accepts <= allowed][-1].item() if allowed else torch.nan


def _equal_error_rate(far: Tensor, tar: Tensor) -> float:
    difference = far + tar - 1  # ascending from -1 to 1
    if difference.isnan().any():
        return torch.nan
    after = int((difference >= 0).to(torch.uint8).argmax())
    before = after - 1
    share = -difference[before] / (difference[after] - difference[before])
    return torch.lerp(far[before], far[after], share).item()
