"""The report: metrics, curves and example studies as one self-contained HTML file.

Last stop of the flow; reads what `metrics.py`, `curves.py` and the predictor have computed and computes nothing. The
file holds its style, its charts (SVG) and its pictures, asks nothing of any network (a content policy in the page
forbids it), follows the reader's light or dark scheme, prints, and reads without JavaScript; the little there is sorts
the table and dims the overlays. Equal inputs give equal bytes: the time of writing is a fact that the caller passes.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.evaluation import report_assets as words
from hilum.evaluation import report_figures as figures
from hilum.evaluation import report_localisation as places
from hilum.evaluation import report_subgroups as groups
from hilum.evaluation import report_tables as tables
from hilum.evaluation.curves import Curves, FindingCurve, curves
from hilum.evaluation.films import ExampleFinding, ReportExample, poster, study
from hilum.evaluation.markup import count, text
from hilum.evaluation.report_rows import finding_rows

__all__ = ["Curves", "ExampleFinding", "FindingCurve", "ReportExample", "curves", "render_report", "write_report"]

HEADLINE_FACTS: tuple[str, ...] = ("Model", "Data", "Split", "Date", "Patients", "Studies", "Images")
"""Facts of the head of the page, in this order; all others are listed under provenance."""

COUNTS: dict[str, str] = {"Patients": "n_patients", "Studies": "n_studies", "Images": "n_images"}
"""Facts taken from `metrics.json` where the caller gives none."""


def write_report(
    out: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    curves: Curves,
    steps: Sequence[Mapping[str, Any]] | None = None,
    examples: Sequence[ReportExample] = (),
    comparisons: Sequence[Mapping[str, Any]] | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    curves_before: Curves | None = None,
    minimum_positives: int | None = None,
) -> None:
    """Write `out` in one step; see `render_report` for the arguments.

    Raises:
        HilumError: the folder cannot be written.
    """
    page = render_report(
        title=title, metrics=metrics, curves=curves, steps=steps, examples=examples, comparisons=comparisons,
        facts=facts, notes=notes, curves_before=curves_before, minimum_positives=minimum_positives,
    )  # fmt: skip
    write_text(out, page)


def render_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    curves: Curves,
    steps: Sequence[Mapping[str, Any]] | None = None,
    examples: Sequence[ReportExample] = (),
    comparisons: Sequence[Mapping[str, Any]] | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    curves_before: Curves | None = None,
    minimum_positives: int | None = None,
) -> str:
    """The page as text.

    Args:
        title: heading of the page.
        metrics: the content of `metrics.json`; None, NaN or a missing key shows as an en dash with its reason. Its
            `subgroups`, `leaderboard`, `localisation` and `compare` make sections of their own where they are there.
        curves: of the findings in `metrics`; a finding without curves is listed as not drawn.
        steps: rows `{"name", "mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard", "difference": {"metric", "value",
            "low", "high", "shown"} or None}`: each step beside the one before.
        examples: studies; without patient identifiers.
        comparisons: rows `{"name", "metric", "first", "second", "value", "low", "high", "shown", "note"}`: the
            difference of two models; `first`, `second` and `note` may be left out.
        facts: name -> value. The names of `HEADLINE_FACTS` go to the head of the page, the rest to provenance.
        notes: sentences to read before the numbers.
        curves_before: the same items before calibration, drawn hollow behind the reliability curves.
        minimum_positives: findings with fewer are drawn faint and listed; by default `min_positives` of the
            metrics, or 10.
    """
    given = dict(facts or {})
    rows = finding_rows(metrics)
    minimum = minimum_positives if minimum_positives is not None else metrics.get("min_positives") or 10
    parts = [("result", "Result", "", tables.macro(metrics))]
    if steps:
        parts.append(("steps", "Step by step", words.STEPS, tables.steps_table(steps)))
    if comparisons:
        by_finding = tables.finding_differences_table((metrics.get("compare") or {}).get("by_finding") or {})
        parts.append(("comparisons", "Comparisons", "", tables.comparisons_table(comparisons) + by_finding))
    if board := metrics.get("leaderboard"):
        parts.append(("leaderboard", "Leaderboard", "", groups.leaderboard_table(board)))
    if rows:
        parts += [
            ("overview", "Overview", words.OVERVIEW, figures.overview(rows, metrics, minimum)),
            ("findings", "All numbers", words.NUMBERS, tables.findings_table(rows)),
            ("precision", "Precision and recall", words.PRECISION, figures.precision_recall(rows, curves)),
            ("reliability", "Reliability", words.RELIABILITY, figures.reliability(rows, curves, curves_before)),
            ("thresholds", "Thresholds", words.THRESHOLDS, figures.thresholds(rows)),
        ]
    if attributes := metrics.get("subgroups"):
        parts.append(("subgroups", "Subgroups", groups.LEAD, groups.subgroups_table(attributes)))
    if located := metrics.get("localisation"):
        parts.append(("localisation", "Where it looked", places.LEAD, places.localisation_section(located)))
    if examples:
        shown = "".join(study(example, number) for number, example in enumerate(examples, 1))
        outlined = any(example.outlined for example in examples)
        mapped = any(part is not None for one in examples for finding in one.findings for part in finding.attention)
        lead, controls = words.examples_lead(mapped, outlined), words.examples_controls(outlined) if mapped else ""
        parts.append(("examples", "Example studies", lead, controls + shown))
    parts.append(("reading", "How to read this page", "", words.READING))
    parts.append(("provenance", "Provenance", "", _provenance(metrics, given)))

    return page(title, _masthead(title, metrics, given, examples), parts, notes)


def page(
    title: str, masthead: str, parts: Sequence[tuple[str, str, str, str]], notes: Sequence[str] = (), style: str = ""
) -> str:
    """A whole page from its sections: one file that asks nothing of any network.

    Args:
        title: of the window.
        masthead: HTML of the head.
        parts: sections as (id, heading, lead, content), all but the id in HTML.
        notes: sentences above the sections.
        style: CSS after `report.css`.
    """
    script, style = words.asset("report.js"), words.asset("report.css") + (f"\n{style}" if style else "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _, _ in parts)
    body = "".join(_section(*part) for part in parts)
    remarks = f'<ul class="remarks">{"".join(f"<li>{text(note)}</li>" for note in notes)}</ul>' if notes else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,"><style>{style}</style></head>\n'
        f"<body>{masthead}"
        f'<p class="notice" role="note"><span>{text(RESEARCH_NOTICE)}</span></p>'
        f'<nav aria-label="Sections"><div>{links}</div></nav>\n'
        f"<main>{remarks}{body}</main>"
        f"<footer><p>{text(RESEARCH_NOTICE)}</p></footer><script>{script}</script></body></html>\n"
    )


def _masthead(
    title: str, metrics: Mapping[str, Any], facts: Mapping[str, str], examples: Sequence[ReportExample]
) -> str:
    counts = {name: count(metrics[key]) for name, key in COUNTS.items() if key in metrics}
    known = {**counts, **facts}
    listed = [(name, known[name]) for name in HEADLINE_FACTS if name in known]
    scored = [f"per {metrics['unit']}" if metrics.get("unit") else "", str(metrics.get("stage") or "")]
    listed += [("Scored", ", ".join(part for part in scored if part))] if any(scored) else []
    details = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in listed)
    picture = poster(examples[0]) if examples else ""
    return (
        f'<header class="masthead"><div class="inner"><div class="words"><p class="maker">{words.BRAND}Hilum</p>'
        f"<h1>{text(title)}</h1><dl>{details}</dl></div>{picture}</div></header>"
    )


def _section(name: str, heading: str, lead: str, content: str) -> str:
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}" class="part"><h2>{heading}</h2>{opening}{content}</section>\n'


def _provenance(metrics: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    listed = [(name, value) for name, value in facts.items() if name not in HEADLINE_FACTS]
    shown = (
        "macro", "groups", "findings", "excluded", "unit", "stage", "subgroups", "leaderboard", "localisation",
        *COUNTS.values(),
    )  # fmt: skip
    recorded = {**metrics}
    if isinstance(compared := recorded.get("compare"), Mapping):
        recorded["compare"] = {key: compared[key] for key in ("file", "model", "stage") if key in compared}
    listed += [(name.replace("_", " "), _words(value)) for name, value in recorded.items() if name not in shown]
    return listing(listed)


def listing(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values as recorded; values of several lines keep them."""
    if not facts:
        return '<p class="note">Nothing was recorded.</p>'
    lines = "".join(
        f"<dt>{text(name)}</dt><dd><{tag}>{text(value)}</{tag}></dd>"
        for name, value in facts
        for tag in ("pre" if "\n" in value else "code",)
    )
    return f'<dl class="provenance">{lines}</dl>'


def _words(value: object) -> str:
    if value is None:
        return "not recorded"
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, Mapping) else str(value)
