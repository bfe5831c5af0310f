"""Draws the demo's figures: accuracy over time, classes and their nearest ones, the local matches of one character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from glyph_data import CELLS, FACES, QUERY_FACE, SIZE, Glyphs, normalize
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import QAConv
from qaconv_triton.functional import class_neighbors

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers say the same
STYLES = (("#666666", "D"), ("#0072B2", "s"), ("#E69F00", "^"), ("#D55E00", "o"))

ANCHORS = (
    "OlcAe3iKnE-\u00ab+8uPxT\u0416\u044f\u03b8\u2192&?SdHLRp0(/=vyzUo"  # shown if they are in training, in this order
)
ANCHOR_ROWS, NEIGHBORS_SHOWN = 8, 7
TILE, GAP = SIZE + 8, 14  # a picture with its frame; room for a number below


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
    """Two columns of classes, dark, and right of each its nearest classes by the class graph, with their cosine."""
    shown = min(NEIGHBORS_SHOWN, len(glyphs) - 1)
    similarity, neighbors = (tensor.cpu() for tensor in class_neighbors(table, shown, return_similarities=True))
    known = [glyphs.characters.index(anchor) for anchor in ANCHORS if anchor in glyphs.characters]
    anchors = list(dict.fromkeys([*known, *range(len(glyphs))]))[: 2 * ANCHOR_ROWS]
    width = (shown + 2) * TILE
    canvas = np.full((ANCHOR_ROWS * (TILE + GAP), 2 * width - TILE), 255, np.uint8)
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    axes = figure.subplots()
    for place, anchor in enumerate(anchors):
        top, left = place % ANCHOR_ROWS * (TILE + GAP), place // ANCHOR_ROWS * width
        for column, glyph in enumerate([anchor, *neighbors[anchor].tolist()]):
            picture = np.pad(glyphs.images[glyph, QUERY_FACE].numpy(), (TILE - SIZE) // 2)
            x = left + column * TILE
            canvas[top : top + TILE, x : x + TILE] = picture if column == 0 else 255 - picture
            if column:
                text = f"{similarity[anchor, column - 1]:.2f}"
                axes.text(x + TILE / 2, top + TILE + GAP / 3, text, ha="center", va="center", size=7, color="0.4")
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title("Classes (white on black) and their nearest classes, by cosine of the class table")
    axes.set_axis_off()
    figure.savefig(path, dpi=100)


PAIR = "&gR@QkSaB5\u0436\u042f\u00df\u03be%$ehGmw9"  # the first of these that is a test class is shown
SERIF = FACES.index("DejaVuSerif")
LINES = 12


@torch.no_grad()
def draw_correspondences(
    path: Path, backbone: nn.Module, matcher: QAConv, glyphs: Glyphs, occluded: Tensor, visibility: Tensor
) -> None:
    """The best local matches of a test character, clean and occluded, with the same character in another face."""
    pairable = [glyph for glyph in range(len(glyphs)) if glyphs.covered[glyph, SERIF]]
    wanted = [glyph for mark in PAIR for glyph in pairable if glyphs.characters[glyph] == mark]
    glyph = (wanted or pairable)[0]
    gallery = glyphs.images[glyph, SERIF][None, None].to(occluded.device)
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    everything = torch.ones_like(visibility[:1])
    query = glyphs.images[glyph, QUERY_FACE][None].to(occluded.device)
    draw_matches(left, "clean", backbone, matcher, query, gallery[0], everything.to(query.device))
    title = "occluded (shaded), with visibility map"
    lines = draw_matches(right, title, backbone, matcher, occluded[glyph], gallery[0], visibility[glyph, None])
    figure.colorbar(lines, ax=[left, right], label="correlation", shrink=0.8)
    figure.suptitle("Where an unseen character's locations find their best match in another face")
    figure.savefig(path, dpi=100)


def draw_matches(
    axes: Axes, title: str, backbone: nn.Module, matcher: QAConv, probe: Tensor, gallery: Tensor, visibility: Tensor
) -> LineCollection:
    """Draw the strongest of the best matches of those probe locations that show ink."""
    probe_map, gallery_map = backbone(normalize(torch.stack([probe, gallery]))).split(1)
    matches = matcher.correspondences(probe_map, gallery_map, visibility)
    best, found, visibility = matches.similarity_a.flatten().cpu(), matches.b_location.flatten().cpu(), visibility.cpu()
    cell = SIZE // CELLS
    ink = F.avg_pool2d(probe.float().cpu(), cell).flatten() > 32
    chosen = (
        best.masked_fill(~ink, -1.0).topk(min(LINES, max(1, int((ink & (visibility.flatten() > 0.5)).sum())))).indices
    )
    right, down = SIZE + SIZE // 2, SIZE // 4  # of the gallery picture: a step down keeps the lines apart
    canvas = np.full((SIZE + down, right + SIZE), 255, np.uint8)
    canvas[:SIZE, :SIZE], canvas[down:, right:] = 255 - probe[0].cpu().numpy(), 255 - gallery[0].cpu().numpy()
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    shade = np.kron(1 - visibility[0, 0].numpy(), np.ones((cell, cell)))
    axes.imshow(np.zeros_like(shade), cmap="autumn", alpha=0.45 * shade, extent=(-0.5, SIZE - 0.5, SIZE - 0.5, -0.5))
    for x, y in ((0, 0), (right, down)):
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), SIZE, SIZE, fill=False, edgecolor="0.7"))
    start, end = center(chosen), center(found[chosen]) + torch.tensor([right, down])
    lines = LineCollection(torch.stack([start, end], dim=1).numpy(), array=best[chosen].numpy(), cmap="viridis")
    lines.set(clim=(0, 1), linewidth=1.6)
    axes.add_collection(lines)
    for ends in (start, end):
        axes.scatter(*ends.mT.numpy(), s=12, c=best[chosen].numpy(), vmin=0, vmax=1, cmap="viridis", zorder=3)
    axes.set(title=title, xlim=(-1, right + SIZE), ylim=(SIZE + down, -1))
    axes.set_axis_off()
    return lines


def center(location: Tensor) -> Tensor:
    """The pixel (x, y) in the middle of locations `[M]`: `[M, 2]`."""
    return (torch.stack([location % CELLS, location // CELLS], dim=1).float() + 0.5) * (SIZE / CELLS) - 0.5
