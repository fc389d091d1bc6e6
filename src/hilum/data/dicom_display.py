"""From the stored values of a DICOM image to display values, as its header asks: the curve that dicom.py applies.

Order: modality LUT or rescale; VOI LUT, else the first window, else percentiles of the pixels that are not padding.
Polarity comes after, once, in dicom.py. What a header asks for and cannot be done is left out with a flag.
Reference: PS3.3 C.11.1 (modality), C.11.2 (VOI), C.7.5.1.1.2 (padding), C.7.6.3.1.7 (aspect).
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from pydicom import Dataset
from pydicom.pixels import apply_color_lut

from hilum.core.errors import UnsupportedImageError
from hilum.data import intensity


def levels(stored: Integer[np.ndarray, "H W"]) -> tuple[Integer[np.ndarray, "H W"], Float[np.ndarray, " n"]]:
    """The position of each pixel's value in a table, and the stored values of that table, ascending."""
    smallest, largest = int(stored.min()), int(stored.max())
    if largest - smallest < 2**16:
        fits_already = smallest == 0 and stored.dtype.itemsize <= 2
        index = stored if fits_already else (stored.astype(np.int64) - smallest).astype(np.uint16)
        return index, np.arange(smallest, largest + 1, dtype=np.float64)
    found, positions = np.unique(stored, return_inverse=True)
    return positions.reshape(stored.shape), found.astype(np.float64)


def fits(dataset: Dataset, smallest: float, largest: float) -> bool:
    """Whether all stored values fit in Bits Stored."""
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation"))
    return bool(largest < 2.0 ** (bits - signed) and smallest >= (-(2.0 ** (bits - 1)) if signed else 0))


def padding_levels(dataset: Dataset, values: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which stored values mean "nothing here" (Pixel Padding Value, with its range limit)."""
    first = _number(dataset.get("PixelPaddingValue"))
    if first is None:
        return np.zeros(len(values), bool)
    last = _number(dataset.get("PixelPaddingRangeLimit"))
    if dataset.get("PixelRepresentation"):
        wrap = 2.0 ** int(dataset.BitsAllocated)
        first, last = (end - wrap if end is not None and end >= wrap / 2 else end for end in (first, last))
        assert first is not None, "only None stays None"
    ends = sorted((first, first if last is None else last))
    return (values >= ends[0]) & (values <= ends[1])


def display_curve(
    dataset: Dataset, stored: Float[np.ndarray, " n"], counts: np.ndarray, flags: list[str]
) -> tuple[Float[np.ndarray, " n"], str]:
    """Display value in [0, 255] of every stored value, before polarity; and which rule gave it. Adds to `flags`."""
    values = _modality(dataset, stored, flags)
    used = values[counts > 0]
    if not used.size:
        return np.zeros_like(values), "percentile"
    table = _table(dataset, "VOILUTSequence", flags)
    if table is not None:
        entries, first, bits = table
        top = 2.0 ** max(bits, int(entries.max()).bit_length()) - 1.0
        return intensity.lookup(values, entries, first) * (intensity.WHITE / top), "voi_lut"
    center, width = _number(dataset.get("WindowCenter")), _number(dataset.get("WindowWidth"))
    function = text(dataset.get("VOILUTFunction")).upper() or "LINEAR"
    if center is not None and width is not None:
        possible = width > 0 and (function != "LINEAR" or width >= 1)
        if possible and center + width / 2 >= used.min() and center - width / 2 <= used.max():
            return intensity.window(values, center, width, function), "window"
        flags.append("window_ignored")
    elif "WindowCenter" in dataset or "WindowWidth" in dataset:
        flags.append("window_ignored")
    return intensity.stretch(values, *intensity.percentile_bounds(values, counts)), "percentile"


def _modality(dataset: Dataset, stored: Float[np.ndarray, " n"], flags: list[str]) -> Float[np.ndarray, " n"]:
    table = _table(dataset, "ModalityLUTSequence", flags)
    if table is not None:
        return intensity.lookup(stored, table[0], table[1])
    slope, intercept = _number(dataset.get("RescaleSlope")), _number(dataset.get("RescaleIntercept"))
    if slope == 0:
        flags.append("rescale_ignored")
        return stored
    return stored * (1.0 if slope is None else slope) + (intercept or 0.0)


def _table(dataset: Dataset, keyword: str, flags: list[str]) -> tuple[Float[np.ndarray, " m"], float, int] | None:
    """Entries, first mapped value and bits of the first item of a LUT sequence; None where it is absent or unusable."""
    sequence = dataset.get(keyword)
    if not sequence:
        return None
    item = sequence[0]
    try:
        length, first, bits = (int(value) for value in item.LUTDescriptor)
        data = item.LUTData
        length = length or 2**16
        if isinstance(data, bytes):
            order = "<" if dataset.original_encoding[1] else ">"
            data = np.frombuffer(data, np.uint8 if len(data) < 2 * length else f"{order}u2")
        entries = np.asarray(data, np.float64).ravel()[:length]
    except (AttributeError, TypeError, ValueError):
        entries = np.zeros(0)
    if not entries.size:
        flags.append("lut_ignored")
        return None
    return entries, float(first), bits


def square_size(dataset: Dataset, rows: int, cols: int, flags: list[str]) -> tuple[int, int]:
    """Size with square pixels: the axis with the finer pixels shrinks."""
    for keyword in ("PixelAspectRatio", "ImagerPixelSpacing", "PixelSpacing"):
        pair = dataset.get(keyword)
        if isinstance(pair, str | bytes) or pair is None or not hasattr(pair, "__len__") or len(pair) != 2:
            continue
        tall, wide = _number(pair[0]), _number(pair[1])
        if tall is None or wide is None or tall <= 0 or wide <= 0 or not 0.2 <= tall / wide <= 5:
            if "aspect_ignored" not in flags:
                flags.append("aspect_ignored")
            continue
        if abs(tall / wide - 1) > 0.01:
            flags.append("aspect_corrected")
            return (
                (rows, max(1, round(cols * wide / tall))) if tall > wide else (max(1, round(rows * tall / wide)), cols)
            )
        return rows, cols
    return rows, cols


def _number(value: Any) -> float | None:
    """First value of an element as a finite number; None where there is none."""
    if not isinstance(value, str | bytes) and hasattr(value, "__len__"):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def text(value: Any) -> str:
    """An element as text; "" where it is absent."""
    return "" if value is None else str(value).strip()


def grey_from_colour(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Display values of RGB (H, W, 3) or palette (H, W) pixels: their luma; more than 8 bits are not yet rounded."""
    if stored.ndim == 2:
        stored = apply_color_lut(stored, dataset)
    if stored.dtype not in (np.uint8, np.uint16):
        raise UnsupportedImageError("unsupported_pixels", f"colour pixels of type {stored.dtype}.")
    if stored.dtype == np.uint8:
        return intensity.luma(stored)
    top = float(2 ** max(int(stored.max()).bit_length(), 8) - 1)
    return intensity.luma(stored).astype(np.float32) * np.float32(intensity.WHITE / top)
