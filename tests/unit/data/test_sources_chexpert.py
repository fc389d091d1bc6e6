"""CheXpert v1.0, full and small, and CheXpert Plus: paths at any level, labels, one id for one picture, and faults."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from hilum.core.errors import (
    EmptyStudyError,
    LeakageError,
    ManifestError,
    MissingColumnError,
    PathError,
    UnknownLabelError,
)
from hilum.data.build import build_store
from hilum.data.label_maps import LabelPolicy
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import dicom, png16, png_rgba
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import chexpert
from hilum.data.store import Store

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
LABELS = HEADER.split(",")[5:]
PLUS_HEADER = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,"
    "section_narrative,section_clinical_history,section_history,section_comparison,section_technique,"
    "section_procedure_comments,section_findings,section_impression,section_end_of_impression,section_summary,"
    "section_accession_number,age,sex,race,ethnicity,interpreter_needed,insurance_type,recent_bmi,deceased,split"
)
NAMES = [
    "train/patient00001/study1/view1_frontal", "train/patient00001/study1/view2_lateral",
    "train/patient00002/study1/view1_frontal", "train/patient00002/study2/view1_frontal",
    "train/patient21514/study1/view1_frontal", "train/patient21514/study2/view1_frontal",
    "valid/patient64541/study1/view1_frontal", "valid/patient64541/study1/view2_lateral",
    "test/patient64741/study1/view1_frontal",
]  # fmt: skip
DESCRIBED = [
    "Male,61,Frontal,AP", "Male,61,Lateral,", "Female,90,Frontal,PA", "Female,90,Frontal,LL", "Unknown,0,Frontal,AP",
    "Female,33,Frontal,", "Male,50,Frontal,AP", "Male,50,Lateral,",
]  # fmt: skip
GIVEN = [
    {"Edema": "1.0", "Cardiomegaly": "-1.0", "Pneumonia": "0.0"}, {"Edema": "1.0", "Cardiomegaly": "-1.0"},
    {"No Finding": "1.0"}, {"No Finding": "1.0", "Support Devices": "1.0"},
    {"No Finding": "1.0", "Support Devices": "-1.0"}, {},
    dict.fromkeys(LABELS, "0.0") | {"Fracture": "1.0"}, dict.fromkeys(LABELS, "0.0") | {"Fracture": "1.0"},
    dict.fromkeys(LABELS, "0") | {"No Finding": "1"},
]  # fmt: skip


def cells(given: dict[str, str], labels=LABELS) -> str:
    return ",".join(given.get(name, "") for name in labels)


def table(part: str, root: str = "CheXpert-v1.0") -> str:
    rows = [n for n, name in enumerate(NAMES) if name.startswith(part)]
    if part == "test":
        return (
            "\n".join(["Path," + ",".join(LABELS), *(f"test/{NAMES[n][5:]}.jpg,{cells(GIVEN[n])}" for n in rows)])
            + "\n"
        )
    return "\n".join([HEADER, *(f"{root}/{NAMES[n]}.jpg,{DESCRIBED[n]},{cells(GIVEN[n])}" for n in rows)]) + "\n"


def touch(root, names=NAMES, suffix=".jpg"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}{suffix}").touch()


@pytest.fixture
def make(tmp_path):
    def write(parts=("train", "valid", "test"), root="CheXpert-v1.0", names=NAMES, **texts):
        files = {"train": "train.csv", "valid": "valid.csv", "test": "test_labels.csv"}
        home = tmp_path / root
        home.mkdir(exist_ok=True)
        for part in parts:
            (home / files[part]).write_text(texts.get(part, table(part, root)))
        touch(home, [name for name in names if name.split("/")[0] in parts])
        return SourceOptions("chexpert", tmp_path)

    return write


def test_rows_of_the_three_tables(make):
    rows = chexpert.read(make())
    frame = rows.frame
    assert frame["image_id"].to_list() == NAMES
    assert frame["patient_id"].to_list()[:3] == ["patient00001", "patient00001", "patient00002"]
    assert frame["study_id"].to_list()[2:4] == ["study1", "study2"]
    assert frame["split_official"].to_list() == ["train"] * 6 + ["val"] * 2 + ["test"]
    assert frame["source_relpath"][0] == "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
    assert frame["sex"].to_list() == ["M", "M", "F", "F", None, "F", "M", "M", None]
    assert frame["age_raw"].to_list() == ["61", "61", "90", "90", "0", "33", "50", "50", None]
    assert frame["age_years"].to_list() == [61, 61, 90, 90, None, 33, 50, 50, None]
    assert frame["quality"].to_list() == [None, None, ["age_capped"], ["age_capped"], *[None] * 5]
    assert list(frame.select("view_raw", "view_source").iter_rows()) == [
        ("AP", "stated"), ("Lateral", "stated"), ("PA", "stated"), ("LL", "stated"), ("AP", "stated"),
        ("", "unknown"), ("AP", "stated"), ("Lateral", "stated"), ("", "unknown"),
    ]  # fmt: skip
    assert frame["label_trust"].to_list() == ["text_mined"] * 6 + ["physician"] * 3
    assert rows.official
    assert rows.origin == "chexpert"
    assert set(frame["release"]) == {"v1.0"}
    assert set(rows.tables) == {"train.csv", "valid.csv", "test_labels.csv"}


def test_labels_by_hand(make):
    rows = chexpert.read(make())
    frame = rows.frame
    assert frame.select("label.Edema", "label.Cardiomegaly", "label.Pneumonia", "label.Fracture").row(0) == (
        1,
        -2,
        0,
        -1,
    )
    assert json.loads(frame["raw_labels"][0]) == GIVEN[0]
    assert frame["label.Normal"].to_list() == [
        0, 0,  # edema
        1,  # No Finding
        -1,  # beside devices: not called normal
        1,  # devices uncertain
        -1,  # nothing said
        0, 0,  # a fracture, by radiologists
        1,
    ]  # fmt: skip
    assert frame["label.Support Devices"].to_list() == [-1, -1, -1, 1, -2, -1, 0, 0, 0]
    assert set(frame["label.Mass"]) == {-1}
    assert rows.conflicts == {}


@pytest.mark.parametrize(
    ("policy", "expected"), [({}, (1, -2, -1)), ({"uncertain": "one"}, (1, 1, -1)), ({"blank": "zero"}, (1, -2, 0)),
                             ({"uncertain": "zero", "blank": "zero"}, (1, 0, 0))],
)  # fmt: skip
def test_policies(make, policy, expected):
    options = SourceOptions("chexpert", make().root, policy=LabelPolicy(**policy))
    frame = chexpert.read(options).frame
    assert frame.select("label.Edema", "label.Cardiomegaly", "label.Fracture").row(0) == expected


def test_columns_are_found_by_name(make):
    """Columns reversed (BRAX swaps two of them, MIMIC sorts them): the same labels."""
    lines = [line.split(",") for line in table("train").splitlines()]
    swapped = "\n".join(",".join(reversed(line)) for line in lines) + "\n"
    straight = chexpert.read(make()).frame
    assert chexpert.read(make(train=swapped)).frame.drop("raw_labels").equals(straight.drop("raw_labels"))


@pytest.mark.parametrize(
    "place",
    [
        "{0}/{1}",  # beside its tables
        "CheXpert-v1.0/{0}/{1}",
        "{1}",  # without train/
        "CheXpert-v1.0 batch 2 (train 1)/{1}",
        "chexpertchestxrays-u20210408/CheXpert-v1.0 batch 1 (validate & csv)/{1}",
    ],
)
def test_the_folders_that_the_release_unpacks_to(tmp_path, place):
    for part, name in (("train", "train.csv"), ("valid", "valid.csv")):
        (tmp_path / name).write_text(table(part))
    names = [name for name in NAMES if not name.startswith("test")]
    touch(tmp_path, [place.format(*name.split("/", 1)) for name in names])
    rows = chexpert.read(SourceOptions("chexpert", tmp_path))
    assert rows.frame["image_id"].to_list() == names
    assert all((tmp_path / path).is_file() for path in rows.frame["source_relpath"])
    assert [path.endswith(f"{name.split('/', 1)[1]}.jpg") for path, name in
            zip(rows.frame["source_relpath"], names, strict=True)] == [True] * len(names)  # fmt: skip


def test_two_copies_are_refused_unless_the_table_says_which(make, tmp_path):
    options = make()
    touch(tmp_path / "batch", [NAMES[0]])
    assert chexpert.read(options).frame["source_relpath"][0].startswith("CheXpert-v1.0/")
    (tmp_path / "CheXpert-v1.0" / f"{NAMES[0]}.jpg").unlink()
    touch(tmp_path / "other", [NAMES[0]])
    with pytest.raises(ManifestError, match=r"1 images are there more than once \(in batch, other\)"):
        chexpert.read(options)


def test_the_small_release_is_flagged(make):
    rows = chexpert.read(make(root="CheXpert-v1.0-small"))
    assert rows.frame["image_id"].to_list() == NAMES
    assert rows.frame["quality"].to_list()[:3] == [
        ["low_resolution"],
        ["low_resolution"],
        ["low_resolution", "age_capped"],
    ]
    assert set(rows.frame["release"]) == {"v1.0-small"}
    assert rows.notes == ("9 images are of the small release, short side about 320 pixels: flagged low_resolution",)


def test_full_and_small_side_by_side(make, tmp_path):
    make()
    make(root="CheXpert-v1.0-small")
    with pytest.raises(ManifestError, match="more than one release"):
        chexpert.read(SourceOptions("chexpert", tmp_path))
    rows = chexpert.read(SourceOptions("chexpert", tmp_path / "CheXpert-v1.0"))
    assert not rows.frame["source_relpath"].str.contains("small").any()


def test_other_labels_of_the_training_images(make, tmp_path):
    options = make()
    other = tmp_path / "train_cheXbert.csv"
    other.write_text(
        "\n".join([HEADER, *(f"x/{name}.jpg,Male,61,Frontal,AP,{cells({'Edema': '0'})}" for name in NAMES[:6])])
    )
    rows = chexpert.read(SourceOptions("chexpert", options.root, table=other))
    assert rows.frame["label.Edema"].to_list()[:6] == [0] * 6
    assert rows.frame["label_source"].to_list()[0] == "chexpert-train_cheXbert"
    assert rows.frame["label.Fracture"].to_list()[6] == 1  # valid.csv as before


def test_test_labels_by_study(make, tmp_path):
    text = f"Study,{','.join(LABELS[1:])}\nCheXpert-v1.0/test/patient64741/study1,{cells(GIVEN[8], LABELS[1:])}\n"
    touch(tmp_path / "CheXpert-v1.0", ["test/patient64741/study1/view2_lateral"])
    rows = chexpert.read(make(test=text))
    assert rows.frame["image_id"].to_list()[8:] == [NAMES[8], "test/patient64741/study1/view2_lateral"]
    assert rows.frame["label.Edema"].to_list()[8:] == [0, 0]
    assert rows.frame["view_raw"].to_list()[8:] == ["", "lateral"]
    assert rows.frame["view_source"].to_list()[8:] == ["unknown", "derived"]


def by_study(*names: str) -> str:
    rows = [f"CheXpert-v1.0/test/{name},{cells(GIVEN[8], LABELS[1:])}" for name in names]
    return "\n".join([f"Study,{','.join(LABELS[1:])}", *rows]) + "\n"


def test_only_images_of_a_listed_study_are_taken_each_once(make, tmp_path):
    options = make(test=by_study("patient64741/study1"))
    study = tmp_path / "CheXpert-v1.0/test/patient64741/study1"
    for name in (".DS_Store", "._view1_frontal.jpg", "view1_frontal.txt", "report.pdf", "view1_frontal.png"):
        (study / name).touch()
    frame = chexpert.read(options).frame
    assert frame["image_id"].to_list() == NAMES
    assert frame["source_relpath"][-1].endswith("view1_frontal.png")
    touch(tmp_path / "copy", [NAMES[8]], ".png")
    with pytest.raises(ManifestError, match=r"1 images are there more than once \(in CheXpert-v1\.0, copy\)"):
        chexpert.read(options)


def test_studies_without_an_image(make):
    options = make(test=by_study("patient64999/study1", "patient64741/study1"))
    with pytest.raises(EmptyStudyError, match=r"row 2: no image of the study .*1 of 2 studies.*--allow-missing"):
        chexpert.read(options)
    rows = chexpert.read(replace(options, allow_missing=True))
    assert rows.frame["image_id"].to_list() == NAMES
    assert rows.notes == (f"1 of 2 studies in test_labels.csv have no image under {options.root}: left out",)
    none = make(test=by_study("patient64999/study1"))
    assert chexpert.read(replace(none, allow_missing=True)).frame["image_id"].to_list() == NAMES[:8]
    with pytest.raises(ManifestError, match="row 3: 'Study' does not end like patient00001/study1"):
        chexpert.read(replace(make(test=by_study("patient64741/study1", "1")), allow_missing=True))


def test_a_fault_in_a_table_of_studies_has_its_own_row(make, tmp_path):
    for study, view in (("patient64741/study1", "view2_lateral"), ("patient64742/study1", "view1_frontal")):
        touch(tmp_path / "CheXpert-v1.0", [f"test/{study}/{view}"])
    text = by_study("patient64741/study1", "patient64742/study1")
    with pytest.raises(UnknownLabelError, match=r"test_labels\.csv, row 3: column 'Edema' holds '7'"):
        chexpert.read(make(test=edit(text, 3, ",0,0,0,0,0", ",0,0,0,0,7")))


def edit(text: str, row: int, old: str, new: str) -> str:
    lines = text.splitlines()
    assert old in lines[row - 1]
    lines[row - 1] = lines[row - 1].replace(old, new, 1)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("row", "old", "new", "error", "message"),
    [
        (1, "Path", "File", MissingColumnError, "'Path'"),
        (1, "Edema", "Oedema", MissingColumnError, r"'Edema' \(nearest: 'Oedema'\)"),
        (1, "Sex", "Gender", MissingColumnError, "'Sex'"),
        (3, "-1.0", "-2.0", UnknownLabelError, "row 3: column 'Cardiomegaly' holds '-2.0'"),
        (3, "view2_lateral.jpg", "scan.jpg", ManifestError, "row 3: 'Path' does not end like"),
        (3, "view2_lateral", "view1_frontal", ManifestError, "row 2: an image is listed twice"),
        (3, "CheXpert-v1.0/", "../", PathError, "row 3"),
        (3, "CheXpert-v1.0/", "/data/", PathError, "row 3"),
        (3, "CheXpert-v1.0/train/patient00001/study1/view2_lateral.jpg", "", ManifestError, "row 3: 'Path' is empty"),
        (4, ",PA,", ",", ManifestError, "row 4: 18 fields"),
    ],
)
def test_faults_name_their_place(make, row, old, new, error, message):
    with pytest.raises(error, match=message) as caught:
        chexpert.read(make(train=edit(table("train"), row, old, new)))
    assert "patient00001/study1/view2" not in str(caught.value)


def test_an_image_in_two_tables_is_a_leak(make):
    text = table("valid").replace("valid/patient64541/study1/view2_lateral", "train/patient00001/study1/view1_frontal")
    with pytest.raises(LeakageError, match="1 images are listed in two tables"):
        chexpert.read(make(valid=text))


def test_a_patient_in_two_splits_is_a_leak(make):
    options = make(valid=table("valid").replace("patient64541/study1", "patient00001/study9"))
    touch(options.root / "CheXpert-v1.0/valid/patient00001/study9", ["view1_frontal", "view2_lateral"])
    with pytest.raises(LeakageError, match="1 patients are on both sides"):
        build_manifest([SourceSpec("chexpert", "chexpert", options.root)], ManifestOptions())


def test_missing_images(make):
    options = make(names=NAMES[1:])
    with pytest.raises(PathError, match=r"1 of 9 .*train.csv row 2"):
        chexpert.read(options)
    rows = chexpert.read(SourceOptions("chexpert", options.root, allow_missing=True))
    assert rows.frame["image_id"].to_list() == NAMES[1:]
    assert rows.frame["label.Edema"].to_list()[0] == 1
    make()
    (options.root / f"CheXpert-v1.0/{NAMES[4]}.jpg").unlink()
    with pytest.raises(EmptyStudyError, match="1 studies have no image left"):
        chexpert.read(options)


def test_nothing_there(tmp_path):
    with pytest.raises(PathError, match="holds neither train"):
        chexpert.read(SourceOptions("chexpert", tmp_path))


# CheXpert Plus


def plus_table(names=NAMES[:8]) -> str:
    lines = [PLUS_HEADER]
    for n, name in enumerate(names):
        sex, age, side, projection = DESCRIBED[n].split(",")
        filled = {
            "path_to_image": f"{name}.jpg", "path_to_dcm": f"{name}.dcm", "frontal_lateral": side, "ap_pa": projection,
            "deid_patient_id": name.split("/")[1],
            "patient_report_date_order": name.split("/")[2].removeprefix("study"),
            "report": '"two\nlines, a ""quote"" and a comma"', "age": age, "sex": sex, "split": name.split("/")[0],
        }  # fmt: skip
        lines.append(",".join(filled.get(column, "") for column in PLUS_HEADER.split(",")))
    return "\n".join(lines) + "\n"


def plus_labels(names=NAMES[:8], **changes) -> str:
    lines = []
    for n, name in enumerate(names):
        values = {label: float(GIVEN[n][label]) if label in GIVEN[n] else None for label in LABELS}
        lines.append(json.dumps({"path_to_image": f"{name}.jpg", **values, **changes}))
    return "\n".join(lines) + "\n"


@pytest.fixture
def plus(tmp_path):
    (tmp_path / "df_chexpert_plus_240401.csv").write_text(plus_table())
    (tmp_path / "chexbert_labels").mkdir()
    (tmp_path / "chexbert_labels/impression_fixed.json").write_text(plus_labels())
    touch(tmp_path / "PNG/PNG", NAMES[:8], ".png")
    return SourceOptions("chexpert", tmp_path)


def test_plus_is_the_same_pictures_under_the_same_ids(plus, make, tmp_path_factory):
    rows = chexpert.read(plus)
    assert rows.frame["image_id"].to_list() == NAMES[:8]
    assert rows.frame["source_relpath"][0] == "PNG/PNG/train/patient00001/study1/view1_frontal.png"  # listed as .jpg
    assert rows.frame["release"][0] == "plus"
    assert rows.frame["label.Edema"].to_list() == [1, 1, -1, -1, -1, -1, 0, 0]
    assert rows.frame["label.Normal"].to_list() == [0, 0, 1, -1, 1, -1, 0, 0]
    assert set(rows.frame["label_trust"]) == {"text_mined"}
    assert rows.frame["study_seq"].to_list() == [1, 1, 1, 2, 1, 2, 1, 1]
    assert rows.frame["age_years"].to_list() == [61, 61, 90, 90, None, 33, 50, 50]
    assert rows.notes == ("labels of impression_fixed.json",)
    other = tmp_path_factory.mktemp("v1") / "CheXpert-v1.0"
    other.mkdir()
    for part in ("train", "valid"):
        (other / f"{part}.csv").write_text(table(part))
    touch(other, NAMES[:8])
    specs = [SourceSpec("chexpert", "chexpert", other.parent), SourceSpec("chexpert", "plus", plus.root)]
    frame = build_manifest(specs, ManifestOptions())[0].frame
    assert frame["origin_image"].n_unique() == 8
    assert frame["origin_image"][0] == "chexpert/train/patient00001/study1/view1_frontal"
    assert frame.filter("ssl_ok").height == 6  # each training picture once


def test_plus_labels_by_choice(plus, tmp_path):
    report = tmp_path / "chexbert_labels/report_fixed.json"
    report.write_text(plus_labels(Edema=0))
    assert chexpert.read(plus).frame["label.Edema"][0] == 1
    rows = chexpert.read(SourceOptions("chexpert", tmp_path, table=report))
    assert rows.frame["label.Edema"].to_list() == [0] * 8
    assert rows.frame["label_source"][0] == "chexpert-plus-report"
    (tmp_path / "chexbert_labels/impression_fixed.json").unlink()
    assert chexpert.read(plus).frame["label_source"][0] == "chexpert-plus-report"
    report.unlink()
    rows = chexpert.read(plus)
    assert set(rows.frame["label.Edema"]) == {-1}
    assert "images without labels" in rows.notes[0]


def test_plus_images_without_a_line_are_unknown(plus, tmp_path):
    (tmp_path / "chexbert_labels/impression_fixed.json").write_text(plus_labels(NAMES[:5]))
    rows = chexpert.read(SourceOptions("chexpert", tmp_path, policy=LabelPolicy(blank="zero")))
    assert rows.frame["label.Fracture"].to_list() == [0] * 5 + [-1] * 3
    assert "3 images have no labels there: unknown" in rows.notes


def test_plus_as_dicom(plus, tmp_path):
    (tmp_path / "PNG").rename(tmp_path / "gone")
    touch(tmp_path / "DICOM", NAMES[:8], ".DCM")
    assert chexpert.read(plus).frame["source_relpath"][0].startswith("gone/")  # PNG where there is one
    images = SourceOptions("chexpert", tmp_path, images=tmp_path / "DICOM")
    assert chexpert.read(images).frame["source_relpath"][0] == "train/patient00001/study1/view1_frontal.DCM"


@pytest.mark.parametrize(
    ("line", "old", "new", "message"),
    [
        (2, "{", "[", "line 2: not a JSON object"),
        (2, '"path_to_image"', '"path"', "line 2: not a JSON object with path_to_image"),
        (2, '"Edema": 1.0', '"Edema": 0.5', "line 2: 'Edema' is not 1, 0, -1 or null"),
        (2, '"Edema": 1.0', '"Edema": NaN', "line 2: 'Edema' is not"),
        (2, '"Edema": 1.0', '"Edema": true', "line 2: 'Edema' is not"),
        (2, '"Edema": 1.0', '"Oedema": 1.0', "line 2: 'Edema' is not"),
        (2, "view2_lateral", "view1_frontal", "images? .*another line|of an image that has another line"),
        (2, "view2_lateral.jpg", "scan.jpg", "line 2: path_to_image"),
    ],
)
def test_faults_of_plus_labels_name_their_line(plus, tmp_path, line, old, new, message):
    path = tmp_path / "chexbert_labels/impression_fixed.json"
    path.write_text(edit(plus_labels(), line, old, new))
    with pytest.raises(ManifestError, match=message):
        chexpert.read(plus)


def test_damaged_pictures_are_quarantined_and_odd_ones_read_right(make, tmp_path):
    """Each file is what some release holds: two unreadable, one picture twice, seven that show the same grey."""
    options = make()
    grey = np.tile(np.repeat(np.array([0, 60, 120, 255], np.uint8), 8), (32, 1))  # its percentiles are 0 and 255
    whole = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    files = [
        (".JPG", whole), (".jpg", whole[: len(whole) // 2]), (".jpg", b""), (".png", png16(grey)),
        (".png", png_rgba(grey)), (".dcm", dicom(grey, "x", photometric="MONOCHROME1")),
        (".dcm", dicom(grey, "y", syntax=False)), (".jpg", whole), (".jpeg", whole),
    ]  # fmt: skip
    for name, (suffix, content) in zip(NAMES, files, strict=True):
        path = tmp_path / "CheXpert-v1.0" / name
        path.with_suffix(".jpg").unlink()
        path.with_suffix(suffix).write_bytes(content)
    root = options.root.rename(options.root.with_name(f"{options.root.name} Röntgen 胸"))
    manifest, _ = build_manifest([SourceSpec("chexpert", "chexpert", root)], ManifestOptions())
    summary = build_store(manifest, root / "store", size=32, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored) == (9, 7)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1}
    store = Store.open(root / "store")
    for index in range(len(store)):
        np.testing.assert_allclose(store.read(index), grey, atol=3)  # JPEG keeps no value exactly


@pytest.mark.parametrize("layout", ["chexpert", "chexpert-small", "chexpert-plus"])
def test_a_phantom_is_read_as_the_cohort_it_was_made_of(tmp_path, layout):
    write_phantoms(tmp_path / "out", layout, 6, 4, 64, 0, workers=1)
    rows = chexpert.read(SourceOptions("chexpert", tmp_path / "out"))
    known = 0
    for patient in plan_cohort(6, 4, 0):
        for study in patient.studies:
            images = rows.frame.filter(
                patient_id=f"patient{patient.number + 1:05d}", study_id=f"study{study.number + 1}"
            )
            if layout == "chexpert-plus" and patient.split == "test":
                assert images.height == 0
                continue
            assert images.height == len(study.images)
            for row in images.iter_rows(named=True):
                for finding in rows.findings:
                    code = row[f"label.{finding}"]
                    assert code in (-1, -2, int(finding in study.findings))
                    known += code >= 0
                    assert code == 1 or finding not in study.findings or finding in ("Mass", "Nodule")
    assert known > rows.frame.height * 4
    header = {"chexpert-plus": (PLUS_HEADER, "df_chexpert_plus_240401.csv")}.get(layout, (HEADER, "*/train.csv"))
    assert next((tmp_path / "out").glob(header[1])).read_text().split("\n")[0] == header[0]
