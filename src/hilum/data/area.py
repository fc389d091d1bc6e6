"""Shrinking by area, from full precision, rounding once: into the store (`resize_once`), and crops for pretraining.

Small images, and ratios that are whole numbers, go into the store by OpenCV's INTER_AREA. Otherwise OpenCV sums pixel
by pixel, which takes about as long as decoding the JPEG; `area_mean` gets the same weights by matrix products, about
four times faster. The weights are separable and each output line needs few input lines, so a few lines at a time are
one small product. The two differ only in the rounding of exact halves. Nothing here grows an image.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Integer, Num, UInt8
from numpy.lib.stride_tricks import as_strided

from hilum.data.intensity import quantise

LARGE = 2**20
"""Pixels from which the area mean by matrix products is faster than OpenCV's, where the ratio is not whole."""
PRODUCT = 2**18
"""Multiplications in one matrix product: few enough that no library starts threads for it."""
CONVERTED = 3 * 2**16
"""Pixels that are floating point at a time: less than a megabyte, which stays in the cache."""
COLUMN_BLOCK, ROW_BLOCK = 16, 8
"""Output columns of one product (a vector register's), and its output rows at most."""
COLUMN_BLOCKS, ROWS = 32, 256
"""Blocks of columns in one call, and output rows at most between the two axes."""


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
            pixels = cv2.convertScaleAbs(area_mean(pixels, height, width))  # rounds to nearest; nothing is negative
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
        pixels: uint8, or the same values as float32, which saves a conversion.
        height: rows of the result, at most those of `pixels`.
        width: columns of the result, at most those of `pixels`.
    """
    rows, cols = pixels.shape
    block, together, convert = ROW_BLOCK, ROWS, pixels.dtype != np.float32
    while block > 1 and block * (block * rows / height + 1) * cols > PRODUCT:
        block //= 2
    while together > block and together * COLUMN_BLOCK**2 * (cols / width + 1) > PRODUCT:
        together //= 2
    if convert:
        together = min(together, int(CONVERTED * height / pixels.size))
    groups_of = _few_groups if pixels.size >= LARGE else _many_groups
    row_groups = groups_of(rows, height, block, max(1, min(together // block, ceil(height / block))))
    column_groups = groups_of(cols, width, COLUMN_BLOCK, min(COLUMN_BLOCKS, ceil(width / COLUMN_BLOCK)))
    if convert:
        buffer = np.empty((max(group.stop - group.start for group in row_groups), cols), np.float32)
    result = np.empty((height, ceil(width / COLUMN_BLOCK) * COLUMN_BLOCK), np.float32)
    for first, last, start, stop, step, weights in row_groups:
        lines = pixels[start:stop]
        if convert:
            buffer[: stop - start] = lines
            lines = buffer
        windows = as_strided(lines, (*weights.shape[:2], cols), (step * lines.strides[0], *lines.strides))
        _shrink_columns(np.matmul(weights.transpose(0, 2, 1), windows), column_groups, out=result[first:last])
    return result[:, :width]


def _shrink_columns(
    values: Float[np.ndarray, "blocks block W"], groups: "tuple[_Group, ...]", out: Float[np.ndarray, "h w"]
) -> None:
    """The second half of `area_mean`, on the rows that `out` has of those in `values`."""
    row = values.strides[1]
    for first, _, start, _, step, weights in groups:
        blocks, length, block = weights.shape
        shape, strides = (blocks, len(out), length), (4 * step, row, 4)
        windows = np.ndarray(shape, np.float32, values, 4 * start, strides)  # as_strided, but several times faster
        part = out[:, first : first + blocks * block].reshape(-1, blocks, block)
        np.matmul(windows, weights, out=part.transpose(1, 0, 2))


class _Group(NamedTuple):
    """Blocks of output lines that one call makes: a block is the product of its weights and a window of input lines."""

    first: int
    """First output line."""
    last: int
    """Its end."""
    start: int
    """First input line that is needed."""
    stop: int
    """Its end."""
    step: int
    """Input lines from the start of a block's window to that of the next."""
    weights: Float[np.ndarray, "blocks length block"]
    """For each block, input lines of its window x output lines; zero where the last block has fewer lines."""


def _groups(old: int, new: int, block: int, together: int) -> tuple[_Group, ...]:
    """How `new` lines are made of `old`: groups of `together` blocks of `block` output lines.

    The windows of a group have one length and are evenly spaced, so that a whole group is one call.
    """
    scale, groups = old / new, []
    for first in range(0, new, block * together):
        last = min(first + block * together, new)
        blocks = ceil((last - first) / block)
        edges = np.minimum(np.arange(first, first + blocks * block + 1), last) * scale
        ends = np.ceil(edges[block::block] - 1e-9).astype(int)
        start, stop, step = int(edges[0] + 1e-9), int(ends[-1]), int(block * scale)
        while True:
            starts = start + step * np.arange(blocks)
            length = int((ends - starts).max())
            if starts[-1] + length <= stop:
                break
            step -= 1  # until no window reaches past the input
        lines = starts[:, None, None] + np.arange(length)[:, None]
        low, high = edges[:-1].reshape(blocks, 1, block), edges[1:].reshape(blocks, 1, block)
        overlap = np.minimum(high, lines + 1) - np.maximum(low, lines)
        weights = (np.maximum(overlap, 0) / scale).astype(np.float32)
        groups.append(_Group(first, last, start, stop, step, weights))
    return tuple(groups)


_few_groups = lru_cache(maxsize=64)(_groups)
"""For originals, whose weights are large."""
_many_groups = lru_cache(maxsize=2048)(_groups)
"""For crops, which have any of several hundred sizes."""
