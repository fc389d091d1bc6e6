"""Noise tiles made once per process from a fixed seed, cropped at random places and scaled to the image.

A fresh noise field per lesion would cost more than everything else in an image.
"""

from functools import cache

import cv2
import numpy as np

from hilum.core.seeding import stream

TILE = 1024
PIXELS_PER_CM = 13.0


@cache
def tile(kind: str) -> np.ndarray:
    """A (1024, 1024) float32 texture.

    cloud, blotch and reticular are in [0, 1]; grain and quantum have mean 0 and deviation 1.
    """
    rng = stream(0, "phantom textures", kind)
    if kind == "quantum":
        return _standard(cv2.GaussianBlur(_white(rng), (0, 0), 0.6))
    if kind == "grain":
        return _standard(_octaves(rng, (4, 8)))
    if kind == "cloud":
        return np.clip(0.5 + 0.28 * _standard(_octaves(rng, (10, 24, 60))), 0, 1)
    if kind == "blotch":
        return np.clip(0.5 + 0.45 * _standard(_octaves(rng, (6, 14))), 0, 1)
    ridges = 1 - np.minimum(np.abs(_standard(_octaves(rng, (5,)))), 1.2) / 1.2
    coarse = 1 - np.minimum(np.abs(_standard(_octaves(rng, (9,)))), 0.9) / 0.9
    return np.clip(0.6 * ridges**2 + 0.6 * coarse**2, 0, 1)


def crop(kind: str, seed: int, height: int, width: int, pixels_per_cm: float) -> np.ndarray:
    """The crop of a tile that `seed` picks, (height, width), in anatomical size whatever the resolution."""
    rows = min(max(round(height / pixels_per_cm * PIXELS_PER_CM), 2), TILE)
    columns = min(max(round(width / pixels_per_cm * PIXELS_PER_CM), 2), TILE)
    top, left = seed % (TILE - rows + 1), seed // 1013 % (TILE - columns + 1)
    piece = tile(kind)[top : top + rows, left : left + columns]
    return cv2.resize(piece, (width, height), interpolation=cv2.INTER_AREA if rows > height else cv2.INTER_LINEAR)


def pixel_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Detector noise of deviation 1 at the resolution of the image."""
    source = tile("quantum")
    while source.shape[0] < height or source.shape[1] < width:
        source = np.tile(source, (2, 2))
    top, left = (int(rng.integers(have - want + 1)) for have, want in zip(source.shape, (height, width), strict=True))
    return source[top : top + height, left : left + width]


def _white(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((TILE, TILE), dtype=np.float32)


def _octaves(rng: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    total = np.zeros((TILE, TILE), np.float32)
    for size in sizes:
        coarse = rng.standard_normal((TILE // size + 3, TILE // size + 3), dtype=np.float32)
        total += cv2.resize(coarse, (TILE, TILE), interpolation=cv2.INTER_CUBIC)
    return total


def _standard(field: np.ndarray) -> np.ndarray:
    return ((field - field.mean()) / field.std()).astype(np.float32)
