"""NIH ChestX-ray14 in its two tables, its two folder layouts, and its faults."""

import numpy as np
import polars as pl
import pytest

from hilum.core.errors import HilumError, LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.labels import NIH_FINDINGS
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.encoding import encode
from hilum.data.rows import SourceOptions
from hilum.data.sources import nih
from hilum.data.store import Store

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
    assert "1 images are in none of train_val_list.txt, test_list.txt: the lists hold none of them back" in rows.notes
    (tmp_path / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(LeakageError, match="1 images are in both"):
        nih.read(options)


@pytest.mark.parametrize(
    ("name", "content", "sides"),
    [
        ("train_val_list.txt", "00000001_000.png\n00000001_001.png\n", ["train", "train", "test", "test"]),
        ("test_list.txt", "00000012_000.png\n", ["train", "train", "test", "train"]),
    ],
)
def test_one_list_alone_leaves_the_other_images_on_the_other_side(make, tmp_path, name, content, sides):
    options = make()
    (tmp_path / name).write_text(content)
    rows = nih.read(options)
    assert rows.frame["split_official"].to_list() == sides
    assert any(f"{name} is the only list" in note for note in rows.notes)
    for split in ("project", "official"):
        manifest, _ = build_manifest([SourceSpec("nih", "nih", tmp_path)], ManifestOptions(split=split))
        assert not manifest.frame.filter(pl.col("split_official") == "test")["ssl_ok"].any()


def test_lists_that_name_no_image_of_the_table_are_refused(make, tmp_path):
    options = make()
    (tmp_path / "test_list.txt").write_text("images/00000012_000.png\n")  # as a path, it would hold nothing back
    with pytest.raises(ManifestError, match=r"test_list.txt.*none of the images.*00000001_000.png"):
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


BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def test_boxes_are_checked_and_counted(make, tmp_path):
    options = make()
    (tmp_path / "BBox_List_2017.csv").write_text(
        f"{BOX_HEADER}\n"
        "00000001_000.png,Cardiomegaly,225.08,547.01,86.77,79.18,,,\n"
        "00000001_000.png,Effusion,1,2,3,4,,,\n"
        "00000012_000.png,Infiltrate,1,2,3,4,,,\n"  # the table says Pleural_Thickening
        "00000099_000.png,Mass,1,2,3,4,,,\n"
    )
    rows = nih.read(options)
    assert rows.notes == (
        "BBox_List_2017.csv: 4 boxes on 3 images; 1 of images that the table does not list; "
        "1 of findings that the table does not give the image",
    )
    assert set(rows.tables) == {"Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"}


def test_infiltrate_of_the_box_file_is_infiltration_of_the_table(make, tmp_path):
    options = make([ROWS[0].replace("Cardiomegaly|Effusion", "Infiltration")])
    (tmp_path / "BBox_List_2017.csv").write_text(f"{BOX_HEADER}\n00000001_000.png,Infiltrate,1,2,3,4,,,\n")
    assert nih.read(options).notes == ("BBox_List_2017.csv: 1 boxes on 1 images",)


def test_rows_of_the_published_box_file_have_six_fields(make, tmp_path):
    """The header has nine, three of them empty; so does the file that the NIH gives out."""
    options = make()
    (tmp_path / "BBox_List_2017.csv").write_text(
        f"{BOX_HEADER}\n00000001_000.png,Cardiomegaly,225.08,547.01,86.77,79.18\n"
    )
    assert nih.read(options).notes == ("BBox_List_2017.csv: 1 boxes on 1 images",)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("00000001_000.png,Infiltration,1,2,3,4,,,", UnknownLabelError, "row 2: column 'Finding Label'"),
        ("00000001_000.png,Mass,1,2,0,4,,,", ManifestError, "row 2: not a box"),
        ("00000001_000.png,Mass,-1,2,3,4,,,", ManifestError, "row 2: not a box"),
        ("00000001_000.png,Mass,1,two,3,4,,,", ManifestError, "row 2: not a box"),
        ("00000001_000.png,Mass,1,2,inf,4,,,", ManifestError, "row 2: not a box"),
        ("00000001_000.png,Mass,1,2,3", ManifestError, "row 2: 5 fields, the header has 9"),
    ],
)
def test_a_box_that_is_none_is_named(make, tmp_path, row, error, message):
    options = make()
    (tmp_path / "BBox_List_2017.csv").write_text(f"{BOX_HEADER}\n{row}\n")
    with pytest.raises(error, match=message):
        nih.read(options)


