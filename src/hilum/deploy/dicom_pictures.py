"""A study document as DICOM pictures: a colour Secondary Capture for each finding and image, the heat map burned in.

Needs the extra `pacs` (highdicom). They go into the study of the source images, one series for all.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from hilum.deploy.dicom_source import DicomSource
from hilum.deploy.dicom_writing import (
    CHARACTERS,
    MANUFACTURER,
    check,
    equipment,
    give_context,
    highdicom_silently,
    identity_of,
    uid,
)  # fmt: skip
from hilum.deploy.overlays import Scale, overlay, scale_of
from hilum.deploy.study_remarks import remarks
from hilum.evaluation.markup import share

SERIES = 9102
"""Their series number: behind those of any radiograph."""
BURNED = "Research use only; not a medical device"
LONGEST_SIDE = 1024
"""Of a picture, pixels; larger images are shrunk."""
SMALLEST = 9
"""Of the words under it, pixels; what does not fit so has a second row."""


class Picture(NamedTuple):
    """A colour Secondary Capture.

    Args:
        finding: place of the finding in the document.
        image: number of the image, from 1.
        dataset: pydicom's FileDataset.
    """

    finding: int
    image: int
    dataset: Any


def pictures(
    document: Mapping[str, Any],
    sources: Sequence[DicomSource],
    pixels: Sequence[UInt8[np.ndarray, "H W"]],
    maps: Mapping[str, Sequence[Float[np.ndarray, "h w"]] | None],
    findings: Sequence[str],
    when: datetime | None = None,
) -> Iterator[Picture]:
    """Colour Secondary Captures of the named findings that have maps: one for each image that was scored.

    The heat is burned in, and under the picture a band that says what it is, that it is for research only, and what is
    said of the study and its images.

    Args:
        document: as `study_document` makes it.
        sources: of its images, in their order.
        pixels: of each whole image, as displayed.
        maps: by finding, one for each image, on the patch grid, covering the `box` of the document
            (`StudyResult.attention`), scaled by what each image contributes (`overlays.of_study`).
        findings: names; those without a map are passed over.
        when: time of the content; None: now.

    Raises:
        ConfigError: no highdicom, images of several patients or studies, or another number of images.
    """
    check(document, sources)
    when = when or datetime.now()
    identity, instance = identity_of(document, sources), 0
    for place, finding in enumerate(document["findings"]):
        views = maps.get(finding["name"])
        if finding["name"] not in findings or views is None or not finding["has_map"]:
            continue
        scored = [(view, image) for view, image in enumerate(document["study"]["images"]) if image["scored"]]
        scale = scale_of([views[view] for view, _ in scored])
        for view, image in scored:
            words = _caption(document, finding, image)
            shown = _burn(pixels[view], views[view], image["box"], scale, words)
            instance += 1
            dataset = _capture(document, sources[view], finding, shown, identity, instance, when)
            yield Picture(place, image["number"], dataset)


def _caption(document: Mapping[str, Any], finding: Mapping[str, Any], image: Mapping[str, Any]) -> tuple[str, ...]:
    score = share(finding["probability"]).replace("\N{NO-BREAK SPACE}", " ")
    ends = [share(end).replace("\N{NO-BREAK SPACE}", " ") for end in finding["interval"] or ()]
    interval = f" (on validation {ends[0]} to {ends[1]})" if ends else ""
    kind = "probability" if finding["calibrated"] else "uncalibrated score"
    return (
        f"{finding['name']}: {kind} of the study {score}{interval}, image {image['number']} ({image['view']})",
        f"{BURNED}. Hilum {document['model']['hilum']}, model {document['model']['digest']}",
        *remarks(document),
    )


def _burn(
    pixels: UInt8[np.ndarray, "H W"],
    values: Float[np.ndarray, "h w"],
    box: Sequence[float],
    scale: Scale,
    caption: Sequence[str],
) -> UInt8[np.ndarray, "R C 3"]:
    """The picture with the heat on it and a band of words under it."""
    share_of = min(1.0, LONGEST_SIDE / max(pixels.shape))
    size = (max(1, round(pixels.shape[1] * share_of)), max(1, round(pixels.shape[0] * share_of)))
    grey = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if share_of < 1 else pixels
    top, left, height, width = box
    return np.concatenate([overlay(grey, values, (top, left, height, width), scale), _band(size[0], caption)])


def _band(columns: int, lines: Sequence[str]) -> UInt8[np.ndarray, "R C 3"]:
    """White words on black, each line as large as fits the width, down to what can be read; a longer one in rows."""
    largest, room = max(10, min(20, columns // 40)), columns - 8
    rows: list[tuple[str, Any]] = []
    for line in lines:
        fonts = [ImageFont.load_default(size) for size in range(largest, SMALLEST - 1, -1)]
        font = next((one for one in fonts if one.getlength(line) <= room), fonts[-1])
        rows += [(row, font) for row in _rows(line, font, room)]
    height = largest + 8
    band = Image.new("RGB", (columns, height * len(rows)))
    draw = ImageDraw.Draw(band)
    for place, (row, font) in enumerate(rows):
        draw.text((4, place * height + 3), row, fill="white", font=font)
    return np.array(band)


def _rows(line: str, font: Any, room: int) -> list[str]:
    """A line broken between words where it is wider than so many pixels."""
    rows = [""]
    for word in line.split(" "):
        longer = f"{rows[-1]} {word}".strip()
        if not rows[-1] or font.getlength(longer) <= room:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows


def _capture(
    document: Mapping[str, Any],
    source: DicomSource,
    finding: Mapping[str, Any],
    shown: UInt8[np.ndarray, "R C 3"],
    identity: str,
    instance: int,
    when: datetime,
) -> Any:
    orientation = source.elements["PatientOrientation"]
    with highdicom_silently() as hd:
        from pydicom import Dataset
        from pydicom.sr.codedict import codes

        digest = hashlib.sha256(shown.tobytes()).hexdigest()
        dataset = hd.sc.SCImage(
            pixel_array=shown,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            study_instance_uid=source.one("StudyInstanceUID"),
            series_instance_uid=uid("picture series", identity),
            series_number=SERIES,
            sop_instance_uid=uid("picture", identity, str(instance), digest),
            instance_number=instance,
            manufacturer=MANUFACTURER,
            patient_orientation=("L", "F"),  # replaced below: highdicom asks for one, the source need not have any
            series_description="Hilum maps (research use only)",
            specific_character_set=CHARACTERS,
            **equipment(document, when),
        )
        dataset.PatientOrientation = list(orientation) if len(orientation) == 2 else ""
        dataset.ConversionType = "WSD"
        dataset.BurnedInAnnotation = "YES"
        dataset.RecognizableVisualFeatures = "NO"
        dataset.ContentQualification = "RESEARCH"
        dataset.ImageComments = " ".join([f"{finding['name']}, heat map.", document["notice"], *remarks(document)])
        dataset.DerivationDescription = "Heat map of a model over the source image; words burned in under it"
        item = Dataset()
        item.ReferencedSOPClassUID = source.one("SOPClassUID")
        item.ReferencedSOPInstanceUID = source.one("SOPInstanceUID")
        item.PurposeOfReferenceCodeSequence = [
            hd.sr.CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
        ]
        dataset.SourceImageSequence = [item]
        for keyword in ("BodyPartExamined", "Laterality"):
            if source.one(keyword):
                setattr(dataset, keyword, source.one(keyword))
        if source.one("LossyImageCompression") == "01":
            for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
                values = source.elements[keyword]
                if values and (keyword != "LossyImageCompressionRatio" or source.numbers(keyword)):
                    setattr(dataset, keyword, values[0] if len(values) == 1 else list(values))
        give_context(dataset, source)
        return dataset
