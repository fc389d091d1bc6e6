"""hilum recalibrate as a hospital uses it: files and a table of labels in; a model of its own and a report out."""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from fit_stores import SMALL, make_store
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import hilum
from hilum import cli
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.commands.recalibrate_inputs import read_site
from hilum.core.config import override
from hilum.core.seeding import forked
from hilum.data.store import Store
from hilum.deploy.engines import EXPORT_FORMAT, EXPORT_NAME
from hilum.deploy.ensemble_model import combine_models
from hilum.deploy.inputs import resolve
from hilum.deploy.study_page import study_page
from hilum.deploy.study_report import ImageFacts, study_document
from hilum.deploy.validation import read_bands
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.truth import read_truth

STUDIES = 90


def run(*words: object) -> int:
    before, sys.argv = sys.argv, ["hilum", *map(str, words)]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def write_dicom(path: Path, pixels: np.ndarray, study: str, patient: str) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.PatientID, dataset.ViewPosition = study, patient, "PA"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def state_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fit_model(path: Path, name: str, resolution: int) -> None:
    config = override(SMALL, [f"resolution={resolution}", "search_epochs=6", "refit_epochs=6"])
    fit.run(config, path / "store", path / "run", path / name, device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows bright images (Edema), and a site: darker images, other prevalence.

    Hernia's labels are drawn at random; Mass has 4 positives; "Never" was never trained; ten studies have no label.
    """
    path = tmp_path_factory.mktemp("site")
    make_store(path / "store")
    with forked(0, "site"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    fit_model(path, "model", 16)
    rng = np.random.default_rng(7)
    (path / "images").mkdir()
    with (path / "labels.csv").open("w", newline="") as file, (path / "images.csv").open("w", newline="") as listed:
        labels, images = csv.writer(file), csv.writer(listed)
        labels.writerow(["study_id", "patient_id", "Edema", "Hernia", "Mass", "Something else"])
        images.writerow(["path", "study_id"])
        for number in range(STUDIES + 10):
            edema = int(rng.random() < 0.35)
            cells = ["" if number % 9 == 0 else edema, int(rng.random() < 0.4), int(number < 4), 0]
            if number < STUDIES:
                labels.writerow([f"study{number}", f"patient{number // 2}", *cells])
            for view in range(1 + (number % 5 == 0)):
                noise = rng.normal(0, 25, (24, 28))
                pixels = np.clip(40 + 60 * edema + noise + rng.normal(0, 12), 0, 255).astype(np.uint8)
                cv2.imwrite(str(path / "images" / f"{number}_{view}.png"), pixels)
                images.writerow([f"images/{number}_{view}.png", f"study{number}"])
    return path


def recalibrate(world: Path, out: Path, *words: object, model: str = "model", inputs: str = "images.csv") -> int:
    return run(
        "recalibrate", world / model, world / inputs, "--labels", world / "labels.csv", "--out", out,
        "--bootstraps", 200, "--device", "cpu", *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(world: Path) -> Path:
    assert recalibrate(world, world / "here", "--sensitivity", 0.9, "--finding", "Edema", "--keep-cases") == 0
    return world / "here"


def test_the_operating_point_that_a_site_asks_for_comes_first(site: Path, world: Path) -> None:
    model, old = hilum.load(site, device="cpu"), hilum.load(world / "model", device="cpu")
    assert model.operating_points == ("spec_at_sens90", *old.operating_points)
    result = model.predict(cv2.imread(str(world / "images" / "3_0.png"), 0), attention=False)
    facts = [ImageFacts(rows=10, columns=10)]
    page = study_page(study_document(result, model, study_id="s", images=facts), [np.zeros((10, 10), np.uint8)])
    assert "The tick is its operating point: sensitivity 0.9 on the patients" in page


def numbers(site: Path) -> dict:
    return json.loads((site / "site_report.json").read_text())


def test_the_new_model_is_whole_and_the_old_one_untouched(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(world / "model")
    assert recalibrate(world, tmp_path / "here") == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "left out: 10 unlabelled images" in printed or "left out: 12 unlabelled images" in printed
    assert "fit for this site: no" in printed
    assert state_of(world / "model") == before
    shutil.move(tmp_path / "here", tmp_path / "moved")
    content = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert content["recalibrated"]["overall"]["verdict"] == "no"
    assert content["fitted_on"]["studies"] == STUDIES
    model, old = hilum.load(tmp_path / "moved", device="cpu"), hilum.load(world / "model", device="cpu")
    assert old.operating_points[0] == "f1"
    assert model.operating_points == old.operating_points
    image = cv2.imread(str(world / "images" / "3_0.png"), 0)
    new, was = model.predict(image, attention=False), old.predict(image, attention=False)
    raw = model.predict(image, raw=True, attention=False)
    assert raw.probabilities == old.predict(image, raw=True, attention=False).probabilities
    assert new.probabilities["Edema"] != was.probabilities["Edema"]
    assert new.probabilities["Mass"] == was.probabilities["Mass"]  # four positives: kept
    assert new.probabilities["Never"] is None
    assert new.flags["Mass"]
    assert "\n# Recalibrated for a site\n" in (tmp_path / "moved" / "README.md").read_text()
    assert (tmp_path / "moved" / "checklist.md").read_text().startswith("Recalibrated for a site")


def test_the_report_says_what_was_planted(site: Path) -> None:
    result = numbers(site)
    findings = result["findings"]
    assert findings["Edema"]["verdict"] == "yes"
    assert findings["Hernia"]["verdict"] == "no"
    assert findings["Mass"]["verdict"] == "not shown"
    assert result["overall"]["verdict"] == "yes"  # asked about Edema alone
    assert result["studies"] == STUDIES
    assert result["patients"] == STUDIES // 2  # whose they are is told by the labels alone
    assert result["exposed_images"] is None
    edema = findings["Edema"]
    assert edema["unknown"] == STUDIES // 9
    assert edema["card"]["AUC"]["value"] > 0.9
    assert edema["drift"]["PSI"] > 0.25
    assert edema["calibration"]["Brier"]["difference"] < 0
    assert abs(edema["calibration"]["mean_after"] - edema["prevalence"]) < 0.03
    assert list(edema["points"]) == ["spec_at_sens90"]
    assert edema["points"]["spec_at_sens90"]["sensitivity"]["value"] > 0.8
    page = (site / "site_report.html").read_text()
    assert '<b class="is-yes">Yes</b>' in page
    assert "patient1" not in page + (site / "site_report.json").read_text()


def test_nothing_is_judged_on_what_it_was_fitted_on(
    site: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for unit in ((), ("--study", "own")):
        assert run("predict", site, world / "images.csv", "--device", "cpu", "--out", tmp_path / "p.csv", *unit) == 0
        capsys.readouterr()
        labels = tmp_path / "labels.csv"  # of those findings that were predicted, and of the images that have labels
        assert run("evaluate", tmp_path / "p.csv", "--labels", _complete(world, labels), "--out", tmp_path / "e") == 1
        assert "nothing is judged on what it was fitted on" in "".join(capsys.readouterr())
    table = read_predictions(tmp_path / "p.csv")
    assert table.stage == "calibrated"
    assert "spec_at_sens90" in table.metadata["thresholds"]["Edema"]


def test_dicom_files_whose_labels_know_patients_by_another_id(world: Path, tmp_path: Path) -> None:
    """Two images of one study, two studies of one person; the hospital's table names people by numbers of its own."""
    (tmp_path / "dicom").mkdir()
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["study_id", "patient_id", "Edema"])
        for number in range(12):
            writer.writerow([f"1.2.{number}", f"person {number // 2}", number % 2])
            for view in range(2):
                pixels = cv2.imread(str(world / "images" / f"{number}_0.png"), cv2.IMREAD_GRAYSCALE)
                write_dicom(tmp_path / "dicom" / f"{number}_{view}.dcm", pixels, f"1.2.{number}", f"MRN{number}")
    words = ("recalibrate", world / "model", tmp_path / "dicom", "--labels", tmp_path / "labels.csv", "--device", "cpu")
    assert run(*words, "--bootstraps", 20, "--out", tmp_path / "here") == 0
    result = numbers(tmp_path / "here")
    assert (result["images"], result["studies"], result["patients"]) == (24, 12, 6)
    assert not any("MRN" in path.read_text(errors="ignore") for path in (tmp_path / "here").glob("*.*"))


