"""Inverse norms of the locations of gallery maps, a pass of its own before the forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.inverted_index import InvertedIndex
from . import config
from .tiles import inverse_norm, shift_outside, squares


@triton.jit
def _norms_kernel(
    p_gallery,  # [G, S, C], any strides
    p_classes,  # [T] int64: the gallery map of slot t, -1 for none
    p_rnorm,  # [T or G, S] fp32
    S,
    C,
    stride_gallery_g,
    stride_gallery_s,
    stride_gallery_c,
    HAS_INDEX: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_slot = tl.program_id(0).to(tl.int64)
    i_g = i_slot
    if HAS_INDEX:
        i_g = tl.load(p_classes + i_slot)
    for i_r in range(0, S, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = (o_r < S) & (i_g >= 0)
        p_map = p_gallery + i_g * stride_gallery_g + o_r[:, None].to(tl.int64) * stride_gallery_s
        b_squares = squares(p_map, m_r, tl.full([BR], 1.0, tl.float32), stride_gallery_c, C, BC)
        b_shift = shift_outside(b_squares)
        if tl.max((m_r & (b_shift != 1.0)).to(tl.int32), axis=0) > 0:  # rare: read once more, in few registers
            b_squares = squares(p_map, m_r, b_shift * b_shift, stride_gallery_c, C, 16)
        tl.store(p_rnorm + i_slot * S + o_r, inverse_norm(b_squares, b_shift), mask=o_r < S)


def inverse_norms(gallery: Tensor, inverted: InvertedIndex | None) -> Tensor:
    """Launch the norms of `gallery [G, S, C]`: `1 / |g|` over C, fp32 `[G, S]`, or `[T, S]` for the slots of an index.

    Those outside the safe range are negative, as those of `common.norms.inverse_norms`.

    They are a pass of their own over the touched maps, which costs less than taking them from the tiles of the product:
    every pair would take them again, and their sums would hold up the products.
    """
    locations, channels = gallery.shape[1:]
    slots = gallery.shape[0] if inverted is None else inverted.classes.shape[0]
    rnorm = gallery.new_empty(slots, locations, dtype=torch.float32)
    if rnorm.numel():
        tiles, num_warps, num_stages = config.norms(channels)
        _norms_kernel[(slots,)](
            gallery, None if inverted is None else inverted.classes, rnorm, locations, channels, *gallery.stride(),
            HAS_INDEX=inverted is not None, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return rnorm


def may_be_out_of_range(gallery: Tensor, rnorm: Tensor) -> bool:
    """Whether raw maps may have norms outside the safe range, which fp16 does not reach.

    The products of such maps leave the range of fp32. A second launch, which ends at once where there are none, takes
    them anew with maps that are normalised before they are multiplied: the host need not know of it.
    """
    return rnorm.numel() > 0 and gallery.dtype != torch.float16
