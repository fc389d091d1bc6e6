"""PadChest: its table, its labels, its folders, its 16-bit files, and its faults."""

import csv
import gzip
import json
import shutil
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from hilum.core.errors import EmptyStudyError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.images import read_image
from hilum.data.label_cells import finding_columns, label_lists, token_values
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import padchest

# Column by column as the release has it (Rx-thorax-automatic-captioning, Dataset-maintenance).
HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
    "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,"
    "labelCUIS,LocalizationsCUIS"
)
TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
ONE, TWO = "1" * 38, "1" * 37 + "2"  # equal as floats
MANUAL, CLASSIFIER = "Manual review of DICOM fields", "resnet-50.t7"


def row(number, labels, patient=ONE, **changes):
    """One synthetic record; every study has one image unless told otherwise."""
    cells = dict.fromkeys(HEADER.split(","), "")
    cells |= {
        "": str(number), "ImageID": f"{number:038d}_ab{number}.png", "ImageDir": "15", "StudyDate_DICOM": "20140915",
        "StudyID": f"{number:038d}", "PatientID": patient, "PatientBirth": "1930.0", "PatientSex_DICOM": "F",
        "Projection": "PA", "MethodProjection": MANUAL, "Pediatric": "No", "BitsStored_DICOM": "12",
        "Rows_DICOM": "1760", "Columns_DICOM": "2140.0", "MethodLabel": "Physician", "Labels": labels,
        "LabelsLocalizationsBySentence": "[['normal'], ['nodule', 'loc basal']]",
        "labelCUIS": "['C0034069' 'C0742362']",
    }  # fmt: skip
    return cells | changes


ROWS = [
    row(0, "['normal']"),
    row(1, "['pleural effusion ', ' cardiomegaly', '']", ImageDir="15.0", StudyDate_DICOM="20100301"),
    row(2, "[]", TWO, Projection="AP_horizontal", MethodProjection=CLASSIFIER, MethodLabel="RNN_model"),
    row(3, "", TWO, Projection="L", PatientSex_DICOM="O", PatientBirth="", Pediatric="PED"),
    row(4, "['']", TWO, Projection="EXCLUDE"),
    row(5, "['exclude']", TWO, Projection="COSTAL"),
    row(6, "['suboptimal study', 'nodule']", TWO, Projection="AP", PatientSex_DICOM=""),
]


# Other spellings of a column, and what stands in for one that is not there.
SAME = {"LabelCUIS": "labelCUIS", "ExposureTime_DICOM": "ExposureTime", "LABELS": "Labels", "Other": "Report"}


@pytest.fixture
def make(tmp_path):
    def write(rows=ROWS, header=HEADER, name=TABLE, images=None, folder="15", present=None):
        out = tmp_path / name
        names = header.split(",")
        lines = StringIO()
        csv.writer(lines, lineterminator="\n").writerow(names)
        for cells in rows:
            csv.writer(lines, lineterminator="\n").writerow([cells[SAME.get(name, name)] for name in names])
        text = lines.getvalue().encode()
        out.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for cells in rows if present is None else present:
            (tmp_path / folder / cells["ImageID"]).write_bytes(images or b"")
        return SourceOptions("padchest", tmp_path)

    return write


def codes(rows, finding):
    return rows.frame[f"label.{finding}"].to_list()


def findings_of(images, policy=None):
    """Finding -> codes, of images with these labels."""
    path, table = Path(TABLE), load_map("padchest")
    values = label_lists(pl.Series("Labels", [str(list(labels)) for labels in images]), path)
    columns, _ = finding_columns(token_values(values, table, path), table, policy or LabelPolicy())
    return {column.name.removeprefix("label."): column.to_list() for column in columns}


def of(labels, policy=None):
    """The same of one image."""
    return {name: codes[0] for name, codes in findings_of([labels], policy).items()}


