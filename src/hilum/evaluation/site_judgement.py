"""Is a model fit for a site? Numbers with intervals, and a verdict by fixed rules.

The rules are those of docs/how-to/recalibrate-for-your-hospital.md, written before they were first run. Takes
predictions and labels of the site's studies and what cross-fitting made of them; fits nothing (`recalibration.py`),
draws nothing (`site_report.py`). Past 300 lines: every number of that page, and the rules beside them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import chdtri

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.intervals import wilson_interval
from hilum.evaluation.bootstrap import (
    BLOCK,
    INTERVALS,
    basic_interval,
    clusters_of,
    interval,
    replicates,
    resample_weights,
)
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.definitions import METRICS
from hilum.evaluation.map_choice import OWN_FROM
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.recalibration import CrossFitted
from hilum.evaluation.thresholds import asked_of, point_words
from hilum.evaluation.weighted import WeightedFinding

YES, NOT_SHOWN, NO = "yes", "not shown", "no"
AGREES = 0.02
"""The mean probability agrees with the share of positives when the interval of their difference lies within this."""
NEAR = 0.01
"""An AUC nearer than this to the least useful one decides nothing, however many studies there are."""
DRIFT_BINS = 10
LARGE_DRIFT = 0.25
"""Population stability index from which drift is called large, by convention."""
MOST_POSITIVES = 10_000_000
JUDGED = ("Brier", "ECE", "LogLoss")


@dataclass(frozen=True)
class Rules:
    """What a site asks of a model."""

    points: tuple[str, ...] = ("f1",)
    """Operating points of the page; the first is the one that it begins with."""
    asked: tuple[str, ...] = ()
    """Those of `points` that fix a sensitivity or a specificity, which has to be kept out of sample."""
    minimum_auc: float = 0.70
    width: float = 0.10
    """Of the intervals that further studies are counted for."""
    findings: tuple[str, ...] = ()
    """That are asked about; empty: all with enough studies."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.minimum_auc < 1:
            raise ConfigError(f"--minimum-auc: expected 0.5 or more and below 1, found {self.minimum_auc}.")
        if not 0 < self.width < 1:
            raise ConfigError(f"--width: expected a width between 0 and 1, such as 0.1; found {self.width}.")


