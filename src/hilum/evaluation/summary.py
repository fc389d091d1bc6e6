"""The demo's table of steps as plain text for a terminal. The same rows as HTML are in `report.py`."""

from collections.abc import Sequence
from typing import Any

from hilum.evaluation.markup import finite

STEP_METRICS: tuple[str, ...] = ("mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard")


def is_shown(difference: dict[str, Any]) -> bool:
    """True where the interval of a difference excludes zero (or the writer of the row says so)."""
    if "shown" in difference:
        return bool(difference["shown"])
    low, high = finite(difference.get("low")), finite(difference.get("high"))
    return low is not None and high is not None and (low > 0 or high < 0)


def describe_difference(difference: dict[str, Any] | None) -> str:
    """`mAP +0.031 [0.012, 0.050]`, with "not shown" behind it where the interval includes zero; "" for None."""
    if not difference or finite(difference.get("value")) is None:
        return ""
    value, low, high = (finite(difference.get(key)) for key in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    words = "" if is_shown(difference) else " not shown"
    return f"{difference.get('metric', '')} {value:+.3f}{ends}{words}".strip()


def step_table(steps: Sequence[dict[str, Any]]) -> str:
    """Aligned columns: step, macro metrics, paired difference from the step before with its 95 % interval.

    Args:
        steps: rows `{"name", "mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard", "difference"}`; a value that is
            None or absent prints as "-".

    Returns:
        Lines joined by newlines, without a final one; plain ASCII apart from the names of the steps.
    """
    header = ["step", *STEP_METRICS, "difference (95 % interval)"]
    rows = [
        [
            str(step["name"]),
            *(_cell(step.get(metric)) for metric in STEP_METRICS),
            describe_difference(step.get("difference")),
        ]
        for step in steps
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [_line(header, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, widths) for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    number = finite(value)
    return "-" if number is None else f"{number:.3f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    last = len(cells) - 1
    aligned = [
        cell.ljust(width) if column in (0, last) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
