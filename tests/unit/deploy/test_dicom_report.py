"""DICOM reports and pictures, read back by pydicom and by highdicom's own readers."""

import io
import itertools
import json
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian

from hilum.core.errors import ConfigError, UnsupportedImageError
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import dicom_pictures, dicom_report
from hilum.deploy.dicom_source import DicomSource, read_source
from hilum.deploy.dicom_writing import without_complaints

hd = pytest.importorskip("highdicom", reason="DICOM reports need the extra pacs")

CUTS = {"f1": 0.3, "youden": 0.2, "sens_at_spec95": 0.6, "spec_at_sens95": 0.1}
WHEN = datetime(2026, 1, 2, 3, 4, 5)
BIRTH = "19700102"


def finding(name: str, probability: float | None, trained: bool = True, has_map: bool = True) -> dict[str, Any]:
    known = probability is not None
    return {
        "name": name, "group": "head", "trained": trained, "probability": probability,
        "calibrated": trained, "interval": [0.2, 0.45] if known else None, "thresholds": CUTS if trained else None,
        "above": {key: probability > cut for key, cut in CUTS.items()} if known else None,
        "calibration_flag": None, "has_map": known and has_map, "images": [],
    }  # fmt: skip


def image(number: int, scored: bool = True) -> dict[str, Any]:
    return {
        "number": number, "view": "PA", "view_source": "header", "rows": 48, "columns": 40, "weight": 0.5,
        "box": [1 / 12, 0.0, 5 / 6, 1.0], "flags": [], "scored": scored,
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "format": "hilum-study-1", "notice": RESEARCH_NOTICE,
        "model": {
            "digest": "0123456789abcdef", "hilum": "0.1.0", "calibrated": True, "unit": "study", "accepted_leak": "",
            "operating_points": ["f1", "youden"],
        },
        "study": {"id": "study_0001", "images": [image(1), image(2)]}, "status": "scored", "flags": [],
        "findings": [finding("Pneumothorax", 0.3123456789012345), finding("Calcification of the Aorta", 0.05),
                     finding("Mass", 0.2, has_map=False), finding("Hernia", None, trained=False)],
    }  # fmt: skip


def radiograph(number: int = 1, **elements: Any) -> bytes:
    """A digital radiograph; elements given as None are left out."""
    data = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=bytes(128))
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    defaults: dict[str, Any] = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "SOPInstanceUID": f"1.2.3.4.{number}", "SeriesInstanceUID":
        "1.2.3.5", "StudyInstanceUID": "1.2.3", "PatientID": "MRN-77", "PatientName": "Doe^Jane", "PatientBirthDate":
        BIRTH, "PatientSex": "F", "StudyDate": "20250101", "StudyTime": "101112.123", "AccessionNumber": "ACC-1",
        "StudyID": "S-1", "ReferringPhysicianName": "Smith^John", "StudyDescription": "Chest", "Modality": "DX",
        "PatientOrientation": ["L", "F"], "ImagerPixelSpacing": ["0.14", "0.15"], "Rows": 48, "Columns": 40,
        "BodyPartExamined": "CHEST",
    }  # fmt: skip
    with pydicom.config.disable_value_validation():
        for keyword, value in {**defaults, **elements}.items():
            if value is not None:
                setattr(data, keyword, value)
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.get("SOPInstanceUID", "1.2")
        buffer = io.BytesIO()
        data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def sources_of(*files: bytes) -> list[Any]:
    return [read_source(file, number) for number, file in enumerate(files, 1)]


def reread(dataset: Any, folder: Path) -> Any:
    dataset.save_as(folder / "object.dcm", enforce_file_format=True)
    return pydicom.dcmread(folder / "object.dcm")


@pytest.fixture
def sources() -> list[Any]:
    return sources_of(radiograph(1), radiograph(2))


