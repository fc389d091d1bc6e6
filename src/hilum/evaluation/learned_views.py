"""The weights of the study rule `learned`: what an image of each kind of view should count, found on validation.

Three numbers at most, from a coarse grid, with equal weights as the start and the tie-break: validation sets are small,
and the mean is hard to beat. What they gain on patients they were not fitted on comes with them.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Int

from hilum.core.types import VIEW_KINDS, view_kind
from hilum.evaluation.folds import FOLDS, macro_average_precision, patient_splits
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import group_studies
from hilum.evaluation.study_rules import MEAN, StudyRule

RATIOS = (1.0, 0.75, 1.5, 0.5, 2.0, 0.25, 4.0, 0.1, 10.0, 0.0)
"""Weights that are tried, of equally good ones the first: nearer to equal."""
ENOUGH = 20
"""A kind of view keeps its weight unless so many studies have it beside another kind."""
ROUNDS = 3


@dataclass(frozen=True)
class LearnedViews:
    """A fitted rule.

    Args:
        rule: `learned` with its weights, the largest of which is 1.
        score: macro AP per image of its study values, on what it was fitted on.
        mean_score: the same with equal weights.
        held_out_gain: mean over folds of patients of what weights fitted on the others gain over equal ones; None
            where there are too few patients.
    """

    rule: StudyRule
    score: float
    mean_score: float
    held_out_gain: float | None

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rule": str(self.rule), "score": self.score, "mean_score": self.mean_score,
            "held_out_gain": self.held_out_gain,
        }  # fmt: skip


def fit_views(p: Predictions, labels: Int[np.ndarray, "N C"], folds: int = FOLDS, seed: int = 0) -> LearnedViews:
    """Fit on raw validation predictions of images, out of sample (the caller sees to that).

    Args:
        p: of one model, or the mean of several.
        labels: codes, rows and columns as those of `p`.
        folds: of patients, for the estimate; 0 for none.
        seed: how patients are dealt out.
    """
    whole = _Part(p, labels)
    rule = whole.climb()
    gains = []
    for inside, outside in patient_splits(p, folds, seed):
        judge = _Part(p.rows(outside), labels[outside])
        found, equal = judge.score(_Part(p.rows(inside), labels[inside]).climb()), judge.score(MEAN)
        if found is not None and equal is not None:
            gains.append(found - equal)
    held_out = float(np.mean(gains)) if gains else None
    return LearnedViews(rule, whole.score(rule) or 0.0, whole.score(MEAN) or 0.0, held_out)


class _Part:
    """Some of the images, grouped once."""

    def __init__(self, p: Predictions, labels: np.ndarray) -> None:
        self.labels, self.trained, self.grouped = labels, p.trained, group_studies(p)
        self.probabilities, self.views = p.probabilities[self.grouped.order], p.view[self.grouped.order]

    def score(self, rule: StudyRule) -> float | None:
        """Macro AP per image: each carries its study's value, as the challenge scores it."""
        values = rule.aggregate(self.probabilities, self.grouped.starts, self.views)
        return macro_average_precision(values[self.grouped.study_of], self.labels, self.trained)

    def climb(self) -> StudyRule:
        """One kind at a time, to the best of RATIOS; the most common kind keeps 1, since only ratios matter."""
        kinds = np.array([VIEW_KINDS[view_kind(view)] for view in self.views.tolist()])
        common = max(VIEW_KINDS, key=lambda kind: int((kinds == kind).sum()))
        free = [kind for kind in VIEW_KINDS if kind != common and self._mixed(kinds == kind) >= ENOUGH]
        weights, best = dict.fromkeys(VIEW_KINDS, 1.0), self.score(MEAN)
        for _ in range(ROUNDS if best is not None else 0):
            before = dict(weights)
            for kind, ratio in product(free, RATIOS):
                tried = weights | {kind: ratio}
                score = self.score(StudyRule("learned", tried))
                if score is not None and best is not None and score > best + 1e-9:
                    weights, best = tried, score
            if weights == before:
                break
        largest = max(weights.values())
        return StudyRule("learned", {kind: float(f"{weight / largest:.4g}") for kind, weight in weights.items()})

    def _mixed(self, of_kind: np.ndarray) -> int:
        """Studies that have this kind of view and another one."""
        share = np.add.reduceat(of_kind.astype(np.int64), self.grouped.starts)
        return int(((share > 0) & (share < self.grouped.counts)).sum())
