"""A picture of a search: the images of the query, and the studies that were found with their labels."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from hilum.core.types import RESEARCH_NOTICE
from hilum.data.images import shrink

SIDE, GAP, TEXT = 256, 12, 15
"""Pixels: of a picture, between pictures, of a letter."""
LINES = 5
"""Of text below a picture."""
ACROSS = 4
BACKGROUND, FRAME, WORDS, QUIET, BRIGHT = (16, 18, 22), (52, 58, 68), (226, 230, 236), (150, 158, 170), (122, 200, 255)


class Case(NamedTuple):
    """One picture of a sheet."""

    pixels: UInt8[np.ndarray, "H W"] | None
    """None: the image is not at hand."""
    title: str
    labels: tuple[str, ...] = ()
    """Findings that are known to be there."""


def draw_sheet(query: Sequence[Case], found: Sequence[Case], finding: str | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """The query's images in a row, and below them what was found, the most similar first, four in a row.

    Args:
        query: its images.
        found: in order.
        finding: that was searched by: it is bright wherever a study has it. None: the whole image.
    """
    line, font = TEXT + 4, ImageFont.load_default(TEXT)
    found = [case._replace(labels=tuple(sorted(case.labels, key=lambda name: name != finding))) for case in found]
    rows = [cases[start : start + ACROSS] for cases in (query, found) for start in range(0, len(cases), ACROSS)]
    heights = [SIDE + GAP + line * (2 + max(len(_wrapped(case.labels, font)) for case in cases)) for cases in rows]
    picture = Image.new("RGB", (GAP + ACROSS * (SIDE + GAP), 2 * GAP + line + sum(heights)), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, GAP), f"Similar by {finding or 'the whole image'}. {RESEARCH_NOTICE}", QUIET, font)
    for number, cases in enumerate(rows):
        for place, case in enumerate(cases):
            left, top = GAP + place * (SIDE + GAP), 2 * GAP + line + sum(heights[:number])
            _draw_pixels(picture, pen, font, case, left, top)
            pen.text((left, top + SIDE + 4), _cut(case.title, font), WORDS, font)
            for row, names in enumerate(_wrapped(case.labels, font), 1):
                start = float(left)
                for name in names:
                    colour = BRIGHT if name.rstrip(",") == finding else QUIET
                    pen.text((start, top + SIDE + 4 + row * line), name, colour, font)
                    start += font.getlength(name + " ")
    return np.asarray(picture)


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The picture as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def _draw_pixels(picture: Image.Image, pen: ImageDraw.ImageDraw, font: object, case: Case, left: int, top: int) -> None:
    pen.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline=FRAME)
    if case.pixels is None:
        pen.text((left + 8, top + 8), "image not at hand", QUIET, font)  # type: ignore[arg-type]
        return
    shorter = round(SIDE * min(case.pixels.shape) / max(case.pixels.shape))
    small = Image.fromarray(shrink(case.pixels, max(shorter, 1)))
    if max(small.size) != SIDE:  # smaller than the place, or a pixel off
        scale = SIDE / max(small.size)
        small = small.resize((max(round(small.width * scale), 1), max(round(small.height * scale), 1)))
    picture.paste(small.convert("RGB"), (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as fits below a picture."""
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength(text + "…") > SIDE:
        text = text[:-1]
    return text + "…"


def _wrapped(labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[list[str]]:
    """Labels in lines that fit below a picture, with their commas; the last line says how many are left."""
    lines: list[list[str]] = []
    for number, label in enumerate(labels):
        text = label if number == len(labels) - 1 else f"{label},"
        if lines and font.getlength(" ".join([*lines[-1], text])) <= SIDE:
            lines[-1].append(text)
        else:
            lines.append([_cut(text, font)])
    if len(lines) < LINES:
        return lines
    hidden = sum(len(line) for line in lines[LINES - 2 :])
    return [*lines[: LINES - 2], [f"and {hidden} more"]]
