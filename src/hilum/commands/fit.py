"""`hilum fit`: a store and a frozen backbone in, a calibrated MODEL out. The protocol, from top to bottom.

Search: one head per learning rate on one pass over the features; selection on validation. Calibrate: on validation
predictions of the search head, which has not seen validation. Refit: one head at the chosen rate on train + val.
Labels of the test split are not read, and without a validation split nothing is fitted: nothing is chosen on test.
A little past 300 lines: the protocol, which is read as a whole.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import expit

import hilum
from hilum.commands.fit_inputs import Examples, OpenBackbone, open_backbone, open_examples
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError
from hilum.core.files import write_json, write_text
from hilum.core.tracking import next_step, progress, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.transforms import preprocessing
from hilum.deploy import model_files as files
from hilum.deploy.card import model_card
from hilum.deploy.network import Network, choose_device, raw_probabilities, store_identity
from hilum.deploy.out_of_sample import fit_calibrators
from hilum.evaluation.calibration import fingerprint
from hilum.evaluation.definitions import average_precision
from hilum.evaluation.predictions import Predictions
from hilum.heads.config import FitConfig
from hilum.heads.features import Augmentation, Features, FeatureSource, freeze
from hilum.heads.orders import epoch_orders
from hilum.heads.protocol import Choice, SearchEpoch, SearchRecord, choose
from hilum.heads.registry import Head, HeadConfig, build_head
from hilum.heads.standardise import measure
from hilum.heads.sweep import Sweep, prior_log_odds
from hilum.pretraining.exposure import join_leaks, uid_numbers

SEARCH_FORMAT = "hilum-search-1"


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
        ConfigError: no validation split, nothing to learn or to select on, or settings that do not fit the backbone.
        LeakageError: a patient in two splits.
        PreprocessingMismatchError: the store was built for another recipe than the backbone's.
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved.
    """
    data, out = Path(data), Path(out)
    files.require_new(out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = choose_device(device)

    # Images and labels of train and val, and the features that a frozen backbone gives.
    examples = open_examples(data, config.findings)
    store, train, val, labels = examples.store, examples.train, examples.val, examples.labels
    opened = open_backbone(backbone, config.resolution, store, config.seed)
    network = _describe(config, opened, examples)
    model = freeze(opened.model).to(place)
    source = FeatureSource(
        store, examples.both, model, preprocessing(network.preprocess_id), resolution=network.resolution,
        blocks=config.blocks, patches=_on_meta(network.head).needs_patches,
        augmentation=Augmentation(config.crop_scale, flip=config.flip), cached_views=config.augmented_views,
        cache_dtype=config.cache_dtype, precision=config.precision, workers=config.workers, seed=config.seed,
        device=place,
    )  # fmt: skip
    _announce(config, examples, source, opened)
    scaling = measure(features for _, features in source.evaluation(_batches(train, config.batch_size)))
    prepare = scaling.apply if config.standardise else _unchanged

    # Search: every rate on one pass over the features; scores on validation after every epoch.
    def score(probabilities: Float[np.ndarray, "N C"]) -> float:
        columns = np.flatnonzero(examples.scored)
        values = [average_precision(probabilities[:, column], labels[val][:, column]) for column in columns]
        return float(np.mean([value for value in values if value is not None]))

    epochs, states = _search(config, network.head, source, prepare, examples, score, place)
    chosen = choose(
        np.array([epoch.scores for epoch in epochs]), config.learning_rates, train_images=len(train),
        val_images=len(val), refit_epochs=config.refit_epochs, stop_epoch=config.stop_epoch,
        refit_init=config.refit_init,
    )  # fmt: skip
    for reason in chosen.reasons:
        say(reason)

    # Calibration: validation as the search head predicts it, through the code path of every prediction.
    search_head = _on_meta(network.head)
    search_head.load_state_dict(states[chosen.epoch, chosen.learning_rate], assign=True)
    if config.standardise:
        search_head.absorb(scaling)
    provenance = {"head": "search", "learning_rate": chosen.learning_rate, "epoch": chosen.epoch}
    predictions = _predict_validation(Network(network, model, search_head, place), examples, config, provenance)
    groups = {finding.name: finding.group for finding in examples.findings}
    calibrators = fit_calibrators([predictions], labels[val], groups, [uid_numbers(store.uids[train])])

    # Refit on train + val.
    initial = states[config.search_epochs, chosen.learning_rate] if config.refit_init == "warm" else None
    head, refit_losses = _refit(config, network.head, source, prepare, examples, chosen, initial, place)
    if config.standardise:
        head.absorb(scaling)

    # Files; config.json last.
    out.mkdir(parents=True, exist_ok=True)
    record = SearchRecord(
        SEARCH_FORMAT, "macro average precision per image over findings with a validation positive",
        tuple(name for name, used in zip(examples.names, examples.scored, strict=True) if used), len(train), len(val),
        config.learning_rates, epochs, chosen, config.refit_init, refit_losses,
    )  # fmt: skip
    write_json(out / files.SEARCH_NAME, to_dict(record))
    files.write_validation(out, predictions, labels[val])
    pictures = np.union1d(opened.seen.pictures, uid_numbers(store.pictures[examples.both]))
    exposure = files.Exposure(opened.seen.uids, uid_numbers(store.uids[train]), uid_numbers(store.uids[val]), pictures)
    leak = join_leaks(store.accepted_leak, opened.leak)
    if leak:
        warn(f"leak accepted: {leak}")
    content: dict[str, Any] = {
        "format": files.MODEL_FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        **files.describe(network),
        "weights": files.write_weights(out, model, head),
        "calibration": files.describe_calibrators(calibrators),
        "fitted_on": {
            **provenance,
            "split": "val",
            "images": len(val),
            "uids_sha256": fingerprint(store.uids[val]),
            "store_fingerprint": store.fingerprint(val),
            "file": files.LOGITS_NAME,
        },
        "exposure": files.write_exposure(out, exposure),
        "accepted_leak": leak,
        "training": {
            "settings": to_dict(config),
            "learning_rate": chosen.learning_rate,
            "refit_epochs": chosen.refit_epochs,
            "backbone": opened.provenance,
            "store": {name: store.fingerprint(rows) for name, rows in (("train", train), ("val", val))},
        },
    }
    write_text(out / files.CARD_NAME, model_card(content))
    files.write_config(out, content)
    say(f"{out}: {config.head} at rate {chosen.learning_rate:g}, validation mAP {chosen.score:.3f} in the search")
    next_step(f"hilum predict {out} {data}:test --out test.parquet")
    return out


def _describe(config: FitConfig, opened: OpenBackbone, examples: Examples) -> files.NetworkConfig:
    backbone = opened.model.config
    if config.blocks > backbone.depth:
        raise ConfigError(f"blocks: {config.blocks} of a backbone that has {backbone.depth}.")
    return files.NetworkConfig(
        backbone=backbone,
        head=config.describe_head(backbone.embed_dim, len(examples.findings)),
        findings=examples.findings,
        preprocess_id=opened.preprocess_id,
        resolution=backbone.image_size,
        short_side=examples.store.header.get("size"),
        flip_average=config.flip_average,
        precision=config.precision,
    )


def _on_meta(config: HeadConfig) -> Head:
    """A head without weights."""
    with torch.device("meta"):
        return build_head(config)


def _announce(config: FitConfig, examples: Examples, source: FeatureSource, opened: OpenBackbone) -> None:
    say(
        f"{len(examples.train)} training and {len(examples.val)} validation images, {len(examples.findings)} findings, "
        f"{len(config.learning_rates)} learning rates"
    )
    if source.cache_bytes:
        say(f"Features of {config.augmented_views} augmented views in memory: {source.cache_bytes / 1e9:.2f} GB")
    untrained = [finding.name for finding in examples.findings if not finding.trained]
    if untrained:
        warn(f"{len(untrained)} findings have no positive training image and stay null: {', '.join(untrained)}")
    test = examples.store.uids[examples.store.indices("test")]
    if seen := int(np.isin(uid_numbers(test), opened.seen).sum()):
        warn(f"the backbone was pretrained on {seen} test images; a test score would not be one on unseen images")


def _bias(config: FitConfig, examples: Examples) -> torch.Tensor | None:
    return prior_log_odds(examples.labels[examples.train]) if config.prior_bias else None


def _unchanged(features: Features) -> Features:
    return features


def _batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


Weights = dict[str, torch.Tensor]


def _search(
    config: FitConfig,
    head: HeadConfig,
    source: FeatureSource,
    prepare: Callable[[Features], Features],
    examples: Examples,
    score: Callable[[np.ndarray], float],
    device: torch.device,
) -> tuple[tuple[SearchEpoch, ...], dict[tuple[int, float], Weights]]:
    """Train one head per rate; returns the course, and by (epoch, rate) the weights that may be chosen."""
    steps = -(-len(examples.train) // config.batch_size)
    sweep = Sweep(
        head, config.learning_rates, config.search_epochs * steps, loss=config.loss, weight_decay=config.weight_decay,
        seed=config.seed, phase="search", device=device, precision=config.precision,
        bias=_bias(config, examples),
    )  # fmt: skip
    course: list[SearchEpoch] = []
    states: dict[tuple[int, float], Weights] = {}
    best: dict[float, tuple[float, int]] = {}
    train_labels = examples.labels[examples.train]
    orders = epoch_orders(config, "search", examples.train, train_labels, train_labels)
    with progress("search", config.search_epochs * steps, "steps") as bar:
        for epoch in range(config.search_epochs):
            losses = []
            for indices, features in source.training(epoch, _batches(next(orders), config.batch_size)):
                losses.append(sweep.step(prepare(features), torch.from_numpy(examples.labels[indices])))
                bar.advance()
            held_out = source.evaluation(_batches(examples.val, config.batch_size))
            logits = torch.cat([sweep.logits(prepare(features)) for _, features in held_out], dim=1)
            scores = [score(expit(values.double().numpy())) for values in logits]
            course.append(SearchEpoch(epoch + 1, tuple(scores), tuple(np.mean(losses, axis=0).tolist())))
            bar.note(f"validation mAP {max(scores):.3f}")
            _keep(config, epoch + 1, scores, sweep, states, best)
    return tuple(course), states


def _keep(
    config: FitConfig,
    epoch: int,
    scores: list[float],
    sweep: Sweep,
    states: dict[tuple[int, float], Weights],
    best: dict[float, tuple[float, int]],
) -> None:
    """Keep the weights that `protocol.choose` may ask for: at stop_epoch, at each rate's best epoch, at the last."""
    for rate, value in zip(sweep.rates, scores, strict=True):
        better = rate not in best or value > best[rate][0]
        if better and rate in best and best[rate][1] != config.stop_epoch:
            states.pop((best[rate][1], rate))
        if better or epoch in (config.stop_epoch, config.search_epochs):
            states[epoch, rate] = sweep.state(rate)
        if better:
            best[rate] = (value, epoch)


def _predict_validation(
    network: Network, examples: Examples, config: FitConfig, provenance: dict[str, Any]
) -> Predictions:
    val = examples.val
    with progress("validation", len(val), "images") as bar:
        [values], _ = raw_probabilities(
            [network], val, examples.store.read, config.batch_size, config.workers, bar.advance
        )
    groups = {finding.name: finding.group for finding in examples.findings}
    facts = {"split": "val", "head_splits": ["train"], "groups": groups, **provenance}
    return Predictions(
        **store_identity(examples.store, val), findings=network.findings, probabilities=values, metadata=facts
    )


def _refit(
    config: FitConfig,
    head: HeadConfig,
    source: FeatureSource,
    prepare: Callable[[Features], Features],
    examples: Examples,
    chosen: Choice,
    initial: Weights | None,
    device: torch.device,
) -> tuple[Head, tuple[float, ...]]:
    """One head on train + val; its cosine is laid out for `refit_epochs`, whatever number of epochs it runs."""
    steps = -(-len(examples.both) // config.batch_size)
    sweep = Sweep(
        head, (chosen.learning_rate,), config.refit_epochs * steps, loss=config.loss,
        weight_decay=config.weight_decay, seed=config.seed, phase="refit", device=device, precision=config.precision,
        bias=_bias(config, examples), initial=initial,
    )  # fmt: skip
    course = []
    labels, train_labels = examples.labels[examples.both], examples.labels[examples.train]
    orders = epoch_orders(config, "refit", examples.both, labels, train_labels)
    with progress("refit", chosen.refit_epochs * steps, "steps") as bar:
        for epoch in range(chosen.refit_epochs):
            losses, order = [], next(orders)
            for indices, features in source.training(config.search_epochs + epoch, _batches(order, config.batch_size)):
                losses.append(sweep.step(prepare(features), torch.from_numpy(examples.labels[indices])))
                bar.advance()
            course.append(float(np.mean(losses)))
    fitted = _on_meta(head)
    fitted.load_state_dict(sweep.state(chosen.learning_rate), assign=True)
    return fitted, tuple(course)
