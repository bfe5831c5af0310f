"""Train a QAConv matcher with graph sampling on pictures of characters, and measure it on characters it never saw.

A character is an identity, a font face a camera: given a character in DejaVu Sans, find it among the pictures that
DejaVu Sans Mono and DejaVu Serif draw of hundreds of others. Three matchers train on the same backbone, with the same
kind of losses, for about the same time:

    pooled   global average pooling and cosine, the usual baseline; graph-sampled batches
    random   QAConv, batches of random classes
    graph    QAConv, graph-sampled batches: a class together with classes that are near to it

`python examples/glyphs.py --help` lists the options. Read on from `main`, or from `train` for what you would write
in a training script of your own.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from glyph_data import CELLS, GALLERY_FACES, QUERY_FACE, Glyphs, load_glyphs, occlude
from glyph_pictures import draw_correspondences, draw_neighbors, draw_training
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP
from tqdm import tqdm

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss
from qaconv_triton.functional import class_neighbors
from qaconv_triton.losses import batch_hard_hinge

METHODS = {
    "pooled": "(a) global average pooling + cosine",
    "random": "(b) QAConv, random batches",
    "graph": "(c) QAConv, graph-sampled batches",
}
WITH_VISIBILITY = "(d) as (c), with visibility maps"

CHANNELS = 64
INSTANCES = 4  # pictures of each class in a batch
BATCH_CLASSES = 16
NEAR = 64  # classes that may join a class in its batch
POOLED_EPOCHS = 3  # of the baseline for each of QAConv's, in about the same time
LEARNING_RATE = 3e-3
MARGIN = 1.0
TRAIN_SHARE = 0.8  # of the classes
OCCLUDED_SHARE = 0.25  # of an occluded query


class Backbone(nn.Sequential):
    """Four small convolutions: pictures [B, 1, 28, 28] uint8 -> feature maps [B, 64, 7, 7]."""

    def __init__(self) -> None:
        super().__init__(
            *convolution(1, 32),
            nn.ReLU(inplace=True),
            *convolution(32, 64, stride=2),
            nn.ReLU(inplace=True),
            *convolution(64, 64, stride=2),
            nn.ReLU(inplace=True),
            *convolution(64, CHANNELS),
        )

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        return super().forward(pixels.contiguous(memory_format=torch.channels_last))


def convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)


class PooledCosine(nn.Module):
    """The baseline: cosine of globally pooled features, with `SoftmaxTripletLoss`'s two losses and a learned scale."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.class_embed = nn.Parameter(torch.randn(num_classes, CHANNELS, 1, 1) / CHANNELS**0.5)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def match(self, probe_features: Tensor, gallery_features: Tensor) -> Tensor:
        return pooled(probe_features) @ pooled(gallery_features).mT

    def forward(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = self.scale * self.match(feature, self.class_embed)
        cls_loss = F.cross_entropy(logits, target, reduction="none")
        triplet_loss, triplet_acc = batch_hard_hinge(self.scale * self.match(feature, feature), target, MARGIN)
        cls_acc = (logits.argmax(dim=1) == target).float()
        return cls_loss, triplet_loss, cls_loss + triplet_loss.mean(), cls_acc, triplet_acc


def pooled(features: Tensor) -> Tensor:
    return F.normalize(features.mean(dim=(2, 3)), dim=1)


@dataclass(frozen=True)
class TestSet:
    """Queries, clean and occluded, and the gallery they are looked for in; pictures [M, 1, 28, 28] uint8."""

    queries: Tensor
    occluded: Tensor
    visibility: Tensor  # [M, 1, 7, 7] of the occluded queries
    query_labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor


@dataclass(frozen=True)
class Trained:
    """What training leaves: the two modules in eval mode, loss and accuracy of every batch, and the seconds."""

    backbone: Backbone
    matcher: QAConv | PooledCosine
    losses: list[float]
    accuracies: list[float]
    seconds: float


def split(glyphs: Glyphs, num_classes: int, seed: int) -> tuple[Glyphs, Glyphs]:
    """Draw `num_classes` classes, four fifths of them for training and the others for the test."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(glyphs), generator=generator, device="cpu")[:num_classes]
    border = round(TRAIN_SHARE * len(order))
    return glyphs[order[:border]], glyphs[order[border:]]


def make_test_set(glyphs: Glyphs, clutter: Glyphs, seed: int, device: torch.device) -> TestSet:
    """Cover a quarter of each query by a part of a training character."""
    generator = torch.Generator().manual_seed(seed)
    queries, query_labels = glyphs.samples([QUERY_FACE])
    gallery, gallery_labels = glyphs.samples(GALLERY_FACES)
    others = torch.randint(len(clutter), (len(queries),), generator=generator, device="cpu")
    cover = clutter.images[others, QUERY_FACE].unsqueeze(1)
    occluded, visibility = occlude(queries, cover, OCCLUDED_SHARE, generator)
    tensors = queries, occluded, visibility, query_labels, gallery, gallery_labels
    return TestSet(*(tensor.to(device) for tensor in tensors))


def train(method: str, glyphs: Glyphs, seed: int, options: argparse.Namespace) -> Trained:
    """Train a backbone and a matcher on the classes of `glyphs`."""
    torch.manual_seed(seed)
    device, num_classes = options.device, len(glyphs)
    images, labels = (tensor.to(device) for tensor in glyphs.samples())
    backbone = Backbone().to(device, torch.float32, memory_format=torch.channels_last)
    matcher: QAConv | PooledCosine
    loss_function: nn.Module
    if method == "pooled":
        matcher = loss_function = PooledCosine(num_classes).to(device, torch.float32)
    else:
        matcher = QAConv(CHANNELS, CELLS, CELLS, num_classes, options.k_nearest, include_self=True)
        matcher.to(device, torch.float32)
        loss_function = SoftmaxTripletLoss(matcher, margin=MARGIN, background="ignore")

    def classes_of_batches() -> Tensor:
        """Which classes may join each class in a batch [N, 64]; the sampler asks at the start of every epoch.

        Always the nearest few would be too much: beside its doubles a character has hardly any chance at first.
        """
        if method == "random":
            return torch.randint(num_classes, (num_classes, NEAR), device="cpu")
        near = class_neighbors(matcher.class_embed, min(NEAR, num_classes - 1)).cpu()
        return near.gather(1, torch.rand(near.shape, device="cpu").argsort(dim=1))

    sampler = GraphSampler(labels, classes_of_batches, BATCH_CLASSES * INSTANCES, INSTANCES, seed=seed)
    epochs = options.epochs * (POOLED_EPOCHS if method == "pooled" else 1)
    batches = max(1, num_classes // BATCH_CLASSES)  # each class comes about once; the sampler would go on
    steps = min(epochs * batches, options.steps or epochs * batches)
    epochs = math.ceil(steps / batches)
    parameters = [*backbone.parameters(), *matcher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    losses, accuracies = [], []
    started = time.perf_counter()
    name = f"seed {seed}, {METHODS[method]:36}"
    with tqdm(total=steps, desc=name, unit="batch", disable=None) as progress:  # a bar on a terminal only
        for epoch in range(epochs):
            if epoch == 1:
                start_classes_at_means(matcher, backbone, images, labels)
            if isinstance(matcher, QAConv):
                matcher.on_epoch_start()  # the classes have moved: the class graph is computed anew
            for batch in islice(sampler, min(batches, steps - len(losses))):
                rows = torch.tensor(batch, device=device)
                with precision(options):
                    _, _, loss, accuracy, _ = loss_function(backbone(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.mean().item())
                accuracies.append(accuracy.mean().item())
                progress.set_postfix(loss=f"{losses[-1]:.2f}", accuracy=f"{accuracies[-1]:.2f}", refresh=False)
                progress.update()
            if progress.disable:
                loss, accuracy = (statistics.fmean(each[-batches:]) for each in (losses, accuracies))
                print(f"{name}: epoch {epoch + 1} of {epochs}, loss {loss:.2f}, accuracy {accuracy:.2f}", flush=True)
    return Trained(backbone.eval(), matcher.eval(), losses, accuracies, time.perf_counter() - started)


def precision(options: argparse.Namespace) -> torch.autocast:
    """Convolutions and matching in bfloat16 where the options say so; their weights and the losses stay in fp32."""
    return torch.autocast(options.device.type, dtype=torch.bfloat16, enabled=options.bf16)


@torch.no_grad()
def start_classes_at_means(matcher: QAConv | PooledCosine, backbone: Backbone, images: Tensor, labels: Tensor) -> None:
    """Set each class to its mean feature map, as seen after an epoch; from there the table is learned on.

    From random numbers the table would need more epochs than this demo has until its graph means something.
    """
    some = slice(None, None, 3)  # two pictures of every class, or more
    backbone.eval()
    features = extract(backbone, images[some])
    backbone.train()
    table = matcher.class_embed
    total = features.new_zeros(len(table), *features.shape[1:]).index_add_(0, labels[some], features)
    table.copy_(F.normalize(F.adaptive_avg_pool2d(total, table.shape[2:]), dim=1))


@torch.no_grad()
def extract(backbone: Backbone, images: Tensor) -> Tensor:
    return torch.cat([backbone(part) for part in images.split(512)])


def evaluate(trained: Trained, test: TestSet) -> tuple[list[float], list[float]]:
    """Rank-1 and mAP for clean and for occluded queries; and for the latter with visibility maps (QAConv)."""
    clean, occluded, gallery = (
        extract(trained.backbone, images) for images in (test.queries, test.occluded, test.gallery)
    )
    matcher = trained.matcher
    blind = [
        *measure(matcher.match(clean, gallery), test),
        *measure(matcher.match(occluded, gallery), test),
    ]
    if isinstance(matcher, PooledCosine):
        return blind, []
    sighted = measure(matcher.match(occluded, gallery, probe_occ=test.visibility), test)
    return blind, [*blind[:2], *sighted]


def measure(scores: Tensor, test: TestSet) -> tuple[float, float]:
    """Rank-1 and mean average precision of `scores [queries, gallery]`."""
    same = test.query_labels[:, None] == test.gallery_labels
    query = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    positive = scores - scores.min() + 1.0  # torchmetrics takes an item of score 0 or less as not retrieved
    ranking = positive.flatten().cpu(), same.flatten().cpu()
    query = query.flatten().cpu()
    return float(RetrievalHitRate(top_k=1)(*ranking, indexes=query)), float(RetrievalMAP()(*ranking, indexes=query))


def make_table(results: dict[str, list[list[float]]], seconds: dict[str, float], note: str) -> str:
    """The means over the seeds, in Markdown; `note` says what was measured."""
    lines = [
        "| matcher | rank-1 clean | mAP clean | rank-1 occluded | mAP occluded | seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    spread = 0.0
    for name, runs in results.items():
        values = torch.tensor(runs, dtype=torch.float64, device="cpu")
        spread = max(spread, (values.max(dim=0).values - values.min(dim=0).values).max().item())
        cells = [f"{value:.3f}" for value in values.mean(dim=0).tolist()]
        cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
        lines.append(f"| {' | '.join([name, *cells])} |")
    if len(runs) > 1:
        note += f" Mean of {len(runs)} seeds, each with its own classes; they differ by up to {spread:.3f} in a cell."
    return "\n".join(lines) + f"\n\n{note}\n"


def save_losses(path: Path, curves: list[tuple[str, int, list[float], list[float]]]) -> None:
    """Loss and accuracy of every batch of every training, a row each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "batch", "loss", "accuracy"])
        for method, seed, losses, accuracies in curves:
            for batch, values in enumerate(zip(losses, accuracies, strict=True)):
                writer.writerow([method, seed, batch, *values])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train QAConv with graph sampling on pictures of characters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default_device, help="where to train")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of QAConv; a class comes about once in each")
    parser.add_argument("--steps", type=int, help="stop each training after so many batches, if its epochs have more")
    parser.add_argument("--bf16", action="store_true", help="convolutions and matching in bfloat16, by autocast")
    parser.add_argument("--k-nearest", type=int, default=20, help="neighbours that a class is compared with")
    parser.add_argument("--classes", type=int, default=1250, help="characters: 4/5 for training, 1/5 for the test")
    parser.add_argument("--seed", type=int, default=1, help="the first seed: of classes, weights and batches")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds to take the mean of")
    parser.add_argument("--output", type=Path, default="out/glyphs", help="folder for pictures, table and losses")
    options = parser.parse_args()
    training = round(TRAIN_SHARE * options.classes)
    if min(options.epochs, options.seeds, options.k_nearest, 1 if options.steps is None else options.steps) < 1:
        parser.error("--epochs, --steps, --seeds and --k-nearest must be at least 1")
    if training <= max(options.k_nearest, BATCH_CLASSES):
        parser.error(
            f"--classes {options.classes} leaves {training} for training; it takes more than "
            f"{BATCH_CLASSES} (a batch) and more than --k-nearest"
        )
    return options


