"""The search for copies against brute force, and planted copies of phantoms and real films against both thresholds."""

import cv2
import numpy as np
import pytest

from hilum.core.tracking import progress
from hilum.data.hashing import packed, perceptual_hash, thumbnail
from hilum.data.images import read_image
from hilum.data.near_duplicates import MAX_DISTANCE, MIN_CORRELATION, WAYS, correlations, search
from hilum.data.phantoms.render import render_study

ALL = np.uint64(2**64 - 1)


def turned(words: np.ndarray, way: int) -> np.ndarray:
    """What a hash becomes when the picture is turned: half the bits flip, all, or the other half."""
    flips = {0: (0, 0, 0, 0), 1: (0, 0, 1, 1), 2: (1, 1, 1, 1), 3: (1, 1, 0, 0)}[way]
    return words ^ (np.array(flips, np.uint64) * ALL)


def brute(queries: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Distances (way, query, pool), bit by bit."""
    bits = [np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1).astype(int) for words in (queries, pool)]
    result = []
    for way in range(4):
        other = np.unpackbits(np.ascontiguousarray(turned(pool, way)).view(np.uint8), axis=1).astype(int)
        result.append((bits[0][:, None, :] != other[None]).sum(axis=2))
    return np.stack(result)


def some_hashes(count: int, seed: int) -> np.ndarray:
    """Random hashes, and for every fourth one a neighbour with up to 90 bits changed, turned some way."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    for place in range(3, count, 4):
        bits = np.unpackbits(words[place - 1].view(np.uint8))
        bits[rng.choice(256, rng.integers(0, 91), replace=False)] ^= 1
        words[place] = turned(np.packbits(bits).view(np.uint64), int(rng.integers(4)))
    return words


def test_the_search_finds_exactly_the_pairs_within_the_distance():
    queries, pool = some_hashes(60, 0), some_hashes(90, 1)
    pool[40:50] = queries[:10]
    expected = brute(queries, pool)
    pairs = search(queries, pool, max_distance=100, nearest=90)
    assert set(zip(pairs.query.tolist(), pairs.other.tolist(), strict=True)) == {
        (query, other) for query, other in np.argwhere(expected.min(axis=0) <= 100).tolist()
    }
    for query, other, distance, way in zip(*pairs, strict=True):
        assert expected[way, query, other] == distance == expected[:, query, other].min()
    assert len(pairs.query) > 10


def test_within_one_set_each_pair_comes_once_across_block_borders():
    words = some_hashes(5000, 2)  # more than one block of columns, and of rows
    pairs = search(words, max_distance=60)
    planted = {
        (place - 1, place)
        for place in range(3, 5000, 4)
        if min(brute(words[place - 1 : place], words[place : place + 1])[:, 0, 0]) <= 60
    }
    assert planted <= set(zip(pairs.query.tolist(), pairs.other.tolist(), strict=True))
    assert len(planted) > 500
    assert (pairs.query < pairs.other).all()
    assert len(set(zip(pairs.query.tolist(), pairs.other.tolist(), strict=True))) == len(pairs.query)


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("bits", [0, MAX_DISTANCE, MAX_DISTANCE + 1])
def test_the_threshold_is_met_to_the_bit(way, bits):
    word = np.random.default_rng(way).integers(0, 2**64, (1, 4), dtype=np.uint64)
    flipped = np.unpackbits(word[0].view(np.uint8))
    flipped[np.random.default_rng(1).choice(256, bits, replace=False)] ^= 1
    other = turned(np.packbits(flipped).view(np.uint64)[None], way)
    pairs = search(word, other)
    assert pairs.distance.tolist() == ([bits] if bits <= MAX_DISTANCE else [])
    assert pairs.way.tolist() == ([way] if bits <= MAX_DISTANCE else [])


def test_only_the_nearest_are_kept_so_that_blank_films_do_not_fill_the_memory():
    words = np.repeat(some_hashes(1, 3), 9000, axis=0)
    words[8000:, 0] ^= np.uint64(1)
    pairs = search(words[:40], words[40:], nearest=8)
    assert len(pairs.query) == 40 * 8
    assert set(pairs.distance.tolist()) == {0}
    assert pairs.other.reshape(40, 8).tolist() == [list(range(8))] * 40


def test_nothing_to_search():
    none = packed([])
    assert [len(part) for part in search(none, none)] == [0, 0, 0, 0]
    assert [len(part) for part in search(none)] == [0, 0, 0, 0]
    assert len(search(some_hashes(3, 4), none).query) == 0


def test_progress_counts_the_queries(capsys):
    with progress("search", 600, "images") as bar:
        search(some_hashes(600, 5), some_hashes(10, 6), bar=bar)
    assert "600/600" in capsys.readouterr().err


def rng_noise(pixels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(pixels.size).integers(-2, 3, pixels.shape)
    return np.clip(pixels.astype(int) + noise, 0, 255).astype(np.uint8)


def reencoded(pixels: np.ndarray) -> np.ndarray:
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)


def resized(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, (170, 160), interpolation=cv2.INTER_AREA)


COPIES = {
    "re-encoded": (reencoded, 0),
    "resized": (resized, 0),
    "+-2 grey": (rng_noise, 0),
    "two brighter": (lambda pixels: cv2.add(pixels, 2), 0),
    "equalised": (cv2.equalizeHist, 0),
    "mirrored": (lambda pixels: np.ascontiguousarray(pixels[:, ::-1]), 1),
    "inverted": (lambda pixels: 255 - pixels, 2),
    "mirrored and inverted": (lambda pixels: np.ascontiguousarray(255 - pixels[:, ::-1]), 3),
}
"""Kind -> the copy, and its position in `WAYS`."""


def confirmed(queries: list[np.ndarray], pool: list[np.ndarray]) -> list[tuple[int, int, int]]:
    """(query, other, way) of pictures that both thresholds call copies."""
    small = [[thumbnail(pixels) for pixels in pictures] for pictures in (queries, pool)]
    words = [packed([perceptual_hash(one) or "" for one in thumbnails]) for thumbnails in small]
    pairs = search(words[0], words[1], nearest=len(pool))
    values = correlations(
        [small[0][place] for place in pairs.query], [small[1][place] for place in pairs.other], pairs.way.tolist()
    )
    return [
        (query, other, way)
        for query, other, way, value in zip(pairs.query, pairs.other, pairs.way, values, strict=True)
        if value >= MIN_CORRELATION
    ]


def check(pictures: list[np.ndarray], kind: str) -> None:
    """At least 95 of 100 copies are found, turned the right way; nothing else is."""
    make, way = COPIES[kind]
    assert WAYS[way] == kind or way == 0
    found = confirmed([make(pixels) for pixels in pictures], pictures)
    right = [(place, place, way) for place in range(len(pictures))]
    assert len(set(found) & set(right)) >= 0.95 * len(pictures)
    assert not set(found) - set(right)


@pytest.fixture(scope="module")
def phantoms() -> list[np.ndarray]:
    return [render_study(5, patient, 0, ("PA",), {}, [(192, 192)])[0].pixels for patient in range(100)]


@pytest.fixture(scope="module")
def films(nih_sample) -> list[np.ndarray]:
    files = sorted(nih_sample.glob("**/*.png"))
    patients: dict[str, np.ndarray] = {}
    for file in files[::2]:
        patients.setdefault(file.name[:8], read_image(file).pixels)
    return list(patients.values())[:100]


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_of_phantoms_are_found_and_nothing_else(phantoms, kind):
    check(phantoms, kind)


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_of_real_films_are_found_and_nothing_else(films, kind):
    assert len(films) == 100
    check(films, kind)


def test_what_a_cropped_border_does_is_known(phantoms):
    """The limit that the documents state: 1 % off each side is mostly found, 5 % never."""
    for share, low, high in ((0.01, 50, 100), (0.05, 0, 0)):
        cut = max(1, round(192 * share))
        found = confirmed([pixels[cut:-cut, cut:-cut] for pixels in phantoms], phantoms)
        assert low <= len(found) <= high
        assert all(query == other for query, other, _ in found)


@pytest.mark.slow
def test_all_of_the_real_sample_is_distinct(nih_sample):
    pictures = [read_image(file).pixels for file in sorted(nih_sample.glob("**/*.png"))]
    small = [thumbnail(pixels) for pixels in pictures]
    words = packed([perceptual_hash(one) or "" for one in small])
    pairs = search(words)
    values = correlations([small[i] for i in pairs.query], [small[i] for i in pairs.other], pairs.way.tolist())
    assert not (values >= MIN_CORRELATION).any()
