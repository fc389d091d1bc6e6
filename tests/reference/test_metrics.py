"""Metrics against scikit-learn and against loops in plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from hilum.core.errors import PredictionError
from hilum.evaluation.metrics import (
    METRICS,
    average_precision,
    brier,
    challenge_ece,
    expected_calibration_error,
    f1_at,
    normalised_average_precision,
    roc_auc,
)

TOLERANCE = 1e-12


def cases():
    """Scores on a coarse grid (many ties, 0, 0.5 and 1 among them) or free, with labels 0 / 1 / unknown."""
    grid = st.integers(0, 20).map(lambda number: number / 20)
    free = st.floats(0, 1, allow_nan=False)
    pair = st.tuples(st.one_of(grid, free), st.sampled_from([1, 1, 0, 0, 0, -1, -2]))
    return st.lists(pair, min_size=1, max_size=60)


@settings(max_examples=500, deadline=None)
@given(cases())
def test_agreement_with_scikit_learn(case):
    p, y = np.array([a for a, _ in case]), np.array([b for _, b in case], dtype=np.int8)
    known = y >= 0
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    if positives:
        assert abs(average_precision(p, y) - average_precision_score(y[known], p[known])) < TOLERANCE
    else:
        assert average_precision(p, y) is None
    if positives and negatives:
        assert abs(roc_auc(p, y) - roc_auc_score(y[known], p[known])) < TOLERANCE
    else:
        assert roc_auc(p, y) is None
    if not known.any():
        assert all(measure(p, y, 0.5) is None for measure in METRICS.values())
        return
    for threshold in (0.5, 0.35):
        expected = f1_score(y[known], p[known] > threshold, zero_division=0.0)
        assert abs(f1_at(p, y, threshold) - expected) < TOLERANCE
    assert abs(brier(p, y) - brier_score_loss(y[known], p[known])) < TOLERANCE


def loop_ece(p, y, target):
    """The definition, one item at a time."""
    bins = [[] for _ in range(15)]
    for score, label in zip(p.tolist(), y.tolist(), strict=True):
        if label in (0, 1):
            bins[min(int(score * 15), 14)].append((score, target(score, label)))
    total = sum(map(len, bins))
    gaps = 0.0
    for items in bins:
        if items:
            gap = abs(sum(score for score, _ in items) / len(items) - sum(value for _, value in items) / len(items))
            gaps += len(items) / total * gap
    return gaps


@settings(max_examples=300, deadline=None)
@given(cases())
def test_calibration_errors_against_loops(case):
    p, y = np.array([a for a, _ in case]), np.array([b for _, b in case], dtype=np.int8)
    if not (y >= 0).any():
        return
    assert abs(expected_calibration_error(p, y) - loop_ece(p, y, lambda _, label: label)) < TOLERANCE
    correct = loop_ece(p, y, lambda score, label: int((score > 0.5) == bool(label)))
    assert abs(challenge_ece(p, y) - correct) < TOLERANCE


def test_a_large_case_with_ties():
    rng = np.random.default_rng(3)
    y = (rng.random(20_000) < 0.01).astype(np.int8)
    p = np.round(np.clip(rng.normal(0.2 + 0.1 * y, 0.1), 0, 1), 3)
    assert abs(average_precision(p, y) - average_precision_score(y, p)) < TOLERANCE
    assert abs(roc_auc(p, y) - roc_auc_score(y, p)) < TOLERANCE


def test_known_values():
    y = np.array([0, 0, 1, 1], np.int8)
    assert average_precision(np.array([0.1, 0.4, 0.35, 0.8]), y) == pytest.approx(5 / 6)
    assert average_precision(np.full(4, 0.3), y) == 0.5
    assert roc_auc(np.full(4, 0.3), y) == 0.5
    assert f1_at(np.array([0.5, 0.5, 0.5, 0.6]), y, 0.5) == pytest.approx(2 / 3)
    assert f1_at(np.zeros(4), y, 0.5) == 0.0
    assert f1_at(np.zeros(4), np.zeros(4, np.int8), 0.5) == 0.0
    assert normalised_average_precision(np.full(4, 0.3), y) == 0.0
    assert expected_calibration_error(np.full(4, 0.5), y) == 0.0
    # rare and well calibrated: near 0 by the standard error, near 1 by the challenge's
    rare = np.array([1] + [0] * 99, np.int8)
    assert expected_calibration_error(np.full(100, 0.01), rare) == pytest.approx(0, abs=1e-12)
    assert challenge_ece(np.full(100, 0.01), rare) == pytest.approx(0.98)
    # exactly 0.5 is called negative, and is right here; 0.52, of the same bin, is wrong
    assert challenge_ece(np.array([0.5, 0.52]), np.zeros(2, np.int8)) == pytest.approx(0.01)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_ignores_row_order_and_unknown_labels(name):
    rng = np.random.default_rng(4)
    p, y = np.round(rng.random(80), 2), rng.choice([0, 0, 1, -1, -2], 80).astype(np.int8)
    value = METRICS[name](p, y, 0.3)
    order = rng.permutation(80)
    assert METRICS[name](p[order], y[order], 0.3) == pytest.approx(value, abs=TOLERANCE)
    assert METRICS[name](p[y >= 0], y[y >= 0], 0.3) == pytest.approx(value, abs=TOLERANCE)
    moved = p.copy()
    moved[y < 0] = 1 - moved[y < 0]
    assert METRICS[name](moved, y, 0.3) == value


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [np.nan, 1.1, -0.1])
def test_every_metric_refuses_what_is_no_probability(name, value):
    with pytest.raises(PredictionError, match=r"outside \[0, 1\]"):
        METRICS[name](np.array([0.2, value, 0.4]), np.array([1, 0, 0], np.int8), 0.3)
