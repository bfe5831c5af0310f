"""What glyphs.py, ablations.py and images.py train and measure with; docs/training.md gives the effect of each part.

- `Recipe`: the choices of a training, at what we recommend.
- `MatchingLoss`: QAConv; a sample is scored against its class and the K nearest to it, K random ones, or all N.
- `PooledLoss`: the usual baseline, one vector per picture.
- `fit`: the training loop.
- `bootstrap_interval`: the interval of a mean over queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from qaconv_triton import QAConv, SoftmaxTripletLoss
from qaconv_triton.evaluation import rank_gallery
from qaconv_triton.functional import class_neighbors
from qaconv_triton.losses import batch_hard_hinge

MARGIN = 1.0  # of the triplet loss
CANDIDATES = 256  # nearest classes among which a group of near classes is looked for


@dataclass(frozen=True)
class Recipe:
    """The choices of a training."""

    scored: str = "nearest"  # the classes a sample is scored against: nearest, random, all; or pooled, the baseline
    k_nearest: int = 20
    include_self: bool = True  # the own class among them
    epochs_from_means: int = 2  # epochs, of the first ones, that start with each class at the mean of its pictures
    learning_rate: float = 3e-3
    table_rate: float = 1.0  # of the class table, times learning_rate
    graph_every: int = 1  # epochs
    near_classes: int = 1  # in a batch: groups of so many classes that are near to each other; 1: random classes
    batch_classes: int = 16
    instances: int = 4  # pictures of each class in a batch
    triplet_weight: float = 1.0  # of the hardest pairs of a batch, beside the cross entropy over classes


class Backbone(nn.Sequential):
    """A few small convolutions: pictures [B, inputs, h, w] -> feature maps [B, channels, h / stride, w / stride]."""

    def __init__(self, inputs: int, channels: int, stride: int = 4) -> None:
        layers: list[nn.Module] = [*convolution(inputs, 32)]
        width = 32
        while stride > 1:
            layers += [nn.ReLU(inplace=True), *convolution(width, 64, stride=2)]
            width, stride = 64, stride // 2
        super().__init__(*layers, nn.ReLU(inplace=True), *convolution(width, channels))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.contiguous(memory_format=torch.channels_last))


def convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)


class MatchingLoss(nn.Module):
    """Cross entropy over the classes that a sample is scored against, and the triplet loss over its batch.

    Args:
        recipe: its `scored`, "nearest": the K classes nearest to the sample's own; "random": K others, drawn anew for
            every batch; "all": every class.
        shape: C, H, W of the feature maps.
        num_classes: N.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.scored = recipe.scored
        self.matcher = QAConv(*shape, num_classes, recipe.k_nearest, include_self=recipe.include_self)
        background = "ignore" if recipe.include_self else "zero"
        self.loss = SoftmaxTripletLoss(self.matcher, MARGIN, recipe.triplet_weight, background=background)

    @property
    def table(self) -> nn.Parameter:
        assert self.matcher.class_embed is not None
        return self.matcher.class_embed

    def update_graph(self) -> None:
        """Search the nearest classes again: the table has moved."""
        if self.scored == "nearest":
            self.matcher.compute_class_neighbors()

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        """The loss of every sample `[B]`."""
        if self.scored == "all":
            class_loss = F.cross_entropy(self.matcher(feature), target, reduction="none")
            triplet_loss, _ = batch_hard_hinge(self.matcher(feature, "same"), target, MARGIN)
            return class_loss + triplet_loss.mean()
        if self.scored == "random":
            self.matcher.class_neighbors = draw_random_graph(len(self.table), self.matcher.k_nearest)
        _, _, loss, _, _ = self.loss(feature, target)
        return loss

    def rank(self, query: Tensor, gallery: Tensor, query_occ: Tensor | None = None) -> Tensor:
        """The whole gallery from best to worst for every query `[Q, G]`; `query_occ [Q, 1, H, W]`: what is visible."""
        return rank_gallery(self.matcher, query, gallery, len(gallery), query_occ=query_occ)[1]


