"""The page of an ablation: rows with their intervals beside published numbers, differences, groups, seeds, findings.

Takes the content of `results.json` and computes nothing. Built like the page of an evaluation (`report.py`):
self-contained, light, dark or printed, readable without a script. Equal inputs give equal bytes. A little past 300
lines: one function for each section.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hilum.evaluation import report_assets as words
from hilum.evaluation.ablation_table import GROUP_WORDS, LEFT_OUT, SETS, interval_words, notes
from hilum.evaluation.charts import nice_ticks
from hilum.evaluation.markup import bracket, count, decimal, finite, interval, signed, text, undefined
from hilum.evaluation.report import listing, page
from hilum.evaluation.report_rows import GROUPS, METRIC_NAMES, badge
from hilum.evaluation.report_tables import difference_axis, symmetric_scale, symmetric_ticks
from hilum.evaluation.tracks import Position, axis, interval_track

METRICS = ("mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard")
NOT_MEASURED = "not measured"
CHOSEN = "Learning rates that validation chose, by the score beside them; the test images had no part in it."
_FINDING_COLUMNS = (("Finding", ""), ("Group", ""), ("Positives", " class=number"))


def render_ablation(results: Mapping[str, Any]) -> str:
    """The page as text."""
    plan = results["plan"]
    parts = [
        (_anchor("rows", task), _named("Rows", task), _rows_lead(results, task), _rows(results, task))
        for task in results["tasks"]
    ]
    for task in results["tasks"]:
        if results["differences"]:
            lead = "First minus second, paired by patient and seed. " + _marks(results, task, difference=True)
            content = _differences(results, task)
            parts.append((_anchor("differences", task), _named("Differences", task), lead, content))
    for task in results["tasks"]:
        if results["differences"] and any(results["tasks"][task]["groups"].values()):
            lead = f"Differences of mAP by how common a finding is ({GROUP_WORDS})."
            content = _group_table(results, task)
            parts.append((_anchor("groups", task), _named("Head, medium, tail", task), lead, content))
    for task in results["tasks"]:
        content = _numbers(results, task)
        lead = "Every macro mean with its interval, and mAP of every seed."
        parts.append((_anchor("numbers", task), _named("All numbers", task), lead, content))
    parts.append(("findings", "Findings", "AP, mean over seeds. Click a heading to sort.", _findings(results)))
    parts.append(("chosen", "What was chosen", CHOSEN, _chosen(results)))
    parts.append(("provenance", "Provenance", "The plan as it was run; as YAML it can be run again.", _plan(results)))
    style = words.asset("ablation_report.css")
    return page(plan["title"] or plan["name"], _masthead(results), parts, notes(results), style)


def _named(heading: str, task: str) -> str:
    return text(heading) if task == "all" else f"{text(heading)} <small>{text(task)}</small>"


def _anchor(kind: str, task: str) -> str:
    return f"{kind}-{task}"


def _masthead(results: Mapping[str, Any]) -> str:
    plan, store = results["plan"], results["store"]
    facts = {
        "Rows": count(len(results["rows"])),
        "Seeds": ", ".join(map(str, plan["seeds"])),
        "Scale": plan["scale"],
        "Data": store["name"] + (f", {plan['target']}" if plan["target"] else ""),
        "Test patients": count(store["test_patients"]),
        "Test images": count(store["test_images"]),
    }
    details = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    asked = f'<p class="asked">{text(plan["note"])}</p>' if plan["note"] else ""
    return (
        f'<header class="masthead"><div class="inner"><div class="words"><p class="maker">{words.BRAND}Hilum</p>'
        f"<h1>{text(plan['title'] or plan['name'])}</h1>{asked}<dl>{details}</dl></div></div></header>"
    )


def _rows_lead(results: Mapping[str, Any], task: str) -> str:
    columns = results["tasks"][task]
    means = f"Mean average precision over {len(columns['findings'])} of {columns['asked']} findings, the same ones for "
    return f"{means}every row. " + _marks(results, task, difference=False)


def _marks(results: Mapping[str, Any], task: str, *, difference: bool) -> str:
    lines = results["differences"] if difference else results["rows"]
    hollow = "A hollow dot: <b>not shown</b>, the interval includes zero. " if difference else ""
    if all(line["tasks"][task]["published"] is None for line in lines):
        return hollow
    return (
        f"{hollow}The diamond is the published number ({text(results['plan']['published_by'])}): other images and "
        "other labels, so that its level cannot be compared with ours."
    )


def _rows(results: Mapping[str, Any], task: str) -> str:
    entries = [(row, _of(row, task, "all", "mAP"), row["tasks"][task]["published"]) for row in results["rows"]]
    ends = [value for _, entry, known in entries for value in (*_ends(entry), known) if value is not None]
    if not ends:
        return '<p class="note">No row could be measured on this task.</p>' + _left_out(results, task)
    upper = max(ends) * 1.05
    ticks = nice_ticks(0.0, upper, 5)
    scale = Position(0.0, upper)
    published = any(known is not None for _, _, known in entries)
    body = []
    for row, entry, known in entries:
        value = finite(entry.get("value")) if entry else None
        label = f"{row['title']}: mAP {decimal(value)} {bracket(_pair(entry))}"
        other = f", published {decimal(known, 4)}" if known is not None else ""
        track = interval_track(
            value, _pair(entry), scale=scale, ticks=ticks, label=f"{label}{other}", beside=known
        )  # fmt: skip
        small = f"<small>published: {text(row['stands_for'])}</small>" if _differs(row) else ""
        beside = f'<td class="number">{decimal(known, 4) if known is not None else ""}</td>' if published else ""
        shown = decimal(value) if value is not None else undefined(NOT_MEASURED)
        body.append(
            f'<tr><th scope="row">{text(row["title"])}{small}</th><td class="track-cell tone-head">{track}</td>'
            f'<td class="number"><b>{shown}</b><small>{bracket(_pair(entry))}</small></td>{beside}</tr>'
        )
    known_head = '<th class="number">Published</th>' if published else ""
    head = (
        f'<tr><th>Row</th><th class="wide">mAP{axis(ticks, scale, None)}</th><th class="number">Here</th>{known_head}'
        "</tr>"
    )
    return _table("ablation", head, body) + _left_out(results, task)


def _differs(row: Mapping[str, Any]) -> bool:
    return bool(row["stands_for"]) and row["stands_for"] != row["title"]


def _left_out(results: Mapping[str, Any], task: str) -> str:
    lines = [
        f"<b>{text(LEFT_OUT.get(reason, reason).capitalize())}:</b> {text(', '.join(names))}."
        for reason, names in results["tasks"][task]["left_out"].items()
        if names
    ]
    return f'<p class="note">Left out of the means. {" ".join(lines)}</p>' if lines else ""


def _differences(results: Mapping[str, Any], task: str) -> str:
    entries = [(one, _of(one, task, "all", "mAP"), one["tasks"][task]["published"]) for one in results["differences"]]
    scale = symmetric_scale([value for _, entry, known in entries for value in (*_ends(entry), known)])
    published = any(known is not None for _, _, known in entries)
    body = []
    for one, entry, known in entries:
        beside = f'<td class="number">{signed(known, 4) if known is not None else ""}</td>' if published else ""
        first, _, second = str(one["title"]).partition(" - ")
        body.append(
            f'<tr><th scope="row">{text(first)}<small>minus {text(second)}</small></th>'
            f"{_difference_cells(one['title'], entry, scale, known)}{beside}</tr>"
        )
    known_head = '<th class="number">Published</th>' if published else ""
    head = f'<tr><th>Comparison</th><th class="wide">mAP{difference_axis(scale)}</th><th></th>{known_head}</tr>'
    return _table("ablation", head, body)


def _difference_cells(title: str, entry: Mapping[str, Any] | None, scale: float, known: float | None = None) -> str:
    value = finite(entry.get("value")) if entry else None
    shown = bool(entry and entry.get("shown"))
    label = f"{title}: {signed(value)} {bracket(_pair(entry))}{'' if shown else ' not shown'}"
    track = interval_track(
        value, _pair(entry), scale=Position(-scale, scale), ticks=symmetric_ticks(scale), reference=0.0, label=label,
        hollow=not shown, beside=known,
    )  # fmt: skip
    if value is None:
        return f'<td class="track-cell tone-plain">{track}</td><td>{undefined(NOT_MEASURED)}</td>'
    verdict = "" if shown else ' <em class="not-shown">not shown</em>'
    return (
        f'<td class="track-cell {"tone-head" if shown else "tone-plain"}">{track}</td>'
        f'<td class="difference"><b>{signed(value)}</b> <small>{bracket(_pair(entry))}</small>{verdict}</td>'
    )


def _group_table(results: Mapping[str, Any], task: str) -> str:
    present = [name for name in SETS[1:] if results["tasks"][task]["groups"].get(name)]
    scale = symmetric_scale(
        [end for one in results["differences"] for name in present for end in _ends(_of(one, task, name, "mAP"))]
    )
    ticks = symmetric_ticks(scale, narrow=True)
    body = []
    for one in results["differences"]:
        cells = ""
        for name in present:
            entry = _of(one, task, name, "mAP")
            value, shown = finite(entry.get("value")) if entry else None, bool(entry and entry.get("shown"))
            label = f"{one['title']}, {name}: {signed(value)} {bracket(_pair(entry))}{'' if shown else ' not shown'}"
            track = interval_track(
                value, _pair(entry), scale=Position(-scale, scale), ticks=ticks, reference=0.0,
                mark=GROUPS[name][0], label=label, hollow=not shown,
            )  # fmt: skip
            number = signed(value) if value is not None else undefined(NOT_MEASURED)
            cells += f'<td class="track-cell tone-{name}">{track}</td><td class="number">{number}</td>'
        first, _, second = str(one["title"]).partition(" - ")
        body.append(f'<tr><th scope="row">{text(first)}<small>minus {text(second)}</small></th>{cells}</tr>')
    heads = "".join(
        f'<th class="third">{badge(name)}{name} <small>{len(results["tasks"][task]["groups"][name])} findings</small>'
        f"{difference_axis(scale, narrow=True)}</th><th></th>"
        for name in present
    )
    return _table("ablation groups", f"<tr><th>Comparison</th>{heads}</tr>", body)


def _numbers(results: Mapping[str, Any], task: str) -> str:
    seeds = [str(seed) for seed in results["plan"]["seeds"]]
    body = []
    for row in results["rows"]:
        cells = ""
        for metric in METRICS:
            entry = _of(row, task, "all", metric)
            value = finite(entry.get("value")) if entry else None
            shown = decimal(value) if value is not None else undefined(NOT_MEASURED)
            cells += f'<td class="number">{shown}<small>{bracket(_pair(entry))}</small></td>'
        values = (_of(row, task, "all", "mAP") or {}).get("seeds", {})
        for seed in seeds:
            value = finite(values.get(seed))
            cells += f'<td class="number">{decimal(value) if value is not None else undefined(NOT_MEASURED)}</td>'
        body.append(f'<tr><th scope="row">{text(row["title"])}</th>{cells}</tr>')
    heads = "".join(f'<th class="number">{text(METRIC_NAMES[metric][0])}</th>' for metric in METRICS)
    heads += "".join(f'<th class="number">mAP, seed {text(seed)}</th>' for seed in seeds)
    return _table("numbers", f"<tr><th>Row</th>{heads}</tr>", body)


def _findings(results: Mapping[str, Any]) -> str:
    listed = results["findings"]
    if not listed:
        return '<p class="note">No row could be measured.</p>'
    rows = [row for row in results["rows"] if row["seeds"]]
    order = sorted(listed, key=lambda name: (SETS.index(listed[name]["group"] or "tail"), -listed[name]["positives"]))
    body = []
    for name in order:
        entry = listed[name]
        cells = "".join(
            f'<td class="number" data-sort="{"" if value is None else repr(value)}">'
            f"{decimal(value) if value is not None else undefined('not defined here')}</td>"
            for row in rows
            for value in (finite(entry["AP"].get(row["name"])),)
        )
        group = entry["group"] or "other"
        body.append(
            f'<tr><th scope="row" data-sort="{text(name)}">{text(name)}</th>'
            f'<td data-sort="{list(GROUPS).index(group)}">{badge(group)}{text(group)}</td>'
            f'<td class="number" data-sort="{entry["positives"]}">{count(entry["positives"])}</td>{cells}</tr>'
        )
    heads = "".join(f'<th class="number turned" scope="col">{text(row["title"])}</th>' for row in rows)
    head = "".join(f'<th{kind} scope="col">{name}</th>' for name, kind in _FINDING_COLUMNS) + heads
    return (
        f'<div class="scroll"><table class="plain findings" data-sortable><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _chosen(results: Mapping[str, Any]) -> str:
    heads: dict[str, Mapping[str, Any]] = {}
    for row in results["rows"]:
        heads |= row["chosen"]
    seeds = [str(seed) for seed in results["plan"]["seeds"]]
    body = []
    for name, by_seed in heads.items():
        cells = ""
        for seed in seeds:
            chosen = by_seed.get(seed)
            rate, score = (finite(chosen.get(key)) if chosen else None for key in ("learning_rate", "score"))
            known = "" if score is None else f"<small>validation mAP {decimal(score)}</small>"
            cells += (
                f'<td class="number">{text(f"{rate:g}") if rate is not None else undefined(NOT_MEASURED)}{known}</td>'
            )
        body.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    top = "".join(f'<th class="number">Rate, seed {text(seed)}</th>' for seed in seeds)
    return _table("numbers", f"<tr><th>Head</th>{top}</tr>", body)


def _plan(results: Mapping[str, Any]) -> str:
    store = results["store"]
    facts = [
        ("plan", yaml.safe_dump(results["plan"], sort_keys=False, allow_unicode=True)),
        ("intervals", interval_words(results)),
        ("training images", str(store["training_images"])),
        ("validation images", str(store["validation_images"])),
        ("test images, fingerprint", str(store["test_fingerprint"])),
        ("seconds of all units", str(results["unit_seconds"])),
        ("hilum", str(results["hilum"])),
    ]
    return listing(facts)


def _of(line: Mapping[str, Any], task: str, part: str, metric: str) -> Mapping[str, Any] | None:
    entry = line["tasks"][task].get(part, {})
    found = entry.get(metric)
    return found if isinstance(found, Mapping) else None


def _pair(entry: Mapping[str, Any] | None) -> tuple[float, float] | None:
    return interval((entry.get("low"), entry.get("high"))) if entry else None


def _ends(entry: Mapping[str, Any] | None) -> list[float | None]:
    return [] if entry is None else [finite(entry.get(key)) for key in ("value", "low", "high")]


def _table(kind: str, head: str, body: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table class="plain steps {kind}"><thead>{head}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
