"""Published QAConv checkpoints score and train here as they did there; what is refused changes nothing."""

from __future__ import annotations

import copy
import io
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from inputs import CPU, C, H, K, N, S, W, gradient_of, maps
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import PairwiseMatchingLoss, QAConv, SoftmaxTripletLoss, TripletLoss, convert_checkpoint
from qaconv_triton.checkpoint import convert_shared_fc

fp64_maps = partial(maps, dtype=torch.float64, device=CPU)


class Published(nn.Module):
    """The published matcher: one `fc` of S weights for both halves, whose two logits are added."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)
        self.fc = nn.Linear(S, 1)
        self.logit_bn = nn.BatchNorm1d(1)

    def forward(self, probe: Tensor, gallery: Tensor) -> Tensor:
        probe, gallery = (F.normalize(features, dim=1).flatten(2) for features in (probe, gallery))
        corr = torch.einsum("pcs,gcr->pgrs", probe, gallery)
        pooled = torch.cat([corr.max(dim=2).values, corr.max(dim=3).values], dim=-1)
        values = self.bn(pooled.view(-1, 1, S)).view(-1, S)
        logits = self.fc(values).view(-1, 2).sum(dim=-1, keepdim=True)
        return self.logit_bn(logits).view(len(probe), len(gallery))


def published() -> Published:
    torch.manual_seed(0)
    module = Published().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    for seed in (1, 2, 3):  # running statistics of their own
        module(fp64_maps(4, seed), fp64_maps(3, seed + 10))
    return module


def assert_same_scores(matcher: QAConv, module: Published) -> None:
    probe, gallery = fp64_maps(4, 7), fp64_maps(3, 8)
    for training in (False, True, False):  # the second changes the running statistics, alike
        matcher.train(training)
        module.train(training)
        actual_inputs, expected_inputs = (
            [values.clone().requires_grad_() for values in (probe, gallery)] for _ in range(2)
        )
        actual, expected = matcher(*actual_inputs), module(*expected_inputs)
        assert float(expected.detach().std()) > 0.1
        assert_close(actual, expected, torch.float64)
        weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (actual * weight).sum().backward()
        (expected * weight).sum().backward()
        for found, wanted in zip(actual_inputs, expected_inputs, strict=True):
            assert gradient_of(wanted).abs().max() > 1e-3
            assert_close(gradient_of(found), gradient_of(wanted), torch.float64)
    for name, buffer in module.named_buffers():
        assert_close(matcher.get_buffer(name), buffer, torch.float64, name)


def test_published_checkpoint_scores_the_same() -> None:
    module = published()
    matcher = QAConv(C, H, W).double()
    result = matcher.load_state_dict(module.state_dict())  # strict
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(matcher.fc.weight, torch.cat([module.fc.weight, module.fc.weight], dim=1))
    assert torch.equal(matcher.fc.bias, 2 * module.fc.bias)
    assert_same_scores(matcher, module)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda matcher: matcher.clone()], ids=["deepcopy", "clone"])
def test_a_copy_loads_it_too(change: Any) -> None:
    module = published()
    matcher = QAConv(C, H, W).double()
    copied = change(matcher)
    before = matcher.fc.weight.clone()
    copied.load_state_dict(module.state_dict())
    assert_same_scores(copied, module)
    assert torch.equal(matcher.fc.weight, before)


@pytest.mark.parametrize("assign", [False, True])
def test_published_checkpoint_under_a_prefix(assign: bool) -> None:
    module = published()
    for make in (PairwiseMatchingLoss, TripletLoss):
        loss = make(QAConv(C, H, W).double())
        state = {f"matcher.{name}": value.clone() for name, value in module.state_dict().items()}
        result = loss.load_state_dict(state, assign=assign)
        assert result.missing_keys == result.unexpected_keys == []
        assert_same_scores(loss.matcher, module)

    model = nn.ModuleDict({"backbone": nn.Conv2d(3, C, 1), "head": nn.ModuleList([QAConv(C, H, W), nn.Linear(S, 1)])})
    model = model.double()
    state = model.state_dict()
    state |= {f"head.0.{name}": value.clone() for name, value in module.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert_same_scores(model["head"][0], module)  # type: ignore[index]
    assert torch.equal(model["head"][1].weight, state["head.1.weight"])  # type: ignore[index]
    assert model["head"][1].weight.shape == (1, S)  # type: ignore[index]  # another module's, of that shape, stays


@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_callers_dict_is_unchanged(container: type[dict[str, Tensor]]) -> None:
    state = container(published().state_dict())
    values = {name: value.clone() for name, value in state.items()}
    identities = {name: id(value) for name, value in state.items()}
    QAConv(C, H, W).load_state_dict(state)
    assert list(state) == list(values)
    for name, value in values.items():
        assert id(state[name]) == identities[name]
        assert torch.equal(state[name], value)


def test_published_checkpoint_into_a_matcher_with_classes() -> None:
    """It has no class table: strict loading says so, otherwise the table and its graph stay."""
    module = published()
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K).double()
    with pytest.raises(RuntimeError, match="class_embed"):
        matcher.load_state_dict(module.state_dict())
    table, graph = matcher.class_embed.detach().clone(), matcher.compute_class_neighbors()  # type: ignore[union-attr]
    result = matcher.load_state_dict(module.state_dict(), strict=False)
    assert result.missing_keys == ["class_embed"]
    assert result.unexpected_keys == []
    assert torch.equal(matcher.class_embed, table)  # type: ignore[arg-type]
    assert matcher.class_neighbors is graph
    assert_same_scores(matcher, module)


def test_strict_mode_still_counts_the_keys() -> None:
    state = dict(published().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected.*extra"):
        QAConv(C, H, W).load_state_dict({**state, "extra": torch.ones(1)})
    del state["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing.*fc\.bias"):
        QAConv(C, H, W).load_state_dict(state)
    matcher = QAConv(C, H, W)
    bias = matcher.fc.bias.detach().clone()
    assert matcher.load_state_dict(state, strict=False).missing_keys == ["fc.bias"]
    assert torch.equal(matcher.fc.bias, bias)
    assert torch.equal(matcher.fc.weight, torch.cat([state["fc.weight"]] * 2, dim=1).float())


def test_a_checkpoint_of_ours_loads_as_it_is() -> None:
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K).double()
    nn.init.normal_(matcher.fc.weight)
    other = QAConv(C, H, W, num_classes=N, k_nearest=K).double()
    other.load_state_dict(matcher.state_dict())
    for name, value in matcher.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    module = published()
    ours = QAConv(C, H, W).double()
    ours.load_state_dict(module.state_dict())
    again = QAConv(C, H, W).double()
    again.load_state_dict(ours.state_dict())  # converted once, not twice
    assert_same_scores(again, module)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("fc.weight", (1, S + 1)), ("fc.weight", (1, 4 * S)), ("fc.weight", (2, S)), ("fc.weight", (S,)),
     ("fc.weight", (1, S // 2)), ("fc.bias", (2,)), ("class_embed", (N + 1, C, H, W)), ("class_embed", (N, C, W, H))],
)  # fmt: skip
def test_wrong_sizes_still_raise(name: str, shape: tuple[int, ...]) -> None:
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    before = matcher.get_parameter(name).detach().clone()
    state = {**matcher.state_dict(), name: torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}"):
        matcher.load_state_dict(state)
    assert torch.equal(matcher.get_parameter(name), before)


def test_conversion_alone() -> None:
    weight, bias = torch.randn(1, S), torch.randn(1)
    for state, prefix in (
        ({"fc.weight": weight, "fc.bias": bias, "other": 1}, ""),
        ({"a.b.fc.weight": weight, "a.b.fc.bias": bias, "fc.weight": weight, "fc.bias": bias}, "a.b."),
    ):
        before = dict(state)
        convert_shared_fc(state, prefix, S)
        assert torch.equal(state.pop(prefix + "fc.weight"), torch.cat([weight, weight], dim=1))
        assert torch.equal(state.pop(prefix + "fc.bias"), 2 * bias)
        assert all(before[name] is value for name, value in state.items())
    for untouched in ({}, {"fc.weight": torch.ones(1, 2 * S), "fc.bias": bias}, {"fc.bias": bias}, {"fc.weight": 1}):
        state = dict(untouched)
        convert_shared_fc(state, "", S)
        assert all(state[name] is value for name, value in untouched.items())
    assert torch.equal(bias, bias.clone())


def test_a_bias_that_is_none_is_refused_clearly() -> None:
    for state in ({**published().state_dict(), "fc.bias": None}, {**QAConv(C, H, W).state_dict(), "fc.weight": None}):
        matcher = QAConv(C, H, W)
        before = {name: value.clone() for name, value in matcher.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"fc\.(bias|weight): expected a tensor, got NoneType"):
            matcher.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())


# --- a shared fc, as QAConv 2.1 trains it -----------------------------------------------------------------------------


def pairwise_loss(scores: Tensor, target: Tensor) -> Tensor:
    """The published loss: binary cross entropy over all pairs of a batch, summed over columns."""
    same = (target[:, None] == target).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, same, reduction="none").sum(-1)


def train_published(module: Published, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    return train(lambda feature, target: pairwise_loss(module(feature, feature), target), optimizer, steps)


def train(loss: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        value = loss(fp64_maps(6, step), torch.tensor([0, 0, 1, 1, 2, 2])).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_run_of_qaconv_2_1_resumes(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The momentum of a shared `fc` is `[1, S]`, and it moves both halves alike, the bias twice."""
    module = published()
    optimizer = make_optimizer(module.parameters())
    train_published(module, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": module.state_dict(), "optim": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    matcher = QAConv(C, H, W, shared_fc=True).double()
    resumed = make_optimizer(matcher.parameters())
    result = matcher.load_state_dict(saved["model"])
    assert result.missing_keys == result.unexpected_keys == []
    resumed.load_state_dict(saved["optim"])
    assert_same_scores(matcher.clone(), copy.deepcopy(module))
    loss = PairwiseMatchingLoss(matcher)
    actual = train(lambda feature, target: loss(feature, target)[0], resumed, range(3, 8))
    expected = train_published(module, optimizer, range(3, 8))
    assert actual == pytest.approx(expected, rel=1e-9)
    assert len({round(value, 3) for value in expected}) == 5
    # looser: Adam divides by the size of a gradient, and those of the biases before a norm are rounding alone
    for name, value in module.state_dict().items():
        torch.testing.assert_close(matcher.state_dict()[name], value, rtol=1e-7, atol=1e-7)
    for own, theirs in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert own.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_close(own[name], value, torch.float64, name)


def test_a_shared_fc_starts_as_published_and_has_one_half() -> None:
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K, shared_fc=True)
    assert torch.equal(matcher.fc.weight, torch.full((1, S), 1 / S))
    nn.init.normal_(matcher.fc.weight)
    matcher.reset_parameters()
    assert torch.equal(matcher.fc.weight, torch.full((1, S), 1 / S))
    assert "shared_fc=True" in str(matcher)
    assert "shared_fc" not in str(QAConv(C, H, W))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_shared_fc_scores_as_its_two_halves(mode: str) -> None:
    shared = QAConv(C, H, W, num_classes=N, k_nearest=K, shared_fc=True).double().train(mode == "train")
    nn.init.normal_(shared.fc.weight)
    separate = QAConv(C, H, W, num_classes=N, k_nearest=K).double().train(mode == "train")
    separate.load_state_dict(shared.state_dict())  # ours, too, is converted
    assert torch.equal(separate.fc.weight, torch.cat([shared.fc.weight] * 2, dim=1))
    assert torch.equal(separate.fc.bias, 2 * shared.fc.bias)
    feature, target = fp64_maps(4, 1), torch.tensor([0, 0, 3, 7])
    for call in (
        lambda matcher: matcher(feature, labels=target),
        lambda matcher: matcher(feature),
        lambda matcher: matcher(feature, "same"),
        lambda matcher: matcher.match(feature, fp64_maps(3, 2)),
        lambda matcher: matcher.match_pairs(feature, fp64_maps(4, 2)),
    ):
        expected = call(separate)
        assert float(expected.detach().std()) > 1e-2
        assert_close(call(shared), expected, torch.float64)
    assert_close(shared.bn.running_mean, separate.bn.running_mean, torch.float64)  # type: ignore[arg-type]
    assert_refused(shared, separate.state_dict(), "size mismatch for fc.weight")


