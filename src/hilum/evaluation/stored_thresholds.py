"""F1 thresholds for predictions that are judged or submitted: from their own metadata, or from a calibration file.

Taken as they were fixed on validation, and refused where that was on the same items, or at another stage.
"""

from pathlib import Path

from hilum.core.errors import StageError
from hilum.evaluation.calibration import check_out_of_sample, read_calibrator
from hilum.evaluation.predictions import Predictions


def f1_thresholds(table: Predictions, calibration: Path | None) -> dict[str, float] | None:
    """F1 thresholds at the stage of these predictions; None where neither they nor a calibration has any.

    Raises:
        StageError: a calibrator or its thresholds were fitted on these items, at another stage, or are not the ones
            that calibrated these predictions.
    """
    own = table.metadata.get("calibration", {})
    if own.get("fitted_on"):
        check_out_of_sample(table, own["fitted_on"], "The calibrator of these predictions")
    recorded = table.metadata.get("thresholds", {})
    stored = {name: cuts["f1"] for name, cuts in recorded.items() if "f1" in cuts}  # no point must be there
    if calibration is None:
        return stored or None
    calibrator = read_calibrator(calibration)
    if calibrator.fitted_on:
        check_out_of_sample(table, calibrator.fitted_on, str(calibration))
    if table.stage != "calibrated":
        calibrator.check_stage(table)
        return {name: cuts["f1"] for name, cuts in calibrator.raw_thresholds.items()}
    cuts = {name: cuts["f1"] for name, cuts in calibrator.thresholds.items()}
    # fitted on the same items is not enough: another method gives other probabilities, and cuts of those
    if own.get("fitted_on") != calibrator.fitted_on or any(stored.get(n) != cuts.get(n) for n in table.findings):
        raise StageError(f"These predictions were calibrated by something else than {calibration}.")
    return cuts
