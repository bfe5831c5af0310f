"""A checkpoint of published QAConv 2.x scores exactly as it did there."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import PairwiseMatchingLoss, QAConv, TripletLoss
from qaconv_triton.checkpoint import convert_shared_fc

C, H, W, N, K = 5, 2, 3, 8, 3
S = H * W


class Published(nn.Module):
    """The published matcher: one `fc` of S weights for both halves, whose two logits are added."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)
        self.fc = nn.Linear(S, 1)
        self.logit_bn = nn.BatchNorm1d(1)

    def forward(self, probe: Tensor, gallery: Tensor) -> Tensor:
        probe, gallery = (F.normalize(maps, dim=1).flatten(2) for maps in (probe, gallery))
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
        module(maps(4, seed), maps(3, seed + 10))
    return module


def maps(count: int, seed: int) -> Tensor:
    return torch.randn(count, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_scores(matcher: QAConv, module: Published) -> None:
    probe, gallery = maps(4, 7), maps(3, 8)
    for training in (False, True, False):  # the second changes the running statistics, alike
        matcher.train(training)
        module.train(training)
        actual_inputs, expected_inputs = (
            [values.clone().requires_grad_() for values in (probe, gallery)] for _ in range(2)
        )
        actual, expected = matcher(*actual_inputs), module(*expected_inputs)
        assert float(expected.detach().std()) > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (actual * weight).sum().backward()
        (expected * weight).sum().backward()
        for found, wanted in zip(actual_inputs, expected_inputs, strict=True):
            assert wanted.grad is not None
            assert wanted.grad.abs().max() > 1e-3
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-10)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(matcher.get_buffer(name), buffer, rtol=1e-10, atol=1e-10)


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
