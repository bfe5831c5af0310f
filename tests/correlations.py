"""Maps for tests of max correlation, and the check that holds the op against the reference in fp64.

A best match is a discrete choice. Where the fp64 runner-up is closer than rounding, either choice is right: such
locations get no upstream gradient, and the others must agree.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tolerances import TOLERANCES, assert_gradients, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import ops, reference

# height and width, by the number of locations
SIZES = {1: (1, 1), 6: (2, 3), 17: (17, 1), 49: (7, 7), 65: (13, 5), 130: (13, 10), 192: (24, 8), 196: (14, 14)}
SIZES |= {256: (16, 16), 260: (20, 13), 1024: (32, 32)}
INDEX = [[2, 0, 2], [1, 2, 0]]  # a class twice in one row, and in both rows
HALF = [torch.bfloat16, torch.float16]
EITHER = [False, True]


def raw_maps(
    count: int, channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Maps `[count, C, H, W]` that share features, in different places and more or less noisy: matches from 0 to 1."""
    locations = size[0] * size[1]
    common = torch.randn(channels, locations, generator=torch.Generator().manual_seed(7))
    placed = torch.stack([common[:, torch.randperm(locations)] for _ in range(count)] or [common])[:count]
    mix = torch.rand(count, 1, locations)
    maps = mix * placed + (1 - mix) * torch.randn(count, channels, locations)
    return maps.view(count, channels, *size).to(device, dtype)


def prepared_maps(
    count: int, channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same, normalised and weighted by a visibility, as the matcher passes them."""
    unit = F.normalize(raw_maps(count, channels, size, device), dim=1)
    return (unit * (0.1 + 0.9 * torch.rand(count, 1, *size, device=device))).to(dtype)


def make_case(
    size: tuple[int, int],
    channels: int,
    device: torch.device,
    *,
    indexed: bool,
    normalize: bool,
    dtype: torch.dtype = torch.float32,
    gallery_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two probes, three gallery maps, raw where the op is to `normalize` them, and an index or none."""
    probe = prepared_maps(2, channels, size, device, dtype)
    gallery = (raw_maps if normalize else prepared_maps)(3, channels, size, device, gallery_dtype or dtype)
    return probe, gallery, torch.tensor(INDEX, device=device) if indexed else None


def correlation(probe: Tensor, gallery: Tensor, index: Tensor | None, normalize: bool) -> Tensor:
    """Every correlation `[P, K, r, s]` in fp64."""
    probe, gallery = reference.locations(probe.double()), reference.locations(gallery.double())
    neighbors = (reference.normalize(gallery) if normalize else gallery)[
        slice(None) if index is None else index.clamp(min=0)
    ]
    return torch.einsum("psc,grc->pgrs" if index is None else "psc,pgrc->pgrs", probe, neighbors)


def best_and_margin(corr: Tensor) -> tuple[Tensor, Tensor]:
    """Which location is best, `[P, K, 2S]` in the order of pooled, and by how much."""
    best, margin = [], []
    for axis in (2, 3):
        if corr.shape[axis] == 1:
            best.append(torch.zeros_like(corr.amax(axis), dtype=torch.int64))
            margin.append(torch.full_like(corr.amax(axis), torch.inf))
        else:
            top = corr.topk(2, dim=axis)
            best.append(top.indices.select(axis, 0))
            margin.append(top.values.select(axis, 0) - top.values.select(axis, 1))
    return torch.cat(best, -1), torch.cat(margin, -1)


def check(
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None = None,
    group: Tensor | None = None,
    *,
    normalize: bool = False,
    sparse_grad: bool = False,
    needs: tuple[bool, bool] = (True, True),
) -> SimpleNamespace:
    """Run the op forward and backward, assert that all it returns is right, and return it.

    Where operands have the same dtype, their products and sums are exact in fp32: only they are rounded.
    """
    locations = probe.shape[2] * probe.shape[3]
    is_cast = probe.dtype in HALF and gallery.dtype != probe.dtype
    wide = torch.float64 if probe.dtype == torch.float64 else torch.float32
    rounded = probe.dtype if is_cast else wide
    absent = torch.zeros(0, 0, dtype=torch.bool) if index is None else index < 0

    probe, gallery = probe.detach(), gallery.detach()
    true_probe, true_gallery = probe.double().requires_grad_(), gallery.double().requires_grad_()
    clean = None if index is None else index.clamp(min=0)
    expected = reference.max_correlation(
        reference.locations(true_probe), reference.locations(true_gallery), clean, normalize
    )
    best, margin = best_and_margin(correlation(probe, gallery, index, normalize))
    decided = margin > TOLERANCES[rounded].tie
    assert decided.float().mean() > 0.6, "the data leaves too many matches open to test anything"
    upstream = torch.randn(expected.shape, device=probe.device) * decided
    if absent.any():
        upstream[absent] = 0
    expected.backward(upstream.double())

    probe.requires_grad_(needs[0]), gallery.requires_grad_(needs[1])
    pooled, argmax, rnorm, _ = ops.max_correlation(probe, gallery, index, group, normalize, sparse_grad)
    assert pooled.dtype == wide
    assert argmax.dtype == (torch.uint8 if locations <= 256 else torch.int16)
    assert pooled.shape == argmax.shape
    assert not argmax.requires_grad
    assert not rnorm.requires_grad
    target_values = expected.detach()
    if absent.any():  # their upstream gradient, NaN and Inf included, goes nowhere
        target_values[absent], decided[absent] = torch.nan, False
        upstream[absent] = torch.tensor([1.0, torch.nan, torch.inf], device=probe.device).repeat(2 * locations)[
            : 2 * locations
        ]
    assert_values(pooled, target_values, rounded)
    assert torch.equal(argmax[decided].long(), best[decided])

    wanted = [tensor for tensor, need in zip((probe, gallery), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(pooled, wanted, upstream.to(pooled.dtype)) if wanted else ())
    to_probe, to_gallery = (next(grads) if need else None for need in needs)
    if to_probe is not None:
        assert to_probe.dtype == probe.dtype
        assert_gradients(to_probe, true_probe.grad, probe.dtype)
    if to_gallery is not None:
        assert to_gallery.dtype == gallery.dtype
        assert to_gallery.is_sparse == (sparse_grad and index is not None)
        coarser = probe.dtype if probe.dtype in HALF else gallery.dtype
        assert_gradients(to_gallery.to_dense(), true_gallery.grad, coarser)
    return SimpleNamespace(pooled=pooled.detach(), argmax=argmax, to_probe=to_probe, to_gallery=to_gallery)
