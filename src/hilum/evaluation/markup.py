"""Small pieces of HTML text: escaping, numbers, shares, the dash that stands for an undefined value.

Everything that a report prints goes through here, so that a finding named `<script>` stays text. Charts are in
`charts.py`, pages in `report.py`.
"""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

DASH = "–"  # noqa: RUF001 - the typographic sign is meant
MINUS = "\N{MINUS SIGN}"


def text(value: object) -> str:
    """Any value as HTML text or attribute content, with `< > & " '` escaped."""
    return escape(str(value), quote=True)


def finite(value: Any) -> float | None:
    """A float, or None where the value is absent, NaN or infinite."""
    if value is None or isinstance(value, bool | str):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def interval(values: Any) -> tuple[float, float] | None:
    """A pair (low, high), or None where there is none or one end is undefined."""
    if not values or len(values) != 2:
        return None
    low, high = finite(values[0]), finite(values[1])
    return None if low is None or high is None else (low, high)


def decimal(value: float | None, digits: int = 3) -> str:
    """`0.412`; an en dash for None. Never "-0.000"."""
    if value is None:
        return DASH
    shown = f"{value:.{digits}f}"
    if float(shown) == 0.0:
        shown = shown.lstrip("-")
    return shown.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """`+0.031`, with a true minus sign below zero."""
    shown = decimal(value, digits)
    return shown if value is None or shown.startswith(MINUS) or float(shown) == 0.0 else f"+{shown}"


def bracket(ends: tuple[float, float] | None, digits: int = 3) -> str:
    """`[0.351, 0.470]`, or nothing.

    An end beside zero gets up to three more places, so that it can be seen on which side it is.
    """
    if ends is None:
        return ""
    hidden = [end for end in ends if end and float(f"{end:.{digits}f}") == 0.0]
    places = next((more for more in range(digits, digits + 4) if all(float(f"{e:.{more}f}") for e in hidden)), digits)
    return f"[{decimal(ends[0], places)}, {decimal(ends[1], places)}]"


def share(value: float | None) -> str:
    """A share of [0, 1] as a percentage with two significant places where it is small: `12 %`, `4.2 %`, `0.31 %`.

    What is not 0 or 1 is never written as if it were: `0.01 %` and `99.99 %` are the ends.
    """
    if value is None:
        return DASH
    percent = 100.0 * value
    if 0 < percent < 100:
        percent = min(max(percent, 0.01), 99.99)
    small = 0 < percent < 10 or 99 < percent < 100
    digits = (1 if 1 <= percent < 10 else 2) if small else 0
    return f"{percent:.{digits}f}\N{NO-BREAK SPACE}%"


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands; an en dash for None."""
    number = finite(value)
    return DASH if number is None else f"{round(number):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def undefined(reason: str) -> str:
    """The dash of an undefined value; its reason is read by a pointer and by a screen reader."""
    return f'<abbr class="undefined" title="{text(reason)}">{DASH}</abbr>'


def attributes(values: Mapping[str, object]) -> str:
    """` a="1" b="2"` with escaped values, leaving out those that are None."""
    return "".join(f' {name}="{text(value)}"' for name, value in values.items() if value is not None)


def coordinate(value: float, digits: int = 1) -> str:
    """A coordinate of a drawing as short text: `12.5`, `7`."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
