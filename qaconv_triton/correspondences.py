"""Which location matches which: what to draw to see why two maps match (arXiv:1904.10424, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .scores import PAIRS, prepared_pairs


class Correspondences(NamedTuple):
    """Best matches between the maps of pairs, both ways, `[B, H, W]` each; locations are counted row by row, h*W + w.

    NaN is more similar than any number: a location of NaN is the best match of all.

    Attributes:
        b_location: int64, for each location of a the location of b that is most similar.
        similarity_a: its cosine similarity, times both visibilities; fp32 (fp64 for fp64).
        a_location: int64, for each location of b the location of a that is most similar.
        similarity_b: likewise.

    Examples:
        >>> similar = torch.ones(1, 1, 1)
        >>> found = Correspondences(torch.tensor([[[5]]]), similar, torch.tensor([[[0]]]), similar)
        >>> divmod(found.b_location.item(), 3)  # row and column, on a map of width 3
        (1, 2)
    """

    b_location: Tensor
    similarity_a: Tensor
    a_location: Tensor
    similarity_b: Tensor


def find_correspondences(a: Tensor, b: Tensor, a_occ: Tensor | None, b_occ: Tensor | None) -> Correspondences:
    """As `QAConv.correspondences`, of maps `[B, C, H, W]` that have been checked."""
    values, places = [], []
    for probe, gallery, index in prepared_pairs(a, b, a_occ, b_occ, PAIRS):
        pooled, argmax, *_ = ops.max_correlation(probe, gallery, index, None, False, False)
        values.append(pooled)
        places.append(argmax)
    shape = (-1, *a.shape[2:])
    (on_a, on_b), (b_location, a_location) = (
        [part.reshape(shape) for part in torch.cat(parts).chunk(2, dim=-1)] for parts in (values, places)
    )
    return Correspondences(b_location.long(), on_a, a_location.long(), on_b)
