"""What the compiler makes of every kernel, for GPUs that need not be there: registers, spills, shared memory, loads.

    python -m bench static                           every kernel as shipped, for every architecture
    python -m bench static --arch 90 --all-configs   with what autotuning may choose from, of the main shapes
    python -m bench static --save                    all of this, to the tables under bench/results/static/
    python -m bench static --keys                    what a new batch size, number of classes or K compiles anew
    python -m bench static --times                   what the first call of a kernel waits for its compilation

The launchers themselves decide what is compiled: they run on meta tensors with their kernels replaced by a recorder,
so that every signature and tile size is the one that a user's call would have.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qaconv_triton.common.chunks import Chunk
from qaconv_triton.common.inverted_index import inverted_index
from qaconv_triton.kernels import config, max_correlation, topk_kernels, topk_search, tuning

from . import assembly, barriers, measure, table

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
MAIN = ("C=512 S=49 bf16", "C=512 S=49 fp32", "class graph D=512 bf16", "class graph D=25088 bf16")
TILES = ("BS", "BR", "BC", "RESIDENT", "BM", "BN", "BD", "GROUP", "BL", "BK")
TABLES = table.RESULTS / "static" / f"triton-{triton.__version__}"  # other compilers make other code
BATCHES, NEIGHBORS, CLASSES = (1, 16, 17, 48, 256), (1, 19, 20, 256), (1, 1000, 10_572)
TIMED = 3  # compilations of a kernel


@dataclass(frozen=True)
class Case:
    """A launch to compile: what a user would call, at sizes that fix the shape class."""

    name: str
    module: Any
    launch: Callable[[], object]
    launches_before: int = 0  # of the same kernel

    @property
    def is_main(self) -> bool:
        """Whether it is of a shape that the library is tuned for above all."""
        return self.name.endswith(MAIN)


@dataclass(frozen=True)
class Report:
    """The compiler's account of one kernel on one target; memory in bytes, instructions counted in the whole kernel."""

    case: str
    kernel: str
    arch: str
    configuration: str
    is_shipped: bool
    verdict: str  # "kept", or why it is pruned
    shared: int
    threads: int
    seconds: float  # to compile it, if it did not come from Triton's cache
    registers: int = 0
    stack: int = 0
    local: int = 0
    scalar_spills: int = 0
    instructions: int = 0
    tensor_core: str = ""
    async_copies: int = 0
    narrowest_async_copy: int = 0
    widest_load: int = 0
    zero_additions: int = 0
    handed_over: tuple[str, ...] = ()  # NVIDIA: arguments that point to memory which is both stored and loaded
    unguarded: tuple[str, ...] = ()  # of these, where no barrier keeps the threads in step


COLUMNS = (
    "configurations", "case", "kernel", "configuration", "verdict", "registers", "stack", "local", "scalar_spills",
    "shared", "threads", "instructions", "tensor_core", "async_copies", "narrowest_async_copy", "widest_load", "triton",
)  # fmt: skip


