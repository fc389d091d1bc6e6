"""From the images of a store to an index of its studies (`similar.py`): every image through the backbone once.

Rows are studies in the order in which they first come among the images. Vectors are written as they are made, and
`index.json` last, so that a folder that has one is complete.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Int, Int64

import hilum
from hilum.core.errors import ConfigError, EmptyStudyError, HilumError
from hilum.core.files import atomic_file, read_json, write_json
from hilum.core.types import FRONTAL_VIEWS, RESEARCH_NOTICE
from hilum.data.store import Indices, Store
from hilum.deploy.embeddings import embed_many, study_means
from hilum.deploy.encoder import Encoder
from hilum.deploy.nearest import centre_of, lengths_of
from hilum.deploy.network import store_identity
from hilum.deploy.similar import FORMAT, HEADER_NAME, ROWS_NAME, STUDIES_NAME, Index, column_of
from hilum.evaluation.studies import study_uids
from hilum.heads.batches import in_order

PROGRESS_NAME = "progress.json"
PART = 2048
"""Images after which progress is kept, and the rest of the last study."""


def build_index(
    encoder: Encoder,
    store: Store,
    indices: Indices,
    out: Path | str,
    findings: Sequence[str] = (),
    batch_size: int = 32,
    workers: int = 2,
    done: Callable[[int], None] = lambda count: None,
    model_path: Path | str | None = None,
    part: int = PART,
) -> Index:
    """Write the index of images of a store, and open it. Goes on where an interrupted one with the same arguments was.

    Args:
        encoder: of the model whose queries will be searched with.
        store: made with the encoder's preprocessing recipe.
        indices: which images; all images of a study should be among them.
        out: a new folder.
        findings: also what the queries of these pool.
        batch_size: images at a time.
        workers: threads that read.
        done: told how many images were finished.
        model_path: where the model is, for `hilum similar`.
        part: images after which progress is kept.

    Raises:
        ConfigError: `out` holds an index, or a finding that cannot be searched by.
        PreprocessingMismatchError: a store of another recipe.
        EmptyStudyError: no image.
        StoreError: a damaged record.
    """
    out, chosen = Path(out), np.asarray(list(indices), dtype=np.int64)
    if (out / HEADER_NAME).exists():
        raise ConfigError(f"{out} already holds an index. Choose another folder, or move this one away.")
    store.check_recipe(encoder.preprocess_id)
    encoder.check_findings(findings)
    if not len(chosen):
        raise EmptyStudyError("There is no image to index.")
    rows, columns = describe_rows(store, chosen)
    names = list(dict.fromkeys(findings))
    files: dict[str | None, str] = {None: STUDIES_NAME}
    files |= {name: f"finding_{number:03d}.npy" for number, name in enumerate(names)}
    facts = [encoder.digest, encoder.head_digest, encoder.precision, names, part, store.fingerprint(chosen)]
    key = hashlib.sha256(json.dumps(facts).encode() + rows.tobytes()).hexdigest()
    finished = _finished_parts(out, key, list(files.values()))
    vectors: dict[str | None, Float16[np.ndarray, "R _"]] = {}
    for number, places in enumerate(one.images for one in in_order(np.arange(len(chosen)), part, rows)):
        if number < finished:
            done(len(places))
            continue
        batches = embed_many(
            encoder, chosen[places], store.read, names, rows[places], store.views[chosen[places]], batch_size, workers,
            done,
        )  # fmt: skip
        for positions, found in batches:
            for name, file in files.items():
                values = found.cls if name is None else found.pooled[name]
                if name not in vectors:
                    shape = (len(columns["image_uid"]), values.shape[1])
                    vectors[name] = _vectors(out / file, shape, new=finished == 0)
                row, means = study_means(values, rows[places[positions]])
                vectors[name][row] = means.astype(np.float16)
        for one in vectors.values():
            one.flush()  # type: ignore[attr-defined]
        write_json(out / PROGRESS_NAME, {"key": key, "parts": number + 1})
    widths = {}
    for name, file in files.items():
        written = np.load(out / file, mmap_mode="r")
        centre = np.zeros(written.shape[1], np.float32) if name is None else centre_of(written)
        widths[name] = written.shape[1]
        columns |= {column_of("length", file): lengths_of(written, centre), column_of("centre", file): centre}
    with atomic_file(out / ROWS_NAME) as table:
        np.savez(table, **columns)  # type: ignore[arg-type]
    write_json(out / HEADER_NAME, {
        "format": FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        "model": encoder.model,
        "model_path": _where(model_path, out) if model_path is not None else None,
        "backbone": encoder.digest,
        "head": encoder.head_digest,
        "preprocess_id": encoder.preprocess_id,
        "resolution": encoder.resolution,
        "rows": len(columns["image_uid"]),
        "images": len(chosen),
        "dim": widths[None],
        "queries": [{"name": name, "file": files[name], "dim": widths[name]} for name in names],
        "labels": list(store.findings),
        "store": _where(store.path, out) | {"fingerprint": store.fingerprint(chosen)},
    })  # fmt: skip
    (out / PROGRESS_NAME).unlink(missing_ok=True)
    return Index.open(out)


def _finished_parts(out: Path, key: str, names: Sequence[str]) -> int:
    """Parts that an interrupted call with the same arguments has written; none where one of its files is gone."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        found = read_json(out / PROGRESS_NAME, HilumError)
        there = all((out / name).is_file() for name in names)
        return int(found["parts"]) if found["key"] == key and there else 0
    except (HilumError, KeyError, TypeError):
        return 0


