"""Whether a model looked where the finding is: maps against masks and boxes, each beside what chance would give.

Energy: the share of a map that lies in the region (energy-based pointing game, Wang et al. 2020, "Score-CAM", section
4.3); an even map scores the region's area. Pointing game (Zhang et al. 2018, "Top-down Neural Attention by Excitation
Backprop", section 4.3): whether the middle of the highest patch lies in the region, or no farther from it than a
tolerance; a patch taken at random scores the share of patches that would hit. Chance is a low bar, because findings
keep to their places: beside it stands what the mean map of the other images scores, which knows the finding and not the
image. All are means over images for each finding, then plain means over findings, with intervals by patient. What a map
is: docs/explanation/where-it-looked.md. Past 300 lines: two scores, their bars, and the intervals of all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hilum.core.errors import PredictionError
from hilum.data.regions import Regions, area_in_cells, distance_of_cells
from hilum.evaluation.bootstrap import (
    BLOCK,
    clusters_of,
    difference_interval,
    holm,
    interval,
    mean_over_findings,
    resample_weights,
)
from hilum.evaluation.map_files import Maps
from hilum.evaluation.metrics import GROUPS
from hilum.evaluation.predictions import Predictions, bare_ids

TOLERANCE = 15 / 224
"""Of the pointing game, as a share of the square's side: 15 pixels, as it was published, at 224."""
MIN_IMAGES = 5
"""Findings with fewer images are listed and in no mean, unless another number is asked for."""
MEASURES: tuple[str, ...] = (
    "energy", "area", "pointing", "pointing_chance", "energy_of_others", "pointing_of_others",
)  # fmt: skip
CHANCE = {"energy": "area", "pointing": "pointing_chance"}
OTHERS = {"energy": "energy_of_others", "pointing": "pointing_of_others"}


@dataclass(frozen=True)
class Pairs:
    """Pairs of an image and a finding that have a region, and what each map file scores on them.

    Args:
        rows: (P,) rows of the predictions.
        columns: (P,) findings of the predictions.
        scores: one for each map file: columns as `MEASURES`.
        left_out: regions that were not judged, by reason.
    """

    rows: Int[np.ndarray, " P"]
    columns: Int[np.ndarray, " P"]
    scores: tuple[Float[np.ndarray, "P K"], ...]
    left_out: dict[str, int]


def score(
    values: Float[np.ndarray, "h w"],
    area: Float[np.ndarray, "h w"],
    distance: Float[np.ndarray, "h w"],
    tolerance: float,
) -> tuple[float, float, float, float]:
    """Energy in a region, its area, the pointing game, and its chance, of one map; in [0, 1] each.

    Where several patches are highest alike, a hit counts as the share of them that hit: an even map has its chance.

    Args:
        values: of the map, 0 or more.
        area: share of each patch that the region takes.
        distance: of each patch's middle from the region, in sides of the square.
        tolerance: distance up to which a patch is a hit.
    """
    hits = distance <= tolerance
    energy = float((values * area).sum() / values.sum())
    return energy, float(area.mean()), float(hits[values == values.max()].mean()), float(hits.mean())


def pair_up(
    predictions: Predictions,
    maps: Sequence[Maps],
    regions: Regions,
    tolerance: float,
    done: Callable[[int], None] = lambda count: None,
) -> Pairs:
    """Score every pair of an evaluated image and a finding that has a region, and a map in every file.

    Raises:
        PredictionError: predictions of studies, or nothing to judge.
    """
    if predictions.unit != "image":
        raise PredictionError(
            "Maps belong to images, and these predictions have one row per study. Evaluate predictions per image."
        )
    row_of = _row_of(predictions, {image for image, _ in regions.keys})
    column_of = {name: column for column, name in enumerate(predictions.findings)}
    uid_of = predictions.image_uid.tolist()
    places = [_places(one) for one in maps]
    wanted = [(row_of[image], column_of[name], image, name) for image, name in regions.keys
              if image in row_of and name in column_of]  # fmt: skip
    left_out = {"regions of other images or findings": len(regions) - len(wanted), "without a map": 0,
                "outside the square that was seen": 0}  # fmt: skip
    rows, columns = [], []
    cells: list[list[_Cells]] = []
    done(len(regions) - len(wanted))
    for row, column, image, name in sorted(wanted):
        done(1)
        found = [place.get((uid_of[row], name)) for place in places]
        if any(place is None for place in found):
            left_out["without a map"] += 1
            continue
        region = regions.region(image, name)
        assert region is not None
        each = []
        for one, place in zip(maps, found, strict=True):
            values, box = one.maps[place], tuple(one.boxes[one.image[place]].tolist())
            grid = values.shape
            area = area_in_cells(region, box, grid)
            each.append(_Cells(values / values.sum(), area, distance_of_cells(region, box, grid)))
        if not all(part.area.any() for part in each):
            left_out["outside the square that was seen"] += 1
            continue
        rows.append(row)
        columns.append(column)
        cells.append(each)
    if not rows:
        raise PredictionError(
            f"No pair of image and finding has a region in {regions.source} and a map: {len(regions)} regions, "
            f"{sum(map(len, maps))} maps; {', '.join(f'{count} {why}' for why, count in left_out.items())}. "
            "Regions are matched by image_id and finding."
        )
    scores = [_score_all([each[k] for each in cells], np.array(columns), tolerance) for k in range(len(maps))]
    return Pairs(np.array(rows), np.array(columns), tuple(scores), left_out)


