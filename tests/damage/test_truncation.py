"""A file that is cut anywhere is never taken for whole; neither is a JPEG or PNG that was cut and then closed.

Whole means: what the cut took away holds no part of the picture. A DICOM file may go on behind its pixels (padding, a
delimiter, private groups); without those, the picture must be the same to the last pixel, or the file is refused.
"""

import io
import zlib

import numpy as np
import pydicom
import pytest
from damage_inputs import chunk, compressed, dicoms, phantom, phantom_dicoms, rasters, saved
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames

from hilum.core.errors import ImageError
from hilum.data.images import read_image

RASTERS, DICOMS = rasters(), dicoms()
CUT_DICOMS = [
    *phantom_dicoms(), "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "MR_small_bigendian.dcm", "SC_rgb_small_odd.dcm",
    "image_dfl.dcm",
]  # fmt: skip


def outcome(content: bytes) -> str | np.ndarray:
    try:
        return read_image(content).pixels
    except ImageError as error:
        return error.reason


@pytest.mark.parametrize("name", RASTERS)
def test_png_and_jpeg_cut_at_every_stride(name):
    content = RASTERS[name]
    for length in [*range(0, len(content), 37), *range(len(content) - 40, len(content))]:
        expected = ("truncated",) if length else ("zero_bytes",)
        assert outcome(content[:length]) in expected, length


def end_of_pixels(content: bytes) -> int:
    """Where the last byte is that the picture needs, found by the bytes of the element's value."""
    data = pydicom.dcmread(io.BytesIO(content), force=True)
    value = data.PixelData
    if data.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(content[144 + int.from_bytes(content[140:144], "little") :])
        return len(content) - len(inflater.unused_data)
    at = content.find(value)
    if at < 0:  # fragments are stored with headers between them
        return content.rindex(b"\xfe\xff\xdd\xe0")
    bits = data.Rows * data.Columns * data.SamplesPerPixel * data.BitsAllocated
    native = not data.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian).is_compressed
    return at + (bits // 8 if native else len(value))


@pytest.mark.parametrize("name", CUT_DICOMS)
def test_dicom_cut_at_every_stride(name):
    content = DICOMS[name]
    whole, end = read_image(content).pixels, end_of_pixels(content)
    around = range(max(end - 12, 0), min(end + 12, len(content)))
    for length in [*range(0, len(content), 64), *around, *range(len(content) - 3, len(content))]:
        found = outcome(content[:length])
        if length < end:
            assert isinstance(found, str), f"cut to {length} of {len(content)} bytes, pixels end at {end}: accepted"
        elif not isinstance(found, str):
            np.testing.assert_array_equal(found, whole)


def test_what_follows_the_pixels_is_not_needed():
    content = DICOMS["trailing"]
    end = end_of_pixels(content)
    assert len(content) - end > 300
    np.testing.assert_array_equal(outcome(content[:end]), read_image(content).pixels)


def closed(name: str) -> list[bytes]:
    """A PNG or JPEG cut in its coded data, with a proper end put behind."""
    content = RASTERS[name]
    if name.startswith("jpeg"):
        first = content.index(b"\xff\xda") + 12
        return [content[:length] + b"\xff\xd9" for length in range(first, len(content) - 2, 5)]
    at = content.index(b"IDAT") - 4
    length = int.from_bytes(content[at : at + 4], "big")
    body = content[at + 8 : at + 8 + length]
    stops = range(0, length - 1, max(1, length // 200))
    return [content[:at] + chunk(b"IDAT", body[:stop]) + chunk(b"IEND", b"") for stop in stops]


def last_block(rotated: bool) -> tuple[slice, slice]:
    return slice(-16, None), slice(0, 16) if rotated else slice(-16, None)


@pytest.mark.parametrize("name", RASTERS)
def test_cut_and_closed(name):
    """Decoders fill a picture whose data end early. Refused, unless the cut is within the very last block.

    That block (8 x 8 pixels, 16 x 16 in colour) is then decoded from made-up bits, which nothing gives away.
    """
    whole = read_image(RASTERS[name]).pixels
    files = closed(name)
    refused = 0
    for content in files:
        found = outcome(content)
        if isinstance(found, str):
            assert found in ("truncated", "damaged")
            refused += 1
            continue
        assert name.startswith("jpeg")
        assert "progressive" not in name
        different = found != whole
        different[last_block("exif" in name)] = False
        assert not different.any()
    assert refused >= len(files) - 8


def test_a_picture_that_really_ends_in_mid_grey_is_read():
    """What the decoder fills with looks the same; the second look tells them apart."""
    pixels = phantom().copy()
    pixels[-24:] = 128
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}):
        content = saved(Image.fromarray(pixels), "JPEG", quality=95, **options)
        np.testing.assert_array_equal(read_image(content).pixels, np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("colour", [False, True])
def test_progressive_files_without_their_last_scans(colour):
    """Every prefix of the scans is a JPEG that decoders accept, only blurred."""
    content = RASTERS["jpeg_colour_progressive" if colour else "jpeg_progressive"]
    scans = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]
    assert len(scans) >= 4
    for at in scans[1:]:
        tables = content.rfind(b"\xff\xc4", 0, at)  # the tables of the next scan go too, or stay: both are sound
        for stop in (at, tables):
            Image.open(io.BytesIO(content[:stop] + b"\xff\xd9")).load()
            assert outcome(content[:stop] + b"\xff\xd9") == "truncated"


@pytest.mark.parametrize(
    "name", ["jpeg", "SC_rgb_jpeg_gdcm.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm", "rle"]
)
def test_streams_inside_dicom_cut_and_closed(name):
    data = pydicom.dcmread(io.BytesIO(DICOMS[name]))
    stream = next(generate_frames(data.PixelData, number_of_frames=1))
    whole = read_image(DICOMS[name]).pixels
    accepted = 0
    for length in range(4, len(stream) - 4, max(7, len(stream) // 150)):
        for ending in (b"", b"\xff\xd9"):
            data.PixelData = encapsulate([stream[:length] + ending])
            data["PixelData"].is_undefined_length = True
            buffer = io.BytesIO()
            data.save_as(buffer)
            found = outcome(buffer.getvalue())
            accepted += not isinstance(found, str) and not np.array_equal(found, whole)
    assert accepted <= (3 if name == "jpeg" else 0)  # within the last block, as above


def test_a_jpeg_in_dicom_that_ends_in_mid_grey_is_read():
    pixels = phantom().copy()
    pixels[-24:] = 128
    stream = saved(Image.fromarray(pixels), "JPEG", quality=95)
    content = compressed(pixels, uid.JPEGBaseline8Bit, stream, WindowCenter=128, WindowWidth=256)
    assert read_image(content).pixels.shape == pixels.shape
