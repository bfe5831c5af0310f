"""Sizes to measure, and which of them the command line names."""

import importlib
from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

OURS = "qaconv_triton"
OPS = {"graph": "bench.graph", "classes": "bench.scores", "pairs": "bench.scores"}  # with cases, build and providers
LETTERS = {"graph": "NDK", "classes": "BNKCHWM", "pairs": "PGCHW"}  # the sizes of a case; M samples of a class
TRAINING, MATCH = ("forward", "backward", "step"), ("match",)
PARTS = {"graph": ("",), "classes": TRAINING, "pairs": (*TRAINING, *MATCH)}


class Case(NamedTuple):
    """A size to measure; `only` names the providers, if not all of them."""

    op: str
    sizes: tuple[int, ...]
    parts: tuple[str, ...] = ("",)
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its sizes on the command line and in the results."""
        return "x".join(map(str, self.sizes))

    @property
    def module(self) -> ModuleType:
        """The module of its op."""
        return importlib.import_module(OPS[self.op])

    def measures(self, provider: str, wanted: Sequence[str]) -> bool:
        """Whether a provider takes part: one with some of the `wanted` texts in its name, or else one of the case."""
        return any(text in provider for text in wanted) if wanted else not self.only or provider in self.only


def select(cases: Sequence[Case], options: Namespace) -> list[Case]:
    """The cases of an op, their parts and dtype, as the command line names them.

    Raises:
        ValueError: the sizes make no case.
    """
    cases = [case for case in cases if case.op == options.op]
    if options.cases:
        listed = {case.name: case for case in reversed(cases)}
        cases = [listed.get(name) or _unlisted(options.op, name) for name in options.cases]
    if options.parts and options.op != "graph":  # a case that is named has any part, the others those that are listed
        cases = [
            case._replace(parts=tuple(part for part in options.parts if options.cases or part in case.parts))
            for case in cases
        ]
    if options.dtype:
        cases = [case._replace(dtype=getattr(torch, options.dtype)) for case in cases]
    distinct: dict[tuple[str, torch.dtype], Case] = {}
    for case in cases:
        distinct.setdefault((case.name, case.dtype), case)
    return list(distinct.values())


def _unlisted(op: str, name: str) -> Case:
    sizes = tuple(int(size) for size in name.split("x"))
    if len(sizes) != len(LETTERS[op]) or min(sizes) < 1:
        raise ValueError(f"{op}: expected a case {'x'.join(LETTERS[op])}, got {name!r}")
    return Case(op, sizes, PARTS[op])
