"""VinDr-CXR and the VinBigData challenge: votes, labels, DICOM of every kind the release has, and faults."""

import csv
import json
from io import StringIO

import numpy as np
import pytest

from hilum.core.errors import LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.images import read_image
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import encode
from hilum.data.phantoms.layouts import LAYOUTS
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import vindr

LABELS = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
    "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
    "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
    "Tuberculosis,Other diseases,No finding"
)
TRAIN = "image_id,rad_id," + LABELS
TEST = "image_id," + LABELS.replace("Other diseases", "Other disease")
A, B, C, D = (letter * 32 for letter in "abcd")


def text(header, records):
    """CSV of (ids, labels that are present) records."""
    names = header.split(",")
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for *ids, present in records:
        present = {"Other disease" if "Other disease" in names and one == "Other diseases" else one for one in present}
        assert present <= set(names)
        writer.writerow([*ids, *(int(name in present) for name in names[len(ids) :])])
    return out.getvalue()


READINGS = [
    (A, "R1", ["Cardiomegaly", "Nodule/Mass"]), (A, "R2", ["Cardiomegaly"]), (A, "R3", ["No finding"]),
    (B, "R1", ["No finding"]), (B, "R2", ["No finding"]), (B, "R9", ["ILD", "Rib fracture"]),
]  # fmt: skip
AGREED = [(C, ["Rib fracture", "Nodule/Mass", "Other diseases"]), (D, ["No finding"])]


