import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.samplers import (
    EndlessSampler,
    Position,
    WeightedDraw,
    Window,
    class_weights,
    dataset_weights,
    parse_shares,
)

INDICES = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233])


def one_epoch(sampler: EndlessSampler, epoch: int) -> np.ndarray:
    return np.array([sampler.index(Position(epoch, offset)) for offset in range(len(sampler.indices))])


def test_the_default_order_never_changes() -> None:
    """What runs before windows and weights saw: a resumed run must go on with it."""
    order = [EndlessSampler(INDICES, 4, 7).batch(step).tolist() for step in range(3)]
    assert order == [[55, 34, 8, 21], [233, 13, 89, 5], [3, 144, 13, 144]]


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


# Windows


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 8), st.integers(0, 3))
def test_a_windowed_epoch_holds_every_sample_once(count: int, block: int, blocks: int, epoch: int) -> None:
    sampler = EndlessSampler(np.arange(count) * 3, 1, 5, window=Window(block, blocks))
    assert np.array_equal(np.sort(one_epoch(sampler, epoch)), np.arange(count) * 3)


@pytest.mark.parametrize("world", [2, 4])
def test_windowed_and_weighted_batches_do_not_depend_on_the_number_of_processes(world: int) -> None:
    draw = WeightedDraw(np.arange(1.0, 101.0), 3)
    for options in ({"window": Window(5, 3)}, {"draw": draw}, {"window": Window(5, 3), "draw": draw}):
        whole = EndlessSampler(np.arange(100), 8, 7, **options)
        parts = [EndlessSampler(np.arange(100), 8 // world, 7, rank, world, **options) for rank in range(world)]
        for step in (40, 0, 12, 13, 1000):  # backwards too: a step does not depend on what was asked before
            assert np.array_equal(np.concatenate([part.batch(step) for part in parts]), whole.batch(step))


def test_a_window_reads_few_blocks_at_a_time_and_mixes_them() -> None:
    """Independent count: while a window is open, the samples come from at most `blocks` runs of neighbours."""
    count, window = 6400, Window(16, 10)
    order = one_epoch(EndlessSampler(np.arange(count), 1, 0, window=window), 2)
    for start in range(0, count - 320, 160):
        runs = np.split(s := np.sort(order[start : start + 320]), np.flatnonzero(np.diff(s) > 16) + 1)
        assert len(runs) <= 4 * window.blocks  # 320 samples touch three windows at most; anywhere, it would be 200 runs
    together = np.mean([np.mean(np.diff(np.sort(order[i : i + 32])) == 1) for i in range(0, count, 32)])
    assert together < 0.35  # 32 of a window of 160: a fifth are neighbours; read in order, all would be
    assert np.mean(np.abs(order - np.arange(count))) > 0.25 * count  # a third, as for a shuffle over everything


def test_windows_are_cut_elsewhere_each_epoch() -> None:
    sampler = EndlessSampler(np.arange(1000), 1, 0, window=Window(50, 1))
    first, second = ({frozenset(one_epoch(sampler, e)[i : i + 50]) for i in range(0, 1000, 50)} for e in (0, 1))
    assert not first & second


def test_a_window_position_is_found_without_an_order_of_the_epoch() -> None:
    sampler = EndlessSampler(np.arange(5_000_000), 4, 0, window=Window(512, 16))
    batch = sampler.batch(10**9)
    assert len(set((batch // 512).tolist())) > 1
    assert np.array_equal(EndlessSampler(np.arange(5_000_000), 4, 0, window=Window(512, 16)).batch(10**9), batch)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_that_enters_a_window_says_what_the_next_one_holds(weighted: bool) -> None:
    """Told once a window, before it is read."""
    draw = WeightedDraw(np.arange(1.0, 101.0), 3) if weighted else None
    sampler = EndlessSampler(np.arange(100) * 2, 5, 7, window=Window(6, 3), draw=draw)
    told: list[set[int]] = []
    for step in range(100):
        if opened := sampler.opens(step).tolist():
            assert opened == sorted(set(opened))
            told.append(set(opened))
        if len(told) > 1:  # a batch may lie across two windows, the next of which was told when this one was entered
            assert set(sampler.batch(step).tolist()) <= set().union(*told[-3:])
    calls = len(told)
    assert calls == pytest.approx(5 * 6, abs=2)  # five epochs of about six windows
    assert not len(EndlessSampler(np.arange(100), 5, 7).opens(9))


# Weights


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=60), st.integers(0, 2**40), st.integers(0, 100))
def test_every_sample_and_every_run_is_drawn_as_expected_to_the_sample(
    weights: list[float], seed: int, epoch: int
) -> None:
    values = np.array(weights)
    if not values.sum() > 0:
        return
    counts = WeightedDraw(values, seed).counts(epoch)
    expected = values / values.sum() * len(values)
    assert counts.sum() == len(values)
    assert (counts[values == 0] == 0).all()
    assert (np.abs(counts - expected) < 1 + 1e-6).all()
    for start in range(0, len(values), 7):  # and of all samples of a run together
        assert abs(counts[start : start + 9].sum() - expected[start : start + 9].sum()) < 1 + 1e-6


def test_equal_weights_draw_each_once() -> None:
    for weight in (0.1, 1 / 3, 7.0):
        assert (WeightedDraw(np.full(100_003, weight), 1).counts(5) == 1).all()


def test_rare_draws_are_spread_over_the_epochs() -> None:
    """A tenth of a draw an epoch: about one in ten epochs, no sample waits long, and nothing adds up."""
    weights = np.concatenate([np.full(900, 0.1), np.full(100, 9.1)])
    draw = WeightedDraw(weights, 4)
    counts = np.array([draw.counts(epoch) for epoch in range(200)])
    assert (np.abs(counts[:, :900].sum(0) - 20) <= 2).all()
    assert (np.abs(counts[:, 900:].sum(0) - 1820) <= 3).all()
    drawn = counts[:, 0] > 0
    assert np.diff(np.flatnonzero(drawn)).max() <= 2 / 0.1


def test_copies_of_a_sample_are_far_apart_in_storage_order() -> None:
    draw = WeightedDraw(np.array([1.0] * 90 + [11.0] * 10), 0)
    places = draw.places(0)
    assert np.array_equal(np.sort(places), np.repeat(np.arange(100), draw.counts(0)))
    often = np.flatnonzero(places == 95)
    assert len(often) >= 5
    assert np.diff(often)[:-1].min() >= 9  # a pass over the ten others lies between; the last pass has not all of them


def test_the_weighted_order_is_that_of_the_draw() -> None:
    draw = WeightedDraw(np.arange(10.0), 0)
    for window in (None, Window(2, 2)):
        sampler = EndlessSampler(INDICES, 3, 7, draw=draw, window=window)
        for epoch in (0, 3):
            drawn = np.repeat(INDICES, draw.counts(epoch))
            assert np.array_equal(np.sort(one_epoch(sampler, epoch)), drawn)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="Sampling weights"):
        WeightedDraw(np.array(weights), 0)


def test_fingerprints_tell_orders_apart() -> None:
    draws = [None, WeightedDraw(np.ones(10), 0), WeightedDraw(np.arange(1.0, 11.0), 0)]
    samplers = [
        EndlessSampler(INDICES, 4, 7, draw=draw, window=window) for draw in draws for window in (None, Window())
    ]
    others = [EndlessSampler(INDICES, 4, 8), EndlessSampler(INDICES[::-1].copy(), 4, 7)]
    prints = [sampler.fingerprint() for sampler in samplers + others]
    assert len(set(prints)) == len(prints)
    assert EndlessSampler(INDICES, 2, 7, 1, 2).fingerprint() == EndlessSampler(INDICES, 4, 7).fingerprint()


DATASETS = np.array(["a"] * 64 + ["b"] * 4 + ["c"] * 32)


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ("natural", {"a": 64, "b": 4, "c": 32}),
        ("uniform", {"a": 100 / 3, "b": 100 / 3, "c": 100 / 3}),
        ("sqrt", {"a": 800 / 15.657, "b": 200 / 15.657, "c": 565.685 / 15.657}),
        ("a=1, b=2,c=5", {"a": 12.5, "b": 25, "c": 62.5}),
    ],
)
def test_datasets_get_their_share_of_every_epoch(rule: str, shares: dict[str, float]) -> None:
    draw = WeightedDraw(dataset_weights(DATASETS, rule), 0)
    for epoch in range(20):
        drawn = DATASETS[draw.places(epoch)]
        for name, share in shares.items():
            assert abs((drawn == name).sum() - share) < 1


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        ("sqr", UnknownNameError, "Did you mean 'sqrt'"),
        ("a=1,b=x,c=1", ConfigError, "'b=x'"),
        ("a=1,b=0,c=1", ConfigError, "above 0"),
        ("a=1,a=2", ConfigError, "each once"),
        ("a=inf,b=1,c=1", ConfigError, "'a=inf'"),
        ("a=1,b=1", ConfigError, "none for c"),
        ("a=1,b=1,cc=1", UnknownNameError, "Did you mean 'c'"),
    ],
)
def test_impossible_shares_are_refused(rule: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        dataset_weights(DATASETS, rule)


def test_shares_are_read_as_written() -> None:
    assert parse_shares("nih=2, cxr-lt=.5") == {"nih": 2.0, "cxr-lt": 0.5}
    assert parse_shares("uniform") is None


LABELS = np.array(
    [[1, 0, -1], [1, 1, 0], [0, 0, 0], [1, -2, -1], [-1, -1, -2], [1, 0, 0], [0, 0, 1], [0, 0, 0]], np.int8
)
"""Known: 7, 6, 5; positive: 4, 1, 1; of the 7 annotated images 2 have nothing."""


def test_class_weights_by_hand() -> None:
    root = [7 / 4, 6 / 1, 5 / 1, 7 / 2]
    common, rare, third, none = (value**0.5 for value in root)
    largest = class_weights(LABELS, LABELS)
    assert largest == pytest.approx([common, rare, none, common, common, common, third, none])
    mean = class_weights(LABELS, LABELS, over="mean")
    assert mean == pytest.approx([common, (common + rare) / 2, none, common, common, common, third, none])
    assert class_weights(LABELS, LABELS, power=0.0) == pytest.approx(np.ones(8))
    assert class_weights(LABELS, LABELS, power=1.0)[6] == pytest.approx(5)


def test_unknown_and_uncertain_labels_never_count() -> None:
    """Hiding a label changes nothing but what is known; 25 % unknown, -1 and -2 alike."""
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 5)) < [0.5, 0.2, 0.1, 0.05, 0.02]).astype(np.int8)
    labels[rng.random(labels.shape) < 0.25] = -1
    uncertain = np.where((labels == -1) & (rng.random(labels.shape) < 0.5), -2, labels).astype(np.int8)
    assert np.array_equal(class_weights(labels, labels), class_weights(uncertain, uncertain))
    assert not np.array_equal(class_weights(labels, labels), class_weights(np.abs(labels), np.abs(labels)))


def test_labels_to_draw_from_do_not_enter_the_frequencies() -> None:
    """A validation image is weighed by its findings, and changes nobody's weight."""
    more = np.concatenate([LABELS, np.array([[1, 1, 1]] * 50, np.int8)])
    weights = class_weights(more, LABELS)
    assert np.array_equal(weights[:8], class_weights(LABELS, LABELS))
    assert weights[8] == weights[1]


def test_findings_without_a_training_positive_weigh_nothing() -> None:
    train = np.array([[1, 0], [0, 0]], np.int8)
    weights = class_weights(np.array([[0, 1], [0, 0], [1, 1]], np.int8), train)
    assert weights == pytest.approx([2**0.5, 2**0.5, 2**0.5])
