"""`hilum extend --joint`: one head for old and new findings, old ones taught by the model where labels are missing.

Unlike an extension this changes old tensors and old outputs. Knowledge is distilled: where a training image has no
label of an old finding, the model's own probability is the target (Li & Hoiem 2016, "Learning without Forgetting", with
sigmoids in place of a softmax). Before anything is written, every old finding is held against the model on validation,
by paired resampling of patients; what cannot be shown to lose less than the tolerance stops the program.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

import hilum
from hilum.commands.extend import composition_of, feature_source, learning_set
from hilum.commands.extend_files import said_of_exposure
from hilum.commands.extend_gate import compare, joint_card, regression_lines
from hilum.commands.extend_inputs import (
    Base,
    check_new,
    check_sides,
    open_base,
    refuse_absent,
    settings_of,
    target_of,
)
from hilum.commands.fit_inputs import Examples, describe_findings, open_examples
from hilum.commands.fit_outputs import exposure_of, predict_validation, screen_inputs
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError, HilumError, LeakageError
from hilum.core.files import write_json
from hilum.core.tracking import next_step, progress, say, warn
from hilum.core.types import POSITIVE, RESEARCH_NOTICE, UNKNOWN
from hilum.data.store import Store
from hilum.deploy import model_files as files
from hilum.deploy.card import write_cards
from hilum.deploy.network import Network, choose_device, raw_probabilities
from hilum.deploy.out_of_sample import fit_calibrators
from hilum.evaluation.calibration import fingerprint
from hilum.evaluation.definitions import mean_average_precision
from hilum.heads.batches import in_order
from hilum.heads.config import FitConfig
from hilum.heads.features import freeze
from hilum.heads.protocol import SearchRecord, choose
from hilum.heads.registry import Head, on_meta
from hilum.heads.standardise import Standardisation, measure, preparation
from hilum.heads.training import Weights, refit, search
from hilum.pretraining.exposure import join_leaks, uid_numbers

TOLERANCE = 0.02
"""Average precision that an old finding may lose, unless said otherwise."""
SEARCH_FORMAT = "hilum-search-2"


def run(
    model: Path,
    data: Path,
    findings: Sequence[str],
    out: Path,
    overrides: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    accept: bool = False,
    distillation: float = 1.0,
    bootstraps: int = 1000,
    device: str = "auto",
) -> Path:
    """Fit one head for all findings, taught by a model, and write a new MODEL directory.

    Args:
        model: a MODEL directory; best one that was fitted with refit=false, and has not seen validation.
        data: a store with labels of the new findings, and of old ones where there are any.
        findings: names of the store.
        out: a new directory.
        overrides: key=value over the settings that the model was fitted with.
        tolerance: average precision that an old finding may lose on validation.
        accept: write the model whatever the comparison says, and say so in it.
        distillation: how much a target that the model gives counts beside a label.
        bootstraps: resamples of patients.
        device: auto, cpu or cuda.

    Returns:
        `out`.

    Raises:
        HilumError: an old finding is not shown to lose less than the tolerance; nothing was written.
        LeakageError: patients that would change sides, or a teacher that has seen validation.
        ConfigError, UnknownNameError, PreprocessingMismatchError, NonFiniteLossError: as `extend`.
    """
    out, data = Path(out), Path(data)
    if tolerance < 0 or not 0 <= distillation <= 1:
        raise ConfigError(f"tolerance {tolerance}: expected 0 or more; distillation {distillation}: expected 0 to 1.")
    files.require_new(out)
    base = open_base(Path(model))
    names = check_new(base, findings)
    if any(extension.zero_shot for extension in base.network.extensions):
        raise ConfigError(
            f"{base.path} has zero-shot findings, which can teach nothing. Extend the model without them."
        )
    composition, config = composition_of(base), settings_of(base, overrides, joint=True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = choose_device(device)
    examples = _open_all(base, data, names)
    store, train, val, labels = examples.store, examples.train, examples.val, examples.labels
    seen = _teacher_has_seen(base, store, val, accept)

    # Targets: labels where known, the model's probabilities where not.
    backbone = freeze(base.backbone).to(place)
    teacher = Network(base.network, backbone, base.head, place)
    soft = _taught(teacher, base, examples, config, distillation)
    learning = replace(learning_set(config, examples), soft=soft)
    taught = int(((labels[train][:, : len(base.names)] < 0) & (soft[1][train][:, : len(base.names)] > 0)).sum())
    say(
        f"{len(base.names)} old findings, {taught} unknown training labels taught by the model; new: {', '.join(names)}"
    )

    # The fit protocol, with these targets.
    embed_dim = backbone.config.embed_dim
    described = config.describe_head(embed_dim, len(examples.findings))
    source = feature_source(config, base, examples, [described], place)
    scaling: Standardisation | None = None
    if config.standardise:
        batches = [batch.images for batch in in_order(train, config.batch_size)]
        scaling = measure(features for _, features in source.evaluation(batches))
    prepare = preparation(scaling)

    def score(probabilities: np.ndarray) -> float:
        return mean_average_precision(probabilities, labels[val], np.flatnonzero(examples.scored))

    def finished(state: Weights) -> Head:
        head = on_meta(described)
        head.load_state_dict(state, assign=True)
        if scaling is not None:
            head.absorb(scaling)
        return head

    variants = config.variants()
    searched = search(config, embed_dim, learning, source, prepare, score, place)
    chosen = choose(
        searched.epochs, variants, train_images=len(train), val_images=len(val), refit_epochs=config.refit_epochs,
        stop_epoch=config.stop_epoch, refit_init="cold", refit=config.refit,
    )  # fmt: skip
    for reason in chosen.reasons:
        say(reason)
    search_head = finished(searched.states[chosen.epoch, variants.index(chosen.variant)])
    provenance = {"head": "search", "learning_rate": chosen.variant.learning_rate, "epoch": chosen.epoch}
    network = replace(base.network, head=described, findings=examples.findings, extensions=())
    predictions = predict_validation(Network(network, backbone, search_head, place), examples, config, provenance)

    # The gate: old findings against the model, on validation that neither has learned from.
    regression = compare(base, predictions, labels[val], tolerance, bootstraps, config.seed)
    for line in regression_lines(regression, tolerance):
        say(line)
    failed = [name for name, row in regression.items() if row["verdict"] != "harmless"]
    if failed and not accept:
        raise HilumError(
            f"{len(failed)} of {len(regression)} old findings are not shown to lose less than {tolerance:g} AP: "
            f"{', '.join(failed)}. Nothing was written. Add labels, extend without --joint (old outputs then stay the "
            "same bits), raise --tolerance, or --accept what the lines above say."
        )

    groups = {finding.name: finding.group for finding in examples.findings}
    calibrators = fit_calibrators([predictions], labels[val], groups, [uid_numbers(store.uids[train])], composition)
    head, losses = search_head, tuple[float, ...]()
    if config.refit:
        state, losses = refit(
            config, embed_dim, learning, source, prepare, chosen.variant, chosen.refit_epochs, 0, None, place
        )
        head = finished(state)

    # Files; config.json last.
    out.mkdir(parents=True, exist_ok=True)
    record = SearchRecord(
        SEARCH_FORMAT, "macro average precision per image over findings with a validation positive",
        tuple(name for name, used in zip(examples.names, examples.scored, strict=True) if used), len(train), len(val),
        variants, tuple(searched.epochs), chosen, "cold", losses,
    )  # fmt: skip
    write_json(out / files.SEARCH_NAME, to_dict(record))
    files.write_validation(out, predictions, labels[val])
    leak = join_leaks(str(base.content.get("accepted_leak") or ""), store.accepted_leak)
    learned = examples.describe_data()
    for earlier in files.trainings(base.content):  # what the teacher learned from is in what it taught
        for name, tags in (earlier.get("licences") or {}).items():
            learned["licences"][name] = sorted({*learned["licences"].get(name, ()), *tags})
    content: dict[str, Any] = {
        "format": files.MODEL_FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        **files.describe(network),
        **{name: base.content[name] for name in ("study", "normal_damping") if name in base.content},
        "weights": files.write_weights(out, backbone, head),
        "calibration": files.describe_calibrators(calibrators),
        "fitted_on": {
            **provenance, "split": "val", "images": len(val), "uids_sha256": fingerprint(store.uids[val]),
            "store_fingerprint": store.fingerprint(val), "file": files.LOGITS_NAME,
        },
        "exposure": said_of_exposure(base)
        | files.write_exposure(out, files.Exposure.join([base.exposure, exposure_of(examples, config.refit)])),
        **screen_inputs(out, examples, config),
        "accepted_leak": leak,
        "extended_from": files.digest_of(base.path),
        "joint": {
            "distillation": distillation, "taught_labels": taught, "teacher_has_seen_validation": seen,
            "tolerance": tolerance, "harmless": not failed, "accepted": bool(failed), "regression": regression,
        },
        "training": {
            "settings": to_dict(config),
            "learning_rate": chosen.variant.learning_rate,
            "refit_epochs": chosen.refit_epochs,
            **learned,
            "backbone": base.content["training"].get("backbone"),
            "tuning": base.content["training"].get("tuning"),
            "store": {name: store.fingerprint(rows) for name, rows in (("train", train), ("val", val))},
        },
    }  # fmt: skip
    write_cards(out, content, more=joint_card(content))
    files.write_config(out, content)
    say(f"{out}: {len(examples.findings)} findings in one head, {chosen.variant}")
    next_step(f"hilum predict {out} {data}:test --out test.parquet")
    return out


def _open_all(base: Base, data: Path, names: tuple[str, ...]) -> Examples:
    """Images and labels of train and val for old and new findings; old ones that the store lacks are unknown."""
    store = Store.open(data)
    store.check_recipe(base.network.preprocess_id, base.path)
    refuse_absent(store, names)
    examples = open_examples(data, names, target=target_of(base, store))
    check_sides(base, store, examples.train, examples.val)
    both = examples.both
    old = np.full((len(store), len(base.names)), UNKNOWN, dtype=np.int8)
    for column, name in enumerate(base.names):
        if name in store.findings:
            old[both, column] = store.labels[both, store.findings.index(name)]
    for validation, known in base.validations:  # labels that the model was validated with, where the store has none
        row_of = dict(zip(uid_numbers(validation.image_uid).tolist(), range(len(validation)), strict=True))
        columns = [base.names.index(name) for name in validation.findings]
        for index, uid in zip(examples.val, uid_numbers(store.uids[examples.val]).tolist(), strict=True):
            if uid in row_of:
                now = old[index, columns]
                old[index, columns] = np.where(now == UNKNOWN, known[row_of[uid]], now)
    labels = np.concatenate([old, examples.labels], axis=1)
    fresh = describe_findings((*base.names, *names), labels[examples.train])
    # An old finding was trained already, whether or not this store has a label of it.
    kept = tuple(
        replace(now, trained=True) if now.known and then.trained else now if now.known else then
        for now, then in zip(fresh[: len(base.names)], base.network.findings, strict=True)
    )
    findings = kept + fresh[len(base.names) :]
    trained = np.array([finding.trained for finding in findings])
    labels[:, ~trained] = UNKNOWN  # as in a fit: nothing to learn, and nothing to choose by
    return replace(examples, labels=labels, findings=findings, scored=(labels[examples.val] == POSITIVE).any(axis=0))


def _teacher_has_seen(base: Base, store: Store, val: np.ndarray, accept: bool) -> bool:
    seen = int(base.exposure.learned_from(store.uids[val], store.pictures[val]).sum())
    if seen and not accept:
        raise LeakageError(
            f"{base.path} was trained on {seen} of {len(val)} validation images, in its refit; what it teaches would "
            "carry their labels into training, and the comparison on them would flatter the result. Teach with a model "
            "that was fitted with refit=false, or --accept it, which is written into the model."
        )
    if seen:
        warn(f"the teacher was trained on {seen} of {len(val)} validation images; the comparison below is flattered")
    return bool(seen)


def _taught(
    teacher: Network, base: Base, examples: Examples, config: FitConfig, weight: float
) -> tuple[Float32[np.ndarray, "N C"], Float32[np.ndarray, "N C"]]:
    """Values and weights of all images: labels where known, the model's probabilities of old findings where not."""
    values = examples.labels.clip(min=0).astype(np.float32)
    weights = (examples.labels >= 0).astype(np.float32)
    images = examples.both
    with progress("teacher", len(images), "images") as bar:
        [found], _ = raw_probabilities(
            [teacher], images, examples.store.read, config.batch_size, config.workers, bar.advance,
            studies=examples.studies[images], views=examples.views[images],
        )  # fmt: skip
    for column in range(len(base.names)):
        fill = (examples.labels[images, column] < 0) & np.isfinite(found[:, column])
        values[images[fill], column] = found[fill, column]
        weights[images[fill], column] = weight
    return values, weights
