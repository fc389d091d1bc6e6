"""hilum verify: read and decode every record of a store, and compare every shard with what was written.

The same for the tars that `hilum convert` wrote.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from hilum.core.errors import StoreError
from hilum.core.files import sha256_file
from hilum.core.tracking import next_step, progress, say
from hilum.data.store import Store
from hilum.data.webdataset import check, is_export, listed

SHOWN = 20
"""Damaged images and shards that are listed by name; all are counted."""


def run(store: Path) -> None:
    """Check a store whole, or the tars of an export.

    Raises:
        StoreError: not a finished store or export, or anything in it is damaged.
    """
    if is_export(store):
        _check_tars(store)
        return
    opened = Store.open(store)
    faults, damaged = _check_records(opened)
    faults += _check_shards(opened)
    _list(faults)
    kind = f"{'in place' if opened.in_place else opened.encoding}, {len(opened.shards)} shards"
    say(f"{len(opened) - damaged} of {len(opened)} images read and decoded ({kind}).")
    for name, values in (("dataset", opened.datasets), ("split", opened.splits)):
        counts = ", ".join(f"{value or 'none'} {count}" for value, count in sorted(Counter(values.tolist()).items()))
        say(f"  by {name}: {counts or 'nothing'}")
    if faults:
        raise StoreError(f"{store} is damaged: {len(faults)} faults. Delete the shards named above and build again.")
    next_step(f"hilum pretrain RECIPE --data {store} --out RUN")


def _check_tars(folder: Path) -> None:
    tars = listed(folder)
    faults: list[str] = []
    with progress("verify", sum(tar.images for tar in tars), "images") as bar:
        for tar in tars:
            faults += check(folder, tar, bar)
    _list(faults)
    say(f"{sum(tar.images for tar in tars)} images in {len(tars)} tars, {len(faults)} faults.")
    if faults:
        raise StoreError(f"{folder} is damaged: {len(faults)} faults. Copy it again, or run `hilum convert` again.")
    next_step(f"hilum convert {folder} --out STORE")


def _list(faults: list[str]) -> None:
    for fault in faults[:SHOWN]:
        say(fault)
    if len(faults) > SHOWN:
        say(f"... and {len(faults) - SHOWN} more.")


def _check_records(store: Store) -> tuple[list[str], int]:
    """Messages, and how many images cannot be read."""
    faults: list[str] = []
    with progress("verify", len(store), "images") as bar:
        for index in range(len(store)):
            try:
                store.read(index)
            except StoreError as error:
                faults.append(str(error))
            bar.advance()
    damaged = len(faults)
    if len(np.unique(store.uids)) != len(store):
        faults.append(f"{store.path}: two images have the same uid.")
    return faults, damaged


def _check_shards(store: Store) -> list[str]:
    changed = [shard.name for shard in store.shards if sha256_file(store.path / "shards" / shard.name) != shard.sha256]
    return [f"{store.path}: shards/{name} is not what was written (SHA-256)." for name in changed]
