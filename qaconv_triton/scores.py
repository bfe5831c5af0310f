"""From maps to scores, in bounded memory: two scalar batch norms around a linear layer, whose running statistics are
updated here; the compact `ClassScores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, ops
from .common.dtypes import accumulation_dtype
from .distributed import shared_by_ranks, statistics_group, sum_over_ranks
from .recompute import is_recomputing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MAP_BYTES = 256 * 2**20  # of prepared gallery maps at a time, where nothing needs them later
PAIRS = 256  # of corresponding maps at a time, likewise


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Scores of every sample against its own few classes, without the columns in between.

    Attributes:
        values: `[B, K]` (`K + 1` with the own class), fp32 (fp64 for fp64).
        classes: int64 `[B, K]`, the column of every value; the own class comes last. -1 throughout a row whose label
            is not a class (on CUDA, where labels are not read back): its values are NaN.
        num_classes: N, the number of columns.

    Examples:
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
        with torch.sparse.check_sparse_tensor_invariants(False):  # torch 2.11 and 2.12 warn despite the argument
            return torch.sparse_coo_tensor(indices, self.values.flatten(), shape, device=self.values.device)


class Head(NamedTuple):
    """The learned part of a score: `logit_bn(fc(bn(pooled)))` (arXiv:1904.10424, section 3.3).

    `bn` sees all pooled values as one channel, `logit_bn` all logits: both are scalar affine maps.

    Attributes:
        bn: `BatchNorm1d(1)`, for the pooled values.
        fc: `Linear(2S, 1)`, or `Linear(S, 1)` for both halves, whose two outputs are added.
        logit_bn: `BatchNorm1d(1)`, for the logits.
        mesh: of a matcher whose ranks work together: statistics are those of all, gradients the means of theirs.
        is_mean: else gradients are the sums of theirs.
    """

    bn: nn.BatchNorm1d
    fc: nn.Linear
    logit_bn: nn.BatchNorm1d
    mesh: DeviceMesh | None = None
    is_mean: bool = True

    def is_frozen(self, *, evaluate: bool = False) -> bool:
        """Whether a score depends on its own pair alone, for both norms go by their running statistics."""
        return not (uses_batch(self.bn, evaluate) or uses_batch(self.logit_bn, evaluate))

    def needs_sums_only(self, *, evaluate: bool = False) -> bool:
        """Whether neither gradients nor batch statistics need the pooled values: a pair is one number then."""
        return self.is_frozen(evaluate=evaluate) and not torch.is_grad_enabled()

    def statistics_group(self, norm: nn.BatchNorm1d, evaluate: bool) -> Any:
        """The ranks that `norm` takes batch statistics over; None where it takes none, or this rank's alone.

        To `evaluate` is a rank's own affair, also where there are no running statistics.
        """
        return statistics_group(norm, self.mesh) if uses_batch(norm, evaluate) and not evaluate else None

    def parameters(self) -> tuple[Affine, Affine, Affine]:
        """Weight and bias of the three modules."""
        modules = self.bn, self.fc, self.logit_bn
        found: list[Tensor | None] = [each for module in modules for each in (module.weight, module.bias)]
        if self.mesh is not None and self.mesh.size() > 1:
            given, divisor = [each for each in found if each is not None], self.mesh.size() if self.is_mean else 1
            shared = iter(shared_by_ranks(given, self.mesh.get_group(), divisor))
            found = [None if each is None else next(shared) for each in found]
        return (found[0], found[1]), (found[2], found[3]), (found[4], found[5])


Affine = tuple[Tensor | None, Tensor | None]  # weight and bias


class BatchStatistics(NamedTuple):
    """Statistics of one batch that a norm has yet to take into its running ones.

    Attributes:
        norm: a `BatchNorm1d(1)` that tracks running statistics.
        mean: `[]`.
        variance: `[]`, biased.
        num_values: `[]`; the norm stays as it is where there are none.
    """

    norm: nn.BatchNorm1d
    mean: Tensor
    variance: Tensor
    num_values: Tensor


def score_gallery(
    head: Head, prob_fea: Tensor, gal_fea: Tensor, prob_occ: Tensor | None, gal_occ: Tensor | None, *, evaluate: bool
) -> tuple[Tensor, list[BatchStatistics]]:
    """Score every probe `[P, C, H, W]` against every gallery map `[G, C, H, W]`: `[P, G]`.

    In blocks of `MAP_BYTES` of prepared maps, where nothing needs them later.
    """
    dtype = functional.correlation_dtype(prob_fea)
    probe = functional.prepare_maps(prob_fea, prob_occ, dtype)

    def gallery(rows: slice) -> Tensor:
        if gal_fea is prob_fea and gal_occ is prob_occ:
            return probe[rows]
        return functional.prepare_maps(gal_fea[rows], _rows(gal_occ, rows), dtype)

    probes, items = probe.shape[0], gal_fea.shape[0]
    step = max(1, MAP_BYTES // (4 * prob_fea.shape[1:].numel()))
    if max(probes, items) <= step or not head.needs_sums_only(evaluate=evaluate):
        return score_maps(head, probe, gallery(slice(0, items)), evaluate=evaluate)
    scores = probe.new_empty(probes, items, dtype=accumulation_dtype(dtype))
    for first in range(0, items, step):
        columns = slice(first, first + step)
        maps = gallery(columns)
        for start in range(0, probes, step):
            rows = slice(start, start + step)
            scores[rows, columns] = score_maps(head, probe[rows], maps, evaluate=evaluate)[0]
    return scores, []


def prepared_pairs(
    a: Tensor, b: Tensor, a_occ: Tensor | None, b_occ: Tensor | None, step: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Prepared maps of `a` and `b`, `step` at a time, and the index that pairs them; once even if there are none."""
    dtype = functional.correlation_dtype(a)
    for start in range(0, max(a.shape[0], 1), step):
        rows = slice(start, start + step)
        probe = functional.prepare_maps(a[rows], _rows(a_occ, rows), dtype)
        gallery = functional.prepare_maps(b[rows], _rows(b_occ, rows), dtype)
        yield probe, gallery, torch.arange(probe.shape[0], device=probe.device).unsqueeze(1)


