"""The HTML report of an evaluation: what it says, and how a browser shows it on a phone, in dark mode, by keyboard."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import EXECUTABLE, Page, open_page
from inputs import C, H, W, make_matcher, maps, torch_default, visibility

from qaconv_triton import QAConv
from qaconv_triton import report as report_module
from qaconv_triton.evaluation import (
    Features,
    query_metrics,
    rank_gallery,
    reid_metrics,
    save_features,
)
from qaconv_triton.matches import score_decimals, strongest_matches
from qaconv_triton.report import load_matcher, main, write_report

Image = pytest.importorskip("PIL.Image")

CPU = torch.device("cpu")
TITLE = "Street & <b>yard</b>"
QUERY_IDS, QUERY_CAMERAS = torch.tensor([0, 1, 2, 3, 9]), torch.tensor([0, 0, 1, 1, 0])
GALLERY_IDS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, -1, -1, 4, 4])
GALLERY_CAMERAS = torch.tensor([0, 1] * 6)


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features with pictures, of which one is missing, and a matcher's checkpoint."""
    folder = tmp_path_factory.mktemp("store")
    for name, ids, cameras, seed in (
        ("query", QUERY_IDS, QUERY_CAMERAS, 1), ("gallery", GALLERY_IDS, GALLERY_CAMERAS, 2),
    ):  # fmt: skip
        paths = [f"{name} {i} é&.png" for i in range(len(ids))]
        for i, path in enumerate(paths):
            if (name, i) != ("gallery", 4):
                Image.new("RGB", (40, 80) if i else (300, 600), (20 * i, 90, 160)).save(folder / path)
        features = maps(len(ids), seed, shape=(C, H, W)).cpu()
        occ = visibility(len(ids), 3).cpu() if name == "query" else None
        file = folder / f"{name}.safetensors"
        save_features(file, features, ids, cameras, occ=occ, paths=paths, dtype=torch.float32)
    torch.save({"criterion": {f"matcher.{k}": v for k, v in matcher().state_dict().items()}}, folder / "last.pt")
    return folder


def matcher() -> QAConv:
    return make_matcher(device=CPU)


def command(store: Path, output: Path, *options: str) -> list[str]:
    files = [str(store / "query.safetensors"), str(store / "gallery.safetensors"), "--matcher", str(store / "last.pt")]
    return [*files, "--output", str(output), "--images", str(store), "--title", TITLE, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def report(store: Path) -> Path:
    main(command(store, store / "report.html"))
    return store / "report.html"


def features(store: Path | None = None) -> tuple[Features, Features]:
    names = [[f"{name} {i} é&.png" for i in range(count)] for name, count in (("query", 5), ("gallery", 12))]
    paths = [None, None] if store is None else [[str(store / each) for each in some] for some in names]
    first, second = maps(5, 1, shape=(C, H, W)).cpu(), maps(12, 2, shape=(C, H, W)).cpu()
    return (
        Features(first, QUERY_IDS, QUERY_CAMERAS, visibility(5, 3).cpu(), paths[0]),
        Features(second, GALLERY_IDS, GALLERY_CAMERAS, None, paths[1]),
    )


def test_metrics_and_worst_queries_are_those_of_the_evaluation(report: Path) -> None:
    query, gallery = features()
    scores, indices = rank_gallery(matcher(), query.maps, gallery.maps, 12, query_occ=query.occ)
    known = (QUERY_IDS, GALLERY_IDS, QUERY_CAMERAS, GALLERY_CAMERAS)
    metrics, of_queries = reid_metrics(indices, *known), query_metrics(indices, *known)
    page = report.read_text(encoding="utf-8")
    shown = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page))
    assert shown == {name: f"{100 * value:.1f}\u00a0%" for name, value in metrics.to_dict().items()}
    curve = re.findall(r"<tr><th scope='row'>\d+</th><td>([^<]+)</td>", page)
    assert curve == [f"{100 * value:.1f}\u00a0%" for value in metrics.cmc.tolist()]
    assert "Queries without a true match in the gallery, which do not count: 1." in page
    precision = of_queries.average_precision
    worst = sorted((row for row in range(4)), key=lambda row: (precision[row].item(), -of_queries.first_match[row]))
    summaries = re.findall(
        r"<summary>Query (\d+) .*?AP ([\d.]+)\u00a0%, first true match at rank (\d+)</summary>", page
    )
    assert summaries == [
        (str(row), f"{100 * precision[row]:.1f}", f"{int(of_queries.first_match[row])}") for row in worst
    ]
    captions = re.findall(
        r"<strong>(\d+) . (right|wrong)</strong> identity (-?\d+), camera (\d), score ([-\d.]+)"
        r"<br>row (\d+), ([^<]+)<",
        page,
    )
    expected, later = [], 0
    for row in worst:
        places = []
        for place, item in enumerate(indices[row].tolist()):
            same = GALLERY_IDS[item] == QUERY_IDS[row]
            if GALLERY_IDS[item] != -1 and not (same and GALLERY_CAMERAS[item] == QUERY_CAMERAS[row]):
                places.append((bool(same), item, scores[row, place].item()))
        decimals = score_decimals([score for _, _, score in places[:5]])
        for rank, (same, item, score) in enumerate(places[:5], start=1):
            identity, camera = int(GALLERY_IDS[item]), int(GALLERY_CAMERAS[item])
            word = "right" if same else "wrong"
            origin = str(item), f"gallery {item} é&amp;.png"
            expected.append((str(rank), word, str(identity), str(camera), f"{score:.{decimals}f}", *origin))
        rank, (_, item, score) = next((i, place) for i, place in enumerate(places, start=1) if place[0])
        if rank > 1:
            later += 1
            what = f"First true match, rank {rank}: score {score:.{decimals}f}, identity {int(GALLERY_IDS[item])}, "
            assert f"{what}camera {int(GALLERY_CAMERAS[item])}, row {item}, gallery {item} é&amp;.png<" in page
    assert later
    assert captions == expected


