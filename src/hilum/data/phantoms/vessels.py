"""The vessel trees of the lungs: three-dimensional, branching from the hilum, the same in every view of a patient.

Drawn last, because findings thin them out (`Canvas.marking`).
"""

from functools import lru_cache

import cv2
import numpy as np

from hilum.data.phantoms.anatomy import SIDES, Array
from hilum.data.phantoms.canvas import SHIFT, Canvas

LEVELS = 6
WIDTHS = (0.75, 0.55, 0.4, 0.29, 0.21, 0.15)
"""cm, by level of branching: segmental arteries to what is just seen on a film."""
DENSITY = 1.5


def paint_vessels(canvas: Canvas) -> None:
    """The vessel trees of both lungs, faded by the canvas's `marking`; branches of one width are one drawing."""
    a = canvas.anatomy
    for side in SIDES:
        layer = np.zeros(canvas.shape, np.float32)
        for level, (starts, stops) in enumerate(_tree(a.vessel_seed, side, a.hilum(side))):
            width = WIDTHS[level] * canvas.view.scale
            drawn = np.zeros(canvas.shape, np.uint8)
            ends = np.stack([canvas.view.project(starts), canvas.view.project(stops)], 1)
            _lines(drawn, ends, width)
            if level < 2:
                drawn = canvas.soften(drawn, 0.11)
            layer += drawn * np.float32(WIDTHS[level] * DENSITY * min(width, 1.0) / 255)
        field = np.minimum(canvas.lung[side] / 3.0, 1.0) * layer
        marking = canvas.marking[side]
        canvas.extra += np.float32(a.vessel_gain) * (field if marking is None else field * marking)


def _lines(layer: Array, ends: Array, width: float) -> None:
    points = np.round(np.clip(ends, -500, 4000) * (1 << SHIFT)).astype(np.int32)
    cv2.polylines(layer, list(points), False, 255, max(round(width), 1), cv2.LINE_AA, SHIFT)


@lru_cache(maxsize=16)
def _tree(seed: int, side: int, hilum: tuple[float, float, float]) -> list[tuple[Array, Array]]:
    """(starts, stops) of all branches of one level, from the hilum outwards; a function of the patient alone."""
    rng = np.random.default_rng([seed, side + 1])
    centre = np.array(hilum)
    count = 9
    angle = np.deg2rad(np.linspace(-78, 92, count) + rng.normal(0, 5, count))
    direction = np.stack([side * np.cos(angle), np.sin(angle), rng.uniform(-0.6, 0.6, count)], 1)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    starts = centre + rng.normal(0, 0.35, (count, 3))
    length = rng.uniform(2.4, 3.4, count) * (1 + 0.35 * np.maximum(direction[:, 1], 0))
    levels = []
    for _ in range(LEVELS):
        middles = starts + direction * (length * 0.5)[:, None] + rng.normal(0, 0.12, starts.shape)
        stops = middles + direction * (length * 0.5)[:, None] + rng.normal(0, 0.16, starts.shape)
        levels.append((np.concatenate([starts, middles]), np.concatenate([middles, stops])))
        starts = np.repeat(stops, 2, axis=0)
        direction = np.repeat(direction, 2, axis=0) + rng.normal(0, 0.36, (len(starts), 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = np.repeat(length, 2) * rng.uniform(0.62, 0.9, len(starts))
    return levels