def _rows(visibility: Tensor | None, rows: slice) -> Tensor | None:
    return None if visibility is None else visibility[rows]


def score_maps(
    head: Head,
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None = None,
    group: Tensor | None = None,
    *,
    raw: bool = False,
    sparse_grad: bool = False,
    evaluate: bool = False,
    valid: Tensor | None = None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, list[BatchStatistics]]:
    """Score prepared probes against prepared gallery maps, or the `raw` class table; `index`, `group` as of the op.

    Pooled values exist only where something needs them: else each pair is one number, its norms folded into `fc`.
    Of `pairs`, int64 `[Q]`, which count through `index [P, K]`, only those are scored; the others are in no statistic.

    Returns:
        As `pair_scores`; `[Q]` with `pairs`.
    """
    if head.needs_sums_only(evaluate=evaluate):
        locations, dtype = probe.shape[2] * probe.shape[3], accumulation_dtype(probe.dtype)
        weight, shift = folded(head, 2 * locations, dtype)
        scores = ops.pair_sums(probe, gallery, index, group, raw, weight) + shift
        return scores if pairs is None else scores.flatten().index_select(0, pairs), []
    pooled = ops.max_correlation(probe, gallery, index, group, raw, raw and sparse_grad)[0]
    if pairs is None:
        return pair_scores(pooled, head, evaluate=evaluate, valid=valid)
    scores, statistics = pair_scores(pooled.flatten(0, 1).index_select(0, pairs).unsqueeze(1), head, evaluate=evaluate)
    return scores.squeeze(1), statistics


