"""Figures of the report by finding: forest plot, precision and recall, reliability, thresholds.

Functions from rows and curves to HTML; the drawing is in `tracks.py` and `charts.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hilum.evaluation.charts import nice_ticks, precision_recall_plot, reliability_plot
from hilum.evaluation.curves import Curves, FindingCurve, pool
from hilum.evaluation.markup import bracket, count, decimal, finite, share, text
from hilum.evaluation.report_assets import RELIABILITY_NOTE
from hilum.evaluation.report_rows import GROUPS, FindingRow, badge, by_group, mean_error, reason_for, value_cell
from hilum.evaluation.tracks import Position, axis, interval_track, pair_track

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROOTS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Ticks of a square-root scale."""
Grid = tuple[Position, tuple[float, ...]]


def overview(rows: Sequence[FindingRow], metrics: Mapping[str, Any], minimum: int) -> str:
    """Forest plot of AP and AUC with intervals, grouped by how common a finding is in training."""
    lows = [row.intervals["AUC"][0] if row.intervals["AUC"] else row.values["AUC"] for row in rows]
    lower = min([0.4, *(int(low * 10) / 10 for low in lows if low is not None)])
    ap, auc = (Position(0, 1), QUARTERS), (Position(lower, 1), tuple(nice_ticks(lower, 1.0, 4)))
    bodies = []
    for group, members in by_group(rows).items():
        means = metrics.get("groups", {}).get(group) or {}
        known = [f"mean {name} {decimal(finite(means.get(key)))}{_over(means, key, len(members))}"
                 for name, key in (("AP", "mAP"), ("AUC", "mAUC")) if finite(means.get(key)) is not None]  # fmt: skip
        title = " · ".join([f"{len(members)} finding{'s' if len(members) > 1 else ''}", GROUPS[group][1], *known])
        lines = "".join(_forest_row(row, ap, auc, minimum) for row in members)
        bodies.append(
            f'<tbody class="tone-{group}"><tr class="group"><th colspan="6" scope="rowgroup">{badge(group)}'
            f"{group.capitalize()} <small>{text(title)}</small></th></tr>{lines}</tbody>"
        )
    few = [row for row in rows if row.positives is not None and row.positives < minimum]
    listed = ", ".join(f"{text(row.name)} ({count(row.positives)})" for row in few)
    note = ""
    if few:
        have, are = ("has", "is") if len(few) == 1 else ("have", "are")
        note = (
            f'<p class="note"><b>Too few positives to lean on.</b> {len(few)} of {len(rows)} findings {have} fewer '
            f"than {minimum} positives in this set and {are} drawn faint: {listed}.</p>"
        )
    return (
        '<p class="keys"><span><i class="key-reference"></i> prevalence (AP) or 0.5 (AUC): '
        "what a random ranking would reach</span>"
        '<span><i class="key-interval"></i> 95 % interval, patients resampled</span></p>'
        '<table class="forest"><thead><tr><th>Finding</th><th class="number">Positives</th>'
        f'<th class="track-cell">AP{axis(QUARTERS, ap[0], None)}</th><th class="number"></th>'
        f'<th class="track-cell">AUC{axis(auc[1], auc[0])}</th><th class="number"></th></tr></thead>'
        f"{''.join(bodies)}</table>{note}"
    )


def _over(means: Mapping[str, Any], key: str, members: int) -> str:
    """Of how many of a group's findings a mean is, where not of all."""
    counted = (means.get("counted") or {}).get(key, members)
    return f" ({counted} of {members})" if counted != members else ""


def _forest_row(row: FindingRow, ap: Grid, auc: Grid, minimum: int) -> str:
    faint = ' class="faint"' if (row.positives or 0) < minimum else ""
    cells = ""
    for key, (scale, ticks), reference in (("AP", ap, row.prevalence), ("AUC", auc, 0.5)):
        value, ends = row.values[key], row.intervals[key]
        words = (
            f"{row.name} {key} {decimal(value)} {bracket(ends)}" if value is not None else f"{row.name} {key} undefined"
        )
        track = interval_track(value, ends, scale=scale, ticks=ticks, label=words, reference=reference, mark=row.mark)
        cells += (
            f'<td class="track-cell">{track}</td>'
            f'<td class="number" data-name="{key}">{value_cell(value, reason_for(row, key))}</td>'
        )
    return (
        f'<tr{faint}><th scope="row">{text(row.name)}</th>'
        f'<td class="number positives">{count(row.positives)}</td>{cells}</tr>'
    )


def precision_recall(rows: Sequence[FindingRow], curves: Curves) -> str:
    """One small precision-recall plot per finding."""
    return _multiples(rows, curves, _precision_recall_panel, needs_positives=True)


