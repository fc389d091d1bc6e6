"""The last step of a build: the quarantine list, the manifest's copy, the index and at last `store.json`.

Reads nothing but the manifest and what the shards' markers say, so it can be repeated at will, and a manifest whose
labels or splits changed needs no image decoded again.
"""

import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hilum.core.files import write_text
from hilum.core.types import image_uid
from hilum.data.decoding import Settings
from hilum.data.greys import Greys
from hilum.data.raw import PREFIX
from hilum.data.schema import Manifest, complete, write_manifest
from hilum.data.shards import IN_PLACE, PICTURE_COLUMN, VIEW_SOURCE_COLUMN, Shard, write_index

STORED: dict[str, Any] = {
    "image_uid": pl.String,
    "store_shard": pl.Int32,
    "store_offset": pl.Int64,
    "store_len": pl.Int64,
    "checksum": pl.UInt32,
    "store_h": pl.Int32,
    "store_w": pl.Int32,
    "rows": pl.Int32,
    "cols": pl.Int32,
    "bits_stored": pl.Int32,
    "photometric": pl.String,
    "mode": pl.String,
    "intensity": pl.String,
    "flags": pl.List(pl.String),
    "pixel_sha256": pl.String,
    "phash256": pl.String,
}
"""What a shard's marker says of each stored image, one list per column (the shard's number is its own)."""
HASHES: tuple[str, ...] = ("pixel_sha256", "phash256")
REFUSED: dict[str, Any] = {
    "image_uid": pl.String,
    "reason": pl.String,
    "message": pl.String,
    "found": pl.List(pl.Int64),
}
"""And of each refused one; `found` is the size and modification time of the file."""
UNFINISHED = "build.json"
"""What the shards of an unfinished store are made with; removed when it is finished."""
FILES = ("quarantine.csv", "manifest.parquet", "index.npz", "store.json")
"""What the last step writes, in this order."""


@dataclass(frozen=True)
class Finished:
    """What the marker of a finished shard says."""

    digest: str
    """Of the plan that it was written for."""
    images: int
    bytes: int
    sha256: str
    stored: pl.DataFrame
    """Columns `STORED`, but for the shard's number."""
    refused: pl.DataFrame
    """Columns `REFUSED`."""
    greys: Greys | None
    """None in a shard of an older version."""

    @classmethod
    def of(cls, marker: Mapping[str, Any]) -> "Finished":
        """From the marker's JSON. As a table it takes less than half the memory."""
        columns = {**dict.fromkeys(HASHES, [None] * marker["images"]), **marker["stored"]}  # older stores lack them
        stored = pl.DataFrame(columns, schema={k: v for k, v in STORED.items() if k != "store_shard"})
        facts = {name: marker[name] for name in ("digest", "images", "bytes", "sha256")}
        refused, counted = pl.DataFrame(marker["refused"], schema=REFUSED), marker.get("greys")
        greys = counted and Greys(np.asarray(counted["histogram"], np.int64), marker["images"], counted["even"])
        return cls(**facts, stored=stored, refused=refused, greys=greys)


