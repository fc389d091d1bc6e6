"""Labels as values and weights, in arrays of all images: what is known, and what a teacher says of the rest."""

import numpy as np
from jaxtyping import Float, Float32, Int

from hilum.core.errors import ConfigError, PredictionError
from hilum.core.types import POSITIVE, UNCERTAIN, UNKNOWN


def known_values(labels: Int[np.ndarray, "N C"]) -> tuple[Float32[np.ndarray, "N C"], Float32[np.ndarray, "N C"]]:
    """Values (1 positive, else 0) and weights (1 known, else 0); what `losses.known_targets` makes of a batch."""
    return (labels == POSITIVE).astype(np.float32), (labels >= 0).astype(np.float32)


def pseudo_targets(
    labels: Int[np.ndarray, "N C"],
    probabilities: Float[np.ndarray, "N C"],
    *,
    weight: float = 0.5,
    low: float = 0.5,
    high: float = 0.5,
    hard: bool = False,
    uncertain: bool = False,
) -> tuple[Float32[np.ndarray, "N C"], Float32[np.ndarray, "N C"]]:
    """Values and weights in which a teacher's probabilities stand for unknown labels (as in dongkyunk/CheXFusion).

    A known label is never overruled: it keeps its value and weight 1, whatever the teacher says. The inputs are left as
    they are.

    Args:
        labels: codes 1, 0, -1 unknown, -2 uncertain.
        probabilities: the teacher's, in [0, 1]; NaN where it cannot say, which fills nothing. It must not have been
            trained on images that judge the student.
        weight: of a filled entry, in [0, 1].
        low: probabilities up to this fill an entry.
        high: probabilities from this on fill an entry; those between `low` and `high` leave it unknown.
        hard: fill with 1 from `high` on and else with 0, instead of with the probability itself.
        uncertain: fill entries that the source calls uncertain as well.

    Returns:
        values in [0, 1], 0 where the weight is 0; weights, 0 where nothing is known or said.

    Raises:
        ConfigError: a weight outside [0, 1], or not 0 <= low <= high <= 1.
        PredictionError: probabilities of other images or findings, or outside [0, 1].
    """
    if not 0 <= weight <= 1 or not 0 <= low <= high <= 1:
        raise ConfigError(
            f"Pseudo-labels: expected a weight in [0, 1] and 0 <= low <= high <= 1, found weight {weight}, low {low}, "
            f"high {high}."
        )
    if probabilities.shape != labels.shape:
        raise PredictionError(
            f"Pseudo-labels: {labels.shape[0]} images x {labels.shape[1]} findings have labels, the teacher's "
            f"probabilities are {' x '.join(map(str, probabilities.shape))}. Predict the same images and findings."
        )
    if (outside := (probabilities < 0) | (probabilities > 1)).any():
        row, column = np.argwhere(outside)[0]
        raise PredictionError(
            f"Pseudo-labels: expected probabilities, found {probabilities[row, column]} for image {row}, finding "
            f"{column}; are these logits?"
        )
    values, weights = known_values(labels)
    sure = (probabilities <= low) | (probabilities >= high)  # false for NaN
    filled = sure & ((labels == UNKNOWN) | (uncertain & (labels == UNCERTAIN)))
    said = (probabilities >= high if hard else probabilities).astype(np.float32)
    return np.where(filled, said, values), np.where(filled, np.float32(weight), weights)
