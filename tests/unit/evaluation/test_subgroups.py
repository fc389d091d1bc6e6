"""Each group beside the rest: against scikit-learn on the rows of each side, and against planted gaps."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from hilum.core.errors import ConfigError
from hilum.evaluation.bootstrap import clusters_of, resample_weights
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.subgroups import MAX_LEVELS, age_band, choose_attributes, levels, subgroups


def of_patients(table, choices):
    """One value per patient, as text per item."""
    patients = sorted(set(table.patient_id.tolist()))
    values = dict(zip(patients, (choices[index % len(choices)] for index in range(len(patients))), strict=True))
    return np.array([values[name] for name in table.patient_id.tolist()])


@pytest.mark.parametrize(
    ("value", "band"),
    [("0", "0-17"), ("17.9", "0-17"), ("18", "18-39"), ("39", "18-39"), ("40.0", "40-59"), ("79", "60-79"),
     ("80", "80+"), ("130", "80+"), ("131", ""), ("-1", ""), ("", ""), ("old", ""), ("nan", ""), ("061Y", "")],
)  # fmt: skip
def test_ages_are_put_into_bands(value, band):
    assert age_band(value) == band


def test_values_become_groups():
    assert levels("sex", np.array([" F", "M", "", "None", "unknown", "O"])).tolist() == ["F", "M", "", "", "", "O"]
    views = np.array(["AP", "AP_SUPINE", "PA", "LATERAL", "LL", "PA+LATERAL", "UNKNOWN", "", "OBLIQUE"])
    kinds = ["AP", "AP", "PA", "lateral", "lateral", "PA+lateral", "", "", "other"]
    assert levels("view", views).tolist() == kinds
    assert levels("age", np.array(["20+45", "20+21", "20+"])).tolist() == ["18-39+40-59", "18-39", "18-39"]
    assert levels("age_years", np.array(["30.0"])).tolist() == ["18-39"]
    with pytest.raises(ConfigError, match=f"found {MAX_LEVELS + 1} different values"):
        levels("accession", np.arange(MAX_LEVELS + 1).astype(str))


def test_each_side_is_what_scikit_learn_says_of_its_rows(made_up):
    table, labels = made_up(count=400, patients=120)
    labels[::9, 1] = -1
    sex = of_patients(table, ["F", "F", "M"])
    group = subgroups(table, labels, {"sex": sex}, bootstraps=0)["sex"]["groups"]["F"]
    for side, rows in ((group["values"], sex == "F"), (group["rest"], sex == "M")):
        known = [(labels[rows, c], table.probabilities[rows, c]) for c in range(4)]
        known = [(y[y >= 0], p[y >= 0]) for y, p in known]
        assert side["mAUC"] == pytest.approx(np.mean([roc_auc_score(y, p) for y, p in known]), abs=1e-12)
        assert side["mAP"] == pytest.approx(np.mean([average_precision_score(y, p) for y, p in known]), abs=1e-12)
        macro = evaluate(table.rows(np.flatnonzero(rows)), labels[rows])["macro"]
        for name in ("mF1@0.5", "mECE_standard"):
            assert side[name] == pytest.approx(macro[name], abs=1e-12)
    assert group["gap"]["mAUC"]["difference"] == pytest.approx(group["values"]["mAUC"] - group["rest"]["mAUC"])
    assert (group["n_items"], group["n_patients"]) == ((sex == "F").sum(), len(set(table.patient_id[sex == "F"])))
    assert group["ci95"] == {}
    assert group["gap"]["mAUC"]["low"] is None


def test_the_interval_of_a_gap_is_that_of_recomputation_on_the_same_resamples(made_up):
    table, labels = made_up(count=300, patients=80)
    sex = of_patients(table, ["F", "M"])
    group = subgroups(table, labels, {"sex": sex}, bootstraps=20, seed=3)["sex"]["groups"]["F"]
    clusters = clusters_of(table)
    gaps, own = [], []
    for number in range(20):
        weights = resample_weights(int(clusters.max()) + 1, number, number + 1, 3)[clusters, 0]
        sides = [
            [
                roc_auc_score(labels[rows, c], table.probabilities[rows, c], sample_weight=weights[rows])
                for c in range(4)
            ]
            for rows in (sex == "F", sex == "M")
        ]
        own.append(np.mean(sides[0]))
        gaps.append(np.mean(sides[0]) - np.mean(sides[1]))
    level = np.quantile(own, [0.025, 0.975]) - (np.mean(own) - group["values"]["mAUC"])
    assert group["ci95"]["mAUC"] == pytest.approx(level.tolist(), abs=1e-12)
    row = group["gap"]["mAUC"]
    gap = 2 * row["difference"] - np.quantile(gaps, [0.975, 0.025])
    assert [row["low"], row["high"]] == pytest.approx(gap.tolist(), abs=1e-12)


def test_a_planted_gap_is_shown_and_none_is_not(made_up):
    table, labels = made_up(count=1500, patients=500)
    sex, coin = of_patients(table, ["F", "M"]), of_patients(table, ["a", "b", "c", "d", "d"])
    values = table.probabilities.copy()
    values[sex == "F"] = np.random.default_rng(0).random((int((sex == "F").sum()), 4))
    result = subgroups(table.replace(values), labels, {"sex": sex, "coin": coin}, bootstraps=200)
    gap = result["sex"]["groups"]["F"]["gap"]["mAUC"]
    assert gap["shown"]
    assert gap["high"] < -0.2
    assert result["sex"]["groups"]["M"]["gap"]["mAUC"]["difference"] == pytest.approx(-gap["difference"])
    assert not result["coin"]["groups"]["d"]["gap"]["mAUC"]["shown"]


def test_small_groups_are_listed_and_unrecorded_ones_are_in_no_rest(made_up):
    table, labels = made_up(count=600, patients=200)
    sex = of_patients(table, ["F"] * 10 + ["M"] * 9 + [""])
    few = np.array(["O" if name in ("d/p3", "d/p7") else value for name, value in zip(table.patient_id, sex)])  # noqa: B905
    result = subgroups(table, labels, {"sex": few}, bootstraps=3)["sex"]
    assert result["too_few"] == {"O": 2}
    assert set(result["groups"]) == {"F", "M"}
    assert result["unrecorded"] == (few == "").sum() > 0
    without = few != ""
    again = subgroups(table.rows(np.flatnonzero(without)), labels[without], {"sex": few[without]}, bootstraps=0)["sex"]
    assert result["groups"]["F"]["rest"] == again["groups"]["F"]["rest"]  # "" and nothing else was left out
    alone = subgroups(table, labels, {"sex": np.where(few == "O", "O", "F")}, bootstraps=3)["sex"]
    assert alone["groups"]["F"]["gap"] == {}  # two people are no rest
    assert alone["groups"]["F"]["values"]["mAUC"] is not None
    assert subgroups(table, labels, {"sex": few}, bootstraps=0, min_patients=2)["sex"]["too_few"] == {}


def test_both_sides_are_taken_over_the_findings_that_both_have(made_up):
    table, labels = made_up(count=400, patients=120)
    sex = of_patients(table, ["F", "M"])
    labels[sex == "F", 2] = 0  # no such case among women
    labels[sex == "M", 3] = np.where(np.cumsum(labels[sex == "M", 3]) > 2, 0, labels[sex == "M", 3])
    values = table.probabilities.copy()
    values[:, 0] = np.nan
    result = subgroups(table.replace(values), labels, {"sex": sex}, bootstraps=5, min_positives=3)["sex"]["groups"]
    assert [part["findings"] for part in result.values()] == [["B"], ["B"]]
    assert result["F"]["values"]["mAUC"] == result["M"]["rest"]["mAUC"]
    none = subgroups(table, np.zeros_like(labels), {"sex": sex}, bootstraps=5)["sex"]["groups"]["F"]
    assert none["findings"] == []
    assert none["values"]["mAUC"] is None


def test_misses_and_under_diagnosis_at_the_stored_thresholds(made_up):
    table, labels = made_up(count=400, patients=120)
    import dataclasses

    table = dataclasses.replace(table, findings=("Edema", "Mass", "Normal", "Hernia"))
    sex = of_patients(table, ["F", "M"])
    cuts = {"Edema": 0.6, "Normal": 0.4}
    group = subgroups(table, labels, {"sex": sex}, cuts, bootstraps=20)["sex"]["groups"]["M"]
    p, y = table.probabilities[sex == "M"], labels[sex == "M"]
    missed = [(p[y[:, c] == 1, c] <= cut).mean() for c, cut in ((0, 0.6), (2, 0.4))]
    assert group["values"]["mFNR@tuned"] == pytest.approx(np.mean(missed))
    assert group["values"]["FPR_normal"] == pytest.approx((p[y[:, 2] == 0, 2] > 0.4).mean())
    low, high = group["ci95"]["FPR_normal"]
    assert low < group["values"]["FPR_normal"] < high
    without = subgroups(table, labels, {"sex": sex}, None, bootstraps=2)["sex"]["groups"]["M"]
    assert without["values"]["mFNR@tuned"] is None
    assert without["values"]["FPR_normal"] is None


def test_row_order_does_not_matter(made_up):
    table, labels = made_up(count=300, patients=90)
    sex = of_patients(table, ["F", "M", "M"])
    order = np.random.default_rng(0).permutation(300)
    a = subgroups(table, labels, {"sex": sex}, bootstraps=20)["sex"]["groups"]["F"]
    b = subgroups(table.rows(order), labels[order], {"sex": sex[order]}, bootstraps=20)["sex"]["groups"]["F"]
    assert b["values"] == pytest.approx(a["values"], abs=1e-12)
    assert b["gap"]["mAUC"] == pytest.approx(a["gap"]["mAUC"], abs=1e-9)


def test_which_attributes_are_judged(made_up):
    table, _ = made_up(count=60)
    sex = of_patients(table, ["F", "M"])
    recorded = {"sex": sex, "age": np.full(60, "44"), "view": np.full(60, ""), "scanner": sex}
    assert list(choose_attributes(table, recorded, None)) == ["sex", "view"]  # one age, one dataset
    assert choose_attributes(table, recorded, None)["view"].tolist() == table.view.tolist()
    assert list(choose_attributes(table, recorded, ["scanner", "dataset"])) == ["scanner", "dataset"]
    assert choose_attributes(table, recorded, ()) == {}
    with pytest.raises(ConfigError, match="--by race: nothing is recorded"):
        choose_attributes(table, recorded | {"race": np.full(60, "")}, ["race"])
    many = {"sex": np.array([f"code {n}" for n in range(60)])}  # asked for by nobody: no reason to judge nothing
    assert list(choose_attributes(table, many, None)) == ["view"]
    with pytest.raises(ConfigError, match="--by sex: found 60"):
        choose_attributes(table, many, ["sex"])
