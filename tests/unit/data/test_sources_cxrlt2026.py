"""CXR-LT 2026: one column a class or a list in one cell, patients that are not what they seem, and its faults."""

import json

import cv2
import numpy as np
import pytest

from hilum.core.errors import LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.label_maps import LabelPolicy
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.data.leaks import leaks
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import png, png16, png_rgba
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import cxrlt2026, nih, padchest

CLASSES = [
    "Normal",
    "aortic elongation",
    "cardiomegaly",
    "pleural effusion",
    "Nodule",
    "atelectasis",
    "pleural thickening",
    "aortic atheromatosis",
    "Support Devices",
    "alveolar pattern",
    "fracture",
    "Hernia",
    "Emphysema",
    "azygos lobe",
    "Hydropneumothorax",
    "Kyphosis",
    "Mass",
    "Pneumothorax",
    "Subcutaneous Emphysema",
    "pneumoperitoneo",
    "vascular hilar enlargement",
    "vertebral degenerative changes",
    "hyperinflated lung",
    "interstitial pattern",
    "central venous catheter",
    "hypoexpansion",
    "bronchiectasis",
    "hemidiaphragm elevation",
    "sternotomy",
    "calcified densities",
]
HEADER = "ImageID,StudyDate_DICOM,PatientID," + ",".join(CLASSES)
PADCHEST = [f"{n}16840111366964012448576807312009183_00-{n:03d}-001.png" for n in range(1, 7)]
GIVEN = [
    ["Normal"], ["cardiomegaly", "aortic elongation"], ["alveolar pattern"], ["Hydropneumothorax"],
    ["central venous catheter"], ["Subcutaneous Emphysema", "vertebral degenerative changes"],
]  # fmt: skip
NIH = ["00000012_000.png", "00000012_003.png"]


def table(header=HEADER) -> str:
    lines = [header]
    for name, labels in zip(PADCHEST, GIVEN, strict=True):
        cells = {"ImageID": name, "StudyDate_DICOM": "20140915", "PatientID": "2.16E+37"} | dict.fromkeys(labels, "1")
        lines.append(",".join(cells.get(column, "0") for column in header.split(",")))
    return "\n".join(lines) + "\n"


def lists(labels=GIVEN, names=PADCHEST, header="filename,label") -> str:
    return "\n".join([header, *(f'{name},"{given}"' for name, given in zip(names, labels, strict=True))]) + "\n"


@pytest.fixture
def make(tmp_path):
    def write(train=None, present=(*PADCHEST, *NIH), folder="images", **others):
        (tmp_path / "CXRLT_2026_training.csv").write_text(table() if train is None else train)
        for name, text in others.items():
            (tmp_path / f"{name}.csv").write_text(text)
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in present:
            (tmp_path / folder / name).touch()
        return SourceOptions("cxrlt2026", tmp_path)

    return write


TEST = {"CXRLT_2026_TEST_ALL_TASK1": "ImageID\n" + "\n".join(NIH) + "\n"}


def test_every_image_is_a_patient_of_its_own_but_nihs(make):
    rows = cxrlt2026.read(make(**TEST))
    frame = rows.frame
    assert frame["image_id"].to_list() == [*PADCHEST, *NIH]
    assert frame["patient_id"].n_unique() == 7  # six and one; PatientID would say one and one
    assert frame["patient_id"].to_list()[6:] == ["00000012"] * 2
    assert frame["study_id"].to_list()[6:] == ["000", "003"]
    assert frame["origin_image"].to_list()[5:7] == [f"padchest/{PADCHEST[5]}", f"nih/{NIH[0]}"]
    assert frame["origin_patient"].to_list() == [None] * 6 + ["nih/00000012"] * 2
    assert frame["split_official"].to_list() == ["train"] * 6 + ["test"] * 2
    assert "PatientID" in rows.notes[0]
    assert "2.16E+37" not in frame.write_csv(separator=";")
    assert rows.official


def test_labels_by_hand(make):
    frame = cxrlt2026.read(make(**TEST)).frame
    positive = [
        sorted(name for name in frame.columns if name.startswith("label.") and row[name] == 1)
        for row in frame.iter_rows(named=True)
    ]
    assert positive == [
        ["label.Normal"],
        ["label.Cardiomegaly", "label.Tortuous Aorta"],
        [],  # a hint only
        ["label.Hydropneumothorax", "label.Pleural Effusion", "label.Pneumothorax"],
        ["label.Support Devices"],
        ["label.Subcutaneous Emphysema"],  # and not Emphysema
        [], [],  # test images have no labels
    ]  # fmt: skip
    assert frame["label.Normal"].to_list() == [1, 0, 0, 0, 0, 0, -1, -1]
    assert frame["label.Emphysema"].to_list() == [0] * 6 + [-1] * 2
    assert frame["label.Infiltration"].to_list() == [-1] * 8  # alveolar pattern is a hint; nothing denies
    assert frame["label.Scoliosis"].to_list() == [-1] * 8  # nobody was asked
    assert json.loads(frame["raw_labels"][1])["cardiomegaly"] == "1"
    assert frame["label_trust"].to_list() == ["text_mined"] * 6 + [None] * 2


