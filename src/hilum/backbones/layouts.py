"""How other projects name and cut the same tensors: pure functions on names and shapes, no files, no tensors.

Three layouts: `dinov2` (facebookresearch/dinov2, CheXFound: flat or chunked blocks, bare or inside a training
checkpoint), `transformers` (`Dinov2Model`, `Dinov2WithRegistersModel`: query, key and value apart; RAD-DINO is one of
these) and `timm` (`vit_*_dinov2`, `vit_*_reg4_dinov2`: no mask token, registers named otherwise). What is known not to
be the backbone is named with its reason; anything else that has no place is left for the caller to refuse.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, Literal

import torch

from hilum.backbones.layers import FeedForward
from hilum.backbones.pos_embed import grid_side
from hilum.backbones.vit import ViTConfig
from hilum.core.errors import CheckpointError, ConfigError

LayoutName = Literal["dinov2", "transformers", "timm"]
Shape = tuple[int, ...]

_WRAPPERS = (
    "state_dict.", "teacher.", "backbone.", "model.", "module.", "_orig_mod.", "dinov2.", "dinov2_with_registers.",
)  # fmt: skip
_AROUND_NETWORKS = r"^(?:state_dict\.|model\.|module\.)*"
_NOT_THE_BACKBONE = {
    "dino_head.": "projection heads of pretraining", "ibot_head.": "projection heads of pretraining",
    "dino_loss.": "centres of pretraining losses", "ibot_patch_loss.": "centres of pretraining losses",
    "head.": "a classifier", "classifier.": "a classifier", "linear_head.": "a classifier",
    "fc_norm.": "a classifier", "pooler.": "a pooler",
}  # fmt: skip
_TRAINING_STATE = ("optimizer.", "optimizers.", "scheduler.", "lr_scheduler.", "lr_schedulers.", "scaler.")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_SPLIT_PARTS = (
    (re.compile(r"\.attention\.(?:attention\.)?(?:query|q_proj)\."), ".attn.qkv.", 0, 3),
    (re.compile(r"\.attention\.(?:attention\.)?(?:key|k_proj)\."), ".attn.qkv.", 1, 3),
    (re.compile(r"\.attention\.(?:attention\.)?(?:value|v_proj)\."), ".attn.qkv.", 2, 3),
    (re.compile(r"\.mlp\.gate_proj\."), ".mlp.w12.", 0, 2),
    (re.compile(r"\.mlp\.up_proj\."), ".mlp.w12.", 1, 2),
)
"""Tensors of transformers that are stacked into one of ours: which name, ours, its place, and how many there are."""
_RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
_HEAD_CHANNELS = 64
_SHOWN = 6


@dataclass(frozen=True)
class Layout:
    """How a file's tensors become ours."""

    name: LayoutName
    sources: dict[str, tuple[str, ...]]
    """Our name -> the file's keys; several are stacked along their first axis."""
    left_out: dict[str, list[str]]
    """Reason -> the file's keys that are known not to be the backbone."""
    filled: dict[str, str]
    """Our name -> what stands in for a tensor, or a part of one, that this layout does not have."""
    class_row: bool = True
    """Whether the first row of the position table is that of [CLS]; without it [CLS] carries its position itself."""

    def shapes(self, file: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes under our names, of what the file holds."""
        ours = {}
        for name, keys in self.sources.items():
            first = file[keys[0]]
            ours[name] = first if len(keys) == 1 else (sum(file[key][0] for key in keys), *first[1:])
        if not self.class_row:
            batch, rows, dim = ours["pos_embed"]
            ours["pos_embed"] = (batch, rows + 1, dim)
        return ours


def read_layout(shapes: Mapping[str, Shape], where: str, own: bool = False) -> Layout:
    """Recognise a layout from the names and shapes of a file's tensors.

    Args:
        shapes: of every tensor of the file.
        where: names the file in errors.
        own: Hilum's own file, in which nothing may be left out or absent.

    Raises:
        CheckpointError: two keys are one tensor, or of a tensor that others store in parts one part is absent.
    """
    names, left_out = _unwrap(shapes)
    if own:
        left_out, names = {}, names | {key: key for keys in left_out.values() for key in keys}
    if any(name.startswith(("embeddings.", "encoder.layer.")) for name in names.values()):
        layout = _transformers(names, left_out, where)
    else:
        layout = _flat(names, shapes, left_out, where, own)
    if not own and "mask_token" not in layout.sources and "cls_token" in layout.sources:
        layout.filled["mask_token"] = "zeros, as before training; only masked pretraining uses it"
    return layout


def _unwrap(keys: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(the file's key -> its name without wrappers, reason -> keys that are known not to be the backbone)."""
    keys = list(keys)
    has_teacher = any(re.match(_AROUND_NETWORKS + r"teacher\.", key) for key in keys)
    names: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for key in keys:
        name = key
        while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
            name = name.removeprefix(wrapper)
        if has_teacher and re.match(_AROUND_NETWORKS + r"student\.", key):
            reason = "the student beside its teacher"
        elif key.startswith(_TRAINING_STATE):
            reason = "state of the optimiser and its schedule"
        else:
            reason = next((why for prefix, why in _NOT_THE_BACKBONE.items() if name.startswith(prefix)), "")
        if reason:
            left_out.setdefault(reason, []).append(key)
        else:
            names[key] = name
    return names, left_out


def _flat(
    names: Mapping[str, str], shapes: Mapping[str, Shape], left_out: dict[str, list[str]], where: str, own: bool
) -> Layout:
    """DINOv2's names, and timm's, which differ where DINOv2 has mask token, registers and SwiGLU."""
    shape_of = {name: shapes[key] for key, name in names.items()}
    timm = not own and ("reg_token" in shape_of or ("pos_embed" in shape_of and "mask_token" not in shape_of))
    hidden, narrow = shape_of.get("blocks.0.mlp.fc1.weight"), shape_of.get("blocks.0.mlp.fc2.weight")
    packed = timm and hidden is not None and narrow is not None and hidden[0] == 2 * narrow[-1]
    sources: dict[str, tuple[str, ...]] = {}
    for key, found in names.items():
        name = _CHUNKED.sub(r"blocks.\1.", found)
        name = re.sub(r"\.ls([12])\.weight$", r".ls\1.gamma", name)
        if timm and name == "reg_token":
            name = "register_tokens"
        if packed:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        if name in sources:
            raise CheckpointError(f"{where}: {sources[name][0]} and {key} are both {name}; expected one of them.")
        sources[name] = (key,)
    rows = shape_of["pos_embed"][1] if len(shape_of.get("pos_embed", ())) == 3 else 0
    class_row = not (timm and rows > 1 and isqrt(rows) ** 2 == rows)
    filled = {} if class_row else {"pos_embed": "a row of zeros for [CLS], whose token carries its position"}
    return Layout("timm" if timm else "dinov2", sources, left_out, filled, class_row)


def _transformers(names: Mapping[str, str], left_out: dict[str, list[str]], where: str) -> Layout:
    parts: dict[str, dict[int, str]] = {}
    expected: dict[str, int] = {}
    for key, found in names.items():
        name, place, count = found, 0, 1
        for pattern, joined, index, together in _SPLIT_PARTS:
            if pattern.search(name):
                name, place, count = pattern.sub(joined, name), index, together
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        if place in parts.setdefault(name, {}) or expected.setdefault(name, count) != count:
            other = parts[name].get(place) or next(iter(parts[name].values()))
            raise CheckpointError(f"{where}: {other} and {key} are both {name}; expected one of them.")
        parts[name][place] = key
    if short := [name for name, found_parts in parts.items() if len(found_parts) != expected[name]]:
        listed = [f"{name} (found only {', '.join(parts[name].values())})" for name in short]
        raise CheckpointError(f"{where}: {len(short)} tensors are there in part: {shorten(listed)}.")
    sources = {name: tuple(found_parts[place] for place in sorted(found_parts)) for name, found_parts in parts.items()}
    return Layout("transformers", sources, left_out, {})


def infer_config(shapes: Mapping[str, Shape], layout: LayoutName, where: str, heads: int | None = None) -> ViTConfig:
    """Architecture from tensor shapes under our names.

    How positions are resampled to another grid is that of the project whose layout it is, so that outputs are the
    same at every size: DINOv2 and CheXFound step by side / (size + 0.1); DINOv2 with registers by side / size after a
    low-pass; transformers as the latter with registers, and without the low-pass where there are none; timm always
    with it.

    Args:
        shapes: of every tensor, under our names.
        layout: whose names they had.
        where: names the file in errors.
        heads: attention heads, where a description tells; default: 64 channels per head, as every published size has.

    Raises:
        CheckpointError: not a vision transformer, or one whose heads cannot be known from its shapes.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    if absent := [name for name in needed if name not in shapes]:
        raise CheckpointError(
            f"{where} is not a vision transformer in the layout of DINOv2, transformers or timm: no "
            f"{', '.join(absent)} among its {len(shapes)} tensors ({shorten(sorted(shapes))})."
        )
    axes = dict(zip(needed, (3, 3, 4), strict=True))
    if odd := [f"{name} {shapes[name]}" for name in needed if len(shapes[name]) != axes[name]]:
        raise CheckpointError(f"{where} is not a vision transformer: {', '.join(odd)}.")
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"^blocks\.(\d+)\.", name))}
    dim, channels, patch = shapes["cls_token"][-1], *shapes["patch_embed.proj.weight"][1:3]
    if not blocks or (heads is None and dim % _HEAD_CHANNELS):
        raise CheckpointError(
            f"{where}: {dim} channels and {len(blocks)} blocks; without a config.json that tells the heads only "
            f"transformers with {_HEAD_CHANNELS} channels per head can be read."
        )
    heads = heads or dim // _HEAD_CHANNELS
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    feed_forward: FeedForward = "swiglu" if "blocks.0.mlp.w3.weight" in shapes else "mlp"
    offset, antialias = _resampling(layout, registers, patch)
    try:
        side = grid_side(torch.empty(shapes["pos_embed"], device="meta"))
        config = ViTConfig(
            dim, max(blocks) + 1, heads, patch, side * patch, channels, registers, feed_forward,
            interpolate_antialias=antialias, interpolate_offset=offset,
        )  # fmt: skip
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{where} is not a vision transformer that Hilum can build: {error}") from error
    if feed_forward == "swiglu":
        hidden = shapes["blocks.0.mlp.w3.weight"][-1]
        candidates = [replace(config, swiglu_multiple=multiple) for multiple in (8, 64, 128, 256)]
        return next((one for one in candidates if one.feed_forward_hidden == hidden), config)
    return config


def _resampling(layout: LayoutName, registers: int, patch: int) -> tuple[float, bool]:
    """(offset, antialias) with which the layout's own project resamples positions."""
    if layout == "timm":
        return 0.0, True
    if layout == "transformers":
        return 0.0, registers > 0
    dinov2_registers = registers > 0 and patch == 14  # these, and only these, were trained with offset 0, antialias
    return (0.0, True) if dinov2_registers else (0.1, False)


_TRANSFORMERS_MODELS = ("dinov2", "dinov2_with_registers")
_TRANSFORMERS_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "mlp_ratio": 4}


