"""Correlation of feature maps with the best match kept both ways, and its gradients. README.md has the math.

One program of the forward stays on one probe map and streams neighbour maps past it; the `[S, S]` correlation lives in
registers only. The backward rebuilds the sparse gradient of that correlation from the saved argmax, tile by tile, and
multiplies it on the tensor cores: `probe_gradient` stays on a probe and streams its neighbours, `gallery_gradient`
stays on a gallery map and streams the probes that are compared with it. No atomics; the order of every sum is fixed.
Norms of raw gallery maps are a pass of their own (norms.py). `pair_sums` is the forward with one score per pair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.backward import BackwardInputs
from ..common.dtypes import argmax_dtype
from ..common.inverted_index import InvertedIndex, inverted_index
from . import config, tuning
from .norms import inverse_norms
from .tiles import (
    HIGHEST,
    LOWEST,
    dot,
    match_weights,
    normalized,
    scale_and_inverse,
    sortable,
    unsortable,
)


@triton.jit
def _reduce_tile(b_key, o_other, axis: tl.constexpr):
    """Maxima of `[BR, BS]` over an axis, and where the first of each lies among its locations `o_other`."""
    b_best = tl.max(b_key, axis=axis)
    is_best = b_key == tl.expand_dims(b_best, axis)
    return b_best, tl.min(tl.where(is_best, tl.expand_dims(o_other, 1 - axis), HIGHEST), axis=axis)


# One program: a probe, BS of its locations at a time, and KP neighbours, BR of their locations at a time. A turn:
#   1. reduce the tile that the turn before has multiplied: both maxima of the correlation, and where they lie
#   2. fold the maxima over r into those of this neighbour's tiles so far; those over s, with what earlier blocks stored
#   3. store what is complete
#   4. take the id that was loaded a turn ago, and load the next one
#   5. load norms and maps of this turn's tile: the compiler starts these copies ahead, while 1 to 3 run
#   6. multiply, for the next turn to reduce
@triton.jit(do_not_specialize=["P", "K", "KP"])
def _forward_kernel(
    p_probe,  # [P, S, C]
    p_gallery,  # [G, S, C], any strides
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
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
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
    tiles = tl.cdiv(S, BR) if SPLIT else 1  # of a neighbour; of one, nothing is divided below
    count = tl.minimum(KP, K - i_first) * tiles
    width = S if SUM else 2 * S

    for i_s in range(0, S if SPLIT else BS, BS):
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s < S
        p_map = p_probe + i_p * S * C + o_s[None, :] * C
        if RESIDENT:
            o_c = tl.arange(0, BC)
            b_map = tl.load(p_map + o_c[:, None], mask=m_s[None, :] & (o_c < C)[:, None], other=0.0)
            if WIDEN:
                b_map = b_map.to(tl.float32)
        b_best_s = tl.full([BS], LOWEST, tl.int32)
        b_arg_s = tl.zeros([BS], tl.int32)
        b_sums = tl.zeros([BS], tl.float32)
        b_corr = tl.zeros([BR, BS], tl.float32)
        b_rnorm = tl.zeros([BR], tl.float32)
        i_next_g = tl.cast(i_first, tl.int64)
        i_next_slot = i_next_g
        if HAS_INDEX:
            i_next_g = tl.load(p_index + i_p * K + i_first)
            if NORMALIZE:
                i_next_slot = tl.load(p_slots + i_p * K + i_first)
        is_pair = i_next_g >= 0  # carried by the loop, which `i_g = i_next_g` would not be: Triton sees one value

        # Tile i_tile is multiplied after the one before it is reduced: what it takes to do so is on its way meanwhile.
        for i_tile in range(0, count + 1):
            # the tile of the turn before
            i_pair = i_p * K + i_first + tl.maximum(i_tile - 1, 0) // tiles
            i_r = (tl.maximum(i_tile - 1, 0) % tiles) * BR
            o_r = i_r + tl.arange(0, BR)
            m_r = (o_r < S) & (i_tile > 0)
            is_last = (i_r + BR >= S) & (i_tile > 0)
            if NORMALIZE and not NORMALIZE_FIRST:
                b_corr *= b_rnorm[:, None]
            if HAS_INDEX:
                b_corr = tl.where(is_pair, b_corr, float("nan"))
            b_key = tl.where(m_r[:, None] & m_s[None, :], sortable(b_corr), LOWEST)
            o_out = i_pair * width + (0 if SUM else S) + o_r
            if SPLIT:  # What the blocks of s before this one have stored. The reductions below synchronise the threads:
                # all of them have loaded it before one of them replaces it.
                m_seen = m_r & (i_s > 0)
                b_seen = tl.where(m_seen, sortable(tl.load(p_pooled + o_out, mask=m_seen, other=0.0)), LOWEST)
                if not SUM:
                    b_seen_arg = tl.load(p_argmax + o_out, mask=m_seen, other=0).to(tl.int32)

            b_best, b_arg = _reduce_tile(b_key, o_r, 0)
            is_better = (b_best > b_best_s) | (i_r == 0)  # an equal one further on loses
            b_arg_s = tl.where(is_better, b_arg, b_arg_s)
            b_best_s = tl.where(is_better, b_best, b_best_s)

            b_best_r, b_arg_r = _reduce_tile(b_key, o_s, 1)
            if SPLIT:
                if not SUM:
                    b_arg_r = tl.where(b_best_r > b_seen, b_arg_r, b_seen_arg)
                b_best_r = tl.maximum(b_best_r, b_seen)
            if SPLIT or not SUM:
                tl.store(p_pooled + o_out, unsortable(b_best_r), mask=m_r)

            if SUM:
                m_s_done = m_s & is_last
                m_r_done = m_r & (i_s + BS >= S)
                b_weight_s = tl.load(p_weight + o_s, mask=m_s_done, other=0.0)
                b_weight_r = tl.load(p_weight + S + o_r, mask=m_r_done, other=0.0)
                b_tile_sums = tl.where(m_s_done, unsortable(b_best_s) * b_weight_s, 0.0)
                b_tile_sums += tl.where(m_r_done, unsortable(b_best_r) * b_weight_r, 0.0)  # BR is BS
                b_sums = tl.where(i_r == 0, b_tile_sums, b_sums + b_tile_sums)
                o_one = tl.arange(0, 1)  # a sum to a scalar breaks Triton 3.7's compiler on sm_100
                o_sum = tl.cast(i_s // BS, tl.int64) * P * K + i_pair
                tl.store(p_sums + o_sum + o_one, tl.sum(b_sums[None, :], axis=1), mask=(o_one == 0) & is_last)
            else:
                tl.store(p_argmax + o_out, b_arg_r.to(p_argmax.dtype.element_ty), mask=m_r)
                o_out = i_pair * width + o_s
                tl.store(p_pooled + o_out, unsortable(b_best_s), mask=m_s & is_last)
                tl.store(p_argmax + o_out, b_arg_s.to(p_argmax.dtype.element_ty), mask=m_s & is_last)

            # the tile of this turn; none in the last
            i_g = i_next_g
            is_pair = i_g >= 0
            i_slot = i_next_slot
            i_k = i_first + tl.minimum(i_tile + 1, count - 1) // tiles
            i_next_g = tl.cast(i_k, tl.int64)
            i_next_slot = i_next_g
            if HAS_INDEX:  # a tile ahead: no load waits for an id
                i_next_g = tl.load(p_index + i_p * K + i_k)
                if NORMALIZE:
                    i_next_slot = tl.load(p_slots + i_p * K + i_k)
            o_new_r = (i_tile % tiles) * BR + tl.arange(0, BR)
            m_new_r = (o_new_r < S) & (i_tile < count)
            if NORMALIZE:
                b_rnorm = tl.load(p_rnorm + i_slot * S + o_new_r, mask=m_new_r & is_pair, other=0.0)
            p_neighbor = p_gallery + tl.maximum(i_g, 0) * stride_gallery_g
            p_neighbor += o_new_r[:, None].to(tl.int64) * stride_gallery_s
            # [BR, BC] @ [BC, BS] -> [BR, BS]
            b_corr = tl.zeros([BR, BS], tl.float32)
            if RESIDENT:
                o_c = tl.arange(0, BC)
                b_neighbor = tl.load(
                    p_neighbor + o_c[None, :].to(tl.int64) * stride_gallery_c,
                    mask=m_new_r[:, None] & (o_c < C)[None, :],
                    other=0.0,
                )
                b_corr = dot(b_neighbor.to(b_map.dtype), b_map, b_corr, PRECISION)
            else:
                for i_c in range(0, tl.where(i_tile < count, C, 0), BC):
                    o_c = i_c + tl.arange(0, BC)
                    m_c = o_c < C
                    b_neighbor = tl.load(
                        p_neighbor + o_c[None, :].to(tl.int64) * stride_gallery_c,
                        mask=m_new_r[:, None] & m_c[None, :],
                        other=0.0,
                    )
                    if NORMALIZE_FIRST:
                        b_neighbor = normalized(b_neighbor, b_rnorm)
                    b_probe = tl.load(p_map + o_c[:, None], mask=m_s[None, :] & m_c[:, None], other=0.0)
                    if WIDEN:
                        b_probe = b_probe.to(tl.float32)
                    b_corr = dot(b_neighbor.to(b_probe.dtype), b_probe, b_corr, PRECISION)
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
    blocks = triton.cdiv(locations, config.LARGEST_TILE)
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
    if max(probes * triton.cdiv(neighbors, share), touched) > config.MAX_GRID:
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

    def launch(tiling: config.Config, is_out_of_range: Tensor | None = None) -> Any:
        tiles, num_warps, num_stages = tiling
        return _forward_kernel[(probes * triton.cdiv(neighbors, share),)](
            probe, gallery, index, None if inverted is None else inverted.slots, permutation, pooled, argmax,
            rnorm, is_out_of_range, weight, sums, probes, neighbors, share, locations, channels, *gallery.stride(),
            HAS_INDEX=index is not None, HAS_PERMUTATION=permutation is not None, NORMALIZE=rnorm.numel() > 0,
            NORMALIZE_FIRST=is_out_of_range is not None, SUM=sums is not None, SPLIT=locations > tiles["BS"],
            **operands, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    shape = config.shape_class(locations, channels, probe.element_size(), gallery.element_size())
    flags = {
        "index": index is not None,
        "permutation": permutation is not None,
        "norms": rnorm.numel() > 0,
        "sums": sums is not None,
    }
    variant = _variant(probe, gallery, [name for name, there in flags.items() if there])
    operations = 2.0 * probes * neighbors * locations**2 * channels
    tiling = tuning.select_config(config.correlation_forward, shape, variant, operations, launch)
    tuning.launch_announced("forward", partial(launch, tiling))
    if _may_be_out_of_range(gallery, rnorm):
        tilings = config.correlation_forward(*shape)
        launch(next(each for each in tilings if not each.tiles["RESIDENT"]), (rnorm < 0).any())


def _may_be_out_of_range(gallery: Tensor, rnorm: Tensor) -> bool:
    """Whether raw maps may have norms outside the safe range, which fp16 does not reach.

    The products of such maps leave the range of fp32. A second launch, which ends at once where there are none, takes
    them anew with maps that are normalised before they are multiplied: the host need not know of it.
    """
    return rnorm.numel() > 0 and gallery.dtype != torch.float16


def _variant(probe: Tensor, gallery: Tensor, flags: list[str]) -> str:
    """What changes a kernel's code besides its tiles, in words."""
    precision = config.operands(probe.dtype, gallery.dtype)["PRECISION"]
    layout = "" if gallery.stride(2) == 1 else "channels first"
    return " ".join(filter(None, [f"{probe.dtype} {gallery.dtype} {precision}", layout, *flags]))


