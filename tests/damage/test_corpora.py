"""Public files of odd and broken images, as far as they are at hand: read or refused with a reason, and counted."""

import os
import subprocess
import sys
from pathlib import Path

import corpora
import pytest
from damage_inputs import phantom_dicoms, rasters

from hilum.data import images


def test_a_slice_of_what_pydicom_ships(report):
    found = corpora.sources([])
    paths = corpora.files(found["pydicom/data/test_files"], everything=False)
    assert len(paths) > 150
    said = corpora.run(paths[::4])
    report(f"pydicom/data/test_files, every fourth: {said}")
    assert said["failed"] == []
    assert said["files"] == len(paths[::4]) == sum(said["outcomes"].values())
    assert said["outcomes"]["read"] > 10
    assert said["peak_mb"] < 1000


@pytest.mark.slow
def test_all_that_is_at_hand(report):
    folders = [Path(folder) for folder in os.environ.get("HILUM_CORPORA", "").split(os.pathsep) if folder]
    total = 0
    for line, count, failed in corpora.lines(folders):
        report(line)
        total += count
        assert failed == 0, line
    report(f"{total} public files")
    assert total > 190


def test_a_folder_is_counted_file_by_file(tmp_path):
    inside = tmp_path / "corpora" / "mine"
    (inside / "deep").mkdir(parents=True)
    content = {"a.png": rasters()["png"], "deep/b": phantom_dicoms()["rle"], "c.jpg": rasters()["jpeg"][:-30], "d": b""}
    for name, body in content.items():
        (inside / name).write_bytes(body)
    assert corpora.sources([tmp_path / "corpora"])["corpora/mine"] == inside
    said = corpora.run(corpora.files(inside, everything=True))
    assert said["outcomes"] == {"read": 2, "truncated": 1, "zero_bytes": 1}


def test_what_is_not_here_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PACKAGES", {})
    (tmp_path / "pngsuite-copy").mkdir()
    (tmp_path / "pngsuite-copy" / "x.png").write_bytes(rasters()["png"])
    said = list(corpora.lines([tmp_path]))
    assert sum(count for _, count, _ in said) == 1
    assert sum("skipped, not here" in line for line, _, _ in said) == len(corpora.KNOWN) - 1
    assert not any(line.startswith("PngSuite: skipped") for line, _, _ in said)


def test_a_reader_that_accepts_too_much_would_be_found(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(rasters()["png"][:-100])
    whole = images.read_image(rasters()["png"])
    monkeypatch.setattr(corpora, "read_image", lambda path: whole)
    assert corpora.judge(tmp_path / "a.png") == "accepted_what_pillow_refuses"


def test_nothing_found_is_a_failure(tmp_path):
    environment = {**os.environ, "HILUM_CORPORA": str(tmp_path)}
    script = "import sys, corpora; corpora.PACKAGES = {}; sys.argv[1:] = []; sys.exit(corpora.main())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert done.returncode == 1
    assert "0 files, 0 failures" in done.stdout
