"""Kernels in PTX run on CPU tensors: translated to C++, built by g++, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .ptx import name_of
from .translate import translate

HERE = Path(__file__).parent
BUILDS = HERE.parents[1] / "build" / "compiled"
COMPILER = ("g++", "-O1", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off")
MAX_SHARED_BYTES = 166_912  # of a block on sm_80 (CUDA programming guide)


class EmulationError(Exception):
    """What a kernel did that a GPU does not allow, or that depends on which thread is ahead."""


class _Range(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint64), ("end", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    """As in runtime.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("num_warps", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("num_ranges", ctypes.c_int),
        ("params", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
    )


class Kernel:
    """A kernel, from its PTX.

    Args:
        text: the PTX.
        num_warps: of a program.
        shared_bytes: of its dynamic shared memory.
    """

    def __init__(self, text: str, num_warps: int, shared_bytes: int) -> None:
        assert shared_bytes <= MAX_SHARED_BYTES, shared_bytes
        self.text, self.num_warps, self.shared_bytes = text, num_warps, shared_bytes
        self.name = name_of(text)
        self._run = ctypes.CDLL(str(_built(text))).run

    def __call__(self, grid: Sequence[int], *arguments: torch.Tensor | int | None) -> None:
        """Run a grid of programs, one after the other.

        Args:
            grid: programs on up to three axes.
            arguments: of the kernel; numbers as their bits.

        Raises:
            EmulationError: with the place in the PTX and in the kernel's source.
        """
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each or 0 for each in arguments]
        params = (ctypes.c_uint64 * len(values))(*(value % 2**64 for value in values))
        storages = [each.untyped_storage() for each in arguments if isinstance(each, torch.Tensor)]
        found = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        ranges = (_Range * max(len(found), 1))(*(_Range(*each) for each in found))
        launch = _Launch(
            (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))), self.num_warps, self.shared_bytes, len(ranges),
            ctypes.addressof(params), ctypes.addressof(ranges),
        )  # fmt: skip
        message = ctypes.create_string_buffer(1000)
        if self._run(ctypes.byref(launch), message, ctypes.c_size_t(len(message))):
            line, _, text = message.value.decode().partition(" ")
            raise EmulationError(f"{self.name}: {text}\n{self._place(int(line))}")

    def _place(self, line: int) -> str:
        """A line of the PTX, and what it was compiled from."""
        lines = self.text.splitlines()[:line]
        source = next(
            (each.partition("//")[2].strip() for each in reversed(lines) if each.strip().startswith(".loc")), ""
        )
        return f"PTX line {line}: {lines[-1].strip()}  // {source}"


@cache
def can_build() -> bool:
    """Whether there is a g++ that compiles the emulator, and a place for what it builds."""
    try:
        _header()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _built(text: str) -> Path:
    """The shared library of PTX, built where there is none yet."""
    header = _header()
    path = header.parent / f"{_key(*_sources('ptx.py', 'translate.py'), text)}.so"
    if not path.exists():
        _compile(path, "-shared", f"-I{header.parent}", f"-I{HERE}", "-x", "c++", "-", source=translate(text))
    return path


def _header() -> Path:
    """runtime.h, parsed once for all kernels."""
    header = BUILDS / _key(*_sources("instructions.h", "runtime.h"), platform.machine()) / "runtime.h.gch"
    if not header.exists():
        _compile(header, "-x", "c++-header", str(HERE / "runtime.h"))
    return header


def _sources(*names: str) -> list[str]:
    return [(HERE / name).read_text(encoding="utf-8") for name in names]


def _key(*texts: str) -> str:
    return hashlib.sha256("\n".join([*texts, *COMPILER]).encode()).hexdigest()[:32]


def _compile(path: Path, *arguments: str, source: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        subprocess.run([*COMPILER, *arguments, "-o", built], input=source, text=True, check=True)
        os.replace(built, path)  # other processes may build the same
