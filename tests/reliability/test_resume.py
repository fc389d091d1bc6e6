"""Killed at random moments, again and again: the run that comes out is the one that nothing disturbed (R2)."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm import SECONDS, Child

from hilum.pretraining.probing import ProbeConfig
from programs import Bench, lines, model_digest, newest, same_run, size, weights

LONG = {"steps": 12}
"""Long enough to be killed several times, with a checkpoint after every step."""
MOST = 20
"""A kill may come too late to be one: so many times the attempts that are asked for, and the test fails."""


def killed_at_random(
    start: Callable[[], list[Child]], random_: random.Random, longest: float, kills: int, watch: Callable[[], object],
    begun: str = "",
) -> int:  # fmt: skip
    """Start, kill at a random moment up to `longest` seconds later, start again, to the end; returns the kills.

    `watch` is called after each. Every second time, the first included, the clock starts when the program has said
    `begun`, and runs for a quarter: it may take most of its time to come so far.
    """
    done = 0
    for turn in range(MOST * (kills + 1)):
        children, late = start(), turn % 2 == 0
        if done < kills:
            deadline = time.monotonic() + SECONDS
            while late and begun not in children[0].output and children[0].poll(0.005) is None:
                assert time.monotonic() < deadline, f"has not begun in {SECONDS} s: {children[0].said}"
            time.sleep(random_.uniform(0.0, longest / 4 if late else longest))
            first, *others = random_.sample(children, len(children))
            done += first.send(signal.SIGKILL)
            time.sleep(random_.uniform(0.0, 0.2) * bool(others))  # a launcher ends the others a little later
            for child in others:
                child.send(signal.SIGKILL)
        statuses = [child.wait() for child in children]
        if all(status == 0 for status in statuses):
            return done
        said = [child.said for child in children]
        if done and "already holds config.json" in said[0]:  # a head was whole when the last kill came
            return done
        assert -signal.SIGKILL in statuses, said
        watch()
    raise AssertionError(f"not at its end after {done} kills")


def newest_step(out: Path) -> int:
    """Steps that a run can go on from."""
    found = newest(out)
    return found.step if found else 0


def kill_runs(
    bench: Bench, folder: Path, seed: int, runs: int, kills: int, ranks: int, **changes: Any
) -> tuple[int, int]:
    """Runs of pretraining, killed about `kills` times each, compared with the straight one; returns kills and runs."""
    straight = bench.straight(ranks, **changes)
    random_, total, found = random.Random(seed), 0, set[int]()
    for run in range(MOST * runs):
        # A kill may come too late to be one, or before there is a checkpoint to go on from.
        if run >= runs and total >= runs * kills and found - {0, newest_step(straight)}:
            return total, run
        out, longest = folder / f"run{seed}_{run}", bench.seconds[straight] * max(1, run - runs + 2)  # a busier machine
        command = bench.pretrain(out, **changes)
        start = (lambda c=command: [bench.warm.start(c)]) if ranks == 1 else (lambda c=command: bench.warm.ranks(c))
        total += killed_at_random(start, random_, longest, kills, lambda o=out: found.add(newest_step(o)), "Steps:")
        same_run(out, straight)
        shutil.rmtree(out)
    raise AssertionError(f"{total} kills of {MOST * runs} runs, which had checkpoints of steps {sorted(found)}")


def test_a_few_random_kills(bench: Bench, tmp_path: Path, report: Callable[[str], None]) -> None:
    kills, runs = kill_runs(bench, tmp_path, 0, size("RUNS_SLICE", 1), 2, 1)
    report(f"random kills: {kills} of {runs} runs, digests equal")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "threads", "share"), [(1, 1, 8), (1, 2, 6), (2, 1, 4), (2, 2, 2)], ids=lambda value: str(value)
)
def test_a_hundred_random_kills(
    bench: Bench, tmp_path: Path, ranks: int, threads: int, share: int, report: Callable[[str], None]
) -> None:
    runs = max(size("RUNS", 20) * share // 20, 1)
    kills, runs = kill_runs(
        bench, tmp_path, 10 * ranks + threads, runs, size("KILLS_A_RUN", 5), ranks, threads=threads, **LONG
    )
    report(
        f"random kills: {kills} of {runs} runs, {ranks} ranks of {threads} threads: digests equal in {runs} of {runs}"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"probe": ProbeConfig(every=2)},
        {"accumulate": 2, "log_every": 2, "checkpoint_every": 2},
        pytest.param({"workers": 1, **LONG}, marks=pytest.mark.slow),
        pytest.param({"probe": ProbeConfig(every=3), "workers": 2, **LONG}, marks=pytest.mark.slow),
    ],
    ids=["probe", "accumulate", "workers", "probe and workers"],
)
def test_variants_that_are_stopped_and_killed(
    bench: Bench, tmp_path: Path, changes: dict[str, Any], report: Callable[[str], None]
) -> None:
    """A stop in the second step, a kill in the second after it, and on to the end."""
    out = tmp_path / "run"
    statuses = [
        bench.warm.run(bench.pretrain(out, **changes), [["signal_in_step", 2, number]]).status
        for number in (signal.SIGTERM, signal.SIGKILL)
    ]
    assert statuses == [75, -signal.SIGKILL]
    child = bench.warm.run(bench.pretrain(out, **changes))
    assert child.status == 0, child.said
    straight = bench.straight(**changes)
    if "log_every" in changes:  # a run says how its first step went, and a resumed one too
        assert weights(out) == weights(straight)
        assert {line["step"]: line for line in lines(straight)}.items() <= {
            line["step"]: line for line in lines(out)
        }.items()
    else:
        same_run(out, straight)


@pytest.mark.slow
def test_another_number_of_threads_may_go_on_and_is_said(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert bench.warm.run(bench.pretrain(out), [["signal_in_step", 2, signal.SIGTERM]]).status == 75
    child = bench.warm.run(bench.pretrain(out, threads=2))
    assert child.status == 0, child.said
    assert "Threads: 1 before, 2 now" in child.output


def kill_fits(bench: Bench, folder: Path, seed: int, runs: int, kills: int, **changes: Any) -> tuple[int, int]:
    """As `kill_runs`, of `hilum fit`."""
    model = bench.straight_fit(**changes)
    straight, random_, total = model_digest(model), random.Random(seed), 0
    for run in range(MOST * runs):
        if run >= runs and total >= runs * kills:
            return total, run
        out = folder / f"model{seed}_{run}"
        command = bench.fit(out, **changes)
        total += killed_at_random(
            lambda c=command: [bench.warm.start(c)], random_, 0.9 * bench.seconds[model], kills, bool
        )
        found = model_digest(out)
        assert {name: found[name] for name in straight} == straight
        shutil.rmtree(out)
    raise AssertionError(f"{total} kills of {MOST * runs} models")


def test_a_head_that_was_killed_is_fitted_again_to_the_same_bytes(
    bench: Bench, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """`hilum fit` keeps nothing of a run that was cut: it starts again, and every file of the model is the same."""
    kills, runs = kill_fits(bench, tmp_path, 0, 1, 1)
    report(f"random kills of `hilum fit`: {kills} of {runs} models, every file equal")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"threads": 2}, {"head": "ml_decoder", "augmented_views": 2}], ids=["linear", "threads", "decoder"]
)
def test_many_random_kills_of_heads(
    bench: Bench, tmp_path: Path, changes: dict[str, Any], report: Callable[[str], None]
) -> None:
    if "head" in changes:
        changes = changes | {"decoder_dim": 8, "decoder_feed_forward": 12, "decoder_heads": 2}
    runs = size("FITS", 2)
    kills, runs = kill_fits(bench, tmp_path, 1, runs, size("KILLS_A_RUN", 5), **changes)
    report(f"random kills of `hilum fit` {changes}: {kills} of {runs} models, every file equal")


def test_what_is_compared_can_differ(bench: Bench) -> None:
    """Another seed is another run, and so is the same one with the step that was last not made."""
    with pytest.raises(AssertionError):
        same_run(bench.straight(seed=1), bench.straight())
    found = newest(bench.straight())
    assert found is not None
    assert found.step == len((bench.straight() / "metrics.jsonl").read_text().splitlines())
