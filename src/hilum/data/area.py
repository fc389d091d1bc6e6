"""Shrinking by area, from full precision, rounding once: what every image goes through on its way into the store.

Small images, and ratios that are whole numbers, by OpenCV's INTER_AREA. Otherwise OpenCV sums pixel by pixel, which
takes about as long as decoding the JPEG; large images get the same weights by matrix products instead, about four
times faster. The weights are separable and each output row needs few input rows, so a few rows at a time are one small
product. The two differ only in the rounding of exact halves. Nothing here grows an image.
"""

from functools import lru_cache
from math import ceil, isqrt

import cv2
import numpy as np
from jaxtyping import Float, Integer, Num, UInt8

from hilum.data.intensity import quantise

LARGE = 2**20
"""Pixels from which the area mean by matrix products is faster than OpenCV's, where the ratio is not whole."""
PRODUCT = 300_000
"""Multiplications in one matrix product: few enough that no library starts threads for it."""


def shrunk_size(shape: tuple[int, ...], short_side: int | None) -> tuple[int, int]:
    """Height and width after `shrink`; unchanged where `short_side` is None or not smaller."""
    height, width = shape
    shorter = min(height, width)
    if short_side is None or shorter <= short_side:
        return height, width
    return round(height * short_side / shorter), round(width * short_side / shorter)


def resize_once(pixels: np.ndarray, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
    """To a size that is not larger, by area, and to uint8, rounding once.

    Args:
        pixels: (H, W), uint8, or float32 display values in [0, 255].
        height: rows of the result.
        width: columns of the result.
    """
    if pixels.shape != (height, width):
        even = pixels.shape[0] % height == 0 and pixels.shape[1] % width == 0
        if even or pixels.size < LARGE:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        else:
            pixels = area_mean(pixels, height, width)
    return np.ascontiguousarray(pixels) if pixels.dtype == np.uint8 else quantise(pixels)


def apply_curve(
    index: Integer[np.ndarray, "H W"], curve: Float[np.ndarray, " n"], height: int, width: int
) -> UInt8[np.ndarray, "h w"]:
    """Display values of an image, shrunk from full precision, rounded once.

    Args:
        index: the position of each pixel's value in `curve`.
        curve: display values in [0, 255].
        height: rows of the result.
        width: columns of the result.
    """
    if index.shape == (height, width):
        return quantise(curve)[index]
    return resize_once(curve.astype(np.float32)[index], height, width)


def area_mean(pixels: Num[np.ndarray, "H W"], height: int, width: int) -> Float[np.ndarray, "h w"]:
    """Shrink by area, without rounding.

    Args:
        pixels: uint8 or float32.
        height: rows of the result, at most those of `pixels`.
        width: columns of the result, at most those of `pixels`.
    """
    rows, cols = pixels.shape
    middle = np.empty((height, cols), np.float32)
    for first, last, start, stop, weights in _bands(rows, height, cols):
        np.matmul(weights, pixels[start:stop].astype(np.float32, copy=False), out=middle[first:last])
    result = np.empty((height, width), np.float32)
    for first, last, start, stop, weights in _bands(cols, width, height):
        np.matmul(middle[:, start:stop], weights.T, out=result[:, first:last])
    return result


@lru_cache(maxsize=64)
def _bands(old: int, new: int, other: int) -> tuple[tuple[int, int, int, int, np.ndarray], ...]:
    """Groups of output lines [first, last), the input lines [start, stop) that they need, and the weights.

    Args:
        old: input lines.
        new: output lines.
        other: length of a line, which decides how many go into one product.
    """
    scale = old / new
    together = max(1, isqrt(int(PRODUCT / (other * scale))))
    edges = np.arange(new + 1) * scale
    bands = []
    for first in range(0, new, together):
        last = min(first + together, new)
        start, stop = int(edges[first]), min(ceil(edges[last]), old)
        lines = np.arange(start, stop)
        overlap = np.minimum(edges[first + 1 : last + 1, None], lines + 1) - np.maximum(edges[first:last, None], lines)
        bands.append((first, last, start, stop, (np.clip(overlap, 0, None) / scale).astype(np.float32)))
    return tuple(bands)
