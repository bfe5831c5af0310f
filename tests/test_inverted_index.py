"""The inverted index against a dictionary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qaconv_triton.common.inverted_index import InvertedIndex, inverted_index, packed_index, packed_size


def check(index: torch.Tensor, num_classes: int) -> InvertedIndex:
    """Every invariant of `InvertedIndex`, and the same content as the naive dictionary."""
    naive: dict[int, list[int]] = {}
    for position, class_id in enumerate(index.flatten().tolist()):
        if class_id >= 0:
            naive.setdefault(class_id, []).append(position)

    found = inverted_index(index, num_classes)
    slots = min(index.numel(), num_classes)
    assert found.classes.shape == (slots,)
    assert found.indptr.shape == (slots + 1,)
    assert found.pairs.shape == (index.numel(),)
    assert all(part.dtype == torch.int64 and part.device == index.device for part in found)
    packed = packed_index(index, num_classes)
    assert len(packed) == packed_size(index.numel(), num_classes)
    assert all(map(torch.equal, InvertedIndex.unpacked(packed, index.numel()), found))
    classes, offsets, pairs, of_pairs = (part.tolist() for part in found)
    assert [classes[slot] if slot >= 0 else -1 for slot in of_pairs] == index.flatten().clamp(min=-1).tolist()
    assert classes == sorted(naive) + [-1] * (slots - len(naive))
    assert offsets[0] == (index < 0).sum()
    for slot, class_id in enumerate(classes):
        assert pairs[offsets[slot] : offsets[slot + 1]] == naive.get(class_id, [])
    assert sorted(pairs) == list(range(index.numel()))
    return found


@pytest.mark.parametrize(
    ("index", "num_classes"),
    [
        ([[0]], 1),
        ([[3, 1], [1, 3], [0, 1]], 5),
        ([[2, 2, 2], [2, 2, 2]], 3),  # one class
        ([[2, 2, 2], [2, 2, 2]], 10**9),  # more classes than pairs
        ([[4, 3, 2], [1, 0, 4]], 5),  # more pairs than classes, none missing
        ([[0, 1, 0], [1, 0, 1], [0, 0, 0]], 2),
        ([[-1, 3], [-5, 3], [0, -1]], 5),
        ([[-1, -1], [-1, -1]], 3),
        ([[-1, 0, 1], [2, 1, 0]], 3),  # a negative, and every slot in use
        ([[2**40, 7], [7, 2**40]], 2**41),
    ],
)
def test_examples(index: list[list[int]], num_classes: int, device: torch.device) -> None:
    check(torch.tensor(index, device=device), num_classes)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("num_classes", [0, 1, 5])
def test_empty(shape: tuple[int, int], num_classes: int, device: torch.device) -> None:
    found = check(torch.zeros(shape, dtype=torch.int64, device=device), num_classes)
    assert found.classes.numel() == 0
    assert found.indptr.tolist() == [0]


def test_pairs_of_a_class_rise(device: torch.device) -> None:
    """The order of every sum over them depends on nothing but the input."""
    found = inverted_index(torch.randint(3, (200, 50), device=device), 3)
    for slot in range(3):
        pairs = found.pairs[found.indptr[slot] : found.indptr[slot + 1]]
        assert pairs.numel() > 3000
        assert (pairs.diff() > 0).all()


def test_any_memory_layout(device: torch.device) -> None:
    index = torch.randint(-1, 6, (5, 8), device=device)
    expected = inverted_index(index, 6)
    for laid_out in (index.mT.contiguous().mT, index.repeat_interleave(2, 1)[:, ::2]):
        assert all(map(torch.equal, inverted_index(laid_out, 6), expected))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_index(data: st.DataObject, device: torch.device) -> None:
    num_classes = data.draw(st.integers(1, 12))
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    ids = st.integers(-2, num_classes - 1)
    index = data.draw(st.lists(ids, min_size=rows * columns, max_size=rows * columns))
    check(torch.tensor(index, device=device).view(rows, columns), num_classes)