@pytest.fixture
def make(tmp_path):
    def write(
        train=READINGS, test=AGREED, header=TRAIN, test_header=TEST, suffix=".dicom", gone=(), folder="annotations"
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        for split, head, records in (("train", header, train), ("test", TEST, test)):
            (tmp_path / split).mkdir(exist_ok=True)
            if records:
                (tmp_path / folder / f"image_labels_{split}.csv").write_text(text(head, records))
            for name in {record[0] for record in records} - set(gone):
                (tmp_path / split / f"{name}{suffix}").touch()
        return SourceOptions("vindr", tmp_path)

    return write


def column(rows, finding):
    return rows.frame[f"label.{finding}"].to_list()


@pytest.mark.parametrize("folder", ["annotations", "."])
def test_most_readers_decide_and_every_vote_is_kept(make, folder):
    rows = vindr.read(make(folder=folder))
    frame = rows.frame
    assert frame["image_id"].to_list() == [A, B, C, D]
    assert frame["split_official"].to_list() == ["train", "train", "test", "test"]
    assert frame["label_trust"].to_list() == ["physician", "physician", "consensus", "consensus"]
    assert frame["source_relpath"].to_list()[::2] == [f"train/{A}.dicom", f"test/{C}.dicom"]
    assert frame["patient_id"].to_list() == [A, B, C, D]
    assert column(rows, "Cardiomegaly") == [1, 0, 0, 0]
    assert column(rows, "Nodule") == [0, 0, -1, 0]  # one reader of three is not enough; two signs in one word
    assert column(rows, "Mass") == [0, 0, -1, 0]
    assert column(rows, "Rib Fracture") == [0, 0, 1, 0]
    assert column(rows, "Fracture") == [-1, -1, 1, -1]  # other fractures are not annotated
    assert column(rows, "Normal") == [0, 1, 0, 1]
    assert json.loads(frame["raw_labels"][0]) == {
        "R1": ["Cardiomegaly", "Nodule/Mass"],
        "R2": ["Cardiomegaly"],
        "R3": ["No finding"],
    }
    assert json.loads(frame["raw_labels"][2])["consensus"] == ["Nodule/Mass", "Rib fracture", "Other diseases"]
    assert rows.official
    assert rows.origin == "vindr"
    assert "no patient ids" in rows.notes[0]
    assert set(frame["view_source"]) == {"derived"}
    assert not {"Support Devices", "Enlarged Cardiomediastinum", "Tortuous Aorta"} & set(rows.findings)


def one_image(make, *labels, policy=None):
    options = make([], [(A, list(labels))])
    rows = vindr.read(SourceOptions("vindr", options.root, policy=policy or LabelPolicy()))
    return {name: column(rows, name)[0] for name in rows.findings}


@pytest.mark.parametrize(
    ("labels", "ones", "unknown"),
    [
        (["Aortic enlargement"], set(), set()),
        (["Calcification"], set(), set()),
        (["Lung cavity", "Lung cyst", "Mediastinal shift", "Other lesion"], set(), set()),
        (["Enlarged PA"], set(), {"Pulmonary Hypertension"}),
        (["ILD"], set(), {"Infiltration", "Fibrosis"}),
        (["COPD"], set(), {"Emphysema"}),
        (["COPD", "Emphysema"], {"Emphysema"}, set()),
        (["Lung tumor"], set(), {"Mass", "Lung Lesion"}),
        (["Nodule/Mass"], set(), {"Mass", "Nodule"}),
        (["Clavicle fracture"], {"Clavicle Fracture", "Fracture"}, set()),
        (["Pulmonary fibrosis", "Pleural thickening"], {"Fibrosis", "Pleural Thickening"}, set()),
        (["No finding"], {"Normal"}, set()),
    ],
)
def test_labels_by_hand(make, labels, ones, unknown):
    found = one_image(make, *labels)
    never = {"Fracture", "Pulmonary Hypertension", "Lung Lesion"}  # the source cannot say no to these
    assert {name for name, code in found.items() if code == 1} == ones
    assert {name for name, code in found.items() if code == -1} == (unknown | never) - ones
    assert found["Normal"] == int(labels == ["No finding"])


def test_hints_and_contradictions(make):
    weak = one_image(make, "ILD", "Enlarged PA", "Lung tumor", policy=LabelPolicy(tier="weak"))
    assert {name for name, code in weak.items() if code == 1} == {
        "Infiltration", "Fibrosis", "Pulmonary Hypertension", "Lung Lesion",
    }  # fmt: skip
    rows = vindr.read(make([], [(A, ["No finding", "Edema"]), (B, ["Edema"])]))
    assert column(rows, "Normal") == [-1, 0]
    assert rows.conflicts == {"Normal": 1}


def test_columns_by_name_in_any_order_and_case(make):
    expected = vindr.read(make()).frame
    names = TRAIN.split(",")
    shuffled = vindr.read(make(header=",".join([*names[:2], *reversed(names[2:])]))).frame
    assert shuffled.equals(expected)
    options = make()
    path = options.root / "annotations/image_labels_train.csv"
    path.write_text(
        path.read_text().replace("Pleural effusion", "Pleural Effusion").replace("Lung tumor", "Lung Tumor")
    )
    assert vindr.read(options).frame.equals(expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"header": TRAIN.replace("Lung cyst", "Lung kyst")}, MissingColumnError, "'Lung cyst' .nearest: 'Lung kyst'"),
        ({"header": TRAIN.replace("rad_id", "reader")}, MissingColumnError, "'rad_id'"),
        ({"train": READINGS[:-1]}, ManifestError, r"train\.csv, row 5: the image has 2 readers, expected 3 \(1 such"),
        ({"train": [*READINGS, (A, "R4", [])]}, ManifestError, "row 2: the image has 4 readers, expected 3"),
        ({"train": [*READINGS[:-1], READINGS[-2]]}, ManifestError, "row 6: an image has two rows of one reader"),
        ({"train": [("../x", "R1", []), *READINGS]}, PathError, "row 2: 'image_id' is not letters"),
        ({"train": [(A, "", []), *READINGS]}, ManifestError, "row 2: 'rad_id' is empty"),
        ({"test": [*AGREED, AGREED[0]]}, ManifestError, r"test\.csv, row 2: an image has two rows of one reader"),
        ({"test": [*AGREED, (A, [])]}, LeakageError, "1 images are in both"),
    ],
)  # fmt: skip
def test_faults_name_their_row(make, change, error, message):
    with pytest.raises(error, match=message):
        vindr.read(make(**change))


def test_a_cell_that_is_no_label(make):
    options = make()
    path = options.root / "annotations/image_labels_test.csv"
    path.write_text(path.read_text().replace(f"{D},0", f"{D},-1"))
    with pytest.raises(UnknownLabelError, match="row 3: column 'Aortic enlargement' holds '-1'"):
        vindr.read(options)


