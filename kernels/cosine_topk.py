"""Exact top-k by cosine without the similarity matrix. README.md has the derivation.

Keys pass by in panels. One program multiplies a tile of queries with a tile of keys and appends the survivors, those
above the query's current k-th best, to that query's list; after each panel the list shrinks back to its k best, which
raises the bar for the next one. The list has room for k and a whole panel, so nothing can be lost. An entry is one
int64: the similarity in sortable form above the complement of the id. All entries differ, so the k largest are a set
that no order of appending can change, and equal similarities fall by rising id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .tiles import LOWEST, dot, sortable

EMPTY = torch.iinfo(torch.int64).min  # below every entry
ID_MASK = 2**32 - 1


@triton.jit(do_not_specialize=["P", "L", "first_query", "first_key", "end_key"])
def _append_kernel(
    p_queries,  # [P, D]
    p_keys,  # [N, D]
    p_rnorm_queries,  # [P] fp32
    p_rnorm_keys,  # [N] fp32
    p_lists,  # [P, L, 2] int32, the low word of an entry first
    p_counts,  # [P] int32
    p_bar,  # [P] int32, the sortable similarity that an entry must exceed
    P,
    D,
    L,
    first_query,
    first_key,
    end_key,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_p = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = first_key + tl.program_id(1) * BN + tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < end_key
    p_query_rows = p_queries + o_p[:, None].to(tl.int64) * D
    p_key_rows = p_keys + o_n[None, :].to(tl.int64) * D
    b_dot = tl.zeros([BM, BN], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_queries = tl.load(p_query_rows + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)
        b_keys = tl.load(p_key_rows + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_dot = dot(b_queries, b_keys, b_dot, PRECISION)
    b_rnorm_queries = tl.load(p_rnorm_queries + o_p, mask=m_p, other=0.0)
    b_rnorm_keys = tl.load(p_rnorm_keys + o_n, mask=m_n, other=0.0)
    b_key = sortable(b_dot * b_rnorm_queries[:, None] * b_rnorm_keys[None, :])

    b_bar = tl.load(p_bar + o_p, mask=m_p, other=0)
    survives = (b_key > b_bar[:, None]) & m_p[:, None] & m_n[None, :]
    if EXCLUDE_SELF:
        survives = survives & (first_query + o_p[:, None] != o_n[None, :])
    b_rank = tl.cumsum(survives.to(tl.int32), axis=1)
    b_found = tl.max(b_rank, axis=1)
    b_start = tl.atomic_add(p_counts + o_p, b_found, mask=m_p & (b_found > 0))
    p_entry = p_lists + o_p[:, None].to(tl.int64) * (2 * L) + 2 * (b_start[:, None] + b_rank - 1)
    tl.store(p_entry, -1 - o_n[None, :] + tl.zeros_like(b_key), mask=survives)
    tl.store(p_entry + 1, b_key, mask=survives)


def cosine_topk(
    queries: Tensor, keys: Tensor, rnorm_queries: Tensor, rnorm_keys: Tensor, k: int, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Launch the search of `queries [P, D]` among `keys [N, D]`, both contiguous and of one dtype.

    Args:
        queries, keys: the embeddings, not normalised.
        rnorm_queries, rnorm_keys: fp32 `[P]`, `[N]`, the inverse norms.
        k: how many, at most N (N - 1 with `exclude_self`).
        exclude_self: leave key i out for query i.

    Returns:
        similarities fp32 `[P, k]`, falling, and indices int64 `[P, k]`; equal similarities by rising index.
    """
    num_queries, dim = queries.shape
    num_keys = keys.shape[0]
    similarities = queries.new_empty(num_queries, k, dtype=torch.float32)
    indices = queries.new_empty(num_queries, k, dtype=torch.int64)
    if num_queries == 0 or k == 0:
        return similarities, indices
    tiles, num_warps, num_stages = config.cosine_topk(queries.element_size())
    panel = min(num_keys, max(k, 4096))
    room = k + panel
    strip = max(tiles["BM"], min(num_queries, config.WORKSPACE_BYTES // (8 * room)))

    for start in range(0, num_queries, strip):
        strip_queries = queries[start : start + strip]
        count = strip_queries.shape[0]
        lists = queries.new_full((count, room), EMPTY, dtype=torch.int64)
        counts = queries.new_zeros(count, dtype=torch.int32)
        bar = queries.new_full((count,), LOWEST.value, dtype=torch.int32)
        words = lists.view(torch.int32)
        for first in range(0, num_keys, panel):
            end = min(first + panel, num_keys)
            _append_kernel[(triton.cdiv(count, tiles["BM"]), triton.cdiv(end - first, tiles["BN"]))](
                strip_queries, keys, rnorm_queries[start : start + strip], rnorm_keys, words, counts, bar,
                count, dim, room, start, first, end,
                EXCLUDE_SELF=exclude_self, PRECISION=config.precision(), **tiles,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
            used = max(k, int(counts.max()))  # the longest list: a read-back a panel saves selecting from empty room
            best = lists[:, :used].topk(k, dim=1).values
            lists[:, :k] = best
            lists[:, k:used] = EMPTY
            counts.fill_(k)
            bar = (best[:, -1] >> 32).to(torch.int32)
        similarities[start : start + strip] = _unpack_similarity(best)
        indices[start : start + strip] = ID_MASK - (best & ID_MASK)
    return similarities, indices


def _unpack_similarity(entries: Tensor) -> Tensor:
    keys = (entries >> 32).to(torch.int32)
    return (keys ^ ((keys >> 31) & (2**31 - 1))).view(torch.float32)
