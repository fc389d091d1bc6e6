"""JSRT: names, texts, the exact length of a film without a header, faults, and phantoms read back."""

import os

import numpy as np
import pytest

from hilum.core.errors import ManifestError, PathError
from hilum.data.build import build_store
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.layouts import jsrt as layout
from hilum.data.phantoms.layouts.jobs import one_frontal
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.raw import RawFormat
from hilum.data.rows import SourceOptions
from hilum.data.sources import jsrt
from hilum.data.store import Store

WITH = "JPCLN001.IMG\t5\t15\t53\tmale\t1634\t692\tmalignant\t\t\t\tl.upper lobe\tlung cancer\r\n"
SECOND = "JPCLN002.IMG\t5\t30\t?\tfemale\t1614\t1090\tbenign\t\t\t\tl.upper lobe(S5)\tpulmonary hematoma\r\n"
WITHOUT = "JPCNN001.IMG    69   female   non-nodule\r\nJPCNN002.IMG    ?   ?   non-nodule\r\n"
NAMES = ["JPCLN001", "JPCLN002", "JPCNN001", "JPCNN002"]


@pytest.fixture
def make(tmp_path):
    def write(names=NAMES, nodules=WITH + SECOND, others=WITHOUT, suffix=".IMG"):
        for name in names:
            folder = tmp_path / ("Nodule154images" if name.startswith("JPCLN") else "NonNodule93images")
            folder.mkdir(exist_ok=True)
            (folder / f"{name}{suffix}").touch()
        (tmp_path / "Clinical_Information").mkdir(exist_ok=True)
        for file, text in (("CLNDAT_EN.txt", nodules), ("CNNDAT_EN.TXT", others)):
            if text:
                (tmp_path / "Clinical_Information" / file).write_bytes(text.encode())
        return SourceOptions("jsrt", tmp_path)

    return write


def test_rows(make):
    rows = jsrt.read(make())
    frame = rows.frame
    assert frame["image_id"].to_list() == NAMES
    assert frame["label.Nodule"].to_list() == [1, 1, 0, 0]
    assert frame["label.Normal"].to_list() == [0, 0, -1, -1]  # without a nodule is not normal
    assert frame["label.Lung Lesion"].to_list() == [-1, -1, -1, -1]
    assert frame["sex"].to_list() == ["M", "F", "F", None]
    assert frame["age_years"].to_list() == [53, None, 69, None]  # the User's Guide's order would give 15 and 30
    assert frame["mode"].unique().to_list() == ["raw:2048x2048:uint16be:12:inverted"]
    assert frame["source_relpath"].to_list() == [
        "Nodule154images/JPCLN001.IMG", "Nodule154images/JPCLN002.IMG", "NonNodule93images/JPCNN001.IMG",
        "NonNodule93images/JPCNN002.IMG",
    ]  # fmt: skip
    assert set(rows.tables) == {"CLNDAT_EN.txt", "CNNDAT_EN.TXT"}
    assert rows.notes == ()


def test_records_that_run_into_each_other(make):
    frame = jsrt.read(make(nodules=WITH.rstrip("\r\n") + SECOND)).frame
    assert frame["sex"].to_list()[:2] == ["M", "F"]
    assert frame["raw_labels"][0] == '"JPCLN001.IMG 5 15 53 male 1634 692 malignant l.upper lobe lung cancer"'


def test_without_texts_and_with_one_only(make, tmp_path):
    frame = jsrt.read(make(nodules="", others="")).frame
    assert frame["sex"].to_list() == [None] * 4
    assert frame["label.Nodule"].to_list() == [1, 1, 0, 0]
    assert jsrt.read(SourceOptions("jsrt", tmp_path)).notes[0].startswith("none of CLNDAT_EN.TXT")
    rows = jsrt.read(make(nodules=""))
    assert rows.notes == ("2 films are in none of the texts: sex and age unknown",)


def test_suffix_in_another_case_and_other_files(make, tmp_path):
    make(suffix=".img")
    (tmp_path / "Nodule154images" / "JPCLN001.png").touch()  # a converted copy is not the film
    frame = jsrt.read(SourceOptions("jsrt", tmp_path)).frame
    assert frame["image_id"].to_list() == NAMES
    assert frame["source_relpath"][0] == "Nodule154images/JPCLN001.img"


