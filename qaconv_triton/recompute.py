"""Undoes side effects of forwards that do not count: rerun by activation checkpointing, or failed.

A forward with side effects (running statistics, a class memory) must have them once, however often it is computed.
`torch.utils.checkpoint` runs it a second time within the backward pass, in both of its modes.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
GRAPH = ("_graph", "_last_graph", "_copied_table")  # of a QAConv
MAX_UPDATES = 8  # forwards whose recomputation may be outstanding
MAX_DIFFERENCE = 0.1  # between the features of a forward and of its recomputation: far above rounding, far below 1


def is_recomputing() -> bool:
    """Whether this forward runs within a backward pass, as a recomputation does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class StatisticsGuard:
    """Context of a forward, after which the matcher's running statistics have counted it at most once.

    If the forward fails, statistics and class graph are as before; if it is a recomputation, so are the statistics.

    Args:
        matcher: the module whose batch norms and class graph, if any, are meant.

    Examples:
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> with StatisticsGuard(norm):
        ...     output = norm(torch.randn(4, 1))
        >>> int(norm.num_batches_tracked)
        1
    """

    def __init__(self, matcher: nn.Module) -> None:
        self.matcher = matcher
        self.statistics: list[Tensor] = []
        self.values: list[Tensor] = []
        self.graphs: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        for module in self.matcher.modules():
            state = vars(module)
            self.graphs.append((module, {name: state[name] for name in GRAPH if name in state}))
            if module.training:
                buffers = (module._buffers.get(name) for name in STATISTICS)
                self.statistics += [buffer for buffer in buffers if buffer is not None]
        self.values = _copies(self.statistics)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling() or (kind is None and not is_recomputing()):
            return
        for buffer, value in zip(self.statistics, self.values, strict=True):
            buffer.data.copy_(value)  # .data: a backward pass that saved the buffer does not use it in training mode
        if kind is not None:
            for module, graph in self.graphs:
                vars(module).update(graph)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of `tensors`, by one operation for each kind of them: they are many, and small."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for copy, tensor in zip(copies, tensors, strict=True):
        to, of = kinds.setdefault((tensor.device, tensor.dtype), ([], []))
        to.append(copy)
        of.append(tensor)
    for to, of in kinds.values():
        torch._foreach_copy_(to, of)
    return copies


@dataclass(eq=False)
class _Update:
    """What a forward overwrote in the memory, and how to recognise its recomputation.

    Attributes:
        feature: `[B, C, H, W]`, as the forward got it.
        target: int64 `[B]`, likewise.
        rows: int64 `[R]`, the rows that were written.
        maps: `[R, C, H, W]`, what they held before.
        flags: `[R]`, likewise.
        graph: dead once no backward pass through the forward can come; None where that cannot be known.
        task: the backward pass that last recomputed the forward; -1 for none.
    """

    feature: Tensor
    target: Tensor
    rows: Tensor
    maps: Tensor
    flags: Tensor
    graph: weakref.ref[_GraphAlive] | None
    task: int = -1

    @torch.no_grad()
    def exchange(self, memory: Tensor, flags: Tensor) -> None:
        """Undo the update, or redo it after that: what the rows hold and what is kept here change places."""
        maps, ones = memory[self.rows], flags[self.rows]
        memory[self.rows] = self.maps
        flags[self.rows] = self.flags
        self.maps, self.flags = maps, ones

    def may_be_recomputed(self) -> bool:
        return self.graph is None or self.graph() is not None

    def difference(self, feature: Tensor) -> float:
        """How far `feature` is from the one of the forward, as a share of it (L1 norms)."""
        expected = self.feature.double()
        difference = (feature.double() - expected).nan_to_num().abs().sum()
        return float(difference / expected.nan_to_num().abs().sum().clamp(min=1e-300))


class _GraphAlive:
    """A tensor hook without effect, which lives as long as the graph that it is registered in."""

    def __call__(self, gradient: Tensor) -> None:
        pass


