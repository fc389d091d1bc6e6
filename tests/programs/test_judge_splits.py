"""runs/judge_splits.py: patients that are tested, splits that differ, and a model that is better."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from hilum.core.files import read_json
from hilum.data.store import write_arrays
from hilum.evaluation.predictions import Predictions, write_predictions


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "runs"))
    return importlib.import_module("judge_splits")


def test_an_interval_over_splits_is_wide_where_splits_differ_and_patients_do_not(program) -> None:
    values = np.repeat([[0.1], [0.3], [0.2]], 501, axis=1)
    drawn = program.draw_seeds(3, 500, 0)
    found = program.over_splits(values, drawn)
    assert found[0] == pytest.approx(0.2)
    np.testing.assert_allclose(found[1:], values[:, 0][drawn].mean(axis=1))
    assert np.ptp(found[1:]) == pytest.approx(0.2)


def test_models_of_several_splits_are_judged_on_the_patients_that_were_tested(program, tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 1)) < 0.4).astype(np.int8)
    for number in range(3):
        part = tmp_path / f"split_{number}"
        splits = ["test" if (n + number) % 4 == 0 else "train" for n in range(80)]
        write_arrays(
            part / "store", [np.zeros((8, 8), np.uint8)] * 80, labels, ("Edema",), splits=splits, views=["PA"] * 80,
            patients=[f"arrays/p{n}" for n in range(80)], studies=[f"arrays/s{n}" for n in range(80)],
        )  # fmt: skip
        tested = program.read_truth(part / "store")
        rows = np.flatnonzero(tested.split == "test")
        for name, gain in (("floor", 0.0), ("model", 1.0)):
            values = np.clip(0.2 * rng.random((len(rows), 1)) + 0.5 * gain * tested.labels[rows], 0, 1)
            uid, study, patient = (column[rows] for column in (tested.image_uid, tested.study_id, tested.patient_id))
            dataset, view = np.full((2, len(rows)), [["arrays"], ["PA"]])
            predictions = Predictions(
                uid, uid, study, patient, dataset, view, ("Edema",), values, {"split": "test", "exposed_images": 0}
            )
            write_predictions(predictions, part / f"{name}.parquet")
    program.main(tmp_path, ["floor", "model"])
    result = read_json(tmp_path / "result.json", ValueError)
    assert result["patients"] == 60
    row = next(row for row in result["rows"] if (row["model"], row["metric"]) == ("model", "mAUC"))
    assert row["mean"] == 1.0
    assert row["splits"] == [1.0, 1.0, 1.0]
    assert row["difference_ci95"][0] > 0.2
    assert row["difference"] == pytest.approx(np.mean(row["difference_splits"]), abs=1e-4)
    assert row["probability_better"] > 0.99