@triton.jit(do_not_specialize=["K"])
def _probe_gradient_kernel(
    p_grad,  # [P, K, 2S] fp32
    p_argmax,  # [P, K, 2S]
    p_rnorm,  # [T or G, S] fp32
    p_gallery,  # [G, S, C], any strides
    p_index,  # [P, K] int64
    p_slots,  # [P, K] int64, rows of p_rnorm
    p_is_out_of_range,  # [] bool: whether some map is outside the safe range
    p_scale,  # [1] fp32, brings the gradients into the range of half precision
    p_out,  # [P, S, C]
    K,
    S,
    C,
    stride_gallery_g,
    stride_gallery_s,
    stride_gallery_c,
    HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    IS_FP16: tl.constexpr = p_out.dtype.element_ty == tl.float16 and not WIDEN
    if NORMALIZE_FIRST:
        if not tl.load(p_is_out_of_range):
            return
    i_p = tl.program_id(0).to(tl.int64)
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    m_s = o_s < S
    m_c = o_c < C
    scale = tl.load(p_scale)

    b_out = tl.zeros([BS, BC], tl.float32)
    for i_k in range(0, K):
        i_pair = i_p * K + i_k
        i_g = tl.cast(i_k, tl.int64)
        if HAS_INDEX:
            i_g = tl.load(p_index + i_pair)
        is_pair = i_g >= 0
        i_slot = i_g
        if HAS_INDEX and NORMALIZE:
            i_slot = tl.load(p_slots + i_pair)
        p_neighbor = p_gallery + tl.maximum(i_g, 0) * stride_gallery_g
        m_pair_s = m_s & is_pair
        o_pair = i_pair * 2 * S
        b_arg_s = tl.load(p_argmax + o_pair + o_s, mask=m_pair_s, other=0).to(tl.int32)
        b_grad_s = tl.load(p_grad + o_pair + o_s, mask=m_pair_s, other=0.0) * scale
        for i_r in range(0, S if SPLIT else BR, BR):  # of one turn no loop remains: pairs are pipelined
            o_r = i_r + tl.arange(0, BR)
            m_r = (o_r < S) & is_pair
            b_arg_r = tl.load(p_argmax + o_pair + S + o_r, mask=m_r, other=0).to(tl.int32)
            b_grad_r = tl.load(p_grad + o_pair + S + o_r, mask=m_r, other=0.0) * scale
            b_weight = match_weights(b_arg_s, b_grad_s, b_arg_r, b_grad_r, o_s, o_r)
            b_neighbor = tl.load(
                p_neighbor
                + o_r[:, None].to(tl.int64) * stride_gallery_s
                + o_c[None, :].to(tl.int64) * stride_gallery_c,
                mask=m_r[:, None] & m_c[None, :],
                other=0.0,
            )
            if NORMALIZE:
                b_rnorm = tl.load(p_rnorm + i_slot * S + o_r, mask=m_r, other=0.0)
                if NORMALIZE_FIRST or IS_FP16:  # weights times 1 / norm may leave the range of fp16
                    b_neighbor = normalized(b_neighbor, b_rnorm)
                else:
                    b_weight *= b_rnorm[None, :]
            b_neighbor = b_neighbor.to(tl.float32 if WIDEN else p_out.dtype.element_ty)
            # [BS, BR] @ [BR, BC] -> [BS, BC]
            b_out = dot(b_weight.to(b_neighbor.dtype), b_neighbor, b_out, PRECISION)

    o_out = i_p * S * C + o_s[:, None] * C + o_c[None, :]
    b_out *= tl.div_rn(1.0, scale)  # exact: a power of two
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_s[:, None] & m_c[None, :])


