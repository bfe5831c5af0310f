"""The k best gallery maps of every query: the gallery is streamed, and no matrix of all scores is held.

With a prefilter, as in retrieval with re-scoring, cosines of pooled maps select candidates and the matcher scores these
alone, by the lists of candidates that the class path takes as neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from .. import functional
from ..matcher import QAConv
from ..progress import Progress, show_progress
from ..scores import MAP_BYTES, score_maps
from ..validation import check_count, check_flag
from .sources import Held, in_blocks, is_array, read_chunks, read_maps

if TYPE_CHECKING:
    from .sources import Maps

MOST_QUERIES, MOST_ITEMS = 1024, 4096  # whose scores are sorted at a time


@torch.no_grad()
def rank_gallery(
    matcher: QAConv,
    query: Maps,
    gallery: Maps,
    k: SupportsIndex,
    *,
    query_occ: Maps | None = None,
    gallery_occ: Maps | None = None,
    prefilter: SupportsIndex | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the k gallery maps of largest score for every query, scored as `matcher.match` does, without gradients.

    The gallery is read once, in blocks that are moved to the matcher's device. Beside a block, memory is O(Q k), so the
    features may be larger than memory. Scores do not depend on the blocks but for rounding.

    Args:
        matcher: it stays as it is, its mode included.
        query: maps `[Q, C, H, W]`, float16, bfloat16, float32 or float64, on any device: a tensor, which may be
            memory-mapped, as `load_features` returns it, a NumPy array, as `np.memmap`, or an iterable of chunks
            `[m, C, H, W]` of either kind. An iterable is read into memory. Products are taken in the query's dtype.
        gallery: maps `[G, C, H, W]`, likewise. An iterable is read once, chunk by chunk, and never held.
        k: between 1 and G; with `prefilter` up to that.
        query_occ: visibility `[Q, 1, H, W]` in [0, 1], as an array or in chunks; with chunks of maps, in chunks of the
            same sizes, or as an array.
        gallery_occ: visibility `[G, 1, H, W]`, likewise.
        prefilter: score only so many gallery maps of each query, between k and G: those whose mean of normalised
            locations, weighted by visibility, has the largest cosine with the query's. It needs a gallery that can be
            read twice, not an iterable, and holds `[Q + G, C]` in fp32. The result is that of a full search as far as
            the candidates hold its best: `python -m bench.ranking` measures how far.
        progress: show it, by tqdm on a terminal, elsewhere as a line now and then.

    Returns:
        scores `[Q, k]`, descending, fp32 (fp64 for fp64), and the rows of the gallery int64 `[Q, k]`, both on the
        matcher's device; equal scores by ascending row. NaN comes after every number.

    Raises:
        TypeError: arguments of another type, maps that are not real floating-point arrays.
        ValueError: other sizes than the matcher's, numbers out of range, visibility of another number of maps, a
            prefilter of an iterable, a matcher whose norms have no running statistics. That an iterable gallery has
            fewer than k maps is raised at its end.

    Example:
        >>> from qaconv_triton.evaluation import rank_gallery
        >>> matcher, maps = QAConv(8, 4, 2), torch.randn(50, 8, 4, 2)
        >>> scores, indices = rank_gallery(matcher, maps[:5], maps, k=10)
        >>> indices.shape, indices[:, 0].tolist()  # each is most similar to itself
        (torch.Size([5, 10]), [0, 1, 2, 3, 4])
    """
    if not isinstance(matcher, QAConv):
        raise TypeError(f"matcher: expected a QAConv, got {type(matcher).__name__}")
    if not matcher._head.is_frozen(evaluate=True):
        raise ValueError(
            "matcher: its batch norms have no running statistics, so scores depend on the others of a block"
        )
    check_flag(progress, "progress")
    if prefilter is not None and not is_array(gallery):
        raise ValueError(
            f"prefilter={prefilter} reads the gallery twice: expected a tensor or a NumPy array, which may be "
            f"memory-mapped, got {type(gallery).__name__}"
        )
    k = check_count(k, "k", low=1, high=None, why="gallery maps of each query")
    sizes = {"channels": matcher.num_features, "height": matcher.height, "width": matcher.width}
    queries, size = read_maps(sizes, query, query_occ, "query", "query_occ"), 0
    if is_array(gallery):
        items = read_maps(sizes, gallery, gallery_occ, "gallery", "gallery_occ")
        size = len(items)
        check_count(k, "k", low=1, high=size, why=f"the gallery has {size} maps")
        if prefilter is not None:
            prefilter = check_count(prefilter, "prefilter", low=k, high=size, why=f"k is {k} of {size} gallery maps")
            with show_progress("ranking", "pairs", shown=progress) as report:
                candidates = _nearest_means(matcher, queries, items, prefilter)
                return _rank_candidates(matcher, queries, items, candidates, k, report)
    chunks = [items] if size else read_chunks(sizes, gallery, gallery_occ, "gallery", "gallery_occ")
    with show_progress("ranking", "pairs", shown=progress) as report:
        return _rank_all(matcher, queries, chunks, k, size, report)


