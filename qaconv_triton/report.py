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
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .evaluation import Features, QueryMetrics, ReIDMetrics, load_features, query_metrics, rank_gallery
from .evaluation.feature_store import as_texts, whole_file
from .evaluation.reid import as_integers, check_integers, hits_of_lists, mean_metrics
from .evaluation.sources import Held, read_maps
from .matcher import QAConv
from .matches import Matches, strongest_matches
from .validation import check_count

LINES = 16  # of a picture of matches
CURVE_RANKS = 20
PIXELS = 256  # of a picture's longer side in the file
JUNK_IDS = (-1,)
LIST_BYTES = 2**30  # of the lists of all queries, where k is None
PLACE_BYTES = 12  # of a score and an index
CPU = torch.device("cpu")
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
            3,368 queries and 19,732 items. mAP and mINP of shorter lists are lower bounds, as the page says.
        prefilter: as of `rank_gallery`.
        worst: queries to show, those of lowest average precision.
        top: gallery items to show of each.
        images: the folder that relative paths of `query.paths` and `gallery.paths` start from.
        title: of the page.
        progress: show that of the ranking.

    Returns:
        The metrics, as of `reid_metrics`.

    Raises:
        ImportError: there are paths, but Pillow is not installed.
        OSError: the file cannot be written; raised before the ranking where that is known.
        TypeError, ValueError: as for `rank_gallery` and `reid_metrics`; features or a ranking of other types or shapes;
            `worst` or `top` below 1.

    Examples:
        >>> from qaconv_triton.evaluation import Features
        >>> ids = torch.tensor([0, 0, 1, 1])
        >>> features = Features(torch.randn(4, 8, 4, 2), ids, None, None, None)
        >>> write_report("report.html", QAConv(8, 4, 2), features, features).cmc.tolist()  # each finds itself
        [1.0, 1.0, 1.0, 1.0]
    """
    worst = check_count(worst, "worst", low=1, high=None, why="queries to show")
    top = check_count(top, "top", low=1, high=None, why="gallery items to show")
    if not isinstance(matcher, QAConv):
        raise TypeError(f"matcher: expected a QAConv, got {type(matcher).__name__}")
    query, gallery = _as_tensors(matcher, query, "query"), _as_tensors(matcher, gallery, "gallery")
    with whole_file(path) as part:
        if ranking is None:
            if k is None:
                affordable = max(1, LIST_BYTES // (PLACE_BYTES * max(1, len(query.maps))))
                k = min(len(gallery.maps), affordable) if prefilter is None else prefilter
            occ = {"query_occ": query.occ, "gallery_occ": gallery.occ}
            ranking = rank_gallery(matcher, query.maps, gallery.maps, k, **occ, prefilter=prefilter, progress=progress)
        scores, indices = _checked_ranking(ranking)
        known = (query.ids, gallery.ids, query.cameras, gallery.cameras)
        cameras = known if None not in known else (query.ids, gallery.ids)
        of_queries = query_metrics(indices, *cameras, junk_ids=JUNK_IDS)
        metrics = mean_metrics(of_queries, indices.shape[1])
        evaluation = _Evaluation(matcher, query, gallery, scores, indices, of_queries, _Pictures(images))
        shown = [_query_section(evaluation, row, top, is_open=i == 0) for i, row in enumerate(evaluation.worst(worst))]
        page = _page(title, evaluation, metrics, shown, prefilter)
        part.write_text(page, encoding="utf-8", errors="backslashreplace")  # not every path is UTF-8
    if missing := evaluation.pictures.missing:
        logger.warning("%d pictures could not be read, such as %r", len(missing), next(iter(missing)))
    return metrics


def _as_tensors(matcher: QAConv, features: Features, name: str) -> Features:
    """Features whose maps are an array of the matcher's sizes, and the rest tensors on the CPU and strings."""
    if not isinstance(features, Features):
        raise TypeError(f"{name}: expected Features, got {type(features).__name__}")
    sizes = matcher._map_sizes
    held = read_maps(sizes, features.maps, features.occ, f"{name}.maps", f"{name}.occ")
    ids = as_integers(features.ids, f"{name}.ids", CPU, len(held))
    cameras = None if features.cameras is None else as_integers(features.cameras, f"{name}.cameras", CPU, len(held))
    paths = None if features.paths is None else as_texts(features.paths, f"{name}.paths", len(held))
    return Features(held.maps, ids, cameras, held.visibility, paths)  # type: ignore[arg-type]


