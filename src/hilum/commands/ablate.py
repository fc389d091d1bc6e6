"""`hilum ablate`: a plan and a store in, one table out: every row at every seed, with intervals and differences.

    OUT/plan.yaml          the plan, whole; can be passed back
    OUT/backbones/...      pretraining runs        OUT/predictions/...   of the test images, per head
    OUT/heads/...          models                  OUT/rows/...          what was measured, per row and seed
    OUT/results.json       docs/reference/ablation.md     OUT/table.md, OUT/report.html

What is finished is not made again (`ablate_units.py`): the same command goes on after a kill, and makes what a changed
plan changes. A unit that fails is reported at the end; those that do not need it go on. Nothing is chosen on test:
heads are selected, thresholds and calibrators fitted, on validation; every row is judged once per seed.
"""

import io
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hilum.commands.ablate_making import perform
from hilum.commands.ablate_plan import ResolvedPlan
from hilum.commands.ablate_results import collect, write_results
from hilum.commands.ablate_units import LOG_NAME, UNIT_NAME, Unit, Workplace, refuse_missing_splits
from hilum.core.children import end_with_parent
from hilum.core.config import write_yaml
from hilum.core.errors import ConfigError, HilumError
from hilum.core.locks import folder_lock
from hilum.core.tracking import duration, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.network import choose_device
from hilum.evaluation.ablation_table import text_table

PLAN_NAME = "plan.yaml"


def run(resolved: ResolvedPlan, data: Path, out: Path, device: str = "auto", workers: int = 1) -> dict[str, Any]:
    """Carry out a plan, or go on with it; returns what `results.json` holds.

    Args:
        resolved: the plan, every recipe looked up (`plans.resolve`).
        data: store with train, val and test.
        out: folder; may hold an earlier run of this plan or of another.
        device: auto, cpu or cuda, for heads and predictions.
        workers: heads, predictions and rows made side by side, in processes; pretraining is never divided.

    Raises:
        ConfigError: no test images.
        HilumError: another process writes `out`; or, after everything else was made and written, units failed.
    """
    if workers < 1:
        raise ConfigError(f"workers: expected at least 1, found {workers}.")
    choose_device(device)  # a device that is not there is found out now, not in every unit
    data, out = Path(data), Path(out)
    place = Workplace(resolved, data, out, device)
    refuse_missing_splits(place)
    start = time.monotonic()
    with folder_lock(out):
        write_yaml(out / PLAN_NAME, resolved.plan)
        units = place.units()
        _announce(place, units)
        failures = _carry_out(place, units, workers)
        results = collect(place, failures, round(time.monotonic() - start, 1))
        paths = write_results(results, out)
    say(text_table(results))
    say("\n" + "\n".join(map(str, paths)))
    say(f"Done in {duration(time.monotonic() - start)}. {RESEARCH_NOTICE}")
    if failures:
        listed = "\n".join(f"  {unit}: {error}" for unit, error in failures.items())
        raise HilumError(
            f"{len(failures)} of {len(units)} units of the plan were not made:\n{listed}\nThe same command tries them "
            f"again; each folder under {out} has a {LOG_NAME}."
        )
    return results


def _announce(place: Workplace, units: list[Unit]) -> None:
    plan = place.resolved.plan
    finished = sum(place.is_finished(unit) for unit in units)
    say(
        f"{plan.title or plan.name}: {len(plan.rows)} rows, {len(plan.heads)} heads, {len(plan.backbones)} backbones, "
        f"{len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}; {len(place.test)} test images"
    )
    if plan.scale_note:
        say(plan.scale_note)
    say(f"{len(units)} units, {finished} of them finished")
    mine = {str(place.folder(unit)) for unit in units if place.is_finished(unit)}
    earlier = [path for path in place.out.glob(f"*/*/*/{UNIT_NAME}") if str(path.parent) not in mine]
    if earlier:
        say(f"{len(earlier)} finished units in {place.out} belong to no unit of this plan as it is now; they stay")


def _carry_out(place: Workplace, units: list[Unit], workers: int) -> dict[Unit, str]:
    """Make every unit that is not there; returns what failed, and what was not tried because of it."""
    progress = _Progress(place, [unit for unit in units if not place.is_finished(unit)], workers)
    failures: dict[Unit, str] = {}
    here = [unit for unit in units if workers == 1 or unit.kind == "backbones"]  # several trainings share nothing
    for unit in here:
        if _skipped(place, unit, failures) or place.is_finished(unit):
            continue
        progress.begin(place, unit)
        progress.end(unit, _perform(place, unit), failures)
    rest = [unit for unit in units if unit not in here]
    if rest:
        _side_by_side(place, rest, workers, failures, progress)
    return failures


