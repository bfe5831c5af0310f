"""Exact top-k by cosine without the similarity matrix: thresholds, the search, and a retry where they were too high.

Kernels are in `topk_kernels.py`, what runs when in `topk_search.py`; README.md has the derivation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..common.candidates import EMPTY, pack_threshold, unpack
from ..common.chunks import Chunk, ChunkedTable, workspace
from ..common.thresholds import expected_candidates, initial_thresholds
from ..progress import Progress
from . import config, tuning
from .topk_kernels import CandidateBuffer, sorted_topk
from .topk_search import TopKSearch

PINNED_BYTES = 2**31  # of a chunk in page-locked host memory
TRIAL_FLOPS = 2.0**40  # of the search by which tiles are compared
MIN_TRIAL_ROWS = 2048  # rows or columns that it has at least
RETRY_ROWS = 4096  # rows whose thresholds were too high, to be searched for at a time


def cosine_topk(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    previous: Tensor | None = None,
    workspace_bytes: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Search for `queries [P, D]` among `keys [N, D]`.

    Args:
        queries, keys: the embeddings, not normalised, of one dtype; anywhere. Without keys the queries are their own,
            each without itself, and every pair is multiplied once.
        k: how many, at most N (N - 1 without keys).
        previous: int64 `[P, k]`, the result of an earlier search, to start from.
        workspace_bytes: of candidate buffers and of chunks of tables that have to be moved or cast, beyond O(P k).
        device, dtype: where, and in what precision, to multiply; the queries' where None.
        progress: called with tiles done and tiles in all.

    Returns:
        similarities fp32 `[P, k]`, descending, and indices int64 `[P, k]`; equal similarities by ascending index.
    """
    device, dtype = device or queries.device, dtype or queries.dtype
    table = queries if keys is None else keys
    best = torch.full((len(queries), k), EMPTY, dtype=torch.int64, device=device)
    if best.numel() == 0:
        return sorted_topk(best)
    rounding = 2**-7 if dtype != table.dtype or config.precision() == "tf32" else 1e-5

    def kth_best(sample: slice, rank: int) -> Tensor:
        return cosine_topk(queries, table[sample], rank, None, workspace_bytes, device, dtype)[0][:, -1]

    estimate = initial_thresholds(queries, table, k, previous, rounding, kth_best)
    thresholds = torch.full((len(queries),), EMPTY, dtype=torch.int64, device=device)
    if estimate is not None:
        thresholds = pack_threshold(estimate.to(device))
    _search(queries, keys, k, best, thresholds, workspace_bytes, dtype, progress)
    # Rows whose estimate was too high: once more among all keys, themselves included, without a threshold.
    short = (best[:, -1] == EMPTY).nonzero().flatten()
    for rows in short.split(RETRY_ROWS) if len(short) else ():
        retry = torch.full((len(rows), k + (keys is None)), EMPTY, dtype=torch.int64, device=device)
        no_thresholds = torch.full((len(rows),), EMPTY, dtype=torch.int64, device=device)
        some = queries[rows.to(queries.device)]
        _search(some, table, retry.shape[1], retry, no_thresholds, workspace_bytes, dtype, None)
        best[rows] = retry if keys is not None else _without_self(rows, retry)
    return sorted_topk(best)


