"""What the compiler makes of every kernel, for GPUs that need not be there: registers, spills, shared memory, loads.

python -m bench static                           every kernel's default configuration, for every architecture
python -m bench static --arch 90 --all-configs   with those that autotuning may choose from, of the main shapes
python -m bench static --save                    all of this, to the committed tables
python -m bench static --cycles [--save]         an estimate of the cycles of a tile, sm_80, sm_90, sm_100
python -m bench static --times                   what the first call of a kernel waits for its compilation
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import triton

from bench import measure, results
from qaconv_triton.kernels import config

from . import assembly, barriers, estimate, launches, loop_carries
from .launches import TARGETS, Case

TABLES = Path(__file__).parent / "tables" / f"triton-{triton.__version__}"  # each compiler has its own code
TIMED = 3  # compilations of a kernel
BATCHES, NEIGHBORS, CLASSES = (1, 16, 17, 48, 256), (1, 19, 20, 256), (1, 1000, 10_572)


@dataclass(frozen=True)
class Report:
    """The compiler's account of one kernel on one target; memory in bytes, instructions as they stand in the code."""

    case: str
    kernel: str
    arch: str
    configuration: str
    is_default: bool
    status: str  # "kept", or why autotuning would skip it
    shared: int
    threads: int
    seconds: float  # to compile it, if it was not in Triton's cache
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
    handed_over: tuple[str, ...] = ()  # NVIDIA: arguments whose memory the kernel both stores and loads
    unguarded: tuple[str, ...] = ()  # of these, where a path without a barrier leads from one to the other


COLUMNS = (
    "configurations", "case", "kernel", "configuration", "status", "registers", "stack", "local", "scalar_spills",
    "shared", "threads", "instructions", "tensor_core", "async_copies", "narrowest_async_copy", "widest_load", "triton",
)  # fmt: skip


def report(case: Case, arch: str, number: int = 0) -> Report:
    """Compile a case with one of its configurations and read the result."""
    with mock.patch.object(config, "generation", return_value=launches.generation_of(arch)):
        recorder, _ = launches.record(case, number)
        limit = config.shared_memory()
    names = {"case": case.name, "kernel": recorder.kernel.__name__, "arch": arch}
    names["configuration"] = recorder.configuration
    threads = TARGETS[arch].warp_size * recorder.options["num_warps"]
    started = perf_counter()
    try:
        compiled = launches.compile_for(recorder, arch)
    except Exception as error:  # each compiler pass raises its own
        line = (str(error).strip().splitlines() or [""])[0][:120]
        status = f"pruned: does not compile: {type(error).__name__}: {line}"
        return Report(**names, is_default=number == 0, status=status, shared=0, threads=threads, seconds=0.0)
    seconds = perf_counter() - started
    code, shared = assembly.read(compiled), compiled.metadata.shared
    status = "pruned: spills" if code.stack or code.local else "kept"
    if shared > limit:
        status = f"pruned: shared memory beyond {limit}"
    known = asdict(code) | {"tensor_core": ", ".join(f"{count} {name}" for name, count in code.tensor_core.items())}
    if "ptx" in compiled.asm:
        arguments = launches.parameters(recorder)
        handed = barriers.hand_overs(compiled.asm["ptx"])
        known["handed_over"] = tuple(arguments[position] for position in sorted(handed.shared))
        known["unguarded"] = tuple(arguments[position] for position in sorted(handed.unguarded))
    return Report(
        **names, is_default=number == 0, status=status, shared=shared, threads=threads, seconds=seconds, **known
    )


@cache
def _cases() -> tuple[Case, ...]:
    return tuple(launches.cases())


def _reports(arch: str, position: int, others: bool) -> list[Report]:
    """Of one case: its default configuration, or the others."""
    case = _cases()[position]
    if not others:
        return [report(case, arch)]
    with mock.patch.object(config, "generation", return_value=launches.generation_of(arch)):
        count = launches.record(case)[1]
    return [report(case, arch, number) for number in range(1, count)]


