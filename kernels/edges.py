"""The inverse list: from `[B, K]` class ids to, for every class that occurs, the (sample, neighbour) pairs it is in.

Sorting and scanning are torch's own (a radix sort on CUDA). Nothing is read back to the host, so the list has room for
as many classes as could occur; the unused rest is marked with id -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Edges(NamedTuple):
    """For slot t: class `classes[t]` is in the pairs `pairs[offsets[t] : offsets[t + 1]]`, in rising order.

    classes: int64 `[T]`, rising; -1 in unused slots, which come last and are empty.
    offsets: int64 `[T + 1]`.
    pairs: int64 `[B*K]`, positions in the flattened `[B, K]` index.
    slots: int64 `[B*K]`, the slot of the pair at that position; -1 for a pair that is left out.
    """

    classes: Tensor
    offsets: Tensor
    pairs: Tensor
    slots: Tensor

    def packed(self) -> Tensor:
        """All of it in one tensor, int64 `[packed_size]`."""
        parts = [part.new_zeros(_even(part.shape[0])) for part in self]
        for room, part in zip(parts, self, strict=True):
            room[: part.shape[0]] = part
        return torch.cat(parts)

    @staticmethod
    def unpacked(packed: Tensor, pairs: int) -> Edges:
        """What `packed` made, for that many pairs: views, all as aligned as the whole, since kernels care."""
        slots = (packed.shape[0] - 2 * _even(pairs)) // 2 - 1
        sizes = slots, slots + 1, pairs, pairs
        rooms = packed.split([_even(size) for size in sizes])
        return Edges(*(room[:size] for room, size in zip(rooms, sizes, strict=True)))


def packed_size(pairs: int, num_classes: int) -> int:
    """The length of a packed list."""
    slots = min(pairs, num_classes)
    return _even(slots) + _even(slots + 1) + 2 * _even(pairs)


def _even(size: int) -> int:
    return size + size % 2


def inverse_list(index: Tensor, num_classes: int) -> Edges:
    """Build the list for `index` int64 `[B, K]` of ids in `[0, num_classes)`; negative ids are left out."""
    flat = index.reshape(-1)
    total = flat.numel()
    slots = min(total, num_classes)
    # Ids that are left out sort last, behind every real class.
    ids, pairs = torch.where(flat < 0, num_classes, flat).sort(stable=True)
    valid = ids < num_classes
    starts = torch.ones_like(valid)
    starts[1:] = ids[1:] != ids[:-1]
    slot = starts.cumsum(0) - 1
    slot = torch.where(valid & (slot < slots), slot, slots)
    classes = flat.new_full((slots + 1,), -1).scatter_(0, slot, torch.where(valid, ids, -1))[:slots]
    offsets = torch.searchsorted(slot, torch.arange(slots + 1, device=flat.device))
    of_pairs = torch.empty_like(slot).scatter_(0, pairs, torch.where(valid, slot, -1))
    return Edges(classes, offsets, pairs, of_pairs)
