"""What the compiler makes of every kernel, for GPUs that need not be there: registers, spills, shared memory, SASS.

    python -m bench.static --arch 80 90 100

The launchers themselves decide what is compiled: they run on meta tensors with their kernels replaced by a recorder,
so that every signature and tile size is the one that a user's call would have.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qaconv_triton.kernels import config, cosine_topk, max_correlation
from qaconv_triton.kernels.edges import inverse_list
from qaconv_triton.kernels.panels import Panel

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPCODES = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "LDGSTS", "UTMALDG", "LDG", "STG", "LDL", "STL", "REDUX")


@dataclass(frozen=True)
class Case:
    """A launch to compile: what a user would call, at sizes that fix the shape class."""

    name: str
    module: Any
    launch: Callable[[], object]


@dataclass
class Report:
    """The compiler's account of one kernel on one target; memory in bytes, opcodes counted in the whole kernel."""

    case: str
    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    threads: int
    opcodes: dict[str, int]
    widest_load: int
    narrowest_async_load: int


def cases() -> Iterator[Case]:
    """Every kernel at the shapes that the library is tuned for, in half precision and fp32."""

    def maps(count: int, locations: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, locations, 512, dtype=dtype, device="meta")

    half, single = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    mixed = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))  # autocast, over an fp32 class table
    for dtype, table_dtype in (half, single, *mixed):
        for locations in (49, 192):
            shape = f"C=512 S={locations} {TYPES[dtype]}" + (
                f" on {TYPES[table_dtype]}" if dtype != table_dtype else ""
            )
            probe, table = maps(256, locations, dtype), maps(10_572, locations, table_dtype)
            index = torch.empty(256, 256, dtype=torch.int64, device="meta")
            group = torch.empty(256, dtype=torch.int64, device="meta")
            pooled = torch.empty(256, 256, 2 * locations, device="meta")
            argmax = pooled.to(torch.uint8)
            rnorm = torch.empty(10_572, locations, device="meta")
            edges = inverse_list(index, 10_572)

            def norms(table=table, edges=edges):  # type: ignore[no-untyped-def]
                return max_correlation.inverse_norms(table, edges)

            def forward(args=(probe, table, index, group, edges, rnorm, pooled, argmax)):  # type: ignore[no-untyped-def]
                return max_correlation._launch_forward(*args)

            def all_pairs(probe=probe, gallery=probe):  # type: ignore[no-untyped-def]
                return max_correlation.forward(probe, gallery, None, None, None, False)

            def match(probe=probe, gallery=probe, weight=pooled[0, 0]):  # type: ignore[no-untyped-def]
                return max_correlation.pair_sums(probe, gallery, None, None, None, False, weight)

            def probe_gradient(args=(pooled, argmax, rnorm, probe, table, index, edges)):  # type: ignore[no-untyped-def]
                return max_correlation.probe_gradient(*args)

            def gallery_gradient(args=(pooled, pooled, argmax, rnorm, probe, table, edges)):  # type: ignore[no-untyped-def]
                return max_correlation.gallery_gradient(*args, compact=False)

            yield Case(f"norms {shape}", max_correlation, norms)
            yield Case(f"class path forward {shape}", max_correlation, forward)
            if dtype == table_dtype:
                yield Case(f"all pairs forward {shape}", max_correlation, all_pairs)
                yield Case(f"all pairs match {shape}", max_correlation, match)
            yield Case(f"probe gradient {shape}", max_correlation, probe_gradient)
            yield Case(f"gallery gradient {shape}", max_correlation, gallery_gradient)
    meta, k, room = torch.device("meta"), 256, 1024
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (512, 25_088):
            rows = torch.empty(10_572, dim, dtype=dtype, device=meta)
            panel = Panel(rows, torch.empty(10_572, device=meta), 0)

            def graph(panel=panel, mirror=True):  # type: ignore[no-untyped-def]
                lists = cosine_topk.Lists(10_572, room, meta)
                tiling = config.cosine_topk(*panel.rows.shape[1:], panel.rows.element_size())
                walk = cosine_topk.Walk(k, room, tiling, lists.entries[:, :k], lists.bars, None)
                return walk.rounds(panel, panel, lists, lists if mirror else None)

            def search(graph=graph):  # type: ignore[no-untyped-def]
                return graph(mirror=False)

            yield Case(f"class graph D={dim} {TYPES[dtype]}", cosine_topk, graph)
            yield Case(f"gallery search D={dim} {TYPES[dtype]}", cosine_topk, search)
    for length in (512, 4096):
        lists = cosine_topk.Lists(10_572, length, meta)
        lists.longest = length

        def select(lists=lists):  # type: ignore[no-untyped-def]
            return lists.cut(k)

        yield Case(f"selection K={k} of {length}", cosine_topk, select)
    for k_nearest in (20, 256):
        entries = torch.empty(10_572, k_nearest, dtype=torch.int64, device=meta)

        def order(entries=entries):  # type: ignore[no-untyped-def]
            return cosine_topk.ordered(entries)

        yield Case(f"order of K={k_nearest}", cosine_topk, order)


