"""PTX as Triton writes it, parsed: the instructions of one kernel.

Registers and labels of inline assembly, which are declared within braces, get names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

REGISTER_TYPES = {f"{letter}{bits}": f"uint{bits}_t" for letter in "bfsu" for bits in (16, 32, 64)}
REGISTER_TYPES["pred"] = "uint8_t"
WARP_OPCODES = ("shfl.", "redux.", "mma.", "ldmatrix.", "bar.", "cp.async.commit_group", "cp.async.wait_group")


class UnknownInstruction(Exception):
    """PTX that the translation does not know."""


@dataclass(frozen=True)
class Instruction:
    """One statement, with the names of its registers and labels made unique."""

    line: int
    guard: str  # a predicate's register, "!" before it if it is negated; or nothing
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"line {self.line}: {guard}{self.opcode} {', '.join(self.operands)};"

    @property
    def parts(self) -> list[str]:
        """The opcode's."""
        return self.opcode.split(".")

    @property
    def is_branch(self) -> bool:
        """Whether it jumps, to the label that is its operand."""
        return self.parts[0] == "bra"

    @property
    def is_of_warp(self) -> bool:
        """Whether a warp runs it as a whole."""
        return self.opcode.startswith(WARP_OPCODES)

    @cached_property
    def written(self) -> frozenset[str]:
        """Registers that it writes."""
        if self.parts[0] in ("st", "bra", "ret", "bar", "cp"):
            return frozenset()
        return frozenset(registers(self.operands[0]))

    @cached_property
    def named(self) -> frozenset[str]:
        """All registers in it."""
        return frozenset(name for text in (self.guard, *self.operands) for name in registers(text))


@dataclass
class Kernel:
    """Instructions, the places of labels that they jump to, and registers with their types in C++."""

    name: str
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)


def registers(operand: str) -> list[str]:
    """The registers in an operand, but for special ones: %tid.x."""
    return re.findall(r"%\w+(?![\w.])", operand)


def name_of(ptx: str) -> str:
    """The name of the kernel."""
    return _entry(ptx)[1]


def _entry(ptx: str) -> re.Match[str]:
    entry = re.search(r"\.entry (\w+)\(([^)]*)\)[^{]*\{", ptx)
    if entry is None:
        raise UnknownInstruction("there is no kernel")
    return entry


def parse(ptx: str) -> Kernel:
    """Parse the one kernel of `ptx`."""
    entry = _entry(ptx)
    kernel = Kernel(entry[1], re.findall(r"(\w+)\s*(?:,|$)", entry[2].strip()))
    scopes = [""]  # what is appended to names of this scope and of those around it
    declared: list[dict[str, str]] = [{}]
    ranges: dict[str, str] = {}
    labels: dict[str, int] = {}
    count = 0

    def unique(match: re.Match[str]) -> str:
        name = match[0]
        return next((found[name] for found in reversed(declared) if name in found), name)

    statements = list(_statements(ptx, entry.end()))
    for number, (line, text) in enumerate(statements):
        if text == "{":
            count += 1
            scopes.append(f"_{count}")
            inside = takewhile(lambda each: each[1] != "}", statements[number:])  # scopes hold no other scopes
            declared.append({each[:-1]: each[:-1] + scopes[-1] for _, each in inside if each.endswith(":")})
        elif text == "}":
            scopes.pop()
            declared.pop()
        elif found := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*);", text):
            for name in re.split(r"\s*,\s*", found[2]):
                if ranged := re.fullmatch(r"(%\w+)<\d+>", name):
                    ranges[ranged[1]] = REGISTER_TYPES[found[1]]
                else:
                    declared[-1][name] = name + scopes[-1]
                    kernel.types[name + scopes[-1]] = REGISTER_TYPES[found[1]]
        elif text.endswith(":"):
            labels[re.sub(r"\$\w+", unique, text[:-1])] = len(kernel.instructions)
        elif found := re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*);", re.sub(r"[%$]\w+", unique, text)):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[3])
            kernel.instructions.append(Instruction(line, found[1] or "", found[2], tuple(map(str.strip, operands))))
        else:
            raise UnknownInstruction(f"line {line}: {text}")
    for instruction in kernel.instructions:
        if instruction.is_branch:
            kernel.labels[instruction.operands[0]] = labels[instruction.operands[0]]
        for name in instruction.named - kernel.types.keys():
            if name.rstrip("0123456789") not in ranges:
                raise UnknownInstruction(str(instruction))
            kernel.types[name] = ranges[name.rstrip("0123456789")]
    return kernel


def _statements(ptx: str, start: int) -> Iterator[tuple[int, str]]:
    """Statements, labels and braces from `start`, within a kernel's braces, to the end of these, with their lines."""
    depth, first = 1, ptx.count("\n", 0, start) + 1
    for line, text in enumerate(ptx[start:].splitlines(), first):
        text = text.split("//")[0].strip()
        if text.startswith((".loc", ".pragma")):
            continue
        while found := re.match(r"([{}]|[$\w]+:|[^;]*;)\s*", text):
            depth += (found[1] == "{") - (found[1] == "}")
            if depth == 0:
                return
            yield line, found[1]
            text = text[found.end() :]
        if text:
            raise UnknownInstruction(f"line {line}: {text}")