class _Cells(NamedTuple):
    """One map on its grid, summing to 1, and where its region lies."""

    values: np.ndarray
    area: np.ndarray
    distance: np.ndarray


def _score_all(cells: Sequence[_Cells], columns: Int[np.ndarray, " P"], tolerance: float) -> Float[np.ndarray, "P K"]:
    """Scores of every map of one file, and of the mean map of the other images in its place.

    Where there is no other image, an even map stands for it.
    """
    total = {column: np.sum([cells[p].values for p in np.flatnonzero(columns == column).tolist()], axis=0)
             for column in np.unique(columns).tolist()}  # fmt: skip
    counts = np.bincount(columns)
    table = np.empty((len(cells), len(MEASURES)))
    for row, ((values, area, distance), column) in enumerate(zip(cells, columns.tolist(), strict=True)):
        table[row, :4] = score(values, area, distance, tolerance)
        others = total[column] - values if counts[column] > 1 else np.ones_like(values)
        energy, _, pointing, _ = score(np.maximum(others, 0), area, distance, tolerance)
        table[row, 4:] = energy, pointing
    return table


def _row_of(predictions: Predictions, wanted: set[str]) -> dict[str, int]:
    """Rows of the images that have regions."""
    rows: dict[str, int] = {}
    for row, image in enumerate(bare_ids(predictions.image_id, predictions.dataset).tolist()):
        if image in wanted and rows.setdefault(image, row) != row:
            raise PredictionError(
                f"Image id {image!r} occurs in several datasets of these predictions, and regions know images by their "
                "id alone. Evaluate one dataset at a time."
            )
    return rows


def _places(maps: Maps) -> dict[tuple[str, str], int]:
    uids, names = maps.image_uid.tolist(), maps.findings
    pairs = zip(maps.image.tolist(), maps.finding.tolist(), strict=True)
    return {(uids[image], names[finding]): place for place, (image, finding) in enumerate(pairs)}