# --- releases ---------------------------------------------------------------------------------------------------------


class PublishedHalves(Published):
    """1.x and 2.0: one weight for each value of a pair, those of the gallery's locations first; OAML: the probe's."""

    def __init__(self, gallery_first: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * S, 1)
        self.gallery_first = gallery_first

    def forward(self, probe: Tensor, gallery: Tensor) -> Tensor:
        probe, gallery = (F.normalize(features, dim=1).flatten(2) for features in (probe, gallery))
        corr = torch.einsum("pcs,gcr->pgrs", probe, gallery)
        by_probe, by_gallery = corr.max(dim=2).values, corr.max(dim=3).values
        pooled = torch.cat([by_gallery, by_probe] if self.gallery_first else [by_probe, by_gallery], dim=-1)
        values = self.bn(pooled.view(-1, 1, 2 * S)).view(-1, 2 * S)
        return self.logit_bn(self.fc(values)).view(len(probe), len(gallery))


@pytest.mark.parametrize("release", ["1.2", "2.0", "2.1", "oaml"])
@pytest.mark.parametrize("prefix", ["", "module.criterion."])
def test_every_release_scores_as_it_did(release: str, prefix: str) -> None:
    torch.manual_seed(1)
    module = Published() if release == "2.1" else PublishedHalves(gallery_first=release != "oaml")
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    state = OrderedDict((prefix + name, value) for name, value in module.state_dict().items())
    state["backbone.weight"] = torch.ones(1, S)
    before = {name: (id(value), value.clone()) for name, value in state.items()}
    converted = convert_checkpoint(state, release, prefix)
    assert converted.keys() == state.keys()
    assert converted[prefix + "fc.weight"].shape == (1, 2 * S)
    assert converted["backbone.weight"] is state["backbone.weight"]
    for name, (identity, value) in before.items():
        assert id(state[name]) == identity
        assert torch.equal(state[name], value)
    matcher = QAConv(C, H, W).double()
    matcher.load_state_dict(
        {name.removeprefix(prefix): converted[name] for name in converted if "backbone" not in name}
    )
    assert_same_scores(matcher, module)
    with pytest.raises(ValueError, match="already"):
        convert_checkpoint(converted, release, prefix)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, "2.2"), ValueError, r"'1\.2', '2\.0', '2\.1', 'oaml', got '2\.2'"),
        (({}, "2.1"), ValueError, r"no 'fc\.weight'"),
        (({"module.fc.weight": torch.ones(1, S)}, "2.1"), ValueError, r"no 'fc\.weight'.*module\.fc\.weight"),
        (({"fc.weight": torch.ones(1, S)}, "2.1", "module"), ValueError, "ends in a dot, got 'module'"),
        (({"fc.weight": torch.ones(1, 5)}, "1.2"), ValueError, r"\[1, 2S\] of release '1\.2', got shape \[1, 5\]"),
        (({"fc.weight": torch.ones(S)}, "2.1"), ValueError, r"\[1, S\] of release '2\.1', got shape \[6\]"),
        (
            ({"fc.weight": torch.ones(1, S), "class_embed": torch.ones(N, C, H, W)}, "oaml"),
            ValueError,
            r"S=6 as in class_embed \[8, 5, 2, 3\], got shape \[1, 6\]",
        ),
        (({"fc.weight": [1.0]}, "2.1"), TypeError, r"fc\.weight: expected a tensor, got list"),
        (({"fc.weight": torch.ones(1, S), "fc.bias": None}, "2.1"), TypeError, r"fc\.bias: expected a tensor"),
        (([1], "2.1"), TypeError, "mapping"),
        ((QAConv(C, H, W).state_dict(), "2.1"), ValueError, r"already"),
    ],
)
def test_conversion_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_checkpoint(*arguments)


