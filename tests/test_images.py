"""The example that trains on real pictures: every form of a data set, by a run on small pictures of our own."""

from __future__ import annotations

import importlib
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from qaconv_triton.evaluation import load_features

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
    arguments = ["images.py", *save(tmp_path / "data"), *OPTIONS, *methods, "--output", str(output), "--save-features"]
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
    stored = load_features(output / "nearest" / "query.safetensors")
    assert f"{len(stored.maps)} queries in a gallery" in counts
    assert all(Path(path).is_file() for path in stored.paths)


def test_a_list_may_leave_cameras_out_and_come_with_queries(images: ModuleType, tmp_path: Path) -> None:
    for identity in range(3):
        for shot in range(2):
            save_picture(tmp_path / f"{identity}{shot}.png", identity, 1, shot)
    (tmp_path / "train.txt").write_text("00.png a\n\n01.png a\n10.png b\n", encoding="utf-8")
    (tmp_path / "query.txt").write_text("20.png c 1\n", encoding="utf-8")
    (tmp_path / "gallery.txt").write_text("21.png c 2\n11.png b 1\n", encoding="utf-8")
    paths = {name: tmp_path / f"{name}.txt" for name in ("query", "gallery")}
    training, queries, gallery = images.load_sets(Namespace(data=tmp_path / "train.txt", **paths))
    assert [(item.identity, item.camera) for item in training] == [("a", None), ("a", None), ("b", None)]
    assert [(item.identity, item.camera) for item in queries + gallery] == [("c", "1"), ("c", "2"), ("b", "1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png", r"line 2: expected 'path identity \[camera\]', got 'a\.png'"),
        ("missing.png 3", r"line 2: no file .*missing\.png"),
    ],
)
def test_a_bad_line_is_named(images: ModuleType, line: str, message: str, tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 0, 1, 0)
    (tmp_path / "list.txt").write_text(f"a.png 1\n{line}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        images.read_pictures(tmp_path / "list.txt")


def test_folders_without_pictures_and_other_names_are_refused(images: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no pictures found"):
        images.read_pictures(tmp_path)
    save_picture(tmp_path / "holiday.jpg", 0, 1, 0)
    with pytest.raises(SystemExit, match=r"holiday\.jpg: expected a name such as 0001_c1s1"):
        images.read_pictures(tmp_path)
    with pytest.raises(SystemExit, match="no such file or folder"):
        images.read_pictures(tmp_path / "elsewhere")


def test_a_query_is_not_its_own_match(images: ModuleType, tmp_path: Path) -> None:
    """The own camera does not count as a match, and neither does the query where cameras are unknown."""
    maps = torch.eye(4)[:, :, None, None]

    def average_precision(cameras: list[str | None]) -> list[float]:
        pictures = [images.Picture(tmp_path / str(i), "ab"[i // 2], cameras[i]) for i in range(4)]
        matcher = Namespace(rank=lambda query, gallery: scores.argsort(dim=1, descending=True))
        trunk, options = Namespace(), Namespace()
        return images.evaluate(trunk, matcher, pictures, pictures, options)[1].tolist()

    # each picture is most like itself, then like one of the other identity, then like that of its own
    scores = torch.tensor([[9.0, 1, 5, 0], [1, 9, 5, 0], [5, 0, 9, 1], [5, 0, 1, 9]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "extract", lambda trunk, pictures, options: maps)
        assert average_precision([None] * 4) == [0.5] * 4
        assert average_precision(["1", "2", "1", "2"]) == [0.5] * 4
        assert average_precision(["1", "1", "1", "2"]) == [0.5] * 2  # the first two have no match in another camera


def test_weights_are_loaded_but_for_another_classifier(images: ModuleType, tmp_path: Path) -> None:
    def network(classes: int, widths: int = 4) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(3, widths), torch.nn.BatchNorm1d(widths), torch.nn.Linear(widths, classes)
        )

    saved, path = network(5), tmp_path / "weights.pth"
    torch.save({"state_dict": saved.state_dict()}, path)
    loaded = images.load_weights(network(7), path)
    assert torch.equal(loaded[0].weight, saved[0].weight)
    torch.save({f"other.{key}": value for key, value in saved.state_dict().items()}, path)
    assert torch.equal(images.load_weights(network(5), path)[2].weight, saved[2].weight)  # other names, by order
    with pytest.raises(SystemExit, match="9 of 9 tensors are missing"):
        images.load_weights(network(5, 6), path)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "mobilenetv3_small_050"])
def test_backbones_by_name(images: ModuleType, name: str, tmp_path: Path) -> None:
    library = "timm" if name == "mobilenetv3_small_050" else "torchvision"
    try:
        module = importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # torchvision of another build than torch's: operators are missing
        pytest.skip(f"{library}: {error}")
    whole = module.create_model(name) if library == "timm" else module.models.get_model(name)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    trunk = images.Trunk(name, tmp_path / "weights.pth", 16, 12, (64, 32))
    assert trunk.shape == (12, 4, 2)
    assert trunk(torch.zeros(2, 3, 64, 32)).shape == (2, 12, 4, 2)
    first = next(value for value in whole.parameters() if value.dim() == 4)
    assert any(torch.equal(value, first) for value in trunk.layers.parameters())


def test_unknown_backbone_is_refused(images: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="--backbone nonsense: neither 'small' nor a model of timm, not installed"):
        images.Trunk("nonsense", None, 8, 8, (16, 16))
