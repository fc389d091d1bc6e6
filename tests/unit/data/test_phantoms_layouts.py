"""Phantoms on disk: exact headers, ids and paths of the real sources, masks beside them, same bytes for a seed."""

import csv
import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.label_maps import load_map
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK2, CXRLT_2024_TASK3
from hilum.data.phantoms.writing import mask_name, write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import cxrlt as cxrlt_source

PATIENTS, SEED, SIZE = 20, 3, 64


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def cxrlt(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cxrlt") / "out"
    write_phantoms(out, "cxrlt", PATIENTS, SEED, SIZE, 2, workers=1)
    return out


@pytest.fixture(scope="module")
def nih(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("nih") / "out"
    write_phantoms(out, "nih", PATIENTS, SEED, SIZE, 2, workers=1)
    return out


IDS = ["dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning", "fpath"]


def test_cxrlt_tables_have_the_real_columns(cxrlt):
    folder = cxrlt / "cxr-lt-2024"
    expected = {
        "train_labeled.csv": CXRLT_2024_TASK1,
        "development_labeled_task1.csv": CXRLT_2024_TASK1,
        "development_labeled_task2.csv": CXRLT_2024_TASK2,
        "test_labeled_task1.csv": CXRLT_2024_TASK1,
        "test_labeled_task2.csv": CXRLT_2024_TASK2,
    }
    assert {p.name for p in folder.iterdir()} == set(expected)
    for name, classes in expected.items():
        rows = table(folder / name)
        assert rows[0] == [*IDS, *classes]
        assert all(value in ("0", "1") for row in rows[1:] for value in row[6:])
    task1, task2 = (table(folder / f"test_labeled_task{k}.csv") for k in (1, 2))
    normal = [rows[0].index("Normal") for rows in (task1, task2)]
    assert [row[normal[0]] for row in task1] == [row[normal[1]] for row in task2]


def test_cxrlt_paths_ids_and_images(cxrlt):
    patients = {}
    for split in ("train_labeled", "development_labeled_task1", "test_labeled_task1"):
        rows = table(cxrlt / "cxr-lt-2024" / f"{split}.csv")[1:]
        patients[split] = {row[1] for row in rows}
        for dicom, subject, study, view, _, path, *_ in rows:
            assert path == f"files/p{subject[:2]}/p{subject}/{study}/{dicom}.jpg"
            assert study.startswith("s5")
            assert len(study) == 9
            assert subject.startswith("1")
            assert len(subject) == 8
            assert [len(part) for part in dicom.split("-")] == [8] * 5
            assert view in ("AP", "PA", "LATERAL", "LL", "")
            pixels = cv2.imread(str(cxrlt / path), cv2.IMREAD_UNCHANGED)
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 2
            assert min(pixels.shape) == SIZE
    names = list(patients.values())
    assert len(set.union(*names)) == sum(map(len, names))
    assert sum(map(len, names)) == PATIENTS


def test_mimic_metadata_agrees_with_the_images(cxrlt):
    with gzip.open(cxrlt / "mimic-cxr-2.0.0-metadata.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:7] == [
        "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    ]  # fmt: skip
    assert not rows[0]["study_id"].startswith("s")
    for row in rows:
        path = cxrlt / f"files/p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}/{row['dicom_id']}.jpg"
        assert cv2.imread(str(path), 0).shape == (int(row["Rows"]), int(row["Columns"]))


@pytest.mark.parametrize("layout", ["cxrlt", "nih"])
def test_masks_match_their_index(layout, request):
    out = request.getfixturevalue(layout)
    rows = table(out / "masks.csv")
    assert rows[0] == ["image_id", "finding", "path", "area_fraction"]
    assert {row[2] for row in rows[1:]} == {str(p.relative_to(out)) for p in (out / "masks").rglob("*.png")}
    stems = {p.stem: p for p in [*out.rglob("*.jpg"), *(out / "images").glob("*.png")]}
    for image_id, finding, path, area in rows[1:]:
        mask = cv2.imread(str(out / path), cv2.IMREAD_GRAYSCALE)
        stem = Path(image_id).stem if layout == "nih" else image_id
        assert Path(path) == Path("masks") / stem / mask_name(finding)
        assert mask.shape == cv2.imread(str(stems[stem]), 0).shape
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).mean() == pytest.approx(float(area), abs=1e-6)
        assert float(area) > 0
    assert mask_name("Round(ed) Atelectasis") == "Round_ed__Atelectasis.png"


def test_every_mask_belongs_to_a_positive_label(cxrlt):
    positive = set()
    for name in ("train_labeled", "development_labeled_task1", "test_labeled_task1"):
        header, *rows = table(cxrlt / "cxr-lt-2024" / f"{name}.csv")
        positive |= {(row[0], header[k]) for row in rows for k in range(6, 46) if row[k] == "1"}
    masks = {(row[0], row[1]) for row in table(cxrlt / "masks.csv")[1:]}
    assert masks <= positive
    assert len(masks) > 0.8 * len({pair for pair in positive if pair[1] != "Normal"})


def test_nih_tables(nih):
    text = (nih / "Data_Entry_2017_v2020.csv").read_text().split("\n")
    assert text[0] == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    rows = [line.split(",") for line in text[1:] if line]
    assert all(len(row) == 11 for row in rows)
    tokens = {token for row in rows for token in row[1].split("|")}
    assert tokens <= set(load_map("nih").labels)
    for row in rows:
        assert row[0] == f"{int(row[3]):08d}_{int(row[2]):03d}.png"
        assert row[6] in ("PA", "AP")
        assert "No Finding" not in row[1] or row[1] == "No Finding"
        pixels = cv2.imread(str(nih / "images" / row[0]), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (SIZE, SIZE)
    names = {row[0] for row in rows}
    lists = [set((nih / name).read_text().split()) for name in ("train_val_list.txt", "test_list.txt")]
    assert lists[0] | lists[1] == names
    assert not {n[:8] for n in lists[0]} & {n[:8] for n in lists[1]}
    boxes = (nih / "BBox_List_2017.csv").read_text().split("\n")
    assert boxes[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    for line in boxes[1:-1]:
        name, label, x, y, width, height, *rest = line.split(",")
        assert rest == ["", "", ""]
        assert name in lists[1]
        finding = {"Infiltrate": "Infiltration", "Effusion": "Pleural Effusion"}.get(label, label)
        mask = cv2.imread(str(nih / "masks" / name[:-4] / mask_name(finding)), 0)
        assert cv2.boundingRect(mask) == (float(x), float(y), float(width), float(height))


def test_cxrlt2023_layout(tmp_path):
    out = tmp_path / "out"
    write_phantoms(out, "cxrlt2023", 4, SEED, SIZE, 0, workers=1)
    for name in ("train.csv", "development.csv", "test.csv"):
        assert table(out / "cxr-lt-2023" / name)[0] == [*IDS[:5], "path", *CXRLT_2023]


def test_cxrlt45_layout(tmp_path, cxrlt):
    out = tmp_path / "out"
    write_phantoms(out, "cxrlt45", PATIENTS, SEED, SIZE, 2, workers=1)
    header, *rows = table(out / "cxr-lt-2024" / "labels.csv")
    position = {name: header.index(name) for name in (*CXRLT_2024_TASK1, *CXRLT_2024_TASK3)}
    assert header == [*IDS, *sorted(position), "split"]
    assert header.index("Bulla") == header.index("Azygos Lobe") + 1
    assert header.index("Osteopenia") == header.index("Normal") + 1
    read = cxrlt_source.read(SourceOptions("cxrlt", out))
    assert set(read.findings) == set(position)
    assert read.frame.height == len(rows)
    plain = [row for name in ("train_labeled", "development_labeled_task1", "test_labeled_task1")
             for row in table(cxrlt / "cxr-lt-2024" / f"{name}.csv")[1:]]  # fmt: skip
    before = {row[0]: row[6:] for row in plain}
    assert {row[0]: [row[position[name]] for name in CXRLT_2024_TASK1] for row in rows} == before
    pictures = [content(folder / "files") for folder in (cxrlt, out)]
    same = {Path(name).stem for name, data in pictures[1].items() if pictures[0][name] == data}
    unchanged = {row[0] for row in rows if all(row[position[name]] == "0" for name in CXRLT_2024_TASK3)}
    assert 0 < len(unchanged) < len(rows)
    assert same == unchanged


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path):
    for name, workers, seed in (("one", 1, 5), ("two", 2, 5), ("other", 1, 6)):
        write_phantoms(tmp_path / name, "cxrlt", 4, seed, SIZE, 0, workers=workers)
    one, two, other = (content(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() != other.keys()


def test_images_of_a_patient_do_not_depend_on_how_many_there_are(tmp_path):
    for count in (2, 4):
        write_phantoms(tmp_path / str(count), "nih", count, SEED, SIZE, 0, workers=1)
    few, many = (content(tmp_path / str(count) / "images") for count in (2, 4))
    assert few.items() <= many.items()


def test_summary_counts(cxrlt):
    summary = json.loads((cxrlt / "phantom.json").read_text())
    assert summary["patients"] == PATIENTS
    assert summary["seed"] == SEED
    assert summary["images"] == len(list(cxrlt.rglob("*.jpg")))
    header, *rows = table(cxrlt / "cxr-lt-2024" / "train_labeled.csv")
    for name in ("development_labeled_task1", "test_labeled_task1"):
        rows += table(cxrlt / "cxr-lt-2024" / f"{name}.csv")[1:]
    for finding, counts in summary["findings"].items():
        column = header.index(finding)
        having = [row for row in rows if row[column] == "1"]
        assert counts["images"] == len(having)
        assert counts["studies"] == len({row[2] for row in having})
        assert counts["patients"] == len({row[1] for row in having})
        assert counts["patients"] >= 2 or finding == "Normal"


def test_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        write_phantoms(tmp_path, "nih", 2, 1, SIZE, 0, workers=1)
    assert content(tmp_path) == {"thesis.txt": b"precious"}


def test_own_folder_is_replaced_and_other_files_are_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_phantoms(out, "nih", 2, 1, SIZE, 0, workers=1)
    (out / "manifest.parquet").write_bytes(b"mine")
    write_phantoms(out, "cxrlt", 2, 1, SIZE, 0, workers=1)
    assert (out / "manifest.parquet").read_bytes() == b"mine"
    assert not (out / "images").exists() or not list((out / "images").iterdir())
    assert (out / "cxr-lt-2024" / "train_labeled.csv").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_what_the_earlier_runs_layout_left_is_removed(tmp_path):
    out = tmp_path / "out"
    write_phantoms(out, "nih", 2, 1, SIZE, 0, workers=1)
    (out / "files").mkdir()  # CXR-LT's phantoms have a folder of this name; this one is somebody's
    (out / "files" / "thesis.txt").write_text("precious")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "mine.png").write_text("precious")
    for path in sorted((out / "masks").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (out / "masks").rmdir()
    (out / "masks").symlink_to(tmp_path / "masks")
    before = content(out)
    with pytest.raises(ConfigError, match=r"files .*not of the earlier run"):
        write_phantoms(out, "cxrlt", 2, 1, SIZE, 0, workers=1)
    assert content(out) == before
    write_phantoms(out, "nih", 2, 2, SIZE, 0, workers=1)
    assert (out / "files" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / "masks" / "mine.png").read_text() == "precious"
    assert not (out / "masks").is_symlink()


@pytest.mark.parametrize(
    ("change", "error"),
    [({"layout": "mimci"}, UnknownNameError), ({"patients": 0}, ConfigError), ({"size": 8}, ConfigError)],
)
def test_bad_arguments(tmp_path, change, error):
    arguments = {"layout": "nih", "patients": 2, "seed": 1, "size": SIZE, "minimum_patients": 0, "workers": 1}
    with pytest.raises(error):
        write_phantoms(tmp_path / "out", **{**arguments, **change})
    assert not (tmp_path / "out").exists()
