"""k-reciprocal re-ranking of short lists, with memory for the lists and not for all pairs.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, arXiv:1701.08398.
"""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from ..validation import check_count, check_index, check_number
from .reid import check_distinct, check_integers
from .sources import CPU

ROWS = 256  # of lists at a time
PLACES = 2**15  # of lists whose encodings are gathered at a time


class SparseRows(NamedTuple):
    """Rows with few entries each, in compressed form: those of row i lie from `starts[i]` to `starts[i + 1]`."""

    starts: Tensor
    columns: Tensor
    values: Tensor

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of `rows [R]`: which of these rows each is in, its column, its value."""
        counts = self.starts[rows + 1] - self.starts[rows]
        places = torch.arange(len(rows), device=CPU).repeat_interleave(counts)
        within = torch.arange(len(places), device=CPU) - (counts.cumsum(0) - counts)[places]
        entries = self.starts[rows][places] + within
        return places, self.columns[entries], self.values[entries]


def k_reciprocal_rerank(
    ranking: tuple[Tensor, Tensor],
    neighbors: tuple[Tensor, Tensor],
    *,
    k1: SupportsIndex = 20,
    k2: SupportsIndex = 6,
    lambda_value: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Order every query's list anew, by how far the neighbours of the query and of the listed items are the same ones.

    As published, but for what lists leave open. The distance of item j to item i falls from 1 to 0 with the score,
    linearly: `d = (best - score) / (best - last)`, where `best` and `last` are the largest and the smallest score that
    the list of i in `neighbors` has besides that of i itself. Scores of a matcher are logits, of any sign and scale;
    this distance does not change when they are shifted or scaled. `d(i, i)` is 0, and what the list of i does not have
    is at distance 1, also in `ranking`. With lists of all items this is the published algorithm over these distances.
    With shorter ones, 50 to 100 long, memory is O((Q + G) n + Q k). The result is computed on the CPU in fp64.

    Args:
        ranking: scores and indices `[Q, k]`, as `rank_gallery(matcher, query, gallery, k)` returns them.
        neighbors: scores and indices `[Q + G, n]`, n > k1, of queries and gallery among themselves, as
            `rank_gallery(matcher, both, both, n)` returns them, with both = [query, gallery]. That is (Q + G)^2 pairs;
            with `prefilter`, both is `torch.cat([query, gallery])`.
        k1: neighbours that must be mutual.
        k2: nearest items, the item itself among them, whose encodings are averaged; 1 to k1 + 1.
        lambda_value: weight of the distance by the score, beside that by the neighbours; between 0 and 1.

    Returns:
        scores `[Q, k]`, descending, one minus the combined distance, at most 1; indices `[Q, k]`, those of `ranking` in
        another order; equal scores in its order. Both in the dtype and on the device of `ranking`.

    Raises:
        TypeError: something else than pairs of floating-point and integer tensors, or than numbers.
        ValueError: shapes that do not fit, numbers out of range, scores that ascend or are not finite, a list with an
            item twice.
        IndexError: indices outside the gallery, or outside queries and gallery.

    Examples:
        >>> from qaconv_triton.evaluation import k_reciprocal_rerank, rank_gallery
        >>> matcher, query, gallery = QAConv(8, 4, 2), torch.randn(3, 8, 4, 2), torch.randn(40, 8, 4, 2)
        >>> both = [query, gallery]
        >>> ranking, neighbors = rank_gallery(matcher, query, gallery, k=30), rank_gallery(matcher, both, both, k=30)
        >>> scores, indices = k_reciprocal_rerank(ranking, neighbors)
        >>> scores.shape
        torch.Size([3, 30])
    """
    scores, indices = _checked_lists(ranking, "ranking")
    all_scores, near = _checked_lists(neighbors, "neighbors")
    queries, items = len(scores), len(near)
    if queries >= items:
        raise ValueError(f"neighbors: expected lists of {queries} queries and a gallery, got {list(near.shape)}")
    check_index(indices, items - queries, "ranking", "gallery items")
    check_index(near, items, "neighbors", "queries and gallery items")
    k1 = check_count(
        k1, "k1", low=1, high=near.shape[1] - 1, why=f"lists of neighbors {list(near.shape)}, itself aside"
    )
    k2 = check_count(k2, "k2", low=1, high=k1 + 1, why=f"k1 is {k1}")
    lambda_value = check_number(lambda_value, "lambda_value", why="a weight")
    if lambda_value > 1:
        raise ValueError(f"lambda_value must be between 0 and 1 (a weight), got {lambda_value}")

    is_self = near == torch.arange(items, device=CPU).unsqueeze(1)
    best = all_scores.masked_fill(is_self, -torch.inf).amax(dim=1, keepdim=True)
    last = all_scores.masked_fill(is_self, torch.inf).amin(dim=1, keepdim=True)
    distance = _distance(all_scores, best, last).masked_fill(is_self, 0.0)
    others = is_self.to(torch.uint8).argsort(dim=1, stable=True)[:, :k1]  # wherever the item itself stands
    nearest = torch.cat([torch.arange(items, device=CPU).unsqueeze(1), near.gather(1, others)], dim=1)
    encoding = _encode(nearest, near, distance)
    if k2 > 1:
        encoding = _average(encoding, nearest[:, :k2])

    combined = _distance(scores, best[:queries], last[:queries]) * lambda_value
    step = max(1, min(ROWS, PLACES // indices.shape[1]))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        combined[rows] += (1 - lambda_value) * _jaccard_distance(encoding, start, indices[rows] + queries)
    order = combined.argsort(dim=1, stable=True)
    ranked = (1 - combined).gather(1, order).to(ranking[0]), indices.gather(1, order).to(ranking[1])
    return ranked


def _distance(scores: Tensor, best: Tensor, last: Tensor) -> Tensor:
    distance = torch.where(best > last, ((best - scores) / (best - last)).clamp(min=0), 0.0)
    return torch.where(scores < last, 1.0, distance)  # an item that is not in the list


def _reciprocal(nearest: Tensor) -> Tensor:
    """Whether each of an item's nearest `[M, k]` has the item among its own, bool `[M, k]`."""
    ids = torch.arange(len(nearest), device=CPU)
    pairs = zip(nearest.split(ROWS), ids.split(ROWS), strict=True)
    return torch.cat([(nearest[near] == own[:, None, None]).any(2) for near, own in pairs])


def _encode(nearest: Tensor, near: Tensor, distance: Tensor) -> SparseRows:
    """The weights of each item's k-reciprocal neighbours and of theirs (sections 3.2 and 3.3 of the paper)."""
    items, half = len(nearest), nearest[:, : round((nearest.shape[1] - 1) / 2) + 1]
    is_mutual, is_half_mutual = _reciprocal(nearest), _reciprocal(half)
    counts, columns, values = [], [], []
    for start in range(0, items, ROWS):
        rows = slice(start, start + ROWS)
        mutual, is_member = nearest[rows], is_mutual[rows]
        theirs, is_theirs = half[mutual], is_half_mutual[mutual]  # [b, k1 + 1, half + 1]
        shared = ((theirs.unsqueeze(3) == mutual[:, None, None]) & is_member[:, None, None]).any(3) & is_theirs
        is_added = is_member & (3 * shared.sum(2) > 2 * is_theirs.sum(2))
        offset = torch.arange(len(mutual), device=CPU).unsqueeze(1) * items  # a key for every row and column
        added = (theirs + offset.unsqueeze(2))[is_theirs & is_added.unsqueeze(2)]
        keys = torch.cat([(mutual + offset)[is_member], added]).unique()
        listed, order = (near[rows] + offset).flatten().sort()
        place = torch.searchsorted(listed, keys).clamp(max=len(listed) - 1)
        known = distance[rows].flatten()[order][place]
        own = torch.where(keys // items + start == keys % items, 0.0, 1.0)
        weights = torch.exp(-torch.where(listed[place] == keys, known, own))
        row = keys // items
        sums = torch.zeros(len(mutual), dtype=torch.float64, device=CPU).index_add_(0, row, weights)
        counts.append(row.bincount(minlength=len(mutual)))
        columns.append(keys % items)
        values.append(weights / sums[row])
    return _sparse_rows(counts, columns, values)


def _average(encoding: SparseRows, groups: Tensor) -> SparseRows:
    """The mean encoding of each row's group `[M, k2]` (local query expansion, section 3.4)."""
    items, size = groups.shape
    counts, columns, values = [], [], []
    for group in groups.split(ROWS):
        place, column, value = encoding.of(group.flatten())
        keys, entry = (place // size * items + column).unique(return_inverse=True)
        counts.append((keys // items).bincount(minlength=len(group)))
        columns.append(keys % items)
        values.append(torch.zeros(len(keys), dtype=torch.float64, device=CPU).index_add_(0, entry, value / size))
    return _sparse_rows(counts, columns, values)


def _jaccard_distance(encoding: SparseRows, start: int, candidates: Tensor) -> Tensor:
    """Of the queries from `start` on to their candidates `[b, k]` (eq. 10); both encodings have the sum 1."""
    rows, size = candidates.shape
    place, column, value = encoding.of(torch.arange(start, start + rows, device=CPU))
    dense = torch.zeros(rows, len(encoding.starts) - 1, dtype=torch.float64, device=CPU)
    dense[place, column] = value
    place, column, value = encoding.of(candidates.flatten())
    smaller = torch.minimum(value, dense[place // size, column])
    shared = torch.zeros(rows * size, dtype=torch.float64, device=CPU).index_add_(0, place, smaller)
    return (1 - shared / (2 - shared)).view(rows, size)


def _sparse_rows(counts: list[Tensor], columns: list[Tensor], values: list[Tensor]) -> SparseRows:
    ends = torch.cat(counts).cumsum(0)
    return SparseRows(torch.cat([torch.zeros_like(ends[:1]), ends]), torch.cat(columns), torch.cat(values))


def _checked_lists(lists: tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Scores in fp64 and indices int64, on the CPU."""
    if not isinstance(lists, tuple | list) or len(lists) != 2 or not all(isinstance(part, Tensor) for part in lists):
        raise TypeError(
            f"{name}: expected scores and indices, as rank_gallery returns them, got {type(lists).__name__}"
        )
    scores, indices = lists
    check_integers(indices, name)
    if not scores.is_floating_point():
        raise TypeError(f"{name}: expected floating-point scores, got {scores.dtype}")
    if scores.dim() != 2 or scores.shape != indices.shape or 0 in scores.shape:
        raise ValueError(
            f"{name}: expected scores and indices alike, got {list(scores.shape)} and {list(indices.shape)}"
        )
    scores, indices = scores.detach().cpu().double(), indices.cpu().long()
    is_wrong = ~torch.isfinite(scores).all(dim=1) | (scores.diff(dim=1) > 0).any(dim=1)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        places = ", ".join(f"{score:g}" for score in scores[row, :4].tolist() + scores[row, -1:].tolist())
        raise ValueError(
            f"{name}: expected finite scores in descending order, got {int(is_wrong.sum())} of {len(scores)} lists "
            f"with others, first row {row}: its first four scores and the last are {places}"
        )
    check_distinct(indices, name)
    return scores, indices
