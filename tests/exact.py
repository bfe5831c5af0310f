"""Vectors whose cosines are exact in fp32, bf16 and fp16, in any order of summing: ties among them are promised."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_vectors(count: int, dim: int) -> Tensor:
    """Vectors `[count, dim]` of -1, 0 and 1, times powers of two; their norms are powers of two.

    As many entries as the largest power of four that fits are not zero. Products are then small integers times a power
    of two, and so are cosines: multiples of one over that power of four.
    """
    filled = 4 ** ((dim.bit_length() - 1) // 2)
    support = torch.rand(count, dim).argsort(dim=1)[:, :filled]
    signs = torch.randint(2, (count, filled)).mul(2).sub(1).float()
    lengths = 2.0 ** torch.randint(-2, 3, (count, 1))
    return torch.zeros(count, dim).scatter(1, support, signs) * lengths


def exact_cosines(left: Tensor, right: Tensor) -> Tensor:
    """The cosines of such vectors, `[P, N]` in fp64, exact."""
    left, right = left.double(), right.double()
    return (left @ right.mT) / (left.norm(dim=1)[:, None] * right.norm(dim=1)[None])


def by_falling_similarity(similarity: Tensor, k: int, exclude_self: bool = False) -> Tensor:
    """The first k ids of each row `[P, N]`, equal similarities by rising id."""
    if exclude_self:
        similarity = similarity.clone().fill_diagonal_(-torch.inf)
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
