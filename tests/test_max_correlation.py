"""`ops.max_correlation` on both backends against the reference in fp64: values, argmax and gradients.

A best match is a discrete choice. Where the fp64 runner-up is closer than rounding, either choice is right: such
locations get no upstream gradient, and the rest must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from exact import exact_cosines, exact_vectors
from pairwise import pairwise
from tolerances import assert_gradients, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import functional, ops, reference
from qaconv_triton.cpu import max_correlation as cpu

SIZES = {1: (1, 1), 6: (2, 3), 17: (17, 1), 49: (7, 7), 192: (24, 8), 196: (14, 14), 256: (16, 16)}
SIZES |= {260: (20, 13), 1024: (32, 32)}
INDEX = [[2, 0, 2], [1, 2, 0]]  # a class twice in one row, and in both rows
HALF = [torch.bfloat16, torch.float16]
EITHER = [False, True]
# How far apart two correlations are when rounding cannot swap them, given the coarser of the two operands' dtypes
# if the other is finer (one operand is rounded), or equal ones (only sums are).
UNROUNDED, ROUNDED = 1e-5, {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_maps(
    count: int, channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Maps `[count, C, H, W]` that share features, in different places and more or less noisy: matches from 0 to 1."""
    locations = size[0] * size[1]
    common = torch.randn(channels, locations, generator=torch.Generator().manual_seed(7))
    placed = torch.stack([common[:, torch.randperm(locations)] for _ in range(count)] or [common])[:count]
    mix = torch.rand(count, 1, locations)
    maps = mix * placed + (1 - mix) * torch.randn(count, channels, locations)
    return maps.view(count, channels, *size).to(device, dtype)


