"""Ways to learn new findings beside a trained head, tried side by side on one pass over the backbone.

The ladder of freedom: `rows` (a query and an output row for each finding; all else is the model's), `adapter` (also
norms and biases, in copies of their own), `copy` (a whole head, from where the model's is), `own` (a whole head, from
the seed). Validation chooses; of equals the one with fewer weights to learn, and a copy before a new one. What is taken
over is never changed, so that the model's own outputs stay as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import forked
from hilum.core.tracking import progress
from hilum.core.types import POSITIVE
from hilum.data.labels import IMPLIES
from hilum.evaluation.definitions import mean_average_precision
from hilum.heads.batches import Batch, count_steps, epoch_batches, in_order
from hilum.heads.config import FitConfig
from hilum.heads.extension import grown_state, norms_and_biases, per_finding
from hilum.heads.features import Features, FeatureSource
from hilum.heads.frequencies import count_labels
from hilum.heads.losses import build_loss
from hilum.heads.protocol import Choice, SearchEpoch, Variant, choose
from hilum.heads.registry import Head, HeadConfig, build_head, on_meta
from hilum.heads.standardise import Standardisation
from hilum.heads.sweep import Candidate, Sweep
from hilum.heads.training import LearningSet, Weights, starting_bias

LADDER = ("rows", "adapter", "copy", "own")


@dataclass(frozen=True)
class Rung:
    """One way to learn the new findings."""

    name: str
    head: HeadConfig
    initial: Weights | None
    """Where training starts, as a head of raw features; None: from the seed."""
    trainable: tuple[str, ...] | None
    """Parameters that move; None: all."""
    standardise: bool
    """Whether features are standardised first: only where no tensor is shared that reads raw ones."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Tensors that stay the first head's own."""
        if self.initial is None or self.trainable is None:
            return ()
        return tuple(name for name in self.initial if name not in self.trainable)

    @property
    def trained_weights(self) -> int:
        """How many numbers are learned."""
        shapes = {name: value.numel() for name, value in on_meta(self.head).named_parameters() if value.requires_grad}
        return sum(count for name, count in shapes.items() if self.trainable is None or name in self.trainable)


def make_ladder(
    config: FitConfig, embed_dim: int, main: HeadConfig, trained: Head, names: Sequence[str], old: Sequence[str],
    bias: Tensor | None, wanted: Sequence[str] = LADDER,
) -> tuple[Rung, ...]:  # fmt: skip
    """The rungs that are possible for a head, lowest first.

    Args:
        config: settings of the extension.
        embed_dim: D of the backbone.
        main: description of the model's first head.
        trained: the first head.
        names: new findings.
        old: findings of the first head, in order; a new finding whose parent (data/facts/labels/hierarchy.csv) is among
            them starts from the parent's query and row.
        bias: (C,) where biases start; None: 0, or the parent's.
        wanted: rungs to try.

    Raises:
        UnknownNameError: no such rung.
        ConfigError: none of the wanted rungs is possible.
    """
    for name in wanted:
        if name not in LADDER:
            raise UnknownNameError("rung", name, LADDER)
    own = config.describe_head(embed_dim, len(names))
    rungs = []
    if _same_architecture(own, main):
        axes = per_finding(own)
        with forked(config.seed, "head initialisation"):
            fresh = build_head(own)
        shared = [name for name in fresh.state_dict() if name not in axes]
        if shared:
            parents = {
                number: old.index(parent)
                for number, name in enumerate(names) for parent in IMPLIES.get(name, ())[:1] if parent in old
            }  # fmt: skip
            fresh.load_state_dict(grown_state(fresh.state_dict(), trained.state_dict(), axes, parents))
            if bias is not None:
                fresh.bias.data.copy_(bias)
            initial = {name: value.detach().cpu().clone() for name, value in fresh.state_dict().items()}
            rows = tuple(axes)
            rungs.append(Rung("rows", own, initial, rows, False))
            rungs.append(Rung("adapter", own, initial, (*rows, *norms_and_biases(shared)), False))
            rungs.append(Rung("copy", own, initial, None, config.standardise))
    rungs.append(Rung("own", own, None, None, config.standardise))
    kept = tuple(rung for rung in rungs if rung.name in wanted)
    if not kept:
        raise ConfigError(
            f"None of {', '.join(wanted)} is possible for this head ({main.name}), of which nothing can be taken over "
            f"with these settings. Possible: {', '.join(rung.name for rung in rungs)}."
        )
    return kept