def _checked_ranking(ranking: Any) -> tuple[Tensor, Tensor]:
    """Scores and indices of lists, tensors or arrays, on the CPU."""
    try:
        scores, indices = (torch.as_tensor(part, device=CPU) for part in ranking)
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "scores and indices, as rank_gallery returns them"
        raise TypeError(f"ranking: expected {expected}, got {type(ranking).__name__} ({error})") from error
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
        prefix: where the matcher is in the checkpoint, as "criterion.matcher"; found where None, if there is but one.

    Returns:
        The matcher, on the CPU, in eval mode.

    Raises:
        OSError: no such file.
        ValueError: not a checkpoint, none or several matchers in it.
        RuntimeError: a matcher of another size.

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
    found: dict[str, OrderedDict[str, Any]] = {}
    for name, state in _matchers_in(saved):
        is_wanted = prefix is None or name == prefix.strip(".")
        if is_wanted and not any(_are_equal(state, other) for other in found.values()):  # a module with two names
            found[name] = state
    if len(found) != 1:
        where = "" if prefix is None else f" at {prefix!r}"
        names = ", ".join(repr(name) for name in found) or "none"
        raise ValueError(f"{path}: expected one matcher{where}, found {names}; prefix says which one to take")
    (state,) = found.values()
    shared_fc = tuple(state["fc.weight"].shape) == (1, height * width)
    matcher = QAConv(num_features, height, width, shared_fc=shared_fc, device=CPU, dtype=torch.float32)
    matcher.load_state_dict(state)
    return matcher.eval()


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _matchers_in(saved: Any, path: str = "") -> Iterator[tuple[str, OrderedDict[str, Any]]]:
    """The state dicts of matchers in nested mappings, without their class tables, by their place."""
    if not isinstance(saved, Mapping):
        return
    metadata = getattr(saved, "_metadata", None) or {}
    for key, value in saved.items():
        if isinstance(key, str) and key.endswith("logit_bn.weight") and isinstance(value, Tensor):
            prefix = key.removesuffix("logit_bn.weight")
            names = [name for name in saved if name.startswith(prefix) and name != prefix + "class_embed"]
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

    def read(self, paths: Sequence[str] | None, row: int) -> _Picture | None:
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
        return _Picture(f"data:image/{kind.lower()};base64,{data}", picture.width / picture.height)


class _Picture(NamedTuple):
    uri: str
    aspect: float  # width over height


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

    def kept(self, row: int) -> Tensor:
        """The places of a query's list that count: not junk, not its own identity in its own camera."""
        items, query, gallery = self.indices[row], self.query, self.gallery
        cameras = None if query.cameras is None else query.cameras[row : row + 1]
        is_junk = torch.isin(gallery.ids, torch.tensor(JUNK_IDS, device=CPU))
        of_query = query.ids[row : row + 1], cameras
        _, is_left_out = hits_of_lists(items.long().unsqueeze(0), *of_query, gallery.ids, gallery.cameras, is_junk)
        is_out = is_left_out[0] | (items < 0)
        return is_out.logical_not().nonzero().flatten()

    def drawing(self, row: int, place: int, name: str) -> str:
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
        text = f"{name}: score {self.scores[row, place]:.2f}"
        drawing = _drawing(matches, pictures, occ, maps[0].shape[1:], f"Matches of query {row}, {text}")
        return f"<figure>{drawing}<figcaption>{text}</figcaption></figure>"


