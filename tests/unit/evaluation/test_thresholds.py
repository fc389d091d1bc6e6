import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from hilum.evaluation.thresholds import ENOUGH, OPERATING_POINTS, fit_thresholds


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
