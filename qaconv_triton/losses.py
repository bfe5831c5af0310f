"""Losses over the scores of a `QAConv` matcher.

- `PairwiseMatchingLoss`, `TripletLoss`: all pairs of a batch, as in QAConv-GS: Liao & Shao, "Graph Sampling
  Based Deep Metric Learning for Generalizable Person Re-Identification", arXiv:2104.01546.
- `SoftmaxTripletLoss`: cross entropy over a sample's neighbour classes, plus the triplet loss.
- `ClassMemoryLoss`: one remembered feature map per class, as in QAConv: Liao & Shao, "Interpretable and
  Generalizable Person Re-Identification with Query-Adaptive Convolution and Temporal Lifting",
  arXiv:1904.10424.

Letters: B samples in a batch, N classes, K' scored classes of a sample (its K neighbours, and itself with
`include_self`), C channels, H, W height and width of a feature map.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_count, check_labels, check_maps
from .scores import check_pairs

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

    Example:
        >>> score = torch.tensor([[9.0, 2.0, 5.0], [2.0, 9.0, 1.0], [5.0, 1.0, 9.0]])
        >>> hardest_pairs(score, torch.tensor([0, 0, 1]))
        (tensor([2., 2., inf]), tensor([5., 1., 5.]))
    """
    same = target[:, None] == target
    itself = torch.eye(len(target), dtype=torch.bool, device=target.device)
    # The column of the empty set's own value lets B = 0 through as well: a minimum needs an element.
    positives = F.pad(score.masked_fill(~same | itself, math.inf), (0, 1), value=math.inf)
    negatives = F.pad(score.masked_fill(same, -math.inf), (0, 1), value=-math.inf)
    return positives.min(dim=1).values, negatives.max(dim=1).values


