"""Where a backbone comes from: a weights file, what describes it, its architecture, and which tensor becomes which.

Knows Hilum's own description and those of transformers and timm. `weights.py` is the door for everybody else.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hilum.backbones.layouts import (
    Layout,
    Shape,
    check_transformers,
    heads_of_transformers,
    infer_config,
    read_layout,
    shorten,
)
from hilum.backbones.pickled import NOT_TENSORS, SUFFIXES, read_pickled
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.config import from_dict, to_dict
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import read_json
from hilum.core.meta import without_weights

FORMAT = "hilum-backbone-1"
WEIGHTS_NAME, CONFIG_NAME, PROCESSOR_NAME = "teacher.safetensors", "config.json", "preprocessor_config.json"
GREY_RECIPE = "hilum-grey-1"
"""The normalisation that folded kernels expect."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ASSUMED = "assumed: ImageNet's"
_NAMES = (WEIGHTS_NAME, "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of one file, by the file's own names."""

    path: Path
    shapes: dict[str, Shape]
    metadata: dict[str, str]
    """Of a safetensors header."""
    others: list[str]
    """Entries of a pickle that are no tensors."""
    loaded: dict[str, Tensor] | None = None
    """Of a pickle, whose tensors come all at once."""

    @classmethod
    def open(cls, path: Path) -> "WeightsFile":
        """Read names and shapes.

        Raises:
            CheckpointError: damaged, refused, or no weights file.
        """
        if path.suffix in SUFFIXES:
            tensors, others = read_pickled(path)
            return cls(path, {name: tuple(value.shape) for name, value in tensors.items()}, {}, others, tensors)
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: expected a .safetensors file, or a pickle of tensors ({', '.join(SUFFIXES)})."
            )
        with _open(path) as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        others = _entry(metadata, NOT_TENSORS, path) if NOT_TENSORS in metadata else []
        return cls(path, shapes, metadata, others)

    def read(self, sources: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
        """Tensors in float32 under our names; several sources are stacked along their first axis.

        Raises:
            CheckpointError: damaged, or whole numbers.
        """
        if self.loaded is not None:
            return self._join(sources, self.loaded.__getitem__)
        with _open(self.path) as opened:
            return self._join(sources, opened.get_tensor)

    def _join(self, sources: Mapping[str, tuple[str, ...]], get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        parts = {name: [get(key) for key in keys] for name, keys in sources.items()}
        whole = [f"{name} ({one.dtype})" for name, many in parts.items() for one in many if not one.is_floating_point()]
        if whole:
            raise CheckpointError(f"{self.path}: expected floating point, found {shorten(whole)}.")
        return {
            name: many[0].to(torch.float32, copy=True) if len(many) == 1 else torch.cat([one.float() for one in many])
            for name, many in parts.items()
        }


@dataclass(frozen=True)
class Source:
    """A weights file, its architecture as stored, its description as loaded, and how its tensors map to ours."""

    file: Path
    weights: WeightsFile
    config: ViTConfig
    content: dict[str, Any]
    layout: Layout
    own: bool
    """Written by Hilum."""

    @classmethod
    def at(cls, path: Path) -> "Source":
        """Find the weights at an existing path and everything that describes them.

        Raises:
            CheckpointError: nothing there, damaged, or not a vision transformer that Hilum knows.
        """
        file = find_weights(path)
        weights = WeightsFile.open(file)
        beside = file.parent / CONFIG_NAME
        foreign: dict[str, Any] = {}
        if "hilum" in weights.metadata:
            content = _checked_content(_entry(weights.metadata, "hilum", file), file)  # written whole with the tensors
        else:
            named_by_folder = path.is_dir() or file.name == WEIGHTS_NAME
            described = read_json(beside, CheckpointError) if beside.is_file() else {}
            _refuse_model(described, file)
            ours = not isinstance(described, dict) or "format" in described or file.name == WEIGHTS_NAME
            if beside.is_file() and named_by_folder and ours:
                content = _checked_content(described, beside)
            else:
                foreign = described if isinstance(described, dict) and "format" not in described else {}
                return cls._imported(weights, foreign)
        try:
            config = from_dict(ViTConfig, content["architecture"], "architecture.")
        except ConfigError as error:
            raise CheckpointError(f"{file}: its description does not name an architecture. {error}") from error
        return cls(file, weights, config, content, read_layout(weights.shapes, str(file), own=True), own=True)

    @classmethod
    def _imported(cls, weights: WeightsFile, described: Mapping[str, Any]) -> "Source":
        """Other people's weights; `described` is what a config.json beside them says, or nothing."""
        where, beside = str(weights.path), str(weights.path.parent / CONFIG_NAME)
        layout = read_layout(weights.shapes, where)
        shapes = layout.shapes(weights.shapes)
        by_transformers = layout.name == "transformers" and "model_type" in described
        heads = heads_of_transformers(described, beside) if by_transformers else None
        config = infer_config(shapes, layout.name, where, heads)
        if by_transformers:
            check_transformers(described, config, beside)
        normalisation = _normalisation(weights.path.parent, described, config.in_channels)
        loaded = replace(config, in_channels=1) if normalisation else config
        content = describe("imported", loaded, GREY_RECIPE if normalisation else "")
        content |= {"layout": layout.name, "normalisation": normalisation or None, "left_out": dict(layout.left_out)}
        if weights.others:
            content["left_out"]["no tensors"] = weights.others
        content["filled"] = layout.filled
        return cls(weights.path, weights, config, content, layout, own=False)

    def statistics(self, warn: Callable[[str], None]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and standard deviation per channel to fold, or None twice; an assumption that may be wrong is told."""
        normalisation = self.content.get("normalisation")
        if self.own:
            return (IMAGENET_MEAN, IMAGENET_STD) if self.config.in_channels == 3 else (None, None)
        if not normalisation:
            return None, None
        if normalisation["from"] == _ASSUMED and self.layout.name == "transformers":
            warn(f"{self.file}: no {PROCESSOR_NAME} beside it, so ImageNet's mean and deviation are assumed")
        return tuple(normalisation["mean"]), tuple(normalisation["std"])

    def read_checked(self) -> dict[str, Tensor]:
        """All parameters under our names, in float32.

        Raises:
            CheckpointError: any tensor missing, unexpected, of the wrong shape or not finite; the message lists them.
        """
        state = self.weights.read(self.layout.sources)
        if not self.own:
            dim = self.config.embed_dim
            if "mask_token" in self.layout.filled:
                state["mask_token"] = torch.zeros(1, dim)
            if not self.layout.class_row:
                state["pos_embed"] = torch.cat([torch.zeros(1, 1, dim), state["pos_embed"]], dim=1)
        _check(state, self.config, self.file)
        return state


def describe(kind: str, config: ViTConfig, preprocess_id: str) -> dict[str, Any]:
    """The entries that every description of a backbone has."""
    return {
        "format": kind, "architecture": to_dict(config), "preprocess_id": preprocess_id,
        "resolution": config.image_size,
    }  # fmt: skip


def find_weights(path: Path) -> Path:
    """The weights file that an existing path names: itself, or the one in a folder.

    Raises:
        CheckpointError: nothing there, or a folder with no file of a known name; those of other names are listed.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a run folder or a .safetensors file.")
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    if (path / "model.safetensors.index.json").is_file():
        raise CheckpointError(f"{path}: the weights are cut into several files; save them as one model.safetensors.")
    weights = sorted(one.name for one in path.iterdir() if one.suffix in (".safetensors", *SUFFIXES))
    found = f" There are {shorten(weights)}: name the one you mean." if weights else ""
    raise CheckpointError(
        f"{path} holds no backbone: expected {WEIGHTS_NAME} (written by hilum pretrain) or model.safetensors in it."
        + found
    )


def _refuse_model(described: Any, file: Path) -> None:
    """The tensors of a model's backbone look like other people's, but what they have met stands in the model."""
    kind = str(described.get("format", "")) if isinstance(described, dict) else ""
    if not kind.startswith(("hilum-model-", "hilum-ensemble-")):
        return
    trained = described.get("training")
    backbone = trained.get("backbone") if isinstance(trained, dict) else None
    name = backbone.get("name") if isinstance(backbone, dict) else None
    raise CheckpointError(
        f"{file} is part of a Hilum model, not a backbone: read alone, it would lose the record of what it has seen. "
        f"Give the run or the weights that the model was fitted on{f' ({name})' if name else ''}; where a model is "
        f"wanted, its folder {file.parent}."
    )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's own where the system refuses to open
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}.") from error


def _entry(metadata: Mapping[str, str], name: str, file: Path) -> Any:
    try:
        return json.loads(metadata[name])
    except ValueError as error:
        raise CheckpointError(f"{file}: the entry {name!r} of its header is damaged: {error}.") from error


def _checked_content(content: Any, where: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT or "architecture" not in content:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{where}: expected a description of format {FORMAT!r}, found {found!r}. To load weights of another "
            "project, give the file another name than Hilum's own, or name it itself."
        )
    return content


def _normalisation(folder: Path, described: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Mean, std and where they are from; empty for one channel that nothing describes."""
    file = folder / PROCESSOR_NAME
    processor = read_json(file, CheckpointError) if file.is_file() else {}
    pretrained = described.get("pretrained_cfg")  # timm's
    if isinstance(processor, dict) and "image_mean" in processor and "image_std" in processor:
        if abs(float(processor.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-6:
            raise CheckpointError(
                f"{file}: rescale_factor is {processor['rescale_factor']}; expected 1 / 255, pixels in [0, 1]."
            )
        plain = processor.get("do_normalize", True) is False
        mean = [0.0] if plain else processor["image_mean"]
        std, source = [1.0] if plain else processor["image_std"], PROCESSOR_NAME
    elif isinstance(pretrained, dict) and "mean" in pretrained and "std" in pretrained:
        mean, std, source = pretrained["mean"], pretrained["std"], CONFIG_NAME
    elif channels == 3:
        mean, std, source = IMAGENET_MEAN, IMAGENET_STD, _ASSUMED
    else:
        return {}
    return {"mean": _per_channel(mean, channels, folder), "std": _per_channel(std, channels, folder), "from": source}


def _per_channel(value: Any, channels: int, folder: Path) -> list[float]:
    """A number per channel; one number, or equal ones, stand for as many as there are."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers or not all(isinstance(one, int | float) for one in numbers):
        raise CheckpointError(f"{folder}: the mean or deviation of its images is {value!r}; expected numbers.")
    if len(numbers) != channels and len(set(numbers)) == 1:
        numbers = numbers[:1] * channels
    if len(numbers) != channels:
        raise CheckpointError(f"{folder}: {len(numbers)} means or deviations for weights of {channels} channels.")
    return [float(one) for one in numbers]


def _check(state: Mapping[str, Tensor], config: ViTConfig, file: Path) -> None:
    with without_weights():
        expected = {name: tuple(value.shape) for name, value in VisionTransformer(config).state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"{len(missing)} missing: {shorten(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected: {shorten(unexpected)}")
    shared = [name for name in expected if name in state]
    if wrong := [name for name in shared if tuple(state[name].shape) != expected[name]]:
        listed = shorten([f"{name} is {tuple(state[name].shape)}, expected {expected[name]}" for name in wrong])
        problems.append(f"{len(wrong)} of the wrong shape: {listed}")
    if broken := [name for name in shared if not bool(torch.isfinite(state[name]).all())]:
        problems.append(f"{len(broken)} with NaN or infinite values: {shorten(broken)}")
    if problems:
        raise CheckpointError(
            f"{file} does not fit a ViT of {config.depth} blocks of {config.embed_dim} channels, patch "
            f"{config.patch_size}, {config.registers} registers, {config.feed_forward}. Tensors " + "; ".join(problems)
        )
