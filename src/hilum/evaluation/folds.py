"""Validation divided by patient, for choices that are made on validation and have to be judged on it too."""

import hashlib

import numpy as np
from jaxtyping import Bool, Float, Int

from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import patient_keys, study_uids

FOLDS = 5


def patient_folds(p: Predictions, folds: int = FOLDS, seed: int = 0) -> Int[np.ndarray, " N"]:
    """The fold of each item, 0 .. folds-1; all items of a patient are in one, whatever the order of the rows.

    Patients are dealt out in the order of a hash of their ids. An item without a patient id goes with its study.
    """
    studies = study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid)
    patients, place = np.unique(patient_keys(p.dataset, p.patient_id, studies), return_inverse=True)
    hashed = [hashlib.sha256(f"{seed}\x1f{key}".encode()).hexdigest() for key in patients.tolist()]
    turn = np.empty(len(patients), np.int64)
    turn[np.argsort(hashed)] = np.arange(len(patients))
    return (turn % folds)[place]


def patient_splits(p: Predictions, folds: int = FOLDS, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each fold of `patient_folds` the rows outside of it and inside; none for fewer than 2 folds or patients."""
    fold = patient_folds(p, max(folds, 1), seed)
    pairs = [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(max(folds, 0))]
    return [(rest, held_out) for rest, held_out in pairs if len(rest) and len(held_out)]


def macro_average_precision(
    probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N C"], columns: Bool[np.ndarray, " C"]
) -> float | None:
    """Macro AP over the findings in `columns` that have a positive here; None where none has.

    A finding never trained counts as a random ranking does, with its prevalence, so that leaving out the one member
    that knows it is not free.
    """
    values = []
    for column in np.flatnonzero(columns):
        scores, positive = probabilities[:, column], labels[:, column] == 1
        if not positive.any():
            continue
        known = positive | (labels[:, column] == 0)
        if np.isnan(scores[0]):
            values.append(float(positive.sum() / known.sum()))
        else:
            values.append(_average_precision(scores[known], scores[positive]))
    return float(np.mean(values)) if values else None


def _average_precision(scores: np.ndarray, positives: np.ndarray) -> float:
    """`definitions.average_precision` for a search that asks for it thousands of times: sorts values, never positions.

    The mean over positives of the precision at their score, ties entering together.
    """
    ordered, hits = np.sort(scores), np.sort(positives)
    above = len(ordered) - np.searchsorted(ordered, hits, side="left")
    hits_above = len(hits) - np.searchsorted(hits, hits, side="left")
    return float(np.mean(hits_above / above))
