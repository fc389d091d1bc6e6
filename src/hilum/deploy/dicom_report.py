"""A study document as a DICOM Structured Report: Imaging Measurement Report, TID 1500.

Needs the extra `pacs` (highdicom). The report goes into the study of the source images, refers to them by their UIDs,
and says that it is preliminary and that nobody has verified it. Pictures: `dicom_pictures.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from hilum.core.errors import ConfigError
from hilum.deploy.dicom_source import DicomSource
from hilum.deploy.dicom_writing import (
    CHARACTERS,
    MANUFACTURER,
    MODEL_NAME,
    check,
    equipment,
    give_context,
    highdicom_silently,
    identity_of,
    instances,
    uid,
)  # fmt: skip
from hilum.deploy.finding_codes import SCHEME_DESIGNATOR, SCHEME_NAME, SCHEME_UID, SNOMED, local_code
from hilum.deploy.study_remarks import remarks

SERIES = 9101
"""Its series number: behind those of any radiograph."""
LONGEST_MEANING = 63
"""Characters of the meaning of a code: one less than an LO may have, for the space that makes its bytes even."""


def structured_report(document: Mapping[str, Any], sources: Sequence[DicomSource], when: datetime | None = None) -> Any:
    """A Comprehensive SR: Imaging Measurement Report (TID 1500), preliminary, unverified.

    Device observer (the model), image library (every image), and for each finding that was scored a group (TID 1501) of
    its probability (or, under a name of ours, its uncalibrated score), the interval from validation, its operating
    points as measurements without unit, whether it is above each as qualitative evaluations, a comment where its
    calibration is in doubt, and the images that it was read from. What is said of the study and of its images (flags)
    is text under "Qualitative Evaluations".

    Args:
        document: as `study_document` makes it.
        sources: of its images, in their order.
        when: time of the content; None: now.

    Returns:
        a highdicom ComprehensiveSR, ready for `save_as`.

    Raises:
        ConfigError: no highdicom, images of several patients or studies, another number of images, or nothing to say.
    """
    check(document, sources)
    scored = [one for one in document["findings"] if one["probability"] is not None]
    if not scored:
        raise ConfigError("A structured report holds scores, and this study has none: it was withheld.")
    when = when or datetime.now()
    used = [source for source, image in zip(sources, document["study"]["images"], strict=True) if image["scored"]]
    identity = identity_of(document, sources)
    with highdicom_silently() as hd:
        sr = hd.sr
        from pydicom.sr.codedict import codes

        report = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=_observer(hd, document)),
            procedure_reported=codes.SCT.ChestImaging,
            title=codes.DCM.ImagingMeasurementReport,
            imaging_measurements=[_group(hd, one, document, used, uid("tracking", *instances(sources), one["name"]))
                                  for one in scored],
        )  # fmt: skip
        report[0].ContentSequence.insert(len(report[0].ContentSequence) - 1, _library(hd, sources))
        if said := remarks(document):
            report[0].ContentSequence.append(_remarks(hd, said))
        evidence = [_evidence(source) for source in sources]
        with _of_known_classes(evidence):
            dataset = sr.ComprehensiveSR(
                evidence=evidence,
                content=report[0],
                series_instance_uid=uid("report series", identity),
                series_number=SERIES,
                sop_instance_uid=uid("report", identity),
                instance_number=1,
                manufacturer=MANUFACTURER,
                is_complete=True,
                is_final=False,
                is_verified=False,
                series_description="Hilum findings (research use only)",
                specific_character_set=CHARACTERS,
                **equipment(document, when),
            )
        dataset.ContentLabel, dataset.ContentDescription = "HILUM", document["notice"][:64]
        give_context(dataset, sources[0])
        dataset.CodingSchemeIdentificationSequence = [_scheme()]
        return dataset


@contextmanager
def _of_known_classes(evidence: Sequence[Any]) -> Iterator[None]:
    """A private SOP class is a missing key to highdicom."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in [one.SOPClassUID for one in evidence]:
            raise
        raise ConfigError(
            "The SOP class of an image is none that a structured report can refer to (a private one, say)."
        ) from error


def _evidence(source: DicomSource) -> Any:
    """What highdicom needs to refer to an image. Without a name: it would be quoted in warnings."""
    from pydicom import Dataset

    dataset = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        setattr(dataset, keyword, source.one(keyword))
    empty = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")
    for keyword in (*empty, "StudyTime", "ReferringPhysicianName"):
        setattr(dataset, keyword, None)
    return dataset


def _scheme() -> Any:
    from pydicom import Dataset

    item = Dataset()
    item.CodingSchemeDesignator, item.CodingSchemeUID, item.CodingSchemeName = (
        SCHEME_DESIGNATOR, SCHEME_UID, SCHEME_NAME,
    )  # fmt: skip
    return item


def _observer(hd: Any, document: Mapping[str, Any]) -> Any:
    from pydicom.sr.codedict import codes

    digest = document["model"]["digest"]
    return hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=uid("device", digest), name=f"Hilum model {digest}", manufacturer_name=MANUFACTURER,
            model_name=f"{MODEL_NAME} {document['model']['hilum']}", serial_number=digest,
        ),
    )  # fmt: skip


def _own(hd: Any, value: str, meaning: str) -> Any:
    text = meaning.replace("\\", "/")[:LONGEST_MEANING]  # a backslash would part it in two
    return hd.sr.CodedConcept(value, SCHEME_DESIGNATOR, text)


