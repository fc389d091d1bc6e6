"""Results as plain text for a terminal: the table of steps, and what `hilum evaluate` says. As HTML: `report.py`."""

from collections.abc import Sequence
from typing import Any

from hilum.evaluation.markup import finite

STEP_METRICS: tuple[str, ...] = ("mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard")

LEFT_OUT = {
    "untrained": "were never trained",
    "no_labels": "have no label here",
    "no_positives": "have no positive here",
    "no_negatives": "have no negative here",
    "few_positives": "have too few positives for the means",
    "unlabelled": "are predicted and not labelled",
    "unpredicted": "are labelled and not predicted",
}
"""Why a finding is in no mean, as `metrics.json` names it, and in words."""


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


def evaluation_notes(result: dict[str, Any]) -> list[str]:
    """Sentences to read before the numbers of `metrics.json`: leaks, exposure, and what is in no mean."""
    lines = []
    if result.get("scale"):
        lines.append(f"These values are {result['scale']}: calibration errors, Brier score and log loss mean nothing.")
    if result["accepted_leak"]:
        lines.append(f"Leak accepted when the model was made: {result['accepted_leak']}.")
    if result.get("uncalibrated"):
        lines.append(f"Not calibrated: {result['uncalibrated']}. Calibration errors and F1 at 0.5 mean little.")
    if result.get("exposure_not_recorded"):
        lines.append(f"Exposure: {result['exposure_not_recorded']}.")
    if result["exposed_images"]:
        lines.append(
            f"{result['exposed_images']} of the predicted images were in the model's pretraining or training data; "
            "these numbers are not those of unseen images."
        )
    if result["exposed_images"] is None:
        lines.append(
            "Whether the model, or its calibrator, has met these images is not known: the predictions do not say, and "
            "files are known by name alone."
        )
    if (result.get("compare") or {}).get("exposed_images"):
        lines.append(f"The compared model has met {result['compare']['exposed_images']} of its predicted images.")
    if result["items_of_head_training"]:
        lines.append(f"{result['items_of_head_training']} evaluated items are in splits that the head was trained on.")
    if result["items_without_label"]:
        without = f"{result['items_without_label']} of {result['n_items']} items"
        lines.append(f"{without} have no known label: they count in no metric.")
    if result["left_out"]["unpredicted"]:
        lines.append(
            f"{result['left_out']['unpredicted']} labelled items have no prediction; --split asks for all of one."
        )
    for reason, names in result["excluded"].items():
        if names:
            lines.append(f"{len(names)} findings {LEFT_OUT[reason]}: {', '.join(names)}")
    return lines


def evaluation_table(result: dict[str, Any]) -> str:
    """The macro numbers of all findings and of each group, with intervals, as aligned text.

    Beside each row: over how many findings its mAP is; calibration errors are also of findings without a positive.
    """
    rows = [["findings", *STEP_METRICS]]
    parts = {"all": result["macro"], **{group: result["groups"][group] for group in ("head", "medium", "tail")}}
    for name, part in parts.items():
        if part["findings"]:
            counted, total = part["counted"]["mAP"], len(part["findings"])
            title = f"{name} ({total})" if counted == total else f"{name} ({counted} of {total})"
            rows.append([title, *(_value_with_interval(part, metric) for metric in STEP_METRICS)])
    for metric, row in (result.get("compare") or {}).get("differences", {}).items():
        if metric in STEP_METRICS and row["difference"] is not None:
            ends = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
            shown = "" if row["shown"] else "  not shown"
            rows.append(
                [f"difference from {result['compare']['file']}", f"{metric} {row['difference']:+.3f}{ends}{shown}"]
            )
    rows += _gap_rows(result.get("subgroups") or {})
    full = [row for row in rows if len(row) == len(STEP_METRICS) + 1]
    widths = [
        max(len(row[0]) for row in rows),
        *(max(len(row[c]) for row in full) for c in range(1, len(STEP_METRICS) + 1)),
    ]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths[: len(row)], strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def localisation_table(found: dict[str, Any]) -> str:
    """How well each map file points at the regions, beside chance, as aligned text; `localisation` of metrics.json."""
    rows = [["maps", "findings", "energy", "area", "others", "pointing", "chance", "others"]]
    for file in found["maps"]:
        for group in ("macro", "head", "medium", "tail"):
            part = file[group]
            if part["counted"]:
                name = f"{file['name']} ({file['kind']})" if group == "macro" else f"  {group}"
                cells = [_value_with_interval(part, "energy"), _cell(part["area"]), _cell(part["energy_of_others"]),
                         _value_with_interval(part, "pointing"), _cell(part["pointing_chance"]),
                         _cell(part["pointing_of_others"])]  # fmt: skip
                rows.append([name, str(part["counted"]), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for part in found["differences"]:
        for measure in ("energy", "pointing"):
            row = {"metric": measure, "value": part[measure]["difference"], **part[measure]}
            lines.append(f"{part['first']} - {part['second']}: {describe_difference(row)}")
    return "\n".join(lines)


def _gap_rows(attributes: dict[str, Any]) -> list[list[str]]:
    """The gaps in mAUC that are shown; all others are in `metrics.json`."""
    return [
        [f"{name} {level} minus the rest", f"mAUC {gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"]
        for name, part in attributes.items()
        for level, group in part["groups"].items()
        if (gap := group["gap"].get("mAUC")) and gap["shown"]
    ]


def _value_with_interval(part: dict[str, Any], metric: str) -> str:
    value, ends = part[metric], part["ci95"].get(metric)
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
