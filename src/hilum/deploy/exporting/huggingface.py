"""A backbone as a directory of Hugging Face `transformers`, and in it one of `timm`: weights and descriptions.

The reverse of `backbones/layouts.py`. Both projects take three channels: the one-channel kernel is divided among them,
which on grey pixels repeated three times is the same sum. Positions are laid out for the model's own resolution, where
nothing is resampled; at other sizes each project resamples them in its own way.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hilum.backbones.layers import NORM_EPS
from hilum.backbones.pos_embed import resize_positions
from hilum.backbones.vit import ViTConfig
from hilum.backbones.weights import load_backbone
from hilum.core.errors import ConfigError
from hilum.core.files import sha256_file, write_json
from hilum.data.transforms import Preprocessing, normalise
from hilum.deploy.exporting.comparing import (
    FIXTURES,
    SMALLEST_COSINE,
    Difference,
    fixtures,
    refuse_if_different,
    smallest_cosine,
)
from hilum.deploy.network import Network

CHANNELS = 3
WEIGHTS_NAME, TIMM = "model.safetensors", "timm"


def write_backbone(network: Network, folder: Path) -> dict[str, Any]:
    """Write `config.json`, `preprocessor_config.json`, `model.safetensors` and `timm/`, and compare what they give.

    Args:
        network: its head is not part of it.
        folder: where they go.

    Returns:
        for `export.json`.

    Raises:
        ConfigError: a backbone or a normalisation that transformers has no form for.
        CheckpointError: its tokens differ from the predictor's.
    """
    config, recipe, side = network.backbone.config, network.recipe, network.config.resolution
    _refuse_unknown(config, recipe)
    state = at_resolution(network.backbone.state_dict(), config, side)
    description = transformers_config(config, side)
    (folder / TIMM).mkdir()
    for place, tensors, content in (
        (folder, to_transformers(state), description),
        (folder / TIMM, to_timm(state), timm_config(config, side, recipe)),
    ):
        save_file({name: value.contiguous() for name, value in tensors.items()}, place / WEIGHTS_NAME, {"format": "pt"})
        write_json(place / "config.json", content)
    write_json(folder / "preprocessor_config.json", preprocessor_config(side, recipe))
    cosine, by = _compare(network, folder)
    refuse_if_different(Difference(0.0, None, cosine), f"The backbone in {description['architectures'][0]}")
    names = [WEIGHTS_NAME, "config.json", "preprocessor_config.json", f"{TIMM}/{WEIGHTS_NAME}", f"{TIMM}/config.json"]
    return {
        "graph": WEIGHTS_NAME,
        "files": {name: sha256_file(folder / name) for name in names},
        "versions": {"read_by": by},
        "difference": {
            "pictures": FIXTURES,
            "embeddings": {"smallest_cosine": cosine, "tolerance": SMALLEST_COSINE},
        },
    }


def _refuse_unknown(config: ViTConfig, recipe: Preprocessing) -> None:
    if config.feed_forward == "swiglu" and config.feed_forward_hidden != _swiglu_hidden(config.embed_dim):
        raise ConfigError(
            f"A SwiGLU of width {config.feed_forward_hidden} for {config.embed_dim} channels: transformers' DINOv2 has "
            f"{_swiglu_hidden(config.embed_dim)}. Export a graph instead (--format onnx)."
        )
    if recipe.own_range:
        raise ConfigError(
            f"Preprocessing {recipe.id!r} stretches each image by its own range, which a preprocessor of transformers "
            "cannot say. Export a graph instead (--format onnx)."
        )


def _swiglu_hidden(dim: int) -> int:
    """huggingface/transformers Dinov2SwiGLUFFN: two thirds of 4 D, up to a multiple of 8."""
    return (int(int(dim * 4) * 2 / 3) + 7) // 8 * 8


def at_resolution(state: Mapping[str, Tensor], config: ViTConfig, side: int) -> dict[str, Tensor]:
    """A backbone's tensors with positions for squares of `side` pixels and a kernel for three equal channels."""
    grid = side // config.patch_size
    changed = {name: value.detach().to("cpu", torch.float32) for name, value in state.items()}
    changed["pos_embed"] = resize_positions(
        changed["pos_embed"], (grid, grid), config.interpolate_offset, config.interpolate_antialias
    )
    changed["patch_embed.proj.weight"] = changed["patch_embed.proj.weight"].expand(-1, CHANNELS, -1, -1) / CHANNELS
    return changed


