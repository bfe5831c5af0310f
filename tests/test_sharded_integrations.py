"""FSDP2, Lightning and Accelerate around the backbone beside a sharded table, by the code of docs/many-devices.md.

Each trains on two processes, and is compared with DistributedDataParallel. All in fp64: where a gradient is zero but
for rounding, Adam makes a step of full size of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded_cases import docs_code, errors_of, whole
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss

RANKS, EPOCHS, STEPS = 2, 2, 2  # steps of an epoch
N, C, H, W, K = 25, 6, 2, 2, 15
LABELS = torch.arange(N).repeat_interleave(6)


def make_criterion(num_classes: int, mesh: Any) -> SoftmaxTripletLoss:
    """As in the docs, but small, and the same in every run."""
    torch.manual_seed(0)
    return SoftmaxTripletLoss(QAConv(C, H, W, num_classes, K, include_self=True, mesh=mesh), background="ignore")


class Training:
    """What all runs share: the images, the start of the backbone, the names that the docs define."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(len(LABELS), 3, 8, 8, generator=generator)
        torch.manual_seed(2)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, C, 1))
        self.docs = docs_code(with_lightning=True)
        self.docs["make_criterion"] = make_criterion

    def loader(self, neighbors: Callable[[], Tensor]) -> DataLoader[Any]:
        sampler = GraphSampler(LABELS, neighbors, batch_size=32, num_instances=4, batches_per_epoch=STEPS)
        return DataLoader(TensorDataset(self.images, LABELS), batch_sampler=sampler)


Result = tuple[list[float], dict[str, Tensor]]  # losses, and parameters by name


def result_of(losses: list[float], backbone: nn.Module, criterion: nn.Module) -> Result:
    named = [*backbone.named_parameters(), *criterion.named_parameters()]
    return losses, {name.removeprefix("module."): whole(value.detach()).clone() for name, value in named}


def train_with_ddp(training: Training) -> Result:
    model, criterion, optimizer, sampler = training.docs["build"](training.backbone, LABELS, N, "cpu")
    loader = training.loader(sampler.neighbors)
    return train(training, model, criterion, optimizer, loader)


def train(
    training: Training, model: nn.Module, criterion: nn.Module, optimizer: Any, loader: DataLoader[Any]
) -> Result:
    losses = []
    for _ in range(EPOCHS):
        for images, labels in loader:
            loss = criterion(model(images), labels)[2].mean()
            optimizer.zero_grad()
            loss.backward()
            total = training.docs["clip_gradients"](optimizer, 1.0)
            assert total > 1.0, "nothing was clipped"
            optimizer.step()
            losses.append(loss.item())
    return result_of(losses, model, criterion)


def assert_same(found: Result, expected: Result) -> None:
    assert len(expected[0]) == EPOCHS * STEPS
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: n + m)


# --- on all ranks


def check_fsdp(folder: Path) -> None:
    expected, training = train_with_ddp(Training()), Training()
    mesh = distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    criterion = make_criterion(N, mesh)
    model = training.docs["shard"](training.backbone, mesh)
    optimizer = training.docs["make_optimizer"](model, criterion)
    assert all(isinstance(parameter, DTensor) for parameter in optimizer.param_groups[0]["params"])
    loader = training.loader(criterion.matcher.compute_class_neighbors)
    assert_same(train(training, model, criterion, optimizer, loader), expected)


def check_clipping(folder: Path) -> None:
    """The norm is that of all gradients, of which the backbone's and the table's are sharded."""
    training = Training()
    mesh = distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    criterion = make_criterion(N, mesh)
    model = training.docs["shard"](training.backbone, mesh)
    optimizer = training.docs["make_optimizer"](model, criterion)
    images, labels = next(iter(training.loader(criterion.matcher.compute_class_neighbors)))
    for max_norm in (0.1, 1e6):
        optimizer.zero_grad()
        criterion(model(images), labels)[2].mean().backward()
        parameters = [*model.parameters(), *criterion.parameters()]
        before = [whole(each.grad).clone() for each in parameters]
        expected = torch.stack([grad.norm() for grad in before]).norm()
        total = training.docs["clip_gradients"](optimizer, max_norm)
        torch.testing.assert_close(total, expected)
        for grad, each in zip(before, parameters, strict=True):
            torch.testing.assert_close(whole(each.grad), grad * min(1.0, max_norm / (float(expected) + 1e-6)))


