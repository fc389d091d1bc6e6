import math
import random

import numpy as np
import pytest

from hilum.core.errors import ConfigError
from hilum.core.seeding import stream
from hilum.pretraining.masking import block_masks, fill_blocks, mask_weights

GRIDS = [(8, 8), (14, 14), (21, 21), (14, 20), (32, 32)]


@pytest.mark.parametrize("grid", GRIDS)
def test_half_of_the_crops_are_masked_between_a_tenth_and_a_half(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    for seed in range(20):
        masks = block_masks(8, grid, stream(seed, "masks"))
        assert masks.shape == (16, cells)
        counts = np.sort(masks.sum(axis=1))
        assert (counts[:8] == 0).all()
        edges = np.linspace(0.1, 0.5, 9)
        # Sorted, the i-th masked crop lies between the i-th and the next edge; a few fall short by a cell or so.
        assert (counts[8:] <= cells * edges[1:]).all()
        assert (counts[8:] >= np.floor(cells * edges[:-1]) - max(2, 0.02 * cells)).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_requested_number_is_nearly_always_reached_and_never_passed(grid: tuple[int, int]) -> None:
    rng = stream(0, "wanted")
    wanted = rng.integers(1, grid[0] * grid[1] // 2, 400)
    counts = fill_blocks(wanted, grid, rng).sum(axis=(1, 2))
    assert (counts <= wanted).all()
    assert counts.sum() > 0.99 * wanted.sum()


def test_mean_shares_are_the_published_ones() -> None:
    shares = np.stack([block_masks(16, (14, 14), stream(seed, "share")).mean(axis=1) for seed in range(40)])
    assert abs(shares.mean() - 0.15) < 0.005
    assert abs(shares[shares > 0].mean() - 0.30) < 0.01


def test_weights_of_an_image_sum_to_one_in_the_order_of_the_mask() -> None:
    masks = block_masks(6, (14, 14), stream(0, "masks"))
    weights = mask_weights(masks)
    rows = np.nonzero(masks)[0]
    assert weights.dtype == np.float32
    assert len(weights) == masks.sum()
    for row in range(12):
        own = weights[rows == row]
        if masks[row].any():
            assert abs(own.sum() - 1) < 1e-5
            np.testing.assert_allclose(own, 1 / masks[row].sum())
    assert not masks[~np.isin(np.arange(12), rows)].any()


def test_masked_crops_are_in_random_order() -> None:
    masked = np.stack([block_masks(8, (8, 8), stream(seed, "order")).any(axis=1) for seed in range(400)])
    np.testing.assert_allclose(masked.mean(axis=0), 0.5, atol=0.1)


def plain_sampler(wanted: int, height: int, width: int) -> np.ndarray:
    """The published block sampler, one grid at a time, written from its description."""
    mask = np.zeros((height, width), bool)
    left = wanted
    while left > 0:
        room = min(left, height // 2 * width)
        for _ in range(10):
            area = random.uniform(4, room)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, start = random.randint(0, height - h), random.randint(0, width - w)
            new = h * w - mask[top : top + h, start : start + w].sum()
            if 0 < new <= room:
                mask[top : top + h, start : start + w] = True
                left -= new
                break
        else:
            break
    return mask


@pytest.mark.parametrize("wanted", [25, 60, 97])
def test_blocks_follow_the_same_law_as_the_plain_sampler(wanted: int) -> None:
    """Coverage by place, and roughness (borders between masked and seen), of lockstep and one-by-one sampling."""
    ours = fill_blocks(np.full(1500, wanted), (14, 14), stream(0, "law"))
    state = random.getstate()
    random.seed(3)
    theirs = np.stack([plain_sampler(wanted, 14, 14) for _ in range(1500)])
    random.setstate(state)

    def borders(masks: np.ndarray) -> np.ndarray:
        return (masks[:, 1:] != masks[:, :-1]).sum(axis=(1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum(axis=(1, 2))

    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.065)  # about 4.5 standard errors
    deviation = borders(theirs).std() / math.sqrt(1500)
    assert abs(borders(ours).mean() - borders(theirs).mean()) < 6 * deviation
    assert abs(borders(ours).std() / borders(theirs).std() - 1) < 0.15
    assert abs(ours.sum(axis=(1, 2)).mean() - theirs.sum(axis=(1, 2)).mean()) < 0.1


@pytest.mark.parametrize(("pixels", "cap"), [(224, 98), (336, 210), (448, 392), (512, 512)])
def test_the_largest_block_is_the_published_one(pixels: int, cap: int) -> None:
    """A single block never covers more than half of the rows times the columns."""
    side = pixels // 16
    assert side // 2 * side == cap
    few = fill_blocks(np.full(60, side * side), (side, side), stream(0, "cap"))
    assert few.mean() > 0.9


def test_masks_are_repeatable() -> None:
    assert np.array_equal(block_masks(4, (8, 8), stream(1, "m")), block_masks(4, (8, 8), stream(1, "m")))
    assert not np.array_equal(block_masks(4, (8, 8), stream(1, "m")), block_masks(4, (8, 8), stream(2, "m")))


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_share_of_masked_crops(probability: float) -> None:
    masks = block_masks(8, (14, 14), stream(0, "p"), probability=probability)
    assert masks.any(axis=1).sum() == int(16 * probability)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ratio": (0.5, 0.1)}, "shares"), ({"probability": 1.5}, "shares"), ({"ratio": (0.0, 0.01)}, "too small")],
)
def test_impossible_masks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block_masks(4, (8, 8), stream(0, "bad"), **options)
