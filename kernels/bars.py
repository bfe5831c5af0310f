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
    all that costs more than it saves.
    """
    (num_keys, dim), k = keys.shape, previous.shape[1]
    tail = previous[:, -TAIL:].to(keys.device)
    if GATHER * 2 * dim * tail.shape[1] > _cheapest(num_keys, dim, k)[2] - k * CANDIDATE_FLOPS:
        return None
    slack = 2**-7 if dtype != keys.dtype or config.precision() == "tf32" else 1e-5
    step = max(1, (2**7 if keys.is_cuda else 1) * STRIP // (tail.shape[1] * dim))
    worst = []
    for some, rows in zip(tail.split(step), queries.split(step), strict=True):
        near, rows = keys[some].float(), rows.float().unsqueeze(2)  # [step, TAIL, D], [step, D, 1]
        lengths = torch.linalg.vector_norm(near, dim=2) * torch.linalg.vector_norm(rows, dim=1)
        worst.append((torch.bmm(near, rows).squeeze(2) / lengths).amin(1))
    return just_below(torch.cat(worst) - slack)


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