def main() -> None:
    """Train and measure every method for every seed; draw the pictures, print the table."""
    started = time.perf_counter()
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    glyphs = load_glyphs()
    options.classes = min(options.classes, len(glyphs))
    results: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {}
    curves: list[tuple[str, int, list[float], list[float]]] = []
    for seed in range(options.seed, options.seed + options.seeds):
        seen, unseen = split(glyphs, options.classes, seed)
        test = make_test_set(unseen, seen, seed, options.device)
        runs = {method: train(method, seen, seed, options) for method in METHODS}
        for method, trained in runs.items():
            with precision(options):
                blind, sighted = evaluate(trained, test)
            curves.append((method, seed, trained.losses, trained.accuracies))
            results.setdefault(METHODS[method], []).append(blind)
            seconds[METHODS[method]] = seconds.get(METHODS[method], 0.0) + trained.seconds / options.seeds
            if method == "graph":
                results.setdefault(WITH_VISIBILITY, []).append(sighted)
        if seed == options.seed:
            draw_neighbors(options.output / "neighbors.png", seen, runs["graph"].matcher.class_embed)
            draw_correspondences(
                options.output / "correspondences.png",
                runs["graph"].backbone,
                runs["graph"].matcher,
                unseen,
                test.occluded,
                test.visibility,
            )
            drawn = {METHODS[method]: (run.losses, run.accuracies) for method, run in runs.items()}
            draw_training(options.output / "training.png", drawn)
    save_losses(options.output / "losses.csv", curves)
    note = (
        f"{len(test.queries)} unseen characters as queries in DejaVu Sans, {len(test.gallery)} pictures of them in "
        f"DejaVu Sans Mono and Serif as the gallery; trained on {len(seen)} other characters."
    )
    table = make_table(results, seconds, note)
    (options.output / "results.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nPictures and table are in {options.output}/; {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
