"""Train a QAConv matcher with graph sampling on pictures of characters, and measure it on characters it never saw.

A character is an identity, a font face a camera: given a character in DejaVu Sans, find it among the pictures that
DejaVu Sans Mono and DejaVu Serif draw of hundreds of others. Three matchers train on the same backbone, with the same
losses and number of batches:

    pooled   global average pooling and cosine, the usual baseline; graph-sampled batches
    random   QAConv, batches of random classes
    graph    QAConv, graph-sampled batches: a class and the classes that are nearest to it

`python examples/glyphs.py --help` lists the options. Read on from `main`, or from `train` for what you would write
in a training script of your own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from glyph_data import CELLS, GALLERY_FACES, QUERY_FACE, Glyphs, load_glyphs, occlude
from glyph_pictures import draw_correspondences, draw_neighbors, draw_training
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss
from qaconv_triton.functional import class_neighbors
from qaconv_triton.losses import batch_hard_hinge

METHODS = {
    "pooled": "(a) global average pooling + cosine",
    "random": "(b) QAConv, random batches",
    "graph": "(c) QAConv, graph-sampled batches",
}
VISIBILITY = "(d) as (c), with visibility maps"

CHANNELS = 64
INSTANCES = 4  # pictures of each class in a batch
BATCH_CLASSES = 16
LEARNING_RATE = 3e-3
MARGIN = 1.0
OCCLUDED_SHARE = 0.25  # of an occluded query

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


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
        return super().forward(images.float() / 127.5 - 1)


def convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)


class PooledCosine(nn.Module):
    """The baseline: cosine of globally pooled features, with `SoftmaxTripletLoss`'s two losses and a learned scale."""

    def __init__(self, num_classes: int, k_nearest: int) -> None:
        super().__init__()
        self.k_nearest = k_nearest
        self.class_embed = nn.Parameter(torch.randn(num_classes, CHANNELS, 1, 1) / CHANNELS**0.5)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def match(self, probe_features: Tensor, gallery_features: Tensor) -> Tensor:
        return pooled(probe_features) @ pooled(gallery_features).mT

    def compute_class_neighbors(self) -> Tensor:
        return class_neighbors(self.class_embed, self.k_nearest)

    def on_epoch_start(self) -> None:
        pass

    def forward(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = self.scale * self.match(feature, self.class_embed)
        cls_loss = F.cross_entropy(logits, target, reduction="none")
        triplet_loss, triplet_acc = batch_hard_hinge(self.scale * self.match(feature, feature), target, MARGIN)
        cls_acc = (logits.argmax(dim=1) == target).float()
        return cls_loss, triplet_loss, cls_loss + triplet_loss.mean(), cls_acc, triplet_acc


def pooled(features: Tensor) -> Tensor:
    return F.normalize(features.mean(dim=(2, 3)), dim=1)