def test_other_readers_labels_are_not_mixed_in(make, tmp_path):
    options = make()
    before = nih.read(options).frame
    (tmp_path / "four_findings_expert_labels_test_labels.csv").write_text(
        "Image ID,Patient ID,Fracture,Pneumothorax,Airspace opacity,Nodule or mass\n00000001_000.png,1,YES,NO,NO,NO\n"
    )
    rows = nih.read(options)
    assert rows.frame.equals(before)
    assert "other readers' labels" in rows.notes[0]


def test_columns_are_found_by_name(make):
    order = [4, 3, 2, 1, 0, 6, 5, 7, 8, 9, 10]
    options = make()
    straight = nih.read(options).frame

    def turned(line):
        cells = line.split(",")
        return ",".join(cells[place] for place in order)

    (options.root / "Data_Entry_2017_v2020.csv").write_text("\n".join(map(turned, [HEADER, *ROWS])) + "\n")
    assert nih.read(options).frame.equals(straight)


def test_faulty_files_are_stored_or_quarantined_with_exact_counts(tmp_path):
    """A truncated, an empty, a 16-bit, an RGBA and a grey PNG, one with a suffix in another case, one picture twice."""
    grey = np.tile(np.array([0, 0, 60, 120, 180, 240, 255, 255], np.uint8), (8, 1))  # its percentiles are 0 and 255
    files = {
        "00000001_000.png": encode("png", grey, ""),
        "00000001_001.png": encode("png", grey, "")[:-20],
        "00000002_000.png": b"",
        "00000003_000.png": encode("png16", grey, ""),
        "00000004_000.png": encode("png_rgba", grey, ""),
        "00000005_000.png": encode("png", grey, ""),  # the picture of patient 1 again
        "00000006_000.PNG": encode("png", grey, ""),
    }
    root = tmp_path / "Röntgen 胸"
    (root / "images").mkdir(parents=True)
    lines = [HEADER]
    for name, content in files.items():
        (root / "images" / name).write_bytes(content)
        listed = name.replace("PNG", "png")
        lines.append(f"{listed},No Finding,{int(name[9:12])},{int(name[:8])},50,M,PA,8,8,1,1")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    spec = SourceSpec("nih", "nih", root)
    with pytest.raises(PathError, match="1 of 7 listed images"):  # file names are matched as they are
        build_manifest([spec], ManifestOptions())
    manifest, notes = build_manifest([spec], ManifestOptions(allow_missing=True))
    assert notes == ["nih: 1 of 7 listed images are not under " + str(root) + ": left out."]
    summary = build_store(manifest, tmp_path / "store", size=8, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored) == (6, 4)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1}
    store = Store.open(tmp_path / "store")
    for index in range(len(store)):  # 16-bit and RGBA are the same picture as the grey one
        np.testing.assert_array_equal(store.read(index), grey)


def test_a_patient_on_both_sides_of_the_lists_is_a_leak(make, tmp_path):
    options = make()
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000012_000.png\n")
    (tmp_path / "test_list.txt").write_text("00000001_001.png\n00000013_000.png\n")
    with pytest.raises(LeakageError, match=r"1 patients are on both sides .* \(test and train\)"):
        build_manifest([SourceSpec("nih", "nih", options.root)], ManifestOptions(split="official", val_fraction=0))


def test_the_real_sample(nih_sample):
    """Counts from the sample's own CSV and README: 780 images of 542 patients, half with Pneumonia."""
    rows = nih.read(SourceOptions("nih", nih_sample))
    assert rows.frame.height == 780
    assert rows.frame["patient_id"].n_unique() == 542
    assert rows.frame["label.Pneumonia"].sum() == 391
    assert rows.frame["label.Hernia"].sum() == 3
    assert rows.frame["label.Normal"].sum() == 389
