import dataclasses
import json
from itertools import combinations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score

from hilum.core.errors import ConfigError, PredictionError, StageError
from hilum.evaluation import ensemble_search
from hilum.evaluation.ensemble_search import Plan, choose_ensemble, steps_of
from hilum.evaluation.member_selection import EXHAUSTIVE, Mixture, select_members
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.study_rules import AGGREGATIONS, StudyRule

MEAN_ONLY = Plan(ensembles=("mean",))


def pool(noises, patients=150, seed=0, findings=4):
    """Members of given noise on the same two images of each patient, and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat((rng.random((patients, findings)) < 0.3).astype(np.int8), 2, axis=0)
    count = len(labels)
    patient = np.repeat(np.arange(patients), 2)
    scores = [expit(2.0 * labels - 1 + noise * rng.normal(size=labels.shape)) for noise in noises]
    tables = [
        Predictions(
            image_uid=np.array([f"{n:016x}" for n in range(count)]), image_id=np.arange(count).astype(str),
            study_id=np.array([f"s{n}" for n in patient]), patient_id=np.array([f"p{n}" for n in patient]),
            dataset=np.full(count, "d"), view=np.tile(["PA", "LATERAL"], patients),
            findings=tuple("ABCDEFGH"[:findings]), probabilities=values,
        )
        for values in scores
    ]  # fmt: skip
    return tables, labels


def names(tables):
    return [f"m{number}" for number in range(len(tables))]


def mean_ap(values, labels):
    return float(np.mean([average_precision_score(labels[:, c], values[:, c]) for c in range(labels.shape[1])]))


def test_the_best_subset_is_the_best_of_all_subsets():
    tables, labels = pool((1.0, 1.2, 2.5, 4.0))
    choice = choose_ensemble(tables, labels, names(tables), MEAN_ONLY)
    studies = [aggregate_studies(table).probabilities for table in tables]
    scores = {
        subset: mean_ap(np.mean([studies[place] for place in subset], axis=0), labels)
        for size in range(1, 5)
        for subset in combinations(range(4), size)
    }
    assert choice.members == max(scores, key=scores.get)
    assert choice.score == pytest.approx(max(scores.values()), abs=1e-12)
    assert choice.singles == pytest.approx([scores[(place,)] for place in range(4)], abs=1e-12)
    assert {0, 1} <= set(choice.members)
    assert 3 not in choice.members
    chosen = choice.composition.apply([aggregate_studies(tables[place]) for place in choice.members])
    assert mean_ap(chosen.probabilities, labels) == pytest.approx(choice.score, abs=1e-12)


def test_greedy_selection_finds_good_members_their_weights_and_leaves_noise_out():
    tables, labels = pool((1.0, 1.1, 6.0, 6.0, 6.0, 6.0, 1.2))
    assert len(tables) > EXHAUSTIVE
    choice = choose_ensemble(tables, labels, names(tables), Plan(ensembles=("mean",), folds=0))
    assert set(choice.members) <= {0, 1, 6}
    assert len(choice.members) >= 2
    studies = [aggregate_studies(table) for table in tables]
    values = choice.composition.apply([studies[place] for place in choice.members]).probabilities
    assert mean_ap(values, labels) == pytest.approx(choice.score, abs=1e-9)
    assert choice.score >= max(choice.singles)
    if choice.composition.weights:
        assert sum(choice.composition.weights) == pytest.approx(1)


def test_greedy_rounds_add_the_best_member_with_replacement_and_stop():
    """On a score that is known everywhere: the distance of the shares from 2 : 1 : 0 : 0 : 0 : 0."""
    target = np.array([2, 1, 0, 0, 0, 0]) / 3
    calls = []

    def score(weights):
        calls.append(weights)
        return -float(np.abs(weights / weights.sum() - target).sum())

    weights, value = select_members(score, 6)
    assert weights.tolist() == [2, 1, 0, 0, 0, 0]
    assert value == 0
    assert len(calls) == 4 * 6  # three rounds that gained, and one that did not


@pytest.mark.parametrize("count", [3, 7])
def test_ties_go_to_fewer_members_then_to_the_first(count):
    tables, labels = pool((1.0,))
    choice = choose_ensemble(tables * count, labels, names(tables * count), Plan(folds=0))
    assert choice.members == (0,)
    assert choice.composition.weights is None
    assert choice.composition.ensemble == "mean"


@pytest.mark.parametrize("count", [4, 7])
def test_the_order_of_members_does_not_matter(count):
    tables, labels = pool(np.linspace(1, 3, count))
    plan = Plan(folds=0)
    choice = choose_ensemble(tables, labels, names(tables), plan)
    turned = choose_ensemble(tables[::-1], labels, names(tables), plan)
    assert turned.score == pytest.approx(choice.score, abs=1e-9)
    assert sorted(count - 1 - place for place in turned.members) == sorted(choice.members)


def test_rows_and_columns_of_members_may_be_in_any_order():
    tables, labels = pool((1.0, 1.2, 3.0))
    order = np.random.default_rng(1).permutation(len(labels))
    shuffled = [tables[0], tables[1].rows(order), tables[2].select(("D", "B", "A", "C"))]
    found = choose_ensemble(shuffled, labels, names(tables))
    expected = choose_ensemble(tables, labels, names(tables))
    assert (found.members, found.score, found.estimate) == (expected.members, expected.score, expected.estimate)


def test_what_a_choice_among_equals_seems_to_gain_is_not_there_on_unseen_patients():
    """Optimism, planted: members of one quality, of which the lucky ones are chosen on few patients."""
    seen, unseen = [], []
    for seed in range(6):
        tables, labels = pool([8.0] * 4, patients=50, seed=seed, findings=2)
        estimate = choose_ensemble(tables, labels, names(tables), MEAN_ONLY).estimate
        seen.append(estimate.seen_gain)
        unseen.append(estimate.gain)
        assert estimate.optimism == pytest.approx(estimate.seen_gain - estimate.gain)
    assert min(seen) >= 0
    assert np.mean(seen) > 0.02
    assert np.mean(unseen) < np.mean(seen) / 2


def test_a_choice_that_matters_is_shown_on_unseen_patients_too():
    tables, labels = pool((1.0, 6.0, 6.0, 6.0))
    estimate = choose_ensemble(tables, labels, names(tables), MEAN_ONLY).estimate
    assert estimate.gain > 0.05
    assert estimate.folds == 5
    assert all(chosen == ("m0",) for chosen in estimate.members)
    assert estimate.chosen == pytest.approx(estimate.best_single)


def test_no_patient_is_on_both_sides_of_the_estimate(monkeypatch):
    tables, labels = pool((1.0, 2.0))
    searched, judged = [], []
    search, judge = ensemble_search._search, ensemble_search._judge

    def watched_search(members, labels, rows, *rest):
        searched.append(rows)
        return search(members, labels, rows, *rest)

    def watched_judge(members, labels, rows, seen, found):
        judged.append((rows, seen))
        return judge(members, labels, rows, seen, found)

    monkeypatch.setattr(ensemble_search, "_search", watched_search)
    monkeypatch.setattr(ensemble_search, "_judge", watched_judge)
    choose_ensemble(tables, labels, names(tables), MEAN_ONLY)
    assert len(searched) == 6
    patients = tables[0].patient_id
    for rows, seen in judged[1:]:  # the first is on all of validation: what the gain looks like
        assert not set(patients[rows].tolist()) & set(patients[seen].tolist())
        assert any(np.array_equal(seen, one) for one in searched[1:])
    assert sorted(np.concatenate([rows for rows, _ in judged[1::3]]).tolist()) == list(range(len(patients)))


def test_a_mean_of_ranks_is_found_where_members_differ_in_sharpness():
    tables, labels = pool((1.0, 1.0))
    timid = tables[1].replace(tables[1].probabilities * 1e-3)  # no say in a mean of probabilities
    choice = choose_ensemble([tables[0], timid], labels, ["a", "b"], Plan(ensembles=("mean", "rank_mean")))
    assert choice.composition.ensemble == "rank_mean"
    assert choice.members == (0, 1)
    assert set(choice.composition.ranks) == {"image", "study"}
    assert choice.estimate.gain > 0.02
    assert [one["ensemble"] for one in choice.tried] == ["mean", "rank_mean"]


def test_every_study_rule_is_tried_and_the_noisy_view_found():
    tables, labels = pool((1.0, 1.0))
    lateral = tables[0].view == "LATERAL"
    noise = np.random.default_rng(9)
    tables = [
        table.replace(np.where(lateral[:, None], noise.random(table.probabilities.shape), table.probabilities))
        for table in tables
    ]
    plan = Plan(tuple(StudyRule.parse(name) for name in AGGREGATIONS), ("mean",), folds=3)
    done = []
    choice = choose_ensemble(tables, labels, names(tables), plan, done.append)
    assert choice.composition.study.name in ("learned", "frontal_weighted")
    assert not choice.composition.study.needs_fit
    assert len(done) == steps_of(plan) == 5 * 4
    assert {one["study"].partition(":")[0] for one in choice.tried} == set(AGGREGATIONS)
    assert choice.estimate.gain > 0.03


def test_damping_is_taken_where_it_helps_and_not_where_it_does_not():
    tables, labels = pool((1.5,), findings=3)
    labels[:, 0] = (labels[:, 1:] == 0).all(axis=1)
    normal = expit(6.0 * labels[:, 0] - 3)
    values = tables[0].probabilities.copy()
    values[:, 0] = normal
    table = dataclasses.replace(tables[0], findings=("Normal", "Edema", "Mass"), probabilities=values)
    plan = Plan(ensembles=("mean",), dampings=(None, Damping("power", 0.5), Damping("power", 1.0)))
    assert choose_ensemble([table], labels, ["m"], plan).composition.damping == Damping("power", 1.0)
    values = values.copy()
    values[:, 0] = np.random.default_rng(0).random(len(values))
    assert choose_ensemble([table.replace(values)], labels, ["m"], plan).composition.damping is None


def test_a_finding_that_one_member_alone_knows_is_not_given_up_for_free():
    tables, labels = pool((1.0, 1.3))
    values = tables[0].probabilities.copy()
    values[:, 3] = np.nan
    choice = choose_ensemble([tables[0].replace(values), tables[1]], labels, ["a", "b"], Plan(folds=0))
    assert 1 in choice.members


def test_unknown_labels_count_for_nothing():
    tables, labels = pool((1.0, 1.5))
    masked = labels.copy()
    masked[:, 3] = -1
    found = choose_ensemble(tables, masked, names(tables), MEAN_ONLY)
    expected = choose_ensemble([table.select("ABC") for table in tables], labels[:, :3], names(tables), MEAN_ONLY)
    assert (found.members, found.score) == (expected.members, pytest.approx(expected.score, abs=1e-12))


def test_what_cannot_be_chosen_among_is_refused():
    tables, labels = pool((1.0, 2.0))
    with pytest.raises(ConfigError, match="distinct members"):
        choose_ensemble(tables, labels, ["a", "a"])
    with pytest.raises(ConfigError, match="distinct members"):
        choose_ensemble([], labels, [])
    with pytest.raises(ConfigError, match="at least one"):
        choose_ensemble(tables, labels, ["a", "b"], Plan(ensembles=()))
    with pytest.raises(PredictionError, match="do not cover the same items"):
        choose_ensemble([tables[0], tables[1].rows(np.arange(20))], labels, ["a", "b"])
    with pytest.raises(PredictionError, match="findings that member 1 lacks"):
        choose_ensemble([tables[0].select("AB"), tables[1]], labels[:, :2], ["a", "b"])
    with pytest.raises(StageError, match="calibrated"):
        choose_ensemble([tables[0], tables[1].replace(tables[1].probabilities, stage="calibrated")], labels, ["a", "b"])
    with pytest.raises(StageError, match="cannot undo"):
        choose_ensemble([aggregate_studies(table, "frontal_weighted") for table in tables], labels, ["a", "b"])
    with pytest.raises(PredictionError, match="has a positive"):
        choose_ensemble(tables, np.zeros_like(labels), ["a", "b"])
    with pytest.raises(PredictionError, match="needs a finding called 'Normal'"):
        choose_ensemble(tables, labels, ["a", "b"], Plan(dampings=(None, Damping())))


def test_the_description_is_plain_and_names_members():
    tables, labels = pool((1.0, 1.2, 5.0))
    described = choose_ensemble(tables, labels, names(tables)).describe(names(tables))
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["members"] == ["m0", "m1"]
    assert set(described["singles"]) == {"m0", "m1", "m2"}
    assert described["unseen_patients"]["folds"] == 5


def test_ranks_of_judged_patients_come_from_those_that_the_choice_has_seen():
    tables, labels = pool((1.0, 2.0))
    seen, judged = np.arange(200), np.arange(200, len(labels))
    mixture = Mixture(tables, labels, judged, seen, StudyRule(), "rank_mean")
    for table, values in zip(tables, mixture.values, strict=True):
        study = aggregate_studies(table)
        expected = Ranks.of(study.rows(seen), None).apply(study.probabilities[judged], study.findings)
        np.testing.assert_array_equal(values, expected)
