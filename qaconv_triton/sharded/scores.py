"""The class path of a sharded table: probes travel to the shards that own their classes, and scores come back.

Maps of classes never move. Each rank brings its own batch; sizes may differ and may be zero. Every rank gets all probes
and labels, looks up the labels that it owns, and scores the pairs whose classes it owns; norms take their statistics
over the pairs of all ranks. Gradients to the probes are those of the sum of the ranks' losses, to the parameters those
of their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional as F

from .. import functional
from ..common.dtypes import accumulation_dtype
from ..distributed import Agreement
from ..head import BatchStatistics, Head, uses_batch
from ..scores import ClassScores, score_maps
from ..validation import check_labels
from .table import chunk_rows, rows_at, rows_of

if TYPE_CHECKING:
    from ..matcher import QAConv


@dataclass(frozen=True)
class _Batches:
    """The batches of all ranks of the mesh, of these sizes, one after the other; `b` samples are this rank's.

    `needs_grad`: the features of some rank do. All ranks meet in the backward pass then. `dtype`: of the correlation.
    """

    mesh: DeviceMesh
    sizes: list[int]
    needs_grad: bool
    dtype: torch.dtype

    @property
    def own_rows(self) -> slice:
        """Where this rank's samples are among those of all."""
        rank = self.mesh.get_local_rank()
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def gathered(self, values: Tensor, counts: Tensor | None = None) -> Tensor:
        """The samples `[b, ...]` of all ranks, `[sum of b, ...]`, or each of these `counts [sum of b]` times.

        The gradient is the sum of the ranks' gradients, times their number: scores return it divided.
        """
        padded = F.pad(values, (0, 0) * (values.dim() - 1) + (0, self._longest - len(values)))
        local = DTensor.from_local(padded.contiguous(), self.mesh, [Shard(0)], run_check=False)
        everyone = local.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        places = self._places(values.device)
        taken: Tensor = _Repeated.apply(everyone, places, counts, self.mesh.size())  # type: ignore[no-untyped-call]
        return taken

    def sum_returned(self, parts: Tensor) -> Tensor:
        """This rank's rows of the sum over the ranks of `parts [sum of b, ...]`, differentiable: `[b, ...]`."""
        return self._returned(parts, Partial())

    def columns_returned(self, columns: Tensor, total: int) -> Tensor:
        """This rank's rows of all ranks' `columns [sum of b, n]`, which are `total`, differentiable: `[b, total]`."""
        padded = F.pad(columns, (0, chunk_rows(total, self.mesh) - columns.shape[1]))
        return self._returned(padded, Shard(1))[:, :total]

    def _returned(self, rows: Tensor, placement: Placement) -> Tensor:
        padded = rows.new_zeros(len(self.sizes) * self._longest, *rows.shape[1:])
        padded = padded.index_copy(0, self._places(rows.device), rows)
        local = DTensor.from_local(padded, self.mesh, [placement], run_check=False)
        own: Tensor = local.redistribute(placements=[Shard(0)]).to_local()[: self.sizes[self.mesh.get_local_rank()]]
        if own.requires_grad and self.mesh.size() > 1:
            # The gradient is divided while it is small: sums over the ranks, as of the table, are those of a mean then.
            own.register_hook(lambda grad: grad / self.mesh.size())
        return own

    @property
    def _longest(self) -> int:
        return max(1, *self.sizes)

    def _places(self, device: torch.device) -> Tensor:
        """Where the samples are in batches that are padded to the longest."""
        sizes = enumerate(self.sizes)
        return torch.cat([torch.arange(size, device=device) + rank * self._longest for rank, size in sizes])