_RENAMED = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("attn.proj.", "attention.output.dense."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("mlp.w12.", "mlp.weights_in."),
    ("mlp.w3.", "mlp.weights_out."),
)
_TOKENS = {name: f"embeddings.{name}" for name in ("cls_token", "mask_token", "register_tokens")}
_TOKENS["pos_embed"] = "embeddings.position_embeddings"


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of `Dinov2Model` and `Dinov2WithRegistersModel`; query, key and value apart."""
    renamed = {}
    for name, value in state.items():
        if name in _TOKENS:
            renamed[_TOKENS[name]] = value
            continue
        new = name
        for old, theirs in _RENAMED:
            new = new.replace(old, theirs)
        if new.startswith("blocks."):
            new = "encoder.layer." + new.removeprefix("blocks.")
        elif new.startswith("norm."):
            new = "layernorm." + new.removeprefix("norm.")
        if ".attn.qkv." in new:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[new.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece.clone()
        else:
            renamed[new] = value
    return renamed


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of timm's DINOv2 models: no mask token; with registers, [CLS] carries its own position."""
    renamed = {}
    registers = "register_tokens" in state
    for name, value in state.items():
        if name == "mask_token":
            continue
        new = name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
        if registers and name == "cls_token":
            value = value + state["pos_embed"][:, :1]
        elif registers and name == "pos_embed":
            value = value[:, 1:].clone()
        renamed["reg_token" if name == "register_tokens" else new] = value
    return renamed


def transformers_config(config: ViTConfig, side: int) -> dict[str, Any]:
    """`config.json` of the model in transformers that fits exactly."""
    registers = {"num_register_tokens": config.registers} if config.registers else {}
    return {
        "architectures": ["Dinov2WithRegistersModel" if config.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if config.registers else "dinov2",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
        "use_swiglu_ffn": config.feed_forward == "swiglu",
        "layerscale_value": config.layer_scale,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": side,
        "patch_size": config.patch_size,
        "num_channels": CHANNELS,
        "torch_dtype": "float32",
        **registers,
    }


def preprocessor_config(side: int, recipe: Preprocessing) -> dict[str, Any]:
    """`preprocessor_config.json`: what a square of grey pixels goes through."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [recipe.mean] * CHANNELS,
        "image_std": [recipe.std] * CHANNELS,
    }


def timm_config(config: ViTConfig, side: int, recipe: Preprocessing) -> dict[str, Any]:
    """`config.json` for `timm.create_model("local-dir:...")`: a DINOv2 model of timm, with this one's numbers."""
    swiglu = config.feed_forward == "swiglu"
    family = "giant" if swiglu else "small"  # the one that has SwiGLU; every number is given below
    arguments: dict[str, Any] = {
        "img_size": side, "patch_size": config.patch_size, "embed_dim": config.embed_dim, "depth": config.depth,
        "num_heads": config.num_heads, "init_values": config.layer_scale, "num_classes": 0,
    }  # fmt: skip
    if swiglu:  # both halves of the gate in one matrix; timm rounds the product down
        arguments["mlp_ratio"] = (2 * config.feed_forward_hidden + 0.5) / config.embed_dim
    if config.registers:
        arguments |= {"reg_tokens": config.registers, "no_embed_class": True}
    return {
        "architecture": f"vit_{family}_patch14_{'reg4_' if config.registers else ''}dinov2",
        "num_classes": 0,
        "num_features": config.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [CHANNELS, side, side], "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": 1.0, "mean": [recipe.mean] * CHANNELS, "std": [recipe.std] * CHANNELS, "num_classes": 0,
            "first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None,
        },
    }  # fmt: skip


@torch.no_grad()
def _compare(network: Network, folder: Path) -> tuple[float, str]:
    """Smallest cosine between tokens of the directory and of the predictor, and what read the directory."""
    pictures = torch.from_numpy(fixtures(network.config.resolution))
    images = normalise(pictures, network.recipe)
    expected = network.backbone(images)
    ours = torch.cat([expected.cls[:, None], expected.registers, expected.patches], dim=1)
    if find_spec("transformers") is None:
        found = load_backbone(folder)(images)
        theirs, by = torch.cat([found.cls[:, None], found.registers, found.patches], dim=1), "Hilum"
    else:
        transformers = import_module("transformers")  # only to see that it reads what was written
        transformers.utils.logging.disable_progress_bar()
        loaded = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True)
        theirs = loaded.eval()(pixel_values=images.expand(-1, CHANNELS, -1, -1)).last_hidden_state
        by = f"transformers {transformers.__version__}"
    dim = ours.shape[-1]
    return smallest_cosine(ours.reshape(-1, dim).numpy(), theirs.reshape(-1, dim).numpy()), by
