import numpy as np
import pytest
from scipy.stats import rankdata

from hilum.core.errors import PredictionError
from hilum.evaluation.ranks import Ranks


def test_mid_ranks_of_ties_as_scipy_has_them(made_up):
    table, _ = made_up(count=300)
    table = table.replace(np.round(table.probabilities, 1))
    found = Ranks.of(table, knots=None).apply(table.probabilities, table.findings)
    for column in range(4):
        expected = (rankdata(table.probabilities[:, column]) - 0.5) / 300
        np.testing.assert_allclose(found[:, column], expected, atol=1e-15)


@pytest.mark.parametrize("knots", [None, 8, 128])
def test_strictly_increasing_from_0_to_1_even_between_and_beyond_what_was_seen(made_up, knots):
    table, _ = made_up(count=2000)
    inside = table.replace(0.2 + 0.5 * table.probabilities)
    ranks = Ranks.of(inside, knots)
    grid = np.tile(np.sort(np.concatenate([np.linspace(0, 1, 3001), inside.probabilities[:, 0]]))[:, None], (1, 4))
    distinct = grid[np.append(True, np.diff(grid[:, 0]) > 1e-12)]
    found = ranks.apply(distinct, table.findings)
    assert (np.diff(found, axis=0) > 0).all()
    assert found.min() == 0
    assert found.max() == 1


def test_few_knots_are_near_the_exact_ranks_and_nearest_at_the_ends():
    values = np.random.default_rng(0).beta(0.2, 3, (20_000, 1))
    exact = Ranks.of_values(values, ["A"], None).apply(values, ["A"])[:, 0]
    near = Ranks.of_values(values, ["A"]).apply(values, ["A"])[:, 0]
    assert len(Ranks.of_values(values, ["A"]).curves[0][0]) < 400
    error = np.abs(near - exact)
    assert error.max() < 0.005
    assert error[np.argsort(values[:, 0])[-20:]].max() < 1e-4  # where rare findings are told apart


def test_findings_by_name_and_those_never_trained(made_up):
    table, _ = made_up()
    values = table.probabilities.copy()
    values[:, 1] = np.nan
    ranks = Ranks.of(table.replace(values))
    straight = ranks.apply(values, table.findings)
    turned = ranks.apply(values[:, [3, 1, 0]], ("D", "B", "A"))
    np.testing.assert_array_equal(turned, straight[:, [3, 1, 0]])
    assert np.isnan(straight[:, 1]).all()
    with pytest.raises(PredictionError, match="'E'"):
        ranks.apply(values[:, :1], ("E",))


def test_arrays_and_back(made_up):
    table, _ = made_up()
    ranks = Ranks.of(table)
    again = Ranks.from_arrays(ranks.arrays())
    np.testing.assert_array_equal(
        again.apply(table.probabilities, table.findings), ranks.apply(table.probabilities, table.findings)
    )
    with pytest.raises(PredictionError, match="not complete"):
        Ranks.from_arrays(ranks.arrays() | {"scores": ranks.arrays()["scores"][:-1]})
