"""`ClassMemoryLoss` against a loop, and its memory: saved and loaded, copied, moved, and in no average of weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from inputs import C, H, N, W, gradient_of
from loss_cases import class_memory_loss, loss_batch, loss_gradients, loss_matcher
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from qaconv_triton import ClassMemoryLoss, QAConv, class_memory


@pytest.mark.parametrize("mem_batch_size", [1, 3, N, 100])
def test_the_loss_is_the_loop_over_steps(mem_batch_size: int) -> None:
    module = class_memory_loss(loss_matcher(), mem_batch_size)
    dense = loss_matcher()
    memory = torch.zeros(N, C, H, W, dtype=torch.float64)
    seen: set[int] = set()
    for step, labels in enumerate([[0, 3, 0, 0, 7], [3, 3, 1, 7, 0], [5, 1, 1, 3, 7]]):
        feature, target, _ = loss_batch(labels)
        feature = (feature.detach() + step).requires_grad_()
        loss, accuracy = module(feature, target)
        actual = loss_gradients(loss, feature, module)

        starts = range(0, N, mem_batch_size)
        score = torch.cat([dense(feature, memory[i : i + mem_batch_size].clone()) for i in starts], dim=1)
        rows = []
        for b, label in enumerate(labels):
            terms = [score[b, 0] * 0]
            for n in seen:
                probability = score[b, n].sigmoid()
                right = probability if n == label else 1 - probability
                terms.append(-torch.log(right) * (1 - right) ** 2)
            rows.append(torch.stack(terms).sum())
        expected_loss = torch.stack(rows)
        assert_close(loss, expected_loss, torch.float64)
        assert torch.equal(accuracy, (score.argmax(dim=1) == target).double())
        assert not accuracy.requires_grad
        assert_all_close(actual, loss_gradients(expected_loss, feature, dense), torch.float64)

        for b, label in enumerate(labels):
            memory[label] = feature[b].detach()
            seen.add(label)
        assert torch.equal(module.class_memory, memory)
        assert module.valid_class.tolist() == [float(n in seen) for n in range(N)]
        assert not module.class_memory.requires_grad


def test_equal_labels_write_equal_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order a device writes duplicates in, the outcome is the same: here, the reverse order."""
    module = class_memory_loss(loss_matcher())
    write = Tensor.__setitem__

    def write_in_reverse(tensor: Tensor, index: Tensor, values: Tensor) -> None:
        write(tensor, index.flip(0), values.flip(0))

    feature, target, _ = loss_batch([4, 2, 4, 4, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__setitem__", write_in_reverse)
        module._remember(feature.detach(), target, torch.zeros(len(target)))
    assert torch.equal(module.class_memory[4], feature[3].detach())
    assert torch.equal(module.class_memory[2], feature[4].detach())


@pytest.mark.parametrize("invalid", [-1, N, 10**12])
@pytest.mark.parametrize("labels", [[0, 7, 4], [1, 6, 1]], ids=["neighbours of the bounds", "others"])
def test_an_invalid_label_has_a_loss_of_nan_and_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch, labels: list[int], invalid: int
) -> None:
    # As on a GPU, where labels are not read back.
    monkeypatch.setattr(class_memory, "check_labels", lambda labels, *_: labels)
    module = class_memory_loss(loss_matcher())
    first, target, _ = loss_batch(list(range(N)))
    module(first, target)
    before = module.class_memory.clone()
    feature, target, _ = loss_batch([labels[0], invalid, labels[1], invalid, labels[2]])
    loss, accuracy = module(feature, target)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    assert accuracy[[1, 3]].tolist() == [0, 0]
    for b in (0, 2, 4):
        before[target[b]] = feature[b].detach()
    assert torch.equal(module.class_memory, before)

    module.reset_running_stats()
    feature, target, _ = loss_batch([invalid, invalid])
    assert module(feature, target)[0].isnan().all()
    assert not module.class_memory.any()
    assert not module.valid_class.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_features_is_float32(dtype: torch.dtype) -> None:
    module = class_memory_loss(loss_matcher().float(), 4)
    of_float32 = copy.deepcopy(module)
    for _ in range(2):
        feature, target, _ = loss_batch([4, 2, 4, 7])
        feature = feature.detach().to(dtype).requires_grad_()
        loss, accuracy = module(feature, target)
        expected_loss, _ = of_float32(feature.float(), target)
    assert loss.dtype == accuracy.dtype == module.class_memory.dtype == torch.float32
    assert expected_loss.std() > 0.1
    assert_close(loss, expected_loss, dtype)
    assert torch.equal(module.class_memory, of_float32.class_memory)
    loss.sum().backward()
    assert gradient_of(feature).dtype == dtype


# --- the memory is state, but no buffer

NAMES = ("class_memory", "valid_class")


def memory_of(module: ClassMemoryLoss) -> dict[str, Tensor]:
    return {name: module.state_dict()[name].clone() for name in NAMES}


def train(module: ClassMemoryLoss, labels: list[int]) -> Tensor:
    """One forward and backward pass; returns the gradient of the features."""
    feature, target, _ = loss_batch(labels)
    module(feature, target)[0].mean().backward()
    return gradient_of(feature)


def trained_loss() -> ClassMemoryLoss:
    module = class_memory_loss(loss_matcher(), 3)
    for labels in ([0, 3, 0, 5], [3, 1, 6, 0]):
        train(module, labels)
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
    assert not {name for name, _ in module.named_buffers()} & set(NAMES)
    assert not {name for name, _ in module.named_parameters()} & set(NAMES)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_the_memory_back(assign: bool) -> None:
    module = trained_loss()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["class_memory"] = state["class_memory"].contiguous(memory_format=torch.channels_last)  # as saved formerly
    fresh = nn.Sequential(class_memory_loss(loss_matcher(), 3))
    fresh.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
    assert_all_close(memory_of(fresh[0]), memory_of(module), torch.float64)  # type: ignore[arg-type]
    results = []
    for one in (module, fresh[0]):
        found = {"features": train(one, [5, 1, 3, 3])}  # type: ignore[arg-type]
        found |= {name: gradient_of(parameter) for name, parameter in one.named_parameters()}
        results.append(found | memory_of(one))  # type: ignore[arg-type]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert state["valid_class"].sum() == 5


def test_a_state_dict_that_does_not_fit_changes_no_memory() -> None:
    module = trained_loss()
    good, before = dict(module.state_dict()), memory_of(module)
    with pytest.raises(RuntimeError, match=r"size mismatch for class_memory.*\[9, 5, 2, 3\].*\[8, 5, 2, 3\]"):
        module.load_state_dict({**good, "class_memory": torch.ones(N + 1, C, H, W), "valid_class": torch.zeros(N)})
    with pytest.raises(RuntimeError, match="size mismatch for valid_class"):
        module.load_state_dict({**good, "class_memory": torch.ones(N, C, H, W), "valid_class": torch.zeros(1, N)})
    bias = module.matcher.fc.bias.clone()
    other = {**good, "matcher.fc.bias": bias + 1}
    for misfit in (torch.ones(N + 1, C, H, W), torch.ones(N, C, H, W).numpy()):
        with pytest.raises(RuntimeError, match="class_memory"):
            module.load_state_dict({**other, "class_memory": misfit})
        assert torch.equal(module.matcher.fc.bias, bias)
    with pytest.raises(RuntimeError, match=r"matcher\.fc\.bias"):
        module.load_state_dict({**other, "class_memory": torch.ones(N, C, H, W), "matcher.fc.bias": torch.ones(3)})
    assert_all_close(memory_of(module), before, torch.float64)
    matcher_only = {name: value for name, value in good.items() if name not in NAMES}
    with pytest.raises(RuntimeError, match=r'Missing key.* "class_memory", "valid_class"'):
        module.load_state_dict(matcher_only)
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "class_memories"'):
        module.load_state_dict({**good, "class_memories": torch.ones(1)})
    assert module.load_state_dict(matcher_only, strict=False).missing_keys == list(NAMES)
    assert_all_close(memory_of(module), before, torch.float64)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_memory_of_its_own(duplicate: Callable[[ClassMemoryLoss], ClassMemoryLoss]) -> None:
    module = trained_loss()
    feature, target, _ = loss_batch([5, 1, 3, 3])
    before_backward = checkpoint(lambda *batch: module(*batch)[0].mean(), feature, target, use_reentrant=True)
    copied, before = duplicate(module), memory_of(module)
    assert_all_close(memory_of(copied), before, torch.float64)
    assert not copied._log._updates
    copied.reset_running_stats()
    assert not copied.class_memory.any()
    assert not copied.valid_class.any()
    assert_all_close(memory_of(module), before, torch.float64)
    before_backward.backward()


def test_the_memory_follows_the_module() -> None:
    module = trained_loss()
    assert module.float().class_memory.dtype == module.valid_class.dtype == torch.float32
    assert module.half().class_memory.dtype == torch.float16
    assert module.to("meta").class_memory.device == module.valid_class.device == torch.device("meta")
    assert module.to_empty(device="cpu").class_memory.device == torch.device("cpu")


def test_the_memory_is_made_where_the_matcher_is() -> None:
    on_meta = ClassMemoryLoss(QAConv(C, H, W).to("meta"), N, C, H, W)
    assert on_meta.class_memory.device == on_meta.valid_class.device == torch.device("meta")
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert ClassMemoryLoss(QAConv(C, H, W).to(dtype), N, C, H, W).class_memory.dtype == expected


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_leaves_the_memories_alone(use_buffers: bool) -> None:
    module = class_memory_loss(loss_matcher(), 3)
    averaged = AveragedModel(module, use_buffers=use_buffers)
    for labels in ([0, 3, 0, 5], [3, 1, 6, 0], [5, 1, 3, 3]):
        train(module, labels)
        before = memory_of(module)
        averaged.update_parameters(module)
        assert_all_close(memory_of(module), before, torch.float64)
        assert not averaged.module.valid_class.any()
    averaged.module.load_state_dict(module.state_dict())
    assert_all_close(memory_of(averaged.module), memory_of(module), torch.float64)
