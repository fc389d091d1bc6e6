"""The labelled studies of a site for `hilum recalibrate`: read, predicted without calibration, joined by id."""

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from hilum.core.errors import PredictionError, StageError
from hilum.core.tracking import progress
from hilum.deploy.admission import Gate, RawReading
from hilum.deploy.inputs import Inputs
from hilum.deploy.network import store_identity
from hilum.deploy.out_of_sample import labels_of_studies
from hilum.deploy.predictor import Model
from hilum.evaluation.calibration import check_out_of_sample
from hilum.evaluation.joining import join, labelled
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import study_uids
from hilum.evaluation.truth import Truth

READING_THREADS = 2


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


def read_site(model: Model, found: Inputs, truth: Truth, batch_size: int) -> Site:
    """Predict every study that has a label, or an image that has one, and put labels beside images and studies.

    Studies are predicted whole, as `hilum predict` will: where labels are by image, those of a study that have none are
    read too, and are unknown.

    Args:
        model: whose raw predictions are asked for.
        found: the inputs; what cannot be read is added to their `refused`.
        truth: labels, by image or by study.
        batch_size: images at a time.

    Raises:
        PredictionError: no image that could be read has a label, or ids that cannot be joined.
        StageError: labels of a test split.
        PreprocessingMismatchError: a store of another recipe.
        EmptyStudyError: no image could be read.
    """
    identity = store_identity(found.store, found.indices) if found.store else found.identity()
    indices = found.indices if found.store else np.arange(len(found.images))
    known = labelled(truth, _table(identity))
    studies = _studies(identity)
    whole = np.isin(studies, studies[known])
    left_out = {"unlabelled images": int((~whole).sum())}
    if not known.any():
        raise PredictionError(
            f"None of {len(known)} images has a row in {truth.source}. Labels are joined by image_uid, image_id or "
            "study_id; image_id is the SOP instance UID of DICOM, else the path within the folder that was named."
        )
    chosen = np.flatnonzero(whole)
    identity = {name: column[chosen] for name, column in identity.items()}
    with progress("predict", len(chosen), "images") as bar:
        reading = _read(model, found, identity, indices[chosen], batch_size, bar.advance)
    left_out |= Counter(one.reason for one in found.refused)
    left_out |= Counter(one.flag.code for one in reading.flagged if not one.scored)
    pictures = found.store.pictures[indices[chosen]] if found.store else None
    image = model.assemble(identity, reading, raw=True, unit="image", pictures=pictures)
    study = model.assemble(identity, reading, raw=True, unit="study", pictures=pictures)
    rows = {name: np.asarray(column)[reading.kept] for name, column in identity.items()}
    has = known[chosen][reading.kept]
    if not has.any():
        raise PredictionError(f"None of the images that have a row in {truth.source} could be read.")
    joined = join(truth, _table({name: column[has] for name, column in rows.items()}))
    if "test" in joined.splits.tolist():
        raise StageError(f"{truth.source}: nothing is fitted on the test split. Leave it for judging the result.")
    codes = np.full((len(image), len(image.findings)), -1, np.int8)
    for column, name in enumerate(image.findings):
        if name in joined.findings:
            codes[has, column] = joined.labels[:, joined.findings.index(name)]
    of_image = _studies(rows)
    whose = dict(zip(of_image.tolist(), rows["patient_id"].tolist(), strict=True))
    whose |= dict(zip(of_image[has].tolist(), joined.predictions.patient_id.tolist(), strict=True))
    members = [
        dataclasses.replace(image, findings=network.findings, probabilities=values, metadata={})
        for network, values in zip(model.networks, reading.probabilities, strict=True)
    ]
    return Site(
        {
            "image": dataclasses.replace(image, patient_id=np.array([whose[uid] for uid in of_image.tolist()])),
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
        return model.read_store(found.store, indices, batch_size, READING_THREADS, done)
    read = found.reader(model.short_side, model.preprocess_id)
    gate = Gate(model.screening)
    return model.read_images(identity, indices, read, batch_size, READING_THREADS, done, gate)


def _studies(identity: dict[str, np.ndarray]) -> np.ndarray:
    return study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))


def _table(identity: dict[str, Any]) -> Predictions:
    """Images without predictions, to be joined with labels."""
    return Predictions(**identity, findings=("-",), probabilities=np.zeros((len(identity["image_uid"]), 1)))


def _overlap(model: Model, image: Predictions, study: Predictions) -> str:
    for unit, table in (("image", image), ("study", study)):
        if fitted_on := model.calibrators[unit].fitted_on:
            try:
                check_out_of_sample(table, fitted_on, "The model's calibrator")
            except StageError as error:
                return str(error)
    return ""
