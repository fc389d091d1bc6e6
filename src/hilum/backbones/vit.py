"""The vision transformer: normalised one-channel images in, `Tokens` out. No heads, no losses, no files.

Architecture and parameter names are those of DINOv2 and CheXFound (facebookresearch/dinov2 and RPIDIAL/CheXFound,
models/vision_transformer.py), so that their weights load; `weights.py` reads and writes them.
Parameters are initialised from torch's global generator: build inside `core.seeding.forked`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hilum.backbones.layers import NORM_EPS, Block, FeedForward, Shapes, draw_subsets
from hilum.backbones.pos_embed import resize_positions, sincos_positions
from hilum.core.errors import ConfigError


class Tokens(NamedTuple):
    """What the transformer makes of a batch of images."""

    cls: Float[Tensor, "B D"]
    registers: Float[Tensor, "B R D"]
    patches: Float[Tensor, "B N D"]
    """Row-major over the patch grid."""


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a vision transformer."""

    embed_dim: int
    """Channels of a token; a multiple of `num_heads`."""
    depth: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads; 64 channels per head in all published sizes."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    image_size: int = 224
    """Side of the square images that the position table is laid out for, pixels; other sizes are interpolated."""
    in_channels: int = 1
    """Image channels: 1, or 3 to hold imported weights before they are folded."""
    registers: int = 0
    """Register tokens (Darcet 2024, "Vision Transformers Need Registers")."""
    feed_forward: FeedForward = "mlp"
    """Feed-forward of the blocks: hidden width 4D for mlp; 8D/3 rounded down to an integer, then up to a multiple of
    `swiglu_multiple`, for swiglu."""
    layer_scale: float = 1e-5
    """Initial LayerScale factor."""
    positions: Literal["normal", "sincos"] = "normal"
    """What the learned position table starts from: small noise (DINOv2), or 2-D sines, which tell a short run from the
    first step where a patch is."""
    interpolate_antialias: bool = False
    """Low-pass positions before shrinking their grid; true for DINOv2 weights with registers."""
    interpolate_offset: float = 0.1
    """Offset in the position resampling step; 0.0 for DINOv2 weights with registers."""
    swiglu_multiple: int = 8
    """8 as in DINOv2 and CheXFound; 64 or 128 suits GPU matrix kernels better."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "patch_size", "image_size", "swiglu_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ViTConfig.{name}: expected at least 1, found {getattr(self, name)}.")
        if not 0 <= self.layer_scale < math.inf:
            raise ConfigError(f"ViTConfig.layer_scale: expected 0 or more, found {self.layer_scale}.")
        if self.registers < 0:
            raise ConfigError(f"ViTConfig.registers: expected 0 or more, found {self.registers}.")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"ViTConfig.embed_dim: {self.embed_dim} channels do not divide into {self.num_heads} heads."
            )
        if self.in_channels not in (1, 3):
            raise ConfigError(f"ViTConfig.in_channels: expected 1 or 3, found {self.in_channels}.")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"ViTConfig.image_size: {self.image_size} is not a multiple of the patch size {self.patch_size}."
            )

    @property
    def grid(self) -> int:
        """Side of the patch grid at `image_size`."""
        return self.image_size // self.patch_size

    @property
    def feed_forward_hidden(self) -> int:
        """Hidden width of the feed-forward."""
        if self.feed_forward == "mlp":
            return 4 * self.embed_dim
        return -(-int(4 * self.embed_dim * 2 / 3) // self.swiglu_multiple) * self.swiglu_multiple


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each; a convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, kernel_size=patch, stride=patch)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Embed the patches, row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Vision transformer with optional registers and learned positions.

    Token order is [CLS], registers, patches; registers carry no position. All outputs are after the final LayerNorm.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.feed_forward, config.feed_forward_hidden, config.layer_scale)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        if self.mask_token.is_meta:  # weights follow; torch would load its compiler to draw numbers that nobody reads
            return
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.config.positions == "sincos":
            self.pos_embed.data.copy_(sincos_positions(self.config.embed_dim, self.config.grid))
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():  # the patch convolution keeps torch's own initialisation
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile each block in place; names and weights stay as they are.

        Blocks are alike, so one graph per kind of call (student, teacher) serves all of them. Shapes are constants in
        the graphs: for training, where every step has the same. Run other sizes in
        `torch.compiler.set_stance("force_eager")`, or they are compiled too.

        Args:
            backend: of `torch.compile`.
        """
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Tokens:
        """Encode normalised images whose height and width are multiples of the patch size.

        Raises:
            ConfigError: another number of channels, or a size that is not a multiple of the patch size.
        """
        return self.forward_crops([images], [None])[0]

    def forward_crops(
        self,
        crops: Sequence[Float[Tensor, "_ _ _ _"]],
        masks: Sequence[Bool[Tensor, "_ _"] | None],
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[Tokens]:
        """Encode batches of several sizes in one pass: equal to separate calls, with shared matrix products.

        Args:
            crops: one (B, C, H, W) batch per size; B, H and W may differ.
            masks: per batch, True (B, N) where the patch embedding is replaced by the mask token, or None.
            drop_path: stochastic-depth rate, uniform over depth; each residual branch runs on a random part of each
                batch. 0 for teachers and inference.
            generator: draws the parts; required when `drop_path` > 0.

        Raises:
            ConfigError: as `forward`; or a rate outside [0, 1).
        """
        packed, shapes = self._embed(crops, masks)
        [output] = self._run_blocks(packed, shapes, 1, drop_path, generator)
        return self._unpack(output, shapes)

    def intermediate(self, images: Float[Tensor, "B C H W"], blocks: int) -> list[Tokens]:
        """Tokens after each of the last `blocks` blocks, the same final LayerNorm applied to each; the last is last.

        Raises:
            ConfigError: as `forward`; or more blocks than there are.
        """
        if not 1 <= blocks <= self.config.depth:
            raise ConfigError(f"Expected 1 to {self.config.depth} last blocks of this backbone, found {blocks}.")
        packed, shapes = self._embed([images], [None])
        return [self._unpack(output, shapes)[0] for output in self._run_blocks(packed, shapes, blocks)]

    def _embed(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[Float[Tensor, "T D"], list[tuple[int, int]]]:
        """Images of all sizes as one packed tensor of tokens with positions, and its shapes."""
        embedded = [self._tokens(images, mask) for images, mask in zip(crops, masks, strict=True)]
        shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
        flat = [tokens.flatten(0, 1) for tokens in embedded]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)), shapes

    def _tokens(self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None) -> Float[Tensor, "B S D"]:
        grid = self._grid_of(images)
        patches = self.patch_embed(images)  # B N D
        if mask is not None:
            patches = torch.where(mask[:, :, None], self.mask_token.to(patches.dtype), patches)
        positions = resize_positions(
            self.pos_embed, grid, self.config.interpolate_offset, self.config.interpolate_antialias
        )
        batch = images.shape[0]
        parts = [(self.cls_token + positions[:, :1]).expand(batch, -1, -1), patches + positions[:, 1:]]
        if self.register_tokens is not None:
            parts.insert(1, self.register_tokens.expand(batch, -1, -1))
        return torch.cat(parts, dim=1)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        _, channels, height, width = images.shape
        patch = self.config.patch_size
        if channels != self.config.in_channels:
            raise ConfigError(
                f"This backbone takes images of {self.config.in_channels} channel(s), found {channels}. "
                "Hilum's images have one; weights with three are folded by hilum.load_backbone."
            )
        if height % patch or width % patch or not height or not width:
            near = [max(round(side / patch), 1) * patch for side in (height, width)]
            raise ConfigError(
                f"Images of {height} x {width} pixels (height x width) do not divide into patches of {patch}; "
                f"nearest size that does: {near[0]} x {near[1]}."
            )
        return height // patch, width // patch

    def _run_blocks(
        self,
        tokens: Float[Tensor, "T D"],
        shapes: Shapes,
        last: int,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[Float[Tensor, "T D"]]:
        """Outputs of the last `last` blocks."""
        if not 0 <= drop_path < 1:
            raise ConfigError(f"drop_path: expected a rate in [0, 1), found {drop_path}.")
        depth = len(self.blocks)
        if drop_path > 0:
            assert generator is not None, "stochastic depth draws from an explicit generator"
            subsets = draw_subsets(shapes, 2 * depth, drop_path, generator, tokens.device)
        outputs = []
        for index, block in enumerate(self.blocks):
            pair = subsets[2 * index : 2 * index + 2] if drop_path > 0 else ()
            tokens = block(tokens, shapes, *pair)
            if index >= depth - last:
                outputs.append(tokens)
        return outputs

    def _unpack(self, packed: Float[Tensor, "T D"], shapes: Shapes) -> list[Tokens]:
        normalised = self.norm(packed)
        first = 1 + self.config.registers
        outputs = []
        for (images, length), group in zip(shapes, normalised.split([b * n for b, n in shapes]), strict=True):
            tokens = group.view(images, length, -1)  # B S D
            outputs.append(Tokens(tokens[:, 0], tokens[:, 1:first], tokens[:, first:]))
        return outputs


_small = partial(ViTConfig, layer_scale=1.0, positions="sincos")
"""For runs of hundreds of steps: LayerScale near zero and positions near zero take many thousand to grow."""

SIZES: dict[str, ViTConfig] = {
    "demo8": _small(128, 4, 2, patch_size=8, image_size=64),
    "demo16": _small(128, 4, 2, image_size=128),
    "mini8": _small(192, 6, 3, patch_size=8, image_size=112),
    "mini16": _small(192, 6, 3, image_size=224),
    "vitt16": ViTConfig(192, 12, 3, registers=4),
    "vits16": ViTConfig(384, 12, 6, registers=4),
    "vitb16": ViTConfig(768, 12, 12, registers=4),
    "vitl16": ViTConfig(1024, 24, 16, registers=4),
    "vitl16_chexfound": ViTConfig(1024, 24, 16, image_size=512, registers=4, feed_forward="swiglu"),
    "vitt14": ViTConfig(192, 12, 3, patch_size=14, image_size=518),
    "vits14": ViTConfig(384, 12, 6, patch_size=14, image_size=518),
    "vitb14": ViTConfig(768, 12, 12, patch_size=14, image_size=518),
    "vitl14": ViTConfig(1024, 24, 16, patch_size=14, image_size=518),
}
"""Named sizes. Patch 16 has 4 registers (CheXFound); patch 14 is the public DINOv2 layout, with none. `demo` and
`mini` are for CPUs. Change a field with `dataclasses.replace`."""
