"""Any folder: with a table, without one, and with DICOM headers to say who is who."""

import json

import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from hilum.core.errors import EmptyStudyError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.label_maps import LabelPolicy
from hilum.data.rows import SourceOptions
from hilum.data.sources import folder


@pytest.fixture
def make(tmp_path):
    def write(table: str | None, *files: str) -> SourceOptions:
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        if table is not None:
            (tmp_path / "labels.csv").write_text(table)
        return SourceOptions("clinic", tmp_path)

    return write


def write_dicom(path, patient="", study="", view="", age="", sex=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientID, dataset.StudyInstanceUID, dataset.ViewPosition = patient, study, view
    dataset.PatientAge, dataset.PatientSex = age, sex
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


TABLE = """path,patient_id,study_id,view,split,sex,age,edema,Odd Finding
a/1.png,0007,s1,PA,train,F,061Y,1,0
a/2.png,0007,s1,LL,train,F,061Y,1,
b/3.JPG,8,s1,,validation,,,-1,1
"""


def test_table(make):
    rows = folder.read(make(TABLE, "a/1.png", "a/2.png", "b/3.JPG", "b/extra.png", "notes.txt"))
    frame = rows.frame
    assert rows.findings == ("Edema", "Odd Finding")  # the release's spelling first, other names as they are
    assert rows.official
    assert frame["patient_id"].to_list() == ["0007", "0007", "8"]
    assert frame["study_id"].to_list() == ["s1", "s1", "s1"]
    assert frame["view_raw"].to_list() == ["PA", "LL", ""]
    assert frame["split_official"].to_list() == ["train", "train", "val"]
    assert frame["label.Edema"].to_list() == [1, 1, -2]
    assert frame["label.Odd Finding"].to_list() == [0, -1, 1]
    assert frame["age_years"].to_list() == [61.0, 61.0, None]
    assert frame["sex"].to_list() == ["F", "F", None]
    assert json.loads(frame["raw_labels"][1]) == {"edema": "1", "Odd Finding": ""}
    assert rows.notes == (
        "1 images in the folder are not in labels.csv: left out",
        "1 other files, hidden or no images by their names: left out",
    )


def test_spaces_around_an_id_make_nobody_another_patient(make):
    table = "path,patient_id,study_id\na.png,0007,s1\nb.png, 0007,s1 \nc.png,0007 , s1\n"
    frame = folder.read(make(table, "a.png", "b.png", "c.png")).frame
    assert frame["patient_id"].to_list() == ["0007"] * 3
    assert frame["study_id"].to_list() == ["s1"] * 3
    with pytest.raises(ManifestError, match="row 2: 'patient_id' is empty"):
        folder.read(make("path,patient_id\na.png,  \n", "a.png"))


@pytest.mark.parametrize(
    ("blank", "uncertain", "edema", "odd"),
    [
        ("mask", "mask", [1, 1, -2], [0, -1, 1]),
        ("zero", "zero", [1, 1, 0], [0, 0, 1]),
        ("mask", "one", [1, 1, 1], [0, -1, 1]),
    ],
)
def test_policies_change_only_the_cells_they_are_about(make, tmp_path, blank, uncertain, edema, odd):
    make(TABLE, "a/1.png", "a/2.png", "b/3.JPG")
    frame = folder.read(SourceOptions("clinic", tmp_path, policy=LabelPolicy(uncertain, blank))).frame
    assert frame["label.Edema"].to_list() == edema
    assert frame["label.Odd Finding"].to_list() == odd


def test_without_a_table_each_picture_is_its_own_patient(make):
    rows = folder.read(make(None, "x/1.png", "x/y/2.jpeg", "3.JPG", "readme.md", ".hidden.png"))
    assert rows.frame["source_relpath"].to_list() == ["3.JPG", "x/1.png", "x/y/2.jpeg"]
    assert rows.frame["patient_id"].n_unique() == 3
    assert rows.findings == ()
    assert any("3 images name no patient" in note for note in rows.notes)


def test_dicom_headers_name_patient_study_and_view(tmp_path):
    write_dicom(tmp_path / "1.dcm", "P1", "1.2.1", "PA", "045Y", "M")
    write_dicom(tmp_path / "2.dcm", "P1", "1.2.1", "LL")
    write_dicom(tmp_path / "sub" / "no_suffix", "P2", "1.2.2")
    write_dicom(tmp_path / "sub" / "1.2.840.5", "", "")
    (tmp_path / "broken.dcm").write_bytes(b"not dicom")
    (tmp_path / "LICENSE").write_text("text without a suffix")
    rows = folder.read(SourceOptions("clinic", tmp_path))
    by_path = {row["source_relpath"]: row for row in rows.frame.iter_rows(named=True)}
    assert set(by_path) == {"1.dcm", "2.dcm", "broken.dcm", "sub/no_suffix", "sub/1.2.840.5"}
    assert by_path["1.dcm"]["patient_id"] == by_path["2.dcm"]["patient_id"] == "P1"
    assert by_path["1.dcm"]["study_id"] == "1.2.1"
    assert by_path["1.dcm"]["view_raw"] == "PA"
    assert by_path["1.dcm"]["age_years"] == 45.0
    assert by_path["sub/no_suffix"]["patient_id"] == "P2"
    assert by_path["sub/1.2.840.5"]["patient_id"] == "sub/1.2.840.5"
    assert by_path["broken.dcm"]["patient_id"] == "broken.dcm"
    assert any("1 DICOM headers cannot be read" in note for note in rows.notes)
    assert not any("P1" in note for note in rows.notes)


def test_a_named_study_stays_together_without_a_patient(make):
    rows = folder.read(make("path,study_id\n1.png,s\n2.png,s\n3.png,t\n", "1.png", "2.png", "3.png"))
    patients = rows.frame["patient_id"].to_list()
    assert patients[0] == patients[1] != patients[2]


def pairs(tmp_path, *patients, table="path,study_id", study="s{}", uid=""):
    """A DICOM file and a PNG for each patient that a header names, in the study of its number."""
    lines = [table]
    for number, patient in enumerate(patients):
        write_dicom(tmp_path / f"{number}.dcm", patient, uid)
        (tmp_path / f"{number}.png").touch()
        lines += [f"{number}.{suffix},{study.format(number)}" for suffix in ("dcm", "png")]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return SourceOptions("clinic", tmp_path)


def test_an_image_without_a_header_has_the_patient_of_its_study(tmp_path):
    rows = folder.read(pairs(tmp_path, "P0", " ", "P2"))
    assert rows.frame["patient_id"].to_list() == ["P0", "P0", "study:s1", "study:s1", "P2", "P2"]
    assert rows.notes[0] == "2 images name no patient: theirs is the one that other images of their study name"
    assert rows.notes[1] == "2 images name no patient: each study counts as one, which cannot rule out leakage"


def test_a_study_of_several_patients_is_refused_by_its_row(tmp_path):
    options = pairs(tmp_path, "P0", "P1", "P2", study="s")
    with pytest.raises(ManifestError, match=r"labels\.csv, row 2: .* study name 3 patients \(1 such") as caught:
        folder.read(options)
    assert "P1" not in str(caught.value)


def test_images_of_a_study_that_only_headers_name_stay_together(tmp_path):
    options = pairs(tmp_path, "P0", "", table="path,Edema", study="1", uid="1.2.9")
    assert folder.read(options).frame["patient_id"].to_list() == ["P0", "0.png", "P0", "1.png"]
    write_dicom(tmp_path / "0.dcm", "", "1.2.9")
    assert folder.read(options).frame["patient_id"].to_list() == ["study:1.2.9", "0.png", "study:1.2.9", "1.png"]
    for number in (0, 1):
        write_dicom(tmp_path / f"{number}.dcm", f"P{number}", "1.2.9")
    assert "1 studies name several patients in their DICOM headers: each counts as one" in folder.read(options).notes[0]


def test_ages_and_views_that_are_not_known_are_said(make):
    table = """path,patient_id,view,age
1.png,1,AP erect,63.5
2.png,2,frontal,006W
3.png,3,ap lordotik,old
4.png,4,portable,
5.png,5,the view of Dr Example,
"""
    rows = folder.read(make(table, *(f"{number}.png" for number in range(1, 6))))
    assert rows.frame["age_years"].to_list() == pytest.approx([63.5, 42 / 365.25, None, None, None])
    assert rows.notes[0].startswith("1 ages cannot be read, or are no human age: unknown (58, 63.5, ")
    assert rows.notes[1] == "1 images are frontal, without PA or AP: their view is UNKNOWN"
    assert rows.notes[2].startswith(
        "3 images have a view that is not known ('ap lordotik', 'portable', a text of 22 characters): OTHER. Known are "
        "PA, AP, "
    )


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("file,Edema\n1.png,1\n", MissingColumnError, "'path'"),
        ("path,Edema\n../1.png,1\n", PathError, "row 2"),
        ("path,Edema\n1.png,1\n./1.png,1\n", ManifestError, "rows 2, 3"),
        ("path,Edema\n1.png,2\n1.png,1\n", ManifestError, "unique"),
        ("path,Edema\n1.png,yes\n2.png,1\n", UnknownLabelError, "row 2: column 'Edema' holds 'yes'"),
        ("path,note\n1.png,seen by Dr Example Name\n2.png,x\n", ManifestError, "column 'note' holds no labels"),
        (
            "path,Edema,note\n1.png,1,a long remark about someone\n2.png,1,\n",
            UnknownLabelError,
            "a text of 27 characters",
        ),
        ("path,Edema,edema\n1.png,1,1\n2.png,1,1\n", ManifestError, "two columns for Edema"),
        ("path,patient_id\n1.png,1\n2.png,\n", ManifestError, "row 3: 'patient_id' is empty"),
        ("path,split\n1.png,train\n2.png,holdout\n", ManifestError, "row 3: column 'split' holds 'holdout'"),
        ("path,split\n1.png,training\n", ManifestError, "row 2: column 'split' holds 'training'"),
        ("path,study_id\n1.png,a\n,b\n", EmptyStudyError, "row 3: 'path' is empty"),
        ("path,study_id\n1.png,a\n3.png,b\n", EmptyStudyError, "1 studies have no image left"),
        ("path,Edema\n1.png,1\n3.png,0\n", PathError, r"1 of 2 .*labels\.csv row 3"),
    ],
)
def test_faults(make, table, error, message):
    with pytest.raises(error, match=message):
        folder.read(make(table, "1.png", "2.png"))


