import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from hilum.core.errors import PredictionError, StageError, UnknownNameError
from hilum.evaluation.calibration import (
    FEW_POSITIVES,
    METHODS,
    Calibrator,
    check_out_of_sample,
    describe_items,
    fingerprint,
    read_calibrator,
    write_calibrator,
)
from hilum.evaluation.calibrators import CALIBRATORS, IDENTITY
from hilum.evaluation.metrics import average_precision, expected_calibration_error, f1_at, roc_auc
from hilum.evaluation.studies import mean_over_studies

PREVALENCE = np.array([0.4, 0.1, 0.02, 0.004])
GROUPS = {"A": "head", "B": "medium", "C": "medium", "D": "tail"}


def miscalibrated(count, seed, digits=17):
    """Scores whose true posterior is known: logit(score) = 1.8 * logit(posterior) + 1.5."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 4)) < PREVALENCE).astype(np.int8)
    evidence = rng.normal(size=labels.shape) * 1.5 + 2.25 * labels - 1.125
    posterior = np.log(PREVALENCE / (1 - PREVALENCE)) + evidence
    return np.round(expit(1.8 * posterior + 1.5), digits), labels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("digits", [2, 17])
def test_calibration_lowers_ece_and_leaves_ap_and_auc(method, digits):
    p, y = miscalibrated(4000, 0, digits)
    calibrator = Calibrator.fit(p, y, "ABCD", GROUPS, method)
    q, truth = miscalibrated(8000, 1, digits)
    mapped = calibrator.apply(q)
    for c in range(4):
        assert average_precision(mapped[:, c], truth[:, c]) == average_precision(q[:, c], truth[:, c])
        assert roc_auc(mapped[:, c], truth[:, c]) == roc_auc(q[:, c], truth[:, c])
        before, after = (expected_calibration_error(v[:, c], truth[:, c]) for v in (q, mapped))
        assert after < before or before < 0.005
    assert expected_calibration_error(mapped[:, 0], truth[:, 0]) < (0.03 if digits > 2 else 0.05)  # 0.00 says little
    np.testing.assert_allclose(mapped.mean(axis=0), PREVALENCE, rtol=0.5)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(CALIBRATORS)),
    st.lists(st.integers(-2000, 2000), min_size=2, max_size=50),
    st.floats(0.05, 20),
    st.floats(-10, 10),
)
def test_every_map_is_strictly_increasing(kind, logits, slope, intercept):
    """On scores from float32 logits between -20 and 20, a hundredth apart, with 0 and 1 added."""
    p = np.append(expit(np.array(logits, np.float64) / 100), [0.0, 1.0])
    if kind == "isotonic":
        rng = np.random.default_rng(len(logits))
        parameters = CALIBRATORS[kind].fit(rng.random(60), rng.random(60) < 0.3, IDENTITY)
    else:
        parameters = {"slope": slope, "intercept": intercept}
    mapped = CALIBRATORS[kind].apply(parameters, p)
    assert ((mapped >= 0) & (mapped <= 1)).all()
    values, place = np.unique(p, return_inverse=True)
    of_values = CALIBRATORS[kind].apply(parameters, values)
    resolvable = np.diff(values) > 1e-9
    assert (np.diff(of_values)[resolvable] > 0).all()
    np.testing.assert_array_equal(of_values[place], mapped)


def test_one_item_does_not_change_another():
    p, y = miscalibrated(3000, 0)
    calibrator = Calibrator.fit(p, y, "ABCD", GROUPS)
    np.testing.assert_array_equal(calibrator.apply(p)[7:8], calibrator.apply(p[7:8]))


def test_auto_chooses_by_the_rarer_class():
    rng = np.random.default_rng(0)
    positives = [1500, 300, 50, 5, 0]
    y = np.zeros((6000, 5), np.int8)
    for column, count in enumerate(positives):
        y[rng.permutation(6000)[:count], column] = 1
    p = expit(rng.normal(size=y.shape) + y)
    maps = Calibrator.fit(p, y, "ABCDE", {"A": "head", "B": "medium", "C": "tail", "D": "tail", "E": "tail"}).maps
    assert [maps[name]["kind"] for name in "ABC"] == ["isotonic", "platt", "temperature_bias"]
    assert [maps[name]["flag"] for name in "ABCDE"] == [None, None, None, FEW_POSITIVES, FEW_POSITIVES]
    assert maps["D"]["parameters"] == maps["E"]["parameters"]
    assert maps["C"]["parameters"] != maps["D"]["parameters"]
    inverted = Calibrator.fit(1 - p, 1 - y, "ABCDE").maps
    assert [inverted[name]["kind"] for name in "ABC"] == ["isotonic", "platt", "temperature_bias"]


def test_platt_finds_the_planted_parameters():
    p, y = miscalibrated(60_000, 3)
    parameters = Calibrator.fit(p, y, "ABCD", method="platt").maps["A"]["parameters"]
    assert parameters["slope"] == pytest.approx(1 / 1.8, rel=0.05)
    assert parameters["intercept"] == pytest.approx(-1.5 / 1.8, abs=0.05)


def test_few_positives_are_held_to_the_group():
    """A rare finding moves from its group's parameters to its own as its positives grow."""
    p, y = miscalibrated(40_000, 4)
    group = Calibrator.fit(p, y, "ABCD", method="platt").maps["C"]["parameters"]["slope"]
    flipped = np.column_stack([p[:, 1], expit(0.2 * np.log(p[:, 1] / (1 - p[:, 1])))])
    labels = np.column_stack([y[:, 1], y[:, 1]])
    distance = []
    for rows in (300, 3000):
        few = labels.copy()
        few[rows:, 1] = -1
        slope = Calibrator.fit(flipped, few, "AB", method="temperature_bias").maps["B"]["parameters"]["slope"]
        distance.append(abs(np.log(slope / (5 / 1.8))))
    assert distance[1] < distance[0]
    assert group > 0


