"""The DICOM half of images.py: header repair, then decoding (dicom_pixels.py), display (dicom_display.py), polarity.

Never used directly: `images.read_image` and `images.read_dicom_header` decide what is DICOM and come here. Nothing here
follows a path or a reference found inside a file, and no message holds a value read from a header, which may identify a
person. Reference: PS3.3 C.7.6.3, C.11; PS3.5 A.5.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom import uid
from pydicom.multival import MultiValue

from hilum.core.errors import ImageError, UnknownNameError, UnreadableImageError, UnsupportedImageError
from hilum.data import intensity
from hilum.data.area import apply_curve, resize_once, shrunk_size
from hilum.data.containers import MAX_PIXELS
from hilum.data.dicom_display import display_curve, fits, grey_from_colour, levels, padding_levels, square_size, text
from hilum.data.dicom_pixels import check_header, decode, meaningful_bits
from hilum.data.hashing import sampled
from hilum.data.images import DecodedImage, quality_flags, quiet

MAX_INFLATED = 2 * MAX_PIXELS + 2**24
"""Bytes that a deflated data set may grow to."""
HEADER_START = 8192  # bytes in which the file meta information must be
DEFLATED = str(uid.DeflatedExplicitVRLittleEndian)

HEADER_KEYS: tuple[str, ...] = (
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "ViewPosition", "Modality",
    "BodyPartExamined", "PatientSex", "PatientAge", "StudyDate", "Laterality", "PatientOrientation",
    "BurnedInAnnotation",
)  # fmt: skip


def needs_repair(start: bytes) -> bool:
    """Whether a file that begins so has to be read whole to be understood (no prefix, or deflated)."""
    return start[128:132] != b"DICM" or DEFLATED.encode() in start


def header(file: BinaryIO | BytesIO) -> dict[str, str]:
    """See `images.read_dicom_header`. Reads up to the pixels, or the whole file where it `needs_repair`."""
    return {key: text(value) for key, value in _elements(file, HEADER_KEYS).items()}


def header_values(content: bytes, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Elements of the header of a DICOM file as text, each with all its values; () where one is absent or empty.

    They identify people: keep them out of logs and messages.

    Args:
        content: of the file.
        keys: keywords of elements that are no sequences.

    Raises:
        UnreadableImageError: damaged.
    """
    found = _elements(BytesIO(content), keys)
    several = {key: value if isinstance(value, MultiValue) else [value] for key, value in found.items()}
    return {key: tuple(text(one) for one in values if text(one)) for key, values in several.items()}


def _elements(file: BinaryIO | BytesIO, keys: Iterable[str]) -> dict[str, Any]:
    with _silent():
        try:
            repair = needs_repair(file.read(HEADER_START))
            file.seek(0)
            if repair:
                file = BytesIO(_repaired(file.read()))
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            return {key: dataset.get(key) for key in keys}
        except ImageError:
            raise
        except Exception as error:  # pydicom raises a dozen unrelated types on damaged files; see its own test corpus
            raise UnreadableImageError("damaged_header", f"damaged DICOM header ({type(error).__name__}).") from error


def render(content: bytes, short_side: int | None, recipe: str = intensity.PREPROCESS_ID) -> DecodedImage:
    """Decode one DICOM image into display values, see `images.read_image`."""
    with _silent():
        try:
            return _render(_parse(content), short_side, intensity.equaliser(recipe))
        except (ImageError, UnknownNameError, MemoryError):
            raise
        except Exception as error:  # as above: the one boundary where every failure of the parser gets a reason
            raise UnreadableImageError("damaged", f"damaged DICOM ({type(error).__name__}).") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without pydicom's warnings and log lines, which quote values from headers."""
    log = pydicom.config.logger
    with quiet():
        before, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = before


