"""Maximum correlation on the CPU, in plain torch and bounded memory.

Forward: matrix products of a block of pairs, small enough to be reduced while it is in cache. Backward: a location's
gradient is a sum of the few locations that it was the best match of, or that were its own; these sums are taken as they
are, by `embedding_bag`, at `4S` rows a pair instead of the `2S^2` that products with the gradient of the correlation
would read. Runs on any device; CUDA tensors come here in fp64, or when `QACONV_TRITON_BACKEND=torch` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, max_pool2d

from .kernels.config import argmax_dtype
from .kernels.edges import Edges
from .kernels.norms import accumulation_dtype as accumulation_dtype
from .kernels.norms import inverse_norms, normalized, scale_and_inverse

BLOCK = 2**20  # correlations at a time
LARGER = 4  # blocks by so much where all that remains of a pair is a number
MAPS = 2**21  # numbers of the gallery maps at a time
SHARING = 512  # probe locations at a time: enough for products to be as fast as they get
NEAR = 2.0**20  # norms from 1 / NEAR to NEAR, and zero
ENTRIES = 2**17  # terms of the gradients' sums at a time


class Scratch:
    """Memory that blocks use one after the other: to be given fresh pages each time costs more than to fill them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, the same memory for the same name."""
        size = prod(shape)
        kept = self.kept.get((name, dtype))
        if kept is None or kept.shape[0] < size:
            kept = self.kept[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return kept[:size].view(shape)

    def rows(self, name: str, table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Maps `ids [n]` of a table `[G, S, C]`, in `dtype`: `[n, S, C]`, contiguous; read as they lie in memory."""
        turned = not table.is_contiguous() and table.mT.is_contiguous()
        source = table.mT if turned else table
        found = self(name, (ids.shape[0], *source.shape[1:]), table.dtype)
        torch.index_select(source, 0, ids, out=found)
        found = found.mT if turned else found
        if found.is_contiguous() and found.dtype == dtype:
            return found
        return self(name + " as wanted", (ids.shape[0], *table.shape[1:]), dtype).copy_(found)


class Block(NamedTuple):
    """Pairs of `lists * sharing` probes, from `first` on, with a `span` of neighbours; `sharing` share a list."""

    first: int
    lists: int
    sharing: int
    span: slice

    @property
    def probes(self) -> slice:
        """Of the probes in order."""
        return slice(self.first, self.first + self.lists * self.sharing)


