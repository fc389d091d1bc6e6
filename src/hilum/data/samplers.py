"""The order in which training sees its samples: endless, shuffled anew each epoch, and resumable from a step alone.

The batch of step t over all processes is a function of (seed, t, global batch size); each process takes its slice.
Nothing is stored and nothing depends on worker processes, so the state of a sampler is the step. An epoch's order has
two parts: which samples it draws (all of them once, or `WeightedDraw`) and where they come (anywhere, or `Window`).
Below: the weights, by dataset and by class. They are made of training samples alone. Past 300
lines: draws and places are one order, and share its guarantees.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import stream
from hilum.core.types import POSITIVE

_UNIT = 2**30
"""One draw, in the whole numbers that `WeightedDraw` counts with: equal weights come out exactly equal."""
_GOLDEN = round(_UNIT * (5**0.5 - 1) / 2)


class Position(NamedTuple):
    """A place in the endless order of samples."""

    epoch: int
    """Passes over the data before it."""
    offset: int
    """Place in the epoch's order."""


@dataclass(frozen=True)
class Window:
    """A shuffle that reads a disk in runs: blocks of neighbours in random order, some open at a time, mixed.

    Args:
        block: samples that lie together in storage and are read together.
        blocks: how many blocks are open at a time; a batch is drawn from these.
    """

    block: int = 64
    blocks: int = 64

    def __post_init__(self) -> None:
        if self.block < 1 or self.blocks < 1:
            raise ConfigError(f"window: expected 1 or more samples and blocks, found {self.block} and {self.blocks}.")


