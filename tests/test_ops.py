"""The ops are registered as torch wants them: schema, fake, autograd, by `torch.library.opcheck`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import DEVICE, S, ids, maps
from torch.nn import functional as F

from qaconv_triton import ops

EVERY_CHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def correlation_inputs(kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    probe, gallery = (F.normalize(maps(count, seed), dim=1).to(dtype) for count, seed in ((4, 1), (5, 2)))
    index, group = ids([[0, 3], [4, 1], [0, 3], [2, 2]]), ids([1, 4, 1, 0])
    return {
        "all pairs": (probe, gallery, None, None, False, False),
        "all raw classes": (probe, gallery * 3, None, None, True, False),
        "index": (probe, gallery, index, None, False, False),
        "grouped raw classes": (probe, gallery * 3, index, group, True, False),
        "classes in another dtype": (probe, gallery.float(), index, group, True, False),
        "channels last": (
            probe.contiguous(memory_format=torch.channels_last),
            gallery.contiguous(memory_format=torch.channels_last),
            index,
            None,
            True,
            False,
        ),
        "not contiguous": (probe.flip(0).mT.contiguous().mT, gallery[::2], None, None, False, False),
        "no probes": (probe[:0], gallery, index[:0], group[:0], True, False),
        "no gallery": (probe, gallery[:0], None, None, False, False),
    }[kind]


def check_registration(kind: str, dtype: torch.dtype, checks: tuple[str, ...]) -> None:
    probe, gallery, *others = correlation_inputs(kind, dtype)
    inputs = (probe.requires_grad_(), gallery.requires_grad_(), *others)
    torch.library.opcheck(ops.max_correlation, inputs, test_utils=checks)


@pytest.mark.parametrize(
    "kind",
    ["all pairs", "all raw classes", "index", "grouped raw classes", "classes in another dtype", "channels last",
     "not contiguous", "no probes", "no gallery"],
)  # fmt: skip
def test_max_correlation(kind: str) -> None:
    whole = kind in ("all pairs", "grouped raw classes", "no probes")
    check_registration(kind, torch.float32, EVERY_CHECK if whole else EVERY_CHECK[:3])  # the last one takes seconds


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.float16), ("triton", torch.float32), ("triton", torch.bfloat16)],
    indirect=["backend"],
)
def test_max_correlation_in_every_dtype_and_on_the_kernels(backend: str, dtype: torch.dtype) -> None:
    for kind in ("all pairs", "classes in another dtype"):
        check_registration(kind, dtype, EVERY_CHECK[:3])


@pytest.mark.parametrize("gradient", ["probe", "gallery", "none"])
def test_max_correlation_with_fewer_gradients(gradient: str) -> None:
    probe, gallery, *others = correlation_inputs("grouped raw classes", torch.float32)
    probe.requires_grad_(gradient == "probe")
    gallery.requires_grad_(gradient == "gallery")
    torch.library.opcheck(ops.max_correlation, (probe, gallery, *others))


@pytest.mark.parametrize(
    ("backend", "kind", "needs", "dtype"),
    [
        ("torch", "all pairs", (True, True), torch.float32),
        ("torch", "grouped raw classes", (True, False), torch.float64),
        ("torch", "grouped raw classes", (False, True), torch.float32),
        ("torch", "no probes", (True, True), torch.float32),
        ("triton", "grouped raw classes", (True, True), torch.float32),
        ("triton", "classes in another dtype", (True, True), torch.bfloat16),
    ],
    indirect=["backend"],
)
def test_max_correlation_backward(backend: str, kind: str, needs: tuple[bool, bool], dtype: torch.dtype) -> None:
    probe, gallery, index, group, *options = correlation_inputs(kind, dtype)
    saved = ops.max_correlation(probe, gallery, index, group, *options)
    grad = torch.randn_like(saved[0])
    for rows in (None,) if index is None else (None, index.unique()):
        torch.library.opcheck(ops.max_correlation_backward, (grad, *saved, probe, gallery, index, group, rows, *needs))


@pytest.mark.parametrize(
    ("kind", "dtype", "out_dtype"),
    [
        ("plain", torch.float32, torch.float32),
        ("channels last", torch.float32, torch.float32),
        ("visibility", torch.float32, torch.bfloat16),
        ("channels last", torch.bfloat16, torch.bfloat16),
        ("not contiguous", torch.float16, torch.float32),
        ("none", torch.float32, torch.float32),
        ("visibility", torch.float64, torch.float64),
        ("visibility", torch.float32, torch.float64),
    ],
    ids=str,
)
def test_prepare_maps(backend: str, kind: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    feature = maps(4, 1).to(dtype)
    visibility = torch.rand(4, 1, *feature.shape[2:], device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    feature = {
        "channels last": feature.contiguous(memory_format=torch.channels_last),
        "not contiguous": feature.flip(0).mT.contiguous().mT[::2],
        "none": feature[:0],
    }.get(kind, feature)
    weights = visibility if kind == "visibility" else None
    prepared, factors = ops.prepare_maps(feature, weights, out_dtype)
    grad = torch.randn_like(prepared)
    for is_unit in (False, True) if dtype == out_dtype and weights is None else (False,):
        given = grad, prepared if is_unit else feature, weights, factors, is_unit
        torch.library.opcheck(ops.prepare_maps_backward, given, test_utils=EVERY_CHECK[:3])
    inputs = feature.requires_grad_(), None if weights is None else weights.requires_grad_(), out_dtype
    checks = EVERY_CHECK if out_dtype == torch.bfloat16 else EVERY_CHECK[:3]
    torch.library.opcheck(ops.prepare_maps, inputs, test_utils=checks)


@pytest.mark.parametrize("indexed", [False, True], ids=["all", "index"])
def test_pair_sums(indexed: bool) -> None:
    probe, gallery, index, *_ = correlation_inputs("index", torch.float32)
    weight = torch.ones(2 * S, device=DEVICE)
    torch.library.opcheck(ops.pair_sums, (probe, gallery, index if indexed else None, None, True, weight))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.float32)],
    indirect=["backend"],
)
def test_cosine_topk(backend: str, dtype: torch.dtype) -> None:
    queries, keys = maps(4, 0, dtype, (7,)), maps(6, 1, dtype, (7,))
    for arguments in (
        (queries, keys, 2),
        (keys, None, 5),
        (queries.T.contiguous().T, keys[::2], 3),
        (queries[:0], keys, 1),
    ):
        torch.library.opcheck(ops.cosine_topk, (*arguments, None, None, None, None))
