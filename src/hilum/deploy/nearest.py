"""The nearest rows of a large float16 matrix by cosine, exactly: what a search of an index is made of.

One product with every row in float32, then the few rows that can be among the nearest again in float64, so that the
answer is that of a plain float64 search, ties by row. Knows nothing of studies.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Float64, Int64

BLOCK = 1024
"""Rows that are widened to float32 at a time: a few MB, still in the cache when they are multiplied."""
_ONE_AT_A_TIME = threading.Lock()


def nearest(
    vectors: Float16[np.ndarray, "N D"],
    lengths: Float32[np.ndarray, " N"],
    centre: Float32[np.ndarray, " D"],
    query: Float64[np.ndarray, " D"],
    count: int,
    banned: Bool[np.ndarray, " N"] | None = None,
) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Rows v with the largest cosine of v - centre and query - centre, and the cosines; of equal ones the lower row.

    Cosines are taken in float32 first, v . u - centre . u over the length of v - centre, with u along query - centre.
    Their error is at most D · 2^-24 and a few roundings, over that length, so a row that cannot be among the nearest
    is known; the others are taken again in float64, each row by itself, so that equal rows get equal numbers.

    Args:
        vectors: stored rows, of length 1 before they were rounded.
        lengths: of v - centre (`lengths_of`): rounding to float16 moves a length of 1 by up to 2^-11, which would count
            more than a small difference in direction.
        centre: zeros for plain cosines.
        query: of length 1.
        count: k at most.
        banned: rows that are not looked at.
    """
    middle = centre.astype(np.float64)
    direction = query - middle
    direction /= np.linalg.norm(direction)
    shares = 1 / np.where(lengths > 0, lengths, np.inf).astype(np.float32)
    scores = scores_of(vectors, direction.astype(np.float32))
    scores -= np.float32(middle @ direction)
    scores *= shares
    if banned is not None:
        scores[banned] = -np.inf
    count = min(count, len(scores) if banned is None else int((~banned).sum()))
    if count < 1:
        return np.zeros(0, np.int64), np.zeros(0)
    error = shares
    error *= np.float32((vectors.shape[1] + 32) * 2.0**-24)
    scores -= error
    certain = np.partition(scores, len(scores) - count)[len(scores) - count]
    scores += 2 * error
    candidates = np.flatnonzero(scores >= certain).astype(np.int64)
    exact = np.concatenate([
        _cosines(vectors[part].astype(np.float64) - middle, direction)
        for part in np.array_split(candidates, -(-len(candidates) // BLOCK))
    ])  # fmt: skip
    order = np.lexsort((candidates, -exact))[:count]
    return candidates[order], exact[order]


def _cosines(rows: Float64[np.ndarray, "n D"], direction: Float64[np.ndarray, " D"]) -> Float64[np.ndarray, " n"]:
    """Row by row, so that a row's number does not depend on the others; 0 of a row of zeros."""
    lengths = np.sqrt((rows * rows).sum(axis=1))
    return (rows * direction).sum(axis=1) / np.where(lengths > 0, lengths, np.inf)


def centre_of(vectors: Float16[np.ndarray, "N D"]) -> Float32[np.ndarray, " D"]:
    """Mean of all rows."""
    sums = sum(vectors[start : start + BLOCK].sum(axis=0, dtype=np.float64) for start in range(0, len(vectors), BLOCK))
    return np.asarray(sums / max(len(vectors), 1), dtype=np.float32)


def lengths_of(vectors: Float16[np.ndarray, "N D"], centre: Float32[np.ndarray, " D"]) -> Float32[np.ndarray, " N"]:
    """Lengths of rows from a centre."""
    found = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), BLOCK):
        part = vectors[start : start + BLOCK].astype(np.float64) - centre
        found[start : start + BLOCK] = np.sqrt((part * part).sum(axis=1))
    return found


def scores_of(vectors: Float16[np.ndarray, "N D"], query: Float32[np.ndarray, " D"]) -> Float32[np.ndarray, " N"]:
    """Product of every row with a query, in float32, blocks of rows side by side on the processors there are.

    torch widens float16 with the processor's own instruction, which numpy does not, and lets go of the interpreter's
    lock. Each thread is told to use one processor: torch's own threads would meet after every block.
    """
    found = np.empty(len(vectors), np.float32)
    rows, asked, out = torch.from_numpy(vectors), torch.from_numpy(query), torch.from_numpy(found)
    workers = max(min(len(os.sched_getaffinity(0)), -(-len(vectors) // BLOCK)), 1)

    def work(worker: int) -> None:
        wide = torch.empty((BLOCK, vectors.shape[1]), dtype=torch.float32)
        for start in range(worker * BLOCK, len(vectors), workers * BLOCK):
            part = rows[start : start + BLOCK]
            torch.mv(wide[: len(part)].copy_(part), asked, out=out[start : start + BLOCK])

    with _ONE_AT_A_TIME:  # a search that began in the middle of another would take its 1 for what was before
        before = torch.get_num_threads()
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            list(threads.map(work, range(workers)))
        torch.set_num_threads(before)  # of this thread, and of those to come
    return found
