"""Maps and embeddings of any finite norm are normalised right, forward and backward.

Lengths are powers of two here, so that the truth is known: the unit vector does not depend on the length, and the
gradient is that of vectors of ordinary length, divided by it. Those are vectors for fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import TOLERANCES, assert_close, assert_gradients, assert_values
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qaconv_triton import QAConv, functional, ops, reference
from qaconv_triton.common import norms

# of the longest and shortest vectors, and of those around the places where squares, cubes or products leave the range
EXPONENTS = {
    torch.float64: [-1074, -1060, -1022, -565, -532, -400, 0, 340, 400, 511, 565, 1010, 1020],
    torch.float32: [-149, -140, -126, -75, -51, -43, 0, 43, 50, 64, 90, 120, 124],
    torch.bfloat16: [-120, -75, -43, 0, 43, 64, 124],
    torch.float16: [-20, -14, -7, 0, 6, 12],
}

# NumPy's, of interpreted kernels: products that a second launch replaces
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def lengthen(ordinary: Tensor, exponents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ordinary` (fp64) times 2^exponents, rounded to `dtype`; and what that is, of ordinary length, in fp64."""
    # in two steps: the factor itself may be beyond fp64
    half = exponents // 2
    values = (ordinary * torch.exp2(half.double()) * torch.exp2((exponents - half).double())).to(dtype)
    return values, values.double() * torch.exp2(-half.double()) * torch.exp2((half - exponents).double())


