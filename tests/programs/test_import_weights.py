"""hilum import-weights as people use it: a public file in, a folder that every other command takes out."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hilum import cli
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone, read_backbone_config
from hilum.core.files import sha256_file
from hilum.core.seeding import forked, torch_stream

CONFIG = ViTConfig(64, 2, 1, patch_size=14, image_size=56, in_channels=3, registers=2)
STATISTICS = {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3, "rescale_factor": 1 / 255}


def state() -> dict[str, torch.Tensor]:
    with forked(0, "import"):
        model = VisionTransformer(CONFIG)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.1, 0.2)
    return model.state_dict()


def run(*words: object) -> int:
    before, sys.argv = sys.argv, ["hilum", *map(str, words)]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def test_a_training_checkpoint_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As CheXFound releases it: pickled, chunked, with heads beside the backbone; read by a process of its own."""
    teacher: dict[str, Any] = {}
    for name, value in state().items():
        parts = name.split(".")
        teacher["backbone." + (f"blocks.0.{'.'.join(parts[1:])}" if parts[0] == "blocks" else name)] = value
    teacher["dino_head.mlp.0.weight"] = torch.zeros(3, 3)
    file = tmp_path / "released" / "teacher_checkpoint.pth"
    file.parent.mkdir()
    torch.save({"teacher": teacher, "iteration": 249_999}, file)
    (file.parent / "preprocessor_config.json").write_text(json.dumps(STATISTICS))
    before = sorted(path.name for path in file.parent.iterdir())

    out = tmp_path / "imported"
    assert run("import-weights", file, "--out", out, "--patch-size", 16, "--image-size", 96) == 0
    printed = capsys.readouterr().out
    assert "layout of dinov2; ViT of 2 blocks of 64 channels, 2 registers, mlp" in printed
    assert "mapped: all 36 tensors" in printed
    assert "left out, projection heads of pretraining: teacher.dino_head.mlp.0.weight" in printed
    assert "left out, no tensors: iteration (int)" in printed
    assert "mean 0.5307, 0.5307, 0.5307" in printed
    assert "patches of 14 pixels resampled to 16" in printed
    assert "positions for 96 pixels; stored for 56" in printed
    assert f"Next: hilum fit linear --data store --backbone {out}" in printed

    described = read_backbone_config(out)
    assert (described["format"], described["preprocess_id"]) == ("hilum-backbone-1", "hilum-grey-1")
    record = described["imported"]
    assert (record["file"], record["sha256"]) == ("teacher_checkpoint.pth", sha256_file(file))
    assert record["normalisation"]["from"] == "preprocessor_config.json"
    assert record["stored"] == {"patch_size": 14, "image_size": 56}
    direct = load_backbone(file, image_size=96, patch_size=16)
    again = load_backbone(out)
    assert again.config == direct.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), direct.parameters(), strict=True))
    assert sorted(path.name for path in file.parent.iterdir()) == before
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "teacher.safetensors"]


def test_a_folder_of_safetensors_needs_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hilum.commands.import_weights.convert_in_child", None)
    without = {name: value for name, value in state().items() if name != "mask_token"}
    without["reg_token"] = without.pop("register_tokens")
    (tmp_path / "hub").mkdir()
    save_file(without | {"head.weight": torch.zeros(2, 64)}, tmp_path / "hub" / "model.safetensors")
    assert run("import-weights", tmp_path / "hub", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "layout of timm" in printed
    assert "filled in, mask_token: zeros" in printed
    assert "left out, a classifier: head.weight" in printed
    assert "(assumed: ImageNet's)" in printed
    assert load_file(tmp_path / "out" / "teacher.safetensors")["patch_embed.proj.weight"].shape == (64, 1, 14, 14)
    images = torch.randn(1, 1, 56, 56, generator=torch_stream(0, "images"))
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "out")(images).cls, load_backbone(tmp_path / "hub")(images).cls)


class Touches:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


MISTAKES = {
    "{}/own --out {}/new": "is Hilum's own already",
    "{}/plain.safetensors --out {}/own": "holds teacher.safetensors, config.json already",
    "{}/plain.safetensors --out {}/new --patch-size 0": "patch_size: expected at least 1 pixel, found 0",
    "{}/plain.safetensors --out {}/new --image-size 60": "60 is not a multiple of the patch size 14",
    "{}/extra.safetensors --out {}/new": "1 unexpected: surprise",
    "{}/nothing.safetensors --out {}/new": "does not exist",
    "{}/empty --out {}/new": "holds no backbone",
    "{}/several --out {}/new": "There are a.safetensors, b.pth: name the one you mean",
    "{}/cut --out {}/new": "cut into several files; save them as one model.safetensors",
    "{}/notes.txt --out {}/new": "expected a .safetensors file, or a pickle of tensors",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    save_file(state(), path / "plain.safetensors")
    save_file(state() | {"surprise": torch.zeros(2)}, path / "extra.safetensors")
    (path / "notes.txt").write_text("text")
    for name in ("empty", "several", "cut"):
        (path / name).mkdir()
    (path / "cut" / "model.safetensors.index.json").write_text("{}")
    shutil.copyfile(path / "plain.safetensors", path / "several" / "a.safetensors")
    (path / "several" / "b.pth").write_bytes(b"")
    assert run("import-weights", path / "plain.safetensors", "--out", path / "own") == 0
    return path


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    command: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("import-weights", *command.replace("{}", str(world)).split()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert MISTAKES[command] in last
    assert not (world / "new").exists()


@pytest.mark.slow
def test_a_hostile_file_and_a_bad_one_are_named_as_they_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"teacher": Touches(tmp_path / "it_ran")}, tmp_path / "evil.pth")
    torch.save(state() | {"surprise": torch.zeros(2)}, tmp_path / "extra.pth")
    for name, message in (("evil.pth", "is refused: it asks for"), ("extra.pth", "1 unexpected: surprise")):
        assert run("import-weights", tmp_path / name, "--out", tmp_path / "new") == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: {tmp_path / name}")
        assert message in last
    assert not (tmp_path / "it_ran").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_heads_are_fitted_on_imported_weights(tmp_path: Path, world: Path) -> None:
    """On the folder of import-weights, and, without any import, on the public file itself: the same model."""
    from hilum.data.phantoms.writing import write_phantoms

    write_phantoms(tmp_path / "nih", "nih", 30, seed=0, size=64, minimum_patients=2, workers=1)
    assert run("manifest", f"nih={tmp_path}/nih", "--out", tmp_path / "m.parquet") == 0
    assert run("build", tmp_path / "m.parquet", "--out", tmp_path / "store", "--size", 56, "--workers", 1) == 0
    models = []
    for name, backbone in (("a", world / "own"), ("b", world / "plain.safetensors")):
        settings = ["blocks=1", "resolution=56", "search_epochs=1", "refit_epochs=1", "learning_rates=[0.01]"]
        words = ["--data", tmp_path / "store", "--backbone", backbone, "--out", tmp_path / name, "--device", "cpu"]
        assert run("fit", "linear", *settings, *words) == 0
        models.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
