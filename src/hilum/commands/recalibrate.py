"""`hilum recalibrate`: a model and a few hundred labelled studies of a site in; a model for that site, and a report.

Predicts, joins the labels, fits on top of the old calibrators, judges out of sample by patient, and writes a whole new
model with `site_report.html` and `site_report.json`. The old one is only read.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hilum
from hilum.commands.recalibrate_inputs import Site, read_site
from hilum.core.errors import ConfigError, LeakageError, PredictionError, StageError, UnknownNameError
from hilum.core.files import sha256_file, write_json
from hilum.core.tracking import next_step, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.engines import read_export
from hilum.deploy.inputs import resolve
from hilum.deploy.predictor import Model, load
from hilum.deploy.site_model import NUMBERS_NAME, REPORT_NAME, write_site_model
from hilum.deploy.validation import read_validations
from hilum.evaluation.calibration import Calibrator, fingerprint
from hilum.evaluation.curves import curves
from hilum.evaluation.map_choice import FOLDS, compare
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.recalibration import CrossFitted, cross_fit_site, recalibrate
from hilum.evaluation.site_judgement import Rules, discrimination, drift_of, judge_site
from hilum.evaluation.site_report import write_site_report
from hilum.evaluation.thresholds import operating_point, point_name
from hilum.evaluation.truth import Truth, read_truth

FORMAT = "hilum-site-1"
CARD_RESAMPLES = 300
"""Of a model's validation, which can be a hundred times as large as a site's studies."""


def run(
    model: Path,
    inputs: list[str],
    labels: Path,
    out: Path,
    sensitivity: Sequence[float] = (),
    specificity: Sequence[float] = (),
    point: Sequence[str] = (),
    finding: Sequence[str] = (),
    minimum_auc: float = 0.70,
    width: float = 0.10,
    accept_exposed: bool = False,
    keep_cases: bool = False,
    bootstraps: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """Write a model for the site and its report; returns what `site_report.json` holds.

    Args:
        model: MODEL or ensemble directory.
        inputs: as `hilum predict` takes them.
        labels: a CSV with an id column, a manifest or a store.
        out: a new folder.
        sensitivity: operating points: the specificity at each of these sensitivities.
        specificity: operating points: the sensitivity at each of these specificities.
        point: operating points by name: f1, youden.
        finding: that are asked about; none: all with enough studies.
        minimum_auc: the least useful one.
        width: of the intervals that further studies are counted for.
        accept_exposed: take images that the model has met; nothing is called fit then.
        keep_cases: keep predictions and labels of the site's images, with their ids, in the new model: intervals beside
            its predictions need them.
        bootstraps: resamples of patients.
        seed: of the resamples.
        batch_size: images at a time.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: options that mean nothing, `out` is taken, or an EXPORT in place of a MODEL.
        LeakageError: the model has met some of the images.
        StageError: its calibrators were fitted on some of them, or they are of a test split.
        PredictionError: labels that cannot be joined, or fewer than five patients.
        CheckpointError: the model is incomplete or damaged.
    """
    asked = [point_name("spec_at_sens", one) for one in sensitivity]
    asked += [point_name("sens_at_spec", one) for one in specificity]
    for name in point:
        operating_point(name)
    points = tuple(dict.fromkeys((*asked, *point))) or ("f1",)
    rules = Rules(points, tuple(asked), minimum_auc, width, tuple(finding))
    if bootstraps < 0 or batch_size < 1:
        raise ConfigError(
            f"--bootstraps, --batch-size: expected 0 or more, and at least 1; found {bootstraps} and {batch_size}."
        )
    files.require_new(out)
    if read_export(model) is not None:
        raise ConfigError(
            f"{model} is an EXPORT: recalibrate the MODEL that it was made from, and export the result. "
            "hilum recalibrate MODEL STUDIES --labels LABELS --out HERE, then hilum export HERE --out EXPORT."
        )
    content = files.read_config(model)
    loaded, truth = load(model, device), read_truth(labels)
    _check_findings(loaded, truth, finding)
    site = read_site(loaded, resolve(inputs), truth, batch_size)
    _refuse_met(site, accept_exposed)

    groups = loaded.groups
    old: dict[str, Calibrator | None] = {
        unit: None if loaded.reservations.uncalibrated else loaded.calibrators[unit] for unit in site.tables
    }
    study, codes = site.tables["study"], site.labels["study"]
    say(f"{len(study)} labelled studies; fitting in {FOLDS} folds of patients")
    after = cross_fit_site(old["study"], study, codes, groups, points)
    new = {unit: recalibrate(old[unit], table, site.labels[unit], groups, points)
           for unit, table in site.tables.items()}  # fmt: skip
    before = study if old["study"] is None else old["study"].apply_to(study)
    judged = compare(before.probabilities, after.probabilities, codes, study.findings)
    new["study"] = dataclasses.replace(new["study"], cross_fitted={"folds": FOLDS, **judged})

    card, drift = _elsewhere(model, content, loaded, study, min(bootstraps, CARD_RESAMPLES), seed)
    met = (site.exposed or 0) + (1 if site.overlap else 0)
    result = judge_site(
        study, before, after, codes, new["study"], rules, card, drift, met, bootstraps, seed
    )  # fmt: skip
    facts = {
        "model": loaded.digest, "labels": {"file": labels.name, "sha256": _digest(labels)},
        "images": len(site.tables["image"]), "left_out": site.left_out,
        "exposed_images": site.exposed, "overlap": site.overlap or None,
        "exposure_not_recorded": loaded.reservations.not_recorded or None,
        "was_calibrated": not loaded.reservations.uncalibrated,
        "uids_sha256": fingerprint(site.tables["image"].image_uid.tolist()),
    }  # fmt: skip
    result = {"format": FORMAT, "hilum": hilum.__version__, "notice": RESEARCH_NOTICE, **facts, **result}
    folders = write_site_model(
        model, out, new,
        {"split": "site", "images": facts["images"], "studies": len(study), "uids_sha256": facts["uids_sha256"]},
        {key: result[key] for key in ("labels", "images", "studies", "patients", "left_out", "exposed_images", "rules",
                                      "overall", "was_calibrated")},
    )  # fmt: skip
    if keep_cases:
        _keep_cases(folders, site)
    write_json(out / NUMBERS_NAME, result)
    _write_page(out / REPORT_NAME, result, study, before, after, codes)
    _report(out, result)
    return result


def _check_findings(model: Model, truth: Truth, asked: Sequence[str]) -> None:
    """A site may label other findings than the model has, and fewer; a misspelt column is told, not lost in silence."""
    for name in asked:
        if name not in model.findings:
            raise UnknownNameError("finding", name, model.findings)
    strangers = [name for name in truth.findings if name not in model.findings]
    hints = [(name, difflib.get_close_matches(name, model.findings, n=1, cutoff=0.6)) for name in strangers]
    listed = ", ".join(f"{name!r}" + (f" (nearest: {near[0]!r})" if near else "") for name, near in hints)
    if len(strangers) == len(truth.findings):
        raise PredictionError(f"{truth.source}: none of its columns is a finding of this model: {listed}.")
    if strangers:
        warn(f"{truth.source}: not findings of this model, and left out: {listed}")


def _refuse_met(site: Site, accepted: bool) -> None:
    if accepted:
        return
    if site.overlap:
        raise StageError(f"{site.overlap} Or say --accept-exposed: nothing is called fit then.")
    if site.exposed:
        raise LeakageError(
            f"The model has met {site.exposed} of these images in pretraining or training, or all of their dataset; "
            "what it does on them says nothing of a site. Take others, or say --accept-exposed: nothing is called fit "
            "then."
        )


def _elsewhere(
    path: Path, content: dict[str, Any], model: Model, study: Predictions, bootstraps: int, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """What the model's own validation says of each finding, and how far the scores here are from those there."""
    card: dict[str, dict[str, Any]] = {}
    drift: dict[str, dict[str, float]] = {}
    for validation in read_validations(path, content, model.composition):
        there = validation.predictions
        card |= discrimination(there, validation.labels, bootstraps, seed)
        for column, name in enumerate(there.findings):
            if name in study.findings and there.trained[column]:
                here = study.probabilities[:, study.findings.index(name)]
                drift[name] = drift_of(here, there.probabilities[:, column])
    return card, drift


