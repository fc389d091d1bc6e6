"""ML-Decoder head: one query per finding attends to the patch tokens of the last n blocks, and scores its finding.

The form of RPIDIAL/CheXFound ("GLoRI", eval/classification/glori.py) after Ridnik et al. 2021 "ML-Decoder"
(Alibaba-MIIL/ML_Decoder): full decoding (a query for each finding), fixed random queries, one layer, no query
self-attention. Parameter names under `decoder.` are the released ones, so that its weights load without a map.

Dropout happens exactly when masks are passed to `forward`, whatever the module's mode: prediction passes none and is
therefore deterministic. All heads of a sweep are given the same masks, so a head's course does not depend on which
others are trained beside it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hilum.core.errors import ConfigError
from hilum.heads.features import Features
from hilum.heads.standardise import Standardisation, fold


class DropoutMasks(NamedTuple):
    """Factors for the five places with dropout: 0 where dropped, else 1 / P(kept)."""

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
    """Multi-head attention from queries to a memory; parameters named as `nn.MultiheadAttention` has them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, queries: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"], mask: Tensor | None = None
    ) -> Float[Tensor, "B Q D"]:
        """Attend; with a dropout mask on the weights, or through the fused kernel without."""
        query, key, value = self._project(queries, memory)
        if mask is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            attended = (self._weights(query, key) * mask).to(value.dtype) @ value  # B A Q d
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def weights(self, queries: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"]) -> Float[Tensor, "B A Q N"]:
        """Attention weights of each head; each row sums to 1."""
        query, key, _ = self._project(queries, memory)
        return self._weights(query, key)

    def _project(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B L D -> B A L d
            for tokens, weight, bias in zip((queries, memory, memory), weights, biases, strict=True)
        )
        return query, key, value

    @staticmethod
    def _weights(query: Float[Tensor, "B A Q d"], key: Float[Tensor, "B A N d"]) -> Float[Tensor, "B A Q N"]:
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)


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
        self, queries: Float[Tensor, "B Q D"], memory: Float[Tensor, "B N D"], masks: DropoutMasks | None = None
    ) -> Float[Tensor, "B Q D"]:
        """One decoding step."""
        first, attention, second, hidden, third = masks or (None, None, None, None, None)
        queries = self.norm1(_add(queries, queries, first))
        queries = self.norm2(_add(queries, self.multihead_attn(queries, memory, attention), second))
        inner = F.relu(self.linear1(queries), inplace=True)
        inner = inner if hidden is None else inner * hidden
        return self.norm3(_add(queries, self.linear2(inner), third))


def _add(queries: Tensor, update: Tensor, mask: Tensor | None) -> Tensor:
    """A residual step, with dropout on the update where a mask is given."""
    return queries + update if mask is None else torch.addcmul(queries, update.to(queries.dtype), mask)


class QueryDecoder(nn.Module):
    """Memory to one logit per finding: projection, one decoder layer, a weight vector per finding."""

    def __init__(
        self, memory_dim: int, prefix_dim: int, findings: int, dim: int, feed_forward: int, heads: int, learnable: bool
    ) -> None:
        super().__init__()
        self.embed_standart = nn.Linear(memory_dim, dim)  # the released files spell it so
        self.query_embed = nn.Embedding(findings, dim)  # N(0, 1)
        self.query_embed.weight.requires_grad_(learnable)
        self.layers = nn.ModuleList([DecoderLayer(dim, feed_forward, heads)])
        self.duplicate_pooling = nn.Parameter(torch.empty(findings, prefix_dim + dim, 1))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(findings))
        nn.init.xavier_normal_(self.duplicate_pooling)

    def forward(
        self,
        memory: Float[Tensor, "B N M"],
        prefix: Float[Tensor, "B E"] | None = None,
        masks: DropoutMasks | None = None,
    ) -> Float[Tensor, "B C"]:
        """Logits; `prefix` is put before what each query has gathered."""
        queries = self._layer(self._queries(memory), self._memory(memory), masks)  # B C D
        weight = self.duplicate_pooling[:, :, 0]
        start = 0 if prefix is None else prefix.shape[1]
        logits = torch.einsum("bcd,cd->bc", queries, weight[:, start:].to(queries.dtype)) + self.duplicate_pooling_bias
        return logits if prefix is None else logits + F.linear(prefix, weight[:, :start])

    def weights(self, memory: Float[Tensor, "B N M"]) -> Float[Tensor, "B A C N"]:
        """Attention weights of each head."""
        layer, queries = self._layer, self._queries(memory)
        return layer.multihead_attn.weights(layer.norm1(queries + queries), self._memory(memory))

    @property
    def _layer(self) -> DecoderLayer:
        [layer] = self.layers
        assert isinstance(layer, DecoderLayer)
        return layer

    def _memory(self, memory: Tensor) -> Tensor:
        return F.relu(self.embed_standart(memory), inplace=True)

    def _queries(self, memory: Tensor) -> Tensor:
        return self.query_embed.weight.expand(memory.shape[0], -1, -1)


