"""`hilum predict`: a model and images in, a prediction file out. Image files, or a split of a store.

A file that cannot be used is listed in `OUT.quarantine.csv` with its reason, and the rest goes on.
"""

import csv
import dataclasses
import io
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hilum.core.config import parse_shard
from hilum.core.errors import ConfigError, EmptyStudyError, ImageError
from hilum.core.files import write_text
from hilum.core.tracking import next_step, progress, say, warn
from hilum.data.images import read_image
from hilum.deploy.inputs import Inputs, Refused, resolve
from hilum.deploy.network import store_identity
from hilum.deploy.predictor import Model, load
from hilum.evaluation.composition import Composition
from hilum.evaluation.predictions import Predictions, write_predictions
from hilum.evaluation.studies import study_uids
from hilum.evaluation.study_rules import StudyRule
from hilum.evaluation.table_files import READERS

OWN = "own"
"""In place of a study rule: the model's."""
READING_THREADS = 2


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
) -> None:
    """Predict images and write a prediction file.

    Args:
        model: a MODEL or an ensemble directory.
        inputs: files, folders, CSV files of paths, or one STORE:split.
        out: `.parquet`, `.csv` or `.json`.
        raw: without calibration, as `hilum combine` wants it.
        study: one row per study, by this study rule; "own": by the rule that the model's calibrators were fitted for,
            and any other needs `raw`; None: one row per image.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        shard: "i/n", job i of n, counted from 0; a study is never divided.
        engine: torch for a MODEL, onnx or openvino for an EXPORT; None: what `model` is for.
        precision: fp32, bf16 or auto (`deploy.engines.choose_precision`); None: as the model says.

    Raises:
        ConfigError: inputs or options that mean nothing.
        EmptyStudyError: no input could be read.
        CheckpointError: the model is incomplete or damaged.
    """
    out = Path(out)
    if out.suffix not in READERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(READERS)}.")
    rule = None if study in (None, OWN) else StudyRule.parse(str(study))
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {batch_size}.")
    loaded = load(model, device, engine, precision)
    if rule is not None and rule != loaded.composition.study:
        loaded.composition = _other_rule(loaded, rule, raw)
    found = resolve(inputs)
    identity = store_identity(found.store, found.indices) if found.store else found.identity()
    part = _part(identity, *parse_shard(shard))
    identity = {name: column[part] for name, column in identity.items()}
    unit = "image" if study is None else "study"
    total = len(part)
    if total == 0 and shard:
        raise EmptyStudyError(f"--shard {shard}: this job has nothing to do; there are about as many jobs as studies.")
    with progress("predict", total, "images") as bar:
        if found.store:
            chosen = found.indices[part]
            predictions = loaded.predict_store(found.store, chosen, raw, unit, batch_size, READING_THREADS, bar.advance)
        else:
            predictions = _predict_files(loaded, found, part, identity, raw, unit, batch_size, bar.advance)
    write_predictions(predictions, out)
    _report(predictions, found, out, total)
    labels = str(found.store.path) if found.store else "LABELS"
    next_step(
        f"hilum combine {out} --study mean --out studies.parquet"
        if predictions.stage == "raw" and "normal_damping" not in predictions.metadata
        else f"hilum evaluate {out} --labels {labels} --out evaluation"
    )


def _other_rule(model: Model, rule: StudyRule, raw: bool) -> Composition:
    """The model's composition with another study rule, for raw predictions alone: calibrators belong to their rule."""
    if not raw:
        raise ConfigError(
            f"This model's calibrators for studies were fitted for {str(model.composition.study)!r} and would not hold "
            f"for {str(rule)!r}. Say --study own, or --raw; or make a model of it: hilum combine MODEL --study {rule}."
        )
    return dataclasses.replace(model.composition, study=rule, ranks={})


def _part(identity: dict[str, np.ndarray], job: int, jobs: int) -> np.ndarray:
    """Positions of this job's images; all images of a study go to one job."""
    names = ("dataset", "patient_id", "study_id", "image_uid")
    studies = study_uids(*(identity[name] for name in names))
    return np.flatnonzero([zlib.crc32(uid.encode()) % jobs == job for uid in studies.tolist()])


def _predict_files(
    model: Model,
    found: Inputs,
    part: np.ndarray,
    identity: dict[str, np.ndarray],
    raw: bool,
    unit: str,
    batch_size: int,
    done: Callable[[int], None],
) -> Predictions:
    lock = threading.Lock()

    def read(index: int) -> np.ndarray | None:
        path = found.images[index].path
        try:
            return read_image(path, path.name, model.short_side, recipe=model.preprocess_id).pixels
        except ImageError as error:
            with lock:
                found.refused.append(Refused(path, error.reason, str(error)))
            return None

    try:
        predictions = model.predict_images(identity, part, read, raw, unit, batch_size, READING_THREADS, done)
    except EmptyStudyError:
        reasons = Counter(one.reason for one in found.refused)
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise EmptyStudyError(
            f"None of {len(found.refused)} inputs could be read ({listed}). Nothing was written."
        ) from None
    # identities of loose files say nothing about what the model has seen
    return predictions.replace(predictions.probabilities, exposed_images=None, exposure=None)


def _report(predictions: Predictions, found: Inputs, out: Path, total: int) -> None:
    quarantine = out.with_name(out.name + ".quarantine.csv")
    quarantine.unlink(missing_ok=True)  # of an earlier prediction under this name
    if found.refused:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "reason", "message"])
        ordered = sorted(found.refused, key=lambda one: str(one.path))
        writer.writerows([one.path, one.reason, one.message] for one in ordered)
        write_text(quarantine, text.getvalue())
        reasons = Counter(one.reason for one in found.refused)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        warn(f"{len(found.refused)} inputs were left out ({listed}); {quarantine} says why")
    exposed = predictions.metadata.get("exposed_images", 0)
    if exposed:
        warn(f"the model has met {exposed} of {total} images in pretraining or training")
    for name, words in (("uncalibrated", "not calibrated"), ("exposure_not_recorded", "exposure")):
        if told := predictions.metadata.get(name):
            warn(f"{words}: {told}")
    say(
        f"{out}: {len(predictions)} {predictions.unit} rows, {int(predictions.trained.sum())} of "
        f"{len(predictions.findings)} findings, stage {predictions.stage}"
    )
