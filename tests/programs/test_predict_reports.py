"""`hilum predict --reports`: from files to reports of studies, read back by independent readers."""

import csv
import dataclasses
import json
from pathlib import Path

import cv2
import jsonschema
import numpy as np
import pydicom
import pytest
from fhir.resources.bundle import Bundle
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from fit_stores import DECODER, make_store
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit, predict
from hilum.commands.predict_report_options import ReportOptions, parse_options
from hilum.commands.predict_reports import write_reports
from hilum.core.config import override
from hilum.core.errors import ConfigError, MissingColumnError, UnknownNameError
from hilum.core.seeding import forked
from hilum.deploy.inputs import Inputs, resolve
from hilum.deploy.predictor import Model, load
from hilum.deploy.study_report import ImageFacts, study_schema
from hilum.evaluation.predictions import read_predictions

CANARY = "Canary"


def write_dicom(path: Path, seed: int, study: str, patient: str, view: str = "PA", **elements: str) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 36), np.uint8)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.{seed}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = study, f"{study}.1", patient
    dataset.PatientName, dataset.AccessionNumber, dataset.ViewPosition = f"{CANARY}^Jane", f"{CANARY}1", view
    dataset.Modality, dataset.PatientOrientation = "DX", ["L", "F"]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    path = tmp_path_factory.mktemp("reports-model")
    make_store(path / "store")
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    settings = override(DECODER, ["learning_rates=[0.01]", "search_epochs=1", "refit_epochs=1", "resolution=16"])
    fit.run(settings, path / "store", path / "run", path / "model", device="cpu")
    loaded = load(path / "model", "cpu")
    loaded.screening = None  # the pictures are noise
    return loaded


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two views of a DICOM study, one of another, one PNG, and one file that is damaged."""
    path = tmp_path_factory.mktemp("films")
    write_dicom(path / f"{CANARY}.dcm", 1, "1.2.3", "P1")
    write_dicom(path / "b.dcm", 2, "1.2.3", "P1", view="LL")
    write_dicom(path / "c.dcm", 3, "1.2.4", "P2")
    cv2.imwrite(str(path / "d.png"), np.random.default_rng(4).integers(0, 255, (30, 44), np.uint8))
    (path / f"z{CANARY}.png").write_bytes((path / "d.png").read_bytes()[:200])
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def everything(found: Inputs) -> np.ndarray:
    return np.arange(len(found.indices) if found.store else len(found.images))


@pytest.fixture(scope="module")
def written(model: Model, films: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "reports"
    (out.parent / "references.csv").write_text("study_id,patient,imaging_study\n1.2.3,Patient/7,urn:oid:1.2.3\n")
    found = resolve([str(films)])
    options = parse_options(out, "json,html,fhir,fhir-r4b,sr,sc", "all", out.parent / "references.csv")
    assert write_reports(model, found, everything(found), options) == 3
    return out


def test_every_study_has_a_folder_under_a_name_of_ours(written: Path) -> None:
    rows = rows_of(written / "studies.csv")
    assert [(row["folder"], row["study_id"], row["images"]) for row in rows[:2]] == [
        ("study_0001", "1.2.3", "2"), ("study_0002", "1.2.4", "1"),
    ]  # fmt: skip
    names = {path.name for path in (written / "study_0001").iterdir()}
    assert {"study.json", "study.html", "study.fhir.json", "study.fhir-r4b.json", "study.sr.dcm"} < names
    assert {"capture_edema_1.dcm", "capture_edema_2.dcm", "capture_mass_1.dcm"} < names
    assert not [name for name in names if name.startswith("capture_never")]  # never trained
    assert {path.name for path in (written / "study_0003").iterdir()} == {
        "study.json", "study.html", "study.fhir.json", "study.fhir-r4b.json",
    }  # fmt: skip


def test_what_could_not_be_made_is_listed_with_its_reason(written: Path) -> None:
    rows = [(r["folder"], r["what"].split()[0], r["reason"]) for r in rows_of(written / "not_written.csv")]
    assert rows == [("study_0003", "sc", "not_dicom"), ("study_0003", "sr", "not_dicom"),
                    ("study_0004", "image", "truncated")]  # fmt: skip


def test_the_documents_are_of_the_schema_and_say_what_the_model_says(model: Model, films: Path, written: Path) -> None:
    for number, files in ((1, ["b.dcm", f"{CANARY}.dcm"]), (2, ["c.dcm"]), (3, ["d.png"])):
        document = json.loads((written / f"study_000{number}" / "study.json").read_text())
        jsonschema.validate(document, study_schema())
        result = model.predict([films / name for name in files])
        listed = {one["name"]: one["probability"] for one in document["findings"]}
        assert listed == pytest.approx(result.probabilities, abs=1e-12)
        assert listed["Never"] is None
        assert [one["view_source"] for one in document["study"]["images"]] == [
            "header" if number < 3 else "unknown"
        ] * len(files)
        assert {(one["rows"], one["columns"]) for one in document["study"]["images"]} == {
            (30, 44) if number == 3 else (40, 36)
        }


def test_independent_readers_read_them(written: Path) -> None:
    hd = pytest.importorskip("highdicom")
    bundle = Bundle.model_validate_json((written / "study_0001" / "study.fhir.json").read_text())
    BundleR4B.model_validate_json((written / "study_0001" / "study.fhir-r4b.json").read_text())
    report = bundle.entry[0].resource
    assert report.subject.reference == "Patient/7"
    assert report.study[0].identifier.value == "urn:oid:1.2.3"
    assert (
        Bundle.model_validate_json((written / "study_0002" / "study.fhir.json").read_text()).entry[0].resource.subject
        is None
    )
    dataset = pydicom.dcmread(written / "study_0001" / "study.sr.dcm")
    assert (dataset.StudyInstanceUID, dataset.PatientID) == ("1.2.3", "P1")
    groups = hd.sr.ComprehensiveSR.from_dataset(dataset).content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["Edema", "Hernia", "Mass"]
    capture = pydicom.dcmread(written / "study_0001" / "capture_edema_2.dcm")
    assert capture.pixel_array.shape[1:] == (36, 3)
    assert capture.BurnedInAnnotation == "YES"


def test_only_dicom_holds_what_identifies_a_patient(written: Path) -> None:
    for path in written.rglob("*"):  # the list of studies says which is which, as the prediction table does
        if path.is_file() and path.suffix != ".dcm" and path.name != "studies.csv":
            assert CANARY not in path.read_text(encoding="utf-8"), path
    assert CANARY in str(pydicom.dcmread(written / "study_0001" / "study.sr.dcm").PatientName)


def test_what_is_finished_is_left_and_what_is_not_goes_on(
    model: Model, films: Path, tmp_path: Path, monkeypatch
) -> None:
    found, out = resolve([str(films)]), tmp_path / "out"
    write_reports(model, found, np.array([0, 1]), ReportOptions(out))  # one job of an array job
    assert (out / "study_0001" / "study.json").exists()
    assert not (out / "study_0002").exists()
    before = (out / "study_0001" / "study.json").stat().st_mtime_ns
    write_reports(model, found, everything(found), ReportOptions(out))
    assert (out / "study_0001" / "study.json").stat().st_mtime_ns == before
    assert (out / "study_0002" / "study.json").exists()
    write_reports(model, found, everything(found), ReportOptions(out, ("html",)))
    assert (out / "study_0001" / "study.html").exists()
    with pytest.raises(ConfigError, match="lists other studies"):
        write_reports(model, resolve([str(films / "d.png")]), np.array([0]), ReportOptions(out))
    with pytest.raises(ConfigError, match="another model, or with and without --raw"):
        write_reports(model, found, everything(found), ReportOptions(out), raw=True)


def test_the_command_writes_reports_beside_its_table(model: Model, films: Path, tmp_path: Path) -> None:
    asked = parse_options(tmp_path / "reports", "html")
    table = tmp_path / "table.json"
    predict.run(model.folder, [str(films)], table, study="own", device="cpu", score_flagged=True, reports=asked)
    rows = read_predictions(table)
    folder_of = {row["study_id"]: row["folder"] for row in rows_of(tmp_path / "reports" / "studies.csv")}
    assert len(rows) == 3
    for row in range(3):
        document = json.loads((tmp_path / "reports" / folder_of[rows.study_id[row]] / "study.json").read_text())
        listed = [one["probability"] for one in document["findings"]]
        expected = [None if np.isnan(value) else value for value in rows.probabilities[row]]
        assert listed == pytest.approx(expected, abs=1e-6)  # one image at a time, not in a batch


def test_reports_by_another_study_rule_than_the_operating_points_are_refused(
    model: Model, films: Path, tmp_path: Path
) -> None:
    asked = parse_options(tmp_path / "reports", "html")
    with pytest.raises(ConfigError, match=r"--reports: the operating points of this model hold for 'mean'"):
        predict.run(
            model.folder, [str(films)], tmp_path / "t.json", raw=True, study="frontal_weighted", device="cpu",
            reports=asked,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_store_gives_documents_and_pages_and_no_dicom(model: Model, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    found = resolve([f"{store.path}:test"])
    assert write_reports(model, found, everything(found), ReportOptions(tmp_path / "out", ("html",))) == 4
    document = json.loads((tmp_path / "out" / "study_0001" / "study.json").read_text())
    jsonschema.validate(document, study_schema())
    with pytest.raises(ConfigError, match="keeps pictures and no DICOM headers"):
        write_reports(model, found, everything(found), ReportOptions(tmp_path / "dicom", ("sr",)))


def test_a_withheld_study_has_no_dicom_report_and_says_so(
    model: Model, films: Path, tmp_path: Path, monkeypatch
) -> None:
    from hilum.deploy.admission import Admission, Gate
    from hilum.deploy.screening import Flag

    monkeypatch.setattr(
        Gate, "admit", lambda *_: Admission(None, "PA", "given", (Flag("not_a_chest_xray", "No chest."),))
    )
    found = resolve([str(films / "c.dcm")])
    write_reports(model, found, np.array([0]), ReportOptions(tmp_path / "out", ("json", "html", "fhir", "sr", "sc")))
    document = json.loads((tmp_path / "out" / "study_0001" / "study.json").read_text())
    jsonschema.validate(document, study_schema())
    assert document["status"] == "withheld"
    assert document["findings"][3]["trained"] is False
    assert {path.name for path in (tmp_path / "out" / "study_0001").iterdir()} == {
        "study.json", "study.html", "study.fhir.json",
    }  # fmt: skip
    assert "it was withheld" in (tmp_path / "out" / "not_written.csv").read_text()


def test_dicom_reports_of_pictures_are_refused_before_anything_is_predicted(
    model: Model, films: Path, tmp_path
) -> None:
    found = resolve([str(films / "d.png")])
    with pytest.raises(ConfigError, match="None of the inputs is DICOM"):
        write_reports(model, found, np.array([0]), ReportOptions(tmp_path / "out", ("sr",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("patient\nPatient/1\n", MissingColumnError, "expected the columns study_id"),
        ("study_id,patient\n1,somebody\n", ConfigError, "row 2: The patient [^']*is no FHIR reference"),
        ("study_id,patient\n1,Patient/1\n1,Patient/2\n", ConfigError, "row 3: this study has other references"),
        ("study_id,patient_id,patient\n1,,Patient/1\n", ConfigError, "row 2: its patient_id is empty"),
    ],
)
def test_wrong_references_are_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "references.csv").write_text(text)
    with pytest.raises(error, match=message) as caught:
        parse_options(tmp_path, "fhir", references=tmp_path / "references.csv")
    assert "somebody" not in str(caught.value)


def test_unknown_formats_and_captures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="report format 'pdf'"):
        parse_options(tmp_path, "json,pdf")
    with pytest.raises(UnknownNameError, match="choice of captures 'some'"):
        parse_options(tmp_path, "sc", "some")


def test_pictures_are_scaled_by_what_each_view_contributes(
    model: Model, films: Path, tmp_path: Path, monkeypatch
) -> None:
    from hilum.commands import predict_reports
    from hilum.deploy import dicom_pictures

    given: list[dict] = []
    drawn, captured = predict_reports.study_page, dicom_pictures.pictures
    monkeypatch.setattr(predict_reports, "study_page", lambda d, p, maps: given.append(maps) or drawn(d, p, maps))
    monkeypatch.setattr(
        dicom_pictures, "pictures", lambda d, s, p, maps, c: given.append(maps) or captured(d, s, p, maps, c)
    )
    found = resolve([str(films)])
    write_reports(model, found, np.array([0, 1]), ReportOptions(tmp_path / "out", ("html", "sc")))
    result = model.predict([films / f"{CANARY}.dcm", films / "b.dcm"])
    assert len(given) == 2
    for maps in given:
        for name in ("Edema", "Mass"):
            shares = result.contributions[name]
            assert [one.sum() for one in maps[name]] == pytest.approx(shares, abs=1e-6)
        assert result.contributions["Edema"][0] != pytest.approx(0.5, abs=1e-3)


def table_of(folder: Path, rows: list[tuple[str, str]]) -> Inputs:
    """Inputs of a table that says which file is of which study."""
    text = "".join(f"{path},{study},{study}\n" for path, study in rows)
    (folder / "table.csv").write_text("path,study_id,patient_id\n" + text)
    return resolve([str(folder / "table.csv")])


@pytest.fixture
def broken(films: Path, tmp_path: Path) -> Inputs:
    """A study whose second image of three is damaged, and one that is damaged altogether."""
    (tmp_path / "half.png").write_bytes((films / "d.png").read_bytes()[:200])
    names = [films / "d.png", "half.png", films / "b.dcm"]
    (tmp_path / "other.png").write_bytes((films / "d.png").read_bytes()[:300])
    return table_of(tmp_path, [*((str(name), "A") for name in names), ("other.png", "B")])


def test_an_image_that_cannot_be_read_is_told_of_in_the_report_and_counted_as_it_was_given(
    model: Model, broken: Inputs, tmp_path: Path
) -> None:
    write_reports(model, broken, everything(broken), ReportOptions(tmp_path / "out", ("html", "sr")))
    document = json.loads((tmp_path / "out" / "study_0001" / "study.json").read_text())
    jsonschema.validate(document, study_schema())
    assert [one["number"] for one in document["study"]["images"]] == [1, 3]
    assert {one["number"] for finding in document["findings"] for one in finding["images"]} == {1, 3}
    [flag] = [one for one in document["flags"] if one["code"] == "images_unread"]
    assert flag["message"] == "Image 2 of this study could not be read, and took no part."
    page = (tmp_path / "out" / "study_0001" / "study.html").read_text()
    assert flag["message"] in page
    assert "Image 3" in page
    rows = [(row["folder"], row["what"], row["reason"]) for row in rows_of(tmp_path / "out" / "not_written.csv")]
    assert rows == [("study_0001", "image 2", "truncated"), ("study_0001", "sr", "not_dicom"),
                    ("study_0002", "image 1", "truncated")]  # fmt: skip


def test_jobs_and_runs_that_go_on_keep_each_others_lists(model: Model, broken: Inputs, tmp_path: Path) -> None:
    def listed() -> list[tuple[str, str]]:
        return [(row["folder"], row["what"]) for row in rows_of(tmp_path / "out" / "not_written.csv")]

    both = [("study_0001", "image 2"), ("study_0002", "image 1")]
    write_reports(model, broken, np.array([0, 1, 2]), ReportOptions(tmp_path / "out"))
    assert listed() == both[:1]
    write_reports(model, broken, np.array([3]), ReportOptions(tmp_path / "out"))
    assert listed() == both
    write_reports(model, broken, everything(broken), ReportOptions(tmp_path / "out"))  # all is there
    assert listed() == both


def test_a_study_without_captures_is_finished_and_more_captures_are_made(
    model: Model, films: Path, tmp_path: Path, monkeypatch
) -> None:
    from hilum.deploy.study_result import StudyResult

    real = model.predict

    def nothing_above(*arguments, **options) -> StudyResult:
        result = real(*arguments, **options)
        high = {name: None if cuts is None else dict.fromkeys(cuts, 1.0) for name, cuts in result.thresholds.items()}
        return dataclasses.replace(result, thresholds=high)

    monkeypatch.setattr(model, "predict", nothing_above)
    found, out = resolve([str(films / "c.dcm")]), tmp_path / "out"
    write_reports(model, found, np.array([0]), ReportOptions(out, ("sc",)))
    before = (out / "study_0001" / "study.json").stat().st_mtime_ns
    write_reports(model, found, np.array([0]), ReportOptions(out, ("sc",)))
    assert (out / "study_0001" / "study.json").stat().st_mtime_ns == before
    assert not list(out.rglob("capture_*"))
    write_reports(model, found, np.array([0]), ReportOptions(out, ("sc",), "all"))
    assert len(list(out.rglob("capture_*"))) == 3


def test_reports_of_one_folder_are_made_with_the_same_options(model: Model, films: Path, tmp_path: Path) -> None:
    found, out = resolve([str(films / "c.dcm")]), tmp_path / "out"
    write_reports(model, found, np.array([0]), ReportOptions(out))
    with pytest.raises(ConfigError, match=r"other options \(--score-flagged\)"):
        write_reports(model, found, np.array([0]), ReportOptions(out), score_flagged=True)
    (tmp_path / "references.csv").write_text("study_id,patient\n1.2.4,Patient/7\n9,Patient/9\n")
    asked = parse_options(out, "fhir", references=tmp_path / "references.csv")
    write_reports(model, found, np.array([0]), asked)  # the first with FHIR
    with pytest.raises(ConfigError, match=r"other options \(--references\)"):
        write_reports(model, found, np.array([0]), ReportOptions(out, ("fhir",)))


def test_other_files_under_the_same_names_are_other_studies(model: Model, films: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(number).integers(0, 255, (30, 44), np.uint8)
        cv2.imwrite(str(tmp_path / name / "d.png"), pixels)
    out = ReportOptions(tmp_path / "out")
    write_reports(model, resolve([str(tmp_path / "one")]), np.array([0]), out)
    write_reports(model, resolve([str(tmp_path / "one")]), np.array([0]), out)
    with pytest.raises(ConfigError, match="lists other studies than these inputs, or other files of them"):
        write_reports(model, resolve([str(tmp_path / "two")]), np.array([0]), out)
    cv2.imwrite(str(tmp_path / "one" / "d.png"), pixels)  # the same path
    with pytest.raises(ConfigError, match="files that have changed since"):
        write_reports(model, resolve([str(tmp_path / "one")]), np.array([0]), out)


def test_other_pictures_of_a_store_are_other_studies(model: Model, tmp_path: Path) -> None:
    found = resolve([f"{make_store(tmp_path / 'store').path}:test"])
    out = ReportOptions(tmp_path / "out")
    write_reports(model, found, np.array([0]), out)
    found.store._columns = {**found.store._columns, "checksum": found.store.checksums + 1}
    with pytest.raises(ConfigError, match="lists other studies"):
        write_reports(model, found, np.array([0]), out)


def test_rows_and_columns_are_those_of_the_upright_image(model: Model, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter: it is displayed 44 high and 30 wide
    pixels = np.random.default_rng(0).integers(0, 255, (30, 44), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=turned)
    write_reports(model, resolve([str(tmp_path / "turned.jpg")]), np.array([0]), ReportOptions(tmp_path / "out"))
    document = json.loads((tmp_path / "out" / "study_0001" / "study.json").read_text())
    assert [(one["rows"], one["columns"]) for one in document["study"]["images"]] == [(44, 30)]
    assert ImageFacts.of(1001, 1000, (500, 500)) == ImageFacts(1001, 1000)  # shrunk to a square


def test_references_of_nobody_are_told_of(model: Model, films: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "references.csv").write_text("study_id,patient\n1.2.4,Patient/7\nsomebody,Patient/9\n")
    asked = parse_options(tmp_path / "out", "fhir", references=tmp_path / "references.csv")
    write_reports(model, resolve([str(films / "c.dcm")]), np.array([0]), asked)
    printed = capsys.readouterr().err
    assert "1 of 2 references are of studies that are not among the inputs" in printed
    assert "somebody" not in printed


def test_a_study_id_of_two_patients_needs_the_patient_in_the_references(
    model: Model, films: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "table.csv").write_text(
        f"path,study_id,patient_id\n{films}/d.png,1,Ann\n{films}/c.dcm,1,Bob\n{films}/b.dcm,2,Bob\n"
    )
    found, references = resolve([str(tmp_path / "table.csv")]), tmp_path / "references.csv"
    references.write_text("study_id,patient\n1,Patient/1\n2,Patient/2\n")
    with pytest.raises(ConfigError, match="1 of 2 rows name a study_id that several studies") as caught:
        write_reports(model, found, everything(found), parse_options(tmp_path / "out", "fhir", references=references))
    assert "Ann" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    references.write_text("study_id,patient_id,patient\n1,Bob,Patient/1\n2,Ann,Patient/2\n")
    write_reports(model, found, everything(found), parse_options(tmp_path / "out", "fhir", references=references))
    told = [
        json.loads((tmp_path / "out" / f"study_000{number}" / "study.fhir.json").read_text())["entry"][0]["resource"]
        for number in (1, 2, 3)
    ]
    assert [one.get("subject") for one in told] == [None, {"reference": "Patient/1"}, None]
    assert "1 of 2 references are of studies that are not among the inputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, "html"), "name their folder, --reports"), ((None, "json", "all"), "name their folder, --reports"),
        ((Path("r"), "html", "all"), "--formats sc"), ((Path("r"), "json", "above", True), "--formats fhir"),
    ],
)  # fmt: skip
def test_what_is_said_of_no_report_is_refused(tmp_path: Path, options: tuple, message: str) -> None:
    (tmp_path / "references.csv").write_text("study_id,patient\n1,Patient/7\n")
    given = [tmp_path / "references.csv" if one is True else one for one in options]
    with pytest.raises(ConfigError, match=message):
        parse_options(*given)


def test_a_folder_of_other_reports_is_refused_before_anything_is_predicted(
    model: Model, films: Path, tmp_path: Path, monkeypatch
) -> None:
    write_reports(model, resolve([str(films / "c.dcm")]), np.array([0]), ReportOptions(tmp_path / "reports"))
    monkeypatch.setattr(predict, "_read", lambda *_: pytest.fail("something was read"))
    for inputs, raw, message in (("d.png", False, "lists other studies"), ("c.dcm", True, "with and without --raw")):
        with pytest.raises(ConfigError, match=message):
            predict.run(
                model.folder, [str(films / inputs)], tmp_path / "t.csv", raw=raw, device="cpu", score_flagged=False,
                reports=ReportOptions(tmp_path / "reports"),
            )  # fmt: skip
