"""Does scoring a sample against the K classes nearest to its own replace scoring it against all N? A measurement.

A character is an identity, a font face a camera: given a character in DejaVu Sans, find it among the pictures that
DejaVu Sans Mono and DejaVu Serif draw of hundreds of others. All characters of the test are unseen in training.
Four methods train the same backbone with the same losses:

    pooled    one vector per picture, cosine: the usual baseline
    all       QAConv, a sample scored against all N classes
    random    QAConv, a sample scored against its own class and K random ones
    nearest   QAConv, a sample scored against its own class and the K classes nearest to it (graph sampling)

The last three see the same batches, in the same order. `python examples/glyphs.py --help` lists the options. Read on
from `main`; what you would write in a training script of your own is in recipe.py.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from glyph_data import CELLS, GALLERY_FACES, QUERY_FACE, Glyphs, load_glyphs, misalign, normalize, occlude
from glyph_pictures import draw_accuracy, draw_correspondences, draw_neighbors
from recipe import Backbone, ClassBatches, MatchingLoss, PooledLoss, Recipe, bootstrap_interval, fit, make_loss
from torch import Tensor

from qaconv_triton.evaluation import query_metrics

METHODS = {
    "pooled": "pooled features, cosine",
    "all": "QAConv, all {classes:,} classes",
    "random": "QAConv, {k} random + own",
    "nearest": "QAConv, {k} nearest + own",
}
QUERIES = ("clean", "misaligned", "occluded", "with visibility")
ON_CURVE = "occluded"  # what is measured at every checkpoint
CHANNELS = 32
CHECKPOINTS = 4
POOLED_STEPS = 3  # of the baseline for each of the others: about the time of nearest K
OCCLUDED_SHARE = 0.25  # of an occluded query


@dataclass(frozen=True)
class TestSet:
    """Queries and the gallery they are looked for in; pictures [M, 1, 24, 24] uint8."""

    queries: dict[str, Tensor]  # clean, misaligned, occluded
    visibility: Tensor  # [M, 1, 6, 6] of the occluded queries
    gallery: Tensor
    labels: Tensor  # [M], the character that a query shows
    gallery_labels: Tensor  # [G]


@dataclass(frozen=True)
class Run:
    """One training: what it took and how well every query was answered."""

    method: str
    seed: int
    seconds: list[float]  # of training, at every checkpoint
    curve: list[float]  # mAP of occluded queries, likewise
    answers: dict[str, tuple[Tensor, Tensor]]  # at the end: rank-1 and average precision of every query
    model: tuple[Backbone, MatchingLoss | PooledLoss] | None  # of the first seed


def split(glyphs: Glyphs, classes: int, test_classes: int) -> tuple[Glyphs, Glyphs]:
    """Draw the characters for training and those for the test."""
    order = torch.randperm(len(glyphs), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return glyphs[order[test_classes : test_classes + classes]], glyphs[order[:test_classes]]


def make_test_set(glyphs: Glyphs, clutter: Glyphs) -> TestSet:
    """Draw three versions of every query: clean, misaligned, and a quarter hidden by a part of another character."""
    generator = torch.Generator("cpu").manual_seed(0)
    queries, query_labels = glyphs.samples([QUERY_FACE])
    gallery, gallery_labels = glyphs.samples(GALLERY_FACES)
    others = torch.randint(len(clutter), (len(queries),), generator=generator, device="cpu")
    cover = clutter.images[others, QUERY_FACE].unsqueeze(1)
    occluded, visibility = occlude(queries, cover, OCCLUDED_SHARE, generator)
    versions = {"clean": queries, "misaligned": misalign(queries, generator), "occluded": occluded}
    return TestSet(versions, visibility, gallery, query_labels, gallery_labels)


def run(name: str, recipe: Recipe, seed: int, glyphs: Glyphs, test: TestSet, options: argparse.Namespace) -> Run:
    """Train by a recipe, measure occluded queries at every checkpoint, and all queries at the end."""
    importlib.import_module("torch._dynamo")  # which the first optimizer would do, within the seconds of its method
    torch.manual_seed(seed)
    device, num_classes = options.device, len(glyphs)
    pictures, labels = glyphs.samples()
    images = normalize(pictures.to(device))
    labels_on_device = labels.to(device)
    backbone = Backbone(1, CHANNELS).to(device, torch.float32, memory_format=torch.channels_last)
    loss_function = make_loss(recipe, (CHANNELS, CELLS, CELLS), num_classes).to(device, torch.float32)
    sampler = ClassBatches(labels, recipe, loss_function.table, seed)

    def load_epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in sampler:
            rows = torch.tensor(batch, device=device)
            yield images[rows], labels_on_device[rows]

    def load_few() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(images[::3].split(512), labels_on_device[::3].split(512), strict=True)  # 2 of a class or more

    steps = options.steps * (POOLED_STEPS if recipe.scored == "pooled" else 1)
    checkpoints = sorted({-(-steps * (i + 1) // CHECKPOINTS) for i in range(CHECKPOINTS)})
    seconds, curve, losses, training = [], [], [], 0.0
    started = read_clock(device)
    for step, loss in enumerate(fit(backbone, loss_function, recipe, load_epoch, load_few, steps), start=1):
        losses.append(loss)
        if step in checkpoints:
            training += read_clock(device) - started
            seconds.append(training)
            curve.append(evaluate(backbone, loss_function, test, ON_CURVE, device)[1].mean().item())
            loss = torch.stack(losses[-step // 4 :]).mean().item()
            print(
                f"{name:29} seed {seed}: {step:4} of {steps} batches in {training:5.1f} s, "
                f"loss {loss:.2f}, occluded mAP {curve[-1]:.3f}",
                flush=True,
            )
            started = read_clock(device)
    answers = {
        kind: evaluate(backbone, loss_function, test, kind, device)
        for kind in QUERIES
        if kind != "with visibility" or isinstance(loss_function, MatchingLoss)
    }
    model = (backbone.cpu().eval(), loss_function.cpu()) if seed == 1 else None
    return Run(name, seed, seconds, curve, answers, model)


def read_clock(device: torch.device) -> float:
    """Seconds: on a CPU those that this process computed, so that whatever else runs counts little; else elapsed."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def evaluate(
    backbone: Backbone, loss_function: MatchingLoss | PooledLoss, test: TestSet, kind: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rank-1 and average precision of every query `[M]` of a kind."""
    was_training = backbone.training
    backbone.eval()
    pictures = test.queries["occluded" if kind == "with visibility" else kind], test.gallery
    queries, gallery = (
        torch.cat([backbone(normalize(part.to(device))) for part in each.split(512)]) for each in pictures
    )
    visibility = [test.visibility.to(device)] if kind == "with visibility" else []
    backbone.train(was_training)
    metrics = query_metrics(loss_function.rank(queries, gallery, *visibility).cpu(), test.labels, test.gallery_labels)
    return (metrics.first_match == 1).double(), metrics.average_precision


def run_all(tasks: list[tuple], options: argparse.Namespace) -> list[Run]:
    """Run tasks side by side, one thread each, or one after the other on a GPU."""
    if options.workers == 1:
        return [run(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(run, *zip(*tasks, strict=True)))


def mean_answers(runs: list[Run], name: str, kind: str, seeds: list[int]) -> tuple[Tensor, Tensor] | None:
    """Rank-1 and average precision of every query, each the mean over seeds."""
    answers = [run.answers.get(kind) for run in runs if run.method == name and run.seed in seeds]
    if answers[0] is None:
        return None
    rank1, precision = zip(*answers, strict=True)
    return torch.stack(rank1).mean(dim=0), torch.stack(precision).mean(dim=0)


def make_table(runs: list[Run], names: dict[str, str]) -> str:
    """Rank-1 and mAP of every method and kind of query, in Markdown."""
    lines = ["| method | seeds | seconds | " + " | ".join(QUERIES) + " |", "|---|---|---|" + "---|" * len(QUERIES)]
    for name in names.values():
        seconds = {run.seed: run.seconds[-1] for run in runs if run.method == name}
        cells = [name, str(len(seconds)), f"{sum(seconds.values()) / len(seconds):.1f}"]
        for kind in QUERIES:
            answers = mean_answers(runs, name, kind, list(seconds))
            cells.append("" if answers is None else " / ".join(f"{each.mean().item():.3f}" for each in answers))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(runs: list[Run], better: str, other: str) -> list[str]:
    """Differences between two methods over the seeds that both have, with 95 % intervals over queries."""
    seeds = shared_seeds(runs, better, other)
    lines = []
    for kind in QUERIES:
        first, second = (mean_answers(runs, name, kind, seeds) for name in (better, other))
        if first is None or second is None:
            continue
        cells = []
        for mine, theirs in zip(first, second, strict=True):
            low, high = bootstrap_interval(mine - theirs)
            cells.append(f"{(mine - theirs).mean().item():+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {other} | {kind} | {' | '.join(cells)} |")
    return lines


def shared_seeds(runs: list[Run], one: str, other: str) -> list[int]:
    return sorted(set.intersection(*({run.seed for run in runs if run.method == name} for name in (one, other))))


def save_results(path: Path, runs: list[Run]) -> None:
    """A row for every training and kind of query."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "seconds", "queries", "rank1", "mAP", "mAP_low", "mAP_high"])
        for each in runs:
            for kind, (rank1, precision) in each.answers.items():
                values = rank1.mean().item(), precision.mean().item(), *bootstrap_interval(precision)
                writer.writerow(
                    [each.method, each.seed, f"{each.seconds[-1]:.2f}", kind, *(f"{x:.4f}" for x in values)]
                )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what it costs and gains to score samples against the nearest classes only."
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=torch.device, default=default_device, help=f"where to train ({default_device})"
    )
    parser.add_argument("--classes", type=int, help="characters for training (960; on a GPU all but the test's)")
    parser.add_argument("--test-classes", type=int, default=600, help="characters for the test (600)")
    parser.add_argument("--steps", type=int, help="batches of 64 pictures (180; on a GPU 300)")
    parser.add_argument("--k-nearest", type=int, default=20, help="K (20)")
    parser.add_argument("--seeds", type=int, help="trainings of each method (2; on a GPU 3)")
    parser.add_argument("--all-seeds", type=int, help="trainings against all classes (1; on a GPU as --seeds)")
    parser.add_argument("--workers", type=int, help="trainings side by side (one for each core; on a GPU 1)")
    parser.add_argument("--output", type=Path, default=Path("out/glyphs"), help="folder for results (out/glyphs)")
    options = parser.parse_args()
    on_cpu = options.device.type == "cpu"
    if on_cpu:
        defaults = {"classes": 960, "steps": 180, "seeds": 2, "all_seeds": 1, "workers": count_cores()}
    else:
        defaults = {"classes": 10**6, "steps": 300, "seeds": 3, "all_seeds": 3, "workers": 1}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.all_seeds = min(options.all_seeds, options.seeds)
    counts = "test_classes", "steps", "k_nearest", "seeds", "all_seeds", "workers"
    if min(getattr(options, name) for name in counts) < 1:
        parser.error(f"--{', --'.join(counts).replace('_', '-')} must be at least 1")
    if options.classes <= max(options.k_nearest, Recipe.batch_classes):
        parser.error(f"--classes must be more than {Recipe.batch_classes} (those of a batch) and more than --k-nearest")
    return options


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Train and measure every method; draw the pictures, print the tables."""
    started = time.perf_counter()
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    glyphs = load_glyphs()
    options.classes = min(options.classes, len(glyphs) - options.test_classes)
    seen, unseen = split(glyphs, options.classes, options.test_classes)
    test = make_test_set(unseen, seen)
    names = {method: text.format(classes=len(seen), k=options.k_nearest) for method, text in METHODS.items()}
    print(
        f"Identity = character, camera = font face. {len(seen):,} characters are for training; {len(unseen)} others\n"
        f"are queries in DejaVu Sans, to be found among {len(test.gallery):,} pictures of them in Mono and Serif.\n"
        f"Every method trains the same backbone; those with QAConv see the same {options.steps} batches, and differ\n"
        "only in the classes that a sample is scored against.\n"
        "Queries: clean; misaligned (shifted, scaled, turned a little); occluded (a quarter is hidden behind a part\n"
        "of another character); with visibility (the same, and the matcher knows what is hidden)."
    )
    base = Recipe(k_nearest=options.k_nearest)
    tasks = [
        (names[method], replace(base, scored=method), seed, seen, test, options)
        for method in sorted(METHODS, key="all".__ne__)  # all classes first: it takes longest
        for seed in range(1, 1 + (options.all_seeds if method == "all" else options.seeds))
    ]
    print(f"{len(tasks)} trainings, {min(options.workers, len(tasks))} at a time:\n", flush=True)
    runs = run_all(tasks, options)
    report(runs, names, seen, unseen, test, options)
    print(f"Pictures and tables are in {options.output}/; {time.perf_counter() - started:.0f} s in all.")


def report(
    runs: list[Run], names: dict[str, str], seen: Glyphs, unseen: Glyphs, test: TestSet, options: argparse.Namespace
) -> None:
    """Write tables and pictures, and print what they say."""
    differences = [
        f"| {names['nearest']}, less | queries | rank-1 (95 % interval) | mAP (95 % interval) |",
        "|---|---|---|---|",
        *(line for other in ("all", "random", "pooled") for line in compare(runs, names["nearest"], names[other])),
    ]
    clock = "processor seconds of one core" if options.device.type == "cpu" else "seconds"
    note = (
        f"Rank-1 / mAP on {len(unseen)} characters that are not among the {len(seen):,} of the training. Time of "
        f"training in {clock}, without evaluation."
    )
    text = "\n".join([make_table(runs, names), "", note, "", *differences, ""])
    (options.output / "results.md").write_text(text, encoding="utf-8")
    save_results(options.output / "results.csv", runs)
    print(f"\n{text}\n{summarize(runs, names)}\n")
    curves = {name: [(run.seconds, run.curve) for run in runs if run.method == name] for name in names.values()}
    draw_accuracy(options.output / "accuracy.png", curves, f"training ({clock})")
    (model,) = (run.model for run in runs if run.method == names["nearest"] and run.model is not None)
    backbone, loss_function = model
    draw_neighbors(options.output / "neighbors.png", seen, loss_function.table)
    occluded = test.queries["occluded"]
    draw_correspondences(
        options.output / "correspondences.png", backbone, loss_function.matcher, unseen, occluded, test.visibility
    )


def summarize(runs: list[Run], names: dict[str, str]) -> str:
    """What the tables say about the claim, in words."""
    lines = []
    count = names["all"].split()[2]
    subjects = {"all": f"all {count} classes", "random": "K random classes", "pooled": "pooling"}
    for method, subject in subjects.items():
        seeds = shared_seeds(runs, names["nearest"], names[method])
        mine, theirs = (mean_answers(runs, names[m], ON_CURVE, seeds) for m in ("nearest", method))
        difference = mine[1] - theirs[1]
        low, high = bootstrap_interval(difference)
        comparison = "better than" if low > 0 else "worse than" if high < 0 else "level with"
        seconds = [
            sum(run.seconds[-1] for run in runs if run.method == names[m] and run.seed in seeds)
            for m in ("nearest", method)
        ]
        lines.append(
            f"On occluded queries K nearest classes are {comparison} {subject}: mAP {difference.mean().item():+.3f} "
            f"({low:+.3f} to {high:+.3f}), in {seconds[0] / seconds[1]:.2f} of the time."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
