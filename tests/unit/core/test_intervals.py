import pytest

from hilum.core.intervals import wilson_interval


@pytest.mark.parametrize(
    ("positives", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (1, 100, 0.00177, 0.05449),
        (0, 0, 0, 1),
    ],
)
def test_wilson_interval_against_published_values(positives: float, total: int, low: float, high: float) -> None:
    assert wilson_interval(positives, total) == pytest.approx((low, high), abs=1e-5)
