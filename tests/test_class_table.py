"""The class table of QAConv: its graph's life, its layout, sparse gradients, and the memory a step takes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import (
    DEVICE,
    LABELS,
    C,
    Eager,
    H,
    K,
    N,
    S,
    W,
    assert_as_eager,
    assert_close,
    build,
    class_inputs,
    ids,
    maps,
    with_own_class,
)
from exact import exact_vectors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qaconv_triton import QAConv, functional
from qaconv_triton import scores as scores_module
from qaconv_triton.common import thresholds
from qaconv_triton.cpu import cosine_topk as cpu_topk
from qaconv_triton.cpu import max_correlation as cpu

# --- the class graph --------------------------------------------------------------------------------------------------


@pytest.fixture
def built_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the class tables whose graph was built, in order."""
    sizes: list[int] = []
    original = functional.class_neighbors

    def counted(embeddings: Tensor, k: int, **options: Any) -> Any:
        sizes.append(len(embeddings))
        return original(embeddings, k, **options)

    monkeypatch.setattr(functional, "class_neighbors", counted)
    return sizes


def test_graph_is_lazy_and_cached(built_graphs: list[int]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float32, occluded=False)
    assert matcher.class_neighbors is None
    matcher(maps(4, 1), maps(3, 3))
    matcher(maps(4, 1))
    matcher(maps(4, 1), "same")
    matcher.match(maps(4, 1), maps(3, 3))
    assert matcher.class_neighbors is None
    assert built_graphs == []
    for _ in range(3):
        matcher(**inputs)
        matcher.class_scores(inputs["prob_fea"], inputs["labels"])
    assert built_graphs == [N]
    graph = matcher.class_neighbors
    assert graph is not None
    assert graph.dtype == torch.int64
    assert torch.equal(graph, Eager(matcher).neighbors())


@pytest.mark.parametrize("event", ["on_epoch_start", "reset_class_neighbors", "reset_running_stats", "load_state_dict"])
def test_graph_is_dropped(built_graphs: list[int], event: str) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float32, occluded=False)
    matcher(**inputs)
    stale = matcher.class_neighbors
    assert stale is not None
    table = matcher.class_embed
    assert table is not None
    if event == "load_state_dict":
        state = {name: value.clone() for name, value in matcher.state_dict().items()}
        state["class_embed"] = maps(N, 77)
        matcher.load_state_dict(state)
    else:
        with torch.no_grad():
            table.copy_(maps(N, 77))
        matcher(**inputs)
        assert matcher.class_neighbors is stale  # until told, whatever the table does
        getattr(matcher, event)()
    assert matcher.class_neighbors is None
    matcher(**inputs)
    assert built_graphs == [N, N]
    assert torch.equal(matcher.class_neighbors, Eager(matcher).neighbors())  # type: ignore[arg-type]
    assert not torch.equal(matcher.class_neighbors, stale)  # type: ignore[arg-type]


def test_resets_reset_what_they_say() -> None:
    matcher = build(num_classes=N, k_nearest=K)
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


def test_graph_follows_a_new_table_and_k(built_graphs: list[int]) -> None:
    matcher = build(torch.float64, num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float64, occluded=False)
    with torch.no_grad():
        matcher(**inputs)
    matcher.class_embed = nn.Parameter(maps(N + 3, 55, torch.float64))
    assert matcher.num_classes == N + 3
    assert_as_eager(matcher, inputs)
    matcher.k_nearest = 5
    matcher.zero_grad()
    assert_as_eager(matcher, inputs)
    assert built_graphs == [N, N + 3, N + 3]
    assert matcher.class_neighbors is not None
    assert matcher.class_neighbors.shape == (N + 3, 5)


