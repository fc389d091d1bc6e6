"""Killed at any system call of any writer: what is there loads, is of one step, and goes on to the same end (R1)."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tracing
from safetensors import safe_open

from hilum.core.checkpoint import digest, load_checkpoint
from hilum.core.files import remove_leftovers
from hilum.data.store import Store
from hilum.pretraining.exposure import read_seen, uid_numbers
from programs import STEPS, Bench, leftovers, lines, newest, same_run, size

BEGUN = STEPS - 2
"""Steps made before the traced part: each save of it drops an old checkpoint."""


class Reference:
    """Every step of the run that nothing disturbed."""

    def __init__(self, bench: Bench) -> None:
        self.run = bench.straight(keep=STEPS)
        loaded = [load_checkpoint(path) for path in sorted((self.run / "checkpoints").iterdir())]
        self.digests = {saved.step: digest(saved.tensors) for saved in loaded}
        self.norms = {saved.step: saved.tensors["teacher.backbone.norm.weight"].numpy() for saved in loaded}
        self.seen = {saved.step: saved.tensors["seen"].numpy() for saved in loaded}
        self.uids = uid_numbers(Store.open(bench.data).uids)
        assert list(self.digests) == list(range(1, STEPS + 1))

    def step_of_teacher(self, out: Path) -> int:
        """Which step `teacher.safetensors` is of; 0 without one."""
        if not (out / "teacher.safetensors").exists():
            return 0
        with safe_open(out / "teacher.safetensors", "np") as file:
            norm = file.get_tensor("norm.weight")
        return next(step for step, expected in self.norms.items() if np.array_equal(expected, norm))


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    return Reference(bench)


def check_what_is_there(out: Path, reference: Reference, least: int) -> int:
    """Everything that a kill left can be read and is of one step; returns the step that a resumed run goes on from."""
    saved = newest(out)
    step = saved.step if saved else 0
    assert step >= least, f"{least} steps were safe, found {step}"
    if saved:
        assert digest(saved.tensors) == reference.digests[step], "a mixture of steps"
    teacher = reference.step_of_teacher(out)
    assert step - 1 <= teacher <= step
    if teacher:  # whoever uses the backbone now must know of every image that it has seen
        assert np.isin(reference.uids[reference.seen[teacher]], read_seen(out).uids).all()
    if (out / "config.json").exists():
        assert json.loads((out / "config.json").read_text())["step"] in (teacher - 1, teacher)
    if (out / "metrics.jsonl").exists():
        *whole, cut = (out / "metrics.jsonl").read_text().split("\n")
        assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))
        assert len(whole) >= step
        assert not cut or cut.startswith('{"step"')
    return step


def sweep(
    bench: Bench, reference: Reference, folder: Path, prepare: Callable[[Path], object], least: int, points: int
) -> tuple[int, int, set[int]]:
    """Kill before each of up to `points` calls; returns calls, kills and the steps that were found after them."""
    folder.mkdir()
    out, log, hooks = folder / "run", folder / "log", [["fixed_temporary_names"]]
    prepare(out)
    found = tracing.places(tracing.calls(bench.warm, bench.pretrain(out), log, hooks), out)
    assert len(found) > 40
    chosen = found if points >= len(found) else [found[int(at)] for at in np.linspace(0, len(found) - 1, points)]
    kills, steps = 0, set()
    for place in chosen:
        shutil.rmtree(out)
        prepare(out)
        child = tracing.disturbed(bench.warm, bench.pretrain(out), log, "signal=KILL", place, hooks)
        if child.status == 0:  # a thread took another course this time, and made a call less
            continue
        assert child.status == -signal.SIGKILL, child.said
        kills += 1
        steps.add(check_what_is_there(out, reference, least) if out.exists() else 0)
        child = bench.warm.run(bench.pretrain(out))
        assert child.status == 0, child.said
        assert "skipped" not in child.said, "a kill left a damaged checkpoint under its final name"
        same_run(out, bench.straight())
    assert kills >= 0.8 * len(chosen) - 1
    return len(found), kills, steps


def test_a_slice_of_the_kills(
    bench: Bench, reference: Reference, tmp_path: Path, report: Callable[[str], None]
) -> None:
    tracing.require()
    count, kills, steps = sweep(
        bench, reference, tmp_path / "s", lambda out: bench.stopped(out, BEGUN), BEGUN, size("KILLS_SLICE", 4)
    )
    report(f"kills: {kills} of {count} file calls of the last two steps, resumed from steps {sorted(steps)}")


@pytest.mark.slow
def test_killed_before_every_file_call_of_two_steps(
    bench: Bench, reference: Reference, tmp_path: Path, report: Callable[[str], None]
) -> None:
    tracing.require()
    count, kills, steps = sweep(
        bench, reference, tmp_path / "s", lambda out: bench.stopped(out, BEGUN), BEGUN, size("KILLS", 10_000)
    )
    report(f"kills: {kills} before {count} file calls of two steps, 0 unloadable, 0 mixed; from {sorted(steps)}")
    assert {BEGUN, BEGUN + 1} <= steps


@pytest.mark.slow
def test_killed_before_every_file_call_of_a_start(
    bench: Bench, reference: Reference, tmp_path: Path, report: Callable[[str], None]
) -> None:
    tracing.require()
    count, kills, steps = sweep(bench, reference, tmp_path / "s", lambda out: out.mkdir(), 0, size("KILLS_START", 60))
    report(f"kills: {kills} of {count} file calls of a whole run, 0 unloadable, 0 mixed; from {sorted(steps)}")


def test_what_the_sweep_asserts_can_fail(bench: Bench, reference: Reference, tmp_path: Path) -> None:
    """Two steps in one folder, a teacher ahead, a record of images behind: each is seen."""
    out = tmp_path / "run"
    shutil.copytree(bench.straight(), out)
    assert check_what_is_there(out, reference, STEPS) == STEPS
    for name in ("seen.npz", "teacher.safetensors"):
        kept = (out / name).read_bytes()
        shutil.copy(bench.straight(steps=2) / name, out / name)
        with pytest.raises((AssertionError, StopIteration)):
            check_what_is_there(out, reference, STEPS)
        (out / name).write_bytes(kept)
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lines(out)[-1]) + "\n")
    with pytest.raises(AssertionError):
        check_what_is_there(out, reference, STEPS)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    junk = [".teacher.safetensors.0a1b2c3d.tmp", ".tmp8br1jv"]
    kept = ["teacher.safetensors", ".lock", ".tmp", "notes.tmp"]
    for name in junk + kept:
        (tmp_path / name).write_text(name)
    (tmp_path / ".folder.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".folder.tmp"}


def test_a_run_removes_what_its_killed_writers_have_left(bench: Bench, tmp_path: Path) -> None:
    """As large as the backbone, one for each kill during its export."""
    out = bench.stopped(tmp_path / "run", STEPS - 1)
    for name in (".teacher.safetensors.0a1b2c3d.tmp", ".tmp8br1jv"):
        (out / name).write_text("half a backbone")
    assert bench.warm.run(bench.pretrain(out)).status == 0
    same_run(out, bench.straight())
    assert leftovers(out) == []
