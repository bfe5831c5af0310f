"""The reference itself: against formulations of its own definition that share no code with it, and by gradcheck.

Also what the other tests rely on: memory is poisoned, and the assertions reject what they should.
"""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import TOLERANCES, assert_gradients, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import reference
from qaconv_triton.common import norms


def maps(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=device)


# --- what the other tests rely on


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty_floats_are_nan(dtype: torch.dtype, device: torch.device) -> None:
    like = torch.zeros(7, 5, dtype=dtype, device=device)
    fresh = torch.empty(7, 5, dtype=dtype, device=device), like.new_empty(7, 5), torch.empty_like(like)
    assert all(tensor.isnan().all() for tensor in fresh)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_empty_integers_are_the_largest(dtype: torch.dtype, device: torch.device) -> None:
    like = torch.zeros(7, 5, dtype=dtype, device=device)
    fresh = torch.empty(7, 5, dtype=dtype, device=device), like.new_empty(7, 5), torch.empty_like(like)
    assert all((tensor == torch.iinfo(dtype).max).all() for tensor in fresh)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_assertions_reject(dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    values, gradient = torch.linspace(-1, 1, 50).double().view(5, 10), torch.randn(5, 10).double()
    assert_values(values, values, dtype)
    assert_gradients(gradient, gradient, dtype)
    wrong_values = [
        values + 2 * tolerance.value,
        values.masked_fill(values > 0.9, torch.nan),
        values.masked_fill(values > 0.9, torch.inf),
        torch.full_like(values, values.mean().item()),
        values[:, :9],
    ]
    for wrong in wrong_values:
        with pytest.raises(AssertionError):
            assert_values(wrong, values, dtype)
    with pytest.raises(AssertionError, match="a constant would pass"):
        assert_values(values * tolerance.value, values * tolerance.value, dtype)
    across = torch.randn(5, 10).double()
    across -= gradient * (across * gradient).sum() / gradient.square().sum()
    tilt = 1.1 * math.tan(math.acos(tolerance.cosine)) * gradient.norm() / across.norm()
    wrong_gradients = [
        gradient * (1 + 2 * tolerance.norm),
        gradient * (1 - 2 * tolerance.norm),
        -gradient,
        (gradient + across * tilt) * math.cos(math.atan(tilt)),
        torch.full_like(gradient, gradient.norm().item() / math.sqrt(50)),
        gradient.masked_fill(gradient > 1, torch.nan),
    ]
    for wrong in wrong_gradients:
        with pytest.raises(AssertionError):
            assert_gradients(wrong, gradient, dtype)
    sparse = gradient.clone()
    sparse[2] = 0
    leak = sparse.clone()
    leak[2, 3] = 1e-12
    with pytest.raises(AssertionError, match="where there is none"):
        assert_gradients(leak, sparse, dtype)


# --- normalize


def test_normalize_is_functional_normalize(device: torch.device) -> None:
    values = maps(4, 6, 5, device=device)
    assert_values(reference.normalize(values), F.normalize(values, dim=-1), torch.float64)


def test_normalize_gradcheck(device: torch.device) -> None:
    assert torch.autograd.gradcheck(reference.normalize, maps(3, 4, 5, device=device).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vector_stays_zero_with_zero_gradient(dtype: torch.dtype, device: torch.device) -> None:
    values = maps(3, 4, device=device).to(dtype)
    values[1] = 0
    values.requires_grad_()
    unit = reference.normalize(values)
    unit.backward(torch.randn_like(unit))
    assert unit[1].eq(0).all()
    assert values.grad[1].eq(0).all()
    assert values.grad.isfinite().all()
    assert values.grad[[0, 2]].ne(0).all()


def test_nan_stays_in_its_vector(device: torch.device) -> None:
    values = maps(3, 4, device=device)
    values[1, 2] = torch.nan
    assert reference.normalize(values).isnan().all(-1).tolist() == [False, True, False]
    assert norms.inverse_norm(values).isnan().flatten().tolist() == [False, True, False]


def test_locations_run_row_by_row() -> None:
    grid = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    out = reference.locations(grid)
    assert out.shape == (2, 8, 3)
    assert torch.equal(out[1, 4 * 1 + 2], grid[1, :, 1, 2])


# --- max_correlation


def naive_max_correlation(probe: Tensor, gallery: Tensor, index: Tensor | None) -> Tensor:
    """The definition, location by location."""
    locations = probe.shape[1]
    all_ids = [list(range(len(gallery)))] * len(probe)
    rows = []
    for p, neighbors in enumerate(all_ids if index is None else index.tolist()):
        for g in neighbors:
            corr = [[float((probe[p, s] * gallery[g, r]).sum()) for s in range(locations)] for r in range(locations)]
            over_r = [max(corr[r][s] for r in range(locations)) for s in range(locations)]
            over_s = [max(corr[r][s] for s in range(locations)) for r in range(locations)]
            rows.append(over_r + over_s)
    return torch.tensor(rows, dtype=torch.float64, device=probe.device).view(len(probe), -1, 2 * locations)


INDEX = [[2, 0, 2], [1, 1, 0]]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("locations", "channels"), [(1, 3), (4, 1), (6, 5)])
def test_max_correlation_naive(
    locations: int, channels: int, normalize: bool, indexed: bool, device: torch.device
) -> None:
    probe, gallery = maps(2, locations, channels, device=device), maps(3, locations, channels, device=device)
    index = torch.tensor(INDEX, device=device) if indexed else None
    got = reference.max_correlation(probe, gallery, index, normalize)
    prepared = F.normalize(gallery, dim=-1) if normalize else gallery
    assert_values(got, naive_max_correlation(probe, prepared, index), torch.float64)


def test_max_correlation_is_the_score_of_the_papers_feature_maps(device: torch.device) -> None:
    """On `[B, C, H, W]`, as published: normalise, correlate as `p g r s`, take the maximum over r, then over s."""
    probe, gallery = maps(3, 5, 2, 3, device=device), maps(4, 5, 2, 3, device=device)
    unit_probe, unit_gallery = F.normalize(probe, dim=1).flatten(2), F.normalize(gallery, dim=1).flatten(2)
    corr = torch.einsum("pcs,gcr->pgrs", unit_probe, unit_gallery)
    expected = torch.cat([corr.amax(2), corr.amax(3)], -1)
    got = reference.max_correlation(
        reference.normalize(reference.locations(probe)), reference.locations(gallery), None, True
    )
    assert_values(got, expected, torch.float64)


@pytest.mark.parametrize(("indexed", "normalize"), [(False, False), (True, True)])
def test_max_correlation_gradcheck(indexed: bool, normalize: bool, device: torch.device) -> None:
    probe, gallery = maps(2, 4, 3, device=device), maps(3, 4, 3, device=device)
    index = torch.tensor(INDEX, device=device) if indexed else None
    assert torch.autograd.gradcheck(
        lambda p, g: reference.max_correlation(p, g, index, normalize),
        (probe.requires_grad_(), gallery.requires_grad_()),
    )


def test_negative_index_gives_nan_and_leaves_the_rest(device: torch.device) -> None:
    probe, gallery = maps(2, 4, 3, device=device), maps(3, 4, 3, device=device)
    index = torch.tensor([[2, -1, 0], [-3, 1, 1]], device=device)
    got = reference.max_correlation(probe, gallery, index)
    assert got.isnan().all(-1).tolist() == [[False, True, False], [True, False, False]]
    clean = reference.max_correlation(probe, gallery, index.clamp(min=0))
    assert torch.equal(got[index >= 0], clean[index >= 0])


# --- cosine_topk


def test_cosine_topk_naive(device: torch.device) -> None:
    queries, keys = maps(5, 4, device=device), maps(9, 4, device=device)
    values, indices = reference.cosine_topk(queries, keys, 6)
    for p in range(5):
        similarity = F.cosine_similarity(queries[p : p + 1], keys)
        order = sorted(range(9), key=lambda n: -similarity[n].item())[:6]
        assert indices[p].tolist() == order
        assert_values(values[p], similarity[order], torch.float64)


def test_cosine_topk_leaves_out_self_by_id_and_orders_equals_by_id(device: torch.device) -> None:
    # exact in any arithmetic: one-hot directions, lengths that are powers of two
    keys = torch.eye(2, dtype=torch.float64, device=device)[[0, 1, 0, 1, 0]] * torch.tensor(
        [[1.0], [4.0], [0.5], [2.0], [8.0]], device=device
    )
    values, indices = reference.cosine_topk(keys, keys, 4, exclude_self=True)
    assert indices.tolist() == [[2, 4, 1, 3], [3, 0, 2, 4], [0, 4, 1, 3], [1, 0, 2, 4], [0, 2, 1, 3]]
    assert values.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert reference.cosine_topk(keys, keys, 2)[1][:, 0].tolist() == [0, 1, 0, 1, 0]


def test_cosine_topk_zero_vector_has_similarity_zero(device: torch.device) -> None:
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, device=device)
    values, indices = reference.cosine_topk(keys, keys, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 0, 3, 1], [0, 1, 2, 3]]
    assert values.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1], [1, 0, 0, -1], [0, 0, 0, 0]]


