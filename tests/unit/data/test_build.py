"""Building: the same bytes whatever the processes, interruptions or shares, and no image lost silently."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hilum.core.errors import ConfigError, LeakageError, ManifestError, StoreError, UnknownNameError
from hilum.core.types import image_uid
from hilum.data import build as build_module
from hilum.data import decoding
from hilum.data.build import BuildSummary, build_store
from hilum.data.decoding import Decoders, Settings, Task
from hilum.data.images import read_image
from hilum.data.schema import Manifest, complete, label_column, read_manifest, write_manifest
from hilum.data.store import Store

FINDINGS = ("Edema", "Pleural Effusion")


def film(height: int, width: int, seed: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(seed).normal(0, 3, (height, width))
    return np.clip(110 + 70 * np.sin(x / 11 + seed) * np.cos(y / 13) + grain, 0, 255).astype(np.uint8)


def pool(
    root: Path, count: int = 24, datasets: tuple[str, ...] = ("a", "b"), licences: tuple[str, ...] = ("",)
) -> Path:
    """PNG files under `root`/images and their manifest; returns the manifest's path."""
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"p{number // 2:03d}_{number}.png"
        Image.fromarray(film(60 + number % 3 * 10, 50 + number % 5 * 9, number)).save(root / "images" / name)
        dataset = datasets[number % len(datasets)]
        rows.append(
            {
                "image_uid": image_uid(dataset, name),
                "dataset": dataset,
                "licence_tag": licences[number % len(licences)],
                "source_relpath": f"images/{name}",
                "source_root_key": "pool",
                "patient_id": f"{dataset}/SECRET-{number // 4}",
                "study_id": f"{dataset}/s{number // 2}",
                "image_id": name,
                "view": ("PA", "AP", "LATERAL")[number % 3],
                "split_project": ("train", "val", "test")[number // 4 % 3],
                "ssl_ok": number // 4 % 3 == 0,
                "ssl_reason": "",
                label_column("Edema"): (1, 0, -1, -2)[number % 4],
                label_column("Pleural Effusion"): number % 2,
            }
        )
    manifest = Manifest(complete(pl.DataFrame(rows), FINDINGS), FINDINGS, {"roots": json.dumps({"pool": str(root)})})
    write_manifest(manifest, root / "manifest.parquet")
    return root / "manifest.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store; what a marker remembers of the times of refused files is left out."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def counted(summary: BuildSummary) -> int:
    return summary.stored + sum(summary.quarantined.values())


SMALL = {"size": 32, "shard_bytes": 32 * 32 * 4}  # a few images in each shard


def test_everything_arrives(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    summary = build_store(manifest_path, tmp_path / "store", size=40, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored, summary.quarantined, summary.finished) == (24, 24, {}, True)
    store, manifest = Store.open(tmp_path / "store"), read_manifest(manifest_path)
    assert store.uids.tolist() == manifest.frame["image_uid"].to_list()
    assert store.patients.tolist() == manifest.frame["patient_id"].to_list()
    assert store.studies.tolist() == manifest.frame["study_id"].to_list()
    assert store.splits.tolist() == manifest.frame["split_project"].to_list()
    assert store.views.tolist() == manifest.frame["view"].to_list()
    assert store.ssl_ok.tolist() == manifest.frame["ssl_ok"].to_list()
    assert store.findings == FINDINGS
    np.testing.assert_array_equal(store.labels, manifest.labels())
    for index, name in enumerate(store.image_ids):
        source = np.asarray(Image.open(tmp_path / "raw" / "images" / name))
        scale = 40 / min(source.shape)
        height, width = (round(side * scale) for side in source.shape)
        np.testing.assert_array_equal(
            store.read(index), cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA)
        )
    assert (tmp_path / "store" / "quarantine.csv").read_text() == "image_uid,dataset,row,reason,message\n"


def test_never_grows(tmp_path):
    build_store(pool(tmp_path / "raw", 6), tmp_path / "store", size=4000, encoding="png", workers=1)
    store = Store.open(tmp_path / "store")
    for index, name in enumerate(store.image_ids):
        np.testing.assert_array_equal(store.read(index), np.asarray(Image.open(tmp_path / "raw" / "images" / name)))


def test_shards_hold_one_dataset_and_one_licence(tmp_path):
    manifest_path = pool(tmp_path / "raw", 24, ("b", "a"), ("open", "open", "credentialed", "credentialed"))
    summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    store = Store.open(tmp_path / "store")
    groups = [(shard.dataset, shard.licence) for shard in store.shards]
    assert store.licences == {dataset: sorted({tag for name, tag in groups if name == dataset}) for dataset in "ab"}
    assert store.licences["a"]
    assert set(groups) == {("a", "open"), ("a", "credentialed"), ("b", "open"), ("b", "credentialed")}
    assert summary.shards == len(groups) > 4
    frame = pl.read_parquet(tmp_path / "store" / "manifest.parquet")
    for row in frame.iter_rows(named=True):
        assert groups[row["store_shard"]] == (row["dataset"], row["licence_tag"])


def test_the_copy_of_the_manifest_says_where_everything_is(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    (tmp_path / "raw" / "images" / "p003_6.png").write_bytes(b"")
    build_store(manifest_path, tmp_path / "store", encoding="jpeg95", workers=1, **SMALL)
    before, after = read_manifest(manifest_path), read_manifest(tmp_path / "store" / "manifest.parquet")
    assert after.frame["image_uid"].to_list() == before.frame["image_uid"].to_list()
    np.testing.assert_array_equal(after.labels(), before.labels())
    row = after.frame.row(9, named=True)
    file = sorted((tmp_path / "store" / "shards").glob("*.bin"))[row["store_shard"]]
    record = file.read_bytes()[row["store_offset"] : row["store_offset"] + row["store_len"]]
    assert Image.open(io.BytesIO(record)).size == (row["store_w"], row["store_h"])
    assert (row["rows"], row["cols"]) == read_image(tmp_path / "raw" / row["source_relpath"]).pixels.shape
    assert (row["bits_stored"], row["mode"], row["intensity"], row["preprocess_id"]) == (
        8,
        "png:L",
        "as_is",
        "hilum-grey-1",
    )
    refused = after.frame.row(6, named=True)
    assert refused["store_shard"] is None
    assert refused["quality"] == ["zero_bytes"]


@pytest.mark.parametrize("encoding", ["jpeg95", "raw"])
def test_same_bytes_for_any_number_of_processes(tmp_path, encoding):
    manifest_path = pool(tmp_path / "raw")
    (tmp_path / "raw" / "images" / "p003_6.png").write_bytes(b"")
    for workers in (1, 2):
        build_store(manifest_path, tmp_path / f"store{workers}", encoding=encoding, workers=workers, **SMALL)
    assert contents(tmp_path / "store1") == contents(tmp_path / "store2")


def test_run_again_does_nothing(tmp_path, monkeypatch):
    manifest_path = pool(tmp_path / "raw")
    first = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    before = contents(tmp_path / "store")
    monkeypatch.setattr(decoding, "decode_one", None)
    again = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert contents(tmp_path / "store") == before
    assert again.shards_kept == again.shards == first.shards
    assert (again.stored, again.bytes) == (first.stored, first.bytes)


def test_changed_labels_and_splits_need_no_decoding(tmp_path, monkeypatch):
    manifest_path = pool(tmp_path / "raw")
    build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    manifest = read_manifest(manifest_path)
    frame = manifest.frame.with_columns(pl.lit("test").alias("split_project"), pl.lit(False).alias("ssl_ok"))
    write_manifest(Manifest(frame, manifest.findings, manifest.metadata), manifest_path)
    monkeypatch.setattr(decoding, "decode_one", None)
    build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert set(Store.open(tmp_path / "store").splits) == {"test"}


def test_a_smaller_manifest_leaves_no_stale_shards(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    manifest = read_manifest(manifest_path)
    write_manifest(Manifest(manifest.frame.head(9), manifest.findings, manifest.metadata), manifest_path)
    (tmp_path / "store" / "shards" / ".00004-a.done.b788d67b.tmp").write_text("{")  # of a build that was killed
    build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    build_store(manifest_path, tmp_path / "fresh", encoding="raw", workers=1, **SMALL)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_a_store_of_other_data_is_not_replaced(tmp_path):
    build_store(pool(tmp_path / "raw", 4), tmp_path / "store", encoding="raw", workers=1, **SMALL)
    before = contents(tmp_path / "store")
    manifest_path = pool(tmp_path / "other", 4)
    manifest = read_manifest(manifest_path)
    frame = manifest.frame.with_columns(dataset=pl.lit("another"))
    write_manifest(Manifest(frame, manifest.findings, manifest.metadata), manifest_path)
    with pytest.raises(StoreError, match="its shards would be removed"):
        build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert contents(tmp_path / "store") == before


class StopError(Exception):
    """What interrupts a build in these tests."""


@pytest.mark.parametrize("after", [0, 1, 4, 11, 23])
def test_interrupted_anywhere_then_finished_is_the_same_store(tmp_path, monkeypatch, after):
    manifest_path = pool(tmp_path / "raw")
    build_store(manifest_path, tmp_path / "straight", encoding="jpeg95", workers=1, **SMALL)
    decode, calls = decoding.decode_one, []

    def stopping(task: Task, chosen: Settings) -> decoding.Outcome:
        if len(calls) == after:
            raise StopError
        calls.append(task)
        return decode(task, chosen)

    monkeypatch.setattr(decoding, "decode_one", stopping)
    with pytest.raises(StopError):
        build_store(manifest_path, tmp_path / "store", encoding="jpeg95", workers=1, **SMALL)
    with pytest.raises(StoreError, match="hilum build"):
        Store.open(tmp_path / "store")
    monkeypatch.setattr(decoding, "decode_one", decode)
    summary = build_store(manifest_path, tmp_path / "store", encoding="jpeg95", workers=1, **SMALL)
    assert counted(summary) == 24
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_killed_at_any_time_then_finished_is_the_same_store(tmp_path):
    manifest_path = pool(tmp_path / "raw", 400)
    build_store(manifest_path, tmp_path / "straight", encoding="jpeg95", workers=1, **SMALL)
    program = (
        "import sys; from pathlib import Path; from hilum.data.build import build_store\n"
        "if __name__ == '__main__':\n"
        "  build_store(Path(sys.argv[1]), Path(sys.argv[2]), 32, 'jpeg95', 2, shard_bytes=4096)"
    )
    (tmp_path / "program.py").write_text(program)
    for delay in (0.6, 1.2, 1.4, 1.6, 1.8, 2.2):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(manifest_path), str(tmp_path / "store")],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    build_store(manifest_path, tmp_path / "store", encoding="jpeg95", workers=1, **SMALL)
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_of_an_array_make_one_store(tmp_path, order):
    manifest_path = pool(tmp_path / "raw")
    build_store(manifest_path, tmp_path / "straight", encoding="raw", workers=1, **SMALL)
    for position, share in enumerate(order):
        summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, shard=(share, 3), **SMALL)
        assert summary.finished == (position == 2)
    assert counted(summary) == 24
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


def test_jobs_that_finish_at_the_same_moment(tmp_path):
    """All find every shard finished, and all write the index: one after the other, and none takes another's files."""
    manifest_path = pool(tmp_path / "raw")
    for place in ("straight", "store"):
        build_store(manifest_path, tmp_path / place, encoding="raw", workers=1, **SMALL)
    for name in ("store.json", "index.npz"):
        (tmp_path / "store" / name).unlink()
    with ThreadPoolExecutor(6) as pool_of_jobs:
        jobs = [
            pool_of_jobs.submit(build_store, manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
            for _ in range(12)
        ]
    assert all(job.result().finished for job in jobs)
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_jobs_at_the_same_time_make_one_store(tmp_path):
    manifest_path = pool(tmp_path / "raw", 60)
    build_store(manifest_path, tmp_path / "straight", encoding="jpeg95", workers=1, **SMALL)
    program = (
        "import sys; from pathlib import Path; from hilum.data.build import build_store\n"
        "build_store(Path(sys.argv[1]), Path(sys.argv[2]), 32, 'jpeg95', 1, (int(sys.argv[3]), 5), shard_bytes=4096)"
    )
    for attempt in range(4):
        out = tmp_path / f"store{attempt}"
        jobs = [
            subprocess.Popen([sys.executable, "-c", program, str(manifest_path), str(out), str(number)])
            for number in range(5)
        ]
        assert [job.wait() for job in jobs] == [0] * 5
        assert contents(out) == contents(tmp_path / "straight")


def test_a_run_without_shares_finishes_what_is_left(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    share = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, shard=(1, 2), **SMALL)
    assert not share.finished
    summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert summary.finished
    assert summary.shards_kept == share.shards // 2
    assert len(Store.open(tmp_path / "store")) == 24


BROKEN = {
    "zero_bytes": b"",
    "not_an_image": b"patient,finding\n" * 20,
    "truncated": None,
    "missing": None,
    "path_leaves_root": None,
    "not_a_file": None,
}


def spoil(path: Path, reason: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if reason == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif reason == "path_leaves_root":
        outside = path.parents[2] / "outside.png"
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif reason == "not_a_file":
        path.mkdir()
    elif BROKEN[reason] is not None:
        path.write_bytes(BROKEN[reason])


def test_what_cannot_be_read_is_quarantined_with_its_reason_and_no_identifier(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    for number, reason in enumerate(BROKEN):
        spoil(tmp_path / "raw" / "images" / f"p{number // 2:03d}_{number}.png", reason)
    summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert summary.quarantined == dict.fromkeys(BROKEN, 1)
    assert (summary.inputs, summary.stored) == (24, 18)
    listed = pl.read_csv(tmp_path / "store" / "quarantine.csv")
    assert dict(zip(listed["row"], listed["reason"], strict=True)) == dict(enumerate(BROKEN))
    manifest = read_manifest(manifest_path).frame
    assert listed["image_uid"].to_list() == manifest["image_uid"].head(6).to_list()
    text = (tmp_path / "store" / "quarantine.csv").read_text()
    assert "SECRET" not in text
    assert ".png" not in text
    assert set(Store.open(tmp_path / "store").uids) == set(manifest["image_uid"].to_list()[6:])


def test_a_repaired_file_is_tried_again(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    path = tmp_path / "raw" / "images" / "p002_5.png"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL).stored == 23
    path.write_bytes(content)
    summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert (summary.stored, summary.shards - summary.shards_kept) == (24, 1)
    build_store(manifest_path, tmp_path / "fresh", encoding="raw", workers=1, **SMALL)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("missing_decoder", "JPEG 2000 needs a decoder: pip install it."),
        ("unreadable", "cannot be read: Input/output error."),
        ("too_large", "not enough memory to decode it."),
        ("decoder_crashed", "the decoder stopped abnormally on this file."),
    ],
)
def test_what_the_machine_was_to_blame_for_is_tried_again(tmp_path, monkeypatch, reason, message):
    manifest_path = pool(tmp_path / "raw")
    build_store(manifest_path, tmp_path / "straight", encoding="raw", workers=1, **SMALL)
    decode, failing = decoding.decode_one, [read_manifest(manifest_path).frame["image_uid"][5]]
    calls: list[str] = []

    def failing_decode(task: Task, chosen: Settings) -> decoding.Outcome:
        calls.append(task.uid)
        if task.uid in failing:
            return decoding.Outcome(task.uid, reason=reason, message=message, found=decoding.fingerprint(task))
        return decode(task, chosen)

    monkeypatch.setattr(decoding, "decode_one", failing_decode)
    monkeypatch.setattr(Decoders, "isolated", lambda self, tasks: decoding._decode_chunk(tasks, self.settings))

    def build() -> BuildSummary:
        return build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)

    assert build().quarantined == {reason: 1}
    before = contents(tmp_path / "store")
    calls.clear()
    again = build()  # still so: that file is decoded, and nothing is written
    assert (again.shards_kept, calls) == (again.shards, failing)
    assert contents(tmp_path / "store") == before
    failing.clear()
    assert build().stored == 24
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


def test_a_file_that_is_itself_too_large_is_not_tried_again(tmp_path, monkeypatch):
    manifest_path = pool(tmp_path / "raw")
    monkeypatch.setattr("hilum.data.images.MAX_FILE_BYTES", 10)
    build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    monkeypatch.setattr(decoding, "decode_one", None)  # any call would fail
    assert build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL).stored == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*BROKEN, ""]), min_size=1, max_size=10), st.integers(1, 4000))
