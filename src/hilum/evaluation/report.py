"""The report: metrics, curves and example studies as one self-contained HTML file.

Last stop of the flow; reads what `metrics.py`, `curves.py` and the predictor have computed and computes nothing. The
file holds its style, its charts (SVG) and its pictures, asks nothing of any network (a content policy in the page
forbids it), follows the reader's light or dark scheme, prints, and reads without JavaScript; the little there is sorts
the table and dims the overlays. Equal inputs give equal bytes: the time of writing is a fact that the caller passes.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.evaluation import report_sections as sections
from hilum.evaluation.curves import Curves, FindingCurve, curves
from hilum.evaluation.films import ExampleFinding, ReportExample, poster, study
from hilum.evaluation.markup import text

__all__ = ["Curves", "ExampleFinding", "FindingCurve", "ReportExample", "curves", "render_report", "write_report"]

HEADLINE_FACTS: tuple[str, ...] = ("Model", "Data", "Split", "Date", "Patients", "Studies", "Images")
"""Facts of the head of the page, in this order; all others are listed under provenance."""

BRAND = (
    '<svg class="brand" viewBox="0 0 32 32" aria-hidden="true"><path d="M16 3V29M16 13C11 13 8 10 6 5M16 13C21 13 24 10 26 5'
    'M16 18C10 18 7 20 4 24M16 18C22 18 25 20 28 24M10.5 11.6C8 13 6 13.5 3 13.5M21.5 11.6C24 13 26 13.5 29 13.5"/></svg>'
)


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
    minimum_positives: int = 10,
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
    minimum_positives: int = 10,
) -> str:
    """The page as text.

    Args:
        title: heading of the page.
        metrics: the content of `metrics.json`; None, NaN or a missing key shows as an en dash with its reason.
        curves: of the findings in `metrics`; a finding without curves is listed as not drawn.
        steps: rows `{"name", "mAP", "mAUC", "mF1@0.5", "mF1@tuned", "mECE_standard", "difference": {"metric", "value",
            "low", "high", "shown"} or None}`: each step beside the one before.
        examples: studies; without patient identifiers.
        comparisons: rows `{"name", "metric", "first", "second", "value", "low", "high", "shown", "note"}`: the
            difference of two models; `first`, `second` and `note` may be left out.
        facts: name -> value. The names of `HEADLINE_FACTS` go to the head of the page, the rest to provenance.
        notes: sentences to read before the numbers.
        curves_before: the same items before calibration, drawn hollow behind the reliability curves.
        minimum_positives: findings with fewer are drawn faint and listed.
    """
    given = dict(facts or {})
    rows = sections.finding_rows(metrics)
    parts = [("result", "Result", "", sections.macro(metrics))]
    if steps:
        parts.append(("steps", "Step by step", "What each step of the pipeline adds.", sections.steps_table(steps)))
    if comparisons:
        parts.append(("comparisons", "Comparisons", "", sections.comparisons_table(comparisons)))
    if rows:
        parts += [
            ("overview", "Overview", _OVERVIEW, sections.overview(rows, metrics, minimum_positives)),
            ("findings", "All numbers", _NUMBERS, sections.findings_table(rows)),
            ("precision", "Precision and recall", _PRECISION, sections.precision_recall(rows, curves)),
            ("reliability", "Reliability", _RELIABILITY, sections.reliability(rows, curves, curves_before)),
            ("thresholds", "Thresholds", _THRESHOLDS, sections.thresholds(rows)),
        ]
    if examples:
        shown = "".join(study(example, number) for number, example in enumerate(examples, 1))
        parts.append(("examples", "Example studies", _EXAMPLES, _CONTROLS + shown))
    parts.append(("reading", "How to read this page", "", _READING))
    parts.append(("provenance", "Provenance", "", _provenance(metrics, given)))

    script, style = _asset("report.js"), _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _, _ in parts)
    body = "".join(_section(*part) for part in parts)
    remarks = f'<ul class="remarks">{"".join(f"<li>{text(note)}</li>" for note in notes)}</ul>' if notes else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,"><style>{style}</style></head>\n'
        f"<body>{_masthead(title, metrics, given, examples)}"
        f'<p class="notice" role="note"><span>{text(RESEARCH_NOTICE)}</span></p>'
        f'<nav aria-label="Sections"><div>{links}</div></nav>\n'
        f"<main>{remarks}{body}</main>"
        f"<footer><p>{text(RESEARCH_NOTICE)}</p></footer><script>{script}</script></body></html>\n"
    )


def _masthead(
    title: str, metrics: Mapping[str, Any], facts: Mapping[str, str], examples: Sequence[ReportExample]
) -> str:
    listed = [(name, facts[name]) for name in HEADLINE_FACTS if name in facts]
    listed += [(name.capitalize(), str(metrics[name])) for name in ("unit", "stage") if metrics.get(name)]
    details = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in listed)
    picture = poster(examples[0]) if examples else ""
    return (
        f'<header class="masthead"><div class="inner"><div class="words"><p class="maker">{BRAND}Hilum</p>'
        f"<h1>{text(title)}</h1><dl>{details}</dl></div>{picture}</div></header>"
    )


def _section(name: str, heading: str, lead: str, content: str) -> str:
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}" class="part"><h2>{heading}</h2>{opening}{content}</section>\n'


def _provenance(metrics: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    listed = [(name, value) for name, value in facts.items() if name not in HEADLINE_FACTS]
    listed += [
        (name, str(value)) for name, value in metrics.items()
        if name not in ("macro", "groups", "findings", "unit", "stage") and isinstance(value, str | int | float)
    ]  # fmt: skip
    if not listed:
        return '<p class="note">Nothing was recorded.</p>'
    lines = "".join(
        f"<dt>{text(name)}</dt><dd>{f'<pre>{text(value)}</pre>' if chr(10) in str(value) else f'<code>{text(value)}</code>'}</dd>"
        for name, value in listed
    )
    return f'<dl class="provenance">{lines}</dl>'


def _asset(name: str) -> str:
    return resources.files("hilum.evaluation").joinpath(name).read_text(encoding="utf-8").strip()


_OVERVIEW = (
    "Each finding on one line: average precision on the left, area under the ROC curve on the right, with 95 % intervals. "
    "Findings run from the most to the least common inside each group."
)
_NUMBERS = (
    "The same, in figures, with 95 % intervals. Click a heading to sort. A dash is a value that is not defined, with the "
    "reason beside the name."
)
_PRECISION = (
    "From left to right, more of the sick are found; the height is how many of those flagged are truly positive. The dashed "
    "line is the prevalence, where guessing would lie. The tinted area is AP."
)
_RELIABILITY = "Whether a probability can be taken at its word."
_THRESHOLDS = (
    "A threshold turns a probability into a yes or a no. Each finding has its own, chosen on validation patients, so that "
    "F1 is highest there; none was chosen on the patients of this page. A well-calibrated rare finding seldom reaches 0.5, so its "
    "best threshold lies far below: that is expected, and it is why F1 at 0.5 says little about the tail."
)
_EXAMPLES = (
    "Each study first as it came, with the model's probabilities; then, finding by finding, where the model read (colour) "
    "beside what is truly there (outline). Colour has one scale for all views of a finding: the bright view carried it."
)
_CONTROLS = (
    '<div class="controls" hidden><label>Overlay <input type="range" id="heat" min="0" max="100" value="85"></label>'
    '<label><input type="checkbox" id="outline"> outline on the attention too</label></div>'
    '<p class="heat-key"><span>median or below</span><i aria-hidden="true"></i><span>highest in the study</span></p>'
)
_READING = """<div class="reading">
<div><h3>AP</h3><p>Average precision: the mean of precision over recall. It rewards putting the true cases first and is hard
to earn when they are rare; guessing earns the prevalence. mAP is its plain mean over findings.</p></div>
<div><h3>AUC</h3><p>The chance that a positive is scored above a negative. Guessing earns 0.5. It hardly feels prevalence, so
a rare finding can have a high AUC and still a low AP.</p></div>
<div><h3>F1</h3><p>Balance of precision and recall at one threshold: at 0.5 for all findings, or at each finding's own from
validation (tuned).</p></div>
<div><h3>ECE</h3><p>Expected calibration error: how far, on average, predicted probability and observed share lie apart, over
15 equal bins. Lower is better. The challenge's own mECE is inferred from its leaderboard; it rewards other things and is
given for comparison only.</p></div>
<div><h3>Intervals</h3><p>95 %, from resampling whole patients. Two findings or models whose intervals overlap may still differ;
paired differences are the fair comparison. &ldquo;Not shown&rdquo; means that the data at hand cannot tell.</p></div>
<div><h3>Head, medium, tail</h3><p>By share of training images: over 10 %, 1 to 10 %, under 1 %. An undefined value is left
out of every mean.</p></div>
<div><h3>Attention</h3><p>Which patches the classifier read for a finding. It is not a segmentation, and not an
explanation of why: a right answer can be read from the wrong place, and the outline beside it is there to show that.</p></div>
<div><h3>Present, absent, flagged, missed</h3><p>Flagged: probability above the threshold. Present and absent are the
reference labels, which may themselves be wrong where they come from reports.</p></div>
</div>"""