class MemoryLog:
    """The latest updates of a class memory, so that a recomputed forward sees it as the first computation did.

    An update is kept while the graph of its forward lives. A forward without gradients may be one of a reentrant
    checkpoint, which leaves no graph behind: its update is kept, too. At most the last `MAX_UPDATES` are.
    A copy, or what is unpickled, starts empty.

    Examples:
        >>> log, memory, seen = MemoryLog(), torch.zeros(3, 1, 1, 1), torch.zeros(3)
        >>> feature, target = torch.ones(1, 1, 1, 1), torch.tensor([2])
        >>> log.record(feature, target, feature.sum(), target, memory[target], seen[target])
        >>> memory[target], seen[target] = feature, 1.0
        >>> with log.rewound(memory, seen, feature, target):
        ...     seen.tolist()
        [0.0, 0.0, 0.0]
        >>> seen.tolist()
        [0.0, 0.0, 1.0]
    """

    def __init__(self) -> None:
        self._updates: deque[_Update] = deque(maxlen=MAX_UPDATES)

    def __reduce__(self) -> tuple[type[MemoryLog], tuple[()]]:
        return MemoryLog, ()

    def clear(self) -> None:
        """Forget all updates, for the memory was replaced."""
        self._updates.clear()

    def record(self, feature: Tensor, target: Tensor, loss: Tensor, rows: Tensor, maps: Tensor, flags: Tensor) -> None:
        """Log an update of the memory.

        Args:
            feature: `[B, C, H, W]`, what the forward was given.
            target: int64 `[B]`, likewise.
            loss: the output that a backward pass starts from.
            rows: int64 `[R]`, the rows that the update writes.
            maps: `[R, C, H, W]`, what they hold before it.
            flags: `[R]`, likewise.
        """
        while self._updates and not self._updates[0].may_be_recomputed():
            self._updates.popleft()
        alive = _GraphAlive()
        if loss.requires_grad:
            loss.register_hook(alive)
        has_known_graph = loss.requires_grad or torch.is_inference_mode_enabled()
        graph = weakref.ref(alive) if has_known_graph else None
        self._updates.append(_Update(feature.detach(), target, rows, maps, flags, graph))

    @contextmanager
    def rewound(self, memory: Tensor, flags: Tensor, feature: Tensor, target: Tensor) -> Iterator[None]:
        """Put the memory back to what the forward of `feature` and `target` saw, for as long as the context lasts.

        Args:
            memory: `[N, C, H, W]`, changed in place.
            flags: `[N]`, likewise.
            feature: `[B, C, H, W]`.
            target: int64 `[B]`.

        Raises:
            RuntimeError: no such forward is known.
        """
        first = self._find(feature, target)
        with ExitStack() as redo:
            for update in reversed(list(self._updates)[first:]):
                update.exchange(memory, flags)
                redo.callback(update.exchange, memory, flags)
            yield

    @torch.no_grad()
    def _find(self, feature: Tensor, target: Tensor) -> int:
        """The place of the update whose forward is recomputed; equal forwards are in the order of a backward pass."""
        if not len(target):
            return len(self._updates)  # without samples there is no loss, whatever the memory
        task = torch._C._current_graph_task_id()
        updates = list(enumerate(self._updates))
        here = [(place, update) for place, update in updates if update.feature.data_ptr() == feature.data_ptr()]
        candidates = [
            (0.0 if here else update.difference(feature), update.task == task, -place)
            for place, update in here or updates  # values are read from the device only where no address is the same
            if update.target.data_ptr() == target.data_ptr() or torch.equal(update.target, target)
        ]
        difference, _, place = min(candidates, default=(math.inf, False, 0))
        if difference > MAX_DIFFERENCE:
            raise RuntimeError(
                f"a forward within a backward pass is taken for the recomputation of an earlier one, but none of the "
                f"last {len(self._updates)} forwards had these {len(target)} labels and features: the class memory as "
                f"it was then is not known (it is for {MAX_UPDATES} forwards, and not across a reset, a loaded state "
                f"or a move of the module)"
            )
        place = -place
        self._updates[place].task = task
        return place
