"""Views of one image for self-supervised pretraining: global and local crops with photometric augmentation, in uint8.

One channel from decode to batch: brightness, contrast, gamma and solarisation are look-up tables, blur and resizing
run on bytes. Nothing is normalised here (`data.transforms.normalise` does, on the device); batches are made in
`loading.py`. Every draw comes from the generator that is passed in.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from hilum.core.errors import ConfigError
from hilum.core.seeding import stream
from hilum.data.transforms import crop_box, resize, shrink

AugmentationName = Literal["cxr", "dinov2", "dinov2_as_released", "none"]
BLUR_KERNEL = 9
_LEVELS = np.arange(256, dtype=np.float64)
_SOLARISED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)
_TAPS = -0.5 * np.arange(-(BLUR_KERNEL // 2), BLUR_KERNEL // 2 + 1, dtype=np.float64) ** 2
_NOISE_SIDE, _NOISE_UNIT = 1024, 24.0


@dataclass(frozen=True)
class Augmentation:
    """Photometric changes of a crop; each probability is the probability that the change IS applied."""

    jitter: float = 0.0
    """Probability of brightness and contrast factors, in random order (as colour jitter does on grey)."""
    brightness: float = 0.0
    """The factor is uniform in 1 -/+ this."""
    contrast: float = 0.0
    """The factor about the crop's mean is uniform in 1 -/+ this."""
    window: float = 0.0
    """Probability of a window / level change with gamma, in one look-up table."""
    width: float = 0.0
    """The window's width is multiplied by exp(uniform(-this, this))."""
    level: float = 0.0
    """The window's centre moves by uniform(-this, this) of the full range."""
    gamma: float = 0.0
    """The exponent is exp(uniform(-this, this))."""
    blur: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Probability of Gaussian blur for the first global, the other global, and the local crops."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, pixels of the crop; the kernel has 9 x 9."""
    noise: float = 0.0
    """Probability of white noise."""
    noise_sigma: float = 0.0
    """Largest standard deviation of the noise, grey levels of 255."""
    solarise: float = 0.0
    """Probability of inverting the levels from 128 on, second global crop only."""


AUGMENTATIONS: dict[str, Augmentation] = {
    # Exposure and post-processing vary between rooms; bone and air never swap, so there is no solarisation.
    "cxr": Augmentation(
        window=0.8, width=0.35, level=0.12, gamma=0.3, blur=(0.3, 0.3, 0.3), sigma=(0.1, 1.2), noise=0.3,
        noise_sigma=6.0,
    ),
    # What DINOv2 configures. On grey images its saturation, hue and greyscale changes do nothing and are left out.
    "dinov2": Augmentation(jitter=0.8, brightness=0.4, contrast=0.4, blur=(1.0, 0.1, 0.5), solarise=0.2),
    # What DINOv2's and CheXFound's released code runs: the blur probabilities are inverted
    # (facebookresearch/dinov2 pull request 411, facebookresearch/dinov3 issue 286).
    "dinov2_as_released": Augmentation(jitter=0.8, brightness=0.4, contrast=0.4, blur=(0.0, 0.9, 0.5), solarise=0.2),
    "none": Augmentation(),
}  # fmt: skip


@dataclass(frozen=True)
class CropConfig:
    """What views are cut from an image."""

    global_size: int = 224
    """Side of global crops, pixels."""
    local_size: int = 96
    """Side of local crops, pixels."""
    global_crops: int = 2
    """Global crops an image, G; the objective takes 2."""
    local_crops: int = 8
    """Local crops an image, L."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Area of a global crop, share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Area of a local crop, share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect (width / height) of crops."""
    augmentation: AugmentationName = "cxr"
    """Photometric preset, a name in `AUGMENTATIONS`."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 keeps laterality."""
    rotation: float = 0.0
    """Largest rotation of a crop about its centre, degrees either way; edges are mirrored."""

    def __post_init__(self) -> None:
        if self.global_size < 1 or self.local_size < 1 or self.global_crops < 1 or self.local_crops < 0:
            raise ConfigError(
                f"Crops: expected positive sizes and counts, found {self.global_crops} of {self.global_size} and "
                f"{self.local_crops} of {self.local_size} pixels."
            )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ConfigError(f"CropConfig.{name}: expected 0 < low <= high <= 1, found ({low}, {high}).")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"CropConfig.ratio: expected 0 < low <= high, found {self.ratio}.")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"CropConfig.flip: expected a probability, found {self.flip}.")


