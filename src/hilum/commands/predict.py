"""`hilum predict`: a model and images in, a prediction file out. Image files, tables of paths, or a split of a store.

Nothing is lost in silence: what cannot be read is listed in `OUT.quarantine.csv`, what is no upright chest X-ray in
`OUT.flags.csv`, and inputs = predicted + withheld + refused + given twice, exactly. A long run is read in parts
(`predict_parts.py`), by one process or several (`predict_workers.py`), and goes on where it was stopped.
"""

import dataclasses
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hilum.commands.predict_account import Account, account_of, flags_of, quarantine_of
from hilum.commands.predict_parts import READING_THREADS, Part, Parts, Work, cut, plan_of
from hilum.commands.predict_workers import (
    STOPPED_STATUS,
    Stopped,
    devices_of,
    read_here,
    read_on_devices,
    stop_signals,
)
from hilum.core.config import parse_shard
from hilum.core.errors import ConfigError, EmptyStudyError, HilumError
from hilum.core.locks import folder_lock
from hilum.core.tracking import next_step, progress, say, warn
from hilum.deploy.admission import RawReading
from hilum.deploy.engines import read_export
from hilum.deploy.inputs import Inputs, refuse_overwriting, resolve
from hilum.deploy.network import store_identity
from hilum.deploy.predictor import Model, load
from hilum.evaluation.composition import Composition
from hilum.evaluation.predictions import Predictions, write_predictions
from hilum.evaluation.studies import study_uids
from hilum.evaluation.study_rules import StudyRule
from hilum.evaluation.table_files import READERS

if TYPE_CHECKING:
    from hilum.commands.predict_report_options import ReportOptions

__all__ = ["OWN", "READING_THREADS", "run"]

OWN = "own"
"""In place of a study rule: the model's."""


