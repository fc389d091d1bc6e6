"""`hilum extend --zero-shot`: findings scored from text vectors, marked as such everywhere, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import evaluate, extend, extend_joint, extend_zero_shot, fit, predict
from hilum.core.config import override
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.files import write_json
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy import model_files as files
from hilum.deploy.predictor import load
from hilum.evaluation.definitions import average_precision
from hilum.evaluation.predictions import read_predictions
from hilum.heads.config import FitConfig
from hilum.heads.open_vocabulary import DroppedClasses, give_vectors, held_out_findings, same_encoder
from hilum.heads.registry import build_head
from hilum.heads.text_queries import read_vectors

FINDINGS = tuple(f"Spot {row} {column}" for row in range(3) for column in range(3))
SEEN, UNSEEN = FINDINGS[:8], FINDINGS[8:]
SPLITS = ["train"] * 90 + ["val"] * 40 + ["test"] * 30
CONFIG = FitConfig(
    head="ml_decoder", decoder_dim=16, decoder_feed_forward=24, decoder_heads=2, blocks=1, learning_rates=(1e-2, 3e-2),
    search_epochs=4, refit_epochs=4, batch_size=16, augmented_views=1, threads=1, workers=1, findings=SEEN,
    loss="masked_bce_mean", standardise=True, prior_bias=True, flip_average=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A spot at one of nine places is a finding; its text vector says the place."""
    path = tmp_path_factory.mktemp("zero_shot")
    rng = np.random.default_rng(2)
    labels = (rng.random((len(SPLITS), 9)) < 0.3).astype(np.int8)
    images = []
    for row in labels:
        image = rng.integers(0, 50, (24, 24), np.uint8)
        for number in np.flatnonzero(row):
            top, left = 8 * (number // 3), 8 * (number % 3)
            image[top : top + 8, left : left + 8] += 120
        images.append(image)
    write_arrays(path / "store", images, labels, FINDINGS, splits=SPLITS)
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(16, 2, 2, patch_size=8, image_size=24, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    vectors = {}
    for number, name in enumerate(FINDINGS):
        vectors[name] = np.concatenate([np.eye(3)[number // 3], np.eye(3)[number % 3]]).astype(np.float32)
    np.savez(path / "vectors.npz", **vectors)
    save_file(vectors, path / "vectors.safetensors")
    fit.run(CONFIG, path / "store", path / "run", path / "model", device="cpu")
    extend_zero_shot.run(path / "model", path / "vectors.npz", UNSEEN, path / "extended", path / "store", device="cpu")
    return path


def settings(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_unseen_findings_are_scored_and_old_outputs_are_the_same_bits(folder: Path) -> None:
    store = Store.open(folder / "store")
    old, new = load(folder / "model", "cpu"), load(folder / "extended", "cpu")
    one, other = (model.predict_store(store, range(130, 160)) for model in (old, new))
    assert np.array_equal(one.probabilities, other.probabilities[:, :8])
    assert other.findings == FINDINGS
    assert np.isfinite(other.probabilities[:, 8]).all()
    assert np.ptp(other.probabilities[:, 8]) > 0


def test_zero_shot_is_said_everywhere(folder: Path, tmp_path: Path) -> None:
    content = settings(folder / "extended")
    [extension] = content["extensions"]
    assert extension["zero_shot"]
    assert extension["cards"]["Spot 2 2"]["nearest"]["finding"] in ("Spot 2 1", "Spot 1 2", "Spot 0 2", "Spot 2 0")
    for unit in ("image", "study"):
        calibrator = content["calibration"][unit]
        assert calibrator["maps"]["Spot 2 2"]["flag"].startswith("zero-shot")
        assert "Spot 2 2" not in calibrator["thresholds"] | calibrator["raw_thresholds"]
        assert calibrator["maps"]["Spot 0 0"] == settings(folder / "model")["calibration"][unit]["maps"]["Spot 0 0"]
    store = Store.open(folder / "store")
    result = load(folder / "extended", "cpu").predict([store.read(150)])
    assert result.thresholds["Spot 2 2"] is None
    assert result.flags["Spot 2 2"].startswith("zero-shot")
    assert result.attention["Spot 2 2"] is not None
    card = (folder / "extended" / "README.md").read_text()
    assert "**Zero-shot**" in card
    assert "no label of them" in card.lower()
    assert "Spot 2 2" not in card.split("## Calibration")[1].split("## ")[0]
    held_out = extension["training"]["held_out"]
    assert held_out["count"] == 2
    assert f"{held_out['mAP']:.3f}" in card
    predict.run(folder / "extended", [f"{folder / 'store'}:test"], tmp_path / "test.parquet", device="cpu")
    table = read_predictions(tmp_path / "test.parquet")
    assert table.metadata["calibration"]["flags"]["Spot 2 2"].startswith("zero-shot")
    assert "Spot 2 2" not in table.metadata["thresholds"]
    evaluate.run(tmp_path / "test.parquet", folder / "store", tmp_path / "evaluation", split="test", bootstraps=20)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    truth = store.labels[130:, 8]
    found = metrics["findings"]["Spot 2 2"]
    assert found["AP"] == pytest.approx(average_precision(table.probabilities[:, 8], truth))
    assert found["threshold"] is None


def test_the_held_out_findings_never_train_the_search(folder: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    real = extend_zero_shot.search

    def watched(config, embed_dim, data, *arguments):
        seen.append(data)
        return real(config, embed_dim, data, *arguments)

    monkeypatch.setattr(extend_zero_shot, "search", watched)
    extend_zero_shot.run(
        folder / "model", folder / "vectors.safetensors", UNSEEN, tmp_path / "out", folder / "store",
        ["search_epochs=1", "refit_epochs=1", "learning_rates=[0.01]"], device="cpu",
    )  # fmt: skip
    [data] = seen
    held_out = settings(tmp_path / "out")["extensions"][0]["training"]["held_out"]["findings"]
    columns = [SEEN.index(name) for name in held_out]
    assert (data.labels[:, columns] == -1).all()
    others = [column for column in range(8) if column not in columns]
    assert (data.labels[:130, others] >= 0).all()


def test_without_a_refit_validation_is_not_learned_from_and_studies_may_be_read_whole(
    folder: Path, tmp_path: Path
) -> None:
    fit.run(override(CONFIG, ["refit=false"]), folder / "store", folder / "run", tmp_path / "model", device="cpu")
    for name, changes in (("out", []), ("memory", ["views=memory"])):
        extend_zero_shot.run(
            tmp_path / "model", folder / "vectors.npz", UNSEEN, tmp_path / name, folder / "store", changes, "cpu"
        )
        exposure = files.read_exposure(tmp_path / name, settings(tmp_path / name))
        assert (len(exposure.train), len(exposure.val)) == (90, 0)
    head = settings(tmp_path / "memory")["extensions"][0]["head"]
    assert head["views"] == "memory"
    student = override(CONFIG, [f"findings=[{UNSEEN[0]}]", f"pseudo_labels={tmp_path / 'out'}"])
    with pytest.raises(ConfigError, match="was trained on none of Spot 2 2"):  # its scores are no probabilities
        fit.run(student, folder / "store", folder / "run", tmp_path / "student", device="cpu")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "memory")]
    assert set(weights[1]) - set(weights[0]) == {"extension.0.view_embed.weight"}


@pytest.mark.slow
def test_a_place_that_was_never_labelled_is_found_from_its_text(folder: Path, tmp_path: Path) -> None:
    """What text can give where it says what to look for: far above chance on the unseen ninth place."""
    extend_zero_shot.run(
        folder / "model", folder / "vectors.npz", UNSEEN, tmp_path / "out", folder / "store",
        ["search_epochs=30", "refit_epochs=30", "positions=sincos"], device="cpu",
    )  # fmt: skip
    store = Store.open(folder / "store")
    scores = load(tmp_path / "out", "cpu").predict_store(store, range(130, 160)).probabilities[:, 8]
    chance = (store.labels[130:, 8] == 1).mean()
    assert average_precision(scores, store.labels[130:, 8]) > chance + 0.2


def test_a_head_that_reads_text_needs_no_store(folder: Path, tmp_path: Path) -> None:
    config = override(CONFIG, [f"text_vectors={folder / 'vectors.npz'}", "queries=text", "shared_output=true"])
    fit.run(config, folder / "store", folder / "run", tmp_path / "text", device="cpu")
    extend_zero_shot.run(tmp_path / "text", folder / "vectors.npz", UNSEEN, tmp_path / "out", device="cpu")
    store = Store.open(folder / "store")
    old, new = load(tmp_path / "text", "cpu"), load(tmp_path / "out", "cpu")
    one, other = (model.predict_store(store, range(130, 160), raw=True).probabilities for model in (old, new))
    assert np.array_equal(one, other[:, :8])
    # the vector of a finding that it knows gives what it gives for that finding
    main = old.networks[0].head
    _, same = give_vectors(main, old.networks[0].config.head, read_vectors(folder / "vectors.npz", SEEN[2:3]))
    features = old.networks[0].features(torch.from_numpy(store.read(150))[None, None])
    with torch.no_grad():
        assert torch.allclose(same(features)[:, 0], main(features)[:, 2], atol=1e-6)
    other_encoder = {name: np.random.default_rng(n).normal(size=6) for n, name in enumerate(FINDINGS)}
    np.savez(tmp_path / "other.npz", **other_encoder)
    with pytest.raises(ConfigError, match=r"not the one that the head was trained with.*same sentence encoder"):
        extend_zero_shot.run(tmp_path / "text", tmp_path / "other.npz", UNSEEN, tmp_path / "b", device="cpu")
    with pytest.raises(ConfigError, match="search_epochs=3: without --data nothing is trained, and no setting is read"):
        extend_zero_shot.run(
            tmp_path / "text", folder / "vectors.npz", UNSEEN, tmp_path / "b", None, ["search_epochs=3"], "cpu"
        )


def test_what_cannot_be_scored_from_text_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, *arguments, error: type[Exception] = ConfigError) -> None:
        with pytest.raises(error, match=match):
            extend_zero_shot.run(*arguments, device="cpu")

    model, vectors, store, out = folder / "model", folder / "vectors.npz", folder / "store", tmp_path / "out"
    refused("does not read text. Give --data STORE", model, vectors, UNSEEN, out)
    refused("Did you mean 'Spot 2 2'", model, vectors, ["Spot 2 22"], out, store, error=UnknownNameError)
    refused("already has Spot 0 0", model, vectors, ["Spot 0 0"], out, store)
    (tmp_path / "vectors.csv").write_text("a")
    refused("read from .npz or .safetensors", model, tmp_path / "vectors.csv", UNSEEN, out, store)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    refused("cannot be read as text vectors", model, tmp_path / "broken.npz", UNSEEN, out, store)
    refused("cannot be read as text vectors", model, tmp_path / "absent.safetensors", UNSEEN, out, store)
    for name, row in (("zero", np.zeros(6)), ("nan", np.full(6, np.nan)), ("short", np.ones(5))):
        good = {one: np.ones(6) for one in FINDINGS}
        np.savez(tmp_path / f"{name}.npz", **(good | {"Spot 2 2": row}))
    refused("Spot 2 2 are zero or not finite", model, tmp_path / "zero.npz", UNSEEN, out, store)
    refused("Spot 2 2 are zero or not finite", model, tmp_path / "nan.npz", UNSEEN, out, store)
    with pytest.raises(ConfigError, match="all of one length"):
        read_vectors(tmp_path / "short.npz", FINDINGS)
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"scores Spot 2 2 zero-shot.*extend the model it was made from"):
        extend.run(folder / "extended", store, UNSEEN, out, device="cpu")
    shutil.copytree(model, tmp_path / "damped")
    write_json(tmp_path / "damped" / "config.json", settings(model) | {"normal_damping": "power:0.5"})
    refused("damps its findings by Normal", tmp_path / "damped", vectors, UNSEEN, out, store)
    with pytest.raises(ConfigError, match="can teach nothing"):
        extend_joint.run(folder / "extended", store, ["Other"], out, device="cpu")


def test_classes_are_dropped_by_batch_and_never_all() -> None:
    labels = np.ones((6, 5), np.int8)
    data = DroppedClasses(np.arange(6), np.arange(0), labels, drop=0.4, generator=np.random.default_rng(0))
    from hilum.heads.batches import Batch
    from hilum.heads.features import Features

    features = Features(torch.zeros(6, 4), torch.zeros(6, 4), None, (1, 1))
    dropped = set()
    for _ in range(20):
        weights = data.targets(Batch(np.arange(6)), features).weights
        assert (weights.sum(dim=0) == 0).sum() == 2
        assert (weights.sum(dim=1) == 3).all()
        dropped |= set(torch.nonzero(weights[0] == 0).flatten().tolist())
    assert dropped == set(range(5))
    everything = DroppedClasses(np.arange(6), np.arange(0), labels, drop=1.0, generator=np.random.default_rng(0))
    assert everything.targets(Batch(np.arange(6)), features).weights.sum() == 6


def test_held_out_findings_are_some_never_all() -> None:
    for count in range(2, 12):
        held_out = held_out_findings(list(range(count)), 0.25, 0)
        assert 1 <= len(held_out) < count
        assert held_out == held_out_findings(list(range(count)), 0.25, 0)
    with pytest.raises(ConfigError, match="at least 2"):
        held_out_findings([3], 0.25, 0)


def test_vectors_have_entries_of_size_one_and_encoders_are_told_apart(folder: Path) -> None:
    vectors = read_vectors(folder / "vectors.npz", SEEN)
    np.testing.assert_allclose(np.square(vectors).mean(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors, read_vectors(folder / "vectors.safetensors", SEEN))
    same_encoder(torch.from_numpy(vectors), 3 * vectors, SEEN)
    with pytest.raises(ConfigError, match="'Spot 0 0' is not the one"):
        same_encoder(torch.from_numpy(vectors), vectors[::-1].copy(), SEEN)
    head = CONFIG.describe_head(16, 8)
    with pytest.raises(ConfigError, match="cannot score others from text"):
        give_vectors(build_head(head), head, vectors)
    assert files.validation_name("search.json", 1) == "extension_1_search.json"