def test_inputs_are_stored_or_quarantined_exactly(tmp_path_factory, fates, shard_bytes):
    root = tmp_path_factory.mktemp("case")
    manifest_path = pool(root / "raw", len(fates))
    for number, fate in enumerate(fates):
        if fate:
            spoil(root / "raw" / "images" / f"p{number // 2:03d}_{number}.png", fate)
    summary = build_store(manifest_path, root / "store", size=8, encoding="raw", workers=1, shard_bytes=shard_bytes)
    assert summary.inputs == len(fates) == counted(summary)
    assert summary.quarantined == {fate: fates.count(fate) for fate in set(fates) - {""}}
    assert len(Store.open(root / "store")) == fates.count("")


def test_quality_flags_can_refuse(tmp_path):
    manifest_path = pool(tmp_path / "raw", 6)
    Image.fromarray(np.full((50, 50), 9, np.uint8)).save(tmp_path / "raw" / "images" / "p001_2.png")
    kept = build_store(manifest_path, tmp_path / "kept", encoding="raw", workers=1)
    assert kept.stored == 6
    assert kept.flagged["constant"] == 1
    refused = build_store(manifest_path, tmp_path / "refused", encoding="raw", workers=1, refuse=("constant",))
    assert refused.quarantined == {"constant": 1}


