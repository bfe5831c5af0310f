"""Exact top-k by cosine on the CPU; within one table every unordered pair of tiles is multiplied once.

The similarity is taken in blocks that stay in cache. What exceeds a row's threshold is appended to the row's candidate
buffer, and within one table also to the buffer of its column. Thresholds start as estimates (`common/thresholds.py`),
so few rows have many more than k candidates; a buffer that is full is compacted to its k best, the last of which is
then the threshold. A row that ends with fewer than k candidates is searched again without an initial threshold.

Candidates are packed as in `common/candidates.py`. Ids arrive in ascending order, so a candidate equal to a threshold
set by compaction loses the tie and is dropped. In fp64, and on CUDA, where fp64 comes here, the similarity is sorted in
strips instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.candidates import EMPTY, pack, unpack
from ..common.chunks import WORKSPACE_BYTES, cast
from ..common.dtypes import accumulation_dtype
from ..common.norms import unit, with_norms
from ..common.thresholds import MAX_ELEMENTS, expected_candidates, initial_thresholds
from ..kernels import config
from ..progress import Progress

CPU = torch.device("cpu")
TILE = 512  # rows and columns of a product
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048  # powers of two, at least TILE
GROUP = 4  # rows whose maximum is compared first, when columns are searched
COMPACT_ROWS = 256  # buffers that are compacted at a time


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
    """As `kernels.cosine_topk.cosine_topk`, in fp64 as well; sums are fp32 (fp64 for fp64)."""
    device, dtype = device or queries.device, dtype or queries.dtype
    workspace_bytes = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    queries = cast(queries.to(device), dtype)
    keys = None if keys is None else cast(keys.to(device), dtype)
    if queries.dtype == torch.float64 or not queries.is_cpu:
        return _by_sorting(queries, keys, k, workspace_bytes, progress)
    table = queries if keys is None else keys
    values = queries.new_empty(queries.shape[0], k, dtype=torch.float32)
    ids = queries.new_empty(queries.shape[0], k, dtype=torch.int64)
    if ids.numel() == 0:
        return values, ids
    table, rnorm_keys = with_norms(table)
    queries, rnorm_queries = (table, rnorm_keys) if keys is None else with_norms(queries)
    operands = queries, table, rnorm_queries, rnorm_keys

    def kth_best(sample: slice, rank: int) -> Tensor:
        return _kth_best(queries, table[sample], rnorm_queries, rnorm_keys[sample], rank)

    rounding = 2**-7 if config.allows_tf32() else 1e-5  # of products in fp32, as torch takes them
    initial = initial_thresholds(queries, table, k, previous, rounding, kth_best)
    own = torch.arange(len(queries), device=CPU) if keys is None else None
    search = _Search(*operands, k, initial, own, is_self_search=keys is None, workspace_bytes=workspace_bytes)
    short = []
    for rows, best in search.run(progress):
        short.append(rows.start + (best[:, -1] == EMPTY).nonzero().flatten())
        values[rows], ids[rows] = unpack(best)
    retry_rows = torch.cat(short)
    for rows in retry_rows.split(TILE) if len(retry_rows) else ():
        own = rows if keys is None else None
        retry = _Search(queries[rows], table, rnorm_queries[rows], rnorm_keys, k, None, own, False, workspace_bytes)
        for part, best in retry.run(None):
            values[rows[part]], ids[rows[part]] = unpack(best)
    return values, ids


def mutual_topk(left: Tensor, right: Tensor, k: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.cosine_topk.mutual_topk`, in fp64 as well; sums are fp32 (fp64 for fp64)."""
    split = len(left)
    if left.dtype == torch.float64 or not left.is_cpu:
        return _mutual_by_sorting(left, right, k)
    values = left.new_empty(split + len(right), k, dtype=torch.float32)
    ids = left.new_empty(values.shape, dtype=torch.int64)
    (left, rnorm_left), (right, rnorm_right) = with_norms(left), with_norms(right)
    operands, bounds = (left, right, rnorm_left, rnorm_right), (thresholds[:split], thresholds[split:])
    search = _Search(*operands, k, bounds[0], None, False, WORKSPACE_BYTES, bounds[1])
    for found, first, other in ((search.run(None), 0, split), (search.best_of_columns(), split, 0)):
        for rows, best in found:
            here = slice(first + rows.start, first + rows.stop)
            values[here], ids[here] = unpack(best)
            values[here].masked_fill_(best == EMPTY, -torch.inf)
            ids[here] += other
    return values, ids


