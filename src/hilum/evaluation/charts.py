"""Charts as inline SVG: pure functions from numbers to a string, without a plotting library.

Colours are the variables of `report.css`, through the classes `tone-head`, `tone-medium`, `tone-tail`, `tone-plain` and
`series-1` to `series-6`, so that light, dark and print need no second drawing. Each chart says its numbers in
`aria-label`; names and captions are the caller's. Charts inside a table row are in `tracks.py`, lines over steps in
`line_charts.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hilum.core.intervals import wilson_interval
from hilum.evaluation.curves import FindingCurve
from hilum.evaluation.markup import attributes
from hilum.evaluation.markup import coordinate as _n


def nice_ticks(lower: float, upper: float, about: int = 4) -> list[float]:
    """Round values inside [lower, upper] at a step of 1, 2 or 5 times a power of ten; about `about` of them."""
    extent = upper - lower
    if not math.isfinite(extent) or extent <= 0:
        return [lower]
    rough = extent / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda candidate: abs(candidate - rough))
    first, last = math.ceil(lower / step - 1e-9), math.floor(upper / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def precision_recall_plot(curve: FindingCurve, *, label: str) -> str:
    """Precision over recall as steps (the area under them is AP), with the prevalence as a dashed line."""
    frame = _Frame(left=28, top=20, width=166, height=112)
    parts = [*frame.box(), *frame.numbers((0, 0.5, 1), (0, 0.5, 1)), *frame.names("recall", "precision")]
    if curve.prevalence is not None:
        y = frame.y(curve.prevalence)
        parts.append(f'<line class="chance" x1="{frame.left}" x2="{frame.right}" y1="{_n(y)}" y2="{_n(y)}"/>')
    points = _steps(curve, frame)
    if points:
        path = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        base = _n(frame.y(0))
        parts.append(f'<path class="area" d="M{frame.left} {base}L{path}L{_n(points[-1][0])} {base}Z"/>')
        parts.append(f'<path class="curve" d="M{path}"/>')
    return _plot(parts, 200, 158, label)


def reliability_plot(
    curve: FindingCurve, *, label: str, before: FindingCurve | None = None, linked: bool = False
) -> str:
    """Observed share over predicted probability, one dot per bin with its 95 % Wilson interval, counts below.

    The axes end at the smallest of 0.1, 0.25, 0.5 and 1 that holds every dot, so that a rare finding is not one dot in
    a corner. The area of a dot and the height of a bar (square-root scale) follow the count of the bin.

    Args:
        before: the same items before calibration, drawn hollow behind.
        linked: join the dots by a line; for many items, where the line is not noise.
        label: for screen readers.
        curve: the bins to draw.
    """
    shown = [part for part in (curve, before) if part is not None]
    largest = max((float(np.nanmax(values)) for part in shown for values in (part.predicted, part.observed)
                   if (part.counts > 0).any()), default=1.0)  # fmt: skip
    limit = next((end for end in (0.1, 0.25, 0.5) if largest <= end), 1.0)
    frame = _Frame(left=34, top=20, width=160, height=140, limit=limit)
    half = limit / 2
    parts = [*frame.box(), *frame.numbers((0, half, limit), (0, half, limit), below=34)]
    parts += frame.names("predicted", "observed", below=34)
    parts.append(f'<path class="chance" d="M{frame.left} {frame.bottom}L{frame.right} {frame.top}"/>')
    parts += _count_bars(curve, frame)
    if before is not None:
        parts += _dots(before, frame, hollow=True, linked=linked)
    parts += _dots(curve, frame, hollow=False, linked=linked)
    return _plot(parts, 200, 220, label)


@dataclass(frozen=True)
class _Frame:
    """The axes of a plot, from 0 to `limit` both ways."""

    left: int
    top: int
    width: int
    height: int
    limit: float = 1.0

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height

    def x(self, value: float) -> float:
        return self.left + self.width * value / self.limit

    def y(self, value: float) -> float:
        return self.bottom - self.height * min(value / self.limit, 1.0)

    def box(self) -> list[str]:
        middle = _n(self.y(self.limit / 2))
        return [
            f'<path class="frame" d="M{self.left} {self.top}V{self.bottom}H{self.right}"/>',
            f'<path class="grid" d="M{self.left} {self.top}H{self.right}M{self.left} {middle}H{self.right}"/>',
        ]

    def numbers(self, across: Sequence[float], up: Sequence[float], below: int = 0) -> list[str]:
        y = self.bottom + below + 13
        anchors = ["start", *["middle"] * (len(across) - 2), "end"]
        return [
            f'<text x="{_n(self.x(value))}" y="{y}" text-anchor="{anchor}">{value:g}</text>'
            for value, anchor in zip(across, anchors, strict=True)
        ] + [
            f'<text x="{self.left - 5}" y="{_n(self.y(value) + 3.5)}" text-anchor="end">{value:g}</text>'
            for value in up
        ]

    def names(self, across: str, up: str, below: int = 0) -> list[str]:
        return [
            f'<text class="name" x="{self.right}" y="{self.bottom + below + 24}" text-anchor="end">{across}</text>',
            f'<text class="name" x="{self.left}" y="{self.top - 7}">{up}</text>',
        ]


def _steps(curve: FindingCurve, frame: _Frame) -> list[tuple[float, float]]:
    """Corners of the precision steps in the frame, at a tenth of a pixel, without repeats."""
    points: list[tuple[float, float]] = []
    x = frame.x(0)
    for recall, precision in zip(curve.recall.tolist(), curve.precision.tolist(), strict=True):
        y = round(frame.y(precision), 1)
        following = round(frame.x(recall), 1)
        if following > x:  # a threshold that adds no true positive has no width
            points += [(x, y), (following, y)]
            x = following
    return points


def _dots(curve: FindingCurve, frame: _Frame, *, hollow: bool, linked: bool) -> list[str]:
    filled = np.flatnonzero(curve.counts > 0)
    largest = max(float(curve.counts.max()), 1.0)
    centres = [(frame.x(curve.predicted[k]), frame.y(curve.observed[k])) for k in filled]
    path = "L".join(f"{_n(x)} {_n(y)}" for x, y in centres)
    parts = [f'<path class="link{" before" if hollow else ""}" d="M{path}"/>'] if linked else []
    for k, (x, y) in zip(filled, centres, strict=True):
        n = int(curve.counts[k])
        radius = _n(1.8 + 3.4 * math.sqrt(n / largest))
        if hollow:
            parts.append(f'<circle class="dot before" cx="{_n(x)}" cy="{_n(y)}" r="{radius}"/>')
            continue
        low, high = wilson_interval(float(curve.observed[k]) * n, n)
        numbers = f"predicted {curve.predicted[k]:.3f}, observed {curve.observed[k]:.3f}, n = {n}"
        parts.append(
            f'<line class="whisker" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(frame.y(low))}" y2="{_n(frame.y(high))}"/>'
            f'<circle class="dot" cx="{_n(x)}" cy="{_n(y)}" r="{radius}"><title>{numbers}</title></circle>'
        )
    return parts


def _count_bars(curve: FindingCurve, frame: _Frame) -> list[str]:
    """Bars under the frame, one per bin that lies in its range; square-root scale, for bins differ a hundredfold."""
    top, height = frame.bottom + 6, 26
    width = frame.width / len(curve.counts) / frame.limit
    largest = max(float(curve.counts.max()), 1.0)
    parts = [f'<path class="frame" d="M{frame.left} {top + height}H{frame.right}"/>']
    for k, n in enumerate(curve.counts.tolist()):
        left = frame.left + k * width
        if not n or left >= frame.right:
            continue
        tall = max(height * math.sqrt(n / largest), 1.0)
        wide = min(width - 1, frame.right - left)
        parts.append(
            f'<rect class="count" x="{_n(left + 0.5)}" y="{_n(top + height - tall)}" '
            f'width="{_n(wide)}" height="{_n(tall)}">'
            f"<title>n = {n}</title></rect>"
        )
    parts.append(f'<text x="{frame.left - 5}" y="{top + height}" text-anchor="end">n</text>')
    return parts


def _plot(parts: Sequence[str], width: int, height: int, label: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}"{attributes({"role": "img", "aria-label": label})}>'
        f"{''.join(parts)}</svg>"
    )
