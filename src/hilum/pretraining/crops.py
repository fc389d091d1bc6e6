"""Views of one image for self-supervised pretraining: global and local crops with photometric augmentation, in uint8.

One channel from decode to batch: brightness, contrast, gamma and solarisation are look-up tables, blur and resizing
run on bytes. What is drawn (`draw_views`) is apart from what is done: here by OpenCV (`make_crops`), the reference, or
for a whole batch by matrix products on any device (`device_crops.py`). Nothing is normalised here
(`data.transforms.normalise` does, on the device); batches are made in `loading.py`. Every draw comes from the generator
that is passed in.

A little past 300 lines: the settings, the drawing and the doing of one view, in the order in which they happen.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from hilum.core.errors import ConfigError
from hilum.core.seeding import stream
from hilum.data.transforms import crop_box, resize, shrink

AugmentationName = Literal["cxr", "dinov2", "dinov2_as_released", "none"]
BLUR_KERNEL = 9
_LEVELS = np.arange(256, dtype=np.float64)
SOLARISED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)
_TAPS = -0.5 * np.arange(-(BLUR_KERNEL // 2), BLUR_KERNEL // 2 + 1, dtype=np.float64) ** 2
_NOISE_SIDE = 1024
NOISE_UNIT = 24.0
"""Grey levels of the noise field that are one standard deviation; it is clipped past 5."""


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
    rotation: float = 0.0
    """Largest rotation, degrees either way, where `CropConfig.rotation` leaves it to the preset."""


AUGMENTATIONS: dict[str, Augmentation] = {
    # Exposure, post-processing and how straight a patient stands vary; bone and air never swap: no solarisation.
    "cxr": Augmentation(
        window=0.8, width=0.35, level=0.12, gamma=0.3, blur=(0.3, 0.3, 0.3), sigma=(0.1, 1.2), noise=0.3,
        noise_sigma=6.0, rotation=5.0,
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
    rotation: float | None = None
    """Largest rotation of a crop about its centre, degrees either way; edges are mirrored. Null: the preset's own."""

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
        if self.rotation is not None and not 0 <= self.rotation <= 180:
            raise ConfigError(f"CropConfig.rotation: expected 0 to 180 degrees or null, found {self.rotation}.")

    @property
    def largest_rotation(self) -> float:
        """Degrees: the rotation that is set, or the preset's own."""
        return AUGMENTATIONS[self.augmentation].rotation if self.rotation is None else self.rotation


class Jitter(NamedTuple):
    """Brightness and contrast of a view, in either order."""

    brightness: float
    """Multiplies the levels."""
    contrast: float
    """Multiplies the distance from the view's mean."""
    brightness_first: bool
    """Which comes first."""


class Window(NamedTuple):
    """Arguments of `window_table`."""

    gamma: float
    width: float
    level: float


class Noise(NamedTuple):
    """White noise, cut from the fixed field."""

    sigma: float
    """Standard deviation, grey levels."""
    top_at: float
    """Where in the field, in [0, 1)."""
    left_at: float
    """Where in the field, in [0, 1)."""


class View(NamedTuple):
    """What was drawn for one view; None where a change is not applied. In the order in which it is applied."""

    size: int
    """Side, pixels."""
    box: tuple[int, int, int, int]
    """Top, left, height, width in the source, pixels."""
    angle: float | None = None
    """Rotation about the view's centre, degrees anticlockwise."""
    flip: bool = False
    """Left and right swapped."""
    jitter: Jitter | None = None
    window: Window | None = None
    blur: float | None = None
    """Standard deviation of the Gaussian, pixels of the view."""
    noise: Noise | None = None
    solarise: bool = False


def draw_views(rows: int, columns: int, config: CropConfig, rng: np.random.Generator) -> list[View]:
    """Draw the views of an image: global, then local.

    Args:
        rows: height of the image, pixels.
        columns: width of the image, pixels.
        config: sizes, scales and augmentation.
        rng: draws everything; the same generator state gives the same views.
    """
    preset, rotation = AUGMENTATIONS[config.augmentation], config.largest_rotation
    views = []
    for index in range(config.global_crops + config.local_crops):
        if index < config.global_crops:
            size, scale, blur = config.global_size, config.global_scale, preset.blur[min(index, 1)]
        else:
            size, scale, blur = config.local_size, config.local_scale, preset.blur[2]
        box = crop_box(rows, columns, scale, config.ratio, rng)
        angle = rng.uniform(-rotation, rotation) if rotation else None
        flip = rng.random() < config.flip
        second_global = index == 1 and config.global_crops > 1
        changes = draw_changes(preset, blur, preset.solarise if second_global else 0.0, rng)
        views.append(View(size, box, angle, flip, *changes))
    return views


