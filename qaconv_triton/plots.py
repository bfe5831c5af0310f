"""Pictures of matches, rankings and class graphs, as matplotlib figures (`pip install qaconv-triton[plot]`).

Nothing here uses pyplot: figures belong to the caller, who saves or shows them, and no setting of matplotlib changes.
What colours say, line styles, markers or signs say as well.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from torch import Tensor

from .evaluation import ReIDMetrics
from .matcher import QAConv
from .matches import score_decimals, strongest_matches
from .validation import check_count

try:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import text_to_path
except ImportError as error:
    raise ImportError("qaconv_triton.plots needs matplotlib: pip install qaconv-triton[plot]") from error

# Okabe and Ito's colours, which people with any colour vision can tell apart
BLUE, VERMILLION = "#0072B2", "#D55E00"
COLORS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS, STYLES = "os^Dvp*", ("-", "--", "-.", ":")  # of curves: 28 of them differ without colours
BOTH_WAYS: tuple[str, Any] = (BLUE, "-")  # matches
ONE_WAY: tuple[str, Any] = (VERMILLION, (0, (2.5, 1.0)))
PIL_MODES = ("1", "P", "PA", "LA", "CMYK", "YCbCr", "HSV", "LAB")  # whose numbers are no grey levels or RGB
GREY = "0.45"
WIDEST = 2.5  # points, of the line of the largest contribution
PAIR_INCHES = 8.0, 3.4  # the most width and height of two pictures with their matches
TILE_INCHES = 0.85  # the width of a picture in a figure of many
ROW = 10  # pictures of a ranking
TITLE_INCHES = 2.5  # the least width of a figure of a ranking with a title
LEGEND_INCHES = 0.19  # the height of a line of a legend


def plot_matches(
    matcher: QAConv,
    probe: Tensor,
    gallery: Tensor,
    probe_image: Any,
    gallery_image: Any,
    *,
    count: int = 16,
    probe_occ: Tensor | None = None,
    gallery_occ: Tensor | None = None,
    where: Tensor | None = None,
    axes: Axes | None = None,
    legend: bool = True,
) -> Figure:
    """Draw the matches of two maps that add most to their score, as lines over the two images.

    A line's width is proportional to its contribution (`matches.strongest_matches`). Lines between locations that are
    each other's best match are solid and blue, with a dot at both ends. Others are dashed and vermillion, with a dot at
    one end: the location there has its best match at the other end, which has a better one elsewhere. Matches that
    lower the score are left out. Occluded locations are shaded. The right image stands a step lower, so that lines
    between the same rows are not level and stand apart; the step means nothing.

    Args:
        matcher: the `QAConv`, which scores in eval mode.
        probe: map `[C, H, W]` of the left image.
        gallery: map `[C, H, W]` of the right image.
        probe_image: tensor `[H, W]`, `[1, H, W]` or `[3, H, W]`, or array `[H, W]`, `[H, W, 3]` or PIL image; bool,
            integers in [0, 255] or floating-point numbers in [0, 1].
        gallery_image: likewise.
        count: the most lines to draw.
        probe_occ: visibility of the probe's locations `[1, H, W]`.
        gallery_occ: visibility of the gallery map's locations `[1, H, W]`.
        where: bool `[H, W]`, the probe locations whose matches are drawn; all where None.
        axes: where to draw; a figure of its own where None.
        legend: explain the lines that are drawn, below the images.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: maps as for `strongest_matches`; images of another kind, shape or range.

    Examples:
        >>> matcher, maps, images = QAConv(8, 4, 2), torch.randn(2, 8, 4, 2), torch.rand(2, 3, 64, 32)
        >>> figure = plot_matches(matcher, *maps, *images)
        >>> figure.savefig("matches.png")  # doctest: +SKIP
    """
    found = strongest_matches(matcher, probe, gallery, count, probe_occ=probe_occ, gallery_occ=gallery_occ, where=where)
    occ = (None if each is None else each[None] for each in (probe_occ, gallery_occ))
    score = matcher.match_pairs(probe[None], gallery[None], *occ).item()
    pictures = _pixels(probe_image, "probe_image"), _pixels(gallery_image, "gallery_image")
    widths = [picture.shape[1] / picture.shape[0] for picture in pictures]  # heights are 1
    left, step = widths[0] + 0.4 * max(widths), 0.3  # of the right image: a step down keeps level lines apart
    across, down = left + widths[1], 1 + step
    if axes is None:
        scale = min(PAIR_INCHES[0] / across, PAIR_INCHES[1] / down)
        size = max(scale * across, 2.6) + 0.2, scale * down + 0.4 + 0.9 * legend
        axes = Figure(figsize=size, layout="constrained").subplots()
    ends: list[Any] = []
    for picture, width, (x, y), visible, location in zip(
        pictures, widths, ((0.0, 0.0), (left, step)), (probe_occ, gallery_occ), found[:2], strict=True
    ):
        extent = x, x + width, y + 1, y
        axes.imshow(picture, extent=extent)
        if visible is not None:
            shade = np.zeros((matcher.height, matcher.width, 4))
            shade[..., 3] = 0.6 * (1 - visible.detach().float().cpu().reshape(shade.shape[:2]).numpy())
            axes.imshow(shade, extent=extent, interpolation="nearest")
        axes.add_patch(Rectangle((x, y), width, 1, fill=False, edgecolor=GREY, linewidth=0.8))
        place = location.cpu().numpy()
        column, row = place % matcher.width + 0.5, place // matcher.width + 0.5
        ends.append(np.stack([x + width * column / matcher.width, y + row / matcher.height], axis=1))
    added, of_probe, of_gallery = (part.cpu().numpy() for part in (found.contribution, *found[4:]))
    thickness = WIDEST * added / np.fmax.reduce(added, initial=1e-30)  # which leaves NaN out
    handles: list[Line2D] = []
    for is_mutual, (color, style) in ((False, ONE_WAY), (True, BOTH_WAYS)):
        chosen = (added > 0) & ((of_probe & of_gallery) == is_mutual)
        if chosen.any():
            meaning = "each is the other's best match" if is_mutual else "best match of the end with the dot"
            handles.insert(0, Line2D([], [], color=color, linestyle=style, linewidth=2, label=meaning))
        segments, each = list(np.stack(ends, axis=1)[chosen]), thickness[chosen]
        axes.add_collection(LineCollection(segments, colors="white", linewidths=each + 1.2, capstyle="butt"))
        axes.add_collection(
            LineCollection(segments, colors=color, linewidths=each, linestyles=[style], capstyle="butt")
        )
        for points, is_end in zip(ends, (of_probe, of_gallery), strict=True):
            x, y = points[chosen & is_end].T
            axes.scatter(x, y, s=14, color=color, edgecolor="white", linewidth=0.6, zorder=3)
    if legend and handles:
        where_below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
        if _figure(axes).get_layout_engine() is None:  # nothing makes room below the axes: it is made within them
            inches = LEGEND_INCHES * (len(handles) + 2)
            wide, high = _inches(axes)
            down += inches / min(wide / across, max(high - inches, 0.1 * high) / down)
            where_below = {"loc": "lower center"}
        title = "width: contribution to the score"
        axes.legend(handles=handles, title=title, fontsize=8, title_fontsize=8, frameon=False, **where_below)
    axes.set(xlim=(-0.02, across + 0.02), ylim=(down + 0.02, -0.02), aspect="equal", title=f"score {score:.2f}")
    axes.set_axis_off()
    return _figure(axes)


def plot_neighbors(
    neighbors: Tensor,
    images: Any = None,
    *,
    classes: Sequence[int] | None = None,
    similarities: Tensor | None = None,
    names: Sequence[str] | Mapping[int, str] | None = None,
    count: int = 7,
    axes: Axes | None = None,
) -> Figure:
    """Draw classes, each in a row of its own with its nearest classes on the right.

    Args:
        neighbors: class graph `[N, K]`, as `matcher.compute_class_neighbors()` returns it.
        images: an image of each class, as `images[class]`, of the kinds that `plot_matches` takes; names alone where
            None.
        classes: the classes to draw; the first 8 where None.
        similarities: `[N, K]`, as `functional.class_neighbors(..., return_similarities=True)` returns them; written
            below the neighbours.
        names: names of the classes, as `names[class]`, shortened in the middle where they are wide; the numbers of the
            classes where None.
        count: the most neighbours to draw of each class.
        axes: where to draw; a figure of its own where None.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: a graph that is not `[N, K]`, similarities of another shape, images of another kind.
        IndexError: a class outside `[0, N)`, or one without an image or a name.

    Examples:
        >>> figure = plot_neighbors(torch.tensor([[1, 2], [0, 2], [1, 0]]), torch.rand(3, 32, 32), names="abc")
    """
    if not isinstance(neighbors, Tensor) or neighbors.dim() != 2:
        got = list(neighbors.shape) if isinstance(neighbors, Tensor) else type(neighbors).__name__
        hint = "; matcher.class_neighbors is None until matcher.compute_class_neighbors()" * (neighbors is None)
        raise ValueError(f"neighbors: expected a class graph [N, K], got {got}{hint}")
    if similarities is not None and similarities.shape != neighbors.shape:
        raise ValueError(f"similarities: expected {list(neighbors.shape)} as neighbors, got {list(similarities.shape)}")
    count = min(check_count(count, "count", low=1, high=None, why="neighbours of a class"), neighbors.shape[1])
    anchors = list(range(min(8, len(neighbors)))) if classes is None else [int(each) for each in classes]
    if outside := [each for each in anchors if not 0 <= each < len(neighbors)]:
        raise IndexError(f"classes: expected values in [0, {len(neighbors)}), got {outside[:5]}")
    rows = [[anchor, *neighbors[anchor, :count].tolist()] for anchor in anchors]
    drawn = sorted({each for row in rows for each in row})
    pictures = {} if images is None else {i: _pixels(_of_class(images, i, "images"), "images") for i in drawn}
    labels = {i: str(i if names is None else _of_class(names, i, "names")) for i in drawn}
    width = max((picture.shape[1] / picture.shape[0] for picture in pictures.values()), default=1.0)
    tile, line = float(bool(pictures)), 0.2 * width / TILE_INCHES  # heights of a picture, and of a line of text below
    pitch = tile + (line if similarities is None else 2 * line) + 0.6 * line
    columns = [0.0, *((1.35 + 1.12 * i) * width for i in range(count))]
    across, down, scale = columns[-1] + width, pitch * max(len(rows), 1), TILE_INCHES / width
    if axes is None:
        axes = Figure(figsize=(scale * across + 0.2, scale * down + 0.5), layout="constrained").subplots()
    else:
        wide, high = _inches(axes)
        scale = min(wide / (across + 0.1), high / (down + 0.1))  # with margins
    decimals = score_decimals([] if similarities is None else similarities[anchors, :count].flatten().tolist())
    for place, row in enumerate(rows):
        for column, each in enumerate(row):
            x, y = columns[column], place * pitch
            style = {"edgecolor": "black", "linewidth": 2.0} if column == 0 else {"edgecolor": "0.7", "linewidth": 0.8}
            if pictures:
                _draw_tile(axes, pictures[each], (x, y, width, tile), style)
            font = FontProperties(size=8, weight="bold" if column == 0 else "normal")
            name = _shortened(labels[each], scale * width, font)
            axes.text(x + width / 2, y + tile + 0.75 * line, name, ha="center", va="center", fontproperties=font)
            if similarities is not None and column:
                text = f"{similarities[row[0], column - 1]:.{decimals}f}"
                axes.text(x + width / 2, y + tile + 1.65 * line, text, ha="center", va="center", size=7, color=GREY)
    _finish_tiles(axes, across, down)
    axes.set_title("Classes (left) and their nearest classes", fontsize=10)
    return _figure(axes)


def plot_ranking(
    query: Any,
    gallery: Sequence[Any],
    is_match: Sequence[bool] | Tensor,
    *,
    scores: Sequence[float] | Tensor | None = None,
    title: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw a query and the gallery images that are ranked best, framed by whether they show its identity.

    A right one has a solid blue frame and a check mark, a wrong one a dashed vermillion frame and a cross. What a
    protocol leaves out of the list, such as images of the query's identity and camera, is to be left out before.

    Args:
        query: an image of the kinds that `plot_matches` takes.
        gallery: images, best first: of the top 10, say, which fill a row.
        is_match: whether each shows the query's identity.
        scores: scores of the images, written below them.
        title: of the picture, such as the query's name; in several lines where it is long.
        axes: where to draw; a figure of its own where None.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: images of another kind; lists of different lengths.

    Examples:
        >>> figure = plot_ranking(torch.rand(3, 64, 32), torch.rand(4, 3, 64, 32), [True, False, True, False])
    """
    lengths = [len(gallery), len(is_match)] + ([] if scores is None else [len(scores)])
    if len(set(lengths)) != 1:
        raise ValueError(f"gallery, is_match and scores: expected equal lengths, got {', '.join(map(str, lengths))}")
    pictures = [_pixels(image, "query" if i == 0 else "gallery") for i, image in enumerate([query, *gallery])]
    width = max(picture.shape[1] / picture.shape[0] for picture in pictures)
    pitch, line, scale = 1.14 * width, 0.2 * width / TILE_INCHES, TILE_INCHES / width
    rows = max(1, -(-len(gallery) // ROW))
    across, height = pitch * (min(len(gallery), ROW) + 1.3), 1.0 + (2.1 if scores is None else 3.1) * line
    down = rows * height - 0.5 * line
    decimals = score_decimals([] if scores is None else [float(score) for score in scores])
    wide = max(scale * across, TITLE_INCHES * (title is not None)) if axes is None else _inches(axes)[0]
    title = None if title is None else _wrapped(title, wide, FontProperties(size=10))
    if axes is None:
        lines = 0 if title is None else title.count("\n")
        size = wide + 0.2, scale * down + 0.4 + 0.17 * lines
        axes = Figure(figsize=size, layout="constrained").subplots()
    for rank, picture in enumerate(pictures):
        place, column = divmod(max(rank - 1, 0), ROW)
        x, y, text, color = (column + 1.3) * pitch if rank else 0.0, place * height, "query", "black"
        frame: dict[str, Any] = {"linewidth": 1.0}
        if rank:
            right = bool(is_match[rank - 1])
            text, color = f"{rank} {'✓' if right else '✗'}", BLUE if right else VERMILLION
            frame = {"linewidth": 3.0, "linestyle": "-" if right else (0, (2.5, 1.2))}
        _draw_tile(axes, picture, (x, y, width, 1), {"edgecolor": color, **frame})
        middle: dict[str, Any] = {"x": x + width / 2, "ha": "center", "va": "center", "size": 8}
        # matplotlib brings this font, which has the signs
        axes.text(y=y + 1 + 0.9 * line, s=text, color=color, family="DejaVu Sans", weight="bold", **middle)
        if rank and scores is not None:
            axes.text(y=y + 1 + 1.9 * line, s=f"{float(scores[rank - 1]):.{decimals}f}", **middle)
    _finish_tiles(axes, across - 0.14 * width, down)
    if title is not None:
        axes.set_title(title, fontsize=10)
    return _figure(axes)


def plot_cmc(
    cmc: Tensor | ReIDMetrics | Mapping[str, Tensor | ReIDMetrics], *, ranks: int = 20, axes: Axes | None = None
) -> Figure:
    """Draw cumulative matching characteristics: the share of queries whose first true match has rank r or better.

    The legend, or the title of a curve without a name, has the share at rank 1. The legend stands below the curves, in
    `axes` within these; names that are too wide for it are shortened in the middle.

    Args:
        cmc: what `reid_metrics` returns, or the curve `[ranks]` in it, or several by name.
        ranks: the ranks to draw; as many as there are, if fewer.
        axes: where to draw; a figure of its own where None.

    Returns:
        The figure.

    Raises:
        TypeError: something else, or other values by name.
        ValueError: a curve that is not `[ranks]`.

    Examples:
        >>> figure = plot_cmc({"QAConv": torch.tensor([0.8, 0.9, 1.0]), "cosine": torch.tensor([0.6, 0.8, 0.9])})
    """
    ranks = check_count(ranks, "ranks", low=1, high=None, why="ranks to draw")
    curves = dict(cmc) if isinstance(cmc, Mapping) else {"": cmc}
    is_own, title, most = axes is None, "CMC", 1
    axes = Figure(figsize=(5.4, 3.6), layout="constrained").subplots() if axes is None else axes
    for (name, curve), color, marker, style in zip(
        curves.items(), cycle(COLORS), cycle(MARKERS), cycle(STYLES), strict=False
    ):
        curve = curve.cmc if isinstance(curve, ReIDMetrics) else curve
        if not isinstance(curve, Tensor):
            raise TypeError(f"cmc: expected ReIDMetrics or a tensor [ranks], got {type(curve).__name__} of {name!r}")
        if curve.dim() != 1:
            raise ValueError(f"cmc: expected curves [ranks], got shape {list(curve.shape)} of {name!r}")
        shown = curve[:ranks].detach().float().cpu().numpy()
        label = f"{name}, rank-1 {shown[0]:.3f}" if name and len(shown) else None
        if len(curves) == 1 and label is None and len(shown):
            title = f"CMC, rank-1 {shown[0]:.3f}"
        most = max(most, len(shown))
        x = np.arange(1, len(shown) + 1)
        axes.plot(x, shown, color=color, linestyle=style, marker=marker, markersize=5, label=label)
    step = 1 if most < 8 else 5 * -(-most // 30)
    axes.set_xticks(sorted({1, *range(step, most + 1, step)}))
    axes.set(xlabel="rank", ylabel="share of queries matched", title=title)
    gap, top = min(0.5, 0.06 + 0.03 * most), 1.02
    low = min(0.9, 1.05 * axes.dataLim.y0 - 0.05 * top)  # of all curves in the axes; infinite if there are none
    axes.set(xlim=(1 - gap, most + gap), ylim=(low, top))
    axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= 1])
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        (wide, high), font = (5.1, 0.0) if is_own else _inches(axes), FontProperties(size=9)
        wide -= 0.7  # of the line beside a name
        columns = 2 if len(labels) > 1 and all(_fits(label, wide / 2 - 0.3, font) for label in labels) else 1
        labels = [_shortened(label, wide, font) for label in labels]
        inches = LEGEND_INCHES * -(-len(labels) // columns)
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        if is_own:
            _figure(axes).set_figheight(3.7 + inches)
        else:  # nothing makes room below the axes: it is made within them
            inches += LEGEND_INCHES
            axes.set_ylim(top - (top - low) * high / max(high - inches, 0.1 * high), top)
            place = {"loc": "lower center"}
        axes.legend(handles, labels, ncols=columns, frameon=False, prop=font, **place)
    return _figure(axes)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def _inches(axes: Axes) -> tuple[float, float]:
    """Width and height of axes, as they are before a layout."""
    box = axes.get_window_extent()
    return box.width / _figure(axes).dpi, box.height / _figure(axes).dpi


def _fits(text: str, inches: float, font: FontProperties) -> bool:
    return bool(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] <= 72 * inches)


def _shortened(text: str, inches: float, font: FontProperties) -> str:
    """A text with as much of its middle left out as it takes to be `inches` wide."""

    def without_middle(kept: int) -> str:
        return text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]

    if len(text) < 3 or _fits(text, inches, font):
        return text
    return without_middle(_largest(2, len(text) - 1, lambda kept: _fits(without_middle(kept), inches, font)))