class _Repeated(torch.autograd.Function):
    """The rows of `values` at `places`, all different, each `counts` times (once where None).

    The gradient is summed in fp32, and in the order of the rows: with `index_select` CUDA would add in any order. It is
    multiplied by `factor`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, counts: Tensor | None, factor: int) -> Tensor:
        ctx.places, ctx.counts, ctx.factor, ctx.num_rows = places, counts, factor, len(values)
        return values.index_select(0, places if counts is None else places.repeat_interleave(counts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        wide = grad.to(accumulation_dtype(grad.dtype)).contiguous()
        if ctx.counts is not None:
            wide = torch.segment_reduce(wide, "sum", lengths=ctx.counts, unsafe=True)
        wide = wide.mul(ctx.factor) if wide is grad else wide.mul_(ctx.factor)
        total = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return total.index_copy_(0, ctx.places, wide.to(grad.dtype)), None, None, None


class _LocalPairs(NamedTuple):
    """The pairs of probes and neighbours that this rank owns, as the op takes them: in rows of equal length.

    A probe's neighbours here are cut into such rows, the last of which is filled up with -1.

    Attributes:
        places: int64 `[Q]`, the pairs in the flattened `[P, K]` of all probes and neighbours.
        counts: int64 `[P]`, the rows of every probe, which come one after the other.
        neighbors: int64 `[R, length]`, rows of this rank's shard.
        group: int64 `[R]`; rows of equal group are equal.
        positions: int64 `[Q]`, the pairs in the flattened `neighbors`.
    """

    places: Tensor
    counts: Tensor
    neighbors: Tensor
    group: Tensor
    positions: Tensor


def score_neighbors(
    matcher: QAConv, prob_fea: Tensor, labels: Tensor, prob_occ: Tensor | None
) -> tuple[ClassScores, list[BatchStatistics], Tensor]:
    """Score samples against their classes' neighbours, as `QAConv._score_neighbors`; all ranks call it together."""
    table = matcher._class_table()
    assert isinstance(table, DTensor)
    mesh, num_classes = table.device_mesh, table.shape[0]
    agreement = Agreement(mesh, table.device)
    with agreement:
        matcher._check_maps(prob_fea, prob_occ, "prob_fea", "prob_occ")
        labels = check_labels(labels, prob_fea.shape[0], num_classes, prob_fea.device)
        graph = matcher._fitting_graph()
        agreement.lacks_graph = graph is None
        _agree_on_batch(agreement, matcher, prob_fea, prob_occ)
    batches = _Batches(mesh, agreement.sizes, agreement.needs_grad, agreement.dtype)
    neighbors = matcher._search_neighbors() if graph is None or agreement.lacks_graph else graph
    assert isinstance(neighbors, DTensor)
    with torch.no_grad():
        targets = batches.gathered(labels)
        index = rows_at(neighbors, targets)
        if matcher.include_self:
            own_class = torch.where((targets >= 0) & (targets < num_classes), targets, -1)
            index = torch.cat([index, own_class.unsqueeze(1)], dim=1)
        pairs = _local_pairs(index, targets, num_classes, mesh)
    probe = _gathered_probes(batches, prob_fea, prob_occ, pairs.counts)
    scores, statistics = score_maps(
        _summing_head(matcher), probe, _own_shard(table), pairs.neighbors, pairs.group, raw=True, pairs=pairs.positions
    )
    parts = scores.new_zeros(index.numel()).index_copy(0, pairs.places, scores).view(index.shape)
    classes = index[batches.own_rows]
    values = torch.where(classes < 0, torch.nan, batches.sum_returned(parts))
    return ClassScores(values, classes, num_classes), statistics, neighbors


