"""Which greys the stored images of a dataset have, and how far apart two datasets are.

Two published datasets are histogram-equalised, the others are not (docs/reference/images.md): in one pool, a network
can tell by its greys alone where an image came from. A build counts them as it goes, in the markers of its shards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8

LEVELS = 256
EVEN = 4.0
"""Grey levels from an even spread, up to which an image counts as equalised. Of 195 films of the NIH sample, none was
nearer than 6.1 as it is (median 32), and the median was 1.2 once equalised, compressed and shrunk."""


def grey_histogram(pixels: UInt8[np.ndarray, "H W"]) -> Integer[np.ndarray, "256"]:
    """How many pixels have each grey."""
    return np.rint(cv2.calcHist([pixels], [0], None, [LEVELS], [0, LEVELS])).astype(np.int64).reshape(-1)


def distance(one: Float[np.ndarray, "256"], other: Float[np.ndarray, "256"]) -> float:
    """Wasserstein-1 distance of two histograms in grey levels, 0 to 255: how far a pixel has to move on average."""
    shares = (np.cumsum(values / values.sum())[:-1] for values in (one, other))
    return float(np.abs(np.subtract(*shares)).sum())


def is_even(histogram: Integer[np.ndarray, "256"]) -> bool:
    """Whether all greys are about equally frequent, as after histogram equalisation."""
    return distance(histogram.astype(np.float64), np.ones(LEVELS)) < EVEN


@dataclass(frozen=True)
class Greys:
    """The greys of several images."""

    histogram: Integer[np.ndarray, "256"]
    """Pixels of all of them."""
    images: int
    even: int
    """Images whose greys are spread evenly."""

    @property
    def equalised(self) -> bool:
        """Whether most images are."""
        return 2 * self.even > self.images


def total(parts: Iterable[Greys]) -> Greys:
    """Of all parts together."""
    listed = list(parts)
    histogram = np.asarray(sum(part.histogram for part in listed), np.int64)
    return Greys(histogram, sum(part.images for part in listed), sum(part.even for part in listed))


def apart(datasets: Mapping[str, Greys]) -> list[tuple[float, str, str]]:
    """The `distance` of every two datasets, the largest first."""
    shares = {name: greys.histogram.astype(np.float64) for name, greys in datasets.items() if greys.images}
    pairs = [(distance(shares[one], shares[other]), one, other) for one, other in combinations(sorted(shares), 2)]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))
