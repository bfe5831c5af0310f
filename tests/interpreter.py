"""Makes Triton's interpreter faster: launches take half the time. And it rounds to bfloat16 as a GPU does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Replace what the interpreter does again at every operation, for good."""
    _replace_language_once_per_module()
    _keep_dtypes()
    _round_to_bfloat16()
    # Otherwise every 32-bit sum is computed in 64 bits as well, for an assertion that is off without `debug`.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _replace_language_once_per_module() -> None:
    """The interpreter replaces `tl` at each call of a device function."""
    replaced = set()

    def call(self: interpreter.InterpretedFunction, *args: object, **named: object) -> object:
        module = self.fn.__module__
        if module not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        return self.rewrite()(*args, **named)

    interpreter.InterpretedFunction.__call__ = call


def _keep_dtypes() -> None:
    """The interpreter builds its table of NumPy's dtypes at each look-up."""
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype: tl.dtype) -> object:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return look_up(dtype)
        if scalar.name not in known:
            known[scalar.name] = look_up(dtype)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_dtype


def _round_to_bfloat16() -> None:
    """The interpreter cuts off the bits that bfloat16 has no room for; they are rounded to the nearest here."""
    convert = interpreter._convert_float

    def converted(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(values).view(np.uint32)
            rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
        return convert(values, source, target, rounding)

    interpreter._convert_float = converted
