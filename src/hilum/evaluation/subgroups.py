"""How well a model serves each group of patients: by sex, age band, view, dataset, or any recorded column.

Every group is set against the rest of the items on the same resamples of patients, so a gap has a paired interval.
Takes joined predictions, labels and one text per item and attribute; reading those from a manifest is in `truth.py`. A
group with too few patients is listed with its count and not judged: a number about ten people says nothing about a
group, and may say something about a person.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from hilum.core.errors import ConfigError
from hilum.core.types import VIEW_KINDS, view_kind
from hilum.data.labels import NORMAL_NAMES
from hilum.evaluation.bootstrap import clusters_of, difference_interval, interval, mean_over_findings, replicates
from hilum.evaluation.definitions import METRICS, macro_name, range_of
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.weighted import WeightedFinding

DEFAULT_ATTRIBUTES: tuple[str, ...] = ("sex", "age", "view", "dataset")
AGE_BANDS: tuple[int, ...] = (0, 18, 40, 60, 80)
"""First year of each band; the last has no end."""
MIN_PATIENTS = 20
"""Groups of fewer patients are listed and not judged."""
MAX_LEVELS = 30
"""More distinct values than this are a number or an id, and no groups."""
JUDGED: tuple[str, ...] = ("AP", "AUC", "F1@0.5", "F1@tuned", "ECE", "FNR@tuned")
UNDER_DIAGNOSIS = "FPR_normal"
"""False-positive rate of "Normal" at its threshold: ill people called healthy."""
UNRECORDED = frozenset({"", "unknown", "none", "null", "nan", "n/a"})


def age_band(value: str) -> str:
    """Years as text -> "18-39", "80+"; "" where it is no age in 0 .. 130."""
    try:
        years = float(value)
    except ValueError:
        return ""
    if not 0 <= years <= 130:
        return ""
    place = max(index for index, start in enumerate(AGE_BANDS) if years >= start)
    if place == len(AGE_BANDS) - 1:
        return f"{AGE_BANDS[place]}+"
    return f"{AGE_BANDS[place]}-{AGE_BANDS[place + 1] - 1}"


def levels(name: str, values: np.ndarray) -> np.ndarray:
    """(N,) text as recorded -> the group of each item: age in bands, views by kind, else as it is; "" if unrecorded.

    A study whose images differ carries their values joined by "+", and so does its group.

    Raises:
        ConfigError: more than `MAX_LEVELS` values.
    """
    grouped = {text: _level(name, text) for text in np.unique(values).tolist()}
    found = np.array([grouped[text] for text in values.tolist()], dtype=str)
    many = len(set(found.tolist()) - {""})
    if many > MAX_LEVELS:
        raise ConfigError(
            f"--by {name}: found {many} different values; expected at most {MAX_LEVELS} groups. Give a column of "
            "categories: a number or an id makes no groups (age is put into bands by itself)."
        )
    return found


def _level(name: str, text: str) -> str:
    parts = {part.strip() for part in text.split("+")} if name in ("view", "age", "age_years") else {text.strip()}
    if name == "view":
        kinds = {view_kind(part) for part in parts if part.casefold() not in UNRECORDED}
        return "+".join(VIEW_KINDS[kind] for kind in sorted(kinds))
    if name in ("age", "age_years"):
        return "+".join(sorted({age_band(part) for part in parts} - {""}))
    return "".join("" if part.casefold() in UNRECORDED else part for part in parts)


def choose_attributes(
    predictions: Predictions, recorded: Mapping[str, np.ndarray], by: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """The attributes to group by: those named, or of `DEFAULT_ATTRIBUTES` those that tell at least two groups apart.

    Args:
        predictions: whose own view and dataset stand in where the labels record none.
        recorded: of the labels (`Joined.attributes`).
        by: names; None for the default.

    Raises:
        ConfigError: a named attribute of which nothing is recorded, or that makes no groups.
    """
    own = {"view": predictions.view, "dataset": predictions.dataset}
    found: dict[str, np.ndarray] = {}
    for name in DEFAULT_ATTRIBUTES if by is None else by:
        values = next((v for v in (recorded.get(name), own.get(name)) if v is not None and (v != "").any()), None)
        try:
            distinct = set() if values is None else set(levels(name, values).tolist()) - {""}
        except ConfigError:
            if by is not None:
                raise
            continue  # nobody asked for it
        if by is not None and not distinct:
            raise ConfigError(f"--by {name}: nothing is recorded for the evaluated items.")
        if values is not None and len(distinct) >= (2 if by is None else 1):
            found[name] = values
    return found


@dataclass(frozen=True)
class _Side:
    """One side of a comparison: metrics of every finding over some of the items, and in every resample."""

    points: dict[str, Float[np.ndarray, " C"]]
    samples: dict[str, Float[np.ndarray, "R C"]]
    usable: Bool[np.ndarray, " C"]
    """Findings with enough positives and with a negative."""


@dataclass(frozen=True)
class _Items:
    """What is judged, and the resamples on which it is."""

    predictions: Predictions
    labels: Int[np.ndarray, "N C"]
    thresholds: Mapping[str, float]
    clusters: Int[np.ndarray, " N"]
    bootstraps: int
    seed: int
    min_positives: int

    def patients(self, rows: Bool[np.ndarray, " N"]) -> int:
        return len(np.unique(self.clusters[rows]))

    def measure(self, rows: Bool[np.ndarray, " N"]) -> _Side:
        p, y, clusters = self.predictions.probabilities[rows], self.labels[rows], self.clusters[rows]
        cuts = [self.thresholds.get(name) for name in self.predictions.findings]
        judged = (*JUDGED, "FPR@tuned")
        columns = [(p[:, c], y[:, c], cut) for c, cut in enumerate(cuts)]
        enough = (y == 1).sum(axis=0) >= max(self.min_positives, 1)
        usable = enough & (y == 0).any(axis=0) & self.predictions.trained
        points = {
            name: np.array([np.nan if not fine or (v := METRICS[name](*each)) is None else v
                            for each, fine in zip(columns, usable, strict=True)], np.float64)
            for name in judged
        }  # fmt: skip
        samples = {name: np.full((self.bootstraps, len(columns)), np.nan) for name in judged}
        if self.bootstraps and usable.any():
            count = int(self.clusters.max()) + 1
            chosen = np.flatnonzero(usable)
            found = replicates(
                [WeightedFinding(*columns[c][:2], clusters, count, columns[c][2]) for c in chosen],
                self.bootstraps, self.seed,
            )  # fmt: skip
            for name in judged:
                samples[name][:, chosen] = found[name]
        return _Side(points, samples, usable)


def subgroups(
    predictions: Predictions,
    labels: Int[np.ndarray, "N C"],
    attributes: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    min_positives: int = 0,
    min_patients: int = MIN_PATIENTS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Metrics of every group, of the rest, and the gap between them (docs/reference/metrics.md).

    Both sides are taken over the same findings: those with at least `min_positives` (and one) positives and with a
    negative on both. The rest is every other item whose group is recorded; where it has too few patients there is no
    gap.

    Args:
        predictions: the evaluated items.
        labels: int8, rows and columns as the predictions'.
        attributes: name -> (N,) text of each item, as recorded; grouped by `levels`.
        thresholds: of F1, misses and under-diagnosis; fixed on validation.
        bootstraps: resamples of patients; 0 for no intervals.
        seed: root of the resamples, the same as elsewhere.
        min_positives: findings with fewer on either side are left out of that comparison.
        min_patients: groups of fewer are listed under `too_few`.
        advance: called after each group: a group costs about as much as the whole evaluation.

    Returns:
        {ATTRIBUTE: {"groups": {LEVEL: {"n_items", "n_patients", "findings", "values", "ci95", "rest", "gap"}},
        "too_few": {LEVEL: patients}, "unrecorded": items}}.

    Raises:
        ConfigError: an attribute that makes no groups.
    """
    items = _Items(predictions, labels, thresholds or {}, clusters_of(predictions), bootstraps, seed, min_positives)
    measured: dict[bytes, _Side] = {}  # the rest of one of two groups is the other

    def measure(rows: Bool[np.ndarray, " N"]) -> _Side:
        key = np.packbits(rows).tobytes()
        if key not in measured:
            measured[key] = items.measure(rows)
        return measured[key]

    result: dict[str, Any] = {}
    grouped = {name: levels(name, values) for name, values in attributes.items()}
    for name, group in grouped.items():
        recorded = group != ""
        parts = {level: group == level for level in sorted(set(group[recorded].tolist()))}
        patients = {level: items.patients(rows) for level, rows in parts.items()}
        judged: dict[str, Any] = {}
        for level, rows in parts.items():
            if patients[level] >= min_patients:
                rest = recorded & ~rows
                judged[level] = {
                    "n_items": int(rows.sum()),
                    "n_patients": patients[level],
                    **_compared(
                        predictions.findings,
                        measure(rows),
                        measure(rest) if items.patients(rest) >= max(min_patients, 1) else None,
                    ),
                }
            advance()
        result[name] = {
            "groups": judged,
            "too_few": {level: count for level, count in patients.items() if count < min_patients},
            "unrecorded": int((~recorded).sum()),
        }
        measured.clear()
    return result


