"""One function that reads any image file into grey uint8: 8- and 16-bit PNG, JPEG, DICOM.

The type is decided by signature, never by name. Whether a PNG or JPEG is valid is decided strictly: Pillow's PNG and
JPEG readers (no other) must accept the header, every PNG chunk its checksum, every JPEG its end; then OpenCV decodes,
which refuses what is short or broken inside. Whatever is wrong becomes an `ImageError` with a reason code; a partial
image is never returned. Intensity follows intensity.py, DICOM is read in dicom.py. This module writes nothing.

Reason codes: missing, not_a_file, unreadable, zero_bytes, not_an_image, truncated, damaged, too_large, multi_frame,
unsupported_mode; for DICOM also no_pixel_data, size_mismatch, unsupported_transfer_syntax, missing_decoder,
unsupported_pixels, damaged_header. (Past 300 lines: every way from a file to pixels goes through here.)
"""

import errno
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import JpegImagePlugin, PngImagePlugin
from PIL.ImageFile import ImageFile

from hilum.core.errors import ImageError, UnreadableImageError, UnsupportedImageError
from hilum.data.area import apply_curve, resize_once, shrunk_size
from hilum.data.containers import (
    JpegFrame,
    check_jpeg,
    check_pixels,
    check_png,
    exif_orientation,
    kind_of,
    with_filler,
)
from hilum.data.hashing import sampled
from hilum.data.intensity import PREPROCESS_ID, equaliser, histogram, luma, over_black, percentile_bounds, stretch
from hilum.data.raw import RawFormat

MAX_FILE_BYTES = 2**30
NO_MEMORY = "not enough memory to decode it."
"""How the refusal ends of an image that this machine has too little memory for at the moment."""
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, zlib.error)
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class DecodedImage:
    """A grey image and what its file said about it."""

    pixels: UInt8[np.ndarray, "H W"]
    """Display values: 0 black, 255 white."""
    rows: int
    """Height in the file, before any shrinking."""
    cols: int
    """Width in the file."""
    bits_stored: int
    photometric: str
    """DICOM photometric interpretation; MONOCHROME2 or RGB for PNG and JPEG."""
    mode: str
    """"png", "jpeg" or "dicom", and how pixels were kept: "png:L", "png:RGBA", "dicom:<transfer syntax>"."""
    intensity: str
    """Where the display values came from: voi_lut, window, percentile, equalised, or as_is."""
    quality: tuple[str, ...]
    """Flags for people; none of them changes a pixel: constant, low_contrast, polarity_suspect, ..."""
    sample: np.ndarray
    """Some rows of the whole picture as decoded, before any curve or shrinking: what hashing.py tells pictures by."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of file readers: what is wrong with a file becomes a reason or a flag, never a warning.

    One thread at a time, because Python keeps its warning filters for the whole process.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_image(
    source: Path | bytes, name: str = "", short_side: int | None = None, raw: RawFormat | None = None,
    recipe: str = PREPROCESS_ID,
) -> DecodedImage:  # fmt: skip
    """Read one image file.

    Args:
        source: a path, or the file's bytes.
        name: how messages call the image; default the path.
        short_side: shrink to this many pixels on the shorter side, from full precision, before rounding to 8 bits;
            never grows. None keeps the size.
        raw: what a file without a header holds, where the manifest says that it is one; no signature is looked for.
        recipe: one of `intensity.RECIPES`, for DICOM and more than 8 bits.

    Raises:
        UnknownNameError: no such recipe.
        UnreadableImageError: absent, damaged, truncated, or not an image.
        UnsupportedImageError: sound, but of a kind that Hilum refuses.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        content = source if isinstance(source, bytes) else read_file(source)
        if raw is not None:
            return _read_raw(content, raw, short_side, recipe)
        kind = kind_of(content)
        if kind == "dicom":
            from hilum.data import dicom  # pydicom is loaded only where there is DICOM

            return dicom.render(content, short_side, recipe)
        return _read_raster(content, kind, short_side, recipe)
    except ImageError as error:
        raise type(error)(error.reason, f"{name}: {error}") from error.__cause__
    except MemoryError as error:
        raise UnsupportedImageError("too_large", f"{name}: {NO_MEMORY}") from error


