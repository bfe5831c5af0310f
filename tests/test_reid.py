"""Metrics of re-identification beside the definition, written as loops over lists; multi-query."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from inputs import maps
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_average_precision

from qaconv_triton.evaluation import Features, average_queries, query_metrics, reid, reid_metrics

Q, G = 40, 60


def by_definition(
    order: list[int], identity: int, camera: int | None, ids: list[int], cameras: list[int] | None, junk: set[int]
) -> tuple[float, float, float] | None:
    """Average precision, INP and rank of the first true match of one list; None without a true match."""

    def is_left_out(item: int) -> bool:
        same_camera = cameras is not None and cameras[item] == camera
        return ids[item] in junk or (ids[item] == identity and same_camera)

    true = [item for item in range(len(ids)) if ids[item] == identity and not is_left_out(item)]
    if not true:
        return None
    ranks = []
    rank = 0
    for item in order:
        if is_left_out(item):
            continue
        rank += 1
        if ids[item] == identity:
            ranks.append(rank)
    precision = sum((hits + 1) / rank for hits, rank in enumerate(ranks)) / len(true)
    inp = len(true) / ranks[-1] if len(ranks) == len(true) else 0.0
    return precision, inp, float(ranks[0]) if ranks else math.inf


def random_protocol(seed: int) -> dict[str, Any]:
    """Identities, some of them junk, or in one camera only, or in the gallery alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    return {
        "query_ids": draw(-1, 14, Q),
        "gallery_ids": draw(-2, 12, G),
        "query_cameras": draw(0, 3, Q),
        "gallery_cameras": draw(0, 3, G),
    }


def random_lists(seed: int, k: int) -> Tensor:
    """Lists of scores with many ties, as `rank_gallery` orders them."""
    scores = torch.randint(0, 20, (Q, G), generator=torch.Generator().manual_seed(seed))
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


@pytest.mark.parametrize("k", [G, 25, 3, 1])
@pytest.mark.parametrize("with_cameras", [True, False])
@pytest.mark.parametrize("junk", [(-1,), (-2, 3), ()])
def test_metrics_are_those_of_the_definition(
    k: int, with_cameras: bool, junk: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reid, "PLACES", 7 * k)  # several blocks of queries
    protocol, indices = random_protocol(k), random_lists(k, k)
    if not with_cameras:
        protocol |= {"query_cameras": None, "gallery_cameras": None}
    cameras = protocol["query_cameras"] or [None] * Q
    found = [
        by_definition(order, identity, camera, protocol["gallery_ids"], protocol["gallery_cameras"], set(junk))
        for order, identity, camera in zip(indices.tolist(), protocol["query_ids"], cameras, strict=True)
    ]
    of_queries = query_metrics(indices, **protocol, junk_ids=junk)
    expected = torch.tensor([answer or (math.nan,) * 3 for answer in found], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(of_queries, dim=1), expected, equal_nan=True)

    counted = [answer for answer in found if answer is not None]
    assert 0 < len(counted) < Q
    metrics = reid_metrics(indices, **protocol, junk_ids=junk)
    assert metrics.num_queries == len(counted)
    assert metrics.mAP == pytest.approx(sum(answer[0] for answer in counted) / len(counted))
    assert metrics.mINP == pytest.approx(sum(answer[1] for answer in counted) / len(counted))
    shares = [sum(answer[2] <= rank for answer in counted) / len(counted) for rank in range(1, k + 1)]
    assert metrics.cmc.tolist() == pytest.approx(shares)


def test_average_precision_is_that_of_torchmetrics() -> None:
    """Plain: the mean of the precision at every hit, not the trapezoid of the Oxford protocol."""
    generator = torch.Generator().manual_seed(0)
    ids, items = torch.randint(5, (20,), generator=generator), torch.randint(5, (30,), generator=generator)
    scores = torch.rand(20, 30, generator=generator)
    precision = query_metrics(scores.argsort(dim=1, descending=True), ids, items).average_precision
    for row in range(20):
        expected = retrieval_average_precision(scores[row], items == ids[row])
        assert precision[row].item() == pytest.approx(expected.item())


def test_a_short_list_without_what_is_left_out_ends_early() -> None:
    arguments = [7], [7, 7, 8], [0], [0, 1, 1]  # the best item is of the query's camera
    assert reid_metrics(torch.tensor([[0]]), *arguments).cmc.tolist() == [0]
    assert reid_metrics(torch.tensor([[0, 1, 2]]), *arguments).cmc.tolist() == [1, 1, 1]


