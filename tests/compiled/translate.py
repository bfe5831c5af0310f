"""PTX for sm_80 translated to C++ that runs on the CPU.

Most instructions become calls of functions of instructions.h, which are named as they are. A kernel is cut into
segments: what lanes run by themselves becomes a loop over lanes, with jumps inside; an instruction that a warp runs as
a whole stands alone. An instruction that is not known is an error.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from .ptx import Instruction, Kernel, UnknownInstruction, parse, registers

TYPES = {
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"{letter}{bits}": f"uint{bits}_t" for letter in "bu" for bits in (8, 16, 32, 64)},
    "f32": "float", "f16": "f16", "bf16": "bf16", "pred": "bool",
}  # fmt: skip
# Instructions of one result, by name without what does not matter here, with the kinds of their operands: t of the
# instruction's type, u of 32 bits, p a predicate, w of twice the size.
SIMPLE = {
    "mov": "t", "add": "tt", "sub": "tt", "mul": "tt", "mad": "ttt", "fma": "ttt", "mul.hi": "tt", "mul.wide": "tt",
    "mad.wide": "ttw", "div": "tt", "rem": "tt", "sqrt": "t", "rsqrt": "t", "rcp": "t", "ex2": "t", "lg2": "t",
    "neg": "t", "abs": "t", "min": "tt", "max": "tt", "min.NaN": "tt", "max.NaN": "tt", "and": "tt", "or": "tt",
    "xor": "tt", "not": "t", "shl": "tu", "shr": "tu", "selp": "ttp", "popc": "t", "clz": "t", "bfe": "tuu",
    "prmt": "ttt",
}  # fmt: skip
ROUNDING = {"lo", "rn", "full", "approx"}  # to the nearest, for all that is approximate; no flushing of denormals
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
LOGIC = {"and": "&", "or": "|", "xor": "^"}
ORDERING = {"relaxed", "acquire", "release", "acq_rel", "weak", "volatile", "gpu", "cta", "sys", "nc"}
CACHING = re.compile(r"L[12]::evict_\w+|L1::no_allocate|L2::\d+B|c[agsv]|wb")
ATOMICS = {
    "add": "before + {0}", "and": "before & {0}", "or": "before | {0}", "xor": "before ^ {0}", "exch": "{0}",
    "min": "op_min(before, {0})", "max": "op_max(before, {0})", "cas": "before == {0} ? {1} : before",
}  # fmt: skip
PRODUCTS = {"m16n8k16 f16": "mma_16<f16>", "m16n8k16 bf16": "mma_16<bf16>", "m16n8k8 tf32": "mma_8"}
SPECIAL = {"%tid.x": "(w.number * LANES + lane)", "%tid.y": "0u", "%tid.z": "0u", "global_smem": "0u"}
SPECIAL |= {f"%ctaid.{axis}": f"w.program->ctaid[{i}]" for i, axis in enumerate("xyz")}
SPECIAL |= {f"%nctaid.{axis}": f"w.program->nctaid[{i}]" for i, axis in enumerate("xyz")}
EACH_LANE = "for (uint32_t lane = 0; lane < LANES; ++lane)"


def translate(ptx: str) -> str:
    """The C++ of the kernel in `ptx`.

    Raises:
        UnknownInstruction: with the line.
    """
    return Translation(parse(ptx)).source()


class Translation:
    """The C++ of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.starts = self._segment_starts()
        self.local = self._local_registers()

    def source(self) -> str:
        """All of it."""
        kept = sorted(self.kernel.types.keys() - self.local)
        fields = "".join(f"    {self.kernel.types[name]} {_plain(name)}[LANES];\n" for name in kept)
        segments = range(len(self.starts))
        table = "".join(
            f"    {{{self._kind(number)}, {self._first(number).line}, s{number}}},\n" for number in segments
        )
        return (
            f'#include "runtime.h"\nstruct Registers {{\n{fields}}};\nstruct Warp : WarpState, Registers {{}};\n'
            + "".join(map(self._function, segments))
            + f"static const Segment<Warp> segments[] = {{\n{table}}};\n"
            'extern "C" int run(const Launch *launch, char *message, size_t message_bytes) {\n'
            "    return run_grid<Registers>(segments, *launch, message, message_bytes);\n}\n"
        )

    def _segment_starts(self) -> list[int]:
        """Where segments begin: a jump from one to another leads to a beginning."""
        instructions, labels = self.kernel.instructions, self.kernel.labels
        starts, jumps = {0}, []
        for number, instruction in enumerate(instructions):
            if instruction.is_of_warp:
                starts |= {number, number + 1}
            if instruction.is_branch:
                jumps.append((number, labels[instruction.operands[0]]))
        while True:
            ordered = sorted(starts)
            found = {end for start, end in jumps if bisect_right(ordered, start) != bisect_right(ordered, end)}
            if found <= starts:
                return [start for start in ordered if start < len(instructions)]
            starts |= found

    def _segment(self, number: int) -> int:
        return bisect_right(self.starts, number) - 1

    def _local_registers(self) -> set[str]:
        """Registers that hold nothing from one segment to another, or from one visit to the next.

        They are of a scope within a segment, or they occur, first written, where no jump leads away and no label lies.
        """
        ends = {*self.starts, *self.kernel.labels.values()}
        block, homes, kept = 0, dict[str, int](), set[str]()
        for number, instruction in enumerate(self.kernel.instructions):
            block += number in ends
            read = {name for text in instruction.operands[1:] for name in registers(text)}
            for name in instruction.named:
                is_scoped = "_" in name
                home = self._segment(number) if is_scoped else block
                is_written = name in instruction.written and name not in read and not instruction.guard
                if name not in homes and not (is_scoped or is_written):
                    kept.add(name)
                if homes.setdefault(name, home) != home or instruction.is_of_warp:
                    kept.add(name)
            block += instruction.is_branch
        return self.kernel.types.keys() - kept

    def _first(self, number: int) -> Instruction:
        return self.kernel.instructions[self.starts[number]]

    def _kind(self, number: int) -> str:
        first = self._first(number)
        if first.parts[0] == "bar":
            return "WARP" if first.opcode == "bar.warp.sync" else "BARRIER"
        return "WARP" if first.is_of_warp else "LANE"

    def _function(self, number: int) -> str:
        """A segment."""
        start, end = self.starts[number], [*self.starts, len(self.kernel.instructions)][number + 1]
        instructions = self.kernel.instructions[start:end]
        if instructions[0].is_of_warp:
            return f"static void s{number}(Warp &w, uint32_t) {{\n    {self._statement(instructions[0], number)}\n}}\n"
        local = sorted({name for each in instructions for name in each.named} & self.local)
        lines = [f"{self.kernel.types[name]} {_plain(name)} = {self.kernel.types[name]}(POISON);" for name in local]
        ends = {self.kernel.labels[each.operands[0]] for each in instructions if each.is_branch}
        for position, instruction in enumerate(instructions, start):
            if position in ends and position > start:
                lines.append(f"L{position}:;")
            guard = f"if ({self._operand(instruction.guard, 'bool')}) " if instruction.guard else ""
            lines.append(f"{guard}{{ {self._statement(instruction, number)} }}")
        body = "\n        ".join(lines)
        return (
            f"static void s{number}(Warp &w, uint32_t lanes) {{\n    {EACH_LANE} {{\n"
            f"        if (!(lanes >> lane & 1)) continue;\n        w.lane = lane;\n        {body}\n"
            f"        w.place[lane] = {number + 1};\n    }}\n}}\n"
        )

    def _statement(self, instruction: Instruction, segment: int) -> str:
        try:
            if instruction.is_of_warp:
                return self._of_warp(instruction)
            if instruction.is_branch:
                end = self.kernel.labels[instruction.operands[0]]
                is_inside = self._segment(end) == segment and end != self.starts[segment]
                return f"goto L{end};" if is_inside else f"w.place[lane] = {self._segment(end)}; continue;"
            return self._of_lane(instruction)
        except (KeyError, ValueError) as error:  # of a table, or of other operands than expected
            raise UnknownInstruction(str(instruction)) from error

    def _operand(self, text: str, kind: str = "") -> str:
        """An operand's bits, or its value as a C++ type `kind`."""
        if text.startswith("!"):
            found = "!" + self._operand(text[1:])
        elif text in SPECIAL:
            found = SPECIAL[text]
        elif text in self.kernel.types:
            found = _plain(text) if text in self.local else f"w.{_plain(text)}[lane]"
        elif text.startswith("0f"):
            found = f"0x{text[2:]}u"
        else:
            found = f"{int(text.rstrip('U'), 0) % 2**64:#x}ull"
        return f"as<{kind}>({found})" if kind else found

    def _address(self, text: str, kind: str) -> str:
        """The address in brackets."""
        base, _, offset = text.strip("[] ").partition("+")
        return f"{self._operand(base.strip(), kind)} + {self._operand(offset.strip() or '0', kind)}"

    # --- instructions that a lane runs by itself

    def _of_lane(self, instruction: Instruction) -> str:
        name, *modifiers = instruction.parts
        if name == "ret":
            return "w.place[lane] = EXIT; continue;"
        if name in ("ld", "st", "atom"):
            return self._memory(instruction)
        if name == "cp":
            return self._copy(instruction)
        if name == "setp":
            return self._comparison(instruction)
        if name == "cvt":
            return self._conversion(instruction)
        if name == "mov" and "{" in "".join(instruction.operands):
            return self._packing(instruction)
        *between, kind = modifiers
        name = ".".join([name, *(each for each in between if each not in ROUNDING)])
        if name in ("mov", "selp"):  # bits alone
            kind = kind.replace("f", "b")
        type_ = TYPES[kind]
        of_kind = {"t": type_, "u": "uint32_t", "p": "bool", "w": f"Wide<{type_}>"}
        target, *operands = instruction.operands
        pairs = zip(operands, SIMPLE[name], strict=True)
        values = ", ".join(self._operand(text, of_kind[each]) for text, each in pairs)
        return f"{self._operand(target)} = put(op_{name.replace('.', '_')}<{type_}>({values}));"

    def _comparison(self, instruction: Instruction) -> str:
        _, comparison, *combination, kind = instruction.parts
        target, first, second, *third = instruction.operands
        if comparison not in COMPARISONS:
            raise ValueError(comparison)
        value = f"is_{comparison}({self._operand(first, TYPES[kind])}, {self._operand(second, TYPES[kind])})"
        for logic, text in zip(combination, third, strict=True):
            value = f"{value} {LOGIC[logic]} {self._operand(text, 'bool')}"
        return f"{self._operand(target)} = {value};"

    def _conversion(self, instruction: Instruction) -> str:
        _, *rounding, to, source = instruction.parts
        target, *operands = instruction.operands
        values = ", ".join(self._operand(text, TYPES[source]) for text in operands)
        if to.endswith("x2") and rounding == ["rn"]:
            function = f"op_cvt_x2<{TYPES[to[:-2]]}>"
        elif (to, rounding) == ("tf32", ["rna"]):
            function = "op_cvt_rna_tf32"
        elif rounding in ([], ["rn"] if "f" in to else ["rzi"]):
            function = f"op_cvt<{TYPES[to]}>"
        else:
            raise ValueError(rounding)
        return f"{self._operand(target)} = put({function}({values}));"

    def _packing(self, instruction: Instruction) -> str:
        """`mov` of a register to two of half its size, or back."""
        target, source = instruction.operands
        bits = int(instruction.parts[1][1:]) // 2
        if target.startswith("{"):
            low, high = _elements(target)
            parts = [(name, shift) for name, shift in ((low, 0), (high, bits)) if name != "_"]
            return " ".join(f"{self._operand(name)} = {self._operand(source)} >> {shift};" for name, shift in parts)
        low, high = (self._operand(name, f"uint{bits}_t") for name in _elements(source))
        return f"{self._operand(target)} = {low} | uint{2 * bits}_t({high}) << {bits};"

    def _memory(self, instruction: Instruction) -> str:
        name, *modifiers, kind = instruction.parts
        matters = [each for each in modifiers if each not in ORDERING and not CACHING.fullmatch(each)]
        space, type_, line = matters.pop(0), TYPES[kind], instruction.line
        if space == "param":
            target, source = instruction.operands
            return (
                f"{self._operand(target)} = {type_}(w.program->params[{self.kernel.parameters.index(source[1:-1])}]);"
            )
        wide = {"global": "uint64_t", "shared": "uint32_t"}[space]
        if name == "atom":
            target, address, *values = instruction.operands
            (operation,) = matters
            change = ATOMICS[operation].format(*(self._operand(text, type_) for text in values))
            value = f"[&]({type_} before) {{ return {change}; }}"
            if space != "global":
                raise ValueError(space)
            place = self._address(address, wide)
            return f"{self._operand(target)} = put(atomic<{type_}>(w, {place}, {value}, {line}));"
        address, vector = instruction.operands if name == "st" else instruction.operands[::-1]
        names, place = _elements(vector), self._address(address, wide)
        if matters != ([f"v{len(names)}"] if len(names) > 1 else []):
            raise ValueError(matters)
        if name == "ld":
            found = " ".join(f"{self._operand(each)} = put(found[{i}]);" for i, each in enumerate(names))
            return f"auto found = load_{space}<{type_}, {len(names)}>(w, {place}, {line}); {found}"
        given = ", ".join(self._operand(each, type_) for each in names)
        return f"store_{space}<{type_}, {len(names)}>(w, {place}, {{{given}}}, {line});"

    def _copy(self, instruction: Instruction) -> str:
        """`cp.async`."""
        if instruction.opcode not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
            raise ValueError(instruction.opcode)
        target, source, size, *used = instruction.operands
        (read,) = used or [size]
        to, start = self._address(target, "uint32_t"), self._address(source, "uint64_t")
        sizes = f"{self._operand(size, 'uint32_t')}, {self._operand(read, 'uint32_t')}"
        return f"copy_async(w, {to}, {start}, {sizes}, {instruction.line});"

    # --- instructions that a warp runs as a whole

    def _of_warp(self, instruction: Instruction) -> str:
        opcode, operands, line = instruction.opcode, instruction.operands, instruction.line
        if instruction.guard:
            raise ValueError(instruction.guard)
        if (opcode, *operands) in (("bar.sync", "0"), ("bar.warp.sync", "-1")):
            return ""
        if opcode == "cp.async.commit_group":
            return "commit_group(w);"
        if opcode == "cp.async.wait_group":
            return f"wait_group(w, {int(operands[0])});"
        if found := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", opcode):
            target, value, by, bounds, members = operands
            source = f"shuffle_source({found[1]}, lane, {self._operand(by)}, {self._operand(bounds)})"
            loop = f"{EACH_LANE} found[lane] = {self._array(value)}[{source}];"
            copy = f"memcpy({self._array(target)}, found, sizeof found);"
            return f"{self._members(members, line)} Register found; {loop} {copy}"
        if found := re.fullmatch(r"redux\.sync\.(add|min|max|and|or|xor)\.([bsu]32)", opcode):
            target, value, members = operands
            total = f"reduced({self._array(value)}, op_{found[1]}<{TYPES[found[2]]}>)"
            return f"{self._members(members, line)} std::fill_n({self._array(target)}, LANES, {total});"
        if found := re.fullmatch(r"mma\.sync\.aligned\.(\w+)\.row\.col\.f32\.(\w+)\.\2\.f32", opcode):
            target, left, right, sums = map(self._arrays, operands)
            return f"{PRODUCTS[f'{found[1]} {found[2]}']}({target}, {left}, {right}, {sums});"
        if found := re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", opcode):
            target, address = operands
            loop = f"{EACH_LANE} at[lane] = {self._address(address, 'uint32_t')};"
            load = f"load_matrices<{found[1]}, {'true' if found[2] else 'false'}>"
            return f"Register at; {loop} {load}(w, {self._arrays(target)}, at, {line});"
        raise ValueError(opcode)

    def _members(self, mask: str, line: int) -> str:
        """A check that all lanes take part."""
        return f"{EACH_LANE} check_members({self._operand(mask, 'uint32_t')}, {line});"

    def _array(self, register: str) -> str:
        """A register of all lanes."""
        if register not in self.kernel.types:
            raise ValueError(register)
        return f"w.{_plain(register)}"

    def _arrays(self, vector: str) -> str:
        return "{" + ", ".join(f"&{self._array(name)}" for name in _elements(vector)) + "}"


def _elements(vector: str) -> list[str]:
    """The registers of a vector in braces, or the one register."""
    return [name.strip() for name in vector.strip("{} ").split(",")]


def _plain(register: str) -> str:
    """The C++ name of a register."""
    return register[1:]
