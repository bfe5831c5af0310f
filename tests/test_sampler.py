"""The graph sampler: what a batch and an epoch hold, whatever the labels and the graph."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import torch_default
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import QAConv
from qaconv_triton.functional import class_neighbors
from qaconv_triton.sampler import GraphSampler


@dataclass
class Case:
    labels: list[int]
    neighbors: Tensor
    classes_per_batch: int
    num_instances: int
    seed: int

    def sampler(self) -> GraphSampler:
        return GraphSampler(
            self.labels,
            self.neighbors,
            self.classes_per_batch * self.num_instances,
            self.num_instances,
            seed=self.seed,
        )

    @property
    def samples_of(self) -> dict[int, list[int]]:
        samples = defaultdict(list)
        for sample, label in enumerate(self.labels):
            samples[label].append(sample)
        return dict(samples)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Graphs that are right (the class itself left out), with classes that have few samples or none."""
    num_classes = draw(st.integers(2, 8))
    counts = draw(st.lists(st.integers(0, 7), min_size=num_classes, max_size=num_classes))
    for n in draw(st.permutations(range(num_classes)))[:2]:
        counts[n] = max(counts[n], 1)
    classes_per_batch = draw(st.integers(2, sum(count > 0 for count in counts)))
    num_neighbors = draw(st.integers(classes_per_batch - 1, num_classes - 1))
    others = [[m for m in range(num_classes) if m != n] for n in range(num_classes)]
    neighbors = torch.tensor([draw(st.permutations(row))[:num_neighbors] for row in others])
    labels = draw(st.permutations([n for n, count in enumerate(counts) for _ in range(count)]))
    return Case(labels, neighbors, classes_per_batch, draw(st.integers(1, 4)), draw(st.integers(0, 2**40)))


every_case = settings(deadline=None, max_examples=100)


def classes_of(case: Case, batch: list[int]) -> list[int]:
    """The classes of a batch in order, after requiring `num_instances` samples of each, side by side."""
    labels = [case.labels[sample] for sample in batch]
    classes = labels[:: case.num_instances]
    assert labels == [n for n in classes for _ in range(case.num_instances)]
    return classes


@given(cases())
@every_case
def test_every_class_with_samples_is_the_anchor_once(case: Case) -> None:
    sampler = case.sampler()
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(case.samples_of)
    assert sorted(classes_of(case, batch)[0] for batch in batches) == sorted(case.samples_of)


@given(cases())
@every_case
def test_a_batch_is_the_anchor_and_its_nearest_classes_with_samples(case: Case) -> None:
    for batch in case.sampler():
        anchor, *rest = classes_of(case, batch)
        assert len({anchor, *rest}) == case.classes_per_batch
        nearest = [n for n in case.neighbors[anchor].tolist() if n in case.samples_of]
        wanted = nearest[: case.classes_per_batch - 1]
        assert rest[: len(wanted)] == wanted
        assert set(rest) <= case.samples_of.keys()


@given(cases())
@every_case
def test_samples_are_drawn_without_replacement(case: Case) -> None:
    drawn = defaultdict(list)
    for batch in case.sampler():
        for sample in batch:
            drawn[case.labels[sample]].append(sample)
        for label, count in Counter(case.labels).items():
            mine = [sample for sample in batch if case.labels[sample] == label]
            assert count < case.num_instances or len(set(mine)) == len(mine)
    for label, samples in case.samples_of.items():
        order = drawn[label]
        for start in range(0, len(order), len(samples)):
            one_pass = order[start : start + len(samples)]
            assert len(set(one_pass)) == len(one_pass)
            assert set(one_pass) <= set(samples)


@given(cases())
@every_case
def test_an_epoch_depends_on_the_seed_its_number_and_the_graph_alone(case: Case) -> None:
    sampler = case.sampler()
    epochs = [list(sampler) for _ in range(3)]
    other = case.sampler()
    other.set_epoch(2)
    assert list(other) == epochs[2]
    other.set_epoch(0)
    assert [list(other), list(other)] == epochs[:2]


def ring(num_classes: int, num_neighbors: int) -> Tensor:
    """Class n is nearest to n + 1, n + 2, ..."""
    return (torch.arange(num_classes)[:, None] + torch.arange(1, num_neighbors + 1)) % num_classes


