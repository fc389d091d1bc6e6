"""Several MODEL directories as one: a directory that names them, says how they are put together, and owns calibrators.

Calibrators, and where it is asked for members, weights and rules, come from the members' own out-of-sample validation
predictions, image by image: nothing is predicted again, and nothing of a test set is looked at.
"""

import os
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hilum
from hilum.core.errors import CheckpointError, ConfigError, PredictionError, PreprocessingMismatchError
from hilum.core.files import atomic_file, sha256_file
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.card import write_cards
from hilum.deploy.engines import read_export
from hilum.deploy.out_of_sample import PLAIN, fit_calibrators, fit_composition, refuse_in_sample
from hilum.deploy.validation import join_members
from hilum.evaluation.calibration import fingerprint
from hilum.evaluation.composition import Composition
from hilum.evaluation.ensemble_search import Choice, Plan, choose_ensemble
from hilum.evaluation.learned_views import LearnedViews
from hilum.evaluation.ranks import Ranks

RANKS_NAME = "ranks.npz"
UNITS = ("image", "study")


class Combined(NamedTuple):
    """An ensemble that was written.

    Args:
        content: of its `config.json`.
        choice: how its members and rules were chosen, if they were.
        views: how the weights of its study rule were fitted, if they were.
    """

    content: dict[str, Any]
    choice: Choice | None
    views: LearnedViews | None


