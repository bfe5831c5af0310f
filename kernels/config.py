"""The only table of tile sizes, warps and stages.

A shape class (locations, channels, element sizes, and whether K is 1, below 4, or not) picks a row; sizes that change
from batch to batch (P, G, N) never do, and kernels are not specialised on them: a new batch size compiles nothing new.
Buffers are selected from in powers of two. The first configuration of a row is the default; tuning.py may find another
of them faster on the GPU at hand.
Tile letters as in README.md: BS and BR locations, BC channels, BM and BN items.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch

from ..versions import is_older

# by Triton's NumPy interpreter: launches are slow, so prefer few large programs
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PARTIAL_BYTES = 128 * 2**20  # of maxima of maps that take more than one tile, where only sums of them are wanted
LARGEST_TILE = 64  # locations
MAX_GRID = 2**31 - 1  # programs on the first axis of a launch (CUDA programming guide); 65,535 on the others
MAX_MAP_ELEMENTS, MAX_MAP_AXIS = 2**30, 2**20  # of locations and channels: offsets in a map have 32 bits
MAX_ROWS = 2**30  # of a table that is searched: ids, and the counts of candidates, have 32 bits
AMD = 942  # gfx942 stands for every AMD GPU


class Config(NamedTuple):
    """Tile sizes (the kernel's constexpr arguments) with the launch's warps and pipeline stages."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int


def allows_tf32() -> bool:
    """Whether torch's setting lets products of fp32 operands be taken in tf32; asks no GPU."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch >= 2.9
    return torch.get_float32_matmul_precision() != "highest" if setting is None else bool(setting == "tf32")


def precision() -> str:
    """How fp32 operands are multiplied, from torch's setting for matrix products.

    At "highest" an operand is split into two tf32 parts and three products restore what one loses: as accurate as
    fp32 to within its rounding, on the tensor cores, and without the spills of a product in scalar fp32.
    """
    if generation() == AMD:
        return "ieee"
    return "tf32" if allows_tf32() else "tf32x3"


def operands(probe: torch.dtype, gallery: torch.dtype) -> dict[str, bool | str]:
    """How a product of maps of these dtypes is taken: `WIDEN` and `PRECISION`.

    A raw gallery may exceed the range of fp16, if not its precision: its product with an fp16 probe is taken in tf32.
    """
    if probe == torch.float16 and gallery != torch.float16:
        return {"WIDEN": True, "PRECISION": "ieee" if generation() == AMD else "tf32"}
    return {"WIDEN": False, "PRECISION": precision()}


def generation() -> int:
    """Architecture of the current GPU as in sm_90 or gfx942, 90 or 942; 90 without a GPU.

    GPUs of one machine may differ, so callers ask at every launch; inside an op the GPU of its tensors is current.
    """
    if torch.version.hip is not None:
        return AMD
    # is_available asks the driver at every call
    has_gpu = torch.cuda.is_initialized() or torch.cuda.is_available()
    return _compute_capability(torch.cuda.current_device()) if has_gpu else 90


def has_ptx() -> bool:
    """Whether kernels may contain instructions of NVIDIA's PTX."""
    return not INTERPRETED and generation() != AMD


def has_tma() -> bool:
    """Whether the current GPU has a tensor memory accelerator, and Triton pipelines its copies: Hopper, Blackwell.

    Before 3.6 Triton does so, too, but then fp32 products spill.
    """
    return not INTERPRETED and generation() // 10 in (9, 10) and _has_triton(3, 6)


@cache
def _has_triton(major: int, minor: int) -> bool:
    """Whether Triton is of this release or a later one."""
    import triton  # not there on systems that never ask

    return not is_older(triton.__version__, (major, minor))


@cache
def _compute_capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_memory() -> int:
    """Bytes of shared memory that a program may use on the current GPU (CUDA programming guide; CDNA3 ISA guide)."""
    small = 65_536 if generation() == AMD else 101_376
    return {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}.get(generation(), small)


def cdiv(size: int, step: int) -> int:
    """How many steps cover a size: `triton.cdiv`, a tenth of whose time goes into the division."""
    return -(-size // step)


def _power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds `size`, within `[low, high]`."""
    return min(max(1 << (size - 1).bit_length(), low), high)


@cache
def shape_class(locations: int, channels: int, *element_sizes: int) -> tuple[int, ...]:
    """What the rows of max correlation depend on: sizes of a model, in powers of two; no batch size is among them."""
    return _power_of_two(locations, 16, 2**30), _power_of_two(channels, 16, 2**30), *element_sizes


def _fitting(configs: Iterable[Config], shared: Callable[[Config], int]) -> list[Config]:
    """The first, the default, and of the others those different ones that fit into shared memory."""
    first, *others = configs
    different = [config for number, config in enumerate(others) if config not in (first, *others[:number])]
    return [first, *(config for config in different if shared(config) <= shared_memory())]


def _buffers(config: Config) -> int:
    """How many tiles of an operand are in shared memory: AMD keeps one more in registers."""
    return config.num_stages - (generation() == AMD)


def most_together(neighbors: int) -> int:
    """How many of a probe's neighbours may share a tile: 1, 2 or 4."""
    return 4 if neighbors >= 4 else 2 if neighbors > 1 else 1


def correlation_forward(
    locations: int, channels: int, probe_size: int, gallery_size: int, together: int
) -> list[Config]:
    """Forward of max correlation: `[BR, BS]` tiles of up to `together` neighbours (BK), maps in steps of BC channels.

    BS and BR are equal, the same in every configuration: `pair_sums` sizes its memory by their bound, `LARGEST_TILE`.
    Few warps a program, for several programs on a multiprocessor: on an H200 others took 1.1 to 2 times as long. A tile
    of several neighbours loads the probe once for all of them, but not by TMA, which copies one map at a time; in fp32
    it takes more warps, whose registers hold the split operands, too.
    """
    tile = _power_of_two(locations, 16, LARGEST_TILE)
    is_half = probe_size == gallery_size == 2
    step = 64 if probe_size == 2 else 32
    stages = 4 if probe_size == 2 and generation() != AMD else 3
    is_narrow = generation() // 10 in (8, 12) and shared_memory() < 2**17
    if is_narrow:
        stages -= 1
        if probe_size == gallery_size:  # there wider steps may spill
            step //= 2
    few, many = (4, 8) if tile == LARGEST_TILE else (2, 4)
    # (BK, BC, warps, stages)
    alone = [(1, step, few, stages), (1, 2 * step, few, 3), (1, step, few, 3), (1, step, many, 3)]
    several = [(2, step, few, 3), (4, step, many, 3)] if is_half else [(2, step, many, 3)]
    listed = [*alone, *several]
    if generation() // 10 == 8 and is_half and not is_narrow:
        listed = [*several, *alone]
    elif generation() // 10 == 10:  # few warps may spill there, and so may other numbers of stages
        listed = [(1, step, many, 4 if is_half else 3 if probe_size == 4 else 2), *listed]
    found = [
        Config({"BK": maps, "BS": tile, "BR": tile, "BC": _power_of_two(channels, 16, size)}, num_warps, num_stages)
        for maps, size, num_warps, num_stages in listed
        if maps <= together
    ]
    wider = max(probe_size, gallery_size)
    return _fitting(found, lambda c: _buffers(c) * (c.tiles["BK"] + 1) * tile * c.tiles["BC"] * wider)


@cache
def norms(channels: int) -> Config:
    """Inverse norms of BR locations at a time, channels in steps of BC."""
    return Config({"BR": 16, "BC": _power_of_two(channels, 16, 512)}, num_warps=4, num_stages=1)


@cache
def preparation(channels: int) -> Config:
    """Maps as they are matched, and the gradient: BR locations at a time, channels in steps of BC."""
    return Config({"BR": 128 if INTERPRETED else 16, "BC": _power_of_two(channels, 16, 128)}, num_warps=4, num_stages=1)


def neighbors_per_program(probes: int, neighbors: int) -> int:
    """How many neighbours a program streams past its probe: many, but not so many that programs get few."""
    return max(1, min(32, neighbors, probes * neighbors // 1024))


def correlation_backward(locations: int, channels: int, product_size: int, map_size: int, tma: int) -> list[Config]:
    """Both gradients of max correlation: a `[BS, BR]` weight tile against BC channels kept in the accumulator.

    Products of fp32 take smaller tiles: they split every operand in two. On AMD what is on its way stays in registers:
    a stage more, and a tile that is scaled before its product spills. Hopper's products write an accumulator of as many
    channels as registers hold, if none of them holds addresses (`tma`): the weights are made once for all channels.
    """
    stages = 2 if generation() == AMD else 3
    is_half = product_size == 2
    tile = _power_of_two(locations, 16, 64 if is_half else 32)
    many, few = (8, 4) if tile >= 32 else (4, 2)
    listed = [(most, num_warps, stages) for most in (128, 64, 256) for num_warps in (many, few)]
    if generation() // 10 == 9 and is_half and tile == LARGEST_TILE and tma:
        listed = [*([(512, many, 3), (512, 16, 3), (256, few, 3)] if map_size == 2 else [(128, many, 2)]), *listed]
    found = [
        Config({"BS": tile, "BR": tile, "BC": _power_of_two(channels, 16, most)}, num_warps, num_stages)
        for most, num_warps, num_stages in listed
    ]
    # of the maps one tile is in registers everywhere; the weights are there once
    return _fitting(found, lambda c: map_size * tile * ((c.num_stages - 1) * c.tiles["BC"] + tile))


@cache
def matches(locations: int) -> Config:
    """Matches of B locations of a pair, in the form that both gradients read; CHUNK of s at a time."""
    tile = _power_of_two(locations, 16, LARGEST_TILE)
    return Config({"B": tile, "CHUNK": tile if INTERPRETED else 8}, num_warps=1, num_stages=1)


def cosine_topk(dim: int, element_size: int) -> list[Config]:
    """Similarity tiles `[BM, BN]` of cosine top-k, embedding axis in steps of BD, GROUP row tiles at a time.

    The largest tiles whose products and candidates share the registers without a spill; where embeddings are short,
    those of which several programs fit a multiprocessor, so that one multiplies while the others append.
    """
    is_half, is_long = element_size == 2, dim >= 2048
    first = (64, 128, 8)
    if generation() // 10 == 9 and is_long:
        # before 3.5 Triton takes more shared memory for larger ones than there is
        first = (128, 256, 16) if is_half and _has_triton(3, 5) else (128, 128, 8)
    elif generation() // 10 == 10 and is_half:
        first = (128, 256 if is_long else 128, 8)
    step = 128 // element_size
    found = [
        Config({"BM": rows, "BN": columns, "BD": step, "GROUP": 1024 // rows}, num_warps, num_stages=3)
        for rows, columns, num_warps in (first, (64, 128, 4), (64, 128, 8), (128, 128, 8), (128, 256, 8))
    ]
    return _fitting(found, lambda c: _buffers(c) * (c.tiles["BM"] + c.tiles["BN"]) * step * element_size)


def select(length: int) -> Config:
    """Buffers of up to BL candidates, a power of two, BM of them a program: they are held in registers, 32 a thread."""
    rows = max(1, (2**17 if INTERPRETED else 2**10) // length)
    return Config({"BM": rows, "BL": length}, num_warps=max(1, length // 2**10), num_stages=1)


def sort(k: int) -> Config:
    """The k candidates of BM rows, a power of two BK, in registers: 8 a thread."""
    width = _power_of_two(k, 16, 2**30)
    rows = max(1, (2**16 if INTERPRETED else 2**8) // width)
    return Config({"BM": rows, "BK": width}, num_warps=max(1, width // 2**8), num_stages=1)
