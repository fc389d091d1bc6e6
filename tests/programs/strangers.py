"""Pictures that are no upright chest X-ray, drawn or made from one: what `hilum predict` must flag.

`KINDS` names them; each is a function of a generator and an upright chest X-ray, uint8 (H, W). `CHANGED` are made from
that X-ray and are the hard ones; `DRAWN` do not look at it.
"""

from collections.abc import Callable

import cv2
import numpy as np
from scipy.special import expit

SIZE = 256
Array = np.ndarray
Kind = Callable[[np.random.Generator, Array], Array]


def grid(size: int = SIZE) -> tuple[Array, Array]:
    """Rows and columns in -1 .. 1."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    return y, x


def to_pixels(values: Array) -> Array:
    return np.clip(values, 0, 255).round().astype(np.uint8)


def grain(rng: np.random.Generator, values: Array, amount: float = 4.0) -> Array:
    return to_pixels(values + rng.normal(0, amount, values.shape))


def smooth_noise(rng: np.random.Generator, power: float, size: int = SIZE) -> Array:
    """Noise of amplitude 1 / frequency ** power, standardised."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.random((size, size)))
    field = np.fft.ifft2(phases / frequency**power).real
    return (field - field.mean()) / field.std()


def ellipse(y: Array, x: Array, centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0) -> Array:
    """1 inside, with a soft edge."""
    dy, dx = y - centre[0], x - centre[1]
    across, along = dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn)
    return expit(-40 * (np.hypot(along / radii[0], across / radii[1]) - 1))


def axial_slice(rng: np.random.Generator, _: Array) -> Array:
    """An axial CT slice of a chest: an oval body on black air, two lungs, a bright spine, the table below."""
    y, x = grid()
    height, width = rng.uniform(0.5, 0.62), rng.uniform(0.75, 0.9)
    values = 150 * ellipse(y, x, (0, 0), (height, width))
    values += 25 * (ellipse(y, x, (0, 0), (height, width)) - ellipse(y, x, (0, 0), (height - 0.07, width - 0.07)))
    for side in (-1, 1):
        lung = ellipse(y, x, (-0.03, side * 0.42 * width / 0.8), (height * 0.72, 0.29), side * 0.1)
        values -= lung * (125 + 6 * smooth_noise(rng, 1.0))
    values += 90 * ellipse(y, x, (height * 0.62, 0), (0.12, 0.1))
    for angle in np.linspace(0.2, 2 * np.pi - 0.2, 16):
        place = (np.cos(angle) * (height - 0.09), np.sin(angle) * (width - 0.09))
        values += 80 * ellipse(y, x, place, (0.03, 0.06), angle)
    values += 60 * ((y > height + 0.12) & (y < height + 0.15))
    return grain(rng, values, 7)


def ultrasound(rng: np.random.Generator, _: Array) -> Array:
    """A fan of speckle on black, with a scale beside it."""
    y, x = grid()
    radius, angle = np.hypot(y + 1.15, x), np.arctan2(x, y + 1.15)
    fan = (radius > 0.35) & (radius < rng.uniform(1.9, 2.1)) & (np.abs(angle) < rng.uniform(0.5, 0.7))
    speckle = rng.rayleigh(1.0, y.shape) * (70 + 25 * smooth_noise(rng, 1.2)) * np.exp(-0.35 * radius)
    values = np.where(fan, cv2.GaussianBlur(speckle, (0, 0), 1.0) * 1.3, 0)
    for row in range(20, SIZE - 10, 24):
        values[row : row + 2, 4:10] = 220
    return to_pixels(values)


def photograph(rng: np.random.Generator, _: Array) -> Array:
    """A landscape: a sky, a ridge, a textured foreground, a few things in it."""
    y, x = grid()
    ridge = rng.uniform(-0.2, 0.3) + 0.12 * np.interp(x[0], np.linspace(-1, 1, 12), rng.normal(size=12))
    ground = y > ridge
    values = np.where(ground, 90 + 38 * smooth_noise(rng, 1.1), 190 - 30 * y + 9 * smooth_noise(rng, 1.8))
    for _number in range(rng.integers(4, 9)):
        centre, radii = rng.uniform(-0.9, 0.9, 2), rng.uniform(0.05, 0.35, 2)
        shape = ellipse(y, x, (centre[0], centre[1]), (radii[0], radii[1]), rng.uniform(0, 3))
        values = values * (1 - shape) + shape * rng.uniform(20, 240)
    return grain(rng, values, 3)


