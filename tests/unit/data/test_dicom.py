"""Rendering DICOM against pydicom's own functions and hand-made cases; refusing what is not one whole image."""

import io
import struct
import subprocess
import sys
import zlib
from collections import Counter
from typing import Any

import cv2
import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from hilum.core.errors import ImageError, UnknownNameError, UnsupportedImageError
from hilum.data import dicom, dicom_pixels
from hilum.data.images import read_dicom_header, read_image

VALUES = np.random.default_rng(0).integers(100, 3900, (48, 40)).astype(np.uint16)
SECRET = "Doe^Jane"


def dataset(pixels: np.ndarray = VALUES, syntax: uid.UID = uid.ExplicitVRLittleEndian, **elements: Any) -> FileDataset:
    """A digital radiograph with the fewest elements, and whatever is passed."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    bits = 8 * pixels.dtype.itemsize
    defaults: dict[str, Any] = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "PatientID": "MRN-77",
        "PatientName": SECRET,
        "ViewPosition": "PA",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in {**defaults, **elements}.items():
        if value is not None:
            setattr(data, keyword, value)
    return data


def written(data: FileDataset) -> bytes:
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def pixels_of(data: FileDataset, **options: Any) -> np.ndarray:
    return read_image(written(data), **options).pixels


def reason(content: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(content)
    assert SECRET not in str(caught.value)
    assert "MRN-77" not in str(caught.value)
    return caught.value.reason


def by_percentiles(values: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    low, high = np.percentile((values if used is None else used).astype(np.float64), (0.5, 99.5))
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)


def by_pydicom(values: np.ndarray, data: Dataset) -> np.ndarray:
    """Modality then VOI by pydicom, from its output range to [0, 255]."""
    with np.errstate(over="ignore"):
        out = apply_voi_lut(apply_modality_lut(values, data), data).astype(np.float64)
    signed, bits = int(data.PixelRepresentation), int(data.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if data.get("RescaleSlope") is not None:  # pydicom scales the output range too
        low, high = (end * float(data.RescaleSlope) + float(data.RescaleIntercept) for end in (low, high))
    return (out - low) / (high - low) * 255


def lut(values: list[int], first: int, bits: int, as_bytes: bool) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "OW" if as_bytes else "US", np.array(values, "<u2").tobytes() if as_bytes else values)
    return Sequence([item])


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(("center", "width"), [(2000, 1500), (2000.5, 1), (1000, 4096), (3000, 37.5)])
@pytest.mark.parametrize("rescale", [None, (1.5, -1024.0)])
def test_windows_equal_pydicom(function, center, width, rescale):
    slope, intercept = rescale if rescale else (None, None)
    data = dataset(WindowCenter=center, WindowWidth=width, VOILUTFunction=function, BitsStored=12, HighBit=11,
                   RescaleSlope=slope, RescaleIntercept=intercept)  # fmt: skip
    image = read_image(written(data))
    assert image.intensity == "window"
    assert np.abs(image.pixels - by_pydicom(VALUES, data)).max() <= 0.5 + 1e-6


def test_rounding_not_truncation():
    image = read_image(written(dataset(WindowCenter=2000, WindowWidth=1500, VOILUTFunction="LINEAR_EXACT")))
    exact = np.clip((VALUES.astype(np.float64) - 2000) / 1500 + 0.5, 0, 1) * 255
    np.testing.assert_array_equal(image.pixels, np.rint(exact))


def test_the_first_of_several_windows_is_used():
    several = dataset(WindowCenter=["2000", "500"], WindowWidth=["1500", "100"])
    np.testing.assert_array_equal(pixels_of(several), pixels_of(dataset(WindowCenter=2000, WindowWidth=1500)))


@pytest.mark.parametrize(
    "window",
    [
        {"WindowCenter": 2000, "WindowWidth": 0},
        {"WindowCenter": 2000, "WindowWidth": -5},
        {"WindowCenter": 2000, "WindowWidth": 0.5},  # LINEAR needs at least 1
        {"WindowCenter": 60000, "WindowWidth": 100},  # outside the values
        {"WindowCenter": 2000},
    ],
)
def test_a_window_that_cannot_be_used_is_ignored_with_a_flag(window):
    image = read_image(written(dataset(**window)))
    assert image.intensity == "percentile"
    assert "window_ignored" in image.quality
    np.testing.assert_array_equal(image.pixels, by_percentiles(VALUES))


@pytest.mark.parametrize("as_bytes", [True, False])
def test_voi_lut_wins_over_the_window_and_equals_pydicom(as_bytes):
    table = [int(value) for value in np.linspace(0, 1, 4096) ** 0.5 * 1023]
    data = dataset(WindowCenter=2000, WindowWidth=1500, VOILUTSequence=lut(table, 0, 10, as_bytes))
    image = read_image(written(data))
    assert image.intensity == "voi_lut"
    assert np.abs(image.pixels - apply_voi_lut(VALUES, data).astype(np.float64) / 1023 * 255).max() <= 0.5 + 1e-6


def test_voi_lut_that_starts_inside_the_values():
    data = dataset(VOILUTSequence=lut(list(range(0, 2000)), 1000, 11, True))
    expected = np.clip(VALUES.astype(np.float64) - 1000, 0, 1999) / 2047 * 255
    assert np.abs(pixels_of(data) - expected).max() <= 0.5 + 1e-6


def test_modality_lut_wins_over_rescale():
    table = [65535 - 16 * value for value in range(4096)]
    sequence = lut(table, 0, 16, True)
    sequence[0].ModalityLUTType = "US"
    data = dataset(ModalityLUTSequence=sequence, RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_array_equal(pixels_of(data), by_percentiles(np.array(table)[VALUES]))


def test_an_empty_lut_is_ignored_with_a_flag():
    item = Dataset()
    item.LUTExplanation = "nothing else"
    image = read_image(written(dataset(VOILUTSequence=Sequence([item]))))
    assert image.intensity == "percentile"
    assert "lut_ignored" in image.quality


@pytest.mark.parametrize("options", [{}, {"WindowCenter": 2000, "WindowWidth": 1500}])
@pytest.mark.parametrize(
    "inverse",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ],
)
def test_inverted_once_at_the_end(options, inverse):
    upright, inverted = pixels_of(dataset(**options)), pixels_of(dataset(**options, **inverse))
    assert np.abs(255 - upright.astype(int) - inverted).max() <= 1  # rounding of a half goes the other way
    assert (255 - upright.astype(int) == inverted).mean() > 0.9


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_left_out_and_painted_black(photometric):
    padded = VALUES.copy()
    padded[:10], padded[:, :5] = 65535, 65533
    data = dataset(padded, PhotometricInterpretation=photometric)
    data.add_new("PixelPaddingValue", "US", 65535)
    data.add_new("PixelPaddingRangeLimit", "US", 65530)
    pixels, inside = pixels_of(data), padded < 65530
    assert (pixels[~inside] == 0).all()
    expected = by_percentiles(padded, padded[inside])
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(pixels[inside] - expected[inside]).max() <= 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("value", [0, 65535])
def test_padding_is_black_whatever_the_window_makes_of_it(photometric, value):
    padded = VALUES.copy()
    padded[:10] = value
    data = dataset(padded, PhotometricInterpretation=photometric, WindowCenter=2000, WindowWidth=1500)
    plain = pixels_of(data)
    data.add_new("PixelPaddingValue", "US", value)
    image = read_image(written(data))
    assert image.intensity == "window"
    assert (image.pixels[:10] == 0).all()
    np.testing.assert_array_equal(image.pixels[10:], plain[10:])
    assert (plain[:10] == 255).all() == ((value == 65535) == (photometric == "MONOCHROME2"))


def test_a_window_that_only_padding_lies_in_is_ignored():
    padded = VALUES.copy()
    padded[:10] = 65535
    data = dataset(padded, WindowCenter=65000, WindowWidth=1000)
    assert read_image(written(data)).intensity == "window"
    data.add_new("PixelPaddingValue", "US", 65535)
    image = read_image(written(data))
    assert (image.intensity, "window_ignored" in image.quality) == ("percentile", True)


def test_signed_padding_of_an_unsigned_element():
    padded = VALUES.astype(np.int16)
    padded[:10] = -2000
    data = dataset(padded)
    data.add_new("PixelPaddingValue", "SS", -2000)
    pixels = pixels_of(data)
    np.testing.assert_array_equal(pixels[10:], by_percentiles(padded, padded[10:])[10:])
    assert (pixels[:10] == 0).all()


def test_signed_values():
    signed = VALUES.astype(np.int16) - 2000
    np.testing.assert_array_equal(pixels_of(dataset(signed)), by_percentiles(signed))


def test_8_bit_dicom_follows_the_policy_too():
    narrow = (VALUES // 64 + 60).astype(np.uint8)
    image = read_image(written(dataset(narrow)))
    np.testing.assert_array_equal(image.pixels, by_percentiles(narrow))
    assert (image.bits_stored, image.intensity) == (8, "percentile")


def test_32_bit_values():
    large = VALUES.astype(np.uint32) * 100_000
    np.testing.assert_array_equal(pixels_of(dataset(large)), by_percentiles(large))


def test_bits_stored_that_are_too_few_are_flagged_and_the_values_kept():
    image = read_image(written(dataset(BitsStored=10, HighBit=9)))
    assert "bits_stored_mismatch" in image.quality
    np.testing.assert_array_equal(image.pixels, by_percentiles(VALUES))


def test_overlay_bits_are_masked():
    overlaid = VALUES.copy()
    overlaid[::3] |= 0x8000
    data = dataset(overlaid, BitsStored=12, HighBit=11)
    data.add_new(0x60000100, "US", 1)
    data.add_new(0x60000102, "US", 15)
    np.testing.assert_array_equal(pixels_of(data), by_percentiles(VALUES))


def test_values_in_the_high_bits_are_shifted():
    np.testing.assert_array_equal(pixels_of(dataset(VALUES << 4, BitsStored=12, HighBit=15)), by_percentiles(VALUES))


def test_signs_that_were_not_extended():
    signed = VALUES.astype(np.int16) - 2000
    cut = (signed & 0x0FFF).astype(np.int16)
    np.testing.assert_array_equal(pixels_of(dataset(cut, BitsStored=12, HighBit=11)), by_percentiles(signed))


def test_colour_is_luma_and_equal_channels_keep_their_value():
    grey = (VALUES // 16).astype(np.uint8)
    colour = np.stack([grey, grey, grey], -1)
    data = dataset(colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    image = read_image(written(data))
    np.testing.assert_array_equal(image.pixels, grey)
    assert image.intensity == "as_is"


@pytest.mark.parametrize("photometric", ["YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "HSV", "ARGB",
                                         "CMYK", "MONOCHROME2", "PALETTE COLOR"])  # fmt: skip
def test_colour_of_an_unknown_kind_is_refused(photometric):
    colour = np.stack([(VALUES // 16).astype(np.uint8)] * 3, -1)
    data = dataset(colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    assert read_image(written(data)).photometric == "RGB"
    data.PhotometricInterpretation = photometric
    assert reason(written(data)) == "unsupported_pixels"


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "HSV", "SOMETHING"])
def test_one_sample_a_pixel_is_grey_or_a_palette(photometric):
    assert reason(written(dataset(PhotometricInterpretation=photometric))) == "unsupported_pixels"


def test_uncompressed_ybr_is_converted():
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    data = dataset(colour, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=0)
    # The luma of what Y, Cb, Cr mean is Y, as long as no channel is cut off (PS3.3 C.7.6.3.1.2).
    luma, blue, red = (colour[..., channel].astype(np.float64) for channel in range(3))
    channels = [luma + 1.402 * (red - 128), luma + 1.772 * (blue - 128)]
    channels.append((luma - 0.299 * channels[0] - 0.114 * channels[1]) / 0.587)
    inside = np.all([(channel > 1) & (channel < 254) for channel in channels], axis=0)
    assert inside.sum() > 50
    assert np.abs(pixels_of(data)[inside] - luma[inside]).max() <= 1.5


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_a_palette_is_looked_up(bits, dtype):
    index = (VALUES // 16).astype(np.uint8)
    data = dataset(index, PhotometricInterpretation="PALETTE COLOR")
    grey = (np.arange(256) ** 2 // 256).astype(np.uint16) * (257 if bits == 16 else 1)
    for channel in ("Red", "Green", "Blue"):
        setattr(data, f"{channel}PaletteColorLookupTableDescriptor", [256, 0, bits])
        setattr(data, f"{channel}PaletteColorLookupTableData", grey.astype(dtype).tobytes())
    assert np.abs(pixels_of(data).astype(int) - (index.astype(int) ** 2 // 256)).max() <= 1


def test_short_side_from_full_precision():
    data = dataset(WindowCenter=2000, WindowWidth=4000, VOILUTFunction="LINEAR_EXACT")
    exact = np.clip((VALUES.astype(np.float64) - 2000) / 4000 + 0.5, 0, 1) * 255
    small = pixels_of(data, short_side=20)
    assert small.shape == (24, 20)
    assert np.abs(small - exact.reshape(24, 2, 20, 2).mean((1, 3))).max() <= 0.5 + 1e-3


def test_pixels_that_are_not_square_are_made_square():
    image = read_image(written(dataset(PixelAspectRatio=[2, 1])))
    assert image.pixels.shape == (48, 20)
    assert (image.rows, image.cols) == (48, 40)
    assert "aspect_corrected" in image.quality
    assert read_image(written(dataset(ImagerPixelSpacing=[0.14, 0.14]))).pixels.shape == (48, 40)
    exact = by_percentiles(VALUES).reshape(48, 20, 2).mean(2)
    assert np.abs(image.pixels - exact).max() <= 1


@pytest.mark.parametrize("ratio", [[10, 1], [0, 1], [1, 0]])
def test_an_aspect_ratio_that_cannot_be_meant_is_ignored_with_a_flag(ratio):
    image = read_image(written(dataset(PixelAspectRatio=ratio)))
    assert image.quality.count("aspect_ignored") == 1
    np.testing.assert_array_equal(image.pixels, by_percentiles(VALUES))
    assert read_image(written(dataset(PixelAspectRatio=ratio, ImagerPixelSpacing=[0.2, 0.1]))).pixels.shape == (48, 20)


def test_presentation_intent_is_flagged():
    assert "for_processing" in read_image(written(dataset(PresentationIntentType="FOR PROCESSING"))).quality
    assert "for_processing" not in read_image(written(dataset(PresentationIntentType="FOR PRESENTATION"))).quality


def test_burnt_in_text_is_flagged_and_stays():
    for said, flagged in {"YES": True, "NO": False, None: False}.items():
        image = read_image(written(dataset(BurnedInAnnotation=said)))
        assert ("burned_in_annotation" in image.quality) == flagged
        np.testing.assert_array_equal(image.pixels, by_percentiles(VALUES))


def film(inverted: bool) -> np.ndarray:
    """A chest in four strokes: dark air and lungs, bright body and mediastinum."""
    grey = np.full((64, 64), 2000.0)
    grey[:, :6], grey[:, -6:], grey[:10] = 100, 100, 100
    grey[16:40, 12:26], grey[16:40, 38:52] = 900, 900
    grey[16:50, 27:37] = 3500
    return (4095 - grey if inverted else grey).astype(np.uint16)


def test_polarity_is_checked_on_what_is_shown():
    """A film that is stored inverted is right when its header says so, and suspect when the header is silent."""
    for inverted, photometric, suspect in [
        (False, "MONOCHROME2", False), (True, "MONOCHROME1", False),
        (True, "MONOCHROME2", True), (False, "MONOCHROME1", True),
    ]:  # fmt: skip
        image = read_image(written(dataset(film(inverted), PhotometricInterpretation=photometric)))
        assert ("polarity_suspect" in image.quality) == suspect


@pytest.mark.parametrize("recipe", ["mimic-cxr-jpg-1", "chexpert-1"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("short_side", [None, 20, 17])
def test_published_presets_on_the_stored_values(recipe, photometric, short_side):
    """No window, no modality LUT, no padding: pixel values as they are, then what the authors did, then shrunk."""
    data = dataset(PhotometricInterpretation=photometric, WindowCenter=900, WindowWidth=100, RescaleSlope=-1,
                   RescaleIntercept=4095, PresentationLUTShape="INVERSE")  # fmt: skip
    data.add_new("PixelPaddingValue", "US", int(VALUES.max()))
    if recipe == "mimic-cxr-jpg-1":
        from_zero = VALUES.astype(np.float64) - VALUES.min()
        grey = (from_zero / from_zero.max() * 255).astype(np.uint8)
    else:
        grey = cv2.convertScaleAbs(VALUES, alpha=255.0 / VALUES.max())
    equalised = cv2.equalizeHist(255 - grey if photometric == "MONOCHROME1" else grey)
    buffer = io.BytesIO()
    Image.fromarray(equalised).save(buffer, "PNG")
    image = read_image(written(data), short_side=short_side, recipe=recipe)
    # The 8-bit file that the authors would have written is read to the same pixels, under any recipe.
    for own in (recipe, "hilum-grey-1"):
        published = read_image(buffer.getvalue(), short_side=short_side, recipe=own)
        np.testing.assert_array_equal(image.pixels, published.pixels)
        assert (image.intensity, published.intensity) == ("equalised", "as_is")


def test_an_unknown_recipe_is_no_fault_of_the_file():
    with pytest.raises(UnknownNameError):
        read_image(written(dataset()), recipe="mimic")


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.RLELossless,
                                    uid.JPEG2000Lossless, uid.DeflatedExplicitVRLittleEndian])  # fmt: skip
def test_every_lossless_syntax_gives_the_same_pixels(syntax):
    data = dataset(WindowCenter=2000, WindowWidth=1500)
    if syntax.is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian:
        data.compress(syntax)
    else:
        data = dataset(syntax=syntax, WindowCenter=2000, WindowWidth=1500)
    image = read_image(written(data))
    np.testing.assert_array_equal(image.pixels, pixels_of(dataset(WindowCenter=2000, WindowWidth=1500)))


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless"])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (16, False), (16, True)])
def test_lossless_jpeg_that_gdcm_wrote(tmp_path, name, bits, signed):
    values = (VALUES.astype(np.int64) << 4 >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    if signed:
        values = (values.astype(np.int64) - 2**15).astype(np.int16)
    data = dataset(values, BitsStored=bits, HighBit=bits - 1)
    (tmp_path / "plain.dcm").write_bytes(written(data))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(tmp_path / "plain.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    assert writer.Write()
    image = read_image(tmp_path / "packed.dcm")
    assert uid.UID(image.mode.removeprefix("dicom:")).is_compressed
    np.testing.assert_array_equal(image.pixels, by_percentiles(values))


def packed(pixels: np.ndarray, **elements: Any) -> bytes:
    """JPEG 2000 of 12 bits; `elements` change what the header says of it afterwards."""
    data = dataset(pixels, BitsStored=12, HighBit=11)
    data.compress(uid.JPEG2000Lossless)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return written(data)


@pytest.mark.parametrize("bits", [10, 11, 12, 14, 16])
@pytest.mark.parametrize("values", [VALUES, VALUES.astype(np.int16) - 2000])
def test_jpeg_2000_of_other_bits_than_declared(values, bits):
    """The stream is trusted; the header is flagged where the values do not fit in it."""
    image = read_image(packed(values, BitsStored=bits, HighBit=bits - 1))
    np.testing.assert_array_equal(image.pixels, by_percentiles(values))
    assert ("bits_stored_mismatch" in image.quality) == (bits < 12)


def test_jpeg_2000_of_another_sign_than_declared_follows_the_header_with_a_flag():
    signed = VALUES.astype(np.int16) - 2000
    for values, declared, meant in [
        (VALUES, 1, np.where(VALUES < 2048, VALUES, VALUES.astype(int) - 4096)),
        (signed, 0, signed.astype(int) & 0x0FFF),
    ]:
        image = read_image(packed(values, PixelRepresentation=declared))
        assert "sign_mismatch" in image.quality
        np.testing.assert_array_equal(image.pixels, by_percentiles(meant))
    assert "sign_mismatch" not in read_image(packed(signed)).quality


def test_jpeg_2000_that_does_not_fit_the_declared_words_is_refused():
    assert reason(packed(VALUES, BitsAllocated=8, BitsStored=8, HighBit=7)) == "damaged"
    assert reason(packed(VALUES, SamplesPerPixel=3, PhotometricInterpretation="RGB")) == "damaged"


def jpeg_dicom(grey: np.ndarray, **elements: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    data = dataset(grey, uid.JPEGBaseline8Bit, **{"PixelData": encapsulate([buffer.getvalue()]), **elements})
    data["PixelData"].is_undefined_length = True
    return written(data)


def test_jpeg_baseline_inside_dicom():
    grey = (VALUES // 16).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    pixels = read_image(jpeg_dicom(grey, WindowCenter=128, WindowWidth=256, VOILUTFunction="LINEAR_EXACT")).pixels
    decoded = np.asarray(Image.open(buffer)).astype(np.float64)
    assert np.abs(pixels - decoded / 256 * 255).max() <= 1.5  # decoders may differ by one


def test_preamble_and_transfer_syntax_are_repaired():
    expected = by_percentiles(VALUES)
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        content = written(dataset(syntax=syntax))
        np.testing.assert_array_equal(read_image(content[132:]).pixels, expected)  # no preamble, no prefix
        length = struct.unpack_from("<I", content, 140)[0]
        body = content[144 + length :]
        np.testing.assert_array_equal(read_image(body).pixels, expected)  # no file meta information either
        np.testing.assert_array_equal(read_image(content[:132] + body).pixels, expected)


def test_compressed_pixels_without_a_transfer_syntax_are_refused():
    content = jpeg_dicom((VALUES // 16).astype(np.uint8))
    length = struct.unpack_from("<I", content, 140)[0]
    assert reason(content[:132] + content[144 + length :]) in {"size_mismatch", "damaged"}


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"PixelData": None}, "no_pixel_data"),
        ({"PixelData": b""}, "no_pixel_data"),
        ({"NumberOfFrames": 2, "PixelData": VALUES.tobytes() * 2}, "multi_frame"),
        ({"Rows": 49}, "size_mismatch"),
        ({"Rows": 47}, "size_mismatch"),
        ({"Columns": 39, "Rows": 48}, "size_mismatch"),
        ({"Rows": 0}, "damaged"),
        ({"Rows": 60000, "Columns": 60000}, "too_large"),
        ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, "unsupported_pixels"),
        ({"SamplesPerPixel": 4}, "unsupported_pixels"),
        ({"PhotometricInterpretation": None}, "damaged_header"),
        ({"BitsStored": None}, "damaged_header"),
    ],
)
def test_reasons(elements, expected):
    assert reason(written(dataset(**elements))) == expected


def test_float_pixels_are_unsupported():
    data = dataset(PixelData=None)
    data.FloatPixelData = VALUES.astype(np.float32).tobytes()
    assert reason(written(data)) == "unsupported_pixels"


def test_one_frame_declared_as_such_is_fine():
    for frames in (1, "", 0):
        assert read_image(written(dataset(NumberOfFrames=frames))).pixels.shape == VALUES.shape


def test_a_stream_of_another_size_than_declared():
    grey = (VALUES // 16).astype(np.uint8)
    assert reason(jpeg_dicom(grey, Rows=24)) == "size_mismatch"
    data = dataset()
    data.compress(uid.JPEG2000Lossless)
    data.Columns = 80
    assert reason(written(data)) == "size_mismatch"


def test_a_transfer_syntax_nobody_decodes():
    data = dataset(syntax=uid.MPEG2MPML, PixelData=encapsulate([b"\0\0\1\xb3" * 8]))
    data["PixelData"].is_undefined_length = True
    assert reason(written(data)) == "unsupported_transfer_syntax"


def test_a_missing_decoder_is_named_with_its_package(monkeypatch):
    class Decoder:
        available_plugins: tuple[str, ...] = ()

    monkeypatch.setattr(dicom_pixels, "get_decoder", lambda syntax: Decoder)
    data = dataset()
    data.compress(uid.JPEG2000Lossless)
    with pytest.raises(UnsupportedImageError, match="pip install") as caught:
        read_image(written(data))
    assert caught.value.reason == "missing_decoder"


def test_a_deflated_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(dicom, "MAX_INFLATED", 2**20)
    content = written(dataset(syntax=uid.DeflatedExplicitVRLittleEndian))
    start = 144 + struct.unpack_from("<I", content, 140)[0]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = packer.compress(bytes(2**24)) + packer.flush()
    assert reason(content[:start] + bomb) == "too_large"
    assert reason(content[:-200]) == "truncated"


def seeds() -> dict[str, bytes]:
    rle, j2k = dataset(), dataset()
    rle.compress(uid.RLELossless)
    j2k.compress(uid.JPEG2000Lossless)
    return {
        "implicit": written(dataset(syntax=uid.ImplicitVRLittleEndian, WindowCenter=2000, WindowWidth=500)),
        "explicit": written(dataset()),
        "deflated": written(dataset(syntax=uid.DeflatedExplicitVRLittleEndian)),
        "rle": written(rle),
        "j2k": written(j2k),
        "jpeg": jpeg_dicom((VALUES // 16).astype(np.uint8)),
    }


def test_truncated_at_every_stride_is_refused():
    for name, content in seeds().items():
        # What follows the last pixel: a padding byte; the (zero) length of the delimiter of encapsulated pixels.
        needed = len(content) - {"deflated": 1, "rle": 4, "j2k": 4, "jpeg": 4}.get(name, 0)
        for length in [*range(0, needed, 64), *range(needed - 9, needed)]:
            found = reason(content[:length])
            allowed = {"zero_bytes", "not_an_image", "truncated", "no_pixel_data", "damaged", "damaged_header"}
            assert found in allowed, (name, length, found)


def survives_mutations(count: int) -> Counter[str]:
    rng, outcomes = np.random.default_rng(0), Counter[str]()
    for content in seeds().values():
        for _ in range(count):
            changed = bytearray(content)
            for _ in range(rng.integers(1, 6)):
                at = int(rng.integers(128, min(len(changed), 900) if rng.random() < 0.7 else len(changed)))
                changed[at] = int(rng.integers(256))
            try:
                image = read_image(bytes(changed))
            except ImageError as error:
                outcomes[error.reason] += 1
                continue
            outcomes["read"] += 1
            assert image.pixels.size
            if "aspect_corrected" not in image.quality:
                assert image.pixels.shape == (image.rows, image.cols)
    return outcomes


def test_mutated_dicom_is_read_or_refused_with_a_reason():
    outcomes = survives_mutations(40)
    assert outcomes["read"] > 20
    assert len(outcomes) >= 5


@pytest.mark.slow
def test_mutated_dicom_is_read_or_refused_with_a_reason_in_many_cases():
    assert survives_mutations(3000)["read"] > 2000


FUZZ = """
import sys, warnings
from pathlib import Path
import numpy as np
from hilum.core.errors import ImageError
from hilum.data.images import read_image
rng = np.random.default_rng(0)
for path in map(Path, sys.argv[1:]):
    content = path.read_bytes()
    start = max(content.find(b"\\xff\\xd8\\xff"), 0)
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            low, high = (start, len(content)) if rng.random() < 0.6 else (128, max(start, 900))
            changed[int(rng.integers(low, min(high, len(content))))] = int(rng.integers(256))
        try:
            read_image(bytes(changed))
        except ImageError:
            pass
