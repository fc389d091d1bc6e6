"""What is true: labels and the ids they are known by, from a store, a manifest or a plain CSV.

Putting them beside predictions is in `joining.py`. Readers of tables import polars when they are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from hilum.core.errors import PredictionError, UnknownLabelError
from hilum.core.types import NEGATIVE, POSITIVE, SPLIT_NAMES, UNCERTAIN, UNKNOWN
from hilum.data.labels import frequency_groups

IMAGE_ID_COLUMNS = ("image_id", "dicom_id", "ImageID", "Image Index", "id")
PATIENT_COLUMNS = ("patient_id", "subject_id", "PatientID", "Patient ID")
OTHER_COLUMNS = frozenset(
    {"image_uid", "study_id", "dataset", "split", "view", "ViewPosition", "ViewCodeSequence_CodeMeaning", "path",
     "fpath", "StudyDate_DICOM", "sex", "age", *IMAGE_ID_COLUMNS, *PATIENT_COLUMNS}
)  # fmt: skip
"""Columns of a plain CSV that hold no label; every other column must hold 0, 1 or nothing."""
SPLIT_CELLS = {**SPLIT_NAMES, "training": "train"}
"""Any other name of a split stays as it is."""
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
    split = np.array([SPLIT_CELLS.get(name, name) for name in column("split").tolist()], dtype=str)
    patient_id, dataset = column(*PATIENT_COLUMNS), column("dataset")
    return Truth(str(path), findings, labels, image_uid, image_id, study_id, patient_id, dataset, split)
