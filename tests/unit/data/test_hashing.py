"""Hashes of pictures: what changes them and what does not, and a transform computed another way."""

import hashlib

import cv2
import numpy as np
import pytest

from hilum.data.hashing import BITS, detail, packed, perceptual_hash, pixel_sha256, sampled, thumbnail
from hilum.data.images import read_image


def picture(seed: int, height: int = 300, width: int = 260) -> np.ndarray:
    """A smooth field with structure at several scales and a little grain."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.normal(0, 1, (n, n)).astype(np.float32), (width, height)) for n in (5, 9, 17, 40)]
    field = sum(layers) + rng.normal(0, 0.05, (height, width))
    return np.clip(128 + 40 * field, 0, 255).astype(np.uint8)


def distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def phash(pixels: np.ndarray) -> str:
    hashed = perceptual_hash(thumbnail(pixels))
    assert hashed is not None
    return hashed


def test_the_hash_is_the_signs_of_a_cosine_transform_of_ranks():
    small = thumbnail(picture(0))
    flat = small.reshape(-1).astype(int)
    ranks = np.array([(flat < value).sum() + (flat == value).sum() / 2 for value in flat]).reshape(64, 64)
    places = (np.arange(64) + 0.5) * np.pi / 64
    basis = np.cos(np.arange(1, 17)[:, None] * places[None, :])
    spectrum = basis @ (ranks - ranks.mean()) @ basis.T
    even, odd = spectrum[:, 1::2], spectrum[:, 0::2]
    expected = "".join(str(int(value > 0)) for value in np.concatenate([even, odd], axis=None))
    assert perceptual_hash(small) == f"{int(expected, 2):064x}"


def test_mirrored_and_inverted_are_bits_flipped():
    """Exactly, as long as the thumbnail is mirrored or inverted exactly."""
    small = thumbnail(picture(1))
    plain = int(perceptual_hash(small) or "", 16)
    assert int(perceptual_hash(np.ascontiguousarray(small[:, ::-1])) or "", 16) == plain ^ (2**128 - 1)
    assert int(perceptual_hash(255 - small) or "", 16) == plain ^ (2**256 - 1)


def test_contrast_does_not_matter_and_structure_does():
    pixels = picture(2)
    curve = (255 * (np.arange(256) / 255) ** 0.7).astype(np.uint8)
    assert distance(phash(pixels), phash(cv2.LUT(pixels, curve))) <= 10
    assert distance(phash(pixels), phash(cv2.equalizeHist(pixels))) <= 10
    distances = [distance(phash(pixels), phash(picture(seed))) for seed in range(3, 40)]
    assert min(distances) > 85
    assert abs(np.mean(distances) - BITS / 2) < 8


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (300, 261), (1500, 1301)])
def test_a_thumbnail_is_the_mean_over_areas(shape):
    pixels = picture(7, *shape)
    expected = cv2.resize(pixels.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(thumbnail(pixels) - expected).max() <= 0.51


def test_a_picture_smaller_than_its_thumbnail_is_hashed_too():
    assert distance(phash(picture(8, 50, 40)), phash(cv2.resize(picture(8, 50, 40), (80, 100)))) <= 40


def test_an_empty_picture_has_no_perceptual_hash():
    assert perceptual_hash(np.full((64, 64), 7, np.uint8)) is None
    assert not detail(np.full((64, 64), 7, np.uint8)).any()


def test_packed_words_hold_the_hex_digits_and_nothing_else_is_taken():
    hashes = [phash(picture(seed)) for seed in range(3)]
    words = packed(hashes)
    assert words.shape == (3, 4)
    assert [row.tobytes().hex() for row in words] == hashes
    assert packed([]).shape == (0, 4)
    with pytest.raises(ValueError, match="64 hex"):
        packed(["ab" * 31, "ab" * 33])


@pytest.mark.parametrize("rows", [1, 127, 128, 255, 256, 2500])
def test_the_sample_is_whole_up_to_255_rows(rows):
    pixels = np.arange(rows * 3, dtype=np.int64).astype(np.uint8).reshape(rows, 3)
    kept = sampled(pixels)
    assert len(kept) == (rows if rows < 256 else len(pixels[:: rows // 128]))
    assert 128 <= len(kept) <= 255 or rows < 128
    changed = pixels.copy()
    changed[0, 0] ^= 1
    assert pixel_sha256(kept, rows) != pixel_sha256(sampled(changed), rows)


def test_the_digest_is_over_size_and_values_in_whatever_word():
    pixels = picture(4, 40, 30)
    digest = pixel_sha256(sampled(pixels), 40)
    assert digest == hashlib.sha256(b"40 30 1\n" + pixels.tobytes()).hexdigest()
    assert digest == pixel_sha256(sampled(pixels.astype(np.int16)), 40)
    assert digest == pixel_sha256(sampled(pixels.astype(np.uint16)), 40)
    assert digest != pixel_sha256(sampled(pixels.reshape(30, 40)), 30)
    deep = pixels.astype(np.uint16) * 16
    assert pixel_sha256(sampled(deep), 40) == hashlib.sha256(b"40 30 4\n" + deep.astype("<i4").tobytes()).hexdigest()


def test_one_pixel_changes_the_digest_of_a_file_and_the_shrinking_does_not(tmp_path):
    pixels = picture(5)
    for name, values in (("a", pixels), ("b", pixels)):
        if name == "b":
            values = values.copy()
            values[10, 10] ^= 1
        cv2.imwrite(str(tmp_path / f"{name}.png"), values)
    read = {
        (name, side): read_image(tmp_path / f"{name}.png", short_side=side) for name in "ab" for side in (64, 128, None)
    }
    digests = {key: pixel_sha256(image.sample, image.rows) for key, image in read.items()}
    assert len({digests["a", side] for side in (64, 128, None)}) == 1
    assert digests["a", None] != digests["b", None]
    assert distance(phash(read["a", 128].pixels), phash(read["a", None].pixels)) <= 10


def test_two_encodings_of_the_same_pixels_agree(tmp_path):
    pixels = picture(6)
    cv2.imwrite(str(tmp_path / "grey.png"), pixels)
    cv2.imwrite(str(tmp_path / "colour.png"), cv2.merge([pixels] * 3), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    digests = {
        pixel_sha256(image.sample, image.rows)
        for image in (read_image(tmp_path / name) for name in ("grey.png", "colour.png"))
    }
    assert len(digests) == 1
