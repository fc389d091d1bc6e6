"""Bands of scores against brute force, an independent Wilson interval, and what they must not depend on."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from hilum.core.errors import PredictionError
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.score_bands import FEWEST, ScoreBands, neighbours

Z = 1.959963984540054


def table(scores: np.ndarray) -> Predictions:
    count = len(scores)
    empty = np.full(count, "")
    return Predictions(
        image_uid=np.array([f"{n:016x}" for n in range(count)]), image_id=empty, study_id=empty, patient_id=empty,
        dataset=empty, view=empty, findings=tuple(f"f{n}" for n in range(scores.shape[1])), probabilities=scores,
    )  # fmt: skip


def wilson_by_roots(positives: int, total: int) -> tuple[float, float]:
    """The ends of { p : (share - p)^2 <= z^2 p (1 - p) / n }, found as roots (Wilson's own definition)."""
    share = positives / total

    def score(p: float) -> float:
        return (share - p) ** 2 - Z**2 * p * (1 - p) / total

    low = 0.0 if positives == 0 else brentq(score, 0.0, share, xtol=1e-15)
    high = 1.0 if positives == total else brentq(score, share, 1.0, xtol=1e-15)
    return low, high


def brute_force(scores: list[float], labels: list[int], score: float) -> tuple[int, int]:
    """Positives and items, in exact arithmetic, of the k nearest and all that are as near as the last."""
    known = [(abs(Fraction(s) - Fraction(score)), y) for s, y in zip(scores, labels, strict=True) if y in (0, 1)]
    known.sort(key=lambda pair: pair[0])
    reach = known[neighbours(len(known)) - 1][0]
    near = [y for distance, y in known if distance <= reach]
    return sum(near), len(near)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(FEWEST, 90), st.sampled_from([4, 16, 1024]))
def test_bands_are_those_of_brute_force(seed: int, count: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, steps + 1, (count, 2)) / steps  # dyadic: differences are exact, and ties are many
    labels = rng.choice([1, 0, -1, -2], (count, 2), p=[0.4, 0.5, 0.05, 0.05])
    bands = ScoreBands.of(table(scores), labels)
    for column, name in enumerate(("f0", "f1")):
        known = int((labels[:, column] >= 0).sum())
        for score in (0.0, 1.0, *(rng.integers(0, 2 * steps + 1, 4) / (2 * steps)).tolist()):
            band = bands.band(name, score)
            if known < FEWEST:
                assert band is None
                continue
            expected = brute_force(scores[:, column].tolist(), labels[:, column].tolist(), score)
            assert (band.positives, band.items) == expected
            assert (band.low, band.high) == pytest.approx(wilson_by_roots(*expected), abs=1e-9)


def test_unknown_labels_and_the_order_of_items_change_nothing() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random((60, 1)), rng.integers(0, 2, (60, 1))
    band = ScoreBands.of(table(scores), labels).band("f0", 0.3)
    order = rng.permutation(60)
    assert ScoreBands.of(table(scores[order]), labels[order]).band("f0", 0.3) == band
    more = np.concatenate([scores, rng.random((30, 1))])
    unknown = np.concatenate([labels, rng.choice([-1, -2], (30, 1))])
    assert ScoreBands.of(table(more), unknown).band("f0", 0.3) == band


def test_a_band_covers_the_true_frequency_of_calibrated_scores() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((4000, 1))
    bands = ScoreBands.of(table(scores), (rng.random((4000, 1)) < scores).astype(int))
    asked = rng.random(200)
    inside = [band.low <= p <= band.high for p in asked.tolist() if (band := bands.band("f0", p))]
    assert np.mean(inside) > 0.85
    assert bands.band("f0", 0.5).items == neighbours(4000) == 252


def test_there_is_no_band_without_validation() -> None:
    scores = np.column_stack([np.linspace(0, 1, 30), np.full(30, np.nan)])
    labels = np.zeros((30, 2), int)
    labels[FEWEST - 1 :, 0] = -1
    bands = ScoreBands.of(table(scores), labels)
    assert [bands.band(name, 0.5) for name in ("f0", "f1", "absent")] == [None] * 3
    labels[FEWEST - 1, 0] = 0
    bands = ScoreBands.of(table(scores), labels)
    assert bands.band("f0", 0.5).items == FEWEST
    assert [bands.band("f0", score) for score in (None, float("nan"))] == [None, None]
    with pytest.raises(PredictionError, match="one label per prediction"):
        ScoreBands.of(table(scores), labels[:-1])