def cases(batch: int = 256, neighbors: int = 256, classes: int = 10_572) -> Iterator[Case]:
    """Every kernel at the shapes that the library is tuned for, in half precision and fp32.

    Args:
        batch: feature maps in a batch, P.
        neighbors: of a map or of a class, K; or maps that a batch is matched with.
        classes: in the class table, G or N.
    """

    def maps(count: int, locations: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, locations, 512, dtype=dtype, device="meta")

    half, single = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    mixed = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))  # autocast, over an fp32 class table
    for dtype, table_dtype in (half, single, *mixed, (torch.float16, torch.float16)):
        for locations in (49, 192):
            shape = f"C=512 S={locations} {TYPES[dtype]}" + (
                f" on {TYPES[table_dtype]}" if dtype != table_dtype else ""
            )
            probe, gallery = maps(batch, locations, dtype), maps(neighbors, locations, dtype)
            class_table = maps(classes, locations, table_dtype)
            index = torch.empty(batch, neighbors, dtype=torch.int64, device="meta")
            group = torch.empty(batch, dtype=torch.int64, device="meta")
            pooled = torch.empty(batch, neighbors, 2 * locations, device="meta")
            argmax = pooled.to(torch.uint8)
            weight = torch.empty(2 * locations, device="meta")
            inverted = inverted_index(index, classes)
            rnorm = torch.empty(len(inverted.classes), locations, device="meta")

            def norms(class_table=class_table, inverted=inverted):  # type: ignore[no-untyped-def]
                return max_correlation.inverse_norms(class_table, inverted)

            def forward(args=(probe, class_table, index, group, inverted, rnorm, pooled, argmax)):  # type: ignore[no-untyped-def]
                return max_correlation._launch_forward(*args)

            def all_pairs(probe=probe, gallery=gallery):  # type: ignore[no-untyped-def]
                return max_correlation.max_correlation(probe, gallery, None, None, None, False)

            def match(probe=probe, gallery=gallery, weight=weight):  # type: ignore[no-untyped-def]
                return max_correlation.pair_sums(probe, gallery, None, None, False, weight)

            def probe_gradient(args=(pooled, argmax, rnorm, probe, class_table, index, inverted)):  # type: ignore[no-untyped-def]
                return max_correlation.probe_gradient(*args)

            def gallery_gradient(args=(pooled, pooled, argmax, rnorm, probe, class_table, inverted)):  # type: ignore[no-untyped-def]
                return max_correlation.gallery_gradient(*args, compact=False)

            if dtype == table_dtype == torch.float16:  # has code of its own in one kernel
                if locations == 49:
                    yield Case(f"probe gradient {shape}", max_correlation, probe_gradient)
                continue

            none = torch.empty(0, device="meta")
            of_pairs = (argmax, none, probe, gallery)  # prepared maps: no norms
            sums = torch.empty(batch, neighbors, device="meta")

            def pairs_to_probe(args=(pooled, *of_pairs, None, None)):  # type: ignore[no-untyped-def]
                return max_correlation.probe_gradient(*args)

            def pairs_to_gallery(args=(pooled, pooled, *of_pairs, None)):  # type: ignore[no-untyped-def]
                return max_correlation.gallery_gradient(*args, compact=False)

            def sparse(args=(pooled, pooled, argmax, rnorm, probe, class_table, inverted)):  # type: ignore[no-untyped-def]
                return max_correlation.gallery_gradient(*args, compact=True)

            def scores(args=(probe, class_table, index, group, inverted, rnorm), weight=weight, sums=sums):  # type: ignore[no-untyped-def]
                return max_correlation._launch_forward(*args, weight=weight, sums=sums)

            if locations == 49 and dtype == table_dtype:
                yield Case(f"all pairs probe gradient {shape}", max_correlation, pairs_to_probe)
                yield Case(f"all pairs gallery gradient {shape}", max_correlation, pairs_to_gallery)
            if locations == 49 and dtype != torch.float16:
                yield Case(f"class path scores alone {shape}", max_correlation, scores)
                yield Case(f"sparse gallery gradient {shape}", max_correlation, sparse)
            if locations == 49 and dtype != torch.float16 and table_dtype == torch.float32:  # norms out of range
                yield Case(f"class path forward, normalised first, {shape}", max_correlation, forward, 1)
                yield Case(f"probe gradient, normalised first, {shape}", max_correlation, probe_gradient, 1)
            yield Case(f"norms {shape}", max_correlation, norms)
            yield Case(f"class path forward {shape}", max_correlation, forward)
            if dtype == table_dtype:
                yield Case(f"all pairs forward {shape}", max_correlation, all_pairs)
                yield Case(f"all pairs match {shape}", max_correlation, match)
            yield Case(f"probe gradient {shape}", max_correlation, probe_gradient)
            yield Case(f"gallery gradient {shape}", max_correlation, gallery_gradient)
    meta, capacity = torch.device("meta"), 4 * neighbors
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (512, 25_088):
            rows = torch.empty(classes, dim, dtype=dtype, device=meta)
            chunk = Chunk(rows, torch.empty(classes, device=meta), 0)

            def graph(chunk=chunk, mirror=True):  # type: ignore[no-untyped-def]
                buffer = topk_kernels.CandidateBuffer(classes, capacity, meta)
                best = buffer.candidates[:, :neighbors]

                def run(tiling):  # type: ignore[no-untyped-def]
                    search = topk_search.TopKSearch(neighbors, capacity, tiling, best, buffer.thresholds, None)
                    return search.search_tiles(chunk, chunk, buffer, buffer if mirror else None)

                shape = chunk.rows.shape[1], chunk.rows.element_size()
                run(tuning.select_config(config.cosine_topk, shape, "", 0.0, run))

            def search(graph=graph):  # type: ignore[no-untyped-def]
                return graph(mirror=False)

            yield Case(f"class graph D={dim} {TYPES[dtype]}", topk_search, graph)
            yield Case(f"gallery search D={dim} {TYPES[dtype]}", topk_search, search)
    for length in (512, 4096):
        buffer = topk_kernels.CandidateBuffer(classes, length, meta)
        buffer.longest = length

        def compact(buffer=buffer):  # type: ignore[no-untyped-def]
            return buffer.compact(neighbors)

        def rollback(buffer=buffer):  # type: ignore[no-untyped-def]
            return buffer.rollback(neighbors, buffer.counts.clone())

        yield Case(f"compaction of {length}", topk_kernels, compact)
        yield Case(f"rollback of {length}", topk_kernels, rollback)
    for k_nearest in (20, 256):
        candidates = torch.empty(classes, k_nearest, dtype=torch.int64, device=meta)

        def sort(candidates=candidates):  # type: ignore[no-untyped-def]
            return topk_kernels.sorted_topk(candidates)

        yield Case(f"sort of K={k_nearest}", topk_kernels, sort)


