"""Intervals by resampling patients, for many findings and metrics at once, and paired tests between two models.

Every resample is its own stream of the seed, so two models judged on the same patients are judged on the same
resamples. How a finding is measured in a block of resamples is in `weighted.py`; a metric without such a form is
recomputed on the repeated rows: same numbers, slower. What a metric is, is in `definitions.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError
from hilum.core.seeding import stream
from hilum.evaluation.definitions import METRICS, macro_name
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import patient_keys, study_uids
from hilum.evaluation.weighted import FAST, WeightedFinding

BLOCK = 100
"""Resamples per matrix product: bounds the memory, changes no number."""
INTERVAL = (0.025, 0.975)
INTERVALS = "95 %; levels: percentiles less the mean bias of the resamples; differences: basic"
"""Which, in words."""


def patient_clusters(dataset: np.ndarray, patient_id: np.ndarray, study: np.ndarray) -> Int[np.ndarray, " N"]:
    """Number the patients 0, 1, ...; an item without a patient id is clustered by its study (`studies.study_uids`)."""
    return np.unique(patient_keys(dataset, patient_id, study), return_inverse=True)[1]


def resample_weights(clusters: int, first: int, last: int, seed: int) -> Float[np.ndarray, "P R"]:
    """How often each patient is drawn in resamples first .. last-1, each its own stream of the seed."""
    draws = [stream(seed, "bootstrap", number).integers(0, clusters, clusters) for number in range(first, last)]
    return np.stack([np.bincount(draw, minlength=clusters) for draw in draws], axis=1).astype(np.float64)


def replicates(findings: Sequence[WeightedFinding], bootstraps: int, seed: int) -> dict[str, Float[np.ndarray, "R C"]]:
    """Every metric of every finding in every resample; NaN where undefined there.

    Two sets of predictions of the same items, with the same seed, are measured on the same resamples.
    """
    results = {name: np.full((bootstraps, len(findings)), np.nan) for name in METRICS}
    fast = [name for name in METRICS if name in FAST]
    slow = [name for name in METRICS if name not in FAST]
    for first in range(0, bootstraps if findings else 0, BLOCK):
        last = min(first + BLOCK, bootstraps)
        weights = resample_weights(findings[0].count, first, last, seed)
        for column, finding in enumerate(findings):
            for name, values in finding.measure(weights, fast).items():
                results[name][first:last, column] = values
            for number in range(first, last) if slow else ():
                copies = weights[finding.clusters, number - first].astype(np.int64)
                p, y = np.repeat(finding.probabilities, copies), np.repeat(finding.labels, copies).astype(np.int8)
                for name in slow:
                    value = METRICS[name](p, y, finding.threshold) if len(y) and y.any() else None
                    results[name][number, column] = np.nan if value is None else value
    return results


def interval(
    values: Float[np.ndarray, " R"], point: float | None, within: tuple[float, float] = (0.0, 1.0)
) -> list[float] | None:
    """95 % interval of a level: percentiles of the resamples, moved down by what these lie above `point` in the mean.

    A patient who is drawn twice ties with himself, and average precision counts ties in favour, so that resamples lie
    above what they are resamples of, most where the images of a study share one score (docs/reference/metrics.md).

    Args:
        values: of the resamples; NaN where the metric is undefined.
        point: of all patients.
        within: the range of the metric.

    Returns:
        [low, high]; None without a point or with fewer than two resamples where the metric is defined.
    """
    defined = values[~np.isnan(values)]
    if point is None or np.isnan(point) or len(defined) < 2:
        return None
    ends = np.quantile(defined, INTERVAL) - (defined.mean() - point)
    return np.clip(ends, *within).tolist()


def basic_interval(values: Float[np.ndarray, " R"], point: float | None) -> list[float] | None:
    """95 % interval of a difference: twice `point` less the percentiles, upper and lower (Davison, Hinkley 1997, 5.2).

    Where there is no difference the percentiles, moved or not, leave zero out too often when one side has more ties.

    Args:
        values: of the resamples; NaN where undefined.
        point: of all patients.

    Returns:
        As `interval`.
    """
    defined = values[~np.isnan(values)]
    if point is None or np.isnan(point) or len(defined) < 2:
        return None
    return (2 * point - np.quantile(defined, INTERVAL)[::-1]).tolist()


def mean_over_findings(values: Float[np.ndarray, "R C"]) -> Float[np.ndarray, " R"]:
    """Macro mean of each resample over the findings defined in it; NaN where none is."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis=1)
    total = np.where(defined, values, 0.0).sum(axis=1)
    return np.divide(total, counts, out=np.full(len(values), np.nan), where=counts > 0)


def difference_interval(
    a: Float[np.ndarray, "R C"], b: Float[np.ndarray, "R C"], point: float | None
) -> dict[str, Any]:
    """Macro difference a - b with its paired interval and p-value; `shown` is False where the interval includes zero.

    `p` is two-sided, of the difference less the mean bias of its resamples over their standard error, taken as normal:
    unlike a share of resamples it is not stopped at 1 / resamples, which a Holm correction over many findings needs.
    """
    if a.shape != b.shape:
        raise PredictionError(f"Paired differences need the same resamples and findings: {a.shape} against {b.shape}.")
    both = ~(np.isnan(a) | np.isnan(b))
    samples = mean_over_findings(np.where(both, a, np.nan)) - mean_over_findings(np.where(both, b, np.nan))
    ends = basic_interval(samples, point)
    low, high = ends or (None, None)
    shown = bool(ends and (ends[0] > 0 or ends[1] < 0))
    return {"difference": point, "low": low, "high": high, "shown": shown, "p": _p_value(samples, point)}


