"""Benchmarks of the class path and of all pairs, beside plain PyTorch.

    python -m bench classes --cases 64x10000x256x512x7x7x4 --parts step
    python -m bench pairs --cases 64x1000x512x7x7

The class graph is not measured here: neighbours are drawn at random. Beside the class path stands the same call without
labels, which scores every class.
"""

from __future__ import annotations

import copy
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import baselines, measure, problems
from .problems import TRAINING, Case, Expected, Problem
from .results import Row

OURS = "qaconv_triton"
MATCH = ("match",)
SLOW_ROUNDS = 2
PER_LABEL, VECTORISED, PUBLISHED, TUNED = (
    f"eager, {how}" for how in ("per label", "vectorised", "as published", "tuned")
)
EVERY, SPARSE = f"{OURS}, every class", f"{OURS}, sparse_grad"
_SWEEP = partial(Case, parts=("step",), repeats=3, only=(OURS, PER_LABEL, VECTORISED), slow=(PER_LABEL,))
_HALF = torch.bfloat16
TINY = {
    "classes": [Case((6, 40, 5, 16, 3, 2, 2), repeats=2, only=(OURS, PER_LABEL, VECTORISED, SPARSE, EVERY))],
    "pairs": [Case((5, 7, 16, 3, 2), (*TRAINING, *MATCH), repeats=2, only=(OURS, PUBLISHED, TUNED))],
}
CPU_CASES = {
    "classes": [
        Case((64, 10000, 256, 512, 7, 7, 4)),
        Case((64, 1000, 128, 512, 7, 7, 1)),
        Case((64, 10000, 256, 512, 7, 7, 4), dtype=_HALF, repeats=3, only=(OURS, PER_LABEL, VECTORISED)),
        *(_SWEEP((64, classes, 64, 512, 7, 7, 4)) for classes in (1000, 2000, 4000, 8000)),
        *(_SWEEP((64, 2000, k, 512, 7, 7, 4)) for k in (16, 32, 128, 256)),
    ],
    "pairs": [Case((64, 64, 512, 7, 7)), Case((64, 1000, 512, 7, 7), MATCH), Case((32, 256, 512, 24, 8), MATCH)],
}
CUDA_CASES = {
    "classes": [
        *(Case((256, 10572, 256, 512, 7, 7, each), dtype=dtype) for each in (4, 1) for dtype in (_HALF, torch.float32)),
        *(_SWEEP((256, classes, 256, 512, 7, 7, 4), dtype=_HALF) for classes in (2500, 5000, 21144)),
        *(_SWEEP((256, 10572, k, 512, 7, 7, 4), dtype=_HALF) for k in (32, 64, 128)),
    ],
    "pairs": [
        *(Case((256, 256, 512, 7, 7), dtype=dtype) for dtype in (_HALF, torch.float32)),
        Case((256, 2048, 512, 24, 8), MATCH, _HALF),
        Case((3368, 15913, 512, 24, 8), MATCH, _HALF, repeats=3, only=(OURS,)),
    ],
}


class Method(NamedTuple):
    """How a provider scores, and in what it differs from the case."""

    score: Callable[[Problem], Tensor]
    every_class: bool = False
    sparse_grad: bool = False
    sums: bool = False  # it returns sums of pooled values, not scores
    compiled: bool = False
    rounds: int | None = None
    note: str = ""


