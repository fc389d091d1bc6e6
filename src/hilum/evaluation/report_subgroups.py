"""Subgroups and the leaderboard of the report: each group beside the rest, one's own row beside published ones.

Functions from the dict of `metrics.json` to HTML; they compute no metric.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hilum.evaluation.charts import nice_ticks
from hilum.evaluation.markup import bracket, count, decimal, finite, interval, signed, text, undefined
from hilum.evaluation.report_tables import difference_axis, difference_cells, difference_scale
from hilum.evaluation.subgroups import UNDER_DIAGNOSIS
from hilum.evaluation.summary import is_shown
from hilum.evaluation.tracks import Position, axis, interval_track

LEAD = (
    "Each group of patients beside the rest, over the findings that both have, on the same resampled patients. AUC "
    "hardly feels how common a finding is; AP and F1 do, so a gap in them may only say that a group is more or less "
    "ill. <b>Missed</b>: true cases below the threshold. <b>Called healthy</b>: patients without the label Normal who "
    "are flagged Normal (under-diagnosis)."
)
NUMBERS: tuple[tuple[str, str], ...] = (
    ("mAP", "mAP"), ("mF1@tuned", "mF1 tuned"), ("mECE_standard", "mECE"), ("mFNR@tuned", "Missed"),
    (UNDER_DIAGNOSIS, "Called healthy"),
)  # fmt: skip
NOTE = (
    "Small figures are the gap to the rest; bold where its 95 % interval leaves out zero. Many groups are looked at: "
    "one gap in twenty is shown by chance."
)
MEASURES = ("mAP", "mAUC", "mF1", "mECE")


def subgroups_table(attributes: Mapping[str, Mapping[str, Any]]) -> str:
    """One compact table: a block per attribute, a line per group."""
    groups = [group for part in attributes.values() for group in part["groups"].values()]
    if not groups:
        return f'<p class="note">{_left_out(attributes)}</p>'
    gaps = [{"value": gap["difference"], **gap} for group in groups if (gap := group["gap"].get("mAUC"))]
    half = difference_scale(gaps)
    scale, ticks = _auc_scale(groups)
    head = "".join(f'<th class="number">{name}</th>' for key, name in NUMBERS if _any(groups, key))
    columns = 5 + sum(_any(groups, key) for key, _ in NUMBERS)
    bodies = []
    for name, part in attributes.items():
        if not part["groups"]:
            continue
        lines = "".join(_line(level, group, groups, scale, ticks, half) for level, group in part["groups"].items())
        title = text(name[:1].upper() + name[1:])
        bodies.append(
            f'<tbody><tr class="group"><th colspan="{columns}" scope="rowgroup">{title}</th></tr>{lines}</tbody>'
        )
    left_out = _left_out(attributes)
    return (
        '<div class="scroll"><table class="plain steps subgroups"><thead><tr><th>Group</th>'
        f'<th class="wide">mAUC{axis(ticks, scale)}</th><th></th>'
        f'<th class="wide">mAUC minus the rest{difference_axis(half)}</th><th></th>{head}</tr></thead>'
        f'{"".join(bodies)}</table></div><p class="note">{NOTE}{" " + left_out if left_out else ""}</p>'
    )


def _auc_scale(groups: Sequence[Mapping[str, Any]]) -> tuple[Position, list[float]]:
    values = [value for group in groups for value in (group["values"].get("mAUC"), *group["ci95"].get("mAUC", ()))]
    lower = min([0.5, *(int(value * 10) / 10 for value in values if value is not None)])
    return Position(lower, 1.0), list(nice_ticks(lower, 1.0, 4))


def _any(groups: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(group["values"].get(key) is not None for group in groups)


def _line(
    level: str,
    group: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    scale: Position,
    ticks: Sequence[float],
    half: float,
) -> str:
    value, ends = finite(group["values"].get("mAUC")), interval(group["ci95"].get("mAUC"))
    label = f"{level} mAUC {decimal(value)} {bracket(ends)}"
    track = interval_track(value, ends, scale=scale, ticks=ticks, label=label, reference=0.5)
    gap = group["gap"].get("mAUC")
    size = len(group["findings"])
    people = f"{count(group['n_patients'])} patients, {size} finding{'' if size == 1 else 's'}"
    shown = decimal(value) if value is not None else undefined("no finding with enough cases in the group and the rest")
    cells = "".join(_number(group, key) for key, _ in NUMBERS if _any(groups, key))
    return (
        f'<tr><th scope="row">{text(level)}<small>{people}</small></th>'
        f'<td class="track-cell tone-plain">{track}</td><td class="number">{shown}</td>'
        f"{difference_cells({'value': gap['difference'], **gap} if gap else None, half, metric=False)}{cells}</tr>"
    )


def _number(group: Mapping[str, Any], key: str) -> str:
    value, gap = finite(group["values"].get(key)), group["gap"].get(key)
    if value is None:
        return f'<td class="number">{undefined("no threshold, or no such finding, in the group or the rest")}</td>'
    difference = ""
    if gap and finite(gap["difference"]) is not None:
        words = signed(finite(gap["difference"]))
        difference = f"<small>{f'<b>{words}</b>' if is_shown(dict(gap)) else words}</small>"
    return f'<td class="number">{decimal(value)}{difference}</td>'


def _left_out(attributes: Mapping[str, Mapping[str, Any]]) -> str:
    few = [
        f"{text(name)} {text(level)} ({count(patients)})"
        for name, part in attributes.items()
        for level, patients in part["too_few"].items()
    ]
    blank = [f"{text(name)} ({count(n)} items)" for name, part in attributes.items() if (n := part["unrecorded"])]
    lines = [f"<b>Too few patients to judge:</b> {', '.join(few)}." if few else ""]
    lines += [f"<b>Not recorded:</b> {', '.join(blank)}." if blank else ""]
    return " ".join(line for line in lines if line)


def leaderboard_table(board: Mapping[str, Any]) -> str:
    """The own row, then the published ones, with what may not be concluded."""
    head = "".join(f'<th class="number">{name}</th>' for name in MEASURES)
    body = ""
    for row in board["rows"]:
        own = row["phase"] == "own"
        cells = "".join(
            f'<td class="number">{decimal(value) if value is not None else undefined("not published")}</td>'
            for value in (finite(row["values"].get(name)) for name in MEASURES)
        )
        name, phase = (f"<b>{text(row['team'])}</b>", "this evaluation") if own else (text(row["team"]), row["phase"])
        body += (
            f'<tr><th scope="row">{name}</th><td>{text(phase)}</td>'
            f'<td class="number">{count(row["rank"])}</td>{cells}</tr>'
        )
    remark = f" <b>{text(board['note'])}</b>" if board["note"] else ""
    return (
        '<div class="scroll"><table class="plain steps"><thead><tr><th>Entry</th><th>Phase</th>'
        f'<th class="number">Place</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="note">mECE of this evaluation is <code>mECE_challenge_inferred</code>: what the challenge computed '
        f"was never published. mF1 is at the fixed cut of 0.5.{remark}</p>"
    )
