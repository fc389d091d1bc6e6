"""Small made-up predictions and labels."""

from collections.abc import Callable

import numpy as np
import pytest

from hilum.core.seeding import stream
from hilum.evaluation.predictions import Predictions

Maker = Callable[..., tuple[Predictions, np.ndarray]]


def make(
    count: int = 60, findings: int = 4, patients: int = 20, seed: int = 0, **metadata: object
) -> tuple[Predictions, np.ndarray]:
    """Predictions of `count` images (about two a study) with informative scores, and their labels."""
    rng = stream(seed, "made-up predictions")
    labels = (rng.random((count, findings)) < np.linspace(0.4, 0.15, findings)).astype(np.int8)
    probabilities = np.round(1 / (1 + np.exp(-(rng.normal(size=labels.shape) + 1.5 * labels - 1))), 3)
    patient = rng.integers(0, patients, count)
    study = rng.integers(0, 2, count)
    table = Predictions(
        image_uid=np.array([f"{seed:04x}{index:012x}" for index in range(count)]),
        image_id=np.array([f"image-{index}.png" for index in range(count)]),
        study_id=np.array([f"d/s{a}-{b}" for a, b in zip(patient, study, strict=True)]),
        patient_id=np.array([f"d/p{a}" for a in patient]),
        dataset=np.full(count, "d"),
        view=np.where(rng.random(count) < 0.5, "PA", "LATERAL"),
        findings=tuple("ABCDEFGH"[:findings]),
        probabilities=probabilities,
        metadata=dict(metadata),
    )
    return table, labels


@pytest.fixture
def made_up() -> Maker:
    return make
