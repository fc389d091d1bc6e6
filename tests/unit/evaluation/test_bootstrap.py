import dataclasses

import numpy as np
import pytest

from hilum.core.errors import PredictionError
from hilum.core.seeding import stream
from hilum.evaluation import definitions
from hilum.evaluation.bootstrap import (
    basic_interval,
    difference_interval,
    holm,
    interval,
    mean_over_findings,
    paired_comparison,
    paired_difference,
    patient_clusters,
    replicates,
    resample_weights,
)
from hilum.evaluation.metrics import METRICS, average_precision, evaluate, roc_auc
from hilum.evaluation.weighted import FAST, WeightedFinding


@pytest.mark.parametrize("digits", [1, 2, 17])
@pytest.mark.parametrize("name", FAST)
def test_weighted_metrics_equal_the_definition_on_the_repeated_rows(digits, name):
    rng = np.random.default_rng(digits)
    p, clusters = np.round(rng.random(70), digits), rng.integers(0, 25, 70)
    y = rng.choice([0, 0, 0, 1, -1], 70).astype(np.int8)
    finding = WeightedFinding(p, y, clusters, 25, 0.3)
    weights = resample_weights(25, 0, 40, seed=1)
    fast = finding.measure(weights, [name])[name]
    for column in range(40):
        copies = weights[clusters, column].astype(int)
        repeated = np.repeat(y, copies)
        slow = METRICS[name](np.repeat(p, copies), repeated, 0.3) if (repeated == 1).any() else None
        if slow is None:
            assert np.isnan(fast[column]) or name in ("ECE", "ECE_challenge_inferred", "Brier", "LogLoss", "FPR@tuned")
        else:
            assert fast[column] == pytest.approx(slow, abs=1e-12)


def test_a_metric_without_a_fast_form_gets_the_same_resamples(monkeypatch, made_up):
    table, labels = made_up()
    monkeypatch.setitem(definitions.METRICS, "AP_again", lambda p, y, _: average_precision(p, y))
    result = evaluate(table, labels, bootstraps=25)
    assert result["findings"]["B"]["ci95"]["AP_again"] == pytest.approx(
        result["findings"]["B"]["ci95"]["AP"], abs=1e-12
    )
    assert result["macro"]["mAP_again"] == result["macro"]["mAP"]


def test_patients_are_drawn_whole():
    weights = resample_weights(30, 0, 50, seed=0)
    assert (weights.sum(axis=0) == 30).all()
    assert (weights == np.round(weights)).all()
    np.testing.assert_array_equal(resample_weights(30, 7, 9, seed=0), weights[:, 7:9])
    assert not np.array_equal(resample_weights(30, 0, 50, seed=1), weights)


def test_the_block_size_changes_nothing(monkeypatch, made_up):
    table, labels = made_up()
    before = evaluate(table, labels, bootstraps=23)
    monkeypatch.setattr("hilum.evaluation.bootstrap.BLOCK", 4)
    assert evaluate(table, labels, bootstraps=23) == before


def test_clusters_are_patients_of_a_dataset():
    dataset, patient = np.array(["d", "d", "e", "d", "d"]), np.array(["1", "1", "1", "", ""])
    found = patient_clusters(dataset, patient, np.array(["a", "b", "c", "s", "t"]))
    assert found[0] == found[1]
    assert len(set(found.tolist())) == 4


def test_copies_of_a_patient_do_not_narrow_the_interval(made_up):
    table, labels = made_up(count=80, patients=40)
    single = evaluate(table, labels, bootstraps=200)["findings"]["A"]["ci95"]["AUC"]
    copies = np.repeat(np.arange(80), 10)
    many = table.rows(np.arange(80))
    many = dataclasses.replace(
        many.rows(copies[:0]),
        **{
            name: getattr(table, name)[copies]
            for name in ("image_id", "study_id", "patient_id", "dataset", "view", "probabilities")
        },
        image_uid=np.array([f"u{index}" for index in range(800)]),
    )
    assert evaluate(many, labels[copies], bootstraps=200)["findings"]["A"]["ci95"]["AUC"] == pytest.approx(single)


def test_resamples_without_positives_are_skipped_and_counted(made_up):
    table, labels = made_up(patients=30)
    labels[:, 3] = 0
    labels[0, 3] = 1
    result = evaluate(table, labels, bootstraps=100)
    skipped = result["findings"]["D"]["skipped_resamples"]["AP"]
    weights = resample_weights(result["n_patients"], 0, 100, 0)
    ids = sorted(f"p\x1fd\x1f{name}" for name in set(table.patient_id.tolist()))
    assert skipped == (weights[ids.index(f"p\x1fd\x1f{table.patient_id[0]}")] == 0).sum() > 0
    assert "AP" not in result["findings"]["A"]["skipped_resamples"]