def test_a_store_of_other_settings_is_not_overwritten(tmp_path):
    manifest_path = pool(tmp_path / "raw", 4)
    build_store(manifest_path, tmp_path / "store", size=32, workers=1)
    for change in ({"size": 40}, {"size": 32, "encoding": "raw"}):
        with pytest.raises(StoreError, match="--out"):
            build_store(manifest_path, tmp_path / "store", workers=1, **change)
    assert len(Store.open(tmp_path / "store")) == 4


@pytest.mark.parametrize("change", [{"size": 40}, {"encoding": "raw"}, {"intensity": "chexpert-1"}])
def test_an_unfinished_store_of_other_settings_is_not_overwritten(tmp_path, change):
    manifest_path = pool(tmp_path / "raw", 8)
    first = {"size": 32, "encoding": "png", "workers": 1, "shard_bytes": 2048}
    straight = build_store(manifest_path, tmp_path / "straight", **first)
    assert straight.shards > 2
    build_store(manifest_path, tmp_path / "store", shard=(0, 2), **first)
    before = contents(tmp_path / "store")
    with pytest.raises(StoreError, match=r"unfinished store .*--out"):
        build_store(manifest_path, tmp_path / "store", **{**first, **change})
    assert contents(tmp_path / "store") == before
    build_store(manifest_path, tmp_path / "store", **first)
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


