"""Maximum correlation on the CPU, in plain torch and bounded memory.

Forward: matrix products of a batch of pairs, small enough to be reduced while it is in cache. Backward: each location's
gradient is a weighted sum of its best match and of the locations it is the best match for: `4S` rows per pair, which
`embedding_bag` sums directly, where products with the gradient of the correlation would read `2S^2`. Runs on any
device; CUDA tensors come here in fp64, or when `QACONV_TRITON_BACKEND=torch` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, max_pool2d

from ..common.backward import BackwardInputs
from ..common.dtypes import accumulation_dtype, argmax_dtype
from ..common.inverted_index import InvertedIndex
from ..common.norms import inverse_norms, normalized, scale_and_inverse

MAX_CORRELATIONS = 2**20  # at a time
SCORE_ONLY_FACTOR = 4  # enlargement of a batch of pairs when only one score per pair is kept
MAX_MAP_ELEMENTS = 2**21  # of the gallery maps at a time
MAX_PROBE_LOCATIONS = 512  # at a time: enough for products to be as fast as they get
NEAR = 2.0**20  # norms from 1 / NEAR to NEAR, and zero
MAX_TERMS = 2**17  # of the gradients' sums at a time


class BufferPool:
    """Memory that batches reuse: to be given fresh pages each time costs more than to fill them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, the same memory for the same name."""
        size = prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.shape[0] < size:
            buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def rows(self, name: str, table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Maps `ids [n]` of a table `[G, S, C]`, in `dtype`: `[n, S, C]`, contiguous; read in the order of memory."""
        is_channels_first = not table.is_contiguous() and table.mT.is_contiguous()
        source = table.mT if is_channels_first else table
        found = self(name, (ids.shape[0], *source.shape[1:]), table.dtype)
        torch.index_select(source, 0, ids, out=found)
        found = found.mT if is_channels_first else found
        if found.is_contiguous() and found.dtype == dtype:
            return found
        return self(name + " converted", (ids.shape[0], *table.shape[1:]), dtype).copy_(found)


class PairBatch(NamedTuple):
    """Pairs of `lists * sharing` probes, from `first` on, with a `span` of neighbours; `sharing` of them share ids."""

    first: int
    lists: int
    sharing: int
    span: slice

    @property
    def probes(self) -> slice:
        """Positions in the sorted probes."""
        return slice(self.first, self.first + self.lists * self.sharing)


