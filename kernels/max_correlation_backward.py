"""Gradients of max correlation: to the probe maps and to the gallery maps. README.md has the math.

The gradient of a pair's correlation is sparse: it is not zero where a location meets its best match. `matches` packs
it, 8 bytes for each pooled value. `probe_gradient` stays on a probe and streams its neighbours, `gallery_gradient`
stays on a gallery map and streams the probes that are compared with it; each rebuilds the sparse gradient tile by tile
and multiplies it on the tensor cores. No atomics; the order of every sum is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.backward import BackwardInputs
from ..common.inverted_index import InvertedIndex
from . import config, tuning
from .descriptors import described, load_tile, may_be_described
from .norms import may_be_out_of_range
from .tiles import dot, match_weights, neighbor_ids, normalized, scale_and_inverse


@triton.jit
def _packed(values, places):
    """An fp32 value in the upper half of an int64, a place in the lower one."""
    return (values.to(tl.int32, bitcast=True).to(tl.int64) << 32) | places.to(tl.int64)


@triton.jit
def _unpacked(matches):
    return (matches >> 32).to(tl.int32).to(tl.float32, bitcast=True), matches.to(tl.int32)


@triton.jit
def _matches_kernel(
    p_grad,  # [P, K, 2S] fp32
    p_pooled,  # [P, K, 2S] fp32
    p_argmax,  # [P, K, 2S]
    p_index,  # [P, K] int64
    p_scale,  # [] fp32
    p_matches,  # [P, K, 2, width] int64
    p_radial,  # [P, K, width] fp32
    S,
    width,
    HAS_INDEX: tl.constexpr,
    HAS_RADIAL: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pack the gradient of every pooled value, times `p_scale`, with the place of its match; zeros pad the width.

    Radial is what normalising a gallery map removes from its gradient, `<unit map, its gradient>` of every location.
    """
    i_pair = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * B + tl.arange(0, B)
    m_r = o_r < S
    if HAS_INDEX:
        m_r = m_r & (tl.load(p_index + i_pair) >= 0)
    scale = tl.load(p_scale)
    o_in = i_pair * 2 * S + o_r
    o_out = i_pair * 2 * width + o_r
    b_grad = tl.load(p_grad + o_in, mask=m_r, other=0.0) * scale
    tl.store(p_matches + o_out, _packed(b_grad, tl.load(p_argmax + o_in, mask=m_r, other=0)))
    b_grad = tl.load(p_grad + o_in + S, mask=m_r, other=0.0) * scale
    tl.store(p_matches + o_out + width, _packed(b_grad, tl.load(p_argmax + o_in + S, mask=m_r, other=0)))
    if HAS_RADIAL:
        b_radial = b_grad * tl.load(p_pooled + o_in + S, mask=m_r, other=0.0)
        b_sums = tl.zeros([B, CHUNK], tl.float32)
        for i_s in range(0, S, CHUNK):
            o_s = i_s + tl.arange(0, CHUNK)
            m_s = o_s < S
            o_in_s = i_pair * 2 * S + o_s
            b_arg_s = tl.load(p_argmax + o_in_s, mask=m_s, other=0).to(tl.int32)
            b_product = tl.load(p_grad + o_in_s, mask=m_s, other=0.0) * scale
            b_product *= tl.load(p_pooled + o_in_s, mask=m_s, other=0.0)
            b_sums += tl.where(b_arg_s[None, :] == o_r[:, None], b_product[None, :], 0.0)
        b_radial += tl.sum(b_sums, axis=1)
        tl.store(p_radial + i_pair * width + o_r, tl.where(m_r, b_radial, 0.0))


class Matches(NamedTuple):
    """What both gradients read of a backward pass.

    packed: int64 `[P, K, 2, width]`: of s and of r the gradient of the pooled value and where its match lies.
    radial: fp32 `[P, K, width]` where maps were normalised by the kernel, else empty.
    scale: `[]`, what the gradients were multiplied with.
    """

    packed: Tensor
    radial: Tensor
    scale: Tensor


