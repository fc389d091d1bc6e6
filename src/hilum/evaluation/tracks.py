"""Tracks: charts one row high and as wide as their table cell, as inline SVG.

A forest plot is an ordinary table whose cells hold tracks (positions in percent), so that its text stays text and it
reads on a phone. Colours come from the classes `tone-*` of `report.css`. Each track says its numbers in `aria-label`.
Plots with a frame are in `charts.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hilum.evaluation.markup import attributes, decimal

MARKS: dict[str, str] = {
    "circle": "M4.5 0A4.5 4.5 0 1 1-4.5 0A4.5 4.5 0 1 1 4.5 0Z",
    "square": "M-4-4H4V4H-4Z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
}
"""Shapes beside colours, so that groups differ without colour too; centred on 0, 0, in pixels."""


@dataclass(frozen=True)
class Position:
    """A value's place on a track, 0 to 100, held at the edges."""

    lower: float
    upper: float
    root: bool = False
    """Square-root scale from a lower end of 0, for values that bunch up near it."""

    def __call__(self, value: float) -> float:
        """Percent of the track's width, to two decimals."""
        part = (value - self.lower) / ((self.upper - self.lower) or 1.0)
        place = 100.0 * (max(part, 0.0) ** 0.5 if self.root else part)
        return round(min(max(place, 0.0), 100.0), 2)


def interval_track(
    value: float | None,
    ends: tuple[float, float] | None,
    *,
    scale: Position,
    label: str,
    ticks: Sequence[float] = (),
    reference: float | None = None,
    mark: str = "circle",
    hollow: bool = False,
    beside: float | None = None,
) -> str:
    """A value with its interval on one line: a row of a forest plot.

    Args:
        value: None draws the grid alone.
        ends: low and high of the interval; None draws the mark alone.
        scale: the range of the track; what lies outside is drawn at the edge.
        ticks: values with a grid line.
        reference: a value with a short tick (prevalence, chance).
        mark: a name of `MARKS`.
        label: for screen readers.
        hollow: an outline only, for a difference that is not shown.
        beside: somebody else's value, as a diamond of its own colour.
    """
    parts = [_grid(scale(tick)) for tick in ticks]
    if reference is not None:
        parts.append(_tick(scale(reference), "reference"))
    if beside is not None:
        parts.append(
            f'<svg x="{scale(beside)}%" y="50%" overflow="visible"><path class="beside" d="{MARKS["diamond"]}"/></svg>'
        )
    if value is not None and ends is not None:
        parts.append(_span(scale(ends[0]), scale(ends[1]), "interval"))
    if value is not None:
        parts.append(_mark(scale(value), mark, hollow=hollow))
    return _track(parts, label)


def pair_track(
    before: float | None,
    after: float | None,
    *,
    scale: Position,
    label: str,
    ticks: Sequence[float] = (),
    mark: str = "circle",
    reference: float | None = None,
) -> str:
    """Two values joined by a line: hollow before, filled after; a short tick where they should be."""
    parts = [_grid(scale(tick)) for tick in ticks]
    if reference is not None:
        parts.append(_tick(scale(reference), "reference"))
    if before is not None and after is not None:
        parts.append(_span(scale(before), scale(after), "interval thin"))
    if before is not None:
        parts.append(_mark(scale(before), mark, hollow=True))
    if after is not None:
        parts.append(_mark(scale(after), mark))
    return _track(parts, label)


def bar_track(value: float | None, *, label: str, threshold: float | None = None, ticks: Sequence[float] = ()) -> str:
    """A probability as a bar from 0 to 1, with the threshold as a tick across it."""
    scale = Position(0.0, 1.0)
    parts = ['<rect class="groove" x="0" y="50%" width="100%" height="8" rx="1" transform="translate(0 -4)"/>']
    if value is not None:
        parts.append(
            f'<rect class="bar" x="0" y="50%" width="{scale(value)}%" height="8" rx="1" transform="translate(0 -4)"/>'
        )
    parts += [_grid(scale(tick)) for tick in ticks]
    if threshold is not None:
        parts.append(_tick(scale(threshold), "threshold"))
    return _track(parts, label)


def axis(ticks: Sequence[float], scale: Position, digits: int | None = 1, *, plus: bool = False) -> str:
    """The numbers of a track's range, placed above a column of tracks; digits None prints them as short as they are."""
    labels = (
        f'<i style="left:{scale(tick)}%">{"+" if plus and tick > 0 else ""}'
        f"{decimal(tick, digits) if digits is not None else f'{tick:g}'}</i>"
        for tick in ticks
    )
    return f'<span class="axis" aria-hidden="true">{"".join(labels)}</span>'


def _grid(place: float) -> str:
    return f'<line class="grid" x1="{place}%" x2="{place}%" y1="0" y2="100%"/>'


def _tick(place: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{place}%" x2="{place}%" y1="18%" y2="82%"/>'


def _span(start: float, end: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{start}%" x2="{end}%" y1="50%" y2="50%"/>'


def _mark(place: float, shape: str, *, hollow: bool = False) -> str:
    kind = "mark hollow" if hollow else "mark"
    return f'<svg x="{place}%" y="50%" overflow="visible"><path class="{kind}" d="{MARKS[shape]}"/></svg>'


def _track(parts: Sequence[str], label: str) -> str:
    return f'<svg class="track"{attributes({"role": "img", "aria-label": label})}>{"".join(parts)}</svg>'