def run(
    model: Path,
    inputs: list[str],
    out: Path,
    raw: bool = False,
    study: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    shard: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
    study_column: str | None = None,
    devices: int = 1,
    score_flagged: bool = False,
    correct_inverted: bool = False,
    budget: float = 1.0,
    reports: "ReportOptions | None" = None,
) -> None:
    """Predict images and write a prediction file.

    Args:
        model: a MODEL or an ensemble directory.
        inputs: files, folders, CSV or Parquet files of paths, or one STORE:split.
        out: `.parquet`, `.csv` or `.json`.
        raw: without calibration, as `hilum combine` wants it.
        study: one row per study, by this study rule; "own": by the rule that the model's calibrators were fitted for,
            and any other needs `raw`, no `reports`, and no ensemble by ranks; None: one row per image.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        shard: "i/n", job i of n, counted from 0; a study is never divided.
        engine: torch for a MODEL, onnx or openvino for an EXPORT; None: what `model` is for.
        precision: fp32, bf16 or auto (`deploy.engines.choose_precision`); None: as the model says.
        study_column: the column of tables that groups images into studies; None: `study_id`.
        devices: so many processes, each on a device of its own; on a CPU they share the processors.
        score_flagged: score what is no upright chest X-ray as it is; otherwise it is withheld, unless it comes from a
            store, whose images somebody has chosen.
        correct_inverted: exchange bright and dark of inverted images, and score them.
        budget: share of inputs that may be refused or withheld; above it this is an error, after all is written.
        reports: also a report of every study (`predict_reports.py`).

    Raises:
        ConfigError: inputs or options that mean nothing.
        EmptyStudyError: no input could be scored.
        CheckpointError: the model is incomplete or damaged.
        HilumError: the budget is exceeded, the disk is full, a process has died, or another one writes the same file.
        SystemExit: with status 75, after SIGTERM or SIGUSR1; the same command goes on.
    """
    out = Path(out)
    rule = _check(out, study, batch_size, budget)
    refuse_overwriting((out, quarantine_of(out), flags_of(out)), inputs)
    places = devices_of(device, devices)
    if devices > 1 and places[0] != "cpu" and precision == "auto" and read_export(model) is None:
        precision = "bf16"  # what it is on their devices, and not on the CPU of this process
    loaded = load(model, device if devices == 1 else "cpu", engine, precision)
    if rule is not None and rule != loaded.composition.study:
        loaded.composition = _other_rule(loaded, rule, raw, reports is not None)
    found = resolve(inputs, study_column)
    work, mine, part = _work(
        found, loaded, model, engine, precision, batch_size, score_flagged, correct_inverted, shard, devices
    )
    if len(work) + len(mine.refused) == 0 and shard:
        raise EmptyStudyError(f"--shard {shard}: this job has nothing to do; there are about as many jobs as studies.")
    if reports is not None:
        from hilum.commands.predict_reports import prepare_reports  # only where reports are asked for

        prepare_reports(loaded, found, reports, raw, score_flagged, correct_inverted)
    read, parts = _read(loaded, work, out, places)
    account = account_of(work, mine, read)
    account.write(out)
    if reports is not None:
        from hilum.commands.predict_reports import write_reports

        write_reports(loaded, found, part, reports, raw, score_flagged, correct_inverted)
    reading = RawReading.join([one.reading for one in read]) if read else None
    if reading is None or len(reading.kept) == 0:
        if parts is not None:
            parts.remove()
        out.unlink(missing_ok=True)  # of an earlier prediction: it is not of these inputs
        raise EmptyStudyError(account.nothing())
    unit = "image" if study is None else "study"
    pictures = None if found.store is None else found.store.pictures[np.array(work.places, np.int64)]
    predictions = loaded.assemble(work.identity, reading, raw, unit, pictures)
    if found.store is None:  # identities of loose files say nothing about what the model has seen
        predictions = predictions.replace(predictions.probabilities, exposed_images=None, exposure=None)
    facts = {"inputs": account.counts(), "split": found.split or None}
    predictions = predictions.replace(predictions.probabilities, **facts)
    write_predictions(predictions, out)
    if parts is not None:
        parts.remove()
    _report(predictions, loaded, found, account, out)
    if account.lost > budget * account.given:
        raise HilumError(
            f"{account.lost} of {account.given} inputs were refused or withheld, more than --budget {budget:g} allows. "
            f"{out} has the rest."
        )


def _check(out: Path, study: str | None, batch_size: int, budget: float) -> StudyRule | None:
    if out.suffix not in READERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(READERS)}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {batch_size}.")
    if not 0 <= budget <= 1:
        raise ConfigError(f"--budget: expected a share between 0 and 1, found {budget}.")
    return None if study in (None, OWN) else StudyRule.parse(str(study))


def _other_rule(model: Model, rule: StudyRule, raw: bool, reports: bool) -> Composition:
    """The model's composition with another study rule, for tables of raw predictions alone.

    What was fitted on validation belongs to the model's own rule: calibrators, the operating points that reports show,
    and the ranks of an ensemble.
    """
    if not raw:
        raise ConfigError(
            f"This model's calibrators for studies were fitted for {str(model.composition.study)!r} and would not hold "
            f"for {str(rule)!r}. Say --study own, or --raw; or make a model of it: hilum combine MODEL --study {rule}."
        )
    if reports:
        raise ConfigError(
            f"--reports: the operating points of this model hold for {str(model.composition.study)!r}, and reports by "
            f"{str(rule)!r} would show them all the same. Say --study own, or leave --reports out."
        )
    if model.composition.ensemble == "rank_mean" and len(model.networks) > 1:
        raise ConfigError(
            f"This ensemble puts ranks together, and knows where its members' scores stand for "
            f"{str(model.composition.study)!r} alone. Say --study own; or combine its members for the other rule: "
            f"hilum combine MODEL MODEL --ensemble rank_mean --study {rule} --out ENSEMBLE."
        )
    return dataclasses.replace(model.composition, study=rule, ranks={})


