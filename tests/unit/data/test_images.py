"""Reading PNG and JPEG against Pillow and numpy, and refusing what is not whole."""

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin

from hilum.core.errors import ImageError, UnreadableImageError, UnsupportedImageError
from hilum.data.area import area_mean, resize_once, shrunk_size
from hilum.data.images import quality_flags, read_image, shrink


def film(height: int = 96, width: int = 80, seed: int = 0) -> np.ndarray:
    """Dark corners, bright middle, two dark lungs, and grain."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None] - 0.5
    body = 190 * np.exp(-(x**2 + y**2) / 0.12) - 90 * sum(np.exp(-((x - s) ** 2 + y**2) / 0.01) for s in (-0.2, 0.2))
    grain = np.random.default_rng(seed).normal(0, 5, (height, width))
    return np.clip(body + grain, 0, 255).astype(np.uint8)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def png_of(array: np.ndarray, colour: int) -> bytes:
    """A PNG of an array (H, W, channels), written by hand because Pillow writes no 16-bit colour."""
    bits = 8 * array.dtype.itemsize
    big = array.astype(array.dtype.newbyteorder(">"))
    return png(array.shape[1], array.shape[0], bits, colour, b"".join(b"\0" + row.tobytes() for row in big))


def reason(content: bytes | Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(content)
    return caught.value.reason


GREY = film()
COLOUR = Image.fromarray(np.stack([GREY, 255 - GREY, GREY // 2], -1))
SOUND = {
    "png": saved(Image.fromarray(GREY)),
    "png_rgba": saved(COLOUR.convert("RGBA")),
    "png_16": saved(Image.fromarray(GREY.astype(np.uint16) * 200)),
    "png_palette": saved(COLOUR.convert("P")),
    "jpeg": saved(Image.fromarray(GREY), "JPEG", quality=92),
    "jpeg_colour": saved(COLOUR, "JPEG"),
    "jpeg_progressive": saved(Image.fromarray(GREY), "JPEG", progressive=True),
    "jpeg_restarts": saved(Image.fromarray(GREY), "JPEG", restart_marker_rows=1),
}


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 1), (33, 65)])
def test_grey_png_stays_byte_exact(shape):
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    image = read_image(saved(Image.fromarray(pixels)))
    np.testing.assert_array_equal(image.pixels, pixels)
    assert (image.rows, image.cols, image.bits_stored, image.intensity) == (*shape, 8, "as_is")
    assert image.pixels.flags.writeable


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_grey_jpeg_equals_pillow(options):
    content = saved(Image.fromarray(GREY), "JPEG", quality=90, **options)
    np.testing.assert_array_equal(read_image(content).pixels, np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("subsampling", [0, 2])
def test_colour_jpeg_is_its_luma(subsampling):
    content = saved(COLOUR, "JPEG", quality=90, subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("YCbCr"))[..., 0].astype(int)
    assert np.abs(read_image(content).pixels - expected).max() <= 2  # Y itself, not Y through RGB and back


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1"])
def test_equal_channels_keep_their_value(mode):
    grey = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1))
    expected = np.asarray(grey.convert("1").convert("L") if mode == "1" else grey)
    image = read_image(saved(grey.convert(mode)))
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.mode == f"png:{'L' if mode == 'L' else mode}" or mode in ("LA", "1")


def test_colour_png_is_luma():
    colour = np.random.default_rng(2).integers(0, 256, (64, 50, 3), dtype=np.uint8)
    expected = colour.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(read_image(saved(Image.fromarray(colour))).pixels - expected).max() <= 0.51 + 0.05


def test_palette_png_is_luma_of_its_colours():
    image = COLOUR.convert("P")
    expected = np.asarray(image.convert("RGB")).astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(read_image(saved(image)).pixels - expected).max() <= 0.56


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_over_black(mode):
    alpha = np.random.default_rng(3).integers(0, 256, GREY.shape, dtype=np.uint8)
    image = Image.fromarray(GREY).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    expected = GREY.astype(np.float64) * alpha / 255
    assert np.abs(read_image(saved(image)).pixels - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_spread_over_the_range(bits):
    levels = 2**bits
    row = int(
        "".join(f"{value:0{bits}b}" for value in list(range(levels)) * (8 // bits))[: 8 * levels // bits * bits], 2
    )
    width = levels * (8 // bits)
    data = row.to_bytes(width * bits // 8, "big")
    pixels = read_image(png(width, 1, bits, 0, b"\0" + data)).pixels[0, :levels]
    np.testing.assert_array_equal(pixels, np.round(np.arange(levels) * 255 / (levels - 1)))


def expected_percentile(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values.astype(np.float64), (0.5, 99.5))
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)


@pytest.mark.parametrize("scale", [(0, 4000), (30000, 65000), (10, 13)])
def test_16_bit_png_by_percentiles_rounded(scale):
    values = np.random.default_rng(4).integers(*scale, (120, 90)).astype(np.uint16)
    image = read_image(saved(Image.fromarray(values)))
    np.testing.assert_array_equal(image.pixels, expected_percentile(values))
    assert (image.bits_stored, image.intensity) == (16, "percentile")


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_keep_their_precision(colour, channels):
    values = np.random.default_rng(5).integers(0, 65536, (40, 30)).astype(np.uint16)
    stack = np.repeat(values[..., None], channels, -1)
    if colour >= 4:
        stack[..., -1] = 65535
    np.testing.assert_array_equal(read_image(png_of(stack, colour)).pixels, expected_percentile(values))


def test_constant_16_bit_image_is_flagged():
    image = read_image(saved(Image.fromarray(np.full((20, 20), 1234, np.uint16))))
    assert image.quality == ("constant",)


def test_short_side_shrinks_by_area_from_full_precision():
    values = np.random.default_rng(6).integers(0, 65536, (128, 96)).astype(np.uint16)
    low, high = np.percentile(values.astype(np.float64), (0.5, 99.5))
    display = np.clip((values - low) / (high - low), 0, 1) * 255
    expected = np.rint(display.reshape(32, 4, 24, 4).mean((1, 3)))
    image = read_image(saved(Image.fromarray(values)), short_side=24)
    assert image.pixels.shape == (32, 24)
    assert (image.rows, image.cols) == (128, 96)
    assert (image.pixels != expected).mean() < 0.01  # float32 against float64, at the halves
    assert np.abs(image.pixels - expected).max() <= 1


@pytest.mark.parametrize("shape", [(96, 80), (80, 96), (100, 37)])
def test_shrink_is_the_area_mean(shape):
    pixels = film(*shape)
    small = shrink(pixels, 20)
    height, width = small.shape
    assert min(height, width) == 20
    assert abs(height / width - shape[0] / shape[1]) < 0.05
    rows, columns = (area_weights(old, new) for old, new in zip(shape, small.shape, strict=True))
    expected = rows @ pixels.astype(np.float64) @ columns.T
    assert np.abs(small - expected).max() <= 0.5 + 1e-3


def area_weights(old: int, new: int) -> np.ndarray:
    """Overlap of each new pixel with each old one, in float64."""
    edges = np.arange(new + 1) * old / new
    overlap = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
    return np.clip(overlap, 0, None) * new / old


@pytest.mark.parametrize("shape", [(1500, 1201), (1024, 1027), (2049, 700)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_large_images_get_the_same_area_mean_as_by_opencv(shape, kind):
    pixels = np.random.default_rng(7).integers(0, 256, shape).astype(kind)
    height, width = shrunk_size(shape, 300)
    expected = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(area_mean(pixels, height, width), cv2.resize(
        pixels.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA), atol=2e-4)  # fmt: skip
    mine = resize_once(pixels, height, width)
    assert mine.dtype == np.uint8
    assert np.abs(mine - np.rint(expected)).max() <= 1
    assert (mine != np.rint(expected)).mean() < 1e-3


@pytest.mark.parametrize(
    ("shape", "target"),
    [((900, 620), (601, 619)), ((512, 512), (224, 96)), ((131, 1700), (7, 1123)), ((1700, 131), (1123, 7)),
     ((59, 58), (30, 29)), ((64, 48), (64, 48)), ((37, 41), (1, 1)), ((1, 97), (1, 96))],
)  # fmt: skip
def test_an_area_mean_sees_its_own_pixels_only(shape, target):
    pixels = np.random.default_rng(8).integers(0, 256, shape)
    inside = np.pad(pixels.astype(np.float32), 40, constant_values=np.nan)[40:-40, 40:-40]
    expected = area_weights(shape[0], target[0]) @ pixels @ area_weights(shape[1], target[1]).T
    np.testing.assert_allclose(area_mean(inside, *target), expected, atol=5e-4)
    np.testing.assert_allclose(area_mean(pixels.astype(np.uint8), *target), expected, atol=5e-4)


def test_shrink_never_grows():
    assert shrink(GREY, 80) is not None
    np.testing.assert_array_equal(shrink(GREY, 80), GREY)
    np.testing.assert_array_equal(shrink(GREY, 500), GREY)
    np.testing.assert_array_equal(read_image(SOUND["png"], short_side=500).pixels, GREY)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_the_upright_twin(form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    content = saved(Image.fromarray(GREY), form, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    image = read_image(content)
    np.testing.assert_array_equal(image.pixels, expected)
    assert ("exif_rotated" in image.quality) == (orientation > 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_is_ignored_without_a_warning(exif):
    body = struct.pack(">BBH", 0xFF, 0xE1, len(exif) + 2) + exif
    content = SOUND["jpeg"][:2] + body + SOUND["jpeg"][2:]
    np.testing.assert_array_equal(read_image(content).pixels, read_image(SOUND["jpeg"]).pixels)


def test_colour_profiles_and_gamma_change_nothing():
    extra = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"sRGB", b"\0")
    content = png(80, 96, 8, 0, b"".join(b"\0" + row.tobytes() for row in GREY), extra)
    np.testing.assert_array_equal(read_image(content).pixels, GREY)


@pytest.mark.parametrize("name", SOUND)
def test_truncated_at_every_stride_is_refused(name):
    content = SOUND[name]
    lengths = [
        *range(0, min(1000, len(content)), 37),
        *range(1000, len(content), 101),
        *range(len(content) - 40, len(content)),
    ]
    for length in lengths:
        found = reason(content[:length])
        allowed = {"truncated"} if length >= 3 else {"zero_bytes", "truncated"}
        assert found in allowed, (name, length, found)


def test_truncation_is_found_even_when_pillow_is_told_to_be_lenient(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for content in SOUND.values():
        assert reason(content[: len(content) * 2 // 3]) == "truncated"


def pillow_reads(content: bytes) -> np.ndarray | None:
    opener = PngImagePlugin.PngImageFile if content.startswith(b"\x89PNG") else JpegImagePlugin.JpegImageFile
    try:
        image = opener(io.BytesIO(content))
        image.load()
    except Exception:
        return None
    return np.asarray(image)


def mutations(content: bytes, count: int, seed: int) -> list[bytes]:
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(changed))), rng.integers(4)
            if kind == 0:
                changed[at] = int(rng.integers(256))
            elif kind == 1:
                changed[at] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                del changed[at : at + int(rng.integers(1, 50))]
            else:
                changed[at:at] = rng.integers(0, 256, int(rng.integers(1, 20)), dtype=np.uint8).tobytes()
        out.append(bytes(changed))
    return out


def refuses_whatever_pillow_refuses(count: int) -> None:
    for number, (name, content) in enumerate(SOUND.items()):
        accepted = 0
        for changed in mutations(content, count, number):
            try:
                image = read_image(changed)
            except ImageError:
                continue
            accepted += 1
            theirs = pillow_reads(changed)
            assert theirs is not None, f"{name}: read what Pillow refuses"
            if theirs.ndim == 2 and name.startswith("jpeg") and len(image.quality) == 0:
                np.testing.assert_array_equal(image.pixels, theirs)
        if name.startswith("png"):
            assert accepted <= count // 50, "a changed PNG fails its checksum"


def test_mutated_files_are_never_read_more_leniently_than_by_pillow():
    refuses_whatever_pillow_refuses(60)


@pytest.mark.slow
def test_mutated_files_are_never_read_more_leniently_than_by_pillow_in_many_cases():
    refuses_whatever_pillow_refuses(2500)


def test_wrong_checksum_of_pixel_data_is_refused():
    content = bytearray(SOUND["png"])
    at = (
        content.index(b"IDAT")
        + 4
        + struct.unpack(">I", content[content.index(b"IDAT") - 4 : content.index(b"IDAT")])[0]
    )
    content[at] ^= 1
    assert pillow_reads(bytes(content)) is not None  # Pillow alone does not notice
    assert reason(bytes(content)) == "damaged"


def test_pixel_data_that_is_short_inside_a_sound_png_is_refused():
    rows = b"".join(b"\0" + row.tobytes() for row in GREY[:50])
    assert reason(png(80, 96, 8, 0, rows)) == "damaged"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "zero_bytes"),
        (b"\x89PNG", "truncated"),
        (b"patient,finding\n1,2\n", "not_an_image"),
        (b"GIF89a" + bytes(200), "not_an_image"),
        (b"II*\0" + bytes(200), "not_an_image"),
        (b"\xff\xd8\xff\xd9" + bytes(20), "damaged"),
        (b"\xff\xd8\xff" + bytes(100), "truncated"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "damaged"),
        (png(60000, 60000, 8, 0, b""), "too_large"),
        (png(0, 10, 8, 0, b""), "damaged"),
        (png(8, 8, 8, 0, bytes(72), chunk(b"acTL", struct.pack(">II", 2, 0))), "multi_frame"),
        (saved(Image.fromarray(GREY).convert("CMYK"), "JPEG"), "unsupported_mode"),
    ],
)
def test_reasons(content, expected):
    assert reason(content) == expected


def test_a_jpeg_of_a_huge_declared_size_is_refused_from_its_header():
    content = bytearray(SOUND["jpeg"])
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    assert reason(bytes(content)) == "too_large"


def test_a_jpeg_of_endless_scans_is_refused():
    content = SOUND["jpeg"]
    at = content.index(b"\xff\xda")
    length = struct.unpack(">H", content[at + 2 : at + 4])[0]
    header = content[at : at + 2 + length]
    assert reason(content[:at] + header * 500 + content[at:]) == "too_large"


def test_the_name_decides_nothing(tmp_path):
    for name, content in (("a.jpg", SOUND["png"]), ("b.dcm", SOUND["jpeg"]), ("c", SOUND["png"])):
        (tmp_path / name).write_bytes(content)
        assert read_image(tmp_path / name).mode.split(":")[0] == ("jpeg" if name == "b.dcm" else "png")


def test_what_is_not_a_readable_file(tmp_path, monkeypatch):
    assert reason(tmp_path / "absent.png") == "missing"
    assert reason(tmp_path) == "not_a_file"
    assert reason(tmp_path / "nul\0.png") == "missing"
    assert reason(tmp_path / ("x" * 300)) == "missing"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "not_a_file"  # and does not wait for a writer
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert reason(tmp_path / "loop.png") == "unreadable"

    def refuse(self: Path, mode: str) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.png").write_bytes(SOUND["png"])
    monkeypatch.setattr(Path, "open", refuse)
    assert reason(tmp_path / "secret.png") == "unreadable"


def test_errors_name_the_image_and_keep_their_kind(tmp_path):
    (tmp_path / "x.png").write_bytes(SOUND["png"][:200])
    with pytest.raises(UnreadableImageError, match=r"x\.png: .*ends before"):
        read_image(tmp_path / "x.png")
    with pytest.raises(UnsupportedImageError, match=r"^study 4: "):
        read_image(saved(Image.fromarray(GREY).convert("CMYK"), "JPEG"), name="study 4")


def test_threads_read_alike():
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(read_image(SOUND["jpeg"]).pixels)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(np.array_equal(result, results[0]) for result in results)


def test_quality_flags():
    assert quality_flags(film(200, 180)) == ()
    assert quality_flags(255 - film(200, 180)) == ("polarity_suspect",)
    assert quality_flags(np.full((50, 40), 7, np.uint8)) == ("constant",)
    assert quality_flags(np.random.default_rng(0).integers(100, 104, (90, 90), dtype=np.uint8)) == ("low_contrast",)


def test_every_image_of_the_real_sample_is_read(nih_sample):
    paths = sorted((nih_sample / "images").glob("*.png"))
    images = {path.name: read_image(path) for path in paths[::40]}
    large = [path for path in paths if path.stat().st_size > 400_000]
    images |= {path.name: read_image(path) for path in large[:3]}
    for name, image in images.items():
        expected = np.asarray(Image.open(nih_sample / "images" / name).convert("L"))
        np.testing.assert_array_equal(image.pixels, expected)


@pytest.mark.slow
def test_the_whole_real_sample_and_its_polarity(nih_sample):
    paths = sorted((nih_sample / "images").glob("*.png"))
    images = [read_image(path) for path in paths]
    assert len(images) == 780
    assert sum(image.mode == "png:RGBA" for image in images) == 2
    assert sum("polarity_suspect" in image.quality for image in images) <= 8
    assert sum("polarity_suspect" in quality_flags(255 - image.pixels) for image in images) >= 772


def test_opencv_is_not_left_with_other_threads():
    before = cv2.getNumThreads()
    read_image(SOUND["jpeg"])
    assert cv2.getNumThreads() == before
