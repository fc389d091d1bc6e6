"""RSNA: two tables that must agree, headers, the map to NIH, faults, and phantoms that are the same NIH images."""

import json

import numpy as np
import pytest

from hilum.core.errors import ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.label_maps import LabelPolicy
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import dicom, encode
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import rsna

BOX_HEADER, CLASS_HEADER = "patientId,x,y,width,height,Target", "patientId,class"
A, B, C = "00a85be6-6eb0", "01b0de10-c0de", "02c0ffee-ca5e"
BOXES = [f"{A},264.0,152.0,213.0,379.0,1", f"{A},562.0,152.0,256.0,453.0,1", f"{B},,,,,0", f"{C},,,,,0"]
CLASSES = [f"{A},Lung Opacity", f"{A},Lung Opacity", f"{B},Normal", f"{C},No Lung Opacity / Not Normal"]
MAP = [
    {"subset_img_id": A, "img_id": "00000005_003.png", "StudyInstanceUID": "1", "SOPInstanceUID": "2"},
    {"subset_img_id": B, "img_id": "00000005_000.png", "StudyInstanceUID": "3", "SOPInstanceUID": "4"},
    {"subset_img_id": "elsewhere", "img_id": "00000006_000.png"},
]
GREY = np.tile(np.array([0, 0, 60, 120, 180, 240, 255, 255], np.uint8), (8, 1))
ELEMENTS = {
    A: {"ViewPosition": "AP", "PatientSex": "F", "PatientAge": "58"},
    B: {"ViewPosition": "PA", "PatientSex": "M", "PatientAge": "155"},
    C: {"ViewPosition": "", "PatientSex": "", "PatientAge": "7"},
}


@pytest.fixture
def make(tmp_path):
    def write(boxes=BOXES, classes=CLASSES, mapping=MAP, images=(A, B, C), box_header=BOX_HEADER, suffix=".dcm"):
        (tmp_path / "stage_2_train_labels.csv").write_text("\n".join([box_header, *boxes]) + "\n")
        (tmp_path / "stage_2_detailed_class_info.csv").write_text("\n".join([CLASS_HEADER, *classes]) + "\n")
        if mapping is not None:
            (tmp_path / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(mapping))
        (tmp_path / "stage_2_train_images").mkdir(exist_ok=True)
        for name in images:
            content = dicom(GREY, name, **ELEMENTS[name])
            (tmp_path / "stage_2_train_images" / f"{name}{suffix}").write_bytes(content)
        return SourceOptions("rsna", tmp_path)

    return write


def test_images_headers_and_ancestry(make):
    rows = rsna.read(make())
    frame = rows.frame
    assert frame["image_id"].to_list() == [A, B, C]
    assert frame["patient_id"].to_list() == ["00000005", "00000005", C]  # patientId is an image; the map has people
    assert frame["study_id"].to_list() == ["003", "000", "0"]
    assert frame["origin_image"].to_list() == ["nih/00000005_003.png", "nih/00000005_000.png", None]
    assert frame["origin_patient"].to_list() == ["nih/00000005", "nih/00000005", None]
    assert frame["view_raw"].to_list() == ["AP", "PA", ""]
    assert frame["sex"].to_list() == ["F", "M", None]
    assert frame["age_raw"].to_list() == ["58", "155", "7"]
    assert frame["age_years"].to_list() == [58, None, 7]
    assert frame["source_relpath"][0] == f"stage_2_train_images/{A}.dcm"
    assert rows.notes == (
        "1 images are not in pneumonia-challenge-dataset-mappings_2018.json: each counts as a patient of its own",
    )
    assert set(rows.tables) == {
        "stage_2_train_labels.csv",
        "stage_2_detailed_class_info.csv",
        "pneumonia-challenge-dataset-mappings_2018.json",
    }
    first = json.loads(frame["raw_labels"][0])
    assert (first["Target"], first["class"], len(first["boxes"])) == ("1", "Lung Opacity", 2)


