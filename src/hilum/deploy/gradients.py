"""A picture as 128 numbers, strengths of edges by place and direction: what screening and the view classifier see.

No network takes part, so that a picture is judged before it reaches one, and the same by every engine. Turning a
picture or exchanging bright and dark moves the numbers about and changes none of them (`TURNS`), so that a picture need
not be turned to know what it would look like.
"""

import numpy as np
from jaxtyping import Float64, UInt8

from hilum.data.transforms import evaluation_crop

SIDE = 64
"""Pixels of the square in the middle that is looked at."""
CELLS = 4
"""The square is divided into CELLS x CELLS places."""
DIRECTIONS = 8
"""Of the gradient over the full circle: from dark to bright, so that a positive is told from a negative."""
LENGTH = CELLS * CELLS * DIRECTIONS
LEAST_DEVIATION = 2.0
"""Grey levels; a flatter picture is not stretched further."""
FLOOR = 0.02
"""Added to edge strengths, in deviations a pixel, before the logarithm."""

TURNS: dict[str, tuple[int, int]] = {
    "as it is": (0, 0), "inverted": (0, 4), "a quarter to the left": (1, 2), "upside down": (2, 4),
    "a quarter to the right": (3, 6),
}  # fmt: skip
"""How a picture may lie: quarter turns of its places against the clock, and steps of its directions."""

_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
_CELL = (_ROWS * CELLS // SIDE) * CELLS + _COLUMNS * CELLS // SIDE


def gradient_map(pixels: UInt8[np.ndarray, "H W"]) -> Float64[np.ndarray, " 128"]:
    """Logarithms of mean gradient strengths, in the picture's own deviations, by place and direction.

    Each pixel's gradient is shared between the two directions next to its own, as in histograms of oriented gradients
    (Dalal and Triggs 2005).

    Args:
        pixels: display values, any size; the square in the middle counts.
    """
    square = evaluation_crop(pixels, SIDE).astype(np.float64)
    padded = np.pad(square, 1, mode="edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    strength = np.hypot(across, down) / max(float(square.std()), LEAST_DEVIATION)
    place = np.arctan2(down, across) / (2 * np.pi) * DIRECTIONS % DIRECTIONS
    low = np.floor(place).astype(np.int64)
    share = place - low
    sums = np.zeros(LENGTH)
    for direction, part in ((low % DIRECTIONS, strength * (1 - share)), ((low + 1) % DIRECTIONS, strength * share)):
        sums += np.bincount((_CELL * DIRECTIONS + direction).ravel(), part.ravel(), LENGTH)
    return np.log(sums / (SIDE // CELLS) ** 2 + FLOOR)


def turned(maps: Float64[np.ndarray, "N 128"], turn: str) -> Float64[np.ndarray, "N 128"]:
    """What `gradient_map` gives of the same pictures, turned back from lying as `turn` says.

    Args:
        maps: of the pictures as they are.
        turn: one of `TURNS`.
    """
    quarters, steps = TURNS[turn]
    cells = maps.reshape(len(maps), CELLS, CELLS, DIRECTIONS)
    return np.roll(np.rot90(cells, -quarters, axes=(1, 2)), steps, axis=3).reshape(len(maps), LENGTH)
