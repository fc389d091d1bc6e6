"""What image files are made of: signatures, PNG chunks, JPEG markers, the Exif orientation.

images.py and dicom.py check a file here before a decoder sees it, because decoders fill in what is missing: a stream
without its end is truncated, a chunk that does not match its checksum is damaged, a size beyond the limit is refused
from its header. No pixel is decoded here.
"""

import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np

from hilum.core.errors import UnreadableImageError, UnsupportedImageError

MAX_PIXELS = 64 * 2**20
"""Larger images are refused from their header, before any pixel is decoded."""
MAX_DECODED = 4 * MAX_PIXELS
"""Bytes that pixels may take once they are decoded, with all their channels."""
MAX_SCANS = 100
"""Scans of one JPEG; a progressive file has about ten, a file made to exhaust a decoder has thousands."""
_NOISE = bytes((37 * number + 11) % 255 for number in range(96))
_RESTARTS = b"".join(bytes([0xFF, 0xD0 + number]) + _NOISE for number in range(8))
"""Coded data that means nothing in particular (no byte is 0xFF, so none can pass for a marker): alone, and behind each
restart marker."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
_TABLE_MARKERS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xDA, 0xF8, 0xFE})
_APPLICATION_MARKERS = frozenset(range(0xE0, 0xF0))
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of the colour types of PNG
_COSINE_MARKERS = frozenset({0xC0, 0xC1, 0xC2})
_PROGRESSIVE_MARKERS = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ORIENTATION_TAG = 274


@dataclass(frozen=True)
class JpegFrame:
    """What a JPEG or JPEG-LS stream says of itself."""

    height: int
    width: int
    components: int
    precision: int
    simple: bool = True
    """Baseline and in one scan: the kind that decoders cannot disagree about."""
    scan_ends: tuple[int, ...] = ()
    """Position behind the data of each scan, where the next marker is."""
    restarts: bool = False
    """Baseline or progressive, and in restart intervals."""


def check_pixels(rows: int, cols: int) -> None:
    """Refuse a declared size before anything is decoded.

    Raises:
        UnsupportedImageError: too_large.
        UnreadableImageError: damaged (no rows or columns).
    """
    if rows <= 0 or cols <= 0:
        raise UnreadableImageError("damaged", f"declared size {rows} x {cols}.")
    if rows * cols > MAX_PIXELS:
        raise UnsupportedImageError("too_large", f"{rows} x {cols} pixels; at most {MAX_PIXELS} are decoded.")


def kind_of(content: bytes) -> str:
    """png, jpeg or dicom, by signature.

    Raises:
        UnreadableImageError: zero_bytes, truncated (only part of a signature), not_an_image.
    """
    if not content:
        raise UnreadableImageError("zero_bytes", "the file is empty (0 bytes).")
    if content.startswith(PNG_SIGNATURE):
        return "png"
    if content.startswith(JPEG_SIGNATURE):
        return "jpeg"
    if content[128:132] == b"DICM" or looks_like_dataset(content):
        return "dicom"
    if any(signature.startswith(content) for signature in (PNG_SIGNATURE, JPEG_SIGNATURE)):
        raise UnreadableImageError("truncated", f"only {len(content)} bytes.")
    raise UnreadableImageError("not_an_image", "expected PNG, JPEG or DICOM, found none of their signatures.")


def looks_like_dataset(content: bytes) -> bool:
    """Whether bytes without the DICOM prefix start like a little-endian data set (group 0002 or 0008).

    Checked instead of reading anything at all as DICOM: the first element must have a known group, a plausible
    value representation or none, and a length that fits in the file.
    """
    if len(content) < 16:
        return False
    group, element = struct.unpack_from("<HH", content)
    if group not in (0x0002, 0x0008) or element > 0x0100:
        return False
    if content[4:6].isalpha() and content[4:6].isupper():
        return struct.unpack_from("<H", content, 6)[0] <= len(content)
    return struct.unpack_from("<I", content, 4)[0] <= min(len(content), 1024)


def check_png(content: bytes) -> tuple[int, bytes]:
    """Walk the chunks of a PNG; every checksum must match and IEND must come.

    Returns the bit depth and the Exif block (empty where there is none).

    Pillow alone accepts a wrong checksum of the pixel data.

    Raises:
        UnreadableImageError: truncated, damaged.
        UnsupportedImageError: multi_frame (an animation), too_large.
    """
    position, view = len(PNG_SIGNATURE), memoryview(content)
    bits, exif = 0, b""
    while position + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            break
        if zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", content, end - 4)[0]:
            raise UnreadableImageError("damaged", f"a PNG chunk ({name!r}) does not match its checksum.")
        if name == b"IHDR":
            if length != 13:
                raise UnreadableImageError("damaged", f"a PNG header of {length} bytes; expected 13.")
            cols, rows, bits, colour = struct.unpack_from(">IIBB", content, position + 8)
            if rows * cols * _CHANNELS.get(colour, 1) * bits > 8 * MAX_DECODED:
                raise UnsupportedImageError("too_large", f"{rows} x {cols} pixels of type {colour} and {bits} bits.")
        if name == b"eXIf":
            exif = content[position + 8 : end - 4]
        if name == b"acTL":
            raise UnsupportedImageError("multi_frame", "an animated PNG; expected one image.")
        if name == b"IEND":
            return bits, exif
        position = end
    raise UnreadableImageError("truncated", f"the PNG ends before its last chunk ({len(content)} bytes).")


def check_jpeg(content: bytes) -> tuple[JpegFrame, bytes]:
    """Walk the markers of a JPEG or JPEG-LS stream from start to end of image.

    Decoders fill what is missing at the end with grey; here a stream without its end is truncated, and so is one whose
    scans do not reach every component at full precision (a progressive file that was cut and closed).
    Returns the frame header and the Exif block (empty where there is none).

    Raises:
        UnreadableImageError: truncated, damaged.
        UnsupportedImageError: too_large (more scans than any real image has).
    """
    short = UnreadableImageError("truncated", f"the JPEG ends before its end marker ({len(content)} bytes).")
    position, ends, exif = 2, list[int](), b""
    frame: JpegFrame | None = None
    missing: dict[int, np.ndarray] = {}
    lossless = baseline = progressive = cosine = restarts = in_data = False
    candidates = _after_ff(content)
    while True:
        found = _next_marker(content, candidates, position, lossless)
        if found is None:
            raise short
        if in_data:
            ends.append(found - 1)
        elif content[position:found].strip(b"\xff"):
            raise UnreadableImageError("damaged", "a JPEG segment is not followed by a marker.")
        marker, position = content[found], found + 1
        if marker == 0xD9:
            if frame is None or not ends:
                raise UnreadableImageError("damaged", "the JPEG has no image.")
            if any(bits.any() for bits in missing.values()):
                raise UnreadableImageError("truncated", "the JPEG ends before its last scan.")
            frame = replace(frame, simple=baseline and len(ends) == 1, scan_ends=tuple(ends))
            return replace(frame, restarts=cosine and restarts), exif
        known = _TABLE_MARKERS if ends else _TABLE_MARKERS | _APPLICATION_MARKERS | _FRAME_MARKERS
        if marker not in known:
            raise UnreadableImageError("damaged", f"an unexpected JPEG marker, 0x{marker:02x}.")
        if position + 2 > len(content):
            raise short
        length = struct.unpack_from(">H", content, position)[0]
        if position + length > len(content):
            raise short
        segment = content[position + 2 : position + length]
        if marker in _FRAME_MARKERS:
            lossless, baseline, progressive = marker == 0xF7, marker == 0xC0, marker in _PROGRESSIVE_MARKERS
            cosine = marker in _COSINE_MARKERS
            if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
                raise UnreadableImageError("damaged", "a JPEG frame header is too short.")
            precision, height, width, components = struct.unpack_from(">BHHB", segment)
            frame = JpegFrame(height, width, components, precision)
            missing = {segment[6 + 3 * number]: np.ones(64, np.uint8) for number in range(components)}
        restarts = restarts or (marker == 0xDD and any(segment))
        if marker == 0xE1 and segment.startswith(b"Exif\x00\x00"):
            exif = exif or segment
        in_data = marker == 0xDA
        if in_data:
            if len(ends) == MAX_SCANS:
                raise UnsupportedImageError("too_large", f"a JPEG of more than {MAX_SCANS} scans.")
            _note_scan(segment, missing, progressive)
        position += max(length, 2)


def _note_scan(segment: bytes, missing: dict[int, np.ndarray], progressive: bool) -> None:
    """Write down how many low bits of each coefficient of each component are still to come after a scan."""
    count = segment[0] if segment else 0
    if len(segment) < 4 + 2 * count:
        raise UnreadableImageError("damaged", "a JPEG scan header is too short.")
    first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
    for component in segment[1 : 1 + 2 * count : 2]:
        if component in missing:
            covered = slice(first, last + 1) if progressive else slice(None)
            missing[component][covered] = bits & 15 if progressive else 0


def with_filler(content: bytes, frame: JpegFrame) -> bytes:
    """The JPEG with meaningless data behind each scan: it decodes to the same pixels, unless a scan ends early.

    A decoder takes a scan that stops in mid-picture for complete, and fills the rest: libjpeg only counts a warning,
    which neither OpenCV nor Pillow passes on. Behind a scan that is whole, the filler is never looked at.
    """
    parts, start = [], 0
    for end in frame.scan_ends:
        parts += [content[start:end].rstrip(b"\xff"), _NOISE, _RESTARTS if frame.restarts else b""]
        start = end
    return b"".join([*parts, content[start:]])


def _after_ff(content: bytes) -> np.ndarray:
    """Positions of the bytes that follow 0xFF and are neither zero, nor 0xFF, nor a restart: markers, if in order."""
    values = np.frombuffer(content, np.uint8)
    positions = np.flatnonzero(values[:-1] == 0xFF) + 1
    following = values[positions]
    return positions[(following != 0x00) & (following != 0xFF) & ((following & 0xF8) != 0xD0)]


def _next_marker(content: bytes, candidates: np.ndarray, position: int, lossless: bool) -> int | None:
    """Position of the first marker code whose 0xFF is at `position` or later; None where there is none."""
    for index in range(int(np.searchsorted(candidates, position + 1)), len(candidates)):
        found = int(candidates[index])
        if not lossless or content[found] >= 0x80:  # in JPEG-LS data 0xFF is followed by a byte below 0x80
            return found
    return None


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in an Exif block; 1 where there is none or it is damaged.

    Viewers obey it, so a photographed or re-saved film is meant to be turned. DICOM pixels never are.
    """
    body = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(body[:4])
    if order is None:
        return 1
    try:
        start = struct.unpack_from(f"{order}I", body, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", body, start)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", body, start + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
