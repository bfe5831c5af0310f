"""An evaluation as one HTML file that loads nothing: metrics, the CMC curve, and the worst queries with their matches.

    python -m qaconv_triton.report QUERY.safetensors GALLERY.safetensors --matcher CHECKPOINT --output report.html

Features are files of `evaluation.save_features`; pictures are shown if these hold paths. `write_report` does the same
from Python (`pip install qaconv-triton[eval,plot]`).
"""

from __future__ import annotations

import argparse
import base64
import io
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .evaluation import Features, QueryMetrics, ReIDMetrics, load_features, query_metrics, rank_gallery
from .evaluation.feature_store import as_texts, whole_file
from .evaluation.reid import PLACES, as_integers, check_cameras, check_integers, hits_of_lists, mean_metrics
from .evaluation.sources import CPU, Held, as_tensor, read_maps
from .matcher import QAConv
from .matches import score_decimals, strongest_matches
from .report_html import NO_BREAK, STYLE, Picture, curve_svg, matches_svg, percent
from .validation import check_count

LINES = 16  # of a picture of matches
CURVE_RANKS = 20
PIXELS = 256  # of a picture's longer side in the file
JUNK_IDS = (-1,)
LIST_BYTES = 2**30  # of the lists of all queries, where k is None
PLACE_BYTES = 12  # of a score and an index
logger = logging.getLogger(__name__)