def reports(arches: Iterable[str], all_configs: bool = False) -> Iterator[Report]:
    """The default of every case, then the other configurations of the main ones, by architecture; on all cores."""
    work = [
        (arch, position, others)
        for arch in arches
        for others in ((False, True) if all_configs else (False,))
        for position, case in enumerate(_cases())
        if not others or case.is_main
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        for of_case in pool.map(_reports, *zip(*work, strict=True)):
            yield from of_case


def line(each: Report) -> dict[str, str]:
    """A report as a line of the committed table: what is the same on every machine."""
    known = asdict(each) | {"configurations": "default" if each.is_default else "other", "triton": triton.__version__}
    return {name: str(known[name]) for name in COLUMNS}


def save(found: Iterable[Report]) -> None:
    """Write the tables of the architectures that the reports are of."""
    files: dict[Path, list[dict[str, str]]] = {}
    for each in found:
        files.setdefault(TABLES / f"{each.arch}.csv", []).append(line(each))
    for path, lines in files.items():
        _write(path, lines)


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def committed(name: str) -> list[dict[str, str]]:
    """The table of an architecture, or of cycles, with this version of Triton; empty if there is none."""
    path = TABLES / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def differences(old: Iterable[dict[str, str]], new: Iterable[dict[str, str]]) -> list[str]:
    """What differs between two tables, a line each: rows that are new or gone, cells by row and column."""

    def by_name(lines: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[str, str]]:
        return {
            (each["case"], each["configuration"] if each["configurations"] == "other" else "default"): each
            for each in lines
        }

    before, after = by_name(old), by_name(new)
    found = []
    for name in dict.fromkeys([*before, *after]):
        title = " ".join(name)
        if name not in after or name not in before:
            found.append(f"{title}: {'is new' if name in after else 'is gone'}")
            continue
        cells = ((column, before[name].get(column, ""), after[name].get(column, "")) for column in COLUMNS)
        found += [f"{title}: {column}: {then} -> {now}" for column, then, now in cells if then != now]
    return found


def compiled_sizes() -> dict[str, dict[str, list[str]]]:
    """By case and compile key, the sizes P, K and N of the launches that share this key."""
    found: dict[str, dict[str, list[str]]] = {}
    for batch, neighbors, classes in product(BATCHES, NEIGHBORS, CLASSES):
        for case in launches.cases(batch, neighbors, classes):
            key = launches.compile_key(launches.record(case)[0])
            found.setdefault(case.name, {}).setdefault(key, []).append(f"P={batch} K={neighbors} N={classes}")
    return found


def loops(arch: str) -> list[dict[str, Any]]:
    """What the loops of every kernel carry, by the source and by the compiler."""
    found: dict[str, list[loop_carries.Loop]] = {}
    with mock.patch.object(config, "generation", return_value=launches.generation_of(arch)):
        for case in launches.cases():
            recorder, _ = launches.record(case)
            key = launches.compile_key(recorder)
            if key not in found:
                found[key] = loop_carries.loops_of(recorder, arch)
    return [asdict(loop) for of_kernel in found.values() for loop in of_kernel]


def cycles(arches: Iterable[str]) -> list[dict[str, str]]:
    """An estimate of what every main kernel takes, a line each."""
    lines = []
    for case, arch in product(filter(lambda each: each.is_main, _cases()), arches):
        with mock.patch.object(config, "generation", return_value=launches.generation_of(arch)):
            recorder, _ = launches.record(case)
        if recorder.kernel.__name__ in estimate.KERNELS:
            compiled = launches.compile_for(recorder, arch)
            code, found = assembly.read(compiled), estimate.estimate(recorder, compiled.asm["cubin"], arch)
            numbers = {"registers": code.registers, "static_instructions": code.instructions} | asdict(found)
            names = {"case": case.name, "arch": arch, "configuration": recorder.configuration}
            lines.append(names | {name: str(number) for name, number in numbers.items()})
    return lines


def first_call_times() -> list[results.Row]:
    """What compiling the kernels of the main shapes takes with an empty cache; one process, one core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = f"sm_{config.generation()}"
    arch = arch if arch in TARGETS else "sm_90"
    main_cases = [case for case in _cases() if case.is_main]
    times: dict[str, list[Report]] = {case.name: [] for case in main_cases}
    report(main_cases[0], arch)  # loads the compiler
    for _ in range(TIMED):
        with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": empty}):
            for case in main_cases:
                times[case.name].append(report(case, arch))
    around, rows = measure.environment(device), []
    for name, runs in times.items():
        lower, median, upper = statistics.quantiles([each.seconds for each in runs], method="inclusive")
        dtype = name.split()[-1].replace("bf", "bfloat").replace("fp", "float")
        seconds = {"repeats": TIMED, "median_s": median, "lower_s": lower, "upper_s": upper}
        rows.append(results.Row("compile", name, f"{runs[0].kernel} {arch}", dtype, "ok", **seconds, **around))
    return rows


def architecture(text: str) -> str:
    """An architecture by its name or by NVIDIA's number."""
    name = f"sm_{text}" if text.isdecimal() else text
    if name not in TARGETS:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(TARGETS)}, got {text!r}")
    return name


def main(arguments: list[str] | None = None) -> None:
    """Print what the compiler makes of the kernels, as a table or as JSON."""
    parser = argparse.ArgumentParser("python -m bench static", description=main.__doc__)
    parser.add_argument("--arch", type=architecture, nargs="+", default=list(TARGETS), help="80 90 gfx942 ...")
    parser.add_argument("--all-configs", action="store_true", help="of the main shapes all configurations")
    parser.add_argument("--save", action="store_true", help="write the committed tables, or that of --cycles")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sizes", action="store_true", help="instead: JSON of the launches that share compiled code")
    parser.add_argument("--loops", action="store_true", help="instead: JSON of what the kernels' loops carry")
    parser.add_argument("--cycles", action="store_true", help="instead: an estimate of a tile's cycles, main shapes")
    parser.add_argument("--times", action="store_true", help="instead: measure compilation, for this GPU or sm_90")
    parser.add_argument("--output", type=Path, default=results.RESULTS, help="directory of the CSV file of --times")
    options = parser.parse_args(arguments)
    if options.sizes or options.loops:
        json.dump(compiled_sizes() if options.sizes else loops(options.arch[0]), sys.stdout)
    elif options.cycles:
        arches = [arch for arch in options.arch if arch in estimate.PRODUCTS_A_CYCLE]
        if not arches or (options.save and len(arches) < len(estimate.PRODUCTS_A_CYCLE)):
            parser.error(f"--cycles is of {', '.join(estimate.PRODUCTS_A_CYCLE)}, with --save of all of them")
        lines = cycles(arches)
        _print(lines, options.json)
        if options.save:
            _write(TABLES / "cycles.csv", lines)
    elif options.times:
        rows = first_call_times()
        print(results.grid({"case": [row.case for row in rows]} | results.columns(rows)))
        results.save(rows, options.output)
    else:
        found = list(reports(dict.fromkeys(options.arch), options.all_configs or options.save))
        lines = [{"arch": each.arch} | line(each) | {"seconds": f"{each.seconds:.2f}"} for each in found]
        _print([asdict(each) for each in found] if options.json else lines, options.json)
        if options.save:
            save(found)


def _print(lines: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        json.dump(lines, sys.stdout)
    else:
        print(results.grid({name: [each[name] for each in lines] for name in lines[0]}))


if __name__ == "__main__":
    main()