def test_no_interval_from_nothing():
    for rule in (interval, basic_interval):
        assert rule(np.full(10, np.nan), 0.3) is None
        assert rule(np.array([0.3]), 0.3) is None
        assert rule(np.array([0.3, 0.4]), None) is None
        assert rule(np.array([0.3, 0.4]), np.nan) is None
        assert rule(np.array([0.0, 1.0]), 0.5) == pytest.approx([0.025, 0.975])
    np.testing.assert_array_equal(mean_over_findings(np.array([[0.2, np.nan], [np.nan, np.nan]])), [0.2, np.nan])
    assert replicates([], 5, 0)["AP"].shape == (5, 0)


def test_the_bias_of_resamples_is_taken_from_an_interval():
    values = np.array([0.5, np.nan, 0.6, 0.7, 0.8, 0.9])  # 0.7 in the mean
    low, high = np.quantile(values[[0, 2, 3, 4, 5]], [0.025, 0.975])
    assert interval(values, 0.6) == pytest.approx([low - 0.1, high - 0.1])
    assert interval(values, 0.1) == pytest.approx([0.0, high - 0.6])
    assert interval(values, 0.1, (-1.0, 1.0)) == pytest.approx([low - 0.6, high - 0.6])
    assert basic_interval(values, 0.6) == pytest.approx([1.2 - high, 1.2 - low])


def test_the_study_mean_of_noise_is_not_shown_to_beat_single_images():
    """Half the patients have two images with one label; their mean ties them, and average precision likes ties."""
    shown = by_percentiles = 0
    for trial in range(30):
        rng = stream(trial, "ties")
        patient = np.repeat(np.arange(120), rng.choice([1, 2, 3], 120))
        single, study = [], []
        for _ in range(4):
            y = (rng.random(120) < 0.1).astype(np.int8)[patient]
            scores = rng.random(len(patient))
            mean = (np.bincount(patient, scores) / np.bincount(patient))[patient]
            for made, p in ((single, scores), (study, mean)):
                made.append(WeightedFinding(p, y, patient, 120, None))
        drawn = np.concatenate([np.ones((120, 1)), resample_weights(120, 0, 150, trial)], axis=1)
        means, singles = (np.stack([f.measure(drawn, ["AP"])["AP"] for f in made], axis=1) for made in (study, single))
        differences = (means - singles).mean(axis=1)
        row = difference_interval(means[1:], singles[1:], float(differences[0]))
        shown += row["shown"]
        by_percentiles += bool(np.quantile(differences[1:], 0.025) > 0)
    assert shown <= 3
    assert by_percentiles >= 8  # what this is a test against


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for trial in range(60):
        rng = stream(trial, "coverage")
        y = (rng.random(400) < 0.3).astype(np.int8)
        p = 1 / (1 + np.exp(-(rng.normal(size=400) + y)))
        finding = WeightedFinding(p, y, np.arange(400), 400, None)
        samples = finding.measure(resample_weights(400, 0, 200, trial), ["AUC"])["AUC"]
        low, high = interval(samples, roc_auc(p, y))
        hits += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert 51 <= hits <= 60


def test_a_file_does_not_differ_from_itself(made_up):
    table, labels = made_up()
    order = np.random.default_rng(0).permutation(len(table))
    other = table.rows(order).select(["D", "B", "A", "C"])
    rows = paired_difference(table, other, labels, bootstraps=30)
    for name in ("mF1@tuned", "mFNR@tuned", "mFPR@tuned"):
        assert rows.pop(name)["difference"] is None
    for row in rows.values():
        assert (row["difference"], row["low"], row["high"], row["shown"], row["p"]) == (0, 0, 0, False, 1)
        assert row["first"] == row["second"]


def test_the_pairing_narrows_the_interval_of_a_difference(made_up):
    table, labels = made_up(count=400, patients=150)
    noise = np.random.default_rng(1).normal(0, 0.05, labels.shape)
    worse = table.replace(np.clip(table.probabilities + noise, 0, 1))
    a, b = evaluate(table, labels, bootstraps=200), evaluate(worse, labels, bootstraps=200)
    row = paired_difference(table, worse, labels, bootstraps=200)["mAP"]
    assert row["difference"] == pytest.approx(a["macro"]["mAP"] - b["macro"]["mAP"])
    width = row["high"] - row["low"]
    assert width < 0.5 * (a["macro"]["ci95"]["mAP"][1] - a["macro"]["ci95"]["mAP"][0])
    assert row["findings"] == 4


