"""`hilum evaluate`: predictions + labels -> `metrics.json` with intervals by patient, a table, and `report.html`.

Refuses to judge predictions on items that their calibrator or thresholds were fitted on. Chooses nothing.
Past 300 lines: every option of the program, and what it says at the end.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hilum
from hilum.core.errors import CheckpointError, ConfigError, LeakageError, PredictionError, UnknownNameError
from hilum.core.files import sha256_file, write_json
from hilum.core.tracking import progress, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.labels import TASKS, frequency_groups, task_findings
from hilum.evaluation.bootstrap import paired_comparison
from hilum.evaluation.calibration import check_out_of_sample
from hilum.evaluation.curves import curves
from hilum.evaluation.joining import Joined, join, match_findings
from hilum.evaluation.leaderboards import Row, is_challenge_test, leaderboard, leaderboard_table
from hilum.evaluation.ledger import record_opening
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.predictions import Predictions, read_predictions
from hilum.evaluation.report import ReportExample, write_report
from hilum.evaluation.stored_thresholds import f1_thresholds
from hilum.evaluation.subgroups import DEFAULT_ATTRIBUTES, MIN_PATIENTS, choose_attributes, levels, subgroups
from hilum.evaluation.summary import evaluation_notes, evaluation_table, localisation_table
from hilum.evaluation.truth import Truth, read_truth, split_name

FORMAT = "hilum-metrics-1"
EXAMPLES = 6
"""Studies shown in the report."""


def run(
    predictions: Path,
    labels: Path,
    out: Path,
    task: str | None = None,
    split: str | None = None,
    calibration: Path | None = None,
    compare: Path | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    min_positives: int = 0,
    explain: Path | None = None,
    by: Sequence[str] | None = None,
    min_group: int = MIN_PATIENTS,
    ledger: Path | None = None,
    accept_exposed: bool = False,
    maps: Sequence[Path] = (),
    regions: Path | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Judge predictions; returns what `metrics.json` holds.

    Args:
        predictions: at any stage; per image or per study.
        labels: a store, a manifest or a CSV with an id column.
        out: folder for `metrics.json` and `report.html`.
        task: judge the findings of this challenge task, in its order; all must be there.
        split: only the items of this split of `labels`; all of them must be predicted.
        calibration: where F1 thresholds come from; without it, from the predictions' own metadata.
        compare: other predictions of the same items: macro differences, this file minus that one, with intervals.
        bootstraps: resamples of patients; 0 for no intervals.
        seed: of the resamples.
        min_positives: findings with fewer stay out of the means and are listed.
        explain: a model that shows example studies of the report; `labels` must be a store.
        by: columns of the labels (or findings) whose groups are judged; None for those of sex, age, view and dataset
            that are recorded and differ; empty, or "none", for no groups.
        min_group: groups of fewer patients are listed and not judged.
        ledger: a file that counts how often these labels were looked at; this evaluation is added, refused or not.
        accept_exposed: judge images that the model has met; the result says so.
        maps: map files of these images (`hilum explain`), judged by `regions`; the first is compared with the others.
        regions: masks or boxes (`data/regions.py`).
        tolerance: of the pointing game, a share of the square's side; None: as published.

    Raises:
        ConfigError: options that mean nothing.
        CheckpointError: `explain` is no model.
        UnknownNameError: no such task, or column to group by.
        LeakageError: the model has met predicted images in pretraining or training.
        StageError: a calibrator or threshold was fitted on evaluated items, or at another stage.
        PredictionError: items or findings that cannot be joined.
    """
    if task is not None and task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    for option, value in (("bootstraps", bootstraps), ("min-positives", min_positives), ("min-group", min_group)):
        if value < 0:
            raise ConfigError(f"--{option}: expected 0 or more, found {value}.")
    if explain is not None and not labels.is_dir():
        raise PredictionError(f"Example studies are read from a store; {labels} is not one. Leave out --explain.")
    if explain is not None and not (explain / "config.json").is_file():
        raise CheckpointError(f"--explain {explain}: expected a model made by hilum fit or hilum combine.")
    if bool(maps) != (regions is not None):
        raise ConfigError("--maps and --regions go together: maps are judged by masks or boxes.")
    if len({Path(path).resolve() for path in maps}) < len(maps):
        raise ConfigError("--maps: one file is named twice; there is nothing to compare it with.")
    if tolerance is not None and (regions is None or not 0 <= tolerance < 1):
        raise ConfigError(f"--tolerance {tolerance}: expected a share of the side from 0 to 1, with --regions.")
    by = None if by is None else tuple(name for name in by if name != "none")
    optional = ("view", "dataset") if by else DEFAULT_ATTRIBUTES if by is None else ()
    required = tuple(name for name in by or () if name not in optional)
    split = None if split is None else split_name(split)
    table, truth = read_predictions(predictions), read_truth(labels, required, optional)
    if split is not None and not truth.has_splits:
        raise PredictionError(f"{labels} does not say which split an item is in; leave out --split.")
    if table.unit != "image" and (explain is not None or maps):
        raise PredictionError(
            f"{predictions} has one row per {table.unit}, and {'--explain' if explain else '--maps'} is about images. "
            "Evaluate predictions per image (hilum predict without --study), or leave the option out."
        )
    truth = truth if task is None else _in_words_of(table, truth, task)
    joined = join(truth, table, split)
    labels_file = labels / "index.npz" if labels.is_dir() else labels
    if ledger is not None:
        opening = record_opening(
            ledger, sha256_file(labels_file), split, predictions=sha256_file(predictions), stage=table.stage,
            model=table.metadata.get("model"), task=task,
        )  # fmt: skip
        say(f"{ledger}: look number {opening} at {'all' if split is None else f'the {split} split'} of these labels")
    _refuse_exposed(table, str(predictions), accept_exposed)
    other = read_predictions(compare) if compare is not None else None
    if other is not None:
        _refuse_exposed(other, str(compare), accept_exposed)
    wanted = None
    if task:  # classes by the names that findings have here; what is missing is named by match_findings
        answers = task_findings(task, table.findings)
        wanted = tuple(answers.get(name, name) for name in TASKS[task])
    names, only = match_findings(table.findings, truth.findings, wanted, str(labels))
    joined = joined.select(names)
    if chosen := table.metadata.get("chosen_on"):
        check_out_of_sample(joined.predictions, chosen, "The choice of members or weights")
    thresholds = f1_thresholds(joined.predictions, calibration)
    groups, groups_from = _groups(joined, truth)
    result = evaluate(joined.predictions, joined.labels, groups, thresholds, bootstraps, seed, min_positives)
    result["excluded"] |= only
    result = {"format": FORMAT, "hilum": hilum.__version__, "notice": RESEARCH_NOTICE, **result}
    result |= _context(joined, groups_from, task, split)
    attributes = choose_attributes(joined.predictions, joined.attributes, by)
    if attributes:
        groups_of = sum(len(set(levels(name, values).tolist()) - {""}) for name, values in attributes.items())
        with progress("Subgroups", groups_of) as bar:
            result["subgroups"] = subgroups(
                joined.predictions, joined.labels, attributes, thresholds, bootstraps, seed, min_positives, min_group,
                bar.advance,
            )  # fmt: skip
    board, comparable = _board(task, joined, result, predictions.stem) if task else ([], False)
    if board:
        remarks = {"comparable": comparable, "note": board[0].note}
        result["leaderboard"] = {"rows": [dataclasses.asdict(row) for row in board], **remarks}
    if compare is not None and other is not None:
        result["compare"] = _compare(joined, thresholds, other, compare, bootstraps, seed, min_positives)
    if regions is not None:
        result["localisation"] = _localisation(
            joined, maps, regions, labels, groups, tolerance, bootstraps, seed, min_positives
        )
    result["inputs"] = {
        "predictions": _input(predictions),
        "labels": _input(labels_file),
        "compare": _input(compare) if compare else None,
        "calibration": _input(calibration) if calibration else None,
        **({"maps": [_input(path) for path in maps], "regions": _input(regions)} if regions else {}),
    }
    write_json(out / "metrics.json", result)
    notes = evaluation_notes(result)
    write_report(
        out / "report.html",
        title=f"Evaluation of {predictions.stem}",
        metrics=result,
        curves=curves(joined.predictions.probabilities, joined.labels, names),
        comparisons=_comparisons(result),
        examples=_examples(explain, labels, joined) if explain else (),
        notes=notes,
    )
    for line in notes:
        warn(line)
    say(evaluation_table(result))
    if board:
        say(leaderboard_table(board))
    if located := result.get("localisation"):
        say(localisation_table(located))
    say(
        f"{out / 'metrics.json'}, {out / 'report.html'}: {len(names)} findings, "
        f"{len(joined.predictions)} {table.unit} rows"
    )
    return result


