"""Calibration of whole prediction files: a map and operating points per finding, fitted once, on one set of items.

A calibrator belongs to the stage and unit it was fitted at (raw image predictions, study means, an ensemble) and
refuses others. It remembers on which items it was fitted, so that nothing is judged on them (`check_out_of_sample`).
The maps are in `calibrators.py`, the operating points in `thresholds.py`.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError, StageError, UnknownNameError
from hilum.core.files import read_json, write_json
from hilum.data.labels import findings_hash
from hilum.evaluation.calibrators import CALIBRATORS, IDENTITY, Parameters, fit_pooled
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.thresholds import ENOUGH, fit_thresholds

FORMAT = "hilum-calibrator-1"
METHODS = ("auto", *CALIBRATORS)
ISOTONIC_FROM, PLATT_FROM, OWN_FROM = 1000, 100, 20
FEW_POSITIVES = "uncalibrated: few positives"
DIGEST_BYTES = 6


def fingerprint(uids: Iterable[str]) -> str:
    """Hex SHA-256 of the sorted ids: the same for the same set, whatever the order."""
    return hashlib.sha256("\n".join(sorted(str(uid) for uid in uids)).encode()).hexdigest()


def describe_items(uids: Iterable[str]) -> dict[str, Any]:
    """What a calibrator keeps of the items it was fitted on: fingerprint, count, and a short digest of each id."""
    names = sorted({str(uid) for uid in uids})
    packed = b"".join(sorted(_digest(name) for name in names))
    return {"fingerprint": fingerprint(names), "items": len(names), "digests": base64.b64encode(packed).decode()}


def _digest(uid: str) -> bytes:
    return hashlib.sha256(uid.encode()).digest()[:DIGEST_BYTES]


def check_out_of_sample(predictions: Predictions, fitted_on: Mapping[str, Any], what: str) -> None:
    """Refuse to judge predictions by something that was fitted on any of their items.

    Raises:
        StageError: with the number of items in both.
    """
    packed = base64.b64decode(fitted_on["digests"])
    seen = {packed[start : start + DIGEST_BYTES] for start in range(0, len(packed), DIGEST_BYTES)}
    both = [uid for uid in predictions.image_uid.tolist() if _digest(uid) in seen]
    if both:
        raise StageError(
            f"{what} was fitted on {len(both)} of the {len(predictions)} evaluated items (for example {both[0]!r}); "
            "nothing is judged on what it was fitted on. Evaluate the uncalibrated file, or items of another split."
        )


@dataclass(frozen=True)
class Calibrator:
    """Strictly increasing maps and operating points of C findings, and what they were fitted on.

    Args:
        findings: columns, in order.
        maps: per finding `{"kind", "parameters", "positives", "known", "group", "flag"}`; None: never trained.
        thresholds: per finding `{"f1", "youden", "sens_at_spec95"}` on calibrated probabilities.
        raw_thresholds: the same on the probabilities before the map.
        stage, unit: of the predictions it was fitted on, and alone can be applied to.
        fitted_on: `describe_items` of the ids; empty where the caller gave none.
    """

    findings: tuple[str, ...]
    maps: dict[str, dict[str, Any] | None]
    thresholds: dict[str, dict[str, float]]
    raw_thresholds: dict[str, dict[str, float]]
    stage: str = "raw"
    unit: str = "image"
    fitted_on: dict[str, Any] | None = None

    @classmethod
    def fit(
        cls,
        probabilities: Float[np.ndarray, "N C"],
        labels: Int[np.ndarray, "N C"],
        findings: Iterable[str],
        groups: Mapping[str, str] | None = None,
        method: str = "auto",
        stage: str = "raw",
        unit: str = "image",
        uids: Iterable[str] | None = None,
    ) -> "Calibrator":
        """Fit maps and thresholds on items that the head has not been trained on.

        `auto` chooses by the rarer class of each finding (docs/reference/predictions.md): 1,000 or more isotonic, from
        100 Platt, from 20 the same held to its group's parameters, below that the group's parameters alone, flagged.

        Args:
            probabilities: in [0, 1]; NaN columns are findings never trained.
            labels: 1, 0, other codes are unknown and left out.
            findings: one name per column.
            groups: head, medium or tail per finding; findings without one form a group.
            method: "auto" or a name in CALIBRATORS for every finding that has at least 20 of each class.
            stage: of the probabilities (raw, study or ensemble).
            unit: image or study.
            uids: ids of the rows, remembered as digests.

        Raises:
            StageError: the probabilities are calibrated already.
            PredictionError: shapes that do not fit, or no item.
        """
        names, groups = tuple(findings), dict(groups or {})
        if method not in METHODS:
            raise UnknownNameError("calibration method", method, METHODS)
        if stage == "calibrated":
            raise StageError("These predictions are calibrated already; fit on raw, study or ensemble predictions.")
        if probabilities.shape != labels.shape or probabilities.shape[1] != len(names) or len(labels) == 0:
            raise PredictionError(
                f"Calibration needs one label per probability and at least one item: probabilities "
                f"{probabilities.shape}, labels {labels.shape}, {len(names)} findings."
            )
        data = {name: _known(probabilities[:, c], labels[:, c]) for c, name in enumerate(names)}
        usable = {name: part for name, part in data.items() if part is not None}
        pooled = _pool_groups(usable, groups)
        maps = {n: None if n not in usable else _fit_map(*usable[n], groups.get(n, ""), pooled, method) for n in names}
        calibrated = {name: (_apply_map(maps[name], p), y) for name, (p, y) in usable.items()}
        return cls(
            names, maps, _fit_all_thresholds(calibrated, groups), _fit_all_thresholds(usable, groups), stage, unit,
            None if uids is None else describe_items(uids),
        )  # fmt: skip

    def apply(self, probabilities: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
        """Calibrated probabilities, columns in the order of `findings`; NaN stays NaN.

        Raises:
            PredictionError: another number of columns, or a value outside [0, 1].
        """
        values = np.asarray(probabilities, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.findings):
            raise PredictionError(f"This calibrator has {len(self.findings)} findings; found an array {values.shape}.")
        if not (np.isnan(values) | ((values >= 0) & (values <= 1))).all():
            raise PredictionError("Calibrators take probabilities: found a value outside [0, 1].")
        columns = [_apply_map(self.maps[name], values[:, c]) for c, name in enumerate(self.findings)]
        return np.stack(columns, axis=1)

    def apply_to(self, predictions: Predictions) -> Predictions:
        """Calibrate a prediction file of the stage and unit of this calibrator, findings matched by name.

        Raises:
            StageError: another stage or unit.
            PredictionError: a finding that this calibrator does not have.
        """
        self.check_stage(predictions)
        columns = column_indices(self.findings, predictions.findings, "the calibrator")
        maps = [self.maps[self.findings[column]] for column in columns]
        values = [_apply_map(one, predictions.probabilities[:, c]) for c, one in enumerate(maps)]
        return predictions.replace(
            np.stack(values, axis=1),
            stage="calibrated",
            calibrated_from=predictions.stage,
            calibration=self.provenance(),
            thresholds={name: self.thresholds[name] for name in predictions.findings if name in self.thresholds},
        )

    def check_stage(self, predictions: Predictions) -> None:
        """Raise StageError unless the predictions are at the stage and unit this was fitted at."""
        if (predictions.stage, predictions.unit) != (self.stage, self.unit):
            raise StageError(
                f"This calibrator was fitted on {self.stage} predictions per {self.unit}; these are "
                f"{predictions.stage} predictions per {predictions.unit}. Fit one where it is used (hilum calibrate)."
            )

    def provenance(self) -> dict[str, Any]:
        """What prediction files carry about it: where it was fitted, and which findings are flagged."""
        flags = {name: one["flag"] for name, one in self.maps.items() if one and one["flag"]}
        return {"stage": self.stage, "unit": self.unit, "fitted_on": self.fitted_on, "flags": flags}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives back an equal calibrator."""
        return {
            "format": FORMAT,
            "stage": self.stage,
            "unit": self.unit,
            "findings": list(self.findings),
            "findings_sha256": findings_hash(self.findings),
            "fitted_on": self.fitted_on,
            "maps": self.maps,
            "thresholds": self.thresholds,
            "raw_thresholds": self.raw_thresholds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """Read what `to_dict` made.

        Raises:
            PredictionError: another format, or findings that do not match their hash.
        """
        if values.get("format") != FORMAT:
            raise PredictionError(f"Expected a calibrator of format {FORMAT!r}, found {values.get('format')!r}.")
        keys = ("maps", "thresholds", "raw_thresholds", "stage", "unit", "fitted_on")
        missing = [key for key in (*keys, "findings", "findings_sha256") if key not in values]
        if missing:
            raise PredictionError(f"The calibrator lacks {', '.join(missing)}; fit it again (hilum calibrate).")
        if values["findings_sha256"] != findings_hash(values["findings"]):
            raise PredictionError("The calibrator's findings do not match their hash; the file was edited by hand.")
        kinds = {one["kind"] for one in values["maps"].values() if one}
        for kind in sorted(kinds - set(CALIBRATORS)):
            raise UnknownNameError("calibrator", kind, CALIBRATORS)
        return cls(tuple(values["findings"]), **{key: values[key] for key in keys})


def write_calibrator(calibrator: Calibrator, path: Path) -> None:
    """Write a calibrator as JSON."""
    write_json(Path(path), calibrator.to_dict())


def read_calibrator(path: Path) -> Calibrator:
    """Read a calibrator; PredictionError where it is absent or malformed."""
    values = read_json(Path(path), PredictionError)
    if not isinstance(values, dict):
        raise PredictionError(f"{path} is not a calibrator: expected a JSON object.")
    return Calibrator.from_dict(values)


Data = tuple[np.ndarray, np.ndarray]


def _known(probabilities: np.ndarray, labels: np.ndarray) -> Data | None:
    if np.isnan(probabilities).all():
        return None
    keep = (labels == 0) | (labels == 1)
    return np.asarray(probabilities, np.float64)[keep], np.asarray(labels)[keep] == 1


def _pool_groups(data: Mapping[str, Data], groups: Mapping[str, str]) -> dict[str, Parameters]:
    """Parameters of each group; a group with too few positives takes those of all findings, these the identity."""
    everything = list(data.values())
    overall = fit_pooled(everything) if _rarer(everything) >= OWN_FROM else dict(IDENTITY)
    pooled = {}
    for group in {groups.get(name, "") for name in data}:
        parts = [part for name, part in data.items() if groups.get(name, "") == group]
        pooled[group] = fit_pooled(parts) if _rarer(parts) >= OWN_FROM else overall
    return pooled


def _rarer(parts: Iterable[Data]) -> int:
    labels = [y for _, y in parts]
    positives = sum(int(y.sum()) for y in labels)
    return min(positives, sum(map(len, labels)) - positives)


def _fit_map(p: np.ndarray, y: np.ndarray, group: str, pooled: Mapping[str, Parameters], method: str) -> dict[str, Any]:
    rarer, prior = _rarer([(p, y)]), pooled[group]
    kind = method
    if method == "auto":
        kind = "isotonic" if rarer >= ISOTONIC_FROM else "platt" if rarer >= PLATT_FROM else "temperature_bias"
    few = rarer < OWN_FROM
    # Platt has data enough to stand alone; the prior of the group matters to the two-parameter fit of rare findings
    parameters = prior if few else CALIBRATORS[kind].fit(p, y, prior if kind == "temperature_bias" else IDENTITY)
    return {
        "kind": "temperature_bias" if few else kind,
        "parameters": parameters,
        "positives": int(y.sum()),
        "known": len(y),
        "group": group,
        "flag": FEW_POSITIVES if few else None,
        "threshold_shrunk": bool(y.sum() < ENOUGH),
    }


def _apply_map(one: Mapping[str, Any] | None, probabilities: np.ndarray) -> np.ndarray:
    if one is None:
        return np.full(len(probabilities), np.nan)
    return CALIBRATORS[one["kind"]].apply(one["parameters"], probabilities)


def _fit_all_thresholds(data: Mapping[str, Data], groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
    thresholds = {}
    for group in {groups.get(name, "") for name in data}:
        parts = {name: part for name, part in data.items() if groups.get(name, "") == group}
        joint = [np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True)]
        shared = fit_thresholds(joint[0], joint[1], None)
        thresholds.update({name: fit_thresholds(p, y, shared) for name, (p, y) in parts.items()})
    return {name: thresholds[name] for name in data}