print("survived")
"""


@pytest.mark.slow
def test_damaged_streams_do_not_end_the_process():
    """GDCM ends the process on headers that contradict the data set; such streams must not reach it."""
    names = "SC_rgb_jpeg_gdcm MR_small_jpeg_ls_lossless JPEGLSNearLossless_08 SC_rgb_jpeg_dcmtk SC_rgb_jls_lossy_sample"
    files = [str(pydicom.data.get_testdata_file(f"{name}.dcm")) for name in names.split()]
    done = subprocess.run([sys.executable, "-c", FUZZ, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "survived"


def test_header_for_grouping(tmp_path):
    (tmp_path / "a.dcm").write_bytes(written(dataset(SeriesInstanceUID="9.9")))
    header = read_dicom_header(tmp_path / "a.dcm")
    assert header["PatientID"] == "MRN-77"
    assert header["StudyInstanceUID"] == "1.2.3"
    assert header["SOPInstanceUID"] == "1.2.3.4"
    assert header["ViewPosition"] == "PA"
    assert header["SeriesInstanceUID"] == "9.9"
    assert header["StudyDate"] == ""
    assert read_dicom_header(written(dataset(PixelData=None)))["PatientID"] == "MRN-77"
    whole = written(dataset(syntax=uid.DeflatedExplicitVRLittleEndian))
    for name, content in {"deflated": whole, "bare": written(dataset())[132:]}.items():
        (tmp_path / name).write_bytes(content)
        assert read_dicom_header(tmp_path / name)["PatientID"] == "MRN-77"
        assert read_dicom_header(content)["StudyInstanceUID"] == "1.2.3"
    with pytest.raises(ImageError) as caught:
        read_dicom_header(b"\x89PNG\r\n\x1a\n")
    assert caught.value.reason == "not_an_image"
