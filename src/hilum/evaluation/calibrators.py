"""Maps from one finding's probability to a calibrated one: how each is fitted, and how it is applied.

Every map is strictly increasing, so AP and AUC stay as they are. Parameters are plain JSON values. Which map a finding
gets, and on what data, is decided in `calibration.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit, log1p, logit

Parameters = dict[str, Any]
IDENTITY: Parameters = {"slope": 1.0, "intercept": 0.0}
CERTAINTY = 0.01
"""A logistic map leaves at least this share of a score's distance to 1, where float64 would otherwise round to 1."""
RAW_SHARE = 1e-3
"""Share of the raw score in an isotonic map, whose plateaus would otherwise tie scores and change AP."""
FLOOR = 1e-9
"""Probabilities are held this far from 0 and 1 while fitting (never while applying)."""
SHRINKAGE = {"platt": 0.1, "temperature_bias": 20.0, "pooled": 1.0}
"""Precision of the Gaussian prior on (log slope, intercept): about as many positives as it weighs."""


class Kind(NamedTuple):
    """A calibrator: `fit(probabilities, labels, prior) -> parameters` and `apply(parameters, probabilities)`."""

    fit: Callable[[Float[np.ndarray, " N"], Bool[np.ndarray, " N"], Parameters], Parameters]
    apply: Callable[[Parameters, Float[np.ndarray, " N"]], Float[np.ndarray, " N"]]


def fit_logistic(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], prior: Parameters, shrinkage: float
) -> Parameters:
    """Slope and intercept on the log-odds by maximum a posteriori; the slope is exp of a free number, so positive.

    Platt, "Probabilistic outputs for support vector machines" (1999), with a Gaussian prior on (log slope, intercept)
    around `prior`, which takes over as positives become few.
    """
    x, y = logit(np.clip(probabilities, FLOOR, 1 - FLOOR)), labels.astype(np.float64)
    centre = np.array([np.log(prior["slope"]), prior["intercept"]])

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(point[0])
        z = slope * x + point[1]
        residual = expit(z) - y
        loss = (np.maximum(z, 0) - z * y + log1p(np.exp(-np.abs(z)))).sum()
        pull = point - centre
        gradient = np.array([slope * (residual * x).sum(), residual.sum()]) + shrinkage * pull
        return float(loss + 0.5 * shrinkage * (pull**2).sum()), gradient

    bounds = [(centre[0] - 5, centre[0] + 5), (centre[1] - 30, centre[1] + 30)]
    found = minimize(objective, centre, jac=True, method="L-BFGS-B", bounds=bounds).x
    return {"slope": float(np.exp(found[0])), "intercept": float(found[1])}


def apply_logistic(parameters: Parameters, probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """expit(slope * logit(p) + intercept), never rounded to certainty; 0 stays 0 and 1 stays 1."""
    if parameters["slope"] == 1.0 and parameters["intercept"] == 0.0:
        return probabilities.copy()
    mapped = expit(parameters["slope"] * logit(probabilities) + parameters["intercept"])
    return np.minimum(mapped, 1 - CERTAINTY * (1 - probabilities))  # the lower of two increasing maps increases


def fit_isotonic(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], prior: Parameters
) -> Parameters:
    """Non-decreasing least squares (pool adjacent violators), kept as its corners; the prior is not used."""
    del prior
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0).fit(probabilities, labels.astype(np.float64))
    return {"x": model.X_thresholds_.tolist(), "y": model.y_thresholds_.tolist()}


def apply_isotonic(parameters: Parameters, probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Linear between the corners, blended with a small share of p so that no two scores become one."""
    steps = np.interp(probabilities, parameters["x"], parameters["y"])
    return (1 - RAW_SHARE) * steps + RAW_SHARE * probabilities


def _fit_platt(probabilities: np.ndarray, labels: np.ndarray, prior: Parameters) -> Parameters:
    return fit_logistic(probabilities, labels, prior, SHRINKAGE["platt"])


def _fit_temperature_bias(probabilities: np.ndarray, labels: np.ndarray, prior: Parameters) -> Parameters:
    return fit_logistic(probabilities, labels, prior, SHRINKAGE["temperature_bias"])


CALIBRATORS: dict[str, Kind] = {
    "platt": Kind(_fit_platt, apply_logistic),
    "temperature_bias": Kind(_fit_temperature_bias, apply_logistic),
    "isotonic": Kind(fit_isotonic, apply_isotonic),
}
"""platt: slope and intercept, lightly held. temperature_bias: the same two, held to the group's. isotonic: steps."""


def fit_pooled(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Parameters:
    """One slope and intercept for several findings together (a head / medium / tail group), held to the identity."""
    probabilities = np.concatenate([p for p, _ in parts]) if parts else np.zeros(0)
    labels = np.concatenate([y for _, y in parts]) if parts else np.zeros(0, bool)
    if not labels.any() or labels.all():
        return dict(IDENTITY)
    return fit_logistic(probabilities, labels, IDENTITY, SHRINKAGE["pooled"])
