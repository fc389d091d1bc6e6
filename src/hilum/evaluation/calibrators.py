"""Maps from one finding's probability to a calibrated one: how each is fitted, and how it is applied.

Every map is strictly increasing and looks at one score alone, so AP and AUC stay as they are and no item changes
another. Parameters are plain JSON values. Which map a finding gets, and on what data, is decided in `map_choice.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, log1p, logit

Parameters = dict[str, Any]
IDENTITY: Parameters = {"slope": 1.0, "intercept": 0.0}
CERTAINTY = 0.01
"""A smooth map leaves at least this share of a score's distance to 1, where float64 would otherwise round to 1."""
CLOSE_TO_ONE, NEXT_TO_ONE = 1e-6, 1e-12
"""Nearer to 1 than the first it leaves a growing share, below the second all: float64 has no room for a hundredth."""
FAINT = 1e-30
"""A smooth map leaves at least this share of a score, where float64 would otherwise round to 0."""
RAW_SHARE = 1e-3
"""Share of the raw score in an isotonic map, whose plateaus would otherwise tie scores and change AP."""
EXTREME_SHARE, EXTREME_SLOPE = 1e-6, 0.01
"""Share in an isotonic map of expit(0.01 logit p), which tells 1e-30 from 1e-20 where p is lost beside a step."""
FLOOR = 1e-9
"""Probabilities are held this far from 0 and 1 while fitting (never while applying)."""
SHRINKAGE = {"platt": 0.1, "temperature": 20.0, "temperature_bias": 20.0, "beta": 20.0, "pooled": 1.0}
"""Precision of the Gaussian prior on (log slopes, intercept): about as many positives as it weighs."""
STEPS_FROM = 1000
"""Items of the rarer class from which isotonic steps stand alone; with fewer, n / 1000 of them and the rest the group's
logistic map."""


def fit_logistic(
    probabilities: Float[np.ndarray, " N"],
    labels: Bool[np.ndarray, " N"],
    prior: Parameters,
    shrinkage: float | tuple[float, float],
) -> Parameters:
    """Slope and intercept on the log-odds by maximum a posteriori; the slope is exp of a free number, so positive.

    A pair for `shrinkage` holds slope and intercept differently.

    Platt, "Probabilistic outputs for support vector machines" (1999), with a Gaussian prior on (log slope, intercept)
    around `prior`, which takes over as positives become few.
    """
    x = logit(np.clip(probabilities, FLOOR, 1 - FLOOR))
    slope, intercept = _most_likely([x], labels, [prior["slope"]], prior["intercept"], shrinkage)
    return {"slope": slope, "intercept": intercept}


def fit_temperature(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], prior: Parameters, shrinkage: float
) -> Parameters:
    """A slope on the log-odds alone (the inverse of a temperature; Guo et al. 2017, arXiv:1706.04599); 0.5 stays."""
    x = logit(np.clip(probabilities, FLOOR, 1 - FLOOR))
    (slope,) = _most_likely([x], labels, [prior["slope"]], None, shrinkage)
    return {"slope": slope, "intercept": 0.0}


def fit_beta(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], prior: Parameters, shrinkage: float
) -> Parameters:
    """Beta calibration: logit q = a ln p - b ln(1 - p) + c (Kull, Silva Filho, Flach, AISTATS 2017, eq. 9).

    The paper sets a negative a or b to zero and fits the other again; here both are exp of a free number, so that the
    map is strictly increasing, with the prior of `fit_logistic` (a = b = slope is the logistic map).
    """
    p = np.clip(probabilities, FLOOR, 1 - FLOOR)
    a, b, c = _most_likely([np.log(p), -log1p(-p)], labels, [prior["a"], prior["b"]], prior["c"], shrinkage)
    return {"a": a, "b": b, "c": c}


def _most_likely(
    columns: Sequence[Float[np.ndarray, " N"]],
    labels: Bool[np.ndarray, " N"],
    slopes: Sequence[float],
    intercept: float | None,
    shrinkage: float | tuple[float, ...],
) -> list[float]:
    """Positive slopes of the columns, and an intercept unless None, of the logistic model with the largest posterior.

    Args:
        columns: what the log-odds are a sum of.
        labels: True where positive.
        slopes: centre of the prior, one per column.
        intercept: centre of the prior; None: no intercept.
        shrinkage: precision of the prior on (log slopes, intercept), of all or of each.
    """
    y, count = labels.astype(np.float64), len(columns)
    centre = np.array([*np.log(slopes), *([] if intercept is None else [intercept])])
    precision = np.broadcast_to(np.asarray(shrinkage, np.float64), centre.shape)

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        scales = np.exp(point[:count])
        z = scales[0] * columns[0]
        for scale, x in zip(scales[1:], columns[1:], strict=True):
            z = z + scale * x
        z = z if intercept is None else z + point[count]
        residual = expit(z) - y
        loss = (np.maximum(z, 0) - z * y + log1p(np.exp(-np.abs(z)))).sum()
        pull = point - centre
        slope_gradient = [scale * (residual * x).sum() for scale, x in zip(scales, columns, strict=True)]
        gradient = np.array(slope_gradient + ([] if intercept is None else [residual.sum()])) + precision * pull
        penalty = shrinkage * (pull**2).sum() if isinstance(shrinkage, float) else (precision * pull**2).sum()
        return float(loss + 0.5 * penalty), gradient

    reach = np.array([5.0] * count + ([] if intercept is None else [30.0]))
    bounds = list(zip(centre - reach, centre + reach, strict=True))
    from scipy.optimize import minimize  # half a second that predicting need not wait for

    found = minimize(objective, centre, jac=True, method="L-BFGS-B", bounds=bounds).x
    return [*np.exp(found[:count]).tolist(), *found[count:].tolist()]


