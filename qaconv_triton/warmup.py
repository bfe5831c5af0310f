"""Compile and tune the kernels before training, so that no training step waits for it.

    python -m qaconv_triton.warmup --channels 512 --height 7 --width 7 --num-classes 10572 --k-nearest 256

Compiled kernels go to Triton's cache on disk and the fastest configurations to the library's (kernels/tuning.py); a
training of maps of this size finds both there, whatever its batch size, number of classes or K.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor

from . import ops
from .matcher import QAConv

INSTANCES = 4  # maps of a class in a batch
GALLERY = 8  # batches of maps that a batch is matched with
SHARE = 0.5  # of the free memory: what the class table, its gradient and the graph may take

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        "python -m qaconv_triton.warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, text in (
        ("channels", "C of the feature maps"),
        ("height", "H of the feature maps"),
        ("width", "W of the feature maps"),
        ("num-classes", "N, classes of the class table"),
        ("k-nearest", "K, neighbours per class"),
    ):
        options.add_argument(f"--{name}", type=int, required=True, help=text)
    options.add_argument("--batch-size", type=int, default=64, help="feature maps in a batch (default: %(default)s)")
    options.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"],
        help="of matching: float32, or half precision under torch.autocast (default: bfloat16 float32)",
    )  # fmt: skip
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: %(default)s")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run every operation of a training and of an evaluation twice, with a progress bar; say what the first took."""
    options = parser().parse_args(arguments)
    try:
        with torch.device("meta"):
            QAConv(options.channels, options.height, options.width, options.num_classes, options.k_nearest)
        if options.batch_size < 1:
            raise ValueError(f"--batch-size must be positive, got {options.batch_size}")
    except ValueError as error:
        parser().error(str(error))
    device: torch.device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        _say("No GPU here: there is nothing to compile or tune, the CPU path runs as it is.")
        return
    if not ops.uses_triton(device, torch.float32):
        _say(f"Tensors on {device} are not for the Triton kernels: there is nothing to compile or tune.")
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("the progress bar of the warm-up needs tqdm (pip install tqdm)") from error
    from .kernels import tuning

    steps = list(_steps(options, device))
    found = []
    with tqdm(steps, unit="operation") as progress:
        for name, step in progress:
            progress.set_description(name)
            found.append((name, _seconds(step, device), _seconds(step, device)))
    width = max(len(name) for name, *_ in found)
    _say(f"{'':{width}}  first call     again")
    for name, first, again in found:
        _say(f"{name:{width}}  {first:8.2f} s  {1e3 * again:6.1f} ms")
    if tuning.is_on():
        for (table, shape, variant), config in tuning.chosen.items():
            _say(f"{table} {shape} {variant}: {config}")
        _say(f"Choices are kept in {tuning.cache_directory()}.")
    else:
        _say(f"Not tuned: {tuning.TUNE_VARIABLE}={os.environ.get(tuning.TUNE_VARIABLE, '')}, kernels run as shipped.")


def _steps(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The operations, by name."""
    shape = options.channels, options.height, options.width
    count = _classes(options.num_classes, shape, options.k_nearest, device)
    matcher = QAConv(*shape, count, options.k_nearest).to(device)
    features = torch.randn(options.batch_size, *shape, device=device, requires_grad=True)
    gallery = torch.randn(GALLERY * options.batch_size, *shape, device=device)
    labels = (torch.arange(options.batch_size, device=device) // INSTANCES) % count

    def backward(scores: Tensor) -> None:
        torch.autograd.backward(scores, torch.randn_like(scores))
        matcher.zero_grad()

    def graph() -> None:
        matcher.on_epoch_start()
        matcher.compute_class_neighbors()

    yield "class graph", graph
    for name in options.dtype:
        context = torch.autocast(device.type, DTYPES[name], enabled=name != "float32")
        for what, call in {
            "class path": lambda: backward(matcher.class_scores(features, labels).values),
            "all pairs": lambda: backward(matcher(features, "same")),
            "matching": lambda: matcher.match(features.detach(), gallery),
            "matching of pairs": lambda: matcher.match_pairs(features.detach(), features.detach()),
        }.items():
            yield f"{what}, {name}", context(call)


def _classes(count: int, shape: tuple[int, ...], k: int, device: torch.device) -> int:
    """N, or as many classes as there is room for: no kernel depends on how many there are."""
    if device.type != "cuda":
        return count
    each = 4 * 3 * shape[0] * shape[1] * shape[2]  # of the table, its gradient, and what either needs meanwhile
    room = int(SHARE * torch.cuda.mem_get_info(device)[0]) // each
    return max(min(count, room), k + 1)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    started = perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
