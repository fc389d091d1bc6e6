"""Intervals by resampling patients, for many findings and metrics at once.

A resample is a whole number of copies of every patient, so every metric becomes a function of weighted counts. Items
are sorted once per finding and reduced to a sparse matrix (rows of counts x patients); a block of resamples is then one
matrix product, exact for ties. A metric without such a form is recomputed on the repeated rows: same numbers, slower.
This module resamples and compares; what a metric is, is in `definitions.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from hilum.core.errors import PredictionError
from hilum.core.seeding import stream
from hilum.evaluation.definitions import BINS, METRICS, bin_of, macro_name
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import study_uids

BLOCK = 100
"""Resamples per matrix product: bounds the memory, changes no number."""
INTERVAL = (0.025, 0.975)


def patient_clusters(dataset: np.ndarray, patient_id: np.ndarray, study: np.ndarray) -> Int[np.ndarray, " N"]:
    """Number the patients 0, 1, ...; an item without a patient id is clustered by its study (`studies.study_uids`)."""
    rows = zip(dataset.tolist(), patient_id.tolist(), study.tolist(), strict=True)
    keys = [f"p\x1f{d}\x1f{p}" if p else f"s\x1f{s}" for d, p, s in rows]
    return np.unique(keys, return_inverse=True)[1]


def resample_weights(clusters: int, first: int, last: int, seed: int) -> Float[np.ndarray, "P R"]:
    """How often each patient is drawn in resamples first .. last-1, each its own stream of the seed."""
    draws = [stream(seed, "bootstrap", number).integers(0, clusters, clusters) for number in range(first, last)]
    return np.stack([np.bincount(draw, minlength=clusters) for draw in draws], axis=1).astype(np.float64)


class WeightedFinding:
    """One finding of one set of predictions, ready to be measured under patient weights.

    Args:
        probabilities, labels: (N,) of this finding; only labels 0 and 1 are used.
        clusters: (N,) patient of each item, 0 .. P-1.
        count: P.
        threshold: of F1@tuned; None leaves that metric undefined.
    """

    def __init__(
        self,
        probabilities: Float[np.ndarray, " N"],
        labels: Int[np.ndarray, " N"],
        clusters: Int[np.ndarray, " N"],
        count: int,
        threshold: float | None,
    ) -> None:
        known = (labels == 0) | (labels == 1)
        self.probabilities = np.asarray(probabilities, np.float64)[known]
        self.labels = np.asarray(labels)[known] == 1
        self.clusters, self.count, self.threshold = clusters[known], count, threshold
        self.ranking, self.steps = self._ranking_matrix()
        self.sums = self._sum_matrix()

    def _ranking_matrix(self) -> tuple[sparse.csr_array, int]:
        """Rows 3k, 3k+1, 3k+2: negatives above the k-th score that has positives, positives and negatives at it."""
        scores = np.unique(self.probabilities[self.labels])[::-1]
        # number of scores-with-positives at or above each item: its step when equal, the step before it otherwise
        step = len(scores) - np.searchsorted(scores[::-1], self.probabilities, side="right")
        tied = np.zeros(len(step), dtype=bool)
        inside = step < len(scores)
        tied[inside] = scores[step[inside]] == self.probabilities[inside]
        row = 3 * step + np.where(self.labels, 1, np.where(tied, 2, 0))
        ones = np.ones(len(row))
        shape = (3 * len(scores) + 3, self.count)
        return sparse.csr_array(sparse.coo_array((ones, (row, self.clusters)), shape=shape)), len(scores)

    def _sum_matrix(self) -> sparse.csr_array:
        """Rows: items, squared errors, six F1 counts, then 15 + 15 sums of the two calibration gaps."""
        p, y, n = self.probabilities, self.labels, len(self.labels)
        cut = np.nan if self.threshold is None else self.threshold
        rows, values = [np.zeros(n, np.int64), np.ones(n, np.int64)], [np.ones(n), (p - y) ** 2]
        for base, decided in ((2, p > 0.5), (5, p > cut)):
            outcome = np.where(decided & y, 0, np.where(decided, 1, np.where(y, 2, 99)))
            rows.append(np.where(outcome < 99, base + outcome, 0))
            values.append((outcome < 99).astype(np.float64))
        place = bin_of(p)
        rows += [8 + place, 8 + BINS + place]
        values += [p - y, p - ((p > 0.5) == y)]
        columns = np.tile(self.clusters, len(rows))
        matrix = (np.concatenate(values), (np.concatenate(rows), columns))
        return sparse.csr_array(sparse.coo_array(matrix, shape=(8 + 2 * BINS, self.count)))

    def measure(self, weights: Float[np.ndarray, "P R"], names: Sequence[str]) -> dict[str, Float[np.ndarray, " R"]]:
        """The named metrics (of FAST) in every resample; NaN where undefined.

        A resample without a positive has no AP, AUC or F1 (it is skipped); one without an item has nothing.
        """
        sums = self.sums @ weights
        items, positives = sums[0], sums[2] + sums[4]
        results = self._rank_metrics(weights, positives)
        with np.errstate(invalid="ignore", divide="ignore"):
            prevalence = positives / items
            results["AP_normalised"] = (results["AP"] - prevalence) / np.where(prevalence < 1, 1 - prevalence, np.nan)
            results["Brier"] = sums[1] / items
            results["ECE"] = np.abs(sums[8 : 8 + BINS]).sum(axis=0) / items
            results["ECE_challenge_inferred"] = np.abs(sums[8 + BINS :]).sum(axis=0) / items
            results["F1@0.5"] = 2 * sums[2] / (2 * sums[2] + sums[3] + sums[4])
            results["F1@tuned"] = 2 * sums[5] / (2 * sums[5] + sums[6] + sums[7])
        for name in ("F1@0.5", "F1@tuned"):
            results[name][positives == 0] = np.nan
        if self.threshold is None:
            results["F1@tuned"][:] = np.nan
        return {name: results[name] for name in names}

    def _rank_metrics(
        self, weights: Float[np.ndarray, "P R"], positives: Float[np.ndarray, " R"]
    ) -> dict[str, Float[np.ndarray, " R"]]:
        precision, above, total = (np.zeros(weights.shape[1]) for _ in range(3))
        width = max(1, 4_000_000 // (3 * self.steps + 3))  # columns at a time, so that the product stays in memory
        for start in range(0, weights.shape[1], width):
            part = slice(start, start + width)
            counts = (self.ranking @ weights[:, part]).reshape(self.steps + 1, 3, -1)
            higher, positive, tied = counts[:-1, 0], counts[:-1, 1], counts[:-1, 2]
            true_positives = np.cumsum(positive, axis=0)
            false_positives = np.cumsum(higher + tied, axis=0)
            negatives = counts[:, [0, 2]].sum(axis=(0, 1))
            selected = np.maximum(true_positives + false_positives, 1)  # nothing selected: the numerator is 0 too
            precision[part] = (positive * true_positives / selected).sum(axis=0)
            above[part] = (positive * (negatives - false_positives + 0.5 * tied)).sum(axis=0)
            total[part] = positive.sum(axis=0) * negatives
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"AP": precision / np.where(positives > 0, positives, np.nan), "AUC": above / total}


FAST: tuple[str, ...] = ("AP", "AP_normalised", "AUC", "F1@0.5", "F1@tuned", "ECE", "ECE_challenge_inferred", "Brier")


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


def interval(values: Float[np.ndarray, " R"]) -> list[float] | None:
    """Percentile 95 % interval over the resamples where the metric is defined; None with fewer than two of them."""
    defined = values[~np.isnan(values)]
    if len(defined) < 2:
        return None
    low, high = np.quantile(defined, INTERVAL)
    return [float(low), float(high)]


def mean_over_findings(values: Float[np.ndarray, "R C"]) -> Float[np.ndarray, " R"]:
    """Macro mean of each resample over the findings defined in it; NaN where none is."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis=1)
    total = np.where(defined, values, 0.0).sum(axis=1)
    return np.divide(total, counts, out=np.full(len(values), np.nan), where=counts > 0)


