"""Several MODEL directories as one: a directory that names them and owns calibrators of their mean.

The calibrators are fitted on the members' own out-of-sample validation predictions, image by image: nothing is
predicted again, and nothing of a test set is looked at.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hilum
from hilum.core.errors import ConfigError, PredictionError, PreprocessingMismatchError
from hilum.core.files import write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.out_of_sample import fit_calibrators
from hilum.evaluation.predictions import Predictions, column_indices

RULES = {"mean"}


def combine_models(paths: Sequence[Path], out: Path, study: str = "mean") -> Path:
    """Write an ensemble: mean over the images of a study, then over models, then calibrators fitted at that stage.

    Args:
        paths: two or more MODEL directories that were validated on the same images.
        out: a new directory; members are named relative to it.
        study: rule for the images of a study.

    Returns:
        `out`.

    Raises:
        ConfigError: fewer than two members, one of them twice, or `out` is taken.
        CheckpointError: not a model, damaged, or itself an ensemble.
        PreprocessingMismatchError: members that read images by different recipes.
        PredictionError: members validated on other images, with other labels or findings.
        StageError: validation predictions that are not out of sample.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    if study not in RULES:
        raise ConfigError(f"Studies are aggregated by {', '.join(sorted(RULES))}; found {study!r}.")
    contents = [files.read_config(path) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        if content["format"] != files.MODEL_FORMAT:
            raise ConfigError(f"{path} is itself an ensemble; name its members instead.")
    recipes = sorted({str(content["preprocessing"]["id"]) for content in contents})
    if len(recipes) > 1:
        raise PreprocessingMismatchError(
            f"An ensemble reads each image once, and these models were trained with {' and '.join(recipes)}. Predict "
            "with each of them, and combine the prediction files."
        )
    digests = [files.digest_of(path) for path in paths]
    if len(set(digests)) < 2 or len(set(digests)) < len(digests):
        raise ConfigError(f"An ensemble needs two or more different models, found {', '.join(map(str, paths))}.")
    files.require_new(out)

    members, labels = _join([files.read_validation(path) for path in paths], paths)
    trained_on = [
        files.read_exposure(path, content).train for path, content in zip(paths, contents, strict=True)
    ]  # the search head saw the training split alone; this is the rule that `fit` recorded
    groups = {finding["name"]: finding["group"] for finding in contents[0]["findings"]}
    calibrators = fit_calibrators(members, labels, groups, trained_on)

    out.mkdir(parents=True, exist_ok=True)
    ensemble: dict[str, Any] = {
        "format": files.ENSEMBLE_FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        "members": [
            {"path": _relative(path, out), "digest": digest} for path, digest in zip(paths, digests, strict=True)
        ],
        "order": "sigmoid, flip mean, mean over the images of a study, mean over models, calibrator",
        "study": study,
        "findings": contents[0]["findings"],
        "calibration": files.describe_calibrators(calibrators),
        "fitted_on": {"split": "val", "images": len(members[0]), "head": "search"},
    }
    write_text(out / files.CARD_NAME, _card(ensemble, len(members[0])))
    files.write_config(out, ensemble)
    return out


def _join(
    validations: Sequence[tuple[Predictions, np.ndarray]], paths: Sequence[Path]
) -> tuple[list[Predictions], np.ndarray]:
    """Members' predictions on the same images, and the one set of labels, rows and columns as the first member's."""
    first, labels = validations[0]
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
        order = np.argsort(member.image_uid)
        rows = order[np.searchsorted(member.image_uid, first.image_uid, sorter=order)]
        columns = column_indices(member.findings, first.findings, str(path))
        if not np.array_equal(other[rows][:, columns], labels):
            raise PredictionError(f"{paths[0]} and {path} have other validation labels for the same images.")
    return [member for member, _ in validations], labels


def _relative(path: Path, out: Path) -> str:
    """A member's path from the ensemble's folder, so that both can be moved together."""
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()


def _card(content: dict[str, Any], images: int) -> str:
    members = "\n".join(f"- `{member['path']}` (identity {member['digest']})" for member in content["members"])
    return (
        f"# Ensemble of {len(content['members'])} models\n\n{RESEARCH_NOTICE}\n\n{members}\n\n"
        f"Order of operations: {content['order']}.\n\n"
        f"Its own calibrators (per image and per study) were fitted on the members' out-of-sample predictions of "
        f"{images} validation images. Made by Hilum {content['hilum']}.\n"
    )
