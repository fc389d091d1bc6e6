"""Every leak that the table alone can show, planted one at a time; what weights have seen; facts on public weights."""

import csv
from importlib.resources import files

import numpy as np
import polars as pl
import pytest

from hilum.core.errors import ManifestError, UnknownNameError
from hilum.core.types import image_uid
from hilum.data.leaks import (
    IDENTITIES,
    ORIGINS,
    exposed_to_known_weights,
    known_exposures,
    leaks,
    seen_by_weights,
)
from hilum.data.schema import complete

ROWS = 40


def table(**changes) -> pl.DataFrame:
    """Twenty patients of two images: twelve in train, four in val, four in test; the last column is their release."""
    patient = [index // 2 for index in range(ROWS)]
    split = ["train" if p < 12 else "val" if p < 16 else "test" for p in patient]
    columns = {
        "image_uid": [image_uid("d", f"{index}.png") for index in range(ROWS)],
        "dataset": ["d"] * ROWS,
        "source_relpath": [f"{index}.png" for index in range(ROWS)],
        "source_root_key": ["d"] * ROWS,
        "patient_id": [f"d/SECRET{p}" for p in patient],
        "study_id": [f"d/SECRET{p}/1" for p in patient],
        "image_id": [f"{index}.png" for index in range(ROWS)],
        "view": ["PA"] * ROWS,
        "split_project": split,
        "ssl_ok": [name == "train" for name in split],
        "ssl_reason": [""] * ROWS,
    } | changes
    return complete(pl.DataFrame(columns), ())


def planted(frame: pl.DataFrame, values: dict[tuple[str, int], object]) -> pl.DataFrame:
    for (column, row), value in values.items():
        cells = frame[column].to_list()
        cells[row] = value
        frame = frame.with_columns(pl.Series(column, cells, dtype=frame.schema[column]))
    return frame


def kinds(problems) -> list[str]:
    return [problem.kind for problem in problems]


OTHER = {("dataset", 39): "r", ("patient_id", 39): "r/SECRETX", ("study_id", 39): "r/SECRETX/1", ("dataset", 38): "r",
         ("patient_id", 38): "r/SECRETX", ("study_id", 38): "r/SECRETX/1"}  # fmt: skip
"""The last patient, of test, is another dataset's."""
PLANTS = {
    "patient across splits": {("patient_id", 39): "d/SECRET0"},
    "study across splits": {("study_id", 39): "d/SECRET0/1"},
    "image across splits": {("image_id", 39): "0.png"},
    "path across splits": {("source_relpath", 39): "0.png"},
    "file across splits": {("source_sha256", 39): "f" * 64, ("source_sha256", 0): "f" * 64},
    "pixels across splits": {("pixel_sha256", 39): "e" * 64, ("pixel_sha256", 0): "e" * 64},
    "origin image across splits": {**OTHER, ("origin_image", 39): "nih/1.png", ("origin_image", 0): "nih/1.png"},
    "origin patient across splits": {**OTHER, ("origin_patient", 39): "nih/1", ("origin_patient", 0): "nih/1"},
    "evaluation in pretraining": {("ssl_ok", 39): True},
}


def test_a_clean_table_has_no_leak():
    assert leaks(table()) == []
    assert leaks(planted(table(), OTHER)) == []


def test_every_identity_has_a_plant():
    names = {f"{name} across splits" for name in (*IDENTITIES, *ORIGINS)} | {"evaluation in pretraining"}
    assert names == set(PLANTS)


@pytest.mark.parametrize("kind", PLANTS)
def test_each_planted_leak_is_found(kind):
    found = leaks(planted(table(), PLANTS[kind]))
    assert kind in kinds(found)
    assert all("SECRET" not in problem.message + "".join(problem.examples) for problem in found)
    (fault,) = [problem for problem in found if problem.kind == kind]
    assert 0 < fault.count <= 4


@pytest.mark.parametrize("kind", sorted(set(PLANTS) - {"evaluation in pretraining"}))
@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("val", "test")])
def test_it_is_found_between_any_two_sides(kind, one, other):
    first = {"train": 0, "val": 25}[one]
    second = {"val": 25, "test": 39}[other]
    start = table()
    plant = {(column, first if row == 0 else second if row == 39 else row): value
             for (column, row), value in PLANTS[kind].items()}  # fmt: skip
    if ("patient_id", second) in plant and kind == "patient across splits":
        plant[("patient_id", second)] = start["patient_id"][first]
    for column in ("study_id", "image_id", "source_relpath"):
        if (column, second) in plant and kind.split()[0] in ("study", "image", "path"):
            plant[(column, second)] = start[column][first]
    if kind.startswith("origin") and second == 25:
        plant[("dataset", 25)] = "r"
        plant[("patient_id", 25)] = plant[("patient_id", 24)] = "r/SECRETY"
        plant[("dataset", 24)] = "r"
    assert kind in kinds(leaks(planted(start, plant)))


