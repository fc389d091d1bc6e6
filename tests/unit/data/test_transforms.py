import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hilum.core.errors import ConfigError, PreprocessingMismatchError
from hilum.core.seeding import stream
from hilum.data.transforms import (
    crop_box,
    evaluation_crop,
    normalise,
    preprocessing,
    random_resized_crop,
    resize,
    shrink,
)

SCALE, RATIO = (0.32, 1.0), (3 / 4, 4 / 3)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return stream(seed, "image", height, width).integers(0, 256, (height, width), dtype=np.uint8)


def area_mean(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The definition in float64: the mean over each output pixel's area of the source, through exact integrals."""

    def along_rows(values: np.ndarray, size: int) -> np.ndarray:
        total = np.vstack([np.zeros(values.shape[1]), values.cumsum(axis=0)])
        edges = np.linspace(0, len(values), size + 1)
        at_edges = np.stack([np.interp(edges, np.arange(len(total)), column) for column in total.T], axis=1)
        return np.diff(at_edges, axis=0) / (len(values) / size)

    return along_rows(along_rows(pixels.astype(float), height).T, width).T


@pytest.mark.parametrize(("source", "target"), [((50, 70), (20, 30)), ((64, 64), (32, 32)), ((33, 97), (33, 41))])
def test_resize_is_an_area_mean_where_both_axes_shrink(source: tuple[int, int], target: tuple[int, int]) -> None:
    pixels = image(*source)
    assert np.abs(resize(pixels, *target) - area_mean(pixels, *target)).max() <= 0.5 + 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 120), st.integers(1, 120))
def test_shrink_equals_resize_but_for_ties(height: int, width: int, less: int, thinner: int) -> None:
    target = (max(height - less, 1), max(width - thinner, 1))
    pixels = image(height, width)
    exact = area_mean(pixels, *target)
    found = shrink(pixels, *target)
    assert found.dtype == np.uint8
    assert np.abs(found - exact).max() <= 0.5 + 1e-3
    assert np.array_equal(found, shrink(pixels.astype(np.float32), *target))


