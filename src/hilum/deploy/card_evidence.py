"""What a model card may say of how good a model is: measured on its own validation, out of sample, with intervals.

From the files of a directory alone, at the unit that the model answers for (the study). It is no test: the learning
rate, the epoch and an ensemble's members were chosen on the same images, and the card says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hilum.core.errors import PredictionError
from hilum.deploy.validation import Validation, read_validations
from hilum.evaluation.bootstrap import clusters_of
from hilum.evaluation.composition import Composition
from hilum.evaluation.map_choice import FOLDS, compare, cross_fit, deal_patients
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.subgroups import choose_attributes, subgroups

RESAMPLES = 200
"""Of patients, for the intervals of a card; an evaluation takes more."""
MIN_POSITIVES = 10
"""Findings with fewer have no numbers of their own in a card: their intervals would fill the scale."""


@dataclass(frozen=True)
class Evidence:
    """What was measured on one set of validation studies.

    Args:
        metrics: `metrics.evaluate` of them, before calibration: a calibrator changes no order.
        calibration: log loss, Brier score and ECE before and after, on patients left out of the fit
            (`map_choice.compare`); None where there are too few patients.
        groups: `subgroups.subgroups` by view and dataset, empty where they tell no two groups apart.
        images: how many images they have.
    """

    metrics: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    groups: Mapping[str, Any]
    images: int


def measure_validation(
    path: Path, content: Mapping[str, Any], composition: Composition, resamples: int = RESAMPLES
) -> list[Evidence]:
    """Evidence of every set of validation studies of a directory; none where it keeps none that is out of sample.

    Args:
        path: MODEL or ensemble directory; its card and its `config.json` need not be there yet.
        content: of the `config.json`.
        composition: how it puts predictions together.
        resamples: of patients.
    """
    groups = {finding["name"]: finding["group"] for finding in content["findings"]}
    studies = read_validations(path, content, composition)
    images = read_validations(path, content, composition, "image")
    recorded = ((content.get("calibration") or {}).get("study") or {}).get("cross_fitted")
    return [
        _measure(study, groups, len(image.predictions), recorded if len(studies) == 1 else None, resamples)
        for study, image in zip(studies, images, strict=True)
    ]


def _measure(
    validation: Validation, groups: Mapping[str, str], images: int, recorded: Mapping[str, Any] | None, resamples: int
) -> Evidence:
    predictions, labels = validation
    metrics = evaluate(predictions, labels, groups, bootstraps=resamples, min_positives=MIN_POSITIVES)
    attributes = choose_attributes(predictions, {}, None)
    judged = subgroups(predictions, labels, attributes, bootstraps=resamples, min_positives=MIN_POSITIVES)
    return Evidence(metrics, recorded or _cross_fitted(validation, groups), judged, images)


def _cross_fitted(validation: Validation, groups: Mapping[str, str]) -> Mapping[str, Any] | None:
    """As `Calibrator.fit` judges itself, by the rule that chooses maps by the number of positives."""
    predictions, labels = validation
    try:
        fold = deal_patients(clusters_of(predictions).tolist(), FOLDS)
    except PredictionError:  # fewer patients than folds
        return None
    kinds = dict.fromkeys(predictions.findings, "auto")
    after = cross_fit(predictions.probabilities, labels, predictions.findings, groups, kinds, fold)
    return {"folds": FOLDS, **compare(predictions.probabilities, after, labels, predictions.findings)}
