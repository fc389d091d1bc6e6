"""`hilum embed`: a model or a backbone and images in, one vector per image or study out.

A file that cannot be used is listed in `OUT.quarantine.csv` with its reason, and the rest goes on. What is finished is
kept in `OUT.parts` until all is, so that an interrupted run goes on where it was.
"""

import csv
import io
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

import hilum
from hilum.commands.predict_account import quarantine_of
from hilum.core.config import parse_shard
from hilum.core.errors import ConfigError, EmptyStudyError, UnknownNameError
from hilum.core.files import write_text
from hilum.core.tracking import next_step, progress, say, warn
from hilum.data.store import Store
from hilum.deploy.embedding_files import FORMAT, WRITERS, Embeddings, write_embeddings
from hilum.deploy.embedding_parts import embed_resumably
from hilum.deploy.embeddings import study_means
from hilum.deploy.encoder import Embedded, load_encoder
from hilum.deploy.inputs import Inputs, fingerprint, refuse_overwriting, resolve
from hilum.deploy.network import store_identity
from hilum.evaluation.predictions import IDENTITY
from hilum.evaluation.studies import study_uids

What = Literal["cls", "patch-mean", "study"]
WHATS: tuple[What, ...] = ("cls", "patch-mean", "study")
READING_THREADS = 2


def run(
    source: str,
    inputs: list[str],
    out: Path,
    what: str = "cls",
    batch_size: int = 32,
    device: str = "auto",
    shard: str | None = None,
    resolution: int | None = None,
) -> None:
    """Embed images and write a file of vectors.

    Args:
        source: a MODEL, an ensemble (its first network), a run, or weights as `load_backbone` takes them.
        inputs: files, folders, CSV files of paths, one STORE:split, or one STORE, whole.
        out: `.parquet`, `.npz` or `.npy`.
        what: cls or patch-mean, one row per image, as the backbone gives it; study, one row per study: the mean of its
            images' L2-normalised [CLS], normalised again.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        shard: "i/n", job i of n, counted from 0; a study is never divided.
        resolution: of a backbone alone: side of the squares it sees, pixels.

    Raises:
        ConfigError: inputs or options that mean nothing.
        EmptyStudyError: no input could be read.
        CheckpointError: weights that are incomplete or damaged.
        PreprocessingMismatchError: a store of another recipe.
    """
    out = Path(out)
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(WRITERS)}.")
    if what not in WHATS:
        raise UnknownNameError("kind of embedding (--what)", what, WHATS)
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {batch_size}.")
    refuse_overwriting((out, quarantine_of(out)), inputs)
    job, jobs = parse_shard(shard)
    encoder = load_encoder(source, device, resolution)
    found = resolve_all(inputs)
    if found.store:
        found.store.check_recipe(encoder.preprocess_id)
    identity = store_identity(found.store, found.indices) if found.store else found.identity()
    studies = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
    part = np.flatnonzero([zlib.crc32(uid.encode()) % jobs == job for uid in studies.tolist()])
    found.refused = found.refused_of(job, jobs)
    if len(part) + len(found.refused) == 0 and shard:
        raise EmptyStudyError(f"--shard {shard}: this job has nothing to do; there are about as many jobs as studies.")
    identity, studies = {name: column[part] for name, column in identity.items()}, studies[part]
    read = found.store.read if found.store else found.reader(encoder.short_side, encoder.preprocess_id)
    indices = found.indices[part] if found.store else part
    places = found.places
    files = fingerprint([places[place] for place in part.tolist()], found.store)
    folder = out.with_name(out.name + ".parts")
    with progress("embed", len(part), "images") as bar:
        pieces = embed_resumably(
            encoder, indices, read, folder, identity["image_uid"], studies, identity["view"], (), batch_size,
            READING_THREADS, bar.advance, files=files,
        )  # fmt: skip
        table, vectors = _collect(pieces, identity, studies, what)
    write_quarantine(found, out)
    if not len(vectors):
        shutil.rmtree(folder, ignore_errors=True)
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(r.reason for r in found.refused).items())
        raise EmptyStudyError(f"None of {len(found.refused)} inputs could be read ({reasons}). Nothing was embedded.")
    metadata = {
        "format": FORMAT,
        "hilum": hilum.__version__,
        "what": what,
        "unit": "study" if what == "study" else "image",
        "normalised": what == "study",
        "dim": vectors.shape[1],
        "model": encoder.model,
        "backbone": encoder.digest,
        "preprocess_id": encoder.preprocess_id,
        "resolution": encoder.resolution,
        "shard": shard,
    }
    write_embeddings(Embeddings(table, vectors, metadata), out)
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{out}: {len(vectors)} {metadata['unit']} rows of {vectors.shape[1]} numbers ({what})")
    if encoder.model and found.store:
        next_step(f"hilum index {source} --data {found.store.path} --out index")


def resolve_all(inputs: list[str]) -> Inputs:
    """`resolve`, and a store without a split is all of it."""
    if len(inputs) == 1 and (Path(inputs[0]) / "store.json").is_file():
        store = Store.open(Path(inputs[0]))
        return Inputs(store=store, indices=np.arange(len(store)))
    return resolve(inputs)


def write_quarantine(found: Inputs, out: Path) -> None:
    """List what was left out beside the result, and say so; remove the list of an earlier run."""
    quarantine = quarantine_of(out)
    quarantine.unlink(missing_ok=True)
    if not found.refused:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "reason", "message"])
    ordered = sorted(found.refused, key=lambda one: str(one.path))
    writer.writerows([one.path, one.reason, one.message] for one in ordered)
    write_text(quarantine, text.getvalue())
    listed = ", ".join(f"{count} {reason}" for reason, count in Counter(r.reason for r in found.refused).most_common())
    warn(f"{len(found.refused)} inputs were left out ({listed}); {quarantine} says why")


def _collect(
    pieces: Iterator[tuple[np.ndarray, Embedded]], identity: dict[str, np.ndarray], studies: np.ndarray, what: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Identity columns and vectors, in the order of the inputs; of studies, in the order in which they first come."""
    seen, parts, read = [np.zeros(0, np.int64)], [], np.zeros(len(studies), bool)
    number = np.unique(studies, return_inverse=True)[1].reshape(-1)
    first = np.unique(studies, return_index=True)[1]
    for positions, found in pieces:
        read[positions] = True
        if what == "study":
            rows, means = study_means(found.cls, number[positions])
            seen.append(rows)
            parts.append(means)
        else:
            seen.append(positions)
            parts.append(found.cls if what == "cls" else found.patch_mean)
    places = np.concatenate(seen)
    if not parts:
        return {name: np.zeros(0, dtype=str) for name in IDENTITY}, np.zeros((0, 0), np.float32)
    vectors = np.concatenate(parts)
    if what != "study":
        order = np.argsort(places)
        return {name: identity[name][places[order]] for name in IDENTITY}, vectors[order]
    order = np.argsort(first[places])
    rows, vectors = places[order], vectors[order]
    table = {name: identity[name][first[rows]] for name in IDENTITY}
    by_study = np.flatnonzero(read)[np.argsort(number[read], kind="stable")]  # what was left out shows no view
    groups = np.split(identity["view"][by_study], np.cumsum(np.bincount(number[read], minlength=len(first)))[:-1])
    table["image_id"] = np.where(table["study_id"] == "", table["image_id"], table["study_id"])
    table["image_uid"] = studies[first[rows]]
    table["view"] = np.array(["+".join(sorted(set(groups[row].tolist()))) for row in rows.tolist()], dtype=str)
    return table, vectors