def read_dicom_header(source: Path | bytes) -> dict[str, str]:
    """The identifiers of a DICOM file that group images into studies and patients; "" where absent.

    Keys: PatientID, StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID, ViewPosition, Modality, BodyPartExamined,
    PatientSex, PatientAge, StudyDate, Laterality, PatientOrientation, BurnedInAnnotation. They identify people: keep
    them out of logs.

    Raises:
        UnreadableImageError: not DICOM, or damaged.
    """
    from hilum.data import dicom

    name = str(source) if isinstance(source, Path) else "image"
    try:
        if isinstance(source, bytes):
            return dicom.header(BytesIO(_dicom_only(source)))
        with open_file(source) as file:
            start = file.read(dicom.HEADER_START)
            if dicom.needs_repair(_dicom_only(start)):
                return dicom.header(BytesIO(start + file.read()))
            file.seek(0)
            return dicom.header(file)  # reads no further than the pixels
    except ImageError as error:
        raise type(error)(error.reason, f"{name}: {error}") from error.__cause__


def _dicom_only(content: bytes) -> bytes:
    if kind_of(content) != "dicom":
        raise UnreadableImageError("not_an_image", "expected DICOM, found another kind of file.")
    return content


def shrink(pixels: UInt8[np.ndarray, "H W"], short_side: int) -> UInt8[np.ndarray, "h w"]:
    """Resize so that the shorter side has `short_side` pixels, by area, keeping the aspect; never grows."""
    return resize_once(pixels, *shrunk_size(pixels.shape, short_side))


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; raises as `open_file`."""
    with open_file(path) as file:
        return file.read()


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; what goes wrong while it is open gets a reason too.

    Raises:
        UnreadableImageError: missing, not_a_file (a folder, a pipe, a device), unreadable.
        UnsupportedImageError: too_large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("not_a_file", "not a regular file.")
        if status.st_size > MAX_FILE_BYTES:
            raise UnsupportedImageError("too_large", f"{status.st_size} bytes; at most {MAX_FILE_BYTES} are read.")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise UnreadableImageError("missing", "no such file.") from error
    except OSError as error:
        reason = "missing" if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG) else "unreadable"
        raise UnreadableImageError(reason, f"cannot be read: {error.strerror or type(error).__name__}.") from error
    except ValueError as error:
        if "\0" in str(path):
            raise UnreadableImageError("missing", "not a possible path.") from error
        raise


def _read_raster(content: bytes, kind: str, short_side: int | None, recipe: str) -> DecodedImage:
    frame: JpegFrame | None = None
    if kind == "png":
        bits, exif = check_png(content)
        opener: type[PngImagePlugin.PngImageFile | JpegImagePlugin.JpegImageFile] = PngImagePlugin.PngImageFile
    else:
        frame, exif = check_jpeg(content)
        bits, opener = frame.precision, JpegImagePlugin.JpegImageFile
        if frame.components not in (1, 3) or bits != 8:
            what = f"{frame.components} components of {bits} bits"
            raise UnsupportedImageError("unsupported_mode", f"a JPEG of {what}; expected 8-bit grey or colour.")
    try:
        with quiet():
            image = opener(BytesIO(content))
        (cols, rows), mode = image.size, image.mode
        check_pixels(rows, cols)
        pixels = _decode(content, kind, rows, cols) if frame is None else _decode_jpeg(content, frame, image)
    except _PILLOW_ERRORS as error:
        raise UnreadableImageError("damaged", f"not a valid {kind.upper()} ({type(error).__name__}).") from error
    quality: tuple[str, ...] = ()
    turned = exif_orientation(exif)
    if turned > 1:
        pixels, quality = _upright(pixels, turned), ("exif_rotated",)
    size = shrunk_size(pixels.shape, short_side)
    grey, source = _displayed(pixels, size, recipe) if bits == 16 else (resize_once(pixels, *size), "as_is")
    return DecodedImage(
        pixels=grey,
        rows=rows,
        cols=cols,
        bits_stored=bits,
        photometric="RGB" if mode in ("RGB", "RGBA", "P") else "MONOCHROME2",
        mode=f"{kind}:{mode}",
        intensity=source,
        quality=(*quality, *quality_flags(grey)),
        sample=sampled(pixels),
    )


def _decode_jpeg(content: bytes, frame: JpegFrame, image: ImageFile) -> np.ndarray:
    """Grey pixels of a JPEG, refused where its coded data end before the picture does.

    libjpeg fills what is missing with mid-grey, so that the last pixel tells whether to look twice; several scans are
    always looked at twice.
    """
    if frame.simple:
        pixels = _decode(content, "jpeg", *image.size[::-1])
        if pixels[-1, -1] != 128:
            return pixels
        again = _decode(with_filler(content, frame), "jpeg", *image.size[::-1])
    else:  # OpenCV reads on past scans that Pillow refuses
        pixels = _decode_with_pillow(image)
        again = _decode_with_pillow(JpegImagePlugin.JpegImageFile(BytesIO(with_filler(content, frame))))
    if not np.array_equal(pixels, again):
        raise UnreadableImageError("truncated", "the coded data of the JPEG end before its picture does.")
    return pixels


def _read_raw(content: bytes, raw: RawFormat, short_side: int | None, recipe: str) -> DecodedImage:
    pixels = raw.words(content)
    grey, source = _displayed(pixels, shrunk_size(pixels.shape, short_side), recipe)
    return DecodedImage(
        pixels=grey,
        rows=raw.rows,
        cols=raw.cols,
        bits_stored=raw.bits,
        photometric="MONOCHROME1" if raw.inverted else "MONOCHROME2",
        mode=str(raw),
        intensity=source,
        quality=quality_flags(grey),
        sample=sampled(pixels),
    )


def _displayed(
    pixels: UInt16[np.ndarray, "H W"], size: tuple[int, int], recipe: str
) -> tuple[UInt8[np.ndarray, "h w"], str]:
    """Display values of more than 8 bits without a window, and which rule gave them."""
    values, counts = np.arange(2.0**16), histogram(pixels, 2**16)
    preset = equaliser(recipe)
    if preset is not None:
        return resize_once(preset(values, counts, False).astype(np.uint8)[pixels], *size), "equalised"
    return apply_curve(pixels, stretch(values, *percentile_bounds(values, counts)), *size), "percentile"


def _decode_with_pillow(image: ImageFile) -> np.ndarray:
    image.draft("L", None)
    return np.asarray(image.convert("L"))


def _decode(content: bytes, kind: str, rows: int, cols: int) -> np.ndarray:
    """Grey uint8 or uint16 pixels of a file whose structure has been checked."""
    how = cv2.IMREAD_UNCHANGED if kind == "png" else cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), how)
    except cv2.error as error:
        raise UnreadableImageError("damaged", f"the {kind.upper()} pixel data cannot be decoded.") from error
    if pixels is None:
        raise UnreadableImageError("damaged", f"the {kind.upper()} pixel data is short or damaged.")
    if pixels.shape[:2] != (rows, cols):
        raise UnreadableImageError("size_mismatch", f"expected {rows} x {cols} pixels, decoded {pixels.shape[:2]}.")
    if pixels.ndim == 2:
        return pixels
    grey = luma(pixels[..., 2::-1])
    return over_black(grey, pixels[..., 3]) if pixels.shape[2] == 4 else grey


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an Exif orientation: 1 as is, 2 to 4 mirrored or upside down, 5 to 8 also on their side."""
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def quality_flags(pixels: UInt8[np.ndarray, "H W"]) -> tuple[str, ...]:
    """What a person might want to look at: constant, low_contrast, polarity_suspect. Pixels stay as they are."""
    height, width = (side // 32 * 32 or side for side in pixels.shape)  # whole ratios are several times faster
    small = cv2.resize(pixels[:height, :width], (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    ordered = np.sort(small, axis=None)
    low, median, high = ordered[10], ordered[511:513].mean(), ordered[-11]
    if int(pixels.max()) == int(pixels.min()):
        return ("constant",)
    if high - low < 16:
        return ("low_contrast",)
    corners = np.concatenate([small[:4, :4], small[:4, -4:], small[-4:, :4], small[-4:, -4:]]).mean()
    lungs, mediastinum = np.concatenate([small[8:20, 7:12], small[8:20, 20:25]]).mean(), small[8:24, 14:18].mean()
    # Air outside the body is darker than the picture as a whole, lungs are darker than what lies between them.
    return ("polarity_suspect",) if corners + lungs > median + mediastinum else ()
