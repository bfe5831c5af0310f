"""What `bench.gpu_check` runs in processes of their own; each stands by itself, too.

python -m bench.workloads environment    what there is: GPU, driver, versions
python -m bench.workloads exercise       every kernel once, small and ragged, against fp64; raises if it is wrong
python -m bench.workloads hashes         training steps, a graph and scores, twice; prints the hash of every tensor
python -m bench.workloads steps --batch 48 17 --neighbors 20 19    steps of these sizes, for what they compile
python -m bench.workloads profile --part graph    a few calls of the main case, for a profiler to look at
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from qaconv_triton import QAConv, SoftmaxTripletLoss, functional, reference

from . import matching, measure
from .matching import Case, Problem

# Locations of one tile, of one with a ragged edge, and of several, the last ragged; odd channels and counts.
CASES = [
    ("classes", Case(sizes)) for sizes in ((6, 13, 5, 33, 3, 2, 2), (6, 11, 7, 40, 7, 7, 2), (4, 9, 3, 20, 24, 8, 2))
]
CASES += [("pairs", Case(sizes)) for sizes in ((5, 7, 33, 3, 2), (3, 5, 40, 7, 7), (2, 3, 20, 24, 8))]
# The dtype of the maps, and autocast's: without one, or over maps and a class table in fp32.
PRECISIONS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
SIMILARITY_ERROR = 2e-5  # inputs are rounded before, sums are fp32
ROWS, NEAREST = 128, 30  # a block of columns; how many neighbours are looked for


def environment(device: torch.device) -> None:
    """Print what a result depends on."""
    around = measure.environment(device) | {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name, value in around.items():
        print(f"{name}: {value}")
    packages = ("numpy", "pytest", "xdist", "hypothesis", "matplotlib", "torchmetrics", "tqdm", "faiss")
    peers = ("faiss", "flashlib", "flash_maxsim", "late_interaction_kernels")
    print("peers that are not here:", ", ".join(name for name in peers if not importlib.util.find_spec(name)) or "none")
    print("installed:", ", ".join(name for name in packages if importlib.util.find_spec(name)), flush=True)
    for program in ("ncu", "compute-sanitizer"):
        print(f"{program}: {shutil.which(program) or 'none'}", flush=True)
    if shutil.which("nvidia-smi"):
        asked = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu"
        subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], check=False)


def exercise(device: torch.device, tiny: bool) -> None:
    """Run every kernel once, through the public functions; with `tiny` in fewer sizes and dtypes.

    Raises:
        AssertionError: a result that is not that of the reference in fp64.
    """
    for name, wrong in exercises(device, tiny):
        print(f"{name}: {wrong or 'ok'}", flush=True)
        if wrong:
            raise AssertionError(f"{name}: {wrong}")


def exercises(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, str]]:
    """What was run, and what is wrong with its result, if anything."""
    for dtype in (torch.float32, torch.bfloat16):
        table = unlucky_table()[: 310 if tiny else None].to(dtype)
        worst = reference.cosine_topk(table.double(), -table.double(), NEAREST)[1]  # as a former graph it helps nobody
        for name, former in {"graph": None, "graph, buffers overflow": worst.to(device)}.items():
            found = functional.class_neighbors(table.to(device), NEAREST, return_similarities=True, previous=former)
            yield f"{name}, {dtype}", wrong_neighbors(table, table, *found, exclude_self=True)
        queries, keys = table[:77, None, None].reshape(77, 8, 2, 1), table[100:301].reshape(201, 8, 2, 1)
        found = functional.topk_cosine(queries.to(device), keys.to(device), 17)
        yield f"top-k of other keys, {dtype}", wrong_neighbors(queries.flatten(1), keys.flatten(1), *found)
    for (op, case), (dtype, cast) in (
        zip(CASES[::3], PRECISIONS[::3], strict=True) if tiny else product(CASES, PRECISIONS)
    ):
        name = f"{op} {case.name}, {cast or dtype}" + (f" on {dtype}" if cast else "")
        for part, wrong in matched(op, case._replace(dtype=dtype), cast, device):
            yield f"{name}, {part}", wrong


def unlucky_table() -> Tensor:
    """A table `[N, 16]` whose order misleads the search: where it looks first for class 0's like, there is none.

    Later come more at once than a buffer's capacity, and the round is rolled back.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(13 * ROWS - 10, 16, generator=generator)
    alike = torch.cat([torch.arange(ROWS // 2), torch.arange(3 * ROWS, 11 * ROWS)])
    table[alike] = table[0] + 0.3 * table[alike]
    return table * (0.1 + torch.rand(len(table), 1, generator=generator))


def wrong_neighbors(
    queries: Tensor, keys: Tensor, similarities: Tensor, ids: Tensor, *, exclude_self: bool = False
) -> str:
    """What is wrong with a result: near ties may swap ids, so these are judged by their true similarities."""
    similarities, ids = similarities.double().cpu(), ids.cpu()
    queries, keys = reference.normalize(queries.double()), reference.normalize(keys.double())
    if ids.min() < 0 or ids.max() >= len(keys) or (ids.sort(1).values.diff(dim=1) == 0).any():
        return "ids out of range, or twice"
    if exclude_self and (ids == torch.arange(len(ids)).unsqueeze(1)).any():
        return "a class among its own neighbours"
    true = (queries.unsqueeze(1) * keys[ids]).sum(-1)
    best = reference.cosine_topk(queries, keys, ids.shape[1], exclude_self)[0]
    error = max((similarities - true).abs().max().item(), (best - true).abs().max().item())
    return "" if error <= SIMILARITY_ERROR else f"similarities off by {error:.2g}"


def matched(op: str, case: Case, cast: torch.dtype | None, device: torch.device) -> Iterator[tuple[str, str]]:
    """Scores without gradients, then scores and gradients; inputs and the truth are made on the CPU, whatever `device`.

    On the class path the gradient to the table comes dense and sparse, and every class is scored as well.
    """
    cpu, limit = torch.device("cpu"), matching.tolerance(cast or case.dtype)
    autocast = torch.autocast(device.type, dtype=cast or torch.bfloat16, enabled=cast is not None)
    for sparse in (False, True) if op == "classes" else (False,):
        problem = matching.build(op, case, cpu, sparse_grad=sparse)
        frozen, trained = (matching.truth(problem, training) for training in (False, True))
        every = matching.truth(problem._replace(labels=None), training=False)
        problem = moved(problem, device)
        if not sparse:
            problem.matcher.eval()
            with torch.no_grad(), autocast:
                scores = _scores(problem)
                scores_of_every = problem.matcher.match(problem.probe, problem.items)
            yield "scores", matching.check_scores(frozen, limit, scores.cpu()).wrong
            yield "match", matching.check_scores(every, limit, scores_of_every.cpu()).wrong
        problem.matcher.train()
        with autocast:
            scores = _scores(problem)
        gradients = torch.autograd.grad(scores, problem.inputs("step"), problem.upstream)
        name = "sparse gradients" if sparse else "gradients"
        yield f"scores before {name}", matching.check_scores(trained, limit, scores.cpu()).wrong
        yield name, matching.check_gradients(trained, limit, [each.cpu() for each in gradients]).wrong


def _scores(problem: Problem) -> Tensor:
    """Of the neighbours of the probes' classes on the class path, else of all pairs."""
    if problem.labels is not None:
        return problem.matcher(problem.probe, labels=problem.labels)
    return problem.matcher(problem.probe, problem.items)


def moved(problem: Problem, device: torch.device) -> Problem:
    """The problem on another device, its class table still the matcher's."""
    matcher = problem.matcher.to(device)
    items = matcher.class_embed if problem.labels is not None else problem.items.detach().to(device).requires_grad_()
    assert items is not None
    return problem._replace(
        probe=problem.probe.detach().to(device).requires_grad_(),
        items=items,
        labels=None if problem.labels is None else problem.labels.to(device),
        upstream=problem.upstream.to(device),
    )


def hashes(device: torch.device, tiny: bool) -> dict[str, str]:
    """Train a few steps in fp32 and under autocast, and hash all that comes of it: outputs, gradients, parameters.

    With `tiny` fewer and smaller ones, under autocast only.
    """
    batch, classes, k, channels, size, count = (4, 8, 3, 16, 2, 1) if tiny else (64, 1000, 64, 512, 7, 3)
    found: dict[str, str] = {}
    for dtype in (torch.bfloat16,) if tiny else (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        # on the CPU, whose random numbers are the same everywhere
        matcher = QAConv(channels, size, size, classes, k, include_self=True)
        features = torch.randn(count, batch, channels, size, size).to(device)
        labels = torch.randint(classes, (count, batch // 2)).repeat_interleave(2, dim=1).to(device)
        loss_function = SoftmaxTripletLoss(matcher).to(device)
        optimizer = torch.optim.SGD(loss_function.parameters(), lr=0.1)

        def keep(name: str, *tensors: Tensor, dtype: torch.dtype = dtype) -> None:
            for number, tensor in enumerate(tensors):
                bits = tensor.detach().cpu().contiguous()
                content = ctypes.string_at(bits.data_ptr(), bits.nbytes)  # without NumPy, which may not be there
                found[f"{dtype} {name} {number}"] = hashlib.sha256(content).hexdigest()

        for number, (feature, target) in enumerate(zip(features, labels, strict=True)):
            matcher.on_epoch_start()
            feature.requires_grad_()
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                outputs = loss_function(feature, target)
                pairs = matcher(feature, "same")
            (outputs[2].mean() + pairs.sigmoid().mean()).backward()
            optimizer.step()
            assert matcher.class_neighbors is not None
            keep(f"step {number}, losses", *outputs, pairs)
            keep(f"step {number}, gradients", feature.grad, *(weight.grad for weight in loss_function.parameters()))
            keep(f"step {number}, graph", matcher.class_neighbors)
        keep("parameters", *loss_function.state_dict().values())
        table = matcher.class_embed.detach().to(dtype)
        keep("graph", *functional.class_neighbors(table, k, return_similarities=True))
        keep("match", matcher.match(features[0].to(dtype), table))
    return found


def steps(device: torch.device, batches: list[int], neighbors: list[int], tiny: bool) -> None:
    """Class path, all pairs and matching without gradients, for every batch size and K; neighbours are drawn.

    The class graph is left out: its buffers are selected from in powers of two, so a much larger K is a new kernel.
    """
    classes, channels, size = (8, 16, 2) if tiny else (1000, 512, 7)
    for k, batch, dtype in product(neighbors, batches, (torch.float32, torch.bfloat16)):
        matcher = QAConv(channels, size, size, classes, k).to(device)
        matcher.class_neighbors = torch.rand(classes, classes, device=device).topk(k).indices
        feature = torch.randn(batch, channels, size, size, device=device, requires_grad=True)
        labels = torch.randint(classes, (batch,), device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            matcher(feature, labels=labels).square().mean().backward()
            if batch > 1:  # one pair has no batch statistics
                matcher(feature, "same").square().mean().backward()
            matcher.eval()
            with torch.no_grad():
                matcher(feature, labels=labels)
            matcher.match(feature, feature)
        print(f"B={batch} K={k} {dtype}", flush=True)


def profile(device: torch.device, part: str, tiny: bool) -> None:
    """The main case a few times: the class path's forward pass, or the class graph, both in bf16."""
    case = Case((6, 40, 5, 16, 3, 2, 2) if tiny else (256, 10572, 256, 512, 7, 7, 4), dtype=torch.bfloat16)
    problem = matching.build("classes", case, device)
    for _ in range(4):
        if part == "classes":
            _scores(problem)
        else:
            functional.class_neighbors(problem.items, problem.matcher.k_nearest)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser("python -m bench.workloads", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["environment", "exercise", "hashes", "steps", "profile"])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="of steps")
    parser.add_argument("--neighbors", type=int, nargs="+", default=[20], help="of steps")
    parser.add_argument("--part", choices=["classes", "graph"], default="classes", help="of profile")
    options = parser.parse_args()
    device, tiny = options.device, options.tiny
    if options.name == "hashes":
        print("hashes:", json.dumps([hashes(device, tiny) for _ in range(2)]), flush=True)
        return
    calls: dict[str, Callable[[], None]] = {
        "environment": partial(environment, device),
        "exercise": partial(exercise, device, tiny),
        "steps": partial(steps, device, options.batch, options.neighbors, tiny),
        "profile": partial(profile, device, options.part, tiny),
    }
    calls[options.name]()


if __name__ == "__main__":
    main()
