"""Splits: whole patients, shares kept, rare findings shared out, the same whatever the order of rows."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hilum.core.errors import ConfigError, LeakageError, ManifestError
from hilum.data.splits import assign, check_fractions, mark_ssl, project_split

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def pool(patients: int, prevalences: tuple[float, ...], seed: int = 0) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    names = [f"p{index}" for index in range(patients) for _ in range(rng.integers(1, 5))]
    return names, (rng.random((len(names), len(prevalences))) < prevalences).astype(np.int8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 3))
def test_no_patient_is_ever_in_two_splits_and_row_order_does_not_matter(seed, patients, findings):
    names, labels = pool(patients, (0.3, 0.05, 0.01)[:findings], seed)
    split = project_split("d", names, labels, FRACTIONS, seed)
    assert set(split) <= set(FRACTIONS)
    for name in set(names):
        assert len({part for part, patient in zip(split, names, strict=True) if patient == name}) == 1
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = project_split("d", [names[index] for index in order], labels[order], FRACTIONS, seed)
    np.testing.assert_array_equal(shuffled, split[order])


def test_shares_and_rare_findings_are_kept():
    """Counts by hand: each split's share of every finding is within two images of what was asked, rare ones too."""
    names, labels = pool(2000, (0.3, 0.05, 0.01, 0.003))
    split = project_split("d", names, labels, FRACTIONS, 0)
    for part, share in FRACTIONS.items():
        assert abs((split == part).mean() - share) < 0.005
        for column in range(labels.shape[1]):
            total = labels[:, column].sum()
            assert abs(labels[split == part, column].sum() - share * total) <= 2 + 0.02 * total * share


def test_stratification_beats_chance_on_a_rare_finding():
    """Ten patients with a finding at 10 % for val: drawn at random, about a third of splits give val none."""
    names = [f"p{index}" for index in range(1000)]
    labels = np.zeros((1000, 1), np.int8)
    labels[::100] = 1
    counts = [labels[project_split("d", names, labels, FRACTIONS, seed) == "val"].sum() for seed in range(20)]
    assert set(counts) == {1}


def test_only_positives_are_looked_at():
    """Unknown and uncertain are not positives: the split is that of zeros."""
    names, labels = pool(100, (0.2,))
    masked = np.where(labels == 1, 1, -2).astype(np.int8)
    np.testing.assert_array_equal(
        project_split("d", names, labels, FRACTIONS, 3), project_split("d", names, masked, FRACTIONS, 3)
    )


def test_seed_and_dataset_change_the_split():
    names, labels = pool(200, (0.2,))
    first = project_split("d", names, labels, FRACTIONS, 0)
    assert (first != project_split("d", names, labels, FRACTIONS, 1)).any()
    assert (first != project_split("e", names, labels, FRACTIONS, 0)).any()


def official(patients: list[str], parts: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"patient_id": patients, "split_official": parts})


def test_official_split_with_a_development_set_is_taken_as_it_is():
    frame = official(["a", "a", "b", "c", "d"], ["train", "train", "val", "test", ""])
    labels = np.ones((5, 1), np.int8)
    assert assign("d", frame, labels, "official", 0.5, 0.2, 0).tolist() == ["train", "train", "val", "test", ""]


def test_val_is_carved_from_official_train_by_patient():
    names, labels = pool(200, (0.2,))
    parts = ["test" if name < "p2" else "train" for name in names]
    split = assign("d", official(names, parts), labels, "official", 0.25, 0.2, 0)
    parts, split = np.array(parts), np.array(split)
    np.testing.assert_array_equal(split == "test", parts == "test")
    assert set(split[parts == "train"]) == {"train", "val"}
    assert abs((split == "val").sum() / (parts == "train").sum() - 0.25) < 0.02
    assert not {n for n, s in zip(names, split, strict=True) if s == "val"} & {
        n for n, s in zip(names, split, strict=True) if s == "train"
    }


def test_an_unlabelled_development_set_is_not_used_as_val():
    frame = official(["a", "b", "c", "d", "e", "f"], ["train"] * 4 + ["val", "test"])
    labels = np.array([[1], [0], [1], [0], [-1], [-1]], np.int8)
    split = assign("d", frame, labels, "official", 0.25, 0, 0)
    assert split[4] == ""
    assert split[5] == "test"
    assert sorted(split[:4]) == ["train", "train", "train", "val"]


def test_official_without_a_split_and_with_a_crossing_patient():
    labels = np.zeros((2, 1), np.int8)
    with pytest.raises(ManifestError, match="no official split"):
        assign("d", official(["a", "b"], ["", ""]), labels, "official", 0.1, 0.2, 0)
    with pytest.raises(
        LeakageError, match=r"1 patients are on both sides of the given split \(test and train\)"
    ) as error:
        assign("d", official(["secret", "secret"], ["train", "test"]), labels, "official", 0.1, 0.2, 0)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (0.5, 0.5), (1.0, 0.0), (float("nan"), 0.1)])
def test_fractions_that_leave_nothing_are_refused(val, test):
    with pytest.raises(ConfigError, match="Fractions"):
        check_fractions(val, test)


def test_ssl_excludes_patients_of_either_evaluation():
    frame = pl.DataFrame(
        {
            "dataset": ["d"] * 5 + ["e"],
            "patient_id": ["a", "a", "b", "c", "c", "a"],
            "split_project": ["train", "train", "val", "train", "train", "train"],
            "split_official": ["train", None, "", "train", "test", ""],
        }
    )
    marked = mark_ssl(frame)
    assert marked["ssl_ok"].to_list() == [True, True, False, False, False, True]
    assert marked["ssl_reason"].to_list()[2:5] == [
        "excluded: patient in d val or test",
        "excluded: patient in d official val or test",
        "excluded: patient in d official val or test",
    ]
