"""`hilum calibrate`: fit calibrators and operating points on validation predictions, or apply them to others.

Fitting needs predictions of a head that was not trained on the split it is fitted on; files that say otherwise are
refused, and so is the test split.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hilum.core.errors import ConfigError, PredictionError, StageError
from hilum.core.tracking import next_step, say, warn
from hilum.evaluation.bootstrap import clusters_of
from hilum.evaluation.calibration import Calibrator, read_calibrator, steps_of, write_calibrator
from hilum.evaluation.joining import join, match_findings
from hilum.evaluation.map_choice import FOLDS
from hilum.evaluation.predictions import read_predictions, write_predictions
from hilum.evaluation.thresholds import point_name
from hilum.evaluation.truth import read_truth, split_name

VALIDATION = "val"
"""The split that is fitted on where nobody says another."""


def run(
    predictions: Path,
    labels: Path | None = None,
    split: str | None = None,
    out: Path = Path("calibration.json"),
    method: str = "auto",
    use: Path | None = None,
    sensitivity: Sequence[float] = (),
    specificity: Sequence[float] = (),
) -> None:
    """Fit on `labels` and write a calibrator, or with `use` apply one and write predictions.

    Args:
        predictions: raw, study or ensemble predictions; the stage at which the calibrator will be used.
        labels: a store, a manifest or a CSV.
        split: the split to fit on; None: val, where the labels have splits, else every item.
        out: JSON of the calibrator; with `use`, a prediction file.
        method: "auto", "cross_fitted" or a name in CALIBRATORS.
        use: a calibrator to apply.
        sensitivity: more operating points: the specificity at each of these sensitivities, such as 0.9.
        specificity: more operating points: the sensitivity at each of these specificities.

    Raises:
        ConfigError: neither or both of `labels` and `use`, or `use` with what belongs to a fit.
        PredictionError: a split of labels that have none; ids that cannot be joined.
        StageError: the test split, a split that the head was trained on, calibrated input, another stage.
    """
    if (labels is None) == (use is None):
        raise ConfigError("Say --labels FILE to fit a calibration, or --use CALIBRATION to apply one.")
    if use is not None:
        if method != "auto" or split is not None or sensitivity or specificity:
            raise ConfigError(
                "--use applies what was fitted: --split, --method, --sensitivity and --specificity do not go with it."
            )
        calibrated = read_calibrator(use).apply_to(read_predictions(predictions))
        write_predictions(calibrated, out)
        before = calibrated.metadata["calibrated_from"]
        say(f"{out}: {len(calibrated)} {calibrated.unit} rows, calibrated from stage {before}")
        next_step(f"hilum evaluate {out} --labels STORE --out evaluation")
        return
    assert labels is not None
    points = [point_name("spec_at_sens", share) for share in sensitivity]
    points += [point_name("sens_at_spec", share) for share in specificity]
    calibrator = fit(predictions, labels, split, method, points)
    write_calibrator(calibrator, out)
    kinds = Counter(one["flag"] or one["kind"] for one in calibrator.maps.values() if one)
    items = calibrator.fitted_on["items"] if calibrator.fitted_on else 0
    say(
        f"{out}: fitted on {items} items ({calibrator.unit}) at stage {calibrator.stage}: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    )
    if calibrator.cross_fitted:
        changes = [f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in _macro(calibrator).items()]
        say(f"On patients left out of the fit ({FOLDS} folds): {', '.join(changes)}")
    next_step(f"hilum calibrate TEST_PREDICTIONS --use {out} --out calibrated.parquet")


def _macro(calibrator: Calibrator) -> dict[str, list[float]]:
    judged = calibrator.cross_fitted or {}
    return dict(judged.get("macro", {}))


def fit(
    predictions: Path, labels: Path, split: str | None = None, method: str = "auto", points: Sequence[str] = ()
) -> Calibrator:
    """A calibrator from a prediction file and the labels of one split, judged on patients left out of the fit."""
    asked, split = split, split_name(split or VALIDATION)
    if split == "test":
        raise StageError("Nothing is fitted on the test split. Predict the validation split and fit there.")
    table, truth = read_predictions(predictions), read_truth(labels)
    if asked is not None and not truth.has_splits:
        raise PredictionError(f"{labels} does not say which split an item is in; leave out --split.")
    if table.metadata.get("split") == "test":
        raise StageError(
            f"{predictions} says that it is of the test split: nothing is fitted on it. Predict validation."
        )
    if split == "train" and truth.has_splits and not table.metadata.get("head_splits"):
        raise StageError(
            f"{predictions} does not say on which splits its head was trained, and split 'train' is what heads are "
            "trained on. Predict the validation split and fit there."
        )
    seen = [one for one in (split, table.metadata.get("split")) if one in table.metadata.get("head_splits", ())]
    if seen:
        raise StageError(
            f"{predictions} comes from a head that was trained on split {seen[0]!r}: its predictions there are not "
            "out of sample. Use the model's validation_logits.parquet, or a head trained on the training split alone."
        )
    if not truth.has_splits:
        warn(f"{labels} does not say which split an item is in: every predicted item is used.")
    joined = join(truth, table, split if truth.has_splits else None)
    _, only = match_findings(table.findings, truth.findings, None, str(labels))
    if only["unlabelled"]:
        warn(f"no labels for {', '.join(only['unlabelled'])}: they get the parameters of their group.")
    joined = joined.select(table.findings)
    patients = clusters_of(joined.predictions)
    enough = len(set(patients.tolist())) >= FOLDS
    if not enough:
        warn(f"fewer than {FOLDS} patients: these maps are not judged on patients left out of their fit.")
    return Calibrator.fit(
        joined.predictions.probabilities,
        joined.labels,
        table.findings,
        groups=table.metadata.get("groups") or truth.groups(),
        method=method,
        stage=table.stage,
        unit=table.unit,
        uids=joined.predictions.image_uid.tolist(),
        patients=patients.tolist() if enough else None,
        points=points,
        steps=steps_of(table),
    )