def _parse(content: bytes) -> pydicom.FileDataset:
    """Read a data set; where the transfer syntax is missing, it is the one that the bytes were read with."""
    dataset = pydicom.dcmread(BytesIO(_repaired(content)))
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _repaired(content: bytes) -> bytes:
    """With the preamble and prefix that every reader expects, and not deflated."""
    if content[128:132] != b"DICM":
        content = bytes(128) + b"DICM" + content
    return _inflated(content) if DEFLATED.encode() in content[:HEADER_START] else content


def _inflated(content: bytes) -> bytes:
    """A deflated file as explicit VR little endian; a stream that grows past the ceiling is refused."""
    position, syntax = 132, b""
    while position + 8 <= len(content) and content[position : position + 2] == b"\x02\x00":
        element, kind, length = struct.unpack_from("<H2sH", content, position + 2)
        position += 8
        if kind in (b"OB", b"UN"):
            length = struct.unpack_from("<I", content, position)[0]
            position += 4
        if element == 0x0010:
            syntax = content[position : position + length].rstrip(b"\0 ")
        position += length
    if not syntax:
        raise UnreadableImageError("damaged_header", "the file meta information cannot be read.")
    if syntax != DEFLATED.encode():  # the name is somewhere else in the header
        return content
    body = zlib.decompress(content[position : position + _measured(content[position:])], -zlib.MAX_WBITS)
    name = str(uid.ExplicitVRLittleEndian).encode() + b"\0"
    return content[:132] + struct.pack("<HH2sH", 0x0002, 0x0010, b"UI", len(name)) + name + body


def _measured(packed: bytes) -> int:
    """Length of a deflated stream, inflated once piece by piece before it is held in memory as a whole."""
    inflater, rest, size = zlib.decompressobj(-zlib.MAX_WBITS), packed, 0
    while rest and not inflater.eof:
        size += len(inflater.decompress(rest, 2**20))
        rest = inflater.unconsumed_tail
        if size > MAX_INFLATED:
            raise UnsupportedImageError("too_large", f"a deflated data set of more than {MAX_INFLATED} bytes.")
    if not inflater.eof:
        raise UnreadableImageError("truncated", "the deflated data set ends early.")
    return len(packed) - len(inflater.unused_data)


def _render(dataset: pydicom.FileDataset, short_side: int | None, preset: intensity.Equalise | None) -> DecodedImage:
    rows, cols = check_header(dataset)
    flags: list[str] = []
    stored = meaningful_bits(dataset, decode(dataset, rows, cols, flags))
    photometric = str(dataset.PhotometricInterpretation)
    size = shrunk_size(square_size(dataset, rows, cols, flags), short_side)
    if stored.ndim == 3 or photometric == "PALETTE COLOR":
        source, grey = "as_is", resize_once(grey_from_colour(dataset, stored), *size)
    else:
        index, values = levels(stored)
        counts = intensity.histogram(index, len(values))
        if preset is not None:
            curve, source = preset(values, counts, photometric == "MONOCHROME1"), "equalised"
            grey = resize_once(curve.astype(np.uint8)[index], *size)
        else:
            padding = padding_levels(dataset, values)
            counts[padding] = 0
            curve, source = display_curve(dataset, values, counts, flags)
            if photometric == "MONOCHROME1" or text(dataset.get("PresentationLUTShape")).upper() == "INVERSE":
                curve = intensity.WHITE - curve
            curve[padding] = 0.0
            grey = apply_curve(index, curve, *size)
        if not fits(dataset, values[0], values[-1]):
            flags.append("bits_stored_mismatch")
    if text(dataset.get("PresentationIntentType")).upper() == "FOR PROCESSING":
        flags.append("for_processing")
    if text(dataset.get("BurnedInAnnotation")).upper() == "YES":
        flags.append("burned_in_annotation")
    return DecodedImage(
        pixels=grey,
        rows=rows,
        cols=cols,
        bits_stored=int(dataset.BitsStored),
        photometric=photometric,
        mode=f"dicom:{dataset.file_meta.TransferSyntaxUID}",
        intensity=source,
        quality=(*flags, *quality_flags(grey)),
        sample=sampled(stored),
    )
