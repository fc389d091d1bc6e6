"""Copies of a store with something wrong in its added datasets on purpose, for runs/label_sources.py.

Nothing here is an option of the product: a fault is written into a copy of the labels or pixels, and `hilum fit` learns
from that copy as from any other store. Shards without a change are linked, not copied; what a store holds is in
docs/reference/store.md.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

from hilum.core.errors import ConfigError
from hilum.core.files import atomic_file, sha256_file, write_json
from hilum.core.seeding import stream
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.data.shards import Shard, encode, new_shard
from hilum.data.store import Store


def unknown_as_negative(labels: Int[np.ndarray, "N C"], rows: Bool[np.ndarray, " N"]) -> Int[np.ndarray, "N C"]:
    """Labels in which unknown (-1) and uncertain (-2) entries of `rows` say absent.

    What all heads of RPIDIAL/CheXFound linear_glori.py but the first are trained on.
    """
    return np.where(rows[:, None] & (labels < 0), NEGATIVE, labels).astype(labels.dtype)


def flip_labels(store: Store, rows: Bool[np.ndarray, " N"], share: float, seed: int) -> Int[np.ndarray, "N C"]:
    """Labels of the store in which, among `rows`, a share of what is called present is something else.

    For every dataset and finding, that share of the studies called present become absent and as many of those called
    absent present, so that a finding stays as frequent. The images of a study change together, as where one report was
    misread. Unknown and uncertain entries stay.

    Args:
        store: where from.
        rows: images that may change.
        share: of the positive studies, in [0, 1]; fewer where there are too few absent ones to change places with.
        seed: of the draw. With one seed, what changes at a smaller share also changes at a larger one.
    """
    labels = np.array(store.labels)
    for dataset in np.unique(store.datasets[rows]).tolist():
        images = np.flatnonzero(rows & (store.datasets == dataset))
        _, study = np.unique(store.studies[images], return_inverse=True)
        for column, finding in enumerate(store.findings):
            codes = store.labels[images, column]
            sides = [np.unique(study[codes == POSITIVE]), np.unique(study[codes == NEGATIVE])]
            sides[1] = np.setdiff1d(sides[1], sides[0])
            count = min(round(share * len(sides[0])), len(sides[1]))
            for name, studies, said in zip(("present", "absent"), sides, (NEGATIVE, POSITIVE), strict=True):
                order = stream(seed, "label noise", dataset, finding, name).permutation(len(studies))
                chosen = images[np.isin(study, studies[order[:count]]) & (codes >= 0)]
                labels[chosen, column] = said
    return labels


def keep_patients(store: Store, images: Int[np.ndarray, " n"], share: float, seed: int) -> Int[np.ndarray, " k"]:
    """Images of a share of the patients, at least one, in ascending order; a larger share holds a smaller one."""
    patients, of_image = np.unique(store.patients[images], return_inverse=True)
    order = stream(seed, "share of patients").permutation(len(patients))
    return images[np.isin(of_image, order[: max(1, round(share * len(patients)))])]


def shift_image(pixels: UInt8[np.ndarray, "H W"], gamma: float, blur: float) -> UInt8[np.ndarray, "H W"]:
    """Another scanner: grey levels v to 255 (v / 255)^gamma, then a Gaussian of deviation `blur` pixels."""
    table = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return cv2.GaussianBlur(table[pixels], (0, 0), blur) if blur else table[pixels]


def copy_store(store: Store, out: Path, labels: Int[np.ndarray, "N C"], splits: np.ndarray) -> Store:
    """The same images with other labels and splits.

    Args:
        store: where from; it stays as it is.
        out: a new folder, or what an interrupted copy left.
        labels: int8 codes for every image.
        splits: text for every image; "" for images that have no part.
    """
    arrays = _begin(store, out)
    for shard in store.shards:
        _link(store.path / "shards" / shard.name, out / "shards" / shard.name)
    names, codes = np.unique(splits, return_inverse=True)
    arrays["labels"], arrays["split"] = labels.astype(np.int8), codes.astype(np.int32)
    arrays["split_names"] = np.char.encode(names, "utf-8")
    return _finish(store, out, arrays, store.shards)


def shift_store(store: Store, out: Path, rows: Bool[np.ndarray, " N"], gamma: float, blur: float) -> Store:
    """The same labels, and `shift_image` of the pixels of `rows`, which are whole shards.

    Raises:
        ConfigError: a store without pixels of its own, or a shard of images of both kinds.
    """
    if store.in_place:
        raise ConfigError(f"{store.path} reads its images in place: there are no pixels to shift. Build it with them.")
    arrays = _begin(store, out)
    shards = []
    for number, shard in enumerate(store.shards):
        images = np.flatnonzero(store.shard_numbers == number)
        if not rows[images].any():
            _link(store.path / "shards" / shard.name, out / "shards" / shard.name)
            shards.append(shard)
            continue
        if not rows[images].all():
            raise ConfigError(f"{store.path}: shard {shard.name} holds images that are to stay; expected one dataset.")
        with new_shard(out / "shards" / shard.name) as writer:
            for image in images.tolist():
                record = encode(shift_image(store.read(image), gamma, blur), store.encoding)
                values = writer.append(record)
                for name, value in zip(("offset", "length", "checksum"), values, strict=True):
                    arrays[name][image] = value
        described = asdict(shard) | {"bytes": writer.offset, "sha256": writer.digest.hexdigest()}
        shards.append(Shard(**described))
    return _finish(store, out, arrays, shards)


def _begin(store: Store, out: Path) -> dict[str, np.ndarray]:
    """An empty folder, and the arrays of the index."""
    if out.exists():
        shutil.rmtree(out)
    (out / "shards").mkdir(parents=True)
    with np.load(store.path / "index.npz", allow_pickle=False) as index:
        return {name: index[name] for name in index.files}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


def _finish(store: Store, out: Path, arrays: dict[str, Any], shards: Any) -> Store:
    with atomic_file(out / "index.npz") as file:
        np.savez(file, **arrays)
    changed = {"shards": [asdict(shard) for shard in shards], "index_sha256": sha256_file(out / "index.npz")}
    write_json(out / "store.json", {**store.header, **changed})
    return Store.open(out)
