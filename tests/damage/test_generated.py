"""Bad and odd inputs made on purpose, each with its exact outcome."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage_inputs import bombs, interlaced, phantom, phantom_dicoms, png, rasters, saved, twelve_bit_jpeg
from PIL import Image

from hilum.core.errors import ImageError
from hilum.data.images import read_image

GREY = phantom()
PICTURE = Image.fromarray(GREY)
RASTERS = rasters()
DICOMS = phantom_dicoms()
EVEN_LARGER = np.resize(GREY, (1, 20000))


def ycck() -> bytes:
    """A JPEG of four components with the marker that says they are YCCK."""
    content = saved(PICTURE.convert("CMYK"), "JPEG")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02"
    return content[:2] + adobe + content[2:]


REFUSED = {
    "zero_bytes": (b"", "zero_bytes"),
    "one_byte": (b"\x89", "truncated"),
    "only_a_png_signature": (b"\x89PNG\r\n\x1a\n", "truncated"),
    "only_a_jpeg_signature": (b"\xff\xd8\xff", "truncated"),
    "zeros": (bytes(5000), "not_an_image"),
    "text": (b"patient,finding\n1,2\n" * 50, "not_an_image"),
    "html_error_page": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "not_an_image"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "not_an_image"),
    "gif": (saved(PICTURE, "GIF"), "not_an_image"),
    "bmp": (saved(PICTURE, "BMP"), "not_an_image"),
    "tiff": (saved(PICTURE, "TIFF"), "not_an_image"),
    "webp": (saved(PICTURE, "WEBP"), "not_an_image"),
    "jpeg_2000_file": (saved(PICTURE, "JPEG2000"), "not_an_image"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(200), "not_an_image"),
    "png_with_bom_before": (b"\xef\xbb\xbf" + RASTERS["png"], "not_an_image"),
    "png_after_text_conversion": (RASTERS["png"].replace(b"\r\n", b"\n"), "not_an_image"),
    "png_body_after_text_conversion": (RASTERS["png"][:8] + RASTERS["png"][8:].replace(b"\n", b"\r\n"), "damaged"),
    "png_without_data": (png(80, 96, 8, 0, b""), "damaged"),
    "png_of_no_size": (png(0, 0, 8, 0, b""), "damaged"),
    "png_header_too_short": (RASTERS["png"][:8] + b"\0\0\0\x05IHDRaaaaa" + bytes(4) + RASTERS["png"][33:], "damaged"),
    "png_of_7_bits": (png(8, 8, 7, 0, bytes(72)), "damaged"),
    "png_of_colour_type_5": (png(8, 8, 8, 5, bytes(72)), "damaged"),
    "png_palette_without_palette": (png(8, 8, 8, 3, bytes(72)), "damaged"),
    "png_animated": (
        saved(PICTURE, append_images=[Image.fromarray(255 - GREY)], save_all=True, duration=9), "multi_frame"),
    "jpeg_cmyk": (saved(PICTURE.convert("CMYK"), "JPEG"), "unsupported_mode"),
    "jpeg_ycck": (ycck(), "unsupported_mode"),
    "jpeg_12_bit": (twelve_bit_jpeg(), "unsupported_mode"),
    "jpeg_without_tables": (
        RASTERS["jpeg"][:2] + RASTERS["jpeg"][RASTERS["jpeg"].index(b"\xff\xc0"):], "damaged"),
    "jpeg_after_text_conversion": (RASTERS["jpeg"].replace(b"\n", b"\r\n"), "damaged"),
    "dicom_without_pixels": (DICOMS["explicit"][: DICOMS["explicit"].index(b"\xe0\x7f\x10\0")], "no_pixel_data"),
    "dicom_preamble_only": (bytes(128) + b"DICM", "no_pixel_data"),
    "dicom_with_a_png_inside": (
        DICOMS["explicit"][: DICOMS["explicit"].index(b"\xe0\x7f\x10\0")] + RASTERS["png"], "no_pixel_data"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_this_reason(name):
    content, expected = REFUSED[name]
    with pytest.raises(ImageError) as caught:
        read_image(content)
    assert caught.value.reason == expected


ACCEPTED = {
    "png_interlaced": (interlaced(GREY), GREY),
    "png_of_one_pixel": (saved(Image.fromarray(GREY[:1, :1])), GREY[:1, :1]),
    "png_1_x_20000": (saved(Image.fromarray(EVEN_LARGER)), EVEN_LARGER),
    "png_20000_x_1": (saved(Image.fromarray(EVEN_LARGER.T.copy())), EVEN_LARGER.T),
    "png_constant": (saved(Image.fromarray(np.full((9, 7), 5, np.uint8))), np.full((9, 7), 5)),
    "png_1_bit": (saved(Image.fromarray(GREY > 90)), np.where(GREY > 90, 255, 0)),
    "png_with_bytes_behind": (RASTERS["png"] + bytes(5000), GREY),
    "jpeg_with_bytes_behind": (RASTERS["jpeg"] + b"\xff\xd8 more", np.asarray(Image.open(io.BytesIO(RASTERS["jpeg"])))),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_read_exactly(name):
    content, expected = ACCEPTED[name]
    np.testing.assert_array_equal(read_image(content).pixels, expected)


@pytest.mark.parametrize(("name", "content"), [("a.jpg", DICOMS["rle"]), ("b.dcm", RASTERS["png"])])
def test_a_wrong_name_changes_nothing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(read_image(tmp_path / name).pixels, read_image(content).pixels)


def reason(path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    return caught.value.reason


def test_what_is_no_regular_file(tmp_path):
    (tmp_path / "x.dcm").mkdir()
    assert reason(tmp_path / "x.dcm") == "not_a_file"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "not_a_file"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(tmp_path / "socket.png"))
    assert reason(tmp_path / "socket.png") == "not_a_file"
    listener.close()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    assert reason(tmp_path / "device.png") == "not_a_file"  # and does not read for ever
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert reason(tmp_path / "a") == "unreadable"
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert reason(tmp_path / "dangling.png") == "missing"
    assert reason(tmp_path / "x.dcm" / "y.png") == "missing"
    assert reason(tmp_path / "pipe.png" / "y.png") == "missing"
    assert reason(tmp_path / ("n" * 300)) == "missing"
    assert reason(tmp_path / "a\0b.png") == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "x.png").write_bytes(RASTERS["png"])
    (tmp_path / "x.png").chmod(0)
    assert reason(tmp_path / "x.png") == "unreadable"


MEASURE = """
import json, sys, time
from pathlib import Path
from fuzz import peak_memory
from hilum.core.errors import ImageError
from hilum.data import dicom
from hilum.data.images import read_image

found = {}
for path in map(Path, sys.argv[1:]):
    before, started = peak_memory(), time.process_time()
    try:
        outcome = str(read_image(path).pixels.shape)
    except ImageError as error:
        outcome = error.reason
    found[path.name] = outcome, time.process_time() - started, peak_memory() - before
print(json.dumps(found))
"""


def test_bombs_are_refused_quickly_and_in_little_memory(tmp_path, report):
    made = bombs()
    for name, (content, _) in made.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *(str(tmp_path / name) for name in made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {name: outcome for name, (outcome, _, _) in found.items()} == {
        name: expected for name, (_, expected) in made.items()
    }
    assert sum(len(content) for content, _ in made.values()) < 3e6
    seconds, megabytes = (max(entry[place] for entry in found.values()) for place in (1, 2))
    report(f"{len(made)} bombs: refused, each in at most {seconds:.2f} s and {megabytes:.0f} MB")
    for name, (_, seconds, megabytes) in found.items():
        assert seconds < 2, f"{name} took {seconds:.1f} s"
        assert megabytes < 200, f"{name} took {megabytes:.0f} MB"
    assert sum(megabytes for _, _, megabytes in found.values()) < 200  # the peak grows; it never falls
