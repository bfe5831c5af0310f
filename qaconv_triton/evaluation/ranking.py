"""The k best gallery maps of every query: the gallery is streamed, and no matrix of all scores is held.

With a prefilter, cosines of flattened maps select candidates, and the matcher scores these alone: lists of candidates
are to it what lists of neighbours are on the class path. Pooled maps cost less, but lose more: docs/evaluation.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import functional
from ..common.dtypes import accumulation_dtype
from ..matcher import QAConv
from ..progress import Progress, show_progress
from ..scores import MAP_BYTES, k_best, score_maps
from ..validation import check_count, check_flag
from .sources import Held, check_iterable, in_blocks, is_array, read_chunks, read_maps

if TYPE_CHECKING:
    from .sources import Maps

MOST_QUERIES, MOST_ITEMS = 1024, 4096  # whose scores are sorted at a time
logger = logging.getLogger(__name__)


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
            `[m, C, H, W]` of either kind. An iterable is read into memory. Products are taken in the query's dtype, but
            on a CPU, where half precision is no faster, in fp32 (fp64 for fp64).
        gallery: maps `[G, C, H, W]`, likewise. An iterable is read once, chunk by chunk, and never held.
        k: between 1 and G; with `prefilter` up to that.
        query_occ: visibility `[Q, 1, H, W]` or `[Q, H, W]` in [0, 1], as an array or in chunks; with chunks of maps, in
            chunks of the same sizes, or as an array. Its values are not checked.
        gallery_occ: visibility `[G, 1, H, W]` or `[G, H, W]`, likewise.
        prefilter: score only so many gallery maps of each query, between k and G: those of largest cosine with it, as
            flattened maps that are normalised at every location and weighted by visibility. The gallery is read
            twice then, and is no iterable; `torch.cat` joins chunks, in memory. The result is that of a full search as
            far as the candidates hold its best; `python -m bench ranking` measures how far.
        progress: show it, by tqdm on a terminal, elsewhere as a line now and then.

    Returns:
        scores `[Q, k]`, descending, fp32 (fp64 for fp64), and the rows of the gallery int64 `[Q, k]`, both on the
        matcher's device; equal scores by ascending row. NaN comes after every number; a warning is logged for queries
        whose scores are all NaN.

    Raises:
        TypeError: arguments of another type, maps that are not real floating-point arrays.
        ValueError: other sizes than the matcher's, `k` or `prefilter` out of range, visibility of another number of
            maps, a prefilter of an iterable, a matcher whose norms have no running statistics. That an iterable gallery
            has fewer than k maps is raised at its end.

    Examples:
        >>> from qaconv_triton.evaluation import rank_gallery
        >>> matcher, maps = QAConv(8, 4, 2), torch.randn(50, 8, 4, 2)
        >>> scores, indices = rank_gallery(matcher, maps[:5], maps, k=10)
        >>> indices.shape, indices[:, 0].tolist()  # each is most similar to itself
        (torch.Size([5, 10]), [0, 1, 2, 3, 4])
    """
    if not isinstance(matcher, QAConv):
        raise TypeError(f"matcher: expected a QAConv, got {type(matcher).__name__}")
    if not matcher._head.is_frozen(evaluate=True):
        raise ValueError("matcher: expected batch norms with running statistics: else blocks change scores")
    check_flag(progress, "progress")
    if prefilter is not None and not is_array(gallery):
        check_iterable(gallery, "gallery", "gallery_occ")
        raise ValueError(
            f"prefilter={prefilter} reads the gallery twice: expected a tensor or a NumPy array, which may be "
            f"memory-mapped, got {type(gallery).__name__}; torch.cat(chunks) joins chunks, in memory"
        )
    k = check_count(k, "k", low=1, high=None, why="gallery maps of each query")
    sizes = matcher._map_sizes
    queries, size = read_maps(sizes, query, query_occ, "query", "query_occ"), 0
    chunks: Iterable[Held]
    if is_array(gallery):
        items = read_maps(sizes, gallery, gallery_occ, "gallery", "gallery_occ")
        chunks, size = [items], len(items)
        _check_size(size, k)
    else:
        chunks = read_chunks(sizes, gallery, gallery_occ, "gallery", "gallery_occ")
    dtype = functional.correlation_dtype(queries.rows(slice(0, 0), matcher.fc.weight.device)[0])
    on_cpu = matcher.fc.weight.device.type == "cpu"
    scoring = _Scoring(matcher, accumulation_dtype(dtype) if on_cpu else dtype)
    if prefilter is None:
        with show_progress("ranking", "pairs", shown=progress) as report:
            return _rank_all(scoring, queries, chunks, k, size, report)
    prefilter = check_count(prefilter, "prefilter", low=k, high=size, why=f"k is {k} of {size} gallery maps")
    with show_progress("prefilter", "pairs", shown=progress) as report:
        candidates = _rank_all(_FlatCosine(matcher, torch.float32), queries, chunks, prefilter, size, report)[1]
    with show_progress("ranking", "pairs", shown=progress) as report:
        return _rank_candidates(scoring, queries, items, candidates, k, report)


