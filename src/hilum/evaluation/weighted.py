"""One finding as weighted counts: its metrics in many resamples of patients at once.

A resample is a whole number of copies of every patient, so every metric becomes a function of weighted counts. Items
are sorted once per finding and reduced to a sparse matrix (rows of counts x patients); a block of resamples is then one
matrix product, exact for ties. Drawing the resamples and comparing them is in `bootstrap.py`; what a metric is, is in
`definitions.py`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from hilum.evaluation.definitions import BINS, bin_of, surprise

FLOAT32_INTEGERS = 2**24
"""Counts below this are exact in float32, whose products move half the memory."""
FAST: tuple[str, ...] = (
    "AP", "AP_normalised", "AUC", "F1@0.5", "F1@tuned", "ECE", "ECE_challenge_inferred", "Brier", "LogLoss",
    "FNR@tuned", "FPR@tuned",
)  # fmt: skip
"""Metrics of `definitions.METRICS` that `WeightedFinding.measure` knows; any other is recomputed on repeated rows."""


class WeightedFinding:
    """One finding of one set of predictions, ready to be measured under patient weights.

    Args:
        probabilities, labels: (N,) of this finding; only labels 0 and 1 are used.
        clusters: (N,) patient of each item, 0 .. P-1.
        count: P.
        threshold: of F1@tuned; None leaves that metric undefined.
    """

    def __init__(
        self,
        probabilities: Float[np.ndarray, " N"],
        labels: Int[np.ndarray, " N"],
        clusters: Int[np.ndarray, " N"],
        count: int,
        threshold: float | None,
    ) -> None:
        known = (labels == 0) | (labels == 1)
        self.probabilities = np.asarray(probabilities, np.float64)[known]
        self.labels = np.asarray(labels)[known] == 1
        self.clusters, self.count, self.threshold = clusters[known], count, threshold
        self.ranking, self.steps = self._ranking_matrix()
        self.sums = self._sum_matrix()

    def _ranking_matrix(self) -> tuple[sparse.csr_array, int]:
        """Rows 3k, 3k+1, 3k+2: negatives above the k-th score that has positives, positives and negatives at it."""
        scores = np.unique(self.probabilities[self.labels])[::-1]
        # number of scores-with-positives at or above each item: its step when equal, the step before it otherwise
        step = len(scores) - np.searchsorted(scores[::-1], self.probabilities, side="right")
        tied = np.zeros(len(step), dtype=bool)
        inside = step < len(scores)
        tied[inside] = scores[step[inside]] == self.probabilities[inside]
        row = 3 * step + np.where(self.labels, 1, np.where(tied, 2, 0))
        ones = np.ones(len(row), np.float32)
        shape = (3 * len(scores) + 3, self.count)
        return sparse.csr_array(sparse.coo_array((ones, (row, self.clusters)), shape=shape)), len(scores)

    def _sum_matrix(self) -> sparse.csr_array:
        """Rows: items, squared errors, six F1 counts, 15 + 15 sums of the two calibration gaps, the log losses."""
        p, y, n = self.probabilities, self.labels, len(self.labels)
        cut = np.nan if self.threshold is None else self.threshold
        rows, values = [np.zeros(n, np.int64), np.ones(n, np.int64)], [np.ones(n), (p - y) ** 2]
        for base, decided in ((2, p > 0.5), (5, p > cut)):
            outcome = np.where(decided & y, 0, np.where(decided, 1, np.where(y, 2, 99)))
            rows.append(np.where(outcome < 99, base + outcome, 0))
            values.append((outcome < 99).astype(np.float64))
        place = bin_of(p)
        rows += [8 + place, 8 + BINS + place]
        values += [p - y, p - ((p > 0.5) == y)]
        rows.append(np.full(n, 8 + 2 * BINS))
        values.append(surprise(p, y))
        columns = np.tile(self.clusters, len(rows))
        matrix = (np.concatenate(values), (np.concatenate(rows), columns))
        return sparse.csr_array(sparse.coo_array(matrix, shape=(9 + 2 * BINS, self.count)))

    def measure(self, weights: Float[np.ndarray, "P R"], names: Sequence[str]) -> dict[str, Float[np.ndarray, " R"]]:
        """The named metrics (of FAST) in every resample; NaN where undefined.

        Weights are whole numbers of copies: counts of them are exact in the precision that is chosen.
        A resample without a positive has no AP, AUC or F1 (it is skipped); one without an item has nothing.
        """
        sums = self.sums @ weights
        items, positives = sums[0], sums[2] + sums[4]
        results = self._rank_metrics(weights, positives)
        with np.errstate(invalid="ignore", divide="ignore"):
            prevalence = positives / items
            results["AP_normalised"] = (results["AP"] - prevalence) / np.where(prevalence < 1, 1 - prevalence, np.nan)
            results["Brier"] = sums[1] / items
            results["LogLoss"] = sums[8 + 2 * BINS] / items
            results["ECE"] = np.abs(sums[8 : 8 + BINS]).sum(axis=0) / items
            results["ECE_challenge_inferred"] = np.abs(sums[8 + BINS : 8 + 2 * BINS]).sum(axis=0) / items
            results["F1@0.5"] = 2 * sums[2] / (2 * sums[2] + sums[3] + sums[4])
            results["F1@tuned"] = 2 * sums[5] / (2 * sums[5] + sums[6] + sums[7])
            results["FNR@tuned"] = sums[7] / np.where(positives > 0, positives, np.nan)
            results["FPR@tuned"] = sums[6] / np.where(items > positives, items - positives, np.nan)
        for name in ("F1@0.5", "F1@tuned"):
            results[name][positives == 0] = np.nan
        for name in ("F1@tuned", "FNR@tuned", "FPR@tuned") if self.threshold is None else ():
            results[name][:] = np.nan
        return {name: results[name] for name in names}

    def _rank_metrics(
        self, weights: Float[np.ndarray, "P R"], positives: Float[np.ndarray, " R"]
    ) -> dict[str, Float[np.ndarray, " R"]]:
        precision, above, total = (np.zeros(weights.shape[1]) for _ in range(3))
        width = max(1, 4_000_000 // (3 * self.steps + 3))  # columns at a time, so that the product stays in memory
        exact = len(self.labels) * weights.max(initial=0) < FLOAT32_INTEGERS
        for start in range(0, weights.shape[1], width):
            part = slice(start, start + width)
            copies = weights[:, part].astype(np.float32) if exact else weights[:, part]
            counts = (self.ranking @ copies).reshape(self.steps + 1, 3, -1)
            higher, positive, tied = counts[:-1, 0], counts[:-1, 1], counts[:-1, 2]
            true_positives = np.cumsum(positive, axis=0, dtype=np.float64)
            false_positives = np.cumsum(higher + tied, axis=0, dtype=np.float64)
            negatives = counts[:, [0, 2]].sum(axis=(0, 1), dtype=np.float64)
            selected = np.maximum(true_positives + false_positives, 1)  # nothing selected: the numerator is 0 too
            precision[part] = (positive * true_positives / selected).sum(axis=0)
            above[part] = (positive * (negatives - false_positives + 0.5 * tied)).sum(axis=0)
            total[part] = positive.sum(axis=0, dtype=np.float64) * negatives
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"AP": precision / np.where(positives > 0, positives, np.nan), "AUC": above / total}
