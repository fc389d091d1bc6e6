"""How the units of an ablation are made: by the programs that are run by hand too, and in the same order of operations.

A head is `hilum fit`, a backbone `hilum pretrain`; predictions are raw; a row is study rule, ensemble, calibrator, each
fitted, where there is anything to fit, on validation as the search head predicts it. Nothing is chosen on test.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hilum.commands import ablate_checkpoint, fit, pretrain
from hilum.commands.ablate_plan import PlannedRow, checkpoint_step
from hilum.commands.ablate_units import MODEL, OUTPUTS, RESULT, RUN, TEST, Unit, Workplace, named
from hilum.core.errors import HilumError
from hilum.core.files import read_json, sha256_file
from hilum.deploy.model_files import SEARCH_NAME, digest_of, read_validation
from hilum.deploy.predictor import load
from hilum.evaluation.ablation import measure, write_result
from hilum.evaluation.calibration import Calibrator, check_out_of_sample, steps_of
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.learned_views import fit_views
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.study_rules import StudyRule


def perform(place: Workplace, unit: Unit) -> None:
    """Make one unit; those that it needs are finished."""
    folder = place.folder(unit)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    extra = _MAKE[unit.kind](place, unit, folder)
    output = folder / OUTPUTS[unit.kind]
    identity = digest_of(output.parent) if unit.kind == "heads" else sha256_file(output)
    place.finish(unit, folder, identity, time.monotonic() - start, **extra)


def row_predictions(place: Workplace, row: PlannedRow, seed: int) -> tuple[Predictions, dict[str, float]]:
    """A row's predictions of the test images, and thresholds of F1 that validation gave at the same stage.

    sigmoid (and flip mean) -> study rule -> ensemble -> calibrator: validation goes the same way as test.
    """
    validation, test, labels = [], [], None
    for head in row.heads:
        held_out, known = read_validation(place.model_path(head, seed))
        keep = np.flatnonzero(np.isin(held_out.dataset, place.resolved.plan.target or held_out.dataset))
        labels = known[keep] if labels is None else labels
        validation.append(held_out.rows(keep))
        test.append(read_predictions(place.folder(Unit("predictions", head, seed)) / TEST))
    assert labels is not None
    if row.study is not None:
        rule = StudyRule.parse(row.study)
        if rule.needs_fit:
            rule = fit_views(combine_members(validation), labels).rule
        validation = [aggregate_studies(one, rule) for one in validation]
        test = [aggregate_studies(one, rule) for one in test]
    ranks = [Ranks.of(one) for one in validation]  # of both sides, or a test image's rank would be among test images
    joined = [
        side[0] if len(side) == 1 else combine_members(side, row.ensemble, ranks=ranks) for side in (validation, test)
    ]
    calibrator = Calibrator.fit(
        joined[0].probabilities, labels, joined[0].findings, place.groups, stage=joined[0].stage,
        unit=joined[0].unit, uids=joined[0].image_uid, steps=steps_of(joined[0]),
    )  # fmt: skip
    calibrator.check_stage(joined[1])
    check_out_of_sample(joined[1], calibrator.fitted_on or {"digests": ""}, f"The thresholds of row {row.name!r}")
    if not row.calibrated:
        return joined[1], {name: cuts["f1"] for name, cuts in calibrator.raw_thresholds.items()}
    return calibrator.apply_to(joined[1]), {name: cuts["f1"] for name, cuts in calibrator.thresholds.items()}


def _labels(place: Workplace, predictions: Predictions) -> np.ndarray:
    position = {uid: index for index, uid in enumerate(place.store.uids.tolist())}
    rows = [position[uid] for uid in predictions.image_uid.tolist()]
    columns = [place.store.findings.index(name) for name in predictions.findings]
    return place.store.labels[rows][:, columns]


def _backbone(place: Workplace, unit: Unit, folder: Path) -> dict[str, Any]:
    backbone = named(place.resolved.plan.backbones, unit.name)
    if backbone.checkpoint_of is not None:
        run = Path(place.backbone_path(backbone.checkpoint_of, unit.seed))
        step = checkpoint_step(place.resolved.pretraining[backbone.checkpoint_of], backbone.at or 0.0)
        ablate_checkpoint.export(run, step, place.store, folder / RUN)
        return {}
    init = None if backbone.init is None else Path(place.backbone_path(backbone.init, unit.seed))
    pretrain.run(place.pretraining(unit), place.data, folder / RUN, init=init)  # goes on where it was
    return {}


def _head(place: Workplace, unit: Unit, folder: Path) -> dict[str, Any]:
    assert unit.seed is not None
    if (folder / MODEL).exists():  # of a killed run; in a folder that nothing else writes
        shutil.rmtree(folder / MODEL)
    chosen = named(place.resolved.plan.heads, unit.name).backbone
    fit.run(place.fitting(unit), place.data, place.backbone_path(chosen, unit.seed), folder / MODEL, place.device)
    choice = read_json(folder / MODEL / SEARCH_NAME, HilumError)["chosen"]
    return {"chosen": {**choice["variant"], **{key: value for key, value in choice.items() if key != "variant"}}}


def _prediction(place: Workplace, unit: Unit, folder: Path) -> dict[str, Any]:
    assert unit.seed is not None
    model, config = load(place.model_path(unit.name, unit.seed), place.device), place.resolved.fitting[unit.name]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    predictions = model.predict_store(place.store, place.test, raw=True, batch_size=config.batch_size)
    write_predictions(predictions, folder / TEST)
    return {}


def _row(place: Workplace, unit: Unit, folder: Path) -> dict[str, Any]:
    assert unit.seed is not None
    plan = place.resolved.plan
    predictions, thresholds = row_predictions(place, named(plan.rows, unit.name), unit.seed)
    write_predictions(predictions, folder / TEST)
    result = measure(predictions, _labels(place, predictions), thresholds, plan.bootstraps, plan.bootstrap_seed)
    write_result(folder / RESULT, result)
    return {
        "thresholds": thresholds,
        "stage": predictions.stage,
        "study": predictions.metadata.get("study_aggregation"),
        "exposed_images": predictions.metadata.get("exposed_images"),
        "exposure_not_recorded": predictions.metadata.get("exposure_not_recorded"),
    }


_MAKE = {"backbones": _backbone, "heads": _head, "predictions": _prediction, "rows": _row}
