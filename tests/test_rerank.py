"""Re-ranking beside the published algorithm, written over dense matrices in fp64; longer lists come closer to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inputs import maps
from torch import Tensor

from qaconv_triton import QAConv
from qaconv_triton.evaluation import k_reciprocal_rerank, rank_gallery, reid_metrics, rerank

Q, G, K1, K2 = 9, 51, 8, 3


def clustered_scores(seed: int) -> np.ndarray:
    """Scores of items among themselves, of either sign, not symmetric, with clusters of about six."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(10, 4))
    points = centers[random.integers(10, size=Q + G)] + 0.4 * random.normal(size=(Q + G, 4))
    scores = 3 - 5 * np.linalg.norm(points[:, None] - points[None], axis=2)
    return scores + 0.3 * random.normal(size=scores.shape)


def lists(scores: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, as `rank_gallery` returns them."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return torch.tensor(np.take_along_axis(scores, order, 1)), torch.tensor(order)


def by_definition(scores: np.ndarray, listed: np.ndarray, queries: int, k1: int, k2: int, weight: float) -> np.ndarray:
    """Distances of queries to gallery items; what is not `listed` (bool) is at distance 1 where neighbours count."""
    count = len(scores)
    distance = np.zeros_like(scores)
    ranked = []
    for i in range(count):
        others = [j for j in range(count) if listed[i, j] and j != i]
        best, last = max(scores[i, others]), min(scores[i, others])
        for j in range(count):
            distance[i, j] = 0.0 if j == i else (best - scores[i, j]) / (best - last)
        ranked.append([i, *sorted(others, key=lambda j, i=i: -scores[i, j])])
    known = np.where(listed | np.eye(count, dtype=bool), distance, 1.0)

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in ranked[i][: k + 1] if i in ranked[j][: k + 1]}

    encoding = np.zeros_like(scores)
    for i in range(count):
        expanded = own = reciprocal(i, k1)
        for j in own:
            theirs = reciprocal(j, round(k1 / 2))
            if 3 * len(theirs & own) > 2 * len(theirs):
                expanded = expanded | theirs
        members = sorted(expanded)
        encoding[i, members] = np.exp(-known[i, members]) / np.exp(-known[i, members]).sum()
    encoding = np.stack([encoding[ranked[i][:k2]].mean(axis=0) for i in range(count)])
    result = np.zeros((queries, count - queries))
    for i in range(queries):
        for j in range(queries, count):
            jaccard = 1 - np.minimum(encoding[i], encoding[j]).sum() / np.maximum(encoding[i], encoding[j]).sum()
            result[i, j - queries] = (1 - weight) * jaccard + weight * known[i, j]
    return result


@pytest.mark.parametrize("n", [Q + G, 30, K1 + 1])
@pytest.mark.parametrize(("k2", "weight"), [(K2, 0.3), (1, 0.0), (K1 + 1, 1.0)])
@pytest.mark.parametrize("drop_self", [True, False])
def test_lists_are_ordered_as_by_the_definition(
    n: int, k2: int, weight: float, drop_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "ROWS", 7)
    scores = clustered_scores(0)
    if drop_self:  # an item that is not its own best: its list may not have it
        np.fill_diagonal(scores, scores.min() - 1)
    neighbors, ranking = lists(scores, n), lists(scores[:Q, Q:], 20)
    listed = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(listed, neighbors[1].numpy(), True, axis=1)
    expected = by_definition(scores, listed, Q, K1, k2, weight)
    found, indices = k_reciprocal_rerank(ranking, neighbors, k1=K1, k2=k2, lambda_value=weight)
    assert torch.equal(indices.sort(dim=1).values, ranking[1].sort(dim=1).values)
    torch.testing.assert_close(1 - found, torch.tensor(expected).gather(1, indices))
    assert (found.diff(dim=1) <= 0).all()
    assert (indices != ranking[1]).any() or weight == 1.0