def test_no_policy_for_blanks_makes_a_class_that_nobody_was_asked_about_negative(make, tmp_path):
    for given in (table(), lists()):
        options = SourceOptions("cxrlt2026", make(train=given, **TEST).root, policy=LabelPolicy(blank="zero"))
        assert cxrlt2026.read(options).frame["label.Scoliosis"].to_list() == [-1] * 8


def test_hints_of_the_weak_tier(make):
    options = SourceOptions("cxrlt2026", make().root, policy=LabelPolicy(tier="weak"))
    frame = cxrlt2026.read(options).frame
    assert frame["label.Infiltration"].to_list() == [-1, -1, 1, -1, -1, -1]


def test_a_list_in_one_cell_says_the_same(make):
    columns = cxrlt2026.read(make()).frame
    listed = cxrlt2026.read(make(lists())).frame
    labels = [name for name in columns.columns if name.startswith("label.")]
    assert listed.select(labels).equals(columns.select(labels))
    assert json.loads(listed["raw_labels"][1]) == {"label": "['cardiomegaly', 'aortic elongation']"}


def test_empty_lists_and_padchests_own_words(make):
    given = [[], ["pulmonary fibrosis", "pneumoperitoneo"], ["scoliosis"], ["normal"], ["cardiomegaly"], []]
    text = lists(given).replace('"[]"', '"[]"', 1)
    text = text[: text.rindex('"[]"')] + "\n"  # the last cell is empty altogether
    frame = cxrlt2026.read(SourceOptions("cxrlt2026", make(text).root, policy=LabelPolicy(blank="zero"))).frame
    # Of no list nothing is known, nor of a word that no list has, whatever blanks mean: fibrosis has several words.
    assert frame["label.Fibrosis"].to_list() == [-1, 1, -1, -1, -1, -1]
    assert frame["label.Pneumoperitoneum"].to_list() == [-1, 1, 0, 0, 0, -1]
    assert frame["label.Scoliosis"].to_list() == [-1, 0, 1, 0, 0, -1]


def test_removed_images_are_left_out(make):
    rows = cxrlt2026.read(make(Removal=f"ImageID\n{PADCHEST[2]}\nnot-listed.png\n"))
    assert rows.frame["image_id"].to_list() == [*PADCHEST[:2], *PADCHEST[3:]]
    assert "1 images that the organisers removed" in rows.notes[1]


def test_labels_of_test_tables_are_not_read(make):
    """A sample submission has columns of scores; they are nobody's labels."""
    test = f"ImageID,cardiomegaly\n{NIH[0]},1\n"
    frame = cxrlt2026.read(
        make(**{"CXRLT_2026_TEST_ALL_TASK1": test, "CXRLT_2026_TEST_ALL_TASK2": TEST.popitem()[1]})
    ).frame
    assert frame["label.Cardiomegaly"].to_list()[6:] == [-1, -1]
    assert frame["image_id"].to_list()[6:] == NIH  # an image of both tasks once


def test_same_pictures_as_nih(make, tmp_path_factory):
    other = tmp_path_factory.mktemp("nih")
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    (other / "Data_Entry_2017_v2020.csv").write_text(
        "\n".join([header, *(f"{name},No Finding,0,12,50,M,PA" for name in (NIH[0], "00000012_001.png"))]) + "\n"
    )
    (other / "images").mkdir()
    for name in (NIH[0], "00000012_001.png"):
        (other / "images" / name).touch()
    assert nih.read(SourceOptions("nih", other)).frame.height == 2
    test = "ImageID\n" + "\n".join(NIH) + "\n"
    specs = [
        SourceSpec("nih", "nih", other),
        SourceSpec("cxrlt2026", "cxrlt2026", make(CXRLT_2026_TEST_ALL_TASK1=test).root),
    ]
    frame = build_manifest(specs, ManifestOptions())[0].frame
    assert frame.filter(dataset="nih")["ssl_ok"].to_list() == [False, False]  # their patient is tested elsewhere


