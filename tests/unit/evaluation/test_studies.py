import dataclasses

import numpy as np
import pytest

from hilum.core.errors import PredictionError, StageError, UnknownNameError
from hilum.evaluation.predictions import IDENTITY
from hilum.evaluation.studies import AGGREGATIONS, mean_over_studies, study_uids


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


@pytest.mark.parametrize("method", AGGREGATIONS)
@pytest.mark.parametrize("unit", ["image", "study"])
def test_idempotent_to_the_bit(made_up, unit, method):
    once = mean_over_studies(made_up()[0], unit, method)
    np.testing.assert_array_equal(mean_over_studies(once, unit, method).probabilities, once.probabilities)


@pytest.mark.parametrize("unit", ["image", "study"])
def test_row_order_does_not_matter_to_the_bit(made_up, unit):
    table, _ = made_up(count=200, patients=12)
    order = np.random.default_rng(1).permutation(len(table))
    straight, shuffled = mean_over_studies(table, unit), mean_over_studies(table.rows(order), unit)
    if unit == "image":
        straight = straight.rows(order)
    for name in (*IDENTITY, "probabilities"):
        np.testing.assert_array_equal(getattr(straight, name), getattr(shuffled, name))


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


def test_impossible_requests_are_refused(made_up):
    table, _ = made_up()
    with pytest.raises(UnknownNameError, match="median"):
        mean_over_studies(table, method="median")
    with pytest.raises(UnknownNameError, match="patient"):
        mean_over_studies(table, unit="patient")
    with pytest.raises(PredictionError, match="images are gone"):
        mean_over_studies(mean_over_studies(table, unit="study"))
    with pytest.raises(PredictionError, match="no rows"):
        mean_over_studies(table.rows(np.array([], dtype=int)))
