"""Batches: every image as often as its order says, studies whole, and what is attached belongs to its image."""

from itertools import islice

import numpy as np
import pytest

from hilum.core.config import override
from hilum.heads.batches import Batch, Studies, epoch_batches, in_order
from hilum.heads.config import FitConfig
from hilum.heads.orders import epoch_orders

STUDY = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 6, 6, 7, 8, 9, 9, 9, 10])
LABELS = (np.random.default_rng(0).random((20, 3)) < [0.5, 0.3, 0.1]).astype(np.int8)


@pytest.mark.parametrize("size", [4, 5, 7, 100])
def test_studies_stay_whole_and_every_image_comes_once(size: int) -> None:
    images = np.array([17, 3, 4, 0, 1, 19, 16, 18, 5, 12, 10, 11, 13])  # whole studies, in no order
    batches = in_order(images, size, STUDY)
    assert sorted(np.concatenate([batch.images for batch in batches]).tolist()) == sorted(images.tolist())
    met: set[int] = set()
    for batch in batches:
        assert batch.study is not None
        assert len(batch.images) < size + 4
        numbers = np.unique(batch.study)
        assert numbers.tolist() == list(range(len(numbers)))
        for number in numbers:
            of_study = set(STUDY[batch.images[batch.study == number]].tolist())
            assert len(of_study) == 1
            assert not of_study & met
            met |= of_study


def test_a_study_that_is_drawn_twice_is_two() -> None:
    [batch] = Studies(np.arange(20), STUDY).batches(np.array([2, 0, 2]), 100)
    assert batch.images.tolist() == [3, 4, 5, 0, 1, 3, 4, 5]
    assert batch.study is not None
    assert batch.study.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_without_studies_the_batches_are_the_order_cut() -> None:
    config = FitConfig(batch_size=6, seed=4)
    images = np.arange(100, 120)
    orders = islice(epoch_orders(config, "search", images, LABELS, LABELS), 3)
    batches = islice(epoch_batches(config, "search", images, LABELS, LABELS), 3)
    for order, epoch in zip(orders, batches, strict=True):
        assert [len(batch.images) for batch in epoch] == [6, 6, 6, 2]
        assert np.array_equal(np.concatenate([batch.images for batch in epoch]), order)
        assert all(batch.study is None for batch in epoch)


def test_epochs_of_studies_draw_every_study_and_differ() -> None:
    config = FitConfig(batch_size=6)
    first, second = islice(epoch_batches(config, "search", np.arange(20), LABELS, LABELS, STUDY), 2)
    for epoch in (first, second):
        assert sorted(np.concatenate([batch.images for batch in epoch]).tolist()) == list(range(20))
    assert not np.array_equal(first[0].images, second[0].images)


def test_class_aware_studies_count_the_findings_of_any_image() -> None:
    labels = np.zeros((20, 1), np.int8)
    labels[4] = 1  # one image of study 2
    config = override(FitConfig(batch_size=50), ["sampling=class_aware", "sampling_power=1"])
    epochs = list(islice(epoch_batches(config, "search", np.arange(20), labels, labels, STUDY), 20))
    drawn = np.concatenate([batch.images for epoch in epochs for batch in epoch])
    counts = np.bincount(drawn, minlength=20)
    assert counts[3] == counts[4] == counts[5]
    assert counts[4] > 3 * counts[0]


def test_what_is_attached_belongs_to_its_image(make_features) -> None:
    views, sources = np.arange(20) % 4, np.arange(20) % 3
    batch = Batch(np.array([7, 8, 2]), np.array([0, 0, 1]))
    features = batch.attach(make_features(3), views, sources)
    assert features.study.tolist() == [0, 0, 1]
    assert features.view.tolist() == [3, 0, 2]
    assert features.source.tolist() == [1, 2, 2]
    bare = Batch(np.array([7, 8, 2])).attach(make_features(3), views)
    assert bare.study is bare.view is bare.source is None
