"""The only table of tile sizes, warps and stages.

A shape class (location count, element size) picks a row; sizes that change from batch to batch (P, G, K, N) never do,
and kernels are not specialised on them: a new batch size or K compiles nothing new. Tile letters as in README.md: BS
and BR locations, BC channels,
BM and BN items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

WORKSPACE_BYTES = 256 * 2**20  # of similarities or candidates that cosine top-k may hold at a time


class Config(NamedTuple):
    """Tile sizes (the kernel's constexpr arguments) with the launch's warps and pipeline stages."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int


def argmax_dtype(locations: int) -> torch.dtype:
    """The smallest dtype that holds a location."""
    if locations <= 256:
        return torch.uint8
    return torch.int16 if locations <= 2**15 else torch.int32


def precision() -> str:
    """How fp32 operands are multiplied, from torch's setting for matrix products.

    At "highest" an operand is split into two tf32 parts and three products restore what one loses: as accurate as
    fp32 to within its rounding, on the tensor cores, and without the spills of a product in scalar fp32.
    """
    if torch.version.hip is not None:
        return "ieee"
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch >= 2.9
    if setting is None:
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "tf32x3"


def operands(probe: torch.dtype, gallery: torch.dtype) -> dict[str, bool | str]:
    """How a product of maps of these dtypes is taken: `WIDEN` and `PRECISION`.

    A raw gallery may exceed the range of fp16, if not its precision: it meets an fp16 probe in tf32.
    """
    if probe == torch.float16 and gallery != torch.float16:
        return {"WIDEN": True, "PRECISION": "ieee" if torch.version.hip is not None else "tf32"}
    return {"WIDEN": False, "PRECISION": precision()}


def _power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds `size`, within `[low, high]`."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def correlation_forward(locations: int, channels: int, probe_size: int, gallery_size: int) -> Config:
    """Forward of max correlation: a `[BR, BS]` correlation tile, channels in steps of BC, KP neighbours a program.

    Steps and stages are those that compile without a spill from sm_80 to sm_100, by the sizes of the maps' elements.
    """
    tile = _power_of_two(locations, 16, 64)
    step, num_stages = {(2, 2): (32, 5), (2, 4): (64, 3)}.get((probe_size, gallery_size), (32, 3))
    tiles = {"BS": tile, "BR": tile, "BC": _power_of_two(channels, 16, step), "KP": 8}
    return Config(tiles, num_warps=8 if tile == 64 else 4, num_stages=num_stages)


def correlation_backward(locations: int, channels: int, element_size: int) -> Config:
    """Both gradients of max correlation: a `[BS, BR]` weight tile against BC channels kept in the accumulator.

    fp32 takes smaller tiles: its products split every operand in two.
    """
    tile = _power_of_two(locations, 16, 64 if element_size == 2 else 32)
    tiles = {"BS": tile, "BR": tile, "BC": _power_of_two(channels, 16, 128)}
    return Config(tiles, num_warps=8 if tile >= 32 else 4, num_stages=3)


def cosine_topk(element_size: int) -> Config:
    """Similarity tiles `[BM, BN]` of cosine top-k, embedding axis in steps of BD."""
    return Config({"BM": 128, "BN": 64, "BD": 128 // element_size}, num_warps=8, num_stages=3)