def _work(
    found: Inputs, loaded: Model, model: Path, engine: str | None, precision: str | None, batch_size: int,
    score_flagged: bool, correct_inverted: bool, shard: str | None, devices: int,
) -> tuple[Work, Inputs, np.ndarray]:  # fmt: skip
    """What this job reads, its share of the inputs, and the positions of its images among all."""
    job, jobs = parse_shard(shard)
    sources = found.view_sources
    if found.store is not None:
        found.store.check_recipe(loaded.preprocess_id)
        identity = store_identity(found.store, found.indices)
        part = _part(identity, job, jobs)
        places = found.indices[part].tolist()
    else:
        identity = found.identity()
        part = _part(identity, job, jobs)
        places = [found.images[place].path for place in part.tolist()]
        found = dataclasses.replace(
            found, images=[found.images[place] for place in part.tolist()],
            refused=found.refused_of(job, jobs), repeated=found.repeated if job == 0 else 0,
        )  # fmt: skip
    work = Work(
        model, engine, precision, None if found.store is None else found.store.path, places,
        {name: column[part] for name, column in identity.items()}, sources[part], batch_size,
        score_flagged or found.store is not None, correct_inverted, devices,
    )  # fmt: skip
    return work, found, part


def _part(identity: dict[str, np.ndarray], job: int, jobs: int) -> np.ndarray:
    """Positions of this job's images; all images of a study go to one job."""
    names = ("dataset", "patient_id", "study_id", "image_uid")
    studies = study_uids(*(identity[name] for name in names))
    return np.flatnonzero([zlib.crc32(uid.encode()) % jobs == job for uid in studies.tolist()])


def _read(model: Model, work: Work, out: Path, places: list[str]) -> tuple[list[Part], Parts | None]:
    """Read everything; what is kept on the way is in the folder that is returned, if there is one."""
    chunks = cut(work, model.needs_studies)
    with ExitStack() as stack:
        parts, before = None, 0
        if len(chunks) > 1 or len(places) > 1:
            parts = Parts(out.with_name(out.name + ".parts"))
            stack.enter_context(folder_lock(parts.folder))
            parts.prepare(plan_of(work, model, chunks))
            before = sum(len(chunk) for number, chunk in enumerate(chunks) if parts.read(number) is not None)
            if before:
                say(f"{before} of {len(work)} images were read before; going on with the rest")
        check = stack.enter_context(stop_signals())
        bar = stack.enter_context(progress("predict", len(work) - before, "images"))

        def done(count: int) -> None:
            bar.advance(count)
            check()

        try:
            if parts is not None and len(places) > 1:
                read_on_devices(work, chunks, parts, places, bar.advance, check)
            return read_here(model, work, chunks, parts, done), parts
        except Stopped:
            say("Stopped by a signal. " + ("Run the same command again to go on." if parts else "Nothing was kept."))
            raise SystemExit(STOPPED_STATUS) from None


def _report(predictions: Predictions, model: Model, found: Inputs, account: Account, out: Path) -> None:
    for line in account.warnings(out):
        warn(line)
    if model.screening is None:
        warn("this model has no screening: nobody has looked whether the images are upright chest X-rays")
    exposed = predictions.metadata.get("exposed_images", 0)
    if exposed:
        warn(f"the model has met {exposed} of {account.given} images in pretraining or training")
    for name, words in (("uncalibrated", "not calibrated"), ("exposure_not_recorded", "exposure")):
        if told := predictions.metadata.get(name):
            warn(f"{words}: {told}")
    say(account.line())
    say(
        f"{out}: {len(predictions)} {predictions.unit} rows, {int(predictions.trained.sum())} of "
        f"{len(predictions.findings)} findings, stage {predictions.stage}"
    )
    labels = str(found.store.path) if found.store else "LABELS"
    next_step(
        f"hilum combine {out} --study mean --out studies.parquet"
        if predictions.stage == "raw" and "normal_damping" not in predictions.metadata
        else f"hilum evaluate {out} --labels {labels} --out evaluation"
    )
