"""Backbone weights in and out, strictly: every tensor of the file is used or named, every parameter is filled.

Reads safetensors only (a pickle can run code): Hilum's own folders and files, and the flat or chunked layouts of
DINOv2 and CheXFound. Three-channel patch kernels are folded exactly to Hilum's one channel. Knows nothing of heads,
optimisers or resumption (`core.checkpoint`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hilum.backbones.layers import FeedForward
from hilum.backbones.pos_embed import grid_side, resize_positions
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.config import from_dict, to_dict
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import atomic_path, read_json, write_json

FORMAT = "hilum-backbone-1"
WEIGHTS_NAME, CONFIG_NAME = "teacher.safetensors", "config.json"
GREY_RECIPE, GREY_MEAN, GREY_STD = "hilum-grey-1", 0.5, 0.25
"""The normalisation that folded kernels expect; `hilum.data.transforms` applies it (a sibling layer: a test keeps
the two equal)."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_WRAPPERS = ("teacher.", "backbone.", "model.", "module.", "_orig_mod.")
_OTHER_PARTS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_HEAD_CHANNELS = 64
_SHOWN = 6


def save_backbone(
    model: VisionTransformer, folder: Path, preprocess_id: str, extra: Mapping[str, Any] | None = None
) -> None:
    """Write `teacher.safetensors` and `config.json`, each whole or not at all.

    The weights file carries the same description in its header, so that it also stands alone.

    Args:
        model: its parameters are written in float32.
        folder: a run folder; created when absent.
        preprocess_id: normalisation recipe that the model was trained with.
        extra: further entries of `config.json` (fingerprint of the data seen, step, ...); plain JSON values.

    Raises:
        ConfigError: `extra` redefines an entry, or the model takes three channels.
        HilumError: the disk is full or the folder cannot be written.
    """
    if model.config.in_channels != 1:
        raise ConfigError("Hilum's own checkpoints take one channel; load three-channel weights with load_backbone.")
    content = _describe(FORMAT, model.config, preprocess_id)
    if taken := sorted(content.keys() & (extra or {}).keys()):
        raise ConfigError(f"Entries of {CONFIG_NAME} that are already defined: {', '.join(taken)}.")
    content |= extra or {}
    state = {name: value.to("cpu", torch.float32).contiguous() for name, value in model.state_dict().items()}
    with atomic_path(Path(folder) / WEIGHTS_NAME, SafetensorError) as temporary:
        # One header entry only: the library writes several in random order, and equal models shall be equal files.
        save_file(state, temporary, metadata={"hilum": json.dumps(content, allow_nan=False, sort_keys=True)})
    write_json(Path(folder) / CONFIG_NAME, content)


def read_backbone_config(path: Path | str) -> dict[str, Any]:
    """Describe a backbone without reading its weights: the entries of its `config.json`.

    Imported weights are described as they will be after loading: "format" is "imported", and "preprocess_id" is ""
    when the file does not tell it (a one-channel kernel that is not Hilum's).

    Raises:
        CheckpointError: nothing there, damaged, or not a vision transformer that Hilum knows.
    """
    return _Source.at(Path(path)).content