def pair_scores(
    pooled: Tensor, head: Head, *, evaluate: bool = False, valid: Tensor | None = None
) -> tuple[Tensor, list[BatchStatistics]]:
    """Compute `logit_bn(fc(bn(pooled)))`, one score per pair.

    Running statistics stay as they are: the caller updates them by `update_running_statistics` when nothing can fail
    any more. Statistics are those of this rank's batch, or of all ranks' batches for a `SyncBatchNorm`.

    Args:
        pooled: `[P, K, 2S]`.
        head: the modules; `bn` is folded into `fc`.
        evaluate: use running statistics although the modules may be in training mode.
        valid: bool `[P]`; rows that do not count, in no statistic, and score NaN. All count where None.

    Returns:
        `[P, K]` in pooled's dtype, whatever autocast says; the statistics of the norms that are to be updated.

    Raises:
        ValueError: batch statistics of a single pair.
    """
    pairs = pooled.shape[0] * pooled.shape[1]
    parameters = head.parameters()
    if pairs == 0 and not any(head.statistics_group(norm, evaluate) for norm in (head.bn, head.logit_bn)):
        # all parameters take part, for other ranks may have pairs and wait for their gradients
        scores = pooled.sum(-1)
        for parameter in (each for pair in parameters for each in pair if each is not None):
            scores = scores + parameter.sum().to(pooled.dtype)
        return scores, []
    check_pairs(pairs, head, evaluate=evaluate)
    statistics: list[BatchStatistics] = []
    with torch.autocast(pooled.device.type, enabled=False):
        weight, bias = _both_halves(parameters[1], pooled.shape[-1], pooled.dtype)
        mask = None if valid is None else valid.view(-1, 1, 1)
        centred, scale, shift = _batch_norm(head, head.bn, parameters[0], pooled, mask, evaluate, statistics)
        logits = (centred @ weight) * scale + shift * weight.sum()
        if bias is not None:
            logits = logits + bias
        mask = None if mask is None else mask.squeeze(-1)
        centred, scale, shift = _batch_norm(head, head.logit_bn, parameters[2], logits, mask, evaluate, statistics)
        scores = centred * scale + shift
        return scores if mask is None else torch.where(mask, scores, torch.nan), statistics


@torch.no_grad()
def update_running_statistics(statistics: list[BatchStatistics]) -> None:
    """Update every norm's running statistics once, as `BatchNorm1d` does: all of them, or none if this fails.

    A forward that activation checkpointing runs again has been counted before, and changes nothing.

    Args:
        statistics: as `pair_scores` returns them, no norm twice.
    """
    if is_recomputing():
        return
    buffers, values = [], []
    for norm, mean, variance, count in statistics:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        tracked = norm.num_batches_tracked + (count > 0).long()
        if norm.momentum is None:
            momentum = tracked.clamp(min=1).to(mean.dtype).reciprocal()
        else:
            momentum = torch.full_like(mean, norm.momentum)
        momentum = momentum * (count > 0)
        unbiased = variance * count / (count - 1.0).clamp(min=1.0)
        for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            buffers.append(running)
            values.append(running.lerp(value.to(running.dtype), momentum.to(running.dtype)))
        buffers.append(norm.num_batches_tracked)
        values.append(tracked)
    if buffers:
        torch._foreach_copy_(buffers, values)  # one call: no signal comes between