def hand(rng: np.random.Generator, _: Array) -> Array:
    """A radiograph of a hand: bright bones in a dim outline on black."""
    y, x = grid()
    flesh, bone = np.zeros_like(x), np.zeros_like(x)
    wrist = np.array([0.75, 0.0])
    spread = rng.uniform(0.24, 0.32)
    for number in range(5):
        turn = (number - 2) * spread + rng.normal(0, 0.03)
        step = np.array([-np.cos(turn), np.sin(turn)])
        place, length = wrist + step * 0.3, 0.34 * (0.8 if number in (0, 4) else 1.0)
        for _joint in range(4 if number else 3):
            middle = place + step * length / 2
            bone += ellipse(y, x, (middle[0], middle[1]), (length / 2.2, 0.032), -turn)
            flesh += ellipse(y, x, (middle[0], middle[1]), (length / 1.6, 0.085), -turn)
            place, length = place + step * length * 1.02, length * 0.7
    flesh += ellipse(y, x, (0.55, 0), (0.42, 0.42)) + ellipse(y, x, (1.0, 0), (0.4, 0.2))
    bone += ellipse(y, x, (1.0, -0.09), (0.3, 0.06)) + ellipse(y, x, (1.0, 0.1), (0.3, 0.08))
    return grain(rng, 12 + 60 * np.minimum(flesh, 1) + 130 * np.minimum(bone, 1), 4)


def knee(rng: np.random.Generator, _: Array) -> Array:
    """A radiograph of a knee: two shafts that meet in the middle."""
    y, x = grid()
    lean = rng.uniform(-0.15, 0.15)
    flesh = expit(-30 * (np.abs(x - lean * y) - rng.uniform(0.5, 0.65)))
    bone = expit(-40 * (np.abs(x - lean * y) - (0.16 + 0.2 * np.exp(-((np.abs(y) - 0.18) ** 2) / 0.03))))
    gap = np.exp(-(y**2) / 0.001)
    return grain(rng, 10 + 80 * flesh + 110 * bone * (1 - 0.8 * gap) + 5 * smooth_noise(rng, 1.0), 5)


def breast(rng: np.random.Generator, _: Array) -> Array:
    """A mammogram: half a disc at one edge, ducts in it, black elsewhere."""
    y, x = grid()
    side = rng.choice([-1, 1])
    shape = ellipse(y, x, (rng.uniform(-0.1, 0.1), side), (rng.uniform(0.75, 0.95), rng.uniform(0.9, 1.2)))
    return to_pixels(shape * (110 + 32 * smooth_noise(rng, 1.3)))


def head(rng: np.random.Generator, _: Array) -> Array:
    """A slice of a head: a bright skull, folds of a brain, dark ventricles."""
    y, x = grid()
    radii = (rng.uniform(0.78, 0.88), rng.uniform(0.62, 0.7))
    whole, inner = ellipse(y, x, (0, 0), radii), ellipse(y, x, (0, 0), (radii[0] - 0.08, radii[1] - 0.08))
    values = 230 * (whole - inner) + inner * (120 + 28 * np.sin(9 * smooth_noise(rng, 1.6)))
    for side in (-1, 1):
        values -= 90 * ellipse(y, x, (0, side * 0.09), (0.25, 0.05), side * 0.3)
    return grain(rng, values, 4)


def page(rng: np.random.Generator, _: Array) -> Array:
    """A page of text: dark words on white, in lines."""
    values = np.full((SIZE, SIZE), 250, np.uint8)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    for row in range(14, SIZE, 13):
        text = "".join(rng.choice(letters, 46))
        cv2.putText(values, text, (12, row), cv2.FONT_HERSHEY_SIMPLEX, 0.3, 20, 1, cv2.LINE_AA)
    return values


def screenshot(rng: np.random.Generator, _: Array) -> Array:
    """Windows of a program: flat boxes, bars, some words."""
    values = np.full((SIZE, SIZE), rng.integers(200, 245), np.uint8)
    for _number in range(9):
        top, left = rng.integers(0, SIZE - 60, 2)
        bottom, right = top + rng.integers(30, 120), left + rng.integers(40, 150)
        cv2.rectangle(values, (int(left), int(top)), (int(right), int(bottom)), int(rng.integers(30, 255)), -1)
        cv2.rectangle(values, (int(left), int(top)), (int(right), int(top) + 8), int(rng.integers(0, 120)), -1)
        cv2.putText(values, "File  Edit", (int(left) + 3, int(top) + 22), cv2.FONT_HERSHEY_SIMPLEX, 0.3, 0, 1)
    return values


def noise(rng: np.random.Generator, _: Array) -> Array:
    """Every pixel by chance."""
    return rng.integers(0, 256, (SIZE, SIZE), np.uint8)


def constant(rng: np.random.Generator, _: Array) -> Array:
    """One value."""
    return np.full((SIZE, SIZE), rng.integers(0, 256), np.uint8)


def checkerboard(rng: np.random.Generator, _: Array) -> Array:
    """Squares of two values."""
    side = int(rng.integers(6, 40))
    y, x = np.mgrid[0:SIZE, 0:SIZE] // side
    return np.where((y + x) % 2, rng.integers(150, 256), rng.integers(0, 100)).astype(np.uint8)


