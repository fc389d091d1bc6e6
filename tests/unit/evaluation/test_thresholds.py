import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.evaluation.thresholds import ENOUGH, OPERATING_POINTS, fit_thresholds, operating_point, point_name


@st.composite
def scored(draw):
    p = np.array(draw(st.lists(st.integers(0, 12), min_size=4, max_size=40))) / 12
    y = np.array(draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p))))
    y[:2] = [True, False]
    return p, y


@settings(max_examples=60, deadline=None)
@given(scored())
def test_each_operating_point_is_the_best_there_is(case):
    p, y = case
    found = {name: search(p, y) for name, search in OPERATING_POINTS.items()}
    cuts = [0.0, *np.unique(p).tolist()]  # every different decision by p > cut
    best = max(f1_score(y, p > cut, zero_division=0.0) for cut in cuts)
    assert f1_score(y, p > found["f1"], zero_division=0.0) == pytest.approx(best)

    def gain(cut):
        return recall_score(y, p > cut) - (p[~y] > cut).mean()

    assert gain(found["youden"]) == pytest.approx(max(map(gain, cuts)))
    allowed = [cut for cut in cuts if (p[~y] > cut).mean() <= 0.05 + 1e-12]
    assert (p[~y] > found["sens_at_spec95"]).mean() <= 0.05 + 1e-12
    assert recall_score(y, p > found["sens_at_spec95"]) == max(recall_score(y, p > cut) for cut in allowed)
    reached = [cut for cut in cuts if (p[y] > cut).mean() >= 0.95 - 1e-12]
    if reached:  # a positive at 0 is never called
        assert (p[y] > found["spec_at_sens95"]).mean() >= 0.95 - 1e-12
        assert (p[~y] > found["spec_at_sens95"]).mean() == min((p[~y] > cut).mean() for cut in reached)
    else:
        assert (p > found["spec_at_sens95"]).sum() == (p > 0).sum()


def test_few_positives_are_drawn_to_the_group():
    group = dict.fromkeys(OPERATING_POINTS, 0.2)
    p, y = np.linspace(0.01, 0.99, 200), np.arange(200) >= 190
    own = fit_thresholds(p, y, None)
    shrunk = fit_thresholds(p, y, group)
    assert 0.2 < shrunk["f1"] < own["f1"]
    assert (
        shrunk["sens_at_spec95"] == own["sens_at_spec95"]
    )  # a specificity rests on the negatives, of which there are many
    enough = np.arange(200) >= 200 - ENOUGH
    assert fit_thresholds(p, enough, group) == fit_thresholds(p, enough, None)
    assert fit_thresholds(p, np.zeros(200, bool), group)["f1"] == pytest.approx(0.2)


def test_nothing_known_takes_the_group_or_a_half():
    nothing = np.zeros(0), np.zeros(0, bool)
    assert set(fit_thresholds(*nothing, None).values()) == {0.5}
    assert fit_thresholds(*nothing, {"f1": 0.1})["f1"] == 0.1


def test_any_fixed_sensitivity_or_specificity_has_a_name():
    rng = np.random.default_rng(0)
    p, y = rng.random(4000), rng.random(4000) < 0.3
    for share in (0.5, 0.8, 0.9, 0.975, 0.999):
        cut = operating_point(point_name("spec_at_sens", share))(p, y)
        assert share <= (p[y] > cut).mean() < share + 2 / y.sum()
        cut = operating_point(point_name("sens_at_spec", share))(p, y)
        assert share <= (p[~y] <= cut).mean() < share + 2 / (~y).sum()
    assert point_name("spec_at_sens", 0.95) == "spec_at_sens95"
    assert point_name("sens_at_spec", 0.975) == "sens_at_spec97.5"
    assert operating_point("spec_at_sens95")(p, y) == OPERATING_POINTS["spec_at_sens95"](p, y)
    found = fit_thresholds(p, y, None, ["f1", "spec_at_sens80"])
    assert set(found) == {"f1", "spec_at_sens80"}
    for share in (0, 1, 1.2, -1):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            point_name("spec_at_sens", share)
    for name in ("spec_at_sens0", "spec_at_sens100", "sens_at_sens90", "f2", "spec_at_sens"):
        with pytest.raises(UnknownNameError, match="operating point"):
            operating_point(name)
