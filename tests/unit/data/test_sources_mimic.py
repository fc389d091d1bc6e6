"""MIMIC-CXR-JPG 2.0.0 and 2.1.0 and MIMIC-CXR as DICOM: views, labels, splits, ids of CXR-LT, and their faults."""

import gzip
import json

import cv2
import numpy as np
import polars as pl
import pytest

from hilum.core.errors import (
    EmptyStudyError,
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
from hilum.data.sources import cxrlt, mimic
from hilum.data.store import Store

META = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
LABELS = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
GOLD = (
    "study_id,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Airspace Opacity,Lung Lesion,Edema,Consolidation,"
    "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
IMAGES = [  # dicom, subject, study, procedure, view, date, time, view code
    ("aa-1", 10000001, 50000001, "CHEST (PA AND LAT)", "PA", 21800506, "80556.875", "postero-anterior"),
    ("aa-2", 10000001, 50000001, "CHEST (PA AND LAT)", "", 21800506, "80600.5", "lateral"),
    ("aa-3", 10000001, 50000009, "CHEST (PORTABLE AP)", "", 21800506, "10.0", ""),
    ("bb-1", 10000002, 50000002, "CHEST (PA AND LAT)", "", 21500101, "120000.0", ""),
    ("bb-2", 10000002, 50000003, "CHEST (LAT DECUB ONLY)", "", 21490101, "235959.25", ""),
    ("cc-1", 10000003, 50000004, "ABDOMEN (SUPINE & ERECT)", "AP", 21500101, "90000.0", ""),
    ("dd-1", 10000004, 50000005, "Performed Desc", "LL", 21500101, "90000.0", ""),
]
SPLITS = {"10000001": "train", "10000002": "train", "10000003": "validate", "10000004": "test"}
ORDER = LABELS.split(",")[2:]


def cells(**given: str) -> str:
    named = {name.replace("_", " "): value for name, value in given.items()}
    assert set(named) <= set(ORDER)
    return ",".join(named.get(name, "") for name in ORDER)


STUDIES = {
    50000001: (10000001, cells(Edema="1.0", Cardiomegaly="-1.0", Pneumonia="0.0", Support_Devices="1.0")),
    50000009: (10000001, cells(No_Finding="1.0")),
    50000002: (10000002, cells(No_Finding="1.0", Support_Devices="1.0")),
    50000003: (10000002, cells(No_Finding="1.0", Fracture="1.0")),
    50000004: (10000003, cells()),
    50000005: (10000004, cells(Lung_Lesion="0.0", Lung_Opacity="1.0")),
}


def meta_rows(images=IMAGES):
    for dicom_id, subject, study, procedure, view, date, time, code in images:
        yield f"{dicom_id},{subject},{study},{procedure},{view},3056,2544,{date},{time},{procedure},{code},Erect"


def path_of(subject: int, study: int, name: str) -> str:
    return f"files/p{str(subject)[:2]}/p{subject}/s{study}/{name}"


def table(header: str, rows) -> str:
    return "\n".join([header, *rows]) + "\n"


def pack(path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def split_table(images=IMAGES) -> str:
    rows = (f"{dicom_id},{study},{subject},{SPLITS[str(subject)]}" for dicom_id, subject, study, *_ in images)
    return table("dicom_id,study_id,subject_id,split", rows)


def label_table(studies=STUDIES) -> str:
    return table(LABELS, (f"{subject},{study},{row}" for study, (subject, row) in studies.items()))


@pytest.fixture
def make(tmp_path):
    def write(images=IMAGES, present=None, suffix=".jpg", content=None, **tables: str | None):
        texts = {
            "mimic-cxr-2.0.0-metadata.csv.gz": table(META, meta_rows(images)),
            "mimic-cxr-2.0.0-split.csv.gz": split_table(images),
            "mimic-cxr-2.0.0-chexpert.csv.gz": label_table(),
        }
        short = {"metadata": "mimic-cxr-2.0.0-metadata.csv.gz", "split": "mimic-cxr-2.0.0-split.csv.gz",
                 "labels": "mimic-cxr-2.0.0-chexpert.csv.gz", "gold": "mimic-cxr-2.1.0-test-set-labeled.csv",
                 "records": "cxr-record-list.csv.gz", "patients": "patients.csv.gz"}  # fmt: skip
        texts |= {short[name]: text for name, text in tables.items()}
        for name, text in texts.items():
            if text is not None:
                (pack(tmp_path / name, text) if name.endswith(".gz") else (tmp_path / name).write_text(text))
        for dicom_id, subject, study, *_ in images if present is None else present:
            path = tmp_path / path_of(subject, study, f"{dicom_id}{suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"" if content is None else content)
        return SourceOptions("mimic", tmp_path)

    return write


def test_a_split_list_that_names_no_image_is_refused(make):
    split = split_table(IMAGES).rstrip("\n").replace("\n", "\nx")  # of another release: it would hold nothing back
    with pytest.raises(ManifestError, match=r"split.csv.gz names none of the images"):
        mimic.read(make(split=split))


def test_images_that_the_split_list_lacks_are_counted(make):
    rows = mimic.read(make(split="\n".join(split_table(IMAGES).splitlines()[:-2]) + "\n"))
    assert (rows.frame["split_official"] == "").sum() == 2
    assert "2 images are not in mimic-cxr-2.0.0-split.csv: in no split" in rows.notes


def test_ids_dates_and_order(make):
    rows = mimic.read(make())
    frame = rows.frame
    assert frame["image_id"].to_list() == [image[0] for image in IMAGES]
    assert frame["patient_id"].to_list()[:4] == ["10000001"] * 3 + ["10000002"]
    assert frame["study_id"].to_list()[:3] == ["s50000001", "s50000001", "s50000009"]
    assert frame["source_relpath"][0] == "files/p10/p10000001/s50000001/aa-1.jpg"
    assert frame["split_official"].to_list() == ["train"] * 5 + ["val", "test"]
    # 00:00:10 is before 08:05:56.875, which lost its zero; 2149 before 2150
    assert frame["study_seq"].to_list() == [2, 2, 1, 2, 1, 1, 1]
    assert frame["study_date_raw"][0] == "21800506"
    assert (frame["rows"][0], frame["cols"][0]) == (3056, 2544)
    assert rows.official
    assert rows.origin == "mimic"
    assert frame["release"].unique().to_list() == ["2.0.0"]
    assert set(rows.tables) == {f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("metadata", "split", "chexpert")}


def test_views_stated_derived_and_unknown(make):
    frame = mimic.read(make()).frame
    assert list(frame.select("view_raw", "view_source").iter_rows()) == [
        ("PA", "stated"),
        ("lateral", "derived"),  # from the view code
        ("AP", "derived"),  # the procedure names one projection
        ("", "unknown"),  # it names two
        ("DECUBITUS", "derived"),  # "LAT DECUB" is one
        ("AP", "stated"),
        ("LL", "stated"),
    ]
    assert frame["quality"].to_list() == [None] * 5 + [["non_chest"], None]


@pytest.mark.parametrize(
    ("procedure", "elsewhere"),
    [
        ("CHEST (PA AND LAT)", False), ("ABDOMEN (SUPINE ONLY)", True), ("PORTABLE ABDOMEN", True),
        ("RIB UNILAT, W/ AP CHEST RIGHT", False), ("TRAUMA #2 (AP CXR & PELVIS PORT)", False),
        ("SHOULDER (AP, NEUTRAL & AXILLARY) TRAUMA LEFT", True), ("THORACIC SPINE", True), ("Performed Desc", False),
        ("", False), ("DX CHEST PORT LINE/TUBE PLCMT 1 EXAM", False), ("RIB BILAT", True),
    ],
)  # fmt: skip
def test_non_chest_procedures(make, procedure, elsewhere):
    image = ("aa-1", 10000001, 50000001, f'"{procedure}"', "AP", 21800506, "1.0", "")
    rows = mimic.read(make([image]))
    assert rows.frame["quality"].to_list() == [["non_chest"] if elsewhere else None]
    assert any("non_chest" in note for note in rows.notes) == elsewhere


def test_labels_by_hand(make):
    """Each study's cells on all its images; Normal is derived, never claimed where a device is."""
    rows = mimic.read(make())
    by_image = {row["image_id"]: row for row in rows.frame.iter_rows(named=True)}
    first = by_image["aa-1"]
    assert by_image["aa-2"]["label.Edema"] == 1
    assert {name: first[f"label.{name}"] for name in ("Edema", "Cardiomegaly", "Pneumonia", "Atelectasis")} == {
        "Edema": 1, "Cardiomegaly": -2, "Pneumonia": 0, "Atelectasis": -1,
    }  # fmt: skip
    assert json.loads(first["raw_labels"]) == {
        "Edema": "1.0", "Cardiomegaly": "-1.0", "Pneumonia": "0.0", "Support Devices": "1.0",
    }  # fmt: skip
    normal = {name: row["label.Normal"] for name, row in by_image.items()}
    assert normal == {
        "aa-1": 0, "aa-2": 0,  # edema
        "aa-3": 1,  # No Finding
        "bb-1": -1,  # No Finding beside devices: not called normal
        "bb-2": -1,  # No Finding beside a fracture: contradiction
        "cc-1": -1,  # nothing said
        "dd-1": 0,  # an opacity
    }  # fmt: skip
    assert rows.conflicts == {"Normal": 1}
    lesion = by_image["dd-1"]
    assert [lesion[f"label.{name}"] for name in ("Lung Lesion", "Mass", "Nodule")] == [0, -1, -1]
    assert rows.frame["label_trust"].unique().to_list() == ["text_mined"]
    assert rows.frame["label_source"].unique().to_list() == ["mimic-cxr-2.0.0-chexpert"]
    assert "Adenopathy" not in rows.findings


def test_the_weak_tier_reads_the_absence_of_a_lesion_as_that_of_mass_and_nodule(make):
    options = make()
    frame = mimic.read(SourceOptions("mimic", options.root, policy=LabelPolicy(tier="weak"))).frame
    assert frame.filter(image_id="dd-1").select("label.Mass", "label.Nodule").row(0) == (0, 0)


def test_columns_are_found_by_name(make):
    """CheXpert's own order in place of the alphabetical one: the same labels."""
    expected = mimic.read(make()).frame
    header = LABELS.split(",")
    swapped = [header[1], header[0], *reversed(header[2:])]
    rows = [dict(zip(header, line.split(","), strict=True)) for line in label_table().splitlines()[1:]]
    text = table(",".join(swapped), (",".join(row[name] for name in swapped) for row in rows))
    frame = mimic.read(make(labels=text)).frame
    labels = [name for name in expected.columns if name.startswith("label.")]
    assert frame.select(labels).equals(expected.select(labels))


def test_studies_without_labels_are_unknown_whatever_blanks_mean(make):
    studies = {study: row for study, row in STUDIES.items() if study != 50000001}
    options = make(labels=label_table(studies))
    rows = mimic.read(SourceOptions("mimic", options.root, policy=LabelPolicy(blank="zero")))
    unlabelled = rows.frame.filter(study_id="s50000001")
    assert set(unlabelled.select(r"^label\..*$").to_numpy().ravel().tolist()) == {-1}
    assert unlabelled["raw_labels"].to_list() == [None, None]
    assert rows.frame.filter(image_id="cc-1")["label.Edema"].to_list() == [0]  # a row of blanks is another matter
    assert rows.notes[0] == "1 studies (2 images) have no labels: unknown"


def test_no_labels_at_all(make):
    rows = mimic.read(make(labels=None))
    assert rows.findings == ()
    assert "images without labels" in rows.notes[0]
    assert not [name for name in rows.frame.columns if name.startswith("label.")]


def test_negbio_by_name(make, tmp_path):
    options = make()
    other = tmp_path / "mimic-cxr-2.0.0-negbio.csv.gz"
    pack(other, label_table(STUDIES | {50000004: (10000003, cells(Pneumothorax="1.0"))}))
    assert mimic.read(options).frame.filter(image_id="cc-1")["label.Pneumothorax"].to_list() == [-1]
    frame = mimic.read(SourceOptions("mimic", tmp_path, table=other)).frame
    assert frame.filter(image_id="cc-1")["label.Pneumothorax"].to_list() == [1]
    assert frame["label_source"][0] == "mimic-cxr-2.0.0-negbio"
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    assert mimic.read(options).frame["label_source"][0] == "mimic-cxr-2.0.0-negbio"


def test_radiologists_labels_of_test_studies_in_2_1_0(make):
    row = {"study_id": "50000005", "Airspace Opacity": "0.0", "Edema": "1.0", "Pneumonia": "-1.0"}
    gold = table(GOLD, [",".join(row.get(name, "") for name in GOLD.split(","))])
    rows = mimic.read(make(gold=gold))
    test = rows.frame.filter(image_id="dd-1").row(0, named=True)
    assert test["label_trust"] == "physician"
    assert test["label_source"] == "mimic-cxr-2.1.0-test-set-labeled"
    assert [test[f"label.{name}"] for name in ("Lung Opacity", "Edema", "Pneumonia", "Lung Lesion")] == [0, 1, -2, -1]
    assert json.loads(test["raw_labels"]) == {"Airspace Opacity": "0.0", "Edema": "1.0", "Pneumonia": "-1.0"}
    assert rows.frame["label_trust"].to_list() == ["text_mined"] * 6 + ["physician"]
    assert rows.frame["release"][0] == "2.1.0"
    without = table(
        GOLD.replace("No Finding,", ""), [",".join(row.get(n, "") for n in GOLD.split(",") if n != "No Finding")]
    )
    assert mimic.read(make(gold=without)).frame["label.Edema"].to_list()[-1] == 1
    with pytest.raises(MissingColumnError, match="'Edema'"):
        mimic.read(make(gold=gold.replace("Edema", "Oedema", 1)))


def test_sex_and_age_from_mimic_iv(make):
    header = "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod"
    people = ["10000001,F,52,2178,2011 - 2013,", "10000002,M,91,2150,2011 - 2013,2151-01-01"]
    frame = mimic.read(make(patients=table(header, people))).frame
    assert frame["sex"].to_list() == ["F"] * 3 + ["M"] * 2 + [None] * 2
    assert frame["age_raw"].to_list() == ["52"] * 3 + ["91"] * 2 + [None] * 2
    assert frame["age_years"].to_list() == [54.0] * 3 + [91.0, 90.0] + [None] * 2  # two years after the anchor year
    assert frame["quality"].to_list()[3] == ["age_capped"]


def records(images=IMAGES) -> str:
    return table(
        "subject_id,study_id,dicom_id,path",
        (f"{u},{s},{d},{path_of(u, s, d + '.dcm')}" for d, u, s, *_ in images),
    )


def test_dicom_release(make):
    rows = mimic.read(make(suffix=".dcm", metadata=None, split=None, labels=None, records=records()))
    assert rows.frame["source_relpath"][0] == "files/p10/p10000001/s50000001/aa-1.dcm"
    assert rows.frame["study_id"][0] == "s50000001"
    assert set(rows.frame["view_source"]) == {"unknown"}
    assert not rows.official
    assert rows.frame["split_official"].to_list() == [""] * 7


def test_dicom_files_beside_the_tables_of_the_jpeg_release(make):
    rows = mimic.read(make(suffix=".DCM", records=records()))
    assert rows.frame["source_relpath"][0].endswith("/aa-1.DCM")
    assert rows.frame["label.Edema"][0] == 1


def test_same_ids_as_cxrlt(make, tmp_path):
    """Both datasets in one manifest: the pictures are known to be the same, and enter pretraining once."""
    options = make()
    (tmp_path / "cxr-lt-2024").mkdir()
    names = cxrlt.CXRLT_2024_TASK1
    lines = [",".join(["dicom_id", "subject_id", "study_id", "ViewPosition", "fpath", *names])]
    lines += [f"{d},{u},s{s},AP,{path_of(u, s, d + '.jpg')}" + ",0" * len(names) for d, u, s, *_ in IMAGES[:5]]
    (tmp_path / "cxr-lt-2024/train_labeled.csv").write_text("\n".join(lines) + "\n")
    specs = [SourceSpec("cxrlt", "cxrlt", options.root), SourceSpec("mimic", "mimic", options.root)]
    frame = build_manifest(specs, ManifestOptions(val_fraction=0.0))[0].frame
    origins = frame.group_by("dataset").agg(
        "origin_image", "origin_patient", pl.col("study_id").str.split("/").list.last()
    )
    first, second = (dict(zip(origins.columns, row, strict=True)) for row in origins.sort("dataset").iter_rows())
    assert set(first["origin_image"]) < set(second["origin_image"])
    assert set(first["origin_patient"]) < set(second["origin_patient"])
    assert set(first["study_id"]) < set(second["study_id"])
    assert frame.filter("ssl_ok").height == frame.filter("ssl_ok")["origin_image"].n_unique() == 5


def edit(text: str, row: int, old: str, new: str) -> str:
    lines = text.splitlines()
    assert old in lines[row - 1]
    lines[row - 1] = lines[row - 1].replace(old, new, 1)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("which", "row", "old", "new", "error", "message"),
    [
        ("metadata", 1, "ViewPosition", "View", MissingColumnError, "'ViewPosition'"),
        ("metadata", 3, "10000001,", ",", ManifestError, "row 3: 'subject_id' is empty"),
        ("metadata", 3, "10000001,", "1e7,", ManifestError, "row 3: 'subject_id' is not a number"),
        ("metadata", 3, "aa-2", "aa-1", ManifestError, "'dicom_id' must be unique"),
        ("metadata", 3, "aa-2", "../../../../x", PathError, "row 3"),
        ("metadata", 3, ",Erect", "", ManifestError, "row 3: 11 fields"),
        ("labels", 1, "Edema", "Oedema", MissingColumnError, r"'Edema' \(nearest: 'Oedema'\)"),
        ("labels", 2, "-1.0", "-2", UnknownLabelError, "row 2: column 'Cardiomegaly' holds '-2'"),
        ("labels", 3, "50000009", "50000001", ManifestError, "'study_id' must be unique"),
        ("labels", 3, "50000009", "50000009.0", ManifestError, "row 3: 'study_id' is not a number"),
        ("labels", 2, "10000001", "10000002", ManifestError, "2 images have another subject_id"),
        ("split", 4, "train", "valid", ManifestError, "row 4: column 'split' holds 'valid'"),
        ("split", 4, "aa-3", "aa-2", ManifestError, "'dicom_id' must be unique"),
    ],
)
def test_faults_name_their_place(make, which, row, old, new, error, message):
    text = {"metadata": table(META, meta_rows()), "labels": label_table(), "split": split_table()}[which]
    with pytest.raises(error, match=message) as caught:
        mimic.read(make(**{which: edit(text, row, old, new)}))
    assert "1000000" not in str(caught.value)  # never a patient


def test_a_patient_in_two_splits_is_a_leak(make):
    options = make(split=edit(split_table(), 4, "train", "test"))
    with pytest.raises(ManifestError, match="1 patients are on both sides"):
        build_manifest([SourceSpec("mimic", "mimic", options.root)], ManifestOptions())


def test_missing_images(make):
    options = make(present=IMAGES[1:5])
    with pytest.raises(EmptyStudyError, match=r"3 of 7 .*metadata.csv.gz row 2.*2 studies have no image left") as error:
        mimic.read(options)
    assert "1000000" not in str(error.value)
    rows = mimic.read(SourceOptions("mimic", options.root, allow_missing=True))
    assert rows.frame.height == 4
    assert rows.frame["label.Edema"].to_list() == [1, -1, -1, -1]  # labels stay with their images


def test_images_elsewhere_and_nothing_there(make, tmp_path, tmp_path_factory):
    make()
    tables = tmp_path_factory.mktemp("tables")
    for path in tmp_path.glob("*.gz"):
        path.rename(tables / path.name)
    with pytest.raises(PathError, match="--images mimic=FOLDER"):
        mimic.read(SourceOptions("mimic", tables))
    for images, first in ((tmp_path, "files/p10/"), (tmp_path / "files", "p10/")):
        rows = mimic.read(SourceOptions("mimic", tables, images=images))
        assert rows.frame["source_relpath"][0].startswith(first)
    with pytest.raises(PathError, match="neither"):
        mimic.read(SourceOptions("mimic", tmp_path))


def test_unpacked_tables_are_read_too(make, tmp_path):
    expected = mimic.read(make()).frame
    for path in tmp_path.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert mimic.read(SourceOptions("mimic", tmp_path)).frame.drop("label_source").equals(expected.drop("label_source"))


def test_damaged_pictures_are_quarantined_and_odd_ones_read_right(make, tmp_path):
    """Each file is what some release holds: two unreadable, five that must come out as the same grey picture."""
    options = make()
    grey = np.tile(np.repeat(np.array([0, 60, 120, 255], np.uint8), 8), (32, 1))  # its percentiles are 0 and 255
    whole = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    files = [
        (".JPG", whole), (".jpg", whole[: len(whole) // 2]), (".jpg", b""), (".png", png16(grey)),
        (".png", png_rgba(grey)), (".dcm", dicom(grey, "x", photometric="MONOCHROME1")),
        (".dcm", dicom(grey, "y", syntax=False)),
    ]  # fmt: skip
    for (dicom_id, subject, study, *_), (suffix, content) in zip(IMAGES, files, strict=True):
        path = tmp_path / path_of(subject, study, f"{dicom_id}.jpg")
        path.unlink()
        path.with_suffix(suffix).write_bytes(content)
    root = options.root.rename(options.root.with_name(f"{options.root.name} Röntgen 胸"))
    manifest, _ = build_manifest([SourceSpec("mimic", "mimic", root)], ManifestOptions())
    summary = build_store(manifest, root / "store", size=32, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored) == (7, 5)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1}
    store = Store.open(root / "store")
    for index in range(len(store)):
        np.testing.assert_allclose(store.read(index), grey, atol=3)  # JPEG keeps no value exactly


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("mimic") / "out"
    write_phantoms(out, "mimic", 12, 4, 64, 2, workers=1)
    return out


def test_a_phantom_is_read_as_the_cohort_it_was_made_of(phantom):
    rows = mimic.read(SourceOptions("mimic", phantom))
    studies = [study for patient in plan_cohort(12, 4, 2) for study in patient.studies]
    by_study = dict(rows.frame.group_by("study_id", maintain_order=True))
    assert len(by_study) == len(studies)
    known = 0
    for images, study in zip(by_study.values(), studies, strict=True):
        assert images.height == len(study.images)
        for row in images.iter_rows(named=True):
            for finding in rows.findings:
                code = row[f"label.{finding}"]
                assert code in (-1, -2, int(finding in study.findings))
                known += code >= 0
                if row["label_trust"] is not None and finding in study.findings and finding not in ("Mass", "Nodule"):
                    assert code == 1
    assert known > rows.frame.height * 4
    header = gzip.decompress((phantom / "mimic-cxr-2.0.0-chexpert.csv.gz").read_bytes()).split(b"\n")[0].decode()
    assert header == LABELS
    assert gzip.decompress((phantom / "mimic-cxr-2.0.0-metadata.csv.gz").read_bytes()).startswith(META.encode())
    assert (phantom / "mimic-cxr-2.1.0-test-set-labeled.csv").read_text().startswith(GOLD)
    assert set(rows.frame["label_trust"]) == {"text_mined", "physician", None}


def test_a_dicom_phantom_becomes_a_store(tmp_path):
    write_phantoms(tmp_path / "out", "mimic-dicom", 5, 4, 64, 0, workers=1)
    manifest, _ = build_manifest([SourceSpec("mimic", "mimic", tmp_path / "out")], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert summary.stored == summary.inputs == manifest.frame.height
    assert not summary.quarantined
