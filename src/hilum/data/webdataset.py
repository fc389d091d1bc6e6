"""A store as tar files that other tools stream (the WebDataset layout): written here, checked here.

`<dataset>-000000.tar` holds, for each image, `<uid>.jpg` or `<uid>.png` and `<uid>.json`; one dataset and licence in
each tar. The bytes follow from the store and the options alone. `webdataset.json` beside the tars says what they are
and is complete only when all of them are. Reading tars, of ours or of other tools, is in webdataset_reading.py.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hilum.core.errors import ImageError, StoreError, UnknownNameError
from hilum.core.files import atomic_file, read_json, sha256_file, write_json
from hilum.core.tracking import Bar
from hilum.core.types import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN
from hilum.data.images import read_image
from hilum.data.licences import check_export
from hilum.data.shards import encode
from hilum.data.store import Store
from hilum.data.tar import End, read_span, scan

FORMAT = "hilum-webdataset-1"
SUMMARY = "webdataset.json"
TAR_BYTES = 256 * 2**20
"""No tar is larger, but for one of a single larger image."""
EXTENSIONS = {"jpeg95": "jpg", "png": "png"}
"""Encodings whose records are files as they are; all others become PNG."""
VALUES: dict[int, int | str | None] = {POSITIVE: 1, NEGATIVE: 0, UNKNOWN: None, UNCERTAIN: "uncertain"}
"""Label code -> what the JSON says."""


@dataclass(frozen=True)
class TarFile:
    """One tar, as `webdataset.json` lists it."""

    name: str
    dataset: str
    licence: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportOptions:
    """What goes into the tars."""

    split: str | None = None
    """Only the images of this split."""
    with_ids: bool = False
    """Also the ids of image, study and patient."""
    accept_licence: bool = False
    """Also where the licence does not let images be passed on."""
    tar_bytes: int = TAR_BYTES


def export(store: Store, out: Path, options: ExportOptions, bar: Bar) -> tuple[TarFile, ...]:
    """Write a store, or one split of it, as tars.

    Args:
        store: where the images come from.
        out: a folder for the tars, new or of the same export.
        options: what goes into them.
        bar: advanced by every image.

    Raises:
        ConfigError: a licence that forbids it; or a split that the store does not have.
        StoreError: the folder holds other tars; or a record of the store is damaged.
        HilumError: the disk is full.
    """
    indices = chosen(store, options.split)
    groups: dict[tuple[str, str], list[int]] = {}
    for index in indices.tolist():
        shard = store.shards[store.shard_numbers[index]]
        groups.setdefault((shard.dataset, shard.licence), []).append(index)
    if not options.accept_licence:
        check_export(licence for _, licence in groups)
    request = {"format": FORMAT, "store": store.header["index_sha256"], "split": options.split,
               "with_ids": options.with_ids}  # fmt: skip
    _claim(out, request)
    tars: list[TarFile] = []
    for (dataset, licence), members in groups.items():
        samples = _Ahead(_sample(store, index, licence, options.with_ids) for index in members)
        while samples:
            path = out / f"{dataset}-{sum(tar.dataset == dataset for tar in tars):06d}.tar"
            count = _write_tar(path, samples, options.tar_bytes, bar)
            tars.append(TarFile(path.name, dataset, licence, count, path.stat().st_size, sha256_file(path)))
    write_json(out / SUMMARY, {**request, "complete": True, "findings": list(store.findings), "images": len(indices),
                               "tars": [asdict(tar) for tar in tars]})  # fmt: skip
    for left_by_a_kill in (*out.glob(".*.tar.*.tmp"), *out.glob(f".{SUMMARY}.*.tmp")):
        left_by_a_kill.unlink()
    return tuple(tars)


def chosen(store: Store, split: str | None) -> np.ndarray:
    """Positions of the images of a split, or of all."""
    if split is None:
        return np.arange(len(store))
    if split not in set(store.splits.tolist()):
        raise UnknownNameError("split", split, set(store.splits.tolist()))
    return store.indices(split)


def _claim(out: Path, request: dict[str, Any]) -> None:
    """Say what this folder is going to hold, before any tar; refuse one that holds something else."""
    if (out / SUMMARY).exists():
        before = read_json(out / SUMMARY, StoreError)
        if not isinstance(before, dict) or {key: before.get(key) for key in request} != request:
            raise StoreError(f"{out} holds another export ({SUMMARY} says of what). Choose another --out.")
    elif out.exists() and (not out.is_dir() or any(out.glob("*.tar"))):
        raise StoreError(f"{out} holds tars that are not of this export, or is a file. Choose another --out.")
    write_json(out / SUMMARY, {**request, "complete": False})


Sample = tuple[tuple[str, bytes], ...]
"""Names and contents of the members of one image."""


class _Ahead:
    """Samples, one known ahead: whether it still fits is asked before it is taken. False when there is none."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self.samples = samples
        self.next: Sample = next(samples, ())

    def __bool__(self) -> bool:
        return bool(self.next)

    def take(self) -> Sample:
        taken, self.next = self.next, next(self.samples, ())
        return taken


