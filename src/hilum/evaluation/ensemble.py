"""From several models to one: a weighted mean of their probabilities, log-odds or ranks over the same items.

Runs after study aggregation and before calibration. It never guesses which rows or columns belong together: items are
joined by uid and findings by name, and members that do not cover the same items are refused. Which members, and with
what weights, is decided in `ensemble_search.py`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logit

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.evaluation.fitted_items import merge_items
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.study_rules import SMALLEST

ENSEMBLES: dict[str, str] = {
    "mean": "arithmetic mean of probabilities (CXR-LT 2024 slides, ensemble)",
    "logit_mean": "mean of log-odds: a member that is sure weighs more",
    "rank_mean": "mean of ranks, for members of different losses: not probabilities until calibrated",
}
"""Name -> what it is."""


def mean_over_models(members: Sequence[Predictions]) -> Predictions:
    """`combine_members` by the arithmetic mean of probabilities (CXR-LT 2024 slides, ensemble)."""
    return combine_members(members)


def combine_members(
    members: Sequence[Predictions],
    rule: str = "mean",
    weights: Sequence[float] | None = None,
    ranks: Sequence[Ranks] | None = None,
) -> Predictions:
    """Several models' predictions of the same items as one, at one stage and unit.

    Rows and columns come in the first member's order; the values do not depend on the order of the members. A finding
    that some members were never trained on is combined over those that were.

    Args:
        members: raw or study predictions, one per model.
        rule: a name in ENSEMBLES.
        weights: one per member, not negative, of any sum; None: equal.
        ranks: for `rank_mean`, where each member's scores stand; None: among the items given here, so that an item's
            value depends on the others.

    Raises:
        StageError: members at different stages, calibrated, damped, or themselves ensembles.
        PredictionError: different items (with counts and an example), units, identities or findings.
        ConfigError: weights that do not fit.
    """
    if rule not in ENSEMBLES:
        raise UnknownNameError("ensemble", rule, ENSEMBLES)
    if not members:
        raise PredictionError("An ensemble needs at least one member.")
    shares = check_weights(weights, len(members))
    first = members[0]
    for number, member in enumerate(members, 1):
        _check_member(first, member, number)
    stacked = np.stack([_aligned(first, member) for member in members])
    if rule == "rank_mean":
        own = ranks or [Ranks.of_values(values, first.findings, knots=None) for values in stacked]
        stacked = np.stack([one.apply(values, first.findings) for one, values in zip(own, stacked, strict=True)])
    described = [{"model": member.metadata.get("model"), "stage": member.stage} for member in members]
    if weights is not None:
        described = [one | {"weight": float(share)} for one, share in zip(described, shares, strict=True)]
    metadata = {
        "stage": "ensemble",
        "ensemble": rule,
        "scale": "ranks, not probabilities" if rule == "rank_mean" else None,
        "members": described,
        "model": None,
        "thresholds": None,
        "calibration": None,
        "head_splits": sorted({split for m in members for split in m.metadata.get("head_splits", ())}) or None,
        "chosen_on": merge_items([chosen for m in members if (chosen := m.metadata.get("chosen_on"))]),
        "exposed_images": _most_exposed(members),
        "accepted_leak": _accepted_leak(members),
        "uncalibrated": _said(members, "uncalibrated"),
        "exposure_not_recorded": _said(members, "exposure_not_recorded"),
    }
    return first.replace(_mean(stacked[shares > 0], shares[shares > 0], rule == "logit_mean"), **metadata)


def check_weights(weights: Sequence[float] | None, count: int) -> Float[np.ndarray, " M"]:
    """Weights as an array; ones where there are none.

    Raises:
        ConfigError: another number of them, a negative one, or none above 0.
    """
    values = np.ones(count) if weights is None else np.asarray(list(weights), np.float64)
    if len(values) != count or not (np.isfinite(values) & (values >= 0)).all() or not values.any():
        raise ConfigError(
            f"An ensemble of {count} needs as many weights of at least 0, not all 0; found {values.tolist()}."
        )
    return values


def _mean(
    stacked: Float[np.ndarray, "M N C"], shares: Float[np.ndarray, " M"], logits: bool
) -> Float[np.ndarray, "N C"]:
    """Weighted mean over members; NaN (never trained) has no say, and stays where nobody has one."""
    # sorted before the sum, so that no member is "first" in the rounding; NaN goes to the end
    weights = np.broadcast_to(shares[:, None, None], stacked.shape)
    order = np.lexsort((weights, stacked), axis=0)
    stacked, weights = (np.take_along_axis(values, order, axis=0) for values in (stacked, weights))
    trained = ~np.isnan(stacked)
    values = logit(np.clip(stacked, SMALLEST, 1 - SMALLEST)) if logits else stacked
    total = np.where(trained, values * weights, 0.0).sum(axis=0)
    sums = np.where(trained, weights, 0.0).sum(axis=0)
    average = np.divide(total, sums, out=np.full(total.shape, np.nan), where=sums > 0)
    lowest = stacked[0]
    highest = np.take_along_axis(stacked, np.maximum(trained.sum(axis=0) - 1, 0)[None], axis=0)[0]
    return np.clip(expit(average) if logits else average, lowest, highest)


def _said(members: Sequence[Predictions], key: str) -> str | None:
    """What members say under a key of their metadata, each sentence once."""
    return "; ".join(dict.fromkeys(said for m in members if (said := m.metadata.get(key)))) or None


def _accepted_leak(members: Sequence[Predictions]) -> str | None:
    """The leaks that were accepted; None where a member has met images without one: nobody has accepted that."""
    unexcused = any(m.metadata.get("exposed_images") and not m.metadata.get("accepted_leak") for m in members)
    return None if unexcused else _said(members, "accepted_leak")


def _most_exposed(members: Sequence[Predictions]) -> int | None:
    """The largest count of images that a member has met; None where it is 0 and some member does not say."""
    counts = [member.metadata.get("exposed_images") for member in members]
    most = max((count for count in counts if count is not None), default=0)
    return most if most or None not in counts else None


def _check_member(first: Predictions, member: Predictions, number: int) -> None:
    if member.stage not in ("raw", "study"):
        raise StageError(
            f"Member {number} of the ensemble is at stage {member.stage!r}; an ensemble is made of raw or study "
            "predictions, all members at once, and calibrated afterwards."
        )
    if "normal_damping" in member.metadata:
        raise StageError(
            f"Member {number} of the ensemble is damped by Normal already; that comes after the ensemble. Combine the "
            "models in place of files, or predict with a model without damping (hilum combine MODEL --normal-damping "
            "none)."
        )
    rules = [one.metadata.get("study_aggregation") for one in (first, member)]
    if member.stage != first.stage or rules[0] != rules[1]:
        raise StageError(
            f"Member 1 is at stage {first.stage!r} ({rules[0]}) and member {number} at {member.stage!r} ({rules[1]}). "
            "Aggregate studies in all members by one rule or in none (hilum combine --study mean does it for every "
            "file)."
        )
    if member.unit != first.unit:
        raise PredictionError(f"Member 1 has a row per {first.unit}, member {number} one per {member.unit}.")
    mine, theirs = set(first.image_uid.tolist()), set(member.image_uid.tolist())
    if mine != theirs:
        only_first, only_other = sorted(mine - theirs), sorted(theirs - mine)
        raise PredictionError(
            f"Members 1 and {number} do not cover the same items: {len(mine & theirs)} in both, "
            f"{len(only_first)} only in member 1, {len(only_other)} only in member {number}; for example "
            f"{(only_first + only_other)[0]!r}. Predict the same set with every member."
        )
    unknown = [name for name in member.findings if name not in first.findings]
    if unknown:
        raise PredictionError(f"Member {number} has findings that member 1 lacks: {', '.join(map(repr, unknown))}.")


def _aligned(first: Predictions, member: Predictions) -> np.ndarray:
    rows = member.places(first.image_uid)
    for name in ("patient_id", "study_id", "dataset"):
        differs = getattr(first, name) != getattr(member, name)[rows]
        if differs.any():
            raise PredictionError(
                f"Item {first.image_uid[differs][0]!r} has another {name} in two members of the ensemble "
                f"({int(differs.sum())} such items); they were not made from the same manifest."
            )
    columns = column_indices(member.findings, first.findings, "a member of the ensemble")
    return member.probabilities[rows][:, columns]
