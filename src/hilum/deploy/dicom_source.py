"""What a report needs of the DICOM files that it is about: whose they are, which they are, how they lie. No pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hilum.core.errors import ConfigError, ImageError, UnsupportedImageError
from hilum.data.images import kind_of, read_file

CONTEXT: tuple[str, ...] = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientSize",
    "PatientWeight", "PatientIdentityRemoved", "DeidentificationMethod", "StudyInstanceUID", "StudyDate", "StudyTime",
    "ReferringPhysicianName", "StudyID", "AccessionNumber", "StudyDescription",
)  # fmt: skip
"""Patient and study, copied into what is written."""
REQUIRED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
IMAGE = (
    "Rows", "Columns", "Modality", "PatientOrientation", "ImagerPixelSpacing", "BodyPartExamined", "Laterality",
    "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
)  # fmt: skip


@dataclass(frozen=True)
class DicomSource:
    """One DICOM image, as far as a report refers to it. It identifies a person: never print it."""

    elements: Mapping[str, tuple[str, ...]]
    """Values by keyword, of CONTEXT, REQUIRED and IMAGE."""

    def one(self, keyword: str) -> str:
        """The first value; "" where there is none."""
        return (self.elements.get(keyword) or ("",))[0]

    def numbers(self, keyword: str) -> list[float]:
        """All values as numbers; none where one of them is no finite number: headers hold what people typed."""
        try:
            values = [float(value) for value in self.elements.get(keyword, ())]
        except ValueError:
            return []
        return values if all(map(math.isfinite, values)) else []

    def __repr__(self) -> str:
        return "DicomSource(...)"


def read_source(path: Path | bytes, number: int) -> DicomSource:
    """Read the header of an image.

    Args:
        path: or the file's contents.
        number: of the image in its study, for messages: they hold nothing of the file.

    Raises:
        UnsupportedImageError: not DICOM, or without the identifiers by which a PACS knows it.
        UnreadableImageError: damaged.
    """
    from hilum.data.dicom import header_values

    content = path if isinstance(path, bytes) else read_file(Path(path))
    try:
        if kind_of(content) != "dicom":
            raise UnsupportedImageError("not_dicom", "a DICOM report can only be made of DICOM files.")
        elements = header_values(content, dict.fromkeys((*CONTEXT, *REQUIRED, *IMAGE)))
    except ImageError as error:
        raise type(error)(error.reason, f"Image {number}: {error}") from error.__cause__
    missing = [name for name in REQUIRED if not elements[name]]
    if missing:
        raise UnsupportedImageError(
            "no_identifiers",
            f"Image {number}: its header has no {', '.join(missing)}; a PACS could not tell what the report is about.",
        )
    return DicomSource(elements)


def check_one_study(sources: Sequence[DicomSource]) -> None:
    """Raise ConfigError unless all images are of one patient and one study: a report goes into that study."""
    for keyword, word in (("PatientID", "patient"), ("StudyInstanceUID", "study")):
        if len({source.one(keyword) for source in sources}) > 1:
            raise ConfigError(
                f"These {len(sources)} DICOM images are not of one {word} by their own headers, and a DICOM report "
                "belongs to one. Write one report for each."
            )
