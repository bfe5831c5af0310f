"""Draws the demo's figures: accuracy over time, classes and their nearest ones, the local matches of one character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from glyph_data import CELLS, FACES, QUERY_FACE, SIZE, Glyphs, normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import QAConv
from qaconv_triton.functional import class_neighbors
from qaconv_triton.plots import plot_matches, plot_neighbors

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers say the same
STYLES = (("#666666", "D"), ("#0072B2", "s"), ("#E69F00", "^"), ("#D55E00", "o"))

ANCHORS = (
    "OlcAe3iKnE-\u00ab+8uPxT\u0416\u044f\u03b8\u2192&?SdHLRp0(/=vyzUo"  # shown if they are in training, in this order
)
ANCHOR_ROWS, NEIGHBORS_SHOWN = 8, 7


def draw_accuracy(path: Path, curves: dict[str, list[tuple[list[float], list[float]]]], unit: str) -> None:
    """Mean average precision of occluded queries over the seconds of training: each seed thin, their mean thick."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, seeds), (color, marker) in zip(curves.items(), STYLES, strict=False):
        for seconds, precision in seeds:
            axes.plot(seconds, precision, color=color, linewidth=0.8, alpha=0.4)
        seconds, precision = np.array(seeds).mean(axis=0)
        axes.plot(seconds, precision, color=color, linewidth=2.2, marker=marker, markersize=7, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(
        xlabel=f"{unit}, logarithmic",
        ylabel="mAP of occluded queries",
        title="Accuracy over training time; thin: one seed each",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=100)


def draw_neighbors(path: Path, glyphs: Glyphs, table: Tensor) -> None:
    """Two columns of classes, and right of each its nearest classes by the class graph, with their cosine."""
    shown = min(NEIGHBORS_SHOWN, len(glyphs) - 1)
    similarities, neighbors = (tensor.cpu() for tensor in class_neighbors(table, shown, return_similarities=True))
    known = [glyphs.characters.index(anchor) for anchor in ANCHORS if anchor in glyphs.characters]
    anchors = list(dict.fromkeys([*known, *range(len(glyphs))]))[: 2 * ANCHOR_ROWS]
    images = 255 - glyphs.images[:, QUERY_FACE]
    figure = Figure(figsize=(13.6, 10), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axes, start in zip(figure.subplots(1, 2), (0, ANCHOR_ROWS), strict=True):
        classes = anchors[start : start + ANCHOR_ROWS]
        names = [f"U+{ord(character):04X}" for character in glyphs.characters]
        plot_neighbors(neighbors, images, classes=classes, similarities=similarities, names=names, axes=axes)
    figure.savefig(path, dpi=80)


PAIR = "&gR@QkSaB5\u0436\u042f\u00df\u03be%$ehGmw9"  # the first of these that is a test class is shown
SERIF = FACES.index("DejaVuSerif")
LINES = 12


@torch.no_grad()
def draw_correspondences(
    path: Path, backbone: nn.Module, matcher: QAConv, glyphs: Glyphs, occluded: Tensor, visibility: Tensor
) -> None:
    """The matches of a test character's ink, clean and occluded, with the same character in another face."""
    pairable = [glyph for glyph in range(len(glyphs)) if glyphs.covered[glyph, SERIF]]
    wanted = [glyph for mark in PAIR for glyph in pairable if glyphs.characters[glyph] == mark]
    glyph = (wanted or pairable)[0]
    gallery = glyphs.images[glyph, SERIF][None].to(occluded.device)
    clean = glyphs.images[glyph, QUERY_FACE][None].to(occluded.device)
    seen = visibility[glyph].to(occluded.device)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, probe, occ, title in (
        (left, clean, None, "clean"), (right, occluded[glyph], seen, "occluded (shaded), with visibility map"),
    ):  # fmt: skip
        maps = backbone(normalize(torch.stack([probe, gallery])))
        ink = F.avg_pool2d(probe.float(), SIZE // CELLS)[0] > 32
        options = {"count": LINES, "probe_occ": occ, "where": ink, "axes": axes, "legend": axes is right}
        plot_matches(matcher, *maps, 255 - probe, 255 - gallery, **options)
        axes.set_title(f"{title}: {axes.get_title()}")
    figure.suptitle("The matches of an unseen character's ink in another face")
    figure.savefig(path, dpi=100)
