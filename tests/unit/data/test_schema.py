"""The manifest file: what is written comes back, and each kind of inconsistency has its own error."""

import json
import multiprocessing
import resource
import signal
import sys

import numpy as np
import polars as pl
import pytest

from hilum.core.errors import HilumError, LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.data.schema import COLUMNS, SCHEMA_VERSION, Manifest, complete, read_manifest, write_manifest

FINDINGS = ("Edema", "Normal")


def small(**changes) -> Manifest:
    columns = {
        "image_uid": ["a" * 16, "b" * 16, "c" * 16],
        "dataset": ["d"] * 3,
        "source_relpath": ["x/1.png", "x/2.png", "y..z/3.png"],
        "source_root_key": ["d"] * 3,
        "patient_id": ["d/1", "d/1", "d/2"],
        "study_id": ["d/1/1", "d/1/2", "d/2/1"],
        "image_id": ["1", "2", "3"],
        "view": ["PA", "LATERAL", "UNKNOWN"],
        "split_project": ["train", "train", "test"],
        "ssl_ok": [True, True, False],
        "ssl_reason": ["", "", "excluded"],
        "label.Edema": [1, 0, -1],
        "label.Normal": [0, -2, 1],
    } | changes
    return Manifest(complete(pl.DataFrame(columns), FINDINGS), FINDINGS, {"roots": json.dumps({"d": "/data/d"})})


def test_round_trip_keeps_rows_types_findings_and_unknown_columns(tmp_path):
    manifest = small(hospital=["north", None, "south"])
    write_manifest(manifest, tmp_path / "m.parquet")
    back = read_manifest(tmp_path / "m.parquet")
    assert back.frame.equals(manifest.frame)
    assert back.frame["hospital"].to_list() == ["north", None, "south"]
    assert back.frame.schema["label.Edema"] == pl.Int8
    assert back.findings == FINDINGS
    assert back.metadata["schema_version"] == SCHEMA_VERSION
    assert str(back.roots()["d"]) == "/data/d"
    np.testing.assert_array_equal(back.labels(), np.array([[1, 0], [0, -2], [-1, 1]], np.int8))
    assert back.labels().dtype == np.int8


def test_all_documented_columns_are_there():
    assert set(COLUMNS) <= set(small().frame.columns)


def test_the_header_is_readable_without_hilum(tmp_path):
    write_manifest(small(), tmp_path / "m.parquet")
    header = pl.read_parquet_metadata(tmp_path / "m.parquet")
    assert json.loads(header["findings"]) == list(FINDINGS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_uid": ["a" * 16, "a" * 16, "c" * 16]}, ManifestError, "share an image_uid"),
        ({"split_project": ["train", "test", "test"], "ssl_ok": [False] * 3}, LeakageError, "more than one split"),
        ({"ssl_ok": [True, True, True]}, LeakageError, "marked ssl_ok"),
        ({"source_relpath": ["/x/1.png", "2", "3"]}, PathError, "absolute or leave"),
        ({"source_relpath": ["x/../../1.png", "2", "3"]}, PathError, "absolute or leave"),
        ({"source_relpath": ["C:/x/1.png", "2", "3"]}, PathError, "absolute or leave"),
        ({"view": ["PA", "FRONT", "AP"]}, ManifestError, "view 'FRONT'"),
        ({"split_project": ["train", "train", "holdout"]}, ManifestError, "split_project 'holdout'"),
    ],
)
def test_inconsistent_rows_are_refused_on_reading(tmp_path, changes, error, message):
    write_manifest(small(**changes), tmp_path / "m.parquet")
    with pytest.raises(error, match=message) as caught:
        read_manifest(tmp_path / "m.parquet")
    assert "d/1" not in str(caught.value)  # patients are not named
    assert read_manifest(tmp_path / "m.parquet", check=False).findings == FINDINGS


