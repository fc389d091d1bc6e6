"""Signs of one place in the lung: nodules, masses, lesions, granulomas, wedges, round atelectasis, tuberculosis.

Same contract as `signs_lung.py`.
"""

import numpy as np

from hilum.data.phantoms.canvas import Canvas
from hilum.data.phantoms.signs_lung import Generator, between, circle, pick_side, smooth_ring


def nodule(canvas: Canvas, rng: Generator, severity: float) -> None:
    """One to four round opacities of 0.8 to 2.8 cm."""
    count = int(rng.choice([1, 1, 1, 2, 3, 4]))
    for _ in range(count):
        side = pick_side(rng)
        centre = canvas.anatomy.spot(rng, side, (0.12, 0.9), (0.25, 0.9))
        radii = between(0.45, 1.2, severity) * rng.uniform(0.85, 1.15, 3)
        canvas.ellipsoid(centre, radii, between(0.95, 0.9, severity), 0.55)


def mass(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A lobulated opacity of more than 3 cm."""
    side = pick_side(rng)
    centre = canvas.anatomy.spot(rng, side, (0.15, 0.85), (0.2, 0.85))
    radius = between(1.6, 3.0, severity)
    canvas.ellipsoid(centre, radius * rng.uniform(0.85, 1.1, 3), between(0.55, 0.85, severity), 0.5)
    for _ in range(4):
        lobule = centre + rng.normal(0, 0.5, 3) * radius
        canvas.ellipsoid(lobule, np.full(3, radius * rng.uniform(0.4, 0.6)), between(0.3, 0.5, severity), 0.5)


def lung_lesion(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A spiculated or a thick-walled, cavitating focus of 1.5 to 4.5 cm."""
    side = pick_side(rng)
    centre = canvas.anatomy.spot(rng, side, (0.15, 0.8), (0.25, 0.85))
    radius = between(0.85, 2.0, severity)
    cavity = rng.random() < 0.4
    canvas.ellipsoid(centre, radius * rng.uniform(0.9, 1.1, 3), between(0.6, 0.75, severity), 0.7)
    if cavity:
        canvas.ellipsoid(centre, np.full(3, radius * 0.6), -1.0, 0.5, mark=0.0)
    for _ in range(11):
        angle, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.5, 2.2)
        across = (
            np.array([np.cos(angle), np.sin(angle), 0])
            if not canvas.view.lateral
            else np.array([0, np.sin(angle), np.cos(angle)])
        )
        line = centre + across * np.linspace(0.6 * radius, reach, 4)[:, None]
        canvas.band(line, 0.14, between(0.4, 0.8, severity), mark=0.8)


def bulla(canvas: Canvas, rng: Generator, severity: float) -> None:
    """One or two large air spaces with a hair-thin wall, at the top or the edge of a lung that is otherwise sound."""
    for _ in range(int(rng.choice([1, 1, 2]))):
        side = pick_side(rng, 0.5)
        centre = canvas.anatomy.spot(rng, side, (0.12, 0.5), (0.45, 0.85))
        radius = between(1.6, 3.6, severity) * rng.uniform(0.9, 1.1)
        canvas.ellipsoid(centre, np.full(3, radius), -between(0.14, 0.2, severity), 0.5)
        canvas.band(circle(centre, radius, canvas.view.lateral), 0.13, between(0.45, 0.9, severity))


def granuloma(canvas: Canvas, rng: Generator, severity: float) -> None:
    """One to three small, dense, calcified spots."""
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        side = pick_side(rng)
        centre = canvas.anatomy.spot(rng, side, (0.15, 0.85), (0.15, 0.85))
        radius = between(0.28, 0.5, severity) * rng.uniform(0.85, 1.15)
        canvas.ellipsoid(centre, np.full(3, radius), between(3.2, 4.2, severity), 0.5)