def test_an_unfinished_store_of_other_data_is_not_replaced(tmp_path):
    first, other = pool(tmp_path / "one", 8, datasets=("a",)), pool(tmp_path / "two", 8, datasets=("b",))
    settings_of_both = {"size": 32, "encoding": "png", "workers": 1, "shard_bytes": 2048}
    build_store(first, tmp_path / "store", shard=(0, 2), **settings_of_both)
    with pytest.raises(StoreError, match="none of which is in this manifest"):
        build_store(other, tmp_path / "store", **settings_of_both)
    (tmp_path / "store" / "build.json").unlink()  # what an older version left unfinished has none
    assert build_store(first, tmp_path / "store", **settings_of_both).stored == 8


def test_roots(tmp_path):
    manifest_path = pool(tmp_path / "raw", 4)
    (tmp_path / "raw").rename(tmp_path / "moved")
    manifest_path = tmp_path / "moved" / "manifest.parquet"
    with pytest.raises(ConfigError, match="--root pool="):
        build_store(manifest_path, tmp_path / "store", workers=1)
    with pytest.raises(UnknownNameError, match="pool"):
        build_store(manifest_path, tmp_path / "store", workers=1, roots={"pol": tmp_path / "moved"})
    summary = build_store(manifest_path, tmp_path / "store", workers=1, roots={"pool": tmp_path / "moved"})
    assert summary.stored == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"encoding": "jpg"}, UnknownNameError),
        ({"size": 0}, ConfigError),
        ({"shard": (2, 2)}, ConfigError),
        ({"shard": (-1, 2)}, ConfigError),
        ({"workers": 0}, ConfigError),
        ({"workers": -1}, ConfigError),
    ],
)
def test_wrong_settings(tmp_path, options, error):
    with pytest.raises(error):
        build_store(pool(tmp_path / "raw", 2), tmp_path / "store", **({"workers": 1} | options))
    assert not (tmp_path / "store").exists()