def make_pictures(document: dict[str, Any], sources: list[Any], names: list[str]) -> list[Any]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (48, 40), np.uint8) for _ in sources]
    maps = {one["name"]: [rng.random((4, 4)) for _ in sources] if one["has_map"] else None
            for one in document["findings"]}  # fmt: skip
    return list(dicom_pictures.pictures(document, sources, pixels, maps, names, WHEN))


def check_context(dataset: Any) -> None:
    assert dataset.PatientID == "MRN-77"
    assert dataset.PatientName == "Doe^Jane"
    assert dataset.PatientBirthDate == BIRTH
    assert (dataset.PatientSex, dataset.StudyDate, dataset.StudyTime) == ("F", "20250101", "101112.123")
    assert (dataset.AccessionNumber, dataset.StudyID, dataset.StudyDescription) == ("ACC-1", "S-1", "Chest")
    assert dataset.ReferringPhysicianName == "Smith^John"
    assert dataset.StudyInstanceUID == "1.2.3"
    assert dataset.SeriesInstanceUID not in ("1.2.3.5", "")
    assert dataset.Manufacturer == "Hilum"
    assert list(dataset.SoftwareVersions) == ["0.1.0", "model 0123456789abcdef"]
    assert (dataset.ContentDate, dataset.ContentTime) == ("20260102", "030405")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SOPClassUID", "StudyInstanceUID"):
        assert UID(dataset[keyword].value).is_valid
        assert len(dataset[keyword].value) <= 64
    assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
    assert "research use only" in dataset.SeriesDescription


def test_highdicom_reads_the_report_back_from_the_file(document, sources, tmp_path: Path) -> None:
    written = dicom_report.structured_report(document, sources, WHEN)
    dataset = reread(written, tmp_path)
    check_context(dataset)
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.33"
    assert dataset.Modality == "SR"
    assert (dataset.CompletionFlag, dataset.VerificationFlag, dataset.PreliminaryFlag) == (
        "COMPLETE", "UNVERIFIED", "PRELIMINARY",
    )  # fmt: skip
    assert dataset.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert dataset.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99HILUM"
    evidence = dataset.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == "1.2.3"
    instances = evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {one.ReferencedSOPInstanceUID for one in instances} == {"1.2.3.4.1", "1.2.3.4.2"}

    content = hd.sr.ComprehensiveSR.from_dataset(dataset).content
    groups = content.get_image_measurement_groups()
    scored = [one for one in document["findings"] if one["probability"] is not None]
    assert [group.tracking_identifier for group in groups] == [one["name"] for one in scored]
    assert [group.finding_type.scheme_designator for group in groups] == ["SCT", "99HILUM", "99HILUM"]
    for group, one in zip(groups, scored, strict=True):
        probability = group.get_measurements(name=codes.DCM.Probability)
        assert [part.value for part in probability] == [one["probability"]]
        assert probability[0].unit == codes.UCUM.NoUnits
        measured = {part.name.value: part.value for part in group.get_measurements()}
        assert measured == {
            "122157": one["probability"], "interval-low": 0.2, "interval-high": 0.45, "cut-f1": 0.3, "cut-youden": 0.2,
            "cut-se-sp95": 0.6, "cut-sp-se95": 0.1,
        }  # fmt: skip
        judged = {part.name.value: part.value.meaning for part in group.get_qualitative_evaluations()}
        assert judged == {
            f"above-{short}": "Yes" if one["above"][point] else "No"
            for short, point in zip(("f1", "youden", "se-sp95", "sp-se95"), CUTS, strict=True)
        }
        assert {part.referenced_sop_instance_uid for part in group.source_images} == {"1.2.3.4.1", "1.2.3.4.2"}


def items_of(dataset: Any, name: Any) -> list[Any]:
    """All items of a tree with this concept name, by pydicom alone."""
    found = []
    for item in dataset.get("ContentSequence", []):
        if "ConceptNameCodeSequence" in item and item.ConceptNameCodeSequence[0].CodeValue == name.value:
            found.append(item)
        found += items_of(item, name)
    return found


