"""The learned head of a score, two scalar batch norms around a linear layer, as one function with its own gradient.

To torch's autograd it is a hundred operations on single numbers, which keep the host of a GPU busy for longer than the
matching takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from .common.functions import applying
from .distributed import shared_by_ranks, statistics_group
from .recompute import is_recomputing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
        num_rows: a number, or `[]` where only the device knows it; the norm stays as it is where there are none.
        width: how many values of a row there are.
    """

    norm: nn.BatchNorm1d
    mean: Tensor
    variance: Tensor
    num_rows: int | Tensor
    width: int


class _Norm(NamedTuple):
    """How a norm of the head gets its statistics.

    Attributes:
        eps: added to the variance.
        running: mean and variance `[1]` of a norm that goes by its running statistics; else those of the batch count.
        share: `[]`, above 0, of the values that count, where that is known on the device only; without `group`.
        num_values: `[]`, 1 or more, of all ranks of `group`; None without one.
        group: the ranks whose batches are one; None for this rank's alone.
    """

    eps: float
    running: tuple[Tensor, Tensor] | None = None
    share: Tensor | None = None
    num_values: Tensor | None = None
    group: Any = None


class _Score(torch.autograd.Function):
    """`logit_bn(fc(bn(pooled)))` of pairs, the mean and variance that each norm went by, and what the gradient needs.

    Values are centred before anything is summed: `logit_bn` divides by a small number, and would magnify an error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        pooled: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        logit_weight: Tensor | None,
        logit_bias: Tensor | None,
        invalid: Tensor | None,
        bn: _Norm,
        logit_bn: _Norm,
    ) -> tuple[Tensor, ...]:
        mean, variance = _statistics(pooled, bn)
        inverse_std = (variance + bn.eps).rsqrt()
        products = ((pooled - mean).flatten(0, 1) @ weight.view(-1)).mul_(inverse_std)
        shift = bias if bn_bias is None else _affine(weight.sum(), bn_bias, bias)
        logits = _affine(products, bn_weight, shift).view(pooled.shape[:2])
        if invalid is not None:
            logits = logits.masked_fill(invalid.unsqueeze(1), 0.0)
        logit_mean, logit_variance = _statistics(logits, logit_bn)
        logit_inverse_std = (logit_variance + logit_bn.eps).rsqrt()
        normalized = (logits - logit_mean).mul_(logit_inverse_std)
        scores = _affine(normalized, logit_weight, logit_bias)
        if invalid is not None:  # not in place: compiled by torch 2.11, an output changed in place has no gradient
            scores = scores.masked_fill(invalid.unsqueeze(1), torch.nan)
        found = mean, variance, logit_mean, logit_variance
        return scores, *found, inverse_std, logit_inverse_std, products, normalized

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pooled, weight, _, bn_weight, bn_bias, logit_weight, _, invalid, bn, logit_bn = inputs
        _, mean, _, _, _, inverse_std, logit_inverse_std, products, normalized = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.shapes = tuple(None if each is None else each.shape for each in inputs[1:7])
        ctx.takes_batch, ctx.groups = (bn.running is None, logit_bn.running is None), (bn.group, logit_bn.group)
        ctx.save_for_backward(
            *(pooled, weight, bn_weight, bn_bias, logit_weight, invalid),
            *(bn.share, bn.num_values, logit_bn.share, logit_bn.num_values),
            *(mean, inverse_std, logit_inverse_std, products, normalized),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        pooled, weight, bn_weight, bn_bias, logit_weight, invalid, *rest = ctx.saved_tensors
        share, count, logit_share, logit_count, mean, inverse_std, logit_inverse_std, products, normalized = rest
        if grad is None:
            grad = torch.zeros_like(normalized)
        is_batch, is_batch_of_logits = ctx.takes_batch
        group, logit_group = ctx.groups

        with _without_autocast(grad.device):
            if invalid is not None:
                grad = grad.masked_fill(invalid.unsqueeze(1), 0.0)
            to_logit_bias, to_logit_weight = grad.sum(), torch.dot(grad.flatten(), normalized.flatten())
            if is_batch_of_logits:
                sums = to_logit_bias, to_logit_weight
                by, total, product = _over_batch(sums, normalized.numel(), logit_share, logit_count, logit_group)
                grad = torch.addcmul(grad, normalized, product, value=-by).sub_(total, alpha=by)
                if invalid is not None:
                    grad.masked_fill_(invalid.unsqueeze(1), 0.0)
            grad = grad.flatten() * _affine(logit_inverse_std, logit_weight, None)

            to_bn_weight = torch.dot(grad, products)
            # What is added to all logits their norm takes away again, so the gradients of this rank's sum to 0.
            is_shift_lost = is_batch_of_logits and logit_group is None
            if is_shift_lost:
                to_bias, to_bn_bias = grad.new_zeros(2)
            else:
                to_bias = grad.sum()
                to_bn_bias = to_bias * weight.sum()
            scale = _affine(inverse_std, bn_weight, None)
            grad, row = grad * scale, weight.view(-1)
            centred = (pooled - mean).flatten(0, 1)
            to_weight = centred.T @ grad
            if bn_bias is not None and not is_shift_lost:
                to_weight = torch.addcmul(to_weight, to_bias, bn_bias)
            if not ctx.needs_input_grad[0] and group is None:
                to_pooled = None
            elif is_batch:
                by, total, product = _over_batch((to_bn_bias, to_bn_weight), pooled.numel(), share, count, group)
                centred.mul_(product * inverse_std * scale)
                if not is_shift_lost:
                    centred.add_(total * scale)
                to_pooled = centred.addr_(grad, row, beta=-by).view_as(pooled)
            else:
                to_pooled = torch.outer(grad, row).view_as(pooled)
        to_inputs = to_weight, to_bias, to_bn_weight, to_bn_bias, to_logit_weight, to_logit_bias
        given = (each.view(shape) if shape else None for each, shape in zip(to_inputs, ctx.shapes, strict=True))
        return to_pooled, *given, None, None, None


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return values.clone() if bias is None else values + bias
    return values * weight if bias is None else torch.addcmul(bias, values, weight)


def _statistics(values: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
    """Mean and variance that `norm` goes by. Of `values` that do not count, each is 0."""
    if norm.running is not None:  # copies, for the backward pass is to find them as they are
        mean, variance = (each.to(values.dtype, copy=True) for each in norm.running)
        return mean, variance
    if not values.numel():  # of a rank without pairs
        mean, variance = values.new_zeros(2)
    elif values.is_cuda:
        variance, mean = torch.var_mean(values, correction=0)
    else:  # a sixth of the time
        mean, variance = values.mean(), values.var(correction=0)
    if norm.group is None:
        if norm.share is None:
            return mean, variance
        # of all values to of those that count, in fp64: the difference of squares cancels
        of_all, share = mean.double(), norm.share.double()
        own = of_all / share
        variance = torch.addcmul(variance / share, own, of_all - own).clamp_(min=0.0)
        return own.to(values.dtype), variance.to(values.dtype)
    mean, variance = mean.double(), variance.double()
    moments = torch.stack([mean, torch.addcmul(variance, mean, mean)]) * values.numel()
    distributed.all_reduce(moments, group=norm.group)
    assert norm.num_values is not None
    mean, square = (moments / norm.num_values).unbind()
    return mean.to(values.dtype), torch.addcmul(square, mean, mean, value=-1.0).clamp_(min=0.0).to(values.dtype)


def _over_batch(
    sums: tuple[Tensor, Tensor], numel: int, share: Tensor | None, count: Tensor | None, group: Any
) -> tuple[float, Tensor, Tensor]:
    """A factor and two tensors whose products are the means over the batch of what `sums` are this rank's sums of."""
    if group is None:
        first, second = sums if share is None else (sums[0] / share, sums[1] / share)
        return 1.0 / max(numel, 1), first, second
    total = torch.stack([each.view(()) for each in sums])
    distributed.all_reduce(total, group=group)
    assert count is not None
    total = total / count
    return 1.0, total[0], total[1]


