"""What each metric of one finding is: exact functions of probabilities and labels, and the list of those reported.

Every function leaves out items whose label is neither 0 nor 1, and returns None where the metric is undefined. Means
over findings are in `metrics.py`, intervals in `bootstrap.py`; docs/how-to/add-a-metric.md says how to add one.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError

BINS = 15
"""Equal-width calibration bins of [0, 1]."""

Measure = Callable[[np.ndarray, np.ndarray, float | None], float | None]


def known(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items with a known label: probabilities as float64, labels as bool.

    Raises:
        PredictionError: a probability is outside [0, 1] or not finite.
    """
    keep = (labels == 0) | (labels == 1)
    p, y = np.asarray(probabilities, np.float64)[keep], np.asarray(labels)[keep] == 1
    if not ((p >= 0) & (p <= 1)).all():
        raise PredictionError("Metrics take probabilities: found a value outside [0, 1] or not a number.")
    return p, y


def average_precision(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """Sum over distinct scores of (R_n - R_(n-1)) P_n, tied scores entering together; None without positives.

    As scikit-learn's average_precision_score; no interpolation. Labels other than 0 and 1 are left out.
    """
    p, y = known(scores, labels)
    if not y.any():
        return None
    order = np.argsort(-p, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    true_positives = np.cumsum(y[order])[ends]
    return float((np.diff(true_positives, prepend=0) * (true_positives / (ends + 1))).sum() / y.sum())


def roc_auc(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties counting half; None without both classes."""
    p, y = known(scores, labels)
    positives, negatives = int(y.sum()), int((~y).sum())
    if positives == 0 or negatives == 0:
        return None
    values, place, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    assert len(ranks) == len(values)
    return float((ranks[place][y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def f1_at(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], threshold: float) -> float | None:
    """2 TP / (2 TP + FP + FN), an item being called positive when p > threshold, strictly; 0 where that is 0 / 0."""
    p, y = known(probabilities, labels)
    if len(y) == 0:
        return None
    called = p > threshold
    total = called.sum() + y.sum()
    return float(2 * (called & y).sum() / total) if total else 0.0


def bin_of(probabilities: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Equal-width bin of [0, 1], closed below: bin b holds b/15 <= p < (b+1)/15, the last one p = 1 too."""
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


def _gap(p: np.ndarray, target: np.ndarray) -> float | None:
    if len(p) == 0:
        return None
    return float(np.abs(np.bincount(bin_of(p), weights=p - target, minlength=BINS)).sum() / len(p))


def expected_calibration_error(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """sum_b (n_b / n) |mean p in b - share of positives in b| over 15 equal-width bins of p."""
    p, y = known(probabilities, labels)
    return _gap(p, y)


def challenge_ece(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """The same with the share of positives replaced by the share of correct decisions, (p > 0.5) == y.

    Inferred from the CXR-LT 2024 leaderboard's values by simulation, not confirmed. A well calibrated model of rare
    findings scores badly on it: a number to compare with that leaderboard, not a goal.
    """
    p, y = known(probabilities, labels)
    return _gap(p, (p > 0.5) == y)


def brier(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """Mean squared difference of probability and outcome."""
    p, y = known(probabilities, labels)
    return float(((p - y) ** 2).mean()) if len(p) else None


def normalised_average_precision(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """(AP - prevalence) / (1 - prevalence): 0 for a random ranking, 1 for a perfect one."""
    precision, (_, y) = average_precision(scores, labels), known(scores, labels)
    return None if precision is None or y.all() else float((precision - y.mean()) / (1 - y.mean()))


METRICS: dict[str, Measure] = {
    "AP": lambda p, y, _: average_precision(p, y),
    "AP_normalised": lambda p, y, _: normalised_average_precision(p, y),
    "AUC": lambda p, y, _: roc_auc(p, y),
    "F1@0.5": lambda p, y, _: f1_at(p, y, 0.5),
    "F1@tuned": lambda p, y, threshold: None if threshold is None else f1_at(p, y, threshold),
    "ECE": lambda p, y, _: expected_calibration_error(p, y),
    "ECE_challenge_inferred": lambda p, y, _: challenge_ece(p, y),
    "Brier": lambda p, y, _: brier(p, y),
}
"""Name in metrics.json -> function of (probabilities (N,), labels (N,), threshold of the finding or None)."""

MACRO_NAMES = {"ECE": "mECE_standard"}


def macro_name(metric: str) -> str:
    """How the macro mean of a metric is called: AP -> mAP, ECE -> mECE_standard."""
    return MACRO_NAMES.get(metric, f"m{metric}")
