"""NIH ChestX-ray14 in its two tables, its two folder layouts, and its faults."""

import polars as pl
import pytest

from hilum.core.errors import HilumError, LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.labels import NIH_FINDINGS
from hilum.data.rows import SourceOptions
from hilum.data.sources import nih

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    "00000001_000.png,Cardiomegaly|Effusion,0,1,058Y,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,0,1,59,M,AP,2682,2749,0.143,0.143",
    "00000012_000.png,Pleural_Thickening,4,12,414,F,AP,2682,2749,0.143,0.143",
    "00000013_000.png,Hernia,0,13,006M,F,,2682,2749,0.143,0.143",
]


@pytest.fixture
def make(tmp_path):
    def write(rows=ROWS, header=HEADER, name="Data_Entry_2017_v2020.csv", folder="images", images=None, tail="\n"):
        (tmp_path / name).write_text(header + tail + "".join(row + tail for row in rows))
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for row in rows if images is None else images:
            (tmp_path / folder / row.split(",")[0]).touch()
        return SourceOptions("nih", tmp_path)

    return write


def test_rows_of_the_2020_table(make):
    rows = nih.read(make())
    frame = rows.frame
    assert frame["patient_id"].to_list() == ["00000001", "00000001", "00000012", "00000013"]
    assert frame["study_id"].to_list() == ["000", "001", "000", "000"]  # from the file name, not `Follow-up #`
    assert frame["source_relpath"][0] == "images/00000001_000.png"
    assert frame["view_raw"].to_list() == ["PA", "AP", "AP", ""]
    assert frame["age_raw"].to_list() == ["058Y", "59", "414", "006M"]
    assert frame["age_years"].to_list() == [58.0, 59.0, None, 0.5]
    assert frame["raw_labels"][0] == '"Cardiomegaly|Effusion"'
    assert len(rows.findings) == 15
    assert not rows.official


def test_labels_are_exact_tokens_under_cxrlt_names(make):
    frame = nih.read(make()).frame
    positive = [[name for name in NIH_FINDINGS if row[f"label.{name}"] == 1] for row in frame.iter_rows(named=True)]
    assert positive == [["Cardiomegaly", "Pleural Effusion"], ["Normal"], ["Pleural Thickening"], ["Hernia"]]
    values = frame.select(pl.col("^label\\..*$")).to_numpy()
    assert values.sum() == 5
    assert set(values.ravel().tolist()) == {0, 1}  # NIH leaves nothing unknown


def test_the_2017_table_has_a_twelfth_unnamed_column(make):
    rows = nih.read(make([row + "," for row in ROWS], HEADER + ",", "Data_Entry_2017.csv"))
    assert rows.frame.height == 4
    assert rows.frame["release"][0] == "v2017"


def test_kaggle_folders(make, tmp_path):
    options = make(folder="images_001/images", images=ROWS[:2])
    (tmp_path / "images_002/images").mkdir(parents=True)
    for row in ROWS[2:]:
        (tmp_path / "images_002/images" / row.split(",")[0]).touch()
    assert nih.read(options).frame["source_relpath"].to_list() == [
        "images_001/images/00000001_000.png",
        "images_001/images/00000001_001.png",
        "images_002/images/00000012_000.png",
        "images_002/images/00000013_000.png",
    ]


def test_an_image_in_two_folders_is_refused(make, tmp_path):
    options = make()
    (tmp_path / "images_001").mkdir()
    (tmp_path / "images_001/00000001_000.png").touch()
    with pytest.raises(ManifestError, match=r"1 images are there more than once \(in images, images_001\)"):
        nih.read(options)


def test_official_lists(make, tmp_path):
    options = make()
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (tmp_path / "test_list.txt").write_text("00000012_000.png\n")
    rows = nih.read(options)
    assert rows.frame["split_official"].to_list() == ["train", "train", "test", ""]
    assert set(rows.tables) == {"Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt"}
    (tmp_path / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(LeakageError, match="1 images are in both"):
        nih.read(options)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            "00000014_000.png,Efusion,0,14,1,M,PA,1,1,1,1",
            UnknownLabelError,
            r"row 6.*'Efusion'.*Did they mean 'Effusion'",
        ),
        ("00000014_000.png,,0,14,1,M,PA,1,1,1,1", UnknownLabelError, "row 6"),
        ("00000014_000.png,Mass|No Finding,0,14,1,M,PA,1,1,1,1", ManifestError, "row 6: 'No Finding' stands beside"),
        ("00000014_000.png,Mass,0,15,1,M,PA,1,1,1,1", ManifestError, "row 6: 'Patient ID' is not"),
        ("../00000014_000.png,Mass,0,14,1,M,PA,1,1,1,1", ManifestError, "row 6: 'Image Index' is not"),
        ("00000001_000.png,Mass,0,1,1,M,PA,1,1,1,1", ManifestError, "must be unique"),
        ("00000014_000.png,Mass,0,14,1,M,PA,1,1,1", ManifestError, "row 6: 10 fields, the header has 11"),
    ],
)
def test_faults_name_their_row(make, row, error, message):
    with pytest.raises(error, match=message):
        nih.read(make([*ROWS, row], images=ROWS))


def test_missing_column(make):
    with pytest.raises(MissingColumnError, match="'Finding Labels'"):
        nih.read(make(header=HEADER.replace("Finding Labels", "Findings")))


def test_missing_images_are_counted_or_dropped(make):
    options = make(images=ROWS[1:])
    with pytest.raises(
        PathError, match=r"1 of 4 listed images .*Data_Entry_2017_v2020.csv row 2.*--allow-missing"
    ) as error:
        nih.read(options)
    assert "00000001" not in str(error.value)  # rows, not patients
    rows = nih.read(SourceOptions("nih", options.root, allow_missing=True))
    assert rows.frame.height == 3
    assert "1 of 4 listed images" in rows.notes[0]


def test_nothing_there(make, tmp_path):
    with pytest.raises(PathError, match="neither"):
        nih.read(SourceOptions("nih", tmp_path))
    with pytest.raises(PathError, match="is not a folder"):
        nih.read(SourceOptions("nih", tmp_path / "none"))
    options = make(images=[])
    with pytest.raises(PathError, match="None of the 4 listed images"):
        nih.read(options)
    with pytest.raises(HilumError):
        nih.read(SourceOptions("nih", tmp_path, images=tmp_path / "none"))


def test_images_elsewhere_and_images_behind_a_link(make, tmp_path_factory, tmp_path):
    options = make(images=[])
    away = tmp_path_factory.mktemp("away")
    for row in ROWS:
        (away / row.split(",")[0]).touch()
    rows = nih.read(SourceOptions("nih", options.root, images=away))
    assert rows.root == away
    assert rows.frame["source_relpath"][0] == "00000001_000.png"
    (tmp_path / "images").rmdir()
    (tmp_path / "images").symlink_to(away)
    with pytest.raises(PathError, match=r"row 2: the image is, or lies behind, a link that leaves"):
        nih.read(options)


def test_the_real_sample(nih_sample):
    """Counts from the sample's own CSV and README: 780 images of 542 patients, half with Pneumonia."""
    rows = nih.read(SourceOptions("nih", nih_sample))
    assert rows.frame.height == 780
    assert rows.frame["patient_id"].n_unique() == 542
    assert rows.frame["label.Pneumonia"].sum() == 391
    assert rows.frame["label.Hernia"].sum() == 3
    assert rows.frame["label.Normal"].sum() == 389