def test_a_list_by_hand() -> None:
    """Market-1501's rules: junk and the own camera are no places at all; distractors are wrong answers."""
    ids, cameras = [7, -1, 7, 0, 7, 8], [1, 2, 2, 2, 3, 2]
    metrics = reid_metrics(torch.tensor([[0, 1, 3, 2, 5, 4]]), [7], ids, [1], cameras)
    # left: 3 (a distractor), 2 (true), 5 (wrong), 4 (true)
    assert metrics.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert metrics.mINP == pytest.approx(2 / 4)
    assert metrics.cmc.tolist() == [0, 1, 1, 1, 1, 1]
    assert metrics.to_dict((1, 2, 50)) == {"Rank-1": 0, "Rank-2": 1, "mAP": metrics.mAP, "mINP": metrics.mINP}
    shorter = reid_metrics(torch.tensor([[0, 1, 3, 2, 5]]), [7], ids, [1], cameras)
    assert shorter.mAP == pytest.approx(1 / 2 / 2)
    assert shorter.mINP == 0


def test_a_query_without_a_true_match_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qaconv_triton"):
        metrics = reid_metrics(torch.tensor([[0, 1], [0, 1], [1, 0]]), [3, 9, 4], [3, 4])
    assert metrics.num_queries == 2
    assert metrics.mAP == metrics.mINP == 1
    assert "1 of 3 queries have no true match" in caplog.text
    none = reid_metrics(torch.tensor([[0, 1]]), [9], [3, 4])
    assert none.num_queries == 0
    assert all(math.isnan(value) for value in (none.mAP, none.mINP, *none.cmc.tolist()))


def test_ids_may_be_arrays_and_any_integers() -> None:
    protocol, indices = random_protocol(0), random_lists(0, 20)
    expected = reid_metrics(indices, **protocol)
    kinds = [np.array, lambda values: torch.tensor(values, dtype=torch.int16), tuple]
    for kind in kinds:
        metrics = reid_metrics(indices.int(), **{name: kind(values) for name, values in protocol.items()})
        assert metrics[:2] == expected[:2]
    far_apart = {name: [10**17 * value for value in values] for name, values in protocol.items()}
    assert reid_metrics(indices, **far_apart, junk_ids=[-(10**17)])[:2] == expected[:2]


def test_lists_may_be_arrays_with_places_where_nothing_is() -> None:
    """As FAISS returns them, also from a gallery of fewer than k items; or as NumPy reverses what it has sorted."""
    protocol, indices = random_protocol(0), random_lists(0, 20)
    expected = reid_metrics(indices, **protocol)
    reversed_twice = indices.flip(1).numpy()[:, ::-1]
    for array in (reversed_twice, np.pad(indices.numpy(), ((0, 0), (0, G)), constant_values=-1)):
        metrics = reid_metrics(array, **protocol)
        assert metrics[:2] == expected[:2]
        assert torch.equal(metrics.cmc[:20], expected.cmc)
    assert reid_metrics(np.full((1, 3), -1), [5], []).num_queries == 0
    assert reid_metrics(indices.tolist(), **protocol)[:2] == expected[:2]


def test_arrays_may_be_read_only_and_big_endian() -> None:
    protocol, indices = random_protocol(0), random_lists(0, 20)
    expected = reid_metrics(indices, **protocol)
    arrays = {name: np.asarray(values).astype(">i4") for name, values in {"indices": indices, **protocol}.items()}
    for array in arrays.values():
        array.setflags(write=False)
    assert reid_metrics(**arrays)[:2] == expected[:2]


@pytest.mark.parametrize("ranks", [(0,), (1, -1)])
def test_ranks_that_no_list_has_are_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"ranks must be at least 1 .* got {ranks[-1]}"):
        reid_metrics(LISTS, [1, 2], [1, 2, 2]).to_dict(ranks)


