"""The one table of tolerances, per dtype, and the assertions that use it.

A test that needs another tolerance says why beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """What results in a dtype may differ by from the truth in fp64, or from the same computed in another way."""

    value: float  # a correlation, in [-1, 1]
    cosine: float  # least cosine between a gradient and the true one
    norm: float  # their lengths, relative, so that a wrong scale fails too
    score: float  # a score behind two batch norms, and what is made of it, relative to the largest
    tie: float  # two correlations of operands that are rounded to the dtype, if rounding may swap them


TOLERANCES = {
    torch.float64: Tolerance(value=1e-10, cosine=1 - 1e-10, norm=1e-10, score=1e-9, tie=1e-10),
    torch.float32: Tolerance(value=1e-5, cosine=0.9999, norm=1e-4, score=1e-4, tie=1e-5),
    torch.bfloat16: Tolerance(value=2e-2, cosine=0.999, norm=1e-2, score=3e-2, tie=2**-7),
    torch.float16: Tolerance(value=2e-2, cosine=0.999, norm=5e-3, score=3e-2, tie=2**-10),
}


def assert_values(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert that correlations are the expected ones, NaN and Inf included, within the tolerance of `dtype`.

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
    """Assert that a gradient points where the expected one does and is as long; where that is zero, so is it.

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


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "scores") -> None:
    """Assert that scores, statistics, losses or their gradients agree, relative to the largest expected entry.

    What is zero in truth, as the gradient of a bias before a batch norm, is compared with 0.1.
    """
    assert actual.shape == expected.shape, name
    scale = max(float(expected.detach().abs().nan_to_num(0.0, 0.0).max()), 0.1) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=0.0,
        atol=TOLERANCES[dtype].score * scale,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def assert_all_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], dtype: torch.dtype
) -> None:
    """`assert_close` by name; where nothing is expected, as a gradient that does not exist, there is nothing."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name]
        assert (found is None) == (value is None), name
        if found is not None and value is not None:
            assert_close(found, value, dtype, name)


def assert_rounded(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert that scores of inputs in half precision are right as a whole: single ones may be near zero."""
    assert actual.shape == expected.shape
    error, spread = (actual.double() - expected).detach(), (expected - expected.mean()).detach()
    assert float(error.norm()) < TOLERANCES[dtype].score * float(spread.norm())


def assert_rounded_gradients(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], dtype: torch.dtype
) -> None:
    """Assert that their gradients, by name, point where the expected ones do and are as long."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        found = actual[name]
        assert (found is None) == (gradient is None), name
        if found is None or gradient is None:
            continue
        found, gradient = found.double().flatten(), gradient.double().flatten()
        assert cosine_between(found, gradient) > TOLERANCES[dtype].cosine, name
        assert abs(float(found.norm() / gradient.norm()) - 1) < TOLERANCES[dtype].score, name


def cosine_between(left: Tensor, right: Tensor) -> float:
    return (left.flatten() @ right.flatten() / (left.norm() * right.norm())).item()
