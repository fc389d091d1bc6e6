"""The parametric thorax: one patient's anatomy in centimetres, as profiles, ellipsoids, tubes and curves.

Axes: x towards the patient's left, y down from the apex of the lungs, z towards the back; the origin is in the
midline at the level of the first thoracic vertebra. Findings change an `Anatomy` or paint on its projection
(`canvas.py`); nothing here knows about pixels. Sizes are adult values of anatomy textbooks.
"""

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

Array = np.ndarray
Heights = TypeVar("Heights", np.ndarray, np.float64)
"""Heights y, cm; of one height, given as a number or as an array of no dimension, numpy makes a number."""
RIGHT, LEFT = -1, 1
SIDES = (RIGHT, LEFT)
RIBS = 11
RIB_SPACING = 2.2
VERTEBRA_SPACING = 2.2
BEAM_LEVEL = 12.0  # y of the central ray


@dataclass
class Break:
    """A fracture of one bone: where along it (0 to 1), how far the far piece is displaced down (cm), how healed."""

    bone: str
    side: int
    number: int
    position: float
    offset: float
    callus: float = 0.0


@dataclass
class Anatomy:
    """One thorax. Lengths in cm."""

    female: bool = False
    age: float = 60.0
    fat: float = 1.5
    half_width: float = 13.2
    front_depth: float = 8.2
    dome: float = 22.0
    """y of the top of the right hemidiaphragm at full inspiration of this patient."""
    left_dome_drop: float = 1.0
    dome_curvature: tuple[float, float] = (0.085, 0.065)
    """Fall per squared cm from the top of the dome, sideways and front to back."""
    raised: dict[int, float] = field(default_factory=lambda: {RIGHT: 0.0, LEFT: 0.0})
    heart_length: float = 6.5
    heart_breadth: float = 5.0
    heart_depth: float = 4.7
    heart_tilt: float = 0.62
    heart_shift: float = 2.1
    vascular_pedicle: dict[int, float] = field(default_factory=lambda: {RIGHT: 2.3, LEFT: 2.1})
    knob: float = 1.3
    pulmonary_trunk: float = 0.8
    widening: dict[int, float] = field(default_factory=lambda: {RIGHT: 0.0, LEFT: 0.0})
    aorta_radius: float = 1.3
    aorta_unfolding: float = 0.0
    spine_curve: float = 1.6
    spine_lean: float = 0.0
    spine_sway: float = 0.0
    """How far the thoracic spine bows sideways, to the patient's left where positive (scoliosis)."""
    bone_density: float = 1.0
    """Of the healthy."""
    lung_density: float = 0.26
    vessel_gain: float = 1.0
    vessel_seed: int = 0
    rib_slope: float = 1.0
    breast: float = 0.0
    stomach_gas: float = 0.7
    scapula_in: float = 0.0
    breaks: list[Break] = field(default_factory=list)
    wedge: dict[int, float] = field(default_factory=dict)
    """Vertebra number -> share of its height that is lost in front."""

    def rib_cage(self, y: Heights) -> Heights:
        """Half width of the rib cage at level y."""
        v = np.clip((y + 1.9) / 14.2, 0.0, 1.0)
        narrowing = 0.012 * np.maximum(y - 19, 0) ** 2
        return (
            self.half_width * np.sqrt(np.maximum(1 - (1 - v) ** 1.85, 1e-4)) + 0.05 * np.maximum(y - 11, 0) - narrowing
        )

    def medial_border(self, y: Heights, side: int) -> Heights:
        """Distance of the lung's medial border from the midline: the outline of the mediastinum above the heart."""
        border = self.vascular_pedicle[side] + 0.9 * np.exp(-np.maximum(y, 0) / 2.2)
        if side == LEFT:
            border = border + 1.5 * ramp(y, 9.0, 14.0)
            border = border + self.knob * bump(y, 6.3, 1.5) + self.pulmonary_trunk * bump(y, 9.8, 1.3)
        else:
            border = border + 0.35 * bump(y, 8.2, 0.9) + 0.5 * ramp(y, 9.0, 14.0)
        return border + self.widening[side] * bump(y, 6.5, 4.2)

    def lateral_border(self, y: Heights) -> Heights:
        """Distance of the lung's lateral border from the midline."""
        return self.rib_cage(y) - 0.7

    def spine(self, y: Heights) -> Heights:
        """Depth z of the centre of the vertebral bodies."""
        return 4.6 + self.spine_curve * (1 - ((y - 10.5) / 13.0) ** 2)

    def spine_side(self, y: Heights) -> Heights:
        """Distance x of the centre of the vertebral bodies from the midline: a bow, and a smaller one against it."""
        return self.spine_lean * (y - 10) + self.spine_bow(y)

    def spine_bow(self, y: Heights) -> Heights:
        """What scoliosis alone makes of `spine_side`; 0 without it."""
        return self.spine_sway * np.sin((y - 1.5) / 17.0 * np.pi)

    def lung_front(self, y: Heights) -> Heights:
        """Depth z of the front of the lungs."""
        v = np.clip((y + 0.5) / 14.0, 0.0, 1.0)
        return -self.front_depth * np.sqrt(1 - (1 - v) ** 1.3)

    def lung_back(self, y: Heights) -> Heights:
        """Depth z of the back of the lungs."""
        return self.spine(y) + 2.0

    def dome_centre(self, side: int) -> tuple[float, float, float]:
        """Top of a hemidiaphragm (x, y, z)."""
        drop = self.left_dome_drop if side == LEFT else 0.0
        return side * 6.2, self.dome + drop - self.raised[side], -1.5

    def heart_centre(self) -> tuple[float, float, float]:
        """Centre of the heart: it rests on the diaphragm."""
        front = -self.front_depth + 0.2 + self.heart_breadth  # a large heart grows backwards from the sternum
        return self.heart_shift, self.dome + 0.6 - 0.86 * self.heart_breadth, max(-3.4, front)

    def hilum(self, side: int) -> tuple[float, float, float]:
        """Where the vessels enter the lung; the left one is the higher."""
        return side * 3.7, 10.9 if side == RIGHT else 10.1, 1.0

    def spot(
        self, rng: np.random.Generator, side: int, height: tuple[float, float],
        lateral: tuple[float, float] = (0.2, 0.85), depth: tuple[float, float] = (0.2, 0.8),
    ) -> Array:  # fmt: skip
        """A random point in a lung: shares of the way from apex to dome, from medial to lateral, from front to back."""
        share_y, share_x, share_z = rng.uniform(*height), rng.uniform(*lateral), rng.uniform(*depth)
        y = np.array(share_y * self.dome_centre(side)[1])
        medial, outer = self.medial_border(y, side), self.lateral_border(y)
        front, back = self.lung_front(y), self.lung_back(y)
        return np.array([side * (medial + share_x * (outer - medial)), y, front + share_z * (back - front)])

    def ribs(self, side: int, numbers: Array, positions: Array) -> Array:
        """Points (R, N, 3) on the centre lines of ribs, from the spine (position 0) round to the front (1).

        Args:
            side: RIGHT or LEFT.
            numbers: (R,) from 0, the first rib.
            positions: (R, N) in [0, 1].
        """
        numbers = numbers[:, None]
        short = np.where(numbers >= RIBS - 1, 0.5, 1.0)
        angle = np.deg2rad(11 + (134 * short - 11) * positions)
        drop = self.rib_slope * np.minimum(3.4 + 0.75 * numbers, 8.6)
        y = -1.1 + RIB_SPACING * numbers + drop * ((1 - np.cos(angle)) / 2) ** 1.1
        front, back = self.lung_front(y) - 0.3, self.lung_back(y) + 0.3
        z = (front + back) / 2 + (back - front) / 2 * np.cos(angle)
        return np.stack([side * self.rib_cage(y) * np.sin(angle) ** 0.9, y, z], -1)

    def clavicle(self, side: int, points: int = 24) -> Array:
        """Points (N, 3) of a clavicle from the sternum to the shoulder."""
        t = np.linspace(0, 1, points)
        y = 2.6 - 3.4 * t + 0.55 * np.sin(2 * np.pi * t) - self.scapula_in * 0.9 * t
        return np.stack([side * (1.9 + 14.2 * t), y, -6.5 + 6.5 * t - 1.2 * np.sin(np.pi * t)], 1)

    def trachea(self) -> list[Array]:
        """Centre lines of the trachea and the main bronchi."""
        carina = np.array([-0.3, 8.8, 1.6])
        tube = np.array([[0.0, -7.0, -1.5], [-0.1, 0.0, 0.2], [-0.5, 5.5, 1.2], carina])
        bronchi = [np.array([carina, [side * 1.9, 10.4, 1.6], self.hilum(side)]) for side in SIDES]
        return [tube, *bronchi]

    def aorta(self, points: int = 40) -> Array:
        """Centre line of the arch and the descending aorta, from the ascending part to the diaphragm."""
        t = np.linspace(0, 1, points)
        arch = t < 0.35
        angle = np.pi * np.clip(t / 0.35, 0, 1)
        top = 6.6 - 0.9 * self.aorta_unfolding
        y = np.where(arch, top + 2.3 * (1 - np.sin(angle)), top + 2.3 + (t - 0.35) / 0.65 * (self.dome + 1 - top))
        z = np.where(arch, -0.2 - 3.2 * np.cos(angle), self.spine(y) - 2.0)
        z = np.where(arch, z, np.minimum(z, 3.0 + (t - 0.35) * 20))
        below = np.clip((t - 0.35) / 0.65, 0, 1)
        x = np.where(arch, -0.6 + 2.9 * angle / np.pi, 2.3 - 1.2 * below)
        x = x + self.aorta_unfolding * (1.3 * bump(t, 0.3, 0.12) + 2.6 * np.sin(np.pi * below) ** 1.2)
        return np.stack([x, y, z], 1)


