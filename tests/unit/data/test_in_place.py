"""A store that reads its images in place: the same pixels, labels and crops as one with pixels of its own."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from hilum.commands import build as build_command
from hilum.commands import verify
from hilum.core.errors import ConfigError, StoreError
from hilum.core.types import image_uid
from hilum.data import decoding
from hilum.data.build import build_store
from hilum.data.samplers import EndlessSampler
from hilum.data.schema import Manifest, complete, label_column, write_manifest
from hilum.data.shards import IN_PLACE
from hilum.data.store import Store
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.loading import PretrainSource

SMALL = {"size": 32, "shard_bytes": 32 * 32 * 4, "workers": 1}


def pool(root: Path, count: int = 12) -> Path:
    """PNG (8 and 16 bits) and JPEG files, one of them broken, and their manifest."""
    (root / "films").mkdir(parents=True)
    rows = []
    for number in range(count):
        rng = np.random.default_rng(number)
        if number % 3 == 2:
            pixels: np.ndarray = rng.integers(900, 60000, (60 + number, 50), dtype=np.uint16)
        else:
            pixels = rng.integers(90, 160, (60 + number, 50 - 2 * number), dtype=np.uint8)
        name = f"films/SECRET-{number}.{'jpg' if number % 3 == 1 else 'png'}"
        Image.fromarray(pixels).save(root / name)
        if number == 4:
            (root / name).write_bytes((root / name).read_bytes()[:200])
        rows.append(
            {
                "image_uid": image_uid("clinic", name),
                "dataset": "clinic",
                "source_relpath": name,
                "source_root_key": "clinic",
                "patient_id": f"clinic/p{number}",
                "study_id": f"clinic/s{number}",
                "image_id": name,
                "view": ("PA", "AP", "LATERAL")[number % 3],
                "split_project": ("train", "val", "test")[number % 3],
                "ssl_ok": number % 3 == 0,
                "ssl_reason": "",
                label_column("Edema"): (1, 0, -1, -2)[number % 4],
            }
        )
    manifest = Manifest(
        complete(pl.DataFrame(rows), ["Edema"]), ("Edema",), {"roots": json.dumps({"clinic": str(root)})}
    )
    write_manifest(manifest, root / "manifest.parquet")
    return root / "manifest.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    path = pool(tmp_path / "raw")
    for name, encoding in (("copy", "png"), ("place", IN_PLACE)):
        build_store(path, tmp_path / name, encoding=encoding, **SMALL)
    return Store.open(tmp_path / "copy"), Store.open(tmp_path / "place")


def test_everything_is_as_in_a_store_with_pixels(stores, tmp_path):
    copy, place = stores
    assert len(place) == len(copy) == 11
    for name in ("uids", "image_ids", "patients", "studies", "views", "splits", "datasets", "labels", "ssl_ok",
                 "heights", "widths"):  # fmt: skip
        np.testing.assert_array_equal(getattr(place, name), getattr(copy, name))
    assert place.findings == copy.findings
    assert place.fingerprint(range(11)) == copy.fingerprint(range(11))
    for index in range(len(copy)):
        pixels = place.read(index)
        np.testing.assert_array_equal(pixels, copy.read(index))
        assert min(pixels.shape) <= 32
        assert pixels.flags.writeable
    assert (tmp_path / "place" / "quarantine.csv").read_bytes() == (tmp_path / "copy" / "quarantine.csv").read_bytes()
    assert sum(path.stat().st_size for path in (tmp_path / "place" / "shards").glob("*.bin")) == 11 * 32


def test_crops_for_pretraining_are_the_same_bit_for_bit(stores):
    crops = CropConfig(global_size=32, local_size=16, local_crops=2)
    ours, theirs = (
        PretrainSource(pickle.loads(pickle.dumps(store)), EndlessSampler(np.arange(11), 4, 7), crops, patch_size=8)
        for store in stores
    )
    for step in range(3):
        assert torch.equal(ours[step].global_crops, theirs[step].global_crops)
        assert torch.equal(ours[step].local_crops, theirs[step].local_crops)
        assert ours[step].replaced == theirs[step].replaced


def test_dicom_in_place(tmp_path):
    """A DICOM that ships with pydicom, 16 bits: shown as in a store of pixels."""
    path = pool(tmp_path / "raw", 2)
    dicom = Path(get_testdata_file("CT_small.dcm", download=False))
    (tmp_path / "raw" / "films" / "SECRET-0.png").write_bytes(dicom.read_bytes())
    for name, encoding in (("copy", "raw"), ("place", IN_PLACE)):
        build_store(path, tmp_path / name, encoding=encoding, **SMALL)
    copy, place = Store.open(tmp_path / "copy"), Store.open(tmp_path / "place")
    assert pl.read_parquet(tmp_path / "place" / "manifest.parquet")["mode"][0].startswith("dicom")
    for index in range(2):
        np.testing.assert_array_equal(place.read(index), copy.read(index))


def test_a_file_that_has_changed_is_an_error_that_names_its_uid_and_not_its_path(stores, tmp_path):
    _, place = stores
    file = tmp_path / "raw" / place.image_ids[0]
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    Image.fromarray(np.full((60, 50), 7, np.uint8)).save(file)  # sound, and another picture
    os.utime(file, ns=times)
    for damage in (None, content[:-1], content[:50] + bytes([content[50] ^ 1]) + content[51:], b"", "gone"):
        if damage == "gone":
            file.unlink()
        elif damage is not None:
            file.write_bytes(damage)
        with pytest.raises(StoreError, match=str(place.uids[0])) as caught:
            place.read(0)
        assert "SECRET" not in str(caught.value)
    file.write_bytes(content)
    assert place.read(0).size


def test_verify_counts_what_has_changed(stores, tmp_path, capsys):
    _, place = stores
    verify.run(tmp_path / "place")
    assert "11 of 11 images read and decoded (in place, " in capsys.readouterr().out
    for index in (2, 5):
        file = tmp_path / "raw" / place.image_ids[index]
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(StoreError, match="2 faults"):
        verify.run(tmp_path / "place")
    out = capsys.readouterr().out
    assert "9 of 11 images" in out
    assert str(place.uids[5]) in out


def test_the_folder_moves_and_nothing_is_decoded_again(stores, tmp_path, monkeypatch):
    copy, _ = stores
    (tmp_path / "raw").rename(tmp_path / "moved")
    place = Store.open(tmp_path / "place")
    with pytest.raises(StoreError, match="--root"):
        place.read(0)
    monkeypatch.setattr(decoding, "decode_one", None)
    path = tmp_path / "moved" / "manifest.parquet"
    build_store(path, tmp_path / "place", encoding=IN_PLACE, roots={"clinic": tmp_path / "moved"}, **SMALL)
    np.testing.assert_array_equal(Store.open(tmp_path / "place").read(0), copy.read(0))


def test_a_change_is_accepted_by_deleting_the_shard(stores, tmp_path):
    _, place = stores
    file = tmp_path / "raw" / place.image_ids[0]
    Image.fromarray(np.full((60, 50), 7, np.uint8)).save(file)
    shard = tmp_path / "place" / "shards" / place.shards[0].name
    shard.unlink()
    build_store(tmp_path / "raw" / "manifest.parquet", tmp_path / "place", encoding=IN_PLACE, **SMALL)
    np.testing.assert_array_equal(Store.open(tmp_path / "place").read(0), np.full((38, 32), 7, np.uint8))


def test_the_same_bytes_in_shares_and_again(stores, tmp_path, monkeypatch):
    path = tmp_path / "raw" / "manifest.parquet"
    for share in (2, 0, 1):
        build_store(path, tmp_path / "shares", encoding=IN_PLACE, shard=(share, 3), **SMALL)
    assert contents(tmp_path / "shares") == contents(tmp_path / "place")
    monkeypatch.setattr(decoding, "decode_one", None)
    build_store(path, tmp_path / "place", encoding=IN_PLACE, **SMALL)
    assert contents(tmp_path / "shares") == contents(tmp_path / "place")


def test_a_store_with_pixels_is_not_overwritten(stores, tmp_path):
    with pytest.raises(StoreError, match="--out"):
        build_store(tmp_path / "raw" / "manifest.parquet", tmp_path / "copy", encoding=IN_PLACE, **SMALL)


def test_on_the_command_line(tmp_path, capsys):
    path = pool(tmp_path / "raw")
    with pytest.raises(ConfigError, match="--in-place"):
        build_command.run(path, tmp_path / "store", 32, "png", workers=1, in_place=True)
    build_command.run(path, tmp_path / "store", 32, workers=1, budget=0.1, in_place=True)
    assert "12 images in the manifest: 11 stored" in capsys.readouterr().out
    assert Store.open(tmp_path / "store").in_place


def test_reading_needs_no_table_library_and_no_dicom_library(stores, tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hilum.data.store import Store\n"
        "store = Store.open(Path(sys.argv[1]))\n"
        "for index in range(len(store)): store.read(index)\n"
        "print(sorted({'polars', 'pydicom', 'torch'} & set(sys.modules)), len(store))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "place")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] 11\n"
