"""Near duplicates among 710,877 hashes: evaluation against the rest, and all against all, on the processors at hand.

Random 256-bit hashes stand for the pool of the slides, a tenth of them for evaluation. Planted in the rest: 2,000
copies of evaluation images with 0 to 60 bits changed, a quarter each as they are, mirrored, inverted, or both; within
the rest another 2,000. All must be found, with their distance and way; nothing else lies within the distance (a random
pair does so once in 10^17). Random hashes show the time of the search, not how many candidates real films give: that is
measured in `hilum.data.near_duplicates`, and each candidate then costs the decoding of two small images.

Floors beside it, on a part and extrapolated per pair: numpy as it is usually written (one query against all, XOR and a
bit count, four times over for the four ways), and a loop over pairs of Python integers, as scripts with image-hash
libraries do it. The audit of everything between reading the manifest and the report, on a synthetic manifest of the
same size, is the last line.

`--pairs` also searches all against all, which takes about five times as long.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.seeding import stream
from hilum.core.tracking import duration, progress
from hilum.data.audit import audit
from hilum.data.near_duplicates import MAX_DISTANCE, search
from hilum.data.schema import Manifest, complete, read_manifest, write_manifest

IMAGES, PLANTED = 710_877, 2_000
EVALUATION = IMAGES // 10
TURNED = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], np.uint64) * np.uint64(2**64 - 1)


def copies(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of copies of these hashes, with their distance and way."""
    bits = np.unpackbits(words.view(np.uint8), axis=1)
    distances = rng.integers(0, MAX_DISTANCE + 1, len(words))
    for row, count in zip(bits, distances, strict=True):
        row[rng.choice(256, count, replace=False)] ^= 1
    ways = np.arange(len(words)) % 4
    return np.packbits(bits, axis=1).view(np.uint64) ^ TURNED[ways], distances, ways


def memory() -> float:
    """The most that this process has held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def usual_numpy(queries: np.ndarray, pool: np.ndarray) -> float:
    """Nanoseconds a pair of the usual loop."""
    start = time.perf_counter()
    for query in queries:
        for way in TURNED:
            np.flatnonzero(np.bitwise_count((query ^ way) ^ pool).sum(axis=1) <= MAX_DISTANCE)
    return (time.perf_counter() - start) / (len(queries) * len(pool)) * 1e9


def python_integers(queries: np.ndarray, pool: np.ndarray) -> float:
    """Nanoseconds a pair of a loop over integers."""
    numbers = [[int.from_bytes(row.tobytes(), "big") for row in words] for words in (queries, pool)]
    ways = [int.from_bytes(way.tobytes(), "big") for way in TURNED]
    start = time.perf_counter()
    for query in numbers[0]:
        for way in ways:
            turned = query ^ way
            sum((turned ^ other).bit_count() <= MAX_DISTANCE for other in numbers[1])
    return (time.perf_counter() - start) / (len(queries) * len(pool)) * 1e9


def synthetic_manifest(words: np.ndarray) -> Manifest:
    """A manifest with these hashes: evaluation first, patients of five images, fourteen findings."""
    count = len(words)
    patient = np.arange(count) // 5
    test = patient < EVALUATION // 5
    findings = tuple(f"Finding {number}" for number in range(14))
    labels = stream(0, "audit benchmark", "labels").random((14, count)) < 0.1
    patients = [f"pool/{number}" for number in patient]
    columns = {
        "image_uid": [f"{number:016x}" for number in range(count)],
        "dataset": ["pool"] * count,
        "source_relpath": [f"{number}.png" for number in range(count)],
        "source_root_key": ["pool"] * count,
        "patient_id": patients,
        "study_id": patients,
        "image_id": [f"{number}.png" for number in range(count)],
        "view": ["PA"] * count,
        "split_project": np.where(test, "test", "train"),
        "ssl_ok": ~test,
        "ssl_reason": [""] * count,
        "phash256": [row.tobytes().hex() for row in words],
        **{f"label.{name}": values.astype(np.int8) for name, values in zip(findings, labels, strict=True)},
    }
    return Manifest(complete(pl.DataFrame(columns), findings), findings, {})


class Pool:
    """The hashes, and what is planted in them: (query, other, distance, way), counted inside each search."""

    def __init__(self) -> None:
        rng = stream(0, "audit benchmark")
        words = rng.integers(0, 2**64, (IMAGES, 4), dtype=np.uint64)
        crossing = rng.choice(EVALUATION, PLANTED, replace=False)
        homes = EVALUATION + rng.choice((IMAGES - EVALUATION) // 2, 2 * PLANTED, replace=False)
        ends = IMAGES - 1 - np.arange(PLANTED)
        words[homes[:PLANTED]], *across = copies(words[crossing], rng)
        words[ends], *inside = copies(words[homes[PLANTED:]], rng)
        self.across = np.stack([crossing, homes[:PLANTED] - EVALUATION, *across], axis=1).tolist()
        self.inside = np.stack([homes[PLANTED:] - EVALUATION, ends - EVALUATION, *inside], axis=1).tolist()
        self.queries, self.rest = words[:EVALUATION], words[EVALUATION:]
        self.clean = words.copy()
        self.clean[homes[:PLANTED]] = rng.integers(0, 2**64, (PLANTED, 4), dtype=np.uint64)


def timed_search(label: str, queries: np.ndarray, pool: np.ndarray | None, planted: list, count: int) -> float:
    """Search, print what was found and how fast, and return the seconds."""
    start = time.perf_counter()
    with progress(label, len(queries), "images") as bar:
        pairs = search(queries, pool, bar=bar)
    seconds = time.perf_counter() - start
    found, expected = set(zip(*(part.tolist() for part in pairs), strict=True)), {tuple(pair) for pair in planted}
    print(
        f"{label}, {count:,} pairs, four ways, {len(os.sched_getaffinity(0))} processors: {duration(seconds)}, "
        f"{seconds / count * 1e9:.2f} ns a pair; planted {len(expected):,}, missed {len(expected - found)}, "
        f"wrong {len(found - expected)}; memory at most {memory():.2f} GiB"
    )
    if found != expected:
        sys.exit("the search is not exact")
    return seconds


def main() -> None:
    made = Pool()
    count = len(made.queries) * len(made.rest)
    label = f"{len(made.queries):,} evaluation images against {len(made.rest):,}"
    seconds = timed_search(label, made.queries, made.rest, made.across, count)
    for name, measure, others in (("usual numpy", usual_numpy, len(made.rest)), ("Python", python_integers, 20_000)):
        floor = measure(made.queries[:4], made.rest[:others])
        whole = floor * count / 1e9
        print(f"floor, {name}, one processor: {floor:.1f} ns a pair, so {duration(whole)}: {whole / seconds:.0f}x")
    if "--pairs" in sys.argv:
        rest = len(made.rest)
        timed_search(f"{rest:,} among themselves", made.rest, None, made.inside, rest * (rest - 1) // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        write_manifest(synthetic_manifest(made.clean), path)  # without candidates: there are no images to read
        start = time.perf_counter()
        report = audit(read_manifest(path, check=False))
        seconds = time.perf_counter() - start
        assert report.clean, report.leaks
        assert report.compared == IMAGES
        print(f"whole audit, {IMAGES:,} rows: {duration(seconds)}, memory at most {memory():.2f} GiB")


if __name__ == "__main__":
    main()
