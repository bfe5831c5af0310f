"""Matching problems of any size, their expected results in fp64, and their useful work, for `bench.scores`.

Useful FLOPs are 2 S S C for every pair of maps, twice that for a backward pass and three times for a step, whatever a
provider does. Useful bytes are every map, pooled value, location, score and gradient read or written once; the zeros of
a dense gradient do not count.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qaconv_triton import QAConv, reference

from .cases import Case

FORWARD_PASSES = {"forward": 1, "backward": 2, "step": 3, "match": 1}  # FLOPs of a part, in those of a forward pass
GROUPS = 32  # of similar gallery maps
MAX_EXPECTED_PAIRS = 2**17  # of more, scores of some probes in eval mode, gradients of some maps
SAMPLED_PROBES = 2  # whose gradients are computed of more pairs
BLOCK = 2**21  # correlations at a time in fp64, for a CPU's cache


class Problem(NamedTuple):
    """Probes `[P, C, H, W]` to be scored against a gallery `[G, C, H, W]`, which may be the class table.

    With labels `[P]` each probe is scored against the neighbours of its class only, with `instances` of a class side by
    side. `upstream` is the gradient of the scores `[P, G]`.
    """

    matcher: QAConv
    probe: Tensor
    gallery: Tensor
    labels: Tensor | None
    upstream: Tensor
    instances: int = 1

    def inputs(self, part: str) -> list[Tensor]:
        """What gradients are taken to."""
        head = self.matcher
        modules = [head.fc, head.bn, head.logit_bn] if part == "step" else [head.fc]
        return [self.probe, self.gallery, *(weight for module in modules for weight in module.parameters())]


def build(case: Case, device: torch.device, sparse_grad: bool = False) -> Problem:
    """The problem of a case, the same whenever it is built: groups of similar maps, probes are such maps plus noise."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        if case.op == "classes":
            batch, count, k, channels, height, width, instances = case.sizes
            matcher = QAConv(channels, height, width, count, k, sparse_grad=sparse_grad)
            gallery = matcher.class_embed
            spread = torch.arange(k) * ((count - 1) // k) + torch.randint((count - 1) // k, (count, k))
            matcher.class_neighbors = (torch.arange(count).unsqueeze(1) + 1 + spread) % count
            labels = own = torch.randperm(count)[: batch // instances].repeat_interleave(instances)
        else:
            batch, count, channels, height, width = case.sizes
            matcher, labels, own, instances = QAConv(channels, height, width), None, torch.arange(batch) % count, 1
            gallery = torch.nn.Parameter(torch.randn(count, channels, height, width) / channels**0.5)
        shape, scale = (channels, height, width), channels**-0.5
        groups, member = scale * torch.randn(GROUPS, *shape), torch.randint(GROUPS, (count,))
        for start in range(0, count, 1024):
            gallery.data[start : start + 1024] += groups[member[start : start + 1024]]
        probe = gallery.data[own] + scale * torch.randn(batch, *shape)
        probe = probe.to(case.dtype, memory_format=torch.contiguous_format).requires_grad_()
        torch.nn.init.uniform_(matcher.fc.weight, 0.5, 1.5)
        for norm, mean in ((matcher.bn, 0.2), (matcher.logit_bn, 0.5)):  # for scores of a usual size in eval mode
            norm.running_mean.fill_(mean)
        if case.dtype == torch.float64:
            matcher.double()
        gallery.data = gallery.data.to(case.dtype)
        upstream = torch.randn(batch, count).to(matcher.fc.weight.dtype)
    return Problem(matcher, probe, gallery, labels, upstream, instances)


class Expected(NamedTuple):
    """The result in fp64: scores `[R, G]` of the probes `rows [R]`, and of a backward pass gradients.

    Gradients of the first probes `[P, S, C]`, of the first of the gallery maps `ids [T]` that are scored, `[T, S, C]`,
    and of fc's weight.
    """

    rows: Tensor
    scores: Tensor
    probe: Tensor | None = None
    ids: Tensor | None = None
    gallery: Tensor | None = None
    weight: Tensor | None = None


def expected_result(problem: Problem, part: str, sums: bool = False) -> Expected:
    """Scores, or with `sums` the sums of pooled values, and what gradients a part has, a block of pairs at a time."""
    training, has_gradients = part != "match", part in ("backward", "step")
    matcher, (count, total) = problem.matcher, problem.upstream.shape
    rows = torch.arange(count, device=problem.probe.device)
    if not training and problem.labels is None:  # without batch statistics scores are independent
        sampled = min(count, max(1, MAX_EXPECTED_PAIRS // total))
        rows = torch.linspace(0, count - 1, sampled, device=rows.device).round().long()
        problem = problem._replace(probe=problem.probe.detach()[rows])
    blocks = list(_blocks(problem))
    with torch.no_grad():
        pooled = torch.cat([_pooled(problem, *block)[2].flatten(0, 1) for block in blocks])
    pooled.requires_grad_(has_gradients)
    head = [copy.deepcopy(module).double().train(training) for module in (matcher.bn, matcher.fc, matcher.logit_bn)]
    values = pooled.sum(-1) if sums else reference.pair_scores(pooled, *head)
    sizes = [len(probes) * len(ids) for probes, ids in blocks]
    scores = values.new_zeros(len(rows), total)
    for (probes, ids), block in zip(blocks, values.split(sizes), strict=True):
        scores[probes.unsqueeze(1), ids] = block.view(len(probes), len(ids))
    if not has_gradients:
        return Expected(rows, scores.detach())
    inputs = (pooled, head[1].weight)
    gradient, weight = torch.autograd.grad(scores, inputs, problem.upstream.double(), allow_unused=sums)
    touched = torch.cat([ids for _, ids in blocks]).unique()
    is_sampled = problem.labels is None and len(pooled) > MAX_EXPECTED_PAIRS
    known = len(blocks[0][1]) if is_sampled else len(touched)  # gallery maps whose gradients are computed
    of_probe = pooled.new_zeros(problem.probe.flatten(2).mT.shape)
    of_gallery = pooled.new_zeros(known, *of_probe.shape[1:])
    for number, ((probes, ids), block) in enumerate(zip(blocks, gradient.split(sizes), strict=True)):
        block = block.view(len(probes), len(ids), -1)
        if is_sampled and number > 0:
            probes, block = probes[:SAMPLED_PROBES], block[:SAMPLED_PROBES]
        left, right, best = _pooled(problem, probes, ids)
        to_probe, to_gallery = torch.autograd.grad(best, (left, right), block)
        of_probe[probes] += to_probe
        if not is_sampled or number == 0:
            of_gallery[torch.searchsorted(touched, ids)] += to_gallery
    of_probe = of_probe[:SAMPLED_PROBES] if is_sampled else of_probe
    return Expected(rows, scores.detach(), of_probe, touched, of_gallery, weight)


def _blocks(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pair: some probes, and the gallery ids that each of them is scored against."""
    if problem.labels is not None:
        for label in problem.labels.unique():
            yield (problem.labels == label).nonzero().squeeze(1), problem.matcher.class_neighbors[label]
        return
    every, ids = (torch.arange(len(maps), device=maps.device) for maps in (problem.probe, problem.gallery))
    for part in ids.split(max(1, BLOCK // (len(every) * problem.probe[0, 0].numel() ** 2))):
        yield every, part


def _pooled(problem: Problem, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raw maps `[r, S, C]`, `[i, S, C]` in fp64, to take gradients to, and their best matches `[r, i, 2S]`."""
    left, right = (
        reference.locations(maps.detach()[selected]).double().requires_grad_()
        for maps, selected in ((problem.probe, rows), (problem.gallery, ids))
    )
    return left, right, reference.max_correlation(reference.normalize(left), right, normalize_gallery=True)


class Tolerance(NamedTuple):
    """Error of scores relative to the largest, cosine of gradients at least, relative error of their norms."""

    scores: float
    cosine: float
    norm: float


def tolerance(dtype: torch.dtype) -> Tolerance:
    """In half precision many correlations tie once rounded, and a tie may send a gradient to another location."""
    return Tolerance(5e-2, 0.99, 5e-2) if dtype.itemsize == 2 else Tolerance(1e-3, 0.9999, 1e-2)


def check_scores(expected: Expected, limit: Tolerance, scores: Tensor) -> None:
    """Assert that scores `[P, G]` are the expected ones, zero where nothing is scored."""
    assert scores.shape[1] == expected.scores.shape[1], f"scores {list(scores.shape)}"
    assert len(scores) > int(expected.rows[-1]), f"scores {list(scores.shape)} of {int(expected.rows[-1]) + 1} probes"
    assert scores.isfinite().all(), "scores are not finite"
    error = (scores.detach()[expected.rows].double() - expected.scores).abs().max() / expected.scores.abs().max()
    assert error.item() <= limit.scores, f"scores are off by {error.item():.2g} of the largest"


def check_gradients(expected: Expected, limit: Tolerance, gradients: Sequence[Tensor]) -> None:
    """Assert that gradients of probes, gallery and fc's weight are the expected ones."""
    probe, gallery, *others = gradients
    if gallery.is_sparse:
        gallery = gallery.coalesce()
        assert torch.equal(gallery.indices()[0], expected.ids), "the sparse gradient is of other rows than those scored"
        gallery = gallery.values()
    else:
        has_gradient = torch.cat([part.flatten(1).any(dim=1) for part in gallery.split(1024)])
        has_gradient[expected.ids] = False
        assert not has_gradient.any(), "a row that was not scored has a gradient"
        gallery = gallery[expected.ids[: len(expected.gallery)]]
    compared = [("probe", probe.flatten(2).mT, expected.probe), ("gallery", gallery.flatten(2).mT, expected.gallery)]
    compared += [("fc.weight", others[0], expected.weight)] if others else []
    for name, gradient, wanted in compared:
        left, right = gradient[: len(wanted)].double().flatten(), wanted.flatten()
        cosine = (torch.dot(left, right) / (left.norm() * right.norm())).item()
        norm = (left.norm() / right.norm()).item()
        assert cosine >= limit.cosine, f"gradient of {name}: cosine {cosine:.5f} to the expected one"
        assert abs(norm - 1) <= limit.norm, f"gradient of {name}: {norm:.3f}x the expected norm"


def useful_work(problem: Problem, part: str) -> tuple[float, float]:
    """Useful FLOPs and bytes."""
    count, channels, height, width = problem.probe.shape
    locations, touched, scored = height * width, len(problem.gallery), len(problem.gallery)
    if problem.labels is not None:
        ids = problem.matcher.class_neighbors[problem.labels]
        touched, scored = len(ids.unique()), ids.shape[1]
    maps = (count + touched) * locations * channels * problem.probe.element_size()
    scores = problem.upstream.numel() * problem.upstream.element_size()
    pooled = count * scored * 2 * locations * (problem.upstream.element_size() + (1 if locations <= 256 else 2))
    moved = {"match": maps + scores, "forward": maps + scores + pooled, "backward": 2 * maps + scores + pooled}
    moved["step"] = moved["forward"] + moved["backward"]
    return FORWARD_PASSES[part] * 2.0 * count * scored * locations**2 * channels, float(moved[part])
