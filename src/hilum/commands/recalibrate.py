"""`hilum recalibrate`: a model and a few hundred labelled studies of a site in; a model for that site, and a report.

Predicts, joins the labels, fits on top of the old calibrators, judges out of sample by patient, and writes a whole new
model with `site_report.html` and `site_report.json`. The old one is only read.
"""

import dataclasses
import difflib
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hilum
from hilum.core.errors import (
    ImageError,
    LeakageError,
    PredictionError,
    PreprocessingMismatchError,
    StageError,
    UnknownNameError,
)
from hilum.core.files import sha256_file, write_json
from hilum.core.tracking import next_step, progress, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.images import read_image
from hilum.deploy import model_files as files
from hilum.deploy.admission import Gate, RawReading
from hilum.deploy.inputs import DATASET, Inputs, Refused, resolve
from hilum.deploy.network import store_identity
from hilum.deploy.out_of_sample import labels_of_studies
from hilum.deploy.predictor import Model, load
from hilum.deploy.site_model import NUMBERS_NAME, REPORT_NAME, write_site_model
from hilum.deploy.validation import read_validations
from hilum.evaluation.calibration import Calibrator, check_out_of_sample, fingerprint
from hilum.evaluation.curves import curves
from hilum.evaluation.joining import join, labelled
from hilum.evaluation.map_choice import FOLDS, compare
from hilum.evaluation.predictions import Predictions, bare_ids
from hilum.evaluation.recalibration import CrossFitted, cross_fit_site, recalibrate
from hilum.evaluation.site_judgement import Rules, discrimination, drift_of, judge_site
from hilum.evaluation.site_report import write_site_report
from hilum.evaluation.studies import study_uids
from hilum.evaluation.thresholds import operating_point, point_name
from hilum.evaluation.truth import Truth, read_truth

FORMAT = "hilum-site-1"
READING_THREADS = 2
CARD_RESAMPLES = 300
"""Of a model's validation, which can be a hundred times as large as a site's studies."""


class Site(NamedTuple):
    """Labelled studies of a site as the model sees them, not calibrated.

    Args:
        tables: by unit (image, study); patients are those of the labels where these say.
        labels: by unit, codes, rows and columns as in the tables.
        members: raw predictions of each network, per image.
        left_out: counts, by reason.
        exposed: images that the model has met; None where that is not known.
        overlap: that the old calibrator was fitted on some of them, in words; empty: it was not.
    """

    tables: dict[str, Predictions]
    labels: dict[str, np.ndarray]
    members: list[Predictions]
    left_out: dict[str, int]
    exposed: int | None
    overlap: str


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
        ConfigError: options that mean nothing, or `out` is taken.
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
    files.require_new(out)
    content = files.read_config(model)
    loaded, truth = load(model, device), read_truth(labels)
    _check_findings(loaded, truth, finding)
    site = _read_site(loaded, resolve(inputs), truth, batch_size)
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


