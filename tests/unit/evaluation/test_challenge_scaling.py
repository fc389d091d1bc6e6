import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from hilum.core.errors import ConfigError, PredictionError
from hilum.core.types import STAGES
from hilum.evaluation.bootstrap import paired_difference
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.challenge_scaling import SCALED, move_cut_to_half
from hilum.evaluation.metrics import average_precision, challenge_ece, f1_at, roc_auc
from hilum.evaluation.predictions import Predictions


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(1e-6, 1 - 1e-6))
def test_the_cut_moves_to_a_half_and_the_order_stays(scores, threshold):
    p = np.array([*scores, threshold, np.nextafter(threshold, 1), np.nextafter(threshold, 0), 0.0, 1.0])
    moved = move_cut_to_half(p, threshold)
    assert ((moved >= 0) & (moved <= 1)).all()
    np.testing.assert_array_equal(moved > 0.5, p > threshold)
    np.testing.assert_array_equal(np.argsort(np.argsort(np.unique(p))), np.argsort(np.argsort(np.unique(moved))))
    np.testing.assert_array_equal(np.unique(p, return_inverse=True)[1], np.unique(moved, return_inverse=True)[1])


def test_scaling_leaves_ap_and_auc_and_makes_half_the_tuned_cut():
    rng = np.random.default_rng(0)
    y = (rng.random(500) < 0.1).astype(np.int8)
    p = np.round(np.clip(rng.normal(0.05 + 0.1 * y, 0.05), 0, 1), 3)
    moved = move_cut_to_half(p, 0.12)
    assert average_precision(moved, y) == average_precision(p, y)
    assert roc_auc(moved, y) == roc_auc(p, y)
    assert f1_at(moved, y, 0.5) == f1_at(p, y, 0.12)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.2, float("nan")])
def test_a_cut_outside_the_open_interval_is_refused(threshold):
    with pytest.raises(PredictionError, match="inside"):
        move_cut_to_half(np.array([0.2]), threshold)


def test_thousands_of_scores_with_extremes_and_ties_keep_ap_and_auc():
    rng = np.random.default_rng(0)
    p = expit(np.concatenate([rng.uniform(-700, 36, 2000), rng.normal(-4, 3, 4000), rng.integers(-9, 9, 500)]))
    p = np.concatenate([p, [0.0, 1.0, 5e-324, np.nextafter(1, 0), 0.05, np.nextafter(0.05, 1)]])
    y = (rng.random(len(p)) < 0.1 + 0.5 * p).astype(np.int8)
    for compress in (1.0, 0.3, 0.01):
        for cut in (1e-9, 0.05, 0.999):
            moved = move_cut_to_half(p, cut, compress)
            assert abs(average_precision(moved, y) - average_precision(p, y)) < 1e-12
            assert abs(roc_auc(moved, y) - roc_auc(p, y)) < 1e-12
            np.testing.assert_array_equal(moved > 0.5, p > cut)


def test_compression_multiplies_log_odds_and_keeps_decisions():
    p = np.linspace(0.01, 0.99, 99)
    plain, closer = move_cut_to_half(p, 0.2), move_cut_to_half(p, 0.2, 0.3)
    np.testing.assert_allclose(logit(closer[30:]), 0.3 * logit(plain[30:]), rtol=1e-12)
    np.testing.assert_array_equal(closer > 0.5, plain > 0.5)
    assert (np.abs(closer - 0.5) <= np.abs(plain - 0.5)).all()
    for compress in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="--compress"):
            move_cut_to_half(p, 0.2, compress)


def test_the_scale_and_compression_lower_the_leaderboards_error():
    """Well calibrated scores of a rare finding: what the challenge measures is high, and not for a fault of theirs."""
    rng = np.random.default_rng(1)
    p = expit(rng.normal(-3, 1.2, 20_000))
    y = (rng.random(len(p)) < p).astype(np.int8)
    plain, scaled, closer = p, move_cut_to_half(p, 0.12), move_cut_to_half(p, 0.12, 0.3)
    assert challenge_ece(plain, y) > challenge_ece(scaled, y) > challenge_ece(closer, y)
    assert f1_at(scaled, y, 0.5) == f1_at(closer, y, 0.5) > f1_at(plain, y, 0.5)


def test_scaled_is_no_stage_of_predictions():
    assert SCALED not in STAGES


def binormal(count, seed):
    """Images of patients, three each, whose posterior is known; scores inflated as an asymmetric loss does."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 3)) < [0.25, 0.1, 0.04]).astype(np.int8)
    evidence = rng.normal(size=labels.shape) * 1.5 + 2.25 * labels - 1.125
    posterior = evidence + logit(np.array([0.25, 0.1, 0.04]))
    ids, patients = np.array([f"{seed}-{i}" for i in range(count)]), np.array([f"p{i // 3}" for i in range(count)])
    blank = np.full(count, "")
    return Predictions(ids, ids, blank, patients, blank, blank, ("A", "B", "C"), expit(0.5 * posterior + 0.4)), labels


def test_what_is_gained_has_intervals_over_patients():
    """Calibration lowers ECE and Brier; scaling raises F1 at 0.5 and lowers the challenge's error: each one shown."""
    (val, fitted), (test, labels) = binormal(3000, 1), binormal(3000, 2)
    calibrator = Calibrator.fit(val.probabilities, fitted, val.findings, patients=val.patient_id.tolist())
    calibrated = calibrator.apply_to(test)
    moved = [
        move_cut_to_half(calibrated.probabilities[:, c], calibrator.thresholds[name]["f1"])
        for c, name in enumerate(test.findings)
    ]
    gain = paired_difference(calibrated, test, labels, bootstraps=200)
    scale = paired_difference(test.replace(np.stack(moved, axis=1)), calibrated, labels, bootstraps=200)
    for rows, metric, sign in (
        (gain, "mECE_standard", -1), (gain, "mBrier", -1), (scale, "mF1@0.5", 1),
        (scale, "mECE_challenge_inferred", -1), (scale, "mECE_standard", 1),
    ):  # fmt: skip
        assert rows[metric]["shown"], metric
        assert rows[metric]["difference"] * sign > 0, metric
    for rows in (gain, scale):
        for metric in ("mAP", "mAUC"):
            assert abs(rows[metric]["difference"]) < 1e-12
