"""Checkpoints that were damaged, moved, or written by an earlier version (R4)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.core import checkpoint
from hilum.core.errors import CheckpointError
from programs import CONFIG, STEPS, Bench, lines, same_run, size, weights, whole_steps

LEGACY = Path(__file__).parent / "checkpoints"
"""One run folder for each form that checkpoints have had, cut after its first steps."""


@pytest.mark.parametrize(
    ("flips", "cuts"), [(40, 10), pytest.param(size("FLIPS", 200), size("CUTS", 50), marks=pytest.mark.slow)]
)
def test_every_flipped_bit_and_every_cut_of_a_run_is_found(
    bench: Bench,
    tmp_path: Path,
    flips: int,
    cuts: int,
    capsys: pytest.CaptureFixture[str],
    report: Callable[[str], None],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(bench.straight(), out)
    folder, last = out / "checkpoints", out / "checkpoints" / f"step_{STEPS:08d}"
    generator, found = np.random.default_rng(0), 0
    for name in ("state.safetensors", "index.json"):
        whole = (last / name).read_bytes()
        for trial in range((flips + cuts) // 2):
            damaged = bytearray(whole)
            if trial < flips // 2:
                damaged[int(generator.integers(len(whole)))] ^= 1 << int(generator.integers(8))
            else:
                damaged = damaged[: int(generator.integers(len(whole)))]
            (last / name).write_bytes(damaged)
            loaded = checkpoint.load_newest(folder)
            assert loaded is not None
            found += loaded.step == STEPS - 1
        (last / name).write_bytes(whole)
    warned = capsys.readouterr().err.splitlines()
    assert found == flips + cuts == len(warned)
    assert all(line.startswith("warning: skipped") and last.name in line for line in warned)
    report(f"damaged checkpoints: {found} of {flips + cuts} found, one line each")


@pytest.mark.parametrize("name", ["state.safetensors", pytest.param("index.json", marks=pytest.mark.slow)])
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(bench: Bench, tmp_path: Path, name: str) -> None:
    out = bench.stopped(tmp_path / "run", 3)
    path = out / "checkpoints" / "step_00000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    child = bench.warm.run(bench.pretrain(out))
    assert child.status == 0, child.said
    assert child.errors.count("warning: skipped") == 1
    assert "going on after step 2" in child.output
    same_run(out, bench.straight())


def test_a_whole_checkpoint_is_never_dropped_for_damaged_ones(tmp_path: Path) -> None:
    """Damaged ones of later steps are in the way: the run goes on from the one before, and saves at other steps."""
    folder = tmp_path / "checkpoints"
    for step in (90, 100, 110):
        checkpoint.save_checkpoint(folder, step, {"value": torch.tensor(step)}, {}, keep=3)
    for step in (100, 110):
        (folder / f"step_{step:08d}" / "state.safetensors").write_bytes(b"")
    checkpoint.save_checkpoint(folder, 95, {"value": torch.tensor(95)}, {}, keep=2)
    loaded = checkpoint.load_newest(folder)
    assert loaded is not None
    assert loaded.step == 95


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the run would begin again, over the one that is there."""
    checkpoint.save_checkpoint(tmp_path, 1, {"value": torch.tensor(1)}, {})

    def refused(_path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refused)
    for question in (checkpoint.load_newest, checkpoint.any_in):
        with pytest.raises(CheckpointError, match="cannot be listed: Permission denied"):
            question(tmp_path)


def test_the_clock_does_not_choose(bench: Bench, tmp_path: Path) -> None:
    """Times of files that a copy or a wrong clock has shuffled: the newest is the one of the highest step."""
    out = bench.stopped(tmp_path / "run", 4)
    for year, path in enumerate(sorted((out / "checkpoints").rglob("*"), reverse=True)):
        os.utime(path, (year * 3.2e7, year * 3.2e7))
    child = bench.warm.run(bench.pretrain(out))
    assert "going on after step 4" in child.output
    same_run(out, bench.straight())


def test_a_run_and_a_store_that_were_moved_go_on(bench: Bench, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(bench.stopped(tmp_path / "run", 3), moved)
    shutil.copytree(bench.data, tmp_path / "store")
    child = bench.warm.run(["pretrain", bench.config(), "--data", tmp_path / "store", "--out", moved])
    assert child.status == 0, child.said
    same_run(moved, bench.straight())


@pytest.mark.parametrize("damage", [pytest.param("cut", marks=pytest.mark.slow), "text"])
def test_a_damaged_log_stops_no_run(bench: Bench, tmp_path: Path, damage: str) -> None:
    """A line that a crash of the machine left half written is dropped; one that is no JSON is named."""
    out = bench.stopped(tmp_path / "run", 3)
    log = out / "metrics.jsonl"
    if damage == "cut":
        log.write_text(log.read_text() + '{"step": 4, "lo')
    else:
        first, *rest = log.read_text().splitlines(keepends=True)
        log.write_text(first + "\0" * 40 + "\n" + "".join(rest))
    child = bench.warm.run(bench.pretrain(out))
    assert "Traceback" not in child.errors
    if damage == "cut":
        same_run(out, bench.straight())
    else:
        assert child.status == 0 or str(log) in child.errors


@pytest.mark.parametrize("name", sorted(path.name for path in LEGACY.iterdir()) if LEGACY.exists() else [])
def test_a_checkpoint_of_an_earlier_version_goes_on_or_is_refused_by_name(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    """If it goes on, then with the images, crops and masks of the run that was begun, as a new run of the same settings
    shows them: the store of the tests is made from a fixed seed, and is the one that the kept run was trained on."""
    out, fresh = tmp_path / "run", tmp_path / "fresh"
    shutil.copytree(LEGACY / name, out)
    before = whole_steps(out)
    assert before, "the kept checkpoint is damaged"
    command = ["pretrain", out / "config.yaml", "--data", bench.data, "--out"]
    child = bench.warm.run([*command, out])
    if child.status == 0:
        assert bench.warm.run([*command, fresh]).status == 0
        assert [line["step"] for line in lines(out)] == [line["step"] for line in lines(fresh)]
        assert [line["batch"] for line in lines(out)] == [line["batch"] for line in lines(fresh)]
        for ours, new in zip(lines(out), lines(fresh), strict=True):
            assert ours["loss"] == pytest.approx(new["loss"], rel=1e-4)
    else:
        assert child.status == 1, child.said
        assert str(out) in child.errors
        assert whole_steps(out) == before


def test_a_checkpoint_of_a_later_version_is_refused_by_name(bench: Bench, tmp_path: Path) -> None:
    out = bench.stopped(tmp_path / "run", 3)
    for path in (out / "checkpoints").glob("*/index.json"):
        path.write_text(path.read_text().replace(checkpoint.FORMAT, "hilum-checkpoint-9"))
    child = bench.warm.run(bench.pretrain(out))
    assert child.status == 1
    assert "none of its" in child.errors
    assert f"is not of format '{checkpoint.FORMAT}'" in child.errors
    assert weights(bench.straight()).startswith(str(CONFIG.steps))