def test_one_crossing_patient_in_ten_thousand_rows_is_found(tmp_path):
    count = 10_000
    split = ["train"] * (count - 1) + ["test"]
    frame = pl.DataFrame(
        {
            "image_uid": [f"{i:016x}" for i in range(count)],
            "dataset": "d",
            "source_relpath": [f"{i}.png" for i in range(count)],
            "source_root_key": "d",
            "patient_id": [f"p{i}" for i in range(count - 1)] + ["p77"],
            "study_id": [str(i) for i in range(count)],
            "image_id": [str(i) for i in range(count)],
            "view": "PA",
            "split_project": split,
            "ssl_ok": False,
            "ssl_reason": "",
        }
    )
    write_manifest(Manifest(complete(frame, ()), (), {}), tmp_path / "m.parquet")
    with pytest.raises(LeakageError, match="1 patients"):
        read_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize("value", [2, -3])
def test_a_label_code_that_does_not_exist_is_refused(tmp_path, value):
    with pytest.raises(UnknownLabelError, match=f"label.Edema holds {value}"):
        write_manifest(small(**{"label.Edema": [1, value, 0]}), tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


def test_missing_columns_and_nulls_are_named(tmp_path):
    manifest = small()
    for column in ("patient_id", "label.Edema"):
        with pytest.raises(MissingColumnError, match=column):
            write_manifest(Manifest(manifest.frame.drop(column), FINDINGS, {}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="empty values in patient_id"):
        write_manifest(small(patient_id=["d/1", None, "d/2"]), tmp_path / "m.parquet")


def test_a_label_column_outside_the_vocabulary_is_refused(tmp_path):
    frame = small().frame.with_columns(pl.lit(1, pl.Int8).alias("label.Edma"))
    with pytest.raises(UnknownLabelError, match=r"label\.Edma"):
        write_manifest(Manifest(frame, FINDINGS, {}), tmp_path / "m.parquet")


def test_findings_edited_in_the_header_are_noticed(tmp_path):
    write_manifest(small(), tmp_path / "m.parquet")
    frame, header = pl.read_parquet(tmp_path / "m.parquet"), pl.read_parquet_metadata(tmp_path / "m.parquet")
    header.pop("ARROW:schema")
    frame.write_parquet(tmp_path / "m.parquet", metadata=header | {"findings": json.dumps(["Normal", "Edema"])})
    with pytest.raises(ManifestError, match="do not match their hash"):
        read_manifest(tmp_path / "m.parquet")


def test_files_that_are_no_manifest_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="is not a file"):
        read_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        read_manifest(tmp_path / "text.parquet")
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match="schema version 'none'"):
        read_manifest(tmp_path / "other.parquet")


def test_a_truncated_manifest_is_an_error_of_ours(tmp_path):
    write_manifest(small(), tmp_path / "m.parquet")
    content = (tmp_path / "m.parquet").read_bytes()
    for length in range(0, len(content), len(content) // 25):
        (tmp_path / "cut.parquet").write_bytes(content[:length])
        with pytest.raises(HilumError):
            read_manifest(tmp_path / "cut.parquet")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A file size limit stands in for the disk's end; in a child process, because limits cannot be raised again."""
    path = tmp_path / "m.parquet"
    write_manifest(small(), path)
    before = path.read_bytes()
    child = multiprocessing.get_context("spawn").Process(target=_write_on_a_full_disk, args=(path,))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.parquet"]


def _write_on_a_full_disk(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_manifest(small(), path)
    except HilumError as error:
        sys.exit(7 if "Could not write" in str(error) else 8)


def test_writing_over_a_manifest_fails_whole(tmp_path):
    """A refused write leaves what was there."""
    write_manifest(small(), tmp_path / "m.parquet")
    before = (tmp_path / "m.parquet").read_bytes()
    with pytest.raises(UnknownLabelError):
        write_manifest(small(**{"label.Edema": [9, 0, 0]}), tmp_path / "m.parquet")
    assert (tmp_path / "m.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]