def test_epochs_and_seeds_differ() -> None:
    labels = torch.arange(20).repeat(6)
    epochs = []
    for seed in range(3):
        sampler = GraphSampler(labels, ring(20, 5), 12, 3, seed=seed)
        epochs += [list(sampler) for _ in range(3)]
    for one, another in itertools.combinations(epochs, 2):
        assert [batch[0] for batch in one] != [batch[0] for batch in another]
        assert sorted(one) != sorted(another)


def test_the_order_of_samples_is_a_fair_shuffle() -> None:
    # Class 0 has 3 samples and comes twice an epoch with 3 of them: two passes.
    sampler = GraphSampler([0, 0, 0, 1], ring(2, 1), 6, 3)
    orders: Counter[tuple[int, ...]] = Counter()
    anchors: Counter[int] = Counter()
    epochs = 600
    for _ in range(epochs):
        batches = list(sampler)
        anchors[batches[0][0] == 3] += 1
        orders.update(tuple(sample for sample in batch if sample < 3) for batch in batches)
    for share, counter, draws in ((1 / 6, orders, 2 * epochs), (1 / 2, anchors, epochs)):
        assert len(counter) == round(1 / share)
        deviation = math.sqrt(draws * share * (1 - share))
        assert all(abs(count - draws * share) < 5 * deviation for count in counter.values())


def test_a_new_pass_does_not_repeat_samples_within_the_batch() -> None:
    # 5 samples, 4 a batch: three of the four batches cross the end of a pass.
    labels = [n for n in range(4) for _ in range(5)]
    sampler = GraphSampler(labels, ring(4, 3), 16, 4)
    for _ in range(50):
        batches = list(sampler)
        assert all(len(set(batch)) == 16 for batch in batches)
        assert set(Counter(itertools.chain(*batches)).values()) <= {3, 4}


def test_random_classes_fill_what_the_graph_leaves_open() -> None:
    # The one neighbour of classes 0 to 5, class 6, has no samples.
    neighbors = torch.full((7, 1), 6)
    sampler = GraphSampler(torch.arange(6).repeat_interleave(2), neighbors, 4, 2)
    partners = defaultdict(set)
    for _ in range(60):
        for batch in sampler:
            anchor, partner = batch[0] // 2, batch[2] // 2
            partners[anchor].add(partner)
    assert partners == {n: set(range(6)) - {n} for n in range(6)}


def test_a_graph_that_names_a_class_twice_or_the_class_itself_still_gives_distinct_classes() -> None:
    neighbors = torch.tensor([[0, 1, 1, 2], [1, 1, 2, 0], [2, 0, 0, 1]])
    labels = [0, 1, 2]
    sampler = GraphSampler(labels, neighbors, 3, 1)
    assert sorted(sampler) == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_a_function_is_called_at_the_start_of_every_epoch() -> None:
    graphs = [ring(6, 2), ring(6, 2).flip(1)]
    calls: list[int] = []

    def neighbors() -> Tensor:
        calls.append(len(calls))
        return graphs[calls[-1] % 2]

    sampler = GraphSampler(torch.arange(6).repeat_interleave(2), neighbors, 4, 2)
    assert not calls
    for epoch in range(4):
        batches = iter(sampler)
        assert len(calls) == epoch
        for batch in batches:
            assert len(calls) == epoch + 1
            anchor, nearest = batch[0] // 2, batch[2] // 2
            assert nearest == (anchor + 1 + epoch % 2) % 6