def write_report(
    path: str | os.PathLike[str],
    matcher: QAConv,
    query: Features,
    gallery: Features,
    *,
    ranking: tuple[Tensor, Tensor] | None = None,
    k: int | None = None,
    prefilter: int | None = None,
    worst: int = 10,
    top: int = 5,
    images: str | os.PathLike[str] | None = None,
    title: str = "Evaluation",
    source: str | None = None,
    progress: bool = False,
) -> ReIDMetrics:
    """Rank a gallery for every query and write what came of it to one HTML file.

    Args:
        path: of the HTML file.
        matcher: the `QAConv`, which scores in eval mode.
        query: maps, identities and what else is known, as `load_features` returns them, or `Features(...)` of your own,
            whose parts may be what `save_features` takes.
        gallery: likewise.
        ranking: what `rank_gallery` returned for these, where it was called before; else it is called here.
        k: gallery items to rank for each query. Where None, as many as lists of 1 GiB have, up to all of them: those of
            3,368 queries and 19,732 items. The page says what the figures of shorter lists are bounds of.
        prefilter: as of `rank_gallery`; beside `ranking`, the one that it was made with.
        worst: queries to show, those of lowest average precision.
        top: gallery items to show of each.
        images: the folder that relative paths of `query.paths` and `gallery.paths` start from.
        title: of the page.
        source: what it is made from, such as the names of the checkpoint and of the features; the page has it beside
            the date.
        progress: show that of the ranking.

    Returns:
        The metrics, as of `reid_metrics`.

    Raises:
        ImportError: there are paths, but Pillow is not installed.
        OSError: the file cannot be written; raised before the ranking where that is known.
        TypeError, ValueError: as for `rank_gallery` and `reid_metrics`; features or a ranking of other types or shapes;
            cameras of queries or gallery alone; `worst` or `top` below 1.

    Examples:
        >>> from qaconv_triton.evaluation import Features
        >>> ids = torch.tensor([0, 0, 1, 1])
        >>> features = Features(torch.randn(4, 8, 4, 2), ids, None, None, None)
        >>> write_report("report.html", QAConv(8, 4, 2), features, features).cmc.tolist()  # each finds itself
        [1.0, 1.0, 1.0, 1.0]
    """
    worst = check_count(worst, "worst", low=1, high=None, why="queries to show")
    top = check_count(top, "top", low=1, high=None, why="gallery items to show")
    if prefilter is not None:
        prefilter = check_count(prefilter, "prefilter", low=1, high=None, why="gallery items to score")
    if not isinstance(matcher, QAConv):
        raise TypeError(f"matcher: expected a QAConv, got {type(matcher).__name__}")
    query, gallery = _as_tensors(matcher, query, "query"), _as_tensors(matcher, gallery, "gallery")
    check_cameras(query.cameras, gallery.cameras, "query.cameras", "gallery.cameras")
    with whole_file(path) as part:
        if ranking is None:
            if k is None:
                affordable = max(1, LIST_BYTES // (PLACE_BYTES * max(1, len(query.maps))))
                k = max(1, min(len(gallery.maps), affordable if prefilter is None else prefilter))
            occ = {"query_occ": query.occ, "gallery_occ": gallery.occ}
            ranking = rank_gallery(matcher, query.maps, gallery.maps, k, **occ, prefilter=prefilter, progress=progress)
        scores, indices = _checked_ranking(ranking)
        of_queries = query_metrics(indices, query.ids, gallery.ids, query.cameras, gallery.cameras, junk_ids=JUNK_IDS)
        metrics = mean_metrics(of_queries, indices.shape[1])
        evaluation = _Evaluation(matcher, query, gallery, scores, indices, of_queries, _Pictures(images))
        shown = [_query_section(evaluation, row, top, is_open=i == 0) for i, row in enumerate(evaluation.worst(worst))]
        page = _page(title, source, evaluation, metrics, shown, prefilter)
        part.write_text(page, encoding="utf-8", errors="backslashreplace")  # not every path is UTF-8
    if missing := evaluation.pictures.missing:
        logger.warning("pictures that could not be read: %d, such as %r", len(missing), next(iter(missing)))
    return metrics


def _as_tensors(matcher: QAConv, features: Features, name: str) -> Features:
    """Features whose maps are an array of the matcher's sizes, and the rest tensors on the CPU and strings."""
    if not isinstance(features, Features):
        raise TypeError(f"{name}: expected Features, got {type(features).__name__}")
    sizes = matcher._map_sizes
    held = read_maps(sizes, features.maps, features.occ, f"{name}.maps", f"{name}.occ")
    owner = f"{name}.maps"
    ids, cameras = as_integers(features.ids, f"{name}.ids", CPU, len(held), owner), None
    if features.cameras is not None:
        cameras = as_integers(features.cameras, f"{name}.cameras", CPU, len(held), owner)
    paths = None if features.paths is None else as_texts(features.paths, f"{name}.paths", len(held))
    return Features(held.maps, ids, cameras, held.visibility, paths)  # type: ignore[arg-type]


def _checked_ranking(ranking: Any) -> tuple[Tensor, Tensor]:
    """Scores and indices of lists, tensors or arrays, on the CPU."""
    expected = "scores and indices, as rank_gallery returns them"
    if not isinstance(ranking, Sequence) or len(ranking) != 2:
        raise TypeError(f"ranking: expected {expected}, got {type(ranking).__name__}")
    scores, indices = (as_tensor(part, "ranking", expected).detach().cpu() for part in ranking)
    check_integers(indices, "ranking")
    if scores.shape != indices.shape:
        got = f"{list(scores.shape)} and {list(indices.shape)}"
        raise ValueError(f"ranking: expected scores and indices alike, got {got}")
    return scores, indices


def load_matcher(
    path: str | os.PathLike[str], num_features: int, height: int, width: int, prefix: str | None = None
) -> QAConv:
    """Rebuild a matcher, without its class table, from a checkpoint of it or of a model that holds it.

    Args:
        path: a file of `torch.save` or safetensors: a state dict, or a checkpoint with state dicts in it, such as
            Lightning's.
        num_features: C of the maps it is for.
        height: H.
        width: W.
        prefix: where the matcher is in the checkpoint, or the end of that in whole names: "criterion.matcher" is enough
            for "state_dict.criterion.matcher". Found where None, if there is but one.

    Returns:
        The matcher, on the CPU, in eval mode.

    Raises:
        OSError: no such file.
        ValueError: not a checkpoint, none or several matchers in it.
        RuntimeError: a matcher of another size, as far as the checkpoint says: nothing but a class table in it depends
            on C, and H and W can be told from their product alone where it has lost its metadata.

    Examples:
        >>> torch.save({"criterion": {"matcher." + k: v for k, v in QAConv(8, 4, 2).state_dict().items()}}, "last.pt")
        >>> load_matcher("last.pt", 8, 4, 2).extra_repr()
        '8, 4, 2'
    """
    saved: Any
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            saved = load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # of any kind: junk is read as a pickle
        first = next(iter(str(error).splitlines()), "empty")
        raise ValueError(f"{path}: no checkpoint of tensors alone; save matcher.state_dict() ({first})") from error
    every = dict(_matchers_in(saved))
    tables = {name: state.pop("class_embed", None) for name, state in every.items()}
    ending = "" if prefix is None else f".{prefix.strip('.')}"
    is_whole = ending[1:] in every and prefix is not None
    found: dict[str, OrderedDict[str, Any]] = {}
    for name, state in every.items():
        is_wanted = name == ending[1:] if is_whole else f".{name}".endswith(ending)
        if is_wanted and not any(_are_equal(state, other) for other in found.values()):  # a module with two names
            found[name] = state
    if len(found) != 1:
        where = "" if prefix is None else f" at {prefix!r}"
        names = ", ".join(repr(name) for name in found) or "none"
        others = ", ".join(repr(name) if name else "the file itself" for name in every)
        others = f" among {others}" if every and not found else ""
        raise ValueError(f"{path}: expected one matcher{where}, found {names}{others}; prefix says which one to take")
    ((name, state),) = found.items()
    if isinstance(table := tables[name], Tensor) and tuple(table.shape[1:]) != (num_features, height, width):
        expected = f"expected maps {[num_features, height, width]}"
        raise RuntimeError(f"{path}: {expected}, got a class table {list(table.shape)}")
    shared_fc = tuple(state["fc.weight"].shape) == (1, height * width)
    matcher = QAConv(num_features, height, width, shared_fc=shared_fc, device=CPU, dtype=torch.float32)
    matcher.load_state_dict(state)
    return matcher.eval()


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _matchers_in(saved: Any, path: str = "") -> Iterator[tuple[str, OrderedDict[str, Any]]]:
    """The state dicts of matchers in nested mappings, by where they are."""
    if not isinstance(saved, Mapping):
        return
    metadata = getattr(saved, "_metadata", None) or {}
    for key, value in saved.items():
        if isinstance(key, str) and key.endswith("logit_bn.weight") and isinstance(value, Tensor):
            prefix = key.removesuffix("logit_bn.weight")
            names = [name for name in saved if name.startswith(prefix)]
            if isinstance(saved.get(prefix + "fc.weight"), Tensor):
                state = OrderedDict((name.removeprefix(prefix), saved[name]) for name in names)
                state._metadata = {  # type: ignore[attr-defined]
                    name.removeprefix(prefix[:-1]).lstrip("."): values
                    for name, values in metadata.items()
                    if name == prefix[:-1] or name.startswith(prefix)
                }
                yield (path + prefix).strip("."), state
        else:
            yield from _matchers_in(value, f"{path}{key}.")


@dataclass
class _Pictures:
    """Pictures as data URIs, and those that could not be read."""

    folder: str | os.PathLike[str] | None
    missing: dict[str, None] = field(default_factory=dict)  # in order, once each

    def read(self, paths: Sequence[str] | None, row: int) -> Picture | None:
        if paths is None:
            return None
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("pictures in a report need Pillow: pip install qaconv-triton[plot]") from error
        try:
            with Image.open(Path(self.folder or "", paths[row])) as opened:
                picture = opened.convert("RGB")  # EXIF is ignored, as by the loaders of datasets: maps fit that
        except (OSError, ValueError, Image.DecompressionBombError):
            self.missing[paths[row]] = None
            return None
        picture.thumbnail((PIXELS, PIXELS))
        kind = "PNG" if picture.width * picture.height <= 64 * 64 else "JPEG"
        file = io.BytesIO()
        picture.save(file, kind, quality=85)
        data = base64.b64encode(file.getvalue()).decode()
        return Picture(f"data:image/{kind.lower()};base64,{data}", picture.width / picture.height)


@dataclass
class _Evaluation:
    """Queries, gallery, and the ranking of one by the other."""

    matcher: QAConv
    query: Features
    gallery: Features
    scores: Tensor  # [Q, k]
    indices: Tensor  # [Q, k]
    of_queries: QueryMetrics
    pictures: _Pictures

    def worst(self, count: int) -> list[int]:
        """The queries of lowest average precision; of equal ones that whose first match comes later."""
        precision, _, first = (values.tolist() for values in self.of_queries)
        counted = [row for row in range(len(precision)) if precision[row] == precision[row]]
        return sorted(counted, key=lambda row: (precision[row], -first[row]))[:count]

    def are_kept(self, rows: Sequence[int]) -> Tensor:
        """The places of queries' lists that count, bool: not junk, not the query's identity in its own camera."""
        places, query, gallery = self.indices[rows].long(), self.query, self.gallery
        of_rows = query.ids[rows], None if query.cameras is None else query.cameras[rows]
        is_junk = torch.isin(gallery.ids, torch.tensor(JUNK_IDS, device=CPU))
        return ~(hits_of_lists(places, *of_rows, gallery.ids, gallery.cameras, is_junk)[1] | (places < 0))

    def exact_ranks(self) -> int:
        """How many images the shortest list has that count: the r up to which Rank-r is that of full lists."""
        rows = self.of_queries.average_precision.isfinite().nonzero().flatten()
        blocks = rows.split(max(1, PLACES // self.indices.shape[1]))
        return min(int(self.are_kept(block.tolist()).sum(dim=1).min()) for block in blocks)

    def drawing(self, row: int, place: int, name: str, decimals: int) -> str:
        """A picture of the matches of a query and an item of its list."""
        item, parameter = int(self.indices[row, place]), self.matcher.fc.weight
        sides = ((self.query, row), (self.gallery, item))
        maps, occ = [], []
        for features, index in sides:
            rows, visible = Held(features.maps, features.occ).rows(slice(index, index + 1), parameter.device)
            maps.append(rows[0].to(parameter.dtype))
            occ.append(None if visible is None else visible[0].to(parameter.dtype))
        matches = strongest_matches(self.matcher, maps[0], maps[1], LINES, probe_occ=occ[0], gallery_occ=occ[1])
        pictures = [self.pictures.read(features.paths, index) for features, index in sides]
        text = f"{name}: score {self.scores[row, place]:.{decimals}f}"
        drawing = matches_svg(matches, pictures, occ, maps[0].shape[1:], f"Matches of query {row}, {text}")
        facts = f"{_facts(self.gallery, item)}, {_origin(self.gallery, item)}"
        return f"<figure>{drawing}<figcaption>{text}, {facts}</figcaption></figure>"


def _now() -> datetime:
    return datetime.now(UTC)


def _bounds(ranked: int, items: int, prefilter: int | None) -> str:
    """What the figures of lists of `ranked` of `items` gallery images are worth; empty where they are exact."""
    if prefilter is not None and prefilter < items:
        return (
            f"For each query the {prefilter:,} gallery images of largest cosine were scored, of {items:,}, and its "
            f"list has the best {ranked:,} of them. True matches that are not in a list count as never found. All "
            "figures are those of these lists: those of a full search may be higher or lower."
        )
    if ranked < items:
        return (
            f"A list has the best {ranked:,} of {items:,} gallery images. True matches that are not in it count as "
            "never found: mAP and mINP are lower bounds of those of full lists, and so is Rank-r for r above the "
            "length of the shortest list without the images that are left out of it."
        )
    return ""


def _page(
    title: str,
    source: str | None,
    evaluation: _Evaluation,
    metrics: ReIDMetrics,
    shown: list[str],
    prefilter: int | None,
) -> str:
    queries, ranked = evaluation.indices.shape
    items, matcher = len(evaluation.gallery.ids), evaluation.matcher
    left = queries - metrics.num_queries
    left_out = "Cameras are not known: no gallery image is left out but junk (identity -1)."
    if evaluation.query.cameras is not None:
        left_out = "A gallery image of the query's identity and camera is left out, and so is junk (identity -1)."
    notes = [
        f"Queries: {queries:,}. Gallery images: {items:,}. Maps: {matcher.num_features} × {matcher.height} × "
        f"{matcher.width}.",
        f"Average precision is plain: the mean of the precision at the rank of each true match. {left_out}",
    ]
    if left:
        notes.append(f"Queries without a true match in the gallery, which do not count: {left:,}.")
    if bounds := _bounds(ranked, items, prefilter):
        notes.append(bounds)
        if prefilter is None and metrics.num_queries:
            notes.append(f"Rank-r is exact up to r = {evaluation.exact_ranks():,}.")
    is_unordered = evaluation.scores[:, 0].isnan()
    if is_unordered.any():
        notes.append(
            f"Queries whose scores are all NaN, because of NaN or Inf in maps: {int(is_unordered.sum()):,}, query "
            f"{int(is_unordered.nonzero()[0])} first. Their lists are in no order, but count."
        )
    if missing := evaluation.pictures.missing:
        notes.append(f"Pictures that could not be read: {len(missing):,}, such as {next(iter(missing))}.")
    cards = "".join(f"<div><dt>{name}</dt><dd>{percent(value)}</dd></div>" for name, value in metrics.to_dict().items())
    curve = metrics.cmc[:CURVE_RANKS].tolist() if metrics.num_queries else []
    notes.append(f"Made {_now():%Y-%m-%d %H:%M} UTC{'' if source is None else f' from {source}'}.")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the metrics</a>
<header><h1>{escape(title)}</h1></header>
<main id="main" tabindex="-1">
<section aria-labelledby="metrics">
<h2 id="metrics">Metrics</h2>
<dl class="cards">{cards}</dl>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
</section>
<section aria-labelledby="cmc">
<h2 id="cmc">CMC curve</h2>
{_curve_columns(curve) if curve else "<p>No query has a true match in the gallery.</p>"}
</section>
<section aria-labelledby="worst">
<h2 id="worst">Worst queries</h2>
{LEGEND if shown else "<p>No query has a true match in the gallery.</p>"}
{"".join(shown)}
</section>
</main>
</body>
</html>
"""


# what lines and shades in the drawings of `matches_svg` mean
LEGEND = """<p>By average precision, lowest first. Lines join the local matches that add most to a score, the wider the
more: <span class="key both">solid</span> where each location is the other's best match,
<span class="key one">dashed</span> for a one-way match: the location with the dot has its best match at the other end,
which has a better one elsewhere. The gallery image stands a step lower, so that lines stand apart. Occluded locations
are shaded.</p>"""


def _curve_columns(curve: list[float]) -> str:
    """The curve, and beside it, or below on a phone, what it says and its numbers."""
    drawing, text = curve_svg(curve)
    rows = "".join(f"<tr><th scope='row'>{rank}</th><td>{percent(v)}</td></tr>" for rank, v in enumerate(curve, 1))
    return f"""<div class="columns">{drawing}
<div><p>{text}</p>
<details><summary>The numbers of the curve</summary>
<table>
<thead><tr><th scope="col">Rank</th><th scope="col">Queries matched</th></tr></thead>
<tbody>{rows}</tbody>
</table>
</details></div></div>"""


def _query_section(evaluation: _Evaluation, row: int, top: int, *, is_open: bool) -> str:
    """A query, its top gallery items, and its matches with the first of them and with the first true one."""
    query, gallery = evaluation.query, evaluation.gallery
    precision, first = (
        evaluation.of_queries.average_precision[row].item(),
        evaluation.of_queries.first_match[row].item(),
    )
    picture = evaluation.pictures.read(query.paths, row)
    places = evaluation.are_kept([row])[0].nonzero().flatten()
    decimals = score_decimals(evaluation.scores[row, places[:top]].tolist())
    captions = [_figure(picture, "query", f"Query {row}", _facts(query, row), "query")]
    for rank, place in enumerate(places[:top].tolist(), start=1):
        item = int(evaluation.indices[row, place])
        right = bool(gallery.ids[item] == query.ids[row])
        sign, word = ("✓", "right") if right else ("✗", "wrong")
        facts = f"{_facts(gallery, item)}, score {evaluation.scores[row, place]:.{decimals}f}"
        found, what = evaluation.pictures.read(gallery.paths, item), f"gallery image of rank {rank}, {word}"
        captions.append(_figure(found, word, f"{rank} {sign} {word}", facts, what, _origin(gallery, item)))
    first_place = int(places[int(first) - 1]) if first < torch.inf else None
    pairs = [("Rank 1", int(places[0]))] if len(places) else []
    if first_place is not None and first > 1:
        pairs.append((f"First true match, rank {int(first)}", first_place))
    drawn = [evaluation.drawing(row, place, name, decimals) for name, place in pairs]
    shown = f'<div class="drawings">{"".join(drawn)}</div>' if drawn else "<p>All listed images are left out.</p>"
    where = f"first true match at rank {int(first)}" if first_place is not None else "no true match in the list"
    name = f" <span class='path'>{escape(query.paths[row])}</span>" if query.paths is not None else ""
    return f"""<details{" open" if is_open else ""}>
<summary>Query {row}{name}: AP {percent(precision)}, {where}</summary>
<div class="ranking">{"".join(captions)}</div>
{shown}
</details>
"""


def _facts(features: Features, row: int) -> str:
    camera = "" if features.cameras is None else f", camera {int(features.cameras[row])}"
    return f"identity {int(features.ids[row])}{camera}"


def _origin(features: Features, row: int) -> str:
    """Which picture of the features it is: its row, and the name of its file."""
    return f"row {row}" + ("" if features.paths is None else f", {escape(Path(features.paths[row]).name)}")


def _figure(picture: Picture | None, kind: str, label: str, facts: str, what: str, origin: str = "") -> str:
    image = f'<div class="none" role="img" aria-label="No picture of the {what}">no picture</div>'
    if picture is not None:
        image = f'<img src="{picture.uri}" alt="{what.capitalize()}: {facts}">'
    caption = f"<strong>{label}</strong> {facts}" + (f"<br>{origin}" if origin else "")
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        "python -m qaconv_triton.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("query", type=Path, help="features of the queries, a file of save_features")
    options.add_argument("gallery", type=Path, help="features of the gallery, likewise")
    options.add_argument("--matcher", type=Path, required=True, help="checkpoint of the matcher or of a model with it")
    options.add_argument("--prefix", help="where the matcher is in the checkpoint, or its end, if there are several")
    options.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write (report.html)")
    options.add_argument("--k", type=int, help="gallery items to rank for each query (all, or as lists of 1 GiB have)")
    options.add_argument("--prefilter", type=int, help="score only so many of each query, the nearest by cosine")
    options.add_argument("--worst", type=int, default=10, help="queries to show (10)")
    options.add_argument("--top", type=int, default=5, help="gallery items to show of each (5)")
    options.add_argument("--images", type=Path, help="the folder that relative paths of pictures start from")
    options.add_argument("--title", default="Evaluation", help="of the page")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", type=_device, default=device, help=f"where to score ({device})")
    return options


def _device(name: str) -> torch.device:
    """A device that this torch has here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch without CUDA, without a GPU
        raise argparse.ArgumentTypeError(f"{name!r}: {str(error).splitlines()[0]}") from error


def main(arguments: list[str] | None = None) -> None:
    """Write a report of the files named on the command line."""
    options = parser().parse_args(arguments)
    try:
        query, gallery = load_features(options.query), load_features(options.gallery)
        channels, height, width = query.maps.shape[1:]
        matcher = load_matcher(options.matcher, channels, height, width, options.prefix).to(options.device)
        keywords = {name: getattr(options, name) for name in ("k", "prefilter", "worst", "top", "images", "title")}
        source = f"{options.query}, {options.gallery} and {options.matcher}"
        metrics = write_report(options.output, matcher, query, gallery, **keywords, source=source, progress=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser().exit(2, f"{error}\n")
    numbers = ", ".join(f"{name} {percent(value)}" for name, value in metrics.to_dict().items()).replace(NO_BREAK, " ")
    bounds = _bounds(len(metrics.cmc), len(gallery.ids), options.prefilter)
    sys.stdout.writelines(f"{line}\n" for line in (f"{numbers}: {options.output}", bounds) if line)


if __name__ == "__main__":
    main()
