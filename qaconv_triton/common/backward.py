"""The inputs of the backward of max correlation, one tuple for both backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .inverted_index import InvertedIndex


class BackwardInputs(NamedTuple):
    """The upstream gradient and what the forward saved.

    grad: `[P, K, 2S]` in the dtype of sums, as pooled.
    pooled, argmax: `[P, K, 2S]`.
    rnorm: inverse norms `[T, S]`, or `[G, S]` without ids; empty for prepared gallery maps.
    inverted: of `ids`; None without them.
    probe: `[P, S, C]`, contiguous.
    gallery: `[G, S, C]`, any strides.
    ids: int64 `[P, K]` of gallery maps; None for all of them.
    group: int64 `[P]` or None.
    """

    grad: Tensor
    pooled: Tensor
    argmax: Tensor
    rnorm: Tensor
    inverted: InvertedIndex | None
    probe: Tensor
    gallery: Tensor
    ids: Tensor | None
    group: Tensor | None
