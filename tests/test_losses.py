"""The losses against dense formulations of the same, in float64: values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qaconv_triton import ClassScores, QAConv, losses
from qaconv_triton.losses import (
    ClassMemoryLoss,
    MatcherLoss,
    PairwiseMatchingLoss,
    SoftmaxTripletLoss,
    TripletLoss,
    batch_hard_hinge,
    hardest_pairs,
    neighbor_cross_entropy,
    predicted_class,
)

CHANNELS, HEIGHT, WIDTH, NUM_CLASSES = 5, 2, 3, 9
TARGETS = {
    "pairs": [0, 3, 0, 3, 8, 8],
    "singletons": [1, 2, 3, 4, 5, 6],
    "one class": [7, 7, 7, 7],
    "mixed": [2, 2, 2, 5, 0, 0, 8],
}

every_target = pytest.mark.parametrize("labels", TARGETS.values(), ids=TARGETS.keys())
with_and_without_occlusion = pytest.mark.parametrize("occluded", [False, True], ids=["visible", "occluded"])


def make_matcher(**options: Any) -> QAConv:
    """A small float64 matcher whose affine parameters are all in use."""
    torch.manual_seed(0)
    matcher = QAConv(CHANNELS, HEIGHT, WIDTH, **options).double()
    with torch.no_grad():
        for parameter in (*matcher.bn.parameters(), *matcher.fc.parameters(), *matcher.logit_bn.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
        matcher.logit_bn.weight.mul_(2)
    return matcher


def make_batch(labels: list[int], occluded: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(len(labels))
    shape = (len(labels), CHANNELS, HEIGHT, WIDTH)
    feature = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    visible = torch.rand(len(labels), 1, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return feature, torch.tensor(labels), visible if occluded else None


def gradients(loss: Tensor, feature: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of a randomly weighted sum of `loss`, so that no two samples' gradients can be mixed up."""
    weight = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
    for parameter in (feature, *module.parameters()):
        parameter.grad = None
    (loss * weight).sum().backward()
    found = {name.removeprefix("matcher."): parameter.grad for name, parameter in module.named_parameters()}
    return {"feature": feature.grad, **found}


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    some_actual, some_expected = (
        {name: gradient for name, gradient in found.items() if gradient is not None} for found in (actual, expected)
    )
    torch.testing.assert_close(some_actual, some_expected, rtol=1e-9, atol=1e-12)


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def assert_same_state(before: dict[str, Tensor], module: nn.Module) -> None:
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def assert_feature_gradient_is_that_of_the_values(evaluate: Callable[[Tensor], Tensor], feature: Tensor) -> None:
    """Compare with a central difference along a random direction: any detached path would show."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(feature.shape, generator=generator, dtype=feature.dtype)
    step = 1e-6
    with torch.no_grad():
        change = evaluate(feature + step * direction).sum() - evaluate(feature - step * direction).sum()
    (gradient,) = torch.autograd.grad(evaluate(feature).sum(), feature)
    numeric = change / (2 * step)
    assert abs(numeric) > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-8)


def loop_of_hardest(score: Tensor, labels: list[int]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Hardest positive and negative of every sample, None where there is none."""
    hardest: list[tuple[Tensor | None, Tensor | None]] = []
    for i, label in enumerate(labels):
        positives = [score[i, j] for j, other in enumerate(labels) if other == label and j != i]
        negatives = [score[i, j] for j, other in enumerate(labels) if other != label]
        hardest.append(
            (
                torch.stack(positives).min() if positives else None,
                torch.stack(negatives).max() if negatives else None,
            )
        )
    return hardest


def loop_of_triplets(score: Tensor, labels: list[int], margin: float) -> tuple[Tensor, Tensor]:
    loss, accuracy = [], []
    for positive, negative in loop_of_hardest(score, labels):
        if positive is None or negative is None:
            loss.append(score.sum() * 0)
            accuracy.append(1.0)
        else:
            loss.append(torch.clamp(margin - positive + negative, min=0))
            accuracy.append(float(positive >= negative))
    return torch.stack(loss), torch.tensor(accuracy, dtype=score.dtype)


