"""The class graph of a sharded table: the half ring against one process, what it multiplies, sends and holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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

from qaconv_triton import QAConv, functional, ops
from qaconv_triton.sharded import graph as half_ring


@contextmanager
def parts_of(count: int) -> Iterator[None]:
    """Within the context visitors come in parts of so many bytes."""
    before, half_ring.PART_BYTES = half_ring.PART_BYTES, count
    try:
        yield
    finally:
        half_ring.PART_BYTES = before


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
        for part_bytes in (half_ring.PART_BYTES, 3 * 16 * 4, 1):
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
    assert held < shard // 2, (held, shard)
    assert peak_of(matcher.compute_class_neighbors) > 1.4 * shard  # a visitor and the next: else nothing was measured


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
        table = matcher.class_embed.to_local()  # type: ignore[union-attr]
        if mesh.get_local_rank() == 0:
            table[0, 0] = torch.nan
    expected = (
        (ValueError, r"NaN or Inf in 1 of .* first: \[0\]")
        if mesh.get_local_rank() == 0
        else (RuntimeError, "rank 0 .* failed: ValueError")
    )
    with pytest.raises(expected[0], match=expected[1]):
        matcher.compute_class_neighbors()
    assert torch.equal(whole(matcher.class_neighbors), other)  # type: ignore[arg-type]


CHECKS: list[Check] = [check_graph, check_products, check_memory, check_graph_lifetime]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return on_ranks(OnMeshes(CHECKS), tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES_OF_MESHES)
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_sharded_graph(found: list[Found], name: str, size: int) -> None:
    assert_no_error(found, name, size)