def _mutual_by_sorting(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort strips of the similarity, rows with the best so far of `left`, columns with those of `right`."""
    dtype, split = accumulation_dtype(left.dtype), len(left)
    right = unit(right.to(dtype))
    values = right.new_full((split + len(right), k), -torch.inf)
    ids = torch.full_like(values, -1, dtype=torch.int64)
    strip = max(2, WORKSPACE_BYTES // (32 * max(len(right), 1)))
    for start in range(0, split, strip):
        similarity = unit(left[start : start + strip].to(dtype)) @ right.mT
        rows = slice(start, start + len(similarity))
        for part, block, first in ((rows, similarity, split), (slice(split, None), similarity.mT, start)):
            # those before have lower ids, and come first among equals
            block_ids = torch.arange(first, first + block.shape[1], device=ids.device).expand(block.shape)
            joined = torch.cat([values[part], block], dim=1)
            best, order = joined.sort(dim=1, descending=True, stable=True)
            values[part] = best[:, :k]
            ids[part] = torch.cat([ids[part], block_ids], dim=1).gather(1, order[:, :k])
    return values, ids


def _by_sorting(
    queries: Tensor, keys: Tensor | None, k: int, workspace_bytes: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Sort whole strips of the similarity: for fp64, which no packed candidate can hold, and off the CPU."""
    dtype = accumulation_dtype(queries.dtype)
    table = unit((queries if keys is None else keys).to(dtype))
    values = queries.new_empty(queries.shape[0], k, dtype=dtype)
    ids = queries.new_empty(queries.shape[0], k, dtype=torch.int64)
    strip = min(len(queries), max(2, workspace_bytes // (32 * len(table))))
    for start in range(0, len(queries), max(strip, 1)):
        first = min(start, len(queries) - strip)  # strips of one size, as the tiles below
        rows = slice(first, first + strip)
        similarity = unit(queries[rows].to(dtype)) @ table.mT
        if keys is None:
            similarity.diagonal(first).fill_(-torch.inf)
        best, order = similarity.sort(dim=1, descending=True, stable=True)
        values[rows], ids[rows] = best[:, :k], order[:, :k]
        if progress is not None:
            progress(min(start + strip, len(queries)), len(queries))
    return values, ids


def _kth_best(queries: Tensor, keys: Tensor, rnorm_queries: Tensor, rnorm_keys: Tensor, k: int) -> Tensor:
    """A similarity of every query that its k-th best of a few keys does not fall short of, hardly lower: fp32 `[P]`."""
    unit_keys = keys.float() * rnorm_keys[:, None]
    found = torch.empty_like(rnorm_queries)
    step = max(1, MAX_ELEMENTS // len(keys))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similarity = queries[rows].float() @ unit_keys.mT
        if 8 * k < len(keys):  # the best of the best of four: hardly lower, and a quarter to select from
            similarity = similarity.unflatten(1, (4, len(keys) // 4)).amax(1)
        found[rows] = similarity.topk(k, dim=1, sorted=False).values.amin(1) * rnorm_queries[rows]
    return found


class _CandidateBuffers:
    """A buffer of candidates for each of `count` rows: similarities, ids, and how many there are."""

    def __init__(self, count: int, capacity: int) -> None:
        self.values = torch.empty(count, capacity, dtype=torch.float32, device=CPU)
        self.ids = torch.empty(count, capacity, dtype=torch.int32, device=CPU)
        self.counts = torch.zeros(count, dtype=torch.int64, device=CPU)
        self.offsets = torch.arange(count, device=CPU) * capacity

    @property
    def capacity(self) -> int:
        return self.values.shape[1]

    def append(self, first: int, rows: Tensor, counts: Tensor, values: Tensor, ids: Tensor) -> None:
        """Append `values` and `ids`, sorted by row; `counts` of them go to the rows from `first` on."""
        span = slice(first, first + len(counts))
        starts = self.offsets[span] + self.counts[span] + counts - counts.cumsum(0)
        positions = starts.take(rows).add_(torch.arange(len(rows), device=CPU))
        self.values.view(-1).scatter_(0, positions, values)
        self.ids.view(-1).scatter_(0, positions, ids.to(torch.int32))
        self.counts[span] += counts

    def packed(self, rows: slice | Tensor) -> Tensor:
        """The candidates of some rows, `[rows, longest]`; shorter rows are padded with `EMPTY`."""
        counts = self.counts[rows]
        longest = int(counts.amax())
        packed = pack(self.values[rows, :longest], self.ids[rows, :longest])
        return packed.masked_fill_(torch.arange(longest, device=CPU) >= counts.unsqueeze(1), EMPTY)

    def replace(self, rows: Tensor, candidates: Tensor) -> None:
        k = candidates.shape[1]
        self.values[rows, :k], ids = unpack(candidates)
        self.ids[rows, :k] = ids.to(torch.int32)
        self.counts[rows] = (candidates != EMPTY).sum(1)


class _Search:
    """One pass over all tiles. `own [P]`: the ids of the queries among the keys, to be left out.

    With `column_thresholds` the best queries of every key are found as well; in a self search these are one and all.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        rnorm_queries: Tensor,
        rnorm_keys: Tensor,
        k: int,
        thresholds: Tensor | None,
        own: Tensor | None,
        is_self_search: bool,
        workspace_bytes: int,
        column_thresholds: Tensor | None = None,
    ) -> None:
        # A normalised copy, if the workspace has it, where that is less to scale than half of the similarity.
        copied = keys.numel() + (0 if is_self_search else queries.numel())
        self.unit = 16 * copied <= workspace_bytes and 8 * keys.shape[1] < len(keys)
        if self.unit:
            keys = keys * rnorm_keys.unsqueeze(1)
            queries = keys if is_self_search else queries * rnorm_queries.unsqueeze(1)
        self.queries, self.keys, self.rnorm_queries, self.rnorm_keys = queries, keys, rnorm_queries, rnorm_keys
        self.k, self.own, self.is_self_search = k, own, is_self_search
        self.thresholds = torch.full_like(rnorm_queries, -torch.inf) if thresholds is None else thresholds
        self.column_thresholds = self.thresholds if is_self_search else column_thresholds
        # Padded to powers of two with -inf: positions are split by shifts, and no bounds checks are needed below.
        height, width = -(-len(queries) // GROUP) * GROUP, 1 << max(len(keys) - 1, 7).bit_length()
        shape = min(BLOCK_ROWS, height), min(BLOCK_COLUMNS, width)
        self.block = torch.full(shape, -torch.inf, dtype=torch.float32, device=CPU)
        self.scale = torch.empty_like(self.block)
        self.above = torch.empty_like(self.block, dtype=torch.bool)
        longest = len(keys) if self.column_thresholds is None else max(len(queries), len(keys))
        capacity = min(max(longest, k), k + 64 + int(1.3 * expected_candidates(longest, keys.shape[1], k)))
        self.row_buffers = _CandidateBuffers(len(self.block), capacity)  # of the rows of a block
        is_mutual = self.column_thresholds is not None
        self.column_buffers = _CandidateBuffers(len(keys), capacity) if is_mutual else None  # of all columns

    def run(self, progress: Progress | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield, for a range of queries after the other, their k best candidates in falling order."""
        count, (height, width) = len(self.keys), self.block.shape
        starts = range(0, len(self.queries), height)
        first_column = (lambda start: start) if self.is_self_search else (lambda start: 0)
        done, total = 0, sum(-(-(count - first_column(start)) // width) for start in starts)
        for start in starts:
            rows = slice(start, min(start + height, len(self.queries)))
            self.row_buffers.counts.zero_()
            for first in range(first_column(start), count, width):
                columns = slice(first, min(first + width, count))
                self._multiply(rows, columns)
                self._collect_rows(rows, columns)
                others = slice(max(rows.stop, first) if self.is_self_search else first, columns.stop)
                if others.start < others.stop:
                    self._collect_columns(rows, columns, others)
                done += 1
                if progress is not None:
                    progress(done, total)
            found = [(self.row_buffers, slice(0, rows.stop - start))]
            if self.is_self_search and self.column_buffers is not None:
                found.append((self.column_buffers, rows))
            yield rows, self._best(found)

    def best_of_columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Likewise for the keys, after `run`, of a search for both sides of two tables."""
        assert self.column_buffers is not None
        for start in range(0, len(self.keys), BLOCK_ROWS):
            columns = slice(start, min(start + BLOCK_ROWS, len(self.keys)))
            yield columns, self._best([(self.column_buffers, columns)])

    def _multiply(self, rows: slice, columns: slice) -> None:
        """Fill the block with the cosines of the queries `rows` and the keys `columns`."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        is_symmetric = self.is_self_search and rows.start == columns.start
        for top in range(0, height, TILE):
            skipped_rows, query_tile = _tile(rows, top, len(self.queries))
            left = self.queries[query_tile].float()
            for start in range(0, width, TILE):
                skipped_columns, key_tile = _tile(columns, start, len(self.keys))
                out = self.block[top : min(top + TILE, height), start : min(start + TILE, width)]
                if is_symmetric and start < top:
                    out.copy_(self.block[start : start + TILE, top : top + len(out)].mT)
                    continue
                right = self.keys[key_tile].float()
                if skipped_rows or skipped_columns or 1 in (len(left), len(right)):
                    out.copy_(_product(left, right)[skipped_rows:, skipped_columns:])
                else:
                    torch.mm(left, right.mT, out=out)
        if not self.unit:  # one factor for both, so that a pair's cosine is the same whichever of the two is the row
            scale = torch.mul(self.rnorm_queries[rows, None], self.rnorm_keys[columns], out=self.scale[:height, :width])
            self.block[:height, :width] *= scale
        self.block[:, width:] = -torch.inf
        self.block[height:] = -torch.inf
        if self.own is not None:
            column = self.own[rows] - columns.start
            row = ((column >= 0) & (column < width)).nonzero().flatten()
            self.block[row, column[row]] = -torch.inf

    def _compared(
        self, buffers: _CandidateBuffers, rows: slice, thresholds: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Thresholds of some rows, and which are not compared at all: without a threshold and about to be full."""
        is_skipped = (thresholds == -torch.inf) & (buffers.counts[rows] + width > buffers.capacity)
        return thresholds.masked_fill(is_skipped, torch.inf), is_skipped

    def _collect_rows(self, rows: slice, columns: slice) -> None:
        """Append what exceeds the thresholds of the block's rows to the buffers of these."""
        height, width = self.block.shape
        span = slice(0, rows.stop - rows.start)
        thresholds, full = self._compared(self.row_buffers, span, self.thresholds[rows], columns.stop - columns.start)
        thresholds = torch.nn.functional.pad(thresholds, (0, height - len(thresholds)))
        torch.le(self.block, thresholds.unsqueeze(1), out=self.above)
        self.above.logical_not_()  # NaN is above all
        words = self.above.view(torch.int64).view(-1).nonzero().squeeze(1)  # eight at a time, few of which are not zero
        in_words = self.above.view(-1, 8).index_select(0, words).view(-1).nonzero().squeeze(1)
        positions = (words.take(in_words >> 3) << 3) | (in_words & 7)
        found = (
            positions >> (width.bit_length() - 1),
            self.block.take(positions),
            (positions & (width - 1)) + columns.start,
        )
        self._append(self.row_buffers, span, self.thresholds[rows], found, full, self.block, columns.start)

    def _collect_columns(self, rows: slice, columns: slice, some: slice) -> None:
        """Append what exceeds the thresholds of `some` of the block's `columns` to the buffers of these."""
        if self.column_buffers is None or self.column_thresholds is None:
            return
        height, width = self.block.shape
        groups, start = height // GROUP, some.start - columns.start
        bounds = self.column_thresholds[some]
        thresholds, full = self._compared(self.column_buffers, some, bounds, rows.stop - rows.start)
        in_block = slice(start, some.stop - columns.start)
        maxima = self.block.view(groups, GROUP, width).amax(1).mT[in_block].contiguous()
        above = torch.le(maxima, thresholds.unsqueeze(1)).logical_not_().view(-1).nonzero().squeeze(1)
        column = above.div(groups, rounding_mode="floor")
        positions = ((above - column * groups) * (GROUP * width) + column + start).unsqueeze(1)
        positions = (positions + torch.arange(GROUP, device=CPU) * width).view(-1)
        values = self.block.take(positions)
        above = torch.le(values.view(-1, GROUP), thresholds.take(column).unsqueeze(1)).logical_not_()
        above = above.view(-1).nonzero().squeeze(1)
        found = (
            column.take(above.div(GROUP, rounding_mode="floor")),
            values.take(above),
            (positions.take(above) >> (width.bit_length() - 1)) + rows.start,
        )
        self._append(self.column_buffers, some, bounds, found, full, self.block[:, in_block].mT, rows.start)

    def _append(
        self,
        buffers: _CandidateBuffers,
        rows: slice,
        thresholds: Tensor,
        found: tuple[Tensor, Tensor, Tensor],
        full: Tensor,
        similarity: Tensor,
        first_id: int,
    ) -> None:
        """Append what was `found` (row, similarity, id; sorted by row) to the `rows` of the buffers.

        Rows that are `full`, or will be, are compacted to the k best of them and of `similarity [rows, m]`, dense, and
        their `thresholds` are raised.
        """
        to, values, ids = found
        counts = torch.bincount(to, minlength=len(full))
        full = full | (buffers.counts[rows] + counts > buffers.capacity)
        if not full.any():
            buffers.append(rows.start, to, counts, values, ids)
            return
        kept = full.logical_not().take(to).nonzero().squeeze(1)
        counts = counts.masked_fill(full, 0)
        buffers.append(rows.start, to.take(kept), counts, values.take(kept), ids.take(kept))
        all_ids = torch.arange(first_id, first_id + similarity.shape[1], dtype=torch.int32, device=CPU)
        for part in full.nonzero().flatten().split(COMPACT_ROWS):
            dense = similarity[part]
            candidates = pack(dense, all_ids).masked_fill_(dense == -torch.inf, EMPTY)
            candidates = torch.cat([buffers.packed(rows.start + part), candidates], dim=1)
            best = candidates.topk(self.k, dim=1, sorted=False).values
            buffers.replace(rows.start + part, best)
            last = best.amin(1)
            threshold = torch.where(last == EMPTY, -torch.inf, unpack(last)[0])
            thresholds[part] = torch.maximum(thresholds[part], threshold)

    def _best(self, buffers: list[tuple[_CandidateBuffers, slice]]) -> Tensor:
        """The k best candidates of some rows, which are complete in one or two buffers together."""
        parts, (_, rows) = [], buffers[0]
        for start in range(0, rows.stop - rows.start, COMPACT_ROWS):
            found = [
                buffer.packed(slice(rows.start + start, min(rows.start + start + COMPACT_ROWS, rows.stop)))
                for buffer, rows in buffers
            ]
            candidates = torch.cat(found, dim=1)
            if candidates.shape[1] < self.k:
                candidates = torch.nn.functional.pad(candidates, (0, self.k - candidates.shape[1]), value=EMPTY)
            parts.append(candidates.topk(self.k, dim=1).values)
        return torch.cat(parts)


def _tile(span: slice, offset: int, count: int) -> tuple[int, slice]:
    """TILE of `count` rows from `span.start + offset` on; the last tile begins earlier, by as many rows as come first.

    Most BLAS sum every element of a product of full tiles in the same order, and equal vectors then have equal
    similarities. None promises it, and no result depends on it.
    """
    start = span.start + offset
    earlier = min(start, max(0, start + TILE - count))
    return earlier, slice(start - earlier, min(start - earlier + TILE, count))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.mT`, of two rows at least: one row is a matrix-vector product, with sums in an order of its own."""
    twice = [torch.cat([part, part]) if len(part) == 1 else part for part in (left, right)]
    return (twice[0] @ twice[1].mT)[: len(left), : len(right)]