def test_a_leaking_manifest_is_not_built(tmp_path):
    manifest_path = pool(tmp_path / "raw", 8)
    frame = read_manifest(manifest_path).frame.with_columns(patient_id=pl.lit("a/same"), dataset=pl.lit("a"))
    frame.write_parquet(manifest_path, metadata=pl.read_parquet_metadata(manifest_path))
    with pytest.raises(LeakageError):
        build_store(manifest_path, tmp_path / "store", workers=1)
    with pytest.raises(ManifestError):
        build_store(tmp_path / "absent.parquet", tmp_path / "store", workers=1)


def test_a_full_disk_keeps_the_finished_shards(tmp_path, monkeypatch):
    manifest_path = pool(tmp_path / "raw")
    real, files = os.fsync, []

    def full(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if name.endswith(".partial"):
            files.append(name)
            if len(files) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"(?s)00002.*No space left on device.*again"):
        build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    names = sorted(path.name for path in (tmp_path / "store" / "shards").iterdir())
    assert [name[:5] for name in names] == ["00000", "00000", "00001", "00001"]
    monkeypatch.setattr(os, "fsync", real)
    summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert summary.shards_kept == 2
    assert len(Store.open(tmp_path / "store")) == 24


def test_a_damaged_shard_is_repaired_by_deleting_it(tmp_path):
    manifest_path = pool(tmp_path / "raw")
    build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    before = contents(tmp_path / "store")
    sorted((tmp_path / "store" / "shards").glob("*.bin"))[1].unlink()
    summary = build_store(manifest_path, tmp_path / "store", encoding="raw", workers=1, **SMALL)
    assert summary.shards - summary.shards_kept == 1
    assert contents(tmp_path / "store") == before