def bump(y: Heights, centre: float, width: float) -> Heights:
    """A Gaussian bump of height 1."""
    return np.exp(-(((y - centre) / width) ** 2))


def ramp(y: Heights, start: float, stop: float) -> Heights:
    """0 before `start`, 1 after `stop`, smooth between."""
    t = np.clip((y - start) / (stop - start), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A patient without findings: sex, age, build and proportions vary."""
    female = bool(rng.random() < 0.48)
    age = float(np.clip(rng.normal(62, 17), 18, 95))
    fat = float(np.clip(rng.lognormal(0.35, 0.55), 0.5, 4.5))
    old = max(age - 50, 0) / 40
    shallow, deep = rng.normal(0, 1, 2)
    return Anatomy(
        female=female,
        age=age,
        fat=fat,
        half_width=float((12.6 if female else 13.5) + rng.normal(0, 0.5)),
        front_depth=float(8.0 + 0.5 * shallow),
        dome=float(21.6 + rng.normal(0, 0.8)),
        left_dome_drop=float(rng.uniform(0.4, 1.6)),
        dome_curvature=(float(rng.uniform(0.075, 0.1)), float(rng.uniform(0.055, 0.075))),
        heart_length=float(np.clip(6.7 + 0.25 * old + rng.normal(0, 0.34), 5.8, 7.5)),
        heart_breadth=float(4.6 + rng.normal(0, 0.27)),
        heart_depth=float(4.6 + rng.normal(0, 0.2)),
        heart_tilt=float(rng.uniform(0.45, 0.8)),
        heart_shift=float(rng.uniform(1.7, 2.5)),
        vascular_pedicle={
            RIGHT: float(2.55 + rng.normal(0, 0.28) + 0.06 * fat),
            LEFT: float(2.3 + rng.normal(0, 0.28) + 0.06 * fat),
        },
        knob=float(np.clip(0.8 + 0.6 * old + rng.normal(0, 0.18), 0.3, 1.8)),
        pulmonary_trunk=float(np.clip(0.75 + rng.normal(0, 0.3), 0.1, 1.5)),
        aorta_radius=float(1.15 + 0.2 * old + rng.normal(0, 0.06)),
        aorta_unfolding=float(np.clip(0.15 * old + rng.normal(0, 0.05), 0, 0.3)),
        spine_curve=float(np.clip(1.4 + 0.7 * old + 0.45 * deep, 0.3, 3.2)),
        spine_lean=float(rng.normal(0, 0.02)),
        lung_density=float(0.26 + rng.normal(0, 0.018)),
        vessel_gain=float(np.clip(rng.normal(1, 0.12), 0.7, 1.3)),
        vessel_seed=int(rng.integers(2**31)),
        rib_slope=float(rng.uniform(0.85, 1.15)),
        breast=float(rng.uniform(0.5, 1.0) * (0.7 + 0.2 * fat)) if female else 0.0,
        stomach_gas=float(rng.uniform(0, 1)),
        scapula_in=0.0,
    )
