"""Kernels of top-k by cosine: append (launched by `topk_search.py`), select and sort. README.md has the derivation.

One program multiplies a tile of rows with a tile of columns, and appends what may exceed a row's threshold to the row's
candidate buffer; within one table every unordered pair of tiles is multiplied once, and what may exceed a column's
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
from .tiles import HIGHEST, dot, parts, sortable, unsortable

EMPTY = tl.constexpr(packing.EMPTY)
HIGHEST_CANDIDATE = tl.constexpr(2**63 - 1)
LAST_ID = tl.constexpr(packing.LAST_ID)
INFINITY = tl.constexpr(0x7F800000)  # sortable
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
MAX_KERNEL_LIST = 4096  # of the buffers that the kernel selects from; longer ones are for torch
MAX_SORTED_LIST = 1024  # of candidates that the kernel sorts; longer ones are for torch
TORCH_TOPK_ENTRIES = 2**25  # candidates that torch selects from at a time


# Most pairs are candidates of neither of their ends: most often a whole warp branches past the atomics that reserve
# places, and later past the stores. What only candidates need is computed there. A place is -1 where that end has no
# candidate. Where neither has one, the row's place is -2 and the column's is undefined.
# $0, $1 places in the row's and the column's buffer; $2 similarity; $3, $4 limits; $5, $6 row and column; $7 the column
# that is the row's own; $8, $9 rows and columns; $10, $11 counts
RESERVE = tl.constexpr("""{
    .reg .pred %either, %is_pair, %of_row, %of_column;
    .reg .b32 %row_place, %column_place;
    .reg .f32 %value;
    .reg .b64 %count;
    mov.b32 %row_place, -2;
    setp.geu.f32 %either, $2, $3;
    setp.geu.or.f32 %either, $2, $4, %either;
    @!%either bra $$DONE;
    mov.b32 %row_place, -1;
    mov.b32 %column_place, -1;
    min.f32 %value, $2, 0f7F7FFFFF;
    setp.lt.s32 %is_pair, $5, $8;
    setp.lt.and.s32 %is_pair, $6, $9, %is_pair;
    setp.ne.and.s32 %is_pair, $6, $7, %is_pair;
    setp.ge.and.f32 %of_row, %value, $3, %is_pair;
    setp.ge.and.f32 %of_column, %value, $4, %is_pair;
    mad.wide.u32 %count, $5, 4, $10;
    @%of_row atom.relaxed.gpu.global.add.u32 %row_place, [%count], 1;
    mad.wide.u32 %count, $6, 4, $11;
    @%of_column atom.relaxed.gpu.global.add.u32 %column_place, [%count], 1;
$$DONE:
    mov.b32 $0, %row_place;
    mov.b32 $1, %column_place;
}""")
# $1, $2 places; $3 similarity; $4, $5 row and column; $6, $7 complements of their ids; $8 capacity; $9, $10 buffers
STORE = tl.constexpr("""{
    .reg .pred %neither, %is_nan, %fits;
    .reg .b32 %key, %sign;
    .reg .b64 %candidate, %place;
    setp.eq.s32 %neither, $1, -2;
    @%neither bra $$DONE;
    mov.b32 %key, $3;
    shr.s32 %sign, %key, 31;
    and.b32 %key, %key, 0x7fffffff;
    xor.b32 %key, %key, %sign;
    sub.s32 %key, %key, %sign;
    setp.nan.f32 %is_nan, $3, $3;
    selp.b32 %key, 0x7fffffff, %key, %is_nan;
    setp.lt.u32 %fits, $1, $8;
    mov.b64 %candidate, {$7, %key};
    mul.wide.u32 %place, $4, $8;
    shl.b64 %place, %place, 3;
    add.u64 %place, %place, $9;
    mad.wide.u32 %place, $1, 8, %place;
    @%fits st.global.b64 [%place], %candidate;
    setp.lt.u32 %fits, $2, $8;
    mov.b64 %candidate, {$6, %key};
    mul.wide.u32 %place, $5, $8;
    shl.b64 %place, %place, 3;
    add.u64 %place, %place, $10;
    mad.wide.u32 %place, $2, 8, %place;
    @%fits st.global.b64 [%place], %candidate;
$$DONE:
    mov.b32 $0, 0;
}""")


@triton.jit
def _candidate(b_key, b_id):
    """As `packing.pack`, from a sortable similarity."""
    return (b_key.to(tl.int64) << 32) | (-2 - b_id).to(tl.uint32).to(tl.int64)  # 2^32 - 2 - id


@triton.jit
def _limits(p_thresholds, o_row, m_row, first_id):
    """The lowest similarity that may exceed a row's threshold, for ids from `first_id` on; +inf where there is no row.

    NaN counts as the largest finite number: it exceeds all of them, and equals a threshold of NaN.
    """
    b_threshold = tl.load(p_thresholds + o_row, mask=m_row, other=HIGHEST_CANDIDATE)
    b_key = (b_threshold >> 32).to(tl.int32)
    b_key = tl.minimum(b_key, INFINITY - 1) + (_candidate(b_key, first_id) <= b_threshold).to(tl.int32)
    return unsortable(tl.maximum(b_key, -INFINITY))


@triton.jit
def _append(
    p_row_buffers, p_row_counts, p_column_buffers, p_column_counts,
    b_similarity,  # [BM, 16]
    b_row_limits, b_column_limits,  # [BM, 1] and [1, 16] fp32: what is not below them is a candidate
    o_row, o_column,  # [BM, 1] and [1, 16]
    o_self,  # [BM, 1], or -1: the column that is the same item as the row
    b_row_id, b_column_id, rows, columns, capacity,
    MIRROR: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Append what reaches its limit to buffers; their counts go on beyond the capacity.

    All places are reserved before the first store waits for one.
    """
    if BRANCH:
        b_row_place, b_column_place = tl.inline_asm_elementwise(
            RESERVE,
            "=r,=r,f,f,f,r,r,r,r,r,l,l",
            [
                b_similarity, b_row_limits, b_column_limits, o_row, o_column, o_self, rows, columns,
                p_row_counts.to(tl.int64), p_column_counts.to(tl.int64),
            ],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            STORE,
            "=r,r,r,f,r,r,r,r,r,l,l",
            [
                b_row_place, b_column_place, b_similarity, o_row, o_column, -2 - b_row_id, -2 - b_column_id, capacity,
                p_row_buffers.to(tl.int64), p_column_buffers.to(tl.int64),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        b_key = sortable(b_similarity)
        b_value = tl.where(b_similarity != b_similarity, LARGEST, b_similarity)
        is_pair = (o_row < rows) & (o_column < columns) & (o_column != o_self)
        b_row_place = _reserve(p_row_counts, o_row, is_pair & (b_value >= b_row_limits))
        if MIRROR:
            b_column_place = _reserve(p_column_counts, o_column, is_pair & (b_value >= b_column_limits))
        _store(p_row_buffers, o_row, b_row_place, b_key, b_column_id, capacity)
        if MIRROR:
            _store(p_column_buffers, o_column, b_column_place, b_key, b_row_id, capacity)


@triton.jit
def _reserve(p_counts, o_row, is_candidate):
    # "Not contiguous": else the atomics take a layout of their own, and their addresses pass through shared memory.
    p_count = tl.max_contiguous(p_counts + o_row, [1, 1]).broadcast_to(is_candidate.shape)
    return tl.where(is_candidate, tl.atomic_add(p_count, 1, mask=is_candidate, sem="relaxed"), -1)


@triton.jit
def _store(p_buffers, o_row, b_place, b_key, b_id, capacity):
    p_place = p_buffers + o_row.to(tl.int64) * capacity + b_place
    tl.store(p_place, _candidate(b_key, b_id), mask=(b_place >= 0) & (b_place < capacity))


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
        b_rows = load_tile(p_rows, i_table, i_m * BM, i_d, rows, D, 0, D, 1, TMA, 1, BM, BD)
        b_columns = load_tile(p_columns, i_table, i_column, i_d, columns, D, 0, D, 1, TMA, 1, BN, BD)
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_dot = dot(b_rows, tl.trans(b_columns), b_dot, PRECISION)

    b_rnorm_row = tl.load(p_rnorm_rows + o_row, mask=m_row, other=0.0)
    b_row_limits = _limits(p_row_thresholds, o_row, m_row, first_column + i_column)
    o_self = tl.full([BM], -1, tl.int32)
    if MIRROR:
        o_self = first_row - first_column + o_row
    mirrored_columns = tl.where((is_same_chunk == 0) | (step > 0), columns, 0)
    # In parts of 16 columns, so that candidates and places stay in registers.
    b_parts = parts(b_dot, (BN // 16).bit_length() - 1)
    for i_part in tl.static_range(len(b_parts)):
        o_column = i_column + i_part * 16 + tl.arange(0, 16)
        m_column = o_column < columns
        b_rnorm_column = tl.load(p_rnorm_columns + o_column, mask=m_column, other=0.0)
        # One factor for both, so that a pair's cosine is the same whichever of the two is the row.
        b_similarity = b_parts[i_part] * (b_rnorm_row[:, None] * b_rnorm_column[None, :])
        b_column_limits = tl.full([16], float("inf"), tl.float32)
        if MIRROR:
            b_column_limits = _limits(p_column_thresholds, o_column, o_column < mirrored_columns, first_row + i_m * BM)
        _append(
            p_row_buffers, p_row_counts, p_column_buffers, p_column_counts, b_similarity,
            b_row_limits[:, None], b_column_limits[None, :], o_row[:, None], o_column[None, :], o_self[:, None],
            first_row + o_row[:, None], first_column + o_column[None, :], rows, columns, capacity,
            MIRROR, BRANCH,
        )  # fmt: skip


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
    RUNS: tl.constexpr = BK.bit_length()
    for run in tl.static_range(1, RUNS):
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
