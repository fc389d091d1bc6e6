"""A CXR-LT submission, made, checked and scored: one row per image of the challenge's list, one column per class.

Classes come by name in the order of the sample submission (`data/labels.py`), ids exactly as listed. Scaling is in
`challenge_scaling.py`; writing in `commands/submit.py`. Just past 300 lines: making and checking are of one format.
"""

import csv
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError, UnknownNameError
from hilum.data.labels import ID_COLUMNS, TASKS, task_findings
from hilum.evaluation.definitions import average_precision, challenge_ece, f1_of_present, roc_auc
from hilum.evaluation.predictions import Predictions, bare_ids
from hilum.evaluation.truth import Truth

DIGITS = 6
"""Scores written with so few significant digits have ties that the model did not make."""
SHOWN = 3
CODE = "code/"
"""The folder beside the CSV in a submission's zip."""


def read_ids(path: Path, column: str = "dicom_id") -> list[str]:
    """The ids of a challenge's list (test CSV or sample submission), in its order.

    Args:
        path: the list.
        column: where the ids are. For 2026's `ImageID` a list with `dicom_id`, as its rules say, is taken too.

    Raises:
        PredictionError: no such file, no such column, an empty or repeated id.
    """
    names = [column, "dicom_id"] if column == "ImageID" else [column]
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = next((name for name in names if name in (reader.fieldnames or [])), None)
            if found is None:
                raise PredictionError(f"{path} has no column {column!r}; found {reader.fieldnames}.")
            ids = [row[found] or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PredictionError(f"{path} cannot be read as a CSV of ids: {error}.") from error
    repeated = len(ids) - len(set(ids))
    if repeated or "" in ids or not ids:
        raise PredictionError(
            f"{path}: expected distinct ids; found {len(ids)} rows, {repeated} repeats, {ids.count('')} empty."
        )
    return ids


def submission_rows(
    predictions: Predictions,
    classes: Sequence[str],
    ids: Sequence[str],
    fill: Mapping[str, float] | None = None,
    answers: Mapping[str, str] | None = None,
) -> Float[np.ndarray, "N C"]:
    """Probabilities of the listed images, in their order, and of the task's classes, in theirs.

    Args:
        predictions: of images; more images than listed are left out.
        classes: the task's, in the order of the sample submission.
        ids: the list.
        fill: constant for a class that was never trained; without it, such a class is an error.
        answers: class -> finding (`labels.task_findings`); without it, the finding of the same name.

    Raises:
        PredictionError: study rows, an image or a class missing, a class never trained, an id standing for two images.
    """
    if predictions.unit != "image":
        raise PredictionError(
            "The challenge scores images, and these predictions have one row per study. Predict images (hilum predict "
            "without --study) and give each its study's value here (hilum submit --study mean), or combine with --unit "
            "image."
        )
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
    rows = predictions.probabilities[np.array([place[name] for name in ids])]
    answers = {name: name for name in classes if name in predictions.findings} if answers is None else answers
    trained = dict(zip(predictions.findings, predictions.trained, strict=True))
    untrained = [name for name in classes if not trained.get(answers.get(name, ""), False)]
    unfilled = [name for name in untrained if name not in (fill or {})]
    if unfilled:
        raise PredictionError(
            f"This task has findings that were never trained: {', '.join(map(repr, unfilled))}. Train them, or say "
            "--fill-untrained 0.01 to submit a constant, which ranks nothing. These predictions have "
            f"{', '.join(map(repr, predictions.findings))}."
        )
    columns = [
        np.full(len(ids), (fill or {})[name])
        if name in untrained
        else rows[:, predictions.findings.index(answers[name])]
        for name in classes
    ]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Submission:
    """A submission that was read and found sound.

    Args:
        task: whose.
        ids: in the order of the file.
        values: (N, C) scores, columns as `classes`.
        notes: what is allowed and worth knowing.
    """

    task: str
    ids: tuple[str, ...]
    values: Float[np.ndarray, "N C"]
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The task's classes, in its order."""
        return TASKS[self.task]


def check_submission(path: Path, task: str, ids: Sequence[str]) -> Submission:
    """Read a submission, made here or elsewhere, as strictly as a scorer may.

    Args:
        path: a `.csv`, or a `.zip` with one CSV and `code/` beside it.
        task: a name in TASKS.
        ids: the challenge's list.

    Raises:
        UnknownNameError: no such task.
        PredictionError: naming every fault: columns missing, unknown or in another order, ids missing, unknown or
            repeated, values that are no number in [0, 1], scores rounded to 6 significant digits or fewer.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    header, rows, faults = _read(path)
    wanted = [ID_COLUMNS[task], *TASKS[task]]
    if header != wanted:
        faults += _header_faults(header, wanted)
    if ragged := [str(number) for number, row in enumerate(rows, 2) if len(row) != len(header)]:
        faults.append(f"another number of cells than the header in {_some(ragged, 'line')}")
    if not set(wanted) <= set(header) or len(set(header)) < len(header) or ragged:
        raise PredictionError(_all_faults(path, task, faults))
    found = [row[header.index(wanted[0])] for row in rows]
    faults += _id_faults(found, ids)
    cells = [[row[header.index(name)] for name in wanted[1:]] for row in rows]
    values = np.array([[_number(cell) for cell in row] for row in cells], np.float64).reshape(
        len(rows), len(wanted) - 1
    )
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        faults.append(
            f"{int(bad.sum())} values are no numbers in [0, 1], for example {cells[row][column]!r} of "
            f"{wanted[1 + column]!r} in line {row + 2}"
        )
    elif (digits := _digits(cells, values)) <= DIGITS:
        faults.append(
            f"scores have {digits} significant digits (median): rounding makes ties and changes AP; write them in full"
        )
    if faults:
        raise PredictionError(_all_faults(path, task, faults))
    constant = [
        name for name, column in zip(wanted[1:], values.T, strict=True) if len(column) > 1 and np.ptp(column) == 0
    ]
    notes = [f"{len(constant)} classes have one value throughout, which ranks nothing: {', '.join(constant)}"]
    notes = notes if constant else []
    if found != list(ids):
        notes.append("the rows are in another order than the list (allowed: scorers join by id)")
    return Submission(task, tuple(found), values, tuple(notes))


def _read(path: Path) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows, and what is wrong with the container."""
    path, faults = Path(path), []
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                tables = [name for name in names if name.endswith(".csv") and not name.startswith(CODE)]
                if len(tables) != 1:
                    raise PredictionError(f"{path}: expected one CSV of predictions; found {len(tables)}.")
                if not any(name.startswith(CODE) for name in names):
                    faults.append(f"the zip has no folder {CODE}")
                text = archive.read(tables[0]).decode("utf-8-sig")
        else:
            text = path.read_text(encoding="utf-8-sig")
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile, RuntimeError) as error:
        raise PredictionError(f"{path} cannot be read as a submission: {error}.") from error
    return header, rows, faults


