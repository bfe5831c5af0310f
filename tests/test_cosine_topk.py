"""Cosine top-k on both backends against fp64: the set and its order, ties, properties, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exact import by_falling_similarity, exact_cosines, exact_vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from tolerances import TOLERANCES, assert_values
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import functional, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(
    queries: Tensor,
    keys: Tensor,
    k: int,
    exclude_self: bool,
    values: Tensor,
    indices: Tensor,
    decided: float = 0.9,
    rounding: float | None = None,
) -> None:
    """Hold a result against fp64: half precision rounds the inputs, which are given, and not the sums.

    `decided`: at least this share of positions must be far enough from its neighbours to have only one right answer.
    `rounding`: what similarities may be off by where the search has cast the inputs.
    """
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    rounding = rounding or TOLERANCES[dtype].value
    assert values.shape == indices.shape == (queries.shape[0], k)
    assert values.dtype == dtype
    assert indices.dtype == torch.int64

    # properties, whatever the data
    assert (values.diff(dim=1) <= 0).all(), "not falling"
    assert ((indices >= 0) & (indices < keys.shape[0])).all()
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), "an index twice"
    ids = torch.arange(queries.shape[0], device=queries.device)
    if exclude_self:
        assert (indices != ids[:, None]).all(), "self among the neighbours"
    tied = values.diff(dim=1) == 0
    assert (indices.diff(dim=1)[tied] > 0).all(), "equal similarities not by rising id"
    wide_queries, wide_keys = reference.normalize(queries.double()), reference.normalize(keys.double())
    recomputed = (wide_queries[:, None] * wide_keys[indices]).sum(-1)
    assert (values - recomputed).abs().max() <= rounding

    # against the truth
    every_value, every_index = reference.cosine_topk(
        wide_queries, wide_keys, keys.shape[0] - int(exclude_self), exclude_self
    )
    assert (every_value[:, :k] - recomputed).abs().max() <= 2 * rounding
    gaps = F.pad(-every_value.diff(dim=1), (1, 1), value=torch.inf)
    sole = torch.minimum(gaps[:, :-1], gaps[:, 1:])[:, :k] > 2 * rounding
    assert sole.double().mean() >= decided, "too many near ties in the data to test the order"
    assert torch.equal(indices[sole], every_index[:, :k][sole])
    # the set is right wherever the k-th and the next differ, whatever the order within
    bar_is_clear = gaps[:, k] > 2 * rounding
    same = indices.sort(dim=1).values == every_index[:, :k].sort(dim=1).values
    assert same[bar_is_clear].all()


def search(embeddings: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Within one table, with self or without."""
    if exclude_self:
        return functional.class_neighbors(embeddings, k, return_similarities=True)
    return functional.topk_cosine(embeddings, embeddings, k)


