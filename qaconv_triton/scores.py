"""From pooled correlations to scores: two scalar batch norms around a linear layer, and the compact class scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Scores of every sample against its own few classes, without the columns in between.

    Attributes:
        values: `[B, K]` (`K + 1` with the own class), fp32 (fp64 for fp64).
        classes: int64 `[B, K]`, the column of every value; the own class comes last. -1 throughout a row whose label
            is not a class (on CUDA, where labels are not read back): its values are NaN.
        num_classes: N, the number of columns.

    Example:
        >>> scores = ClassScores(torch.tensor([[2.0, 3.0]]), torch.tensor([[3, 1]]), num_classes=4)
        >>> scores.to_dense().tolist()
        [[0.0, 3.0, 0.0, 2.0]]
    """

    values: Tensor
    classes: Tensor
    num_classes: int

    def to_dense(self, fill: float = 0.0) -> Tensor:
        """Spread the values over `[B, N]`; `fill` where no class was scored, NaN in rows of invalid labels."""
        invalid = (self.classes < 0).any(1, keepdim=True)
        background = torch.where(invalid, torch.nan, self.values.new_full((), fill))
        return background.repeat(1, self.num_classes).scatter_(1, self.classes.clamp(min=0), self.values)

    def to_sparse(self) -> Tensor:
        """Return the scores as a `torch.sparse_coo` tensor `[B, N]`."""
        rows = torch.arange(self.values.shape[0], device=self.values.device).unsqueeze(1).expand_as(self.classes)
        indices = torch.stack([rows.flatten(), self.classes.clamp(min=0).flatten()])
        shape = self.values.shape[0], self.num_classes
        return torch.sparse_coo_tensor(
            indices, self.values.flatten(), shape, device=self.values.device, check_invariants=False
        )


