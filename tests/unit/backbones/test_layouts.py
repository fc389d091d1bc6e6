"""Names and shapes only: what each key becomes, what is left out and why, and what has no place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hilum.backbones.layouts import check_transformers, heads_of_transformers, infer_config, read_layout
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone, read_backbone_config
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.seeding import forked, torch_stream

State = dict[str, torch.Tensor]
SMALL = ViTConfig(64, 2, 1, patch_size=14, image_size=56, in_channels=3)
REGISTERS = ViTConfig(64, 2, 1, patch_size=14, image_size=56, in_channels=3, registers=4, feed_forward="swiglu")


def state_of(config: ViTConfig) -> State:
    with forked(0, "layouts"):
        model = VisionTransformer(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.1, 0.2)
    return model.state_dict()


def as_transformers(state: State, split_swiglu: bool = False) -> State:
    out = {}
    for name, value in state.items():
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1", name)
        name = name.replace("attn.proj", "attention.output.dense")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = {"pos_embed": "embeddings.position_embeddings"}.get(name, name)
        if name in ("cls_token", "mask_token", "register_tokens"):
            name = f"embeddings.{name}"
        name = name.replace("mlp.w3", "mlp.down_proj" if split_swiglu else "mlp.weights_out")
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[name.replace("attn.qkv", f"attention.attention.{part}")] = third.clone()
        elif ".mlp.w12." in name and split_swiglu:
            for part, one in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                out[name.replace("w12", part)] = one.clone()
        else:
            out[name.replace("mlp.w12", "mlp.weights_in")] = value
    return out


def as_timm(state: State) -> State:
    out = {name: value for name, value in state.items() if name != "mask_token"}
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:].clone()
    return {name.replace("w12", "fc1").replace("w3", "fc2"): value for name, value in out.items()}


LAYOUTS = {"transformers": as_transformers, "timm": as_timm, "dinov2": dict}


@pytest.mark.parametrize("config", [SMALL, REGISTERS], ids=["plain", "registers and swiglu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_tokens(tmp_path: Path, layout: str, config: ViTConfig) -> None:
    state = state_of(config)
    save_file(LAYOUTS[layout](state), tmp_path / "w.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    assert read_backbone_config(tmp_path / "w.safetensors")["layout"] == layout
    found, plain = load_backbone(tmp_path / "w.safetensors"), load_backbone(tmp_path / "plain.safetensors")
    images = torch.randn(2, 1, 56, 56, generator=torch_stream(0, "images"))
    with torch.no_grad():
        for a, b in zip(found(images), plain(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "registers", "offset", "antialias"),
    [
        ("dinov2", False, 0.1, False), ("dinov2", True, 0.0, True), ("transformers", False, 0.0, False),
        ("transformers", True, 0.0, True), ("timm", False, 0.0, True), ("timm", True, 0.0, True),
    ],
)  # fmt: skip
def test_positions_are_resampled_as_the_layout_does(
    tmp_path: Path, layout: str, registers: bool, offset: float, antialias: bool
) -> None:
    save_file(LAYOUTS[layout](state_of(REGISTERS if registers else SMALL)), tmp_path / "w.safetensors")
    config = load_backbone(tmp_path / "w.safetensors").config
    assert (config.interpolate_offset, config.interpolate_antialias) == (offset, antialias)


FAULTS: dict[str, tuple[Any, str]] = {
    "a part of three": (
        lambda state: state.pop("encoder.layer.1.attention.attention.key.bias"),
        r"1 tensors are there in part: blocks\.1\.attn\.qkv\.bias \(found only .*query\.bias, .*value\.bias\)",
    ),
    "a part under two names": (
        lambda state: state.update({"encoder.layer.0.attention.q_proj.weight": torch.zeros(64, 64)}),
        r"query\.weight and encoder\.layer\.0\.attention\.q_proj\.weight are both blocks\.0\.attn\.qkv\.weight",
    ),
    "an unknown key": (
        lambda state: state.update({"encoder.layer.0.adapter.weight": torch.zeros(2)}),
        r"1 unexpected: blocks\.0\.adapter\.weight",
    ),
    "a missing key": (lambda state: state.pop("layernorm.bias"), r"1 missing: norm\.bias"),
    "a missing block": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith("encoder.layer.0.")],
        r"14 missing: blocks\.0\.",
    ),
    "a wrong shape": (
        lambda state: state.update({"layernorm.bias": torch.zeros(63)}),
        r"1 of the wrong shape: norm\.bias is \(63,\), expected \(64,\)",
    ),
    "not finite": (
        lambda state: state["encoder.layer.1.attention.attention.value.bias"].fill_(float("nan")),
        r"1 with NaN or infinite values: blocks\.1\.attn\.qkv\.bias",
    ),
    "a table that is no square": (
        lambda state: state.update({"embeddings.position_embeddings": torch.zeros(1, 16, 64)}),
        "16 rows; expected 1 for",
    ),
    "a flat table": (
        lambda state: state.update({"embeddings.position_embeddings": torch.zeros(17, 64)}),
        r"not a vision transformer: pos_embed \(17, 64\)",
    ),
    "whole numbers": (
        lambda state: state.update({"layernorm.bias": torch.zeros(64, dtype=torch.int64)}),
        r"expected floating point, found norm\.bias \(torch\.int64\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_has_no_explanation_is_an_error(tmp_path: Path, fault: str) -> None:
    state = as_transformers({name: value.clone() for name, value in state_of(SMALL).items()})
    change, message = FAULTS[fault]
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path / "w.safetensors")


@pytest.mark.parametrize("key", ["norm_pre.weight", "blocks.0.attn.q_norm.weight", "patch_embed.norm.weight", "rope"])
def test_what_timm_has_and_dinov2_has_not_is_an_error(tmp_path: Path, key: str) -> None:
    save_file(as_timm(state_of(SMALL)) | {key: torch.ones(64)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=f"1 unexpected: {re.escape(key)}"):
        load_backbone(tmp_path / "w.safetensors")


def test_all_that_is_left_out_has_its_reason(tmp_path: Path) -> None:
    state = state_of(SMALL)
    extra = {
        "projection heads of pretraining": ["teacher.dino_head.mlp.0.weight", "teacher.ibot_head.mlp.0.weight"],
        "centres of pretraining losses": ["dino_loss.center", "ibot_patch_loss.center"],
        "a classifier": ["teacher.backbone.head.weight", "classifier.bias", "linear_head.weight", "fc_norm.weight"],
        "a pooler": ["pooler.dense.weight"],
        "the student beside its teacher": ["student.backbone.cls_token", "student.dino_head.mlp.0.weight"],
        "state of the optimiser and its schedule": ["optimizer.state.0.exp_avg"],
    }
    file = {f"teacher.backbone.{name}": value for name, value in state.items()}
    file |= {key: torch.zeros(2) for keys in extra.values() for key in keys}
    save_file(file, tmp_path / "w.safetensors")
    found = read_backbone_config(tmp_path / "w.safetensors")["left_out"]
    assert {reason: sorted(keys) for reason, keys in found.items()} == {
        reason: sorted(keys) for reason, keys in extra.items()
    }
    plain = tmp_path / "plain.safetensors"
    save_file(state, plain)
    ours, theirs = load_backbone(plain).state_dict(), load_backbone(tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_training_checkpoint_is_read_through_its_wrappers(tmp_path: Path) -> None:
    """As common loops save it: {"state_dict": {"model.teacher....": ...}, "optimizer": ...}."""
    state = state_of(SMALL)
    file = {f"state_dict.model.teacher.backbone.{name}": value for name, value in state.items()}
    file |= {"state_dict.model.student.backbone.cls_token": torch.zeros(2), "optimizer.state.0.exp_avg": torch.zeros(2)}
    save_file(file, tmp_path / "w.safetensors")
    loaded = load_backbone(tmp_path / "w.safetensors").state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    plain = load_backbone(tmp_path / "plain.safetensors").state_dict()
    assert all(torch.equal(plain[name], loaded[name]) for name in plain)
    assert sorted(read_backbone_config(tmp_path / "w.safetensors")["left_out"]) == [
        "state of the optimiser and its schedule", "the student beside its teacher",
    ]  # fmt: skip


def test_a_student_alone_is_not_taken_for_a_backbone(tmp_path: Path) -> None:
    save_file(
        {f"student.backbone.{name}": value for name, value in state_of(SMALL).items()}, tmp_path / "w.safetensors"
    )
    with pytest.raises(CheckpointError, match="not a vision transformer"):
        load_backbone(tmp_path / "w.safetensors")


def test_an_absent_mask_token_is_zeros_and_named(tmp_path: Path) -> None:
    state = as_transformers(state_of(SMALL))
    del state["embeddings.mask_token"]
    save_file(state, tmp_path / "w.safetensors")
    assert not load_backbone(tmp_path / "w.safetensors").mask_token.any()
    assert read_backbone_config(tmp_path / "w.safetensors")["filled"].keys() == {"mask_token"}


def test_swiglu_in_two_halves_is_put_together() -> None:
    state = as_transformers(state_of(REGISTERS), split_swiglu=True)
    layout = read_layout({name: tuple(value.shape) for name, value in state.items()}, "file")
    assert layout.sources["blocks.1.mlp.w12.bias"] == (
        "encoder.layer.1.mlp.gate_proj.bias", "encoder.layer.1.mlp.up_proj.bias",
    )  # fmt: skip
    shapes = layout.shapes({name: tuple(value.shape) for name, value in state.items()})
    assert shapes == {name: tuple(value.shape) for name, value in state_of(REGISTERS).items()}


def description(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "dinov2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
        "image_size": 56, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True, "mlp_ratio": 4,
        "use_swiglu_ffn": False,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "expected model_type dinov2 or dinov2_with_registers, found 'vit'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05; Hilum's backbones have 1e-06"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 7}, "64 channels do not divide into 7 heads"),
        ({"num_hidden_layers": 3}, "describes other weights: num_hidden_layers 3, the tensors 2"),
        ({"image_size": 518}, "image_size 518, the tensors 56"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn True, the tensors False"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    import json

    save_file(as_transformers(state_of(SMALL)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(description()))
    assert load_backbone(tmp_path).config.num_heads == 4
    (tmp_path / "config.json").write_text(json.dumps(description(**changes)))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


def test_heads_come_from_the_description_alone() -> None:
    assert heads_of_transformers(description(), "config.json") == 4
    shapes = {name: tuple(value.shape) for name, value in state_of(SMALL).items()}
    assert infer_config(shapes, "transformers", "file", heads=4).num_heads == 4
    assert infer_config(shapes, "transformers", "file").num_heads == 1  # 64 channels a head
    check_transformers(description(), infer_config(shapes, "transformers", "file", heads=4), "config.json")


def test_patches_of_another_size_answer_to_resized_patches(tmp_path: Path) -> None:
    """The whole model: an image whose patches are resized 14 to 16 has the tokens of the original."""
    from hilum.backbones.patch_kernels import resize_matrix

    save_file(state_of(SMALL), tmp_path / "w.safetensors")
    original, resampled = (load_backbone(tmp_path / "w.safetensors", patch_size=size) for size in (14, 16))
    assert (resampled.config.patch_size, resampled.config.image_size) == (16, 64)
    assert torch.equal(resampled.pos_embed, original.pos_embed)
    images = torch.randn(2, 1, 56, 56, generator=torch_stream(0, "images"))
    matrix = torch.block_diag(*[resize_matrix(14, 16).float()] * 4)  # 64 56: each patch by itself
    with torch.no_grad():
        for a, b in zip(resampled(matrix @ images @ matrix.T), original(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    larger = load_backbone(tmp_path / "w.safetensors", image_size=96, patch_size=16)
    assert (larger.config.grid, larger.pos_embed.shape[1]) == (6, 37)
    with pytest.raises(ConfigError, match="not a multiple of the patch size 16"):
        load_backbone(tmp_path / "w.safetensors", image_size=56, patch_size=16)


NORMALISATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "processor": (
        {"preprocessor_config.json": {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3}},
        {"mean": [0.5307] * 3, "std": [0.2583] * 3, "from": "preprocessor_config.json"},
    ),
    "one number for all": (
        {"preprocessor_config.json": {"image_mean": [0.5307], "image_std": 0.2583}},
        {"mean": [0.5307] * 3, "std": [0.2583] * 3, "from": "preprocessor_config.json"},
    ),
    "none": (
        {"preprocessor_config.json": {"image_mean": [1, 2, 3], "image_std": [1, 2, 3], "do_normalize": False}},
        {"mean": [0.0] * 3, "std": [1.0] * 3, "from": "preprocessor_config.json"},
    ),
    "timm": (
        {"config.json": {"architecture": "vit", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.4, 0.5, 0.6]}}},
        {"mean": [0.5] * 3, "std": [0.4, 0.5, 0.6], "from": "config.json"},
    ),
    "nothing": (
        {},
        {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "from": "assumed: ImageNet's"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMALISATIONS)
def test_how_images_were_normalised_is_read_beside_the_weights(tmp_path: Path, case: str) -> None:
    import json

    files, expected = NORMALISATIONS[case]
    save_file(state_of(SMALL), tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert read_backbone_config(path)["normalisation"] == expected
        loaded = load_backbone(path)
        explicit = load_backbone(path, channel_mean=tuple(expected["mean"]), channel_std=tuple(expected["std"]))
        assert torch.equal(loaded.patch_embed.proj.bias, explicit.patch_embed.proj.bias)
    other = load_backbone(tmp_path, channel_mean=(0.1,) * 3, channel_std=(0.9,) * 3)
    assert not torch.equal(loaded.patch_embed.proj.bias, other.patch_embed.proj.bias)


def test_an_assumed_normalisation_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(as_transformers(state_of(SMALL)), tmp_path / "model.safetensors")
    load_backbone(tmp_path)
    assert "no preprocessor_config.json beside it, so ImageNet's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, "expected 1 / 255"),
        ({"image_mean": [0.5, 0.4], "image_std": [0.5, 0.4]}, "2 means or deviations for weights of 3 channels"),
        ({"image_mean": "grey", "image_std": [0.5]}, "expected numbers"),
    ],
)
def test_a_normalisation_that_makes_no_sense_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    import json

    save_file(state_of(SMALL), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


def test_a_mean_belongs_to_its_deviation(tmp_path: Path) -> None:
    save_file(state_of(SMALL), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="give both or neither"):
        load_backbone(tmp_path, channel_mean=(0.5, 0.5, 0.5))
