"""BRAX: columns by name, tails of paths, studies by patient and accession, bins of ages, DICOM, and its faults."""

import json

import cv2
import numpy as np
import pytest

from hilum.core.errors import EmptyStudyError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.label_maps import LabelPolicy
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import dicom, png, png16, png_rgba
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import brax
from hilum.data.store import Store

LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Lesion,Lung Opacity,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
HEADER = (
    f",DicomPath,PngPath,PatientID,PatientSex,PatientAge,AccessionNumber,StudyDate,{LABELS},"
    "ViewPosition,Rows,Columns,Manufacturer"
)
ROWS = [  # patient, image, sex, age, accession, view, labels, what follows the path
    ("id_0a-1", "1.2.31", "M", "45-49", "7", "PA", {"Lung Lesion": "1.0", "Lung Opacity": "0.0", "Edema": "-1.0"}, ""),
    (
        "id_0a-1",
        "1.2.32",
        "M",
        "45-49",
        "7",
        "L",
        {"Lung Lesion": "1.0", "Lung Opacity": "0.0", "Edema": "-1.0"},
        "_x1.png",
    ),
    ("id_0a-1", "1.2.33", "M", "45-49", "8", "", {"No Finding": "1.0"}, "1234567"),
    ("id_0b-2", "1.2.34", "F", "85 or more", "7", "RLO", {"No Finding": "1", "Support Devices": "1"}, ""),
    ("id_0c-3", "1.2.35", "Female", "50", "9", "RLD", {}, ""),
    ("id_0d-4", "1.2.36", "", "", "9", "AP", {"Lung Opacity": "1.0"}, ""),
]


def inner(row) -> str:
    return f"{row[0]}/Study_9.{row[4]}/Series_9.{row[4]}.1/image-{row[1]}"


def line(row) -> dict[str, str]:
    patient, _, sex, age, accession, view, labels, tail = row
    return {
        "": "0", "DicomPath": f"Anonymized_DICOMs/{inner(row)}.dcm", "PngPath": f"images/{inner(row)}.png{tail}",
        "PatientID": patient, "PatientSex": sex, "PatientAge": age, "AccessionNumber": accession,
        "StudyDate": "2012-01-01", "ViewPosition": view, "Rows": "2544", "Columns": "3056.0", "Manufacturer": "1",
        **labels,
    }  # fmt: skip


def table(rows=ROWS, header=HEADER) -> str:
    names = header.split(",")
    return "\n".join([header, *(",".join(line(row).get(name, "") for name in names) for row in rows)]) + "\n"


@pytest.fixture
def make(tmp_path):
    def write(text=None, present=ROWS, name="master_spreadsheet_update.csv", tree="images", suffix=".png"):
        (tmp_path / name).write_text(table() if text is None else text)
        for row in present:
            path = tmp_path / tree / f"{inner(row)}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return SourceOptions("brax", tmp_path)

    return write


@pytest.mark.parametrize("name", ["master_spreadsheet_update.csv", "master_spreadsheet.csv"])
def test_rows(make, name):
    rows = brax.read(make(name=name))
    frame = rows.frame
    assert frame["image_id"].to_list() == [inner(row) for row in ROWS]
    assert frame["source_relpath"].to_list() == [f"images/{inner(row)}.png" for row in ROWS]  # tails are cut
    assert frame["patient_id"].to_list()[2:4] == ["id_0a-1", "id_0b-2"]
    assert frame["study_id"].to_list() == ["7", "7", "8", "7", "9", "9"]
    assert frame["sex"].to_list() == ["M", "M", "M", "F", "F", None]
    assert frame["age_years"].to_list() == [47.5, 47.5, 47.5, 85.0, 50.0, None]
    assert frame["age_raw"].to_list()[3:] == ["85 or more", "50", None]
    assert frame["quality"].to_list() == [["age_binned"]] * 3 + [["age_binned", "age_capped"], ["age_binned"], None]
    assert (frame["rows"][0], frame["cols"][0]) == (2544, 3056)
    assert "study_seq" not in frame.columns  # the dates are made up
    assert set(rows.tables) == {name}
    assert not rows.official
    assert rows.origin == "brax"


def test_studies_of_two_patients_with_one_accession_number(make):
    frame = build_manifest([SourceSpec("brax", "brax", make().root)], ManifestOptions())[0].frame
    assert frame["study_id"].n_unique() == 5  # 7 of two patients, 8, 9 of two patients
    views = dict(zip(frame["image_id"].str.slice(-6), frame["view"], strict=True))
    assert views == {"1.2.31": "PA", "1.2.32": "LATERAL", "1.2.33": "UNKNOWN", "1.2.34": "OBLIQUE",
                     "1.2.35": "DECUBITUS", "1.2.36": "AP"}  # fmt: skip


