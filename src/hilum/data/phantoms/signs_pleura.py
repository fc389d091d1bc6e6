"""Signs of the pleura, the chest wall and the mediastinum's air: fluid, air, thickening, plaques, fissures.

Same contract as `signs_lung.py`.
"""

import numpy as np

from hilum.data.phantoms.anatomy import LEFT, RIGHT, Array, bump, ramp
from hilum.data.phantoms.canvas import Canvas
from hilum.data.phantoms.signs_lung import Generator, between, pick_side


def wall_distance(canvas: Canvas, side: int) -> Array:
    """Distance (cm) to the lung's free outer border: lateral wall in the frontal view, front wall in the lateral."""
    anatomy = canvas.anatomy
    level = np.maximum(canvas.y, 0)
    if canvas.view.lateral:
        return canvas.across - anatomy.lung_front(level)
    return anatomy.lateral_border(level) - side * canvas.across


def pleural_effusion(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Fluid with a meniscus: from a blunt costophrenic angle to half a hemithorax."""
    both = rng.random() < 0.4
    first = pick_side(rng)
    for side in (first, -first):
        height = between(1.3, 8.5, severity**1.6) * rng.uniform(0.85, 1.15)
        if side == first or both:
            fluid(canvas, side, height * (1.0 if side == first else 0.7), meniscus=True)


def fluid(canvas: Canvas, side: int, height: float, meniscus: bool) -> None:
    """Fill the base of one pleural space to `height` cm above the lateral costophrenic angle."""
    anatomy = canvas.anatomy
    _, top, _ = anatomy.dome_centre(side)
    level = top + anatomy.dome_curvature[0] * 33.0 - height
    surface = np.full_like(canvas.across, level)
    edge = 0.15
    if meniscus:
        climb = min(0.9 + 0.32 * height, 3.4)
        if canvas.view.lateral:
            position = np.clip((canvas.across + 0.5) / 8.0, -1, 1)
            surface = level - climb * np.where(position > 0, 1.2, 0.6) * np.abs(position) ** 3
        else:
            position = np.clip((side * canvas.across - 5.5) / 7.5, -1, 1)
            surface = level - climb * np.where(position > 0, 1.0, 0.35) * np.abs(position) ** 3
        edge = 2.2 if canvas.view.position == "AP" else 0.9  # layers behind the lung of a half-lying patient
    filled = ramp((canvas.y - surface) / edge, 0.0, 1.0)
    canvas.add_all((canvas.lung[side] * filled * np.float32(0.92 * (1 - anatomy.lung_density))).astype(np.float32))


def pneumothorax(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A fine pleural line round the top and side of the lung; beyond it no vessels, and more darkness."""
    side = pick_side(rng)
    gas(canvas, side, between(0.9, 4.2, severity**1.3), between(0.3, 0.7, severity))


def gas(canvas: Canvas, side: int, gap: float, lucency: float) -> None:
    """Air between lung and wall: `gap` cm wide at the apex, a third of it at the base."""
    anatomy = canvas.anatomy
    width = gap * (0.32 + 0.68 * (1 - ramp(canvas.y, 1.0, 16.0)))
    beyond = np.minimum(wall_distance(canvas, side) - width, (canvas.y - 1.3 * gap) / 1.3)
    if canvas.view.lateral:
        beyond = np.minimum(wall_distance(canvas, side) - 0.5 * width, (canvas.y - 1.3 * gap) / 1.3)
    air = np.clip(0.5 - beyond / 0.2, 0, 1).astype(np.float32)
    lung = canvas.lung[side]
    present = np.minimum(lung / 2.0, 1.0)
    canvas.thin_vessels(side, 1 - air)
    change = -lung * air * np.float32(anatomy.lung_density * lucency)
    collapse = lung * (1 - air) * np.float32(0.02 * gap)
    line = present * bump(beyond, 0.0, 0.11) * np.float32(0.7)
    canvas.add_all((collapse + line).astype(np.float32), mark=0.0)
    canvas.add_all(change)
    canvas.cover(air * present * 1.5)


def hydropneumothorax(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Air above fluid: the level is a straight line from wall to mediastinum."""
    side, gap, height = _hydro(rng, severity)
    gas(canvas, side, gap, 0.65)
    fluid(canvas, side, height, meniscus=False)


def _hydro(rng: Generator, severity: float) -> tuple[int, float, float]:
    return pick_side(rng), between(1.8, 4.8, severity), between(3.2, 7.5, severity) * rng.uniform(0.9, 1.1)


def hydro_air(canvas: Canvas, rng: Generator, severity: float) -> None:
    """The pneumothorax of a hydropneumothorax."""
    side, gap, _ = _hydro(rng, severity)
    gas(canvas, side, gap, 0.65)


def hydro_fluid(canvas: Canvas, rng: Generator, severity: float) -> None:
    """The effusion of a hydropneumothorax."""
    side, _, height = _hydro(rng, severity)
    fluid(canvas, side, height, meniscus=False)


def pleural_thickening(canvas: Canvas, rng: Generator, severity: float) -> None:
    """An apical cap, or a smooth band along the lateral wall."""
    side = pick_side(rng, 0.5)
    apical = rng.random() < 0.45
    width = between(0.5, 1.5, severity)
    low = rng.uniform(6.0, 10.0)
    distance = wall_distance(canvas, side)
    lung = canvas.lung[side]
    if apical:
        profile = np.clip(1 - canvas.y / (1.6 + 2.0 * width), 0, 1)
        cap = 2.2 * width * (0.4 + profile) - np.minimum(distance, canvas.y)
        cover = np.clip(cap / 0.25, 0, 1) * (profile > 0)
    elif canvas.view.lateral:
        return  # lies flat against the film's normal: not seen from the side
    else:
        extent = ramp(canvas.y, low, low + 2) * (1 - ramp(canvas.y, 19, 22))
        cover = np.clip((width * extent - distance) / 0.2, 0, 1) * (extent > 0.05)
    canvas.add_all((np.minimum(lung * 0.74, between(1.4, 3.0, severity)) * cover).astype(np.float32))


def pleural_other(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Calcified plaques: along the wall, on the diaphragm, and seen face-on as holly leaves."""
    anatomy = canvas.anatomy
    amount = between(1.0, 2.4, severity)
    for side in (RIGHT, LEFT):
        for _ in range(2):
            start, length = rng.uniform(6, 15), rng.uniform(1.8, 3.6)
            y = np.linspace(start, start + length, 8)
            line = np.stack([side * (anatomy.lateral_border(y) - 0.15), y, np.full(8, rng.uniform(-4, 4))], 1)
            canvas.band(line, rng.uniform(0.28, 0.5), amount)
        face = anatomy.spot(rng, side, (0.45, 0.8), (0.4, 0.75), (0.05, 0.15))
        radii = np.array([1.6, 1.1, 0.35]) * between(0.8, 1.4, severity)
        canvas.ellipsoid(
            face, radii, amount * 1.7, 0.5, rng=rng, texture="blotch", strength=1.0, angle=rng.uniform(-0.8, 0.8)
        )
        x, top, z = anatomy.dome_centre(side)
        offset = rng.uniform(-2, 2) + np.linspace(-1.2, 1.2, 9)
        on_dome = rng.random() < 0.6
        if on_dome:
            curve = anatomy.dome_curvature[1 if canvas.view.lateral else 0]
            line = np.stack([0 * offset + x, top + curve * offset**2, 0 * offset + z], 1)
            line[:, 2 if canvas.view.lateral else 0] += offset
            canvas.band(line, 0.3, amount * 1.2)


def fissure(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A thickened or fluid-lined interlobar fissure: minor (frontal), minor or major (lateral)."""
    width = between(0.16, 0.5, severity)
    amount = between(0.8, 1.8, severity)
    bow, slope = rng.uniform(0.2, 0.6), rng.uniform(-0.06, 0.1)
    level = 0.5 * canvas.anatomy.dome + rng.uniform(-0.6, 0.8)
    major = rng.random() < 0.5
    t = np.linspace(0, 1, 16)
    taper = width * (1 - 0.5 * t)
    if canvas.view.lateral:
        minor = np.stack([0 * t - 6, level + slope * 8 * t - bow * np.sin(np.pi * t), 1.0 - 8.5 * t], 1)
        canvas.band(minor, taper, amount, clip=True)
        if major:
            back = float(canvas.anatomy.lung_back(np.array(5.0))) - 0.5
            line = np.stack([0 * t + 6, 4.8 + (canvas.anatomy.dome - 3.8) * t, back + (-5.5 - back) * t**0.9], 1)
            canvas.band(line, width * 0.9, amount, clip=True)
    else:
        outer = float(canvas.anatomy.lateral_border(np.array(level))) - 0.1
        minor = np.stack([-(3.4 + (outer - 3.4) * t), level + slope * 9 * t - bow * np.sin(np.pi * t), 0 * t - 4], 1)
        canvas.band(minor, taper[::-1], amount, clip=True)


def azygos_lobe(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A fine line, convex outwards, from the right apex to the azygos vein's teardrop above the hilum."""
    reach = between(1.2, 2.4, severity) + rng.normal(0, 0.15)
    end = 7.4 + rng.normal(0, 0.4)
    if canvas.view.lateral:
        return
    t = np.linspace(0, 1, 24)
    x = 4.3 - 1.5 * t + reach * np.sin(np.pi * (0.1 + 0.9 * t)) ** 0.9
    line = np.stack([-x, 0.5 + (end - 0.5) * t, 0 * t + 2], 1)
    canvas.band(line, 0.2, between(0.8, 1.6, severity))
    drop = np.array([line[-1, 0], end + 0.3, 2.0])
    canvas.ellipsoid(drop, np.array([0.5, 0.85, 0.6]), 1.2, 0.6)
    inner = np.concatenate([line, np.array([[-2.4, end, 2], [-3.0, 0.8, 2]])])
    canvas.add_all(canvas.blob(inner, 0.15) * canvas.inside * np.float32(between(0.3, 0.7, severity)), mark=1.0)


def pneumoperitoneum(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A lucent crescent between liver or stomach and a diaphragm that stands out as a thin line."""
    both = rng.random() < between(0.2, 0.8, severity)
    thick = between(0.45, 2.2, severity) * rng.uniform(0.9, 1.1)
    anatomy = canvas.anatomy
    for side in (RIGHT, LEFT):
        if side == LEFT and not both:
            continue
        x, top, z = anatomy.dome_centre(side)
        curve = anatomy.dome_curvature[1 if canvas.view.lateral else 0]
        offset = canvas.across - (z if canvas.view.lateral else x)
        half = 4.6 * (0.75 + 0.25 * severity)
        roof = top + curve * offset**2 + 0.28
        depth = canvas.y - roof
        height = thick * np.maximum(1 - (offset / half) ** 2, 0)
        crescent = np.clip(depth / 0.12, 0, 1) * np.clip((height - depth) / 0.15, 0, 1)
        amount = between(2.2, 5.0, severity)
        canvas.add_all((-crescent * np.float32(amount)).astype(np.float32))


def pneumomediastinum(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Lucent streaks along the heart, the aorta and up into the neck; the lifted pleura is a thin bright line."""
    anatomy = canvas.anatomy
    amount = between(1.2, 3.2, severity)
    y = np.linspace(3.0, anatomy.dome - 3.5, 24)
    for side in (LEFT, RIGHT):
        width = rng.uniform(0.3, 0.55) * between(0.7, 1.2, severity)
        shown = side == LEFT or rng.random() < 0.6
        wobble = 0.1 * np.sin(y * rng.uniform(0.8, 1.4))
        if not shown:
            continue
        border = anatomy.medial_border(y, side)
        if canvas.view.lateral:
            line = np.stack([0 * y, y, anatomy.lung_front(y) + 0.8 + 0.6 * side + wobble], 1)
            canvas.band(line, width, -amount * 0.7)
            continue
        heart = anatomy.heart_centre()
        bulge = bump(y, heart[1], 4.2) * (anatomy.heart_length * 0.72 if side == LEFT else 1.4)
        x = border + bulge * ramp(y, 10.5, 15.0) + wobble
        canvas.band(np.stack([side * (x - 0.1), y, 0 * y], 1), width, -amount)
        canvas.band(np.stack([side * (x + width * 0.5), y, 0 * y], 1), 0.13, between(0.6, 1.1, severity), mark=0.5)
    for _ in range(4):
        x, top, width = rng.uniform(-3.2, 3.2), rng.uniform(-6, -3.5), rng.uniform(0.25, 0.5)
        level = np.linspace(top, 2.5, 10)
        lean = rng.uniform(-0.15, 0.15)
        z = rng.uniform(-2.5, 1.0)
        line = np.stack([x + lean * (level - top), level, np.full(10, z)], 1)
        canvas.band(line, width, -amount * 0.8)


def subcutaneous_emphysema(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Streaks of air in the chest wall and the neck, between muscle fibres."""
    anatomy = canvas.anatomy
    both = rng.random() < between(0.15, 0.7, severity)
    side = pick_side(rng, 0.5)
    net = canvas.texture("reticular", rng)
    fibre = canvas.texture("blotch", rng)
    streaks = np.clip(1.5 * net * fibre - 0.1, 0, 1)
    wall = np.minimum(canvas.body / 8, 1)
    level = np.maximum(canvas.y, 0)
    if canvas.view.lateral:
        outside = ramp(anatomy.lung_front(level) + 0.6 - canvas.across, 0.0, 1.0) + ramp(-canvas.y, -2.0, 1.0)
    else:
        outside = ramp(np.abs(canvas.across) - anatomy.rib_cage(level) + 0.6, 0.0, 1.0)
        outside = outside + ramp(-canvas.y, -1.5, 1.5) + 0.18 * bump(canvas.y, 5.0, 4.0)
        if not both:
            outside = outside * ramp(side * canvas.across, -1.5, 2.0)
    extent = 1 - ramp(canvas.y, between(9, 18, severity), between(13, 24, severity))
    amount = np.minimum(outside, 1) * wall * extent * between(2.2, 5.0, severity)
    canvas.add_all(-(streaks * amount).astype(np.float32))
    canvas.cover(amount * 0.3)
