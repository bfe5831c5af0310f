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
from ..common.thresholds import expected_candidates, nested_samples, thresholds_from_previous
from ..progress import Progress
from . import config, tuning
from .topk_kernels import MAX_KERNEL_LIST, TORCH_TOPK_ENTRIES, CandidateBuffer, sorted_topk
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
    best = torch.full((len(queries), k), EMPTY, dtype=torch.int64, device=device)
    if best.numel() == 0:
        return sorted_topk(best)
    workspace_bytes = workspace(device) if workspace_bytes is None else workspace_bytes
    rounding = 2**-7 if dtype != queries.dtype or config.precision() == "tf32" else 1e-5
    estimate = thresholds_from_previous(queries, queries if keys is None else keys, previous, rounding)
    left = ChunkedTable(queries, len(queries), device, dtype)
    right = left if keys is None else ChunkedTable(keys, len(keys), device, dtype)
    no_thresholds = torch.full((len(queries),), EMPTY, dtype=torch.int64, device=device)
    thresholds = no_thresholds if estimate is None else pack_threshold(estimate.to(device))
    most = _raise_from_sample(left, right, k, thresholds, workspace_bytes)
    _search(left, None if keys is None else right, k, best, thresholds, workspace_bytes, most, progress)
    # Rows whose estimate was too high: once more among all keys, themselves included, without a threshold.
    short = (best[:, -1] == EMPTY).nonzero().flatten()
    for rows in short.split(RETRY_ROWS) if len(short) else ():
        retry = torch.full((len(rows), k + (keys is None)), EMPTY, dtype=torch.int64, device=device)
        no_thresholds = torch.full((len(rows),), EMPTY, dtype=torch.int64, device=device)
        _search(left.part(rows), right, retry.shape[1], retry, no_thresholds, workspace_bytes, None, None)
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
    workspace_bytes = workspace(device)
    tables = [ChunkedTable(table, len(table), device, dtype) for table in (left, right)]
    tiling = _select_tiling(tables[0], tables[1], k, packed, workspace_bytes)
    longer = max(tables, key=lambda table: table.size)
    capacity, size = _sizes(longer, longer, k, tiling.tiles["BN"], workspace_bytes, buffers=2)
    search = TopKSearch(k, capacity, tiling, best, packed, None, is_one_round=capacity >= longer.size)
    search.mutual_search(*(table.with_size(size) for table in tables))
    similarities, ids = sorted_topk(best)
    return similarities.masked_fill_((best == EMPTY).sort(dim=1, stable=True).values, -torch.inf), ids


def _without_self(ids: Tensor, candidates: Tensor) -> Tensor:
    """Drop each row's own candidate; where so many equal ones come first that it is not there, the last one."""
    kept = unpack(candidates)[1] != ids.unsqueeze(1)
    absent = kept.all(1).nonzero().flatten()
    kept[absent, candidates[absent].argmin(1)] = False
    return candidates[kept].view(len(candidates), -1)


def _raise_from_sample(
    queries: ChunkedTable, keys: ChunkedTable, k: int, thresholds: Tensor, workspace_bytes: int
) -> int | None:
    """Raise `thresholds [P]` to estimates from a sample of the keys.

    Returns:
        How many candidates a row will hardly ever have above its threshold; None where nothing is known.
    """
    (num_keys, dim), positions, most = keys.table.shape, range(len(keys.table)), None
    tiling = config.cosine_topk(*_shape_class(dim, keys.dtype))[0]
    samples: list[tuple[Chunk, int, int]] = []
    for number, sample in enumerate(nested_samples(num_keys, dim, k)):
        if samples:  # this sample's threshold leaves so much of the sample that it is from
            outer, rank, capacity = samples[-1]
            samples[-1] = outer, rank, min(capacity, sample.most)
        positions = positions[sample.keys]
        if len(positions) * _moved_bytes(keys) > workspace_bytes // 4:
            continue  # those inside of it are smaller
        if number == 0:
            most = sample.most
        chunk = next(keys.part(slice(positions.start, positions.stop, positions.step)).chunks([0]))
        samples.append((chunk, sample.rank, min(len(positions), MAX_KERNEL_LIST)))
    if samples:
        rows = _chunk_rows(queries, max(capacity for *_, capacity in samples), tiling.tiles["BN"], workspace_bytes)
        search = TopKSearch(k, 0, tiling, thresholds.unsqueeze(1), thresholds, None)
        search.estimate(queries.with_size(rows), samples[::-1])
    return most


