"""One study as a document (`hilum-study-1`): what the server answers, what `hilum predict --reports` writes, what every
other format is made from. Plain JSON values, no NaN, nothing of a patient.

Its schema is packaged beside this module (docs/reference/study-report.md).
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any
from weakref import WeakKeyDictionary

import hilum
from hilum.core.errors import HilumError
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.predictor import Model
from hilum.deploy.study_result import StudyResult
from hilum.deploy.validation import read_bands
from hilum.evaluation.score_bands import ScoreBands

FORMAT = "hilum-study-1"
_bands: WeakKeyDictionary[Model, dict[bool, ScoreBands]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ImageFacts:
    """What the caller knows of an image and the result does not. Never a name: names come from files."""

    rows: int
    """Height of the whole image as it is displayed, pixels."""
    columns: int
    """Width."""

    @classmethod
    def of(cls, rows: int, columns: int, shown: tuple[int, int]) -> "ImageFacts":
        """Of an image that its file calls so high and wide.

        Args:
            rows: as the file says.
            columns: as the file says.
            shown: height and width as it is displayed, of any size: a photograph may lie on its side in its file.
        """
        on_its_side = (rows - columns) * (shown[0] - shown[1]) < 0
        return cls(columns, rows) if on_its_side else cls(rows, columns)


def study_document(
    result: StudyResult, model: Model, *, study_id: str, images: Sequence[ImageFacts], unread: Collection[int] = ()
) -> dict[str, Any]:
    """A study as plain JSON values, as `study_schema` says.

    Args:
        result: what the model said.
        model: the model; the intervals come from validation predictions in its folder, where it has one.
        study_id: a name of ours for the study; it is shown, so it must not come from a file.
        images: facts of each image, in the order in which they were predicted.
        unread: numbers, counted from 1, of images of the study that could not be read, and are not among these; the
            others keep the number under which they were given.

    Raises:
        ValueError: facts of another number of images than the result has.
    """
    if len(images) != len(result.boxes):
        raise ValueError(f"facts of {len(images)} images for a result of {len(result.boxes)}")
    scored = result.scored
    calibrated = result.calibrated
    numbers = [number for number in range(1, len(images) + len(unread) + 1) if number not in unread]
    described = [_image(result, place, numbers[place], facts, scored[place]) for place, facts in enumerate(images)]
    return {
        "format": FORMAT,
        "notice": RESEARCH_NOTICE,
        "model": {
            "digest": result.model, "hilum": hilum.__version__, "calibrated": calibrated, "unit": "study",
            "accepted_leak": model.leak, "operating_points": list(model.operating_points),
        },
        "study": {"id": study_id, "images": described},
        "status": "scored" if any(scored) else "withheld",
        "flags": _study_flags(result, numbers, unread),
        "findings": [_finding(result, model, name, numbers, bands_of(model, calibrated)) for name in result.findings],
    }  # fmt: skip


@cache
def schema_text() -> str:
    """The published schema (JSON Schema 2020-12), as it is packaged."""
    return resources.files("hilum.deploy").joinpath("study.schema.json").read_text(encoding="utf-8")


def study_schema() -> dict[str, Any]:
    """The published schema of a study document."""
    return json.loads(schema_text())


def bands_of(model: Model, calibrated: bool = True) -> ScoreBands:
    """What study scores of this model meant on validation; read once from its folder, and empty where it has none."""
    known = _bands.setdefault(model, {})
    if calibrated not in known:
        known[calibrated] = _read_bands(model, calibrated)
    return known[calibrated]


def _read_bands(model: Model, calibrated: bool) -> ScoreBands:
    if model.folder is None:
        return ScoreBands()
    try:
        content = files.read_config(model.folder)
        if files.digest_of(model.folder) != model.digest:
            return ScoreBands()  # another model was put there since it was loaded
    except (HilumError, OSError):
        return ScoreBands()  # moved away since it was loaded
    return read_bands(model.folder, content, model.composition, model.calibrators["study"], calibrated)


def _image(result: StudyResult, place: int, number: int, facts: ImageFacts, scored: bool) -> dict[str, Any]:
    given = [{"code": flag.code, "message": flag.message} for flag in result.image_flags[place]]
    codes = {flag["code"] for flag in given}
    quality = [
        {"code": code, "message": f"The decoder says: {code.replace('_', ' ')}."}
        for code in result.quality[place]
        if code not in codes
    ]
    return {
        "number": number,
        "view": result.views[place],
        "view_source": result.view_sources[place],
        "rows": facts.rows,
        "columns": facts.columns,
        "box": [float(side) for side in result.boxes[place]],
        "weight": float(result.view_weights[place]) if scored else 0.0,
        "flags": given + quality,
        "scored": scored,
    }


def _study_flags(result: StudyResult, numbers: Sequence[int], unread: Collection[int]) -> list[dict[str, str]]:
    flags, scored = [], result.scored
    if not any(scored):
        flags.append(("withheld", "No image looks like a chest X-ray that this model can read; nothing was scored."))
    elif not all(scored):
        left_out = ", ".join(str(number) for number, one in zip(numbers, scored, strict=True) if not one)
        flags.append(("images_left_out", f"Image {left_out} took no part in the study's probabilities."))
    if unread:
        lost = ", ".join(map(str, sorted(unread)))
        flags.append(("images_unread", f"Image {lost} of this study could not be read, and took no part."))
    if not result.calibrated:
        flags.append(("uncalibrated", "These scores are not calibrated; they order studies, and are no probabilities."))
    return [{"code": code, "message": message} for code, message in flags]


def _finding(result: StudyResult, model: Model, name: str, numbers: Sequence[int], bands: ScoreBands) -> dict[str, Any]:
    known = any(result.scored)
    probability = _number(result.probabilities[name]) if known else None
    trained = probability is not None if known else model.trained[name]
    points = result.thresholds.get(name) or None
    band = bands.band(name, probability)
    flag = result.flags.get(name) or None
    shares = result.contributions.get(name) if probability is not None else None
    images = [
        {
            "number": numbers[place],
            "probability": _number(result.image_probabilities[place].get(name)) if one and trained else None,
            "contribution": _number(shares[place]) if shares is not None else None,
        }
        for place, one in enumerate(result.scored)
    ]
    return {
        "name": name,
        "group": model.groups.get(name) if model.groups.get(name) in ("head", "medium", "tail") else None,
        "trained": trained,
        "probability": probability,
        "calibrated": trained and result.calibrated and "uncalibrated" not in (flag or ""),
        "interval": [band.low, band.high] if band else None,
        "thresholds": {key: float(value) for key, value in points.items()} if points and trained else None,
        "above": {key: probability > value for key, value in points.items()}
        if points and probability is not None
        else None,
        "calibration_flag": flag,
        "has_map": probability is not None and result.attention.get(name) is not None,
        "images": images,
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
