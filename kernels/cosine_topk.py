"""Exact top-k by cosine without the similarity matrix. README.md has the derivation.

One program multiplies a tile of rows with a tile of columns, and appends what exceeds a row's bar to that row's list;
within one table every unordered pair of tiles is multiplied once, and what exceeds a column's bar is appended to the
column's list as well. An entry is one int64: the similarity in sortable form above the complement of the id. All
entries differ, so the k largest are a set that no order of appending can change, and equal similarities fall by rising
id.

Tiles are visited in rounds, and in a round in a circle, row block i with column block i + step, so that every list sees
equally many entries. Between rounds a list is cut to its k best, whose last is then the bar. Bars may start as a guess
(bars.py). Nothing is lost: a round after which a list would be longer than there is room for is replayed in smaller
pieces, with the bars that it taught; a list that ends short of k was guessed wrong, and is searched for again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bars as guessing
from . import config, tuning
from .panels import PINNED_BYTES, Panel, Panels, Progress
from .tiles import LOWEST, dot, sortable, unsortable

EMPTY = tl.constexpr(-(2**63))  # below every entry
HIGHEST_ENTRY = tl.constexpr(2**63 - 1)
LAST_ID = tl.constexpr(2**32 - 1)
FILL = 0.7  # of the room that is left: what a round is planned to take
LONGEST = 4096  # of the lists that the kernel selects from; longer ones are for torch
AT_ONCE = 2**25  # entries that torch selects from
TRIAL = 2.0**40  # operations of the search by which tiles are compared
FEW = 2048  # rows or columns that it has at least
AGAIN = 4096  # rows whose bars were guessed wrong, to be searched for at a time


@triton.jit
def _halves(b_tile):  # [BM, BN] -> 2 x [BM, BN / 2]
    return tl.split(tl.permute(tl.reshape(b_tile, [b_tile.shape[0], 2, b_tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _append(p_lists, p_counts, b_bars, o_list, b_key, b_id, m_entry, room):
    """Append to the lists `o_list`, of a shape that broadcasts to that of `b_key`, what exceeds their bars."""
    # Ids count from one here, so that no entry is the largest integer.
    b_entry = (b_key.to(tl.int64) << 32) | ((b_id.to(tl.int64) + 1) ^ LAST_ID)
    above = (b_entry > b_bars) & m_entry
    b_place = tl.atomic_add(p_counts + o_list + tl.zeros_like(b_key), 1, mask=above, sem="relaxed")
    tl.store(p_lists + o_list.to(tl.int64) * room + b_place, b_entry, mask=above & (b_place < room))


@triton.jit(
    do_not_specialize=["rows", "columns", "room", "first_row", "first_column", "first_step", "steps", "same_panel"]
)
def _append_kernel(
    p_rows,  # [rows, D]
    p_columns,  # [columns, D]
    p_rnorm_rows,  # [rows] fp32
    p_rnorm_columns,  # [columns] fp32
    p_row_lists,  # [rows, room] int64
    p_row_counts,  # [rows] int32, beyond `room` where more was found
    p_row_bars,  # [rows] int64
    p_column_lists,  # [columns, room] int64, and so on: the rows' own where the panel is the same
    p_column_counts,
    p_column_bars,
    rows,
    columns,
    D,
    room,
    first_row,  # the id of row 0
    first_column,
    first_step,
    steps,
    same_panel,
    MIRROR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    tl.static_assert(BN % BM == 0)
    # GROUP row tiles and all their steps come first: neighbours in time share rows and columns in the cache.
    i_program = tl.program_id(0)
    first_m = i_program // (GROUP * steps) * GROUP
    group = tl.minimum(tl.cdiv(rows, BM) - first_m, GROUP)
    i_m = first_m + i_program % (GROUP * steps) % group
    step = first_step + i_program % (GROUP * steps) // group
    blocks = tl.cdiv(columns, BN)
    i_block = i_m * BM // BN
    if same_panel & (2 * step == blocks) & (2 * i_block >= blocks):
        return  # seen from its other end
    o_row = i_m * BM + tl.arange(0, BM)
    o_column = (i_block + step) % blocks * BN + tl.arange(0, BN)
    m_row = o_row < rows
    m_column = o_column < columns
    p_row = p_rows + o_row[:, None].to(tl.int64) * D
    p_column = p_columns + o_column[None, :].to(tl.int64) * D
    b_dot = tl.zeros([BM, BN], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_rows = tl.load(p_row + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
        b_columns = tl.load(p_column + o_d[:, None], mask=m_column[None, :] & m_d[:, None], other=0.0)
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_dot = dot(b_rows, b_columns, b_dot, PRECISION)

    b_rnorm_row = tl.load(p_rnorm_rows + o_row, mask=m_row, other=0.0)
    b_row_bars = tl.load(p_row_bars + o_row, mask=m_row, other=0)
    is_mirrored = (same_panel == 0) | (step > 0)
    # In parts of 16 columns, so that entries and places stay in registers.
    PARTS: tl.constexpr = BN // 16
    b_parts = (b_dot,)
    for _ in tl.static_range(PARTS.bit_length() - 1):
        b_halves = ()
        for i_part in tl.static_range(len(b_parts)):
            b_halves = b_halves + _halves(b_parts[i_part])
        b_parts = b_halves
    for i_part in tl.static_range(PARTS):
        b_part = b_parts[i_part]  # [BM, 16]
        o_c = (i_block + step) % blocks * BN + i_part * 16 + tl.arange(0, 16)
        m_c = o_c < columns
        b_rnorm_column = tl.load(p_rnorm_columns + o_c, mask=m_c, other=0.0)
        # One factor for both, so that a pair's cosine is the same whichever of the two is the row.
        b_key = sortable(b_part * (b_rnorm_row[:, None] * b_rnorm_column[None, :]))
        b_row_id, b_column_id = first_row + o_row[:, None], first_column + o_c[None, :]
        m_entry = m_row[:, None] & m_c[None, :]
        if MIRROR:
            m_entry = m_entry & (b_row_id != b_column_id)
        _append(p_row_lists, p_row_counts, b_row_bars[:, None], o_row[:, None], b_key, b_column_id, m_entry, room)
        if MIRROR:
            b_bars = tl.load(p_column_bars + o_c, mask=m_c, other=0)
            m_entry = m_entry & is_mirrored
            _append(p_column_lists, p_column_counts, b_bars[None, :], o_c[None, :], b_key, b_row_id, m_entry, room)


@triton.jit(do_not_specialize=["rows", "room", "k"])
def _select_kernel(
    p_lists,  # [rows, room] int64
    p_counts,  # [rows] int32
    p_bars,  # [rows] int64
    p_settled,  # [rows] int32: with REPLAY, the counts to return to
    rows,
    room,
    k,
    REPLAY: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
):
    """Cut lists to their k best, in no order, and raise bars to the last of them; with REPLAY only bars are raised."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_l = tl.arange(0, BL)
    m_row = o_row < rows
    b_count = tl.load(p_counts + o_row, mask=m_row, other=0)
    p_list = p_lists + o_row[:, None].to(tl.int64) * room
    m_entry = m_row[:, None] & (o_l[None, :] < tl.minimum(b_count, room)[:, None])
    b_entry = tl.load(p_list + o_l[None, :], mask=m_entry, other=EMPTY)
    b_bar = tl.load(p_bars + o_row, mask=m_row, other=0)
    if REPLAY:
        b_settled = tl.load(p_settled + o_row, mask=m_row, other=0)
    tl.debug_barrier()  # below, a list's entries, its count and its bar are replaced: every thread has read them before
    # Halve [low, high) until k entries reach low, or it holds one number only; fewer than k reach high.
    b_low = tl.full([BM], EMPTY, tl.int64)
    b_high = tl.max(b_entry, axis=1) + 1
    searching = m_row & (b_count > k)
    while tl.max(searching.to(tl.int32), axis=0) > 0:
        b_middle = (b_low & b_high) + ((b_low ^ b_high) >> 1)
        b_reach = tl.sum((b_entry >= b_middle[:, None]).to(tl.int32), axis=1)
        b_low = tl.where(searching & (b_reach >= k), b_middle, b_low)
        b_high = tl.where(searching & (b_reach < k), b_middle, b_high)
        searching = searching & (b_reach != k) & (b_low + 1 < b_high)
    m_keep = m_entry & (b_entry >= b_low[:, None])
    b_last = tl.min(tl.where(m_keep, b_entry, HIGHEST_ENTRY), axis=1)
    if REPLAY:  # the k-th found so far is yet to be kept: the bar stays below it
        tl.store(p_bars + o_row, tl.where(b_count < k, b_bar, tl.maximum(b_bar, b_last - 1)), mask=m_row)
        tl.store(p_counts + o_row, b_settled, mask=m_row)
    else:
        tl.store(p_bars + o_row, tl.where(b_count < k, b_bar, tl.maximum(b_bar, b_last)), mask=m_row)
        tl.store(p_counts + o_row, tl.minimum(b_count, k), mask=m_row)
        b_place = tl.cumsum(m_keep.to(tl.int32), axis=1) - 1
        tl.store(p_list + b_place, b_entry, mask=m_keep)