def test_an_assumption_about_the_release_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    QAConv(C, H, W).load_state_dict(published().state_dict())
    QAConv(C, H, W).load_state_dict(QAConv(C, H, W).state_dict())
    QAConv(C, H, W).load_state_dict(convert_checkpoint(published().state_dict(), "2.1"))
    assert caplog.messages == []
    QAConv(C, H, W).load_state_dict(dict(published().state_dict()))
    assert "without metadata is taken for one of QAConv 2.1" in caplog.messages[0]
    QAConv(C, H, W).load_state_dict(PublishedHalves(gallery_first=True).state_dict())
    assert "gallery's half first" in caplog.messages[1]


# --- other map sizes --------------------------------------------------------------------------------------------------


def assert_refused(matcher: nn.Module, state: Any, message: str, **options: Any) -> None:
    """`load_state_dict` raises, and matcher, graph and previous graph are as before."""
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    inner = next(module for module in matcher.modules() if isinstance(module, QAConv))
    graph, previous = inner.class_neighbors, inner._last_graph
    with pytest.raises(RuntimeError, match=message):
        matcher.load_state_dict(state, **options)
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())
    assert inner.class_neighbors is graph
    assert inner._last_graph is previous


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (QAConv(C, H, W), QAConv(C, H, 2 * W)),  # [1, 2S] into a matcher of twice the locations, as of QAConv 2.1
        (QAConv(C, H, W), QAConv(C, H, 2 * W, shared_fc=True)),
        (QAConv(C, H, 2 * W, shared_fc=True), QAConv(C, H, W)),
        (QAConv(C, H, W, shared_fc=True), QAConv(C, H, 2 * W)),
        (QAConv(C, H, W), QAConv(C, W, H)),  # as many locations, but others
        (QAConv(C, H, W), QAConv(C, H, W + 1)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "matcher."])
