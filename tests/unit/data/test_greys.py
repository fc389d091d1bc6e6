"""Greys of datasets: the distance against scipy, evenness of equalised pictures, sums."""

import cv2
import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from hilum.data.greys import Greys, apart, distance, grey_histogram, is_even, total

RNG = np.random.default_rng(5)
DARK = np.clip(cv2.GaussianBlur(RNG.normal(60, 300, (200, 150)), (0, 0), 6), 0, 255).astype(np.uint8)


def greys(*images: np.ndarray) -> Greys:
    counted = [grey_histogram(image) for image in images]
    return total(Greys(one, 1, int(is_even(one))) for one in counted)


def test_the_histogram_counts_every_pixel() -> None:
    image = np.array([[0, 0, 255], [7, 7, 7]], np.uint8)
    assert dict(enumerate(grey_histogram(image).tolist())).items() >= {0: 2, 7: 3, 255: 1}.items()
    assert grey_histogram(image).sum() == 6


@pytest.mark.parametrize("seed", range(5))
def test_distance_equals_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 50, 256) ** 3, rng.integers(0, 50, 256)
    levels = np.arange(256)
    expected = wasserstein_distance(levels, levels, one, other)
    assert distance(one.astype(float), other.astype(float)) == pytest.approx(expected, rel=1e-12)


def test_a_shift_by_ten_greys_is_ten_apart() -> None:
    image = np.clip(DARK, 0, 240)
    assert apart({"a": greys(image), "b": greys(image + np.uint8(10))})[0][0] == pytest.approx(10)
    assert apart({"a": greys(image), "b": greys(image)}) == [(0.0, "a", "b")]


def test_equalised_pictures_are_even_and_others_are_not() -> None:
    equalised = cv2.equalizeHist(DARK)
    packed = cv2.imdecode(cv2.imencode(".jpg", equalised, [cv2.IMWRITE_JPEG_QUALITY, 95])[1], cv2.IMREAD_GRAYSCALE)
    shrunk = cv2.resize(packed, (75, 100), interpolation=cv2.INTER_AREA)
    assert all(is_even(grey_histogram(image)) for image in (equalised, packed, shrunk))
    assert not is_even(grey_histogram(DARK))
    assert not is_even(grey_histogram(np.zeros((9, 9), np.uint8)))
    pool = greys(equalised, shrunk, DARK)
    assert (pool.images, pool.even, pool.equalised) == (3, 2, True)
    assert not greys(equalised, DARK).equalised


def test_pairs_are_sorted_and_empty_datasets_left_out() -> None:
    pools = {name: greys(np.full((4, 4), value, np.uint8)) for name, value in {"c": 10, "a": 200, "b": 20}.items()}
    pools["none"] = Greys(np.zeros(256, np.int64), 0, 0)
    assert [(one, other) for _, one, other in apart(pools)] == [("a", "c"), ("a", "b"), ("b", "c")]
    assert apart({"a": pools["a"]}) == []