def test_a_report_says_that_its_scores_are_not_calibrated_and_what_else_is_doubtful(
    document, sources, tmp_path: Path
) -> None:
    document["model"]["calibrated"] = False
    document["findings"] = [one | {"calibrated": False} for one in document["findings"]]
    document["flags"] = [{"code": "images_left_out", "message": "Image 2 took no part."},
                         {"code": "uncalibrated", "message": "These scores are not calibrated."}]  # fmt: skip
    document["findings"][1]["calibration_flag"] = "few positives: 3 µ"
    dataset = reread(dicom_report.structured_report(document, sources, WHEN), tmp_path)
    assert not items_of(dataset, codes.DCM.Probability)
    groups = hd.sr.ComprehensiveSR.from_dataset(dataset).content.get_image_measurement_groups()
    for group, one in zip(groups, document["findings"], strict=False):
        [score] = [part for part in group.get_measurements() if part.name.value == "uncalibrated"]
        assert (score.name.scheme_designator, score.value) == ("99HILUM", one["probability"])
        assert score.name.meaning == "Uncalibrated score, no probability"
        comments = [item.TextValue for item in items_of(group[0], codes.DCM.Comment)]
        assert comments == ([one["calibration_flag"]] if one["calibration_flag"] else [])
    [remarks] = [item for item in dataset.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "C0034375"]
    assert [item.TextValue for item in remarks.ContentSequence] == [flag["message"] for flag in document["flags"]]
    assert {item.RelationshipType for item in (remarks, *remarks.ContentSequence)} == {"CONTAINS"}


def test_one_finding_without_calibration_is_no_probability_in_a_calibrated_model(document, sources) -> None:
    document["findings"][0]["calibrated"] = False
    report = dicom_report.structured_report(document, sources, WHEN)
    groups = hd.sr.ComprehensiveSR.from_dataset(report).content.get_image_measurement_groups()
    named = [group.get_measurements()[0].name.value for group in groups]
    assert named == ["uncalibrated", codes.DCM.Probability.value, codes.DCM.Probability.value]
    assert "uncalibrated score" in dicom_pictures._caption(document, document["findings"][0], image(1))[0]


def test_what_is_said_of_an_image_is_in_the_report_and_in_every_picture(document, sources, tmp_path: Path) -> None:
    message = "This does not look like a chest X-ray: it may be a scan of something else altogether, or a photograph."
    document["study"]["images"][1]["flags"] = [{"code": "not_a_chest_xray", "message": message}]
    document["model"]["accepted_leak"] = "pretraining met 12 test images"
    expected = ["Accepted leak: pretraining met 12 test images", f"Image 2: {message}"]
    dataset = reread(dicom_report.structured_report(document, sources, WHEN), tmp_path)
    [remarks] = [item for item in dataset.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "C0034375"]
    assert [item.TextValue for item in remarks.ContentSequence] == expected
    plain = document | {"study": document["study"] | {"images": [image(1), image(2)]}}
    for said, quiet in zip(
        make_pictures(document, sources, ["Pneumothorax"]), make_pictures(plain, sources, ["Pneumothorax"]), strict=True
    ):
        shown = reread(said.dataset, tmp_path)
        assert all(remark in shown.ImageComments for remark in expected)
        assert shown.Rows > quiet.dataset.Rows
    lines = dicom_pictures._caption(document, document["findings"][0], image(1))
    assert list(lines[2:]) == expected
    band = dicom_pictures._band(320, lines)
    assert not band[:, -4:].any()  # no word is cut off
    assert band.shape[0] > dicom_pictures._band(320, lines[:3]).shape[0] + 18  # it has two rows


