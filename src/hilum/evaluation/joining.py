"""Labels beside predictions: rows joined by id, findings by name; position means nothing.

An item or a finding that cannot be joined is an error or a count, never a guess. Labels come from `truth.py`.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from hilum.core.errors import PredictionError
from hilum.core.types import LOOSE_FILES, UNKNOWN
from hilum.evaluation.predictions import Predictions, bare_ids
from hilum.evaluation.studies import study_uids
from hilum.evaluation.truth import Truth


@dataclass(frozen=True)
class Joined:
    """Predictions with the labels of the same items, and what was left out.

    Args:
        predictions: the items that have labels; whose they are as the labels say, where the predictions do not, and
            of loose files wherever the labels do.
        labels: (N, C) int8, rows as `predictions`, columns as `findings`.
        findings: of the labels.
        splits: (N,) where the labels say that each item belongs, "" where they do not.
        left_out: counts of `other_split` (predicted, in another split) and `unpredicted` (labelled, not predicted).
        attributes: of the labels: name -> (N,) text; where the images of a study differ, their values joined by "+".
    """

    predictions: Predictions
    labels: Int[np.ndarray, "N C"]
    findings: tuple[str, ...]
    splits: np.ndarray
    left_out: dict[str, int]
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def select(self, findings: Sequence[str]) -> "Joined":
        """The named findings, in that order, on both sides; one without labels is unknown throughout."""
        labels = np.full((len(self.labels), len(findings)), UNKNOWN, np.int8)
        for index, name in enumerate(findings):
            if name in self.findings:
                labels[:, index] = self.labels[:, self.findings.index(name)]
        predictions = self.predictions.select(findings)
        return dataclasses.replace(self, predictions=predictions, labels=labels, findings=tuple(findings))


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
    predictions = _with_patients(truth, predictions)
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
        {name: _one_per_key(values, keys)[place[keep]] for name, values in truth.attributes.items()},
    )


def labelled(truth: Truth, predictions: Predictions) -> Bool[np.ndarray, " N"]:
    """Which predicted items have a row in the labels, by the id that `join` goes by.

    Raises:
        PredictionError: as `join`, of ids that stand for several items.
    """
    keys, predicted = _keys(truth, _with_patients(truth, predictions))
    return np.isin(predicted, keys)


def _with_patients(truth: Truth, p: Predictions) -> Predictions:
    """Loose files under the patients of the labels, which know them better: a file names none, or one by another id.

    Only where exactly one patient is named for the study or image.
    """
    loose = np.flatnonzero(p.dataset == LOOSE_FILES)
    if not len(loose) or not (truth.patient_id != "").any():
        return p
    patients = p.patient_id.astype(object)
    for name in ("study_id", "image_id", "image_uid"):
        known: dict[str, set[str]] = {}
        for key, patient in zip(_bare(getattr(truth, name), truth, p).tolist(), truth.patient_id.tolist(), strict=True):
            if key and patient:
                known.setdefault(key, set()).add(patient)
        ours = bare_ids(getattr(p, name)[loose], p.dataset[loose]).tolist()
        for row, key in zip(loose.tolist(), ours, strict=True):
            named = known.get(key, set())
            if len(named) == 1 and patients[row] not in named:
                patients[row] = next(iter(named))
    return dataclasses.replace(p, patient_id=patients.astype(str))


def _one_per_key(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One text for each distinct key, in the order of the keys; different ones joined by "+"."""
    order = np.argsort(keys, kind="stable")
    _, starts = np.unique(keys[order], return_index=True)
    if len(starts) == len(keys):
        return values[order]
    groups = np.split(values[order], starts[1:])
    return np.array(["+".join(sorted(set(group.tolist()) - {""})) for group in groups], dtype=str)


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
        # the uid of a loose file's study holds the patient that the file named: these go by study id
        if not (p.dataset == LOOSE_FILES).all():
            return study_uids(truth.dataset, truth.patient_id, truth.study_id, truth.image_uid), p.image_uid
    name = "image_id" if kind == "image" and p.unit == "image" else "study_id"
    ours = bare_ids(getattr(p, name), p.dataset)
    theirs = _bare(getattr(truth, name), truth, p)
    if name == "study_id" and (truth.patient_id != "").all():  # the same study id in two patients is two studies
        ours = _pairs(_bare_patients(truth, p), ours)
        theirs = _pairs(_bare(truth.patient_id, truth, p), theirs)
    items = p.image_uid if name == "image_id" or p.unit == "study" else _studies(p)
    if "" in theirs or len(set(ours.tolist())) < len(set(items.tolist())):
        raise PredictionError(f"{truth.source}: {name} is empty, or stands for several predicted items; use image_uid.")
    return theirs, ours


def _bare(ids: np.ndarray, truth: Truth, predictions: Predictions) -> np.ndarray:
    """Ids of the labels without their dataset; where the file names none, without that of any prediction."""
    known = {name for name in predictions.dataset.tolist() if name}
    prefixes = [text.partition("/")[0] for text in ids.tolist()]
    guessed = np.array([prefix if prefix in known else "" for prefix in prefixes], dtype=str)
    return bare_ids(ids, np.where(truth.dataset == "", guessed, truth.dataset))


def _bare_patients(truth: Truth, p: Predictions) -> np.ndarray:
    """Patients of the predictions without their dataset; those of loose files may come from the labels."""
    labelled_sets = set(truth.dataset.tolist()) - {""}
    prefixes = [text.partition("/")[0] for text in p.patient_id.tolist()]
    named = np.array([prefix if prefix in labelled_sets else LOOSE_FILES for prefix in prefixes], dtype=str)
    return bare_ids(p.patient_id, np.where(p.dataset == LOOSE_FILES, named, p.dataset))


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
    return f"Not in {where}: {', '.join(hints)}." if hints else ""
