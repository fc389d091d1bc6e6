"""The store: decoded, shrunk, 8-bit grey images in a few large files, with an index beside them.

`build` writes it, training and prediction read it. Reading needs numpy and OpenCV only (no table library), works
in forked and spawned processes, and checks every record. A store is complete when `store.json`, written last, is
there. A store that reads its images in place holds no pixels: it reads the source files, and refuses one that has
changed since. Layout: docs/reference/store.md. This module makes no views (transforms.py).

A little past 300 lines: the reader, and the shortest way to have something for it to read.
"""

import contextlib
import hashlib
import os
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from hilum.core.checksum import crc32
from hilum.core.errors import (
    ConfigError,
    ImageError,
    PreprocessingMismatchError,
    StoreError,
    UnknownNameError,
)
from hilum.core.files import read_json
from hilum.core.types import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, image_uid
from hilum.data.intensity import PREPROCESS_ID
from hilum.data.shards import (
    ENCODINGS,
    FORMAT,
    IN_PLACE,
    PICTURE_COLUMN,
    VIEW_SOURCE_COLUMN,
    Shard,
    decode,
    encode,
    new_shard,
    write_index,
)

Indices = Iterable[int] | Int[np.ndarray, " _"]
"""Positions of images in a store."""
_OPEN_SHARDS = 256