def judge_site(
    raw: Predictions,
    before: Predictions,
    after: CrossFitted,
    labels: Int[np.ndarray, "N C"],
    calibrator: Calibrator,
    rules: Rules,
    card: Mapping[str, Mapping[str, Any]],
    drift: Mapping[str, Mapping[str, float]],
    exposed: int = 0,
    bootstraps: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything in `site_report.json` that follows from predictions and labels.

    Args:
        raw: the site's studies, not calibrated.
        before: the same by the model's old calibrator; raw for a model without one.
        after: what cross-fitting gave.
        labels: codes, rows and columns as in the predictions.
        calibrator: the new one, fitted on all.
        rules: what is asked.
        card: by finding, AUC and AP of the model's own validation (`discrimination`).
        drift: by finding, `drift_of`.
        exposed: studies with images that the model has met; with any, nothing is fit.
        bootstraps: resamples of patients.
        seed: of the resamples.

    Raises:
        UnknownNameError: a finding is asked about that the model does not have.
    """
    for name in rules.findings:
        if name not in raw.findings:
            raise UnknownNameError("finding", name, raw.findings)
    clusters = clusters_of(raw)
    columns = [c for c in range(len(raw.findings)) if raw.trained[c] and np.isin(labels[:, c], (0, 1)).any()]
    sides = [_measure(values, labels, clusters, columns, bootstraps, seed)
             for values in (before.probabilities, after.probabilities)]  # fmt: skip
    gaps = _mean_gaps(after.probabilities, labels, clusters, bootstraps, seed)
    findings: dict[str, Any] = {}
    for c, name in enumerate(raw.findings):
        known = np.isin(labels[:, c], (0, 1))
        positive = labels[:, c] == 1
        row: dict[str, Any] = {
            "positives": int(positive.sum()), "negatives": int((labels[:, c] == 0).sum()),
            "unknown": int((~known).sum()), "patients": len(set(clusters[known].tolist())),
            "patients_positive": len(set(clusters[positive].tolist())),
            "prevalence": float(positive.sum() / known.sum()) if known.any() else None,
            "enough": min(int(positive.sum()), int((known & ~positive).sum())) >= OWN_FROM,
            "trained": bool(raw.trained[c]),
            "AUC": None, "AP": None, "calibration": None, "points": {},
            "card": card.get(name), "drift": drift.get(name), "map": _map_words(calibrator.maps.get(name)),
        }  # fmt: skip
        if c in columns:
            row |= _numbers(columns.index(c), sides)
            means = [values[known, c] for values in (before.probabilities, after.probabilities)]
            row["calibration"] |= {
                "mean_before": float(means[0].mean()), "mean_after": float(means[1].mean()), "gap": gaps[c],
            }  # fmt: skip
            cuts = calibrator.thresholds.get(name, {})
            row["points"] = {
                point: {"threshold": cuts[point], **_decisions(after.called[point][:, c], labels[:, c], clusters)}
                for point in rules.points
                if point in cuts and not np.isnan(after.called[point][known, c]).all()
            }
        row["needed"] = _needed(row, rules)
        row["verdict"], row["reasons"] = _verdict(row, rules, exposed)
        findings[name] = row
    return {
        "studies": len(raw), "patients": int(clusters.max()) + 1, "exposed": exposed,
        "rules": {
            "minimum_auc": rules.minimum_auc, "width": rules.width, "points": list(rules.points),
            "asked": list(rules.asked), "findings": list(rules.findings), "enough": OWN_FROM, "agrees": AGREES,
        },
        "bootstrap": {"resamples": bootstraps, "seed": seed, "cluster": "patient", "interval": INTERVALS},
        "overall": _overall(findings, rules), "findings": findings,
    }  # fmt: skip


def discrimination(
    predictions: Predictions, labels: Int[np.ndarray, "N C"], bootstraps: int, seed: int
) -> dict[str, dict[str, Any]]:
    """AUC and AP of each finding with intervals by patient, as a model's own validation gives them."""
    clusters = clusters_of(predictions)
    columns = [
        c for c in range(len(predictions.findings)) if predictions.trained[c] and np.isin(labels[:, c], (0, 1)).any()
    ]
    points, samples = _measure(predictions.probabilities, labels, clusters, columns, bootstraps, seed)
    return {
        predictions.findings[c]: {
            "AUC": _with_interval(points["AUC"][place], samples["AUC"][:, place]),
            "AP": _with_interval(points["AP"][place], samples["AP"][:, place]),
            "positives": int((labels[:, c] == 1).sum()),
            "prevalence": float((labels[:, c] == 1).sum() / np.isin(labels[:, c], (0, 1)).sum()),
        }
        for place, c in enumerate(columns)
    }


def drift_of(here: Float[np.ndarray, " N"], there: Float[np.ndarray, " M"]) -> dict[str, float]:
    """How far the scores of a site are from those of validation: the population stability index, over its tenths.

    PSI = sum (q - p) ln(q / p), p and q with half an item added to each tenth; `chance` is what 1 in 20 samples of the
    same distribution exceeds (PSI is about (1/N + 1/M) times a chi-square of tenths - 1 degrees of freedom).
    """
    edges = np.unique(np.quantile(there, np.linspace(0, 1, DRIFT_BINS + 1)[1:-1]))
    counts = [np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) + 0.5
              for values in (here, there)]  # fmt: skip
    q, p = (count / count.sum() for count in counts)
    chance = chdtri(max(len(edges), 1), 0.05) * (1 / len(here) + 1 / len(there))
    return {"PSI": float(((q - p) * np.log(q / p)).sum()), "chance": float(chance)}


_Side = tuple[dict[str, Float[np.ndarray, " C"]], dict[str, Float[np.ndarray, "R C"]]]


def _measure(
    values: np.ndarray, labels: np.ndarray, clusters: np.ndarray, columns: Sequence[int], bootstraps: int, seed: int
) -> _Side:
    count = int(clusters.max()) + 1
    weighted = [WeightedFinding(values[:, c], labels[:, c], clusters, count, None) for c in columns]
    points = {
        metric: np.array(
            [np.nan if (value := METRICS[metric](values[:, c], labels[:, c], None)) is None else value for c in columns]
        )
        for metric in ("AUC", "AP", *JUDGED)
    }
    return points, replicates(weighted, bootstraps, seed)


