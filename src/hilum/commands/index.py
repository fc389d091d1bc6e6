"""`hilum index`: a model and a store in, an index of the store's studies out, for `hilum similar` and `hilum serve`."""

from pathlib import Path

import numpy as np

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.tracking import next_step, progress, say
from hilum.core.types import SPLITS
from hilum.data.store import Store
from hilum.deploy.encoder import load_encoder
from hilum.deploy.index_building import build_index

READING_THREADS = 2


def run(
    model: str,
    data: str,
    out: Path,
    findings: list[str],
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Index the studies of a store; goes on where an interrupted run was.

    Args:
        model: a MODEL or an ensemble (its first network); a backbone alone, without `findings`.
        data: STORE, or STORE:split.
        out: a new folder.
        findings: also index what the queries of these pool; "all" for all that were trained.
        batch_size: images at a time.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: options that mean nothing, or `out` holds an index.
        StoreError: no store, or a damaged record.
        CheckpointError: the model is incomplete or damaged.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {batch_size}.")
    store, indices = open_part(data)
    encoder = load_encoder(model, device)
    names = [one for one, known in zip(encoder.findings, encoder.trained, strict=True) if known]
    if findings == ["all"] and not names:
        raise ConfigError(f"--finding all: {model} has no trained findings. Give a model made by hilum fit.")
    chosen = names if findings == ["all"] else findings
    with progress("index", len(indices), "images") as bar:
        index = build_index(
            encoder, store, indices, out, chosen, batch_size, READING_THREADS, bar.advance, model_path=model
        )
    queries = f", {len(chosen)} findings to ask by" if chosen else ""
    say(f"{out}: {len(index)} studies from {len(indices)} images, {encoder.dim} numbers each{queries}")
    if encoder.model:
        next_step(f"hilum similar {out} IMAGE ... --sheet cases.png")


def open_part(data: str) -> tuple[Store, np.ndarray]:
    """A store and the images of STORE or STORE:split.

    Raises:
        StoreError: no store.
        UnknownNameError: no such split.
        ConfigError: the split is empty.
    """
    name, colon, split = data.rpartition(":")
    if not colon or (Path(data) / "store.json").is_file():
        store = Store.open(Path(data))
        return store, np.arange(len(store))
    if not split or split not in SPLITS:
        raise UnknownNameError("split", split, [known for known in SPLITS if known])
    store = Store.open(Path(name))
    indices = store.indices(split)
    if not len(indices):
        raise ConfigError(f"{name} has no images of split {split!r}.")
    return store, indices
