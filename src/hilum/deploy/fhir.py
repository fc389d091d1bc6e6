"""A study document as FHIR: a Bundle with one DiagnosticReport, the Observations it stands on, and the Device.

FHIR R5 (5.0.0), or R4B (4.3.0) for servers that are not there yet. Status is always preliminary: nobody has looked at
it. Nothing of a patient is made up or copied: who the study is of is a reference that the caller passes, or absent.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.deploy.finding_codes import SCHEME_URI, SNOMED, SNOMED_URI, local_code
from hilum.deploy.study_remarks import remarks
from hilum.evaluation.markup import share

RELEASES = ("R5", "R4B")
UCUM = "http://unitsofmeasure.org"
ABSENT = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
PART_URI = "urn:oid:2.25.159311053832332698472140664002235311975"
"""Code system of the parts of an observation, ours: UUID (version 5, URL namespace) of "hilum:parts"."""
REFERENCE = re.compile(r"((https?|urn):\S+|[A-Z][A-Za-z]{1,63}/[A-Za-z0-9.-]{1,64})")


@dataclass(frozen=True)
class References:
    """Whose a study is and which, as the receiving server knows them; each may be left out.

    Raises:
        ConfigError: a text that is no reference.
    """

    patient: str | None = None
    """`Patient/42`, or an absolute URL."""
    imaging_study: str | None = None
    """`ImagingStudy/7`, an absolute URL, or `urn:oid:` and the Study Instance UID."""
    issued: datetime | None = None
    """When the report was made; with a time zone."""

    def __post_init__(self) -> None:
        for kind, text in (("patient", self.patient), ("imaging_study", self.imaging_study)):
            if text is not None and not REFERENCE.fullmatch(text):
                raise ConfigError(
                    f"The {kind} ({len(text)} characters; not repeated, it may be a name) is no FHIR reference; "
                    "expected such as Patient/42, ImagingStudy/7, a URL, or urn:oid: and a Study Instance UID."
                )
        if self.issued is not None and self.issued.tzinfo is None:
            raise ConfigError("issued: expected a time with a time zone, as FHIR asks for.")


NOBODY = References()


def fhir_bundle(document: Mapping[str, Any], references: References = NOBODY, release: str = "R5") -> dict[str, Any]:
    """A study document as a FHIR Bundle of type collection, plain JSON values.

    Equal arguments give equal bundles: names of resources (`urn:uuid:`) follow the content.

    Args:
        document: as `study_document` makes it.
        references: whose it is.
        release: a name in RELEASES.

    Raises:
        UnknownNameError: no such release.
    """
    if release not in RELEASES:
        raise UnknownNameError("FHIR release", release, RELEASES)
    content = json.dumps([document, str(references), release], sort_keys=True, ensure_ascii=False)
    root = uuid.uuid5(uuid.NAMESPACE_URL, content)

    def name(part: str) -> str:
        return f"urn:uuid:{uuid.uuid5(root, part)}"

    device = name("device")
    shared, said = _about(references, release), remarks(document)
    observations = [
        (name(f"finding {number}"), _observation(finding, said, device, shared["observation"]))
        for number, finding in enumerate(document["findings"])
    ]
    report = {
        "resourceType": "DiagnosticReport",
        "text": {"status": "generated", "div": _narrative(document)},
        "status": "preliminary",
        "category": [_coded("http://terminology.hl7.org/CodeSystem/v2-0074", "RAD", "Radiology")],
        "code": _coded("http://loinc.org", "18748-4", "Diagnostic imaging study"),
        **shared["report"],
        "result": [{"reference": url, "display": one["code"]["text"]} for url, one in observations],
        "conclusion": "\n\n".join([document["notice"], *said]),
    }  # fmt: skip
    entries = [(name("report"), report), *observations, (device, _device(document["model"], release))]
    return {
        "resourceType": "Bundle",
        "type": "collection",
        "entry": [{"fullUrl": url, "resource": resource} for url, resource in entries],
    }


def _about(references: References, release: str) -> dict[str, dict[str, Any]]:
    """What the report and its observations say of whose they are."""
    both: dict[str, Any] = {}
    if references.patient:
        both["subject"] = {"reference": references.patient}
    report, observation = dict(both), dict(both)
    if references.imaging_study:
        study = _study_reference(references.imaging_study)
        report["study" if release == "R5" else "imagingStudy"] = [study]
        observation["derivedFrom"] = [study]
    if references.issued:
        report["issued"] = references.issued.isoformat(timespec="seconds")
    return {"report": report, "observation": observation}


def _study_reference(text: str) -> dict[str, Any]:
    if text.startswith("urn:oid:"):  # a DICOM study is known by its UID, whatever the server calls it
        return {"type": "ImagingStudy", "identifier": {"system": "urn:dicom:uid", "value": text}}
    return {"reference": text}


def _observation(
    finding: Mapping[str, Any], said: Sequence[str], device: str, shared: Mapping[str, Any]
) -> dict[str, Any]:
    own = local_code(finding["name"])
    coding = [{"system": SCHEME_URI, "code": own.value, "display": own.meaning}]
    if known := SNOMED.get(finding["name"]):
        coding.append({"system": SNOMED_URI, "code": known.value, "display": known.meaning})
    observation: dict[str, Any] = {
        "resourceType": "Observation",
        "status": "preliminary",
        "category": [_coded("http://terminology.hl7.org/CodeSystem/observation-category", "imaging", "Imaging")],
        "code": {"coding": coding, "text": finding["name"]},
        **shared,
        "device": {"reference": device},
    }
    if finding["probability"] is not None:
        unit = "probability" if finding["calibrated"] else "uncalibrated score, no probability"
        observation["valueQuantity"] = _number(finding["probability"], unit)
    else:
        reason = ("not-performed", "Not Performed") if finding["trained"] else ("unsupported", "Unsupported")
        observation["dataAbsentReason"] = _coded(ABSENT, *reason)
    # an observation is also read without its report, so it repeats what is said of the study
    if notes := [note for note in (finding["calibration_flag"], *said) if note]:
        observation["note"] = [{"text": note} for note in notes]
    if parts := _parts(finding):
        observation["component"] = parts
    return observation


def _parts(finding: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = []
    if finding["interval"]:
        low, high = (_number(end) for end in finding["interval"])
        meaning = "Share of positives among validation studies nearest in score, 95 % interval"
        parts.append({"code": _coded(PART_URI, "interval", meaning), "valueRange": {"low": low, "high": high}})
    for point, value in (finding["thresholds"] or {}).items():
        code = _coded(PART_URI, f"threshold-{point}", f"Operating point {point}")
        parts.append({"code": code, "valueQuantity": _number(value)})
    for point, value in (finding["above"] or {}).items():
        code = _coded(PART_URI, f"above-{point}", f"Above the operating point {point}")
        parts.append({"code": code, "valueBoolean": value})
    return parts


def _device(model: Mapping[str, Any], release: str) -> dict[str, Any]:
    key, kind = ("name", "value") if release == "R5" else ("deviceName", "name")
    return {
        "resourceType": "Device",
        "identifier": [{"system": PART_URI, "value": model["digest"]}],
        key: [{kind: f"Hilum model {model['digest']}", "type": "user-friendly-name"}],
        "version": [{"value": model["hilum"]}],
    }


def _narrative(document: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one['name'])}</td><td>{escape(_words(one))}</td></tr>" for one in document["findings"]
    )
    said = "".join(f"<p>{escape(remark)}</p>" for remark in remarks(document))
    return (
        f'<div xmlns="http://www.w3.org/1999/xhtml"><p>{escape(document["notice"])}</p>{said}'
        f"<table><tbody>{rows}</tbody></table></div>"
    )


def _words(finding: Mapping[str, Any]) -> str:
    if finding["probability"] is None:
        return "not scored" if finding["trained"] else "never trained"
    return share(finding["probability"]).replace("\N{NO-BREAK SPACE}", " ")


def _coded(system: str, code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code, "display": display}]}


def _number(value: float, unit: str = "1") -> dict[str, Any]:
    return {"value": value, "unit": unit, "system": UCUM, "code": "1"}
