"""Projection: line integrals through one thorax along parallel-ish rays, at the resolution of the image.

A `Canvas` holds, for one view, the path length through soft tissue and lung in closed form (chords of superellipses,
minus diaphragm and heart), and lets findings add or remove tissue with 3D primitives, so that the frontal and the
lateral view show the same lesion. Amounts are centimetres of soft tissue (1 cm of bone counts about 1.8).
It does not expose, blur or write anything (`exposure.py`). Past 300 lines: the primitives share one geometry.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from hilum.data.phantoms import textures
from hilum.data.phantoms.anatomy import BEAM_LEVEL, LEFT, RIGHT, SIDES, Anatomy, Array, ramp

Slices = tuple[slice, slice]
SHIFT = 4  # fractional bits of OpenCV's drawing coordinates


@dataclass(frozen=True)
class View:
    """Where the tube, the patient and the detector stand."""

    position: Literal["PA", "AP", "LATERAL", "LL"]
    height: int
    width: int
    scale: float
    """Pixels per cm in the plane through the patient's middle."""
    centre: tuple[float, float]
    """Pixel (column, row) of the central ray."""
    turn: float = 0.0
    """Sine of the patient's rotation about the long axis."""

    @property
    def lateral(self) -> bool:
        """Whether this is a lateral view (front of the patient on the left of the image)."""
        return self.position in ("LATERAL", "LL")

    def magnification(self, depth: float | Array) -> float | Array:
        """Enlargement of a plane relative to the plane through the middle: far from the detector is larger."""
        if self.lateral:
            source, detector = 183.0, 19.0
        else:
            source, detector = (183.0, -13.0) if self.position == "PA" else (105.0, 14.0)
        return (source - abs(detector)) / (source - np.abs(depth - detector))

    def project(self, points: Array) -> Array:
        """(N, 3) cm -> (N, 2) pixel column and row."""
        across, depth = (points[:, 2], points[:, 0]) if self.lateral else (points[:, 0], points[:, 2])
        enlarged = self.scale * self.magnification(depth)
        columns = self.centre[0] + enlarged * (across + self.turn * depth)
        return np.stack([columns, self.centre[1] + enlarged * (points[:, 1] - BEAM_LEVEL)], 1)


def column(values: Array) -> Array:
    """A profile over the rows as a float32 column that broadcasts against the image."""
    return values.astype(np.float32)[:, None]


def superellipse(across: Array, centre: Array, half: Array, size: Array) -> Array:
    """`size` times the chord of a flat-topped unit shape, row by row (float32)."""
    position = (across - column(centre)) * column(1 / np.maximum(half, 1e-3))
    position *= position
    position *= position
    return np.sqrt(np.maximum(1 - position, 0)) * column(size)


