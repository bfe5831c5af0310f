"""The class graph of graph sampling as published: classes by the matcher's scores of some images of each.

No class table is needed: each class is the map of a random image of it, or the mean map of several, and the matcher
that is trained scores these maps against each other. `GraphSampler` makes batches from the graph.

Liao & Shao, "Graph Sampling Based Deep Metric Learning for Generalizable Person Re-Identification", CVPR 2022,
arXiv:2104.01546.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .common.dtypes import accumulation_dtype
from .matcher import QAConv
from .progress import show_progress
from .sampler import class_labels
from .scores import k_best
from .validation import check_count, check_device, check_finite_rows, check_flag, check_maps

if TYPE_CHECKING:
    import numpy as np

OUTPUT = "the output of the backbone"  # in errors
BLOCK = 2048  # classes that are scored against as many at a time


@torch.no_grad()
def sample_class_graph(
    backbone: nn.Module,
    matcher: QAConv,
    dataset: Dataset[Any],
    labels: Tensor | Sequence[int] | np.ndarray[Any, Any],
    k: SupportsIndex,
    *,
    per_class: SupportsIndex = 1,
    batch_size: SupportsIndex = 256,
    seed: SupportsIndex = 0,
    progress: bool = False,
) -> Tensor:
    """Find the k classes nearest to every class by the matcher's scores of random images (arXiv:2104.01546).

    Images go through the backbone in eval mode, without gradients, under the caller's autocast. Training flags,
    statistics of norms and torch's global random state are then as before. Nothing of size `[N, N]` is held, but the
    maps of all classes `[N, C, H, W]` are, on the backbone's device and in the dtype that it returns.

    Args:
        backbone: a module that maps images, stacked, to feature maps `[B, C, H, W]` of the matcher's sizes, on the
            matcher's device. Of `DistributedDataParallel` pass its `module`, which does not wait for other ranks.
        matcher: scores class n, as the probe, against each other class, as the gallery, as `matcher.match` does.
        dataset: `dataset[i]` is a tensor, the image, or a tuple or list that starts with it. It is loaded in this
            process; what `dataset` draws at random, it draws from where it always does: pass one without augmentation.
        labels: int `[M]`, the class of every sample of `dataset`; a tensor, a list or an array. N is the largest + 1,
            and every class below it has samples.
        k: between 1 and N - 1. For `GraphSampler`, at least the classes of a batch less one.
        per_class: images drawn of each class, whose mean map stands for it; all images of a class that has fewer.
        batch_size: images that go through the backbone at a time.
        seed: of the draw. Pass another one for each graph, such as the number of the epoch.
        progress: show it, by tqdm on a terminal, elsewhere as a line now and then.

    Returns:
        int64 `[N, k]` on the CPU: the other classes in descending score, ties by ascending id. `GraphSampler` takes it
        as `neighbors`, and a matcher with a class table as its `class_neighbors`.

    Raises:
        TypeError: arguments of another type, labels that are not integers, samples without an image tensor, maps that
            are not real floating-point tensors.
        ValueError: another number of labels than of samples, a class without samples, a number out of range, maps of
            other sizes than the matcher's or on another device, NaN or Inf in maps or scores.

    Examples:
        >>> images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) // 3
        >>> backbone = torch.nn.Conv2d(3, 16, kernel_size=4, stride=4)
        >>> graph = sample_class_graph(backbone, QAConv(16, 2, 2), images, labels, k=2)
        >>> graph.shape
        torch.Size([4, 2])
    """
    for value, name, expected in ((backbone, "backbone", nn.Module), (matcher, "matcher", QAConv)):
        if not isinstance(value, expected):
            raise TypeError(f"{name}: expected a {expected.__name__}, got {type(value).__name__}")
    check_flag(progress, "progress")
    labels = class_labels(labels)
    size = len(dataset)  # type: ignore[arg-type]
    if size != len(labels):
        raise ValueError(f"dataset: expected a sample for each of {len(labels)} labels, got {size} samples")
    present, classes = labels.unique(), int(labels.max()) + 1
    if len(present) != classes:
        first = torch.arange(min(classes, len(present) + 5), device="cpu")
        first = first[torch.isin(first, present, invert=True)][:5]
        raise ValueError(
            f"labels: no samples of {classes - len(present)} of {classes} classes, first: {first.tolist()}; "
            "number the classes that have samples from 0 on"
        )
    k = check_count(k, "k", low=1, high=classes - 1, why=f"each of {classes} classes has {classes - 1} others")
    per_class = check_count(per_class, "per_class", low=1, high=None, why="images drawn of each class")
    batch_size = check_count(batch_size, "batch_size", low=1, high=None, why="images at a time")
    seed = check_count(seed, "seed", low=0, high=2**63 - 1, why="it seeds a generator")
    with _eval_mode(backbone):
        maps = _class_maps(backbone, matcher, dataset, _draw_samples(labels, per_class, seed), batch_size, progress)
    check_finite_rows(maps, OUTPUT)
    return _nearest_by_score(matcher, maps, k, progress)


def _draw_samples(labels: Tensor, per_class: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random samples without replacement, in rounds: classes that have another, ascending, and that sample of each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator, device="cpu")
    sorted_labels, order = labels[shuffled].sort(stable=True)
    num_samples = sorted_labels.bincount()
    start = num_samples.cumsum(0) - num_samples
    place = torch.arange(len(labels), device="cpu") - start.repeat_interleave(num_samples)
    rounds = [place == number for number in range(min(per_class, int(num_samples.max())))]
    return [(sorted_labels[is_drawn], shuffled[order[is_drawn]]) for is_drawn in rounds]


def _class_maps(
    backbone: nn.Module,
    matcher: QAConv,
    dataset: Dataset[Any],
    rounds: list[tuple[Tensor, Tensor]],
    batch_size: int,
    progress: bool,
) -> Tensor:
    """The mean map of each class's samples `[N, C, H, W]`, given in rounds as `_draw_samples` returns them."""
    device = next((tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())), matcher.fc.weight.device)
    sizes = matcher._map_sizes
    num_drawn = torch.cat([classes for classes, _ in rounds]).bincount()
    done, total = 0, int(num_drawn.sum())
    sums: Tensor | None = None
    with show_progress("class maps", "images", shown=progress) as report:
        for classes, samples in rounds:
            # A round has no class twice: each sum gets one summand at a time, and is the same on every run.
            for some_classes, some_samples in zip(classes.split(batch_size), samples.split(batch_size), strict=True):
                images = torch.stack([_image(dataset, sample) for sample in some_samples.tolist()])
                maps = backbone(images.to(device))
                check_maps(maps, OUTPUT, **sizes)
                check_device(maps, OUTPUT, matcher.fc.weight.device, "the matcher")
                if maps.shape[0] != len(images):
                    raise ValueError(
                        f"{OUTPUT}: expected one for each of {len(images)} images {list(images.shape)}, "
                        f"got shape {list(maps.shape)}"
                    )
                if sums is None:
                    summed = maps.dtype if len(rounds) == 1 else accumulation_dtype(maps.dtype)
                    sums = maps.new_zeros(len(num_drawn), *maps.shape[1:], dtype=summed)
                weights = num_drawn[some_classes].to(sums.device, sums.dtype).reciprocal().view(-1, 1, 1, 1)
                sums.index_add_(0, some_classes.to(sums.device), maps.to(sums.dtype) * weights)
                done += len(images)
                report(done, total)
    assert sums is not None
    return sums.to(maps.dtype)