def _in_words_of(table: Predictions, truth: Truth, task: str) -> Truth:
    """Labels whose classes of the task have the names that the predictions give them: a challenge has its own words."""
    ours, theirs = task_findings(task, table.findings), task_findings(task, truth.findings)
    names = {theirs[one]: name for one, name in ours.items() if one in theirs and name not in truth.findings}
    return dataclasses.replace(truth, findings=tuple(names.get(name, name) for name in truth.findings))


def _localisation(
    joined: Joined, maps: Sequence[Path], regions: Path, labels: Path, groups: dict[str, str], tolerance: float | None,
    bootstraps: int, seed: int, min_images: int,
) -> dict[str, Any]:  # fmt: skip
    """Maps beside masks or boxes."""
    from hilum.data.regions import read_regions, sizes_of  # tables of boxes need polars; nothing else here does
    from hilum.evaluation.localisation import MIN_IMAGES, TOLERANCE, localise
    from hilum.evaluation.map_files import read_maps

    names = [path.stem for path in maps]
    if len(set(names)) < len(names):
        names = [str(path) for path in maps]
    read = dict(zip(names, map(read_maps, maps), strict=True))
    truth = read_regions(regions, sizes_of(labels))
    with progress("Localisation", len(truth), "regions") as bar:
        return localise(
            joined.predictions, read, truth, groups, TOLERANCE if tolerance is None else tolerance, bootstraps, seed,
            min_images or MIN_IMAGES, bar.advance,
        )  # fmt: skip


