"""Correlation of feature maps with the best match kept both ways. README.md has the math.

One program stays on one probe map and streams neighbour maps past it; the `[S, S]` correlation never leaves the chip.
Norms of raw gallery maps are a pass of their own (norms.py), gradients in max_correlation_backward.py. `pair_sums` is
the forward with one score per pair.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import argmax_dtype
from ..common.inverted_index import InvertedIndex, inverted_index
from . import config, tuning
from .descriptors import described, load_tile, may_be_described
from .max_correlation_backward import max_correlation_backward
from .norms import inverse_norms, may_be_out_of_range
from .tiles import HIGHEST, LOWEST, dot, neighbor_ids, normalized, parts, sortable, unsortable

__all__ = ["max_correlation", "max_correlation_backward", "pair_sums"]


@triton.jit
def _first_best(b_key, b_location, axis: tl.constexpr):
    """Maxima of a tile over an axis, and the lowest location where each is; locations broadcast to the tile."""
    b_best = tl.max(b_key, axis=axis)
    is_best = b_key == tl.expand_dims(b_best, axis)
    return b_best, tl.min(tl.where(is_best, b_location, HIGHEST), axis=axis)


@triton.jit
def _first_best_row(b_key, BR: tl.constexpr):
    """Maxima of `[BK, BR, BS]` over r, and the first r of each, counted in the tile.

    A thread gets many r of one s, through shared memory, and compares them in its registers. In the layout of products
    many threads share the r of every s, and would have to exchange what they find.
    """
    PART: tl.constexpr = 16
    b_parts = parts(b_key, (BR // PART).bit_length() - 1)
    b_best = b_parts[0]
    b_first = tl.zeros_like(b_best)
    for i_part in tl.static_range(1, len(b_parts)):
        b_first = tl.where(b_parts[i_part] > b_best, i_part * PART, b_first)
        b_best = tl.maximum(b_best, b_parts[i_part])
    return _first_best(b_best, b_first + tl.arange(0, PART)[None, :, None], 1)


# One program: a probe, BS of its locations at a time, and KP neighbours, BR locations of BK of them at a time. A turn:
#   1. take the ids that were loaded a turn ago, and load the next ones
#   2. multiply a tile of the neighbours with the probe's, some channels at a time
#   3. reduce it: both maxima of every neighbour's correlation, and where they lie
#   4. fold the maxima over r into those of the same maps' tiles so far; those over s, with what earlier blocks stored
#   5. store what is complete
# Several programs share a multiprocessor: one multiplies while another one reduces.
@triton.jit(do_not_specialize=["P", "K", "KP"])
def _forward_kernel(
    p_probe,  # [P, S, C], or with TMA its descriptor
    p_gallery,  # [G, S, C], any strides, or likewise
    p_index,  # [P, K] int64
    p_slots,  # [P, K] int64, rows of p_rnorm
    p_permutation,  # [P] int64, probes with the same neighbours side by side: their gallery reads meet in the cache
    p_pooled,  # [P, K, 2S] fp32; with SUM [P, K, S], maxima over s of maps of more than BS locations
    p_argmax,  # [P, K, 2S] of `argmax_dtype`
    p_rnorm,  # [T or G, S] fp32
    p_is_out_of_range,  # [] bool: whether some map is outside the safe range
    p_weight,  # [2S] fp32, of the pooled values in p_sums
    p_sums,  # [S / BS, P, K] fp32, of every block of s
    P,
    K,
    KP,
    S,
    C,
    stride_gallery_g,
    stride_gallery_s,
    stride_gallery_c,
    HAS_INDEX: tl.constexpr,
    HAS_PERMUTATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    SUM: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    if NORMALIZE_FIRST:
        if not tl.load(p_is_out_of_range):
            return
    i_program = tl.program_id(0)
    i_p = (i_program % P).to(tl.int64)
    if HAS_PERMUTATION:
        i_p = tl.load(p_permutation + i_p)
    i_first = (i_program // P) * KP
    i_end = i_first + tl.minimum(KP, K - i_first)
    tiles = tl.cdiv(S, BR) if SPLIT else 1  # of a map; of one, nothing is divided below
    count = tl.cdiv(i_end - i_first, BK) * tiles
    width = S if SUM else 2 * S
    o_k = tl.arange(0, BK)
    o_row_k = tl.arange(0, BK * BR) // BR if BK > 1 else 0  # of every row; TMA wants a scalar

    for i_s in range(0, S if SPLIT else BS, BS):
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s < S
        b_best_s = tl.full([BK, BS], LOWEST, tl.int32)
        b_arg_s = tl.zeros([BK, BS], tl.int32)
        b_sums = tl.zeros([BK, BS], tl.float32)
        b_next_g, b_next_slot = neighbor_ids(
            p_index, p_slots, i_p * K, i_first + o_row_k, i_end, HAS_INDEX, NORMALIZE, BK
        )

        for i_tile in range(0, count):
            b_g = b_next_g
            is_pair = b_g >= 0
            b_slot = b_next_slot
            i_next_k = i_first + tl.minimum(i_tile + 1, count - 1) // tiles * BK
            # a tile ahead: no load waits for an id
            b_next_g, b_next_slot = neighbor_ids(
                p_index, p_slots, i_p * K, i_next_k + o_row_k, i_end, HAS_INDEX, NORMALIZE, BK
            )
            i_r = (i_tile % tiles) * BR
            o_r = i_r + tl.arange(0, BK * BR) % BR
            m_r = o_r < S
            b_rnorm = tl.where(m_r & is_pair, 1.0, float("nan"))  # what has no id is NaN
            if NORMALIZE:
                b_rnorm = tl.load(p_rnorm + b_slot * S + o_r, mask=m_r & is_pair, other=float("nan"))
            # [BK * BR, BC] @ [BC, BS] -> [BK * BR, BS]
            b_corr = tl.zeros([BK * BR, BS], tl.float32)
            for i_c in range(0, C, BC):
                b_neighbor = load_tile(
                    p_gallery, b_g, i_r, i_c, S, C, stride_gallery_g, stride_gallery_s, stride_gallery_c,
                    TMA, BK, BR, BC,
                )  # fmt: skip
                if NORMALIZE_FIRST:
                    b_neighbor = normalized(b_neighbor, b_rnorm)
                b_probe = load_tile(p_probe, i_p, i_s, i_c, S, C, S * C, C, 1, TMA, 1, BS, BC)
                if WIDEN:
                    b_probe = b_probe.to(tl.float32)
                b_corr = dot(b_neighbor.to(b_probe.dtype), tl.trans(b_probe), b_corr, PRECISION)

            i_k = i_first + i_tile // tiles * BK
            is_last = i_r + BR >= S
            if (NORMALIZE or HAS_INDEX) and not NORMALIZE_FIRST:
                b_corr *= b_rnorm[:, None]
            # A mask of the tile as numbers: there are too few predicates, and the compiler would save and restore them.
            b_bound = tl.minimum(tl.where(m_r, HIGHEST, LOWEST)[:, None], tl.where(m_s, HIGHEST, LOWEST)[None, :])
            b_key = tl.minimum(sortable(b_corr), b_bound)
            m_row = m_r & (i_k + o_row_k < i_end)
            m_s_last = (i_k + o_k < i_end)[:, None] & m_s[None, :] & is_last
            o_pair = i_p * K + i_k
            o_out = (o_pair + o_row_k) * width + (0 if SUM else S) + o_r
            if SPLIT:  # What the blocks of s before this one have stored. The reductions below synchronise the threads:
                # all of them have loaded it before one of them replaces it.
                m_seen = m_row & (i_s > 0)
                b_seen = tl.where(m_seen, sortable(tl.load(p_pooled + o_out, mask=m_seen, other=0.0)), LOWEST)
                if not SUM:
                    b_seen_arg = tl.load(p_argmax + o_out, mask=m_seen, other=0).to(tl.int32)

            b_best, b_arg = _first_best_row(tl.reshape(b_key, [BK, BR, BS]), BR)
            is_better = (b_best > b_best_s) | (i_r == 0)  # an equal one further on loses
            b_arg_s = tl.where(is_better, i_r + b_arg, b_arg_s)
            b_best_s = tl.where(is_better, b_best, b_best_s)

            b_best_r, b_arg_r = _first_best(b_key, o_s[None, :], 1)
            if SPLIT:
                if not SUM:
                    b_arg_r = tl.where(b_best_r > b_seen, b_arg_r, b_seen_arg)
                b_best_r = tl.maximum(b_best_r, b_seen)
            if SPLIT or not SUM:
                tl.store(p_pooled + o_out, unsortable(b_best_r), mask=m_row)

            if SUM:
                m_row_last = m_row & (i_s + BS >= S)
                b_weight_s = tl.load(p_weight + o_s, mask=m_s & is_last, other=0.0)
                b_weight_r = tl.load(p_weight + S + o_r, mask=m_row_last, other=0.0)
                b_tile_sums = tl.where(m_s_last, unsortable(b_best_s) * b_weight_s[None, :], 0.0)
                b_row_sums = tl.where(m_row_last, unsortable(b_best_r) * b_weight_r, 0.0)
                b_tile_sums += tl.reshape(b_row_sums, [BK, BR])  # BR is BS
                b_sums = tl.where(i_r == 0, b_tile_sums, b_sums + b_tile_sums)
                o_sum = (tl.cast(i_s // BS, tl.int64) * P + i_p) * K + i_k + o_k
                tl.store(p_sums + o_sum, tl.sum(b_sums, axis=1), mask=is_last & (i_k + o_k < i_end))
            else:
                tl.store(p_argmax + o_out, b_arg_r.to(p_argmax.dtype.element_ty), mask=m_row)
                o_out = (o_pair + o_k)[:, None] * width + o_s[None, :]
                tl.store(p_pooled + o_out, unsortable(b_best_s), mask=m_s_last)
                tl.store(p_argmax + o_out, b_arg_s.to(p_argmax.dtype.element_ty), mask=m_s_last)
        if SPLIT:
            tl.debug_barrier()  # the next block of s reads what other threads of this program have written


def max_correlation(
    probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, inverted: InvertedIndex | None,
    normalize_gallery: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward for `probe [P, S, C]` (contiguous) and `gallery [G, S, C]`; see `ops.max_correlation`.

    Returns:
        pooled fp32 `[P, K, 2S]`, argmax `[P, K, 2S]`, and `inverse_norms` (empty unless `normalize_gallery`).
    """
    probes, locations, _ = probe.shape
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    _check_sizes(probe, gallery, index)
    pooled = probe.new_empty(probes, neighbors, 2 * locations, dtype=torch.float32)
    argmax = probe.new_empty(probes, neighbors, 2 * locations, dtype=argmax_dtype(locations))
    rnorm = inverse_norms(gallery, inverted) if normalize_gallery else pooled.new_empty(0)
    if pooled.numel() == 0 or gallery.shape[0] == 0:  # ids into nothing are negative: pairs of NaN
        return pooled.fill_(torch.nan), argmax.zero_(), rnorm
    _launch_forward(probe, gallery, index, _permutation(group), inverted, rnorm, pooled, argmax)
    return pooled, argmax, rnorm


