"""The matching kernels against what one would use in their place: the class path, and all pairs.

    python -m bench classes --cases 64x10000x256x512x7x7x4 --parts forward step
    python -m bench pairs --cases 64x64x512x7x7

MaxSim, one-sided by itself, is run both ways for all pairs. It is left out of the class path, where the way from a
class to its few probes is not something that its packages offer.

The class graph is not under test: neighbours are drawn at random. Beside the class path stands the same call without
labels, which scores every class: what its restriction to K of N classes saves.
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

from . import eager, measure
from .matching import (
    TRAINING,
    Case,
    Problem,
    Tolerance,
    Truth,
    build,
    check_gradients,
    check_scores,
    tolerance,
    truth,
    work,
)
from .table import Row

OURS = "qaconv_triton"
MATCH = ("match",)
SLOW_ROUNDS = 2
PER_LABEL, VECTORISED, PUBLISHED, TUNED = (
    f"eager, {how}" for how in ("per label", "vectorised", "as published", "tuned")
)
EVERY, SPARSE = f"{OURS}, every class", f"{OURS}, sparse_grad"
TINY = {
    "classes": [Case((6, 40, 5, 16, 3, 2, 2), repeats=2, only=(OURS, PER_LABEL, VECTORISED, SPARSE, EVERY))],
    "pairs": [Case((5, 7, 16, 3, 2), (*TRAINING, *MATCH), repeats=2, only=(OURS, PUBLISHED, TUNED))],
}
SWEPT = partial(Case, parts=("step",), repeats=3, only=(OURS, PER_LABEL, VECTORISED), slow=(PER_LABEL,))
CPU_CASES = {
    "classes": [
        Case((64, 10000, 256, 512, 7, 7, 4)),
        Case((64, 1000, 128, 512, 7, 7, 1)),
        Case((64, 10000, 256, 512, 7, 7, 4), dtype=torch.bfloat16, repeats=3, only=(OURS, PER_LABEL, VECTORISED)),
        *(SWEPT((64, classes, 64, 512, 7, 7, 4)) for classes in (1000, 2000, 4000, 8000)),
        *(SWEPT((64, 2000, k, 512, 7, 7, 4)) for k in (16, 32, 128, 256)),  # 64 is above
    ],
    "pairs": [
        Case((64, 64, 512, 7, 7)),
        Case((64, 1000, 512, 7, 7), MATCH),
        Case((32, 256, 512, 24, 8), MATCH),
    ],
}
CUDA_DTYPES = (torch.bfloat16, torch.float32)
CUDA_CASES = {
    "classes": [
        *(Case((256, 10572, 256, 512, 7, 7, each), dtype=dtype) for each in (4, 1) for dtype in CUDA_DTYPES),
        *(SWEPT((256, classes, 256, 512, 7, 7, 4), dtype=torch.bfloat16) for classes in (2500, 5000, 21144)),
        *(SWEPT((256, 10572, k, 512, 7, 7, 4), dtype=torch.bfloat16) for k in (32, 64, 128)),
    ],
    "pairs": [
        *(Case((256, 256, 512, 7, 7), dtype=dtype) for dtype in CUDA_DTYPES),
        Case((256, 2048, 512, 24, 8), MATCH, torch.bfloat16),
        Case((3368, 15913, 512, 24, 8), MATCH, torch.bfloat16, repeats=3, only=(OURS,)),
    ],
}


class Method(NamedTuple):
    """How a provider scores, and whether it does so with another problem than the case's, or to another end."""

    score: Callable[[Problem], Tensor]
    every: bool = False  # class, whatever the labels
    sparse_grad: bool = False
    sums: bool = False  # of pooled values, not scores
    compiled: bool = False
    rounds: int | None = None
    note: str = ""