class _Descriptor:
    """A file descriptor that closes itself when its last reader lets go."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.number)


class Store:
    """Read-only access to a finished store. Cheap to pickle; each process opens its own files.

    Arrays have one entry per stored image, in the order of the manifest.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self.findings: tuple[str, ...] = tuple(header["findings"])
        self.preprocess_id: str = header["preprocess_id"]
        self.encoding: str = header["encoding"]
        self.shards: tuple[Shard, ...] = tuple(Shard(**shard) for shard in header["shards"])
        self.header = header
        self._columns = columns
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a store folder.

        Raises:
            StoreError: not a store, not finished, another version, or files that do not belong together.
        """
        path = Path(path)
        if not path.is_dir():
            raise StoreError(f"{path} is not a store: there is no such folder. Make one with `hilum build`.")
        if not (path / "store.json").is_file():
            raise StoreError(
                f"{path} is not a finished store: it has no store.json, which is written last. "
                "Run the same `hilum build` again; finished shards are kept."
            )
        header = read_json(path / "store.json", StoreError)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else type(header).__name__
            raise StoreError(
                f"{path / 'store.json'}: expected format {FORMAT!r}, found {found!r}. Build the store again."
            )
        columns = _read_index(path / "index.npz", header)
        try:
            store = cls(path, header, columns)
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{path / 'store.json'} does not describe a store: {type(error).__name__} {error}. Run the same "
                "`hilum build` again."
            ) from error
        for shard in store.shards:
            size = (path / "shards" / shard.name).stat().st_size if (path / "shards" / shard.name).is_file() else -1
            if size != shard.bytes:
                found = "it is missing" if size < 0 else f"found {size} bytes"
                raise StoreError(
                    f"{path / 'shards' / shard.name}: expected {shard.bytes} bytes, {found}. "
                    "Delete the file and run the same `hilum build` again, or copy the store again."
                )
        return store

    def __len__(self) -> int:
        return len(self._columns["uid"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} images, {self.encoding})"

    def check_recipe(self, preprocess_id: str, whose: Path | str = "this model") -> None:
        """Refuse to be read by what was trained on other pixels.

        Args:
            preprocess_id: the recipe that it was trained with.
            whose: what was trained, for the message.

        Raises:
            PreprocessingMismatchError: this store was built with another one.
        """
        if self.preprocess_id != preprocess_id:
            raise PreprocessingMismatchError(
                f"{self.path} was built for preprocessing {self.preprocess_id!r}, {whose} needs {preprocess_id!r}. "
                f"Build the store again: hilum build ... --intensity {preprocess_id}."
            )

    def _text(self, name: str) -> np.ndarray:
        return np.char.decode(self._columns[name], "utf-8") if len(self) else np.zeros(0, "U1")

    def _decoded(self, name: str) -> np.ndarray:
        return np.char.decode(self._columns[f"{name}_names"], "utf-8")[self._columns[name]]

    @cached_property
    def uids(self) -> np.ndarray:
        """Text (N,): 16 hex digits."""
        return self._text("uid")

    @cached_property
    def pictures(self) -> np.ndarray:
        """Text (N,): 16 hex digits that name the picture whatever dataset it is read from; the uid, if nothing else."""
        return self._text(PICTURE_COLUMN) if PICTURE_COLUMN in self._columns else self.uids

    @property
    def accepted_leak(self) -> str:
        """The leak by design that was accepted when the manifest was made, in words; "" for none."""
        return str(self.header.get("accepted_leak", ""))

    @property
    def licences(self) -> dict[str, list[str]]:
        """By dataset, tags of the licences of its images (`data/licences.py`), as far as the manifest had them."""
        tags: dict[str, set[str]] = {}
        for shard in self.shards:
            tags.setdefault(shard.dataset, set()).add(shard.licence)
        return {dataset: sorted(found - {""}) for dataset, found in sorted(tags.items())}

    @cached_property
    def image_ids(self) -> np.ndarray:
        """Text (N,): the source's own id."""
        return self._text("image_id")

    @cached_property
    def patients(self) -> np.ndarray:
        """Text (N,): namespaced by dataset."""
        return self._text("patient")

    @cached_property
    def studies(self) -> np.ndarray:
        """Text (N,): namespaced by dataset."""
        return self._text("study")

    @cached_property
    def views(self) -> np.ndarray:
        """Text (N,): one of `core.types.VIEWS`."""
        return self._decoded("view")

    @cached_property
    def view_sources(self) -> np.ndarray:
        """Text (N,): who says the view: "stated", "derived" from another field, "classifier", or "unknown"."""
        if VIEW_SOURCE_COLUMN not in self._columns:
            return np.full(len(self), "unknown")
        return self._decoded(VIEW_SOURCE_COLUMN)

    @cached_property
    def splits(self) -> np.ndarray:
        """Text (N,): train, val, test or empty."""
        return self._decoded("split")

    @cached_property
    def datasets(self) -> np.ndarray:
        """Text (N,)."""
        return self._decoded("dataset")

    @property
    def labels(self) -> Int[np.ndarray, "N C"]:
        """Int8 (N, C): 1, 0, -1 unknown, -2 uncertain, columns as `findings`."""
        return self._columns["labels"]

    @property
    def ssl_ok(self) -> np.ndarray:
        """Boolean (N,): may be used for self-supervised pretraining."""
        return self._columns["ssl_ok"]

    @property
    def heights(self) -> np.ndarray:
        """Int32 (N,): stored rows."""
        return self._columns["height"]

    @property
    def widths(self) -> np.ndarray:
        """Int32 (N,): stored columns."""
        return self._columns["width"]

    @property
    def shard_numbers(self) -> np.ndarray:
        """Int32 (N,): positions in `shards`."""
        return self._columns["shard"]

    @property
    def checksums(self) -> np.ndarray:
        """UInt32 (N,): CRC-32 of each record as it was written; of its source's digest, where images are in place."""
        return self._columns["checksum"]

    def indices(self, split: str) -> np.ndarray:
        """Int64 positions of one split, ascending."""
        return np.flatnonzero(self.splits == split).astype(np.int64)

    def in_storage_order(self, indices: Indices) -> np.ndarray:
        """Int64: the same positions, as their records lie: shard by shard (one dataset each), by offset."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        return chosen[np.lexsort((self._columns["offset"][chosen], self._columns["shard"][chosen]))]

    def fingerprint(self, indices: Indices) -> str:
        """SHA-256 of the sorted (uid, split) pairs: the same images in the same splits, in any order."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        pairs = sorted(zip(self.uids[chosen].tolist(), self.splits[chosen].tolist(), strict=True))
        return hashlib.sha256("\n".join(f"{uid}\x1f{split}" for uid, split in pairs).encode()).hexdigest()

    def record(self, index: int) -> UInt8[np.ndarray, " n"]:
        """The stored bytes of one image (a JPEG or PNG file, or raw pixels), checked.

        Where images are read in place: the bytes of the source file, as they were when the store was made.

        Raises:
            StoreError: the bytes are not those that were written; names the image and the shard.
            IndexError: no such image.
        """
        stored = self._stored(index)
        return self._source(index, stored.tobytes()) if self.in_place else stored

    def _stored(self, index: int) -> UInt8[np.ndarray, " n"]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {self!r}")
        columns = self._columns
        shard, length = int(columns["shard"][index]), int(columns["length"][index])
        buffer = np.empty(length, np.uint8)
        try:
            file = self._file(shard)  # held until the read is over: another thread may let go of it meanwhile
            found = os.preadv(file.number, [buffer.data], int(columns["offset"][index])) if length else 0
        except OSError as error:
            raise self._damage(index, error.strerror or str(error)) from error
        if found != length:
            raise self._damage(index, f"expected {length} bytes, found {found}")
        if crc32(buffer.data) != int(columns["checksum"][index]):
            raise self._damage(index, "its checksum does not match")
        return buffer

    def read(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """One image, uint8 (H, W), a fresh writable array; its checksum is verified.

        Raises:
            StoreError: the record is damaged; names the image and the shard.
            IndexError: no such image.
        """
        record = self.record(index)
        try:
            if self.in_place:
                return self._read_source(index, record)
            return decode(record, self.encoding, int(self.heights[index]), int(self.widths[index]))
        except ValueError as error:
            raise self._damage(index, str(error)) from error

    def expect(self, indices: Indices) -> None:
        """Have the system read records into its cache meanwhile: neighbours in one sweep. Only a hint.

        Args:
            indices: images that will be read soon, in storage order.
        """
        chosen = np.asarray(list(indices), dtype=np.int64)
        if self.in_place or not len(chosen):
            return
        shard, start = self._columns["shard"][chosen], self._columns["offset"][chosen]
        end = start + self._columns["length"][chosen]
        first = np.flatnonzero(np.concatenate([[True], (shard[1:] != shard[:-1]) | (start[1:] != end[:-1])]))
        last = np.append(first[1:], len(chosen)) - 1
        for number, low, high in zip(shard[first], start[first], end[last], strict=True):
            with contextlib.suppress(OSError):  # reading will say what is wrong
                file = self._file(int(number))
                os.posix_fadvise(file.number, int(low), int(high - low), os.POSIX_FADV_WILLNEED)

    @property
    def in_place(self) -> bool:
        """Whether images are read from their source files."""
        return self.encoding == IN_PLACE

    def _source(self, index: int, digest: bytes) -> UInt8[np.ndarray, " n"]:
        """The bytes of a source file, which must still be those whose SHA-256 is `digest`."""
        key = self._columns["root_names"][self._columns["root"][index]].decode()
        path = Path(self.header["roots"][key], self._columns["path"][index].decode())
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise self._changed(index, f"cannot be read ({error.strerror or error}); root {key!r}") from error
        if hashlib.sha256(content.data).digest() != digest:
            raise self._changed(index, "has changed since the store was made")
        return content

    def _read_source(self, index: int, content: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, "H W"]:
        from hilum.data.images import read_image  # stores with pixels of their own do without it
        from hilum.data.raw import raw_format

        mode = self._columns["mode_names"][self._columns["mode"][index]].decode() if "mode" in self._columns else None
        size, raw = self.header["size"], raw_format(mode)
        try:
            pixels = read_image(content.tobytes(), "the source file", size, raw, self.preprocess_id).pixels
        except ImageError as error:
            raise self._changed(index, f"cannot be decoded: {error}") from error
        if pixels.shape != (self.heights[index], self.widths[index]):
            raise self._changed(index, f"is decoded to another size than when the store was made: {pixels.shape}")
        return np.require(pixels, requirements="W")

    def _changed(self, index: int, what: str) -> StoreError:
        """A fault of a source file. Its path stays out of the message, because it may name a patient."""
        uid, shard = self._columns["uid"][index].decode(), self.shards[int(self._columns["shard"][index])].name
        return StoreError(
            f"{self.path}: the file of image {uid} (shards/{shard}) {what}. Put it back as it was, say where it is now "
            f"with `hilum build ... --in-place --root KEY=FOLDER`, or delete that shard and build again to accept it."
        )

    def _file(self, shard: int) -> _Descriptor:
        """An open shard. The least recently used is let go past a limit, and closed after its last reader."""
        with self._lock:
            file = self._files.pop(shard, None) or _Descriptor(self.path / "shards" / self.shards[shard].name)
            self._files[shard] = file
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
            return file

    def _damage(self, index: int, what: str) -> StoreError:
        uid = self._columns["uid"][index].decode()
        shard = self.shards[int(self._columns["shard"][index])].name
        return StoreError(
            f"{self.path}: image {uid} in shards/{shard} is damaged: {what}. "
            "Run `hilum verify` for the full list; delete that shard and run the same `hilum build` again to repair it."
        )


def _read_index(path: Path, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != header["index_sha256"]:
            raise StoreError(
                f"{path} is not the index that store.json was written for. Run the same `hilum build` again."
            )
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} cannot be read: {error}. Run the same `hilum build` again.") from error


def write_arrays(
    path: Path,
    images: Sequence[np.ndarray],
    labels: Int[np.ndarray, "N C"],
    findings: Sequence[str],
    *,
    patients: Sequence[str] | None = None,
    studies: Sequence[str] | None = None,
    views: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    image_ids: Sequence[str] | None = None,
    ssl_ok: Sequence[bool] | None = None,
    encoding: str = "raw",
    preprocess_id: str = PREPROCESS_ID,
) -> Store:
    """Make a store from arrays in memory: no source files, no manifest, no resizing.

    Args:
        path: folder to make; must not hold a store yet.
        images: grey uint8 (H, W), of any sizes.
        labels: (N, C) of 1, 0, -1, -2.
        findings: C names.
        patients: default: every image its own patient.
        studies: default: every image its own study.
        views: default "UNKNOWN".
        splits: default "train".
        datasets: default "arrays".
        image_ids: default the position, six digits.
        ssl_ok: default all True.
        encoding: one of `ENCODINGS`.
        preprocess_id: the preprocessing recipe that a model trained on this store needs.

    Returns:
        The store, open; entry i is `images[i]`.

    Raises:
        ConfigError: lengths, shapes, types or codes that do not fit.
        StoreError: there is already a store.
    """
    path, count = Path(path), len(images)
    if (path / "store.json").exists():
        raise StoreError(f"{path} already holds a store. Choose another folder.")
    if encoding not in ENCODINGS:
        raise UnknownNameError("encoding", encoding, ENCODINGS)
    for position, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 2 or image.size == 0:
            raise ConfigError(f"Image {position}: expected a non-empty uint8 array of shape (H, W).")
    codes = np.asarray(labels).reshape(count, len(findings)) if np.size(labels) == count * len(findings) else None
    if codes is None or not np.isin(codes, (POSITIVE, NEGATIVE, UNKNOWN, UNCERTAIN)).all():
        raise ConfigError(f"Labels: expected ({count}, {len(findings)}) of 1, 0, -1, -2; found {np.shape(labels)}.")
    numbers = [f"{position:06d}" for position in range(count)]
    names = list(datasets) if datasets is not None else ["arrays"] * count
    identities = list(image_ids) if image_ids is not None else numbers
    columns: dict[str, Sequence[Any]] = {
        "dataset": names,
        "image_id": identities,
        "patient": patients if patients is not None else [f"{a}/p{b}" for a, b in zip(names, numbers, strict=True)],
        "study": studies if studies is not None else [f"{a}/s{b}" for a, b in zip(names, numbers, strict=True)],
        "view": views if views is not None else ["UNKNOWN"] * count,
        "split": splits if splits is not None else ["train"] * count,
        "ssl_ok": ssl_ok if ssl_ok is not None else [True] * count,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ConfigError(f"{name}: expected {count} entries, one per image; found {len(column)}.")
    columns["uid"] = [image_uid(dataset, identity) for dataset, identity in zip(names, identities, strict=True)]
    if len(set(columns["uid"])) != count:
        raise ConfigError("image_ids: two images of one dataset have the same id.")

    records = {name: np.zeros(count, np.int64) for name in ("shard", "offset", "length", "height", "width", "checksum")}
    shards = []
    for number, dataset in enumerate(dict.fromkeys(names)):
        file = f"{number:05d}.bin"
        with new_shard(path / "shards" / file) as writer:
            for position in (position for position in range(count) if names[position] == dataset):
                offset, length, checksum = writer.append(encode(images[position], encoding))
                row = (number, offset, length, *images[position].shape, checksum)
                for name, value in zip(records, row, strict=True):
                    records[name][position] = value
        shards.append(Shard(file, dataset, "", names.count(dataset), writer.offset, writer.digest.hexdigest()))
    header = {"findings": list(findings), "preprocess_id": preprocess_id, "encoding": encoding, "quarantined": 0}
    flags = np.asarray(columns.pop("ssl_ok"), bool)
    write_index(path, records=records, columns=columns, labels=codes, ssl_ok=flags, shards=shards, header=header)
    return Store.open(path)
