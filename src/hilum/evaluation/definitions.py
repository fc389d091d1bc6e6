"""What each metric of one finding is: exact functions of probabilities and labels, and the list of those reported.

Every function leaves out items whose label is neither 0 nor 1, and returns None where the metric is undefined. Means
over findings are in `metrics.py`, intervals in `bootstrap.py`; docs/how-to/add-a-metric.md says how to add one.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError

BINS = 15
"""Calibration bins: of equal width over [0, 1], or of equal mass."""
EPSILON = float(np.finfo(np.float64).eps)
"""How near to 0 and 1 a probability is taken where a logarithm is: as in scikit-learn's log_loss."""

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


def mean_average_precision(
    probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N C"], columns: Int[np.ndarray, " K"]
) -> float:
    """Mean over some findings of their average precision, as a search judges heads by it; NaN where none is defined."""
    values = [average_precision(probabilities[:, column], labels[:, column]) for column in columns]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else float("nan")


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


def f1_of_present(
    probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], threshold: float
) -> float | None:
    """`f1_at`, and None without positives: nothing can be found there, and an empty class is undefined, never 0."""
    return f1_at(probabilities, labels, threshold) if (labels == 1).any() else None


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


def mass_bin_of(probabilities: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Equal-mass bin: floor(15 x share of items strictly below); tied items share a bin, so row order never matters.

    With distinct probabilities these are quantile bins; with many ties some bins are larger and others empty.
    """
    below = np.searchsorted(np.sort(probabilities), probabilities, side="left")
    return np.asarray(below * BINS // max(len(probabilities), 1), np.int64)


def equal_mass_ece(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """sum_b (n_b / n) |mean p in b - share of positives in b| over 15 bins of equal mass (`mass_bin_of`)."""
    p, y = known(probabilities, labels)
    if len(p) == 0:
        return None
    return float(np.abs(np.bincount(mass_bin_of(p), weights=p - y, minlength=BINS)).sum() / len(p))


def log_loss(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """Mean of -log of the probability given to what was true, in nats; p held to [eps, 1 - eps], eps = 2.2e-16."""
    p, y = known(probabilities, labels)
    return float(surprise(p, y).mean()) if len(p) else None


def surprise(p: Float[np.ndarray, " N"], y: np.ndarray) -> Float[np.ndarray, " N"]:
    """-log of the probability given to what was true, for each item; see `log_loss`."""
    return -np.log(np.clip(np.where(y, p, 1 - p), EPSILON, 1 - EPSILON))


def ap_lift(scores: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float | None:
    """AP / prevalence: 1 for a random ranking; what a ranking gains, comparable between rare findings."""
    precision, (_, y) = average_precision(scores, labels), known(scores, labels)
    return None if precision is None else float(precision / y.mean())


def miss_rate(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], threshold: float) -> float | None:
    """False-negative rate, FN / (FN + TP) = 1 - sensitivity, at p > threshold; None without positives."""
    p, y = known(probabilities, labels)
    return float((p[y] <= threshold).mean()) if y.any() else None


def false_alarm_rate(
    probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], threshold: float
) -> float | None:
    """False-positive rate, FP / (FP + TN) = 1 - specificity, at p > threshold; None without negatives.

    Of the finding "Normal" it is the share of ill people who are called healthy: under-diagnosis (Seyyed-Kalantari et
    al., Nature Medicine 2021).
    """
    p, y = known(probabilities, labels)
    return None if y.all() else float((p[~y] > threshold).mean())


def calibration_line(
    probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]
) -> tuple[float | None, float | None]:
    """Calibration slope and intercept: b of logit P(y) = a + b logit(p), and a of logit P(y) = a + logit(p).

    A slope below 1: the probabilities are too extreme. An intercept below 0: they are too high ("in the large"). Cox
    1958; Van Calster et al., BMC Medicine 2019. Newton's method; p held to [1e-6, 1 - 1e-6] so that one item at 0 or 1
    cannot carry the line.

    Returns:
        (slope, intercept); None where undefined: without both classes, and a slope where all p are equal or where the
        classes are separated (then the slope has no maximum).
    """
    p, y = known(probabilities, labels)
    if not y.any() or y.all():
        return None, None
    clipped = np.clip(p, 1e-6, 1 - 1e-6)
    logits = np.log(clipped) - np.log1p(-clipped)
    ones = np.ones_like(logits)
    intercept = _newton(ones[:, None], logits, y)
    positives, negatives = logits[y], logits[~y]
    separated = positives.min() >= negatives.max() or positives.max() <= negatives.min()
    line = None if separated else _newton(np.stack([ones, logits], axis=1), 0 * logits, y)
    return None if line is None else float(line[1]), None if intercept is None else float(intercept[0])


def _newton(design: np.ndarray, offset: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Coefficients of the logistic regression of y on the columns of `design`; None where it does not converge."""
    found = np.zeros(design.shape[1])
    loss = np.inf
    step = np.zeros_like(found)
    for _ in range(200):
        score = offset + design @ found
        new = float(np.logaddexp(0.0, np.where(y, -score, score)).sum())
        if new > loss + 1e-9 * abs(loss):  # too far: half of the step
            step /= 2
            found = found - step
            continue
        loss = new
        mean = 0.5 * (1 + np.tanh(score / 2))
        slope = design.T @ (y - mean)
        curvature = (design * (mean * (1 - mean))[:, None]).T @ design
        if np.linalg.matrix_rank(curvature) < len(found):
            return None
        step = np.linalg.solve(curvature, slope)
        if np.abs(step).max() < 1e-10 * (1 + np.abs(found).max()):
            return found
        found = found + step
    return None


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
    "F1@0.5": lambda p, y, _: f1_of_present(p, y, 0.5),
    "F1@tuned": lambda p, y, threshold: None if threshold is None else f1_of_present(p, y, threshold),
    "ECE": lambda p, y, _: expected_calibration_error(p, y),
    "ECE_challenge_inferred": lambda p, y, _: challenge_ece(p, y),
    "Brier": lambda p, y, _: brier(p, y),
    "LogLoss": lambda p, y, _: log_loss(p, y),
    "FNR@tuned": lambda p, y, threshold: None if threshold is None else miss_rate(p, y, threshold),
    "FPR@tuned": lambda p, y, threshold: None if threshold is None else false_alarm_rate(p, y, threshold),
}
"""Name in metrics.json -> function of (probabilities (N,), labels (N,), threshold of the finding or None)."""

POINT_METRICS: dict[str, Measure] = {
    "AP_lift": lambda p, y, _: ap_lift(p, y),
    "ECE_equal_mass": lambda p, y, _: equal_mass_ece(p, y),
}
"""The same, of those that are given without an interval."""

SHARES = ("AP", "AUC", "F1@0.5", "F1@tuned", "ECE", "ECE_challenge_inferred", "Brier", "FNR@tuned", "FPR@tuned")
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(SHARES, (0.0, 1.0)),
    "AP_normalised": (-math.inf, 1.0),
    "LogLoss": (0.0, math.inf),
}
"""Least and largest value of a metric, at which its intervals end; of one that is not here they end nowhere."""


def range_of(metric: str) -> tuple[float, float]:
    """Least and largest value that a metric can have, as far as `RANGES` says."""
    return RANGES.get(metric, (-math.inf, math.inf))


MACRO_NAMES = {"ECE": "mECE_standard"}


def macro_name(metric: str) -> str:
    """How the macro mean of a metric is called: AP -> mAP, ECE -> mECE_standard."""
    return MACRO_NAMES.get(metric, f"m{metric}")
