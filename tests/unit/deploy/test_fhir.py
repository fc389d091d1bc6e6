"""The FHIR bundle, read by fhir.resources (both releases), and against the document that it is made from."""

import copy
import json
import uuid
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pytest
from fhir.resources.bundle import Bundle
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from pydicom.sr.codedict import codes

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.deploy import fhir, finding_codes
from hilum.deploy.fhir import References, fhir_bundle
from hilum.deploy.finding_codes import SNOMED, local_code

CUTS = {"f1": 0.3, "youden": 0.2, "sens_at_spec95": 0.6}
READERS = {"R5": Bundle, "R4B": BundleR4B}


def finding(name: str, probability: float | None, trained: bool = True) -> dict[str, Any]:
    known = probability is not None
    return {
        "name": name, "group": "head", "trained": trained, "probability": probability,
        "calibrated": trained, "interval": [0.2, 0.45] if known else None, "thresholds": CUTS if trained else None,
        "above": {key: probability > cut for key, cut in CUTS.items()} if known else None,
        "calibration_flag": "kept: few labels here" if known else None, "has_map": known, "images": [],
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "format": "hilum-study-1", "notice": RESEARCH_NOTICE,
        "model": {
            "digest": "0123456789abcdef", "hilum": "0.1.0", "calibrated": True, "unit": "study", "accepted_leak": "",
            "operating_points": ["f1", "youden"],
        },
        "study": {"id": "study_0001", "images": []}, "status": "scored",
        "flags": [{"code": "images_left_out", "message": "Image 2 took no part <in> it."}],
        "findings": [finding("Pneumothorax", 0.312345678901234), finding("Round(ed) Atelectasis", 0.01),
                     finding("Mass", None), finding("Hernia", None, trained=False)],
    }  # fmt: skip


def resources(bundle: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one["resource"] for one in bundle["entry"] if one["resource"]["resourceType"] == kind]


