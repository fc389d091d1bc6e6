"""What is true: labels and the ids they are known by, from a store, a manifest or a plain CSV.

Putting them beside predictions is in `joining.py`. Readers of tables import polars when they are used.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hilum.core.errors import ConfigError, LeakageError, PredictionError, UnknownLabelError, UnknownNameError
from hilum.core.types import NEGATIVE, POSITIVE, SPLIT_NAMES, UNCERTAIN, UNKNOWN
from hilum.data.labels import frequency_groups

IMAGE_ID_COLUMNS = ("image_id", "dicom_id", "ImageID", "Image Index", "id")
PATIENT_COLUMNS = ("patient_id", "subject_id", "PatientID", "Patient ID")
OTHER_COLUMNS = frozenset(
    {"image_uid", "study_id", "dataset", "split", "view", "ViewPosition", "ViewCodeSequence_CodeMeaning", "path",
     "fpath", "StudyDate_DICOM", "sex", "age", "age_years", *IMAGE_ID_COLUMNS, *PATIENT_COLUMNS}
)  # fmt: skip
"""Columns of a plain CSV that hold no label; every other column must hold 0, 1 or nothing."""
PERSONAL_COLUMNS = frozenset(
    {"image_uid", "study_id", "path", "fpath", "source_relpath", "origin_image", "origin_patient", *IMAGE_ID_COLUMNS,
     *PATIENT_COLUMNS}
)  # fmt: skip
"""Columns that name one person or picture: no group is made of them."""
ATTRIBUTE_SPELLINGS: dict[str, tuple[str, ...]] = {"view": ("view", "ViewPosition"), "age": ("age", "age_years")}
"""Columns, in this order, in which an attribute is looked for; any other in the column of its own name."""
SPLIT_CELLS = {**SPLIT_NAMES, "training": "train"}
"""In small letters; any other name of a split stays as it is."""
CELLS = {"1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE, "": UNKNOWN, "-1": UNKNOWN, "-1.0": UNKNOWN,
         "-2": UNCERTAIN, "-2.0": UNCERTAIN}  # fmt: skip


def split_name(text: str) -> str:
    """A split by the name it has here, however a file or a person spells it: `Test`, `dev`, `training`."""
    return SPLIT_CELLS.get(text.strip().casefold(), text)


@dataclass(frozen=True)
class Truth:
    """Labels of N rows and C findings, with the ids they are joined by; "" where the file has none.

    Args:
        source: the file, for messages.
        findings: columns of `labels`.
        labels: (N, C) int8: 1, 0, -1 unknown, -2 uncertain.
        image_uid, image_id, study_id, patient_id, dataset, split: (N,) text.
        attributes: what else is recorded of each row and was asked for (sex, age, ...): (N,) text, "" where it is not.
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
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True)

    @property
    def has_splits(self) -> bool:
        """Whether the file says which split a row is in."""
        return bool((self.split != "").any())

    def rows(self, chosen: np.ndarray) -> "Truth":
        """Some of the rows."""
        ids = (self.image_uid, self.image_id, self.study_id, self.patient_id, self.dataset, self.split)
        attributes = {name: values[chosen] for name, values in self.attributes.items()}
        rows = Truth(self.source, self.findings, self.labels[chosen], *(column[chosen] for column in ids))
        return dataclasses.replace(rows, attributes=attributes)

    def groups(self) -> dict[str, str] | None:
        """Head, medium or tail by share of training images; None where the file has no training rows."""
        train = self.labels[self.split == "train"]
        if len(train) == 0:
            return None
        counts = (train == POSITIVE).sum(axis=0).tolist()
        return frequency_groups(dict(zip(self.findings, counts, strict=True)), len(train))


def read_truth(path: Path, by: Sequence[str] = (), by_if_there: Sequence[str] = ()) -> Truth:
    """Labels from a store (a folder), a manifest (`.parquet`) or a plain CSV.

    Args:
        path: of the labels.
        by: attributes to read too: columns of the manifest (of a store, the copy in it) or of the CSV, or findings,
            whose labels become "present" and "absent".
        by_if_there: more of them, which may be missing.

    Raises:
        PredictionError: none of these, or a CSV without an id column or a label column.
        UnknownNameError: an attribute of `by` that is not there, with the nearest name.
        ConfigError: an attribute that names a person or a picture.
        LeakageError: a patient of a CSV is in two splits (a manifest refuses that by itself).
        UnknownLabelError: a cell of a CSV is not 0, 1 or empty; names column and row.
        StoreError, ManifestError: a damaged store or manifest.
    """
    path = Path(path)
    personal = sorted(PERSONAL_COLUMNS & set(by))
    if personal:
        raise ConfigError(f"--by {personal[0]}: this column names people or pictures; give a column of categories.")
    if path.is_dir():
        from hilum.data.store import Store

        store = Store.open(path)
        ids = (store.uids, store.image_ids, store.studies, store.patients, store.datasets, store.splits)
        truth = Truth(str(path), store.findings, np.asarray(store.labels, np.int8), *map(_text, ids))
        recorded = {"view": _text(store.views), "dataset": truth.dataset, "split": truth.split}
        wanted = [name for name in (*by, *by_if_there) if name not in recorded and name not in store.findings]
        found, known = _of_the_manifest(path, wanted, truth.image_uid) if wanted else ({}, ())
        return _with_attributes(truth, by, by_if_there, recorded | found, known)
    if path.suffix == ".parquet":
        from hilum.data.schema import read_manifest

        manifest = read_manifest(path)
        names = ("image_uid", "image_id", "study_id", "patient_id", "dataset", "split_project")
        columns = [_text(manifest.frame[name].to_list()) for name in names]
        truth = Truth(str(path), manifest.findings, manifest.labels().astype(np.int8), *columns)
        spelled = {name: _spelled(name, manifest.frame.columns) for name in (*by, *by_if_there)}
        recorded = {name: _text(manifest.frame[column].to_list()) for name, column in spelled.items() if column}
        return _with_attributes(truth, by, by_if_there, recorded, manifest.frame.columns)
    if path.suffix == ".csv":
        return _read_csv(path, by, by_if_there)
    raise PredictionError(f"{path}: labels come from a store (a folder), a manifest (.parquet) or a .csv.")


