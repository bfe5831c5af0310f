"""`ops.max_correlation` over an index: groups, absent ids, sparse gradients, empty input, batches on the CPU."""

from __future__ import annotations

import pytest
import torch
from correlations import EITHER, check, make_case, prepared_maps, raw_maps
from pairwise import pairwise
from tolerances import assert_gradients, assert_values

from qaconv_triton import ops
from qaconv_triton.cpu import max_correlation as cpu


@pytest.mark.parametrize(("indexed", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=str)
def test_group_is_a_hint(indexed: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """It orders the programs, and changes no result."""
    group = torch.tensor([4, 0, 4, 9], device=device)
    nearest = {0: [3, 1, 3], 4: [5, 2, 0], 9: [2, 2, 2]}
    index = torch.tensor([nearest[label] for label in group.tolist()], device=device) if indexed else None
    probe = prepared_maps(4, 16, (3, 4), device, dtype)
    gallery = raw_maps(6 if indexed else 3, 16, (3, 4), device)
    check(probe, gallery, index, group, normalize=True)


@pytest.mark.parametrize(("normalize", "sparse_grad", "with_group"), pairwise(EITHER, EITHER, EITHER))
def test_negative_ids(normalize: bool, sparse_grad: bool, with_group: bool, backend: str, device: torch.device) -> None:
    """Pairs of NaN, whose upstream gradient, NaN and Inf included, goes nowhere."""
    index = torch.tensor([[1, -1, 3], [-7, -1, -1], [1, -1, 3], [3, 3, -2]], device=device)
    group = torch.tensor([2, 1, 2, 3], device=device) if with_group else None
    probe = prepared_maps(4, 7, (2, 3), device)
    gallery = (raw_maps if normalize else prepared_maps)(5, 7, (2, 3), device)
    check(probe, gallery, index, group, normalize=normalize, sparse_grad=sparse_grad)


def test_ids_into_an_empty_gallery(backend: str, device: torch.device) -> None:
    probe = prepared_maps(2, 7, (2, 3), device).requires_grad_()
    gallery = raw_maps(0, 7, (2, 3), device).requires_grad_()
    pooled = ops.max_correlation(probe, gallery, torch.full((2, 3), -1, device=device), None, True, False)[0]
    assert pooled.isnan().all()
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), torch.ones_like(pooled))
    assert to_probe.eq(0).all()
    assert to_gallery.shape == gallery.shape


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_only_negative_ids(sparse_grad: bool, backend: str, device: torch.device) -> None:
    probe, gallery, _ = make_case((2, 3), 7, device, indexed=True, normalize=True)
    probe.requires_grad_(), gallery.requires_grad_()
    index = torch.full((2, 3), -1, device=device)
    pooled = ops.max_correlation(probe, gallery, index, None, True, sparse_grad)[0]
    assert pooled.isnan().all()
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), torch.ones_like(pooled))
    assert to_probe.eq(0).all()
    assert to_gallery.to_dense().eq(0).all()


@pytest.mark.parametrize(("where", "normalize"), [("probe", True), ("gallery", True), ("gallery", False)])
def test_negative_ids_carry_no_nan(where: str, normalize: bool, backend: str, device: torch.device) -> None:
    """A pair that is left out does not hand NaN features on, neither the probe's nor those of some gallery map."""
    probe, gallery, _ = make_case((2, 3), 7, device, indexed=True, normalize=normalize)
    (probe if where == "probe" else gallery)[0, :, 0, 0] = torch.nan
    index = torch.tensor([[-1, -1, -1], [1, -1, 2]], device=device)
    probe.requires_grad_(), gallery.requires_grad_()
    pooled = ops.max_correlation(probe, gallery, index, None, normalize, False)[0]
    assert torch.equal(pooled.isnan().all(-1), index < 0)
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), torch.ones_like(pooled))
    assert to_probe.isfinite().all()
    assert to_gallery.isfinite().all()
    assert to_probe[0].eq(0).all()
    assert to_gallery[0].eq(0).all()