@pytest.mark.parametrize("padchest_first", [True, False])
def test_same_pictures_and_people_as_padchest(make, tmp_path_factory, padchest_first):
    other = tmp_path_factory.mktemp("padchest")
    patients = ["1", "2", "3", "4", "4", "6"]  # the fourth and fifth picture are of one person
    lines = [",".join(padchest.USED)]
    for number, (name, patient) in enumerate(zip(PADCHEST, patients, strict=True), start=1):
        cells = {"ImageID": name, "StudyID": str(number), "PatientID": patient, "Labels": "['normal']"}
        lines.append(",".join(cells.get(column, "") for column in padchest.USED))
        (other / name).touch()
    (other / padchest.TABLES[0]).write_text("\n".join(lines) + "\n")
    test = f"ImageID\n{PADCHEST[4]}\n{PADCHEST[5]}\n"
    train = lists(GIVEN[:4], PADCHEST[:4])
    specs = [
        SourceSpec("padchest", "padchest", other),
        SourceSpec("cxrlt2026", "cxrlt2026", make(train, CXRLT_2026_TEST_ALL_TASK1=test).root),
    ]
    options = ManifestOptions(val_fraction=0, test_fraction=0)
    frame = build_manifest(specs if padchest_first else specs[::-1], options)[0].frame
    tested = [f"padchest/{name}" for name in PADCHEST[3:]]  # the fourth by its patient
    rows = frame.filter(frame["origin_image"].is_in(tested))
    assert rows["ssl_ok"].to_list() == [False] * 6
    assert sorted(rows.filter(dataset="padchest")["split_project"]) == ["", "", ""]
    assert frame.filter(~frame["origin_image"].is_in(tested))["ssl_ok"].sum() == 3  # each other picture once
    assert not leaks(frame)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (table().replace("ImageID", "Image", 1), MissingColumnError, "'ImageID'"),
        (table().replace(",Mass,", ",Mas,", 1), UnknownLabelError, "unknown label 'Mas'.*Did they mean 'Mass'"),
        (table(HEADER.replace(",Mass", "")), MissingColumnError, "'Mass'"),
        (table().replace(",1,", ",2,", 1), UnknownLabelError, "row 2: column 'Normal' holds '2'"),
        (table().replace(PADCHEST[1], PADCHEST[0]), ManifestError, "'ImageID' must be unique.*rows 2, 3"),
        (table().replace(PADCHEST[1], ""), ManifestError, "row 3: 'ImageID' is empty"),
        (table().replace(PADCHEST[1], "../" + PADCHEST[1]), PathError, "row 3"),
        (lists([["cardiomegalia"], *GIVEN[1:]]), UnknownLabelError, "row 2, 'label': unknown label 'cardiomegalia'"),
        (lists().replace("['Normal']", "['Normal'"), UnknownLabelError, "row 2: 'label' is not a list"),
        (lists().replace("['Normal']", "__import__('os')"), UnknownLabelError, "row 2: 'label' is not a list"),
    ],
)  # fmt: skip
def test_faults_name_their_place(make, train, error, message):
    with pytest.raises(error, match=message):
        cxrlt2026.read(make(train))


def test_an_image_of_two_splits_is_a_leak(make):
    with pytest.raises(LeakageError, match="1 images are listed in tables of two splits"):
        cxrlt2026.read(make(test=f"ImageID\n{PADCHEST[0]}\n"))


def test_missing_images_and_nothing_there(make, tmp_path):
    options = make(present=PADCHEST[1:])
    with pytest.raises(PathError, match=r"1 of 6 .*CXRLT_2026_training.csv row 2"):
        cxrlt2026.read(options)
    assert cxrlt2026.read(SourceOptions("cxrlt2026", tmp_path, allow_missing=True)).frame.height == 5
    (tmp_path / "CXRLT_2026_training.csv").unlink()
    with pytest.raises(PathError, match="no table of CXR-LT 2026"):
        cxrlt2026.read(options)


def test_damaged_pictures_are_quarantined_and_odd_ones_read_right(make, tmp_path):
    options = make(folder="Bilder 胸")
    grey = np.tile(np.repeat(np.array([0, 60, 120, 255], np.uint8), 8), (32, 1))
    contents = [png16(grey), png16(grey)[:-40], b"", png_rgba(grey), png(grey), png16(grey)]
    for name, content in zip(PADCHEST, contents, strict=True):
        (tmp_path / "Bilder 胸" / name).write_bytes(content)
    (tmp_path / "Bilder 胸" / PADCHEST[0]).rename(tmp_path / "Bilder 胸" / PADCHEST[0].replace(".png", ".PNG"))
    manifest, _ = build_manifest([SourceSpec("cxrlt2026", "cxrlt2026", options.root)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert (summary.inputs, summary.stored) == (6, 4)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1}


def test_a_phantom_is_read_as_the_cohort_it_was_made_of(tmp_path):
    write_phantoms(tmp_path / "out", "cxrlt2026", 10, 4, 64, 0, workers=1)
    assert (tmp_path / "out/CXRLT_2026_training.csv").read_text().split("\n")[0] == HEADER
    rows = cxrlt2026.read(SourceOptions("cxrlt2026", tmp_path / "out"))
    train = [patient for patient in plan_cohort(10, 4, 0) if patient.split != "test"]
    images = [study for patient in train for study in patient.studies for _ in study.images]
    frame = rows.frame.filter(split_official="train")
    assert frame.height == len(images) - 1  # Removal.csv takes back the first
    for row, study in zip(frame.iter_rows(named=True), images[1:], strict=True):
        for finding in set(rows.findings) & set(CXRLT_2024_TASK1):
            assert row[f"label.{finding}"] in (-1, int(finding in study.findings))
            if finding in ("Cardiomegaly", "Pleural Effusion", "Hernia") or {finding} == set(study.findings) == {
                "Normal"
            }:
                assert row[f"label.{finding}"] == int(finding in study.findings)
    first = frame["source_relpath"][0]
    assert cv2.imread(str(tmp_path / "out" / first), cv2.IMREAD_UNCHANGED).dtype == np.uint16
