"""Matching problems of any size, what they are worth, and the truth about them, for `bench.scores`.

Useful work is 2 S S C operations for every pair of maps that is scored; a backward pass counts twice that and a step
three times, as the dense products would, although only best matches carry a gradient: what a CPU saves by taking them
one by one is then no share of a product's ceiling. Useful bytes are the maps of the call read once, pooled values and
the locations they were found at written once, the scores, and for a backward pass all that read again and the gradients
of those maps written; the zeros of a dense gradient do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qaconv_triton import QAConv, reference

from . import measure

TRAINING = ("forward", "backward", "step")
WEIGHT = {"forward": 1, "backward": 2, "step": 3, "match": 1}  # operations of a part, in those of a forward pass
GROUPS = 32  # of items that resemble each other
TRUE_PAIRS = 2**17  # whose gradients are computed in fp64 at most; of more, a sample's
TRUE_PROBES = 2  # in such a sample
BLOCK = 2**25  # correlations at a time in fp64


class Case(NamedTuple):
    """A size to measure; `only` names the providers where not all are of interest, unless the command line names some.

    Those that are `slow` take part in fewer rounds. Sizes are batch, classes, neighbours, C, H, W and samples per class
    on the class path; P, G, C, H, W for all pairs.
    """

    sizes: tuple[int, ...]
    parts: tuple[str, ...] = TRAINING
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    only: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the case is called on the command line and in the results."""
        return "x".join(map(str, self.sizes))


class Problem(NamedTuple):
    """Probes `[P, C, H, W]` to be scored against items `[G, C, H, W]`, a gallery or the class table.

    With labels `[P]` each against the neighbours of its class only, `each` of a class side by side. `upstream` is the
    gradient of the scores `[P, G]`.
    """

    matcher: QAConv
    probe: Tensor
    items: Tensor
    labels: Tensor | None
    upstream: Tensor
    each: int = 1

    def inputs(self, part: str) -> list[Tensor]:
        """What gradients are taken to."""
        head = self.matcher
        modules = [head.fc, head.bn, head.logit_bn] if part == "step" else [head.fc]
        return [self.probe, self.items, *(weight for module in modules for weight in module.parameters())]


