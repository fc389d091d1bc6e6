"""What a score meant on validation: of the items that scored like this, so many were positive.

Made from out-of-sample validation predictions at the stage and unit of the scores that will be asked about. No model of
the score enters, so the interval judges the calibrator too. Says nothing of items unlike those of validation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError
from hilum.core.intervals import wilson_interval
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.evaluation.predictions import Predictions

FEWEST = 20
"""Items to look at, at least; a finding with fewer known labels has no band."""


class Band(NamedTuple):
    """The items of validation that are nearest to a score.

    Args:
        low, high: 95 % interval of the share of positives among them (Wilson 1927), in [0, 1].
        positives, items: how many are positive, of how many.
    """

    low: float
    high: float
    positives: int
    items: int


class Scored(NamedTuple):
    """The validation of one finding.

    Args:
        scores: distinct scores, ascending.
        items, positives: how many items have each of them, and how many of these are positive.
    """

    scores: Float[np.ndarray, " S"]
    items: Int[np.ndarray, " S"]
    positives: Int[np.ndarray, " S"]


@dataclass(frozen=True)
class ScoreBands:
    """Validation scores with known labels, by finding, ready to be looked up."""

    findings: Mapping[str, Scored] = field(default_factory=dict)

    @classmethod
    def of(cls, predictions: Predictions, labels: Int[np.ndarray, "N C"]) -> "ScoreBands":
        """Bands of every finding with at least `FEWEST` known labels.

        Args:
            predictions: out of sample, at the stage and unit of the scores to be asked about.
            labels: codes, rows and columns as in the predictions; what is neither positive nor negative is left out.

        Raises:
            PredictionError: labels of another shape.
        """
        if labels.shape != predictions.probabilities.shape:
            raise PredictionError(
                f"Bands of scores need one label per prediction: {labels.shape} labels, "
                f"{predictions.probabilities.shape} predictions."
            )
        found = {}
        for column, name in enumerate(predictions.findings):
            scores, codes = predictions.probabilities[:, column], labels[:, column]
            known = np.isin(codes, (POSITIVE, NEGATIVE)) & np.isfinite(scores)
            if known.sum() < FEWEST:
                continue
            values, place = np.unique(scores[known], return_inverse=True)
            positives = np.bincount(place, weights=codes[known] == POSITIVE).astype(np.int64)
            found[name] = Scored(values, np.bincount(place), positives)
        return cls(found)

    def band(self, name: str, score: float | None) -> Band | None:
        """The `neighbours` items nearest in score, and all that are as near as the last of them.

        Args:
            name: of a finding.
            score: of an item that is not one of validation; None or NaN where there is none.
        """
        if score is None or not np.isfinite(score) or name not in self.findings:
            return None
        scores, items, positives = self.findings[name]
        wanted, place = neighbours(int(items.sum())), int(np.searchsorted(scores, score))
        window = slice(max(place - wanted, 0), place + wanted)  # each of these scores is that of an item at least
        distance = np.abs(scores[window] - score)
        order = np.argsort(distance, kind="stable")
        reach = distance[order][np.searchsorted(np.cumsum(items[window][order]), wanted)]
        near = distance <= reach
        found, total = int(positives[window][near].sum()), int(items[window][near].sum())
        return Band(*wilson_interval(found, total), found, total)


def neighbours(items: int) -> int:
    """How many neighbours are looked at among so many items: their number to the power 2/3, and `FEWEST` at least.

    Enough for an interval, few enough to be near: the share that balances both for a frequency that changes smoothly
    with the score (nearest neighbours in one dimension, Lipschitz case).
    """
    return min(items, max(FEWEST, round(items ** (2 / 3))))