def test_own_class_is_left_out_by_id(backend: str) -> None:
    """All embeddings coincide: every other class is as near as the class itself, and lower ids come first."""
    matcher = build(num_classes=6, k_nearest=3)
    with torch.no_grad():
        assert matcher.class_embed is not None
        matcher.class_embed.copy_(exact_vectors(1, C * H * W).view(1, C, H, W).expand(6, C, H, W))
    expected = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert matcher.compute_class_neighbors().tolist() == expected
    scores = matcher.class_scores(maps(6, 1), torch.arange(6, device=DEVICE))
    assert scores.classes.tolist() == expected


def test_every_other_class_is_a_neighbour(backend: str) -> None:
    matcher = build(num_classes=N, k_nearest=N - 1, include_self=True)
    inputs = class_inputs(torch.float32, occluded=False)
    by_label = matcher.clone()(**inputs)
    assert_close(by_label, matcher(inputs["prob_fea"]), 1e-4)


def test_graph_is_no_part_of_the_state_dict() -> None:
    matcher = build(num_classes=N, k_nearest=K)
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


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_that_began_before_the_graph(use_buffers: bool) -> None:
    """Weight averaging pairs the buffers of both models: a graph among them came too late, or was averaged."""
    matcher = build(num_classes=N, k_nearest=K)
    averaged = AveragedModel(matcher, use_buffers=use_buffers)
    inputs = class_inputs(torch.float32, occluded=False)
    tables = []
    for seed in (5, 6):
        matcher.on_epoch_start()
        with torch.no_grad():
            matcher.class_embed.copy_(maps(N, seed))  # type: ignore[union-attr]
        tables.append(matcher.class_embed.detach().clone())  # type: ignore[union-attr]
        matcher(**inputs)
        averaged.update_parameters(matcher)
    assert matcher.class_neighbors is not None
    assert averaged.module.class_neighbors is None
    assert_close(averaged.module.class_embed, (tables[0] + tables[1]) / 2, 1e-6)
    averaged.module(**inputs)
    assert torch.equal(averaged.module.class_neighbors, Eager(averaged.module).neighbors())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_that_begins_with_a_graph(use_buffers: bool) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    graph = matcher.compute_class_neighbors()
    averaged = AveragedModel(matcher, use_buffers=use_buffers)
    assert torch.equal(averaged.module.class_neighbors, graph)  # the table is still the same
    with torch.no_grad():
        matcher.class_embed.copy_(maps(N, 5))  # type: ignore[union-attr]
    averaged.update_parameters(matcher)
    assert averaged.module.class_neighbors is None
    assert matcher.class_neighbors is graph
    averaged.module(**class_inputs(torch.float32, occluded=False))
    assert not torch.equal(averaged.module.class_neighbors, graph)