def test_a_clear_difference_is_shown_and_none_is_not(made_up):
    table, labels = made_up(count=400, patients=150)
    noise = table.replace(np.random.default_rng(1).random(labels.shape))
    assert paired_difference(table, noise, labels, bootstraps=100)["mAUC"]["shown"] is True
    assert paired_difference(noise, table, labels, bootstraps=100)["mAUC"]["difference"] < 0
    other = table.replace(np.random.default_rng(3).random(labels.shape))
    assert paired_difference(noise, other, labels, bootstraps=100)["mAUC"]["shown"] is False


def test_only_findings_trained_in_both_with_enough_positives_are_compared(made_up):
    table, labels = made_up()
    values = table.probabilities.copy()
    values[:, 0] = np.nan
    labels[np.flatnonzero(labels[:, 3])[2:], 3] = 0
    row = paired_difference(table, table.replace(values), labels, bootstraps=5, min_positives=3)["mAP"]
    assert row["findings"] == 2


def test_other_items_cannot_be_compared(made_up):
    table, labels = made_up()
    with pytest.raises(PredictionError, match="only in the first"):
        paired_difference(table, table.rows(np.arange(59)), labels, bootstraps=2)


def test_differences_of_every_finding(made_up):
    table, labels = made_up(count=400, patients=150)
    values = table.probabilities.copy()
    values[:, 0] = np.random.default_rng(1).random(400)  # a model that knows nothing about A, and all the same else
    labels[:, 3] = 0
    macro, rows = paired_comparison(table, table.replace(values), labels, bootstraps=100)
    assert set(rows) == set("ABCD")
    assert rows["D"].keys() & {"AP", "AUC"} == set()
    a, b = rows["A"]["AP"], rows["B"]["AP"]
    assert a["first"] == average_precision(table.probabilities[:, 0], labels[:, 0])
    assert a["difference"] == pytest.approx(a["first"] - a["second"])
    assert a["shown"]
    assert a["shown_holm"]
    assert a["p"] < 1e-6
    assert a["p_holm"] == pytest.approx(3 * a["p"])  # of A, B and C; D has no AP
    assert (b["difference"], b["p"], b["p_holm"], b["shown"], b["shown_holm"]) == (0, 1, 1, False, False)
    assert macro["mAP"]["difference"] == pytest.approx(a["difference"] / 3)
    assert macro["mAP"]["first"] == pytest.approx(np.mean([rows[name]["AP"]["first"] for name in "ABC"]))


def test_holm_by_hand():
    """Holm 1979: the k-th smallest of m times (m - k + 1), never falling, at most 1."""
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_equal_models_are_called_different_about_as_often_as_they_should_be():
    """100 pairs of models of the same strength: p under 0.05 in about 5 %, and intervals that leave out zero alike."""
    called, outside = 0, 0
    for trial in range(100):
        rng = stream(trial, "null")
        y = (rng.random(200) < 0.3).astype(np.int8)
        clusters = np.arange(200) // 2
        sides = [
            WeightedFinding(1 / (1 + np.exp(-(rng.normal(size=200) + y))), y, clusters, 100, None) for _ in range(2)
        ]
        weights = resample_weights(100, 0, 200, trial)
        a, b = (side.measure(weights, ["AUC"])["AUC"][:, None] for side in sides)
        point = float(np.subtract(*(side.measure(np.ones((100, 1)), ["AUC"])["AUC"][0] for side in sides)))
        row = difference_interval(a, b, point)
        called += row["p"] < 0.05
        outside += row["shown"]
    assert 1 <= called <= 13
    assert 1 <= outside <= 13


def test_counts_too_large_for_the_short_form_take_the_long_one(monkeypatch, made_up):
    table, labels = made_up()
    before = evaluate(table, labels, bootstraps=20)
    monkeypatch.setattr("hilum.evaluation.weighted.FLOAT32_INTEGERS", 1)
    assert evaluate(table, labels, bootstraps=20) == before
    # beyond 2**24 a sum in float32 stands still; one patient of many copies, whose AP is known by hand
    monkeypatch.undo()
    finding = WeightedFinding(np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1], np.int8), np.arange(3), 3, None)
    many = np.array([[1.0], [2.0**25 + 1], [1.0]])
    assert finding.measure(many, ["AP"])["AP"][0] == (1 + 2 / (2.0**25 + 3)) / 2
    assert finding.measure(many, ["AUC"])["AUC"][0] == 0.5