@with_and_without_occlusion
@every_target
def test_pairwise_matching_loss_is_the_loop_over_pairs(labels: list[int], occluded: bool) -> None:
    module, dense = PairwiseMatchingLoss(make_matcher()), make_matcher()
    feature, target, visible = make_batch(labels, occluded)
    loss, accuracy = module(feature, target, visible)
    actual = gradients(loss, feature, module)

    score = dense(feature, feature, prob_occ=visible, gal_occ=visible)
    rows = []
    for i, label in enumerate(labels):
        probability = score[i].sigmoid()
        terms = [-torch.log(probability[j] if other == label else 1 - probability[j]) for j, other in enumerate(labels)]
        rows.append(torch.stack(terms).sum())
    expected_loss = torch.stack(rows)
    expected_accuracy = torch.tensor(
        [float(p is None or n is None or bool(p > n)) for p, n in loop_of_hardest(score, labels)],
        dtype=score.dtype,
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(accuracy, expected_accuracy)
    assert not accuracy.requires_grad
    assert_same_gradients(actual, gradients(expected_loss, feature, dense))


@with_and_without_occlusion
@pytest.mark.parametrize("margin", [0.5, 16])
@every_target
def test_triplet_loss_is_the_loop_over_samples(labels: list[int], margin: float, occluded: bool) -> None:
    module, dense = TripletLoss(make_matcher(), margin), make_matcher()
    feature, target, visible = make_batch(labels, occluded)
    loss, accuracy = module(feature, target, visible)
    actual = gradients(loss, feature, module)

    score = dense(feature, feature, prob_occ=visible, gal_occ=visible)
    expected_loss, expected_accuracy = loop_of_triplets(score, labels, margin)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(accuracy, expected_accuracy)
    assert not accuracy.requires_grad
    assert_same_gradients(actual, gradients(expected_loss, feature, dense))


@pytest.mark.parametrize("labels", [TARGETS["singletons"], TARGETS["one class"], [4]])
def test_triplet_loss_without_triplets_is_exactly_zero_and_differentiable(labels: list[int]) -> None:
    feature, target, _ = make_batch(labels)
    # A single pair has no batch statistics.
    loss, accuracy = TripletLoss(make_matcher()).train(len(labels) > 1)(feature, target)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(accuracy, torch.ones_like(accuracy))
    loss.sum().backward()
    assert torch.equal(gradient_of(feature), torch.zeros_like(feature))


def test_tied_scores_give_the_gradient_to_one_pair_each() -> None:
    score = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    loss, accuracy = batch_hard_hinge(score, torch.tensor([0, 0, 0, 1]), margin=1.0)
    loss.sum().backward()
    assert loss.tolist() == [1, 1, 1, 0]
    assert accuracy.tolist() == [1, 1, 1, 1]
    assert gradient_of(score).tolist() == [[0, -1, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, 1], [0, 0, 0, 0]]


def test_a_tie_of_positive_and_negative_is_right_for_triplets_and_wrong_for_pairs() -> None:
    feature, _, _ = make_batch([0])
    target = torch.tensor([0, 0, 1])
    matcher = make_matcher().eval()
    assert TripletLoss(matcher)(feature.expand(3, -1, -1, -1), target)[1].tolist() == [1, 1, 1]
    assert PairwiseMatchingLoss(matcher)(feature.expand(3, -1, -1, -1), target)[1].tolist() == [0, 0, 1]


def test_hardest_pairs_by_hand() -> None:
    score = torch.tensor([[9.0, 2.0, 5.0], [3.0, 9.0, 1.0], [5.0, 1.0, 9.0]])
    positive, negative = hardest_pairs(score, torch.tensor([0, 0, 1]))
    assert positive.tolist() == [2, 3, math.inf]
    assert negative.tolist() == [5, 1, 5]


CLASS_PATHS = [
    pytest.param({"k_nearest": 3}, "zero", id="zero"),
    pytest.param({"k_nearest": 3, "include_self": True}, "zero", id="zero, own class"),
    pytest.param({"k_nearest": NUM_CLASSES - 1}, "zero", id="zero, all but own class"),
    pytest.param({"k_nearest": NUM_CLASSES - 1, "include_self": True}, "zero", id="zero, all classes"),
    pytest.param({"k_nearest": 3, "include_self": True}, "ignore", id="ignore"),
    pytest.param({"k_nearest": NUM_CLASSES - 1, "include_self": True}, "ignore", id="ignore, all classes"),
]


@with_and_without_occlusion
@pytest.mark.parametrize(("options", "background"), CLASS_PATHS)
@every_target
def test_softmax_triplet_loss_is_the_dense_one(
    labels: list[int], options: dict[str, Any], background: losses.Background, occluded: bool
) -> None:
    matcher, dense = (make_matcher(num_classes=NUM_CLASSES, **options) for _ in range(2))
    module = SoftmaxTripletLoss(matcher, margin=0.7, triplet_weight=0.4, background=background)
    feature, target, visible = make_batch(labels, occluded)
    outputs = module(feature, target, visible)
    cls_loss, triplet_loss, loss, cls_accuracy, triplet_accuracy = outputs
    assert all(output.shape == target.shape for output in outputs)
    actual = gradients(loss, feature, module)

    fill = 0.0 if background == "zero" else -math.inf
    logits = dense.class_scores(feature, target, prob_occ=visible).to_dense(fill)
    assert logits.shape == (len(labels), NUM_CLASSES)
    expected_cls_loss = F.cross_entropy(logits, target, reduction="none")
    score = dense(feature, feature, prob_occ=visible, gal_occ=visible)
    expected_triplet_loss, expected_triplet_accuracy = loop_of_triplets(score, labels, 0.7)
    expected_loss = expected_cls_loss + 0.4 * expected_triplet_loss.sum() / len(labels)

    torch.testing.assert_close(cls_loss, expected_cls_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(triplet_loss, expected_triplet_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(cls_accuracy, (logits.argmax(1) == target).double())
    assert torch.equal(triplet_accuracy, expected_triplet_accuracy)
    assert not cls_accuracy.requires_grad
    assert not triplet_accuracy.requires_grad
    assert_same_gradients(actual, gradients(expected_loss, feature, dense))


@st.composite
def compact_scores(draw: st.DrawFn) -> tuple[ClassScores, Tensor]:
    """Scores full of ties, also with the zero of the classes that were not scored."""
    num_classes = draw(st.integers(1, 6))
    num_scored = draw(st.integers(1, num_classes))
    batch = draw(st.integers(0, 4))
    value = st.sampled_from([-1.5, -0.0, 0.0, 0.5, math.nan])
    classes = [draw(st.permutations(range(num_classes)))[:num_scored] for _ in range(batch)]
    values = [[draw(value) for _ in range(num_scored)] for _ in range(batch)]
    target = [draw(st.integers(0, num_classes - 1)) for _ in range(batch)]
    return (
        ClassScores(
            torch.tensor(values, dtype=torch.float64).reshape(batch, num_scored),
            torch.tensor(classes, dtype=torch.int64).reshape(batch, num_scored),
            num_classes,
        ),
        torch.tensor(target, dtype=torch.int64),
    )


@given(compact_scores())
@settings(deadline=None, max_examples=300)
def test_predicted_class_is_the_dense_argmax(case: tuple[ClassScores, Tensor]) -> None:
    scores, _ = case
    batch, scored = scores.values.shape
    for background, fill in ((scores.num_classes - scored, 0.0), (0, -math.inf)):
        dense = torch.full((batch, scores.num_classes), fill, dtype=torch.float64)
        dense.scatter_(1, scores.classes, scores.values)
        assert torch.equal(predicted_class(scores, background), dense.argmax(dim=1))


@given(compact_scores())
@settings(deadline=None, max_examples=200)
def test_neighbor_cross_entropy_is_the_dense_one(case: tuple[ClassScores, Tensor]) -> None:
    scores, target = case
    batch, scored = scores.values.shape
    dense = torch.zeros(batch, scores.num_classes, dtype=torch.float64)
    dense.scatter_(1, scores.classes, scores.values)
    torch.testing.assert_close(
        neighbor_cross_entropy(scores, target, scores.num_classes - scored),
        F.cross_entropy(dense, target, reduction="none"),
        equal_nan=True,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("unscored", [0, 4])
@pytest.mark.parametrize("invalid", [-1, 7, 10**12])
def test_an_invalid_label_gives_nan_in_its_row_only(invalid: int, unscored: int) -> None:
    # What the matcher returns on a GPU, where labels are not read back.
    values = torch.tensor([[math.nan] * 3, [1.0, 2.0, 3.0]], dtype=torch.float64)
    scores = ClassScores(values, torch.tensor([[-1] * 3, [4, 2, 0]]), 3 + unscored)
    target = torch.tensor([invalid, 2])
    loss = neighbor_cross_entropy(scores, target, unscored)
    assert loss[0].isnan()
    assert loss[1].item() == pytest.approx(math.log(unscored + sum(map(math.exp, (1, 2, 3)))) - 2)
    assert (predicted_class(scores, unscored) == target).tolist() == [False, False]


def test_softmax_triplet_loss_runs_the_class_path_before_the_pairs() -> None:
    matcher, forward_order, reverse_order = (make_matcher(num_classes=NUM_CLASSES, k_nearest=3) for _ in range(3))
    feature, target, _ = make_batch(TARGETS["pairs"])
    SoftmaxTripletLoss(matcher)(feature, target)
    forward_order.class_scores(feature, target)
    forward_order(feature, "same")
    reverse_order(feature, "same")
    reverse_order.class_scores(feature, target)
    assert_same_state(forward_order.state_dict(), matcher)
    with pytest.raises(AssertionError):
        assert_same_state(reverse_order.state_dict(), matcher)


def test_softmax_triplet_loss_never_builds_dense_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("dense scores were built")

    monkeypatch.setattr(ClassScores, "to_dense", refuse)
    feature, target, _ = make_batch(TARGETS["pairs"])
    SoftmaxTripletLoss(make_matcher(num_classes=NUM_CLASSES, k_nearest=3))(feature, target)


@pytest.mark.parametrize("mem_batch_size", [1, 4, NUM_CLASSES, 100])
def test_class_memory_loss_is_the_loop_over_steps(mem_batch_size: int) -> None:
    module = ClassMemoryLoss(make_matcher(), NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, mem_batch_size).double()
    dense = make_matcher()
    memory = torch.zeros(NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    seen: set[int] = set()
    for step, labels in enumerate([[0, 3, 0, 0, 8], [3, 3, 1, 8, 0], [5, 1, 1, 3, 8]]):
        feature, target, _ = make_batch(labels)
        feature = (feature.detach() + step).requires_grad_()
        loss, accuracy = module(feature, target)
        actual = gradients(loss, feature, module)

        starts = range(0, NUM_CLASSES, mem_batch_size)
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
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
        assert torch.equal(accuracy, (score.argmax(dim=1) == target).double())
        assert not accuracy.requires_grad
        assert_same_gradients(actual, gradients(expected_loss, feature, dense))

        for b, label in enumerate(labels):
            memory[label] = feature[b].detach()
            seen.add(label)
        assert torch.equal(module.class_memory, memory)
        assert module.valid_class.tolist() == [float(n in seen) for n in range(NUM_CLASSES)]
        assert not module.class_memory.requires_grad


def test_class_memory_loss_writes_equal_values_for_equal_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order a device writes duplicates in, the outcome is the same: here, the reverse order."""
    module = ClassMemoryLoss(make_matcher(), NUM_CLASSES, CHANNELS, HEIGHT, WIDTH).double()
    write = Tensor.__setitem__

    def write_in_reverse(tensor: Tensor, index: Tensor, values: Tensor) -> None:
        write(tensor, index.flip(0), values.flip(0))

    feature, target, _ = make_batch([4, 2, 4, 4, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__setitem__", write_in_reverse)
        module._remember(feature.detach(), target, torch.zeros(len(target)))
    assert torch.equal(module.class_memory[4], feature[3].detach())
    assert torch.equal(module.class_memory[2], feature[4].detach())


@pytest.mark.parametrize("invalid", [-1, NUM_CLASSES, 10**12])
@pytest.mark.parametrize("labels", [[0, 8, 4], [1, 7, 1]], ids=["neighbours of the bounds", "others"])
def test_class_memory_loss_of_an_invalid_label_is_nan_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch, labels: list[int], invalid: int
) -> None:
    # As on a GPU, where labels are not read back.
    monkeypatch.setattr(losses, "check_labels", lambda labels, *_: labels)
    module = ClassMemoryLoss(make_matcher(), NUM_CLASSES, CHANNELS, HEIGHT, WIDTH).double()
    first, target, _ = make_batch(list(range(NUM_CLASSES)))
    module(first, target)
    before = module.class_memory.clone()
    feature, target, _ = make_batch([labels[0], invalid, labels[1], invalid, labels[2]])
    loss, accuracy = module(feature, target)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    assert accuracy[[1, 3]].tolist() == [0, 0]
    for b in (0, 2, 4):
        before[target[b]] = feature[b].detach()
    assert torch.equal(module.class_memory, before)

    module.reset_running_stats()
    feature, target, _ = make_batch([invalid, invalid])
    assert module(feature, target)[0].isnan().all()
    assert not module.class_memory.any()
    assert not module.valid_class.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_memory_loss_of_narrow_features_is_float32(dtype: torch.dtype) -> None:
    module = ClassMemoryLoss(make_matcher().float(), NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, 4)
    wide = copy.deepcopy(module)
    for _ in range(2):
        feature, target, _ = make_batch([4, 2, 4, 7])
        feature = feature.detach().to(dtype).requires_grad_()
        loss, accuracy = module(feature, target)
        expected_loss, _ = wide(feature.float(), target)
    assert loss.dtype == accuracy.dtype == module.class_memory.dtype == torch.float32
    assert expected_loss.std() > 0.1
    torch.testing.assert_close(loss, expected_loss, rtol=0.05, atol=0.05)
    assert torch.equal(module.class_memory, wide.class_memory)
    loss.sum().backward()
    assert gradient_of(feature).dtype == dtype


def losses_by_name() -> dict[str, Callable[[], MatcherLoss]]:
    options = {"num_classes": NUM_CLASSES, "k_nearest": 3}
    return {
        "pairwise": lambda: PairwiseMatchingLoss(make_matcher()),
        "triplet": lambda: TripletLoss(make_matcher()),
        "softmax": lambda: SoftmaxTripletLoss(make_matcher(**options)),
        "softmax ignore": lambda: SoftmaxTripletLoss(make_matcher(**options, include_self=True), background="ignore"),
        "memory": lambda: ClassMemoryLoss(make_matcher(), NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, 4).double(),
    }


every_loss = pytest.mark.parametrize("make_loss", losses_by_name().values(), ids=losses_by_name().keys())


@every_loss
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_reach_the_features_in_full(make_loss: Callable[[], MatcherLoss], training: bool) -> None:
    module = make_loss().train(training)
    feature, target, _ = make_batch(TARGETS["mixed"])
    if isinstance(module, ClassMemoryLoss):
        module(feature, target)

    def evaluate(part: int, maps: Tensor) -> Tensor:
        loss: Tensor = copy.deepcopy(module)(maps, target)[part]
        return loss

    for part in (0, 1, 2) if isinstance(module, SoftmaxTripletLoss) else (0,):
        assert_feature_gradient_is_that_of_the_values(partial(evaluate, part), feature)


@every_loss
def test_an_empty_batch_has_an_empty_loss(make_loss: Callable[[], MatcherLoss]) -> None:
    feature, target, _ = make_batch([])
    outputs = make_loss()(feature, target.long())
    assert all(output.shape == (0,) for output in outputs)
    outputs[0].sum().backward()
    assert gradient_of(feature).shape == feature.shape


@every_loss
def test_resets_are_the_matchers(make_loss: Callable[[], MatcherLoss]) -> None:
    module = make_loss()
    feature, target, _ = make_batch(TARGETS["pairs"])
    for _ in range(2):  # the class memory is empty at first
        module(feature, target)
    fresh = QAConv(CHANNELS, HEIGHT, WIDTH).double().state_dict()
    statistics = [name for name in fresh if "running" in name or "tracked" in name]
    assert len(statistics) == 6
    assert not any(torch.equal(module.matcher.state_dict()[name], fresh[name]) for name in statistics)
    module.reset_running_stats()
    assert all(torch.equal(module.matcher.state_dict()[name], fresh[name]) for name in statistics)
    weight = module.matcher.fc.weight
    assert weight.std() > 0.1
    module.reset_parameters()
    assert torch.equal(weight, torch.full_like(weight, 1 / (HEIGHT * WIDTH)))
    if isinstance(module, ClassMemoryLoss):
        module(feature, target)
        module.reset_running_stats()
        assert not module.class_memory.any()
        assert not module.valid_class.any()


@every_loss
def test_the_state_is_the_matchers_once(make_loss: Callable[[], MatcherLoss]) -> None:
    module = make_loss()
    expected = {f"matcher.{name}" for name in module.matcher.state_dict()}
    if isinstance(module, ClassMemoryLoss):
        expected |= {"class_memory", "valid_class"}
    assert module.state_dict().keys() == expected


@every_loss
def test_bad_input_is_refused_before_anything_changes(make_loss: Callable[[], MatcherLoss]) -> None:
    module = make_loss()
    feature, target, _ = make_batch(TARGETS["pairs"])
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"\[6, 5, 6\]"):
        module(feature.flatten(2), target)
    with pytest.raises(ValueError, match=r"\[6, 5, 3, 2\]"):
        module(feature.mT, target)
    with pytest.raises(TypeError, match="int64"):
        module(feature.long(), target)
    with pytest.raises(TypeError, match="float64"):
        module(feature, target.double())
    with pytest.raises(ValueError, match=r"\[5\]"):
        module(feature, target[:5])
    with pytest.raises(ValueError, match=r"\[6, 1\]"):
        module(feature, target[:, None])
    assert_same_state(before, module)


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
@pytest.mark.parametrize("name", ["softmax", "memory"])
def test_a_label_outside_the_classes_is_refused(name: str, label: int) -> None:
    module = losses_by_name()[name]()
    before = copy.deepcopy(module.state_dict())
    feature, target, _ = make_batch([0, label])
    with pytest.raises(IndexError, match=str(label)):
        module(feature, target)
    assert_same_state(before, module)


@every_loss
def test_narrow_integer_labels_are_labels(make_loss: Callable[[], MatcherLoss]) -> None:
    feature, target, _ = make_batch(TARGETS["mixed"])
    for wide, narrow in zip(make_loss()(feature, target), make_loss()(feature, target.int()), strict=True):
        assert torch.equal(wide, narrow)


def test_bad_options_are_refused() -> None:
    matcher = make_matcher(num_classes=NUM_CLASSES, k_nearest=3)
    with pytest.raises(ValueError, match="'mean'"):
        SoftmaxTripletLoss(matcher, background="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="include_self=True"):
        SoftmaxTripletLoss(matcher, background="ignore")
    with pytest.raises(ValueError, match="without num_classes"):
        SoftmaxTripletLoss(make_matcher())(*make_batch(TARGETS["mixed"])[:2])
    with pytest.raises(ValueError, match=r"mem_batch_size .* got 0"):
        ClassMemoryLoss(matcher, NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, mem_batch_size=0)
    with pytest.raises(ValueError, match=r"num_classes .* got 0"):
        ClassMemoryLoss(matcher, 0, CHANNELS, HEIGHT, WIDTH)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_triplet_are_zero_whatever_their_scores(value: float) -> None:
    # Row 0 has no positive; its scores, and all with it, are no numbers.
    score = torch.randn(4, 4, dtype=torch.float64)
    score[0] = value
    score.requires_grad_()
    loss, accuracy = batch_hard_hinge(score, torch.tensor([5, 1, 1, 1]), margin=9.0)
    assert loss[0] == 0
    assert accuracy[0] == 1
    assert loss[1:].isfinite().all()
    assert (loss[1:] > 1).all()
    loss.sum().backward()
    assert gradient_of(score)[0].eq(0).all()
    assert gradient_of(score)[1:].isfinite().all()
    assert (gradient_of(score)[1:] != 0).sum() == 6

    one_class = torch.full((3, 3), value, dtype=torch.float64, requires_grad=True)
    loss, accuracy = batch_hard_hinge(one_class, torch.tensor([2, 2, 2]), margin=9.0)
    assert loss.tolist() == [0, 0, 0]
    assert accuracy.tolist() == [1, 1, 1]
    loss.sum().backward()
    assert gradient_of(one_class).eq(0).all()


def test_nan_stays_where_there_is_a_triplet() -> None:
    score = torch.zeros(3, 3, dtype=torch.float64)
    score[0, 1] = math.nan
    loss, accuracy = batch_hard_hinge(score, torch.tensor([0, 0, 1]), margin=1.0)
    assert loss.isnan().tolist() == [True, False, False]
    assert accuracy.tolist() == [0, 1, 1]


@pytest.mark.parametrize("labels", [TARGETS["singletons"], TARGETS["one class"]], ids=["singletons", "one class"])
@pytest.mark.parametrize("name", ["pairwise", "triplet", "softmax"])
def test_accuracy_without_a_triplet_is_one_even_of_nan(name: str, labels: list[int]) -> None:
    feature, target, _ = make_batch(labels)
    outputs = losses_by_name()[name]().eval()(feature.detach() * math.nan, target)
    assert outputs[-1].tolist() == [1] * len(labels)
    if name != "pairwise":
        assert outputs[{"triplet": 0, "softmax": 1}[name]].tolist() == [0] * len(labels)


@every_loss
def test_a_forward_that_fails_midway_changes_nothing(
    make_loss: Callable[[], MatcherLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if memory ran out at the n-th call of the matcher, or after the last: the next forward is right."""
    module, expected = make_loss(), make_loss()
    feature, target, _ = make_batch(TARGETS["pairs"])
    for one in (module, expected):
        if isinstance(one, ClassMemoryLoss):
            one(feature, target)
    before = copy.deepcopy(module.state_dict())
    graph = module.matcher.class_neighbors

    def fail_after(calls: int) -> Callable[..., Tensor]:
        forward, left = QAConv.forward, [calls]

        def limited(*arguments: Any, **options: Any) -> Tensor:
            score = forward(*arguments, **options)
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("no memory left")
            return score

        return limited

    for calls in range(3 if isinstance(module, ClassMemoryLoss) else 1):
        with monkeypatch.context() as patch:
            patch.setattr(QAConv, "forward", fail_after(calls))
            with pytest.raises(torch.OutOfMemoryError):
                module(feature, target)
        assert_same_state(before, module)
        assert module.matcher.class_neighbors is graph
    for actual, wanted in zip(module(feature, target), expected(feature, target), strict=True):
        assert torch.equal(actual, wanted)
    assert_same_state(expected.state_dict(), module)


@every_loss
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_the_statistics_count_a_checkpointed_forward_once(
    make_loss: Callable[[], MatcherLoss], use_reentrant: bool
) -> None:
    module, expected = make_loss(), make_loss()
    feature, target, _ = make_batch(TARGETS["mixed"])
    for _ in range(2):
        checkpoint(module, feature, target, use_reentrant=use_reentrant)[0].sum().backward()
        actual = gradient_of(feature).clone()
        feature.grad = None
        expected(feature, target)[0].sum().backward()
        torch.testing.assert_close(actual, gradient_of(feature), rtol=1e-9, atol=1e-12)
        feature.grad = None
    assert_same_state(expected.state_dict(), module)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["softmax", "softmax ignore", "memory"])
def test_on_cuda_invalid_labels_are_nan_and_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("QACONV_TRITON_CHECKS", raising=False)
    module = losses_by_name()[name]().float().cuda()
    feature, target, _ = make_batch([0, 3, -1, 3, NUM_CLASSES, 8])
    feature, target = feature.detach().float().cuda().requires_grad_(), target.cuda()
    module(feature, target.clamp(0, NUM_CLASSES - 1))  # builds the class graph, compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = module(feature, target)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan().tolist() == [False, False, True, False, True, False]
