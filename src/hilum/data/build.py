"""From a manifest to a store: decode every image once, in parallel, and lose nothing silently.

The plan (which images go into which shard) is a function of the manifest and the settings alone, so the bytes do not
depend on the number of processes, on interruptions, or on how the shards were shared out among jobs. A shard is
finished when its `.done` file is there, written last: it holds what was stored, what was refused and why. When all
shards are finished, the index, the manifest's copy and at last `store.json` are written. Every image of the manifest
is in the store or in `quarantine.csv`.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.files import write_text
from hilum.core.tracking import Bar, progress
from hilum.data.build_folder import PlannedShard, check_folder, claim_folder, finished, marker, to_write
from hilum.data.checksums import Published, published_checksums
from hilum.data.decoding import Decoders, Settings, Task, decoders
from hilum.data.finish import REFUSED, STORED, Finished, finish_store
from hilum.data.greys import LEVELS, Greys, is_even, total
from hilum.data.intensity import PREPROCESS_ID, equaliser
from hilum.data.schema import Manifest, read_manifest
from hilum.data.shards import ENCODINGS, IN_PLACE, Shard, new_shard
from hilum.data.tasks import listed, source_roots, tasks

SHARD_BYTES = 128 * 2**20
BYTES_PER_PIXEL = {"jpeg95": 0.35, "png": 0.6, "raw": 1.0, IN_PLACE: 1.0}
"""Expected size of a record, generous for noisy films: shards end between half and twice `SHARD_BYTES`. Read in
place, a shard covers as many images as a raw one, and is tiny."""
ASPECT = 1.2
"""Expected longer side over shorter side."""


@dataclass(frozen=True)
class BuildSummary:
    """What a build did. `inputs == stored + sum(quarantined.values())` whenever it is finished."""

    inputs: int
    stored: int
    quarantined: dict[str, int]
    flagged: dict[str, int]
    shards: int
    shards_kept: int
    bytes: int
    seconds: float
    finished: bool
    """False where other jobs of an array still have shards to write."""
    greys: dict[str, Greys]
    """By dataset, of a finished store; without those of which an older version of Hilum wrote shards."""
    intensity: str
    """Recipe of the store."""
    checksums: dict[str, tuple[int, int]]
    """Root key of folders with published checksums -> images that are listed there, and images that are not."""

    @property
    def refused_share(self) -> float:
        """Share of the images looked at that went to quarantine."""
        return sum(self.quarantined.values()) / max(self.stored + sum(self.quarantined.values()), 1)


def build_store(
    source: Path | Manifest,
    out: Path,
    size: int = 512,
    encoding: str = "jpeg95",
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    roots: Mapping[str, Path] | None = None,
    refuse: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    intensity: str = PREPROCESS_ID,
    checksums: bool = True,
) -> BuildSummary:
    """Decode, shrink and encode every image of a manifest into a store. Run again, it goes on where it stopped.

    Args:
        source: a manifest.parquet, or a manifest in memory.
        out: the store folder.
        size: pixels of the shorter side; smaller images stay as they are.
        encoding: one of `ENCODINGS`, or `IN_PLACE`: decode every file once, and store no pixels but the files'
            SHA-256; the store then reads the files where they are.
        workers: decoding processes; default the processors at hand. 1 decodes in this process.
        shard: (i, n): write only the shards whose number is i modulo n, for array jobs. The job that finds all shards
            finished writes the index; so does a later run without `shard`.
        roots: where the images are, by root key; overrides the manifest's header.
        refuse: flags of `DecodedImage.quality` that send an image to quarantine.
        shard_bytes: aimed size of a shard.
        intensity: recipe for DICOM and more than 8 bits, one of `intensity.RECIPES`; the store's `preprocess_id`.
        checksums: send files to quarantine that differ from the SHA256SUMS.txt in their root, where there is one.

    Raises:
        ManifestError: the manifest is wrong.
        ConfigError: a setting is wrong, or a root is not known or not there.
        StoreError: another store is there, another build is writing it, or the disk is full; what was finished stays.
    """
    started, out = time.monotonic(), Path(out)
    settings = _settings(size, encoding, refuse, shard, intensity)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected at least 1 process, found {workers}.")
    manifest = source if isinstance(source, Manifest) else read_manifest(Path(source))
    if encoding == IN_PLACE and "member_offset" in manifest.frame.columns:
        raise ConfigError("Images inside tars cannot be read in place. Store their pixels: leave --in-place out.")
    folders = source_roots(manifest, roots or {})
    published = published_checksums(folders) if checksums else {}
    plan = _plan(manifest, folders, settings, shard_bytes, published)
    datasets = {planned.dataset for planned in plan}
    check_folder(out, settings, datasets)
    mine = [number for number in range(len(plan)) if number % shard[1] == shard[0]]
    waiting = to_write(out, plan, mine, settings, workers)
    if waiting:
        claim_folder(out, settings, datasets)
        images = sum(len(plan[number].tasks) for number in waiting)
        with progress("build", images, "images") as bar, decoders(settings, workers, images) as decode:
            refused = 0
            for number in waiting:
                refused += _write_shard(out, plan[number], decode, bar)
                bar.note(f"{refused} refused" if refused else "")
    everything = [finished(out, planned) for planned in plan]
    seen = [done for done in (everything[number] for number in mine) if done is not None]
    whole = all(done is not None for done in everything)
    if whole:
        seen = [done for done in everything if done is not None]
        shards = [
            Shard(planned.name, planned.dataset, planned.licence, part.images, part.bytes, part.sha256)
            for planned, part in zip(plan, seen, strict=True)
        ]
        finish_store(out, manifest, shards, seen, settings, folders)
    return BuildSummary(
        inputs=len(manifest),
        stored=sum(done.images for done in seen),
        quarantined=dict(Counter(reason for done in seen for reason in done.refused["reason"])),
        flagged=dict(Counter(flag for done in seen for flag in done.stored["flags"].explode().drop_nulls())),
        shards=len(plan),
        shards_kept=len(mine) - len(waiting),
        bytes=sum(done.bytes for done in seen),
        seconds=time.monotonic() - started,
        finished=whole,
        greys=_greys(plan, seen) if whole else {},
        intensity=settings.preprocess_id,
        checksums=listed((task for planned in plan for task in planned.tasks), folders, published),
    )


def _greys(plan: Sequence[PlannedShard], done: Sequence[Finished]) -> dict[str, Greys]:
    parts: dict[str, list[Greys | None]] = {}
    for planned, part in zip(plan, done, strict=True):
        parts.setdefault(planned.dataset, []).append(part.greys)
    counted = {dataset: [part for part in found if part is not None] for dataset, found in parts.items()}
    return {dataset: total(found) for dataset, found in counted.items() if len(found) == len(parts[dataset])}


def _settings(size: int, encoding: str, refuse: Sequence[str], shard: tuple[int, int], intensity: str) -> Settings:
    if encoding not in (*ENCODINGS, IN_PLACE):
        raise UnknownNameError("encoding", encoding, ENCODINGS)
    if size < 1:
        raise ConfigError(f"size: expected at least 1 pixel, found {size}.")
    if not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"shard: expected i/n with 0 <= i < n, found {shard[0]}/{shard[1]}.")
    equaliser(intensity)  # an unknown name is an error now
    return Settings(size, encoding, tuple(sorted(refuse)), intensity)


def _plan(
    manifest: Manifest, roots: Mapping[str, Path], settings: Settings, shard_bytes: int, published: Published
) -> list[PlannedShard]:
    expected = settings.size**2 * ASPECT * BYTES_PER_PIXEL[settings.encoding]
    capacity = max(1, int(shard_bytes / expected))
    licences = _licences(manifest)
    groups: dict[tuple[str, str], list[Task]] = {}
    every = tasks(manifest.frame, roots, published)
    for task, dataset, licence in zip(every, manifest.frame["dataset"], licences, strict=True):
        groups.setdefault((dataset, licence), []).append(task)
    plan: list[PlannedShard] = []
    for (dataset, licence), group in groups.items():
        for start in range(0, len(group), capacity):
            chosen = tuple(group[start : start + capacity])
            identity = json.dumps([asdict(settings), dataset, licence, [_identity(task) for task in chosen]])
            digest = hashlib.sha256(identity.encode()).hexdigest()
            slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")[:40] or "dataset"
            plan.append(PlannedShard(f"{len(plan):05d}-{slug}.bin", dataset, licence, chosen, digest))
    return plan


def _identity(task: Task) -> tuple[Any, ...]:
    """What decides a task's record, apart from the folder that its root is at the moment."""
    published = (task.sha256.hex(),) if task.sha256 else ()
    if task.raw is not None:
        return (task.uid, task.path, str(task.raw), *published)
    if task.span is None:
        return (task.uid, task.path, *published)
    return (task.uid, task.path, task.span, task.exact, task.refused)