@pytest.mark.parametrize(
    ("tier", "opacity", "normal", "pneumonia"),
    [("strict", [1, 0, -1], [0, 1, 0], [-1, -1, -1]), ("weak", [1, 0, 0], [0, 1, 0], [1, 0, 0])],
)
def test_a_target_is_an_opacity_and_only_a_suspicion_of_pneumonia(make, tier, opacity, normal, pneumonia):
    frame = rsna.read(SourceOptions("rsna", make().root, policy=LabelPolicy(tier=tier))).frame
    assert frame["label.Lung Opacity"].to_list() == opacity
    assert frame["label.Normal"].to_list() == normal
    assert frame["label.Pneumonia"].to_list() == pneumonia


def test_without_the_map_it_says_so(make):
    rows = rsna.read(make(mapping=None))
    assert rows.frame["patient_id"].to_list() == [A, B, C]
    assert "origin_image" not in rows.frame.columns
    assert "hilum audit --pixels" in rows.notes[0]


def test_a_manifest_of_nih_and_rsna_knows_the_picture_that_both_have(make, tmp_path):
    make()
    nih = tmp_path / "nih"
    (nih / "images").mkdir(parents=True)
    (nih / "images" / "00000005_003.png").write_bytes(encode("png", GREY, ""))
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    (nih / "Data_Entry_2017_v2020.csv").write_text(f"{header}\n00000005_003.png,No Finding,3,5,58,F,AP\n")
    (nih / "test_list.txt").write_text("00000005_003.png\n")
    specs = [SourceSpec("nih", "nih", nih), SourceSpec("rsna", "rsna", tmp_path)]
    frame = build_manifest(specs, ManifestOptions(val_fraction=0, test_fraction=0))[0].frame
    of_patient = frame.filter(frame["origin_patient"] == "nih/00000005")
    assert of_patient["dataset"].to_list() == ["nih", "rsna", "rsna"]
    assert not of_patient["ssl_ok"].any()  # NIH's official test list has their patient
    assert frame.filter(frame["image_id"] == C)["ssl_ok"].to_list() == [True]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": [*BOXES[:3], f"{C},,,,,2"]}, UnknownLabelError, "row 5: column 'Target' holds '2'"),
        ({"boxes": [*BOXES[:3], f"{C},1,2,3,4,1"]}, ManifestError, "row 5: 'Target' does not agree with the class"),
        ({"boxes": [*BOXES[:3], f"{C},1,2,3,4,0"]}, ManifestError, "row 5: Target 1 with a box that is none"),
        ({"boxes": [f"{A},,,,,1", *BOXES[1:]]}, ManifestError, "row 2: Target 1 with a box that is none"),
        ({"boxes": [f"{A},1,1,0,5,1", *BOXES[1:]]}, ManifestError, "row 2: Target 1 with a box that is none"),
        ({"boxes": BOXES[:3]}, ManifestError, "1 images are not in stage_2_train_labels.csv"),
        ({"boxes": [*BOXES, f"{B},1,1,5,5,1"]}, ManifestError, "row 4: the rows of one image differ in 'Target'"),
        ({"boxes": [*BOXES[:3], "../x,,,,,0"]}, PathError, "row 5: 'patientId' is not the name of a file"),
        ({"boxes": [*BOXES[:3], f"{C},,,,0"]}, ManifestError, "row 5: 5 fields, the header has 6"),
        ({"classes": CLASSES[:3]}, ManifestError, "row 5: 'Target' does not agree with the class"),
        ({"classes": [*CLASSES[:3], f"{C},Lung opacity"]}, UnknownLabelError, "row 5: column 'class'"),
        ({"classes": [*CLASSES, f"{C},Normal"]}, ManifestError, "row 5: the rows of one image differ in 'class'"),
        ({"box_header": BOX_HEADER.replace("Target", "target")}, MissingColumnError, "'Target' .nearest: 'target'"),
        ({"mapping": {"a": 1}}, ManifestError, "expected a list of objects .* found dict"),
        ({"mapping": [{"subset_img_id": A, "img_id": "5"}]}, ManifestError, "entry 1 is not"),
        ({"mapping": [MAP[0], [1]]}, ManifestError, "entry 2 is not"),
        ({"mapping": [MAP[0], {**MAP[1], "subset_img_id": A}]}, ManifestError, "2 entries repeat an image"),
        ({"mapping": [MAP[0], {**MAP[1], "img_id": MAP[0]["img_id"]}]}, ManifestError, "2 entries repeat an NIH image"),
    ],
)
def test_faults_name_table_and_row(make, change, error, message):
    with pytest.raises(error, match=message):
        rsna.read(make(**change))