def test_labels_by_hand(make):
    """Lung Lesion stands where CheXpert has Lung Opacity; read by position the two would be swapped."""
    rows = brax.read(make())
    frame = rows.frame
    assert frame["label.Lung Lesion"].to_list() == [1, 1, -1, -1, -1, -1]
    assert frame["label.Lung Opacity"].to_list() == [0, 0, -1, -1, -1, 1]
    assert frame["label.Edema"].to_list() == [-2, -2, -1, -1, -1, -1]
    assert frame["label.Normal"].to_list() == [0, 0, 1, -1, -1, 0]
    assert json.loads(frame["raw_labels"][0]) == ROWS[0][6]
    assert set(frame["label_trust"]) == {"text_mined"}


@pytest.mark.parametrize("order", [sorted, lambda names: list(reversed(names))])
def test_any_order_of_columns_gives_the_same_rows(make, order):
    straight = brax.read(make()).frame
    swapped = brax.read(make(table(header=",".join(order(HEADER.split(",")[1:]))))).frame
    assert swapped.drop("raw_labels").equals(straight.drop("raw_labels"))


def test_a_path_with_its_tail_is_taken_where_there_is_such_a_file(make, tmp_path):
    options = make()
    odd = tmp_path / f"images/{inner(ROWS[1])}.png_x1.png"
    odd.touch()
    assert brax.read(options).frame["source_relpath"][1].endswith(".png_x1.png")


def test_suffixes_in_another_case(make):
    assert brax.read(make(suffix=".PNG")).frame["source_relpath"][1] == f"images/{inner(ROWS[1])}.PNG"


def test_dicom_where_there_are_no_pngs(make):
    rows = brax.read(make(tree="Anonymized_DICOMs", suffix=".dcm"))
    assert rows.frame["source_relpath"][0] == f"Anonymized_DICOMs/{inner(ROWS[0])}.dcm"
    assert rows.frame["image_id"].to_list() == [inner(row) for row in ROWS]  # as of the PNGs
    assert rows.notes == ("no folder `images`: the DICOM files are read",)


def test_images_elsewhere(make, tmp_path):
    make()
    tables = tmp_path / "tables"
    tables.mkdir()
    (tmp_path / "master_spreadsheet_update.csv").rename(tables / "master_spreadsheet_update.csv")
    with pytest.raises(PathError, match="--images brax=FOLDER"):
        brax.read(SourceOptions("brax", tables))
    for images, first in ((tmp_path, "images/id_0a"), (tmp_path / "images", "id_0a")):
        rows = brax.read(SourceOptions("brax", tables, images=images))
        assert rows.frame["source_relpath"][0].startswith(first)
        assert rows.frame["image_id"][0] == inner(ROWS[0])


@pytest.mark.parametrize(("policy", "expected"), [({}, (-2, -1)), ({"uncertain": "one", "blank": "zero"}, (1, 0))])
def test_policies(make, policy, expected):
    frame = brax.read(SourceOptions("brax", make().root, policy=LabelPolicy(**policy))).frame
    assert frame.select("label.Edema", "label.Fracture").row(0) == expected


@pytest.mark.parametrize(
    ("age", "years"),
    [("45-49", 47.5), ("45 to 50", 47.5), ("[45, 50)", 47.5), ("85 or more", 85.0), ("0-4", 2.5), ("60", 60.0),
     ("unknown", None), ("", None)],
)  # fmt: skip
def test_ages(make, age, years):
    row = (*ROWS[0][:3], f'"{age}"', *ROWS[0][4:])
    assert brax.read(make(table([row]), present=[row])).frame["age_years"].to_list() == [years]


def edit(text: str, row: int, old: str, new: str) -> str:
    lines = text.splitlines()
    assert old in lines[row - 1]
    lines[row - 1] = lines[row - 1].replace(old, new, 1)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("row", "old", "new", "error", "message"),
    [
        (1, "PngPath", "Path", MissingColumnError, "'PngPath'"),
        (1, "Lung Lesion", "Lung Lesions", MissingColumnError, r"'Lung Lesion' \(nearest: 'Lung Lesions'\)"),
        (2, "-1.0", "maybe", UnknownLabelError, "row 2: column 'Edema' holds 'maybe'"),
        (3, ",7,", ",,", ManifestError, "row 3: 'AccessionNumber' is empty"),
        (3, "images/", "../", PathError, "row 3"),
        (3, "images/", "/images/", PathError, "row 3"),
        (3, "image-1.2.32.png", "image-1.2.31.png", ManifestError, "'PngPath' must be unique.*rows 2, 3"),
        (3, ",2544", "", ManifestError, "row 3: 25 fields, the header has 26"),
    ],
)
def test_faults_name_their_place(make, row, old, new, error, message):
    with pytest.raises(error, match=message) as caught:
        brax.read(make(edit(table(), row, old, new)))
    assert "id_0a" not in str(caught.value)