def make_crops(
    pixels: UInt8[np.ndarray, "H W"], config: CropConfig, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "G S S"], UInt8[np.ndarray, "L s s"]]:
    """Cut and augment the views of one image.

    Args:
        pixels: grey, any size.
        config: sizes, scales and augmentation.
        rng: draws everything; the same generator state gives the same crops.

    Returns:
        Global crops and local crops.
    """
    preset = AUGMENTATIONS[config.augmentation]
    values = pixels.astype(np.float32)  # once for all crops that shrink
    global_views = np.empty((config.global_crops, config.global_size, config.global_size), np.uint8)
    local_views = np.empty((config.local_crops, config.local_size, config.local_size), np.uint8)
    for index, view in enumerate(global_views):
        blur, solarise = preset.blur[min(index, 1)], preset.solarise if index == 1 else 0.0
        cut = _cut(pixels, values, config.global_size, config.global_scale, config, rng)
        view[:] = augment(cut, preset, blur, solarise, rng)
    for view in local_views:
        cut = _cut(pixels, values, config.local_size, config.local_scale, config, rng)
        view[:] = augment(cut, preset, preset.blur[2], 0.0, rng)
    return global_views, local_views


def _cut(
    pixels: np.ndarray,
    values: np.ndarray,
    size: int,
    scale: tuple[float, float],
    config: CropConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    rows, columns = pixels.shape
    top, left, height, width = crop_box(rows, columns, scale, config.ratio, rng)
    box = slice(top, top + height), slice(left, left + width)
    view = shrink(values[box], size, size) if min(height, width) >= size else resize(pixels[box], size, size)
    if config.rotation:
        angle = rng.uniform(-config.rotation, config.rotation)
        turn = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, 1.0)
        view = cv2.warpAffine(view, turn, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.flip(view, 1) if rng.random() < config.flip else view


def augment(
    view: UInt8[np.ndarray, "S S"], preset: Augmentation, blur: float, solarise: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "S S"]:
    """Apply a preset's photometric changes to a crop, in the order jitter, window, blur, noise, solarisation.

    Args:
        view: a crop.
        preset: which changes, how strong.
        blur: probability of blur for this kind of crop.
        solarise: probability of solarisation for this kind of crop.
        rng: draws everything.
    """
    # One call to the generator a crop: whether each change is applied, then its parameters.
    jitters, windows, blurs, noises, solarises, *draws = rng.random(15).tolist()
    if jitters < preset.jitter:
        view = _jitter(view, preset, *draws[:3])
    if windows < preset.window:
        gamma, width, level = (2 * draw - 1 for draw in draws[3:6])
        table = window_table(math.exp(gamma * preset.gamma), math.exp(width * preset.width), level * preset.level)
        view = cv2.LUT(view, table)
    if blurs < blur:
        view = gaussian_blur(view, preset.sigma[0] + (preset.sigma[1] - preset.sigma[0]) * draws[6])
    if noises < preset.noise:
        view = _add_noise(view, preset.noise_sigma * draws[7], draws[8], draws[9])
    if solarises < solarise:
        view = cv2.LUT(view, _SOLARISED)
    return view


def gaussian_blur(view: UInt8[np.ndarray, "H W"], sigma: float) -> UInt8[np.ndarray, "H W"]:
    """Blur with a 9 x 9 Gaussian kernel, edges mirrored.

    Separable with a kernel made here: OpenCV's own call spends most of a small crop's time on making its kernel.
    """
    kernel = np.exp(_TAPS * (1 / (sigma * sigma)))
    kernel /= kernel.sum()
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def window_table(gamma: float, width: float, level: float) -> UInt8[np.ndarray, "256"]:
    """Look-up table of a window / level change after a gamma: ((v ** gamma - 0.5 - level) / width + 0.5), clipped."""
    values = ((_LEVELS / 255) ** gamma - (0.5 + level)) * (255 / width) + 127.5
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _jitter(
    view: np.ndarray, preset: Augmentation, brightness_at: float, contrast_at: float, order: float
) -> np.ndarray:
    brightness = 1 + preset.brightness * (2 * brightness_at - 1)
    contrast = 1 + preset.contrast * (2 * contrast_at - 1)
    if order < 0.5:
        view = cv2.convertScaleAbs(view, alpha=brightness)  # rounded and clipped
    view = cv2.addWeighted(view, contrast, view, 0.0, (1 - contrast) * cv2.mean(view)[0])
    return view if order < 0.5 else cv2.convertScaleAbs(view, alpha=brightness)


def _add_noise(view: np.ndarray, sigma: float, top_at: float, left_at: float) -> np.ndarray:
    """Add white noise cut at a random place from a fixed field: a draw per pixel would cost more than the crop."""
    size = view.shape[0]
    field = _noise_field(max(_NOISE_SIDE, 2 * size))
    room = len(field) - size + 1
    top, left = int(top_at * room), int(left_at * room)
    factor = sigma / _NOISE_UNIT
    return cv2.addWeighted(view, 1.0, field[top : top + size, left : left + size], factor, -128 * factor)


@lru_cache(maxsize=2)
def _noise_field(side: int) -> np.ndarray:
    """White Gaussian noise as bytes: 128 is zero, 24 levels are one standard deviation (clipped past 5)."""
    normal = stream(0, "noise field").standard_normal((side, side))
    return np.clip(np.rint(128 + _NOISE_UNIT * normal), 0, 255).astype(np.uint8)
