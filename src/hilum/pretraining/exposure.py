"""Which images self-supervision may use, and the record of those it has seen: `seen.npz` of a run.

Held-out images never enter the pool, nor does any other image of a held-out patient. The record follows the weights
from stage to stage, so that an evaluation can tell whether a backbone has met its images. Knows stores, not networks.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from hilum.core.errors import CheckpointError, ConfigError, UnknownNameError
from hilum.core.files import atomic_file, read_json
from hilum.core.types import SPLITS
from hilum.data.store import Store

SEEN_NAME = "seen.npz"


class Pool(NamedTuple):
    """The images that a run draws from."""

    indices: Int64[np.ndarray, " n"]
    """Positions in the store, ascending."""
    not_allowed: int
    """Left out because their source does not allow it (ssl_ok)."""
    held_out: int
    """Left out because of their split."""
    held_out_patients: int
    """Left out because their patient has images in a split that is held out."""


def select(store: Store, train_on: Sequence[str]) -> Pool:
    """Images that are allowed, in one of the splits `train_on`, and of no patient with images in another named split.

    Args:
        store: all images.
        train_on: splits; "" is the images that belong to none.

    Raises:
        UnknownNameError: a split that does not exist.
        ConfigError: nothing is left.
    """
    for split in train_on:
        if split not in SPLITS:
            raise UnknownNameError("split", split, [name for name in SPLITS if name])
    splits, patients = store.splits, np.char.add(np.char.add(store.datasets, "\x1f"), store.patients)
    wanted = np.isin(splits, list(train_on))
    held_out = ~wanted & (splits != "")
    shared = wanted & np.isin(patients, np.unique(patients[held_out]))
    if store.accepted_leak:  # said in the announcement, and written into the run
        shared = np.zeros(len(store), bool)
    chosen = store.ssl_ok & wanted & ~shared
    if not chosen.any():
        named = ", ".join(repr(split) for split in train_on)
        raise ConfigError(
            f"{store.path}: none of its {len(store)} images can be used. In the splits {named}: {int(wanted.sum())}; "
            f"of these {int((wanted & ~store.ssl_ok).sum())} are not allowed for pretraining (ssl_ok), and "
            f"{int(shared.sum())} share a patient with held-out images. Check the splits of the manifest, or train_on."
        )
    return Pool(
        np.flatnonzero(chosen).astype(np.int64),
        not_allowed=int((wanted & ~store.ssl_ok).sum()),
        held_out=int((~wanted).sum()),
        held_out_patients=int((shared & store.ssl_ok).sum()),
    )


def uid_numbers(uids: np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Image identities (16 hex digits) as numbers.

    Raises:
        ConfigError: an identity of another form.
    """
    try:
        return np.array([int(uid, 16) for uid in uids.tolist()], np.uint64)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"Expected image identities of 16 hex digits: {error}.") from error


def seen_digest(uids: UInt64[np.ndarray, " n"]) -> str:
    """SHA-256 of the sorted identities."""
    return hashlib.sha256(np.sort(uids).astype("<u8").tobytes()).hexdigest()


def leak_of(weights: Path) -> str:
    """The leak by design that weights carry, in words, from the `config.json` beside them; "" for none."""
    return str(_described_beside(weights).get("accepted_leak") or "")


def not_recorded(weights: Path, name: str = "") -> str:
    """Of which weights, these or those that they come from, nobody recorded the images; "" where all are recorded.

    No record is not an empty record: whoever reads `seen.npz` asks this too.

    Args:
        weights: a file or a folder with weights.
        name: what to call them; "": their folder's name, and a file's own.
    """
    folder = weights if weights.is_dir() else weights.parent
    if not (folder / SEEN_NAME).is_file():
        return name or "/".join(weights.resolve().parts[-1 if weights.is_dir() else -2 :])
    return str(_described_beside(weights).get("not_recorded") or "")


def _described_beside(weights: Path) -> dict[str, Any]:
    described = (weights if weights.is_dir() else weights.parent) / "config.json"
    content = read_json(described, CheckpointError) if described.is_file() else {}
    return content if isinstance(content, dict) else {}


def join_leaks(*leaks: str) -> str:
    """Several accepted leaks as one text, each once."""
    return "; ".join(dict.fromkeys(leak for leak in leaks if leak))


class Seen(NamedTuple):
    """What a run has been trained on."""

    uids: UInt64[np.ndarray, " n"]
    """Identities of the images."""
    pictures: UInt64[np.ndarray, " m"]
    """The same pictures by the name that they have in any dataset (`Store.pictures`)."""


class Origin(NamedTuple):
    """What a run takes over from the weights that it starts from, beside the weights."""

    seen: Seen = Seen(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    """What they have been trained on, as far as recorded."""
    accepted_leak: str = ""
    """A leak by design, in words."""
    not_recorded: str = ""
    """The weights, these or earlier ones, of which nothing lists what they have seen; "" for none."""
    sha256: str = ""
    """Of a file that tells these weights from others, wherever they are moved (`state.is_origin`)."""


def write_seen(folder: Path, seen: Seen) -> str:
    """Write `seen.npz` (`uids`, `pictures`: sorted uint64; `sha256`: of the uids) and return the digest."""
    ordered = np.unique(seen.uids)
    digest = seen_digest(ordered)
    with atomic_file(folder / SEEN_NAME) as file:
        np.savez(file, uids=ordered, pictures=np.unique(seen.pictures), sha256=np.array(digest))
    return digest


def read_seen(folder: Path) -> Seen:
    """What a run's `seen.npz` lists; nothing when there is no such file.

    Raises:
        CheckpointError: damaged.
    """
    path = folder / SEEN_NAME
    if not path.exists():
        return Seen(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            uids, digest = arrays["uids"], str(arrays["sha256"])
            pictures = arrays.get("pictures", uids)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy it again from its run.") from error
    if uids.dtype != np.uint64 or seen_digest(uids) != digest:
        raise CheckpointError(f"{path} is damaged: its digest is not the one recorded. Copy it again from its run.")
    return Seen(uids, pictures)