def test_files_that_are_not_there_or_are_elsewhere(make, tmp_path, tmp_path_factory):
    options = make(gone=(B,))
    with pytest.raises(PathError, match=r"1 of 4 listed images .*image_labels_train\.csv row 5"):
        vindr.read(options)
    rows = vindr.read(SourceOptions("vindr", tmp_path, allow_missing=True))
    assert rows.frame["image_id"].to_list() == [A, C, D]
    with pytest.raises(PathError, match="holds none of annotations/image_labels_train"):
        vindr.read(SourceOptions("vindr", tmp_path / "train"))
    away = tmp_path_factory.mktemp("away")
    (tmp_path / "test").rename(away / "test")
    (tmp_path / "test").symlink_to(away / "test")
    make(gone=(C, D))
    with pytest.raises(PathError, match=r"image_labels_test\.csv, row 2: the image is, or lies behind, a link"):
        vindr.read(SourceOptions("vindr", tmp_path, allow_missing=True))


@pytest.mark.parametrize("suffix", [".DICOM", ".dcm", ".png", ".JPG"])
def test_copies_in_other_formats(make, suffix):
    assert vindr.read(make(suffix=suffix)).frame["source_relpath"][0] == f"train/{A}{suffix}"


def test_an_image_in_two_formats_is_refused(make, tmp_path):
    options = make()
    (tmp_path / "train" / f"{A}.png").touch()
    with pytest.raises(ManifestError, match=r"1 images are there more than once \(in train\)"):
        vindr.read(options)


CHALLENGE = f"""image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
{A},Cardiomegaly,3,R8,10,20,30,40
{B},No finding,14,R8,,,,
{A},Cardiomegaly,3,R9,11,20,30,41
{A},Cardiomegaly,3,R9,50,60,70,80
{A},No finding,14,R10,,,,
{B},No finding,14,R9,,,,
{B},Lung Opacity,7,R10,1,2,3,4
"""


@pytest.fixture
def challenge(tmp_path):
    def write(content=CHALLENGE):
        (tmp_path / "train.csv").write_text(content)
        (tmp_path / "train").mkdir(exist_ok=True)
        for name in (A, B):
            (tmp_path / "train" / f"{name}.dicom").touch()
        return SourceOptions("vindr", tmp_path)

    return write


def test_the_challenge_has_a_row_for_each_box(challenge):
    rows = vindr.read(challenge())
    assert rows.frame["image_id"].to_list() == [A, B]
    assert column(rows, "Cardiomegaly") == [1, 0]  # two boxes of one reader are one vote
    assert column(rows, "Lung Opacity") == [0, 0]
    assert column(rows, "Normal") == [0, 1]
    # Not among the challenge's labels: not asked, so unknown and not absent.
    for finding in ("Edema", "Pneumonia", "Tuberculosis", "Rib Fracture", "Clavicle Fracture", "Emphysema"):
        assert column(rows, finding) == [-1, -1]
    assert set(rows.frame["licence_tag"]) == {"kaggle-rules"}
    assert rows.notes[1] == "train.csv: 4 boxes left out"
    assert not rows.official
    zero = SourceOptions("vindr", rows.root, policy=LabelPolicy(blank="zero"))
    assert column(vindr.read(zero), "Edema") == [-1, -1]


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("Lung Opacity,7", "Lung Opacities,7", UnknownLabelError, "row 8, 'class_name'.*Opacities'.*'Lung Opacity'"),
        (f"{B},No finding,14,R9,,,,\n", "", ManifestError, "row 3: the image has 2 readers"),
        ("class_name", "class", MissingColumnError, "'class_name'"),
    ],
)  # fmt: skip
def test_faults_of_the_challenge_s_table(challenge, old, new, error, message):
    with pytest.raises(error, match=message):
        vindr.read(challenge(CHALLENGE.replace(old, new)))


def film() -> np.ndarray:
    y, x = np.mgrid[0:48, 0:40]
    return np.clip(120 + 90 * np.sin(x / 7) * np.cos(y / 9), 0, 255).astype(np.uint8)