def methods(op: str, part: str, device: torch.device) -> dict[str, Method]:
    """The providers of a part of an op by name."""
    if op == "classes":
        compiled = partial(_compiled, baselines.vectorised)
        found = {
            OURS: Method(lambda p: p.matcher(p.probe, labels=p.labels)),
            PER_LABEL: Method(lambda p: baselines.per_label(p.matcher, p.probe, p.labels)),
            VECTORISED: Method(lambda p: baselines.vectorised(p.matcher, p.probe, p.labels, p.instances)),
            f"{VECTORISED}, compiled": Method(
                lambda p: compiled()(p.matcher, p.probe, p.labels, p.instances, wide=True), compiled=True
            ),
        }
        if part == "step":
            found[SPARSE] = Method(found[OURS].score, sparse_grad=True)
        if part != "backward":
            found[EVERY] = Method(lambda p: p.matcher(p.probe), every_class=True, rounds=3)
        return found
    if part == "match":
        found = {
            OURS: Method(lambda p: p.matcher.match(p.probe, p.gallery)),
            PUBLISHED: Method(lambda p: baselines.match(baselines.all_pairs, p.matcher, p.probe, p.gallery)),
            TUNED: Method(lambda p: baselines.match(baselines.all_pairs_tuned, p.matcher, p.probe, p.gallery)),
        }
    else:
        compiled = partial(_compiled, baselines.all_pairs_tuned)
        found = {
            OURS: Method(lambda p: p.matcher(p.probe, p.gallery)),
            PUBLISHED: Method(lambda p: baselines.all_pairs(p.matcher, p.probe, p.gallery)),
            TUNED: Method(lambda p: baselines.all_pairs_tuned(p.matcher, p.probe, p.gallery)),
            f"{TUNED}, compiled": Method(lambda p: compiled()(p.matcher, p.probe, p.gallery), compiled=True),
        }
    note = "MaxSim both ways: sums of pooled values, without batch norms and fc"
    for package, score in (("flash_maxsim", _flash_maxsim), ("late_interaction_kernels", _late_interaction)):
        if device.type == "cuda" and importlib.util.find_spec(package):
            found[package.replace("_", "-")] = Method(score, sums=True, note=note)
    return found


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # donated buffers would allow one backward pass only
    return torch.compile(function, dynamic=False)


def _flash_maxsim(problem: Problem) -> Tensor:
    from flash_maxsim import flash_maxsim_batched_train

    return maxsim_both_ways(partial(flash_maxsim_batched_train, shared_docs=True), problem)


def _late_interaction(problem: Problem) -> Tensor:
    from late_interaction_kernels import maxsim

    return maxsim_both_ways(maxsim, problem)