def difference_interval(
    a: Float[np.ndarray, "R C"], b: Float[np.ndarray, "R C"], point: float | None
) -> dict[str, Any]:
    """Macro difference a - b with its paired interval; `shown` is False where the interval includes zero."""
    if a.shape != b.shape:
        raise PredictionError(f"Paired differences need the same resamples and findings: {a.shape} against {b.shape}.")
    both = ~(np.isnan(a) | np.isnan(b))
    ends = interval(mean_over_findings(np.where(both, a, np.nan)) - mean_over_findings(np.where(both, b, np.nan)))
    low, high = ends or (None, None)
    return {"difference": point, "low": low, "high": high, "shown": bool(ends and (ends[0] > 0 or ends[1] < 0))}


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
    """Macro differences a - b on the same patients and the same resamples, per macro metric.

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
        {"mAP": {"difference", "low", "high", "shown", "findings"}, ...}; `shown` is False where the interval includes
        zero; `findings` counts those defined in both.

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
    result = {}
    for metric in METRICS:
        differences = points_a[metric] - points_b[metric]
        both = np.flatnonzero(~np.isnan(differences))
        point = float(differences[both].mean()) if len(both) else None
        row = difference_interval(samples_a[metric][:, both], samples_b[metric][:, both], point)
        result[macro_name(metric)] = {**row, "findings": len(both)}
    return result


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
    order = np.argsort(other.image_uid)
    return other.rows(order[np.searchsorted(other.image_uid, to.image_uid, sorter=order)]).select(to.findings)