def colour_chart(rng: np.random.Generator, _: Array) -> Array:
    """A test chart: fields of one value with black between them."""
    values = np.zeros((SIZE, SIZE), np.uint8)
    for top in range(8, SIZE - 40, 62):
        for left in range(8, SIZE - 30, 41):
            values[top : top + 54, left : left + 35] = rng.integers(30, 250)
    return values


def ramp(rng: np.random.Generator, _: Array) -> Array:
    """A slope of grey in some direction."""
    y, x = grid()
    angle = rng.uniform(0, 2 * np.pi)
    return grain(rng, 128 + 80 * (np.cos(angle) * x + np.sin(angle) * y), 1)


def cells(rng: np.random.Generator, _: Array) -> Array:
    """A slide under a microscope: round dark cells on a bright ground."""
    y, x = grid()
    values = 205 + 10 * smooth_noise(rng, 1.2)
    for _number in range(60):
        place, radius = rng.uniform(-1, 1, 2), rng.uniform(0.05, 0.1)
        values -= 60 * ellipse(y, x, (place[0], place[1]), (radius, radius * rng.uniform(0.8, 1.2)))
        values -= 60 * ellipse(y, x, (place[0], place[1]), (radius / 3, radius / 3))
    return grain(rng, values, 4)


def drawing(rng: np.random.Generator, _: Array) -> Array:
    """Thin lines on white."""
    values = np.full((SIZE, SIZE), 255, np.uint8)
    for _number in range(14):
        points = rng.integers(0, SIZE, (6, 1, 2)).astype(np.int32)
        cv2.polylines(values, [points], bool(rng.integers(2)), 0, int(rng.integers(1, 4)), cv2.LINE_AA)
    return values


def turned_left(_: np.random.Generator, film: Array) -> Array:
    """The X-ray, turned by a quarter."""
    return np.ascontiguousarray(np.rot90(film))


def turned_right(_: np.random.Generator, film: Array) -> Array:
    """The X-ray, turned by a quarter the other way."""
    return np.ascontiguousarray(np.rot90(film, -1))


def upside_down(_: np.random.Generator, film: Array) -> Array:
    """The X-ray, turned by a half."""
    return np.ascontiguousarray(film[::-1, ::-1])


def corner(rng: np.random.Generator, film: Array) -> Array:
    """A quarter of the X-ray's width and height, from a corner."""
    rows, columns = (max(side * 2 // 5, 16) for side in film.shape)
    part = film[:rows] if rng.integers(2) else film[-rows:]
    return np.ascontiguousarray(part[:, :columns] if rng.integers(2) else part[:, -columns:])


def tiles(_: np.random.Generator, film: Array) -> Array:
    """Four small copies of the X-ray on one sheet."""
    small = cv2.resize(film, (SIZE // 2, SIZE // 2), interpolation=cv2.INTER_AREA)
    return np.tile(small, (2, 2))


def inverted(_: np.random.Generator, film: Array) -> Array:
    """The X-ray with bright and dark exchanged."""
    return 255 - film


DRAWN: dict[str, Kind] = {
    one.__name__: one
    for one in (
        axial_slice, ultrasound, photograph, hand, knee, breast, head, page, screenshot, noise, constant, checkerboard,
        colour_chart, ramp, cells, drawing,
    )
}  # fmt: skip
CHANGED: dict[str, Kind] = {one.__name__: one for one in (turned_left, turned_right, upside_down, corner, tiles)}
KINDS: dict[str, Kind] = DRAWN | CHANGED


def film(rng: np.random.Generator, lateral: bool = False) -> Array:
    """A sketch of an upright chest X-ray, for tests that need many of them at once and no anatomy."""
    y, x = grid(128)
    y, x = y + rng.normal(0, 0.03), x + rng.normal(0, 0.03)
    values = 40 + 130 * ellipse(y, x, (0.3, 0), (1.3, rng.uniform(0.85, 0.95)))
    if lateral:
        values -= 95 * ellipse(y, x, (-0.05, 0.05), (rng.uniform(0.6, 0.7), 0.4), 0.2)
        values += 60 * expit(-30 * (np.abs(x - 0.55 - 0.1 * y) - 0.1))
        values += 70 * ellipse(y, x, (0.35, -0.35), (0.25, 0.2))
    else:
        for side in (-1, 1):
            values -= 100 * ellipse(y, x, (-0.1, side * 0.42), (rng.uniform(0.55, 0.65), 0.27), -side * 0.1)
        values += 50 * expit(-30 * (np.abs(x) - 0.09))
        values += 75 * ellipse(y, x, (0.3, 0.2), (0.3, rng.uniform(0.28, 0.4)), 0.5)
    for row in np.linspace(-0.7, 0.4, 8):
        values += 9 * np.exp(-((y - row - 0.2 * x**2) ** 2) / 0.0008)
    return grain(rng, values + 5 * cv2.resize(smooth_noise(rng, 1.2, 64), (128, 128)), 2)
