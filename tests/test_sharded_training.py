"""Around a sharded class table: checkpoints, optimizers, clipping, DDP, pickling, a rank that does not take part."""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, peak_of
from sharded_cases import C, H, K, N, W, batch, docs_code, errors_of, gradients, make_matcher, whole
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qaconv_triton import QAConv, SoftmaxTripletLoss, sharded

RANKS = 3
LARGE = 200_000  # classes of 128 dimensions


def make_optimizer(matcher: QAConv) -> torch.optim.AdamW:
    return torch.optim.AdamW(SoftmaxTripletLoss(matcher).param_groups(), lr=1e-2)


def step(matcher: QAConv, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step with gradients that do not depend on the number of ranks, so that results are equal bit for bit."""
    for parameter in matcher.parameters():
        generator = torch.Generator().manual_seed(number)
        grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            parameter.grad = parameter.detach().clone()
            parameter.grad.to_local().copy_(sharded.table.own_rows(grad, parameter).to_local())
        else:
            parameter.grad = grad
    optimizer.step()
    for name, buffer in matcher.named_buffers():
        if "num_batches" not in name:
            buffer.fill_(number + 0.5)


# A whole table and a sharded one make one group of parameters and two: names, not groups, say whose a state is.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def state_of(matcher: QAConv, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = get_optimizer_state_dict(matcher, optimizer, options=FLAT)
    return {"model": matcher.state_dict(), "optimizer": state}


def loaded(matcher: QAConv, folder: Path, group: Any) -> torch.optim.AdamW:
    """Load a checkpoint into a matcher; the optimizer that goes on with it."""
    optimizer = make_optimizer(matcher)
    state = state_of(matcher, optimizer)
    dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    matcher.load_state_dict(state["model"])
    set_optimizer_state_dict(matcher, optimizer, state["optimizer"], options=FLAT)
    return optimizer


def values_of(matcher: QAConv) -> dict[str, Tensor]:
    return {name: whole(value).detach().clone() for name, value in matcher.state_dict().items()}


def trained(mesh: DeviceMesh | None) -> tuple[QAConv, torch.optim.AdamW]:
    matcher = make_matcher(mesh, torch.float32)
    optimizer = make_optimizer(matcher)
    step(matcher, optimizer, 0)
    return matcher, optimizer


# --- on all ranks


def check_checkpoints(meshes: list[DeviceMesh], folder: Path) -> None:
    """Saved on three ranks, two, or one process with a whole table, loaded on any: the next step is the same."""
    expected_matcher, expected_optimizer = trained(None)
    step(expected_matcher, expected_optimizer, 1)
    expected = values_of(expected_matcher)
    rank = distributed.get_rank()
    for saver in (*meshes, None):
        path = folder / f"of {0 if saver is None else saver.size()}"
        is_in = saver.get_coordinate() is not None if saver is not None else rank == 0
        if is_in:
            state = state_of(*trained(saver))
            group = None if saver is None else saver.get_group()
            if saver is not None and saver.size() == 3:
                dcp.async_save(state, checkpoint_id=path, process_group=group).result()
            else:
                dcp.save(state, checkpoint_id=path, process_group=group, no_dist=saver is None)
        distributed.barrier()
        for loader in (*meshes, None):
            if loader is not None and loader.get_coordinate() is None:
                continue
            matcher = QAConv(C, H, W, N, K, mesh=loader)
            optimizer = loaded(matcher, path, None if loader is None else loader.get_group())
            step(matcher, optimizer, 1)
            for name, value in values_of(matcher).items():
                assert torch.equal(value, expected[name]), name
        distributed.barrier()


def check_pickling(meshes: list[DeviceMesh], folder: Path) -> None:
    matcher = make_matcher(meshes[-1], torch.float32)
    fresh, copied = (copy.deepcopy(make_matcher(meshes[-1], torch.float32)) for _ in range(2))
    moved = copied.double()
    parameters = QAConv(C, H, W, N, K, mesh=meshes[-1]).class_embed, fresh.class_embed, moved.class_embed
    for value in (*parameters, matcher, matcher.state_dict(), SoftmaxTripletLoss(matcher), moved, moved.clone()):
        for save in (lambda each: torch.save(each, io.BytesIO()), pickle.dumps):
            with pytest.raises(TypeError, match=r"sharded over a device mesh.*torch\.distributed\.checkpoint"):
                save(value)
    assert moved.class_embed.to_local().dtype == torch.float64  # type: ignore[union-attr]
    single = make_matcher(None, torch.float32)
    with pytest.raises(RuntimeError, match=r"class_embed: sharded over a device mesh"):
        single.load_state_dict(matcher.state_dict())
    assert torch.equal(single.class_embed, whole(matcher.class_embed))  # type: ignore[arg-type]


def check_optimizers(meshes: list[DeviceMesh], folder: Path) -> None:
    """Groups of their own let optimizers with `foreach` and `fused` take both kinds; results are those of a loop."""
    mesh, results = meshes[-1], []
    for kind, options in (
        (torch.optim.AdamW, {"foreach": False}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
    ):
        matcher = make_matcher(mesh, torch.float32)
        criterion = SoftmaxTripletLoss(matcher)
        groups = criterion.param_groups()
        assert [len(group["params"]) for group in groups] == [6, 1]
        assert groups[1]["params"][0] is matcher.class_embed
        optimizer = kind(groups, lr=1e-2, **options)  # type: ignore[arg-type]
        for number in range(2):
            step(matcher, optimizer, number)
        results.append(values_of(matcher))
    for same in (results[:4], results[4:]):
        for other in same[1:]:
            for name, value in other.items():
                torch.testing.assert_close(value, same[0][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)


def check_clipping(meshes: list[DeviceMesh], folder: Path) -> None:
    """The way of docs/many-devices.md, against `clip_grad_norm_` of one process."""
    mesh, clip_gradients = meshes[-1], docs_code()["clip_gradients"]
    for max_norm in (0.1, 1e6):
        matcher, single = make_matcher(mesh, torch.float64), make_matcher(None, torch.float64)
        optimizer, other = make_optimizer(matcher), make_optimizer(single)
        for each, its_optimizer in ((matcher, optimizer), (single, other)):
            step(each, its_optimizer, 3)
        total = clip_gradients(optimizer, max_norm)
        expected = nn.utils.clip_grad_norm_(single.parameters(), max_norm)
        torch.testing.assert_close(total, expected)
        for name, value in gradients(matcher).items():
            torch.testing.assert_close(value, gradients(single)[name])


def check_scaler(meshes: list[DeviceMesh], folder: Path) -> None:
    """An optimizer for each kind of parameters: infinite on one rank, the table's step is left out on all."""
    mesh = meshes[-1]
    matcher = make_matcher(mesh, torch.float32)
    groups = SoftmaxTripletLoss(matcher).param_groups()
    optimizers = [torch.optim.SGD([group], lr=0.1) for group in groups]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    features, labels, _ = batch(2, mesh.get_local_rank(), torch.float32)
    for is_finite in (False, True):
        before, scale = values_of(matcher)["class_embed"], scaler.get_scale()
        matcher.zero_grad()
        scaler.scale(matcher.class_scores(features, labels).values.sin().sum()).backward()
        if not is_finite and mesh.get_local_rank() == 0:
            matcher.class_embed.grad.to_local()[0] = torch.inf  # type: ignore[union-attr]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(values_of(matcher)["class_embed"], before) != is_finite
        assert scaler.get_scale() == (scale if is_finite else scale / 2)


def check_ddp(meshes: list[DeviceMesh], folder: Path) -> None:
    """DDP takes no sharded matcher, whether its shards are even or not."""
    for count in (9, 8):
        matcher = QAConv(C, H, W, count, K, mesh=meshes[-1])
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            DistributedDataParallel(SoftmaxTripletLoss(matcher))


def check_memory(meshes: list[DeviceMesh], folder: Path) -> None:
    """From construction on a rank holds its share of the table, the gradient and the optimizer's state."""
    if not Path("/proc/self/clear_refs").exists():
        return
    peaks = {}
    for mesh in (meshes[2], meshes[0]):  # the smaller one first: what it may leave behind counts against it
        if mesh.get_coordinate() is not None:
            peaks[mesh.size()] = peak_of(partial(train_large, mesh))
        distributed.barrier()
    if len(peaks) == 2:
        assert peaks[1] > 4 * 4 * 128 * LARGE  # table, gradient, two moments: else nothing was measured
        assert peaks[3] < 0.45 * peaks[1], peaks
    matcher = make_large(meshes[2])
    loss = matcher.class_scores(torch.randn(4, 8, 4, 4), torch.arange(4)).values.sum()
    gradient = 4 * matcher.class_embed.to_local().numel()  # type: ignore[union-attr]
    assert gradient < peak_of(loss.backward) < 1.6 * gradient  # no second one on the way


def make_large(mesh: DeviceMesh) -> QAConv:
    matcher = QAConv(8, 4, 4, LARGE, K, mesh=mesh)
    matcher.class_neighbors = (torch.arange(LARGE).unsqueeze(1) + torch.arange(1, K + 1)) % LARGE
    return matcher


def train_large(mesh: DeviceMesh) -> None:
    matcher = make_large(mesh)
    optimizer = torch.optim.AdamW(SoftmaxTripletLoss(matcher).param_groups())
    matcher.class_scores(torch.randn(4, 8, 4, 4), torch.arange(4)).values.sum().backward()
    optimizer.step()


def check_absent_rank(meshes: list[DeviceMesh], folder: Path) -> None:
    """A rank that does not take part: the others fail within the time that the group has."""
    # Ranks that no other mesh has: torch caches by the ranks of a mesh, and would come up with the other's group.
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=3))
    if distributed.get_rank() == 2:
        return
    matcher = make_matcher(DeviceMesh.from_group(group, "cpu"), torch.float32)
    if distributed.get_rank() == 0:
        time.sleep(6)
        return
    features, labels, _ = batch(2, distributed.get_rank(), torch.float32)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        matcher.class_scores(features, labels)
    assert time.monotonic() - start < 5


CHECKS: list[Callable[[list[DeviceMesh], Path], None]] = [
    check_checkpoints,
    check_pickling,
    check_optimizers,
    check_clipping,
    check_scaler,
    check_ddp,
    check_memory,
    check_absent_rank,  # the last: what it leaves of its group is of no use
]


class _Run:
    """Every check on this rank, with a folder for all: what it raised, "" for nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, str]:
        meshes = [DeviceMesh("cpu", list(range(RANKS - size, RANKS))) for size in (1, 2, 3)]
        return errors_of(CHECKS, meshes, self.folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return on_ranks(_Run(tmp_path_factory.mktemp("checkpoints")), tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_training(found: list[dict[str, str]], name: str) -> None:
    for rank, of_rank in enumerate(found):
        assert not of_rank[name], f"rank {rank}: {of_rank[name]}"
