import dataclasses
import math

import numpy as np
import pytest

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.evaluation.predictions import IDENTITY
from hilum.evaluation.studies import aggregate_studies, mean_over_studies, study_uids, view_weights
from hilum.evaluation.study_rules import AGGREGATIONS, StudyRule

RULES = ("mean", "logit_mean", "frontal_then_rest", "frontal_weighted", "frontal_weighted:1",
         "learned:PA=1,AP=0.5,lateral=0.3,other=0.7", "learned:PA=1,AP=0,lateral=0,other=0")  # fmt: skip
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
VIEWS = ("PA", "AP", "AP_SUPINE", "LATERAL", "LL", "OBLIQUE", "OTHER", "UNKNOWN", "")


def many_views(made_up, count=400, patients=30):
    """Studies of one to a dozen images of every view, some without a study id."""
    table, _ = made_up(count=count, patients=patients)
    rng = np.random.default_rng(3)
    values = np.where(rng.random((count, 4)) < 0.1, rng.choice([0.0, 1.0, 1e-300], (count, 4)), rng.random((count, 4)))
    studies = np.where(rng.random(count) < 0.05, "", table.study_id)
    return dataclasses.replace(table, view=rng.choice(VIEWS, count), study_id=studies).replace(values)


def by_loops(table, rule):
    """Every rule again, image by image, in plain Python."""
    parsed = StudyRule.parse(rule)
    kinds = {"PA": "PA", "AP": "AP", "AP_SUPINE": "AP", "LATERAL": "lateral", "LL": "lateral", "RL": "lateral"}
    result = np.empty_like(table.probabilities)
    for row, key in enumerate(keys(table)):
        mine = [i for i, other in enumerate(keys(table)) if other == key] if key[2] else [row]
        frontal = [i for i in mine if table.view[i] in ("PA", "AP", "AP_SUPINE")]
        rest = [i for i in mine if i not in frontal]
        for column in range(len(table.findings)):
            p = {i: float(table.probabilities[i, column]) for i in mine}
            if parsed.name == "mean":
                value = sum(p.values()) / len(p)
            elif parsed.name == "logit_mean":
                inside = [min(max(x, 2.0**-53), 1 - 2.0**-53) for x in p.values()]
                z = sum(math.log(x) - math.log1p(-x) for x in inside) / len(p)
                value = 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))
                value = min(max(value, min(p.values())), max(p.values()))
            elif parsed.name == "learned":
                w = {i: parsed.parameters[kinds.get(str(table.view[i]), "other")] for i in mine}
                if sum(w.values()) == 0:
                    w = dict.fromkeys(mine, 1.0)
                value = sum(w[i] * p[i] for i in mine) / sum(w.values())
            else:
                share = 0.5 if parsed.name == "frontal_then_rest" else parsed.parameters["frontal"]
                means = [sum(p[i] for i in group) / len(group) for group in (frontal, rest) if group]
                value = share * means[0] + (1 - share) * means[1] if len(means) == 2 else means[0]
            result[row, column] = value
    return result


def keys(table):
    return list(zip(table.dataset.tolist(), table.patient_id.tolist(), table.study_id.tolist(), strict=True))


def test_mean_over_the_images_of_each_study(made_up):
    table, _ = made_up()
    result = mean_over_studies(table)
    for row, key in enumerate(keys(table)):
        images = [index for index, other in enumerate(keys(table)) if other == key]
        np.testing.assert_allclose(result.probabilities[row], table.probabilities[images].mean(axis=0), atol=1e-15)
    assert (result.stage, result.unit) == ("study", "image")
    sizes = result.metadata["images_per_study"]
    assert sum(int(size) * count for size, count in sizes.items()) == len(table)


@EVERY_RULE
def test_every_rule_is_what_plain_loops_say(made_up, rule):
    table = many_views(made_up, 150, 12)
    np.testing.assert_allclose(
        aggregate_studies(table, rule).probabilities, by_loops(table, rule), rtol=1e-9, atol=1e-15
    )


def test_the_rules_differ_where_they_should(made_up):
    table = many_views(made_up)
    found = [aggregate_studies(table, rule).probabilities for rule in RULES]
    for number, first in enumerate(found):
        for second in found[number + 1 :]:
            assert np.abs(first - second).max() > 1e-3


@EVERY_RULE
@pytest.mark.parametrize("unit", ["image", "study"])
def test_idempotent_to_the_bit(made_up, unit, rule):
    once = aggregate_studies(many_views(made_up), rule, unit)
    np.testing.assert_array_equal(aggregate_studies(once, rule, unit).probabilities, once.probabilities)
    assert once.metadata["study_aggregation"] == str(StudyRule.parse(rule))
    if unit == "image":  # and also where nobody remembers that it was done
        again = aggregate_studies(once.replace(once.probabilities, stage="raw", study_aggregation=None), rule)
        np.testing.assert_array_equal(again.probabilities, once.probabilities)


