"""CXR-LT 2023 and 2024, in both naming families, with and without labels, and their faults."""

import pytest

from hilum.core.errors import (
    EmptyStudyError,
    LeakageError,
    ManifestError,
    MissingColumnError,
    PathError,
    UnknownLabelError,
)
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK2, CXRLT_2024_TASK3
from hilum.data.rows import SourceOptions
from hilum.data.sources import cxrlt

META = ["dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning"]


def path_of(patient: int, study: int, dicom: str) -> str:
    return f"files/p{str(patient)[:2]}/p{patient}/s{study}/{dicom}.jpg"


def table(images, findings, path="fpath", positive=(), prefix="s", extra=()):
    """CSV text of (dicom, patient, study, view) rows; `positive` holds (dicom, finding) pairs."""
    lines = [",".join([*META, path, *findings, *extra])]
    for dicom, patient, study, view in images:
        labels = ["1" if (dicom, name) in positive else "0" for name in findings]
        fields = [dicom, str(patient), f"{prefix}{study}", view, "postero-anterior", path_of(patient, study, dicom)]
        lines.append(",".join([*fields, *labels, *("0" for _ in extra)]))
    return "\n".join(lines) + "\n"


TRAIN = [("d1", 10000001, 50000001, "AP"), ("d2", 10000001, 50000001, "LATERAL"), ("d3", 10000002, 50000002, "")]
DEVELOPMENT = [("d4", 10000003, 50000003, "PA")]
TEST = [("d5", 10000004, 50000004, "LL")]


@pytest.fixture
def make(tmp_path):
    def write(files, present=(*TRAIN, *DEVELOPMENT, *TEST), folder=""):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        for dicom, patient, study, _ in present:
            path = tmp_path / path_of(patient, study, dicom)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return SourceOptions("cxrlt", tmp_path)

    return write


def release_2024(findings=CXRLT_2024_TASK1, **changes):
    positive = {("d1", "Edema"), ("d1", "Round(ed) Atelectasis"), ("d5", "Nodule"), ("d4", "Normal")}
    return {
        "train_labeled.csv": table(TRAIN, findings, positive=positive),
        "development_labeled_task1.csv": table(DEVELOPMENT, findings, positive=positive),
        "test_labeled_task1.csv": table(TEST, findings, positive=positive),
    } | changes


@pytest.mark.parametrize("folder", ["", "cxr-lt-2024"])
def test_2024_release(make, folder):
    rows = cxrlt.read(make(release_2024(), folder=folder))
    frame = rows.frame
    assert rows.findings == CXRLT_2024_TASK1
    assert rows.official
    assert frame["image_id"].to_list() == ["d1", "d2", "d3", "d4", "d5"]
    assert frame["split_official"].to_list() == ["train", "train", "train", "val", "test"]
    assert frame["patient_id"].to_list()[:3] == ["10000001", "10000001", "10000002"]
    assert frame["study_id"].to_list()[0] == "s50000001"
    assert frame["label.Edema"].to_list() == [1, 0, 0, 0, 0]
    assert frame["label.Round(ed) Atelectasis"].to_list() == [1, 0, 0, 0, 0]
    assert frame["label.Normal"].to_list() == [0, 0, 0, 1, 0]
    assert frame["label.Nodule"].to_list() == [0, 0, 0, 0, 1]
    assert frame["view_raw"].to_list() == ["AP", "LATERAL", "postero-anterior", "PA", "LL"]
    assert frame["view_source"].to_list() == ["stated", "stated", "derived", "stated", "stated"]
    assert frame["release"].unique().to_list() == ["2024"]


def test_columns_are_found_by_name_whatever_their_order_and_case(make):
    """Reversed columns in the papers' spelling give the same labels under the release's names."""
    reversed_names = [{"Rib Fracture": "Rib fracture", "Round(ed) Atelectasis": "Round(ed) atelectasis"}.get(n, n)
                      for n in reversed(CXRLT_2024_TASK1)]  # fmt: skip
    positive = {("d1", "Edema"), ("d1", "Round(ed) atelectasis"), ("d2", "Rib fracture"), ("d3", "Normal")}
    files = {"train_labeled.csv": table(TRAIN, reversed_names, positive=positive)}
    rows = cxrlt.read(make(files))
    assert rows.findings == CXRLT_2024_TASK1
    assert rows.frame["label.Round(ed) Atelectasis"].to_list() == [1, 0, 0]
    assert rows.frame["label.Rib Fracture"].to_list() == [0, 1, 0]
    assert rows.frame["label.Normal"].to_list() == [0, 0, 1]


