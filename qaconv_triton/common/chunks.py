"""Tables in chunks of rows, on the device, with their inverse norms; chunks of an off-device table are prefetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .norms import with_norms

WORKSPACE_BYTES = 256 * 2**20  # of cosine top-k on the CPU, beyond O(N k)


def workspace(device: torch.device) -> int:
    """What a search may hold on `device` where the caller sets no bound, in bytes: half of a GPU's free memory."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else WORKSPACE_BYTES


class Chunk(NamedTuple):
    """Rows `[n, D]` of a table from `first` on, and `1 / |row|` `[n]` in fp32, zero for a zero row."""

    rows: Tensor
    rnorm: Tensor
    first: int


def cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in the dtype of their products, normalised before they lose precision or leave its range."""
    if rows.dtype == dtype:
        return rows
    rows, rnorm = with_norms(rows)
    return (rows * rnorm.unsqueeze(1)).to(dtype)


class ChunkedTable:
    """A table `[N, D]` in chunks of at most `size` rows, on `device` and in `dtype`.

    Norms of a table that is not moved are taken once; chunks are views of it. A chunk that has to be copied is fetched
    by another thread while the device works on those before it.
    """

    def __init__(
        self, table: Tensor, size: int, device: torch.device, dtype: torch.dtype, rnorm: Tensor | None = None
    ) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.is_moved = table.device != device or table.dtype != dtype
        self.table, self.rnorm = (table, rnorm) if self.is_moved or rnorm is not None else with_norms(table)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and table.is_cpu else None

    def with_size(self, size: int) -> ChunkedTable:
        """The same table in other chunks."""
        return ChunkedTable(self.table, size, self.device, self.dtype, self.rnorm)

    def part(self, rows: slice | Tensor) -> ChunkedTable:
        """Some rows of the table, as one chunk."""
        rows = rows.to(self.table.device) if isinstance(rows, Tensor) else rows
        table, rnorm = self.table[rows].contiguous(), None if self.rnorm is None else self.rnorm[rows].contiguous()
        return ChunkedTable(table, len(table), self.device, self.dtype, rnorm)

    def chunks(self, starts: Iterable[int]) -> Iterator[Chunk]:
        """The chunks that begin at the rows `starts`, in this order."""
        if self.rnorm is not None:
            for start in starts:
                yield Chunk(self.table[start : start + self.size], self.rnorm[start : start + self.size], start)
            return
        if not self.table.is_cpu or self.table.device == self.device:
            for start in starts:
                yield self._chunk(self.table[start : start + self.size].to(self.device).contiguous(), start)
            return
        with ThreadPoolExecutor(1) as worker:
            prefetched: deque[Future[tuple[Chunk, torch.cuda.Event | None]]] = deque()
            for start in starts:
                prefetched.append(worker.submit(self._fetch, start))
                if len(prefetched) == 2:
                    yield self._wait_for_copy(*prefetched.popleft().result())
            while prefetched:
                yield self._wait_for_copy(*prefetched.popleft().result())

    def _fetch(self, start: int) -> tuple[Chunk, torch.cuda.Event | None]:
        rows = self.table[start : start + self.size]
        if self.stream is None:
            return self._chunk(rows.to(self.device).contiguous(), start), None
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            chunk = self._chunk(rows.contiguous().pin_memory().to(self.device, non_blocking=True), start)
            return chunk, self.stream.record_event()

    def _wait_for_copy(self, chunk: Chunk, event: torch.cuda.Event | None) -> Chunk:
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)  # not for the copy stream: the next chunk is on it already
            chunk.rows.record_stream(stream)
            chunk.rnorm.record_stream(stream)
        return chunk

    def _chunk(self, rows: Tensor, start: int) -> Chunk:
        return Chunk(*with_norms(cast(rows, self.dtype)), start)