def test_dicom_of_every_kind_is_read_alike_or_quarantined_with_its_reason(make, tmp_path):
    """Four images that look the same, one without pixels, one cut, one empty, one PNG under a DICOM name."""
    ids = [f"{number:032x}" for number in range(8)]
    options = make([], [(name, ["No finding"]) for name in ids])
    plain = encode("dicom", film(), "x")
    contents = [
        plain, encode("dicom_monochrome1", film(), "x"), encode("dicom_no_syntax", film(), "x"),
        encode("dicom_no_pixels", film(), "x"), plain[: len(plain) // 2], b"", encode("png", film(), "x"),
        encode("png_rgba", film(), "x"),
    ]  # fmt: skip
    for name, content in zip(ids, contents, strict=True):
        (tmp_path / "test" / f"{name}.dicom").write_bytes(content)
    manifest, _ = build_manifest([SourceSpec("vindr", "vindr", options.root)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert (summary.inputs, summary.stored, sum(summary.quarantined.values())) == (8, 5, 3)
    assert summary.quarantined.pop("zero_bytes") == 1
    assert summary.quarantined.pop("no_pixel_data") == 1
    assert len(summary.quarantined) == 1  # the cut one, whatever it is called
    for content in contents[:3]:
        assert np.abs(read_image(content).pixels.astype(int) - film()).max() <= 1


@pytest.fixture(scope="module", params=["vindr", "vinbigdata"])
def phantom(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    write_phantoms(out, request.param, 20, 4, 64, 2, workers=1)
    return out


def held_back(job, challenge):
    """The challenge gave out no labels of test images."""
    return challenge and job.patient.split == "test"


def test_a_phantom_is_read_as_the_cohort_it_was_made_of(phantom):
    """Every label that the source can name, and the majority of readers who do not all agree."""
    rows = vindr.read(SourceOptions("vindr", phantom))
    challenge = (phantom / "train.csv").exists()
    if not challenge:
        assert (phantom / "annotations/image_labels_train.csv").read_text().split("\n")[0] == TRAIN
        assert (phantom / "annotations/image_labels_test.csv").read_text().split("\n")[0] == TEST
    asked = set(vindr.CHALLENGE_LABELS) if challenge else set(LABELS.split(","))
    named = {r.finding for r in load_map("vindr").rows if r.present == "1" and r.tier == "strict" and r.label in asked}
    layout = LAYOUTS["vinbigdata" if challenge else "vindr"]
    jobs = layout.jobs(plan_cohort(20, 4, 2), 4, 64)
    truth = {
        image.image_id: job.study.findings for job in jobs for image in job.images if not held_back(job, challenge)
    }
    assert set(truth) == set(rows.frame["image_id"])
    for finding in named:
        for image_id, code in zip(rows.frame["image_id"], column(rows, finding), strict=True):
            if finding == "Fracture" and not {"Rib Fracture", "Clavicle Fracture"} & set(truth[image_id]):
                assert code == -1  # of another bone, or of none
            else:
                assert code == int(finding in truth[image_id]), finding
    for finding in ("Nodule", "Mass"):
        for image_id, code in zip(rows.frame["image_id"], column(rows, finding), strict=True):
            assert code == -1 if {"Nodule", "Mass"} & set(truth[image_id]) else code in (0, -1)
    votes = [json.loads(cell) for cell in rows.frame["raw_labels"]]
    assert any(len({tuple(said) for said in one.values()}) > 1 for one in votes)  # readers who disagree


def test_a_phantom_becomes_a_store(phantom, tmp_path):
    manifest, _ = build_manifest([SourceSpec("vindr", "vindr", phantom)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert summary.stored == summary.inputs == manifest.frame.height > 0
    assert set(manifest.frame["view"]) == {"PA"}


def test_the_same_pictures_under_two_names_enter_pretraining_once(make):
    root = make().root
    for name in ("one", "two"):
        (root / name).mkdir(exist_ok=True)
    (root / "one/image_labels_train.csv").write_text(text(TRAIN, READINGS))
    (root / "one/image_labels_test.csv").write_text(text(TEST, AGREED))
    (root / "two/train.csv").write_text(CHALLENGE)
    specs = [SourceSpec("vindr", name, root / name) for name in ("one", "two")]
    options = ManifestOptions(val_fraction=0, test_fraction=0, images=dict.fromkeys(("one", "two"), root))
    frame = build_manifest(specs, options)[0].frame
    allowed = {(row["dataset"], row["image_id"]): row["ssl_ok"] for row in frame.iter_rows(named=True)}
    assert allowed[("one", A)]
    assert not allowed[("two", A)]
    assert not allowed[("one", C)]  # of the official test
