"""Feature maps as they are matched: unit length at every location, times visibility, cast, channels-last.

One launch each way. A program takes BR locations of a map, the channels BC at a time, twice: once for sums over them,
and once more, from the cache, to scale them. README.md has the math of norms and their range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .tiles import inverse_norm, normalized, scale_and_inverse, shift_outside, squares


@triton.jit
def _prepare_kernel(
    p_maps,  # [B, S, C], any strides
    p_visibility,  # [B, S] fp32
    p_out,  # [B, S, C]
    p_factors,  # [B, S, 2] fp32
    S,
    C,
    stride_maps_b,
    stride_maps_s,
    stride_maps_c,
    HAS_VISIBILITY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    tiles = tl.cdiv(S, BR)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_r = (tl.program_id(0) % tiles) * BR + tl.arange(0, BR)
    m_r = o_r < S
    p_map = p_maps + i_b * stride_maps_b + o_r[:, None].to(tl.int64) * stride_maps_s
    b_squares = squares(p_map, m_r, tl.full([BR], 1.0, tl.float32), stride_maps_c, C, BC)
    b_shift = shift_outside(b_squares)
    if tl.max((m_r & (b_shift != 1.0)).to(tl.int32), axis=0) > 0:  # rare: read once more, in few registers
        b_squares = squares(p_map, m_r, b_shift * b_shift, stride_maps_c, C, 16)
    b_rnorm = inverse_norm(b_squares, b_shift)
    b_scale, b_inverse = scale_and_inverse(b_rnorm)
    o_row = i_b * S + o_r
    tl.store(p_factors + 2 * o_row, b_scale, mask=m_r)
    tl.store(p_factors + 2 * o_row + 1, b_inverse, mask=m_r)
    if HAS_VISIBILITY:
        b_visibility = tl.load(p_visibility + o_row, mask=m_r, other=0.0)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_map = m_r[:, None] & (o_c < C)[None, :]
        b_map = tl.load(p_map + o_c[None, :].to(tl.int64) * stride_maps_c, mask=m_map, other=0.0)
        b_out = normalized(b_map, b_rnorm)
        if HAS_VISIBILITY:
            b_out *= b_visibility[:, None]
        p_row = p_out + i_b * S * C + o_r[:, None] * C
        tl.store(p_row + o_c[None, :], b_out.to(p_out.dtype.element_ty), mask=m_map)


def prepare_maps(maps: Tensor, visibility: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the preparation of `maps [B, S, C]`, of any strides, weighted by `visibility [B, S]` (fp32).

    Returns:
        unit maps times visibility `[B, S, C]` in `dtype`, and `factors` fp32 `[B, S, 2]`, as of `scale_and_inverse`.
    """
    batch, locations, channels = maps.shape
    out = maps.new_empty(maps.shape, dtype=dtype)
    factors = maps.new_empty(batch, locations, 2, dtype=torch.float32)
    if batch:
        tiles, num_warps, num_stages = config.preparation(channels)
        _prepare_kernel[(batch * config.cdiv(locations, tiles["BR"]),)](
            maps, visibility, out, factors, locations, channels, *maps.stride(),
            HAS_VISIBILITY=visibility is not None, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out, factors


@triton.jit
def _unit_tile(p_map, o_c, stride_c, m_map, b_scale, b_inverse, IS_UNIT: tl.constexpr):
    """Unit rows of a tile in fp32, from those of the maps or from the maps themselves."""
    b_unit = tl.load(p_map + o_c[None, :].to(tl.int64) * stride_c, mask=m_map, other=0.0).to(tl.float32)
    if not IS_UNIT:
        b_unit = b_unit * b_scale[:, None] * b_inverse[:, None]
    return b_unit


@triton.jit
def _prepare_gradient_kernel(
    p_grad,  # [B, S, C]
    p_maps,  # [B, S, C], any strides
    p_visibility,  # [B, S] fp32
    p_factors,  # [B, S, 2] fp32
    p_to_maps,  # [B, S, C]
    p_to_visibility,  # [B, S] fp32
    S,
    C,
    stride_maps_b,
    stride_maps_s,
    stride_maps_c,
    HAS_VISIBILITY: tl.constexpr,
    IS_UNIT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    tiles = tl.cdiv(S, BR)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_r = (tl.program_id(0) % tiles) * BR + tl.arange(0, BR)
    m_r = o_r < S
    p_map = p_maps + i_b * stride_maps_b + o_r[:, None].to(tl.int64) * stride_maps_s
    o_row = i_b * S + o_r
    o_out = i_b * S * C + o_r[:, None] * C
    b_scale = tl.load(p_factors + 2 * o_row, mask=m_r, other=0.0)
    b_inverse = tl.load(p_factors + 2 * o_row + 1, mask=m_r, other=0.0)

    b_radial = tl.zeros([BR], tl.float32)  # <unit map, its gradient>: the part that normalising removes
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_map = m_r[:, None] & (o_c < C)[None, :]
        b_grad = tl.load(p_grad + o_out + o_c[None, :], mask=m_map, other=0.0).to(tl.float32)
        b_unit = _unit_tile(p_map, o_c, stride_maps_c, m_map, b_scale, b_inverse, IS_UNIT)
        b_radial += tl.sum(b_grad * b_unit, axis=1)
    if HAS_VISIBILITY:
        tl.store(p_to_visibility + o_row, b_radial, mask=m_r)
        b_visibility = tl.load(p_visibility + o_row, mask=m_r, other=0.0)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_map = m_r[:, None] & (o_c < C)[None, :]
        b_grad = tl.load(p_grad + o_out + o_c[None, :], mask=m_map, other=0.0).to(tl.float32)
        b_unit = _unit_tile(p_map, o_c, stride_maps_c, m_map, b_scale, b_inverse, IS_UNIT)
        b_out = b_grad - b_unit * b_radial[:, None]
        if HAS_VISIBILITY:
            b_out *= b_visibility[:, None]
        b_out = b_out * b_inverse[:, None] * b_scale[:, None]
        tl.store(p_to_maps + o_out + o_c[None, :], b_out.to(p_to_maps.dtype.element_ty), mask=m_map)


def prepare_maps_backward(
    grad: Tensor, maps: Tensor, visibility: Tensor | None, factors: Tensor, is_unit: bool
) -> tuple[Tensor, Tensor]:
    """Launch the gradients of `prepare_maps`, from `grad [B, S, C]` (contiguous) and what the forward was given.

    With `is_unit`, `maps` are what it returned: of unit length.

    Returns:
        gradients to the maps `[B, S, C]`, in their dtype, and to visibility fp32 `[B, S]`, empty without it.
    """
    batch, locations, channels = maps.shape
    to_maps = maps.new_empty(maps.shape)
    to_visibility = maps.new_empty(0 if visibility is None else (batch, locations), dtype=torch.float32)
    if batch:
        tiles, num_warps, num_stages = config.preparation(channels)
        _prepare_gradient_kernel[(batch * config.cdiv(locations, tiles["BR"]),)](
            grad, maps, visibility, factors, to_maps, to_visibility, locations, channels, *maps.stride(),
            HAS_VISIBILITY=visibility is not None, IS_UNIT=is_unit, **tiles, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return to_maps, to_visibility
