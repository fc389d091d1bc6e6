"""Curves of each finding for the report: precision and recall at every distinct score, and reliability bins.

Takes probabilities and labels of evaluated items (images or studies, the caller's choice) and returns arrays. Draws
nothing (`charts.py`), and averages nothing: the numbers of `metrics.json` come from `metrics.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int

from hilum.evaluation.definitions import BINS, bin_of


@dataclass(frozen=True)
class FindingCurve:
    """Curves of one finding over the items whose label is known and whose probability is not NaN."""

    recall: Float[np.ndarray, " T"]
    """Share of positives at or above each distinct score, ascending with falling score; empty without positives."""
    precision: Float[np.ndarray, " T"]
    """Share of positives among the items at or above each distinct score."""
    predicted: Float[np.ndarray, " K"]
    """Mean probability of each reliability bin; NaN where the bin is empty."""
    observed: Float[np.ndarray, " K"]
    """Share of positives of each reliability bin; NaN where the bin is empty."""
    counts: Int[np.ndarray, " K"]
    """Items of each reliability bin."""
    positives: int
    """Items with label 1."""
    items: int
    """Items with a known label and a probability."""

    @property
    def prevalence(self) -> float | None:
        """Share of positives among the items; None without items."""
        return self.positives / self.items if self.items else None

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error over the bins (weights: counts); None without items."""
        filled = self.counts > 0
        if not filled.any():
            return None
        gaps = np.abs(self.predicted[filled] - self.observed[filled])
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())


@dataclass(frozen=True)
class Curves:
    """Curves by finding, in the order of the findings."""

    findings: Mapping[str, FindingCurve]

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", MappingProxyType(dict(self.findings)))


def curves(probabilities: Float[np.ndarray, "B C"], labels: Int[np.ndarray, "B C"], findings: Sequence[str]) -> Curves:
    """Precision-recall points and reliability bins of every finding.

    Points follow scikit-learn's `precision_recall_curve`: tied scores enter together, no interpolation; the point
    (recall 0, precision 1) that scikit-learn adds is left out, because no threshold gives it.

    Args:
        probabilities: in [0, 1]; NaN where a finding was never trained.
        labels: 1 and 0 are known, every other code is left out.
        findings: one name per column.
    """
    if probabilities.shape != labels.shape or probabilities.shape[1] != len(findings):
        raise ValueError(
            f"probabilities {probabilities.shape}, labels {labels.shape} and {len(findings)} findings do not fit."
        )
    return Curves({name: _curve(probabilities[:, c], labels[:, c]) for c, name in enumerate(findings)})


def pool(parts: Sequence[FindingCurve]) -> FindingCurve:
    """All findings in one set of reliability bins, every (item, finding) pair counted once; no recall or precision."""
    counts: np.ndarray = np.asarray(np.sum([part.counts for part in parts], axis=0, dtype=np.int64))
    with np.errstate(invalid="ignore"):
        predicted = np.sum([np.nan_to_num(part.predicted) * part.counts for part in parts], axis=0) / counts
        observed = np.sum([np.nan_to_num(part.observed) * part.counts for part in parts], axis=0) / counts
    none = np.empty(0)
    positives, items = sum(part.positives for part in parts), sum(part.items for part in parts)
    return FindingCurve(none, none, predicted, observed, counts, positives, items)


def _curve(scores: Float[np.ndarray, " B"], labels: Int[np.ndarray, " B"]) -> FindingCurve:
    usable = ((labels == 0) | (labels == 1)) & ~np.isnan(scores)
    kept = scores[usable].astype(np.float64)
    truth = labels[usable] == 1
    positives = int(truth.sum())

    bins = bin_of(kept)
    counts: np.ndarray = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(bins, weights=kept, minlength=BINS) / counts
        observed = np.bincount(bins, weights=truth, minlength=BINS) / counts

    recall = precision = np.empty(0)
    if positives:
        order = np.argsort(-kept, kind="stable")
        last_of_tie = np.append(np.flatnonzero(np.diff(kept[order])), len(kept) - 1)
        true_positives = np.cumsum(truth[order])[last_of_tie]
        recall, precision = true_positives / positives, true_positives / (last_of_tie + 1)
    return FindingCurve(recall, precision, predicted, observed, counts, positives, len(kept))