class WeightedDraw:
    """Draws n samples an epoch, each in proportion to its weight: systematic sampling on a line.

    The samples lie end to end on a line of length n, each as long as its expected count c. An epoch draws what lies
    at u, u + 1, ..., u + n - 1, so every sample, and every run of neighbours (a dataset, a stratum), is drawn as often
    as expected, rounded up or down. u moves by the golden ratio from epoch to epoch: a sample with c < 1 waits no more
    than about 2 / c epochs for its turn, and rounding does not add up.

    Args:
        weights: one for each sample, not negative; weight 0 is never drawn.
        seed: of the first u.

    Raises:
        ConfigError: a weight that is negative or not finite, or none above 0.
    """

    def __init__(self, weights: Float64[np.ndarray, " n"], seed: int) -> None:
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise ConfigError("Sampling weights: expected finite numbers, none below 0 and one above.")
        lengths = np.rint(weights / weights.sum() * len(weights) * _UNIT).astype(np.int64)
        short = len(weights) * _UNIT - int(lengths.sum())  # lost in rounding: a unit each for the longest
        lengths[np.argsort(-lengths, kind="stable")[: abs(short)]] += np.sign(short)
        self.ends: Int64[np.ndarray, " n"] = np.cumsum(lengths)
        self.first = int(stream(seed, "weighted draw").integers(_UNIT))

    def counts(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """How often each sample is drawn in an epoch; they sum to n."""
        start = (self.first + epoch * _GOLDEN) % _UNIT
        return np.diff((self.ends - start + _UNIT - 1) // _UNIT, prepend=0)

    def places(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """The samples drawn in an epoch, ascending; then all second copies, ascending; and so on.

        Copies of one sample are far apart, which keeps them out of each other's window and batch.
        """
        counts = self.counts(epoch)
        drawn = np.repeat(np.arange(len(counts)), counts)
        copy = np.arange(len(drawn)) - np.repeat(np.cumsum(counts) - counts, counts)
        return drawn[np.argsort(copy, kind="stable")]


class EndlessSampler:
    """Endless sequence of shuffled epochs, cut into global batches.

    An epoch's last batch is filled from the next epoch, so no step is short. Without `draw` every sample comes once an
    epoch. An epoch has as many draws as there are samples.

    Args:
        indices: the samples (positions in a store); with `window`, in the order in which they are stored.
        batch_size: samples a step of this process.
        seed: root seed.
        rank: this process, 0 to world_size - 1.
        world_size: processes; the global batch is batch_size * world_size.
        draw: which samples an epoch holds; None: each once.
        window: how they are shuffled; None: over the whole epoch.

    Raises:
        ConfigError: no samples, or numbers out of range.
    """

    def __init__(
        self,
        indices: Int64[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        draw: WeightedDraw | None = None,
        window: Window | None = None,
    ) -> None:
        if len(indices) == 0:
            raise ConfigError("There is nothing to train on: no sample is selected.")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"Expected a batch size of at least 1 and a rank below the number of processes; found batch size "
                f"{batch_size}, rank {rank}, processes {world_size}."
            )
        assert draw is None or len(draw.ends) == len(indices), "one weight for each sample"
        self.indices = np.asarray(indices, np.int64)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.draw, self.window = draw, window

    def positions(self, step: int) -> list[Position]:
        """Where the samples of this process at `step` (from 0) stand in the endless order."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return [Position(*divmod(place, len(self.indices))) for place in range(first, first + self.batch_size)]

    def index(self, position: Position) -> int:
        """The sample at a place in the order."""
        epoch, count = position.epoch, len(self.indices)
        if self.window is None:
            place = _permutation(self.seed, epoch, count)[position.offset]
        else:
            place = _windowed(self.seed, epoch, count, self.window, position.offset)
        return int(self.indices[place if self.draw is None else _places(self.draw, epoch)[place]])

    def batch(self, step: int) -> Int64[np.ndarray, " B"]:
        """The samples of this process at `step`, counted from 0."""
        return np.array([self.index(position) for position in self.positions(step)], np.int64)

    def after(self, position: Position) -> Position:
        """The place that follows."""
        following = position.offset + 1
        return Position(position.epoch + following // len(self.indices), following % len(self.indices))

    def opens(self, step: int) -> Int64[np.ndarray, " m"]:
        """The samples to fetch meanwhile, as they are stored: those of the next window, where `step` enters one.

        Empty at all other steps, and without `window`.
        """
        if self.window is None or step == 0:
            return self.indices[:0]
        count, together = len(self.indices), self.batch_size * self.world_size
        before, here = (self._window_at(place * together) for place in (step - 1, step))
        if before == here:
            return self.indices[:0]
        (epoch, number), windows = here, len(_blocks(self.seed, here[0], count, self.window)[2])
        epoch, number = (epoch, number + 1) if number + 1 < windows else (epoch + 1, 0)
        places = np.sort(_opened(self.seed, epoch, count, self.window, number))
        return self.indices[places if self.draw is None else np.unique(_places(self.draw, epoch)[places])]

    def _window_at(self, place: int) -> tuple[int, int]:
        """Epoch and number of the window that holds a place of the endless order."""
        assert self.window is not None
        epoch, offset = divmod(place, len(self.indices))
        ends = _blocks(self.seed, epoch, len(self.indices), self.window)[2]
        return epoch, int(np.searchsorted(ends, offset, side="right"))

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that the order depends on besides the batch size and the processes."""
        content = hashlib.sha256(f"{self.seed}\x1f{self.window}\x1f".encode())
        content.update(self.indices.tobytes())
        if self.draw is not None:
            content.update(self.draw.ends.tobytes())
        return content.hexdigest()


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return stream(seed, "order", epoch).permutation(count)


@lru_cache(maxsize=4)
def _places(draw: WeightedDraw, epoch: int) -> np.ndarray:
    return draw.places(epoch)


def _windowed(seed: int, epoch: int, count: int, window: Window, offset: int) -> int:
    ends = _blocks(seed, epoch, count, window)[2]
    number = int(np.searchsorted(ends, offset, side="right"))
    return int(_opened(seed, epoch, count, window, number)[offset - (ends[number - 1] if number else 0)])


@lru_cache(maxsize=4)
def _blocks(seed: int, epoch: int, count: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The epoch's blocks in order: their edges (blocks, 2); the first block of each window; the samples up to its end.

    Blocks are cut elsewhere each epoch, so that neighbours are not always together. Windows differ by one block at
    most: a short one at the end would mix badly.
    """
    rng = stream(seed, "blocks", epoch)
    cuts = np.arange(rng.integers(window.block), count, window.block)
    edges = np.unique(np.concatenate([[0], cuts, [count]]))
    blocks = rng.permutation(np.stack([edges[:-1], edges[1:]], axis=1))
    windows = -(-len(blocks) // window.blocks)
    first = np.arange(windows + 1) * len(blocks) // windows
    return blocks, first, np.cumsum(blocks[:, 1] - blocks[:, 0])[first[1:] - 1]


@lru_cache(maxsize=4)
def _opened(seed: int, epoch: int, count: int, window: Window, number: int) -> np.ndarray:
    """The samples of one window, mixed."""
    blocks, first, _ = _blocks(seed, epoch, count, window)
    held = [np.arange(start, end) for start, end in blocks[first[number] : first[number + 1]]]
    return stream(seed, "window", epoch, number).permutation(np.concatenate(held))


DATASET_RULES = ("natural", "sqrt", "uniform")
"""Share of the draws that a dataset gets: as its size, as the root of its size, or the same for all."""


def parse_shares(text: str) -> dict[str, float] | None:
    """Read a rule of `DATASET_RULES` (None) or shares of the draws, "nih=2,mimic=1".

    Raises:
        ConfigError: not of that form, or a share that is not above 0.
        UnknownNameError: no such rule.
    """
    if text in DATASET_RULES:
        return None
    if "=" not in text:
        raise UnknownNameError("rule for datasets", text, DATASET_RULES)
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or name in shares or not 0 < share < math.inf:
            raise ConfigError(
                f"Shares of datasets: expected NAME=NUMBER,NAME=NUMBER, each once and above 0, found {part!r}. A "
                "dataset is left out in the manifest, not by its share."
            )
        shares[name] = share
    return shares


def dataset_weights(datasets: np.ndarray, rule: str) -> Float64[np.ndarray, " n"]:
    """Weight of each sample, so that its dataset gets the share of the draws that `rule` says.

    Args:
        datasets: text (n), dataset of each sample.
        rule: see `parse_shares`.

    Raises:
        UnknownNameError: a share for a dataset that is not there.
        ConfigError: a dataset without a share.
    """
    names, of_sample, counts = np.unique(datasets, return_inverse=True, return_counts=True)
    given = parse_shares(rule)
    if given is None:
        shares = counts ** {"natural": 1.0, "sqrt": 0.5, "uniform": 0.0}[rule]
    else:
        shares = np.array(_complete(given, names.tolist()))
    return (shares / counts)[of_sample]


def _complete(given: Mapping[str, float], names: list[str]) -> list[float]:
    for name in given:
        if name not in names:
            raise UnknownNameError("dataset", name, names)
    lacking = [name for name in names if name not in given]
    if lacking:
        raise ConfigError(f"Shares of datasets: none for {', '.join(lacking)}. Give every dataset one.")
    return [given[name] for name in names]


def class_weights(
    labels: Int[np.ndarray, "N C"],
    train_labels: Int[np.ndarray, "M C"],
    power: float = 0.5,
    over: Literal["max", "mean"] = "max",
) -> Float64[np.ndarray, " N"]:
    """Weight of each image: the largest, or the mean, of 1 / frequency^power over its positive findings.

    Frequency is positives over known labels among the training images; labels that are unknown or uncertain count
    nowhere. Images with known labels and none positive are weighed as a class of their own. An image without any known
    label teaches nothing and gets the smallest weight there is.

    Args:
        labels: of the images to draw from.
        train_labels: of the training images, where frequencies are taken.
        power: 0 is every image alike, 1 every class alike (as far as images have one class).
        over: what an image with several positive findings gets.
    """
    positives, known = (train_labels == POSITIVE).sum(axis=0), (train_labels >= 0).sum(axis=0)
    rarity = (known / np.maximum(positives, 1)) ** power
    annotated = (train_labels >= 0).any(axis=1)
    plain = int((annotated & (train_labels != POSITIVE).all(axis=1)).sum())
    has = (labels == POSITIVE) & (positives > 0)
    if over == "max":
        weights = np.where(has, rarity, 0.0).max(axis=1, initial=0.0)
    else:
        weights = np.where(has, rarity, 0.0).sum(axis=1) / np.maximum(has.sum(axis=1), 1)
    weights[~has.any(axis=1)] = (int(annotated.sum()) / plain) ** power if plain else 1.0
    teaches = np.asarray((labels >= 0).any(axis=1))
    if teaches.any():
        weights[~teaches] = weights[teaches].min()
    return weights