def make_probe(
    count: int, channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Prepared probe maps: normalised and weighted by a visibility, as the matcher passes them."""
    unit = F.normalize(make_maps(count, channels, size, device), dim=1)
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
    probe = make_probe(2, channels, size, device, dtype)
    gallery = (make_maps if normalize else make_probe)(3, channels, size, device, gallery_dtype or dtype)
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
    """Run the op forward and backward and hold all it returns against the reference in fp64."""
    locations = probe.shape[2] * probe.shape[3]
    rounds = probe.dtype in HALF and gallery.dtype != probe.dtype
    coarse = probe.dtype if rounds else torch.float64 if probe.dtype == torch.float64 else torch.float32
    margin_needed = ROUNDED[probe.dtype] if rounds else UNROUNDED
    absent = torch.zeros(0, 0, dtype=torch.bool) if index is None else index < 0

    probe, gallery = probe.detach(), gallery.detach()
    true_probe, true_gallery = probe.double().requires_grad_(), gallery.double().requires_grad_()
    clean = None if index is None else index.clamp(min=0)
    expected = reference.max_correlation(
        reference.locations(true_probe), reference.locations(true_gallery), clean, normalize
    )
    best, margin = best_and_margin(correlation(probe, gallery, index, normalize))
    decided = margin > margin_needed
    assert decided.float().mean() > 0.6, "the data leaves too many matches open to test anything"
    upstream = torch.randn(expected.shape, device=probe.device) * decided
    if absent.any():
        upstream[absent] = 0
    expected.backward(upstream.double())

    probe.requires_grad_(needs[0]), gallery.requires_grad_(needs[1])
    pooled, argmax, rnorm, _ = ops.max_correlation(probe, gallery, index, group, normalize, sparse_grad)
    assert pooled.dtype == (torch.float64 if probe.dtype == torch.float64 else torch.float32)
    assert argmax.dtype == (torch.uint8 if locations <= 256 else torch.int16)
    assert pooled.shape == argmax.shape
    assert not argmax.requires_grad
    assert not rnorm.requires_grad
    truth = expected.detach()
    if absent.any():
        truth[absent], decided[absent] = torch.nan, False
        upstream[absent] = torch.tensor([1.0, torch.nan, torch.inf], device=probe.device).repeat(2 * locations)[
            : 2 * locations
        ]
    assert_values(pooled, truth, coarse)
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
        finer = probe.dtype if probe.dtype in HALF else gallery.dtype
        assert_gradients(to_gallery.to_dense(), true_gallery.grad, finer)
    return SimpleNamespace(pooled=pooled.detach(), argmax=argmax, to_probe=to_probe, to_gallery=to_gallery)


# --- values and gradients


@pytest.mark.parametrize(
    ("locations", "channels", "indexed", "normalize"), pairwise([1, 6, 17, 49], [3, 7, 16, 33, 512], EITHER, EITHER)
)
def test_small_maps(
    locations: int, channels: int, indexed: bool, normalize: bool, backend: str, device: torch.device
) -> None:
    probe, gallery, index = make_case(SIZES[locations], channels, device, indexed=indexed, normalize=normalize)
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize(
    ("locations", "channels", "indexed", "normalize", "dtype"),
    [
        (192, 3, True, False, torch.float32),
        (192, 16, True, True, torch.float32),
        (192, 33, False, True, torch.bfloat16),
        (192, 512, True, True, torch.float32),
        (196, 7, False, False, torch.float32),
        (196, 33, True, True, torch.float16),
        (196, 512, True, False, torch.bfloat16),
        (256, 3, True, True, torch.float32),
        (260, 7, True, True, torch.float32),
        (260, 16, False, False, torch.bfloat16),
        pytest.param(1024, 16, True, True, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_large_maps(
    locations: int,
    channels: int,
    indexed: bool,
    normalize: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    probe, gallery, index = make_case(
        SIZES[locations], channels, device, indexed=indexed, normalize=normalize, dtype=dtype
    )
    if index is None:
        gallery = gallery[:2]
    else:
        index = index[:, 1:].contiguous()
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize(
    ("dtype", "locations", "channels", "indexed", "normalize"),
    pairwise(HALF, [6, 49], [7, 33, 512], EITHER, EITHER),
)
def test_half_precision_rounds_inputs_only(
    dtype: torch.dtype,
    locations: int,
    channels: int,
    indexed: bool,
    normalize: bool,
    backend: str,
    device: torch.device,
) -> None:
    """Operands of one half dtype: pooled values are as exact as fp32's, for products and sums are fp32."""
    probe, gallery, index = make_case(
        SIZES[locations], channels, device, indexed=indexed, normalize=normalize, dtype=dtype
    )
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
@pytest.mark.parametrize(("locations", "channels"), [(1, 3), (6, 7), (17, 33), (49, 512), (260, 16)])
def test_fp64(locations: int, channels: int, indexed: bool, normalize: bool, device: torch.device) -> None:
    probe, gallery, index = make_case(
        SIZES[locations], channels, device, indexed=indexed, normalize=normalize, dtype=torch.float64
    )
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize(
    ("dtypes", "indexed", "normalize"),
    pairwise(
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float16),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
        ],
        EITHER,
        EITHER,
    ),
)
def test_mixed_dtypes(
    dtypes: tuple[torch.dtype, torch.dtype],
    indexed: bool,
    normalize: bool,
    backend: str,
    device: torch.device,
) -> None:
    """The class table stays in its own dtype; the correlation, and what it rounds to, is the probe's."""
    dtype, gallery_dtype = dtypes
    probe, gallery, index = make_case(
        (3, 5), 64, device, indexed=indexed, normalize=normalize, dtype=dtype, gallery_dtype=gallery_dtype
    )
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_gradcheck(indexed: bool, normalize: bool, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 2), 3, device, indexed=indexed, normalize=normalize, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p, g: ops.max_correlation(p, g, index, None, normalize, False)[0],
        (probe.requires_grad_(), gallery.requires_grad_()),
    )


@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["probe", "gallery", "neither"])
def test_gradient_of_one_side(needs: tuple[bool, bool], normalize: bool, backend: str, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 3), 7, device, indexed=True, normalize=normalize)
    check(probe, gallery, index, normalize=normalize, needs=needs)