@pytest.mark.parametrize("release", ["R5", "R4B"])
@pytest.mark.parametrize(
    "references",
    [
        References(),
        References("Patient/42", "ImagingStudy/7", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        References("https://fhir.example.org/Patient/42", "urn:oid:1.2.840.113619.2.1"),
    ],
)
def test_an_independent_reader_gives_back_what_was_written(document, release: str, references: References) -> None:
    bundle = fhir_bundle(document, references, release)
    read = READERS[release].model_validate_json(json.dumps(bundle, allow_nan=False))
    again = json.loads(read.model_dump_json(by_alias=True, exclude_none=True))
    assert again == json.loads(json.dumps(bundle).replace("+00:00", "Z"))
    report = resources(bundle, "DiagnosticReport")[0]
    assert report["status"] == "preliminary"
    assert RESEARCH_NOTICE in report["conclusion"]
    assert ("subject" in report) == bool(references.patient)
    listed = {one["fullUrl"] for one in bundle["entry"]}
    assert len(listed) == len(bundle["entry"]) == 6
    assert {one["reference"] for one in report["result"]} < listed
    for observation in resources(bundle, "Observation"):
        assert observation["device"]["reference"] in listed
        assert observation["status"] == "preliminary"
        assert ("derivedFrom" in observation) == bool(references.imaging_study)


def test_the_observations_say_what_the_document_says(document) -> None:
    first, second, third, last = resources(fhir_bundle(document), "Observation")
    assert first["valueQuantity"] == {
        "value": 0.312345678901234, "unit": "probability", "system": "http://unitsofmeasure.org", "code": "1",
    }  # fmt: skip
    parts = {one["code"]["coding"][0]["code"]: one for one in first["component"]}
    assert [parts["interval"]["valueRange"][end]["value"] for end in ("low", "high")] == [0.2, 0.45]
    assert {key: parts[f"threshold-{key}"]["valueQuantity"]["value"] for key in CUTS} == CUTS
    assert [parts[f"above-{key}"]["valueBoolean"] for key in CUTS] == [True, True, False]
    assert first["note"] == [{"text": "kept: few labels here"}, {"text": "Image 2 took no part <in> it."}]
    assert third["note"] == [{"text": "Image 2 took no part <in> it."}]
    assert {one["system"] for one in first["code"]["coding"]} == {finding_codes.SCHEME_URI, finding_codes.SNOMED_URI}
    assert [one["system"] for one in second["code"]["coding"]] == [finding_codes.SCHEME_URI]
    for absent, reason in ((third, "not-performed"), (last, "unsupported")):
        assert "valueQuantity" not in absent
        assert absent["dataAbsentReason"]["coding"][0]["code"] == reason
    assert "component" not in last


@pytest.mark.parametrize("release", ["R5", "R4B"])
def test_scores_that_are_not_calibrated_are_not_called_probabilities(document, release: str) -> None:
    document["model"]["calibrated"] = False
    document["findings"] = [one | {"calibrated": False} for one in document["findings"]]
    document["flags"].append({"code": "uncalibrated", "message": "These scores are not calibrated."})
    bundle = fhir_bundle(document, release=release)
    READERS[release].model_validate_json(json.dumps(bundle, allow_nan=False))
    [report] = resources(bundle, "DiagnosticReport")
    assert "Image 2 took no part <in> it.\n\nThese scores are not calibrated." in report["conclusion"]
    for one in resources(bundle, "Observation"):
        assert {"text": "These scores are not calibrated."} in one["note"]
        if "valueQuantity" in one:
            assert one["valueQuantity"]["unit"] == "uncalibrated score, no probability"


def test_one_finding_without_calibration_is_no_probability_in_a_calibrated_model(document) -> None:
    document["findings"][1]["calibrated"] = False
    first, second, *_ = resources(fhir_bundle(document), "Observation")
    assert first["valueQuantity"]["unit"] == "probability"
    assert second["valueQuantity"]["unit"] == "uncalibrated score, no probability"


def test_what_is_said_of_an_image_and_of_the_training_goes_with_the_report_and_every_observation(document) -> None:
    flag = {"code": "not_a_chest_xray", "message": "This does not look <like> a chest X-ray."}
    document["study"]["images"] = [{"number": 1, "flags": []}, {"number": 2, "flags": [flag]}]
    document["model"]["accepted_leak"] = "pretraining met 12 test images"
    bundle = fhir_bundle(document)
    [report] = resources(bundle, "DiagnosticReport")
    words = list(ElementTree.fromstring(report["text"]["div"]).itertext())
    for remark in ("Image 2: This does not look <like> a chest X-ray.",
                   "Accepted leak: pretraining met 12 test images"):  # fmt: skip
        assert remark in report["conclusion"]
        assert remark in words
        assert all({"text": remark} in one["note"] for one in resources(bundle, "Observation"))


def test_the_narrative_is_xml_and_holds_text_as_text(document) -> None:
    div = ElementTree.fromstring(resources(fhir_bundle(document), "DiagnosticReport")[0]["text"]["div"])
    words = list(div.itertext())
    assert "Image 2 took no part <in> it." in words
    assert words[words.index("Pneumothorax") + 1] == "31 %"
    assert words[words.index("Hernia") + 1] == "never trained"


def test_equal_documents_give_equal_bundles_and_others_other_names(document) -> None:
    bundle = fhir_bundle(document)
    assert fhir_bundle(copy.deepcopy(document)) == bundle
    document["findings"][0]["probability"] = 0.4
    names = [{one["fullUrl"] for one in fhir_bundle(document, *rest)["entry"]} for rest in ((), (References(), "R4B"))]
    assert not names[0] & names[1]
    assert not names[0] & {one["fullUrl"] for one in bundle["entry"]}


@pytest.mark.parametrize("text", ["42", "Patient/", "patient/1", "Patient/1 2", "javascript:x", "Patient/4/../5"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no FHIR reference"):
        References(patient=text)


def test_times_without_a_zone_and_unknown_releases_are_refused(document) -> None:
    with pytest.raises(ConfigError, match="time zone"):
        References(issued=datetime(2026, 1, 1))
    with pytest.raises(UnknownNameError, match="FHIR release 'R4'"):
        fhir_bundle(document, release="R4")


def test_codes_are_unique_short_and_those_that_dicom_publishes() -> None:
    values = [local_code(name).value for name in (*CXRLT_2024_TASK1, "Mass-1", "Mass 1", "(odd)", "肺")]
    assert len(set(values)) == len(values)
    assert max(map(len, values)) <= 16
    assert local_code("Pleural Effusion").value == "pleural-effusion"
    assert set(SNOMED) <= set(CXRLT_2024_TASK1)
    for code in SNOMED.values():
        keyword = "".join(word.capitalize() for word in code.meaning.split())
        assert getattr(codes.SCT, keyword).value == code.value  # pydicom's copy of the DICOM tables


def test_identifiers_of_code_systems_are_uuids_of_their_names() -> None:
    for uid, name in ((finding_codes.SCHEME_UID, "findings"), (fhir.PART_URI.removeprefix("urn:oid:"), "parts")):
        assert uid == f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, f'hilum:{name}').int}"
