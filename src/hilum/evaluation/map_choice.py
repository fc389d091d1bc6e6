"""Which calibration map each finding gets, and how well such maps do on patients they were not fitted on.

Rare findings lean on their head / medium / tail group. Judging is by cross-fitting: patients are dealt into folds, and
every item is mapped by what the other folds gave. The maps are in `calibrators.py`; what is kept of them, and where
they may be applied, in `calibration.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import ConfigError, PredictionError
from hilum.core.seeding import stream
from hilum.evaluation.calibrators import CALIBRATORS, IDENTITY
from hilum.evaluation.definitions import brier, expected_calibration_error, log_loss
from hilum.evaluation.thresholds import ENOUGH

METHODS = ("auto", "cross_fitted", *CALIBRATORS)
ISOTONIC_FROM, PLATT_FROM, OWN_FROM = 1000, 100, 20
FEW_POSITIVES = "uncalibrated: few positives"
NO_LABELS = "uncalibrated: no label"
FOLDS = 5
JUDGED = ("log_loss", "Brier", "ECE")

Data = tuple[np.ndarray, np.ndarray]
"""Probabilities (float64) and labels (bool) of the items of one finding whose label is known."""
Map = dict[str, Any]


def known_items(probabilities: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> Data | None:
    """The items with a known label; None for a finding that was never trained (NaN throughout)."""
    if np.isnan(probabilities).all():
        return None
    keep = (labels == 0) | (labels == 1)
    return np.asarray(probabilities, np.float64)[keep], np.asarray(labels)[keep] == 1


def rarer_class(parts: Iterable[Data]) -> int:
    """Positives or negatives of all parts together, whichever are fewer."""
    labels = [y for _, y in parts]
    positives = sum(int(y.sum()) for y in labels)
    return min(positives, sum(map(len, labels)) - positives)


def choose_maps(data: Mapping[str, Data], groups: Mapping[str, str], kinds: Mapping[str, str]) -> dict[str, Map]:
    """Fit one map per finding.

    Args:
        data: of each finding.
        groups: of each finding; those without one form a group.
        kinds: the method of each finding: "auto" or a name in CALIBRATORS.
    """
    shared = _Pools(data, groups)
    maps = {}
    for name, (p, y) in data.items():
        rarer, group = rarer_class([(p, y)]), groups.get(name, "")
        kind = kinds[name]
        if kind == "auto":
            kind = "isotonic" if rarer >= ISOTONIC_FROM else "platt" if rarer >= PLATT_FROM else "temperature_bias"
        family, few = CALIBRATORS[kind].shared, rarer < OWN_FROM
        # Platt and steps have data enough to stand alone where auto chooses them: no prior, and no pooling for one
        alone = rarer >= {"platt": PLATT_FROM, "isotonic": ISOTONIC_FROM}.get(kind, np.inf)
        prior = dict(IDENTITY) if alone else shared.of(family, group)
        maps[name] = {
            "kind": family if few else kind,
            "parameters": dict(prior) if few else CALIBRATORS[kind].fit(p, y, prior),
            "positives": int(y.sum()),
            "known": len(y),
            "group": group,
            "flag": NO_LABELS if len(y) == 0 else FEW_POSITIVES if few else None,
            "threshold_shrunk": bool(y.sum() < ENOUGH),
        }
    return maps


class _Pools:
    """Parameters of groups, fitted when they are asked for: those of large findings together take the longest."""

    def __init__(self, data: Mapping[str, Data], groups: Mapping[str, str]) -> None:
        self.data, self.groups = data, groups
        self.found: dict[tuple[str, str | None], dict[str, Any]] = {}

    def of(self, family: str, group: str | None) -> dict[str, Any]:
        """Of one group, or of all findings (None), by a kind's `pool`.

        A group with too few positives takes those of all findings, these the identity.
        """
        if (family, group) not in self.found:
            parts = [part for name, part in self.data.items() if group in (None, self.groups.get(name, ""))]
            if rarer_class(parts) >= OWN_FROM or group is None:
                enough = parts if rarer_class(parts) >= OWN_FROM else []
                self.found[family, group] = CALIBRATORS[family].pool(enough)
            else:
                self.found[family, group] = self.of(family, None)
        return self.found[family, group]


def apply_map(one: Mapping[str, Any] | None, probabilities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Map probabilities; NaN throughout for a finding that was never trained.

    A map that was fitted on top of an earlier one (`recalibration.py`) holds that one under "after".
    """
    if one is None:
        return np.full(len(probabilities), np.nan)
    before = apply_map(one["after"], probabilities) if one.get("after") else probabilities
    return CALIBRATORS[one["kind"]].apply(one["parameters"], before)