def _search(
    queries: ChunkedTable,
    keys: ChunkedTable | None,
    k: int,
    best: Tensor,
    thresholds: Tensor,
    workspace_bytes: int,
    most: int | None,
    progress: Progress | None,
) -> None:
    """Fill `best [P, k]` with the candidates above `thresholds [P]`, as far as there are k; both are changed.

    `most`: how many candidates a row will hardly ever have above its threshold, None where nothing is known.
    """
    table = queries if keys is None else keys
    tiling = _select_tiling(queries, keys, k, thresholds, workspace_bytes)
    capacity, size = _sizes(queries, table, k, tiling.tiles["BN"], workspace_bytes, most)
    is_one_round = capacity >= min(len(table.table), most or len(table.table))
    search = TopKSearch(k, capacity, tiling, best, thresholds, progress, is_one_round)
    if keys is None:
        search.self_search(queries.with_size(size))
    else:
        search.cross_search(queries.with_size(size), keys.with_size(size if keys.is_moved else len(keys.table)))


def _shape_class(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    return 1 << (max(dim, 1).bit_length() - 1), dtype.itemsize


def _select_tiling(
    queries: ChunkedTable, keys: ChunkedTable | None, k: int, thresholds: Tensor, workspace_bytes: int
) -> config.Config:
    """The tiles of a search; where they are compared, by a part of it: some queries among as many keys."""
    table, device, dtype = queries if keys is None else keys, queries.device, queries.dtype
    (num_keys, dim), num_queries = table.table.shape, len(queries.table)
    shape = _shape_class(dim, dtype)
    widest = max(each.tiles["BN"] for each in config.cosine_topk(*shape))

    capacity, size = _sizes(queries, table, k, widest, workspace_bytes)
    if keys is None:
        columns = rows = min(size, num_keys, int((TRIAL_FLOPS / max(dim, 1)) ** 0.5))
    else:
        columns = min(size, num_keys)
        rows = min(size, num_queries, 1 + int(TRIAL_FLOPS / max(dim * columns, 1)))
    operations = float(rows) * columns * dim * (1 if keys is None else 2)
    if min(rows, columns) < MIN_TRIAL_ROWS:  # too few programs to tell anything
        operations = 0.0

    @cache
    def part() -> tuple[Chunk, Chunk, CandidateBuffer]:
        left = next(queries.part(slice(0, rows)).chunks([0]))
        right = left if keys is None else next(keys.part(slice(0, columns)).chunks([0]))
        return left, right, CandidateBuffer(rows, capacity, device)

    def run(tiling: config.Config) -> Any:
        left, right, buffer = part()
        buffer.counts.zero_()
        buffer.longest = 0
        buffer.thresholds.copy_(thresholds[:rows])
        search = TopKSearch(k, capacity, tiling, buffer.candidates[:, :k], buffer.thresholds, None)
        return search.search_tiles(left, right, buffer, buffer if keys is None else None)

    tma = dim * dtype.itemsize % 16 == 0 and config.has_tma()  # of chunks, whatever the table is like
    variant = f"{dtype} {config.precision()} {'tma ' if tma else ''}{'self' if keys is None else 'cross'}"
    return tuning.select_config(config.cosine_topk, shape, variant, operations, run)


def _sizes(
    queries: ChunkedTable,
    table: ChunkedTable,
    k: int,
    block: int,
    workspace_bytes: int,
    most: int | None = None,
    buffers: int = 1,
) -> tuple[int, int]:
    """Capacity of a row's buffer, and rows of a chunk; `buffers` are held where one chunk takes all rows.

    The capacity is for `most` candidates, or all there are, where a chunk of all rows and with few of them has that.
    """
    num_queries, (num_keys, dim) = len(queries.table), table.table.shape
    capacity = max(k, min(num_keys, max(int(1.3 * expected_candidates(num_keys, dim, k)), k + 4 * block)))
    whole = min(num_keys, most or num_keys)
    if capacity < whole and (whole <= MAX_KERNEL_LIST or num_queries * whole <= TORCH_TOPK_ENTRIES):
        rows = _chunk_rows(queries, whole, block, workspace_bytes, buffers)
        if rows >= num_queries:
            return whole, rows
    return capacity, _chunk_rows(queries, capacity, block, workspace_bytes, buffers)


def _moved_bytes(table: ChunkedTable) -> int:
    """Of a row of a chunk that is moved: as it was, normalised in fp32, and cast."""
    return table.table.shape[1] * (table.dtype.itemsize + (table.table.element_size() + 4) * table.is_moved)


def _chunk_rows(table: ChunkedTable, capacity: int, block: int, workspace_bytes: int, buffers: int = 1) -> int:
    """How many rows a chunk may have: two chunks' buffers and, of a table that is moved, three chunks, fit."""
    count = len(table.table)
    if not table.is_moved and 8 * buffers * capacity * count <= workspace_bytes:
        return count
    row_bytes, most = 16 * capacity, count
    if table.is_moved:  # a third chunk is prefetched
        row_bytes += _moved_bytes(table) + 2 * table.table.shape[1] * table.dtype.itemsize
        most = PINNED_BYTES // (table.table.shape[1] * table.table.element_size())
    return max(min(workspace_bytes // row_bytes, most) // block, 1) * block
