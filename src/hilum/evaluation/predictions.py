"""The predictions table: who was predicted, what, and at which stage. The file in which predict, combine,
calibrate, evaluate and submit meet.

Columns are matched by name, rows by id; position means nothing. The file formats are in `table_files.py`. This module
does not combine, calibrate or judge.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hilum.core.errors import PredictionError
from hilum.core.types import STAGES, UNITS
from hilum.data.labels import findings_hash
from hilum.evaluation.metadata_shapes import check_shapes
from hilum.evaluation.table_files import Columns, read_table, write_table

IDENTITY: tuple[str, ...] = ("image_uid", "image_id", "study_id", "patient_id", "dataset", "view")
VIEW_SOURCE = "view_source"
"""A further column, where it is recorded: given, header, classifier or unknown; of a study row joined by +."""
FORMAT = "hilum-predictions-1"
"""Its JSON Schema is `predictions.schema.json` beside this file."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities of N items (images, or studies) for C findings, checked when made.

    Args:
        image_uid: (N,) text, unique. Of a study (unit "study"): `studies.study_uid`.
        image_id: (N,) the source's own id (dicom_id, file name).
        study_id, patient_id, dataset, view: (N,) text, "" where unknown.
        findings: C distinct names; the columns of `probabilities`.
        probabilities: (N, C) float64 in [0, 1]; a column that is NaN throughout is a finding never trained.
        metadata: what docs/reference/predictions.md lists; JSON values only. `stage` and `unit` are set to
            "raw" and "image" where absent, `classes_hash` always.
        view_source: (N,) where `view` is known from; None where that is not recorded.

    Raises:
        PredictionError: a length, an id or a value breaks the above; the message names the item and the finding.
    """

    image_uid: np.ndarray
    image_id: np.ndarray
    study_id: np.ndarray
    patient_id: np.ndarray
    dataset: np.ndarray
    view: np.ndarray
    findings: tuple[str, ...]
    probabilities: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    view_source: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in IDENTITY:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=str).reshape(-1))
        if self.view_source is not None:
            object.__setattr__(self, VIEW_SOURCE, np.asarray(self.view_source, dtype=str).reshape(-1))
        object.__setattr__(self, "findings", tuple(str(name) for name in self.findings))
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=np.float64))
        metadata = {"stage": "raw", "unit": "image", **self.metadata, "classes_hash": findings_hash(self.findings)}
        object.__setattr__(self, "metadata", metadata)
        _check_metadata(self)
        _check_identity(self)
        _check_probabilities(self)

    def __len__(self) -> int:
        return len(self.image_uid)

    @property
    def stage(self) -> str:
        """raw, study, ensemble or calibrated."""
        return str(self.metadata["stage"])

    @property
    def unit(self) -> str:
        """What a row is: image or study."""
        return str(self.metadata["unit"])

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold text: `IDENTITY`, and `view_source` where it is recorded."""
        return IDENTITY if self.view_source is None else (*IDENTITY, VIEW_SOURCE)

    @property
    def trained(self) -> np.ndarray:
        """(C,) bool: False for a finding never trained."""
        return ~np.isnan(self.probabilities).all(axis=0) if len(self) else np.ones(len(self.findings), dtype=bool)

    def places(self, uids: np.ndarray) -> np.ndarray:
        """Where the items of these ids are, in their order.

        Raises:
            PredictionError: an id that is not there.
        """
        place = {uid: row for row, uid in enumerate(self.image_uid.tolist())}
        missing = [uid for uid in uids.tolist() if uid not in place]
        if missing:
            raise PredictionError(f"{len(missing)} of {len(uids)} items are not predicted, for example {missing[0]!r}.")
        return np.array([place[uid] for uid in uids.tolist()], np.int64)

    def rows(self, indices: np.ndarray) -> "Predictions":
        """The items at `indices`, in that order."""
        identity = {name: getattr(self, name)[indices] for name in self.text_columns}
        return dataclasses.replace(self, **identity, probabilities=self.probabilities[indices])

    def select(self, findings: Sequence[str]) -> "Predictions":
        """The named findings, in that order.

        Raises:
            PredictionError: a finding that these predictions do not have.
        """
        columns = column_indices(self.findings, findings, "the predictions")
        return dataclasses.replace(self, findings=tuple(findings), probabilities=self.probabilities[:, columns])

    def replace(self, probabilities: np.ndarray, **metadata: Any) -> "Predictions":
        """The same items with other probabilities, and metadata changed as given (None removes a key)."""
        merged = {key: value for key, value in {**self.metadata, **metadata}.items() if value is not None}
        return dataclasses.replace(self, probabilities=probabilities, metadata=merged)


def column_indices(have: Sequence[str], want: Sequence[str], where: str) -> list[int]:
    """Where each wanted finding is among those at hand.

    Raises:
        PredictionError: one that is not there, by name.
    """
    place = {name: index for index, name in enumerate(have)}
    missing = [name for name in want if name not in place]
    if missing:
        raise PredictionError(
            f"No column for {', '.join(map(repr, missing))} in {where}; it has {', '.join(map(repr, have))}. "
            "Findings are matched by their exact name."
        )
    return [place[name] for name in want]


