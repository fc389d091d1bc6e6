"""Whether an exported network says what the predictor says: 32 pictures, three numbers, one tolerance for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hilum.core.errors import CheckpointError
from hilum.core.seeding import stream
from hilum.deploy.network import Reading

FIXTURES = 32
BATCHES = (1, 3, 28)
"""How the pictures are divided, so that a graph which only takes the batch it was traced with is found out."""
LARGEST_PROBABILITY_DIFFERENCE = 1e-4
LARGEST_MAP_DIFFERENCE = 1e-2
"""Share of a map that lies elsewhere: half the sum of absolute differences of two maps that sum to 1. Where a finding's
evidence is nearly even, its map is made of small differences, in which rounding shows."""
SMALLEST_COSINE = 0.9999
"""Between embeddings, [CLS] and mean patch token."""


@dataclass(frozen=True)
class Difference:
    """Between two readings of the same pictures; the worst picture and finding count."""

    probabilities: float
    """Largest absolute difference."""
    maps: float | None
    """Largest share of a map that lies elsewhere; None: there are no maps."""
    cosine: float
    """Smallest cosine of [CLS] or the mean patch token of the last block."""

    def describe(self) -> dict[str, Any]:
        """For `export.json`."""
        return {
            "pictures": FIXTURES,
            "probabilities": {"largest_difference": self.probabilities, "tolerance": LARGEST_PROBABILITY_DIFFERENCE},
            "maps": {"largest_share_elsewhere": self.maps, "tolerance": LARGEST_MAP_DIFFERENCE},
            "embeddings": {"smallest_cosine": self.cosine, "tolerance": SMALLEST_COSINE},
        }


def fixtures(side: int, count: int = FIXTURES) -> UInt8[np.ndarray, "N 1 S S"]:
    """Pictures of one side: smooth fields of several scales with noise and edges; the first two are black and white."""
    rng = stream(0, "export fixtures", side)
    pictures = []
    for number in range(count):
        cells = int(rng.integers(2, 3 + min(side // 4, 24)))
        field = cv2.resize(rng.random((cells, cells)), (side, side), interpolation=cv2.INTER_CUBIC)
        noisy = 255 * field + rng.normal(0, 20 * rng.random(), (side, side))
        top, left = rng.integers(0, side, 2)
        noisy[top : top + side // 3, left : left + side // 3] += rng.uniform(-120, 120)
        pictures.append(np.clip(noisy, 0, 255) if number > 1 else np.full((side, side), 255.0 * number))
    return np.stack(pictures).round().astype(np.uint8)[:, None]


def read_in_batches(read: Callable[[UInt8[np.ndarray, "B 1 S S"]], Reading], pictures: np.ndarray) -> Reading:
    """What an engine says of pictures, given in `BATCHES`."""
    starts = np.cumsum((0, *BATCHES))
    parts = [read(pictures[start : start + size]) for start, size in zip(starts, BATCHES, strict=False)]
    maps = [part.attention for part in parts if part.attention is not None]
    return Reading(
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate(maps) if maps else None,
        np.concatenate([part.cls for part in parts]),
        np.concatenate([part.patch_mean for part in parts]),
    )


def difference(expected: Reading, found: Reading) -> Difference:
    """How far `found` is from `expected`; a NaN in one place alone is an infinite difference."""
    maps: float | None = None
    if expected.attention is not None and found.attention is not None:
        maps = _largest(expected.attention, found.attention, lambda gaps: gaps.sum(axis=(2, 3)) / 2)
    elif (expected.attention is None) != (found.attention is None):
        maps = float("inf")
    pairs = ((expected.cls, found.cls), (expected.patch_mean, found.patch_mean))
    cosine = min(smallest_cosine(one, other) for one, other in pairs)
    return Difference(_largest(expected.probabilities, found.probabilities, lambda gaps: gaps), maps, cosine)


def _largest(expected: np.ndarray, found: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> float:
    if not np.array_equal(np.isnan(expected), np.isnan(found)):
        return float("inf")
    return float(np.nanmax(measure(np.abs(expected - found)), initial=0.0))


def smallest_cosine(one: Float[np.ndarray, "N D"], other: Float[np.ndarray, "N D"]) -> float:
    """Of the rows of two tables; -1 where a row has no direction or is not finite."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(np.nan_to_num(cosines, nan=-1.0, posinf=-1.0, neginf=-1.0).min())


def refuse_if_different(found: Difference, what: str) -> None:
    """Nothing is written that says something else than the predictor.

    Raises:
        CheckpointError: one of the tolerances is exceeded.
    """
    beyond = []
    if not found.probabilities <= LARGEST_PROBABILITY_DIFFERENCE:
        beyond.append(f"probabilities by {found.probabilities:.3g} (at most {LARGEST_PROBABILITY_DIFFERENCE:g})")
    if found.maps is not None and not found.maps <= LARGEST_MAP_DIFFERENCE:
        beyond.append(f"maps by a share of {found.maps:.3g} (at most {LARGEST_MAP_DIFFERENCE:g})")
    if not found.cosine >= SMALLEST_COSINE:
        beyond.append(f"embeddings with a cosine of {found.cosine:.6f} (at least {SMALLEST_COSINE:g})")
    if beyond:
        raise CheckpointError(
            f"{what}: on {FIXTURES} pictures the export differs from the predictor in {', '.join(beyond)}. Nothing was "
            "written. Try another format, or other versions of its packages."
        )