def test_2023_release_says_path_no_finding_and_has_no_prefix(make):
    files = {
        name: table(images, CXRLT_2023, "path", {("d1", "No Finding")}, prefix="")
        for name, images in (("train.csv", TRAIN), ("development.csv", DEVELOPMENT), ("test.csv", TEST))
    }
    rows = cxrlt.read(make(files, folder="cxr-lt-2023"))
    assert rows.frame["release"][0] == "2023"
    assert set(rows.findings) == set(CXRLT_2023)
    assert "Normal" not in rows.findings
    assert rows.frame["label.No Finding"].to_list() == [1, 0, 0, 0, 0]
    assert rows.frame["study_id"][0] == "s50000001"  # as 2024 has it, so that a join of the two finds it


def test_kits_without_labels_are_unknown(make):
    files = {
        "train_labeled.csv": table(TRAIN, CXRLT_2024_TASK1),
        "development.csv": table(DEVELOPMENT, ()),
        "test_task1.csv": table(TEST, ()),
    }
    rows = cxrlt.read(make(files))
    assert rows.frame["label.Edema"].to_list() == [0, 0, 0, -1, -1]
    assert rows.notes == ("development.csv: no labels, kept as unknown", "test_task1.csv: no labels, kept as unknown")


def test_one_table_of_45_labels_with_a_split_column(make):
    findings = (*CXRLT_2024_TASK1, *CXRLT_2024_TASK3)
    lines = table([*TRAIN, *DEVELOPMENT, *TEST], findings, positive={("d2", "Bulla")}).splitlines()
    splits = ["split", "train", "train", "train", "development", "test"]
    rows = cxrlt.read(make({"labels.csv": "\n".join(f"{a},{b}" for a, b in zip(lines, splits, strict=True)) + "\n"}))
    assert rows.findings == findings
    assert rows.frame["split_official"].to_list() == ["train", "train", "train", "val", "test"]
    assert rows.frame["label.Bulla"].to_list() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["validation", "valid", "training", ""])
def test_a_split_name_that_is_not_of_this_dataset_is_refused(make, name):
    header, *rows = table(TRAIN, CXRLT_2024_TASK1).splitlines()
    lines = [f"{header},split", *(f"{row},{name}" for row in rows)]
    with pytest.raises(ManifestError, match=f"column 'split' holds '{name}'"):
        cxrlt.read(make({"labels.csv": "\n".join(lines) + "\n"}))


def test_task_3_is_joined_by_id_and_task_2_is_left_out(make):
    files = release_2024() | {
        "test_labeled_task3.csv": table(TEST, CXRLT_2024_TASK3, positive={("d5", "Scoliosis")}),
        "test_labeled_task2.csv": table(TEST, CXRLT_2024_TASK2, positive={("d5", "Edema")}),
    }
    rows = cxrlt.read(make(files))
    assert rows.frame["label.Scoliosis"].to_list() == [-1, -1, -1, -1, 1]
    assert rows.frame["label.Edema"].to_list() == [1, 0, 0, 0, 0]
    assert "test_labeled_task2.csv" in rows.notes[0]
    assert rows.findings == (*CXRLT_2024_TASK1, *CXRLT_2024_TASK3)


def test_images_elsewhere(make, tmp_path):
    make(release_2024(), folder="cxr-lt-2024")
    tables = tmp_path / "cxr-lt-2024"
    with pytest.raises(PathError, match="--images cxrlt=FOLDER"):
        cxrlt.read(SourceOptions("cxrlt", tables))
    for images, first in ((tmp_path, "files/p10/"), (tmp_path / "files", "p10/")):
        rows = cxrlt.read(SourceOptions("cxrlt", tables, images=images))
        assert rows.frame["source_relpath"][0].startswith(first)
        assert (rows.root / rows.frame["source_relpath"][0]).is_file()


