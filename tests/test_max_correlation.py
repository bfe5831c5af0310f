"""`ops.max_correlation` and its public function against the reference in fp64: values, argmax and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from correlations import EITHER, HALF, INDEX, SIZES, best_and_margin, check, make_case, prepared_maps, raw_maps
from pairwise import pairwise
from tolerances import TOLERANCES, assert_gradients, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import functional, ops, reference

# --- values and gradients


@pytest.mark.parametrize(
    ("locations", "channels", "indexed", "normalize"), pairwise([1, 6, 17, 49], [3, 16, 33], EITHER, EITHER)
)
def test_small_maps(
    locations: int, channels: int, indexed: bool, normalize: bool, backend: str, device: torch.device
) -> None:
    probe, gallery, index = make_case(SIZES[locations], channels, device, indexed=indexed, normalize=normalize)
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize(
    ("locations", "channels", "indexed", "normalize", "dtype"),
    [
        (65, 16, False, True, torch.bfloat16),
        (65, 512, True, True, torch.float32),
        (130, 7, False, False, torch.float32),
        (130, 33, True, True, torch.float16),
        (192, 3, True, False, torch.float32),
        (260, 7, True, True, torch.float32),
        pytest.param(196, 512, True, False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1024, 16, True, True, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_maps_of_several_tiles(
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
    pairwise(HALF, [6, 49], [7, 33], EITHER, EITHER),
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


@pytest.mark.parametrize(
    ("sizes", "indexed", "normalize"), pairwise([(1, 3), (6, 7), (49, 512), (260, 16)], EITHER, EITHER)
)
def test_fp64(sizes: tuple[int, int], indexed: bool, normalize: bool, device: torch.device) -> None:
    locations, channels = sizes
    probe, gallery, index = make_case(
        SIZES[locations], channels, device, indexed=indexed, normalize=normalize, dtype=torch.float64
    )
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize(
    ("dtype", "gallery_dtype", "indexed", "normalize"),
    [
        (torch.bfloat16, torch.float32, True, True),
        (torch.bfloat16, torch.float32, False, False),
        (torch.float16, torch.float32, True, True),
        (torch.bfloat16, torch.float16, False, True),
        (torch.float32, torch.bfloat16, True, True),
        (torch.float32, torch.float16, False, False),
    ],
)
def test_mixed_dtypes(
    dtype: torch.dtype,
    gallery_dtype: torch.dtype,
    indexed: bool,
    normalize: bool,
    backend: str,
    device: torch.device,
) -> None:
    """The class table stays in its own dtype; the correlation, and what it rounds to, is the probe's."""
    probe, gallery, index = make_case(
        (3, 5), 64, device, indexed=indexed, normalize=normalize, dtype=dtype, gallery_dtype=gallery_dtype
    )
    check(probe, gallery, index, normalize=normalize)