def _same_architecture(own: HeadConfig, main: HeadConfig) -> bool:
    """Whether the two differ in nothing but what belongs to each finding: its query and its output row."""
    return main == replace(
        own, findings=main.findings, learnable_queries=main.learnable_queries, dropout=main.dropout,
        text_dim=main.text_dim, shared_output=main.shared_output,
    )  # fmt: skip


@dataclass
class LadderSearch:
    """The course of every rung, and what was chosen."""

    courses: dict[str, tuple[SearchEpoch, ...]] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    states: dict[str, Weights] = field(default_factory=dict)
    """By rung: weights of the chosen rate and epoch, which have not seen validation."""
    best: str = ""
    """The rung with the highest score."""


def search(
    config: FitConfig, rungs: Sequence[Rung], data: LearningSet, source: FeatureSource,
    scaling: Standardisation | None, device: torch.device,
) -> LadderSearch:  # fmt: skip
    """Every rate of every rung on one pass over the features; judged on validation after every epoch.

    Args:
        config: rates, epochs, loss.
        rungs: what is tried.
        data: images and labels.
        source: features of train and val.
        scaling: for rungs that standardise.
        device: where heads live.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved.
    """
    variants = config.variants()
    steps = -(-len(data.train) // config.batch_size)
    rates = [one.learning_rate for one in variants]
    total = _count(config.search_epochs, config, "search", data.train, data)
    sweeps = [_sweep(config, rung, rates, total, data, "search", scaling, device) for rung in rungs]
    drawn = epoch_batches(config, "search", data.train, data.labels[data.train], data.labels[data.train], data.studies)
    held_out = in_order(data.val, config.batch_size, data.studies)
    seen = np.concatenate([batch.images for batch in held_out])
    truth = data.labels[seen]
    courses: list[list[SearchEpoch]] = [[] for _ in rungs]
    kept: dict[tuple[int, int], tuple[float, Weights]] = {}
    stop = None if config.stop_epoch is None else min(config.stop_epoch, config.search_epochs)
    with progress("search", config.search_epochs * steps, "steps") as bar:
        for epoch in range(config.search_epochs):
            losses: list[list[np.ndarray]] = [[] for _ in rungs]
            for batch, features in _features(source, epoch, next(drawn), data):
                targets = data.targets(batch, features)
                for sweep, rung, course in zip(sweeps, rungs, losses, strict=True):
                    course.append(sweep.step(_prepared(features, rung, scaling), targets))
                bar.advance()
            logits: list[list[Tensor]] = [[] for _ in rungs]
            for _, features in _features(source, None, held_out, data):
                for sweep, rung, parts in zip(sweeps, rungs, logits, strict=True):
                    parts.append(sweep.logits(_prepared(features, rung, scaling)))
            for number, (sweep, parts) in enumerate(zip(sweeps, logits, strict=True)):
                values = expit(torch.cat(parts, dim=1).double().numpy())
                scores = tuple(_score(one, truth) for one in values)
                mean = tuple(np.mean(losses[number], axis=0).tolist())
                courses[number].append(SearchEpoch(epoch + 1, scores, mean))
                for place, score in enumerate(scores):
                    before = kept.get((number, place))
                    if stop == epoch + 1 or (stop is None and (before is None or score > before[0])):
                        kept[number, place] = (score, sweep.state(place))
            bar.note(f"validation mAP {max(max(course[-1].scores) for course in courses):.3f}")  # type: ignore[type-var]
    found = LadderSearch()
    for number, rung in enumerate(rungs):
        choice = choose(
            courses[number], variants, train_images=len(data.train), val_images=len(data.val),
            refit_epochs=config.refit_epochs, stop_epoch=config.stop_epoch, refit_init="cold",
            refit=config.refit,
        )  # fmt: skip
        found.courses[rung.name] = tuple(courses[number])
        found.choices[rung.name] = choice
        found.states[rung.name] = kept[number, variants.index(choice.variant)][1]
    found.best = max(rungs, key=lambda rung: found.choices[rung.name].score).name  # the first, lowest, of equals
    return found


def refit(
    config: FitConfig, rung: Rung, variant: Variant, epochs: int, data: LearningSet, source: FeatureSource,
    scaling: Standardisation | None, device: torch.device,
) -> tuple[Weights, tuple[float, ...]]:  # fmt: skip
    """The chosen rung at the chosen rate on train + val; its cosine is laid out for `refit_epochs`.

    Returns:
        the weights, and the mean loss of a step in each epoch.
    """
    steps = -(-len(data.both) // config.batch_size)
    total = _count(config.refit_epochs, config, "refit", data.both, data)
    sweep = _sweep(config, rung, [variant.learning_rate], total, data, "refit", scaling, device)
    drawn = epoch_batches(config, "refit", data.both, data.labels[data.both], data.labels[data.train], data.studies)
    course = []
    with progress("refit", epochs * steps, "steps") as bar:
        for epoch in range(epochs):
            losses = []
            for batch, features in _features(source, config.search_epochs + epoch, next(drawn), data):
                losses.append(sweep.step(_prepared(features, rung, scaling), data.targets(batch, features)))
                bar.advance()
            course.append(float(np.mean(losses)))
    return sweep.state(0), tuple(course)


def finished(rung: Rung, state: Weights, scaling: Standardisation | None) -> Head:
    """A head with these weights that reads the backbone's own tokens."""
    head = on_meta(rung.head)
    head.load_state_dict(state, assign=True)
    if rung.standardise and scaling is not None:
        head.absorb(scaling)
    return head


def starting_weights(rung: Rung, scaling: Standardisation | None) -> Weights:
    """Of a rung that does not start from the seed, for features as it gets them: standardised or not."""
    assert rung.initial is not None
    if not rung.standardise or scaling is None:
        return rung.initial
    head = on_meta(rung.head)
    head.load_state_dict({name: value.clone() for name, value in rung.initial.items()}, assign=True)
    head.absorb(scaling.inverse)
    return {name: value.detach() for name, value in head.state_dict().items()}


def _sweep(
    config: FitConfig, rung: Rung, rates: Sequence[float], total: int, data: LearningSet, phase: str,
    scaling: Standardisation | None, device: torch.device,
) -> Sweep:  # fmt: skip
    loss = build_loss(config.describe_loss(), count_labels(data.labels[data.train]).to(device))
    bias = starting_bias(config, data.labels[data.train]) if rung.initial is None else None
    return Sweep(
        [Candidate(rung.head, rate) for rate in rates], total, loss=loss, weight_decay=config.weight_decay,
        seed=config.seed, phase=phase, device=device, precision=config.precision, bias=bias,
        initial=None if rung.initial is None else [starting_weights(rung, scaling)] * len(rates), ema=config.ema,
        trainable=rung.trainable,
    )  # fmt: skip


def _count(epochs: int, config: FitConfig, phase: str, images: np.ndarray, data: LearningSet) -> int:
    return count_steps(epochs, config, phase, images, data.labels[images], data.labels[data.train], data.studies)


def _features(
    source: FeatureSource, epoch: int | None, batches: Sequence[Batch], data: LearningSet
) -> Iterator[tuple[Batch, Features]]:
    indices = [batch.images for batch in batches]
    found = source.evaluation(indices) if epoch is None else source.training(epoch, indices)
    for batch, (_, features) in zip(batches, found, strict=True):
        yield batch, batch.attach(features, data.views, data.sources)


def _prepared(features: Features, rung: Rung, scaling: Standardisation | None) -> Features:
    return scaling.apply(features) if rung.standardise and scaling is not None else features


def _score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return mean_average_precision(probabilities, labels, np.flatnonzero((labels == POSITIVE).any(axis=0)))