@EVERY_RULE
@pytest.mark.parametrize("unit", ["image", "study"])
def test_row_order_does_not_matter_to_the_bit(made_up, unit, rule):
    table = many_views(made_up)
    order = np.random.default_rng(1).permutation(len(table))
    straight, shuffled = aggregate_studies(table, rule, unit), aggregate_studies(table.rows(order), rule, unit)
    if unit == "image":
        straight = straight.rows(order)
    for name in (*IDENTITY, "probabilities"):
        np.testing.assert_array_equal(getattr(straight, name), getattr(shuffled, name))
    np.testing.assert_array_equal(view_weights(table, rule)[order], view_weights(table.rows(order), rule))


@EVERY_RULE
def test_constant_in_a_study_within_its_images_and_alone_unchanged(made_up, rule):
    table = many_views(made_up)
    result = aggregate_studies(table, rule)
    rows = {}
    for row, key in enumerate(keys(table)):
        rows.setdefault(key if key[2] else row, []).append(row)
    assert max(map(len, rows.values())) > 4
    for group in rows.values():
        assert (result.probabilities[group] == result.probabilities[group[0]]).all()
        images = table.probabilities[group]
        assert (images.min(axis=0) <= result.probabilities[group]).all()
        assert (images.max(axis=0) >= result.probabilities[group]).all()
        if len(group) == 1:
            np.testing.assert_array_equal(result.probabilities[group], images)


@EVERY_RULE
def test_another_study_never_changes_mine(made_up, rule):
    table = many_views(made_up)
    mine = np.array([key[1] in ("d/p0", "d/p3") for key in keys(table)])
    changed = np.where(mine[:, None], table.probabilities, 1 - table.probabilities)
    other = dataclasses.replace(table, view=np.where(mine, table.view, "LATERAL")).replace(changed)
    np.testing.assert_array_equal(
        aggregate_studies(other, rule).probabilities[mine], aggregate_studies(table, rule).probabilities[mine]
    )
    np.testing.assert_array_equal(
        aggregate_studies(table.rows(np.flatnonzero(mine)), rule).probabilities,
        aggregate_studies(table, rule).probabilities[mine],
    )


@EVERY_RULE
def test_weights_are_the_contributions(made_up, rule):
    table = many_views(made_up)
    weights = view_weights(table, rule)
    uids = study_uids(table.dataset, table.patient_id, table.study_id, table.image_uid)
    for uid in set(uids.tolist()):
        assert weights[uids == uid].sum() == pytest.approx(1, abs=1e-12)
        if rule != "logit_mean":
            value = (weights[uids == uid, None] * table.probabilities[uids == uid]).sum(axis=0)
            np.testing.assert_allclose(
                aggregate_studies(table, rule).probabilities[uids == uid], np.tile(value, ((uids == uid).sum(), 1)),
                atol=1e-12,
            )  # fmt: skip


def test_unknown_views_count_as_other_than_frontal(made_up):
    table, _ = made_up(count=2)
    table = dataclasses.replace(
        table, view=np.array(["PA", "UNKNOWN"]), study_id=np.full(2, "s"), patient_id=np.full(2, "p")
    )
    first, second = table.probabilities
    found = aggregate_studies(table, "frontal_weighted").probabilities[0]
    np.testing.assert_allclose(found, 0.8 * first + 0.2 * second, atol=1e-15)
    unknown = dataclasses.replace(table, view=np.array(["UNKNOWN", ""]))
    np.testing.assert_array_equal(
        aggregate_studies(unknown, "frontal_weighted").probabilities, mean_over_studies(unknown).probabilities
    )


@EVERY_RULE
def test_a_rule_is_its_text(rule):
    parsed = StudyRule.parse(rule)
    assert StudyRule.parse(str(parsed)) == parsed