def _numbers(place: int, sides: Sequence[_Side]) -> dict[str, Any]:
    """AUC and AP of the old values: every map keeps the order of studies, but those of two folds are not one map."""
    (points, samples), (points_after, samples_after) = sides
    changes = {}
    for metric in JUDGED:
        difference = points_after[metric][place] - points[metric][place]
        ends = basic_interval(samples_after[metric][:, place] - samples[metric][:, place], float(difference))
        changes[metric] = {
            "before": float(points[metric][place]), "after": float(points_after[metric][place]),
            "difference": float(difference), "low": ends[0] if ends else None, "high": ends[1] if ends else None,
            "shown": bool(ends and (ends[0] > 0 or ends[1] < 0)),
        }  # fmt: skip
    return {
        "AUC": _with_interval(points["AUC"][place], samples["AUC"][:, place]),
        "AP": _with_interval(points["AP"][place], samples["AP"][:, place]),
        "calibration": changes,
    }


def _with_interval(
    value: float, samples: np.ndarray, within: tuple[float, float] = (0.0, 1.0)
) -> dict[str, float | None] | None:
    if np.isnan(value):
        return None
    ends = interval(samples, value, within)
    return {"value": float(value), "low": ends[0] if ends else None, "high": ends[1] if ends else None}


def _mean_gaps(
    probabilities: np.ndarray, labels: np.ndarray, clusters: np.ndarray, bootstraps: int, seed: int
) -> list[dict[str, float | None]]:
    """Mean probability minus share of positives, with its interval, of every finding."""
    known = np.isin(labels, (0, 1)) & ~np.isnan(probabilities)
    gap = np.where(known, np.nan_to_num(probabilities) - (labels == 1), 0.0)
    count = int(clusters.max()) + 1
    sums, totals = (np.zeros((count, labels.shape[1])) for _ in range(2))
    np.add.at(sums, clusters, gap)
    np.add.at(totals, clusters, known.astype(np.float64))
    parts = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for first in range(0, bootstraps, BLOCK):
            weights = resample_weights(count, first, min(first + BLOCK, bootstraps), seed)
            parts.append((weights.T @ sums) / (weights.T @ totals))
        values = sums.sum(axis=0) / totals.sum(axis=0)
    samples = np.concatenate(parts) if parts else np.zeros((0, labels.shape[1]))
    return [
        _with_interval(values[c], samples[:, c], (-1.0, 1.0)) or {"value": None, "low": None, "high": None}
        for c in range(len(values))
    ]


