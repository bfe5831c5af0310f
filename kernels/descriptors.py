"""Tiles of maps in memory: copied by the tensor memory accelerator (TMA) where there is one, else by pointers.

A TMA copy is one instruction of one thread, for addresses, masks and zeros beyond the edge, which otherwise are every
thread's (PTX ISA, cp.async.bulk.tensor). It takes maps whose channels are contiguous and whose other strides, and
address, are multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config

MAX_SIZE, MAX_STRIDE = 2**31, 2**40  # of a tensor that a descriptor takes; strides in bytes (CUDA driver API)


def may_be_described(*tensors: Tensor) -> bool:
    """Whether TMA copies tiles of these `[.., C]` on the current GPU."""
    return config.has_tma() and all(_fits(tensor) for tensor in tensors)


def _fits(tensor: Tensor) -> bool:
    width = tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and max(tensor.shape) < MAX_SIZE
        and all(stride > 0 and stride * width % 16 == 0 for stride in tensor.stride()[:-1])
        and max(tensor.stride()) * width < MAX_STRIDE
    )


def described(tensor: Tensor, rows: int, columns: int, is_described: bool) -> Any:
    """What a kernel takes for `tensor [.., rows, columns]`: a descriptor of such tiles, or the tensor."""
    if not is_described:
        return tensor
    return TensorDescriptor.from_tensor(tensor, [*(1 for _ in tensor.shape[:-2]), rows, columns])


@triton.jit
def load_tile(
    p_maps,  # [G, S, C]
    i_map,  # int64, of one map, or `[MAPS * B]`, of every row; nothing is there where it is negative
    i_row,
    i_column,
    rows,  # S
    columns,  # C
    stride_map,
    stride_row,
    stride_column,
    TMA: tl.constexpr,
    MAPS: tl.constexpr,
    B: tl.constexpr,
    BC: tl.constexpr,
):
    """Rows and columns of one map or of `MAPS` of them, `[MAPS * B, BC]`, zero where there are none."""
    if TMA:
        b_tile = p_maps.load([i_map.to(tl.int32), i_row, i_column]).reshape([B, BC])
    else:
        o_row = i_row + tl.arange(0, MAPS * B) % B
        o_column = i_column + tl.arange(0, BC)
        p_row = p_maps + (tl.maximum(i_map, 0) * stride_map + o_row.to(tl.int64) * stride_row)
        b_tile = tl.load(
            p_row[:, None] + o_column[None, :].to(tl.int64) * stride_column,
            mask=((o_row < rows) & (i_map >= 0))[:, None] & (o_column < columns)[None, :],
            other=0.0,
        )
    return b_tile
