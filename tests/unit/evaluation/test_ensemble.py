import dataclasses
import math
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import rankdata

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.evaluation.ensemble import ENSEMBLES, combine_members, mean_over_models
from hilum.evaluation.fitted_items import are_among, check_out_of_sample, describe_items
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies, mean_over_studies

EVERY_RULE = pytest.mark.parametrize("rule", ENSEMBLES)


def members(made_up, count=3):
    table, _ = made_up()
    rng = np.random.default_rng(5)
    return [table.replace(rng.random(table.probabilities.shape), model=f"m{index}") for index in range(count)]


def test_mean_whatever_the_order_of_rows_columns_and_members(made_up):
    tables = members(made_up)
    expected = np.mean([table.probabilities for table in tables], axis=0)
    rows = np.random.default_rng(2).permutation(len(tables[0]))
    tables[1] = tables[1].rows(rows).select(["C", "A", "D", "B"])
    result = mean_over_models(tables)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-15)
    assert result.stage == "ensemble"
    assert [member["model"] for member in result.metadata["members"]] == ["m0", "m1", "m2"]
    for order in permutations(tables):
        again = mean_over_models(order)
        place = np.argsort(np.argsort(result.image_uid))
        again = again.rows(np.argsort(again.image_uid)[place]).select(result.findings)
        np.testing.assert_array_equal(again.probabilities, result.probabilities)


def test_a_finding_untrained_in_one_member_is_the_mean_of_the_others(made_up):
    tables = members(made_up)
    values = tables[0].probabilities.copy()
    values[:, 3] = np.nan
    tables[0] = tables[0].replace(values)
    result = mean_over_models(tables).probabilities[:, 3]
    np.testing.assert_allclose(result, (tables[1].probabilities[:, 3] + tables[2].probabilities[:, 3]) / 2, atol=1e-15)
    assert not mean_over_models([tables[0]]).trained[3]


def test_equal_members_give_themselves_exactly(made_up):
    table = members(made_up, 1)[0]
    np.testing.assert_array_equal(mean_over_models([table] * 3).probabilities, table.probabilities)


def test_different_items_are_refused_with_counts_and_an_example(made_up):
    tables = members(made_up)
    missing = tables[1].image_uid[-1]
    tables[1] = tables[1].rows(np.arange(len(tables[1]) - 1))
    with pytest.raises(PredictionError, match=rf"59 in both, 1 only in member 1, 0 only in member 2.*{missing}"):
        mean_over_models(tables)


def test_renamed_and_missing_findings_are_named(made_up):
    tables = members(made_up)
    with pytest.raises(PredictionError, match="'D'"):
        mean_over_models([tables[0], tables[1].select(["A", "B", "C"])])
    with pytest.raises(PredictionError, match="'Dee'"):
        mean_over_models([tables[0], dataclasses.replace(tables[1], findings=("A", "B", "C", "Dee"))])


def test_another_patient_for_the_same_image_is_refused(made_up):
    tables = members(made_up)
    patients = tables[1].patient_id.copy()
    patients[4] = "d/other"
    with pytest.raises(PredictionError, match="patient_id"):
        mean_over_models([tables[0], dataclasses.replace(tables[1], patient_id=patients)])


def test_stages_and_units_must_agree(made_up):
    tables = members(made_up)
    with pytest.raises(StageError, match="calibrated"):
        mean_over_models([tables[0], tables[1].replace(tables[1].probabilities, stage="calibrated")])
    with pytest.raises(StageError, match="ensemble"):
        mean_over_models([mean_over_models(tables)])
    with pytest.raises(StageError, match="study"):
        mean_over_models([tables[0], mean_over_studies(tables[1])])
    with pytest.raises(PredictionError, match="row per image"):
        mean_over_models([mean_over_studies(tables[0]), mean_over_studies(tables[1], unit="study")])
    with pytest.raises(PredictionError, match="at least one"):
        mean_over_models([])


def test_provenance_of_the_members_is_kept(made_up):
    tables = members(made_up, 2)
    first = tables[0].replace(tables[0].probabilities, head_splits=["train"], exposed_images=3, thresholds={"A": {}})
    second = tables[1].replace(tables[1].probabilities, head_splits=["train", "val"])
    metadata = mean_over_models([first, second]).metadata
    assert metadata["head_splits"] == ["train", "val"]
    assert metadata["exposed_images"] == 3
    unknown = first.replace(first.probabilities, exposed_images=0)
    assert "exposed_images" not in mean_over_models([unknown, second]).metadata
    known = second.replace(second.probabilities, exposed_images=0)
    assert mean_over_models([unknown, known]).metadata["exposed_images"] == 0
    assert "thresholds" not in metadata
    assert "model" not in metadata