def test_ids_views_ages_and_sizes(make):
    rows = padchest.read(make())
    frame = rows.frame
    assert frame["patient_id"].to_list() == [ONE] * 2 + [TWO] * 5
    assert frame["patient_id"].n_unique() == 2  # a float would make them one
    assert frame["study_id"][1] == f"{1:038d}"
    assert frame["source_relpath"][1] == f"15/{1:038d}_ab1.png"
    assert frame["view_raw"].to_list() == ["PA", "PA", "AP_horizontal", "L", "EXCLUDE", "COSTAL", "AP"]
    assert frame["view_source"].to_list()[:3] == ["stated", "stated", "classifier"]
    assert frame["sex"].to_list() == ["F", "F", "F", "O", "F", "F", None]
    assert frame["age_years"].to_list()[:4] == [84.0, 80.0, 84.0, None]
    assert frame["age_raw"][0] == "1930.0"
    assert frame["is_pediatric"].to_list()[:4] == [None, None, None, True]
    assert frame.select("rows", "cols", "bits_stored").row(0) == (1760, 2140, 12)
    assert frame["label_trust"].to_list()[1:3] == ["physician", "rnn"]
    assert frame["study_date_raw"][1] == "20100301"
    assert frame["study_seq"].to_list()[:2] == [20140915, 20100301]
    assert frame["quality"].to_list() == [
        [], [], [], [], ["excluded_by_source"], ["excluded_by_source", "rib_projection"], ["suboptimal"],
    ]  # fmt: skip
    assert json.loads(frame["raw_labels"][1]) == "['pleural effusion ', ' cardiomegaly', '']"
    assert (rows.origin, rows.official, set(rows.tables)) == ("padchest", False, {TABLE})


def test_labels_of_the_rows(make):
    rows = padchest.read(make())
    assert codes(rows, "Normal") == [1, 0, -1, -1, -1, -1, -1]
    assert codes(rows, "Pleural Effusion") == [0, 1, -1, -1, -1, -1, -1]
    assert codes(rows, "Cardiomegaly") == [0, 1, -1, -1, -1, -1, -1]
    unlabelled = rows.frame[2:].select(pl.col("^label\\..*$")).to_numpy()
    assert set(unlabelled.ravel().tolist()) == {-1}  # empty, excluded and suboptimal: unknown for all
    assert len(rows.findings) == 42
    assert "3 images have no labels" in rows.notes[0]


def test_no_policy_makes_a_missing_list_of_labels_negative(make):
    options = make()
    strict = SourceOptions("padchest", options.root, policy=LabelPolicy(blank="zero"))
    assert padchest.read(strict).frame.equals(padchest.read(options).frame)


def test_through_the_manifest(make):
    manifest, _ = build_manifest([SourceSpec("padchest", "pc", make().root)], ManifestOptions())
    frame = manifest.frame.sort("image_id")
    assert frame["view"].to_list() == ["PA", "PA", "AP_SUPINE", "LATERAL", "OTHER", "OTHER", "AP"]
    assert frame["view_source"].to_list()[2] == "classifier"
    assert frame["is_frontal"].to_list() == [True, True, True, False, None, None, True]
    assert frame["is_pediatric"].to_list() == [False, False, False, True, False, False, False]
    assert frame["study_order"].to_list()[:2] == [2, 1]  # by date
    assert frame["origin_patient"][0] == f"padchest/{ONE}"
    assert frame["patient_id"][0] == f"pc/{ONE}"


