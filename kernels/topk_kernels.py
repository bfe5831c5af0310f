"""Kernels of top-k by cosine: append (launched by `topk_search.py`), select and sort. README.md has the derivation.

One program multiplies a tile of rows with a tile of columns, and appends what exceeds a row's threshold to the row's
candidate buffer; within one table every unordered pair of tiles is multiplied once, and what exceeds a column's
threshold is appended to the column's buffer as well. Candidates are packed as in `common/candidates.py`. Torch selects
from buffers that are longer than a kernel can hold in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import candidates as packing
from . import config
from .descriptors import load_tile
from .tiles import HIGHEST, LOWEST, dot, sortable, unsortable

EMPTY = tl.constexpr(packing.EMPTY)
HIGHEST_CANDIDATE = tl.constexpr(2**63 - 1)
LAST_ID = tl.constexpr(packing.LAST_ID)
NO_PAIR = tl.constexpr((packing.LOWEST << 32) | 0xFFFFFFFF)  # not below any candidate whose key is LOWEST
MAX_KERNEL_LIST = 4096  # of the buffers that the kernel selects from; longer ones are for torch
MAX_SORTED_LIST = 1024  # of candidates that the kernel sorts; longer ones are for torch
TORCH_TOPK_ENTRIES = 2**25  # candidates that torch selects from at a time


@triton.jit
def _halves(b_tile):  # [BM, BN] -> 2 x [BM, BN / 2]
    return tl.split(tl.permute(tl.reshape(b_tile, [b_tile.shape[0], 2, b_tile.shape[1] // 2]), [0, 2, 1]))


# What does not exceed its threshold branches past the atomic, and then past the store: most often a whole warp at once.
# Addresses are computed where they are needed, for they would take four registers for every row and column.
RESERVE = tl.constexpr("""{
    .reg .pred %above;
    .reg .b32 %position;
    .reg .b64 %candidate, %count;
    mov.b64 %candidate, {$2, $1};
    mov.b32 %position, -1;
    setp.gt.s64 %above, %candidate, $3;
    @!%above bra $$DONE;
    mad.wide.u32 %count, $4, 4, $5;
    atom.relaxed.gpu.global.add.u32 %position, [%count], 1;
$$DONE:
    mov.b32 $0, %position;
}""")
STORE = tl.constexpr("""{
    .reg .pred %fits;
    .reg .b64 %candidate, %place, %offset;
    setp.lt.u32 %fits, $1, $6;
    @!%fits bra $$DONE;
    mov.b64 %candidate, {$3, $2};
    mul.wide.u32 %place, $4, $6;
    cvt.u64.u32 %offset, $1;
    add.u64 %place, %place, %offset;
    shl.b64 %place, %place, 3;
    add.u64 %place, %place, $5;
    st.global.b64 [%place], %candidate;
$$DONE:
    mov.b32 $0, 0;
}""")


@triton.jit
def _candidate(b_key, b_low):
    return (b_key.to(tl.int64) << 32) | b_low.to(tl.uint32).to(tl.int64)  # the upper half is the key alone


@triton.jit
def _reserve(p_counts, b_thresholds, o_row, b_key, b_id, BRANCH: tl.constexpr):
    """Places in the buffers of `o_row`, which broadcasts to the shape of `b_key`, of what exceeds their thresholds.

    -1 for the others.
    """
    b_low = -2 - b_id  # 2^32 - 2 - id
    if BRANCH:
        b_position = tl.inline_asm_elementwise(
            RESERVE,
            "=r,r,r,l,r,l",
            [b_key, b_low, b_thresholds, o_row, p_counts.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        above = _candidate(b_key, b_low) > b_thresholds
        # "Not contiguous": else the atomics take a layout of their own, and their addresses pass through shared memory.
        p_count = tl.max_contiguous(p_counts + o_row, [1, 1]).broadcast_to(b_key.shape)
        b_position = tl.where(above, tl.atomic_add(p_count, 1, mask=above, sem="relaxed"), -1)
    return b_position


@triton.jit
def _append(p_buffers, b_position, o_row, b_key, b_id, capacity, BRANCH: tl.constexpr):
    """Store candidates in the places that are reserved for them, as far as the buffers reach."""
    b_low = -2 - b_id
    if BRANCH:
        tl.inline_asm_elementwise(
            STORE,
            "=r,r,r,r,r,l,r",
            [b_position, b_key, b_low, o_row, p_buffers.to(tl.int64), capacity],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        p_place = p_buffers + o_row.to(tl.int64) * capacity + b_position
        tl.store(p_place, _candidate(b_key, b_low), mask=(b_position >= 0) & (b_position < capacity))


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "capacity", "first_row", "first_column", "first_step", "steps", "is_same_chunk",
    ]
)  # fmt: skip
def _append_kernel(
    p_rows,  # [1, rows, D], or with TMA its descriptor
    p_columns,  # [1, columns, D], or likewise
    p_rnorm_rows,  # [rows] fp32
    p_rnorm_columns,  # [columns] fp32
    p_row_buffers,  # [rows, capacity] int64
    p_row_counts,  # [rows] int32, beyond `capacity` where more was found
    p_row_thresholds,  # [rows] int64
    p_column_buffers,  # [columns, capacity] int64, and so on: the rows' own where the chunk is the same
    p_column_counts,
    p_column_thresholds,
    rows,
    columns,
    D,
    capacity,
    first_row,  # the id of row 0
    first_column,
    first_step,
    steps,
    is_same_chunk,
    MIRROR: tl.constexpr,
    PRECISION: tl.constexpr,
    BRANCH: tl.constexpr,
    TMA: tl.constexpr,
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
    if is_same_chunk & (2 * step == blocks) & (2 * i_block >= blocks):
        return  # seen from its other end
    o_row = i_m * BM + tl.arange(0, BM)
    m_row = o_row < rows
    i_column = (i_block + step) % blocks * BN
    i_table = tl.cast(0, tl.int64)
    b_dot = tl.zeros([BM, BN], tl.float32)
    for i_d in range(0, D, BD):
        b_rows = load_tile(p_rows, i_table, i_m * BM, i_d, rows, D, 0, D, 1, TMA, BM, BD)
        b_columns = load_tile(p_columns, i_table, i_column, i_d, columns, D, 0, D, 1, TMA, BN, BD)
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_dot = dot(b_rows, tl.trans(b_columns), b_dot, PRECISION)

    b_rnorm_row = tl.load(p_rnorm_rows + o_row, mask=m_row, other=0.0)
    # Nothing exceeds the threshold of a row or column that is not there, and LOWEST exceeds no threshold.
    b_row_thresholds = tl.load(p_row_thresholds + o_row, mask=m_row, other=HIGHEST_CANDIDATE)
    b_row_thresholds = tl.maximum(b_row_thresholds, NO_PAIR)
    is_mirrored = (is_same_chunk == 0) | (step > 0)
    b_row_id = first_row + o_row[:, None]
    # In parts of 16 columns, so that candidates and positions stay in registers.
    PARTS: tl.constexpr = BN // 16
    b_parts = (b_dot,)
    for _ in tl.static_range(PARTS.bit_length() - 1):
        b_halves = ()
        for i_part in tl.static_range(len(b_parts)):
            b_halves = b_halves + _halves(b_parts[i_part])
        b_parts = b_halves
    for i_part in tl.static_range(PARTS):
        o_c = i_column + i_part * 16 + tl.arange(0, 16)
        m_c = o_c < columns
        b_column_id = first_column + o_c[None, :]
        b_rnorm_column = tl.load(p_rnorm_columns + o_c, mask=m_c, other=0.0)
        is_pair = m_row[:, None] & m_c[None, :]
        if MIRROR:
            is_pair = is_pair & (b_row_id != b_column_id)
        # One factor for both, so that a pair's cosine is the same whichever of the two is the row.
        b_key = sortable(b_parts[i_part] * (b_rnorm_row[:, None] * b_rnorm_column[None, :]))
        b_key = tl.where(is_pair, b_key, LOWEST)
        # all places are reserved before the first store waits for one
        b_in_row = _reserve(p_row_counts, b_row_thresholds[:, None], o_row[:, None], b_key, b_column_id, BRANCH)
        if MIRROR:
            b_thresholds = tl.load(p_column_thresholds + o_c, mask=m_c & is_mirrored, other=HIGHEST_CANDIDATE)
            b_thresholds = tl.maximum(b_thresholds, NO_PAIR)
            b_in_column = _reserve(p_column_counts, b_thresholds[None, :], o_c[None, :], b_key, b_row_id, BRANCH)
        _append(p_row_buffers, b_in_row, o_row[:, None], b_key, b_column_id, capacity, BRANCH)
        if MIRROR:
            _append(p_column_buffers, b_in_column, o_c[None, :], b_key, b_row_id, capacity, BRANCH)


@triton.jit(do_not_specialize=["rows", "capacity", "stride_best", "k"], do_not_specialize_on_alignment=["p_best"])
def _select_kernel(
    p_buffers,  # [rows, capacity] int64
    p_counts,  # [rows] int32
    p_thresholds,  # [rows] int64
    p_saved_counts,  # [rows] int32: with ROLLBACK, the counts to return to
    p_best,  # [rows, stride_best] int64: where the k best go, which may be the buffers
    rows,
    capacity,
    stride_best,
    k,
    ROLLBACK: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
):
    """Compact buffers to their k best, in no order, and raise thresholds to the last of these; ROLLBACK: only raise."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_l = tl.arange(0, BL)
    m_row = o_row < rows
    b_count = tl.load(p_counts + o_row, mask=m_row, other=0)
    p_buffer = p_buffers + o_row[:, None].to(tl.int64) * capacity
    m_candidate = m_row[:, None] & (o_l[None, :] < tl.minimum(b_count, capacity)[:, None])
    b_candidate = tl.load(p_buffer + o_l[None, :], mask=m_candidate, other=EMPTY)
    b_threshold = tl.load(p_thresholds + o_row, mask=m_row, other=0)
    if ROLLBACK:
        b_saved = tl.load(p_saved_counts + o_row, mask=m_row, other=0)
    tl.debug_barrier()  # below, candidates, counts and thresholds are replaced: every thread has read them before
    # Halve [low, high], at whose low end k candidates or more are left, until exactly k are: by similarity, which is
    # quick, and where more than k reach the last similarity, by id among those that equal it.
    b_key = (b_candidate >> 32).to(tl.int32)
    b_low_key = tl.min(tl.where(m_candidate, b_key, HIGHEST), axis=1)
    b_high_key = tl.max(b_key, axis=1)
    searching = b_count > k
    while tl.max((searching & (b_low_key < b_high_key)).to(tl.int32), axis=0) > 0:
        b_middle_key = (b_low_key | b_high_key) - ((b_low_key ^ b_high_key) >> 1)
        b_reach = tl.sum((b_key >= b_middle_key[:, None]).to(tl.int32), axis=1)
        b_low_key = tl.where(searching & (b_reach >= k), b_middle_key, b_low_key)
        b_high_key = tl.where(searching & (b_reach < k), b_middle_key - 1, b_high_key)
        searching = searching & (b_reach != k)
    b_low = b_low_key.to(tl.int64) << 32
    b_high = b_low | LAST_ID
    while tl.max((searching & (b_low < b_high)).to(tl.int32), axis=0) > 0:
        b_middle = (b_low | b_high) - ((b_low ^ b_high) >> 1)
        b_reach = tl.sum((b_candidate >= b_middle[:, None]).to(tl.int32), axis=1)
        b_low = tl.where(searching & (b_reach >= k), b_middle, b_low)
        b_high = tl.where(searching & (b_reach < k), b_middle - 1, b_high)
        searching = searching & (b_reach != k)
    m_keep = m_candidate & (b_candidate >= b_low[:, None])
    b_last = tl.min(tl.where(m_keep, b_candidate, HIGHEST_CANDIDATE), axis=1)
    if ROLLBACK:  # the k-th found so far is yet to be kept: the threshold stays below it
        b_raised = tl.maximum(b_threshold, b_last - 1)
        tl.store(p_thresholds + o_row, tl.where(b_count < k, b_threshold, b_raised), mask=m_row)
        tl.store(p_counts + o_row, b_saved, mask=m_row)
    else:
        b_raised = tl.maximum(b_threshold, b_last)
        tl.store(p_thresholds + o_row, tl.where(b_count < k, b_threshold, b_raised), mask=m_row)
        tl.store(p_counts + o_row, tl.minimum(b_count, k), mask=m_row)
        b_position = tl.cumsum(m_keep.to(tl.int32), axis=1) - 1
        p_row = p_best + o_row[:, None].to(tl.int64) * stride_best
        tl.store(p_row + b_position, b_candidate, mask=m_keep)


