"""What predictions are judged by: every metric per finding, with macro, group and micro means and their intervals.

Takes probabilities and labels that are already joined by id (`truth.py`), and thresholds that are already fixed.
Undefined is None, left out of the mean, with the count. The metrics themselves are in `definitions.py`, and exported
here; the shape of the result is in docs/reference/metrics.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hilum.core.errors import PredictionError
from hilum.evaluation.bootstrap import INTERVALS, clusters_of, interval, mean_over_findings, replicates
from hilum.evaluation.definitions import (
    METRICS,
    POINT_METRICS,
    average_precision,
    brier,
    calibration_line,
    challenge_ece,
    equal_mass_ece,
    expected_calibration_error,
    f1_at,
    macro_name,
    normalised_average_precision,
    range_of,
    roc_auc,
)
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import study_uids
from hilum.evaluation.weighted import WeightedFinding

__all__ = [
    "GROUPS",
    "METRICS",
    "average_precision",
    "brier",
    "challenge_ece",
    "evaluate",
    "expected_calibration_error",
    "f1_at",
    "macro_name",
    "normalised_average_precision",
    "roc_auc",
]

GROUPS = ("head", "medium", "tail")


def evaluate(
    predictions: Predictions,
    labels: Int[np.ndarray, "N C"],
    groups: Mapping[str, str] | None = None,
    thresholds: Mapping[str, float] | None = None,
    bootstraps: int = 0,
    seed: int = 0,
    min_positives: int = 0,
) -> dict[str, Any]:
    """Everything in `metrics.json` that follows from predictions and labels (docs/reference/metrics.md).

    Args:
        predictions: the evaluated items.
        labels: int8, rows and columns as the predictions'; 1, 0, and other codes for unknown.
        groups: head, medium or tail per finding, from training images; findings without one are in no group.
        thresholds: of F1@tuned, fixed on validation; without one, that metric is null.
        bootstraps: resamples of patients for the 95 % intervals; 0 for none.
        seed: root of the resamples.
        min_positives: findings with fewer stay out of every mean, and are listed.

    Raises:
        PredictionError: shapes that do not fit, or nothing to evaluate.
    """
    if labels.shape != predictions.probabilities.shape or len(predictions) == 0:
        raise PredictionError(
            f"Labels of shape {labels.shape} for predictions of shape {predictions.probabilities.shape}: expected one "
            "label for each prediction, and at least one item."
        )
    groups, thresholds = dict(groups or {}), dict(thresholds or {})
    findings = {
        name: _finding(predictions.probabilities[:, c], labels[:, c], groups.get(name), thresholds.get(name))
        for c, name in enumerate(predictions.findings)
    }
    excluded = _excluded(findings, predictions, min_positives)
    left_out = {*excluded["untrained"], *excluded["no_labels"], *excluded["few_positives"]}
    counted = [name for name in predictions.findings if name not in left_out]
    columns = [predictions.findings.index(name) for name in counted]
    clusters = clusters_of(predictions)
    count = int(clusters.max()) + 1
    weighted = [
        WeightedFinding(predictions.probabilities[:, c], labels[:, c], clusters, count, thresholds.get(name))
        for c, name in zip(columns, counted, strict=True)
    ]
    samples = replicates(weighted, bootstraps, seed)
    for column, name in enumerate(counted) if bootstraps else ():
        values = {metric: samples[metric][:, column] for metric in METRICS}
        defined = {metric: v for metric, v in values.items() if findings[name][metric] is not None}
        findings[name]["ci95"] = {
            metric: interval(v, findings[name][metric], range_of(metric)) for metric, v in defined.items()
        }
        findings[name]["skipped_resamples"] = {
            m: int(np.isnan(v).sum()) for m, v in defined.items() if np.isnan(v).any()
        }
    macro = _means(counted, counted, findings, samples)
    pairs = predictions.probabilities[:, columns].ravel(), labels[:, columns].ravel()
    macro["micro_AP"], macro["micro_AUC"] = average_precision(*pairs), roc_auc(*pairs)
    macro["ECE_flattened"], macro["ECE_flattened_equal_mass"] = (
        expected_calibration_error(*pairs),
        equal_mass_ece(*pairs),
    )
    studies = study_uids(predictions.dataset, predictions.patient_id, predictions.study_id, predictions.image_uid)
    return {
        "unit": predictions.unit,
        "stage": predictions.stage,
        "n_items": len(predictions),
        "n_images": len(predictions) if predictions.unit == "image" else None,
        "n_studies": len(set(studies.tolist())),
        "n_patients": count,
        "macro": macro,
        "groups": {
            group: _means([name for name in counted if groups.get(name) == group], counted, findings, samples)
            for group in GROUPS
        },
        "findings": findings,
        "excluded": excluded,
        "min_positives": min_positives,
        "bootstrap": {"resamples": bootstraps, "seed": seed, "cluster": "patient", "interval": INTERVALS},
    }


def _finding(p: np.ndarray, y: np.ndarray, group: str | None, threshold: float | None) -> dict[str, Any]:
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    trained = not np.isnan(p).all()
    measures = METRICS | POINT_METRICS
    values = {name: measure(p, y, threshold) if trained else None for name, measure in measures.items()}
    slope, intercept = calibration_line(p, y) if trained else (None, None)
    return {
        **values,
        "calibration_slope": slope,
        "calibration_intercept": intercept,
        "positives": positives,
        "negatives": negatives,
        "unknown": len(y) - positives - negatives,
        "prevalence": positives / (positives + negatives) if positives + negatives else None,
        "threshold": threshold,
        "group": group,
        "ci95": {},
    }


def _excluded(findings: Mapping[str, Any], predictions: Predictions, min_positives: int) -> dict[str, list[str]]:
    """Which findings are left out of a mean, and why."""
    untrained = [name for name, trained in zip(predictions.findings, predictions.trained, strict=True) if not trained]
    rest = {name: value for name, value in findings.items() if name not in untrained}
    no_labels = [name for name, value in rest.items() if value["prevalence"] is None]
    return {
        "untrained": untrained,
        "no_labels": no_labels,
        "no_positives": [n for n, v in rest.items() if v["positives"] == 0 and n not in no_labels],
        "no_negatives": [n for n, v in rest.items() if v["negatives"] == 0 and n not in no_labels],
        "few_positives": [n for n, v in rest.items() if v["positives"] < min_positives and n not in no_labels],
    }


def _means(
    names: Sequence[str], order: Sequence[str], findings: Mapping[str, Any], samples: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Macro means over `names`, their intervals, and over how many findings each was taken."""
    result: dict[str, Any] = {}
    intervals, counts = {}, {}
    for metric in METRICS | POINT_METRICS:
        defined = [name for name in names if findings[name][metric] is not None]
        title = macro_name(metric)
        result[title] = float(np.mean([findings[name][metric] for name in defined])) if defined else None
        counts[title] = len(defined)
        if defined and len(samples.get(metric, ())):
            columns = [order.index(name) for name in defined]
            resampled = mean_over_findings(samples[metric][:, columns])
            intervals[title] = interval(resampled, result[title], range_of(metric))
    return {**result, "ci95": intervals, "counted": counts, "findings": list(names)}
