"""Overlays: colours that are even to the eye, and maps that lie where they belong."""

import cv2
import numpy as np
import pytest

from hilum.core.errors import ConfigError
from hilum.deploy.overlays import (
    COLOURS,
    SheetRow,
    contact_sheet,
    heat,
    heat_png,
    of_study,
    overlay,
    overlay_png,
    placed,
    scale_of,
)

WHOLE = (0.0, 0.0, 1.0, 1.0)


def lab_of(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB (IEC 61966-2-1, D65), written out here."""
    encoded = colours / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    ratio = xyz / np.array([0.9505, 1.0, 1.089])
    root = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)


def test_colours_get_lighter_in_even_steps() -> None:
    lightness = lab_of(COLOURS.astype(np.float64))[:, 0]
    assert (np.diff(lightness[::4]) > 0).all()
    line = np.linspace(lightness[0], lightness[-1], 256)
    assert np.abs(lightness - line).max() < 3  # L* and the lightness of OKLab are two models of the same eye
    steps = np.linalg.norm(np.diff(lab_of(COLOURS.astype(np.float64))[::15], axis=0), axis=1)
    assert steps.max() < 2.2 * steps.min()  # the common rainbow has 10 and more


def test_colours_are_inside_what_a_screen_shows() -> None:
    """No channel rests at an end, where clipping would bend the scale, but the red of the last sixth."""
    assert COLOURS.min() > 0
    assert (COLOURS[:200] < 255).all()


def test_a_pixel_lies_in_the_cell_that_it_was_seen_in() -> None:
    """The strongest place of the picture is the centre of the planted cell, for odd boxes and any size."""
    for box, rows, columns in ((WHOLE, 64, 48), ((0.1, 0.25, 0.8, 0.5), 200, 300), ((0.0, 0.3, 1.0, 0.37), 61, 173)):
        for cell in ((0, 0), (2, 1), (3, 3)):
            values = np.zeros((4, 4))
            values[cell] = 1
            shown = heat(values, box, rows, columns)[..., 3].astype(np.float64)
            weights = shown / shown.sum()
            centre = (weights.sum(axis=1) @ (np.arange(rows) + 0.5), weights.sum(axis=0) @ (np.arange(columns) + 0.5))
            for found, number, start, extent, side in zip(
                centre, cell, (box[0], box[1]), (box[2], box[3]), (rows, columns), strict=True
            ):
                expected = (start + (number + 0.5) / 4 * extent) * side
                inner = 0 < number < 3
                assert abs(found - expected) < (0.6 if inner else extent * side / 4 / 3), (box, cell)


def test_nothing_is_drawn_outside_the_box() -> None:
    values = np.random.default_rng(0).random((5, 5))
    picture = heat(values, (0.25, 0.0, 0.5, 1.0), 40, 20)
    assert picture.shape == (40, 20, 4)
    assert not picture[:10].any()
    assert not picture[30:].any()
    assert picture[10:30, :, 3].any()


def test_enlarging_keeps_values_at_centres_and_constants() -> None:
    values = np.random.default_rng(0).random((6, 7))
    enlarged = placed(values, WHOLE, 6 * 5, 7 * 5)
    np.testing.assert_allclose(enlarged[2::5, 2::5], values, atol=1e-6)
    np.testing.assert_allclose(placed(np.full((3, 3), 0.3), WHOLE, 17, 31), 0.3, atol=1e-6)
    np.testing.assert_allclose(placed(values[:, ::-1], WHOLE, 30, 35), enlarged[:, ::-1], atol=1e-5)
    smooth = cv2.resize(values.astype(np.float32), (35, 30), interpolation=cv2.INTER_CUBIC)  # another kernel, a = -0.75
    assert np.abs(enlarged - smooth).max() < 0.12


def test_views_share_a_scale_and_a_flat_map_shows_nothing() -> None:
    strong, weak = np.zeros((4, 4)), np.zeros((4, 4))
    strong[1, 1], weak[1, 1] = 0.9, 0.3
    scale = scale_of([strong, None, weak])
    assert scale == (0.0, 0.9)
    opacities = [heat(one, WHOLE, 40, 40, scale)[..., 3].max() for one in (strong, weak)]
    assert opacities[0] == round(0.85 * 255)
    assert 0 < opacities[1] < 0.6 * opacities[0]
    assert not heat(np.full((4, 4), 1 / 16), WHOLE, 40, 40).any()
    assert scale_of([None]) == (0.0, 0.0)


def test_the_view_that_carried_the_answer_is_the_bright_one() -> None:
    peaked, wide = np.diag([1.0, 0, 0, 0]), np.full((4, 4), 1 / 16)
    wide[0, 0] = 3 / 16
    maps = of_study([peaked, wide], [0.1, 0.9])
    assert [one.sum() for one in maps] == pytest.approx([0.1, 0.9])
    assert maps[1].max() > maps[0].max()  # though the other map is all on one patch
    assert [one.sum() for one in of_study([peaked, wide], None)] == pytest.approx([0.5, 0.5])
    assert of_study([np.zeros((2, 2)), peaked], [0.0, 1.0])[0].sum() == 0


def test_pictures_are_the_arrays_read_by_another_reader() -> None:
    rng = np.random.default_rng(1)
    values, pixels = rng.random((3, 3)), rng.integers(0, 255, (30, 24), np.uint8)
    read = cv2.imdecode(np.frombuffer(heat_png(values, WHOLE, 30, 24), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read[..., [2, 1, 0, 3]], heat(values, WHOLE, 30, 24))
    mixed = cv2.imdecode(np.frombuffer(overlay_png(pixels, values, WHOLE), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(mixed, overlay(pixels, values, WHOLE))
    clear = heat(values, WHOLE, 30, 24)[..., 3] == 0
    np.testing.assert_array_equal(mixed[clear], np.repeat(pixels[clear][:, None], 3, axis=1))


@pytest.mark.parametrize(
    ("values", "box"), [(np.zeros((0, 3)), WHOLE), (np.full((2, 2), np.nan), WHOLE), (np.eye(2), (0.0, 0.0, 0.0, 1.0))]
)
def test_what_cannot_be_drawn_is_refused(values: np.ndarray, box) -> None:
    with pytest.raises(ConfigError, match="Cannot draw"):
        heat(values, box, 4, 4)


def test_a_sheet_has_a_row_for_each_finding_and_a_place_for_each_view() -> None:
    views = [np.full((40, 30), 128, np.uint8), np.full((20, 60), 128, np.uint8)]
    values = np.eye(4)
    rows = [SheetRow("Edema  0.42", [values, None], ["PA", "no map"]), SheetRow("Mass", [values, values], ["PA", "LL"])]
    sheet = contact_sheet(views, [WHOLE, WHOLE], ["PA", "LATERAL"], rows)
    assert sheet.dtype == np.uint8
    coloured = np.abs(sheet.astype(int) - sheet.astype(int).mean(axis=2, keepdims=True)).max(axis=2) > 40
    half = sheet.shape[1] // 2
    assert coloured[:, :half].any()
    left_rows = np.flatnonzero(coloured[:, :half].any(axis=1))
    right_rows = np.flatnonzero(coloured[:, half:].any(axis=1))
    assert right_rows.min() > left_rows.min() + 200  # the first finding has no map of the second view