def combine_models(
    paths: Sequence[Path],
    out: Path,
    composition: Composition | None = None,
    plan: Plan | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Combined:
    """Write an ensemble: the images of a study, then models, then damping, then calibrators fitted at that stage.

    Args:
        paths: MODEL directories that were validated on the same images; one alone where it gets another study rule or
            damping than it has, or these are chosen.
        out: a new directory; members are named relative to it.
        composition: how they are put together; what it lacks is fitted on validation. None: as `inherited` says. Not
            looked at with a `plan`.
        plan: choose members, weights and rules by it instead.
        done: told after each of `ensemble_search.steps_of(plan)` searches.

    Returns:
        what was written, and how it was chosen.

    Raises:
        ConfigError: too few members, one of them twice, or `out` is taken.
        CheckpointError: not a model, damaged, or itself an ensemble.
        PreprocessingMismatchError: members that read images by different recipes.
        PredictionError: members validated on other images, with other labels or findings.
        StageError: validation predictions that are not out of sample, or of the test split.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    contents = [files.read_config(path) for path in paths]
    _check_kinds(paths, contents)
    digests = [files.digest_of(path) for path in paths]
    own = inherited(paths) if composition is None and plan is None else composition or PLAIN
    changed = own != inherited(paths[:1]) if plan is None else len(plan.studies) > 1 or len(plan.dampings) > 1
    if len(set(digests)) < len(digests) or (len(digests) < 2 and not changed):
        raise ConfigError(f"An ensemble needs two or more different models, found {', '.join(map(str, paths))}.")
    files.require_new(out)

    members, labels = join_members([files.read_validation(path) for path in paths], paths)
    trained_on = [
        files.read_exposure(path, content).train for path, content in zip(paths, contents, strict=True)
    ]  # the search head saw the training split alone; this is the rule that `fit` recorded
    groups = {finding["name"]: finding["group"] for finding in contents[0]["findings"]}
    names = [_relative(path, out) for path in paths]
    choice = None
    kept: Sequence[int] = range(len(paths))
    if plan is not None:
        refuse_in_sample(members, trained_on)
        choice = choose_ensemble(members, labels, names, plan, done)
        own, kept = choice.composition, choice.members
        members, trained_on = [members[place] for place in kept], [trained_on[place] for place in kept]
    own, views = fit_composition(own, members, labels, trained_on)
    calibrators = fit_calibrators(members, labels, groups, trained_on, own)

    out.mkdir(parents=True, exist_ok=True)
    ensemble: dict[str, Any] = {
        "format": files.ENSEMBLE_FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        "members": [{"path": names[place], "digest": digests[place]} for place in kept],
        "order": "sigmoid, flip mean, the images of a study, models, damping by Normal, calibrator",
        **own.describe(),
        **({"learned_views": views.describe()} if views else {}),
        **({"ranks": _write_ranks(out, own)} if own.ranks else {}),
        **({"choice": choice.describe(names)} if choice else {}),
        "findings": contents[kept[0]]["findings"],
        "calibration": files.describe_calibrators(calibrators),
        "fitted_on": {
            "split": "val", "images": len(members[0]), "head": "search",
            "uids_sha256": fingerprint(members[0].image_uid.tolist()),
        },
    }  # fmt: skip
    write_cards(out, ensemble, own)
    files.write_config(out, ensemble)
    return Combined(ensemble, choice, views)


def _check_kinds(paths: Sequence[Path], contents: Sequence[Mapping[str, Any]]) -> None:
    for path, content in zip(paths, contents, strict=True):
        if read_export(path) is not None:
            raise ConfigError(f"{path} is an export; combine the MODEL it was made from, and export the ensemble.")
        if content["format"] != files.MODEL_FORMAT:
            raise ConfigError(f"{path} is itself an ensemble; name its members instead.")
    recipes = sorted({str(content["preprocessing"]["id"]) for content in contents})
    if len(recipes) > 1:
        raise PreprocessingMismatchError(
            f"An ensemble reads each image once, and these models were trained with {' and '.join(recipes)}. Predict "
            "with each of them, and combine the prediction files."
        )


def inherited(paths: Sequence[Path], apart_from: Collection[str] = ()) -> Composition:
    """The study rule and the damping that all of these models were made with.

    Args:
        paths: MODEL directories.
        apart_from: "study", "normal_damping": what is not asked, and stays the default.

    Raises:
        ConfigError: they were not made with the same, or one is itself an ensemble, or an export.
        PreprocessingMismatchError: they read images by different recipes.
    """
    contents = [files.read_config(path) for path in paths]
    _check_kinds(paths, contents)
    found = {}
    for key, option in (("study", "--study"), ("normal_damping", "--normal-damping")):
        if key in apart_from:
            continue
        rules = {str(content.get(key) or Composition().describe()[key] or "none") for content in contents}
        if len(rules) > 1:
            raise ConfigError(f"These models were made with {key} {' and '.join(sorted(rules))}: say {option}.")
        found[key] = contents[0].get(key)
    return Composition.read({key: value for key, value in found.items() if value})


def read_composition(path: Path, content: Mapping[str, Any]) -> Composition:
    """How the predictions of a model or an ensemble are put together, from its `config.json` and its ranks.

    Raises:
        CheckpointError: an entry that means nothing, or a file of ranks that is absent, damaged or another one.
    """
    try:
        ranks = _read_ranks(path, content["ranks"], len(content["members"])) if content.get("ranks") else {}
        composition = Composition.read(content, ranks)
        if composition.study.needs_fit:
            raise ConfigError("the study rule has no weights")
        return composition
    except (ConfigError, PredictionError, KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: how its predictions are put together cannot be read: {error}.") from error


def _write_ranks(out: Path, composition: Composition) -> dict[str, str]:
    arrays = {
        f"{unit}.{number}.{name}": values
        for unit, members in composition.ranks.items()
        for number, one in enumerate(members)
        for name, values in one.arrays().items()
    }
    with atomic_file(out / RANKS_NAME) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return {"file": RANKS_NAME, "sha256": sha256_file(out / RANKS_NAME)}


def _read_ranks(path: Path, described: Mapping[str, Any], count: int) -> dict[str, tuple[Ranks, ...]]:
    if sha256_file(path / RANKS_NAME) != described["sha256"]:
        raise ConfigError(f"{RANKS_NAME} is not the file that {files.CONFIG_NAME} was written for")
    with (path / RANKS_NAME).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names = ("findings", "lengths", "scores", "ranks")
        return {
            unit: tuple(
                Ranks.from_arrays({name: arrays[f"{unit}.{number}.{name}"] for name in names})
                for number in range(count)
            )
            for unit in UNITS
        }


def _relative(path: Path, out: Path) -> str:
    """A member's path from the ensemble's folder, so that both can be moved together."""
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