def test_upstream_gradients_of_any_layout(backend: str, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 3), 7, device, indexed=True, normalize=True)
    probe.requires_grad_(), gallery.requires_grad_()
    pooled = ops.max_correlation(probe, gallery, index, None, True, False)[0]
    expanded = torch.randn(2, 1, 1, device=device).expand_as(pooled)
    transposed = torch.randn(12, 3, 2, device=device).permute(2, 1, 0)
    for upstream in (expanded, transposed):
        got = torch.autograd.grad(pooled, (probe, gallery), upstream, retain_graph=True)
        plain = torch.autograd.grad(pooled, (probe, gallery), upstream.contiguous(), retain_graph=True)
        assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_upstream_gradients_of_any_scale(dtype: torch.dtype, scale: float, backend: str, device: torch.device) -> None:
    """Weights of tiny or huge upstream gradients neither vanish nor overflow on their way through half precision."""
    probe, gallery, index = make_case((2, 3), 16, device, indexed=True, normalize=True, dtype=dtype)
    gallery = gallery.float()  # fp16 could not hold the result; the table is fp32
    results = []
    upstream = torch.randn(2, 3, 12, device=device)
    for factor in (1.0, scale):
        gallery = gallery.detach().requires_grad_()
        pooled = ops.max_correlation(probe, gallery, index, None, True, False)[0]
        results.append(torch.autograd.grad(pooled, gallery, upstream * factor)[0].double() / factor)
    assert_gradients(results[1], results[0], torch.float32)  # powers of two: the rounding is the same


# --- index, group, sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_group_is_a_hint(indexed: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    group = torch.tensor([4, 0, 4, 4, 9], device=device)
    lists = {0: [3, 1, 3, 0], 4: [5, 2, 0, 1], 9: [2, 2, 2, 2]}
    index = torch.tensor([lists[label] for label in group.tolist()], device=device) if indexed else None
    probe = make_probe(5, 16, (3, 4), device, dtype)
    gallery = make_maps(6, 16, (3, 4), device)
    torch.manual_seed(5)
    alone = check(probe, gallery, index, normalize=True)
    torch.manual_seed(5)  # the same upstream gradient
    grouped = check(probe, gallery, index, group, normalize=True)
    assert_values(grouped.pooled, alone.pooled, torch.float32)
    assert_gradients(grouped.to_probe, alone.to_probe, dtype)
    assert_gradients(grouped.to_gallery, alone.to_gallery, torch.float32)