def reliability(rows: Sequence[FindingRow], curves: Curves, before: Curves | None) -> str:
    """One small reliability diagram per finding, and one of all findings together in front."""
    parts = [curve for curve in curves.findings.values() if curve.items]
    if not parts:
        return '<p class="note">No finding has both a probability and a label here.</p>'
    pooled = pool(parts)
    earlier = [before.findings[name] for name in curves.findings if before and name in before.findings]
    pooled_before = pool(earlier) if earlier else None
    error, error_before = mean_error(parts), mean_error(earlier)
    words = f"<p>Mean over findings of the calibration error: <b>{decimal(error)}</b>"
    words += f", <b>{decimal(error_before)}</b> before calibration (hollow dots).</p>" if earlier else ".</p>"
    label = f"All findings pooled: calibration error {decimal(pooled.calibration_error)}, {pooled.items} pairs"
    plot = reliability_plot(pooled, label=label, before=pooled_before, linked=True)
    return (
        f'<div class="pooled tone-plain"><figure>{plot}'
        f"<figcaption>All findings pooled, n = {count(pooled.items)}</figcaption></figure><div>{words}"
        f"<p>{RELIABILITY_NOTE}</p></div></div>"
        + _multiples(rows, curves, lambda row, curve: _reliability_panel(row, curve, before), needs_positives=False)
    )


def thresholds(rows: Sequence[FindingRow]) -> str:
    """Each finding's threshold, and F1 at it beside F1 at 0.5."""
    linear, root = Position(0, 1), Position(0, 1, root=True)
    bodies = []
    for group, members in by_group(rows).items():
        lines = []
        for row in members:
            flat, tuned = row.values["F1@0.5"], row.values["F1@tuned"]
            cut = interval_track(
                row.threshold, None, scale=root, ticks=ROOTS, reference=row.prevalence, mark=row.mark,
                label=f"{row.name}: threshold {decimal(row.threshold)}, prevalence {share(row.prevalence)}",
            )  # fmt: skip
            words = f"{row.name}: F1 {decimal(flat)} at 0.5, {decimal(tuned)} tuned"
            pair = pair_track(flat, tuned, scale=linear, ticks=QUARTERS, mark=row.mark, label=words)
            lines.append(
                f'<tr><th scope="row">{text(row.name)}</th><td class="track-cell">{cut}</td>'
                f'<td class="number" data-name="threshold">{value_cell(row.threshold, "not fitted")}</td>'
                f'<td class="track-cell">{pair}</td>'
                f'<td class="number" data-name="F1">{value_cell(tuned, reason_for(row, "F1"))}</td></tr>'
            )
        bodies.append(
            f'<tbody class="tone-{group}"><tr class="group"><th colspan="5" scope="rowgroup">{badge(group)}'
            f"{group.capitalize()}</th></tr>{''.join(lines)}</tbody>"
        )
    return (
        '<p class="keys"><span><i class="key-reference"></i> prevalence</span>'
        '<span><i class="key-hollow"></i> F1 at 0.5</span>'
        '<span><i class="key-filled"></i> threshold; F1 at the threshold</span></p>'
        '<table class="forest thresholds"><thead><tr><th>Finding</th>'
        f'<th class="track-cell">Threshold (square-root scale){axis(ROOTS, root, None)}</th><th></th>'
        f'<th class="track-cell">F1{axis(QUARTERS, linear, None)}</th><th></th></tr></thead>{"".join(bodies)}</table>'
    )


def _multiples(
    rows: Sequence[FindingRow],
    curves: Curves,
    panel: Callable[[FindingRow, FindingCurve], str],
    *,
    needs_positives: bool,
) -> str:
    parts, missing = [], []
    for group, members in by_group(rows).items():
        panels = []
        for row in members:
            curve = curves.findings.get(row.name)
            if curve is None or not curve.items:
                missing.append(f"{text(row.name)} (no probability or no label)")
            elif needs_positives and not curve.positives:
                missing.append(f"{text(row.name)} (no positive in this set)")
            else:
                panels.append(panel(row, curve))
        if panels:
            parts.append(
                f'<section class="tone-{group}"><h3>{badge(group)}{group.capitalize()}</h3>'
                f'<div class="multiples">{"".join(panels)}</div></section>'
            )
    note = f'<p class="note"><b>Not drawn.</b> {", ".join(missing)}.</p>' if missing else ""
    return "".join(parts) + note


def _precision_recall_panel(row: FindingRow, curve: FindingCurve) -> str:
    ap = decimal(row.values["AP"])
    plot = precision_recall_plot(
        curve, label=f"Precision and recall of {row.name}: AP {ap}, {curve.positives} positives"
    )
    return _panel(row.name, f"AP {ap} · n+ {count(curve.positives)}", plot)


def _reliability_panel(row: FindingRow, curve: FindingCurve, before: Curves | None) -> str:
    error = decimal(row.values["ECE"] if row.values["ECE"] is not None else curve.calibration_error)
    earlier = before.findings.get(row.name) if before else None
    plot = reliability_plot(curve, label=f"Reliability of {row.name}: ECE {error}, {curve.items} items", before=earlier)
    return _panel(row.name, f"ECE {error} · n {count(curve.items)}, n+ {count(curve.positives)}", plot)


def _panel(name: str, numbers: str, plot: str) -> str:
    return f'<figure class="panel"><figcaption><b>{text(name)}</b><span>{numbers}</span></figcaption>{plot}</figure>'