def _skipped(place: Workplace, unit: Unit, failures: dict[Unit, str]) -> bool:
    missing = [one for one in place.needs(unit) if one in failures]
    if missing:
        failures[unit] = f"not tried, because it needs {missing[0]}"
    return bool(missing)


def _side_by_side(
    place: Workplace, units: list[Unit], workers: int, failures: dict[Unit, str], progress: "_Progress"
) -> None:
    waiting, running = list(units), dict[Future[str | None], tuple[Unit, ProcessPoolExecutor]]()
    pool = _pool(workers)
    try:
        while waiting or running:
            for unit in list(waiting):
                if _skipped(place, unit, failures) or place.is_finished(unit):
                    waiting.remove(unit)
                elif len(running) < workers and all(place.is_finished(one) for one in place.needs(unit)):
                    waiting.remove(unit)
                    progress.begin(place, unit)
                    running[pool.submit(_perform, place, unit)] = unit, pool
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                unit, of = running.pop(future)
                try:
                    progress.end(unit, future.result(), failures)
                except BrokenProcessPool:  # it takes the units beside it along
                    progress.end(unit, "its process, or the one beside it, was killed (out of memory?)", failures)
                    if of is pool:
                        pool.shutdown(wait=False, cancel_futures=True)
                        pool = _pool(workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the threads of torch and of the table library do not survive a fork.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent)


def _perform(place: Workplace, unit: Unit) -> str | None:
    """Make one unit; returns what went wrong. What it prints goes to its log, but for pretraining, which is long."""
    if unit.kind == "backbones":
        return _guarded(lambda: perform(place, unit), say)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        wrong = _guarded(lambda: perform(place, unit), lambda text: print(text))
    folder = place.folder(unit)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_NAME).open("a", encoding="utf-8") as log:
        log.write(printed.getvalue())
    return wrong


def _guarded(work: Callable[[], object], tell: Callable[[str], None]) -> str | None:
    threads = torch.get_num_threads()
    try:
        work()
    except HilumError as error:
        return f"{error}"
    except Exception as error:  # a fault of ours in one unit must not cost the hours of the others
        tell(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)  # the settings of one unit are not those of the next
    return None


class _Progress:
    """One line per unit, with the time left: what equal units took, those of other seeds or of earlier runs too."""

    def __init__(self, place: Workplace, units: Iterable[Unit], workers: int) -> None:
        self.left, self.workers = list(units), workers
        self.total, self.number = len(self.left), 0
        self.started: dict[Unit, float] = {}
        self.seconds: dict[tuple[str, str], list[float]] = {}
        for unit in place.units():
            if place.is_finished(unit):
                self._learn(unit, float(place.record(unit)["seconds"]))

    def _learn(self, unit: Unit, seconds: float) -> None:
        self.seconds.setdefault((unit.kind, unit.name), []).append(seconds)

    def begin(self, place: Workplace, unit: Unit) -> None:
        """Say which settings a changed plan changes in it."""
        self.started[unit] = time.monotonic()
        differences = [line for line in place.changed(unit) if "->" in line]  # that others were made again follows
        if differences:
            shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
            say(f"{unit} is made again: {shown}")

    def end(self, unit: Unit, wrong: str | None, failures: dict[Unit, str]) -> None:
        """Count it, and say how it went."""
        took = time.monotonic() - self.started.pop(unit)
        self.left.remove(unit)
        self.number += 1
        if wrong is None:
            self._learn(unit, took)
            say(f"[{self.number}/{self.total}] {unit}: {duration(took)}{self._estimate()}")
        else:
            failures[unit] = wrong
            warn(f"[{self.number}/{self.total}] {unit} failed: {wrong}")

    def _estimate(self) -> str:
        known, unknown = 0.0, 0
        kinds: dict[str, list[float]] = {}
        for (kind, _), values in self.seconds.items():
            kinds.setdefault(kind, []).extend(values)
        for unit in self.left:
            measured = self.seconds.get((unit.kind, unit.name)) or kinds.get(unit.kind)
            known += (
                sum(measured) / len(measured) / (1 if unit.kind == "backbones" else self.workers) if measured else 0
            )
            unknown += not measured
        if not self.left:
            return ""
        more = f" and {unknown} units of a kind not yet timed" if unknown else ""
        return f"; about {duration(known)}{more} left"