def test_a_leak_into_pretraining_outside_the_splits_counts():
    """An image of no split that may be pretrained on has the pixels of one in test."""
    plant = {("split_project", 0): "", ("split_project", 1): "", ("ssl_ok", 0): True,
             ("pixel_sha256", 39): "e" * 64, ("pixel_sha256", 0): "e" * 64}  # fmt: skip
    assert "pixels across splits" in kinds(leaks(planted(table(), plant)))
    closed = plant | {("ssl_ok", 0): False, ("ssl_ok", 1): False}
    assert leaks(planted(table(), closed)) == []


def test_one_datasets_own_patients_are_reported_once():
    """Ancestry is for what the dataset's own ids do not show."""
    origin = [f"nih/{index // 2}" for index in range(ROWS)]
    frame = planted(table(origin_patient=origin), {("split_project", 1): "test", ("ssl_ok", 1): False})
    assert "patient across splits" in kinds(leaks(frame))
    assert "origin patient across splits" not in kinds(leaks(frame))


def seen(*uids: str) -> np.ndarray:
    return np.array([int(uid, 16) for uid in uids], np.uint64)


def test_what_weights_have_seen():
    frame = table()
    uids = frame["image_uid"].to_list()
    assert seen_by_weights(frame, "run", seen(*uids[:24])) == []
    assert seen_by_weights(frame, "run", seen()) == []
    found = seen_by_weights(frame, "run", seen(*uids[:24], uids[38]))
    assert [(fault.kind, fault.count) for fault in found] == [
        ("image seen by the weights", 1),
        ("patient seen by the weights", 1),
    ]
    assert found[0].examples == (uids[38],)
    assert found[1].examples == (uids[39],)
    assert "SECRET" not in found[0].message + found[1].message
    assert seen_by_weights(frame, "run", seen(uids[38]), ("val",)) == []


@pytest.mark.parametrize("column", ["pixel_sha256", "source_sha256"])
def test_a_seen_copy_of_an_evaluation_image_exposes_it(column):
    frame = planted(table(), {(column, 0): "a" * 64, (column, 39): "a" * 64})
    found = seen_by_weights(frame, "run", seen(frame["image_uid"][0]))
    assert [(fault.kind, fault.examples) for fault in found] == [
        ("image seen by the weights", (frame["image_uid"][39],))
    ]


def test_a_picture_seen_under_another_datasets_name_exposes_it():
    """The run saw NIH's image; the manifest holds RSNA's copy of it and no row of NIH."""
    frame = planted(table(), {("origin_image", 39): "nih/00000001_000.png"})
    met = seen(image_uid("nih", "00000001_000.png"))
    assert kinds(seen_by_weights(frame, "run", met)) == ["image seen by the weights", "patient seen by the weights"]
    assert seen_by_weights(table(), "run", met) == []


def test_a_uid_that_is_no_number_is_an_error_not_a_pass():
    with pytest.raises(ManifestError, match="16 hex digits"):
        seen_by_weights(planted(table(), {("image_uid", 3): "no number"}), "run", seen())


