"""Losses over the scores of a matcher, `QAConv` or another.

- `PairwiseMatchingLoss`, `TripletLoss`: all pairs of a batch, as in QAConv-GS: Liao & Shao, "Graph Sampling
  Based Deep Metric Learning for Generalizable Person Re-Identification", arXiv:2104.01546.
- `SoftmaxTripletLoss`: cross entropy over a sample's neighbour classes, plus the triplet loss.

`ClassMemoryLoss` is in class_memory.py. Letters: B samples in a batch, N classes, K' scored classes of a sample (its
K neighbours, and itself with `include_self`), C channels, H, W height and width of a feature map.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint
from .distributed import Agreement
from .recompute import StatisticsGuard
from .validation import check_labels, check_maps, check_number

if TYPE_CHECKING:
    from .matcher import QAConv
    from .scores import ClassScores

Background = Literal["zero", "ignore"]


def hardest_pairs(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest score of every sample with another one of its class, and the highest with another class.

    Args:
        score: `[B, B]`.
        target: int64 `[B]`.

    Returns:
        hardest positives `[B]`, +inf for a sample without any; hardest negatives `[B]`, -inf without any. No
        gradient comes from an infinite one.

    Examples:
        >>> score = torch.tensor([[9.0, 2.0, 5.0], [2.0, 9.0, 1.0], [5.0, 1.0, 9.0]])
        >>> hardest_pairs(score, torch.tensor([0, 0, 1]))
        (tensor([2., 2., inf]), tensor([5., 1., 5.]))
    """
    if not len(target):  # a minimum needs an element
        return score.sum(dim=1), score.sum(dim=1)
    own = target.unsqueeze(1)
    is_same, is_no_positive = own == target, own != target
    is_no_positive.diagonal().fill_(True)  # torch 2.8 does not compile `fill_diagonal_` for batches of any size
    positives, negatives = score.masked_fill(is_no_positive, math.inf), score.masked_fill(is_same, -math.inf)
    return positives.min(dim=1).values, negatives.max(dim=1).values


def has_positive_and_negative(target: Tensor) -> Tensor:
    """Whether the batch holds another sample of a sample's class, and one of another class.

    Args:
        target: int64 `[B]`.

    Returns:
        bool `[B]`.

    Examples:
        >>> has_positive_and_negative(torch.tensor([0, 0, 1]))
        tensor([ True,  True, False])
    """
    count = (target[:, None] == target).sum(dim=1)
    return (count > 1) & (count < len(target))