def test_the_tree_names_the_device_and_describes_the_images(document, sources, tmp_path: Path) -> None:
    dataset = reread(dicom_report.structured_report(document, sources, WHEN), tmp_path)
    assert items_of(dataset, codes.DCM.ObserverType)[0].ConceptCodeSequence[0].CodeValue == "121007"
    assert items_of(dataset, codes.DCM.DeviceObserverName)[0].TextValue == "Hilum model 0123456789abcdef"
    procedure = items_of(dataset, codes.DCM.ProcedureReported)[0].ConceptCodeSequence[0]
    assert procedure.CodeMeaning == "Chest imaging (procedure)"
    [library] = items_of(dataset, codes.DCM.ImageLibrary)
    images = library.ContentSequence[0].ContentSequence
    assert [one.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for one in images] == ["1.2.3.4.1", "1.2.3.4.2"]
    assert [float(item.MeasuredValueSequence[0].NumericValue) for item in
            items_of(images[0], codes.DCM.VerticalPixelSpacing)] == [0.14]  # fmt: skip
    assert items_of(images[0], codes.DCM.PatientOrientationColumn)[0].TextValue == "F"
    names = [item.ConceptNameCodeSequence[0].CodeValue for item in dataset.ContentSequence]
    assert names.index(codes.DCM.ImageLibrary.value) < names.index(codes.DCM.ImagingMeasurements.value)


def test_a_picture_for_each_finding_and_image_with_the_words_under_it(document, sources, tmp_path: Path) -> None:
    made = make_pictures(document, sources, ["Pneumothorax", "Calcification of the Aorta", "Mass", "Hernia"])
    assert [(one.finding, one.image) for one in made] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for place, one in enumerate(made):
        dataset = reread(one.dataset, tmp_path)
        check_context(dataset)
        assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
        assert (dataset.Modality, dataset.ConversionType, dataset.BurnedInAnnotation) == ("OT", "WSD", "YES")
        assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert dataset.InstanceNumber == place + 1
        assert RESEARCH_NOTICE in dataset.ImageComments
        source = dataset.SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == f"1.2.3.4.{one.image}"
        assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert list(dataset.PatientOrientation) == ["L", "F"]
        assert dataset.BodyPartExamined == "CHEST"
        shown = dataset.pixel_array
        assert shown.shape[1:] == (40, 3)
        assert shown.shape[0] > 48
        assert (shown[:48] != shown[:48, :, :1]).any()  # colour on the image
        assert (shown[48:] == shown[48:, :, :1]).all()  # words in white on black
        assert shown[48:].max() > 200
        assert (shown[:4] == shown[:4, :, :1]).all()  # none outside the part that was looked at
        assert np.array_equal(hd.Image.from_dataset(dataset).get_frame(1), shown)
    assert len({one.dataset.SOPInstanceUID for one in made}) == 4
    assert len({one.dataset.SeriesInstanceUID for one in made}) == 1


def test_every_element_that_the_standard_requires_is_there(document, sources) -> None:
    """By the tables of PS3.3 that highdicom ships: type 1 has a value, type 2 is there, in every mandatory module."""
    tables = resources.files("highdicom").joinpath("_standard")
    modules, elements, kinds = (
        json.loads(tables.joinpath(f"{name}_map.json").read_text())
        for name in ("iod_module", "module_attribute", "sop_class_iod")
    )
    report = dicom_report.structured_report(document, sources, WHEN)
    for dataset in (report, make_pictures(document, sources, ["Pneumothorax"])[0].dataset):
        needed = [module["key"] for module in modules[kinds[dataset.SOPClassUID]] if module["usage"] == "M"]
        needed.remove("sr-document-content") if dataset is report else None  # by kind of item; its reader checks it
        listed = [one for key in needed for one in elements[key] if not one["path"]]
        assert len(listed) > 100
        for one in listed:
            if one["type"] in ("1", "2"):
                assert one["keyword"] in dataset, one
            if one["type"] == "1":
                assert dataset[one["keyword"]].value not in (None, ""), one


