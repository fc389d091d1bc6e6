"""From stored values to display values, as curves over the range of stored values: one policy, and published presets.

The policy, `PREPROCESS_ID`: more than 8 bits, and every DICOM: modality LUT or rescale, then VOI LUT, else window,
else percentiles 0.5 to 99.5 of the pixels that are not padding; inverted once, last, where the photometric
interpretation says so. The presets of `EQUALISED` do to the same files what two datasets did before they published
JPEGs. Each step maps a value without looking at its neighbours, so a recipe is one table with an entry per stored
value. 8-bit PNG and JPEG do not come here: they stay as they are. Curves return [0, 255], those of the policy before
rounding.
"""

from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8

from hilum.core.errors import UnknownNameError

PREPROCESS_ID = "hilum-grey-1"
PERCENTILES = (0.5, 99.5)
WHITE = 255.0


def luma(colour: np.ndarray) -> np.ndarray:
    """Grey (H, W) from red, green, blue (H, W, 3), uint8 or uint16; pixels with equal channels keep their value.

    Weights 0.299, 0.587, 0.114 (ITU-R BT.601), as in JPEG's own luma.
    """
    return cv2.cvtColor(np.ascontiguousarray(colour), cv2.COLOR_RGB2GRAY)


def over_black(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Drop an alpha channel by showing the image over black; opaque pixels keep their value."""
    opaque = int(np.iinfo(alpha.dtype).max)
    if int(alpha.min()) == opaque:
        return grey
    return cv2.multiply(grey, np.ascontiguousarray(alpha), scale=1 / opaque)


def window(values: Float[np.ndarray, " n"], center: float, width: float, function: str) -> Float[np.ndarray, " n"]:
    """A DICOM window as a curve (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Args:
        values: modality values, ascending or not.
        center: window centre.
        width: window width; > 0, and for LINEAR at least 1.
        function: "LINEAR" (the form with -0.5 and -1), "LINEAR_EXACT" or "SIGMOID".
    """
    if function == "SIGMOID":
        return WHITE / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    if width == 0:
        return np.where(values > center, WHITE, 0.0)
    return np.clip((values - center) / width + 0.5, 0.0, 1.0) * WHITE


def lookup(values: Float[np.ndarray, " n"], table: Float[np.ndarray, " m"], first: float) -> Float[np.ndarray, " n"]:
    """A DICOM lookup table: entry 0 belongs to the value `first`; values outside take the nearest end."""
    positions = np.clip(np.rint(values - first), 0, len(table) - 1).astype(np.int64)
    return table[positions]


def histogram(index: np.ndarray, length: int) -> Integer[np.ndarray, " n"]:
    """How many pixels have each table position, counted in strips so that little memory is needed."""
    counts = np.zeros(length, np.int64)
    flat, strip = index.reshape(-1), 2**22
    for start in range(0, flat.size, strip):
        counts += np.bincount(flat[start : start + strip], minlength=length)
    return counts


def percentile_bounds(
    values: Float[np.ndarray, " n"], counts: Integer[np.ndarray, " n"], percentiles: tuple[float, float] = PERCENTILES
) -> tuple[float, float]:
    """Percentiles of pixels given as a histogram; linear interpolation between order statistics, as numpy's default.

    Args:
        values: pixel values, any order.
        counts: how many pixels have each; at least one in all.
        percentiles: in percent.
    """
    order = np.argsort(values, kind="stable")
    ordered, cumulative = values[order], np.cumsum(counts[order])
    bounds = []
    for percentile in percentiles:
        rank = percentile / 100.0 * (cumulative[-1] - 1)
        below, above = np.floor(rank), np.ceil(rank)
        low, high = (ordered[np.searchsorted(cumulative, index, side="right")] for index in (below, above))
        bounds.append(float(low + (rank - below) * (high - low)))
    return bounds[0], bounds[1]


def stretch(values: Float[np.ndarray, " n"], low: float, high: float) -> Float[np.ndarray, " n"]:
    """Linear from [low, high] to [0, 255], clipped; a constant image becomes 0."""
    if high <= low:
        return np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0.0, 1.0) * WHITE


def quantise(values: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Round (not truncate) values in [0, 255] to uint8."""
    return np.rint(np.clip(values, 0.0, WHITE)).astype(np.uint8)


def mimic_cxr_jpg(
    values: Float[np.ndarray, " n"], counts: Integer[np.ndarray, " n"], inverted: bool
) -> Float[np.ndarray, " n"]:
    """What MIMIC-CXR-JPG did to its DICOM (MIT-LCP/mimic-cxr#16): lowest to highest value, truncated, equalised.

    Args:
        values: stored values, as they are in the file: no modality LUT, no window, padding like any other.
        counts: how many pixels have each; at least one in all.
        inverted: MONOCHROME1.
    """
    used = values[counts > 0]
    low, high = used.min(), used.max()
    grey = np.zeros_like(values) if high == low else np.floor((values - low) / (high - low) * WHITE)
    return equalise(WHITE - grey if inverted else grey, counts)


def chexpert(
    values: Float[np.ndarray, " n"], counts: Integer[np.ndarray, " n"], inverted: bool
) -> Float[np.ndarray, " n"]:
    """What CheXpert did to its DICOM (stanfordmlgroup/chexpert-labeler#11): 0 to highest value, rounded, equalised.

    Arguments as `mimic_cxr_jpg`. Negative values lose their sign.
    """
    high = values[counts > 0].max()
    grey = np.zeros_like(values) if high == 0 else np.minimum(np.rint(np.abs(values * (WHITE / high))), WHITE)
    return equalise(WHITE - grey if inverted else grey, counts)


def equalise(grey: Float[np.ndarray, " n"], counts: Integer[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Global histogram equalisation, as OpenCV's equalizeHist: the lowest grey that occurs becomes 0.

    Args:
        grey: whole numbers from 0 to 255.
        counts: how many pixels have each.
    """
    levels = np.clip(grey, 0, WHITE).astype(np.int64)  # values that no pixel has may lie outside
    pixels = np.zeros(256, np.int64)
    np.add.at(pixels, levels, counts)
    first = int(np.flatnonzero(pixels)[0])
    above = int(pixels.sum() - pixels[first])
    if above == 0:  # one grey only: it stays
        return grey
    table = np.rint((np.cumsum(pixels) - pixels[first]).astype(np.float32) * (np.float32(WHITE) / np.float32(above)))
    return np.clip(table, 0, WHITE).astype(np.float64)[levels]


Equalise = Callable[[np.ndarray, np.ndarray, bool], np.ndarray]

EQUALISED: dict[str, Equalise] = {
    "mimic-cxr-jpg-1": mimic_cxr_jpg,
    "chexpert-1": chexpert,
    "chexfound-1": mimic_cxr_jpg,  # its heads were trained on MIMIC-CXR-JPG; how squares are normalised is its own
}
"""Recipe -> its curve."""
RECIPES: tuple[str, ...] = (PREPROCESS_ID, *EQUALISED)


def equaliser(recipe: str) -> Equalise | None:
    """The curve of a published preset; None for the policy of this module.

    Raises:
        UnknownNameError: no such recipe.
    """
    if recipe not in RECIPES:
        raise UnknownNameError("intensity recipe", recipe, RECIPES)
    return EQUALISED.get(recipe)