def _page(title: str, evaluation: _Evaluation, metrics: ReIDMetrics, shown: list[str], prefilter: int | None) -> str:
    queries, ranked = evaluation.indices.shape
    items, matcher = len(evaluation.gallery.ids), evaluation.matcher
    left = queries - metrics.num_queries
    notes = [
        f"{queries:,} queries, {items:,} gallery images, maps of {matcher.num_features} × {matcher.height} × "
        f"{matcher.width}.",
        "Average precision is plain: the mean of the precision at the rank of each true match. A gallery image of the "
        "query's identity and camera is left out of its list, and so is junk (identity -1)."
        if evaluation.query.cameras is not None and evaluation.gallery.cameras is not None
        else "Average precision is plain: the mean of the precision at the rank of each true match. Cameras are not "
        "known: no gallery image is left out but junk (identity -1).",
    ]
    if left:
        notes.append(f"Queries without a true match in the gallery, which do not count: {left:,}.")
    if ranked < items:
        notes.append(
            f"Lists have {ranked:,} places; true matches beyond count as never found: mAP and mINP are lower bounds."
        )
    if prefilter is not None:
        notes.append(f"Of each query the {prefilter:,} nearest by cosine were scored.")
    if missing := evaluation.pictures.missing:
        notes.append(f"Pictures that could not be read: {len(missing):,}, such as {next(iter(missing))}.")
    cards = "".join(
        f"<div><dt>{name}</dt><dd>{_percent(value)}</dd></div>" for name, value in metrics.to_dict().items()
    )
    curve = metrics.cmc[:CURVE_RANKS].tolist() if metrics.num_queries else []
    table = "".join(f"<tr><th scope='row'>{rank}</th><td>{_percent(v)}</td></tr>" for rank, v in enumerate(curve, 1))
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
{_curve(curve) if curve else "<p>No query counts.</p>"}
<details><summary>The numbers of the curve</summary>
<table>
<thead><tr><th scope="col">Rank</th><th scope="col">Queries matched</th></tr></thead>
<tbody>{table}</tbody>
</table>
</details>
</section>
<section aria-labelledby="worst">
<h2 id="worst">Worst queries</h2>
<p>By average precision, lowest first. Lines join the local matches that add most to a score, the wider the more:
<span class="key both">solid</span> where each location is the other's best match, <span class="key one">dashed</span>
where only one is, with a dot at the location whose best match it is. Occluded locations are shaded.</p>
{"".join(shown)}
</section>
</main>
</body>
</html>
"""


def _query_section(evaluation: _Evaluation, row: int, top: int, *, is_open: bool) -> str:
    """A query, its top gallery items, and its matches with the first of them and with the first true one."""
    query, gallery = evaluation.query, evaluation.gallery
    precision, first = (
        evaluation.of_queries.average_precision[row].item(),
        evaluation.of_queries.first_match[row].item(),
    )
    picture = evaluation.pictures.read(query.paths, row)
    places = evaluation.kept(row)
    captions = [_figure(picture, "query", f"Query {row}", _facts(query, row), "query")]
    for rank, place in enumerate(places[:top].tolist(), start=1):
        item = int(evaluation.indices[row, place])
        right = bool(gallery.ids[item] == query.ids[row])
        sign, word = ("✓", "right") if right else ("✗", "wrong")
        facts = f"{_facts(gallery, item)}, score {evaluation.scores[row, place]:.2f}"
        found = evaluation.pictures.read(gallery.paths, item)
        captions.append(_figure(found, word, f"{rank} {sign} {word}", facts, f"gallery image of rank {rank}, {word}"))
    first_place = int(places[int(first) - 1]) if first < torch.inf else None
    pairs = [("Rank 1", int(places[0]))] if len(places) else []
    if first_place is not None and first > 1:
        pairs.append((f"First true match, rank {int(first)}", first_place))
    drawn = [evaluation.drawing(row, place, name) for name, place in pairs]
    where = f"first true match at rank {int(first)}" if first_place is not None else "no true match in the list"
    name = f" <span class='path'>{escape(query.paths[row])}</span>" if query.paths is not None else ""
    return f"""<details{" open" if is_open else ""}>
<summary>Query {row}{name}: AP {_percent(precision)}, {where}</summary>
<div class="ranking">{"".join(captions)}</div>
<div class="drawings">{"".join(drawn)}</div>
</details>
"""


def _facts(features: Features, row: int) -> str:
    camera = "" if features.cameras is None else f", camera {int(features.cameras[row])}"
    return f"identity {int(features.ids[row])}{camera}"


def _figure(picture: _Picture | None, kind: str, label: str, facts: str, what: str) -> str:
    image = f'<div class="none" role="img" aria-label="No picture of the {what}">no picture</div>'
    if picture is not None:
        image = f'<img src="{picture.uri}" alt="{what.capitalize()}: {facts}">'
    return f'<figure class="{kind}">{image}<figcaption><strong>{label}</strong> {facts}</figcaption></figure>'


def _drawing(
    matches: Matches, pictures: Sequence[_Picture | None], occ: Sequence[Tensor | None], size: torch.Size, label: str
) -> str:
    """Both pictures, 200 high, the second a step lower so that level lines stand apart, and lines between them."""
    rows, columns = size
    widths = [200 * (columns / rows if each is None else each.aspect) for each in pictures]
    corners = (0.0, 0.0), (widths[0] + 0.4 * max(widths), 60.0)
    parts = []
    for each, visibility, width, (x, y) in zip(pictures, occ, widths, corners, strict=True):
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="200"'
        if each is not None:
            parts.append(f'<image {box} preserveAspectRatio="none" href="{each.uri}"/>')
        for place, visible in enumerate([] if visibility is None else visibility.flatten().tolist()):
            if visible < 1:
                left, top = x + place % columns * width / columns, y + place // columns * 200 / rows
                cell = f'x="{left:.1f}" y="{top:.1f}" width="{width / columns:.1f}" height="{200 / rows:.1f}"'
                parts.append(f'<rect {cell} class="occluded" fill-opacity="{0.6 * (1 - visible):.2f}"/>')
        parts.append(f'<rect {box} class="frame"/>')
    columns_of = (part.cpu().tolist() for part in matches)
    largest = matches.contribution[0].item()  # NaN if all are: no lines then
    for probe, item, added, _, of_probe, of_gallery in zip(*columns_of, strict=True):
        if not added > 0:
            continue
        ends = [
            (x + width * (place % columns + 0.5) / columns, y + 200 * (place // columns + 0.5) / rows)
            for place, width, (x, y) in zip((probe, item), widths, corners, strict=True)
        ]
        line = " ".join(
            f'{name}="{value:.1f}"' for name, value in zip(("x1", "y1", "x2", "y2"), (*ends[0], *ends[1]), strict=True)
        )
        kind, width = "both" if of_probe and of_gallery else "one", 3.2 * added / largest
        parts.append(f'<line {line} class="halo" stroke-width="{width + 1.6:.2f}"/>')
        parts.append(f'<line {line} class="{kind}" stroke-width="{width:.2f}"/>')
        for (x, y), is_chooser in zip(ends, (of_probe, of_gallery), strict=True):
            if is_chooser:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="{kind}"/>')
    view = f"-2 -2 {corners[1][0] + widths[1] + 4:.1f} 264"
    options = f'viewBox="{view}" preserveAspectRatio="xMinYMid" role="img" aria-label="{label}"'
    return f"<svg {options}><title>{label}</title>{''.join(parts)}</svg>"


def _curve(curve: list[float]) -> str:
    """The CMC curve, from rank 1 on."""
    low = max(0.0, int(10 * curve[0] - 1e-9) / 10)
    across = {rank: 64 + 392 * (rank - 1) / max(len(curve) - 1, 1) for rank in range(1, len(curve) + 1)}

    def down(value: float) -> float:
        return 16 + 220 * (1 - value) / (1 - low)

    parts, step = [], 0.1 if low > 0.4 else 0.2
    for i in range(int((1 - low) / step + 1e-6) + 1):
        value = 1 - i * step
        y = down(value)
        parts.append(f'<line x1="64" x2="456" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="56" y="{y + 5:.1f}" text-anchor="end">{100 * value:.0f} %</text>')
    parts += [
        f'<text x="{x:.1f}" y="258" text-anchor="middle">{rank}</text>'
        for rank, x in across.items()
        if rank == 1 or rank % 5 == 0 or len(curve) < 8
    ]
    points = [(across[rank], down(value)) for rank, value in enumerate(curve, 1)]
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="curve"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="both"/>' for x, y in points]
    parts.append('<text x="260" y="280" text-anchor="middle">rank</text>')
    text = f"Share of queries whose first true match has rank r or better: {_percent(curve[0])} at rank 1, "
    text += f"{_percent(curve[-1])} at rank {len(curve)}"
    return (
        f'<svg class="cmc" viewBox="0 0 472 288" role="img" aria-label="{text}"><title>{text}</title>'
        f"{''.join(parts)}</svg><p>{text}.</p>"
    )


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.1f} %"


# Okabe and Ito's colours, darker where they are letters on white; signs, words and dashes say the same.
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --soft: #5a5a5a; --line: #c9c9c9; --card: #f3f5f7;
  --right: #0072b2; --wrong: #b34700; }
@media (prefers-color-scheme: dark) { :root { --text: #ececec; --page: #16181b; --soft: #b4b4b4; --line: #4a4d52;
  --card: #22262b; --right: #56b4e9; --wrong: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; color: var(--soft); }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; display: inline-block; margin-bottom: .5rem; }
a, summary { color: var(--right); }
:focus-visible { outline: 3px solid var(--right); outline-offset: 2px; border-radius: 2px; }
main:focus { outline: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .6rem; margin: .5rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .9rem; } dd { margin: 0; font-size: 1.4rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
.cmc { max-width: 36rem; } .cmc text { fill: var(--text); font-size: 16px; }
.grid { stroke: var(--line); } .curve { fill: none; stroke: var(--right); stroke-width: 2.5; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .6rem 0; padding: 0 .8rem; }
summary { cursor: pointer; padding: .7rem 0; font-weight: 600; } .path { color: var(--soft); font-weight: 400; }
table { border-collapse: collapse; margin-bottom: .8rem; }
th, td { padding: .15rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); } figcaption strong { display: block; }
.ranking { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); gap: .8rem;
  padding: .3rem 0 1rem; }
.ranking img, .none { display: block; width: 100%; border: 4px solid var(--line); border-radius: 4px; }
.none { padding: 1.5rem .3rem; text-align: center; color: var(--soft); font-size: .85rem; }
.query img, .query .none { border-color: var(--text); border-width: 1px; padding: 3px; }
.right img, .right .none { border-color: var(--right); } .right strong { color: var(--right); }
.wrong img, .wrong .none { border: 4px dashed var(--wrong); } .wrong strong { color: var(--wrong); }
.query strong { color: var(--text); }
.drawings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  padding-bottom: 1rem; } .drawings svg { max-width: 26rem; max-height: 19rem; }
.occluded { fill: #000; } .frame { fill: none; stroke: var(--line); } .halo { stroke: #fff; }
line.both { stroke: #0072b2; } line.one { stroke: #d55e00; stroke-dasharray: 7 3; }
circle.both { fill: #0072b2; stroke: #fff; } circle.one { fill: #d55e00; stroke: #fff; }
.key { border-bottom: 3px solid var(--right); } .key.one { border-bottom: 3px dashed var(--wrong); }
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        "python -m qaconv_triton.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("query", type=Path, help="features of the queries, a file of save_features")
    options.add_argument("gallery", type=Path, help="features of the gallery, likewise")
    options.add_argument("--matcher", type=Path, required=True, help="checkpoint of the matcher or of a model with it")
    options.add_argument("--prefix", help="where the matcher is in the checkpoint, if there are several")
    options.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write (report.html)")
    options.add_argument("--k", type=int, help="gallery items to rank for each query (all, or as lists of 1 GiB have)")
    options.add_argument("--prefilter", type=int, help="score only so many of each query, the nearest by cosine")
    options.add_argument("--worst", type=int, default=10, help="queries to show (10)")
    options.add_argument("--top", type=int, default=5, help="gallery items to show of each (5)")
    options.add_argument("--images", type=Path, help="the folder that relative paths of pictures start from")
    options.add_argument("--title", default="Evaluation", help="of the page")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to score")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Write a report of the files named on the command line."""
    options = parser().parse_args(arguments)
    try:
        query, gallery = load_features(options.query), load_features(options.gallery)
        channels, height, width = query.maps.shape[1:]
        matcher = load_matcher(options.matcher, channels, height, width, options.prefix).to(options.device)
        keywords = {name: getattr(options, name) for name in ("k", "prefilter", "worst", "top", "images", "title")}
        metrics = write_report(options.output, matcher, query, gallery, **keywords, progress=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser().exit(2, f"{error}\n")
    numbers = ", ".join(f"{name} {_percent(value)}" for name, value in metrics.to_dict().items())
    sys.stdout.write(f"{numbers}: {options.output}\n")


if __name__ == "__main__":
    main()
