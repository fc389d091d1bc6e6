"""Backbone weights on disk: strict both ways. Every tensor of the file is used or named, every parameter is filled.

Reads Hilum's own folders and files, and other people's weights in the layouts of `layouts.py`, as safetensors or (by
`pickled.py` alone) as pickles of tensors. Three-channel patch kernels are folded exactly to Hilum's one channel.
Knows nothing of heads, optimisers or resumption (`core.checkpoint`).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hilum.backbones.hub import resolve_weights
from hilum.backbones.patch_kernels import GREY_MEAN, GREY_STD, fold_channels, resample_patches
from hilum.backbones.pos_embed import resize_positions
from hilum.backbones.sources import (
    CONFIG_NAME,
    FORMAT,
    GREY_RECIPE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WEIGHTS_NAME,
    Source,
    describe,
)
from hilum.backbones.vit import VisionTransformer
from hilum.core.errors import ConfigError
from hilum.core.files import atomic_path, write_json
from hilum.core.meta import without_weights
from hilum.core.tracking import warn

__all__ = [
    "CONFIG_NAME", "FORMAT", "GREY_MEAN", "GREY_RECIPE", "GREY_STD", "IMAGENET_MEAN", "IMAGENET_STD", "WEIGHTS_NAME",
    "load_backbone", "read_backbone_config", "resolve_weights", "save_backbone",
]  # fmt: skip

_KERNEL, _BIAS, _POSITIONS = "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"


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
    content = describe(FORMAT, model.config, preprocess_id)
    if taken := sorted(content.keys() & (extra or {}).keys()):
        raise ConfigError(f"Entries of {CONFIG_NAME} that are already defined: {', '.join(taken)}.")
    content |= extra or {}
    state = {name: value.to("cpu", torch.float32).contiguous() for name, value in model.state_dict().items()}
    with atomic_path(Path(folder) / WEIGHTS_NAME, SafetensorError) as temporary:
        # One header entry only: the library writes several in random order, and equal models shall be equal files.
        save_file(state, temporary, metadata={"hilum": json.dumps(content, allow_nan=False, sort_keys=True)})
    write_json(Path(folder) / CONFIG_NAME, content)


def read_backbone_config(path: Path | str) -> dict[str, Any]:
    """Describe a backbone without loading it: the entries of its `config.json`.

    Imported weights are described as they will be after loading. "format" is "imported"; "preprocess_id" is "" when
    nothing tells how images were normalised (a one-channel kernel that is not Hilum's); and there are

    - "layout": dinov2, transformers or timm;
    - "normalisation": "mean" and "std" per channel that the weights were trained with, absorbed by loading, and
      "from" which file they are, or that they are assumed;
    - "left_out": reason -> keys of the file that are known not to be the backbone;
    - "filled": parameter -> what stands in for it where the layout does not have it.

    Args:
        path: as for `load_backbone`.

    Raises:
        CheckpointError: nothing there, damaged, or not a vision transformer that Hilum knows.
    """
    return Source.at(resolve_weights(path)).content


def load_backbone(
    path: Path | str,
    image_size: int | None = None,
    patch_size: int | None = None,
    channel_mean: tuple[float, ...] | None = None,
    channel_std: tuple[float, ...] | None = None,
) -> VisionTransformer:
    """Load a backbone, in eval mode, in float32, on the CPU.

    Args:
        path: a run folder or any folder with weights; one .safetensors file; one .pth, .pt or .bin file that holds
            nothing but tensors and plain containers; or `owner/name` on the Hugging Face Hub (`resolve_weights`).
        image_size: lay the position table out for squares of this side (pixels); default: as stored, or, with
            another patch size, as many patches as stored.
        patch_size: resample the patch kernel to patches of this side (pixels; `resample_patches`).
        channel_mean: per-channel mean (on [0, 1] pixels) that imported weights were trained with; default: what
            preprocessor_config.json or config.json beside the weights says, else ImageNet's.
        channel_std: per-channel standard deviation, likewise.

    Raises:
        CheckpointError: nothing there, damaged, not weights, or any tensor missing, unexpected, of the wrong shape
            or not finite; the message lists them.
        ConfigError: `image_size` is not a multiple of the patch size, a size is below 1, or one of `channel_mean`
            and `channel_std` alone or not for as many channels as there are.
    """
    if (channel_mean is None) != (channel_std is None):
        raise ConfigError("channel_mean and channel_std belong together: give both or neither.")
    source = Source.at(resolve_weights(path))
    config, state = source.config, source.read_checked()
    if channel_mean is not None and channel_std is not None and source.own and config.in_channels == 1:
        raise ConfigError(f"{source.file} is Hilum's own and has one normalisation: leave out channel_mean and _std.")
    if patch_size is not None and patch_size != config.patch_size:
        state[_KERNEL] = resample_patches(state[_KERNEL], patch_size)
        config = replace(config, patch_size=patch_size, image_size=config.grid * patch_size)
    mean, std = (channel_mean, channel_std) if channel_mean is not None else source.statistics(warn)
    if mean is not None and std is not None:
        state[_KERNEL], state[_BIAS] = fold_channels(state[_KERNEL], state[_BIAS], mean, std)
        config = replace(config, in_channels=1)
    if image_size is not None and image_size != config.image_size:
        config = replace(config, image_size=image_size)
        state[_POSITIONS] = resize_positions(
            state[_POSITIONS], (config.grid, config.grid), config.interpolate_offset, config.interpolate_antialias
        )
    with without_weights():
        model = VisionTransformer(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