class PairBatches:
    """The pairs of a call in batches: probes are sorted by group, so that those with the same ids are side by side."""

    def __init__(self, probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None) -> None:
        probes, self.locations, self.channels = probe.shape
        self.neighbors = gallery.shape[0] if index is None else index.shape[1]
        self.gallery, self.dtype = gallery, accumulation_dtype(probe.dtype)
        self.permutation: Tensor | None = None
        self.sizes = [1] * probes if index is not None else [probes]
        if index is not None and group is not None and probes:
            sorted_group, permutation = group.sort(stable=True)
            self.sizes = sorted_group.unique_consecutive(return_counts=True)[1].tolist()
            if not torch.equal(sorted_group, group):
                self.permutation = permutation
        self.pool = BufferPool(probe.device)
        self.probe = self.sorted(probe).to(self.dtype)
        self.index = None if index is None else self.sorted(index)

    def sorted(self, values: Tensor) -> Tensor:
        """`values [P, ..]` of the probes in the order of the batches."""
        return values if self.permutation is None or not values.numel() else values[self.permutation]

    def restored(self, values: Tensor) -> Tensor:
        """`values [P, ..]` in the order in which the probes came."""
        if self.permutation is None or not values.numel():
            return values
        return torch.empty_like(values).index_copy_(0, self.permutation, values)

    def batches(
        self, most_pairs: int, most_neighbors: int, most_maps: int, most_locations: int = MAX_PROBE_LOCATIONS
    ) -> Iterator[PairBatch]:
        """All pairs once, in batches of at most so many pairs, neighbours in a span, maps and probe locations."""
        most_sharing = max(1, min(most_pairs, most_locations // self.locations))
        parts = [min(most_sharing, size - done) for size in self.sizes for done in range(0, size, most_sharing)]
        first = 0
        for sharing, run in groupby(parts):
            remaining = len(list(run))
            span = max(1, min(self.neighbors, most_pairs // sharing, most_neighbors))
            most_lists = max(1, min(most_pairs // (sharing * span), most_maps // span))
            while remaining:
                lists = 1 if self.index is None else min(remaining, most_lists)
                for start in range(0, self.neighbors, span):
                    yield PairBatch(first, lists, sharing, slice(start, min(start + span, self.neighbors)))
                first += lists * sharing
                remaining -= lists

    def ids(self, batch: PairBatch) -> Tensor | None:
        """Gallery ids of a batch `[L, k]`; None where all probes are compared with all of the gallery."""
        return None if self.index is None else self.index[batch.probes, batch.span][:: batch.sharing]

    def maps(self, batch: PairBatch, ids: Tensor | None) -> Tensor:
        """Gallery maps of a batch `[L, k, S, C]`, in the dtype of sums."""
        if ids is None:
            return self.gallery[batch.span].unsqueeze(0).to(self.dtype)
        rows = self.pool.rows("maps", self.gallery, ids.clamp(min=0).flatten(), self.dtype)
        return rows.view(*ids.shape, self.locations, self.channels)


def _correlations(
    pairs: PairBatches,
    normalize_gallery: bool,
    rnorm: Tensor | None = None,
    slots: Tensor | None = None,
    enlargement: int = 1,
) -> Iterator[tuple[PairBatch, Tensor]]:
    """Every batch and its correlations `[L, k, r, m, s]`, good until the next is asked for.

    Inverse norms, as of `common/norms.py`, go to rows `slots [P*K]` of `rnorm` where that is given.
    """
    locations = pairs.locations
    if slots is not None and pairs.index is not None:
        slots = pairs.sorted(slots.view_as(pairs.index))
    most_maps = max(1, MAX_MAP_ELEMENTS // (locations * pairs.channels))
    most_pairs = max(1, enlargement * MAX_CORRELATIONS // locations**2)
    for batch in pairs.batches(most_pairs, most_maps, most_maps, enlargement * MAX_PROBE_LOCATIONS):
        _, lists, sharing, _ = batch
        ids = pairs.ids(batch)
        maps = pairs.maps(batch, ids)
        probe = pairs.probe[batch.probes].reshape(lists, sharing * locations, pairs.channels)
        factor = None
        if normalize_gallery:
            norms = inverse_norms(maps)
            if (norms < 0).any():
                maps = normalized(maps, norms)
            else:
                factor = norms.view(lists, -1, 1)
            if rnorm is not None:
                rows = batch.span if slots is None else slots[batch.probes, batch.span][::sharing].flatten()
                rnorm[rows] = norms.flatten(0, 1)
        shape = lists, maps.shape[1] * locations, sharing * locations
        corr = pairs.pool("corr", shape, pairs.dtype)
        torch.bmm(maps.flatten(1, 2), probe.mT, out=corr)  # [L, k*r, m*s]
        if factor is not None:
            corr *= factor
        if ids is not None and ids.numel() and ids.min() < 0:
            corr.view(*ids.shape, -1)[ids < 0] = torch.nan
        yield batch, corr.view(lists, -1, locations, sharing, locations)


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
    inverted: InvertedIndex | None,
    normalize_gallery: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.max_correlation.max_correlation`: pooled and argmax `[P, K, 2S]`, inverse norms `[T or G, S]`."""
    pairs = PairBatches(probe, gallery, index, group)
    probes, locations = probe.shape[:2]
    shape = (probes, pairs.neighbors, 2 * locations)
    pooled = probe.new_empty(shape, dtype=pairs.dtype)
    argmax = probe.new_empty(shape, dtype=argmax_dtype(locations))
    slots = gallery.shape[0] if inverted is None else inverted.classes.shape[0]
    rnorm = pooled.new_zeros(slots + 1, locations) if normalize_gallery else None  # one more for slot -1
    norms = pooled.new_empty(0) if rnorm is None else rnorm[:-1]
    if gallery.shape[0] == 0:  # ids into nothing are negative: pairs of NaN
        return pooled.fill_(torch.nan), argmax.zero_(), norms
    rnorm_rows = None if inverted is None else inverted.slots
    for batch, corr in _correlations(pairs, normalize_gallery, rnorm, rnorm_rows):
        lists, count, _, sharing, _ = corr.shape
        over_r = _max(corr.view(-1, locations, sharing * locations))
        transposed = pairs.pool("transposed", (lists, sharing * locations, count * locations), pairs.dtype)
        transposed.copy_(corr.view(lists, -1, sharing * locations).mT)
        over_s = _max(transposed.view(lists * sharing, locations, -1))
        for whole, of_s, of_r in zip((pooled, argmax), over_r, over_s, strict=True):
            part = whole[batch.probes].view(lists, sharing, *shape[1:])[:, :, batch.span]
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
    pairs = PairBatches(probe, gallery, index, group)
    locations = probe.shape[1]
    sums = probe.new_empty(probe.shape[0], pairs.neighbors, dtype=pairs.dtype)
    if gallery.shape[0] == 0:
        return sums.fill_(torch.nan)
    for batch, corr in _correlations(pairs, normalize_gallery, enlargement=SCORE_ONLY_FACTOR):
        over_r, over_s = corr.amax(2).transpose(1, 2), corr.amax(4).permute(0, 3, 1, 2)  # both [L, m, k, S]
        sums[batch.probes, batch.span] = (over_r @ weight[:locations] + over_s @ weight[locations:]).flatten(0, 1)
    return pairs.restored(sums)


def max_correlation_backward(
    saved: BackwardInputs, rows: Tensor | None, needs_probe: bool, needs_gallery: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients, `[P, S, C]` and `[G, S, C]`; for the gallery maps `rows [T]` (ascending) only where given."""
    probe_gradient, gallery_gradient = saved.probe.new_empty(0), saved.gallery.new_empty(0)
    if needs_probe:
        probe_gradient = _probe_gradient(saved).to(saved.probe.dtype)
    if needs_gallery:
        gallery_gradient = _gallery_gradient(saved, rows)
    return probe_gradient, gallery_gradient


def _slots(saved: BackwardInputs, pair: Tensor) -> Tensor:
    """Rows of `rnorm` for some pairs."""
    return pair % saved.rnorm.shape[0] if saved.inverted is None else saved.inverted.slots[pair]


class GradientTerms:
    """The matches of some pairs `pair [E]`, 2S each: every s with its best r, then every r with its best s.

    The gradient of the correlation is zero but for these: at locations `s` and `r`, both `[E, 2S]`, it is `weights`.
    With `raw` gallery maps the weights are divided by the norms of these.
    """

    def __init__(self, saved: BackwardInputs, pair: Tensor, raw: bool) -> None:
        arg_r, arg_s = saved.argmax.flatten(0, 1)[pair].to(torch.int32).chunk(2, dim=1)
        all_locations = torch.arange(arg_r.shape[1], dtype=torch.int32, device=pair.device).expand_as(arg_r)
        self.s, self.r = torch.cat([all_locations, arg_s], dim=1), torch.cat([arg_r, all_locations], dim=1)
        self.weights = saved.grad.flatten(0, 1)[pair]
        if raw:
            self.weights = self.weights * saved.rnorm[_slots(saved, pair)].gather(1, self.r.long())


class SegmentSum:
    """Sums of terms that belong to one location, `segments [E, 2S]` below `count`, in a fixed order."""

    def __init__(self, segments: Tensor, count: int) -> None:
        keys = segments.flatten().to(torch.int16 if count < 2**15 else torch.int32)  # the narrower the faster
        sorted_keys, self.permutation = keys.sort(stable=True)
        bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
        self.offsets = torch.searchsorted(sorted_keys, bounds)

    def of_rows(self, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Of the terms' rows of `table`, weighted, `[count, C]`."""
        rows, weights = rows.flatten()[self.permutation], weights.flatten()[self.permutation]
        return embedding_bag(
            rows.long(), table, self.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def of(self, values: Tensor) -> Tensor:
        """Of numbers, `[count, 1]`."""
        return embedding_bag(self.permutation, values.view(-1, 1), self.offsets, mode="sum", include_last_offset=True)


def _probe_gradient(saved: BackwardInputs) -> Tensor:
    pairs = PairBatches(saved.probe, saved.gallery, saved.ids, saved.group)
    total = torch.zeros_like(pairs.probe)
    if pairs.gallery.shape[0] == 0:
        return total
    device, locations = total.device, pairs.locations
    probe_ids = torch.arange(total.shape[0], device=device) if pairs.permutation is None else pairs.permutation
    is_out_of_range = bool((saved.rnorm < 0).any())  # such maps are normalised first
    in_place = pairs.gallery.dtype == pairs.dtype and pairs.gallery.is_contiguous() and not is_out_of_range
    most_pairs = max(1, MAX_TERMS // (2 * locations))
    most_maps = max(1, MAX_MAP_ELEMENTS // (locations * pairs.channels))
    for batch in pairs.batches(most_pairs, most_maps, most_pairs if in_place else most_maps):
        part = total[batch.probes]
        k = torch.arange(batch.span.start, batch.span.stop, device=device)
        ids = pairs.ids(batch)
        pair = probe_ids[batch.probes].unsqueeze(1) * pairs.neighbors + k
        query = torch.arange(pair.shape[0], device=device).unsqueeze(1).expand_as(pair)
        gallery_id = (k.unsqueeze(0) if ids is None else ids).repeat_interleave(batch.sharing, dim=0)
        table, matched = pairs.gallery, gallery_id
        if not in_place:
            table = pairs.maps(batch, ids).flatten(0, 1)
            if is_out_of_range:
                table = normalized(table, saved.rnorm[_slots(saved, pair[:: batch.sharing].flatten())])
            matched = torch.arange(table.shape[0], device=device).view(batch.lists, -1)
            matched = matched.repeat_interleave(batch.sharing, dim=0)
        is_valid = gallery_id >= 0  # or else pairs of NaN, and zero times NaN is NaN
        pair, query, matched = (values[is_valid] for values in (pair, query, matched))
        terms = GradientTerms(saved, pair, raw=saved.rnorm.numel() > 0 and not is_out_of_range)
        query_rows = (query * locations).unsqueeze(1) + terms.s
        matched_rows = (matched * locations).unsqueeze(1) + terms.r
        sums = SegmentSum(query_rows, part.shape[0] * locations)
        part += sums.of_rows(table.flatten(0, 1), matched_rows, terms.weights).view_as(part)
    return pairs.restored(total)


def _gallery_gradient(saved: BackwardInputs, rows: Tensor | None) -> Tensor:
    probe, gallery, index, rnorm = saved.probe, saved.gallery, saved.ids, saved.rnorm
    grad, pooled = saved.grad.flatten(0, 1), saved.pooled.flatten(0, 1)
    probes, locations, channels = probe.shape
    device, neighbors = probe.device, gallery.shape[0] if index is None else index.shape[1]
    if index is None:
        classes = torch.arange(neighbors, device=device)
        indptr = torch.arange(neighbors + 1, device=device) * probes
    else:
        assert saved.inverted is not None
        classes, indptr, pairs, _ = saved.inverted
        classes = classes[: int((classes >= 0).sum())]
    slots = classes.shape[0]
    shape = gallery.shape[0] if rows is None else slots, locations, channels
    out = gallery.new_empty(shape) if slots == shape[0] else gallery.new_zeros(shape)
    table, pool = probe.to(grad.dtype).flatten(0, 1), BufferPool(device)
    # Norms near 1 may be squared, which saves a pass over the gradient.
    is_near = rnorm.numel() > 0 and bool(((rnorm == 0) | ((rnorm > 1 / NEAR) & (rnorm < NEAR))).all())
    most_maps = max(1, MAX_MAP_ELEMENTS // (locations * channels))
    step = max(1, min(most_maps, MAX_TERMS * slots // max(1, 2 * locations * int(indptr[-1]))))
    for first in range(0, slots, step):
        ids = classes[first : first + step]
        bounds = indptr[first : first + ids.shape[0] + 1]
        gallery_map = torch.arange(ids.shape[0], device=device).repeat_interleave(bounds.diff())
        if index is None:
            matched = torch.arange(probes, device=device).repeat(ids.shape[0])
            pair = matched * neighbors + first + gallery_map
        else:
            pair = pairs[bounds[0] : bounds[-1]]
            matched = pair // neighbors
        terms = GradientTerms(saved, pair, raw=is_near)
        gallery_rows = (gallery_map * locations).unsqueeze(1) + terms.r
        matched_rows = (matched * locations).unsqueeze(1) + terms.s
        sums = SegmentSum(gallery_rows, ids.shape[0] * locations)
        part = sums.of_rows(table, matched_rows, terms.weights)
        if rnorm.numel():
            norms = rnorm[first : first + ids.shape[0]].view(-1)
            radial = sums.of(grad[pair] * pooled[pair])  # <unit map, its gradient>: the part that normalising removes
            maps = pool.rows("maps", gallery, ids, part.dtype).flatten(0, 1)
            if is_near:
                part.addcmul_(maps, radial * norms.square().unsqueeze(1), value=-1.0)
            else:
                scale, factor = scale_and_inverse(norms.unsqueeze(1))
                part.addcmul_(normalized(maps, norms), radial, value=-1.0).mul_(factor).mul_(scale)
        where = slice(first, first + step) if shape[0] == slots else ids
        out[where] = part.view(-1, locations, channels).to(out.dtype)
    return out
