"""A CXR-LT submission from predictions: one row per image of the challenge's list, one column per class of the task.

Classes come by name in the order of the sample submission (`data/labels.py`), ids exactly as listed. Scaling moves
the F1-optimal cut of each finding to 0.5 by a strictly increasing map, so AP and AUC stay as they are. Writing is in
`commands/submit.py`.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hilum.core.errors import PredictionError
from hilum.evaluation.predictions import Predictions, bare_ids

ID_COLUMN = "dicom_id"
ABOVE_HALF = float(np.nextafter(0.5, 1.0))


def read_ids(path: Path) -> list[str]:
    """The ids of a challenge's list (test CSV or sample submission), in its order.

    Raises:
        PredictionError: no such file, no column dicom_id, an empty or repeated id.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if ID_COLUMN not in (reader.fieldnames or []):
                raise PredictionError(f"{path} has no column {ID_COLUMN!r}; found {reader.fieldnames}.")
            ids = [row[ID_COLUMN] or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PredictionError(f"{path} cannot be read as a CSV of ids: {error}.") from error
    repeated = len(ids) - len(set(ids))
    if repeated or "" in ids or not ids:
        raise PredictionError(
            f"{path}: expected distinct ids; found {len(ids)} rows, {repeated} repeats, {ids.count('')} empty."
        )
    return ids


def submission_rows(
    predictions: Predictions, classes: Sequence[str], ids: Sequence[str], fill: Mapping[str, float] | None = None
) -> Float[np.ndarray, "N C"]:
    """Probabilities of the listed images, in their order, and of the task's classes, in theirs.

    Args:
        predictions: of images; more images than listed are left out.
        classes: the task's, in the order of the sample submission.
        ids: the list.
        fill: constant for a class that was never trained; without it, such a class is an error.

    Raises:
        PredictionError: study rows, an image or a class missing, a class never trained, an id standing for two images.
    """
    if predictions.unit != "image":
        raise PredictionError("The challenge scores images: combine with --unit image, so that each keeps its row.")
    names = bare_ids(predictions.image_id, predictions.dataset)
    place: dict[str, int] = {}
    listed = set(ids)
    for row, name in enumerate(names.tolist()):
        if place.setdefault(name, row) != row and name in listed:
            raise PredictionError(f"Two predicted images have the id {name!r}; predict one dataset at a time.")
    missing = [name for name in ids if name not in place]
    if missing:
        raise PredictionError(
            f"{len(missing)} of {len(ids)} listed images were not predicted, for example {missing[0]!r}."
        )
    chosen = predictions.rows(np.array([place[name] for name in ids])).select(classes)
    untrained = [name for name, trained in zip(classes, chosen.trained, strict=True) if not trained]
    unfilled = [name for name in untrained if name not in (fill or {})]
    if unfilled:
        raise PredictionError(
            f"This task has findings that were never trained: {', '.join(map(repr, unfilled))}. Train them, or say "
            "--fill-untrained prevalence to submit a constant, which ranks nothing."
        )
    values = chosen.probabilities.copy()
    for name in untrained:
        values[:, list(classes).index(name)] = (fill or {})[name]
    return values


def move_cut_to_half(probabilities: Float[np.ndarray, " N"], threshold: float) -> Float[np.ndarray, " N"]:
    """A strictly increasing map with p > 0.5 after exactly where p > threshold before.

    Linear from 0 to the cut and from the cut to 1. Where float64 has no room (scores closer than its spacing), the
    next number that float64 has keeps the order: equal scores stay equal, different ones different.

    Raises:
        PredictionError: the threshold is not inside (0, 1).
    """
    if not 0 < threshold < 1:
        raise PredictionError(f"A cut can be moved to 0.5 only from inside (0, 1); found {threshold!r}.")
    values, place = np.unique(np.asarray(probabilities, np.float64), return_inverse=True)
    above = values > threshold
    below = 0.5 * (values / threshold)
    beyond = np.maximum(0.5 + 0.5 * (values - threshold) / (1 - threshold), ABOVE_HALF)
    low, high = np.minimum(below[~above], 0.5), np.minimum(beyond[above], 1.0)
    moved = np.append(_descend(_ascend(low, 0.0), 0.5), _descend(_ascend(high, ABOVE_HALF), 1.0))
    if not (np.diff(moved) > 0).all() or not ((moved > 0.5) == above).all():
        raise PredictionError("These scores are too close together to be scaled without ties. Submit them unscaled.")
    return moved[place]


def _ascend(values: np.ndarray, start: float) -> np.ndarray:
    """Raise each value just above the one before it, the first to `start` at least."""
    if len(values) == 0 or (values[0] >= start and (np.diff(values) > 0).all()):
        return values
    result = values.copy()
    result[0] = max(result[0], start)
    for index in range(1, len(result)):
        result[index] = max(result[index], np.nextafter(result[index - 1], 2.0))
    return result


def _descend(values: np.ndarray, end: float) -> np.ndarray:
    """Lower each value just below the one after it, the last to `end` at most."""
    return -_ascend(-values[::-1], -end)[::-1]