def batch_hard_hinge(score: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """`relu(margin - (hardest positive - hardest negative))`, and whether the positive is not the lower one.

    Args:
        score: `[B, B]`.
        target: int64 `[B]`.
        margin: the distance wanted between the two.

    Returns:
        loss `[B]`, exactly 0 for a sample without a positive or without a negative; accuracy `[B]`, 0 or 1,
        without gradient.

    Example:
        >>> score = torch.tensor([[9.0, 2.0, 5.0], [2.0, 9.0, 1.0], [5.0, 1.0, 9.0]])
        >>> batch_hard_hinge(score, torch.tensor([0, 0, 1]), margin=2.0)
        (tensor([5., 1., 0.]), tensor([0., 1., 1.]))
    """
    positive, negative = hardest_pairs(score, target)
    return torch.relu(margin - (positive - negative)), (positive >= negative).to(score.dtype)


def neighbor_cross_entropy(scores: ClassScores, target: Tensor, unscored: int) -> Tensor:
    """Cross entropy of `target` over the scored classes and `unscored` more, whose logits are 0.

    Args:
        scores: values and classes `[B, K']`.
        target: int64 `[B]`; where it is not among the scored classes, its logit is 0.
        unscored: how many classes of logit 0 there are.

    Returns:
        loss `[B]`; NaN where the values are.
    """
    logits = F.pad(scores.values, (0, 1), value=math.log(unscored)) if unscored else scores.values
    own = scores.values.masked_fill(scores.classes != target[:, None], 0.0).sum(dim=1)
    return logits.logsumexp(dim=1) - own


def predicted_class(scores: ClassScores, unscored: int) -> Tensor:
    """The class of the largest logit, the lowest id among equals: the argmax of the dense `[B, N]` scores.

    Args:
        scores: values and classes `[B, K']`, the classes of a row distinct.
        unscored: how many classes of logit 0 there are: `N - K'`, or 0 to leave them out.

    Returns:
        int64 `[B]`.
    """
    best = scores.values.amax(dim=1, keepdim=True)
    is_best = torch.where(best.isnan(), scores.values.isnan(), scores.values == best)
    best_class = scores.classes.masked_fill(~is_best, scores.num_classes).amin(dim=1).clamp(min=0)
    if not unscored:
        return best_class
    # Distinct ids that are sorted agree with their positions up to the first one that is missing.
    position = torch.arange(scores.classes.shape[1], device=scores.classes.device)
    first_unscored = (scores.classes.sort(dim=1).values == position).sum(dim=1)
    best = best.squeeze(1)
    at_zero = torch.where(best == 0, torch.minimum(best_class, first_unscored), best_class)
    return torch.where(best < 0, first_unscored, at_zero)


class MatcherLoss(nn.Module):
    """What the losses share: the matcher, its scores of all pairs of a batch, and its resets.

    Args:
        matcher: the `QAConv` whose scores the loss is over; its parameters are the loss's.

    Example:
        >>> MatcherLoss(QAConv(num_features=8, height=4, width=4)).reset_running_stats()
    """

    def __init__(self, matcher: QAConv) -> None:
        super().__init__()
        self.matcher = matcher

    def reset_running_stats(self) -> None:
        """Reset the matcher's running statistics."""
        self.matcher.reset_running_stats()

    def reset_parameters(self) -> None:
        """Reset the matcher's parameters."""
        self.matcher.reset_parameters()

    def _pair_scores(self, feature: Tensor, occlusion_maps: Tensor | None) -> Tensor:
        score: Tensor = self.matcher(feature, "same", prob_occ=occlusion_maps, gal_occ=occlusion_maps)
        return score


class PairwiseMatchingLoss(MatcherLoss):
    """Binary cross entropy over all pairs of a batch: do the two show the same class?

    Self pairs count, as published.

    Args:
        matcher: the `QAConv` that scores the pairs.

    Example:
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
        check_maps(feature, "feature")
        target = check_labels(target, len(feature), None, feature.device)
        score = self._pair_scores(feature, occlusion_maps)
        same = (target[:, None] == target).to(score.dtype)
        loss = F.binary_cross_entropy_with_logits(score, same, reduction="none").sum(dim=1)
        positive, negative = hardest_pairs(score.detach(), target)
        return loss, (positive > negative).to(score.dtype)


class TripletLoss(MatcherLoss):
    """Batch-hard triplet hinge: the hardest positive should score `margin` above the hardest negative.

    Args:
        matcher: the `QAConv` that scores the pairs.
        margin: the distance wanted between the two.

    Example:
        >>> loss_function = TripletLoss(QAConv(num_features=8, height=4, width=4), margin=16)
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> loss, accuracy = loss_function(feature, torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> loss.mean().backward()
        >>> loss.shape, accuracy.shape
        (torch.Size([6]), torch.Size([6]))

    Reference: Liao & Shao, arXiv:2104.01546; batch-hard: Hermans et al., arXiv:1703.07737.
    """

    def __init__(self, matcher: QAConv, margin: float = 16) -> None:
        super().__init__(matcher)
        self.margin = margin

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
        check_maps(feature, "feature")
        target = check_labels(target, len(feature), None, feature.device)
        return batch_hard_hinge(self._pair_scores(feature, occlusion_maps), target, self.margin)


class SoftmaxTripletLoss(MatcherLoss):
    """Cross entropy over the class-path scores, plus the batch-hard triplet hinge over the batch.

    The cross entropy works on the K' scores per sample and never builds the dense `[B, N]`.

    Args:
        matcher: a `QAConv` with a class table (`num_classes`).
        margin: of the triplet loss.
        triplet_weight: the mean triplet loss's weight in the sum.
        background: the logits of the classes that were not scored: `"zero"`, or `"ignore"` to leave them out
            of the softmax, which needs a matcher with `include_self=True`.

    Raises:
        ValueError: another `background`; `"ignore"` without `include_self`.

    Example:
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
        if background not in get_args(Background):
            raise ValueError(f"background: expected 'zero' or 'ignore', got {background!r}")
        if background == "ignore" and not matcher.include_self:
            raise ValueError(
                "background='ignore' needs a matcher with include_self=True, got include_self=False: "
                "the target itself would have no score"
            )
        self.margin = margin
        self.triplet_weight = triplet_weight
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
        check_maps(feature, "feature")
        target = check_labels(target, len(feature), self.matcher.num_classes, feature.device)
        check_pairs(len(feature) ** 2, self.matcher.logit_bn)  # before the class path updates anything
        # The running statistics see the class path first, then the pairs.
        scores = self.matcher.class_scores(feature, target, prob_occ=occlusion_maps)
        unscored = scores.num_classes - scores.classes.shape[1] if self.background == "zero" else 0
        cls_loss = neighbor_cross_entropy(scores, target, unscored)
        cls_acc = (predicted_class(scores, unscored) == target).to(cls_loss.dtype)

        pair_scores = self._pair_scores(feature, occlusion_maps)
        triplet_loss, triplet_acc = batch_hard_hinge(pair_scores, target, self.margin)
        loss = cls_loss + self.triplet_weight * triplet_loss.mean()
        return cls_loss, triplet_loss, loss, cls_acc, triplet_acc


class ClassMemoryLoss(MatcherLoss):
    """Focal binary cross entropy against a memory of one feature map per class, the last one seen of it.

    Classes not seen yet do not count. The memory takes in every batch after its loss, in evaluation mode as
    well, as published; where a class comes several times in a batch, its last sample stays.

    Args:
        matcher: the `QAConv` that scores samples against the memory.
        num_classes: N.
        num_features: C.
        height: H.
        width: W.
        mem_batch_size: classes matched at a time; each such call has its own batch statistics.

    Raises:
        TypeError: a count that is not an int.
        ValueError: a count below 1.

    Example:
        >>> matcher = QAConv(num_features=8, height=4, width=4)
        >>> loss_function = ClassMemoryLoss(matcher, num_classes=10, num_features=8, height=4, width=4)
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> loss, accuracy = loss_function(feature, torch.tensor([0, 0, 7, 7, 9, 9]))
        >>> loss.mean().backward()
        >>> loss_function.valid_class
        tensor([1., 0., 0., 0., 0., 0., 0., 1., 0., 1.])

    Reference: Liao & Shao, arXiv:1904.10424; focal loss: Lin et al., arXiv:1708.02002.
    """

    class_memory: Tensor
    valid_class: Tensor

    def __init__(
        self,
        matcher: QAConv,
        num_classes: int,
        num_features: int,
        height: int,
        width: int,
        mem_batch_size: int = 16,
    ) -> None:
        super().__init__(matcher)
        check_count(num_classes, "num_classes", low=1, high=None, why="classes in the memory")
        check_count(num_features, "num_features", low=1, high=None, why="channels of a feature map")
        check_count(height, "height", low=1, high=None, why="of a feature map")
        check_count(width, "width", low=1, high=None, why="of a feature map")
        check_count(mem_batch_size, "mem_batch_size", low=1, high=None, why="classes matched at a time")
        self.num_classes = num_classes
        self.num_features = num_features
        self.height = height
        self.width = width
        self.mem_batch_size = mem_batch_size
        memory = torch.zeros(num_classes, num_features, height, width)
        self.register_buffer("class_memory", memory.contiguous(memory_format=torch.channels_last))
        self.register_buffer("valid_class", torch.zeros(num_classes))

    def reset_running_stats(self) -> None:
        """Forget all classes, and reset the matcher's running statistics."""
        self.class_memory.zero_()
        self.valid_class.zero_()
        super().reset_running_stats()

    def forward(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of every sample, then remember the samples.

        Args:
            feature: feature maps `[B, C, H, W]`, floating point.
            target: class ids `[B]`, integers in `[0, N)`.

        Returns:
            loss `[B]`, summed over the classes seen before this batch; accuracy `[B]`, 1 where the target
            scores highest. An invalid target on CUDA, where it is not read back, gives a NaN loss and is not
            remembered.

        Raises:
            TypeError: `feature` or `target` of another dtype.
            ValueError: another shape or device.
            IndexError: a target outside `[0, N)`.
        """
        check_maps(feature, "feature", channels=self.num_features, height=self.height, width=self.width)
        target = check_labels(target, len(feature), self.num_classes, feature.device)
        # The memory changes before the backward pass, which works on the matcher's normalised copies of it.
        chunks = torch.split(self.class_memory, self.mem_batch_size)
        check_pairs(len(feature) * len(chunks[-1]), self.matcher.logit_bn)  # before a larger chunk updates anything
        score = torch.cat([self.matcher(feature, chunk) for chunk in chunks], dim=1)

        is_target = target[:, None] == torch.arange(self.num_classes, device=target.device)
        loss = F.binary_cross_entropy_with_logits(score, is_target.to(score.dtype), reduction="none")
        probability = score.sigmoid()
        weight = torch.where(is_target, 1 - probability, probability).square()
        loss = (loss * weight * self.valid_class.clone()).sum(dim=1)
        loss = loss.masked_fill(~is_target.any(dim=1), math.nan)
        self._remember(feature.detach(), target)
        return loss, (score.argmax(dim=1) == target).to(score.dtype)

    @torch.no_grad()
    def _remember(self, feature: Tensor, target: Tensor) -> None:
        """Store each class's last sample, without a race: all writes to a row carry the same value.

        An invalid target is led to some row, and writes what the row holds anyway.
        """
        if not len(target):
            return
        row = target.clamp(0, self.num_classes - 1)
        sample = torch.arange(len(target), device=target.device)
        last = torch.where(target == row[:, None], sample, -1).amax(dim=1)
        seen = last >= 0  # [B], False where no sample is of the row's class
        new = feature[last.clamp(min=0)].to(self.class_memory.dtype)
        self.class_memory[row] = torch.where(seen[:, None, None, None], new, self.class_memory[row])
        self.valid_class[row] = torch.where(seen, 1.0, self.valid_class[row])
