"""The tables of the page of a recalibration, as HTML: verdicts, operating points, calibration, rare findings, drift.

Pure functions of the content of `site_report.json`; the page itself is in `site_report.py`. A little past 300 lines:
two functions for each section.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hilum.evaluation.charts import reliability_plot
from hilum.evaluation.curves import Curves
from hilum.evaluation.markup import bracket, count, decimal, share, signed, text, undefined
from hilum.evaluation.site_judgement import LARGE_DRIFT, NO, NOT_SHOWN, YES
from hilum.evaluation.thresholds import point_words
from hilum.evaluation.tracks import Position, axis, interval_track, pair_track

AUC_SCALE = Position(0.4, 1.0)
AUC_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CLASS = {YES: "is-yes", NOT_SHOWN: "is-not-shown", NO: "is-no"}
ORDER = (YES, NOT_SHOWN, NO)
_KEYS = (
    '<p class="keys"><span><i class="key-filled"></i>here</span><span><i class="key-interval"></i>95 % interval, by '
    'patient</span><span><i class="key-diamond"></i>on the model\'s own validation</span>'
    '<span><i class="key-reference"></i>least useful AUC</span></p>'
)
_DRAWN_FROM = 20
"""Positive studies from which a reliability curve is drawn."""


def chip(verdict: str) -> str:
    """A verdict as a small label."""
    return f'<span class="chip {CLASS[verdict]}">{verdict}</span>'


def verdict_lead(result: Mapping[str, Any]) -> str:
    """What the first table shows."""
    least = result["rules"]["minimum_auc"]
    return (
        f"Does the model tell studies with a finding from those without? An AUC of 0.5 is guessing; here {least:.2f} "
        "is the least useful one. <b>Yes</b>: the whole interval is at or beyond it, and probabilities and cuts hold. "
        "<b>No</b>: the whole interval is below it. <b>Not shown</b>: these studies do not decide it. The last column "
        f"says how many more labelled studies would bring the interval to a width of {result['rules']['width']:g}."
    )


def verdict_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """A row for each judged finding: its verdict, and its AUC beside that of the model's own validation."""
    if not names:
        return '<p class="note">No finding has enough studies to be judged.</p>'
    body = []
    for name in names:
        row, auc = result["findings"][name], result["findings"][name]["AUC"]
        ends = (auc["low"], auc["high"]) if auc["low"] is not None else None
        there = (row["card"] or {}).get("AUC")
        label = f"AUC {decimal(auc['value'], 2)} {bracket(ends, 2)}"
        track = interval_track(
            auc["value"], ends, scale=AUC_SCALE, ticks=AUC_TICKS, reference=result["rules"]["minimum_auc"],
            label=label, beside=there["value"] if there else None, hollow=row["verdict"] == NOT_SHOWN,
        )  # fmt: skip
        tone = {YES: "tone-medium", NO: "tone-tail", NOT_SHOWN: "tone-plain"}[row["verdict"]]
        beside = f"{decimal(there['value'], 2)}<small>{_ends(there)}</small>" if there else undefined("no validation")
        body.append(
            f'<tr><th scope="row">{text(name)}<small>{count(row["positives"])} of '
            f"{count(row['positives'] + row['negatives'])} studies, {share(row['prevalence'])}</small></th>"
            f"<td>{chip(row['verdict'])}</td>"
            f'<td class="track-cell wide {tone}">{track}</td>'
            f'<td class="number"><b>{decimal(auc["value"], 2)}</b><small>{_ends(auc)}</small></td>'
            f'<td class="number">{beside}</td>'
            f'<td class="number">{decimal((row["AP"] or {}).get("value"), 2)}<small>{_ends(row["AP"])}</small></td>'
            f'<td class="why">{text("; ".join(row["reasons"]))}{_decides(row)}</td>'
            f'<td class="number">{_more(row["needed"]["AUC"])}</td></tr>'
        )
    head = (
        '<th>Finding</th><th>Fit?</th><th class="wide">AUC' + axis(AUC_TICKS, AUC_SCALE) + "</th>"
        '<th class="number">AUC here</th><th class="number">AUC, own<br>validation</th><th class="number">AP here</th>'
        '<th>Why</th><th class="number">More<br>studies</th>'
    )
    return f'{_KEYS}<div class="scroll"><table class="plain site"><thead><tr>{head}</tr></thead><tbody>' + (
        f"{''.join(body)}</tbody></table></div>"
    )


def _decides(row: Mapping[str, Any]) -> str:
    """How many more studies would decide what these do not, where the AUC is what stands between."""
    number = row["needed"]["decide"]
    if row["verdict"] != NOT_SHOWN or not number:
        return ""
    return f". <b>About {count(number)} more studies</b> would decide it, if the AUC stays"


def _ends(part: Mapping[str, Any] | None, digits: int = 2) -> str:
    if not part or part["low"] is None:
        return ""
    return bracket((part["low"], part["high"]), digits)


