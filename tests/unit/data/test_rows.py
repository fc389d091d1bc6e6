"""What sources share: scanning folders, paths of tables, ages, views."""

import os
from pathlib import Path

import polars as pl
import pytest

from hilum.core.errors import EmptyStudyError, ManifestError, PathError
from hilum.core.types import VIEWS
from hilum.data.rows import SourceOptions, ages, check_dataset_name, keep_existing, located, relative_paths, scan
from hilum.data.views import RAW_VIEWS, is_frontal, view_of


def test_scan_lists_files_follows_inner_links_and_records_outer_ones(tmp_path):
    root, away = tmp_path / "root", tmp_path / "away"
    for folder in (root / "a/b", away):
        folder.mkdir(parents=True)
    for file in (root / "a/b/1.png", root / "ü.png", away / "2.png"):
        file.touch()
    (root / "out").symlink_to(away)
    (root / "out.png").symlink_to(away / "2.png")
    (root / "in").symlink_to(root / "a")
    (root / "a/b/loop").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    (root / "x.dcm").mkdir()
    found = scan(root)
    assert "a/b/1.png" in found.files
    assert "in/b/1.png" in found.files
    assert "ü.png" in found.files
    assert found.outside == {"out", "out.png"}
    assert {"in", "a/b/loop"} <= found.links
    assert not [name for name in found.files if name.endswith(("pipe.png", "x.dcm", "2.png"))]


def test_scan_counts_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):  # noqa: PTH123 pathlib cannot hold this name
        pass
    assert scan(tmp_path).unnamed == 1


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.png", "a/../../x.png", "a/..", "C:/x.png", "a\\b.png", "a\nb.png", ""]
)
def test_paths_that_leave_their_root_name_the_row(tmp_path, path):
    with pytest.raises(PathError, match=r"t\.csv, row 3"):
        relative_paths(pl.Series(["fine.png", path]), tmp_path / "t.csv")


def test_harmless_paths_are_normalised(tmp_path):
    paths = relative_paths(pl.Series(["./a.png", "a//b.png", "a/./b.png", "..a/b..png", "a/.../b.png"]), tmp_path)
    assert paths.to_list() == ["a.png", "a/b.png", "a/b.png", "..a/b..png", "a/.../b.png"]


def listed(tmp_path, present):
    frame = pl.DataFrame(
        {"source_relpath": ["1.png", "2.png", "3.png"], "patient_id": ["a", "a", "b"], "study_id": ["1", "1", "1"]}
    )
    for name in present:
        (tmp_path / name).touch()
    return located(frame, tmp_path / "t.csv"), scan(tmp_path)


def test_a_study_left_without_an_image_has_its_own_error(tmp_path):
    frame, found = listed(tmp_path, ["1.png", "2.png"])
    with pytest.raises(EmptyStudyError, match=r"1 of 3 .*t\.csv row 4.* 1 studies have no image left"):
        keep_existing(frame, found, tmp_path, SourceOptions("d", tmp_path), studies=True)
    kept, notes = keep_existing(frame, found, tmp_path, SourceOptions("d", tmp_path, allow_missing=True), studies=True)
    assert kept["source_relpath"].to_list() == ["1.png", "2.png"]
    assert notes == [f"1 of 3 listed images are not under {tmp_path}: left out. 1 studies have no image left."]


def test_a_study_with_one_image_left_is_a_missing_image_only(tmp_path):
    frame, found = listed(tmp_path, ["1.png", "3.png"])
    with pytest.raises(PathError, match="1 of 3 listed images"):
        keep_existing(frame, found, tmp_path, SourceOptions("d", tmp_path), studies=True)


def test_ages():
    raw = ["58", "058Y", "006M", "0073D", "414", "413Y", "", "85 or more", "-3", " 12 "]
    raw += ["63.0", "63.5", "1.5Y", "63.", "1e2"]
    frame = pl.DataFrame({"raw": raw}).select(ages(pl.col("raw")).alias("age"))
    expected = [58.0, 58.0, 0.5, None, None, None, None, None, None, 12.0, 63.0, 63.5, 1.5, None, None]
    assert frame["age"].to_list() == expected
    short = pl.DataFrame({"raw": ["073D", "006W"]}).select(ages(pl.col("raw")))["raw"]
    assert short.to_list() == pytest.approx([73 / 365.25, 42 / 365.25])


def test_views_of_the_releases():
    raw = [
        "PA",
        "ap",
        " LATERAL ",
        "LL",
        "RL",
        "AP AXIAL",
        "PA LLD",
        "postero-anterior",
        "antero-posterior",
        "AP_horizontal",
    ]
    raw += ["XTABLE LATERAL", "LAO", "SWIMMERS", "", None, "something new"]
    frame = pl.DataFrame({"raw": raw}).select(view=view_of(pl.col("raw")), frontal=is_frontal(pl.col("raw")))
    assert frame["view"].to_list() == [
        "PA", "AP", "LATERAL", "LL", "RL", "AP", "DECUBITUS", "PA", "AP", "AP_SUPINE",
        "LATERAL", "OBLIQUE", "OTHER", "UNKNOWN", "UNKNOWN", "OTHER",
    ]  # fmt: skip
    assert frame["frontal"].to_list() == [
        True, True, False, False, False, True, False, True, True, True, False, False, None, None, None, None,
    ]  # fmt: skip
    assert set(RAW_VIEWS.values()) <= set(VIEWS)


@pytest.mark.parametrize(
    ("raw", "view", "frontal"),
    [("AP erect", "AP", True), ("portable-AP", "AP", True), ("erect PA", "PA", True), ("supine AP", "AP_SUPINE", True),
     ("Frontal", "UNKNOWN", True), ("AP/PA", "UNKNOWN", True), ("portable", "OTHER", None)],
)  # fmt: skip
def test_views_as_people_write_them(raw, view, frontal):
    made = pl.DataFrame({"raw": [raw]}).select(view=view_of(pl.col("raw")), frontal=is_frontal(pl.col("raw")))
    assert made.rows() == [(view, frontal)]


def test_every_word_for_a_view_is_in_the_docs():
    assert pl.Series(VIEWS).to_frame("raw").select(view_of(pl.col("raw")))["raw"].to_list() == list(VIEWS)
    page = (Path(__file__).parents[3] / "docs/how-to/add-a-dataset.md").read_text()
    assert [word for word in RAW_VIEWS if word and f"`{word}`" not in page] == []


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b", "a\x1f"])
def test_dataset_names_that_would_break_ids_are_refused(name):
    with pytest.raises(ManifestError, match="Dataset name"):
        check_dataset_name(name)
