"""`QAConv.correspondences`: the best match of every location, both ways, with its similarity."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, H, W, make_matcher, maps, visibility
from tolerances import assert_close, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import QAConv, reference
from qaconv_triton import matcher as matcher_module


def true_correspondences(a: Tensor, b: Tensor, a_occ: Tensor | None, b_occ: Tensor | None) -> list[Tensor]:
    left, right = (F.normalize(values.double(), dim=1).flatten(2) for values in (a, b))
    corr = torch.einsum("ncs,ncr->nsr", left, right)
    if a_occ is not None and b_occ is not None:
        corr = corr * a_occ.double().flatten(1).unsqueeze(2) * b_occ.double().flatten(1).unsqueeze(1)
    found = [part for axis in (2, 1) for part in reversed(corr.max(axis))]
    return [part.view(-1, *a.shape[2:]) for part in found]


@pytest.mark.parametrize(
    ("occluded", "dtype"), [(False, torch.float32), (True, torch.float64), (True, torch.bfloat16)], ids=str
)
def test_correspondences(occluded: bool, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_module, "PAIRS", 2)
    matcher = QAConv(16, 3, 5).to(DEVICE, dtype)
    a, b = (maps(3, seed, dtype, (16, 3, 5)) for seed in (1, 2))
    seen = [torch.rand(3, 1, 3, 5, device=DEVICE) * 0.9 + 0.1 if occluded else None for _ in range(2)]
    found = matcher.correspondences(a, b, *seen)
    assert matcher.training
    assert [part.dtype for part in found[::2]] == [torch.int64] * 2
    assert [part.dtype for part in found[1::2]] == [torch.float64 if dtype == torch.float64 else torch.float32] * 2
    b_location, similarity_a, a_location, similarity_b = true_correspondences(a, b, *seen)
    assert_values(found.similarity_a, similarity_a, dtype)
    assert_values(found.similarity_b, similarity_b, dtype)
    if dtype != torch.bfloat16:  # rounding may choose another that is nearly as similar
        assert torch.equal(found.b_location, b_location)
        assert torch.equal(found.a_location, a_location)


def test_correspondences_find_a_permutation() -> None:
    a, order = maps(1, 1, shape=(16, 3, 5)), torch.randperm(15, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    b = a.flatten(2)[..., order].view_as(a)  # location j of b is location order[j] of a
    found = QAConv(16, 3, 5).to(DEVICE).correspondences(a.requires_grad_(), b)
    assert torch.equal(found.a_location.flatten(), order)
    assert torch.equal(found.b_location.flatten(), order.argsort())
    assert_close(found.similarity_a, torch.ones_like(found.similarity_a), torch.float32)
    assert not found.similarity_a.requires_grad


def test_correspondences_of_equal_locations_are_the_lowest() -> None:
    a = torch.ones(1, 4, 2, 3, device=DEVICE)
    found = QAConv(4, 2, 3).to(DEVICE).correspondences(a, a)
    assert found.b_location.eq(0).all()
    assert found.a_location.eq(0).all()


def test_correspondences_of_nan_are_the_lowest_nan(backend: str) -> None:
    a, b = maps(1, 1, shape=(4, 2, 3)), maps(1, 2, shape=(4, 2, 3))
    a[..., 0, 1], b[..., 1, :] = torch.nan, torch.nan
    found = QAConv(4, 2, 3).to(DEVICE).correspondences(a, b)
    assert found.b_location.flatten().tolist() == [3, 0, 3, 3, 3, 3]
    assert found.a_location.flatten().tolist() == [1, 1, 1, 0, 0, 0]


def test_correspondences_of_empty_batches() -> None:
    empty = maps(0, 1)
    assert [part.shape for part in make_matcher().correspondences(empty, empty)] == [(0, H, W)] * 4


def test_maps_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"as many maps in b as in a, got \[3, 5, 2, 3\] for \[2, 5, 2, 3\]"):
        make_matcher().correspondences(maps(2, 1), maps(3, 2))
    with pytest.raises(ValueError, match="b_occ"):
        make_matcher().correspondences(maps(2, 1), maps(2, 2), None, visibility(3, 4))
    with pytest.raises(TypeError, match="a: "):
        make_matcher().correspondences(maps(2, 1).int(), maps(2, 2))


def test_scores_are_those_of_the_correspondences() -> None:
    matcher = make_matcher(torch.float64, "eval")
    a, b = maps(3, 1, torch.float64), maps(3, 2, torch.float64)
    found = matcher.correspondences(a, b)
    pooled = torch.cat([found.similarity_a.flatten(1), found.similarity_b.flatten(1)], dim=1)
    expected = reference.pair_scores(pooled, matcher.bn, matcher.fc, matcher.logit_bn)
    assert_close(matcher.match_pairs(a, b), expected, torch.float64)