def test_a_worse_than_random_finding_keeps_its_order():
    rng = np.random.default_rng(0)
    p = rng.random((500, 1))
    y = (p[:, :1] < rng.random((500, 1))).astype(np.int8)
    calibrator = Calibrator.fit(p, y, "A", method="platt")
    assert calibrator.maps["A"]["parameters"]["slope"] > 0
    assert roc_auc(calibrator.apply(p)[:, 0], y[:, 0]) == roc_auc(p[:, 0], y[:, 0])


def test_json_round_trip_is_exact(tmp_path):
    p, y = miscalibrated(3000, 0)
    p[:, 2] = np.nan
    calibrator = Calibrator.fit(p, y, "ABCD", GROUPS, uids=[f"u{i}" for i in range(3000)], stage="study", unit="image")
    write_calibrator(calibrator, tmp_path / "c.json")
    back = read_calibrator(tmp_path / "c.json")
    assert back == calibrator
    np.testing.assert_array_equal(back.apply(p), calibrator.apply(p))
    assert np.isnan(calibrator.apply(p)[:, 2]).all()
    assert "C" not in calibrator.thresholds
    assert "NaN" not in (tmp_path / "c.json").read_text()


def test_a_damaged_calibrator_is_refused(tmp_path):
    p, y = miscalibrated(300, 0)
    values = Calibrator.fit(p, y, "ABCD").to_dict()
    for change, message in (
        ({"format": "other"}, "format"),
        ({"findings": list("ABDC")}, "hash"),
        ({"maps": {**values["maps"], "A": {**values["maps"]["A"], "kind": "magic"}}}, "magic"),
    ):
        with pytest.raises((PredictionError, UnknownNameError), match=message):
            Calibrator.from_dict(json.loads(json.dumps({**values, **change})))
    del values["thresholds"]
    with pytest.raises(PredictionError, match="thresholds"):
        Calibrator.from_dict(values)
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(PredictionError, match="JSON object"):
        read_calibrator(tmp_path / "c.json")
    with pytest.raises(PredictionError, match="does not exist"):
        read_calibrator(tmp_path / "absent.json")


def test_raw_and_calibrated_thresholds_make_the_same_decisions_where_positives_suffice():
    p, y = miscalibrated(4000, 0)
    calibrator = Calibrator.fit(p, y, "ABCD", GROUPS)
    mapped = calibrator.apply(p)
    for c, name in enumerate("AB"):
        assert f1_at(p[:, c], y[:, c], calibrator.raw_thresholds[name]["f1"]) == f1_at(
            mapped[:, c], y[:, c], calibrator.thresholds[name]["f1"]
        )


def test_apply_to_matches_findings_by_name_and_marks_the_file(made_up):
    table, labels = made_up(count=300, patients=90)
    calibrator = Calibrator.fit(table.probabilities, labels, table.findings, uids=table.image_uid.tolist())
    straight = calibrator.apply_to(table)
    mixed = calibrator.apply_to(table.select(["D", "A"]))
    np.testing.assert_array_equal(mixed.probabilities, straight.select(["D", "A"]).probabilities)
    np.testing.assert_array_equal(straight.probabilities, calibrator.apply(table.probabilities))
    assert straight.stage == "calibrated"
    assert straight.metadata["calibrated_from"] == "raw"
    assert straight.metadata["thresholds"]["A"] == calibrator.thresholds["A"]
    with pytest.raises(PredictionError, match="'Z'"):
        calibrator.apply_to(dataclasses.replace(table, findings=("A", "B", "C", "Z")))


def test_another_stage_or_unit_is_refused(made_up):
    table, labels = made_up(count=100)
    calibrator = Calibrator.fit(table.probabilities, labels, table.findings)
    with pytest.raises(StageError, match="study predictions per image"):
        calibrator.apply_to(mean_over_studies(table))
    with pytest.raises(StageError, match="per study"):
        calibrator.apply_to(mean_over_studies(table, unit="study"))
    with pytest.raises(StageError, match="calibrated"):
        calibrator.apply_to(calibrator.apply_to(table))
    with pytest.raises(StageError, match="already"):
        Calibrator.fit(table.probabilities, labels, table.findings, stage="calibrated")


def test_judging_on_the_fitted_items_is_refused(made_up):
    table, _ = made_up()
    fitted_on = describe_items(table.image_uid.tolist())
    assert fitted_on["items"] == 60
    with pytest.raises(StageError, match=r"fitted on 60 of the 60"):
        check_out_of_sample(table, fitted_on, "It")
    with pytest.raises(StageError, match=rf"1 of the 60.*{table.image_uid[9]}"):
        check_out_of_sample(table, describe_items(["other", str(table.image_uid[9])]), "It")
    check_out_of_sample(table, describe_items(["other", "ids"]), "It")


def test_fingerprint_is_of_the_set():
    assert fingerprint(["a", "b"]) == fingerprint(["b", "a"]) != fingerprint(["a", "c"])


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused():
    p, y = miscalibrated(50, 0)
    with pytest.raises(UnknownNameError, match="platt"):
        Calibrator.fit(p, y, "ABCD", method="plat")
    with pytest.raises(PredictionError, match="one label per probability"):
        Calibrator.fit(p, y[:-1], "ABCD")
    calibrator = Calibrator.fit(p, y, "ABCD")
    with pytest.raises(PredictionError, match="4 findings"):
        calibrator.apply(p[:, :3])
    with pytest.raises(PredictionError, match=r"\[0, 1\]"):
        calibrator.apply(p + 1)
