"""The parts of a vision transformer, on packed tokens: the tokens of images of several sizes in one (T, D) tensor.

Every layer but attention treats tokens one by one, so packing gives one matrix product for all crop sizes; attention
runs once per size. Parameter names follow DINOv2. `vit.py` puts the parts together.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from hilum.core.transfer import send

FeedForward = Literal["mlp", "swiglu"]
NORM_EPS = 1e-6

Shapes = Sequence[tuple[int, int]]
"""Per group of equal-sized images in a packed tensor: (images, tokens per image), in order."""


class Subset(NamedTuple):
    """The tokens of the images that one residual branch is run on (stochastic depth on a part of the batch)."""

    rows: Int64[Tensor, " kept"]
    """Positions in the packed tensor."""
    scale: Float[Tensor, "kept 1"]
    """Images in the group / images kept, which keeps the expected residual unchanged."""
    shapes: Shapes
    """Shapes of what is kept."""


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron 2021, "Going deeper with Image Transformers")."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, tokens: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """Scale each channel."""
        return tokens * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention inside each image; query, key and value in one projection with bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "T D"], shapes: Shapes) -> Float[Tensor, "T D"]:
        """Attend within each image of each group."""
        groups = self.qkv(tokens).split([images * length for images, length in shapes])
        outputs = []
        for group, (images, length) in zip(groups, shapes, strict=True):
            split = group.view(images, length, 3, self.heads, -1)  # B N 3 heads head_dim
            query, key, value = split.permute(2, 0, 3, 1, 4)  # each B heads N head_dim
            attended = _attend(query, key, value)
            outputs.append(attended.transpose(1, 2).reshape(images * length, -1))  # T D
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


def _attend(
    query: Float[Tensor, "B H N E"], key: Float[Tensor, "B H N E"], value: Float[Tensor, "B H N E"]
) -> Float[Tensor, "B H N E"]:
    """softmax(q k^T / sqrt(E)) v; in bfloat16 on a CPU by plain products.

    There torch's fused kernel (2.13) is 1.4 times (1,370 tokens) to 5 times (65 tokens) slower, forward and backward.
    """
    if query.dtype is torch.bfloat16 and query.device.type == "cpu":
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value)


class MLP(nn.Module):
    """D -> hidden -> D with exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Transform each token."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Transform each token."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


FEED_FORWARDS: dict[str, type[MLP] | type[SwiGLU]] = {"mlp": MLP, "swiglu": SwiGLU}


class Block(nn.Module):
    """Pre-norm transformer block: x + LS1(attention(LN1 x)), then x + LS2(feed-forward(LN2 x))."""

    def __init__(self, dim: int, heads: int, feed_forward: FeedForward, hidden: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FEED_FORWARDS[feed_forward](dim, hidden)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self,
        tokens: Float[Tensor, "T D"],
        shapes: Shapes,
        attention_subset: Subset | None = None,
        feed_forward_subset: Subset | None = None,
    ) -> Float[Tensor, "T D"]:
        """Run the block; a subset restricts its branch to some images, the others pass unchanged."""
        kept, kept_shapes = _keep(tokens, shapes, attention_subset)
        tokens = _add(tokens, self.ls1(self.attn(self.norm1(kept), kept_shapes)), attention_subset)
        kept, _ = _keep(tokens, shapes, feed_forward_subset)
        return _add(tokens, self.ls2(self.mlp(self.norm2(kept))), feed_forward_subset)


def _keep(tokens: Tensor, shapes: Shapes, subset: Subset | None) -> tuple[Tensor, Shapes]:
    return (tokens, shapes) if subset is None else (tokens.index_select(0, subset.rows), subset.shapes)


def _add(tokens: Tensor, branch: Tensor, subset: Subset | None) -> Tensor:
    if subset is None:
        return tokens + branch
    return tokens.index_add(0, subset.rows, (branch * subset.scale).to(tokens.dtype))


def draw_subsets(
    shapes: Shapes, count: int, rate: float, generator: torch.Generator, device: torch.device
) -> list[Subset]:
    """Draw the images that `count` residual branches keep, independently per branch and per group.

    Stochastic depth by sub-sampling the batch (DINOv2 section 5): max(int(images * (1 - rate)), 1) random images of
    each group go through the branch. All draws of a forward pass are made at once, so that they cost one transfer.
    """
    rows: list[Tensor] = []
    scales: list[Tensor] = []
    kept_shapes: list[tuple[int, int]] = []
    start = 0
    for images, length in shapes:
        kept = max(int(images * (1 - rate)), 1)
        order = torch.rand(count, images, generator=generator, device=generator.device).argsort(dim=1)
        chosen = send(order[:, :kept].sort(dim=1).values, device)  # count kept
        within = torch.arange(length, device=device)
        rows.append((start + chosen[:, :, None] * length + within).flatten(1))  # count kept*length
        scales.append(torch.full((kept * length, 1), images / kept, device=device))
        kept_shapes.append((kept, length))
        start += images * length
    scale = torch.cat(scales)
    return [Subset(branch, scale, kept_shapes) for branch in torch.cat(rows, dim=1)]
