"""`hilum demo`: the whole pipeline on synthetic patients, ending in one table, `results.json` and `report.html`.

    phantoms -> manifest -> audit -> store -> pretraining -> a higher resolution -> heads -> study mean -> ensemble
    -> calibration -> evaluation on patients held out

Every stage is the program that real data goes through; this one only calls them in order. It chooses nothing: heads
are selected, calibrators and thresholds fitted, on validation patients; each step of the table is judged once on test
(`demo_results.py`).
"""

import io
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hilum.commands import audit, build, combine_models, demo_results, fit, manifest, pretrain
from hilum.core.children import end_with_parent
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError
from hilum.core.files import write_json
from hilum.core.tracking import duration, progress, say
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.store import Store
from hilum.evaluation.predictions import write_predictions
from hilum.evaluation.summary import step_table
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"
WRITES = (
    "phantoms", "manifest.parquet", "store", "pretraining", "pretraining_high", "linear", "model",
    "uncalibrated.parquet", "test.parquet", "results.json", "report.html",
)  # fmt: skip
"""All that a demo leaves in its folder; the next one removes these and nothing else."""
_UNFINISHED = tuple(f".{name}." for name in WRITES)
"""How what a killed demo had not finished is called, before a random part and `.tmp`."""


@dataclass(frozen=True)
class DemoPlan:
    """What is run; the numbers are fixed in `recipes.py` before any comparison."""

    pretraining: PretrainConfig
    """First stage."""
    higher_resolution: PretrainConfig
    """Second stage, started from the first."""
    linear: FitConfig
    """Linear head on the first stage."""
    decoder: FitConfig
    """Decoder, on both stages."""
    image_size: int = 256
    """Shorter side of the phantoms, pixels."""
    store_size: int = 176
    """Shorter side of the stored images, pixels."""
    bootstraps: int = 500
    """Resamples of patients for the intervals."""
    examples: int = 6
    """Studies shown in the report."""


def run(plan: DemoPlan, out: Path, patients: int = 600, seed: int = 0) -> dict[str, Any]:
    """Run everything; returns what `results.json` holds.

    Raises:
        ConfigError: `out` is a file, or holds something that is not of an earlier demo.
    """
    start = time.monotonic()
    out = Path(out)
    _make_room(out)
    data, store_path = out / "phantoms", out / "store"

    _heading("Synthetic patients", start)
    summary = write_phantoms(data, "cxrlt", patients, seed, plan.image_size)
    say(f"{summary['patients']} patients, {summary['studies']} studies, {summary['images']} images in {data}")
    _heading("Manifest, audit, store", start)
    table = out / "manifest.parquet"
    manifest.run([f"cxrlt={data}"], table, split="official", seed=seed)
    audit.run(table)
    build.run(table, store_path, plan.store_size, "raw")

    _heading(f"Pretraining at {plan.pretraining.crops.global_size} pixels", start)
    low = pretrain.run(plan.pretraining, store_path, out / "pretraining")
    _heading(f"Pretraining at {plan.higher_resolution.crops.global_size} pixels", start)
    high = pretrain.run(plan.higher_resolution, store_path, out / "pretraining_high", init=low)

    _heading("Heads", start)
    linear, members = out / "linear", out / "model" / "members"
    decoder_low, decoder_high = members / "decoder_low", members / "decoder_high"
    _fit_side_by_side(
        store_path,
        [(plan.decoder, high, decoder_high), (plan.decoder, low, decoder_low), (plan.linear, low, linear)],
    )
    combine_models.run([decoder_low, decoder_high], out / "model")

    _heading("Evaluation on patients held out", start)
    store = Store.open(store_path)
    steps = demo_results.steps(store, linear, decoder_low, decoder_high)
    results = demo_results.judge(steps, store, plan.bootstraps, seed)
    results |= {"patients": patients, "seed": seed, "model": str(out / "model"), "plan": to_dict(plan)}
    for name, step in (("uncalibrated", steps[-2]), ("test", steps[-1])):
        write_predictions(step.test, out / f"{name}.parquet")
    demo_results.report(out / REPORT_NAME, out / "model", data, steps, results, store, plan.examples)
    results["seconds"] = round(time.monotonic() - start, 1)
    write_json(out / RESULTS_NAME, results)

    say(step_table(results["steps"]))
    left_out = results["metrics"]["excluded"]["few_positives"]
    say(
        f"Means over the findings with at least {demo_results.MINIMUM_POSITIVES} test positives; left out: "
        f"{', '.join(sorted(left_out)) or 'none'}."
    )
    say(f"\n{out / REPORT_NAME}\n{out / RESULTS_NAME}\nDone in {duration(results['seconds'])}. {RESEARCH_NOTICE}")
    return results


def _make_room(out: Path) -> None:
    """Remove what an earlier demo wrote, but for the phantoms, which replace themselves; refuse to touch anything else.

    The phantoms' own record tells a demo from a folder of the same names.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(out.iterdir())
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be used as a folder: {error.strerror}. Choose another one.") from error
    unfinished = [path for path in found if path.name.endswith(".tmp") and path.name.startswith(_UNFINISHED)]
    written = [path for path in found if path.name in WRITES]
    foreign = [path.name for path in found if path not in unfinished + written]
    if foreign:
        listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ConfigError(
            f"{out} holds {listed}: not a demo's own. Nothing was removed. Choose another folder (--out)."
        )
    if written and not (out / "phantoms" / "phantom.json").exists():
        raise ConfigError(f"{out} holds something that is not a demo. Choose another folder (--out).")
    for path in unfinished + written:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name != "phantoms":
            shutil.rmtree(path)


def _heading(text: str, start: float) -> None:
    say(f"\n== {text}  ({duration(time.monotonic() - start)})")


Job = tuple[FitConfig, Path, Path]
"""Settings, backbone, where the model goes."""


def _fit_side_by_side(store: Path, jobs: Sequence[Job]) -> None:
    """Fit heads in processes of one thread each: small heads gain nothing from a second one."""
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    # Spawned, not forked: the threads of torch and of the table library do not survive a fork.
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool,
        progress("heads", len(jobs), "heads") as bar,
    ):
        for done in as_completed([pool.submit(_fit, store, job) for job in jobs]):
            for line in done.result():
                say(line)
            bar.advance()


def _fit(store: Path, job: Job) -> list[str]:
    """Fit one head; what it says and warns of, for the process that started this one."""
    config, backbone, out = job
    said, progress_lines = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(progress_lines):
        fit.run(replace(config, threads=1), store, backbone, out)
    warnings = [line for line in progress_lines.getvalue().splitlines() if line.startswith("warning:")]
    return [*warnings, *(line for line in said.getvalue().splitlines() if not line.startswith("Next:")), ""]
