"""Operating points per finding: above which probability an item is called positive, strictly (p > threshold).

Fitted on validation only, by `calibration.py`; `metrics.py` takes what was fixed here and never looks for a threshold.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, logit

ENOUGH = 50
"""Below this many deciding items (positives; negatives for a specificity) a threshold is drawn to its group's."""
SPECIFICITY = 0.95


def _cuts(p: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every way to cut the items: threshold, true positives above it, false positives above it; highest first."""
    values, place = np.unique(p, return_inverse=True)
    positives = np.bincount(place, weights=y, minlength=len(values))[::-1]
    totals = np.bincount(place, minlength=len(values))[::-1]
    upper = values[::-1]
    lower = np.append(upper[1:], 0.0)
    # halfway to the next lower score, so that a rounding of the score does not change the decision
    halfway = lower + (upper - lower) / 2
    thresholds = np.append(upper[0], np.where(halfway < upper, halfway, lower))
    true_positives = np.append(0.0, np.cumsum(positives))
    false_positives = np.append(0.0, np.cumsum(totals - positives))
    keep = np.append(True, upper > 0)  # nothing is below 0, so a score of 0 is never called positive
    return thresholds[keep], true_positives[keep], false_positives[keep]


def best_f1(p: Float[np.ndarray, " N"], y: Bool[np.ndarray, " N"]) -> float:
    """The threshold of the largest F1; the highest of equals."""
    thresholds, true_positives, false_positives = _cuts(p, y)
    f1 = 2 * true_positives / np.maximum(true_positives + false_positives + y.sum(), 1)
    return float(thresholds[f1.argmax()])


def youden(p: Float[np.ndarray, " N"], y: Bool[np.ndarray, " N"]) -> float:
    """The threshold of the largest sensitivity + specificity; the highest of equals."""
    thresholds, true_positives, false_positives = _cuts(p, y)
    gain = true_positives / max(y.sum(), 1) - false_positives / max((~y).sum(), 1)
    return float(thresholds[gain.argmax()])


def sensitivity_at_specificity(p: Float[np.ndarray, " N"], y: Bool[np.ndarray, " N"]) -> float:
    """The lowest threshold that keeps the specificity at 95 % or more."""
    thresholds, _, false_positives = _cuts(p, y)
    allowed = false_positives <= (1 - SPECIFICITY) * (~y).sum() + 1e-9
    return float(thresholds[np.flatnonzero(allowed)[-1]])


OPERATING_POINTS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "f1": best_f1,
    "youden": youden,
    "sens_at_spec95": sensitivity_at_specificity,
}


def fit_thresholds(
    p: Float[np.ndarray, " N"], y: Bool[np.ndarray, " N"], group: dict[str, float] | None
) -> dict[str, float]:
    """Every operating point of one finding.

    Args:
        p: probabilities of the items with a known label.
        y: True where positive.
        group: the thresholds of the pooled group, towards which few positives are drawn (on the log-odds, by n / 50);
            None for the group itself.
    """
    if len(p) == 0:
        return dict(group) if group else dict.fromkeys(OPERATING_POINTS, 0.5)
    found = {}
    for name, search in OPERATING_POINTS.items():
        deciding = int((~y).sum() if name == "sens_at_spec95" else y.sum())
        own = search(p, y) if deciding else (group or {}).get(name, 0.5)
        if group is not None and deciding < ENOUGH:
            share = deciding / ENOUGH
            ends = logit(np.clip([own, group[name]], 1e-12, 1 - 1e-12))
            own = float(expit(share * ends[0] + (1 - share) * ends[1]))
        found[name] = own
    return found