def heads_of_transformers(description: Mapping[str, Any], where: str) -> int:
    """Attention heads that a transformers `config.json` names; what Hilum has no other way of doing is checked.

    Raises:
        CheckpointError: another model, activation, epsilon or width than DINOv2's.
    """
    if description.get("model_type") not in _TRANSFORMERS_MODELS:
        found = description.get("model_type")
        raise CheckpointError(f"{where}: expected model_type {' or '.join(_TRANSFORMERS_MODELS)}, found {found!r}.")
    for name, expected in _TRANSFORMERS_FIXED.items():
        if (found := description.get(name, expected)) != expected:
            raise CheckpointError(f"{where}: {name} is {found!r}; Hilum's backbones have {expected!r}.")
    heads = description.get("num_attention_heads", 12)
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"{where}: num_attention_heads is {heads!r}; expected a number of heads.")
    return heads


def check_transformers(description: Mapping[str, Any], config: ViTConfig, where: str) -> None:
    """Compare a transformers `config.json` with what the shapes of the tensors say.

    Raises:
        CheckpointError: they differ: the description belongs to other weights.
    """
    told = {
        "hidden_size": config.embed_dim, "num_hidden_layers": config.depth, "patch_size": config.patch_size,
        "image_size": config.image_size, "num_channels": config.in_channels,
        "use_swiglu_ffn": config.feed_forward == "swiglu", "num_register_tokens": config.registers,
    }  # fmt: skip
    differences = [
        f"{name} {description[name]!r}, the tensors {value!r}"
        for name, value in told.items()
        if name in description and description[name] != value
    ]
    if differences:
        raise CheckpointError(f"{where} describes other weights: {'; '.join(differences)}.")


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
