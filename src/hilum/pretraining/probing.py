"""What a probe of a backbone is made of: which labelled images, and what neighbours and a linear map read from them.

A probe tells during pretraining, which uses no label, whether features still carry findings. Nothing is trained but a
ridge regression, and nothing is chosen on the images that are asked about. This module takes features as arrays;
`commands/pretrain_probe.py` makes them and measures. Dimensions: n bank images, Q queries, D features, C findings,
S strengths.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from hilum.core.errors import ConfigError
from hilum.core.seeding import stream
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.data.store import Store

BANK_SPLIT, QUERY_SPLIT = "train", "val"
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Candidate strengths of the ridge, in units of the mean variance of a feature (which is 1)."""
ITERATIONS = 64
"""Steps of conjugate gradients: always as many, so that equal features give equal numbers."""
HELD_OUT = 0.2
"""Share of the bank's patients on which the strength is chosen."""


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the probe: labelled images that pretraining looks at now and then, never to learn from them."""

    every: int = 0
    """Steps between probes, besides one before the first step and one after the last; 0: no probe."""
    images: int = 2000
    """Most labelled images of split train (the bank), and most of split val (the queries)."""
    neighbours: int = 20
    """Bank images that vote on a query."""
    temperature: float = 0.07
    """Divides the cosine similarity in a vote's weight, exp(similarity / temperature) (DINO, Caron 2021)."""
    minimum_positives: int = 3
    """Findings with fewer positives, or fewer negatives, in bank or queries are left out."""
    resamples: int = 200
    """Resamples of the queries' patients, for the interval of the change since the first probe."""
    batch_size: int = 64
    """Images embedded at a time, on each process."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"probe.every: expected 0 (no probe) or more, found {self.every}.")
        for name, least in (("images", 2), ("neighbours", 1), ("minimum_positives", 1), ("resamples", 2),
                            ("batch_size", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"probe.{name}: expected at least {least}, found {getattr(self, name)}.")
        if not self.temperature > 0:
            raise ConfigError(f"probe.temperature: expected more than 0, found {self.temperature}.")


@dataclass(frozen=True)
class ProbeImages:
    """Which images of a store a probe looks at."""

    bank: Int[np.ndarray, " n"]
    """Positions in the store, ascending: labelled images of split train, of no patient of another named split."""
    queries: Int[np.ndarray, " Q"]
    """Positions in the store, ascending: labelled images of split val."""
    findings: tuple[str, ...]
    """Those with enough positives and negatives on both sides."""
    bank_labels: Int[np.ndarray, "n C"]
    """1, 0; every other code is unknown."""
    query_labels: Int[np.ndarray, "Q C"]
    bank_patients: Int[np.ndarray, " n"]
    """A number per patient."""
    query_patients: Int[np.ndarray, " Q"]
    """A number per patient, from 0, none left out."""


def choose_images(store: Store, config: ProbeConfig, seed: int) -> ProbeImages:
    """The images of a probe: a function of the store and the seed alone, so a resumed run asks the same questions.

    Raises:
        ConfigError: the store cannot be probed; the message says what it lacks.
    """
    known = _known(store.labels)
    patients = np.char.add(np.char.add(store.datasets, "\x1f"), store.patients)
    labelled = known.any(axis=1)
    elsewhere = np.unique(patients[(store.splits != BANK_SPLIT) & (store.splits != "")])
    sides = {
        BANK_SPLIT: labelled & (store.splits == BANK_SPLIT) & ~np.isin(patients, elsewhere),
        QUERY_SPLIT: labelled & (store.splits == QUERY_SPLIT),
    }
    chosen = {}
    for split, mask in sides.items():
        places = np.flatnonzero(mask).astype(np.int64)
        if not len(places):
            raise ConfigError(f"the store has no labelled images of split {split}")
        if len(places) > config.images:
            places = np.sort(stream(seed, "probe", split).choice(places, config.images, replace=False))
        chosen[split] = places
    bank, queries = chosen[BANK_SPLIT], chosen[QUERY_SPLIT]
    enough = np.ones(len(store.findings), bool)
    for side in (store.labels[bank], store.labels[queries]):
        for code in (POSITIVE, NEGATIVE):
            enough &= (side == code).sum(axis=0) >= config.minimum_positives
    columns = np.flatnonzero(enough)
    if not len(columns):
        raise ConfigError(
            f"no finding has {config.minimum_positives} positives and negatives among {len(bank)} labelled images of "
            f"split {BANK_SPLIT} and among {len(queries)} of split {QUERY_SPLIT}"
        )
    return ProbeImages(
        bank, queries, tuple(store.findings[column] for column in columns),
        store.labels[bank][:, columns], store.labels[queries][:, columns],
        np.unique(patients[bank], return_inverse=True)[1], np.unique(patients[queries], return_inverse=True)[1],
    )  # fmt: skip


def neighbour_scores(
    bank: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, "n C"],
    queries: Float[np.ndarray, "Q D"],
    neighbours: int,
    temperature: float,
) -> Float[np.ndarray, "Q C"]:
    """Share of the votes of each query's nearest bank images that are positive, in [0, 1].

    Per finding, the nearest by cosine among the images whose label is known vote with weight exp(cosine / temperature)
    (DINO, Caron 2021, on single labels). With fewer known than `neighbours`, all of them vote.

    Args:
        bank: features; they need not have length 1.
        labels: 1 and 0 are known, every other code is unknown; each column with at least one known.
        queries: features.
        neighbours: voters.
        temperature: of the weights.
    """
    similarity = _unit(queries) @ _unit(bank).T  # Q n
    known = _known(labels)
    scores = np.empty((len(queries), labels.shape[1]))
    patterns, pattern_of = np.unique(known, axis=1, return_inverse=True)  # most findings are known for the same images
    for number, pattern in enumerate(patterns.T):
        columns = np.flatnonzero(pattern_of.ravel() == number)
        rows = np.flatnonzero(pattern)
        among = similarity[:, rows]
        count = min(neighbours, len(rows))
        nearest = np.argpartition(-among, count - 1, axis=1)[:, :count]  # Q k
        close = np.take_along_axis(among, nearest, axis=1)
        weights = np.exp((close - close.max(axis=1, keepdims=True)) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        positive = (labels[np.ix_(rows, columns)] == POSITIVE).astype(np.float64)  # rows c
        scores[:, columns] = np.einsum("qk,qkc->qc", weights, positive[nearest])
    return scores.clip(0.0, 1.0)


def linear_scores(
    bank: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, "n C"],
    patients: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "Q D"],
    seed: int,
) -> Float[np.ndarray, "Q C"]:
    """Ridge regression of each finding's labels on the standardised features, over the images where it is known.

    One strength for all findings: that with the smallest share of variance left unexplained, in the mean over findings,
    on a fifth of the bank's patients when fitted on the others. The scores order images; they are no probabilities.

    Args:
        bank: features.
        labels: 1 and 0 are known, every other code is unknown.
        patients: a number per patient.
        queries: features.
        seed: draws the fifth.
    """
    mean, scale = bank.mean(axis=0, dtype=np.float64), bank.std(axis=0, dtype=np.float64)
    scale[scale < 1e-12] = 1.0  # a feature that never changes
    x, asked = (bank - mean) / scale, (queries - mean) / scale
    strength = _strength(x, labels, patients, seed)
    weights, intercepts = ridge(x, labels, (strength,))
    return asked @ weights[0] + intercepts[0]


def ridge(
    x: Float[np.ndarray, "n D"], labels: Int[np.ndarray, "n C"], strengths: tuple[float, ...]
) -> tuple[Float[np.ndarray, "S D C"], Float[np.ndarray, "S C"]]:
    """Weights w and intercepts b of every finding and strength s, by conjugate gradients on all of them at once.

    They minimise the mean of (x w + b - y)^2 over the images where the finding is known, plus s |w|^2; y is 1 or 0.
    A finding that is known nowhere gets zeros. Computed in the precision of `x`.
    """
    count = len(strengths)
    known = np.tile(_known(labels).astype(x.dtype), (1, count))  # n SC, of strength 1, then of strength 2, ...
    share = known / np.maximum(known.sum(axis=0), 1)
    target = np.tile((labels == POSITIVE).astype(x.dtype), (1, count))
    middle = (share * target).sum(axis=0)
    penalty = np.repeat(np.asarray(strengths, x.dtype), labels.shape[1])

    def normal(weights: np.ndarray) -> np.ndarray:
        said = x @ weights  # n SC
        said -= (share * said).sum(axis=0)
        return x.T @ (share * said) + penalty * weights

    residual = x.T @ (share * (target - middle))  # D SC
    weights, direction = np.zeros_like(residual), residual.copy()
    size = (residual**2).sum(axis=0)
    floor = np.finfo(x.dtype).eps ** 1.5 * size
    for _ in range(ITERATIONS):
        image = normal(direction)
        curvature = (direction * image).sum(axis=0)
        going = (size > floor) & (curvature > 0)
        step = np.where(going, size / np.where(going, curvature, 1), 0).astype(x.dtype)
        weights += step * direction
        residual -= step * image
        following = (residual**2).sum(axis=0)
        direction = residual + np.where(going, following / np.where(going, size, 1), 0).astype(x.dtype) * direction
        size = np.where(going, following, 0).astype(x.dtype)
    intercepts = middle - (share * (x @ weights)).sum(axis=0)
    return (
        weights.reshape(len(weights), count, -1).transpose(1, 0, 2),
        intercepts.reshape(count, -1),
    )


def _strength(
    x: Float[np.ndarray, "n D"], labels: Int[np.ndarray, "n C"], patients: Int[np.ndarray, " n"], seed: int
) -> float:
    people = np.unique(patients)
    out = stream(seed, "probe", "held out").permutation(people)[: max(round(HELD_OUT * len(people)), 1)]
    judged = np.isin(patients, out)
    middle = STRENGTHS[len(STRENGTHS) // 2]
    if judged.all():
        return middle
    fitted = x[~judged].astype(np.float32)  # five fits at half the cost; a choice among powers of ten needs no more
    weights, intercepts = ridge(fitted, labels[~judged], STRENGTHS)
    known = _known(labels[judged]).astype(np.float64)
    truth = (labels[judged] == POSITIVE).astype(np.float64)
    total = known.sum(axis=0)
    rate = (known * truth).sum(axis=0) / np.maximum(total, 1.0)
    variance = rate * (1 - rate)
    usable = (variance > 0) & _known(labels[~judged]).any(axis=0)
    if not usable.any():
        return middle
    said = np.einsum("nd,sdc->snc", x[judged], weights, optimize=True) + intercepts[:, None]
    error = (known * (said - truth) ** 2).sum(axis=1) / np.maximum(total, 1.0)  # S C
    left = (error[:, usable] / variance[usable]).mean(axis=1)
    return STRENGTHS[int(left.argmin())]


def _known(labels: Int[np.ndarray, "n C"]) -> Bool[np.ndarray, "n C"]:
    return (labels == POSITIVE) | (labels == NEGATIVE)


def _unit(features: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return features / np.maximum(lengths, 1e-12)
