"""The graph sampler on several ranks, and saved and loaded in the middle of an epoch."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import QAConv, sampler
from qaconv_triton.sampler import GraphSampler

N = 10
LABELS = torch.arange(N).repeat(5)

few_processors = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def ring(num_classes: int = N, num_neighbors: int = 3) -> Tensor:
    """Class n is nearest to n + 1, n + 2, ..."""
    return (torch.arange(num_classes)[:, None] + torch.arange(1, num_neighbors + 1)) % num_classes


def build(**options: Any) -> GraphSampler:
    return GraphSampler(**{"labels": LABELS, "neighbors": ring(), "batch_size": 6, "num_instances": 2} | options)


def epochs_of(count: int, **options: Any) -> list[list[list[int]]]:
    one = build(**options)
    return [list(one) for _ in range(count)]


# --- ranks ------------------------------------------------------------------------------------------------------------


def order_of(num_replicas: int, **options: Any) -> list[list[list[int]]]:
    """The orders of two epochs, put together from all ranks."""
    ranks = [epochs_of(2, num_replicas=num_replicas, rank=rank, **options) for rank in range(num_replicas)]
    return [list(itertools.chain(*zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_replicas", [2, 3, 5, 10, 16])
def test_ranks_deal_one_order_among_them(num_replicas: int) -> None:
    length = -(-N // num_replicas)
    assert [len(build(num_replicas=num_replicas, rank=rank)) for rank in range(num_replicas)] == num_replicas * [length]
    for order, alone in zip(order_of(num_replicas), epochs_of(2), strict=True):
        assert len(order) == length * num_replicas
        assert order[:N] == alone
        # beyond the classes: others, shuffled anew
        anchors = [int(LABELS[batch[0]]) for batch in order]
        assert set(Counter(anchors).values()) <= {1, 2}
        assert order[N:] != alone[: len(order) - N] or len(order) == N


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("batches_per_epoch", [1, 4, 25])
def test_an_epoch_of_a_given_number_of_batches(num_replicas: int, batches_per_epoch: int) -> None:
    assert len(build(num_replicas=num_replicas, rank=0, batches_per_epoch=batches_per_epoch)) == batches_per_epoch
    total = num_replicas * batches_per_epoch
    whole = epochs_of(2, batches_per_epoch=75)
    for order, longer in zip(order_of(num_replicas, batches_per_epoch=batches_per_epoch), whole, strict=True):
        assert order == longer[:total]
        anchors = [int(LABELS[batch[0]]) for batch in order]
        for start in range(0, total, N):
            assert len(set(anchors[start : start + N])) == len(anchors[start : start + N])
        if total >= 2 * N:
            assert anchors[:N] != anchors[N : 2 * N]


def test_the_walk_goes_on_where_classes_are_shuffled_anew() -> None:
    drawn = Counter(itertools.chain(*epochs_of(1, batches_per_epoch=25)[0]))
    # 25 batches of 3 classes, 2 samples of each: 15 draws of a class on average, each in rounds of its 5 samples
    for label in range(N):
        counts = [drawn[sample] for sample in range(label, len(LABELS), N)]
        assert max(counts) - min(counts) <= 1


def test_ranks_follow_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    one, fixed = build(), build(num_replicas=2, rank=0)
    assert (one.num_replicas, one.rank, len(one)) == (1, 0, N)
    # a process group that is initialised later
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed, "get_rank", lambda: 2)
    assert (one.num_replicas, one.rank, len(one)) == (3, 2, 4)
    assert list(one) == epochs_of(1, num_replicas=3, rank=2)[0]
    assert (fixed.num_replicas, fixed.rank, len(fixed)) == (2, 0, 5)
    with pytest.raises(ValueError, match="rank=2 is not below num_replicas=2"):
        build(num_replicas=2)


def test_the_sampler_is_its_own_sampler() -> None:
    one = build()
    assert one.sampler is one
    loader = DataLoader(TensorDataset(LABELS), batch_sampler=one)
    assert loader.batch_sampler is not None
    loader.batch_sampler.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert next(iter(one)) == epochs_of(4)[3][0]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_replicas": 0}, ValueError, "num_replicas must be at least 1 .*got 0"),
        ({"num_replicas": 2, "rank": 2}, ValueError, "rank=2 is not below num_replicas=2"),
        ({"rank": 1}, ValueError, "rank=1 is not below num_replicas=1"),
        ({"num_replicas": 2, "rank": -1}, ValueError, "rank must be at least 0 .*got -1"),
        ({"num_replicas": 2, "rank": True}, TypeError, "rank: .*bool"),
        ({"num_replicas": 2.0}, TypeError, "num_replicas: .*float"),
        ({"batches_per_epoch": 0}, ValueError, "batches_per_epoch must be at least 1 .*got 0"),
        ({"batches_per_epoch": "1"}, TypeError, "batches_per_epoch: .*str"),
    ],
)
def test_bad_ranks_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(**options)


# --- the order --------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_batches_do_not_depend_on_how_many_are_drawn_at_a_time(data: st.DataObject) -> None:
    # Classes without samples, named twice, and the anchor among its neighbours: random classes fill up.
    num_classes = data.draw(st.integers(4, 9))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 3, 7]), min_size=num_classes, max_size=num_classes))
    counts[0], counts[1], counts[2] = 4, 1, 2
    ids = st.lists(st.integers(0, num_classes - 1), min_size=4, max_size=4)
    neighbors = torch.tensor(data.draw(st.lists(ids, min_size=num_classes, max_size=num_classes)))
    labels = torch.arange(num_classes).repeat_interleave(torch.tensor(counts))
    options = {"labels": labels, "neighbors": neighbors, "batch_size": 9, "num_instances": 3, "batches_per_epoch": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "BLOCK", 1)
        expected = epochs_of(1, **options)
        patch.setattr(sampler, "BLOCK", data.draw(st.integers(2, 30)))
        assert epochs_of(1, **options) == expected


# --- state ------------------------------------------------------------------------------------------------------------


def roundtrip(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    assert loaded == state
    return loaded


@pytest.mark.parametrize("batches_per_epoch", [None, 13])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_going_on_at_any_batch_gives_the_batches_that_follow(num_replicas: int, batches_per_epoch: int | None) -> None:
    options: dict[str, Any] = {"num_replicas": num_replicas, "batches_per_epoch": batches_per_epoch, "seed": 7}
    expected = [list(itertools.chain(*epochs_of(3, rank=rank, **options))) for rank in range(num_replicas)]
    ranks = [build(rank=rank, **options) for rank in range(num_replicas)]
    given = 0
    for epoch in range(3):
        state = roundtrip(ranks[0].state_dict())
        assert (state["epoch"], state["position"]) == (epoch, 0)
        for step, batches in enumerate(zip(*ranks, strict=True), start=1):
            given += 1
            states = [roundtrip(one.state_dict()) for one in ranks]
            assert all(state == states[0] for state in states)
            assert (states[0]["epoch"], states[0]["position"]) == (epoch, step * num_replicas)
            for rank, batch in enumerate(batches):
                assert batch == expected[rank][given - 1]
                resumed = build(rank=rank, **options)
                resumed.load_state_dict(states[0])
                assert resumed.epoch == epoch
                assert resumed.state_dict() == states[0]
                rest = [batch for _ in range(epoch, 3) for batch in resumed]
                assert rest == expected[rank][given:]
                assert resumed.state_dict()["epoch"] == 3


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 3), (3, 16)])
@pytest.mark.parametrize("batches_per_epoch", [None, 12])
def test_another_number_of_ranks_deals_what_is_left(before: int, after: int, batches_per_epoch: int | None) -> None:
    options: dict[str, Any] = {"batches_per_epoch": batches_per_epoch}
    first = build(num_replicas=before, rank=0, **options)
    batches = iter(first)
    next(batches), next(batches)
    state = first.state_dict()
    whole = epochs_of(1, batches_per_epoch=400)[0]
    ranks = [build(num_replicas=after, rank=rank, **options) for rank in range(after)]
    for one in ranks:
        one.load_state_dict(state)
        assert one.state_dict() == state
    left = list(itertools.chain(*zip(*ranks, strict=True)))
    # the end is that of an epoch of the new number of ranks, or the first batch of each rank behind it
    end = after * len(ranks[0])
    assert end <= 2 * before + len(left) < end + after
    assert left == whole[2 * before : 2 * before + len(left)]
    assert {one.state_dict()["epoch"] for one in ranks} == {1}


def test_setting_the_epoch_of_a_loaded_state_keeps_its_batch() -> None:
    # as trainers do before each epoch, the resumed one included
    expected = epochs_of(3)
    one = build()
    one.set_epoch(1)
    batches = iter(one)
    next(batches), next(batches)
    state = one.state_dict()
    same, other = build(), build()
    for resumed in (same, other):
        resumed.load_state_dict(state)
    same.set_epoch(1)
    assert list(same) == expected[1][2:]
    assert list(same) == expected[2]
    other.set_epoch(2)
    assert other.state_dict()["position"] == 0
    assert list(other) == expected[2]
    # a state whose epoch has no batch left: an empty rest, and the next epoch
    for _ in batches:
        last = one.state_dict()
    same.load_state_dict(last)
    same.set_epoch(1)
    assert list(same) == []
    assert list(same) == expected[2]


def test_an_empty_rest_asks_for_no_graph() -> None:
    calls: list[int] = []

    def neighbors() -> Tensor:
        calls.append(1)
        return ring()

    one = build(neighbors=neighbors)
    one.load_state_dict({**one.state_dict(), "epoch": 4, "position": N})
    assert list(one) == []
    assert not calls
    assert one.state_dict()["epoch"] == one.epoch == 5
    list(one)
    assert len(calls) == 1


def test_the_state_is_that_of_the_iterator_that_gave_a_batch_last() -> None:
    one = build()
    abandoned, current = iter(one), iter(one)
    next(abandoned)
    iter(one)
    assert one.state_dict()["epoch"] == 0
    next(current), next(current)
    assert (one.state_dict()["epoch"], one.state_dict()["position"]) == (1, 2)
    one.set_epoch(1)
    assert (one.state_dict()["epoch"], one.state_dict()["position"]) == (1, 0)
    next(current)
    assert (one.state_dict()["epoch"], one.state_dict()["position"]) == (1, 3)
    list(abandoned)
    assert one.state_dict()["epoch"] == 1
    # an epoch that a failing graph stops is not begun, and its state is kept
    saved = {**one.state_dict(), "epoch": 6, "position": 2}
    failing = build(neighbors=lambda: ring(num_neighbors=1))
    failing.load_state_dict(saved)
    with pytest.raises(ValueError, match="K >= 2"):
        next(iter(failing))
    assert failing.state_dict() == saved


def test_another_graph_is_told_from_the_one_of_the_epoch() -> None:
    one = build()
    batches = iter(one)
    next(batches)
    state = one.state_dict()
    same, other = build(neighbors=lambda: ring().to(torch.int32)), build(neighbors=ring().flip(1))
    same.load_state_dict(state)
    assert list(same) == list(batches)
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match="epoch 0 goes on with other neighbours than it began with"):
        assert len(list(other)) == N - 1
    list(other)  # another epoch: no warning


def test_the_state_of_another_sampler_is_refused() -> None:
    state = build(seed=1).state_dict()
    swapped = LABELS.clone()
    swapped[[0, 1]] = LABELS[[1, 0]]
    for options, text in (
        ({"seed": 2}, "saved with seed=1, but this sampler has seed=2"),
        ({"seed": 1, "batch_size": 8}, "saved with batch_size=6, but this sampler has batch_size=8"),
        (
            {"seed": 1, "batch_size": 9, "num_instances": 3},
            "batch_size=6, num_instances=2, but this sampler has batch_size=9, num_instances=3",
        ),
        (
            {"seed": 1, "labels": swapped},
            "saved with labels='50 samples of 10 classes, sha256 .* has labels='50 samples",
        ),
        ({"seed": 1, "labels": LABELS[1:]}, "has labels='49 samples of 10 classes"),
    ):
        other = build(**options)
        other.set_epoch(5)
        before = other.state_dict()
        with pytest.raises(ValueError, match=text):
            other.load_state_dict(state)
        assert other.state_dict() == before


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda state: None, TypeError, "state: expected a mapping.*got NoneType"),
        (lambda state: {}, ValueError, "no version, seed, .* among its entries"),
        (lambda state: {**state, "version": 2}, ValueError, "saved with version=2, but this sampler has version=1"),
        (lambda state: {**state, "epoch": -1}, ValueError, "epoch must be at least 0 .*got -1"),
        (lambda state: {**state, "position": 1.0}, TypeError, "position: expected an int, got float"),
        (lambda state: {name: state[name] for name in state if name != "graph"}, ValueError, "no graph among"),
    ],
)
def test_a_broken_state_is_refused(change: Any, error: type[Exception], text: str) -> None:
    one = build()
    list(itertools.islice(one, 2))
    state = one.state_dict()
    with pytest.raises(error, match=text):
        one.load_state_dict(change(state))
    assert one.state_dict() == state


def test_copies_go_on_by_themselves() -> None:
    matcher = QAConv(4, 2, 2, num_classes=N, k_nearest=3)
    one = build(neighbors=matcher.compute_class_neighbors)
    batches = iter(one)
    given = [next(batches) for _ in range(3)]
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied.sampler is copied
        assert copied.state_dict() == one.state_dict()
        copied.load_state_dict(copied.state_dict())
        rest = list(copied)
        copied.set_epoch(0)
        assert list(copied) == given + rest
    assert list(batches) == rest


def test_no_global_random_number_is_drawn() -> None:
    one = build(neighbors=torch.zeros(N, 2, dtype=torch.int64))  # random classes fill up
    before = torch.get_rng_state()
    list(one)
    one.load_state_dict({**one.state_dict(), "position": 4})
    list(one)
    assert torch.equal(torch.get_rng_state(), before)


# --- data loaders -----------------------------------------------------------------------------------------------------


def loader_of(one: GraphSampler, kind: Any = DataLoader, **options: Any) -> Any:
    if options.get("num_workers"):
        options["multiprocessing_context"] = "fork"
    return kind(TensorDataset(torch.arange(len(LABELS))), batch_sampler=one, **options)


@few_processors
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_counted_at_a_loader_go_on(num_workers: int) -> None:
    """The recipe for a `DataLoader` with workers, whose sampler is ahead."""
    expected = epochs_of(2, num_replicas=2, rank=1)
    first = build(num_replicas=2, rank=1)
    start = first.state_dict()
    for step, (samples,) in enumerate(loader_of(first, num_workers=num_workers), start=1):
        assert samples.tolist() == expected[0][step - 1]
        if step == 2:
            break
    state = {**start, "position": start["position"] + step * first.num_replicas}
    second = build(num_replicas=2, rank=1)
    second.load_state_dict(state)
    loader = loader_of(second, num_workers=num_workers)
    rest = [samples.tolist() for _ in range(2) for (samples,) in loader]
    assert rest == expected[0][2:] + expected[1]


@few_processors
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [0, 2, N, N + 3])
def test_a_stateful_loader_goes_on(num_workers: int, step: int) -> None:
    """`step` batches are returned, in one epoch or two; the loader's state is the sampler's, however far that is."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    expected = list(itertools.chain(*epochs_of(3)))
    first = loader_of(build(), stateful.StatefulDataLoader, num_workers=num_workers)
    given = []
    while len(given) < step:
        for (samples,) in first:
            given.append(samples.tolist())
            if len(given) == step:
                break
    assert given == expected[:step]
    state = first.state_dict()
    second = loader_of(build(), stateful.StatefulDataLoader, num_workers=num_workers)
    second.load_state_dict(state)
    epochs = 3 - step // N
    if step == N:  # the first epoch was not seen to end: what is left of it is empty
        epochs += 1
    rest = [samples.tolist() for _ in range(epochs) for (samples,) in second]
    assert rest == expected[step:]


@few_processors
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_goes_on_after_an_epoch(num_workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    first = loader_of(build(), stateful.StatefulDataLoader, num_workers=num_workers)
    list(first)
    second = loader_of(build(), stateful.StatefulDataLoader, num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert [samples.tolist() for _ in range(2) for (samples,) in second] == list(itertools.chain(*epochs_of(3)[1:]))
