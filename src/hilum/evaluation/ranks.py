"""From scores to ranks: where a score stands among a model's scores of the same finding, in [0, 1].

Members of an ensemble that were trained with different losses have probabilities of different sharpness; their ranks
are alike. A rank is no probability (half of all images have more than 0.5 of every finding) until it is calibrated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hilum.core.errors import PredictionError
from hilum.evaluation.predictions import Predictions, column_indices

KNOTS = 128
"""Of each of the three sets of knots (even, dense at the bottom, dense at the top) that are kept of a long list."""

Curve = tuple[np.ndarray, np.ndarray]
"""Scores and their ranks, both strictly increasing; empty for a finding never trained."""


@dataclass(frozen=True)
class Ranks:
    """The distribution of one model's scores, per finding: strictly increasing maps of [0, 1] into [0, 1].

    Args:
        findings: names.
        curves: one for each.
    """

    findings: tuple[str, ...]
    curves: tuple[Curve, ...]

    @classmethod
    def of(cls, predictions: Predictions, knots: int | None = KNOTS) -> "Ranks":
        """The mid-ranks (count below + half the count equal) / N of these predictions' scores.

        Args:
            predictions: at the stage and unit at which they will be ranked.
            knots: keep about three times so many points, denser towards both ends; None: all.
        """
        return cls.of_values(predictions.probabilities, predictions.findings, knots)

    @classmethod
    def of_values(cls, values: Float[np.ndarray, "N C"], findings: Sequence[str], knots: int | None = KNOTS) -> "Ranks":
        """The same from an array."""
        return cls(tuple(findings), tuple(_curve(values[:, c], knots) for c in range(len(findings))))

    def apply(self, values: Float[np.ndarray, "N C"], findings: Sequence[str]) -> Float[np.ndarray, "N C"]:
        """Ranks of scores in [0, 1], between the known ones linearly; NaN stays NaN.

        Raises:
            PredictionError: a finding that has no curve here.
        """
        columns = column_indices(self.findings, findings, "the ranks of a member")
        ranked = [_apply(self.curves[column], values[:, c]) for c, column in enumerate(columns)]
        return np.stack(ranked, axis=1)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a file."""
        return {
            "findings": np.array(self.findings, dtype=str),
            "lengths": np.array([len(scores) for scores, _ in self.curves], dtype=np.int64),
            "scores": np.concatenate([scores for scores, _ in self.curves]),
            "ranks": np.concatenate([ranks for _, ranks in self.curves]),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Ranks":
        """The inverse of `arrays`.

        Raises:
            PredictionError: the arrays do not belong together.
        """
        findings, lengths = tuple(arrays["findings"].tolist()), arrays["lengths"]
        scores, ranks = arrays["scores"], arrays["ranks"]
        if len(lengths) != len(findings) or not lengths.sum() == len(scores) == len(ranks):
            raise PredictionError("The ranks of a member are not complete.")
        ends = np.cumsum(lengths)[:-1]
        return cls(findings, tuple(zip(np.split(scores, ends), np.split(ranks, ends), strict=True)))


def _curve(values: np.ndarray, knots: int | None) -> Curve:
    if np.isnan(values).all():
        return np.zeros(0), np.zeros(0)
    scores, counts = np.unique(values, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2) / len(values)
    if knots is not None and len(scores) > 3 * knots:
        last = len(scores) - 1
        even = np.linspace(0, last, knots)
        dense = np.geomspace(1, last + 1, knots) - 1
        kept = np.unique(np.concatenate([even, dense, last - dense]).round().astype(np.int64))
        scores, ranks = scores[kept], ranks[kept]
    if scores[0] > 0:
        scores, ranks = np.append(0.0, scores), np.append(0.0, ranks)
    if scores[-1] < 1:
        scores, ranks = np.append(scores, 1.0), np.append(ranks, 1.0)
    return scores, ranks


def _apply(curve: Curve, values: np.ndarray) -> np.ndarray:
    return np.interp(values, *curve) if len(curve[0]) else np.full(len(values), np.nan)
