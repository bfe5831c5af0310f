"""The model of a sharded class table, against what its ranks send, multiply and hold; the page that it writes.

Most ranks here are alone with torch's fake process group: it takes the messages of a rank of many, and delivers none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench import __main__ as command
from bench import problems, scale, scores
from bench.scale_model import (
    Job,
    graph_flops,
    graph_messages,
    half_ring,
    memory,
    sampler_bytes,
    step_flops,
    step_messages,
)
from qaconv_triton import GraphSampler, QAConv, ops
from qaconv_triton.distributed import local_rows
from qaconv_triton.sharded import graph as graph_search
from qaconv_triton.sharded import table
from qaconv_triton.sharded.table import sharded

KINDS = {
    "c10d.allgather_.default": ("all_gather", 1),
    "c10d.allreduce_.default": ("all_reduce", 0),
    "c10d.recv_.default": ("receive", 0),
    "_c10d_functional.all_gather_into_tensor.default": ("all_gather", 0),
    "_c10d_functional.reduce_scatter_tensor.default": ("reduce_scatter", 0),
}  # by torch's op; and which of its arguments a rank gives
NO_MESSAGES = ("c10d.send.default", "_c10d_functional.wait_tensor.default")  # a message counts where it arrives
SMALL = Job(3, 40, 16, 2, 2, k=4, batch=5)


class Recorder(TorchDispatchMode):
    """What a rank does: its messages, and the most bytes that tensors take which it makes or uses."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op)
        if name.startswith(("c10d.", "_c10d_functional.")) and name not in NO_MESSAGES and "_wrap_" not in name:
            kind, position = KINDS.get(name, (name, 0))
            (tensor,) = tree_leaves(args[position])
            self.messages.append((kind, tensor.nbytes))
        result = op(*args, **(kwargs or {}))
        self.keep(result)
        return result

    def keep(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if type(tensor) is Tensor and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))


@contextmanager
def rank_of_many(job: Job, rank: int) -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def make_matcher(job: Job) -> QAConv:
    mesh = init_device_mesh("cpu", (job.ranks,))
    maps = job.channels, job.height, job.width
    matcher = QAConv(*maps, job.classes, job.k, include_self=True, mesh=mesh)
    if job.itemsize == 2:
        table = matcher.class_embed.to_local().detach().bfloat16()
        matcher.class_embed = torch.nn.Parameter(sharded(table, job.classes, mesh))
    return matcher


def run_graph_and_step(job: Job) -> tuple[QAConv, Recorder, Recorder]:
    """A matcher, and what its rank does in a graph, but for the work of kernels, and in a step."""
    matcher = make_matcher(job)
    graph, step = Recorder(), Recorder()

    def hidden(kernel: Callable[..., Any], *given: Any) -> Any:
        with _disable_current_modes():
            result = kernel(*given)
        graph.keep(result)
        return result

    with (
        mock.patch.object(ops, "cosine_topk", partial(hidden, ops.cosine_topk)),
        mock.patch.object(ops, "mutual_topk", partial(hidden, ops.mutual_topk)),
        graph,
    ):
        matcher.compute_class_neighbors()
    dtype = matcher.class_embed.dtype
    features = torch.randn(job.batch, job.channels, job.height, job.width, dtype=dtype, requires_grad=True)
    labels = torch.randint(job.classes, (job.batch,))
    with step:
        matcher.class_scores(features, labels).values.square().mean().backward()
    return matcher, graph, step


def sent(job: Job, rank: int) -> list[list[tuple[str, int]]]:
    """The messages of this rank in a graph and in a step, sorted."""
    return [sorted(recorder.messages) for recorder in run_graph_and_step(job)[1:]]


def expected(job: Job, rank: int) -> list[list[tuple[str, int]]]:
    graph = [tuple(message) for messages in graph_messages(job, rank) for message in messages if message.nbytes]
    return [sorted(graph), sorted(tuple(message) for message in step_messages(job))]


@pytest.mark.parametrize(
    ("job", "rank"),
    [
        (SMALL, 2),  # one row less than the others
        (SMALL._replace(ranks=4, classes=9), 3),  # none
        (SMALL._replace(ranks=4, classes=9), 1),
        (SMALL._replace(ranks=6, classes=33, itemsize=2), 0),  # the last step in halves
        (SMALL._replace(ranks=6, classes=33, itemsize=2), 5),
        (SMALL._replace(ranks=64, classes=640, height=1), 37),
    ],
)
def test_ranks_send_the_bytes_of_the_model(job: Job, rank: int) -> None:
    for nbytes in (2**30, 5 * job.map_bytes):  # of a visitor's part
        with mock.patch.object(graph_search, "PART_BYTES", nbytes), rank_of_many(job, rank):
            assert sent(job, rank) == expected(job, rank)