class PooledLoss(nn.Module):
    """The baseline: cosine of globally pooled features, with the same two losses and a learned scale."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_classes, channels, 1, 1) / channels**0.5)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def update_graph(self) -> None:
        """There is no graph."""

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        """The loss of every sample `[B]`."""
        class_loss = F.cross_entropy(self.scale * self.match(feature, self.table), target, reduction="none")
        triplet_loss, _ = batch_hard_hinge(self.scale * self.match(feature, feature), target, MARGIN)
        return class_loss + triplet_loss.mean()

    def match(self, probe: Tensor, gallery: Tensor) -> Tensor:
        """Cosines `[P, G]`."""
        return pool(probe) @ pool(gallery).mT

    def rank(self, query: Tensor, gallery: Tensor) -> Tensor:
        """The whole gallery from best to worst for every query `[Q, G]`."""
        return self.match(query, gallery).argsort(dim=1, descending=True, stable=True)


def pool(features: Tensor) -> Tensor:
    return F.normalize(features.mean(dim=(2, 3)), dim=1)


def draw_random_graph(num_classes: int, k: int) -> Tensor:
    """K distinct random other classes for every class `[N, K]`: the next K of a random circle."""
    circle = torch.randperm(num_classes, device="cpu")
    place = circle.argsort()
    return circle[(place[:, None] + torch.arange(1, k + 1, device="cpu")) % num_classes]


def make_loss(recipe: Recipe, shape: tuple[int, int, int], num_classes: int) -> MatchingLoss | PooledLoss:
    """The loss that a recipe asks for, over feature maps of `shape` [C, H, W]."""
    if recipe.scored == "pooled":
        return PooledLoss(shape[0], num_classes)
    return MatchingLoss(recipe, shape, num_classes)


class ClassBatches:
    """Batches of sample indices for an epoch in which every class comes once: `batch_sampler=` of a DataLoader.

    Args:
        labels: the class of every sample, `[M]`.
        recipe: sizes of a batch, and how many of its classes are near to each other.
        table: the class table, asked for what is near at the start of every epoch.
        seed: of the order.
    """

    def __init__(self, labels: Tensor, recipe: Recipe, table: Tensor, seed: int) -> None:
        self.recipe, self.table = recipe, table
        self.generator = torch.Generator("cpu").manual_seed(seed)
        order = labels.cpu().argsort(stable=True)
        self.samples = order.split(torch.bincount(labels.cpu(), minlength=len(table)).tolist())

    def __len__(self) -> int:
        return -(-len(self.table) // self.recipe.batch_classes)

    def __iter__(self) -> Iterator[list[int]]:
        classes = self.draw_order()
        size = self.recipe.batch_classes
        for start in range(0, len(classes), size):
            chosen = classes[start : start + size]
            if len(chosen) < size:  # the last batch: filled up with classes that came first
                chosen = chosen + classes[: size - len(chosen)]
            yield [sample for label in chosen for sample in self.draw_samples(label)]

    def draw_order(self) -> list[int]:
        """Every class once, in groups of `near_classes` that are near to each other, in random order."""
        order = torch.randperm(len(self.table), generator=self.generator, device="cpu").tolist()
        if self.recipe.near_classes == 1:
            return order
        neighbors = class_neighbors(self.table, min(CANDIDATES, len(self.table) - 1)).tolist()
        groups, free = [], dict.fromkeys(order)
        for anchor in order:
            if anchor in free:
                near = [label for label in neighbors[anchor] if label in free and label != anchor]
                groups.append([anchor, *near[: self.recipe.near_classes - 1]])
                for label in groups[-1]:
                    del free[label]
        shuffled = torch.randperm(len(groups), generator=self.generator, device="cpu").tolist()
        return [label for group in shuffled for label in groups[group]]

    def draw_samples(self, label: int) -> list[int]:
        """Distinct samples of a class, where it has enough."""
        samples = self.samples[label]
        rounds = -(-self.recipe.instances // len(samples))
        order = [torch.randperm(len(samples), generator=self.generator, device="cpu") for _ in range(rounds)]
        return samples[torch.cat(order)[: self.recipe.instances]].tolist()


@torch.no_grad()
def start_table_at_means(table: Tensor, backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set each class of `table [N, C, H, W]` to the mean feature map of its pictures; from there it is learned on.

    Args:
        table: `[N, C, H, W]`, or `[N, C, 1, 1]` for pooled features.
        backbone: pictures to feature maps; in evaluation mode meanwhile.
        batches: pictures and labels; one or two pictures of every class are enough.
    """
    backbone.eval()
    total = torch.zeros_like(table)
    for images, labels in batches:
        features = F.adaptive_avg_pool2d(backbone(images).float(), table.shape[2:])
        total.index_add_(0, labels, F.normalize(features, dim=1))
    backbone.train()
    table.copy_(F.normalize(total, dim=1))


def fit(
    backbone: nn.Module,
    loss_function: MatchingLoss | PooledLoss,
    recipe: Recipe,
    load_epoch: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    load_few: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
) -> Iterator[Tensor]:
    """Train for `steps` batches, and yield the mean loss of each.

    Args:
        backbone: pictures to feature maps.
        loss_function: over these maps.
        recipe: the other choices.
        load_epoch: gives the batches of an epoch, pictures and labels.
        load_few: gives one or two pictures of every class, for its mean.
        steps: batches in all.
    """
    table = loss_function.table
    others = [*backbone.parameters(), *(value for value in loss_function.parameters() if value is not table)]
    rates = [recipe.learning_rate, recipe.learning_rate * recipe.table_rate]
    groups = [{"params": others, "lr": rates[0]}, {"params": [table], "lr": rates[1]}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = OneCycleLR(optimizer, rates, total_steps=steps)
    step = epoch = 0
    while step < steps:
        if epoch < recipe.epochs_from_means:
            start_table_at_means(table, backbone, load_few())
        if epoch % recipe.graph_every == 0:
            loss_function.update_graph()
        for images, labels in islice(load_epoch(), steps - step):
            loss = loss_function(backbone(images), labels).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            yield loss.detach()
        epoch += 1


def bootstrap_interval(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of `values [Q]`, over queries drawn again with replacement."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator, device="cpu")
    low, high = values.cpu()[rows].mean(dim=1).quantile(values.new_tensor([0.025, 0.975], device="cpu")).tolist()
    return low, high
