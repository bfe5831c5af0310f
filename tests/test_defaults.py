"""Results depend neither on torch's default dtype nor on its default device: every allocation names both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inputs import torch_default
from tolerances import assert_values
from torch import Tensor
from torch.nn.functional import normalize

from qaconv_triton import QAConv
from qaconv_triton.evaluation import (
    average_queries,
    k_reciprocal_rerank,
    load_features,
    rank_gallery,
    reid_metrics,
    save_features,
    verification_metrics,
)
from qaconv_triton.functional import class_neighbors, max_correlation, topk_cosine

# float64 widens what is left open, bfloat16 rounds it; the kernels' launchers and the CPU path allocate their own.
CASES = [("torch", torch.bfloat16), ("torch", torch.float64), ("torch", "meta")]
CASES += [("triton", torch.bfloat16), ("triton", "meta")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def value(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype | str:
    """The other default; and the backend."""
    backend, value = request.param
    monkeypatch.setenv("QACONV_TRITON_BACKEND", backend)
    return value


def check(call: Callable[[], tuple[Tensor, ...]], value: torch.dtype | str) -> None:
    """Assert that `call` returns the same under another default: values, dtypes and devices."""
    expected = call()
    with torch_default(value):
        results = call()
    for got, true in zip(results, expected, strict=True):
        assert (got.dtype, got.device, got.layout) == (true.dtype, true.device, true.layout)
        got, true = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in (got, true))
        if true.is_floating_point():
            assert_values(got, true, true.dtype)
        else:
            assert torch.equal(got, true)


def integer_embeddings(count: int, device: torch.device) -> Tensor:
    """Embeddings of small integers, whose products are exact in fp32 whatever the order of the sum."""
    return torch.randint(-3, 4, (count, 24), device=device).float()


def test_class_neighbors(value: torch.dtype | str, device: torch.device) -> None:
    table = integer_embeddings(60, device)

    def call() -> tuple[Tensor, ...]:
        found = class_neighbors(table, 3, return_similarities=True)
        return *found, class_neighbors(table, 3, previous=found[1])

    check(call, value)


def test_rescored_neighbors(value: torch.dtype | str, device: torch.device) -> None:
    """Similarities kept in the default dtype mixed up neighbours that differ by less than its rounding."""
    table = normalize(torch.randn(1, 24, device=device) + 0.1 * torch.randn(60, 24, device=device))
    similarity = table.double() @ table.double().mT
    with torch_default(value):
        similarities, neighbors = class_neighbors(table, 9, rescore=True, return_similarities=True)
    best = similarity.fill_diagonal_(-torch.inf).topk(9).values
    assert similarities.dtype == torch.float32
    assert (similarity.gather(1, neighbors) - best).abs().max() < 1e-6  # far below the rounding of bf16


def test_topk_cosine(value: torch.dtype | str, device: torch.device) -> None:
    queries, keys = integer_embeddings(20, device), integer_embeddings(60, device)
    check(lambda: topk_cosine(queries, keys, 5) + topk_cosine(queries.double(), keys.double(), 5), value)


def test_max_correlation(value: torch.dtype | str, device: torch.device) -> None:
    probe, gallery = (torch.randn(count, 8, 3, 2, device=device, requires_grad=True) for count in (3, 4))
    visibility = torch.rand(3, 1, 3, 2, device=device)
    index = torch.tensor([[0, 2], [3, 1], [2, 2]], device=device)

    def call() -> tuple[Tensor, ...]:
        every = max_correlation(probe, gallery, probe_occ=visibility)
        some = max_correlation(probe, gallery, index, probe_occ=visibility)
        return every, some, *torch.autograd.grad(every.square().sum() + some.square().sum(), (probe, gallery))

    check(call, value)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, of interpreted kernels
@pytest.mark.parametrize(("length", "sparse_grad"), [(1.0, False), (1e30, True)], ids=["dense", "out of range, sparse"])
def test_class_path(length: float, sparse_grad: bool, value: torch.dtype | str, device: torch.device) -> None:
    matcher = QAConv(8, 3, 2, num_classes=7, k_nearest=2, include_self=True, sparse_grad=sparse_grad).to(device)
    with torch.no_grad():
        matcher.class_embed.mul_(length)
    features = torch.randn(3, 8, 3, 2, device=device, requires_grad=True)
    labels = torch.tensor([0, 5, 0], device=device)

    def call() -> tuple[Tensor, ...]:
        matcher.reset_class_neighbors()
        matcher.zero_grad()
        scores = matcher.class_scores(features, labels)
        weight = torch.linspace(-1, 1, scores.values.numel(), dtype=torch.float32, device=device)
        (scores.values.flatten() * weight).sum().backward()
        grads = matcher.class_embed.grad * length, matcher.fc.weight.grad
        return scores.values, scores.classes, scores.to_dense(), scores.to_sparse(), *grads

    check(call, value)


def test_matching(value: torch.dtype | str, device: torch.device) -> None:
    matcher = QAConv(8, 3, 2).to(device)
    probe, gallery = (torch.randn(4, 8, 3, 2, device=device) for _ in range(2))

    def call() -> tuple[Tensor, ...]:
        found = matcher.correspondences(probe, gallery)
        return matcher.match(probe, gallery), matcher.match_pairs(probe, gallery), *found

    check(call, value)


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_evaluation(value: torch.dtype | str, device: torch.device, tmp_path: Path) -> None:
    matcher, ids = QAConv(8, 3, 2).to(device), torch.arange(48) % 9
    query, gallery = torch.randn(8, 8, 3, 2, device=device), torch.randn(40, 8, 3, 2, device=device)
    both, cpu = [query, gallery], torch.device("cpu")

    def call() -> tuple[Tensor, ...]:
        save_features(tmp_path / "gallery.safetensors", [gallery.to(cpu)], ids[8:].tolist(), range(40))
        stored = load_features(tmp_path / "gallery.safetensors")
        candidates = rank_gallery(matcher, query, gallery, 5, prefilter=20)
        ranking, neighbors = rank_gallery(matcher, query, stored.maps, 20), rank_gallery(matcher, both, both, 21)
        reranked = k_reciprocal_rerank(ranking, neighbors, k1=6)
        merged = average_queries(query, ids[:8].tolist(), [0] * 8)
        reid = reid_metrics(ranking[1], ids[:8].tolist(), stored.ids, [0] * 8, stored.cameras)
        pairs = verification_metrics(ranking[0].flatten(), (ids[:8, None] == ids[8 + ranking[1].to(cpu)]).flatten())
        numbers = torch.tensor([*reid[:2], pairs.eer, pairs.accuracy], dtype=torch.float64, device=cpu)
        return *candidates, *ranking, *reranked, merged[0], stored.ids, stored.cameras, reid.cmc, pairs.tar, numbers

    check(call, value)