@triton.jit(do_not_specialize=["rows", "k"])
def _order_kernel(
    p_entries,  # [rows, k] int64
    p_similarities,  # [rows, k] fp32
    p_ids,  # [rows, k] int64
    rows,
    k,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Put entries, all of them different, in falling order, and take them apart: a place is how many are larger."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_row = (o_row < rows)[:, None]
    m_entry = m_row & (o_k[None, :] < k)
    p_row = p_entries + o_row[:, None].to(tl.int64) * k
    b_entry = tl.load(p_row + o_k[None, :], mask=m_entry, other=EMPTY)
    b_place = tl.zeros([BM, BK], tl.int32)
    for i_k in range(0, k, BK):
        o_j = i_k + tl.arange(0, BK)
        b_other = tl.load(p_row + o_j[None, :], mask=m_row & (o_j[None, :] < k), other=EMPTY)
        b_larger = b_other[:, None, :] > b_entry[:, :, None]  # [BM, BK, BK]
        b_place += tl.sum(b_larger.to(tl.int32), axis=2)
    o_out = o_row[:, None].to(tl.int64) * k + b_place
    tl.store(p_similarities + o_out, unsortable((b_entry >> 32).to(tl.int32)), mask=m_entry)
    tl.store(p_ids + o_out, ((b_entry & LAST_ID) ^ LAST_ID) - 1, mask=m_entry)


class Lists:
    """Growing lists of entries, of `count` rows."""

    def __init__(self, count: int, room: int, device: torch.device) -> None:
        self.entries = torch.empty(count, room, dtype=torch.int64, device=device)
        self.counts = torch.zeros(count, dtype=torch.int32, device=device)
        self.bars = torch.empty(count, dtype=torch.int64, device=device)
        self.longest = 0

    def cut(self, k: int) -> None:
        """Keep the k best of every list, in no order; the last of them is the new bar."""
        if self.longest:
            self._select(k, None)
            self.longest = min(self.longest, k)

    def undo(self, k: int, settled: Tensor) -> None:
        """Return to the `settled` counts, with bars just below the k-th best of what has been found since."""
        self._select(k, settled)
        self.longest = int(self.counts.max())

    def _select(self, k: int, settled: Tensor | None) -> None:
        count, room = self.entries.shape
        size = triton.next_power_of_2(max(16, k, min(self.longest, room)))
        if size > LONGEST:
            for start in range(0, count, max(1, AT_ONCE // size)):
                self._select_with_torch(k, slice(start, start + max(1, AT_ONCE // size)), settled)
            return
        tiles, num_warps, num_stages = config.select(size)
        _select_kernel[(triton.cdiv(count, tiles["BM"]),)](
            self.entries, self.counts, self.bars, self.counts if settled is None else settled, count, room, k,
            REPLAY=settled is not None, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    def _select_with_torch(self, k: int, rows: slice, settled: Tensor | None) -> None:
        places = torch.arange(min(self.longest, self.entries.shape[1]), device=self.entries.device)
        is_empty = places >= self.counts[rows].unsqueeze(1)
        entries = self.entries[rows, : len(places)].masked_fill(is_empty, EMPTY.value)
        best = entries.topk(min(k, len(places)), dim=1).values
        last = best[:, -1] if len(places) >= k else torch.full_like(best[:, 0], EMPTY.value)
        if settled is None:
            self.entries[rows, : best.shape[1]] = best
            self.counts[rows] = self.counts[rows].clamp(max=k)
        else:
            last = torch.where(last == EMPTY.value, last, last - 1)
            self.counts[rows] = settled[rows]
        self.bars[rows] = torch.maximum(self.bars[rows], last)


class Walk:
    """The way past all tiles: panel by panel, round by round. `best` and `bars` are filled as it goes."""

    def __init__(
        self, k: int, room: int, tiling: config.Config, best: Tensor, bars: Tensor, progress: Progress | None
    ) -> None:
        self.k, self.room, self.best, self.bars = k, room, best, bars
        self.tiles, self.num_warps, self.num_stages = tiling
        self.progress, self.done, self.total = progress, 0, 0

    def within(self, panels: Panels) -> None:
        """Search a table within itself: every panel with itself and with those before it, which are not smaller."""
        count, size = len(self.best), panels.size
        order = [other for start in range(0, count, size) for other in (start, *range(0, start, size))]
        self.total = sum(
            self._tiles(min(size, count - start), min(size, count - other), start == other)
            for start in range(0, count, size)
            for other in range(0, start + 1, size)
        )
        coming = panels.walk(order)
        for start in range(0, count, size):
            rows = next(coming)
            lists = self._lists(rows)
            self.rounds(rows, rows, lists, lists)
            for _ in range(0, start, size):
                columns = next(coming)
                column_lists = self._lists(columns)
                self.rounds(rows, columns, lists, column_lists)
                self._keep(columns, column_lists)
                del columns, column_lists  # before the next ones come
            self._keep(rows, lists)
            del rows, lists

    def among(self, queries: Panels, keys: Panels) -> None:
        """Search for queries among keys."""
        count, others = len(self.best), len(keys.table)
        starts, other_starts = range(0, count, queries.size), range(0, others, keys.size)
        self.total = sum(
            self._tiles(min(queries.size, count - start), min(keys.size, others - other), False)
            for start in starts
            for other in other_starts
        )
        for rows in queries.walk(starts):
            lists = self._lists(rows)
            for columns in keys.walk(other_starts):
                self.rounds(rows, columns, lists, None)
                del columns
            self._keep(rows, lists)
            del rows, lists

    def _lists(self, panel: Panel) -> Lists:
        """The lists of a panel's rows, with the best so far."""
        here = slice(panel.first, panel.first + len(panel.rows))
        lists = Lists(len(panel.rows), self.room, self.best.device)
        lists.bars.copy_(self.bars[here])
        lists.entries[:, : self.k] = self.best[here]
        torch.sum(self.best[here] != EMPTY.value, dim=1, dtype=torch.int32, out=lists.counts)
        lists.longest = int(lists.counts.max())
        return lists

    def _keep(self, panel: Panel, lists: Lists) -> None:
        here = slice(panel.first, panel.first + len(panel.rows))
        lists.cut(self.k)
        kept = torch.arange(self.k, device=lists.counts.device) < lists.counts.unsqueeze(1)
        self.best[here] = torch.where(kept, lists.entries[:, : self.k], EMPTY.value)
        self.bars[here] = lists.bars

    def _tiles(self, rows: int, columns: int, is_same: bool) -> int:
        blocks = triton.cdiv(columns, self.tiles["BN"])
        return triton.cdiv(rows, self.tiles["BM"]) * (blocks // 2 + 1 if is_same else blocks)

    def rounds(self, rows: Panel, columns: Panel, row_lists: Lists, column_lists: Lists | None) -> Any:
        """Offer every pair of a row and a column to the row's list and, where there are such, to the column's.

        Returns:
            The compiled kernel.
        """
        count, width, dim = len(rows.rows), len(columns.rows), rows.rows.shape[1]
        is_same = column_lists is row_lists
        lists = [row_lists] if is_same or column_lists is None else [row_lists, column_lists]
        blocks, tiles_m = triton.cdiv(width, self.tiles["BN"]), triton.cdiv(count, self.tiles["BM"])
        last = blocks // 2 + 1 if is_same else blocks
        entries_a_step = self.tiles["BN"] * (2 if is_same else 1)
        step, planned = 0, 0
        while step < last:
            longest = max(each.longest for each in lists)
            if longest + entries_a_step > self.room:
                for each in lists:
                    each.cut(self.k)
                longest = max(each.longest for each in lists)
            certain = max(1, (self.room - longest) // entries_a_step)
            steps = min(max(planned, certain), last - step, max(1, config.MAX_GRID // tiles_m))
            settled = [each.counts.clone() for each in lists]
            other = row_lists if column_lists is None else column_lists
            kernel = _append_kernel[(tiles_m * steps,)](
                rows.rows, columns.rows, rows.rnorm, columns.rnorm,
                row_lists.entries, row_lists.counts, row_lists.bars, other.entries, other.counts, other.bars,
                count, width, dim, self.room, rows.first, columns.first, step, steps, int(is_same),
                MIRROR=column_lists is not None, PRECISION=config.precision(), **self.tiles,
                num_warps=self.num_warps, num_stages=self.num_stages,
            )  # fmt: skip
            for each in lists:
                each.longest = int(each.counts.max())
            most = max(each.longest for each in lists)
            if most > self.room:
                for each, counts in zip(lists, settled, strict=True):
                    each.undo(self.k, counts)
                    each.cut(self.k)
                planned = steps // 4
                continue
            rate = max(most - longest, 1) / steps
            step += steps
            self._tell(tiles_m * steps)
            if most > self.k and most + rate * (last - step) > self.room:
                for each in lists:
                    each.cut(self.k)
                rate, most = min(rate, 1.3 * self.k / step), self.k
            planned = int(FILL * (self.room - most) / rate)
        return kernel

    def _tell(self, tiles: int) -> None:
        self.done += tiles
        if self.progress is not None:
            self.progress(self.done, self.total)


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
        workspace_bytes: of lists and of panels of tables that have to be moved or cast, beyond O(P k).
        device, dtype: where, and in what precision, to multiply; the queries' where None.
        progress: called with tiles done and tiles in all.

    Returns:
        similarities fp32 `[P, k]`, falling, and indices int64 `[P, k]`; equal similarities by rising index.
    """
    device, dtype = device or queries.device, dtype or queries.dtype
    table = queries if keys is None else keys
    best = torch.full((len(queries), k), EMPTY.value, dtype=torch.int64, device=device)
    if best.numel() == 0:
        return ordered(best)
    bars = torch.full((len(queries),), EMPTY.value, dtype=torch.int64, device=device)
    guess = None if previous is None else guessing.remember(queries, table, previous, dtype)
    if guess is None and (plan := guessing.sample(*table.shape, k)) is not None:
        chosen, rank = plan
        guess = cosine_topk(queries, table[chosen], rank, None, workspace_bytes, device, dtype)[0][:, -1]
        guess = guessing.just_below(guess)
    if guess is not None:
        bars = _pack(guess.to(device))
    _search(queries, keys, k, best, bars, workspace_bytes, dtype, progress)
    # Guessed too high: once more among all, without a guess and with themselves.
    short = (best[:, -1] == EMPTY.value).nonzero().flatten()
    for start in range(0, len(short), AGAIN):
        rows = short[start : start + AGAIN]
        again = torch.full((len(rows), k + (keys is None)), EMPTY.value, dtype=torch.int64, device=device)
        none = torch.full((len(rows),), EMPTY.value, dtype=torch.int64, device=device)
        _search(queries[rows.to(queries.device)], table, again.shape[1], again, none, workspace_bytes, dtype, None)
        best[rows] = again if keys is not None else _without(rows, again)
    return ordered(best)


def _without(ids: Tensor, entries: Tensor) -> Tensor:
    """Drop each row's own entry; where so many equals come first that it is not there, the last one."""
    kept = ((entries & LAST_ID.value) ^ LAST_ID.value) - 1 != ids.unsqueeze(1)
    absent = kept.all(1).nonzero().flatten()
    kept[absent, entries[absent].argmin(1)] = False
    return entries[kept].view(len(entries), -1)


def _search(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    best: Tensor,
    bars: Tensor,
    workspace_bytes: int | None,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Fill `best [P, k]` with the entries above `bars [P]`, as far as there are k; both are changed."""
    table, device = queries if keys is None else keys, best.device
    tiling = _tiling(queries, keys, k, bars, workspace_bytes, dtype)
    room, size = _rooms(queries, table, k, tiling.tiles["BN"], workspace_bytes, device, dtype)
    panels = Panels(queries, size, device, dtype)
    walk = Walk(k, room, tiling, best, bars, progress)
    if keys is None:
        walk.within(panels)
    else:
        is_moved = keys.device != device or keys.dtype != dtype
        walk.among(panels, Panels(keys, size if is_moved else len(keys), device, dtype))


def _tiling(
    queries: Tensor, keys: Tensor | None, k: int, bars: Tensor, workspace_bytes: int | None, dtype: torch.dtype
) -> config.Config:
    """The tiles of a search; where they are compared, by a part of it: some queries among as many keys."""
    table, device = queries if keys is None else keys, bars.device
    dim = table.shape[1]
    shape = 1 << (max(dim, 1).bit_length() - 1), dtype.itemsize
    widest = max(each.tiles["BN"] for each in config.cosine_topk(*shape))

    room, size = _rooms(queries, table, k, widest, workspace_bytes, device, dtype)
    if keys is None:
        columns = rows = min(size, len(table), int((TRIAL / max(dim, 1)) ** 0.5))
    else:
        columns = min(size, len(table))
        rows = min(size, len(queries), 1 + int(TRIAL / max(dim * columns, 1)))
    operations = float(rows) * columns * dim * (1 if keys is None else 2)
    if min(rows, columns) < FEW:  # as the sample's: too few programs to tell anything
        operations = 0.0

    @cache
    def part() -> tuple[Panel, Panel, Lists]:
        left = next(iter(Panels(queries[:rows], rows, device, dtype).walk([0])))
        right = left if keys is None else next(iter(Panels(table[:columns], columns, device, dtype).walk([0])))
        return left, right, Lists(rows, room, device)

    def run(tiling: config.Config) -> Any:
        left, right, lists = part()
        lists.counts.zero_()
        lists.longest = 0
        lists.bars.copy_(bars[:rows])
        walk = Walk(k, lists.entries.shape[1], tiling, lists.entries[:, :k], lists.bars, None)
        return walk.rounds(left, right, lists, lists if keys is None else None)

    variant = f"{dtype} {config.precision()} {'within' if keys is None else 'among'}"
    return tuning.choose(config.cosine_topk, shape, variant, operations, run)


def _rooms(
    queries: Tensor,
    table: Tensor,
    k: int,
    block: int,
    workspace_bytes: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Room in a list, and rows of a panel."""
    num_keys, dim = table.shape
    room = max(k, min(num_keys, max(int(1.3 * guessing.candidates(num_keys, dim, k)), k + 4 * block)))
    moved = table if table.device != device or table.dtype != dtype else None
    return room, _panel_size(len(queries), dim, block, room, workspace_bytes, moved, device, dtype)


def _panel_size(
    count: int,
    dim: int,
    block: int,
    room: int,
    workspace_bytes: int | None,
    moved: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """How many rows a panel may have: two panels' lists and, of a table that is `moved`, three panels, fit."""
    if workspace_bytes is None:
        workspace_bytes = config.workspace(device)
    if moved is None and 8 * room * count <= workspace_bytes:
        return count
    row_bytes = 16 * room
    most = count
    if moved is not None:  # a third panel is on its way, as it was, normalised in fp32, and cast
        row_bytes += dim * (3 * dtype.itemsize + moved.element_size() + 4)
        most = PINNED_BYTES // (dim * moved.element_size())
    return max(min(workspace_bytes // row_bytes, most) // block, 1) * block


def _pack(similarity: Tensor) -> Tensor:
    """The bar below every entry of `similarity` or more."""
    bits = similarity.float().view(torch.int32)
    sign = bits >> 31  # as `tiles.sortable`
    return ((((bits & (2**31 - 1)) ^ sign) - sign).to(torch.int64) << 32) | LAST_ID.value


def ordered(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and ids of entries `[rows, k]`, in falling order."""
    count, k = entries.shape
    similarities = torch.empty(count, k, dtype=torch.float32, device=entries.device)
    ids = torch.empty(count, k, dtype=torch.int64, device=entries.device)
    if k > LONGEST:  # comparing all with all is slow
        for rows in torch.arange(count, device=entries.device).split(max(1, AT_ONCE // k)):
            best = entries[rows].sort(dim=1, descending=True).values
            key = (best >> 32).to(torch.int32)
            similarities[rows] = (key.abs() | (key & LOWEST.value)).view(torch.float32)  # as `tiles.unsortable`
            ids[rows] = ((best & LAST_ID.value) ^ LAST_ID.value) - 1
    elif entries.numel():
        tiles, num_warps, num_stages = config.order(k)
        _order_kernel[(triton.cdiv(count, tiles["BM"]), triton.cdiv(k, tiles["BK"]))](
            entries, similarities, ids, count, k, **tiles, num_warps=num_warps, num_stages=num_stages
        )
    return similarities, ids
