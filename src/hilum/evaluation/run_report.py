"""The page of a pretraining run: facts, alarms, curves, patch colours and nearest neighbours, in one file.

Takes numbers and pictures that are already there and computes nothing; `commands/pretrain_report.py` gathers them. The
page is built like that of an evaluation (`report.py`): self-contained, light, dark or printed, readable without a
pointer or a script. Equal inputs give equal bytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hilum.evaluation import report_assets as words
from hilum.evaluation.films import embed
from hilum.evaluation.line_charts import Level, Series, line_chart
from hilum.evaluation.markup import count, decimal, finite, text
from hilum.evaluation.report import listing, page
from hilum.evaluation.run_panels import PANELS, Panel

FILM_SIDE = 224
"""Side of an embedded film, pixels."""


@dataclass(frozen=True)
class RunAlarm:
    """Something that went wrong, and when."""

    name: str
    what: str
    evidence: str
    advice: str
    """What to try; settings in backquotes."""
    first: int
    """Step of the line where it began."""
    last: int
    """Step of the last line that had it."""
    standing: bool
    """Whether the newest line has it."""


@dataclass(frozen=True)
class PatchMap:
    """An X-ray and its patch tokens, as colours."""

    title: str
    """Dataset, view, labels; no identifier."""
    film: UInt8[np.ndarray, "S S"]
    colours: UInt8[np.ndarray, "h w 3"]
    """Red, green, blue: the first three components of the patch tokens."""


@dataclass(frozen=True)
class Neighbour:
    """An X-ray that was asked about, or found."""

    film: UInt8[np.ndarray, "S S"]
    origin: str
    """Dataset and view; no identifier."""
    findings: tuple[str, ...]
    """Labels that are 1."""
    similarity: float | None = None
    """Cosine to the X-ray that was asked about; None for that one."""


@dataclass(frozen=True)
class RunPage:
    """Everything on the page."""

    title: str
    facts: Mapping[str, str]
    """Of the head, in this order."""
    figures: Sequence[tuple[str, str, str]]
    """Large numbers as (name, number, note)."""
    history: Sequence[Mapping[str, Any]]
    """Lines of `metrics.jsonl`, oldest first."""
    alarms: Sequence[RunAlarm] = ()
    initial: Mapping[str, float] = field(default_factory=dict)
    """Values of losses while the predictions are uniform, by column."""
    clip: float = 0.0
    """Largest gradient norm that is let through; 0: none."""
    maps: Sequence[PatchMap] = ()
    maps_note: str = ""
    neighbours: Sequence[tuple[Neighbour, Sequence[Neighbour]]] = ()
    neighbours_note: str = ""
    notes: Sequence[str] = ()
    """Sentences to read first."""
    provenance: Mapping[str, str] = field(default_factory=dict)


def render_run(page_of: RunPage) -> str:
    """The page as text."""
    steps = [line for line in page_of.history if finite(line.get("step")) is not None]
    parts = [("now", "Now", "", _figures(page_of.figures)), ("alarms", "Alarms", "", _alarms(page_of.alarms))]
    drawn = "".join(filter(None, (_curve(panel, steps, page_of) for panel in PANELS)))
    curves = f'<div class="curves">{drawn}</div>' if drawn else '<p class="note">No step has been logged yet.</p>'
    parts.append(("curves", "Curves", "Everything that was logged, over steps.", curves))
    if page_of.maps:
        parts.append(("patches", "What patches look alike to the teacher", page_of.maps_note, _maps(page_of.maps)))
    if page_of.neighbours:
        lead, rows = page_of.neighbours_note, _neighbours(page_of.neighbours)
        parts.append(("neighbours", "Nearest neighbours", lead, rows))
    parts.append(("provenance", "Provenance", "", listing(tuple(page_of.provenance.items()))))
    style = words.asset("run_report.css")
    return page(page_of.title, _masthead(page_of), parts, page_of.notes, style)


def _masthead(page_of: RunPage) -> str:
    details = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in page_of.facts.items()
    )
    poster = ""
    if page_of.maps:
        first = page_of.maps[0]
        poster = (
            f'<figure class="poster"><div>{_film(first.film, f"X-ray: {first.title}")}'
            f"{_colours(first, f'patch colours of the X-ray: {first.title}')}</div>"
            "<figcaption>Patch tokens of the teacher, as colours</figcaption></figure>"
        )
    return (
        f'<header class="masthead"><div class="inner"><div class="words"><p class="maker">{words.BRAND}Hilum</p>'
        f"<h1>{text(page_of.title)}</h1><dl>{details}</dl></div>{poster}</div></header>"
    )


def _figures(figures: Sequence[tuple[str, str, str]]) -> str:
    shown = "".join(
        f'<div class="figure"><dt>{text(name)}</dt><dd><strong>{text(number)}</strong>'
        f"<small>{text(note)}</small></dd></div>"
        for name, number, note in figures
    )
    return f'<dl class="figures">{shown}</dl>'


def _alarms(alarms: Sequence[RunAlarm]) -> str:
    if not alarms:
        return '<p class="quiet">None.</p>'
    rows = []
    for alarm in alarms:
        over = f"step {count(alarm.first)}" + (f" to {count(alarm.last)}" if alarm.last != alarm.first else "")
        state = "standing" if alarm.standing else "cleared"
        rows.append(
            f'<li class="{state}"><b>{text(alarm.what)}</b> <small>{text(over)}, {state}</small>'
            f"<p>{text(alarm.evidence[:1].upper() + alarm.evidence[1:])}.</p>"
            f"<p>Try: {_settings(alarm.advice)}.</p></li>"
        )
    return f'<ul class="alarms">{"".join(rows)}</ul>'


def _settings(advice: str) -> str:
    """Text with its settings as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(advice))


