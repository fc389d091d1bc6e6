import json
import math

import numpy as np
import pytest

from hilum.core.errors import PredictionError
from hilum.evaluation.definitions import equal_mass_ece, expected_calibration_error, range_of
from hilum.evaluation.metrics import GROUPS, METRICS, average_precision, evaluate, macro_name, roc_auc

MACROS = [macro_name(metric) for metric in METRICS]


def test_the_names_of_metrics_json(made_up):
    table, labels = made_up()
    result = evaluate(table, labels, dict(zip("ABCD", ["head", "medium", "medium", "tail"], strict=True)), {"A": 0.3})
    assert {"mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard", "mECE_challenge_inferred"} <= result["macro"].keys()
    assert set(result["groups"]) == set(GROUPS)
    wanted = {"AP", "AUC", "F1@0.5", "F1@tuned", "ECE", "positives", "prevalence", "threshold", "ci95"}
    assert wanted <= result["findings"]["A"].keys()
    assert (result["unit"], result["stage"], result["n_images"]) == ("image", "raw", 60)
    assert result["n_patients"] == len(set(table.patient_id.tolist()))
    json.dumps(result, allow_nan=False)


def test_macro_and_groups_are_means_over_their_findings(made_up):
    table, labels = made_up()
    groups = {"A": "head", "B": "tail", "C": "tail"}
    result = evaluate(table, labels, groups)
    ap = {name: average_precision(table.probabilities[:, c], labels[:, c]) for c, name in enumerate("ABCD")}
    assert result["macro"]["mAP"] == pytest.approx(np.mean(list(ap.values())))
    assert result["groups"]["tail"]["mAP"] == pytest.approx((ap["B"] + ap["C"]) / 2)
    assert result["groups"]["medium"]["mAP"] is None
    assert result["groups"]["tail"]["findings"] == ["B", "C"]
    assert result["macro"]["mF1@tuned"] is None


def test_a_finding_without_positives_is_null_and_counted(made_up):
    table, labels = made_up()
    without = evaluate(table.select(["A", "C", "D"]), labels[:, [0, 2, 3]])
    labels[:, 1] = 0
    result = evaluate(table, labels)
    assert result["findings"]["B"]["AP"] is None
    assert result["findings"]["B"]["AUC"] is None
    assert result["excluded"]["no_positives"] == ["B"]
    assert result["macro"]["mAP"] == without["macro"]["mAP"]
    assert result["macro"]["counted"]["mAP"] == 3
    cuts = dict.fromkeys(table.findings, 0.3)
    result, without = (
        evaluate(table, labels, None, cuts, 20),
        evaluate(table.select(["A", "C", "D"]), labels[:, [0, 2, 3]], None, cuts, 20),
    )
    for metric in ("mF1@0.5", "mF1@tuned"):  # an empty class is no 0 in the mean, whose interval leaves it out
        assert result["macro"][metric] == without["macro"][metric]
        assert result["macro"]["ci95"][metric] == without["macro"]["ci95"][metric]
        low, high = result["macro"]["ci95"][metric]
        assert low <= result["macro"][metric] <= high


def test_findings_untrained_or_unlabelled_are_left_out_with_their_names(made_up):
    table, labels = made_up()
    values = table.probabilities.copy()
    values[:, 0] = np.nan
    labels[:, 1] = -1
    result = evaluate(table.replace(values), labels, bootstraps=5)
    assert result["excluded"]["untrained"] == ["A"]
    assert result["excluded"]["no_labels"] == ["B"]
    assert all(result["findings"]["A"][metric] is None for metric in METRICS)
    assert result["macro"]["findings"] == ["C", "D"]
    assert result["macro"]["mAP"] == evaluate(table.select(["C", "D"]), labels[:, 2:])["macro"]["mAP"]


def test_unknown_labels_change_only_their_finding(made_up):
    table, labels = made_up()
    before = evaluate(table, labels)
    labels[:10, 2] = np.where(labels[:10, 2] == 0, -1, -2)
    after = evaluate(table, labels)
    assert after["findings"]["C"]["unknown"] == 10
    assert after["findings"]["C"] != before["findings"]["C"]
    assert {k: v for k, v in after["findings"].items() if k != "C"} == {
        k: v for k, v in before["findings"].items() if k != "C"
    }


def test_few_positives_stay_out_of_the_means_and_are_listed(made_up):
    table, labels = made_up()
    labels[np.flatnonzero(labels[:, 3])[4:], 3] = 0
    result = evaluate(table, labels, min_positives=5)
    assert result["excluded"]["few_positives"] == ["D"]
    assert result["macro"]["findings"] == ["A", "B", "C"]
    assert result["findings"]["D"]["AP"] is not None


