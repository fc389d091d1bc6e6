"""What makes two pictures the same: a SHA-256 of pixels, a 256-bit perceptual hash, and a correlation.

`hilum build` computes the hashes when it decodes an image; `hilum audit` compares them. The SHA-256 is over the
picture as decoded, of full size, before any intensity curve, so it depends on neither the store nor the recipe: its
height, its width, and about 128 evenly spaced rows (all of them up to 255). Every row would cost a fifth of decoding
a JPEG, and two films that agree in every twentieth row are the same film. The perceptual hash is made of the picture as
stored, or as read; between sizes it differs by a few bits.

The perceptual hash is the signs of 16 x 16 coefficients of a cosine transform: frequencies 1 to 16 in both directions
of the 64 x 64 thumbnail, whose grey values are replaced by their ranks. Ranks make it indifferent to contrast,
windowing and histogram equalisation; signs make mirrored and inverted copies a matter of flipping bits, exactly. The
frequencies 0 are left out: they say that a chest has two sides, which is true of every film.
"""

import hashlib
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32, UInt8, UInt64

from hilum.data.area import area_mean

SAMPLED_ROWS = 128
"""Rows that the SHA-256 of pixels is over, at least, where a picture has so many."""
BITS = 256
SIDE = 64
"""Pixels on a side of a thumbnail."""
FREQUENCIES = 16
DETAIL = 3.0
"""Pixels of a thumbnail: structure that is broader (what all chests share) is taken away before correlating."""


def sampled(pixels: np.ndarray) -> np.ndarray:
    """The rows of a picture of full size that its SHA-256 is over: evenly spaced, a copy.

    Args:
        pixels: (H, W), or (H, W, 3) colour, as decoded.
    """
    return np.ascontiguousarray(pixels[:: max(1, len(pixels) // SAMPLED_ROWS)])


def pixel_sha256(sample: np.ndarray, rows: int) -> str:
    """64 hex digits; the same for the same values, in whatever number of bits they are kept.

    Args:
        sample: the `sampled` rows.
        rows: of the picture that they were sampled from.
    """
    whole = sample if sample.dtype == np.uint8 else sample.astype("<i4")
    if whole.dtype != np.uint8 and whole.min() >= 0 and whole.max() <= 255:
        whole = whole.astype(np.uint8)
    digest = hashlib.sha256(b"%d %d %d\n" % (rows, sample.shape[1], whole.itemsize))
    digest.update(whole.data)
    return digest.hexdigest()


def thumbnail(pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "64 64"]:
    """The picture squeezed to 64 x 64 by area, whatever its aspect."""
    if min(pixels.shape) < SIDE:
        return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return cv2.convertScaleAbs(area_mean(pixels, SIDE, SIDE))  # rounds to nearest; nothing is negative


def perceptual_hash(small: UInt8[np.ndarray, "64 64"]) -> str | None:
    """256 bits as hex: first those that mirroring leaves alone (even horizontal frequencies), then those it flips."""
    if small.min() == small.max():
        return None
    spectrum = cv2.dct(_ranks(small))[1 : FREQUENCIES + 1, 1 : FREQUENCIES + 1]
    bits = np.concatenate([spectrum[:, 1::2], spectrum[:, 0::2]], axis=None) > 0
    return np.packbits(bits).tobytes().hex()


def packed(hashes: Sequence[str]) -> UInt64[np.ndarray, "n 4"]:
    """Perceptual hashes as four words each, for counting bits; words 0 and 1 do not change by mirroring.

    Raises:
        ValueError: not 64 hex digits.
    """
    content = bytes.fromhex("".join(hashes))
    if len(content) != 32 * len(hashes) or any(len(text) != 64 for text in hashes):
        raise ValueError("expected perceptual hashes of 64 hex digits")
    return np.frombuffer(content, np.uint64).reshape(-1, 4)


def detail(small: UInt8[np.ndarray, "64 64"]) -> Float32[np.ndarray, "64 64"]:
    """The fine structure of a thumbnail, of mean 0 and norm 1, for `np.vdot`; all zeros for an empty picture."""
    ranks = _ranks(small)
    fine = ranks - cv2.GaussianBlur(ranks, (0, 0), DETAIL)
    fine -= fine.mean()
    norm = float(np.linalg.norm(fine))
    return fine / norm if norm > 0 else fine


def _ranks(small: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Mid-ranks in (-0.5, 0.5): unchanged by any increasing curve, and negated by inversion."""
    counts = np.bincount(small.reshape(-1), minlength=256)
    middle = (np.cumsum(counts) - counts / 2) / small.size - 0.5
    return middle.astype(np.float32)[small]