def load_backbone(
    path: Path | str,
    image_size: int | None = None,
    channel_mean: tuple[float, float, float] = IMAGENET_MEAN,
    channel_std: tuple[float, float, float] = IMAGENET_STD,
) -> VisionTransformer:
    """Load a backbone, in eval mode, in float32, on the CPU.

    Args:
        path: a run folder or any folder with `config.json` and weights, or one .safetensors file.
        image_size: lay the position table out for squares of this side (pixels); default: as stored.
        channel_mean: per-channel mean (on [0, 1] pixels) that three-channel weights were trained with.
        channel_std: per-channel standard deviation, likewise.

    Raises:
        CheckpointError: nothing there, damaged, not safetensors, or any tensor missing, unexpected, of the wrong
            shape or not finite; the message lists them.
        ConfigError: `image_size` is not a multiple of the patch size.
    """
    source = _Source.at(Path(path))
    state = source.read_tensors()
    config = source.config
    _check(state, config, source.file)
    if config.in_channels == 3:
        _fold_channels(state, channel_mean, channel_std)
        config = replace(config, in_channels=1)
    if image_size is not None and image_size != config.image_size:
        config = replace(config, image_size=image_size)
        table = state["pos_embed"]
        offset, antialias = config.interpolate_offset, config.interpolate_antialias
        state["pos_embed"] = resize_positions(table, (config.grid, config.grid), offset, antialias)
    with torch.device("meta"):  # draws no random numbers
        model = VisionTransformer(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _describe(kind: str, config: ViTConfig, preprocess_id: str) -> dict[str, Any]:
    return {
        "format": kind, "architecture": to_dict(config), "preprocess_id": preprocess_id,
        "resolution": config.image_size,
    }  # fmt: skip


def _fold_channels(state: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Replace a three-channel patch kernel by the one-channel kernel with equal outputs on grey images.

    With p the pixel, sum_c w_c (p - mean_c) / std_c + bias is linear in p = GREY_STD x + GREY_MEAN. Patches have no
    padding, so this is exact. The sums run in float64.
    """
    kernel = state["patch_embed.proj.weight"].double()  # D 3 P P
    channel_mean = torch.tensor(mean, dtype=torch.float64)[None, :, None, None]
    channel_std = torch.tensor(std, dtype=torch.float64)[None, :, None, None]
    scaled = kernel / channel_std
    bias = state["patch_embed.proj.bias"].double() + (scaled * (GREY_MEAN - channel_mean)).sum(dim=(1, 2, 3))
    state["patch_embed.proj.weight"] = (GREY_STD * scaled.sum(dim=1, keepdim=True)).float()
    state["patch_embed.proj.bias"] = bias.float()


@dataclass(frozen=True)
class _Source:
    """A weights file, its architecture, and how its keys map to ours."""

    file: Path
    config: ViTConfig
    content: dict[str, Any]
    keys: dict[str, str]  # ours -> the file's

    @classmethod
    def at(cls, path: Path) -> "_Source":
        file = _find_weights(path)
        shapes, metadata = _read_header(file)
        keys = _map_keys(shapes, file)
        if "hilum" in metadata:
            content = _checked_content(json.loads(metadata["hilum"]), file)  # written whole with the tensors
        elif (file.parent / CONFIG_NAME).is_file() and (path.is_dir() or file.name == WEIGHTS_NAME):
            described = read_json(file.parent / CONFIG_NAME, CheckpointError)
            content = _checked_content(described, file.parent / CONFIG_NAME)
        else:
            return cls._imported(file, {ours: shapes[theirs] for ours, theirs in keys.items()}, keys)
        try:
            config = from_dict(ViTConfig, content["architecture"], "architecture.")
        except ConfigError as error:
            raise CheckpointError(f"{file}: its description does not name an architecture. {error}") from error
        return cls(file, config, content, keys)

    @classmethod
    def _imported(cls, file: Path, shapes: dict[str, tuple[int, ...]], keys: dict[str, str]) -> "_Source":
        config = _infer_config(shapes, file)
        recipe = GREY_RECIPE if config.in_channels == 3 else ""
        return cls(file, config, _describe("imported", replace(config, in_channels=1), recipe), keys)

    def read_tensors(self) -> dict[str, Tensor]:
        """All tensors under our names, in float32."""
        with _open(self.file) as opened:
            state = {ours: opened.get_tensor(theirs) for ours, theirs in self.keys.items()}
        if whole := [f"{name} ({value.dtype})" for name, value in state.items() if not value.is_floating_point()]:
            raise CheckpointError(f"{self.file}: expected floating point, found {_list(whole)}.")
        return {name: value.to(torch.float32, copy=True) for name, value in state.items()}


def _find_weights(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: expected a .safetensors file. Pickled checkpoints (.pth, .pt, .bin) can run code and are "
                "not read; convert them once, where they are trusted, with safetensors.torch.save_file."
            )
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a run folder or a .safetensors file.")
    for name in (WEIGHTS_NAME, "model.safetensors"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no backbone: expected {WEIGHTS_NAME} (written by hilum pretrain) or model.safetensors in it."
    )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}.") from error


def _read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    with _open(file) as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        return shapes, opened.metadata() or {}


def _checked_content(content: Any, where: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT or "architecture" not in content:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{where}: expected a description of format {FORMAT!r}, found {found!r}. To load weights of another "
            "project in the DINOv2 layout, name the .safetensors file itself."
        )
    return content


def _map_keys(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, str]:
    """Our parameter names -> the file's keys. Heads and centres of a training checkpoint, and its student where it
    also holds a teacher, are known not to be the backbone and are left out; everything else is kept, to be judged.
    """
    has_teacher = any(re.match(r"^(model\.|module\.)*teacher\.", key) for key in shapes)
    keys: dict[str, str] = {}
    for key in shapes:
        if has_teacher and re.match(r"^(model\.|module\.)*student\.", key):
            continue
        name = key
        while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
            name = name.removeprefix(wrapper)
        if name.startswith(_OTHER_PARTS):
            continue
        name = _CHUNKED.sub(r"blocks.\1.", name)
        name = re.sub(r"\.ls([12])\.weight$", r".ls\1.gamma", name)
        if name in keys:
            raise CheckpointError(f"{file}: {keys[name]} and {key} are both {name}; expected one of them.")
        keys[name] = key
    return keys


def _infer_config(shapes: Mapping[str, tuple[int, ...]], file: Path) -> ViTConfig:
    """Architecture from tensor shapes alone. 64 channels per head, as in every published DINOv2 size."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    if absent := [name for name in needed if name not in shapes]:
        raise CheckpointError(
            f"{file} is not a vision transformer in the DINOv2 layout: no {', '.join(absent)} among its "
            f"{len(shapes)} tensors ({_list(sorted(shapes))})."
        )
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"^blocks\.(\d+)\.", name))}
    dim, channels, patch = shapes["cls_token"][-1], *shapes["patch_embed.proj.weight"][1:3]
    if dim % _HEAD_CHANNELS or not blocks:
        raise CheckpointError(
            f"{file}: {dim} channels and {len(blocks)} blocks; without {CONFIG_NAME} only transformers with "
            f"{_HEAD_CHANNELS} channels per head can be read."
        )
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    feed_forward: FeedForward = "swiglu" if "blocks.0.mlp.w3.weight" in shapes else "mlp"
    side = grid_side(torch.empty(shapes["pos_embed"], device="meta"))
    dinov2_registers = registers > 0 and patch == 14  # these, and only these, were trained with offset 0, antialias
    config = ViTConfig(
        dim, max(blocks) + 1, dim // _HEAD_CHANNELS, patch, side * patch, channels, registers, feed_forward,
        interpolate_antialias=dinov2_registers, interpolate_offset=0.0 if dinov2_registers else 0.1,
    )  # fmt: skip
    if feed_forward == "swiglu":
        hidden = shapes["blocks.0.mlp.w3.weight"][1]
        candidates = [replace(config, swiglu_multiple=multiple) for multiple in (8, 64, 128, 256)]
        return next((one for one in candidates if one.feed_forward_hidden == hidden), config)
    return config


def _check(state: Mapping[str, Tensor], config: ViTConfig, file: Path) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in VisionTransformer(config).state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"{len(missing)} missing: {_list(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected: {_list(unexpected)}")
    shared = [name for name in expected if name in state]
    if wrong := [name for name in shared if tuple(state[name].shape) != expected[name]]:
        listed = _list([f"{name} is {tuple(state[name].shape)}, expected {expected[name]}" for name in wrong])
        problems.append(f"{len(wrong)} of the wrong shape: {listed}")
    if broken := [name for name in shared if not bool(torch.isfinite(state[name]).all())]:
        problems.append(f"{len(broken)} with NaN or infinite values: {_list(broken)}")
    if problems:
        raise CheckpointError(
            f"{file} does not fit a ViT of {config.depth} blocks of {config.embed_dim} channels, patch "
            f"{config.patch_size}, {config.registers} registers, {config.feed_forward}. Tensors " + "; ".join(problems)
        )


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
