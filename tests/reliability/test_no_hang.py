"""Whatever dies, sleeps or disappears: every process ends, within a minute and with one clear error (R7)."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import SECONDS, Child

from programs import STEPS, Bench, lines, newest, same_run, weights

TIMEOUT = 5
"""Seconds that a process waits for another in these tests."""


@contextlib.contextmanager
def all_ended(children: list[Child]) -> Iterator[None]:
    """Leave no process behind, whatever the test finds."""
    try:
        yield
    finally:
        for child in children:
            child.kill_group()
            child.wait()


def wait_for(what: object, child: Child, seconds: float = SECONDS) -> str:
    """Wait until the program has said something; returns the rest of the line."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for line in child.said.splitlines():
            if str(what) in line:
                return line.split(str(what), 1)[1].strip()
        assert child.poll(0.05) is None, child.said
    raise AssertionError(f"did not say {what!r} in {seconds} s: {child.said}")


def one_error(child: Child) -> str:
    """Its one line of error; no traceback."""
    errors = [line for line in child.errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, child.said
    assert "Traceback" not in child.errors, child.errors
    return errors[0]


def goes_on(bench: Bench, out: Path, command: list[object]) -> None:
    """Nothing is lost: the same command of two processes ends with what an undisturbed run ends with."""
    children = bench.warm.ranks(command)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    same_run(out, bench.straight(2, keep=STEPS))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_is_killed(bench: Bench, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    hook, command = ["signal_in_step", 3, signal.SIGKILL, rank], bench.pretrain(out, keep=STEPS)
    children = bench.warm.ranks(command, [hook], HILUM_COLLECTIVE_TIMEOUT=TIMEOUT)
    with all_ended(children):
        assert children[rank].wait() == -signal.SIGKILL
        assert children[1 - rank].wait(30.0) == 1, children[1 - rank].said
        one_error(children[1 - rank])
    goes_on(bench, out, command)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_sleeps_for_good(bench: Bench, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    hook, command = ["sleep_in_step", 3, rank], bench.pretrain(out, keep=STEPS)
    children = bench.warm.ranks(command, [hook], HILUM_COLLECTIVE_TIMEOUT=TIMEOUT)
    with all_ended(children):
        assert children[1 - rank].wait(TIMEOUT + 30.0) == 1, children[1 - rank].said
        one_error(children[1 - rank])
        assert children[rank].send(signal.SIGKILL)  # as a launcher does
    goes_on(bench, out, command)


@pytest.mark.slow
def test_a_worker_that_makes_batches_is_killed(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    hooks = [["print_workers"], ["each_step_takes", 0.3]]
    child = bench.warm.start(bench.pretrain(out, workers=1, steps=40), hooks)
    with all_ended([child]):
        worker = int(wait_for("workers ", child))
        while not (out / "checkpoints" / "step_00000001").exists():
            assert child.poll(0.1) is None, child.said
        os.kill(worker, signal.SIGKILL)
        assert child.wait() == 1, child.said
        assert "worker" in one_error(child)
    found = newest(out)
    assert found is not None
    assert bench.warm.run(bench.pretrain(out, steps=40)).status == 0  # without workers: the same batches
    straight = bench.straight(steps=40)
    assert (weights(out), lines(out)) == (weights(straight), lines(straight))


def test_the_disk_of_one_rank_is_full(bench: Bench, tmp_path: Path) -> None:
    """Rank 0 writes; the other must not wait for it."""
    out = tmp_path / "run"
    hook = ["file_size_limit", 100_000, 0]
    children = bench.warm.ranks(bench.pretrain(out), [hook], HILUM_COLLECTIVE_TIMEOUT=TIMEOUT)
    with all_ended(children):
        assert [child.wait(45.0) for child in children] == [1, 1], [child.said for child in children]
        assert str(out) in one_error(children[0])
        assert "Traceback" not in children[1].errors
    assert newest(out) is None, "the first checkpoint did not fit"


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_the_store_disappears(bench: Bench, tmp_path: Path, how: str) -> None:
    """Cut: every record is damaged, and after a few in a row the store is taken to be broken."""
    out, data = tmp_path / "run", tmp_path / "store"
    shutil.copytree(bench.data, data)
    command = ["pretrain", bench.config(steps=400), "--data", data, "--out", out]
    child = bench.warm.start(command, [["each_step_takes", 0.05]])
    with all_ended([child]):
        while not (out / "checkpoints" / "step_00000001").exists():
            assert child.poll(0.02) is None, child.said
        if how == "cut":
            for shard in (data / "shards").iterdir():
                os.truncate(shard, 0)
            assert child.wait() == 1, child.said
            assert str(data) in one_error(child)
        else:  # what is open stays readable, and the run goes on: to be stopped like any other
            shutil.rmtree(data)
            child.poll(0.5)
            if child.send(signal.SIGTERM):
                child.wait()
            assert child.status in (1, 75), child.said
        assert newest(out) is not None


def test_a_second_process_on_the_same_folder(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = bench.warm.start(bench.pretrain(out, steps=30), [["each_step_takes", 0.1]])
    with all_ended([first]):
        wait_for("Steps:", first)
        second = bench.warm.run(bench.pretrain(out, steps=30))
        assert second.status == 1
        assert f"in use by process {first.pid}" in one_error(second)
        assert first.send(signal.SIGTERM)
        assert first.wait() == 75


@pytest.mark.slow
def test_the_launcher_is_killed(bench: Bench, tmp_path: Path) -> None:
    """Its ranks must not stay for ever, holding the folder: they end, or finish."""
    out = tmp_path / "run"
    program = [str(Path(sys.executable).with_name("hilum")), *map(str, bench.pretrain(out, steps=60))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    environment = os.environ | {"HILUM_COLLECTIVE_TIMEOUT": str(TIMEOUT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *program], env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 3 * SECONDS
    while not (out / "checkpoints" / "step_00000001").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    began = time.monotonic()
    command = bench.pretrain(out, steps=60)
    while (children := bench.warm.ranks(command)) and any(child.wait() for child in children):
        assert time.monotonic() - began < SECONDS, "the ranks of a dead launcher hold the folder"
        assert "in use by process" in "".join(child.errors for child in children), [child.said for child in children]
        time.sleep(1)
    same_run(out, bench.straight(2, steps=60))


def test_one_rank_alone_is_told_to_stop(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    children = bench.warm.ranks(bench.pretrain(out), [["signal_in_step", 2, signal.SIGTERM, 1]])
    with all_ended(children):
        assert [child.wait() for child in children] == [75, 75], [child.said for child in children]
    found = newest(out)
    assert found is not None
    assert found.step == 3 < STEPS


def test_one_rank_alone_has_a_mistake(bench: Bench, tmp_path: Path) -> None:
    """The folder of the run is refused by rank 0; the other must not wait for it."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("theme: dark\n")
    children = bench.warm.ranks(bench.pretrain(out), HILUM_COLLECTIVE_TIMEOUT=TIMEOUT)
    with all_ended(children):
        assert [child.wait(45.0) for child in children] == [1, 1], [child.said for child in children]
        assert "theme" in one_error(children[0])
