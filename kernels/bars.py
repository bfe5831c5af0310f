"""How good an entry must be to be looked at: bars that are guessed, cheaply, and verified when all is done.

A list that ends with k entries or more above its bar holds the k best; a list with fewer had too high a bar, and its
row is searched again without one. So a bar may be wrong, but no result is. Torch only: both backends use it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import config

CANDIDATE_FLOPS = 2**14  # what it costs to append and select one candidate, in terms of the product
UNBARRED = 2  # how much dearer candidates are that come in a rush, before there is a bar
GATHER = 128  # how much slower a product with gathered rows is than one of matrices
TAIL = 8  # of a previous list's neighbours, the last ones
SAMPLED_ROWS = 32  # by which a previous graph is judged
STRIP = 2**20  # numbers to hold at a time


def sample(num_keys: int, dim: int, k: int) -> tuple[slice, int] | None:
    """A strided sample of the keys, and the rank in it that the k-th best key of all will hardly fall short of.

    The rank is two and a half standard deviations beyond what is expected of the k-th best: keys in any order, clusters
    of neighbouring ids included, have a fair sample. None where it costs more than it saves.
    """
    size = _cheapest(num_keys, dim, k)[0]
    if size == 0:
        return None
    step = num_keys // size
    return slice(step // 2, step // 2 + (size - 1) * step + 1, step), _rank(num_keys, size, k)


def candidates(num_keys: int, dim: int, k: int) -> float:
    """How many entries a list is expected to see above its bar, in all."""
    return _cheapest(num_keys, dim, k)[1]


def remember(queries: Tensor, keys: Tensor, previous: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Bars from the lists of an earlier search, `previous [P, k]`: the worst that the last of them are now.

    Less what products in `dtype` may be off by: where nothing has moved, the worst is the k-th best itself. None where
    all that costs more than it saves, as a sample of rows tells: where much has moved, the thresholds are too low.
    """
    (num_keys, dim), k = keys.shape, previous.shape[1]
    tail = previous[:, -TAIL:].to(keys.device)
    gather = GATHER * 2 * dim * tail.shape[1]
    saved = _cheapest(num_keys, dim, k)[2] - gather
    if k * CANDIDATE_FLOPS > saved:
        return None
    slack = 2**-7 if dtype != keys.dtype or config.precision() == "tf32" else 1e-5
    rows = torch.arange(0, len(queries), max(1, len(queries) // SAMPLED_ROWS), device=queries.device)
    bars = _worst(queries[rows], keys, tail[rows.to(tail.device)]) - slack
    if _cost_of_candidates(queries[rows], keys, bars, k) > saved:
        return None
    return just_below(_worst(queries, keys, tail) - slack)


def _worst(queries: Tensor, keys: Tensor, near_ids: Tensor) -> Tensor:
    """The lowest cosine of every query, `[P, D]`, with its keys `near_ids [P, m]`: fp32 `[P]`."""
    step = max(1, (2**7 if keys.is_cuda else 1) * STRIP // (near_ids.shape[1] * keys.shape[1]))
    worst = []
    for some, rows in zip(near_ids.split(step), queries.split(step), strict=True):
        near, rows = keys[some].float(), rows.float().unsqueeze(2)  # [step, m, D], [step, D, 1]
        lengths = torch.linalg.vector_norm(near, dim=2) * torch.linalg.vector_norm(rows, dim=1)
        worst.append((torch.bmm(near, rows).squeeze(2) / lengths).amin(1))
    return torch.cat(worst)


def _cost_of_candidates(queries: Tensor, keys: Tensor, bars: Tensor, k: int) -> float:
    """What a row costs on average with these thresholds, in flops: its candidates, or a second search without one."""
    above = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    rows = queries.float()
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for some in keys.split(max(1, STRIP // keys.shape[1])):
        some = some.float()
        similarity = rows @ (some / torch.linalg.vector_norm(some, dim=1, keepdim=True)).mT
        above += (similarity > bars[:, None]).sum(1)
    num_keys, dim = keys.shape
    again = 2 * dim * num_keys + UNBARRED * CANDIDATE_FLOPS * k * (1 + math.log(num_keys / k))
    costs = CANDIDATE_FLOPS * above.double() + torch.where(above < k, again, 0.0)
    return float(costs.mean())


def just_below(bars: Tensor) -> Tensor:
    """Entries must exceed a bar; those that equal the guess are wanted. NaN is no guess."""
    return torch.nextafter(bars, bars.new_tensor(-torch.inf)).nan_to_num_(nan=-torch.inf)


def _rank(num_keys: int, size: int, k: int) -> int:
    expected = k * size / num_keys
    return int(expected + 2.5 * expected**0.5 + 2)


def _cheapest(num_keys: int, dim: int, k: int) -> tuple[int, float, float]:
    """The size of the sample that costs least, 0 for none; the candidates it leaves; what both cost, in flops."""
    seen = k * (1 + math.log(num_keys / k))
    plans = [(0, seen, UNBARRED * CANDIDATE_FLOPS * seen)]
    size = 64
    while 4 * size <= num_keys:
        rank = _rank(num_keys, size, k)
        left = rank * num_keys / size
        if 2 * rank <= size:
            plans.append((size, left, 2 * dim * size + CANDIDATE_FLOPS * left))
        size *= 2
    return min(plans, key=lambda plan: plan[2])
