"""Seeded mutations: each file is read at its declared size or refused with a reason, in bounded time and memory."""

import json
import shutil
import subprocess
import sys

import fuzz
import numpy as np
import pytest
from damage_inputs import dicoms, mutate, phantom_dicoms, rasters

from hilum.data.images import read_image


def checked(kind: str, count: int, report, seed: int = 0, workers: int = 1) -> dict[str, int]:
    found = fuzz.run(kind, count, seed, workers)
    report(f"{kind}, {count} mutations, seed {seed}: {json.dumps(found['outcomes'])}; slowest {found['slowest']} s, "
           f"memory +{found['grown_mb']} MB")  # fmt: skip
    assert found["failures"] == 0, f"{found['failed']}; see `python tests/damage/fuzz.py {kind} --only NUMBER`"
    assert sum(found["outcomes"].values()) == count
    assert found["slowest"] < fuzz.SECONDS
    assert found["grown_mb"] < 1000
    return found["outcomes"]


def test_a_slice_of_dicom(report):
    outcomes = checked("dicom", 3000, report)
    assert outcomes["no_pixel_data"] > 500  # a default reader accepts these without pixels
    assert outcomes["read_as_before"] > 100  # and what is harmless is not refused
    assert len(set(outcomes) & set(fuzz.REASONS)) >= 8


def test_a_slice_of_png_and_jpeg(report):
    outcomes = checked("raster", 1500, report)
    assert outcomes["truncated"] > 300
    assert outcomes["damaged"] > 300
    assert outcomes["read_as_before"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_dicom(report, seed):
    checked("dicom", 25_000, report, seed, workers=2)


@pytest.mark.slow
def test_many_png_and_jpeg(report):
    checked("raster", 20_000, report, seed=1, workers=2)


def test_a_mutation_is_a_function_of_its_number():
    for number in (0, 7, 40):
        first, second = (fuzz.one("dicom", 3, number, list(dicoms().values())) for _ in range(2))
        assert first == second


def test_the_mutator_does_all_that_it_says():
    content, rng = bytes(range(256)) * 64, np.random.default_rng(0)
    made = [mutate(content, rng) for _ in range(400)]
    cut = [changed for changed, only_cut in made if only_cut]
    assert 60 < len(cut) < 140
    assert all(content.startswith(changed) for changed in cut)
    lengths = [np.sign(len(changed) - len(content)) for changed, only_cut in made if not only_cut]
    assert {-1, 0, 1} == set(lengths)


SPOILED = """
import fuzz
real = fuzz.read_image
def read_image(content, name=""):
    if len(content) % 20 == 1:
        raise KeyError("planted")
    if len(content) % 50 == 2:
        import ctypes
        ctypes.string_at(0)
    image = real(content, name)
    if len(content) % 5 == 3:
        object.__setattr__(image, "rows", image.rows + 1)
    return image
fuzz.read_image = read_image
fuzz.__file__ = __file__
import sys
sys.exit(fuzz.main())
"""


def test_the_harness_finds_planted_faults_and_goes_on_after_a_crash(tmp_path, monkeypatch):
    """An exception that is not ours, a dead process and a wrong size are each found; nothing is left untried."""
    for name in ("fuzz.py", "damage_inputs.py"):
        shutil.copy(fuzz.__file__.replace("fuzz.py", name), tmp_path)
    (tmp_path / "spoiled.py").write_text(SPOILED)
    command = [sys.executable, str(tmp_path / "spoiled.py"), "raster", "--count", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)["outcomes"]
    assert outcomes["uncaught"] > 0
    assert outcomes["crashed"] > 0
    assert outcomes["accepted_of_another_size"] > 0
    assert "not_tried" not in outcomes
    assert sum(outcomes.values()) == 200


@pytest.mark.parametrize("name", rasters())
def test_a_reader_that_fills_in_what_is_cut_would_be_found(name, monkeypatch):
    content = rasters()[name]
    whole = read_image(content)
    half = np.where(np.arange(whole.pixels.shape[0])[:, None] < whole.pixels.shape[0] // 2, whole.pixels, 128)
    object.__setattr__(whole, "pixels", half.astype(np.uint8))
    monkeypatch.setattr(fuzz, "read_image", lambda content, name: whole)
    found = fuzz.judge(content[: len(content) // 2], True, read_image(content).pixels)
    assert found in ("accepted_though_cut", "accepted_what_pillow_refuses")


def test_a_reader_that_makes_up_pixels_would_be_found(monkeypatch):
    content = phantom_dicoms()["explicit"]
    before_pixels = content.index(b"\xe0\x7f\x10\x00")
    whole = read_image(content)
    monkeypatch.setattr(fuzz, "read_image", lambda content, name: whole)
    assert fuzz.judge(content[:before_pixels], True, whole.pixels) == "accepted_without_pixels"
