"""A disk that is full or fails, at every write: the last checkpoint stays, and the error names the path.

Three ways: a limit on the size of files, a small file system, and system calls that fail (R3).
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tracing
from warm import Child

from programs import STEPS, Bench, model_digest, newest, same_run, size

BEGUN = 3
ERRORS = ("ENOSPC", "EIO", "EACCES")
MUST_NOT_PASS = ("write", "fsync", "ftruncate", "rename", "renameat")
"""Calls whose failure loses something. Where one fails, the program must not end as if nothing had happened."""


def check_failed(child: Child, out: Path) -> None:
    """It says in one line which file could not be written, and does not end as if all were well."""
    assert child.status == 1, child.said
    errors = [line for line in child.errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, child.said
    assert str(out) in errors[0], errors
    assert "Traceback" not in child.errors


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param("config.yaml", marks=pytest.mark.slow),
        "metrics.jsonl",
        pytest.param(20_000, marks=pytest.mark.slow),
        100_000,
    ],
)
def test_no_file_may_grow_past_a_limit(bench: Bench, tmp_path: Path, limit: str | int) -> None:
    """The limit lets the named file stay as it is and no more; or lies below the backbone, the checkpoint."""
    out = tmp_path / "run"
    bench.stopped(out, BEGUN)
    if isinstance(limit, str):
        limit = (out / limit).stat().st_size
    check_failed(bench.warm.run(bench.pretrain(out), [["file_size_limit", limit]]), out)
    found = newest(out)
    assert found is not None
    assert found.step >= BEGUN
    child = bench.warm.run(bench.pretrain(out))
    assert child.status == 0, child.said
    same_run(out, bench.straight())


def test_a_head_when_no_file_may_grow_past_a_limit(bench: Bench, tmp_path: Path) -> None:
    out, limits = tmp_path / "model", (1500, 5000)
    for limit in limits:
        check_failed(bench.warm.run(bench.fit(out), [["file_size_limit", limit]]), out)
        assert not (out / "config.json").exists(), "what has no description is no model"
    assert bench.warm.run(bench.fit(out)).status == 0
    assert model_digest(out) == model_digest(bench.straight_fit())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the first checkpoints and not for all."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_small_file_system_fills_up(bench: Bench, small_disk: Path) -> None:
    out = small_disk / "run"
    check_failed(bench.warm.run(bench.pretrain(out)), out)
    found = newest(out)
    assert found is not None
    assert 1 <= found.step < STEPS
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert bench.warm.run(bench.pretrain(out)).status == 0
    same_run(out, bench.straight())


def failing_calls(
    bench: Bench, command: list[object], out: Path, prepare: Callable[[Path], object], points: int,
    check: Callable[[Path], None],
) -> tuple[int, dict[str, int]]:  # fmt: skip
    """Let up to `points` calls fail, the errors in turn; returns faults and how often each outcome was seen."""
    log, outcomes, hooks = out.parent / "log", {"error": 0, "harmless": 0}, [["fixed_temporary_names"]]
    prepare(out)
    found = tracing.places(tracing.calls(bench.warm, command, log, hooks), out)
    step = max(len(found) // points, 1)
    for number, place in enumerate(found[::step]):
        shutil.rmtree(out)
        prepare(out)
        fault = ERRORS[number % 3]
        child = tracing.disturbed(bench.warm, command, log, f"error={fault}", place, hooks)
        if not any("INJECTED" in line and str(out) in line for line in log.read_text().splitlines()):
            continue  # a call more or less than before: the fault met another file, or none
        where = f"{place} {fault}:\n{log.read_text()[-400:]}\n{child.said}"
        outcomes["harmless" if child.status == 0 else "error"] += 1
        try:
            if child.status == 0:
                assert place.name not in MUST_NOT_PASS
            else:
                check_failed(child, out)
            check(out)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{where}") from failure
    return sum(outcomes.values()), outcomes


@pytest.mark.slow
def test_every_file_call_of_a_run_fails(bench: Bench, tmp_path: Path, report: Callable[[str], None]) -> None:
    tracing.require()

    def check(out: Path) -> None:
        found = newest(out)
        assert found is not None
        assert found.step >= BEGUN
        assert bench.warm.run(bench.pretrain(out)).status == 0
        same_run(out, bench.straight())

    out = tmp_path / "run"
    prepare = lambda out: bench.stopped(out, BEGUN)  # noqa: E731
    faults, outcomes = failing_calls(bench, bench.pretrain(out), out, prepare, size("FAULTS", 70), check)
    report(f"failing calls of `hilum pretrain`: {faults}, {outcomes}; the last checkpoint whole in all")


@pytest.mark.slow
def test_every_file_call_of_a_fit_fails(bench: Bench, tmp_path: Path, report: Callable[[str], None]) -> None:
    tracing.require()

    def check(out: Path) -> None:
        if not (out / "config.json").exists():
            assert bench.warm.run(bench.fit(out)).status == 0
        assert model_digest(out) == model_digest(bench.straight_fit())

    out = tmp_path / "model"
    bench.straight_fit()
    prepare = lambda out: out.mkdir()  # noqa: E731
    faults, outcomes = failing_calls(bench, bench.fit(out), out, prepare, size("FAULTS_FIT", 30), check)
    report(f"failing calls of `hilum fit`: {faults}, {outcomes}; no half model in any")
