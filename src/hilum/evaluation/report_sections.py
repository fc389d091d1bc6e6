"""Sections of the report, each a function from numbers to HTML; `report.py` puts them in order.

Reads the dict of `metrics.json` and the arrays of `curves.py`; computes no metric. A value that is None is shown as an
en dash with its reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hilum.evaluation.charts import axis, interval_track, nice_ticks, pair_track, precision_recall_plot, reliability_plot
from hilum.evaluation.curves import Curves, FindingCurve, pool
from hilum.evaluation.markup import bracket, count, decimal, finite, interval, share, signed, text, undefined
from hilum.evaluation.summary import STEP_METRICS, is_shown

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
    """Why AP is undefined; "" when it is defined."""

    @property
    def mark(self) -> str:
        """Shape of the group."""
        return GROUPS[self.group][0]


def finding_rows(metrics: Mapping[str, Any]) -> list[FindingRow]:
    """Rows in the order head, medium, tail; inside a group by falling number of positives, then by name."""
    rows = []
    for name, entry in metrics.get("findings", {}).items():
        group = entry.get("group") if entry.get("group") in GROUPS else "other"
        positives = finite(entry.get("positives"))
        values = {key: finite(entry.get(key)) for key in ("AP", "AUC", "F1@0.5", "F1@tuned", "ECE")}
        given = entry.get("ci95") or {}
        reason = ""
        if values["AP"] is None:
            reason = entry.get("reason") or ("no positive in this set" if positives == 0 else "not trained or not labelled")
        rows.append(
            FindingRow(
                name, group, positives, finite(entry.get("prevalence")), finite(entry.get("threshold")), values,
                {key: interval(given.get(key)) for key in values}, str(reason),
            )
        )  # fmt: skip
    order = list(GROUPS)
    return sorted(rows, key=lambda row: (order.index(row.group), -(row.positives or 0), row.name))


def by_group(rows: Sequence[FindingRow]) -> dict[str, list[FindingRow]]:
    """Rows of each group that has any, in order."""
    groups = {group: [row for row in rows if row.group == group] for group in GROUPS}
    return {group: members for group, members in groups.items() if members}


def macro(metrics: Mapping[str, Any]) -> str:
    """The headline numbers, and one line per group."""
    values, groups = metrics.get("macro", {}), metrics.get("groups", {})
    figures = []
    for key in ("mAP", "mAUC", "mF1@tuned", "mECE_standard"):
        name, direction = METRIC_NAMES[key]
        number = finite(values.get(key))
        ends = bracket(interval((values.get("ci95") or {}).get(key)))
        shown = decimal(number) if number is not None else undefined("not computed")
        figures.append(
            f'<div class="figure"><dt>{name}</dt><dd><strong>{shown}</strong><small>{ends or direction}</small></dd></div>'
        )
    present = [key for key in METRIC_NAMES if any(key in part for part in (values, *groups.values()))]
    head = "".join(f'<th class="number">{text(METRIC_NAMES[key][0])}</th>' for key in present)
    lines = [_macro_line("All findings", "", values, present)]
    lines += [
        _macro_line(f"{group.capitalize()}", group, groups[group], present)
        for group in GROUPS if groups.get(group)
    ]  # fmt: skip
    table = (
        f'<div class="scroll"><table class="plain"><thead><tr><th>Mean over</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    return f'<dl class="figures">{"".join(figures)}</dl>{table if present else ""}'


def _macro_line(name: str, group: str, values: Mapping[str, Any], present: Sequence[str]) -> str:
    mark = badge(group) if group else ""
    cells = "".join(f'<td class="number">{_value(finite(values.get(key)))}</td>' for key in present)
    size = finite(values.get("findings"))
    extra = f" <small>{count(size)} findings</small>" if size is not None else ""
    return f'<tr><th scope="row">{mark}{text(name)}{extra}</th>{cells}</tr>'


def steps_table(steps: Sequence[Mapping[str, Any]]) -> str:
    """What each step adds: macro metrics and the paired difference with its interval."""
    best = {key: _best(steps, key) for key in STEP_METRICS}
    differences = [step.get("difference") for step in steps]
    scale = _difference_scale([part for part in differences if part])
    head = "".join(
        f'<th class="number">{text(METRIC_NAMES[key][0])}<small>{"&darr;" if "ECE" in key else "&uarr;"}</small></th>'
        for key in STEP_METRICS
    )
    body = []
    for step, difference in zip(steps, differences, strict=True):
        cells = ""
        for key in STEP_METRICS:
            number = finite(step.get(key))
            strong = number is not None and number == best[key]
            cells += f'<td class="number">{f"<b>{decimal(number)}</b>" if strong else _value(number)}</td>'
        body.append(f'<tr><th scope="row">{text(step["name"])}</th>{cells}{_difference_cells(difference, scale)}</tr>')
    return (
        '<div class="scroll"><table class="plain steps"><thead><tr><th>Step</th>'
        f'{head}<th class="wide">Difference from the step before{_difference_axis(scale)}</th><th></th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">Arrows say which way is better; the best value of a column is bold. Differences are paired over '
        "the same patients, with 95 % intervals; <b>not shown</b> (hollow mark) means that the interval includes zero.</p>"
    )


def comparisons_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Differences between pairs of models, one per row."""
    scale = _difference_scale(comparisons)
    body = "".join(
        f'<tr><th scope="row">{text(row["name"])}{_small(row.get("note"))}</th><td>{text(row.get("metric", ""))}</td>'
        f'<td class="number">{_value(finite(row.get("first")))}</td><td class="number">{_value(finite(row.get("second")))}</td>'
        f"{_difference_cells(row, scale, metric=False)}</tr>"
        for row in comparisons
    )
    return (
        '<div class="scroll"><table class="plain steps"><thead><tr><th>Comparison</th><th>Metric</th>'
        '<th class="number">First</th><th class="number">Second</th>'
        f'<th class="wide">First minus second{_difference_axis(scale)}</th><th></th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def overview(rows: Sequence[FindingRow], metrics: Mapping[str, Any], minimum: int) -> str:
    """Forest plot of AP and AUC with intervals, grouped by how common a finding is in training."""
    lows = [row.intervals["AUC"][0] if row.intervals["AUC"] else row.values["AUC"] for row in rows]
    lower = min([0.4, *(int(low * 10) / 10 for low in lows if low is not None)])
    ap = {"lower": 0.0, "upper": 1.0, "ticks": (0.0, 0.25, 0.5, 0.75, 1.0)}
    auc = {"lower": lower, "upper": 1.0, "ticks": tuple(nice_ticks(lower, 1.0, 4))}
    bodies = []
    for group, members in by_group(rows).items():
        means = metrics.get("groups", {}).get(group) or {}
        known = [f"mean {name} {decimal(finite(means.get(key)))}" for name, key in (("AP", "mAP"), ("AUC", "mAUC"))
                 if finite(means.get(key)) is not None]  # fmt: skip
        title = " · ".join([f"{len(members)} finding{'s' if len(members) > 1 else ''}", GROUPS[group][1], *known])
        lines = "".join(_forest_row(row, ap, auc, minimum) for row in members)
        bodies.append(
            f'<tbody class="tone-{group}"><tr class="group"><th colspan="6" scope="rowgroup">{badge(group)}{group.capitalize()}'
            f" <small>{text(title)}</small></th></tr>{lines}</tbody>"
        )
    few = [row for row in rows if row.positives is not None and row.positives < minimum]
    listed = ", ".join(f"{text(row.name)} ({count(row.positives)})" for row in few)
    note = (
        f"<p class=\"note\"><b>Too few positives to lean on.</b> {len(few)} finding{'s have' if len(few) != 1 else ' has'} fewer than {minimum} "
        f"positives in this set and {'are' if len(few) != 1 else 'is'} drawn faint: {listed}.</p>"
        if few
        else ""
    )
    return (
        '<p class="keys"><span><i class="key-reference"></i> prevalence (AP) or 0.5 (AUC): what a random ranking would reach'
        '</span><span><i class="key-interval"></i> 95 % interval, patients resampled</span></p>'
        '<table class="forest"><thead><tr><th>Finding</th><th class="number">Positives</th>'
        f'<th class="track-cell">AP{axis(ap["ticks"], lower=0, upper=1, digits=2)}</th><th class="number"></th>'  # type: ignore[arg-type]
        f'<th class="track-cell">AUC{axis(auc["ticks"], lower=lower, upper=1)}</th><th class="number"></th></tr></thead>'  # type: ignore[arg-type]
        f"{''.join(bodies)}</table>{note}"
    )


def _forest_row(row: FindingRow, ap: Mapping[str, Any], auc: Mapping[str, Any], minimum: int) -> str:
    faint = ' class="faint"' if (row.positives or 0) < minimum else ""
    cells = ""
    for key, range_, reference in (("AP", ap, row.prevalence), ("AUC", auc, 0.5)):
        value, ends = row.values[key], row.intervals[key]
        words = f"{row.name} {key} {decimal(value)} {bracket(ends)}" if value is not None else f"{row.name} {key} undefined"
        cells += (
            f'<td class="track-cell">{interval_track(value, ends, label=words, reference=reference, mark=row.mark, **range_)}</td>'
            f'<td class="number" data-name="{key}">{_value(value, _reason(row, key))}</td>'
        )
    return (
        f'<tr{faint}><th scope="row">{text(row.name)}</th>'
        f'<td class="number positives">{count(row.positives)}</td>{cells}</tr>'
    )


def findings_table(rows: Sequence[FindingRow]) -> str:
    """Every number of every finding; sortable by a click on a heading where scripts run."""
    columns = (
        ("Finding", "text"), ("Group", "text"), ("Positives", ""), ("Prevalence", ""), ("AP", ""), ("AP / prevalence", ""),
        ("AUC", ""), ("F1 at 0.5", ""), ("F1 tuned", ""), ("Threshold", ""), ("ECE", ""),
    )  # fmt: skip
    head = "".join(f'<th{"" if kind else " class=number"} scope="col">{text(name)}</th>' for name, kind in columns)
    body = []
    for row in rows:
        lift = row.values["AP"] / row.prevalence if row.values["AP"] is not None and row.prevalence else None
        why = f'<small class="reason">{text(row.reason)}</small>' if row.reason else ""
        cells = [
            f'<th scope="row" data-sort="{text(row.name)}">{text(row.name)}{why}</th>',
            f'<td data-sort="{list(GROUPS).index(row.group)}">{badge(row.group)}{row.group}</td>',
            _sortable(row.positives, count(row.positives)),
            _sortable(row.prevalence, share(row.prevalence) if row.prevalence is not None else undefined("no label")),
            _with_interval(row, "AP"),
            _sortable(lift, f"{lift:.1f}×" if lift is not None else undefined(row.reason or "prevalence is zero")),  # noqa: RUF001
            _with_interval(row, "AUC"),
            _with_interval(row, "F1@0.5"),
            _with_interval(row, "F1@tuned"),
            _sortable(row.threshold, decimal(row.threshold) if row.threshold is not None else undefined("not fitted")),
            _with_interval(row, "ECE"),
        ]
        body.append(f'<tr class="tone-{row.group}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="plain findings" data-sortable><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
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
    error, error_before = _mean_error(parts), _mean_error(earlier)
    words = f"<p>Mean over findings of the calibration error: <b>{decimal(error)}</b>"
    words += f", <b>{decimal(error_before)}</b> before calibration (hollow dots).</p>" if earlier else ".</p>"
    label = f"All findings pooled: calibration error {decimal(pooled.calibration_error)}, {pooled.items} pairs"
    return (
        f'<div class="pooled tone-plain"><figure>{reliability_plot(pooled, label=label, before=pooled_before)}'
        f"<figcaption>All findings pooled, n = {count(pooled.items)}</figcaption></figure><div>{words}"
        "<p>A dot is one of fifteen equal bins of predicted probability: how high it sits is how often the finding was "
        "really there. On the dashed line the two agree; above it the model is too shy, below it too bold. The whisker is "
        "the 95 % interval of that share, and the bars below count the items (square-root scale), for a dot that rests on "
        "three items may sit anywhere. Axes are cut at 0.1, 0.25 or 0.5 where nothing lies beyond.</p></div></div>"
        + _multiples(rows, curves, lambda row, curve: _reliability_panel(row, curve, before), needs_positives=False)
    )


def thresholds(rows: Sequence[FindingRow]) -> str:
    """Each finding's threshold, and F1 at it beside F1 at 0.5."""
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    grid: dict[str, Any] = {"lower": 0.0, "upper": 1.0, "ticks": ticks}
    bodies = []
    for group, members in by_group(rows).items():
        lines = []
        for row in members:
            flat, tuned = row.values["F1@0.5"], row.values["F1@tuned"]
            cut = interval_track(
                row.threshold, None, reference=row.prevalence, mark=row.mark,
                label=f"{row.name}: threshold {decimal(row.threshold)}, prevalence {share(row.prevalence)}", **grid,
            )  # fmt: skip
            pair = pair_track(flat, tuned, mark=row.mark, label=f"{row.name}: F1 {decimal(flat)} at 0.5, {decimal(tuned)} tuned",
                              **grid)  # fmt: skip
            lines.append(
                f'<tr><th scope="row">{text(row.name)}</th><td class="track-cell">{cut}</td>'
                f'<td class="number" data-name="threshold">{_value(row.threshold, "not fitted")}</td>'
                f'<td class="track-cell">{pair}</td><td class="number" data-name="F1">{_value(tuned, _reason(row, "F1"))}</td></tr>'
            )
        bodies.append(
            f'<tbody class="tone-{group}"><tr class="group"><th colspan="5" scope="rowgroup">{badge(group)}'
            f"{group.capitalize()}</th></tr>{''.join(lines)}</tbody>"
        )
    numbers = axis(ticks, lower=0, upper=1, digits=2)
    return (
        '<p class="keys"><span><i class="key-reference"></i> prevalence</span><span><i class="key-hollow"></i> F1 at 0.5</span>'
        '<span><i class="key-filled"></i> threshold; F1 at the threshold</span></p>'
        f'<table class="forest thresholds"><thead><tr><th>Finding</th><th class="track-cell">Threshold{numbers}</th><th></th>'
        f'<th class="track-cell">F1{numbers}</th><th></th></tr></thead>{"".join(bodies)}</table>'
    )


def badge(group: str) -> str:
    """The mark of a group, in its colour and shape."""
    return f'<i class="badge badge-{text(group)}" aria-hidden="true"></i>'


def _multiples(rows: Sequence[FindingRow], curves: Curves, panel: Any, *, needs_positives: bool) -> str:
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
    plot = precision_recall_plot(curve, label=f"Precision and recall of {row.name}: AP {ap}, {curve.positives} positives")
    return _panel(row.name, f"AP {ap} · n+ {count(curve.positives)}", plot)


def _reliability_panel(row: FindingRow, curve: FindingCurve, before: Curves | None) -> str:
    error = decimal(row.values["ECE"] if row.values["ECE"] is not None else curve.calibration_error)
    earlier = before.findings.get(row.name) if before else None
    plot = reliability_plot(curve, label=f"Reliability of {row.name}: ECE {error}, {curve.items} items", before=earlier)
    return _panel(row.name, f"ECE {error} · n {count(curve.items)}, n+ {count(curve.positives)}", plot)


def _panel(name: str, numbers: str, plot: str) -> str:
    return f'<figure class="panel"><figcaption><b>{text(name)}</b><span>{numbers}</span></figcaption>{plot}</figure>'


def _value(number: float | None, reason: str = "not computed") -> str:
    return decimal(number) if number is not None else undefined(reason)


def _reason(row: FindingRow, key: str) -> str:
    return row.reason or f"{key} is not defined for this finding here"


def _sortable(number: float | None, shown: str) -> str:
    return f'<td class="number" data-sort="{"" if number is None else repr(number)}">{shown}</td>'


def _with_interval(row: FindingRow, key: str) -> str:
    number, ends = row.values[key], row.intervals[key]
    small = f"<small>{bracket(ends)}</small>" if ends else ""
    return _sortable(number, f"{_value(number, _reason(row, key))}{small}")


def _small(words: object) -> str:
    return f"<small>{text(words)}</small>" if words else ""


def _best(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    numbers = [number for step in steps if (number := finite(step.get(key))) is not None]
    if len(numbers) < 2:
        return None
    return min(numbers) if "ECE" in key else max(numbers)


def _difference_scale(differences: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of a symmetric axis that holds every interval."""
    ends = [finite(part.get(key)) for part in differences for key in ("value", "low", "high")]
    largest = max((abs(end) for end in ends if end is not None), default=0.1)
    return max(largest * 1.08, 1e-3)


def _difference_axis(scale: float) -> str:
    ticks = [tick for tick in nice_ticks(-scale, scale, 4) if abs(tick) <= scale]
    return axis(ticks, lower=-scale, upper=scale, digits=2 if scale >= 0.02 else 3, plus=True)


def _difference_cells(difference: Mapping[str, Any] | None, scale: float, *, metric: bool = True) -> str:
    value = finite(difference.get("value")) if difference else None
    if difference is None or value is None:
        return "<td></td><td></td>"
    ends = interval((difference.get("low"), difference.get("high")))
    shown = is_shown(dict(difference))
    name = f"{difference.get('metric', '')} " if metric else ""
    words = f"{name}{signed(value)} {bracket(ends)}{'' if shown else ' not shown'}"
    ticks = nice_ticks(-scale, scale, 4)
    track = interval_track(
        value, ends, lower=-scale, upper=scale, ticks=ticks, reference=0.0, label=words, hollow=not shown
    )
    verdict = "" if shown else ' <em class="not-shown">not shown</em>'
    return (
        f'<td class="track-cell {"tone-head" if shown else "tone-plain"}">{track}</td>'
        f'<td class="difference">{text(name)}<b>{signed(value)}</b> <small>{bracket(ends)}</small>{verdict}</td>'
    )


def _mean_error(parts: Sequence[FindingCurve]) -> float | None:
    errors = [error for part in parts if (error := part.calibration_error) is not None]
    return sum(errors) / len(errors) if errors else None
