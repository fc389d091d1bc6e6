"""Means over seeds, their intervals and paired differences, against a plain loop and known variances."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from hilum.core.errors import PredictionError
from hilum.core.seeding import stream
from hilum.evaluation.ablation import (
    MEASURED,
    SeedResult,
    compare,
    draw_seeds,
    measure,
    read_result,
    summarise,
    write_result,
)
from hilum.evaluation.bootstrap import clusters_of
from hilum.evaluation.predictions import Predictions

FINDINGS = ("Edema", "Hernia", "Mass", "Never")


def predictions(seed: int, items: int = 60) -> tuple[Predictions, np.ndarray]:
    """Two images a patient; the labels are the same for every seed, the probabilities are not."""
    labels = (np.random.default_rng(1).random((items, 4)) < 0.4).astype(np.int8)
    labels[::7, 1] = -1
    noise = np.random.default_rng(100 + seed).random((items, 4))
    values = np.clip(0.3 * (labels == 1) + 0.7 * noise, 0, 1)
    values[:, 3] = np.nan
    names = np.array([f"{k:03d}" for k in range(items)])
    patients = np.array([f"p{k // 2}" for k in range(items)])
    others = np.full(items, "d")
    return Predictions(names, names, names, patients, others, others, FINDINGS, values), labels


def results(seeds: int, bootstraps: int = 40) -> dict[int, SeedResult]:
    cuts = dict.fromkeys(FINDINGS[:3], 0.5)
    return {seed: measure(*predictions(seed), cuts, bootstraps, 5) for seed in range(seeds)}


def made_up(points: list[float], samples: np.ndarray) -> dict[int, SeedResult]:
    """One finding, seeds with these values, and (R, S) resamples."""
    counts = np.array([9])
    return {
        seed: SeedResult(
            ("Edema",), counts, counts, np.array([True]), {name: np.array([value]) for name in MEASURED},
            {name: samples[:, [seed]] for name in MEASURED},
        )
        for seed, value in enumerate(points)
    }  # fmt: skip


def test_a_resample_is_a_mean_over_drawn_seeds_of_macro_means_over_drawn_patients() -> None:
    measured = results(3)
    clusters = clusters_of(predictions(0)[0])
    drawn = draw_seeds(3, 40, 9)
    expected = []
    for number in range(40):
        patients = stream(5, "bootstrap", number).integers(0, 30, 30)
        rows = np.concatenate([np.flatnonzero(clusters == patient) for patient in patients])
        means = []
        for seed in drawn[number]:
            p, y = predictions(int(seed))
            columns = []
            for c in range(3):
                known = rows[y[rows, c] >= 0]
                columns.append(average_precision_score(y[known, c], p.probabilities[known, c]))
            means.append(np.mean(columns))
        expected.append(np.mean(means))
    entry = summarise(measured, {"all": FINDINGS[:3]}, 9)["all"]["mAP"]
    ends = np.quantile(expected, (0.025, 0.975)) - (np.mean(expected) - entry["value"])
    np.testing.assert_allclose([entry["low"], entry["high"]], ends, rtol=1e-12)
    assert entry["value"] == pytest.approx(np.mean(list(entry["seeds"].values())), rel=1e-12)


def test_seeds_alone_give_the_mean_the_unbiased_variance() -> None:
    values = [0.1, 0.2, 0.4, 0.35, 0.3]
    constant = np.tile(values, (4000, 1))  # patients change nothing
    drawn = np.take_along_axis(constant, draw_seeds(5, 4000, 0), axis=1).mean(axis=1)
    assert drawn.var() == pytest.approx(np.var(values, ddof=1) / 5, rel=0.08)
    assert draw_seeds(5, 4000, 0).shape == (4000, 4)


def test_with_one_seed_the_interval_is_that_of_patients() -> None:
    samples = np.linspace(0, 1, 101)[:, None]
    entry = summarise(made_up([0.5], samples), {"all": ("Edema",)}, 0)["all"]["mAP"]
    assert (entry["low"], entry["high"]) == pytest.approx((0.025, 0.975))
    assert (draw_seeds(1, 7, 3) == 0).all()


def test_a_difference_is_paired_by_patient_and_seed() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.2, (500, 1)) + np.array([[0.0, 0.3, -0.2]])  # what patients and seeds have in common
    low, high = made_up([0.5, 0.8, 0.3], 0.5 + noise), made_up([0.51, 0.81, 0.31], 0.51 + noise)
    entry = compare(high, low, {"all": ("Edema",)}, 0)["all"]["mAP"]
    assert entry["value"] == pytest.approx(0.01)
    assert entry["low"] == pytest.approx(0.01)
    assert entry["high"] == pytest.approx(0.01)
    assert entry["shown"]


def test_a_difference_that_may_be_zero_is_not_shown() -> None:
    rng = np.random.default_rng(0)
    one = made_up([0.5, 0.5], 0.5 + rng.normal(0, 0.1, (300, 2)))
    other = made_up([0.5, 0.49], 0.495 + rng.normal(0, 0.1, (300, 2)))
    entry = compare(one, other, {"all": ("Edema",)}, 0)["all"]["mAP"]
    assert entry["low"] < 0 < entry["high"]
    assert not entry["shown"]


def test_only_seeds_of_both_rows_are_compared_and_a_row_minus_itself_is_zero() -> None:
    measured = results(3)
    part = {seed: measured[seed] for seed in (2, 0)}
    entry = compare(measured, part, {"all": FINDINGS[:3], "tail": ("Mass",)}, 0)
    assert set(entry["all"]["mAP"]["seeds"]) == {"0", "2"}
    assert entry["all"]["mAP"]["value"] == entry["tail"]["mAUC"]["high"] == 0.0
    with pytest.raises(PredictionError, match="no seed in common"):
        compare({0: measured[0]}, {1: measured[1]}, {"all": FINDINGS[:3]}, 0)


def test_rows_of_other_images_are_refused() -> None:
    measured = results(1)
    other = {0: replace(measured[0], positives=measured[0].positives + 1)}
    with pytest.raises(PredictionError, match="other images"):
        compare(measured, other, {"all": FINDINGS[:3]}, 0)


def test_rows_may_have_other_findings_besides_those_that_are_compared() -> None:
    measured, (table, labels) = results(1), predictions(1)
    fewer = {0: measure(table.select(("Mass", "Edema")), labels[:, [2, 0]], {"Edema": 0.5, "Mass": 0.5}, 40, 5)}
    whole = {0: measure(table, labels, {"Edema": 0.5, "Mass": 0.5}, 40, 5)}
    names = {"all": ("Edema", "Mass")}
    assert compare(measured, fewer, names, 0) == compare(measured, whole, names, 0)
    with pytest.raises(PredictionError, match="or findings"):
        compare(measured, fewer, {"all": ("Edema", "Hernia")}, 0)


def test_a_finding_that_was_never_trained_is_undefined_and_files_come_back(tmp_path) -> None:
    measured = results(1)[0]
    assert np.isnan(measured.points["AP"][3])
    assert measured.trained.tolist() == [True, True, True, False]
    write_result(tmp_path / "result.npz", measured)
    back = read_result(tmp_path / "result.npz")
    assert back.findings == measured.findings
    for name in MEASURED:
        np.testing.assert_array_equal(back.samples[name], measured.samples[name])
    (tmp_path / "result.npz").write_bytes(b"nothing")
    with pytest.raises(PredictionError, match="cannot be read"):
        read_result(tmp_path / "result.npz")


def test_no_resamples_give_no_interval_and_nothing_is_shown() -> None:
    measured = results(2, bootstraps=0)
    entry = compare(measured, measured, {"all": FINDINGS[:3]}, 0)["all"]["mAP"]
    assert entry["low"] is None
    assert not entry["shown"]
