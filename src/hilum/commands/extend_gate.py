"""The gate of `hilum extend --joint`: old findings against the model they came from, on validation, with intervals."""

from typing import Any

import numpy as np
from jaxtyping import Int

from hilum.commands.extend_inputs import Base
from hilum.core.types import POSITIVE
from hilum.evaluation.bootstrap import paired_comparison
from hilum.evaluation.predictions import Predictions


def compare(
    base: Base, predictions: Predictions, labels: Int[np.ndarray, "M C"], tolerance: float, bootstraps: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Average precision of every old finding before and after, on images that both were validated on.

    A model that was extended on another store has heads that were validated on other images: each is compared on its
    own. Findings that the model was never trained on have nothing to lose, and are left out.

    Returns:
        by finding: `before`, `after`, `difference`, `low`, `high` (95 %, patients resampled), the `images` that were
        compared and their `positives`, and a `verdict`:
        "harmless" where the whole interval is above -tolerance, "worse" where it is below, else "not shown".
    """
    trained = {finding.name for finding in base.network.findings if finding.trained}
    result: dict[str, dict[str, Any]] = {}
    for before, _ in base.validations:
        names = [name for name in before.findings if name in trained]
        if names:
            result |= _compare_head(before.select(names), predictions, labels, tolerance, bootstraps, seed)
    return result


def _compare_head(
    before: Predictions, predictions: Predictions, labels: Int[np.ndarray, "M C"], tolerance: float, bootstraps: int,
    seed: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    shared = np.intersect1d(before.image_uid, predictions.image_uid)
    rows = [np.flatnonzero(np.isin(one.image_uid, shared)) for one in (before, predictions)]
    if not len(shared):
        nothing = {"before": None, "after": None, "difference": None, "low": None, "high": None}
        return {name: {**nothing, "images": 0, "positives": 0, "verdict": "not shown"} for name in before.findings}
    after = predictions.rows(rows[1]).select(before.findings)
    columns = [predictions.findings.index(name) for name in before.findings]
    truth = labels[rows[1]][:, columns]
    found = paired_comparison(after, before.rows(rows[0]), truth, bootstraps=bootstraps, seed=seed)[1]
    result = {}
    for column, name in enumerate(before.findings):
        row = found.get(name, {}).get("AP", {})
        low, high = row.get("low"), row.get("high")
        verdict = "not shown"
        if low is not None and high is not None:
            verdict = "harmless" if low >= -tolerance else "worse" if high < -tolerance else "not shown"
        result[name] = {
            "before": row.get("second"), "after": row.get("first"), "difference": row.get("difference"), "low": low,
            "high": high, "images": len(truth), "positives": int((truth[:, column] == POSITIVE).sum()),
            "verdict": verdict,
        }  # fmt: skip
    return result


def regression_lines(regression: dict[str, dict[str, Any]], tolerance: float) -> list[str]:
    """A table for people: old findings, before and after."""
    lines = [f"Old findings on validation, average precision (may lose {tolerance:g}):"]
    for name, row in regression.items():
        if row["difference"] is None:
            lacking = "no validation image to compare on"
            if row.get("images"):
                lacking = f"not both positive and negative labels among {row['images']} validation images"
            lines.append(f"  {name}: {lacking}; not shown")
            continue
        lines.append(
            f"  {name}: {row['before']:.3f} -> {row['after']:.3f}, {row['difference']:+.3f} [{row['low']:+.3f}, "
            f"{row['high']:+.3f}], {row['positives']} positives: {row['verdict']}"
        )
    return lines


def joint_card(content: dict[str, Any]) -> str:
    """What the model card says of a joint fit."""
    joint = content["joint"]
    lines = [
        "", "## Joint fit", "",
        f"One head for old and new findings, taught by the model {content['extended_from']}; old outputs have changed.",
    ]  # fmt: skip
    if joint["harmless"]:
        lines.append(f"Every old finding was shown to lose less than {joint['tolerance']:g} AP on validation.")
    else:
        lines.append(
            f"**Not shown to be harmless**: accepted although some old findings may lose more than "
            f"{joint['tolerance']:g} AP on validation."
        )
    return "\n".join([*lines, "", *regression_lines(joint["regression"], joint["tolerance"])]) + "\n"
