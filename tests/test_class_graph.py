"""The class graph in tiles so small that a small table has many: orders, thresholds, warm starts, memory, progress."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import by_falling_similarity, exact_cosines, exact_vectors
from inputs import CPU, embeddings
from neighbors import check, check_exactly, search
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qaconv_triton import QAConv, functional, ops, reference
from qaconv_triton.common import thresholds
from qaconv_triton.common.chunks import Chunk, ChunkedTable
from qaconv_triton.cpu import cosine_topk as cpu_topk
from qaconv_triton.kernels import config, topk_search
from qaconv_triton.kernels import cosine_topk as kernel

pytestmark = pytest.mark.usefixtures("small_tiles")
N = 260  # the smallest table of which a sample is searched first has 256 rows


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends in small pieces."""
    monkeypatch.setattr(cpu_topk, "TILE", 16)
    monkeypatch.setattr(cpu_topk, "BLOCK_ROWS", 32)
    monkeypatch.setattr(cpu_topk, "BLOCK_COLUMNS", 64)
    monkeypatch.setattr(cpu_topk, "COMPACT_ROWS", 7)
    tiles = {"BM": 32, "BN": 64, "BD": 16, "GROUP": 3}
    monkeypatch.setattr(config, "cosine_topk", lambda dim, element_size: [config.Config(tiles, 4, 2)])


@pytest.fixture
def buffer_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the kernels' buffers are compacted, and how often rolled back."""
    calls = {"compact": 0, "rollback": 0}

    def counted(name: str) -> None:
        method = getattr(kernel.CandidateBuffer, name)

        def call(*args: Any) -> None:
            calls[name] += 1
            method(*args)

        monkeypatch.setattr(kernel.CandidateBuffer, name, call)

    for name in calls:
        counted(name)
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    return calls


@pytest.fixture
def pruning_device(backend: str, device: torch.device) -> torch.device:
    """Where a backend starts from thresholds: plain torch on the CPU only, for on CUDA it sorts the similarity."""
    return CPU if backend == "torch" else device


def adversarial_table(name: str, count: int, device: torch.device) -> Tensor:
    """Tables that fill the buffers of candidates, or whose similarities are nearly or exactly equal."""
    places = torch.arange(count, dtype=torch.float32)
    if name == "rising":  # later classes are nearer to every class: each block is better than the last
        table = torch.cat([0.5 + places.unsqueeze(1) / count, torch.eye(count) * 0.1], dim=1)
    elif name == "falling":
        table = adversarial_table("rising", count, CPU).flip(0)
    elif name == "neighbouring ids":  # the nearest classes are the ones beside it
        angles = places / count * math.pi
        table = torch.stack([angles.cos(), angles.sin()], dim=1)
    elif name == "one cluster":  # so tight that similarities differ by little
        table = torch.ones(count, 8) + 0.02 * torch.randn(count, 8)
    elif name == "clusters":
        table = torch.randn(9, 12)[torch.arange(count) * 9 // count] + 0.05 * torch.randn(count, 12)
    elif name == "duplicates":  # products are exact, as in the tables below
        table = exact_vectors(7, 5)[torch.randint(7, (count,))]
    elif name == "exact":
        table = exact_vectors(count, 20)
    elif name == "all equal":
        table = torch.tensor([[1.0, -1.0, 1.0, 1.0]]).expand(count, 4)
    else:
        assert name == "zeros and ones"
        table = torch.randint(2, (count, 6)).float()
    return table.to(device).contiguous()


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("rising", 1),
        ("rising", 40),
        ("falling", 40),
        ("falling", N - 1),
        ("neighbouring ids", 40),
        ("one cluster", 40),
        ("clusters", 1),
        ("clusters", 40),
        ("zeros and ones", 40),
        ("zeros and ones", N - 1),
    ],
)
def test_tables_in_adversarial_order(name: str, k: int, backend: str, device: torch.device) -> None:
    table = adversarial_table(name, N, device)
    check(table, table, k, True, *search(table, k), decided=0.0)


@pytest.mark.parametrize(
    ("name", "k"), [("duplicates", 1), ("duplicates", 40), ("exact", N - 1), ("all equal", 1), ("all equal", 40)]
)
def test_ties_fall_by_rising_id(name: str, k: int, backend: str, device: torch.device) -> None:
    """Wherever a pair is multiplied, and from whichever of its ends, equal similarities are in the order of ids."""
    table = adversarial_table(name, N, device)
    check_exactly(table, k, *search(table, k))


