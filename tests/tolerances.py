"""The one table of tolerances, per dtype, and the assertions that use it.

`value`: largest absolute error of a correlation, which lies in [-1, 1]. `cosine` and `norm`: least cosine between a
gradient and the true one, and largest relative difference of their norms, so that a wrong scale fails too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    value: float
    cosine: float
    norm: float


TOLERANCES = {
    torch.float64: Tolerance(1e-10, 1 - 1e-10, 1e-10),
    torch.float32: Tolerance(1e-5, 0.9999, 1e-4),
    torch.bfloat16: Tolerance(2e-2, 0.999, 1e-2),
    torch.float16: Tolerance(2e-2, 0.999, 5e-3),
}


def assert_values(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert that `got` is `expected`, NaN and Inf included, within the tolerance of `dtype`.

    Fails, too, if the expectation is so flat that a constant would pass.
    """
    tolerance = TOLERANCES[dtype].value
    assert got.shape == expected.shape
    got, expected = got.double(), expected.double()
    assert torch.equal(got.isnan(), expected.isnan()), "NaN elsewhere than expected"
    infinite = expected.isinf()
    assert torch.equal(got[infinite], expected[infinite]), "Inf elsewhere than expected"
    finite = expected.isfinite()
    got, expected = got[finite], expected[finite]
    if expected.numel() == 0:
        return
    error = (got - expected).abs().max().item()
    assert error <= tolerance, f"largest error {error:.3g} exceeds {tolerance:.3g}"
    if expected.numel() > 1:
        spread = (expected.max() - expected.min()).item()
        assert spread > 4 * tolerance, f"a constant would pass: expected values spread over {spread:.3g} only"


def assert_gradients(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert that the gradient `got` points where `expected` does and is as long; where that is zero, so is `got`.

    Fails, too, if a constant gradient would pass.
    """
    tolerance = TOLERANCES[dtype]
    assert got.shape == expected.shape
    got, expected = got.double(), expected.double()
    assert got.isfinite().all(), "the gradient is not finite"
    untouched = expected.flatten(1).eq(0).all(1) if expected.dim() > 1 else expected == 0
    assert got[untouched].eq(0).all(), "a gradient where there is none"
    length = expected.norm().item()
    if length == 0:
        return
    cosine = cosine_between(got, expected)
    norm = abs(got.norm().item() / length - 1)
    assert cosine >= tolerance.cosine, f"cosine {cosine:.6f} to the true gradient"
    assert norm <= tolerance.norm, f"norm off by {norm:.3g} of the true gradient's"
    if expected.numel() > 1:
        flat = abs(cosine_between(expected, torch.ones_like(expected)))
        assert flat < tolerance.cosine, "a constant gradient would pass"


def cosine_between(left: Tensor, right: Tensor) -> float:
    return (left.flatten() @ right.flatten() / (left.norm() * right.norm())).item()