def test_what_any_member_says_against_itself_the_ensemble_says(made_up):
    tables = members(made_up)
    values = [table.probabilities for table in tables]
    clean = tables[0].replace(values[0])
    notes = {"uncalibrated": "imported", "exposure_not_recorded": "the authors name it"}
    noted = tables[1].replace(values[1], **notes)
    again = tables[2].replace(values[2], uncalibrated="other import", exposure_not_recorded="the authors name it")
    found = mean_over_models([clean, noted, again]).metadata
    assert found["uncalibrated"] == "imported; other import"
    assert found["exposure_not_recorded"] == "the authors name it"
    assert not {"uncalibrated", "exposure_not_recorded"} & set(mean_over_models([clean, clean]).metadata)


def test_one_accepted_leak_excuses_no_other_member(made_up):
    first, second, third = ((table, table.probabilities) for table in members(made_up))
    excused = first[0].replace(first[1], exposed_images=3, accepted_leak="a pool that leaks by design")
    exposed, other = second[0].replace(second[1], exposed_images=2), third[0].replace(third[1], exposed_images=0)
    assert mean_over_models([excused, other]).metadata["accepted_leak"] == "a pool that leaks by design"
    for order in ([excused, exposed, other], [other, exposed, excused]):
        found = mean_over_models(order).metadata
        assert not found.get("accepted_leak")
        assert found["exposed_images"] == 3
    also = second[0].replace(second[1], exposed_images=2, accepted_leak="another")
    assert mean_over_models([excused, also]).metadata["accepted_leak"] == "a pool that leaks by design; another"


def test_what_any_member_was_chosen_on_is_judged_by_none(made_up):
    tables = members(made_up)
    parts = [tables[0].image_uid[:10].tolist(), tables[0].image_uid[5:20].tolist()]
    chosen = [t.replace(t.probabilities, chosen_on=describe_items(p)) for t, p in zip(tables, parts, strict=False)]
    found = mean_over_models([*chosen, tables[2]]).metadata["chosen_on"]
    assert found["items"] == 20
    for uids in parts:
        assert are_among(uids, found)
    assert not are_among(tables[0].image_uid[20:21].tolist(), found)
    with pytest.raises(StageError, match="fitted on 20 of the 60"):
        check_out_of_sample(tables[0], found, "x")
    assert mean_over_models([chosen[0], chosen[0], tables[2]]).metadata["chosen_on"] == describe_items(parts[0])


def ranked(table):
    """Mid-ranks by scipy."""
    values = table.probabilities
    return np.stack([(rankdata(values[:, c]) - 0.5) / len(values) for c in range(values.shape[1])], axis=1)


@EVERY_RULE
@pytest.mark.parametrize("weights", [None, (2.0, 0.5, 1.0), (0.0, 3.0, 1.0)])
def test_every_rule_is_what_plain_loops_say(made_up, rule, weights):
    tables = members(made_up)
    result = combine_members(tables, rule, weights)
    shares = weights or (1.0, 1.0, 1.0)
    values = [ranked(table) if rule == "rank_mean" else table.probabilities for table in tables]
    for row in range(len(tables[0])):
        for column in range(4):
            p = [float(one[row, column]) for one in values]
            if rule == "logit_mean":
                z = sum(w * (math.log(x) - math.log1p(-x)) for w, x in zip(shares, p, strict=True)) / sum(shares)
                expected = 1 / (1 + math.exp(-z))
            else:
                expected = sum(w * x for w, x in zip(shares, p, strict=True)) / sum(shares)
            assert result.probabilities[row, column] == pytest.approx(expected, rel=1e-12)
    assert result.metadata["ensemble"] == rule
    assert ("scale" in result.metadata) == (rule == "rank_mean")
    recorded = [one.get("weight") for one in result.metadata["members"]]
    assert recorded == ([None] * 3 if weights is None else list(weights))


@EVERY_RULE
def test_the_order_of_members_does_not_matter_to_the_bit_with_ties_and_weights(made_up, rule):
    tables = members(made_up, 5)
    rng = np.random.default_rng(0)
    tables = [table.replace(rng.choice([0.0, 0.1, 0.2, 0.7, 1.0], table.probabilities.shape)) for table in tables]
    weights = (0.1, 0.3, 0.7, 0.1, 1 / 3)
    expected = combine_members(tables, rule, weights).probabilities
    for order in list(permutations(range(5)))[::7]:
        again = combine_members([tables[place] for place in order], rule, [weights[place] for place in order])
        np.testing.assert_array_equal(again.probabilities, expected)