def kinds_of(one: Mapping[str, Any] | None) -> list[str]:
    """The kind of a map, and of those that it was fitted on top of."""
    return [one["kind"], *kinds_of(one.get("after"))] if one else []


def deal_patients(patients: Sequence[Any] | np.ndarray, folds: int) -> Int[np.ndarray, " N"]:
    """The fold of each item: whole patients, dealt at random and always alike.

    Raises:
        ConfigError: fewer than two folds.
        PredictionError: fewer patients than folds.
    """
    distinct, place = np.unique(np.asarray(patients), return_inverse=True)
    if folds < 2:
        raise ConfigError(f"Cross-fitting needs 2 folds or more; found {folds}.")
    if len(distinct) < folds:
        raise PredictionError(f"Cross-fitting in {folds} folds needs as many patients; found {len(distinct)}.")
    order = stream(0, "calibration folds").permutation(len(distinct))
    return np.asarray((np.argsort(order) % folds)[place])


def cross_fit(
    probabilities: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, "N C"],
    findings: Sequence[str],
    groups: Mapping[str, str],
    kinds: Mapping[str, str],
    fold: Int[np.ndarray, " N"],
) -> Float[np.ndarray, "N C"]:
    """Each item mapped by what the other folds gave, groups' parameters included; NaN where never trained."""
    mapped = np.full(probabilities.shape, np.nan)
    for one in np.unique(fold):
        rest, here = fold != one, fold == one
        data = {name: known_items(probabilities[rest, c], labels[rest, c]) for c, name in enumerate(findings)}
        maps = choose_maps({name: part for name, part in data.items() if part is not None}, groups, kinds)
        for c, name in enumerate(findings):
            mapped[here, c] = apply_map(maps.get(name), probabilities[here, c])
    return mapped


def cross_fitted_kinds(
    probabilities: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, "N C"],
    findings: Sequence[str],
    groups: Mapping[str, str],
    fold: Int[np.ndarray, " N"],
) -> dict[str, str]:
    """The kind with the least cross-fitted log loss for each finding; of equals, the simplest.

    A finding with too few positives for a map of its own is left to `auto` (its group's parameters), and isotonic
    steps are considered from 100 of the rarer class on.
    """
    losses = {
        kind: cross_fit(probabilities, labels, findings, groups, dict.fromkeys(findings, kind), fold)
        for kind in CALIBRATORS
    }
    chosen = {}
    for c, name in enumerate(findings):
        data = known_items(probabilities[:, c], labels[:, c])
        rarer = rarer_class([data]) if data else 0
        kinds = [kind for kind in CALIBRATORS if kind != "isotonic" or rarer >= PLATT_FROM]
        scores = (
            {kind: log_loss(losses[kind][:, c], labels[:, c]) or 0.0 for kind in kinds} if rarer >= OWN_FROM else {}
        )
        chosen[name] = min(scores, key=lambda kind: scores[kind]) if scores else "auto"
    return chosen


def compare(
    before: Float[np.ndarray, "N C"],
    after: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, "N C"],
    findings: Sequence[str],
) -> dict[str, Any]:
    """Log loss, Brier score and ECE before and after, per finding and as macro means over those with both classes.

    Returns:
        `{"macro": {name: [before, after]}, "findings": {finding: {name: [before, after]}}}`.
    """  # fmt: skip
    rows: dict[str, dict[str, list[float]]] = {}
    for c, name in enumerate(findings):
        data = known_items(before[:, c], labels[:, c])
        if data is None or rarer_class([data]) == 0:
            continue
        sides = [
            (log_loss(v[:, c], labels[:, c]), brier(v[:, c], labels[:, c]),
             expected_calibration_error(v[:, c], labels[:, c]))
            for v in (before, after)
        ]  # fmt: skip
        rows[name] = {
            key: [float(v or 0) for v in pair] for key, pair in zip(JUDGED, zip(*sides, strict=True), strict=True)
        }
    macro = {key: np.mean([row[key] for row in rows.values()], axis=0).tolist() for key in JUDGED} if rows else {}
    return {"macro": macro, "findings": rows}
