"""Metrics of re-identification from ranked lists: CMC, mAP, mINP, by the protocol of Market-1501.

What shows the query's identity in the query's own camera is left out of its list, and so is junk. Average precision is
the mean, over a query's true matches, of the precision at the rank of each, as in fast-reid: not the trapezoid of the
Oxford protocol. (Zheng et al., ICCV 2015; mINP: Ye et al., TPAMI 2021, arXiv:2001.04193.)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..common.dtypes import accumulation_dtype
from ..functional import prepare_maps
from ..validation import check_count, check_index, check_layout, check_maps
from .sources import CPU, as_tensor, read_maps

if TYPE_CHECKING:
    import numpy as np

    from .sources import Array

    Integers = Tensor | Sequence[int] | np.ndarray[Any, Any]

NAMES_HINT = "; number names first, those of query and gallery together: np.unique(names, return_inverse=True)[1]"
PLACES = 2**22  # of lists that are looked at at a time
logger = logging.getLogger(__name__)


class QueryMetrics(NamedTuple):
    """How well each query is answered, `[Q]` each, fp64; NaN for a query without a true match in the gallery.

    Attributes:
        average_precision: the mean of the precision at the rank of each true match, 0 for one that is not listed.
        inverse_penalty: the number of true matches over the rank of the last of them, 0 if one is not listed.
        first_match: the rank of the first true match, from 1 on; infinite if none is listed.

    Examples:
        >>> precision = torch.tensor([1.0, 0.2, torch.nan])
        >>> QueryMetrics(precision, precision, 1 / precision).average_precision.nan_to_num(torch.inf).argmin().item()
        1
    """

    average_precision: Tensor
    inverse_penalty: Tensor
    first_match: Tensor


class ReIDMetrics(NamedTuple):
    """Means over the queries that have a true match in the gallery.

    Attributes:
        mAP: of the average precision.
        mINP: of the inverse negative penalty, the number of true matches over the rank of the last.
        cmc: fp64 `[ranks]`, the share of queries with a true match among the first 1, 2, ... of their lists.
        num_queries: how many have one. The others count in no mean; they are the rest of the lists.

    Examples:
        >>> ReIDMetrics(0.5, 0.25, torch.tensor([0.5, 0.75]), 4).to_dict(ranks=(1, 2, 10))
        {'Rank-1': 0.5, 'Rank-2': 0.75, 'mAP': 0.5, 'mINP': 0.25}
    """

    mAP: float
    mINP: float
    cmc: Tensor
    num_queries: int

    def to_dict(self, ranks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """The numbers by their usual names, for a log: `Rank-1`, ..., `mAP`, `mINP`; listed ranks only."""
        ranks = [check_count(rank, "ranks", low=1, high=None, why="a rank in a list") for rank in ranks]
        cmc = {f"Rank-{rank}": self.cmc[rank - 1].item() for rank in ranks if rank <= len(self.cmc)}
        return {**cmc, "mAP": self.mAP, "mINP": self.mINP}


def reid_metrics(
    indices: Tensor | Sequence[Sequence[int]] | np.ndarray[Any, Any],
    query_ids: Integers,
    gallery_ids: Integers,
    query_cameras: Integers | None = None,
    gallery_cameras: Integers | None = None,
    *,
    junk_ids: Sequence[int] = (-1,),
) -> ReIDMetrics:
    """Compute CMC, mAP and mINP of ranked lists by the protocol of Market-1501.

    A gallery item of the query's identity *and* camera is left out of its list; without cameras no item is, not even
    the query itself if the gallery has it. A true match that a list of k < G does not reach counts as never found: in
    average precision as 0, in mINP as an infinite rank. mAP and mINP are then lower bounds of those of full lists, and
    so is the CMC at ranks above k less the number of items that are left out of a list.

    Args:
        indices: integers `[Q, k]`, the rows of the gallery from best to worst, as `rank_gallery` returns them: a
            tensor, a list or an array. At -1 there is nothing, as where FAISS finds fewer than k.
        query_ids: identities `[Q]`, integers: a tensor, a list or an array.
        gallery_ids: identities `[G]`.
        query_cameras: cameras `[Q]`, with `gallery_cameras`.
        gallery_cameras: cameras `[G]`.
        junk_ids: identities of gallery items that are left out of every list, such as Market-1501's -1.

    Returns:
        `ReIDMetrics`, with k ranks of CMC. NaN throughout if no query has a true match; a warning is logged if some
        have none.

    Raises:
        TypeError: something else than integers.
        ValueError: shapes that do not fit, cameras of queries or gallery alone, a list that names an item twice.
        IndexError: an index outside `[0, G)` other than -1.

    Examples:
        >>> from qaconv_triton.evaluation import reid_metrics
        >>> metrics = reid_metrics(torch.tensor([[2, 0, 1]]), [7], [7, 7, 8])  # a wrong one comes first
        >>> [round(value, 3) for value in (metrics.mAP, metrics.mINP, *metrics.cmc.tolist())]
        [0.583, 0.667, 0.0, 1.0, 1.0]
    """
    indices = as_tensor(indices, "indices", "integers [Q, k]")
    of_queries = query_metrics(indices, query_ids, gallery_ids, query_cameras, gallery_cameras, junk_ids=junk_ids)
    return mean_metrics(of_queries, indices.shape[1])


def mean_metrics(of_queries: QueryMetrics, ranks: int) -> ReIDMetrics:
    """The means of the metrics of queries, whose lists are `ranks` long."""
    counted = ~of_queries.average_precision.isnan()
    num_queries = int(counted.sum())
    if num_queries < len(counted):
        logger.warning("%d of %d queries have no true match and do not count", len(counted) - num_queries, len(counted))
    precision, penalty, first = (values[counted] for values in of_queries)
    found = first[first.isfinite()].long()
    cmc = torch.bincount(found, minlength=ranks + 1)[1:].cumsum(0).double() / num_queries
    return ReIDMetrics(precision.mean().item(), penalty.mean().item(), cmc.cpu(), num_queries)


def query_metrics(
    indices: Tensor | Sequence[Sequence[int]] | np.ndarray[Any, Any],
    query_ids: Integers,
    gallery_ids: Integers,
    query_cameras: Integers | None = None,
    gallery_cameras: Integers | None = None,
    *,
    junk_ids: Sequence[int] = (-1,),
) -> QueryMetrics:
    """Compute what `reid_metrics` takes the means of, query by query: to find the worst, or for intervals.

    Args:
        indices: as of `reid_metrics`, like all others.
        query_ids: `[Q]`.
        gallery_ids: `[G]`.
        query_cameras: `[Q]`.
        gallery_cameras: `[G]`.
        junk_ids: identities.

    Returns:
        `QueryMetrics`, on the device of `indices`.

    Raises:
        TypeError, ValueError, IndexError: as `reid_metrics`.

    Examples:
        >>> from qaconv_triton.evaluation import query_metrics
        >>> query_metrics(torch.tensor([[2, 0], [0, 1]]), [7, 8], [7, 7, 8]).first_match.tolist()
        [2.0, inf]
    """
    indices = as_tensor(indices, "indices", "integers [Q, k]")
    check_integers(indices, "indices")
    if indices.dim() != 2 or indices.shape[1] == 0:
        raise ValueError(f"indices: expected shape [Q, k] with k of at least 1, got {list(indices.shape)}")
    device, (queries, ranks) = indices.device, indices.shape
    ids, items = (as_integers(v, n, device) for v, n in ((query_ids, "query_ids"), (gallery_ids, "gallery_ids")))
    if len(ids) != queries:
        raise ValueError(f"query_ids: expected [{queries}] for indices {list(indices.shape)}, got {list(ids.shape)}")
    check_cameras(query_cameras, gallery_cameras, "query_cameras", "gallery_cameras")
    is_junk = torch.isin(items, as_integers(junk_ids, "junk_ids", device))
    cameras = item_cameras = None
    if query_cameras is not None and gallery_cameras is not None:
        cameras = as_integers(query_cameras, "query_cameras", device, len(ids), "query_ids")
        item_cameras = as_integers(gallery_cameras, "gallery_cameras", device, len(items), "gallery_ids")
    matches = _count(ids, items[~is_junk])
    if cameras is not None and item_cameras is not None:
        pairs = _pair_numbers(torch.cat([ids, items]), torch.cat([cameras, item_cameras]))
        matches = matches - _count(pairs[: len(ids)], pairs[len(ids) :][~is_junk])
    items, is_junk = torch.cat([items, items.new_zeros(1)]), torch.cat([is_junk, is_junk.new_ones(1)])  # the one at -1
    if item_cameras is not None:
        item_cameras = torch.cat([item_cameras, item_cameras.new_zeros(1)])
    results = []
    step = max(1, PLACES // ranks)
    for start in range(0, max(queries, 1), step):
        rows = slice(start, start + step)
        places = indices[rows].long()
        check_index(places[places != -1], len(items) - 1, "indices", "gallery items")
        check_distinct(places, "indices", start)
        of_rows = ids[rows], None if cameras is None else cameras[rows]
        hit, left_out = hits_of_lists(places, *of_rows, items, item_cameras, is_junk)
        results.append(_of_block(hit & ~left_out, left_out, matches[rows]))
    return QueryMetrics(*(torch.cat(parts) for parts in zip(*results, strict=True)))


def hits_of_lists(
    places: Tensor,
    ids: Tensor,
    cameras: Tensor | None,
    items: Tensor,
    item_cameras: Tensor | None,
    is_junk: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the protocol makes of lists `[q, k]` of queries `[q]` over items `[G]`: hits, and what is left out."""
    hit, left_out = items[places] == ids.unsqueeze(1), is_junk[places]
    if cameras is not None and item_cameras is not None:
        left_out = left_out | (hit & (item_cameras[places] == cameras.unsqueeze(1)))
    return hit, left_out


