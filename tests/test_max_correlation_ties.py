"""Ties in `ops.max_correlation`: of equal correlations the lowest location is the match, and has the gradient."""

from __future__ import annotations

import pytest
import torch
from correlations import EITHER, SIZES
from exact import exact_cosines, exact_vectors
from pairwise import pairwise
from tolerances import assert_gradients
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import ops


def lowest_matches(probe_ids: Tensor, gallery_ids: Tensor, corr_of_ids: Tensor, index: Tensor | None) -> Tensor:
    """The lowest best location, where location s of a map holds vector number `ids[s]`."""
    neighbors = gallery_ids.expand(len(probe_ids), *gallery_ids.shape) if index is None else gallery_ids[index]
    corr = corr_of_ids[neighbors[:, :, :, None], probe_ids[:, None, None, :]]  # [P, K, r, s]
    lowest = []
    for axis in (2, 3):
        positions = torch.arange(corr.shape[axis], device=corr.device)
        positions = positions[:, None] if axis == 2 else positions
        is_best = corr == corr.amax(axis, keepdim=True)
        lowest.append(positions.where(is_best, corr.shape[axis]).amin(axis))
    return torch.cat(lowest, -1)


@pytest.mark.parametrize(
    ("sizes", "indexed", "normalize", "dtype"),
    pairwise([(6, 3), (17, 512), (49, 33), (130, 16)], EITHER, EITHER, [torch.float32, torch.bfloat16]),
)
def test_repeated_locations_go_to_the_lowest(
    sizes: tuple[int, int],
    indexed: bool,
    normalize: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    """Vectors that occur at several locations of a map, near each other and in different tiles."""
    (locations, channels), kinds = sizes, 5
    vectors = exact_vectors(kinds, channels).to(device, dtype)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    probe_ids, gallery_ids = (torch.randint(kinds, (count, locations), device=device) for count in (2, 3))
    probe, gallery = (
        kept[ids].mT.reshape(-1, channels, *SIZES[locations])
        for kept, ids in ((unit, probe_ids), (vectors if normalize else unit, gallery_ids))
    )
    index = torch.tensor([[2, 0], [1, 1]], device=device) if indexed else None
    argmax = ops.max_correlation(probe, gallery, index, None, normalize, False)[1]
    lowest = lowest_matches(probe_ids, gallery_ids, exact_cosines(vectors, vectors), index)
    assert torch.equal(argmax.long(), lowest)


@pytest.mark.parametrize("locations", [6, 65])
def test_the_gradient_of_a_tie_goes_to_one_element(locations: int, backend: str, device: torch.device) -> None:
    """Equal locations everywhere: location 0 of either map is the match of all."""
    direction = F.normalize(torch.ones(4, device=device), dim=0).view(1, 4, 1, 1)
    probe = direction.repeat(1, 1, *SIZES[locations]).requires_grad_()
    gallery = direction.repeat(2, 1, *SIZES[locations]).requires_grad_()
    pooled, argmax, *_ = ops.max_correlation(probe, gallery, None, None, False, False)
    assert argmax.eq(0).all()
    weights = torch.arange(1.0, 2 * locations + 1, device=device)
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), weights.expand_as(pooled))
    # over r: location s of the probe meets location 0 of the gallery; over s: the other way round
    over_r, over_s = weights[:locations], weights[locations:]
    expected_gallery = over_s.clone()
    expected_gallery[0] += over_r.sum()
    expected_probe = over_r.clone()
    expected_probe[0] += over_s.sum()
    expected_probe *= 2  # two gallery maps
    for got, expected in ((to_probe, expected_probe), (to_gallery, expected_gallery)):
        assert_gradients(
            got, (expected * direction.flatten(2)).expand_as(got.flatten(2)).reshape(got.shape), torch.float32
        )


@pytest.mark.parametrize(
    ("locations", "normalize", "dtype"), pairwise([6, 65], EITHER, [torch.float32, torch.bfloat16]), ids=str
)
def test_zeros_of_either_sign_tie(
    locations: int, normalize: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """A location of no visibility correlates to -0 and +0; the lowest location is its match."""
    probe = torch.zeros(1, 1, *SIZES[locations], device=device, dtype=dtype)
    gallery = torch.ones(2, 1, *SIZES[locations], device=device, dtype=dtype)
    gallery[0].flatten()[: locations // 2] = -1  # -0, then +0
    gallery[1].flatten()[locations // 2 :] = -1  # +0, then -0
    probe[..., -1, -1] = -0.0
    pooled, argmax, *_ = ops.max_correlation(probe, gallery, None, None, normalize, False)
    assert pooled.eq(0).all()
    assert argmax.eq(0).all()


@pytest.mark.parametrize("negative", [slice(None, 3), slice(3, None)], ids=["first", "last"])
def test_underflow_to_zeros_of_either_sign_ties(negative: slice, backend: str, device: torch.device) -> None:
    """Correlations that normalising takes below the smallest number are zero, whichever sign they had."""
    probe = torch.tensor([1e-30, 0.0], device=device).view(1, 2, 1, 1).repeat(1, 1, 2, 3)
    gallery = torch.tensor([1.0, 1e18], device=device).view(1, 2, 1, 1).repeat(1, 1, 2, 3)
    gallery[0, 0].flatten()[negative] = -1
    pooled, argmax, *_ = ops.max_correlation(probe, gallery, None, None, True, False)
    assert pooled.eq(0).all()
    assert argmax.eq(0).all()


def test_the_last_location_of_256_fits_its_dtype(backend: str, device: torch.device) -> None:
    for locations in (256, 260):
        probe = torch.full((1, 1, *SIZES[locations]), 0.5, device=device)
        probe[..., -1, -1] = 1
        _, argmax, *_ = ops.max_correlation(probe, probe.clone(), None, None, False, False)
        assert argmax.dtype == (torch.uint8 if locations == 256 else torch.int16)
        assert argmax.eq(locations - 1).all()