def _read_site(model: Model, found: Inputs, truth: Truth, batch_size: int) -> Site:
    identity = store_identity(found.store, found.indices) if found.store else found.identity()
    indices = found.indices if found.store else np.arange(len(found.images))
    patients = _patients(identity, truth)
    known = labelled(truth, _table(identity, patients))
    left_out = {"unlabelled images": int((~known).sum())}
    if not known.any():
        raise PredictionError(
            f"None of {len(known)} images has a row in {truth.source}. Labels are joined by image_uid, image_id or "
            "study_id; image_id is the SOP instance UID of DICOM, else the path within the folder that was named."
        )
    chosen = np.flatnonzero(known)
    identity = {name: column[chosen] for name, column in identity.items()}
    with progress("predict", len(chosen), "images") as bar:
        reading = _read(model, found, identity, indices[chosen], batch_size, bar.advance)
    left_out |= Counter(one.reason for one in found.refused)
    left_out |= Counter(one.flag.code for one in reading.flagged if not one.scored)
    pictures = found.store.pictures[indices[chosen]] if found.store else None
    image = model.assemble(identity, reading, raw=True, unit="image", pictures=pictures)
    study = model.assemble(identity, reading, raw=True, unit="study", pictures=pictures)
    rows = {name: np.asarray(column)[reading.kept] for name, column in identity.items()}
    joined = join(truth, _table(rows, patients[chosen][reading.kept]))
    if "test" in joined.splits.tolist():
        raise StageError(f"{truth.source}: nothing is fitted on the test split. Leave it for judging the result.")
    codes = np.full((len(image), len(image.findings)), -1, np.int8)
    for column, name in enumerate(image.findings):
        if name in joined.findings:
            codes[:, column] = joined.labels[:, joined.findings.index(name)]
    of_image = study_uids(image.dataset, image.patient_id, image.study_id, image.image_uid)
    whose = dict(zip(of_image.tolist(), joined.predictions.patient_id.tolist(), strict=True))
    members = [
        dataclasses.replace(image, findings=network.findings, probabilities=values, metadata={})
        for network, values in zip(model.networks, reading.probabilities, strict=True)
    ]
    return Site(
        {
            "image": dataclasses.replace(image, patient_id=joined.predictions.patient_id),
            "study": dataclasses.replace(study, patient_id=np.array([whose[uid] for uid in study.image_uid.tolist()])),
        },
        {"image": codes, "study": labels_of_studies(codes, of_image, study.image_uid)},
        members,
        {reason: count for reason, count in left_out.items() if count},
        int(image.metadata["exposed_images"]) if found.store else None,
        _overlap(model, image, study),
    )


def _read(
    model: Model, found: Inputs, identity: dict[str, np.ndarray], indices: np.ndarray, batch_size: int, done: Any
) -> RawReading:
    if found.store:
        if found.store.preprocess_id != model.preprocess_id:
            raise PreprocessingMismatchError(
                f"{found.store.path} was built for preprocessing {found.store.preprocess_id!r}, this model needs "
                f"{model.preprocess_id!r}. Build it again with --intensity {model.preprocess_id}, or name the files."
            )
        return model.read_images(identity, indices, found.store.read, batch_size, READING_THREADS, done)
    lock = threading.Lock()

    def read(index: int) -> np.ndarray | None:
        path = found.images[index].path
        try:
            return read_image(path, path.name, model.short_side, recipe=model.preprocess_id).pixels
        except ImageError as error:
            with lock:
                found.refused.append(Refused(path, error.reason, str(error)))
            return None

    gate = Gate(model.screening)
    return model.read_images(identity, indices, read, batch_size, READING_THREADS, done, gate)


def _table(identity: dict[str, np.ndarray], patients: np.ndarray) -> Predictions:
    """Images without predictions, to be joined with labels."""
    rows: dict[str, Any] = {**identity, "patient_id": patients}
    return Predictions(**rows, findings=("-",), probabilities=np.zeros((len(patients), 1)))


def _patients(identity: dict[str, np.ndarray], truth: Truth) -> np.ndarray:
    """Whose each image is. Files that do not say (their patient is their study) take it from the labels."""
    patients = np.asarray(identity["patient_id"]).astype(object)
    unknown = (identity["dataset"] == DATASET) & (identity["patient_id"] == identity["study_id"])
    for name in ("study_id", "image_id", "image_uid"):
        keys = bare_ids(getattr(truth, name), truth.dataset)
        told = {key: patient for key, patient in zip(keys.tolist(), truth.patient_id.tolist(), strict=True) if patient}
        told.pop("", None)
        for row in np.flatnonzero(unknown):
            patients[row] = told.get(str(identity[name][row]), patients[row])
    return patients.astype(str)


def _overlap(model: Model, image: Predictions, study: Predictions) -> str:
    for unit, table in (("image", image), ("study", study)):
        if fitted_on := model.calibrators[unit].fitted_on:
            try:
                check_out_of_sample(table, fitted_on, "The model's calibrator")
            except StageError as error:
                return str(error)
    return ""


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
