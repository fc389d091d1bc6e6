"""TAIX-Ray: grades of two sides, folds, ages in days, and faults."""

import json

import cv2
import numpy as np
import pytest

from hilum.core.errors import LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.label_maps import LabelPolicy
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.layouts import LAYOUTS
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import taix

# As the dataset's card lists its features, without Fold, Split and Image.
HEADER = (
    "UID,PatientID,PhysicianID,StudyDate,Age,Sex,HeartSize,PulmonaryCongestion,PleuralEffusion_Right,"
    "PleuralEffusion_Left,PulmonaryOpacities_Right,PulmonaryOpacities_Left,Atelectasis_Right,Atelectasis_Left"
)
UIDS = [character * 64 for character in "0123456"]
P, Q = "e" * 64, "f" * 64
ROWS = [
    f"{UIDS[0]},{P},{Q},2013-05-03,20000,M,0,0,0,0,0,0,0,0",
    f"{UIDS[1]},{P},{Q},2013-02-01,20001,M,1,0,0,1,0,0,0,0",
    f"{UIDS[2]},{Q},{P},2013-05-03,36500,F,2,3,0,4,2,0,0,0",
    f"{UIDS[3]},{Q},{P},2013-05-04,365.0,F,3,0,1,2,0,0,1,3",
    f"{UIDS[4]},{Q},{P},2013-05-05,-5,,-1,-2,0,-2,0,0,0,0",
]
SPLIT = "UID,PatientID,Fold,Split\n" + "".join(
    f"{row[:64]},{row[65:129]},{fold},{split}\n"
    for fold in (1, 0)
    for row, split in zip(ROWS, ["train", "train", "test", "test", "test"] if fold == 0 else ["val"] * 5, strict=True)
)


@pytest.fixture
def make(tmp_path):
    def write(rows=ROWS, header=HEADER, split=SPLIT, folder="metadata", name="annotation.csv", images="data", gone=()):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text("\n".join([header, *rows]) + "\n")
        if split:
            (tmp_path / folder / "split.csv").write_text(split)
        for row in ROWS:
            if row[:64] not in gone:
                (tmp_path / images / f"{row[:64]}.png").touch()
        return SourceOptions("taix", tmp_path)

    return write


def column(rows, finding):
    return rows.frame[f"label.{finding}"].to_list()


def test_grades_become_labels(make):
    rows = taix.read(make())
    assert column(rows, "Cardiomegaly") == [0, -2, 1, 1, -1]  # borderline is uncertain; -1 was not assessable
    assert column(rows, "Pleural Effusion") == [0, -2, 1, 1, -1]  # one side is enough, absence takes both
    assert column(rows, "Atelectasis") == [0, 0, 0, 1, 0]
    assert column(rows, "Lung Opacity") == [0, 0, 1, -1, 0]  # atelectasis is a hint of an opacity
    assert column(rows, "Edema") == [-1, -1, -1, -1, -1]  # congestion is a hint, and its absence no proof
    assert column(rows, "Normal") == [-1, -1, 0, 0, -1]  # never 1
    assert json.loads(rows.frame["raw_labels"][2])["PleuralEffusion_Left"] == "4"
    assert set(rows.findings) == {
        "Atelectasis", "Cardiomegaly", "Edema", "Infiltration", "Lung Opacity", "Normal", "Pleural Effusion",
    }  # fmt: skip


def test_policies(make):
    root = make().root
    one = taix.read(SourceOptions("taix", root, policy=LabelPolicy(uncertain="one", blank="zero")))
    assert column(one, "Cardiomegaly") == [0, 1, 1, 1, -1]  # the authors' own yes and no: any grade above 0
    weak = taix.read(SourceOptions("taix", root, policy=LabelPolicy(tier="weak")))
    assert column(weak, "Edema") == [-1, -1, 1, -1, -1]
    assert column(weak, "Infiltration") == [-1, -1, 1, -1, -1]


def test_ids_ages_order_and_split(make):
    rows = taix.read(make())
    frame = rows.frame
    assert frame["patient_id"].to_list() == [P, P, Q, Q, Q]
    assert frame["study_id"].to_list() == UIDS[:5]
    assert frame["split_official"].to_list() == ["train", "train", "test", "test", "test"]  # of fold 0
    assert frame["age_years"].to_list()[:2] == pytest.approx([54.757, 54.76], abs=1e-3)
    assert frame["age_years"][3] == pytest.approx(0.9993, abs=1e-4)
    assert frame["age_years"][4] is None
    assert frame["study_seq"].to_list()[:2] == [20000, 20001]  # by age: the dates, moved at random, say the reverse
    assert frame["sex"].to_list() == ["M", "M", "F", "F", None]
    assert (rows.official, rows.origin, set(rows.tables)) == (True, "taix", {"annotation.csv", "split.csv"})
    manifest, _ = build_manifest([SourceSpec("taix", "taix", rows.root)], ManifestOptions())
    by_id = manifest.frame.sort("image_id")
    assert by_id["view"].to_list() == ["AP"] * 5
    assert by_id["view_source"].to_list() == ["derived"] * 5
    assert by_id["study_order"].to_list()[:2] == [1, 2]
    assert by_id["is_pediatric"].to_list() == [False, False, False, True, None]


@pytest.mark.parametrize(
    ("folder", "name", "images"),
    [("metadata", "annotations.csv", "data_png"), (".", "annotation.csv", "."), ("images", "annotation.csv", "images")],
)
def test_other_places(make, folder, name, images):
    rows = taix.read(make(folder=folder, name=name, images=images))
    prefix = "" if images == "." else f"{images}/"
    assert rows.frame["source_relpath"][0] == f"{prefix}{UIDS[0]}.png"