def draw_changes(
    preset: Augmentation, blur: float, solarise: float, rng: np.random.Generator
) -> tuple[Jitter | None, Window | None, float | None, Noise | None, bool]:
    """Draw the photometric changes of a view: its jitter, window, blur, noise and solarisation.

    Args:
        preset: which changes, how strong.
        blur: probability of blur for this kind of view.
        solarise: probability of solarisation for this kind of view.
        rng: draws everything.
    """
    # One call to the generator a view: whether each change is applied, then its parameters.
    jitters, windows, blurs, noises, solarises, *draws = rng.random(15).tolist()
    jitter = window = sigma = noise = None
    if jitters < preset.jitter:
        brightness = 1 + preset.brightness * (2 * draws[0] - 1)
        contrast = 1 + preset.contrast * (2 * draws[1] - 1)
        jitter = Jitter(brightness, contrast, draws[2] < 0.5)
    if windows < preset.window:
        gamma, width, level = (2 * draw - 1 for draw in draws[3:6])
        window = Window(math.exp(gamma * preset.gamma), math.exp(width * preset.width), level * preset.level)
    if blurs < blur:
        sigma = preset.sigma[0] + (preset.sigma[1] - preset.sigma[0]) * draws[6]
    if noises < preset.noise:
        noise = Noise(preset.noise_sigma * draws[7], draws[8], draws[9])
    return jitter, window, sigma, noise, solarises < solarise


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
    values = pixels.astype(np.float32)  # once for all crops that shrink
    global_views = np.empty((config.global_crops, config.global_size, config.global_size), np.uint8)
    local_views = np.empty((config.local_crops, config.local_size, config.local_size), np.uint8)
    rows, columns = pixels.shape
    places = [*global_views, *local_views]
    for place, view in zip(places, draw_views(rows, columns, config, rng), strict=True):
        place[:] = change(cut(pixels, values, view), view)
    return global_views, local_views


def cut(pixels: UInt8[np.ndarray, "H W"], values: Float32[np.ndarray, "H W"], view: View) -> UInt8[np.ndarray, "S S"]:
    """Cut a view out of an image, resize, turn and flip it.

    Args:
        pixels: the image.
        values: the same as float32.
        view: what was drawn.
    """
    size, (top, left, height, width) = view.size, view.box
    box = slice(top, top + height), slice(left, left + width)
    crop = shrink(values[box], size, size) if min(height, width) >= size else resize(pixels[box], size, size)
    if view.angle is not None:
        turn = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), view.angle, 1.0)
        crop = cv2.warpAffine(crop, turn, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.flip(crop, 1) if view.flip else crop


def change(crop: UInt8[np.ndarray, "S S"], view: View) -> UInt8[np.ndarray, "S S"]:
    """Apply a view's photometric changes to its crop."""
    if view.jitter is not None:
        crop = _jitter(crop, *view.jitter)
    if view.window is not None:
        crop = cv2.LUT(crop, window_table(*view.window))
    if view.blur is not None:
        crop = gaussian_blur(crop, view.blur)
    if view.noise is not None:
        crop = _add_noise(crop, *view.noise)
    if view.solarise:
        crop = cv2.LUT(crop, SOLARISED)
    return crop


def gaussian_blur(view: UInt8[np.ndarray, "H W"], sigma: float) -> UInt8[np.ndarray, "H W"]:
    """Blur with a 9 x 9 Gaussian kernel, edges mirrored.

    Separable with a kernel made here: OpenCV's own call spends most of a small crop's time on making its kernel.
    """
    kernel = blur_kernel(sigma)
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def blur_kernel(sigma: float) -> Float64[np.ndarray, "9"]:
    """Nine taps of a Gaussian, which sum to 1."""
    kernel = np.exp(_TAPS * (1 / (sigma * sigma)))
    kernel /= kernel.sum()
    return kernel


def window_table(gamma: float, width: float, level: float) -> UInt8[np.ndarray, "256"]:
    """Look-up table of a window / level change after a gamma: ((v ** gamma - 0.5 - level) / width + 0.5), clipped."""
    values = ((_LEVELS / 255) ** gamma - (0.5 + level)) * (255 / width) + 127.5
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def brighten(view: UInt8[np.ndarray, "H W"], factor: float) -> UInt8[np.ndarray, "H W"]:
    """Multiply the levels, rounded and clipped."""
    return cv2.convertScaleAbs(view, alpha=factor)


def _jitter(view: np.ndarray, brightness: float, contrast: float, brightness_first: bool) -> np.ndarray:
    if brightness_first:
        view = brighten(view, brightness)
    view = cv2.addWeighted(view, contrast, view, 0.0, (1 - contrast) * cv2.mean(view)[0])
    return view if brightness_first else brighten(view, brightness)


def _add_noise(view: np.ndarray, sigma: float, top_at: float, left_at: float) -> np.ndarray:
    """Add white noise cut at a random place from a fixed field: a draw per pixel would cost more than the crop."""
    size = view.shape[0]
    field = noise_field(size)
    top, left = noise_place(size, top_at, left_at)
    factor = sigma / NOISE_UNIT
    return cv2.addWeighted(view, 1.0, field[top : top + size, left : left + size], factor, -128 * factor)


def noise_place(size: int, top_at: float, left_at: float) -> tuple[int, int]:
    """Row and column of `noise_field` where the noise of a view begins."""
    room = len(noise_field(size)) - size + 1
    return int(top_at * room), int(left_at * room)


def noise_field(size: int) -> UInt8[np.ndarray, "n n"]:
    """White Gaussian noise for views of a size: 128 is zero, `NOISE_UNIT` levels are one standard deviation."""
    return _noise_of(max(_NOISE_SIDE, 2 * size))


@lru_cache(maxsize=2)
def _noise_of(side: int) -> np.ndarray:
    normal = stream(0, "noise field").standard_normal((side, side))
    return np.clip(np.rint(128 + NOISE_UNIT * normal), 0, 255).astype(np.uint8)
