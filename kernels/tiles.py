"""Small device helpers shared by the kernels."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from ..common import candidates
from ..common.norms import RANGES

LOWEST = tl.constexpr(candidates.LOWEST)
HIGHEST = tl.constexpr(candidates.HIGHEST)
SAFE = tl.constexpr(RANGES[torch.float32].safe)
SHIFT = tl.constexpr(RANGES[torch.float32].shift)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """`sums + a @ b`, accumulated in fp32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def parts(b_tile, HALVINGS: tl.constexpr):
    """`2^HALVINGS` parts of `[X, Y]` or `[X, Y, Z]` along Y, in order; a thread has a position's elements of all."""
    b_parts = (b_tile,)
    for _ in tl.static_range(HALVINGS):
        b_halves = ()
        for i_part in tl.static_range(len(b_parts)):
            b_halves = b_halves + _halves(b_parts[i_part])
        b_parts = b_halves
    return b_parts


@triton.jit
def _halves(b_tile):
    X: tl.constexpr = b_tile.shape[0]
    HALF: tl.constexpr = b_tile.shape[1] // 2
    if len(b_tile.shape) == 2:
        b_pairs = tl.permute(tl.reshape(b_tile, [X, 2, HALF]), [0, 2, 1])
    else:
        b_pairs = tl.permute(tl.reshape(b_tile, [X, 2, HALF, b_tile.shape[2]]), [0, 2, 3, 1])
    return tl.split(b_pairs)


@triton.jit
def sortable(values):
    """As `candidates.sortable`: float32 to int32 in the same order, NaN above everything, -0 equal to +0.

    Integer maxima propagate NaN and break ties as we say, on every device and in the interpreter; float ones do not.
    The sign of a zero is dropped by integers, too: compilers fuse `values + 0.0` with the product before it, whose
    underflow is then -0 again.
    """
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(values != values, HIGHEST, bits)  # one NaN, positive
    sign = bits >> 31
    return ((bits & HIGHEST) ^ sign) - sign  # sign and magnitude -> two's complement


@triton.jit
def unsortable(keys):
    """As `candidates.unsortable`."""
    return (tl.abs(keys) | (keys & LOWEST)).to(tl.float32, bitcast=True)


@triton.jit
def neighbor_ids(
    p_index, p_slots, i_pair, i_k, i_end, HAS_INDEX: tl.constexpr, HAS_SLOTS: tl.constexpr, BK: tl.constexpr
):
    """The gallery maps of a probe's pairs, -1 from `i_end` on, and their rows of norms; `i_k` is one or one a row."""
    is_there = i_k < i_end if BK > 1 else True  # a tile of one neighbour has one
    b_g = tl.where(is_there, i_k, -1).to(tl.int64)
    b_slot = b_g
    if HAS_INDEX:
        b_g = tl.load(p_index + i_pair + i_k, mask=is_there, other=-1)
        if HAS_SLOTS:
            b_slot = tl.load(p_slots + i_pair + i_k, mask=is_there, other=0)
    return b_g, b_slot


@triton.jit
def squares(
    p_rows,  # [X, 1]
    m_rows,  # [X]
    b_scale,  # [X]
    stride,  # of the columns
    C,
    BC: tl.constexpr,
):
    """Sums of squares of rows of C columns, each row times its scale, fp32 `[X]`."""
    b_squares = tl.zeros_like(b_scale)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        b_rows = tl.load(
            p_rows + o_c[None, :].to(tl.int64) * stride, mask=m_rows[:, None] & (o_c < C)[None, :], other=0.0
        )
        b_rows = b_rows.to(tl.float32) * b_scale[:, None]
        b_squares += tl.sum(b_rows * b_rows, axis=1)
    return b_squares


@triton.jit
def shift_outside(b_squares):
    """SHIFT, or its inverse, for vectors too short, or too long, for their squares to be exact; else 1."""
    b_shift = tl.where(b_squares > SAFE * SAFE, 1 / SHIFT, 1.0)
    return tl.where(b_squares < 1 / (SAFE * SAFE), SHIFT, b_shift)


@triton.jit
def inverse_norm(b_squares, b_shift):
    """As `norms.inverse_norms`, from sums of squares of vectors times `b_shift` squared."""
    is_zero = b_squares == 0.0
    b_inverse = tl.where(is_zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(is_zero, 1.0, b_squares)))
    return b_inverse * tl.where(b_shift == 1.0, 1.0, -b_shift)


@triton.jit
def scale_and_inverse(b_rnorm):
    """As `norms.scale_and_inverse`."""
    b_scale = tl.where(b_rnorm < 0.0, tl.where(b_rnorm < -1.0, SHIFT, 1 / SHIFT), 1.0)
    return b_scale, tl.abs(b_rnorm)


@triton.jit
def normalized(values, b_rnorm):
    """Unit rows of `[X, Y]` in fp32, from their inverse norms `[X]` as of `inverse_norm`."""
    b_scale, b_inverse = scale_and_inverse(b_rnorm)
    return values.to(tl.float32) * b_scale[:, None] * b_inverse[:, None]


@triton.jit
def match_weights(
    b_arg_x,  # [BX] for each x the best y
    b_grad_x,  # [BX]
    b_arg_y,  # [BY] for each y the best x
    b_grad_y,  # [BY]
    o_x,  # [BX]
    o_y,  # [BY]
):
    """The gradient of a correlation tile, `[BX, BY]`: zero but where a location's best match lies."""
    from_x = tl.where(b_arg_x[:, None] == o_y[None, :], b_grad_x[:, None], 0.0)
    from_y = tl.where(b_arg_y[None, :] == o_x[:, None], b_grad_y[None, :], 0.0)
    return from_x + from_y