def batch_hard_hinge(score: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """`relu(margin - (hardest positive - hardest negative))`, and whether the positive is not the lower one.

    Args:
        score: `[B, B]`.
        target: int64 `[B]`.
        margin: the distance wanted between the two.

    Returns:
        loss `[B]`, exactly 0 for a sample without a positive or without a negative, even if its scores are NaN;
        accuracy `[B]`, 0 or 1, without gradient, 1 for such a sample.

    Examples:
        >>> score = torch.tensor([[9.0, 2.0, 5.0], [2.0, 9.0, 1.0], [5.0, 1.0, 9.0]])
        >>> batch_hard_hinge(score, torch.tensor([0, 0, 1]), margin=2.0)
        (tensor([5., 1., 0.]), tensor([0., 1., 1.]))
    """
    positive, negative = hardest_pairs(score, target)
    # Where there is no triplet a score may be NaN or infinite, which no arithmetic would turn into 0.
    gap = (positive - negative).masked_fill((positive == math.inf) | (negative == -math.inf), math.inf)
    return torch.relu(margin - gap), (gap >= 0).to(score.dtype)


def neighbor_cross_entropy(scores: ClassScores, target: Tensor, unscored: int) -> Tensor:
    """Cross entropy of `target` over the scored classes and `unscored` more, whose logits are 0.

    Args:
        scores: values and classes `[B, K']`.
        target: int64 `[B]`; where it is not among the scored classes, its logit is 0.
        unscored: how many classes of logit 0 there are.

    Returns:
        loss `[B]`; NaN where the values are.
    """
    is_scored, column = (scores.classes == target.unsqueeze(1)).max(dim=1)
    logits = scores.values
    if unscored:  # two columns more: one for a target that was not scored, the last for all others
        shape, others = (len(logits), 1), math.log(unscored - 1) if unscored > 1 else -math.inf
        column = torch.where(is_scored, column, logits.shape[1])
        logits = torch.cat([logits, logits.new_zeros(shape), logits.new_full(shape, others)], dim=1)
    return F.cross_entropy(logits, column, reduction="none")


def predicted_class(scores: ClassScores, unscored: int) -> Tensor:
    """The class of the largest logit, the lowest id among equals: the argmax of the dense `[B, N]` scores.

    Args:
        scores: values and classes `[B, K']`, the classes of a row distinct.
        unscored: how many classes of logit 0 there are: `N - K'`, or 0 to leave them out.

    Returns:
        int64 `[B]`.
    """
    classes, order = scores.classes.sort(dim=1)
    best, position = scores.values.detach().gather(1, order).max(dim=1)  # the first among equals, NaN above all
    best_class = classes.gather(1, position.unsqueeze(1)).squeeze(1).clamp_(min=0)
    if not unscored:
        return best_class
    # Distinct ids that are sorted agree with their positions up to the first one that is missing.
    first_unscored = (classes == torch.arange(classes.shape[1], device=classes.device)).sum(dim=1)
    is_unscored = torch.where(first_unscored < best_class, best <= 0, best < 0)
    return torch.where(is_unscored, first_unscored, best_class)


class MatcherLoss(checkpoint.CheckedModule):
    """What the losses share: the matcher, its scores of all pairs of a batch, and its resets.

    Args:
        matcher: the module whose scores the loss is over, `QAConv` or another with `forward(prob_fea, gal_fea)`;
            its parameters are the loss's.

    Raises:
        TypeError: a matcher that is no module, or cannot be called with two feature maps.

    Examples:
        >>> MatcherLoss(QAConv(num_features=8, height=4, width=4)).reset_running_stats()
    """

    def __init__(self, matcher: nn.Module) -> None:
        super().__init__()
        _check_matcher(matcher)
        self.matcher: Any = matcher

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the parameters as an optimizer's groups: those that are whole, and those sharded over a mesh, if any.

        An optimizer with `foreach` or `fused` takes either kind, but not both in one group.

        Returns:
            One or two dicts with `"params"`; add options to each as you like.

        Examples:
            >>> criterion = SoftmaxTripletLoss(QAConv(8, 4, 4, num_classes=10, k_nearest=3))
            >>> optimizer = torch.optim.AdamW(criterion.param_groups(), lr=1e-3, foreach=True)
        """
        whole: list[nn.Parameter] = []
        sharded: list[nn.Parameter] = []
        for parameter in self.parameters():
            (sharded if hasattr(parameter, "device_mesh") else whole).append(parameter)
        return [{"params": parameters} for parameters in (whole, sharded) if parameters]

    def reset_running_stats(self) -> None:
        """Reset the matcher's running statistics."""
        self.matcher.reset_running_stats()

    def reset_parameters(self) -> None:
        """Reset the matcher's parameters."""
        self.matcher.reset_parameters()

    def _checked_target(self, feature: Tensor, target: Tensor) -> Tensor:
        """`target` as int64 after checks; ranks that take statistics together fail together."""
        find_agreement = getattr(self.matcher, "_agreement_on_pairs", None)  # of a QAConv
        agreement: Agreement | None = None if find_agreement is None else find_agreement()
        with agreement or nullcontext():
            check_maps(feature, "feature")
            return check_labels(target, len(feature), None, feature.device)

    def _scores(self, feature: Tensor, gallery: Tensor, occlusion_maps: Tensor | None = None) -> Tensor:
        """The matcher's scores `[B, G]`; a matcher that knows no visibility can do without one that is not given."""
        if occlusion_maps is None:
            score = self.matcher(feature, gallery)
        else:
            score = self.matcher(feature, gallery, prob_occ=occlusion_maps, gal_occ=occlusion_maps)
        expected = [len(feature), len(gallery)]
        if not isinstance(score, Tensor) or list(score.shape) != expected:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"{type(self.matcher).__name__}: expected scores of shape {expected}, got {got}")
        return score


