"""The code of the README, of the pages beside it, and of docstrings runs as printed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qaconv_triton
from qaconv_triton import evaluation, functional, integrations

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def run(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other, and return what they define."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    return names


def test_code_of_the_readme() -> None:
    names = run(README)
    assert names["scores"].shape == (16, 16)
    assert names["maps"].grad.abs().sum() > 0


def test_training_script() -> None:
    names = run(DOCS / "training.md")
    assert names["scores"].shape == (5, 96)
    assert torch.isfinite(names["loss"]).all()
    assert names["matcher"].bn.num_batches_tracked == 2 * 2 * 24  # two forwards for each class's batch, two epochs


@pytest.mark.cuda
def test_a_captured_step() -> None:
    assert torch.isfinite(run(DOCS / "tuning.md")["loss"])


def test_tutorial(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(DOCS / "tutorial.md")
    without, by_visibility = map(float, re.findall(r"mAP ([\d.]+)", capsys.readouterr().out))
    assert by_visibility > max(0.5, without + 0.05)  # of 16 unseen identities; chance is about a tenth
    assert names["loss"].isfinite().all()


def test_code_for_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "integrations.md")
    assert names["loss"] > 0
    assert [sorted(found) for found in names["accuracies"]] == [["mean_average_precision", "precision_at_1"]] * 2
    assert Path("matches.png").read_bytes().startswith(b"\x89PNG")
    assert names["metrics"].num_queries == 8
    assert 0 not in names["items"]  # the query itself, of its own camera
    assert "<title>Before training</title>" in Path("report.html").read_text(encoding="utf-8")


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "evaluation.md")
    assert names["metrics"].num_queries == 20
    assert names["merged_indices"].shape == (20, 100)
    assert names["indices"].shape == names["scores"].shape == (20, 100)
    assert 0 <= names["verification"].accuracy <= 1
    assert 0 < names["verification"].eer < 1
    assert 0 <= names["verification"].tar_at_far[1e-3] <= 1
    assert names["neighbors"][0].shape == (220, 50)


def test_code_for_those_who_come_from_qaconv() -> None:
    names = run(DOCS / "coming-from-qaconv.md")
    assert names["scores"].shape == (8, 8)
    assert names["vector"].numel() > names["N"] * names["C"] * names["H"] * names["W"]
    assert names["threshold"].isfinite()


PACKAGES = qaconv_triton, evaluation, integrations
MODULES = ["qaconv_triton"] + [
    f"{package.__name__}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__)
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.endswith("metric_learning"):
        pytest.importorskip("pytorch_metric_learning")
    monkeypatch.chdir(tmp_path)
    names = {item: getattr(qaconv_triton, item) for item in qaconv_triton.__all__}  # what a reader imports
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, **names})
    assert result.failed == 0


def test_public_classes_and_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    public: list[Any] = [getattr(package, name) for package in (qaconv_triton, evaluation) for name in package.__all__]
    public.remove(functional)
    public += [functional.class_neighbors, functional.topk_cosine, functional.max_correlation]
    for item in public:
        assert sum(len(test.examples) for test in finder.find(item)) > 0, item