@pytest.mark.parametrize("with_group", [False, True])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
def test_negative_ids(normalize: bool, sparse_grad: bool, with_group: bool, backend: str, device: torch.device) -> None:
    """Pairs of NaN, whose upstream gradient, NaN and Inf included, goes nowhere."""
    index = torch.tensor([[1, -1, 3], [-7, -1, -1], [1, -1, 3], [3, 3, -2]], device=device)
    group = torch.tensor([2, 1, 2, 3], device=device) if with_group else None
    probe = make_probe(4, 7, (2, 3), device)
    gallery = (make_maps if normalize else make_probe)(5, 7, (2, 3), device)
    check(probe, gallery, index, group, normalize=normalize, sparse_grad=sparse_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_into_an_empty_gallery(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    probe = make_probe(2, 7, (2, 3), device, dtype).requires_grad_()
    gallery = make_maps(0, 7, (2, 3), device, dtype).requires_grad_()
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


@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
@pytest.mark.parametrize("where", ["probe", "gallery"])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
def test_sparse_gradient(normalize: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """A coalesced tensor of the touched rows, rising, equal to the dense gradient."""
    index = torch.tensor([[7, 2, 7], [11, -1, 2]], device=device)
    probe = make_probe(2, 7, (2, 3), device, dtype)
    gallery = (make_maps if normalize else make_probe)(12, 7, (2, 3), device)
    torch.manual_seed(5)
    dense = check(probe, gallery, index, normalize=normalize).to_gallery
    torch.manual_seed(5)
    sparse = check(probe, gallery, index, normalize=normalize, sparse_grad=True).to_gallery
    assert sparse.is_coalesced()
    assert sparse.indices().tolist() == [[2, 7, 11]]
    assert sparse.values().shape == (3, 7, 2, 3)
    assert_gradients(sparse.to_dense(), dense, torch.float32)


@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
def test_sparse_gradient_of_a_table_that_would_fill_no_memory(
    normalize: bool, backend: str, device: torch.device
) -> None:
    """2**40 classes that share one map's memory: neither pass may allocate, or visit, a whole table."""
    one = make_maps(1, 3, (2, 3), device)
    table = one.expand(2**40, -1, -1, -1).requires_grad_()
    probe = make_probe(2, 3, (2, 3), device)
    index = torch.tensor([[2**39, 5], [2**40 - 1, 5]], device=device)
    pooled = ops.max_correlation(probe, table, index, None, normalize, True)[0]
    assert_values(pooled[:, 0], pooled[:, 1], torch.float32)
    gradient = torch.autograd.grad(pooled, table, torch.ones_like(pooled))[0]
    assert gradient.shape == table.shape
    assert gradient.indices().tolist() == [[5, 2**39, 2**40 - 1]]
    small = one.expand(3, -1, -1, -1).clone().requires_grad_()
    pooled = ops.max_correlation(probe, small, torch.tensor([[1, 0], [2, 0]], device=device), None, normalize, False)[0]
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
    probe = make_probe(probes, 7, (2, 3), device).requires_grad_()
    gallery = make_maps(classes, 7, (2, 3), device).requires_grad_()
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


# --- memory layouts


def sliced(maps: Tensor) -> Tensor:
    """The same values, every other element of memory along three axes."""
    batch, channels, height, width = maps.shape
    wide = maps.new_zeros(2 * batch, channels + 3, height, 2 * width)
    view = wide[::2, 1 : 1 + channels, :, ::2]
    return view.copy_(maps)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda maps: maps.contiguous(),
    "channels_last": lambda maps: maps.contiguous(memory_format=torch.channels_last),
    "sliced": sliced,
    "transposed": lambda maps: maps.mT.contiguous().mT,
    "batch_innermost": lambda maps: maps.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize(("probe_layout", "gallery_layout", "indexed"), pairwise(list(LAYOUTS), list(LAYOUTS), EITHER))
def test_layouts(probe_layout: str, gallery_layout: str, indexed: bool, backend: str, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 3), 7, device, indexed=indexed, normalize=True)
    laid_probe, laid_gallery = LAYOUTS[probe_layout](probe), LAYOUTS[gallery_layout](gallery)
    assert torch.equal(laid_probe, probe)
    assert torch.equal(laid_gallery, gallery)
    check(laid_probe, laid_gallery, index, normalize=True)


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_expanded_gallery(indexed: bool, sparse_grad: bool, backend: str, device: torch.device) -> None:
    """Gallery maps that share memory are still maps of their own, with gradients of their own."""
    probe, gallery, index = make_case((2, 3), 7, device, indexed=indexed, normalize=True)
    check(probe, gallery[:1].expand(3, -1, -1, -1), index, normalize=True, sparse_grad=sparse_grad)
    check(probe[:1].expand(2, -1, -1, -1), gallery, index, normalize=True, sparse_grad=sparse_grad)


def test_gradients_come_channels_last(backend: str, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 3), 7, device, indexed=True, normalize=True)
    got = check(probe, gallery, index, normalize=True)
    for gradient in (got.to_probe, got.to_gallery):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
@pytest.mark.parametrize("with_group", [False, True])
@pytest.mark.parametrize("block", [1, 100, 400, 3000])
def test_cpu_batches(
    block: int, with_group: bool, indexed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the pairs are cut into batches, nothing is lost or done twice."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", block)
    lists = torch.tensor([[3, 1, 3, 0, 6, 2, 5], [5, 2, 0, 1, 1, 1, 6], [2, 2, 4, 2, 0, 3, 4]], device=device)
    group = torch.tensor([1, 0, 1, 2, 1, 1, 1, 0, 1], device=device)
    probe, gallery = make_probe(9, 5, (2, 4), device), make_maps(7, 5, (2, 4), device)
    check(probe, gallery, lists[group] if indexed else None, group if with_group else None, normalize=True)
    if indexed:
        check(probe, gallery, lists[group], group if with_group else None, normalize=True, sparse_grad=True)


# --- ties


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
    pairwise(
        [(6, 3), (17, 512), (49, 7), (49, 33), (192, 16), (260, 3)], EITHER, EITHER, [torch.float32, torch.bfloat16]
    ),
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


@pytest.mark.parametrize("locations", [6, 192])
def test_the_gradient_of_a_tie_goes_to_one_element(locations: int, backend: str, device: torch.device) -> None:
    """Equal locations everywhere: only location 0 of either map is anyone's match."""
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
        by_location = got.flatten(2) / direction.flatten(2)
        torch.testing.assert_close(by_location, expected.expand_as(by_location), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_upstream_element_reaches_one_location(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    probe, gallery, _ = make_case((2, 3), 7, device, indexed=False, normalize=False, dtype=dtype)
    probe.requires_grad_(), gallery.requires_grad_()
    pooled, argmax, *_ = ops.max_correlation(probe, gallery, None, None, False, False)
    for p, g, location in itertools.product(range(2), range(3), (0, 4, 6, 11)):
        to_probe, to_gallery = torch.autograd.grad(pooled[p, g, location], (probe, gallery), retain_graph=True)
        partner = int(argmax[p, g, location])
        s, r = (location, partner) if location < 6 else (partner, location - 6)
        expected_probe, expected_gallery = torch.zeros_like(probe), torch.zeros_like(gallery)
        expected_probe.flatten(2)[p, :, s] = gallery.flatten(2)[g, :, r]
        expected_gallery.flatten(2)[g, :, r] = probe.flatten(2)[p, :, s]
        assert_gradients(to_probe, expected_probe, torch.float32)
        assert_gradients(to_gallery, expected_gallery, torch.float32)
        assert torch.equal(to_probe != 0, expected_probe != 0)
        assert torch.equal(to_gallery != 0, expected_gallery != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["prepared", "normalize"])
@pytest.mark.parametrize("locations", [6, 192])
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


# --- NaN, Inf


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")  # the interpreter's numpy
@pytest.mark.parametrize(
    ("locations", "indexed", "value", "normalize", "where"),
    pairwise([6, 192], EITHER, [torch.nan, torch.inf, -torch.inf], EITHER, ["probe", "gallery"]),
)
def test_nan_and_inf_stay_where_they_belong(
    value: float, where: str, indexed: bool, normalize: bool, locations: int, backend: str, device: torch.device
) -> None:
    """One bad location in probe 0, or in gallery map 0, which probe 1 does not meet through its index."""
    probe, gallery, _ = make_case(SIZES[locations], 7, device, indexed=False, normalize=normalize)
    index = torch.tensor([[0, 1], [1, 2]], device=device) if indexed else None
    (probe if where == "probe" else gallery).flatten(2)[0, 2, locations - 2] = value
    with torch.no_grad():
        expected = reference.max_correlation(
            reference.locations(probe.double()), reference.locations(gallery.double()), index, normalize
        )
    probe.requires_grad_(), gallery.requires_grad_()
    pooled = ops.max_correlation(probe, gallery, index, None, normalize, False)[0]
    assert_values(pooled, expected, torch.float32)
    bad = pooled.isfinite().logical_not().any(-1)
    if where == "probe":
        assert bad.tolist() == [[True] * bad.shape[1], [False] * bad.shape[1]]
    else:
        assert bad.tolist() == ([[True, False], [False, False]] if indexed else [[True, False, False]] * 2)
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), torch.ones_like(pooled))
    # whoever has met nothing bad has a true gradient
    clean = [tensor.detach().double().nan_to_num(0, 0, 0).requires_grad_() for tensor in (probe, gallery)]
    reference.max_correlation(*map(reference.locations, clean), index, normalize).sum().backward()
    pairs = torch.ones(2, 3, dtype=torch.bool) if index is None else torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    spoilt = torch.zeros(2, 3, dtype=torch.bool)
    spoilt[0 if where == "probe" else slice(None), slice(None) if where == "probe" else 0] = True
    spoilt &= pairs
    for got, truth, whole in ((to_probe, clean[0], ~spoilt.any(1)), (to_gallery, clean[1], ~spoilt.any(0))):
        if whole.any():
            assert_gradients(got[whole.to(device)], truth.grad[whole.to(device)], torch.float32)


def test_zero_maps_have_zero_scores_and_finite_gradients(backend: str, device: torch.device) -> None:
    probe, gallery, _ = make_case((2, 3), 7, device, indexed=False, normalize=True)
    gallery[1] = 0
    probe.requires_grad_(), gallery.requires_grad_()
    pooled = ops.max_correlation(probe, gallery, None, None, True, False)[0]
    assert pooled[:, 1].eq(0).all()
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), torch.ones_like(pooled))
    assert to_probe.isfinite().all()
    assert to_gallery[1].eq(0).all()


