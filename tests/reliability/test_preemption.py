"""SIGTERM and SIGUSR1 at any moment: the step is finished and saved, the exit status says so, quickly (R5)."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from warm import Child

from hilum.commands.pretrain import STOPPED_STATUS
from hilum.pretraining.probing import ProbeConfig
from programs import STEPS, Bench, lines, newest, same_run, size

SECONDS = 30.0
"""What a cloud gives a machine that it takes back."""


def check_stopped(child: Child, out: Path, steps: int) -> int:
    """It ended with the status that asks for another start, and lost no step; returns the step."""
    assert child.status == STOPPED_STATUS, child.said
    found = newest(out)
    assert found is not None
    assert found.step == lines(out)[-1]["step"] < steps
    assert f"Stopped after step {found.step} of {steps}; saved." in child.output
    assert "Traceback" not in child.errors
    return found.step


@pytest.mark.parametrize(
    ("operation", "number"),
    [(1, signal.SIGTERM), pytest.param(4, signal.SIGUSR1, marks=pytest.mark.slow), (8, signal.SIGUSR1)],
)
def test_a_signal_during_a_save_is_obeyed_after_it(bench: Bench, tmp_path: Path, number: int, operation: int) -> None:
    """While it is written, training goes on: the step that is saved may be a later one."""
    out = tmp_path / "run"
    hook = ["signal_at_file_operation", f"{out}/checkpoints", operation, number]
    child = bench.warm.run(bench.pretrain(out), [hook])
    assert check_stopped(child, out, STEPS) < STEPS
    assert bench.warm.run(bench.pretrain(out)).status == 0
    same_run(out, bench.straight())


def test_a_signal_in_the_first_step_and_many_signals_are_one(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    hooks = [["signal_as_step_begins", 1, signal.SIGTERM], ["signal_in_step", 1, signal.SIGUSR1]]
    assert check_stopped(bench.warm.run(bench.pretrain(out), hooks), out, STEPS) == 1


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_during_a_probe(bench: Bench, tmp_path: Path, count: int) -> None:
    out, changes = tmp_path / "run", {"probe": ProbeConfig(every=2)}
    child = bench.warm.run(bench.pretrain(out, **changes), [["signal_in_probe", count, signal.SIGTERM]])
    assert check_stopped(child, out, STEPS) in ((1,), (2, 3))[count - 1]
    assert bench.warm.run(bench.pretrain(out, **changes)).status == 0
    same_run(out, bench.straight(**changes))


def test_a_signal_before_the_first_step_is_not_lost(bench: Bench, tmp_path: Path) -> None:
    """A scheduler that takes the machine back while the program starts must learn that it is to be started again."""
    out = tmp_path / "run"
    child = bench.warm.run(bench.pretrain(out), [["signal_before_the_first_step", signal.SIGUSR1]])
    assert check_stopped(child, out, STEPS) == 1


def test_a_signal_in_the_last_step_ends_a_finished_run(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert bench.warm.run(bench.pretrain(out), [["signal_in_step", STEPS, signal.SIGTERM]]).status == 0
    same_run(out, bench.straight())


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_job_stops_it_all_the_same(bench: Bench, tmp_path: Path) -> None:
    """SLURM's goes to all processes of a step: those that make batches leave it to the one that saves."""
    out, changes = tmp_path / "run", {"workers": 1, "steps": 40}
    child = bench.warm.start(bench.pretrain(out, **changes), [["each_step_takes", 0.2]])
    while not (out / "checkpoints" / "step_00000001").exists():
        assert child.poll(0.02) is None, child.said
    os.killpg(child.pid, signal.SIGUSR1)
    child.wait(SECONDS)
    check_stopped(child, out, 40)


def signalled(bench: Bench, folder: Path, seed: int, timings: int) -> tuple[int, float]:
    """Runs that get signals at random moments until they are finished; returns signals and the longest stop."""
    steps, random_ = 30, random.Random(seed)
    straight = bench.straight(steps=steps)
    sent, longest, out = 0, 0.0, folder / "run"
    while sent < timings:
        child = bench.warm.start(bench.pretrain(out, steps=steps))
        while "Steps:" not in child.output:
            assert child.poll(0.005) is None, child.said
        time.sleep(random_.uniform(0.02, 0.4))
        began_at = len(lines(out))
        asked = time.monotonic()
        arrived = child.send(random_.choice([signal.SIGTERM, signal.SIGUSR1]))
        child.wait(SECONDS)
        if arrived:
            longest, sent = max(longest, time.monotonic() - asked), sent + 1
        if child.status == 0 or f"{steps} steps done" in child.output:  # in the last step, or when all was written
            same_run(out, straight)
            shutil.rmtree(out)
        else:
            assert check_stopped(child, out, steps) >= began_at
    if out.exists():
        assert bench.warm.run(bench.pretrain(out, steps=steps)).status == 0
        same_run(out, straight)
    return sent, longest


@pytest.mark.slow
def test_signals_at_random_moments(bench: Bench, tmp_path: Path, report: Callable[[str], None]) -> None:
    sent, longest = signalled(bench, tmp_path, 0, size("SIGNALS", 40))
    report(f"signals: {sent} at random moments, each saved the last finished step; slowest stop {longest:.2f} s")
