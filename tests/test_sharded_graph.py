"""The class graph of a sharded table: the half ring against one process, what it multiplies, sends and holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import on_ranks, peak_of
from sharded_cases import (
    RANKS,
    SIZES_OF_MESHES,
    C,
    Check,
    Found,
    H,
    K,
    N,
    OnMeshes,
    W,
    assert_no_error,
    batch,
    make_matcher,
    whole,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from qaconv_triton import GraphSampler, QAConv, functional, ops
from qaconv_triton.sharded import graph as half_ring
from qaconv_triton.sharded import table


@contextmanager
def replaced(module: ModuleType, name: str, value: int) -> Iterator[None]:
    """Within the context a constant of a module is another."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def parts_of(count: int) -> AbstractContextManager[None]:
    """Within the context visitors come in parts of so many bytes."""
    return replaced(half_ring, "PART_BYTES", count)


def check_graph(mesh: DeviceMesh) -> None:
    """The ids of one process, ties included, with shards of several sizes; k beyond a shard's rows."""
    for count, k, dtype in (
        (41, 7, torch.bfloat16),
        (9, 8, torch.float32),
        (41, 7, torch.float32),
        (41, 7, torch.float64),
        (40, 3, torch.float32),
    ):
        generator = torch.Generator().manual_seed(count)
        # Products of small integers are exact, and so are ties; all norms are equal.
        values = torch.randint(0, 2, (count, 4, 2, 2), generator=generator).mul(2).sub(1).to(dtype)
        matcher = QAConv(4, 2, 2, count, k, mesh=mesh, dtype=dtype)
        matcher.load_state_dict(matcher.state_dict() | {"class_embed": values})
        graph = matcher.compute_class_neighbors()
        assert isinstance(graph, DTensor)
        assert len(graph.to_local()) == len(matcher.class_embed.to_local())  # type: ignore[union-attr]
        expected = functional.class_neighbors(values, k)
        assert torch.equal(whole(graph), expected)
        largest = -(-count // mesh.size())
        for part_bytes in (half_ring.PART_BYTES, 3 * 16 * 4, *((1,) if count == 9 else ())):
            parts = -(-largest // max(1, part_bytes // (16 * dtype.itemsize)))
            steps: list[int] = []
            with parts_of(part_bytes):
                again = matcher.compute_class_neighbors(progress=lambda done, total, steps=steps: steps.append(done))
            assert torch.equal(whole(again), expected)
            assert steps == list(range(1, mesh.size() // 2 * parts + 1))


def check_products(mesh: DeviceMesh) -> None:
    """Every unordered pair of classes of different shards is multiplied on one rank, once."""
    matcher, mutual = QAConv(C, H, W, 23, K, mesh=mesh), ops.mutual_topk
    for part_bytes, most in ((half_ring.PART_BYTES, 12), (5 * C * H * W * 4, 5)):
        sizes: list[tuple[int, int]] = []

        def counted(left: Tensor, right: Tensor, *rest: Any, sizes: list[tuple[int, int]] = sizes) -> Any:
            sizes.append((len(left), len(right)))
            return mutual(left, right, *rest)

        ops.mutual_topk = counted  # type: ignore[assignment]
        try:
            with parts_of(part_bytes):
                matcher.compute_class_neighbors()
        finally:
            ops.mutual_topk = mutual
        assert all(visitors <= most for _, visitors in sizes)
        total = torch.tensor(sum(own * visitors for own, visitors in sizes))
        distributed.all_reduce(total, group=mesh.get_group())
        of_ranks = [len(part) for part in torch.arange(23).chunk(mesh.size())]
        assert int(total) == (23**2 - sum(size**2 for size in of_ranks)) // 2


def check_memory(mesh: DeviceMesh) -> None:
    """Beyond its shard a rank holds parts of visitors, not visitors."""
    if mesh.size() != RANKS or not Path("/proc/self/clear_refs").exists():
        return
    matcher = QAConv(2**15, 1, 1, 1024, K, mesh=mesh)
    shard = 4 * matcher.class_embed.to_local().numel()  # type: ignore[union-attr]
    with parts_of(shard // 16):
        held = peak_of(matcher.compute_class_neighbors)
    held_in_one = peak_of(matcher.compute_class_neighbors)
    assert held < shard // 2, (held, shard)
    assert held_in_one > 1.4 * shard  # a visitor and the next: else nothing was measured


def check_graph_lifetime(mesh: DeviceMesh) -> None:
    """Assigned whole or sharded, dropped with the epoch, copied by clone, and no finite table: no graph."""
    matcher = make_matcher(mesh, torch.float32)
    graph = whole(matcher.compute_class_neighbors())
    assert torch.equal(whole(matcher.clone().class_neighbors), graph)  # type: ignore[arg-type]
    assert copy.deepcopy(matcher).class_neighbors is None
    matcher.on_epoch_start()
    assert matcher.class_neighbors is None
    other = (graph + 1) % N
    matcher.class_neighbors = other
    features, labels, _ = batch(2, mesh.get_local_rank(), torch.float32)
    assert torch.equal(matcher.class_scores(features, labels).classes, other[labels])
    for placement in (Replicate(), Shard(1), Shard(0)):
        matcher.class_neighbors = distribute_tensor(other, mesh, [placement])
        assert torch.equal(matcher.class_scores(features, labels).classes, other[labels])
    matcher.class_neighbors = matcher.class_neighbors
    assert torch.equal(whole(matcher.class_neighbors), other)  # type: ignore[arg-type]
    stranger = DeviceMesh("cpu", [[distributed.get_rank()]], _init_backend=False)
    with pytest.raises(ValueError, match="DTensor of the table's"):
        matcher.class_neighbors = DTensor.from_local(other, stranger, [Replicate(), Replicate()], run_check=False)
    with torch.no_grad():
        if mesh.get_local_rank() == 0:
            matcher.class_embed.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
    expected = (
        (ValueError, r"NaN or Inf in 1 of .* first: \[0\]")
        if mesh.get_local_rank() == 0
        else (RuntimeError, "rank 0 .* failed: ValueError")
    )
    with pytest.raises(expected[0], match=expected[1]):
        matcher.compute_class_neighbors()
    assert torch.equal(whole(matcher.class_neighbors), other)  # type: ignore[arg-type]


# --- batches of it


def check_sampler(mesh: DeviceMesh) -> None:
    """Batches and state are those of the same graph whole; an id that is none raises on all ranks."""
    generator = torch.Generator().manual_seed(3)
    graph = torch.rand(41, 41, generator=generator).fill_diagonal_(-1.0).topk(6).indices
    graph[7] = graph[7, 0]  # one neighbour, named six times: random classes fill the batch
    labels = torch.arange(41).repeat(3)
    placement = {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}
    for some, how in (
        (labels, Shard(0)),
        (labels[labels % 3 > 0], Shard(0)),  # classes without samples: look further
        (labels, Shard(1)),
        (labels, Replicate()),
    ):
        sharded_graph = distribute_tensor(graph, mesh, [how])
        sampler, expected = (GraphSampler(some, each, 12, 3, **placement) for each in (sharded_graph, graph))  # type: ignore[arg-type]
        with replaced(table, "GATHERED_BYTES", 2000):
            batches = [next(each) for each in (iter(sampler), iter(expected))]
            assert sampler.state_dict() == expected.state_dict()
            assert [batches[0], *sampler, *sampler] == [batches[1], *expected, *expected]
    alone = DeviceMesh("cpu", [[distributed.get_rank()]], _init_backend=False)  # of two dimensions
    whole_graph = DTensor.from_local(graph, alone, [Replicate(), Replicate()], run_check=False)
    batches = [list(GraphSampler(labels, each, 12, 3, **placement)) for each in (whole_graph, graph)]  # type: ignore[arg-type]
    assert batches[0] == batches[1]
    wrong = distribute_tensor(graph, mesh, [Shard(0)])
    if mesh.get_local_rank() == 0:
        wrong.to_local()[0, 0] = 41
    kind, text = (ValueError, r"got \d to 41") if mesh.get_local_rank() == 0 else (RuntimeError, "rank 0 of the mesh")
    with pytest.raises(kind, match=text):
        next(iter(GraphSampler(labels, lambda: wrong, 12, 3)))


def check_what_a_sampler_holds(mesh: DeviceMesh) -> None:
    """Of the graph, `[N, K]` of int64, the columns that batches need, as int32, and a few numbers of each class."""
    if mesh.size() != RANKS or not Path("/proc/self/clear_refs").exists():
        return
    count, k = 500_000, 20
    local = torch.randint(count, (table.chunk_rows(count, mesh), k))
    graph = table.sharded(local, count, mesh)
    sampler = GraphSampler(torch.arange(count), graph, 8, 2, batches_per_epoch=1)  # four classes
    with replaced(table, "GATHERED_BYTES", 2**20):
        held = peak_of(lambda: list(sampler))
    held_by_all = peak_of(lambda: whole(graph))  # before ranks part, if one finds too much
    assert held < 8 * k * count / 2, held
    assert held_by_all > 0.9 * 8 * k * count  # else nothing was measured


CHECKS: list[Check] = [
    check_graph,
    check_products,
    check_memory,
    check_graph_lifetime,
    check_sampler,
    check_what_a_sampler_holds,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return on_ranks(OnMeshes(CHECKS), tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES_OF_MESHES)
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_sharded_graph(found: list[Found], name: str, size: int) -> None:
    assert_no_error(found, name, size)
