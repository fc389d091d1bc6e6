"""Scores for leaderboards that call an item positive above a fixed 0.5. Apart from calibration: no probabilities.

The F1-optimal cut of each finding, from validation, moves to 0.5 by a strictly increasing map, so AP and AUC stay as
they are. Compression toward 0.5 changes no decision and no order, and a calibration error that is taken of the scores.
Where the cuts come from is `commands/submit.py`'s business.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, logit

from hilum.core.errors import ConfigError, PredictionError

SCALES = ("f1",)
"""f1: the cut with the largest F1 moves to 0.5."""
SCALED = "scaled"
"""The stage of a submission with scaled scores. No stage of prediction files: nothing reads such a file as one."""
ABOVE_HALF = float(np.nextafter(0.5, 1.0))


def move_cut_to_half(
    probabilities: Float[np.ndarray, " N"], threshold: float, compress: float = 1.0
) -> Float[np.ndarray, " N"]:
    """A strictly increasing map with p > 0.5 after exactly where p > threshold before.

    Linear from 0 to the cut and from the cut to 1; then log-odds times `compress`. Where float64 has no room (scores
    closer than its spacing), the next number that float64 has keeps the order: equal scores stay equal, different ones
    different.

    Args:
        probabilities: of one finding.
        threshold: its cut, inside (0, 1).
        compress: in (0, 1]; below 1 the scores move toward 0.5.

    Raises:
        PredictionError: the threshold is not inside (0, 1), or there is no room even so.
        ConfigError: compress is not in (0, 1].
    """
    check_compression(compress)
    if not 0 < threshold < 1:
        raise PredictionError(f"A cut can be moved to 0.5 only from inside (0, 1); found {threshold!r}.")
    values, place = np.unique(np.asarray(probabilities, np.float64), return_inverse=True)
    above = values > threshold
    with np.errstate(over="ignore"):  # of the side that is not taken
        scaled = np.where(above, 0.5 + 0.5 * (values - threshold) / (1 - threshold), 0.5 * (values / threshold))
    if compress < 1:
        scaled = expit(compress * logit(np.clip(scaled, 0.0, 1.0)))
    moved = _in_order(scaled, above)
    if not (np.diff(moved) > 0).all() or not ((moved > 0.5) == above).all():
        raise PredictionError("These scores are too close together to be scaled without ties. Submit them unscaled.")
    return moved[place]


def check_compression(compress: float) -> None:
    """Raise ConfigError unless in (0, 1]."""
    if not 0 < compress <= 1:
        raise ConfigError(f"--compress is a factor of log-odds above 0 and at most 1; found {compress!r}.")


def _in_order(scaled: Float[np.ndarray, " N"], above: Bool[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Distinct ascending numbers: those not above the cut in [0, 0.5], those above it in (0.5, 1]."""
    low, high = scaled[~above], scaled[above]
    return np.append(_descend(_ascend(low, 0.0), 0.5), _descend(_ascend(high, ABOVE_HALF), 1.0))


def _ascend(values: np.ndarray, start: float) -> np.ndarray:
    """Raise each value just above the one before it, the first to `start` at least."""
    if len(values) == 0 or (values[0] >= start and (np.diff(values) > 0).all()):
        return values
    result = values.copy()
    result[0] = max(result[0], start)
    for index in range(1, len(result)):
        result[index] = max(result[index], np.nextafter(result[index - 1], 2.0))
    return result


def _descend(values: np.ndarray, end: float) -> np.ndarray:
    """Lower each value just below the one after it, the last to `end` at most."""
    return -_ascend(-values[::-1], -end)[::-1]