def exponents_for(dtype: torch.dtype, *shape: int) -> Tensor:
    """Exponents of `dtype`, every one of them, in `shape [B, 1, H, W]`."""
    known = torch.tensor(EXPONENTS[dtype])
    count = torch.Size(shape).numel()
    assert count >= len(known)
    return known.repeat(-(-count // len(known)))[:count][torch.randperm(count)].view(shape)


def shorten(gradient: Tensor, exponents: Tensor) -> Tensor:
    """A gradient to vectors times 2^exponents as one to vectors of ordinary length, in fp64."""
    half = exponents // 2
    return gradient.double() * torch.exp2(half.double()) * torch.exp2((exponents - half).double())


def representable(gradient: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the vectors' gradient, `gradient` times 2^-exponents, is within the range of `dtype`: `[B, 1, H, W]`."""
    largest = gradient.abs().amax(1, keepdim=True).log2() - exponents
    smallest = torch.where(gradient == 0, torch.inf, gradient.abs()).amin(1, keepdim=True).log2() - exponents
    limits = torch.finfo(dtype)
    low, high = torch.tensor([limits.tiny, limits.max], dtype=torch.float64).log2()
    return ((largest < high - 1) & (smallest > low + 1)) | (largest == -torch.inf)


def assert_gradients_of_lengthened(got: Tensor, true: Tensor, exponents: Tensor, dtype: torch.dtype) -> None:
    """Assert that `got` is `true` times 2^-exponents, within `dtype`, where its own dtype can hold that: mostly.

    Elsewhere it is as near as its dtype comes: Inf and small numbers, but no NaN.
    """
    within = representable(true, exponents, got.dtype)
    assert within.double().mean() > 0.5
    assert not got.isnan().any()
    assert_gradients(torch.where(within, shorten(got, exponents).nan_to_num(), 0), torch.where(within, true, 0), dtype)


# --- normalisation


@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_maps_of_any_length(weighted: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    exponents = exponents_for(dtype, 3, 1, 3, 5)
    maps, ordinary = lengthen(torch.randn(3, 12, 3, 5, dtype=torch.float64), exponents, dtype)
    visibility = torch.rand(3, 1, 3, 5) if weighted else None
    upstream = torch.randn(3, 12, 3, 5, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (ordinary, visibility) if tensor is not None]
    expected = F.normalize(ordinary, dim=1, eps=0.0) * (1.0 if visibility is None else visibility.double())
    to_maps, *to_visibility = torch.autograd.grad(expected, leaves, upstream)

    inputs = [tensor.detach().to(device).requires_grad_() for tensor in (maps, visibility) if tensor is not None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    unit = functional.prepare_maps(inputs[0], inputs[1] if weighted else None, wide)
    got, *got_visibility = torch.autograd.grad(unit, inputs, upstream.to(device, wide))
    assert_values(unit.cpu(), expected.detach(), wide)
    assert_gradients_of_lengthened(got.cpu(), to_maps, exponents, dtype)
    if weighted:
        assert_gradients(got_visibility[0].cpu(), to_visibility[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_a_vector_of_unlike_channels(exponent: int, dtype: torch.dtype) -> None:
    """One huge channel beside tiny ones: their squares vanish, not their gradients."""
    values = torch.tensor([[1.0, 2.0**-30, -(2.0**-40)], [3.0, 0.0, 2.0**-20]], dtype=torch.float64)
    maps, ordinary = lengthen(values, torch.tensor(exponent), dtype)
    upstream = torch.tensor([[0.5, 1.0, 2.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    expected = F.normalize(ordinary.requires_grad_(), dim=1)
    expected.backward(upstream)
    unit = reference.normalize(maps.requires_grad_())
    unit.backward(upstream.to(dtype))
    relative = TOLERANCES[torch.float32].value  # channel by channel: they differ by 2^40
    torch.testing.assert_close(unit.double(), expected, rtol=relative, atol=0)
    gradient = shorten(maps.grad, torch.tensor(exponent))
    torch.testing.assert_close(gradient, ordinary.grad, rtol=relative, atol=1e-6)  # the radial part cancels


def test_a_length_beyond_the_largest_number(backend: str, device: torch.device) -> None:
    maps = torch.full((1, 64, 1, 1), 3e38, device=device, requires_grad=True)
    unit = functional.prepare_maps(maps, None, torch.float32)
    unit[:, :32].sum().backward()
    assert_close(unit, torch.full_like(unit, 0.125), torch.float32)
    true = torch.tensor([0.5] * 32 + [-0.5] * 32, dtype=torch.float64) / 8
    assert_close(maps.grad.flatten().double() * 3e38, true, torch.float32)


@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
def test_zero_vectors_among_any_others(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    maps, _ = lengthen(torch.randn(2, 4, 1, 13, dtype=torch.float64), exponents_for(dtype, 2, 1, 1, 13), dtype)
    maps[:, :, :, ::3] = 0
    maps = maps.to(device).requires_grad_()
    unit = functional.prepare_maps(maps, None, dtype)
    unit.backward(torch.randn_like(unit))
    assert unit[..., ::3].eq(0).all()
    assert maps.grad[..., ::3].eq(0).all()
    assert maps.grad.isnan().logical_not().all()
    assert unit[..., 1::3].norm(dim=1).sub(1).abs().max() < TOLERANCES[dtype].value


def test_prepared_maps_gradcheck() -> None:
    maps = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    visibility = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: functional.prepare_maps(*inputs, torch.float64), (maps, visibility))


class Unread(TorchDispatchMode):
    """Refuses to read a value back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_is_read_back_to_normalise(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    module = ops._backend("prepare_maps", device, dtype)
    maps, visibility = (torch.rand(shape, dtype=dtype, device=device) for shape in ((2, 4, 3), (2, 4)))
    with Unread():
        prepared, factors = module.prepare_maps(maps, visibility, dtype)
        module.prepare_maps_backward(prepared, maps, visibility, factors, False)
    with Unread(), pytest.raises(AssertionError):
        maps.sum().item()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_not_finite_stays_at_its_location(
    bad: float, rounded: bool, backend: str, device: torch.device
) -> None:
    maps = torch.randn(2, 5, 2, 2, device=device)
    maps[:, :, 0, 0] *= 1e30
    results = []
    for values in (maps, maps.index_put(tuple(torch.tensor([1, 2, 1, 0]).to(device)), maps.new_tensor(bad))):
        values = values.clone().requires_grad_()
        unit = functional.prepare_maps(values, None, torch.bfloat16 if rounded else torch.float32)
        upstream = torch.linspace(-1, 1, unit.numel(), device=device).view_as(unit).to(unit.dtype)
        results.append((unit.detach(), *torch.autograd.grad(unit, values, upstream)))
    for clean, found in zip(*results, strict=True):
        assert found[1, :, 1, 0].isnan().any()
        found[1, :, 1, 0] = clean[1, :, 1, 0]
        assert torch.equal(found, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_and_visibility_however_they_lie(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The same from any memory, in any shape and dtype of visibility; the gradients come back as these.

    Within a rounding of their dtypes: for another layout the compiler may sum in another order.
    """
    shape = (3, 150, 5, 4)
    maps, visibility = torch.randn(shape, device=device).to(dtype), torch.rand(3, 1, 5, 4, device=device).half()
    wide = torch.randn(6, 300, 5, 4, device=device).to(dtype)
    wide[::2, 1::2] = maps
    upstream = torch.randn(shape, device=device)
    results = []
    for laid_out, weights in (
        (maps, visibility),
        (maps.contiguous(memory_format=torch.channels_last), visibility.squeeze(1)),
        (wide[::2, 1::2], visibility.double()),
        (maps.mT.contiguous().mT, visibility.mT.contiguous().mT.float()),
    ):
        inputs = laid_out.requires_grad_(), weights.requires_grad_()
        prepared = functional.prepare_maps(*inputs, torch.bfloat16)
        assert prepared.is_contiguous(memory_format=torch.channels_last)
        gradients = torch.autograd.grad(prepared, inputs, upstream.bfloat16())
        assert [each.dtype for each in gradients] == [each.dtype for each in inputs]
        assert [each.shape for each in gradients] == [each.shape for each in inputs]
        results.append((prepared.detach(), gradients[0], gradients[1].view_as(visibility).half()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


# --- inverse norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_norms_of_any_length(dtype: torch.dtype) -> None:
    exponents = exponents_for(dtype, 30, 1)
    vectors, ordinary = lengthen(torch.randn(30, 7, dtype=torch.float64), exponents, dtype)
    inverse = norms.inverse_norms(vectors)
    scale, factor = norms.scale_and_inverse(inverse)
    assert scale.isfinite().all()
    assert factor.isfinite().all()
    true = 1 / ordinary.norm(dim=1)
    got = shorten(factor, exponents.squeeze(1)) * scale.double()
    assert_close(got / true, torch.ones(30), torch.float32)
    assert_values(norms.normalized(vectors, inverse), F.normalize(ordinary, dim=1, eps=0.0), dtype)
    scaled, inverse = norms.with_norms(vectors)
    assert_values(scaled * inverse.unsqueeze(1), F.normalize(ordinary, dim=1, eps=0.0), dtype)
    assert torch.equal(vectors.sign(), scaled.sign())


@pytest.mark.parametrize("shape", [(30, 7), (5, 6, 7), (0, 7)])
def test_inverse_norms_do_not_depend_on_blocks_of_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(shape, device="cpu").bfloat16()
    expected = norms.inverse_norms(vectors)
    monkeypatch.setattr(norms, "COPIED_VALUES", 2 * vectors[:1].numel() + 1)
    assert torch.equal(norms.inverse_norms(vectors), expected)


# --- raw gallery maps, as of a class table


def raw_case(dtype: torch.dtype, gallery_dtype: torch.dtype, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Prepared probes `[3, C, H, W]`, raw gallery maps `[4, C, H, W]` of any length, the same of ordinary length."""
    channels, locations = 20, size[0] * size[1]
    probe = F.normalize(torch.randn(3, channels, *size), dim=1).to(dtype)
    exponents = exponents_for(gallery_dtype, 4, 1, *size)
    if gallery_dtype == torch.float32:
        exponents = exponents.clamp(min=-135)  # shorter ones have so few bits that matches are equal
    common = torch.randn(1, channels, locations, dtype=torch.float64)[:, :, torch.randperm(locations)].view(
        1, channels, *size
    )
    gallery, ordinary = lengthen(
        common + torch.randn(4, channels, *size, dtype=torch.float64), exponents, gallery_dtype
    )
    return probe, gallery, ordinary, exponents


@pytest.mark.parametrize(
    ("dtype", "gallery_dtype", "size", "indexed"),
    [
        (torch.float32, torch.float32, (2, 3), True),
        (torch.float32, torch.float32, (2, 3), False),
        pytest.param(torch.float32, torch.float32, (11, 6), True, marks=pytest.mark.slow),  # of more than one tile
        (torch.bfloat16, torch.float32, (2, 3), True),
        (torch.bfloat16, torch.bfloat16, (2, 3), True),
        (torch.float16, torch.float32, (2, 3), True),
        (torch.float64, torch.float64, (2, 3), True),
    ],
    ids=str,
)
def test_raw_maps_of_any_length(
    dtype: torch.dtype, gallery_dtype: torch.dtype, size: tuple[int, int], indexed: bool, backend: str,
    device: torch.device,
) -> None:  # fmt: skip
    probe, gallery, ordinary, exponents = raw_case(dtype, gallery_dtype, size)
    index = torch.tensor([[2, 0], [1, 3], [2, 2]], device=device) if indexed else None
    true_probe, true_gallery = probe.to(torch.float64, copy=True).requires_grad_(), ordinary.requires_grad_()
    expected = reference.max_correlation(
        reference.locations(true_probe), reference.locations(true_gallery), None if index is None else index.cpu(), True
    )
    probe, gallery = probe.to(device).requires_grad_(), gallery.to(device).requires_grad_()
    pooled = ops.max_correlation(probe, gallery, index, None, True, False)[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # where the maps are rounded to half precision, so may be which location is best: both get no gradient then
    coarse = dtype if dtype in (torch.bfloat16, torch.float16) else wide
    assert_values(pooled.cpu(), expected, coarse)
    upstream = torch.randn_like(expected)
    if coarse != wide:
        upstream *= margins(true_probe.detach(), ordinary.detach(), index) > 0.03
    expected.backward(upstream)
    pooled.backward(upstream.to(device, pooled.dtype))
    assert_gradients(probe.grad.cpu(), true_probe.grad, dtype)
    assert_gradients_of_lengthened(gallery.grad.cpu(), true_gallery.grad, exponents, coarse)
    weight = torch.rand(pooled.shape[-1], dtype=pooled.dtype, device=device) / pooled.shape[-1]
    sums = ops.pair_sums(probe.detach(), gallery.detach(), index, None, True, weight)
    assert_values(sums.cpu(), expected.detach() @ weight.cpu().double(), coarse)


def margins(probe: Tensor, gallery: Tensor, index: Tensor | None) -> Tensor:
    """By how much a pooled value's location is better than the second best, `[P, K, 2S]`."""
    probe, gallery = reference.locations(probe), reference.normalize(reference.locations(gallery))
    near = gallery.expand(len(probe), *gallery.shape) if index is None else gallery[index.cpu()]
    corr = torch.einsum("psc,pkrc->pkrs", probe, near)
    best = [corr.topk(2, dim=axis).values.diff(dim=axis).abs().squeeze(axis) for axis in (2, 3)]
    return torch.cat(best, dim=-1)


@pytest.mark.parametrize("length", [1.0, 1e30, 1e-30])
def test_what_is_not_finite_stays_in_its_pairs(length: float, backend: str, device: torch.device) -> None:
    """NaN and Inf at a location, beside zero vectors and maps of any length."""
    probe = F.normalize(torch.randn(2, 6, 2, 2), dim=1)
    gallery = torch.randn(4, 6, 2, 2)
    gallery[0, :, 0, 0] = 0
    gallery[1, 3, 0, 1] = torch.nan
    gallery[2, 2, 1, 1] = torch.inf
    expected = reference.max_correlation(reference.locations(probe), reference.locations(gallery), None, True)
    scaled = gallery.clone()
    scaled[:, :, :, 1] *= length
    pooled = ops.max_correlation(probe.to(device), scaled.to(device), None, None, True, False)[0].cpu()
    assert expected[:, [0, 3]].isfinite().all()
    assert expected[:, 1:3].isnan().sum() == 2 * 2 * 5
    assert_values(pooled, expected, torch.float32)


# --- the class path, and class graphs


@pytest.mark.parametrize("length", [3e37, 1e-38])
def test_class_tables_of_any_length(length: float, backend: str, device: torch.device) -> None:
    """A class table of 3e38 gave NaN, one of 1e20 zeros."""
    matcher = QAConv(8, 2, 2, num_classes=5, k_nearest=2).to(device)
    features = torch.randn(3, 8, 2, 2, device=device)
    labels = torch.tensor([0, 4, 4], device=device)
    upstream = torch.randn(3, 2, device=device)

    def run() -> tuple[Tensor, ...]:
        maps = features.clone().requires_grad_()
        scores = matcher.train().class_scores(maps, labels)
        gradients = torch.autograd.grad(scores.values, (maps, matcher.class_embed), upstream)
        with torch.no_grad():
            alone = matcher.eval().class_scores(maps, labels).values
        return scores.classes, scores.values.detach(), alone, *gradients

    classes, values, alone, to_maps, to_table = run()
    matcher.bn.reset_running_stats()
    matcher.logit_bn.reset_running_stats()
    matcher.reset_class_neighbors()
    with torch.no_grad():
        matcher.class_embed.mul_(length)
    got = run()
    assert torch.equal(got[0], classes)
    assert_close(got[1], values, torch.float32)
    assert_close(got[2], alone, torch.float32)
    assert_gradients(got[3], to_maps, torch.float32)
    within = to_table.abs() / length
    within = ((within < 1e38) & (within > 1e-37)) | (to_table == 0)
    assert within.double().mean() > 0.5 or length > 1e30
    assert_gradients(torch.where(within, got[4].double() * length, 0), torch.where(within, to_table, 0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embeddings_of_any_length(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    exponents = exponents_for(dtype, 60, 1)
    table, ordinary = lengthen(torch.randint(-3, 4, (60, 16)).double(), exponents, dtype)
    unit = F.normalize(ordinary, dim=1, eps=0.0)
    similarity = unit @ unit.mT
    queries = functional.topk_cosine(table.to(device), table.to(device), 5)
    graph = functional.class_neighbors(table.to(device), 5, return_similarities=True)
    for (values, ids), truth in ((queries, similarity), (graph, similarity.clone().fill_diagonal_(-torch.inf))):
        best = truth.topk(5).values
        assert (truth.gather(1, ids.cpu()) - best).abs().max() < TOLERANCES[torch.float32].value
        assert_values(values.cpu(), best, torch.float32 if dtype == torch.bfloat16 else dtype)


# --- settings of the process


@pytest.mark.parametrize("indexed", [False, True])
def test_products_of_bf16_change_no_setting(
    indexed: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Not for a moment: other threads multiply meanwhile. And they are exact, with sums in fp32."""

    def fail(*_: Any) -> None:
        raise AssertionError("a setting of the process was changed")

    setter = "_set_fp32_precision_setter"
    if hasattr(torch._C, setter):  # torch >= 2.9
        monkeypatch.setattr(torch._C, setter, fail)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", fail)
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    probe, gallery = (F.normalize(torch.randn(3, 64, 3, 3), dim=1).bfloat16() for _ in range(2))
    index = torch.tensor([[0, 2], [1, 1], [2, 0]]) if indexed else None
    expected = reference.max_correlation(*(reference.locations(maps.double()) for maps in (probe, gallery)), index)
    index = None if index is None else index.to(device)
    pooled = ops.max_correlation(probe.to(device), gallery.to(device), index, None, False, False)[0]
    assert_values(pooled.cpu(), expected, torch.float32)