def _maps_at_a_time(matcher: QAConv) -> int:
    return max(1, min(MOST_ITEMS, MAP_BYTES // (4 * matcher.num_features * matcher.height * matcher.width)))


def _best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, equal ones in the order in which they come, NaN last."""
    order = torch.where(scores.isnan(), -torch.inf, scores).argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def _rank_all(
    matcher: QAConv, queries: Held, chunks: Iterable[Held], k: int, size: int, report: Progress
) -> tuple[Tensor, Tensor]:
    """The k best of all maps of the chunks; `size` is their number, 0 where it is not known before."""
    device, first = matcher.fc.weight.device, 0
    starts = range(0, max(len(queries), 1), MOST_QUERIES)
    best: list[tuple[Tensor, Tensor]] = []
    for maps, visibility in in_blocks(chunks, _maps_at_a_time(matcher), device):
        ids = torch.arange(first, first + len(maps), device=device)
        for number, start in enumerate(starts):
            probe, probe_visibility = queries.rows(slice(start, start + MOST_QUERIES), device)
            scores, indices = matcher.match(probe, maps, probe_visibility, visibility), ids.expand(len(probe), -1)
            if first == 0:
                best.append(_best(scores, indices, k))
            else:
                both = torch.cat([best[number][0], scores], dim=1), torch.cat([best[number][1], indices], dim=1)
                best[number] = _best(*both, k)
            report(first * len(queries) + min(start + MOST_QUERIES, len(queries)) * len(maps), size * len(queries))
        first += len(maps)
    check_count(k, "k", low=1, high=first, why=f"the gallery has {first} maps")
    scores, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    return scores, indices


def _nearest_means(matcher: QAConv, queries: Held, items: Held, count: int) -> Tensor:
    """The `count` maps of each query whose means of normalised locations are nearest by cosine, int64 `[Q, count]`."""
    query_means, item_means = (
        torch.cat(
            [
                functional.prepare_maps(maps, visibility, torch.float32).mean(dim=(2, 3)).nan_to_num()
                for maps, visibility in in_blocks([held], _maps_at_a_time(matcher), matcher.fc.weight.device)
            ]
        )
        for held in (queries, items)
    )
    return functional.topk_cosine(query_means, item_means, count)[1]


def _rank_candidates(
    matcher: QAConv, queries: Held, items: Held, candidates: Tensor, k: int, report: Progress
) -> tuple[Tensor, Tensor]:
    """The k best of each query's candidates `[Q, M]`, which are gathered for some queries at a time."""
    device, most = candidates.device, _maps_at_a_time(matcher)
    candidates = candidates.sort(dim=1).values  # equal scores by ascending row
    best: list[tuple[Tensor, Tensor]] = []
    for ids in candidates.split(max(1, most // candidates.shape[1])):
        done = sum(len(part) for part, _ in best)
        maps, visibility = queries.rows(slice(done, done + len(ids)), device)
        dtype = functional.correlation_dtype(maps)
        probe = functional.prepare_maps(maps, visibility, dtype)
        scores = []
        for part in ids.split(most, dim=1):
            rows, places = part.unique(return_inverse=True)
            table = functional.prepare_maps(*items.rows(rows, device), dtype)
            scores.append(score_maps(matcher._head, probe, table, places, evaluate=True)[0])
        best.append(_best(torch.cat(scores, dim=1), ids, k))
        report((done + len(ids)) * ids.shape[1], candidates.numel())
    ranked_scores, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    return ranked_scores, indices