def table(count: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embeddings of very different lengths, so that a dot product is no cosine."""
    lengths = 10 ** (2 * torch.rand(count, 1) - 1)
    return (torch.randn(count, dim) * lengths).to(device, dtype)


# --- against the truth


@pytest.mark.parametrize(
    ("sizes", "dim", "dtype"),
    pairwise([(2, 1), (5, 1), (5, 4), (17, 16), (64, 5), (65, 64), (130, 20), (257, 3)], [3, 7, 33, 512], DTYPES),
)
def test_class_neighbors(
    sizes: tuple[int, int], dim: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """K=1, K=N-1, and sizes on and off the tiles'."""
    count, k = sizes
    embeddings = table(count, dim, device, dtype)
    values, indices = functional.class_neighbors(embeddings, k, return_similarities=True)
    check(embeddings, embeddings, k, True, values, indices, decided=0.9 if dim > 3 else 0.5)
    assert torch.equal(functional.class_neighbors(embeddings, k), indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "k"),
    [(1, 1, 7, 1), (1, 70, 33, 70), (70, 1, 7, 1), (3, 129, 512, 9), (129, 3, 33, 2), (66, 67, 7, 67)],
)
def test_topk_cosine(
    queries: int, keys: int, dim: int, k: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    left, right = table(queries, dim, device, dtype), table(keys, dim, device, dtype)
    check(left, right, k, False, *functional.topk_cosine(left, right, k))


@pytest.mark.parametrize(("count", "dim", "k"), [(2, 3, 1), (65, 7, 64), (130, 33, 9), (40, 512, 39)])
def test_fp64(count: int, dim: int, k: int, device: torch.device) -> None:
    embeddings = table(count, dim, device, torch.float64)
    check(embeddings, embeddings, k, True, *functional.class_neighbors(embeddings, k, return_similarities=True))
    check(embeddings[:7], embeddings, k, False, *functional.topk_cosine(embeddings[:7], embeddings, k))


def test_few_queries_among_many_keys(backend: str, device: torch.device) -> None:
    """Keys far behind still find their way in, and later equals stay out."""
    keys = table(4096 + 4096 + 37, 7, device)
    queries = keys[:3].clone()
    best = [4100, 8190, 8228]  # close ones, far behind
    for row, (query, place) in enumerate(zip(queries, best, strict=True)):
        keys[place] = 3 * query + 0.2 * query.norm() * F.normalize(torch.randn(7, device=device), dim=0)
        keys[4090 + row] = keys[8200 + row] = keys[4097 + row]  # exact duplicates, far apart
    values, indices = functional.topk_cosine(queries, keys, 6)
    check(queries, keys, 6, False, values, indices)
    assert indices[:, 1].tolist() == best


def test_far_equals_are_ordered_by_rising_id(backend: str, device: torch.device) -> None:
    keys = torch.zeros(8300, 4, device=device)
    keys[:, 0] = 1
    places = torch.tensor([4095, 4096, 6000, 8192, 8299], device=device)
    keys[places] = torch.tensor([0.0, 2.0, 0.0, 0.0], device=device)
    values, indices = functional.topk_cosine(keys[places[:1]], keys, 9)
    assert values.tolist() == [[1.0] * 5 + [0.0] * 4]
    assert indices[0].tolist() == [*places.tolist(), 0, 1, 2, 3]


def test_k_beyond_what_a_kernel_selects_from(backend: str, device: torch.device) -> None:
    keys = table(4200, 7, device)
    values, indices = functional.topk_cosine(keys[:2], keys, 4150)
    check(keys[:2], keys, 4150, False, values, indices, decided=0.5)


# --- ties and zeros


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "k", "dim", "exclude_self"),
    [(6, 3, 3, False), (17, 16, 33, True), (67, 5, 512, True), (67, 67, 33, False), (150, 40, 3, True)],
)
def test_duplicates(
    count: int, k: int, dim: int, exclude_self: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Five vectors, many times each: coinciding classes are each other's neighbours, by rising id."""
    embeddings = exact_vectors(5, dim)[torch.randint(5, (count,))].to(device, dtype)
    values, indices = search(embeddings, k, exclude_self)
    similarity = exact_cosines(embeddings, embeddings)
    assert torch.equal(indices, by_falling_similarity(similarity, k, exclude_self))
    assert torch.equal(values, similarity.gather(1, indices).float())


@pytest.mark.parametrize(("count", "dim"), [(17, 512), (67, 64), (513, 7), (1031, 64)])
def test_one_query_orders_duplicates_by_id(count: int, dim: int, backend: str, device: torch.device) -> None:
    """To a BLAS one query, or a last strip of one, is a matrix-vector product."""
    keys = exact_vectors(4, dim)[torch.randint(4, (count,))].to(device)
    indices = functional.topk_cosine(keys[:1], keys, count)[1]
    assert torch.equal(indices, by_falling_similarity(exact_cosines(keys[:1], keys), count))


@pytest.mark.parametrize("k", [1, 7, 99])
@pytest.mark.parametrize("vector", [[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], ids=["equal", "zero"])
def test_all_equal(vector: list[float], k: int, backend: str, device: torch.device) -> None:
    embeddings = torch.tensor([vector] * 100, device=device)
    values, indices = functional.class_neighbors(embeddings, k, return_similarities=True)
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
    keys = torch.cat([torch.eye(4), -torch.eye(4)]).mul(torch.tensor(4.0)).to(device, dtype)
    values, indices = functional.class_neighbors(keys, 7, return_similarities=True)
    assert values.tolist() == [[0.0] * 6 + [-1.0]] * 8
    for row, ids in enumerate(indices.tolist()):
        assert ids == [n for n in range(8) if n % 4 != row % 4] + [(row + 4) % 8]


# --- properties


embeddings_strategy = st.integers(0, 2**31 - 1).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(2, 40), st.integers(1, 9), st.sampled_from([1, 3, 1000]))
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=embeddings_strategy, data=st.data())
def test_properties(drawn: tuple[int, int, int, int], data: st.DataObject, backend: str, device: torch.device) -> None:
    """Coarse integer embeddings (zeros, duplicates, ties) up to nearly continuous ones."""
    seed, count, dim, levels = drawn
    values = torch.randint(-levels, levels + 1, (count, dim), generator=torch.Generator().manual_seed(seed))
    embeddings = values.float().to(device)
    exclude_self = data.draw(st.booleans())
    k = data.draw(st.integers(1, count - int(exclude_self)))
    similarities, indices = search(embeddings, k, exclude_self)
    check(embeddings, embeddings, k, exclude_self, similarities, indices, decided=0.0)


