"""Shenzhen and Montgomery: names, texts with their spellings, faults, and phantoms read back."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hilum.core.errors import ManifestError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.manifest import SOURCES, ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import encode
from hilum.data.phantoms.layouts.jobs import one_frontal
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import montgomery, shenzhen
from hilum.data.store import Store

SHENZHEN = {
    "CHNCXR_0001_0": "male 45yrs\nnormal\n",
    "CHNCXR_0002_0": "femal 32yrs\nNormal.\n",
    "CHNCXR_0003_1": "Female, 28yrs\nright PTB, pleural effusion\n",
    "CHNCXR_0004_0": "male 16month\nscoliosis, otherwise normal\n",
    "CHNCXR_0005_1": "\ufefffemale 64days\r\nbilateral PTB\r\n",
    "CHNCXR_0006_1": "normal\n",  # no demographics, and it contradicts the name
}
MONTGOMERY = {
    "MCUCXR_0001_0": "Patient's Sex: F \nPatient's Age: 027Y\nnormal\n",
    "MCUCXR_0002_1": "Patient's Sex: M\r\nPatient's Age: 040Y\r\ncavity in the right upper lobe\r\nscarring\r\n",
}


@pytest.fixture
def make(tmp_path):
    def write(texts, name="shenzhen", images=None, folder="CXR_png", suffix=".png"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "ClinicalReadings").mkdir(exist_ok=True)
        for stem, text in texts.items():
            (tmp_path / "ClinicalReadings" / f"{stem}.txt").write_bytes(text.encode())
        for stem in texts if images is None else images:
            (tmp_path / folder / f"{stem}{suffix}").touch()
        return SourceOptions(name, tmp_path)

    return write


def test_shenzhen(make):
    rows = shenzhen.read(make(SHENZHEN))
    frame = rows.frame
    assert frame["image_id"].to_list() == list(SHENZHEN)
    assert frame["patient_id"].to_list() == [name[:-2] for name in SHENZHEN]
    assert frame["source_relpath"][2] == "CXR_png/CHNCXR_0003_1.png"
    assert frame["sex"].to_list() == ["M", "F", "F", "M", "F", None]
    assert frame["age_raw"].to_list() == ["45yrs", "32yrs", "28yrs", "16month", "64days", None]
    assert frame["age_years"].to_list() == pytest.approx([45, 32, 28, 16 / 12, 64 / 365.25, None])
    assert frame["label.Tuberculosis"].to_list() == [0, 0, 1, 0, 1, 1]
    assert frame["label.Normal"].to_list() == [1, 1, 0, -1, 0, -1]
    assert rows.conflicts == {"Normal": 1}
    assert json.loads(frame["raw_labels"][2]) == {"name": "1", "reading": "right PTB, pleural effusion"}
    assert frame["view_raw"].unique().to_list() == [""]  # frontal; PA or AP is not said
    assert (rows.origin, frame["licence_tag"][0], list(rows.tables)) == ("shenzhen", "nlm-open", ["ClinicalReadings"])


def test_montgomery(make):
    frame = montgomery.read(make(MONTGOMERY, "montgomery")).frame
    assert frame["sex"].to_list() == ["F", "M"]
    assert frame["age_years"].to_list() == [27, 40]
    assert frame["label.Tuberculosis"].to_list() == [0, 1]
    assert frame["label.Normal"].to_list() == [1, 0]
    assert json.loads(frame["raw_labels"][1])["reading"] == "cavity in the right upper lobe scarring"
    assert frame["view_raw"].to_list() == ["PA", "PA"]
    assert frame["view_source"].to_list() == ["derived", "derived"]


def test_both_in_one_folder_are_kept_apart(make):
    make(SHENZHEN)
    options = make(MONTGOMERY, "montgomery")
    assert montgomery.read(options).frame["image_id"].to_list() == list(MONTGOMERY)
    assert shenzhen.read(options).frame.height == len(SHENZHEN)


def test_masks_and_the_archives_own_folder(tmp_path, make):
    make(MONTGOMERY, "montgomery", folder="MontgomerySet/CXR_png")
    (tmp_path / "ClinicalReadings").rename(tmp_path / "MontgomerySet" / "ClinicalReadings")
    masks = tmp_path / "MontgomerySet" / "ManualMask" / "leftMask"
    masks.mkdir(parents=True)
    (masks / "MCUCXR_0001_0.png").touch()  # masks have the images' names
    rows = montgomery.read(SourceOptions("montgomery", tmp_path))
    assert rows.root == tmp_path / "MontgomerySet"
    assert rows.frame["source_relpath"].to_list() == [f"CXR_png/{name}.png" for name in MONTGOMERY]
    assert rows.frame["age_years"].to_list() == [27, 40]


def test_suffix_in_another_case(make):
    frame = shenzhen.read(make(SHENZHEN, suffix=".PNG")).frame
    assert frame["source_relpath"][0] == "CXR_png/CHNCXR_0001_0.PNG"
    assert frame["label.Tuberculosis"].to_list() == [0, 0, 1, 0, 1, 1]


def test_without_texts(tmp_path, make):
    make({}, images=list(SHENZHEN))
    rows = shenzhen.read(SourceOptions("shenzhen", tmp_path))
    assert rows.frame["label.Tuberculosis"].to_list() == [0, 0, 1, 0, 1, 1]
    assert rows.frame["label.Normal"].to_list() == [-1, -1, 0, -1, 0, 0]
    assert rows.notes == ("6 images have no text beside them: sex, age and Normal unknown",)


def test_a_text_without_its_image_is_a_missing_image(make):
    options = make(SHENZHEN, images=list(SHENZHEN)[1:])
    with pytest.raises(PathError, match=r"1 of the texts in ClinicalReadings have no image under .*--allow-missing"):
        shenzhen.read(options)
    rows = shenzhen.read(SourceOptions("shenzhen", options.root, allow_missing=True))
    assert rows.frame.height == 5
    assert "1 of the texts" in rows.notes[0]


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ("CXR_png/CHNCXR_0001_1.png", ManifestError, "1 numbers are there both as _0 and as _1"),
        ("CXR_png/CHNCXR_0009_2.png", UnknownLabelError, "'CHNCXR_0009_2.png'"),
        ("CXR_png/CHNCXR_0009.png", UnknownLabelError, "'CHNCXR_0009.png'"),
        ("CXR_png/copy/CHNCXR_0001_0.png", ManifestError, r"more than once \(in CXR_png, CXR_png/copy\)"),
    ],
)
def test_names_that_are_none(make, tmp_path, extra, error, message):
    options = make(SHENZHEN)
    (tmp_path / extra).parent.mkdir(exist_ok=True)
    (tmp_path / extra).touch()
    with pytest.raises(error, match=message):
        shenzhen.read(options)


def test_nothing_there_a_link_away_and_a_text_that_is_too_long(make, tmp_path, tmp_path_factory):
    with pytest.raises(PathError, match=r"no image called CHNCXR_0001_0\.png"):
        shenzhen.read(SourceOptions("shenzhen", tmp_path))
    options = make(SHENZHEN)
    away = tmp_path_factory.mktemp("away") / "CHNCXR_0009_0.png"
    away.touch()
    (tmp_path / "CXR_png" / "CHNCXR_0009_0.png").symlink_to(away)
    with pytest.raises(PathError, match="1 links that leave it"):
        shenzhen.read(options)
    (tmp_path / "CXR_png" / "CHNCXR_0009_0.png").unlink()
    (tmp_path / "ClinicalReadings" / "CHNCXR_0001_0.txt").write_text("x" * 70_000)
    with pytest.raises(ManifestError, match="70000 bytes"):
        shenzhen.read(options)


def test_films_in_every_mode_of_png(make, tmp_path):
    """Palette, colour with and without alpha and 16 bits are the same picture; what is cut or empty is not stored."""
    grey = np.tile(np.array([0, 0, 60, 120, 180, 240, 255, 255], np.uint8), (8, 1))
    palette = io.BytesIO()
    Image.fromarray(grey).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(palette, "PNG")
    contents = [encode(form, grey, "") for form in ("png_rgb", "png_rgba", "png16")]
    contents += [palette.getvalue(), encode("png_rgb", grey, "")[:-9], b""]
    options = make(SHENZHEN)
    for name, content in zip(SHENZHEN, contents, strict=True):
        (tmp_path / "CXR_png" / f"{name}.png").write_bytes(content)
    manifest, _ = build_manifest([SourceSpec("shenzhen", "shenzhen", options.root)], ManifestOptions())
    summary = build_store(manifest, tmp_path / "store", size=8, encoding="raw", workers=1)
    assert (summary.inputs, summary.stored, summary.quarantined) == (6, 4, {"truncated": 1, "zero_bytes": 1})
    store = Store.open(tmp_path / "store")
    for index in range(4):
        np.testing.assert_array_equal(store.read(index), grey)


@pytest.mark.parametrize(("name", "prefix"), [("shenzhen", "CHNCXR"), ("montgomery", "MCUCXR")])
def test_phantoms_come_back_as_the_cohort_that_they_were_made_from(tmp_path, name, prefix):
    write_phantoms(tmp_path / "out", name, 14, 5, 64, 3, workers=1)
    frame = SOURCES[name](SourceOptions(name, tmp_path / "out")).frame
    chosen = {patient.number: one_frontal(patient) for patient in plan_cohort(14, 5, 3)}
    expected = {}
    for number, pair in chosen.items():
        if pair is not None:
            findings = pair[0].findings
            sick = int("Tuberculosis" in findings)
            normal = 1 if "Normal" in findings else 0 if sick else -1
            expected[f"{prefix}_{number + 1:04d}_{sick}"] = (sick, normal)
    rows = zip(frame["label.Tuberculosis"], frame["label.Normal"], strict=True)
    assert dict(zip(frame["image_id"], rows, strict=True)) == expected
    assert {sick for sick, _ in expected.values()} == {0, 1}
    assert set(frame["sex"]) == {"F", "M"}
    assert frame["age_years"].is_between(18, 95).all()