def test_split_in_the_table_or_nowhere(make):
    assert not taix.read(make(split="")).official
    rows = taix.read(make([f"{row},0,Val" for row in ROWS], HEADER + ",Fold,Split", split=""))
    assert rows.frame["split_official"].to_list() == ["val"] * 5


def test_columns_by_name_in_any_order(make):
    expected = taix.read(make()).frame
    turned = [",".join(reversed(row.split(","))) for row in ROWS]
    assert taix.read(make(turned, ",".join(reversed(HEADER.split(","))))).frame.equals(expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"header": HEADER.replace("HeartSize", "heart_size")}, MissingColumnError, "'HeartSize' .nearest: 'heart_"),
        ({"rows": [*ROWS[:4], ROWS[4].replace(",,-1,", ",,4,")]}, UnknownLabelError, "row 6: .*'HeartSize' holds '4'"),
        ({"rows": [*ROWS[:4], ROWS[4][:-1] + "5"]}, UnknownLabelError, "row 6: column 'Atelectasis_Left' holds '5'"),
        ({"rows": [*ROWS, ROWS[0]]}, ManifestError, "'UID' must be unique"),
        ({"rows": [*ROWS, ROWS[0].replace(UIDS[0], "../x")]}, PathError, "row 7: 'UID' is not letters"),
        ({"rows": [ROWS[0].replace(P, ""), *ROWS[1:]]}, ManifestError, "row 2: 'PatientID' is empty"),
        ({"split": SPLIT + f"{UIDS[0]},{P},0,test\n"}, LeakageError, "1 images are there twice in one fold"),
        ({"split": SPLIT.replace("train", "trian")}, ManifestError, r"split\.csv, row 7: column 'Split' holds 'trian'"),
        ({"gone": (UIDS[1],)}, PathError, r"1 of 5 listed images .*annotation\.csv row 3"),
    ],
)  # fmt: skip
def test_faults_name_their_row(make, change, error, message):
    with pytest.raises(error, match=message) as raised:
        taix.read(make(**change))
    assert P not in str(raised.value)


def test_a_patient_on_both_sides_of_the_split(make):
    options = make(split=SPLIT.replace(f"{UIDS[1]},{P},0,train", f"{UIDS[1]},{P},0,test"))
    with pytest.raises(LeakageError, match="1 patients are on both sides"):
        build_manifest([SourceSpec("taix", "taix", options.root)], ManifestOptions())


def test_missing_files_copies_and_parquet(make, tmp_path):
    make(gone=(UIDS[1],))
    rows = taix.read(SourceOptions("taix", tmp_path, allow_missing=True))
    assert rows.frame["image_id"].to_list() == [UIDS[0], *UIDS[2:5]]
    (tmp_path / "data_512").mkdir()
    (tmp_path / "data_512" / f"{UIDS[0]}.png").touch()
    with pytest.raises(ManifestError, match=r"1 images are there more than once \(in data, data_512\)"):
        taix.read(SourceOptions("taix", tmp_path))
    hub = tmp_path / "hub"
    hub.mkdir()
    with pytest.raises(PathError, match="holds no metadata/annotation"):
        taix.read(SourceOptions("taix", hub))
    (hub / "train-00000-of-00100.parquet").touch()
    with pytest.raises(PathError, match=r"holds Parquet files .*script of the dataset's card"):
        taix.read(SourceOptions("taix", hub))


def test_damaged_files_go_to_quarantine(make, tmp_path):
    make()
    film = (np.random.default_rng(0).random((40, 40)) * 4095).astype(np.uint16)
    whole = cv2.imencode(".png", film)[1].tobytes()
    for uid, content in zip(UIDS[:5], [whole, whole[:-200], b"", whole, b"GIF89a"], strict=True):
        (tmp_path / "data" / f"{uid}.png").write_bytes(content)
    manifest, _ = build_manifest([SourceSpec("taix", "taix", tmp_path)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert (summary.inputs, summary.stored) == (5, 2)
    assert sum(summary.quarantined.values()) == 3
    assert summary.quarantined["zero_bytes"] == summary.quarantined["truncated"] == 1


def test_a_phantom_is_read_as_the_cohort_it_was_made_of(tmp_path):
    out = tmp_path / "out"
    write_phantoms(out, "taix", 20, 4, 64, 2, workers=1)
    assert (out / "metadata/annotation.csv").read_text().split("\n")[0] == HEADER
    rows = taix.read(SourceOptions("taix", out))
    jobs = LAYOUTS["taix"].jobs(plan_cohort(20, 4, 2), 4, 64)
    truth = {image.image_id: job for job in jobs for image in job.images}
    assert list(truth) == rows.frame["image_id"].to_list()
    seen = set()
    for finding in ("Cardiomegaly", "Pleural Effusion", "Lung Opacity", "Atelectasis"):
        for job, code in zip(truth.values(), column(rows, finding), strict=True):
            present = finding in job.study.findings
            assert code == 1 if present else code in ((0, -1, -2) if finding == "Lung Opacity" else (0, -2))
            seen.add(code)
    assert seen == {1, 0, -1, -2}
    assert rows.frame["split_official"].to_list() == [job.patient.split for job in truth.values()]
    manifest, _ = build_manifest([SourceSpec("taix", "taix", out)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, workers=1)
    assert summary.stored == summary.inputs == len(truth)
