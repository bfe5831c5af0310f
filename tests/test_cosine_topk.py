"""Cosine top-k on both backends against fp64: the set and its order, ties, NaN, layouts, repeats."""

from __future__ import annotations

import pytest
import torch
from exact import by_falling_similarity, exact_cosines, exact_vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import embeddings
from neighbors import check, check_exactly, search
from pairwise import pairwise
from torch.nn import functional as F

from qaconv_triton import functional
from qaconv_triton.cpu import cosine_topk as cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# --- against fp64


@pytest.mark.parametrize(
    ("sizes", "dim", "dtype"), pairwise([(2, 1), (5, 4), (65, 64), (130, 20), (257, 3)], [3, 33, 512], DTYPES)
)
def test_class_neighbors(
    sizes: tuple[int, int], dim: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """K=1, K=N-1, and tables that fill tiles or not."""
    count, k = sizes
    table = embeddings(count, dim, device, dtype)
    values, indices = functional.class_neighbors(table, k, return_similarities=True)
    check(table, table, k, True, values, indices, decided=0.9 if dim > 3 else 0.5)


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "k", "dtype"),
    [
        (1, 1, 7, 1, torch.float32),
        (1, 70, 33, 70, torch.bfloat16),
        (70, 1, 7, 1, torch.float16),
        (3, 129, 512, 9, torch.float32),
        (129, 3, 33, 2, torch.bfloat16),
        (66, 67, 7, 67, torch.float16),
    ],
)
def test_topk_cosine(
    queries: int, keys: int, dim: int, k: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    left, right = embeddings(queries, dim, device, dtype), embeddings(keys, dim, device, dtype)
    check(left, right, k, False, *functional.topk_cosine(left, right, k))


@pytest.mark.parametrize(("count", "dim", "k"), [(2, 3, 1), (65, 7, 64), (130, 33, 9), (40, 512, 39)])
def test_fp64(count: int, dim: int, k: int, device: torch.device) -> None:
    table = embeddings(count, dim, device, torch.float64)
    check(table, table, k, True, *search(table, k))
    check(table[:7], table, k, False, *functional.topk_cosine(table[:7], table, k))


def test_the_indices_alone_are_those_with_similarities(backend: str, device: torch.device) -> None:
    table = embeddings(70, 4, device)
    assert torch.equal(functional.class_neighbors(table, 5), search(table, 5)[1])


def test_nearest_keys_may_come_last(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last blocks of keys, with equals in several blocks."""
    monkeypatch.setattr(cpu, "TILE", 64)
    monkeypatch.setattr(cpu, "BLOCK_COLUMNS", 256)
    keys = embeddings(2 * 256 + 37, 7, device)
    queries = keys[:3].clone()
    best = [260, 510, 548]
    for row, (query, place) in enumerate(zip(queries, best, strict=True)):
        keys[place] = 3 * query + 0.2 * query.norm() * F.normalize(torch.randn(7, device=device), dim=0)
        keys[250 + row] = keys[520 + row] = keys[257 + row]
    values, indices = functional.topk_cosine(queries, keys, 6)
    check(queries, keys, 6, False, values, indices)
    assert indices[:, 1].tolist() == best


def test_k_beyond_what_a_kernel_selects_from(backend: str, device: torch.device) -> None:
    keys = embeddings(4200, 7, device)
    values, indices = functional.topk_cosine(keys[:2], keys, 4150)
    check(keys[:2], keys, 4150, False, values, indices, decided=0.5)


drawn_tables = st.tuples(
    st.integers(0, 2**31 - 1), st.integers(2, 40), st.integers(1, 9), st.sampled_from([1, 3, 1000]), st.booleans()
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=drawn_tables, data=st.data())
def test_any_table(
    drawn: tuple[int, int, int, int, bool], data: st.DataObject, backend: str, device: torch.device
) -> None:
    """Coarse integer embeddings (zeros, duplicates, ties) up to nearly continuous ones."""
    seed, count, dim, levels, exclude_self = drawn
    values = torch.randint(-levels, levels + 1, (count, dim), generator=torch.Generator().manual_seed(seed))
    table = values.float().to(device)
    k = data.draw(st.integers(1, count - int(exclude_self)))
    check(table, table, k, exclude_self, *search(table, k, exclude_self), decided=0.0)


# --- ties and zeros


@pytest.mark.parametrize(
    ("count", "k", "dim", "exclude_self", "dtype"),
    [
        (6, 3, 3, False, torch.bfloat16),
        (17, 16, 33, True, torch.float16),
        (67, 5, 512, True, torch.bfloat16),
        (67, 67, 33, False, torch.float32),
        (150, 40, 3, True, torch.float32),
    ],
)
def test_ties_fall_by_rising_id(
    count: int, k: int, dim: int, exclude_self: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Five vectors, many times each: coinciding classes are each other's neighbours."""
    table = exact_vectors(5, dim)[torch.randint(5, (count,))].to(device, dtype)
    check_exactly(table, k, *search(table, k, exclude_self), exclude_self)


@pytest.mark.parametrize(("count", "dim"), [(17, 512), (513, 7)])
def test_ties_of_one_query_fall_by_rising_id(count: int, dim: int, backend: str, device: torch.device) -> None:
    """To a BLAS one query, or a last strip of one, is a matrix-vector product."""
    keys = exact_vectors(4, dim)[torch.randint(4, (count,))].to(device)
    indices = functional.topk_cosine(keys[:1], keys, count)[1]
    assert torch.equal(indices, by_falling_similarity(exact_cosines(keys[:1], keys), count))


@pytest.mark.parametrize(("vector", "k"), [([1.0, -1.0, 1.0, 1.0], 7), ([0.0, 0.0, 0.0], 99)], ids=["equal", "zero"])
def test_equal_embeddings_alone(vector: list[float], k: int, backend: str, device: torch.device) -> None:
    table = torch.tensor([vector] * 100, device=device)
    values, indices = search(table, k)
    assert indices.tolist() == [[m for m in range(100) if m != n][:k] for n in range(100)]
    assert (values == (1.0 if vector[0] else 0.0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_have_similarity_zero(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Between the positive and the negative ones, equal to -0 and +0."""
    keys = torch.tensor([[-1, 0], [0, 0], [0, 2], [1, 0], [-0.0, -0.0], [0, -3]], device=device, dtype=dtype)
    values, indices = functional.topk_cosine(keys, keys, 6)
    assert indices[3].tolist() == [3, 1, 2, 4, 5, 0]
    assert values[3].tolist() == [1, 0, 0, 0, 0, -1]
    for zero in (1, 4):
        assert indices[zero].tolist() == [0, 1, 2, 3, 4, 5]
        assert values[zero].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opposite_and_orthogonal_are_exact(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    keys = torch.cat([torch.eye(4), -torch.eye(4)]).mul(4.0).to(device, dtype)
    values, indices = search(keys, 7)
    assert values.tolist() == [[0.0] * 6 + [-1.0]] * 8
    for row, ids in enumerate(indices.tolist()):
        assert ids == [n for n in range(8) if n % 4 != row % 4] + [(row + 4) % 8]


# --- shapes and layouts


def test_maps_of_any_layout(backend: str, device: torch.device) -> None:
    """`[N, C, H, W]`, contiguous, channels-last or neither: the same neighbours as the flattened ones."""
    flat = embeddings(40, 3 * 4 * 5, device)
    maps = flat.view(40, 3, 4, 5)
    wide = torch.cat([maps, maps], 3)[..., :5]
    layouts = maps, maps.contiguous(memory_format=torch.channels_last), wide, maps.mT.contiguous().mT
    for queries, keys in zip(layouts, (*layouts[1:], maps), strict=True):
        check(flat, flat, 6, True, *search(queries, 6))
        check(flat[3:20], flat, 5, False, *functional.topk_cosine(queries[3:20], keys, 5))


@pytest.mark.parametrize("shape", [(9, 1, 2, 3), (9, 4, 1, 1), (1, 4, 2, 3)])
def test_maps_whose_layout_is_ambiguous(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    maps = torch.randn(shape, device=device)
    channels_last = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    values, indices = functional.topk_cosine(maps, channels_last, shape[0])
    check(maps.flatten(1), channels_last.flatten(1), shape[0], False, values, indices)


def test_non_contiguous_rows(backend: str, device: torch.device) -> None:
    wide = embeddings(60, 20, device)
    for table in (wide[::2, 3:12], wide.mT[:, :33], wide[:1].expand(5, -1)):
        check(table, table, 4, False, *search(table, 4, exclude_self=False), decided=0.0)


@pytest.mark.parametrize(("shape", "dtype"), [((0, 7), torch.float64), ((0, 2, 3, 4), torch.float16)])
def test_no_queries(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    queries = torch.zeros(shape, device=device, dtype=dtype)
    keys = torch.ones(5, *shape[1:], device=device, dtype=dtype)
    values, indices = functional.topk_cosine(queries, keys, 3)
    assert values.shape == indices.shape == (0, 3)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64


def test_a_search_changes_no_input_and_has_no_gradient(backend: str, device: torch.device) -> None:
    table = embeddings(70, 4, device).requires_grad_()
    before = table.detach().clone()
    values, indices = search(table, 3)
    assert not values.requires_grad
    assert not indices.requires_grad
    assert not functional.topk_cosine(table, table, 3)[0].requires_grad
    assert torch.equal(table, before)


# --- repeats, NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_identical(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    table = embeddings(150, 33, device, dtype)
    table[50:100] = table[:50]
    assert all(map(torch.equal, search(table, 30), search(table, 30)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")  # the interpreter's numpy
def test_nan_query_or_key_is_never_a_number(backend: str, device: torch.device) -> None:
    """As `torch.sort` has it: NaN above everything, by rising id; the other queries lose one place each."""
    keys = torch.eye(6, device=device)
    keys[1] = keys[4] = torch.nan
    values, indices = functional.topk_cosine(keys[[0, 1, 5]], keys, 4)
    assert indices.tolist() == [[1, 4, 0, 2], [0, 1, 2, 3], [1, 4, 5, 0]]
    assert values.isnan().tolist() == [[True, True, False, False], [True] * 4, [True, True, False, False]]
    assert values[0, 2:].tolist() == values[2, 2:].tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
@pytest.mark.parametrize("k", [1, 3, 5])
def test_nan_beside_ties(k: int, backend: str, device: torch.device) -> None:
    keys = torch.ones(6, 4, device=device)
    keys[1] = keys[3] = torch.nan
    values, indices = functional.topk_cosine(keys[:1], keys, k)
    assert indices[0].tolist() == [1, 3, 0, 2, 4, 5][:k]
    assert values[0].isnan().tolist() == [True, True, False, False, False, False][:k]