def _header_faults(header: Sequence[str], wanted: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name not in header]
    unknown = [name for name in header if name not in wanted]
    repeated = sorted({name for name in header if header.count(name) > 1})
    faults = [
        f"{what}: {', '.join(map(repr, names))}"
        for what, names in (("columns missing", missing), ("columns unknown", unknown), ("columns repeated", repeated))
        if names
    ]
    if not faults:
        place = next(index for index, name in enumerate(wanted) if header[index] != name)
        faults.append(f"columns in another order: column {place + 1} is {header[place]!r}, expected {wanted[place]!r}")
    return faults


def _id_faults(found: Sequence[str], ids: Sequence[str]) -> list[str]:
    counts = dict.fromkeys(found, 0)
    for name in found:
        counts[name] += 1
    listed = set(ids)
    kinds = (
        ("ids missing", [name for name in ids if name not in counts]),
        ("ids not listed", [name for name in counts if name not in listed]),
        ("ids repeated", [name for name, count in counts.items() if count > 1]),
    )
    return [f"{len(names)} {what}, for example {names[0]!r}" for what, names in kinds if names]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _digits(cells: Sequence[Sequence[str]], values: Float[np.ndarray, "N C"]) -> int:
    """Median count of significant digits, over the columns that are not constant and values that are not whole."""
    varying = np.ptp(values, axis=0) > 0 if len(values) else np.zeros(values.shape[1], bool)
    inside = varying & (values > 0) & (values < 1)
    counts = [len(_significant(cells[row][column])) for row, column in np.argwhere(inside).tolist()]
    return int(np.median(counts)) if counts else DIGITS + 1


def _significant(cell: str) -> str:
    return cell.strip().lower().partition("e")[0].replace(".", "").lstrip("+-0")


def _some(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(names[:SHOWN])}{more}"


def _all_faults(path: Path, task: str, faults: Sequence[str]) -> str:
    return f"{path} is no submission to {task}: " + "; ".join(faults) + "."


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "mAP": average_precision,
    "mAUC": roc_auc,
    "mF1@0.5": lambda p, y: f1_of_present(p, y, 0.5),
    "mECE_challenge_inferred": challenge_ece,
}
"""What the challenges score, as metrics.json names it. mAP ranks."""


def challenge_scores(values: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N C"]) -> dict[str, float | None]:
    """The challenge's four numbers: macro means over the classes where each is defined; None where it is for none."""
    result: dict[str, float | None] = {}
    for name, measure in SCORES.items():
        each = [measure(values[:, c], labels[:, c]) for c in range(values.shape[1])]
        defined = [value for value in each if value is not None]
        result[name] = float(np.mean(defined)) if defined else None
    return result


def labels_of(submission: Submission, truth: Truth) -> Int[np.ndarray, "N C"]:
    """The labels of a submission's images, columns as its classes.

    Raises:
        PredictionError: an image or a class without labels, or an id that stands for two images.
    """
    names = bare_ids(truth.image_id, truth.dataset).tolist()
    place = {name: row for row, name in enumerate(names)}
    missing = [name for name in submission.ids if name not in place]
    if missing or len(place) < len(names):
        raise PredictionError(
            f"{truth.source}: {len(missing)} of {len(submission.ids)} submitted images have no labels, and "
            f"{len(names) - len(place)} ids repeat{f'; for example {missing[0]!r}' if missing else ''}."
        )
    answers = task_findings(submission.task, truth.findings)
    absent = [name for name in submission.classes if name not in answers]
    if absent:
        raise PredictionError(f"{truth.source} has no labels for {', '.join(map(repr, absent))}.")
    columns = [truth.findings.index(answers[name]) for name in submission.classes]
    return truth.labels[np.ix_([place[name] for name in submission.ids], columns)]
