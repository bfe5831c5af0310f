"""Pairwise test cases: fewer than the full product of parameters, yet every two values of two occur together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product


def pairwise(*axes: Sequence[object]) -> list[tuple[object, ...]]:
    """The case that covers most of the pairs that are left, again and again; the same cases in every run."""

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
        return set(combinations(enumerate(case), 2))  # type: ignore[arg-type]

    cases = list(product(*(range(len(axis)) for axis in axes)))
    left = set().union(*map(pairs, cases))
    kept = []
    while left:
        kept.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(kept[-1])
    return [tuple(axis[place] for axis, place in zip(axes, case, strict=True)) for case in kept]
