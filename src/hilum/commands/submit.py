"""`hilum submit`: predictions -> a validated CXR-LT submission, ids and classes exactly as the challenge lists them."""

import csv
import io
from pathlib import Path

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.core.files import write_text
from hilum.core.tracking import say, warn
from hilum.data.labels import TASKS
from hilum.evaluation.calibration import read_calibrator
from hilum.evaluation.predictions import Predictions, read_predictions
from hilum.evaluation.submission import ID_COLUMN, move_cut_to_half, read_ids, submission_rows

SCALES = ("f1",)


def run(
    predictions: Path,
    task: str,
    ids: Path,
    out: Path,
    scale: str | None = None,
    calibration: Path | None = None,
    fill_untrained: str | None = None,
) -> None:
    """Write the submission.

    Args:
        predictions: per image; study means with `hilum combine --study mean` first, as the challenge's entrants do.
        task: a name in TASKS.
        ids: CSV with the column dicom_id; its order is kept.
        out: the CSV to write.
        scale: "f1" moves each finding's F1-optimal cut to 0.5; changes neither AP nor AUC.
        calibration: where the cuts come from; without it, from the predictions' own metadata.
        fill_untrained: "prevalence", or a number in [0, 1], for classes never trained.

    Raises:
        UnknownNameError: no such task or scale.
        PredictionError: images or classes missing, a class never trained, no cut for a class.
        StageError: the calibration was fitted at another stage.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    if scale is not None and scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    table, classes, listed = read_predictions(predictions), TASKS[task], read_ids(ids)
    fill = _constants(table, fill_untrained)
    values = submission_rows(table, classes, listed, fill)
    if scale == "f1":
        cuts = f1_cuts(table, calibration)
        trained = dict(zip(table.findings, table.trained, strict=True))
        for column, name in enumerate(classes):
            if not trained[name]:
                continue
            if name not in cuts:
                raise PredictionError(f"No F1 threshold for {name!r}; fit one with hilum calibrate on validation.")
            values[:, column] = move_cut_to_half(values[:, column], cuts[name])
        warn("scaled scores are for the challenge's fixed cut at 0.5; they are not probabilities.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([ID_COLUMN, *classes])
    writer.writerows([name, *row] for name, row in zip(listed, values.tolist(), strict=True))
    write_text(out, text.getvalue())
    rest = len(table) - len(listed)
    say(f"{out}: {len(listed)} images, {len(classes)} classes of {task}; {rest} predicted images were not listed")


def f1_cuts(table: Predictions, calibration: Path | None) -> dict[str, float]:
    """F1-optimal thresholds at the stage of these predictions, from a calibration or from their own metadata."""
    if calibration is None:
        found = table.metadata.get("thresholds") or {}
        if not found:
            raise PredictionError(
                "These predictions carry no thresholds. Give --calibration FILE, fitted on validation predictions of "
                "the same stage."
            )
        return {name: cuts["f1"] for name, cuts in found.items()}
    calibrator = read_calibrator(calibration)
    if table.stage != "calibrated":
        calibrator.check_stage(table)
        return {name: cuts["f1"] for name, cuts in calibrator.raw_thresholds.items()}
    if (table.metadata.get("calibration") or {}).get("fitted_on") != calibrator.fitted_on:
        raise StageError(f"These predictions were calibrated by something else than {calibration}.")
    return {name: cuts["f1"] for name, cuts in calibrator.thresholds.items()}


def _constants(table: Predictions, fill_untrained: str | None) -> dict[str, float] | None:
    if fill_untrained is None:
        return None
    if fill_untrained == "prevalence":
        shares = table.metadata.get("prevalence")
        if not shares:
            raise PredictionError("These predictions carry no training prevalence; give a number for --fill-untrained.")
        return {name: float(share) for name, share in shares.items()}
    try:
        share = float(fill_untrained)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--fill-untrained is 'prevalence' or a number in [0, 1], not {fill_untrained!r}.")
    return dict.fromkeys(table.findings, share)
