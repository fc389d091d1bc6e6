"""Tables of the report: headline numbers, steps, comparisons, and every number of every finding.

Functions from the dict of `metrics.json` to HTML; they compute no metric.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hilum.evaluation.charts import nice_ticks
from hilum.evaluation.markup import bracket, count, decimal, finite, interval, share, signed, text, undefined
from hilum.evaluation.report_assets import DIFFERENCES_NOTE, STEPS_NOTE
from hilum.evaluation.report_rows import GROUPS, METRIC_NAMES, OTHER_NAMES, FindingRow, badge, reason_for, value_cell
from hilum.evaluation.summary import STEP_METRICS, is_shown
from hilum.evaluation.tracks import Position, axis, interval_track


def macro(metrics: Mapping[str, Any]) -> str:
    """The headline numbers, and one line per group."""
    values, groups = metrics.get("macro", {}), metrics.get("groups", {})
    figures = []
    for key in ("mAP", "mAUC", "mF1@tuned", "mECE_standard"):
        name, direction = METRIC_NAMES[key]
        number = finite(values.get(key))
        ends = bracket(interval((values.get("ci95") or {}).get(key)))
        counted = finite((values.get("counted") or {}).get(key))
        over = f", {count(counted)} of {len(metrics.get('findings', {}))} findings" if counted is not None else ""
        shown = decimal(number) if number is not None else undefined("not computed")
        figures.append(
            f'<div class="figure"><dt>{name}</dt><dd><strong>{shown}</strong>'
            f"<small>{ends or direction}{over}</small></dd></div>"
        )
    present = [key for key in METRIC_NAMES if any(key in part for part in (values, *groups.values()))]
    head = "".join(f'<th class="number">{text(METRIC_NAMES[key][0])}</th>' for key in present)
    lines = [_macro_line("All findings", "", values, present)]
    lines += [
        _macro_line(f"{group.capitalize()}", group, groups[group], present)
        for group in GROUPS if groups.get(group)
    ]  # fmt: skip
    table = (
        f'<div class="scroll"><table class="plain means"><thead><tr><th>Mean over</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    return f'<dl class="figures">{"".join(figures)}</dl>{table if present else ""}'


def _macro_line(name: str, group: str, values: Mapping[str, Any], present: Sequence[str]) -> str:
    mark = badge(group) if group else ""
    empty = "no finding with a defined value here"
    cells = "".join(f'<td class="number">{value_cell(finite(values.get(key)), empty)}</td>' for key in present)
    listed = values.get("findings")
    size = len(listed) if isinstance(listed, list) else None
    extra = f" <small>{size} finding{'' if size == 1 else 's'}</small>" if size is not None else ""
    return f'<tr><th scope="row">{mark}{text(name)}{extra}</th>{cells}</tr>'


def steps_table(steps: Sequence[Mapping[str, Any]]) -> str:
    """What each step adds: macro metrics and the paired difference with its interval."""
    best = {key: _best(steps, key) for key in STEP_METRICS}
    differences = [step.get("difference") for step in steps]
    scale = difference_scale([part for part in differences if part])
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
            cells += f'<td class="number">{f"<b>{decimal(number)}</b>" if strong else value_cell(number)}</td>'
        body.append(f'<tr><th scope="row">{text(step["name"])}</th>{cells}{difference_cells(difference, scale)}</tr>')
    return (
        '<div class="scroll"><table class="plain steps"><thead><tr><th>Step</th>'
        f'{head}<th class="wide">Difference from the step before{difference_axis(scale)}</th><th></th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">{STEPS_NOTE}</p>'
    )


def comparisons_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Differences between pairs of models, one per row."""
    scale = difference_scale(comparisons)
    body = "".join(
        f'<tr><th scope="row">{text(row["name"])}{_small(row.get("note"))}</th><td>{text(_metric(row))}</td>'
        f'<td class="number">{value_cell(finite(row.get("first")))}</td>'
        f'<td class="number">{value_cell(finite(row.get("second")))}</td>'
        f"{difference_cells(row, scale, metric=False)}</tr>"
        for row in comparisons
    )
    return (
        '<div class="scroll"><table class="plain steps"><thead><tr><th>Comparison</th><th>Metric</th>'
        '<th class="number">First</th><th class="number">Second</th>'
        f'<th class="wide">First minus second{difference_axis(scale)}</th><th></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def finding_differences_table(by_finding: Mapping[str, Mapping[str, Any]], metric: str = "AP") -> str:
    """Differences of two models, one finding per row, largest first, with p-values corrected by Holm."""
    rows = [
        (name, {"value": row["difference"], **row}) for name, part in by_finding.items() if (row := part.get(metric))
    ]
    if not rows:
        return ""
    rows.sort(key=lambda pair: -abs(pair[1]["value"] or 0.0))
    scale = difference_scale([row for _, row in rows])
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="number">{value_cell(finite(row["first"]))}</td>'
        f'<td class="number">{value_cell(finite(row["second"]))}</td>{difference_cells(row, scale, metric=False)}'
        f'<td class="number">{_p_words(finite(row["p_holm"]))}</td></tr>'
        for name, row in rows
    )
    return (
        '<h3>By finding</h3><div class="scroll"><table class="plain steps"><thead><tr>'
        f'<th>{text(metric)}</th><th class="number">First</th><th class="number">Second</th>'
        f'<th class="wide">First minus second{difference_axis(scale)}</th><th></th>'
        f'<th class="number">p, Holm</th></tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{DIFFERENCES_NOTE}</p>'
    )


