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
    pairs: int64 `[B*K]`, positions in the flattened `[B, K]` ids.
    slots: int64 `[B*K]`, the slot of the pair at that position; -1 for a pair that is left out.
    """

    classes: Tensor
    indptr: Tensor
    pairs: Tensor
    slots: Tensor

    def packed(self) -> Tensor:
        """All of it in one tensor, int64 `[packed_size]`."""
        parts = [part.new_zeros(_even(part.shape[0])) for part in self]
        for padded, part in zip(parts, self, strict=True):
            padded[: part.shape[0]] = part
        return torch.cat(parts)

    @staticmethod
    def unpacked(packed: Tensor, pairs: int) -> InvertedIndex:
        """What `packed` made, for that many pairs: views, as aligned as the whole, for kernels depend on it."""
        slots = (packed.shape[0] - 2 * _even(pairs)) // 2 - 1
        sizes = slots, slots + 1, pairs, pairs
        parts = packed.split([_even(size) for size in sizes])
        return InvertedIndex(*(part[:size] for part, size in zip(parts, sizes, strict=True)))


def packed_size(pairs: int, num_classes: int) -> int:
    """The length of a packed index."""
    slots = min(pairs, num_classes)
    return _even(slots) + _even(slots + 1) + 2 * _even(pairs)


def _even(size: int) -> int:
    return size + size % 2


def inverted_index(ids: Tensor, num_classes: int) -> InvertedIndex:
    """Build the index of `ids` int64 `[B, K]` in `[0, num_classes)`; negative ids are left out."""
    flat = ids.reshape(-1)
    total = flat.numel()
    slots = min(total, num_classes)
    # Ids that are left out sort last, behind every real class.
    sorted_ids, pairs = torch.where(flat < 0, num_classes, flat).sort(stable=True)
    valid = sorted_ids < num_classes
    is_first = torch.ones_like(valid)
    is_first[1:] = sorted_ids[1:] != sorted_ids[:-1]
    slot = is_first.cumsum(0) - 1
    slot = torch.where(valid & (slot < slots), slot, slots)
    classes = flat.new_full((slots + 1,), -1).scatter_(0, slot, torch.where(valid, sorted_ids, -1))[:slots]
    indptr = torch.searchsorted(slot, torch.arange(slots + 1, device=flat.device))
    slot_of_pair = torch.empty_like(slot).scatter_(0, pairs, torch.where(valid, slot, -1))
    return InvertedIndex(classes, indptr, pairs, slot_of_pair)
