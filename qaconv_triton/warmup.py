"""Compile and tune the kernels before training, so that no training step waits for it.

    python -m qaconv_triton.warmup --channels 512 --height 7 --width 7 --num-classes 10572 --k-nearest 256

Compiled kernels go to Triton's cache on disk and the fastest configurations to the library's (kernels/tuning.py): a
training of maps of this size finds both there. They depend neither on the batch size nor on the number of classes, but
launches too small to matter take the default configurations, and buffers are selected from in powers of two.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from . import ops
from .matcher import QAConv
from .progress import show_progress

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
    """Run every operation of a training and of an evaluation twice, showing the progress; say what the first took."""
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
        _print("No GPU here: there is nothing to compile or tune, the CPU path runs as it is.")
        return
    if not ops.uses_triton(device, torch.float32):
        _print(f"Tensors on {device} are not for the Triton kernels: there is nothing to compile or tune.")
        return
    from .kernels import tuning

    found = []
    for name, step in _with_progress(list(_steps(options, device))):
        found.append((name, _seconds(step, device), _seconds(step, device)))
    width = max(len(name) for name, *_ in found)
    _print(f"{'':{width}}  first call     again")
    for name, first, again in found:
        _print(f"{name:{width}}  {first:8.2f} s  {1e3 * again:6.1f} ms")
    for (op, shape, variant, *_), config in tuning.selected.items():
        _print(f"{op} {shape} {variant}: {config}")
    if tuning.is_on():
        directory = tuning.cache_directory()
        kept = (
            "Choices are for this process only: no home directory."
            if directory is None
            else f"Choices are kept in {directory}."
        )
        _print(kept if tuning.selected else "No launch is large enough to be tuned for: kernels run with the defaults.")
    else:
        _print(
            f"Not tuned ({tuning.TUNE_VARIABLE}={os.environ.get(tuning.TUNE_VARIABLE, '')!r}): "
            "kernels run with the defaults."
        )


def _steps(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The operations, by name."""
    shape = options.channels, options.height, options.width
    count = _classes(options.num_classes, shape, options.k_nearest, device)
    with device:  # in fp32, whatever torch's default dtype: half precision is autocast's
        matcher = QAConv(*shape, count, options.k_nearest).float()
    batches = {options.batch_size}
    if device.type == "cuda":  # kernels are tuned for on a batch that is large enough, whatever that of the training
        batches.add(max(options.batch_size, _worth(shape, options.k_nearest)))

    def backward(scores: Tensor) -> None:
        torch.autograd.backward(scores, torch.randn_like(scores))
        matcher.zero_grad()

    def calls(size: int) -> dict[str, Callable[[], object]]:
        features = torch.randn(size, *shape, device=device, dtype=torch.float32, requires_grad=True)
        gallery = torch.randn(GALLERY * size, *shape, device=device, dtype=torch.float32)
        labels = (torch.arange(size, device=device) // INSTANCES) % count
        return {
            "class path": lambda: backward(matcher.class_scores(features, labels).values),
            "all pairs": lambda: backward(matcher(features, "same")),
            "matching": lambda: matcher.match(features.detach(), gallery),
            "matching of pairs": lambda: matcher.match_pairs(features.detach(), features.detach()),
        }

    def graph() -> None:
        matcher.on_epoch_start()
        matcher.compute_class_neighbors()

    yield "class graph", graph
    for size, name in product(sorted(batches), options.dtype):
        context = torch.autocast(device.type, DTYPES[name], enabled=name != "float32")
        for what, call in calls(size).items():
            yield f"{what} of {size}, {name}", context(call)


def _worth(shape: tuple[int, int, int], k: int) -> int:
    """The batch size from which all pairs and the class path are worth tuning for."""
    from .kernels import tuning

    each = 2.0 * shape[0] * (shape[1] * shape[2]) ** 2  # operations of a pair
    worth: float = tuning.MIN_TUNED_FLOPS
    return max(math.ceil(worth / (each * k)), math.ceil(math.sqrt(worth / each)))


def _with_progress(steps: list[tuple[str, Callable[[], object]]]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The steps, their progress shown."""
    with show_progress("warm-up", "operations") as update:
        for done, step in enumerate(steps, start=1):
            yield step
            update(done, len(steps))


def _classes(count: int, shape: tuple[int, ...], k: int, device: torch.device) -> int:
    """N, or as many classes as fit: no kernel depends on how many there are."""
    if device.type != "cuda":
        return count
    each = 4 * 3 * shape[0] * shape[1] * shape[2]  # of the table, its gradient, and what either needs meanwhile
    fitting = int(SHARE * torch.cuda.mem_get_info(device)[0]) // each
    return max(min(count, fitting), k + 1)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    started = perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
