import dataclasses
from itertools import permutations

import numpy as np
import pytest

from hilum.core.errors import PredictionError, StageError
from hilum.evaluation.ensemble import mean_over_models
from hilum.evaluation.studies import mean_over_studies


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
