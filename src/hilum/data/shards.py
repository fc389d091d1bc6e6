"""The files of a store from the writing side: records, shards, index.

A record is one image's bytes; a shard is records end to end, of one dataset and licence; the index says where each
is. In a store that reads its images in place, a record is the SHA-256 of the image's file. Used by store.py (arrays
in memory) and build.py (source files); reading is in store.py.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from hilum.core.checksum import crc32
from hilum.core.errors import StoreError, UnknownNameError
from hilum.core.files import atomic_path, flush_to_disk, sha256_file, write_json

FORMAT = "hilum-store-1"
ENCODINGS: tuple[str, ...] = ("jpeg95", "raw", "png")
IN_PLACE = "files"
"""The encoding of a store without pixels of its own: each record is the SHA-256 of a file that stays where it is."""

TEXT_COLUMNS: tuple[str, ...] = ("uid", "image_id", "patient", "study")
"""Kept in the index as UTF-8 byte strings of fixed width."""
PICTURE_COLUMN = "picture"
"""Kept likewise where an image is known under another dataset's name too: the identity of the picture itself."""
CODED_COLUMNS: tuple[str, ...] = ("view", "split", "dataset")
"""Kept in the index as one small code per image and a vocabulary."""
VIEW_SOURCE_COLUMN = "view_source"
"""Kept likewise where the manifest says it: whether the view was stated, derived, or told by a classifier."""
SOURCE_COLUMNS: tuple[str, ...] = ("root", "mode", "path")
"""Besides, in a store that reads its images in place: a key of `roots` in store.json (coded), the mode of files without
a header (raw.py; coded, and only where there are such files), and the path under the root."""


def encode(pixels: UInt8[np.ndarray, "H W"], encoding: str) -> bytes:
    """One record's bytes.

    Args:
        pixels: grey image.
        encoding: "jpeg95" (JPEG quality 95, one channel), "png" (lossless) or "raw" (row by row, no header).

    Raises:
        UnknownNameError: another encoding.
    """
    if encoding == "raw":
        return np.ascontiguousarray(pixels).tobytes()
    if encoding == "jpeg95":
        done, buffer = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
    elif encoding == "png":
        done, buffer = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    else:
        raise UnknownNameError("encoding", encoding, ENCODINGS)
    assert done, "OpenCV encodes any non-empty grey image"
    return buffer.tobytes()


def decode(record: UInt8[np.ndarray, " n"], encoding: str, height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """The inverse of `encode` (exact for raw and png).

    Raises:
        ValueError: the bytes do not hold an image of that size.
    """
    if encoding == "raw":
        return record.reshape(height, width)
    try:
        pixels = cv2.imdecode(record, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ValueError(error.err) from error
    if pixels is None or pixels.shape != (height, width):
        raise ValueError(f"expected {height} x {width} pixels, found {None if pixels is None else pixels.shape}")
    return pixels


@dataclass(frozen=True)
class Shard:
    """One file of records, as `store.json` lists it."""

    name: str
    dataset: str
    licence: str
    records: int
    bytes: int
    sha256: str


class ShardWriter:
    """Appends records to a file that gets its name only when it is complete."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.offset = 0
        self.digest = hashlib.sha256()

    def append(self, record: bytes) -> tuple[int, int, int]:
        """Write one record; returns its offset, length and CRC-32."""
        self.file.write(record)
        self.digest.update(record)
        start, self.offset = self.offset, self.offset + len(record)
        return start, len(record), crc32(record)


@contextmanager
def new_shard(path: Path) -> Iterator[ShardWriter]:
    """Write the shard `path`: to a partial file beside it, flushed to disk, then renamed.

    The partial file's name is fixed, so that what a killed build left is overwritten by the next, and it is locked,
    so that two builds cannot write the same shard.

    Raises:
        StoreError: another process is writing this shard, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as file:
            try:
                writer = ShardWriter(file)
                yield writer
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StoreError(
            f"Could not write {path}: {error.strerror or error}. The shards finished before it are kept; "
            "make room and run the same command again to go on from there."
        ) from error


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    busy = StoreError(f"Another build is writing {partial.parent / partial.name[1:-8]}. Wait for it, or stop it first.")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        # The other writer may have renamed the file between our open and our lock: then it is no longer ours to empty.
        if not partial.exists() or partial.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise busy
        file.truncate(0)
        yield file


def write_index(
    path: Path,
    *,
    records: Mapping[str, Sequence[int] | np.ndarray],
    columns: Mapping[str, Sequence[str]],
    labels: Int[np.ndarray, "N C"],
    ssl_ok: np.ndarray,
    shards: Sequence[Shard],
    header: Mapping[str, Any],
) -> None:
    """Write `index.npz`, then `store.json`, which makes the store complete.

    Args:
        path: the store folder, its shards already in place.
        records: shard, offset, length, height, width, checksum: one number per image.
        columns: `TEXT_COLUMNS` and `CODED_COLUMNS`, `SOURCE_COLUMNS` where there are files, and
            `PICTURE_COLUMN` and `VIEW_SOURCE_COLUMN` where there is something to say; one text per image.
        labels: int8 (N, C).
        ssl_ok: bool (N,).
        shards: in the order of their numbers.
        header: what `store.json` holds besides: findings, preprocess_id, encoding and whatever else the writer notes.
    """
    types = {"shard": np.int32, "offset": np.int64, "length": np.int64, "height": np.int32, "width": np.int32}
    arrays: dict[str, np.ndarray] = {name: np.asarray(records[name], kind) for name, kind in types.items()}
    arrays["checksum"] = np.asarray(records["checksum"], np.uint32)
    arrays["labels"], arrays["ssl_ok"] = np.asarray(labels, np.int8), np.asarray(ssl_ok, bool)
    coded = [*CODED_COLUMNS, *(name for name in (VIEW_SOURCE_COLUMN, *SOURCE_COLUMNS[:2]) if name in columns)]
    for name in (*TEXT_COLUMNS, *(name for name in (PICTURE_COLUMN, *SOURCE_COLUMNS[2:]) if name in columns)):
        arrays[name] = np.asarray([text.encode() for text in columns[name]], dtype=np.bytes_)
    for name in coded:
        vocabulary = sorted(set(columns[name]))
        codes = {text: code for code, text in enumerate(vocabulary)}
        arrays[name] = np.asarray([codes[text] for text in columns[name]], np.int32)
        arrays[f"{name}_names"] = np.asarray([text.encode() for text in vocabulary] or [b""], dtype=np.bytes_)
    with atomic_path(path / "index.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    complete = {
        "format": FORMAT,
        "images": len(arrays["uid"]),
        **header,
        "shards": [asdict(shard) for shard in shards],
        "index_sha256": sha256_file(path / "index.npz"),
    }
    write_json(path / "store.json", complete)