def test_the_table_of_known_exposure_is_well_formed():
    text = files("hilum.data").joinpath("facts/known_exposure.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["weights", "dataset", "part", "share", "source"]
    assert all(len(row) == 5 and all(cell.strip() == cell != "" for cell in row) for row in rows)
    facts = known_exposures()
    assert len(facts) == len(rows) - 1 == len({(fact.weights, fact.dataset, fact.part) for fact in facts})
    assert {"RAD-DINO", "CheXFound-CXR1M", "DINO-MIMIC", "slides-710k"} <= {fact.weights for fact in facts}


def test_known_weights_expose_the_lists_that_they_have_seen():
    frame = table(dataset=["nih"] * ROWS, split_official=["train"] * 36 + ["test"] * 4)
    found = exposed_to_known_weights(frame, "rad-dino")
    assert [(fault.kind, fault.count) for fault in found] == [("evaluation set known to the weights", 4)]
    assert "RAD-DINO" in found[0].message
    assert "4 of nih in test" in found[0].message
    (fault,) = exposed_to_known_weights(frame, "slides-710k")  # the official training list, which is in val here
    assert fault.count == 12
    (fault,) = exposed_to_known_weights(frame, "CheXFound-CXR1M")
    assert fault.count == 16  # all of NIH


def test_where_the_manifest_does_not_say_which_list_it_counts_as_exposed():
    (fault,) = exposed_to_known_weights(table(dataset=["nih"] * ROWS), "RAD-DINO")
    assert fault.count == 16


def test_known_weights_expose_descendants_and_nothing_else():
    inherited = table(dataset=["rsna"] * ROWS, origin_image=[f"nih/{index}.png" for index in range(ROWS)])
    assert kinds(exposed_to_known_weights(inherited, "RAD-DINO")) == ["evaluation set known to the weights"]
    assert exposed_to_known_weights(table(dataset=["vindr"] * ROWS), "RAD-DINO") == []
    training = table(dataset=["nih"] * ROWS, split_project=["train"] * ROWS, ssl_ok=[True] * ROWS)
    assert exposed_to_known_weights(training, "RAD-DINO") == []


@pytest.mark.parametrize("dataset", ["rsna", "siim"])
@pytest.mark.parametrize("weights", ["RAD-DINO", "CheXFound-CXR1M", "slides-710k", "NIH-CXR-LT"])
def test_copies_of_nih_are_exposed_with_it_also_without_a_map(dataset, weights):
    (fault,) = exposed_to_known_weights(table(dataset=[dataset] * ROWS), weights)
    assert (fault.count, "have seen nih" in fault.message) == (16, True)


def test_mimic_is_exposed_to_what_saw_its_relabelling_and_cxr_lts_own_lists_go_before():
    (fault,) = exposed_to_known_weights(table(dataset=["mimic"] * ROWS), "slides-710k")
    assert fault.count == 16
    mimic = {"origin_image": [f"mimic/{index}" for index in range(ROWS)]}
    held_out = table(dataset=["cxrlt"] * ROWS, split_official=["train"] * 24 + ["test"] * 16, **mimic)
    assert exposed_to_known_weights(held_out, "slides-710k") == []  # its pool left the official test set out


def test_what_a_dataset_is_counts_and_not_what_it_is_called():
    frame = table(dataset=["lt"] * ROWS)
    assert exposed_to_known_weights(frame, "CXR-LT-2023") == []  # nothing says what it is
    (fault,) = exposed_to_known_weights(frame, "CXR-LT-2023", {"lt": "cxrlt"})
    assert fault.count == 16
    named = table(dataset=["nih"] * ROWS)
    assert exposed_to_known_weights(named, "RAD-DINO", {"nih": "vindr"}) == []
    assert exposed_to_known_weights(named, "RAD-DINO", {"nih": "folder"}) != []  # a folder is what its name says


def test_unknown_weights_are_refused_not_passed():
    with pytest.raises(UnknownNameError, match="RAD-DINO"):
        exposed_to_known_weights(table(), "RAD-DIN")
