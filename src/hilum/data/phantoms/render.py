"""One study in memory: images of one patient with chosen findings, and a mask per finding and image.

The place and kind of each finding come from a patient's stream of that finding, its severity from the study's, the
projection and the technique from the image's: so with or without another finding, a picture is otherwise the same.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import cv2
import numpy as np

from hilum.core.errors import UnknownNameError
from hilum.core.seeding import stream
from hilum.data.phantoms.anatomy import Anatomy, Array, draw_anatomy
from hilum.data.phantoms.canvas import Canvas, View
from hilum.data.phantoms.exposure import draw_technique, expose, expose_mask
from hilum.data.phantoms.signs import CHILDREN, SIGNS, Paint, Sign
from hilum.data.phantoms.signs_pleura import hydro_air, hydro_fluid
from hilum.data.phantoms.skeleton import paint_skeleton
from hilum.data.phantoms.vessels import paint_vessels


@dataclass(frozen=True)
class RenderedImage:
    """One phantom X-ray."""

    view: View
    pixels: Array
    """uint8 (H, W)."""
    masks: dict[str, Array]
    """Finding -> bool (H, W), for the findings that this view shows."""


def patient_anatomy(seed: int, patient: int) -> Anatomy:
    """The anatomy of patient number `patient`, without findings."""
    return draw_anatomy(stream(seed, "phantom", "anatomy", patient))


def render_study(
    seed: int, patient: int, study: int, positions: Sequence[str], findings: Mapping[str, float],
    shapes: Sequence[tuple[int, int]], numbers: Sequence[int] | None = None,
) -> list[RenderedImage]:  # fmt: skip
    """Render every view of one study.

    Args:
        seed: of the cohort.
        patient: its number; with the seed it fixes the anatomy and where each finding sits.
        study: its number within the patient.
        positions: "PA", "AP", "LATERAL" or "LL" for each image.
        findings: finding -> severity in [0, 1]; parents may be given with their children ("Normal" draws nothing).
        shapes: (height, width) of each image.
        numbers: the images' numbers within the study where only some of them are wanted; 0, 1, ... otherwise.

    Raises:
        UnknownNameError: a finding that has no sign.
    """
    for name in findings:
        if name not in SIGNS and name != "Normal":
            raise UnknownNameError("finding", name, SIGNS)
    drawn = signs_to_draw(findings)
    base = patient_anatomy(seed, patient)
    for name in drawn:
        shape = SIGNS[name].shape
        if shape is not None:
            shape(base, stream(seed, "phantom", "shape", patient, name), findings[name])
    images = []
    for number, position, shape_px in zip(numbers or range(len(positions)), positions, shapes, strict=True):
        rng = stream(seed, "phantom", "image", patient, study, number)
        anatomy = _posed(base, position, rng)
        view = _aim(anatomy, position, shape_px, rng)
        images.append(_render(anatomy, view, drawn, findings, (seed, patient), rng))
    return images


def signs_to_draw(findings: Mapping[str, float]) -> list[str]:
    """The findings that get a sign of their own: a parent that is explained by a child does not."""
    return [
        name for name in SIGNS if name in findings and not any(child in findings for child in CHILDREN.get(name, ()))
    ]


def _posed(base: Anatomy, position: str, rng: np.random.Generator) -> Anatomy:
    """The patient in front of the detector: breath, shoulders."""
    anatomy = deepcopy(base)
    breath = rng.normal(0, 0.35)
    if position == "AP":
        anatomy.dome -= 1.7 + 0.9 * abs(breath) + rng.uniform(0, 1.0)
        anatomy.scapula_in = float(rng.uniform(0.5, 1.0))
        anatomy.dome_curvature = (anatomy.dome_curvature[0] * 1.05, anatomy.dome_curvature[1])
    else:
        anatomy.dome += breath
        anatomy.scapula_in = float(rng.uniform(0, 0.25))
    return anatomy


def _aim(anatomy: Anatomy, position: str, shape: tuple[int, int], rng: np.random.Generator) -> View:
    """Distance and centring: the short side of the image spans the chest."""
    height, width = shape
    lateral = position in ("LATERAL", "LL")
    rough = 1.5 if position == "AP" else 1.0
    span = 2 * anatomy.half_width + 7.0 + 1.2 * anatomy.fat
    if lateral:
        span = max(anatomy.dome + 11.0, 26 + anatomy.spine_curve)
    span += abs(rng.normal(0, 1.6)) * rough
    scale = min(height, width) / max(span, anatomy.dome + 9.5)
    offset = rng.normal(0, 0.7, 2) * rough
    middle = 0.5 * (anatomy.lung_back(np.array(12.0)) - anatomy.front_depth) + 0.8 if lateral else 0.0
    level = (anatomy.dome + 3.0) / 2 - 12.0
    column = width / 2 - float(middle + offset[0]) * scale
    row = height / 2 - (level + float(offset[1]) * 0.8) * scale
    turn = float(np.clip(rng.normal(0, 0.05 * rough), -0.16, 0.16)) if not lateral else float(rng.normal(0, 0.05))
    return View(position, height, width, scale, (column, row), turn)  # type: ignore[arg-type]


def _render(
    anatomy: Anatomy, view: View, drawn: Sequence[str], findings: Mapping[str, float], who: tuple[int, int],
    rng: np.random.Generator,
) -> RenderedImage:  # fmt: skip
    technique = draw_technique(rng, view.position)
    canvas = Canvas(anatomy, view)
    paint_skeleton(canvas)
    masks: dict[str, Array] = {}
    for name in drawn:
        sign, severity = SIGNS[name], findings[name]
        masks[name] = _paint(canvas, sign, sign.paint, who, name, severity)
    if "Hydropneumothorax" in masks:
        for parent, part in (("Pneumothorax", hydro_air), ("Pleural Effusion", hydro_fluid)):
            trial = Canvas(anatomy, view)
            trial.begin()
            part(
                trial, stream(who[0], "phantom", "finding", who[1], "Hydropneumothorax"), findings["Hydropneumothorax"]
            )
            masks[parent] = trial.end()
            masks["Hydropneumothorax"] = masks["Hydropneumothorax"] | masks[parent]
    for parent in ("Fracture", "Atelectasis"):
        parts = [masks[child] for child in CHILDREN[parent] if child in masks]
        if parts:
            masks[parent] = np.logical_or.reduce(parts)
    paint_vessels(canvas)
    path = canvas.body - canvas.air * np.float32(1 - anatomy.lung_density) + canvas.extra
    pixels = expose(path.astype(np.float32), float(canvas.body.max()), view, technique, rng)
    shown = {name: expose_mask(mask, view, technique) for name, mask in masks.items() if mask.any()}
    return RenderedImage(view, pixels, {name: mask for name, mask in shown.items() if mask.any()})


def _paint(canvas: Canvas, sign: Sign, paint: Paint | None, who: tuple[int, int], name: str, severity: float) -> Array:
    mask = np.zeros(canvas.shape, bool)
    if paint is not None:
        canvas.begin()
        paint(canvas, stream(who[0], "phantom", "finding", who[1], name), severity)
        mask = _close(canvas.end(), canvas.view.scale)
    if sign.region is not None:
        mask = mask | sign.region(canvas)
    return mask


def _close(mask: Array, scale: float) -> Array:
    """Fill the holes that texture leaves, up to about 6 mm."""
    size = max(round(0.6 * scale), 1) | 1
    kernel = np.ones((size, size), np.uint8)
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, kernel) > 0
