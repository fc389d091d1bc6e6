"""What is true of the predicted items: labels from a store, a manifest or a plain CSV, joined to predictions by id.

Rows are joined by id and columns by name; position means nothing. An item or a finding that cannot be joined is an
error or a count, never a guess. Readers of tables import polars when they are used.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from hilum.core.errors import PredictionError, UnknownLabelError
from hilum.core.types import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN
from hilum.data.labels import frequency_groups
from hilum.evaluation.predictions import Predictions, bare_ids
from hilum.evaluation.studies import study_uids

IMAGE_ID_COLUMNS = ("image_id", "dicom_id", "ImageID", "Image Index", "id")
PATIENT_COLUMNS = ("patient_id", "subject_id", "PatientID", "Patient ID")
OTHER_COLUMNS = frozenset(
    {"image_uid", "study_id", "dataset", "split", "view", "ViewPosition", "ViewCodeSequence_CodeMeaning", "path",
     "fpath", "StudyDate_DICOM", "sex", "age", *IMAGE_ID_COLUMNS, *PATIENT_COLUMNS}
)  # fmt: skip
"""Columns of a plain CSV that hold no label; every other column must hold 0, 1 or nothing."""
SPLIT_NAMES = {"development": "val", "validate": "val", "valid": "val", "validation": "val", "training": "train"}
CELLS = {"1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE, "": UNKNOWN, "-1": UNKNOWN, "-1.0": UNKNOWN,
         "-2": UNCERTAIN, "-2.0": UNCERTAIN}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """Labels of N rows and C findings, with the ids they are joined by; "" where the file has none.

    Args:
        source: the file, for messages.
        findings: columns of `labels`.
        labels: (N, C) int8: 1, 0, -1 unknown, -2 uncertain.
        image_uid, image_id, study_id, patient_id, dataset, split: (N,) text.
    """

    source: str
    findings: tuple[str, ...]
    labels: Int[np.ndarray, "N C"]
    image_uid: np.ndarray
    image_id: np.ndarray
    study_id: np.ndarray
    patient_id: np.ndarray
    dataset: np.ndarray
    split: np.ndarray

    @property
    def has_splits(self) -> bool:
        """Whether the file says which split a row is in."""
        return bool((self.split != "").any())

    def rows(self, chosen: np.ndarray) -> "Truth":
        """Some of the rows."""
        ids = (self.image_uid, self.image_id, self.study_id, self.patient_id, self.dataset, self.split)
        return Truth(self.source, self.findings, self.labels[chosen], *(column[chosen] for column in ids))

    def groups(self) -> dict[str, str] | None:
        """Head, medium or tail by share of training images; None where the file has no training rows."""
        train = self.labels[self.split == "train"]
        if len(train) == 0:
            return None
        counts = (train == POSITIVE).sum(axis=0).tolist()
        return frequency_groups(dict(zip(self.findings, counts, strict=True)), len(train))


@dataclass(frozen=True)
class Joined:
    """Predictions with the labels of the same items, and what was left out.

    Args:
        predictions: the items that have labels.
        labels: (N, C) int8, rows as `predictions`, columns as `findings`.
        findings: of the labels.
        splits: (N,) where the labels say that each item belongs, "" where they do not.
        left_out: counts of `other_split` (predicted, in another split) and `unpredicted` (labelled, not predicted).
    """

    predictions: Predictions
    labels: Int[np.ndarray, "N C"]
    findings: tuple[str, ...]
    splits: np.ndarray
    left_out: dict[str, int]

    def select(self, findings: Sequence[str]) -> "Joined":
        """The named findings, in that order, on both sides; one without labels is unknown throughout."""
        labels = np.full((len(self.labels), len(findings)), UNKNOWN, np.int8)
        for index, name in enumerate(findings):
            if name in self.findings:
                labels[:, index] = self.labels[:, self.findings.index(name)]
        predictions = self.predictions.select(findings)
        return dataclasses.replace(self, predictions=predictions, labels=labels, findings=tuple(findings))


def read_truth(path: Path) -> Truth:
    """Labels from a store (a folder), a manifest (`.parquet`) or a plain CSV.

    Raises:
        PredictionError: none of these, or a CSV without an id column or a label column.
        UnknownLabelError: a cell of a CSV is not 0, 1 or empty; names column and row.
        StoreError, ManifestError: a damaged store or manifest.
    """
    path = Path(path)
    if path.is_dir():
        from hilum.data.store import Store

        store = Store.open(path)
        ids = (store.uids, store.image_ids, store.studies, store.patients, store.datasets, store.splits)
        return Truth(str(path), store.findings, np.asarray(store.labels, np.int8), *map(_text, ids))
    if path.suffix == ".parquet":
        from hilum.data.schema import read_manifest

        manifest = read_manifest(path)
        names = ("image_uid", "image_id", "study_id", "patient_id", "dataset", "split_project")
        columns = [_text(manifest.frame[name].to_list()) for name in names]
        return Truth(str(path), manifest.findings, manifest.labels().astype(np.int8), *columns)
    if path.suffix == ".csv":
        return _read_csv(path)
    raise PredictionError(f"{path}: labels come from a store (a folder), a manifest (.parquet) or a .csv.")


def _text(values: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.array(["" if value is None else str(value) for value in values], dtype=str)


def _read_csv(path: Path) -> Truth:
    from hilum.data.tables import read_csv

    frame = read_csv(path).frame
    findings = tuple(name for name in frame.columns if name not in OTHER_COLUMNS)

    def column(*names: str) -> np.ndarray:
        found = next((name for name in names if name in frame.columns), None)
        return _text(frame[found].to_list()) if found else np.full(frame.height, "", dtype="<U1")

    image_uid, image_id, study_id = column("image_uid"), column(*IMAGE_ID_COLUMNS), column("study_id")
    if not findings or not any((values != "").any() for values in (image_uid, image_id, study_id)):
        raise PredictionError(
            f"{path}: expected an id column ({', '.join(['image_uid', *IMAGE_ID_COLUMNS, 'study_id'])}) and one "
            f"0 / 1 / blank column per finding; found {', '.join(frame.columns)}."
        )
    labels = np.full((frame.height, len(findings)), UNKNOWN, np.int8)
    for index, name in enumerate(findings):
        cells = [cell.strip() for cell in frame[name].to_list()]
        wrong = next((row for row, cell in enumerate(cells) if cell not in CELLS), None)
        if wrong is not None:
            raise UnknownLabelError(
                f"{path}: column {name!r}, row {wrong + 2} holds {cells[wrong]!r}; a label is 0, 1 or blank. Remove "
                "columns that hold no labels."
            )
        labels[:, index] = [CELLS[cell] for cell in cells]
    split = np.array([SPLIT_NAMES.get(name, name) for name in column("split").tolist()], dtype=str)
    patient_id, dataset = column(*PATIENT_COLUMNS), column("dataset")
    return Truth(str(path), findings, labels, image_uid, image_id, study_id, patient_id, dataset, split)


def join(truth: Truth, predictions: Predictions, split: str | None = None, allow_missing: bool = False) -> Joined:
    """Put labels beside predictions, by id.

    Args:
        truth: labels of images, or of studies.
        predictions: of images or of studies; study labels are taken from their images, which must agree.
        split: only items of this split, all of which must be predicted.
        allow_missing: accept labelled items of the split that were not predicted, and count them.

    Raises:
        PredictionError: predicted items without a label, labelled items of the split without a prediction, ids that
            repeat, images of a study that disagree. With counts and an example.
    """
    keys, predicted = _keys(truth, predictions)
    labels_of, labels, splits, patients = _one_row_per_key(
        truth, keys, repeats="study" in (predictions.unit, _key(truth))
    )
    place = np.minimum(np.searchsorted(labels_of, predicted), len(labels_of) - 1)
    found = labels_of[place] == predicted if len(labels_of) else np.zeros(len(predicted), bool)
    if not found.all():
        raise PredictionError(
            f"{int((~found).sum())} of {len(predicted)} predicted items have no row in {truth.source}, for example "
            f"{str(predictions.image_uid[~found][0])!r}. Labels must cover every predicted item, by id."
        )
    keep = np.ones(len(predicted), bool) if split is None else splits[place] == split
    wanted = np.ones(len(labels_of), bool) if split is None else splits == split
    absent = wanted & ~np.isin(labels_of, predicted[keep])
    unpredicted = int(absent.sum())
    if split is not None and unpredicted and not allow_missing:
        raise PredictionError(
            f"{unpredicted} of {int(wanted.sum())} labelled items of split {split!r} in {truth.source} were not "
            f"predicted, for example {_shown(labels_of[absent][0])!r}. Predict them all; a store leaves out the images "
            "that could not be read, a manifest does not."
        )
    if not keep.any():
        raise PredictionError(f"No predicted item is in split {split!r} of {truth.source}.")
    rows = predictions.rows(np.flatnonzero(keep))
    fill = np.where(rows.patient_id == "", patients[place[keep]], rows.patient_id)
    return Joined(
        dataclasses.replace(rows, patient_id=fill),
        labels[place[keep]],
        truth.findings,
        splits[place[keep]],
        {"other_split": int((~keep).sum()), "unpredicted": unpredicted},
    )


def _key(truth: Truth) -> str:
    if (truth.image_uid != "").all():
        return "uid"
    return "image" if (truth.image_id != "").any() else "study"


def _keys(truth: Truth, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """The id of each row of the labels, and of each prediction, in one spelling."""
    p, kind = predictions, _key(truth)
    if kind == "uid":
        if p.unit == "image":
            return truth.image_uid, p.image_uid
        return study_uids(truth.dataset, truth.patient_id, truth.study_id, truth.image_uid), p.image_uid
    name = "image_id" if kind == "image" and p.unit == "image" else "study_id"
    ours = bare_ids(getattr(p, name), p.dataset)
    theirs = bare_ids(getattr(truth, name), truth.dataset)
    if name == "study_id" and (truth.patient_id != "").all():  # the same study id in two patients is two studies
        ours = _pairs(bare_ids(p.patient_id, p.dataset), ours)
        theirs = _pairs(bare_ids(truth.patient_id, truth.dataset), theirs)
    items = p.image_uid if name == "image_id" or p.unit == "study" else _studies(p)
    if "" in theirs or len(set(ours.tolist())) < len(set(items.tolist())):
        raise PredictionError(f"{truth.source}: {name} is empty, or stands for several predicted items; use image_uid.")
    return theirs, ours


def _studies(p: Predictions) -> np.ndarray:
    return study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid)


def _pairs(patients: np.ndarray, studies: np.ndarray) -> np.ndarray:
    return np.array([f"{a}\x1f{b}" for a, b in zip(patients.tolist(), studies.tolist(), strict=True)], dtype=str)


def _shown(key: str) -> str:
    """A key for a message: without the patient."""
    return str(key).rpartition("\x1f")[2]


def _one_row_per_key(
    truth: Truth, keys: np.ndarray, repeats: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sorted distinct keys with their labels, split and patient; rows of one key must agree."""
    order = np.argsort(keys, kind="stable")
    distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    if (counts > 1).any() and not repeats:
        raise PredictionError(
            f"{truth.source}: {int((counts > 1).sum())} ids occur in more than one row, for example "
            f"{str(distinct[counts > 1][0])!r}. One row per image."
        )
    codes, first = truth.labels[order], order[starts]
    if (counts == 1).all():
        return distinct, codes, truth.split[first], truth.patient_id[first]
    known = codes >= 0
    low = np.minimum.reduceat(np.where(known, codes, 2), starts, axis=0)
    high = np.maximum.reduceat(np.where(known, codes, -9), starts, axis=0)
    conflict = (low == 0) & (high == 1)
    mixed = np.minimum.reduceat(truth.split[order] == np.repeat(truth.split[first], counts), starts)
    if conflict.any() or not mixed.all():
        row, column = np.argwhere(conflict)[0] if conflict.any() else (int(np.flatnonzero(~mixed)[0]), -1)
        what = f"finding {truth.findings[column]!r}" if conflict.any() else "the split"
        raise PredictionError(
            f"{truth.source}: the images of {int(conflict.any(axis=1).sum() or (~mixed).sum())} studies disagree, for "
            f"example on {what} in study {_shown(distinct[row])!r}. A study has one label; evaluate per image instead."
        )
    unknown = np.maximum.reduceat(codes, starts, axis=0)
    merged = np.where(high >= 0, high, unknown).astype(np.int8)
    return distinct, merged, truth.split[first], truth.patient_id[first]