def test_row_and_column_order_do_not_matter(made_up):
    table, labels = made_up()
    thresholds = dict.fromkeys("ABCD", 0.4)
    straight = evaluate(table, labels, None, thresholds, bootstraps=20)
    rows, columns = np.random.default_rng(0).permutation(len(table)), [2, 0, 3, 1]
    mixed = evaluate(
        table.rows(rows).select([table.findings[c] for c in columns]), labels[rows][:, columns], None, thresholds, 20
    )
    for name in "ABCD":
        for metric in METRICS:
            assert mixed["findings"][name][metric] == pytest.approx(straight["findings"][name][metric], abs=1e-12)
            assert mixed["findings"][name]["ci95"][metric] == pytest.approx(
                straight["findings"][name]["ci95"][metric], abs=1e-12
            )
    for macro in MACROS:
        assert mixed["macro"][macro] == pytest.approx(straight["macro"][macro], abs=1e-12)


def test_the_same_call_gives_the_same_bytes(made_up):
    table, labels = made_up()
    assert json.dumps(evaluate(table, labels, bootstraps=10)) == json.dumps(evaluate(table, labels, bootstraps=10))


def test_canaries(made_up):
    table, labels = made_up(count=4000, patients=900)
    shuffled = np.random.default_rng(0).permutation(labels, axis=0)
    assert evaluate(table, shuffled)["macro"]["mAUC"] == pytest.approx(0.5, abs=0.03)
    constant = table.replace(np.broadcast_to(labels.mean(axis=0), labels.shape).copy())
    result = evaluate(constant, labels)
    assert result["macro"]["mAUC"] == 0.5
    assert result["macro"]["mAP_normalised"] == pytest.approx(0)
    assert result["macro"]["mECE_standard"] == pytest.approx(0, abs=1e-12)


def test_micro_and_flattened_are_over_all_pairs(made_up):
    table, labels = made_up()
    labels[::7, 1] = -1
    macro = evaluate(table, labels)["macro"]
    pairs = table.probabilities.ravel(), labels.ravel()
    assert macro["micro_AP"] == average_precision(*pairs)
    assert macro["micro_AUC"] == roc_auc(*pairs)
    assert macro["ECE_flattened"] == expected_calibration_error(*pairs)
    assert macro["ECE_flattened_equal_mass"] == equal_mass_ece(*pairs)
    assert macro["ECE_flattened"] < macro["mECE_standard"]  # pooling findings lets their errors cancel


def test_calibration_lines_and_point_metrics_are_per_finding(made_up):
    table, labels = made_up()
    labels[:, 2] = 0
    result = evaluate(table, labels, bootstraps=3)
    assert result["findings"]["C"]["calibration_slope"] is None
    assert result["findings"]["C"]["calibration_intercept"] is None
    assert result["findings"]["A"]["calibration_slope"] > 0
    errors = [result["findings"][name]["ECE_equal_mass"] for name in "ABCD"]
    assert result["macro"]["mECE_equal_mass"] == pytest.approx(np.mean(errors))
    assert "mECE_equal_mass" not in result["macro"]["ci95"]


def test_shapes_must_fit(made_up):
    table, labels = made_up()
    with pytest.raises(PredictionError, match="shape"):
        evaluate(table, labels[:-1])
    with pytest.raises(PredictionError, match="at least one"):
        evaluate(table.rows(np.array([], int)), labels[:0])


def test_the_interval_of_a_metric_without_a_listed_range_is_cut_nowhere(made_up, monkeypatch):
    """As docs/how-to/add-a-metric.md has it: one line in METRICS is enough."""
    monkeypatch.setitem(METRICS, "gap", lambda p, y, _: 10 * float(p[y == 0].mean() - p[y == 1].mean()))
    table, labels = made_up()
    macro = evaluate(table, labels, bootstraps=20)["macro"]
    low, high = macro["ci95"]["mgap"]
    assert low < macro["mgap"] < high < 0


def test_every_metric_stays_in_its_range(made_up):
    table, labels = made_up()
    found = evaluate(table, labels, thresholds=dict.fromkeys("ABCD", 0.3), bootstraps=20)["findings"]
    for metric in METRICS:
        low, high = range_of(metric)
        assert (low, high) != (-math.inf, math.inf)
        assert all(low <= end <= high for one in found.values() for end in one["ci95"][metric])
