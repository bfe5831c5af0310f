"""What one would write without this library: the baselines of `bench.scores`, in plain PyTorch.

Each takes the parameters of a `QAConv`, so that inputs, results and gradients can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qaconv_triton import QAConv

SIDE = 64  # probes and gallery maps that `match` scores at a time


def _maxima(corr: Tensor) -> Tensor:
    """`[.., r, s]` to `[.., 2S]`."""
    return torch.cat([corr.max(dim=-2).values, corr.max(dim=-1).values], dim=-1)


def _score(matcher: QAConv, pooled: Tensor) -> Tensor:
    """`logit_bn(fc(bn(pooled)))` by the modules themselves, in their dtype."""
    pooled = pooled.to(matcher.fc.weight.dtype)
    normed = matcher.bn(pooled.reshape(-1, 1)).view(-1, pooled.shape[-1])
    scores: Tensor = matcher.logit_bn(matcher.fc(normed))
    return scores.view(pooled.shape[:-1])


def per_label(matcher: QAConv, features: Tensor, labels: Tensor | None) -> Tensor:
    """The class path as users wrote it: normalise the whole table, then correlate label by label.

    Unlike theirs, batch norm takes its statistics over the whole batch.

    Returns:
        Dense scores `[B, N]`, zero but for the neighbours of each label.
    """
    assert labels is not None
    assert matcher.class_embed is not None
    assert matcher.class_neighbors is not None
    table, probe = normalize(matcher.class_embed, dim=1).flatten(2), normalize(features, dim=1).flatten(2)
    rows, pooled = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        maps = table[matcher.class_neighbors[label]]
        rows.append(members)
        pooled.append(_maxima(torch.einsum("pcs,gcr->pgrs", probe[members], maps)))
    values = _score(matcher, torch.cat(pooled))
    order = torch.cat(rows)
    scores = values.new_zeros(len(labels), len(table))
    scores[order.unsqueeze(1), matcher.class_neighbors[labels[order]]] = values
    return scores


def vectorised(matcher: QAConv, features: Tensor, labels: Tensor | None, instances: int, wide: bool = False) -> Tensor:
    """The class path without a loop, tuned: raw maps are gathered once for the `instances` of a label that stand side
    by side, and scaled after one batched product.

    `amax` is faster than `max`; it splits a gradient between equal maxima. `wide` scales correlations in fp32, which is
    required under torch.compile: fusion skips the bf16 rounding before the backward's comparison with the maxima.
    """
    assert labels is not None
    assert matcher.class_embed is not None
    assert matcher.class_neighbors is not None
    batch, channels = features.shape[:2]
    ids = matcher.class_neighbors[labels[::instances]]  # [L, K]
    probe = normalize(features, dim=1).flatten(2).mT.reshape(len(ids), -1, channels)  # [L, m*S, C]
    maps = matcher.class_embed.permute(0, 2, 3, 1).flatten(1, 2)[ids]  # [L, K, S, C], contiguous
    locations = maps.shape[2]
    corr = torch.bmm(maps.view(len(ids), -1, channels), probe.mT).view(*maps.shape[:3], instances, locations)
    if wide and corr.dtype.itemsize == 2:
        corr = corr.float()
    corr = corr / torch.linalg.vector_norm(maps, dim=-1).clamp_min(1e-12)[..., None, None]  # [L, K, r, m, s]
    pooled = torch.cat([corr.amax(2).transpose(1, 2), corr.amax(4).permute(0, 3, 1, 2)], dim=-1)
    values = _score(matcher, pooled.reshape(batch, ids.shape[1], -1))
    return values.new_zeros(batch, len(matcher.class_embed)).scatter(1, ids.repeat_interleave(instances, 0), values)


def all_pairs(matcher: QAConv, probe: Tensor, gallery: Tensor) -> Tensor:
    """All pairs as published: every correlation at once, `[P, G, S, S]`."""
    probe, gallery = (normalize(maps, dim=1).flatten(2) for maps in (probe, gallery))
    return _score(matcher, _maxima(torch.einsum("pcs,gcr->pgrs", probe, gallery)))


def all_pairs_tuned(matcher: QAConv, probe: Tensor, gallery: Tensor) -> Tensor:
    """All pairs by one matrix product of the locations, maxima by `amax`."""
    left, right = (normalize(maps, dim=1).permute(0, 2, 3, 1).reshape(-1, maps.shape[1]) for maps in (probe, gallery))
    locations = matcher.height * matcher.width
    corr = (left @ right.mT).view(len(probe), locations, len(gallery), locations)  # [P, s, G, r]
    pooled = torch.cat([corr.amax(3).transpose(1, 2), corr.amax(1)], dim=-1)
    return _score(matcher, pooled)


@torch.no_grad()
def match(score: Callable[[QAConv, Tensor, Tensor], Tensor], matcher: QAConv, probe: Tensor, gallery: Tensor) -> Tensor:
    """All pairs in eval mode, a block at a time, as published evaluation code does."""
    assert not matcher.training
    blocks = [[score(matcher, part, maps) for maps in gallery.split(SIDE)] for part in probe.split(SIDE)]
    return torch.cat([torch.cat(row, dim=1) for row in blocks])
