"""Matrix products whose sums run in another order at every place of the result, as any BLAS may have it.

No BLAS promises that the product of the same two vectors has the same last bit wherever they stand in a matrix, and
what one library does on one CPU is no law on the next. `pytest --mixed-sums` puts these products under the CPU path
(`torch.mm`, `torch.bmm`, and `@` over them) and under the interpreter's `tl.dot`. A call still repeats bit for bit, and
products that are exact in every order, as those of small integers, stay exact: a test that needs a tie uses such data.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

ORDERS = 3  # as given, reversed, and in two halves
WIDE = (torch.float32, torch.bfloat16, torch.float16)

_library: torch.library.Library | None = None


@cache
def order_of_sums(rows: int, columns: int, depth: int) -> Tensor:
    """Which order an element `[rows, columns]` of a product takes; it depends on its place and on the shapes."""
    shift = rows + 2 * columns + depth
    return (torch.arange(rows).unsqueeze(1) + 2 * torch.arange(columns) + shift) % ORDERS


def _mixed(product: Any, left: Any, right: Any, flip: Any, where: Any) -> Any:
    """`product(left, right)` of `[.., M, K]` and `[.., K, N]`, with mixed orders."""
    depth = left.shape[-1]
    half = depth // 2
    orders = order_of_sums(left.shape[-2], right.shape[-1], depth)
    halves = product(left[..., half:], right[..., half:, :]) + product(left[..., :half], right[..., :half, :])
    backward = product(flip(left, -1), flip(right, -2))
    return where(orders == 0, product(left, right), where(orders == 1, backward, halves))


def _mm(left: Tensor, right: Tensor) -> Tensor:
    # addmm and baddbmm, which are not replaced, with nothing to add
    product = torch.ops.aten.addmm if left.dim() == 2 else torch.ops.aten.baddbmm

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        nothing = a.new_zeros(*a.shape[:-1], b.shape[-1])
        return product(nothing, a, b, beta=0)

    if left.dtype not in WIDE or left.shape[-1] < 2:
        return multiply(left, right)
    return _mixed(multiply, left, right, lambda matrix, axis: matrix.flip(axis), torch.where)


def _mm_out(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_mm(left, right))


def _replace_torch_products() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is meant
        for name in ("mm", "bmm"):
            _library.impl(name, _mm, "CPU")
            _library.impl(f"{name}.out", _mm_out, "CPU")


def _replace_interpreted_products() -> None:
    import numpy as np
    from triton.runtime import interpreter

    def multiply(left: Any, right: Any) -> Any:
        return np.matmul(left, right, dtype=np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        with np.errstate(invalid="ignore"):  # of NaN and Inf, as torch
            found = _mixed(multiply, a.data, b.data, np.flip, lambda which, x, y: np.where(which.numpy(), x, y))
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def mix_orders() -> None:
    """Replace the products of this process, for good."""
    _replace_torch_products()
    if importlib.util.find_spec("triton") is not None:
        _replace_interpreted_products()
