"""The class graph of a sharded table by a half ring: exact, every unordered pair of shards multiplied once.

A shard is searched in itself first. Then, at distance t = 1 .. W/2, rank r has the shard of rank r + t as a visitor,
and one product finds candidates for both: its own are kept, the visitor's go home, where they are merged. With an even
W the pairs at the last distance meet on both of their ranks: each multiplies one half. Candidates of a class all
differ, so the k best are one set, in whatever order they come.

A visitor comes in parts of bounded size, each of which is a step: its rows travel while the product of the step before
runs, the k-th best similarities of its rows so far, which spare candidates, when its own step begins. All ranks take as
many steps, some of them with no rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import ops
from ..common.dtypes import accumulation_dtype
from ..distributed import Agreement
from ..progress import Progress, progress_of_search, progress_reported_to
from ..validation import check_finite_rows
from .table import chunk_rows, rows_of, sharded

PART_BYTES = 2**30  # of a visitor's rows; a rank holds two parts at a time


class Candidates(NamedTuple):
    """The k best so far of some classes: similarities `[n, k]`, descending, -inf where there are none yet; ids."""

    similarities: Tensor
    ids: Tensor

    def merged(self, other: Candidates) -> Candidates:
        """The k best of both; equal similarities by ascending id."""
        k = self.ids.shape[1]
        ids, order = torch.cat([self.ids, other.ids], dim=1).sort(dim=1)
        similarities = torch.cat([self.similarities, other.similarities], dim=1).gather(1, order)
        similarities, order = similarities.sort(dim=1, descending=True, stable=True)
        return Candidates(similarities[:, :k], ids.gather(1, order[:, :k]))


class Step(NamedTuple):
    """What a rank does in one step: its rows `own` meet the rows `visiting` of rank `visitor`.

    `host` is the rank that this one visits, with its rows `sent`. Ranks and rows are those of the mesh and the shard.
    """

    visitor: int
    visiting: slice
    own: slice
    host: int
    sent: slice


def search_neighbors(table: Tensor, k: int, progress: bool | Progress) -> DTensor:
    """The k nearest other classes of every class of a sharded table `[N, C, H, W]`; all ranks call it together.

    Returns:
        int64 `[N, k]`, sharded as the table is.

    Raises:
        ValueError: NaN or Inf in this rank's rows.
        RuntimeError: in another's.
    """
    assert isinstance(table, DTensor)
    mesh, num_classes = table.device_mesh, table.shape[0]
    # All ranks take the coordinates in one order, that of memory.
    shard = table.to_local().detach().permute(0, 2, 3, 1).flatten(1)
    with Agreement(mesh, shard.device):
        check_finite_rows(shard, "class_embed", first=rows_of(num_classes, mesh).start)
    found = _HalfRing(shard, num_classes, k, mesh).search(progress)
    return sharded(found.ids.contiguous(), num_classes, mesh)


class _HalfRing:
    """The search of one rank. `shard [n, D]`: its rows of the table."""

    def __init__(self, shard: Tensor, num_classes: int, k: int, mesh: DeviceMesh) -> None:
        self.shard, self.k, self.mesh = shard.contiguous(), k, mesh
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        self.rows = [rows_of(num_classes, mesh, rank) for rank in range(self.ranks)]
        self.part_rows = max(1, PART_BYTES // (self.shard.shape[1] * self.shard.element_size()))
        self.parts = -(-chunk_rows(num_classes, mesh) // self.part_rows)

    def search(self, progress: bool | Progress) -> Candidates:
        distances, parts = range(1, self.ranks // 2 + 1), range(self.parts)
        steps = [self._step(distance, part) for distance in distances for part in parts]
        visit = self._start_visit(steps[0]) if steps else None
        best = self._search_own()
        with progress_reported_to(progress if callable(progress) else progress and self.rank == 0):
            report = progress_of_search.get()
            for done, step in enumerate(steps):
                assert visit is not None
                visitors, thresholds = visit(), self._thresholds(step, best)
                visit = self._start_visit(steps[done + 1]) if done + 1 < len(steps) else None
                own, theirs = self._meet(step, visitors, best, thresholds)
                for rows, more in ((step.own, own), (step.sent, self._returned(step, theirs))):
                    merged = Candidates(*(values[rows] for values in best)).merged(more)
                    for values, new in zip(best, merged, strict=True):
                        values[rows] = new
                if report is not None:
                    report(done + 1, len(steps))
        return best

    def _size(self, rank: int) -> int:
        return len(range(self.rows[rank].start, self.rows[rank].stop))

    def _step(self, distance: int, part: int) -> Step:
        """The step in which this rank has a part of the shard at this distance as its visitor."""
        rank = self.rank
        visitor, host = (rank + distance) % self.ranks, (rank - distance) % self.ranks
        visiting, own, sent = self._size(visitor), slice(0, self._size(rank)), self._size(rank)
        if 2 * distance == self.ranks:
            # Both ranks have each other. The lower takes the first half of the higher one's rows, the higher the rest.
            half = -(-self._size(max(rank, visitor)) // 2)
            if rank < visitor:
                visiting = half
            else:
                own, sent = slice(half, own.stop), half
        first, last = part * self.part_rows, (part + 1) * self.part_rows
        its, sent_rows = (slice(min(first, count), min(last, count)) for count in (visiting, sent))
        return Step(visitor, its, own, host, sent_rows)

    def _search_own(self) -> Candidates:
        count, dtype = len(self.shard), accumulation_dtype(self.shard.dtype)
        best = Candidates(
            self.shard.new_full((count, self.k), -torch.inf, dtype=dtype),
            self.shard.new_full((count, self.k), -1, dtype=torch.int64),
        )
        among = min(self.k, count - 1)
        if among > 0:
            similarities, ids = ops.cosine_topk(self.shard, None, among, None, None, None, None)
            best.similarities[:, :among] = similarities
            best.ids[:, :among] = ids + self.rows[self.rank].start
        return best

    def _thresholds(self, step: Step, best: Candidates) -> Tensor:
        """The k-th best similarities so far of the visitor's rows `[m]`: a bound of what needs to be returned."""
        kth_best = best.similarities[:, -1]
        thresholds = kth_best.new_empty(step.visiting.stop - step.visiting.start)
        self._exchange([(kth_best[step.sent].contiguous(), step.host)], [(thresholds, step.visitor)])()
        return thresholds

    def _start_visit(self, step: Step) -> Callable[[], Tensor]:
        """Begin to fetch rows of the visitor `[m, D]`; the function that is returned waits for them."""
        rows = self.shard.new_empty(step.visiting.stop - step.visiting.start, self.shard.shape[1])
        wait = self._exchange([(self.shard[step.sent], step.host)], [(rows, step.visitor)])

        def arrived() -> Tensor:
            wait()
            return rows

        return arrived

    def _meet(
        self, step: Step, visitors: Tensor, best: Candidates, thresholds: Tensor
    ) -> tuple[Candidates, Candidates]:
        """The product of a step: candidates of this rank's rows, and of the visitor's."""
        own = self.shard[step.own]
        split, shape = len(own), (len(own) + len(visitors), self.k)
        similarities = best.similarities.new_full(shape, -torch.inf)
        ids = best.ids.new_full(shape, -1)
        if split and len(visitors):
            bounds = torch.cat([best.similarities[step.own, -1], thresholds])
            found, places = ops.mutual_topk(own, visitors, self.k, bounds)
            similarities.copy_(found)
            offset = places.new_full((shape[0], 1), self.rows[self.rank].start + step.own.start)
            offset[:split] = self.rows[step.visitor].start + step.visiting.start - split
            ids = torch.where(found == -torch.inf, -1, places + offset)
        return Candidates(similarities[:split], ids[:split]), Candidates(similarities[split:], ids[split:])

    def _returned(self, step: Step, theirs: Candidates) -> Candidates:
        """Send the visitor's candidates home, and receive those of this rank's rows from their host."""
        count = step.sent.stop - step.sent.start
        received = Candidates(*(values.new_empty(count, self.k) for values in theirs))
        outgoing = [(values.contiguous(), step.visitor) for values in theirs]
        self._exchange(outgoing, [(values, step.host) for values in received])()
        return received

    def _exchange(self, outgoing: list[tuple[Tensor, int]], incoming: list[tuple[Tensor, int]]) -> Callable[[], None]:
        """Begin to send and receive; the function that is returned waits. Empty tensors stay."""
        group = self.mesh.get_group()
        operations = [
            distributed.P2POp(operation, tensor, distributed.get_global_rank(group, rank), group)
            for operation, tensors in ((distributed.isend, outgoing), (distributed.irecv, incoming))
            for tensor, rank in tensors
            if tensor.numel()
        ]
        works = distributed.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait
