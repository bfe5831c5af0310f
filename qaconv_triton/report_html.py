"""What the page of `report.py` is drawn with: the CMC curve and the matches of a pair as SVG, and the style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .matches import Matches

NO_BREAK = "\u00a0"


class Picture(NamedTuple):
    """A picture as a data URI."""

    uri: str
    aspect: float  # width over height


def matches_svg(
    matches: Matches, pictures: Sequence[Picture | None], occ: Sequence[Tensor | None], size: torch.Size, label: str
) -> str:
    """Both pictures, 200 high or wide, the second a step lower so that level lines stand apart, and lines between."""
    rows, columns = size
    aspects = [columns / rows if each is None else each.aspect for each in pictures]
    height = 200 / max(1.0, *aspects)
    widths, step = [height * aspect for aspect in aspects], 0.3 * height
    corners = (0.0, 0.0), (widths[0] + 0.4 * max(widths), step)
    parts = []
    for each, visibility, width, (x, y) in zip(pictures, occ, widths, corners, strict=True):
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        if each is not None:
            parts.append(f'<image {box} preserveAspectRatio="none" href="{each.uri}"/>')
        for place, visible in enumerate([] if visibility is None else visibility.flatten().tolist()):
            if visible < 1:
                left, top = x + place % columns * width / columns, y + place // columns * height / rows
                cell = f'x="{left:.1f}" y="{top:.1f}" width="{width / columns:.1f}" height="{height / rows:.1f}"'
                parts.append(f'<rect {cell} class="occluded" fill-opacity="{0.6 * (1 - visible):.2f}"/>')
        parts.append(f'<rect {box} class="frame"/>')
    columns_of = (part.cpu().tolist() for part in matches)
    largest = matches.contribution[0].item()  # NaN if all are: no lines then
    for probe, item, added, _, of_probe, of_gallery in zip(*columns_of, strict=True):
        if not added > 0:
            continue
        ends = [
            (x + width * (place % columns + 0.5) / columns, y + height * (place // columns + 0.5) / rows)
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
    view = f"-2 -2 {corners[1][0] + widths[1] + 4:.1f} {height + step + 4:.1f}"
    options = f'viewBox="{view}" preserveAspectRatio="xMinYMid" role="img" aria-label="{label}"'
    return f"<svg {options}><title>{label}</title>{''.join(parts)}</svg>"


def curve_svg(curve: list[float]) -> tuple[str, str]:
    """The CMC curve, from rank 1 on, and what it says in words."""
    low = max(0.0, int(10 * curve[0] - 1e-9) / 10)
    across = {rank: 64 + 392 * (rank - 1) / max(len(curve) - 1, 1) for rank in range(1, len(curve) + 1)}

    def down(value: float) -> float:
        return 16 + 220 * (1 - value) / (1 - low)

    parts, step = [], 0.1 if low > 0.4 else 0.2
    for i in range(int((1 - low) / step + 1e-6) + 1):
        value = 1 - i * step
        y = down(value)
        parts.append(f'<line x1="64" x2="456" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="56" y="{y + 5:.1f}" text-anchor="end">{100 * value:.0f}{NO_BREAK}%</text>')
    parts += [
        f'<text x="{x:.1f}" y="258" text-anchor="middle">{rank}</text>'
        for rank, x in across.items()
        if rank == 1 or rank % 5 == 0 or len(curve) < 8
    ]
    points = [(across[rank], down(value)) for rank, value in enumerate(curve, 1)]
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="curve"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="both"/>' for x, y in points]
    parts.append('<text x="260" y="280" text-anchor="middle">rank</text>')
    text = f"Share of queries whose first true match has rank r or better: {percent(curve[0])} at rank 1, "
    text += f"{percent(curve[-1])} at rank {len(curve)}"
    options = f'class="cmc" viewBox="0 0 472 288" role="img" aria-label="{text}"'
    return f"<svg {options}><title>{text}</title>{''.join(parts)}</svg>", f"{text}."


def percent(value: float) -> str:
    """A share in percent, on one line; a dash for NaN."""
    return "–" if value != value else f"{100 * value:.1f}{NO_BREAK}%"


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
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .6rem; margin: .5rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem; }
dt { color: var(--soft); font-size: .9rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem;
  align-items: start; }
.cmc { max-width: 36rem; } .cmc text { fill: var(--text); font-size: 16px; }
@media (min-width: 40rem) { .cmc text { font-size: 13px; } }
.grid { stroke: var(--line); } .curve { fill: none; stroke: var(--right); stroke-width: 2.5; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .6rem 0; padding: 0 .8rem; }
summary { cursor: pointer; padding: .7rem 0; font-weight: 600; } .path { color: var(--soft); font-weight: 400; }
table { border-collapse: collapse; margin-bottom: .8rem; }
th, td { padding: .15rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); } figcaption strong { display: block; }
.ranking { display: grid; grid-template-columns: repeat(auto-fill, minmax(clamp(5.5rem, 12vw, 9rem), 1fr)); gap: .8rem;
  padding: .3rem 0 1rem; }
.ranking img, .none { display: block; width: 100%; border: 4px solid var(--line); border-radius: 4px; }
.none { padding: 1.5rem .3rem; text-align: center; color: var(--soft); font-size: .85rem; }
.query img { border-color: var(--text); border-width: 1px; padding: 3px; } .query .none { border-color: var(--text); }
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
