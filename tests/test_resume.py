"""A training that is killed and resumed as docs/training.md says: its losses are those of one that is not."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss, functional

DOCS = Path(__file__).parents[1] / "docs" / "training.md"
CLASSES, EPOCHS = 6, 3  # a step for each class
# The step, counted from 1, and when in it: no two at once; the next process goes on from the last checkpoint.
KILLS = [
    (1, "forward"),
    (1, "saved"),
    (4, "saving"),
    (6, "step"),
    (6, "saved"),
    (7, "forward"),
    (9, "saving"),
    (12, "saved"),
    (13, "step"),
    (17, "saving"),
]


def run(folder: Path, kill: tuple[int, str] | None, seed: int) -> None:
    """Train by the page's own code, from the folder's checkpoint on, and append each step's loss to its log."""
    torch.manual_seed(seed)  # of what a checkpoint replaces
    labels = torch.arange(CLASSES).repeat_interleave(5)
    images = torch.randn(len(labels), 3, 4, 6, generator=torch.Generator().manual_seed(0))
    backbone = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
    matcher = QAConv(8, 2, 3, num_classes=CLASSES, k_nearest=3, include_self=True)
    criterion = SoftmaxTripletLoss(matcher)
    names: dict[str, Any] = {
        "torch": torch,
        "GraphSampler": GraphSampler,
        "dataset": torch.utils.data.TensorDataset(images, labels),
        "backbone": backbone,
        "matcher": matcher,
        "criterion": criterion,
        "optimizer": torch.optim.AdamW([*backbone.parameters(), *criterion.parameters()], lr=1e-2),
    }
    page = DOCS.read_text(encoding="utf-8").partition("## Sampler and resume")[2]
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)

    def step() -> int:
        state = names["sampler"].state_dict()
        return int(state["epoch"] * CLASSES + state["position"])

    def kill_at(moment: str) -> None:
        if (step(), moment) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def log_loss(_: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        with (folder / "losses.txt").open("a") as log:
            log.write(f"{step()} {float(output[2].detach().mean()).hex()}\n")
        kill_at("forward")

    write, replace = torch.save, os.replace

    def save(state: Any, path: str) -> None:
        if (step(), "saving") == kill:
            file = io.BytesIO()
            write(state, file)
            Path(path).write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
        kill_at("saving")
        write(state, path)

    def put_in_place(source: str, target: str) -> None:
        replace(source, target)
        kill_at("saved")

    criterion.register_forward_hook(log_loss)
    names["optimizer"].register_step_post_hook(lambda *_: kill_at("step"))
    torch.save, os.replace = save, put_in_place  # of this process
    names["train"](EPOCHS, str(folder / "checkpoint.pt"))


def losses(folder: Path) -> list[tuple[int, str]]:
    """The step and loss of every forward, in order."""
    lines = (folder / "losses.txt").read_text().splitlines()
    return [(int(step), loss) for step, loss in map(str.split, lines)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_training_that_is_killed_ten_times_has_the_losses_of_one_that_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # processes that need not import anew, which takes seconds
    context.set_forkserver_preload(["torch._dynamo", __name__])  # an optimizer imports the former

    def train(folder: Path, kill: tuple[int, str] | None, seed: int) -> int | None:
        process = context.Process(target=run, args=(folder, kill, seed))
        process.start()
        process.join(120)
        assert not process.is_alive()
        return process.exitcode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert train(whole, None, seed=0) == 0
    expected = losses(whole)
    assert [step for step, _ in expected] == list(range(1, EPOCHS * CLASSES + 1))
    assert len({loss for _, loss in expected}) == len(expected)
    for number, kill in enumerate(KILLS):
        has_checkpoint = (killed / "checkpoint.pt").exists()
        assert train(killed, kill, seed=number if has_checkpoint else 0) == -signal.SIGKILL
        assert losses(killed)[-1][0] == kill[0]
    assert train(killed, None, seed=len(KILLS)) == 0
    found = losses(killed)
    assert set(found) == set(expected)  # steps that were taken twice included
    assert len(found) == len(expected) + sum(moment != "saved" for _, moment in KILLS)
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (whole, killed))
    assert one["sampler"] == other["sampler"]
    for name in ("backbone", "criterion"):
        assert all(torch.equal(value, other[name][key]) for key, value in one[name].items())
    assert torch.equal(one["graph"], other["graph"])


def test_a_search_after_a_resume_starts_where_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    # from the graph before it, as in the training that goes on: another start may round near ties otherwise
    def build() -> QAConv:
        return QAConv(8, 2, 3, num_classes=CLASSES, k_nearest=3)

    trained, resumed = build(), build()
    graph = trained.compute_class_neighbors()
    resumed.load_state_dict(trained.state_dict())
    resumed.class_neighbors = graph
    search, starts = functional.class_neighbors, []

    def record(*args: Any, previous: torch.Tensor | None, **options: Any) -> torch.Tensor:
        starts.append(previous)
        return search(*args, previous=previous, **options)

    monkeypatch.setattr(functional, "class_neighbors", record)
    for matcher in (trained, resumed):
        matcher.on_epoch_start()
        matcher.compute_class_neighbors()
    assert all(start is not None and torch.equal(start, graph) for start in starts)
    assert len(starts) == 2