def methods(op: str, part: str, device: torch.device) -> dict[str, Method]:
    """All there is for a part of an op on a device, by name."""
    if op == "classes":
        found = {
            OURS: Method(lambda p: p.matcher(p.probe, labels=p.labels)),
            PER_LABEL: Method(lambda p: eager.per_label(p.matcher, p.probe, _labels(p))),
            VECTORISED: Method(lambda p: eager.vectorised(p.matcher, p.probe, _labels(p), p.each)),
            f"{VECTORISED}, compiled": Method(
                lambda p: _compiled(eager.vectorised)(p.matcher, p.probe, p.labels, p.each, wide=True), compiled=True
            ),
        }
        if part == "step":
            found[SPARSE] = Method(found[OURS].score, sparse_grad=True)
        if part != "backward":
            found[EVERY] = Method(lambda p: p.matcher(p.probe), every=True, rounds=3)
        return found
    if part == "match":
        found = {
            OURS: Method(lambda p: p.matcher.match(p.probe, p.items)),
            PUBLISHED: Method(lambda p: eager.match(eager.all_pairs, p.matcher, p.probe, p.items)),
            TUNED: Method(lambda p: eager.match(eager.all_pairs_tuned, p.matcher, p.probe, p.items)),
        }
    else:
        found = {
            OURS: Method(lambda p: p.matcher(p.probe, p.items)),
            PUBLISHED: Method(lambda p: eager.all_pairs(p.matcher, p.probe, p.items)),
            TUNED: Method(lambda p: eager.all_pairs_tuned(p.matcher, p.probe, p.items)),
            f"{TUNED}, compiled": Method(
                lambda p: _compiled(eager.all_pairs_tuned)(p.matcher, p.probe, p.items), compiled=True
            ),
        }
    less = "MaxSim both ways: pooled values summed, without batch norms and fc, which is less"
    if device.type == "cuda" and importlib.util.find_spec("flash_maxsim"):
        found["flash-maxsim"] = Method(_flash_maxsim, sums=True, note=less)
    if device.type == "cuda" and importlib.util.find_spec("late_interaction_kernels"):
        found["late-interaction-kernels"] = Method(_late_interaction, sums=True, note=less)
    return found


def _labels(problem: Problem) -> Tensor:
    assert problem.labels is not None
    return problem.labels


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # donated ones would allow a backward pass once only
    return torch.compile(function, dynamic=False)


def _flash_maxsim(problem: Problem) -> Tensor:
    from flash_maxsim import flash_maxsim_batched_train

    return _both_ways(partial(flash_maxsim_batched_train, shared_docs=True), problem)


def _late_interaction(problem: Problem) -> Tensor:
    from late_interaction_kernels import maxsim

    return _both_ways(maxsim, problem)


def _both_ways(maxsim: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Tensor:
    """Queries `[Q, S, C]` and documents `[D, S, C]` to the sums of the query locations' best matches `[Q, D]`."""
    probe, items = (normalize(maps, dim=1).flatten(2).mT.contiguous() for maps in (problem.probe, problem.items))
    return maxsim(probe, items) + maxsim(items, probe).mT


def prepare(method: Method, problem: Problem, part: str) -> Callable[[], Any]:
    """What is timed: a forward pass with what the backward needs, a backward pass, both, or scores alone."""
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
    op: str, case: Case, part: str, problem: Problem, true: Callable[..., Truth], wanted: Sequence[str] = ()
) -> Iterator[measure.Provider]:
    """The providers of a part of a case, made one after the other; `wanted`: those with one of these in their names."""
    device = problem.probe.device
    for name, method in methods(op, part, device).items():
        if not (any(text in name for text in wanted) if wanted else not case.only or name in case.only):
            continue
        scored = problem._replace(labels=None) if method.every else problem
        own = build(op, case, device, sparse_grad=True) if method.sparse_grad else _apart(scored)
        own.matcher.train(part != "match")
        function = measure.attempt(partial(prepare, method, own, part))
        check = check_gradients if part in ("backward", "step") else check_scores
        checked = partial(_checked, check, partial(true, scored, part != "match", method.sums), tolerance(case.dtype))
        peak: Callable[[], int | None] | None = partial(measure.resident_peak, partial(_calls, op, case, part, name))
        if device.type == "cuda":
            peak = partial(measure.device_peak, function, device)
        flops, moved = work(scored, part)
        note = f"{flops / work(problem, part)[0]:.1f} times the pairs, all counted" if method.every else method.note
        yield measure.Provider(
            name,
            function,
            checked,
            note,
            peak=None
            if part == "backward" and device.type != "cuda"
            else peak,  # its process would hold the graph, too
            rounds=SLOW_ROUNDS if name in case.slow else method.rounds,
            flops=flops,
            moved=moved,
        )


