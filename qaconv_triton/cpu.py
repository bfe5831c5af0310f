"""Maximum correlation on the CPU: blocked matrix products in plain torch, in bounded memory, as the kernels do it.

A block is at most `BLOCK` correlations: small enough to be reduced while it is in cache. Half
precision is multiplied in fp32, so that only inputs are rounded, never the sums. Runs on any device; CUDA tensors come
here in fp64, or when `QACONV_TRITON_BACKEND=torch` asks for it; there `index_add_` sums in no fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels.config import argmax_dtype

BLOCK = 2**20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(probe: Tensor, neighbors: int, has_index: bool, group: Tensor | None) -> Iterator[tuple[Tensor, slice]]:
    """Cut the pairs into blocks: `members [L, m]` probes, m sharing each of L neighbour lists, and a range of K."""
    probes, locations, channels = probe.shape
    if probes == 0 or neighbors == 0:
        return
    most_pairs = max(1, BLOCK // locations**2)
    most_maps = max(1, 4 * BLOCK // (locations * channels))
    everyone = torch.arange(probes, device=probe.device)
    if has_index and group is None:
        span = min(neighbors, most_pairs, most_maps)
        shared = everyone.unsqueeze(1).split(max(1, min(most_pairs, most_maps) // span))
    else:
        sharing = (everyone,)
        if has_index and group is not None:
            sizes = group.sort().values.unique_consecutive(return_counts=True)[1]
            sharing = group.argsort(stable=True).split(sizes.tolist())
        most = max(1, min(most_pairs, 512 // locations))
        shared = tuple(part.unsqueeze(0) for members in sharing for part in members.split(most))
    for members in shared:
        span = max(1, min(most_pairs // members.numel(), most_maps))
        for first in range(0, neighbors, span):
            yield members, slice(first, min(first + span, neighbors))


def _gathered(gallery: Tensor, ids: Tensor | None, span: slice) -> Tensor:
    """The gallery maps of a block as they are, `[L, k, S, C]`."""
    return gallery[span].unsqueeze(0) if ids is None else gallery[ids.clamp(min=0)]


def _ids(index: Tensor | None, members: Tensor, span: slice) -> Tensor | None:
    return None if index is None else index[members[:, 0], span]


def inverse_norm(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 / |v|` over the last axis in `dtype`; zero for a zero vector."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype)
    return torch.where(norm == 0, 0.0, norm.reciprocal())


def max_correlation(
    probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, normalize_gallery: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.max_correlation.forward`: pooled and argmax `[P, K, 2S]`, inverse norms `[P, K, S]`."""
    probes, locations, _ = probe.shape
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    dtype = accumulation_dtype(probe.dtype)
    pooled = probe.new_empty(probes, neighbors, 2 * locations, dtype=dtype)
    argmax = probe.new_empty(probes, neighbors, 2 * locations, dtype=argmax_dtype(locations))
    rnorm = probe.new_empty((probes, neighbors, locations) if normalize_gallery else 0, dtype=dtype)
    if gallery.shape[0] == 0:  # ids into nothing are negative: pairs of NaN
        return pooled.fill_(torch.nan), argmax.zero_(), rnorm.fill_(torch.nan)
    for members, span in _blocks(probe, neighbors, index is not None, group):
        ids = _ids(index, members, span)
        maps = _gathered(gallery, ids, span)
        lists, count = maps.shape[:2]
        corr = maps.to(dtype).flatten(1, 2) @ probe[members].to(dtype).flatten(1, 2).mT
        corr = corr.view(lists, count, locations, members.shape[1], locations)  # [L, k, r, m, s]
        if normalize_gallery:
            norms = inverse_norm(maps, dtype)
            corr *= norms[..., None, None]
            rnorm[members, span] = norms.unsqueeze(1)
        if ids is not None:
            corr.masked_fill_((ids < 0)[:, :, None, None, None], torch.nan)
        over_r, arg_r = corr.max(dim=2)  # [L, k, m, s]
        over_s, arg_s = corr.max(dim=4)  # [L, k, r, m]
        best = torch.cat([over_r.transpose(1, 2), over_s.permute(0, 3, 1, 2)], dim=-1)
        where = torch.cat([arg_r.transpose(1, 2), arg_s.permute(0, 3, 1, 2)], dim=-1)
        pooled[members, span] = best
        argmax[members, span] = where.to(argmax.dtype)
    return pooled, argmax, rnorm