# Labels that public code reads wrongly, and what the chest really has.
@pytest.mark.parametrize(
    ("labels", "ones", "zeros", "unknown"),
    [
        (["subcutaneous emphysema"], {"Subcutaneous Emphysema"}, {"Emphysema", "Normal"}, set()),
        (["pseudonodule"], set(), {"Nodule", "Normal"}, set()),
        (["nipple shadow", "end on vessel"], set(), {"Nodule", "Normal"}, set()),
        (["pericardial effusion"], set(), {"Pleural Effusion", "Normal"}, set()),
        (["breast mass", "soft tissue mass"], set(), {"Mass", "Normal"}, set()),
        (["pleural mass"], {"Pleural Other"}, {"Mass"}, set()),
        (["tuberculosis sequelae"], set(), {"Normal"}, {"Tuberculosis"}),
        (["tuberculosis", "tuberculosis sequelae"], {"Tuberculosis"}, {"Normal"}, set()),
        (["dai"], {"Support Devices"}, {"Normal"}, set()),
        (["NSG tube"], {"Support Devices"}, {"Normal"}, set()),
        (["reservoir central venous catheter"], {"Support Devices"}, {"Normal"}, set()),
        (["sternotomy"], set(), {"Normal"}, {"Support Devices"}),
        (["azygoesophageal recess shift"], set(), {"Azygos Lobe", "Normal"}, set()),
        (["hiatal hernia"], {"Hernia"}, {"Enlarged Cardiomediastinum"}, set()),  # a child of it in the authors' tree
        (["loculated fissural effusion"], {"Fissure", "Pleural Effusion"}, set(), set()),
        (["hydropneumothorax"], {"Hydropneumothorax", "Pneumothorax", "Pleural Effusion"}, set(), set()),
        (["pneumoperitoneo"], {"Pneumoperitoneum"}, {"Pneumothorax"}, set()),
        (["aortic atheromatosis"], {"Calcification of the Aorta"}, {"Tortuous Aorta"}, set()),
        (["callus rib fracture"], {"Rib Fracture", "Fracture"}, {"Clavicle Fracture"}, set()),
        (["vertebral compression"], set(), {"Rib Fracture"}, {"Fracture"}),
        (["COPD signs"], set(), {"Normal"}, {"Emphysema"}),
        (["COPD signs", "emphysema"], {"Emphysema"}, {"Normal"}, set()),
        (["bullas"], {"Bulla"}, {"Normal"}, {"Emphysema"}),
        (["hilar enlargement"], {"Hilum"}, {"Normal"}, {"Adenopathy"}),
        (["scoliosis", "osteopenia"], {"Scoliosis", "Osteopenia"}, {"Kyphosis", "Normal"}, set()),
        (["kerley lines"], set(), {"Normal"}, {"Edema"}),
        (["air bronchogram"], set(), set(), {"Consolidation"}),
        (["consolidation"], {"Consolidation"}, {"Pneumonia", "Infiltration"}, {"Lung Opacity"}),
        (["mass"], {"Mass"}, {"Nodule"}, {"Lung Lesion"}),
        (["gynecomastia"], set(), {"Normal", "Mass"}, set()),
        (["unchanged"], set(), {"Edema"}, {"Normal"}),
        (["chronic changes"], set(), {"Edema"}, {"Normal", "Fibrosis"}),
        (["unchanged", "nodule"], {"Nodule"}, {"Normal"}, set()),
        (["normal"], {"Normal"}, {"Edema", "Fracture"}, {"Lung Lesion", "Lung Opacity"}),
    ],
)  # fmt: skip
def test_labels_by_hand(labels, ones, zeros, unknown):
    found = of(labels)
    assert {name for name, code in found.items() if code == 1} == ones
    assert all(found[name] == 0 for name in zeros)
    assert all(found[name] == -1 for name in unknown)
    assert not {"Infarction", "Pulmonary Embolism"} & set(found)


def test_hints_are_believed_when_asked():
    found = of(["kerley lines", "cyst", "sternotomy", "ground glass pattern"], LabelPolicy(tier="weak"))
    assert {name for name, code in found.items() if code == 1} == {
        "Edema", "Lung Lesion", "Support Devices", "Infiltration", "Lung Opacity",
    }  # fmt: skip


def test_the_vocabulary_is_the_release_s():
    table = load_map("padchest")
    in_tree_only = {"hemothorax", "viral pneumonia", "COVID 19", "COVID 19 uncertain"}
    assert len(set(table.labels) - in_tree_only) == 193
    assert {"pectum excavatum", "esophagic dilatation", "lipomatosis", "hypoexpansion basal"} <= set(table.labels)
    others = {"normal": 1, "unchanged": -1, "chronic changes": -1, "exclude": -1, "suboptimal study": -1}
    normal = findings_of([[label] for label in table.labels])["Normal"]
    # Every other label says that the chest is not normal.
    assert dict(zip(table.labels, normal, strict=True)) == {label: others.get(label, 0) for label in table.labels}


@pytest.mark.parametrize("place", ["15", "images", ".", "54"])
@pytest.mark.parametrize("name", [TABLE, TABLE + ".gz"])
def test_folders_and_gzip(make, place, name):
    rows = padchest.read(make(folder=place, name=name))
    prefix = "" if place == "." else f"{place}/"
    assert rows.frame["source_relpath"][0] == f"{prefix}{0:038d}_ab0.png"


