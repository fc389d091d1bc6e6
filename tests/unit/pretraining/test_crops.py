from dataclasses import replace

import cv2
import numpy as np
import pytest

from hilum.core.config import override
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import stream
from hilum.pretraining import crops
from hilum.pretraining.crops import AUGMENTATIONS, Augmentation, CropConfig, augment, gaussian_blur, make_crops

SMALL = CropConfig(global_size=32, local_size=16)


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
        if values is crops._SOLARISED:
            applied.append("solarise")
        return real_table(view, values)

    monkeypatch.setattr(crops.cv2, "LUT", table)
    counts = {"blur": np.zeros(10), "solarise": np.zeros(10)}
    real_augment = crops.augment
    view_number = 0

    def counted(*arguments: object) -> np.ndarray:
        nonlocal view_number
        applied.clear()
        result = real_augment(*arguments)  # type: ignore[arg-type]
        for change in applied:
            counts[change][view_number % 10] += 1
        view_number += 1
        return result

    monkeypatch.setattr(crops, "augment", counted)
    rng = stream(0, "rates")
    for _ in range(samples):
        make_crops(textured(24), SMALL if name == "cxr" else replace(SMALL, augmentation=name), rng)
    return {change: (values / samples).tolist() for change, values in counts.items()}


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
        {"ratio": (2.0, 1.0)},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            replace(CropConfig(), **bad)