def score_classes(matcher: QAConv, prob_fea: Tensor, prob_occ: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
    """Score samples against every class, `[B, N]`; all ranks call it together."""
    table = matcher._class_table()
    assert isinstance(table, DTensor)
    agreement = Agreement(table.device_mesh, table.device)
    with agreement:
        matcher._check_maps(prob_fea, prob_occ, "prob_fea", "prob_occ")
        _agree_on_batch(agreement, matcher, prob_fea, prob_occ)
    batches = _Batches(table.device_mesh, agreement.sizes, agreement.needs_grad, agreement.dtype)
    probe = _gathered_probes(batches, prob_fea, prob_occ)
    scores, statistics = score_maps(_summing_head(matcher), probe, _own_shard(table), raw=True)
    return batches.columns_returned(scores, table.shape[0]), statistics


def _agree_on_batch(agreement: Agreement, matcher: QAConv, maps: Tensor, visibility: Tensor | None) -> None:
    """Tell the other ranks what this one brings, and what the matcher is to do with it."""
    agreement.size, agreement.dtype = len(maps), functional.correlation_dtype(maps)
    agreement.needs_grad = maps.requires_grad or (visibility is not None and visibility.requires_grad)
    settings = f"k_nearest={matcher.k_nearest}, include_self={matcher.include_self}"
    agreement.settings = f"{_mode(matcher)}, {settings}"


def agree_on_pairs(agreement: Agreement, matcher: QAConv, maps: Tensor) -> None:
    """Likewise for pairs of maps, which stay on their rank: what norms sum over the ranks is to be of one dtype."""
    agreement.size, agreement.dtype = 1, accumulation_dtype(functional.correlation_dtype(maps))
    agreement.settings = _mode(matcher)


def _mode(matcher: QAConv) -> str:
    """What decides where the ranks meet: statistics in the forward pass, and whether there is a backward pass."""
    norms = {"bn": matcher.bn, "logit_bn": matcher.logit_bn}
    used = {name: "batch" if uses_batch(norm, evaluate=False) else "running" for name, norm in norms.items()}
    statistics = " and ".join(f"{kind} statistics in {name}" for name, kind in used.items())
    return f"{statistics}, gradients {'enabled' if torch.is_grad_enabled() else 'disabled'}"


def _own_shard(table: DTensor) -> Tensor:
    shard: Tensor = table.to_local(grad_placements=[Shard(0)])
    return shard


def _summing_head(matcher: QAConv) -> Head:
    """The head for scores whose gradients are divided where they return."""
    return matcher._head._replace(is_mean=False)


def _gathered_probes(
    batches: _Batches, maps: Tensor, visibility: Tensor | None, counts: Tensor | None = None
) -> Tensor:
    """The prepared maps of all ranks, each `counts` times (once where None), channels-last."""
    prepared = functional.prepare_maps(maps, visibility, batches.dtype)
    if batches.needs_grad and torch.is_grad_enabled() and not prepared.requires_grad:
        prepared = prepared.detach().requires_grad_()
    return batches.gathered(prepared.permute(0, 2, 3, 1), counts).permute(0, 3, 1, 2)


def _local_pairs(index: Tensor, targets: Tensor, num_classes: int, mesh: DeviceMesh) -> _LocalPairs:
    """The pairs of `index [P, K]` whose classes this rank owns. Probes of equal targets have equal rows."""
    rows, (count, neighbors) = rows_of(num_classes, mesh), index.shape
    length = max(1, -(-neighbors // (2 * mesh.size())))  # half of what is expected of a probe: little to fill up
    is_own = (index >= rows.start) & (index < rows.stop)
    order = is_own.long().cumsum(1) - 1  # among a probe's neighbours here
    row_counts = (is_own.sum(1) + length - 1) // length
    first_row = row_counts.cumsum(0) - row_counts
    places = is_own.flatten().nonzero().squeeze(1)
    probes = torch.arange(count, device=index.device).repeat_interleave(row_counts)
    order = order.flatten()[places]
    positions = (first_row[places // neighbors] + order // length) * length + order % length
    local = index.new_full((len(probes) * length,), -1)
    local[positions] = index.flatten()[places] - rows.start
    part = torch.arange(len(probes), device=index.device) - first_row[probes]
    return _LocalPairs(places, row_counts, local.view(-1, length), targets[probes] * neighbors + part, positions)