def _group(
    hd: Any, finding: Mapping[str, Any], document: Mapping[str, Any], used: Sequence[DicomSource], tracking: str
) -> Any:
    from pydicom.sr.codedict import codes

    sr, name = hd.sr, finding["name"]
    known = SNOMED.get(name)
    concept = sr.CodedConcept(known.value, "SCT", known.meaning) if known else _own(hd, *local_code(name))
    raw = _own(hd, "uncalibrated", "Uncalibrated score, no probability")
    score = codes.DCM.Probability if finding["calibrated"] else raw
    measured = [(score, finding["probability"])]
    if finding["interval"]:
        low, high = finding["interval"]
        measured += [(_own(hd, "interval-low", "Share of positives on validation, lower end of 95 % interval"), low),
                     (_own(hd, "interval-high", "Share of positives on validation, upper end of 95 % interval"), high),
                     ]  # fmt: skip
    for point, value in (finding["thresholds"] or {}).items():
        measured.append((_own(hd, _point_code("cut", point), f"Operating point {point}"), value))
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=tracking, identifier=name),
        finding_type=concept,
        algorithm_id=sr.AlgorithmIdentification(
            name=MODEL_NAME, version=f"{document['model']['hilum']}, model {document['model']['digest']}"
        ),
        measurements=[
            sr.Measurement(name=code, value=float(value), unit=codes.UCUM.NoUnits) for code, value in measured
        ],
        qualitative_evaluations=[
            sr.QualitativeEvaluation(
                name=_own(hd, _point_code("above", point), f"Above the operating point {point}"),
                value=codes.SCT.Yes if above else codes.SCT.No,
            )
            for point, above in (finding["above"] or {}).items()
        ],
        source_images=[
            sr.SourceImageForMeasurementGroup(source.one("SOPClassUID"), source.one("SOPInstanceUID"))
            for source in used
        ],
    )
    if finding["calibration_flag"]:
        group[0].ContentSequence.append(_comment(hd, finding["calibration_flag"]))
    return group


def _remarks(hd: Any, said: Sequence[str]) -> Any:
    """What is said of the whole study: rows 12 ff. of TID 1500."""
    value_types = hd.sr.value_types
    container = value_types.ContainerContentItem(
        hd.sr.CodedConcept("C0034375", "UMLS", "Qualitative Evaluations"),
        relationship_type=hd.sr.RelationshipTypeValues.CONTAINS,
    )
    container.ContentSequence = value_types.ContentSequence([_comment(hd, remark) for remark in said])
    return container


def _comment(hd: Any, text: str) -> Any:
    from pydicom.sr.codedict import codes

    return hd.sr.value_types.TextContentItem(codes.DCM.Comment, text, hd.sr.RelationshipTypeValues.CONTAINS)


def _point_code(kind: str, point: str) -> str:
    """At most 16 characters."""
    short = {"sens_at_spec": "se-sp", "spec_at_sens": "sp-se"}
    for name, brief in short.items():
        point = point.replace(name, brief)
    return f"{kind}-{point}"[:16]


def _library(hd: Any, sources: Sequence[DicomSource]) -> Any:
    """TID 1600. Written here because highdicom's needs elements that many radiographs do not have."""
    from pydicom.sr.codedict import codes

    value_types, relation = hd.sr.value_types, hd.sr.RelationshipTypeValues
    sequence = value_types.ContentSequence
    group = value_types.ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=relation.CONTAINS)
    group.ContentSequence = sequence()
    for source in sources:
        item = value_types.ImageContentItem(
            name=hd.sr.CodedConcept("260753009", "SCT", "Source"),
            referenced_sop_class_uid=source.one("SOPClassUID"),
            referenced_sop_instance_uid=source.one("SOPInstanceUID"),
            relationship_type=relation.CONTAINS,
        )
        item.ContentSequence = sequence(_descriptors(hd, source))
        group.ContentSequence.append(item)
    library = value_types.ContainerContentItem(codes.DCM.ImageLibrary, relationship_type=relation.CONTAINS)
    library.ContentSequence = sequence([group])
    return library


def _descriptors(hd: Any, source: DicomSource) -> list[Any]:
    """TID 1602 and 1603, as far as the header says."""
    from pydicom.sr.codedict import codes

    value_types, relation = hd.sr.value_types, hd.sr.RelationshipTypeValues.HAS_ACQ_CONTEXT
    modalities = {"DX": codes.cid29.DigitalRadiography, "CR": codes.cid29.ComputedRadiography,
                  "RG": codes.cid29.RadiographicImaging}  # fmt: skip
    items = []
    if modality := modalities.get(source.one("Modality")):
        items.append(value_types.CodeContentItem(codes.DCM.Modality, modality, relation))
    pixels = hd.sr.CodedConcept("{pixels}", "UCUM", "Pixels")
    for name, keyword in ((codes.DCM.PixelDataRows, "Rows"), (codes.DCM.PixelDataColumns, "Columns")):
        items += [
            value_types.NumContentItem(name, int(value), pixels, relationship_type=relation)
            for value in source.numbers(keyword)
        ]
    orientation = source.elements["PatientOrientation"]
    if len(orientation) == 2:
        names = (codes.DCM.PatientOrientationRow, codes.DCM.PatientOrientationColumn)
        items += [value_types.TextContentItem(*pair, relation) for pair in zip(names, orientation, strict=True)]
    spacing = source.numbers("ImagerPixelSpacing")
    if len(spacing) == 2:
        names = (codes.DCM.VerticalPixelSpacing, codes.DCM.HorizontalPixelSpacing)
        items += [
            value_types.NumContentItem(name, value, codes.UCUM.Millimeter, relationship_type=relation)
            for name, value in zip(names, spacing, strict=True)
        ]
    return items
