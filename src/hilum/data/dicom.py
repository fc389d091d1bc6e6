"""The DICOM half of images.py: header repair, decoding with declared sizes checked, polarity.

Never used directly: `images.read_image` and `images.read_dicom_header` decide what is DICOM and come here. Decoders
are chosen by name: python-gdcm for lossless JPEG and JPEG-LS, OpenJPEG (pylibjpeg-openjpeg) for JPEG 2000 and HTJ2K,
Pillow for lossy 8-bit JPEG, on whose damaged headers GDCM ends the process. A stream is checked before any sees it.
Nothing here follows a path or a reference found inside a file, and no message holds a value read from a header, which
may identify a person. Reference: PS3.3 C.7.6.3, C.11; PS3.5 A.4, A.5.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder

from hilum.core.errors import ImageError, UnknownNameError, UnreadableImageError, UnsupportedImageError
from hilum.data import intensity
from hilum.data.area import apply_curve, resize_once, shrunk_size
from hilum.data.containers import MAX_PIXELS, check_jpeg, check_pixels
from hilum.data.dicom_display import display_curve, fits, grey_from_colour, levels, padding_levels, square_size, text
from hilum.data.images import DecodedImage, quality_flags, quiet

MAX_INFLATED = 4 * MAX_PIXELS + 2**24
"""Bytes that a deflated data set may grow to."""
HEADER_START = 8192  # bytes in which the file meta information must be
DEFLATED = str(uid.DeflatedExplicitVRLittleEndian)

NATIVE = frozenset(
    {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    }
)
DECODERS: dict[str, tuple[str, ...]] = {
    uid.RLELossless: ("pydicom",),
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("pillow", "gdcm"),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("gdcm",),
    uid.JPEGLSNearLossless: ("gdcm",),
    uid.JPEG2000Lossless: ("pylibjpeg",),
    uid.JPEG2000: ("pylibjpeg",),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
}
"""Transfer syntax -> pydicom decoding plugins, first choice first."""
_JPEG_FAMILY = frozenset(uid.JPEGTransferSyntaxes) | frozenset(uid.JPEGLSTransferSyntaxes)
_JPEG_2000_FAMILY = frozenset(uid.JPEG2000TransferSyntaxes) | {uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K}

HEADER_KEYS: tuple[str, ...] = (
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "ViewPosition", "Modality",
    "BodyPartExamined", "PatientSex", "PatientAge", "StudyDate", "Laterality", "PatientOrientation",
)  # fmt: skip


def needs_repair(start: bytes) -> bool:
    """Whether a file that begins so has to be read whole to be understood (no prefix, or deflated)."""
    return start[128:132] != b"DICM" or DEFLATED.encode() in start


def header(file: BinaryIO | BytesIO) -> dict[str, str]:
    """See `images.read_dicom_header`. Reads up to the pixels, or the whole file where it `needs_repair`."""
    with _silent():
        try:
            repair = needs_repair(file.read(HEADER_START))
            file.seek(0)
            if repair:
                file = BytesIO(_repaired(file.read()))
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            return {key: text(dataset.get(key)) for key in HEADER_KEYS}
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
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(content[position:], MAX_INFLATED)
    if inflater.unconsumed_tail:
        raise UnsupportedImageError("too_large", f"a deflated data set of more than {MAX_INFLATED} bytes.")
    if not inflater.eof:
        raise UnreadableImageError("truncated", "the deflated data set ends early.")
    name = str(uid.ExplicitVRLittleEndian).encode() + b"\0"
    return content[:132] + struct.pack("<HH2sH", 0x0002, 0x0010, b"UI", len(name)) + name + body


def _render(dataset: pydicom.FileDataset, short_side: int | None, preset: intensity.Equalise | None) -> DecodedImage:
    rows, cols = _check_header(dataset)
    stored = _meaningful_bits(dataset, _decode(dataset, rows, cols))
    photometric = str(dataset.PhotometricInterpretation)
    flags: list[str] = []
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
    return DecodedImage(
        pixels=grey,
        rows=rows,
        cols=cols,
        bits_stored=int(dataset.BitsStored),
        photometric=photometric,
        mode=f"dicom:{dataset.file_meta.TransferSyntaxUID}",
        intensity=source,
        quality=(*flags, *quality_flags(grey)),
    )


def _check_header(dataset: pydicom.FileDataset) -> tuple[int, int]:
    """Declared rows and columns of a data set that holds one image of a kind that is supported."""
    if "PixelData" not in dataset:
        if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
            raise UnsupportedImageError("unsupported_pixels", "floating-point pixels; expected integers.")
        raise UnreadableImageError("no_pixel_data", "a DICOM file without pixel data, or cut off before it.")
    needed = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PhotometricInterpretation")
    missing = [key for key in needed if dataset.get(key) in (None, "")]
    if missing:
        raise UnreadableImageError("damaged_header", f"pixel data without {', '.join(missing)}.")
    rows, cols = int(dataset.Rows), int(dataset.Columns)
    check_pixels(rows, cols)
    frames = dataset.get("NumberOfFrames")
    if frames is not None and int(frames or 1) > 1:
        raise UnsupportedImageError("multi_frame", f"{int(frames)} frames; expected one image.")
    if frames is not None:
        del dataset.NumberOfFrames  # empty or 0 means one, which decoders do not all accept
    if int(dataset.get("SamplesPerPixel") or 1) not in (1, 3) or int(dataset.BitsAllocated) not in (8, 16, 32):
        what = f"{dataset.get('SamplesPerPixel')} samples of {dataset.BitsAllocated} bits"
        raise UnsupportedImageError("unsupported_pixels", f"{what} a pixel; expected 1 or 3 of 8, 16 or 32.")
    return rows, cols


def _decode(dataset: pydicom.FileDataset, rows: int, cols: int) -> np.ndarray:
    """Stored values, (H, W) or (H, W, 3) RGB, of exactly the declared size."""
    syntax = dataset.file_meta.TransferSyntaxUID
    element = dataset.get_item("PixelData")
    value = dataset.PixelData
    if not value:
        raise UnreadableImageError("no_pixel_data", "the pixel data element is empty.")
    if syntax in NATIVE:
        declared = getattr(element, "length", len(value))
        if len(value) < declared and declared != 0xFFFFFFFF:
            raise UnreadableImageError("truncated", f"{len(value)} of {declared} bytes of pixel data.")
        expected = rows * cols * int(dataset.get("SamplesPerPixel") or 1) * int(dataset.BitsAllocated) // 8
        if str(dataset.PhotometricInterpretation) == "YBR_FULL_422":
            expected = expected // 3 * 2
        if len(value) not in (expected, expected + expected % 2):
            raise UnreadableImageError(
                "size_mismatch", f"declared {rows} x {cols} needs {expected} bytes of pixels, found {len(value)}."
            )
        plugin = ""
    elif syntax in DECODERS:
        _check_stream(next(generate_frames(value, number_of_frames=1)), dataset)
        plugin = _plugin(syntax)
    else:
        raise UnsupportedImageError("unsupported_transfer_syntax", f"transfer syntax {syntax.name}.")
    try:
        options: dict[str, Any] = {"decoding_plugin": plugin, "correct_unused_bits": False}
        pixels, _ = get_decoder(syntax).as_array(dataset, **options)
    except NotImplementedError as error:  # the decoding library's word for a variant that it does not know
        raise UnsupportedImageError("unsupported_transfer_syntax", f"{syntax.name}: this variant.") from error
    if pixels.shape[:2] != (rows, cols) or pixels.ndim not in (2, 3):
        raise UnreadableImageError("size_mismatch", f"declared {rows} x {cols}, decoded {pixels.shape}.")
    return pixels


def _meaningful_bits(dataset: pydicom.FileDataset, stored: np.ndarray) -> np.ndarray:
    """Values without what else their words hold: overlays in unused bits, a shift, signs that were not extended.

    Unused bits are cut off only where the header says that something else is there: a Bits Stored that is too small
    must not fold the values over.
    """
    bits, allocated = int(dataset.BitsStored), int(dataset.BitsAllocated)
    if stored.ndim != 2 or not 0 < bits < allocated:
        return stored
    if dataset.file_meta.TransferSyntaxUID in NATIVE | {uid.RLELossless}:
        shift = int(dataset.get("HighBit") or bits - 1) + 1 - bits
        groups = range(0x6000, 0x6020, 2)
        overlaid = any((group, 0x0102) in dataset and (group, 0x3000) not in dataset for group in groups)
        if shift > 0 or overlaid:
            word = stored.view(f"u{stored.dtype.itemsize}") >> max(shift, 0)
            stored = (word & (2**bits - 1)).astype(word.dtype).view(stored.dtype)
    smallest, largest = int(stored.min()), int(stored.max())
    if dataset.get("PixelRepresentation") and smallest >= 0 and 2 ** (bits - 1) <= largest < 2**bits:
        stored = (stored << (allocated - bits)) >> (allocated - bits)
    return stored


def _plugin(syntax: uid.UID) -> str:
    available = get_decoder(syntax).available_plugins
    for name in DECODERS[syntax]:
        if name in available:
            return name
    install = {"gdcm": "python-gdcm", "pylibjpeg": "pylibjpeg-openjpeg"}[DECODERS[syntax][0]]
    raise UnsupportedImageError("missing_decoder", f"{syntax.name} needs a decoder: pip install {install}.")


def _check_stream(stream: bytes, dataset: pydicom.FileDataset) -> None:
    """The compressed stream must be whole and of the declared kind and size, before a decoder sees it."""
    syntax = dataset.file_meta.TransferSyntaxUID
    declared = (int(dataset.Rows), int(dataset.Columns))
    if syntax in _JPEG_FAMILY:
        if not stream.startswith(b"\xff\xd8"):
            raise UnreadableImageError("damaged", "the compressed pixels are not a JPEG stream.")
        frame, _ = check_jpeg(stream)
        if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and frame.precision != 8:
            raise UnsupportedImageError("unsupported_transfer_syntax", f"lossy JPEG of {frame.precision} bits.")
        if not 2 <= frame.precision <= int(dataset.BitsAllocated) or frame.components != dataset.SamplesPerPixel:
            raise UnreadableImageError("damaged", "the stream has other components or bits than declared.")
        size = (frame.height, frame.width)
    elif syntax in _JPEG_2000_FAMILY:
        start = stream.find(b"\xff\x4f\xff\x51")
        if start < 0 or len(stream) < start + 24:
            raise UnreadableImageError("damaged", "the compressed pixels are not a JPEG 2000 stream.")
        right, bottom, left, top = struct.unpack_from(">IIII", stream, start + 8)
        size = (bottom - top, right - left)
        if b"\xff\xd9" not in stream[-16:]:
            raise UnreadableImageError("truncated", "the JPEG 2000 stream ends before its end marker.")
    else:
        return
    if size != declared:
        raise UnreadableImageError("size_mismatch", f"declared {declared} rows and columns, the stream holds {size}.")