@pytest.mark.parametrize("k", [1, 64, 65, 256])
def test_any_k(k: int, backend: str, device: torch.device) -> None:
    table = embeddings(N, 12, device)
    check(table, table, k, True, *search(table, k), decided=0.5)


# --- thresholds: from a sample, from the previous graph, and wrong ones


@pytest.mark.parametrize(
    ("threshold", "name"),
    [(-2.0, "duplicates"), (0.0, "exact"), (0.7, "clusters"), (0.7, "exact"), (2.0, "duplicates"), (2.0, "clusters")],
)
def test_any_threshold_gives_the_same_graph(
    threshold: float, name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too low, and buffers overflow; too high, and they end short of k; above everything, and they stay empty."""
    table = adversarial_table(name, 300, device)
    previous = torch.zeros(300, 20, dtype=torch.int64, device=device)
    estimate = torch.full((300,), threshold, device=device)
    monkeypatch.setattr(thresholds, "_from_previous", lambda queries, *_: estimate[: len(queries)])
    values, indices = search(table, 20, previous=previous)
    check(table, table, 20, True, values, indices, decided=0.0)
    if name != "clusters":
        check_exactly(table, 20, values, indices)


@pytest.mark.parametrize("dim", [8, 64])
def test_a_sample_of_the_keys_is_searched_first(
    dim: int, pruning_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    sample = thresholds._sample

    def recorded(*args: float) -> thresholds.Sample | None:
        plans.append(sample(*args))  # type: ignore[arg-type]
        return plans[-1]

    monkeypatch.setattr(thresholds, "_sample", recorded)
    table = embeddings(N, dim, pruning_device)
    check(table, table, 30, True, *search(table, 30), decided=0.5)
    assert plans[0] is not None
    rows, rank, most = plans[0]
    size = len(range(N)[rows])
    assert 64 <= size <= N / 4
    assert 30 * size / N < rank < size / 2
    assert 30 < most <= N


def test_a_cold_search_waits_for_few_values(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, and four values that the host reads: of finite rows, of norms, of lengths, of rows to search again."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    rounds, reads = [], []
    launch = topk_search.tuning.launch_announced
    monkeypatch.setattr(
        topk_search.tuning, "launch_announced", lambda *args: (rounds.append(args[0]), launch(*args))[1]
    )
    table = embeddings(N, 12, device)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "is_nonzero", "nonzero"):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    found = kernel.cosine_topk

    def observed(*args: Any) -> Any:
        with Reads():
            return found(*args)

    monkeypatch.setattr(kernel, "cosine_topk", observed)
    with Reads():
        values = search(table, 30)
    check(table, table, 30, True, *values, decided=0.5)
    assert rounds == ["append"]
    assert len(reads) == 4


@pytest.mark.parametrize("most", [31, 100])
def test_more_candidates_than_a_sample_promises(
    most: int, buffer_calls: dict[str, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round that overflows is rolled back, and nothing is lost."""
    monkeypatch.setattr(kernel, "_sizes", lambda queries, *_, **__: (120, len(queries.table)))
    monkeypatch.setattr(kernel, "_raise_from_sample", lambda *_: most)
    table = adversarial_table("exact", N, device)
    check_exactly(table, 30, *search(table, 30))
    assert buffer_calls["rollback"] > 0


@pytest.fixture
def short_buffers(buffer_calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Kernels without estimates, whose buffers are compacted again and again."""
    monkeypatch.setattr(kernel, "_sizes", lambda queries, table, k, *_: (k + 306, len(queries.table)))
    monkeypatch.setattr(kernel, "_raise_from_sample", lambda *_: None)
    return buffer_calls


@pytest.mark.parametrize("name", ["duplicates", "exact", "all equal"])
def test_ties_at_the_threshold_of_a_compacted_buffer(
    name: str, short_buffers: dict[str, int], device: torch.device
) -> None:
    """What equals a threshold counts where its id is lower; lower ids may come later, for tiles go in a circle."""
    table = adversarial_table(name, 700, device)
    check_exactly(table, 9, *search(table, 9))
    assert short_buffers["compact"] > 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
def test_a_query_of_nan_does_not_fill_its_buffer(short_buffers: dict[str, int], device: torch.device) -> None:
    """All its similarities equal its threshold, and have higher ids."""
    keys, queries = embeddings(1500, 8, device), embeddings(20, 8, device)
    queries[3] = torch.nan
    values, indices = functional.topk_cosine(queries, keys, 5)
    assert indices[3].tolist() == [0, 1, 2, 3, 4]
    assert values[3].isnan().all()
    finite = torch.arange(20, device=device) != 3
    check(queries[finite], keys, 5, False, values[finite], indices[finite], decided=0.5)
    assert short_buffers["compact"] > 0
    assert short_buffers["rollback"] == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("exact", "same"),
        ("exact", "random"),
        ("exact", "reversed"),
        ("exact", "one for all"),
        ("clusters", "drifted"),
    ],
)
def test_a_warm_start_changes_nothing(name: str, kind: str, backend: str, device: torch.device) -> None:
    table, k = adversarial_table(name, N, device), 20
    drifted = table.double() + 0.02 * torch.randn_like(table.double())
    nearest = by_falling_similarity(exact_cosines(table, table), k, exclude_self=True)
    previous = {
        "same": nearest,
        "drifted": reference.cosine_topk(drifted, drifted, k, exclude_self=True)[1],
        "random": torch.randint(N, (N, k), device=device),
        "reversed": nearest.flip(0),
        "one for all": torch.zeros(N, k, dtype=torch.int64, device=device),
    }[kind]
    before = previous.clone()
    warm = search(table, k, previous=previous)
    check(table, table, k, True, *warm, decided=0.0)
    if name == "exact":
        check_exactly(table, k, *warm)
    assert torch.equal(previous, before)


def test_a_warm_start_has_fewer_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    appended = []
    append = cpu_topk._CandidateBuffers.append

    def counted(self: object, first: int, rows: Tensor, *rest: Tensor) -> None:
        appended[-1] += len(rows)
        append(self, first, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_topk._CandidateBuffers, "append", counted)
    count, k = 1000, 40
    table = embeddings(count, 16, CPU)
    appended.append(0)
    cold = search(table, k)[1]
    moved = table + 0.005 * table.norm(dim=1, keepdim=True) * torch.randn_like(table)
    appended.append(0)
    search(moved, k)
    appended.append(0)
    check(moved, moved, k, True, *search(moved, k, previous=cold), decided=0.5)
    assert k * count <= appended[2] < 0.75 * appended[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmoved_rows_are_not_retried(
    dtype: torch.dtype, pruning_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their threshold is their k-th similarity, which another order of summing rounds otherwise."""
    retries = []
    start, init = kernel._search, cpu_topk._Search.__init__

    def recorded(queries: Tensor, keys: Tensor | None, *rest: object) -> None:
        retries.append(keys is not None)
        start(queries, keys, *rest)  # type: ignore[arg-type]

    def initialised(self: object, *operands: object, **options: object) -> None:
        retries.append(not (operands[7] if len(operands) > 7 else options["is_self_search"]))
        init(self, *operands, **options)  # type: ignore[arg-type]

    table = embeddings(130, 64, pruning_device)
    previous = search(table, 12, dtype=dtype)[1]
    monkeypatch.setattr(kernel, "_search", recorded)
    monkeypatch.setattr(cpu_topk._Search, "__init__", initialised)
    monkeypatch.setattr(thresholds, "GATHER_COST", 0)  # whatever it costs
    values, indices = search(table, 12, dtype=dtype, previous=previous)
    assert retries == [False]
    check(table, table, 12, True, values, indices, decided=0.0, rounded=dtype)


def test_the_matcher_starts_from_its_previous_graph(cpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = QAConv(4, 2, 2, num_classes=90, k_nearest=6)
    given = []
    build = functional.class_neighbors

    def recorded(table: Tensor, k: int, *, previous: Tensor | None, progress: bool) -> Tensor:
        given.append(previous)
        return build(table, k, previous=previous, progress=progress)

    monkeypatch.setattr(functional, "class_neighbors", recorded)
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
    assert given[2] is None  # of another shape


# --- memory


@pytest.mark.parametrize(("workspace", "k"), [(1, 9), (40_000, 9), (40_000, 150)])
def test_workspace_bounds_change_nothing(workspace: int, k: int, backend: str, device: torch.device) -> None:
    table = embeddings(200, 7, device)
    check(table, table, k, True, *search(table, k, workspace_bytes=workspace), decided=0.5)
    queries = table[:77].clone()
    bounded = ops.cosine_topk(queries, table, k, None, workspace, None, None)
    check(queries, table, k, False, *bounded, decided=0.5)


def test_a_small_workspace_means_small_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    made: list[weakref.ref[kernel.CandidateBuffer]] = []
    most = [0]
    make = topk_search.TopKSearch._buffer

    def recorded(self: topk_search.TopKSearch, chunk: Chunk, is_new: bool) -> kernel.CandidateBuffer:
        buffer = make(self, chunk, is_new)
        made.append(weakref.ref(buffer))
        alive = [each for each in (reference() for reference in made) if each is not None]
        most[0] = max(most[0], sum(8 * each.candidates.numel() for each in alive))
        return buffer

    monkeypatch.setattr(topk_search.TopKSearch, "_buffer", recorded)
    table, workspace = embeddings(200, 7, device), 2**18
    search(table, 9)
    assert most[0] > workspace
    most[0] = 0
    check(table, table, 9, True, *search(table, 9, workspace_bytes=workspace))
    assert 0 < most[0] <= workspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_table_that_is_cast_chunk_by_chunk(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Products in half precision of an fp32 table, in one piece or many; rows as long as fp16 cannot hold."""
    table = embeddings(130, 33, device) * 1e6
    values, indices = search(table, 9, dtype=dtype)
    assert values.dtype == torch.float32
    check(table, table, 9, True, values, indices, decided=0.0, rounded=dtype)
    table = adversarial_table("exact", 130, device) * 2.0**20  # whose unit vectors fit every dtype
    check_exactly(table, 9, *search(table, 9, dtype=dtype, workspace_bytes=50_000))


def test_a_memory_mapped_table(tmp_path: Path, backend: str, device: torch.device) -> None:
    table = embeddings(150, 24, CPU)
    torch.save(table, tmp_path / "table.pt")
    mapped = torch.load(tmp_path / "table.pt", mmap=True)
    values, indices = search(mapped, 9, device=device, workspace_bytes=30_000)
    assert indices.device == values.device == device
    check(table.to(device), table.to(device), 9, True, values, indices)


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


# --- norms, precision, NaN


@pytest.mark.parametrize(("scale", "rescore"), [(1e-30, False), (1e30, False), (1e-10, True), (1e25, True)])
def test_norms_that_no_product_could_hold(scale: float, rescore: bool, backend: str, device: torch.device) -> None:
    table = torch.randn(90, 7, device=device)
    table[0] = 0
    table[1::2] *= scale
    check(table, table, 9, True, *search(table, 9, rescore=rescore))


def test_rescoring_restores_what_half_precision_loses(backend: str, device: torch.device) -> None:
    table = adversarial_table("one cluster", N, device)
    truth = reference.cosine_topk(table.double(), table.double(), 20, exclude_self=True)[1]

    def recall(indices: Tensor) -> float:
        return (indices.unsqueeze(2) == truth.unsqueeze(1)).any(2).double().mean().item()

    rounded, rescored = (search(table, 20, dtype=torch.bfloat16, rescore=rescore) for rescore in (False, True))
    assert recall(rounded[1]) < 0.95 < recall(rescored[1])
    exact = F.cosine_similarity(table.double()[:, None], table.double()[rescored[1]], dim=2)
    assert (rescored[0] - exact).abs().max() < 1e-6  # the similarities of a cluster differ by little more


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


# --- progress


@pytest.mark.parametrize("workspace", [None, 30_000])
def test_progress_is_reported_to_the_end(workspace: int | None, backend: str, device: torch.device) -> None:
    reports: list[tuple[int, int]] = []
    table = embeddings(130, 7, device)
    search(table, 9, workspace_bytes=workspace, progress=lambda done, total: reports.append((done, total)))
    done, total = zip(*reports, strict=True)
    assert len(set(total)) == 1
    assert list(done) == sorted(set(done))
    assert done[-1] == total[-1]
    search(table, 9)
    assert len(reports) == len(done)  # the next search is silent


def test_progress_bar(backend: str, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    search(embeddings(70, 7, device), 9, progress=True)
    assert "class graph: 100%" in capsys.readouterr().err


def test_a_failing_callback_ends_the_search_and_nothing_else(backend: str, device: torch.device) -> None:
    table = embeddings(130, 7, device)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(table, 9, progress=stop)
    check(table, table, 9, True, *search(table, 9), decided=0.5)