def _write_tar(path: Path, samples: _Ahead, tar_bytes: int, bar: Bar) -> int:
    """Write as many samples as fit, at least one; returns how many."""
    count = 0
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        while samples and (count == 0 or tar.offset + _size(samples.next) + 2 * tarfile.RECORDSIZE <= tar_bytes):
            for name, content in samples.take():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o644  # time, owner and group are 0
                tar.addfile(member, io.BytesIO(content))
            count += 1
            bar.advance()
    return count


def _size(sample: Sample) -> int:
    """Bytes in a tar: a header for each member, contents to whole blocks."""
    return sum(tarfile.BLOCKSIZE + -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for _, content in sample)


def _sample(store: Store, index: int, licence: str, with_ids: bool) -> Sample:
    uid = str(store.uids[index])
    extension = EXTENSIONS.get(store.encoding, "png")
    # Files that are read in place may be DICOM, or say more in their headers than a picture: their pixels only.
    record = store.record(index).tobytes() if store.encoding in EXTENSIONS else encode(store.read(index), "png")
    facts: dict[str, Any] = {
        "format": FORMAT,
        "uid": uid,
        "dataset": str(store.datasets[index]),
        "licence": licence,
        "view": str(store.views[index]),
        "split": str(store.splits[index]),
        "ssl_ok": bool(store.ssl_ok[index]),
        "preprocess_id": store.preprocess_id,
        "view_source": str(store.view_sources[index]),
        # What a model has met, and which leaks were accepted, stays known on the way through tars.
        "picture": str(store.pictures[index]),
        "accepted_leak": store.accepted_leak,
        "labels": {name: VALUES[int(code)] for name, code in zip(store.findings, store.labels[index], strict=True)},
    }
    if with_ids:
        facts |= {
            "image_id": str(store.image_ids[index]),
            "study_id": str(store.studies[index]),
            "patient_id": str(store.patients[index]),
        }
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return ((f"{uid}.{extension}", record), (f"{uid}.json", text.encode()))


def is_export(folder: Path) -> bool:
    """Whether a folder says that it holds tars of ours."""
    return (folder / SUMMARY).is_file()


def listed(folder: Path) -> tuple[TarFile, ...]:
    """The tars that a finished export wrote.

    Raises:
        StoreError: not finished, or not one.
    """
    summary = read_json(folder / SUMMARY, StoreError)
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise StoreError(f"{folder / SUMMARY}: expected format {FORMAT!r}. It is no export of ours.")
    if summary.get("complete") is not True:
        raise StoreError(f"{folder} is not a finished export. Run the same `hilum convert` again.")
    try:
        return tuple(TarFile(**tar) for tar in summary["tars"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder / SUMMARY} does not list tars: {type(error).__name__} {error}.") from error


def check(folder: Path, tar: TarFile, bar: Bar) -> list[str]:
    """Faults of one tar of an export: its bytes, and whether every image in it can be decoded."""
    path = folder / tar.name
    if not path.is_file():
        return [f"{folder}: {tar.name} is missing."]
    faults = [] if sha256_file(path) == tar.sha256 else [f"{folder}: {tar.name} is not what was written (SHA-256)."]
    images = 0
    for member in scan(path):
        if isinstance(member, End) or member.fault:
            if member.fault:
                faults.append(f"{folder}: {tar.name}, at byte {member.offset}: {member.fault}.")
        elif not member.name.endswith(".json"):
            images += 1
            bar.advance()
            try:
                read_image(read_span(path, member.offset, member.length), name=f"{tar.name}, {member.name}")
            except ImageError as error:
                faults.append(f"{folder}: {error}")
    if images != tar.images:
        faults.append(f"{folder}: {tar.name} holds {images} images, expected {tar.images}.")
    return faults
