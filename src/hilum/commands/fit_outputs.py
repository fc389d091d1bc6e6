"""What `fit` and `extend` write of what a head has seen: its validation predictions, and the images it has met."""

from typing import Any

import numpy as np

from hilum.commands.fit_inputs import Examples
from hilum.core.tracking import progress
from hilum.deploy import model_files as files
from hilum.deploy.network import Network, raw_probabilities, store_identity
from hilum.evaluation.predictions import Predictions
from hilum.heads.config import FitConfig
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
    pictures = uid_numbers(store.pictures[np.concatenate([examples.train, val])])
    return files.Exposure(
        np.zeros(0, np.uint64) if seen is None else seen.uids, uid_numbers(store.uids[examples.train]),
        uid_numbers(store.uids[val]), pictures if seen is None else np.union1d(seen.pictures, pictures),
    )  # fmt: skip