def _more(number: int | None) -> str:
    if number is None:
        return undefined("not known")
    return "enough" if number == 0 else f"+{count(number)}"


def points_lead(result: Mapping[str, Any]) -> str:
    """What the table of operating points shows."""
    return (
        "What to expect of the cuts in the new model, out of sample: every study was called by a cut that other "
        "patients gave. Alerts are how many of 100 studies are called positive; PPV is how many of these are. Intervals"
        " count the studies of one patient as one. The last column: further labelled studies until the interval of the "
        f"sensitivity is {result['rules']['width']:g} wide."
    )


def points_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """What to expect of each cut, out of sample."""
    head = (
        '<th>Finding</th><th class="number">Cut at</th><th class="number">Sensitivity</th>'
        '<th class="number">Specificity</th><th class="number">PPV</th><th class="number">Alerts per 100</th>'
        '<th class="number">More studies</th>'
    )
    body = []
    for number, point in enumerate(result["rules"]["points"]):
        asked = " (asked for)" if point in result["rules"]["asked"] else ""
        body.append(f'<tr class="cut"><th colspan="7">{text(point_words(point))}{asked}</th></tr>')
        for name in names:
            row = result["findings"][name]
            found = row["points"].get(point)
            if found is None:
                body.append(f'<tr><th scope="row">{text(name)}</th><td colspan="6">no cut</td></tr>')
                continue
            cells = "".join(_share_cell(found[key]) for key in ("sensitivity", "specificity", "PPV"))
            alerts = found["alerts_per_100"]
            more = _more(row["needed"]["sensitivity"]) if number == 0 else ""
            body.append(
                f'<tr{_faint(row)}><th scope="row">{text(name)}{_useless(row)}</th>'
                f'<td class="number">{share(found["threshold"])}</td>{cells}'
                f'<td class="number">{decimal(alerts["value"], 0)}<small>{_ends(alerts, 0)}</small></td>'
                f'<td class="number">{more}</td></tr>'
            )
    if not names:
        return '<p class="note">No finding has enough studies for a cut to be judged.</p>'
    return f'<div class="scroll"><table class="plain site points"><thead><tr>{head}</tr></thead><tbody>' + (
        f"{''.join(body)}</tbody></table></div>"
    )


def _faint(row: Mapping[str, Any]) -> str:
    return ' class="faint"' if row["verdict"] == NO else ""


def _useless(row: Mapping[str, Any]) -> str:
    return "<small>shown not to be useful</small>" if row["verdict"] == NO else ""


def _share_cell(part: Mapping[str, Any]) -> str:
    if part["value"] is None:
        return f'<td class="number">{undefined("nothing was called")}</td>'
    return (
        f'<td class="number"><b>{share(part["value"])}</b>'
        f"<small>{decimal(100 * part['low'], 0)} to {decimal(100 * part['high'], 0)} %</small></td>"
    )


def calibration_lead(result: Mapping[str, Any]) -> str:
    """What the section on calibration shows."""
    was = "the model as it was" if result["was_calibrated"] else "the model's raw scores"
    return (
        f"When the model says 30 %, do 30 of 100 have it? Tick: the share that has it. Hollow: {was}. Filled: "
        "recalibrated, each patient by maps that were fitted without them. Brier score and ECE: smaller is better; a "
        "difference whose interval includes zero is not shown."
    )


def calibration_table(result: Mapping[str, Any], names: Sequence[str], after: Curves, before: Curves) -> str:
    """Probabilities before and after beside what is observed, and a panel for each finding."""
    if not names:
        return '<p class="note">No finding has enough studies for a map of its own.</p>'
    largest = max(
        max(row["calibration"]["mean_before"], row["calibration"]["mean_after"], row["prevalence"])
        for row in (result["findings"][name] for name in names)
    )
    limit = next((end for end in (0.1, 0.25, 0.5) if largest <= end), 1.0)
    scale, ticks = Position(0.0, limit), (0.0, limit / 2, limit)
    body = []
    for name in names:
        row = result["findings"][name]
        fit = row["calibration"]
        track = pair_track(
            fit["mean_before"], fit["mean_after"], scale=scale, ticks=ticks, reference=row["prevalence"],
            label=f"{share(fit['mean_before'])}, then {share(fit['mean_after'])}; {share(row['prevalence'])} have it",
        )  # fmt: skip
        body.append(
            f'<tr class="tone-head"><th scope="row">{text(name)}<small>{_map(row["map"])}</small></th>'
            f'<td class="number"><b>{share(row["prevalence"])}</b></td>'
            f'<td class="number">{share(fit["mean_before"])}</td><td class="track-cell wide">{track}</td>'
            f'<td class="number"><b>{share(fit["mean_after"])}</b></td>'
            f"{_change(fit['Brier'])}{_change(fit['ECE'])}</tr>"
        )
    head = (
        '<th>Finding</th><th class="number">Have it</th><th class="number">It said</th>'
        f'<th class="wide">Mean probability{axis(ticks, scale, None)}</th><th class="number">It says</th>'
        '<th class="number">Brier score</th><th class="number">ECE</th>'
    )
    table = f'<div class="scroll"><table class="plain site"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}'
    panels = "".join(
        f'<figure class="panel tone-head"><figcaption><b>{text(name)}</b><span>'
        f"{count(result['findings'][name]['positives'])} positive studies</span></figcaption>"
        f"{reliability_plot(after.findings[name], label=f'Reliability, {name}', before=before.findings[name])}</figure>"
        for name in names
        if result["findings"][name]["positives"] >= _DRAWN_FROM
    )
    return f'{table}</tbody></table></div><h3>Predicted against observed</h3><div class="multiples">{panels}</div>'