def max_correlation_backward(
    grad: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    rnorm: Tensor,
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    rows: Tensor | None,
    needs_probe: bool,
    needs_gallery: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients, `[P, S, C]` and `[G, S, C]`; for the gallery maps `rows [T]` (rising) only where given."""
    locations, channels = probe.shape[1:]
    dtype = accumulation_dtype(probe.dtype)
    count = gallery.shape[0] if rows is None else rows.shape[0]
    to_probe = probe.new_zeros(probe.shape if needs_probe else 0, dtype=dtype)
    to_gallery = gallery.new_zeros((count, locations, channels) if needs_gallery else 0, dtype=dtype)
    for members, span in _blocks(probe, grad.shape[1], index is not None, group):
        lists, sharing = members.shape
        ids = _ids(index, members, span)
        maps = _gathered(gallery, ids, span).to(dtype)
        upstream = grad[members, span].transpose(1, 2)  # [L, k, m, 2S]
        best = pooled[members, span].transpose(1, 2)
        norms = rnorm[members[:, 0], span] if rnorm.numel() else None
        left_out = None if ids is None else ids < 0
        if left_out is not None and bool(left_out.any()):  # those pairs are NaN, and zero times NaN is NaN
            maps = maps.masked_fill(left_out[:, :, None, None], 0.0)
            upstream, best = (values.masked_fill(left_out[:, :, None, None], 0.0) for values in (upstream, best))
            norms = None if norms is None else norms.masked_fill(left_out.unsqueeze(2), 0.0)
        else:
            left_out = None
        where = argmax[members, span].transpose(1, 2).long()
        grad_s, grad_r = upstream[..., :locations], upstream[..., locations:].transpose(2, 3)  # [.., m, s], [.., r, m]
        arg_s, arg_r = where[..., :locations], where[..., locations:].transpose(2, 3)
        weight = grad.new_zeros(lists, maps.shape[1], locations, sharing, locations)  # [L, k, r, m, s]
        weight.scatter_(2, arg_s.unsqueeze(2), grad_s.unsqueeze(2))
        weight.scatter_add_(4, arg_r.unsqueeze(4), grad_r.unsqueeze(4))
        if norms is not None:
            weight *= norms[..., None, None]
        weight = weight.flatten(3, 4).flatten(1, 2)  # [L, k*r, m*s]
        if needs_probe:
            part = weight.mT @ maps.flatten(1, 2)
            to_probe.index_add_(0, members.flatten(), part.view(-1, locations, channels))
        if needs_gallery:
            part = (weight @ probe[members].to(dtype).flatten(1, 2)).view(maps.shape)
            if left_out is not None:
                part = part.masked_fill(left_out[:, :, None, None], 0.0)
            if norms is not None:
                pull = upstream * best
                along = pull[..., locations:].sum(2)  # [L, k, r]
                along = along.scatter_add(2, arg_s.flatten(2), pull[..., :locations].flatten(2))
                part.addcmul_(maps, (along * norms.square()).unsqueeze(-1), value=-1.0)
            _accumulate(to_gallery, part, ids, rows, span)
    return to_probe.to(probe.dtype), to_gallery.to(gallery.dtype)


def _accumulate(total: Tensor, part: Tensor, ids: Tensor | None, rows: Tensor | None, span: slice) -> None:
    """Add the gradients `part [L, k, S, C]` of a block's gallery maps to their rows of `total`."""
    if ids is None:
        total[span] += part.squeeze(0)
        return
    where = ids.flatten().clamp(min=0)  # what is left out carries a zero gradient
    if rows is not None:
        where = torch.searchsorted(rows, where).clamp(max=max(rows.shape[0] - 1, 0))
    total.index_add_(0, where, part.flatten(0, 1))
