"""Pixels for an audit: hashes of a manifest that has none, and thumbnails of the few images that may be copies.

Reads the originals, in parallel, or the records of the store that the manifest lies in. Whatever cannot be read is
counted by its reason, as in `hilum build`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import UInt8

from hilum.core.errors import StoreError
from hilum.core.tracking import progress
from hilum.data.decoding import Outcome, Settings, decoders
from hilum.data.finish import HASHES
from hilum.data.hashing import thumbnail
from hilum.data.leaks import Problem, problem
from hilum.data.schema import Manifest
from hilum.data.store import Store
from hilum.data.tasks import source_roots, tasks

SIZE = 256
"""Pixels of the shorter side that originals are decoded to here."""


@dataclass(frozen=True)
class Pixels:
    """Where an audit finds the pixels of a manifest's images.

    Args:
        manifest: the table.
        roots: where the originals are, by root key; overrides the manifest's header.
        store: the store that the manifest is a copy in; its records are read in place of the originals.
        workers: decoding processes; default the processors at hand.
    """

    manifest: Manifest
    roots: Mapping[str, Path] = field(default_factory=dict)
    store: Store | None = None
    workers: int | None = None

    def hashed(self) -> tuple[Manifest, list[Problem]]:
        """The manifest with the hashes of every image whose original can be read; and what could not be.

        Raises:
            ConfigError: the folder of the originals is not known, or not there.
        """
        frame = self.manifest.frame
        for name in HASHES:
            if name not in frame.columns:
                frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias(name))
        without = frame.filter(pl.col("pixel_sha256").is_null())
        reasons: dict[str, str] = {}
        learned: list[tuple[str, str, str | None]] = []
        with progress("Hashing pixels", without.height, "images") as bar:
            for outcome in self._decoded(without):
                if outcome.reason:
                    reasons[outcome.uid] = outcome.reason
                else:
                    learned.append((outcome.uid, *outcome.source[-len(HASHES) :]))
                bar.advance()
        schema = dict.fromkeys(("image_uid", *HASHES), pl.String)
        new = pl.DataFrame(learned, schema=schema, orient="row").unique("image_uid", keep="first")
        joined = frame.join(new, on="image_uid", how="left", maintain_order="left", suffix="_new")
        frame = joined.with_columns(pl.coalesce(name, f"{name}_new").alias(name) for name in HASHES)
        frame = frame.drop(f"{name}_new" for name in HASHES)
        manifest = Manifest(frame, self.manifest.findings, self.manifest.metadata)
        if not reasons:
            return manifest, []
        counts = ", ".join(f"{reason} {count:,}" for reason, count in Counter(reasons.values()).most_common())
        rows = frame.filter(pl.col("image_uid").is_in(list(reasons)))
        return manifest, [problem("unreadable pixels", f"images that could not be decoded ({counts})", rows)]

    def thumbnails(self, uids: Sequence[str]) -> dict[str, UInt8[np.ndarray, "64 64"]]:
        """Thumbnails by image_uid; images that cannot be read are missing.

        Raises:
            ConfigError: the folder of the originals is not known, or not there.
        """
        found: dict[str, np.ndarray] = {}
        with progress("Comparing pictures", len(uids), "images") as bar:
            if self.store is not None:
                places = {uid: place for place, uid in enumerate(self.store.uids.tolist())}
                for uid in uids:
                    if uid in places:
                        with suppress(StoreError):  # a damaged record: the caller says that it could not be read
                            found[uid] = thumbnail(self.store.read(places[uid]))
                    bar.advance()
                return found
            wanted = self.manifest.frame.filter(pl.col("image_uid").is_in(list(uids))).unique("image_uid")
            for outcome in self._decoded(wanted):
                if not outcome.reason:
                    shape = outcome.source[:2]
                    found[outcome.uid] = thumbnail(np.frombuffer(outcome.record, np.uint8).reshape(shape))
                bar.advance()
        return found

    def _decoded(self, rows: pl.DataFrame) -> Iterator[Outcome]:
        if not rows.height:
            return
        roots = source_roots(self.manifest, self.roots)
        with decoders(Settings(SIZE, "raw", ()), self.workers, rows.height) as decode:
            yield from decode.in_order(list(tasks(rows, roots)))