def test_the_matchers_graph_is_computed_for_every_epoch() -> None:
    matcher = QAConv(4, 2, 2, num_classes=6, k_nearest=2)
    sampler = GraphSampler(torch.arange(6).repeat_interleave(2), matcher.compute_class_neighbors, 6, 2)
    assert matcher.class_embed is not None
    for _ in range(2):
        matcher.reset_parameters()
        for batch in sampler:
            anchor, *nearest = (sample // 2 for sample in batch[::2])
            assert nearest == class_neighbors(matcher.class_embed, 2)[anchor].tolist()


def test_a_function_that_returns_a_bad_graph_is_refused_at_the_start_of_the_epoch() -> None:
    answers: list[Any] = [ring(3, 2), ring(3, 2).float(), None, ring(2, 1), ring(3, 2) + 1]
    sampler = GraphSampler([0, 1, 2], lambda: answers.pop(0), 3, 1)
    assert len(list(sampler)) == 3
    for error, text in ((TypeError, "float32"), (TypeError, "NoneType"), (ValueError, "K >= 2"), (ValueError, "3")):
        with pytest.raises(error, match=text):
            next(iter(sampler))
        assert sampler.epoch == 1


def test_nothing_happens_until_the_first_batch_is_asked_for() -> None:
    calls: list[int] = []

    def neighbors() -> Tensor:
        calls.append(1)
        return ring(6, 2)

    labels = torch.arange(6).repeat_interleave(5)
    sampler, alone = (GraphSampler(labels, graph, 6, 2) for graph in (neighbors, ring(6, 2)))
    discarded = [iter(sampler) for _ in range(3)]
    assert not calls
    assert sampler.epoch == 0
    assert list(sampler) == list(alone)
    del discarded
    assert sampler.epoch == len(calls) == 1
    assert list(sampler) == list(alone)


def test_an_epoch_that_is_abandoned_counts_and_changes_no_other() -> None:
    labels = torch.arange(6).repeat_interleave(5)
    sampler, alone = (GraphSampler(labels, ring(6, 3), 8, 2) for _ in range(2))
    epochs = [list(alone) for _ in range(6)]
    abandoned = iter(sampler)
    assert next(abandoned) == epochs[0][0]
    assert list(sampler) == epochs[1]
    waiting = iter(sampler)
    sampler.set_epoch(4)
    assert list(abandoned) == epochs[0][1:]
    assert next(waiting) == epochs[4][0]
    assert list(sampler) == epochs[5]
    assert len(sampler) == len(alone) == 6


def test_iterators_are_independent() -> None:
    labels = torch.arange(6).repeat_interleave(5)
    sampler, alone = (GraphSampler(labels, ring(6, 3), 8, 2) for _ in range(2))
    first, second = iter(sampler), iter(sampler)
    interleaved = list(zip(first, second, strict=True))
    assert [batch for batch, _ in interleaved] == list(alone)
    assert [batch for _, batch in interleaved] == list(alone)


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([0, 4, 0, 2, 4, 2], torch.int64),
        ((0, 4, 0, 2, 4, 2), torch.int32),
        (np.array([0, 4, 0, 2, 4, 2]), torch.uint8),
        (np.array([0, 4, 0, 2, 4, 2], dtype=np.uint8), torch.uint16),
        (torch.tensor([0, 4, 0, 2, 4, 2], dtype=torch.int32), torch.int64),
    ],
    ids=["list", "tuple", "int64 array", "uint8 array", "int32 tensor"],
)
def test_labels_and_neighbors_of_any_integer_type(labels: Any, dtype: torch.dtype) -> None:
    sampler = GraphSampler(labels, ring(5, 4).to(dtype), 4, 2)
    expected = GraphSampler(torch.tensor([0, 4, 0, 2, 4, 2]), ring(5, 4), 4, 2)
    batches = list(sampler)
    assert batches == list(expected)
    assert all(type(sample) is int for batch in batches for sample in batch)


def assert_loader_gives_the_samplers_epochs(**options: Any) -> None:
    """With whatever workers: the graph once an epoch, epochs 0, 1, 2, and then the one that is set."""
    labels = torch.arange(6).repeat_interleave(3)
    graphs: list[Tensor] = []

    def neighbors() -> Tensor:
        graphs.append(ring(6, 2).roll(len(graphs), dims=1))
        return graphs[-1]

    sampler = GraphSampler(labels, neighbors, 6, 2)
    loader = DataLoader(TensorDataset(torch.arange(18), labels), batch_sampler=sampler, **options)
    for built, epoch in enumerate((0, 1, 2, 7, 8)):
        if epoch == 7:
            sampler.set_epoch(epoch)
        assert len(loader) == 6
        batches = [samples.tolist() for samples, _ in loader]
        assert len(graphs) == built + 1
        expected = GraphSampler(labels, graphs[-1], 6, 2)
        expected.set_epoch(epoch)
        assert batches == list(expected)
        assert sampler.epoch == epoch + 1


few_processors = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@few_processors
@pytest.mark.parametrize(("num_workers", "persistent_workers"), [(0, False), (1, False), (2, True)])
def test_a_loader_builds_the_graph_once_an_epoch(num_workers: int, persistent_workers: bool) -> None:
    options = {"persistent_workers": persistent_workers, "multiprocessing_context": "fork"} if num_workers else {}
    assert_loader_gives_the_samplers_epochs(num_workers=num_workers, **options)