def test_a_page_says_when_and_what_it_was_made_from(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "_now", lambda: datetime(2031, 2, 3, 4, 5, 59, tzinfo=UTC))
    main(command(store, tmp_path / "report.html"))
    files = f"{store / 'query.safetensors'}, {store / 'gallery.safetensors'} and {store / 'last.pt'}"
    assert f"<p>Made 2031-02-03 04:05 UTC from {files}.</p>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    write_report(tmp_path / "report.html", matcher(), *features())
    assert "<p>Made 2031-02-03 04:05 UTC.</p>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_lines_are_the_strongest_matches(tmp_path: Path) -> None:
    query, gallery = features()
    write_report(tmp_path / "report.html", matcher(), query, gallery, worst=1, top=1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = int(re.findall(r"Query (\d)", page)[0])
    (first, *_) = [
        item
        for item in rank_gallery(matcher(), query.maps, gallery.maps, 12, query_occ=query.occ)[1][row].tolist()
        if GALLERY_IDS[item] != -1
        and (GALLERY_IDS[item] != QUERY_IDS[row] or GALLERY_CAMERAS[item] != QUERY_CAMERAS[row])
    ]
    found = strongest_matches(matcher(), query.maps[row], gallery.maps[first], 16, probe_occ=query.occ[row])
    drawing = re.findall(r"<svg viewBox=.-2.*?</svg>", page)[0]
    widths = [float(width) for width in re.findall(r'class="(?:both|one)" stroke-width="([\d.]+)"', drawing)]
    added = found.contribution[found.contribution > 0]
    assert widths == pytest.approx((3.2 * added / added.max()).tolist(), abs=0.006)
    assert drawing.count('class="both" stroke') == int((found.of_probe & found.of_gallery)[: len(added)].sum())
    assert drawing.count('class="occluded"') == int((query.occ[row] < 1).sum())


def test_nan_in_a_map_is_drawn_nowhere(tmp_path: Path) -> None:
    query, gallery = features()
    query.maps[:, :, 0, 0] = torch.nan
    write_report(tmp_path / "report.html", matcher(), query, gallery, worst=1, top=1)
    drawings = re.findall(r"<(?:line|rect|circle)[^>]+>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not [each for each in drawings if "nan" in each]
    assert [each for each in drawings if 'class="halo"' in each]


def test_queries_of_nan_are_told(tmp_path: Path) -> None:
    query, gallery = features()
    write_report(tmp_path / "report.html", matcher(), query, gallery)
    assert "NaN" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    query.maps[[1, 3]] = torch.nan
    write_report(tmp_path / "report.html", matcher(), query, gallery)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Queries whose scores are all NaN, because of NaN or Inf in maps: 2, query 1 first." in page


def test_without_a_countable_query_there_is_no_table_and_no_legend(tmp_path: Path) -> None:
    query, gallery = features()
    write_report(tmp_path / "report.html", matcher(), query._replace(ids=[99] * 5), gallery)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("No query has a true match in the gallery.") == 2
    assert not [tag for tag in ("table", "details", "svg") if Parsed(page).all(tag)]
    assert "dashed</span>" not in page


def test_the_page_is_whole_and_escaped(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    parsed = Parsed(page)
    links = [value for _, found in parsed.elements for name, value in found.items() if name in ("href", "src")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links if link is not None)
    assert not re.search(r"https?:|@import|url\(|<script", page)
    names = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(set(names)) == len(names)
    assert {f"#{name}" for name in names} >= {link for link in links if link is not None and link.startswith("#")}
    assert all(found["aria-labelledby"] in names for found in parsed.all("section"))
    assert all(found.get("alt") for found in parsed.all("img"))
    assert all(found.get("aria-label") for found in parsed.all("svg", role="img"))
    assert parsed.all("html") == [{"lang": "en"}]
    assert [len(parsed.all(tag)) for tag in ("h1", "main", "details")] == [1, 1, 1 + 4]
    assert TITLE in parsed.texts  # as letters, not as an element
    assert not parsed.all("b")
    assert any("query 0 é&.png" in text for text in parsed.texts)


def test_pictures_are_small_and_a_missing_one_is_told(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query, gallery = features(store)
    with caplog.at_level(logging.WARNING, logger="qaconv_triton.report"):
        write_report(tmp_path / "report.html", matcher(), query, gallery, top=12)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Pictures that could not be read: 1, such as" in page
    assert "gallery 4" in caplog.text
    assert page.count(">no picture</div>") >= 1
    assert max(len(uri) for uri in re.findall(r'(?:src|href)="(data:image[^"]+)"', page)) < 20_000


def test_drawings_of_wide_pictures_are_not_wider_than_others(tmp_path: Path) -> None:
    query, gallery = features()
    Image.new("RGB", (256, 64)).save(tmp_path / "wide.png")
    wide = query._replace(paths=["wide.png"] * 5), gallery._replace(paths=["wide.png"] * 12)
    write_report(tmp_path / "report.html", matcher(), *wide, images=tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<svg viewBox="-2 -2 ([^"]+)"', page)) == {"484.0 69.0"}
    assert set(re.findall(r'<image x="[^"]+" y="[^"]+" (width="[^"]+" height="[^"]+")', page)) == {
        'width="200.0" height="50.0"'
    }


def test_without_paths_there_are_no_pictures(tmp_path: Path) -> None:
    query, gallery = features()
    ranking = rank_gallery(matcher(), query.maps, gallery.maps, 3)
    options = {"ranking": ranking, "worst": 2}
    without = [features._replace(cameras=None) for features in (query, gallery)]
    metrics = write_report(tmp_path / "report.html", matcher(), *without, **options)
    assert metrics.mAP == reid_metrics(ranking[1], QUERY_IDS, GALLERY_IDS).mAP
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not Parsed(page).all("img")
    assert "A list has the best 3 of 12 gallery images." in page
    assert "Cameras are not known" in page
    with pytest.raises(ValueError, match="worst must be at least 1"):
        write_report(tmp_path / "report.html", matcher(), query, gallery, worst=0)


def test_a_report_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (query, gallery) = tmp_path / "report.html", features()
    write_report(path, matcher(), query._replace(paths=["a \udcff.jpg"] * 5), gallery)  # not every name is UTF-8
    before = path.read_bytes()
    assert b"a \\udcff.jpg" in before
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail("no space left"))
    with pytest.raises(pytest.fail.Exception, match="no space left"):
        write_report(path, matcher(), query, gallery, top=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(IsADirectoryError, match="expected the path of a file, got a folder"):
        write_report(tmp_path, matcher(), query, gallery)


def test_features_and_rankings_of_ones_own_may_be_arrays_and_lists(store: Path, tmp_path: Path) -> None:
    query, gallery = features()
    ranking = rank_gallery(matcher(), query.maps, gallery.maps, 4, query_occ=query.occ)
    expected = write_report(tmp_path / "tensors.html", matcher(), query, gallery, ranking=ranking)
    own = [
        Features(
            each.maps.numpy(),
            each.ids.numpy(),
            each.cameras.tolist(),
            None if each.occ is None else each.occ.numpy(),
            None,
        )
        for each in (query, gallery)
    ]
    ranking = tuple(part.numpy() for part in ranking)
    with torch_default("meta"):
        saved = load_matcher(store / "last.pt", C, H, W)
        metrics = write_report(tmp_path / "arrays.html", saved, *own, ranking=ranking)
    assert metrics[:2] == expected[:2]
    pages = [(tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("tensors", "arrays")]
    assert len({re.sub("Made .* UTC", "", page) for page in pages}) == 1
    padded = ranking[0], np.where(np.arange(4) < 3, ranking[1], -1)
    write_report(tmp_path / "padded.html", matcher(), *own, ranking=padded, top=4)


def test_lists_are_bounded_where_k_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "LIST_BYTES", 12 * 5 * 7)
    metrics = write_report(tmp_path / "report.html", matcher(), *features())
    assert len(metrics.cmc) == 7
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A list has the best 7 of 12 gallery images." in page
    assert "mAP and mINP are lower bounds of those of full lists, and so is Rank-r for r above" in page


def test_a_short_list_says_which_ranks_are_exact(tmp_path: Path) -> None:
    """Query 0 has one of its own camera first, and query 2 junk and one of its own camera, which is all of its list."""
    query, gallery = features()
    indices = torch.tensor([[0, 1, 2], [3, 4, 6], [8, 5, 9], [6, 0, 1], [8, 9, 0]])
    scores = torch.tensor([3.0, 2.0, 1.0]).expand(5, -1)
    for count, exact, empty in ((5, 0, 1), (2, 2, 0)):
        some = query._replace(
            maps=query.maps[:count], ids=QUERY_IDS[:count], cameras=QUERY_CAMERAS[:count], occ=query.occ[:count]
        )
        ranking = scores[:count], indices[:count]
        write_report(tmp_path / "report.html", matcher(), some, gallery, ranking=ranking)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert f"<p>Rank-r is exact up to r = {exact}.</p>" in page
        assert page.count("<p>All listed images are left out.</p>") == empty


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ""),
        (["--prefilter", "12"], ""),
        (["--k", "4"], "A list has the best 4 of 12 gallery images."),
        (["--prefilter", "6"], "6 gallery images of largest cosine were scored, of 12, and its list has the best 6 of"),
        (["--prefilter", "6", "--k", "4"], "cosine were scored, of 12, and its list has the best 4 of them."),
    ],
    ids=str,
)
def test_page_and_command_say_what_short_lists_are_worth(
    options: list[str], expected: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(store, tmp_path / "report.html", *options))
    figures, *said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Rank-1 [\d.]+ %, .*mINP [\d.]+ %: .*report\.html", figures)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(said) == bool(expected)
    assert expected in "".join(said)
    assert all(f"<p>{line}</p>" in page for line in said)
    assert ("lower bound" in page) == ("A list has" in expected)