class Canvas:
    """One view of one thorax, open for painting."""

    def __init__(self, anatomy: Anatomy, view: View) -> None:
        self.anatomy, self.view = anatomy, view
        self.shape = (view.height, view.width)
        self.across = ((np.arange(view.width, dtype=np.float32) - view.centre[0]) / view.scale)[None, :]
        self.y = ((np.arange(view.height, dtype=np.float32) - view.centre[1]) / view.scale + BEAM_LEVEL)[:, None]
        self.extra = np.zeros(self.shape, np.float32)
        self.marking: dict[int, Array | None] = {RIGHT: None, LEFT: None}
        self.touched: Array | None = None
        self.body, self.outline = self._body()
        self.heart_half, self.heart_depth = self._heart()
        self.lung = {side: self._lung(side) for side in SIDES}
        self.air = self.lung[RIGHT] + self.lung[LEFT]
        self.inside = np.minimum(self.air / 2.5, 1.0)

    # Closed-form bodies

    def _body(self) -> tuple[Array, Array]:
        """Thickness of the trunk without arms, and where it is."""
        a, y = self.anatomy, self.y[:, 0]
        torso = a.rib_cage(np.maximum(y, 3.0)) + 2.0 + 0.9 * a.fat + 0.05 * np.maximum(y - 20, 0) * a.fat
        slope = np.clip((y + 6.0) / 6.5, 0, 1)
        shoulder = 5.6 + 0.4 * a.fat + 14.5 * slope**1.6 * (3 - 2 * slope)
        front = np.minimum(a.lung_front(np.maximum(y, 0)) - 2.0, -5.8 - 0.25 * np.clip(y, 0, 6)) - 0.9 * a.fat
        back = a.spine(y) + 4.2 + 0.7 * a.fat
        if self.view.lateral:
            front = front + 1.8 * (1 - ramp(y, -3.0, 3.0))
            centre, half = (front + back) / 2, (back - front) / 2
            thickness = 2 * (torso - 1.0 + 1.5 * (1 - ramp(y, 0.0, 6.0))) * np.clip((y + 8) / 7, 0.35, 1)
        else:
            half = np.where(y < 4.5, np.minimum(shoulder, 20.0), torso)
            half = half + (20.0 - torso) * np.clip((6.5 - y) / 2.0, 0, 1) * (y >= 4.5)
            centre, thickness = np.zeros_like(y), (back - front) * np.clip((y + 12) / 13, 0.6, 1)
        chord = superellipse(self.across, centre, half, thickness)
        return chord, chord > 0

    def _heart(self) -> tuple[Array, float]:
        """Half length of the ray inside the heart, and the depth of its centre."""
        a = self.anatomy
        x, y, z = a.heart_centre()
        if self.view.lateral:
            across, depth, long, short, half, tilt = z, x, a.heart_breadth * 1.12, a.heart_depth, a.heart_length, -0.6
        else:
            across, depth, long, short, half, tilt = x, z, a.heart_length, a.heart_breadth, a.heart_depth, a.heart_tilt
        enlarged = float(self.view.magnification(depth))
        u = self.across / np.float32(enlarged) - np.float32(self.view.turn * depth + across)
        v = (self.y - np.float32(BEAM_LEVEL)) / np.float32(enlarged) + np.float32(BEAM_LEVEL - y)
        cosine, sine = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
        along = u * (cosine / np.float32(long)) + v * (sine / np.float32(long))
        over = v * (cosine / np.float32(short)) - u * (sine / np.float32(short))
        inside = 1 - along * along - over * over
        if not self.view.lateral:  # the right atrium rounds the right border
            f = np.float32
            atrium = 1 - ((u + f(0.48 * long)) / f(3.1)) ** 2 - ((v - f(0.8)) / f(3.9)) ** 2
            base = 1 - ((u + f(0.5)) / f(0.62 * long)) ** 2 - ((v + f(2.6)) / f(4.4)) ** 2
            inside = np.maximum(np.maximum(inside, atrium), base)
        return (np.float32(half) * np.sqrt(np.maximum(inside, 0))).astype(np.float32), depth

    def _lung(self, side: int) -> Array:
        """Length of the ray inside one lung: a superelliptic cylinder minus the diaphragm's dome and the heart."""
        a, y = self.anatomy, self.y[:, 0]
        level = np.maximum(y, 0)
        medial, outer = a.medial_border(level, side), a.lateral_border(level)
        front, back = a.lung_front(level), a.lung_back(level)
        tip = np.sqrt(1 - np.clip(1 - y / 2.6, 0, 1) ** 2)
        middle_x, half_x = side * (medial + outer) / 2, (outer - medial) / 2 * tip
        middle_z, half_z = (front + back) / 2, (back - front) / 2 * tip
        top_x, top_y, top_z = a.dome_centre(side)
        curve_x, curve_z = a.dome_curvature
        if self.view.lateral:
            centre, half, depth, reach = middle_z, half_z, middle_x, half_x
            top_across, top_depth, curve_across, curve_depth = top_z, top_x, curve_z, curve_x
        else:
            centre, half, depth, reach = middle_x, half_x, middle_z, half_z
            top_across, top_depth, curve_across, curve_depth = top_x, top_z, curve_x, curve_z
        across = self.across - np.float32(self.view.turn * top_depth if self.view.lateral else 0.0)
        chord = superellipse(across, centre, half, reach)
        middle = column(depth)
        low, high = middle - chord, middle + chord
        below = self.y - (top_y + np.float32(curve_across) * (across - np.float32(top_across)) ** 2)
        dome = np.sqrt(np.maximum(below, 0) * np.float32(1 / curve_depth))
        covered = np.minimum(high, np.float32(top_depth) + dome) - np.maximum(low, np.float32(top_depth) - dome)
        air = 2 * chord - np.maximum(covered, 0) * (below > 0)
        in_heart = np.minimum(high, self.heart_depth + self.heart_half) - np.maximum(
            low, self.heart_depth - self.heart_half
        )
        air -= np.maximum(in_heart, 0) * (self.heart_half > 0)
        return np.maximum(air, 0).astype(np.float32)

    # Painting

    def begin(self) -> None:
        """Start recording what the next finding changes."""
        self.touched = np.zeros(self.shape, np.float32)

    def end(self, least: float = 0.22, share: float = 0.22) -> Array:
        """Where the finding changed the path by at least `least` cm and `share` of its own maximum (H, W bool)."""
        assert self.touched is not None
        change, self.touched = self.touched, None
        return change > max(least, share * float(change.max(initial=0)))

    def add(self, window: Slices, amount: Array, mark: float = 1.0) -> None:
        """Add tissue (cm of soft tissue; negative: air) in a window; `mark` weighs it in the mask."""
        self.extra[window] += amount
        if self.touched is not None and mark:
            self.touched[window] += np.abs(amount) * np.float32(mark)

    def add_all(self, amount: Array, mark: float = 1.0) -> None:
        """Add tissue everywhere."""
        self.add((slice(None), slice(None)), amount, mark)

    def cover(self, amount: Array) -> None:
        """Count a region as changed by at least `amount` cm, for textures and for what is missing."""
        if self.touched is not None:
            self.touched = np.maximum(self.touched, amount).astype(np.float32)

    def thin_vessels(self, side: int, factor: Array) -> None:
        """Multiply the vessels of one lung by a map (0: no markings)."""
        old = self.marking[side]
        self.marking[side] = factor if old is None else old * factor

    def window(self, centre: Array, radii: Array, margin: float = 1.0) -> tuple[Slices, Array, Array] | None:
        """The part of the image round a 3D box, with its coordinates in cm about the centre; None when outside."""
        axis, other = (2, 0) if self.view.lateral else (0, 2)
        enlarged = float(self.view.magnification(centre[other])) * self.view.scale
        column, row = self.view.project(np.asarray(centre, float)[None])[0]
        half_columns, half_rows = radii[axis] * enlarged * margin + 1, radii[1] * enlarged * margin + 1
        left, right = max(int(column - half_columns), 0), min(int(column + half_columns) + 2, self.shape[1])
        top, bottom = max(int(row - half_rows), 0), min(int(row + half_rows) + 2, self.shape[0])
        if left >= right or top >= bottom:
            return None
        u = ((np.arange(left, right, dtype=np.float32) - np.float32(column)) / np.float32(enlarged))[None, :]
        v = ((np.arange(top, bottom, dtype=np.float32) - np.float32(row)) / np.float32(enlarged))[:, None]
        return (slice(top, bottom), slice(left, right)), u, v

    def ellipsoid(
        self, centre: Array, radii: Array, amount: float = 1.0, softness: float = 0.5, in_lung: bool = False,
        rng: np.random.Generator | None = None, texture: str | None = None, strength: float = 1.0, angle: float = 0.0,
        mark: float = 1.0,
    ) -> None:  # fmt: skip
        """Add a solid or hazy ellipsoid.

        Args:
            centre: (x, y, z) cm.
            radii: half axes (x, y, z) cm.
            amount: density relative to soft tissue.
            softness: 0.5 is a solid body with its sharp edge; 1.5 fades out.
            in_lung: only where there is lung to replace.
            rng: for the texture.
            texture: a tile of `textures.py` that modulates the density.
            strength: share of the density that follows the texture.
            angle: tilt in the image plane (radians).
            mark: weight in the mask.
        """
        seed = 0 if rng is None else int(rng.integers(2**31))  # one draw in every view, also where nothing is seen
        found = self.window(centre, np.full(3, np.max(radii)) if angle else radii)
        if found is None:
            return
        where, u, v = found
        axis, other = (2, 0) if self.view.lateral else (0, 2)
        if angle:
            cosine, sine = np.cos(angle), np.sin(angle)
            u, v = u * cosine + v * sine, v * cosine - u * sine
        inside = np.maximum(1 - (u / radii[axis]) ** 2 - (v / radii[1]) ** 2, 0).astype(np.float32)
        chord = np.sqrt(inside) if softness == 0.5 else cv2.pow(inside, softness)
        chord = chord * np.float32(2 * radii[other] * amount)
        if texture is not None and rng is not None:
            height, width = chord.shape
            noise = textures.crop(texture, seed, height, width, self.view.scale)
            chord *= (1 - strength) + 2 * strength * noise
        if in_lung:
            chord = np.minimum(chord * self.inside[where], self.air[where] * 0.8)
        self.add(where, chord, mark)

    def band(self, points: Array, width: float | Array, amount: float, mark: float = 1.0, clip: bool = False) -> None:
        """Add a flat band (a line, a tube, a bone) along (N, 3) points; thinner than a pixel it only gets fainter.

        Args:
            points: centre line, cm.
            width: cm, one number or one for each point.
            amount: cm of soft tissue at full cover.
            mark: weight in the mask.
            clip: only where there is lung.
        """
        layer = np.zeros(self.shape, np.uint8)
        cover = self.draw(layer, points, width)
        left, top, right, bottom = cover
        if left >= right or top >= bottom:
            return
        where = (slice(top, bottom), slice(left, right))
        thin = min(float(np.mean(width)) * self.view.scale / 1.2, 1.0)
        change = layer[where].astype(np.float32) * np.float32(amount * thin / 255)
        if clip:
            change *= self.inside[where]
        self.add(where, change, mark)

    def draw(self, layer: Array, points: Array, width: float | Array, value: int = 255) -> tuple[int, int, int, int]:
        """Draw a band into a uint8 layer; returns the box (left, top, right, bottom) that holds it."""
        return self.fill(layer, self.edges(points[None], width)[0], value)

    def draw_many(self, layer: Array, points: Array, width: float | Array, value: int = 255) -> None:
        """Draw bands that do not cross: points (R, N, 3)."""
        self.fill_many(layer, self.edges(points, width), value)

    def edges(self, points: Array, width: float | Array) -> Array:
        """Outlines (R, 2N, 2) in pixels of bands along points (R, N, 3); no band is thinner than about a pixel."""
        count, length, _ = points.shape
        line = self.view.project(points.reshape(-1, 3)).reshape(count, length, 2)
        half = np.maximum(np.asarray(width, float) * (self.view.scale / 2), 0.6)
        step = np.empty_like(line)
        step[:, 1:-1] = line[:, 2:] - line[:, :-2]
        step[:, 0], step[:, -1] = line[:, 1] - line[:, 0], line[:, -1] - line[:, -2]
        long = np.sqrt(step[..., 0] ** 2 + step[..., 1] ** 2) + 1e-6
        aside = step[..., ::-1] * (np.broadcast_to(half, (count, length)) / long)[..., None]
        aside[..., 0] *= -1
        return np.concatenate([line + aside, (line - aside)[:, ::-1]], 1)

    def fill_many(self, layer: Array, polygons: Array, value: int = 255) -> None:
        """Fill polygons (R, N, 2) of pixel coordinates."""
        for polygon in np.rint(np.clip(polygons, -2000, 4000) * (1 << SHIFT)).astype(np.int32):
            cv2.fillPoly(layer, [polygon], value, cv2.LINE_AA, SHIFT)

    def fill(self, layer: Array, polygon: Array, value: int = 255) -> tuple[int, int, int, int]:
        """Fill a polygon of pixel coordinates (N, 2) with smooth edges."""
        limited = np.clip(polygon, -2000, 4000)
        cv2.fillPoly(layer, [np.round(limited * (1 << SHIFT)).astype(np.int32)], value, cv2.LINE_AA, SHIFT)
        left, top = (np.floor(limited.min(0)).astype(int) - 2).tolist()
        right, bottom = (np.ceil(limited.max(0)).astype(int) + 3).tolist()
        return max(left, 0), max(top, 0), min(right, self.shape[1]), min(bottom, self.shape[0])

    def blob(self, polygon: Array, blur: float = 0.0) -> Array:
        """A map (H, W) in [0, 1]: the inside of a polygon of 3D points (N, 3), its edge blurred by `blur` cm."""
        layer = np.zeros(self.shape, np.uint8)
        self.fill(layer, self.view.project(polygon))
        return self.soften(layer.astype(np.float32) / 255, blur) if blur else layer.astype(np.float32) / 255

    def soften(self, field: Array, blur: float) -> Array:
        """Blur by `blur` cm, at a quarter of the resolution where that is enough."""
        sigma = blur * self.view.scale
        if sigma < 3:
            return cv2.GaussianBlur(field, (0, 0), max(sigma, 0.3))
        small = cv2.resize(field, (self.shape[1] // 4, self.shape[0] // 4), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), sigma / 4)
        return cv2.resize(small, (self.shape[1], self.shape[0]), interpolation=cv2.INTER_LINEAR)

    def texture(self, kind: str, rng: np.random.Generator) -> Array:
        """A texture over the whole image."""
        height, width = self.shape
        return textures.crop(kind, int(rng.integers(2**31)), height, width, self.view.scale)
