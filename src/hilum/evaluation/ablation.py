"""Numbers of an ablation: rows measured once per seed, then means over seeds, with intervals that cover patients and
seeds, and paired differences with the same.

The interval of a number: in each resample, patients are drawn with replacement, the same draw for every row and every
seed; S - 1 of the S seeds are drawn with replacement, the same draw for both rows of a difference; the macro mean of
each drawn seed is taken over the drawn patients, and these are averaged. From these resamples comes the interval of a
level or of a difference (`bootstrap.interval`, `bootstrap.basic_interval`). Drawing S - 1 of S makes the variance that
seeds give to the mean the unbiased s^2 / S (McCarthy and Snowden 1985, the bootstrap with replacement of n - 1 units);
drawing S would give (S - 1) / S of it. With one seed the interval covers patients only. Imports no torch; the table is
in `ablation_table.py`, the page in `ablation_report.py`.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError
from hilum.core.files import atomic_file
from hilum.core.seeding import stream
from hilum.evaluation.bootstrap import (
    BLOCK,
    basic_interval,
    clusters_of,
    interval,
    mean_over_findings,
    resample_weights,
)
from hilum.evaluation.definitions import METRICS, macro_name
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.weighted import WeightedFinding

Ends = Callable[[Float[np.ndarray, " R"], float | None], list[float] | None]
MEASURED: tuple[str, ...] = ("AP", "AUC", "F1@0.5", "F1@tuned", "ECE")
"""Keys of `METRICS` that an ablation reports."""


@dataclass(frozen=True)
class SeedResult:
    """One row of an ablation at one seed: every metric of every finding, on all patients and on every resample."""

    findings: tuple[str, ...]
    """C names."""
    positives: Int[np.ndarray, " C"]
    """Test images with the finding."""
    negatives: Int[np.ndarray, " C"]
    """Test images known to be without."""
    trained: np.ndarray
    """(C,) bool."""
    points: dict[str, Float[np.ndarray, " C"]]
    """By metric, on all patients; NaN where undefined."""
    samples: dict[str, Float[np.ndarray, "R C"]]
    """By metric, on resample r of patients; the same resamples for every row and seed of equal test images."""


def measure(
    predictions: Predictions,
    labels: Int[np.ndarray, "N C"],
    thresholds: Mapping[str, float],
    bootstraps: int,
    seed: int,
) -> SeedResult:
    """Judge one row at one seed.

    Args:
        predictions: of the test images, in an order that is the same for every row.
        labels: rows and columns as the predictions'.
        thresholds: of F1@tuned, from validation.
        bootstraps: resamples of patients.
        seed: root of the resamples.

    Raises:
        PredictionError: shapes that do not fit, or nothing to judge.
    """
    if labels.shape != predictions.probabilities.shape or not len(predictions):
        raise PredictionError(
            f"Labels of shape {labels.shape} for predictions of shape {predictions.probabilities.shape}: expected one "
            "label for each prediction, and at least one item."
        )
    positives, negatives = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    usable = np.flatnonzero(predictions.trained & (positives > 0))
    clusters = clusters_of(predictions)
    columns = [(predictions.probabilities[:, c], labels[:, c], thresholds.get(predictions.findings[c])) for c in usable]
    patients = int(clusters.max()) + 1
    weighted = [WeightedFinding(p, y, clusters, patients, cut) for p, y, cut in columns]
    points = {name: np.full(len(predictions.findings), np.nan) for name in MEASURED}
    samples = {name: np.full((bootstraps, len(predictions.findings)), np.nan) for name in MEASURED}
    for name in MEASURED:
        values = [METRICS[name](p, y, cut) for p, y, cut in columns]
        points[name][usable] = [np.nan if value is None else value for value in values]
    for first in range(0, bootstraps, BLOCK):
        last = min(first + BLOCK, bootstraps)
        weights = resample_weights(patients, first, last, seed)
        for column, finding in zip(usable, weighted, strict=True):
            for name, values_drawn in finding.measure(weights, MEASURED).items():
                samples[name][first:last, column] = values_drawn
    return SeedResult(predictions.findings, positives, negatives, predictions.trained, points, samples)


def write_result(path: Path, result: SeedResult) -> None:
    """Write `.npz`, in one step."""
    arrays: dict[str, Any] = {
        "findings": np.array(result.findings, dtype=str),
        "positives": result.positives,
        "negatives": result.negatives,
        "trained": result.trained,
    }
    arrays |= {f"point:{name}": values for name, values in result.points.items()}
    arrays |= {f"sample:{name}": values for name, values in result.samples.items()}
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def read_result(path: Path) -> SeedResult:
    """Read what `write_result` has written.

    Raises:
        PredictionError: absent, damaged, or something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            parts = {
                kind: {name: np.asarray(arrays[f"{kind}:{name}"], np.float64) for name in MEASURED}
                for kind in ("point", "sample")
            }
            return SeedResult(
                tuple(arrays["findings"].tolist()), arrays["positives"], arrays["negatives"], arrays["trained"],
                parts["point"], parts["sample"],
            )  # fmt: skip
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PredictionError(f"{path} cannot be read: {error}. Delete its folder and run the plan again.") from error