# --- repeats


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_repeats_are_bit_identical(indexed: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    index = torch.randint(4, (6, 5), device=device) if indexed else None
    probe = make_probe(6, 16, (2, 4), device, dtype).requires_grad_()
    gallery = make_maps(4, 16, (2, 4), device).requires_grad_()
    upstream = torch.randn(6, 5 if indexed else 4, 16, device=device)
    runs = []
    for _ in range(3):
        outputs = ops.max_correlation(probe, gallery, index, None, True, False)
        runs.append((*outputs, *torch.autograd.grad(outputs[0], (probe, gallery), upstream)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


# --- functional.max_correlation


@pytest.mark.parametrize(
    ("dtype", "indexed", "occluded"), pairwise([torch.float32, torch.float64, *HALF], EITHER, EITHER)
)
def test_functional(occluded: bool, indexed: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Raw maps in, visibility on its own axis; gradients reach maps and visibilities."""
    height, width = 2, 3
    probe, gallery = (make_maps(count, 33, (height, width), device, dtype) for count in (2, 3))
    index = torch.tensor(INDEX, device=device) if indexed else None
    weights = [0.1 + 0.9 * torch.rand(count, 1, height, width, device=device) for count in (2, 3)]
    inputs = [probe, gallery, *(weights if occluded else ())]
    true = [tensor.detach().double().requires_grad_() for tensor in inputs]
    prepared = [F.normalize(maps.flatten(2), dim=1) for maps in true[:2]]
    corr = torch.einsum("pcs,gcr->pgrs", *prepared)
    if occluded:
        corr = corr * true[2].flatten(1)[:, None, None, :] * true[3].flatten(1)[None, :, :, None]
    if index is not None:
        corr = corr[torch.arange(2, device=device)[:, None], index]
    expected = torch.cat([corr.amax(2), corr.amax(3)], -1)
    margin = best_and_margin(corr.detach())[1]
    decided = margin > (2 * ROUNDED[dtype] if dtype in HALF else UNROUNDED)
    assert decided.float().mean() > 0.6
    upstream = torch.randn(expected.shape, device=device) * decided
    expected.backward(upstream.double())

    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    occlusion = {"probe_occ": inputs[2], "gallery_occ": inputs[3]} if occluded else {}
    pooled = functional.max_correlation(inputs[0], inputs[1], index, **occlusion)
    assert_values(pooled, expected.detach(), dtype)
    pooled.backward(upstream.to(pooled.dtype))
    for tensor, truth in zip(inputs, true, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert_gradients(tensor.grad, truth.grad, dtype if dtype in HALF else tensor.dtype)


def test_functional_takes_gallery_in_the_probes_dtype(backend: str, device: torch.device) -> None:
    probe, gallery = (make_maps(count, 33, (2, 3), device) for count in (2, 3))
    got = functional.max_correlation(probe.bfloat16(), gallery)
    exact = functional.max_correlation(probe.bfloat16().double(), gallery.double())
    assert got.dtype == torch.float32
    assert_values(got, exact, torch.bfloat16)
    assert (got - exact).abs().max() > 1e-4  # bf16 was really what was multiplied


def test_functional_under_autocast(backend: str, device: torch.device) -> None:
    probe, gallery = (make_maps(count, 33, (2, 3), device).requires_grad_() for count in (2, 3))
    exact = functional.max_correlation(probe.double(), gallery.double())
    with torch.autocast(device.type, torch.bfloat16):
        got = functional.max_correlation(probe, gallery)
        same = functional.max_correlation(probe.double(), gallery.double())
    assert got.dtype == torch.float32
    assert_values(got.detach(), exact.detach(), torch.bfloat16)
    assert (got - exact).abs().max() > 1e-4
    assert torch.equal(same, exact)  # fp64 stays fp64
    got.sum().backward()
    assert probe.grad.dtype == gallery.grad.dtype == torch.float32


def test_functional_of_nothing(backend: str, device: torch.device) -> None:
    probe, gallery = make_maps(2, 5, (2, 3), device), make_maps(3, 5, (2, 3), device)
    assert functional.max_correlation(probe[:0], gallery).shape == (0, 3, 12)
    assert functional.max_correlation(probe, gallery[:0]).shape == (2, 0, 12)
    index = torch.zeros(0, 4, dtype=torch.int64, device=device)
    assert functional.max_correlation(probe[:0], gallery, index).shape == (0, 4, 12)


MAPS, TABLE = torch.zeros(2, 5, 2, 3), torch.zeros(4, 5, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"probe": [[1.0]]}, TypeError, ["probe", "list"]),
        ({"probe": MAPS[0]}, ValueError, ["probe", "[B, C, H, W]", "[5, 2, 3]"]),
        ({"probe": MAPS.long()}, TypeError, ["probe", "torch.int64"]),
        ({"probe": MAPS.to(torch.complex64)}, TypeError, ["probe", "torch.complex64"]),
        ({"gallery": None}, TypeError, ["gallery", "NoneType"]),
        ({"gallery": TABLE.flatten(2)}, ValueError, ["gallery", "[B, 5, 2, 3]", "[4, 5, 6]"]),
        ({"gallery": torch.zeros(4, 6, 2, 3)}, ValueError, ["gallery", "[B, 5, 2, 3]", "[4, 6, 2, 3]"]),
        ({"gallery": TABLE.mT}, ValueError, ["gallery", "[B, 5, 2, 3]", "[4, 5, 3, 2]"]),
        ({"gallery": TABLE.int()}, TypeError, ["gallery", "torch.int32"]),
        ({"gallery": TABLE.to("meta")}, ValueError, ["gallery", "meta", "probe", "cpu"]),
        ({"probe_occ": 1.0}, TypeError, ["probe_occ", "[2, 1, 2, 3]", "float"]),
        ({"probe_occ": torch.ones(4, 1, 2, 3)}, ValueError, ["probe_occ", "[2, 1, 2, 3]", "[4, 1, 2, 3]"]),
        ({"probe_occ": torch.ones(2, 1, 3, 2)}, ValueError, ["probe_occ", "[2, 1, 2, 3]", "[2, 1, 3, 2]"]),
        ({"probe_occ": torch.ones(2, 5, 2, 3)}, ValueError, ["probe_occ", "[2, 1, 2, 3]", "[2, 5, 2, 3]"]),
        ({"probe_occ": torch.ones(2, 1, 2, 3).bool()}, TypeError, ["probe_occ", "torch.bool"]),
        ({"gallery_occ": torch.ones(2, 1, 2, 3)}, ValueError, ["gallery_occ", "[4, 1, 2, 3]", "[2, 1, 2, 3]"]),
        ({"gallery_occ": torch.ones(4, 1, 2, 3, device="meta")}, ValueError, ["gallery_occ", "meta", "cpu"]),
        ({"index": [[0], [1]]}, TypeError, ["index", "[2, K]", "list"]),
        ({"index": torch.zeros(2, 3)}, TypeError, ["index", "int64", "torch.float32"]),
        ({"index": torch.zeros(2, 3).int()}, TypeError, ["index", "int64", "torch.int32"]),
        ({"index": torch.zeros(2).long()}, ValueError, ["index", "[2, K]", "[2]"]),
        ({"index": torch.zeros(3, 2).long()}, ValueError, ["index", "[2, K]", "[3, 2]"]),
        ({"index": torch.zeros(2, 3, device="meta").long()}, ValueError, ["index", "meta", "cpu"]),
        ({"index": torch.tensor([[0, 4], [1, 17]])}, IndexError, ["index", "[0, 4)", "[4, 17]"]),
        ({"index": torch.tensor([[0, -1], [1, 3]])}, IndexError, ["index", "[0, 4)", "[-1]"]),
    ],
)
def test_functional_errors_restate_what_came_in(
    arguments: dict[str, object], error: type[Exception], says: list[str]
) -> None:
    with pytest.raises(error) as caught:
        functional.max_correlation(**{"probe": MAPS, "gallery": TABLE, **arguments})
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"QACONV_TRITON_BACKEND.*'cuda'"):
        functional.max_correlation(MAPS, TABLE)
