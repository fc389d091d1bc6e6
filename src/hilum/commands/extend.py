"""`hilum extend`: a model and a few labels in, the same model with more findings out. Old outputs are the same bits.

Search: the rungs of the ladder (`extend_training.py`) side by side on one pass over the frozen backbone; validation
chooses rung, rate and epoch. Calibrate: on validation predictions of the search head. Refit: on train + val. The new
head is written beside the model's own, whose tensors, maps and thresholds are copied as they are. Distillation into
one head is in `extend_joint.py`, scoring from text alone in `extend_zero_shot.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hilum.commands.extend_files import SEEN_NOTE, make_cards, memory_has_seen, write_extended
from hilum.commands.extend_inputs import Base, Shots, check_new, open_base, open_new_examples, settings_of
from hilum.commands.extend_training import LADDER, Rung, finished, make_ladder, refit, search
from hilum.commands.fit_inputs import Examples
from hilum.commands.fit_outputs import exposure_of, predict_validation
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError
from hilum.core.tracking import next_step, say, warn
from hilum.data.labels import TASKS
from hilum.data.transforms import preprocessing
from hilum.deploy import model_files as files
from hilum.deploy.network import Network, choose_device
from hilum.deploy.out_of_sample import fit_calibrators
from hilum.evaluation.composition import Composition
from hilum.heads.batches import in_order
from hilum.heads.config import FitConfig
from hilum.heads.features import Augmentation, FeatureSource, freeze
from hilum.heads.registry import Head, HeadConfig, on_meta
from hilum.heads.standardise import measure
from hilum.heads.training import LearningSet, starting_bias
from hilum.pretraining.exposure import uid_numbers

SEARCH_FORMAT = "hilum-extension-search-1"


@dataclass(frozen=True)
class Options:
    """What the command line says of how to extend."""

    shots: int | None = None
    val_shots: int | None = None
    """None: as `shots`."""
    ladder: str | None = None
    """With commas; None: all of it."""
    zero_shot: Path | None = None
    joint: bool = False
    tolerance: float = 0.02
    accept: bool = False


def dispatch(
    model: Path,
    data: Path | None,
    findings: Sequence[str],
    out: Path,
    overrides: Sequence[str],
    options: Options,
    device: str = "auto",
) -> Path:
    """Run the way of extending that the options name.

    A finding may also be the name of a task (`data.labels.TASKS`), which stands for its findings.

    Raises:
        ConfigError: options that do not go together, or no store where one is needed.
    """
    findings = [name for one in findings for name in TASKS.get(one, (one,))]
    budget = options.shots is not None or options.val_shots is not None
    if options.joint and options.zero_shot is not None:
        raise ConfigError("--joint learns from labels and --zero-shot has none. Choose one.")
    if (options.joint or options.zero_shot is not None) and budget:
        raise ConfigError("--shots and --val-shots go with the plain extension alone.")
    if options.accept and not options.joint:
        raise ConfigError("--accept goes with --joint; a plain extension changes nothing that would need it.")
    if options.ladder is not None and (options.joint or options.zero_shot is not None):
        raise ConfigError("--ladder goes with the plain extension alone.")
    if options.tolerance != Options.tolerance and not options.joint:
        raise ConfigError("--tolerance goes with --joint; a plain extension changes nothing that would need it.")
    if options.zero_shot is not None:
        from hilum.commands import extend_zero_shot  # these are built on what is above

        return extend_zero_shot.run(model, options.zero_shot, findings, out, data, overrides, device)
    if data is None:
        raise ConfigError("--data STORE: an extension learns from labels. Without any, give --zero-shot VECTORS.")
    if options.joint:
        from hilum.commands import extend_joint

        return extend_joint.run(model, data, findings, out, overrides, options.tolerance, options.accept, device=device)
    val_shots = options.shots if options.val_shots is None else options.val_shots
    ladder = list(LADDER) if options.ladder is None else [name.strip() for name in options.ladder.split(",")]
    return run(model, data, findings, out, overrides, Shots(options.shots, val_shots), ladder, device)


def run(
    model: Path,
    data: Path,
    findings: Sequence[str],
    out: Path,
    overrides: Sequence[str] = (),
    shots: Shots | None = None,
    ladder: Sequence[str] = LADDER,
    device: str = "auto",
) -> Path:
    """Add findings to a model and write a new MODEL directory.

    Args:
        model: a MODEL directory.
        data: a store with labels of the new findings in train and val.
        findings: names of the store.
        out: a new directory.
        overrides: key=value over the settings that the model was fitted with.
        shots: how many positive images of each finding may be used.
        ladder: which ways to try.
        device: auto, cpu or cuda.

    Returns:
        `out`.

    Raises:
        ConfigError: a finding that the model has, one without positives, or settings that do not fit.
        LeakageError: patients that would change sides.
        UnknownNameError: a finding that the store does not have.
        PreprocessingMismatchError: a store of another recipe.
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved.
    """
    out, shots = Path(out), shots or Shots()
    files.require_new(out)
    base = open_base(Path(model))
    names = check_new(base, findings)
    composition = composition_of(base)
    config = settings_of(base, overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = choose_device(device)
    examples = open_new_examples(base, Path(data), names, shots, config)
    store, train, val, labels = examples.store, examples.train, examples.val, examples.labels
    say(
        f"{base.path} has {len(base.names)} findings; {len(names)} new ones from {len(train)} training and {len(val)} "
        f"validation images: {', '.join(f'{one.name} ({one.positives})' for one in examples.findings)}"
    )

    # Ways to learn them, and the features that all of them read.
    model_config, embed_dim = base.network, base.backbone.config.embed_dim
    bias = starting_bias(config, labels[train])
    old = base.names[: model_config.head.findings]
    rungs = make_ladder(config, embed_dim, model_config.head, base.main, names, old, bias, ladder)
    backbone = freeze(base.backbone).to(place)
    source = feature_source(config, base, examples, [rung.head for rung in rungs], place)
    learning = learning_set(config, examples)
    scaling = None
    if any(rung.standardise for rung in rungs):
        batches = [batch.images for batch in in_order(train, config.batch_size)]
        scaling = measure(features for _, features in source.evaluation(batches))

    # Search on train, chosen on val.
    found = search(config, rungs, learning, source, scaling, place)
    for name, choice in found.choices.items():
        [rung] = [one for one in rungs if one.name == name]
        say(f"{name}: validation mAP {choice.score:.3f} at {choice.variant}, {rung.trained_weights} weights learned")
    [rung] = [one for one in rungs if one.name == found.best]
    chosen = found.choices[found.best]
    say(f"{rung.name} is taken: the highest score, of equal ones the fewest weights")

    # Calibration: validation as the search head predicts it, which has not seen it.
    search_head = finished(rung, found.states[rung.name], scaling)
    provenance = {"head": "search", "learning_rate": chosen.variant.learning_rate, "epoch": chosen.epoch}
    alone = replace(model_config, head=rung.head, findings=examples.findings, extensions=())
    predictions = predict_validation(Network(alone, backbone, search_head, place), examples, config, provenance)
    groups = {finding.name: finding.group for finding in examples.findings}
    calibrators = fit_calibrators([predictions], labels[val], groups, [uid_numbers(store.uids[train])], composition)

    # Refit on train + val; without one (as the model was fitted, or refit=false), the search head is the new one.
    head, refit_losses = search_head, tuple[float, ...]()
    if config.refit:
        state, refit_losses = refit(config, rung, chosen.variant, chosen.refit_epochs, learning, source, scaling, place)
        head = finished(rung, state, scaling)
    _require_untouched(rung, base, head)

    # Files; config.json last.
    seen = memory_has_seen(base, rung, examples)
    if seen:
        warn(SEEN_NOTE)
    cards = make_cards(examples, rung, old)
    record = {
        "format": SEARCH_FORMAT,
        "criterion": "macro average precision per image over new findings with a validation positive",
        "train_images": len(train),
        "val_images": len(val),
        "variants": [to_dict(one) for one in config.variants()],
        "rungs": {
            one.name: {
                "trained_weights": one.trained_weights,
                "epochs": [to_dict(epoch) for epoch in found.courses[one.name]],
                "chosen": to_dict(found.choices[one.name]),
            }
            for one in rungs
        },
        "taken": rung.name,
        "refit_losses": list(refit_losses),
    }
    training = {
        "extended_from": files.digest_of(base.path),
        "rung": rung.name,
        "trained_weights": rung.trained_weights,
        "shots": {"train": shots.train, "val": shots.val},
        "memory_has_seen_validation": seen,
        "fitted_on": {**provenance, "split": "val", "images": len(val), "store_fingerprint": store.fingerprint(val)},
        "refit_epochs": chosen.refit_epochs,
        "settings": to_dict(config),
        **examples.describe_data(),
        "store": {name: store.fingerprint(rows) for name, rows in (("train", train), ("val", val))},
    }
    extension = files.Extension(rung.head, names, rung.shared, False, cards, training)
    exposure = exposure_of(examples, config.refit)
    write_extended(
        base, out, extension, head, examples.findings, calibrators, exposure, (predictions, labels[val]),
        record, store.accepted_leak,
    )  # fmt: skip
    say(f"{out}: {len(base.names)} findings as they were, and {', '.join(names)}")
    next_step(f"hilum predict {out} {data}:test --out test.parquet")
    return out


def composition_of(base: Base) -> Composition:
    """How the model's images become studies; what new findings are calibrated with.

    Raises:
        ConfigError: a model that damps findings by Normal.
    """
    composition = Composition.read(base.content)
    if composition.damping is not None:
        raise ConfigError(
            f"{base.path} damps its findings by Normal ({composition.damping}), which would change with every finding "
            "that is added. Extend the model without damping."
        )
    return replace(composition, ensemble="mean", weights=None, ranks={})


def feature_source(
    config: FitConfig, base: Base, examples: Examples, heads: Sequence[HeadConfig], device: torch.device
) -> FeatureSource:
    """Features of the model's own backbone for images of train and val."""
    return FeatureSource(
        examples.store, examples.both, base.backbone, preprocessing(base.network.preprocess_id),
        resolution=base.network.resolution, blocks=base.network.head.blocks,
        patches=any(on_meta(head).needs_patches for head in heads),
        augmentation=Augmentation(config.crop_scale, flip=config.flip), cached_views=config.augmented_views,
        cache_dtype=config.cache_dtype, precision=config.precision, workers=config.workers, seed=config.seed,
        device=device,
    )  # fmt: skip


def learning_set(config: FitConfig, examples: Examples) -> LearningSet:
    """The examples as heads learn from them; with studies where the head looks at them."""
    whole = config.needs_studies
    return LearningSet(
        examples.train, examples.val, examples.labels, studies=examples.studies if whole else None,
        views=examples.views if whole else None,
    )  # fmt: skip


def _require_untouched(rung: Rung, base: Base, head: Head) -> None:
    """What is shared must be what it was, bit for bit; anything else would be a fault of this program."""
    before, after = base.main.state_dict(), head.state_dict()
    changed = [name for name in rung.shared if not torch.equal(before[name].cpu(), after[name].cpu())]
    assert not changed, f"shared tensors have changed: {changed}"
