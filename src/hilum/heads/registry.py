"""Which heads there are and how one is described in a file: `HeadConfig` -> module. To add a head, add a line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hilum.core.errors import ConfigError
from hilum.heads.linear import LinearHead
from hilum.heads.ml_decoder import MLDecoder

Head = LinearHead | MLDecoder


@dataclass(frozen=True)
class HeadConfig:
    """Architecture of a head on a frozen backbone; what MODEL/config.json keeps."""

    name: Literal["linear", "ml_decoder"]
    """Which head, a key of `HEADS`."""
    embed_dim: int
    """D, channels of a backbone token."""
    findings: int
    """C, outputs."""
    blocks: int = 4
    """n, last blocks whose tokens are read."""
    patch_mean: bool = False
    """Linear only: append the mean patch token of the last block."""
    decoder_dim: int = 768
    """Decoder only: width of queries and projected memory."""
    decoder_feed_forward: int = 2048
    """Decoder only: hidden width of the feed-forward."""
    decoder_heads: int = 8
    """Decoder only: heads of the cross-attention."""
    dropout: float = 0.1
    """Decoder only: probability of dropping, training only."""
    learnable_queries: bool = False
    """Decoder only: train the queries."""
    cat_cls: bool = False
    """Decoder only: put [CLS] before each query's output."""


def _linear(config: HeadConfig) -> LinearHead:
    return LinearHead(config.embed_dim, config.blocks, config.findings, config.patch_mean)


def _ml_decoder(config: HeadConfig) -> MLDecoder:
    return MLDecoder(
        config.embed_dim, config.blocks, config.findings, config.decoder_dim, config.decoder_feed_forward,
        config.decoder_heads, config.dropout, config.learnable_queries, config.cat_cls,
    )  # fmt: skip


HEADS: dict[str, Callable[[HeadConfig], Head]] = {
    "linear": _linear,
    "ml_decoder": _ml_decoder,
}


def build_head(config: HeadConfig) -> Head:
    """Make the head that a description names. Initialised from torch's global generator.

    Raises:
        ConfigError: a width, dropout or count that cannot be.
    """
    if config.findings < 1 or config.blocks < 1:
        raise ConfigError(f"A head needs at least one finding and one block, found {config.findings}, {config.blocks}.")
    return HEADS[config.name](config)