@pytest.mark.slow
def test_ranks_that_train_together_send_the_bytes_of_the_model(tmp_path: Path) -> None:
    found = on_ranks(partial(sent, SMALL), tmp_path, SMALL.ranks)
    assert found == [expected(SMALL, rank) for rank in range(SMALL.ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("classes", [2, 9, 40, 41])
def test_ranks_multiply_every_pair_of_classes_once(ranks: int, classes: int) -> None:
    job = SMALL._replace(ranks=ranks, classes=classes)
    assert sum(sum(graph_flops(job, rank)) for rank in range(ranks)) == classes * (classes - 1) * job.dim
    steps = [half_ring(job, rank) for rank in range(ranks)]
    sent_home = sum(step.visiting for of_rank in steps for step in of_rank)
    assert sent_home == sum(step.returned for of_rank in steps for step in of_rank)


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_products_are_those_of_the_model(rank: int) -> None:
    job, pairs = SMALL._replace(ranks=6, classes=33), []
    within, between = ops.cosine_topk, ops.mutual_topk

    def search_own(shard: Tensor, *given: Any) -> Any:
        pairs.append(len(shard) * (len(shard) - 1) // 2)
        return within(shard, *given)

    def meet(own: Tensor, visitors: Tensor, *given: Any) -> Any:
        pairs.append(len(own) * len(visitors))
        return between(own, visitors, *given)

    with (
        rank_of_many(job, rank),
        mock.patch.object(ops, "cosine_topk", search_own),
        mock.patch.object(ops, "mutual_topk", meet),
    ):
        make_matcher(job).compute_class_neighbors()
    assert [2 * job.dim * each for each in pairs] == [flops for flops in graph_flops(job, rank) if flops]


def test_products_of_a_step_are_those_of_the_benchmarks() -> None:
    case = scores.TINY[0]
    batch, classes, k, channels, height, width, _ = case.sizes
    problem = problems.build(case, torch.device("cpu"))
    job = Job(1, classes, channels, height, width, k - 1, batch)
    assert step_flops(job) == problems.useful_work(problem, "step")[0]


def kept_in(results: list[Tensor], function: Callable[..., Tensor], *given: Any) -> Tensor:
    results.append(function(*given))
    return results[-1]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_memory_is_that_of_the_model(itemsize: int) -> None:
    job = Job(64, 640, 64, 2, 2, k=4, batch=8, itemsize=itemsize)
    model, shard = memory(job), job.rows(0) * job.map_bytes
    with rank_of_many(job, 0):
        matcher, graph, step = run_graph_and_step(job)
        optimizer = torch.optim.AdamW([matcher.class_embed], fused=True)
        optimizer.step()
        moments = [value for name, value in optimizer.state[matcher.class_embed].items() if name != "step"]
        held = [matcher.class_embed, matcher.class_embed.grad, *moments, matcher.class_neighbors]
        assert sum(local_rows(tensor).nbytes for tensor in held) == model["training"]
        with Recorder() as again:
            optimizer.step()
        neighbors = sharded(local_rows(matcher.class_neighbors) * 0, job.classes, matcher.mesh)
        with mock.patch.object(table, "gathered_on_cpu", partial(kept_in, kept := [], table.gathered_on_cpu)):
            next(iter(GraphSampler(torch.arange(job.classes), neighbors, batch_size=job.batch, num_instances=2)))
        assert [tensor.nbytes for tensor in kept] == [sampler_bytes(job, instances=2)]
    assert again.peak <= 4 * shard + 64  # the update needs nothing besides, but a counter
    assert graph.peak == pytest.approx(shard + model["search"], rel=0.02)
    assert step.peak == pytest.approx(2 * shard + model["step"], rel=0.05)  # table, gradient
    assert model["peak"] == model["training"] + model["step"]


@pytest.mark.parametrize(("ranks", "visitors"), [(2, 0.5), (3, 1), (4, 1.5), (5, 2), (8, 2)])
def test_visitors_of_a_search_are_those_of_the_model(ranks: int, visitors: float) -> None:
    job = Job(ranks, 40 * ranks, 512, 2, 2, k=1, batch=1)
    for rows in (40, 4):  # of a visitor's part
        nbytes = rows * job.map_bytes
        with mock.patch.object(graph_search, "PART_BYTES", nbytes), rank_of_many(job, 0):
            _, graph, _ = run_graph_and_step(job)
            model = memory(job)["search"]
        assert model == pytest.approx((visitors if rows == 40 else 2) * nbytes, rel=0.2)
        assert graph.peak == pytest.approx(40 * job.map_bytes + model, rel=0.02)


def test_the_committed_page_has_the_computed_section() -> None:
    page = (scale.DOCS / "many-devices.md").read_text(encoding="utf-8")
    assert scale.SECTION.format("computed", scale.computed_section()) in page


def test_a_page_without_sections_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match=r"expected one section .* got 0"):
        command.main(["scale", "--computed", "--page", str(page)])
    assert page.read_text() == "# Title\n"


@pytest.mark.slow
def test_measured_from_the_command_line_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    old = "\n\n".join(scale.SECTION.format(name, "old") for name in ("measured", "computed"))
    page.write_text(f"# Title\n\n{old}\n\nEnd.\n", encoding="utf-8")
    given = ["--cases", "64x8x2x2x4x8", "--processes", "1", "2", "--rounds", "2", "--page", str(page)]
    command.main(["scale", *given])
    written = page.read_text(encoding="utf-8")
    assert written.startswith("# Title\n\n<!--")
    assert written.endswith("<!-- end -->\n\nEnd.\n")
    assert "old" not in written
    measured, computed = (text.split("<!-- end -->")[0] for text in written.split("<!-- python -m bench scale: ")[1:])
    assert scale.computed_section() in computed
    rows = [line.split("|")[1:-1] for line in measured.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip() for row in rows] == ["1", "2"]
    assert all(float(row[column].split("(")[0]) > 0 for row in rows for column in (3, 6))
    assert measured.strip().splitlines()[2] in capsys.readouterr().out
