"""Graph-sampled batches: a class together with the classes nearest to it (QAConv-GS, arXiv:2104.01546).

A random batch of many identities holds few pairs that are hard to tell apart. Here every class is the anchor
of one batch per epoch, and the classes nearest to it, by a neighbour graph the caller brings, fill the rest
of the batch. The sampler deals in class ids and sample indices only: it owns neither a model nor the data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .checks import check_count

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

    Args:
        labels: int `[M]`, the class of every sample of the dataset; a tensor, a list or an array.
        neighbors: int `[N, K]`, the classes nearest to each class, nearest first; or a function without
            arguments that returns such a tensor, called at the start of every epoch (for a graph that is
            computed anew, such as `matcher.compute_class_neighbors`).
        batch_size: samples in a batch, a multiple of `num_instances`.
        num_instances: samples of each class in a batch.
        seed: of the random order; every epoch of every seed has its own. Processes that train together take
            different ones.

    Raises:
        TypeError: labels or neighbours that are not integers, or counts that are not ints.
        ValueError: labels that are empty, not 1-D, negative or not below N; a batch size that is not a
            multiple of `num_instances` or has room for one class only; fewer classes with samples than a
            batch needs; neighbours of another shape, with K below the other classes of a batch, or with ids
            outside `[0, N)`. What a function returns is checked when an epoch starts.

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
        batch_size: int = 64,
        num_instances: int = 4,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count(num_instances, "num_instances", low=1, high=None, why="samples of each class in a batch")
        two_classes = f"two classes of num_instances={num_instances}"
        check_count(batch_size, "batch_size", low=2 * num_instances, high=None, why=two_classes)
        if batch_size % num_instances:
            raise ValueError(f"batch_size={batch_size} is not a multiple of num_instances={num_instances}")
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        self.num_instances = num_instances
        self.classes_per_batch = batch_size // num_instances
        self.seed = seed
        self.epoch = 0

        sorted_labels, self._samples = _label_tensor(labels).sort(stable=True)
        self._classes, self._counts = torch.unique_consecutive(sorted_labels, return_counts=True)
        if len(self._classes) < self.classes_per_batch:
            raise ValueError(
                f"batch_size={batch_size} with num_instances={num_instances} needs {self.classes_per_batch} "
                f"classes, but only {len(self._classes)} have samples"
            )
        self.neighbors = neighbors
        if not callable(neighbors):
            self._check_neighbors(neighbors)

    def __len__(self) -> int:
        """The number of batches in an epoch: that of the classes with samples."""
        return len(self._classes)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch number `epoch`; without this, each iteration is the next epoch.

        Args:
            epoch: its number, from 0.

        Raises:
            TypeError: not an int.
            ValueError: negative.

        Example:
            >>> sampler = GraphSampler([0, 0, 1, 1], torch.tensor([[1], [0]]), batch_size=4, num_instances=2)
            >>> first = list(sampler)
            >>> sampler.set_epoch(0)
            >>> list(sampler) == first
            True
        """
        check_count(epoch, "epoch", low=0, high=None, why="epochs count from 0")
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Start an epoch: take the graph as it is now, and return the batches, lists of sample indices.

        Raises:
            TypeError: a `neighbors` function that does not return an integer tensor.
            ValueError: neighbours that do not fit the labels or the batch.
        """
        neighbors = self.neighbors() if callable(self.neighbors) else self.neighbors
        self._check_neighbors(neighbors)
        # A string is hashed whole, so that (seed, epoch) = (0, 1) and (1, 0) are unrelated.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
        self.epoch += 1
        return self._batches(neighbors.detach().cpu(), generator)

    def _batches(self, neighbors: Tensor, generator: torch.Generator) -> Iterator[list[int]]:
        walk = _SampleWalk(self._samples, self._counts, generator)
        # A slot numbers the classes that have samples; -1 marks those that have none.
        slot_of_class = torch.full((len(neighbors),), -1)
        slot_of_class[self._classes] = torch.arange(len(self._classes))
        for anchor in torch.randperm(len(self._classes), generator=generator).tolist():
            nearest = slot_of_class[neighbors[self._classes[anchor]].long()].tolist()
            # A dict keeps the order and drops what comes twice.
            slots = [slot for slot in dict.fromkeys([anchor, *nearest]) if slot >= 0]
            while len(slots) < self.classes_per_batch:
                others = torch.randint(len(self), (self.classes_per_batch,), generator=generator)
                slots = list(dict.fromkeys([*slots, *others.tolist()]))
            yield walk.draw(torch.tensor(slots[: self.classes_per_batch]), self.num_instances)

    def _check_neighbors(self, neighbors: Tensor) -> None:
        if not isinstance(neighbors, Tensor):
            raise TypeError(f"neighbors: expected an integer tensor [N, K], got {type(neighbors).__name__}")
        if not _is_integer(neighbors):
            raise TypeError(f"neighbors: expected an integer dtype, got {neighbors.dtype}")
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
        low, high = (int(bound) for bound in neighbors.aminmax())
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
        uniform = torch.rand(num_instances, len(slots), dtype=torch.float64, generator=self.generator)
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


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _label_tensor(labels: Tensor | Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """`labels` as int64 `[M]` on the CPU, after requiring them to be class ids."""
    try:
        tensor = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected integers, got {type(labels).__name__} ({error})") from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"labels: expected shape [M], M >= 1 samples, got {list(tensor.shape)}")
    if not _is_integer(tensor):
        raise TypeError(f"labels: expected an integer dtype, got {tensor.dtype}")
    tensor = tensor.long()
    if int(tensor.min()) < 0:
        raise ValueError(f"labels: expected class ids of 0 and above, got {int(tensor.min())}")
    return tensor
