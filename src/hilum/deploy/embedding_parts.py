"""Embeddings of many images that survive an interruption: finished parts are kept in a folder until all is done.

A part is some thousand images, whole studies. One that is there is read instead of computed, when the folder was begun
for the same images, in the same files, and the same weights, and when none of its images was left out (what could not
be read is tried again, and named again).
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from hilum.core.errors import HilumError
from hilum.core.files import atomic_file, read_json, write_json
from hilum.data.store import Indices
from hilum.deploy.embeddings import embed_many
from hilum.deploy.encoder import Embedded, Encoder
from hilum.deploy.network import Read
from hilum.heads.batches import in_order

IMAGES = 2048
"""Of a part, and the rest of its last study."""
KEY_NAME = "parts.json"


def embed_resumably(
    encoder: Encoder,
    indices: Indices,
    read: Read,
    folder: Path,
    uids: np.ndarray,
    studies: np.ndarray,
    views: np.ndarray,
    findings: Sequence[str] = (),
    batch_size: int = 32,
    workers: int = 2,
    done: Callable[[int], None] = lambda count: None,
    size: int | None = None,
    files: str = "",
) -> Iterator[tuple[Int64[np.ndarray, " B"], Embedded]]:
    """As `embed_many`, part by part; what is in `folder` from before is not computed again.

    Args:
        encoder: what makes them.
        indices: what `read` takes.
        read: decoded pixels of an image, or None to leave it out.
        folder: for the parts; the caller removes it when the result is written.
        uids: (N,) identities of the images.
        studies: (N,) study of each.
        views: (N,) names.
        findings: also what the queries of these pool.
        batch_size: images at a time.
        workers: threads that read.
        done: told how many images were finished.
        size: images of a part; None: `IMAGES`.
        files: digest of what the images are read from (`inputs.fingerprint`).

    Yields:
        positions in `indices` (those that were left out are missing), and their embeddings; a part at a time.
    """
    chosen, size = np.asarray(list(indices), dtype=np.int64), size or IMAGES
    key = _key(encoder, uids, studies, findings, size, files)
    _begin(folder, key)
    number = np.unique(studies, return_inverse=True)[1].reshape(-1)
    for count, part in enumerate(in_order(np.arange(len(chosen)), size, number)):
        path = folder / f"{count:05d}.npz"
        places = part.images
        kept = _read_part(path, places, findings)
        if kept is not None:
            done(len(places))
            yield places, kept
            continue
        pieces = list(
            embed_many(
                encoder, chosen[places], read, findings, studies[places], views[places], batch_size, workers, done
            )
        )
        if not pieces:
            continue
        seen = np.concatenate([positions for positions, _ in pieces])
        order = np.argsort(seen)
        joined = Embedded(
            np.concatenate([one.cls for _, one in pieces])[order],
            np.concatenate([one.patch_mean for _, one in pieces])[order],
            {name: np.concatenate([one.pooled[name] for _, one in pieces])[order] for name in findings},
        )
        if len(seen) == len(places):
            _write_part(path, joined, findings)
        yield places[seen[order]], joined


def _key(
    encoder: Encoder, uids: np.ndarray, studies: np.ndarray, findings: Sequence[str], size: int, files: str
) -> str:
    head = encoder.head_digest if findings else ""
    facts = json.dumps([encoder.digest, head, encoder.precision, encoder.short_side, list(findings), size, files])
    digest = hashlib.sha256(facts.encode())
    digest.update("\n".join(uids.tolist()).encode())
    digest.update("\n".join(studies.tolist()).encode())
    return digest.hexdigest()


def _begin(folder: Path, key: str) -> None:
    """Keep what is in the folder if it was begun for the same; else begin anew."""
    try:
        found = read_json(folder / KEY_NAME, HilumError)
    except HilumError:
        found = None
    if found != {"key": key}:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / KEY_NAME, {"key": key})


def _write_part(path: Path, part: Embedded, findings: Sequence[str]) -> None:
    pooled = {f"pooled_{number}": part.pooled[name] for number, name in enumerate(findings)}
    with atomic_file(path) as file:
        np.savez(file, cls=part.cls, patch_mean=part.patch_mean, **pooled)  # type: ignore[arg-type]


def _read_part(path: Path, places: np.ndarray, findings: Sequence[str]) -> Embedded | None:
    """A finished part, rows in the order of `places`; None where there is none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pooled = {name: arrays[f"pooled_{number}"] for number, name in enumerate(findings)}
            found = Embedded(arrays["cls"], arrays["patch_mean"], pooled)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return found if len(found.cls) == len(places) else None