def test_uids_follow_the_content(document, sources) -> None:
    def uids(document: dict[str, Any], sources: list[Any], when: datetime = WHEN) -> list[str]:
        report = dicom_report.structured_report(document, sources, when)
        made = make_pictures(document, sources, ["Pneumothorax"])
        tracking = [item.UID for item in items_of(report, codes.DCM.TrackingUniqueIdentifier)]
        objects = [report, *(one.dataset for one in made)]
        return [*(one.SOPInstanceUID for one in objects), *(one.SeriesInstanceUID for one in objects), *tracking]

    once = uids(document, sources)
    assert uids(document, sources, datetime(2027, 1, 1)) == once  # read again: the same report
    renamed = document | {"study": document["study"] | {"id": "another"}}
    assert uids(renamed, sources) == once  # how we call it says nothing
    other_values = document | {"findings": [finding("Pneumothorax", 0.4), *document["findings"][1:]]}
    other_model = document | {"model": document["model"] | {"digest": "f" * 16}}
    other_images = sources_of(radiograph(1), radiograph(3))
    changed = [uids(other_values, sources), uids(other_model, sources), uids(document, other_images)]
    for one, other in itertools.combinations([once, *changed], 2):
        assert not set(one[:6]) & set(other[:6])  # objects and series


def test_what_the_sources_lack_is_empty_and_what_breaks_rules_is_kept(document, tmp_path: Path) -> None:
    poor = {
        "PatientSex": "X", "PatientName": "Müller", "SpecificCharacterSet": "ISO_IR 100", "PatientBirthDate": None,
        "AccessionNumber": "A" * 20, "StudyID": None, "PatientOrientation": None, "ImagerPixelSpacing": None,
        "Modality": "XX", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ReferringPhysicianName": None,
        "BodyPartExamined": None, "StudyTime": "", "LossyImageCompression": "01",
        "LossyImageCompressionRatio": "12", "LossyImageCompressionMethod": "ISO_10918_1",
    }  # fmt: skip
    sources = sources_of(radiograph(1, **poor), radiograph(2, **poor))
    report = reread(dicom_report.structured_report(document, sources, WHEN), tmp_path)
    assert hd.sr.ComprehensiveSR.from_dataset(report).content.get_image_measurement_groups()
    picture = reread(make_pictures(document, sources, ["Pneumothorax"])[0].dataset, tmp_path)
    for dataset in (report, picture):
        assert dataset.SpecificCharacterSet == "ISO_IR 192"
        assert dataset.PatientName == "Müller"
        with pydicom.config.disable_value_validation():  # longer than DICOM allows, and how the PACS knows it
            assert dataset.AccessionNumber == "A" * 20
        for keyword in ("PatientSex", "PatientBirthDate", "StudyID", "StudyTime", "ReferringPhysicianName"):
            assert keyword in dataset
            assert not dataset[keyword].value
    assert not picture.PatientOrientation
    assert (picture.LossyImageCompression, picture.LossyImageCompressionRatio) == ("01", 12)


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("ImagerPixelSpacing", ("0,139", "0,139")), ("ImagerPixelSpacing", ("nan", "0.1")), ("Rows", ("many",)),
        ("PatientSize", ("1,80",)), ("PatientWeight", ("inf",)), ("LossyImageCompressionRatio", ("ten to one",)),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_left_out(document, keyword: str, values: tuple[str, ...]) -> None:
    plain = sources_of(radiograph(1, LossyImageCompression="01"), radiograph(2))
    odd = [DicomSource({**source.elements, keyword: values}) for source in plain]
    made = [one.dataset for one in make_pictures(document, odd, ["Pneumothorax"])]
    made.append(dicom_report.structured_report(document, odd))
    with without_complaints():
        for dataset in made:
            buffer = io.BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            assert values[0].encode() not in buffer.getvalue()


def test_a_private_class_of_images_is_refused_in_words(document) -> None:
    with pytest.raises(ConfigError, match="none that a structured report can refer to"):
        dicom_report.structured_report(document, sources_of(radiograph(1, SOPClassUID="1.2.3.9"), radiograph(2)))


