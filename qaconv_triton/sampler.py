"""Graph-sampled batches: a class together with the classes nearest to it (QAConv-GS, arXiv:2104.01546).

A random batch of many identities holds few pairs that are hard to tell apart. Here every class is the anchor
of one batch per epoch, and the classes nearest to it, by a neighbour graph the caller brings, fill the rest
of the batch. The sampler deals in class ids and sample indices only: it owns neither a model nor the data.

An epoch is one order of batches, the same on every rank, of which each rank takes its part. Every rank draws all of it,
block by block: what a batch holds depends on the batches before it, whichever rank they went to.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import random
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeGuard

import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from . import sharded
from .distributed import Agreement, local_rows, whole
from .validation import check_count

if TYPE_CHECKING:
    import numpy as np
    from torch.distributed.tensor import DTensor

BLOCK = 1024  # batches that are drawn at a time
STATE_VERSION = 1  # of a state; to be raised where the same seed gives other batches
HASHED_ROWS = 64  # of a graph, to tell it from another


@dataclass
class _Progress:
    """Where an epoch is: `position` batches of all ranks are behind it; `graph` is the checksum of its neighbours."""

    epoch: int
    position: int
    graph: str | None


class GraphSampler(Sampler[list[int]]):
    """Yield one batch per class: the class and its nearest classes, `num_instances` samples each.

    Pass it as `batch_sampler=` to a `DataLoader`. In an epoch each class that has samples is the anchor once,
    in shuffled order. A batch lists the anchor's samples first, then those of the nearest classes, nearest
    first; classes without samples are skipped, and where the graph does not name enough others, random
    classes fill the batch.

    The samples of a class are walked in shuffled order, and shuffled again once all were used. A batch
    repeats a sample only where its class has fewer than `num_instances`. The walk begins anew every epoch, so
    that an epoch depends on `seed`, its number and the graph alone.

    Of several ranks each takes every `num_replicas`-th batch of that order, from its own rank on. All yield `len()`
    batches: where the number of classes is no multiple of the number of ranks, or `batches_per_epoch` asks for more,
    the order goes on with the classes shuffled anew. Every rank needs the same graph and the same seed.

    An epoch starts when its first batch is asked for: only then is it counted, and the graph taken. An iterator
    that is never asked costs nothing, so a `DataLoader` gives the same batches with any number of workers
    (with workers it makes two iterators and uses one). Iterators do not affect each other.

    Args:
        labels: int `[M]`, the class of every sample of the dataset; a tensor, a list or an array.
        neighbors: int `[N, K]`, the classes nearest to each class, nearest first; or a function without
            arguments that returns such a tensor, called once an epoch, before its first batch (for a graph that
            is computed anew, such as `matcher.compute_class_neighbors`). Of one that is sharded over a mesh all ranks
            gather what batches need, on the CPU.
        batch_size: samples in a batch of one rank, a multiple of `num_instances`.
        num_instances: samples of each class in a batch.
        seed: of the random order; every epoch of every seed has its own. The same on every rank.
        batches_per_epoch: batches of each rank in an epoch, fewer or more than there are classes for; where None, as
            many as let each class be the anchor: the number of classes with samples by that of ranks, rounded up.
        num_replicas: the number of ranks; that of `torch.distributed` where None, if it is initialised when the
            sampler is used, else 1.
        rank: of this process; likewise, else 0.

    Raises:
        TypeError: labels or neighbours that are not integers or not dense tensors; sizes or a seed that are
            not integers.
        ValueError: labels that are empty, not 1-D, negative or not below N; a batch size that is not a
            multiple of `num_instances` or has room for one class only; fewer classes with samples than a
            batch needs; neighbours of another shape, with K below the other classes of a batch, or with ids
            outside `[0, N)`; a rank that is not below `num_replicas`. What a function returns is checked when an epoch
            starts; an epoch that is refused is not counted.
        RuntimeError: another rank of the mesh has such neighbours.

    Examples:
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
        batches_per_epoch: SupportsIndex | None = None,
        num_replicas: SupportsIndex | None = None,
        rank: SupportsIndex | None = None,
    ) -> None:
        super().__init__()
        what = "samples of each class in a batch"
        self.num_instances = check_count(num_instances, "num_instances", low=1, high=None, why=what)
        two_classes = f"two classes of num_instances={self.num_instances}"
        self.batch_size = check_count(batch_size, "batch_size", low=2 * self.num_instances, high=None, why=two_classes)
        if self.batch_size % self.num_instances:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of num_instances={self.num_instances}")
        self.classes_per_batch = self.batch_size // self.num_instances
        try:
            self.seed = operator.index(seed)
        except TypeError:
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}") from None
        self.batches_per_epoch, self._num_replicas, self._rank = (
            None if value is None else check_count(value, name, low=low, high=None, why=why)
            for value, name, low, why in (
                (batches_per_epoch, "batches_per_epoch", 1, "batches of each rank"),
                (num_replicas, "num_replicas", 1, "the number of ranks"),
                (rank, "rank", 0, "ranks count from 0"),
            )
        )
        self._placement()
        self.epoch = 0
        self._resumed: _Progress | None = None  # loaded, and not begun
        self._progress: _Progress | None = None  # of the iterator that gave a batch last

        sorted_labels, self._samples = class_labels(labels).sort(stable=True)
        self._classes, self._counts = torch.unique_consecutive(sorted_labels, return_counts=True)
        self._labels_checksum: str | None = None
        if len(self._classes) < self.classes_per_batch:
            raise ValueError(
                f"batch_size={self.batch_size} with num_instances={self.num_instances} needs {self.classes_per_batch} "
                f"classes, but only {len(self._classes)} have samples"
            )
        self.neighbors = neighbors
        if not callable(neighbors):
            self._check_neighbors(neighbors)

    @property
    def sampler(self) -> GraphSampler:
        """The sampler itself, for trainers that call `batch_sampler.sampler.set_epoch`, as Lightning does."""
        return self

    @property
    def num_replicas(self) -> int:
        """The number of ranks."""
        return self._placement()[0]

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._placement()[1]

    def __len__(self) -> int:
        """The number of batches of each rank in an epoch; of one that goes on after `load_state_dict`, in all of it."""
        return self.batches_per_epoch or -(-len(self._classes) // self.num_replicas)

    def set_epoch(self, epoch: SupportsIndex) -> None:
        """Number the next epoch that starts `epoch`; without this, each one has the number after the last.

        Epochs that have started go on as they are. An epoch that `load_state_dict` has left at a batch goes on from
        there if this is its number, and is forgotten otherwise.

        Args:
            epoch: its number, from 0.

        Raises:
            TypeError: not an integer.
            ValueError: negative.

        Examples:
            >>> sampler = GraphSampler([0, 0, 1, 1], torch.tensor([[1], [0]]), batch_size=4, num_instances=2)
            >>> first = list(sampler)
            >>> sampler.set_epoch(0)
            >>> list(sampler) == first
            True
        """
        self.epoch = check_count(epoch, "epoch", low=0, high=None, why="epochs count from 0")
        if self._resumed is not None and self._resumed.epoch != self.epoch:
            self._resumed = None
        self._progress = None

    def state_dict(self) -> dict[str, Any]:
        """Return where the sampler is, as numbers and strings that JSON takes; the same on every rank.

        The state is that after the batch given last: `load_state_dict` goes on with the next. Where an epoch has ended
        it is the start of the next; an epoch that was left early goes on, unless `set_epoch` or another iterator has
        started one since. Neither the graph nor the state of a `neighbors` function is in it: save the graph too.

        A `DataLoader` with workers asks for batches long before it returns them. Save its state where
        `torchdata.stateful_dataloader.StatefulDataLoader` takes its place, which keeps the state of each batch until
        that is returned; or count the batches that were returned, as in the second example.

        Returns:
            `epoch`, its number; `position`, how many of its batches were given, on all ranks together; and what
            `load_state_dict` compares: `seed`, `batch_size`, `num_instances`, and checksums of labels and graph.

        Examples:
            >>> graph = torch.tensor([[1], [2], [0]])
            >>> sampler = GraphSampler([0, 0, 1, 1, 2, 2], graph, batch_size=4, num_instances=2)
            >>> batches = iter(sampler)
            >>> first, state = next(batches), sampler.state_dict()
            >>> sampler.load_state_dict(state)
            >>> list(sampler) == list(batches)
            True

            >>> start = sampler.state_dict()  # before an epoch, or the rest of one
            >>> for step, batch in enumerate(sampler, start=1):  # over a DataLoader with workers
            ...     state = {**start, "position": start["position"] + step * sampler.num_replicas}
        """
        progress = self._resumed or self._progress or _Progress(self.epoch, 0, None)
        return {
            "version": STATE_VERSION,
            "epoch": progress.epoch,
            "position": progress.position,
            **self._identity(),
            "graph": progress.graph,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved: the next epoch that starts is the state's, and begins at the next batch.

        The batches are those that would have followed, if `neighbors` is the graph that the epoch began with. The draws
        of the batches before are repeated, without data. The number of ranks may be another: what is left of the
        order is then dealt to these, and `len()` times their number is where the epoch ends.

        Args:
            state: as `state_dict` returns it, of any rank.

        Raises:
            TypeError: not a mapping, or with numbers that are none.
            ValueError: an entry is missing, or the state is of other labels, or another batch size, `num_instances` or
                seed; the sampler is then as before.

        Warns:
            UserWarning: when the first batch is asked for, if the graph is not the one that the epoch began with.

        Examples:
            >>> graph = torch.tensor([[1], [0]])
            >>> sampler = GraphSampler([0, 0, 1, 1], graph, batch_size=4, num_instances=2)
            >>> sampler.load_state_dict({**sampler.state_dict(), "epoch": 7})
            >>> sampler.epoch
            7
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, as of state_dict(), got {type(state).__name__}")
        identity = {"version": STATE_VERSION, **self._identity()}
        missing = [name for name in (*identity, "epoch", "position", "graph") if name not in state]
        if missing:
            raise ValueError(f"state: no {', '.join(missing)} among its entries {list(state)}")
        different = [name for name, value in identity.items() if state[name] != value]
        if different:
            saved, own = (", ".join(f"{name}={entries[name]!r}" for name in different) for entries in (state, identity))
            raise ValueError(f"state: saved with {saved}, but this sampler has {own}")
        epoch = check_count(state["epoch"], "epoch", low=0, high=None, why="epochs count from 0")
        position = check_count(state["position"], "position", low=0, high=None, why="batches that were given")
        self.epoch, self._progress = epoch, None
        self._resumed = _Progress(epoch, position, state["graph"])

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of an epoch, lists of sample indices; it starts when the first is asked for.

        Raises:
            TypeError: a `neighbors` function that does not return an integer tensor.
            ValueError: neighbours that do not fit the labels or the batch; a rank that is not below `num_replicas`.
        """
        num_replicas, rank = self._placement()
        start = 0 if self._resumed is None else self._resumed.position
        count = max(0, -(-(len(self) * num_replicas - start) // num_replicas))
        if count:
            neighbors = self.neighbors() if callable(self.neighbors) else self.neighbors
            neighbors = neighbors if _is_sharded(neighbors) else whole(neighbors)
            self._check_neighbors(neighbors)
        saved, self._resumed = self._resumed, None
        epoch, self.epoch = self.epoch, self.epoch + 1
        if not count:
            self._progress = None
            return
        progress = _Progress(epoch, start, _graph_checksum(neighbors))
        if saved is not None and saved.graph not in (None, progress.graph):
            warnings.warn(
                f"epoch {epoch} goes on with other neighbours than it began with, so its batches are not those of an "
                "uninterrupted epoch: save the class graph with the sampler's state, and return it from `neighbors`",
                stacklevel=2,
            )
        if _is_sharded(neighbors):
            neighbors = sharded.table.gathered_on_cpu(neighbors, self._nearest_classes, self.classes_per_batch - 1)
        order = self._draw_order(neighbors.detach().cpu(), epoch)
        for batch in itertools.islice(_every_nth(order, start + rank, num_replicas), count):
            progress.position += num_replicas
            self._progress = progress
            yield batch
        if self._progress is progress:
            self._progress = None

    def _nearest_classes(self, neighbors: Tensor, first: int) -> Tensor:
        """What batches take of `neighbors [n, K]` of the classes from `first` on: int64 `[n, L - 1]`.

        These are the first that differ and have samples; after the last the class itself, which no batch takes twice.
        """
        anchors = torch.arange(first, first + len(neighbors), device="cpu").unsqueeze(1)
        classes = torch.cat([anchors, neighbors.long()], dim=1)
        slots = torch.searchsorted(self._classes, classes).clamp_(max=len(self._classes) - 1)
        slots = torch.where(self._classes.take(slots) == classes, slots, -1)
        nearest = _distinct(slots, self.classes_per_batch)[:, 1:]
        return torch.where(nearest < 0, anchors, self._classes.take(nearest.clamp(min=0)))

    def _draw_order(self, neighbors: Tensor, epoch: int) -> Iterator[Tensor]:
        """Yield the batches of all ranks, without end, in blocks int64 `[batches, batch_size]`."""
        # A string is hashed whole, so that (seed, epoch) = (0, 1) and (1, 0) are unrelated.
        generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
        walk = _SampleWalk(self._samples, self._counts)
        groups = _ClassGroups(self._classes, neighbors, self.classes_per_batch, generator)
        while True:
            for anchors in torch.randperm(len(self._classes), generator=generator, device="cpu").split(BLOCK):
                slots, uniform = groups.draw(anchors, self.num_instances)
                yield walk.draw(slots, uniform)

    def _placement(self) -> tuple[int, int]:
        """The number of ranks and that of this process, as given or as `torch.distributed` has them."""
        is_distributed = distributed.is_available() and distributed.is_initialized()
        num_replicas, rank = self._num_replicas, self._rank
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if is_distributed else 1
        if rank is None:
            rank = distributed.get_rank() if is_distributed else 0
        if rank >= num_replicas:
            raise ValueError(f"rank={rank} is not below num_replicas={num_replicas}")
        return num_replicas, rank

    def _identity(self) -> dict[str, Any]:
        """What the batches of an epoch depend on besides its number and the graph."""
        if self._labels_checksum is None:
            digest = hashlib.sha256()
            for part in (self._classes, self._counts, self._samples):
                for some in part.split(2**16):
                    digest.update(array("q", some.tolist()))
            size = f"{len(self._samples)} samples of {len(self._classes)} classes"
            self._labels_checksum = f"{size}, sha256 {digest.hexdigest()[:16]}"
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_instances": self.num_instances,
            "labels": self._labels_checksum,
        }

    def _check_neighbors(self, neighbors: Tensor) -> None:
        if not isinstance(neighbors, Tensor):
            raise TypeError(f"neighbors: expected an integer tensor [N, K], got {type(neighbors).__name__}")
        if not _is_sharded(neighbors):
            self._check_ids_of_classes(neighbors)
            return
        with Agreement(neighbors.device_mesh, local_rows(neighbors).device):
            self._check_ids_of_classes(neighbors)

    def _check_ids_of_classes(self, neighbors: Tensor) -> None:
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
        ids = local_rows(neighbors).long()
        low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= num_classes:
            raise ValueError(f"neighbors: expected class ids in [0, {num_classes}), got {low} to {high}")


def _every_nth(blocks: Iterator[Tensor], first: int, step: int) -> Iterator[list[int]]:
    """Every `step`-th row of the blocks, one block after the other, from row `first` on."""
    passed = 0
    for block in blocks:
        for row in block[first - passed :: step].tolist():
            yield row
            first += step
        passed += len(block)


class _ClassGroups:
    """Chooses the classes of a batch: its anchor, and the nearest classes that have samples.

    A slot numbers the classes that have samples.

    Args:
        classes: int64 `[A]`, the class of each slot.
        neighbors: int `[N, K]`, the classes nearest to each class.
        classes_per_batch: L, how many to choose.
        generator: the source of randomness.
    """

    def __init__(self, classes: Tensor, neighbors: Tensor, classes_per_batch: int, generator: torch.Generator) -> None:
        self.classes = classes
        self.neighbors = neighbors
        self.classes_per_batch = classes_per_batch
        self.generator = generator
        self.slot_of_class = torch.full((len(neighbors),), -1, dtype=torch.int64, device="cpu")
        self.slot_of_class[classes] = torch.arange(len(classes), device="cpu")

    def draw(self, anchors: Tensor, num_instances: int) -> tuple[Tensor, Tensor]:
        """Slots int64 `[R, L]` for the `anchors [R]`, and numbers fp64 `[R, num_instances, L]` in [0, 1) to sample by.

        All random numbers of a batch come before those of the next.
        """
        slots = self._nearest(anchors, self.classes_per_batch - 1)
        is_short = slots[:, -1] < 0
        if is_short.any():  # classes without samples, or named twice: look further
            slots[is_short] = self._nearest(anchors[is_short], self.neighbors.shape[1])
        size = (len(anchors), num_instances, self.classes_per_batch)
        uniform = torch.empty(size, dtype=torch.float64, device="cpu")
        done = 0
        for row in (slots[:, -1] < 0).nonzero().flatten().tolist():
            uniform[done:row].uniform_(generator=self.generator)
            slots[row] = self._fill(slots[row])
            done = row
        uniform[done:].uniform_(generator=self.generator)
        return slots, uniform

    def _nearest(self, anchors: Tensor, num_neighbors: int) -> Tensor:
        """The anchors' slots and those of their first `num_neighbors`, each once, nearest first; -1 after the last."""
        near = self.neighbors[:, :num_neighbors].index_select(0, self.classes[anchors])
        slots = torch.cat([anchors.unsqueeze(1), self.slot_of_class.take(near.long())], dim=1)
        return _distinct(slots, self.classes_per_batch)

    def _fill(self, slots: Tensor) -> Tensor:
        """Random slots in place of -1, all distinct."""
        filled = [slot for slot in slots.tolist() if slot >= 0]
        while len(filled) < self.classes_per_batch:
            size = (self.classes_per_batch,)
            others = torch.randint(len(self.classes), size, generator=self.generator, device="cpu")
            filled = list(dict.fromkeys([*filled, *others.tolist()]))  # keeps the order and drops what comes twice
        return torch.tensor(filled[: self.classes_per_batch], dtype=torch.int64, device="cpu")


def _distinct(slots: Tensor, count: int) -> Tensor:
    """The first `count` that differ and are not -1, of each row of `slots [R, n]`; -1 after the last: `[R, count]`."""
    ordered, places = slots.sort(dim=1, stable=True)
    is_first = torch.ones_like(slots, dtype=torch.bool)
    is_first.scatter_(1, places[:, 1:], ordered[:, 1:] != ordered[:, :-1])
    is_first &= slots >= 0
    place = is_first.cumsum(1) - 1
    row, column = (is_first & (place < count)).nonzero(as_tuple=True)
    distinct = slots.new_full((len(slots), count), -1)
    distinct[row, place[row, column]] = slots[row, column]
    return distinct


class _SampleWalk:
    """Draws the samples of each class without replacement, by a Fisher-Yates shuffle in steps.

    Args:
        samples: int64 `[M]`, sample indices, those of a class side by side; copied.
        counts: int64 `[A]`, samples of each class, in that order.
    """

    def __init__(self, samples: Tensor, counts: Tensor) -> None:
        self.samples = samples.clone()
        self.counts = counts
        self.starts = counts.cumsum(0) - counts
        self.cursors = torch.zeros_like(counts)

    def draw(self, slots: Tensor, uniform: Tensor) -> Tensor:
        """Draw the samples of one batch after the other: int64 `[R, L * num_instances]`, class after class.

        Args:
            slots: int64 `[R, L]`, the classes of each batch, distinct.
            uniform: fp64 `[R, num_instances, L]`, in [0, 1).
        """
        batches, num_instances, _ = uniform.shape
        flat, by_class = slots.flatten(), uniform.transpose(1, 2).flatten(0, 1)
        # The first time that a class is in the block, the second time, ...: each is one step for all classes.
        ordered, places = flat.sort(stable=True)
        index = torch.arange(len(flat), device="cpu")
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        turn = index - torch.where(is_first, index, 0).cummax(0).values
        drawn = torch.empty(len(flat), num_instances, dtype=torch.int64, device="cpu")
        for some in places[turn.argsort(stable=True)].split(turn.bincount().tolist()):
            drawn[some] = self._draw_once(flat.take(some), by_class.index_select(0, some))
        return drawn.view(batches, -1)

    def _draw_once(self, slots: Tensor, uniform: Tensor) -> Tensor:
        """The next samples of every class in `slots [n]` (distinct), by `uniform [n, num_instances]`: as the latter."""
        num_instances = uniform.shape[1]
        count, cursor, start = self.counts.take(slots), self.cursors.take(slots), self.starts.take(slots)
        # Once a walk starts over, what this batch holds already stands last in its class, and is kept out.
        held_back = torch.zeros_like(count)
        drawn = []
        for step in range(num_instances):
            here = start + cursor
            pick = here + (uniform[:, step] * (count - cursor - held_back)).long()
            sample = self.samples.take(pick)
            self.samples.scatter_(0, pick, self.samples.take(here))
            self.samples.scatter_(0, here, sample)
            drawn.append(sample)
            cursor = cursor + 1
            starts_over = cursor == count
            held_back = torch.where(starts_over & (count >= num_instances), step + 1, held_back)
            cursor = torch.where(starts_over, 0, cursor)
        self.cursors.scatter_(0, slots, cursor)
        return torch.stack(drawn, dim=1)


def _graph_checksum(neighbors: Tensor) -> str:
    """A checksum of some rows of a graph, that tells it from another of the same classes."""
    step = max(1, len(neighbors) // HASHED_ROWS)
    if _is_sharded(neighbors):
        places = torch.arange(0, len(neighbors), step, device=local_rows(neighbors).device)
        rows = sharded.table.rows_at(neighbors, places)
    else:
        rows = neighbors[::step].long()
    return hashlib.sha256(array("q", [*neighbors.shape, *rows.flatten().tolist()])).hexdigest()[:16]


def _is_sharded(neighbors: Tensor) -> TypeGuard[DTensor]:
    """Whether the rows of a graph are dealt to the ranks of a mesh."""
    placements: tuple[Any, ...] = getattr(neighbors, "placements", ())
    return len(placements) == 1 and bool(placements[0].is_shard(0))


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


def class_labels(labels: Tensor | Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """`labels` as int64 `[M]` on the CPU, after requiring them to be class ids."""
    try:
        tensor = labels.detach() if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected integers, got {type(labels).__name__} ({error})") from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"labels: expected shape [M], M >= 1 samples, got {list(tensor.shape)}")
    _check_ids(tensor, "labels")
    tensor = tensor.cpu().long()
    if int(tensor.min()) < 0:
        raise ValueError(f"labels: expected class ids of 0 and above, got {int(tensor.min())}")
    return tensor