def test_suffixes_in_capitals_and_unicode_folders(make, tmp_path):
    options = make(folder="Tórax")
    for path in (tmp_path / "Tórax").iterdir():
        path.rename(path.with_suffix(".PNG"))
    assert padchest.read(options).frame["source_relpath"][0] == f"Tórax/{0:038d}_ab0.PNG"


def test_columns_by_name_in_any_order_and_case(make):
    expected = padchest.read(make()).frame
    names = HEADER.split(",")
    spelled = {"labelCUIS": "LabelCUIS", "ExposureTime": "ExposureTime_DICOM", "Labels": "LABELS"}
    shuffled = ",".join(["", *reversed([spelled.get(name, name) for name in names[1:]])])
    assert padchest.read(make(header=shuffled)).frame.equals(expected)


@pytest.mark.parametrize("gone", ["Labels", "PatientID", "Projection", "MethodLabel"])
def test_missing_column(make, gone):
    with pytest.raises(MissingColumnError, match=f"'{gone}'"):
        padchest.read(make(header=HEADER.replace(f",{gone},", ",Other,")))


UNKNOWN_LABEL = (
    r"row 9, 'Labels': unknown label 'cardiomegalia'\. Did they mean 'cardiomegaly'\? 197 labels are known\. "
    r".*row in facts/labels/padchest\.csv"
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"Labels": "['cardiomegalia']"}, UnknownLabelError, UNKNOWN_LABEL),
        ({"Labels": "['C0034069' 'C0742362']"}, UnknownLabelError, "row 9.*'C0034069C0742362'"),
        ({"Labels": "pleural effusion"}, UnknownLabelError, "row 9: 'Labels' is not a list"),
        ({"Labels": "[1, 2]"}, UnknownLabelError, "row 9: 'Labels' is not a list"),
        ({"Labels": "['a\\d']"}, UnknownLabelError, "row 9: 'Labels' is not a list"),
        ({"Labels": "[" * 500}, UnknownLabelError, "row 9: 'Labels' is not a list"),
        ({"Labels": "__import__('os').getcwd()"}, UnknownLabelError, "row 9: 'Labels' is not a list"),
        ({"PatientID": "1.11111E+37"}, ManifestError, "row 9: 'PatientID' is not digits .*spreadsheet has rounded"),
        ({"PatientID": ""}, ManifestError, "row 9: 'PatientID' is empty"),
        ({"StudyID": "x"}, ManifestError, "row 9: 'StudyID' is not digits"),
        ({"ImageID": "../7.png"}, PathError, "row 9: 'ImageID' is not the name"),
        ({"ImageID": "/etc/7.png"}, PathError, "row 9: 'ImageID' is not the name"),
        ({"ImageID": f"{0:038d}_ab0.png"}, ManifestError, "'ImageID' must be unique"),
        ({"MethodLabel": "Intern"}, ManifestError, "row 9: column 'MethodLabel' holds 'Intern'"),
    ],
)  # fmt: skip
def test_faults_name_their_row(make, change, error, message):
    with pytest.raises(error, match=message) as raised:
        padchest.read(make([*ROWS, row(7, "['normal']", **change)], present=ROWS))
    assert ONE not in str(raised.value)


def test_files_that_are_not_there(make):
    options = make(present=ROWS[1:])
    with pytest.raises(
        EmptyStudyError, match=r"1 of 7 listed images .*csv row 2\)\. 1 studies have no image left"
    ) as error:
        padchest.read(options)
    assert ONE not in str(error.value)
    rows = padchest.read(SourceOptions("padchest", options.root, allow_missing=True))
    assert rows.frame.height == 6
    assert any("1 of 7 listed images" in note for note in rows.notes)


def test_images_twice_elsewhere_or_behind_a_link(make, tmp_path, tmp_path_factory):
    options = make()
    shutil.copytree(tmp_path / "15", tmp_path / "images-512")
    with pytest.raises(
        ManifestError, match=r"7 images are there more than once \(in 15, images-512\).*--images padchest"
    ):
        padchest.read(options)
    rows = padchest.read(SourceOptions("padchest", tmp_path, images=tmp_path / "images-512"))
    assert rows.frame["source_relpath"][0] == f"{0:038d}_ab0.png"
    shutil.rmtree(tmp_path / "images-512")
    away = tmp_path_factory.mktemp("away") / "15"
    (tmp_path / "15").rename(away)
    (tmp_path / "15").symlink_to(away)
    with pytest.raises(PathError, match="row 2: the image is, or lies behind, a link that leaves"):
        padchest.read(options)
    with pytest.raises(PathError, match="holds neither"):
        padchest.read(SourceOptions("padchest", away))