def test_images_that_are_left_out_are_no_source_of_a_finding(document, sources, tmp_path: Path) -> None:
    document["study"]["images"] = [image(1), image(2, scored=False)]
    report = reread(dicom_report.structured_report(document, sources, WHEN), tmp_path)
    groups = hd.sr.ComprehensiveSR.from_dataset(report).content.get_image_measurement_groups()
    assert {part.referenced_sop_instance_uid for group in groups for part in group.source_images} == {"1.2.3.4.1"}
    assert [one.image for one in make_pictures(document, sources, ["Pneumothorax"])] == [1]


def test_names_of_findings_may_be_long_and_of_any_script(document, sources, tmp_path: Path) -> None:
    names = ["Ättelöst " * 12, "肺炎", "<script>\\n"]
    document["findings"] = [finding(name, 0.4) for name in names]
    report = reread(dicom_report.structured_report(document, sources, WHEN), tmp_path)
    groups = hd.sr.ComprehensiveSR.from_dataset(report).content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == [name.strip() for name in names]
    assert [group.finding_type.meaning for group in groups] == [name.replace("\\", "/")[:63].strip() for name in names]
    assert len(make_pictures(document, sources, names)) == 6


def test_a_wide_caption_and_a_large_image_fit(document) -> None:
    line = dicom_pictures._caption(document, document["findings"][1], image(1))
    assert (
        line[0]
        == "Calcification of the Aorta: probability of the study 5.0 % (on validation 20 % to 45 %), image 1 (PA)"
    )
    assert line[1].startswith("Research use only")
    shown = dicom_pictures._burn(np.zeros((2000, 1500), np.uint8), np.eye(4), [0.125, 0, 0.75, 1], (0.1, 1.0), line)
    assert shown.shape[1] == 768
    assert 1024 < shown.shape[0] < 1100
    assert not shown[1024:, -4:].any()  # no word is cut off


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([radiograph(1), radiograph(2, PatientID="MRN-78")], "not of one patient"),
        ([radiograph(1), radiograph(2, StudyInstanceUID="1.2.9")], "not of one study"),
        ([radiograph(1)], "needs the headers of all of them, found 1"),
    ],
)
def test_reports_of_several_people_are_refused_without_naming_any(document, files, message: str) -> None:
    for make in (lambda s: dicom_report.structured_report(document, s), lambda s: make_pictures(document, s, ["Mass"])):
        with pytest.raises(ConfigError, match=message) as caught:
            make(sources_of(*files))
        assert "MRN" not in str(caught.value)


def test_a_withheld_study_has_no_report(document, sources) -> None:
    document["findings"] = [finding("Mass", None)]
    with pytest.raises(ConfigError, match="it was withheld"):
        dicom_report.structured_report(document, sources)


def test_files_that_are_no_dicom_or_have_no_identity_are_refused() -> None:
    with pytest.raises(UnsupportedImageError, match=r"Image 3: a DICOM report can only be made of DICOM files"):
        read_source(b"\x89PNG\r\n\x1a\n" + bytes(64), 3)
    with pytest.raises(UnsupportedImageError, match=r"Image 1: its header has no SeriesInstanceUID") as caught:
        read_source(radiograph(1, SeriesInstanceUID=None), 1)
    assert "Doe" not in str(caught.value)
    assert "Doe" not in repr(read_source(radiograph(1), 1))


def test_nothing_of_a_header_is_logged_or_warned_about(document, capfd, caplog) -> None:
    sources = sources_of(
        *(radiograph(n, PatientName="Canary", PatientSex="canary", StudyDate="canary") for n in (1, 2))
    )
    dicom_report.structured_report(document, sources)
    make_pictures(document, sources, ["Pneumothorax"])
    written = capfd.readouterr()
    assert "anary" not in written.out + written.err + caplog.text


def test_without_highdicom_a_sentence_says_what_to_install(document, sources, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r'pip install "hilum\[pacs\]"'):
        dicom_report.structured_report(document, sources)
