"""The order in which training sees its samples: endless, shuffled anew each epoch, and resumable from a step alone.

The batch of step t over all processes is a function of (seed, t, global batch size); each process takes its slice.
Nothing is stored and nothing depends on worker processes, so the state of a sampler is the step.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from hilum.core.errors import ConfigError
from hilum.core.seeding import stream


class Position(NamedTuple):
    """A place in the endless order of samples."""

    epoch: int
    """Passes over the data before it."""
    offset: int
    """Place in the epoch's permutation."""


class EndlessSampler:
    """Endless sequence of permutations of the samples, cut into global batches.

    An epoch's last batch is filled from the next epoch, so every sample is drawn once an epoch and no step is short.

    Args:
        indices: the samples (positions in a store).
        batch_size: samples a step of this process.
        seed: root seed.
        rank: this process, 0 to world_size - 1.
        world_size: processes; the global batch is batch_size * world_size.

    Raises:
        ConfigError: no samples, or numbers out of range.
    """

    def __init__(
        self, indices: Int64[np.ndarray, " n"], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(indices) == 0:
            raise ConfigError("There is nothing to train on: no sample is selected.")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"Expected a batch size of at least 1 and a rank below the number of processes; found batch size "
                f"{batch_size}, rank {rank}, processes {world_size}."
            )
        self.indices = np.asarray(indices, np.int64)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size

    def positions(self, step: int) -> list[Position]:
        """Where the samples of this process at `step` (from 0) stand in the endless order."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return [Position(*divmod(place, len(self.indices))) for place in range(first, first + self.batch_size)]

    def index(self, position: Position) -> int:
        """The sample at a place in the order."""
        return int(self.indices[_permutation(self.seed, position.epoch, len(self.indices))[position.offset]])

    def batch(self, step: int) -> Int64[np.ndarray, " B"]:
        """The samples of this process at `step`, counted from 0."""
        return np.array([self.index(position) for position in self.positions(step)], np.int64)

    def after(self, position: Position) -> Position:
        """The place that follows."""
        following = position.offset + 1
        return Position(position.epoch + following // len(self.indices), following % len(self.indices))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return stream(seed, "order", epoch).permutation(count)