def test_a_checkpoint_of_ours_for_another_map_size_is_refused(saved: QAConv, loading: QAConv, prefix: str) -> None:
    nn.init.normal_(saved.fc.weight)
    wrap: Callable[[QAConv], nn.Module] = PairwiseMatchingLoss if prefix else lambda matcher: matcher
    file = io.BytesIO()
    torch.save(wrap(saved).state_dict(), file)
    file.seek(0)
    assert_refused(wrap(loading), torch.load(file, weights_only=True), rf"size mismatch for {prefix}fc\.weight")


def test_without_metadata_the_class_table_shows_the_map_size() -> None:
    saved = QAConv(C, H, W, num_classes=N, k_nearest=K)
    loading = QAConv(C, H, 2 * W, num_classes=N, k_nearest=K)
    assert_refused(loading, dict(saved.state_dict()), "size mismatch for class_embed")


def test_a_converted_checkpoint_for_another_map_size_is_refused() -> None:
    converted = convert_checkpoint(published().state_dict(), "2.1")  # [1, 2S]
    assert_refused(QAConv(C, H, 2 * W), converted, r"size mismatch for fc\.weight")


# --- refused, and nothing has changed ---------------------------------------------------------------------------------


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "table": lambda state: state.update({"class_embed": torch.zeros(N + 1, C, H, W)}),
    "fc": lambda state: state.update({"fc.weight": torch.zeros(1, 2 * S + 1)}),
    "norm": lambda state: state.update({"bn.running_mean": torch.zeros(2)}),
    "not a tensor": lambda state: state.update({"logit_bn.weight": 1.0}),
    "missing": lambda state: state.pop("logit_bn.weight"),
    "unexpected": lambda state: state.update({"extra": torch.zeros(1)}),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_state_dict_changes_nothing(broken: Callable[[dict[str, Any]], Any], assign: bool) -> None:
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    matcher(fp64_maps(4, 1).float(), labels=torch.tensor([0, 1, 2, 3]))
    other = QAConv(C, H, W, num_classes=N, k_nearest=K)
    other(fp64_maps(4, 2).float(), "same")
    state = other.state_dict()
    broken(state)
    assert matcher._last_graph is not None
    parameters = [id(parameter) for parameter in matcher.parameters()]
    assert_refused(matcher, state, "Error", assign=assign)
    assert [id(parameter) for parameter in matcher.parameters()] == parameters


