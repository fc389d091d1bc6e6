"""What makes embeddings: the backbone of a model's first network with its head, or a backbone alone.

An embedding is of the last block, without the mirror image, and before any head but for what a finding's query pools.
Loops over images, and means over studies: `embeddings.py`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn

from hilum.backbones.vit import VisionTransformer
from hilum.backbones.weights import load_backbone, read_backbone_config
from hilum.core.errors import CheckpointError, ConfigError, UnknownNameError
from hilum.core.types import view_kind
from hilum.data.images import shrink
from hilum.data.transforms import evaluation_crop, normalise, preprocessing
from hilum.deploy import model_files as files
from hilum.deploy.admission import Gate
from hilum.deploy.network import Network, choose_device
from hilum.deploy.predictor import Model, load
from hilum.deploy.screening import Screening
from hilum.heads.evidence import maps_of
from hilum.heads.extension import ExtendedHead
from hilum.heads.features import Features, extract, freeze
from hilum.heads.ml_decoder import MLDecoder
from hilum.heads.view_attention import ViewAttention

SHORT_SIDE = 512
"""What source files are shrunk to for a backbone alone, as `hilum build` does, unless it looks at larger squares."""


class Embedded(NamedTuple):
    """Embeddings of a batch of images, as they come out, of any length."""

    cls: Float32[np.ndarray, "B D"]
    """[CLS] of the last block, after the backbone's final norm."""
    patch_mean: Float32[np.ndarray, "B D"]
    """Mean patch token of the last block."""
    pooled: dict[str, Float32[np.ndarray, "B E"]]
    """By finding: what its query pools from the patch tokens. E is the decoder's width, or D."""


@dataclass
class Encoder:
    """What makes embeddings: a backbone and how images reach it, with the head of a model where there is one."""

    backbone: VisionTransformer
    """Frozen, on `device`."""
    preprocess_id: str
    """How source files are read and normalised; one of `intensity.RECIPES`."""
    resolution: int
    """Side of the squares that it looks at, pixels."""
    short_side: int | None
    """What source files are shrunk to before; None: they are not."""
    device: torch.device
    precision: str = "fp32"
    blocks: int = 1
    """Last blocks that the head reads."""
    head: Any = None
    """With its extensions; None: a backbone alone."""
    findings: tuple[str, ...] = ()
    """Outputs of the head, in order."""
    trained: tuple[bool, ...] = ()
    """Which of them were trained."""
    model: str = ""
    """Identity of the model that it belongs to; "" of a backbone alone."""
    screening: Screening | None = None
    """Of the model; it names views that nobody has named, for heads that look at them."""

    @classmethod
    def of(cls, model: "Model | Encoder") -> "Encoder":
        """The encoder of a model: its first network.

        Raises:
            CheckpointError: the model runs as an exported graph, which gives no patch tokens.
        """
        if isinstance(model, Encoder):
            return model
        network = model.networks[0]
        if not isinstance(network, Network):
            raise CheckpointError(
                "What a finding's query pools, and features, come from the torch network of a model; this one runs as "
                "an exported graph. Load the model that it was exported from."
            )
        config = network.config
        return cls(
            backbone=network.backbone, preprocess_id=config.preprocess_id, resolution=config.resolution,
            short_side=config.short_side, device=network.device, precision=config.precision,
            blocks=config.head.blocks, head=network.head, findings=network.findings,
            trained=tuple(network.trained.tolist()), model=model.digest, screening=model.screening,
        )  # fmt: skip

    @property
    def dim(self) -> int:
        """D, numbers of an embedding."""
        return self.backbone.config.embed_dim

    @cached_property
    def digest(self) -> str:
        """Identity of the embeddings: of the backbone's weights, the resolution and the recipe; 16 hex digits.

        What files are shrunk to before is left out: a backbone alone and a model made from it search one index.
        """
        return _digest(self.backbone, [self.preprocess_id, self.resolution])

    @cached_property
    def head_digest(self) -> str:
        """Identity of the head's weights and of its findings in order, 16 hex digits; "" without a head."""
        return _digest(self.head, list(self.findings)) if self.head is not None else ""

    def crop(self, pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "S S"]:
        """The square that the backbone sees of a decoded image."""
        return evaluation_crop(shrink(pixels, self.short_side) if self.short_side else pixels, self.resolution)

    def view_of(self, pixels: UInt8[np.ndarray, "H W"], said: str) -> str:
        """The view of a decoded image, as predictions have it: what is said, else what the view classifier names."""
        return Gate(self.screening, score_flagged=True).admit(pixels, said, "given").view

    def read(
        self,
        squares: UInt8[Tensor, "B 1 S S"],
        findings: Sequence[str] = (),
        study: Int64[np.ndarray, " B"] | None = None,
        view: Int64[np.ndarray, " B"] | None = None,
    ) -> Embedded:
        """Embeddings of squares.

        Args:
            squares: as `crop` makes them.
            findings: also what the queries of these pool.
            study: study of each, 0 .. S-1, every study whole, for heads that look at studies; None: each alone.
            view: position of each one's view in `core.types.VIEW_KINDS`; None: not known.

        Raises:
            ConfigError: a finding that was never trained, or there is no head.
            UnknownNameError: no such finding.
            CheckpointError: numbers that are not finite.
        """
        self.check_findings(findings)
        features = extract(
            self.backbone, squares.to(self.device), preprocessing(self.preprocess_id), self.blocks, bool(findings),
            self.precision,
        )  # fmt: skip
        if findings:
            count = len(squares)
            features = features._replace(
                study=self._put(np.arange(count) if study is None else study),
                view=self._put(np.full(count, view_kind("UNKNOWN")) if view is None else view),
            )
        pooled = self._pooled(features, squares, findings)
        found = Embedded(features.cls[:, -self.dim :].cpu().numpy(), features.patch_mean.cpu().numpy(), pooled)
        if not all(np.isfinite(one).all() for one in (found.cls, found.patch_mean, *pooled.values())):
            raise CheckpointError("The embeddings are not finite: the weights are damaged.")
        return found

    def check_findings(self, findings: Sequence[str]) -> None:
        """Refuse findings whose queries mean nothing.

        Raises:
            ConfigError: there is no head, or it was not trained on one of them.
            UnknownNameError: no such finding.
        """
        for name in findings:
            if self.head is None:
                raise ConfigError(f"{name}: a backbone alone has no findings. Give a model made by hilum fit.")
            if name not in self.findings:
                raise UnknownNameError("finding of this model", name, self.findings)
            if not self.trained[self.findings.index(name)]:
                raise ConfigError(f"{name}: this model was never trained on it, so nothing can be searched by it.")

    def _pooled(
        self, features: Features, squares: UInt8[Tensor, "B 1 S S"], findings: Sequence[str]
    ) -> dict[str, Float32[np.ndarray, "B E"]]:
        """By finding, what its query takes from each image."""
        found: dict[str, np.ndarray] = {}
        of_head: dict[int, Tensor] = {}
        for name in findings:
            head, column = _part_of(self.head, self.findings.index(name))
            if id(head) not in of_head:
                of_head[id(head)] = self._pool(head, features, squares)
            found[name] = of_head[id(head)][:, column].cpu().numpy()
        return found

    @torch.no_grad()
    def _pool(self, head: Any, features: Features, squares: UInt8[Tensor, "B 1 S S"]) -> Float[Tensor, "B C E"]:
        if isinstance(head, MLDecoder):
            return head.pooled(features)
        assert features.patches is not None, "they were asked for"
        images = normalise(squares.to(self.device), preprocessing(self.preprocess_id))
        maps = maps_of(head, features, self.backbone, images).flatten(2)  # B C N
        return maps @ features.patches[..., -self.dim :]  # its length does not count: a view's share goes with it

    def _put(self, values: np.ndarray) -> Int64[Tensor, " B"]:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device)


