"""The demo, small: it trains, measures, compares, draws and reports; and the parts that it is made of."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
demo, data, pictures, recipe = (
    importlib.import_module(name) for name in ("glyphs", "glyph_data", "glyph_pictures", "recipe")
)
ablations = importlib.import_module("ablations")
sys.path.remove(str(EXAMPLES))

TINY = ("--classes", "60", "--test-classes", "20", "--steps", "6", "--k-nearest", "5", "--device", "cpu")
METHODS = ["pooled features, cosine", "QAConv, all 60 classes", "QAConv, 5 random + own", "QAConv, 5 nearest + own"]


@pytest.fixture(scope="module")
def glyphs() -> Any:
    return data.load_glyphs()


@pytest.fixture
def made_up() -> Any:
    """Sixty classes, at once: a blot in the middle of every picture, and noise that is the face's."""
    generator = torch.Generator().manual_seed(0)
    blots = torch.rand(60, 1, 4, 4, generator=generator).expand(-1, len(data.FACES), -1, -1)
    noisy = F.interpolate(blots, scale_factor=3.0) + 0.1 * torch.rand(60, len(data.FACES), 12, 12, generator=generator)
    images = F.pad((noisy * 200).to(torch.uint8), (6, 6, 6, 6))
    covered = torch.ones(60, len(data.FACES), dtype=torch.bool)
    return data.Glyphs([chr(0x400 + i) for i in range(60)], images, covered)


def run_main(module: Any, glyphs: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *TINY, *options])
    monkeypatch.setattr(module, "load_glyphs", lambda: glyphs)
    module.main()


