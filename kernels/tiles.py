"""Small device helpers shared by the kernels."""

from __future__ import annotations

import os

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below the sortable form of every float, -inf included
HIGHEST = tl.constexpr(2**31 - 1)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """`sums + a @ b`, accumulated in fp32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def sortable(values):
    """Map float32 to int32 in the same order: NaN above everything, -0 equal to +0.

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
    """The float32 that `sortable` came from."""
    return (tl.abs(keys) | (keys & LOWEST)).to(tl.float32, bitcast=True)


@triton.jit
def squares(values):
    """Sums of squares of the rows of `[X, Y]`, fp32 `[X]`."""
    wide = values.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def inverse_norm(total):
    """`1 / sqrt(total)` of sums of squares, and zero for a zero vector."""
    is_zero = total == 0.0
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(is_zero, 1.0, total)))


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
