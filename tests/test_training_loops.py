"""Trainings as published scripts write them: loader with workers, bf16, resume, averages, sparse tables, repeats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import gradient_of, ids, make_class_matcher, maps
from loss_cases import training_step
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import (
    ClassMemoryLoss,
    GraphSampler,
    PairwiseMatchingLoss,
    QAConv,
    SoftmaxTripletLoss,
    TripletLoss,
)

C, H, W, N = 8, 3, 2, 6
INSTANCES = 6

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on few processors


def dataset(seed: int = 1) -> TensorDataset:
    """Noisy views of one image per class."""
    labels = torch.arange(N).repeat_interleave(INSTANCES)
    image = torch.randn(N, 3, 2 * H, 2 * W, generator=torch.Generator().manual_seed(0))[labels]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(image + 0.7 * noise, labels)


class PairLosses(nn.Module):
    """Both losses over the pairs of a batch, on one matcher."""

    def __init__(self) -> None:
        super().__init__()
        self.matcher = QAConv(C, H, W, num_classes=N, k_nearest=3)
        self.pairwise, self.triplet = PairwiseMatchingLoss(self.matcher), TripletLoss(self.matcher, margin=4)

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        pairwise, _ = self.pairwise(feature, target)
        triplet, _ = self.triplet(feature, target)
        return (pairwise + triplet).mean()  # type: ignore[no-any-return]


class ClassLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matcher = QAConv(C, H, W, num_classes=N, k_nearest=3, include_self=True)
        self.loss = SoftmaxTripletLoss(self.matcher)

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        return self.loss(feature, target)[2].mean()  # type: ignore[no-any-return]


class MemoryLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matcher = QAConv(C, H, W)
        self.memory = ClassMemoryLoss(self.matcher, N, C, H, W, mem_batch_size=4)

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        return self.memory(feature, target)[0].mean()  # type: ignore[no-any-return]


LOSSES = {"pairs": PairLosses, "classes": ClassLosses, "memory": MemoryLosses}
every_loss = pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES.keys())

Forward = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]


def plain(model: nn.Module, losses: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    return losses(model(image), target)  # type: ignore[no-any-return]


def checkpointed(
    model: nn.Module, losses: nn.Module, image: Tensor, target: Tensor, *, use_reentrant: bool = False
) -> Tensor:
    image = image.requires_grad_()  # without it a reentrant checkpoint has no gradient
    return checkpoint(partial(plain, model, losses), image, target, use_reentrant=use_reentrant)  # type: ignore[no-any-return]


class Training:
    """Model, losses, optimizer, sampler and loader of one run, and the epochs it has behind it."""

    def __init__(self, losses: Callable[[], Any], num_workers: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, C, 3, stride=2, padding=1))
        self.losses = losses()
        self.matcher: QAConv = self.losses.matcher
        ring = (torch.arange(N)[:, None] + torch.arange(1, 4)) % N
        graph = ring if self.matcher.num_classes is None else self.matcher.compute_class_neighbors
        data = dataset()
        self.sampler = GraphSampler(data.tensors[1], graph, batch_size=8, num_instances=2)
        self.loader = DataLoader(
            data,
            batch_sampler=self.sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            multiprocessing_context="fork" if num_workers else None,
        )
        groups = [{"params": self.model.parameters(), "lr": 3e-3}, {"params": self.losses.parameters()}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.9)
        self.epoch = 0

    def run(
        self,
        epochs: int,
        *,
        forward: Forward = plain,
        accumulate: int = 1,
        autocast: bool = False,
        after_step: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """The loss of every batch."""
        found = []
        for _ in range(epochs):
            self.sampler.set_epoch(self.epoch)
            self.matcher.on_epoch_start()
            for step, (image, target) in enumerate(self.loader, start=1):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = forward(self.model, self.losses, image, target)
                (loss / accumulate).backward()
                found.append(float(loss.detach()))
                if step % accumulate == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    after_step()
            self.scheduler.step()
            self.epoch += 1
        return found

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "losses", "optimizer", "scheduler")}
        torch.save({**parts, "epoch": self.epoch}, path)

    def load(self, path: Path) -> None:
        parts = torch.load(path)
        self.epoch = parts.pop("epoch")
        for name, state in parts.items():
            getattr(self, name).load_state_dict(state)

    def state(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **{f"losses.{name}": x for name, x in self.losses.state_dict().items()}}


@torch.no_grad()
def rank_one(model: nn.Module, matcher: QAConv) -> float:
    """How often an unseen view of a class is most similar to a training view of it."""
    (probe, probe_labels), (gallery, gallery_labels) = (dataset(seed).tensors for seed in (2, 1))
    score = matcher.match(model(probe), model(gallery))
    return float((gallery_labels[score.argmax(1)] == probe_labels).float().mean())


def mean(losses: Iterable[float]) -> float:
    return float(torch.tensor(list(losses)).mean())


@every_loss
def test_training_and_evaluation(losses: Callable[[], nn.Module]) -> None:
    training = Training(losses, num_workers=1)
    found = training.run(6)
    assert len(found) == 6 * N
    start = found[N : 2 * N] if losses is MemoryLosses else found[:N]  # no class is in the memory at first
    assert mean(found[-N:]) < 0.75 * mean(start), found
    assert rank_one(training.model, training.matcher) > 0.9
    assert training.matcher.training


@every_loss
def test_resuming_at_an_epoch_repeats_an_uninterrupted_training_bit_by_bit(
    losses: Callable[[], nn.Module], tmp_path: Path
) -> None:
    whole, first, second = Training(losses), Training(losses, num_workers=2), Training(losses)
    expected = whole.run(3)
    found = first.run(2)
    first.save(tmp_path / "epoch.pt")
    torch.manual_seed(123)
    second.load(tmp_path / "epoch.pt")
    found += second.run(1)
    assert found == expected
    state = whole.state()
    assert all(torch.equal(value, state[name]) for name, value in second.state().items())
    assert rank_one(second.model, second.matcher) == rank_one(whole.model, whole.matcher)


@pytest.mark.parametrize(
    ("losses", "use_reentrant"),
    [(PairLosses, False), (ClassLosses, True), (MemoryLosses, False), (MemoryLosses, True)],
)
def test_mixed_precision_accumulation_and_checkpointing(losses: Callable[[], nn.Module], use_reentrant: bool) -> None:
    forward = partial(checkpointed, use_reentrant=use_reentrant)
    actual, expected = Training(losses), Training(losses)
    gradients = []
    for training, one in ((actual, forward), (expected, plain)):
        for image, target in training.loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = one(training.model, training.losses, image, target)
            loss.backward()
        parameters = {**dict(training.model.named_parameters()), **dict(training.losses.named_parameters())}
        gradients.append({name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None})
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0].values())
    assert_all_close(*gradients, torch.float32)
    assert gradients[0]["0.weight"].abs().max() > 1e-3
    found = actual.run(5, forward=forward, accumulate=2, autocast=True)
    assert mean(found[-N:]) < 0.9 * mean(found[:N]), found


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_the_weights_matches(use_buffers: bool) -> None:
    training = Training(MemoryLosses)
    modules = nn.ModuleList([training.model, training.losses])
    averaged = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
    training.run(6, after_step=lambda: averaged.update_parameters(modules))
    model, losses = averaged.module
    assert isinstance(losses, MemoryLosses)
    assert rank_one(model, losses.matcher) > 0.9
    # The memory is what it was when the average was made; that of the training is whole.
    assert not losses.memory.valid_class.any()
    assert training.losses.memory.valid_class.tolist() == [1] * N
    loaded = copy.deepcopy(averaged)
    loaded.load_state_dict(averaged.state_dict())
    assert rank_one(loaded.module[0], loaded.module[1].matcher) == rank_one(model, losses.matcher)


@every_loss
def test_half_precision_with_scaled_and_clipped_gradients(losses: Callable[[], nn.Module]) -> None:
    training = Training(losses)
    # so large a scale that the first gradients overflow: their steps are skipped
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    parameters = [*training.model.parameters(), *training.losses.parameters()]
    found, skipped = [], 0
    for _ in range(6):
        training.matcher.on_epoch_start()
        for image, target in training.loader:
            with torch.autocast("cpu", torch.float16):
                loss = plain(training.model, training.losses, image, target)
            scaler.scale(loss).backward()
            scaler.unscale_(training.optimizer)
            nn.utils.clip_grad_norm_(parameters, 5.0)
            before = scaler.get_scale()
            scaler.step(training.optimizer)
            scaler.update()
            training.optimizer.zero_grad()
            skipped += scaler.get_scale() < before
            found.append(float(loss.detach()))
    assert 0 < skipped < N
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert mean(found[-N:]) < 0.9 * mean(found[N : 2 * N]), found  # no class is in the memory at first


@pytest.mark.cuda
def test_a_whole_step_is_captured_in_a_cuda_graph() -> None:
    """No read-back, and no allocation that depends on values."""
    torch.manual_seed(0)
    losses = ClassLosses().cuda()
    model = nn.Conv2d(3, C, 3, stride=2, padding=1).cuda()
    optimizer = torch.optim.AdamW([*model.parameters(), *losses.parameters()], lr=1e-2, capturable=True)
    image, target = (values[:8].cuda() for values in dataset().tensors)
    losses.matcher.compute_class_neighbors()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = plain(model, losses, image, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    found = []
    for _ in range(20):
        graph.replay()
        found.append(float(loss))
    assert found[-1] < found[0]
    assert all(torch.isfinite(torch.tensor(found)))


def test_a_sparse_table_is_trained_by_sparse_adam() -> None:
    torch.manual_seed(0)
    data = dataset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, C, 3, stride=2, padding=1))
    loss = SoftmaxTripletLoss(QAConv(C, H, W, num_classes=N, k_nearest=3, include_self=True, sparse_grad=True))
    table = loss.matcher.class_embed
    assert table is not None
    dense = [parameter for parameter in loss.parameters() if parameter is not table]
    optimizers = torch.optim.Adam([*model.parameters(), *dense], lr=1e-2), torch.optim.SparseAdam([table], lr=1e-2)
    sampler = GraphSampler(data.tensors[1], loss.matcher.compute_class_neighbors, batch_size=8, num_instances=2)
    found = []
    for _ in range(6):
        loss.matcher.on_epoch_start()
        for image, target in DataLoader(data, batch_sampler=sampler):
            total = loss(model(image), target)[2].mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
            found.append(float(total.detach()))
    assert mean(found[-N:]) < 0.6 * mean(found[:N]), found


# --- a step repeats


@pytest.mark.parametrize(
    ("backend", "sparse_grad"), [("torch", False), ("torch", True), ("triton", True)], indirect=["backend"]
)
def test_a_training_step_repeats_bit_by_bit(backend: str, sparse_grad: bool) -> None:
    target = ids([3, 3, 3, 0, 0, 7])  # shared neighbours: gradients meet in the same rows
    start = SoftmaxTripletLoss(make_class_matcher(include_self=True, sparse_grad=sparse_grad))
    runs = [training_step(copy.deepcopy(start), maps(6, 1), target) for _ in range(2)]
    assert runs[0]["gradient of matcher.class_embed"].abs().max() > 1e-3
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize(
    ("backend", "make"), [("torch", PairwiseMatchingLoss), ("triton", TripletLoss)], indirect=["backend"]
)
def test_pair_losses_repeat_bit_by_bit(backend: str, make: Callable[[QAConv], nn.Module]) -> None:
    runs = []
    for _ in range(2):
        loss, feature = make(make_class_matcher()), maps(6, 1).requires_grad_()
        value, accuracy = loss(feature, ids([0, 0, 3, 3, 7, 7]))
        value.mean().backward()
        runs.append((value, accuracy, gradient_of(feature)))
    assert all(map(torch.equal, *runs))
    assert runs[0][2].abs().max() > 0
