from dataclasses import replace

import cv2
import numpy as np
import pytest

from hilum.core.config import override
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import stream
from hilum.data.transforms import crop_box, resize, shrink
from hilum.pretraining import crops
from hilum.pretraining.crops import (
    AUGMENTATIONS,
    Augmentation,
    CropConfig,
    View,
    change,
    draw_changes,
    draw_views,
    gaussian_blur,
    make_crops,
)

SMALL = CropConfig(global_size=32, local_size=16)


def augment(
    view: np.ndarray, preset: Augmentation, blur: float, solarise: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw a preset's photometric changes and apply them."""
    size = view.shape[0]
    return change(view, View(size, (0, 0, size, size), None, False, *draw_changes(preset, blur, solarise, rng)))


def textured(side: int = 64, seed: int = 0) -> np.ndarray:
    return stream(seed, "texture").integers(30, 226, (side, side), dtype=np.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shapes_and_repeatability(name: str) -> None:
    config = replace(SMALL, augmentation=name, rotation=5.0)
    for pixels in (textured(64), textured(24), textured(64)[:40]):
        global_views, local_views = make_crops(pixels, config, stream(0, "crops"))
        assert (global_views.shape, local_views.shape) == ((2, 32, 32), (8, 16, 16))
        assert global_views.dtype == local_views.dtype == np.uint8
        for again, before in zip(
            make_crops(pixels, config, stream(0, "crops")), (global_views, local_views), strict=True
        ):
            assert np.array_equal(again, before)
        assert not np.array_equal(make_crops(pixels, config, stream(1, "crops"))[0], global_views)


def test_the_source_is_not_changed() -> None:
    pixels = textured()
    before = pixels.copy()
    for seed in range(5):
        make_crops(pixels, SMALL, stream(seed, "crops"))
    assert np.array_equal(pixels, before)


def test_global_and_local_crops_cover_their_shares() -> None:
    """On a pair of ramps the extent of a crop can be read from its pixels."""
    rows, columns = np.mgrid[0:256, 0:256].astype(np.uint8)
    config = replace(SMALL, augmentation="none", flip=0.0)
    shares: dict[str, list[float]] = {"global": [], "local": []}
    for seed in range(60):
        vertical = make_crops(rows, config, stream(seed, "extent"))
        horizontal = make_crops(columns, config, stream(seed, "extent"))  # the same boxes
        for kind, tall, wide in zip(shares, vertical, horizontal, strict=True):
            side = tall.shape[-1]
            height = (tall[:, -1, 0].astype(float) - tall[:, 0, 0]) * side / (side - 1)
            width = (wide[:, 0, -1].astype(float) - wide[:, 0, 0]) * side / (side - 1)
            shares[kind] += (height * width / 256**2).tolist()
    for kind, (low, high) in (("global", (0.32, 1.0)), ("local", (0.05, 0.32))):
        found = np.array(shares[kind])
        assert low - 0.02 < found.min() < low + 0.15
        assert high - 0.15 < found.max() < high + 0.03
    assert abs(np.mean(shares["local"]) - 0.185) < 0.015


def realised_rates(monkeypatch: pytest.MonkeyPatch, name: str, samples: int = 300) -> dict[str, list[float]]:
    """How often blur and solarisation are applied to each of the views, counted where they are applied."""
    applied: list[str] = []
    real_blur, real_table = crops.gaussian_blur, cv2.LUT
    monkeypatch.setattr(crops, "gaussian_blur", lambda view, sigma: applied.append("blur") or real_blur(view, sigma))

    def table(view: np.ndarray, values: np.ndarray) -> np.ndarray:
        if values is crops.SOLARISED:
            applied.append("solarise")
        return real_table(view, values)

    monkeypatch.setattr(crops.cv2, "LUT", table)
    counts = {"blur": np.zeros(10), "solarise": np.zeros(10)}
    real_change = crops.change
    view_number = 0

    def counted(*arguments: object) -> np.ndarray:
        nonlocal view_number
        applied.clear()
        result = real_change(*arguments)  # type: ignore[arg-type]
        for step in applied:
            counts[step][view_number % 10] += 1
        view_number += 1
        return result

    monkeypatch.setattr(crops, "change", counted)
    rng = stream(0, "rates")
    for _ in range(samples):
        make_crops(textured(24), SMALL if name == "cxr" else replace(SMALL, augmentation=name), rng)
    return {step: (values / samples).tolist() for step, values in counts.items()}


@pytest.mark.parametrize(
    ("name", "blur", "solarise"),
    [
        ("dinov2", (1.0, 0.1, 0.5), 0.2),
        ("dinov2_as_released", (0.0, 0.9, 0.5), 0.2),
        ("cxr", (0.3, 0.3, 0.3), 0.0),
    ],
)
def test_changes_are_applied_as_often_as_their_probability_says(
    monkeypatch: pytest.MonkeyPatch, name: str, blur: tuple[float, float, float], solarise: float
) -> None:
    """Defect C5 of the public code applies blur with one minus its probability; only the preset named so may."""
    rates = realised_rates(monkeypatch, name)
    for found, expected in zip(rates["blur"][:2], blur[:2], strict=True):
        assert abs(found - expected) < (0.08 if 0 < expected < 1 else 1e-9)
    assert abs(np.mean(rates["blur"][2:]) - blur[2]) < 0.04
    assert rates["solarise"][0] == 0
    assert max(rates["solarise"][2:]) == 0
    assert abs(rates["solarise"][1] - solarise) < (0.08 if solarise else 1e-9)


def test_flips_are_as_frequent_as_asked() -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    for flip in (0.0, 0.5, 1.0):
        config = replace(SMALL, augmentation="none", flip=flip)
        views = np.concatenate([make_crops(ramp, config, stream(seed, "flip"))[1] for seed in range(60)])
        flipped = (views[:, 0, 0] > views[:, 0, -1]).mean()
        assert abs(flipped - flip) < (0.08 if flip == 0.5 else 1e-9)


@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.0])
def test_blur_is_a_gaussian_of_nine_taps_with_mirrored_edges(sigma: float) -> None:
    pixels = textured(20)
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(pixels.astype(float), 4, mode="reflect")
    rows = sum(tap * padded[index : index + 20] for index, tap in enumerate(taps))
    expected = sum(tap * rows[:, index : index + 20] for index, tap in enumerate(taps))
    assert np.abs(gaussian_blur(pixels, sigma) - expected).max() <= 1.0


