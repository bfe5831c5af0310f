"""Graph-sampled batches: a class together with the classes nearest to it (QAConv-GS, arXiv:2104.01546).

A random batch of many identities holds few pairs that are hard to tell apart. Here every class is the anchor
of one batch per epoch, and the classes nearest to it, by a neighbour graph the caller brings, fill the rest
of the batch. The sampler deals in class ids and sample indices only: it owns neither a model nor the data.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .validation import check_count

if TYPE_CHECKING:
    import numpy as np


class GraphSampler(Sampler[list[int]]):
    """Yield one batch per class: the class and its nearest classes, `num_instances` samples each.

    Pass it as `batch_sampler=` to a `DataLoader`. In an epoch each class that has samples is the anchor once,
    in shuffled order. A batch lists the anchor's samples first, then those of the nearest classes, nearest
    first; classes without samples are skipped, and where the graph does not name enough others, random
    classes fill the batch.

    The samples of a class are walked in shuffled order, and shuffled again once all were used. A batch
    repeats a sample only where its class has fewer than `num_instances`. The walk begins anew every epoch, so
    that an epoch depends on `seed`, its number and the graph alone.

    An epoch starts when its first batch is asked for: only then is it counted, and the graph taken. An iterator
    that is never asked costs nothing, so a `DataLoader` gives the same batches with any number of workers
    (with workers it makes two iterators and uses one). Iterators do not affect each other.

    Args:
        labels: int `[M]`, the class of every sample of the dataset; a tensor, a list or an array.
        neighbors: int `[N, K]`, the classes nearest to each class, nearest first; or a function without
            arguments that returns such a tensor, called once an epoch, before its first batch (for a graph that
            is computed anew, such as `matcher.compute_class_neighbors`).
        batch_size: samples in a batch, a multiple of `num_instances`.
        num_instances: samples of each class in a batch.
        seed: of the random order; every epoch of every seed has its own. Processes that train together take
            different ones.

    Raises:
        TypeError: labels or neighbours that are not integers or not dense tensors; sizes or a seed that are
            not integers.
        ValueError: labels that are empty, not 1-D, negative or not below N; a batch size that is not a
            multiple of `num_instances` or has room for one class only; fewer classes with samples than a
            batch needs; neighbours of another shape, with K below the other classes of a batch, or with ids
            outside `[0, N)`. What a function returns is checked when an epoch starts; an epoch that is refused
            is not counted.

    Example:
        >>> labels = [0, 0, 0, 1, 1, 2, 2, 3, 3]
        >>> neighbors = torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]])
        >>> sampler = GraphSampler(labels, neighbors, batch_size=4, num_instances=2, seed=0)
        >>> len(sampler)
        4
        >>> sorted([labels[sample] for sample in batch] for batch in sampler)
        [[0, 0, 1, 1], [1, 1, 0, 0], [2, 2, 3, 3], [3, 3, 2, 2]]

    Reference: Liao & Shao, "Graph Sampling Based Deep Metric Learning for Generalizable Person
    Re-Identification", arXiv:2104.01546.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int] | np.ndarray[Any, Any],
        neighbors: Tensor | Callable[[], Tensor],
        batch_size: SupportsIndex = 64,
        num_instances: SupportsIndex = 4,
        *,
        seed: SupportsIndex = 0,
    ) -> None:
        super().__init__()
        what = "samples of each class in a batch"
        self.num_instances = check_count(num_instances, "num_instances", low=1, high=None, why=what)
        two_classes = f"two classes of num_instances={self.num_instances}"
        size = check_count(batch_size, "batch_size", low=2 * self.num_instances, high=None, why=two_classes)
        if size % self.num_instances:
            raise ValueError(f"batch_size={size} is not a multiple of num_instances={self.num_instances}")
        self.classes_per_batch = size // self.num_instances
        try:
            self.seed = operator.index(seed)
        except TypeError:
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}") from None
        self.epoch = 0

        sorted_labels, self._samples = _label_tensor(labels).sort(stable=True)
        self._classes, self._counts = torch.unique_consecutive(sorted_labels, return_counts=True)
        if len(self._classes) < self.classes_per_batch:
            raise ValueError(
                f"batch_size={size} with num_instances={self.num_instances} needs {self.classes_per_batch} "
                f"classes, but only {len(self._classes)} have samples"
            )
        self.neighbors = neighbors
        if not callable(neighbors):
            self._check_neighbors(neighbors)

    def __len__(self) -> int:
        """The number of batches in an epoch: that of the classes with samples."""
        return len(self._classes)

    def set_epoch(self, epoch: SupportsIndex) -> None:
        """Number the next epoch that starts `epoch`; without this, each one has the number after the last.

        Epochs that have started go on as they are.

        Args:
            epoch: its number, from 0.

        Raises:
            TypeError: not an integer.
            ValueError: negative.

        Example:
            >>> sampler = GraphSampler([0, 0, 1, 1], torch.tensor([[1], [0]]), batch_size=4, num_instances=2)
            >>> first = list(sampler)
            >>> sampler.set_epoch(0)
            >>> list(sampler) == first
            True
        """
        self.epoch = check_count(epoch, "epoch", low=0, high=None, why="epochs count from 0")

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of an epoch, lists of sample indices; it starts when the first is asked for.

        Raises:
            TypeError: a `neighbors` function that does not return an integer tensor.
            ValueError: neighbours that do not fit the labels or the batch.
        """
        neighbors = self.neighbors() if callable(self.neighbors) else self.neighbors
        self._check_neighbors(neighbors)
        epoch, self.epoch = self.epoch, self.epoch + 1
        yield from self._batches(neighbors.detach().cpu(), epoch)

    def _batches(self, neighbors: Tensor, epoch: int) -> Iterator[list[int]]:
        # A string is hashed whole, so that (seed, epoch) = (0, 1) and (1, 0) are unrelated.
        generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
        walk = _SampleWalk(self._samples, self._counts, generator)
        # A slot numbers the classes that have samples; -1 marks those that have none.
        slot_of_class = torch.full((len(neighbors),), -1, dtype=torch.int64, device="cpu")
        slot_of_class[self._classes] = torch.arange(len(self._classes), device="cpu")
        for anchor in torch.randperm(len(self._classes), generator=generator, device="cpu").tolist():
            nearest = slot_of_class[neighbors[self._classes[anchor]].long()].tolist()
            # A dict keeps the order and drops what comes twice.
            slots = [slot for slot in dict.fromkeys([anchor, *nearest]) if slot >= 0]
            while len(slots) < self.classes_per_batch:
                size = (self.classes_per_batch,)
                others = torch.randint(len(self._classes), size, generator=generator, device="cpu")
                slots = list(dict.fromkeys([*slots, *others.tolist()]))
            chosen = torch.tensor(slots[: self.classes_per_batch], dtype=torch.int64, device="cpu")
            yield walk.draw(chosen, self.num_instances)

    def _check_neighbors(self, neighbors: Tensor) -> None:
        if not isinstance(neighbors, Tensor):
            raise TypeError(f"neighbors: expected an integer tensor [N, K], got {type(neighbors).__name__}")
        _check_ids(neighbors, "neighbors")
        if neighbors.dim() != 2:
            raise ValueError(f"neighbors: expected shape [N, K], got {list(neighbors.shape)}")
        num_classes, num_neighbors = neighbors.shape
        if num_neighbors < self.classes_per_batch - 1:
            raise ValueError(
                f"neighbors: a batch of {self.classes_per_batch} classes needs K >= "
                f"{self.classes_per_batch - 1} neighbours of each class, got shape {list(neighbors.shape)}"
            )
        largest_label = int(self._classes[-1])
        if largest_label >= num_classes:
            raise ValueError(f"labels reach {largest_label}, but neighbors has {num_classes} classes (rows)")
        low, high = (int(bound) for bound in neighbors.long().aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"neighbors: expected class ids in [0, {num_classes}), got {low} to {high}")


class _SampleWalk:
    """Draws the samples of each class without replacement, by a Fisher-Yates shuffle in steps.

    Args:
        samples: int64 `[M]`, sample indices, those of a class side by side; copied.
        counts: int64 `[A]`, samples of each class, in that order.
        generator: the source of randomness.
    """

    def __init__(self, samples: Tensor, counts: Tensor, generator: torch.Generator) -> None:
        self.samples = samples.clone()
        self.counts = counts
        self.starts = counts.cumsum(0) - counts
        self.cursors = torch.zeros_like(counts)
        self.generator = generator

    def draw(self, slots: Tensor, num_instances: int) -> list[int]:
        """The next `num_instances` samples of every class in `slots` (distinct), class after class."""
        count, cursor = self.counts[slots], self.cursors[slots]
        start = self.starts[slots]
        size = (num_instances, len(slots))
        uniform = torch.rand(size, dtype=torch.float64, device="cpu", generator=self.generator)
        # Once a walk starts over, what this batch holds already stands last in its class, and is kept out.
        held_back = torch.zeros_like(count)
        drawn = []
        for step in range(num_instances):
            here = start + cursor
            pick = here + (uniform[step] * (count - cursor - held_back)).long()
            sample = self.samples[pick]
            self.samples[pick] = self.samples[here]
            self.samples[here] = sample
            drawn.append(sample)
            cursor = cursor + 1
            starts_over = cursor == count
            held_back = torch.where(starts_over & (count >= num_instances), step + 1, held_back)
            cursor = torch.where(starts_over, 0, cursor)
        self.cursors[slots] = cursor
        result: list[int] = torch.stack(drawn, dim=1).flatten().tolist()
        return result


def _check_ids(ids: Tensor, name: str) -> None:
    """Require integers that are stored one by one, and can be read.

    Raises:
        TypeError: another dtype, a sparse or nested tensor, one without values.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer dtype, got {ids.dtype}")
    if ids.is_nested or ids.layout != torch.strided or ids.is_meta:
        layout = "nested" if ids.is_nested else ids.layout
        raise TypeError(f"{name}: expected a dense tensor of values, got layout {layout} on {ids.device}")


def _label_tensor(labels: Tensor | Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """`labels` as int64 `[M]` on the CPU, after requiring them to be class ids."""
    try:
        tensor = torch.as_tensor(labels, device=None if isinstance(labels, Tensor) else "cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected integers, got {type(labels).__name__} ({error})") from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"labels: expected shape [M], M >= 1 samples, got {list(tensor.shape)}")
    _check_ids(tensor, "labels")
    tensor = tensor.cpu().long()
    if int(tensor.min()) < 0:
        raise ValueError(f"labels: expected class ids of 0 and above, got {int(tensor.min())}")
    return tensor