def build(op: str, case: Case, device: torch.device, sparse_grad: bool = False) -> Problem:
    """The problem of a case, the same whenever it is built: groups of items, and probes that are items and noise."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        if op == "classes":
            batch, count, k, channels, height, width, each = case.sizes
            matcher = QAConv(channels, height, width, count, k, sparse_grad=sparse_grad)
            assert matcher.class_embed is not None
            items = matcher.class_embed
            spread = torch.arange(k) * ((count - 1) // k) + torch.randint((count - 1) // k, (count, k))
            matcher.class_neighbors = (torch.arange(count).unsqueeze(1) + 1 + spread) % count
            own = torch.randperm(count)[: batch // each].repeat_interleave(each)
            labels: Tensor | None = own
        else:
            each = 1
            batch, count, channels, height, width = case.sizes
            matcher, labels, own = QAConv(channels, height, width), None, torch.arange(batch) % count
            items = torch.nn.Parameter(torch.randn(count, channels, height, width) / channels**0.5)
        shape, length = (channels, height, width), channels**-0.5
        groups, member = length * torch.randn(GROUPS, *shape), torch.randint(GROUPS, (count,))
        for start in range(0, count, 1024):
            items.data[start : start + 1024] += groups[member[start : start + 1024]]
        probe = items.data[own] + length * torch.randn(batch, *shape)
        probe = probe.to(case.dtype, memory_format=torch.contiguous_format).requires_grad_()
        torch.nn.init.uniform_(matcher.fc.weight, 0.5, 1.5)
        for norm, mean in ((matcher.bn, 0.2), (matcher.logit_bn, 0.5)):  # in eval mode, scores of a usual size
            assert norm.running_mean is not None
            norm.running_mean.fill_(mean)
        if case.dtype == torch.float64:
            matcher.double()
        items.data = items.data.to(case.dtype)
        upstream = torch.randn(batch, count).to(matcher.fc.weight.dtype)
    return Problem(matcher, probe, items, labels, upstream, each)


class Truth(NamedTuple):
    """The result in fp64: scores `[R, G]` of the probes `rows [R]`, and gradients where there are any.

    Those of the first probes `[r, S, C]`, of the items `ids [T]`, `[T, S, C]`, zero in `untouched`, and of fc's weight.
    """

    rows: Tensor
    scores: Tensor
    probe: Tensor
    ids: Tensor
    items: Tensor
    untouched: Tensor
    weight: Tensor


def truth(problem: Problem, training: bool, sums: bool = False) -> Truth:
    """Scores, or with `sums` the pooled values' sums, and their gradients by autograd, a block of pairs at a time."""
    matcher, count, total = problem.matcher, len(problem.probe), len(problem.items)
    sample = torch.arange(count, device=problem.probe.device)
    if not training and count > max(1, TRUE_PAIRS // total):  # then each score stands for itself
        sample = torch.linspace(0, count - 1, max(1, TRUE_PAIRS // total), device=sample.device).long()
        problem, count = problem._replace(probe=problem.probe.detach()[sample]), len(sample)
    blocks = list(_blocks(problem, count))
    with torch.no_grad():
        found = torch.cat([_pooled(problem, *block)[2].flatten(0, 1) for block in blocks])
    found.requires_grad_(training)
    bn, fc, logit_bn = copy.deepcopy(matcher.bn), copy.deepcopy(matcher.fc), copy.deepcopy(matcher.logit_bn)
    for module in (bn, fc, logit_bn):
        module.double().train(training)
    values = found.sum(-1) if sums else reference.pair_scores(found, bn, fc, logit_bn)
    sizes = [len(rows) * len(ids) for rows, ids in blocks]
    scores = values.new_zeros(count, total)
    for (rows, ids), part in zip(blocks, values.split(sizes), strict=True):
        scores[rows.unsqueeze(1), ids] = part.view(len(rows), len(ids))
    none = found.new_zeros(0)
    if not training:
        return Truth(sample, scores.detach(), none, none, none, none, none)
    upstream = problem.upstream.double()
    gradient, weight = torch.autograd.grad(scores, (found, fc.weight), upstream, allow_unused=sums)
    touched = torch.cat([ids for _, ids in blocks]).unique()
    whole = len(found) <= TRUE_PAIRS
    known = touched if whole else blocks[0][1]
    of_probe = found.new_zeros(problem.probe.flatten(2).mT.shape)
    of_items = found.new_zeros(len(known), *of_probe.shape[1:])
    for number, ((rows, ids), part) in enumerate(zip(blocks, gradient.split(sizes), strict=True)):
        part = part.view(len(rows), len(ids), -1)
        if not whole and number > 0:
            rows, part = rows[:TRUE_PROBES], part[:TRUE_PROBES]
        left, right, pooled = _pooled(problem, rows, ids)
        to_probe, to_items = torch.autograd.grad(pooled, (left, right), part)
        of_probe[rows] += to_probe
        if whole or number == 0:
            of_items[torch.searchsorted(known, ids)] += to_items
    is_untouched = torch.ones(total, dtype=torch.bool, device=touched.device).index_fill(0, touched, False)
    of_probe = of_probe if whole else of_probe[:TRUE_PROBES].clone()
    untouched = is_untouched.nonzero().squeeze(1)
    return Truth(sample, scores.detach(), of_probe, known, of_items, untouched, none if sums else weight)


def _blocks(problem: Problem, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pair to be scored, of the first `count` probes: rows, and the items that each of them is scored with."""
    if problem.labels is not None:
        assert problem.matcher.class_neighbors is not None
        for label in problem.labels.unique():
            yield (problem.labels == label).nonzero().squeeze(1), problem.matcher.class_neighbors[label]
        return
    device, locations = problem.probe.device, problem.probe[0, 0].numel()
    ids = torch.arange(len(problem.items), device=device)
    for part in ids.split(max(1, BLOCK // (count * locations**2))):
        yield torch.arange(count, device=device), part


def _pooled(problem: Problem, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raw maps `[r, S, C]`, `[i, S, C]` in fp64, to take gradients to, and their best matches `[r, i, 2S]`."""
    left, right = (
        reference.locations(maps.detach()[chosen]).double().requires_grad_()
        for maps, chosen in ((problem.probe, rows), (problem.items, ids))
    )
    return left, right, reference.max_correlation(reference.normalize(left), right, normalize_gallery=True)


class Tolerance(NamedTuple):
    """Error of scores relative to the largest, cosine of gradients at least, error of their lengths."""

    scores: float
    cosine: float
    length: float


def tolerance(dtype: torch.dtype) -> Tolerance:
    """What a right result may differ by.

    In half precision correlations that are equal once rounded are common, and each such tie may send a gradient to
    another location than the true one.
    """
    return Tolerance(5e-2, 0.99, 5e-2) if dtype.itemsize == 2 else Tolerance(1e-3, 0.9999, 1e-2)


def check_scores(true: Truth, limit: Tolerance, scores: Tensor) -> measure.Verdict:
    """Compare scores `[P, G]` with the truth; where nothing was scored that is zero."""
    if scores.shape[1] != true.scores.shape[1] or len(scores) <= int(true.rows[-1]):
        return measure.Verdict(
            f"scores {list(scores.shape)}, of probes up to {int(true.rows[-1])} {list(true.scores.shape)}"
        )
    if not scores.isfinite().all():
        return measure.Verdict("scores that are not finite")
    error = (scores.detach()[true.rows].double() - true.scores).abs().max() / true.scores.abs().max()
    if not error.item() <= limit.scores:  # NaN is wrong, too
        return measure.Verdict(f"scores are off by {error.item():.2g} of the largest, more than {limit.scores:.2g}")
    return measure.Verdict()


def check_gradients(true: Truth, limit: Tolerance, gradients: Sequence[Tensor]) -> measure.Verdict:
    """Compare gradients, to be those of probes, items and fc's weight, with the truth."""
    probe, items, *others = gradients
    if items.is_sparse:
        items = items.coalesce()
        if not torch.equal(items.indices()[0], true.ids):
            return measure.Verdict("a sparse gradient of other rows than those touched")
        items = items.values()
    else:
        if any(items[ids].any() for ids in true.untouched.split(1024)):
            return measure.Verdict("a gradient in rows that were not touched")
        items = items[true.ids]
    probe = probe[: len(true.probe)]
    compared = {"probes": (probe.flatten(2).mT, true.probe), "items": (items.flatten(2).mT, true.items)}
    if others:
        compared["fc.weight"] = (others[0], true.weight)
    for name, (found, expected) in compared.items():
        left, right = found.double().flatten(), expected.flatten()
        cosine = (torch.dot(left, right) / (left.norm() * right.norm())).item()
        if not cosine >= limit.cosine:
            return measure.Verdict(f"gradient of {name}: cosine {cosine:.5f} to the truth, below {limit.cosine}")
        length = (left.norm() / right.norm()).item()
        if not abs(length - 1) <= limit.length:
            return measure.Verdict(f"gradient of {name}: {length:.3f} times as long as the truth")
    return measure.Verdict()


def work(problem: Problem, part: str) -> tuple[float, float]:
    """Useful operations and useful bytes."""
    count, channels, height, width = problem.probe.shape
    locations, touched, each = height * width, len(problem.items), len(problem.items)
    if problem.labels is not None:
        assert problem.matcher.class_neighbors is not None
        ids = problem.matcher.class_neighbors[problem.labels]
        touched, each = len(ids.unique()), ids.shape[1]
    maps = (count + touched) * locations * channels * problem.probe.element_size()
    scores = problem.upstream.numel() * problem.upstream.element_size()
    pooled = count * each * 2 * locations * (problem.upstream.element_size() + (1 if locations <= 256 else 2))
    moved = {"match": maps + scores, "forward": maps + scores + pooled, "backward": 2 * maps + scores + pooled}
    moved["step"] = moved["forward"] + moved["backward"]
    return WEIGHT[part] * 2.0 * count * each * locations**2 * channels, float(moved[part])
