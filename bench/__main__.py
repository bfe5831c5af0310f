"""Measure the library's operations beside their alternatives, print a table per case, and keep the rows as CSV.

python -m bench                     every op at every case of the device
python -m bench graph --tiny        one op, small: graph (the class graph), classes (the class path), pairs (all pairs)
python -m bench classes --parts forward step
python -m bench static --arch 90    what the compiler makes of the kernels (bench.static)
python -m bench report              the tables and plots of docs/benchmarks.md, from the CSV files (bench.report)
python -m bench gpu-check           all that there is to see on a machine with a GPU, in ten minutes (bench.gpu_check)
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from . import table

# each has run(arguments) -> the rows of one case after the other, of the op that the arguments name
OPS = {"graph": "bench.graph", "classes": "bench.scores", "pairs": "bench.scores"}
# each has main(arguments), with options of its own
COMMANDS = {"static": "bench.static", "report": "bench.report", "gpu-check": "bench.gpu_check"}
PARTS = ("forward", "backward", "step", "match")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("op", nargs="?", choices=[*OPS, *COMMANDS], help="the first three where left out")
    options.add_argument("--cases", nargs="+", type=_case, metavar="SIZE", help="sizes joined by x, as in the results")
    options.add_argument("--parts", nargs="+", choices=PARTS, help="of classes and pairs; all of a case where left out")
    options.add_argument("--providers", nargs="+", metavar="NAME", help="those with one of these in their names")
    options.add_argument("--repeats", type=_positive, help="rounds; by default each case has its number")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=DTYPES, help="of the inputs; by default each case has its own")
    options.add_argument("--threads", type=_positive, help="of torch and FAISS on the CPU")
    options.add_argument("--tiny", action="store_true", help="one small case, to see that everything runs")
    options.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    options.add_argument("--no-save", dest="save", action="store_false", help="write no CSV")
    options.add_argument("--output", type=Path, default=table.RESULTS, help="directory of the CSV files")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def _case(text: str) -> str:
    if not all(part.isdecimal() for part in text.split("x")):
        raise argparse.ArgumentTypeError(f"expected numbers joined by x, got {text!r}")
    return text


def main(arguments: list[str] | None = None) -> None:
    """Run the ops that the command line names."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        importlib.import_module(COMMANDS[given[0]]).main(given[1:])
        return
    options = parser().parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cases and not options.op:
        parser().error("--cases are those of an op: name one")
    for op in [options.op] if options.op else OPS:
        options.op = op
        for found in importlib.import_module(OPS[op]).run(options):
            print(table.markdown(found), end="\n\n", flush=True)
            if options.save:
                table.save(found, options.output)


if __name__ == "__main__":
    main()
