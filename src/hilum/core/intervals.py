"""The interval of a proportion, for the layers that count. Intervals of metrics: `evaluation/bootstrap.py`."""

import math

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson_interval(positives: float, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), sensible at 0 and at 1; (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share, weight = positives / total, Z_95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)
