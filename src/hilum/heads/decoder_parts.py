"""Parts of a decoder head: dropout masks, cross-attention over one image or a study, a layer, and what may be added.

The layer is that of Ridnik et al. 2021 "ML-Decoder" (Alibaba-MIIL/ML_Decoder). The attention temperature and the
pyramid follow a second-hand description of GLoRI's later form (arXiv 2502.05142 v2); where that says nothing, the
choice made here is named.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hilum.core.errors import ConfigError
from hilum.heads.study_sets import shares


class DropoutMasks(NamedTuple):
    """Factors for the five places with dropout of a layer: 0 where dropped, else 1 / P(kept)."""

    queries: Float[Tensor, "B Q D"]
    attention: Float[Tensor, "B A Q N"]
    attended: Float[Tensor, "B Q D"]
    hidden: Float[Tensor, "B Q F"]
    output: Float[Tensor, "B Q D"]


def dropout_mask(shape: tuple[int, ...], probability: float, generator: torch.Generator) -> Tensor:
    """A float32 dropout mask, on the generator's device.

    Each element compares 16 random bits with a threshold, so that one 64-bit draw serves four elements (drawing is
    the slow part on a CPU); the probability is met to within 1 / 131072 and the scale is exact for what is met.
    """
    count = math.prod(shape)
    dropped = round(probability * 2**16)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16)[:count] >= dropped - 2**15
    return kept.to(torch.float32).mul_(2**16 / (2**16 - dropped)).view(shape)


class CrossAttention(nn.Module):
    """Multi-head attention from queries to a memory; parameters named as `nn.MultiheadAttention` has them.

    With `same`, the memory of an image is the tokens of all images of its study, without ever being put together:
    each image's tokens are attended to alone, and the results are weighted by the images' shares of the softmax's
    denominator. That is the softmax over all tokens of the study, in the memory that single images take.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        mask: Float[Tensor, "B A Q N"] | None = None,
        sharpness: Float[Tensor, "B 1 1 1"] | None = None,
        same: Bool[Tensor, "B B"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Attend; through the fused kernel where weights are neither dropped nor shared by a study.

        Args:
            queries: of each image; of one study, equal ones.
            memory: tokens of each image.
            mask: dropout factors of the attention weights.
            sharpness: factor of the logits.
            same: which images are one study; None: each image is alone.
        """
        query, key, value = self._project(queries, memory, sharpness)
        if mask is None and same is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            logits = _logits(query, key)
            weights = logits.softmax(dim=-1, dtype=torch.float32)
            attended = (weights if mask is None else weights * mask).to(value.dtype) @ value  # B A Q d
            if same is not None:
                share = shares(_log_sum(logits, weights), same).to(value.dtype)  # B B A Q
                attended = torch.einsum("bjaq,jaqd->baqd", share, attended)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def weights(
        self,
        queries: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        sharpness: Float[Tensor, "B 1 1 1"] | None = None,
        same: Bool[Tensor, "B B"] | None = None,
    ) -> Float[Tensor, "B A Q N"]:
        """Attention weights of each head; they sum to 1 over an image, with `same` over a study."""
        query, key, _ = self._project(queries, memory, sharpness)
        logits = _logits(query, key)
        weights = logits.softmax(dim=-1, dtype=torch.float32)
        if same is None:
            return weights
        share = shares(_log_sum(logits, weights), same).diagonal(dim1=0, dim2=1)  # A Q B
        return weights * share.permute(2, 0, 1).unsqueeze(-1)

    def _project(
        self, queries: Tensor, memory: Tensor, sharpness: Tensor | None
    ) -> tuple[Float[Tensor, "B A Q d"], Float[Tensor, "B A N d"], Float[Tensor, "B A N d"]]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B L D -> B A L d
            for tokens, weight, bias in zip((queries, memory, memory), weights, biases, strict=True)
        )
        return query if sharpness is None else query * sharpness.to(query.dtype), key, value


def _logits(query: Float[Tensor, "B A Q d"], key: Float[Tensor, "B A N d"]) -> Float[Tensor, "B A Q N"]:
    return query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)


def _log_sum(logits: Float[Tensor, "B A Q N"], weights: Float[Tensor, "B A Q N"]) -> Float[Tensor, "B A Q"]:
    """Logarithm of the sum of exponentials, float32, read off the float32 softmax where it is largest."""
    place = weights.detach().argmax(dim=-1, keepdim=True)
    return (logits.gather(-1, place).float() - weights.gather(-1, place).log()).squeeze(-1)


class DecoderLayer(nn.Module):
    """Residual dropout, cross-attention and feed-forward, a LayerNorm after each (ML-Decoder, no self-attention)."""

    def __init__(self, dim: int, feed_forward: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.multihead_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feed_forward)
        self.linear2 = nn.Linear(feed_forward, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        masks: DropoutMasks | None = None,
        sharpness: Float[Tensor, "B 1 1 1"] | None = None,
        same: Bool[Tensor, "B B"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """One decoding step; `sharpness` and `same` as `CrossAttention.forward`."""
        first, attention, second, hidden, third = masks or (None, None, None, None, None)
        queries = self.norm1(_add(queries, queries, first))
        queries = self.norm2(_add(queries, self.multihead_attn(queries, memory, attention, sharpness, same), second))
        inner = F.relu(self.linear1(queries), inplace=True)
        inner = inner if hidden is None else inner * hidden
        return self.norm3(_add(queries, self.linear2(inner), third))

    def weights(
        self,
        queries: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        sharpness: Float[Tensor, "B 1 1 1"] | None = None,
        same: Bool[Tensor, "B B"] | None = None,
    ) -> Float[Tensor, "B A Q N"]:
        """Attention weights that `forward` uses on these queries."""
        return self.multihead_attn.weights(self.norm1(queries + queries), memory, sharpness, same)


def _add(queries: Tensor, update: Tensor, mask: Tensor | None) -> Tensor:
    """A residual step, with dropout on the update where a mask is given."""
    return queries + update if mask is None else torch.addcmul(queries, update.to(queries.dtype), mask)


class TextQueries(nn.Module):
    """One query per finding, projected from a vector that a text encoder gave for its name or description.

    Args:
        findings: C.
        text_dim: T, width of the vectors.
        dim: width of the queries.
        learnable: the vectors are where training starts, and are trained too.
    """

    vectors: Tensor

    def __init__(self, findings: int, text_dim: int, dim: int, learnable: bool) -> None:
        super().__init__()
        # Not a number until given: whoever forgets the vectors is told by the first loss, not by a poor model.
        vectors = torch.full((findings, text_dim), torch.nan)
        if learnable:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.projection = nn.Linear(text_dim, dim)

    @torch.no_grad()
    def set(self, vectors: Float[Tensor, "C T"]) -> None:
        """Take these vectors, as they are.

        Raises:
            ConfigError: of another shape, or not finite.
        """
        if vectors.shape != self.vectors.shape or not vectors.isfinite().all():
            raise ConfigError(
                f"Text vectors: expected {len(self.vectors)} findings x {self.vectors.shape[1]} finite numbers, found "
                f"shape {tuple(vectors.shape)}. Encode the names of the findings again, in their order."
            )
        self.vectors.copy_(vectors)

    def forward(self) -> Float[Tensor, "C D"]:
        """The queries."""
        return self.projection(self.vectors)


class AttentionTemperature(nn.Module):
    """An image's factor of the attention logits, in (1/e, e): mean token -> small network -> tanh -> exp.

    Choices made here: a hidden layer of a quarter of the width with GELU, and the start at factor 1 (last weights 0).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, max(dim // 4, 1))
        self.output = nn.Linear(max(dim // 4, 1), 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B 1 1 1"]:
        """Factors for mean tokens."""
        return self.output(F.gelu(self.hidden(pooled))).tanh().exp()[:, :, None, None]


class Pyramid(nn.Module):
    """Coarse features of each patch: the means of its windows of 8 x 8, 4 x 4 and 2 x 2 patches, each projected to a
    third of the width, concatenated.

    Choices made here: windows that stick out of the grid are means of what is inside, a window's patches all get its
    mean (nearest), and the result is added to the projected memory.
    """

    WINDOWS = (8, 4, 2)

    def __init__(self, memory_dim: int, dim: int) -> None:
        super().__init__()
        edges = [round(part * dim / 3) for part in range(4)]
        self.levels = nn.ModuleList(nn.Linear(memory_dim, stop - start) for start, stop in pairwise(edges))

    def forward(self, patches: Float[Tensor, "B N M"], grid: tuple[int, int]) -> Float[Tensor, "B N D"]:
        """Coarse features on the patch grid."""
        image = patches.transpose(1, 2).unflatten(-1, grid)  # B M h w
        parts = []
        for level, window in zip(self.levels, self.WINDOWS, strict=True):
            size = (min(window, grid[0]), min(window, grid[1]))
            pooled = F.avg_pool2d(image, size, ceil_mode=True)
            coarse = level(pooled.flatten(2).transpose(1, 2)).unflatten(1, pooled.shape[2:])  # B rows columns D/3
            spread = coarse.repeat_interleave(size[0], dim=1).repeat_interleave(size[1], dim=2)
            parts.append(spread[:, : grid[0], : grid[1]].flatten(1, 2))
        return torch.cat(parts, dim=-1)
