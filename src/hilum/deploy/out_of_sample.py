"""Calibrators, thresholds, and whatever else is fitted, from validation predictions of heads that have not seen it.

Used by `fit` for one model and by `ensemble_model.py` for several. The rule is design, not convention: predictions of
a head on images it was trained on are refused, and so are those of the test split.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from hilum.core.errors import StageError
from hilum.deploy.model_files import Calibrators
from hilum.evaluation.calibration import Calibrator, steps_of
from hilum.evaluation.composition import Composition, ranks_of
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.learned_views import LearnedViews, fit_views
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import study_uids
from hilum.pretraining.exposure import uid_numbers

PLAIN = Composition()
"""Means over studies and models, no damping."""


def fit_composition(
    composition: Composition,
    members: Sequence[Predictions],
    labels: Int[np.ndarray, "N C"],
    head_trained_on: Sequence[np.ndarray],
) -> tuple[Composition, LearnedViews | None]:
    """What a composition still lacks, fitted on validation: the weights of `learned`, the ranks of `rank_mean`.

    Args:
        composition: as asked for; one that lacks nothing comes back as it is.
        members: as in `fit_calibrators`.
        labels: as there.
        head_trained_on: as there.

    Returns:
        the composition, and the fit of the views' weights where there was one.

    Raises:
        StageError, PredictionError: as `fit_calibrators`.
    """
    refuse_in_sample(members, head_trained_on)
    views = None
    if composition.study.needs_fit:
        together = members[0] if len(members) == 1 else members[0].replace(combine_members(members).probabilities)
        views = fit_views(together, labels)
        composition = dataclasses.replace(composition, study=views.rule)
    if composition.ensemble == "rank_mean" and len(members) > 1:
        composition = dataclasses.replace(composition, ranks=ranks_of(members, composition.study))
    return composition, views


def fit_calibrators(
    members: Sequence[Predictions],
    labels: Int[np.ndarray, "N C"],
    groups: Mapping[str, str],
    head_trained_on: Sequence[np.ndarray],
    composition: Composition = PLAIN,
) -> Calibrators:
    """Fit a calibrator per image and one per study, at the stage at which each will be applied.

    Args:
        members: raw image predictions on validation, one per model, of the same images.
        labels: codes, rows as those of the first member.
        groups: head, medium or tail per finding.
        head_trained_on: for each member, identities (uint64) of the images that the predicting head was trained on.
        composition: how the members will be put together, complete (`fit_composition`).

    Raises:
        StageError: a member is not raw, is of the test split, or its head was trained on images that it predicts.
        PredictionError: members that do not cover the same images.
    """
    refuse_in_sample(members, head_trained_on)
    first = members[0]
    image, study = composition.apply(members), composition.apply(members, "study")
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
        unit=predictions.unit, uids=predictions.image_uid.tolist(), steps=steps_of(predictions),
    )  # fmt: skip


def refuse_in_sample(members: Sequence[Predictions], head_trained_on: Sequence[np.ndarray]) -> None:
    """Refuse what nothing may be fitted or chosen on.

    Raises:
        StageError: as `fit_calibrators`.
    """
    for predictions, trained_on in zip(members, head_trained_on, strict=True):
        if predictions.stage != "raw" or predictions.unit != "image":
            raise StageError(
                f"Calibrators of a model are fitted on raw image predictions; found stage {predictions.stage!r} per "
                f"{predictions.unit}."
            )
        if predictions.metadata.get("split") == "test":
            raise StageError(
                "Nothing is fitted or chosen on the test split; these predictions say that they are of it."
            )
        seen = int(np.isin(uid_numbers(predictions.image_uid), trained_on).sum())
        if seen:
            raise StageError(
                f"{seen} of {len(predictions)} validation images were in the training data of the head that predicts "
                "them; these predictions are not out of sample. Use the head of the learning-rate search, which has "
                "seen the training split alone."
            )