@pytest.mark.parametrize(("normalize", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_sparse_gradient(normalize: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """A coalesced tensor of the touched rows, rising, equal to the dense gradient."""
    index = torch.tensor([[7, 2, 7], [11, -1, 2]], device=device)
    probe = prepared_maps(2, 7, (2, 3), device, dtype)
    gallery = (raw_maps if normalize else prepared_maps)(12, 7, (2, 3), device)
    torch.manual_seed(5)
    dense = check(probe, gallery, index, normalize=normalize).to_gallery
    torch.manual_seed(5)
    sparse = check(probe, gallery, index, normalize=normalize, sparse_grad=True).to_gallery
    assert sparse.is_coalesced()
    assert sparse.indices().tolist() == [[2, 7, 11]]
    assert sparse.values().shape == (3, 7, 2, 3)
    assert_gradients(sparse.to_dense(), dense, torch.float32)


def test_sparse_gradient_of_a_table_larger_than_memory(backend: str, device: torch.device) -> None:
    """2**40 classes that share one map's memory: neither pass may allocate, or visit, a whole table."""
    one = raw_maps(1, 3, (2, 3), device)
    table = one.expand(2**40, -1, -1, -1).requires_grad_()
    probe = prepared_maps(2, 3, (2, 3), device)
    index = torch.tensor([[2**39, 5], [2**40 - 1, 5]], device=device)
    pooled = ops.max_correlation(probe, table, index, None, True, True)[0]
    assert_values(pooled[:, 0], pooled[:, 1], torch.float32)
    gradient = torch.autograd.grad(pooled, table, torch.ones_like(pooled))[0]
    assert gradient.shape == table.shape
    assert gradient.indices().tolist() == [[5, 2**39, 2**40 - 1]]
    small = one.expand(3, -1, -1, -1).clone().requires_grad_()
    pooled = ops.max_correlation(probe, small, torch.tensor([[1, 0], [2, 0]], device=device), None, True, False)[0]
    of_few = torch.autograd.grad(pooled, small, torch.ones_like(pooled))[0]
    assert_gradients(gradient.values(), of_few, torch.float32)


@pytest.mark.parametrize(
    ("sizes", "sparse_grad", "normalize"),
    pairwise([(0, 3, None), (2, 0, None), (0, 0, None), (0, 3, 2), (2, 3, 0), (0, 3, 0)], EITHER, EITHER),
)
def test_empty(
    sizes: tuple[int, int, int | None],
    normalize: bool,
    sparse_grad: bool,
    backend: str,
    device: torch.device,
) -> None:
    probes, classes, neighbors = sizes
    probe = prepared_maps(probes, 7, (2, 3), device).requires_grad_()
    gallery = raw_maps(classes, 7, (2, 3), device).requires_grad_()
    index = None if neighbors is None else torch.zeros(probes, neighbors, dtype=torch.int64, device=device)
    group = None if neighbors is None else torch.zeros(probes, dtype=torch.int64, device=device)
    for hint in {None, group}:
        pooled, argmax, *_ = ops.max_correlation(probe, gallery, index, hint, normalize, sparse_grad)
        assert pooled.shape == argmax.shape == (probes, classes if neighbors is None else neighbors, 12)
        to_probe, to_gallery = torch.autograd.grad(pooled.sum(), (probe, gallery))
        assert to_probe.shape == probe.shape
        assert to_gallery.shape == gallery.shape
        assert to_probe.eq(0).all()
        assert to_gallery.to_dense().eq(0).all()


@pytest.mark.parametrize(("block", "with_group", "indexed"), pairwise([1, 100, 400, 3000], EITHER, EITHER))
def test_cpu_batches(
    block: int, with_group: bool, indexed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the pairs are cut into batches, nothing is lost or done twice."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", block)
    nearest = torch.tensor([[3, 1, 3, 0, 6, 2, 5], [5, 2, 0, 1, 1, 1, 6], [2, 2, 4, 2, 0, 3, 4]], device=device)
    group = torch.tensor([1, 0, 1, 2, 1, 1, 1, 0, 1], device=device)
    probe, gallery = prepared_maps(9, 5, (2, 4), device), raw_maps(7, 5, (2, 4), device)
    check(probe, gallery, nearest[group] if indexed else None, group if with_group else None, normalize=True)
    if indexed:
        check(probe, gallery, nearest[group], group if with_group else None, normalize=True, sparse_grad=True)
