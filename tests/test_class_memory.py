"""`ClassMemoryLoss` in training: its memory counts a batch once, however often and wherever the forward is computed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from qaconv_triton import ClassMemoryLoss, QAConv

N, C, H, W = 7, 4, 2, 2
BATCHES = [[0, 3, 0, 5], [3, 1, 6, 0], [5, 1, 3, 3]]
STATE = ("class_memory", "valid_class")


def make_loss() -> ClassMemoryLoss:
    torch.manual_seed(0)
    return ClassMemoryLoss(QAConv(C, H, W), N, C, H, W, mem_batch_size=3).double()


def batch(step: int, labels: list[int] | None = None) -> tuple[Tensor, Tensor]:
    labels = BATCHES[step] if labels is None else labels
    generator = torch.Generator().manual_seed(step)
    feature = torch.randn(len(labels), C, H, W, generator=generator, dtype=torch.float64)
    return feature.requires_grad_(), torch.tensor(labels)


def memory_of(module: ClassMemoryLoss) -> dict[str, Tensor]:
    return {name: module.state_dict()[name].clone() for name in STATE}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


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
every_checkpoint = pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())


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


@every_checkpoint
@pytest.mark.parametrize("train", TRAININGS.values(), ids=TRAININGS.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_checkpointing_changes_no_gradient(
    training: bool, train: Callable[[ClassMemoryLoss, Call], dict[str, Tensor]], call: Call
) -> None:
    actual, expected = make_loss().train(training), make_loss().train(training)
    for module in (actual, expected):
        plain(module, *batch(0, [6, 5, 4]))
    found, wanted = train(actual, call), train(expected, plain)
    assert_same(found, wanted)
    assert all(gradient.abs().max() > 1e-6 for name, gradient in wanted.items() if "feature" in name)
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in memory_of(actual).items())
    assert_same(dict(actual.state_dict()), dict(state))  # the statistics counted each batch once


def test_a_recomputation_of_a_forward_that_is_too_long_ago_is_an_error() -> None:
    module = make_loss()
    losses = [checkpointed(module, *batch(step, [step % N, 3]), use_reentrant=True) for step in range(9)]
    before = memory_of(module)
    with pytest.raises(RuntimeError, match="none of the last 8 forwards had these 2 labels"):
        losses[0].backward()
    assert_same(memory_of(module), before)


def test_the_log_is_as_long_as_what_can_be_run_again() -> None:
    module = make_loss()
    for step in range(20):
        plain(module, *batch(step % 3)).backward()
        assert len(module._log._updates) <= 2
    with torch.no_grad():  # a reentrant checkpoint looks like this
        for step in range(20):
            plain(module, *batch(step % 3))
            assert len(module._log._updates) <= 8
    for step in range(20):
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
    assert module.valid_class.tolist() == [1, 1, 0, 1, 0, 1, 1]
    plain(module, *batch(0)).backward()


@pytest.mark.slow
def test_compiling_changes_no_gradient() -> None:
    torch.compiler.reset()
    module, twin = make_loss(), make_loss()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected, actual = step_by_step(module, plain), step_by_step(twin, lambda _, *one: plain(compiled, *one))
    assert_same(actual, expected)
    assert_same(memory_of(twin), memory_of(module))
    torch.compiler.reset()


# --- the memory is state, but no buffer -------------------------------------------------------------------------------


def trained_loss() -> ClassMemoryLoss:
    module = make_loss()
    for step in range(2):
        plain(module, *batch(step)).backward()
    module.zero_grad()
    return module


def test_the_memory_is_saved_contiguous_under_its_names() -> None:
    module = trained_loss()
    for _ in range(2):
        state = nn.Sequential(nn.ReLU(), module).state_dict()
        assert {"1.class_memory", "1.valid_class"} < state.keys()
        assert all(tensor.is_contiguous() for tensor in memory_of(module).values())
        assert state["1.class_memory"].abs().sum() > 0
        module.to(memory_format=torch.channels_last)
    assert not {name for name, _ in module.named_buffers()} & set(STATE)
    assert not {name for name, _ in module.named_parameters()} & set(STATE)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_the_memory_back(assign: bool) -> None:
    module = trained_loss()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["class_memory"] = state["class_memory"].contiguous(memory_format=torch.channels_last)  # as saved formerly
    fresh = nn.Sequential(make_loss())
    fresh.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
    assert_same(memory_of(fresh[0]), memory_of(module))  # type: ignore[arg-type]
    results = []
    for one in (module, fresh[0]):
        feature, target = batch(2)
        plain(one, feature, target).backward()  # type: ignore[arg-type]
        results.append(gradients(one, [feature]) | memory_of(one))  # type: ignore[arg-type]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert state["valid_class"].sum() == 5


def test_a_state_dict_that_does_not_fit_changes_no_memory() -> None:
    module = trained_loss()
    good, before = dict(module.state_dict()), memory_of(module)
    with pytest.raises(RuntimeError, match=r"size mismatch for class_memory.*\[8, 4, 2, 2\].*\[7, 4, 2, 2\]"):
        module.load_state_dict({**good, "class_memory": torch.ones(8, C, H, W), "valid_class": torch.zeros(N)})
    with pytest.raises(RuntimeError, match="size mismatch for valid_class"):
        module.load_state_dict({**good, "class_memory": torch.ones(N, C, H, W), "valid_class": torch.zeros(1, N)})
    bias = module.matcher.fc.bias.clone()
    other = {**good, "matcher.fc.bias": bias + 1}
    for misfit in (torch.ones(8, C, H, W), torch.ones(N, C, H, W).numpy()):
        with pytest.raises(RuntimeError, match="class_memory"):
            module.load_state_dict({**other, "class_memory": misfit})
        assert torch.equal(module.matcher.fc.bias, bias)
    assert_same(memory_of(module), before)
    matcher_only = {name: value for name, value in good.items() if name not in STATE}
    with pytest.raises(RuntimeError, match=r'Missing key.* "class_memory", "valid_class"'):
        module.load_state_dict(matcher_only)
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "class_memories"'):
        module.load_state_dict({**good, "class_memories": torch.ones(1)})
    assert module.load_state_dict(matcher_only, strict=False).missing_keys == list(STATE)
    assert_same(memory_of(module), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_memory_of_its_own(duplicate: Callable[[ClassMemoryLoss], ClassMemoryLoss]) -> None:
    module = trained_loss()
    waiting = checkpointed(module, *batch(2), use_reentrant=True)
    twin, before = duplicate(module), memory_of(module)
    assert_same(memory_of(twin), before)
    assert not twin._log._updates
    twin.reset_running_stats()
    assert not twin.class_memory.any()
    assert not twin.valid_class.any()
    assert_same(memory_of(module), before)
    waiting.backward()


def test_the_memory_follows_the_module() -> None:
    module = trained_loss()
    assert module.float().class_memory.dtype == module.valid_class.dtype == torch.float32
    assert module.half().class_memory.dtype == torch.float16
    assert module.to("meta").class_memory.device == module.valid_class.device == torch.device("meta")
    assert module.to_empty(device="cpu").class_memory.device == torch.device("cpu")
    assert make_loss().double().valid_class.dtype == torch.float64


def test_the_memory_is_made_where_the_matcher_is() -> None:
    on_meta = ClassMemoryLoss(QAConv(C, H, W).to("meta"), N, C, H, W)
    assert on_meta.class_memory.device == on_meta.valid_class.device == torch.device("meta")
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert ClassMemoryLoss(QAConv(C, H, W).to(dtype), N, C, H, W).class_memory.dtype == expected


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_leaves_the_memories_alone(use_buffers: bool) -> None:
    module = make_loss()
    averaged = AveragedModel(module, use_buffers=use_buffers)
    for step in range(3):
        plain(module, *batch(step)).backward()
        before = memory_of(module)
        averaged.update_parameters(module)
        assert_same(memory_of(module), before)
        assert not averaged.module.valid_class.any()
    averaged.module.load_state_dict(module.state_dict())
    assert_same(memory_of(averaged.module), memory_of(module))


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
    return feature.detach(), target.long()


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
        for model in models:  # both hold their own batch: now they remember the other one, in the order of ranks
            for feature, target in updates:
                model.loss._remember(feature, target, feature.sum())
    expected = {
        name: sum((model.get_parameter(name).grad for model in models), torch.zeros(()))  # type: ignore[misc]
        for name, _ in models[0].named_parameters()
    }
    for found in ranks:
        assert_same(found[use_checkpoint]["memory"], memory_of(models[0].loss))
        assert_same(found[use_checkpoint]["gradients"], expected)
    assert ranks[1][use_checkpoint]["memory"]["valid_class"].tolist() == [1, 1, 0, 1, 1, 1, 1]
