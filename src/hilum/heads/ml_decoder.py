"""ML-Decoder head: queries attend to the patch tokens of the last n blocks, and score their findings.

As it stands without options it has the form of RPIDIAL/CheXFound ("GLoRI", eval/classification/glori.py) after Ridnik
et al. 2021 "ML-Decoder" (Alibaba-MIIL/ML_Decoder): full decoding (a query for each finding), fixed random queries, one
layer, no query self-attention. Parameter names under `decoder.` are the released ones, so that its weights load
without a map. `DecoderOptions` are what ML-Decoder, the later paper and this project add.

Dropout happens exactly when masks are passed to `forward`, whatever the module's mode: prediction passes none and is
therefore deterministic. All heads of a sweep are given the same masks, so a head's course does not depend on which
others are trained beside it. Past 300 lines: one head with all its options; their parts are in `decoder_parts.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hilum.core.errors import ConfigError
from hilum.heads.decoder_parts import (
    AttentionTemperature,
    DecoderLayer,
    DropoutMasks,
    Pyramid,
    TextQueries,
    dropout_mask,
)
from hilum.heads.features import Features
from hilum.heads.positions import sincos_positions
from hilum.heads.standardise import Standardisation, fold
from hilum.heads.study_sets import mean_where

Masks = DropoutMasks | tuple[DropoutMasks, ...]
"""Of one layer, or of each."""


@dataclass(frozen=True)
class DecoderOptions:
    """What a decoder may have beyond the slides' form; the defaults are the slides'."""

    layers: int = 1
    """Decoder layers."""
    groups: int | None = None
    """Queries, each for ceil(C / queries) findings in their order (ML-Decoder's groups); None: one per finding."""
    text_dim: int = 0
    """T, width of the text vectors that queries are projected from; 0: queries of their own."""
    cls_memory: bool = False
    """Put the [CLS] of the n blocks into the memory, as one more token with a projection of its own."""
    positions: Literal["none", "sincos"] = "none"
    """Add fixed sines and cosines of a patch's place to the projected memory."""
    temperature: bool = False
    """Scale attention logits by a factor that a small network gives for each image."""
    pyramid: bool = False
    """Add coarse features of 8 x 8, 4 x 4 and 2 x 2 patches to the projected memory."""
    shared_output: bool = False
    """One output row for all findings, logit_c = w . h_c + b: the zero-shot form of ML-Decoder."""


class QueryDecoder(nn.Module):
    """Memory to one logit per finding: projection, decoder layers, a weight vector per finding."""

    def __init__(
        self,
        memory_dim: int,
        findings: int,
        dim: int,
        feed_forward: int,
        heads: int,
        learnable: bool,
        cat_cls: bool,
        options: DecoderOptions,
    ) -> None:
        super().__init__()
        self.findings, self.prefix, self.options = findings, memory_dim if cat_cls else 0, options
        queries = findings if options.groups is None else min(options.groups, findings)
        self.duplicates = -(-findings // queries)
        """Findings that a query serves."""
        self.embed_standart = nn.Linear(memory_dim, dim)  # the released files spell it so
        if not options.text_dim:
            self.query_embed = nn.Embedding(queries, dim)  # N(0, 1)
            self.query_embed.weight.requires_grad_(learnable)
        self.layers = nn.ModuleList([DecoderLayer(dim, feed_forward, heads) for _ in range(options.layers)])
        rows = 1 if options.shared_output else queries
        self.duplicate_pooling = nn.Parameter(torch.empty(rows, self.prefix + dim, self.duplicates))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(1 if options.shared_output else findings))
        nn.init.xavier_normal_(self.duplicate_pooling)
        # Options come last: what a head has without them starts from the same numbers with them.
        self.text_queries = TextQueries(findings, options.text_dim, dim, learnable) if options.text_dim else None
        self.embed_cls = nn.Linear(memory_dim, dim) if options.cls_memory else None
        self.temperature = AttentionTemperature(dim) if options.temperature else None
        self.pyramid = Pyramid(memory_dim, dim) if options.pyramid else None

    def forward(
        self,
        features: Features,
        masks: Masks | None = None,
        same: Bool[Tensor, "B B"] | None = None,
        offset: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "B C"]:
        """Logits.

        Args:
            features: with patches.
            masks: dropout.
            same: which images are one study, to read their tokens together ([CLS] before the outputs is then their
                mean); None: each image alone.
            offset: added to each image's projected tokens.
        """
        queries = self.outputs(features, masks, same, offset)
        return self._score(queries, features.cls if same is None else mean_where(same, features.cls)[0])

    def outputs(
        self,
        features: Features,
        masks: Masks | None = None,
        same: Bool[Tensor, "B B"] | None = None,
        offset: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """What each query has taken from the memory, before any finding's weights."""
        memory, sharpness = self._memory(features, same, offset)
        queries = self._queries(memory.shape[0])
        for layer, dropped in zip(self.layers, self._by_layer(masks), strict=True):
            queries = layer(queries, memory, dropped, sharpness, same)
        return queries

    def weights(
        self,
        features: Features,
        same: Bool[Tensor, "B B"] | None = None,
        offset: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "B C N"]:
        """Attention of the last layer, mean over its heads, as a distribution over the patches that were read."""
        memory, sharpness = self._memory(features, same, offset)
        queries = self._queries(memory.shape[0])
        *earlier, last = self.layers
        for layer in earlier:
            queries = layer(queries, memory, None, sharpness, same)
        assert isinstance(last, DecoderLayer)
        weights = last.weights(queries, memory, sharpness, same).mean(dim=1)  # B Q tokens
        if self.embed_cls is not None:
            weights = weights[..., : features.grid[0] * features.grid[1]]
            held = weights.sum(dim=-1, keepdim=True)  # the rest is [CLS]'s
            total = held if same is None else (same.to(held.dtype) @ held.flatten(1)).view_as(held)
            weights = weights / total
        return self.spread(weights)

    def spread(self, of_queries: Float[Tensor, "B Q _"]) -> Float[Tensor, "B C _"]:
        """Of each finding what its query has."""
        return of_queries.repeat_interleave(self.duplicates, dim=1)[:, : self.findings]

    def _by_layer(self, masks: Masks | None) -> Sequence[DropoutMasks | None]:
        if masks is None:
            return (None,) * len(self.layers)
        return (masks,) if isinstance(masks, DropoutMasks) else masks

    def _memory(
        self, features: Features, same: Tensor | None, offset: Tensor | None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B 1 1 1"] | None]:
        """Projected tokens, and the factor of the attention logits."""
        patches = features.patches
        assert patches is not None, "the decoder reads patch tokens"
        memory = F.relu(self.embed_standart(patches), inplace=True)
        sharpness = None
        if self.temperature is not None:
            pooled = memory.mean(dim=1)
            sharpness = self.temperature(pooled if same is None else mean_where(same, pooled)[0])
        if self.pyramid is not None:
            memory = memory + self.pyramid(patches, features.grid)
        if self.options.positions == "sincos":
            memory = memory + sincos_positions(features.grid, memory.shape[-1], memory.device).to(memory.dtype)
        if self.embed_cls is not None:
            memory = torch.cat([memory, F.relu(self.embed_cls(features.cls))[:, None]], dim=1)
        return memory if offset is None else memory + offset[:, None].to(memory.dtype), sharpness

    def _queries(self, batch: int) -> Float[Tensor, "B Q D"]:
        queries = self.query_embed.weight if self.text_queries is None else self.text_queries()
        return queries.expand(batch, -1, -1)

    def _score(self, queries: Float[Tensor, "B Q D"], cls: Float[Tensor, "B E"]) -> Float[Tensor, "B C"]:
        with torch.autocast(queries.device.type, enabled=False):  # logits rounded to bfloat16 would tie
            return self._logits(queries.float(), cls.float())

    def _logits(self, queries: Float[Tensor, "B Q D"], cls: Float[Tensor, "B E"]) -> Float[Tensor, "B C"]:
        weight, start = self.duplicate_pooling, self.prefix
        if self.duplicates == 1:
            rows = weight[:, start:, 0].expand(queries.shape[1], -1)
            logits = torch.einsum("bcd,cd->bc", queries, rows) + self.duplicate_pooling_bias
            return logits + F.linear(cls, weight[:, :start, 0]) if start else logits
        scores = torch.einsum("bqd,qdf->bqf", queries, weight[:, start:])
        if start:
            scores = scores + torch.einsum("be,qef->bqf", cls, weight[:, :start])
        return scores.flatten(1)[:, : self.findings] + self.duplicate_pooling_bias

    @torch.no_grad()
    def absorb(self, scaling: Standardisation) -> None:
        """Give for raw features the logits that it gives for standardised ones."""
        assert scaling.patches is not None, "the decoder was trained on patch tokens"
        fold(self.embed_standart, scaling.patches)
        if self.pyramid is not None:
            for level in self.pyramid.levels:
                assert isinstance(level, nn.Linear)
                fold(level, scaling.patches)
        if self.embed_cls is not None:
            fold(self.embed_cls, scaling.cls)
        if self.prefix:
            mean, deviation = (part.double().cpu() for part in scaling.cls)
            prefix = self.duplicate_pooling[:, : self.prefix]  # Q E duplicates
            scaled = prefix.double() / deviation[:, None]
            shift = (mean @ scaled).flatten()[: len(self.duplicate_pooling_bias)]
            self.duplicate_pooling_bias.sub_(shift.float())
            prefix.copy_(scaled.float())


class MLDecoder(nn.Module):
    """ML-Decoder on backbone features. Initialised from torch's global generator: build inside `core.seeding.forked`.

    Args:
        embed_dim: D, channels of a backbone token.
        blocks: n, how many last blocks' patch tokens are concatenated on channels into the memory (n·D).
        findings: C, outputs.
        decoder_dim: width of queries and projected memory.
        feed_forward: hidden width of the decoder's feed-forward.
        attention_heads: heads of the cross-attention; divides `decoder_dim`.
        dropout: probability of dropping, in the five places of ML-Decoder.
        learnable_queries: train the queries (or the text vectors); False keeps the random ones (the slides).
        cat_cls: put the [CLS] of the n blocks before each query's output (CheXFound `--cat-cls`).
        options: what it has beyond the slides' form.

    Raises:
        ConfigError: heads that do not divide the width, a dropout outside [0, 1), or options that do not go together.
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
        options: DecoderOptions = DecoderOptions(),
    ) -> None:
        super().__init__()
        if decoder_dim % attention_heads:
            raise ConfigError(f"decoder_dim {decoder_dim} does not divide into {attention_heads} attention heads.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected a probability in [0, 1), found {dropout}.")
        _check(options, decoder_dim)
        self.dropout, self.cat_cls = dropout, cat_cls
        self.shape = (findings, decoder_dim, feed_forward, attention_heads)
        self.decoder = QueryDecoder(
            embed_dim * blocks, findings, decoder_dim, feed_forward, attention_heads, learnable_queries, cat_cls,
            options,
        )  # fmt: skip

    @property
    def bias(self) -> nn.Parameter:
        """One per finding; a single one with `shared_output`."""
        return self.decoder.duplicate_pooling_bias

    def absorb(self, scaling: Standardisation) -> None:
        """Give for raw features the logits that it gives for standardised ones."""
        self.decoder.absorb(scaling)

    def set_text(self, vectors: Float[Tensor, "C T"]) -> None:
        """Take the text vectors of the findings, in their order.

        Raises:
            ConfigError: a decoder without text queries, or vectors of another shape.
        """
        if self.decoder.text_queries is None:
            raise ConfigError("Text vectors were given to a decoder without text queries; set text_dim, or give none.")
        self.decoder.text_queries.set(vectors)

    def draw_masks(self, features: Features, generator: torch.Generator) -> Masks | None:
        """Dropout masks for one training step on these features; None without dropout."""
        if self.dropout == 0:
            return None
        layers = tuple(self._draw_layer(features, generator) for _ in self.decoder.layers)
        return layers[0] if len(layers) == 1 else layers

    def _draw_layer(self, features: Features, generator: torch.Generator) -> DropoutMasks:
        options = self.decoder.options
        batch, tokens = len(features.cls), features.grid[0] * features.grid[1] + options.cls_memory
        findings, dim, feed_forward, heads = self.shape
        count = findings if options.groups is None else min(options.groups, findings)
        queries = (batch, count, dim)
        shapes = (queries, (batch, heads, count, tokens), queries, (batch, count, feed_forward), queries)
        return DropoutMasks(*(dropout_mask(shape, self.dropout, generator) for shape in shapes))

    def forward(self, features: Features, masks: Masks | None = None) -> Float[Tensor, "B C"]:
        """Logits, float32; with dropout exactly where and when `masks` are given."""
        return self.decoder(features, masks).float()

    def pooled(self, features: Features) -> Float[Tensor, "B C D"]:
        """What each finding's query has taken from an image, before the finding's weights; of width `decoder_dim`."""
        return self.decoder.spread(self.decoder.outputs(features)).float()

    def attention(self, features: Features) -> Float[Tensor, "B C h w"]:
        """Where each finding's query looks: weights averaged over attention heads, on the patch grid; sums to 1."""
        return self.decoder.weights(features).unflatten(-1, features.grid)


def _check(options: DecoderOptions, dim: int) -> None:
    if options.layers < 1 or (options.groups is not None and options.groups < 1):
        raise ConfigError(f"A decoder needs a layer and a query, found {options.layers}, {options.groups}.")
    if options.positions == "sincos" and dim % 4:
        raise ConfigError(f"positions=sincos: expected decoder_dim to be a multiple of 4, found {dim}.")
    if options.groups is not None and (options.text_dim or options.shared_output):
        raise ConfigError("query_groups: text queries and shared_output need a query for each finding. Leave it out.")