def maxsim_both_ways(maxsim: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Tensor:
    """Sums of pooled values by a function of queries `[Q, S, C]` and documents `[D, S, C]` that returns `[Q, D]`."""
    probe, gallery = (normalize(maps, dim=1).flatten(2).mT.contiguous() for maps in (problem.probe, problem.gallery))
    return maxsim(probe, gallery) + maxsim(gallery, probe).mT


def prepare(method: Method, problem: Problem, part: str) -> measure.Call:
    """What is timed: a forward pass that keeps what the backward needs, a backward pass, both, or scores alone."""
    if part == "match":
        return torch.no_grad()(partial(method.score, problem))
    if part == "forward":
        return partial(method.score, problem)
    inputs = problem.inputs(part)[: 2 if method.sums else None]
    if part == "step":
        return lambda: torch.autograd.grad(method.score(problem), inputs, problem.upstream)
    scores = method.score(problem)
    return lambda: torch.autograd.grad(scores, inputs, problem.upstream, retain_graph=True)


def providers(
    op: str, case: Case, part: str, problem: Problem, wanted: Sequence[str] = ()
) -> Iterator[measure.Provider]:
    """The providers of a part of a case, made one after the other; `wanted` selects by a part of the name."""
    device, expected = problem.probe.device, cache(problems.expected_result)
    for name, method in methods(op, part, device).items():
        if not (any(text in name for text in wanted) if wanted else not case.only or name in case.only):
            continue
        scored = problem._replace(labels=None) if method.every_class else problem
        # batch norms of its own: a retained graph is invalid once their statistics change
        own = problems.build(op, case, device, sparse_grad=True) if method.sparse_grad else _with_own_norms(scored)
        own.matcher.train(part != "match")
        function = measure.attempt(partial(prepare, method, own, part))
        peak: Callable[[], int | None] | None = partial(measure.device_peak, function, device)
        if device.type != "cuda":  # the process of a backward would hold the graph, too
            peak = None if part == "backward" else partial(measure.resident_peak, partial(_calls, op, case, part, name))
        work, note = problems.useful_work(scored, part), method.note
        if method.every_class:
            note = f"{work[0] / problems.useful_work(problem, part)[0]:.1f}x the pairs, all counted"
        checked = partial(
            _check, part, problems.tolerance(case.dtype), partial(expected, scored, part != "match", method.sums)
        )
        rounds = SLOW_ROUNDS if name in case.slow else method.rounds
        yield measure.Provider(name, function, checked, note, peak=peak, rounds=rounds, work=work)


def _with_own_norms(problem: Problem) -> Problem:
    shared = {id(kept): kept for kept in (problem.gallery, problem.matcher.class_neighbors)}
    return problem._replace(matcher=copy.deepcopy(problem.matcher, shared))


def _check(part: str, limit: problems.Tolerance, expected: Callable[[], Expected], result: Any) -> None:
    check = problems.check_gradients if part in ("backward", "step") else problems.check_scores
    check(expected(), limit, result)


def _calls(op: str, case: Case, part: str, name: str) -> tuple[measure.Call, measure.Call]:
    """A small call and that of the case, for the process in which memory is measured.

    A compiled method is compiled for its sizes: there the first call is as large as the second.
    """
    device = torch.device("cpu")
    method = methods(op, part, device)[name]

    def call(size: Case) -> measure.Call:
        problem = problems.build(op, size, device, method.sparse_grad)
        problem.matcher.train(part != "match")
        return prepare(method, problem, part)

    large = call(case)
    return large if method.compiled else call(TINY[op][0]._replace(dtype=case.dtype)), large


def run(arguments: Namespace) -> Iterator[list[Row]]:
    """Measure the cases of the command line, one list of rows for each part of a case."""
    device, op = torch.device(arguments.device), arguments.op
    for case in selected_cases(arguments):
        torch.compiler.reset()  # what was compiled for other sizes
        problem = problems.build(op, case, device)
        for part in case.parts:
            rows = measure.rows(
                op,
                case.name,
                case.dtype,
                list(providers(op, case, part, problem, arguments.providers or ())),
                base=OURS,
                repeats=arguments.repeats or case.repeats,
                device=device,
                work=problems.useful_work(problem, part),
                part=part,
                memory=arguments.memory,
            )
            if device.type == "cpu" and part in ("backward", "step"):  # whose gradients are no matrix products
                rows = [replace(row, share_of_matmul=None) for row in rows]
            if rows:
                yield rows


def selected_cases(arguments: Namespace) -> list[Case]:
    """The cases and parts that the command line names, by default those of the device.

    Raises:
        ValueError: the sizes make no case.
    """
    op = arguments.op
    cases = (TINY if arguments.tiny else CUDA_CASES if "cuda" in arguments.device else CPU_CASES)[op]
    if arguments.cases:
        cases = [_named(op, name, {case.name: case for case in reversed(cases)}) for name in arguments.cases]
    if arguments.parts and arguments.cases:  # a named case has any part, the others those that are listed
        cases = [case._replace(parts=arguments.parts) for case in cases]
    elif arguments.parts:
        cases = [case._replace(parts=tuple(part for part in case.parts if part in arguments.parts)) for case in cases]
    if arguments.dtype:
        cases = [case._replace(dtype=getattr(torch, arguments.dtype)) for case in cases]
    return list({(case.name, case.dtype): case for case in reversed(cases)}.values())[::-1]


def _named(op: str, name: str, known: dict[str, Case]) -> Case:
    sizes = tuple(int(size) for size in name.split("x"))
    form = {"classes": "BxNxKxCxHxWxM", "pairs": "PxGxCxHxW"}[op]
    if len(sizes) != form.count("x") + 1 or min(sizes) < 1:
        raise ValueError(f"{op}: expected a case {form}, got {name!r}")
    return known.get(name) or Case(sizes, TRAINING if op == "classes" or sizes[0] == sizes[1] else MATCH)
