"""A planted site: wrong probabilities are repaired, what is useless is called so, what is few is not shown.

Scores are drawn so that the truth is known: logits of two normal classes, whose AUC is Phi(distance / sqrt 2).
"""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.intervals import wilson_interval
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.curves import curves
from hilum.evaluation.metrics import roc_auc
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.recalibration import KEPT, cross_fit_site, recalibrate
from hilum.evaluation.site_judgement import (
    Rules,
    _needed,
    _verdict,
    discrimination,
    drift_of,
    judge_site,
    positives_for_width,
)
from hilum.evaluation.site_report import render_site_report
from hilum.evaluation.thresholds import point_name

FINDINGS = ("Good", "Fair", "Useless", "Rare", "Never")
DISTANCE = {"Good": 2.0, "Fair": 0.75, "Useless": 0.0, "Rare": 2.2}
PREVALENCE = {"Good": 0.3, "Fair": 0.3, "Useless": 0.3, "Rare": 0.02}
GROUPS = {"Good": "head", "Fair": "head", "Useless": "head", "Rare": "tail", "Never": "tail"}


def predictions(values: np.ndarray, patients: list[str], prefix: str = "s") -> Predictions:
    count = len(values)
    return Predictions(
        image_uid=np.array([f"{prefix}{n:05d}" for n in range(count)]), image_id=np.full(count, ""),
        study_id=np.array([f"{prefix}{n}" for n in range(count)]), patient_id=np.array(patients),
        dataset=np.full(count, "here"), view=np.full(count, ""), findings=FINDINGS, probabilities=values,
        metadata={"stage": "study", "unit": "study", "study_aggregation": "mean"},
    )  # fmt: skip


