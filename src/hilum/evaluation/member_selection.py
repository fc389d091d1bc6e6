"""Weights of the members of an ensemble that score best: members mixed by any weights, and the search over weights.

Takes validation rows as they are; that they are out of sample, and what the search is worth on others, is the business
of `ensemble_search.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, logit

from hilum.core.errors import PredictionError
from hilum.evaluation.folds import macro_average_precision
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.study_rules import SMALLEST, StudyRule

EXHAUSTIVE = 5
"""Up to so many members every subset is tried: 31 of them."""
ROUNDS = 30
"""Of the greedy selection, at most."""
LEAST_GAIN = 1e-6
"""What a larger ensemble, a rule after the first, or damping must gain in macro AP to be taken."""


class Mixture:
    """Members' study values per image, transformed once for a rule, so that any weights are one product away."""

    def __init__(
        self, members: Sequence[Predictions], labels: np.ndarray, rows: np.ndarray, seen: np.ndarray, study: StudyRule,
        ensemble: str,
    ) -> None:  # fmt: skip
        """`seen`: the rows whose scores the ranks come from; `rows`: those that are judged."""
        self.findings, self.labels, self.ensemble = members[0].findings, labels[rows], ensemble
        inside = [aggregate_studies(member.rows(rows), study).probabilities for member in members]
        if ensemble == "rank_mean":
            known = inside
            if seen is not rows:
                known = [aggregate_studies(member.rows(seen), study).probabilities for member in members]
            curves = [Ranks.of_values(values, self.findings, None) for values in known]
            inside = [curve.apply(values, self.findings) for curve, values in zip(curves, inside, strict=True)]
        values = np.stack(inside)
        self.trained: Bool[np.ndarray, "M C"] = ~np.isnan(values).all(axis=1)
        if ensemble == "logit_mean":
            values = logit(np.clip(values, SMALLEST, 1 - SMALLEST))
        self.values: Float[np.ndarray, "M N C"] = np.nan_to_num(values)
        self.columns: Bool[np.ndarray, " C"] = self.trained.any(axis=0)

    def score(self, weights: Float[np.ndarray, " M"], damping: Damping | None = None) -> float:
        """Macro AP of the members so weighed."""
        total = np.tensordot(weights, self.values, axes=1)
        sums = weights @ self.trained
        mixed = np.divide(total, sums, out=np.full(total.shape, np.nan), where=sums > 0)
        mixed = expit(mixed) if self.ensemble == "logit_mean" else np.clip(mixed, 0.0, 1.0)
        if damping is not None:
            mixed = damping.damp(mixed, self.findings)
        found = macro_average_precision(mixed, self.labels, self.columns)
        if found is None:
            raise PredictionError("No finding that a member was trained on has a positive among these validation rows.")
        return found


def select_members(score: Callable[[np.ndarray], float], count: int) -> tuple[Float[np.ndarray, " M"], float]:
    """Weights that make `score` large: the best subset of up to EXHAUSTIVE members, else greedily with replacement.

    Of equally good ones the fewest members win, then those that come first.

    Args:
        score: of weights, one per member.
        count: members.
    """
    if count <= EXHAUSTIVE:
        subsets = [one for size in range(1, count + 1) for one in combinations(range(count), size)]
        return _first_best((np.bincount(one, minlength=count).astype(np.float64) for one in subsets), score)
    singles = np.eye(count)
    best = held = _first_best(iter(singles), score)
    for _ in range(ROUNDS - 1):
        held = _first_best((held[0] + one for one in singles), score)
        if held[1] <= best[1] + LEAST_GAIN:
            break
        best = held
    return best


def _first_best(candidates: Iterable[np.ndarray], score: Callable[[np.ndarray], float]) -> tuple[np.ndarray, float]:
    best: tuple[np.ndarray, float] | None = None
    for weights in candidates:
        value = score(weights)
        if best is None or value > best[1] + LEAST_GAIN:
            best = weights, value
    assert best is not None
    return best
