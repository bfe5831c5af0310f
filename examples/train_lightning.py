"""Train QAConv with graph sampling in PyTorch Lightning, on pictures in any of the forms that images.py reads.

    python examples/train_lightning.py Market-1501 --backbone resnet50 --weights resnet50.pth --size 256x128 \
        --stride 16 --k_nearest 256 --precision bf16-mixed
    python examples/train_lightning.py faces/ --devices 2

A training that was interrupted goes on from its last checkpoint, inside an epoch too: run the same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from images import BATCH, Picture, PictureSet, Trunk, augment, load_sets, number, parse_size
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss
from qaconv_triton.evaluation import rank_gallery, reid_metrics
from qaconv_triton.integrations.lightning import GraphSampling

LISTED = 1000  # gallery pictures of each query; true matches beyond count as never found in the mAP


class Reid(pl.LightningModule):
    """A backbone, a matcher with a class table, and the losses over both."""

    def __init__(self, options: argparse.Namespace, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.trunk = Trunk(options.backbone, options.weights, options.stride, options.features, options.size)
        k = min(options.k_nearest, num_classes - 1)
        matcher = QAConv(*self.trunk.shape, num_classes, k, include_self=True)
        self.criterion = SoftmaxTripletLoss(matcher, background="ignore")
        self.maps: list[Tensor] = []  # of the pictures that are validated on

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        maps = self.trunk(augment(images.float(), self.options.flip))
        _, _, loss, class_accuracy, _ = self.criterion(maps, labels)  # the class loss and the triplet loss, summed
        self.log_dict({"loss": loss.mean(), "class_accuracy": class_accuracy.mean()}, prog_bar=True)
        return loss.mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.maps.append(self.trunk(batch[0]).float())

    def on_validation_epoch_end(self) -> None:
        maps, self.maps = torch.cat(self.maps), []
        data = self.trainer.datamodule
        count = len(data.queries)
        if len(maps) < count + len(data.gallery):  # the sanity check looks at a few pictures only
            return
        _, indices = rank_gallery(self.criterion.matcher, maps[:count], maps[count:], min(LISTED, len(data.gallery)))
        metrics = reid_metrics(indices, *data.identities, *data.cameras)
        self.log_dict(metrics.to_dict(ranks=(1,)), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.options.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.options.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Pictures(pl.LightningDataModule):
    """Training pictures in graph-sampled batches; queries and gallery, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.training, self.queries, self.gallery = load_sets(options)
        (self.labels,) = number([[picture.identity for picture in self.training]])
        tested = [self.queries, self.gallery]
        self.identities = number([[picture.identity for picture in part] for part in tested])
        self.cameras = number([[picture.camera or str(picture.path) for picture in part] for part in tested])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        matcher = self.trainer.lightning_module.criterion.matcher

        def graph() -> Tensor:  # that of the callback, or the first one
            return matcher.compute_class_neighbors() if matcher.class_neighbors is None else matcher.class_neighbors

        options = self.options
        sampler = GraphSampler(self.labels, graph, options.batch_size, options.instances, seed=options.seed)
        sampler.set_epoch(self.trainer.current_epoch)
        dataset = PictureSet(self.training, self.labels, options.size)
        return DataLoader(dataset, batch_sampler=sampler, num_workers=options.workers, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        pictures: list[Picture] = [*self.queries, *self.gallery]
        dataset = PictureSet(pictures, torch.zeros(len(pictures)), self.options.size)
        return DataLoader(dataset, batch_size=BATCH, num_workers=self.options.workers)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder or list of pictures, see images.py")
    parser.add_argument("--query", type=Path, help="folder or list of queries (with --gallery); else data is split")
    parser.add_argument("--gallery", type=Path, help="folder or list of pictures to find them in")
    parser.add_argument("--test-share", type=float, default=0.3, help="of the identities, where data is split (0.3)")
    parser.add_argument("--backbone", default="small", help="'small', or a name of timm or torchvision (small)")
    parser.add_argument("--weights", type=Path, help="file of the backbone's weights (none: random)")
    parser.add_argument("--size", type=parse_size, default="64", help="pixels, or height x width: 256x128 (64)")
    parser.add_argument("--stride", type=int, default=8, help="pixels per location of a feature map, at most (8)")
    parser.add_argument("--features", type=int, default=64, help="channels of a feature map (64)")
    parser.add_argument("--k_nearest", "--k-nearest", type=int, default=20, help="K (20)")
    parser.add_argument("--epochs", type=int, default=20, help="(20)")
    parser.add_argument("--batch-size", type=int, default=64, help="of a device (64)")
    parser.add_argument("--instances", type=int, default=4, help="pictures of an identity in a batch (4)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (1e-3)")
    parser.add_argument("--flip", action="store_true", help="mirror half of the training pictures")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (0)")
    parser.add_argument("--seed", type=int, default=1, help="(1)")
    parser.add_argument("--accelerator", default="auto", help="of Lightning (auto)")
    parser.add_argument("--devices", type=int, default=1, help="(1)")
    parser.add_argument("--precision", default="32-true", help="of Lightning: 16-mixed, bf16-mixed (32-true)")
    parser.add_argument("--output", type=Path, default=Path("out/lightning"), help="checkpoints and logs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> pl.Trainer:
    options = parse_options(arguments)
    pl.seed_everything(options.seed)
    data = Pictures(options)
    model = Reid(options, int(data.labels.max()) + 1)
    kept = ModelCheckpoint(options.output, save_last=True, every_n_train_steps=100, save_top_k=1)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,
        callbacks=[GraphSampling("criterion.matcher"), kept],
        default_root_dir=options.output,
        log_every_n_steps=10,
    )
    last = options.output / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