class _Recorded(Exception):
    """Ends a launcher where its kernel would run: from there on it may want results."""


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch, the first one after `launches_before`."""

    def __init__(self, kernel: Any, launches_before: int = 0) -> None:
        self.kernel = kernel
        self.launches_before = launches_before
        self.arguments: dict[str, Any] | None = None
        self.options: dict[str, int] = {}
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            if self.launches_before:
                self.launches_before -= 1
                return
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            self.constants = constants
            self.options = {"num_warps": num_warps, "num_stages": num_stages}
            raise _Recorded

        return launch

    @property
    def configuration(self) -> str:
        """Tiles, warps and stages."""
        tiles = [f"{name}={int(self.constants[name])}" for name in TILES if name in self.constants]
        return " ".join([*tiles, *(f"{name[4:]}={value}" for name, value in self.options.items())])


def record(case: Case, number: int = 0) -> tuple[Recorder, int]:
    """Run a case's launcher on meta tensors.

    Args:
        case: to run.
        number: of the configuration, among those that config.py lists; the first is the default.

    Returns:
        The kernel with its arguments, and how many configurations there are.
    """
    kernels = {name: value for name, value in vars(case.module).items() if isinstance(value, triton.JITFunction)}
    recorders = {name: Recorder(kernel, case.launches_before) for name, kernel in kernels.items()}
    count = 1

    def select_config(configs: tuning.ListConfigs, shape: tuple[int, ...], *_: object) -> config.Config:
        nonlocal count
        found = configs(*shape)
        count = len(found)
        return found[number]

    with (
        mock.patch.object(tuning, "select_config", select_config),
        mock.patch.multiple(case.module, **recorders),
        suppress(_Recorded),
    ):
        case.launch()
    (recorder,) = (each for each in recorders.values() if each.arguments is not None)
    return recorder, count


def specialised(recorder: Recorder) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes of a recorded launch: what the runtime would specialise a kernel on."""
    assert recorder.arguments is not None
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(recorder.kernel.arg_names):
        value = recorder.arguments[name]
        is_special = not recorder.kernel.params[position].do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in recorder.constants or value is None or (value == 1 and is_special):
            signature[name] = "constexpr"
            constants[(position,)] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and is_special:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_key(recorder: Recorder) -> str:
    """Everything that a compiled kernel depends on: launches of one key share it."""
    parts = (sorted((str(name), str(value)) for name, value in part.items()) for part in specialised(recorder))
    return json.dumps([recorder.kernel.__name__, *parts, recorder.options])


