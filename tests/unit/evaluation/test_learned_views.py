import dataclasses

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score

from hilum.core.types import VIEW_KINDS
from hilum.evaluation.folds import macro_average_precision, patient_folds, patient_splits
from hilum.evaluation.learned_views import fit_views
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import aggregate_studies


def two_views(noise=(0.6, 3.0), patients=300, seed=0, share=1.0):
    """One PA and, for a share of patients, one lateral image a study; how noisy each view's score is."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((patients, 3)) < 0.25).astype(np.int8)
    both = np.concatenate([np.arange(patients), np.flatnonzero(rng.random(patients) < share)])
    lateral = np.arange(len(both)) >= patients
    logits = 2.0 * labels[both] - 1 + rng.normal(size=(len(both), 3)) * np.where(lateral, noise[1], noise[0])[:, None]
    table = Predictions(
        image_uid=np.array([f"{n:016x}" for n in range(len(both))]), image_id=both.astype(str),
        study_id=np.array([f"s{n}" for n in both]), patient_id=np.array([f"p{n}" for n in both]),
        dataset=np.full(len(both), "d"), view=np.where(lateral, "LATERAL", "PA"), findings=("A", "B", "C"),
        probabilities=expit(logits),
    )  # fmt: skip
    return table, labels[both]


def test_a_noisy_view_weighs_less_and_that_helps_unseen_patients():
    table, labels = two_views()
    found = fit_views(table, labels)
    weights = found.rule.parameters
    assert weights["PA"] == 1
    assert weights["lateral"] <= 0.25
    assert found.score > found.mean_score + 0.02
    assert found.held_out_gain > 0.01
    other, truth = two_views(seed=1)  # and it holds on patients of another draw
    values = [aggregate_studies(other, rule).probabilities for rule in (found.rule, "mean")]
    learned, mean = (np.mean([average_precision_score(truth[:, c], p[:, c]) for c in range(3)]) for p in values)
    assert learned > mean + 0.02


def test_a_better_lateral_view_weighs_more():
    weights = fit_views(*two_views((3.0, 0.6))).rule.parameters
    assert weights["lateral"] == 1
    assert weights["PA"] <= 0.25


def test_equally_good_views_gain_nothing_by_weights_on_unseen_patients():
    found = [fit_views(*two_views((1.5, 1.5), seed=seed)) for seed in range(3)]
    assert abs(np.mean([one.held_out_gain for one in found])) < 0.015
    assert all(one.score >= one.mean_score for one in found)  # on what it was fitted on it never looks worse


def test_kinds_that_are_too_rare_or_alone_keep_equal_weights():
    alone, labels = two_views(share=0.0)
    assert set(fit_views(alone, labels).rule.parameters.values()) == {1.0}
    rare, labels = two_views(share=0.05)
    assert (rare.view == "LATERAL").sum() < 20
    assert set(fit_views(rare, labels).rule.parameters.values()) == {1.0}


def test_the_order_of_rows_does_not_matter():
    table, labels = two_views()
    order = np.random.default_rng(5).permutation(len(table))
    assert fit_views(table.rows(order), labels[order]) == fit_views(table, labels)


def test_unknown_labels_are_not_negatives():
    table, labels = two_views()
    masked = labels.copy()
    masked[:, 0] = -1
    assert fit_views(table, masked) == fit_views(table.select(["B", "C"]), labels[:, 1:])


def test_too_few_patients_give_no_estimate():
    table, labels = two_views()
    one = dataclasses.replace(table, patient_id=np.full(len(table), "p"))
    assert fit_views(one, labels).held_out_gain is None
    assert fit_views(table, np.zeros_like(labels)).rule.parameters == dict.fromkeys(VIEW_KINDS, 1.0)


def test_folds_keep_patients_together_are_even_and_ignore_row_order(made_up):
    table, _ = made_up(count=300, patients=50)
    fold = patient_folds(table, 5)
    assert {tuple(set(fold[table.patient_id == p])) for p in set(table.patient_id.tolist())} == {(n,) for n in range(5)}
    counts = [len(set(table.patient_id[fold == n].tolist())) for n in range(5)]
    assert max(counts) - min(counts) <= 1
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(patient_folds(table.rows(order), 5), fold[order])
    assert (patient_folds(table, 5, seed=1) != fold).any()
    nameless = dataclasses.replace(table, patient_id=np.full(300, ""))
    fold = patient_folds(nameless, 5)
    assert all(len(set(fold[nameless.study_id == s])) == 1 for s in set(nameless.study_id.tolist()))
    for inside, outside in patient_splits(table):
        assert not set(table.patient_id[inside].tolist()) & set(table.patient_id[outside].tolist())
        assert len(inside) + len(outside) == 300
    assert patient_splits(table, 0) == patient_splits(table, 1) == []


def test_macro_average_precision_is_sklearns_over_findings_with_a_positive(made_up):
    table, labels = made_up(count=200)
    labels[:, 1] = 0
    labels[::3, 2] = -1
    values = table.probabilities.copy()
    values[:, 3] = np.nan
    known = labels[:, 2] >= 0
    expected = [
        average_precision_score(labels[:, 0], values[:, 0]),
        average_precision_score(labels[known, 2], values[known, 2]),
        labels[:, 3].mean(),  # never trained: as good as a random ranking
    ]
    assert macro_average_precision(values, labels, np.ones(4, bool)) == pytest.approx(np.mean(expected), abs=1e-12)
    assert macro_average_precision(values, np.zeros_like(labels), np.ones(4, bool)) is None
