"""Numbers as reports write them."""

import pytest

from hilum.evaluation.markup import DASH, MINUS, bracket, decimal, signed


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ((0.3512, 0.47), "[0.351, 0.470]"),
        ((-0.0004, 0.0231), "[-0.0004, 0.0231]"),  # not "[0.000, 0.023]", which would say that zero is its end
        ((-0.2, -0.00003), "[-0.20000, -0.00003]"),
        ((0.0, 0.01), "[0.000, 0.010]"),
        ((-1e-12, 0.5), "[0.000, 0.500]"),
        (None, ""),
    ],
)
def test_an_interval_shows_on_which_side_of_zero_it_ends(ends: tuple[float, float] | None, shown: str) -> None:
    assert bracket(ends) == shown.replace("-", MINUS)


def test_no_number_is_minus_zero() -> None:
    assert (decimal(-0.0004), signed(-0.0004), signed(0.0312), signed(None)) == ("0.000", "0.000", "+0.031", DASH)
