"""Exact top-k by cosine on the CPU; within one table every unordered pair of tiles is multiplied once.

The similarity passes by in blocks that stay in cache. What exceeds its row's bar is appended to the row's list, and
within one table also to the list of its column. A bar starts as a guess (`kernels/bars.py`), so that a list hardly
outgrows k by much; a list that does fill up is cut to its k best, whose last is then the bar. A list that ends short
of k was guessed wrong, and its row is searched again without a guess.

An entry is an int64, the similarity in sortable form above the complement of the id, as in the kernel: entries differ,
so the k largest are one set, and equal similarities fall by rising id. Ids reach every list in rising order: what only
equals a bar that was set by a cut has lost its tie.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .cpu import accumulation_dtype
from .kernels import bars as guessing
from .kernels.norms import with_norms
from .kernels.panels import Progress

CPU = torch.device("cpu")
TILE = 512  # rows and columns of a product
HEIGHT, WIDTH = 1024, 2048  # of a block: powers of two, at least TILE
GROUP = 4  # rows whose maximum is compared first, when columns are looked at
CUT = 256  # lists that are cut at a time
EMPTY = torch.iinfo(torch.int64).min  # below every entry
ID_MASK = 2**32 - 1


def cosine_topk(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    previous: Tensor | None,
    workspace_bytes: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.cosine_topk.cosine_topk`, for `queries [P, D]` and `keys [N, D]`; None: the queries, without self."""
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
    bars = None if previous is None else guessing.remember(queries, table, previous, queries.dtype)
    bars = _guess(*operands, k) if bars is None else bars
    own = torch.arange(len(queries), device=CPU) if keys is None else None
    search = _Search(*operands, k, bars, own, symmetric=keys is None, workspace_bytes=workspace_bytes)
    short = []
    for rows, best in search.run(progress):
        short.append(rows.start + (best[:, -1] == EMPTY).nonzero().flatten())
        values[rows], ids[rows] = _unpack(best)
    again_rows = torch.cat(short)
    for rows in again_rows.split(TILE) if len(again_rows) else ():
        own = rows if keys is None else None
        again = _Search(queries[rows], table, rnorm_queries[rows], rnorm_keys, k, None, own, False, workspace_bytes)
        for part, best in again.run(None):
            values[rows[part]], ids[rows[part]] = _unpack(best)
    return values, ids


