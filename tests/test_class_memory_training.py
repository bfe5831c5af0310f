"""`ClassMemoryLoss` in training: its memory counts a batch once, however often and wherever the forward is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from inputs import CPU, C, maps
from loss_cases import class_memory_loss, loss_matcher
from pairwise import pairwise
from ranks import on_ranks
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from qaconv_triton import ClassMemoryLoss

BATCHES = [[0, 3, 0, 5], [3, 1, 6, 0], [5, 1, 3, 3]]


def make_loss() -> ClassMemoryLoss:
    return class_memory_loss(loss_matcher(), 3)


def batch(step: int, labels: list[int] | None = None) -> tuple[Tensor, Tensor]:
    labels = BATCHES[step] if labels is None else labels
    feature = maps(len(labels), step, torch.float64, device=CPU).requires_grad_()
    return feature, torch.tensor(labels, dtype=torch.int64)


def memory_of(module: ClassMemoryLoss) -> dict[str, Tensor]:
    return {name: module.state_dict()[name].clone() for name in ("class_memory", "valid_class")}


Call = Callable[[ClassMemoryLoss, Tensor, Tensor], Tensor]


def plain(module: ClassMemoryLoss, feature: Tensor, target: Tensor) -> Tensor:
    return module(feature, target)[0].mean()  # type: ignore[no-any-return]


def checkpointed(module: ClassMemoryLoss, feature: Tensor, target: Tensor, *, use_reentrant: bool) -> Tensor:
    return checkpoint(partial(plain, module), feature, target, use_reentrant=use_reentrant)  # type: ignore[no-any-return]


def with_backbone(module: ClassMemoryLoss, feature: Tensor, target: Tensor, *, use_reentrant: bool) -> Tensor:
    """All is made within: nothing that the loss is given lives longer than the forward."""

    def forward(image: Tensor, labels: list[int]) -> Tensor:
        return plain(module, 2 * image, torch.tensor(labels))

    return checkpoint(forward, feature / 2, target.tolist(), use_reentrant=use_reentrant)  # type: ignore[no-any-return]


CHECKPOINTS: dict[str, Call] = {
    f"{'' if call is checkpointed else 'with the backbone, '}{'' if use_reentrant else 'non-'}reentrant": partial(
        call, use_reentrant=use_reentrant
    )
    for call in (checkpointed, with_backbone)
    for use_reentrant in (False, True)
}


def step_by_step(module: ClassMemoryLoss, call: Call) -> dict[str, Tensor]:
    """Gradients are accumulated over the steps."""
    features = []
    for step in range(len(BATCHES)):
        feature, target = batch(step)
        call(module, feature, target).backward()
        features.append(feature)
    return gradients(module, features)


def all_at_once(module: ClassMemoryLoss, call: Call, labels: list[int] | None = None) -> dict[str, Tensor]:
    """One backward pass through several forwards: each has seen another memory."""
    batches = [batch(step, labels) for step in range(len(BATCHES))]
    torch.stack([call(module, *one) for one in batches]).sum().backward()
    return gradients(module, [feature for feature, _ in batches])


def last_first(module: ClassMemoryLoss, call: Call, order: tuple[int, ...] = (1, 0, 2)) -> dict[str, Tensor]:
    batches = [batch(step) for step in range(len(BATCHES))]
    losses = [call(module, *one) for one in batches]
    for step in order:
        losses[step].backward(retain_graph=True)
    losses[0].backward()
    return gradients(module, [feature for feature, _ in batches])


def equal_batches(module: ClassMemoryLoss, call: Call) -> dict[str, Tensor]:
    features = [batch(0)[0] for _ in range(3)]
    torch.stack([call(module, feature, batch(0)[1]) for feature in features]).sum().backward()
    return gradients(module, features)


def gradients(module: ClassMemoryLoss, features: list[Tensor]) -> dict[str, Tensor]:
    tensors = {f"feature {step}": feature for step, feature in enumerate(features)} | dict(module.named_parameters())
    found = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    assert len(found) == len(tensors)
    return found


TRAININGS: dict[str, Callable[[ClassMemoryLoss, Call], dict[str, Tensor]]] = {
    "step by step": step_by_step,
    "all at once": all_at_once,
    "all at once, equal labels": partial(all_at_once, labels=[0, 3, 0, 5]),
    "equal batches": equal_batches,
    "last first": last_first,
}


@pytest.mark.parametrize(("train", "call", "training"), pairwise(list(TRAININGS), list(CHECKPOINTS), [True, False]))
def test_checkpointing_changes_no_gradient(train: str, call: str, training: bool) -> None:
    actual, expected = make_loss().train(training), make_loss().train(training)
    for module in (actual, expected):
        plain(module, *batch(0, [6, 5, 4]))
    found, wanted = TRAININGS[train](actual, CHECKPOINTS[call]), TRAININGS[train](expected, plain)
    assert_all_close(found, wanted, torch.float64)
    assert all(gradient.abs().max() > 1e-6 for name, gradient in wanted.items() if "feature" in name)
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in memory_of(actual).items())
    assert_all_close(actual.state_dict(), state, torch.float64)  # the statistics counted each batch once


def test_a_recomputation_of_a_forward_that_is_too_long_ago_is_an_error() -> None:
    module = make_loss()
    losses = [checkpointed(module, *batch(step, [step % 7, 3]), use_reentrant=True) for step in range(9)]
    before = memory_of(module)
    with pytest.raises(RuntimeError, match="none of the last 8 forwards had these 2 labels"):
        losses[0].backward()
    assert_all_close(memory_of(module), before, torch.float64)


def test_the_log_is_as_long_as_what_can_be_run_again() -> None:
    module = make_loss()
    for step in range(10):
        plain(module, *batch(step % 3)).backward()
        assert len(module._log._updates) <= 2
    with torch.no_grad():  # a reentrant checkpoint looks like this
        for step in range(10):
            plain(module, *batch(step % 3))
            assert len(module._log._updates) <= 8
    for step in range(10):
        plain(module, *batch(step % 3)).backward()
    assert len(module._log._updates) <= 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_forward_is_remembered(training: bool, context: Callable[[], Any]) -> None:
    module = make_loss().train(training)
    for step, labels in enumerate(BATCHES):
        feature, target = batch(step)
        with context():
            module(feature, target)
        last = {label: place for place, label in enumerate(labels)}
        for label, place in last.items():
            assert torch.equal(module.class_memory[label], feature[place])
    assert module.valid_class.tolist() == [1, 1, 0, 1, 0, 1, 1, 0]
    plain(module, *batch(0)).backward()


@pytest.mark.slow
def test_compiling_changes_no_gradient() -> None:
    torch.compiler.reset()
    module, other = make_loss(), make_loss()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected, actual = step_by_step(module, plain), step_by_step(other, lambda _, *one: plain(compiled, *one))
    assert_all_close(actual, expected, torch.float64)
    assert_all_close(memory_of(other), memory_of(module), torch.float64)
    torch.compiler.reset()


# --- many ranks -------------------------------------------------------------------------------------------------------

# Labels of rank 0 and of rank 1, step by step: of unequal number, shared, and none.
RANKS = [([0, 3, 0], [5, 3, 1, 1]), ([6, 0], [0, 1, 1]), ([], [3, 4]), ([1, 3], [3, 5])]


class Model(nn.Module):
    def __init__(self, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.call = partial(checkpointed, use_reentrant=False) if use_checkpoint else plain
        self.loss = make_loss()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, C, dtype=torch.float64).view(C, 1, 1))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.call(self.loss, image * self.scale, target)


def image_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    feature, target = batch(10 * step + rank, RANKS[step][rank])
    return feature.detach(), target


def train_one_rank(rank: int, use_checkpoint: bool) -> dict[str, Any]:
    model = DistributedDataParallel(Model(use_checkpoint))
    for step in range(len(RANKS)):
        image, target = image_of(step, rank)
        if not all(RANKS[step]):  # a rank without samples has no gradient to reduce
            with torch.no_grad():
                model.module(image, target)
        else:
            model(image, target).backward()
    found = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    return {"gradients": found, "memory": memory_of(model.module.loss)}


def train_rank(rank: int) -> dict[bool, Any]:
    return {use: train_one_rank(rank, use) for use in (False, True)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[bool, Any]]:
    """What each of two ranks found, without and with checkpointing."""
    return on_ranks(train_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_every_rank_remembers_the_batches_of_all(ranks: list[dict[bool, Any]], use_checkpoint: bool) -> None:
    models = [Model(), Model()]
    for step in range(len(RANKS)):
        updates = []
        for rank, model in enumerate(models):
            image, target = image_of(step, rank)
            with torch.set_grad_enabled(all(RANKS[step])):
                loss = model(image, target) / 2
            if loss.requires_grad:
                loss.backward()
            updates.append(((image * model.scale).detach(), target))
        for model in models:  # both hold their own batch: now they take the other one in, in the order of ranks
            for feature, target in updates:
                model.loss._remember(feature, target, feature.sum())
    expected = {
        name: sum((model.get_parameter(name).grad for model in models), torch.zeros(()))  # type: ignore[misc]
        for name, _ in models[0].named_parameters()
    }
    for found in ranks:
        assert_all_close(found[use_checkpoint]["memory"], memory_of(models[0].loss), torch.float64)
        assert_all_close(found[use_checkpoint]["gradients"], expected, torch.float64)
    assert ranks[1][use_checkpoint]["memory"]["valid_class"].tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
