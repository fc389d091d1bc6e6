import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hilum.core.errors import ConfigError
from hilum.data.samplers import EndlessSampler, Position

INDICES = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.sampled_from([1, 2, 3]), st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(batch: int, world: int, seed: int) -> None:
    ranks = [EndlessSampler(INDICES, batch, seed, rank, world) for rank in range(world)]
    steps = -(-3 * len(INDICES) // (batch * world))
    order = np.concatenate([np.concatenate([rank.batch(step) for rank in ranks]) for step in range(steps)])
    epochs = order[: 3 * len(INDICES)].reshape(3, -1)
    assert (np.sort(epochs, axis=1) == INDICES).all()
    if seed == 0:
        assert not (epochs[0] == epochs[1]).all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(world: int) -> None:
    whole = EndlessSampler(INDICES, 8, 7)
    parts = [EndlessSampler(INDICES, 8 // world, 7, rank, world) for rank in range(world)]
    for step in (0, 1, 2, 50):
        assert np.array_equal(np.concatenate([part.batch(step) for part in parts]), whole.batch(step))


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    straight = EndlessSampler(INDICES, 4, 7)
    expected = [straight.batch(step) for step in range(9)]
    for step in (8, 0, 5):
        assert np.array_equal(EndlessSampler(INDICES, 4, 7).batch(step), expected[step])


def test_another_seed_is_another_order() -> None:
    assert not np.array_equal(EndlessSampler(INDICES, 10, 1).batch(0), EndlessSampler(INDICES, 10, 2).batch(0))


def test_positions_go_on_over_the_end_of_an_epoch() -> None:
    sampler = EndlessSampler(INDICES, 4, 7)
    assert sampler.positions(2) == [Position(0, 8), Position(0, 9), Position(1, 0), Position(1, 1)]
    assert sampler.after(Position(0, 9)) == Position(1, 0)
    assert sampler.after(Position(2, 3)) == Position(2, 4)


def test_a_batch_larger_than_the_data_wraps() -> None:
    batch = EndlessSampler(INDICES[:3], 7, 0).batch(0)
    assert sorted(batch[:3].tolist()) == sorted(batch[3:6].tolist()) == [3, 5, 8]


@pytest.mark.parametrize(
    ("indices", "batch", "rank", "world", "message"),
    [(INDICES[:0], 4, 0, 1, "nothing to train on"), (INDICES, 0, 0, 1, "batch size 0"), (INDICES, 4, 2, 2, "rank 2")],
)
def test_impossible_samplers_are_refused(indices: np.ndarray, batch: int, rank: int, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EndlessSampler(indices, batch, 0, rank, world)