class MLDecoder(nn.Module):
    """ML-Decoder on backbone features. Initialised from torch's global generator: build inside `core.seeding.forked`.

    Args:
        embed_dim: D, channels of a backbone token.
        blocks: n, how many last blocks' patch tokens are concatenated on channels into the memory (n·D).
        findings: C, outputs and queries.
        decoder_dim: width of queries and projected memory.
        feed_forward: hidden width of the decoder's feed-forward.
        attention_heads: heads of the cross-attention; divides `decoder_dim`.
        dropout: probability of dropping, in the five places of ML-Decoder.
        learnable_queries: train the queries; False keeps the random ones (the slides).
        cat_cls: put the [CLS] of the n blocks before each query's output (CheXFound `--cat-cls`).

    Raises:
        ConfigError: heads that do not divide the width, or a dropout outside [0, 1).
    """

    needs_patches = True
    needs_studies = False

    def __init__(
        self,
        embed_dim: int,
        blocks: int,
        findings: int,
        decoder_dim: int = 768,
        feed_forward: int = 2048,
        attention_heads: int = 8,
        dropout: float = 0.1,
        learnable_queries: bool = False,
        cat_cls: bool = False,
    ) -> None:
        super().__init__()
        if decoder_dim % attention_heads:
            raise ConfigError(f"decoder_dim {decoder_dim} does not divide into {attention_heads} attention heads.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected a probability in [0, 1), found {dropout}.")
        self.dropout, self.cat_cls = dropout, cat_cls
        self.shape = (findings, decoder_dim, feed_forward, attention_heads)
        memory_dim = embed_dim * blocks
        self.decoder = QueryDecoder(
            memory_dim, memory_dim if cat_cls else 0, findings, decoder_dim, feed_forward, attention_heads,
            learnable_queries,
        )  # fmt: skip

    @property
    def bias(self) -> nn.Parameter:
        """One per finding."""
        return self.decoder.duplicate_pooling_bias

    @torch.no_grad()
    def absorb(self, scaling: Standardisation) -> None:
        """Give for raw features the logits that it gives for standardised ones."""
        assert scaling.patches is not None, "the decoder was trained on patch tokens"
        fold(self.decoder.embed_standart, scaling.patches)
        if self.cat_cls:
            mean, deviation = (part.double().cpu() for part in scaling.cls)
            prefix = self.decoder.duplicate_pooling[:, : len(mean), 0]  # C E
            scaled = prefix.double() / deviation
            self.bias.sub_((scaled @ mean).float())
            prefix.copy_(scaled.float())

    def draw_masks(self, features: Features, generator: torch.Generator) -> DropoutMasks | None:
        """Dropout masks for one training step on these features; None without dropout."""
        batch, tokens = len(features.cls), features.grid[0] * features.grid[1]
        if self.dropout == 0:
            return None
        findings, dim, feed_forward, heads = self.shape
        queries = (batch, findings, dim)
        shapes = (queries, (batch, heads, findings, tokens), queries, (batch, findings, feed_forward), queries)
        return DropoutMasks(*(dropout_mask(shape, self.dropout, generator) for shape in shapes))

    def forward(self, features: Features, masks: DropoutMasks | None = None) -> Float[Tensor, "B C"]:
        """Logits, float32; with dropout exactly where and when `masks` are given."""
        assert features.patches is not None, "the decoder reads patch tokens"
        return self.decoder(features.patches, features.cls if self.cat_cls else None, masks).float()

    def attention(self, features: Features) -> Float[Tensor, "B C h w"]:
        """Where each finding's query looks: weights averaged over attention heads, on the patch grid; sums to 1."""
        assert features.patches is not None, "the decoder reads patch tokens"
        return self.decoder.weights(features.patches).mean(dim=1).unflatten(-1, features.grid)
