"""Losses over the scores of a matcher, `QAConv` or another.

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

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint
from .distributed import Agreement, batches_of_all_ranks
from .recompute import MemoryLog, StatisticsGuard, is_recomputing
from .validation import check_count, check_device, check_labels, check_maps, check_number

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


class MatcherLoss(nn.Module):
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

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as `nn.Module` does; where keys are missing or unknown, nothing of it.

        Args:
            state_dict: as `state_dict` returns it.
            strict: refuse keys that are missing or unknown.
            assign: keep the tensors of `state_dict`, instead of copying from them.

        Returns:
            `missing_keys` and `unexpected_keys`.

        Raises:
            RuntimeError: keys or shapes that do not fit.
        """
        if strict and isinstance(state_dict, Mapping):
            checkpoint.check_keys(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

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


class ClassMemoryLoss(MatcherLoss):
    """Focal binary cross entropy against a memory of one feature map per class, the last one seen of it.

    Classes not seen yet do not count. The memory takes in every batch after its loss, in evaluation mode as
    well, as published; where a class comes several times in a batch, its last sample stays.

    - Under activation checkpointing (`torch.utils.checkpoint`, in both modes) a forward that is run again sees the
      memory as it was the first time, and changes nothing. At most the last 8 forwards can be run again.
    - Where `torch.distributed` is initialised, every rank remembers the batches of all ranks, in the order of the
      ranks; a forward is then a collective call, in evaluation mode as well. Batches may differ in size.
    - `class_memory` and `valid_class` are in the state dict and follow `.to()`, but are no buffers:
      `DistributedDataParallel` does not broadcast them, and weight averaging does not average them.

    Args:
        matcher: the module that scores samples against the memory, `QAConv` or another with
            `forward(prob_fea, gal_fea)`. The memory is on its device, in float32 (float64 for a float64 matcher).
        num_classes: N.
        num_features: C.
        height: H.
        width: W.
        mem_batch_size: classes matched at a time; each such call has its own batch statistics.

    Raises:
        TypeError: a matcher that is none, a count that is not an integer.
        ValueError: a count below 1, a matcher with a mesh.

    Examples:
        >>> matcher = QAConv(num_features=8, height=4, width=4)
        >>> loss_function = ClassMemoryLoss(matcher, num_classes=10, num_features=8, height=4, width=4)
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> loss, accuracy = loss_function(feature, torch.tensor([0, 0, 7, 7, 9, 9]))
        >>> loss.mean().backward()
        >>> loss_function.valid_class
        tensor([1., 0., 0., 0., 0., 0., 0., 1., 0., 1.])

    Reference: Liao & Shao, arXiv:1904.10424; focal loss: Lin et al., arXiv:1708.02002.
    """

    class_memory: Tensor  # [N, C, H, W]
    valid_class: Tensor  # [N], 1 for a class that was seen, else 0
    _STATE = ("class_memory", "valid_class")

    def __init__(
        self,
        matcher: nn.Module,
        num_classes: SupportsIndex,
        num_features: SupportsIndex,
        height: SupportsIndex,
        width: SupportsIndex,
        mem_batch_size: SupportsIndex = 16,
    ) -> None:
        super().__init__(matcher)
        if getattr(matcher, "mesh", None) is not None:
            raise ValueError(
                "a class memory is whole on every rank, but the matcher's class table is sharded over a mesh"
            )
        self.num_classes = check_count(num_classes, "num_classes", low=1, high=None, why="classes in the memory")
        self.num_features = check_count(num_features, "num_features", low=1, high=None, why="channels of a feature map")
        self.height = check_count(height, "height", low=1, high=None, why="of a feature map")
        self.width = check_count(width, "width", low=1, high=None, why="of a feature map")
        self.mem_batch_size = check_count(
            mem_batch_size, "mem_batch_size", low=1, high=None, why="classes matched at a time"
        )
        like = next(matcher.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shape = (self.num_classes, self.num_features, self.height, self.width)
        self.class_memory = torch.zeros(shape, dtype=dtype, device=like.device)
        self.valid_class = torch.zeros(self.num_classes, dtype=dtype, device=like.device)
        self._log = MemoryLog()

    def reset_running_stats(self) -> None:
        """Forget all classes, and reset the matcher's running statistics."""
        self.class_memory.zero_()
        self.valid_class.zero_()
        self._log.clear()
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
            RuntimeError: a forward within a backward pass that repeats none of the last forwards.
        """
        check_maps(feature, "feature", channels=self.num_features, height=self.height, width=self.width)
        check_device(feature, "feature", self.class_memory.device, "the class memory")
        target = check_labels(target, len(feature), self.num_classes, feature.device)
        with StatisticsGuard(self.matcher):
            if is_recomputing():
                with self._log.rewound(self.class_memory, self.valid_class, feature, target):
                    return self._loss_and_accuracy(feature, target)
            loss, accuracy = self._loss_and_accuracy(feature, target)
            self._remember(feature.detach(), target, loss)
            return loss, accuracy

    def _loss_and_accuracy(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # The memory changes before the backward pass, which therefore works on copies.
        copies = (
            chunk.clone(memory_format=torch.channels_last)
            for chunk in torch.split(self.class_memory, self.mem_batch_size)
        )
        score = torch.cat([self._scores(feature, chunk) for chunk in copies], dim=1)
        is_target = target[:, None] == torch.arange(self.num_classes, device=target.device)
        loss = F.binary_cross_entropy_with_logits(score, is_target.to(score.dtype), reduction="none")
        probability = score.sigmoid()
        weight = torch.where(is_target, 1 - probability, probability).square()
        loss = (loss * weight).masked_fill(self.valid_class == 0, 0.0).sum(dim=1)
        loss = loss.masked_fill(~is_target.any(dim=1), math.nan)
        return loss, (score.argmax(dim=1) == target).to(score.dtype)

    @torch.no_grad()
    def _remember(self, feature: Tensor, target: Tensor, loss: Tensor) -> None:
        """Store each class's last sample, without a race: all writes to a row carry the same value.

        An invalid target is led to some row, and writes what the row holds anyway.
        """
        features, targets = batches_of_all_ranks(feature, target)
        if not len(targets):
            return
        row = targets.clamp(0, self.num_classes - 1)
        sample = torch.arange(len(targets), device=targets.device)
        last = torch.where(targets == row[:, None], sample, -1).amax(dim=1)
        seen = last >= 0  # [B], False where no sample is of the row's class
        new = features[last.clamp(min=0)].to(self.class_memory.dtype)
        old, old_flags = self.class_memory[row], self.valid_class[row]
        maps, flags = torch.where(seen[:, None, None, None], new, old), torch.where(seen, 1.0, old_flags)
        if torch.compiler.is_compiling():
            # A compiled backward pass may compute again what it needs from the memory: that must not change.
            self.class_memory = self.class_memory.index_put((row,), maps)
            self.valid_class = self.valid_class.index_put((row,), flags)
            return
        self._log.record(feature, target, loss, row, old, old_flags)
        self.class_memory[row] = maps
        self.valid_class[row] = flags

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassMemoryLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._STATE:
            setattr(self, name, fn(getattr(self, name)))
        self._log.clear()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._STATE:
            destination[prefix + name] = getattr(self, name).detach().contiguous()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the memory as `nn.Module` loads a buffer; nothing, the matcher's included, if one does not fit."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = {name: prefix + name for name in self._STATE}
        if strict:
            missing_keys += [key for key in keys.values() if key not in state_dict]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys.values()]
        loaded = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        errors = []
        for name, value in loaded.items():
            shape = value.shape if isinstance(value, Tensor) else type(value).__name__
            if shape != getattr(self, name).shape:
                errors.append(f"size mismatch for {keys[name]}: {shape} for {getattr(self, name).shape} in this module")
        checkpoint.refuse(self, errors)  # before the matcher is loaded
        with torch.no_grad():
            for name, value in loaded.items():
                if local_metadata.get("assign_to_params_buffers", False):
                    setattr(self, name, value.detach())
                else:
                    getattr(self, name).copy_(value)
        self._log.clear()
