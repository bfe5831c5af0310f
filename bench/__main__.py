"""Measure the library beside its alternatives, print a table per case, and keep the rows as CSV.

python -m bench                     every op at every case of the device
python -m bench graph --tiny        one op, small: graph (class graph), classes (class path), pairs (all pairs)
python -m bench classes --parts forward step
python -m bench ranking             seconds and recall of rankings of a gallery
python -m bench scale               a sharded class table: a model of its costs, beside processes, for many GPUs
python -m bench report              docs/benchmarks.md and its plots, from the CSV files
python -m bench static --arch 90    what the compiler makes of the kernels (tests/static)
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import cases, measure, results

COMMANDS = {name: f"bench.{name}" for name in ("ranking", "scale", "static", "report")}  # with main(arguments)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("op", nargs="?", choices=[*cases.OPS, *COMMANDS], help="default: graph, classes and pairs")
    options.add_argument("--cases", nargs="+", metavar="SIZE", help="sizes joined by x, as in the results")
    options.add_argument(
        "--parts", nargs="+", choices=cases.PARTS["pairs"], help="of classes and pairs (default: all of a case)"
    )
    options.add_argument("--providers", nargs="+", metavar="NAME", help="those with one of these in their names")
    options.add_argument("--repeats", type=int, help="rounds (default: each case has its own)")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: each case has its own)")
    options.add_argument("--threads", type=int, help="of torch and FAISS on the CPU")
    options.add_argument("--tiny", action="store_true", help="one small case, as a smoke test")
    options.add_argument("--no-memory", dest="memory", action="store_false", help="skip peak memory")
    options.add_argument("--no-save", dest="save", action="store_false", help="write no CSV")
    options.add_argument("--output", type=Path, default=results.RESULTS, help="directory of the CSV files")
    return options


def run(options: argparse.Namespace) -> Iterator[list[results.Row]]:
    """Measure the cases of an op, one list of rows for each part of a case."""
    op, device = importlib.import_module(cases.OPS[options.op]), torch.device(options.device)
    listed = op.TINY if options.tiny else op.CUDA_CASES if device.type == "cuda" else op.CPU_CASES
    for case in cases.select(listed, options):
        torch.compiler.reset()  # what was compiled for other sizes
        problem = op.build(case, device)
        for part in case.parts:
            every = op.providers(case, part, problem)
            providers = [provider for provider in every if case.measures(provider.name, options.providers or ())]
            if providers:
                yield measure.rows(case, part, providers, device, options.repeats, options.memory)


def main(arguments: list[str] | None = None) -> None:
    """Run the ops or the command that the command line names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        return
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cases and not options.op:
        parser().error("--cases needs an op: graph, classes or pairs")
    for op in [options.op] if options.op else cases.OPS:
        options.op = op
        for rows in run(options):
            print(results.markdown(rows), end="\n\n", flush=True)
            if options.save:
                results.save(rows, options.output)


if __name__ == "__main__":
    main()
