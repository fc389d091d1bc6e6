"""`hilum predict`: files, folders, tables, a split of a store; what cannot be read is listed, the rest goes on."""

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from hilum.commands import fit, predict
from hilum.core.errors import ConfigError, EmptyStudyError, MissingColumnError, UnknownNameError
from hilum.data.store import Store, write_arrays
from hilum.deploy.inputs import resolve
from hilum.deploy.predictor import load
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.studies import mean_over_studies
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Mass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    labels = (rng.random((44, 2)) < 0.5).astype(np.int8)
    images = [rng.integers(0, 90, (24, 28), np.uint8) + np.uint8(100 * int(y)) for y in labels[:, 0]]
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=["train"] * 24 + ["val"] * 8 + ["test"] * 12,
        studies=[f"arrays/s{n // 2}" for n in range(44)], patients=[f"arrays/p{n // 4}" for n in range(44)],
    )  # fmt: skip
    config = FitConfig(
        head="linear", resolution=32, blocks=1, learning_rates=(1e-2,), search_epochs=1, refit_epochs=1,
        batch_size=16, threads=1, workers=1,
    )  # fmt: skip
    fit.run(config, path / "store", "random:demo16", path / "model", device="cpu")
    return path


def write_dicom(path: Path, pixels: np.ndarray, study: str, patient: str = "P1", view: str = "PA") -> str:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.PatientID, dataset.ViewPosition = study, patient, view
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return str(dataset.SOPInstanceUID)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 36), np.uint8)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two views of one DICOM study, one of another, a PNG, a JPEG, and three files that cannot be used."""
    path = tmp_path_factory.mktemp("films")
    (path / "deep").mkdir()
    write_dicom(path / "a.dcm", noise(1), "1.2.3")
    write_dicom(path / "deep" / "1.2.840.99", noise(2), "1.2.3", view="LL")
    write_dicom(path / "c", noise(3), "1.2.4", patient="")
    cv2.imwrite(str(path / "d.png"), noise(4))
    cv2.imwrite(str(path / "e.JPG"), noise(5))
    (path / "zero.png").write_bytes(b"")
    (path / "short.png").write_bytes((path / "d.png").read_bytes()[:200])
    (path / "lying.dcm").write_text("not an image")
    (path / "notes.txt").write_text("left alone")
    (path / ".hidden.png").write_bytes((path / "d.png").read_bytes())
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_split_of_a_store(folder: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"test{suffix}"
    predict.run(folder / "model", [f"{folder / 'store'}:test"], out, device="cpu")
    predictions, store = read_predictions(out), Store.open(folder / "store")
    expected = load(folder / "model", "cpu").predict_store(store, range(32, 44))
    assert predictions.image_uid.tolist() == store.uids[32:].tolist()
    assert np.array_equal(predictions.probabilities, expected.probabilities)
    assert (predictions.stage, predictions.unit) == ("calibrated", "image")
    assert predictions.metadata["model"] == load(folder / "model", "cpu").digest
    assert predictions.metadata["exposed_images"] == 0
    assert predictions.metadata["head_splits"] == ["train", "val"]
    assert predictions.metadata["groups"] == {"Edema": "head", "Mass": "head"}
    assert predictions.metadata["split"] == "test"


def test_raw_predictions_are_for_combine(folder: Path, tmp_path: Path, capsys) -> None:
    predict.run(folder / "model", [f"{folder / 'store'}:train"], tmp_path / "train.parquet", raw=True, device="cpu")
    predictions = read_predictions(tmp_path / "train.parquet")
    assert predictions.stage == "raw"
    assert "calibration" not in predictions.metadata
    assert predictions.metadata["exposed_images"] == 24
    assert predictions.metadata["split"] == "train"
    printed = capsys.readouterr()
    assert "Next: hilum combine" in printed.out
    assert "met 24 of 24 images" in printed.err


def test_one_row_per_study(folder: Path, tmp_path: Path) -> None:
    target = [f"{folder / 'store'}:test"]
    predict.run(folder / "model", target, tmp_path / "study.csv", study="mean", device="cpu")
    predict.run(folder / "model", target, tmp_path / "raw.csv", raw=True, device="cpu")
    studies = read_predictions(tmp_path / "study.csv")
    raw = mean_over_studies(read_predictions(tmp_path / "raw.csv"), unit="study")
    calibrator = load(folder / "model", "cpu").calibrators["study"]
    np.testing.assert_allclose(studies.probabilities, calibrator.apply(raw.probabilities), atol=1e-12)
    assert (len(studies), studies.unit, studies.stage) == (6, "study", "calibrated")


def test_shards_divide_the_work_and_never_a_study(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    uids: list[str] = []
    for number in (0, 1, 2):
        out = tmp_path / f"{number}.csv"
        predict.run(folder / "model", [f"{folder / 'store'}:train"], out, device="cpu", shard=f"{number}/3")
        part = read_predictions(out)
        uids += part.image_uid.tolist()
        for study in set(part.study_id.tolist()):
            assert study not in seen
            seen[study] = out.name
    assert sorted(uids) == sorted(Store.open(folder / "store").uids[:24].tolist())


def test_a_folder_of_films(folder: Path, films: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "films.csv"
    predict.run(folder / "model", [str(films)], out, device="cpu", batch_size=2)
    predictions = read_predictions(out)
    assert len(predictions) == 5
    assert "d.png" in predictions.image_id
    assert "e.JPG" in predictions.image_id
    rows = {study: (predictions.study_id == study).sum() for study in predictions.study_id.tolist()}
    assert rows["1.2.3"] == 2
    assert rows["1.2.4"] == rows["d.png"] == 1
    assert set(predictions.view[predictions.study_id == "1.2.3"]) == {"PA", "LL"}
    sources = dict(zip(predictions.image_id.tolist(), predictions.view_source.tolist(), strict=True))
    assert sources["d.png"] == "unknown"
    assert set(predictions.view_source[predictions.study_id == "1.2.3"]) == {"header"}
    assert predictions.patient_id[predictions.study_id == "1.2.3"].tolist() == ["P1", "P1"]
    assert "exposed_images" not in predictions.metadata
    with (tmp_path / "films.csv.quarantine.csv").open() as file:
        refused = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert refused == {"zero.png": "zero_bytes", "short.png": "truncated", "lying.dcm": "not_an_image"}
    printed = capsys.readouterr()
    assert "3 inputs were left out" in printed.err
    assert "P1" not in printed.out + printed.err
    row = predictions.image_id.tolist().index("d.png")
    expected = load(folder / "model", "cpu").predict([films / "d.png"]).image_probabilities[0]
    assert predictions.probabilities[row].tolist() == pytest.approx(list(expected.values()), abs=1e-6)


def test_views_of_a_table_that_nobody_knows_are_told_of(films: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"path,view\n{films / 'd.png'},pa\n{films / 'e.JPG'},Frontal\n{films / 'a.dcm'},\n")
    found = resolve([str(table)])
    assert [one.view for one in found.images] == ["PA", "UNKNOWN", "PA"]
    assert "1 names of views are not known" in capsys.readouterr().err


def test_a_table_of_paths_says_what_belongs_together(folder: Path, films: Path, tmp_path: Path) -> None:
    table = films / "table.csv"
    table.write_text(
        "path,study_id,patient_id,view\nd.png,S1,A,PA\ne.JPG,S1,A,lateral\na.dcm,S2,,\ngone.png,S3,,\n",
        encoding="utf-8",
    )
    predict.run(folder / "model", [str(table)], tmp_path / "out.csv", study="mean", device="cpu")
    studies = read_predictions(tmp_path / "out.csv")
    assert sorted(studies.study_id.tolist()) == ["S1", "S2"]
    expected = load(folder / "model", "cpu").predict([films / "d.png", films / "e.JPG"])
    row = studies.study_id.tolist().index("S1")
    assert studies.probabilities[row].tolist() == pytest.approx(list(expected.probabilities.values()), abs=1e-6)
    assert studies.view[row] == "LATERAL+PA"
    assert studies.patient_id[studies.study_id.tolist().index("S2")] == "P1"
    assert "missing" in (tmp_path / "out.csv.quarantine.csv").read_text()
    table.write_text("file\nd.png\n")
    with pytest.raises(MissingColumnError, match="expected a column 'path'; found file"):
        predict.run(folder / "model", [str(table)], tmp_path / "other.csv")
    table.write_text("path,StudyID\nd.png,S1\n")
    with pytest.raises(MissingColumnError, match="expected the column 'study_id', found 'StudyID'"):
        predict.run(folder / "model", [str(table)], tmp_path / "other.csv")
    assert resolve([str(table)], "StudyID").images[0].study == "S1"
    table.write_text("path, study_id\nd.png,S1\n")
    assert resolve([str(table)]).images[0].study == "S1"
    for name in ("table.csv", "table.csv.quarantine.csv"):  # the result itself, and what is listed beside it
        table = table.rename(films / name)
        with pytest.raises(ConfigError, match="is an input and would be written over"):
            predict.run(folder / "model", [str(table)], films / "table.csv")
        assert table.read_text().startswith("path, study_id")
    table.unlink()


def test_nothing_readable_is_an_error_that_is_written_down(folder: Path, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("predictions of other images, by the same name")
    with pytest.raises(EmptyStudyError, match="None of 2 inputs could be read"):
        predict.run(folder / "model", [str(films / "zero.png"), str(films / "short.png")], out, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv.quarantine.csv"]


def test_inputs_that_mean_nothing_are_refused(folder: Path, films: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    store, model = str(folder / "store"), folder / "model"
    for inputs, message in (
        ([], "Nothing to predict"),
        ([str(tmp_path / "nothing")], "does not exist"),
        ([str(tmp_path / "empty")], "holds no DICOM"),
        ([store], "say which split"),
        ([f"{store}:test", str(films)], "predicted alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict.run(model, inputs, tmp_path / "out.csv")
    with pytest.raises(UnknownNameError, match="Did you mean 'test'"):
        predict.run(model, [f"{store}:tests"], tmp_path / "out.csv")
    with pytest.raises(UnknownNameError, match="max"):
        predict.run(model, [f"{store}:test"], tmp_path / "out.csv", study="max")
    with pytest.raises(ConfigError, match="expected a name that ends in"):
        predict.run(model, [f"{store}:test"], tmp_path / "out.xlsx")
    with pytest.raises(EmptyStudyError, match="--shard 4/500: this job has nothing to do"):
        predict.run(model, [f"{store}:test"], tmp_path / "out.csv", shard="4/500")
    with pytest.raises(ConfigError, match="0 <= i < n"):
        predict.run(model, [f"{store}:test"], tmp_path / "out.csv", shard="2/2")


def test_a_name_that_no_table_can_hold_is_listed(folder: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "film.png"), noise(1))
    try:
        (tmp_path / os.fsdecode(b"r\xe9sum\xe9.png")).write_bytes((tmp_path / "film.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    out = tmp_path / "out.csv"
    predict.run(folder / "model", [str(tmp_path)], out, device="cpu")
    assert read_predictions(out).image_id.tolist() == ["film.png"]
    with (tmp_path / "out.csv.quarantine.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["reason"] == "bad_name"
    assert "r\\xe9sum\\xe9.png" in row["message"]


def test_another_file_under_the_same_id_is_listed(folder: Path, tmp_path: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "film.png"), noise(len(name)))
    out = tmp_path / "out.csv"
    predict.run(folder / "model", [str(tmp_path / "left"), str(tmp_path / "right")], out, device="cpu")
    assert read_predictions(out).image_id.tolist() == ["film.png"]
    with (tmp_path / "out.csv.quarantine.csv").open() as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["repeated_id"]
    predict.run(folder / "model", [str(tmp_path / "left")], out, device="cpu")
    assert not (tmp_path / "out.csv.quarantine.csv").exists()  # that of the earlier prediction
    predict.run(folder / "model", [str(tmp_path)], out, device="cpu")
    assert sorted(read_predictions(out).image_id) == ["left/film.png", "right/film.png"]


def test_the_same_file_twice_is_one_image(folder: Path, films: Path, tmp_path: Path) -> None:
    predict.run(folder / "model", [str(films / "d.png"), str(films / "d.png")], tmp_path / "out.csv", device="cpu")
    assert len(read_predictions(tmp_path / "out.csv")) == 1
