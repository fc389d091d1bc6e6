"""Calibration of whole prediction files: a map and operating points per finding, fitted once, on one set of items.

A calibrator belongs to the stage and unit it was fitted at (raw image predictions, study means, an ensemble) and
refuses others. It remembers on which items it was fitted, so that nothing is judged on them (`check_out_of_sample`).
The maps are in `calibrators.py`, which finding gets which in `map_choice.py`, the operating points in `thresholds.py`.
Past 300 lines: one class and its file, read and refused where they are damaged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.core.files import read_json, write_json
from hilum.data.labels import findings_hash
from hilum.evaluation.calibrators import CALIBRATORS
from hilum.evaluation.fitted_items import check_out_of_sample, describe_items, fingerprint
from hilum.evaluation.map_choice import (
    FEW_POSITIVES,
    FOLDS,
    METHODS,
    NO_LABELS,
    Data,
    apply_map,
    choose_maps,
    compare,
    cross_fit,
    cross_fitted_kinds,
    deal_patients,
    kinds_of,
    known_items,
)
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.thresholds import DEFAULT_POINTS, fit_thresholds

__all__ = ["FEW_POSITIVES", "METHODS", "NO_LABELS", "Calibrator", "check_out_of_sample", "describe_items",
           "fingerprint", "read_calibrator", "write_calibrator"]  # fmt: skip

FORMAT = "hilum-calibrator-1"
STEPS = ("study_aggregation", "ensemble", "normal_damping")
"""What prediction files say of how they came about before calibration."""
OF_AN_ENSEMBLE = ("members", "weights")
"""What `steps_of` adds for an ensemble; calibrators from before have neither, and are not checked for it."""


def steps_of(predictions: Predictions) -> dict[str, Any]:
    """The steps between raw predictions and these; of an ensemble also how many members it has, and their weights.

    Weights are shares of 1, in the order of the members; equal ones are left out.
    """
    found = {key: predictions.metadata[key] for key in STEPS if predictions.metadata.get(key) is not None}
    members = predictions.metadata.get("members")
    if "ensemble" not in found or not members:
        return found
    weights = [float(one.get("weight", 1.0)) for one in members]
    shares = [round(weight / sum(weights), 6) for weight in weights]
    return found | {"members": len(members)} | ({"weights": shares} if len(set(shares)) > 1 else {})


@dataclass(frozen=True)
class Calibrator:
    """Strictly increasing maps and operating points of C findings, and what they were fitted on.

    Args:
        findings: columns, in order.
        maps: per finding `{"kind", "parameters", "positives", "known", "group", "flag"}`; None: never trained.
        thresholds: per finding its operating points by name (`thresholds.py`), on calibrated probabilities.
        raw_thresholds: the same on the probabilities before the map.
        stage, unit: of the predictions it was fitted on, and alone can be applied to.
        fitted_on: `describe_items` of the ids; empty where the caller gave none.
        cross_fitted: log loss, Brier score and ECE before and after, on patients held out of the fit
            (`map_choice.compare`); None where the caller did not say whose the items are.
        steps: `steps_of` the predictions it was fitted on; None where that is not known, and not checked.
    """

    findings: tuple[str, ...]
    maps: dict[str, dict[str, Any] | None]
    thresholds: dict[str, dict[str, float]]
    raw_thresholds: dict[str, dict[str, float]]
    stage: str = "raw"
    unit: str = "image"
    fitted_on: dict[str, Any] | None = None
    cross_fitted: dict[str, Any] | None = None
    steps: dict[str, Any] | None = None

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
        patients: Iterable[Any] | None = None,
        points: Iterable[str] = DEFAULT_POINTS,
        steps: dict[str, Any] | None = None,
    ) -> "Calibrator":
        """Fit maps and thresholds on items that the head has not been trained on.

        `auto` chooses by the rarer class of each finding (docs/reference/calibration.md): 1,000 or more isotonic, from
        100 Platt, from 20 the same held to its group's parameters, below that the group's parameters alone, flagged.
        `cross_fitted` takes, from 20 on, the kind with the least log loss on patients left out of its fit.

        Args:
            probabilities: in [0, 1]; NaN columns are findings never trained.
            labels: 1, 0, other codes are unknown and left out.
            findings: one name per column.
            groups: head, medium or tail per finding; findings without one form a group.
            method: "auto", "cross_fitted", or a name in CALIBRATORS for every finding with at least 20 of each class.
            stage: of the probabilities (raw, study or ensemble).
            unit: image or study.
            uids: ids of the rows, remembered as digests.
            patients: whose each row is; with it the maps are judged by cross-fitting in 5 folds of patients.
            points: names of operating points besides the usual four, such as "spec_at_sens90".
            steps: `steps_of` the predictions.

        Raises:
            StageError: the probabilities are calibrated already.
            PredictionError: shapes that do not fit, no item, a value that is no probability.
            UnknownNameError: no such method or operating point.
            ConfigError: "cross_fitted" without patients.
        """
        names, groups = tuple(findings), dict(groups or {})
        points = tuple(dict.fromkeys((*DEFAULT_POINTS, *points)))
        if method not in METHODS:
            raise UnknownNameError("calibration method", method, METHODS)
        if stage == "calibrated":
            raise StageError("These predictions are calibrated already; fit on raw, study or ensemble predictions.")
        if probabilities.shape != labels.shape or probabilities.shape[1] != len(names) or len(labels) == 0:
            raise PredictionError(
                f"Calibration needs one label per probability and at least one item: probabilities "
                f"{probabilities.shape}, labels {labels.shape}, {len(names)} findings."
            )
        _check_values(probabilities, names)
        fold = None if patients is None else deal_patients(list(patients), FOLDS)
        kinds = dict.fromkeys(names, method)
        if method == "cross_fitted":
            if fold is None:
                raise ConfigError("The method cross_fitted needs to know whose each item is: give patients.")
            kinds = cross_fitted_kinds(probabilities, labels, names, groups, fold)
        data = {name: known_items(probabilities[:, c], labels[:, c]) for c, name in enumerate(names)}
        usable = {name: part for name, part in data.items() if part is not None}
        chosen = choose_maps(usable, groups, kinds)
        maps = {name: chosen.get(name) for name in names}
        calibrated = {name: (apply_map(maps[name], p), y) for name, (p, y) in usable.items()}
        judged = None
        if fold is not None:
            held_out = cross_fit(probabilities, labels, names, groups, kinds, fold)
            judged = {"folds": FOLDS, **compare(probabilities, held_out, labels, names)}
        return cls(
            names, maps, _fit_all_thresholds(calibrated, groups, points), _fit_all_thresholds(usable, groups, points),
            stage, unit, None if uids is None else describe_items(uids), judged, steps,
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
        columns = [apply_map(self.maps[name], values[:, c]) for c, name in enumerate(self.findings)]
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
        values = [apply_map(one, predictions.probabilities[:, c]) for c, one in enumerate(maps)]
        return predictions.replace(
            np.stack(values, axis=1),
            stage="calibrated",
            calibrated_from=predictions.stage,
            calibration=self.provenance(),
            scale=None,  # ranks became probabilities
            uncalibrated=None,  # as imported weights are
            thresholds={name: self.thresholds[name] for name in predictions.findings if name in self.thresholds},
        )

    def check_stage(self, predictions: Predictions) -> None:
        """Raise StageError unless the predictions are at the stage and unit this was fitted at, by the same steps."""
        if (predictions.stage, predictions.unit) != (self.stage, self.unit):
            raise StageError(
                f"This calibrator was fitted on {self.stage} predictions per {self.unit}; these are "
                f"{predictions.stage} predictions per {predictions.unit}. Fit one where it is used (hilum calibrate)."
            )
        found = steps_of(predictions)
        if "members" not in (self.steps or {}):
            found = {key: value for key, value in found.items() if key not in OF_AN_ENSEMBLE}
        if self.steps is not None and found != self.steps:
            raise StageError(
                f"This calibrator was fitted on predictions made by {_words(self.steps)}; these were made by "
                f"{_words(found)}. Fit one where it is used (hilum calibrate)."
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
            **({} if self.cross_fitted is None else {"cross_fitted": self.cross_fitted}),
            **({} if self.steps is None else {"steps": self.steps}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """Read what `to_dict` made.

        Raises:
            PredictionError: another format, findings that do not match their hash, or parts that are not as written.
        """
        if values.get("format") != FORMAT:
            raise PredictionError(f"Expected a calibrator of format {FORMAT!r}, found {values.get('format')!r}.")
        keys = ("maps", "thresholds", "raw_thresholds", "stage", "unit", "fitted_on")
        missing = [key for key in (*keys, "findings", "findings_sha256") if key not in values]
        if missing:
            raise PredictionError(f"The calibrator lacks {', '.join(missing)}; fit it again (hilum calibrate).")
        if values["findings_sha256"] != findings_hash(values["findings"]):
            raise PredictionError("The calibrator's findings do not match their hash; the file was edited by hand.")
        _check_content(values)
        kinds = {kind for one in values["maps"].values() for kind in kinds_of(one)}
        for kind in sorted(kinds - set(CALIBRATORS)):
            raise UnknownNameError("calibrator", kind, CALIBRATORS)
        own = {key: values[key] for key in keys}
        return cls(tuple(values["findings"]), **own, cross_fitted=values.get("cross_fitted"), steps=values.get("steps"))


def _check_content(values: Mapping[str, Any]) -> None:
    """Raise PredictionError unless maps, thresholds and `fitted_on` are of the form that `to_dict` gives them."""

    def each(key: str, *parts: str) -> bool:
        found = values[key].values() if isinstance(values[key], dict) else [0]
        return all(one is None or (isinstance(one, dict) and set(parts) <= set(one)) for one in found)

    fitted_on = values["fitted_on"]
    sound = {key: each(key, "f1") for key in ("thresholds", "raw_thresholds")}
    sound["maps"] = each("maps", "kind", "parameters", "flag") and set(values["maps"]) == set(values["findings"])
    sound["fitted_on"] = not fitted_on or (isinstance(fitted_on, dict) and "digests" in fitted_on)
    if wrong := [key for key, fine in sorted(sound.items()) if not fine]:
        raise PredictionError(
            f"The calibrator's {', '.join(wrong)}: not as it was written; the file is damaged or was edited. Fit it "
            "again (hilum calibrate)."
        )


def _words(steps: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in steps.items()) or "no further step"


def write_calibrator(calibrator: Calibrator, path: Path) -> None:
    """Write a calibrator as JSON."""
    write_json(Path(path), calibrator.to_dict())


def read_calibrator(path: Path) -> Calibrator:
    """Read a calibrator; PredictionError where it is absent or malformed."""
    values = read_json(Path(path), PredictionError)
    if not isinstance(values, dict):
        raise PredictionError(f"{path} is not a calibrator: expected a JSON object.")
    return Calibrator.from_dict(values)


def _check_values(probabilities: np.ndarray, names: tuple[str, ...]) -> None:
    """Raise PredictionError unless every column is probabilities, or NaN throughout."""
    missing = np.isnan(probabilities)
    bad = (missing & ~missing.all(axis=0)) | (~missing & ~((probabilities >= 0) & (probabilities <= 1)))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise PredictionError(
            f"{int(bad.sum())} values to calibrate are not probabilities: item {row} of {names[column]!r} has "
            f"{float(probabilities[row, column])!r}. Expected a number in [0, 1], or NaN for a finding never trained."
        )


def _fit_all_thresholds(
    data: Mapping[str, Data], groups: Mapping[str, str], points: Sequence[str]
) -> dict[str, dict[str, float]]:
    thresholds = {}
    for group in {groups.get(name, "") for name in data}:
        parts = {name: part for name, part in data.items() if groups.get(name, "") == group}
        joint = [np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True)]
        shared = fit_thresholds(joint[0], joint[1], None, points)
        thresholds.update({name: fit_thresholds(p, y, shared, points) for name, (p, y) in parts.items()})
    return {name: thresholds[name] for name in data}
