"""`hilum fit` from a store to a MODEL directory: the protocol, the out-of-sample rule, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_stores import DECODER, FINDINGS, SMALL, make_store

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.core.config import override
from hilum.core.errors import (
    ConfigError,
    LeakageError,
    NonFiniteLossError,
    PreprocessingMismatchError,
    StageError,
    UnknownNameError,
)
from hilum.core.seeding import forked
from hilum.data.store import Store
from hilum.deploy import model_files as files
from hilum.deploy.out_of_sample import fit_calibrators
from hilum.deploy.predictor import load
from hilum.evaluation.predictions import read_predictions
from hilum.heads import training
from hilum.heads.config import FitConfig
from hilum.heads.features import FeatureSource
from hilum.heads.sweep import Sweep
from hilum.pretraining.exposure import Seen, uid_numbers, write_seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    store = make_store(path / "store")
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 3, 2, patch_size=8, image_size=16))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    write_seen(path / "run", Seen(uid_numbers(store.uids[:10]), uid_numbers(store.pictures[:10])))
    fit.run(SMALL, path / "store", path / "run", path / "linear")
    fit.run(DECODER, path / "store", path / "run", path / "decoder")
    prepared = ["standardise=true", "prior_bias=true"]
    fit.run(override(SMALL, [*prepared, "patch_mean=true"]), path / "store", path / "run", path / "prepared_linear")
    fit.run(override(DECODER, [*prepared, "cat_cls=true"]), path / "store", path / "run", path / "prepared_decoder")
    return path


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_model_directory_is_complete_and_holds_no_pickle(folder: Path) -> None:
    expected = {
        "model.safetensors", "config.json", "validation_logits.parquet", "validation_labels.npz", "search.json",
        "README.md", "checklist.md", "exposure.npz",
    }  # fmt: skip
    for name in ("linear", "decoder"):
        assert {path.name for path in (folder / name).iterdir()} == expected
    content = settings(folder / "linear")
    assert [finding["name"] for finding in content["findings"]] == list(FINDINGS)
    assert content["findings"][3] == {"name": "Never", "group": "tail", "trained": False, "positives": 0, "known": 40}
    assert content["findings"][0]["group"] == "head"
    assert content["preprocessing"] == {"id": "hilum-grey-1", "resolution": 16, "short_side": None}
    assert content["exposure"]["images"] == {"pretraining": 10, "train": 40, "val": 16}
    card = (folder / "linear" / "README.md").read_text()
    assert "Research use only" in card
    assert "Never" in card


def test_search_record_says_what_was_chosen_and_why(folder: Path) -> None:
    record = json.loads((folder / "linear" / "search.json").read_text())
    rates = [one["learning_rate"] for one in record["variants"]]
    assert rates == [1e-3, 1e-2, 1e-1]
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2, 3]
    assert record["findings"] == ["Edema", "Hernia", "Mass"]
    last = record["epochs"][-1]["scores"]
    chosen = record["chosen"]
    rate = chosen["variant"]["learning_rate"]
    assert rate == rates[int(np.argmax(last))]
    assert chosen["score"] == max(last)
    course = [epoch["scores"][rates.index(rate)] for epoch in record["epochs"]]
    assert chosen["epoch"] == int(np.argmax(course)) + 1
    assert chosen["refit_epochs"] == max(round(chosen["epoch"] * 40 / 56), 1) == len(record["refit_losses"])
    assert len(chosen["reasons"]) == 3


@pytest.mark.parametrize("name", ["linear", "decoder", "prepared_linear", "prepared_decoder"])
def test_validation_predictions_are_those_of_the_search_head_and_score_as_recorded(folder: Path, name: str) -> None:
    predictions, labels = files.read_validation(folder / name)
    store = Store.open(folder / "store")
    assert set(predictions.image_uid) == set(store.uids[40:56])
    assert predictions.metadata["head_splits"] == ["train"]
    record = json.loads((folder / name / "search.json").read_text())
    chosen = record["chosen"]
    recorded = record["epochs"][chosen["epoch"] - 1]["scores"][record["variants"].index(chosen["variant"])]
    from sklearn.metrics import average_precision_score

    values = []
    for column in range(3):
        keep = labels[:, column] >= 0
        values.append(average_precision_score(labels[keep, column], predictions.probabilities[keep, column]))
    assert np.mean(values) == pytest.approx(recorded, abs=1e-9)
    refit = load(folder / name, "cpu").predict_store(store, range(40, 56), raw=True)
    assert np.abs(refit.probabilities[:, :3] - predictions.probabilities[:, :3]).max() > 1e-4


def test_calibrators_were_fitted_on_the_search_heads_validation(folder: Path) -> None:
    content = settings(folder / "decoder")
    predictions, labels = files.read_validation(folder / "decoder")
    fitted_on = content["fitted_on"]
    store = Store.open(folder / "store")
    assert fitted_on["head"] == "search"
    assert fitted_on["split"] == "val"
    assert fitted_on["store_fingerprint"] == store.fingerprint(range(40, 56))
    groups = {finding["name"]: finding["group"] for finding in content["findings"]}
    again = fit_calibrators([predictions], labels, groups, [uid_numbers(store.uids[:40])])
    assert again["image"].to_dict() == content["calibration"]["image"]
    assert again["study"].to_dict() == content["calibration"]["study"]
    assert content["calibration"]["image"]["stage"] == "raw"
    assert content["calibration"]["study"]["unit"] == "study"
    assert content["calibration"]["study"]["fitted_on"]["items"] == 8


def test_calibration_on_images_the_head_was_trained_on_is_refused(folder: Path) -> None:
    predictions, labels = files.read_validation(folder / "linear")
    exposure = files.read_exposure(folder / "linear", settings(folder / "linear"))
    with pytest.raises(StageError, match="16 of 16 validation images"):
        fit_calibrators([predictions], labels, {}, [np.concatenate([exposure.train, exposure.val])])
    store = Store.open(folder / "store")
    refit = load(folder / "linear", "cpu").predict_store(store, range(40, 56))
    with pytest.raises(StageError, match="raw image predictions"):
        fit_calibrators([refit], labels, {}, [exposure.train])


def test_the_same_seed_gives_the_same_files_and_another_does_not(folder: Path, tmp_path: Path) -> None:
    fit.run(DECODER, folder / "store", folder / "run", tmp_path / "same")
    fit.run(override(DECODER, ["seed=1"]), folder / "store", folder / "run", tmp_path / "other")
    for name in ("model.safetensors", "config.json", "search.json", "exposure.npz"):
        assert (tmp_path / "same" / name).read_bytes() == (folder / "decoder" / name).read_bytes(), name
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (
        folder / "decoder" / "model.safetensors"
    ).read_bytes()


def test_labels_of_the_test_split_are_never_looked_at(folder: Path, tmp_path: Path) -> None:
    """Defect C7 and C8: epoch and rate were chosen by looking at test. Poisoned test labels change no byte."""
    for poison in (-2, 1):
        make_store(tmp_path / f"store{poison}", test_labels=poison)
        fit.run(SMALL, tmp_path / f"store{poison}", folder / "run", tmp_path / f"model{poison}")
        for name in ("model.safetensors", "config.json", "search.json", "validation_labels.npz"):
            assert (tmp_path / f"model{poison}" / name).read_bytes() == (folder / "linear" / name).read_bytes(), name


def test_without_a_validation_split_nothing_is_fitted(folder: Path, tmp_path: Path) -> None:
    """Defect C7: without validation, the learning rate was selected on test."""
    make_store(tmp_path / "store", ["train"] * 40 + ["test"] * 24)
    with pytest.raises(ConfigError, match=r"no validation images.*never on test"):
        fit.run(SMALL, tmp_path / "store", folder / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_finding_without_training_positives_is_null_everywhere(folder: Path) -> None:
    model = load(folder / "linear", "cpu")
    store = Store.open(folder / "store")
    for raw in (True, False):
        predictions = model.predict_store(store, store.indices("test"), raw=raw)
        assert np.isnan(predictions.probabilities[:, 3]).all()
        assert np.isfinite(predictions.probabilities[:, :3]).all()
    assert np.isnan(read_predictions(folder / "linear" / "validation_logits.parquet").probabilities[:, 3]).all()
    assert model.predict([store.read(60)]).probabilities["Never"] is None


def test_slides_protocol_stops_at_epoch_two_of_ten(folder: Path, tmp_path: Path) -> None:
    config = override(SMALL, ["stop_epoch=2", "refit_epochs=10"])
    fit.run(config, folder / "store", folder / "run", tmp_path / "model")
    record = json.loads((tmp_path / "model" / "search.json").read_text())
    assert record["chosen"]["refit_epochs"] == 2 == len(record["refit_losses"])
    assert record["chosen"]["epoch"] == 2
    longer = override(config, ["stop_epoch=2", "refit_epochs=5"])
    fit.run(longer, folder / "store", folder / "run", tmp_path / "shorter_cosine")
    first, second = (files.read_config(tmp_path / name)["weights"]["sha256"] for name in ("model", "shorter_cosine"))
    assert first != second  # the cosine is laid out for refit_epochs


def test_the_search_sees_train_alone_and_the_refit_train_and_val(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Every epoch is one pass in its own order; a cosine is as long as its settings say, wherever training stops."""
    sweeps, passes = [], []

    class Watched(Sweep):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            sweeps.append(self)

    class Source(FeatureSource):
        def training(self, epoch, batches):
            batches = list(batches)
            passes.append(np.concatenate(batches))
            return super().training(epoch, batches)

    monkeypatch.setattr(training, "Sweep", Watched)
    monkeypatch.setattr(fit, "FeatureSource", Source)
    fit.run(override(SMALL, ["stop_epoch=2", "refit_epochs=5"]), folder / "store", folder / "run", tmp_path / "model")
    assert [sorted(order.tolist()) for order in passes] == [list(range(40))] * 3 + [list(range(56))] * 2
    assert len({tuple(order.tolist()) for order in passes}) == 5
    search, refit = sweeps
    assert (search.steps, search.total_steps) == (3 * 3, 3 * 3)  # 40 images in batches of 16
    assert (refit.steps, refit.total_steps) == (2 * 4, 5 * 4)  # 56 images
    assert refit.rates == (
        json.loads((tmp_path / "model" / "search.json").read_text())["chosen"]["variant"]["learning_rate"],
    )