@pytest.mark.parametrize("name", ["table", "fc", "norm", "not a tensor"])
def test_a_state_dict_refused_through_a_loss_changes_nothing(name: str) -> None:
    loss = SoftmaxTripletLoss(QAConv(C, H, W, num_classes=N, k_nearest=K))
    loss(fp64_maps(4, 1).float(), torch.tensor([0, 0, 2, 2]))
    state = QAConv(C, H, W, num_classes=N, k_nearest=K).state_dict()
    BROKEN[name](state)
    assert_refused(loss, {f"matcher.{key}": value for key, value in state.items()}, "Error", strict=False)


@pytest.mark.parametrize("name", ["missing", "unexpected"])
def test_keys_refused_through_a_loss_change_nothing(name: str) -> None:
    loss = SoftmaxTripletLoss(QAConv(C, H, W, num_classes=N, k_nearest=K))
    loss(fp64_maps(4, 1).float(), torch.tensor([0, 0, 2, 2]))
    state = {key: torch.ones_like(value) for key, value in loss.state_dict().items()}
    if name == "missing":
        del state["matcher.fc.bias"]
    else:
        state["matcher.extra"] = torch.zeros(1)
    assert_refused(loss, state, "key")


def test_norms_of_old_torch_have_no_count() -> None:
    state = {name: value for name, value in published().state_dict().items() if "tracked" not in name}
    QAConv(C, H, W).load_state_dict(state)