def _wrapped(text: str, inches: float, font: FontProperties) -> str:
    """A text in lines that are `inches` wide at most, split where it has line breaks too."""

    def split(line: str, most: int) -> list[str]:
        return textwrap.wrap(line, most) or [""]

    def split_to_fit(line: str) -> list[str]:
        most = _largest(1, len(line), lambda most: all(_fits(part, inches, font) for part in split(line, most)))
        return split(line, most)

    return "\n".join(part for line in text.splitlines() for part in split_to_fit(line))


def _largest(low: int, high: int, is_accepted: Callable[[int], bool]) -> int:
    """The largest accepted number from `low`, which counts as accepted, to `high`, by bisection."""
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda number: not is_accepted(number))


def _of_class(values: Any, number: int, name: str) -> Any:
    try:
        return values[number]
    except LookupError as error:
        raise IndexError(f"{name}: expected one of each class, got {len(values)}, none of class {number}") from error


def _draw_tile(axes: Axes, picture: Any, box: tuple[float, float, float, float], frame: dict[str, Any]) -> None:
    """Draw a picture in the middle of a box (x, y, width, height), as large as fits, with a frame around it."""
    x, y, width, height = box
    scale = min(width / picture.shape[1], height / picture.shape[0])
    across, down = scale * picture.shape[1], scale * picture.shape[0]
    x, y = x + (width - across) / 2, y + (height - down) / 2
    axes.imshow(picture, extent=(x, x + across, y + down, y))
    gap = 0.015 * width
    axes.add_patch(Rectangle((x - gap, y - gap), across + 2 * gap, down + 2 * gap, fill=False, **frame))