def test_brightness_and_contrast_factors_are_uniform() -> None:
    """On two grey levels 100 and 120 both factors can be solved for: their order does not change the difference."""
    view = np.full((8, 8), 100, np.uint8)
    view[::2] = 120
    preset = Augmentation(jitter=1.0, brightness=0.4, contrast=0.4)
    rng = stream(0, "jitter")
    out = np.array([augment(view, preset, 0.0, 0.0, rng)[[1, 0], 0] for _ in range(3000)], float)
    mean_factor, product = out.mean(axis=1) / 110, (out[:, 1] - out[:, 0]) / 20
    assert abs(np.quantile(mean_factor, 0.5) - 1.0) < 0.03
    assert 0.59 < mean_factor.min() < 0.63
    assert 1.37 < mean_factor.max() < 1.41
    assert abs((product / mean_factor).mean() - 1.0) < 0.03
    assert 0.5 < (product / mean_factor).min() < 0.7


def test_windowing_never_inverts_and_keeps_the_identity() -> None:
    assert np.array_equal(crops.window_table(1.0, 1.0, 0.0), np.arange(256))
    rng = stream(0, "window")
    preset = replace(AUGMENTATIONS["cxr"], blur=(0.0, 0.0, 0.0), noise=0.0, window=1.0)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tables = np.array([augment(ramp, preset, 0.0, 0.0, rng).ravel() for _ in range(300)]).astype(int)
    assert (np.diff(tables, axis=1) >= 0).all()
    assert tables[:, 128].std() > 10
    assert np.median(np.ptp(tables, axis=1)) > 200


def test_noise_is_white_centred_and_as_strong_as_drawn() -> None:
    grey = np.full((64, 64), 128, np.uint8)
    for sigma in (2.0, 6.0):
        views = (
            np.array([crops._add_noise(grey, sigma, *stream(seed, "noise").random(2)) for seed in range(40)]) - 128.0
        )
        assert abs(views.mean()) < 0.1
        assert abs(views.std() / sigma - 1) < 0.05
        neighbours = np.corrcoef(views[:, :, 1:].ravel(), views[:, :, :-1].ravel())[0, 1]
        assert abs(neighbours) < 0.02
    assert np.array_equal(crops._add_noise(grey, 0.0, 0.5, 0.5), grey)
    assert crops._add_noise(np.full((1100, 1100), 9, np.uint8), 3.0, 0.9, 0.9).shape == (1100, 1100)