class _Recorded(Exception):
    """Ends a launcher where its kernel would run: from there on it may want results."""


class _Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] | None = None
        self.options: dict[str, int] = {}
        self.constants: frozenset[str] = frozenset()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            self.constants = frozenset(constants)
            self.options = {"num_warps": num_warps, "num_stages": num_stages}
            raise _Recorded

        return launch


def record(case: Case) -> list[_Recorder]:
    """Run a case's launcher on meta tensors; the kernels it launched, with their arguments."""
    kernels = {name: value for name, value in vars(case.module).items() if isinstance(value, triton.JITFunction)}
    recorders = {name: _Recorder(kernel) for name, kernel in kernels.items()}
    with mock.patch.multiple(case.module, **recorders), suppress(_Recorded):
        case.launch()
    return [recorder for recorder in recorders.values() if recorder.arguments is not None]


def compile_for(recorder: _Recorder, target: GPUTarget) -> Any:
    """Compile a recorded launch with the specialisations that the runtime would choose."""
    assert recorder.arguments is not None
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(recorder.kernel.arg_names):
        value = recorder.arguments[name]
        is_special = not recorder.kernel.params[position].do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in recorder.constants or value is None or (value == 1 and is_special):
            signature[name] = "constexpr"
            constants[(position,)] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and is_special:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=recorder.options)


def _tool(name: str) -> str:
    (path,) = Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{name}")
    return str(path)


def report(case: Case, arch: int) -> Iterator[Report]:
    """Compile the kernels of a case for an NVIDIA `sm_<arch>` and read what came out."""
    with mock.patch.object(config, "generation", return_value=arch):
        recorders = record(case)
    for recorder in recorders:
        compiled = compile_for(recorder, GPUTarget("cuda", arch, 32))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = subprocess.run(
                [_tool("cuobjdump"), "-res-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
            sass = subprocess.run(
                [_tool("nvdisasm"), "-c", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
        loads = [_width(op) for op in operations if op.startswith("LDG.")]
        copies = [_width(op) for op in operations if op.startswith("LDGSTS")]
        yield Report(
            case=case.name,
            kernel=recorder.kernel.__name__,
            arch=arch,
            registers=int(found[1]),
            stack=int(found[2]),
            shared=compiled.metadata.shared,
            threads=32 * recorder.options["num_warps"],
            opcodes={name: sum(op.split(".")[0] == name for op in operations) for name in OPCODES},
            widest_load=max(loads, default=0),
            narrowest_async_load=min(copies, default=0),
        )


def _width(operation: str) -> int:
    """Bits moved by one thread's load."""
    found = re.search(r"\.(?:LTC\d+B\.)?(?:[US])?(8|16|64|128)(?:\.|$)", operation)
    return int(found[1]) if found else 32


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser("python -m bench static", description=main.__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    reports = [row for case in cases() for arch in options.arch for row in report(case, arch)]
    if options.json:
        json.dump([asdict(row) for row in reports], sys.stdout)
        return
    print("| case | sm | registers | stack | shared | tensor core | async copies (bits) | local |")
    print("|---|---|---|---|---|---|---|---|")
    for row in reports:
        count = row.opcodes
        tensor = next((f"{count[name]} {name}" for name in ("HGMMA", "UTCHMMA", "HMMA") if count[name]), "none")
        copies = f"{count['LDGSTS']} ({row.narrowest_async_load})" if count["LDGSTS"] else "none"
        print(
            f"| {row.case} | {row.arch} | {row.registers} | {row.stack} | {row.shared} | {tensor} | {copies} "
            f"| {count['LDL'] + count['STL']} |"
        )


if __name__ == "__main__":
    main()
