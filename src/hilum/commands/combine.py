"""`hilum combine`: raw prediction files -> the images of each study -> models -> damping by Normal -> one file.

With `--choose`, the members, their weights and the rules that are best on labelled validation predictions, to be used
on other predictions of the same models.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hilum.commands.calibrate import VALIDATION
from hilum.commands.combine_options import NONE, Rules, tell, tell_views
from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.core.tracking import next_step, progress, say, warn
from hilum.core.types import UNITS
from hilum.evaluation.calibration import describe_items
from hilum.evaluation.composition import Composition
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.ensemble_search import choose_ensemble, steps_of
from hilum.evaluation.joining import join, match_findings
from hilum.evaluation.learned_views import fit_views
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.evaluation.studies import aggregate_studies, study_uids
from hilum.evaluation.truth import read_truth, split_name


def run(
    files: list[Path],
    out: Path,
    study: str | None = None,
    ensemble: str | None = None,
    unit: str = "image",
    weights: str | None = None,
    normal_damping: str | None = None,
    choose: bool = False,
    labels: Path | None = None,
    split: str | None = None,
) -> None:
    """Combine prediction files; studies first, then models, then damping, whatever the order of the options.

    Args:
        files: raw predictions, one file per model.
        out: `.parquet`, `.csv` or `.json`.
        study: a study rule such as "frontal_weighted:0.8", or None; `learned` without weights is fitted on `labels`.
        ensemble: a name in ENSEMBLES, or None; needed for more than one file.
        unit: image (each keeps its row and carries its study's value) or study (one row each).
        weights: one number per file, with commas; None: equal.
        normal_damping: such as "power:0.5"; None or "none": not at all.
        choose: find members, weights and rules on `labels`; then None and "choose" mean what `Rules.plan` says.
        labels: a store, a manifest or a CSV, for `choose` and `learned`.
        split: of the labels, on which is chosen; never the test split. None: val, where the labels have splits.

    Raises:
        ConfigError: nothing to do, several files without an ensemble, or labels that nothing is fitted on.
        UnknownNameError: no such unit.
        StageError: calibrated input; a choice on the test split, or on images that a head was trained on.
        PredictionError: files that do not cover the same items or findings.
    """
    rules = Rules(study, ensemble, weights, normal_damping)
    if unit not in UNITS:
        raise UnknownNameError("unit", unit, UNITS)
    if missing := [path for path in files if not path.exists()]:
        raise PredictionError(f"{missing[0]} does not exist; expected a prediction file, or a model.")
    if folders := [path for path in files if path.is_dir()]:
        raise ConfigError(
            f"{folders[0]} is a folder: models and prediction files do not mix. Give models alone, or predict with "
            "each (hilum predict --raw) and give the files."
        )
    if choose:
        _choose(files, out, rules, unit, labels, split)
        return
    if study is None and ensemble is None and normal_damping in (None, NONE):
        raise ConfigError("Nothing to combine: say --study mean, --ensemble mean, --normal-damping, or several.")
    composition = rules.composition(Composition())
    if len(files) > 1 and ensemble is None:
        raise ConfigError(f"{len(files)} files become one by an ensemble: say --ensemble mean, or give one file.")
    if weights and ensemble is None:
        raise ConfigError("--weights are those of an ensemble: say --ensemble mean as well.")
    if unit == "study" and study is None:
        raise ConfigError("One row per study needs a rule for its images: say --study mean.")
    if labels is not None and not composition.study.needs_fit:
        raise ConfigError("--labels are for --choose and for --study learned without weights; here nothing is fitted.")
    members = [read_predictions(path) for path in files]
    chosen_on = None
    if composition.study.needs_fit:
        rows, codes, chosen_on = _labelled(members, files, labels, split)
        fitted = fit_views(rows[0] if len(rows) == 1 else rows[0].replace(combine_members(rows).probabilities), codes)
        composition = dataclasses.replace(composition, study=fitted.rule)
        say(tell_views(fitted))
        _say_how([str(path) for path in files], composition, ensemble is not None, unit)
    result = _combine(members, composition, study is not None, ensemble is not None, unit)
    _write(result, out, chosen_on)


def _combine(
    members: Sequence[Predictions], composition: Composition, studies: bool, models: bool, unit: str
) -> Predictions:
    if studies:
        members = [aggregate_studies(member, composition.study, unit) for member in members]
        say(f"Images per study: {_histogram(members[0].metadata['images_per_study'])}")
    result = combine_members(members, composition.ensemble, composition.weights) if models else members[0]
    return composition.damping.apply(result) if composition.damping else result


def _choose(files: list[Path], out: Path, rules: Rules, unit: str, labels: Path | None, split: str | None) -> None:
    members = [read_predictions(path) for path in files]
    rows, codes, chosen_on = _labelled(members, files, labels, split)
    plan = rules.plan(Composition())
    names = [str(path) for path in files]
    with progress("choose", steps_of(plan), "searches") as bar:
        choice = choose_ensemble(rows, codes, names, plan, bar.advance)
    for line in tell(choice, names):
        say(line)
    kept = [members[place] for place in choice.members]
    result = _combine(kept, choice.composition, True, len(kept) > 1, unit)
    _write(result.replace(result.probabilities, choice=choice.describe(names)), out, chosen_on)
    _say_how([names[place] for place in choice.members], choice.composition, len(kept) > 1, unit)


def _labelled(
    members: Sequence[Predictions], files: Sequence[Path], labels: Path | None, split: str | None
) -> tuple[list[Predictions], np.ndarray, dict[str, object]]:
    """The members' rows of a split with their labels, columns as the first member's, and a record of the items."""
    if labels is None:
        raise ConfigError("What is chosen is chosen on labels: say --labels FILE (a store, a manifest or a CSV).")
    asked, split = split, split_name(split or VALIDATION)
    if split == "test":
        raise StageError("Nothing is chosen on the test split. Predict the validation split and choose there.")
    for path, member in zip(files, members, strict=True):
        if split == "train" and not member.metadata.get("head_splits"):
            raise StageError(
                f"{path} does not say on which splits its head was trained, and split 'train' is what heads are "
                "trained on. Predict the validation split and choose there."
            )
        if member.stage != "raw" or member.unit != "image":
            raise StageError(
                f"{path} is at stage {member.stage!r} per {member.unit}; members and rules are chosen on raw "
                "predictions per image (hilum predict --raw)."
            )
        if member.metadata.get("split") == "test":
            raise StageError(f"{path} says that it is of the test split: nothing is chosen on it. Predict validation.")
        seen = [one for one in (split, member.metadata.get("split")) if one in member.metadata.get("head_splits", ())]
        if seen:
            raise StageError(
                f"{path} comes from a head that was trained on split {seen[0]!r}: nothing can be chosen on it. Use the "
                "model's validation_logits.parquet."
            )
    truth = read_truth(labels)
    if asked is not None and not truth.has_splits:
        raise PredictionError(f"{labels} does not say which split an item is in; leave out --split.")
    if not truth.has_splits:
        warn(f"{labels} does not say which split an item is in: every predicted item is used.")
    combine_members(members)  # the same items in all, or an error that says which
    _, only = match_findings(members[0].findings, truth.findings, None, str(labels))
    if only["unlabelled"]:
        warn(f"no labels for {', '.join(only['unlabelled'])}: they have no say in what is chosen.")
    joined = [join(truth, member, split if truth.has_splits else None) for member in members]
    first = joined[0].select(members[0].findings)
    order = first.predictions.image_uid
    rows = [one.predictions.rows(one.predictions.places(order)) for one in joined]
    chosen_on = describe_items(order.tolist())
    # the result may have a row per study: its ids are remembered too, as it will spell them
    p = members[0].rows(members[0].places(order))
    studies = study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid)
    return rows, first.labels, chosen_on | {"digests": describe_items([*order, *studies])["digests"]}


def _write(result: Predictions, out: Path, chosen_on: dict[str, object] | None) -> None:
    if chosen_on:
        result = result.replace(result.probabilities, chosen_on=chosen_on)
    write_predictions(result, out)
    say(f"{out}: {len(result)} {result.unit} rows, {len(result.findings)} findings, stage {result.stage}")
    next_step(f"hilum calibrate {out} --labels STORE --split val --out calibration.json")


def _say_how(names: Sequence[str], composition: Composition, models: bool, unit: str) -> None:
    """The options that do the same to other predictions of the same models."""
    options = ["--study", str(composition.study)]
    if models:
        options += ["--ensemble", composition.ensemble]
    if composition.weights:
        options += ["--weights", ",".join(repr(one) for one in composition.weights)]
    if composition.damping:
        options += ["--normal-damping", str(composition.damping)]
    if unit != "image":
        options += ["--unit", unit]
    say(f"The same for other predictions of {', '.join(names)}, in this order: hilum combine ... {shlex.join(options)}")


def _histogram(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size}: {count} studies" for size, count in sizes.items())
