"""A grey phantom as the bytes of each kind of file that the real sources have: PNG, JPEG, DICOM, raw.

All functions take uint8 grey (H, W), 0 black, and the image's id, from which DICOM identifiers are derived: the same
picture and id give the same bytes, with no date in them. What is read back equals the picture, where the kind of file
keeps it exactly and says how it is to be shown.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16

from hilum.core.errors import UnknownNameError

JPEG_QUALITY = 95
BITS = 12
"""Of the detectors: stored values of DICOM and raw files are 0 to 4095."""
DIGITAL_X_RAY = "1.2.840.10008.5.1.4.1.1.1.1"
IMPLEMENTATION = "2.25.329800735698586629295641978511506172918"
"""Fixed, where pydicom would write its own version."""

Grey = UInt8[np.ndarray, "H W"]


def spread(pixels: Grey, bits: int) -> UInt16[np.ndarray, "H W"]:
    """Values 0 to 255 as 0 to 2 ** `bits` - 1, of the same proportion; scaling back and rounding gives `pixels`."""
    return np.rint(pixels * ((2**bits - 1) / 255)).astype(np.uint16)


def png(pixels: np.ndarray, image_id: str = "") -> bytes:
    """PNG of what is given: uint8 or uint16, (H, W) or blue, green, red, alpha."""
    return _by_opencv(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def png16(pixels: Grey, image_id: str = "") -> bytes:
    """16-bit PNG that uses the whole range, 0 to 65535."""
    return png(spread(pixels, 16))


def png12(pixels: Grey, image_id: str = "") -> bytes:
    """16-bit PNG of a 12-bit detector, 0 to 4095: nearly black to a reader that scales by the type."""
    return png(spread(pixels, 12))


def png_rgb(pixels: Grey, image_id: str = "") -> bytes:
    """PNG with three equal colours, as the films of Shenzhen."""
    return png(np.dstack([pixels, pixels, pixels]))


def png_rgba(pixels: Grey, image_id: str = "") -> bytes:
    """PNG with three equal colours and opaque alpha, as a few files of NIH ChestX-ray14."""
    return png(np.dstack([pixels, pixels, pixels, np.full_like(pixels, 255)]))


def jpeg(pixels: Grey, image_id: str = "") -> bytes:
    """Grey JPEG, quality 95."""
    return _by_opencv(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def raw12_inverted(pixels: Grey, image_id: str = "") -> bytes:
    """Row by row, 12 bits in big-endian words of 16, white lowest, no header (JSRT)."""
    return (2**BITS - 1 - spread(pixels, BITS)).astype(">u2").tobytes()


def dicom(
    pixels: Grey, image_id: str, *, photometric: str = "MONOCHROME2", window: bool = True, syntax: bool = True,
    pixel_data: bool = True, **elements: Any,
) -> bytes:  # fmt: skip
    """A digital radiograph of 12 bits, little endian, not compressed.

    Args:
        pixels: the picture.
        image_id: the SOP instance UID is derived from it.
        photometric: MONOCHROME2, or MONOCHROME1: stored inverted, to be shown the same.
        window: say which window shows the picture exactly; without it, a reader chooses.
        syntax: name the transfer syntax (explicit VR); without it, the file is implicit VR and does not say so.
        pixel_data: False leaves the pixels out.
        elements: further elements by keyword (PatientID, StudyInstanceUID, ViewPosition, ...); None leaves one out.
    """
    from pydicom.config import disable_value_validation  # loaded only where there is DICOM
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    stored = spread(pixels, BITS)
    if photometric == "MONOCHROME1":
        stored = 2**BITS - 1 - stored
    instance = UID(uid_of(image_id))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(DIGITAL_X_RAY), instance
    meta.ImplementationClassUID, meta.ImplementationVersionName = UID(IMPLEMENTATION), "HILUM PHANTOM"
    if syntax:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
    wanted = {
        "SOPClassUID": DIGITAL_X_RAY,
        "SOPInstanceUID": instance,
        "Modality": "DX",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": photometric,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 16,
        "BitsStored": BITS,
        "HighBit": BITS - 1,
        "PixelRepresentation": 0,
        # LINEAR, the default: from 0.5 below the centre, width less one, so 0 to 4095 is black to white.
        "WindowCenter": 2 ** (BITS - 1) if window else None,
        "WindowWidth": 2**BITS if window else None,
        "PixelData": stored.astype("<u2").tobytes() if pixel_data else None,
        **elements,
    }
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    buffer = BytesIO()
    with disable_value_validation():  # real files have "58" for an age, and worse
        for keyword, value in wanted.items():
            if value is not None:
                setattr(dataset, keyword, value)
        dataset.save_as(buffer, implicit_vr=not syntax, little_endian=True, enforce_file_format=syntax)
    return buffer.getvalue()


def uid_of(name: str) -> str:
    """A DICOM UID derived from a name (PS3.5 B.2: "2.25." and an integer of 128 bits)."""
    return f"2.25.{int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], 'big')}"


FORMS: dict[str, Callable[..., bytes]] = {
    "png": png,
    "png16": png16,
    "png12": png12,
    "png_rgb": png_rgb,
    "png_rgba": png_rgba,
    "jpeg": jpeg,
    "raw12_inverted": raw12_inverted,
    "dicom": dicom,
    "dicom_no_window": partial(dicom, window=False),
    "dicom_monochrome1": partial(dicom, photometric="MONOCHROME1"),
    "dicom_no_syntax": partial(dicom, syntax=False),
    "dicom_no_pixels": partial(dicom, pixel_data=False),
}
"""Every kind of file by name, as layouts ask for it."""


def encode(form: str, pixels: Grey, image_id: str, elements: Mapping[str, Any] | None = None) -> bytes:
    """A picture in one of `FORMS`.

    Args:
        form: which.
        pixels: the picture.
        image_id: DICOM identifiers are derived from it.
        elements: further DICOM elements by keyword, for the forms that are DICOM.

    Raises:
        UnknownNameError: no such form.
    """
    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS)
    return FORMS[form](pixels, image_id, **(elements or {}))


def _by_opencv(suffix: str, pixels: np.ndarray, options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, pixels, options)
    assert done, "OpenCV encodes any non-empty image"
    return data.tobytes()
