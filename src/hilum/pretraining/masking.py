"""Block masks for iBOT: which patches of which global crops the student does not see.

The law is that of DINOv2 and BEiT (facebookresearch/dinov2 data/masking.py, data/collate.py); here all crops of a
batch are drawn in lockstep on arrays. Knows nothing of images.
"""

import math

import numpy as np
from jaxtyping import Bool, Float32

from hilum.core.errors import ConfigError

SMALLEST_BLOCK = 4
"""Cells that a block is asked to have at least."""
TRIES = 10
LOG_ASPECT = math.log(1 / 0.3)
"""Block aspects are log-uniform between 0.3 and 1 / 0.3."""


def block_masks(
    batch: int,
    grid: tuple[int, int],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
    global_crops: int = 2,
) -> Bool[np.ndarray, "GB N"]:
    """Draw masks for the global crops of a batch; rows are crop-major (all first crops, then all second crops).

    Of the GB crops, int(GB * probability) are masked. The i-th of these n gets int(N * u) masked patches, u uniform
    between the i-th and the next of n + 1 edges evenly spaced over `ratio`, so that every batch spans the range;
    they are then put in random order. The requested number is never exceeded and nearly always reached.

    Args:
        batch: images B.
        grid: rows and columns of patches.
        rng: draws everything.
        ratio: smallest and largest share of masked patches of a masked crop.
        probability: share of masked crops.
        global_crops: crops an image, G.

    Raises:
        ConfigError: shares outside [0, 1], or a grid too small to mask one patch.
    """
    check_masks(batch, grid, ratio, probability, global_crops)
    crops, cells = global_crops * batch, grid[0] * grid[1]
    masked = int(crops * probability)
    edges = np.linspace(*ratio, masked + 1)
    wanted = (cells * rng.uniform(edges[:-1], edges[1:])).astype(np.int64)
    masks = np.zeros((crops, cells), bool)
    masks[:masked] = fill_blocks(wanted, grid, rng).reshape(masked, cells)
    return masks[rng.permutation(crops)]


def check_masks(
    batch: int, grid: tuple[int, int], ratio: tuple[float, float], probability: float, global_crops: int
) -> None:
    """Refuse what `block_masks` cannot draw; arguments and errors are its own."""
    height, width = grid
    if not 0 <= ratio[0] <= ratio[1] <= 1 or not 0 <= probability <= 1:
        raise ConfigError(f"Masks: expected shares in [0, 1], found ratio {ratio} and probability {probability}.")
    if int(global_crops * batch * probability) and int(height * width * ratio[1]) < 1:
        raise ConfigError(
            f"mask_ratio: a grid of {height} x {width} patches is too small for a share of {ratio[1]}. Choose a larger "
            "one, or mask_probability=0 to mask nothing."
        )


def fill_blocks(wanted: np.ndarray, grid: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "n H W"]:
    """Cover each grid with random rectangles until exactly `wanted` cells are covered or none more can be placed.

    A rectangle has an area uniform between 4 cells and what is still wanted, at most half the rows times the columns
    (98, 210, 392, 512 cells at 224, 336, 448, 512 pixels and patch 16), and a log-uniform aspect. It is taken when it
    fits and covers at least one new cell and no more than wanted; after 10 failures the grid is left as it is.

    Args:
        wanted: cells to cover, per grid.
        grid: rows and columns.
        rng: draws everything.
    """
    height, width = grid
    largest = height // 2 * width
    covered = np.zeros((len(wanted), height, width), bool)
    left = wanted.copy()
    active = np.flatnonzero(left > 0)
    row_of, column_of = np.arange(height)[:, None], np.arange(width)
    while len(active):
        rooms = np.minimum(left[active], largest)[:, None]
        area_at, aspect_at, top_at, left_at = rng.random((4, len(active), TRIES))
        area = SMALLEST_BLOCK + (rooms - SMALLEST_BLOCK) * area_at
        aspect = np.exp((2 * aspect_at - 1) * LOG_ASPECT)
        rows, columns = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
        fits = (rows < height) & (columns < width)
        rows, columns = np.minimum(rows, height), np.minimum(columns, width)
        top = (top_at * (height - rows + 1)).astype(int)
        start = (left_at * (width - columns + 1)).astype(int)
        new = rows * columns - _covered_inside(covered[active], top, start, rows, columns)
        good = fits & (new > 0) & (new <= rooms)
        placed = good.any(axis=1)
        active, pick = active[placed], good[placed].argmax(axis=1)
        chosen = (np.flatnonzero(placed), pick)
        low, first = top[chosen][:, None, None], start[chosen][:, None, None]
        high, last = low + rows[chosen][:, None, None], first + columns[chosen][:, None, None]
        covered[active] |= (row_of >= low) & (row_of < high) & (column_of >= first) & (column_of < last)
        left[active] -= new[chosen]
        active = active[left[active] > 0]
    return covered


def _covered_inside(
    covered: np.ndarray, top: np.ndarray, start: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Covered cells inside each candidate rectangle, by summed-area tables; (n, TRIES)."""
    table = np.zeros((len(covered), covered.shape[1] + 1, covered.shape[2] + 1), np.int32)
    table[:, 1:, 1:] = covered.cumsum(axis=1, dtype=np.int32).cumsum(axis=2, dtype=np.int32)
    grid = np.arange(len(covered))[:, None]
    bottom, end = top + rows, start + columns
    return table[grid, bottom, end] - table[grid, top, end] - table[grid, bottom, start] + table[grid, top, start]


def mask_weights(masks: Bool[np.ndarray, "GB N"]) -> Float32[np.ndarray, " M"]:
    """Weight of each masked patch in row-major order: 1 / masked patches of its crop, so that each crop sums to 1."""
    counts = masks.sum(axis=1)
    return np.repeat(1.0 / np.maximum(counts, 1), counts).astype(np.float32)