def test_text_and_defaults():
    assert str(StudyRule.parse("frontal_weighted")) == "frontal_weighted:0.8"
    assert StudyRule.parse("frontal_weighted:frontal=0.8") == StudyRule("frontal_weighted")
    assert StudyRule.parse("learned").needs_fit
    assert not any(StudyRule.parse(name).needs_fit for name in AGGREGATIONS if name != "learned")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median", "Did you mean 'mean'"),
        ("frontal_weigthed:0.8", "Did you mean 'frontal_weighted'"),
        ("frontal_weighted:1.2", "at most 1; found 1.2"),
        ("frontal_weighted:-0.1", "at least 0"),
        ("frontal_weighted:nan", "at least 0"),
        ("frontal_weighted:much", "expected frontal_weighted:0.8"),
        ("mean:0.5", "expected mean"),
        ("learned:PA=1", "lacks a weight for AP, lateral, other"),
        ("learned:PA=0,AP=0,lateral=0,other=0", "at least one"),
        ("learned:PA=1,AP=1,lateral=1,other=1,RL=1", "Unknown parameter"),
    ],
)
def test_texts_that_mean_nothing_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        StudyRule.parse(text)


def test_a_rule_without_weights_cannot_be_used(made_up):
    with pytest.raises(ConfigError, match="no weights yet"):
        aggregate_studies(made_up()[0], "learned")


def test_another_rule_on_top_is_refused(made_up):
    for unit in ("image", "study"):
        once = aggregate_studies(made_up()[0], "frontal_weighted", unit)
        with pytest.raises(StageError, match=r"'frontal_weighted:0.8'.*cannot undo"):
            aggregate_studies(once, "frontal_weighted:0.7", unit)
        with pytest.raises(StageError, match="cannot undo"):
            mean_over_studies(once, unit)


def test_damped_predictions_are_refused(made_up):
    with pytest.raises(StageError, match="before abnormal findings are damped"):
        mean_over_studies(made_up(normal_damping="power:0.5")[0])


def test_one_row_per_study_equals_its_images(made_up):
    table, _ = made_up()
    images, studies = mean_over_studies(table), mean_over_studies(table, unit="study")
    assert len(studies) == len(set(keys(table)))
    assert studies.unit == "study"
    uids = study_uids(images.dataset, images.patient_id, images.study_id, images.image_uid)
    place = [studies.image_uid.tolist().index(uid) for uid in uids.tolist()]
    np.testing.assert_array_equal(studies.probabilities[place], images.probabilities)


def test_the_same_study_id_in_two_patients_or_datasets_stays_apart(made_up):
    table, _ = made_up(count=4)
    table = dataclasses.replace(
        table,
        patient_id=np.array(["p1", "p2", "p1", "p1"]),
        study_id=np.full(4, "s"),
        dataset=np.array(["d", "d", "e", "d"]),
    )
    result = mean_over_studies(table, unit="study")
    assert len(result) == 3
    assert result.metadata["images_per_study"] == {"1": 2, "2": 1}


def test_images_without_a_study_id_are_their_own_study(made_up):
    table, _ = made_up(count=5)
    table = dataclasses.replace(table, study_id=np.full(5, ""), patient_id=np.full(5, "d/p"))
    np.testing.assert_array_equal(mean_over_studies(table).probabilities, table.probabilities)
    assert sorted(mean_over_studies(table, unit="study").image_uid.tolist()) == sorted(table.image_uid.tolist())


def test_a_single_view_and_equal_views_keep_their_value_exactly(made_up):
    table, _ = made_up(count=3)
    table = dataclasses.replace(table, study_id=np.full(3, "s"), patient_id=np.full(3, "p"))
    table = table.replace(np.full(table.probabilities.shape, 0.1))
    assert (mean_over_studies(table).probabilities == 0.1).all()


def test_a_finding_never_trained_stays_so(made_up):
    table, _ = made_up()
    values = table.probabilities.copy()
    values[:, 1] = np.nan
    assert mean_over_studies(table.replace(values)).trained.tolist() == [True, False, True, True]


@pytest.mark.parametrize("stage", ["ensemble", "calibrated"])
def test_later_stages_are_refused(made_up, stage):
    with pytest.raises(StageError, match=stage):
        mean_over_studies(made_up(stage=stage)[0])


@pytest.mark.parametrize("stage", ["ensemble", "calibrated"])
def test_an_ensemble_is_sent_back_to_its_members(made_up, stage):
    with pytest.raises(StageError, match=r"members.*--raw.*hilum combine .* --study mean --ensemble mean"):
        mean_over_studies(made_up(stage=stage, ensemble="mean")[0])


def test_impossible_requests_are_refused(made_up):
    table, _ = made_up()
    with pytest.raises(UnknownNameError, match="median"):
        aggregate_studies(table, "median")
    with pytest.raises(UnknownNameError, match="patient"):
        mean_over_studies(table, unit="patient")
    with pytest.raises(PredictionError, match="images are gone"):
        mean_over_studies(mean_over_studies(table, unit="study"))
    with pytest.raises(PredictionError, match="no rows"):
        mean_over_studies(table.rows(np.array([], dtype=int)))
