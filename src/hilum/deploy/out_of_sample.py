"""Calibrators and thresholds from validation predictions of a head that has not seen validation.

Used by `fit` for one model and by `ensemble_model.py` for several. The rule is design, not convention: predictions of
a head on images it was trained on are refused.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from hilum.core.errors import StageError
from hilum.deploy.model_files import Calibrators
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.ensemble import mean_over_models
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import mean_over_studies, study_uids
from hilum.pretraining.exposure import uid_numbers


def fit_calibrators(
    members: Sequence[Predictions],
    labels: Int[np.ndarray, "N C"],
    groups: Mapping[str, str],
    head_trained_on: Sequence[np.ndarray],
) -> Calibrators:
    """Fit a calibrator per image and one per study, at the stage at which each will be applied.

    Args:
        members: raw image predictions on validation, one per model, of the same images.
        labels: codes, rows as those of the first member.
        groups: head, medium or tail per finding.
        head_trained_on: for each member, identities (uint64) of the images that the predicting head was trained on.

    Raises:
        StageError: a member is not raw, or its head was trained on images that it predicts.
        PredictionError: members that do not cover the same images.
    """
    for member, trained_on in zip(members, head_trained_on, strict=True):
        _refuse_in_sample(member, trained_on)
    studies = [mean_over_studies(member, unit="study") for member in members]
    first = members[0]
    image = first if len(members) == 1 else mean_over_models(members)
    study = studies[0] if len(members) == 1 else mean_over_models(studies)
    of_image = study_uids(first.dataset, first.patient_id, first.study_id, first.image_uid)
    study_labels = labels_of_studies(labels, of_image, study.image_uid)
    return {"image": _fit(image, labels, groups), "study": _fit(study, study_labels, groups)}


def labels_of_studies(
    labels: Int[np.ndarray, "N C"], study_of_image: np.ndarray, studies: np.ndarray
) -> Int[np.ndarray, "S C"]:
    """A study's label is positive if any image's is, negative if any is known and none positive, else unknown."""
    order = np.argsort(study_of_image, kind="stable")
    names, starts = np.unique(study_of_image[order], return_index=True)
    merged = np.maximum.reduceat(labels[order], starts, axis=0)  # 1 > 0 > -1 unknown > -2 uncertain
    return merged[np.searchsorted(names, studies)]


def _fit(predictions: Predictions, labels: np.ndarray, groups: Mapping[str, str]) -> Calibrator:
    return Calibrator.fit(
        predictions.probabilities, labels, predictions.findings, groups=groups, stage=predictions.stage,
        unit=predictions.unit, uids=predictions.image_uid.tolist(),
    )  # fmt: skip


def _refuse_in_sample(predictions: Predictions, trained_on: np.ndarray) -> None:
    if predictions.stage != "raw" or predictions.unit != "image":
        raise StageError(
            f"Calibrators of a model are fitted on raw image predictions; found stage {predictions.stage!r} per "
            f"{predictions.unit}."
        )
    seen = int(np.isin(uid_numbers(predictions.image_uid), trained_on).sum())
    if seen:
        raise StageError(
            f"{seen} of {len(predictions)} validation images were in the training data of the head that predicts them; "
            "these predictions are not out of sample. Use the head of the learning-rate search, which has seen the "
            "training split alone."
        )