@pytest.mark.parametrize("then", [lambda twin: None, lambda twin: twin.double().float()], ids=["stays", "moves"])
def test_a_copy_whose_table_is_averaged_through_data_has_no_graph(then: Callable[[QAConv], object]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    matcher.compute_class_neighbors()
    twin = copy.deepcopy(matcher)
    assert twin.class_embed is not None
    twin.class_embed.data.mul_(0.1).add_(maps(N, 5), alpha=0.9)
    then(twin)
    assert twin.class_neighbors is None
    assert matcher.class_neighbors is not None


def test_a_copy_that_is_trained_keeps_its_graph() -> None:
    matcher = build(num_classes=N, k_nearest=K)
    graph, twin = matcher.compute_class_neighbors(), matcher.clone().half().float()
    for _ in range(2):
        twin(**class_inputs(torch.float32, occluded=False)).square().sum().backward()
        torch.optim.SGD(twin.parameters(), lr=1.0).step()
        twin.zero_grad()
        assert torch.equal(twin.class_neighbors, graph)  # type: ignore[arg-type]


def test_graph_is_no_buffer_for_torch_func() -> None:
    matchers = [build(num_classes=N, k_nearest=K, mode="eval") for _ in range(2)]
    expected = matchers[0](**class_inputs(torch.float32, occluded=False))
    assert matchers[0].class_neighbors is not None
    assert not any("neighbors" in name or "graph" in name for name, _ in matchers[0].named_buffers())
    parameters, buffers = torch.func.stack_module_state(matchers)
    assert parameters["class_embed"].shape == (2, N, C, H, W)
    one = {name: values[1] for name, values in {**parameters, **buffers}.items()}
    inputs = class_inputs(torch.float32, occluded=False)
    called = torch.func.functional_call(matchers[1], one, (inputs["prob_fea"],), {"labels": inputs["labels"]})
    assert_close(called, expected, 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda matcher: matcher.half(),
        lambda matcher: matcher.type(torch.float16),  # which casts integer buffers, too
        lambda matcher: matcher.to(torch.float64),
        lambda matcher: matcher.share_memory(),
        lambda matcher: nn.Sequential(matcher).to(DEVICE),
    ],
    ids=["half", "type", "to", "share_memory", "parent"],
)
def test_graph_and_hint_follow_the_module(change: Callable[[QAConv], Any]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    graph = matcher.compute_class_neighbors().clone()
    change(matcher)
    for followed in (matcher.class_neighbors, matcher._last_graph):
        assert followed is not None
        assert followed.dtype == torch.int64
        assert torch.equal(followed, graph)


def test_graph_and_hint_go_to_meta_and_do_not_come_back() -> None:
    matcher = build(num_classes=N, k_nearest=K)
    matcher.compute_class_neighbors()
    nn.Sequential(matcher).to("meta")
    assert matcher.class_neighbors.device.type == matcher._last_graph.device.type == "meta"  # type: ignore[union-attr]
    matcher.to_empty(device=DEVICE)
    assert matcher.class_neighbors is None
    assert matcher._last_graph is None


@pytest.mark.parametrize(
    ("value", "error", "restated"),
    [
        (torch.full((N, K), N), IndexError, ("[0, 8)", "[8, 8, 8, 8, 8]")),
        (torch.full((N, K), -1), IndexError, ("[0, 8)", "[-1,")),
        (torch.zeros(N, K - 1, dtype=torch.int64), ValueError, ("[8, 3]", "[8, 2]")),
        (torch.zeros(N - 1, K, dtype=torch.int64), ValueError, ("[8, 3]", "[7, 3]")),
        (torch.zeros(N, K, dtype=torch.int32), TypeError, ("int64", "torch.int32")),
        (torch.zeros(N, K), TypeError, ("int64", "torch.float32")),
        (torch.zeros(N, K, dtype=torch.int64).to_sparse(), TypeError, ("sparse",)),
        ([[1]], TypeError, ("int64", "list")),
    ],
)
def test_an_assigned_graph_is_checked(value: Any, error: type[Exception], restated: tuple[str, ...]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    graph = matcher.compute_class_neighbors()
    with pytest.raises(error) as caught:
        matcher.class_neighbors = value
    assert all(part in str(caught.value) for part in ("class_neighbors", *restated))
    assert matcher.class_neighbors is graph
    matcher.class_neighbors = graph.flip(0)
    assert torch.equal(matcher.class_neighbors, graph.flip(0))
    matcher.class_neighbors = None
    assert matcher.class_neighbors is None
    with pytest.raises(ValueError, match="num_classes"):
        build().class_neighbors = graph


def test_a_rewritten_table_is_searched_as_if_new() -> None:
    """Thresholds from neighbours that are none any more would let nearly every pair through."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2000, 32, generator=generator) for _ in range(2))
    graph = functional.class_neighbors(first, 60)
    half = torch.cat([second[:1000], first[1000:]])
    assert thresholds._from_previous(first, first, graph, 1e-5) is not None
    assert thresholds._from_previous(first * 2, first * 2, graph, 1e-5) is not None
    for table in (second, half):
        assert thresholds._from_previous(table, table, graph, 1e-5) is None
    warm = functional.class_neighbors(second, 60, previous=graph, return_similarities=True)[0]
    assert_close(warm, functional.class_neighbors(second, 60, return_similarities=True)[0], 1e-5)


# --- initial values and layout ----------------------------------------------------------------------------------------


def test_initial_values() -> None:
    torch.manual_seed(3)
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    torch.manual_seed(3)
    linear = nn.Linear(2 * S, 1)
    table = torch.randn(N, C, H, W) / C**0.5
    assert torch.equal(matcher.fc.weight, torch.full((1, 2 * S), 1 / S, device=DEVICE))
    assert torch.equal(matcher.fc.bias, linear.bias)
    assert matcher.class_embed is not None
    torch.testing.assert_close(matcher.class_embed.detach(), table, rtol=1e-6, atol=0.0)
    for norm in (matcher.bn, matcher.logit_bn):
        assert (norm.weight, norm.bias, norm.running_mean, norm.running_var) == (1, 0, 0, 1)
        assert (norm.eps, norm.momentum, norm.num_batches_tracked) == (1e-5, 0.1, 0)
    assert not matcher.include_self
    assert QAConv(C, H, W).k_nearest == 20


def through_pickle(matcher: QAConv) -> QAConv:
    loaded = pickle.loads(pickle.dumps(matcher))
    assert isinstance(loaded, QAConv)
    return loaded


def through_save(matcher: QAConv) -> QAConv:
    file = io.BytesIO()
    torch.save(matcher, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, QAConv)
    return loaded


def through_state_dict(matcher: QAConv) -> QAConv:
    other = QAConv(C, H, W, num_classes=N, k_nearest=K).to(DEVICE)
    other.load_state_dict({name: value.contiguous() for name, value in matcher.state_dict().items()})
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda matcher: matcher.to(torch.bfloat16),
        lambda matcher: matcher.half().float(),
        lambda matcher: matcher.double(),
        lambda matcher: matcher.to(DEVICE, non_blocking=True),
        copy.deepcopy,
        lambda matcher: matcher.clone(),
        through_pickle,
        through_save,
        through_state_dict,
    ],
    ids=["bf16", "half", "double", "device", "deepcopy", "clone", "pickle", "save", "state_dict"],
)
def test_table_stays_channels_last(change: Callable[[QAConv], QAConv]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    expected = matcher.class_embed.detach().clone()  # type: ignore[union-attr]
    table = change(matcher).class_embed
    assert isinstance(table, nn.Parameter)
    assert table.shape == (N, C, H, W)
    assert table.is_contiguous(memory_format=torch.channels_last)
    assert not table.is_contiguous()
    assert_close(table, expected, 1e-2 if table.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_any_layout_does(backend: str, sparse_grad: bool) -> None:
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        matcher = build(num_classes=N, k_nearest=K, sparse_grad=sparse_grad)
        assert matcher.class_embed is not None
        matcher.class_embed = nn.Parameter(matcher.class_embed.detach().contiguous(memory_format=layout))
        assert matcher.class_embed.is_contiguous(memory_format=layout)
        feature = maps(len(LABELS), 1).contiguous(memory_format=layout).requires_grad_()
        scores = matcher(feature, labels=ids(LABELS)) + matcher(feature, labels=ids(LABELS[::-1]))
        scores.square().sum().backward()
        gradient = matcher.class_embed.grad
        assert gradient is not None
        assert feature.grad is not None
        assert matcher.class_neighbors is not None
        results.append((scores, feature.grad, gradient.to_dense(), matcher.class_neighbors))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, 1e-5)


def test_features_of_any_stride(backend: str) -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    wide = maps(5, 1, shape=(C, H + 2, W + 1))
    view = wide[:, :, 1:-1, 1:].requires_grad_()
    veil = torch.rand(5, 2, H, W, device=DEVICE)[:, 1:]
    for keyword in ({"labels": ids(LABELS)}, {"gal_fea": "same"}, {"gal_fea": maps(5, 2).flip(0)}):
        plain = matcher(view.detach().clone(memory_format=torch.contiguous_format), prob_occ=veil.clone(), **keyword)
        assert torch.equal(matcher(view, prob_occ=veil, **keyword), plain)


# --- sparse gradients -------------------------------------------------------------------------------------------------


def class_step(sparse_grad: bool, **options: Any) -> QAConv:
    matcher = build(num_classes=N, k_nearest=2, sparse_grad=sparse_grad, **options)
    scores = matcher(maps(4, 1), labels=ids([3, 3, 6, 3]))
    (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)).sum().backward()
    return matcher


@with_own_class
def test_sparse_gradient_is_the_dense_one(backend: str, include_self: bool) -> None:
    sparse, dense = (class_step(sparse_grad, include_self=include_self) for sparse_grad in (True, False))
    assert sparse.class_embed is not None
    assert dense.class_embed is not None
    gradient, expected = sparse.class_embed.grad, dense.class_embed.grad
    assert gradient is not None
    assert expected is not None
    assert gradient.layout == torch.sparse_coo
    assert gradient.sparse_dim() == 1
    assert gradient.shape == expected.shape
    assert expected.layout == torch.strided
    assert sparse.class_neighbors is not None
    touched = {*sparse.class_neighbors[[3, 6]].flatten().tolist(), *([3, 6] if include_self else [])}
    gradient = gradient.coalesce()
    assert gradient.indices().flatten().tolist() == sorted(touched)
    assert len(touched) < N
    torch.testing.assert_close(gradient.to_dense(), expected, rtol=1e-6, atol=1e-7)
    untouched = sorted(set(range(N)) - touched)
    assert expected[untouched].eq(0).all()
    assert (expected[sorted(touched)].flatten(1).abs().amax(1) > 0).all()
    for name, parameter in dense.named_parameters():
        if name != "class_embed":
            torch.testing.assert_close(sparse.get_parameter(name).grad, parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # torch's sparse + dense keeps no memory format
def test_sparse_gradients_accumulate() -> None:
    gradients = []
    for sparse_grad in (True, False):
        matcher = class_step(sparse_grad)
        matcher(maps(2, 8), labels=ids([1, 5])).square().sum().backward()
        matcher(maps(2, 9)).square().sum().backward()  # all classes: dense, on top
        assert matcher.class_embed is not None
        assert matcher.class_embed.grad is not None
        gradients.append(matcher.class_embed.grad.to_dense())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


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
    tables = []
    for sparse_grad in (True, False):
        matcher = class_step(sparse_grad)
        assert matcher.class_embed is not None
        before = matcher.class_embed.detach().clone()
        torch.optim.SGD(matcher.parameters(), lr=0.5).step()
        tables.append(matcher.class_embed.detach())
        assert float((tables[-1] - before).abs().max()) > 1e-3
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-7)


def test_sparse_adam_moves_the_touched_rows() -> None:
    matcher = class_step(sparse_grad=True)
    assert matcher.class_embed is not None
    before, gradient = matcher.class_embed.detach().clone(), matcher.class_embed.grad
    assert gradient is not None
    dense_gradient = gradient.to_dense()
    optimizer = torch.optim.SparseAdam([matcher.class_embed], lr=0.1)
    optimizer.step()
    moved = matcher.class_embed.detach() - before
    expected = -0.1 * dense_gradient / (dense_gradient.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(moved, torch.where(dense_gradient == 0, 0.0, expected), rtol=1e-3, atol=1e-5)
    optimizer.zero_grad()
    matcher.on_epoch_start()
    matcher(maps(2, 8), labels=ids([1, 5])).square().sum().backward()
    optimizer.step()
    assert matcher.class_embed.isfinite().all()


# --- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made meanwhile has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        strided = [
            [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.layout == torch.strided]
            for values in ((args, kwargs), result)
        ]
        given = {value.untyped_storage().data_ptr() for value in strided[0]}
        for value in strided[1]:
            if value.untyped_storage().data_ptr() not in given:  # or else a view
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> LargestTensor:
    """The mode, which also looks into the ops."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    mode = LargestTensor()

    def observed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with mode:
                return function(*args)

        return run

    matching = ((cpu, name) for name in ("max_correlation", "pair_sums", "max_correlation_backward"))
    for module, name in (*matching, (cpu_topk, "cosine_topk")):
        monkeypatch.setattr(module, name, observed(getattr(module, name)))
    return mode


def class_path_peak(mode: LargestTensor, classes: int, sparse_grad: bool = False) -> int:
    torch.manual_seed(0)
    mode.elements = 0
    matcher = QAConv(2, 4, 4, num_classes=classes, k_nearest=10, sparse_grad=sparse_grad).to(DEVICE)
    feature = maps(6, 1, shape=(2, 4, 4)).requires_grad_()
    with mode:
        matcher(feature, labels=torch.arange(6, device=DEVICE)).square().sum().backward()
    return mode.elements


def test_class_path_never_holds_all_similarities_or_correlations(
    monkeypatch: pytest.MonkeyPatch, largest: LargestTensor
) -> None:
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", 2**9)
    for name, size in (("TILE", 16), ("BLOCK_ROWS", 32), ("BLOCK_COLUMNS", 64)):
        monkeypatch.setattr(cpu_topk, name, size)
    monkeypatch.setattr(thresholds, "MAX_ELEMENTS", 2**13)
    monkeypatch.setattr(cpu_topk, "MAX_ELEMENTS", 2**13)
    few, many = class_path_peak(largest, 1000), class_path_peak(largest, 2000)
    assert many >= 2000 * 2 * 16  # the table's gradient: the mode does see things
    assert many < 2000 * 2000 // 10
    assert few * 1.5 < many < few * 2.5  # grows with N, not N * N
    correlations = 6 * 10 * 16 * 16
    matcher = QAConv(2, 4, 4, num_classes=20, k_nearest=10).to(DEVICE)
    matcher.compute_class_neighbors()
    feature = maps(6, 1, shape=(2, 4, 4)).requires_grad_()
    largest.elements = 0
    with largest:
        matcher(feature, labels=torch.arange(6, device=DEVICE)).square().sum().backward()
    pooled = 6 * 10 * 2 * 16
    assert pooled <= largest.elements <= 1.5 * pooled < correlations / 5


def test_sparse_step_never_holds_another_table(monkeypatch: pytest.MonkeyPatch, largest: LargestTensor) -> None:
    """With the graph at hand, a step touches the rows it needs only."""
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", 2**9)
    matcher = QAConv(2, 4, 4, num_classes=5000, k_nearest=10, sparse_grad=True).to(DEVICE)
    matcher.class_neighbors = (torch.arange(1, 11).repeat(5000, 1) + torch.arange(5000)[:, None]).to(DEVICE) % 5000
    feature, labels = maps(6, 1, shape=(2, 4, 4)).requires_grad_(), torch.arange(6, device=DEVICE)
    largest.elements = 0
    with largest:
        matcher.class_scores(feature, labels).values.square().sum().backward()
    assert 6 * 10 * 2 * 16 <= largest.elements < 5000


def test_match_holds_no_pooled_values(monkeypatch: pytest.MonkeyPatch, largest: LargestTensor) -> None:
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", 2**9)
    monkeypatch.setattr(scores_module, "MAP_BYTES", 4 * 1000)
    matcher, probe, gallery = build(), maps(30, 1), maps(40, 3)
    with largest:
        scores = matcher.match(probe, gallery)
    assert scores.shape == (30, 40)
    assert 1200 <= largest.elements <= 1500 < 30 * 40 * 2 * S / 5