def test_class_aware_sampling_draws_rare_findings_more_and_reads_no_test_label(
    folder: Path, tmp_path: Path, monkeypatch
):
    passes = []

    class Source(FeatureSource):
        def training(self, epoch, batches):
            batches = list(batches)
            passes.append(np.concatenate(batches))
            return super().training(epoch, batches)

    monkeypatch.setattr(fit, "FeatureSource", Source)
    config = override(SMALL, ["sampling=class_aware", "sampling_power=1", "stop_epoch=2"])
    make_store(tmp_path / "all_positive", test_labels=1)
    make_store(tmp_path / "all_negative", test_labels=0)
    for name in ("all_positive", "all_negative"):
        fit.run(config, tmp_path / name, folder / "run", tmp_path / f"{name}_model")
    first, second = passes[: len(passes) // 2], passes[len(passes) // 2 :]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert [len(order) for order in first] == [40] * 3 + [56] * 2
    assert max(np.bincount(first[0])) > 1
    assert all(order.max() < (40 if epoch < 3 else 56) for epoch, order in enumerate(first))
    weights = [
        files.read_config(tmp_path / f"{name}_model")["weights"]["sha256"] for name in ("all_positive", "all_negative")
    ]
    assert weights[0] == weights[1]
    recorded = files.read_config(tmp_path / "all_positive_model")["training"]["settings"]
    assert (recorded["sampling"], recorded["sampling_power"], recorded["sampling_over"]) == ("class_aware", 1.0, "max")


@pytest.mark.parametrize("init", ["cold", "warm"])
def test_a_refit_starts_where_it_says(folder: Path, tmp_path: Path, monkeypatch, init: str) -> None:
    sweeps, starts = [], []

    class Watched(Sweep):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            sweeps.append(self)
            starts.append({rate: self.state(place) for place, rate in enumerate(self.rates)})

    monkeypatch.setattr(training, "Sweep", Watched)
    fit.run(override(SMALL, [f"refit_init={init}"]), folder / "store", folder / "run", tmp_path / "model")
    chosen = json.loads((tmp_path / "model" / "search.json").read_text())["chosen"]
    rate = chosen["variant"]["learning_rate"]
    began, ended = starts[0][rate]["linear.weight"], sweeps[0].state(sweeps[0].rates.index(rate))["linear.weight"]
    assert torch.equal(starts[1][rate]["linear.weight"], ended if init == "warm" else began)
    assert not torch.equal(ended, began)
    assert chosen["epoch"] == 3 or init == "cold"


def test_the_random_backbone_is_its_seed(folder: Path, tmp_path: Path) -> None:
    small = override(SMALL, ["resolution=32", "search_epochs=1", "learning_rates=[0.01]", "augmented_views=0"])
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit.run(override(small, [f"seed={seed}"]), folder / "store", "random:demo16", tmp_path / name)
        digests.append(files.read_config(tmp_path / name)["weights"]["sha256"])
    assert digests[0] == digests[1] != digests[2]
    assert files.read_config(tmp_path / "a")["training"]["backbone"] == {"kind": "random", "size": "demo16"}
    with pytest.raises(UnknownNameError, match="demo16"):
        fit.run(small, folder / "store", "random:demo17", tmp_path / "d")


def test_findings_can_be_chosen_and_ordered(folder: Path, tmp_path: Path) -> None:
    fit.run(override(SMALL, ["findings=[Mass, Edema]"]), folder / "store", folder / "run", tmp_path / "model")
    assert load(tmp_path / "model", "cpu").findings == ("Mass", "Edema")
    with pytest.raises(UnknownNameError, match="Did you mean 'Edema'"):
        fit.run(override(SMALL, ["findings=[Edem]"]), folder / "store", folder / "run", tmp_path / "other")


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already holds"):
        fit.run(SMALL, folder / "store", folder / "run", folder / "linear")
    with pytest.raises(ConfigError, match="is a file"):
        fit.run(SMALL, folder / "store", folder / "run", folder / "linear" / "config.json")
    with pytest.raises(ConfigError, match="backbone that has 3"):
        fit.run(override(SMALL, ["blocks=4"]), folder / "store", folder / "run", tmp_path / "a")
    make_store(tmp_path / "recipe", preprocess_id="other-1")
    with pytest.raises(PreprocessingMismatchError, match="other-1"):
        fit.run(SMALL, tmp_path / "recipe", folder / "run", tmp_path / "b")
    make_store(tmp_path / "leak", patients=[f"p{n}" for n in range(63)] + ["p0"])
    with pytest.raises(LeakageError, match="1 patients have images both in train and in test"):
        fit.run(SMALL, tmp_path / "leak", folder / "run", tmp_path / "c")
    make_store(tmp_path / "negatives", ["train"] * 62 + ["val"] * 2, test_labels=None)
    for name in "abc":
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "setting",
    [
        "stop_epoch=11", "stop_epoch=0", "loss=mse", "batch_size=0", "flip=2", "crop_scale=[0, 1]",
        "augmented_views=-1", "weight_decay=-1", "threads=0", "workers=-1", "resolution=0", "decoder_heads=0",
        "decoder_heads=7", "decoder_dim=100", "decoder_dim=0", "decoder_feed_forward=0", "dropout=1", "dropout=-0.1",
        "dropout=.nan", "learning_rates=[]", "learning_rates=[0]", "learning_rates=[-1e-3, 1e-3]",
        "learning_rates=[1e-3, 1e-3]", "learning_rates=[.inf]", "learning_rates=[.nan]",
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match="decoder_dim" if setting == "decoder_heads=7" else name):
        override(FitConfig(), [setting])


def test_settings_that_fit_only_together() -> None:
    config = override(FitConfig(), ["decoder_dim=100", "decoder_heads=10", "stop_epoch=20", "refit_epochs=20"])
    assert (config.decoder_dim, config.decoder_heads, config.stop_epoch) == (100, 10, 20)


def test_a_broken_backbone_stops_before_anything_is_written(folder: Path, tmp_path: Path, monkeypatch) -> None:
    from hilum.commands import fit_inputs

    load_whole = fit_inputs.load_backbone

    def load_broken(path, image_size=None):
        model = load_whole(path, image_size)
        model.norm.weight.data[0] = float("inf")
        return model

    monkeypatch.setattr(fit_inputs, "load_backbone", load_broken)
    with pytest.raises(NonFiniteLossError, match="No weight has moved"):
        fit.run(SMALL, folder / "store", folder / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_exposure_counts_every_use(folder: Path) -> None:
    store = Store.open(folder / "store")
    metadata = load(folder / "linear", "cpu").predict_store(store, range(len(store))).metadata
    assert metadata["exposure"] == {"pretraining": 10, "train": 40, "val": 16, "other_dataset": 0, "any": 56}
    assert metadata["exposed_images"] == 56
    assert load(folder / "linear", "cpu").predict_store(store, range(56, 64)).metadata["exposed_images"] == 0


def test_a_backbone_without_a_record_is_not_one_that_has_seen_nothing(folder: Path, tmp_path: Path) -> None:
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 3, 2, patch_size=8, image_size=16))
    save_backbone(backbone, tmp_path / "bb", "hilum-grey-1")
    fit.run(SMALL, folder / "store", tmp_path / "bb", tmp_path / "model")
    assert settings(tmp_path / "model")["exposure"]["not_recorded"] == "nothing lists which images bb was pretrained on"
    assert "Pretraining: images not recorded." in (tmp_path / "model" / "README.md").read_text()
    assert load(tmp_path / "model", device="cpu").reservations.not_recorded
    assert "not_recorded" not in settings(folder / "linear")["exposure"]
