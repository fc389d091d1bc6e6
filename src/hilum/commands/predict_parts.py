"""The images of a prediction in parts, each kept on disk once it is read, so that a run that was stopped goes on.

`OUT.parts/` holds `plan.json` (what is read, with what) and, for every part, `N.npz` and `N.done`, which is written
last and has the digest of the other. A part without it, or that is not what it says, is read again; other inputs or
another model begin afresh. What networks say is kept raw; studies, ensembles and calibration come when all are there.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from hilum.core.errors import HilumError, ImageError
from hilum.core.files import atomic_file, read_json, remove_leftovers, sha256_file, write_json
from hilum.core.locks import LOCK_NAME
from hilum.core.tracking import say
from hilum.data.images import read_image
from hilum.data.store import Store
from hilum.deploy.admission import Flagged, Gate, RawReading
from hilum.deploy.inputs import fingerprint
from hilum.deploy.predictor import Model
from hilum.deploy.screening import Flag
from hilum.evaluation.studies import study_uids

FORMAT = "hilum-predict-parts-1"
BATCHES_A_PART = 16
READING_THREADS, MOST_THREADS = 2, 16
"""Threads that read and decode: on a CPU, whose cores the network wants; for a GPU, one for each core up to this."""


@dataclass(frozen=True)
class Work:
    """What is to be read, for any process that reads parts of it."""

    model: Path
    engine: str | None
    precision: str | None
    store: Path | None
    """Where the images are, or None: they are files."""
    places: list[Any]
    """Of each image: its index in the store, or its path."""
    identity: dict[str, np.ndarray]
    """Columns of the prediction table, a row for each image."""
    view_sources: np.ndarray
    """Where each image's view is known from."""
    batch_size: int
    score_flagged: bool
    correct_inverted: bool
    processes: int = 1
    """That share the cores of this machine."""

    def threads(self, device: str) -> int:
        """Threads that read for one process, whose network runs on this type of device."""
        cores = (os.cpu_count() or 1) // self.processes
        return READING_THREADS if device == "cpu" else min(max(cores, READING_THREADS), MOST_THREADS)

    def __len__(self) -> int:
        return len(self.places)


class RefusedImage(NamedTuple):
    """An image that could not be read."""

    position: int
    reason: str
    message: str


@dataclass(frozen=True)
class Part:
    """What became of some of the images; positions are those among all images."""

    reading: RawReading
    refused: list[RefusedImage]


