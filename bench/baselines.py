"""What one would write without this library: the baselines of `bench.scores`, in plain PyTorch.

Each takes a problem with the parameters of its `QAConv`, so that results and gradients can be compared one by one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qaconv_triton import QAConv

from .problems import Problem

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


def per_label(problem: Problem) -> Tensor:
    """The class path as users wrote it: normalise the whole table, then correlate label by label.

    Unlike theirs, batch norm takes its statistics over the whole batch.

    Returns:
        Dense scores `[B, N]`, zero but for the neighbours of each label.
    """
    labels, neighbors = problem.labels, problem.matcher.class_neighbors
    table, probe = (normalize(maps, dim=1).flatten(2) for maps in (problem.gallery, problem.probe))
    rows, pooled = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        maps = table[neighbors[label]]
        rows.append(members)
        pooled.append(_maxima(torch.einsum("pcs,gcr->pgrs", probe[members], maps)))
    values = _score(problem.matcher, torch.cat(pooled))
    order = torch.cat(rows)
    scores = values.new_zeros(len(labels), len(table))
    scores[order.unsqueeze(1), neighbors[labels[order]]] = values
    return scores


def vectorised(problem: Problem) -> Tensor:
    """The class path without a loop, tuned: raw maps are gathered once for the instances of a label that stand side
    by side, and scaled after one batched product.

    `amax` is faster than `max`; it splits a gradient between equal maxima. Under torch.compile correlations are scaled
    in fp32: fusion skips the bf16 rounding before the backward's comparison with the maxima.
    """
    instances, (batch, channels) = problem.instances, problem.probe.shape[:2]
    ids = problem.matcher.class_neighbors[problem.labels[::instances]]  # [L, K]
    probe = normalize(problem.probe, dim=1).flatten(2).mT.reshape(len(ids), -1, channels)  # [L, m*S, C]
    maps = problem.gallery.permute(0, 2, 3, 1).flatten(1, 2)[ids]  # [L, K, S, C], contiguous
    locations = maps.shape[2]
    corr = torch.bmm(maps.view(len(ids), -1, channels), probe.mT).view(*maps.shape[:3], instances, locations)
    if torch.compiler.is_compiling() and corr.dtype.itemsize == 2:
        corr = corr.float()
    corr = corr / torch.linalg.vector_norm(maps, dim=-1).clamp_min(1e-12)[..., None, None]  # [L, K, r, m, s]
    pooled = torch.cat([corr.amax(2).transpose(1, 2), corr.amax(4).permute(0, 3, 1, 2)], dim=-1)
    values = _score(problem.matcher, pooled.reshape(batch, ids.shape[1], -1))
    return values.new_zeros(batch, len(problem.gallery)).scatter(1, ids.repeat_interleave(instances, 0), values)


def all_pairs(problem: Problem) -> Tensor:
    """All pairs as published: every correlation at once, `[P, G, S, S]`."""
    probe, gallery = (normalize(maps, dim=1).flatten(2) for maps in (problem.probe, problem.gallery))
    return _score(problem.matcher, _maxima(torch.einsum("pcs,gcr->pgrs", probe, gallery)))


def all_pairs_tuned(problem: Problem) -> Tensor:
    """All pairs by one matrix product of the locations, maxima by `amax`."""
    (count, channels, height, width), total = problem.probe.shape, len(problem.gallery)
    left, right = (
        normalize(maps, dim=1).permute(0, 2, 3, 1).reshape(-1, channels) for maps in (problem.probe, problem.gallery)
    )
    corr = (left @ right.mT).view(count, height * width, total, height * width)  # [P, s, G, r]
    pooled = torch.cat([corr.amax(3).transpose(1, 2), corr.amax(1)], dim=-1)
    return _score(problem.matcher, pooled)


@torch.no_grad()
def match(score: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    """All pairs in eval mode, a block at a time, as published evaluation code does."""
    assert not problem.matcher.training
    probes, galleries = problem.probe.split(SIDE), problem.gallery.split(SIDE)
    blocks = [[score(problem._replace(probe=part, gallery=maps)) for maps in galleries] for part in probes]
    return torch.cat([torch.cat(row, dim=1) for row in blocks])
