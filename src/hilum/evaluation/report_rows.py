"""Rows of the report: `metrics.json` by finding, in the order and the words in which the page shows it.

Turns every undefined value into None with a reason. Tables are in `report_tables.py`, charts in `report_figures.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hilum.evaluation.curves import FindingCurve
from hilum.evaluation.markup import decimal, finite, interval, text, undefined

GROUPS: dict[str, tuple[str, str]] = {
    "head": ("circle", "over 10 % of training images"),
    "medium": ("square", "1 to 10 % of training images"),
    "tail": ("diamond", "under 1 % of training images"),
    "other": ("circle", "group not recorded"),
}
"""Order of the groups, their mark and their definition."""

METRIC_NAMES: dict[str, tuple[str, str]] = {
    "mAP": ("mAP", "higher is better"),
    "mAUC": ("mAUC", "higher is better"),
    "mF1@0.5": ("mF1 at 0.5", "higher is better"),
    "mF1@tuned": ("mF1 tuned", "higher is better"),
    "mECE_standard": ("mECE", "lower is better"),
    "mECE_challenge_inferred": ("mECE, challenge (inferred)", "not a quality measure"),
}
VALUES: tuple[str, ...] = ("AP", "AUC", "F1@0.5", "F1@tuned", "FNR@tuned", "FPR@tuned", "ECE", "calibration_slope")
"""What the page shows of a finding."""

OTHER_NAMES: dict[str, str] = {
    "mAP_normalised": "mAP, normalised", "mBrier": "mBrier", "mLogLoss": "mean log loss",
    "mFNR@tuned": "missed (mFNR tuned)", "mFPR@tuned": "false alarms (mFPR tuned)",
}  # fmt: skip
"""Metrics of comparisons that the headline table leaves out."""

EXCLUDED: dict[str, str] = {
    "untrained": "this model was never trained for it",
    "no_labels": "no label in this set",
    "no_positives": "no positive in this set",
    "no_negatives": "no negative in this set",
}
"""Lists under "excluded" in `metrics.json`, as reasons."""


@dataclass(frozen=True)
class FindingRow:
    """One finding of `metrics.json`, with every undefined value as None."""

    name: str
    group: str
    positives: float | None
    prevalence: float | None
    threshold: float | None
    values: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float] | None]
    reason: str
    """Why AP or AUC is undefined; "" when both are defined."""

    @property
    def mark(self) -> str:
        """Shape of the group."""
        return GROUPS[self.group][0]


def finding_rows(metrics: Mapping[str, Any]) -> list[FindingRow]:
    """Rows in the order head, medium, tail; inside a group by falling number of positives, then by name."""
    rows = []
    excluded = metrics.get("excluded") or {}
    for name, entry in metrics.get("findings", {}).items():
        group = entry.get("group") if entry.get("group") in GROUPS else "other"
        positives = finite(entry.get("positives"))
        values = {key: finite(entry.get(key)) for key in VALUES}
        given = entry.get("ci95") or {}
        reason = ""
        if values["AP"] is None or values["AUC"] is None:
            guess = "no positive in this set" if positives == 0 else "not trained, or not labelled in this set"
            reason = next((words for key, words in EXCLUDED.items() if name in excluded.get(key, ())), guess)
        rows.append(
            FindingRow(
                name, group, positives, finite(entry.get("prevalence")), finite(entry.get("threshold")), values,
                {key: interval(given.get(key)) for key in values}, reason,
            )
        )  # fmt: skip
    order = list(GROUPS)
    return sorted(rows, key=lambda row: (order.index(row.group), -(row.positives or 0), row.name))


def by_group(rows: Sequence[FindingRow]) -> dict[str, list[FindingRow]]:
    """Rows of each group that has any, in order."""
    groups = {group: [row for row in rows if row.group == group] for group in GROUPS}
    return {group: members for group, members in groups.items() if members}


def badge(group: str) -> str:
    """The mark of a group, in its colour and shape."""
    return f'<i class="badge badge-{text(group)}" aria-hidden="true"></i>'


def value_cell(number: float | None, reason: str = "not computed") -> str:
    """A number, or a dash that carries its reason."""
    return decimal(number) if number is not None else undefined(reason)


def reason_for(row: FindingRow, key: str) -> str:
    """Why a value of the row is undefined."""
    return row.reason or f"{key} is not defined for this finding here"


def mean_error(parts: Sequence[FindingCurve]) -> float | None:
    """Plain mean of the calibration errors that are defined."""
    errors = [error for part in parts if (error := part.calibration_error) is not None]
    return sum(errors) / len(errors) if errors else None