def crash(tasks: list[Task], chosen: Settings) -> list[decoding.Outcome]:
    if any(task.uid == "bad" for task in tasks):
        os.kill(os.getpid(), signal.SIGKILL)
    return [decoding.Outcome(task.uid, b"record", (1,)) for task in tasks]


@pytest.mark.slow
def test_a_file_that_kills_its_decoder_is_refused_and_its_neighbours_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_decode_chunk", crash)
    tasks = [Task("bad" if number == 37 else f"u{number}", f"{number}.png", str(tmp_path)) for number in range(80)]
    decoders = Decoders(Settings(512, "raw", ()), 2)
    try:
        outcomes = list(decoders.in_order(tasks))
    finally:
        decoders.close()
    assert [outcome.uid for outcome in outcomes] == [task.uid for task in tasks]
    assert [outcome.uid for outcome in outcomes if outcome.reason] == ["bad"]
    assert outcomes[37].reason == "decoder_crashed"


def test_shards_are_of_the_promised_size():
    """64 to 256 MB for films of ordinary size and grain: 0.22 to 0.6 bytes a pixel in JPEG, 1 in raw."""
    for encoding, spread in (("jpeg95", (0.22, 0.6)), ("raw", (1.0, 1.0)), ("png", (0.4, 0.75))):
        expected = 512**2 * build_module.ASPECT * build_module.BYTES_PER_PIXEL[encoding]
        images = int(build_module.SHARD_BYTES / expected)
        for rate in spread:
            assert 64e6 <= images * 512**2 * build_module.ASPECT * rate <= 256e6 * 1.05


def test_the_real_sample_in_part(tmp_path, nih_sample):
    paths = sorted((nih_sample / "images").glob("*.png"))
    large = [path for path in paths if path.read_bytes()[16:20] > (512).to_bytes(4, "big")]
    chosen = [*large, *paths[:4]]
    (tmp_path / "raw").mkdir()
    template = read_manifest(pool(tmp_path / "x", len(chosen))).frame
    frame = template.with_columns(pl.Series("source_relpath", [f"images/{path.name}" for path in chosen]))
    roots = {"roots": json.dumps({"pool": str(nih_sample)})}
    write_manifest(Manifest(frame, FINDINGS, roots), tmp_path / "m.parquet")
    summary = build_store(tmp_path / "m.parquet", tmp_path / "store", workers=1)
    assert summary.stored == len(chosen)
    store = Store.open(tmp_path / "store")
    assert {min(height, width) for height, width in zip(store.heights, store.widths, strict=True)} == {512}
    assert len(large) == 2
