"""Every operation in plain einops and torch, in any dtype: what the tests compare with.

Nothing here is fast or frugal: `max_correlation` materialises every `[S, S]` correlation, `cosine_topk` the whole
`[P, N]` similarity. Letters: P probes (B in a batch), G gallery items, K neighbours, C channels, S = H*W locations
(s on the probe, r on the gallery), N classes, D embedding size.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

from .common.norms import unit


def normalize(maps: Tensor) -> Tensor:
    """Scale the last axis of `maps [..., C]` to unit length; a zero vector stays zero and gets a zero gradient.

    Any finite length is right, and so is the gradient, as far as the dtype can hold it.
    """
    return unit(maps)


def locations(maps: Tensor) -> Tensor:
    """Lay feature maps `[B, C, H, W]` out by location, `[B, S, C]`."""
    return rearrange(maps, "b c h w -> b (h w) c")


def max_correlation(
    probe: Tensor, gallery: Tensor, index: Tensor | None = None, normalize_gallery: bool = False
) -> Tensor:
    """Best match of every location, both ways (Liao & Shao, arXiv:1904.10424, section 3.2).

    Args:
        probe: `[P, S, C]`, prepared (normalised, weighted).
        gallery: `[G, S, C]`, prepared likewise, or raw with `normalize_gallery`.
        index: int64 `[P, K]` rows of `gallery` to compare each probe with; all of them where None. A negative
            id gives NaN.
        normalize_gallery: normalise the gallery over C first.

    Returns:
        `[P, K or G, 2S]`: the maximum over r for every s, then the maximum over s for every r.
    """
    if normalize_gallery:
        gallery = normalize(gallery)
    if index is None:
        corr = einsum(probe, gallery, "p s c, g r c -> p g r s")
    else:
        neighbors = gallery[index.clamp(min=0)]
        neighbors = torch.where(rearrange(index, "p k -> p k 1 1") < 0, torch.nan, neighbors)
        corr = einsum(probe, neighbors, "p s c, p k r c -> p k r s")
    over_r, over_s = corr.max(dim=-2).values, corr.max(dim=-1).values
    return torch.cat([over_r, over_s], dim=-1)


def cosine_topk(queries: Tensor, keys: Tensor, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k keys of largest cosine for every query, descending; equal similarities by ascending id.

    Args:
        queries: `[P, D]`.
        keys: `[N, D]`.
        k: how many.
        exclude_self: leave key i out for query i (by id, whatever the values).

    Returns:
        similarities `[P, k]` and int64 indices `[P, k]`.
    """
    similarity = normalize(queries) @ normalize(keys).mT
    if exclude_self:
        similarity = similarity.fill_diagonal_(-torch.inf)
    values, indices = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def pair_scores(
    pooled: Tensor,
    bn: torch.nn.BatchNorm1d,
    fc: torch.nn.Linear,
    logit_bn: torch.nn.BatchNorm1d,
) -> Tensor:
    """`logit_bn(fc(bn(pooled)))` for `pooled [..., 2S]`, through the modules themselves; one score per pair."""
    flat = rearrange(pooled, "... s -> (...) 1 s")
    logits = fc(bn(flat).squeeze(1))
    scores: Tensor = logit_bn(logits)
    return scores.reshape(pooled.shape[:-1])
