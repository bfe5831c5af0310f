"""The class graph of QAConv: built when it is needed, dropped on request, and never part of the state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import Eager, assert_as_eager, class_inputs
from exact import exact_vectors
from inputs import DEVICE, C, H, K, N, W, make_class_matcher, make_matcher, maps
from tolerances import assert_close
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from qaconv_triton import QAConv, functional
from qaconv_triton.common import thresholds


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
    matcher = make_class_matcher()
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
    matcher = make_class_matcher()
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
        assert matcher.class_neighbors is stale  # whatever the table does
        getattr(matcher, event)()
    assert matcher.class_neighbors is None
    matcher(**inputs)
    assert built_graphs == [N, N]
    assert torch.equal(matcher.class_neighbors, Eager(matcher).neighbors())  # type: ignore[arg-type]
    assert not torch.equal(matcher.class_neighbors, stale)  # type: ignore[arg-type]


def test_graph_follows_a_new_table_and_k(built_graphs: list[int]) -> None:
    matcher = make_class_matcher(torch.float64)
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
    matcher = make_matcher(num_classes=6, k_nearest=3)
    with torch.no_grad():
        assert matcher.class_embed is not None
        matcher.class_embed.copy_(exact_vectors(1, C * H * W).view(1, C, H, W).expand(6, C, H, W))
    expected = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert matcher.compute_class_neighbors().tolist() == expected
    scores = matcher.class_scores(maps(6, 1), torch.arange(6, device=DEVICE))
    assert scores.classes.tolist() == expected


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_that_began_before_the_graph(use_buffers: bool) -> None:
    """Weight averaging pairs the buffers of both models: a graph among them came too late, or was averaged."""
    matcher = make_class_matcher()
    # on CUDA torch's own default divides integer buffers, which raises for every BatchNorm
    averaged = AveragedModel(matcher, avg_fn=get_swa_avg_fn(), use_buffers=use_buffers)
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
    assert_close(averaged.module.class_embed, (tables[0] + tables[1]) / 2, torch.float32)
    averaged.module(**inputs)
    assert torch.equal(averaged.module.class_neighbors, Eager(averaged.module).neighbors())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_that_begins_with_a_graph(use_buffers: bool) -> None:
    matcher = make_class_matcher()
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


@pytest.mark.parametrize("then", [lambda copied: None, lambda copied: copied.double().float()], ids=["stays", "moves"])
def test_a_copy_whose_table_is_averaged_through_data_has_no_graph(then: Callable[[QAConv], object]) -> None:
    matcher = make_class_matcher()
    matcher.compute_class_neighbors()
    averaged = copy.deepcopy(matcher)
    assert averaged.class_embed is not None
    averaged.class_embed.data.mul_(0.1).add_(maps(N, 5), alpha=0.9)
    then(averaged)
    assert averaged.class_neighbors is None
    assert matcher.class_neighbors is not None


def test_a_copy_that_is_trained_keeps_its_graph() -> None:
    matcher = make_class_matcher()
    graph, copied = matcher.compute_class_neighbors(), matcher.clone().half().float()
    for _ in range(2):
        copied(**class_inputs(torch.float32, occluded=False)).square().sum().backward()
        torch.optim.SGD(copied.parameters(), lr=1.0).step()
        copied.zero_grad()
        assert torch.equal(copied.class_neighbors, graph)  # type: ignore[arg-type]


def test_graph_is_no_buffer_for_torch_func() -> None:
    matchers = [make_class_matcher(mode="eval") for _ in range(2)]
    expected = matchers[0](**class_inputs(torch.float32, occluded=False))
    assert matchers[0].class_neighbors is not None
    assert not any("neighbors" in name or "graph" in name for name, _ in matchers[0].named_buffers())
    parameters, buffers = torch.func.stack_module_state(matchers)
    assert parameters["class_embed"].shape == (2, N, C, H, W)
    one = {name: values[1] for name, values in {**parameters, **buffers}.items()}
    inputs = class_inputs(torch.float32, occluded=False)
    called = torch.func.functional_call(matchers[1], one, (inputs["prob_fea"],), {"labels": inputs["labels"]})
    assert_close(called, expected, torch.float32)


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
def test_graph_and_previous_graph_follow_the_module(change: Callable[[QAConv], Any]) -> None:
    matcher = make_class_matcher()
    graph = matcher.compute_class_neighbors().clone()
    change(matcher)
    for followed in (matcher.class_neighbors, matcher._last_graph):
        assert followed is not None
        assert followed.dtype == torch.int64
        assert torch.equal(followed, graph)


def test_graph_and_previous_graph_do_not_come_back_from_meta() -> None:
    matcher = make_class_matcher()
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
    matcher = make_class_matcher()
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
        make_matcher().class_neighbors = graph


def test_a_rewritten_table_is_searched_as_if_new() -> None:
    """Thresholds from neighbours of another table would let nearly every pair through."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2000, 32, generator=generator) for _ in range(2))
    graph = functional.class_neighbors(first, 60)
    half = torch.cat([second[:1000], first[1000:]])
    assert thresholds._from_previous(first, first, graph, 1e-5) is not None
    assert thresholds._from_previous(first * 2, first * 2, graph, 1e-5) is not None
    for table in (second, half):
        assert thresholds._from_previous(table, table, graph, 1e-5) is None
    warm = functional.class_neighbors(second, 60, previous=graph, return_similarities=True)[0]
    assert_close(warm, functional.class_neighbors(second, 60, return_similarities=True)[0], torch.float32)
