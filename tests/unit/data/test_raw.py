"""Files without a header: read as their source says, exact in their number of bytes, through a build and in place."""

import json

import numpy as np
import polars as pl
import pytest

from hilum.core.errors import ImageError, ManifestError, StoreError
from hilum.core.types import image_uid
from hilum.data.build import build_store
from hilum.data.images import read_image
from hilum.data.phantoms.encoding import raw12_inverted
from hilum.data.raw import RawFormat, raw_format
from hilum.data.schema import Manifest, complete, label_column, read_manifest
from hilum.data.store import Store

SMALL = RawFormat(4, 6, 12, True)
GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def by_hand(values: np.ndarray) -> np.ndarray:
    """Percentile display of stored values (0 black), in float64 and by numpy's own percentile."""
    low, high = np.percentile(values.astype(np.float64), [0.5, 99.5])
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def test_words_are_big_endian_and_turned_round_once():
    content = b"".join(value.to_bytes(2, "big") for value in range(24))
    np.testing.assert_array_equal(SMALL.words(content), 4095 - np.arange(24).reshape(4, 6))
    np.testing.assert_array_equal(RawFormat(4, 6, 12, False).words(content), np.arange(24).reshape(4, 6))


def test_display_values_are_those_of_percentiles():
    image = read_image(raw12_inverted(GREY), raw=SMALL)
    np.testing.assert_array_equal(image.pixels, by_hand(np.rint(GREY * (4095 / 255))))
    assert (image.rows, image.cols, image.bits_stored) == (4, 6, 12)
    assert (image.mode, image.photometric, image.intensity) == ("raw:4x6:uint16be:12:inverted", "MONOCHROME1",
                                                                "percentile")  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero_bytes"),
        (raw12_inverted(GREY)[:-1], "truncated"),
        (raw12_inverted(GREY)[:-2], "truncated"),
        (raw12_inverted(GREY) + b"\0", "size_mismatch"),
        (b"\xff" * 48, "damaged"),  # 65535 in a file of 12 bits; a reader of the wrong byte order does this too
        (raw12_inverted(GREY)[::-1], "damaged"),
    ],
)
def test_another_number_of_bytes_or_another_order_is_refused(content, reason):
    with pytest.raises(ImageError) as caught:
        read_image(content, raw=SMALL)
    assert caught.value.reason == reason


def test_a_size_that_is_too_large_is_refused_before_anything_is_read():
    with pytest.raises(ImageError) as caught:
        RawFormat(90_000, 90_000, 12, False).words(b"")
    assert caught.value.reason == "too_large"


def test_modes_are_read_as_they_are_written():
    assert raw_format(str(SMALL)) == SMALL
    assert raw_format("raw:4x6:uint16be:16") == RawFormat(4, 6, 16, False)
    assert (raw_format(None), raw_format("png:L")) == (None, None)
    for mode in ("raw:", "raw:4x6:uint16le:12", "raw:4x6:uint16be:8", "raw:4x6:uint16be:17", "raw:4x6:uint16be:12:x"):
        with pytest.raises(ManifestError, match="expected raw:HEIGHTxWIDTH"):
            raw_format(mode)


def manifest_of(root, contents, mode="raw:4x6:uint16be:12:inverted") -> Manifest:
    rows = []
    for name, content in contents.items():
        (root / name).write_bytes(content)
        rows.append(
            {
                "image_uid": image_uid("films", name), "dataset": "films", "source_relpath": name, "mode": mode,
                "source_root_key": "films", "patient_id": f"films/{name}", "study_id": f"films/{name}/0",
                "image_id": name, "view": "PA", "split_project": "train", "ssl_ok": True, "ssl_reason": "",
                label_column("Nodule"): 1,
            }
        )  # fmt: skip
    return Manifest(complete(pl.DataFrame(rows), ("Nodule",)), ("Nodule",), {"roots": json.dumps({"films": str(root)})})


@pytest.mark.parametrize("encoding", ["raw", "files"])
def test_build_and_read_in_place(tmp_path, encoding):
    (tmp_path / "raw").mkdir()
    whole = raw12_inverted(GREY)
    manifest = manifest_of(tmp_path / "raw", {"a.IMG": whole, "b.IMG": whole[:-2], "c.IMG": b"", "d.IMG": whole})
    summary = build_store(manifest, tmp_path / "store", size=4, encoding=encoding, workers=1)
    assert (summary.inputs, summary.stored) == (4, 2)
    assert summary.quarantined == {"truncated": 1, "zero_bytes": 1}
    store = Store.open(tmp_path / "store")
    for index in range(2):
        np.testing.assert_array_equal(store.read(index), read_image(whole, raw=SMALL).pixels)
    copy = read_manifest(tmp_path / "store" / "manifest.parquet").frame
    assert copy["bits_stored"].to_list() == [12, None, None, 12]
    (tmp_path / "raw" / "a.IMG").write_bytes(whole[2:] + whole[:2])
    if encoding == "files":
        with pytest.raises(StoreError, match="has changed"):
            Store.open(tmp_path / "store").read(0)


def test_without_the_hint_the_file_is_no_image_and_a_wrong_hint_is_an_error(tmp_path):
    plain = manifest_of(tmp_path, {"a.IMG": raw12_inverted(GREY)}, mode=None)
    assert build_store(plain, tmp_path / "one", size=4, workers=1).quarantined == {"not_an_image": 1}
    wrong = manifest_of(tmp_path, {"a.IMG": raw12_inverted(GREY)}, mode="raw:4x6")
    with pytest.raises(ManifestError, match="expected raw:HEIGHTxWIDTH"):
        build_store(wrong, tmp_path / "two", size=4, workers=1)