def pair_scores(
    pooled: Tensor, head: Head, *, evaluate: bool = False, invalid: Tensor | None = None
) -> tuple[Tensor, list[BatchStatistics]]:
    """Compute `logit_bn(fc(bn(pooled)))`, one score per pair.

    Running statistics stay as they are: the caller updates them by `update_running_statistics` when nothing can fail
    any more. Statistics are those of this rank's batch, or of all ranks' batches for a `SyncBatchNorm`.

    Args:
        pooled: `[P, K, 2S]`.
        head: the modules; `bn` is folded into `fc`.
        evaluate: use running statistics although the modules may be in training mode.
        invalid: bool `[P]`; rows that do not count, are in no statistic, and score NaN. None where all count.

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
    with _without_autocast(pooled.device):
        fc = _both_halves(parameters[1], pooled.shape[-1], pooled.dtype)
        affine, logit_affine = (_in_dtype(parameters[place], pooled.dtype) for place in (0, 2))
        num_rows: int | Tensor = pooled.shape[0]
        share = None
        if invalid is not None:
            num_rows = invalid.logical_not().sum(dtype=pooled.dtype)
            share = num_rows.clamp(min=1.0) / pooled.shape[0]
            pooled = pooled.masked_fill(invalid.view(-1, 1, 1), 0.0)
        modules = (head.bn, pooled.shape[1] * pooled.shape[2]), (head.logit_bn, pooled.shape[1])
        found = [_norm(head, module, num_rows, width, share, pooled, evaluate) for module, width in modules]
        norms, counts = zip(*found, strict=True)
        if any(norm.group is not None for norm in norms) and torch.is_grad_enabled() and not pooled.requires_grad:
            pooled = pooled.detach().requires_grad_()  # all ranks meet in the backward pass
        scores, mean, variance, logit_mean, logit_variance, *_ = applying(_Score)(
            pooled, *fc, *affine, *logit_affine, invalid, *norms
        )
    batches = (
        BatchStatistics(head.bn, mean, variance, *counts[0]),
        BatchStatistics(head.logit_bn, logit_mean, logit_variance, *counts[1]),
    )
    return scores, [batch for batch in batches if batch.norm.training and not evaluate and _tracks(batch.norm)]


def _without_autocast(device: torch.device) -> Any:
    """`torch.autocast(.., enabled=False)`, by what takes less time where no compiler needs to understand it."""
    return torch.autocast(device.type, enabled=False) if torch.compiler.is_compiling() else torch._C._DisableAutocast()


def _in_dtype(affine: Affine, dtype: torch.dtype) -> Affine:
    weight, bias = (each if each is None or each.dtype == dtype else each.to(dtype) for each in affine)
    return weight, bias


def _norm(
    head: Head, norm: nn.BatchNorm1d, num_rows: int | Tensor, width: int, share: Tensor | None, like: Tensor,
    evaluate: bool,
) -> tuple[_Norm, tuple[int | Tensor, int]]:  # fmt: skip
    """How a norm of the head gets its statistics in this call, and over how many rows of how many values."""
    if not uses_batch(norm, evaluate):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return _Norm(norm.eps, running=(norm.running_mean, norm.running_var)), (num_rows, width)
    group = head.statistics_group(norm, evaluate)
    if group is None:
        return _Norm(norm.eps, share=share), (num_rows, width)
    num_values = num_rows * width if isinstance(num_rows, Tensor) else like.new_full((), num_rows * width)
    distributed.all_reduce(num_values, group=group)
    return _Norm(norm.eps, num_values=num_values.clamp(min=1.0), group=group), (num_values, 1)


@torch.no_grad()
def update_running_statistics(statistics: list[BatchStatistics]) -> None:
    """Update every norm's running statistics once, as `BatchNorm1d` does: all of them, or none if this fails.

    A forward that activation checkpointing runs again has been counted before, and changes nothing.

    Args:
        statistics: as `pair_scores` returns them, no norm twice.
    """
    if is_recomputing() or not statistics:
        return
    norms, means, variances, rows, widths = (list(column) for column in zip(*statistics, strict=True))
    running = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    counters = [norm.num_batches_tracked for norm in norms]
    shares: Sequence[Any] = [1.0] * len(norms)
    if any(isinstance(count, Tensor) for count in rows):
        given = [
            count if isinstance(count, Tensor) else torch.full_like(variance, count)
            for variance, count in zip(variances, rows, strict=True)
        ]
        shares = [count.sign() for count in given]  # 0 where there are none
        tracked = [counter + (share > 0) for counter, share in zip(counters, shares, strict=True)]
        others = torch._foreach_clamp_min(torch._foreach_sub(torch._foreach_mul(given, widths), 1.0), 1.0)
        unbiased = torch._foreach_addcdiv(variances, variances, others)
    else:
        tracked = [*torch._foreach_add(counters, 1)]
        counts = [count * width for count, width in zip(rows, widths, strict=True)]
        unbiased = torch._foreach_mul(variances, [count / max(count - 1, 1) for count in counts])
    values: list[Tensor] = []
    weights: list[Any] = []
    for norm, mean, variance, share, number in zip(norms, means, unbiased, shares, tracked, strict=True):
        weight = share / number.clamp(min=1).to(mean.dtype) if norm.momentum is None else share * norm.momentum
        weight = _like(norm.running_mean, weight) if isinstance(weight, Tensor) else weight
        values += _like(norm.running_mean, mean), _like(norm.running_var, variance)
        weights += weight, weight
    if any(isinstance(weight, Tensor) for weight in weights):
        weights = [
            weight if isinstance(weight, Tensor) else torch.full_like(buffer, weight)
            for weight, buffer in zip(weights, running, strict=True)
        ]
    updated = torch._foreach_lerp(running, values, weights)
    torch._foreach_copy_(running + counters, [*updated, *tracked])  # one call: no signal comes between


def _like(buffer: Tensor, value: Tensor) -> Tensor:
    """A number `[]` as `[1]`, in the dtype of `buffer`."""
    return value.view(1) if value.dtype == buffer.dtype else value.to(buffer.dtype).view(1)


def _both_halves(fc: Affine, size: int, dtype: torch.dtype) -> Affine:
    """Weight `[1, 2S]` and bias `[1]` of `fc` over `size = 2S` pooled values; a shared `fc` counts for each half."""
    weight, bias = _in_dtype(fc, dtype)
    assert weight is not None
    if 2 * weight.shape[1] == size:
        return torch.cat([weight, weight], 1), None if bias is None else 2 * bias
    return weight, bias


@torch.no_grad()
def folded(head: Head, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold frozen norms into `fc`: a score is `weight [2S]` times the pair's pooled values, plus `shift []`.

    Args:
        head: the modules, both norms frozen.
        size: 2S.
        dtype: of the result.
    """
    scale, shift = _frozen(head.bn)
    weight, bias = _both_halves((head.fc.weight, head.fc.bias), size, torch.float64)
    assert weight is not None
    logit = shift * weight.sum()
    if bias is not None:
        logit = logit + bias
    outer_scale, outer_shift = _frozen(head.logit_bn)
    shift = outer_scale * logit + outer_shift
    return (outer_scale * scale * weight).squeeze(0).to(dtype), shift.squeeze(0).to(dtype)


def _frozen(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """A frozen norm of one channel as scale and shift, both `[1]`, in fp64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = _in_dtype((norm.weight, norm.bias), torch.float64)
    scale = _affine((norm.running_var.double() + norm.eps).rsqrt(), weight, None)
    return scale, _affine(-norm.running_mean.double(), scale, bias)


def check_pairs(pairs: int, head: Head, *, evaluate: bool = False) -> None:
    """Require more than one pair where `logit_bn` takes its statistics from them.

    Raises:
        ValueError: a single pair.
    """
    if pairs == 1 and uses_batch(head.logit_bn, evaluate) and not head.statistics_group(head.logit_bn, evaluate):
        raise ValueError("batch norm in training mode needs the scores of more than one pair, got 1; call eval() first")


def _tracks(norm: nn.BatchNorm1d) -> bool:
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return all(buffer is not None for buffer in buffers)  # `in` would compare tensors, which takes 100 microseconds


def uses_batch(norm: nn.BatchNorm1d, evaluate: bool) -> bool:
    """Whether `norm` goes by the statistics of the batch, as in training mode or without running ones."""
    return (norm.training and not evaluate) or norm.running_mean is None