def mutual_topk(left: Tensor, right: Tensor, k: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Search for the rows of two tables among those of the other; every pair is multiplied once, for both.

    Args:
        left, right: `[n, D]` and `[m, D]`, not normalised, of one dtype, on one device.
        k: how many.
        thresholds: `[n + m]`, for the rows of left, then of right: what is not above them need not be found.

    Returns:
        similarities fp32 `[n + m, k]`, descending, and ids int64 `[n + m, k]`, counted through both tables: those of
        right begin with n. Equal similarities by ascending id. Where there are fewer than k, -inf and any id.
    """
    device, dtype, split = left.device, left.dtype, len(left)
    best = torch.full((split + len(right), k), EMPTY, dtype=torch.int64, device=device)
    packed = pack_threshold(thresholds)
    tiling = _select_tiling(left, right, k, packed, None, dtype)
    longer = max(left, right, key=len)
    capacity, size = _sizes(longer, longer, k, tiling.tiles["BN"], None, device, dtype, buffers=2)
    search = TopKSearch(k, capacity, tiling, best, packed, None)
    search.mutual_search(ChunkedTable(left, size, device, dtype), ChunkedTable(right, size, device, dtype))
    similarities, ids = sorted_topk(best)
    return similarities.masked_fill_((best == EMPTY).sort(dim=1, stable=True).values, -torch.inf), ids


def _without_self(ids: Tensor, candidates: Tensor) -> Tensor:
    """Drop each row's own candidate; where so many equal ones come first that it is not there, the last one."""
    kept = unpack(candidates)[1] != ids.unsqueeze(1)
    absent = kept.all(1).nonzero().flatten()
    kept[absent, candidates[absent].argmin(1)] = False
    return candidates[kept].view(len(candidates), -1)


def _search(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    best: Tensor,
    thresholds: Tensor,
    workspace_bytes: int | None,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Fill `best [P, k]` with the candidates above `thresholds [P]`, as far as there are k; both are changed."""
    table, device = queries if keys is None else keys, best.device
    tiling = _select_tiling(queries, keys, k, thresholds, workspace_bytes, dtype)
    capacity, size = _sizes(queries, table, k, tiling.tiles["BN"], workspace_bytes, device, dtype)
    search = TopKSearch(k, capacity, tiling, best, thresholds, progress)
    if keys is None:
        search.self_search(ChunkedTable(queries, size, device, dtype))
    else:
        key_rows = size if keys.device != device or keys.dtype != dtype else len(keys)
        search.cross_search(ChunkedTable(queries, size, device, dtype), ChunkedTable(keys, key_rows, device, dtype))


def _select_tiling(
    queries: Tensor, keys: Tensor | None, k: int, thresholds: Tensor, workspace_bytes: int | None, dtype: torch.dtype
) -> config.Config:
    """The tiles of a search; where they are compared, by a part of it: some queries among as many keys."""
    table, device = queries if keys is None else keys, thresholds.device
    dim = table.shape[1]
    shape = 1 << (max(dim, 1).bit_length() - 1), dtype.itemsize
    widest = max(each.tiles["BN"] for each in config.cosine_topk(*shape))

    capacity, size = _sizes(queries, table, k, widest, workspace_bytes, device, dtype)
    if keys is None:
        columns = rows = min(size, len(table), int((TRIAL_FLOPS / max(dim, 1)) ** 0.5))
    else:
        columns = min(size, len(table))
        rows = min(size, len(queries), 1 + int(TRIAL_FLOPS / max(dim * columns, 1)))
    operations = float(rows) * columns * dim * (1 if keys is None else 2)
    if min(rows, columns) < MIN_TRIAL_ROWS:  # as the sample's: too few programs to tell anything
        operations = 0.0

    @cache
    def part() -> tuple[Chunk, Chunk, CandidateBuffer]:
        left = next(iter(ChunkedTable(queries[:rows], rows, device, dtype).chunks([0])))
        right = left if keys is None else next(iter(ChunkedTable(table[:columns], columns, device, dtype).chunks([0])))
        return left, right, CandidateBuffer(rows, capacity, device)

    def run(tiling: config.Config) -> Any:
        left, right, buffer = part()
        buffer.counts.zero_()
        buffer.longest = 0
        buffer.thresholds.copy_(thresholds[:rows])
        search = TopKSearch(k, capacity, tiling, buffer.candidates[:, :k], buffer.thresholds, None)
        return search.search_tiles(left, right, buffer, buffer if keys is None else None)

    variant = f"{dtype} {config.precision()} {'self' if keys is None else 'cross'}"
    return tuning.select_config(config.cosine_topk, shape, variant, operations, run)


def _sizes(
    queries: Tensor,
    table: Tensor,
    k: int,
    block: int,
    workspace_bytes: int | None,
    device: torch.device,
    dtype: torch.dtype,
    buffers: int = 1,
) -> tuple[int, int]:
    """Capacity of a row's buffer, and rows of a chunk; `buffers` are held where one chunk takes all rows."""
    num_keys, dim = table.shape
    capacity = max(k, min(num_keys, max(int(1.3 * expected_candidates(num_keys, dim, k)), k + 4 * block)))
    moved = table if table.device != device or table.dtype != dtype else None
    return capacity, _chunk_rows(len(queries), dim, block, capacity, workspace_bytes, moved, device, dtype, buffers)


def _chunk_rows(
    count: int,
    dim: int,
    block: int,
    capacity: int,
    workspace_bytes: int | None,
    moved: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    buffers: int,
) -> int:
    """How many rows a chunk may have: two chunks' buffers and, of a table that is `moved`, three chunks, fit."""
    if workspace_bytes is None:
        workspace_bytes = workspace(device)
    if moved is None and 8 * buffers * capacity * count <= workspace_bytes:
        return count
    row_bytes = 16 * capacity
    most = count
    if moved is not None:  # a third chunk is prefetched: as it was, normalised in fp32, and cast
        row_bytes += dim * (3 * dtype.itemsize + moved.element_size() + 4)
        most = PINNED_BYTES // (dim * moved.element_size())
    return max(min(workspace_bytes // row_bytes, most) // block, 1) * block