def _licences(manifest: Manifest) -> list[str]:
    if "licence_tag" not in manifest.frame.columns:
        return [""] * len(manifest)
    return manifest.frame["licence_tag"].fill_null("").to_list()


def _write_shard(out: Path, planned: PlannedShard, decode: Decoders, bar: Bar) -> int:
    """Write one shard in the plan's order, then its marker; returns how many images were refused."""
    stored: dict[str, list[Any]] = {name: [] for name in STORED if name != "store_shard"}
    refused: dict[str, list[Any]] = {name: [] for name in REFUSED}
    greys, even = np.zeros(LEVELS, np.int64), 0
    marker(out, planned).unlink(missing_ok=True)
    with new_shard(out / "shards" / planned.name) as writer:
        for outcome in decode.in_order(planned.tasks):
            if outcome.reason:
                row: tuple[Any, ...] = (outcome.uid, outcome.reason, outcome.message, outcome.found)
            else:
                row = (outcome.uid, *writer.append(outcome.record), *outcome.source)
                assert outcome.greys is not None, "of every stored image"
                greys, even = greys + outcome.greys, even + is_even(outcome.greys)
            for column, value in zip((refused if outcome.reason else stored).values(), row, strict=True):
                column.append(value)
            bar.advance()
        written = len(stored["image_uid"])
        assert written + len(refused["image_uid"]) == len(planned.tasks), "every image is stored or refused"
    done = {
        "digest": planned.digest,
        "images": written,
        "bytes": writer.offset,
        "sha256": writer.digest.hexdigest(),
        "stored": stored,
        "refused": refused,
        "greys": {"histogram": greys.tolist(), "even": even},
    }
    write_text(marker(out, planned), json.dumps(done, separators=(",", ":")))
    return len(refused["image_uid"])