def finish_store(
    out: Path,
    manifest: Manifest,
    shards: Sequence[Shard],
    done: Sequence[Finished],
    settings: Settings,
    roots: Mapping[str, Path],
) -> None:
    """Make a store complete, and remove shards that its plan no longer has and what killed builds left behind.

    Args:
        out: the store folder, all its shards finished.
        manifest: one row per image, stored or refused.
        shards: in the order of their numbers.
        done: what the marker of each shard says.
        settings: what the records were made with.
        roots: where the source files are, by root key; kept where they are read in place.
    """
    number = pl.lit(0, dtype=STORED["store_shard"])
    stored = pl.concat(part.stored.with_columns(store_shard=number + place) for place, part in enumerate(done))
    refused = pl.concat(part.refused for part in done)
    with _alone(out):
        write_text(out / "quarantine.csv", _quarantine_list(manifest.frame, refused))
        write_manifest(_manifest_copy(manifest, stored, refused, settings), out / "manifest.parquet")
        _write_index(out, manifest, stored, shards, settings, refused.height, roots)
        (out / UNFINISHED).unlink(missing_ok=True)
        _remove_stale(out, shards)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time: two jobs of an array may find all shards finished at the same moment."""
    path = out / ".finish.lock"
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The one before us may have removed the file that we waited for; another may hold the next.
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _remove_stale(out: Path, shards: Sequence[Shard]) -> None:
    current = {shard.name for shard in shards} | {f"{Path(shard.name).stem}.done" for shard in shards}
    for path in (out / "shards").iterdir():
        unplanned = path.suffix in (".bin", ".done") and path.name not in current
        unfinished = fnmatch(path.name, ".*.done.*.tmp") or fnmatch(path.name, ".*.bin.partial")
        if unplanned or (unfinished and path.name[1:].removesuffix(".partial") not in current):
            path.unlink(missing_ok=True)
    for path in out.glob(".*.tmp"):
        if any(path.name.startswith(f".{name}.") for name in (*FILES, UNFINISHED)):
            path.unlink(missing_ok=True)


def _write_index(
    out: Path,
    manifest: Manifest,
    stored: pl.DataFrame,
    shards: Sequence[Shard],
    settings: Settings,
    refused: int,
    roots: Mapping[str, Path],
) -> None:
    columns = {"uid": "image_uid", "image_id": "image_id", "patient": "patient_id", "study": "study_id", "view": "view",
               "split": "split_project", "dataset": "dataset"}  # fmt: skip
    in_place = settings.encoding == IN_PLACE
    if in_place:
        columns |= {"root": "source_root_key", "path": "source_relpath"}
    frame = manifest.frame.with_columns(picture=pictures(manifest.frame))
    if (frame["picture"] != frame["image_uid"]).any():
        columns |= {PICTURE_COLUMN: "picture"}
    if "view_source" in frame.columns and frame["view_source"].count():
        frame = frame.with_columns(pl.col("view_source").fill_null("unknown"))
        columns |= {VIEW_SOURCE_COLUMN: "view_source"}
    rows = frame.with_row_index("row").select("row", *columns.values(), "ssl_ok")
    if in_place and stored["mode"].str.starts_with(PREFIX).any():
        columns |= {"mode": "mode"}
    rows = rows.join(stored, on="image_uid", maintain_order="left")
    records = {"shard": "store_shard", "offset": "store_offset", "length": "store_len", "height": "store_h",
               "width": "store_w", "checksum": "checksum"}  # fmt: skip
    write_index(
        out,
        records={name: rows[column].to_numpy() for name, column in records.items()},
        columns={name: rows[column].to_list() for name, column in columns.items()},
        labels=manifest.labels()[rows["row"].to_numpy()],
        ssl_ok=rows["ssl_ok"].to_numpy(),
        shards=shards,
        header={
            "findings": list(manifest.findings),
            "preprocess_id": settings.preprocess_id,
            "encoding": settings.encoding,
            "size": settings.size,
            **({"roots": {key: str(folder) for key, folder in roots.items()}} if in_place else {}),
            **({"accepted_leak": manifest.accepted_leak} if manifest.accepted_leak else {}),
            "quarantined": refused,
            "datasets": _counts(rows["dataset"]),
            "intensity": _counts(rows["intensity"]),
        },
    )


def pictures(frame: pl.DataFrame) -> pl.Series:
    """What names a picture whatever dataset it is read from: the uid that it has in the release it descends from."""
    if "member_picture" in frame.columns:  # from tars of ours, which say it themselves
        return frame["member_picture"]
    if "origin_image" not in frame.columns:
        return frame["image_uid"]
    named = zip(frame["origin_image"], frame["image_uid"], strict=True)
    return pl.Series([uid if origin is None else image_uid(*origin.split("/", 1)) for origin, uid in named])


def _counts(values: pl.Series) -> dict[str, int]:
    return dict(sorted(Counter(values.to_list()).items()))


def _quarantine_list(frame: pl.DataFrame, refused: pl.DataFrame) -> str:
    """CSV of refused images, by uid and row of the manifest. Paths and source ids may name a patient: not here."""
    rows = frame.select("image_uid", "dataset").with_row_index("row")
    listed = rows.join(refused, on="image_uid", maintain_order="left")
    return listed.select("image_uid", "dataset", "row", "reason", "message").write_csv().rstrip("\n") + "\n"


def _manifest_copy(manifest: Manifest, stored: pl.DataFrame, refused: pl.DataFrame, settings: Settings) -> Manifest:
    """The manifest with what decoding added: where each image is stored, what its file was, why it was refused."""
    learned = stored.drop("checksum").with_columns(preprocess_id=pl.lit(settings.preprocess_id))
    learned = pl.concat([learned, refused.select("image_uid", flags=pl.concat_list("reason"))], how="diagonal")
    noted = "quality" in manifest.frame.columns
    # Columns that decoding fills anew; a manifest may have them already or not.
    before = manifest.frame.drop([name for name in learned.columns if name != "image_uid"], strict=False)
    frame = before.join(learned, on="image_uid", how="left", maintain_order="left")
    quality = pl.col("quality").fill_null([]) if noted else pl.lit([], dtype=pl.List(pl.String))
    frame = frame.with_columns(quality=quality.list.set_union(pl.col("flags").fill_null([]))).drop("flags")
    return Manifest(complete(frame, manifest.findings), manifest.findings, manifest.metadata)
