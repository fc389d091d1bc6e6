"""The part of `fit` beyond a frozen backbone: tune after the search, stop where validation was best, tune again.

Epoch 0 is the network as it was before, so tuning that does not help is not taken. The number of epochs is chosen on
validation with a network that learns from train alone; the refit then tunes as long, scaled by the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from scipy.special import expit

from hilum.backbones.vit import VisionTransformer
from hilum.core.tracking import progress, say
from hilum.heads.batches import Batch, count_steps, epoch_batches, in_order
from hilum.heads.config import FitConfig
from hilum.heads.features import FeatureSource, extract
from hilum.heads.registry import Head
from hilum.heads.training import LearningSet, Prepare, Score, Weights, head_weights, training_loss
from hilum.heads.tuning import Tuner, merge, unfreeze


@dataclass(frozen=True)
class TuneEpoch:
    """One epoch of tuning; epoch 0 is the network before."""

    epoch: int
    score: float
    """Macro average precision on validation, after the epoch."""
    loss: float | None
    """Mean training loss of a step, during the epoch."""


@dataclass(frozen=True)
class TuneRecord:
    """`tuning` of `config.json`."""

    method: str
    epochs: tuple[TuneEpoch, ...]
    chosen: int
    """Epoch whose weights predict validation for calibration; 0: tuning did not help, and the backbone stays."""
    refit_epochs: int
    parameters: int
    """Numbers that were trained, the head's among them."""


@dataclass(frozen=True)
class Tuned:
    """A network after tuning."""

    backbone: VisionTransformer
    """Frozen; low-rank updates added in."""
    head: Weights


def tune_on_train(
    config: FitConfig,
    backbone: VisionTransformer,
    head: Head,
    blocks: int,
    data: LearningSet,
    source: FeatureSource,
    prepare: Prepare,
    score: Score,
) -> tuple[Tuned, TuneRecord]:
    """Tune on train and keep the epoch that was best on val, the first of equals.

    Args:
        config: settings; `tune` says how.
        backbone: frozen.
        head: the search head, reading what `prepare` gives; trained in place.
        blocks: n, last blocks that it reads.
        data: what to learn from.
        source: crops of train and val.
        prepare: what features go through before the head sees them.
        score: of validation probabilities, in the order of `data.val`.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved.
    """
    settings = config.tune
    before = Tuned(backbone, head_weights(head))
    kept, record = before, [TuneEpoch(0, _validate(config, backbone, head, blocks, data, source, prepare, score), None)]
    tuned = unfreeze(backbone, settings, config.seed, "tune")
    steps = -(-len(data.train) // settings.batch_size)
    tuner = Tuner(
        settings, tuned, head, blocks, source, _count(config, "tune", data.train, data), precision=config.precision,
        seed=config.seed, phase="tune",
    )  # fmt: skip
    loss = training_loss(config, data, source.device, deferred=config.deferred < 1)
    with progress("tuning", settings.epochs * steps, "steps") as bar:
        for number, batches in _epochs(config, "tune", data.train, data, settings.epochs):
            value = tuner.epoch(_view(config, number), batches, data, prepare, loss, bar)
            reached = _validate(config, tuned, head, blocks, data, source, prepare, score)
            bar.note(f"validation mAP {reached:.3f}")
            if reached > max(epoch.score for epoch in record):
                kept = Tuned(merge(tuned), head_weights(head))
            record.append(TuneEpoch(number, reached, value))
    chosen = max(record, key=lambda epoch: (epoch.score, -epoch.epoch)).epoch
    share = len(data.train) / (len(data.train) + len(data.val))
    refit_epochs = max(round(chosen * share), 1) if chosen and config.refit else 0
    parameters = sum(parameter.numel() for group in tuner.groups for parameter in group["params"])
    if chosen == 0:
        say(f"tuning ({settings.method}) did not help on validation; the backbone stays as it was")
    else:
        gain = record[chosen].score - record[0].score
        say(f"tuning ({settings.method}): validation mAP {gain:+.3f} after epoch {chosen}")
    return kept, TuneRecord(settings.method, tuple(record), chosen, refit_epochs, parameters)


def tune_on_both(
    config: FitConfig,
    backbone: VisionTransformer,
    head: Head,
    blocks: int,
    data: LearningSet,
    source: FeatureSource,
    prepare: Prepare,
    epochs: int,
) -> Tuned:
    """Tune the refit network on train + val for a number of epochs that is fixed; no score is looked at."""
    settings = config.tune
    tuned = unfreeze(backbone, settings, config.seed, "tune refit")
    steps = -(-len(data.both) // settings.batch_size)
    tuner = Tuner(
        settings, tuned, head, blocks, source, _count(config, "tune refit", data.both, data),
        precision=config.precision, seed=config.seed, phase="tune refit",
    )  # fmt: skip
    loss = training_loss(config, data, source.device, deferred=config.deferred < 1)
    with progress("tuning, train + val", epochs * steps, "steps") as bar:
        for number, batches in _epochs(config, "tune refit", data.both, data, epochs):
            tuner.epoch(_view(config, config.tune.epochs + number), batches, data, prepare, loss, bar)
    return Tuned(merge(tuned), head_weights(head))


def _view(config: FitConfig, number: int) -> int:
    """Augmented views that neither search nor refit has used."""
    return config.search_epochs + 2 * config.classifier_epochs + config.refit_epochs + number


def _epochs(
    config: FitConfig, phase: str, images: np.ndarray, data: LearningSet, epochs: int
) -> Iterator[tuple[int, list[Batch]]]:
    """(number of the epoch from 1, its batches)."""
    drawn = epoch_batches(
        config, phase, images, data.labels[images], data.labels[data.train], data.studies, config.tune.batch_size
    )
    return enumerate(islice(drawn, epochs), 1)


def _count(config: FitConfig, phase: str, images: np.ndarray, data: LearningSet) -> int:
    """Steps of the whole cosine."""
    return count_steps(
        config.tune.epochs, config, phase, images, data.labels[images], data.labels[data.train], data.studies,
        config.tune.batch_size,
    )  # fmt: skip


@torch.no_grad()
def _validate(
    config: FitConfig,
    backbone: VisionTransformer,
    head: Head,
    blocks: int,
    data: LearningSet,
    source: FeatureSource,
    prepare: Prepare,
    score: Score,
) -> float:
    rows: list[np.ndarray] = []
    batches: list[Batch] = in_order(data.val, config.tune.batch_size, data.studies)
    crops = source.squares(-1, [batch.images for batch in batches])
    for batch, (_, images) in zip(batches, crops, strict=True):
        tokens = extract(backbone, images, source.recipe, blocks, source.patches, config.precision)
        features = batch.attach(prepare(tokens), data.views, data.sources)
        with torch.autocast(source.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            rows.append(head(features).float().cpu().numpy())
    seen = np.concatenate([batch.images for batch in batches])
    order = np.argsort(seen, kind="stable")
    logits = np.concatenate(rows)[order][np.searchsorted(seen[order], data.val)]
    return score(expit(logits.astype(np.float64)))