def pair_scores(
    pooled: Tensor,
    bn: nn.BatchNorm1d,
    fc: nn.Linear,
    logit_bn: nn.BatchNorm1d,
    *,
    evaluate: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Compute `logit_bn(fc(bn(pooled)))`, one score per pair (arXiv:1904.10424, section 3.3).

    `bn` sees all pooled values as one channel, `logit_bn` all logits: both are scalar affine maps, and `bn` is folded
    into `fc`. Running statistics are updated as the modules would. Statistics are those of this process's batch.

    Args:
        pooled: `[P, K, 2S]`.
        bn: `BatchNorm1d(1)`, for the pooled values.
        fc: `Linear(2S, 1)`.
        logit_bn: `BatchNorm1d(1)`, for the logits.
        evaluate: use running statistics although the modules may be in training mode.
        valid: bool `[P]`; rows that do not count, in no statistic, and score NaN. All count where None.

    Returns:
        `[P, K]` in pooled's dtype, whatever autocast says.

    Raises:
        TypeError: a `SyncBatchNorm`, whose statistics would be those of all processes.
        ValueError: batch statistics of a single pair.
    """
    _check_norms(bn, logit_bn)
    pairs = pooled.shape[0] * pooled.shape[1]
    if pairs == 0:
        return pooled.sum(-1)
    check_pairs(pairs, logit_bn, evaluate=evaluate)
    with torch.autocast(pooled.device.type, enabled=False):
        weight = fc.weight.to(pooled.dtype).squeeze(0)
        mask = None if valid is None else valid.view(-1, 1, 1)
        centred, scale, shift = _batch_norm(bn, pooled, mask, evaluate)
        logits = (centred @ weight) * scale + shift * weight.sum()
        if fc.bias is not None:
            logits = logits + fc.bias.to(pooled.dtype)
        mask = None if mask is None else mask.squeeze(-1)
        centred, scale, shift = _batch_norm(logit_bn, logits, mask, evaluate)
        scores = centred * scale + shift
        return scores if mask is None else torch.where(mask, scores, torch.nan)


def is_frozen(bn: nn.BatchNorm1d, logit_bn: nn.BatchNorm1d, *, evaluate: bool = False) -> bool:
    """Whether a score depends on its own pair alone, for both norms go by their running statistics."""
    return not (_uses_batch(bn, evaluate) or _uses_batch(logit_bn, evaluate))


@torch.no_grad()
def folded(bn: nn.BatchNorm1d, fc: nn.Linear, logit_bn: nn.BatchNorm1d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold frozen norms into `fc`: a score is `weight [2S]` times the pair's pooled values, plus `shift []`.

    Raises:
        TypeError: a `SyncBatchNorm`.
    """
    _check_norms(bn, logit_bn)
    scale, shift = _affine(bn)
    weight = fc.weight.double().squeeze(0)
    logit = shift * weight.sum()
    if fc.bias is not None:
        logit = logit + fc.bias.double().squeeze(0)
    outer_scale, outer_shift = _affine(logit_bn)
    return (outer_scale * scale * weight).to(dtype), (outer_scale * logit + outer_shift).to(dtype)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """A frozen norm of one channel as scale and shift, both `[]`, in fp64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale, shift = _scale_and_shift(norm, norm.running_var.double())
    return scale.squeeze(0), (shift - norm.running_mean.double() * scale).squeeze(0)


def _check_norms(bn: nn.Module, logit_bn: nn.Module) -> None:
    if isinstance(bn, nn.SyncBatchNorm) or isinstance(logit_bn, nn.SyncBatchNorm):
        raise TypeError(
            "QAConv's batch norms see one process's pairs; convert_sync_batchnorm must leave the matcher out"
        )


def check_pairs(pairs: int, logit_bn: nn.BatchNorm1d, *, evaluate: bool = False) -> None:
    """Require more than one pair where `logit_bn` takes its statistics from them.

    Raises:
        ValueError: a single pair.
    """
    if pairs == 1 and _uses_batch(logit_bn, evaluate):
        raise ValueError("batch norm in training mode needs the scores of more than one pair, got 1; call eval() first")


def _uses_batch(norm: nn.BatchNorm1d, evaluate: bool) -> bool:
    return (norm.training and not evaluate) or norm.running_mean is None


def _batch_norm(
    norm: nn.BatchNorm1d, values: Tensor, mask: Tensor | None, evaluate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Split `norm` over all of `values` into `(values - mean, scale, shift)`; what `mask` leaves out is zero."""
    if _uses_batch(norm, evaluate):
        if mask is None:
            count = values.new_full((), float(values.numel()))
            mean = values.mean()
            centred = values - mean
        else:
            count = mask.sum() * (values.numel() // mask.numel()) * values.new_ones(())
            mean = torch.where(mask, values, 0.0).sum() / count.clamp(min=1.0)
            centred = torch.where(mask, values - mean, 0.0)
        variance = centred.square().sum() / count.clamp(min=1.0)
        if norm.training and not evaluate:
            _track(norm, mean.detach(), variance.detach(), count)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean.to(values.dtype), norm.running_var.to(values.dtype)
        centred = values - mean
        if mask is not None:
            centred = torch.where(mask, centred, 0.0)
    return centred, *_scale_and_shift(norm, variance)


def _scale_and_shift(norm: nn.BatchNorm1d, variance: Tensor) -> tuple[Tensor, Tensor]:
    """What `norm` does to centred values of that variance, in its dtype."""
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(variance.dtype)
    return scale, torch.zeros_like(scale) if norm.bias is None else norm.bias.to(variance.dtype)


@torch.no_grad()
def _track(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Update the running statistics once, as `BatchNorm1d` does; not at all when nothing counted."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_((count > 0).long())
    if norm.momentum is None:
        momentum = norm.num_batches_tracked.clamp(min=1).to(mean.dtype).reciprocal()
    else:
        momentum = torch.full_like(mean, norm.momentum)
    momentum = momentum * (count > 0)
    unbiased = variance * count / (count - 1.0).clamp(min=1.0)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum.to(norm.running_mean.dtype))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum.to(norm.running_var.dtype))
