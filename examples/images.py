"""Train QAConv on a folder of pictures and measure how well it finds identities that it never saw.

    python examples/images.py Market-1501 --backbone resnet50 --weights resnet50.pth --size 256x128 --stride 16
    python examples/images.py faces/ --backbone mobilenetv3_small_100
    python examples/images.py list.txt --methods pooled nearest

The pictures come in one of these forms, which the script tells apart by itself:

    Market-1501     names such as 0001_c1s1_000151_00.jpg (identity 1, camera 1); the folders bounding_box_train,
                    query and bounding_box_test, or one folder of all pictures
    folders         one folder of pictures per identity; names such as *_c2* say the camera, others leave it open
    a list          a text file with a line "path identity [camera]" per picture, paths relative to the file

Where there is no query and gallery set, the identities are split: a share of them is for the test, in which the first
picture of each camera is a query and every picture is in the gallery. As usual, a query's own camera does not count as
a match; where no camera is known, only the query itself does not. Nothing is downloaded: weights come from `--weights`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from recipe import Backbone, ClassBatches, MatchingLoss, PooledLoss, Recipe, bootstrap_interval, fit, make_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qaconv_triton.evaluation import query_metrics, save_features

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
MARKET_NAME = re.compile(r"^(-?\d+)_c(\d+)")  # identity and camera
CAMERA_IN_NAME = re.compile(r"(?:^|_)c(?:am)?(\d+)", re.IGNORECASE)
METHODS = ("pooled", "all", "random", "nearest")
JUNK = "-1"  # Market-1501's label of what shows nobody
BATCH = 256  # pictures at a time where nothing is trained
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what pretrained weights expect


@dataclass(frozen=True)
class Picture:
    """A file, whom it shows, and which camera took it, if that is known."""

    path: Path
    identity: str
    camera: str | None


def read_pictures(source: Path) -> list[Picture]:
    """The pictures of a list file or a folder, in whichever of the three forms it is."""
    if not source.exists():
        raise SystemExit(f"{source}: no such file or folder")
    if source.is_file():
        pictures = read_list(source)
    else:
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        pictures = read_market(files) if files else list(read_identity_folders(source))
    pictures = [picture for picture in pictures if picture.identity != JUNK]
    if not pictures:
        raise SystemExit(f"{source}: no pictures found ({', '.join(sorted(SUFFIXES))})")
    return pictures


def read_list(source: Path) -> list[Picture]:
    pictures = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (2, 3):
            raise SystemExit(f"{source}, line {number}: expected 'path identity [camera]', got {line!r}")
        path = source.parent / words[0]
        if not path.is_file():
            raise SystemExit(f"{source}, line {number}: no file {path}")
        pictures.append(Picture(path, words[1], words[2] if len(words) == 3 else None))
    return pictures


def read_market(files: list[Path]) -> list[Picture]:
    pictures = []
    for path in files:
        name = MARKET_NAME.match(path.name)
        if name is None:
            raise SystemExit(f"{path}: expected a name such as 0001_c1s1_000151_00.jpg, or a folder per identity")
        pictures.append(Picture(path, *name.groups()))
    return pictures


def read_identity_folders(source: Path) -> Iterator[Picture]:
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                camera = CAMERA_IN_NAME.search(path.stem)
                yield Picture(path, folder.name, camera[1] if camera else None)


def load_sets(options: argparse.Namespace) -> tuple[list[Picture], list[Picture], list[Picture]]:
    """Pictures for training, queries and gallery."""
    data: Path = options.data
    if (data / "bounding_box_train").is_dir():
        folders = "bounding_box_train", "query", "bounding_box_test"
        training, queries, gallery = (read_pictures(data / name) for name in folders)
    elif options.query is not None:
        training, queries, gallery = (read_pictures(path) for path in (data, options.query, options.gallery))
    else:
        training, queries, gallery = split(read_pictures(data), options.test_share, options.seed)
    return training, queries, gallery


def split(pictures: list[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture], list[Picture]]:
    """Keep a share of the identities for the test; the first picture of each of their cameras is a query."""
    identities = sorted({picture.identity for picture in pictures})
    order = torch.randperm(len(identities), generator=torch.Generator().manual_seed(seed)).tolist()
    tested = {identities[i] for i in order[: round(share * len(identities))]}
    gallery = [picture for picture in pictures if picture.identity in tested]
    queries: dict[tuple[str, str | None], Picture] = {}
    for picture in gallery:
        queries.setdefault((picture.identity, picture.camera), picture)
    return [picture for picture in pictures if picture.identity not in tested], list(queries.values()), gallery


class PictureSet(Dataset[tuple[Tensor, int]]):
    """Pictures `[3, height, width]` uint8 and their labels."""

    def __init__(self, pictures: list[Picture], labels: Tensor, size: tuple[int, int]) -> None:
        self.pictures, self.labels, self.size = pictures, labels.tolist(), size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.pictures[index].path) as image:
            if image.mode in ("P", "LA", "RGBA"):  # what is transparent becomes white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB").resize(self.size[::-1], Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.labels[index]


def augment(images: Tensor, flip: bool) -> Tensor:
    """Shift, scale and turn every picture a little, and mirror half of them where `flip`."""

    def draw(most: float) -> Tensor:
        return (2 * torch.rand(len(images), device=images.device) - 1) * most

    angle, scale = draw(0.1), 1 + draw(0.1)
    side = torch.where(draw(1.0) < 0, -1.0, 1.0) if flip else 1.0
    rows = (
        torch.stack([side * angle.cos() * scale, -angle.sin() * scale, draw(0.1)], dim=1),
        torch.stack([side * angle.sin() * scale, angle.cos() * scale, draw(0.1)], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Trunk(nn.Module):
    """Pixels to feature maps: a backbone by name, cut at a stride, and a 1x1 convolution to `features` channels."""

    def __init__(self, name: str, weights: Path | None, stride: int, features: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.layers = load_layers(name, weights, stride, size)
        with torch.no_grad():
            maps = last(self.layers.eval()(torch.zeros(1, 3, *size)))
        self.layers.train()
        if maps.dim() != 4:
            raise SystemExit(f"--backbone {name}: expected feature maps [B, C, H, W], got {list(maps.shape)}")
        self.neck = nn.Sequential(nn.Conv2d(maps.shape[1], features, 1, bias=False), nn.BatchNorm2d(features))
        self.shape = (features, *maps.shape[2:])

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(last(self.layers((images.float() - self.mean) / self.deviation)))


def last(maps: Tensor | list[Tensor]) -> Tensor:
    """timm gives a list of maps, of which we ask for one."""
    return maps if isinstance(maps, Tensor) else maps[-1]


def load_layers(name: str, weights: Path | None, stride: int, size: tuple[int, int]) -> nn.Module:
    """A backbone of timm, else of torchvision, by its name there, or "small"; without the layers past `stride`."""
    if name == "small":
        layers = Backbone(3, 64, stride)
        return layers if weights is None else load_weights(layers, weights)
    try:
        import timm
    except ImportError:
        timm = None
    if timm is not None and timm.is_model(name):
        reductions = timm.create_model(name, features_only=True).feature_info.reduction()
        fitting = [index for index, reduction in enumerate(reductions) if reduction <= stride]
        if not fitting:
            raise SystemExit(f"--stride {stride}: {name} has maps of stride {reductions}")
        cut = {"features_only": True, "out_indices": fitting[-1:]}
        if weights is None:
            return timm.create_model(name, **cut)
        state = load_weights(timm.create_model(name), weights).state_dict()
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **cut)
    try:
        from torchvision import models
    except ImportError:
        models = None
    if models is None or name not in models.list_models(models):
        known = [library for library, module in (("timm", timm), ("torchvision", models)) if module is not None]
        raise SystemExit(
            f"--backbone {name}: neither 'small' nor a model of {' or '.join(known) or 'timm, not installed'}"
        )
    model = models.get_model(name, weights=None)
    if weights is not None:
        load_weights(model, weights)
    layers, kept = nn.Sequential(), nn.Sequential()
    for layer in getattr(model, "features", model).children():
        if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Linear):
            break
        layers.append(layer)
        with torch.no_grad():
            maps = layers.eval()(torch.zeros(1, 3, *size))
        if maps.shape[2] * stride >= size[0]:
            kept = nn.Sequential(*layers)
    if not kept:
        raise SystemExit(f"--stride {stride}: already the first layer of {name} has a larger one")
    return kept


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a file of weights, of which a classifier of other classes is left out."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    own = model.state_dict()
    if state.keys() != own.keys() and [v.shape for v in state.values()] == [v.shape for v in own.values()]:
        print(f"{path.name}: other names, but the same shapes in the same order: taken by order")
        state = dict(zip(own, state.values(), strict=True))
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    missing = sorted(own.keys() - fitting.keys())
    if len(missing) > 2:  # more than weight and bias of the classifier
        raise SystemExit(f"--weights {path}: {len(missing)} of {len(own)} tensors are missing, such as {missing[:3]}")
    model.load_state_dict(fitting, strict=False)
    return model


def load_batches(
    dataset: PictureSet, batches: Iterable[list[int]], options: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures `[B, 3, height, width]` uint8 and labels, on the device."""
    pin = options.device.type == "cuda"
    for images, labels in DataLoader(dataset, batch_sampler=batches, num_workers=options.workers, pin_memory=pin):
        yield images.to(options.device, non_blocking=pin), labels.to(options.device, non_blocking=pin)


