"""Scores without anything to differentiate: `ops.pair_sums`, the folded norms of the matcher, correspondences."""

from __future__ import annotations

import pytest
import torch
from eager import DEVICE, LABELS, C, Eager, H, K, N, S, W, assert_close, build, gallery_inputs, ids, maps, visibility
from pairwise import pairwise
from test_max_correlation import UNROUNDED, best_and_margin, correlation
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import QAConv, ops, reference
from qaconv_triton import matcher as matcher_module
from qaconv_triton import scores as scores_module
from qaconv_triton.kernels import config

INDEX = [[2, 0, 2, 1], [1, 2, 0, 0], [2, 0, 2, 1]]
GROUP = [5, 1, 5]
SHAPES = {6: (2, 3), 49: (7, 7), 65: (13, 5), 130: (13, 10), 192: (24, 8), 260: (20, 13), 1024: (32, 32)}
ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def prepared(count: int, seed: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(maps(count, seed, torch.float64, shape), dim=1).to(dtype)


def check(probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, normalize: bool) -> Tensor:
    """Hold the op against the reference in fp64, whose weighted sums are of about the size of one."""
    locations = probe[0, 0].numel()
    weight = torch.randn(2 * locations, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / locations
    expected = reference.max_correlation(
        reference.locations(probe.double()), reference.locations(gallery.double()), index, normalize
    )
    dtype = torch.float64 if probe.dtype == torch.float64 else torch.float32
    found = ops.pair_sums(probe, gallery, index, group, normalize, weight.to(probe.device, dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double().cpu(), expected.cpu() @ weight, rtol=0, atol=ERROR[probe.dtype], equal_nan=True
    )
    return found


@pytest.mark.parametrize(
    ("sizes", "indexed", "normalize"),
    [
        *pairwise([(6, 5), (49, 33), (65, 16), (192, 16), (260, 7)], [False, True], [False, True]),
        pytest.param((1024, 4), True, True, marks=pytest.mark.slow),
    ],
)
def test_sums(sizes: tuple[int, int], indexed: bool, normalize: bool, backend: str) -> None:
    locations, channels = sizes
    shape = channels, *SHAPES[locations]
    probe, gallery = prepared(3, 1, shape), (maps if normalize else prepared)(3, 2, shape=shape)
    check(probe, gallery, ids(INDEX) if indexed else None, ids(GROUP) if indexed else None, normalize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    shape = 40, 7, 7
    check(prepared(3, 1, shape, dtype), maps(3, 2, dtype, shape), ids(INDEX), None, True)
    check(prepared(3, 1, shape, dtype), prepared(3, 2, shape, dtype), None, None, False)


@pytest.mark.parametrize(("locations", "channels"), [(6, 3), (6, 512), (65, 64), (130, 16)])
@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
def test_all_channels_of_a_probe_at_once(
    normalize: bool, locations: int, channels: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision the kernel keeps them, if there are not too many, while neighbours come past."""
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: 3)
    shape = channels, *SHAPES[locations]
    probe, gallery = prepared(2, 1, shape, torch.bfloat16), prepared(5, 2, shape, torch.bfloat16)
    check(probe, gallery, None, None, normalize)
    check(probe, gallery, ids([[3, 1, 4, 1, 0], [4, 2, 2, 0, 3]]), None, normalize)


@pytest.mark.parametrize("share", [1, 2, 3, 5])
@pytest.mark.parametrize("locations", [6, 65, 130])
def test_however_many_neighbors_a_program_has(
    locations: int, share: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: share)
    probe, gallery = prepared(3, 1, (5, *SHAPES[locations])), maps(6, 2, shape=(5, *SHAPES[locations]))
    lists, group = ids([[3, 1, -1, 5, 0], [-1, 2, 2, 0, 5], [3, 1, -1, 5, 0]]), ids([4, 0, 4])
    weight = torch.ones(2 * locations, device=DEVICE)
    expected = reference.max_correlation(
        reference.locations(probe.double()), reference.locations(gallery.double()), lists, True
    )
    pooled, argmax, *_ = ops.max_correlation(probe, gallery, lists, group, True, False)
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=2e-6, equal_nan=True)
    best, margin = best_and_margin(correlation(probe, gallery, lists, True))
    decided = (margin > UNROUNDED) & (lists >= 0).unsqueeze(2)
    assert decided.double().mean() > 0.5
    assert torch.equal(argmax[decided].long(), best[decided])
    sums = ops.pair_sums(probe, gallery, lists, group, True, weight)
    torch.testing.assert_close(sums.double(), expected.sum(-1), rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_maps_of_more_than_a_tile_go_piece_by_piece(
    indexed: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "PARTIAL_BYTES", 2 * 4 * 65 * 3)  # of two neighbours
    shape = 5, *SHAPES[65]
    check(prepared(3, 1, shape), maps(3, 2, shape=shape), ids(INDEX) if indexed else None, None, True)


def test_pairs_of_nothing_are_nan(backend: str) -> None:
    shape = C, H, W
    absent = ids([[0, -1, 1], [-1, -1, -1]])
    probe, gallery, weight = prepared(2, 1, shape), maps(2, 2), torch.ones(2 * S, device=DEVICE)
    found = ops.pair_sums(probe, gallery, absent, None, True, weight)
    assert torch.equal(found.isnan(), absent < 0)
    whole = ops.pair_sums(probe, gallery, ids([[0, 0, 1], [0, 0, 0]]), None, True, weight)
    torch.testing.assert_close(found[0, [0, 2]], whole[0, [0, 2]], rtol=0, atol=1e-4)
    assert ops.pair_sums(probe, gallery[:0], absent, None, True, weight).isnan().all()
    assert ops.pair_sums(probe[:0], gallery, None, None, True, weight).shape == (0, 2)
    assert ops.pair_sums(probe, gallery, absent[:, :0], None, True, weight).shape == (2, 0)


def test_nan_stays_in_its_pairs(backend: str) -> None:
    probe, gallery = prepared(3, 1, (C, H, W)), maps(4, 2)
    probe[1, 0, 1, 1] = torch.nan
    found = ops.pair_sums(probe, gallery, None, None, True, torch.ones(2 * S, device=DEVICE))
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert found.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_identical(dtype: torch.dtype, backend: str) -> None:
    probe, gallery = prepared(3, 1, (33, 7, 7), dtype), maps(3, 2, shape=(33, 7, 7))
    first, *others = (check(probe, gallery, ids(INDEX), ids(GROUP), True) for _ in range(3))
    assert all(torch.equal(first, again) for again in others)


@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_op_is_well_registered(indexed: bool) -> None:
    weight = torch.ones(2 * S, device=DEVICE)
    index = ids(INDEX) if indexed else None
    torch.library.opcheck(ops.pair_sums, (prepared(3, 1, (C, H, W)), maps(3, 2), index, None, True, weight))


# --- the matcher


@pytest.mark.parametrize("kind", ["classes", "classes and itself", "every class", "gallery", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_folded_scores_are_those_with_gradients(kind: str, dtype: torch.dtype, backend: str) -> None:
    matcher = build(dtype, "eval", num_classes=N, k_nearest=K, include_self=kind == "classes and itself")
    inputs = gallery_inputs(dtype, occluded=True)
    if kind == "same":
        inputs |= {"gal_fea": "same", "gal_occ": visibility(4, 2, dtype)}
    elif kind != "gallery":
        labels = ids(LABELS) if kind.startswith("classes") else None
        inputs = {"prob_fea": maps(5, 1, dtype), "labels": labels, "prob_occ": visibility(5, 2, dtype)}
    expected = Eager(matcher)(
        **{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    )
    kept = matcher(**inputs)
    with torch.no_grad():
        folded = matcher(**inputs)
    assert kept.requires_grad
    assert not folded.requires_grad
    assert folded.dtype == dtype
    for scores in (kept, folded):
        assert_close(scores, expected, 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("part", ["bn", "logit_bn"])
def test_norms_without_parameters_or_bias_are_folded(part: str) -> None:
    matcher = build(torch.float64, "eval")
    setattr(matcher, part, torch.nn.BatchNorm1d(1, affine=False).double().to(DEVICE).eval())
    matcher.fc = torch.nn.Linear(2 * S, 1, bias=False).double().to(DEVICE)
    inputs = gallery_inputs(torch.float64, occluded=False)
    kept = matcher(**inputs)
    assert_close(matcher.match(*inputs.values()), kept, 1e-12)


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> QAConv:
    """A matcher whose scores depend on all pairs of a call, among maps that are otherwise taken piece by piece."""
    monkeypatch.setattr(scores_module, "MAP_BYTES", 1)
    monkeypatch.setattr(matcher_module, "PAIRS", 2)
    matcher = build(torch.float64, "eval")
    matcher.bn = torch.nn.BatchNorm1d(1, track_running_stats=False).double().to(DEVICE)
    return matcher


def test_norms_that_track_nothing_see_the_whole_gallery(untracked: QAConv) -> None:
    inputs = gallery_inputs(torch.float64, occluded=False)
    kept = untracked(**inputs)
    assert_close(untracked.match(*inputs.values()), kept, 1e-12)


def test_pairs_share_the_statistics_of_norms_that_track_nothing(untracked: QAConv) -> None:
    a, b = (prepared(3, seed, (C, H, W), torch.float64) for seed in (1, 2))
    pooled = ops.max_correlation(a, b, ids([[0], [1], [2]]), None, False, False)[0]
    expected = reference.pair_scores(pooled, untracked.bn, untracked.fc, untracked.logit_bn).squeeze(1)
    assert_close(untracked.match_pairs(a, b), expected, 1e-12)


# --- correspondences


def true_correspondences(a: Tensor, b: Tensor, a_occ: Tensor | None, b_occ: Tensor | None) -> list[Tensor]:
    left, right = (F.normalize(values.double(), dim=1).flatten(2) for values in (a, b))
    corr = torch.einsum("ncs,ncr->nsr", left, right)
    if a_occ is not None and b_occ is not None:
        corr = corr * a_occ.double().flatten(1).unsqueeze(2) * b_occ.double().flatten(1).unsqueeze(1)
    found = [part for axis in (2, 1) for part in reversed(corr.max(axis))]
    return [part.view(-1, *a.shape[2:]) for part in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("occluded", [False, True], ids=["visible", "occluded"])
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
    tolerance = {"rtol": 0, "atol": ERROR[dtype]}
    torch.testing.assert_close(found.similarity_a.double(), similarity_a, **tolerance)
    torch.testing.assert_close(found.similarity_b.double(), similarity_b, **tolerance)
    if dtype != torch.bfloat16:  # rounding may choose another that is nearly as similar
        assert torch.equal(found.b_location, b_location)
        assert torch.equal(found.a_location, a_location)


def test_correspondences_find_a_permutation(backend: str) -> None:
    a, order = maps(1, 1, shape=(16, 3, 5)), torch.randperm(15, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    b = a.flatten(2)[..., order].view_as(a)  # location j of b is location order[j] of a
    found = QAConv(16, 3, 5).to(DEVICE).correspondences(a.requires_grad_(), b)
    assert torch.equal(found.a_location.flatten(), order)
    assert torch.equal(found.b_location.flatten(), order.argsort())
    assert torch.allclose(found.similarity_a, torch.ones((), device=DEVICE))
    assert not found.similarity_a.requires_grad


def test_correspondences_of_equals_are_the_lowest(backend: str) -> None:
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


def test_correspondences_of_nothing() -> None:
    nothing = maps(0, 1)
    assert [part.shape for part in build().correspondences(nothing, nothing)] == [(0, H, W)] * 4


def test_correspondences_refuse_what_does_not_pair() -> None:
    with pytest.raises(ValueError, match=r"as many maps in b as in a, got \[3, 5, 2, 3\] for \[2, 5, 2, 3\]"):
        build().correspondences(maps(2, 1), maps(3, 2))
    with pytest.raises(ValueError, match="b_occ"):
        build().correspondences(maps(2, 1), maps(2, 2), None, visibility(3, 4))
    with pytest.raises(TypeError, match="a: "):
        build().correspondences(maps(2, 1).int(), maps(2, 2))


def test_scores_are_those_of_the_correspondences() -> None:
    matcher = build(torch.float64, "eval")
    a, b = maps(3, 1, torch.float64), maps(3, 2, torch.float64)
    found = matcher.correspondences(a, b)
    pooled = torch.cat([found.similarity_a.flatten(1), found.similarity_b.flatten(1)], dim=1)
    expected = reference.pair_scores(pooled, matcher.bn, matcher.fc, matcher.logit_bn)
    assert_close(matcher.match_pairs(a, b), expected, 1e-12)