def _examples(explain: Path, labels: Path, joined: Joined) -> list[ReportExample]:
    """Some of the judged studies as the model sees them."""
    from hilum.data.store import Store  # numbers need neither a store nor torch; pictures need both
    from hilum.deploy.examples import choose_studies, explain_study
    from hilum.deploy.predictor import load

    store, model = Store.open(labels), load(explain)
    position = {uid: index for index, uid in enumerate(store.uids.tolist())}
    uids = joined.predictions.image_uid
    chosen = choose_studies(joined.predictions, joined.labels, EXAMPLES)
    return [
        explain_study(model, store, [position[uid] for uid in uids[rows]], f"Study {number}")
        for number, rows in enumerate(chosen, 1)
    ]


def _refuse_exposed(table: Predictions, name: str, accepted: bool) -> None:
    """A leak by design that was accepted when the model was made needs no second word."""
    met = table.metadata.get("exposed_images")
    if met and not accepted and not table.metadata.get("accepted_leak"):
        raise LeakageError(
            f"{name}: the model has met {met} of the predicted images in pretraining or training; scores on them say "
            "nothing of unseen images. Predict images that it has not met (`hilum predict MODEL STORE:test`), or say "
            "--accept-exposed, which is written into the result."
        )


def _groups(joined: Joined, truth: Truth) -> tuple[dict[str, str], str]:
    recorded = joined.predictions.metadata.get("groups")
    if recorded:
        return recorded, "training images of the model"
    if trained := truth.groups():
        return trained, "training images of the labels file"
    counts = dict(zip(joined.findings, (joined.labels == 1).sum(axis=0).tolist(), strict=True))
    return frequency_groups(counts, len(joined.labels)), "evaluated items (no training images at hand)"


def _context(joined: Joined, groups_from: str, task: str | None, split: str | None) -> dict[str, Any]:
    metadata = joined.predictions.metadata
    fitted = set(metadata.get("head_splits", ()))
    return {
        "task": task,
        "split": split,
        "groups_from": groups_from,
        "left_out": joined.left_out,
        "model": metadata.get("model"),
        "members": metadata.get("members"),
        "calibration": _without_digests(metadata.get("calibration")),
        "exposed_images": metadata.get("exposed_images"),  # None: not known
        "accepted_leak": metadata.get("accepted_leak") or None,
        "uncalibrated": metadata.get("uncalibrated"),
        "exposure_not_recorded": metadata.get("exposure_not_recorded"),
        "scale": metadata.get("scale"),
        "items_without_label": int((joined.labels < 0).all(axis=1).sum()),
        "items_of_head_training": sum(name in fitted for name in joined.splits.tolist()),
    }


def _without_digests(calibration: dict[str, Any] | None) -> dict[str, Any] | None:
    if not calibration or not calibration.get("fitted_on"):
        return calibration
    fitted_on = {key: value for key, value in calibration["fitted_on"].items() if key != "digests"}
    return {**calibration, "fitted_on": fitted_on}


def _board(task: str, joined: Joined, result: dict[str, Any], name: str) -> tuple[list[Row], bool]:
    """The own row and the published ones, nothing where none was published; whether their levels can be compared."""
    table = joined.predictions
    comparable = table.unit == "image" and is_challenge_test(task, len(table), sorted(set(table.dataset.tolist())))
    out = {name for reason in ("untrained", "no_labels", "few_positives") for name in result["excluded"][reason]}
    none = [name for name, one in result["findings"].items() if one["positives"] == 0 and one["negatives"]]
    missing = [name for name in table.findings if name in out and name not in none]
    rows = leaderboard(task, result["macro"], name, comparable, missing, none)
    return rows if len(rows) > 1 else [], comparable and not missing


def _compare(
    joined: Joined, thresholds: dict[str, float] | None, other: Predictions, path: Path, bootstraps: int, seed: int,
    min_positives: int,
) -> dict[str, Any]:  # fmt: skip
    other = other.rows(np.flatnonzero(np.isin(other.image_uid, joined.predictions.image_uid)))
    if chosen := other.metadata.get("chosen_on"):
        check_out_of_sample(other, chosen, "The choice of members or weights of the compared file")
    cuts = f1_thresholds(other, None)
    macro, by_finding = paired_comparison(
        joined.predictions, other, joined.labels, thresholds, cuts, bootstraps, seed, min_positives
    )
    about = {"file": path.name, "model": other.metadata.get("model"), "stage": other.stage,
             "exposed_images": other.metadata.get("exposed_images")}  # fmt: skip
    return {**about, "differences": macro, "by_finding": by_finding}


def _comparisons(result: dict[str, Any]) -> list[dict[str, Any]] | None:
    compared = result.get("compare")
    if compared is None:
        return None
    return [
        {"name": f"this file - {compared['file']}", "metric": metric, "value": row["difference"], **row}
        for metric, row in compared["differences"].items()
        if row["difference"] is not None
    ]


def _input(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256_file(path)}
