"""Pictures of characters from the twelve DejaVu faces that matplotlib ships, and things to hide them behind.

To a matcher a character is an identity and a face is a camera: "the same letter in another face" is the question that
re-identification asks about people. Like people, characters have look-alikes: Cyrillic, Greek and accented letters
differ from Latin ones, and from each other, in a detail or two.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font, LoadFlags
from torch import Tensor
from torch.nn import functional as F

FAMILIES = {
    "DejaVuSans": ("", "-Oblique", "-Bold", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Oblique", "-Bold", "-BoldOblique"),
    "DejaVuSerif": ("", "-Italic", "-Bold", "-BoldItalic"),
}
FACES = [family + style for family, styles in FAMILIES.items() for style in styles]
QUERY_FACE = 0  # DejaVu Sans
GALLERY_FACES = 4, 8  # Mono and Serif: the other cuts of DejaVu Sans are nearly the same drawing
MIN_FACES = 8  # a character that fewer faces cover is left out

SIZE = 24  # pixels of a picture, both ways
CELLS = 6  # locations of its feature map, both ways
EM = 17  # pixels
BASELINE = 19  # row
MARGIN = 2  # rows and columns at the border that an occluder leaves free


@dataclass(frozen=True)
class Glyphs:
    """One class per character: `images [N, 12, 24, 24]` uint8, and `covered [N, 12]`, which faces have it."""

    characters: list[str]
    images: Tensor
    covered: Tensor

    def __getitem__(self, classes: Tensor) -> Glyphs:
        return Glyphs([self.characters[i] for i in classes.tolist()], self.images[classes], self.covered[classes])

    def __len__(self) -> int:
        return len(self.characters)

    def samples(self, faces: Iterable[int] = range(len(FACES))) -> tuple[Tensor, Tensor]:
        """Every picture in `faces`: images `[M, 1, 24, 24]` uint8 and labels `[M]`, sorted by class."""
        columns = list(faces)
        covered = self.covered[:, columns]
        return self.images[:, columns][covered].unsqueeze(1), covered.nonzero()[:, 0]


def load_glyphs() -> Glyphs:
    """Draw every character that at least 8 of the faces cover, in all faces that cover it: about 3 seconds."""
    fonts = [FT2Font(str(Path(get_data_path(), "fonts", "ttf", f"{face}.ttf"))) for face in FACES]
    for font in fonts:
        font.set_size(EM, 72)
    # The character map tells what a face covers; for anything else it would draw a box.
    codes_of_face = [set(font.get_charmap()) for font in fonts]
    faces_of_code = Counter(code for codes in codes_of_face for code in codes)
    codes = sorted(code for code, faces in faces_of_code.items() if faces >= MIN_FACES and is_drawn(code))
    codes = distinct_characters(fonts, codes_of_face, codes)

    images = np.zeros((len(codes), len(FACES), SIZE, SIZE), np.uint8)
    for face, font in enumerate(fonts):
        for row, code in enumerate(codes):
            if code in codes_of_face[face]:
                draw(font, code, images[row, face])
    pictures = torch.from_numpy(images)
    return Glyphs([chr(code) for code in codes], pictures, pictures.flatten(2).amax(dim=2) > 0)


def is_drawn(code: int) -> bool:
    """Letters, numbers, punctuation and symbols; not spaces, controls, and marks that need a letter."""
    return unicodedata.category(chr(code))[0] in "LNPS"


def distinct_characters(fonts: list[FT2Font], codes_of_face: list[set[int]], codes: list[int]) -> list[int]:
    """Keep one of the characters whose outlines coincide in some face, the lowest: nobody could tell them apart.

    Latin A, Greek Alpha and Cyrillic A are one outline, for instance, and so one class.
    """
    same_as = {code: code for code in codes}  # towards a lower code that looks the same, or itself

    def lowest(code: int) -> int:
        while same_as[code] != code:
            code = same_as[code]
        return code

    drawn = set()
    for font, covered in zip(fonts, codes_of_face, strict=True):
        first_with: dict[bytes, int] = {}
        for code in codes:
            if code in covered:
                font.load_char(code, flags=LoadFlags.NO_HINTING)
                vertices, kinds = font.get_path()
                if len(kinds):
                    drawn.add(code)
                    other = first_with.setdefault(vertices.tobytes() + kinds.tobytes(), code)
                    low, high = sorted((lowest(other), lowest(code)))
                    same_as[high] = low
    return [code for code in codes if code in drawn and same_as[code] == code]


def draw(font: FT2Font, code: int, canvas: np.ndarray) -> None:
    """Draw a character in the middle of `canvas [24, 24]`, on its baseline; what sticks out is cut off."""
    top = BASELINE - math.ceil(font.load_char(code, flags=LoadFlags.NO_HINTING).bbox[3] / 64)
    font.set_text(chr(code), 0.0, flags=LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap()
    ink = font.get_image()
    left = (SIZE - ink.shape[1]) // 2
    ink = ink[max(-top, 0) :, max(-left, 0) :]
    place = canvas[max(top, 0) :, max(left, 0) :]
    rows, columns = min(len(ink), len(place)), min(ink.shape[1], place.shape[1])
    place[:rows, :columns] = ink[:rows, :columns]


def normalize(images: Tensor) -> Tensor:
    """Grey values 0 to 255 as floats from -1 to 1."""
    return images.float() / 127.5 - 1


def occlude(images: Tensor, clutter: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cover a random rectangle of every picture with the same part of another one.

    Args:
        images: `[B, 1, 24, 24]`.
        clutter: `[B, 1, 24, 24]`, what to cover them with.
        share: in [0, 1], of each picture within its margin, to cover.
        generator: the source of randomness.

    Returns:
        images `[B, 1, 24, 24]`, and visibility maps `[B, 1, 6, 6]` at the resolution of the features, 1 where a
        location is visible to 0 where it is covered.
    """
    inner, batch = SIZE - 2 * MARGIN, len(images)
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    aspect = torch.empty(batch, **on_cpu).uniform_(0.5, 2.0, generator=generator)
    height = (share * aspect).sqrt().mul(inner).clamp(max=inner).round()
    width = (share / aspect).sqrt().mul(inner).clamp(max=inner).round()
    corner = torch.rand(2, batch, generator=generator, **on_cpu)
    top = MARGIN + (corner[0] * (inner + 1 - height)).floor()
    left = MARGIN + (corner[1] * (inner + 1 - width)).floor()
    pixel = torch.arange(SIZE, device="cpu")
    rows = (pixel >= top[:, None]) & (pixel < (top + height)[:, None])
    columns = (pixel >= left[:, None]) & (pixel < (left + width)[:, None])
    covered = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
    visibility = F.avg_pool2d((~covered).float(), SIZE // CELLS)
    return torch.where(covered, clutter, images), visibility


def misalign(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every picture `[B, 1, 24, 24]` by up to 2 pixels each way, scale it by up to 10 %, turn it by up to 8°."""

    def draw(most: float) -> Tensor:
        return torch.empty(len(images), dtype=torch.float32, device="cpu").uniform_(-most, most, generator=generator)

    angle, scale, shift = draw(math.radians(8)), 1 + draw(0.1), 2 * 2 / SIZE  # of the affine grid, -1 to 1
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cosine, -sine, draw(shift)], dim=1), torch.stack([sine, cosine, draw(shift)], dim=1)
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(images.dtype)
