"""The matches behind a score, and the pictures of matches, neighbours, rankings and CMC curves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from inputs import DEVICE, H, S, W, make_matcher, maps, visibility
from tolerances import assert_close
from torch import Tensor

from qaconv_triton import QAConv, reference
from qaconv_triton.evaluation import ReIDMetrics
from qaconv_triton.matches import strongest_matches

matplotlib = pytest.importorskip("matplotlib")

import numpy as np  # noqa: E402
from matplotlib.collections import LineCollection, PathCollection  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from qaconv_triton import plots  # noqa: E402

TALL, WIDE = torch.rand(3, 40, 20), torch.randint(256, (1, 30, 50), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def pair(dtype: torch.dtype = torch.float64) -> tuple[QAConv, Tensor, Tensor]:
    """A matcher, and two maps that have matches of both kinds."""
    probe, gallery = maps(1, 1, dtype)[0], maps(1, 2, dtype)[0]
    gallery[:, :, 1:] = probe[:, :, :-1]
    return make_matcher(dtype, "eval"), probe, gallery


@pytest.mark.parametrize("occluded", [False, True])
def test_contributions_are_what_matches_add_to_the_score(occluded: bool) -> None:
    matcher, probe, gallery = pair()
    occ = (visibility(1, 3)[0].double(), visibility(1, 4)[0].double()) if occluded else (None, None)
    found = strongest_matches(matcher.train(), probe, gallery, probe_occ=occ[0], gallery_occ=occ[1])
    matches = matcher.correspondences(
        probe[None], gallery[None], *(None if each is None else each[None] for each in occ)
    )
    b_location, similarity_a, a_location, similarity_b = (part.flatten() for part in matches)
    pooled = torch.cat([similarity_a, similarity_b]).requires_grad_()
    matcher.eval()
    score = reference.pair_scores(pooled.unsqueeze(0), matcher.bn, matcher.fc, matcher.logit_bn).sum()
    (weight,) = torch.autograd.grad(score, pooled)  # a score is linear in the pooled values
    expected: dict[tuple[int, int], tuple[float, float, bool, bool]] = {}
    for i in range(2 * S):
        place = (i, int(b_location[i])) if i < S else (int(a_location[i - S]), i - S)
        added, _, of_probe, of_gallery = expected.get(place, (0.0, 0.0, False, False))
        added += float(weight[i] * pooled[i].detach())
        expected[place] = added, float(pooled[i].detach()), of_probe or i < S, of_gallery or i >= S
    rows = zip(*(part.tolist() for part in found), strict=True)
    got = {(s, r): tuple(rest) for s, r, *rest in rows}
    assert got.keys() == expected.keys()
    assert len(got) < 2 * S  # some are best both ways
    for place, true in expected.items():
        assert got[place][:2] == pytest.approx(true[:2], abs=1e-9)
        assert got[place][2:] == true[2:]
    assert (found.contribution.diff() <= 0).all()


def test_nan_comes_last() -> None:
    matcher, probe, gallery = pair(torch.float32)
    probe[:, 0, 0] = torch.nan
    found = strongest_matches(matcher, probe, gallery)
    is_nan = found.contribution.isnan()
    assert is_nan.any()
    assert not is_nan[: int((~is_nan).sum())].any()
    assert (found.contribution[~is_nan].diff() <= 0).all()
    (axes,) = plots.plot_matches(matcher, probe, gallery, TALL, TALL, count=S).axes
    widths = [width for lines in axes.collections for width in lines.get_linewidths() if len(lines.get_paths())]
    assert np.isfinite(widths).all()
    assert max(widths) > 0


def test_the_strongest_of_some_locations() -> None:
    matcher, probe, gallery = pair()
    every = strongest_matches(matcher, probe, gallery)
    where = torch.zeros(H, W, dtype=torch.bool, device=DEVICE)
    where[1, :2] = True
    some = strongest_matches(matcher, probe, gallery, 2, where=where)
    inside = (every.probe_location == W) | (every.probe_location == W + 1)
    for got, true in zip(some, every, strict=True):
        assert torch.equal(got, true[inside][:2])


def test_lines_are_the_matches() -> None:
    matcher, probe, gallery = pair()
    figure = plots.plot_matches(matcher, probe, gallery, TALL, WIDE, count=50)
    (axes,) = figure.axes
    score = matcher.match_pairs(probe[None], gallery[None]).item()
    assert axes.get_title() == f"score {score:.2f}"
    meanings = [text.get_text() for text in axes.get_legend().get_texts()]
    assert meanings == ["each is the other's best match", "best match of the end with the dot"]
    left, right = (image.get_extent() for image in axes.images)
    assert (left[1] - left[0]) / (left[2] - left[3]) == pytest.approx(20 / 40)
    assert (right[1] - right[0]) / (right[2] - right[3]) == pytest.approx(50 / 30)

    def cell(place: int, extent: tuple[float, ...]) -> tuple[float, float]:
        x, y = (place % W + 0.5) / W, (place // W + 0.5) / H
        return extent[0] + x * (extent[1] - extent[0]), extent[3] + y * (extent[2] - extent[3])

    found = strongest_matches(matcher, probe, gallery)
    expected = {}
    for s, r, added, _, of_probe, of_gallery in zip(*(part.tolist() for part in found), strict=True):
        if added > 0:
            line = tuple(np.round([*cell(s, left), *cell(r, right)], 6))
            expected[line] = (of_probe and of_gallery, added / found.contribution.max().item())
    drawn = {}
    collections = [each for each in axes.collections if isinstance(each, LineCollection)]
    for each in collections:
        color = to_hex(each.get_edgecolor()[0]).upper()
        if color != "#FFFFFF":
            is_mutual, dashes = color == plots.BLUE, each.get_linestyle()[0][1]
            assert is_mutual == (dashes is None)
            for segment, width in zip(each.get_segments(), each.get_linewidth(), strict=True):
                drawn[tuple(np.round(segment.flatten(), 6))] = is_mutual, width / plots.WIDEST
    assert drawn.keys() == expected.keys()
    assert {is_mutual for is_mutual, _ in drawn.values()} == {True, False}
    for line, (is_mutual, share) in expected.items():
        assert drawn[line] == (is_mutual, pytest.approx(share))
    dots = sum(len(each.get_offsets()) for each in axes.collections if isinstance(each, PathCollection))
    assert dots == sum(1 + is_mutual for is_mutual, _ in drawn.values())


def test_a_legend_explains_what_is_drawn_and_stands_inside_the_figure() -> None:
    matcher, probe, _ = pair(torch.float32)
    (axes,) = plots.plot_matches(matcher, probe, probe, TALL, TALL).axes  # each location matches itself
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["each is the other's best match"]
    nothing = torch.zeros(H, W, dtype=torch.bool, device=DEVICE)
    assert plots.plot_matches(matcher, probe, probe, TALL, TALL, where=nothing).axes[0].get_legend() is None
    for picture, layout in ((TALL, None), (WIDE, None), (TALL, "constrained"), (TALL, "tight")):
        figure = Figure(figsize=(9, 4), layout=layout)
        axes = figure.subplots(1, 2)[0]
        plots.plot_matches(*pair(torch.float32), picture, picture, axes=axes)
        figure.draw_without_rendering()
        box = axes.get_legend().get_window_extent()
        assert box.y0 >= 0, layout
        lowest = min(image.get_window_extent().y0 for image in axes.images)
        assert box.y1 <= lowest + 2, layout


def test_occluded_locations_are_shaded_and_have_no_lines() -> None:
    matcher, probe, gallery = pair(torch.float32)
    occ = torch.ones(1, H, W, device=DEVICE)
    occ[0, 0] = 0
    axes = Figure().subplots()
    figure = plots.plot_matches(matcher, probe, gallery, TALL, TALL, probe_occ=occ, axes=axes, legend=False)
    assert axes.get_figure() is figure
    assert axes.get_legend() is None
    shade = axes.images[1].get_array()
    assert (shade[0, :, 3] > 0).all()
    assert (shade[1:, :, 3] == 0).all()
    starts = [
        segment[0, 1]
        for each in axes.collections
        if isinstance(each, LineCollection)
        for segment in each.get_segments()
    ]
    assert starts
    assert min(starts) > 1 / H


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_neighbors_stand_beside_their_class() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 4)
    neighbors, names = torch.tensor([[1, 2, 3], [0, 4, 2], [1, 0, 4], [2, 4, 0], [3, 1, 2]]), list("abcde")
    similarities = torch.linspace(0.9, 0.1, 15).view(5, 3)
    options = {"classes": [3, 1], "similarities": similarities, "names": names, "count": 2}
    figure = plots.plot_neighbors(neighbors, images, **options)
    shown = [int(image.get_array()[0, 0, 0]) for image in figure.axes[0].images]
    assert shown == [3, 2, 4, 1, 0, 4]
    extents = [image.get_extent() for image in figure.axes[0].images]
    assert [extent[0] for extent in extents[:3]] == sorted({extent[0] for extent in extents})
    assert texts(figure) == ["d", "c", "0.386", "e", "0.329", "b", "a", "0.729", "e", "0.671"]
    assert texts(plots.plot_neighbors(neighbors, classes=[4])) == ["4", "3", "1", "2"]


def test_wide_names_lose_their_middle() -> None:
    neighbors, names = torch.tensor([[1], [0]]), ["0002_c1s1_000451_03", "WWWWWWWWWWWWWW"]
    for axes in (None, Figure(figsize=(3, 3)).subplots()):
        figure = plots.plot_neighbors(neighbors, names=names, axes=axes)
        figure.draw_without_rendering()
        (drawn,) = figure.axes
        (start, _), (end, _) = drawn.transData.transform([(0, 0), (1, 0)])  # of a column, 1 wide without pictures
        for text, name in zip(drawn.texts[:2], names, strict=True):
            width = text.get_window_extent().width
            assert 0.7 * (end - start) < width < 1.1 * (end - start)  # the next stands 1.12 to the right
            first, last = text.get_text().split("…")
            assert name.startswith(first)
            assert name.endswith(last)
            assert len(first) - len(last) in (0, 1)
    assert texts(plots.plot_neighbors(neighbors, names=["person 12", "Bob"]))[:2] == ["person 12", "Bob"]


def test_a_long_text_is_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = plots.text_to_path.get_text_width_height_descent

    def counting(text: str, *options: Any, **keywords: Any) -> Any:
        measured.append(text)
        return measure(text, *options, **keywords)

    monkeypatch.setattr(plots.text_to_path, "get_text_width_height_descent", counting)
    plots.plot_neighbors(torch.tensor([[1], [0]]), names=["W" * 1000, "V" * 1000])
    assert 0 < len(measured) <= 4 * 12  # of four names; 2 ** 10 is more than 1000
    measured.clear()
    axes = plots.plot_ranking(TALL, [TALL], [True], title="an image " * 100).axes[0]
    assert 0 < len(measured) <= 200
    assert " ".join(axes.get_title().split()) == " ".join(["an image"] * 100)


def test_titles_stay_within_axes_that_are_given() -> None:
    figure = Figure(figsize=(5, 4), layout="constrained")
    for axes in figure.subplots(1, 3):
        title = "query 0002_c1s1_000451.jpg\n\nof camera 1"
        plots.plot_ranking(TALL, [TALL] * 2, [True, False], title=title, axes=axes)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(first.x1 < second.x0 for first, second in pairwise(boxes))
    assert boxes[0].x0 >= 0
    assert boxes[-1].x1 <= figure.bbox.x1
    assert all(axes.get_title().endswith("\n\nof camera 1") for axes in figure.axes)


def test_right_and_wrong_differ_without_colours() -> None:
    gallery, is_match = torch.rand(4, 3, 40, 20), torch.tensor([True, False, False, True])
    figure = plots.plot_ranking(TALL, gallery, is_match, scores=torch.tensor([3.0, 2.5, 1.0, -2.0]), title="query 7")
    (axes,) = figure.axes
    frames = [(to_hex(patch.get_edgecolor()).upper(), patch.get_linestyle() == "-") for patch in axes.patches]
    right, wrong = (plots.BLUE, True), (plots.VERMILLION, False)
    assert frames[1:] == [right, wrong, wrong, right]
    assert texts(figure) == ["query", "1 ✓", "3.00", "2 ✗", "2.50", "3 ✗", "1.00", "4 ✓", "-2.00"]
    assert axes.get_title() == "query 7"


def test_a_row_of_a_ranking_has_ten_pictures_and_scores_that_differ() -> None:
    scores = torch.linspace(0.7031, 0.7004, 25)
    figure = plots.plot_ranking(TALL, [TALL] * 25, [True] * 25, scores=scores)
    corners = [(image.get_extent()[0], image.get_extent()[3]) for image in figure.axes[0].images[1:]]
    assert [len({y for x, y in corners if x == left}) for left in sorted({x for x, _ in corners})] == [3] * 5 + [2] * 5
    assert corners == sorted(corners, key=lambda corner: (corner[1], corner[0]))
    assert len({text for text in texts(figure) if text.startswith("0.70")}) == 25


def test_curves_differ_without_colours() -> None:
    curves = {name: torch.linspace(start, 1.0, 30) for name, start in (("a", 0.5), ("b", 0.25), ("c", 0.1))}
    (axes,) = plots.plot_cmc(curves, ranks=10).axes
    for line, curve in zip(axes.lines, curves.values(), strict=True):
        assert line.get_xdata().tolist() == list(range(1, 11))
        assert_close(torch.as_tensor(line.get_ydata()), curve[:10], torch.float32)
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 3
    many = plots.plot_cmc({str(i): curves["a"] for i in range(12)}).axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in many}) == 12
    assert len({(line.get_linestyle(), line.get_color()) for line in many}) == 12
    assert axes.get_legend().get_texts()[0].get_text() == "a, rank-1 0.500"
    assert plots.plot_cmc(curves["a"]).axes[0].get_legend() is None
    assert plots.plot_cmc(curves["a"]).axes[0].get_title() == "CMC, rank-1 0.500"
    for ranks, ticks in ((1, [1]), (3, [1, 2, 3]), (20, [1, 5, 10, 15, 20]), (50, [1, 10, 20, 30, 40, 50])):
        axes = plots.plot_cmc(torch.linspace(0.5, 1.0, 50), ranks=ranks).axes[0]
        assert axes.get_xticks().tolist() == ticks
        assert 0 < axes.get_xlim()[0] < 1
        assert ranks < axes.get_xlim()[1] < 1.1 * ranks + 1
    metrics = ReIDMetrics(0.5, 0.25, curves["a"], 4)
    for given in (metrics, {"a": metrics}):
        (line,) = plots.plot_cmc(given).axes[0].lines
        assert_close(torch.as_tensor(line.get_ydata()), curves["a"][:20], torch.float32)


def figures() -> dict[str, Figure]:
    matcher, probe, gallery = pair(torch.float32)
    neighbors = torch.tensor([[1, 2], [0, 2], [1, 0]])
    square, tall = torch.rand(11, 3, 24, 24), torch.rand(11, 3, 64, 24)
    scores, right = torch.linspace(-12.5, 12.5, 10), [True, False] * 5
    similar = torch.rand(3, 2)
    return {
        "matches": plots.plot_matches(matcher, probe, gallery, TALL, TALL),
        "wide matches": plots.plot_matches(matcher, probe, gallery, WIDE, WIDE),
        "panoramas": plots.plot_matches(matcher, probe, gallery, torch.rand(20, 80), torch.rand(20, 80)),
        "ranking": plots.plot_ranking(square[0], square[1:], right, scores=scores, title="query 1"),
        "tall ranking": plots.plot_ranking(tall[0], tall[1:], right, scores=scores),
        "neighbors": plots.plot_neighbors(neighbors, square, similarities=similar, names=["U+1234"] * 3),
        "names": plots.plot_neighbors(neighbors, similarities=similar, names=["person 12"] * 3),
        "long names": plots.plot_neighbors(neighbors, similarities=similar, names=["WWWWWWWWWWWWWWWWW W"] * 3),
        "names of files": plots.plot_neighbors(neighbors, tall, names=["0002_c1s1_000451_03"] * 3),
        "long title": plots.plot_ranking(tall[0], tall[1:3], right[:2], title="query 0002_c1s1_000451_03.jpg " * 3),
        "rows": plots.plot_ranking(tall[0], [*tall[1:], *tall[1:], *tall[:3]], [True] * 23, scores=torch.rand(23)),
        "cmc": plots.plot_cmc({"QAConv": torch.rand(20), "cosine": torch.rand(20)}),
        "curves": plots.plot_cmc({f"QAConv {i}": torch.rand(20) for i in range(6)}),
        "long curves": plots.plot_cmc({f"QAConv, {i} " + "of the nearest " * 6: torch.rand(20) for i in range(2)}),
    }


def test_a_legend_covers_no_curve() -> None:
    (axes,) = plots.plot_cmc({str(i): torch.linspace(i / 10, 0.5 + i / 12, 50) for i in range(6)}, ranks=50).axes
    axes.figure.draw_without_rendering()
    assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
    figure = Figure(figsize=(8, 4))
    for axes, word in zip(figure.subplots(1, 2), ("", "of the nearest " * 6), strict=True):
        plots.plot_cmc({f"{word}{i}": torch.linspace(i / 10, 0.5 + i / 12, 50) for i in range(4)}, axes=axes)
        figure.draw_without_rendering()
        legend, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert inside.x0 < legend.x0 < legend.x1 < inside.x1
        assert inside.y0 < legend.y0
        lowest = min(line.get_ydata().min() for line in axes.lines)
        assert legend.y1 < axes.transData.transform((1, lowest))[1]


def test_no_share_is_marked_above_1_or_below_0() -> None:
    for curve in (torch.ones(20), torch.linspace(0, 1, 20), torch.linspace(0.97, 1, 20)):
        for axes in (None, Figure().subplots()):
            ticks = plots.plot_cmc({"a": curve}, axes=axes).axes[0].get_yticks()
            assert len(ticks) > 2
            assert min(ticks) >= 0
            assert max(ticks) <= 1 + 1e-9


def test_labels_are_inside_and_do_not_overlap() -> None:
    for name, figure in figures().items():
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend()
        shown = [axes.title, *axes.texts, *([] if legend is None else [legend.get_title(), *legend.get_texts()])]
        boxes = [(text.get_text(), text.get_window_extent()) for text in shown if text.get_text()]
        assert boxes, name
        for text, box in boxes:
            whole = figure.bbox
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, (name, text)  # noqa: PT018
        for (one, first), (other, second) in combinations(boxes, 2):
            assert not first.overlaps(second), (name, one, other)
        size = figure.get_size_inches()
        assert min(size) >= 1.5, name
        assert max(size) <= 12, name


def test_nothing_is_shown_or_kept_by_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as pyplot

    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("a window opens"))
    before, backend = pyplot.get_fignums(), matplotlib.get_backend(auto_select=False)
    assert all(figure.canvas.manager is None for figure in figures().values())
    assert pyplot.get_fignums() == before
    assert matplotlib.get_backend(auto_select=False) == backend


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.rand(3, 8, 8) * 2 - 1, ValueError, r"query: expected values in \[0, 1\] .*undo the normalisation"),
        (torch.full((8, 8), 300), ValueError, r"query: expected values in \[0, 255\] of int64, got 300 to 300"),
        (torch.full((8, 8), torch.nan), ValueError, "query: expected values"),
        (torch.rand(2, 8, 8), ValueError, r"query: .*got shape \[2, 8, 8\]"),
        (torch.rand(1, 3, 8, 8), ValueError, r"got shape \[1, 3, 8, 8\]"),
        (np.zeros((8, 8), complex), TypeError, "got dtype complex128"),
        ("a.jpg", TypeError, r"query: expected a picture, as PIL\.Image\.open\(path\) returns it, got str"),
    ],
)
def test_images_of_another_kind_are_refused(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plots.plot_ranking(image, [], [])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "bool"])
def test_pictures_of_every_mode_are_drawn_as_they_look(mode: str) -> None:
    from PIL import Image

    given: Any = torch.tensor([[True, False]])
    if mode != "bool":
        picture = Image.new("RGB", (2, 1))
        picture.putpixel((0, 0), (255, 255, 255))
        given = picture.convert(mode)
    drawn = plots.plot_ranking(given, [], []).axes[0].images[0].get_array()
    assert drawn[0, :, :3].tolist() == [[255, 255, 255], [0, 0, 0]]
    assert drawn.shape[2] == (4 if mode in ("LA", "RGBA") else 3)


def test_bad_input_is_refused() -> None:
    matcher, probe, gallery = pair(torch.float32)
    with pytest.raises(ValueError, match=r"probe: expected one feature map \[C, H, W\], got shape \[1, 5, 2, 3\]"):
        strongest_matches(matcher, probe[None], gallery)
    with pytest.raises(ValueError, match=r"where: expected a bool tensor \[2, 3\]"):
        strongest_matches(matcher, probe, gallery, where=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"where: expected a bool tensor \[2, 3\] .*, got list"):
        strongest_matches(matcher, probe, gallery, where=[[True] * 3] * 2)
    with pytest.raises(TypeError, match=r"gallery_occ: expected a tensor .*, got float"):
        strongest_matches(matcher, probe, gallery, gallery_occ=0.5)
    with pytest.raises(ValueError, match=r"probe_occ: expected shape \[1, 1, 2, 3\]"):
        strongest_matches(matcher, probe, gallery, probe_occ=torch.ones(1, 3, 2, device=DEVICE))
    with pytest.raises(TypeError, match="matcher: expected a QAConv, got Linear"):
        strongest_matches(torch.nn.Linear(2, 2), probe, gallery)
    with pytest.raises(ValueError, match="count must be at least 1"):
        strongest_matches(matcher, probe, gallery, 0)
    matcher.bn = torch.nn.BatchNorm1d(1, track_running_stats=False, device=DEVICE)
    with pytest.raises(ValueError, match="expected batch norms with running statistics"):
        strongest_matches(matcher, probe, gallery)
    with pytest.raises(ValueError, match="equal lengths, got 2, 3"):
        plots.plot_ranking(TALL, [TALL, TALL], [True, True, False])
    with pytest.raises(ValueError, match=r"neighbors: expected a class graph \[N, K\], got \[4\]"):
        plots.plot_neighbors(torch.arange(4))
    with pytest.raises(IndexError, match=r"classes: expected values in \[0, 2\), got \[2\]"):
        plots.plot_neighbors(torch.tensor([[1], [0]]), classes=[0, 2])
    with pytest.raises(ValueError, match=r"got NoneType; matcher\.class_neighbors is None until .*compute_class_neigh"):
        plots.plot_neighbors(None)
    for name, few in (("images", [TALL]), ("images", TALL[:1]), ("names", "a"), ("names", {0: "a"})):
        with pytest.raises(IndexError, match=rf"{name}: expected one of each class, got 1, none of class 1"):
            plots.plot_neighbors(torch.tensor([[1], [0]]), **{name: few})
    with pytest.raises(ValueError, match=r"similarities: expected \[2, 1\]"):
        plots.plot_neighbors(torch.tensor([[1], [0]]), similarities=torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"cmc: expected curves \[ranks\], got shape \[2, 3\] of 'a'"):
        plots.plot_cmc({"a": torch.rand(2, 3)})
    for curves in ([0.5, 0.6], {"": [0.5, 0.6]}):
        with pytest.raises(TypeError, match=r"cmc: expected ReIDMetrics or a tensor \[ranks\], got list of ''"):
            plots.plot_cmc(curves)
