"""The host's part of top-k by cosine: which tiles are multiplied when, and when buffers are compacted.

A step is one column block for every row block, row block i with column block i + step in a circle, so that every buffer
sees equally many candidates. Where a sample tells that the buffers hold all that exceeds the thresholds, one round runs
all steps. Else each round runs as many steps as should fill 70% of the remaining capacity at the current rate. After a
round the host reads back the longest buffer's length. Where buffers are filling up they are compacted to their k best,
whose last is then the threshold. If a buffer overflows, the round is rolled back and repeated with fewer steps and the
raised thresholds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..common.chunks import Chunk, ChunkedTable
from ..progress import Progress
from . import config, tuning
from .descriptors import described, may_be_described
from .topk_kernels import CandidateBuffer, _append_kernel

TARGET_FILL = 0.7  # of the remaining capacity: what a round is planned to fill
ROUND_FLOPS = 2**46  # of a round, at most: about 0.2 s, after which progress is reported


class TopKSearch:
    """A search of all tiles, chunk by chunk. `best [P, k]`, `EMPTY` before, and `thresholds [P]` are filled as it goes.

    is_one_round: a row's candidates above its threshold should all fit its buffer.
    """

    def __init__(
        self,
        k: int,
        capacity: int,
        tiling: config.Config,
        best: Tensor,
        thresholds: Tensor,
        progress: Progress | None,
        is_one_round: bool = False,
    ) -> None:
        self.k, self.capacity, self.best, self.thresholds = k, capacity, best, thresholds
        self.is_one_round = is_one_round
        self.tiles, self.num_warps, self.num_stages = tiling
        self.progress, self.done, self.total = progress, 0, 0

    def self_search(self, table: ChunkedTable) -> None:
        """Search a table in itself: every chunk in itself and in those before it, which are not smaller."""
        count, size = len(self.best), table.size
        starts = [other for start in range(0, count, size) for other in (start, *range(0, start, size))]
        self.total = sum(
            self._tiles(min(size, count - start), min(size, count - other), start == other)
            for start in range(0, count, size)
            for other in range(0, start + 1, size)
        )
        chunks = table.chunks(starts)
        for start in range(0, count, size):
            rows = next(chunks)
            row_buffer = self._buffer(rows, is_new=True)
            self.search_tiles(rows, rows, row_buffer, row_buffer)
            for _ in range(0, start, size):
                columns = next(chunks)
                column_buffer = self._buffer(columns, is_new=False)
                self.search_tiles(rows, columns, row_buffer, column_buffer)
                self._keep_best(columns, column_buffer)
                del columns, column_buffer  # before the next ones come
            self._keep_best(rows, row_buffer)
            del rows, row_buffer

    def cross_search(self, queries: ChunkedTable, keys: ChunkedTable) -> None:
        """Search for queries among keys."""
        num_queries, num_keys = len(self.best), len(keys.table)
        query_starts, key_starts = range(0, num_queries, queries.size), range(0, num_keys, keys.size)
        self.total = sum(
            self._tiles(min(queries.size, num_queries - start), min(keys.size, num_keys - other), False)
            for start in query_starts
            for other in key_starts
        )
        for rows in queries.chunks(query_starts):
            row_buffer = self._buffer(rows, is_new=True)
            for columns in keys.chunks(key_starts):
                self.search_tiles(rows, columns, row_buffer, None)
                del columns
            self._keep_best(rows, row_buffer)
            del rows, row_buffer

    def mutual_search(self, left: ChunkedTable, right: ChunkedTable) -> None:
        """Search two tables in each other; the rows of `right` are counted on from those of `left`."""
        split = len(left.table)
        for rows in left.chunks(range(0, split, left.size)):
            row_buffer = self._buffer(rows, is_new=True)
            for chunk in right.chunks(range(0, len(right.table), right.size)):
                columns = chunk._replace(first=split + chunk.first)
                column_buffer = self._buffer(columns, is_new=rows.first == 0)
                self.search_tiles(rows, columns, row_buffer, column_buffer)
                self._keep_best(columns, column_buffer)
                del chunk, columns, column_buffer  # before the next ones come
            self._keep_best(rows, row_buffer)
            del rows, row_buffer

    def estimate(self, queries: ChunkedTable, samples: list[tuple[Chunk, int, int]]) -> None:
        """Raise the thresholds to a candidate of each sample in turn; nothing is read back.

        Where a buffer overflows, some candidates are lost, and a threshold is lower than planned.

        Args:
            queries: the rows whose thresholds are raised.
            samples: of each the keys, its rank, and the capacity of its buffers, the smallest sample first.
        """
        for rows in queries.chunks(range(0, len(self.thresholds), queries.size)):
            for keys, rank, capacity in samples:
                buffer = CandidateBuffer(len(rows.rows), capacity, self.thresholds.device)
                buffer.thresholds = self.thresholds[_span(rows)]
                steps = self._steps(len(keys.rows), is_same=False)
                max_steps = max(1, config.MAX_GRID // config.cdiv(len(rows.rows), self.tiles["BM"]))
                for step in range(0, steps, max_steps):
                    self._launch(rows, keys, buffer, None, step, min(max_steps, steps - step))
                buffer.longest = capacity
                buffer.compact(rank)
                del buffer

    def _buffer(self, chunk: Chunk, is_new: bool) -> CandidateBuffer:
        """A buffer for a chunk's rows, with the best so far, and with their thresholds, which rise with it."""
        span = _span(chunk)
        buffer = CandidateBuffer(len(chunk.rows), self.capacity, self.best.device)
        thresholds = self.thresholds[span]  # a view, if kernels need not be compiled for its alignment
        buffer.thresholds = thresholds if thresholds.data_ptr() % 16 == 0 else thresholds.clone()
        if not is_new:
            buffer.resume(self.best[span])
        return buffer

    def _keep_best(self, chunk: Chunk, buffer: CandidateBuffer) -> None:
        buffer.keep_best(self.best[_span(chunk)])
        thresholds = self.thresholds[_span(chunk)]
        if buffer.thresholds.data_ptr() != thresholds.data_ptr():
            thresholds.copy_(buffer.thresholds)

    def _tiles(self, rows: int, columns: int, is_same: bool) -> int:
        return config.cdiv(rows, self.tiles["BM"]) * self._steps(columns, is_same)

    def _steps(self, columns: int, is_same: bool) -> int:
        blocks = config.cdiv(columns, self.tiles["BN"])
        return blocks // 2 + 1 if is_same else blocks

    def search_tiles(
        self, rows: Chunk, columns: Chunk, row_buffer: CandidateBuffer, column_buffer: CandidateBuffer | None
    ) -> Any:
        """Compare all rows with all columns, for the rows' candidates and, where there is a buffer, the columns'.

        Returns:
            The compiled kernel.
        """
        is_same = column_buffer is row_buffer
        buffers = [row_buffer] if is_same or column_buffer is None else [row_buffer, column_buffer]
        tiles_per_step = config.cdiv(len(rows.rows), self.tiles["BM"])
        candidates_per_step = self.tiles["BN"] * (2 if is_same else 1)  # of a row, at most
        step, last = 0, self._steps(len(columns.rows), is_same)
        planned = last if self.is_one_round else 0
        flops_per_step = 2 * len(rows.rows) * self.tiles["BN"] * rows.rows.shape[1]
        max_steps = max(1, min(config.MAX_GRID // tiles_per_step, ROUND_FLOPS // flops_per_step))
        while step < last:
            before = max(buffer.longest for buffer in buffers)
            if before + candidates_per_step > self.capacity:
                self._compact(buffers)
                before = max(buffer.longest for buffer in buffers)
            certain = max(1, (self.capacity - before) // candidates_per_step)
            steps = min(max(planned, certain), last - step, max_steps)
            saved_counts = [buffer.counts.clone() if buffer.longest else None for buffer in buffers]
            launch = partial(self._launch, rows, columns, row_buffer, column_buffer, step, steps)
            kernel = tuning.launch_announced("append", launch)
            after = max(buffer.read_longest() for buffer in buffers)
            if after > self.capacity:
                self._roll_back(buffers, saved_counts)
                planned = steps // 4
                continue
            step += steps
            self._report(tiles_per_step * steps)
            if step == last:
                break
            planned = self._plan(buffers, before, after, steps, step, last)
        return kernel

    def _launch(
        self, rows: Chunk, columns: Chunk, row_buffer: CandidateBuffer, column_buffer: CandidateBuffer | None,
        step: int, steps: int,
    ) -> Any:  # fmt: skip
        other = row_buffer if column_buffer is None else column_buffer
        tma = may_be_described(rows.rows, columns.rows)
        return _append_kernel[(config.cdiv(len(rows.rows), self.tiles["BM"]) * steps,)](
            described(rows.rows[None], self.tiles["BM"], self.tiles["BD"], tma),
            described(columns.rows[None], self.tiles["BN"], self.tiles["BD"], tma), rows.rnorm, columns.rnorm,
            row_buffer.candidates, row_buffer.counts, row_buffer.thresholds,
            other.candidates, other.counts, other.thresholds,
            len(rows.rows), len(columns.rows), rows.rows.shape[1], row_buffer.candidates.shape[1],
            rows.first, columns.first, step, steps, int(column_buffer is row_buffer),
            MIRROR=column_buffer is not None, PRECISION=config.precision(), BRANCH=config.has_ptx(), TMA=tma,
            **self.tiles, num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip

    def _compact(self, buffers: list[CandidateBuffer]) -> None:
        for buffer in buffers:
            buffer.compact(self.k)

    def _roll_back(self, buffers: list[CandidateBuffer], saved_counts: list[Tensor | None]) -> None:
        for buffer, counts in zip(buffers, saved_counts, strict=True):
            buffer.rollback(self.k, counts)
            buffer.compact(self.k)

    def _plan(self, buffers: list[CandidateBuffer], before: int, after: int, steps: int, step: int, last: int) -> int:
        """The steps of the next round, after one of `steps` that took the longest row from `before` to `after`.

        Buffers are compacted first if they would not last to the end at this rate.
        """
        rate = max(after - before, 1) / steps
        if after > self.k and after + rate * (last - step) > self.capacity:
            self._compact(buffers)
            rate, after = min(rate, 1.3 * self.k / step), self.k
        return int(TARGET_FILL * (self.capacity - after) / rate)

    def _report(self, tiles: int) -> None:
        self.done += tiles
        if self.progress is not None:
            self.progress(self.done, self.total)


def _span(chunk: Chunk) -> slice:
    return slice(chunk.first, chunk.first + len(chunk.rows))