def _never_certain(mapped: Float[np.ndarray, " N"], probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Keep a map off 0 and 1 except at 0 and 1: of two increasing maps the lower, and the higher, increases."""
    distance = 1 - probabilities
    power = np.log(CERTAINTY * CLOSE_TO_ONE / NEXT_TO_ONE) / np.log(CLOSE_TO_ONE / NEXT_TO_ONE)
    between = NEXT_TO_ONE * np.maximum(distance / NEXT_TO_ONE, 1.0) ** power
    left = np.where(distance >= CLOSE_TO_ONE, CERTAINTY * distance, np.minimum(distance, between))
    return np.maximum(np.minimum(mapped, 1 - left), FAINT * probabilities)


def apply_logistic(parameters: Parameters, probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """expit(slope * logit(p) + intercept), never rounded to certainty; 0 stays 0 and 1 stays 1."""
    if parameters["slope"] == 1.0 and parameters["intercept"] == 0.0:
        return probabilities.copy()
    mapped = expit(parameters["slope"] * logit(probabilities) + parameters["intercept"])
    return _never_certain(mapped, probabilities)


def apply_beta(parameters: Parameters, probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """expit(a ln p - b ln(1 - p) + c), never rounded to certainty; 0 stays 0 and 1 stays 1."""
    with np.errstate(divide="ignore"):
        odds = parameters["a"] * np.log(probabilities) - parameters["b"] * np.log1p(-probabilities)
    return _never_certain(expit(odds + parameters["c"]), probabilities)


def fit_isotonic(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], prior: Parameters
) -> Parameters:
    """Non-decreasing least squares (pool adjacent violators), kept as its corners.

    With fewer than STEPS_FROM of the rarer class, mixed with the logistic map `prior`: `share` is that of the steps.
    """
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0).fit(probabilities, labels.astype(np.float64))
    rarer = min(int(labels.sum()), int((~labels).sum()))
    corners = {"x": model.X_thresholds_.tolist(), "y": model.y_thresholds_.tolist(), "extremes": EXTREME_SHARE}
    return {**corners, "share": min(1.0, rarer / STEPS_FROM), **prior}


def apply_isotonic(parameters: Parameters, probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Linear between the corners, mixed with its prior, and with a small share of p so that no two scores become one.

    Calibrators written before `share` and `extremes` existed have neither, and map as they did.
    """
    steps = np.interp(probabilities, parameters["x"], parameters["y"])
    share, extremes = parameters.get("share", 1.0), parameters.get("extremes", 0.0)
    if share < 1:
        steps = share * steps + (1 - share) * apply_logistic(parameters, probabilities)
    if extremes:
        steps = (1 - extremes) * steps + extremes * expit(EXTREME_SLOPE * logit(probabilities))
    return (1 - RAW_SHARE) * steps + RAW_SHARE * probabilities


def fit_pooled(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Parameters:
    """One slope and intercept for several findings together (a head / medium / tail group), held to the identity."""
    p, y = _together(parts)
    return fit_logistic(p, y, IDENTITY, SHRINKAGE["pooled"]) if _both(y) else dict(IDENTITY)


def _pooled_temperature(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Parameters:
    p, y = _together(parts)
    return fit_temperature(p, y, IDENTITY, SHRINKAGE["pooled"]) if _both(y) else dict(IDENTITY)


def _pooled_beta(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Parameters:
    (p, y), straight = _together(parts), {"a": 1.0, "b": 1.0, "c": 0.0}
    return fit_beta(p, y, straight, SHRINKAGE["pooled"]) if _both(y) else straight


def _together(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    probabilities = np.concatenate([p for p, _ in parts]) if parts else np.zeros(0)
    return probabilities, np.concatenate([y for _, y in parts]) if parts else np.zeros(0, bool)


def _both(labels: np.ndarray) -> bool:
    return bool(labels.any() and not labels.all())


class Kind(NamedTuple):
    """A calibrator: how it is fitted and applied, and how findings share one.

    `fit(probabilities, labels, prior) -> parameters`, `apply(parameters, probabilities)`, `pool(parts) -> prior`: the
    parameters of a whole group. `shared`: the kind by which a group's parameters are applied as they are.
    """

    fit: Callable[[Float[np.ndarray, " N"], Bool[np.ndarray, " N"], Parameters], Parameters]
    apply: Callable[[Parameters, Float[np.ndarray, " N"]], Float[np.ndarray, " N"]]
    pool: Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], Parameters]
    shared: str


CALIBRATORS: dict[str, Kind] = {
    "identity": Kind(lambda p, y, prior: {}, lambda parameters, p: p.copy(), lambda parts: {}, "identity"),
    "temperature": Kind(
        lambda p, y, prior: fit_temperature(p, y, prior, SHRINKAGE["temperature"]),
        apply_logistic, _pooled_temperature, "temperature",
    ),
    "temperature_bias": Kind(
        lambda p, y, prior: fit_logistic(p, y, prior, SHRINKAGE["temperature_bias"]),
        apply_logistic, fit_pooled, "temperature_bias",
    ),
    "platt": Kind(
        lambda p, y, prior: fit_logistic(p, y, prior, SHRINKAGE["platt"]),
        apply_logistic, fit_pooled, "temperature_bias",
    ),
    "beta": Kind(lambda p, y, prior: fit_beta(p, y, prior, SHRINKAGE["beta"]), apply_beta, _pooled_beta, "beta"),
    "isotonic": Kind(fit_isotonic, apply_isotonic, fit_pooled, "temperature_bias"),
}  # fmt: skip
"""From the simplest. identity: none. temperature: a slope. temperature_bias: slope and intercept, held to the group's.
platt: the same, lightly held. beta: two slopes and an intercept. isotonic: steps."""
