"""SIIM-ACR: the space in its header, several rows an image, headers, faults, and phantoms read back."""

import json

import cv2
import numpy as np
import polars as pl
import pytest

from hilum.core.errors import ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import dicom
from hilum.data.phantoms.layouts.siim import runs
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import siim

HEADER = "ImageId, EncodedPixels"
A, B, C = "1.2.276.0.7230010.3.1", "1.2.276.0.7230010.3.2", "1.2.276.0.7230010.3.3"
ROWS = [f"{A}, 557374 2 1015 8", f"{A}, 10 4", f"{B}, -1", f"{C}, -1"]
GREY = np.tile(np.array([0, 0, 60, 120, 180, 240, 255, 255], np.uint8), (8, 1))
ELEMENTS = {
    A: {"PatientID": "p1", "StudyInstanceUID": "9.1", "ViewPosition": "AP", "PatientSex": "F", "PatientAge": "58"},
    B: {"PatientID": "p1", "StudyInstanceUID": "9.2", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "413"},
    C: {},
}


@pytest.fixture
def make(tmp_path):
    def write(rows=ROWS, header=HEADER, name="train-rle.csv", images=(A, B, C)):
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n")
        for image in images:
            folder = tmp_path / "dicom-images-train" / f"study-{image}" / "series"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{image}.dcm").write_bytes(dicom(GREY, image, **ELEMENTS.get(image, {})))
        return SourceOptions("siim", tmp_path)

    return write


def test_rows(make):
    rows = siim.read(make())
    frame = rows.frame
    assert frame["image_id"].to_list() == [A, B, C]
    assert frame["label.Pneumothorax"].to_list() == [1, 0, 0]
    assert frame["label.Normal"].to_list() == [0, -1, -1]  # without a pneumothorax is not normal
    assert frame["source_relpath"][0] == f"dicom-images-train/study-{A}/series/{A}.dcm"
    assert frame["patient_id"].to_list() == ["p1", "p1", C]
    assert frame["study_id"].to_list() == ["9.1", "9.2", C]
    assert frame["view_raw"].to_list() == ["AP", "PA", ""]
    assert frame["age_years"].to_list() == [58, None, None]
    assert json.loads(frame["raw_labels"][0]) == [" 557374 2 1015 8", " 10 4"]  # untouched, space and all
    assert "no public map says which" in rows.notes[0]
    assert "1 images name no patient" in rows.notes[1]


@pytest.mark.parametrize("name", ["stage_2_train.csv", "stage_1_train.csv"])
def test_the_later_tables_have_no_space(make, name):
    straight = siim.read(make()).frame
    (make().root / "train-rle.csv").unlink()
    later = make([row.replace(", ", ",") for row in ROWS], "ImageId,EncodedPixels", name)
    assert siim.read(later).frame.drop("raw_labels").equals(straight.drop("raw_labels"))


def test_columns_in_another_order(make):
    straight = siim.read(make()).frame.drop("raw_labels")
    swapped = [f"{row.split(', ')[1]},{row.split(', ')[0]}" for row in ROWS]
    assert siim.read(make(swapped, "EncodedPixels,ImageId")).frame.drop("raw_labels").equals(straight)


@pytest.mark.parametrize(
    ("rows", "header", "error", "message"),
    [
        ([*ROWS, f"{A}, -1"], HEADER, ManifestError, "row 2: one image has a region in one row and none in another"),
        ([*ROWS[:3], f"{C}, 1 2 3"], HEADER, UnknownLabelError, "row 5: 'EncodedPixels' is neither -1 nor pairs"),
        ([*ROWS[:3], f"{C}, -2"], HEADER, UnknownLabelError, "row 5"),
        ([*ROWS[:3], f"{C},"], HEADER, UnknownLabelError, "row 5"),
        ([*ROWS[:3], "../up, -1"], HEADER, PathError, "row 5: 'ImageId' is not the name of a file"),
        ([*ROWS[:3], f"{C}, -1, 3"], HEADER, ManifestError, "row 5: 3 fields, the header has 2"),
        (ROWS, "ImageId, Pixels", MissingColumnError, "'EncodedPixels' .nearest: 'Pixels'"),
    ],
)
def test_faults_name_their_row(make, rows, header, error, message):
    with pytest.raises(error, match=message):
        siim.read(make(rows, header))


def test_missing_doubled_and_unreadable_images(make, tmp_path):
    with pytest.raises(PathError, match=r"holds none of train-rle\.csv"):
        siim.read(SourceOptions("siim", tmp_path))
    options = make(images=(A, C))
    with pytest.raises(PathError, match=r"1 of 3 listed images .*train-rle.csv row 4"):
        siim.read(options)
    assert siim.read(SourceOptions("siim", tmp_path, allow_missing=True)).frame["image_id"].to_list() == [A, C]
    make()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / f"{A}.dcm").touch()
    with pytest.raises(ManifestError, match="1 images are there more than once"):
        siim.read(options)
    (tmp_path / "copy" / f"{A}.dcm").unlink()
    (tmp_path / "dicom-images-train" / f"study-{B}" / "series" / f"{B}.dcm").write_bytes(b"")
    rows = siim.read(options)
    assert any("1 DICOM headers cannot be read" in note for note in rows.notes)
    manifest, _ = build_manifest([SourceSpec("siim", "siim", tmp_path)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=8, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored, summary.quarantined) == (3, 2, {"zero_bytes": 1})


def test_images_of_one_patient_stay_in_one_split(make, tmp_path):
    make()
    for seed in range(6):
        manifest, _ = build_manifest([SourceSpec("siim", "siim", tmp_path)], ManifestOptions(seed=seed))
        splits = manifest.frame.filter(pl.col("patient_id") == "siim/p1")["split_project"]
        assert splits.n_unique() == 1


def test_runs_are_counted_down_the_columns():
    mask = np.zeros((4, 3), np.uint8)
    mask[1:3, 0] = mask[3, 0] = 255
    mask[0, 1] = 255
    assert runs(mask) == "1 4"  # rows 1 to 3 of the first column run on into the second
    mask[2, 2] = 255
    assert runs(mask) == "1 4 5 1"


def test_phantoms_come_back_as_the_cohort_that_they_were_made_from(tmp_path):
    write_phantoms(tmp_path / "out", "siim", 12, 4, 64, 3, workers=1)
    rows = siim.read(SourceOptions("siim", tmp_path / "out"))
    expected = [
        int("Pneumothorax" in study.findings)
        for patient in plan_cohort(12, 4, 3)
        for study in patient.studies
        for plan in study.images
        if plan.position in ("PA", "AP")
    ]
    assert rows.frame["label.Pneumothorax"].to_list() == expected
    assert set(expected) == {0, 1}
    assert rows.frame["patient_id"].n_unique() == 12
    masks = {line.split(",")[0]: line.split(",")[2] for line in (tmp_path / "out" / "masks.csv").read_text().split("\n")
             if ",Pneumothorax," in line}  # fmt: skip
    drawn = rows.frame.filter(pl.col("label.Pneumothorax") == 1)
    for name, cells in drawn.select("image_id", "raw_labels").iter_rows():
        if name in masks:
            mask = cv2.imread(str(tmp_path / "out" / masks[name]), cv2.IMREAD_GRAYSCALE)
            first = int(json.loads(cells)[0].split()[0])
            assert mask.T.reshape(-1)[first] > 0
            assert not mask.T.reshape(-1)[:first].any()
    assert masks