def site(
    count: int, seed: int = 0, prefix: str = "s", distorted: bool = True, rare: int = 6
) -> tuple[Predictions, np.ndarray]:
    """Raw scores that are right elsewhere and here too bold and too high; labels. Every third patient comes twice."""
    rng = np.random.default_rng(seed)
    values, labels = np.full((count, 5), np.nan), np.full((count, 5), -1, np.int8)
    for column, name in enumerate(FINDINGS[:4]):
        y = rng.random(count) < PREVALENCE[name]
        if name == "Rare":
            y = np.isin(np.arange(count), np.arange(0, count, count // rare))
        distance = DISTANCE[name]
        score = rng.normal(0, 1, count) + distance * y
        # the log-odds of the posterior of two normal classes; a slope of 2.5 and a shift of 2 on top are wrong
        odds = max(distance, 0.5) * (score - distance / 2) + logit(PREVALENCE[name])
        values[:, column] = expit(2.5 * odds + 2 if distorted else odds)
        labels[:, column] = y
    patients = [f"p{n - n // 3}" for n in range(count)]
    return predictions(values, patients, prefix), labels


@pytest.fixture(scope="module")
def old() -> Calibrator:
    """Of a validation elsewhere, where the scores are right."""
    table, labels = site(1500, 1, "v", distorted=False, rare=40)
    return Calibrator.fit(
        table.probabilities, labels, FINDINGS, GROUPS, stage="study", unit="study",
        uids=table.image_uid.tolist(), steps={"study_aggregation": "mean"},
    )  # fmt: skip


def judged(table: Predictions, labels: np.ndarray, old: Calibrator | None, rules: Rules, **options):
    points = rules.points
    new = recalibrate(old, table, labels, GROUPS, points)
    after = cross_fit_site(old, table, labels, GROUPS, points)
    before = table if old is None else old.apply_to(table)
    result = judge_site(table, before, after, labels, new, rules, {}, {}, bootstraps=300, **options)
    return result, new, after, before


@pytest.fixture(scope="module")
def planted(old):
    table, labels = site(400, 3)
    point = point_name("spec_at_sens", 0.9)
    return (table, labels, *judged(table, labels, old, Rules(points=(point, "f1"), asked=(point,))))


def test_the_planted_site_is_judged_by_what_was_planted(planted) -> None:
    result = planted[2]
    verdicts = {name: row["verdict"] for name, row in result["findings"].items()}
    assert verdicts == {"Good": "yes", "Fair": "not shown", "Useless": "no", "Rare": "not shown", "Never": "not shown"}
    assert (result["overall"]["verdict"], result["overall"]["without_failures"]) == ("no", "not shown")
    assert result["overall"]["not_judged"] == ["Rare", "Never"]
    for name in ("Good", "Fair", "Useless"):
        auc = result["findings"][name]["AUC"]
        assert auc["low"] < norm.cdf(DISTANCE[name] / np.sqrt(2)) < auc["high"]


def test_calibration_is_repaired_on_patients_that_were_left_out(planted) -> None:
    row = planted[2]["findings"]["Good"]["calibration"]
    for name in ("Brier", "LogLoss"):
        assert row[name]["shown"]
        assert row[name]["difference"] < -0.01
    assert row["ECE"]["after"] < row["ECE"]["before"] / 2
    share = planted[2]["findings"]["Good"]["prevalence"]
    assert row["mean_before"] - share > 0.05
    assert abs(row["mean_after"] - share) < 0.01
    useless = planted[2]["findings"]["Useless"]["calibration"]
    assert abs(useless["gap"]["value"]) < 0.03  # calibrated, and useless all the same


def test_the_order_of_studies_stays(planted) -> None:
    table, labels, _, new, _, before = planted
    applied = new.apply_to(table).probabilities
    for column, name in enumerate(FINDINGS[:4]):
        order = np.argsort(table.probabilities[:, column])
        assert (np.diff(applied[order, column]) > 0).all(), name
        assert roc_auc(applied[:, column], labels[:, column]) == roc_auc(
            before.probabilities[:, column], labels[:, column]
        )


def test_a_new_map_comes_after_the_old_one(planted, old) -> None:
    """The intercept and slope of the log-odds of what the old calibrator says, by hand."""
    table, _, _, new, _, before = planted
    parameters = new.maps["Good"]["parameters"]
    assert set(parameters) == {"slope", "intercept"}
    expected = expit(parameters["slope"] * logit(before.probabilities[:, 0]) + parameters["intercept"])
    np.testing.assert_allclose(new.apply_to(table).probabilities[:, 0], expected, rtol=1e-9)
    assert (old.apply_to(table).probabilities[:, 0] != table.probabilities[:, 0]).all()


def test_few_positives_keep_what_they_had(planted, old) -> None:
    _, _, result, new, after, before = planted
    assert new.maps["Rare"] == {**old.maps["Rare"], "flag": KEPT}
    assert new.thresholds["Rare"] == old.thresholds["Rare"]
    column = FINDINGS.index("Rare")
    np.testing.assert_array_equal(after.probabilities[:, column], before.probabilities[:, column])
    assert result["findings"]["Rare"]["needed"]["judged"] == pytest.approx((20 - 7) / (7 / 400), abs=1)
    assert new.maps["Good"]["after"]["kind"] == old.maps["Good"]["kind"]
    assert new.maps["Never"] is None
    assert Calibrator.from_dict(json.loads(json.dumps(new.to_dict()))) == new


def test_a_model_without_calibration_gets_one(old) -> None:
    table, labels = site(400)
    labels[:, 3] = np.where(np.arange(400) < 3, 1, labels[:, 3])
    new = recalibrate(None, table, labels, GROUPS)
    assert new.maps["Rare"]["flag"] == "uncalibrated: few positives"
    assert "f1" in new.thresholds["Rare"]
    assert "after" not in new.maps["Good"]
    labels[:, 3] = -1
    nothing = recalibrate(None, table, labels, GROUPS)
    assert nothing.maps["Rare"]["kind"] == "identity"
    assert "Rare" not in nothing.thresholds


def test_few_studies_show_nothing(old) -> None:
    table, labels = site(60, 5)
    result, new, *_ = judged(table, labels, old, Rules())
    assert result["overall"]["verdict"] == "not shown"
    assert not result["overall"]["asked"]
    assert {row["verdict"] for row in result["findings"].values()} == {"not shown"}
    assert all(one is None or one["flag"] for one in new.maps.values())
    needed = result["findings"]["Good"]["needed"]["judged"]
    positives = result["findings"]["Good"]["positives"]
    assert needed == int(np.ceil((20 - positives) / (positives / 60)))


def test_a_patient_has_no_part_in_what_is_done_to_it(old) -> None:
    """Other labels of one patient leave its own out-of-sample values as they are, to the last bit."""
    table, labels = site(400)
    first = cross_fit_site(old, table, labels, GROUPS)
    changed = labels.copy()
    mine = np.flatnonzero(table.patient_id == "p10")
    assert len(mine) == 2
    changed[mine, :3] = 1 - changed[mine, :3]
    second = cross_fit_site(old, table, changed, GROUPS)
    np.testing.assert_array_equal(first.probabilities[mine], second.probabilities[mine])
    assert (first.probabilities != second.probabilities)[:, :3].any(axis=0).all()
    for point, called in first.called.items():
        np.testing.assert_array_equal(called[mine], second.called[point][mine])


def test_images_that_the_model_has_met_make_nothing_fit(old) -> None:
    table, labels = site(400)
    result = judged(table, labels, old, Rules(findings=("Good",)), exposed=3)[0]
    assert result["overall"]["verdict"] == "not shown"
    assert result["findings"]["Good"]["reasons"] == ["the model has met these images"]
    assert judged(table, labels, old, Rules(findings=("Good",)))[0]["overall"]["verdict"] == "yes"


@pytest.mark.parametrize("parts", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_random_labels_are_never_called_fit(parts: int) -> None:
    """Four findings a part, whose labels are drawn without looking: none is a yes, most are a no."""
    rng = np.random.default_rng(4)
    count = 300
    base = predictions(np.full((count, 5), 0.5), [f"p{n}" for n in range(count)])
    verdicts = []
    for part in range(parts):
        values, labels = rng.random((count, 4)), (rng.random((count, 4)) < 0.3).astype(np.int8)
        table = dataclasses.replace(base, findings=("a", "b", "c", "d"), probabilities=values)
        new, after = recalibrate(None, table, labels, {}), cross_fit_site(None, table, labels, {})
        result = judge_site(table, table, after, labels, new, Rules(), {}, {}, bootstraps=200, seed=part)
        verdicts += [row["verdict"] for row in result["findings"].values()]
    assert verdicts.count("yes") == 0
    assert verdicts.count("no") >= 4 * parts - 2


def row(low: float, high: float, **changes):
    gap = changes.pop("gap", (-0.01, 0.01))
    sensitivity = changes.pop("sensitivity", (0.85, 0.97))
    shown = {"value": np.mean(sensitivity), "low": sensitivity[0], "high": sensitivity[1]}
    return {
        "trained": True, "enough": True, "positives": 60, "negatives": 140, "patients_positive": 50, "prevalence": 0.3,
        "AUC": {"value": (low + high) / 2, "low": low, "high": high},
        "calibration": {"gap": {"value": 0, "low": gap[0], "high": gap[1]}},
        "points": {"spec_at_sens95": {"sensitivity": shown}}, **changes,
    }  # fmt: skip


ASKED = Rules(points=("spec_at_sens95",), asked=("spec_at_sens95",))


@pytest.mark.parametrize(
    ("given", "rules", "verdict"),
    [
        (row(0.70, 0.9), Rules(), "yes"),
        (row(0.699, 0.9), Rules(), "not shown"),
        (row(0.5, 0.701), Rules(), "not shown"),
        (row(0.5, 0.699), Rules(), "no"),
        (row(0.8, 0.9), Rules(minimum_auc=0.85), "not shown"),
        (row(0.6, 0.8), Rules(minimum_auc=0.85), "no"),
        (row(0.8, 0.9, gap=(0.001, 0.019)), Rules(), "yes"),
        (row(0.8, 0.9, gap=(0.001, 0.021)), Rules(), "not shown"),
        (row(0.8, 0.9, gap=(-0.2, 0.001)), Rules(), "yes"),
        (row(0.8, 0.9), ASKED, "yes"),
        (row(0.8, 0.9, sensitivity=(0.7, 0.94)), ASKED, "not shown"),
        (row(0.8, 0.9, points={}), ASKED, "not shown"),
        (row(0.5, 0.6, enough=False), Rules(), "not shown"),
        (row(0.8, 0.9, trained=False), Rules(), "not shown"),
    ],
)
def test_the_rules_at_their_edges(given, rules: Rules, verdict: str) -> None:
    found, reasons = _verdict(given, rules, 0)
    assert found == verdict
    assert reasons


def test_numbers_of_further_studies() -> None:
    for share in (0.5, 0.83, 1.0):
        for width in (0.05, 0.1, 0.3):
            least = positives_for_width(share, width)
            ends = [np.subtract(*wilson_interval(share * n, n)[::-1]) for n in (least - 1, least)]
            assert ends[0] > width >= ends[1]
    needed = _needed(row(0.75, 0.95), Rules(points=("spec_at_sens95",), width=0.1))
    assert needed["AUC"] == 200 * 3  # twice as narrow takes four times as many
    assert needed["judged"] == 0
    assert needed["decide"] == 0
    assert _needed(row(0.65, 0.85), Rules())["decide"] == 200 * 3  # 0.75 is twice as far from 0.65 as from 0.70
    assert _needed(row(0.6, 0.8), Rules())["decide"] is None
    wanted = positives_for_width(0.91, 0.1)
    assert needed["sensitivity"] == int(np.ceil(wanted * (60 / 50) / 0.3)) - 200


def test_expected_decisions_by_hand(planted) -> None:
    table, labels, result, _, after, _ = planted
    column, point = 0, "spec_at_sens90"
    called, y = after.called[point][:, column] == 1, labels[:, column] == 1
    found = result["findings"]["Good"]["points"][point]
    assert found["sensitivity"]["value"] == pytest.approx((called & y).sum() / y.sum())
    assert found["specificity"]["value"] == pytest.approx((~called & ~y).sum() / (~y).sum())
    assert found["PPV"]["value"] == pytest.approx((called & y).sum() / called.sum())
    assert found["alerts_per_100"]["value"] == pytest.approx(100 * called.mean())
    patients = len(set(table.patient_id[y]))
    ends = wilson_interval(found["sensitivity"]["value"] * patients, patients)
    assert (found["sensitivity"]["low"], found["sensitivity"]["high"]) == ends
    assert 0.8 < found["sensitivity"]["value"] < 0.97


def test_drift_is_told_from_chance() -> None:
    rng = np.random.default_rng(2)
    same = [drift_of(rng.normal(0, 1, 200), rng.normal(0, 1, 900)) for _ in range(200)]
    assert 0.01 <= np.mean([one["PSI"] > one["chance"] for one in same]) <= 0.10
    moved = drift_of(rng.normal(1, 1, 200), rng.normal(0, 1, 900))
    assert moved["PSI"] > 0.25 > moved["chance"]
    constant = drift_of(np.full(50, 0.5), np.full(80, 0.5))
    assert constant["PSI"] == pytest.approx(0, abs=0.01)


def test_discrimination_of_the_card() -> None:
    table, labels = site(300)
    card = discrimination(table, labels, 200, 0)
    assert set(card) == {"Good", "Fair", "Useless", "Rare"}
    auc = card["Good"]["AUC"]
    assert auc["low"] < roc_auc(table.probabilities[:, 0], labels[:, 0]) == auc["value"] < auc["high"]


def test_the_page_says_it(planted) -> None:
    table, labels, result, _, after, before = planted
    card = discrimination(table, labels, 50, 0)
    result = json.loads(json.dumps(result)) | {
        "model": "abc", "images": 500, "labels": {"file": "<b>.csv", "sha256": "0"},
        "left_out": {"unlabelled images": 3},
        "exposed_images": None, "overlap": None, "exposure_not_recorded": None, "was_calibrated": True,
        "uids_sha256": "1", "hilum": "0",
    }  # fmt: skip
    for name, part in card.items():
        result["findings"][name] |= {"card": part, "drift": {"PSI": 0.4, "chance": 0.1}}
    page = render_site_report(
        result, curves(after.probabilities, labels, FINDINGS), curves(before.probabilities, labels, FINDINGS)
    )
    assert '<b class="is-no">No</b>' in page
    assert "Fit for Good. Shown not to be useful for Useless: do not use it for it. Not shown for Fair." in page
    for part in ("Operating points", "sensitivity 0.9 (asked for)", "Too few to judge", "The rules", "Drift"):
        assert part in page
    assert "&lt;b&gt;.csv" in page
    assert "<b>.csv" not in page
    assert not re.search(r"\bnan\b", page.partition("</style>")[2].lower())
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("wrong", [{"minimum_auc": 0.4}, {"minimum_auc": 1.0}, {"width": 0.0}])
def test_rules_that_mean_nothing(wrong) -> None:
    with pytest.raises(ConfigError):
        Rules(**wrong)


def test_a_finding_that_is_not_there(old) -> None:
    table, labels = site(120)
    with pytest.raises(UnknownNameError, match="Did you mean 'Good'"):
        judged(table, labels, old, Rules(findings=("Goud",)))