@pytest.mark.slow
def test_the_demo_reports_what_it_measured(
    glyphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(demo, glyphs, monkeypatch, "--seeds", "2", "--workers", "1", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table in printed
    pairs = r" \| ".join([r"([\d.]+) / ([\d.]+)"] * 3)
    rows = re.findall(rf"^\| ([^|]+) \| (\d) \| ([\d.]+) \| {pairs} \|", table, re.MULTILINE)
    assert [row[0] for row in rows] == METHODS
    assert [row[1] for row in rows] == ["2", "1", "2", "2"]  # all classes: one seed, for its time
    for _, _, seconds, *cells in rows:
        assert float(seconds) > 0
        assert all(0.0 < float(cell) <= 1.0 for cell in cells)
        assert float(cells[0]) > 3 / 20  # rank-1 of clean queries: twenty unseen characters, so better than chance
    differences = re.findall(r"^\| ([^|]+) \| \w[\w ]+ \| (\S+) \((\S+) to (\S+)\) \|", table, re.MULTILINE)
    assert [name for name, *_ in differences] == [METHODS[i] for i in (1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0)]
    assert all(float(low) <= float(mean) <= float(high) for _, mean, low, high in differences)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        saved = list(csv.DictReader(file))
    assert len(saved) == 3 * 2 + 4 * (1 + 2 + 2)
    nearest = [float(row["rank1"]) for row in saved if (row["method"], row["queries"]) == (METHODS[3], "occluded")]
    cells = next(row[3:] for row in rows if row[0] == METHODS[3])
    assert float(cells[4]) == pytest.approx(sum(nearest) / 2, abs=6e-4)
    assert len(re.findall(r"batches in +[\d.]+ s, loss [\d.]+, occluded mAP 0\.\d+", printed)) == 7 * 4
    for picture in ("accuracy.png", "neighbors.png", "correspondences.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def train_tiny(glyphs: Any, name: str, choices: Any, steps: int = 4) -> Any:
    seen, unseen = demo.split(glyphs, 40, 12)
    test = demo.make_test_set(unseen, seen)
    return demo.run(name, choices, 1, seen, test, Namespace(device=torch.device("cpu"), steps=steps))


def test_a_training_repeats_and_methods_see_the_same_batches(made_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[list[torch.Tensor]] = []
    forward = recipe.MatchingLoss.forward

    def record(self: Any, feature: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        labels[-1].append(target)
        return forward(self, feature, target)

    monkeypatch.setattr(recipe.MatchingLoss, "forward", record)
    runs = []
    for scored in ("nearest", "nearest", "random", "all"):
        labels.append([])
        runs.append(train_tiny(made_up, scored, recipe.Recipe(scored=scored, k_nearest=5)))
    assert all(torch.equal(torch.stack(each), torch.stack(labels[0])) for each in labels)
    first, second, *others = ({kind: torch.stack(values) for kind, values in run.answers.items()} for run in runs)
    assert all(torch.equal(first[kind], second[kind]) for kind in demo.QUERIES)
    assert all(any(not torch.equal(first[kind], other[kind]) for kind in demo.QUERIES) for other in others)


@pytest.mark.slow
def test_workers_give_what_one_process_gives(glyphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # workers import the demo by its name
    tables = []
    for workers in ("1", "2"):
        run_main(demo, glyphs, monkeypatch, "--seeds", "1", "--workers", workers, "--output", str(tmp_path / workers))
        with (tmp_path / workers / "results.csv").open(newline="", encoding="utf-8") as file:
            tables.append([(row["method"], row["queries"], float(row["mAP"])) for row in csv.DictReader(file)])
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
    # threads may sum in other orders
    assert all(abs(one[2] - other[2]) < 0.1 for one, other in zip(*tables, strict=True))


@pytest.mark.slow
def test_ablations(
    glyphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(ablations, glyphs, monkeypatch, "--seeds", "1", "--workers", "1", "--output", str(tmp_path))
    table = (tmp_path / "ablations.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    rows = re.findall(r"^\| ([^|]+) \| \d+ ((?:\| [\d.]+ ){4})\|", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(ablations.VARIANTS)
    values = {name: [float(cell) for cell in re.findall(r"[\d.]+", cells)] for name, cells in rows}
    assert values["table starts at random"][0] < values[ablations.RECIPE][0]  # after six batches: nothing but the start


def test_all_classes_are_the_nearest_of_the_largest_k() -> None:
    torch.manual_seed(0)
    shape, classes = (8, 3, 3), 12
    every = recipe.MatchingLoss(recipe.Recipe(scored="all", k_nearest=2), shape, classes)
    nearest = recipe.MatchingLoss(recipe.Recipe(scored="nearest", k_nearest=classes - 1), shape, classes)
    nearest.load_state_dict(every.state_dict())
    feature, target = torch.randn(10, *shape), torch.randint(classes, (10,))
    torch.testing.assert_close(every(feature, target), nearest(feature, target))


def test_random_neighbors_are_other_classes_and_every_one_in_its_turn() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(9, 9)
    for _ in range(600):
        graph = recipe.draw_random_graph(9, 4)
        assert all(len(set(row)) == 4 for row in graph.tolist())
        counts.scatter_add_(1, graph, torch.ones(9, 4))
    assert counts.diagonal().eq(0).all()
    others = counts[~torch.eye(9, dtype=torch.bool)]  # each one in half of the graphs, give or take five deviations
    assert others.min() > 300 - 5 * 12.3
    assert others.max() < 300 + 5 * 12.3


@pytest.mark.parametrize("near_classes", [1, 4])
def test_every_class_comes_in_an_epoch(near_classes: int) -> None:
    torch.manual_seed(0)
    labels = torch.arange(40).repeat(6)[torch.randperm(240)]
    labels = torch.cat([labels[labels != 7], torch.tensor([7, 7])])  # fewer pictures of class 7 than instances
    angle = torch.arange(40) * (2 * torch.pi / 40)
    table = torch.stack([angle.cos(), angle.sin()], dim=1)[:, :, None, None]  # on a circle: near is next to
    choices = recipe.Recipe(batch_classes=8, instances=3, near_classes=near_classes)
    sampler = recipe.ClassBatches(labels, choices, table, seed=1)
    epochs = [list(sampler), list(sampler)]
    assert epochs[0] != epochs[1]
    for batches in epochs:
        assert len(batches) == len(sampler) == 5
        classes = labels[torch.tensor(batches)].view(5, 8, 3)
        assert (classes == classes[:, :, :1]).all()
        assert classes[:, :, 0].flatten().sort().values.tolist() == list(range(40))
        for batch in batches:
            assert len(set(batch)) == 24 - (7 in labels[batch])
    first = classes[:, :, 0].reshape(-1, near_classes)
    apart = (first - first[:, :1]).abs()
    distance = torch.minimum(apart, 40 - apart).amax(dim=1).float()
    assert distance.median() <= near_classes  # of most groups; what is left at the end lies apart


def test_table_starts_at_means() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(10, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2])
    table = torch.nn.Parameter(torch.randn(3, 3, 4, 4))
    batches = zip(images.split(4), labels.split(4), strict=True)
    recipe.start_table_at_means(table, torch.nn.Identity(), batches)
    expected = torch.stack([F.normalize(images[labels == i], dim=1).mean(dim=0) for i in range(3)])
    torch.testing.assert_close(table.data, F.normalize(expected, dim=1))


def test_bootstrap_interval_is_that_of_a_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = recipe.bootstrap_interval(values)
    deviation = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - deviation, abs=0.15 * deviation)
    assert high == pytest.approx(values.mean().item() + deviation, abs=0.15 * deviation)


def test_misaligned_pictures_are_near_the_originals(made_up: Any) -> None:
    images = made_up.images[:, data.QUERY_FACE].unsqueeze(1)
    moved = data.misalign(images, torch.Generator().manual_seed(0))
    assert moved.dtype == images.dtype

    def center_of_ink(image: torch.Tensor) -> torch.Tensor:
        weight = image.float().flatten(1) + 1e-6
        pixel = torch.arange(data.SIZE, dtype=torch.float32)
        place = torch.stack([pixel.repeat_interleave(data.SIZE), pixel.repeat(data.SIZE)])
        return weight @ place.mT / weight.sum(dim=1, keepdim=True)

    shift = (center_of_ink(moved) - center_of_ink(images)).norm(dim=1)
    assert 0.5 < shift.mean() < 3  # up to 2 pixels each way, and what turns and scales move
    ratio = moved.float().sum(dim=(1, 2, 3)) / images.float().sum(dim=(1, 2, 3))
    assert 0.75 < ratio.mean() < 1.25


def test_the_demo_prepares_the_same_under_another_default_dtype_and_device() -> None:
    images = torch.randint(256, (20, len(data.FACES), data.SIZE, data.SIZE), dtype=torch.uint8)
    glyphs = data.Glyphs([chr(65 + i) for i in range(20)], images, torch.ones(20, len(data.FACES), dtype=torch.bool))
    answers = {kind: (torch.ones(12), torch.ones(12)) for kind in demo.QUERIES}
    run = demo.Run("a", 1, [1.0], [0.5], answers, None)

    def prepare() -> tuple[object, ...]:
        seen, unseen = demo.split(glyphs, 15, 5)
        test = demo.make_test_set(unseen, seen)
        table = demo.make_table([run], {"a": "a"}), *demo.compare([run], "a", "a")
        return seen.characters, *test.queries.values(), test.visibility, test.gallery, test.gallery_labels, table

    expected = prepare()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = prepare()
    finally:
        torch.set_default_dtype(dtype)
    for got, true in zip(found, expected, strict=True):
        assert got == true if not isinstance(true, torch.Tensor) else torch.equal(got, true) and got.dtype == true.dtype
