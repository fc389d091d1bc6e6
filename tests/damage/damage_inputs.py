"""Sound images of many kinds, and the seeded ways in which they are damaged. Used by fuzz.py and the tests beside it.

Nothing here imports hilum's readers: what a file is made of is written by Pillow, pydicom, or by hand.
"""

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate

from hilum.data.phantoms.render import render_study

BUNDLED = (
    "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "SC_rgb_jls_lossy_line.dcm",
    "SC_rgb_jls_lossy_sample.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm", "rtdose_1frame.dcm",
    "SC_rgb_rle.dcm", "rtdose_expb_1frame.dcm", "SC_rgb_small_odd_jpeg.dcm", "rtdose_rle_1frame.dcm",
    "SC_rgb_rle_16bit.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm",
    "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_app14_dcmd.dcm", "image_dfl.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm", "MR_small.dcm", "ExplVR_BigEnd.dcm", "CT_small.dcm",
)  # fmt: skip
"""Small image files that pydicom ships, of every transfer syntax that it has."""


@cache
def phantom(height: int = 96, width: int = 80, seed: int = 0) -> np.ndarray:
    """A chest phantom, uint8 (H, W)."""
    return render_study(seed, 0, 0, ["PA"], {"Pleural Effusion": 0.6}, [(height, width)])[0].pixels


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colour: int, data: bytes, extra: bytes = b"", interlace: int = 0) -> bytes:
    """A PNG written by hand; `data` is compressed as it is."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of the seven passes (PNG specification, 8.2)."""


def interlaced(pixels: np.ndarray) -> bytes:
    """A grey 8-bit PNG in seven passes; Pillow writes none."""
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in ADAM7]
    data = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return png(pixels.shape[1], pixels.shape[0], 8, 0, data, interlace=1)


