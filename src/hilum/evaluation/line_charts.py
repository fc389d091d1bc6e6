"""Line charts as inline SVG, for whatever a run logs at its steps: losses, schedules, searches.

The lines are drawn in a frame that is stretched to its column; all numbers are HTML beside it, and stay readable on a
phone. Colours and dashes are classes of `report.css`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hilum.evaluation.charts import nice_ticks
from hilum.evaluation.markup import coordinate, decimal, text
from hilum.evaluation.tracks import Position


@dataclass(frozen=True)
class Series:
    """One line of a line chart."""

    name: str
    x: Float[np.ndarray, " P"]
    y: Float[np.ndarray, " P"]
    """NaN breaks the line."""


@dataclass(frozen=True)
class Level:
    """A dotted line across a line chart: a value that a series is to be compared with."""

    name: str
    """For the legend; "" leaves it out there."""
    y: float
    series: int
    """Position of the series whose colour it takes."""


FEW_POINTS = 24
"""Series with as many points or fewer show each of them."""


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, label: str, height: int = 260, most_points: int = 600,
    levels: Sequence[Level] = (), logarithmic: bool = False,
) -> str:  # fmt: skip
    """Several lines over one axis, as wide as its column; for losses, schedules and learning-rate searches.

    The lines are stretched, the numbers are not: they stay readable on a phone. Lines differ by colour and by dash.

    Args:
        series: with finite x; empty ones are named in the legend and not drawn.
        height: of the frame, in CSS pixels.
        most_points: longer lines are thinned to the lowest and highest value of equal stretches, so spikes survive.
        x_label: name of the horizontal axis, with its unit.
        y_label: name of the vertical axis, with its unit.
        label: for screen readers.
        levels: values to compare with; the axis holds them too.
        logarithmic: powers of ten go up evenly; values of 0 and below break the line.
    """
    scaled = [_logarithm(line.y) if logarithmic else line.y for line in series]
    marks = [math.log10(level.y) if logarithmic else level.y for level in levels]
    drawn = [(index, line, y, np.isfinite(y)) for index, (line, y) in enumerate(zip(series, scaled, strict=True))]
    x_ends = _ends([line.x[good] for _, line, _, good in drawn])
    y_ends = _ends([*[y[good] for _, _, y, good in drawn], np.array(marks, np.float64)], margin=0.04)
    across, up = Position(*x_ends), Position(*y_ends)
    ticks_x, ticks_y = nice_ticks(*x_ends, about=6), _ticks_up(y_ends, logarithmic)
    parts = [f'<path class="grid" d="M0 {coordinate(100 - up(tick))}H100"/>' for tick in ticks_y]
    parts += [
        f'<path class="level series-{level.series % 6 + 1}" d="M0 {coordinate(100 - up(mark), 2)}H100"/>'
        for level, mark in zip(levels, marks, strict=True)
    ]
    for index, line, values, good in drawn:
        x, y = thin(line.x, values, most_points)
        commands = []
        broken = True
        for px, py in zip(x, y, strict=True):
            if math.isfinite(py):
                commands.append(f"{'M' if broken else 'L'}{coordinate(across(px), 2)} {coordinate(100 - up(py), 2)}")
            broken = not math.isfinite(py)
        if commands:
            parts.append(f'<path class="series series-{index % 6 + 1}" d="{"".join(commands)}"/>')
        if 0 < good.sum() <= FEW_POINTS:
            dots = "".join(f"M{command[1:]}h0" for command in commands)
            parts.append(f'<path class="points series-{index % 6 + 1}" d="{dots}"/>')
    digits_x, digits_y = _digits(ticks_x), _digits(ticks_y)
    numbers = [f'<i class="x" style="left:{across(tick)}%">{decimal(tick, digits_x)}</i>' for tick in ticks_x]
    numbers += [
        f'<i class="y" style="top:{coordinate(100 - up(tick))}%">'
        f"{f'{10**tick:.3g}' if logarithmic else decimal(tick, digits_y)}</i>"
        for tick in ticks_y
    ]
    keys = [(f"series series-{index % 6 + 1}", line.name) for index, line, _, _ in drawn]
    keys += [(f"level series-{level.series % 6 + 1}", level.name) for level in levels if level.name]
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{kind}" d="M0 4H24"/></svg>'
        f"{text(name)}</li>"
        for kind, name in keys
    )
    return (
        f'<div class="line-chart"><ul class="legend">{legend}</ul><p class="axis-name">{text(y_label)}</p>'
        f'<div class="line-frame" style="height:{height}px"><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{text(label)}">{"".join(parts)}</svg><div aria-hidden="true">{"".join(numbers)}</div>'
        f'</div><p class="axis-name right">{text(x_label)}</p></div>'
    )


def _logarithm(values: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """To base 10; NaN where there is none."""
    positive = np.where(values > 0, values, np.nan)
    return np.log10(positive)


def _ticks_up(ends: tuple[float, float], logarithmic: bool) -> list[float]:
    """Round values; with `logarithmic` powers of ten, and 2 and 5 times these where there are few."""
    if not logarithmic:
        return nice_ticks(*ends)
    powers = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [power + math.log10(factor) for power in powers for factor in factors]
        inside = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
        if len(inside) >= 3:
            return inside[:: max(len(inside) // 5, 1)]
    return inside or [ends[0]]


def thin(
    x: Float[np.ndarray, " P"], y: Float[np.ndarray, " P"], most: int
) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """At most about `most` points: the lowest and the highest of each of `most` / 2 equal stretches, in order."""
    if len(x) <= most:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), max(most // 2, 1)):
        values = y[stretch]
        if np.isnan(values).all():
            kept.add(int(stretch[0]))
            continue
        kept.update((int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])))
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def _ends(values: Sequence[Float[np.ndarray, " _"]], margin: float = 0.0) -> tuple[float, float]:
    together = np.concatenate(values) if values else np.empty(0)
    if not together.size:
        return 0.0, 1.0
    low, high = float(together.min()), float(together.max())
    if low == high:
        around = abs(low) / 2 or 0.5
        return low - around, high + around
    return low - margin * (high - low), high + margin * (high - low)


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return max(0, min(6, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 0