def test_empty_folder(make, tmp_path):
    with pytest.raises(PathError, match="holds no image"):
        folder.read(SourceOptions("clinic", tmp_path))
    with pytest.raises(PathError, match="1 files, none of them PNG"):
        folder.read(make(None, "notes.txt"))


def test_links_that_leave_the_folder(make, tmp_path, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    (away / "1.png").touch()
    (tmp_path / "link.png").symlink_to(away / "1.png")
    with pytest.raises(PathError, match="1 links that leave it"):
        folder.read(make(None, "2.png"))
    with pytest.raises(PathError, match="row 3: the image is, or lies behind, a link"):
        folder.read(make("path\n2.png\nlink.png\n"))


def test_links_inside_the_folder_are_not_counted_twice(make, tmp_path):
    options = make(None, "a/1.png")
    (tmp_path / "again.png").symlink_to(tmp_path / "a/1.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert folder.read(options).frame["source_relpath"].to_list() == ["a/1.png"]


def test_a_given_table_and_images_elsewhere(tmp_path, tmp_path_factory):
    tables, images = tmp_path_factory.mktemp("tables"), tmp_path_factory.mktemp("images")
    (images / "1.png").touch()
    (tables / "mine.csv").write_text("path,patient_id,Edema\n1.png,7,1\n")
    rows = folder.read(SourceOptions("clinic", tmp_path, images=images, table=tables / "mine.csv"))
    assert rows.root == images
    assert rows.frame["label.Edema"].to_list() == [1]
