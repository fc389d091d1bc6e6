"""Signs spread through the lung: opacities, collapse, oedema, fibrosis, emphysema.

Every sign is `paint(canvas, rng, severity)`: its random choices about the lesion are drawn in the same order in every
view, so that the frontal and the lateral image show one lesion. Severity runs from 0 (subtle) to 1 (obvious).
"""

import numpy as np

from hilum.data.phantoms.anatomy import LEFT, RIGHT, SIDES, Anatomy, Array, ramp
from hilum.data.phantoms.canvas import Canvas

Generator = np.random.Generator


def between(low: float, high: float, severity: float) -> float:
    """The value at `severity` of the way from subtle to obvious."""
    return low + (high - low) * severity


def pick_side(rng: Generator, right: float = 0.55) -> int:
    """One side of the body; the right lung is the larger."""
    return RIGHT if rng.random() < right else LEFT


def _bronchograms(canvas: Canvas, rng: Generator, centre: Array, radius: float, side: int, count: int) -> None:
    """Dark branching airways inside a dense area, pointing to the hilum."""
    towards = np.array(canvas.anatomy.hilum(side)) - centre
    towards /= max(float(np.linalg.norm(towards)), 1e-6)
    for _ in range(count):
        wander = rng.normal(0, 0.45, 3)
        start = centre + towards * radius * 0.75 + rng.normal(0, 0.25, 3) * radius
        stop = start - (towards + wander) * radius * 1.1
        canvas.band(np.linspace(start, stop, 5), 0.3, -0.9, mark=0.0, clip=True)