@EVERY_RULE
def test_weights_count_by_their_ratios_and_zero_is_absent(made_up, rule):
    tables = members(made_up)
    equal = combine_members(tables, rule)
    np.testing.assert_array_equal(combine_members(tables, rule, (1, 1, 1)).probabilities, equal.probabilities)
    np.testing.assert_allclose(combine_members(tables, rule, (3, 3, 3)).probabilities, equal.probabilities, atol=1e-15)
    np.testing.assert_array_equal(
        combine_members(tables, rule, (2, 1, 0)).probabilities, combine_members(tables[:2], rule, (2, 1)).probabilities
    )
    np.testing.assert_allclose(  # a member twice is a member of twice the weight
        combine_members([tables[0], tables[0], tables[1]], rule).probabilities,
        combine_members(tables[:2], rule, (2, 1)).probabilities,
        atol=1e-15,
    )


@EVERY_RULE
def test_equal_members_and_members_never_trained(made_up, rule):
    tables = members(made_up)
    if rule != "rank_mean":
        same = combine_members([tables[0]] * 3, rule, (0.1, 0.7, 0.3))
        np.testing.assert_array_equal(same.probabilities, tables[0].probabilities)
    values = tables[0].probabilities.copy()
    values[:, 3] = np.nan
    result = combine_members([tables[0].replace(values), *tables[1:]], rule, (5, 2, 1))
    others = combine_members(tables[1:], rule, (2, 1))
    np.testing.assert_array_equal(result.probabilities[:, 3], others.probabilities[:, 3])
    assert not combine_members([tables[0].replace(values)] * 2, rule).trained[3]


def test_certain_members_stay_finite_on_the_log_odds(made_up):
    table = members(made_up, 1)[0]
    zero, one, half = (table.replace(np.full(table.probabilities.shape, value)) for value in (0.0, 1.0, 0.5))
    assert (combine_members([zero, one], "logit_mean").probabilities == 0.5).all()
    assert (combine_members([zero, zero], "logit_mean").probabilities == 0).all()
    assert (combine_members([half, one], "logit_mean").probabilities > 0.5).all()


def test_ranks_do_not_care_how_sharp_a_member_is(made_up):
    """What a loss that inflates scores does to a member leaves the mean of ranks alone, and not the mean."""
    tables = members(made_up, 2)
    inflated = tables[1].replace(tables[1].probabilities ** 0.2)
    np.testing.assert_allclose(
        combine_members([tables[0], inflated], "rank_mean").probabilities,
        combine_members(tables, "rank_mean").probabilities, atol=1e-12,
    )  # fmt: skip
    assert (
        np.abs(mean_over_models([tables[0], inflated]).probabilities - mean_over_models(tables).probabilities).max()
        > 0.1
    )


def test_ranks_of_validation_make_an_item_independent_of_the_others(made_up):
    tables = members(made_up, 2)
    ranks = [Ranks.of(table) for table in tables]
    whole = combine_members(tables, "rank_mean", ranks=ranks)
    part = combine_members([table.rows(np.array([3, 9])) for table in tables], "rank_mean", ranks=ranks)
    np.testing.assert_array_equal(part.probabilities, whole.probabilities[[3, 9]])
    alone = combine_members([table.rows(np.array([3, 9])) for table in tables], "rank_mean")
    assert (alone.probabilities != part.probabilities).any()


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1, 1), (-1, 1, 1), (0, 0, 0), (1, float("nan"), 1)])
def test_weights_that_do_not_fit_are_refused(made_up, weights):
    with pytest.raises(ConfigError, match="as many weights of at least 0"):
        combine_members(members(made_up), weights=weights)


def test_members_of_other_study_rules_or_damped_and_unknown_rules_are_refused(made_up):
    tables = members(made_up, 2)
    with pytest.raises(StageError, match="one rule"):
        combine_members([mean_over_studies(tables[0]), aggregate_studies(tables[1], "frontal_weighted")])
    with pytest.raises(StageError, match=r"Member 2.*damped"):
        combine_members([tables[0], tables[1].replace(tables[1].probabilities, normal_damping="power:0.5")])
    with pytest.raises(UnknownNameError, match="Did you mean 'rank_mean'"):
        combine_members(tables, "rank-mean")