def infarction(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A wedge with its base on the pleura and its rounded tip towards the hilum (Hampton's hump)."""
    wedge(canvas, rng, pick_side(rng), between(2.2, 4.6, severity), between(0.9, 2.6, severity))


def wedge(canvas: Canvas, rng: Generator, side: int, size: float, amount: float) -> None:
    """A pleural-based wedge of the lower zone."""
    anatomy = canvas.anatomy
    level = rng.uniform(0.62, 0.88) * anatomy.dome
    z = rng.uniform(-2, 4)
    wall = side * (float(anatomy.lateral_border(np.array(level))) - 0.1)
    inward = np.array(anatomy.hilum(side))[:2] - np.array([wall, level])
    inward /= np.linalg.norm(inward)
    if canvas.view.lateral:
        ring = np.stack(
            [np.full(30, wall), *(circle(np.array([wall, level, z]), size * 0.5, True, 0, 2 * np.pi)[:30, 1:].T)], 1
        )
    else:
        half = size * 0.5
        ring = np.array([
            [wall, level - half, z], [wall, level + half, z],
            [wall + inward[0] * size * 0.75, level + inward[1] * size + half * 0.35, z],
            [wall + inward[0] * size, level + inward[1] * size, z],
            [wall + inward[0] * size * 0.75, level + inward[1] * size - half * 0.35, z],
        ])  # fmt: skip
        ring = smooth_ring(ring)
    canvas.add_all(canvas.blob(ring, 0.18) * np.maximum(canvas.inside, 0.15) * np.float32(amount))


def tuberculosis(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Upper lobes: cavity, clustered small nodules, strands to a pulled-up hilum."""
    both = rng.random() < 0.4
    first = pick_side(rng)
    anatomy = canvas.anatomy
    for side in (first, -first):
        centre = anatomy.spot(rng, side, (0.17, 0.32), (0.35, 0.7), (0.55, 0.8))
        radius = between(1.0, 1.9, severity)
        spots = centre + rng.normal(0, 1, (16, 3)) * np.array([1.7, 2.2, 1.5])
        sizes = rng.uniform(0.2, 0.45, 16)
        strands = rng.normal(0, 1.2, (5, 3))
        if side != first and not both:
            continue
        haze = np.array([3.0, 3.2, 2.6]) * between(0.8, 1.1, severity)
        canvas.ellipsoid(
            centre, haze, between(0.12, 0.3, severity), 1.0, in_lung=True, rng=rng, texture="blotch", strength=0.8
        )
        canvas.ellipsoid(centre, np.full(3, radius), between(0.45, 0.8, severity), 0.5)
        canvas.ellipsoid(centre, np.full(3, radius * 0.72), -between(0.7, 1.2, severity), 0.5, mark=0.0)
        for spot, size in zip(spots, sizes, strict=True):
            canvas.ellipsoid(spot, np.full(3, size), between(0.8, 1.4, severity), 0.5, in_lung=True)
        for strand in strands:
            line = np.linspace(centre + strand, np.array(anatomy.hilum(side)), 5)
            canvas.band(line, 0.18, between(0.3, 0.8, severity), mark=0.6, clip=True)


def rounded_atelectasis(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A round mass on the pleura of the posterior base; vessels and bronchi sweep into it like a comet's tail."""
    side = pick_side(rng)
    anatomy = canvas.anatomy
    centre = anatomy.spot(rng, side, (0.78, 0.9), (0.62, 0.82), (0.72, 0.86))
    radius = between(1.5, 2.8, severity)
    density = between(0.5, 0.8, severity)
    canvas.ellipsoid(centre, np.full(3, radius), density, 0.6, in_lung=True)
    hilum = np.array(anatomy.hilum(side))
    for number in range(6):
        t = np.linspace(0, 1, 12)[:, None]
        bend = np.array([0.0, 2.2 * np.sin(number - 2.5), 0.6 * (number - 2.5)]) + rng.normal(0, 0.2, 3)
        rim = centre + np.array([0.0, (number - 2.5) * 0.34 * radius, 0.0])
        line = rim * (1 - t) + (rim * 0.35 + hilum * 0.65) * t + bend * np.sin(np.pi * t) * 0.5
        canvas.band(line, 0.4 * (1 - 0.75 * t[:, 0]) + 0.05, density * 1.3, clip=True)
    y = np.linspace(centre[1] - 2.6, centre[1] + 2.6, 10)
    wall = np.stack([side * anatomy.lateral_border(y), y, np.full(10, centre[2])], 1)
    canvas.band(wall, 0.7, density * 1.6, mark=0.6)
