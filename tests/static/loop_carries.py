"""Variables that a loop of a kernel assigns and a later turn reads, but that Triton does not carry from turn to turn.

Triton's front end finds what a loop carries by comparing values before and after one turn. A variable that is an alias
of another at the loop's entry, and is made one again at the end of its body (`i_g = i_next_g` in both places), looks
unchanged: every turn then reads its first value. The interpreter runs such a kernel as it is written, so only the
compiler's own output shows the fault: the `iter_args` of the loop in TTIR, which are compared here with what the source
says.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any
from unittest import mock

from triton.compiler import code_generator

from . import launches


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: the line it begins on, counted from the kernel's first, and what it should carry."""

    kernel: str
    line: int
    expected: list[str]  # assigned in the body, and read in a later turn or behind the loop
    missing: list[str]  # of these, what the compiler does not carry


class _Lowered(Exception):
    """Ends a compilation behind its front end."""


def loops_of(recorder: launches.Recorder, arch: str) -> list[Loop]:
    """Every loop of a recorded launch, as compiled for `arch`."""
    kernel, constants = recorder.kernel, launches.specialised(recorder)[1]
    known = {kernel.arg_names[position]: value for (position,), value in constants.items()}
    expected = sorted(carried_in_source(kernel.src, known).items())
    carried = carried_in_ttir(_front_end_output(recorder, arch))
    assert len(expected) == len(carried), f"{kernel.__name__}: {len(expected)} loops, {len(carried)} in TTIR"
    return [
        Loop(kernel.__name__, line, sorted(names), sorted(names - found))
        for (line, names), found in zip(expected, carried, strict=True)
    ]


def _front_end_output(recorder: launches.Recorder, arch: str) -> str:
    """TTIR with the names of variables, which the passes behind the front end drop."""
    front_end = code_generator.ast_to_ttir

    def stop(*args: Any, **options: Any) -> None:
        raise _Lowered(str(front_end(*args, **options)))

    with (
        mock.patch.dict(os.environ, TRITON_ALWAYS_COMPILE="1"),
        mock.patch.object(code_generator, "ast_to_ttir", stop),
    ):
        try:
            launches.compile_for(recorder, arch)
        except _Lowered as found:
            return str(found)
    raise AssertionError("the compiler did not call its front end")


def carried_in_ttir(ttir: str) -> list[set[str]]:
    """The variables that each loop of the one kernel in `ttir` carries, in the order of the text."""
    kernel = re.search(r"tt\.func public .*?(?=\n  tt\.func |\Z)", ttir, re.DOTALL)
    assert kernel is not None, ttir
    found = []
    for line in re.findall(r".*scf\.(?:for|while).*", kernel[0]):
        arguments = re.search(r"(?:iter_args|scf\.while )\((.*?)\) (?:->|:)", line)
        names = re.findall(r"%([A-Za-z_]\w*?)(?:_\d+)? = ", arguments[1]) if arguments else []
        found.append(set(names))
    return found


def carried_in_source(source: str, constants: Mapping[str, object]) -> dict[int, set[str]]:
    """By the line of each loop in the function `source`: variables that it assigns and that are read after the turn.

    Args:
        source: of a kernel, from its `def` on.
        constants: values of constexpr arguments, which decide what code there is.
    """
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    liveness = _Liveness(constants)
    liveness.before_block(function.body, set())
    return liveness.carried


def _names(nodes: Iterable[ast.AST | None], context: type[ast.expr_context]) -> set[str]:
    return {
        each.id
        for node in nodes
        if node is not None
        for each in ast.walk(node)
        if isinstance(each, ast.Name) and isinstance(each.ctx, context)
    }


class _Liveness:
    """Which variables are live, from the last statement to the first; `carried` fills with loops by their line."""

    def __init__(self, constants: Mapping[str, object]) -> None:
        self.constants = dict(constants)
        self.carried: dict[int, set[str]] = {}

    def before_block(self, body: list[ast.stmt], live: set[str]) -> set[str]:
        """What is live before `body`, where `live` is behind it."""
        return reduce(lambda after, node: self._before(node, after), reversed(body), live)

    def _before(self, node: ast.stmt, live: set[str]) -> set[str]:
        if isinstance(node, ast.If):
            branches = self._branches(node)
            read = _names([node.test], ast.Load) if len(branches) > 1 else set()
            return read.union(*(self.before_block(branch, live) for branch in branches))
        if isinstance(node, (ast.For, ast.While)):
            return self._before_loop(node, live)
        changed = _names([node.target], ast.Store) if isinstance(node, ast.AugAssign) else set()
        return (live - _names([node], ast.Store)) | _names([node], ast.Load) | changed

    def _before_loop(self, node: ast.For | ast.While, live: set[str]) -> set[str]:
        own = _names([node.target], ast.Store) if isinstance(node, ast.For) else set()
        tested = _names([node.test], ast.Load) if isinstance(node, ast.While) else set()
        header, before = live | tested, None
        while header != before:
            before, header = header, live | tested | (self.before_block(node.body, header) - own)
        if isinstance(node, ast.While) or "static_range" not in ast.unparse(node.iter):  # which is unrolled
            self.carried[node.lineno] = (self._assigned(node.body) & header) - own
        return header | (_names([node.iter], ast.Load) if isinstance(node, ast.For) else set())

    def _assigned(self, body: list[ast.stmt]) -> set[str]:
        found: set[str] = set()
        for node in body:
            if isinstance(node, ast.If):
                inner = self._branches(node)
            elif isinstance(node, (ast.For, ast.While)):
                inner = [node.body]
                found |= _names([getattr(node, "target", None)], ast.Store)
            else:
                inner = []
                found |= _names([node], ast.Store)
            found = found.union(*(self._assigned(branch) for branch in inner))
        return found

    def _branches(self, node: ast.If) -> list[list[ast.stmt]]:
        """The branches that may be taken: one, if the condition is of constants only."""
        try:
            test = eval(compile(ast.Expression(node.test), "<kernel>", "eval"), {"__builtins__": {}}, self.constants)
        except NameError:
            return [node.body, node.orelse]
        return [node.body if test else node.orelse]
