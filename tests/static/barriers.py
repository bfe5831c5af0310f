"""Which memory the threads of a program hand over to each other, and whether a barrier stands between: read from PTX.

A location that one thread stores and another loads needs a barrier between the two, in either order. PTX tells which
kernel argument an address is computed from; where its accesses lie on different sides of a barrier on every path
through the kernel, no thread can be ahead of another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_ACCESS = re.compile(r"(?:@!?%\w+ +)?(ld|st|cp\.async)\.\S*global\S*\s+(.*);")
_REGISTER = re.compile(r"%[a-z]+\d*")  # without a number in assembly of our own
_BRANCH = re.compile(r"(@!?%\w+ +)?bra(?:\.uni)?\s+(\$\w+);")


@dataclass
class _Step:
    """An instruction: what it may be followed by, and what it does to memory."""

    followers: list[int] = field(default_factory=list)
    is_barrier: bool = False
    kind: str = ""  # "ld" or "st", of global memory
    address: str = ""  # the register that holds it


@dataclass(frozen=True)
class HandOvers:
    """Arguments, by position, that point to memory a kernel both stores and loads; which of them lack a barrier."""

    shared: frozenset[int]
    unguarded: frozenset[int]


def hand_overs(ptx: str) -> HandOvers:
    """Read the one kernel of `ptx`."""
    names = re.findall(r"\.param \.u64 \.ptr\S* .*?(\w+),?$", ptx, re.MULTILINE)
    pointers = {name: int(name.rsplit("_", 1)[1]) for name in names}
    body = ptx[ptx.index("\n{") :]
    steps, sources = _parsed(body, pointers)
    of_argument: dict[int, dict[str, list[int]]] = {}
    for number, step in enumerate(steps):
        for pointer in _pointers(step.address, sources):
            of_argument.setdefault(pointer, {"ld": [], "st": []})[step.kind].append(number)
    both = {pointer: found for pointer, found in of_argument.items() if found["ld"] and found["st"]}
    unguarded = {
        pointer
        for pointer, found in both.items()
        if _meet(steps, found["st"], found["ld"]) or _meet(steps, found["ld"], found["st"])
    }
    return HandOvers(frozenset(both), frozenset(unguarded))


def _parsed(body: str, pointers: dict[str, int]) -> tuple[list[_Step], dict[str, set[str | int]]]:
    """The instructions of a kernel, and what each register is computed from: registers, or pointers by position."""
    steps: list[_Step] = []
    sources: dict[str, set[str | int]] = {}
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in body.splitlines():
        text = line.split("//")[0].strip()
        if label := re.fullmatch(r"(\$\w+):", text):
            labels[label[1]] = len(steps)
            continue
        if not text.endswith(";") or text.startswith("."):
            continue
        step, number = _Step(), len(steps)
        branch, access = _BRANCH.fullmatch(text), _ACCESS.fullmatch(text)
        if branch:
            jumps.append((number, branch[2]))
        if not (branch and not branch[1]) and text != "ret;":
            step.followers.append(number + 1)
        step.is_barrier = text.startswith(("bar.sync", "barrier.sync"))
        if access:
            step.kind = "st" if access[1] == "st" else "ld"
            step.address = _REGISTER.findall(re.findall(r"\[(.*?)\]", access[2])[-1])[0]
        else:  # what is loaded from memory is a value, no pointer
            written, _, read = text.partition(",")
            from_pointers = {pointers[name] for name in re.findall(r"\[(\w+)\]", read) if name in pointers}
            for register in _REGISTER.findall(written)[-1:]:
                sources.setdefault(register, set()).update(_REGISTER.findall(read), from_pointers)
        steps.append(step)
    steps.append(_Step())
    for number, label in jumps:
        steps[number].followers.append(labels[label])
    return steps, sources


def _pointers(register: str, sources: dict[str, set[str | int]]) -> set[int]:
    """The pointers among the kernel's arguments that a register is computed from."""
    found, seen, waiting = set(), set(), [register]
    while waiting:
        for source in sources.get(waiting.pop(), ()):
            if isinstance(source, int):
                found.add(source)
            elif source not in seen:
                seen.add(source)
                waiting.append(source)
    return found


def _meet(steps: list[_Step], first: list[int], second: list[int]) -> bool:
    """Whether a path without a barrier leads from an instruction of `first` to one of `second`."""
    ends, seen = set(second), set()
    waiting = [follower for number in first for follower in steps[number].followers]
    while waiting:
        number = waiting.pop()
        if number in seen or steps[number].is_barrier:
            continue
        if number in ends:
            return True
        seen.add(number)
        waiting.extend(steps[number].followers)
    return False