def _by_sorting(
    queries: Tensor, keys: Tensor | None, k: int, workspace_bytes: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Strips of the similarity, sorted whole: for fp64, which no entry can hold, and away from the CPU."""
    dtype = accumulation_dtype(queries.dtype)
    table = reference.normalize((queries if keys is None else keys).to(dtype))
    values = queries.new_empty(queries.shape[0], k, dtype=dtype)
    ids = queries.new_empty(queries.shape[0], k, dtype=torch.int64)
    strip = min(len(queries), max(2, workspace_bytes // (32 * len(table))))
    for start in range(0, len(queries), max(strip, 1)):
        first = min(start, len(queries) - strip)  # strips of one size, as the tiles below
        rows = slice(first, first + strip)
        similarity = reference.normalize(queries[rows].to(dtype)) @ table.mT
        if keys is None:
            similarity.diagonal(first).fill_(-torch.inf)
        best, order = similarity.sort(dim=1, descending=True, stable=True)
        values[rows], ids[rows] = best[:, :k], order[:, :k]
        if progress is not None:
            progress(min(start + strip, len(queries)), len(queries))
    return values, ids


def _guess(queries: Tensor, keys: Tensor, rnorm_queries: Tensor, rnorm_keys: Tensor, k: int) -> Tensor | None:
    """Bars from a sample of the keys, where one pays."""
    plan = guessing.sample(*keys.shape, k)
    if plan is None:
        return None
    chosen, rank = plan
    some = keys[chosen].float() * rnorm_keys[chosen, None]
    bars = torch.empty_like(rnorm_queries)
    step = max(1, guessing.STRIP // len(some))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similarity = queries[rows].float() @ some.mT
        if 8 * rank < len(some):  # the best of the best of four: hardly lower, and a quarter to select from
            similarity = similarity.unflatten(1, (4, len(some) // 4)).amax(1)
        bars[rows] = similarity.topk(rank, dim=1, sorted=False).values.amin(1) * rnorm_queries[rows]
    guess: Tensor = guessing.just_below(bars)
    return guess


class _Lists:
    """Growing lists of entries: similarities, ids and their number; what they are compared with is not kept here."""

    def __init__(self, count: int, room: int) -> None:
        self.values = torch.empty(count, room, dtype=torch.float32, device=CPU)
        self.ids = torch.empty(count, room, dtype=torch.int32, device=CPU)
        self.counts = torch.zeros(count, dtype=torch.int64, device=CPU)
        self.starts = torch.arange(count, device=CPU) * room

    def room(self) -> int:
        return self.values.shape[1]

    def append(self, first: int, lists: Tensor, counts: Tensor, values: Tensor, ids: Tensor) -> None:
        """Append `values` and `ids`, sorted by list; `counts` of them go to the lists from `first` on."""
        here = slice(first, first + len(counts))
        starts = self.starts[here] + self.counts[here] + counts - counts.cumsum(0)
        places = starts.take(lists).add_(torch.arange(len(lists), device=CPU))
        self.values.view(-1).scatter_(0, places, values)
        self.ids.view(-1).scatter_(0, places, ids.to(torch.int32))
        self.counts[here] += counts

    def entries(self, rows: slice | Tensor) -> Tensor:
        """The entries of some lists, `[rows, longest]`, shorter lists filled up with `EMPTY`."""
        counts = self.counts[rows]
        longest = int(counts.amax())
        packed = _pack(self.values[rows, :longest], self.ids[rows, :longest])
        return packed.masked_fill_(torch.arange(longest, device=CPU) >= counts.unsqueeze(1), EMPTY)

    def replace(self, rows: Tensor, entries: Tensor) -> None:
        k = entries.shape[1]
        self.values[rows, :k], ids = _unpack(entries)
        self.ids[rows, :k] = ids.to(torch.int32)
        self.counts[rows] = (entries != EMPTY).sum(1)


class _Search:
    """One pass over all tiles. `own [P]`: the ids of the queries among the keys, to be left out."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        rnorm_queries: Tensor,
        rnorm_keys: Tensor,
        k: int,
        bars: Tensor | None,
        own: Tensor | None,
        symmetric: bool,
        workspace_bytes: int,
    ) -> None:
        # A normalised copy, if the workspace has it, where that is less to scale than half of the similarity.
        self.unit = 16 * keys.numel() <= workspace_bytes and 8 * keys.shape[1] < len(keys)
        if self.unit:
            keys = keys * rnorm_keys.unsqueeze(1)
            queries = keys if symmetric else queries * rnorm_queries.unsqueeze(1)
        self.queries, self.keys, self.rnorm_queries, self.rnorm_keys = queries, keys, rnorm_queries, rnorm_keys
        self.k, self.own, self.symmetric = k, own, symmetric
        self.bars = torch.full_like(rnorm_queries, -torch.inf) if bars is None else bars
        # Rows of a power of two and what does not exist lower than every bar: no division, no edges below.
        height, width = -(-len(queries) // GROUP) * GROUP, 1 << max(len(keys) - 1, 7).bit_length()
        shape = min(HEIGHT, height), min(WIDTH, width)
        self.block = torch.full(shape, -torch.inf, dtype=torch.float32, device=CPU)
        self.scale = torch.empty_like(self.block)
        self.above = torch.empty_like(self.block, dtype=torch.bool)
        room = min(len(keys), k + 64 + int(1.3 * guessing.candidates(*keys.shape, k)))
        self.found = _Lists(len(self.block), room)  # by the rows of a block
        self.earlier = _Lists(len(queries), room) if symmetric else None  # by the columns of earlier blocks

    def run(self, progress: Progress | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield, for a range of queries after the other, their k best entries in falling order."""
        count, (height, width) = len(self.keys), self.block.shape
        starts = range(0, len(self.queries), height)
        done, total = 0, sum(-(-(count - (start if self.symmetric else 0)) // width) for start in starts)
        for start in starts:
            rows = slice(start, min(start + height, len(self.queries)))
            self.found.counts.zero_()
            for first in range(start if self.symmetric else 0, count, width):
                columns = slice(first, min(first + width, count))
                self._multiply(rows, columns)
                self._keep_rows(rows, columns)
                if self.earlier is not None and columns.stop > rows.stop:
                    self._keep_columns(rows, columns, slice(max(rows.stop, first), columns.stop))
                done += 1
                if progress is not None:
                    progress(done, total)
            yield rows, self._best(rows)

    def _multiply(self, rows: slice, columns: slice) -> None:
        """Fill the block with the cosines of the queries `rows` and the keys `columns`."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        mirrored = self.symmetric and rows.start == columns.start
        for top in range(0, height, TILE):
            above, there = _tile(rows, top, len(self.queries))
            left = self.queries[there].float()
            for start in range(0, width, TILE):
                before, here = _tile(columns, start, len(self.keys))
                out = self.block[top : min(top + TILE, height), start : min(start + TILE, width)]
                if mirrored and start < top:
                    out.copy_(self.block[start : start + TILE, top : top + len(out)].mT)
                elif above or before or 1 in (len(left), here.stop - here.start):
                    out.copy_(_product(left, self.keys[here].float())[above:, before:])
                else:
                    torch.mm(left, self.keys[here].float().mT, out=out)
        if not self.unit:  # one factor for both, so that a pair's cosine is the same whichever of the two is the row
            scale = torch.mul(self.rnorm_queries[rows, None], self.rnorm_keys[columns], out=self.scale[:height, :width])
            self.block[:height, :width] *= scale
        self.block[:, width:] = -torch.inf
        self.block[height:] = -torch.inf
        if self.own is not None:
            column = self.own[rows] - columns.start
            row = ((column >= 0) & (column < width)).nonzero().flatten()
            self.block[row, column[row]] = -torch.inf

    def _bars(self, store: _Lists, lists: slice, queries: slice, width: int) -> tuple[Tensor, Tensor]:
        """The bars of some lists, and which of them will not be looked through: without a bar, and soon full."""
        bars = self.bars[queries]
        blind = (bars == -torch.inf) & (store.counts[lists] + width > store.room())
        return bars.masked_fill(blind, torch.inf), blind

    def _keep_rows(self, rows: slice, columns: slice) -> None:
        height, width = self.block.shape
        lists = slice(0, rows.stop - rows.start)
        bars, full = self._bars(self.found, lists, rows, columns.stop - columns.start)
        bars = torch.nn.functional.pad(bars, (0, height - len(bars)))
        torch.le(self.block, bars.unsqueeze(1), out=self.above)
        self.above.logical_not_()  # NaN is above all
        words = self.above.view(torch.int64).view(-1).nonzero().squeeze(1)  # eight at a time, few of which are not zero
        within = self.above.view(-1, 8).index_select(0, words).view(-1).nonzero().squeeze(1)
        places = (words.take(within >> 3) << 3) | (within & 7)
        values = self.block.take(places)
        found = places >> (width.bit_length() - 1), values, (places & (width - 1)) + columns.start
        self._append(self.found, lists, rows, found, full, self.block, columns.start)

    def _keep_columns(self, rows: slice, columns: slice, offered: slice) -> None:
        """Offer those of the block's `columns` that are `offered` to the lists of their queries, as rows."""
        assert self.earlier is not None
        height, width = self.block.shape
        groups, start = height // GROUP, offered.start - columns.start
        bars, full = self._bars(self.earlier, offered, offered, rows.stop - rows.start)
        within = slice(start, offered.stop - columns.start)
        peaks = self.block.view(groups, GROUP, width).amax(1).mT[within].contiguous()
        peaks = torch.le(peaks, bars.unsqueeze(1)).logical_not_().view(-1).nonzero().squeeze(1)
        column = peaks.div(groups, rounding_mode="floor")
        places = ((peaks - column * groups) * (GROUP * width) + column + start).unsqueeze(1)
        places = (places + torch.arange(GROUP, device=CPU) * width).view(-1)
        values = self.block.take(places)
        above = torch.le(values.view(-1, GROUP), bars.take(column).unsqueeze(1)).logical_not_()
        above = above.view(-1).nonzero().squeeze(1)
        lists = column.take(above.div(GROUP, rounding_mode="floor"))
        found = lists, values.take(above), (places.take(above) >> (width.bit_length() - 1)) + rows.start
        self._append(self.earlier, offered, offered, found, full, self.block[:, within].mT, rows.start)

    def _append(
        self,
        store: _Lists,
        lists: slice,
        queries: slice,
        found: tuple[Tensor, Tensor, Tensor],
        full: Tensor,
        similarity: Tensor,
        first_id: int,
    ) -> None:
        """Append what was `found` (list, value, id; sorted by list) to the `lists` of `queries`.

        Lists that are `full`, or will be, are cut to the k best of them and of `similarity [lists, m]`, dense.
        """
        to, values, ids = found
        counts = torch.bincount(to, minlength=len(full))
        full = full | (store.counts[lists] + counts > store.room())
        if not full.any():
            store.append(lists.start, to, counts, values, ids)
            return
        kept = full.logical_not().take(to).nonzero().squeeze(1)
        counts = counts.masked_fill(full, 0)
        store.append(lists.start, to.take(kept), counts, values.take(kept), ids.take(kept))
        everyone = torch.arange(first_id, first_id + similarity.shape[1], dtype=torch.int32, device=CPU)
        for part in full.nonzero().flatten().split(CUT):
            dense = similarity[part]
            entries = _pack(dense, everyone).masked_fill_(dense == -torch.inf, EMPTY)
            entries = torch.cat([store.entries(lists.start + part), entries], dim=1)
            best = entries.topk(self.k, dim=1, sorted=False).values
            store.replace(lists.start + part, best)
            last = best.amin(1)
            bar = torch.where(last == EMPTY, -torch.inf, _unpack(last)[0])
            self.bars[queries.start + part] = torch.maximum(self.bars[queries.start + part], bar)

    def _best(self, rows: slice) -> Tensor:
        """The k best of the queries `rows`, whose lists are complete."""
        parts = []
        for start in range(rows.start, rows.stop, CUT):
            part = slice(start, min(start + CUT, rows.stop))
            entries = self.found.entries(slice(part.start - rows.start, part.stop - rows.start))
            if self.earlier is not None:
                entries = torch.cat([self.earlier.entries(part), entries], dim=1)
            if entries.shape[1] < self.k:
                entries = torch.nn.functional.pad(entries, (0, self.k - entries.shape[1]), value=EMPTY)
            parts.append(entries.topk(self.k, dim=1).values)
        return torch.cat(parts)


def _tile(span: slice, offset: int, count: int) -> tuple[int, slice]:
    """TILE rows from `span.start + offset` on; the last tile of `count` begins earlier, by how much comes first.

    Most BLAS sum every element of a product of full tiles in the same order, and equal vectors then have equal
    similarities. None promises it, and no result depends on it.
    """
    start = span.start + offset
    known = min(start, max(0, start + TILE - count))
    return known, slice(start - known, min(start - known + TILE, count))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.mT`, of two rows at least: one row is a matrix-vector product, with sums in an order of its own."""
    twice = [torch.cat([part, part]) if len(part) == 1 else part for part in (left, right)]
    return (twice[0] @ twice[1].mT)[: len(left), : len(right)]


def _pack(values: Tensor, ids: Tensor) -> Tensor:
    bits = (values + 0.0).masked_fill_(values.isnan(), torch.nan).view(torch.int32)  # -0 + 0 is +0; one NaN, positive
    bits = bits ^ ((bits >> 31) & (2**31 - 1))
    return (bits.to(torch.int64) << 32) | (ID_MASK - ids.to(torch.int64))


def _unpack(entries: Tensor) -> tuple[Tensor, Tensor]:
    bits = (entries >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & (2**31 - 1))).view(torch.float32), ID_MASK - (entries & ID_MASK)