def _finish_tiles(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.05, -0.05), aspect="equal")
    axes.set_axis_off()


def _pixels(image: Any, name: str) -> Any:
    """An image as an array `[H, W, 3]` (or 4) that matplotlib draws as it is."""
    pixels: Any
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        pixels = (values.float() if values.is_floating_point() else values).numpy()
        if pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
    else:
        if getattr(image, "mode", "L") in PIL_MODES:
            is_clear = image.mode in ("LA", "PA") or "transparency" in image.info
            image = image.convert("RGBA" if is_clear else "RGB")
        pixels = np.asarray(image)
    if pixels.dtype.kind in "USO":
        raise TypeError(f"{name}: expected a picture, as PIL.Image.open(path) returns it, got {type(image).__name__}")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1):
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or 0 in pixels.shape:
        expected = "a tensor [H, W], [1, H, W] or [3, H, W], or an array [H, W] or [H, W, 3]"
        raise ValueError(f"{name}: expected {expected}, got shape {list(getattr(image, 'shape', pixels.shape))}")
    if pixels.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected an image of numbers, got dtype {pixels.dtype}")
    low, high = pixels.min(), pixels.max()
    top = 1 if pixels.dtype.kind == "f" else 255
    if not (low >= 0 and high <= top):
        hint = "; undo the normalisation first" if top == 1 else ""
        raise ValueError(f"{name}: expected values in [0, {top}] of {pixels.dtype}, got {low:.3g} to {high:.3g}{hint}")
    return pixels if top == 1 else pixels.astype(np.uint8)
