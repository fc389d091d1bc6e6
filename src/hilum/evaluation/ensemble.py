"""From several models to one: the mean of their probabilities over the same items.

Runs after study aggregation and before calibration. It never guesses which rows or columns belong together: items are
joined by uid and findings by name, and members that do not cover the same items are refused.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hilum.core.errors import PredictionError, StageError
from hilum.evaluation.predictions import Predictions, column_indices


def mean_over_models(members: Sequence[Predictions]) -> Predictions:
    """Arithmetic mean of probabilities over models, at one stage and unit (CXR-LT 2024 slides, ensemble).

    Rows and columns come in the first member's order; the values do not depend on the order of the members. A finding
    that some members were never trained on is the mean over those that were.

    Raises:
        StageError: members at different stages, calibrated, or themselves ensembles.
        PredictionError: different items (with counts and an example), units, identities or findings.
    """
    if not members:
        raise PredictionError("An ensemble needs at least one member.")
    first = members[0]
    for number, member in enumerate(members, 1):
        _check_member(first, member, number)
    stacked = np.stack([_aligned(first, member) for member in members])
    # sorted before the sum, so that no member is "first" in the rounding; NaN (never trained) goes to the end
    stacked = np.sort(stacked, axis=0)
    trained = ~np.isnan(stacked)
    counts = trained.sum(axis=0)
    total = np.where(trained, stacked, 0.0).sum(axis=0)
    average = np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)
    lowest = stacked[0]
    highest = np.take_along_axis(stacked, np.maximum(counts - 1, 0)[None], axis=0)[0]
    metadata = {
        "stage": "ensemble",
        "members": [{"model": m.metadata.get("model"), "stage": m.stage} for m in members],
        "model": None,
        "thresholds": None,
        "calibration": None,
        "head_splits": sorted({split for m in members for split in m.metadata.get("head_splits", ())}) or None,
        "exposed_images": _most_exposed(members),
        "accepted_leak": "; ".join(dict.fromkeys(leak for m in members if (leak := m.metadata.get("accepted_leak")))),
    }
    return first.replace(np.clip(average, lowest, highest), **metadata)


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
    if member.stage != first.stage:
        raise StageError(
            f"Member 1 is at stage {first.stage!r} and member {number} at {member.stage!r}. Aggregate studies in all "
            "members or in none (hilum combine --study mean does it for every file)."
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
    order = np.argsort(member.image_uid)
    rows = order[np.searchsorted(member.image_uid, first.image_uid, sorter=order)]
    for name in ("patient_id", "study_id", "dataset"):
        differs = getattr(first, name) != getattr(member, name)[rows]
        if differs.any():
            raise PredictionError(
                f"Item {first.image_uid[differs][0]!r} has another {name} in two members of the ensemble "
                f"({int(differs.sum())} such items); they were not made from the same manifest."
            )
    columns = column_indices(member.findings, first.findings, "a member of the ensemble")
    return member.probabilities[rows][:, columns]


ENSEMBLES: dict[str, Callable[[Sequence[Predictions]], Predictions]] = {"mean": mean_over_models}