def lung_opacity(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Hazy ground glass through which the vessels stay visible."""
    side = pick_side(rng)
    centre = canvas.anatomy.spot(rng, side, (0.35, 0.95))
    radii = rng.uniform(0.8, 1.25, 3) * between(3.0, 5.0, severity)
    canvas.ellipsoid(
        centre, radii, between(0.18, 0.46, severity), 1.1, in_lung=True, rng=rng, texture="cloud", strength=0.3
    )


def consolidation(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Dense, homogeneous, segmental to lobar, with air bronchograms."""
    side = pick_side(rng)
    centre = canvas.anatomy.spot(rng, side, (0.4, 0.95), (0.15, 0.8))
    radii = rng.uniform(0.75, 1.25, 3) * between(2.6, 4.6, severity)
    tilt = rng.uniform(-0.5, 0.5)
    canvas.ellipsoid(
        centre,
        radii,
        between(0.45, 0.9, severity),
        0.75,
        in_lung=True,
        rng=rng,
        texture="cloud",
        strength=0.35,
        angle=tilt,
    )
    _bronchograms(canvas, rng, centre, float(radii.mean()), side, 5)


def pneumonia(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Patchy alveolar foci, mostly in one lower lobe, some bronchograms."""
    side = pick_side(rng)
    centre = canvas.anatomy.spot(rng, side, (0.5, 0.95))
    for number in range(3):
        place = centre + rng.normal(0, 1.6, 3) * (number > 0)
        radii = rng.uniform(0.7, 1.3, 3) * between(2.0, 3.6, severity) * (1.0 if number == 0 else 0.7)
        density = between(0.35, 0.75, severity) * (1.0 if number == 0 else 0.7)
        canvas.ellipsoid(place, radii, density, 0.9, in_lung=True, rng=rng, texture="blotch", strength=0.75)
    _bronchograms(canvas, rng, centre, between(1.7, 3.1, severity), side, 3)


def infiltration(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Ill-defined streaky and reticulonodular densities, often at both bases."""
    both = rng.random() < 0.55
    first = pick_side(rng)
    for side in (first, -first):
        place = canvas.anatomy.spot(rng, side, (0.5, 0.95), (0.1, 0.75))
        radii = rng.uniform(0.8, 1.3, 3) * between(2.8, 4.2, severity)
        if side == first or both:
            density = between(0.22, 0.5, severity)
            canvas.ellipsoid(place, radii, density, 0.9, in_lung=True, rng=rng, texture="reticular", strength=0.95)


def edema(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Perihilar bat-wing haze on both sides, thick upper-lobe vessels, septal (Kerley B) lines at the bases."""
    anatomy = canvas.anatomy
    density, spread = between(0.06, 0.2, severity), between(4.2, 6.0, severity)
    for side in SIDES:
        x, y, z = anatomy.hilum(side)
        radii = np.array([spread * 0.95, spread * 1.25, 5.0]) * rng.uniform(0.9, 1.1, 3)
        centre = np.array([x + side * 2.2, y + 1.6, z])
        canvas.ellipsoid(centre, radii, density, 0.7, in_lung=True, rng=rng, texture="cloud", strength=0.75)
        for _ in range(5):
            upper = np.array([x + side * rng.uniform(0.5, 3.0), rng.uniform(3.0, 6.0), z + rng.normal(0, 2)])
            canvas.band(np.linspace(np.array([x, y, z]), upper, 4), 0.45, between(0.25, 0.7, severity), clip=True)
        for _ in range(7):
            level = rng.uniform(0.72, 1.0) * anatomy.dome
            wall = side * float(anatomy.lateral_border(np.array(level)))
            line = np.array([[wall, level, rng.uniform(-3, 3)]] * 2)
            line[1, 0] -= side * rng.uniform(1.0, 2.0)
            canvas.band(line, 0.12, between(0.5, 1.3, severity), mark=0.5)


def atelectasis(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Discoid bands above the diaphragm, with a little crowding at the base."""
    both = rng.random() < 0.35
    first = pick_side(rng, 0.5)
    for side in (first, -first):
        plates = []
        for _ in range(3):
            centre = canvas.anatomy.spot(rng, side, (0.74, 0.93), (0.25, 0.65), (0.3, 0.7))
            plates.append((centre, rng.uniform(2.2, 3.8), rng.uniform(-0.35, 0.2), rng.uniform(0.35, 0.75)))
        if side != first and not both:
            continue
        for centre, reach, slope, width in plates[: 2 + (severity > 0.5)]:
            t = np.linspace(-1, 1, 9)
            bow = 0.25 * (1 - t**2)
            line = np.stack([centre[0] + side * reach * t, centre[1] + slope * reach * t - bow, 0 * t + centre[2]], 1)
            line[:, 2] += 0.7 * reach * t
            taper = width * between(0.7, 1.25, severity) * (1 - 0.6 * t**2)
            canvas.band(line, taper, between(1.0, 2.6, severity), clip=True)
        x, y, z = canvas.anatomy.dome_centre(side)
        haze = np.array([x - side * 1.0, y - 0.6, z + 2.5])
        canvas.ellipsoid(haze, np.array([4.5, 1.8, 4.0]), between(0.08, 0.28, severity), 1.0, in_lung=True, mark=0.7)


# Lobe -> its side, and the outline when collapsed in the frontal (x from the midline, y) and the lateral view (z, y).
LOBES: dict[str, tuple[int, list[tuple[float, float]], list[tuple[float, float]]]] = {
    "right upper": (
        RIGHT,
        [(2.2, 0.6), (4.6, 0.4), (7.2, 2.2), (8.4, 4.0), (6.4, 5.4), (4.8, 7.4), (3.9, 10.2), (2.4, 10.2)],
        [(-3.5, 3.0), (0.0, 0.8), (4.0, 3.4), (2.2, 7.0), (1.0, 10.5), (-3.0, 6.5)],
    ),
    "right middle": (
        RIGHT,
        [(2.6, 12.2), (5.0, 13.0), (8.8, 15.0), (5.0, 17.2), (2.8, 18.0)],
        [(0.8, 11.0), (-7.5, 14.0), (-7.0, 16.6), (-2.5, 14.0)],
    ),
    "right lower": (
        RIGHT,
        [(2.4, 10.8), (3.8, 12.0), (6.2, 16.5), (8.2, 21.8), (2.6, 22.4)],
        [(2.0, 10.8), (6.5, 12.5), (8.0, 21.0), (7.6, 26.5), (2.5, 22.0)],
    ),
    "left lower": (
        LEFT,
        [(2.2, 10.6), (3.4, 11.6), (5.4, 16.5), (7.2, 22.2), (2.2, 23.0)],
        [(2.0, 10.8), (6.5, 12.5), (8.0, 21.0), (7.6, 26.5), (2.5, 22.5)],
    ),
    "left upper": (
        LEFT,
        [(2.4, 1.2), (5.0, 0.6), (8.8, 4.0), (9.6, 8.5), (7.4, 12.5), (3.2, 14.5)],
        [(-3.4, 2.5), (-0.5, 3.0), (-2.6, 9.0), (-5.0, 16.0), (-7.4, 13.0), (-6.8, 6.0)],
    ),
}


def lobar_atelectasis(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A whole lobe collapsed to a dense wedge with a sharp fissure."""
    side, frontal, lateral = LOBES[list(LOBES)[int(rng.integers(len(LOBES)))]]
    stretch = rng.uniform(0.92, 1.08)
    scale = canvas.anatomy.dome / 22.0
    if canvas.view.lateral:
        polygon = np.array([[side * 6.0, y * scale, z] for z, y in lateral])
    else:
        polygon = np.array([[side * x * stretch, y * scale, 0.0] for x, y in frontal])
    weight = canvas.blob(smooth_ring(polygon), 0.12)
    present = np.maximum(canvas.inside, np.minimum(canvas.body / 30, 0.5))
    canvas.add_all(weight * present * np.float32(between(2.0, 5.0, severity)))


def smooth_ring(polygon: Array, points: int = 60) -> Array:
    """A closed outline through the corners, rounded (Chaikin's corner cutting, two rounds)."""
    ring = polygon
    for _ in range(2):
        following = np.roll(ring, -1, axis=0)
        ring = np.stack([0.75 * ring + 0.25 * following, 0.25 * ring + 0.75 * following], 1).reshape(-1, 3)
    return ring[:points] if len(ring) < points else ring


def fibrosis(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Reticulation and honeycombing, at the periphery and the bases of both lungs."""
    anatomy, y = canvas.anatomy, canvas.y
    base = ramp(y / anatomy.dome, 0.35, 0.9)
    weights = np.zeros(canvas.shape, np.float32)
    for side in SIDES:
        share = rng.uniform(0.7, 1.0)
        weights += np.minimum(canvas.lung[side] / 3, 1) * np.float32(share)
    if canvas.view.lateral:
        weights *= 0.3 + 0.7 * ramp(canvas.across, -1.0, 6.0)
    else:
        outer = np.abs(canvas.across) / anatomy.lateral_border(np.maximum(y, 0))
        weights *= 0.25 + 0.75 * ramp(outer, 0.45, 0.9)
    net = canvas.texture("reticular", rng)
    amount = weights * base * np.float32(between(1.3, 3.8, severity))
    canvas.add_all(((net + 0.12) * amount).astype(np.float32), mark=0.0)
    canvas.cover(amount)


def shape_fibrosis(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """Stiff lungs are small."""
    anatomy.dome -= between(0.1, 0.9, severity)


def shape_emphysema(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """Hyperinflation: low flat diaphragm, deep chest, dark lungs with few vessels, narrow heart."""
    anatomy.dome += between(0.4, 2.1, severity)
    flat = between(0.85, 0.3, severity)
    anatomy.dome_curvature = (anatomy.dome_curvature[0] * flat, anatomy.dome_curvature[1] * flat)
    anatomy.front_depth += between(0.3, 1.5, severity)
    anatomy.lung_density -= between(0.012, 0.055, severity)
    anatomy.vessel_gain *= between(0.85, 0.6, severity)
    anatomy.heart_length *= between(0.98, 0.9, severity)
    anatomy.heart_tilt += between(0.05, 0.2, severity)


def emphysema(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Bullae in the upper zones, besides the changed shape."""
    for _ in range(3):
        side = pick_side(rng, 0.5)
        centre = canvas.anatomy.spot(rng, side, (0.12, 0.45), (0.4, 0.85))
        radius = rng.uniform(1.1, 2.2)
        if rng.random() < between(0.2, 0.9, severity):
            canvas.ellipsoid(centre, np.full(3, radius), -0.16, 0.5, in_lung=False)
            rim = circle(centre, radius, canvas.view.lateral)
            canvas.band(rim, 0.12, 0.45)


def circle(centre: Array, radius: float, lateral: bool, start: float = 0.0, stop: float = 2 * np.pi) -> Array:
    """Points on a circle (or an arc) that faces the viewer."""
    angle = np.linspace(start, stop, 36)
    points = np.repeat(np.asarray(centre, float)[None], 36, 0)
    points[:, 2 if lateral else 0] += radius * np.cos(angle)
    points[:, 1] += radius * np.sin(angle)
    return points


def emphysema_region(canvas: Canvas) -> Array:
    """Both lungs."""
    return canvas.inside > 0.4
