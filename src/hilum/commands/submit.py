"""`hilum submit`: predictions -> a validated CXR-LT submission, ids and classes exactly as the challenge lists them.

With `--check` a submission that is already there, made here or elsewhere, is validated, and scored where there are
labels.
"""

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hilum
from hilum.core.errors import ConfigError, PredictionError, UnknownNameError
from hilum.core.files import atomic_file, sha256_file, write_json, write_text
from hilum.core.tracking import next_step, say, warn
from hilum.data.labels import ID_COLUMNS, TASKS, task_findings
from hilum.evaluation.challenge_scaling import SCALED, SCALES, check_compression, move_cut_to_half
from hilum.evaluation.leaderboards import is_challenge_test, leaderboard, leaderboard_table
from hilum.evaluation.predictions import Predictions, bare_ids, read_predictions
from hilum.evaluation.stored_thresholds import f1_thresholds
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.submission import (
    CODE,
    Submission,
    challenge_scores,
    check_submission,
    labels_of,
    read_ids,
    submission_rows,
)
from hilum.evaluation.table_files import sidecar
from hilum.evaluation.truth import read_truth

FORMAT = "hilum-submission-1"
PREDICTIONS = "predictions.csv"
"""The CSV inside a zip."""
LEFT_OUT = frozenset({".git", "__pycache__", ".venv"})
"""Folders of the code that do not enter the zip."""
EARLIEST = (1980, 1, 1, 0, 0, 0)
"""Date of everything in a zip, so that the same submission has the same bytes."""


def run(
    predictions: Path,
    task: str,
    ids: Path,
    out: Path,
    scale: str | None = None,
    calibration: Path | None = None,
    fill_untrained: str | None = None,
    study: str | None = None,
    compress: float = 1.0,
    code: Path | None = None,
) -> None:
    """Write the submission, and read it back as `check` does.

    Args:
        predictions: per image.
        task: a name in TASKS.
        ids: CSV with the column dicom_id (2026: ImageID); its order is kept.
        out: the CSV to write, or a zip with it and `code/`.
        scale: "f1" moves each finding's F1-optimal cut to 0.5; changes neither AP nor AUC.
        calibration: where the cuts come from; without it, from the predictions' own metadata.
        fill_untrained: a number in [0, 1] for classes never trained, or "prevalence" where the predictions record that
            of each of them.
        study: a rule such as "mean": each image carries its study's value, as the challenge's entrants do. For raw
            predictions; `hilum combine` does the same in a step of its own.
        compress: with `scale`, factor of the log-odds toward 0.5.
        code: folder for `code/` of a zip; without it, a note that names the program.

    Raises:
        UnknownNameError: no such task, scale or rule.
        ConfigError: options that mean nothing together.
        PredictionError: images or classes missing, a class never trained, no cut for a class.
        StageError: the calibration was fitted at another stage, or on the submitted images.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    if scale is not None and scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    check_compression(compress)
    if compress < 1 and scale is None:
        raise ConfigError("--compress goes with --scale f1: around which cut the scores move is a part of the scale.")
    if calibration is not None and scale is None:
        raise ConfigError("--calibration goes with --scale f1: its cuts are what the scores are moved by.")
    if code is not None and (out.suffix != ".zip" or not code.is_dir()):
        raise ConfigError(f"--code is a folder for a zip: found {code} for {out}. Say --out submission.zip.")
    table, classes, listed = read_predictions(predictions), TASKS[task], read_ids(ids, ID_COLUMNS[task])
    if study is not None:
        table = aggregate_studies(table, study, unit="image")
    answers = task_findings(task, table.findings)
    trained = dict(zip(table.findings, table.trained, strict=True))
    ranked = {column: answers[name] for column, name in enumerate(classes) if trained.get(answers.get(name, ""), False)}
    constant = [name for column, name in enumerate(classes) if column not in ranked]
    fill = _constants(constant, answers, table.metadata.get("prevalence", {}), fill_untrained)
    values = submission_rows(table, classes, listed, fill, answers)
    if constant:
        warn(f"{len(constant)} classes are a constant, which ranks nothing: {', '.join(constant)}.")
    if scale == "f1":
        submitted = table.rows(np.flatnonzero(np.isin(bare_ids(table.image_id, table.dataset), listed)))
        cuts = f1_thresholds(submitted, calibration)
        if cuts is None:
            raise PredictionError(
                "These predictions carry no F1 thresholds. Give --calibration FILE, fitted on validation predictions "
                "of the same stage."
            )
        for column, finding in ranked.items():
            if finding not in cuts:
                raise PredictionError(f"No F1 threshold for {finding!r}; fit one with hilum calibrate on validation.")
            values[:, column] = move_cut_to_half(values[:, column], cuts[finding], compress)
        warn("scaled scores are for the challenge's fixed cut at 0.5; they are not probabilities.")
        if compress < 1:
            warn(
                "compression changes no decision and no order: it lowers the leaderboard's calibration error, no more."
            )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([ID_COLUMNS[task], *classes])
    writer.writerows([name, *row] for name, row in zip(listed, values.tolist(), strict=True))
    _write(out, text.getvalue(), code, task)
    _describe(out, predictions, table, task, scale, compress)
    rest = len(table) - len(listed)
    say(f"{out}: {len(listed)} images, {len(classes)} classes of {task}; {rest} predicted images were not listed")
    next_step(f"hilum submit --check {out} --task {task} --ids {ids}")


def check(
    path: Path, task: str, ids: Path, labels: Path | None = None
) -> tuple[Submission, dict[str, float | None] | None]:
    """Validate a submission; with labels, score it as the challenge does, beside the published results.

    Args:
        path: `.csv` or `.zip`.
        task: a name in TASKS.
        ids: the challenge's list.
        labels: of the listed images: a store, a manifest or a CSV.

    Returns:
        The submission, and its `challenge_scores` or None.

    Raises:
        UnknownNameError: no such task.
        PredictionError: what is wrong with the file (`check_submission`), or labels that do not fit.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    found = check_submission(path, task, read_ids(ids, ID_COLUMNS[task]))
    say(f"{path}: sound; {len(found.ids)} images, {len(found.classes)} classes of {task}")
    for note in found.notes:
        warn(f"{note}.")
    if labels is None:
        return found, None
    truth = read_truth(labels)
    known = labels_of(found, truth)
    scores = challenge_scores(found.values, known)
    datasets = sorted(set(truth.dataset.tolist()) - {""}) or ["cxrlt2026" if "2026" in task else "cxrlt"]
    comparable = is_challenge_test(task, len(found.ids), datasets)
    unlabelled = [name for name, codes in zip(found.classes, known.T, strict=True) if (codes < 0).all()]
    absent = [name for name, codes in zip(found.classes, known.T, strict=True) if (codes != 1).all()]
    none = [name for name in absent if name not in unlabelled]
    say(leaderboard_table(leaderboard(task, scores, path.name, comparable, unlabelled, none)))
    return found, scores