def new_keys() -> dict[str, dict[str, list[str]]]:
    """By case and key, the sizes P, K and N that a launch with this key has.

    Buffers are selected from, and sorted, in powers of two, so that short ones cost little: of these, one length
    each is looked at.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for batch, neighbors, classes in product(BATCHES, NEIGHBORS, CLASSES):
        for case in cases(batch, neighbors, classes):
            key = compile_key(record(case)[0])
            found.setdefault(case.name, {}).setdefault(key, []).append(f"P={batch} K={neighbors} N={classes}")
    return found


def generation_of(arch: str) -> int:
    """As config.py numbers it: 90 or 942."""
    return int(arch.removeprefix("sm_").removeprefix("gfx"))


def compile_for(recorder: Recorder, arch: str) -> Any:
    """Compile a recorded launch as the runtime would."""
    source = ASTSource(recorder.kernel, *specialised(recorder))
    return triton.compile(source, target=TARGETS[arch], options=recorder.options)


def report(case: Case, arch: str, number: int = 0) -> Report:
    """Compile a case with one of its configurations and read what came out."""
    with mock.patch.object(config, "generation", return_value=generation_of(arch)):
        recorder, _ = record(case, number)
        limit = config.shared_memory()
    names = {"case": case.name, "kernel": recorder.kernel.__name__, "arch": arch}
    names["configuration"] = recorder.configuration
    threads = TARGETS[arch].warp_size * recorder.options["num_warps"]
    started = perf_counter()
    try:
        compiled = compile_for(recorder, arch)
    except Exception as error:  # whatever a compiler's pass may raise
        return Report(**names, is_shipped=number == 0, verdict=_told(error), shared=0, threads=threads, seconds=0.0)
    seconds = perf_counter() - started
    code, shared = assembly.read(compiled), compiled.metadata.shared
    verdict = "pruned: spills" if code.stack or code.local else "kept"
    if shared > limit:
        verdict = f"pruned: shared memory beyond {limit}"
    products = ", ".join(f"{count} {name}" for name, count in code.tensor_core.items())
    known = asdict(code) | {"tensor_core": products}
    if "ptx" in compiled.asm:
        arguments = [name for name, kind in specialised(recorder)[0].items() if kind != "constexpr"]
        handed = barriers.hand_overs(compiled.asm["ptx"])
        for name, positions in (("handed_over", handed.shared), ("unguarded", handed.unguarded)):
            known[name] = tuple(arguments[position] for position in sorted(positions))
    return Report(
        **names, is_shipped=number == 0, verdict=verdict, shared=shared, threads=threads, seconds=seconds, **known
    )


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"pruned: does not compile: {type(error).__name__}: {lines[0][:120]}"


@cache
def _listed() -> tuple[Case, ...]:
    return tuple(cases())


def _reports(arch: str, position: int, others: bool) -> list[Report]:
    """Of one case: as shipped, or its other configurations."""
    case = _listed()[position]
    if not others:
        return [report(case, arch)]
    with mock.patch.object(config, "generation", return_value=generation_of(arch)):
        count = record(case)[1]
    return [report(case, arch, number) for number in range(1, count)]


def reports(arches: Iterable[str], all_configs: bool = False) -> Iterator[Report]:
    """Every case as shipped, then the other configurations of the main ones, by architecture; on all cores."""
    listed = _listed()
    work = [
        (arch, position, others)
        for arch in arches
        for others in ((False, True) if all_configs else (False,))
        for position, case in enumerate(listed)
        if not others or case.is_main
    ]
    with ProcessPoolExecutor(_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_reports, *zip(*work, strict=True)):
            yield from found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def line(found: Report) -> dict[str, str]:
    """A report as a line of the committed table: all that is the same on every machine."""
    known = asdict(found) | {"configurations": "shipped" if found.is_shipped else "other", "triton": triton.__version__}
    return {name: str(known[name]) for name in COLUMNS}


def save(found: Iterable[Report]) -> list[Path]:
    """Write the tables of the architectures that the reports are of."""
    files: dict[Path, list[dict[str, str]]] = {}
    for each in found:
        files.setdefault(TABLES / f"{each.arch}.csv", []).append(line(each))
    for path, lines in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    return list(files)


def committed(arch: str) -> list[dict[str, str]]:
    """The table that is kept of an architecture and this version of Triton; empty if there is none."""
    path = TABLES / f"{arch}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def differences(old: Iterable[dict[str, str]], new: Iterable[dict[str, str]]) -> list[str]:
    """What has changed between two tables, a line each: rows that went or came, and cells by row and column."""

    def by_name(lines: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[str, str]]:
        # what is shipped is one configuration, whichever it is
        return {
            (each["case"], each["configuration"] if each["configurations"] == "other" else "shipped"): each
            for each in lines
        }

    before, after = by_name(old), by_name(new)
    told = []
    for name in dict.fromkeys([*before, *after]):
        title = " ".join(name)
        if name not in after or name not in before:
            told.append(f"{title}: {'is new' if name in after else 'is gone'}")
            continue
        cells = ((column, before[name].get(column, ""), after[name].get(column, "")) for column in COLUMNS)
        told += [f"{title}: {column}: {then} -> {now}" for column, then, now in cells if then != now]
    return told


def first_call_times() -> list[table.Row]:
    """What compiling the kernels of the main shapes takes, with nothing in Triton's cache; one process, one core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = f"sm_{config.generation()}"
    arch = arch if arch in TARGETS else "sm_90"
    chosen = [case for case in _listed() if case.is_main]
    seconds: dict[str, list[float]] = {}
    found: dict[str, Report] = {}
    for number in range(TIMED + 1):
        with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": empty}):
            for case in chosen if number else chosen[:1]:  # the compiler itself is to be loaded before
                found[case.name] = report(case, arch)
                if number:
                    seconds.setdefault(case.name, []).append(found[case.name].seconds)
    around = measure.environment(device)
    rows = []
    for case in chosen:
        told, (lower, median, upper) = found[case.name], statistics.quantiles(seconds[case.name], method="inclusive")
        dtype = case.name.split()[-1].replace("bf", "bfloat").replace("fp", "float")
        times = {"repeats": TIMED, "median_s": median, "lower_s": lower, "upper_s": upper}
        rows.append(table.Row("compile", case.name, f"{told.kernel} {arch}", dtype, "ok", **times, **around))
    return rows


