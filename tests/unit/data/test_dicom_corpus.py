"""Every file that pydicom ships, through `read_image`: rendered, or refused with the reason that this table expects."""

import warnings
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from hilum.core.errors import ImageError
from hilum.data import dicom
from hilum.data.dicom_pixels import DECODERS, NATIVE, check_header, decode
from hilum.data.images import DecodedImage, read_image

ROOT = Path(pydicom.__file__).parent / "data"
FILES = sorted(path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
THESE = pytest.mark.skipif(pydicom.__version__ != "3.0.2", reason="the tables are of the files of pydicom 3.0.2")

REFUSED = {
    "not_an_image": {  # text, JSON, gzip, an ICC profile, source files
        "FileInfo.txt", "README", "README.md", "README.txt", "__init__.py", "crayons.icc",
        "data_manager.py", "download.py",
        "hashes.json", "retry.py", "rtplan.dump", "rtstruct.dump", "test1.json", "test_PN.json", "urls.json",
        "zipMR.gz",
        "ExplVR_BigEndNoMeta.dcm",  # a bare data set in big endian: nothing in it says DICOM
        "no_meta.dcm",  # a bare data set after a stray byte
    },
    "unsupported_transfer_syntax": {"JPEG-lossy.dcm", "JPGExtended.dcm"},  # lossy JPEG of 12 bits: nobody decodes it
    "unsupported_pixels": {"SC_rgb_rle_32bit.dcm", "liver_1frame.dcm", "liver_expb_1frame.dcm"},  # 32-bit RGB, 1 bit
    "multi_frame": {
        "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_rle_32bit_2frame.dcm",
        "examples_ybr_color.dcm", "rtdose.dcm", "rtdose_expb.dcm", "rtdose_rle.dcm",
    },
    "size_mismatch": {
        "MR_small_padded.dcm",  # 128 bytes more than the image has
        "JPEG2000-embedded-sequence-delimiter.dcm",  # the delimiter stands where the width should
    },
    "truncated": {"MR_truncated.dcm"},
    "damaged": {"badVR.dcm"},  # a number of frames that is no number
    "damaged_header": {"meta_missing_tsyntax.dcm", "nested_priv_SQ.dcm"},  # pixels, and nothing that describes them
}  # fmt: skip
WITHOUT_PIXELS = 83  # structure sets, reports, a DICOMDIR and its stubs, palettes, character sets, ...
SYNTAXES = {  # rendered, refused although there are pixels
    "Implicit VR Little Endian": (3, 2),
    "Explicit VR Little Endian": (50, 4),
    "Explicit VR Big Endian": (5, 2),
    "Deflated Explicit VR Little Endian": (1, 0),
    "RLE Lossless": (4, 5),
    "JPEG Baseline (Process 1)": (13, 1),
    "JPEG Extended (Process 2 and 4)": (0, 2),
    "JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 [Selection Value 1])": (1, 0),
    "JPEG-LS Lossless Image Compression": (1, 0),
    "JPEG-LS Lossy (Near-Lossless) Image Compression": (4, 0),
    "JPEG 2000 Image Compression (Lossless Only)": (4, 0),
    "JPEG 2000 Image Compression": (3, 1),
}
TWINS = (
    "MR_small MR_small_RLE MR_small_bigendian MR_small_expb MR_small_implicit MR_small_jp2klossless "
    "MR_small_jpeg_ls_lossless",
    "rtdose_1frame rtdose_expb_1frame rtdose_rle_1frame",
    "SC_rgb_rle SC_rgb_jpeg_gdcm SC_rgb_gdcm_KY",
    "SC_rgb_small_odd SC_rgb_small_odd_big_endian",
    "SC_rgb_jpeg_dcmd SC_rgb_jpeg SC_jpeg_no_color_transform",
)
"""The same image, the first not compressed or in a lossless syntax that pydicom decodes itself."""


@lru_cache
def outcomes() -> dict[Path, DecodedImage | str]:
    """What became of each file; anything but an `ImageError` fails the test that asks."""
    found: dict[Path, DecodedImage | str] = {}
    for path in FILES:
        try:
            found[path] = read_image(path)
        except ImageError as error:
            found[path] = error.reason
    return found


def rendered() -> dict[Path, DecodedImage]:
    return {path: image for path, image in outcomes().items() if isinstance(image, DecodedImage)}


def file(name: str) -> Path:
    return ROOT / "test_files" / f"{name}.dcm"


@THESE
def test_each_file_has_the_outcome_of_the_table() -> None:
    names: dict[str, set[str]] = {}
    for path, outcome in outcomes().items():
        names.setdefault(outcome if isinstance(outcome, str) else "rendered", set()).add(path.name)
    counts = Counter(outcome if isinstance(outcome, str) else "rendered" for outcome in outcomes().values())
    assert counts["no_pixel_data"] == WITHOUT_PIXELS
    assert counts["rendered"] == 89
    assert {reason: names[reason] for reason in names if reason not in ("rendered", "no_pixel_data")} == REFUSED
    assert sum(counts.values()) == len(FILES)


@THESE
def test_which_transfer_syntaxes_render() -> None:
    counts: dict[str, list[int]] = {}
    for path, outcome in outcomes().items():
        if outcome in ("not_an_image", "no_pixel_data"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            syntax = pydicom.dcmread(path, stop_before_pixels=True).file_meta.get("TransferSyntaxUID")
        if syntax is not None:
            counts.setdefault(syntax.name, [0, 0])[isinstance(outcome, str)] += 1
    assert {name: tuple(both) for name, both in counts.items()} == SYNTAXES
    named = {pydicom.uid.UID(syntax).name for syntax in {*NATIVE, *DECODERS}}
    assert set(SYNTAXES) <= named
    # No file of these was at hand: their decoders are there, that they decode is not shown.
    assert named - set(SYNTAXES) == {
        "JPEG Lossless, Non-Hierarchical (Process 14)",  # test_dicom.py makes one
        "High-Throughput JPEG 2000 Image Compression",
        "High-Throughput JPEG 2000 Image Compression (Lossless Only)",
        "High-Throughput JPEG 2000 with RPCL Options Image Compression (Lossless Only)",
    }


def test_rendered_files_have_their_size_and_are_not_constant_unless_their_pixels_are() -> None:
    """Against pydicom's own decoding: grey is a function of the stored value, rising or falling all the way."""
    shown = 0
    for path, image in rendered().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(path)
            stored = data.pixel_array
        assert image.pixels.dtype == np.uint8, path
        assert (image.rows, image.cols) == (data.Rows, data.Columns), path
        assert (image.pixels.min() == image.pixels.max()) == (stored.min() == stored.max()), path
        if "aspect_corrected" in image.quality:
            continue
        assert image.pixels.shape == (data.Rows, data.Columns), path
        if stored.ndim == 2 and image.photometric != "PALETTE COLOR":
            pairs = np.unique(
                np.stack([stored.ravel().astype(np.int64), image.pixels.ravel().astype(np.int64)]), axis=1
            )
            assert pairs.shape[1] == len(np.unique(stored)), path
            steps = np.sign(np.diff(pairs[1]))
            assert not {-1, 1} <= set(steps.tolist()), path
            falling = image.photometric == "MONOCHROME1"
            assert (steps.sum() < 0) == falling or len(steps) == 0, path
            shown += 1
    assert shown >= 50


@pytest.mark.parametrize("names", TWINS)
def test_lossless_syntaxes_give_the_pixels_of_their_twin(names: str) -> None:
    def stored(name: str) -> np.ndarray:
        with dicom._silent():
            data = dicom._parse(file(name).read_bytes())
            return decode(data, *check_header(data), [])

    first, *others = names.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = pydicom.dcmread(file(first)).pixel_array
    np.testing.assert_array_equal(stored(first), reference)
    for other in others:
        np.testing.assert_array_equal(stored(other), reference, err_msg=other)
    if "jpeg_dcmd" not in names:  # twins of a lossy file differ in nothing else either
        for one, another in pairwise([first, *others]):
            np.testing.assert_array_equal(read_image(file(one)).pixels, read_image(file(another)).pixels)


@pytest.mark.parametrize("name", ["693_J2KI", "MR_small_jpeg_ls_lossless", "MR_small_RLE", "MR_small_expb"])
def test_windowed_files_equal_pydicom(name: str) -> None:
    data = pydicom.dcmread(file(name))
    expected = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data).astype(np.float64)
    mine = read_image(file(name)).pixels
    if data.get("RescaleSlope") is None:
        bits = data.BitsStored
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if data.PixelRepresentation else (0, 2**bits - 1)
        assert np.abs(mine - (expected - low) / (high - low) * 255).max() <= 0.5 + 1e-6
    else:
        assert np.corrcoef(mine.ravel(), expected.ravel())[0, 1] > 0.9999


def test_overlays_are_not_drawn() -> None:
    data = pydicom.dcmread(file("examples_overlay"))
    drawn = [element.tag for element in data if element.tag.group == 0x6000]
    assert drawn
    for tag in drawn:
        del data[tag]
    buffer = pydicom.filebase.DicomBytesIO()
    data.save_as(buffer)
    np.testing.assert_array_equal(read_image(buffer.getvalue()).pixels, read_image(file("examples_overlay")).pixels)


def test_mismatched_signs_are_flagged() -> None:
    assert "sign_mismatch" in read_image(file("J2K_pixelrep_mismatch")).quality
    assert "sign_mismatch" not in read_image(file("MR_small_jp2klossless")).quality
