"""The picture of a search: everything is on it, the finding that was asked for is bright, long lists are cut."""

import io

import numpy as np
from PIL import Image, ImageFont

from hilum.deploy.case_sheet import ACROSS, BRIGHT, GAP, LINES, SIDE, TEXT, Case, _cut, _wrapped, draw_sheet, encode_png

FONT = ImageFont.load_default(TEXT)
MANY = tuple(f"Finding number {number}" for number in range(9))


def bright(picture: np.ndarray) -> np.ndarray:
    """Columns with pure bright letters."""
    return np.flatnonzero((picture == BRIGHT).all(axis=2).any(axis=0))


def test_pictures_stand_in_rows_of_four_and_keep_their_shape() -> None:
    tall, wide = np.full((40, 20), 250, np.uint8), np.full((900, 1800), 250, np.uint8)
    sheet = draw_sheet([Case(tall, "query")], [Case(wide, "0.9")] * 5)
    assert sheet.shape[1] == GAP + ACROSS * (SIDE + GAP)
    white = (sheet > 245).all(axis=2)
    first = white[:, GAP : GAP + SIDE].sum(axis=1)
    assert (first == SIDE // 2).sum() == SIDE  # the query: all of its height, half of its width
    assert (first == SIDE).sum() == 2 * (SIDE // 2)  # one of each row of found ones below it
    last = white[:, -GAP - SIDE : -GAP].sum(axis=1)
    assert (last == SIDE).sum() == SIDE // 2


def test_the_finding_that_was_asked_for_is_bright_and_first() -> None:
    picture = np.zeros((30, 30), np.uint8)
    with_it, without = Case(picture, "0.9", ("Edema", "Mass")), Case(picture, "0.8", ("Edema",))
    sheet = draw_sheet([Case(picture, "query")], [without, with_it], "Mass")
    found = bright(sheet)
    second = GAP + SIDE + GAP
    assert len(found)
    assert found.min() >= second
    assert found.max() <= second + FONT.getlength("Mass,") + 1
    assert not len(bright(draw_sheet([Case(picture, "query")], [without, with_it])))


def test_an_image_that_is_not_at_hand_leaves_its_place() -> None:
    sheet = draw_sheet([Case(np.zeros((30, 30), np.uint8), "query")], [Case(None, "0.9", ("Mass",))], "Mass")
    assert len(bright(sheet))


def test_long_lists_say_how_many_are_left() -> None:
    lines = _wrapped(MANY, FONT)
    assert len(lines) == LINES - 1
    shown = sum(len(line) for line in lines[:-1])
    assert lines[-1] == [f"and {9 - shown} more"]
    assert all(FONT.getlength(" ".join(line)) <= SIDE for line in lines)
    assert _wrapped(("Mass",), FONT) == [["Mass"]]
    assert _wrapped((), FONT) == []
    assert _cut("x" * 200, FONT).endswith("…")


def test_it_is_written_as_a_png() -> None:
    sheet = draw_sheet([Case(np.zeros((30, 30), np.uint8), "query")], [])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(sheet)))), sheet)