@pytest.mark.slow
@few_processors
def test_a_loader_builds_the_graph_once_an_epoch_with_spawned_workers() -> None:
    assert_loader_gives_the_samplers_epochs(num_workers=2, multiprocessing_context="spawn", persistent_workers=True)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_batches_do_not_depend_on_the_default_dtype_or_device(default: torch.dtype | str) -> None:
    # Classes 4 and 5 have too few neighbours with samples: random classes fill up.
    labels = [n for n in range(6) for _ in range(3) if n != 0]
    neighbors = ring(6, 2)
    labels_tensor = torch.tensor(labels)
    expected = list(GraphSampler(labels, neighbors, 9, 3))
    with torch_default(default):
        batches = list(GraphSampler(labels, neighbors, 9, 3))
        assert batches == list(GraphSampler(labels_tensor, neighbors, 9, 3))
    assert batches == expected


class Size:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("number", [np.int64, np.uint8, Size])
def test_sizes_and_numbers_are_anything_with_an_index(number: Any) -> None:
    labels = torch.arange(100).repeat_interleave(70)
    expected = GraphSampler(labels, ring(100, 3), 240, 80, seed=5)
    expected.set_epoch(3)
    sampler = GraphSampler(labels, ring(100, 3), number(240), number(80), seed=number(5))
    sampler.set_epoch(number(3))
    assert next(iter(sampler)) == next(iter(expected))


GOOD: dict[str, Any] = {"labels": [0, 0, 1, 2], "neighbors": ring(3, 2), "batch_size": 4, "num_instances": 2}


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"batch_size": 5}, ValueError, "batch_size=5 is not a multiple of num_instances=2"),
        ({"batch_size": 2}, ValueError, "batch_size must be at least 4 .*got 2"),
        ({"batch_size": 4.0}, TypeError, "float"),
        ({"batch_size": 8}, ValueError, "needs 4 classes, but only 3"),
        ({"batch_size": 6, "neighbors": ring(3, 1)}, ValueError, r"K >= 2 .*\[3, 1\]"),
        ({"num_instances": 0}, ValueError, "num_instances must be at least 1 .*got 0"),
        ({"seed": "1"}, TypeError, "str"),
        ({"labels": []}, ValueError, r"\[0\]"),
        ({"labels": [[0, 1], [2, 0]]}, ValueError, r"\[2, 2\]"),
        ({"labels": [0, -3, 1]}, ValueError, "-3"),
        ({"labels": [0, 1, 3]}, ValueError, "reach 3, but neighbors has 3 classes"),
        ({"labels": [0.0, 1.0]}, TypeError, "float32"),
        ({"labels": [True, False]}, TypeError, "bool"),
        ({"labels": ["a", "b"]}, TypeError, "list"),
        ({"labels": None}, TypeError, "NoneType"),
        ({"labels": torch.zeros(4, dtype=torch.int64).to_sparse()}, TypeError, "labels: .*sparse_coo"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, TypeError, "labels: .*meta"),
        ({"neighbors": ring(3, 2).to_sparse()}, TypeError, "neighbors: .*sparse_coo"),
        ({"neighbors": ring(3, 2).to("meta")}, TypeError, "neighbors: .*meta"),
        (
            {"neighbors": torch.nested.nested_tensor([[1], [0]], dtype=torch.int64, layout=torch.jagged)},
            TypeError,
            "neighbors: .*nested",
        ),
        ({"num_instances": True}, TypeError, "bool"),
        ({"seed": 1.0}, TypeError, "float"),
        ({"neighbors": ring(3, 2).tolist()}, TypeError, "list"),
        ({"neighbors": ring(3, 2).double()}, TypeError, "float64"),
        ({"neighbors": torch.arange(3)}, ValueError, r"\[3\]"),
        ({"neighbors": ring(3, 2) + 1}, ValueError, r"\[0, 3\), got 1 to 3"),
        ({"neighbors": ring(3, 2) - 1}, ValueError, r"\[0, 3\), got -1 to 1"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    GraphSampler(**GOOD)
    with pytest.raises(error, match=text):
        GraphSampler(**{**GOOD, **changed})


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.0, TypeError)])
def test_a_bad_epoch_is_refused(epoch: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        GraphSampler(**GOOD).set_epoch(epoch)