def _check_matcher(matcher: object) -> None:
    wanted = "expected a module with forward(prob_fea, gal_fea), such as QAConv"
    if not isinstance(matcher, nn.Module):
        raise TypeError(f"matcher: {wanted}, got {type(matcher).__name__} {reprlib.repr(matcher)}")
    try:
        inspect.signature(matcher.forward).bind(None, None)
    except TypeError as error:
        raise TypeError(f"matcher: {wanted}, got {type(matcher).__name__} ({error})") from error
    except ValueError:
        pass  # compiled code has no signature


class PairwiseMatchingLoss(MatcherLoss):
    """Binary cross entropy over all pairs of a batch: do the two show the same class?

    Self pairs count, as published.

    Args:
        matcher: the module that scores the pairs, `QAConv` or another with `forward(prob_fea, gal_fea)`.

    Examples:
        >>> loss_function = PairwiseMatchingLoss(QAConv(num_features=8, height=4, width=4))
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> loss, accuracy = loss_function(feature, torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> loss.mean().backward()
        >>> loss.shape, accuracy.shape
        (torch.Size([6]), torch.Size([6]))

    Reference: Liao & Shao, arXiv:2104.01546.
    """

    def forward(self, feature: Tensor, target: Tensor, occlusion_maps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of every sample.

        Args:
            feature: feature maps `[B, C, H, W]`, floating point.
            target: class ids `[B]`, integers.
            occlusion_maps: visibility `[B, 1, H, W]`, 1 visible to 0 occluded; all visible where None.

        Returns:
            loss `[B]`, summed over the pairs of the sample; accuracy `[B]`, 1 where the hardest positive (the
            sample itself excluded) scores above the hardest negative, also where either is missing.

        Raises:
            TypeError: `feature` or `target` of another dtype.
            ValueError: another shape or device.
        """
        target = self._checked_target(feature, target)
        with StatisticsGuard(self.matcher):
            score = self._scores(feature, feature, occlusion_maps)
            same = (target[:, None] == target).to(score.dtype)
            loss = F.binary_cross_entropy_with_logits(score, same, reduction="none").sum(dim=1)
            positive, negative = hardest_pairs(score.detach(), target)
            is_right = (positive > negative) | ~has_positive_and_negative(target)
            return loss, is_right.to(score.dtype)


class TripletLoss(MatcherLoss):
    """Batch-hard triplet hinge: the hardest positive should score `margin` above the hardest negative.

    Args:
        matcher: the module that scores the pairs, `QAConv` or another with `forward(prob_fea, gal_fea)`.
        margin: the distance wanted between the two, a finite number of 0 or above.

    Raises:
        TypeError: a matcher that is none, a margin that is no number.
        ValueError: a margin that is negative, infinite or NaN.

    Examples:
        >>> loss_function = TripletLoss(QAConv(num_features=8, height=4, width=4), margin=16)
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> loss, accuracy = loss_function(feature, torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> loss.mean().backward()
        >>> loss.shape, accuracy.shape
        (torch.Size([6]), torch.Size([6]))

    Reference: Liao & Shao, arXiv:2104.01546; batch-hard: Hermans et al., arXiv:1703.07737.
    """

    def __init__(self, matcher: nn.Module, margin: float = 16) -> None:
        super().__init__(matcher)
        self.margin = check_number(margin, "margin", why="the distance wanted between scores")

    def forward(self, feature: Tensor, target: Tensor, occlusion_maps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of every sample.

        Args:
            feature: feature maps `[B, C, H, W]`, floating point.
            target: class ids `[B]`, integers.
            occlusion_maps: visibility `[B, 1, H, W]`, 1 visible to 0 occluded; all visible where None.

        Returns:
            loss `[B]`, 0 for a sample without a positive or without a negative; accuracy `[B]`, 1 where the
            hardest positive (the sample itself excluded) scores no lower than the hardest negative.

        Raises:
            TypeError: `feature` or `target` of another dtype.
            ValueError: another shape or device.
        """
        target = self._checked_target(feature, target)
        with StatisticsGuard(self.matcher):
            return batch_hard_hinge(self._scores(feature, feature, occlusion_maps), target, self.margin)


class SoftmaxTripletLoss(MatcherLoss):
    """Cross entropy over the class-path scores, plus the batch-hard triplet hinge over the batch.

    The cross entropy works on the K' scores per sample and never builds the dense `[B, N]`.

    Args:
        matcher: a `QAConv` with a class table (`num_classes`).
        margin: of the triplet loss, a finite number of 0 or above.
        triplet_weight: the mean triplet loss's weight in the sum, likewise.
        background: the logits of the classes that were not scored: `"zero"`, or `"ignore"` to leave them out
            of the softmax, which needs a matcher with `include_self=True`.

    Raises:
        TypeError: a matcher without `class_scores`; a margin or weight that is no number.
        ValueError: a margin or weight that is negative, infinite or NaN; another `background`; `"ignore"` without
            `include_self`.

    Examples:
        >>> matcher = QAConv(8, 4, 4, num_classes=10, k_nearest=3, include_self=True)
        >>> loss_function = SoftmaxTripletLoss(matcher, background="ignore")
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> target = torch.tensor([0, 0, 7, 7, 9, 9])
        >>> cls_loss, triplet_loss, loss, cls_accuracy, triplet_accuracy = loss_function(feature, target)
        >>> loss.mean().backward()
        >>> loss.shape
        torch.Size([6])

    Reference: Liao & Shao, arXiv:2104.01546.
    """

    def __init__(
        self,
        matcher: QAConv,
        margin: float = 1.0,
        triplet_weight: float = 1.0,
        *,
        background: Background = "zero",
    ) -> None:
        super().__init__(matcher)
        if not callable(getattr(matcher, "class_scores", None)):
            raise TypeError(f"matcher: expected one with class_scores, as QAConv has, got {type(matcher).__name__}")
        if background not in get_args(Background):
            raise ValueError(f"background: expected 'zero' or 'ignore', got {background!r}")
        if background == "ignore" and not matcher.include_self:
            raise ValueError(
                "background='ignore' needs a matcher with include_self=True, got include_self=False: "
                "the target itself would have no score"
            )
        self.margin = check_number(margin, "margin", why="the distance wanted between scores")
        self.triplet_weight = check_number(triplet_weight, "triplet_weight", why="the weight of the triplet loss")
        self.background = background

    def forward(
        self, feature: Tensor, target: Tensor, occlusion_maps: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return both losses, their sum and both accuracies, of every sample.

        Args:
            feature: feature maps `[B, C, H, W]`, floating point.
            target: class ids `[B]`, integers in `[0, N)`.
            occlusion_maps: visibility `[B, 1, H, W]`, 1 visible to 0 occluded; all visible where None.

        Returns:
            cls_loss, triplet_loss, `loss = cls_loss + triplet_weight * triplet_loss.mean()`, cls_acc (1 where
            the target has the largest logit) and triplet_acc, each `[B]`. An invalid target on CUDA, where it
            is not read back, gives a NaN loss.

        Raises:
            TypeError: `feature` or `target` of another dtype.
            ValueError: another shape or device.
            IndexError: a target outside `[0, N)`.
        """
        if getattr(self.matcher, "mesh", None) is None:  # else class_scores checks, and all ranks raise
            check_maps(feature, "feature")
            target = check_labels(target, len(feature), self.matcher.num_classes, feature.device)
        with StatisticsGuard(self.matcher):
            # The running statistics see the class path first, then the pairs.
            scores: ClassScores = self.matcher.class_scores(feature, target, prob_occ=occlusion_maps)
            target = target.long()
            unscored = scores.num_classes - scores.classes.shape[1] if self.background == "zero" else 0
            cls_loss = neighbor_cross_entropy(scores, target, unscored)
            cls_acc = (predicted_class(scores, unscored) == target).to(cls_loss.dtype)

            pair_scores = self._scores(feature, feature, occlusion_maps)
            triplet_loss, triplet_acc = batch_hard_hinge(pair_scores, target, self.margin)
            loss = torch.add(cls_loss, triplet_loss.mean(), alpha=self.triplet_weight)
            return cls_loss, triplet_loss, loss, cls_acc, triplet_acc