def pair_sums(
    probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, normalize_gallery: bool, weight: Tensor
) -> Tensor:  # fmt: skip
    """Launch the forward for `weight [2S]` (fp32) times the pooled values of every pair, fp32 `[P, K]`.

    Maps of one tile need no memory but the result; of larger ones the maxima over s of `PARTIAL_BYTES` at a time.
    """
    probes, locations, _ = probe.shape
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    _check_sizes(probe, gallery, index)
    sums = probe.new_empty(probes, neighbors, dtype=torch.float32)
    if sums.numel() == 0 or gallery.shape[0] == 0:
        return sums.fill_(torch.nan)
    inverted = inverted_index(index, gallery.shape[0]) if index is not None and normalize_gallery else None
    rnorm = inverse_norms(gallery, inverted) if normalize_gallery else sums.new_empty(0)
    permutation = _permutation(group)
    if locations <= config.LARGEST_TILE:
        _launch_forward(probe, gallery, index, permutation, inverted, rnorm, weight=weight, sums=sums)
        return sums
    step = max(1, config.PARTIAL_BYTES // (4 * locations * probes))
    blocks = config.cdiv(locations, config.LARGEST_TILE)
    step = step // 4 * 4 or step  # where a part's norms are aligned as all of them are, the kernel is the same
    for start in range(0, neighbors, step):
        part = slice(start, min(start + step, neighbors))
        found = sums.new_empty(blocks, probes, part.stop - part.start)
        over_s = sums.new_empty(*found.shape[1:], locations)
        if index is None:
            _launch_forward(probe, gallery[part], None, None, None, rnorm[part], over_s, weight=weight, sums=found)
        else:
            some, ids = None, index[:, part].contiguous()
            if inverted is not None:
                some = inverted._replace(slots=inverted.slots.view_as(index)[:, part].contiguous())
            _launch_forward(probe, gallery, ids, permutation, some, rnorm, over_s, weight=weight, sums=found)
        sums[:, part] = found.sum(0)
    return sums


def _check_sizes(probe: Tensor, gallery: Tensor, index: Tensor | None) -> None:
    probes, locations, channels = probe.shape
    if locations * channels > config.MAX_MAP_ELEMENTS or max(locations, channels) > config.MAX_MAP_AXIS:
        raise ValueError(
            f"expected maps of at most {config.MAX_MAP_ELEMENTS} elements, {config.MAX_MAP_AXIS} locations and "
            f"{config.MAX_MAP_AXIS} channels, got {locations} locations and {channels} channels"
        )
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    touched = gallery.shape[0] if index is None else min(index.numel(), gallery.shape[0])
    share = config.neighbors_per_program(probes, neighbors)
    if max(probes * config.cdiv(neighbors, share), touched) > config.MAX_GRID:
        raise ValueError(
            f"{probes} probes with {neighbors} of {gallery.shape[0]} gallery maps are too many for one launch: "
            "expected fewer probes at a time"
        )


def _permutation(group: Tensor | None) -> Tensor | None:
    return None if group is None else group.argsort(stable=True)


def _launch_forward(
    probe: Tensor, gallery: Tensor, index: Tensor | None, permutation: Tensor | None, inverted: InvertedIndex | None,
    rnorm: Tensor, pooled: Tensor | None = None, argmax: Tensor | None = None, *,
    weight: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    probes, locations, channels = probe.shape
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    share = config.neighbors_per_program(probes, neighbors)
    operands = config.operands(probe.dtype, gallery.dtype)
    fits_tma = may_be_described(probe, gallery)

    def launch(tiling: config.Config, is_out_of_range: Tensor | None = None) -> Any:
        tiles, num_warps, num_stages = tiling
        tma = fits_tma and tiles["BK"] == 1
        streamed = config.cdiv(share, tiles["BK"]) * tiles["BK"]
        return _forward_kernel[(probes * config.cdiv(neighbors, streamed),)](
            described(probe, tiles["BS"], tiles["BC"], tma), described(gallery, tiles["BR"], tiles["BC"], tma),
            index, None if inverted is None else inverted.slots, permutation, pooled, argmax,
            rnorm, is_out_of_range, weight, sums, probes, neighbors, streamed, locations, channels, *gallery.stride(),
            HAS_INDEX=index is not None, HAS_PERMUTATION=permutation is not None, NORMALIZE=rnorm.numel() > 0,
            NORMALIZE_FIRST=is_out_of_range is not None, SUM=sums is not None, SPLIT=locations > tiles["BS"],
            **operands, TMA=tma, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    sizes = probe.element_size(), gallery.element_size(), config.most_together(neighbors)
    shape = config.shape_class(locations, channels, *sizes)
    flags = {
        "index": index is not None,
        "permutation": permutation is not None,
        "norms": rnorm.numel() > 0,
        "sums": sums is not None,
        "tma": fits_tma,
    }
    variant = tuning.variant(probe, gallery, [name for name, there in flags.items() if there])
    operations = 2.0 * probes * neighbors * locations**2 * channels
    tiling = tuning.select_config(config.correlation_forward, shape, variant, operations, launch)
    tuning.launch_announced("forward", partial(launch, tiling))
    if may_be_out_of_range(gallery, rnorm):
        launch(tiling, (rnorm < 0).any())
