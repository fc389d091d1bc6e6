"""Search and refit of heads on a frozen backbone: the two loops of the fit protocol, without files and metrics.

Search: all candidates on one pass over the features, judged on validation after every epoch by a score that the caller
gives. Refit: one head on train + val. Either may end with a stage in which the classifier alone learns. Which head, how
long and on what is decided in `protocol.py`; `commands/fit.py` and `commands/extend.py` are built on this. Past 300
lines: two loops over the same parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from scipy.special import expit
from torch import Tensor, nn

from hilum.core.tracking import progress
from hilum.heads.batches import Batch, count_steps, epoch_batches, in_order
from hilum.heads.candidates import Candidate
from hilum.heads.config import FitConfig
from hilum.heads.consistency import with_consistency
from hilum.heads.decoupling import classifier_parameters
from hilum.heads.features import Features, FeatureSource
from hilum.heads.frequencies import count_labels
from hilum.heads.loss_settings import second_stage
from hilum.heads.losses import Loss, Targets, build_loss, known_targets
from hilum.heads.protocol import SearchEpoch, Variant, survivors
from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.sources import SourceBiased, plain_state, weigh_sources
from hilum.heads.sweep import Sweep, prior_log_odds

Weights = dict[str, Tensor]
Prepare = Callable[[Features], Features]
Score = Callable[[Float[np.ndarray, "M C"]], float]
"""Probabilities of the validation images, in the order of `LearningSet.val` -> how good they are."""


@dataclass(frozen=True)
class LearningSet:
    """What heads learn from and are judged on; arrays have one row per image of the store."""

    train: Int64[np.ndarray, " n"]
    """Store indices."""
    val: Int64[np.ndarray, " m"]
    """Store indices."""
    labels: Int[np.ndarray, "N C"]
    """Codes; unknown outside train and val."""
    soft: tuple[Float32[np.ndarray, "N C"], Float32[np.ndarray, "N C"]] | None = None
    """Values and weights that training images have in place of their labels (pseudo-labels)."""
    studies: Int64[np.ndarray, " N"] | None = None
    """Study of each image; given where batches must hold whole studies."""
    views: Int64[np.ndarray, " N"] | None = None
    """Position in `VIEW_KINDS` of each image."""
    sources: Int64[np.ndarray, " N"] | None = None
    """Number of each image's dataset, 0 the target; given where sources are told apart."""
    source_weights: Float32[np.ndarray, " S"] | None = None
    """How much an image of each source counts."""
    text: Float[Tensor, "C T"] | None = None
    """A vector for each finding, for queries made from text."""

    @property
    def both(self) -> Int64[np.ndarray, " k"]:
        """Store indices of train and val."""
        return np.concatenate([self.train, self.val])

    def targets(self, batch: Batch, features: Features) -> Targets:
        """What the images of a batch are to be, on the device of their features."""
        device = features.cls.device
        if self.soft is None:
            labels = torch.from_numpy(self.labels[batch.images]).to(device)
            targets = known_targets(labels, features.study)
        else:
            values, weights = (torch.from_numpy(part[batch.images]).to(device) for part in self.soft)
            targets = Targets(values, weights, features.study)
        if self.source_weights is None or self.sources is None:
            return targets
        source = torch.from_numpy(self.sources[batch.images]).to(device)
        weights = torch.from_numpy(self.source_weights).to(device)
        return weigh_sources(targets, source, weights)


@dataclass
class Search:
    """The course of a search, and the weights that may be chosen from it."""

    epochs: list[SearchEpoch] = field(default_factory=list)
    states: dict[tuple[int, int], Weights] = field(default_factory=dict)
    """By (epoch from 1, position of the candidate)."""


