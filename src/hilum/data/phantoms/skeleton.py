"""What is in every thorax besides lungs and heart: bones, airways, aorta, breasts, stomach, arms.

Paints on a `Canvas`. The bone layer is kept apart from the findings, so that a finding's mask holds the finding alone.
"""

import numpy as np

from hilum.data.phantoms.anatomy import LEFT, RIBS, SIDES, VERTEBRA_SPACING, Anatomy, Array, Break
from hilum.data.phantoms.canvas import Canvas

VERTEBRAE = np.arange(-3, 14) * VERTEBRA_SPACING - 0.6
"""Levels (y) of the upper end plates of the vertebrae from C6 to L3."""


def paint_skeleton(canvas: Canvas) -> None:
    """Add bones and soft tissue organs."""
    if canvas.view.lateral:
        _lateral_bones(canvas)
    else:
        _frontal_bones(canvas)
    _ribs(canvas)
    _airways(canvas)
    _aorta(canvas)
    _abdomen(canvas)
    _soft_tissue(canvas)
    _mottle(canvas)


def _ribs(canvas: Canvas) -> None:
    """Posterior and anterior parts as two layers, each with denser edges (cortex)."""
    anatomy, scale = canvas.anatomy, canvas.view.scale
    weight = 0.5 if canvas.view.lateral else 1.0
    for side in SIDES:
        pieces = rib_pieces(anatomy, side)
        for low, high, width, amount in ((0.0, 0.62, 1.05, 0.9), (0.6, 1.0, 1.2, 0.55)):
            part = [(n, max(a, low), min(b, high)) for n, a, b in pieces if min(b, high) - max(a, low) > 0.03]
            points = displaced_ribs(anatomy, side, part)
            layer = np.zeros(canvas.shape, np.uint8)
            canvas.draw_many(layer, points, width, 255)
            if width * scale > 5:
                canvas.draw_many(layer, points, width * 0.55, 165)
            canvas.extra += layer * np.float32(amount * weight * anatomy.bone_density / 255)