def rasters() -> dict[str, bytes]:
    """Sound PNG and JPEG files of the kinds that are read."""
    grey = phantom()
    colour = Image.fromarray(np.stack([grey, 255 - grey, grey // 2], -1))
    picture = Image.fromarray(grey)
    return {
        "png": saved(picture),
        "png_stored": saved(picture, compress_level=0),
        "png_interlaced": interlaced(grey),
        "png_16": saved(Image.fromarray(grey.astype(np.uint16) * 200)),
        "png_rgb": saved(colour),
        "png_rgba": saved(colour.convert("RGBA")),
        "png_la": saved(picture.convert("LA")),
        "png_palette": saved(colour.convert("P")),
        "png_1": saved(picture.convert("1")),
        "jpeg": saved(picture, "JPEG", quality=92),
        "jpeg_colour": saved(colour, "JPEG", subsampling=2),
        "jpeg_444": saved(colour, "JPEG", subsampling=0),
        "jpeg_progressive": saved(picture, "JPEG", progressive=True),
        "jpeg_colour_progressive": saved(colour, "JPEG", progressive=True),
        "jpeg_restarts": saved(picture, "JPEG", restart_marker_rows=1),
        "jpeg_exif": saved(
            picture, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        ),
    }


def radiograph(pixels: np.ndarray, syntax: uid.UID = uid.ExplicitVRLittleEndian, **elements: Any) -> FileDataset:
    """A digital radiograph of few elements; those passed replace or add, None leaves one out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    bits = 8 * pixels.dtype.itemsize
    defaults: dict[str, Any] = {
        "SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": "1.2.3.4", "StudyInstanceUID": "1.2.3",
        "PatientID": "MRN-77", "PatientName": "Doe^Jane", "ViewPosition": "PA", "Rows": pixels.shape[0],
        "Columns": pixels.shape[1], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"), "PixelData": pixels.tobytes(),
    }  # fmt: skip
    for keyword, value in {**defaults, **elements}.items():
        if value is not None:
            setattr(data, keyword, value)
    return data


def written(data: FileDataset) -> bytes:
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(pixels: np.ndarray, syntax: uid.UID, stream: bytes = b"", **elements: Any) -> bytes:
    """A DICOM file of compressed pixels: of the stream given, or compressed by pydicom's plugins."""
    if not stream:
        data = radiograph(pixels, **elements)
        data.compress(syntax)
        return written(data)
    data = radiograph(pixels, syntax, **{**elements, "PixelData": encapsulate([stream])})
    data["PixelData"].is_undefined_length = True
    return written(data)


def phantom_dicoms() -> dict[str, bytes]:
    """DICOM files made from phantoms."""
    grey = phantom()
    values = grey.astype(np.uint16) * 16 + 7
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 8])
    table.add_new("LUTData", "OW", np.sqrt(np.arange(256) * 255).astype("<u2").tobytes())
    jpeg = saved(Image.fromarray(grey), "JPEG", quality=92)
    return {
        "implicit": written(radiograph(values, uid.ImplicitVRLittleEndian, WindowCenter=2000, WindowWidth=3000)),
        "explicit": written(radiograph(values, BitsStored=12, HighBit=11)),
        "deflated": written(radiograph(values, uid.DeflatedExplicitVRLittleEndian)),
        "monochrome1": written(radiograph(grey, PhotometricInterpretation="MONOCHROME1", VOILUTSequence=[table])),
        "signed": written(radiograph(values.astype(np.int16) - 2000, RescaleSlope=2, RescaleIntercept=-1024)),
        "trailing": written(radiograph(values, DataSetTrailingPadding=bytes(300))),
        "rle": compressed(values, uid.RLELossless),
        "j2k_lossless": compressed(values, uid.JPEG2000Lossless),
        "jpeg": compressed(grey, uid.JPEGBaseline8Bit, jpeg),
        "bare": written(radiograph(values))[132:],
    }


def dicoms() -> dict[str, bytes]:
    """The seeds of the DICOM mutations: files that pydicom ships, and phantoms."""
    files = {name: Path(str(pydicom.data.get_testdata_file(name))).read_bytes() for name in BUNDLED}
    return {**files, **phantom_dicoms()}


def mutate(content: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """Damage once: a quarter of the files is cut, half has bytes changed (mostly in the first 4 KB, where headers are),
    a quarter has bytes taken out or put in. Also returns whether it was only cut.
    """
    kind = rng.random()
    if kind < 0.25:
        return content[: int(rng.integers(len(content)))], True
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(min(len(changed), 4096) if rng.random() < 0.8 else len(changed)))
        if kind < 0.75:
            changed[at] = int(rng.integers(256)) if rng.random() < 0.5 else changed[at] ^ 1 << int(rng.integers(8))
        elif kind < 0.875:
            del changed[at : at + int(rng.integers(1, 50))]
        else:
            changed[at:at] = rng.integers(0, 256, int(rng.integers(1, 50)), dtype=np.uint8).tobytes()
    return bytes(changed), False


def twelve_bit_jpeg() -> bytes:
    """A JPEG whose header says 12 bits."""
    content = bytearray(saved(Image.fromarray(phantom()), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 1], content[at + 4] = 0xC1, 12
    return bytes(content)


def resized(content: bytes, rows: int, cols: int) -> bytes:
    """A JPEG whose header claims another size."""
    changed = bytearray(content)
    at = changed.index(b"\xff\xc0")
    changed[at + 5 : at + 9] = struct.pack(">HH", rows, cols)
    return bytes(changed)


def deflated_zeros(count: int) -> bytes:
    """At least so many zero bytes as a raw deflate stream: one piece, made once and repeated."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * -(-count // 2**20) + packer.flush()


def zeros(count: int) -> bytes:
    """The same with a zlib header; the checksum at its end is left out, since nothing should read so far."""
    return b"\x78\x9c" + deflated_zeros(count)


def packed_png(width: int, height: int, bits: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG of pixel data that are compressed already."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def nested(depth: int) -> Dataset:
    """Sequences within sequences."""
    data = Dataset()
    data.PatientID = "MRN-77"
    for _ in range(depth):
        outer = Dataset()
        outer.ReferencedImageSequence = [data]
        data = outer
    return data


def deep(depth: int) -> bytes:
    """A radiograph with sequences nested so deep that a writer that recurses would not get there; written by hand."""
    start, end = (
        b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff",
        (b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"),
    )
    content = written(radiograph(phantom()))
    at = content.index(b"\x10\x00\x10\x00PN")
    return content[:at] + start * depth + end * depth + content[at:]


def bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that ask for much: content and the reason with which each is refused."""
    grey = phantom()
    jpeg = saved(Image.fromarray(grey), "JPEG")
    scan = jpeg.index(b"\xff\xda")
    scan_header = jpeg[scan : scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")]
    row = zeros(20000 * 2501)
    text = b"Comment\0\0" + zeros(2**27)
    profile = b"icc\0\0" + zeros(2**27)
    return {
        "png_of_400_million_pixels": (packed_png(20000, 20000, 1, 0, row), "too_large"),
        "png_of_declared_50000_square": (png(50000, 50000, 1, 0, bytes(100)), "too_large"),
        "png_of_declared_2_31": (png(2**31 - 1, 2**31 - 1, 16, 6, bytes(100)), "too_large"),
        "png_of_8000_square_and_no_data": (png(8000, 8000, 8, 0, bytes(100)), "damaged"),
        "png_of_8000_square_in_16_bit_colour": (packed_png(8000, 8000, 16, 6, zeros(8000 * 64001)), "too_large"),
        "png_text": (png(8, 8, 8, 0, bytes(72), chunk(b"zTXt", text)), "damaged"),
        "png_profile": (png(8, 8, 8, 0, bytes(72), chunk(b"iCCP", profile)), "damaged"),
        "png_animation": (png(8, 8, 8, 0, bytes(72), chunk(b"acTL", struct.pack(">II", 10000, 0))), "multi_frame"),
        "jpeg_of_declared_65500_square": (resized(jpeg, 65500, 65500), "too_large"),
        "jpeg_of_8000_square_and_no_data": (resized(jpeg, 8000, 8000), "truncated"),
        "jpeg_of_500_scans": (jpeg[:scan] + scan_header * 500 + jpeg[scan:], "too_large"),
        "dicom_of_declared_65535_square": (written(radiograph(grey, Rows=65535, Columns=65535)), "too_large"),
        "dicom_rle_of_declared_32000_square": (
            compressed(grey, uid.RLELossless, bytes(64) + bytes(2000), Rows=32000, Columns=32000), "too_large"),
        "dicom_rle_of_8000_square_and_no_data": (
            compressed(grey, uid.RLELossless, struct.pack("<16I", 1, 64, *[0] * 14) + bytes(2000), Rows=8000,
                       Columns=8000), "damaged"),
        "dicom_of_10000_frames": (written(radiograph(grey, NumberOfFrames=10000)), "multi_frame"),
        "dicom_deflated": (deflated_bomb(), "too_large"),
        "dicom_nested_1000_deep": (deep(1000), "damaged"),
    }  # fmt: skip


def deflated_bomb() -> bytes:
    """A deflated data set of 1 GB of zeros."""
    content = written(radiograph(phantom(), uid.DeflatedExplicitVRLittleEndian))
    return content[: 144 + int.from_bytes(content[140:144], "little")] + deflated_zeros(2**30)