def draw_seeds(seeds: int, bootstraps: int, root: int) -> Int[np.ndarray, "R D"]:
    """Which seeds each resample takes: S - 1 of S with replacement (one of one)."""
    size = max(seeds - 1, 1)
    draws = [stream(root, "ablation seeds", number).integers(0, seeds, size) for number in range(bootstraps)]
    return np.array(draws, dtype=np.int64).reshape(bootstraps, size)


def summarise(
    results: Mapping[int, SeedResult], columns: Mapping[str, Sequence[str]], root: int
) -> dict[str, dict[str, Any]]:
    """Means over seeds with their intervals, for each set of findings.

    Args:
        results: by seed, at least one.
        columns: findings to average over, by name of the set ("all", "head", ...).
        root: of the draws of seeds.

    Returns:
        set -> {"findings": count, metric -> {"value", "low", "high", "seeds": {seed: value}}}; None where undefined.
    """
    return {name: _summary(results, findings, root) for name, findings in columns.items()}


def _summary(results: Mapping[int, SeedResult], findings: Sequence[str], root: int) -> dict[str, Any]:
    summary: dict[str, Any] = {"findings": len(findings)}
    for metric in MEASURED:
        points, samples = _macro(results, findings, metric)
        summary[macro_name(metric)] = _with_interval(points, samples, list(results), root, interval)
    return summary


def compare(
    first: Mapping[int, SeedResult],
    second: Mapping[int, SeedResult],
    columns: Mapping[str, Sequence[str]],
    root: int,
) -> dict[str, dict[str, Any]]:
    """Differences first - second, paired by patient and seed, over the seeds that both have.

    Args:
        first: by seed.
        second: by seed, of the same test images.
        columns: as for `summarise`.
        root: of the draws of seeds.

    Returns:
        As `summarise`, with "shown": False where the interval includes zero, or there is none.

    Raises:
        PredictionError: no seed in both, or rows of other test images.
    """
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        raise PredictionError("The two rows have no seed in common; a difference is paired by seed.")
    compared = list(dict.fromkeys(name for findings in columns.values() for name in findings))
    for seed in seeds:
        if not _same_items(first[seed], second[seed], compared):
            raise PredictionError(f"Seed {seed}: the two rows were judged on other images, labels or findings.")
    both = [{seed: side[seed] for seed in seeds} for side in (first, second)]
    differences = {}
    for name, findings in columns.items():
        entry: dict[str, Any] = {"findings": len(findings)}
        for metric in MEASURED:
            (points, samples), (other_points, other_samples) = (_macro(side, findings, metric) for side in both)
            row = _with_interval(points - other_points, samples - other_samples, seeds, root, basic_interval)
            low, high = row["low"], row["high"]
            entry[macro_name(metric)] = row | {"shown": low is not None and high is not None and (low > 0 or high < 0)}
        differences[name] = entry
    return differences


def _same_items(one: SeedResult, other: SeedResult, names: Sequence[str]) -> bool:
    """As many positives and negatives of each of these findings; a row may have others besides."""
    if not set(names) <= set(one.findings) & set(other.findings):
        return False
    sides = [
        [(side.positives[place], side.negatives[place]) for place in map(side.findings.index, names)]
        for side in (one, other)
    ]
    return sides[0] == sides[1]


def _macro(
    results: Mapping[int, SeedResult], findings: Sequence[str], metric: str
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "R S"]]:
    """Macro mean of every seed, on all patients and on every resample; NaN where no finding is defined."""
    points, samples = [], []
    for result in results.values():
        chosen = [result.findings.index(name) for name in findings]
        points.append(mean_over_findings(result.points[metric][None, chosen])[0])
        samples.append(mean_over_findings(result.samples[metric][:, chosen]))
    return np.array(points, np.float64), np.stack(samples, axis=1)


def _with_interval(
    points: Float[np.ndarray, " S"], samples: Float[np.ndarray, "R S"], seeds: Sequence[int], root: int, ends_of: Ends
) -> dict[str, Any]:
    draws = draw_seeds(len(seeds), len(samples), root)
    resampled = np.take_along_axis(samples, draws, axis=1).mean(axis=1)
    value = float(points.mean())
    low, high = ends_of(resampled, value) or (None, None)
    return {
        "value": None if np.isnan(value) else value,
        "low": low,
        "high": high,
        "seeds": {str(s): None if np.isnan(p) else float(p) for s, p in zip(seeds, points, strict=True)},
    }