def _compared(findings: Sequence[str], side: _Side, rest: _Side | None) -> dict[str, Any]:
    usable = side.usable & (rest.usable if rest else True)
    names = [name for name, keep in zip(findings, usable, strict=True) if keep]
    values: dict[str, float | None] = {}
    others: dict[str, float | None] = {}
    intervals: dict[str, list[float]] = {}
    gaps: dict[str, dict[str, Any]] = {}
    for metric in (*JUDGED, "FPR@tuned"):
        keep, title = usable, macro_name(metric)
        if metric == "FPR@tuned":
            keep, title = usable & np.array([name in NORMAL_NAMES for name in findings]), UNDER_DIAGNOSIS
        points = side.points[metric] - (0 * rest.points[metric] if rest else 0)  # undefined in one: in neither
        columns = np.flatnonzero(keep & ~np.isnan(points))
        if len(columns) == 0:
            values[title] = None
            continue
        values[title] = float(side.points[metric][columns].mean())
        ends = interval(mean_over_findings(side.samples[metric][:, columns]), values[title], range_of(metric))
        if ends:
            intervals[title] = ends
        if rest:
            others[title] = float(rest.points[metric][columns].mean())
            point = float((side.points[metric][columns] - rest.points[metric][columns]).mean())
            gaps[title] = difference_interval(side.samples[metric][:, columns], rest.samples[metric][:, columns], point)
    return {"findings": names, "values": values, "ci95": intervals, "rest": others, "gap": gaps}