def _curve(panel: Panel, history: Sequence[Mapping[str, Any]], page_of: RunPage) -> str:
    logged = [(column, Series(name, *_column(history, column))) for column, name in panel.columns]
    drawn = [(column, line) for column, line in logged if len(line.x)]
    if not drawn:
        return ""
    levels = [
        Level("", value, place)
        for place, (column, _) in enumerate(drawn)
        if (value := _reference(panel.reference, column, history, page_of)) is not None
    ]
    if panel.reference == "clip" and page_of.clip > 0:
        levels = [Level(f"clipped above {page_of.clip:g}", page_of.clip, 3)]
    said = "; ".join(
        f"{line.name} from {line.y[0]:.3g} at step {line.x[0]:.0f} to {line.y[-1]:.3g} at step {line.x[-1]:.0f}"
        for _, line in drawn
    )
    chart = line_chart(
        [line for _, line in drawn], x_label="step", y_label=panel.unit, label=f"{panel.title}: {said}", height=190,
        levels=levels, logarithmic=panel.logarithmic,
    )  # fmt: skip
    return (
        f'<figure class="curve-panel"><h3>{text(panel.title)}</h3><figcaption>{text(panel.caption)}</figcaption>'
        f"{chart}</figure>"
    )


def _reference(kind: str, column: str, history: Sequence[Mapping[str, Any]], page_of: RunPage) -> float | None:
    if kind == "initial":
        return page_of.initial.get(column)
    if kind == "start":
        return next((value for line in history if (value := finite(line.get(column))) is not None), None)
    return None


def _column(
    history: Sequence[Mapping[str, Any]], column: str
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Steps and values of the lines that have the column."""
    pairs = [(float(line["step"]), value) for line in history if (value := finite(line.get(column))) is not None]
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _maps(maps: Sequence[PatchMap]) -> str:
    shown = "".join(
        f'<figure class="patch-map"><div>{_film(one.film, f"X-ray: {one.title}")}'
        f"{_colours(one, f'patch colours of the X-ray: {one.title}')}</div><figcaption>{text(one.title)}</figcaption>"
        "</figure>"
        for one in maps
    )
    return f'<div class="patch-maps">{shown}</div>'


def _neighbours(rows: Sequence[tuple[Neighbour, Sequence[Neighbour]]]) -> str:
    shown = []
    for asked, found in rows:
        cells = [_neighbour(asked, asked.findings)] + [_neighbour(one, asked.findings) for one in found]
        shown.append(f'<div class="neighbour-row">{"".join(cells)}</div>')
    return f'<div class="neighbours">{"".join(shown)}</div>'


def _neighbour(one: Neighbour, wanted: Sequence[str]) -> str:
    asked = one.similarity is None
    names = ", ".join(
        f'<span class="shared">{text(name)}</span>' if name in wanted and not asked else text(name)
        for name in one.findings
    )
    head = "asked" if asked else f"cosine {decimal(one.similarity, 2)}"
    label = f"X-ray, {head}: {one.origin}; {', '.join(one.findings) or 'no finding labelled'}"
    return (
        f"<figure>{_film(one.film, label)}<figcaption><b>{text(head)}</b>{text(one.origin)}<br>"
        f"{names or 'no finding labelled'}</figcaption></figure>"
    )


def _film(pixels: UInt8[np.ndarray, "S S"], label: str) -> str:
    side = min(FILM_SIDE, len(pixels))
    small = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
    return f'<img alt="{text(label)}" src="{embed(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 86])}">'


def _colours(one: PatchMap, label: str) -> str:
    """The colours, smooth between patches."""
    large = cv2.resize(
        np.ascontiguousarray(one.colours[..., ::-1]), (FILM_SIDE, FILM_SIDE), interpolation=cv2.INTER_CUBIC
    )
    return f'<img alt="{text(label)}" src="{embed(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 88])}">'
