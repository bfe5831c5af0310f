"""`GraphSampling` in a Lightning trainer: when the graph is built, what is logged, and resuming inside an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss

lightning = pytest.importorskip("lightning.pytorch")

from qaconv_triton.integrations.lightning import GraphSampling, changed_share  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore", "default::UserWarning")
N, K = 10, 4
LABELS = torch.arange(40) // 4


class Reid(lightning.LightningModule):
    """A tiny training script."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.criterion = SoftmaxTripletLoss(QAConv(8, 2, 2, N, K, include_self=True))
        self.losses: list[float] = []
        self.graphs: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(self.backbone(images), labels)[2].mean()
        self.losses.append(loss.item())
        self.graphs.append(self.criterion.matcher.class_neighbors)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader[Any]:
        images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        matcher = self.criterion.matcher

        def graph() -> Tensor:
            built = matcher.class_neighbors
            return matcher.compute_class_neighbors() if built is None else built

        sampler = GraphSampler(LABELS, graph, batch_size=8, num_instances=2)
        sampler.set_epoch(self.current_epoch)
        own = torch.Generator()
        return DataLoader(
            TensorDataset(images, LABELS), batch_sampler=sampler, num_workers=self.num_workers, generator=own
        )


def trainer(folder: Path, **options: Any) -> Any:
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": folder}
    return lightning.Trainer(**(defaults | options))


def changes(graphs: list[Tensor]) -> list[int]:
    """The steps at which a graph differs from the one before."""
    return [step for step in range(1, len(graphs)) if not torch.equal(graphs[step - 1], graphs[step])]


def test_the_graph_is_built_every_n_epochs_and_logged(tmp_path: Path) -> None:
    module = Reid()
    fitted = trainer(tmp_path, max_epochs=4, callbacks=[GraphSampling("criterion.matcher", every_n_epochs=2)])
    fitted.fit(module)
    assert len(module.losses) == 4 * N
    assert changes(module.graphs) == [2 * N]
    assert fitted.callback_metrics["graph/seconds"] > 0
    assert 0 < fitted.callback_metrics["graph/changed"] <= 1


def test_the_graph_is_built_every_n_steps(tmp_path: Path) -> None:
    module = Reid()
    callback = GraphSampling(lambda module: module.criterion.matcher, every_n_steps=7)
    trainer(tmp_path, callbacks=[callback]).fit(module)
    assert changes(module.graphs) == [7, 14]


class Writer(lightning.loggers.CSVLogger):
    """A logger that takes figures, as TensorBoard's does, and keeps what it was called with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.figures: list[tuple[str, Any, int]] = []

    @property
    def experiment(self) -> Any:
        experiment = super().experiment
        experiment.add_figure = lambda *arguments: self.figures.append(arguments)
        return experiment


def test_pictures_of_the_graph_are_logged(tmp_path: Path) -> None:
    module, writer = Reid(), Writer(tmp_path)
    callback = GraphSampling("criterion.matcher", draw=lambda graph: graph.clone())
    trainer(tmp_path, callbacks=[callback], logger=[writer, lightning.loggers.CSVLogger(tmp_path)]).fit(module)
    assert [(name, step) for name, _, step in writer.figures] == [("graph/neighbors", 0), ("graph/neighbors", N)]
    assert all(torch.equal(figure, module.graphs[step]) for _, figure, step in writer.figures)


def callbacks(*others: Any) -> list[Any]:
    return [GraphSampling("criterion.matcher", every_n_epochs=2), *others]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reid, Path]:
    """A training of three epochs, and the folder of the checkpoints of all its steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    every_step = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Reid()
    trainer(folder, max_epochs=3, callbacks=callbacks(every_step), enable_checkpointing=True).fit(whole)
    return whole, folder


@pytest.mark.parametrize(("step", "num_workers"), [(4, 0), (N, 0), (N + 3, 0), (N + 3, 1), (2 * N - 1, 0)])
def test_a_trainer_resumes_with_the_same_graph_and_losses(
    step: int, num_workers: int, interrupted: tuple[Reid, Path], tmp_path: Path
) -> None:
    """From a checkpoint inside an epoch, and from the one at its end."""
    whole, folder = interrupted
    resumed = Reid(num_workers)
    trainer(tmp_path, max_epochs=3, callbacks=callbacks()).fit(resumed, ckpt_path=folder / f"step={step}.ckpt")
    assert resumed.losses == whole.losses[step:]
    assert all(torch.equal(one, other) for one, other in zip(resumed.graphs, whole.graphs[step:], strict=True))


def fit_on(rank: int) -> dict[str, Any]:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    module = Reid()
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "callbacks": [GraphSampling("criterion.matcher")]}
    trainer(Path.cwd(), **options).fit(module)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    return {"losses": module.losses, "graphs": module.graphs, "weights": weights}


@pytest.mark.slow
def test_ddp_ranks_have_one_graph_and_their_own_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = on_ranks(fit_on, tmp_path)
    assert len(first["losses"]) == len(second["losses"]) > 0
    assert first["losses"] != second["losses"]
    assert all(torch.equal(one, other) for one, other in zip(first["graphs"], second["graphs"], strict=True))
    for name, value in first["weights"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, second["weights"][name]), name


def test_changed_share() -> None:
    before = torch.tensor([[3, 1, 2], [0, 2, 3]])
    assert changed_share(before, before.flip(1)) == 0.0
    assert changed_share(before, torch.tensor([[3, 1, 0], [9, 8, 7]])) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"matcher": 3}, TypeError),
        ({"every_n_epochs": 0}, ValueError),
        ({"every_n_steps": 1.5}, TypeError),
        ({"draw": 3}, TypeError),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        GraphSampling(**options)


def test_a_module_without_such_a_matcher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a QAConv with num_classes, got Conv2d"):
        trainer(tmp_path, callbacks=[GraphSampling("backbone")]).fit(Reid())
