"""Benchmarks of the class path and of all pairs, beside plain PyTorch.

    python -m bench classes --cases 64x10000x256x512x7x7x4 --parts step
    python -m bench pairs --cases 64x1000x512x7x7

The class graph is not measured here: neighbours are drawn at random. Beside the class path stands the same call without
labels, which scores every class.
"""

import copy
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import baselines, measure, problems
from .cases import MATCH, OURS, PARTS, TRAINING, Case
from .problems import Problem, build

PER_LABEL, VECTORISED, PUBLISHED, TUNED = (
    f"eager, {how}" for how in ("per label", "vectorised", "as published", "tuned")
)
EVERY, SPARSE = f"{OURS}, every class", f"{OURS}, sparse_grad"
_Classes = partial(Case, "classes", parts=TRAINING)
_Pairs = partial(Case, "pairs", parts=TRAINING)
_Match = partial(Case, "pairs", parts=MATCH)
_Sweep = partial(_Classes, parts=("step",), repeats=3, only=(OURS, PER_LABEL, VECTORISED))
_HALF = torch.bfloat16
TINY = [
    _Classes((6, 40, 5, 16, 3, 2, 2), repeats=2, only=(OURS, PER_LABEL, VECTORISED, SPARSE, EVERY)),
    _Pairs((5, 7, 16, 3, 2), parts=PARTS["pairs"], repeats=2, only=(OURS, PUBLISHED, TUNED)),
]
CPU_CASES = [
    _Classes((64, 10000, 256, 512, 7, 7, 4)),
    _Classes((64, 1000, 128, 512, 7, 7, 1)),
    _Classes((64, 10000, 256, 512, 7, 7, 4), dtype=_HALF, repeats=3, only=(OURS, PER_LABEL, VECTORISED)),
    *(_Sweep((64, classes, 64, 512, 7, 7, 4)) for classes in (1000, 2000, 4000, 8000)),
    *(_Sweep((64, 2000, k, 512, 7, 7, 4)) for k in (16, 32, 128, 256)),
    _Pairs((64, 64, 512, 7, 7)),
    *(_Match(sizes) for sizes in ((64, 1000, 512, 7, 7), (32, 256, 512, 24, 8))),
]
CUDA_CASES = [
    *(_Classes((256, 10572, 256, 512, 7, 7, m), dtype=dtype) for m in (4, 1) for dtype in (_HALF, torch.float32)),
    *(_Sweep((256, classes, 256, 512, 7, 7, 4), dtype=_HALF) for classes in (2500, 5000, 21144)),
    *(_Sweep((256, 10572, k, 512, 7, 7, 4), dtype=_HALF) for k in (32, 64, 128)),
    *(_Pairs((256, 256, 512, 7, 7), dtype=dtype) for dtype in (_HALF, torch.float32)),
    _Match((256, 2048, 512, 24, 8), dtype=_HALF),
    _Match((3368, 15913, 512, 24, 8), dtype=_HALF, repeats=3, only=(OURS,)),
]


class Method(NamedTuple):
    """How a provider scores, and in what it differs from the case."""

    score: Callable[[Problem], Tensor]
    every_class: bool = False
    sparse_grad: bool = False
    sums: bool = False  # it returns sums of pooled values, not scores
    compiled: bool = False
    note: str = ""


