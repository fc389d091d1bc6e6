"""What every DICOM object that Hilum writes has in common: whose it is, who made it, how it is named.

Patient and study are copied from the source images. UIDs follow the content, so that a study that is read twice by one
model is not two reports, and two different reports never share one.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from hilum.core.errors import ConfigError
from hilum.data.images import quiet
from hilum.deploy.dicom_source import CONTEXT, DicomSource, check_one_study

UID_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "hilum:dicom")
MANUFACTURER = MODEL_NAME = "Hilum"
CHARACTERS = "ISO_IR 192"
"""UTF-8, whatever the sources use."""
_SEXES = ("M", "F", "O")
_NUMBERS = ("PatientSize", "PatientWeight")
_OPTIONAL = frozenset({
    "IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved",
    "DeidentificationMethod", "StudyDescription",
})  # fmt: skip


@contextmanager
def without_complaints() -> Iterator[None]:
    """Without warnings and log lines of DICOM libraries, which may quote headers, and without checks of copied values.

    What is copied may break a rule of DICOM (an accession number that is too long): a report that changed it would not
    be found beside its images.
    """
    from pydicom import config

    log = logging.getLogger("highdicom")
    with quiet(), config.disable_value_validation():
        before, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = before


@contextmanager
def highdicom_silently() -> Iterator[Any]:
    """The library, `without_complaints`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise ConfigError('DICOM reports need the extra: pip install "hilum[pacs]".') from error
    with without_complaints():
        yield highdicom


def check(document: Mapping[str, Any], sources: Sequence[DicomSource]) -> None:
    """Raise ConfigError unless these are the sources of the document, of one patient and study."""
    count = len(document["study"]["images"])
    if len(sources) != count:
        raise ConfigError(f"A DICOM report of {count} images needs the headers of all of them, found {len(sources)}.")
    check_one_study(sources)


def instances(sources: Sequence[DicomSource]) -> list[str]:
    """UIDs of the images."""
    return [source.one("SOPInstanceUID") for source in sources]


def identity_of(document: Mapping[str, Any], sources: Sequence[DicomSource]) -> str:
    """What a report says of which images, as text: two that differ in any of it are two reports."""
    said = {key: value for key, value in document.items() if key != "study"}
    return json.dumps([said, document["study"]["images"], instances(sources)], sort_keys=True, ensure_ascii=False)


def uid(*parts: str) -> str:
    """A UID that is a function of these texts: a UUID (version 5) as an OID, which needs no registered root."""
    return f"2.25.{uuid.uuid5(UID_SPACE, json.dumps(parts)).int}"


def equipment(document: Mapping[str, Any], when: datetime) -> dict[str, Any]:
    """Arguments of highdicom that say by what, and when, an object was made."""
    return {
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": (document["model"]["hilum"], f"model {document['model']['digest']}"),
        "content_date": when.date(),
        "content_time": when.time().replace(microsecond=0),
    }


def give_context(dataset: Any, source: DicomSource) -> None:
    """Patient and study, as the source has them; a value that no reader could use is left empty."""
    for keyword in CONTEXT:
        values = source.elements.get(keyword, ())
        if keyword == "PatientSex":
            values = tuple(value for value in values if value in _SEXES)
        if keyword in _NUMBERS and not source.numbers(keyword):
            values = ()
        if values:
            setattr(dataset, keyword, values[0] if len(values) == 1 else list(values))
        elif keyword not in _OPTIONAL:
            setattr(dataset, keyword, "")
