"""A calibrator for another site: maps fitted on its labels on top of the old ones, and how they do out of sample.

A finding with enough labels gets a map of its own after the old map; one with too few keeps the old map and the old
operating points. Judging is by cross-fitting: patients are dealt into folds, and every item is calibrated and called by
what the other folds gave. What the numbers mean for the site is in `site_judgement.py`.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hilum.evaluation.bootstrap import clusters_of
from hilum.evaluation.calibration import Calibrator, steps_of
from hilum.evaluation.calibrators import CALIBRATORS, IDENTITY, fit_logistic
from hilum.evaluation.map_choice import (
    FOLDS,
    ISOTONIC_FROM,
    NO_LABELS,
    OWN_FROM,
    PLATT_FROM,
    apply_map,
    deal_patients,
    known_items,
    rarer_class,
)
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.thresholds import DEFAULT_POINTS, fit_thresholds

KEPT = "kept: few labels at this site"
HELD = (20.0, 1.0)
"""Precision of the prior on the log of the slope (at no change) and on the intercept (at none), below PLATT_FROM."""


class CrossFitted(NamedTuple):
    """What patients get from a calibrator that was fitted without them.

    Args:
        probabilities: calibrated.
        called: by operating point, 1.0 where the probability is above the cut, 0.0 where not, NaN without a cut.
    """

    probabilities: Float[np.ndarray, "N C"]
    called: dict[str, Float[np.ndarray, "N C"]]


def findings_with_enough(predictions: Predictions, labels: Int[np.ndarray, "N C"]) -> tuple[str, ...]:
    """Those with `OWN_FROM` or more items of each class, which get a map of their own."""
    enough = []
    for column, name in enumerate(predictions.findings):
        data = known_items(predictions.probabilities[:, column], labels[:, column])
        if data is not None and rarer_class([data]) >= OWN_FROM:
            enough.append(name)
    return tuple(enough)


def recalibrate(
    old: Calibrator | None,
    predictions: Predictions,
    labels: Int[np.ndarray, "N C"],
    groups: Mapping[str, str],
    points: Sequence[str] = DEFAULT_POINTS,
    own: Collection[str] | None = None,
) -> Calibrator:
    """Fit on a site's labels, on top of what there was.

    A finding of its own is fitted alone: what another finding does at this site is no reason to move it. Prevalence
    and scanner move the intercept first, so that is left almost free, and the slope is held to the old one's.

    Args:
        old: the model's calibrator for this stage and unit; None for a model that has none.
        predictions: raw, study or ensemble predictions that no part of the model was trained on.
        labels: codes, rows and columns as there.
        groups: head, medium or tail per finding; used for rare findings of a model that has no calibrator.
        points: operating points besides the usual four.
        own: findings that get a map of their own; None: `findings_with_enough`.

    Raises:
        StageError: predictions of another stage or unit than the old calibrator's.
        PredictionError: nothing to fit on, or shapes that do not fit.
    """
    names = predictions.findings
    points = tuple(dict.fromkeys((*DEFAULT_POINTS, *points)))
    own = findings_with_enough(predictions, labels) if own is None else own
    raw = predictions.probabilities
    base = raw if old is None else old.apply_to(predictions).probabilities
    fitted = Calibrator.fit(
        base, labels, names, groups, stage=predictions.stage, unit=predictions.unit, points=points,
        uids=predictions.image_uid.tolist(), steps=steps_of(predictions),
    )  # fmt: skip
    maps = dict(fitted.maps)
    thresholds, raw_thresholds = dict(fitted.thresholds), dict(fitted.raw_thresholds)
    for column, name in enumerate(names):
        new, before = fitted.maps[name], None if old is None else old.maps.get(name)
        if new is None:
            continue
        if name in own:
            site = _fit_map(base[:, column], labels[:, column])
            chained = before is not None and (before["kind"] != "identity" or before.get("after"))
            maps[name] = {**new, **site, "flag": None, **({"after": _bare(before)} if chained and before else {})}
            keep = np.isin(labels[:, column], (0, 1))
            y = labels[keep, column] == 1
            thresholds[name] = fit_thresholds(apply_map(site, base[keep, column]), y, None, points)
            raw_thresholds[name] = fit_thresholds(np.asarray(raw[keep, column], np.float64), y, None, points)
        elif old is not None and before is not None:
            maps[name] = {**before, "flag": before["flag"] or KEPT}
            _take(old.thresholds, thresholds, name)
            _take(old.raw_thresholds, raw_thresholds, name)
        elif new["known"] == 0:
            maps[name] = {**new, "kind": "identity", "parameters": {}, "flag": NO_LABELS}
            thresholds.pop(name, None)
            raw_thresholds.pop(name, None)
    return dataclasses.replace(fitted, maps=maps, thresholds=thresholds, raw_thresholds=raw_thresholds)


def _fit_map(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """A map of one finding after the old one, which it is held to as far as labels are few."""
    data = known_items(probabilities, labels)
    assert data is not None, "a finding without predictions has no map"
    rarer = rarer_class([data])
    if rarer >= ISOTONIC_FROM:
        return {"kind": "isotonic", "parameters": CALIBRATORS["isotonic"].fit(*data, dict(IDENTITY))}
    if rarer >= PLATT_FROM:
        return {"kind": "platt", "parameters": CALIBRATORS["platt"].fit(*data, dict(IDENTITY))}
    return {"kind": "temperature_bias", "parameters": fit_logistic(*data, IDENTITY, HELD)}


def _take(old: Mapping[str, dict[str, float]], new: dict[str, dict[str, float]], name: str) -> None:
    if name in old:
        new[name] = old[name]
    else:
        new.pop(name, None)


def _bare(one: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to apply a map."""
    return {key: one[key] for key in ("kind", "parameters", "after") if key in one}


def cross_fit_site(
    old: Calibrator | None,
    predictions: Predictions,
    labels: Int[np.ndarray, "N C"],
    groups: Mapping[str, str],
    points: Sequence[str] = DEFAULT_POINTS,
    folds: int = FOLDS,
) -> CrossFitted:
    """`recalibrate` without each fold of patients, applied to that fold; arguments as there.

    Which findings get a map of their own is decided once, by counts of all items, as in the calibrator that is kept.

    Raises:
        PredictionError: fewer patients than folds.
    """
    own = findings_with_enough(predictions, labels)
    fold = deal_patients(clusters_of(predictions), folds)
    points = tuple(dict.fromkeys((*DEFAULT_POINTS, *points)))
    probabilities = np.full(labels.shape, np.nan)
    called = {point: np.full(labels.shape, np.nan) for point in points}
    for number in range(folds):
        rest, here = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        calibrator = recalibrate(old, predictions.rows(rest), labels[rest], groups, points, own)
        probabilities[here] = calibrator.apply_to(predictions.rows(here)).probabilities
        for column, name in enumerate(predictions.findings):
            cuts = calibrator.thresholds.get(name, {})
            for point in points:
                if point in cuts:
                    called[point][here, column] = probabilities[here, column] > cuts[point]
    return CrossFitted(probabilities, called)