def _vectors(path: Path, shape: tuple[int, int], new: bool) -> Float16[np.ndarray, "N D"]:
    if new:
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    return np.lib.format.open_memmap(path, mode="r+")


def describe_rows(store: Store, chosen: Int64[np.ndarray, " N"]) -> tuple[Int64[np.ndarray, " N"], dict[str, Any]]:
    """The row of each image, and the columns of `rows.npz`: who the studies are, and which image stands for each.

    A study is shown by its first frontal image, or its first one.
    """
    identity = store_identity(store, chosen)
    studies = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
    _, first, numbers = np.unique(studies, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    rows = rank[numbers.reshape(-1)]
    views = identity["view"]
    frontal = np.isin(views, sorted(FRONTAL_VIEWS))
    order = np.lexsort((np.arange(len(rows)), ~frontal, rows))
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    shown = order[starts]
    joined = ["+".join(sorted(set(group))) for group in np.split(views[order], starts[1:])]
    by_id = np.argsort(identity["image_id"], kind="stable")
    columns: dict[str, Any] = {
        "image_uid": _bytes(identity["image_uid"][shown]),
        "image_id": _bytes(identity["image_id"][shown]),
        "study": _bytes(identity["study_id"][shown]),
        "store_index": chosen[shown],
        "images": np.bincount(rows).astype(np.int32),
        "label": joined_labels(store.labels[chosen], rows, len(shown)),
        "every_image_id": _bytes(identity["image_id"][by_id]),
        "every_row": rows[by_id].astype(np.int32),
    }
    for name, values in (("patient", identity["patient_id"][shown]), ("dataset", identity["dataset"][shown]),
                         ("view", np.array(joined))):  # fmt: skip
        names, numbers = np.unique(_bytes(values), return_inverse=True)
        columns |= {f"{name}_names": names, name: numbers.reshape(-1).astype(np.int32)}
    return rows, columns


def joined_labels(codes: Int[np.ndarray, "N C"], row_of: Int64[np.ndarray, " N"], rows: int) -> Int[np.ndarray, "R C"]:
    """Label codes of studies: present where any image has it, else absent where any is known to lack it."""
    found = np.full((rows, codes.shape[1]), np.iinfo(np.int8).min, np.int8)
    np.maximum.at(found, row_of, codes)
    return found


def _bytes(texts: np.ndarray) -> np.ndarray:
    """UTF-8, whose order is that of the code points."""
    return np.char.encode(np.asarray(texts, dtype=str), "utf-8")


def _where(path: Path | str, out: Path) -> dict[str, str]:
    """A path twice: relative to the index, so that both can move together, and as it is now."""
    absolute = Path(path).resolve()
    return {"relative": os.path.relpath(absolute, out.resolve()), "path": str(absolute)}