def picture(seed: int, depth: int = 16) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:40]
    values = 0.5 + 0.3 * np.sin(x / 7 + seed) * np.cos(y / 9) + np.random.default_rng(seed).normal(0, 0.02, (48, 40))
    return np.rint(np.clip(values, 0, 1) * (2**depth - 1)).astype(np.uint16 if depth > 8 else np.uint8)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_damaged_files_go_to_quarantine_and_the_others_are_read(make, tmp_path):
    options = make()
    whole = png(picture(1))
    grey8 = picture(2, 8)
    contents = [
        whole, whole[: len(whole) // 2], b"", png(np.dstack([grey8] * 3 + [np.full_like(grey8, 255)])), whole,
        png(grey8), b"not an image at all",
    ]  # fmt: skip
    for cells, content in zip(ROWS, contents, strict=True):
        (tmp_path / "15" / cells["ImageID"]).write_bytes(content)
    manifest, _ = build_manifest([SourceSpec("padchest", "padchest", options.root)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert (summary.inputs, summary.stored) == (7, 4)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1, "not_an_image": 1}


def test_16_bit_files_are_scaled_and_not_clipped(tmp_path):
    """The lowest and highest half per cent become black and white, everything between is proportional."""
    for seed in range(5):
        deep = picture(seed)
        low, high = np.percentile(deep, [0.5, 99.5])
        expected = np.clip((deep - low) / (high - low), 0, 1) * 255
        read = read_image(png(deep))
        assert read.bits_stored == 16
        assert abs(read.pixels.mean() - expected.mean()) < 1
        assert np.abs(read.pixels - expected).max() < 2
        assert (read.pixels == 255).mean() < 0.02  # a reader that clips at 255 gives a white square


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("padchest") / "out"
    write_phantoms(out, "padchest", 20, 4, 64, 2, workers=1)
    return out


def test_a_phantom_is_read_as_the_cohort_it_was_made_of(phantom):
    rows = padchest.read(SourceOptions("padchest", phantom))
    assert (phantom / TABLE).read_text().split("\n")[0] == HEADER
    table = load_map("padchest")
    named = {row.finding for row in table.rows if row.present == "1" and row.tier == "strict"}
    studies = [study for patient in plan_cohort(20, 4, 2) for study in patient.studies]
    by_study = dict(rows.frame.group_by("study_id", maintain_order=True))
    written = list(csv.DictReader((phantom / TABLE).read_text().splitlines()))
    order = list(dict.fromkeys(cells["StudyID"] for cells in written))
    assert len(order) == len(studies) == len(by_study)
    compared = 0
    for study_id, study in zip(order, studies, strict=True):
        images = by_study[(study_id,)]
        assert images.height == len(study.images)
        for image in images.iter_rows(named=True):
            if image["raw_labels"] in ('""', '"[]"'):
                assert {code for name, code in image.items() if name.startswith("label.")} == {-1}
                continue
            compared += 1
            for finding in named - {"Bulla", "Hilum", "Osteopenia", "Scoliosis"}:
                expected = int(finding in study.findings)
                assert image[f"label.{finding}"] in ({expected} if expected or finding == "Normal" else {0, -1})
                if not expected and image[f"label.{finding}"] == -1:  # a hint of another finding
                    hints = {row.label for row in table.about(finding) if row.tier == "weak"}
                    assert hints & {word.strip(" '[]\"") for word in image["raw_labels"].split(",")}
    assert compared > 0.8 * rows.frame.height
    assert rows.frame["image_id"].str.contains(r"^\d{38}_[0-9a-f]{6}\.png$").all()
    assert {"stated", "classifier"} == set(rows.frame["view_source"])
    assert all(name in set(rows.frame["view_raw"]) for name in ("PA", "AP", "L"))


def test_a_phantom_becomes_a_store(phantom, tmp_path):
    manifest, _ = build_manifest([SourceSpec("padchest", "padchest", phantom)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert summary.stored == summary.inputs == manifest.frame.height
    assert not summary.quarantined
