"""Planted faults: each of them becomes what `faults.csv` says, and nothing else changes."""

import csv
import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest

from hilum.core import errors
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.build import build_store
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.faults import IMAGE_FAULTS, KINDS, LISTS, READABLE, REFUSED, TABLES, parse_kinds, plant
from hilum.data.phantoms.layouts import LAYOUTS
from hilum.data.phantoms.layouts import jsrt as jsrt_layout
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.raw import RawFormat
from hilum.data.sources import jsrt
from hilum.data.store import Store

SEED = 6
FAST = ("cxrlt", "nih", "openi", "rsna")
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
POSSIBLE = {
    "brax": {"truncated", "zero_bytes", "sixteen_bit", "rgba", "duplicate", "blank_view"},
    "cxrlt": {"truncated", "zero_bytes", "duplicate", "blank_view"},
    "jsrt": {"truncated", "zero_bytes", "duplicate", "suffix_in_capitals"},
    "nih": {"truncated", "zero_bytes", "sixteen_bit", "rgba", "duplicate", "blank_view"},
    "openi": {"truncated", "zero_bytes", "sixteen_bit", "rgba", "duplicate", "suffix_in_capitals"},
    "rsna": {"truncated", "zero_bytes", "monochrome1", "no_transfer_syntax", "no_pixel_data", "duplicate",
             "suffix_in_capitals"},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_films():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsrt_layout, "SIDE", 64)
        patch.setattr(jsrt, "FORMAT", RawFormat(64, 64, 12, inverted=True))
        yield


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Folder with phantoms of a layout, written once."""
    folders = {}

    def write(layout):
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("clean") / layout
            write_phantoms(folders[layout], layout, patients(layout), SEED, 64, 0, workers=1)
        return folders[layout]

    return write


def patients(layout):
    return 20 if layout in ("cxrlt", "cxrlt2023") else 12  # the least with which each of its files has rows


def faulty(clean, out, layout, kinds, seed=SEED):
    """A copy with faults, and what is listed."""
    shutil.copytree(clean(layout), out)
    jobs = LAYOUTS[layout].jobs(plan_cohort(patients(layout), SEED, 0), SEED, 64)
    planted = plant(out, layout, jobs, kinds, seed)
    with (out / "faults.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [fault["kind"] for fault in listed] == [fault.kind for fault in planted]
    return listed


def manifest_of(out, layout, **options):
    source = LAYOUTS[layout].source
    return build_manifest([SourceSpec(source, source, out)], ManifestOptions(**options))[0]


def built(out, layout, store):
    manifest = manifest_of(out, layout)
    summary = build_store(manifest, store, size=64, encoding="raw", workers=1)
    assert summary.inputs == summary.stored + sum(summary.quarantined.values())
    frame = manifest.frame.select("image_uid", "source_relpath", "image_id", "view")
    reasons = pl.read_csv(store / "quarantine.csv", schema_overrides={"image_uid": pl.String})
    return summary, frame.join(reasons.select("image_uid", "reason"), on="image_uid", how="left"), Store.open(store)


@pytest.mark.parametrize("layout", EVERY)
def test_every_fault_becomes_what_is_listed(tmp_path, clean, layout):
    listed = faulty(clean, tmp_path / "faulty", layout, READABLE)
    kinds = {fault["kind"] for fault in listed}
    assert kinds == POSSIBLE.get(layout, kinds)
    assert {"truncated", "zero_bytes", "duplicate"} <= kinds
    before, _, whole = built(clean(layout), layout, tmp_path / "clean-store")
    after, frame, spoilt = built(tmp_path / "faulty", layout, tmp_path / "faulty-store")
    expected = Counter(f["expected"].removeprefix("quarantine:") for f in listed if f["expected"] != "read")
    assert after.inputs == before.inputs  # nothing is lost on the way to the manifest
    assert Counter(after.quarantined) - Counter(before.quarantined) == expected
    assert not Counter(before.quarantined) - Counter(after.quarantined)
    for fault in listed:
        if fault["row"]:
            continue
        row = frame.filter(pl.col("source_relpath") == fault["path"]).row(0, named=True)
        assert row["reason"] == (None if fault["expected"] == "read" else fault["expected"].split(":")[1]), fault
        if fault["kind"] in IMAGE_FAULTS and fault["expected"] == "read":
            pair = [store.read(int(np.flatnonzero(store.uids == row["image_uid"])[0])) for store in (whole, spoilt)]
            assert np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1] > 0.99, fault


def test_a_blank_view_is_unknown_and_a_copy_is_of_another_patient(tmp_path, clean):
    kinds = ("blank_view", "duplicate")
    listed = {fault["kind"]: fault for fault in faulty(clean, tmp_path / "out", "nih", kinds)}
    _, frame, _ = built(tmp_path / "out", "nih", tmp_path / "store")
    with (tmp_path / "out" / listed["blank_view"]["path"]).open() as file:
        row = file.read().split("\n")[int(listed["blank_view"]["row"]) - 1]
    assert frame.filter(pl.col("view") == "UNKNOWN")["image_id"].to_list() == [row.split(",")[0]]
    copied = tmp_path / "out" / listed["duplicate"]["path"]
    other = tmp_path / "out" / listed["duplicate"]["note"].split()[4].rstrip(";")
    assert copied.read_bytes() == other.read_bytes()
    assert copied.name[:8] != other.name[:8]


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(tmp_path, clean, layout, kind):
    possible = {"unknown_label": TABLES, "missing_column": TABLES, "patient_in_two_splits": LISTS}.get(kind, LAYOUTS)
    if layout not in possible:
        with pytest.raises(ConfigError, match=f"can have none of these faults: {kind}"):
            faulty(clean, tmp_path / "out", layout, (kind,))
        return
    (fault,) = faulty(clean, tmp_path / "out", layout, (kind,))
    error = getattr(errors, fault["expected"].removeprefix("refuse:"))
    official = {"split": "official", "val_fraction": 0} if "official" in fault["note"] else {}
    with pytest.raises(error) as caught:
        manifest_of(tmp_path / "out", layout, **official)
    assert type(caught.value) is error
    if fault["row"] and kind == "unknown_label":
        assert f"row {fault['row']}" in str(caught.value)
    if fault["note"] == "read with --allow-missing":
        whole, less = (manifest_of(out, layout, allow_missing=True) for out in (clean(layout), tmp_path / "out"))
        assert len(less) == len(whole) - 1


def test_same_seed_same_faults_each_in_another_image(tmp_path, clean):
    one, two = (faulty(clean, tmp_path / name, "nih", READABLE) for name in ("one", "two"))
    assert one == two
    assert faulty(clean, tmp_path / "three", "nih", READABLE, seed=SEED + 1) != one
    images = [fault["path"] for fault in one if not fault["row"]]
    assert len(set(images)) == len(images) == 5


def test_the_whole_command_and_a_later_run_without_faults(tmp_path):
    summary = write_phantoms(tmp_path / "out", "nih", 4, SEED, 64, 0, workers=1, faults=("truncated", "rgba"))
    assert summary["faults"] == ["truncated", "rgba"]
    assert (tmp_path / "out" / "faults.csv").read_text().startswith("kind,path,row,expected,note\ntruncated,images/")
    assert "faults" not in write_phantoms(tmp_path / "out", "nih", 4, SEED, 64, 0, workers=1)
    assert not (tmp_path / "out" / "faults.csv").exists()


def test_kinds_are_read_from_a_text(tmp_path):
    assert parse_kinds("") == ()
    assert parse_kinds("images") == READABLE
    assert parse_kinds("rgba, images") == ("rgba", *(kind for kind in READABLE if kind != "rgba"))
    assert set(READABLE) | set(REFUSED) == set(KINDS)
    with pytest.raises(UnknownNameError, match="Did you mean 'truncated'"):
        parse_kinds("trunkated")
    with pytest.raises(ConfigError, match="can have none of these faults: monochrome1"):
        write_phantoms(tmp_path / "out", "nih", 2, 1, 64, 0, workers=1, faults=("monochrome1",))
    assert not (tmp_path / "out").exists()
