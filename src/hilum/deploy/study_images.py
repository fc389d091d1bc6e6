"""The images of one study as people hand them over, and what is made of them for `Model.predict`: pixels, views, a
table, the part that was looked at, maps. Decides nothing about findings.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hilum.core.errors import ConfigError, ImageError, UnknownNameError, UnsupportedImageError
from hilum.core.types import VIEWS, image_uid
from hilum.data.images import read_dicom_header, read_image, shrink
from hilum.evaluation.predictions import Predictions

Image = Path | str | bytes | np.ndarray
"""A path or the contents of a DICOM, PNG or JPEG file, or uint8 (H, W) pixels."""
Box = tuple[float, float, float, float]
"""Top, left, height, width, as shares of an image's sides."""


def decode(
    view: Image, number: int, short_side: int | None, recipe: str
) -> tuple[UInt8[np.ndarray, "H W"], tuple[str, ...]]:
    """Pixels of one view, shrunk, and what the decoder says of their quality.

    Raises:
        ImageError: the view cannot be used; names it by its position.
    """
    if isinstance(view, np.ndarray):
        if view.dtype != np.uint8 or view.ndim != 2 or view.size == 0:
            raise UnsupportedImageError(
                "unsupported_mode", f"View {number}: expected a uint8 array (H, W), found {view.dtype} {view.shape}."
            )
        return (shrink(view, short_side) if short_side else view), ()
    name = f"view {number}" if isinstance(view, bytes) else f"view {number} ({Path(view).name})"
    decoded = read_image(view if isinstance(view, bytes) else Path(view), name, short_side, recipe=recipe)
    return decoded.pixels, decoded.quality


def view_names_of(views: Sequence[Image], given: Sequence[str] | None) -> list[str]:
    """The view of each image, as given or as its header says.

    Raises:
        ConfigError: another number of names than of images.
        UnknownNameError: no such view.
    """
    if given is None:
        return [_view_of(view) for view in views]
    if isinstance(given, str) or len(given) != len(views):
        raise ConfigError(f"view_names: expected {len(views)}, one for each view; found {given!r}.")
    for name in given:
        if name and name not in VIEWS:
            raise UnknownNameError("view", name, VIEWS)
    return list(given)


def _view_of(view: Image) -> str:
    """What a DICOM header says; any other file says nothing, and a damaged one is found out when it is decoded."""
    if isinstance(view, np.ndarray):
        return "UNKNOWN"
    try:
        position = read_dicom_header(view if isinstance(view, bytes) else Path(view))["ViewPosition"].upper()
    except (ImageError, OSError):
        return "UNKNOWN"
    return position if position in VIEWS else "UNKNOWN"


def as_study(
    probabilities: np.ndarray, pixels: Sequence[np.ndarray], views: Sequence[str], findings: tuple[str, ...]
) -> Predictions:
    """Images of one study as a table; uids follow the content, so that the order of views does not matter."""
    count = len(pixels)
    content = [
        hashlib.sha256(view.encode() + image.tobytes()).hexdigest() for view, image in zip(views, pixels, strict=True)
    ]
    ranks = np.argsort(np.argsort(content, kind="stable"))
    study = image_uid("study", "".join(sorted(content)))
    empty = np.full(count, "", dtype=str)
    return Predictions(
        image_uid=np.array([f"{rank:016d}" for rank in ranks]), image_id=empty,
        study_id=np.full(count, study), patient_id=empty, dataset=empty, view=np.array(views, dtype=str),
        findings=findings, probabilities=probabilities,
    )  # fmt: skip


def by_name(findings: tuple[str, ...], values: np.ndarray) -> dict[str, float | None]:
    """Values by finding; None where there is none (never trained)."""
    return {
        name: None if np.isnan(value) else float(value) for name, value in zip(findings, values.tolist(), strict=True)
    }


def box(pixels: UInt8[np.ndarray, "H W"]) -> Box:
    """The square in the middle, which is what a network sees of an image."""
    height, width = pixels.shape
    short = min(height, width)
    return (1 - short / height) / 2, (1 - short / width) / 2, short / height, short / width


def has_maps(views: Sequence[np.ndarray], column: int) -> bool:
    """Whether there are maps of a finding; those of an extension without maps are NaN."""
    return bool(views) and all(np.isfinite(view[column]).all() for view in views)


def mean_of_maps(
    maps: Sequence[Float[np.ndarray, "B C _ _"]], shares: Sequence[float], views: int
) -> list[Float[np.ndarray, "C h w"]]:
    """Weighted mean of the attention of several networks, on the finest grid among them."""
    if not maps:
        return []
    rows, columns = max(one.shape[2:] for one in maps)
    joined = []
    for view in range(views):
        resized = [
            np.stack([cv2.resize(plane, (columns, rows), interpolation=cv2.INTER_LINEAR) for plane in one[view]])
            for one in maps
        ]
        whole = [planes / planes.sum(axis=(1, 2), keepdims=True) for planes in resized]
        joined.append(np.average(whole, axis=0, weights=shares))
    return joined