def test_long_lists_are_compared_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, compare = [], rerank._jaccard_distance

    def counted(encoding: rerank.SparseRows, start: int, candidates: Tensor) -> Tensor:
        sizes.append(candidates.numel())
        return compare(encoding, start, candidates)

    scores = clustered_scores(0)
    ranking, neighbors = lists(scores[:Q, Q:], 40), lists(scores, 10)
    expected = k_reciprocal_rerank(ranking, neighbors, k1=K1, k2=K2, lambda_value=1)
    assert (expected[0] >= 0).all()  # what is not among the 10 neighbours is at distance 1, not beyond
    monkeypatch.setattr(rerank, "_jaccard_distance", counted)
    for places in (100, 10):
        monkeypatch.setattr(rerank, "PLACES", places)
        assert torch.equal(k_reciprocal_rerank(ranking, neighbors, k1=K1, k2=K2, lambda_value=1)[1], expected[1])
        assert sum(sizes) == 40 * Q
        assert max(sizes) <= max(places, 40)
        sizes.clear()


def test_shift_and_scale_of_scores_change_nothing() -> None:
    scores = clustered_scores(1)
    options = {"k1": K1, "k2": K2}
    found = k_reciprocal_rerank(lists(scores[:Q, Q:], 20), lists(scores, 30), **options)
    other = k_reciprocal_rerank(lists(7 * scores[:Q, Q:] - 50, 20), lists(7 * scores - 50, 30), **options)
    torch.testing.assert_close(other[0], found[0])
    assert torch.equal(other[1], found[1])


def test_neighbours_correct_what_single_scores_get_wrong() -> None:
    """Identities in clusters, whose queries have much noise: re-ranking finds more of them, by lists of the matcher."""
    matcher, shape = QAConv(8, 3, 2), (8, 3, 2)
    identities = torch.arange(20)
    centers = maps(20, 5, shape=shape, device=torch.device("cpu"))
    query = centers + 1.1 * maps(20, 6, shape=shape, device=torch.device("cpu"))
    ids = identities.repeat(8)
    gallery = centers[ids] + 0.9 * maps(160, 7, shape=shape, device=torch.device("cpu"))
    ranking = rank_gallery(matcher, query, gallery, 60)
    neighbors = rank_gallery(matcher, [query, gallery], [query, gallery], 60)
    scores, indices = k_reciprocal_rerank(ranking, neighbors, k1=8, k2=3)
    assert scores.dtype == torch.float32
    before, after = (reid_metrics(each, identities, ids).mAP for each in (ranking[1], indices))
    assert 0.2 < before < 0.9
    assert after > before + 0.05


RANKING, NEIGHBORS = lists(clustered_scores(2)[:Q, Q:], 10), lists(clustered_scores(2), 12)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ranking": RANKING[0]}, TypeError, "ranking: expected scores and indices, .* got Tensor"),
    ({"ranking": RANKING[::-1]}, TypeError, r"ranking: expected an integer dtype, got torch\.float64"),
    ({"ranking": (RANKING[1], RANKING[1])}, TypeError, r"ranking: expected floating-point scores, got torch\.int64"),
    ({"ranking": (RANKING[0][1:], RANKING[1])}, ValueError, r"got \[8, 10\] and \[9, 10\]"),
    ({"ranking": (RANKING[0].flip(1), RANKING[1])}, ValueError, "ranking: expected finite scores in descending order"),
    ({"ranking": (RANKING[0] / 0, RANKING[1])}, ValueError, "ranking: expected finite.*first row 0.* (nan|-?inf)"),
    ({"ranking": (RANKING[0], RANKING[1] + G)}, IndexError, rf"ranking: expected values in \[0, {G}\)"),
    ({"ranking": (RANKING[0], RANKING[1] * 0)}, ValueError, "ranking: expected every item at most once a row"),
    (
        {"ranking": lists(clustered_scores(2), 10)},
        ValueError,
        r"neighbors: .* 60 queries .* got \[60, 12\]",
    ),
    ({"neighbors": (NEIGHBORS[0], NEIGHBORS[1] + 1)}, IndexError, rf"neighbors: expected values in \[0, {Q + G}\)"),
    ({"k1": 12}, ValueError, r"k1 must be between 1 and 11 \(lists of neighbors \[60, 12\]"),
    ({"k1": 8, "k2": 10}, ValueError, "k2 must be between 1 and 9"),
    ({"k1": 8, "lambda_value": 1.5}, ValueError, "lambda_value must be between 0 and 1 .* got 1.5"),
    ({"k1": 8, "lambda_value": "0.3"}, TypeError, "lambda_value: expected a number"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[f"{i} {w[2][:12]}" for i, w in enumerate(WRONG)])
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        k_reciprocal_rerank(**{"ranking": RANKING, "neighbors": NEIGHBORS, **changes})