def _complete(world: Path, out: Path) -> Path:
    """Labels of every predicted study, without the column that the model does not know."""
    with (world / "labels.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "Something else"} for row in csv.DictReader(file)]
    rows = [{**row, "patient_id": ""} for row in rows]
    rows += [{"study_id": f"study{number}", "Edema": "0"} for number in range(STUDIES, STUDIES + 10)]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return out


def test_what_scores_mean_here_is_kept_where_asked(site: Path, world: Path, tmp_path: Path) -> None:
    """Intervals beside a prediction come from the site's own studies, or there are none."""
    assert recalibrate(world, tmp_path / "without") == 0
    for folder, expected in ((site, {"Edema", "Hernia", "Mass"}), (tmp_path / "without", set())):
        model = hilum.load(folder, device="cpu")
        content = json.loads((folder / "config.json").read_text())
        bands = read_bands(folder, content, model.composition, model.calibrators["study"])
        assert set(bands.findings) == expected


def test_a_second_time_is_a_fit_on_the_same_items(
    site: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recalibrate(world, tmp_path / "again", model="here") == 1
    assert "calibrator was fitted on" in "".join(capsys.readouterr())
    assert recalibrate(world, tmp_path / "again", "--accept-exposed", model="here") == 0
    assert "yes" not in {row["verdict"] for row in numbers(tmp_path / "again")["findings"].values()}
    chain = hilum.load(tmp_path / "again", device="cpu").calibrators["study"].maps["Edema"]
    assert chain["after"]["after"]


def test_images_that_it_has_met_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--labels", world / "store", "--device", "cpu", "--bootstraps", 50, "--out", tmp_path / "here")
    for split, said in (
        ("val", "calibrator was fitted on 16 of the 16"),
        ("train", "has met 40 of these images"),
        ("test", "nothing is fitted on the test split"),
    ):
        assert run("recalibrate", world / "model", f"{world / 'store'}:{split}", *words) == 1
        assert said in "".join(capsys.readouterr())
    assert run("recalibrate", world / "model", f"{world / 'store'}:val", *words, "--accept-exposed") == 0
    assert numbers(tmp_path / "here")["exposed_images"] == 16


@pytest.mark.slow
def test_an_ensemble_takes_its_members_along(world: Path, tmp_path: Path) -> None:
    fit_model(world, "second", 24)
    combine_models([world / "model", world / "second"], world / "ensemble")
    content = json.loads((world / "ensemble" / "config.json").read_text())
    assert [one["path"] for one in content["members"]] == ["../model", "../second"]
    assert recalibrate(world, tmp_path / "here", "--keep-cases", model="ensemble") == 0
    moved = shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    model = hilum.load(moved, device="cpu")
    assert len(model.networks) == 2
    assert (Path(moved) / "members" / "01" / "model.safetensors").is_file()
    assert numbers(Path(moved))["findings"]["Hernia"]["verdict"] != "yes"
    kept = read_predictions(Path(moved) / "members" / "00" / "validation_logits.parquet")
    assert len(kept) == numbers(Path(moved))["images"]
    old = read_predictions(world / "model" / "validation_logits.parquet")
    assert len(old) == 16


def test_labels_by_image_give_the_same_as_labels_by_study(site: Path, world: Path, tmp_path: Path) -> None:
    with (world / "labels.csv").open() as file:
        by_study = list(csv.DictReader(file))
    images: dict[str, list[str]] = {}
    with (world / "images.csv").open() as file:
        for row in csv.DictReader(file):
            images.setdefault(row["study_id"], []).append(row["path"])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image_id", *by_study[0]])
        writer.writeheader()
        for row in by_study:
            writer.writerows([{**row, "image_id": image} for image in images[row["study_id"]]])
    words = ("--labels", tmp_path / "labels.csv", "--sensitivity", 0.9, "--finding", "Edema")
    assert recalibrate(world, tmp_path / "here", *words) == 0
    mine, theirs = numbers(tmp_path / "here"), numbers(site)
    assert mine["findings"]["Edema"] == theirs["findings"]["Edema"]


def test_a_study_is_predicted_whole_where_only_some_of_its_images_are_labelled(world: Path, tmp_path: Path) -> None:
    with (world / "labels.csv").open() as file:
        rows = [{**row, "image_id": f"images/{row['study_id'][5:]}_0.png"} for row in csv.DictReader(file)]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image_id", "patient_id", "Edema", "Hernia", "Mass"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    model, found = hilum.load(world / "model", device="cpu"), [str(world / "images.csv")]
    whole, part = (
        read_site(model, resolve(found), read_truth(folder / "labels.csv"), 32) for folder in (world, tmp_path)
    )
    for unit in ("image", "study"):
        np.testing.assert_array_equal(part.tables[unit].probabilities, whole.tables[unit].probabilities)
        assert part.tables[unit].patient_id.tolist() == whole.tables[unit].patient_id.tolist()
    np.testing.assert_array_equal(part.labels["study"], whole.labels["study"])
    first = np.char.endswith(part.tables["image"].image_id, "_0.png")
    assert 0 < (~first).sum() < first.sum()
    assert (part.labels["image"][~first] == -1).all()
    np.testing.assert_array_equal(part.labels["image"][first], whole.labels["image"][first])
    assert part.left_out == whole.left_out


def test_an_export_is_refused_before_anything_is_read(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "model", tmp_path / "export")
    (tmp_path / "export" / EXPORT_NAME).write_text(json.dumps({"format": EXPORT_FORMAT, "networks": []}))
    assert recalibrate(world, tmp_path / "here", model=str(tmp_path / "export")) == 1
    said = " ".join("".join(capsys.readouterr()).split())
    assert "is an EXPORT: recalibrate the MODEL that it was made from" in said
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sensitivity", 1.5), "is between 0 and 1"),
        (("--point", "f2"), "Unknown operating point 'f2'"),
        (("--finding", "Oedema"), "Did you mean 'Edema'"),
        (("--minimum-auc", 0.3), "expected 0.5 or more"),
        (("--width", 2), "expected a width between 0 and 1"),
        (("--bootstraps", -5), "expected 0 or more"),
        (("--batch-size", 0), "at least 1; found 200 and 0"),
    ],
)
def test_options_that_mean_nothing(
    world: Path, tmp_path: Path, words: tuple, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recalibrate(world, tmp_path / "here", *words) == 1
    assert said in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "here").exists()


