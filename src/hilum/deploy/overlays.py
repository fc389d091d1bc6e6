"""Maps as pictures: colours over the image that was looked at, as arrays and as PNG.

A map covers `box`, the part of the image that the network saw. It is enlarged smoothly and laid exactly there, strength
is said by colour and by opacity, and all views of a finding share one scale, so that the view that carried it is the
bright one. Colours go from magenta over red and orange to yellow in equal steps of lightness and hue at one chroma
(OKLab, B. Ottosson 2020), so that equal differences look equal, also to eyes that do not tell red from green and in
grey print. What the maps mean: docs/explanation/where-it-looked.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

from hilum.core.errors import ConfigError
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.study_images import Box

LIGHTNESS, HUE, CHROMA = (0.45, 0.93), (330.0, 460.0), 0.14
"""Of the colours in OKLCh, from the weakest to the strongest; hue in degrees."""
CLEAR, FULL = 0.1, 0.9
"""Levels below the first are transparent, above the second as opaque as it gets."""
OPACITY = 0.85
"""Of the strongest colour."""
TILE, GAP, LINE = 288, 12, 22
"""Sides of the pictures of a contact sheet, the space between them and the height of a line of text, pixels."""

Scale = tuple[float, float]
"""Values of a map that are shown as 0 and as 1."""


def _colours() -> UInt8[np.ndarray, "256 3"]:
    """The table, red green blue: lightness and hue in even steps, chroma constant."""
    level = np.linspace(0, 1, 256)
    lightness = LIGHTNESS[0] + (LIGHTNESS[1] - LIGHTNESS[0]) * level
    hue = np.radians(HUE[0] + (HUE[1] - HUE[0]) * level)
    lab = np.stack([lightness, CHROMA * np.cos(hue), CHROMA * np.sin(hue)], axis=1)
    cone = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    linear = np.array([
        [4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])  # fmt: skip
    light = np.clip((lab @ cone.T) ** 3 @ linear.T, 0, 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


COLOURS = _colours()
"""Level 0 .. 255 to red, green, blue."""


def _with_opacity() -> UInt8[np.ndarray, "256 4"]:
    strength = np.clip((np.arange(256) / 255 - CLEAR) / (FULL - CLEAR), 0, 1) ** 0.7
    table = np.concatenate([COLOURS, np.round(255 * OPACITY * strength)[:, None].astype(np.uint8)], axis=1)
    table[table[:, 3] == 0] = 0
    return table


_WITH_OPACITY = _with_opacity()


def of_study(
    maps: Sequence[Float[np.ndarray, "_ _"]], contributions: Sequence[float] | None
) -> list[Float[np.ndarray, "_ _"]]:
    """Maps of one finding, each scaled to sum to what its view contributes, so that views can be compared.

    Maps of a head that looks at whole studies are so already. Without contributions every view counts the same.

    Args:
        maps: one for each view.
        contributions: of the views, adding up to 1 (`StudyResult.contributions`).
    """
    parts = [1 / len(maps)] * len(maps) if contributions is None else contributions
    return [one * (part / one.sum()) if one.sum() > 0 else one for one, part in zip(maps, parts, strict=True)]


def scale_of(maps: Sequence[Float[np.ndarray, "_ _"] | None]) -> Scale:
    """One scale for all views of a finding: from the median over them (nothing) to the highest value (strongest).

    Views that took no part (None, or 0 throughout) are left out.
    """
    values = np.concatenate([np.zeros(0), *(np.ravel(part) for part in maps if part is not None and part.any())])
    return (float(np.median(values)), float(values.max())) if len(values) else (0.0, 0.0)


def placed(
    values: Float[np.ndarray, "h w"],
    box: Box,
    rows: int,
    columns: int,
) -> Float32[np.ndarray, "rows columns"]:
    """A map enlarged over its box in an image: cubic between the centres of its cells (Keys 1981), NaN outside.

    A pixel belongs to the box where its centre does.
    """
    top, left, height, width = box
    down = _cubic(values.shape[0], rows, top, height)
    across = _cubic(values.shape[1], columns, left, width)
    return (down @ values.astype(np.float32) @ across.T).astype(np.float32)


def _cubic(cells: int, pixels: int, start: float, extent: float) -> Float32[np.ndarray, "pixels cells"]:
    """Weights of the cells for each pixel of a side; NaN for pixels outside the box."""
    place = ((np.arange(pixels) + 0.5) / pixels - start) / extent * cells - 0.5
    first = np.floor(place).astype(np.int64)
    weights = np.zeros((pixels, cells), np.float32)
    for offset in (-1, 0, 1, 2):
        away = np.abs(place - (first + offset))
        value = np.where(away <= 1, (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2)
        np.add.at(weights, (np.arange(pixels), np.clip(first + offset, 0, cells - 1)), value * (away < 2))
    weights[(place < -0.5) | (place > cells - 0.5)] = np.nan
    return weights


def heat(
    values: Float[np.ndarray, "h w"],
    box: Box,
    rows: int,
    columns: int,
    scale: Scale | None = None,
) -> UInt8[np.ndarray, "rows columns 4"]:
    """A map as red, green, blue and opacity over the whole image; clear outside the box, and where the map is low.

    Args:
        values: the map, of any scale, on the patch grid.
        box: the part of the image that it covers.
        rows: of the image.
        columns: of the image.
        scale: of the finding over all its views (`scale_of`); None: of this map alone. Without a peak nothing is shown.

    Raises:
        ConfigError: no map, no image, or a box that is none.
    """
    if values.size == 0 or rows < 1 or columns < 1 or not (box[2] > 0 and box[3] > 0) or not np.isfinite(values).all():
        raise ConfigError(f"Cannot draw a map of {values.shape} values in the box {box} of {rows} x {columns} pixels.")
    low, high = scale_of([values]) if scale is None else scale
    if high <= low:
        return np.zeros((rows, columns, 4), np.uint8)
    level = np.clip((placed(values, box, rows, columns) - low) * (255 / (high - low)), 0, 255)
    return _WITH_OPACITY[np.nan_to_num(np.round(level)).astype(np.uint8)]


def overlay(
    pixels: UInt8[np.ndarray, "H W"],
    values: Float[np.ndarray, "h w"],
    box: Box,
    scale: Scale | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """The image with the colours of a map over it, red, green, blue; arguments as `heat`."""
    rows, columns = pixels.shape
    colours = heat(values, box, rows, columns, scale)
    opacity = colours[..., 3:].astype(np.float32) / 255
    mixed = pixels[..., None] * (1 - opacity) + colours[..., :3] * opacity
    return np.round(mixed).astype(np.uint8)


def heat_png(
    values: Float[np.ndarray, "h w"],
    box: Box,
    rows: int,
    columns: int,
    scale: Scale | None = None,
) -> bytes:
    """`heat` as a PNG file with transparency, to be laid over the image."""
    return png(heat(values, box, rows, columns, scale))


def overlay_png(
    pixels: UInt8[np.ndarray, "H W"],
    values: Float[np.ndarray, "h w"],
    box: Box,
    scale: Scale | None = None,
) -> bytes:
    """`overlay` as a PNG file."""
    return png(overlay(pixels, values, box, scale))


def png(picture: UInt8[np.ndarray, "H W ..."]) -> bytes:
    """Grey (H, W), red green blue (H, W, 3), or with opacity (H, W, 4), as a PNG file."""
    turned = picture if picture.ndim == 2 else picture[..., [2, 1, 0, *range(3, picture.shape[2])]]
    done, content = cv2.imencode(".png", turned, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    assert done, "an array of this kind can always be encoded"
    return content.tobytes()


@dataclass(frozen=True)
class SheetRow:
    """One finding on a contact sheet."""

    title: str
    """What is said above its pictures."""
    maps: Sequence[Float[np.ndarray, "_ _"] | None]
    """One for each view; None leaves the place empty."""
    captions: Sequence[str]
    """One for each view."""


def contact_sheet(
    views: Sequence[UInt8[np.ndarray, "_ _"]], boxes: Sequence[Box], names: Sequence[str], rows: Sequence[SheetRow]
) -> UInt8[np.ndarray, "H W 3"]:
    """All views of a study, then finding by finding with its map over each.

    Args:
        views: decoded pixels.
        boxes: of the maps, one for each view.
        names: of the views.
        rows: the findings.
    """
    small = [_fit(pixels) for pixels in views]
    width = GAP + len(views) * (TILE + GAP)
    font = ImageFont.load_default(14)
    head = 2 * LINE + GAP
    block = TILE + 2 * LINE + GAP
    sheet = Image.new("RGB", (max(width, 560), head + (1 + len(rows)) * block), (18, 20, 22))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), RESEARCH_NOTICE, fill=(196, 200, 204), font=ImageFont.load_default(12))
    plain = SheetRow("As it came", [None] * len(views), names)
    for number, row in enumerate([plain, *rows]):
        y = head + number * block
        draw.text((GAP, y), row.title, fill=(240, 242, 244), font=font)
        scale = scale_of(row.maps)
        for place, (pixels, box, part, caption) in enumerate(zip(small, boxes, row.maps, row.captions, strict=True)):
            x = GAP + place * (TILE + GAP)
            shown = np.repeat(pixels[..., None], 3, axis=2) if part is None else overlay(pixels, part, box, scale)
            if part is not None or number == 0:
                at = (x + (TILE - pixels.shape[1]) // 2, y + LINE + (TILE - pixels.shape[0]) // 2)
                sheet.paste(Image.fromarray(shown), at)
            draw.text((x, y + LINE + TILE + 2), caption, fill=(164, 170, 176), font=font)
    return np.asarray(sheet)


def _fit(pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "_ _"]:
    share = TILE / max(pixels.shape)
    size = (max(round(pixels.shape[1] * share), 1), max(round(pixels.shape[0] * share), 1))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if share < 1 else cv2.INTER_CUBIC)