def bare_ids(ids: np.ndarray, datasets: np.ndarray) -> np.ndarray:
    """Ids without the `dataset/` they may be namespaced with: `mimic-cxr-jpg/s5` is the source's `s5`."""
    pairs = zip(ids.tolist(), datasets.tolist(), strict=True)
    return np.array([text.removeprefix(f"{dataset}/") if dataset else text for text, dataset in pairs], dtype=str)


def _check_metadata(p: Predictions) -> None:
    for key, known in (("stage", STAGES), ("unit", UNITS)):
        if p.metadata[key] not in known:
            raise PredictionError(f"Predictions have {key} {p.metadata[key]!r}; expected one of {', '.join(known)}.")
    check_shapes(p.metadata)
    try:
        json.dumps(p.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PredictionError(f"Prediction metadata must be plain JSON values: {error}.") from error


def _check_identity(p: Predictions) -> None:
    count = len(p.image_uid)
    wrong = {name: len(getattr(p, name)) for name in p.text_columns if len(getattr(p, name)) != count}
    if wrong or p.probabilities.shape != (count, len(p.findings)):
        raise PredictionError(
            f"Predictions of {count} items and {len(p.findings)} findings need columns of that length: found {wrong}, "
            f"and probabilities of shape {p.probabilities.shape}."
        )
    uids, counts = np.unique(p.image_uid, return_counts=True)
    if (counts > 1).any():
        raise PredictionError(
            f"{int((counts > 1).sum())} image_uid values occur more than once in the predictions, for example "
            f"{uids[counts > 1][0]!r}. Each item is predicted once."
        )
    if "" in uids:
        raise PredictionError("A row of the predictions has no image_uid.")
    repeated = sorted({name for name in p.findings if p.findings.count(name) > 1})
    clash = sorted(set(p.findings) & {*IDENTITY, VIEW_SOURCE})
    if repeated or clash or not p.findings:
        raise PredictionError(f"Findings must be distinct names and at least one: found {repeated or clash or 'none'}.")


def _check_probabilities(p: Predictions) -> None:
    values = p.probabilities
    missing = np.isnan(values)
    bad = (missing & ~missing.all(axis=0)) | (~missing & ~((values >= 0) & (values <= 1)))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise PredictionError(
            f"{int(bad.sum())} predictions are not probabilities: item {p.image_uid[row]!r}, finding "
            f"{p.findings[column]!r} has {float(values[row, column])!r}. Expected a number in [0, 1], or no value for "
            "any item (a finding that was never trained)."
        )


def write_predictions(p: Predictions, path: Path) -> None:
    """Write `.parquet`, `.csv` (with `.csv.meta.json` beside it) or `.json`, in full float64 precision."""
    write_table(_columns(p), p.text_columns, {"format": FORMAT, **p.metadata, "findings": list(p.findings)}, Path(path))


def read_predictions(path: Path) -> Predictions:
    """Read a file that `write_predictions`, or another tool with the same columns, has written.

    Columns may be in any order: with metadata they return in the recorded order. Without (a CSV from elsewhere) every
    column that is neither an identity column nor `view_source` is a finding, the stage is raw and the unit image.

    Raises:
        PredictionError: no such file, a column missing, renamed or added, a value that is no number.
    """
    path = Path(path)
    columns, metadata = read_table(path)
    recorded = metadata.get("findings", [])
    if not isinstance(recorded, list):
        raise PredictionError(f"{path}: 'findings' in its metadata is {recorded!r}; expected a list of names.")
    columns = columns or {name: [] for name in (*IDENTITY, *map(str, recorded))}
    missing = [name for name in IDENTITY if name not in columns]
    if missing:
        raise PredictionError(f"{path} lacks the column {', '.join(map(repr, missing))}; it has {', '.join(columns)}.")
    present = [name for name in columns if name not in (*IDENTITY, VIEW_SOURCE)]
    findings = [str(name) for name in metadata.pop("findings", present)]
    absent, added = sorted(set(findings) - set(present)), sorted(set(present) - set(findings))
    if absent or added:
        raise PredictionError(
            f"{path}: the columns are not the findings its metadata records. Missing: {absent or 'none'}; not known: "
            f"{added or 'none'}. A finding column was renamed, removed or added after the file was written."
        )
    for key in ("format", "classes_hash"):
        metadata.pop(key, None)
    numbers = [_numbers(columns[name], name, path) for name in findings]
    probabilities = np.array(numbers, np.float64).reshape(len(findings), len(columns["image_uid"])).T
    texts = (*IDENTITY, VIEW_SOURCE) if VIEW_SOURCE in columns else IDENTITY
    identity = {name: np.array(["" if v is None else v for v in columns[name]], dtype=str) for name in texts}
    try:
        return Predictions(**identity, findings=tuple(findings), probabilities=probabilities, metadata=metadata)
    except PredictionError as error:
        raise PredictionError(f"{path}: {error}") from error


def _numbers(values: Sequence[Any], finding: str, path: Path) -> np.ndarray:
    try:
        return np.array([np.nan if value is None or value == "" else float(value) for value in values], np.float64)
    except (TypeError, ValueError) as error:
        raise PredictionError(f"{path}: column {finding!r} holds something that is no number ({error}).") from error


def _columns(p: Predictions) -> Columns:
    columns: Columns = {name: getattr(p, name).tolist() for name in p.text_columns}
    for index, name in enumerate(p.findings):
        columns[name] = p.probabilities[:, index].tolist() if p.trained[index] else [None] * len(p)
    return columns