def test_faults(make, tmp_path, tmp_path_factory):
    with pytest.raises(PathError, match=r"no film called JPCLN001\.IMG"):
        jsrt.read(SourceOptions("jsrt", tmp_path))
    options = make(NAMES[1:])
    with pytest.raises(PathError, match=r"1 films that the texts list are not under .*--allow-missing"):
        jsrt.read(options)
    assert jsrt.read(SourceOptions("jsrt", tmp_path, allow_missing=True)).frame.height == 3
    make(nodules=WITH + WITH)
    with pytest.raises(ManifestError, match="a film is listed twice"):
        jsrt.read(options)
    make(nodules="<html>please log in</html>")
    with pytest.raises(ManifestError, match=r"names no film such as JPCLN001\.IMG"):
        jsrt.read(options)
    make()
    (tmp_path / "All247images").mkdir()
    (tmp_path / "All247images" / "JPCLN001.IMG").touch()
    with pytest.raises(ManifestError, match=r"more than once \(in All247images, Nodule154images\)"):
        jsrt.read(options)
    (tmp_path / "All247images" / "JPCLN001.IMG").unlink()
    away = tmp_path_factory.mktemp("away") / "JPCLN003.IMG"
    away.touch()
    (tmp_path / "All247images" / "JPCLN003.IMG").symlink_to(away)
    with pytest.raises(PathError, match="1 links that leave it"):
        jsrt.read(options)


def test_phantoms_come_back_and_a_film_of_another_length_is_refused(tmp_path, monkeypatch):
    """Films of 64 x 64 in place of 2048 x 2048. One is cut, one has a byte more, one is empty."""
    monkeypatch.setattr(layout, "SIDE", 64)
    monkeypatch.setattr(jsrt, "FORMAT", RawFormat(64, 64, 12, inverted=True))
    out = tmp_path / "out"
    write_phantoms(out, "jsrt", 12, 8, 64, 1, workers=1)
    chosen = [pair for patient in plan_cohort(12, 8, 1) if (pair := one_frontal(patient)) is not None]
    rows = jsrt.read(SourceOptions("jsrt", out))
    expected = sorted((int("Nodule" in study.findings) for study, _ in chosen), reverse=True)
    assert rows.frame["label.Nodule"].to_list() == expected
    assert set(expected) == {0, 1}
    assert rows.frame["age_years"].is_between(18, 95).all()
    assert set(rows.frame["sex"]) == {"F", "M"}
    films = [out / path for path in rows.frame["source_relpath"]]
    assert {film.stat().st_size for film in films} == {2 * 64 * 64}
    os.truncate(films[0], 2 * 64 * 64 - 2)
    films[1].write_bytes(films[1].read_bytes() + b"\0")
    films[2].write_bytes(b"")
    manifest, _ = build_manifest([SourceSpec("jsrt", "jsrt", out)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=32, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored) == (len(films), len(films) - 3)
    assert summary.quarantined == {"truncated": 1, "size_mismatch": 1, "zero_bytes": 1}
    store = Store.open(tmp_path / "store")
    film = next(film for film in films if film.stem == store.image_ids[0])
    words = np.frombuffer(film.read_bytes(), ">u2").reshape(64, 64)
    light = (4095 - words.astype(np.float64)).reshape(32, 2, 32, 2).mean((1, 3))
    assert np.corrcoef(store.read(0).ravel(), light.ravel())[0, 1] > 0.99  # not upside down in brightness


@pytest.mark.slow
def test_a_film_of_the_real_size(tmp_path):
    write_phantoms(tmp_path / "out", "jsrt", 2, 8, 64, 0, workers=1)
    manifest, _ = build_manifest([SourceSpec("jsrt", "jsrt", tmp_path / "out")], ManifestOptions())
    assert {path.stat().st_size for path in (tmp_path / "out").rglob("*.IMG")} == {2 * 2048 * 2048}
    summary = build_store(manifest, tmp_path / "store", size=64, encoding="raw", workers=1)
    assert (summary.stored, summary.quarantined) == (len(manifest), {})