def _p_value(samples: Float[np.ndarray, " R"], point: float | None) -> float | None:
    """None without a difference or without scatter; 1 where there is neither difference nor scatter."""
    defined = samples[~np.isnan(samples)]
    if point is None or len(defined) < 2:
        return None
    error = float(defined.std(ddof=1))
    if error == 0.0:
        return 1.0 if point == 0.0 else None
    return math.erfc(abs(2 * point - float(defined.mean())) / error / math.sqrt(2))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for how many there are (Holm 1979): family-wise error, no assumption; None stays out."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[index] = highest
    return corrected


def clusters_of(predictions: Predictions) -> Int[np.ndarray, " N"]:
    """The patient of each item, numbered from 0."""
    p = predictions
    return patient_clusters(p.dataset, p.patient_id, study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid))


def paired_difference(
    a: Predictions,
    b: Predictions,
    labels: Int[np.ndarray, "N C"],
    thresholds_a: Mapping[str, float] | None = None,
    thresholds_b: Mapping[str, float] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    min_positives: int = 0,
) -> dict[str, dict[str, Any]]:
    """Macro differences a - b on the same patients and the same resamples, per macro metric; see `paired_comparison`.

    Returns:
        {"mAP": {"first", "second", "difference", "low", "high", "shown", "p", "findings"}, ...}: the two means over
        the findings defined in both, which `findings` counts; `shown` is False where the interval includes zero.
    """
    return paired_comparison(a, b, labels, thresholds_a, thresholds_b, bootstraps, seed, min_positives)[0]


def paired_comparison(
    a: Predictions,
    b: Predictions,
    labels: Int[np.ndarray, "N C"],
    thresholds_a: Mapping[str, float] | None = None,
    thresholds_b: Mapping[str, float] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    min_positives: int = 0,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, Any]]]]:
    """Paired differences a - b: macro, and of every finding.

    Args:
        a: one set of predictions.
        b: the other, of the same items in any order, with at least the findings of `a`.
        labels: int8, rows and columns as in `a`.
        thresholds_a: of F1@tuned for `a`.
        thresholds_b: the same for `b`.
        bootstraps: resamples of patients.
        seed: root of the resamples.
        min_positives: findings with fewer are not compared.

    Returns:
        (what `paired_difference` returns, {FINDING: {METRIC: {"first", "second", "difference", "low", "high", "shown",
        "p", "p_holm", "shown_holm"}}}): `p_holm` is corrected over the findings of that metric, and `shown_holm` says
        whether it is under 0.05.

    Raises:
        PredictionError: the items are not the same.
    """
    b = joined(b, a)
    names = [
        name
        for c, name in enumerate(a.findings)
        if a.trained[c] and b.trained[b.findings.index(name)] and (labels[:, c] == 1).sum() >= min_positives
    ]
    a_part, b_part = a.select(names), b.select(names)
    columns = [a.findings.index(name) for name in names]
    clusters = clusters_of(a)
    sides = []
    for part, cuts in ((a_part, thresholds_a or {}), (b_part, thresholds_b or {})):
        arguments = [
            (part.probabilities[:, i], labels[:, column], cuts.get(name))
            for i, (column, name) in enumerate(zip(columns, names, strict=True))
        ]
        weighted = [WeightedFinding(p, y, clusters, int(clusters.max()) + 1, cut) for p, y, cut in arguments]
        points = {metric: _or_nan([measure(*each) for each in arguments]) for metric, measure in METRICS.items()}
        sides.append((points, replicates(weighted, bootstraps, seed)))
    (points_a, samples_a), (points_b, samples_b) = sides
    macro: dict[str, dict[str, Any]] = {}
    by_finding: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for metric in METRICS:
        values_a, values_b = points_a[metric], points_b[metric]
        both = np.flatnonzero(~np.isnan(values_a - values_b))
        rows = []
        for chosen in (both, *both[:, None]):
            ours, theirs, difference = (
                float(values[chosen].mean()) if len(chosen) else None
                for values in (values_a, values_b, values_a - values_b)
            )
            row = difference_interval(samples_a[metric][:, chosen], samples_b[metric][:, chosen], difference)
            rows.append({"first": ours, "second": theirs, **row})
        macro[macro_name(metric)] = {**rows[0], "findings": len(both)}
        for column, row, p in zip(both, rows[1:], holm([row["p"] for row in rows[1:]]), strict=True):
            by_finding[names[column]][metric] = {**row, "p_holm": p, "shown_holm": p is not None and p < 0.05}
    return macro, by_finding


def _or_nan(values: Sequence[float | None]) -> Float[np.ndarray, " C"]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def joined(other: Predictions, to: Predictions) -> Predictions:
    """`other` with the rows of `to`, joined by uid, and the findings of `to` by name.

    Raises:
        PredictionError: not the same items, not the same unit, or a finding is missing.
    """
    mine, theirs = set(to.image_uid.tolist()), set(other.image_uid.tolist())
    if mine != theirs or to.unit != other.unit:
        example = sorted(mine ^ theirs)[:1]
        raise PredictionError(
            f"The two prediction files do not cover the same items: {len(mine & theirs)} in both, {len(mine - theirs)} "
            f"only in the first, {len(theirs - mine)} only in the second"
            f"{f', for example {example[0]!r}' if example else ''}; units {to.unit} and {other.unit}."
        )
    return other.rows(other.places(to.image_uid)).select(to.findings)