def match_findings(
    predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The findings to judge, in order, and those that only one side has.

    Args:
        predictions: findings predicted.
        labels: findings labelled.
        wanted: those of a task: all must be on both sides. None: those on both sides, in the order of predictions.
        where: the file of labels, for messages.

    Raises:
        PredictionError: a wanted finding is missing, none is on both sides, or both sides have findings that the other
            lacks (a renamed column).
    """
    if wanted is not None:
        for have, what in ((predictions, "the predictions"), (labels, where)):
            missing = [name for name in wanted if name not in have]
            if missing:
                raise PredictionError(_missing(missing, have, what))
        return tuple(wanted), {"unlabelled": [], "unpredicted": []}
    both = tuple(name for name in predictions if name in labels)
    unlabelled = [name for name in predictions if name not in labels]
    unpredicted = [name for name in labels if name not in predictions]
    if not both or (unlabelled and unpredicted):
        raise PredictionError(
            _missing(unlabelled, labels, where) + " " + _missing(unpredicted, predictions, "the predictions")
            + " Rename the column, or name the findings to judge with a task."
        )  # fmt: skip
    return both, {"unlabelled": unlabelled, "unpredicted": unpredicted}


def _missing(names: Sequence[str], have: Sequence[str], where: str) -> str:
    hints = []
    for name in names:
        near = difflib.get_close_matches(name, list(have), n=1, cutoff=0.6)
        hints.append(f"{name!r}" + (f" (nearest: {near[0]!r})" if near else ""))
    return f"{where} lacks {', '.join(hints)}." if hints else ""
