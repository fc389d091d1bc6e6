import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hilum.core.errors import PredictionError
from hilum.evaluation.metrics import average_precision, f1_at, roc_auc
from hilum.evaluation.submission import move_cut_to_half, read_ids, submission_rows


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(1e-6, 1 - 1e-6))
def test_the_cut_moves_to_a_half_and_the_order_stays(scores, threshold):
    p = np.array([*scores, threshold, np.nextafter(threshold, 1), np.nextafter(threshold, 0), 0.0, 1.0])
    moved = move_cut_to_half(p, threshold)
    assert ((moved >= 0) & (moved <= 1)).all()
    np.testing.assert_array_equal(moved > 0.5, p > threshold)
    np.testing.assert_array_equal(np.argsort(np.argsort(np.unique(p))), np.argsort(np.argsort(np.unique(moved))))
    np.testing.assert_array_equal(np.unique(p, return_inverse=True)[1], np.unique(moved, return_inverse=True)[1])


def test_scaling_leaves_ap_and_auc_and_makes_half_the_tuned_cut():
    rng = np.random.default_rng(0)
    y = (rng.random(500) < 0.1).astype(np.int8)
    p = np.round(np.clip(rng.normal(0.05 + 0.1 * y, 0.05), 0, 1), 3)
    moved = move_cut_to_half(p, 0.12)
    assert average_precision(moved, y) == average_precision(p, y)
    assert roc_auc(moved, y) == roc_auc(p, y)
    assert f1_at(moved, y, 0.5) == f1_at(p, y, 0.12)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.2, float("nan")])
def test_a_cut_outside_the_open_interval_is_refused(threshold):
    with pytest.raises(PredictionError, match="inside"):
        move_cut_to_half(np.array([0.2]), threshold)


def test_rows_and_classes_come_in_the_challenges_order(made_up):
    table, _ = made_up()
    ids = table.image_id[[7, 3, 50]].tolist()
    np.testing.assert_array_equal(submission_rows(table, ["D", "B"], ids), table.probabilities[[7, 3, 50]][:, [3, 1]])


def test_what_is_missing_is_named(made_up):
    table, _ = made_up()
    with pytest.raises(PredictionError, match=r"1 of 2 listed images.*'x'"):
        submission_rows(table, ["A"], [str(table.image_id[0]), "x"])
    with pytest.raises(PredictionError, match="'Z'"):
        submission_rows(table, ["A", "Z"], [str(table.image_id[0])])
    values = table.probabilities.copy()
    values[:, 1] = np.nan
    untrained = table.replace(values)
    with pytest.raises(PredictionError, match="never trained: 'B'"):
        submission_rows(untrained, ["A", "B"], [str(table.image_id[0])])
    assert submission_rows(untrained, ["B"], [str(table.image_id[0])], {"B": 0.2}).tolist() == [[0.2]]


@pytest.mark.parametrize("content", ["id\na\n", "dicom_id\na\na\n", "dicom_id\n", "dicom_id,x\n,1\n"])
def test_a_bad_list_of_ids_is_refused(tmp_path, content):
    (tmp_path / "ids.csv").write_text(content)
    with pytest.raises(PredictionError, match=r"ids\.csv"):
        read_ids(tmp_path / "ids.csv")
    with pytest.raises(PredictionError, match="cannot be read"):
        read_ids(tmp_path / "absent.csv")