def test_labels_that_fit_nothing(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.csv").write_text("study_id,Edema\nelsewhere,1\n")
    assert recalibrate(world, tmp_path / "here", "--labels", tmp_path / "labels.csv") == 1
    assert "None of 120 images has a row in" in "".join(capsys.readouterr())
    (tmp_path / "labels.csv").write_text("study_id,Odema\nstudy1,1\n")
    assert recalibrate(world, tmp_path / "here", "--labels", tmp_path / "labels.csv") == 1
    assert "none of its columns is a finding of this model: 'Odema' (nearest: 'Edema')" in "".join(capsys.readouterr())


def test_a_model_that_was_never_calibrated(world: Path, tmp_path: Path) -> None:
    """As imported weights are: values rank images; afterwards they are probabilities, with cuts."""
    bare = shutil.copytree(world / "model", tmp_path / "bare")
    content = json.loads((bare / "config.json").read_text())
    content["uncalibrated"] = "imported: no calibrator came with the weights"
    for unit in content["calibration"].values():
        unit["fitted_on"], unit["thresholds"], unit["raw_thresholds"] = None, {}, {}
    (bare / "config.json").write_text(json.dumps(content))
    image = world / "images" / "3_0.png"
    assert hilum.load(bare, device="cpu").predict(image, attention=False).thresholds["Edema"] is None
    words = ("recalibrate", bare, world / "images.csv", "--labels", world / "labels.csv", "--bootstraps", 50)
    assert run(*words, "--device", "cpu", "--out", tmp_path / "here") == 0
    model = hilum.load(tmp_path / "here", device="cpu")
    result = model.predict(image, attention=False)
    assert result.calibrated
    assert result.thresholds["Edema"]
    assert "uncalibrated" not in json.loads((tmp_path / "here" / "config.json").read_text())
    assert numbers(tmp_path / "here")["was_calibrated"] is False
    assert Store.open(world / "store").preprocess_id == model.preprocess_id