@triton.jit
def _exchange(b_candidate, RUN: tl.constexpr, DISTANCE: tl.constexpr):
    """Order candidates `[BM, BK]` at a distance; runs of `2^RUN` of them fall and rise in turn."""
    PAIRS: tl.constexpr = b_candidate.shape[1] // (2 * DISTANCE)
    b_pair = tl.reshape(b_candidate, [b_candidate.shape[0], PAIRS, 2, DISTANCE])
    b_other = tl.sum(b_pair, axis=2, keep_dims=True) - b_pair  # the compiler sees through it
    is_second = tl.arange(0, 2)[None, None, :, None]
    is_rising = ((tl.arange(0, PAIRS) * (2 * DISTANCE)) >> RUN & 1)[None, :, None, None]
    b_pair = tl.where((b_pair > b_other) == (is_second == is_rising), b_pair, b_other)
    return tl.reshape(b_pair, b_candidate.shape)


@triton.jit(do_not_specialize=["rows", "k"])
def _sort_kernel(
    p_candidates,  # [rows, k] int64
    p_similarities,  # [rows, k] fp32
    p_ids,  # [rows, k] int64
    rows,
    k,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Sort candidates, descending, by a bitonic network, and unpack them."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_candidate = (o_row < rows)[:, None] & (o_k < k)[None, :]
    o_candidate = o_row[:, None].to(tl.int64) * k + o_k[None, :]
    b_candidate = tl.load(p_candidates + o_candidate, mask=m_candidate, other=EMPTY)
    for run in tl.static_range(1, BK.bit_length()):
        for i_step in tl.static_range(run):
            b_candidate = _exchange(b_candidate, run, 1 << (run - 1 - i_step))
    tl.store(p_similarities + o_candidate, unsortable((b_candidate >> 32).to(tl.int32)), mask=m_candidate)
    tl.store(p_ids + o_candidate, ((b_candidate & LAST_ID) ^ LAST_ID) - 1, mask=m_candidate)


class CandidateBuffer:
    """Candidates of `count` rows, their numbers and thresholds. `longest`: the largest of the numbers."""

    def __init__(self, count: int, capacity: int, device: torch.device) -> None:
        self.candidates = torch.empty(count, capacity, dtype=torch.int64, device=device)
        self.counts = torch.zeros(count, dtype=torch.int32, device=device)
        self.thresholds = torch.empty(count, dtype=torch.int64, device=device)
        self.longest = 0

    def compact(self, k: int) -> None:
        """Keep the k best candidates of every row, in no order; the last of them is the new threshold."""
        if self.longest:
            self._select(k, self.candidates, None)
            self.longest = min(self.longest, k)

    def keep_best(self, best: Tensor) -> None:
        """As `compact`, to `best [rows, k]`, of which what is beyond a row's candidates stays; uses up the buffer."""
        if self.longest:
            self._select(best.shape[1], best, None)

    def resume(self, best: Tensor) -> None:
        """Start with the candidates that `keep_best` gave; other ones are `EMPTY`."""
        self.candidates[:, : best.shape[1]] = best
        torch.sum(best != packing.EMPTY, dim=1, dtype=torch.int32, out=self.counts)
        self.longest = best.shape[1]

    def rollback(self, k: int, saved_counts: Tensor | None) -> None:
        """Return to `saved_counts`, zero where None, but raise thresholds to just below the k-th best found since."""
        self._select(k, self.candidates, torch.zeros_like(self.counts) if saved_counts is None else saved_counts)
        self.read_longest()

    def read_longest(self) -> int:
        """The largest number of candidates, beyond the capacity where a buffer overflowed; synchronises."""
        self.longest = int(self.counts.max())
        return self.longest

    def _select(self, k: int, best: Tensor, saved_counts: Tensor | None) -> None:
        count, capacity = self.candidates.shape
        size = triton.next_power_of_2(max(16, k, min(self.longest, capacity)))
        if size > MAX_KERNEL_LIST:
            for start in range(0, count, max(1, TORCH_TOPK_ENTRIES // size)):
                rows = slice(start, start + max(1, TORCH_TOPK_ENTRIES // size))
                self._select_with_torch(k, rows, best, saved_counts)
            return
        tiles, num_warps, num_stages = config.select(size)
        _select_kernel[(config.cdiv(count, tiles["BM"]),)](
            self.candidates, self.counts, self.thresholds, self.counts if saved_counts is None else saved_counts, best,
            count, capacity, best.stride(0), k, ROLLBACK=saved_counts is not None,
            **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    def _select_with_torch(self, k: int, rows: slice, best: Tensor, saved_counts: Tensor | None) -> None:
        positions = torch.arange(min(self.longest, self.candidates.shape[1]), device=self.candidates.device)
        is_empty = positions >= self.counts[rows].unsqueeze(1)
        candidates = self.candidates[rows, : len(positions)].masked_fill(is_empty, packing.EMPTY)
        found = candidates.topk(min(k, len(positions)), dim=1).values
        last = found[:, -1] if len(positions) >= k else torch.full_like(found[:, 0], packing.EMPTY)
        if saved_counts is None:
            best[rows, : found.shape[1]] = found
            self.counts[rows] = self.counts[rows].clamp(max=k)
        else:
            last = torch.where(last == packing.EMPTY, last, last - 1)
            self.counts[rows] = saved_counts[rows]
        self.thresholds[rows] = torch.maximum(self.thresholds[rows], last)


def sorted_topk(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and ids of candidates `[rows, k]`, descending."""
    count, k = candidates.shape
    similarities = torch.empty(count, k, dtype=torch.float32, device=candidates.device)
    ids = torch.empty(count, k, dtype=torch.int64, device=candidates.device)
    if k > MAX_SORTED_LIST:
        for rows in torch.arange(count, device=candidates.device).split(max(1, TORCH_TOPK_ENTRIES // k)):
            best = candidates[rows].sort(dim=1, descending=True).values
            similarities[rows], ids[rows] = packing.unpack(best)
    elif candidates.numel():
        tiles, num_warps, num_stages = config.sort(k)
        _sort_kernel[(config.cdiv(count, tiles["BM"]),)](
            candidates, similarities, ids, count, k, **tiles, num_warps=num_warps, num_stages=num_stages
        )
    return similarities, ids
