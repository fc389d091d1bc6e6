"""Pixels of one image to what a backbone takes: resize, crops, and the one normalisation. CPU reference, one channel.

Works on uint8 grey arrays from the store; `normalise` is the only place where pixels become floating point, on the
device of the batch. Augmentation for pretraining is `pretraining/crops.py`; decoding is `data/images.py`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from jaxtyping import Float, Real, UInt8

from hilum.core.errors import ConfigError, PreprocessingMismatchError
from hilum.data.area import area_mean
from hilum.data.intensity import RECIPES

if TYPE_CHECKING:
    from torch import Tensor

CROP_TRIES = 10


@dataclass(frozen=True)
class Preprocessing:
    """A normalisation recipe, recorded by id with every model."""

    id: str
    """Name in `PREPROCESSING`."""
    mean: float
    """Subtracted from pixels in [0, 1]."""
    std: float
    """Divides what is left."""
    own_range: bool = False
    """Each square is stretched from its own lowest and highest value to [0, 1] first. Never in Hilum's own training:
    for heads that were trained so (RPIDIAL/CheXFound, data/transforms.py)."""


PREPROCESSING: dict[str, Preprocessing] = {
    name: Preprocessing(name, mean=0.5, std=0.25, own_range=name == "chexfound-1") for name in RECIPES
}
"""One normalisation, whatever recipe of intensity.py made the pixels: the id says both."""


def preprocessing(id: str) -> Preprocessing:  # noqa: A002
    """Look up a recipe.

    Raises:
        PreprocessingMismatchError: this version does not know it.
    """
    if id not in PREPROCESSING:
        raise PreprocessingMismatchError(
            f"The model was trained with preprocessing {id!r}; this version of Hilum knows "
            f"{', '.join(sorted(PREPROCESSING))}. Its predictions would be wrong with any other: use the version that "
            "wrote the model."
        )
    return PREPROCESSING[id]


def normalise(batch: 'UInt8[Tensor, "B 1 H W"]', recipe: Preprocessing) -> 'Float[Tensor, "B 1 H W"]':
    """(pixel / 255 - mean) / std in float32, on the batch's device: one fixed recipe, never a crop's own range.

    The exception is an imported recipe with `own_range`; a square of one grey is black there (the code that it comes
    from divides zero by zero).
    """
    if recipe.own_range:
        low, high = batch.amin(dim=(-2, -1), keepdim=True).float(), batch.amax(dim=(-2, -1), keepdim=True).float()
        return (batch.float() - low) / ((high - low).clamp(min=1) * recipe.std) - recipe.mean / recipe.std
    return batch.float() * (1 / (255 * recipe.std)) - recipe.mean / recipe.std


def resize(pixels: UInt8[np.ndarray, "H W"], height: int, width: int) -> UInt8[np.ndarray, "height width"]:
    """Resize per axis: area average where the axis shrinks, cubic where it grows.

    Raises:
        ConfigError: an empty image or target.
    """
    rows, columns = pixels.shape
    if min(rows, columns, height, width) < 1:
        raise ConfigError(f"Cannot resize {rows} x {columns} pixels to {height} x {width} (height x width).")
    if (rows, columns) == (height, width):
        return pixels
    if height <= rows and width <= columns:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    if height >= rows and width >= columns:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    shrunk = cv2.resize(pixels, (min(width, columns), min(height, rows)), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def shrink(pixels: Real[np.ndarray, "H W"], height: int, width: int) -> UInt8[np.ndarray, "height width"]:
    """`resize` for training views, where both axes shrink and speed matters: the same area weights, twice as fast.

    Equal to `resize` but for ties in rounding.

    Args:
        pixels: at least `height` x `width`; uint8, or the same values as float32, which saves a conversion.
        height: rows of the result.
        width: columns of the result.
    """
    return cv2.convertScaleAbs(area_mean(pixels, height, width))  # rounds to nearest


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the box (top, left, height, width) of a random resized crop, in pixels of the source.

    The distribution is the usual one (Szegedy 2015; pytorch/vision transforms.RandomResizedCrop): area uniform in
    `scale` of the image, aspect (width / height) log-uniform in `ratio`, 10 tries, then the largest centred box whose
    aspect is allowed.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        u, v, top_at, left_at = rng.random(4).tolist()
        target = area * (scale[0] + (scale[1] - scale[0]) * u)
        aspect = math.exp(low + (high - low) * v)
        box_width, box_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(top_at * (height - box_height + 1)), int(left_at * (width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = min(width, max(round(height * aspect), 1))
    box_height = min(height, max(round(width / aspect), 1))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(
    pixels: UInt8[np.ndarray, "H W"],
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "size size"]:
    """Cut a random box (`crop_box`) and resize it to a square of `size` pixels."""
    rows, columns = pixels.shape
    top, left, height, width = crop_box(rows, columns, scale, ratio, rng)
    return resize(pixels[top : top + height, left : left + width], size, size)


def evaluation_crop(pixels: UInt8[np.ndarray, "H W"], size: int) -> UInt8[np.ndarray, "size size"]:
    """Shorter side to `size`, then the centre square."""
    rows, columns = pixels.shape
    short = min(rows, columns)
    if short < 1:
        raise ConfigError(f"Cannot crop an image of {rows} x {columns} pixels.")
    height, width = max(round(rows * size / short), size), max(round(columns * size / short), size)
    resized = resize(pixels, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(resized[top : top + size, left : left + size])
