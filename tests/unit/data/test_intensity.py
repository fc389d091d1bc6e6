"""Published intensity presets against OpenCV's equalizeHist on input derived in float64; one registry of recipes."""

from typing import Any

import cv2
import numpy as np
import pytest

from hilum.core.errors import UnknownNameError
from hilum.data import intensity
from hilum.data.transforms import PREPROCESSING

RNG = np.random.default_rng(3)
SMOOTH = np.clip(cv2.GaussianBlur(RNG.normal(2000, 9000, (90, 70)), (0, 0), 7), 0, 4095).astype(np.uint16)
IMAGES = {
    "smooth": SMOOTH,
    "12 bits": RNG.integers(0, 4096, (64, 64)).astype(np.uint16),
    "offset": RNG.integers(20_000, 21_000, (64, 64)).astype(np.uint16),
    "mostly one value": np.where(RNG.random((64, 64)) < 0.97, 7, SMOOTH[:64, :64]).astype(np.uint16),
    "two values": RNG.choice([100, 3000], (64, 64)).astype(np.uint16),
    "constant": np.full((8, 8), 900, np.uint16),
    "black": np.zeros((8, 8), np.uint16),
    "signed": RNG.integers(-1000, 3000, (64, 64)).astype(np.int16),
    "8 bits": RNG.integers(30, 200, (64, 64)).astype(np.uint8),
}


def by_hand(recipe: str, pixels: np.ndarray, inverted: bool) -> np.ndarray:
    """What the authors describe, pixel by pixel in float64, and OpenCV."""
    values = pixels.astype(np.float64)
    if recipe in ("mimic-cxr-jpg-1", "chexfound-1"):
        values = values - values.min()
        grey = (values / max(values.max(), 1) * 255).astype(np.uint8)
    else:
        grey = cv2.convertScaleAbs(pixels, alpha=255.0 / max(values.max(), 1))
    return cv2.equalizeHist(cv2.bitwise_not(grey) if inverted else grey)


def by_curve(recipe: str, pixels: np.ndarray, inverted: bool) -> np.ndarray:
    """Through a table with values below and above those that occur, as `images.py` has for 16-bit PNG."""
    low, high = int(pixels.min()) - 5, int(pixels.max()) + 5
    index = pixels.astype(np.int64) - low
    preset = intensity.equaliser(recipe)
    assert preset is not None
    curve = preset(np.arange(low, high + 1.0), np.bincount(index.ravel(), minlength=high - low + 1), inverted)
    assert (curve == np.rint(curve)).all()
    return curve.astype(np.uint8)[index]


@pytest.mark.parametrize("recipe", intensity.EQUALISED)
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_presets_equal_opencv_on_float64(recipe: str, inverted: bool, name: str) -> None:
    expected = by_hand(recipe, IMAGES[name], inverted)
    np.testing.assert_array_equal(by_curve(recipe, IMAGES[name], inverted), expected)
    if name in ("smooth", "12 bits", "offset") and (recipe, name) != ("chexpert-1", "offset"):
        assert (expected.min(), expected.max()) == (0, 255)


def test_the_presets_are_not_the_same() -> None:
    """Without the subtraction, an offset leaves few greys; truncated and rounded greys differ too."""
    mimic, chexpert = (by_curve(name, IMAGES["offset"], False) for name in ("mimic-cxr-jpg-1", "chexpert-1"))
    assert len(np.unique(mimic)) > 200 > 20 > len(np.unique(chexpert))
    assert (by_curve("mimic-cxr-jpg-1", SMOOTH, False) != by_curve("chexpert-1", SMOOTH, False)).any()


def test_equalised_pixels_are_spread_evenly() -> None:
    pixels = by_curve("mimic-cxr-jpg-1", IMAGES["12 bits"], False)
    share = np.bincount(pixels.ravel(), minlength=256).reshape(8, 32).sum(1) / pixels.size
    assert np.abs(share - 1 / 8).max() < 0.02


def test_equalise_of_many_pixels_equals_opencv() -> None:
    """Sums past 2**24, where float32 rounds whole numbers."""
    pixels = np.clip(RNG.normal(90, 25, (5000, 4000)), 0, 255).astype(np.uint8)
    curve = intensity.equalise(np.arange(256.0), np.bincount(pixels.ravel(), minlength=256))
    np.testing.assert_array_equal(curve.astype(np.uint8)[pixels], cv2.equalizeHist(pixels))


def test_every_recipe_has_a_normalisation_and_the_other_way_round() -> None:
    assert set(PREPROCESSING) == set(intensity.RECIPES)
    assert intensity.equaliser("hilum-grey-1") is None


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'mimic-cxr-jpg-1'"):
        intensity.equaliser("mimic-cxr-jpg")


def test_a_wrong_preset_would_be_found(monkeypatch: Any) -> None:
    """The comparison with OpenCV fails for rounding in place of truncation, and for inversion after equalisation."""
    monkeypatch.setattr(intensity.np, "floor", np.rint)
    assert (by_curve("mimic-cxr-jpg-1", SMOOTH, False) != by_hand("mimic-cxr-jpg-1", SMOOTH, False)).any()
    monkeypatch.undo()
    late = 255 - by_curve("mimic-cxr-jpg-1", SMOOTH, False)
    assert (late != by_hand("mimic-cxr-jpg-1", SMOOTH, True)).any()