def _both_halves(fc: Affine, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight `[2S]` and bias of `fc` over all `size = 2S` pooled values; a shared `fc` counts for each half."""
    assert fc[0] is not None
    weight, bias = fc[0].to(dtype).squeeze(0), None if fc[1] is None else fc[1].to(dtype).squeeze(0)
    if 2 * weight.shape[0] == size:
        return torch.cat([weight, weight]), None if bias is None else 2 * bias
    return weight, bias


@torch.no_grad()
def folded(head: Head, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold frozen norms into `fc`: a score is `weight [2S]` times the pair's pooled values, plus `shift []`.

    Args:
        head: the modules, both norms frozen.
        size: 2S.
        dtype: of the result.
    """
    scale, shift = _affine(head.bn)
    weight, bias = _both_halves((head.fc.weight, head.fc.bias), size, torch.float64)
    logit = shift * weight.sum()
    if bias is not None:
        logit = logit + bias
    outer_scale, outer_shift = _affine(head.logit_bn)
    return (outer_scale * scale * weight).to(dtype), (outer_scale * logit + outer_shift).to(dtype)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """A frozen norm of one channel as scale and shift, both `[]`, in fp64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale, shift = _scale_and_shift(norm, (norm.weight, norm.bias), norm.running_var.double())
    return scale.squeeze(0), (shift - norm.running_mean.double() * scale).squeeze(0)


def check_pairs(pairs: int, head: Head, *, evaluate: bool = False) -> None:
    """Require more than one pair where `logit_bn` takes its statistics from them.

    Raises:
        ValueError: a single pair.
    """
    if pairs == 1 and uses_batch(head.logit_bn, evaluate) and not head.statistics_group(head.logit_bn, evaluate):
        raise ValueError("batch norm in training mode needs the scores of more than one pair, got 1; call eval() first")


def _tracks(norm: nn.BatchNorm1d) -> bool:
    return None not in (norm.running_mean, norm.running_var, norm.num_batches_tracked)


def uses_batch(norm: nn.BatchNorm1d, evaluate: bool) -> bool:
    """Whether `norm` goes by the statistics of the batch, as in training mode or without running ones."""
    return (norm.training and not evaluate) or norm.running_mean is None


def _batch_norm(
    head: Head,
    norm: nn.BatchNorm1d,
    affine: Affine,
    values: Tensor,
    mask: Tensor | None,
    evaluate: bool,
    statistics: list[BatchStatistics],
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a `norm` of the head over all of `values` into `(values - mean, scale, shift)`; it has parameters `affine`.

    What `mask` leaves out is zero. What the running statistics are to be updated with is appended to `statistics`.
    """
    if uses_batch(norm, evaluate):
        group = head.statistics_group(norm, evaluate)
        counted = values if mask is None else torch.where(mask, values, 0.0)
        count = values.new_full((), float(values.numel()))
        if mask is not None:
            count = mask.sum() * (values.numel() // max(mask.numel(), 1)) * values.new_ones(())
        if group is not None:
            count, total = sum_over_ranks(torch.stack([count, counted.sum()]), group).unbind()
            mean = total / count.clamp(min=1.0)
        else:
            mean = values.mean() if mask is None else counted.sum() / count.clamp(min=1.0)
        centred = values - mean if mask is None else torch.where(mask, values - mean, 0.0)
        squares = centred.square().sum()
        variance = (squares if group is None else sum_over_ranks(squares, group)) / count.clamp(min=1.0)
        if norm.training and not evaluate and _tracks(norm):
            statistics.append(BatchStatistics(norm, mean.detach(), variance.detach(), count))
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean.to(values.dtype), norm.running_var.to(values.dtype)
        centred = values - mean
        if mask is not None:
            centred = torch.where(mask, centred, 0.0)
    return centred, *_scale_and_shift(norm, affine, variance)


def _scale_and_shift(norm: nn.BatchNorm1d, affine: Affine, variance: Tensor) -> tuple[Tensor, Tensor]:
    """What `norm`, with weight and bias `affine`, does to centred values of that variance, in its dtype."""
    scale, (weight, bias) = (variance + norm.eps).rsqrt(), affine
    if weight is not None:
        scale = scale * weight.to(variance.dtype)
    return scale, torch.zeros_like(scale) if bias is None else bias.to(variance.dtype)


def k_best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row and their ids; equal ones in the order in which they come, NaN last."""
    order = torch.where(scores.isnan(), -torch.inf, scores).argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)