def cut(work: Work, whole_studies: bool) -> list[Int64[np.ndarray, " n"]]:
    """Positions of the images of each part: in order, or whole studies by their first image.

    Args:
        work: what is to be read.
        whole_studies: the images of a study come together.
    """
    size = BATCHES_A_PART * work.batch_size
    if not whole_studies:
        return np.split(np.arange(len(work)), np.arange(size, len(work), size))
    names = ("dataset", "patient_id", "study_id", "image_uid")
    studies = study_uids(*(work.identity[name] for name in names))
    _, first, of_image, counts = np.unique(studies, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first[of_image.reshape(-1)], kind="stable")
    begins = np.concatenate([[0], np.cumsum(counts[np.argsort(first, kind="stable")])[:-1]]).astype(np.int64)
    # a part begins with the first study that begins at or past a multiple of its size
    return np.split(order, begins[1:][np.diff(begins // size) != 0])


def read_part(
    model: Model, work: Work, positions: Int64[np.ndarray, " n"], done: Callable[[int], None], store: Store | None
) -> Part:
    """Read some of the images with a loaded model.

    Args:
        model: the one that `work` names.
        work: what is to be read.
        positions: which of it.
        done: told how many images were finished, after each batch.
        store: opened, where the images are in one.

    Raises:
        StoreError: a damaged record of a store.
    """
    refused: list[RefusedImage] = []
    device = getattr(model.networks[0], "device", None)
    device = "cpu" if device is None else torch.device(device).type

    def read(position: int) -> np.ndarray | None:
        if store is not None:
            return store.read(int(work.places[position]))
        path = work.places[position]
        try:
            return read_image(path, path.name, model.short_side, recipe=model.preprocess_id).pixels
        except ImageError as error:
            refused.append(RefusedImage(position, error.reason, str(error)))
            return None

    reading = model.read_images(
        {name: column[positions] for name, column in work.identity.items()}, positions, read, work.batch_size,
        work.threads(device), done, Gate(model.screening, work.score_flagged, work.correct_inverted),
        work.view_sources[positions],
    )  # fmt: skip
    found = RawReading(
        positions[reading.kept], reading.probabilities, reading.views, reading.view_sources,
        [one._replace(position=int(positions[one.position])) for one in reading.flagged],
    )  # fmt: skip
    return Part(found, sorted(refused))


def plan_of(work: Work, model: Model, chunks: Sequence[np.ndarray]) -> dict[str, str]:
    """Digests of everything that the parts depend on, by what it is."""
    inputs = hashlib.sha256(str(work.store).encode())
    for name, column in sorted(work.identity.items()):
        inputs.update("\x1f".join([name, *column.tolist(), ""]).encode())
    inputs.update(fingerprint(work.places, None if work.store is None else Store.open(work.store)).encode())
    settings = {
        "engine": work.engine, "precision": work.precision, "batch_size": work.batch_size,
        "computed": [network.config.precision for network in model.networks],
        "score_flagged": work.score_flagged, "correct_inverted": work.correct_inverted,
        "parts": [len(chunk) for chunk in chunks],
    }  # fmt: skip
    return {
        "model": model.digest,
        "inputs": inputs.hexdigest(),
        "settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
    }


class Parts:
    """The folder of parts. One process decides over it; any may write parts.

    Args:
        folder: `OUT.parts`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, plan: Mapping[str, str]) -> None:
        """Keep what was read by the same plan; say what has changed, and remove all parts, otherwise.

        Raises:
            HilumError: the folder cannot be written.
        """
        remove_leftovers(self.folder)
        try:
            before = read_json(self.folder / "plan.json", HilumError)
        except HilumError:
            before = None
        if before == {"format": FORMAT, **plan}:
            return
        if isinstance(before, dict):
            changed = [name for name, digest in plan.items() if before.get(name) != digest]
            say(f"{self.folder}: what was read before is of other {', '.join(changed) or 'versions'}; beginning afresh")
        for path in self.folder.iterdir():
            if path.name != LOCK_NAME:
                path.unlink()
        write_json(self.folder / "plan.json", {"format": FORMAT, **plan})

    def write(self, number: int, part: Part) -> None:
        """Keep a part: its file, then the mark that it is whole.

        Raises:
            HilumError: the disk is full or fails; names the path.
        """
        reading, path = part.reading, self.folder / f"{number}.npz"
        arrays = {f"network.{n}": values for n, values in enumerate(reading.probabilities)}
        if reading.view_sources is not None:
            arrays["view_sources"] = reading.view_sources
        flagged = [(one.position, *one.flag, one.scored) for one in reading.flagged]
        notes = json.dumps({"flagged": flagged, "refused": [list(one) for one in part.refused]})
        with atomic_file(path) as file:
            np.savez(file, kept=reading.kept, views=reading.views, notes=np.array(notes), **arrays)  # type: ignore[arg-type]
        write_json(self.folder / f"{number}.done", {"sha256": sha256_file(path)})

    def read(self, number: int) -> Part | None:
        """A part that was kept, or None: not there, or not whole."""
        path = self.folder / f"{number}.npz"
        try:
            if sha256_file(path) != read_json(self.folder / f"{number}.done", ValueError)["sha256"]:
                return None
            with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
                arrays = dict(loaded)
            notes = json.loads(str(arrays["notes"]))
            networks = sum(name.startswith("network.") for name in arrays)
            reading = RawReading(
                arrays["kept"], [arrays[f"network.{n}"] for n in range(networks)], arrays["views"],
                arrays.get("view_sources"),
                [Flagged(position, Flag(code, text), scored) for position, code, text, scored in notes["flagged"]],
            )  # fmt: skip
            return Part(reading, [RefusedImage(*one) for one in notes["refused"]])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def remove(self) -> None:
        """Remove the folder: its content has become a prediction file."""
        shutil.rmtree(self.folder, ignore_errors=True)
