"""Initial top-k thresholds, estimated from a sample of the keys or from the previous graph.

Results are verified: a row that ends with fewer than k candidates above its threshold is searched again without one.
So a bad estimate costs time, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CANDIDATE_FLOPS = 2**14  # what it costs to append and select one candidate, in flops of the product
NO_THRESHOLD_COST = 2  # how much more a candidate costs that is found before there is a threshold
GATHER_COST = 128  # how much slower a product with gathered rows is than one of matrices
WARM_START_TAIL = 8  # of a previous row's neighbours, the last ones
SAMPLED_ROWS = 32  # by which a previous graph is judged
MAX_ELEMENTS = 2**20  # to hold at a time
DEVIATIONS = 2.5  # standard deviations by which a sample's rank exceeds what is expected
SAFE_DEVIATIONS = 4.5  # the same where rows that are searched again cost launches and waits: none of 100,000, mostly

KthBest = Callable[[slice, int], Tensor]


class Sample(NamedTuple):
    """A strided sample `keys` of the keys, and the `rank` in it that the k-th best of all will hardly fall short of.

    `most`: how many of all keys will hardly ever be above that rank.
    """

    keys: slice
    rank: int
    most: int


def initial_thresholds(
    queries: Tensor, keys: Tensor, k: int, previous: Tensor | None, rounding: float, kth_best: KthBest
) -> Tensor | None:
    """Similarities fp32 `[P]` that the k best keys of each query hardly fall short of; None where they would not pay.

    Args:
        queries: `[P, D]`.
        keys: `[N, D]`.
        k: of the search.
        previous: int64 `[P, k]`, the result of an earlier search.
        rounding: what the products of the search may be off by.
        kth_best: the similarity fp32 `[P]` of each query's m-th best key, given a slice of the keys and m.
    """
    thresholds = thresholds_from_previous(queries, keys, previous, rounding)
    if thresholds is None and (sample := _sample(keys.shape[0], keys.shape[1], k, DEVIATIONS)) is not None:
        thresholds = _just_below(kth_best(sample.keys, sample.rank))
    return thresholds


def thresholds_from_previous(queries: Tensor, keys: Tensor, previous: Tensor | None, rounding: float) -> Tensor | None:
    """As `initial_thresholds`, from the previous graph alone."""
    found = None if previous is None else _from_previous(queries, keys, previous, rounding)
    return None if found is None else _just_below(found)


def nested_samples(num_keys: int, dim: int, k: int) -> list[Sample]:
    """A sample of the keys, one of that sample for its own threshold, and so on, as long as they pay."""
    samples: list[Sample] = []
    while (sample := _sample(num_keys, dim, k, SAFE_DEVIATIONS)) is not None:
        samples.append(sample)
        num_keys, k = len(range(num_keys)[sample.keys]), sample.rank
    return samples


def expected_candidates(num_keys: int, dim: int, k: int) -> float:
    """How many candidates a row is expected to have above its threshold, in all."""
    return _cheapest_sample(num_keys, dim, k, DEVIATIONS)[1]


def _just_below(similarity: Tensor) -> Tensor:
    """Candidates must exceed a threshold; those that equal the estimate are wanted. NaN is no estimate."""
    return torch.nextafter(similarity, similarity.new_tensor(-torch.inf)).nan_to_num_(nan=-torch.inf)


def _sample(num_keys: int, dim: int, k: int, deviations: float) -> Sample | None:
    """The sample that costs least, None where none pays. Clusters of neighbouring ids have a fair sample, too.

    The rank is `deviations` standard deviations beyond what is expected of the k-th best.
    """
    size = _cheapest_sample(num_keys, dim, k, deviations)[0]
    if size == 0:
        return None
    step, rank = num_keys // size, _rank(num_keys, size, k, deviations)
    # The share of keys above it is gamma distributed; of that, the quantile of Wilson and Hilferty.
    most = rank * (1 - 1 / (9 * rank) + (deviations + 0.5) / (3 * rank**0.5)) ** 3 * num_keys / size
    return Sample(slice(step // 2, step // 2 + (size - 1) * step + 1, step), rank, min(num_keys, math.ceil(most)))


def _from_previous(queries: Tensor, keys: Tensor, previous: Tensor, rounding: float) -> Tensor | None:
    """The lowest similarity now of the last neighbours in `previous [P, k]`, less `rounding`.

    Where nothing has moved, that is the k-th best itself. None where it costs more than it saves, as a sample of rows
    tells: where much has moved, the thresholds are too low.
    """
    (num_keys, dim), k = keys.shape, previous.shape[1]
    tail = previous[:, -WARM_START_TAIL:].to(keys.device)
    gather = GATHER_COST * 2 * dim * tail.shape[1]
    saved = _cheapest_sample(num_keys, dim, k, DEVIATIONS)[2] - gather
    if k * CANDIDATE_FLOPS > saved:
        return None
    rows = torch.arange(0, len(queries), max(1, len(queries) // SAMPLED_ROWS), device=queries.device)
    thresholds = _lowest(queries[rows], keys, tail[rows.to(tail.device)]) - rounding
    if _cost_of_candidates(queries[rows], keys, thresholds, k) > saved:
        return None
    return _lowest(queries, keys, tail) - rounding


def _lowest(queries: Tensor, keys: Tensor, near_ids: Tensor) -> Tensor:
    """The lowest cosine of every query, `[P, D]`, with its keys `near_ids [P, m]`: fp32 `[P]`."""
    step = max(1, (2**7 if keys.is_cuda else 1) * MAX_ELEMENTS // (near_ids.shape[1] * keys.shape[1]))
    lowest = []
    for some_ids, some_queries in zip(near_ids.split(step), queries.split(step), strict=True):
        near, rows = keys[some_ids].float(), some_queries.float().unsqueeze(2)  # [step, m, D], [step, D, 1]
        norms = torch.linalg.vector_norm(near, dim=2) * torch.linalg.vector_norm(rows, dim=1)
        lowest.append((torch.bmm(near, rows).squeeze(2) / norms).amin(1))
    return torch.cat(lowest)


def _cost_of_candidates(queries: Tensor, keys: Tensor, thresholds: Tensor, k: int) -> float:
    """What a row costs on average with these thresholds, in flops: its candidates, or a second search without one."""
    above = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    rows = queries.float()
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for some in keys.split(max(1, MAX_ELEMENTS // keys.shape[1])):
        some = some.float()
        similarity = rows @ (some / torch.linalg.vector_norm(some, dim=1, keepdim=True)).mT
        above += (similarity > thresholds[:, None]).sum(1)
    num_keys, dim = keys.shape
    retry = 2 * dim * num_keys + NO_THRESHOLD_COST * CANDIDATE_FLOPS * k * (1 + math.log(num_keys / k))
    costs = CANDIDATE_FLOPS * above.double() + torch.where(above < k, retry, 0.0)
    return float(costs.mean())


def _rank(num_keys: int, size: int, k: int, deviations: float) -> int:
    """That quantile of how many of the k best are in a sample, a Poisson number."""
    expected = k * size / num_keys
    return int(expected + deviations * expected**0.5 + deviations**2 / 6 + 1)


def _cheapest_sample(num_keys: int, dim: int, k: int, deviations: float) -> tuple[int, float, float]:
    """The size of the sample that costs least, 0 for none; the candidates it leaves; what both cost, in flops."""
    seen = k * (1 + math.log(num_keys / k))
    plans = [(0, seen, NO_THRESHOLD_COST * CANDIDATE_FLOPS * seen)]
    size = 64
    while 4 * size <= num_keys:
        rank = _rank(num_keys, size, k, deviations)
        left = rank * num_keys / size
        if 2 * rank <= size:
            plans.append((size, left, 2 * dim * size + CANDIDATE_FLOPS * left))
        size *= 2
    return min(plans, key=lambda plan: plan[2])
