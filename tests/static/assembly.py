"""What a compiled kernel is made of, read from its machine code: registers, spills, products, loads."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")
AMD_WIDTHS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


@dataclass(frozen=True)
class Code:
    """The account of one kernel; instructions are counted where they stand, not as often as they run."""

    registers: int  # of a thread; on AMD of a lane, the accumulation registers among them
    stack: int  # bytes a thread: NVIDIA's stack frame, AMD's private segment
    local: int  # loads and stores of the stack; on AMD, if there are more, spilled vector registers
    scalar_spills: int  # AMD: scalar registers that live in lanes of vector registers, not in memory
    instructions: int
    tensor_core: dict[str, int]
    async_copies: int  # to shared memory; none on gfx942, where Triton's pipelines pass through registers
    narrowest_async_copy: int  # bits of a thread
    widest_load: int  # bits of a thread, of global memory to registers
    zero_additions: int  # NVIDIA: of a float and zero, fused with a product or not, which would keep the sign of a -0


def read(compiled: Any) -> Code:
    """Read what `triton.compile` returned."""
    return _amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia(compiled.asm["cubin"])


def _nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
    sass = disassembled(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    count = Counter(name.split(".")[0] for name in names)
    return Code(
        registers=int(found[1]),
        stack=int(found[2]),
        local=count["LDL"] + count["STL"],
        scalar_spills=0,
        instructions=len(names),
        tensor_core=_products(count),
        async_copies=count["LDGSTS"] + count["UTMALDG"],
        narrowest_async_copy=min((_bits(name) for name in names if name.startswith("LDGSTS")), default=0),
        widest_load=max((_bits(name) for name in names if name.startswith("LDG.")), default=0),
        zero_additions=len(re.findall(r"\bF(?:FMA|ADD)2?(?:\.\S+)? .*\bRZ\b", sass)),
    )


def disassembled(cubin: bytes) -> str:
    """The SASS of a compiled kernel, with labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output("nvdisasm", "-c", "-ndf", file.name)  # without data flow: sooner


def _output(tool: str, *arguments: str) -> str:
    (path,) = Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{tool}")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _bits(name: str) -> int:
    """Bits moved by one thread's NVIDIA load."""
    found = re.search(r"\.(?:LTC\d+B\.)?(?:[US])?(8|16|64|128)(?:\.|$)", name)
    return int(found[1]) if found else 32


def _amd(assembly: str) -> Code:
    names = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    form = r"^\t(?:global|buffer)_load_(lds_)?[us]?(byte|short|dword(?:x\d)?)(?:_d16(?:_hi)?)?\b(.*)"
    loads: dict[bool, list[int]] = {False: [], True: []}  # whether to shared memory
    for lds, width, rest in re.findall(form, assembly, re.MULTILINE):
        loads[bool(lds) or rest.endswith(" lds")].append(AMD_WIDTHS[width])

    def metadata(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", assembly, re.MULTILINE)
        assert found is not None, name
        return int(found[1])

    return Code(
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        local=max(sum(name.startswith("scratch_") for name in names), metadata("vgpr_spill_count")),
        scalar_spills=metadata("sgpr_spill_count"),
        instructions=len(names),
        tensor_core=_products(Counter(re.sub("^v_mfma.*", "v_mfma", name) for name in names)),
        async_copies=len(loads[True]),
        narrowest_async_copy=min(loads[True], default=0),
        widest_load=max(loads[False], default=0),
        zero_additions=0,
    )


def _products(count: Counter[str]) -> dict[str, int]:
    return {name: count[name] for name in TENSOR_CORE if count[name]}
