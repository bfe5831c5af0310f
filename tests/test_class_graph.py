"""The class graph under stress, with tiles so small that a small table has many: orders, floods, thresholds, memory."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch
from exact import by_falling_similarity, exact_cosines, exact_vectors
from test_cosine_topk import check, table
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import QAConv, functional, ops, reference
from qaconv_triton.common import thresholds
from qaconv_triton.common.chunks import ChunkedTable
from qaconv_triton.cpu import cosine_topk as cpu_topk
from qaconv_triton.kernels import config, topk_search
from qaconv_triton.kernels import cosine_topk as kernel

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends in small pieces, so that a small table has many."""
    monkeypatch.setattr(cpu_topk, "TILE", 16)
    monkeypatch.setattr(cpu_topk, "BLOCK_ROWS", 32)
    monkeypatch.setattr(cpu_topk, "BLOCK_COLUMNS", 64)
    monkeypatch.setattr(cpu_topk, "COMPACT_ROWS", 7)
    tiles = {"BM": 32, "BN": 64, "BD": 16, "GROUP": 3}
    monkeypatch.setattr(config, "cosine_topk", lambda dim, element_size: [config.Config(tiles, 4, 2)])


def graph(embeddings: Tensor, k: int, **options: object) -> tuple[Tensor, Tensor]:
    values, indices = functional.class_neighbors(embeddings, k, return_similarities=True, **options)  # type: ignore[call-overload]
    return values, indices


