"""Top-k of two tables in each other, in one product: what the ranks of a sharded class table search with."""

from __future__ import annotations

import pytest
import torch
from exact import by_falling_similarity, exact_cosines, exact_vectors
from inputs import embeddings
from neighbors import check

from qaconv_triton import functional, ops


@pytest.mark.parametrize("thresholds", ["none", "kth", "above all"])
@pytest.mark.parametrize(
    ("left_rows", "right_rows", "k"), [(1, 3, 2), (3, 2, 4), (70, 33, 5), (3, 140, 20), (130, 130, 9)]
)
def test_both_sides_with_ties(
    left_rows: int, right_rows: int, k: int, thresholds: str, backend: str, device: torch.device
) -> None:
    """Products are exact, so that ties by ascending id are promised, at the thresholds as well."""
    left, right = exact_vectors(left_rows, 20).to(device), exact_vectors(right_rows, 20).to(device)
    similarity = exact_cosines(left, right)
    bounds, expected = [], []
    for first, side in ((left_rows, similarity), (0, similarity.mT)):
        ids = by_falling_similarity(side, k)
        values = side.gather(1, ids)
        expected.append((values.float(), ids + first))
        bounds.append(values[:, -1] if values.shape[1] == k else values.new_full((len(values),), -torch.inf))
    bound = torch.cat(bounds).float()
    bound = {"none": torch.full_like(bound, -torch.inf), "kth": bound, "above all": torch.full_like(bound, 2.0)}[
        thresholds
    ]
    found, ids = ops.mutual_topk(left, right, k, bound)
    sorts_all = backend == "torch" and device.type != "cpu"  # and finds what it need not
    for rows, (values, wanted) in zip((slice(0, left_rows), slice(left_rows, None)), expected, strict=True):
        count = 0 if thresholds == "above all" and not sorts_all else wanted.shape[1]
        assert torch.equal(found[rows, :count], values[:, :count])
        assert torch.equal(ids[rows, :count], wanted[:, :count])
        assert (found[rows, count:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    left, right = embeddings(65, 33, device, dtype), embeddings(40, 33, device, dtype)
    bound = torch.full((105,), -torch.inf, device=device, dtype=torch.promote_types(dtype, torch.float32))
    values, ids = ops.mutual_topk(left, right, 7, bound)
    check(left, right, 7, False, values[:65], ids[:65] - 65)
    check(right, left, 7, False, values[65:], ids[65:])


@pytest.mark.parametrize(("left_rows", "right_rows"), [(3, 3), (5, 2), (2, 5)])
def test_fewer_rows_than_k_and_all_alike(left_rows: int, right_rows: int, backend: str, device: torch.device) -> None:
    """All pairs are candidates, in tables that are shorter than a list."""
    left, right = torch.zeros(left_rows, 4, device=device), torch.zeros(right_rows, 4, device=device)
    bound = torch.full((left_rows + right_rows,), -torch.inf, device=device)
    values, ids = ops.mutual_topk(left, right, 7, bound)
    for rows, first, count in ((slice(0, left_rows), left_rows, right_rows), (slice(left_rows, None), 0, left_rows)):
        assert values[rows, :count].tolist() == [[0.0] * count] * (len(values[rows]))
        assert ids[rows, :count].tolist() == [list(range(first, first + count))] * len(values[rows])
        assert (values[rows, count:] == -torch.inf).all()


def test_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU tables of several blocks, in which columns do not begin at a tile."""
    from qaconv_triton.cpu import cosine_topk as cpu

    monkeypatch.setattr(cpu, "TILE", 16)
    monkeypatch.setattr(cpu, "BLOCK_ROWS", 32)
    monkeypatch.setattr(cpu, "BLOCK_COLUMNS", 64)
    left, right = embeddings(75, 12, torch.device("cpu")), embeddings(201, 12, torch.device("cpu"))
    for dtype in (torch.float32, torch.float64):
        one, other = left.to(dtype), right.to(dtype)
        bound = torch.full((276,), -torch.inf, dtype=dtype)
        values, ids = cpu.mutual_topk(one, other, 11, bound)
        check(one, other, 11, False, values[:75], ids[:75] - 75)
        check(other, one, 11, False, values[75:], ids[75:])
        assert torch.equal(ids[:75] - 75, functional.topk_cosine(one, other, 11)[1])


def test_both_buffers_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    cosine_topk = pytest.importorskip("qaconv_triton.kernels.cosine_topk")
    from qaconv_triton.kernels import topk_search

    rows: list[int] = []
    capacities: list[int] = []

    class Buffer(topk_search.CandidateBuffer):
        def __init__(self, count: int, capacity: int, device: torch.device) -> None:
            rows.append(count)
            capacities.append(capacity)
            super().__init__(count, capacity, device)

    monkeypatch.setattr(topk_search, "CandidateBuffer", Buffer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left, right = embeddings(300, 8, device), embeddings(300, 8, device)
    bound = torch.full((600,), -torch.inf, device=device)
    found = cosine_topk.mutual_topk(left, right, 3, bound)
    assert rows == [300, 300]
    limit = 8 * capacities[0] * 450  # one of them and a half
    monkeypatch.setattr(cosine_topk, "workspace", lambda device: limit)
    rows.clear()
    assert torch.equal(cosine_topk.mutual_topk(left, right, 3, bound)[1], found[1])
    assert 2 * max(rows) * 8 * capacities[-1] <= limit