def _decisions(called: np.ndarray, labels: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Sensitivity, specificity, PPV and alerts per 100 studies of decisions that were made out of sample."""
    known = np.isin(labels, (0, 1)) & ~np.isnan(called)
    yes, positive = (called == 1) & known, (labels == 1) & known
    return {
        "sensitivity": _share(yes, positive, clusters),
        "specificity": _share(known & ~yes, known & ~positive, clusters),
        "PPV": _share(positive, yes, clusters),
        "alerts_per_100": {
            key: None if value is None else 100 * value for key, value in _share(yes, known, clusters).items()
        },
    }


def _share(hit: np.ndarray, among: np.ndarray, clusters: np.ndarray) -> dict[str, float | None]:
    """A share with its Wilson interval, in which the studies of one patient count as one."""
    total = int(among.sum())
    if total == 0:
        return {"value": None, "low": None, "high": None}
    value = float((hit & among).sum() / total)
    patients = len(set(clusters[among].tolist()))
    low, high = wilson_interval(value * patients, patients)
    return {"value": value, "low": low, "high": high}


def _needed(row: Mapping[str, Any], rules: Rules) -> dict[str, int | None]:
    """Further labelled studies until the finding can be judged, until its AUC decides (if it stays what it is), and
    until intervals are as narrow as asked; None where that cannot be said.
    """
    have, share = row["positives"] + row["negatives"], row["prevalence"]
    short = max(OWN_FROM - row["positives"], OWN_FROM - row["negatives"], 0)
    rarer = None if share is None else share if row["positives"] <= row["negatives"] else 1 - share
    judged = 0 if short == 0 else math.ceil(short / rarer) if rarer else None
    auc = row["AUC"]
    for_auc = to_decide = None
    if row["enough"] and auc and auc["low"] is not None:
        for_auc = max(math.ceil(have * (((auc["high"] - auc["low"]) / rules.width) ** 2 - 1)), 0)
        distance = auc["value"] - rules.minimum_auc
        side = auc["value"] - auc["low"] if distance > 0 else auc["high"] - auc["value"]
        to_decide = max(math.ceil(have * ((side / abs(distance)) ** 2 - 1)), 0) if abs(distance) > NEAR else None
    point = next(iter(row["points"].values()), None)
    sensitivity = point["sensitivity"]["value"] if point else None
    for_sensitivity = None
    if row["enough"] and sensitivity is not None and share:
        wanted = positives_for_width(sensitivity, rules.width)
        per_patient = row["positives"] / max(row["patients_positive"], 1)
        for_sensitivity = max(math.ceil(wanted * per_patient / share) - have, 0)
    return {"judged": judged, "decide": to_decide, "AUC": for_auc, "sensitivity": for_sensitivity}


def positives_for_width(share: float, width: float) -> int:
    """How many items it takes until the Wilson interval of this share is so wide or narrower."""
    low, high = 1, MOST_POSITIVES
    while low < high:
        middle = (low + high) // 2
        ends = wilson_interval(share * middle, middle)
        low, high = (low, middle) if ends[1] - ends[0] <= width else (middle + 1, high)
    return low


def _verdict(row: Mapping[str, Any], rules: Rules, exposed: int) -> tuple[str, list[str]]:
    """By the table of docs/how-to/recalibrate-for-your-hospital.md; and why, in words."""
    if not row["trained"]:
        return NOT_SHOWN, ["the model was never trained on it"]
    if not row["enough"]:
        few = f"{row['positives']} positive and {row['negatives']} negative studies"
        return NOT_SHOWN, [f"too few to judge: {few}, {OWN_FROM} of each are needed"]
    auc, least = row["AUC"], rules.minimum_auc
    if auc["low"] is None:
        return NOT_SHOWN, ["no interval: no resamples were asked for"]
    if auc["high"] < least:
        return NO, [f"the whole interval of the AUC lies below {least:.2f}"]
    doubts = []
    if auc["low"] < least:
        doubts.append(f"the interval of the AUC reaches below {least:.2f}")
    gap = row["calibration"]["gap"]
    if not (gap["low"] <= 0 <= gap["high"] or (gap["low"] >= -AGREES and gap["high"] <= AGREES)):
        doubts.append("recalibrated probabilities do not agree with the share of positives")
    for point in rules.asked:
        if point not in row["points"]:
            doubts.append(f"no cut for {point_words(point)}")
            continue
        kind, wanted = asked_of(point)
        if row["points"][point][kind]["high"] < wanted:
            doubts.append(f"the {kind} of {wanted:g} is not kept out of sample")
    if exposed:
        doubts.append("the model has met these images")
    return (NOT_SHOWN, doubts) if doubts else (YES, [f"the whole interval of the AUC lies at {least:.2f} or above"])


def _overall(findings: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    asked = list(rules.findings) or [name for name, row in findings.items() if row["enough"] and row["trained"]]
    by = {word: [name for name in asked if findings[name]["verdict"] == word] for word in (YES, NOT_SHOWN, NO)}
    rest = [name for name in asked if name not in by[NO]]
    return {
        "verdict": _worst(by), "asked": asked, **{word.replace(" ", "_"): names for word, names in by.items()},
        "without_failures": _worst({YES: by[YES], NOT_SHOWN: by[NOT_SHOWN], NO: []}) if by[NO] and rest else None,
        "not_judged": [name for name, row in findings.items() if name not in asked and not row["enough"]],
    }  # fmt: skip


def _worst(by: Mapping[str, Sequence[str]]) -> str:
    if by[NO]:
        return NO
    return YES if by[YES] and not by[NOT_SHOWN] else NOT_SHOWN


def _map_words(one: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {"kind": one["kind"], "on_top": bool(one.get("after")), "flag": one["flag"], "known": one["known"]}
