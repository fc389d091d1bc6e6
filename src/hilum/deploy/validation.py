"""What a model directory knows of itself from images that its head had not seen: validation predictions, put together
as the model puts images together, beside their labels.

For intervals beside a prediction and for the model card. Fits nothing; `out_of_sample.py` does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from hilum.core.errors import CheckpointError, HilumError, PredictionError, StageError
from hilum.deploy import model_files as files
from hilum.deploy.out_of_sample import labels_of_studies, refuse_in_sample
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.composition import Composition
from hilum.evaluation.fitted_items import are_among
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.score_bands import ScoreBands
from hilum.evaluation.studies import study_uids


class Validation(NamedTuple):
    """Out-of-sample predictions of images or studies, and their labels.

    Args:
        predictions: put together, not calibrated.
        labels: codes, rows and columns as there.
    """

    predictions: Predictions
    labels: Int[np.ndarray, "N C"]


def join_members(
    validations: Sequence[tuple[Predictions, np.ndarray]], paths: Sequence[Path]
) -> tuple[list[Predictions], np.ndarray]:
    """Members' predictions on the same images, and the one set of labels, rows and columns as the first member's.

    Args:
        validations: predictions and labels of each (`model_files.read_validation`).
        paths: of each, for messages.

    Raises:
        PredictionError: members validated on other images, with other labels or findings.
    """
    first, labels = validations[0]
    joined = [first]
    for path, (member, other) in zip(paths[1:], validations[1:], strict=True):
        mine, theirs = set(first.image_uid.tolist()), set(member.image_uid.tolist())
        if mine != theirs:
            raise PredictionError(
                f"{paths[0]} and {path} were not validated on the same images: {len(mine & theirs)} in both, "
                f"{len(mine - theirs)} and {len(theirs - mine)} in one alone. Fit them on the same splits."
            )
        if set(first.findings) != set(member.findings):
            differing = sorted(set(first.findings) ^ set(member.findings))
            raise PredictionError(f"{paths[0]} and {path} have other findings: {', '.join(differing)} in one alone.")
        rows = member.places(first.image_uid)
        columns = column_indices(member.findings, first.findings, str(path))
        if not np.array_equal(other[rows][:, columns], labels):
            raise PredictionError(f"{paths[0]} and {path} have other validation labels for the same images.")
        joined.append(first.replace(member.probabilities[rows][:, columns], **member.metadata))
    return joined, labels


def read_validations(
    path: Path, content: Mapping[str, Any], composition: Composition, unit: str = "study"
) -> list[Validation]:
    """Everything that a directory holds of its validation; nothing where it holds none that is out of sample.

    One table, or where findings were added on other images, one for each head.

    Args:
        path: MODEL or ensemble directory.
        content: of its `config.json`.
        composition: how it puts predictions together.
        unit: image or study.
    """
    found = []
    for members, labels, trained_on in _parts(path, content):
        if composition.damping is not None and len(members[0].findings) < len(content["findings"]):
            continue  # damping looks at a finding of another table
        try:
            refuse_in_sample(members, trained_on)
            predictions = composition.apply(members, unit)
        except (StageError, PredictionError):
            continue
        if unit == "study":
            first = members[0]
            of_image = study_uids(first.dataset, first.patient_id, first.study_id, first.image_uid)
            labels = labels_of_studies(labels, of_image, predictions.image_uid)
        found.append(Validation(predictions, labels))
    return found


def read_bands(
    path: Path, content: Mapping[str, Any], composition: Composition, calibrator: Calibrator, calibrated: bool = True
) -> ScoreBands:
    """What scores of this model meant on validation.

    Args:
        path: as in `read_validations`.
        content: as there.
        composition: as there.
        calibrator: of the model, for the unit that is asked about.
        calibrated: whether the scores that will be asked about are.

    Returns:
        bands of the findings that have them. None where the calibrator was fitted on other items than the directory
        holds: what those scores meant elsewhere is not what they mean where it was recalibrated.
    """
    bands: dict[str, Any] = {}
    for predictions, labels in read_validations(path, content, composition, calibrator.unit):
        if not calibrator.fitted_on or not are_among(predictions.image_uid.tolist(), calibrator.fitted_on):
            continue
        try:
            scores = calibrator.apply_to(predictions) if calibrated else predictions
        except (StageError, PredictionError):
            continue
        bands |= ScoreBands.of(scores, labels).findings
    elsewhere = (content.get("recalibrated") or {}).get("elsewhere", ())
    return ScoreBands({name: band for name, band in bands.items() if name not in elsewhere})


_Part = tuple[list[Predictions], np.ndarray, list[np.ndarray]]
"""Members' raw image predictions, the labels, and the images that each head was trained on."""


def _parts(path: Path, content: Mapping[str, Any]) -> list[_Part]:
    try:
        if content["format"] == files.ENSEMBLE_FORMAT:
            folders = [_folder(path, number, member) for number, member in enumerate(content["members"], 1)]
            members, labels = join_members([files.read_validation(folder) for folder in folders], folders)
            trained_on = [files.read_exposure(folder, files.read_config(folder)).train for folder in folders]
            return [(members, labels, trained_on)]
        trained = files.read_exposure(path, content).train
    except HilumError:
        return []
    return [([predictions], labels, [trained]) for predictions, labels in _tables(path, content)]


def _folder(path: Path, number: int, member: Mapping[str, Any]) -> Path:
    """Where a member is: where the ensemble says, or in an export of it; it has to be the same one.

    Raises:
        CheckpointError: it is in neither.
    """
    for folder in (path / member["path"], path / f"member_{number}"):
        if (folder / files.CONFIG_NAME).is_file() and files.digest_of(folder) == member["digest"]:
            return folder
    raise CheckpointError(f"{path}: the member {member['path']} is not there, or is another one.")


def _tables(path: Path, content: Mapping[str, Any]) -> list[tuple[Predictions, np.ndarray]]:
    """Validation of the first head and of those that were added, side by side where they are of the same images."""
    extensions = content.get("extensions", ())
    tables: list[tuple[Predictions, np.ndarray]] = []
    for number in (None, *(n for n, extension in enumerate(extensions) if not extension["zero_shot"])):
        try:
            added, labels = files.read_validation_of(path, number)
        except PredictionError:
            continue
        same = [n for n, (one, _) in enumerate(tables) if set(one.image_uid.tolist()) == set(added.image_uid.tolist())]
        if not same:
            tables.append((added, labels))
            continue
        first, known = tables[same[0]]
        rows = added.places(first.image_uid)
        values = np.concatenate([first.probabilities, added.probabilities[rows]], axis=1)
        joined = dataclasses.replace(first, findings=first.findings + added.findings, probabilities=values)
        tables[same[0]] = (joined, np.concatenate([known, labels[rows]], axis=1))
    return tables