@pytest.mark.parametrize(("size_in", "size_out"), [(512, 224), (415, 224), (300, 96), (97, 96), (500, 499)])
def test_shrink_equals_opencv(size_in: int, size_out: int) -> None:
    pixels = image(size_in, size_in - 1)[: size_in - 1]
    expected = cv2.resize(pixels, (size_out - 1, size_out - 1), interpolation=cv2.INTER_AREA)
    difference = np.abs(shrink(pixels, size_out - 1, size_out - 1).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_resize_is_cubic_where_it_grows_and_mixed_per_axis() -> None:
    pixels = image(40, 40)
    grown = cv2.resize(pixels, (64, 56), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(resize(pixels, 56, 64), grown)
    tall = resize(pixels, 80, 20)
    assert tall.shape == (80, 20)
    halved = area_mean(pixels, 40, 20)
    assert np.array_equal(tall, cv2.resize(np.rint(halved).astype(np.uint8), (20, 80), interpolation=cv2.INTER_CUBIC))


def test_resize_to_the_same_size_and_of_a_constant_changes_nothing() -> None:
    pixels = image(30, 40)
    assert np.array_equal(resize(pixels, 30, 40), pixels)
    for height, width in ((10, 13), (90, 70), (10, 70)):
        assert np.unique(resize(np.full((30, 40), 77, np.uint8), height, width)).tolist() == [77]


def test_nothing_to_resize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="0 x 5"):
        resize(np.zeros((0, 5), np.uint8), 4, 4)
    with pytest.raises(ConfigError, match="0 x 5"):
        evaluation_crop(np.zeros((0, 5), np.uint8), 4)


def test_crop_boxes_follow_the_law() -> None:
    """On a large square nearly every first try fits: area uniform, aspect log-uniform, place uniform."""
    rng = stream(0, "boxes")
    boxes = np.array([crop_box(4000, 4000, (0.05, 0.32), RATIO, rng) for _ in range(4000)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 4000**2, boxes[:, 3] / boxes[:, 2]
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(area, quantiles), 0.05 + 0.27 * quantiles, atol=0.008)
    np.testing.assert_allclose(
        np.quantile(np.log(aspect), quantiles), np.log(0.75) + 2 * np.log(4 / 3) * quantiles, atol=0.02
    )
    np.testing.assert_allclose(np.quantile(boxes[:, 0] / (4000 - boxes[:, 2]), quantiles), quantiles, atol=0.025)
    np.testing.assert_allclose(np.quantile(boxes[:, 1] / (4000 - boxes[:, 3]), quantiles), quantiles, atol=0.025)
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.05


def test_crop_boxes_reach_every_place_of_a_small_image() -> None:
    rng = stream(0, "places")
    boxes = [crop_box(6, 5, (0.1, 0.4), RATIO, rng) for _ in range(3000)]
    seen = np.zeros((6, 5), int)
    for top, left, height, width in boxes:
        assert 0 <= top <= top + height <= 6
        assert 0 <= left <= left + width <= 5
        seen[top : top + height, left : left + width] += 1
    assert seen.min() > 0


def law_by_rejection(height: int, width: int, scale: tuple[float, float], count: int) -> np.ndarray:
    """The published procedure, written plainly: areas of 10 tries, then the centred fallback."""
    rng = np.random.default_rng(5)
    areas = []
    for _ in range(count):
        for _attempt in range(10):
            target = height * width * rng.uniform(*scale)
            aspect = np.exp(rng.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
            w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        areas.append(h * w)
    return np.array(areas)


@pytest.mark.parametrize("size", [(300, 300), (200, 420)])
def test_crop_areas_equal_the_published_procedure_where_tries_fail(size: tuple[int, int]) -> None:
    rng = stream(0, "areas")
    ours = np.array([np.prod(crop_box(*size, SCALE, RATIO, rng)[2:]) for _ in range(4000)])
    theirs = law_by_rejection(*size, SCALE, 4000)
    quantiles = np.linspace(0.05, 0.95, 19)
    scale = size[0] * size[1]
    np.testing.assert_allclose(np.quantile(ours, quantiles) / scale, np.quantile(theirs, quantiles) / scale, atol=0.02)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100)), ((1, 9), (0, 4, 1, 1))]
)
def test_an_image_too_thin_for_any_try_gives_the_centre(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert crop_box(*size, (0.9, 1.0), RATIO, stream(0, "thin")) == expected


def test_random_crops_are_repeatable_and_square() -> None:
    pixels = image(90, 120)
    first = random_resized_crop(pixels, 48, (0.75, 1.0), RATIO, stream(3, "crop"))
    assert first.shape == (48, 48)
    assert np.array_equal(first, random_resized_crop(pixels, 48, (0.75, 1.0), RATIO, stream(3, "crop")))
    assert not np.array_equal(first, random_resized_crop(pixels, 48, (0.75, 1.0), RATIO, stream(4, "crop")))


@pytest.mark.parametrize("size", [(64, 64), (64, 101), (131, 64), (30, 50), (64, 65)])
def test_evaluation_crop_is_the_centre_of_the_shorter_side(size: tuple[int, int]) -> None:
    pixels = np.zeros(size, np.uint8)
    pixels[size[0] // 2 - 3 : size[0] // 2 + 3, size[1] // 2 - 3 : size[1] // 2 + 3] = 200
    crop = evaluation_crop(pixels, 64)
    assert crop.shape == (64, 64)
    rows, columns = np.nonzero(crop > 100)
    assert abs(rows.mean() - 31.5) <= 1.0
    assert abs(columns.mean() - 31.5) <= 1.0


def test_evaluation_crop_of_the_right_square_is_the_image() -> None:
    pixels = image(64, 64)
    assert np.array_equal(evaluation_crop(pixels, 64), pixels)


def test_normalise_is_one_fixed_recipe() -> None:
    """No crop's own range is used (defect C10 of the public code): a constant crop gives a constant, not NaN."""
    recipe = preprocessing("hilum-grey-1")
    assert (recipe.mean, recipe.std) == (0.5, 0.25)
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (levels.double() / 255 - 0.5) / 0.25
    found = normalise(levels, recipe)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    flat = normalise(torch.full((1, 1, 4, 4), 9, dtype=torch.uint8), recipe)
    assert flat.isfinite().all()
    assert (flat == flat[0, 0, 0, 0]).all()
    assert torch.equal(levels.flatten(), torch.arange(256, dtype=torch.uint8))  # the input is untouched


def test_an_imported_recipe_stretches_each_square_to_its_own_range() -> None:
    recipe = preprocessing("chexfound-1")
    levels = torch.tensor([[[[10, 20], [30, 50]]], [[[0, 255], [51, 102]]], [[[7, 7], [7, 7]]]], dtype=torch.uint8)
    expected = [[0, 0.25, 0.5, 1], [0, 1, 0.2, 0.4], [0, 0, 0, 0]]
    found = normalise(levels, recipe).flatten(1) * 0.25 + 0.5
    torch.testing.assert_close(found, torch.tensor(expected))


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(PreprocessingMismatchError, match=r"'peer-minmax'.*knows chexfound-1, chexpert-1, hilum-grey-1"):
        preprocessing("peer-minmax")
