"""The class table of QAConv: initial values, layout in memory, and sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import class_inputs, with_own_class
from inputs import DEVICE, LABELS, C, H, K, N, S, W, gradient_of, ids, make_class_matcher, maps
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn

from qaconv_triton import QAConv


def test_scores_against_all_neighbours_are_those_against_all_classes() -> None:
    matcher = make_class_matcher(k_nearest=N - 1, include_self=True)
    inputs = class_inputs(torch.float32, occluded=False)
    by_label = matcher.clone()(**inputs)
    assert_close(by_label, matcher(inputs["prob_fea"]), torch.float32)


def test_graph_is_no_part_of_the_state_dict() -> None:
    matcher = make_class_matcher()
    matcher.compute_class_neighbors()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"{name}.{key}" for name in ("bn", "logit_bn") for key in norm} | {"fc.weight", "fc.bias"}
    state = matcher.state_dict()
    assert set(state) == keys | {"class_embed"}
    assert set(QAConv(C, H, W).state_dict()) == keys
    assert state["fc.weight"].shape == (1, 2 * S)
    assert state["fc.bias"].shape == (1,)
    assert state["class_embed"].shape == (N, C, H, W)
    assert set(dict(matcher.named_parameters())) == {key for key in keys | {"class_embed"} if "running" not in key} - {
        "bn.num_batches_tracked",
        "logit_bn.num_batches_tracked",
    }
    assert matcher.half().class_neighbors.dtype == torch.int64  # type: ignore[union-attr]


def test_reset_running_stats_and_reset_parameters() -> None:
    matcher = make_class_matcher()
    matcher(**class_inputs(torch.float32, occluded=False))
    matcher.reset_running_stats()
    for norm in (matcher.bn, matcher.logit_bn):
        assert (norm.running_mean, norm.running_var, norm.num_batches_tracked) == (0, 1, 0)
    assert not torch.equal(matcher.bn.weight, torch.ones(1, device=DEVICE))
    matcher.compute_class_neighbors()
    old = matcher.class_embed.clone()  # type: ignore[union-attr]
    matcher.reset_parameters()
    assert matcher.class_neighbors is None
    assert torch.equal(matcher.fc.weight, torch.full((1, 2 * S), 1 / S, device=DEVICE))
    assert (matcher.bn.weight, matcher.bn.bias) == (1, 0)
    table = matcher.class_embed
    assert table is not None
    assert (table != old).all()
    assert 0.8 < float(table.detach().std()) * C**0.5 < 1.2
    assert table.is_contiguous(memory_format=torch.channels_last)


def test_initial_values() -> None:
    torch.manual_seed(3)
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    torch.manual_seed(3)
    linear = nn.Linear(2 * S, 1)
    table = torch.randn(N, C, H, W) / C**0.5
    assert torch.equal(matcher.fc.weight, torch.full((1, 2 * S), 1 / S))
    assert torch.equal(matcher.fc.bias, linear.bias)
    assert matcher.class_embed is not None
    assert_close(matcher.class_embed, table, torch.float32)
    for norm in (matcher.bn, matcher.logit_bn):
        assert (norm.weight, norm.bias, norm.running_mean, norm.running_var) == (1, 0, 0, 1)
        assert (norm.eps, norm.momentum, norm.num_batches_tracked) == (1e-5, 0.1, 0)
    assert not matcher.include_self
    assert QAConv(C, H, W).k_nearest == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda matcher: matcher.to(torch.bfloat16),
        lambda matcher: matcher.half().float(),
        lambda matcher: matcher.double(),
        lambda matcher: matcher.to(DEVICE, non_blocking=True),
    ],
    ids=["bf16", "half", "double", "device"],
)
def test_table_stays_channels_last(change: Callable[[QAConv], QAConv]) -> None:
    matcher = make_class_matcher()
    expected = matcher.class_embed.detach().clone()  # type: ignore[union-attr]
    table = change(matcher).class_embed
    assert isinstance(table, nn.Parameter)
    assert table.shape == (N, C, H, W)
    assert table.is_contiguous(memory_format=torch.channels_last)
    assert not table.is_contiguous()
    assert_close(table, expected, table.dtype if table.dtype == torch.bfloat16 else torch.float16)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_table_and_features_may_have_any_memory_format(sparse_grad: bool) -> None:
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        matcher = make_class_matcher(sparse_grad=sparse_grad)
        assert matcher.class_embed is not None
        matcher.class_embed = nn.Parameter(matcher.class_embed.detach().contiguous(memory_format=layout))
        assert matcher.class_embed.is_contiguous(memory_format=layout)
        feature = maps(len(LABELS), 1).contiguous(memory_format=layout).requires_grad_()
        scores = matcher(feature, labels=ids(LABELS)) + matcher(feature, labels=ids(LABELS[::-1]))
        scores.square().sum().backward()
        gradients = {"feature": gradient_of(feature), "table": gradient_of(matcher.class_embed).to_dense()}
        results.append({"scores": scores, "graph": matcher.class_neighbors, **gradients})
    assert_all_close(*results, torch.float32)


def test_features_of_any_stride() -> None:
    matcher = make_class_matcher(mode="eval")
    wide = maps(5, 1, shape=(C, H + 2, W + 1))
    view = wide[:, :, 1:-1, 1:].requires_grad_()
    visible = torch.rand(5, 2, H, W, device=DEVICE)[:, 1:]
    for keyword in ({"labels": ids(LABELS)}, {"gal_fea": "same"}, {"gal_fea": maps(5, 2).flip(0)}):
        plain = matcher(view.detach().clone(memory_format=torch.contiguous_format), prob_occ=visible.clone(), **keyword)
        assert torch.equal(matcher(view, prob_occ=visible, **keyword), plain)


# --- sparse gradients


def class_step(sparse_grad: bool, **options: Any) -> QAConv:
    """A matcher after one forward and backward pass by labels."""
    matcher = make_class_matcher(k_nearest=2, sparse_grad=sparse_grad, **options)
    scores = matcher(maps(4, 1), labels=ids([3, 3, 6, 3]))
    (scores * maps(4, 2, shape=(N,))).sum().backward()
    return matcher


def dense_gradients(matcher: QAConv) -> dict[str, Tensor]:
    return {name: gradient_of(parameter).to_dense() for name, parameter in matcher.named_parameters()}


@with_own_class
def test_sparse_gradient_is_the_dense_one(include_self: bool) -> None:
    sparse, dense = (class_step(sparse_grad, include_self=include_self) for sparse_grad in (True, False))
    assert sparse.class_embed is not None
    assert dense.class_embed is not None
    gradient, expected = gradient_of(sparse.class_embed), gradient_of(dense.class_embed)
    assert gradient.layout == torch.sparse_coo
    assert gradient.sparse_dim() == 1
    assert gradient.shape == expected.shape
    assert expected.layout == torch.strided
    assert sparse.class_neighbors is not None
    touched = {*sparse.class_neighbors[[3, 6]].flatten().tolist(), *([3, 6] if include_self else [])}
    assert gradient.coalesce().indices().flatten().tolist() == sorted(touched)
    assert len(touched) < N
    assert_all_close(dense_gradients(sparse), dense_gradients(dense), torch.float32)
    untouched = sorted(set(range(N)) - touched)
    assert expected[untouched].eq(0).all()
    assert (expected[sorted(touched)].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # torch's sparse + dense keeps no memory format
def test_sparse_gradients_accumulate() -> None:
    matchers = [class_step(sparse_grad) for sparse_grad in (True, False)]
    for matcher in matchers:
        matcher(maps(2, 8), labels=ids([1, 5])).square().sum().backward()
        matcher(maps(2, 9)).square().sum().backward()  # all classes: dense, on top
    assert_all_close(*map(dense_gradients, matchers), torch.float32)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_a_large_table_takes_a_step(optimizer: type[torch.optim.Optimizer]) -> None:
    """Beyond some size torch adds a sparse gradient through a view, which only a contiguous parameter has."""
    matcher = QAConv(64, 7, 7, num_classes=2000, k_nearest=20, sparse_grad=True).to(DEVICE)
    matcher.class_neighbors = (torch.arange(2000)[:, None] + torch.arange(1, 21)).to(DEVICE) % 2000
    assert matcher.class_embed is not None
    before = matcher.class_embed.detach().clone()
    labels = torch.arange(0, 1280, 20, device=DEVICE)
    matcher(torch.randn(64, 64, 7, 7, device=DEVICE), labels=labels).square().sum().backward()
    optimizer([matcher.class_embed], lr=0.1).step()  # type: ignore[call-arg]
    moved = (matcher.class_embed.detach() - before).flatten(1).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(1, 1281))


def test_sgd_takes_the_sparse_gradient() -> None:
    matchers = [class_step(sparse_grad) for sparse_grad in (True, False)]
    before = matchers[0].class_embed.detach().clone()  # type: ignore[union-attr]
    for matcher in matchers:
        torch.optim.SGD(matcher.parameters(), lr=0.5).step()
    assert_all_close(*(dict(matcher.named_parameters()) for matcher in matchers), torch.float32)
    assert float((matchers[0].class_embed.detach() - before).abs().max()) > 1e-3  # type: ignore[union-attr]


def test_sparse_adam_moves_the_touched_rows() -> None:
    matcher = class_step(sparse_grad=True)
    assert matcher.class_embed is not None
    before, gradient = matcher.class_embed.detach().clone(), gradient_of(matcher.class_embed).to_dense()
    optimizer = torch.optim.SparseAdam([matcher.class_embed], lr=0.1)
    optimizer.step()
    moved = matcher.class_embed.detach() - before
    expected = -0.1 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
    assert_close(moved, torch.where(gradient == 0, 0.0, expected), torch.float32)
    optimizer.zero_grad()
    matcher.on_epoch_start()
    matcher(maps(2, 8), labels=ids([1, 5])).square().sum().backward()
    optimizer.step()
    assert matcher.class_embed.isfinite().all()