SHORT = torch.zeros(5, 3)
EMPTY = Features(torch.zeros(0, C, H, W), [], [], None, None)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        (
            {"ids": QUERY_IDS[1:]},
            {},
            ValueError,
            r"query\.ids: expected shape \[5\], as query\.maps has 5, got \[4\]",
        ),
        ({"ids": ["a"] * 5}, {}, TypeError, r"query\.ids: expected integers, got list"),
        ({"cameras": [0, 1]}, {}, ValueError, r"query\.cameras: expected shape \[5\], .*, got \[2\]"),
        ({"cameras": None}, {}, ValueError, r"query\.cameras and gallery\.cameras come together, got gallery\.cameras"),
        ({"maps": torch.zeros(5, C, H, W + 1)}, {}, ValueError, r"query\.maps: expected feature maps"),
        ({"occ": torch.ones(5, 1, H)}, {}, ValueError, r"query\.occ: expected shape"),
        ({"paths": ["a.jpg"]}, {}, ValueError, r"query\.paths: expected 5, as there are ids, got 1"),
        ({"paths": [None] * 5}, {}, TypeError, r"query\.paths: .*NoneType"),
        ({}, {"ranking": (SHORT, SHORT[:, 1:].long())}, ValueError, r"ranking: .* got \[5, 3\] and \[5, 2\]"),
        ({}, {"ranking": (SHORT, SHORT)}, TypeError, r"ranking: expected an integer dtype"),
        ({}, {"ranking": 5}, TypeError, r"ranking: expected scores and indices, .* got int"),
        ({}, {"prefilter": "6"}, TypeError, "prefilter: expected an int, got str"),
        ({}, {"gallery": EMPTY}, ValueError, "gallery: expected at least k = 1 maps, got none"),
        ({}, {"matcher": None}, TypeError, r"matcher: expected a QAConv, got NoneType"),
        ({}, {"gallery": None}, TypeError, r"gallery: expected Features, got NoneType"),
    ],
    ids=str,
)
def test_bad_input_is_refused(
    changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    query, gallery = features()
    given = {"matcher": matcher(), "query": query._replace(**changes), "gallery": gallery, **options}
    with pytest.raises(error, match=message):
        write_report(tmp_path / "report.html", **given)
    assert not list(tmp_path.iterdir())


def test_pictures_need_pillow(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"need Pillow: pip install qaconv-triton\[plot\]"):
        write_report(tmp_path / "report.html", matcher(), *features(store))


def test_checkpoints_give_the_matcher_back(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    own, path = matcher(), tmp_path / "last.pt"
    first, second = maps(3, 1, shape=(C, H, W)).cpu(), maps(4, 2, shape=(C, H, W)).cpu()
    with_classes = QAConv(C, H, W, num_classes=7, k_nearest=2)
    with_classes.load_state_dict(own.state_dict(), strict=False)
    model = torch.nn.ModuleDict({"backbone": torch.nn.BatchNorm1d(3), "matcher": with_classes})
    both = {"model": model.state_dict(), "epoch": 3, "other": make_matcher(torch.float64, device=CPU).state_dict()}
    both["other"]["fc.bias"] += 1
    for saved, prefix in (
        (own.state_dict(), None), (model.state_dict(), None), ({"state_dict": model.state_dict(), "epoch": 3}, None),
        (both, "model.matcher"), (both, "matcher"), ({"state_dict": both}, "state_dict.model.matcher."),
        ({"state_dict": both}, "model.matcher"), ({"ema": {"matcher": both["other"]}, **model.state_dict()}, "matcher"),
        ({"a": own.state_dict(), "b": {"c": own.state_dict()}}, None),
    ):  # fmt: skip
        torch.save(saved, path)
        loaded = load_matcher(path, C, H, W, prefix)
        assert not loaded.training
        assert torch.equal(loaded.match(first, second), own.match(first, second))
    torch.save(both, path)
    with pytest.raises(ValueError, match=r"expected one matcher, found 'model\.matcher', 'other'; prefix says which"):
        load_matcher(path, C, H, W)
    for part in ("atcher", "model"):  # no whole name, not the end
        with pytest.raises(ValueError, match=rf"one matcher at '{part}', found none among 'model\.matcher', 'other'"):
            load_matcher(path, C, H, W, part)
    torch.save(own.state_dict(), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"one matcher at 'a', found none among the file itself; prefix says"):
        load_matcher(tmp_path / "own.pt", C, H, W, "a")
    with pytest.raises(RuntimeError, match=r"expected maps \[6, 2, 3\], got a class table \[7, 5, 2, 3\]"):
        load_matcher(path, C + 1, H, W, "model.matcher")
    save_file(own.state_dict(), tmp_path / "last.safetensors")
    loaded = load_matcher(tmp_path / "last.safetensors", C, H, W)
    assert torch.equal(loaded.match(first, second), own.match(first, second))
    shared = QAConv(C, H, W, shared_fc=True).eval()
    torch.save(shared.state_dict(), path)
    assert torch.equal(load_matcher(path, C, H, W).match(first, second), shared.match(first, second))
    with pytest.raises(RuntimeError, match="saved from a matcher of maps 2 x 3, but this one is of maps 3 x 2"):
        load_matcher(path, C, W, H)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"backbone": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"last\.pt: expected one matcher, found none"):
        load_matcher(path, C, H, W)
    torch.save(matcher(), path)
    with pytest.raises(ValueError, match=r"last\.pt: no checkpoint of tensors alone; save matcher\.state_dict\(\)"):
        load_matcher(path, C, H, W)
    for name, junk in (("last.pt", b"nothing"), ("last.pt", b""), ("last.pt", b"."), ("last.safetensors", b"no" * 99)):
        (tmp_path / name).write_bytes(junk)
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: no checkpoint"):
            load_matcher(tmp_path / name, C, H, W)
    with pytest.raises(FileNotFoundError):
        load_matcher(tmp_path / "none.safetensors", C, H, W)


def test_the_command_tells_what_is_wrong(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--k", "13"], "13"), (["--prefilter", "13"], "prefilter must be between 12 and 12 (k is 12 of 12"),
        (["--prefilter", "0"], "prefilter must be at least 1"),
        (["--prefix", "model"], "found none among 'criterion.matcher'"),
        (["--worst", "0"], "worst must be at least 1"), (["--device", "cuda:77"], "argument --device: 'cuda:77': "),
        (["--device", "gpu"], "argument --device: 'gpu': "),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            main(command(store, tmp_path / "report.html", *options))
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def page(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if EXECUTABLE is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with open_page(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(report)
        yield opened


def resize(page: Page, width: int, **media: str) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    page.send("Emulation.setEmulatedMedia", features=features)


OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => !e.matches('.skip') &&
    e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_phone_shows_all_of_it(page: Page, width: int) -> None:
    resize(page, width)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # less, by a scroll bar
    assert page.evaluate(OUTSIDE) == []
    pictures = page.evaluate(
        "[...document.images].map(e => [e.complete, e.naturalWidth, e.getBoundingClientRect().width])"
    )
    assert pictures
    for complete, natural, shown in pictures:
        assert complete
        assert natural > 0
        assert 60 <= shown <= 300
    lines = page.evaluate("[...document.querySelectorAll('dd')].map("
                          "e => e.offsetHeight / parseFloat(getComputedStyle(e).lineHeight))")  # fmt: skip
    assert lines == pytest.approx([1.0] * 5, abs=0.1)  # a number and its sign stand together
    font = page.evaluate("(e => e.getScreenCTM().a * parseFloat(getComputedStyle(e).fontSize))"
                         "(document.querySelector('.cmc text'))")  # fmt: skip
    assert 9.5 <= font <= 16
    assert page.evaluate("Math.min(...[...document.querySelectorAll('p, figcaption, td, summary')].map("
                         "e => parseFloat(getComputedStyle(e).fontSize)))") >= 12  # fmt: skip


# of all text and its background, by WCAG 2.1
CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const below = e => { while (e) { const c = getComputedStyle(e).backgroundColor;
    if (numbers(c).length === 3) return c; e = e.parentElement; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('h1, h2, p, dt, dd, summary, span, figcaption, strong, td, th, .none')].map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(below(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 60)]; }).sort((x, y) => x[0] - y[0])[0];
})()"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(page: Page, scheme: str) -> None:
    resize(page, 390, prefers_color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    lowest, where = page.evaluate(CONTRAST)
    assert lowest >= 4.5, where


def test_keys_reach_everything(page: Page, report: Path) -> None:
    page.open(report)
    resize(page, 1280)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = false)")
    seen = []
    for _ in range(6):
        page.press("Tab", 9)
        seen.append(page.evaluate("document.activeElement.textContent"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid 3px" in outline
        box = page.evaluate("(b => [b.left, b.right])(document.activeElement.getBoundingClientRect())")
        assert box[0] >= 0
        assert box[1] > box[0] + 20
    assert seen[0] == "Skip to the metrics"
    assert [text.split()[0] for text in seen[2:]] == ["Query"] * 4
    page.press("Enter", 13)
    opened = page.evaluate("[...document.querySelectorAll('details')].map(each => each.open)")
    assert opened == [False] * 4 + [True]
    page.evaluate("document.querySelector('.skip').focus()")
    page.press("Enter", 13)
    assert page.evaluate("document.activeElement.id") == "main"


def test_the_browser_asks_for_nothing_and_has_no_complaint(page: Page, report: Path) -> None:
    requested = [
        event["params"]["request"]["url"] for event in page.events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert report.resolve().as_uri() in requested
    assert [url for url in requested if not url.startswith(("data:", report.resolve().as_uri()))] == []
    complaints: list[Any] = [
        event for event in page.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]
    assert complaints == []