class Pairs:
    """The pairs of a call, cut into blocks: probes in an order in which those of a group are neighbours."""

    def __init__(self, probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None) -> None:
        probes, self.locations, self.channels = probe.shape
        self.neighbors = gallery.shape[0] if index is None else index.shape[1]
        self.gallery, self.dtype = gallery, accumulation_dtype(probe.dtype)
        self.order: Tensor | None = None
        self.sizes = [1] * probes if index is not None else [probes]
        if index is not None and group is not None and probes:
            ordered, order = group.sort(stable=True)
            self.sizes = ordered.unique_consecutive(return_counts=True)[1].tolist()
            if not torch.equal(ordered, group):
                self.order = order
        self.scratch = Scratch(probe.device)
        self.probe = self.ordered(probe).to(self.dtype)
        self.index = None if index is None else self.ordered(index)

    def ordered(self, values: Tensor) -> Tensor:
        """`values [P, ..]` of the probes in the order of the blocks."""
        return values if self.order is None or not values.numel() else values[self.order]

    def restored(self, values: Tensor) -> Tensor:
        """`values [P, ..]` in the order in which the probes came."""
        if self.order is None or not values.numel():
            return values
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def blocks(self, most_pairs: int, longest: int, most_maps: int, sharing: int = SHARING) -> Iterator[Block]:
        """All pairs once, so many at a time, of spans no longer than that, and with so many maps at a time."""
        most_sharing = max(1, min(most_pairs, sharing // self.locations))
        parts = [min(most_sharing, size - done) for size in self.sizes for done in range(0, size, most_sharing)]
        first = 0
        for sharing, run in groupby(parts):
            waiting = len(list(run))
            span = max(1, min(self.neighbors, most_pairs // sharing, longest))
            most_lists = max(1, min(most_pairs // (sharing * span), most_maps // span))
            while waiting:
                lists = 1 if self.index is None else min(waiting, most_lists)
                for start in range(0, self.neighbors, span):
                    yield Block(first, lists, sharing, slice(start, min(start + span, self.neighbors)))
                first += lists * sharing
                waiting -= lists

    def ids(self, block: Block) -> Tensor | None:
        """Gallery ids of a block `[L, k]`; None where all probes meet all of the gallery."""
        return None if self.index is None else self.index[block.probes, block.span][:: block.sharing]

    def maps(self, block: Block, ids: Tensor | None) -> Tensor:
        """Gallery maps of a block `[L, k, S, C]`, in the dtype of sums."""
        if ids is None:
            return self.gallery[block.span].unsqueeze(0).to(self.dtype)
        rows = self.scratch.rows("maps", self.gallery, ids.clamp(min=0).flatten(), self.dtype)
        return rows.view(*ids.shape, self.locations, self.channels)


def _correlations(
    pairs: Pairs,
    normalize_gallery: bool,
    rnorm: Tensor | None = None,
    slots: Tensor | None = None,
    larger: int = 1,
) -> Iterator[tuple[Block, Tensor]]:
    """Every block and its correlations `[L, k, r, m, s]`, good until the next is asked for.

    Inverse norms, as of `kernels.norms`, go to rows `slots [P*K]` of `rnorm` where that is given.
    """
    locations = pairs.locations
    if slots is not None and pairs.index is not None:
        slots = pairs.ordered(slots.view_as(pairs.index))
    most_maps = max(1, MAPS // (locations * pairs.channels))
    for block in pairs.blocks(max(1, larger * BLOCK // locations**2), most_maps, most_maps, larger * SHARING):
        _, lists, sharing, _ = block
        ids = pairs.ids(block)
        maps = pairs.maps(block, ids)
        probe = pairs.probe[block.probes].reshape(lists, sharing * locations, pairs.channels)
        factor = None
        if normalize_gallery:
            norms = inverse_norms(maps)
            if (norms < 0).any():
                maps = normalized(maps, norms)
            else:
                factor = norms.view(lists, -1, 1)
            if rnorm is not None:
                rows = block.span if slots is None else slots[block.probes, block.span][::sharing].flatten()
                rnorm[rows] = norms.flatten(0, 1)
        shape = lists, maps.shape[1] * locations, sharing * locations
        corr = pairs.scratch("corr", shape, pairs.dtype)
        torch.bmm(maps.flatten(1, 2), probe.mT, out=corr)  # [L, k*r, m*s]
        if factor is not None:
            corr *= factor
        if ids is not None and ids.numel() and ids.min() < 0:
            corr.view(*ids.shape, -1)[ids < 0] = torch.nan
        yield block, corr.view(lists, -1, locations, sharing, locations)


def _max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima over the middle axis of `[N, S, X]` and the first index of each, `[N, X]`; NaN wins.

    Pooling with channels last is the one maximum with indices in torch whose CPU kernel is vectorised, across X. Of
    several NaN it finds the last.
    """
    images = values.unsqueeze(2).permute(0, 3, 1, 2)  # [N, X, S, 1]
    best, where = (found.flatten(1) for found in max_pool2d(images, (values.shape[1], 1), return_indices=True))
    is_nan = best.isnan()
    if is_nan.any():
        where = torch.where(is_nan, values.isnan().to(torch.uint8).argmax(1), where)
    return best, where


def max_correlation(
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    edges: Edges | None,
    normalize_gallery: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.max_correlation.forward`: pooled and argmax `[P, K, 2S]`, inverse norms `[T or G, S]`."""
    pairs = Pairs(probe, gallery, index, group)
    probes, locations = probe.shape[:2]
    shape = (probes, pairs.neighbors, 2 * locations)
    pooled = probe.new_empty(shape, dtype=pairs.dtype)
    argmax = probe.new_empty(shape, dtype=argmax_dtype(locations))
    slots = gallery.shape[0] if edges is None else edges.classes.shape[0]
    rnorm = pooled.new_zeros(slots + 1, locations) if normalize_gallery else None  # one more for slot -1
    norms = pooled.new_empty(0) if rnorm is None else rnorm[:-1]
    if gallery.shape[0] == 0:  # ids into nothing are negative: pairs of NaN
        return pooled.fill_(torch.nan), argmax.zero_(), norms
    places = None if edges is None else edges.slots
    for block, corr in _correlations(pairs, normalize_gallery, rnorm, places):
        lists, count, _, sharing, _ = corr.shape
        over_r = _max(corr.view(-1, locations, sharing * locations))
        turned = pairs.scratch("turned", (lists, sharing * locations, count * locations), pairs.dtype)
        over_s = _max(turned.copy_(corr.view(lists, -1, sharing * locations).mT).view(lists * sharing, locations, -1))
        for whole, of_s, of_r in zip((pooled, argmax), over_r, over_s, strict=True):
            part = whole[block.probes].view(lists, sharing, *shape[1:])[:, :, block.span]
            part[..., :locations] = of_s.view(lists, count, sharing, locations).transpose(1, 2)
            part[..., locations:] = of_r.view(lists, sharing, count, locations)
    return pairs.restored(pooled), pairs.restored(argmax), norms


def pair_sums(
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    normalize_gallery: bool,
    weight: Tensor,
) -> Tensor:
    """As `kernels.max_correlation.pair_sums`: `weight [2S]` times the pooled values of every pair, `[P, K]`."""
    pairs = Pairs(probe, gallery, index, group)
    locations = probe.shape[1]
    sums = probe.new_empty(probe.shape[0], pairs.neighbors, dtype=pairs.dtype)
    if gallery.shape[0] == 0:
        return sums.fill_(torch.nan)
    for block, corr in _correlations(pairs, normalize_gallery, larger=LARGER):
        over_r, over_s = corr.amax(2).transpose(1, 2), corr.amax(4).permute(0, 3, 1, 2)  # both [L, m, k, S]
        sums[block.probes, block.span] = (over_r @ weight[:locations] + over_s @ weight[locations:]).flatten(0, 1)
    return pairs.restored(sums)


class Saved(NamedTuple):
    """What the backward knows of every pair `[P*K, ..]`, upstream gradient, pooled, argmax; norms as returned."""

    grad: Tensor
    pooled: Tensor
    argmax: Tensor
    rnorm: Tensor
    edges: Edges | None

    def slots(self, pair: Tensor) -> Tensor:
        """Rows of `rnorm` for some pairs."""
        return pair % self.rnorm.shape[0] if self.edges is None else self.edges.slots[pair]


def max_correlation_backward(
    grad: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    rnorm: Tensor,
    edges: Edges | None,
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    rows: Tensor | None,
    needs_probe: bool,
    needs_gallery: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients, `[P, S, C]` and `[G, S, C]`; for the gallery maps `rows [T]` (rising) only where given."""
    saved = Saved(grad.flatten(0, 1), pooled.flatten(0, 1), argmax.flatten(0, 1), rnorm, edges)
    to_probe, to_gallery = probe.new_empty(0), gallery.new_empty(0)
    if needs_probe:
        to_probe = _to_probe(saved, Pairs(probe, gallery, index, group)).to(probe.dtype)
    if needs_gallery:
        to_gallery = _to_gallery(saved, probe, gallery, index, rows)
    return to_probe, to_gallery


class Terms:
    """The terms of some pairs `pair [E]` in the gradients: their 2S matches, every s with its best r, then the reverse.

    The gradient of the correlation is zero but for these. `s` and `r` are locations `[E, 2S]`, `weights` likewise.
    These are divided by the lengths of the raw maps where the terms are with such maps.
    """

    def __init__(self, saved: Saved, pair: Tensor, raw: bool) -> None:
        arg_r, arg_s = saved.argmax[pair].to(torch.int32).chunk(2, dim=1)
        here = torch.arange(arg_r.shape[1], dtype=torch.int32, device=pair.device).expand_as(arg_r)
        self.s, self.r = torch.cat([here, arg_s], dim=1), torch.cat([arg_r, here], dim=1)
        self.weights = saved.grad[pair]
        if raw:
            self.weights = self.weights * saved.rnorm[saved.slots(pair)].gather(1, self.r.long())


class Sums:
    """Sums of terms by the location that they belong to: `places` are `[E, 2S]`, below `count`. In a fixed order."""

    def __init__(self, places: Tensor, count: int) -> None:
        keys = places.flatten().to(torch.int16 if count < 2**15 else torch.int32)  # the narrower the faster
        ordered, self.order = keys.sort(stable=True)
        bounds = torch.arange(count + 1, dtype=ordered.dtype, device=ordered.device)
        self.offsets = torch.searchsorted(ordered, bounds)

    def of_rows(self, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Of the terms' rows of `table`, weighted, `[count, C]`."""
        rows, weights = rows.flatten()[self.order], weights.flatten()[self.order]
        return embedding_bag(
            rows.long(), table, self.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def of(self, values: Tensor) -> Tensor:
        """Of numbers, `[count, 1]`."""
        return embedding_bag(self.order, values.view(-1, 1), self.offsets, mode="sum", include_last_offset=True)


def _to_probe(saved: Saved, pairs: Pairs) -> Tensor:
    total = torch.zeros_like(pairs.probe)
    if pairs.gallery.shape[0] == 0:
        return total
    device, locations = total.device, pairs.locations
    everyone = torch.arange(total.shape[0], device=device) if pairs.order is None else pairs.order
    outside = bool((saved.rnorm < 0).any())  # the safe range: such maps are normalised first
    in_place = pairs.gallery.dtype == pairs.dtype and pairs.gallery.is_contiguous() and not outside
    most_pairs, most_maps = max(1, ENTRIES // (2 * locations)), max(1, MAPS // (locations * pairs.channels))
    for block in pairs.blocks(most_pairs, most_maps, most_pairs if in_place else most_maps):
        part = total[block.probes]
        k = torch.arange(block.span.start, block.span.stop, device=device)
        lists = pairs.ids(block)
        pair = everyone[block.probes].unsqueeze(1) * pairs.neighbors + k
        own = torch.arange(pair.shape[0], device=device).unsqueeze(1).expand_as(pair)
        ids = (k.unsqueeze(0) if lists is None else lists).repeat_interleave(block.sharing, dim=0)
        table, met = pairs.gallery, ids
        if not in_place:
            table = pairs.maps(block, lists).flatten(0, 1)
            if outside:
                table = normalized(table, saved.rnorm[saved.slots(pair[:: block.sharing].flatten())])
            met = torch.arange(table.shape[0], device=device).view(block.lists, -1)
            met = met.repeat_interleave(block.sharing, dim=0)
        there = ids >= 0  # or else pairs of NaN, and zero times NaN is NaN
        pair, own, met = (values[there] for values in (pair, own, met))
        terms = Terms(saved, pair, raw=saved.rnorm.numel() > 0 and not outside)
        places, rows = ((of * locations).unsqueeze(1) + on for of, on in ((own, terms.s), (met, terms.r)))
        sums = Sums(places, part.shape[0] * locations)
        part += sums.of_rows(table.flatten(0, 1), rows, terms.weights).view_as(part)
    return pairs.restored(total)


def _to_gallery(saved: Saved, probe: Tensor, gallery: Tensor, index: Tensor | None, rows: Tensor | None) -> Tensor:
    probes, locations, channels = probe.shape
    device, neighbors = probe.device, gallery.shape[0] if index is None else index.shape[1]
    if index is None:
        slots = torch.arange(neighbors, device=device)
        offsets = torch.arange(neighbors + 1, device=device) * probes
    else:
        assert saved.edges is not None
        slots, offsets, edges, _ = saved.edges
        slots = slots[: int((slots >= 0).sum())]
    shape = gallery.shape[0] if rows is None else slots.shape[0], locations, channels
    out = gallery.new_empty(shape) if slots.shape[0] == shape[0] else gallery.new_zeros(shape)
    table, scratch = probe.to(saved.grad.dtype).flatten(0, 1), Scratch(device)
    # Lengths near 1 may be squared, which saves a pass over the gradient.
    rnorm = saved.rnorm
    is_near = rnorm.numel() > 0 and bool(((rnorm == 0) | ((rnorm > 1 / NEAR) & (rnorm < NEAR))).all())
    most_maps = max(1, MAPS // (locations * channels))
    most = max(1, min(most_maps, ENTRIES * slots.shape[0] // max(1, 2 * locations * int(offsets[-1]))))
    for first in range(0, slots.shape[0], most):
        ids = slots[first : first + most]
        bounds = offsets[first : first + ids.shape[0] + 1]
        own = torch.arange(ids.shape[0], device=device).repeat_interleave(bounds.diff())
        if index is None:
            met = torch.arange(probes, device=device).repeat(ids.shape[0])
            pair = met * neighbors + first + own
        else:
            pair = edges[bounds[0] : bounds[-1]]
            met = pair // neighbors
        terms = Terms(saved, pair, raw=is_near)
        places, rows_met = ((of * locations).unsqueeze(1) + on for of, on in ((own, terms.r), (met, terms.s)))
        sums = Sums(places, ids.shape[0] * locations)
        part = sums.of_rows(table, rows_met, terms.weights)
        if rnorm.numel():
            norms = rnorm[first : first + ids.shape[0]].view(-1)
            along = sums.of(saved.grad[pair] * saved.pooled[pair])  # the part that normalising removes
            maps = scratch.rows("maps", gallery, ids, part.dtype).flatten(0, 1)
            if is_near:
                part.addcmul_(maps, along * norms.square().unsqueeze(1), value=-1.0)
            else:
                scale, factor = scale_and_inverse(norms.unsqueeze(1))
                part.addcmul_(normalized(maps, norms), along, value=-1.0).mul_(factor).mul_(scale)
        where = slice(first, first + most) if shape[0] == slots.shape[0] else ids
        out[where] = part.view(-1, locations, channels).to(out.dtype)
    return out
