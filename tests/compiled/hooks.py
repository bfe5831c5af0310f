"""Makes the library run its kernels as they are compiled for an A100, emulated on CPU tensors.

Triton's own runtime binds and specialises the arguments of a launch, and compiles the kernel for a GPU that a driver
claims to be there. Only what would load and launch it is replaced.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from qaconv_triton import ops
from qaconv_triton.kernels import config, tuning

from .launch import Kernel

TARGET = GPUTarget("cuda", 80, 32)


class _Driver:
    """What Triton's runtime asks of a GPU before it launches a kernel."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> None:
    """Emulate every kernel of this process."""
    driver.set_active(_Driver())
    CompiledKernel._init_handles = _init_handles
    for module in (config, tuning):
        module.generation = lambda: TARGET.arch
    uses_triton = ops.uses_triton

    def uses_emulated(device: torch.device, dtype: torch.dtype) -> bool:
        """Let tensors on the CPU reach the kernels, as if these were interpreted."""
        is_interpreted, config.INTERPRETED = config.INTERPRETED, True
        try:
            return uses_triton(device, dtype)
        finally:
            config.INTERPRETED = is_interpreted

    ops.uses_triton = uses_emulated


def _init_handles(self: Any) -> None:
    """Replaces what loads a kernel to a GPU, the first time that it is called."""
    if self._run is not None:
        return
    kernel = Kernel(self.asm["ptx"], self.metadata.num_warps, self.metadata.shared)
    kinds = list(self.src.signature.values())

    def run(
        grid_0: int, grid_1: int, grid_2: int, stream: int, function: object, packed: object, metadata: object,
        enter: object, leave: object, *arguments: Any,
    ) -> None:  # fmt: skip
        given = [_bits(kind, value) for kind, value in zip(kinds, arguments, strict=True) if kind != "constexpr"]
        kernel((grid_0, grid_1, grid_2), *given, None, None)  # and scratch memory, which no kernel asks for

    assert self.metadata.global_scratch_size == 0
    self._run = run


def _bits(kind: str, value: Any) -> Any:
    """An argument: a tensor, or the bits of a number."""
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    assert kind[0] in "*iu", kind
    return value