def localise(
    predictions: Predictions,
    maps: Mapping[str, Maps],
    regions: Regions,
    groups: Mapping[str, str] | None = None,
    tolerance: float = TOLERANCE,
    bootstraps: int = 1000,
    seed: int = 0,
    min_images: int = MIN_IMAGES,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """`localisation` of `metrics.json`: how well each map file points at the regions, and how the files compare.

    Args:
        predictions: the evaluated images.
        maps: by name; the first is compared with each other one, on the same pairs and the same resampled patients.
        regions: masks or boxes.
        groups: head, medium or tail of each finding.
        tolerance: of the pointing game, as a share of the square's side.
        bootstraps: resamples of patients; 0 for no intervals.
        seed: root of the resamples, as elsewhere.
        min_images: findings with fewer images stay out of the means, and are listed. A finding of a single patient has
            no interval.
        done: told of regions that were looked at.

    Raises:
        PredictionError: predictions of studies, or nothing to judge.
    """
    pairs = pair_up(predictions, list(maps.values()), regions, tolerance, done)
    counts = np.bincount(pairs.columns, minlength=len(predictions.findings))
    counted = np.flatnonzero(counts >= max(min_images, 1))
    names = [predictions.findings[column] for column in counted]
    if not names:
        raise PredictionError(
            f"No finding has {min_images} images with a region in {regions.source} and a map; the most has "
            f"{int(counts.max())}. Ask for fewer: --min-positives {int(counts.max())}."
        )
    groups = dict(groups or {})
    member = (pairs.columns[:, None] == counted).astype(np.float64)  # P C
    clusters = clusters_of(predictions)
    several = [len(set(clusters[pairs.rows[pairs.columns == column]].tolist())) > 1 for column in counted]
    points = [_means(scores, member, np.ones((len(member), 1)))[0] for scores in pairs.scores]  # each C K
    samples = _resampled(pairs, member, clusters, bootstraps, seed)
    chosen = {"macro": np.ones(len(names), bool)} | {
        group: np.array([groups.get(name) == group for name in names], bool) for group in GROUPS
    }
    files = []
    for (name, one), point, sample in zip(maps.items(), points, samples, strict=True):
        files.append({
            "name": name, "model": one.metadata.get("model"), "kind": one.metadata.get("kind"),
            "over": one.metadata.get("over"), "grid": list(one.maps.shape[1:]),
            **{group: _summary(point, sample, keep) for group, keep in chosen.items()},
            "findings": {
                finding: {"images": int(counts[column]), "group": groups.get(finding),
                          **_summary(point, sample if several[place] else sample[:0], np.arange(len(names)) == place)}
                for place, (finding, column) in enumerate(zip(names, counted.tolist(), strict=True))
            },
        })  # fmt: skip
    return {
        "regions": {"file": regions.source, "kind": regions.kind, "sha256": regions.sha256, "regions": len(regions)},
        "tolerance": tolerance,
        "n_pairs": len(pairs.rows),
        "n_images": len(set(pairs.rows.tolist())),
        "left_out": {**pairs.left_out, **regions.left_out},
        "few_images": [predictions.findings[c] for c in np.flatnonzero((counts > 0) & (counts < min_images))],
        "min_images": min_images,
        "maps": files,
        "differences": [
            {"first": files[0]["name"], "second": files[k]["name"], **_differences(points, samples, k),
             "by_finding": _by_finding(points, samples, k, names, several)}
            for k in range(1, len(files))
        ],
    }  # fmt: skip


def _means(
    scores: Float[np.ndarray, "P K"], member: Float[np.ndarray, "P C"], weights: Float[np.ndarray, "P R"]
) -> Float[np.ndarray, "R C K"]:
    """Weighted mean of each finding's images; NaN where none of them was drawn."""
    total = np.einsum("pr,pc,pk->rck", weights, member, scores, optimize=True)
    mass = weights.T @ member  # R C
    return np.divide(total, mass[..., None], out=np.full(total.shape, np.nan), where=mass[..., None] > 0)


def _resampled(
    pairs: Pairs, member: Float[np.ndarray, "P C"], clusters: Int[np.ndarray, " N"], bootstraps: int, seed: int
) -> list[Float[np.ndarray, "R C K"]]:
    """The same resamples of patients for every map file, as for every other metric of an evaluation."""
    found: list[list[np.ndarray]] = [[] for _ in pairs.scores]
    for first in range(0, bootstraps, BLOCK):
        weights = resample_weights(int(clusters.max()) + 1, first, min(first + BLOCK, bootstraps), seed)
        drawn = weights[clusters[pairs.rows]]
        for samples, scores in zip(found, pairs.scores, strict=True):
            samples.append(_means(scores, member, drawn))
    shape = (0, member.shape[1], len(MEASURES))
    return [np.concatenate([np.zeros(shape), *samples]) for samples in found]


def _summary(
    point: Float[np.ndarray, "C K"], samples: Float[np.ndarray, "R C K"], keep: Bool[np.ndarray, " C"]
) -> dict[str, Any]:
    """Means over some findings with their intervals, and how far they are above chance and above other images' maps."""
    if not keep.any():
        return {**dict.fromkeys(MEASURES), "ci95": {}, "above_chance": {}, "above_others": {}, "counted": 0}
    values = {name: float(point[keep, column].mean()) for column, name in enumerate(MEASURES)}
    ends = {
        name: interval(mean_over_findings(samples[:, keep, column]), values[name])
        for column, name in enumerate(MEASURES)
    }

    def above(which: Mapping[str, str]) -> dict[str, Any]:
        result = {}
        for name, other in which.items():
            ours, theirs = MEASURES.index(name), MEASURES.index(other)
            gap = values[name] - values[other]
            result[name] = difference_interval(samples[:, keep, ours], samples[:, keep, theirs], gap)
        return result

    return {
        **values, "ci95": {name: pair for name, pair in ends.items() if pair}, "above_chance": above(CHANCE),
        "above_others": above(OTHERS), "counted": int(keep.sum()),
    }  # fmt: skip


def _differences(points: Sequence[np.ndarray], samples: Sequence[np.ndarray], k: int) -> dict[str, Any]:
    """The first file minus file k, over all findings."""
    result = {}
    for measure in CHANCE:
        column = MEASURES.index(measure)
        first, second = (float(points[place][:, column].mean()) for place in (0, k))
        row = difference_interval(samples[0][:, :, column], samples[k][:, :, column], first - second)
        result[measure] = {"first": first, "second": second, **row}
    return result


def _by_finding(
    points: Sequence[np.ndarray], samples: Sequence[np.ndarray], k: int, names: Sequence[str], several: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {name: {} for name in names}
    for measure in CHANCE:
        rows, column = [], MEASURES.index(measure)
        for place in range(len(names)):
            gap = float(points[0][place, column] - points[k][place, column])
            own = slice(place, place + 1)
            drawn = slice(None if several[place] else 0)
            rows.append(difference_interval(samples[0][drawn, own, column], samples[k][drawn, own, column], gap))
        for name, row, p in zip(names, rows, holm([row["p"] for row in rows]), strict=True):
            result[name][measure] = {**row, "p_holm": p, "shown_holm": p is not None and p < 0.05}
    return result
