"""What `fit` and `extend` write of what a head has seen: its validation predictions, the images it has met, and what
they look like, so that a picture of another kind is told from them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hilum.commands.fit_inputs import Examples
from hilum.core.seeding import stream
from hilum.core.tracking import progress
from hilum.deploy import model_files as files
from hilum.deploy.gradients import gradient_map
from hilum.deploy.network import Network, raw_probabilities, store_identity
from hilum.deploy.screening import LEAST_IMAGES, fit_screening, write_screening
from hilum.evaluation.predictions import Predictions
from hilum.heads.config import FitConfig
from hilum.heads.features import read_ahead
from hilum.pretraining.exposure import Seen, uid_numbers


def predict_validation(
    network: Network, examples: Examples, config: FitConfig, provenance: dict[str, Any]
) -> Predictions:
    """Raw predictions of validation images through the code path of every prediction."""
    val = examples.val
    with progress("validation", len(val), "images") as bar:
        [values], _ = raw_probabilities(
            [network], val, examples.store.read, config.batch_size, config.workers, bar.advance,
            studies=examples.studies[val], views=examples.views[val],
        )  # fmt: skip
    groups = {finding.name: finding.group for finding in network.config.findings}
    facts = {"split": "val", "head_splits": ["train"], "groups": groups, **provenance}
    return Predictions(
        **store_identity(examples.store, val), findings=network.findings, probabilities=values, metadata=facts
    )


def exposure_of(examples: Examples, refit: bool, seen: Seen | None = None) -> files.Exposure:
    """The images of train, and of val where a refit learns from them, beside those of the backbone's pretraining."""
    store, val = examples.store, examples.val if refit else examples.val[:0]
    train_pictures, val_pictures = (uid_numbers(store.pictures[images]) for images in (examples.train, val))
    learned = np.union1d(train_pictures, val_pictures)
    return files.Exposure(
        np.zeros(0, np.uint64) if seen is None else seen.uids, uid_numbers(store.uids[examples.train]),
        uid_numbers(store.uids[val]), learned if seen is None else np.union1d(seen.pictures, learned),
        train_pictures, val_pictures, uid_numbers(store.pictures[examples.val]),
    )  # fmt: skip


SCREENED_IMAGES = {"train": 2000, "val": 1000}
"""At most so many are looked at to tell pictures of another kind from them."""


def screen_inputs(out: Path, examples: Examples, config: FitConfig) -> dict[str, Any]:
    """Fit screening and the view classifier on training images, try them on validation, and write both.

    Returns:
        what `config.json` says of them; nothing where there are too few training images.
    """
    store, looked_at = examples.store, {}
    for split, images in (("train", examples.train), ("val", examples.val)):
        if len(examples.train) < LEAST_IMAGES:
            return {}
        order = stream(config.seed, "screening", split).permutation(len(images))[: SCREENED_IMAGES[split]]
        chosen = images[np.sort(order)]
        read = read_ahead([chosen], lambda index: gradient_map(store.read(index)), config.workers)
        looked_at[split] = chosen, np.stack([one for _, batch in read for one in batch])
    (train, maps), (val, validation) = looked_at["train"], looked_at["val"]
    fitted = fit_screening(
        maps, store.views[train].tolist(), store.patients[train].tolist(), validation, store.views[val].tolist()
    )
    return {} if fitted is None else {"screening": write_screening(out, fitted)}