LISTS = torch.tensor([[0, 1], [1, 2]])
GIVEN: dict[str, Any] = {"indices": LISTS, "query_ids": [1, 2], "gallery_ids": [1, 2, 2]}
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"indices": 7.0}, TypeError, r"indices: expected an integer dtype, got torch\.float64"),
    ({"indices": None}, TypeError, r"indices: expected integers \[Q, k\], got NoneType"),
    ({"indices": LISTS.float()}, TypeError, r"indices: expected an integer dtype, got torch\.float32"),
    ({"indices": LISTS[0]}, ValueError, r"indices: expected shape \[Q, k\] .* got \[2\]"),
    ({"indices": LISTS[:, :0]}, ValueError, r"indices: expected shape \[Q, k\] .* got \[2, 0\]"),
    ({"indices": LISTS + 1}, IndexError, r"indices: expected values in \[0, 3\) for 3 gallery items, got \[3\]"),
    ({"indices": LISTS - 2}, IndexError, r"indices: .* got \[-2\]"),
    ({"indices": LISTS.numpy().astype(float)}, TypeError, r"indices: expected an integer dtype, got torch\.float64"),
    ({"indices": LISTS.numpy().astype(object)}, TypeError, r"indices: expected integers \[Q, k\], got ndarray"),
    ({"indices": torch.tensor([[0, 1], [2, 2]])}, ValueError, r"every item at most once a row, got row 1"),
    ({"gallery_ids": [1]}, IndexError, r"indices: expected values in \[0, 1\) for 1 gallery items, got \[1, 1, 2\]"),
    ({"query_ids": [1]}, ValueError, r"query_ids: expected \[2\] for indices \[2, 2\], got \[1\]"),
    ({"query_ids": [1.0, 2.0]}, TypeError, r"query_ids: expected an integer dtype"),
    ({"query_ids": ["a", "b"]}, TypeError, r"query_ids: expected integers, got list .*; number names first, those of"),
    ({"query_ids": np.array(["a", "b"])}, TypeError, r"query_ids: .* got ndarray .*; number names first, those of"),
    ({"query_ids": [1, None]}, TypeError, r"query_ids: expected integers, got list \([^;]*$"),
    ({"query_ids": np.array(7)}, ValueError, r"query_ids: expected a list of integers, such as \(7,\), got 7"),
    ({"junk_ids": -1}, ValueError, r"junk_ids: expected a list of integers, such as \(-1,\), got -1"),
    ({"query_cameras": [1, 2]}, ValueError, r"come together, got query_cameras alone"),
    ({"gallery_cameras": [1, 2, 3]}, ValueError, r"come together, got gallery_cameras alone"),
    (
        {"query_cameras": [1], "gallery_cameras": [1, 2, 3]},
        ValueError,
        r"query_cameras: expected shape \[2\], as query_ids has 2, got \[1\]",
    ),
    (
        {"query_cameras": [1, 2], "gallery_cameras": [1]},
        ValueError,
        r"gallery_cameras: expected shape \[3\], as gallery_ids has 3, got \[1\]",
    ),
    ({"junk_ids": ["junk"]}, TypeError, r"junk_ids: expected integers"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[f"{i} {w[2][:15]}" for i, w in enumerate(WRONG)])
def test_bad_input_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (reid_metrics, query_metrics):
        with pytest.raises(error, match=message):
            function(**{**GIVEN, **changes})


def test_multi_query_means_the_normalised_maps_of_an_identity_and_camera() -> None:
    values = maps(6, 1) * torch.logspace(-3, 3, 6, device=maps(1, 1).device)[:, None, None, None]
    merged, ids, cameras = average_queries(values, [3, 1, 3, 3, 1, 3], [0, 5, 1, 0, 5, 0])
    assert ids.tolist() == [1, 3, 3]
    assert cameras is not None
    assert cameras.tolist() == [5, 0, 1]
    for row, members in enumerate([[1, 4], [0, 3, 5], [2]]):
        expected = torch.stack([normalize(values[i].double(), dim=0) for i in members]).mean(dim=0)
        torch.testing.assert_close(merged[row].double(), expected, atol=1e-6, rtol=0)
    merged, ids, cameras = average_queries(values.half(), [3, 1, 3, 3, 1, 3])
    assert merged.dtype == torch.float16
    assert ids.tolist() == [1, 3]
    assert cameras is None
    assert average_queries(values[:0], [])[0].shape == values[:0].shape
    of_array = average_queries(values.cpu().numpy(), [3, 1, 3, 3, 1, 3])[0]
    torch.testing.assert_close(of_array, average_queries(values.cpu(), [3, 1, 3, 3, 1, 3])[0], rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"maps: .* got Features: pass its \.maps$"):
        average_queries(Features(values, torch.arange(6), None, None, None), torch.arange(6))
    with pytest.raises(ValueError, match=r"maps: expected .*\[6, 4\]"):
        average_queries(torch.zeros(6, 4).numpy(), [3, 1, 3, 3, 1, 3])