# --- shapes and layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_of_any_layout(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """`[N, C, H, W]`, contiguous, channels-last or neither: the same neighbours as the flattened ones."""
    flat = table(40, 3 * 4 * 5, device, dtype)
    maps = flat.view(40, 3, 4, 5)
    channels_last = maps.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([maps, maps], 3)[..., :5]
    for laid_out in (maps, channels_last, wide, maps.mT.contiguous().mT):
        check(flat, flat, 6, True, *functional.class_neighbors(laid_out, 6, return_similarities=True))
        for other in (maps, channels_last, wide):
            values, indices = functional.topk_cosine(laid_out[3:20], other, 5)
            check(flat[3:20], flat, 5, False, values, indices)


@pytest.mark.parametrize("shape", [(9, 1, 2, 3), (9, 4, 1, 1), (1, 4, 2, 3)])
def test_maps_whose_layout_is_ambiguous(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    maps = torch.randn(shape, device=device)
    channels_last = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    values, indices = functional.topk_cosine(maps, channels_last, shape[0])
    check(maps.flatten(1), channels_last.flatten(1), shape[0], False, values, indices)


def test_non_contiguous_rows(backend: str, device: torch.device) -> None:
    wide = table(60, 20, device)
    for embeddings in (wide[::2, 3:12], wide.mT[:, :33], wide[:1].expand(5, -1)):
        values, indices = functional.topk_cosine(embeddings, embeddings, 4)
        check(embeddings, embeddings, 4, False, values, indices, decided=0.0)


@pytest.mark.parametrize("shape", [(0, 7), (0, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_no_queries(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    queries, keys = (
        torch.zeros(shape, device=device, dtype=dtype),
        torch.ones(5, *shape[1:], device=device, dtype=dtype),
    )
    values, indices = functional.topk_cosine(queries, keys, 3)
    assert values.shape == indices.shape == (0, 3)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64


def test_nothing_to_differentiate(backend: str, device: torch.device) -> None:
    embeddings = table(9, 4, device).requires_grad_()
    values, indices = functional.class_neighbors(embeddings, 3, return_similarities=True)
    assert not values.requires_grad
    assert not indices.requires_grad
    assert not functional.topk_cosine(embeddings, embeddings, 3)[0].requires_grad


def test_inputs_stay_as_they_were(backend: str, device: torch.device) -> None:
    embeddings = table(70, 4, device)
    before = embeddings.clone()
    functional.class_neighbors(embeddings, 5)
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_blur_the_graph(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The graph of an fp32 table is the fp32 one, also when the first training step builds it under autocast."""
    embeddings = table(60, 33, device)
    with torch.autocast(device.type, dtype):
        values, indices = functional.class_neighbors(embeddings, 20, return_similarities=True)
    check(embeddings, embeddings, 20, True, values, indices)


# --- repeats, NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bit_identical(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    embeddings = table(150, 33, device, dtype)
    embeddings[50:100] = embeddings[:50]
    first = search(embeddings, 30, True)
    for _ in range(3):
        assert all(map(torch.equal, first, search(embeddings, 30, True)))


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
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_nan_beside_ties(k: int, backend: str, device: torch.device) -> None:
    keys = torch.ones(6, 4, device=device)
    keys[1] = keys[3] = torch.nan
    values, indices = functional.topk_cosine(keys[:1], keys, k)
    assert indices[0].tolist() == [1, 3, 0, 2, 4, 5][:k]
    assert values[0].isnan().tolist() == [True, True, False, False, False, False][:k]


# --- errors


@pytest.mark.parametrize(
    ("shape", "dtype", "value"),
    pairwise([(9, 6), (9, 2, 3, 1)], [*DTYPES, torch.float64], [torch.nan, torch.inf, -torch.inf]),
)
def test_not_finite_classes_are_named(
    shape: tuple[int, ...], dtype: torch.dtype, value: float, backend: str, device: torch.device
) -> None:
    embeddings = torch.randn(shape).to(device, dtype)
    embeddings[4].flatten()[3] = value
    with pytest.raises(ValueError, match=r"embeddings.*1 of 9 classes, first: \[4\]"):
        functional.class_neighbors(embeddings, 2)
    embeddings[[1, 2, 3, 6, 7]] = value
    with pytest.raises(ValueError, match=r"embeddings.*6 of 9 classes, first: \[1, 2, 3, 4, 6\]"):
        functional.class_neighbors(embeddings, 2)


FLAT, FOUR = torch.ones(5, 12), torch.ones(5, 2, 3, 2)


def topk(queries: object = FLAT, keys: object = FLAT, k: object = 2) -> Callable[[], object]:
    return lambda: functional.topk_cosine(queries, keys, k)


def graph(embeddings: object = FLAT, k: object = 2) -> Callable[[], object]:
    return lambda: functional.class_neighbors(embeddings, k)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (topk(queries=[[1.0]]), TypeError, ["queries", "[N, D]", "list"]),
        (topk(keys=None), TypeError, ["keys", "NoneType"]),
        (topk(queries=FLAT[0]), ValueError, ["queries", "[N, D]", "[12]"]),
        (topk(keys=FOUR[:, 0]), ValueError, ["keys", "[N, C, H, W]", "[5, 3, 2]"]),
        (topk(queries=FLAT.int()), TypeError, ["queries", "torch.int32"]),
        (topk(keys=FLAT.to(torch.complex64)), TypeError, ["keys", "torch.complex64"]),
        (topk(keys=FLAT.bool()), TypeError, ["keys", "torch.bool"]),
        (topk(keys=FLAT[:, :7]), ValueError, ["[5, 12]", "[5, 7]"]),
        (topk(keys=FOUR), ValueError, ["[5, 12]", "[5, 2, 3, 2]"]),  # the element count happens to fit
        (topk(queries=FOUR.mT, keys=FOUR), ValueError, ["[5, 2, 2, 3]", "[5, 2, 3, 2]"]),
        (topk(keys=FLAT.half()), TypeError, ["torch.float32", "torch.float16"]),
        (topk(keys=FLAT.to("meta")), ValueError, ["queries", "cpu", "keys", "meta"]),
        (topk(k=0), ValueError, ["k ", "between 1 and 5", "5 keys", "got 0"]),
        (topk(k=-3), ValueError, ["k ", "got -3"]),
        (topk(k=6), ValueError, ["k ", "between 1 and 5", "5 keys", "got 6"]),
        (topk(keys=FLAT[:0], k=1), ValueError, ["k ", "0 keys", "got 1"]),
        (topk(k=2.0), TypeError, ["k:", "int", "float"]),
        (topk(k=True), TypeError, ["k:", "int", "bool"]),
        (topk(k=torch.tensor(2.0)), TypeError, ["k:", "int", "Tensor"]),
        (graph(embeddings="table"), TypeError, ["embeddings", "str"]),
        (graph(embeddings=FLAT[0]), ValueError, ["embeddings", "[12]"]),
        (graph(embeddings=FOUR[None]), ValueError, ["embeddings", "[1, 5, 2, 3, 2]"]),
        (graph(embeddings=FLAT.long()), TypeError, ["embeddings", "torch.int64"]),
        (graph(embeddings=FLAT.to(torch.complex128)), TypeError, ["embeddings", "torch.complex128"]),
        (graph(k=0), ValueError, ["k ", "between 1 and 4", "5 classes", "got 0"]),
        (graph(k=5), ValueError, ["k ", "between 1 and 4", "5 classes", "got 5"]),
        (graph(embeddings=FLAT[:1], k=1), ValueError, ["k ", "1 classes", "got 1"]),
        (graph(embeddings=FLAT[:0], k=1), ValueError, ["k ", "0 classes", "got 1"]),
        (graph(k="2"), TypeError, ["k:", "int", "str"]),
        (graph(k=False), TypeError, ["k:", "int", "bool"]),
    ],
)
def test_errors_restate_what_came_in(call: Callable[[], object], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_examples_of_the_docstrings(backend: str, device: torch.device) -> None:
    keys = torch.tensor([[1.0, 0, 0], [1, 1, 0]], device=device)
    values, indices = functional.topk_cosine(torch.eye(3, device=device), keys, k=1)
    assert indices.flatten().tolist() == [0, 1, 0]
    assert_values(values.flatten(), torch.tensor([1, 0.5**0.5, 0], dtype=torch.float64, device=device), torch.float32)
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], device=device)
    assert functional.class_neighbors(embeddings, k=1).flatten().tolist() == [1, 0, 1]
