"""The local matches behind the score of one pair: what to draw, or to read, to see why two maps match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common.dtypes import accumulation_dtype
from .head import folded
from .matcher import QAConv
from .validation import check_count, check_maps, check_visibility


class Matches(NamedTuple):
    """Matches of one pair of maps, by falling contribution to its score, NaN last; locations count row by row, h*W + w.

    Attributes:
        probe_location: int64 `[M]`.
        gallery_location: int64 `[M]`.
        contribution: `[M]`, what the match adds to the score, fp32 (fp64 for fp64).
        similarity: `[M]`, cosine similarity, times both visibilities.
        of_probe: bool `[M]`, the gallery location is the best match of the probe location.
        of_gallery: bool `[M]`, the probe location is the best match of the gallery location.
    """

    probe_location: Tensor
    gallery_location: Tensor
    contribution: Tensor
    similarity: Tensor
    of_probe: Tensor
    of_gallery: Tensor


@torch.no_grad()
def strongest_matches(
    matcher: QAConv,
    probe: Tensor,
    gallery: Tensor,
    count: int | None = None,
    *,
    probe_occ: Tensor | None = None,
    gallery_occ: Tensor | None = None,
    where: Tensor | None = None,
) -> Matches:
    """Find the matches of two maps that contribute most to their score in eval mode.

    In eval mode a score is a weighted sum of the similarities of all best matches, both ways, and a constant (Liao &
    Shao, arXiv:1904.10424, section 3.3). A match's contribution is its share of that sum, of both ways where the two
    locations are each other's best match. Without `count` the contributions add up to `matcher.match_pairs` less the
    constant, which is the same for all pairs.

    Args:
        matcher: the `QAConv`.
        probe: `[C, H, W]`.
        gallery: `[C, H, W]`.
        count: the most matches to return; all where None.
        probe_occ: visibility of the probe's locations `[1, H, W]`.
        gallery_occ: visibility of the gallery map's locations `[1, H, W]`.
        where: bool `[H, W]`, the probe locations whose matches are returned; all where None. Scores stay as they are.

    Returns:
        `Matches`, the tensors on the matcher's device.

    Raises:
        TypeError, ValueError: as for `QAConv.correspondences`; a map that is not `[C, H, W]`; `where` not bool
            `[H, W]`; `count` below 1; a matcher whose norms have no running statistics.

    Examples:
        >>> matcher, probe = QAConv(8, 2, 2), torch.randn(8, 2, 2)
        >>> matches = strongest_matches(matcher, probe, probe.flip(2))  # a mirror image: left is right
        >>> sorted(zip(matches.probe_location.tolist(), matches.gallery_location.tolist()))
        [(0, 1), (1, 0), (2, 3), (3, 2)]
    """
    if not isinstance(matcher, QAConv):
        raise TypeError(f"matcher: expected a QAConv, got {type(matcher).__name__}")
    if not matcher._head.is_frozen(evaluate=True):
        raise ValueError("matcher: expected batch norms with running statistics: else a score is no sum of matches")
    if count is not None:
        count = check_count(count, "count", low=1, high=None, why="matches of a pair")
    sizes = matcher._map_sizes
    for name, value, visible in (("probe", probe, probe_occ), ("gallery", gallery, gallery_occ)):
        if isinstance(value, Tensor) and value.dim() != 3:
            raise ValueError(f"{name}: expected one feature map [C, H, W], got shape {list(value.shape)}")
        check_maps(value[None] if isinstance(value, Tensor) else value, name, **sizes)
        if visible is not None:
            visible = visible[None] if isinstance(visible, Tensor) else visible
            check_visibility(visible, f"{name}_occ", value[None])
    if where is not None:
        expected = f"where: expected a bool tensor {list(probe.shape[1:])} for the map {list(probe.shape)}, got"
        if not isinstance(where, Tensor):
            raise TypeError(f"{expected} {type(where).__name__}")
        if where.dtype != torch.bool or where.shape != probe.shape[1:]:
            raise ValueError(f"{expected} {where.dtype} of shape {list(where.shape)}")
    occ = (None if each is None else each[None] for each in (probe_occ, gallery_occ))
    b_location, similarity_a, a_location, similarity_b = (
        part.flatten() for part in matcher.correspondences(probe[None], gallery[None], *occ)
    )
    size = matcher.height * matcher.width
    own = torch.arange(size, device=probe.device)
    pairs, place = torch.cat([own * size + b_location, a_location * size + own]).unique(return_inverse=True)
    pooled = torch.cat([similarity_a, similarity_b])
    weight, _ = folded(matcher._head, 2 * size, accumulation_dtype(pooled.dtype))
    contribution = weight.new_zeros(len(pairs)).index_add_(0, place, weight * pooled)
    similarity = torch.empty_like(contribution).scatter_(0, place, pooled)
    of_probe, of_gallery = (torch.zeros(len(pairs), dtype=torch.bool, device=probe.device) for _ in range(2))
    of_probe[place[:size]], of_gallery[place[size:]] = True, True
    order = torch.where(contribution.isnan(), -torch.inf, contribution).argsort(descending=True, stable=True)
    if where is not None:
        order = order[where.to(order.device).flatten()[pairs[order] // size]]
    order = order[:count]
    parts = pairs // size, pairs % size, contribution, similarity, of_probe, of_gallery
    return Matches(*(part[order] for part in parts))


def score_decimals(scores: Sequence[float]) -> int:
    """How many decimals tell scores apart: three digits of the difference between the largest and the smallest.

    NaN and infinite scores do not count; at least 2 and at most 6, about as many as fp32 has.

    Examples:
        >>> score_decimals([0.7031, 0.7028, 0.6992]), score_decimals([12.5, -3.0])
        (5, 2)
    """
    finite = [score for score in scores if math.isfinite(score)]
    spread = max(finite, default=0.0) - min(finite, default=0.0)
    return 2 if spread <= 0 else min(6, max(2, 2 - math.floor(math.log10(spread))))