def _p_words(p: float | None) -> str:
    if p is None:
        return undefined("no scatter over the resamples")
    words = "&lt; 0.001" if p < 0.001 else decimal(p)
    return f"<b>{words}</b>" if p < 0.05 else words


def findings_table(rows: Sequence[FindingRow]) -> str:
    """Every number of every finding; sortable by a click on a heading where scripts run."""
    columns = (
        ("Finding", "text"), ("Group", "text"), ("Positives", ""), ("Prevalence", ""), ("AP", ""),
        ("AP / prevalence", ""), ("AUC", ""), ("F1 at 0.5", ""), ("F1 tuned", ""), ("Threshold", ""), ("Missed", ""),
        ("False alarms", ""), ("ECE", ""), ("Slope", ""),
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
            _with_interval(row, "FNR@tuned"),
            _with_interval(row, "FPR@tuned"),
            _with_interval(row, "ECE"),
            _with_interval(row, "calibration_slope"),
        ]
        body.append(f'<tr class="tone-{row.group}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="plain findings" data-sortable><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _metric(difference: Mapping[str, Any]) -> str:
    given = str(difference.get("metric", ""))
    return METRIC_NAMES.get(given, (OTHER_NAMES.get(given, given), ""))[0]


def _sortable(number: float | None, shown: str) -> str:
    return f'<td class="number" data-sort="{"" if number is None else repr(number)}">{shown}</td>'


def _with_interval(row: FindingRow, key: str) -> str:
    number, ends = row.values[key], row.intervals[key]
    small = f"<small>{bracket(ends)}</small>" if ends else ""
    return _sortable(number, f"{value_cell(number, reason_for(row, key))}{small}")


def _small(words: object) -> str:
    return f"<small>{text(words)}</small>" if words else ""


def _best(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    numbers = [number for step in steps if (number := finite(step.get(key))) is not None]
    if len(numbers) < 2:
        return None
    return min(numbers) if "ECE" in key else max(numbers)


def difference_scale(differences: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of a symmetric axis that holds every interval."""
    return symmetric_scale([finite(part.get(key)) for part in differences for key in ("value", "low", "high")])


def symmetric_scale(values: Sequence[float | None]) -> float:
    """Half the width of a symmetric axis that holds these."""
    largest = max((abs(value) for value in values if value is not None), default=0.1)
    return max(largest * 1.08, 1e-3)


def symmetric_ticks(scale: float, *, narrow: bool = False) -> list[float]:
    """Of such an axis; over a narrow column zero and one round number on either side, past half of `scale`."""
    if narrow:
        power = 10.0 ** math.floor(math.log10(scale))
        tick = max(round(factor * power, 12) for factor in (1, 2, 3, 5, 7) if factor * power <= scale * (1 + 1e-9))
        return [-tick, 0.0, tick]
    return [tick for tick in nice_ticks(-scale, scale, 4) if abs(tick) <= scale]


def difference_axis(scale: float, *, narrow: bool = False) -> str:
    """The numbers above a column of differences."""
    return axis(symmetric_ticks(scale, narrow=narrow), Position(-scale, scale), 2 if scale >= 0.02 else 3, plus=True)


def difference_cells(difference: Mapping[str, Any] | None, scale: float, *, metric: bool = True) -> str:
    """Two cells, a track and its numbers; hollow and "not shown" where the interval includes zero."""
    value = finite(difference.get("value")) if difference else None
    if difference is None or value is None:
        return "<td></td><td></td>"
    ends = interval((difference.get("low"), difference.get("high")))
    shown = is_shown(dict(difference))
    name = f"{_metric(difference)} " if metric else ""
    words = f"{name}{signed(value)} {bracket(ends)}{'' if shown else ' not shown'}"
    ticks = nice_ticks(-scale, scale, 4)
    track = interval_track(
        value, ends, scale=Position(-scale, scale), ticks=ticks, reference=0.0, label=words, hollow=not shown
    )
    verdict = "" if shown else ' <em class="not-shown">not shown</em>'
    return (
        f'<td class="track-cell {"tone-head" if shown else "tone-plain"}">{track}</td>'
        f'<td class="difference">{text(name)}<b>{signed(value)}</b> <small>{bracket(ends)}</small>{verdict}</td>'
    )
