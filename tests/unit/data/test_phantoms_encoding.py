"""Phantoms as the files of real sources: read back to the same picture, refused where they must be, same bytes."""

import hashlib
import io

import cv2
import numpy as np
import pydicom
import pytest
from PIL import Image

from hilum.core.errors import ImageError, UnknownNameError
from hilum.data.images import read_dicom_header, read_image
from hilum.data.phantoms.encoding import FORMS, dicom, encode, raw12_inverted, spread, uid_of

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(2, axis=1)  # every value, 16 x 32


@pytest.mark.parametrize("form", ["png", "png_rgb", "png_rgba", "dicom", "dicom_monochrome1", "dicom_no_syntax"])
def test_what_is_read_back_is_the_picture(form):
    np.testing.assert_array_equal(read_image(encode(form, GREY, "a")).pixels, GREY)


@pytest.mark.parametrize(("form", "top"), [("png16", 65535), ("png12", 4095)])
def test_16_bit_png_holds_the_range_that_it_names(form, top):
    stored = np.asarray(Image.open(io.BytesIO(encode(form, GREY, "a"))))
    assert (stored.dtype, stored.min(), stored.max()) == (np.uint16, 0, top)
    np.testing.assert_array_equal(np.rint(stored / top * 255), GREY)
    assert read_image(encode(form, GREY, "a")).intensity == "percentile"


def test_jpeg_is_near():
    assert np.abs(read_image(encode("jpeg", GREY, "a")).pixels.astype(int) - GREY).max() <= 6


def test_without_a_window_the_reader_chooses():
    image = read_image(encode("dicom_no_window", GREY, "a"))
    assert (image.intensity, image.bits_stored, image.photometric) == ("percentile", 12, "MONOCHROME2")
    assert np.corrcoef(image.pixels.ravel(), GREY.ravel())[0, 1] > 0.999


def test_monochrome1_is_stored_inverted():
    stored = pydicom.dcmread(io.BytesIO(encode("dicom_monochrome1", GREY, "a"))).pixel_array
    np.testing.assert_array_equal(stored, 4095 - spread(GREY, 12))


def test_raw_is_big_endian_and_inverted():
    stored = np.frombuffer(raw12_inverted(GREY), ">u2").reshape(GREY.shape)
    assert (stored[0, 0], stored[-1, -1]) == (4095, 0)
    np.testing.assert_array_equal(np.rint((4095 - stored.astype(int)) / 4095 * 255), GREY)


def test_dicom_that_lacks_what_it_needs():
    content = encode("dicom_no_syntax", GREY, "a")
    assert "TransferSyntaxUID" not in pydicom.dcmread(io.BytesIO(content), force=True).file_meta
    with pytest.raises(ImageError) as caught:
        read_image(encode("dicom_no_pixels", GREY, "a"))
    assert caught.value.reason == "no_pixel_data"


def test_identifiers_come_from_the_id_and_the_caller():
    header = read_dicom_header(dicom(GREY, "a", PatientID="p1", ViewPosition="PA", Modality=None))
    assert (header["PatientID"], header["ViewPosition"], header["Modality"]) == ("p1", "PA", "")
    assert header["SOPInstanceUID"] == uid_of("a") != uid_of("b")
    assert pydicom.uid.UID(uid_of("a")).is_valid


@pytest.mark.parametrize("form", FORMS)
def test_same_bytes_every_time(form):
    once, again = encode(form, GREY, "a"), encode(form, GREY.copy(), "a")
    assert once == again
    # No version of a library and no date in it: the DICOM bytes are fixed for good.
    if form == "dicom":
        assert hashlib.sha256(once).hexdigest()[:16] == "26e33d843bbdc2cd"


def test_unknown_forms_name_the_nearest():
    with pytest.raises(UnknownNameError, match="'png16'"):
        encode("png61", GREY, "a")


def test_bgra_of_opencv_is_opaque():
    stored = cv2.imdecode(np.frombuffer(encode("png_rgba", GREY, "a"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert stored.shape == (16, 32, 4)
    assert (stored[..., 3] == 255).all()
