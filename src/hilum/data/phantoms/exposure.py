"""From path lengths to an 8-bit image: Beer-Lambert, scatter, detector, fixed window, marker, collimation.

Nothing here knows about findings. Every image gets its own technique (`Technique`), drawn once and applied to all maps
of that image, masks included.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from hilum.data.phantoms import textures
from hilum.data.phantoms.anatomy import Array
from hilum.data.phantoms.canvas import View

ATTENUATION = 0.19  # 1 / cm of soft tissue near 70 keV (NIST XCOM: water 0.193)
WINDOW = {"PA": (0.95, 4.75), "AP": (0.95, 4.7), "LATERAL": (1.0, 5.4), "LL": (1.0, 5.4)}
SCATTER = {"PA": 0.10, "AP": 0.2, "LATERAL": 0.14, "LL": 0.14}  # share of the primary, behind the grid or without one
FLOOR = 0.004
THICKNESS = {"PA": 24.0, "AP": 24.0, "LATERAL": 31.0, "LL": 31.0}  # cm of the patient that the windows are made for
AUTOMATIC_EXPOSURE = 0.8


@dataclass(frozen=True)
class Technique:
    """How one image was taken and windowed."""

    tilt: float
    """Rotation in the image plane, radians."""
    exposure: float
    contrast: float
    gamma: float
    detail: float
    noise: float
    scatter: float
    collimation: tuple[float, float, float, float]
    """Dark borders (top, bottom, left, right) as shares of the image."""
    marker: str
    marker_place: tuple[float, float]
    marker_size: float


def draw_technique(rng: np.random.Generator, position: str) -> Technique:
    """The technique of one image; portable AP images vary more."""
    rough = 1.6 if position == "AP" else 1.0
    sides = rng.random(4) < 0.22
    borders = np.where(sides, rng.uniform(0.01, 0.07, 4), 0.0)
    right = rng.random() < 0.5
    frontal = position in ("PA", "AP")
    text = ("R" if right else "L") if frontal else "L"
    x = rng.uniform(0.03, 0.1) if (right or not frontal) else rng.uniform(0.86, 0.93)
    y = rng.uniform(0.06, 0.22)
    size = rng.uniform(0.7, 1.2)
    return Technique(
        tilt=float(rng.normal(0, 0.018 * rough)),
        exposure=float(rng.normal(0, 0.09 * rough)),
        contrast=float(np.clip(rng.normal(1.0, 0.07 * rough), 0.75, 1.3)),
        gamma=float(np.clip(rng.normal(0.72, 0.06), 0.55, 0.95)),
        detail=float(rng.uniform(0.25, 0.7)),
        noise=float(rng.uniform(0.5, 1.0) * rough),
        scatter=float(SCATTER[position] * rng.uniform(0.7, 1.4)),
        collimation=(float(borders[0]), float(borders[1]), float(borders[2]), float(borders[3])),
        marker=text if rng.random() < 0.88 else "",
        marker_place=(float(x), float(y)),
        marker_size=float(size),
    )


def matrix(view: View, technique: Technique) -> Array:
    """(2, 3) affine of the tilt about the central ray."""
    turned = cv2.getRotationMatrix2D(view.centre, float(np.rad2deg(technique.tilt)), 1.0)
    return np.asarray(turned, np.float64)


def expose(path: Array, thickness: float, view: View, technique: Technique, rng: np.random.Generator) -> Array:
    """Soft tissue path (cm, float32) through a trunk of the given thickness (cm) -> uint8 image."""
    height, width = path.shape
    tilted = cv2.warpAffine(path, matrix(view, technique), (width, height), borderMode=cv2.BORDER_REPLICATE)
    tilted = cv2.GaussianBlur(tilted, (0, 0), max(0.035 * view.scale, 0.45))
    primary = cv2.exp(np.maximum(tilted, 0) * np.float32(-ATTENUATION))
    small = cv2.resize(np.minimum(primary, 0.4), (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), 3.0 * view.scale / 8)
    scattered = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    signal = primary + scattered * np.float32(technique.scatter) + np.float32(FLOOR)
    density = -cv2.log(signal)
    low, high = WINDOW[view.position]
    # the automatic exposure follows the patient's thickness, if not fully
    thicker = AUTOMATIC_EXPOSURE * ATTENUATION * (thickness - THICKNESS[view.position])
    middle = (low + high) / 2 + thicker + technique.exposure
    span = (high - low) / technique.contrast
    base = cv2.resize(density, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    base = cv2.resize(
        cv2.GaussianBlur(base, (0, 0), 1.6 * view.scale / 4), (width, height), interpolation=cv2.INTER_LINEAR
    )
    density += np.float32(technique.detail) * np.clip(density - base, -0.5, 0.5)
    noise = textures.pixel_noise(rng, height, width)
    density += noise * np.minimum(np.float32(0.006 * technique.noise) / cv2.sqrt(signal), np.float32(0.08))
    value = np.clip((density - np.float32(middle - span / 2)) * np.float32(1 / span), 0, 1)
    value = value * value * (3 - 2 * value) * np.float32(0.45) + value * np.float32(0.55)  # film's S-curve, weakened
    if technique.gamma != 1.0:
        value = cv2.pow(value, technique.gamma)
    return _finish(np.round(value * 247).astype(np.uint8), technique)


def _finish(pixels: Array, technique: Technique) -> Array:
    """Marker and collimation."""
    height, width = pixels.shape
    if technique.marker:
        size = technique.marker_size * min(height, width) / 420
        place = (int(technique.marker_place[0] * width), int(technique.marker_place[1] * height))
        weight = max(round(2 * size), 1)
        cv2.putText(pixels, technique.marker, place, cv2.FONT_HERSHEY_SIMPLEX, size, 250, weight, cv2.LINE_AA)
    top, bottom, left, right = technique.collimation
    dark = 6
    pixels[: round(top * height)] = dark
    pixels[height - round(bottom * height) :] = dark
    pixels[:, : round(left * width)] = dark
    pixels[:, width - round(right * width) :] = dark
    return pixels


def expose_mask(mask: Array, view: View, technique: Technique) -> Array:
    """The same geometry for a mask: bool -> bool."""
    height, width = mask.shape
    turned = cv2.warpAffine(mask.astype(np.uint8), matrix(view, technique), (width, height), flags=cv2.INTER_NEAREST)
    top, bottom, left, right = technique.collimation
    turned[: round(top * height)] = 0
    turned[height - round(bottom * height) :] = 0
    turned[:, : round(left * width)] = 0
    turned[:, width - round(right * width) :] = 0
    return turned > 0
