import dataclasses

import numpy as np
import pytest

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.evaluation.ensemble import mean_over_models
from hilum.evaluation.normal_damping import Damping

NAMES = ("Edema", "Normal", "Support Devices", "Mass")


def table_of(made_up, names=NAMES, **metadata):
    return dataclasses.replace(made_up(**metadata)[0], findings=names)


@pytest.mark.parametrize("text", ["power:0.5", "power:2", "linear:0.5", "linear:1"])
def test_the_formula_in_plain_loops(made_up, text):
    table = table_of(made_up)
    result = Damping.parse(text).apply(table)
    form, strength = text.split(":")
    for row in range(len(table)):
        normal = float(table.probabilities[row, 1])
        factor = (1 - normal) ** float(strength) if form == "power" else 1 - float(strength) * normal
        for column, name in enumerate(NAMES):
            p = float(table.probabilities[row, column])
            expected = p if name in ("Normal", "Support Devices") else p * factor
            assert result.probabilities[row, column] == pytest.approx(expected, rel=1e-14)
    assert (result.stage, result.metadata["normal_damping"]) == (table.stage, str(Damping.parse(text)))


def test_normal_and_support_devices_keep_their_bits_and_zero_changes_nothing(made_up):
    table = table_of(made_up)
    result = Damping().apply(table).probabilities
    np.testing.assert_array_equal(result[:, 1:3], table.probabilities[:, 1:3])
    assert (result[:, [0, 3]] < table.probabilities[:, [0, 3]]).any()
    np.testing.assert_array_equal(Damping("power", 0.0).apply(table).probabilities, table.probabilities)
    every = Damping(spared=()).apply(table).probabilities
    assert (every[:, 2] < table.probabilities[:, 2]).any()
    np.testing.assert_array_equal(every[:, 1], table.probabilities[:, 1])


def test_more_normal_is_never_more_abnormal_and_ends_hold(made_up):
    table = table_of(made_up)
    values = np.full(table.probabilities.shape, 0.6)
    values[:, 1] = np.linspace(0, 1, len(table))
    for damping in (Damping(), Damping("linear", 1.0), Damping("power", 3.0)):
        found = damping.damp(values, NAMES)
        assert (np.diff(found[:, 0]) <= 0).all()
        assert found[0, 0] == 0.6
        assert found[-1, 0] == 0


def test_rows_do_not_touch_each_other_and_findings_go_by_name(made_up):
    table = table_of(made_up)
    whole = Damping().apply(table)
    np.testing.assert_array_equal(
        Damping().apply(table.rows(np.array([7, 2]))).probabilities, whole.probabilities[[7, 2]]
    )
    turned = ("Normal", "Mass", "Edema", "Support Devices")
    np.testing.assert_array_equal(
        Damping().apply(table.select(turned)).probabilities, whole.select(turned).probabilities
    )


def test_no_finding_stands_for_normal_where_that_is_its_name(made_up):
    renamed = table_of(made_up, ("Edema", "No Finding", "Support Devices", "Mass"))
    np.testing.assert_array_equal(
        Damping().apply(renamed).probabilities, Damping().apply(table_of(made_up)).probabilities
    )


def test_after_the_ensemble_before_calibration_and_once(made_up):
    table = table_of(made_up)
    ensemble = mean_over_models([table, table_of(made_up, seed=0)])
    damped = Damping().apply(ensemble)
    assert damped.stage == "ensemble"
    with pytest.raises(StageError, match="damped already"):
        Damping().apply(damped)
    with pytest.raises(StageError, match="before calibration"):
        Damping().apply(table_of(made_up, stage="calibrated"))
    with pytest.raises(StageError, match=r"Member 1.*damped"):
        mean_over_models([Damping().apply(table), table])


def test_without_a_normal_score_it_is_refused(made_up):
    with pytest.raises(PredictionError, match="needs a finding called 'Normal'"):
        Damping().apply(made_up()[0])
    table = table_of(made_up)
    values = table.probabilities.copy()
    values[:, 1] = np.nan
    with pytest.raises(PredictionError, match="never trained"):
        Damping().apply(table.replace(values))


def test_findings_never_trained_stay_so(made_up):
    table = table_of(made_up)
    values = table.probabilities.copy()
    values[:, 0] = np.nan
    assert Damping().apply(table.replace(values)).trained.tolist() == [False, True, True, True]


@pytest.mark.parametrize("text", ["power:0.25", "linear:1.0", "power:0.1"])
def test_text_and_back(text):
    assert str(Damping.parse(text)) == text
    assert Damping.parse("power") == Damping("power", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [("powr:1", "Did you mean 'power'"), ("power:-1", "at least 0"), ("linear:1.5", "at most 1"),
     ("power:much", "expected power:0.5"), ("power:inf", "at least 0"), ("power:", "expected power:0.5")],
)  # fmt: skip
def test_texts_that_mean_nothing_are_refused(text, message):
    with pytest.raises(UnknownNameError if "powr" in text else ConfigError, match=message):
        Damping.parse(text)
