"""Metrics against scikit-learn and against loops in plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    log_loss,
    roc_auc_score,
)

from hilum.core.errors import PredictionError
from hilum.evaluation.bootstrap import replicates, resample_weights
from hilum.evaluation.definitions import POINT_METRICS, calibration_line, equal_mass_ece
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
from hilum.evaluation.weighted import WeightedFinding

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
        assert all(measure(p, y, 0.5) is None for measure in (METRICS | POINT_METRICS).values())
        return
    for threshold in (0.5, 0.35):
        expected = f1_score(y[known], p[known] > threshold, zero_division=0.0)
        assert abs(f1_at(p, y, threshold) - expected) < TOLERANCE
        fn = sum(label == 1 and score <= threshold for score, label in case)
        fp = sum(label == 0 and score > threshold for score, label in case)
        misses, alarms = METRICS["FNR@tuned"](p, y, threshold), METRICS["FPR@tuned"](p, y, threshold)
        assert misses == pytest.approx(fn / positives, abs=TOLERANCE) if positives else misses is None
        assert alarms == pytest.approx(fp / negatives, abs=TOLERANCE) if negatives else alarms is None
    assert abs(brier(p, y) - brier_score_loss(y[known], p[known])) < TOLERANCE
    assert METRICS["LogLoss"](p, y, None) == pytest.approx(log_loss(y[known], p[known], labels=[0, 1]), abs=1e-11)
    lift = POINT_METRICS["AP_lift"](p, y, None)
    assert (
        lift == pytest.approx(average_precision(p, y) / y[known].mean(), abs=TOLERANCE) if positives else lift is None
    )


@pytest.mark.parametrize("seed", range(25))
def test_resamples_agree_with_scikit_learn_under_weights(seed):
    """500 random cases: 25 findings, 20 resamples of whole patients each, with ties and masked labels."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(30, 200))
    clusters = np.unique(rng.integers(0, 20, count), return_inverse=True)[1]
    p = np.round(rng.random(count), int(rng.integers(1, 4)))
    y = rng.choice([1, 1, 0, 0, 0, -1, -2], count).astype(np.int8)
    samples = replicates([WeightedFinding(p, y, clusters, int(clusters.max()) + 1, 0.35)], 20, seed)
    for number in range(20):
        copies = resample_weights(int(clusters.max()) + 1, number, number + 1, seed)[clusters, 0]
        drawn = (y >= 0) & (copies > 0)
        truth, scores, weights = y[drawn], p[drawn], copies[drawn]
        expected = {
            "AP": average_precision_score(truth, scores, sample_weight=weights),
            "AUC": roc_auc_score(truth, scores, sample_weight=weights),
            "F1@0.5": f1_score(truth, scores > 0.5, sample_weight=weights),
            "F1@tuned": f1_score(truth, scores > 0.35, sample_weight=weights),
            "Brier": brier_score_loss(truth, scores, sample_weight=weights),
            "ECE": loop_ece(
                np.repeat(scores, weights.astype(int)), np.repeat(truth, weights.astype(int)), lambda _, t: t
            ),
        }
        for name, value in expected.items():
            assert abs(samples[name][number, 0] - value) < TOLERANCE, name


@settings(max_examples=200, deadline=None)
@given(cases())
def test_equal_mass_bins_against_a_loop(case):
    known = [(p, y) for p, y in case if y in (0, 1)]
    bins = [[] for _ in range(15)]
    for p, y in known:
        bins[15 * sum(q < p for q, _ in known) // len(known)].append((p, y))
    gaps = [len(b) / len(known) * abs(np.mean([p for p, _ in b]) - np.mean([y for _, y in b])) for b in bins if b]
    found = equal_mass_ece(np.array([a for a, _ in case]), np.array([b for _, b in case], dtype=np.int8))
    assert found is None if not known else abs(found - sum(gaps)) < TOLERANCE


def test_equal_mass_bins_of_distinct_probabilities_hold_the_same_number_of_items():
    rng = np.random.default_rng(0)
    p = rng.random(1500)
    labels = (rng.random(1500) < p**2).astype(np.int8)
    pieces = np.split(np.argsort(p), 15)
    gaps = [abs(p[piece].mean() - labels[piece].mean()) for piece in pieces]
    assert equal_mass_ece(p, labels) == pytest.approx(np.mean(gaps), abs=TOLERANCE)


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.5, 0.0), (2.0, -1.0), (-1.0, 0.5)])
def test_calibration_line_against_another_optimiser(slope, shift):
    rng = np.random.default_rng(1)
    logits = rng.normal(-1, 1.5, 3000)
    y = (rng.random(3000) < 1 / (1 + np.exp(-(slope * logits + shift)))).astype(np.int8)
    p = 1 / (1 + np.exp(-logits))

    def loss(line):
        scores = line[0] + line[1] * logits
        return np.logaddexp(0, np.where(y == 1, -scores, scores)).sum()

    joint = minimize(loss, [0.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-10, "maxiter": 4000})
    large = minimize(lambda a: loss([a[0], 1.0]), [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-10})
    found = calibration_line(p, y)
    assert found == (pytest.approx(joint.x[1], abs=1e-6), pytest.approx(large.x[0], abs=1e-6))
    assert found[0] == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize(
    ("p", "y", "slope", "intercept"),
    [([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], False, True), ([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1], False, True),
     ([0.3, 0.3, 0.3, 0.3], [0, 1, 0, 0], False, True), ([0.3, 0.2], [1, 1], False, False),
     ([0.3, 0.2, 0.4], [1, 0, -1], False, True), ([0.0, 1.0, 0.5, 0.2], [1, 0, 1, 0], True, True),
     ([], [], False, False)],
)  # fmt: skip
def test_a_calibration_line_that_does_not_exist_is_undefined(p, y, slope, intercept):
    found = calibration_line(np.array(p), np.array(y, np.int8))
    assert [value is not None for value in found] == [slope, intercept]
    if p and p[0] == 0.3 and len(p) == 4:
        assert found[1] == pytest.approx(np.log(1 / 3) - np.log(3 / 7))


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


ALL_METRICS = METRICS | POINT_METRICS


@pytest.mark.parametrize("name", ALL_METRICS)
def test_every_metric_ignores_row_order_and_unknown_labels(name):
    rng = np.random.default_rng(4)
    p, y = np.round(rng.random(80), 2), rng.choice([0, 0, 1, -1, -2], 80).astype(np.int8)
    value = ALL_METRICS[name](p, y, 0.3)
    order = rng.permutation(80)
    assert ALL_METRICS[name](p[order], y[order], 0.3) == pytest.approx(value, abs=TOLERANCE)
    assert ALL_METRICS[name](p[y >= 0], y[y >= 0], 0.3) == pytest.approx(value, abs=TOLERANCE)
    moved = p.copy()
    moved[y < 0] = 1 - moved[y < 0]
    assert ALL_METRICS[name](moved, y, 0.3) == value


@pytest.mark.parametrize("name", ALL_METRICS)
@pytest.mark.parametrize("value", [np.nan, 1.1, -0.1])
def test_every_metric_refuses_what_is_no_probability(name, value):
    with pytest.raises(PredictionError, match=r"outside \[0, 1\]"):
        ALL_METRICS[name](np.array([0.2, value, 0.4]), np.array([1, 0, 0], np.int8), 0.3)
