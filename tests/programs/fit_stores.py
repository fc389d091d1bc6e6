"""A small store to fit heads on, and small settings, for several test files."""

from pathlib import Path

import numpy as np

from hilum.core.config import override
from hilum.data.store import Store, write_arrays
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Hernia", "Mass", "Never")
SPLITS = ["train"] * 40 + ["val"] * 16 + ["test"] * 8
SMALL = FitConfig(
    head="linear", blocks=2, learning_rates=(1e-3, 1e-2, 1e-1), search_epochs=3, refit_epochs=3, batch_size=16,
    augmented_views=2, threads=1, workers=1,
)  # fmt: skip
DECODER = override(SMALL, ["head=ml_decoder", "decoder_dim=8", "decoder_feed_forward=12", "decoder_heads=2"])


def make_store(path: Path, splits: list[str] = SPLITS, test_labels: int | None = None, **options) -> Store:
    """Bright images have Edema; "Never" has no positive in train; some labels are unknown."""
    rng = np.random.default_rng(0)
    labels = (rng.random((len(splits), 4)) < 0.4).astype(np.int8)
    labels[:, 3] = [0 if split == "train" else 1 for split in splits]
    labels[::5, 1], labels[::7, 2] = -1, -2
    images = [
        rng.integers(0, 90, (24, 20 + 4 * (n % 3)), np.uint8) + np.uint8(130 * int(y))
        for n, y in enumerate(labels[:, 0])
    ]
    if test_labels is not None:
        labels[[split == "test" for split in splits]] = test_labels
    defaults = {
        "studies": [f"s{n // 2}" for n in range(len(splits))],
        "patients": [f"p{n // 2}" for n in range(len(splits))],
    }
    return write_arrays(path, images, labels, FINDINGS, splits=splits, **(defaults | options))