def rib_pieces(anatomy: Anatomy, side: int) -> list[tuple[int, float, float]]:
    """The intact pieces of one side's ribs as (number, start, stop), with a small gap at each fracture."""
    pieces = []
    for number in range(RIBS):
        cuts = sorted(b.position for b in breaks_of(anatomy, "rib", side, number))
        edges = [0.0, *[edge for cut in cuts for edge in (cut - 0.008, cut + 0.008)], 1.0]
        pieces += [(number, start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return pieces


def breaks_of(anatomy: Anatomy, bone: str, side: int, number: int = 0) -> list[Break]:
    """The fractures of one bone."""
    return [b for b in anatomy.breaks if (b.bone, b.side, b.number) == (bone, side, number)]


def displaced_ribs(anatomy: Anatomy, side: int, pieces: list[tuple[int, float, float]], points: int = 16) -> Array:
    """Pieces of ribs (R, N, 3), displaced by fractures; past one, a rib is back within a quarter of its length."""
    numbers = np.array([number for number, _, _ in pieces])
    t = np.linspace([start for _, start, _ in pieces], [stop for _, _, stop in pieces], points, axis=1)
    line = anatomy.ribs(side, numbers, t)
    for fracture in anatomy.breaks:
        if fracture.bone == "rib" and fracture.side == side:
            row = numbers == fracture.number
            beyond = t[row] - fracture.position
            line[row, :, 1] += fracture.offset * np.where(beyond >= 0, np.clip(1 - beyond / 0.22, 0, 1), 0)
    return line


def displaced_clavicle(anatomy: Anatomy, side: int) -> list[tuple[Array, Array]]:
    """Pieces (points, widths) of a clavicle; the outer piece of a broken one hangs and overrides."""
    points = anatomy.clavicle(side)
    width = 1.15 + 0.5 * np.abs(np.linspace(-1, 1, len(points))) ** 2
    fractures = breaks_of(anatomy, "clavicle", side)
    if not fractures:
        return [(points, width)]
    fracture = fractures[0]
    cut = int(fracture.position * len(points))
    outer = points[cut:].copy()
    outer[:, 1] += fracture.offset * np.linspace(1.0, 0.35, len(outer))
    outer[:, 0] -= side * 0.5 * abs(fracture.offset)
    inner = points[: cut + 1].copy()
    inner[:, 1] -= 0.35 * fracture.offset * np.linspace(0, 1, len(inner)) ** 2
    return [(inner, width[: cut + 1]), (outer, width[cut:])]


def _frontal_bones(canvas: Canvas) -> None:
    anatomy = canvas.anatomy
    layer, small = np.zeros(canvas.shape, np.uint8), np.zeros(canvas.shape, np.uint8)
    bodies, pedicles, processes = [], [], []
    for number, top in enumerate(VERTEBRAE):
        height = (VERTEBRA_SPACING - 0.4) * (1 - 0.75 * anatomy.wedge.get(number, 0.0))
        z = float(anatomy.spine(np.array(top)))
        lean = anatomy.spine_side(top)
        bodies.append([[lean + x, y, z] for x, y in _box(1.45 + 0.03 * max(top, 0), top, height)])
        pedicles += [[[lean + side, top + 0.3, z], [lean + side, top + 1.1, z]] for side in SIDES]
        processes.append([[lean, top + 0.9, z + 4], [lean, top + 2.0, z + 4.6]])
    outlines = canvas.view.project(np.array(bodies).reshape(-1, 3)).reshape(len(bodies), -1, 2)
    canvas.fill_many(layer, outlines, 190)
    canvas.draw_many(small, np.array(pedicles), 0.55)
    canvas.draw_many(small, np.array(processes), 0.5)
    for number, lost in anatomy.wedge.items():  # what is pressed together is denser
        top = VERTEBRAE[number]  # the lean, 2 mm, is left out, so that pictures of old stay as they are
        centre = np.array([float(anatomy.spine_bow(top)), top + 0.8, float(anatomy.spine(top))])
        canvas.ellipsoid(centre, np.array([1.6, 0.65, 1.5]), 0.4 + 0.7 * lost, 0.7)
    density = anatomy.bone_density
    canvas.extra += layer * np.float32(1.15 * density / 255) + small * np.float32(0.5 * density / 255)
    bones = np.zeros(canvas.shape, np.uint8)
    for side in SIDES:
        for points, width in displaced_clavicle(anatomy, side):
            canvas.draw(bones, points, width, 255)
            if canvas.view.scale > 4.5:
                canvas.draw(bones, points, width * 0.5, 180)
    canvas.extra += bones * np.float32(1.5 * density / 255)
    _shoulders(canvas)


def _box(half: float, top: float, height: float) -> list[tuple[float, float]]:
    """A vertebral body with its waist."""
    bottom = top + height
    waist = half * 0.88
    middle = top + height / 2
    return [(-half, top), (half, top), (waist, middle), (half, bottom), (-half, bottom), (-waist, middle)]


def scapula(anatomy: Anatomy, side: int) -> list[tuple[Array, Array]]:
    """The blade as pieces of (outer border, inner border), each (N, 3); below a fracture it is displaced."""
    inward = 3.4 * anatomy.scapula_in
    middle, cut = 14.75 - 0.4 * inward, 8.0
    outer = [[16.2, 1.6], [15.6, 4.5], [middle, cut], [13.4 - inward, 13.6]]
    inner = [[12.4 - inward, 13.4], [12.1 - inward, cut], [11.8 - inward, 3.2], [14.6, 0.8]]
    edges = [np.array([[side * x, y, 8.0] for x, y in edge]) for edge in (outer, inner)]
    fractures = breaks_of(anatomy, "scapula", side)
    if not fractures:
        return [(edges[0], edges[1])]
    shift = fractures[0].offset * np.array([-side * 1.0, -0.55, 0.0])
    return [(edges[0][:3], edges[1][1:]), (edges[0][2:] + shift, edges[1][:2] + shift)]


def _shoulders(canvas: Canvas) -> None:
    """Scapulae, humeri and arms."""
    a = canvas.anatomy
    layer, blade_layer = np.zeros(canvas.shape, np.uint8), np.zeros(canvas.shape, np.uint8)
    for side in SIDES:
        inward = 3.4 * a.scapula_in
        for outer, inner in scapula(a, side):
            canvas.fill(blade_layer, canvas.view.project(np.concatenate([outer, inner])), 255)
            canvas.draw(layer, outer, 0.8, 120)
            canvas.draw(layer, inner, 0.3, 70)
        spine = np.array([[side * (12.2 - inward), 3.4, 9], [side * 16.6, -0.6, 8]])
        canvas.draw(layer, spine, 0.7, 110)
        out = 1.4 - 1.4 * a.scapula_in
        head, neck = np.array([side * 17.9, 1.4, 3.0]), np.array([side * (18.6 + out * 0.4), 3.4, 3.0])
        elbow = np.array([side * (20.5 + out), 19.0, 3.0])
        shaft = np.array([neck, elbow])
        circle = np.linspace(0, 2 * np.pi, 24)
        ball = head + 2.3 * np.stack([np.cos(circle), np.sin(circle), 0 * circle], 1)
        canvas.fill(layer, canvas.view.project(ball), 235)
        canvas.draw(layer, shaft, 2.2, 255)
        canvas.draw(layer, shaft, 1.1, 190)
        arm = np.array([neck, elbow, elbow + np.array([side, 10.0, 0.0])])
        flesh = np.zeros(canvas.shape, np.uint8)
        for width, value in ((9.0, 90), (7.5, 180), (5.0, 255)):
            canvas.draw(flesh, arm, width + a.fat, value)
        covered = np.where(canvas.outline, np.float32(0.25), np.float32(1))
        canvas.extra += covered * canvas.soften(flesh, 0.5) * np.float32(7.0 / 255)
    density = a.bone_density
    canvas.extra += blade_layer * np.float32(0.55 * density / 255) + layer * np.float32(1.5 * density / 255)


def _lateral_bones(canvas: Canvas) -> None:
    a = canvas.anatomy
    layer, small = np.zeros(canvas.shape, np.uint8), np.zeros(canvas.shape, np.uint8)
    bodies, plates, processes = [], [], []
    for number, top in enumerate(VERTEBRAE):
        height = VERTEBRA_SPACING - 0.45
        lost = a.wedge.get(number, 0.0) * height
        middle = top + height / 2
        z = float(a.spine(np.array(middle)))
        slope = float(a.spine(np.array(middle + 0.5)) - a.spine(np.array(middle - 0.5)))
        half = 1.45 + 0.02 * max(top, 0)
        corners = [(-half, top + lost), (half, top), (half * 0.92, middle), (half, top + height), (-half, top + height)]
        body = [[0.0, y - slope * dz, z + dz + slope * (y - middle)] for dz, y in corners]
        bodies.append(body)
        plates += [[body[0], body[1]], [body[4], body[3]]]
        processes.append([[0, middle + 0.3, z + half], [0, middle + 1.7, z + half + 2.4]])
    outlines = canvas.view.project(np.array(bodies).reshape(-1, 3)).reshape(len(bodies), -1, 2)
    canvas.fill_many(layer, outlines, 185)
    canvas.draw_many(layer, np.array(plates), 0.2, 255)
    canvas.draw_many(small, np.array(processes), 0.9, 200)
    density = a.bone_density
    canvas.extra += layer * np.float32(2.1 * density / 255) + small * np.float32(1.2 * density / 255)
    y = np.linspace(3.6, 18.5, 20)
    sternum = np.stack([0 * y, y, a.lung_front(y) - 0.9], 1)
    bones = np.zeros(canvas.shape, np.uint8)
    canvas.draw(bones, sternum, 1.0, 255)
    canvas.draw(bones, sternum, 0.5, 190)
    for side in SIDES:  # arms are raised; the scapulae show as oblique edges over the upper back
        arm = np.array([[side * 15, 1.0, 1.0], [side * 15, -9.0, -5.0]])
        canvas.draw(bones, arm, 2.4, 110)
        blade = np.array([[side * 12, 0.5, 4.0], [side * 12, 11.5, 8.6 + 0.5 * side]])
        canvas.draw(bones, blade, 0.5, 150)
        flesh = np.zeros(canvas.shape, np.uint8)
        canvas.draw(flesh, np.array([[side * 15, 3.2, 2.0], [side * 15, 0.0, 0.0], [side * 15, -9, -5]]), 8.5 + a.fat)
        canvas.extra += canvas.soften(flesh * np.float32(2.6 / 255), 0.5)
    canvas.extra += bones * np.float32(1.5 * density / 255)


def _airways(canvas: Canvas) -> None:
    lines = canvas.anatomy.trachea()
    layer = np.zeros(canvas.shape, np.uint8)
    for level, width in enumerate((1.75, 1.1)):
        value = 150 if level == 0 else 255
        canvas.draw(layer, _dense(lines[0]), width, value)
    for side in SIDES:
        canvas.ellipsoid(np.array(canvas.anatomy.hilum(side)), np.array([1.3, 2.3, 1.8]), 0.3, 0.9)
    for line in lines[1:]:
        canvas.draw(layer, _dense(line), 1.1, 170)
    canvas.extra -= canvas.soften(layer, 0.1) * np.float32(2.4 / 255)


def _dense(line: Array, points: int = 16) -> Array:
    t = np.linspace(0, len(line) - 1, points)
    return np.stack([np.interp(t, np.arange(len(line)), line[:, axis]) for axis in range(3)], 1)


def _aorta(canvas: Canvas) -> None:
    """Arch and descending aorta, where they border on lung."""
    a = canvas.anatomy
    line = a.aorta()
    layer = np.zeros(canvas.shape, np.uint8)
    for share, value in ((1.0, 110), (0.85, 185), (0.6, 255)):
        canvas.draw(layer, line, 2 * a.aorta_radius * share, value)
    weight = 0.75 * 2 * a.aorta_radius * (0.6 if canvas.view.lateral else 0.8)
    canvas.extra += layer * canvas.inside * np.float32(weight / 255)


def _abdomen(canvas: Canvas) -> None:
    """Gas in the stomach under the left hemidiaphragm."""
    a = canvas.anatomy
    if a.stomach_gas < 0.25:
        return
    x, y, _ = a.dome_centre(LEFT)
    size = 1.0 + 1.7 * a.stomach_gas
    centre = np.array([x - 0.8, y + 1.2 + 0.75 * size, 0.5])
    found = canvas.window(centre, np.array([1.5, 0.75, 1.2]) * size)
    if found is None:
        return
    where, u, v = found
    radius = (1.2 if canvas.view.lateral else 1.5) * size
    inside = np.maximum(1 - (u / radius) ** 2 - (v / (0.75 * size)) ** 2, 0) * (v < 0.35 * size)  # gas above fluid
    canvas.add(where, -np.sqrt(inside) * np.float32(1.3 * size))


def _soft_tissue(canvas: Canvas) -> None:
    """Breasts, and the folds of the neck."""
    a = canvas.anatomy
    if a.breast <= 0:
        return
    for side in SIDES:
        size = 0.8 + 0.25 * a.breast
        centre = np.array([side * 7.4, 15.0 + 1.2 * a.breast, -a.front_depth - 1.0 - a.fat])
        radii = np.array([5.6, 5.0, 3.4]) * size
        found = canvas.window(centre, radii)
        if found is None:
            continue
        where, u, v = found
        across, deep = (radii[2], radii[0]) if canvas.view.lateral else (radii[0], radii[2])
        upper = np.where(v < 0, np.maximum(1 + v / radii[1], 0), 1.0)  # fades upwards, sharp fold below
        inside = np.maximum(1 - (u / across) ** 2 - (v / radii[1]) ** 2, 0)
        covered = np.minimum(canvas.body[where] / 14, 1) if canvas.view.lateral else np.float32(1.0)
        canvas.add(where, (np.sqrt(inside) * upper * (1.6 - 1.1 * covered) * deep).astype(np.float32))


def _mottle(canvas: Canvas) -> None:
    """Muscle and fat are not uniform; neither is the lung between its vessels."""
    rng = np.random.default_rng(canvas.anatomy.vessel_seed)
    weight = np.minimum(canvas.body / 10, 1.0)
    canvas.extra += (canvas.texture("cloud", rng) - 0.5) * (np.float32(1.3) * weight)
    canvas.extra += canvas.texture("grain", rng) * (np.float32(0.09) * canvas.inside)