def test_rotation_turns_about_the_centre_and_leaves_no_empty_corner() -> None:
    pixels = np.full((64, 64), 180, np.uint8)
    config = replace(SMALL, augmentation="none", rotation=10.0)
    for views in make_crops(pixels, config, stream(0, "turn")):
        assert np.unique(views).tolist() == [180]
    line = np.zeros((65, 65), np.uint8)
    line[32] = 255
    whole = replace(SMALL, augmentation="none", rotation=10.0, global_scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    tilts = []
    for seed in range(40):
        view = make_crops(line, whole, stream(seed, "turn"))[0][0].astype(float)
        height = (view * np.arange(32)[:, None]).sum(axis=0) / view.sum(axis=0)
        tilts.append(np.degrees(np.arctan(np.polyfit(np.arange(4, 28), height[4:28], 1)[0])))
    assert -10.5 < min(tilts) < -5
    assert 5 < max(tilts) < 10.5


def test_settings_can_be_overridden_and_are_checked() -> None:
    changed = override(CropConfig(), ["augmentation=dinov2", "global_scale=[0.25,1]", "local_crops=0"])
    assert (changed.augmentation, changed.global_scale, changed.local_crops) == ("dinov2", (0.25, 1.0), 0)
    assert make_crops(textured(), replace(changed, global_size=32), stream(0, "none"))[1].shape == (0, 96, 96)
    with pytest.raises(UnknownNameError, match="cxr"):
        override(CropConfig(), ["augmentation=crx"])
    for bad in (
        {"global_scale": (0.5, 0.3)}, {"local_scale": (0.0, 0.3)}, {"flip": 1.5}, {"global_crops": 0},
        {"ratio": (2.0, 1.0)}, {"rotation": -1.0}, {"rotation": 181.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            replace(CropConfig(), **bad)


def straight(pixels: np.ndarray, config: CropConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """The views as they were made before drawing and doing were apart: each drawn number is used where it is drawn."""
    preset, made = AUGMENTATIONS[config.augmentation], []
    for index in range(config.global_crops + config.local_crops):
        far = index >= config.global_crops
        size, scale = (config.local_size, config.local_scale) if far else (config.global_size, config.global_scale)
        top, left, height, width = crop_box(*pixels.shape, scale, config.ratio, rng)
        box = pixels[top : top + height, left : left + width]
        view = (shrink if min(height, width) >= size else resize)(box, size, size)
        if config.rotation:
            angle = rng.uniform(-config.rotation, config.rotation)
            turn = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, 1.0)
            view = cv2.warpAffine(view, turn, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        if rng.random() < config.flip:
            view = cv2.flip(view, 1)
        jitters, windows, blurs, noises, solarises, a, b, c, d, e, f, g, h, i, j = rng.random(15).tolist()
        if jitters < preset.jitter:
            brightness, contrast = 1 + preset.brightness * (2 * a - 1), 1 + preset.contrast * (2 * b - 1)
            if c < 0.5:
                view = cv2.convertScaleAbs(view, alpha=brightness)
            view = cv2.addWeighted(view, contrast, view, 0.0, (1 - contrast) * cv2.mean(view)[0])
            if c >= 0.5:
                view = cv2.convertScaleAbs(view, alpha=brightness)
        if windows < preset.window:
            gamma, width_factor = np.exp((2 * d - 1) * preset.gamma), np.exp((2 * e - 1) * preset.width)
            view = cv2.LUT(view, crops.window_table(float(gamma), float(width_factor), (2 * f - 1) * preset.level))
        if blurs < preset.blur[2 if far else min(index, 1)]:
            sigma = preset.sigma[0] + (preset.sigma[1] - preset.sigma[0]) * g
            kernel = np.exp(-0.5 * np.arange(-4, 5, dtype=np.float64) ** 2 * (1 / (sigma * sigma)))
            kernel /= kernel.sum()
            view = cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
        if noises < preset.noise:
            room, factor = 1024 - size + 1, preset.noise_sigma * h / 24.0
            row, column = int(i * room), int(j * room)
            normal = stream(0, "noise field").standard_normal((1024, 1024))
            field = np.clip(np.rint(128 + 24.0 * normal), 0, 255).astype(np.uint8)
            field = field[row : row + size, column : column + size]
            view = cv2.addWeighted(view, 1.0, field, factor, -128 * factor)
        if index == 1 and solarises < preset.solarise:
            view = np.where(view < 128, view, 255 - view)
        made.append(view)
    return made


@pytest.mark.parametrize("rotation", [0.0, 5.0])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_drawing_apart_from_doing_changes_no_bit(name: str, rotation: float) -> None:
    """The same numbers from the generator in the same order, the same pixels to the bit, the same state afterwards."""
    config = CropConfig(48, 24, augmentation=name, rotation=rotation)
    for seed, shape in enumerate(((64, 64), (96, 150), (30, 24), (200, 180))):
        pixels = stream(seed, "straight").integers(0, 256, shape, dtype=np.uint8)
        one, other = stream(seed, "drawn"), stream(seed, "drawn")
        global_views, local_views = make_crops(pixels, config, one)
        for found, expected in zip([*global_views, *local_views], straight(pixels, config, other), strict=True):
            assert np.array_equal(found, expected)
        assert one.random() == other.random()


def test_the_preset_says_how_far_views_turn_unless_a_number_does() -> None:
    def angles(**settings: object) -> list[float | None]:
        views = [draw_views(64, 64, replace(SMALL, **settings), stream(seed, "angles")) for seed in range(20)]
        return [view.angle for image in views for view in image]

    own = angles()
    assert all(angle is not None for angle in own)
    assert 4.5 < max(own) <= 5  # type: ignore[type-var]
    assert -5 <= min(own) < -4.5  # type: ignore[type-var]
    assert 15 < max(angles(rotation=20.0)) <= 20  # type: ignore[type-var]
    assert set(angles(rotation=0.0)) == {None}
    for other in ("dinov2", "dinov2_as_released", "none"):
        assert set(angles(augmentation=other)) == {None}
        assert None not in angles(augmentation=other, rotation=3.0)
    assert override(CropConfig(), ["rotation=null"]).rotation is None
    assert override(CropConfig(), ["rotation=0"]).largest_rotation == 0