def _check_size(size: int, k: int) -> None:
    """Require a gallery of `size` maps to have the k best."""
    if size == 0:
        raise ValueError(f"gallery: expected at least k = {k} maps, got none")
    check_count(k, "k", low=1, high=size, why=f"the gallery has {size} maps")


class _Scoring:
    """Scores of prepared maps by a matcher, with products in `dtype`."""

    def __init__(self, matcher: QAConv, dtype: torch.dtype) -> None:
        self.head, self.dtype, self.device = matcher._head, dtype, matcher.fc.weight.device
        bytes_of_map = 4 * matcher.num_features * matcher.height * matcher.width
        self.most_maps = max(1, min(MOST_ITEMS, MAP_BYTES // bytes_of_map))  # at a time

    def prepare(self, maps: Tensor, visibility: Tensor | None) -> Tensor:
        """Maps normalised at every location and weighted by visibility."""
        return functional.prepare_maps(maps, visibility, self.dtype)

    def compare(self, probe: Tensor, items: Tensor, index: Tensor | None = None) -> Tensor:
        """Scores of all pairs `[P, G]`, or of the items `index [P, M]` of each probe."""
        return score_maps(self.head, probe, items, index, evaluate=True)[0]


class _FlatCosine(_Scoring):
    """Cosines of the same maps, flattened."""

    def prepare(self, maps: Tensor, visibility: Tensor | None) -> Tensor:
        """Vectors `[P, C S]` of length 1, or 0; NaN counts as 0."""
        return normalize(super().prepare(maps, visibility).nan_to_num().flatten(1))

    def compare(self, probe: Tensor, items: Tensor, index: Tensor | None = None) -> Tensor:
        """Cosines of all pairs `[P, G]`."""
        with torch.autocast(self.device.type, enabled=False):
            return probe @ items.mT


def _rank_all(
    scoring: _Scoring, queries: Held, chunks: Iterable[Held], k: int, size: int, report: Progress
) -> tuple[Tensor, Tensor]:
    """The k best of all maps of the chunks; `size` is their number, 0 where it is not known before."""
    device, first = scoring.device, 0
    step = min(MOST_QUERIES, scoring.most_maps)
    starts = range(0, max(len(queries), 1), step)
    best: list[tuple[Tensor, Tensor]] = []
    for block in in_blocks(chunks, scoring.most_maps, device):
        items = scoring.prepare(*block)
        ids = torch.arange(first, first + len(items), device=device)
        for number, start in enumerate(starts):
            probe = scoring.prepare(*queries.rows(slice(start, start + step), device))
            scores, indices = scoring.compare(probe, items), ids.expand(len(probe), -1)
            if first == 0:
                best.append(k_best(scores, indices, k))
            else:
                both = torch.cat([best[number][0], scores], dim=1), torch.cat([best[number][1], indices], dim=1)
                best[number] = k_best(*both, k)
            report(first * len(queries) + min(start + step, len(queries)) * len(items), size * len(queries))
        first += len(items)
    _check_size(first, k)
    return _stacked(best)


def _rank_candidates(
    scoring: _Scoring, queries: Held, items: Held, candidates: Tensor, k: int, report: Progress
) -> tuple[Tensor, Tensor]:
    """The k best of each query's candidates `[Q, M]`, which are gathered for some queries at a time."""
    candidates = candidates.sort(dim=1).values  # equal scores by ascending row
    best: list[tuple[Tensor, Tensor]] = []
    done = 0
    for ids in candidates.split(max(1, scoring.most_maps // candidates.shape[1])):
        probe = scoring.prepare(*queries.rows(slice(done, done + len(ids)), scoring.device))
        scores = []
        for part in ids.split(scoring.most_maps, dim=1):
            rows, places = part.unique(return_inverse=True)
            table = scoring.prepare(*items.rows(rows, scoring.device))
            scores.append(scoring.compare(probe, table, places))
        best.append(k_best(torch.cat(scores, dim=1), ids, k))
        done += len(ids)
        report(done * ids.shape[1], candidates.numel())
    return _stacked(best)


def _stacked(best: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    scores, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    is_unordered = scores[:, 0].isnan()
    if is_unordered.any():  # a query that has NaN or Inf itself, as a rule
        row = int(is_unordered.nonzero()[0])
        logger.warning("%d of %d queries have NaN scores only, row %d first", int(is_unordered.sum()), len(scores), row)
    return scores, indices