def on_a_circle(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def order(name: str, count: int, device: torch.device) -> Tensor:
    """Tables that are hard on the buffers of candidates."""
    places = torch.arange(count, dtype=torch.float32)
    if name == "rising":  # later classes are nearer to every class: each block beats the last
        embeddings = torch.cat([torch.ones(count, 1), torch.eye(count) * 0.1], dim=1) * 1.0
        embeddings[:, 0] = 0.5 + places / count
    elif name == "falling":
        embeddings = order("rising", count, torch.device("cpu")).flip(0)
    elif name == "neighbouring ids":  # the nearest classes are the ones beside it
        embeddings = on_a_circle(places / count * math.pi)
    elif name == "one cluster":  # so tight that similarities differ by little
        embeddings = torch.ones(count, 8) + 0.02 * torch.randn(count, 8)
    elif name == "clusters":
        embeddings = torch.randn(9, 12)[torch.arange(count) * 9 // count] + 0.05 * torch.randn(count, 12)
    elif name == "duplicates":  # exact ones, as the tables below
        embeddings = exact_vectors(7, 5)[torch.randint(7, (count,))]
    elif name == "exact":
        embeddings = exact_vectors(count, 20)
    elif name == "all equal":
        embeddings = torch.tensor([[1.0, -1.0, 1.0, 1.0]]).expand(count, 4)
    else:
        assert name == "zeros and ones"
        embeddings = torch.randint(2, (count, 6)).float()
    return embeddings.to(device).contiguous()


# What a cosine is off by where both unit vectors are rounded to a dtype.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ORDERS = ["rising", "falling", "neighbouring ids", "one cluster", "clusters", "zeros and ones"]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("k", [1, 40, 256])
def test_adversarial_orders(name: str, k: int, backend: str, device: torch.device) -> None:
    embeddings = order(name, 270, device)
    check(embeddings, embeddings, k, True, *graph(embeddings, k), decided=0.0)


@pytest.mark.parametrize("name", ORDERS)
def test_every_other_class(name: str, backend: str, device: torch.device) -> None:
    embeddings = order(name, 130, device)
    check(embeddings, embeddings, 129, True, *graph(embeddings, 129), decided=0.0)


def check_exactly(embeddings: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """Hold the graph of a table whose products are exact against the one right answer."""
    similarity = exact_cosines(embeddings, embeddings)
    assert torch.equal(indices, by_falling_similarity(similarity, k, exclude_self=True))
    assert torch.equal(values, similarity.gather(1, indices).float())


@pytest.mark.parametrize("name", ["duplicates", "exact", "all equal"])
@pytest.mark.parametrize("k", [1, 40, 299])
def test_equals_fall_by_rising_id(name: str, k: int, backend: str, device: torch.device) -> None:
    """Wherever a pair is multiplied, and from whichever of its ends, equal similarities are in the order of ids."""
    embeddings = order(name, 300, device)
    check_exactly(embeddings, k, *graph(embeddings, k))


@pytest.mark.parametrize("k", [1, 256, 257])
def test_any_k(k: int, backend: str, device: torch.device) -> None:
    embeddings = table(520, 12, device)
    check(embeddings, embeddings, k, True, *graph(embeddings, k), decided=0.0 if k > 300 else 0.5)


# --- thresholds: estimated from a sample or the previous graph, and wrong


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.7, 2.0])
@pytest.mark.parametrize("name", ["clusters", "duplicates", "exact"])
def test_any_threshold_gives_the_same_graph(
    threshold: float, name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too low, and buffers overflow; too high, and they end short of k; above everything, and they stay empty."""
    embeddings = order(name, 300, device)
    previous = torch.zeros(300, 20, dtype=torch.int64, device=device)
    estimate = torch.full((300,), threshold, device=device)
    monkeypatch.setattr(thresholds, "_from_previous", lambda queries, *_: estimate[: len(queries)])
    values, indices = graph(embeddings, 20, previous=previous)
    check(embeddings, embeddings, 20, True, values, indices, decided=0.0)
    if name != "clusters":
        check_exactly(embeddings, 20, values, indices)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 64])
def test_a_sample_of_the_keys_is_asked_first(
    dim: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    sample = thresholds._sample

    def spied(num_keys: int, dim: int, k: int) -> tuple[slice, int] | None:
        asked.append(sample(num_keys, dim, k))
        return asked[-1]

    monkeypatch.setattr(thresholds, "_sample", spied)
    embeddings = table(1200, dim, device)
    check(embeddings, embeddings, 60, True, *graph(embeddings, 60), decided=0.5)
    chosen, rank = asked[0]
    assert 64 <= len(range(1200)[chosen]) <= 300
    assert 60 * len(range(1200)[chosen]) / 1200 < rank < len(range(1200)[chosen]) / 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("exact", kind) for kind in ("same", "drifted", "random", "reversed", "one for all")),
        *(("clusters", kind) for kind in ("same", "drifted")),
    ],
)
def test_warm_start_changes_nothing(name: str, kind: str, backend: str, device: torch.device) -> None:
    embeddings = order(name, 300, device)
    k = 20
    cold = graph(embeddings, k)
    previous = {
        "same": cold[1],
        "drifted": graph(embeddings + 0.02 * torch.randn_like(embeddings), k)[1],
        "random": torch.randint(300, (300, k), device=device),
        "reversed": cold[1].flip(0),
        "one for all": torch.zeros(300, k, dtype=torch.int64, device=device),
    }[kind]
    before = previous.clone()
    warm = graph(embeddings, k, previous=previous)
    check(embeddings, embeddings, k, True, *warm, decided=0.0)
    if name == "exact":
        check_exactly(embeddings, k, *warm)
    assert torch.equal(previous, before)


def test_warm_start_looks_at_fewer_candidates(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    appended = []
    append = cpu_topk._CandidateBuffers.append

    def counted(self: object, first: int, rows: Tensor, *rest: Tensor) -> None:
        appended[-1] += len(rows)
        append(self, first, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_topk._CandidateBuffers, "append", counted)
    embeddings = table(1500, 16, device)
    appended.append(0)
    cold = graph(embeddings, 50)[1]
    moved = embeddings + 0.005 * embeddings.norm(dim=1, keepdim=True) * torch.randn_like(embeddings)
    appended.append(0)
    graph(moved, 50)
    appended.append(0)
    check(moved, moved, 50, True, *graph(moved, 50, previous=cold), decided=0.5)
    assert 50 * 1500 <= appended[2] < 0.75 * appended[1]


def test_matcher_starts_the_second_epoch_from_the_first(cpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = QAConv(4, 2, 2, num_classes=90, k_nearest=6)
    given = []
    search = functional.class_neighbors

    def spied(table: Tensor, k: int, *, previous: Tensor | None, progress: bool) -> Tensor:
        given.append(previous)
        return search(table, k, previous=previous, progress=progress)

    monkeypatch.setattr(functional, "class_neighbors", spied)
    first = matcher.compute_class_neighbors()
    matcher.on_epoch_start()
    with torch.no_grad():
        matcher.class_embed.add_(0.1 * torch.randn_like(matcher.class_embed))  # type: ignore[union-attr, arg-type]
    second = matcher.compute_class_neighbors()
    assert given[0] is None
    assert given[1] is first
    flat = matcher.class_embed.detach().flatten(1)  # type: ignore[union-attr]
    similarities = F.cosine_similarity(flat.unsqueeze(1), flat[second], dim=2)
    check(flat, flat, 6, True, similarities, second)
    matcher.k_nearest = 4
    matcher.compute_class_neighbors()
    assert given[2] is None  # of another shape: no help


# --- memory


@pytest.mark.parametrize("workspace", [1, 40_000, 10**9])
@pytest.mark.parametrize("k", [1, 9, 150])
def test_workspace_bounds_change_nothing(workspace: int, k: int, backend: str, device: torch.device) -> None:
    embeddings = table(333, 7, device)
    check(embeddings, embeddings, k, True, *graph(embeddings, k, workspace_bytes=workspace), decided=0.5)
    queries = embeddings[:77].clone()
    bounded = ops.cosine_topk(queries, embeddings, k, None, workspace, None, None)
    check(queries, embeddings, k, False, *bounded, decided=0.5)


def test_small_workspace_means_small_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    made: list[weakref.ref[kernel.CandidateBuffer]] = []
    most = [0]
    make = topk_search.TopKSearch._buffer

    def spied(self: topk_search.TopKSearch, chunk: object) -> kernel.CandidateBuffer:
        buffer = make(self, chunk)  # type: ignore[arg-type]
        made.append(weakref.ref(buffer))
        alive = [each for each in (reference() for reference in made) if each is not None]
        most[0] = max(most[0], sum(8 * each.candidates.numel() for each in alive))
        return buffer

    monkeypatch.setattr(topk_search.TopKSearch, "_buffer", spied)
    embeddings = table(600, 7, device)
    graph(embeddings, 9)
    workspace = 2**19
    assert most[0] > workspace
    most[0] = 0
    check(embeddings, embeddings, 9, True, *graph(embeddings, 9, workspace_bytes=workspace))
    assert 0 < most[0] <= workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_table_that_is_cast_on_its_way(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Products in half precision of an fp32 table, in one piece or many; rows as long as fp16 cannot hold."""
    for embeddings in (table(200, 33, device) * 1e6, order("exact", 200, device) * 2.0**20):
        for workspace in (None, 50_000):
            values, indices = graph(embeddings, 9, dtype=dtype, workspace_bytes=workspace)
            assert values.dtype == torch.float32
            check(embeddings, embeddings, 9, True, values, indices, decided=0.0, rounding=ROUNDING[dtype])
    check_exactly(embeddings, 9, values, indices)  # whose unit vectors fit every dtype


def test_memory_mapped_table(tmp_path: Path, backend: str, device: torch.device) -> None:
    embeddings = table(150, 24, torch.device("cpu"))
    torch.save(embeddings, tmp_path / "table.pt")
    mapped = torch.load(tmp_path / "table.pt", mmap=True)
    values, indices = graph(mapped, 9, device=device, workspace_bytes=30_000)
    assert indices.device == values.device == device
    check(embeddings.to(device), embeddings.to(device), 9, True, values, indices)


def test_one_chunk_is_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device by another name is another device: chunks are copied to it, by another thread, while one is in use."""
    values = torch.randn(10, 3)
    values[4] = 0
    fetched = []
    chunks = ChunkedTable(values, 4, torch.device("cpu", 0), torch.float32)
    fetch = chunks._fetch
    monkeypatch.setattr(chunks, "_fetch", lambda start: (fetched.append(start), fetch(start))[1])
    order = [8, 0, 4, 0]
    for count, (start, chunk) in enumerate(zip(order, chunks.chunks(order), strict=True), 1):
        assert chunk.first == start
        assert torch.equal(chunk.rows, values[start : start + 4])
        assert torch.allclose(chunk.rnorm, (1 / chunk.rows.norm(dim=1)).nan_to_num(posinf=0))
        assert fetched[:count] == order[:count]
        assert len(fetched) <= count + 1
    assert fetched == order


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_lengths_that_no_product_could_hold(scale: float, backend: str, device: torch.device) -> None:
    embeddings = torch.randn(90, 7, device=device)
    embeddings[0] = 0
    embeddings[1::2] *= scale
    check(embeddings, embeddings, 9, True, *graph(embeddings, 9))


# --- precision, progress, errors


def test_rescoring_restores_what_half_precision_loses(backend: str, device: torch.device) -> None:
    embeddings = order("one cluster", 400, device)
    truth = reference.cosine_topk(embeddings.double(), embeddings.double(), 20, exclude_self=True)[1]

    def recall(indices: Tensor) -> float:
        return (indices.unsqueeze(2) == truth.unsqueeze(1)).any(2).double().mean().item()

    blurred, rescored = (graph(embeddings, 20, dtype=torch.bfloat16, rescore=rescore) for rescore in (False, True))
    assert recall(blurred[1]) < 0.95 < recall(rescored[1])
    exact = F.cosine_similarity(embeddings.double()[:, None], embeddings.double()[rescored[1]], dim=2)
    assert (rescored[0] - exact).abs().max() < 1e-6
    check(embeddings, embeddings, 20, True, *graph(embeddings, 20, rescore=True), decided=0.0)


@pytest.mark.parametrize("workspace", [None, 50_000])
def test_progress_is_told_to_the_end(workspace: int | None, backend: str, device: torch.device) -> None:
    told: list[tuple[int, int]] = []
    embeddings = table(300, 7, device)
    graph(embeddings, 9, workspace_bytes=workspace, progress=lambda done, total: told.append((done, total)))
    done, total = zip(*told, strict=True)
    assert len(set(total)) == 1
    assert list(done) == sorted(set(done))
    assert done[-1] == total[-1]
    before = len(told)
    graph(embeddings, 9)
    assert len(told) == before  # silent again


def test_progress_bar(backend: str, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    graph(table(300, 7, device), 9, progress=True)
    assert "class graph: 100%" in capsys.readouterr().err


def test_a_failing_callback_ends_the_search_and_nothing_else(backend: str, device: torch.device) -> None:
    embeddings = table(300, 7, device)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graph(embeddings, 9, progress=stop)
    check(embeddings, embeddings, 9, True, *graph(embeddings, 9), decided=0.5)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"previous": [[1]]}, TypeError, ["previous", "int64", "[5, 2]", "list"]),
        ({"previous": torch.zeros(5, 2)}, TypeError, ["previous", "torch.float32"]),
        ({"previous": torch.zeros(5, 3, dtype=torch.int64)}, ValueError, ["previous", "[5, 2]", "[5, 3]"]),
        ({"previous": torch.full((5, 2), 5)}, IndexError, ["previous", "[0, 5)", "5"]),
        ({"dtype": torch.int32}, TypeError, ["dtype", "torch.int32"]),
        ({"dtype": torch.float64}, ValueError, ["torch.float64", "torch.float32"]),
        ({"workspace_bytes": 0}, ValueError, ["workspace_bytes", "got 0"]),
        ({"workspace_bytes": 1e9}, TypeError, ["workspace_bytes", "float"]),
    ],
    ids=str,
)
def test_errors_restate_what_came_in(options: dict[str, object], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        graph(torch.eye(5), 2, **options)
    assert all(part in str(caught.value) for part in says), str(caught.value)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e25])
def test_rescoring_minds_no_length(scale: float, backend: str, device: torch.device) -> None:
    embeddings = torch.randn(120, 16, device=device)
    embeddings[::2] *= scale
    check(embeddings, embeddings, 9, True, *graph(embeddings, 9, rescore=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")  # the interpreter's numpy
@pytest.mark.parametrize("place", [0, 1, 149])
def test_nan_among_more_keys_than_are_kept(place: int, backend: str, device: torch.device) -> None:
    """A key of NaN is first everywhere and costs each query one place; a query of NaN gets the first ids."""
    keys = torch.randn(150, 8, device=device)
    queries = torch.randn(20, 8, device=device)
    queries[3] = torch.nan
    others = torch.arange(20, device=device) != 3
    rest = torch.arange(150, device=device) != place
    keys[place] = torch.nan
    values, indices = functional.topk_cosine(queries, keys, 5)
    assert (indices[others, 0] == place).all()
    assert values[others, 0].isnan().all()
    number = rest.cumsum(0) - 1  # among the keys that are numbers
    check(queries[others], keys[rest], 4, False, values[others, 1:], number[indices[others, 1:]])
    assert indices[3].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmoved_rows_are_not_retried(
    dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their threshold is their k-th similarity, which another order of summing rounds otherwise."""
    again = []
    search, pass_over = kernel._search, cpu_topk._Search.__init__

    def spied(queries: Tensor, keys: Tensor | None, *rest: object) -> None:
        again.append(keys is not None)
        search(queries, keys, *rest)  # type: ignore[arg-type]

    def started(self: object, *operands: object, **options: object) -> None:
        again.append(not (operands[7] if len(operands) > 7 else options["is_self_search"]))
        pass_over(self, *operands, **options)  # type: ignore[arg-type]

    embeddings = table(200, 64, device)
    previous = graph(embeddings, 12, dtype=dtype)[1]
    monkeypatch.setattr(kernel, "_search", spied)
    monkeypatch.setattr(cpu_topk._Search, "__init__", started)
    monkeypatch.setattr(thresholds, "GATHER_COST", 0)  # whatever it costs
    values, indices = graph(embeddings, 12, dtype=dtype, previous=previous)
    assert again == [False]
    check(embeddings, embeddings, 12, True, values, indices, decided=0.0, rounding=ROUNDING[dtype])
