"""Operating points per finding: above which probability an item is called positive, strictly (p > threshold).

Fitted on validation only, by `calibration.py`; `metrics.py` takes what was fixed here and never looks for a threshold.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, logit

from hilum.core.errors import ConfigError, UnknownNameError

Search = Callable[[np.ndarray, np.ndarray], float]

ENOUGH = 50
"""Below this many deciding items (positives; negatives for a specificity) a threshold is drawn to its group's."""


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


def sensitivity_at_specificity(
    p: Float[np.ndarray, " N"], y: Bool[np.ndarray, " N"], specificity: float = 0.95
) -> float:
    """The lowest threshold that keeps the specificity, share of negatives not called, at this or more."""
    thresholds, _, false_positives = _cuts(p, y)
    allowed = false_positives <= (1 - specificity) * (~y).sum() + 1e-9
    return float(thresholds[np.flatnonzero(allowed)[-1]])


def specificity_at_sensitivity(
    p: Float[np.ndarray, " N"], y: Bool[np.ndarray, " N"], sensitivity: float = 0.95
) -> float:
    """The highest threshold that keeps the sensitivity, share of positives called, at this or more.

    Nothing is called at a score of 0, so a positive there can keep a sensitivity out of reach: the lowest threshold.
    """
    thresholds, true_positives, _ = _cuts(p, y)
    reached = np.flatnonzero(true_positives >= sensitivity * y.sum() - 1e-9)
    return float(thresholds[reached[0] if len(reached) else -1])


OPERATING_POINTS: dict[str, Search] = {
    "f1": best_f1,
    "youden": youden,
    "sens_at_spec95": sensitivity_at_specificity,
    "spec_at_sens95": specificity_at_sensitivity,
}
"""The usual ones; `operating_point` also knows any other `sens_at_specNN` and `spec_at_sensNN`."""
DEFAULT_POINTS: tuple[str, ...] = tuple(OPERATING_POINTS)
_FIXED = re.compile(r"(sens_at_spec|spec_at_sens)(\d{1,2}(?:\.\d+)?)")


def point_name(kind: str, share: float) -> str:
    """The name of a fixed operating point: ("spec_at_sens", 0.9) -> "spec_at_sens90".

    Raises:
        ConfigError: not a share strictly between 0 and 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"A fixed sensitivity or specificity is between 0 and 1, such as 0.9; found {share!r}.")
    return f"{kind}{round(100 * share, 6):.6g}"


def operating_point(name: str) -> Search:
    """How the threshold of a named operating point is found.

    Raises:
        UnknownNameError: no such operating point.
    """
    if name in OPERATING_POINTS:
        return OPERATING_POINTS[name]
    match = _FIXED.fullmatch(name)
    share = float(match[2]) / 100 if match else 0.0
    if match is None or share == 0:
        raise UnknownNameError("operating point", name, [*OPERATING_POINTS, "sens_at_spec90", "spec_at_sens90"])
    find = sensitivity_at_specificity if match[1] == "sens_at_spec" else specificity_at_sensitivity
    return lambda p, y: find(p, y, share)


def asked_of(point: str) -> tuple[str, float]:
    """What an operating point of the names `spec_at_sensNN` and `sens_at_specNN` promises."""
    kind = "sensitivity" if point.startswith("spec_at_sens") else "specificity"
    return kind, float(point.rpartition("sens" if kind == "sensitivity" else "spec")[2]) / 100


def point_words(point: str) -> str:
    """An operating point in words."""
    if point in ("f1", "youden"):
        return {"f1": "best F1", "youden": "best sensitivity + specificity (Youden)"}[point]
    kind, share = asked_of(point)
    return f"{kind} {share:g}"


def fit_thresholds(
    p: Float[np.ndarray, " N"],
    y: Bool[np.ndarray, " N"],
    group: dict[str, float] | None,
    points: Sequence[str] = DEFAULT_POINTS,
) -> dict[str, float]:
    """Every operating point of one finding.

    Args:
        p: probabilities of the items with a known label.
        y: True where positive.
        group: the thresholds of the pooled group, towards which few positives are drawn (on the log-odds, by n / 50);
            None for the group itself.
        points: names for `operating_point`.
    """
    if len(p) == 0:
        return dict(group) if group else dict.fromkeys(points, 0.5)
    found = {}
    for name in points:
        deciding = int((~y).sum() if name.startswith("sens_at_spec") else y.sum())
        own = operating_point(name)(p, y) if deciding else (group or {}).get(name, 0.5)
        if group is not None and deciding < ENOUGH:
            share = deciding / ENOUGH
            ends = logit(np.clip([own, group[name]], 1e-12, 1 - 1e-12))
            own = float(expit(share * ends[0] + (1 - share) * ends[1]))
        found[name] = own
    return found
