"""`ops.pair_sums`, weighted sums of pooled values that nothing will differentiate, and the scores made of them."""

from __future__ import annotations

import correlations
import pytest
import torch
from correlations import EITHER, SIZES
from eager import class_inputs, gallery_inputs
from inputs import CPU, DEVICE, C, H, S, W, ids, make_class_matcher, make_matcher, maps
from pairwise import pairwise
from tolerances import assert_close, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import QAConv, ops, reference
from qaconv_triton import matcher as matcher_module
from qaconv_triton import scores as scores_module
from qaconv_triton.kernels import config

INDEX = [[2, 0, 2, 1], [1, 2, 0, 0], [2, 0, 2, 1]]
GROUP = [5, 1, 5]


def unit_maps(count: int, seed: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(maps(count, seed, torch.float64, shape), dim=1).to(dtype)


def check(probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, normalize: bool) -> Tensor:
    """Hold the op against the reference in fp64, whose weighted sums are of about the size of one."""
    locations = probe[0, 0].numel()
    weight = maps(2 * locations, 3, torch.float64, (), CPU) / locations**0.5
    clean = None if index is None else index.clamp(min=0)
    expected = reference.max_correlation(
        reference.locations(probe.double()), reference.locations(gallery.double()), clean, normalize
    )
    dtype = torch.float64 if probe.dtype == torch.float64 else torch.float32
    found = ops.pair_sums(probe, gallery, index, group, normalize, weight.to(probe.device, dtype))
    assert found.dtype == dtype
    sums = expected.cpu() @ weight
    if index is not None:
        sums = torch.where(index.cpu() < 0, torch.nan, sums)
    assert_values(found.cpu(), sums, dtype)
    return found


@pytest.mark.parametrize(
    ("sizes", "indexed", "normalize"),
    [
        *pairwise([(6, 5), (49, 33), (65, 16), (130, 7)], EITHER, EITHER),
        pytest.param((1024, 4), True, True, marks=pytest.mark.slow),
    ],
)
def test_sums(sizes: tuple[int, int], indexed: bool, normalize: bool, backend: str) -> None:
    locations, channels = sizes
    shape = channels, *SIZES[locations]
    probe, gallery = unit_maps(3, 1, shape), (maps if normalize else unit_maps)(3, 2, shape=shape)
    check(probe, gallery, ids(INDEX) if indexed else None, ids(GROUP) if indexed else None, normalize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_and_double_precision(dtype: torch.dtype, backend: str) -> None:
    shape = 40, 7, 7
    check(unit_maps(3, 1, shape, dtype), maps(3, 2, dtype, shape), ids(INDEX), None, True)
    check(unit_maps(3, 1, shape, dtype), unit_maps(3, 2, shape, dtype), None, None, False)


@pytest.mark.parametrize(("locations", "channels"), [(6, 512), (65, 64)])
def test_all_channels_of_a_probe_at_once(
    locations: int, channels: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision the kernel keeps them, if there are not too many, while neighbours stream past."""
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: 3)
    shape = channels, *SIZES[locations]
    probe, gallery = unit_maps(2, 1, shape, torch.bfloat16), unit_maps(5, 2, shape, torch.bfloat16)
    check(probe, gallery, None, None, False)
    check(probe, gallery, ids([[3, 1, 4, 1, 0], [4, 2, 2, 0, 3]]), None, True)


@pytest.mark.parametrize(("locations", "share"), [(6, 1), (65, 2), (6, 3)])
def test_however_many_neighbors_a_program_has(
    locations: int, share: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: share)
    probe, gallery = unit_maps(3, 1, (5, *SIZES[locations])), maps(4, 2, shape=(5, *SIZES[locations]))
    nearest, group = ids([[3, -1, 0], [-1, 2, 2], [3, -1, 0]]), ids([4, 0, 4])
    correlations.check(probe, gallery, nearest, group, normalize=True)
    check(probe, gallery, nearest, group, True)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in products of maps that are too long
@pytest.mark.parametrize(
    ("together", "locations", "share", "dtype"),
    [
        (2, 6, 2, torch.float32),
        (4, 6, 1, torch.bfloat16),
        (4, 17, 5, torch.float32),
        (2, 49, 7, torch.bfloat16),
        (2, 65, 3, torch.bfloat16),
        (4, 65, 5, torch.float32),
    ],
)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_however_many_neighbors_a_tile_has(
    together: int, locations: int, share: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them absent ones, places behind the last one, and in fp32 maps so long that they are normalised first."""
    default = config.correlation_forward(locations, 16, dtype.itemsize, dtype.itemsize, 1)[0]
    tiling = default._replace(tiles={**default.tiles, "BK": together})
    monkeypatch.setattr(config, "correlation_forward", lambda *_: [tiling])
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: share)
    size = SIZES[locations]
    probe = correlations.prepared_maps(3, 16, size, DEVICE, dtype)
    gallery = correlations.raw_maps(4, 16, size, DEVICE, dtype)
    nearest, group = ids([[3, -1, 0, 2, 1], [-1, 2, 2, -1, -1], [3, -1, 0, 2, 1]]), ids([4, 0, 4])
    if dtype == torch.float32:  # in half precision unit maps are rounded
        gallery *= torch.tensor([1.0, 1e25, 1.0, 1e-25], device=DEVICE).view(4, 1, 1, 1)
    correlations.check(probe, gallery, nearest, group, normalize=True)
    check(probe, gallery, nearest, group, True)
    unit = correlations.prepared_maps(5, 16, size, DEVICE, dtype)
    check(probe, unit, nearest, None, False)
    check(probe, unit, None, None, False)


@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_maps_of_more_than_a_tile_go_piece_by_piece(
    indexed: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "PARTIAL_BYTES", 2 * 4 * 65 * 3)  # of two neighbours
    shape = 5, *SIZES[65]
    check(unit_maps(3, 1, shape), maps(3, 2, shape=shape), ids(INDEX) if indexed else None, None, True)


def test_absent_pairs_are_nan_and_none_are_empty(backend: str) -> None:
    absent = ids([[0, -1, 1], [-1, -1, -1]])
    probe, gallery, weight = unit_maps(2, 1, (C, H, W)), maps(2, 2), torch.ones(2 * S, device=DEVICE)
    check(probe, gallery, absent, None, True)
    assert ops.pair_sums(probe, gallery[:0], absent, None, True, weight).isnan().all()
    assert ops.pair_sums(probe[:0], gallery, None, None, True, weight).shape == (0, 2)
    assert ops.pair_sums(probe, gallery, absent[:, :0], None, True, weight).shape == (2, 0)


def test_nan_stays_in_its_pairs(backend: str) -> None:
    probe, gallery = unit_maps(3, 1, (C, H, W)), maps(4, 2)
    probe[1, 0, 1, 1] = torch.nan
    found = ops.pair_sums(probe, gallery, None, None, True, torch.ones(2 * S, device=DEVICE))
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert found.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_identical(dtype: torch.dtype, backend: str) -> None:
    probe, gallery = unit_maps(3, 1, (33, 7, 7), dtype), maps(3, 2, dtype, (33, 7, 7))
    runs = [check(probe, gallery, ids(INDEX), ids(GROUP), True) for _ in range(2)]
    assert torch.equal(*runs)


# --- the matcher


@pytest.mark.parametrize("kind", ["classes", "classes and itself", "gallery"])
def test_folded_scores_are_those_with_gradients(kind: str, backend: str) -> None:
    """In fp64, and for every form of call: `test_tiling_changes_nothing`."""
    matcher = make_class_matcher(mode="eval", include_self=kind == "classes and itself")
    inputs = (gallery_inputs if kind == "gallery" else class_inputs)(torch.float32, occluded=True)
    kept = matcher(**inputs)
    with torch.no_grad():
        folded = matcher(**inputs)
    assert kept.requires_grad
    assert not folded.requires_grad
    assert folded.dtype == torch.float32
    assert_close(folded, kept, torch.float32)


@pytest.mark.parametrize("part", ["bn", "logit_bn"])
def test_norms_without_parameters_or_bias_are_folded(part: str) -> None:
    matcher = make_matcher(torch.float64, "eval")
    setattr(matcher, part, torch.nn.BatchNorm1d(1, affine=False).double().to(DEVICE).eval())
    matcher.fc = torch.nn.Linear(2 * S, 1, bias=False).double().to(DEVICE)
    inputs = gallery_inputs(torch.float64, occluded=False)
    kept = matcher(**inputs)
    assert_close(matcher.match(*inputs.values()), kept, torch.float64)


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> QAConv:
    """A matcher whose scores depend on all pairs of a call, among maps that are otherwise taken piece by piece."""
    monkeypatch.setattr(scores_module, "MAP_BYTES", 1)
    monkeypatch.setattr(matcher_module, "PAIRS", 2)
    matcher = make_matcher(torch.float64, "eval")
    matcher.bn = torch.nn.BatchNorm1d(1, track_running_stats=False).double().to(DEVICE)
    return matcher


def test_norms_that_track_nothing_see_the_whole_gallery(untracked: QAConv) -> None:
    inputs = gallery_inputs(torch.float64, occluded=False)
    kept = untracked(**inputs)
    assert_close(untracked.match(*inputs.values()), kept, torch.float64)


def test_pairs_share_the_statistics_of_norms_that_track_nothing(untracked: QAConv) -> None:
    a, b = (unit_maps(3, seed, (C, H, W), torch.float64) for seed in (1, 2))
    pooled = ops.max_correlation(a, b, ids([[0], [1], [2]]), None, False, False)[0]
    expected = reference.pair_scores(pooled, untracked.bn, untracked.fc, untracked.logit_bn).squeeze(1)
    assert_close(untracked.match_pairs(a, b), expected, torch.float64)