def search(
    config: FitConfig,
    embed_dim: int,
    data: LearningSet,
    source: FeatureSource,
    prepare: Prepare,
    score: Score,
    device: torch.device,
) -> Search:
    """Train every candidate of the settings side by side on train; judge on val after every epoch.

    Args:
        config: settings; `variants()` are tried.
        embed_dim: D of the backbone.
        data: what to learn from.
        source: features of train and val, of the largest number of blocks.
        prepare: what features go through before a head sees them.
        score: of validation probabilities, in the order of `data.val`.
        device: where heads live.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved.
    """
    variants = config.variants()
    found, alive = Search(), list(range(len(variants)))
    keeper = _Keeper(config, len(variants), found.states)
    steps = -(-len(data.train) // config.batch_size)
    held_out = in_order(data.val, config.batch_size, data.studies)
    order = np.argsort(np.concatenate([batch.images for batch in held_out]), kind="stable")
    place_of_val = order[np.searchsorted(np.concatenate([batch.images for batch in held_out])[order], data.val)]
    stages: list[tuple[Literal["whole", "classifier"], int]] = [("whole", config.search_epochs)]
    if config.classifier_epochs:
        stages.append(("classifier", config.classifier_epochs))
    with progress("search", sum(epochs for _, epochs in stages) * steps, "steps") as bar:
        sweep: Sweep | None = None
        for stage, epochs in stages:
            settings = config if stage == "whole" else replace(config, sampling="class_aware")
            heads = [_candidate(config, embed_dim, data, variants[place]) for place in alive]
            initial = None if sweep is None else [sweep.state(place) for place in range(len(alive))]
            phase = f"search{_suffix(stage)}"
            total = _count(epochs, settings, phase, data.train, data)
            sweep = _sweep(settings, heads, total, data, phase, device, initial, stage == "classifier")
            drawn = _epochs(settings, phase, data.train, data)
            for number in range(epochs):
                epoch = len(found.epochs)
                _defer(config, sweep, data, stage == "classifier" or number / epochs >= config.deferred, device)
                losses = []
                for batch, features in _features(source, epoch, next(drawn), data, prepare):
                    losses.append(sweep.step(features, data.targets(batch, features)))
                    bar.advance()
                logits = torch.cat(
                    [sweep.logits(features) for _, features in _features(source, None, held_out, data, prepare)], dim=1
                )
                scores = [score(expit(values.double().numpy())[place_of_val]) for values in logits]
                found.epochs.append(
                    SearchEpoch(
                        epoch + 1, _spread(scores, alive, len(variants)),
                        _spread(np.mean(losses, axis=0).tolist(), alive, len(variants)), stage,
                    )
                )  # fmt: skip
                bar.note(f"validation mAP {max(scores):.3f}")
                for place, value in enumerate(scores):
                    if keeper.wants(epoch + 1, alive[place], value):
                        keeper.keep(epoch + 1, alive[place], value, plain_state(sweep.state(place)))
                if epoch + 1 in config.prune_after and len(alive) > 1:
                    kept = survivors(scores, [variants[place] for place in alive])
                    sweep.keep(kept)
                    alive = [alive[place] for place in kept]
    return found


def refit(
    config: FitConfig,
    embed_dim: int,
    data: LearningSet,
    source: FeatureSource,
    prepare: Prepare,
    variant: Variant,
    epochs: int,
    classifier_epochs: int,
    initial: Weights | None,
    device: torch.device,
    second_stage: int | None = None,
) -> tuple[Weights, tuple[float, ...]]:
    """One head on train + val; its cosine is laid out for `refit_epochs`, whatever number of epochs it runs.

    Args:
        config: settings.
        embed_dim: D of the backbone.
        data: what to learn from.
        source: features of train and val.
        prepare: what features go through before the head sees them.
        variant: which head.
        epochs: to run of the whole head.
        classifier_epochs: to run after that of the classifier alone, on a cosine of its own.
        initial: start from these weights; None: from the seed's.
        device: where the head lives.
        second_stage: epochs of the whole head before the second stage of the loss; None: it does not enter it.

    Returns:
        the weights, and the mean loss of a step in each epoch.
    """
    head = _candidate(config, embed_dim, data, variant)
    steps = -(-len(data.both) // config.batch_size)
    course: list[float] = []
    stages: list[tuple[Literal["whole", "classifier"], int, int]] = [("whole", epochs, config.refit_epochs)]
    if classifier_epochs:
        stages.append(("classifier", classifier_epochs, classifier_epochs))
    state = initial
    with progress("refit", (epochs + classifier_epochs) * steps, "steps") as bar:
        for stage, run, horizon in stages:
            settings = config if stage == "whole" else replace(config, sampling="class_aware")
            phase = f"refit{_suffix(stage)}"
            before = None if state is None else [state]
            total = _count(horizon, settings, phase, data.both, data)
            sweep = _sweep(settings, [head], total, data, phase, device, before, stage == "classifier")
            drawn = _epochs(settings, phase, data.both, data)
            for number in range(run):
                losses = []
                second = stage == "classifier" or (second_stage is not None and number >= second_stage)
                _defer(config, sweep, data, second, device)
                view = config.search_epochs + config.classifier_epochs + len(course)
                for batch, features in _features(source, view, next(drawn), data, prepare):
                    losses.append(sweep.step(features, data.targets(batch, features)))
                    bar.advance()
                course.append(float(np.mean(losses)))
            state = sweep.state(0)
    assert state is not None
    return plain_state(state), tuple(course)


def _candidate(config: FitConfig, embed_dim: int, data: LearningSet, variant: Variant) -> Candidate:
    text_dim = 0 if data.text is None else data.text.shape[1]
    head = config.describe_searched_head(embed_dim, data.labels.shape[1], variant, text_dim)
    return Candidate(head, variant.learning_rate)


def _sweep(
    config: FitConfig,
    candidates: Sequence[Candidate],
    total_steps: int,
    data: LearningSet,
    phase: str,
    device: torch.device,
    initial: Sequence[Weights] | None,
    classifier: bool,
) -> Sweep:
    sources = 0 if data.sources is None or not config.source_bias else int(data.sources.max()) + 1

    def build(head: HeadConfig) -> nn.Module:
        made = build_head(head, data.text)
        return SourceBiased(made, sources) if sources > 1 else made

    return Sweep(
        candidates, total_steps, loss=training_loss(config, data, device),
        weight_decay=config.weight_decay, seed=config.seed, phase=phase, device=device, precision=config.precision,
        bias=starting_bias(config, data.labels[data.train]), initial=initial,
        ema=config.ema, build=build, trainable=classifier_parameters if classifier else None,
    )  # fmt: skip


def starting_bias(config: FitConfig, labels: Int[np.ndarray, "N C"]) -> Float[Tensor, " C"] | None:
    """Where the heads' biases start by `prior_bias`; None: at 0.

    `logit_adjusted` adds the prior to the logits itself, so that the bias starts without it.

    Args:
        config: settings.
        labels: of the training images, as stores code them.
    """
    if not config.prior_bias:
        return None
    bias, settings = prior_log_odds(labels), config.describe_loss()
    if settings.name == "logit_adjusted":
        bias = bias - settings.logit_adjusted.tau * count_labels(labels).log_odds
    return bias


def training_loss(config: FitConfig, data: LearningSet, device: torch.device, deferred: bool = False) -> Loss:
    """The loss of the settings; frequencies of findings are those of the training split, in the refit too."""
    settings = config.describe_loss()
    frequencies = count_labels(data.labels[data.train]).to(device)
    loss = build_loss(second_stage(settings) if deferred else settings, frequencies)
    if not config.consistency:
        return loss
    return with_consistency(loss, config.consistency, reduction=settings.reduced)


def _defer(config: FitConfig, sweep: Sweep, data: LearningSet, second: bool, device: torch.device) -> None:
    if config.deferred < 1:
        sweep.loss = training_loss(config, data, device, deferred=second)


def _epochs(config: FitConfig, phase: str, images: np.ndarray, data: LearningSet) -> Iterator[list[Batch]]:
    return epoch_batches(config, phase, images, data.labels[images], data.labels[data.train], data.studies)


def _count(epochs: int, config: FitConfig, phase: str, images: np.ndarray, data: LearningSet) -> int:
    return count_steps(epochs, config, phase, images, data.labels[images], data.labels[data.train], data.studies)


def _features(
    source: FeatureSource, epoch: int | None, batches: Sequence[Batch], data: LearningSet, prepare: Prepare
) -> Iterator[tuple[Batch, Features]]:
    """Features of batches, of a training epoch's view or (None) of the centre crops."""
    indices = [batch.images for batch in batches]
    found = source.evaluation(indices) if epoch is None else source.training(epoch, indices)
    for batch, (_, features) in zip(batches, found, strict=True):
        yield batch, batch.attach(prepare(features), data.views, data.sources)


def head_weights(head: nn.Module) -> Weights:
    """A copy of a head's weights, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}


def _suffix(stage: str) -> str:
    return "" if stage == "whole" else f" {stage}"


def _spread(values: Sequence[float], alive: Sequence[int], count: int) -> tuple[float | None, ...]:
    """Values of the candidates that are left, None for the others."""
    found: list[float | None] = [None] * count
    for place, value in zip(alive, values, strict=True):
        found[place] = value
    return tuple(found)


class _Keeper:
    """Keeps the weights that `protocol.choose` may ask for: at stop_epoch, at each one's best epoch, at the last."""

    def __init__(self, config: FitConfig, candidates: int, states: dict[tuple[int, int], Weights]) -> None:
        self.fixed = {config.stop_epoch, config.search_epochs + config.classifier_epochs}
        self.best: list[tuple[float, int] | None] = [None] * candidates
        self.states = states

    def wants(self, epoch: int, place: int, score: float) -> bool:
        before = self.best[place]
        return before is None or score > before[0] or epoch in self.fixed

    def keep(self, epoch: int, place: int, score: float, state: Weights) -> None:
        before = self.best[place]
        self.states[epoch, place] = state
        if before is None or score > before[0]:
            if before is not None and before[1] not in self.fixed:
                self.states.pop((before[1], place))
            self.best[place] = (score, epoch)
