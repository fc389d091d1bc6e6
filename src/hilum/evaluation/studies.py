"""From images to studies: every image of (dataset, patient, study) gets its study's probability.

Runs on raw predictions, before the ensemble and before any calibrator (docs/reference/predictions.md, order). The
CXR-LT challenge scores images, so the default keeps one row per image; `unit="study"` gives one row per study. The
rules are in `study_rules.py`.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from hilum.core.errors import PredictionError, StageError, UnknownNameError
from hilum.evaluation.predictions import IDENTITY, Predictions
from hilum.evaluation.study_rules import AGGREGATIONS, MEAN, StudyRule, as_rule

__all__ = [
    "AGGREGATIONS",
    "Grouped",
    "aggregate_studies",
    "group_studies",
    "mean_over_studies",
    "patient_keys",
    "study_uid",
    "study_uids",
    "view_weights",
]


def study_uid(dataset: str, patient_id: str, study_id: str) -> str:
    """First 16 hex digits of the SHA-256 of (dataset, patient, study): the id of a study row."""
    return hashlib.sha256(f"{dataset}\x1f{patient_id}\x1f{study_id}".encode()).hexdigest()[:16]


def study_uids(dataset: np.ndarray, patient_id: np.ndarray, study_id: np.ndarray, image_uid: np.ndarray) -> np.ndarray:
    """(N,) the study of each image. An image without a study id is a study of its own, under its own uid."""
    rows = zip(dataset.tolist(), patient_id.tolist(), study_id.tolist(), image_uid.tolist(), strict=True)
    return np.array([study_uid(d, p, s) if s else uid for d, p, s, uid in rows], dtype=str)


def patient_keys(dataset: np.ndarray, patient_id: np.ndarray, study: np.ndarray) -> list[str]:
    """Whose each item is, as text; an item without a patient id belongs to its study (`study_uids`)."""
    rows = zip(dataset.tolist(), patient_id.tolist(), study.tolist(), strict=True)
    return [f"p\x1f{d}\x1f{p}" if p else f"s\x1f{s}" for d, p, s in rows]


def aggregate_studies(p: Predictions, rule: StudyRule | str = MEAN, unit: str = "image") -> Predictions:
    """Give every image its study's probability (unit "image"), or one row per study (unit "study").

    Idempotent, and independent of the order of the rows to the last bit; an image alone in its study keeps its value.

    Args:
        p: raw predictions of images, or such that this function already returned by the same rule.
        rule: a rule, or its text, such as "frontal_weighted:0.8".
        unit: what a row of the result is.

    Raises:
        StageError: the predictions are already an ensemble, damped, calibrated, or aggregated by another rule.
        PredictionError: study rows cannot become images again.
        UnknownNameError: no such aggregation or unit.
        ConfigError: a rule whose weights have not been fitted.
    """
    rule = as_rule(rule)
    if unit not in ("image", "study"):
        raise UnknownNameError("unit", unit, ("image", "study"))
    _check_stage(p, rule)
    if p.unit == "study":
        if unit == "image":
            raise PredictionError(
                "These predictions have one row per study; the images are gone. Combine the raw file."
            )
        return p
    if len(p) == 0:
        raise PredictionError("There is no image to aggregate: the prediction file has no rows.")
    grouped = group_studies(p)
    order, starts = grouped.order, grouped.starts
    values = rule.aggregate(p.probabilities[order], starts, p.view[order])
    sizes, how_many = np.unique(grouped.counts, return_counts=True)
    metadata: dict[str, Any] = {
        "stage": "study",
        "study_aggregation": str(rule),
        "images_per_study": {str(size): int(n) for size, n in zip(sizes, how_many, strict=True)},
    }
    if unit == "image":
        return p.replace(values[grouped.study_of], **metadata, thresholds=None, calibration=None)
    first = p.rows(order[starts])
    rows = {name: getattr(first, name) for name in IDENTITY} | {"image_uid": grouped.studies}
    for name in ("view", *p.text_columns[len(IDENTITY) :]):  # and where the views are known from
        groups = np.split(getattr(p, name)[order], starts[1:])
        rows[name] = np.array(["+".join(sorted(set(group))) for group in groups], dtype=str)
    rows["image_id"] = np.where(first.study_id == "", first.image_id, first.study_id)
    merged = {**p.metadata, **metadata, "unit": "study"}
    for key in ("thresholds", "calibration"):  # fitted on images
        merged.pop(key, None)
    return dataclasses.replace(p, **rows, probabilities=values, metadata=merged)


def mean_over_studies(p: Predictions, unit: str = "image") -> Predictions:
    """`aggregate_studies` by the arithmetic mean of probabilities (CXR-LT 2024 slides, "Average aggregation")."""
    return aggregate_studies(p, MEAN, unit)


def view_weights(p: Predictions, rule: StudyRule | str = MEAN) -> Float[np.ndarray, " N"]:
    """What each image contributes to its study's value; the images of a study add up to 1."""
    grouped = group_studies(p)
    weights = np.empty(len(p))
    weights[grouped.order] = as_rule(rule).weights(p.view[grouped.order], grouped.starts)
    return weights


class Grouped(NamedTuple):
    """The studies of a table of images.

    Args:
        order: (N,) rows sorted by study, and within a study by image uid, so that sums do not depend on row order.
        studies: (S,) their ids, sorted.
        starts, counts: (S,) place in `order` of the first image of each, and their number.
        study_of: (N,) position in `studies` of each row of the table.
    """

    order: np.ndarray
    studies: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    study_of: np.ndarray


def group_studies(p: Predictions) -> Grouped:
    """Which images of a table form which study."""
    uids = study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid)
    order = np.lexsort((p.image_uid, uids))
    studies, starts, counts = np.unique(uids[order], return_index=True, return_counts=True)
    return Grouped(order, studies, starts, counts, np.searchsorted(studies, uids))


def _check_stage(p: Predictions, rule: StudyRule) -> None:
    if p.stage not in ("raw", "study"):
        advice = (
            "Predict with each of its members (hilum predict MEMBER --raw), then combine their files: hilum combine "
            f"a.parquet b.parquet --study {rule} --ensemble {p.metadata.get('ensemble', 'mean')}."
            if p.stage == "ensemble" or "ensemble" in p.metadata  # hilum predict ENSEMBLE --raw is at this stage too
            else "Start from raw predictions (hilum predict --raw)."
        )
        raise StageError(
            "Studies are aggregated before the ensemble and before calibration; these predictions are at stage "
            f"{p.stage!r}. {advice}"
        )
    if "normal_damping" in p.metadata:
        raise StageError(
            "Studies are aggregated before abnormal findings are damped; these predictions are damped. Combine the "
            "models in place of files, or predict with a model without damping (hilum combine MODEL --normal-damping "
            "none)."
        )
    before = p.metadata.get("study_aggregation", str(rule)) if p.stage == "study" else str(rule)
    if before != str(rule):
        raise StageError(
            f"These predictions were aggregated by {before!r}; {str(rule)!r} cannot undo that. Start from raw "
            "predictions (hilum predict --raw)."
        )