def load_encoder(path: Path | str, device: str = "auto", resolution: int | None = None) -> Encoder:
    """The encoder of a MODEL or an ensemble directory, or a backbone alone.

    Args:
        path: a model, a pretraining run, or weights as `load_backbone` takes them.
        device: auto, cpu or cuda.
        resolution: of a backbone alone: side of the squares, pixels; None: what its positions are laid out for.

    Raises:
        CheckpointError: nothing there, incomplete or damaged.
        ConfigError: a resolution for a model, which has its own; or weights that do not say how images were read.
    """
    if is_model(path):
        if resolution is not None:
            raise ConfigError(f"--resolution: {path} is a model, which looks at images in its own resolution.")
        return Encoder.of(load(path, device))
    described = read_backbone_config(path)
    backbone = load_backbone(path, image_size=resolution)
    recipe = described["preprocess_id"]
    if not recipe:
        raise ConfigError(f"{path} does not say how its images were normalised. Convert it: hilum import-weights.")
    side, place = backbone.config.image_size, choose_device(device)
    return Encoder(freeze(backbone).to(place), recipe, side, SHORT_SIDE if side <= SHORT_SIDE else None, place)


def is_model(path: Path | str) -> bool:
    """Whether a path is a MODEL or an ensemble directory, and not a backbone."""
    try:
        content = json.loads((Path(path) / files.CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") in (files.MODEL_FORMAT, files.ENSEMBLE_FORMAT)


def _part_of(head: Any, column: int) -> tuple[Any, int]:
    """The head that scores an output, inside extensions and attention over views, and its column there."""
    if isinstance(head, ExtendedHead):
        for part, count in zip(head.heads, head.outputs, strict=True):
            if column < count:
                return _part_of(part, column)
            column -= count
    return (head.inner, column) if isinstance(head, ViewAttention) else (head, column)


def _digest(module: nn.Module, facts: Sequence[Any]) -> str:
    """First 16 hex digits of SHA-256 of a module's tensors by name, and of what else decides its output."""
    state: Mapping[str, Tensor] = module.state_dict()
    found = hashlib.sha256(json.dumps(facts).encode())
    for name in sorted(state):
        found.update(f"\x1f{name}{tuple(state[name].shape)}".encode())
        found.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
