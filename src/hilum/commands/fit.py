"""`hilum fit`: a store and a frozen backbone in, a calibrated MODEL out. The protocol, from top to bottom.

Search: a head per candidate (learning rate, blocks) on one pass over the features; selection on validation. Calibrate:
on validation predictions of the search head, which has not seen validation. Refit: the chosen one on train + val.
Labels of the test split are not read, and without a validation split nothing is fitted: nothing is chosen on test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

import hilum
from hilum.commands.fit_inputs import Examples, OpenBackbone, open_backbone, open_examples
from hilum.commands.fit_outputs import exposure_of, predict_validation, screen_inputs
from hilum.commands.fit_targets import open_learning_set
from hilum.commands.fit_tune import Tuned, TuneRecord, tune_on_both, tune_on_train
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError
from hilum.core.files import write_json
from hilum.core.tracking import next_step, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.transforms import preprocessing
from hilum.deploy import model_files as files
from hilum.deploy.card import write_cards
from hilum.deploy.network import Network, choose_device
from hilum.deploy.out_of_sample import fit_calibrators, fit_composition
from hilum.evaluation.calibration import fingerprint
from hilum.evaluation.composition import Composition
from hilum.evaluation.definitions import mean_average_precision
from hilum.evaluation.normal_damping import Damping, normal_name
from hilum.evaluation.study_rules import StudyRule
from hilum.heads.batches import in_order
from hilum.heads.candidates import last_blocks_scaling
from hilum.heads.compact import Kept, Reduction, fit_reduction
from hilum.heads.config import FitConfig
from hilum.heads.features import EVALUATION, Augmentation, FeatureSource, freeze
from hilum.heads.protocol import SearchRecord, choose
from hilum.heads.registry import Head, HeadConfig, on_meta
from hilum.heads.standardise import Standardisation, measure, preparation
from hilum.heads.training import Prepare, Weights, refit, search
from hilum.pretraining.exposure import join_leaks, uid_numbers

SEARCH_FORMAT = "hilum-search-2"
MEMORY_MAP = "decoder.embed_standart"
"""The map of a decoder that reads the tokens."""


def run(config: FitConfig, data: Path, backbone: Path | str, out: Path, device: str = "auto") -> Path:
    """Fit a head and write a MODEL directory.

    Args:
        config: all settings.
        data: store with a training and a validation split.
        backbone: a RUN folder, a weights file, or "random:SIZE" for an untrained backbone of a named size.
        out: a new directory.
        device: auto, cpu or cuda.

    Returns:
        `out`.

    Raises:
        ConfigError: no validation split, nothing to learn or to select on, settings that do not fit the backbone, or
            settings of another loss.
        LeakageError: a patient in two splits.
        PreprocessingMismatchError: the store was built for another recipe than the backbone's.
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved.
    """
    config.refuse_unread_losses()
    data, out = Path(data), Path(out)
    files.require_new(out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = choose_device(device)
    composition = Composition(
        StudyRule.parse(config.study), damping=Damping.parse(config.normal_damping) if config.normal_damping else None
    )

    # Images and labels of train and val, and the features that a frozen backbone gives.
    examples = open_examples(
        data, config.findings, config.datasets, config.target, config.train_images, config.val_images, config.seed,
        config.hierarchy, config.source_weights,
    )  # fmt: skip
    store, train, val, labels = examples.store, examples.train, examples.val, examples.labels
    opened = open_backbone(backbone, config.resolution, store, config.seed)
    model = freeze(opened.model).to(place)
    if composition.damping is not None:
        normal_name(tuple(finding.name for finding in examples.findings if finding.trained))  # there must be one
    variants, embed_dim = config.variants(), model.config.embed_dim
    largest = max(variants, key=lambda one: one.blocks)
    if largest.blocks > model.config.depth:
        raise ConfigError(f"blocks: {largest.blocks} of a backbone that has {model.config.depth}.")
    if config.tune.method == "blocks" and config.tune.blocks > model.config.depth:
        raise ConfigError(f"tune.blocks: {config.tune.blocks} of a backbone that has {model.config.depth}.")
    if config.kept_channels is not None and config.kept_channels > embed_dim * largest.blocks:
        raise ConfigError(f"kept_channels: {config.kept_channels} of tokens that have {embed_dim * largest.blocks}.")
    learning = open_learning_set(config, examples, place)
    text_dim = 0 if learning.text is None else learning.text.shape[1]
    heads = [config.describe_head(embed_dim, len(examples.findings), one, text_dim) for one in variants]
    source = FeatureSource(
        store, examples.both, model, preprocessing(opened.preprocess_id), resolution=model.config.image_size,
        blocks=largest.blocks, patches=any(on_meta(head).needs_patches for head in heads),
        augmentation=Augmentation(config.crop_scale, flip=config.flip), cached_views=config.augmented_views,
        cache_dtype=config.cache_dtype, precision=config.precision, workers=config.workers, seed=config.seed,
        device=place, kept_channels=config.kept_channels,
    )  # fmt: skip
    _announce(config, examples, source, opened)
    scaling, prepare, reduction = _prepare_features(config, source, train)

    # Search: every candidate on one pass over the features; scores on validation after every epoch.
    def score(probabilities: Float[np.ndarray, "M C"]) -> float:
        return mean_average_precision(probabilities, labels[val], np.flatnonzero(examples.scored))

    searched = search(config, embed_dim, learning, source, prepare, score, place)
    chosen = choose(
        searched.epochs, variants, train_images=len(train), val_images=len(val), refit_epochs=config.refit_epochs,
        stop_epoch=config.stop_epoch, refit_init=config.refit_init, refit=config.refit,
        deferred_from=config.deferred_from,
    )  # fmt: skip
    for reason in chosen.reasons:
        say(reason)
    number = variants.index(chosen.variant)
    network = _describe(config, opened, examples, heads[number])

    def whole(state: Weights) -> Weights:
        return state if reduction is None else reduction.expand(state, MEMORY_MAP)

    def finished(state: Weights) -> Head:
        head = _load(network.head, state)
        if scaling is not None:
            head.absorb(last_blocks_scaling(scaling, network.head.blocks, embed_dim))
        return head

    # Beyond the frozen backbone, where the settings say so: from the search head on, as long as validation gains.
    found = Tuned(model, whole(searched.states[chosen.epoch, number]))
    tuning: TuneRecord | None = None
    if config.tune.method != "none":
        scaled = preparation(scaling and last_blocks_scaling(scaling, network.head.blocks, embed_dim))
        head = _load(network.head, found.head).to(place)
        found, tuning = tune_on_train(config, model, head, network.head.blocks, learning, source, scaled, score)

    # Calibration: validation as the search head predicts it, through the code path of every prediction.
    search_head = finished(found.head)
    provenance = {"head": "search", "learning_rate": chosen.variant.learning_rate, "epoch": chosen.epoch}
    tuned = Network(network, found.backbone, search_head, place)
    predictions = predict_validation(tuned, examples, config, provenance)
    groups = {finding.name: finding.group for finding in examples.findings}
    trained_on = [uid_numbers(store.uids[train])]
    composition, views = fit_composition(composition, [predictions], labels[val], trained_on)
    calibrators = fit_calibrators([predictions], labels[val], groups, trained_on, composition)

    # Refit on train + val; without one, the search head is the model.
    refit_losses: tuple[float, ...] = ()
    if config.refit:
        last = config.search_epochs + config.classifier_epochs
        initial = searched.states[last, number] if config.refit_init == "warm" else None
        state, refit_losses = refit(
            config, embed_dim, learning, source, prepare, chosen.variant, chosen.refit_epochs,
            chosen.classifier_epochs, initial, place, chosen.second_stage,
        )  # fmt: skip
        found = Tuned(model, whole(state))
        if tuning is not None and tuning.refit_epochs:
            head = _load(network.head, found.head).to(place)
            epochs = tuning.refit_epochs
            found = tune_on_both(config, model, head, network.head.blocks, learning, source, scaled, epochs)
    head = finished(found.head)

    # Files; config.json last.
    out.mkdir(parents=True, exist_ok=True)
    record = SearchRecord(
        SEARCH_FORMAT, "macro average precision per image over findings with a validation positive",
        tuple(name for name, used in zip(examples.names, examples.scored, strict=True) if used), len(train), len(val),
        variants, tuple(searched.epochs), chosen, config.refit_init, refit_losses,
    )  # fmt: skip
    write_json(out / files.SEARCH_NAME, to_dict(record))
    files.write_validation(out, predictions, labels[val])
    exposure = exposure_of(examples, config.refit, opened.seen)
    leak = join_leaks(store.accepted_leak, opened.leak)
    if leak:
        warn(f"leak accepted: {leak}")
    content: dict[str, Any] = {
        "format": files.MODEL_FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        **files.describe(network),
        **composition.describe(),
        **({"learned_views": views.describe()} if views else {}),
        "weights": files.write_weights(out, found.backbone, head),
        "calibration": files.describe_calibrators(calibrators),
        "fitted_on": {
            **provenance,
            "split": "val",
            "images": len(val),
            "uids_sha256": fingerprint(store.uids[val]),
            "store_fingerprint": store.fingerprint(val),
            "file": files.LOGITS_NAME,
        },
        "exposure": files.write_exposure(out, exposure)
        | ({"not_recorded": opened.not_recorded} if opened.not_recorded else {}),
        **screen_inputs(out, examples, config),
        "accepted_leak": leak,
        "training": {
            "settings": to_dict(config),
            "learning_rate": chosen.variant.learning_rate,
            "refit_epochs": chosen.refit_epochs,
            **examples.describe_data(),
            "backbone": opened.provenance,
            "tuning": None if tuning is None else to_dict(tuning),
            "store": {name: store.fingerprint(rows) for name, rows in (("train", train), ("val", val))},
        },
    }
    write_cards(out, content, composition)
    files.write_config(out, content)
    say(f"{out}: {config.head}, {chosen.variant}, validation mAP {chosen.score:.3f} in the search")
    next_step(f"hilum predict {out} {data}:test --out test.parquet")
    return out


def _describe(config: FitConfig, opened: OpenBackbone, examples: Examples, head: HeadConfig) -> files.NetworkConfig:
    return files.NetworkConfig(
        backbone=opened.model.config,
        head=head,
        findings=examples.findings,
        preprocess_id=opened.preprocess_id,
        resolution=opened.model.config.image_size,
        short_side=examples.store.header.get("size"),
        flip_average=config.flip_average,
        precision=config.precision,
    )


def _announce(config: FitConfig, examples: Examples, source: FeatureSource, opened: OpenBackbone) -> None:
    say(
        f"{len(examples.train)} training and {len(examples.val)} validation images, {len(examples.findings)} findings, "
        f"{len(config.variants())} candidates"
    )
    if examples.unused:
        say(f"{examples.unused} images of train and val are left out by the settings (datasets, target, budgets)")
    if len(examples.sources) > 1:
        say(f"Predicted for {examples.sources[0]}; learned from besides: {', '.join(examples.sources[1:])}")
    if source.cache_bytes:
        say(f"Features of {config.augmented_views} augmented views in memory: {source.cache_bytes / 1e9:.2f} GB")
    untrained = [finding.name for finding in examples.findings if not finding.trained]
    if untrained:
        warn(f"{len(untrained)} findings have no positive training image and stay null: {', '.join(untrained)}")
    unscored = [one.name for one, used in zip(examples.findings, examples.scored, strict=True) if one.trained > used]
    if unscored:
        warn(f"{len(unscored)} findings have no positive validation image and decide nothing: {', '.join(unscored)}")
    unlabelled = int((examples.labels[examples.train] < 0).all(axis=1).sum())
    if unlabelled:
        warn(f"{unlabelled} training images have no known label of these findings and teach nothing")
    store = examples.store
    test = store.indices("test")
    met = np.isin(uid_numbers(store.uids[test]), opened.seen.uids)
    met |= np.isin(uid_numbers(store.pictures[test]), opened.seen.pictures)
    if seen := int(met.sum()):
        warn(f"the backbone was pretrained on {seen} test images; a test score would not be one on unseen images")


def _prepare_features(
    config: FitConfig, source: FeatureSource, train: np.ndarray
) -> tuple[Standardisation | None, Prepare, Reduction | None]:
    """Statistics of the training features and how tokens are reduced, None where not asked for; what heads do first."""
    batches = [batch.images for batch in in_order(train, config.batch_size)]
    scaling: Standardisation | None = None
    if config.standardise:
        read = source.evaluation(batches) if config.kept_channels is None else source.computed(EVALUATION, batches)
        scaling = measure(features for _, features in read)
    prepare = preparation(scaling)
    if config.kept_channels is None:
        return scaling, prepare, None
    reduction = fit_reduction(
        (prepare(features) for _, features in source.computed(EVALUATION, batches)), config.kept_channels
    )
    say(f"Patch tokens: {config.kept_channels} directions kept, {reduction.explained:.1%} of their variance")
    source.compaction = Kept(prepare, reduction.to(source.device))
    return scaling, preparation(None), reduction


def _load(config: HeadConfig, state: Weights) -> Head:
    """A head with a copy of these weights: what is trained or folded later is not the original."""
    head = on_meta(config)
    head.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return head