def methods(op: str, part: str, device: torch.device) -> dict[str, Method]:
    """The providers of a part of an op by name."""
    if op == "classes":
        found = {
            OURS: Method(_class_path),
            PER_LABEL: Method(baselines.per_label),
            VECTORISED: Method(baselines.vectorised),
            f"{VECTORISED}, compiled": Method(baselines.vectorised, compiled=True),
        }
        if part == "step":
            found[SPARSE] = Method(_class_path, sparse_grad=True)
        if part != "backward":
            found[EVERY] = Method(_class_path, every_class=True)
        return found
    if part == "match":
        found = {
            OURS: Method(lambda problem: problem.matcher.match(problem.probe, problem.gallery)),
            PUBLISHED: Method(partial(baselines.match, baselines.all_pairs)),
            TUNED: Method(partial(baselines.match, baselines.all_pairs_tuned)),
        }
    else:
        found = {
            OURS: Method(lambda problem: problem.matcher(problem.probe, problem.gallery)),
            PUBLISHED: Method(baselines.all_pairs),
            TUNED: Method(baselines.all_pairs_tuned),
            f"{TUNED}, compiled": Method(baselines.all_pairs_tuned, compiled=True),
        }
    note = "MaxSim both ways: sums of pooled values, without batch norms and fc"
    for package, maxsim in (("flash_maxsim", _flash_maxsim), ("late_interaction_kernels", _late_interaction)):
        if device.type == "cuda" and importlib.util.find_spec(package):
            score = partial(maxsim_both_ways, maxsim)
            found[package.replace("_", "-")] = Method(score, sums=True, note=note)
    return found


def _class_path(problem: Problem) -> Tensor:
    return problem.matcher(problem.probe, labels=problem.labels)


def _flash_maxsim(queries: Tensor, documents: Tensor) -> Tensor:
    from flash_maxsim import flash_maxsim_batched_train

    return flash_maxsim_batched_train(queries, documents, shared_docs=True)


def _late_interaction(queries: Tensor, documents: Tensor) -> Tensor:
    from late_interaction_kernels import maxsim

    return maxsim(queries, documents)


def maxsim_both_ways(maxsim: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Tensor:
    """Sums of pooled values by a function of queries `[Q, S, C]` and documents `[D, S, C]` that returns `[Q, D]`."""
    probe, gallery = (normalize(maps, dim=1).flatten(2).mT.contiguous() for maps in (problem.probe, problem.gallery))
    return maxsim(probe, gallery) + maxsim(gallery, probe).mT


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # donated buffers would allow one backward pass only
    return torch.compile(function, dynamic=False)


def prepare(method: Method, problem: Problem, part: str) -> measure.Call:
    """What is timed: a forward pass that keeps what the backward needs, a backward pass, both, or scores alone."""
    # batch norms of its own: a retained graph is invalid once their statistics change
    shared = {id(kept): kept for kept in (problem.gallery, problem.matcher.class_neighbors)}
    problem = problem._replace(matcher=copy.deepcopy(problem.matcher, shared).train(part != "match"))
    score = partial(_compiled(method.score) if method.compiled else method.score, problem)
    if part == "match":
        return torch.no_grad()(score)
    if part == "forward":
        return score
    inputs = problem.inputs(part)[: 2 if method.sums else None]
    if part == "step":
        return lambda: torch.autograd.grad(score(), inputs, problem.upstream)
    return partial(torch.autograd.grad, score(), inputs, problem.upstream, retain_graph=True)


def providers(case: Case, part: str, problem: Problem) -> list[measure.Provider]:
    """The providers of a part of a case."""
    device, expected = problem.probe.device, cache(problems.expected_result)

    def provider(name: str, method: Method) -> measure.Provider:
        scored = problem._replace(labels=None) if method.every_class else problem
        work, note = problems.useful_work(scored, part), method.note
        if method.every_class:
            note = f"{work[0] / problems.useful_work(problem, part)[0]:.1f}x the pairs, all counted"

        def prepared() -> measure.Call:
            own = build(case, device, sparse_grad=True) if method.sparse_grad else scored
            return prepare(method, own, part)

        def check(result: Tensor | tuple[Tensor, ...]) -> None:
            compare = problems.check_gradients if part in ("backward", "step") else problems.check_scores
            compare(expected(scored, part, method.sums), problems.tolerance(case.dtype), result)

        has_peak = device.type == "cuda" or part != "backward"  # on a CPU its process would hold the graph, too
        return measure.Provider(name, prepared, check, work, note, has_peak=has_peak, is_compiled=method.compiled)

    return [provider(name, method) for name, method in methods(case.op, part, device).items()]