def _of_block(hit: Tensor, left_out: Tensor, matches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average precision, inverse negative penalty and first rank of some lists `[q, k]` of bool; `matches [q]`."""
    rank = (~left_out).cumsum(dim=1).double()  # within the list as it is without what is left out
    found = hit.cumsum(dim=1)
    precision = torch.where(hit, found / rank, 0.0).sum(dim=1) / matches  # 0 / 0 where there is no true match
    first, last = torch.where(hit, rank, torch.inf).amin(dim=1), torch.where(hit, rank, 0.0).amax(dim=1)
    penalty = torch.where(found[:, -1] == matches, matches / last, 0.0)
    has_match = matches > 0
    return precision, torch.where(has_match, penalty, torch.nan), torch.where(has_match, first, torch.nan)


def average_queries(
    maps: Array, ids: Integers, cameras: Integers | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge the queries of one identity and camera to one, for the multi-query protocol: the mean of their maps.

    Each map is normalised over C at every location before, so that each counts alike. (Zheng et al., ICCV 2015, whose
    features are vectors, averages them likewise.)

    Args:
        maps: `[M, C, H, W]`, float16, bfloat16, float32 or float64: a tensor, which may be memory-mapped, or an array.
        ids: identities `[M]`, integers.
        cameras: `[M]`; without them all queries of an identity are merged.

    Returns:
        maps `[Q, C, H, W]` in the dtype of `maps`, identities int64 `[Q]` and cameras int64 `[Q]` (None without), in
        ascending order.

    Raises:
        TypeError, ValueError: maps, identities or cameras of another type or shape.

    Examples:
        >>> from qaconv_triton.evaluation import average_queries
        >>> maps, ids, cameras = average_queries(torch.randn(5, 8, 4, 2), [3, 3, 1, 3, 1], [0, 0, 0, 1, 0])
        >>> ids.tolist(), cameras.tolist()
        ([1, 3, 3], [0, 0, 1])
    """
    if not isinstance(maps, Tensor):
        maps = read_maps({}, maps, None, "maps", "").rows(slice(None), CPU)[0]
    check_maps(maps, "maps")
    keys = [as_integers(ids, "ids", maps.device, len(maps), "maps")]
    if cameras is not None:
        keys.append(as_integers(cameras, "cameras", maps.device, len(maps), "maps"))
    merged, group = torch.stack(keys).unique(dim=1, return_inverse=True)
    unit = prepare_maps(maps, None, accumulation_dtype(maps.dtype))
    order = group.argsort(stable=True)
    counts = group.bincount(minlength=merged.shape[1])
    means = [unit[rows].mean(dim=0) for rows in order.split(counts.tolist())]
    result = torch.stack(means) if means else unit
    return result.to(maps.dtype), merged[0], merged[1] if cameras is not None else None


def check_cameras(query: object, gallery: object, query_name: str, gallery_name: str) -> None:
    """Require cameras of queries and of gallery, or None of both.

    Raises:
        ValueError: one of them alone.
    """
    if (query is None) != (gallery is None):
        given = query_name if gallery is None else gallery_name
        raise ValueError(f"{query_name} and {gallery_name} come together, got {given} alone")


def as_integers(values: Any, name: str, device: torch.device, count: int | None = None, owner: str = "") -> Tensor:
    """Integers of any kind as int64 `[M]` on `device`, M = `count` where given, the length of `owner`.

    Raises:
        TypeError: something else than integers.
        ValueError: another shape.
    """
    tensor = as_tensor(values, name, "integers", NAMES_HINT).detach()
    if tensor.numel():  # an empty list makes a tensor of floats
        check_integers(tensor, name)
    if tensor.dim() == 0:
        raise ValueError(f"{name}: expected a list of integers, such as ({values},), got {values}")
    if tensor.dim() != 1 or (count is not None and len(tensor) != count):
        expected = "[M]" if count is None else f"[{count}], as {owner} has {count}"
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    return tensor.to(device, torch.int64).contiguous()  # rows of a strided tensor, such as ids[::2]


def check_integers(tensor: Tensor, name: str) -> None:
    """Require an integer dtype.

    Raises:
        TypeError: another dtype or layout.
    """
    check_layout(tensor, name)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")


def check_distinct(indices: Tensor, name: str, first: int = 0) -> None:
    """Require every row of `indices` to name an item once at most, -1 aside; `first` is the number of the first row.

    Raises:
        ValueError: naming the first row that does not.
    """
    ordered = indices.sort(dim=1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(dim=1)
    if bool(repeated.any()):
        row = first + int(repeated.nonzero()[0])
        raise ValueError(f"{name}: expected every item at most once a row, got row {row} with repeats")


def _count(values: Tensor, table: Tensor) -> Tensor:
    """How often each of `values [Q]` is in `table [G]`."""
    ordered = table.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _pair_numbers(first: Tensor, second: Tensor) -> Tensor:
    """A number for every pair of integers, the same for the same pair."""
    (_, numbers), (others, other_numbers) = (values.unique(return_inverse=True) for values in (first, second))
    pairs: Tensor = numbers * len(others) + other_numbers
    return pairs
