import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.data.labels import findings_hash
from hilum.evaluation.calibration import (
    FEW_POSITIVES,
    METHODS,
    NO_LABELS,
    Calibrator,
    check_out_of_sample,
    describe_items,
    fingerprint,
    read_calibrator,
    steps_of,
    write_calibrator,
)
from hilum.evaluation.calibrators import CALIBRATORS, IDENTITY
from hilum.evaluation.definitions import log_loss
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.map_choice import cross_fit, deal_patients
from hilum.evaluation.metrics import average_precision, expected_calibration_error, f1_at, roc_auc
from hilum.evaluation.predictions import Predictions
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
    calibrator = Calibrator.fit(p, y, "ABCD", GROUPS, method, patients=np.arange(4000) // 2)
    q, truth = miscalibrated(8000, 1, digits)
    mapped = calibrator.apply(q)
    for c in range(4):
        assert average_precision(mapped[:, c], truth[:, c]) == average_precision(q[:, c], truth[:, c])
        assert roc_auc(mapped[:, c], truth[:, c]) == roc_auc(q[:, c], truth[:, c])
    if method in ("identity", "temperature"):  # an intercept was planted
        return
    for c in range(4):
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
    elif kind == "beta":
        parameters = {"a": slope, "b": 1 / slope, "c": intercept}
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
    flipped = np.column_stack([p[:, 1], expit(0.2 * np.log(p[:, 1] / (1 - p[:, 1])))])
    labels = np.column_stack([y[:, 1], y[:, 1]])
    distance = []
    for rows in (300, 3000):
        few = labels.copy()
        few[rows:, 1] = -1
        slope = Calibrator.fit(flipped, few, "AB", method="temperature_bias").maps["B"]["parameters"]["slope"]
        distance.append(abs(np.log(slope / (5 / 1.8))))
    assert distance[1] < distance[0]


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
        ({"maps": []}, "maps: not as it was written"),
        ({"maps": {"A": values["maps"]["A"]}}, "maps: not as it was written"),
        ({"maps": {**values["maps"], "A": {"kind": "platt"}}}, "maps: not as it was written"),
        ({"fitted_on": {"items": 3}, "thresholds": {"A": 0.5}}, "fitted_on, thresholds: not as it was written"),
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
    for value in (np.nan, np.inf, -0.1, 1.5):
        damaged = p.copy()
        damaged[7, 2] = value
        with pytest.raises(PredictionError, match="item 7 of 'C'"):
            Calibrator.fit(damaged, y, "ABCD")
    with pytest.raises(UnknownNameError, match="spec_at_sens90"):
        Calibrator.fit(p, y, "ABCD", points=["sens_at_spec"])
    with pytest.raises(ConfigError, match="whose each item is"):
        Calibrator.fit(p, y, "ABCD", method="cross_fitted")


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_thousands_of_scores_with_extremes_and_ties_keep_ap_and_auc(kind):
    """Log-odds from -600 to 36, with 0, 1, repeated scores, and neighbours that differ in the ninth digit alone."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.uniform(-600, 0, 2000), rng.normal(0, 3, 3000), rng.uniform(20, 36, 200)])
    p = np.concatenate([expit(logits), expit(rng.integers(-5, 5, 500)), [0.0, 1.0, 0.0, 1.0]])
    p = np.concatenate([p, p[2000:4000] * (1 - 1e-9)])
    y = (rng.random(len(p)) < 0.3 + 0.4 * p).astype(np.int8)
    fitted = [expit(rng.normal(scale=scale, size=400) + shift) for scale, shift in ((0.3, 0), (8, -3), (3, 4))]
    for scores in fitted:
        labels = rng.random(400) < np.clip(scores**2 + 0.05, 0, 1)
        one = CALIBRATORS[kind]
        parameters = one.fit(scores, labels, one.pool([(scores, labels)]))
        mapped = one.apply(parameters, p)
        assert abs(average_precision(mapped, y) - average_precision(p, y)) < 1e-12
        assert abs(roc_auc(mapped, y) - roc_auc(p, y)) < 1e-12
        np.testing.assert_array_equal(np.unique(mapped, return_inverse=True)[1], np.unique(p, return_inverse=True)[1])
        if kind != "isotonic":  # whose ends are those of its steps
            assert mapped[p == 0].max() == 0
            assert mapped[p == 1].min() == 1


def loss_at(parameters, columns, y, centre, shrinkage):
    """Negative log posterior, summed over items, written again."""
    slopes, rest = np.exp(parameters[: len(columns)]), parameters[len(columns) :]
    q = expit(sum(s * x for s, x in zip(slopes, columns, strict=True)) + (rest[0] if len(rest) else 0.0))
    return -np.log(np.where(y, q, 1 - q)).sum() + 0.5 * shrinkage * ((parameters - centre) ** 2).sum()


@pytest.mark.parametrize(("kind", "shrinkage"), [("temperature", 20.0), ("beta", 20.0)])
def test_fits_are_the_most_likely(kind, shrinkage):
    """Another optimiser, on the posterior written again, finds the same."""
    rng = np.random.default_rng(5)
    p = expit(rng.normal(-1, 1.5, 600))
    y = rng.random(600) < p**1.7
    if kind == "beta":
        found = CALIBRATORS[kind].fit(p, y, {"a": 1.2, "b": 0.8, "c": 0.1})
        columns, centre = [np.log(p), -np.log(1 - p)], np.array([np.log(1.2), np.log(0.8), 0.1])
        values = [np.log(found["a"]), np.log(found["b"]), found["c"]]
    else:
        found = CALIBRATORS[kind].fit(p, y, {"slope": 1.3, "intercept": 0.0})
        columns, centre, values = [np.log(p / (1 - p))], np.array([np.log(1.3)]), [np.log(found["slope"])]
        assert found["intercept"] == 0
    best = minimize(loss_at, centre, args=(columns, y, centre, shrinkage), method="Nelder-Mead",
                    options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000, "maxfev": 4000}).x  # fmt: skip
    np.testing.assert_allclose(values, best, atol=2e-4)


def test_beta_finds_a_planted_map():
    """Scores whose posterior is a beta map of them, which no slope and intercept can make straight."""
    rng = np.random.default_rng(1)
    p = rng.beta(0.8, 2, 60_000)
    y = rng.random(60_000) < expit(2.0 * np.log(p) - 0.5 * np.log1p(-p) + 0.4)
    found = CALIBRATORS["beta"].fit(p, y, {"a": 1.0, "b": 1.0, "c": 0.0})
    assert (found["a"], found["b"], found["c"]) == pytest.approx((2.0, 0.5, 0.4), abs=0.1)


@pytest.mark.parametrize("method", ["temperature", "temperature_bias", "beta", "isotonic", "platt"])
def test_rare_findings_are_drawn_to_their_group(method):
    """The same few positives of a finding: its map lies nearer to that of a group with much data than when alone."""
    p, y = miscalibrated(6000, 2)
    wide = np.column_stack([p[:, 0], expit(0.3 * np.log(p[:, 0] / (1 - p[:, 0])))])
    labels = np.column_stack([y[:, 0], y[:, 0]])
    labels[120:, 1] = -1  # about 48 positives
    grid = np.linspace(0.05, 0.95, 19)

    def mapped(maps, name):
        return CALIBRATORS[maps[name]["kind"]].apply(maps[name]["parameters"], grid)

    together = Calibrator.fit(wide, labels, "AB", method=method).maps
    alone = Calibrator.fit(wide, labels, "AB", {"A": "head", "B": "tail"}, method=method).maps
    shared = Calibrator.fit(wide[:, :1], labels[:, :1], "A", method=method).maps
    far = np.abs(mapped(alone, "B") - mapped(shared, "A")).mean()
    assert np.abs(mapped(together, "B") - mapped(shared, "A")).mean() < far


def test_a_calibrator_of_an_earlier_version_maps_as_it_did():
    """No share, no extremes, no cross-fitting, three operating points: written out, with what it gave then."""
    old = {
        "format": "hilum-calibrator-1", "stage": "raw", "unit": "image", "findings": ["A", "B"],
        "findings_sha256": findings_hash(["A", "B"]), "fitted_on": None,
        "maps": {
            "A": {"kind": "isotonic", "parameters": {"x": [0.1, 0.5, 0.9], "y": [0.0, 0.2, 0.6]}, "positives": 2000,
                  "known": 9000, "group": "head", "flag": None, "threshold_shrunk": False},
            "B": {"kind": "platt", "parameters": {"slope": 0.5, "intercept": 1.0}, "positives": 200, "known": 9000,
                  "group": "head", "flag": None, "threshold_shrunk": False},
        },
        "thresholds": {name: {"f1": 0.2, "youden": 0.1, "sens_at_spec95": 0.3} for name in "AB"},
        "raw_thresholds": {name: {"f1": 0.2, "youden": 0.1, "sens_at_spec95": 0.3} for name in "AB"},
    }  # fmt: skip
    calibrator = Calibrator.from_dict(old)
    assert calibrator.to_dict() == old
    np.testing.assert_allclose(
        calibrator.apply(np.array([[0.3, 0.2], [0.05, 0.9]])),
        [[0.999 * 0.1 + 0.001 * 0.3, expit(0.5 * np.log(0.25) + 1)], [0.001 * 0.05, expit(0.5 * np.log(9) + 1)]],
        rtol=1e-14,
    )


def test_a_finding_without_a_label_takes_its_groups_map_and_says_so():
    p, y = miscalibrated(3000, 6)
    y[:, 1] = -1
    calibrator = Calibrator.fit(p, y, "ABCD", dict.fromkeys("ABCD", "head"))
    assert calibrator.maps["B"]["flag"] == NO_LABELS
    assert calibrator.maps["B"]["known"] == 0
    assert calibrator.maps["B"]["parameters"] == calibrator.maps["D"]["parameters"]
    assert calibrator.provenance()["flags"]["B"] == NO_LABELS
    nothing = Calibrator.fit(p, np.full_like(y, -1), "ABCD")
    np.testing.assert_array_equal(nothing.apply(p), p)
    assert set(nothing.provenance()["flags"].values()) == {NO_LABELS}


def test_folds_keep_patients_whole_and_never_change():
    patients = np.array([f"p{i}" for i in np.random.default_rng(0).integers(0, 40, 300)])
    fold = deal_patients(patients, 5)
    assert all(len(set(fold[patients == one])) == 1 for one in np.unique(patients))
    assert sorted(np.bincount(fold[np.unique(patients, return_index=True)[1]]).tolist()) == [8] * 5
    shuffled = np.random.default_rng(1).permutation(300)
    np.testing.assert_array_equal(deal_patients(patients[shuffled], 5), fold[shuffled])
    with pytest.raises(PredictionError, match="found 3"):
        deal_patients([*patients[:1].tolist(), "x", "y"], 5)
    with pytest.raises(ConfigError, match="2 folds"):
        deal_patients(patients, 1)


def test_cross_fitting_maps_an_item_by_other_patients_alone():
    """A patient's own labels do not reach the map of its items; another patient's do."""
    p, y = miscalibrated(1500, 7)
    patients = np.arange(1500) // 3
    fold = deal_patients(patients, 5)
    options = ("ABCD", GROUPS, dict.fromkeys("ABCD", "temperature_bias"), fold)
    before = cross_fit(p, y, *options)
    turned = y.copy()
    turned[fold == 2] = 1 - turned[fold == 2]
    after = cross_fit(p, turned, *options)
    np.testing.assert_array_equal(after[fold == 2], before[fold == 2])
    assert (after[fold != 2] != before[fold != 2]).all()


def test_the_report_is_of_patients_held_out():
    """Labels without any relation to the scores: a map fitted on them looks better than it is; held out it does not."""
    rng = np.random.default_rng(8)
    patients = np.arange(300)
    p, y = rng.random((300, 1)), (rng.random((300, 1)) < 0.5).astype(np.int8)
    calibrator = Calibrator.fit(p, y, "A", method="isotonic", patients=patients)
    fitted, held_out = (log_loss(v[:, 0], y[:, 0]) for v in (calibrator.apply(p), p))
    before, after = calibrator.cross_fitted["findings"]["A"]["log_loss"]
    assert before == held_out
    assert after > fitted
    assert calibrator.cross_fitted["folds"] == 5
    assert calibrator.cross_fitted["macro"]["log_loss"] == [before, after]
    assert Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict()))) == calibrator
    assert "cross_fitted" not in Calibrator.fit(p, y, "A").to_dict()


def test_cross_fitting_chooses_the_kind_that_was_planted():
    """Straight scores: none or a slope near 1; a slope; a slope and a shift; a beta map."""
    rng = np.random.default_rng(9)
    p = rng.beta(1.0, 2.0, (8000, 4))
    x = np.log(p / (1 - p))
    posterior = np.stack(
        [
            p[:, 0],
            expit(0.3 * x[:, 1]),
            expit(0.5 * x[:, 2] - 1),
            expit(0.2 * np.log(p[:, 3]) - 3 * np.log(1 - p[:, 3]) - 2),
        ],
        axis=1,
    )
    y = (rng.random(p.shape) < posterior).astype(np.int8)
    calibrator = Calibrator.fit(p, y, "ABCD", method="cross_fitted", patients=np.arange(8000) // 2)
    kinds = [calibrator.maps[name]["kind"] for name in "ABCD"]
    losses = {name: calibrator.cross_fitted["findings"][name]["log_loss"] for name in "ABCD"}
    assert "identity" not in kinds[1:]
    assert "temperature" not in kinds[2:]  # which cannot shift
    assert kinds[3] in ("beta", "isotonic")  # which can bend
    assert losses["A"][1] <= losses["A"][0]
    for name in "BCD":
        assert losses[name][1] < losses[name][0] - 0.01


def test_a_calibrator_is_for_the_steps_it_was_fitted_after():
    probabilities = np.random.default_rng(0).random((60, 2))
    labels = (np.random.default_rng(1).random((60, 2)) < 0.5).astype(np.int8)
    fitted = Calibrator.fit(probabilities, labels, ("a", "b"), steps={"study_aggregation": "mean"})
    again = Calibrator.from_dict(fitted.to_dict())
    assert again == fitted
    ids = np.array([f"{n:016x}" for n in range(60)])
    text = np.array([""] * 60)
    table = Predictions(ids, ids, text, text, text, text, ("a", "b"), probabilities, {"study_aggregation": "mean"})
    again.apply_to(table)
    with pytest.raises(StageError, match="study aggregation mean; these were made by study aggregation logit_mean"):
        again.apply_to(table.replace(probabilities, study_aggregation="logit_mean"))
    old = Calibrator.from_dict({key: value for key, value in fitted.to_dict().items() if key != "steps"})
    old.apply_to(table.replace(probabilities, study_aggregation="logit_mean"))  # files from before say nothing of steps


def test_a_calibrator_is_for_the_weights_and_the_number_of_members_it_was_fitted_after():
    rng = np.random.default_rng(0)
    ids, text = np.array([f"{n:016x}" for n in range(60)]), np.full(60, "")
    members = [Predictions(ids, ids, text, text, text, text, ("a", "b"), rng.random((60, 2))) for _ in range(3)]
    labels = (rng.random((60, 2)) < 0.5).astype(np.int8)

    def fitted(weights, count=2):
        table = combine_members(members[:count], weights=weights)
        return Calibrator.fit(
            table.probabilities, labels, table.findings, stage="ensemble", steps=steps_of(table)
        ), table  # fmt: skip

    uneven, weighed = fitted([0.75, 0.25])
    uneven.apply_to(weighed)
    uneven.apply_to(combine_members(members[:2], weights=[3, 1]))
    even, equal = fitted(None)
    even.apply_to(combine_members(members[:2], weights=[2, 2]))
    with pytest.raises(StageError, match=r"weights \[0.75, 0.25\]; these were made by ensemble mean, members 2\."):
        uneven.apply_to(equal)
    for other in (weighed, fitted(None, 3)[1]):
        with pytest.raises(StageError, match="these were made by ensemble mean, members"):
            even.apply_to(other)
    old = dataclasses.replace(even, steps={"ensemble": "mean"})
    old.apply_to(weighed)  # files from before say nothing of weights


def test_what_was_imported_without_calibration_is_calibrated_by_one(made_up):
    table, labels = made_up()
    imported = table.replace(table.probabilities, uncalibrated="imported weights", exposure_not_recorded="unknown")
    found = Calibrator.fit(table.probabilities, labels, table.findings).apply_to(imported).metadata
    assert "uncalibrated" not in found
    assert found["exposure_not_recorded"] == "unknown"  # calibration says nothing of what it has seen