@pytest.mark.parametrize(("indexed", "normalize"), [(False, False), (True, True)])
def test_gradcheck(indexed: bool, normalize: bool, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 2), 3, device, indexed=indexed, normalize=normalize, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p, g: ops.max_correlation(p, g, index, None, normalize, False)[0],
        (probe.requires_grad_(), gallery.requires_grad_()),
    )


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["probe", "gallery", "neither"])
def test_gradient_of_one_side(needs: tuple[bool, bool], backend: str, device: torch.device) -> None:
    probe, gallery, index = make_case((2, 3), 7, device, indexed=True, normalize=True)
    check(probe, gallery, index, normalize=True, needs=needs)


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


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_upstream_gradients_of_any_scale(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Weights of tiny or huge upstream gradients neither vanish nor overflow on their way through half precision."""
    probe, gallery, index = make_case((2, 3), 16, device, indexed=True, normalize=True, dtype=dtype)
    gallery = gallery.float().requires_grad_()  # fp16 could not hold the result; the table is fp32
    pooled = ops.max_correlation(probe, gallery, index, None, True, False)[0]
    upstream = torch.randn(2, 3, 12, device=device)
    expected, *scaled = (
        torch.autograd.grad(pooled, gallery, upstream * scale, retain_graph=True)[0].double() / scale
        for scale in (1.0, 2.0**-30, 2.0**30)
    )
    for gradient in scaled:
        assert_gradients(gradient, expected, torch.float32)  # powers of two: the rounding is the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_upstream_element_reaches_one_location(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    probe, gallery, _ = make_case((2, 3), 7, device, indexed=False, normalize=False, dtype=dtype)
    probe.requires_grad_(), gallery.requires_grad_()
    pooled, argmax, *_ = ops.max_correlation(probe, gallery, None, None, False, False)
    for p, g, location in ((0, 0, 0), (1, 2, 4), (1, 0, 6), (0, 1, 11)):
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


@pytest.mark.parametrize(
    ("probe_layout", "gallery_layout", "indexed"),
    [
        ("contiguous", "channels_last", True),
        ("channels_last", "sliced", True),
        ("sliced", "transposed", False),
        ("transposed", "batch_innermost", True),
        ("batch_innermost", "contiguous", False),
    ],
)
def test_maps_of_any_layout(
    probe_layout: str, gallery_layout: str, indexed: bool, backend: str, device: torch.device
) -> None:
    probe, gallery, index = make_case((2, 3), 7, device, indexed=indexed, normalize=True)
    laid_probe, laid_gallery = LAYOUTS[probe_layout](probe), LAYOUTS[gallery_layout](gallery)
    assert torch.equal(laid_probe, probe)
    assert torch.equal(laid_gallery, gallery)
    got = check(laid_probe, laid_gallery, index, normalize=True)
    for gradient in (got.to_probe, got.to_gallery):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("indexed", "sparse_grad"), [(False, False), (True, True)], ids=["all", "index, sparse"])
def test_expanded_gallery(indexed: bool, sparse_grad: bool, backend: str, device: torch.device) -> None:
    """Gallery maps that share memory are still maps of their own, with gradients of their own."""
    probe, gallery, index = make_case((2, 3), 7, device, indexed=indexed, normalize=True)
    check(probe, gallery[:1].expand(3, -1, -1, -1), index, normalize=True, sparse_grad=sparse_grad)
    check(probe[:1].expand(2, -1, -1, -1), gallery, index, normalize=True, sparse_grad=sparse_grad)


# --- NaN, Inf


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")  # the interpreter's numpy
@pytest.mark.parametrize(
    ("locations", "indexed", "value", "normalize", "where"),
    pairwise([6, 65], EITHER, [torch.nan, torch.inf, -torch.inf], EITHER, ["probe", "gallery"]),
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
    # maps without a bad partner have a true gradient
    clean = [tensor.detach().double().nan_to_num(0, 0, 0).requires_grad_() for tensor in (probe, gallery)]
    reference.max_correlation(*map(reference.locations, clean), index, normalize).sum().backward()
    pairs = torch.ones(2, 3, dtype=torch.bool) if index is None else torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    affected = torch.zeros(2, 3, dtype=torch.bool)
    affected[0 if where == "probe" else slice(None), slice(None) if where == "probe" else 0] = True
    affected &= pairs
    for got, truth, whole in ((to_probe, clean[0], ~affected.any(1)), (to_gallery, clean[1], ~affected.any(0))):
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


@pytest.mark.parametrize(
    ("indexed", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)], ids=str
)
def test_repeats_are_bit_identical(indexed: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    index = torch.randint(3, (4, 3), device=device) if indexed else None
    probe = prepared_maps(4, 16, (2, 4), device, dtype).requires_grad_()
    gallery = raw_maps(3, 16, (2, 4), device).requires_grad_()
    upstream = torch.randn(4, 3, 16, device=device)
    runs = []
    for _ in range(2):
        outputs = ops.max_correlation(probe, gallery, index, None, True, False)
        runs.append((*outputs, *torch.autograd.grad(outputs[0], (probe, gallery), upstream)))
    assert all(map(torch.equal, *runs))


# --- functional.max_correlation


@pytest.mark.parametrize(
    ("dtype", "indexed", "occluded"),
    [
        (torch.float32, True, True),
        (torch.float32, False, False),
        (torch.float64, False, True),
        (torch.bfloat16, True, False),
        (torch.float16, False, True),
    ],
)
def test_functional_normalises_and_weights_by_visibility(
    occluded: bool, indexed: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Raw maps in, visibility on its own axis; gradients reach maps and visibilities."""
    height, width = 2, 3
    probe, gallery = (raw_maps(count, 33, (height, width), device, dtype) for count in (2, 3))
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
    decided = margin > 2 * TOLERANCES[dtype].tie  # both sides are rounded
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
    probe, gallery = (raw_maps(count, 33, (2, 3), device) for count in (2, 3))
    got = functional.max_correlation(probe.bfloat16(), gallery)
    exact = functional.max_correlation(probe.bfloat16().double(), gallery.double())
    assert got.dtype == torch.float32
    assert_values(got, exact, torch.bfloat16)
    assert (got - exact).abs().max() > 1e-4  # bf16 was really what was multiplied


def test_functional_under_autocast(backend: str, device: torch.device) -> None:
    probe, gallery = (raw_maps(count, 33, (2, 3), device).requires_grad_() for count in (2, 3))
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


def test_functional_of_empty_batches(device: torch.device) -> None:
    probe, gallery = raw_maps(2, 5, (2, 3), device), raw_maps(3, 5, (2, 3), device)
    assert functional.max_correlation(probe[:0], gallery).shape == (0, 3, 12)
    assert functional.max_correlation(probe, gallery[:0]).shape == (2, 0, 12)
    index = torch.zeros(0, 4, dtype=torch.int64, device=device)
    assert functional.max_correlation(probe[:0], gallery, index).shape == (0, 4, 12)
