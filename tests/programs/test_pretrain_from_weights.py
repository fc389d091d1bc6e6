"""`hilum pretrain` from public weights: their network, new heads that warm up, a probe that knows where it began."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone
from hilum.commands import audit, import_weights
from hilum.commands.fit_inputs import open_backbone
from hilum.commands.pretrain import run
from hilum.core.checkpoint import load_newest
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy import model_files as files
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig
from hilum.pretraining.probing import ProbeConfig

CONFIG = PretrainConfig(
    architecture="init",
    crops=CropConfig(global_size=32, local_size=16, local_crops=2), heads=HeadConfig(16, 16, 8, 8),
    batch_size=4, steps=6, learning_rate=0.02, layer_decay=0.8, head_warmup=0.5, warmup=0.1, momentum=(0.9, 1.0),
    drop_path=0.2, precision="fp32", accelerator="cpu", threads=1, log_every=1, checkpoint_every=1, keep=10,
    probe=ProbeConfig(every=3, neighbours=3, minimum_positives=1, resamples=20),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, half of them brighter below, which is the finding; a patient each."""
    folder = tmp_path_factory.mktemp("from_weights") / "store"
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = [rng.integers(0, 120, (40, 40), dtype=np.uint8) for _ in labels]
    for image, label in zip(images, labels, strict=True):
        image[20:] += 120 * np.uint8(label)
    write_arrays(
        folder, images, labels[:, None].astype(np.int8), ["x"], splits=["train"] * 24 + ["val"] * 12 + ["test"] * 4,
        patients=[f"p{index}" for index in range(40)],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as DINOv2 publishes them: flat names, three channels, patch 8, positions for 64 pixels."""
    with forked(3, "weights"):
        model = VisionTransformer(ViTConfig(64, 2, 1, patch_size=8, image_size=64, in_channels=3, layer_scale=0.5))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("weights") / "public.safetensors"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def out(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(CONFIG, data, tmp_path_factory.mktemp("run") / "run", init=weights)


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / f"step_{step:08d}" / "state.safetensors")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_network_is_that_of_the_weights(out: Path, weights: Path) -> None:
    config = load_backbone(out).config
    assert (config.embed_dim, config.depth, config.patch_size, config.image_size) == (64, 2, 8, 32)
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    assert newest.values["init"] == str(weights)


def test_the_backbone_waits_for_the_heads(out: Path, weights: Path) -> None:
    public = load_backbone(weights, image_size=32).state_dict()
    early, late = tensors(out, 3), tensors(out, 4)
    for name, value in public.items():
        assert torch.equal(early[f"student.backbone.{name}"], value), name
        # copies of one another averaged: equal but for rounding
        torch.testing.assert_close(early[f"teacher.backbone.{name}"], value, rtol=1e-6, atol=1e-7)
    assert not torch.equal(late["student.backbone.norm.weight"], early["student.backbone.norm.weight"])
    assert not torch.equal(early["student.dino_head.mlp.0.weight"], tensors(out, 1)["student.dino_head.mlp.0.weight"])


def test_the_probe_begins_before_the_first_step_and_compares_with_it(out: Path) -> None:
    logged = lines(out)
    assert [line["step"] for line in logged] == [0, 1, 2, 3, 4, 5, 6]
    assert "knn_mAP" in logged[0]
    assert "loss" not in logged[0]
    assert "knn_change" not in logged[0]
    assert [line["step"] for line in logged if "knn_change" in line] == [3, 6]
    # While the backbone is at rest the teacher is what it was, so its features are worth as much.
    assert logged[3]["knn_mAP"] == pytest.approx(logged[0]["knn_mAP"], abs=1e-6)


def test_a_probe_changes_no_bit_of_the_run(out: Path, data: Path, weights: Path, tmp_path: Path) -> None:
    without = run(dataclasses.replace(CONFIG, probe=ProbeConfig()), data, tmp_path / "run", init=weights)
    assert all("knn_mAP" not in line for line in lines(without))
    ours, theirs = tensors(out, 6), tensors(without, 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_patches_of_another_size_are_resampled_on_request(data: Path, weights: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, patch_size=16, steps=1, probe=ProbeConfig())
    result = load_backbone(run(config, data, tmp_path / "run", init=weights)).config
    assert (result.patch_size, result.embed_dim) == (16, 64)


def test_without_weights_there_is_no_network(data: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init; there are none"):
        run(CONFIG, data, tmp_path / "run")
    with pytest.raises(ConfigError, match="the weights decide depth, registers"):
        run(dataclasses.replace(CONFIG, depth=3, registers=1), data, tmp_path / "run", init=weights)


@pytest.fixture(scope="module")
def imported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "bb"
    import_weights.run(str(weights), folder)
    return folder


ONE = dataclasses.replace(CONFIG, steps=1, probe=ProbeConfig())


def test_what_nobody_recorded_stays_unrecorded(
    imported: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Continued pretraining writes a record of its own images; it must not pass for that of all."""
    store = Store.open(data)
    assert open_backbone(imported, 32, store, 0).not_recorded == "nothing lists which images bb was pretrained on"
    with pytest.raises(CheckpointError, match="nothing tells what its weights have seen"):
        audit.exposure_of(str(imported))
    first = run(ONE, data, tmp_path / "first", init=imported)
    second = run(ONE, data, tmp_path / "second", init=first)  # a stage inherits it
    assert "which images bb was trained on" in " ".join(capsys.readouterr().err.split())
    run(ONE, data, second)  # and a resumed one keeps it
    for folder in (first, second):
        assert json.loads((folder / "config.json").read_text())["not_recorded"] == "bb"
        assert open_backbone(folder, 32, store, 0).not_recorded.endswith("bb was pretrained on")
        assert audit.exposure_of(str(folder))
        assert "comes from bb" in " ".join(capsys.readouterr().err.split())


def test_what_is_recorded_is_not_called_unrecorded(data: Path, tmp_path: Path, imported: Path) -> None:
    store = Store.open(data)
    assert open_backbone("random:demo8", 32, store, 0).not_recorded == ""
    config = dataclasses.replace(ONE, architecture="demo8", embed_dim=16, depth=1, num_heads=2)
    straight = run(config, data, tmp_path / "straight")
    stage = run(ONE, data, tmp_path / "stage", init=straight)
    for folder in (straight, stage):
        assert "not_recorded" not in json.loads((folder / "config.json").read_text())
        assert open_backbone(folder, 32, store, 0).not_recorded == ""


def test_a_run_without_its_record_starts_nothing(data: Path, tmp_path: Path, weights: Path) -> None:
    first = run(ONE, data, tmp_path / "first", init=weights)
    (first / "seen.npz").unlink()
    with pytest.raises(CheckpointError, match="has checkpoints and no seen"):
        run(ONE, data, tmp_path / "second", init=first)


def test_a_file_of_a_model_is_no_origin(data: Path, tmp_path: Path, weights: Path) -> None:
    """Read as imported weights, it would lose what the model has met."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(weights, model / "model.safetensors")
    described = {"format": "hilum-model-1", "training": {"backbone": {"name": "run"}}}
    (model / "config.json").write_text(json.dumps(described))
    config = dataclasses.replace(ONE, architecture="demo8", embed_dim=64, depth=2, num_heads=1, registers=0)
    for settings in (ONE, config):
        for path in (model / "model.safetensors", model):
            with pytest.raises(CheckpointError, match=r"part of a Hilum model.*fitted on \(run\)"):
                run(settings, data, tmp_path / "run", init=path)


def test_an_accepted_leak_follows_weights_of_the_hub(
    data: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(ONE, data, tmp_path / "first", init=weights)
    content = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(content | {"accepted_leak": "cut by image"}))
    shutil.rmtree(first / "checkpoints")
    monkeypatch.setattr("hilum.backbones.hub.find_spec", lambda name: object())
    monkeypatch.setattr("hilum.backbones.hub._download", lambda repository, revision: first)
    second = run(ONE, data, tmp_path / "second", init=Path("somebody/weights"))
    described = json.loads((second / "config.json").read_text())
    assert described["accepted_leak"] == "cut by image"
    assert described["not_recorded"].endswith("/public.safetensors")
    (first / "seen.npz").unlink()
    third = run(ONE, data, tmp_path / "third", init=Path("somebody/weights"))
    assert json.loads((third / "config.json").read_text())["not_recorded"] == "somebody/weights"
    monkeypatch.undo()
    run(ONE, data, second, init=Path("somebody/weights"))  # resumed, where the name leads nowhere


def test_the_audit_says_what_a_model_does_not_know_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "nothing lists which images bb was pretrained on"
    exposure = {**files.write_exposure(tmp_path, files.Exposure()), "not_recorded": said}
    (tmp_path / "config.json").write_text(json.dumps({"format": files.MODEL_FORMAT, "exposure": exposure}))
    assert audit.exposure_of(str(tmp_path))
    assert said in " ".join(capsys.readouterr().err.split())
