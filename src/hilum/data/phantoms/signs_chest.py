"""Signs of the heart, great vessels, mediastinum, diaphragm's hiatus and bones.

Most change the `Anatomy` before it is projected (`shape_*`), so that all views follow; their masks come from
`*_region` functions. Same contract as `signs_lung.py` for the painted ones.
"""

import numpy as np

from hilum.data.phantoms.anatomy import LEFT, RIGHT, SIDES, VERTEBRA_SPACING, Anatomy, Array, Break, ramp
from hilum.data.phantoms.canvas import Canvas
from hilum.data.phantoms.signs_focal import wedge
from hilum.data.phantoms.signs_lung import Generator, between, pick_side
from hilum.data.phantoms.skeleton import displaced_clavicle, displaced_ribs, rib_pieces, scapula


def shape_cardiomegaly(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """Cardiothoracic ratio from just above 0.5 to 0.65."""
    anatomy.heart_length *= between(1.07, 1.38, severity)
    anatomy.heart_breadth *= between(1.04, 1.25, severity)
    anatomy.heart_depth *= between(1.05, 1.25, severity)


def shape_cardiomyopathy(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """All chambers are wide: the heart is round rather than long."""
    anatomy.heart_length *= between(1.0, 1.15, severity)
    anatomy.heart_breadth *= between(1.15, 1.5, severity)
    anatomy.heart_depth *= between(1.1, 1.4, severity)


def heart_region(canvas: Canvas) -> Array:
    """The heart's outline."""
    return canvas.heart_half > 0


def shape_enlarged_cardiomediastinum(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """The upper mediastinum is wide on both sides."""
    for side in SIDES:
        anatomy.widening[side] += between(0.3, 1.6, severity) * rng.uniform(0.8, 1.2)


def mediastinum_region(canvas: Canvas) -> Array:
    """Between the lungs from the thoracic inlet to the heart."""
    level = (canvas.y > 0.5) & (canvas.y < 13.5)
    if canvas.view.lateral:
        return level & (np.abs(canvas.across + 0.5) < 4.5)
    y = np.maximum(canvas.y, 0)
    right, left = (canvas.anatomy.medial_border(y, side) for side in SIDES)
    return level & (canvas.across > -right - 0.3) & (canvas.across < left + 0.3)


def shape_tortuous_aorta(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """The arch is large and high, the descending aorta swings out into the left lung."""
    anatomy.aorta_unfolding += between(0.45, 1.15, severity)
    anatomy.knob += between(0.35, 0.9, severity)
    anatomy.aorta_radius += between(0.1, 0.35, severity)


def aorta_region(canvas: Canvas) -> Array:
    """Arch and descending aorta."""
    layer = np.zeros(canvas.shape, np.uint8)
    canvas.draw(layer, canvas.anatomy.aorta(), 2 * canvas.anatomy.aorta_radius + 0.4)
    return layer > 127


def calcification_of_the_aorta(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Thin bright curved lines in the wall of the aortic knob."""
    anatomy = canvas.anatomy
    width, amount = between(0.2, 0.34, severity), between(1.2, 2.8, severity)
    starts = np.cumsum(rng.uniform(0.12, 0.3, 3)) - 0.1
    lengths = rng.uniform(0.14, 0.24, 3) * between(1.0, 1.5, severity)
    for start, length in zip(starts, lengths, strict=True):
        t = np.linspace(start, min(start + length, 1.0), 12)
        if canvas.view.lateral:
            line = anatomy.aorta(100)[np.round(t * 33).astype(int)].copy()
            line[:, 1] -= anatomy.aorta_radius * np.sin(np.pi * np.clip(t, 0, 1)) ** 0.5
        else:
            y = 4.3 + 4.2 * t
            line = np.stack([anatomy.medial_border(y, LEFT) - 0.25, y, 0 * y + 1.0], 1)
        canvas.band(line, width, amount)


def shape_pulmonary_hypertension(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """The main pulmonary artery bulges below the aortic knob."""
    anatomy.pulmonary_trunk += between(0.35, 1.2, severity)


def pulmonary_hypertension(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Large central arteries, pruned periphery."""
    anatomy = canvas.anatomy
    width = between(1.2, 2.0, severity)
    for side in SIDES:
        artery(canvas, side, width * rng.uniform(0.9, 1.1), between(0.6, 1.5, severity))
        prune = np.clip(1.15 - between(0.35, 0.8, severity) * _away_from_hilum(canvas, side) / 6, 0.3, 1)
        canvas.thin_vessels(side, prune.astype(np.float32))
    trunk = np.array([2.6 + anatomy.pulmonary_trunk * 0.5, 9.8, -2.0])
    canvas.ellipsoid(trunk, np.array([1.4, 1.5, 1.6]), between(0.3, 0.7, severity), 0.6)


def artery(canvas: Canvas, side: int, width: float, amount: float) -> None:
    """A descending pulmonary artery of the given width (normal: 1.0 to 1.5 cm)."""
    x, y, z = canvas.anatomy.hilum(side)
    t = np.linspace(0, 1, 12)
    line = np.stack([x + side * (0.2 + 1.6 * t), y - 0.6 + 4.2 * t, z + 0.6 * t], 1)
    for share in (1.0, 0.75, 0.45):
        canvas.band(line, width * share * (1 - 0.55 * t), amount / 2)


def _away_from_hilum(canvas: Canvas, side: int) -> Array:
    x, y, z = canvas.anatomy.hilum(side)
    return np.hypot(canvas.across - (z if canvas.view.lateral else x), canvas.y - y)


def pulmonary_embolism(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A zone without vessels (Westermark), a plump central artery (Fleischner), at times a small Hampton hump."""
    side = pick_side(rng)
    centre = canvas.anatomy.spot(rng, side, (0.25, 0.65), (0.5, 0.75))
    reach = between(4.0, 6.0, severity)
    hump = rng.random() < 0.5
    artery(canvas, side, between(1.2, 1.9, severity), between(0.6, 1.4, severity))
    pale = np.hypot(canvas.across - centre[2 if canvas.view.lateral else 0], (canvas.y - centre[1]) * 0.85) / reach
    zone = (1 - ramp(pale, 0.6, 1.0)).astype(np.float32)
    canvas.thin_vessels(side, 1 - between(0.7, 1.0, severity) * zone)
    canvas.add_all(-zone * np.minimum(canvas.lung[side] / 3, 1) * np.float32(between(0.35, 1.1, severity)))
    if hump:
        wedge(canvas, rng, side, between(1.6, 2.6, severity), between(0.8, 1.6, severity))


def adenopathy(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Lobulated lumps at both hila and right of the trachea."""
    size = between(0.8, 1.5, severity)
    for side in SIDES:
        hilum = np.array(canvas.anatomy.hilum(side))
        for _ in range(3):
            centre = hilum + np.array([side * rng.uniform(0.2, 1.5), rng.uniform(-1.2, 1.6), rng.uniform(-1, 1)])
            canvas.ellipsoid(centre, size * rng.uniform(0.8, 1.2, 3), between(0.55, 0.85, severity), 0.55)
    x = -float(canvas.anatomy.medial_border(np.array(5.5), RIGHT)) - 0.1
    for level in (4.0, 6.0):
        centre = np.array([x, level + rng.normal(0, 0.3), 0.0])
        canvas.ellipsoid(centre, size * np.array([0.9, 1.3, 1.2]), between(0.6, 1.0, severity), 0.55)


def enlarged_hilum(canvas: Canvas, rng: Generator, severity: float) -> None:
    """One hilum, now and then both, is large, dense and smooth; the mediastinum stays as it is."""
    first = pick_side(rng, 0.5)
    both = rng.random() < 0.25
    for side in (first, -first):
        x, y, z = canvas.anatomy.hilum(side)
        radii = between(1.3, 2.3, severity) * np.array([0.9, 1.35, 1.1]) * rng.uniform(0.9, 1.1, 3)
        if side == first or both:
            canvas.ellipsoid(np.array([x + side * 0.7, y + 0.2, z]), radii, between(0.45, 0.75, severity), 0.6)


def hernia(canvas: Canvas, rng: Generator, severity: float) -> None:
    """A round mass behind the heart with air over a level of fluid."""
    radius = between(1.7, 3.6, severity)
    anatomy = canvas.anatomy
    z = float(anatomy.spine(np.array(anatomy.dome))) - 3.2
    centre = np.array([rng.uniform(-0.2, 1.8), anatomy.dome - 0.5 - radius * 0.6, z])
    radii = radius * np.array([1.1, 1.0, 1.0])
    canvas.ellipsoid(centre, radii, 0.35, 0.5)
    found = canvas.window(centre, radii)
    level = rng.uniform(-0.1, 0.35) * radius
    if found is None or rng.random() < 0.1:
        return
    where, u, v = found
    inside = np.maximum(1 - (u / radii[0]) ** 2 - (v / radii[1]) ** 2 - 0.12, 0)
    gas = np.sqrt(inside) * np.clip((level - v) / 0.12, 0, 1) * np.float32(between(1.0, 1.5, severity) * radius)
    canvas.add(where, -gas.astype(np.float32), mark=1.0)


def shape_kyphosis(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """The thoracic spine bows backwards, the chest gets deeper and shorter."""
    anatomy.spine_curve += between(0.8, 3.2, severity)
    anatomy.dome -= between(0.1, 0.9, severity)
    anatomy.rib_slope *= between(1.02, 1.2, severity)


def spine_region(canvas: Canvas) -> Array:
    """The thoracic spine in the lateral view; the frontal view does not show it."""
    if not canvas.view.lateral:
        return np.zeros(canvas.shape, bool)
    return (np.abs(canvas.across - canvas.anatomy.spine(canvas.y)) < 2.3) & (canvas.y > -1) & (canvas.y < 22)


def shape_scoliosis(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """The thoracic spine bows sideways, more often to the right."""
    anatomy.spine_sway += pick_side(rng, 0.8) * between(0.7, 3.0, severity)


def bowed_spine_region(canvas: Canvas) -> Array:
    """The thoracic spine in the frontal view; the lateral view does not show the bow."""
    if canvas.view.lateral:
        return np.zeros(canvas.shape, bool)
    return (np.abs(canvas.across - canvas.anatomy.spine_side(canvas.y)) < 2.0) & (canvas.y > -1) & (canvas.y < 22)


def shape_osteopenia(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """All bones are pale."""
    anatomy.bone_density *= between(0.75, 0.35, severity)


def bones_region(canvas: Canvas) -> Array:
    """Ribs, clavicles and spine."""
    anatomy = canvas.anatomy
    layer = np.zeros(canvas.shape, np.uint8)
    for side in SIDES:
        canvas.draw_many(layer, displaced_ribs(anatomy, side, rib_pieces(anatomy, side)), 1.2, 255)
        if not canvas.view.lateral:
            canvas.draw(layer, anatomy.clavicle(side), 1.6)
    centre = anatomy.spine(canvas.y) if canvas.view.lateral else anatomy.spine_side(canvas.y)
    spine = (np.abs(canvas.across - centre) < 1.7) & (canvas.y > -1) & (canvas.y < 22)
    return (layer > 127) | spine


def shape_fracture(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """A fracture elsewhere than in ribs and clavicles: a wedged vertebra, or the blade of a scapula."""
    number = int(rng.integers(8, 14))
    side = pick_side(rng, 0.5)
    if rng.random() < 0.65:
        anatomy.wedge[number] = between(0.3, 0.65, severity)
    else:
        anatomy.breaks.append(Break("scapula", side, 0, 0.5, between(0.7, 1.6, severity)))


def fracture_region(canvas: Canvas) -> Array:
    """Round the wedged vertebra, or the scapula."""
    anatomy = canvas.anatomy
    mask = np.zeros(canvas.shape, bool)
    for number in anatomy.wedge:
        middle = (number - 3) * VERTEBRA_SPACING - 0.6 + VERTEBRA_SPACING / 2
        half = 1.3
        near = np.abs(canvas.y - middle) < half
        centre = float(anatomy.spine(np.array(middle)) if canvas.view.lateral else anatomy.spine_side(np.array(middle)))
        mask |= near & (np.abs(canvas.across - centre) < 2.0)
    layer = np.zeros(canvas.shape, np.uint8)
    for fracture in anatomy.breaks:
        if fracture.bone == "scapula" and not canvas.view.lateral:
            for outer, inner in scapula(anatomy, fracture.side):
                canvas.draw(layer, np.concatenate([outer, inner, outer[:1]]), 1.2)
                canvas.fill(layer, canvas.view.project(np.concatenate([outer, inner])))
    return mask | (layer > 127)


def shape_rib_fracture(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """One to four neighbouring ribs, stepped at the side of the chest; some are healing."""
    side = pick_side(rng, 0.5)
    first = int(rng.integers(3, 8))
    front = rng.random() < 0.3
    position = rng.uniform(0.74, 0.88) if front else rng.uniform(0.18, 0.5)
    healing = rng.random() < 0.5
    for number in range(first, min(first + 1 + round(between(0, 3, severity)), 10)):
        offset = between(0.35, 1.0, severity) * rng.uniform(0.8, 1.2)
        place = float(np.clip(position + rng.normal(0, 0.02), 0.12, 0.92))
        anatomy.breaks.append(Break("rib", side, number, place, float(offset), 1.0 if healing else 0.0))


def rib_fracture(canvas: Canvas, rng: Generator, severity: float) -> None:
    """Callus and a little swelling at each fracture."""
    for fracture in canvas.anatomy.breaks:
        if fracture.bone == "rib":
            spot = np.array([[fracture.position]])
            place = canvas.anatomy.ribs(fracture.side, np.array([fracture.number]), spot)[0, 0]
            place[1] += fracture.offset / 2
            amount = between(0.4, 0.9, severity) if fracture.callus else between(0.15, 0.3, severity)
            canvas.ellipsoid(place, np.array([0.95, 0.85, 0.9]), amount, 0.7)


def rib_fracture_region(canvas: Canvas) -> Array:
    """The displaced pieces."""
    layer = np.zeros(canvas.shape, np.uint8)
    for fracture in canvas.anatomy.breaks:
        if fracture.bone == "rib":
            start, stop = max(fracture.position - 0.05, 0), min(fracture.position + 0.2, 1)
            piece = [(fracture.number, start, stop)]
            canvas.draw(layer, displaced_ribs(canvas.anatomy, fracture.side, piece)[0], 2.2)
    return layer > 127


def shape_clavicle_fracture(anatomy: Anatomy, rng: Generator, severity: float) -> None:
    """The middle third; the outer piece hangs."""
    side = pick_side(rng, 0.5)
    offset = between(0.6, 1.7, severity)
    anatomy.breaks.append(Break("clavicle", side, 0, float(rng.uniform(0.42, 0.62)), float(offset)))


def clavicle_fracture_region(canvas: Canvas) -> Array:
    """The broken clavicle from the fracture outwards, and a little inwards."""
    layer = np.zeros(canvas.shape, np.uint8)
    if not canvas.view.lateral:
        for fracture in canvas.anatomy.breaks:
            if fracture.bone == "clavicle":
                for points, width in displaced_clavicle(canvas.anatomy, fracture.side):
                    canvas.draw(layer, points, width + 1.3)
                canvas.draw(layer, canvas.anatomy.clavicle(fracture.side), 2.2)
    return layer > 127