# --- contiguous tensors -----------------------------------------------------------------------------------------------


def test_safetensors_takes_the_state_dict(tmp_path: Path) -> None:
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    safetensors.torch.save_file(matcher.state_dict(), tmp_path / "matcher.safetensors")
    other = QAConv(C, H, W, num_classes=N, k_nearest=K)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "matcher.safetensors"))
    assert torch.equal(other.class_embed, matcher.class_embed)  # type: ignore[arg-type]
    assert all(value.is_contiguous() for value in matcher.state_dict().values())
    nested = nn.ModuleDict({"head": SoftmaxTripletLoss(matcher)})
    assert nested.state_dict()["head.matcher.class_embed"].is_contiguous()


def test_the_parameter_stays_as_kernels_read_it() -> None:
    """In its state dict alone is it copied; the variables themselves are the parameters."""
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    assert matcher.state_dict(keep_vars=True)["class_embed"] is matcher.class_embed
    for assign in (False, True):
        other = QAConv(C, H, W, num_classes=N, k_nearest=K)
        other.load_state_dict(matcher.state_dict(), assign=assign)
        assert other.class_embed is not None
        assert other.class_embed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(other.class_embed, matcher.class_embed)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradient_has_the_layout_of_the_table_for_fused_optimizers(layout: torch.memory_format) -> None:
    """Fused AdamW on the CPU reads parameter and gradient in the order of memory, whatever their strides."""
    tables = []
    for fused in (False, True):
        torch.manual_seed(0)
        matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
        assert matcher.class_embed is not None
        matcher.class_embed = nn.Parameter(matcher.class_embed.detach().contiguous(memory_format=layout))
        # of a size that leaves the rounding of a gradient near zero as small as it is
        optimizer = torch.optim.AdamW(matcher.parameters(), lr=0.1, eps=1.0, fused=fused)
        for labels in ([0, 3, 3, 7], [1, 0, 5, 2]):
            matcher(fp64_maps(4, 1).float(), labels=torch.tensor(labels)).square().sum().backward()
            assert matcher.class_embed.grad is not None
            assert matcher.class_embed.grad.stride() == matcher.class_embed.stride()
            optimizer.step()
            optimizer.zero_grad()
        tables.append(matcher.class_embed.detach())
    assert_close(*tables, torch.float32, "tables")
