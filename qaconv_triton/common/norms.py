"""Euclidean norms of vectors, of any finite value: powers of two keep their squares within the range of the dtype.

Sums of squares of fp32 vectors overflow from a norm of 2e19 on and vanish below 1e-22. Scaling by a power of two is
exact, so the norm, the unit vector and its gradient are those of the vector as it came.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import accumulation_dtype


class Range(NamedTuple):
    """What a dtype holds. `safe`: norms from 1 / safe to safe can be squared, and multiplied with each other.

    `shift`: brings the inverse of any other norm into the range of the dtype. `exponent`: of its largest power of two
    whose inverse is a normal number.
    """

    safe: float
    shift: float
    exponent: int


RANGES = {torch.float32: Range(2.0**50, 2.0**48, 126), torch.float64: Range(2.0**400, 2.0**360, 1022)}

COPIED_VALUES = 2**22  # at a time


def power_of_two(vectors: Tensor) -> Tensor:
    """A power of two for each of `vectors [..., C]`, `[..., 1]`, that brings its largest value near 1."""
    vectors = vectors.detach()
    largest = torch.maximum(vectors.amax(-1, keepdim=True), -vectors.amin(-1, keepdim=True))
    largest = largest.to(accumulation_dtype(vectors.dtype))
    bound = RANGES[largest.dtype].exponent
    return torch.exp2(-torch.frexp(largest).exponent.clamp(-bound, bound).to(largest.dtype))


def inverse_norm(scaled: Tensor) -> Tensor:
    """`1 / |v|`, `[..., 1]`, of vectors `[..., C]` whose largest values are near 1; zero for zero, NaN for NaN."""
    squares = scaled.square().sum(-1, keepdim=True)
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).rsqrt())


def unit(vectors: Tensor) -> Tensor:
    """Scale `vectors [..., C]` to unit length; a zero vector stays zero and gets a zero gradient."""
    scaled = vectors * power_of_two(vectors)
    found: Tensor = scaled * inverse_norm(scaled)
    return found


def inverse_norms(vectors: Tensor) -> Tensor:
    """`1 / |v|` of `vectors [..., C]`, `[...]`, in the dtype of sums; zero for a zero vector. Reads a value back.

    An inverse outside the safe range is stored negative, nearer to 1 by the factor `shift`: see `scale_and_inverse`.
    """
    return _inverse_norms(vectors)[0]


def _inverse_norms(vectors: Tensor) -> tuple[Tensor, bool]:
    """`inverse_norms`, and whether some norms are outside the safe range, those of zero vectors among them."""
    dtype = accumulation_dtype(vectors.dtype)
    safe, shift, _ = RANGES[dtype]
    is_copied = vectors.is_cpu and vectors.dtype != dtype  # by torch, before it sums
    rows = max(1, COPIED_VALUES // max(1, vectors.shape[1:].numel())) if is_copied else max(1, len(vectors))
    parts = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype) for part in vectors.split(rows)]
    norm = parts[0] if len(parts) == 1 else torch.cat(parts)
    inverse: Tensor = norm.reciprocal()
    outside = (norm < 1 / safe) | (norm > safe)
    is_any_outside = bool(outside.any())
    if is_any_outside:
        unsafe = vectors[outside].to(dtype)
        scale = power_of_two(unsafe)
        scaled = torch.linalg.vector_norm(unsafe * scale, dim=-1)
        toward_one = torch.where(norm[outside] < 1, scaled.new_tensor(1 / shift), shift)
        inverse[outside] = torch.where(scaled == 0, 0.0, -scale.squeeze(-1) * toward_one / scaled)
    return inverse, is_any_outside


def scale_and_inverse(inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors whose product is `1 / |v|`, from what `inverse_norms` returns: a power of two and a positive number.

    Neither of them overflows, nor does a vector times the first.
    """
    shift = RANGES[inverse.dtype].shift
    scale = torch.where(inverse < -1, inverse.new_tensor(shift), 1 / shift)
    return torch.where(inverse < 0, scale, 1.0), inverse.abs()


def normalized(vectors: Tensor, inverse: Tensor) -> Tensor:
    """Unit vectors `[..., C]` in the dtype of `inverse [...]`, which `inverse_norms` returns."""
    scale, factor = scale_and_inverse(inverse)
    return vectors.to(inverse.dtype) * scale.unsqueeze(-1) * factor.unsqueeze(-1)


def with_norms(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`vectors [..., C]` and `1 / |v|` `[...]` in the dtype of sums; those outside the safe range are scaled.

    Two of the vectors returned, and two of their inverse norms, can be multiplied with each other. Reads a value back.
    """
    dtype = accumulation_dtype(vectors.dtype)
    inverse, is_any_outside = _inverse_norms(vectors)
    if is_any_outside and (outside := inverse < 0).any():
        unsafe = vectors[outside]
        vectors = vectors.clone()
        vectors[outside] = (unsafe.to(dtype) * power_of_two(unsafe)).to(vectors.dtype)
        inverse[outside] = inverse_norms(vectors[outside])
    return vectors, inverse
