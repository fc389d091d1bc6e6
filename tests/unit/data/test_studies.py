"""Studies of a store against a dictionary made by hand."""

from collections import defaultdict

import numpy as np
import pytest

from hilum.data.store import write_arrays
from hilum.data.studies import StudyIndex


def test_studies_are_those_of_dataset_patient_and_study(tmp_path):
    rng = np.random.default_rng(0)
    count = 60
    patients = [f"p{rng.integers(8)}" for _ in range(count)]
    studies = [f"s{rng.integers(3)}" for _ in range(count)]
    datasets = [("a", "b")[rng.integers(2)] for _ in range(count)]
    images = [np.zeros((4, 4), np.uint8)] * count
    store = write_arrays(
        tmp_path / "store", images, np.zeros((count, 1), np.int8), ["x"],
        patients=patients, studies=studies, datasets=datasets,
    )  # fmt: skip
    index = StudyIndex(store)
    expected: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, key in enumerate(zip(store.datasets, store.patients, store.studies, strict=True)):
        expected[key].append(number)
    assert len(index) == len(expected)
    assert [index.images(study).tolist() for study in range(len(index))] == list(expected.values())
    for number in range(count):
        together = index.images(int(index.of_image[number])).tolist()
        assert number in together
        assert sorted([number, *index.siblings(number).tolist()]) == together
    with pytest.raises(IndexError):
        index.images(len(index))


def test_an_image_without_a_study_stands_alone(tmp_path):
    images = [np.zeros((4, 4), np.uint8)] * 3
    store = write_arrays(
        tmp_path / "store", images, np.zeros((3, 1), np.int8), ["x"], patients=["p"] * 3, studies=["", "", "s"]
    )
    index = StudyIndex(store)
    assert [index.images(study).tolist() for study in range(len(index))] == [[0], [1], [2]]
    assert index.siblings(0).tolist() == []
