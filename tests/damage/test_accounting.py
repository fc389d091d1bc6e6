"""Nothing is lost in silence: what goes in is stored, refused with its reason, or said to be left out. Exactly.

Folders are generated with faults planted; the counts that `hilum manifest` and `hilum build` print must add up to what
was planted, and the command must fail where more was refused than its budget allows.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from damage_inputs import compressed, interlaced, png, radiograph, saved, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid

from hilum.commands import build as build_command
from hilum.core.errors import ManifestError, StoreError
from hilum.data.build import build_store
from hilum.data.manifest import ManifestOptions, build_manifest, parse_source
from hilum.data.schema import Manifest, write_manifest
from hilum.data.store import Store

SMALL = np.random.default_rng(0).integers(40, 200, (20, 16), dtype=np.uint8)
PICTURE = Image.fromarray(SMALL)
PNG, JPEG = saved(PICTURE), saved(PICTURE, "JPEG")
DICOM = written(radiograph(SMALL))
SOUND = {
    "png": PNG, "jpeg": JPEG, "dicom": DICOM, "png_16": saved(Image.fromarray(SMALL.astype(np.uint16) * 200)),
    "png_rgba": saved(PICTURE.convert("RGBA")), "interlaced": interlaced(SMALL),
    "rle": compressed(SMALL, uid.RLELossless),
}  # fmt: skip
BROKEN = {
    "zero_bytes": b"",
    "truncated": PNG[: len(PNG) // 2],
    "damaged": PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:],
    "not_an_image": b"<html>403</html>" * 9,
    "no_pixel_data": DICOM[: DICOM.index(b"\xe0\x7f\x10\0")],
    "multi_frame": written(radiograph(SMALL, NumberOfFrames=3)),
    "unsupported_mode": saved(PICTURE.convert("CMYK"), "JPEG"),
    "too_large": png(50000, 50000, 1, 0, b"x"),
    "size_mismatch": written(radiograph(SMALL, Rows=21)),
}
NAMES = st.text("abÄé胸 .-'$", min_size=1, max_size=8).map(lambda name: name.strip(" .") or "n")
SUFFIXES = st.sampled_from([".png", ".PNG", ".JpG", ".jpeg", ".dcm", ".DICOM"])
FATES = st.sampled_from([*SOUND, *BROKEN, "link", "hidden", "text", "folder", "pipe", "circle", "vanishes", "repeated"])
ENTRIES = st.lists(st.tuples(NAMES, SUFFIXES, FATES), min_size=1, max_size=6)


def plant(root: Path, entries: list[tuple[str, str, str]]) -> dict[str, str]:
    """Make the files; returns what each path was meant to be. The first one is always sound."""
    planted = {"0.png": "png"}
    (root / "0.png").write_bytes(PNG)
    for number, (name, suffix, fate) in enumerate(entries):
        folder = root / ("" if number % 2 else f"d{number % 3}")
        folder.mkdir(exist_ok=True)
        path = folder / f"{number}{name}{suffix}"
        if fate == "link":
            path.symlink_to(root / "0.png")
        elif fate == "circle":
            path.symlink_to(path)
        elif fate == "folder":
            path.mkdir()
        elif fate == "pipe":
            os.mkfifo(path)
        elif fate == "hidden":
            path = path.with_name(f".{path.name}")
            path.write_bytes(PNG)
        elif fate == "text":
            path = path.with_suffix(".txt")
            path.write_bytes(b"a remark")
        else:
            path.write_bytes({**SOUND, **BROKEN}.get(fate, PNG))
        planted[path.relative_to(root).as_posix()] = fate
    return planted


def said(notes: list[str], what: str) -> int:
    """The number at the start of the note that says this; 0 where none does."""
    found = [re.fullmatch(rf"(?:.*: )?(\d+) {what}.*", note) for note in notes]
    return sum(int(match[1]) for match in found if match)


def reasons(store: Path) -> dict[str, int]:
    table = pl.read_csv(store / "quarantine.csv", schema_overrides={"reason": pl.String})
    return dict(table["reason"].value_counts().iter_rows())


def accounts(root: Path, entries: list[tuple[str, str, str]], with_table: bool) -> None:
    """Plant, read, build, and add up."""
    planted = plant(root / "raw", entries)
    fates = list(planted.values())
    listed = [path for path, fate in planted.items() if fate not in ("text", "hidden")] if with_table else []
    if with_table:
        rows = ["path,patient_id,Edema", *(f'"{path}",p{number},1' for number, path in enumerate(listed))]
        (root / "raw" / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    manifest, notes = build_manifest([parse_source(f"folder={root / 'raw'}")], ManifestOptions(allow_missing=True))
    left_out = sum(fates.count(fate) for fate in ("pipe", "circle"))
    assert said(notes, "pipes, devices or broken links") == left_out
    assert said(notes, "other files, hidden or no images") == fates.count("text") + fates.count("hidden")
    if with_table:
        absent = left_out + fates.count("folder")
        assert said(notes, f"of {len(listed)} listed images are not under") == absent
        assert len(listed) == len(manifest) + absent
    else:
        assert said(notes, "links inside the folder") == fates.count("link")
        # each entry of the folder is a row, or in a note, or a folder
        assert len(planted) == (len(manifest) + left_out + fates.count("link") + fates.count("text")
                                + fates.count("hidden") + fates.count("folder"))  # fmt: skip

    gone = [path for path, fate in planted.items() if fate == "vanishes"]
    for path in gone:
        (root / "raw" / path).unlink()
    twice = [path for path, fate in planted.items() if fate == "repeated"]
    if twice:
        write_manifest(repeated(manifest, twice), root / "doubled.parquet")
        with pytest.raises(ManifestError, match=f"{2 * len(twice)} rows share an image_uid"):
            build_store(root / "doubled.parquet", root / "none", 8, "raw", workers=1)
        assert not (root / "none").exists()

    write_manifest(manifest, root / "manifest.parquet")
    expected = {reason: fates.count(reason) for reason in BROKEN if reason in fates}
    expected |= {"missing": len(gone)} if gone else {}
    refused = sum(expected.values())
    budget = (refused - 1) / len(manifest)
    if refused:
        with pytest.raises(StoreError, match=f"{refused} of {len(manifest)} images"):
            build_command.run(root / "manifest.parquet", root / "store", 8, "raw", workers=1, budget=max(budget, 0))
    else:
        build_command.run(root / "manifest.parquet", root / "store", 8, "raw", workers=1, budget=0)
    summary = build_store(root / "manifest.parquet", root / "store", 8, "raw", workers=1)
    assert summary.shards_kept == summary.shards, "refused files that did not change are not tried again"
    assert summary.quarantined == reasons(root / "store") == expected
    assert summary.inputs == len(manifest) == summary.stored + refused
    assert len(Store.open(root / "store")) == summary.stored
    sound = {path for path, fate in planted.items() if fate in SOUND or fate in ("repeated", *["link"] * with_table)}
    assert set(Store.open(root / "store").image_ids) == sound


def repeated(manifest: Manifest, paths: list[str]) -> Manifest:
    """The manifest with some rows there twice: refused, because nobody can say which one counts."""
    again = manifest.frame.filter(pl.col("source_relpath").is_in(paths))
    return Manifest(pl.concat([manifest.frame, again]), manifest.findings, manifest.metadata)


def examples(count: int):
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(30)
@given(ENTRIES, st.booleans())
def test_inputs_are_stored_refused_or_said_to_be_left_out(tmp_path_factory, entries, with_table):
    root = tmp_path_factory.mktemp("case")
    (root / "raw").mkdir()
    accounts(root, entries, with_table)
    shutil.rmtree(root)


@pytest.mark.slow
@examples(1000)
@given(ENTRIES, st.booleans())
def test_a_thousand_folders_add_up(tmp_path_factory, entries, with_table):
    root = tmp_path_factory.mktemp("case")
    (root / "raw").mkdir()
    accounts(root, entries, with_table)
    shutil.rmtree(root)


def test_every_fate_once(tmp_path):
    """What hypothesis may not draw in thirty attempts."""
    fates = [*SOUND, *BROKEN, "link", "hidden", "text", "folder", "pipe", "circle", "vanishes", "repeated"]
    for with_table in (False, True):
        root = tmp_path / str(with_table)
        (root / "raw").mkdir(parents=True)
        accounts(root, [("é 胸", ".PnG", fate) for fate in fates], with_table)


def test_the_refusals_are_in_the_stores_manifest_too(tmp_path):
    (tmp_path / "raw").mkdir()
    accounts(tmp_path, [("x", ".png", "truncated"), ("y", ".png", "png")], False)
    header = json.loads((tmp_path / "store" / "store.json").read_text())
    assert header["quarantined"] == 1
    assert pl.read_parquet(tmp_path / "store" / "manifest.parquet").height == 3