def edited(text: str, row: int, old: str, new: str) -> str:
    lines = text.splitlines()
    assert old in lines[row - 1]
    lines[row - 1] = lines[row - 1].replace(old, new, 1)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("row", "old", "new", "error", "message"),
    [
        (1, "dicom_id", "image_id", MissingColumnError, "'dicom_id'"),
        (1, "fpath", "file", MissingColumnError, "'fpath'"),
        (1, ",Edema,", ",Oedemas,", UnknownLabelError, "unknown label 'Oedemas'"),
        (1, ",Edema,", ",Edemaa,", UnknownLabelError, "Did they mean 'Edema'"),
        (1, ",Edema,", ",mass,", ManifestError, "a finding has two columns"),
        (3, ".jpg,0", ".jpg,2", UnknownLabelError, r"row 3: column 'Adenopathy' holds '2'"),
        (3, ".jpg,0", ".jpg,", UnknownLabelError, r"row 3: column 'Adenopathy' holds ''"),
        (3, ".jpg,0", ".jpg,-1.0", UnknownLabelError, "row 3: column 'Adenopathy' holds '-1.0'"),
        (4, "files/", "../files/", PathError, "row 4"),
        (4, "files/", "/files/", PathError, "row 4"),
        (4, "10000002,", ",", ManifestError, "row 4: 'subject_id' is empty"),
        (4, "d3", "d1", ManifestError, "'dicom_id' must be unique"),
    ],
)
def test_faults_name_their_place(make, row, old, new, error, message):
    files = release_2024()
    files["train_labeled.csv"] = edited(files["train_labeled.csv"], row, old, new)
    with pytest.raises(error, match=message) as caught:
        cxrlt.read(make(files))
    assert "1000000" not in str(caught.value)


def test_a_labelled_table_must_have_every_label_of_its_release(make):
    files = {"train_labeled.csv": table(TRAIN, [name for name in CXRLT_2024_TASK1 if name != "Hernia"])}
    with pytest.raises(MissingColumnError, match="'Hernia'"):
        cxrlt.read(make(files))


def test_pandas_floats_are_read(make):
    files = release_2024()
    files["train_labeled.csv"] = edited(files["train_labeled.csv"], 2, ".jpg,0", ".jpg,1.0")
    assert cxrlt.read(make(files)).frame["label.Adenopathy"].to_list() == [1, 0, 0, 0, 0]


def test_an_image_in_two_files_is_a_leak(make):
    files = release_2024(**{"test_labeled_task1.csv": table([*TEST, TRAIN[0]], CXRLT_2024_TASK1)})
    with pytest.raises(LeakageError, match="1 images are listed in two"):
        cxrlt.read(make(files))


def test_a_study_without_images(make):
    options = make(release_2024(), present=[*TRAIN[:2], *DEVELOPMENT, *TEST])
    with pytest.raises(
        EmptyStudyError, match=r"1 of 5 .*train_labeled\.csv row 4.*1 studies have no image left"
    ) as error:
        cxrlt.read(options)
    assert "10000002" not in str(error.value)
    rows = cxrlt.read(SourceOptions("cxrlt", options.root, allow_missing=True))
    assert rows.frame.height == 4


def test_nothing_there(tmp_path):
    with pytest.raises(PathError, match="no CXR-LT table"):
        cxrlt.read(SourceOptions("cxrlt", tmp_path))


@pytest.mark.parametrize(
    ("column", "old", "new"),
    [("subject_id", ",10000002,", ",10000002.0,"), ("study_id", ",s50000002,", ",s50000002.0,")],
)
def test_ids_that_would_not_join_with_mimic_are_refused(make, column, old, new):
    files = release_2024()
    files["train_labeled.csv"] = files["train_labeled.csv"].replace(old, new, 1)
    with pytest.raises(ManifestError, match=f"train_labeled.csv, row 4: '{column}' is not a number") as error:
        cxrlt.read(make(files))
    assert "0000002" not in str(error.value)
