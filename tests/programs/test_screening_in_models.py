"""Screening is part of a model: fitted with it, kept when findings are added, taken over by ensembles and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import strangers

from hilum.commands import extend, fit
from hilum.core.config import override
from hilum.core.errors import CheckpointError
from hilum.data.store import write_arrays
from hilum.deploy.ensemble_model import combine_models
from hilum.deploy.gradients import gradient_map
from hilum.deploy.predictor import load
from hilum.heads.config import FitConfig

SMALL = FitConfig(
    head="linear", resolution=32, blocks=1, learning_rates=(1e-2,), search_epochs=1, refit_epochs=1, batch_size=16,
    augmented_views=1, threads=1, workers=1, findings=("Edema", "Mass"), loss="masked_bce_mean",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("screening")
    rng = np.random.default_rng(0)
    images = [strangers.film(rng, bool(n % 2)) for n in range(150)]
    labels = (rng.random((150, 3)) < 0.5).astype(np.int8)
    for name, count in (("store", 150), ("few", 60)):
        write_arrays(
            path / name, images[:count], labels[:count], ("Edema", "Mass", "Hernia"),
            splits=["train"] * (count - 30) + ["val"] * 30, patients=[f"p{n // 3}" for n in range(count)],
            views=["PA" if n % 2 == 0 else "LATERAL" for n in range(count)],
        )  # fmt: skip
    fit.run(SMALL, path / "store", "random:demo16", path / "model", device="cpu")
    return path


def entry(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())["screening"]


def test_a_model_is_screened_and_says_how(folder: Path) -> None:
    written, screening = entry(folder / "model"), load(folder / "model", "cpu").screening
    assert screening is not None
    assert (written["images"], written["validation"]) == (120, 30)
    assert written["groups"] == {"frontal": 60, "lateral": 60}
    assert written["false_flags"] <= 0.1
    assert written["views"]["training"] == {"PA": 60, "lateral": 60}
    assert screening.threshold == written["threshold"]
    upright, other = (
        strangers.film(np.random.default_rng(9)),
        strangers.hand(np.random.default_rng(9), np.zeros((9, 9))),
    )
    assert [one.flag is None for one in screening.judge(np.stack([gradient_map(upright), gradient_map(other)]))] == [
        True, False,
    ]  # fmt: skip


def test_the_same_fit_gives_the_same_screening(folder: Path, tmp_path: Path) -> None:
    again = override(SMALL, ["learning_rates=[0.03]", "workers=2"])
    fit.run(again, folder / "store", "random:demo16", tmp_path / "model", device="cpu")
    assert entry(tmp_path / "model") == entry(folder / "model")


def test_too_few_images_make_a_model_all_the_same(folder: Path, tmp_path: Path) -> None:
    fit.run(SMALL, folder / "few", "random:demo16", tmp_path / "model", device="cpu")
    assert load(tmp_path / "model", "cpu").screening is None
    assert not (tmp_path / "model" / "screening.npz").exists()


def test_a_screening_that_is_gone_is_no_model_without_one(folder: Path, tmp_path: Path) -> None:
    for source in (folder / "model").iterdir():
        if source.name != "screening.npz":
            (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(CheckpointError, match=r"screening\.npz cannot be read"):
        load(tmp_path, "cpu")


def test_an_ensemble_is_screened_as_its_first_member_that_is(folder: Path, tmp_path: Path) -> None:
    fit.run(
        override(SMALL, ["learning_rates=[0.05]"]), folder / "store", "random:demo16", tmp_path / "other", device="cpu"
    )
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    del config["screening"]  # as of an older version
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    combine_models([tmp_path / "other", folder / "model"], tmp_path / "both")
    screening = load(tmp_path / "both", "cpu").screening
    assert screening is not None
    assert screening.threshold == entry(folder / "model")["threshold"]


@pytest.mark.slow
def test_added_findings_leave_it_as_it_is(folder: Path, tmp_path: Path) -> None:
    fast = ("search_epochs=1", "refit_epochs=1", "learning_rates=[0.01]")
    extend.run(folder / "model", folder / "store", ("Hernia",), tmp_path / "more", fast, device="cpu")
    assert entry(tmp_path / "more") == entry(folder / "model")
    assert (tmp_path / "more" / "screening.npz").read_bytes() == (folder / "model" / "screening.npz").read_bytes()
    assert load(tmp_path / "more", "cpu").screening is not None


@pytest.mark.slow
def test_an_export_is_screened_as_its_model(folder: Path, tmp_path: Path) -> None:
    from hilum.commands import export

    export.run(folder / "model", "onnx", tmp_path / "exported")
    picture = 255 - strangers.film(np.random.default_rng(3))
    exported = load(tmp_path / "exported", "cpu").predict(picture, attention=False)
    assert exported.image_flags == load(folder / "model", "cpu").predict(picture).image_flags
    assert exported.scored == [False]
