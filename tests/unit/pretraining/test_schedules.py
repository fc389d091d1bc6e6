"""The warm-up of new heads; the published schedules are tested in tests/reference/test_dinov2_math.py."""

import pytest

from hilum.pretraining.schedules import Schedules


def test_the_backbone_waits_for_the_heads_then_grows_to_the_common_rate() -> None:
    run = Schedules(steps=1000, learning_rate=1e-3, warmup=0.1, head_warmup=0.2)
    waiting = [run.at(step).backbone_learning_rate for step in range(200)]
    assert set(waiting) == {0.0}
    assert run.at(199).learning_rate > 0
    growing = [run.at(step).backbone_learning_rate / run.at(step).learning_rate for step in range(200, 300)]
    assert growing == pytest.approx([(index + 1) / 100 for index in range(100)])
    assert all(run.at(step).backbone_learning_rate == run.at(step).learning_rate for step in range(299, 1000))


def test_without_warm_up_of_heads_all_rates_are_one() -> None:
    run = Schedules(steps=50, learning_rate=1e-3)
    assert all(run.at(step).backbone_learning_rate == run.at(step).learning_rate for step in range(50))
