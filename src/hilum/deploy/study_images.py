"""The images of one study as people hand them over, and what is made of them for `Model.predict`: pixels, views, a
table, the part that was looked at, maps. Decides nothing about findings.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

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
    """Whether there are maps of a finding; those that no network was trained for are NaN."""
    return bool(views) and all(np.isfinite(view[column]).all() for view in views)


def study_embedding(cls: Float32[np.ndarray, "V D"]) -> Float32[np.ndarray, " D"]:
    """One direction for a study: the mean of its views' embeddings, each of length 1, and of length 1 itself."""
    whole = cls.astype(np.float64)
    whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
    mean = whole.mean(axis=0)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


class Part(NamedTuple):
    """What one network of a model says of the images of one study, findings in the order of the model."""

    values: Float[np.ndarray, "V C"]
    """Raw probabilities; NaN where it was never trained."""
    maps: Float[np.ndarray, "V C _ _"] | None
    """Where they came from, if asked for."""
    share: float
    """Its weight in the model."""
    together: Bool[np.ndarray, " C"]
    """Where its head looks at whole studies; the maps then sum to 1 over the study, otherwise over each image."""


def mean_of_maps(parts: Sequence[Part], weights: Float[np.ndarray, " V"]) -> list[Float[np.ndarray, "C h w"]]:
    """Weighted mean of the maps of several networks, on the finest grid among them; one for each view.

    Each sums to 1 over its view; over the study, if any head of a network looks at whole studies: then the maps of the
    others take the weight of their view in the study. A finding is NaN that no network was trained for, or has maps of.

    Args:
        parts: of each network; those without maps, or without a share, are left out.
        weights: of the views by the model's study rule; they add up to 1.
    """
    shown = [(part, part.maps) for part in parts if part.maps is not None and part.share]
    if not shown:
        return []
    size = max(maps.shape[2:] for _, maps in shown)
    over_study = any(part.together.any() for part, _ in shown)
    total, mass = np.zeros(()), np.zeros(())
    for part, maps in shown:
        grown = _regrid(maps, size)
        if over_study:
            grown = grown * np.where(part.together, 1, weights[:, None])[:, :, None, None]
        known = ~np.isnan(part.values).all(axis=0) & np.isfinite(grown).all(axis=(0, 2, 3))
        share = part.share * known[:, None, None]
        total, mass = total + share * np.nan_to_num(grown), mass + share
    joined = np.divide(total, mass, out=np.full(total.shape, np.nan), where=np.broadcast_to(mass > 0, total.shape))
    return list(joined)


def _regrid(maps: Float[np.ndarray, "V C _ _"], size: tuple[int, int]) -> Float[np.ndarray, "V C h w"]:
    """Maps on another grid; each keeps its sum."""
    if maps.shape[2:] == size:
        return maps
    planes = maps.reshape(-1, *maps.shape[2:])
    grown = np.stack([cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in planes])
    sums, now = planes.sum(axis=(1, 2)), grown.sum(axis=(1, 2))
    grown *= np.divide(sums, now, out=np.zeros_like(sums), where=now != 0)[:, None, None]
    return grown.reshape(*maps.shape[:2], *size)


def contributions(
    findings: tuple[str, ...], parts: Sequence[Part], weights: Float[np.ndarray, " V"]
) -> dict[str, list[float] | None]:
    """The part of each view in a study's probability; over the views they add up to 1.

    Of a head that reads images alone: weight_v p_v over their sum, with the weights of the study rule. Of one that
    looks at whole studies: the view's share of its maps. Of several networks: their weighted mean.

    Args:
        findings: C names.
        parts: of each network; a head that looks at whole studies and has no maps here is left out.
        weights: of the views by the study rule; they add up to 1.

    Returns:
        None for a finding that was never trained, and where no network says it.
    """
    total, mass = np.zeros((len(weights), len(findings))), np.zeros(len(findings))
    for part in parts:
        of_maps = np.full(part.values.shape, np.nan) if part.maps is None else part.maps.sum(axis=(2, 3))
        views = np.where(part.together, of_maps, weights[:, None] * part.values)
        sums = views.sum(axis=0)
        even = np.repeat(weights[:, None], len(findings), axis=1)
        share = part.share * (~np.isnan(part.values).all(axis=0) & np.isfinite(views).all(axis=0))
        total += share * np.nan_to_num(np.divide(views, sums, out=even, where=sums > 0))
        mass += share
    return {
        name: (total[:, column] / mass[column]).tolist() if mass[column] > 0 else None
        for column, name in enumerate(findings)
    }
