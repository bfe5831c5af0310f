"""Candidates of a top-k search, one int64 each: the similarity in sortable form above the complement of the id.

Candidates of a row all differ, so the k largest are one set, in whatever order they were found, and ties are ordered by
ascending id. The low half is 2^32 - 2 - id, so that no candidate is the largest int64. This is the searches' tie rule:
`topk_kernels._limits`, `_append` and `_sort_kernel` have it too, `cpu/cosine_topk.py` and `rescored_topk` count on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norms import with_norms

EMPTY = -(2**63)  # below every candidate
LAST_ID = 2**32 - 1
LOWEST = -(2**31)  # below the sortable form of every float, -inf included
HIGHEST = 2**31 - 1


def sortable(similarity: Tensor) -> Tensor:
    """Map fp32 to int32 in the same order: NaN above everything, -0 equal to +0."""
    bits = similarity.view(torch.int32)
    sign = bits >> 31
    key = ((bits & HIGHEST) ^ sign) - sign  # sign and magnitude -> two's complement
    return key.masked_fill_(similarity.isnan(), HIGHEST)


def unsortable(key: Tensor) -> Tensor:
    """The fp32 that `sortable` came from."""
    return (key.abs() | (key & LOWEST)).view(torch.float32)


def pack(similarity: Tensor, ids: Tensor) -> Tensor:
    """Candidates of fp32 similarities and ids in `[0, 2^32 - 2]`."""
    return (sortable(similarity).to(torch.int64) << 32) | (LAST_ID - 1 - ids.to(torch.int64))


def unpack(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities fp32 and ids int64 of candidates."""
    return unsortable((candidates >> 32).to(torch.int32)), LAST_ID - 1 - (candidates & LAST_ID)


def pack_threshold(similarity: Tensor) -> Tensor:
    """What candidates exceed if their similarity is larger than this fp32 one."""
    return (sortable(similarity).to(torch.int64) << 32) | LAST_ID


def rescored_topk(table: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of every row's `candidates [N, c]` by similarity in fp32, equal ones by ascending id."""
    candidates = candidates.sort(dim=1).values
    similarities = torch.empty(candidates.shape, dtype=torch.float32, device=candidates.device)
    table, rnorm = with_norms(table)
    step = max(1, (2**28 if candidates.is_cuda else 2**22) // (table.shape[1] * candidates.shape[1]))
    for start in range(0, len(table), step):
        rows, near = slice(start, start + step), candidates[start : start + step].to(table.device)
        gathered, queries = (values.to(candidates.device).float() for values in (table[near], table[rows]))
        scale = (rnorm[near] * rnorm[rows, None]).to(candidates.device)
        similarities[rows] = torch.bmm(gathered, queries.unsqueeze(2)).squeeze(2) * scale
    best, order = similarities.sort(dim=1, descending=True, stable=True)
    return best[:, :k], candidates.gather(1, order[:, :k])
