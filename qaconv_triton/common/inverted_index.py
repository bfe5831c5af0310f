"""The inverted index: from `[B, K]` class ids to, for every class that occurs, the (sample, neighbour) pairs it is in.

Sorting and scanning are torch's own (a radix sort on CUDA). Nothing is read back to the host, so the index has slots
for as many classes as could occur; the unused ones are marked with id -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class InvertedIndex(NamedTuple):
    """In the CSR format: class `classes[t]` of slot t is in the pairs `pairs[indptr[t] : indptr[t + 1]]`, ascending.

    classes: int64 `[T]`, ascending; -1 in unused slots, which come last and are empty.
    indptr: int64 `[T + 1]`.
    pairs: int64 `[B*K]`, positions in the flattened `[B, K]` ids; before `indptr[0]` are those that are left out.
    slots: int64 `[B*K]`, the slot of the pair at that position; -1 for a pair that is left out.
    """

    classes: Tensor
    indptr: Tensor
    pairs: Tensor
    slots: Tensor

    @staticmethod
    def unpacked(packed: Tensor, pairs: int) -> InvertedIndex:
        """Of `packed_index`, for that many pairs: views, as aligned as the whole, for kernels depend on it."""
        half = packed.shape[0] // 2 - _even(pairs)
        slots, first = half - 1, _even(half - 1)
        return InvertedIndex(
            packed.narrow(0, 0, slots),
            packed.narrow(0, first, slots + 1),
            packed.narrow(0, 2 * half, pairs),
            packed.narrow(0, 2 * half + _even(pairs), pairs),
        )


def packed_size(pairs: int, num_classes: int) -> int:
    """The length of a packed index."""
    slots = min(pairs, num_classes)
    return _even(slots) + _even(slots + 1) + 2 * _even(pairs)


def _even(size: int) -> int:
    return size + size % 2


def packed_index(ids: Tensor, num_classes: int) -> Tensor:
    """Build the index of `ids` int64 `[B, K]` in `[0, num_classes)`, in one tensor; negative ids are left out."""
    flat = ids.reshape(-1).clamp(min=-1)
    total = flat.numel()
    packed = flat.new_empty(packed_size(total, num_classes))
    classes, indptr, pairs, slots = InvertedIndex.unpacked(packed, total)
    # Launches count here, not elements. In front of all is a -1: what is left out sorts next to it and starts no slot.
    # Behind all is another one: unused slots begin there.
    sorted_ids, slot = flat.new_full((2, total + 2), -1)
    torch.sort(flat, stable=True, out=(sorted_ids[1:-1], pairs))
    torch.ne(sorted_ids[1:-1], sorted_ids[:-2], out=slot[1:-1])
    slot = slot[:-1].cumsum_(0)[1:]
    torch.searchsorted(slot, torch.arange(indptr.shape[0], device=flat.device), out=indptr)
    torch.index_select(sorted_ids[1:], 0, indptr[:-1], out=classes)
    slots.scatter_(0, pairs, slot)
    return packed


def inverted_index(ids: Tensor, num_classes: int) -> InvertedIndex:
    """As `packed_index`, in parts."""
    return InvertedIndex.unpacked(packed_index(ids, num_classes), ids.numel())