def test_missing_images(make, tmp_path):
    options = make(present=ROWS[1:])
    with pytest.raises(PathError, match=r"1 of 6 .*master_spreadsheet_update.csv row 2") as caught:
        brax.read(options)
    assert "id_0a" not in str(caught.value)
    assert brax.read(SourceOptions("brax", tmp_path, allow_missing=True)).frame.height == 5
    (tmp_path / f"images/{inner(ROWS[1])}.png").unlink()
    with pytest.raises(EmptyStudyError, match="1 studies have no image left"):
        brax.read(options)
    (tmp_path / "master_spreadsheet_update.csv").unlink()
    with pytest.raises(PathError, match="holds neither"):
        brax.read(options)


def test_damaged_pictures_are_quarantined_and_odd_ones_read_right(make, tmp_path):
    """BRAX 1.1.0 has two PNGs that do not open; the others show the same grey, one of them twice."""
    options = make()
    grey = np.tile(np.repeat(np.array([0, 60, 120, 255], np.uint8), 8), (32, 1))  # its percentiles are 0 and 255
    contents = [png(grey), png(grey)[:-30], b"", png16(grey), png_rgba(grey), png(grey)]
    for row, content in zip(ROWS, contents, strict=True):
        (tmp_path / f"images/{inner(row)}.png").write_bytes(content)
    root = options.root.rename(options.root.with_name(f"{options.root.name} Röntgen 胸"))
    manifest, _ = build_manifest([SourceSpec("brax", "brax", root)], ManifestOptions())
    summary = build_store(manifest, root / "store", size=32, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored) == (6, 4)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1}
    store = Store.open(root / "store")
    for index in range(len(store)):
        np.testing.assert_array_equal(store.read(index), grey)


def test_dicom_of_both_polarities(make, tmp_path):
    options = make(tree="Anonymized_DICOMs", suffix=".dcm")
    grey = np.tile(np.repeat(np.array([0, 60, 120, 255], np.uint8), 8), (32, 1))
    kinds = [{"photometric": "MONOCHROME1"}, {"syntax": False}, {"pixel_data": False}, {}, {"window": False}, {}]
    for row, kind in zip(ROWS, kinds, strict=True):
        (tmp_path / f"Anonymized_DICOMs/{inner(row)}.dcm").write_bytes(dicom(grey, row[1], **kind))
    manifest, _ = build_manifest([SourceSpec("brax", "brax", options.root)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored, sum(summary.quarantined.values())) == (6, 5, 1)
    store = Store.open(tmp_path / "store")
    for index in range(len(store)):
        np.testing.assert_allclose(store.read(index), grey, atol=1)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("brax") / "out"
    write_phantoms(out, "brax", 8, 4, 64, 0, workers=1)
    return out


def test_a_phantom_is_read_as_the_cohort_it_was_made_of(phantom):
    rows = brax.read(SourceOptions("brax", phantom))
    studies = [study for patient in plan_cohort(8, 4, 0) for study in patient.studies]
    by_study = dict(rows.frame.group_by("patient_id", "study_id", maintain_order=True))
    assert len(by_study) == len(studies)
    assert rows.frame["study_id"].n_unique() < len(studies)  # accession numbers are shared
    known = 0
    for images, study in zip(by_study.values(), studies, strict=True):
        assert images.height == len(study.images)
        for row in images.iter_rows(named=True):
            for finding in rows.findings:
                code = row[f"label.{finding}"]
                assert code in (-1, -2, int(finding in study.findings))
                known += code >= 0
                assert code == 1 or finding not in study.findings or finding in ("Mass", "Nodule")
    assert known > rows.frame.height * 4
    text = (phantom / "master_spreadsheet_update.csv").read_text()
    assert text.split("\n")[0] == HEADER
    assert ".png_a1.png" in text
    assert not rows.frame["source_relpath"].str.contains("_a1").any()
    assert cv2.imread(str(phantom / rows.frame["source_relpath"][0]), 0).shape == (
        rows.frame["rows"][0],
        rows.frame["cols"][0],
    )
