"""A matcher on two ranks: one search of the class graph for both, and norms over the pairs of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qaconv_triton import QAConv, SoftmaxTripletLoss, functional

N, K, C, H, W = 12, 3, 8, 2, 2
STEPS = [([0, 0, 5, 5], [7, 7]), ([3], [1, 1, 2]), ([], [4, 4])]  # labels of rank 0 and of rank 1


def make_matcher() -> QAConv:
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, N, K, include_self=True).double()
    nn.init.uniform_(matcher.fc.weight, 0.5, 1.5)
    return matcher


def batch(step: int, labels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and the gradient of the scores."""
    generator = torch.Generator().manual_seed(100 * step + sum(labels))
    features = torch.randn(len(labels), C, H, W, dtype=torch.float64, generator=generator)
    upstream = torch.randn(len(labels), N, dtype=torch.float64, generator=generator)
    return features.requires_grad_(), torch.tensor(labels, dtype=torch.int64), upstream


def with_common_statistics(rank: int) -> list[dict[str, Any]]:
    """Scores, gradients and buffers of each step; norms are over both ranks."""
    matcher = nn.SyncBatchNorm.convert_sync_batchnorm(make_matcher())
    found = []
    for step, labels in enumerate(STEPS):
        features, target, upstream = batch(step, labels[rank])
        matcher.zero_grad()
        scores = matcher(features, labels=target)
        scores.backward(upstream)
        gradients = {name: parameter.grad for name, parameter in matcher.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in matcher.named_buffers()}
        found.append({"scores": scores.detach(), "features": features.grad, "weights": gradients, "buffers": buffers})
    return found


def with_one_search(rank: int) -> dict[str, Any]:
    """How often each rank searches, the graphs it has, and what it raises if the table is not finite."""
    calls = []
    search = functional.class_neighbors
    functional.class_neighbors = lambda *a, **named: (calls.append(1), search(*a, **named))[1]  # type: ignore
    criterion = SoftmaxTripletLoss(make_matcher())
    model = DistributedDataParallel(criterion, find_unused_parameters=True)
    graphs = []
    for step in range(2):
        criterion.matcher.on_epoch_start()
        features, target, _ = batch(step, [0, 0, 5, 5])
        model(features, target)[2].mean().backward()  # the first forward builds the graph
        graphs.append(criterion.matcher.class_neighbors)
        with torch.no_grad():
            criterion.matcher.class_embed += 0.3 * torch.randn(
                N, C, H, W, generator=torch.Generator().manual_seed(step)
            )
    graphs.append(criterion.matcher.compute_class_neighbors())
    searches = len(calls)
    criterion.matcher.class_embed.data[0, 0] = torch.nan
    try:
        criterion.matcher.compute_class_neighbors()
        message = ""
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    criterion.matcher.eval()
    criterion.matcher.class_embed.data.nan_to_num_()
    alone = criterion.matcher.compute_class_neighbors() if rank == 1 else None  # in eval mode it is a rank's own affair
    return {"searches": searches, "graphs": graphs, "message": message, "alone": alone, "last": len(calls) - searches}


def found_on(rank: int) -> dict[str, Any]:
    return {"statistics": with_common_statistics(rank), "graph": with_one_search(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(found_on, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_sync_batch_norm_sees_the_pairs_of_all_ranks(found: list[dict[str, Any]]) -> None:
    """As one process that has the batches of both."""
    matcher = make_matcher()
    for step, labels in enumerate(STEPS):
        parts = [batch(step, of_rank) for of_rank in labels]
        features = torch.cat([part[0] for part in parts]).detach().requires_grad_()
        matcher.zero_grad()
        scores = matcher(features, labels=torch.cat([part[1] for part in parts]))
        scores.backward(torch.cat([part[2] for part in parts]))
        ranks = [rank["statistics"][step] for rank in found]
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(torch.cat([rank["scores"] for rank in ranks]), scores.detach(), **close)
        torch.testing.assert_close(torch.cat([rank["features"] for rank in ranks]), features.grad, **close)
        for name, parameter in matcher.named_parameters():
            torch.testing.assert_close(sum(rank["weights"][name] for rank in ranks), parameter.grad, **close)
        for name, buffer in matcher.named_buffers():
            assert torch.equal(ranks[0]["buffers"][name], ranks[1]["buffers"][name])
            torch.testing.assert_close(ranks[0]["buffers"][name], buffer, **close)


@pytest.mark.slow
def test_one_rank_searches_the_class_graph_for_all(found: list[dict[str, Any]]) -> None:
    first, second = (rank["graph"] for rank in found)
    assert (first["searches"], second["searches"]) == (3, 0)
    for one, other in zip(first["graphs"], second["graphs"], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first["graphs"][0], first["graphs"][1])
    assert first["message"].startswith("ValueError")
    assert second["message"].startswith("RuntimeError: rank 0 could not build the class graph: ValueError")
    assert second["alone"] is not None
    assert (first["last"], second["last"]) == (1, 1)  # the search that failed, and the one in eval mode


def test_sync_batch_norm_is_a_plain_one_in_one_process() -> None:
    plain, synced = make_matcher(), nn.SyncBatchNorm.convert_sync_batchnorm(make_matcher())
    features, target, _ = batch(0, [0, 0, 5, 5])
    for training in (True, False):
        scores = [matcher.train(training)(features, labels=target) for matcher in (plain, synced)]
        assert torch.equal(*scores)
        assert torch.equal(plain.bn.running_var, synced.bn.running_var)