def _spelled(name: str, columns: Collection[str]) -> str | None:
    """The column in which an attribute is."""
    return next((column for column in ATTRIBUTE_SPELLINGS.get(name, (name,)) if column in columns), None)


def _of_the_manifest(
    store: Path, names: Sequence[str], uids: np.ndarray
) -> tuple[dict[str, np.ndarray], Sequence[str]]:
    """Attributes from the copy of the manifest that a store may hold, in the order of its images; and its columns."""
    path = store / "manifest.parquet"
    if not path.exists():
        return {}, ()
    import polars as pl

    from hilum.core.errors import ManifestError

    try:
        have = list(pl.read_parquet_schema(path))
        spelled = {name: column for name in names if (column := _spelled(name, have))}
        frame = pl.read_parquet(path, columns=list({"image_uid": None} | dict.fromkeys(spelled.values())))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ManifestError(f"{path} cannot be read ({error}). Build the store again, or say --by none.") from error
    place = {uid: row for row, uid in enumerate(frame["image_uid"].to_list())}
    rows = np.array([place.get(uid, -1) for uid in uids.tolist()], np.int64)
    columns = {name: _text(frame[column].to_list()) for name, column in spelled.items()}
    return {name: np.where(rows >= 0, values[rows], "") for name, values in columns.items()}, have


def _with_attributes(
    truth: Truth,
    by: Sequence[str],
    by_if_there: Sequence[str],
    recorded: Mapping[str, np.ndarray],
    known: Sequence[str] = (),
) -> Truth:
    """The same truth with the attributes that were asked for: recorded columns, and labels in words."""
    attributes: dict[str, np.ndarray] = {}
    for name in dict.fromkeys((*by, *by_if_there)):
        if name in recorded:
            attributes[name] = recorded[name]
        elif name in truth.findings:
            codes = truth.labels[:, truth.findings.index(name)]
            attributes[name] = np.where(codes == POSITIVE, "present", np.where(codes == NEGATIVE, "absent", ""))
        elif name in by:
            names = sorted({*recorded, *known} - PERSONAL_COLUMNS)
            raise UnknownNameError(f"column to group by in {truth.source}", name, [*names, *truth.findings])
    return dataclasses.replace(truth, attributes=attributes)


def _text(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    return np.array(["" if value is None else str(value) for value in values], dtype=str)


def _read_csv(path: Path, by: Sequence[str], by_if_there: Sequence[str]) -> Truth:
    from hilum.data.tables import read_csv

    frame = read_csv(path).frame
    grouping = {name for name in by if name in frame.columns and not set(frame[name].to_list()) <= set(CELLS)}
    findings = tuple(name for name in frame.columns if name not in OTHER_COLUMNS | grouping)

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
    split = np.array([split_name(name) for name in column("split").tolist()], dtype=str)
    patient_id, dataset = column(*PATIENT_COLUMNS), column("dataset")
    truth = Truth(str(path), findings, labels, image_uid, image_id, study_id, patient_id, dataset, split)
    _check_splits(truth)
    recorded = {
        name: _text([cell.strip() for cell in frame[found].to_list()])
        for name in (*by, *by_if_there)
        if name not in findings and (found := _spelled(name, frame.columns))
    }
    return _with_attributes(truth, by, by_if_there, recorded, frame.columns)


def _check_splits(truth: Truth) -> None:
    """Refuse a patient in two splits; the message names an image, never the patient."""
    split_of: dict[tuple[str, str], str] = {}
    crossing: dict[tuple[str, str], int] = {}
    rows = zip(truth.dataset.tolist(), truth.patient_id.tolist(), truth.split.tolist(), strict=True)
    for row, (dataset, patient, split) in enumerate(rows):
        if patient and split and split_of.setdefault((dataset, patient), split) != split:
            crossing.setdefault((dataset, patient), row)
    if crossing:
        row = next(iter(crossing.values()))
        item = truth.image_uid[row] or truth.image_id[row] or truth.study_id[row]
        raise LeakageError(
            f"{truth.source}: {len(crossing)} patients are in more than one split, first the one of item {str(item)!r} "
            f"(row {row + 2}), which is in {truth.split[row]!r}. A patient belongs to one split: numbers of such a "
            "test split are too good."
        )
