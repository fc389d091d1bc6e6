"""The pixels of a DICOM data set as stored values: what is declared is checked, then the decoder is chosen by name.

python-gdcm for lossless JPEG and JPEG-LS, OpenJPEG (pylibjpeg-openjpeg) for JPEG 2000 and HTJ2K, Pillow for lossy 8-bit
JPEG, on whose damaged headers GDCM ends the process. A stream is checked before any decoder sees it, and an array of
another size than declared is never returned. No message holds text from a header. Reference: PS3.3 C.7.6.3; PS3.5 A.4.
"""

import struct
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder

from hilum.core.errors import UnreadableImageError, UnsupportedImageError
from hilum.data.containers import JpegFrame, check_jpeg, check_pixels, with_filler

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

GREY = frozenset({"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"})
COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422"})
JPEG_2000_COLOUR = frozenset({"YBR_RCT", "YBR_ICT"})
"""Colour that a JPEG 2000 stream converts itself."""


def check_header(dataset: pydicom.FileDataset) -> tuple[int, int]:
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
    samples, photometric = int(dataset.get("SamplesPerPixel") or 1), str(dataset.PhotometricInterpretation)
    known = GREY if samples == 1 else COLOUR
    if samples == 3 and dataset.file_meta.TransferSyntaxUID in _JPEG_2000_FAMILY:
        known |= JPEG_2000_COLOUR
    if photometric not in known:
        what = f"a photometric interpretation other than {', '.join(sorted(known))}"
        raise UnsupportedImageError("unsupported_pixels", f"{what}, with {samples} samples a pixel.")
    return rows, cols


def decode(dataset: pydicom.FileDataset, rows: int, cols: int, flags: list[str]) -> np.ndarray:
    """Stored values, (H, W) or (H, W, 3) RGB, of exactly the declared size. Adds to `flags`."""
    syntax = dataset.file_meta.TransferSyntaxUID
    element = dataset.get_item("PixelData")
    value = dataset.PixelData
    stream, jpeg = b"", None
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
        stream = next(generate_frames(value, number_of_frames=1))
        jpeg = _check_stream(stream, dataset, flags)
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
    if jpeg is not None and _may_be_filled(pixels, syntax):
        dataset.PixelData = encapsulate([with_filler(stream, jpeg)])
        try:
            whole = np.array_equal(pixels, get_decoder(syntax).as_array(dataset, **options)[0])
        except RuntimeError:  # GDCM on the filler, which it does not see behind a stream that is whole
            whole = False
        if not whole:
            raise UnreadableImageError("truncated", "the coded data of the JPEG end before its picture does.")
    return pixels


def _may_be_filled(pixels: np.ndarray, syntax: uid.UID) -> bool:
    """Whether the last pixel is what decoders put where coded data are missing, see `containers.with_filler`."""
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        return bool((pixels[-1, -1] == 128).all())
    return syntax != uid.JPEGLosslessSV1 or bool((pixels[-1, -1] == pixels[-1, max(pixels.shape[1] - 2, 0)]).all())


def meaningful_bits(dataset: pydicom.FileDataset, stored: np.ndarray) -> np.ndarray:
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


def _check_stream(stream: bytes, dataset: pydicom.FileDataset, flags: list[str]) -> JpegFrame | None:
    """The compressed stream must be whole and of the declared kind and size, before a decoder sees it.

    Returns the frame of a JPEG whose decoder would fill what is missing.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    declared, samples = (int(dataset.Rows), int(dataset.Columns)), int(dataset.get("SamplesPerPixel") or 1)
    frame: JpegFrame | None = None
    if syntax in _JPEG_FAMILY:
        if not stream.startswith(b"\xff\xd8"):
            raise UnreadableImageError("damaged", "the compressed pixels are not a JPEG stream.")
        frame, _ = check_jpeg(stream)
        if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and frame.precision != 8:
            raise UnsupportedImageError("unsupported_transfer_syntax", f"lossy JPEG of {frame.precision} bits.")
        precision, components, size = frame.precision, frame.components, (frame.height, frame.width)
    elif syntax in _JPEG_2000_FAMILY:
        start = stream.find(b"\xff\x4f\xff\x51")
        if start < 0 or len(stream) < start + 43:
            raise UnreadableImageError("damaged", "the compressed pixels are not a JPEG 2000 stream.")
        right, bottom, left, top = struct.unpack_from(">IIII", stream, start + 8)
        components, depth = struct.unpack_from(">HB", stream, start + 40)
        signed, precision, size = depth >> 7, (depth & 0x7F) + 1, (bottom - top, right - left)
        if b"\xff\xd9" not in stream[-16:]:
            raise UnreadableImageError("truncated", "the JPEG 2000 stream ends before its end marker.")
        if signed != int(dataset.get("PixelRepresentation") or 0):
            flags.append("sign_mismatch")  # the header is followed
    else:
        return None
    if not 2 <= precision <= int(dataset.BitsAllocated) or components != samples:
        raise UnreadableImageError("damaged", "the stream has other components or bits than declared.")
    if size != declared:
        raise UnreadableImageError("size_mismatch", f"declared {declared} rows and columns, the stream holds {size}.")
    return frame if syntax in uid.JPEGTransferSyntaxes else None