def some_of_each(labels: list[int], most: int) -> list[list[int]]:
    """Batches of the first few pictures of every identity."""
    seen: dict[int, int] = {}
    chosen = []
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= most:
            chosen.append(index)
    return [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]


def train(
    method: str, training: list[Picture], options: argparse.Namespace
) -> tuple[Trunk, MatchingLoss | PooledLoss, float]:
    """Train a trunk and a matcher on pictures; returns both in evaluation mode, and the seconds."""
    torch.manual_seed(options.seed)
    (labels,) = number([[picture.identity for picture in training]])
    num_classes = int(labels.max()) + 1
    dataset = PictureSet(training, labels, options.size)
    recipe = Recipe(
        scored=method,
        k_nearest=min(options.k_nearest, num_classes - 1),
        learning_rate=options.lr,
        batch_classes=min(options.batch_size // options.instances, num_classes),
        instances=options.instances,
    )
    trunk = Trunk(options.backbone, options.weights, options.stride, options.features, options.size)
    trunk.to(options.device)
    loss_function = make_loss(recipe, trunk.shape, num_classes).to(options.device)
    sampler = ClassBatches(labels, recipe, loss_function.table, options.seed)
    few = some_of_each(labels.tolist(), 2)

    def load_epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in load_batches(dataset, sampler, options):
            yield augment(images.float(), options.flip), labels

    epoch_steps = len(sampler)
    steps = options.epochs * epoch_steps
    losses, started = [], time.perf_counter()
    training_steps = fit(trunk, loss_function, recipe, load_epoch, lambda: load_batches(dataset, few, options), steps)
    for step, loss in enumerate(tqdm(training_steps, total=steps, desc=method, unit="batch", disable=None), start=1):
        losses.append(loss)
        if step % epoch_steps == 0:
            mean, seconds = torch.stack(losses[-epoch_steps:]).mean().item(), time.perf_counter() - started
            print(
                f"{method}: epoch {step // epoch_steps} of {options.epochs}, loss {mean:.3f}, {seconds:.0f} s",
                flush=True,
            )
    return trunk.eval(), loss_function.eval(), time.perf_counter() - started


@torch.no_grad()
def extract(trunk: Trunk, pictures: list[Picture], options: argparse.Namespace) -> Tensor:
    """Feature maps of pictures `[M, C, H, W]`."""
    dataset = PictureSet(pictures, torch.zeros(len(pictures)), options.size)
    order = range(len(pictures))
    batches = [list(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]
    return torch.cat([trunk(images) for images, _ in load_batches(dataset, batches, options)])


def evaluate(
    trunk: Trunk,
    loss_function: MatchingLoss | PooledLoss,
    queries: list[Picture],
    gallery: list[Picture],
    options: argparse.Namespace,
    features: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank-1 and average precision of every query that has a true match.

    What the query's own camera took of its identity does not count, nor does the query itself.
    The feature maps go to two files of the folder `features`, if there is to be one.
    """
    maps, gallery_maps = (extract(trunk, pictures, options) for pictures in (queries, gallery))
    ids, gallery_ids = number([[item.identity for item in part] for part in (queries, gallery)])
    # where the camera is unknown, only the query's own picture is of the same one
    cameras, gallery_cameras = number([[item.camera or str(item.path) for item in part] for part in (queries, gallery)])
    if features is not None:
        features.mkdir(parents=True, exist_ok=True)
        paths = [[item.path for item in part] for part in (queries, gallery)]
        save_features(features / "query.safetensors", maps, ids, cameras, paths=paths[0])
        save_features(features / "gallery.safetensors", gallery_maps, gallery_ids, gallery_cameras, paths=paths[1])
    results = []
    for rows in torch.arange(len(queries)).split(BATCH):
        indices = loss_function.rank(maps[rows.to(maps.device)], gallery_maps).cpu()
        results.append(query_metrics(indices, ids[rows], gallery_ids, cameras[rows], gallery_cameras))
    precision, _, first = (torch.cat(parts) for parts in zip(*results, strict=True))
    found = ~precision.isnan()
    if not found.any():
        raise SystemExit("no query has a true match in the gallery: same identity, another camera")
    return (first[found] == 1).double(), precision[found]


def number(names: list[list[str]]) -> list[Tensor]:
    """Integers in place of names, the same for the same name in all lists."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(name for part in names for name in part))}
    return [torch.tensor([numbers[name] for name in part]) for part in names]


def parse_size(text: str) -> tuple[int, int]:
    height, width = text.lower().split("x") if "x" in text.lower() else (text, text)
    return int(height), int(width)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("data", type=Path, help="folder or list of pictures, for training or to be split")
    parser.add_argument("--query", type=Path, help="folder or list of queries (with --gallery); else data is split")
    parser.add_argument("--gallery", type=Path, help="folder or list of pictures to find them in")
    parser.add_argument("--test-share", type=float, default=0.3, help="of the identities, where data is split (0.3)")
    parser.add_argument("--methods", nargs="+", default=["nearest"], choices=METHODS, help="(nearest)")
    parser.add_argument("--backbone", default="small", help="'small', or a name of timm or torchvision (small)")
    parser.add_argument("--weights", type=Path, help="file of the backbone's weights (none: random)")
    parser.add_argument("--size", type=parse_size, default="64", help="pixels, or height x width: 256x128 (64)")
    parser.add_argument("--stride", type=int, default=8, help="pixels per location of a feature map, at most (8)")
    parser.add_argument("--features", type=int, default=64, help="channels of a feature map (64)")
    parser.add_argument("--epochs", type=int, default=20, help="an identity comes about once in each (20)")
    parser.add_argument("--batch-size", type=int, default=64, help="(64)")
    parser.add_argument("--instances", type=int, default=4, help="pictures of an identity in a batch (4)")
    parser.add_argument("--k-nearest", type=int, default=20, help="K (20)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate, also of the class table (1e-3)")
    parser.add_argument("--flip", action="store_true", help="mirror half of the training pictures")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (0)")
    parser.add_argument("--seed", type=int, default=1, help="(1)")
    parser.add_argument("--device", type=torch.device, default=cuda, help=f"({cuda})")
    parser.add_argument("--output", type=Path, default=Path("out/images"), help="for results and weights (out/images)")
    parser.add_argument("--save-features", action="store_true", help="write the test's feature maps beside the weights")
    options = parser.parse_args()
    if (options.query is None) != (options.gallery is None):
        parser.error("--query and --gallery come together")
    if options.batch_size < 2 * options.instances or options.batch_size % options.instances:
        parser.error("--batch-size must be a multiple of --instances, and at least twice as large")
    return options


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    training, queries, gallery = load_sets(options)
    counts = [f"{len({p.identity for p in part})} identities ({len(part)} pictures)" for part in (training, gallery)]
    print(f"training on {counts[0]}; {len(queries)} queries in a gallery of {counts[1]}")
    lines = ["| method | rank-1 | mAP | seconds of training |", "|---|---|---|---|"]
    for method in options.methods:
        trunk, loss_function, seconds = train(method, training, options)
        torch.save(
            {"trunk": trunk.state_dict(), "matcher": loss_function.state_dict()}, options.output / f"{method}.pt"
        )
        cells = []
        features = options.output / method if options.save_features else None
        for values in evaluate(trunk, loss_function, queries, gallery, options, features):
            low, high = bootstrap_interval(values)
            cells.append(f"{values.mean().item():.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.0f} |")
    table = "\n".join(lines)
    (options.output / "results.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n95 % intervals over queries. Weights and table are in {options.output}/.")


if __name__ == "__main__":
    main()