def _write(out: Path, text: str, code: Path | None, task: str) -> None:
    """The CSV, or a zip with it and `code/`."""
    if out.suffix == ".csv":
        write_text(out, text)
        return
    if out.suffix != ".zip":
        raise ConfigError(f"A submission is a .csv or a .zip; found {out}.")
    members = {PREDICTIONS: text.encode()}
    if code is None:
        note = f"Predictions for {task} by Hilum {hilum.__version__} (hilum submit).\n"
        members[f"{CODE}README.txt"] = note.encode()
    else:
        files = sorted(
            path for path in code.rglob("*") if path.is_file() and not LEFT_OUT & set(path.relative_to(code).parts)
        )
        members |= {CODE + path.relative_to(code).as_posix(): path.read_bytes() for path in files}
    with atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name, EARLIEST)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)


def _describe(out: Path, predictions: Path, table: Predictions, task: str, scale: str | None, compress: float) -> None:
    """Say beside a scaled submission what it is, so that nothing takes its scores for probabilities."""
    beside = sidecar(out)
    if scale is None:
        beside.unlink(missing_ok=True)  # of a scaled file that was here before
        return
    content: dict[str, Any] = {
        "format": FORMAT,
        "stage": SCALED,
        "scaled_from": table.stage,
        "task": task,
        "scale": scale,
        "compress": compress,
        "predictions": {"file": predictions.name, "sha256": sha256_file(predictions)},
        "note": "scores for a leaderboard that cuts at 0.5: not probabilities, and not for any other use",
    }
    write_json(beside, content)


def _constants(
    untrained: Sequence[str], answers: Mapping[str, str], prevalence: Mapping[str, float], fill_untrained: str | None
) -> dict[str, float] | None:
    """What each class gets that was never trained."""
    if fill_untrained is None:
        return None
    if fill_untrained == "prevalence":
        without = [name for name in untrained if answers.get(name) not in prevalence]
        if without:
            raise PredictionError(
                f"These predictions do not record the training prevalence of {', '.join(map(repr, without))}. Give a "
                "number for all classes that were never trained, as in --fill-untrained 0.01."
            )
        return {name: float(prevalence[answers[name]]) for name in untrained}
    try:
        share = float(fill_untrained)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--fill-untrained is 'prevalence' or a number in [0, 1], not {fill_untrained!r}.")
    return dict.fromkeys(untrained, share)