def matches(
    grad: Tensor, pooled: Tensor, argmax: Tensor, index: Tensor | None, locations: int, has_radial: bool
) -> Matches:
    """Launch `_matches_kernel` for `grad` fp32 `[P, K, 2S]`."""
    probes, neighbors = grad.shape[:2]
    tiles, num_warps, num_stages = config.matches(locations)
    blocks = config.cdiv(locations, tiles["B"])
    width = blocks * tiles["B"]
    packed = grad.new_empty(probes, neighbors, 2, width, dtype=torch.int64)
    radial = grad.new_empty((probes, neighbors, width) if has_radial else 0)
    scale = gradient_scale(grad)
    _matches_kernel[(probes * neighbors, blocks)](
        grad, pooled, argmax, index, scale, packed, radial, locations, width,
        HAS_INDEX=index is not None, HAS_RADIAL=has_radial, **tiles, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return Matches(packed, radial, scale)


@triton.jit(do_not_specialize=["K"])
def _probe_gradient_kernel(
    p_matches,  # [P, K, 2, width] int64
    p_rnorm,  # [T or G, S] fp32
    p_gallery,  # [G, S, C], any strides, or with TMA its descriptor
    p_index,  # [P, K] int64
    p_slots,  # [P, K] int64, rows of p_rnorm
    p_is_out_of_range,  # [] bool: whether some map is outside the safe range
    p_scale,  # [] fp32, brings the gradients into the range of half precision
    p_out,  # [P, S, C]
    K,
    S,
    C,
    width,
    stride_gallery_g,
    stride_gallery_s,
    stride_gallery_c,
    HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
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
    i_c = tl.program_id(2) * BC
    o_c = i_c + tl.arange(0, BC)
    m_c = o_c < C
    tiles = tl.cdiv(S, BR) if SPLIT else 1
    i_next_g, i_next_slot = neighbor_ids(p_index, p_slots, i_p * K, 0, K, HAS_INDEX, NORMALIZE, 1)

    b_out = tl.zeros([BS, BC], tl.float32)
    for i_tile in range(0, K * tiles):
        i_pair = i_p * K + i_tile // tiles
        o_r = i_tile % tiles * BR + tl.arange(0, BR)
        i_g = i_next_g
        i_slot = i_next_slot
        i_k = tl.minimum(i_tile + 1, K * tiles - 1) // tiles
        # a tile ahead: else the copy of a neighbour waits for its id, and the product for the copy
        i_next_g, i_next_slot = neighbor_ids(p_index, p_slots, i_p * K, i_k, K, HAS_INDEX, NORMALIZE, 1)
        m_r = (o_r < S) & (i_g >= 0)
        b_neighbor = load_tile(
            p_gallery, i_g, i_tile % tiles * BR, i_c, S, C, stride_gallery_g, stride_gallery_s, stride_gallery_c,
            TMA, 1, BR, BC,
        )  # fmt: skip
        p_pair = p_matches + i_pair * 2 * width
        b_grad_s, b_arg_s = _unpacked(tl.load(p_pair + o_s))
        b_grad_r, b_arg_r = _unpacked(tl.load(p_pair + width + o_r))
        b_weight = match_weights(b_arg_s, b_grad_s, b_arg_r, b_grad_r, o_s, o_r)
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
    b_out *= tl.div_rn(1.0, tl.load(p_scale))  # exact: a power of two
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=(o_s < S)[:, None] & m_c[None, :])


def probe_gradient(
    found: Matches, rnorm: Tensor, probe: Tensor, gallery: Tensor, index: Tensor | None, inverted: InvertedIndex | None
) -> Tensor:
    """Launch the gradient to the probe maps, `[P, S, C]` in their dtype."""
    probes, locations, channels = probe.shape
    neighbors, width = found.packed.shape[1], found.packed.shape[3]
    out = torch.empty_like(probe)
    operands = config.operands(probe.dtype, gallery.dtype)
    tma = may_be_described(gallery)

    def launch(tiling: config.Config, is_out_of_range: Tensor | None = None) -> Any:
        tiles, num_warps, num_stages = tiling
        grid = (probes, config.cdiv(locations, tiles["BS"]), config.cdiv(channels, tiles["BC"]))
        return _probe_gradient_kernel[grid](
            found.packed, rnorm, described(gallery, tiles["BR"], tiles["BC"], tma), index,
            None if inverted is None else inverted.slots, is_out_of_range,
            found.scale, out, neighbors, locations, channels, width, *gallery.stride(),
            HAS_INDEX=index is not None, NORMALIZE=rnorm.numel() > 0, NORMALIZE_FIRST=is_out_of_range is not None,
            SPLIT=locations > tiles["BR"], TMA=tma, **operands, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    tiling = _tiling("probe", probe, gallery, neighbors, rnorm.numel() > 0, index is not None, tma, launch)
    tuning.launch_announced("probe gradient", partial(launch, tiling))
    if may_be_out_of_range(gallery, rnorm):
        launch(tiling, (rnorm < 0).any())
    return out


@triton.jit(do_not_specialize=["P", "K"])
def _gallery_gradient_kernel(
    p_matches,  # [P, K, 2, width] int64
    p_radial,  # [P, K, width] fp32
    p_rnorm,  # [T or G, S] fp32
    p_probe,  # [P, S, C], or with TMA its descriptor
    p_gallery,  # [G, S, C], any strides, or likewise
    p_classes,  # [T] int64: the gallery map of slot t, -1 for none
    p_indptr,  # [T + 1] int64: slot t's pairs
    p_pairs,  # [P*K] int64
    p_scale,  # [] fp32
    p_out,  # [G or T, S, C]
    P,
    K,
    S,
    C,
    width,
    stride_gallery_g,
    stride_gallery_s,
    stride_gallery_c,
    HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COMPACT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_slot = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1) * BR
    o_r = i_r + tl.arange(0, BR)
    i_c = tl.program_id(2) * BC
    o_c = i_c + tl.arange(0, BC)
    m_r = o_r < S
    m_c = o_c < C
    i_g = i_slot
    i_begin = i_slot * 0
    i_end = i_begin + P
    if HAS_INDEX:
        i_g = tl.load(p_classes + i_slot)
        i_begin = tl.load(p_indptr + i_slot)
        i_end = tl.load(p_indptr + i_slot + 1)
    tiles = tl.cdiv(S, BS) if SPLIT else 1
    count = (i_end - i_begin).to(tl.int32) * tiles
    i_next_pair = i_begin * K + i_slot
    if HAS_INDEX:
        i_next_pair = tl.load(p_pairs + i_begin, mask=count > 0, other=0)

    b_out = tl.zeros([BR, BC], tl.float32)
    b_radial = tl.zeros([BR], tl.float32)  # <unit map, its gradient>, the part that normalising removes
    for i_tile in range(0, count):
        i_pair = i_next_pair
        i = i_begin + tl.minimum(i_tile + 1, count - 1) // tiles
        i_next_pair = i * K + i_slot
        if HAS_INDEX:  # a tile ahead: else the copy of a probe waits for its pair, and the product for the copy
            i_next_pair = tl.load(p_pairs + i)
        if NORMALIZE:
            b_pair_radial = tl.load(p_radial + i_pair * width + o_r)
        o_s = i_tile % tiles * BS + tl.arange(0, BS)
        i_p = (i_pair.to(tl.uint32) // K.to(tl.uint32)).to(tl.int64)
        b_probe = load_tile(p_probe, i_p, i_tile % tiles * BS, i_c, S, C, S * C, C, 1, TMA, 1, BS, BC)
        p_pair = p_matches + i_pair * 2 * width
        b_grad_s, b_arg_s = _unpacked(tl.load(p_pair + o_s))
        b_grad_r, b_arg_r = _unpacked(tl.load(p_pair + width + o_r))
        b_weight = match_weights(b_arg_r, b_grad_r, b_arg_s, b_grad_s, o_r, o_s)
        # [BR, BS] @ [BS, BC] -> [BR, BC]
        b_out = dot(b_weight.to(b_probe.dtype), b_probe, b_out, PRECISION)
        if NORMALIZE:
            b_radial += tl.where(i_tile % tiles == 0, b_pair_radial, 0.0)

    m_out = m_r[:, None] & m_c[None, :] & (i_g >= 0)
    if NORMALIZE:
        b_rnorm = tl.load(p_rnorm + i_slot * S + o_r, mask=m_r, other=0.0)
        b_map = load_tile(
            p_gallery, i_g, i_r, i_c, S, C, stride_gallery_g, stride_gallery_s, stride_gallery_c, TMA, 1, BR, BC
        )
        b_scale, b_inverse = scale_and_inverse(b_rnorm)
        b_out -= b_map.to(tl.float32) * b_scale[:, None] * (b_inverse * b_radial)[:, None]
        # the power of two first, which is exact, before norms that may leave little room
        b_out = b_out * (tl.div_rn(1.0, tl.load(p_scale)) * b_inverse)[:, None] * b_scale[:, None]
    else:
        b_out *= tl.div_rn(1.0, tl.load(p_scale))
    i_row = i_slot if COMPACT else i_g
    o_out = i_row * S * C + o_r[:, None] * C + o_c[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def gallery_gradient(
    found: Matches, rnorm: Tensor, probe: Tensor, gallery: Tensor, inverted: InvertedIndex | None, compact: bool
) -> Tensor:
    """Launch the gradient to the gallery maps, in their dtype.

    Returns:
        `[G, S, C]`, zero for maps without a probe; with `compact`, `[T, S, C]` for the slots of `inverted`, all in use.
    """
    probes, locations, channels = probe.shape
    neighbors, width = found.packed.shape[1], found.packed.shape[3]
    slots = gallery.shape[0] if inverted is None else inverted.classes.shape[0]
    is_partial = inverted is not None and not compact  # maps without a probe are no program's
    allocate = gallery.new_zeros if is_partial else gallery.new_empty
    out = allocate((slots if compact else gallery.shape[0], locations, channels))
    if out.numel() == 0 or slots == 0:
        return out
    classes, indptr, pairs = inverted[:3] if inverted is not None else (None, None, None)
    tma = may_be_described(probe, gallery)

    def launch(tiling: config.Config) -> Any:
        tiles, num_warps, num_stages = tiling
        grid = (slots, config.cdiv(locations, tiles["BR"]), config.cdiv(channels, tiles["BC"]))
        return _gallery_gradient_kernel[grid](
            found.packed, found.radial, rnorm, described(probe, tiles["BS"], tiles["BC"], tma),
            described(gallery, tiles["BR"], tiles["BC"], tma), classes, indptr, pairs, found.scale, out,
            probes, neighbors, locations, channels, width, *gallery.stride(),
            HAS_INDEX=inverted is not None, NORMALIZE=rnorm.numel() > 0, COMPACT=compact,
            PRECISION=config.precision(), TMA=tma, SPLIT=locations > tiles["BS"],
            **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    tiling = _tiling("gallery", probe, gallery, neighbors, rnorm.numel() > 0, inverted is not None, tma, launch)
    tuning.launch_announced("gallery gradient", partial(launch, tiling))
    return out


def max_correlation_backward(
    saved: BackwardInputs, rows: Tensor | None, needs_probe: bool, needs_gallery: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients, `[P, S, C]` and `[G, S, C]`; for the gallery maps `rows [T]` (ascending) only where given."""
    grad, pooled, argmax, rnorm, inverted, probe, gallery, index, _ = saved
    probe_out, gallery_out = probe.new_empty(0), gallery.new_empty(0)
    if probe.numel() == 0 or grad.numel() == 0:  # no pairs
        maps = gallery.shape if rows is None else (rows.shape[0], *gallery.shape[1:])
        return (
            torch.zeros_like(probe) if needs_probe else probe_out,
            gallery.new_zeros(maps) if needs_gallery else gallery_out,
        )
    found = matches(grad, pooled, argmax, index, probe.shape[1], needs_gallery and rnorm.numel() > 0)
    if needs_probe:
        probe_out = probe_gradient(found, rnorm, probe, gallery, index, inverted)
    if needs_gallery:
        if inverted is not None and rows is not None:  # without the unused slots
            inverted = inverted._replace(classes=rows, indptr=inverted.indptr[: rows.shape[0] + 1])
        gallery_out = gallery_gradient(found, rnorm, probe, gallery, inverted, rows is not None)
    return probe_out, gallery_out


def _tiling(
    side: str, probe: Tensor, gallery: Tensor, neighbors: int, normalize: bool, indexed: bool, tma: bool,
    launch: Callable[[config.Config], Any],
) -> config.Config:  # fmt: skip
    probes, locations, channels = probe.shape
    is_wide = side == "probe" and config.operands(probe.dtype, gallery.dtype)["WIDEN"]
    product_size, map_size = 4 if is_wide else probe.element_size(), max(probe.element_size(), gallery.element_size())
    if side == "probe" and normalize and gallery.dtype == torch.float16:
        map_size = 4  # it is normalised in registers
    shape = config.shape_class(locations, channels, product_size, map_size, int(tma))
    flags = {"norms": normalize, "index": indexed, "tma": tma}
    variant = tuning.variant(probe, gallery, [side, *(name for name, there in flags.items() if there)])
    operations = 2.0 * probes * neighbors * locations**2 * channels
    return tuning.select_config(config.correlation_backward, shape, variant, operations, launch)


def gradient_scale(grad: Tensor) -> Tensor:
    """A power of two `[]` that brings the largest gradient near 1: fp16 weights neither overflow nor vanish."""
    largest = torch.linalg.vector_norm(grad, ord=torch.inf).nan_to_num(nan=1.0, posinf=1.0).clamp(2.0**-100, 2.0**100)
    exponent = largest.view(torch.int32) & 0x7F800000  # biased, in place: of the inverse it is 254 less this one
    return (0x7F000000 - exponent).view(torch.float32)