def architecture(text: str) -> str:
    """An architecture by its name or by NVIDIA's number."""
    name = f"sm_{text}" if text.isdecimal() else text
    if name not in TARGETS and name != "all":
        raise argparse.ArgumentTypeError(f"expected all, or some of {', '.join(TARGETS)}, got {text!r}")
    return name


def main(arguments: list[str] | None = None) -> None:
    """Print what the compiler makes of the kernels, as a table or as JSON."""
    parser = argparse.ArgumentParser("python -m bench static", description=main.__doc__)
    parser.add_argument("--arch", type=architecture, nargs="+", default=["all"], help="80 90 gfx942 ..., default: all")
    parser.add_argument(
        "--all-configs", action="store_true", help="of the main shapes, also those that are not shipped"
    )
    parser.add_argument("--json", action="store_true", help="all that is known")
    parser.add_argument("--save", action="store_true", help="write the tables that the tests compare with")
    parser.add_argument("--keys", action="store_true", help="instead: launches that sizes of a batch compile anew")
    parser.add_argument("--times", action="store_true", help="instead: measure compilation, for this GPU or sm_90")
    parser.add_argument("--output", type=Path, default=table.RESULTS, help="directory of the CSV files of --times")
    options = parser.parse_args(arguments)
    if options.keys:
        json.dump(new_keys(), sys.stdout, indent=1)
        return
    if options.times:
        rows = first_call_times()
        print(table.grid(table.columns(rows) | {"case": [row.case for row in rows]}))
        table.save(rows, options.output)
        return
    arches = list(TARGETS) if "all" in options.arch else list(dict.fromkeys(options.arch))
    found = []
    for each in reports(arches, options.all_configs or options.save):
        if not found and not options.json:
            print(f"| arch | {' | '.join(COLUMNS)} | seconds |\n|{'---|' * (len(COLUMNS) + 2)}")
        found.append(each)
        if not options.json:
            print(f"| {each.arch} | {' | '.join(line(each).values())} | {each.seconds:.2f} |", flush=True)
    if options.json:
        json.dump([asdict(each) for each in found], sys.stdout)
    if options.save:
        save(found)


if __name__ == "__main__":
    main()
