"""The example that trains on real pictures: every form of a data set, by a run on small pictures of our own."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "examples" / "images.py"
SIZE = 16
OPTIONS = ("--size", "16", "--stride", "4", "--features", "8", "--batch-size", "8", "--instances", "2", "--epochs", "4")


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    return importlib.import_module("images")


def save_picture(path: Path, identity: int, camera: int, shot: int) -> None:
    """Coloured squares, which are the identity; the camera's tint; noise."""
    colors = np.random.default_rng(identity).uniform(0, 255, (4, 4, 3))
    noise = np.random.default_rng([identity, camera, shot]).normal(0, 10, (SIZE, SIZE, 3))
    pixels = np.kron(colors, np.ones((SIZE // 4, SIZE // 4, 1))) * (0.7 + 0.3 * camera) + noise
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def save_market(folder: Path) -> list[str]:
    """The three folders; junk that looks like a query is in the gallery."""
    for identity in range(1, 17):
        part = "bounding_box_train" if identity <= 8 else "bounding_box_test"
        for camera in (1, 2):
            for shot in range(2):
                name = f"{identity:04}_c{camera}s1_{shot:06}_00.jpg"
                save_picture(folder / part / name, identity, camera, shot)
        if identity > 8:
            save_picture(folder / "query" / f"{identity:04}_c1s1_000009_00.jpg", identity, 1, 9)
            save_picture(folder / "bounding_box_test" / f"-1_c2s1_{identity:06}_00.jpg", identity, 1, 9)
    return [str(folder)]


def save_folders(folder: Path) -> list[str]:
    for identity in range(16):
        for shot in range(4):
            save_picture(folder / f"person {identity}" / f"{shot}.png", identity, 1, shot)
    return [str(folder), "--test-share", "0.5"]


def save_list(folder: Path) -> list[str]:
    lines = []
    for identity in range(16):
        for camera in ("left", "right"):
            save_picture(folder / "pictures" / f"{identity}-{camera}.png", identity, int(camera == "left"), 0)
            lines.append(f"pictures/{identity}-{camera}.png id{identity} {camera}")
    (folder / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    return [str(folder / "list.txt"), "--test-share", "0.5"]


@pytest.mark.parametrize(
    ("save", "counts"),
    [
        (save_market, "training on 8 identities (32 pictures); 8 queries in a gallery of 8 identities (32 pictures)"),
        (save_folders, "training on 8 identities (32 pictures); 8 queries in a gallery of 8 identities (32 pictures)"),
        (save_list, "training on 8 identities (16 pictures); 16 queries in a gallery of 8 identities (16 pictures)"),
    ],
)
def test_every_form_is_trained_on_and_found(
    images: ModuleType, save, counts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    output = tmp_path / "out"
    methods = ["--methods", "pooled", "nearest", "--k-nearest", "3"]
    arguments = ["images.py", *save(tmp_path / "data"), *OPTIONS, *methods, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    images.main()
    printed = capsys.readouterr().out
    assert counts in printed
    table = (output / "results.md").read_text(encoding="utf-8")
    assert table in printed
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \(", table, re.MULTILINE))
    assert float(rows["nearest"]) >= 0.75  # of eight unseen identities: chance is an eighth
    weights = torch.load(output / "nearest.pt", weights_only=True)
    assert weights["matcher"]["matcher.class_embed"].shape == (8, 8, 4, 4)