# --- pair_scores


@pytest.mark.parametrize("training", [False, True])
def test_pair_scores_formula(training: bool, device: torch.device) -> None:
    """Batch norm sees all P*G*2S pooled values as one channel, logit_bn all P*G logits; one update each."""
    torch.manual_seed(3)
    bn, fc, logit_bn = torch.nn.BatchNorm1d(1), torch.nn.Linear(8, 1), torch.nn.BatchNorm1d(1)
    for module in (bn, fc, logit_bn):
        module.to(device).double().train(training)
    with torch.no_grad():
        for module in (bn, logit_bn):
            for tensor, value in zip((*module.parameters(), *module.buffers()), (1.7, -0.3, 0.4, 2.5), strict=False):
                tensor.fill_(value)
    pooled = maps(3, 2, 8, device=device)

    def norm(values: Tensor) -> Tensor:
        mean, variance = (values.mean(), values.var(correction=0)) if training else (0.4, 2.5)
        return (values - mean) / (variance + bn.eps) ** 0.5 * 1.7 - 0.3

    expected = norm((norm(pooled) * fc.weight[0]).sum(-1) + fc.bias)
    got = reference.pair_scores(pooled, bn, fc, logit_bn)
    assert_values(got, expected, torch.float64)
    mean = 0.4 * 0.9 + 0.1 * pooled.mean().item() if training else 0.4
    assert bn.running_mean.item() == pytest.approx(mean, rel=TOLERANCES[torch.float64].score)
    assert bn.num_batches_tracked.item() == logit_bn.num_batches_tracked.item() == int(training)