def _keep_cases(folders: Sequence[Path], site: Site) -> None:
    """The site's images in place of the validation that came with each network."""
    for folder, member in zip(folders, site.members, strict=True):
        if files.read_config(folder).get("extensions"):
            warn(f"{folder}: cases are not kept for a model that was extended")
            continue
        for name in (files.LOGITS_NAME, files.LABELS_NAME):
            (folder / name).unlink(missing_ok=True)  # a link to the old model's
        columns = [site.tables["image"].findings.index(name) for name in member.findings]
        files.write_validation(folder, member, site.labels["image"][:, columns])


def _digest(labels: Path) -> str:
    return sha256_file(labels / "index.npz" if labels.is_dir() else labels)


def _write_page(
    path: Path, result: dict[str, Any], study: Predictions, before: Predictions, after: CrossFitted, codes: np.ndarray
) -> None:
    names = study.findings
    write_site_report(
        path, result, curves(after.probabilities, codes, names), curves(before.probabilities, codes, names)
    )


def _report(out: Path, result: dict[str, Any]) -> None:
    overall, left_out = result["overall"], result["left_out"]
    if left_out:
        warn("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    if result["exposed_images"] or result["overlap"]:
        warn("the model has met some of these images: nothing is called fit")
    for word in ("yes", "not_shown", "no"):
        if overall[word]:
            say(f"{word.replace('_', ' ')}: {', '.join(overall[word])}")
    if overall["not_judged"]:
        say(f"too few studies to judge: {len(overall['not_judged'])} findings")
    say(f"{out}: fit for this site: {overall['verdict']}. {out / REPORT_NAME} says why")
    next_step(f"hilum predict {out} STUDIES --study own --out findings.csv")
