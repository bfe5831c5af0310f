"""What a sharded class table costs: memory, bytes that travel, FLOPs and seconds, as functions of the sizes.

A graph is `compute_class_neighbors`. A step is the class path, own class included, forward and backward, and AdamW on
the table; pairs within a batch stay on their rank. No constant is fitted to a time: these functions count what
qaconv_triton/sharded multiplies, sends and holds, and tests/test_scale.py compares them with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from qaconv_triton.sharded import graph

# What the code holds and sends besides what shapes say. These change with qaconv_triton/sharded and GraphSampler.
AGREEMENT_BYTES = 5 * 8  # that a rank tells the others before it computes
STATISTICS_BYTES = (4, 2 * 8)  # of the all-reduces of a norm: its count; mean and mean square in fp64, by the count
STATISTICS_GRADIENT_BYTES = 2 * 4  # of a norm's all-reduce in the backward pass: both sums at once
VISITORS = 2  # parts of shards that a search holds besides its own shard: the visitor and the next one
LIST_BYTES, PART_LIST_BYTES = 96, 50  # of lists at the peak of a search, per neighbour of a row; of a row of a part
SAMPLER_ITEMSIZE = 4  # of an id that GraphSampler keeps, in the memory of the CPU
ADAMW_PASSES = 7  # over a shard, by AdamW(fused=True): reads value, gradient, moments; writes value and moments


class Job(NamedTuple):
    """Maps `[channels, height, width]` of `classes` sharded over `ranks`, each of which brings `batch` samples.

    `itemsize`: bytes of a value of the table, of its gradient and moments, and of probes; 4 or 2.
    """

    ranks: int
    classes: int
    channels: int
    height: int
    width: int
    k: int
    batch: int
    itemsize: int = 4

    @property
    def dim(self) -> int:
        return self.channels * self.height * self.width

    @property
    def map_bytes(self) -> int:
        return self.dim * self.itemsize

    def rows(self, rank: int) -> int:
        """Classes of a rank."""
        chunk = -(-self.classes // self.ranks)
        return max(0, min(chunk, self.classes - rank * chunk))


class Message(NamedTuple):
    """A collective and the bytes of what a rank gives to it; or "receive" and the bytes that it receives."""

    kind: str
    nbytes: int

    def received(self, ranks: int) -> float:
        """Bytes that a rank receives, if collectives go round a ring."""
        factors = {"receive": 1, "all_gather": ranks - 1, "all_reduce": 2 - 2 / ranks, "reduce_scatter": 1 - 1 / ranks}
        return self.nbytes * factors[self.kind]


class Step(NamedTuple):
    """Of the half ring: pairs of rows that a rank multiplies, rows that visit it, its rows whose lists come back.

    The visitor of a step is a part of a shard.
    """

    pairs: int
    visiting: int
    returned: int


def part_rows(job: Job) -> int:
    """The most rows of a part of a visitor."""
    return min(job.rows(0), max(1, graph.PART_BYTES // job.map_bytes))


def half_ring(job: Job, rank: int = 0) -> list[Step]:
    """The steps of a rank after the search within its own shard."""
    steps = []
    for distance in range(1, job.ranks // 2 + 1):
        visitor = (rank + distance) % job.ranks
        own = sent = job.rows(rank)
        visiting = job.rows(visitor)
        if 2 * distance == job.ranks:  # both have each other; each multiplies one half of the higher one's rows
            half = -(-job.rows(max(rank, visitor)) // 2)
            own, visiting, sent = (own, half, sent) if rank < visitor else (own - half, visiting, half)
        for first in range(0, job.rows(0), part_rows(job)):
            part, back = (max(0, min(part_rows(job), count - first)) for count in (visiting, sent))
            steps.append(Step(own * part, part, back))
    return steps


def graph_flops(job: Job, rank: int = 0) -> list[int]:
    """FLOPs of a rank's products: within its shard, then step by step; N N D / W in all."""
    pairs = [job.rows(rank) * (job.rows(rank) - 1) // 2, *(step.pairs for step in half_ring(job, rank))]
    return [2 * job.dim * each for each in pairs]


def graph_messages(job: Job, rank: int = 0) -> list[list[Message]]:
    """What a rank sends and receives in a search: at its start; then step by step, the visitor, thresholds, lists."""
    messages = [[Message("all_gather", AGREEMENT_BYTES)]]
    for step in half_ring(job, rank):
        lists = [step.returned * job.k * itemsize for itemsize in (4, 8)]  # similarities and ids
        received = (step.visiting * job.map_bytes, step.visiting * 4, *lists)
        messages.append([Message("receive", nbytes) for nbytes in received])
    return messages


def step_messages(job: Job) -> list[Message]:
    """What a rank sends and receives in a step, forward and backward."""
    samples, scored = job.ranks * job.batch, job.k + 1
    statistics = [Message("all_reduce", nbytes) for nbytes in STATISTICS_BYTES]
    gradient = Message("all_reduce", STATISTICS_GRADIENT_BYTES)
    return [
        Message("all_gather", AGREEMENT_BYTES),
        Message("all_gather", job.batch * 8),  # labels
        Message("all_reduce", samples * job.k * 8),  # their rows of the graph
        Message("all_gather", job.batch * job.map_bytes),  # probes
        *statistics * 2,  # of both norms
        Message("reduce_scatter", samples * scored * 4),  # scores
        Message("all_gather", job.batch * scored * 4),  # gradients of scores
        *[gradient] * 2,
        Message("all_reduce", (2 * job.height * job.width + 5) * 4),  # gradients of fc and both norms
        Message("reduce_scatter", samples * job.map_bytes),  # gradients of probes
    ]


def fetched_bytes(job: Job) -> float:
    """What a rank would receive in a forward that fetched the maps of its pairs, each pair's for itself."""
    return job.batch * (job.k + 1) * job.map_bytes * (1 - 1 / job.ranks)


def step_flops(job: Job) -> int:
    """FLOPs of a rank's products in a step, on average; backward has two products."""
    return 3 * 2 * (job.height * job.width) ** 2 * job.channels * job.batch * (job.k + 1)


def adamw_bytes(job: Job) -> int:
    """What AdamW reads and writes on the first rank."""
    return ADAMW_PASSES * job.rows(0) * job.map_bytes


def memory(job: Job) -> dict[str, int]:
    """Bytes that the first rank holds in training, and on top of that at the peak of each other part; the peak of all.

    Of a step this is what grows with the ranks. A rank's pairs come on top, whatever N and W are if neighbours spread
    evenly over the shards.
    """
    rows, visiting = job.rows(0), [*(step.visiting for step in half_ring(job)), *[0] * VISITORS]
    visitors = max(sum(visiting[first : first + VISITORS]) for first in range(len(visiting) - VISITORS + 1))
    training = 4 * rows * job.map_bytes + rows * job.k * 8  # table, gradient, moments; rows of the graph
    parts = {
        "search": visitors * job.map_bytes + job.k * (rows * LIST_BYTES + max(visiting) * PART_LIST_BYTES),
        # gradients of all probes: summed in fp32; in their own dtype; padded
        "step": job.ranks * job.batch * job.dim * (4 + (job.itemsize if job.itemsize < 4 else 0) + job.itemsize),
    }
    return {"training": training, **parts, "peak": training + max(parts.values())}


def sampler_bytes(job: Job, instances: int) -> int:
    """What GraphSampler keeps of the graph on every rank: a neighbour for each class of a batch but the first."""
    return job.classes * (job.batch // instances - 1) * SAMPLER_ITEMSIZE


class Machine(NamedTuple):
    """Rates of a rank while all work: FLOP/s, bytes/s of memory and of the network, seconds of the shortest message."""

    flops: float
    copy: float
    network: float
    latency: float

    def sending(self, messages: Iterable[Message], ranks: int) -> float:
        """Seconds of messages, one after the other. Empty ones are not sent."""
        sent = [each for each in messages if each.nbytes and ranks > 1]
        return sum(self.latency + each.received(ranks) / self.network for each in sent)


def graph_seconds(job: Job, machine: Machine) -> float:
    """Seconds of a search on the first rank. The next visitor travels during a product; lists return after it."""
    start, *steps = graph_messages(job)
    visits = [machine.sending(messages[:1], job.ranks) for messages in steps]
    rest = machine.sending([*start, *(each for messages in steps for each in messages[1:])], job.ranks)
    products = (flops / machine.flops for flops in graph_flops(job))
    return rest + sum(max(both) for both in zip(products, [*visits, 0.0], strict=True))


def step_seconds(job: Job, machine: Machine) -> float:
    """Seconds of a step; nothing overlaps."""
    computed = step_flops(job) / machine.flops + adamw_bytes(job) / machine.copy
    return computed + machine.sending(step_messages(job), job.ranks)