def probe_gradient(
    grad: Tensor, scale: Tensor, argmax: Tensor, rnorm: Tensor, probe: Tensor, gallery: Tensor, index: Tensor | None,
    inverted: InvertedIndex | None,
) -> Tensor:  # fmt: skip
    """Launch the gradient to the probe maps, `[P, S, C]` in their dtype, from `grad` fp32 `[P, K, 2S]`."""
    probes, locations, channels = probe.shape
    out = torch.empty_like(probe)
    if out.numel() == 0 or grad.numel() == 0:
        return out.zero_()
    operands = config.operands(probe.dtype, gallery.dtype)

    def launch(tiling: config.Config, is_out_of_range: Tensor | None = None) -> Any:
        tiles, num_warps, num_stages = tiling
        grid = (probes, triton.cdiv(locations, tiles["BS"]), triton.cdiv(channels, tiles["BC"]))
        return _probe_gradient_kernel[grid](
            grad, argmax, rnorm, gallery, index, None if inverted is None else inverted.slots, is_out_of_range, scale,
            out, grad.shape[1], locations, channels, *gallery.stride(),
            HAS_INDEX=index is not None, NORMALIZE=rnorm.numel() > 0, NORMALIZE_FIRST=is_out_of_range is not None,
            SPLIT=locations > tiles["BR"], **operands, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    tiling = _backward_tiling("probe", probe, gallery, grad, rnorm.numel() > 0, index is not None, launch)
    tuning.launch_announced("probe gradient", partial(launch, tiling))
    if _may_be_out_of_range(gallery, rnorm):
        launch(tiling, (rnorm < 0).any())
    return out


@triton.jit(do_not_specialize=["P", "K"])
def _gallery_gradient_kernel(
    p_grad,  # [P, K, 2S] fp32
    p_pooled,  # [P, K, 2S] fp32
    p_argmax,  # [P, K, 2S]
    p_rnorm,  # [T or G, S] fp32
    p_probe,  # [P, S, C]
    p_gallery,  # [G, S, C], any strides
    p_classes,  # [T] int64: the gallery map of slot t, -1 for none
    p_indptr,  # [T + 1] int64: slot t's pairs
    p_pairs,  # [P*K] int64
    p_scale,  # [1] fp32
    p_out,  # [G or T, S, C]
    P,
    K,
    S,
    C,
    stride_gallery_g,
    stride_gallery_s,
    stride_gallery_c,
    HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COMPACT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_slot = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    m_r = o_r < S
    m_c = o_c < C
    scale = tl.load(p_scale)
    i_g = i_slot
    i_begin = i_slot * 0
    i_end = i_begin + P
    if HAS_INDEX:
        i_g = tl.load(p_classes + i_slot)
        i_begin = tl.load(p_indptr + i_slot)
        i_end = tl.load(p_indptr + i_slot + 1)

    b_out = tl.zeros([BR, BC], tl.float32)
    # <unit neighbour, its gradient>, the part that normalising removes: by maxima over s, and by those over r
    b_radial = tl.zeros([BR], tl.float32)
    b_radial_s = tl.zeros([BR, BS], tl.float32)
    for i in range(i_begin, i_end):
        i_p = i
        i_pair = i * K + i_slot
        if HAS_INDEX:
            i_pair = tl.load(p_pairs + i)
            i_p = (i_pair.to(tl.uint64) // K.to(tl.uint64)).to(tl.int64)
        o_pair = i_pair * 2 * S
        b_arg_r = tl.load(p_argmax + o_pair + S + o_r, mask=m_r, other=0).to(tl.int32)
        b_grad_r = tl.load(p_grad + o_pair + S + o_r, mask=m_r, other=0.0) * scale
        for i_s in range(0, S if SPLIT else BS, BS):
            o_s = i_s + tl.arange(0, BS)
            m_s = o_s < S
            b_arg_s = tl.load(p_argmax + o_pair + o_s, mask=m_s, other=0).to(tl.int32)
            b_grad_s = tl.load(p_grad + o_pair + o_s, mask=m_s, other=0.0) * scale
            b_weight = match_weights(b_arg_r, b_grad_r, b_arg_s, b_grad_s, o_r, o_s)
            if NORMALIZE:
                b_grad_times_pooled = b_grad_s * tl.load(p_pooled + o_pair + o_s, mask=m_s, other=0.0)
                b_radial_s += tl.where(b_arg_s[None, :] == o_r[:, None], b_grad_times_pooled[None, :], 0.0)
            b_probe = tl.load(
                p_probe + i_p * S * C + o_s[:, None] * C + o_c[None, :], mask=m_s[:, None] & m_c[None, :], other=0.0
            )
            # [BR, BS] @ [BS, BC] -> [BR, BC]
            b_out = dot(b_weight.to(b_probe.dtype), b_probe, b_out, PRECISION)
        if NORMALIZE:
            b_radial += b_grad_r * tl.load(p_pooled + o_pair + S + o_r, mask=m_r, other=0.0)

    if NORMALIZE:
        b_radial += tl.sum(b_radial_s, axis=1)
    m_out = m_r[:, None] & m_c[None, :] & (i_g >= 0)
    if NORMALIZE:
        b_rnorm = tl.load(p_rnorm + i_slot * S + o_r, mask=m_r, other=0.0)
        o_neighbor = o_r[:, None].to(tl.int64) * stride_gallery_s + o_c[None, :].to(tl.int64) * stride_gallery_c
        b_map = tl.load(p_gallery + i_g * stride_gallery_g + o_neighbor, mask=m_out, other=0.0)
        b_out -= normalized(b_map, b_rnorm) * b_radial[:, None]
    b_out *= tl.div_rn(1.0, scale)  # exact; before norms that may leave little room
    if NORMALIZE:
        b_scale, b_inverse = scale_and_inverse(b_rnorm)
        b_out = b_out * b_inverse[:, None] * b_scale[:, None]
    i_row = i_slot if COMPACT else i_g
    o_out = i_row * S * C + o_r[:, None] * C + o_c[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def gallery_gradient(
    grad: Tensor, scale: Tensor, pooled: Tensor, argmax: Tensor, rnorm: Tensor, probe: Tensor, gallery: Tensor,
    inverted: InvertedIndex | None, compact: bool,
) -> Tensor:  # fmt: skip
    """Launch the gradient to the gallery maps, in their dtype.

    Returns:
        `[G, S, C]`, zero for maps without a probe; with `compact`, `[T, S, C]` for the slots of `inverted`, all in use.
    """
    probes, locations, channels = probe.shape
    slots = gallery.shape[0] if inverted is None else inverted.classes.shape[0]
    rows = slots if compact else gallery.shape[0]
    is_partial = inverted is not None and not compact  # maps without a probe are no program's
    allocate = gallery.new_zeros if is_partial or grad.numel() == 0 else gallery.new_empty
    out = allocate((rows, locations, channels))
    if out.numel() == 0 or grad.numel() == 0 or slots == 0:
        return out
    classes, indptr, pairs = inverted[:3] if inverted is not None else (None, None, None)

    def launch(tiling: config.Config) -> Any:
        tiles, num_warps, num_stages = tiling
        grid = (slots, triton.cdiv(locations, tiles["BR"]), triton.cdiv(channels, tiles["BC"]))
        return _gallery_gradient_kernel[grid](
            grad, pooled, argmax, rnorm, probe, gallery, classes, indptr, pairs, scale, out,
            probes, grad.shape[1], locations, channels, *gallery.stride(),
            HAS_INDEX=inverted is not None, NORMALIZE=rnorm.numel() > 0, COMPACT=compact,
            PRECISION=config.precision(), SPLIT=locations > tiles["BS"],
            **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    tiling = _backward_tiling("gallery", probe, gallery, grad, rnorm.numel() > 0, inverted is not None, launch)
    tuning.launch_announced("gallery gradient", partial(launch, tiling))
    return out


def max_correlation_backward(
    saved: BackwardInputs, rows: Tensor | None, needs_probe: bool, needs_gallery: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients, `[P, S, C]` and `[G, S, C]`; for the gallery maps `rows [T]` (ascending) only where given."""
    grad, pooled, argmax, rnorm, inverted, probe, gallery, index, _ = saved
    probe_out, gallery_out = probe.new_empty(0), gallery.new_empty(0)
    scale = gradient_scale(grad)
    if needs_probe:
        probe_out = probe_gradient(grad, scale, argmax, rnorm, probe, gallery, index, inverted)
    if needs_gallery:
        if inverted is not None and rows is not None:  # without the unused slots
            inverted = inverted._replace(classes=rows, indptr=inverted.indptr[: rows.shape[0] + 1])
        gallery_out = gallery_gradient(grad, scale, pooled, argmax, rnorm, probe, gallery, inverted, rows is not None)
    return probe_out, gallery_out


def _backward_tiling(
    side: str, probe: Tensor, gallery: Tensor, grad: Tensor, normalize: bool, indexed: bool,
    launch: Callable[[config.Config], Any],
) -> config.Config:  # fmt: skip
    probes, locations, channels = probe.shape
    shape = config.shape_class(locations, channels, max(probe.element_size(), gallery.element_size()))
    variant = _variant(probe, gallery, [side, *(["norms"] if normalize else []), *(["index"] if indexed else [])])
    operations = 2.0 * probes * grad.shape[1] * locations**2 * channels
    return tuning.select_config(config.correlation_backward, shape, variant, operations, launch)


def gradient_scale(grad: Tensor) -> Tensor:
    """A power of two `[]` that brings the largest gradient near 1: fp16 weights neither overflow nor vanish."""
    if grad.numel() == 0:
        return grad.new_ones(())
    largest = torch.linalg.vector_norm(grad, ord=torch.inf).nan_to_num(nan=1.0, posinf=1.0).clamp(2.0**-100, 2.0**100)
    exponent = largest.view(torch.int32) & 0x7F800000  # biased, in place: of the inverse it is 254 less this one
    return (0x7F000000 - exponent).view(torch.float32)