def _map(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "never trained"
    kinds = {"temperature_bias": "intercept; slope held", "platt": "intercept and slope", "isotonic": "steps"}
    return text(one["flag"] or kinds.get(one["kind"], one["kind"]))


def _change(part: Mapping[str, Any]) -> str:
    tone = "" if not part["shown"] else " better" if part["difference"] < 0 else " worse"
    verdict = "" if part["shown"] else ' <em class="not-shown">not shown</em>'
    return (
        f'<td class="number">{decimal(part["before"])} \N{RIGHTWARDS ARROW} <b class="{tone.strip()}">'
        f"{decimal(part['after'])}</b><small>{signed(part['difference'])} {_ends(part, 3)}{verdict}</small></td>"
    )


def few_lead(result: Mapping[str, Any]) -> str:
    """What the table of rare findings shows."""
    kept = (
        "They keep the calibrator and the cuts that they had."
        if result["was_calibrated"]
        else "With some labels they get the map of their group, held to no change; without any they stay uncalibrated."
    )
    return (
        f"Fewer than {result['rules']['enough']} positive or {result['rules']['enough']} negative studies. {kept} The "
        "last column: further labelled studies until enough are expected, at the share seen here."
    )


def few_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Findings with too few studies, and what became of each."""
    body = []
    for name in names:
        row = result["findings"][name]
        auc = row["AUC"]
        shown = f"{decimal(auc['value'], 2)}<small>{_ends(auc)}</small>" if auc else undefined("no positive study")
        body.append(
            f'<tr class="faint"><th scope="row">{text(name)}</th><td class="number">{count(row["positives"])}</td>'
            f'<td class="number">{count(row["negatives"])}</td><td class="number">{shown}</td>'
            f'<td class="why">{text(_became(row, result["was_calibrated"]))}</td>'
            f'<td class="number">{_more(row["needed"]["judged"])}</td></tr>'
        )
    head = (
        '<th>Finding</th><th class="number">Positive</th><th class="number">Negative</th><th class="number">AUC</th>'
        '<th>What became of it</th><th class="number">More studies</th>'
    )
    return f'<div class="scroll"><table class="plain site"><thead><tr>{head}</tr></thead><tbody>' + (
        f"{''.join(body)}</tbody></table></div>"
    )


def _became(row: Mapping[str, Any], was_calibrated: bool) -> str:
    flag = (row["map"] or {}).get("flag")
    if not row["trained"] or not flag:
        return "; ".join(row["reasons"])
    if not was_calibrated:
        return str(flag)
    return "keeps what it had" + ("" if flag.startswith("kept") else f" ({flag} at training)")


DRIFT_LEAD = (
    "How far the raw scores here are from those of the model's own validation: the population stability index over its "
    "tenths. Chance alone exceeds the second number one time in twenty with so few studies. Drift changes no verdict; "
    f"beyond {LARGE_DRIFT:g} look at the images first: inverted, another window, other views, other patients."
)


def drift_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """How far the scores are from those of validation."""
    body = []
    for name in names:
        row = result["findings"][name]
        if not row["drift"]:
            continue
        index, chance = row["drift"]["PSI"], row["drift"]["chance"]
        large = index > max(LARGE_DRIFT, chance)
        words_ = "large" if large else "more than chance" if index > chance else "no more than chance"
        there = (row["card"] or {}).get("prevalence")
        body.append(
            f'<tr><th scope="row">{text(name)}</th>'
            f'<td class="number"><b class="{"drift-large" if large else ""}">{decimal(index, 2)}</b></td>'
            f'<td class="number">{decimal(chance, 2)}</td><td>{words_}</td>'
            f'<td class="number">{share(there)}</td><td class="number">{share(row["prevalence"])}</td></tr>'
        )
    head = (
        '<th>Finding</th><th class="number">Index</th><th class="number">Chance</th><th></th>'
        '<th class="number">Have it there</th><th class="number">Have it here</th>'
    )
    return f'<div class="scroll"><table class="plain site"><thead><tr>{head}</tr></thead><tbody>' + (
        f"{''.join(body)}</tbody></table></div>"
    )
