"""Tables in pieces: rows on the device with their inverse norms, fetched ahead where the table is elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .norms import with_norms

PINNED_BYTES = 2**31  # of a panel in page-locked host memory
Progress = Callable[[int, int], None]  # is told what is done of a search, and what there is to do


class Panel(NamedTuple):
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


class Panels:
    """A table `[N, D]` in panels of at most `size` rows, on `device` and in `dtype`.

    A panel that has to be copied is fetched by another thread while the device works on those before it.
    """

    def __init__(self, table: Tensor, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.table, self.size, self.device, self.dtype = table, size, device, dtype
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and table.is_cpu else None

    def walk(self, order: Iterable[int]) -> Iterator[Panel]:
        """The panels that start at the rows in `order`; the next one is on its way while one is in use."""
        if not self.table.is_cpu or self.table.device == self.device:
            for start in order:
                yield self._panel(self.table[start : start + self.size].to(self.device).contiguous(), start)
            return
        with ThreadPoolExecutor(1) as worker:
            coming = None
            for start in itertools.chain(order, [None]):
                ready, coming = coming, None if start is None else worker.submit(self._fetch, start)
                if ready is not None:
                    yield self._arrived(*ready.result())

    def _fetch(self, start: int) -> tuple[Panel, torch.cuda.Event | None]:
        rows = self.table[start : start + self.size]
        if self.stream is None:
            return self._panel(rows.to(self.device).contiguous(), start), None
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            panel = self._panel(rows.contiguous().pin_memory().to(self.device, non_blocking=True), start)
            return panel, self.stream.record_event()

    def _arrived(self, panel: Panel, event: torch.cuda.Event | None) -> Panel:
        if event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)  # not for the stream: the next panel is on it already
            panel.rows.record_stream(here)
            panel.rnorm.record_stream(here)
        return panel

    def _panel(self, rows: Tensor, start: int) -> Panel:
        return Panel(*with_norms(cast(rows, self.dtype)), start)