def test_columns_in_another_order_are_the_same(make):
    straight = rsna.read(make()).frame
    turned = [",".join(reversed(row.split(","))) for row in BOXES]
    assert rsna.read(make(boxes=turned, box_header=",".join(reversed(BOX_HEADER.split(","))))).frame.equals(straight)


def test_missing_images(make, tmp_path):
    options = make(images=(A, B))
    with pytest.raises(PathError, match=r"1 of 3 listed images .*stage_2_train_labels.csv row 5"):
        rsna.read(options)
    rows = rsna.read(SourceOptions("rsna", tmp_path, allow_missing=True))
    assert rows.frame["image_id"].to_list() == [A, B]
    (tmp_path / "stage_2_test_images").mkdir()
    (tmp_path / "stage_2_test_images" / "fff.dcm").touch()
    notes = rsna.read(SourceOptions("rsna", tmp_path, allow_missing=True)).notes
    assert any("1 images in stage_2_test_images have no labels" in note for note in notes)
    (tmp_path / "stage_2_train_labels.csv").unlink()
    with pytest.raises(PathError, match=r"stage_2_train_labels\.csv does not exist"):
        rsna.read(options)


def test_dicom_of_every_kind_is_read_right_or_quarantined(make, tmp_path):
    names = [f"{letter}0000000-0000" for letter in "abcdef"]
    forms = ["dicom", "dicom_monochrome1", "dicom_no_syntax", "dicom_no_pixels", "dicom", "dicom"]
    make(boxes=[f"{name},,,,,0" for name in names], classes=[f"{name},Normal" for name in names], images=())
    for number, (name, form) in enumerate(zip(names, forms, strict=True)):
        content = encode(form, GREY, name)
        content = b"" if number == 4 else content[:-30] if number == 5 else content
        (tmp_path / "stage_2_train_images" / f"{name}.{'DCM' if number == 0 else 'dcm'}").write_bytes(content)
    manifest, notes = build_manifest([SourceSpec("rsna", "rsna", tmp_path)], ManifestOptions())
    assert any("1 DICOM headers cannot be read" in note for note in notes)
    summary = build_store(manifest, tmp_path / "store", size=8, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored) == (6, 3)
    assert summary.quarantined == {"no_pixel_data": 1, "zero_bytes": 1, "truncated": 1}


def test_phantoms_are_the_nih_images_that_the_map_names(tmp_path):
    for layout in ("rsna", "nih"):
        write_phantoms(tmp_path / layout, layout, 12, 4, 64, 2, workers=1)
    specs = [SourceSpec(name, name, tmp_path / name) for name in ("nih", "rsna")]
    frame = build_manifest(specs, ManifestOptions())[0].frame
    nih, copies = frame.filter(frame["dataset"] == "nih"), frame.filter(frame["dataset"] == "rsna")
    assert sorted(copies["origin_image"]) == sorted(nih["origin_image"])
    assert copies.filter(copies["ssl_ok"]).is_empty()  # every picture enters once, as NIH's
    findings = {}
    for patient in plan_cohort(12, 4, 2):
        follow_up = 0
        for study in patient.studies:
            for _ in (plan for plan in study.images if plan.position in ("PA", "AP")):
                findings[f"nih/{patient.number + 1:08d}_{follow_up:03d}.png"] = study.findings
                follow_up += 1
    for row in copies.iter_rows(named=True):
        made = findings[row["origin_image"]]
        opacity = 1 if "Lung Opacity" in made else 0 if "Normal" in made else -1
        assert (row["label.Lung Opacity"], row["label.Normal"]) == (opacity, int("Normal" in made))
    assert set(copies["label.Lung Opacity"]) == {1, 0, -1}
    assert copies["age_raw"].is_in(["155"]).any() == copies["age_years"].is_null().any()
