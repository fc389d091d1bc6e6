"""Copies of a picture that differ in their bytes: found by perceptual hash, confirmed by correlation.

The search is exact: no pair within the distance is missed, mirrored, inverted, or both. With a and b the differing
bits of the two halves of a hash (128 that mirroring leaves alone, 128 that it flips), the four distances are a + b,
a + 128 - b, and 256 minus each; the smallest is 128 - |a - 64| - |b - 64|. So one count of each half answers all four.

Both thresholds were chosen on the 780 images of the NIH sample (542 patients, 303,339 pairs of different patients,
copies of each kind of 195 images) and on 300 phantoms of different patients:

- distance: of different patients at least 68, one pair in 10,000 under 78; two films of one patient at least 57.
  Copies at most: JPEG of quality 60: 11, resized to 224: 7, +-2 grey: 12, histogram equalised: 18, gamma 0.7 to 1.5:
  17, inverted: 3, mirrored: 0; with 1 % cut off each side: 39, 2 %: 68, 3 %: 86 (half within 60), 5 %: 121 (none).
- correlation of the details: of different patients at most 0.71, of one patient at most 0.73, each at its best of the
  four ways. Phantoms are more alike than people: at most 0.88. Copies at least: equalised 0.89 (19 in 20 over 0.98),
  all others 0.96; with 1 % cut off each side half are over 0.9, with more none. The plain correlation of thumbnails
  reaches 0.95 for different patients and is 0.84 for an equalised copy: it cannot decide.

So a copy cropped by more than 1 % is not found; a film of the same patient is not taken for a copy.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer, UInt8, UInt64

from hilum.core.tracking import Bar
from hilum.data.hashing import BITS, detail

MAX_DISTANCE = 60
"""Bits of 256: candidates."""
MIN_CORRELATION = 0.9
"""Of the details of two thumbnails: confirmed."""
NEAREST = 8
"""Candidates kept for an image, the nearest: enough to know that it has a copy, and memory stays bounded."""
WAYS: tuple[str, ...] = ("as it is", "mirrored", "inverted", "mirrored and inverted")
"""How one picture of a pair has to be turned to match the other."""

_ROWS, _COLUMNS = 32, 4096  # hashes at a time: results stay in the cache, and threads seldom wait for each other
_TOGETHER = 256


class Pairs(NamedTuple):
    """Candidates, sorted by query and distance."""

    query: Int64[np.ndarray, " n"]
    """Positions among the queries."""
    other: Int64[np.ndarray, " n"]
    """Positions in the pool."""
    distance: Int64[np.ndarray, " n"]
    """Differing bits, at the best way."""
    way: Int64[np.ndarray, " n"]
    """Position in `WAYS`."""


def search(
    queries: UInt64[np.ndarray, "q 4"],
    pool: UInt64[np.ndarray, "n 4"] | None = None,
    max_distance: int = MAX_DISTANCE,
    nearest: int = NEAREST,
    bar: Bar | None = None,
) -> Pairs:
    """All pairs of a query and an image of the pool within a distance, at the best of the four `WAYS`.

    Args:
        queries: as `hashing.packed`.
        pool: what to compare them with; None: with each other, every pair once.
        max_distance: bits of 256.
        nearest: pairs kept for a query; those with the smallest distance, then position.
        bar: advanced by the number of queries done.
    """
    within = pool is None
    words = np.ascontiguousarray((queries if pool is None else pool).T)
    starts = range(0, len(queries), _TOGETHER)

    def part(start: int) -> list[np.ndarray]:
        groups = range(start, min(start + _TOGETHER, len(queries)), _ROWS)
        return [
            _nearest_of(queries[first : first + _ROWS], words, first, within, max_distance, nearest) for first in groups
        ]

    found: list[np.ndarray] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # numpy lets go of the interpreter's lock
        for start, pairs in zip(starts, threads.map(part, starts), strict=True):
            found += pairs
            if bar is not None:
                bar.advance(min(_TOGETHER, len(queries) - start))
    table = np.concatenate(found) if found else np.zeros((0, 4), np.int64)
    return Pairs(*np.ascontiguousarray(table.T))


def _nearest_of(
    queries: UInt64[np.ndarray, "q 4"],
    words: UInt64[np.ndarray, "4 n"],
    first: int,
    within: bool,
    max_distance: int,
    nearest: int,
) -> Int64[np.ndarray, "pairs 4"]:
    """The pairs of a few queries, the first of which is number `first`: query, other, distance, way."""
    kept = np.zeros((0, 4), np.int64)
    begin = first // _COLUMNS * _COLUMNS if within else 0
    for start in range(begin, words.shape[1], _COLUMNS):
        block = words[:, start : start + _COLUMNS]
        even, odd = _offsets(queries[:, :2], block[:2]), _offsets(queries[:, 2:], block[2:])
        closeness = np.abs(even).view(np.uint8) + np.abs(odd).view(np.uint8)
        if closeness.max() < BITS // 2 - max_distance:
            continue
        row, column = np.nonzero(closeness >= BITS // 2 - max_distance)
        even, odd = even[row, column], odd[row, column]
        # Inverted where the half that mirroring leaves alone differs in most bits; mirrored where only one half does.
        way = 2 * (even > 0) + ((even > 0) != (odd > 0))
        pairs = np.stack(
            [row + first, column + start, BITS // 2 - closeness[row, column].astype(np.int64), way], axis=1
        ).astype(np.int64)
        if within:
            pairs = pairs[pairs[:, 1] > pairs[:, 0]]
        kept = _first_per_query(np.concatenate([kept, pairs]), nearest)
    return kept


def _offsets(queries: UInt64[np.ndarray, "q 2"], block: UInt64[np.ndarray, "2 n"]) -> Integer[np.ndarray, "q n"]:
    """Differing bits of 128, minus 64."""
    bits = np.bitwise_count(queries[:, :1] ^ block[0])
    bits += np.bitwise_count(queries[:, 1:] ^ block[1])
    bits -= 64  # wraps around, which is what int8 means by it
    return bits.view(np.int8)


def _first_per_query(pairs: Int64[np.ndarray, "n 4"], count: int) -> Int64[np.ndarray, "m 4"]:
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 2], pairs[:, 0]))]
    starts = np.searchsorted(pairs[:, 0], pairs[:, 0])
    return pairs[np.arange(len(pairs)) - starts < count]


def correlations(
    first: Sequence[UInt8[np.ndarray, "64 64"]], second: Sequence[UInt8[np.ndarray, "64 64"]], ways: Sequence[int]
) -> Float[np.ndarray, " n"]:
    """Correlation of the details of two thumbnails, the second turned as `WAYS` says; in [-1, 1]."""
    result = np.zeros(len(ways))
    for place, (one, other, way) in enumerate(zip(first, second, ways, strict=True)):
        fine = detail(other)
        mirrored, inverted = way in (1, 3), way >= 2
        value = float(np.vdot(detail(one), fine[:, ::-1] if mirrored else fine))
        result[place] = -value if inverted else value
    return result
