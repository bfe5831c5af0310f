"""What the public functions refuse: the exact error, with what came in restated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from errors import META, refused

from qaconv_triton import functional

FLAT, FOUR_D = torch.ones(5, 12), torch.ones(5, 2, 3, 2)
MAPS, TABLE = torch.zeros(2, 5, 2, 3), torch.zeros(4, 5, 2, 3)

Call = Callable[[], object]


def topk(queries: object = FLAT, keys: object = FLAT, k: object = 2) -> Call:
    return lambda: functional.topk_cosine(queries, keys, k)


def graph(embeddings: object = FLAT, k: object = 2, **options: object) -> Call:
    return lambda: functional.class_neighbors(embeddings, k, **options)


def pooled(**arguments: object) -> Call:
    return lambda: functional.max_correlation(**{"probe": MAPS, "gallery": TABLE, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "restated"),
    [
        (topk(queries=[[1.0]]), TypeError, ("queries", "[N, D]", "list")),
        (topk(keys=None), TypeError, ("keys", "NoneType")),
        (topk(queries=FLAT[0]), ValueError, ("queries", "[N, D]", "[12]")),
        (topk(keys=FOUR_D[:, 0]), ValueError, ("keys", "[N, C, H, W]", "[5, 3, 2]")),
        (topk(queries=FLAT.int()), TypeError, ("queries", "torch.int32")),
        (topk(keys=FLAT.to(torch.complex64)), TypeError, ("keys", "torch.complex64")),
        (topk(keys=FLAT.bool()), TypeError, ("keys", "torch.bool")),
        (topk(keys=FLAT.to_sparse()), TypeError, ("keys", "dense", "sparse_coo")),
        (topk(keys=FLAT[:, :7]), ValueError, ("[5, 12]", "[5, 7]")),
        (topk(keys=FOUR_D), ValueError, ("[5, 12]", "[5, 2, 3, 2]")),  # the element count happens to fit
        (topk(queries=FOUR_D.mT, keys=FOUR_D), ValueError, ("[5, 2, 2, 3]", "[5, 2, 3, 2]")),
        (topk(keys=FLAT.half()), TypeError, ("torch.float32", "torch.float16")),
        (topk(keys=FLAT.to(META)), ValueError, ("queries", "cpu", "keys", "meta")),
        (topk(k=0), ValueError, ("k ", "between 1 and 5", "5 keys", "got 0")),
        (topk(k=-3), ValueError, ("k ", "got -3")),
        (topk(k=6), ValueError, ("k ", "between 1 and 5", "5 keys", "got 6")),
        (topk(keys=FLAT[:0], k=1), ValueError, ("k ", "0 keys", "got 1")),
        (topk(k=2.0), TypeError, ("k:", "int", "float")),
        (topk(k=True), TypeError, ("k:", "int", "bool")),
        (topk(k=torch.tensor(2.0)), TypeError, ("k:", "int", "Tensor")),
        (graph(embeddings="table"), TypeError, ("embeddings", "str")),
        (graph(embeddings=FLAT[0]), ValueError, ("embeddings", "[12]")),
        (graph(embeddings=FOUR_D[:, 0]), ValueError, ("embeddings", "[5, 3, 2]")),
        (graph(embeddings=FOUR_D[None]), ValueError, ("embeddings", "[1, 5, 2, 3, 2]")),
        (graph(embeddings=FLAT.long()), TypeError, ("embeddings", "torch.int64")),
        (graph(embeddings=FLAT.to(torch.complex128)), TypeError, ("embeddings", "torch.complex128")),
        (graph(embeddings=FLAT.to_sparse()), TypeError, ("embeddings", "dense", "sparse_coo")),
        (graph(embeddings=FLAT.to(META)), ValueError, ("meta",)),
        (graph(k=0), ValueError, ("k ", "between 1 and 4", "5 classes", "got 0")),
        (graph(k=5), ValueError, ("k ", "between 1 and 4", "5 classes", "got 5")),
        (graph(embeddings=FLAT[:1], k=1), ValueError, ("k ", "1 classes", "got 1")),
        (graph(embeddings=FLAT[:0], k=1), ValueError, ("k ", "0 classes", "got 1")),
        (graph(k="2"), TypeError, ("k:", "int", "str")),
        (graph(k=1.0), TypeError, ("k:", "int", "float")),
        (graph(k=False), TypeError, ("k:", "int", "bool")),
        (graph(previous=[[1]]), TypeError, ("previous", "int64", "[5, 2]", "list")),
        (graph(previous=torch.zeros(5, 2)), TypeError, ("previous", "torch.float32")),
        (graph(previous=torch.zeros(5, 3, dtype=torch.int64)), ValueError, ("previous", "[5, 2]", "[5, 3]")),
        (graph(previous=torch.full((5, 2), 5)), IndexError, ("previous", "[0, 5)", "5")),
        (graph(previous=torch.zeros(5, 2, dtype=torch.int64, device=META)), ValueError, ("previous", "meta")),
        (graph(dtype=torch.int32), TypeError, ("dtype", "torch.int32")),
        (graph(dtype=torch.float64), ValueError, ("torch.float64", "torch.float32")),
        (graph(workspace_bytes=0), ValueError, ("workspace_bytes", "got 0")),
        (graph(workspace_bytes=1e9), TypeError, ("workspace_bytes", "float")),
        (graph(progress=5), TypeError, ("progress", "5")),
        (graph(rescore=1), TypeError, ("rescore", "1")),
        (graph(return_similarities=1), TypeError, ("return_similarities",)),
        (graph(device="foo"), ValueError, ("device", "'foo'")),
        (graph(device=3.0), TypeError, ("device", "float")),
        (graph(device="meta"), ValueError, ("meta",)),
        (pooled(probe=[[1.0]]), TypeError, ("probe", "list")),
        (pooled(probe=MAPS[0]), ValueError, ("probe", "[B, C, H, W]", "[5, 2, 3]")),
        (pooled(probe=MAPS.long()), TypeError, ("probe", "torch.int64")),
        (pooled(probe=MAPS.to(torch.complex64)), TypeError, ("probe", "torch.complex64")),
        (pooled(gallery=None), TypeError, ("gallery", "NoneType")),
        (pooled(gallery=TABLE.flatten(2)), ValueError, ("gallery", "[B, 5, 2, 3]", "[4, 5, 6]")),
        (pooled(gallery=torch.zeros(4, 6, 2, 3)), ValueError, ("gallery", "[B, 5, 2, 3]", "[4, 6, 2, 3]")),
        (pooled(gallery=TABLE.mT), ValueError, ("gallery", "[B, 5, 2, 3]", "[4, 5, 3, 2]")),
        (pooled(gallery=TABLE.int()), TypeError, ("gallery", "torch.int32")),
        (pooled(gallery=TABLE.to_sparse()), TypeError, ("gallery", "sparse_coo")),
        (pooled(gallery=TABLE.to(META)), ValueError, ("gallery", "meta", "probe", "cpu")),
        (pooled(probe_occ=1.0), TypeError, ("probe_occ", "[2, 1, 2, 3]", "float")),
        (pooled(probe_occ=torch.ones(4, 1, 2, 3)), ValueError, ("probe_occ", "[2, 1, 2, 3]", "[4, 1, 2, 3]")),
        (pooled(probe_occ=torch.ones(2, 1, 3, 2)), ValueError, ("probe_occ", "[2, 1, 2, 3]", "[2, 1, 3, 2]")),
        (pooled(probe_occ=torch.ones(2, 5, 2, 3)), ValueError, ("probe_occ", "[2, 1, 2, 3]", "[2, 5, 2, 3]")),
        (pooled(probe_occ=torch.ones(2, 1, 2, 3).bool()), TypeError, ("probe_occ", "torch.bool")),
        (pooled(gallery_occ=torch.ones(2, 1, 2, 3)), ValueError, ("gallery_occ", "[4, 1, 2, 3]", "[2, 1, 2, 3]")),
        (pooled(gallery_occ=torch.ones(4, 1, 2, 3, device=META)), ValueError, ("gallery_occ", "meta", "cpu")),
        (pooled(index=[[0], [1]]), TypeError, ("index", "[2, K]", "list")),
        (pooled(index=torch.zeros(2, 3)), TypeError, ("index", "int64", "torch.float32")),
        (pooled(index=torch.zeros(2, 3).int()), TypeError, ("index", "int64", "torch.int32")),
        (pooled(index=torch.zeros(2).long()), ValueError, ("index", "[2, K]", "[2]")),
        (pooled(index=torch.zeros(3, 2).long()), ValueError, ("index", "[2, K]", "[3, 2]")),
        (pooled(index=torch.zeros(2, 3, device=META).long()), ValueError, ("index", "meta", "cpu")),
        (pooled(index=torch.tensor([[0, 4], [1, 17]])), IndexError, ("index", "[0, 4)", "[4, 17]")),
        (pooled(index=torch.tensor([[0, -1], [1, 3]])), IndexError, ("index", "[0, 4)", "[-1]")),
    ],
)
def test_bad_arguments_are_refused(call: Call, error: type[Exception], restated: tuple[str, ...]) -> None:
    with refused(error, restated):
        call()


@pytest.mark.parametrize(
    ("shape", "dtype", "value"),
    [
        ((9, 6), torch.float32, torch.nan),
        ((9, 2, 3, 1), torch.bfloat16, torch.inf),
        ((9, 6), torch.float16, -torch.inf),
        ((9, 2, 3, 1), torch.float64, torch.nan),
    ],
)
def test_classes_that_are_not_finite_are_named(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> None:
    embeddings = torch.randn(shape).to(dtype)
    embeddings[4].flatten()[3] = value
    with refused(ValueError, ("embeddings", "1 of 9 classes, first: [4]")):
        functional.class_neighbors(embeddings, 2)
    embeddings[[1, 2, 3, 6, 7]] = value
    with refused(ValueError, ("embeddings", "6 of 9 classes, first: [1, 2, 3, 4, 6]")):
        functional.class_neighbors(embeddings, 2)


@pytest.mark.parametrize("call", [topk, graph, pooled])
def test_unknown_backend(call: Callable[[], Call], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "cuda")
    with refused(ValueError, ("QACONV_TRITON_BACKEND", "'cuda'")):
        call()()


def test_sizes_of_any_integer_type() -> None:
    class Three:
        def __index__(self) -> int:
            return 3

    assert functional.class_neighbors(torch.eye(4), np.int64(2), workspace_bytes=np.int64(10**6)).shape == (4, 2)  # type: ignore[call-overload]
    assert functional.topk_cosine(torch.eye(4), torch.eye(4), Three())[1].shape == (4, 3)  # type: ignore[arg-type]
