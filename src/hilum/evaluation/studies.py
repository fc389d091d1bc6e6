"""From images to studies: every image of (dataset, patient, study) gets its study's probability.

Runs on raw predictions, before the ensemble and before any calibrator (docs/reference/predictions.md, order). The
CXR-LT challenge scores images, so the default keeps one row per image; `unit="study"` gives one row per study.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError, StageError, UnknownNameError
from hilum.evaluation.predictions import IDENTITY, Predictions

Aggregation = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def mean(
    probabilities: Float[np.ndarray, "N C"], starts: Int[np.ndarray, " S"], views: np.ndarray
) -> Float[np.ndarray, "S C"]:
    """Arithmetic mean of probabilities over the images of each study (CXR-LT 2024 slides, "Average aggregation").

    Args:
        probabilities: rows sorted by study.
        starts: first row of each study.
        views: (N,) the view of each row, for rules that weigh views; not used here.
    """
    del views
    counts = np.diff(np.append(starts, len(probabilities)))
    average = np.add.reduceat(probabilities, starts, axis=0) / counts[:, None]
    # rounding must not push a mean outside its own images: the mean of equal values is that value, exactly
    low, high = np.minimum.reduceat(probabilities, starts, axis=0), np.maximum.reduceat(probabilities, starts, axis=0)
    return np.clip(average, low, high)


AGGREGATIONS: dict[str, Aggregation] = {"mean": mean}


def study_uid(dataset: str, patient_id: str, study_id: str) -> str:
    """First 16 hex digits of the SHA-256 of (dataset, patient, study): the id of a study row."""
    return hashlib.sha256(f"{dataset}\x1f{patient_id}\x1f{study_id}".encode()).hexdigest()[:16]


def study_uids(dataset: np.ndarray, patient_id: np.ndarray, study_id: np.ndarray, image_uid: np.ndarray) -> np.ndarray:
    """(N,) the study of each image. An image without a study id is a study of its own, under its own uid."""
    rows = zip(dataset.tolist(), patient_id.tolist(), study_id.tolist(), image_uid.tolist(), strict=True)
    return np.array([study_uid(d, p, s) if s else uid for d, p, s, uid in rows], dtype=str)


def mean_over_studies(p: Predictions, unit: str = "image", method: str = "mean") -> Predictions:
    """Give every image its study's probability (unit "image"), or one row per study (unit "study").

    Idempotent, and independent of the order of the rows to the last bit.

    Args:
        p: raw predictions of images, or such that this function already returned.
        unit: what a row of the result is.
        method: a name in AGGREGATIONS.

    Raises:
        StageError: the predictions are already an ensemble or calibrated.
        PredictionError: study rows cannot become images again.
        UnknownNameError: no such aggregation or unit.
    """
    if method not in AGGREGATIONS:
        raise UnknownNameError("study aggregation", method, AGGREGATIONS)
    if unit not in ("image", "study"):
        raise UnknownNameError("unit", unit, ("image", "study"))
    if p.stage not in ("raw", "study"):
        raise StageError(
            f"Studies are aggregated before the ensemble and before calibration; these predictions are at stage "
            f"{p.stage!r}. Start from raw predictions (hilum predict --raw)."
        )
    if p.unit == "study":
        if unit == "image":
            raise PredictionError(
                "These predictions have one row per study; the images are gone. Combine the raw file."
            )
        return p
    if len(p) == 0:
        raise PredictionError("There is no image to aggregate: the prediction file has no rows.")
    uids = study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid)
    order = np.lexsort((p.image_uid, uids))  # within a study by image uid, so that sums do not depend on row order
    studies, starts, counts = np.unique(uids[order], return_index=True, return_counts=True)
    values = AGGREGATIONS[method](p.probabilities[order], starts, p.view[order])
    sizes, how_many = np.unique(counts, return_counts=True)
    metadata: dict[str, Any] = {
        "stage": "study",
        "study_aggregation": method,
        "images_per_study": {str(size): int(n) for size, n in zip(sizes, how_many, strict=True)},
    }
    if unit == "image":
        return p.replace(values[np.searchsorted(studies, uids)], **metadata, thresholds=None, calibration=None)
    first = p.rows(order[starts])
    views = np.array(["+".join(sorted(set(group))) for group in np.split(p.view[order], starts[1:])], dtype=str)
    rows = {name: getattr(first, name) for name in IDENTITY} | {"image_uid": studies, "view": views}
    rows["image_id"] = np.where(first.study_id == "", first.image_id, first.study_id)
    merged = {**p.metadata, **metadata, "unit": "study"}
    for key in ("thresholds", "calibration"):  # fitted on images
        merged.pop(key, None)
    return dataclasses.replace(p, **rows, probabilities=values, metadata=merged)