def _apart(problem: Problem) -> Problem:
    """The problem with batch norms of its own: a kept graph minds when their statistics change."""
    shared = {id(kept): kept for kept in (problem.items, problem.matcher.class_neighbors)}
    return problem._replace(matcher=copy.deepcopy(problem.matcher, shared))


def _checked(
    check: Callable[[Truth, Tolerance, Any], measure.Verdict], true: Callable[[], Truth], limit: Tolerance, result: Any
) -> measure.Verdict:
    return check(true(), limit, result)


def _calls(op: str, case: Case, part: str, name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A small call and that of the case, for the process in which memory is measured.

    What is compiled, is compiled for its sizes: there the first call is as large as the second.
    """
    device = torch.device("cpu")
    method = methods(op, part, device)[name]

    def call(size: Case) -> Callable[[], Any]:
        problem = build(op, size, device, method.sparse_grad)
        problem.matcher.train(part != "match")
        return prepare(method, problem, part)

    large = call(case)
    return large if method.compiled else call(TINY[op][0]._replace(dtype=case.dtype)), large


def run(arguments: Namespace) -> Iterator[list[Row]]:
    """Measure what the command line asks for, and hand out the rows of one part of a case at a time."""
    device = torch.device(arguments.device)
    for case in _chosen(arguments, device):
        yield from _parts(arguments, case, device)


def _parts(arguments: Namespace, case: Case, device: torch.device) -> Iterator[list[Row]]:
    torch.compiler.reset()  # what was compiled for other sizes
    problem, true = build(arguments.op, case, device), cache(truth)
    for part in case.parts:
        if found := _measured(arguments, case, part, problem, true):
            yield found


def _measured(arguments: Namespace, case: Case, part: str, problem: Problem, true: Callable[..., Truth]) -> list[Row]:
    flops, moved = work(problem, part)
    found = measure.rows(
        arguments.op,
        case.name,
        case.dtype,
        list(providers(arguments.op, case, part, problem, true, arguments.providers or ())),
        base=OURS,
        repeats=arguments.repeats or case.repeats,
        device=problem.probe.device,
        flops=flops,
        moved=moved,
        part=part,
        memory=arguments.memory,
    )
    if problem.probe.device.type == "cpu" and part in ("backward", "step"):  # not by products, see bench.matching
        found = [replace(row, share_of_matmul=None) for row in found]
    return found


def _chosen(arguments: Namespace, device: torch.device) -> list[Case]:
    known = TINY if arguments.tiny else CUDA_CASES if device.type == "cuda" else CPU_CASES
    found = known[arguments.op]
    if arguments.cases:
        found = [case for name in arguments.cases for case in _named(arguments.op, name, found)]
    if arguments.parts:  # of a case that is named any that there are, else those that it has
        possible = TRAINING if arguments.op == "classes" else (*TRAINING, *MATCH)
        asked = {case: possible if arguments.cases else case.parts for case in found}
        found = [case._replace(parts=tuple(p for p in has if p in arguments.parts)) for case, has in asked.items()]
    if arguments.dtype:
        dtype = getattr(torch, arguments.dtype)
        there = {case.name for case in found if case.dtype == dtype}
        found = [case for case in found if case.dtype == dtype or case.name not in there]
        found = list(dict.fromkeys(case._replace(dtype=dtype) for case in found))
    return [case for case in found if case.parts]


def _named(op: str, name: str, known: list[Case]) -> list[Case]:
    """The known cases of that name, or a new one."""
    sizes = tuple(int(size) for size in name.split("x"))
    if op == "classes":
        form = "BxNxKxCxHxWxM of B maps, M a class, N classes, K < N neighbours"
        right = len(sizes) == 7 and min(sizes) > 0 and sizes[2] < sizes[1] and sizes[0] % sizes[6] == 0
        right = right and sizes[0] // sizes[6] <= sizes[1]
    else:
        form, right = "PxGxCxHxW", len(sizes) == 5 and min(sizes) > 0
    if not right:
        raise ValueError(f"{op}: expected a case {form}, got {name!r}")
    parts = TRAINING if op == "classes" or sizes[0] == sizes[1] else MATCH
    return [case for case in known if case.name == name] or [Case(sizes, parts)]
