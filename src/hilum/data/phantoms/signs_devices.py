"""Support devices: tubes, lines, pacemakers, wires, electrodes. Same contract as `signs_lung.py`."""

from collections.abc import Sequence

import numpy as np

from hilum.data.phantoms.anatomy import LEFT, RIGHT, Array
from hilum.data.phantoms.canvas import Canvas
from hilum.data.phantoms.signs_lung import Generator, between, circle, pick_side

CATHETER, WIRE, METAL = 2.0, 3.5, 9.0  # cm of soft tissue that stop as much
KINDS = ("central line", "picc", "tube", "feeding tube", "pacemaker", "sternal wires", "electrodes", "chest drain")
WEIGHTS = (0.22, 0.16, 0.13, 0.13, 0.12, 0.12, 0.08, 0.04)  # shares among devices in MIMIC-like reports, rounded


def support_devices(canvas: Canvas, rng: Generator, severity: float) -> None:
    """One device in a mild case, up to five in intensive care."""
    count = 1 + round(between(0, 3.5, severity))
    kinds = rng.choice(len(KINDS), size=count, replace=False, p=np.array(WEIGHTS))
    for kind in sorted(int(k) for k in kinds):
        DRAW[KINDS[kind]](canvas, np.random.default_rng(rng.integers(2**31)))


def curve(corners: Sequence[Sequence[float]], points: int = 40) -> Array:
    """A smooth path through corners (Catmull-Rom)."""
    knots = np.array([corners[0], *corners, corners[-1]], float)
    t = np.linspace(0, len(corners) - 1 - 1e-6, points)
    i, f = t.astype(int), (t % 1)[:, None]
    a, b, c, d = (knots[i + k] for k in range(4))
    return 0.5 * (2 * b + (c - a) * f + (2 * a - 5 * b + 4 * c - d) * f**2 + (3 * b - a - 3 * c + d) * f**3)


def _central_line(canvas: Canvas, rng: Generator) -> None:
    side = pick_side(rng, 0.75)
    tip = [-1.9, rng.uniform(9.5, 12.5), 0.5]
    if rng.random() < 0.5:
        path = [[side * 4.0, -9, -3], [side * 3.2, -3, -3], [side * 2.4, 2, -2], [-2.0, 6.0, -0.5], tip]
    else:
        path = [[side * 10.5, 2.5, -6], [side * 6, 1.8, -5], [side * 2.8, 3.2, -3], [-1.9, 6.0, -0.5], tip]
    canvas.band(curve(path), 0.26, CATHETER)


def _picc(canvas: Canvas, rng: Generator) -> None:
    side = pick_side(rng, 0.6)
    tip = [-1.8, float(rng.uniform(9.0, 12.5)), 0.5]
    arm: list[Sequence[float]] = [[side * 20, 16, 2], [side * 18.5, 7, 1], [side * 14, 2.2, -1]]
    vein: list[Sequence[float]] = [*arm, [side * 7, 1.6, -4], [side * 2.6, 3.3, -3], [-1.9, 6.4, -0.5], tip]
    canvas.band(curve(vein, 60), 0.18, CATHETER)


def _tube(canvas: Canvas, rng: Generator) -> None:
    tip = rng.uniform(4.0, 7.5)
    path = curve([[0.4, -12, -5], [0.2, -7, -1.5], [-0.1, 0, 0.2], [-0.4, tip, 1.2]])
    canvas.band(path, 1.0, 0.45)
    stripe = path + np.array([0.25, 0, 0.2])
    canvas.band(stripe, 0.16, CATHETER)


def _feeding_tube(canvas: Canvas, rng: Generator) -> None:
    x, y, _ = canvas.anatomy.dome_centre(LEFT)
    end = [x + rng.uniform(-2, 2), y + rng.uniform(3.0, 6.0), -1]
    path = [[-0.5, -12, -4], [0.4, -6, 1], [0.5, 3, 2.6], [0.7, 10, 2.8], [1.2, y - 2, 2], [3.4, y + 2.2, 0], end]
    canvas.band(curve(path, 60), 0.28, CATHETER)


def _pacemaker(canvas: Canvas, rng: Generator) -> None:
    side = LEFT if rng.random() < 0.85 else RIGHT
    front = float(canvas.anatomy.lung_front(np.array(5.0))) - 3.0
    box = np.array([side * 9.3, rng.uniform(3.4, 5.2), front])
    ring = circle(box, 1.0, canvas.view.lateral)
    axis = 2 if canvas.view.lateral else 0
    ring[:, axis] = box[axis] + (ring[:, axis] - box[axis]) * (0.55 if canvas.view.lateral else 2.3)
    ring[:, 1] = box[1] + (ring[:, 1] - box[1]) * 2.1
    canvas.add_all(canvas.blob(ring) * np.float32(METAL))
    heart_x, heart_y, _ = canvas.anatomy.heart_centre()
    leads = [[heart_x + 3.4, heart_y + 2.6, -6.5], [heart_x - 3.6, heart_y - 1.8, -5.0]]
    for tip in leads[: 1 + int(rng.random() < 0.6)]:
        path = [
            [float(v) for v in box],
            [side * 7.4, 1.8, -5.5],
            [side * 3, 2.6, -4],
            [-1.8, 6, -1],
            [-2.4, 12, -2],
            tip,
        ]
        canvas.band(curve(path, 60), 0.2, WIRE)


def _sternal_wires(canvas: Canvas, rng: Generator) -> None:
    for y in np.linspace(5.0, 17.0, int(rng.integers(5, 8))):
        z = float(canvas.anatomy.lung_front(np.array(y))) - 0.9
        loop = circle(np.array([rng.normal(0, 0.15), y, z]), 0.55, canvas.view.lateral)
        loop[:, 1] = y + (loop[:, 1] - y) * 0.55
        canvas.band(loop, 0.14, WIRE)


def _electrodes(canvas: Canvas, rng: Generator) -> None:
    front = -canvas.anatomy.front_depth - 3.0
    for side, y in ((RIGHT, 4.0), (LEFT, 4.5), (LEFT, 17.5)):
        disc = np.array([side * rng.uniform(8, 11.5), y + rng.normal(0, 0.8), front])
        canvas.add_all(canvas.blob(circle(disc, 0.55, canvas.view.lateral)) * np.float32(2.0))
        end = [side * rng.uniform(-4, 16), 32.0, front - 1]
        middle = [disc[0] + rng.normal(0, 3), (disc[1] + 32) / 2, front - 1]
        canvas.band(curve([disc.tolist(), middle, end]), 0.16, 2.2)


def _chest_drain(canvas: Canvas, rng: Generator) -> None:
    side = pick_side(rng)
    apical = rng.uniform(3.5, 7.0)
    path = curve([[side * 17, 19, 1], [side * 12.5, 15.5, 2], [side * 9.5, 10, 3], [side * 5.5, apical, 2]])
    canvas.band(path, 0.8, 0.5)
    canvas.band(path + np.array([side * 0.3, 0, 0.2]), 0.16, CATHETER)


DRAW = {
    "central line": _central_line,
    "picc": _picc,
    "tube": _tube,
    "feeding tube": _feeding_tube,
    "pacemaker": _pacemaker,
    "sternal wires": _sternal_wires,
    "electrodes": _electrodes,
    "chest drain": _chest_drain,
}