def _image(dataset: Dataset[Any], index: int) -> Tensor:
    """The image of a sample, which is the image or a tuple that starts with it."""
    sample = dataset[index]
    image = sample[0] if isinstance(sample, (tuple, list)) and sample else sample
    if not isinstance(image, Tensor):
        raise TypeError(
            f"dataset[{index}]: expected an image tensor, or a tuple that starts with one, got {type(sample).__name__}"
            + ("" if image is sample else f" of {type(image).__name__}")
        )
    return image


def _nearest_by_score(matcher: QAConv, maps: Tensor, k: int, progress: bool) -> Tensor:
    """The k best others of every class int64 `[N, k]`, scored block by block; ties by ascending id."""
    classes, done = len(maps), 0
    ids = torch.arange(classes, device=maps.device)
    neighbors = torch.empty(classes, k, dtype=torch.int64, device="cpu")
    with show_progress("class graph", "pairs", shown=progress) as report:
        for start in range(0, classes, BLOCK):
            probe = maps[start : start + BLOCK]
            best = maps.new_empty(len(probe), 0, dtype=accumulation_dtype(maps.dtype))
            best_ids = ids.new_empty(len(probe), 0)
            for first in range(0, classes, BLOCK):
                scores = matcher.match(probe, maps[first : first + BLOCK])
                if not torch.isfinite(scores).all():
                    raise ValueError(
                        f"scores of the matcher hold NaN or Inf, between classes {start} to {start + len(probe) - 1} "
                        f"and {first} to {first + scores.shape[1] - 1}; so do its parameters or statistics"
                    )
                if first == start:
                    scores.fill_diagonal_(-torch.inf)
                # Ids ascend from block to block, so a stable sort leaves the lower one first where scores are equal.
                best = torch.cat([best, scores], dim=1)
                best_ids = torch.cat([best_ids, ids[first : first + BLOCK].expand(len(probe), -1)], dim=1)
                best, best_ids = k_best(best, best_ids, k)
                done += scores.numel()
                report(done, classes**2)
            neighbors[start : start + len(probe)] = best_ids
    return neighbors


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Within the context the module is in eval mode; then every part of it is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        module.train(modes[0][1])  # a module's own `train` may do more than set flags
        for part, training in modes:
            part.training = training
