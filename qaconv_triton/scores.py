"""From maps to scores, in bounded memory; the compact `ClassScores`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional, ops
from .common.dtypes import accumulation_dtype
from .head import BatchStatistics, Head, folded, pair_scores

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
        background = self.values.new_full((self.values.shape[0], self.num_classes), fill)
        background.masked_fill_(self.classes[:, :1] < 0, torch.nan)
        return background.scatter_(1, self.classes.clamp(min=0), self.values)

    def to_sparse(self) -> Tensor:
        """Return the scores as a `torch.sparse_coo` tensor `[B, N]`."""
        rows = torch.arange(self.values.shape[0], device=self.values.device).unsqueeze(1).expand_as(self.classes)
        indices = torch.stack([rows.flatten(), self.classes.clamp(min=0).flatten()])
        shape = self.values.shape[0], self.num_classes
        with torch.sparse.check_sparse_tensor_invariants(False):  # torch 2.11 and 2.12 warn despite the argument
            return torch.sparse_coo_tensor(indices, self.values.flatten(), shape, device=self.values.device)


def score_gallery(
    head: Head, prob_fea: Tensor, gal_fea: Tensor, prob_occ: Tensor | None, gal_occ: Tensor | None, *, evaluate: bool
) -> tuple[Tensor, list[BatchStatistics]]:
    """Score every probe `[P, C, H, W]` against every gallery map `[G, C, H, W]`: `[P, G]`.

    In blocks of `MAP_BYTES` of prepared maps, where nothing needs them later.
    """
    dtype = functional.correlation_dtype(prob_fea)
    probe = functional.prepare_maps(prob_fea, prob_occ, dtype)
    probes, items = probe.shape[0], gal_fea.shape[0]

    def gallery(rows: slice | None) -> Tensor:
        if gal_fea is prob_fea and gal_occ is prob_occ:
            return probe if rows is None else probe[rows]
        if rows is None:  # a slice would have a gradient of its own
            return functional.prepare_maps(gal_fea, gal_occ, dtype)
        return functional.prepare_maps(gal_fea[rows], _rows(gal_occ, rows), dtype)

    step = max(1, MAP_BYTES // (4 * prob_fea.shape[1:].numel()))
    if max(probes, items) <= step or not head.needs_sums_only(evaluate=evaluate):
        return score_maps(head, probe, gallery(None), evaluate=evaluate)
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
    invalid: Tensor | None = None,
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
        return pair_scores(pooled, head, evaluate=evaluate, invalid=invalid)
    scores, statistics = pair_scores(pooled.flatten(0, 1).index_select(0, pairs).unsqueeze(1), head, evaluate=evaluate)
    return scores.squeeze(1), statistics


def k_best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row and their ids; equal ones in the order in which they come, NaN last."""
    order = torch.where(scores.isnan(), -torch.inf, scores).argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)
