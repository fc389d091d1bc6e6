"""Two small fitted models of different resolution, and their ensemble."""

from pathlib import Path

import numpy as np
import pytest

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy.ensemble_model import combine_models
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Hernia", "Mass")
SETTINGS = {
    "blocks": 2, "learning_rates": (1e-2,), "search_epochs": 2, "refit_epochs": 2, "batch_size": 16, "threads": 1,
    "workers": 1, "augmented_views": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    """A folder with `store`, `linear` (24 px), `decoder` (16 px, flip mean) and `ensemble`."""
    path = tmp_path_factory.mktemp("deploy")
    rng = np.random.default_rng(0)
    splits = ["train"] * 40 + ["val"] * 16 + ["test"] * 12
    labels = (rng.random((68, 3)) < 0.4).astype(np.int8)
    images = [
        rng.integers(0, 90, (26, 20 + 4 * (n % 4)), np.uint8) + np.uint8(100 * int(y))
        for n, y in enumerate(labels[:, 0])
    ]
    studies = [f"arrays/s{n // 2}" if n < 60 else f"arrays/s{n}" for n in range(68)]
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=splits, studies=studies,
        patients=[f"arrays/p{n // 4}" for n in range(68)],
    )  # fmt: skip
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    linear = FitConfig(head="linear", resolution=24, **SETTINGS)
    decoder = FitConfig(
        head="ml_decoder", decoder_dim=8, decoder_feed_forward=12, decoder_heads=2, flip_average=True, **SETTINGS
    )
    fit.run(linear, path / "store", path / "run", path / "linear", device="cpu")
    fit.run(decoder, path / "store", path / "run", path / "decoder", device="cpu")
    combine_models([path / "linear", path / "decoder"], path / "ensemble")
    return path


@pytest.fixture(scope="session")
def store(fitted: Path) -> Store:
    return Store.open(fitted / "store")