def check_lightning(folder: Path) -> None:
    """Losses and parameters of two epochs, each with its graph; and of a training that resumes inside the second."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_lightning import Writer

    expected, writer = train_with_ddp(Training()), Writer(folder)

    def fit(path: Path | None, *callbacks: Any) -> tuple[Result, Any]:
        training = Training()

        class Module(training.docs["Reid"]):  # type: ignore[misc, name-defined]
            losses: list[float] = []  # noqa: RUF012

            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
                loss: Tensor = super().training_step(batch, batch_idx)
                self.losses.append(loss.item())
                return loss

            def train_dataloader(self) -> DataLoader[Any]:
                loader = training.loader(self.graph)
                loader.batch_sampler.set_epoch(self.current_epoch)  # type: ignore[union-attr]
                return loader

        module = Module(training.backbone, N)
        trainer = training.docs["make_trainer"](
            RANKS,
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=callbacks,
            logger=writer,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            default_root_dir=folder,
        )
        trainer.callbacks[0].draw = Tensor.clone
        trainer.fit(module, ckpt_path=path)
        return result_of(module.losses, module.backbone, module.criterion), trainer

    every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    found, trainer = fit(None, every_step)
    assert_same(found, expected)
    assert 0 <= trainer.callback_metrics["graph/changed"] <= 1
    drawn = [(step, type(graph), graph.shape) for _, graph, step in writer.figures]
    assert drawn == [(step, Tensor, (N, K)) for step in (0, STEPS) if distributed.get_rank() == 0]
    resumed, _ = fit(folder / f"step={STEPS + 1}.ckpt")
    assert_same(([*expected[0][: STEPS + 1], *resumed[0]], resumed[1]), expected)


def check_changed_share(folder: Path) -> None:
    from qaconv_triton.integrations.lightning import changed_share

    matcher = make_criterion(N, distributed.device_mesh.init_device_mesh("cpu", (RANKS,))).matcher
    graph = whole(matcher.compute_class_neighbors())
    before = matcher.class_neighbors
    other = graph.clone()
    other[1:4, 0] = torch.arange(1, 4)  # no class is its own neighbour
    matcher.class_neighbors = other
    assert changed_share(before, matcher.class_neighbors) == pytest.approx(3 / graph.numel())


def check_accelerate(folder: Path) -> None:
    import accelerate

    expected, training = train_with_ddp(Training()), Training()
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == RANKS
    criterion = make_criterion(N, distributed.device_mesh.init_device_mesh("cpu", (RANKS,)))
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        accelerator.prepare(criterion)
    model, optimizer = training.docs["prepare"](accelerator, training.backbone, criterion)
    losses = []
    loader = training.loader(criterion.matcher.compute_class_neighbors)
    for _ in range(EPOCHS):
        for batch in loader:
            losses.append(training.docs["train_step"](accelerator, model, criterion, optimizer, *batch).item())
    assert_same(result_of(losses, model, criterion), expected)
    saved = nn.ModuleDict({"backbone": accelerator.unwrap_model(model), "criterion": criterion})
    training.docs["save"](saved, optimizer.optimizer, folder / "accelerate")
    values = result_of([], saved["backbone"], criterion)[1]
    for parameter in saved.parameters():
        nn.init.zeros_(parameter)
    training.docs["load"](saved, optimizer.optimizer, folder / "accelerate")
    for name, value in result_of([], saved["backbone"], criterion)[1].items():
        assert torch.equal(value, values[name]), name


CHECKS: list[Callable[[Path], None]] = [
    check_fsdp,
    check_clipping,
    check_changed_share,
    check_accelerate,
    check_lightning,
]


class _Run:
    """Every check on this rank, with a folder for all: what it raised, "" for nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, str]:
        torch.set_default_dtype(torch.float64)
        # what torchrun sets
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        return errors_of(CHECKS, self.folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return on_ranks(_Run(tmp_path_factory.mktemp("checkpoints")), tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("accelerate", "lightning"))), reason="Accelerate and Lightning are needed")
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_integration(found: list[dict[str, str]], name: str) -> None:
    for rank, of_rank in enumerate(found):
        assert not of_rank[name], f"rank {rank}: {of_rank[name]}"
