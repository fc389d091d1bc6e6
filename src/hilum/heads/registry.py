"""Which heads there are and how one is described in a file: `HeadConfig` -> module. To add a head, add a line."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hilum.core.errors import ConfigError
from hilum.core.meta import without_weights
from hilum.heads.csra import CSRAHead
from hilum.heads.linear import LinearHead
from hilum.heads.ml_decoder import DecoderOptions, MLDecoder
from hilum.heads.multiview import MultiViewDecoder
from hilum.heads.view_attention import ViewAttention

Head = LinearHead | MLDecoder | CSRAHead | ViewAttention
HeadName = Literal["linear", "ml_decoder", "csra"]
"""A key of `HEADS`, as descriptions and settings spell it."""


@dataclass(frozen=True)
class HeadConfig:
    """Architecture of a head on a frozen backbone; what MODEL/config.json keeps."""

    name: HeadName
    """Which head."""
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
    """Decoder only: train the queries (or the text vectors)."""
    cat_cls: bool = False
    """Decoder only: put [CLS] before each query's output."""
    views: Literal["single", "concat", "set", "attention", "memory"] = "single"
    """What is made of the other images of a study, one of `VIEWS_OF_HEADS` for this head."""
    decoder_layers: int = 1
    """Decoder only: layers."""
    query_groups: int | None = None
    """Decoder only: queries, each for ceil(findings / queries) findings; None: one per finding."""
    text_dim: int = 0
    """Decoder only: width of the text vectors that queries are projected from; 0: queries of their own."""
    cls_memory: bool = False
    """Decoder only: [CLS] as one more token of the memory."""
    positions: Literal["none", "sincos"] = "none"
    """Decoder only: fixed positions added to the memory."""
    attention_temperature: bool = False
    """Decoder only: a factor of the attention logits for each image."""
    pyramid: bool = False
    """Decoder only: coarse features added to the memory."""
    shared_output: bool = False
    """Decoder only: one output row for all findings."""
    csra_lambda: float = 0.1
    """CSRA only: weight of the attended score."""
    csra_temperatures: tuple[float, ...] = (1.0,)
    """CSRA only: one head for each."""


VIEWS_OF_HEADS: dict[str, tuple[str, ...]] = {
    "linear": ("single", "concat", "set", "attention"),
    "ml_decoder": ("single", "memory", "attention"),
    "csra": ("single", "attention"),
}
"""Which settings of `views` each head obeys. Any other is refused: nothing ever ignores the other views in silence."""

SETTINGS_OF_HEADS: dict[str, tuple[str, ...]] = {
    "ml_decoder": (
        "decoder_layers", "query_groups", "text_dim", "cls_memory", "positions", "attention_temperature", "pyramid",
        "shared_output",
    ),
    "csra": ("csra_lambda", "csra_temperatures"),
}  # fmt: skip
"""Settings that one head alone obeys; with another head they are refused unless they are at their default."""


def _linear(config: HeadConfig) -> LinearHead:
    views = "single" if config.views == "attention" else config.views
    assert views != "memory"
    return LinearHead(config.embed_dim, config.blocks, config.findings, config.patch_mean, views)


def _ml_decoder(config: HeadConfig) -> MLDecoder:
    options = DecoderOptions(
        layers=config.decoder_layers, groups=config.query_groups, text_dim=config.text_dim,
        cls_memory=config.cls_memory, positions=config.positions, temperature=config.attention_temperature,
        pyramid=config.pyramid, shared_output=config.shared_output,
    )  # fmt: skip
    kind = MultiViewDecoder if config.views == "memory" else MLDecoder
    return kind(
        config.embed_dim, config.blocks, config.findings, decoder_dim=config.decoder_dim,
        feed_forward=config.decoder_feed_forward, attention_heads=config.decoder_heads, dropout=config.dropout,
        learnable_queries=config.learnable_queries, cat_cls=config.cat_cls, options=options,
    )  # fmt: skip


def _csra(config: HeadConfig) -> CSRAHead:
    return CSRAHead(config.embed_dim, config.blocks, config.findings, config.csra_lambda, config.csra_temperatures)


HEADS: dict[HeadName, Callable[[HeadConfig], LinearHead | MLDecoder | CSRAHead]] = {
    "linear": _linear,
    "ml_decoder": _ml_decoder,
    "csra": _csra,
}


def build_head(config: HeadConfig, text: Float[Tensor, "C T"] | None = None) -> Head:
    """Make the head that a description names. Initialised from torch's global generator.

    Args:
        config: what to build.
        text: vectors of the findings where `text_dim` is set; may be left out where weights are loaded afterwards.

    Raises:
        ConfigError: a width, dropout or count that cannot be, settings that do not go together, other text vectors.
    """
    if config.findings < 1 or config.blocks < 1:
        raise ConfigError(f"A head needs at least one finding and one block, found {config.findings}, {config.blocks}.")
    if config.views not in VIEWS_OF_HEADS[config.name]:
        raise ConfigError(
            f"views={config.views}: the head {config.name} would not read the other views. Expected one of "
            f"{', '.join(VIEWS_OF_HEADS[config.name])}."
        )
    defaults = {one.name: one.default for one in fields(HeadConfig)}
    for owner, names in SETTINGS_OF_HEADS.items():
        for name in names:
            if config.name != owner and getattr(config, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(config, name)}: a setting of the head {owner}, which {config.name} would ignore. "
                    f"Leave it out, or choose head={owner}."
                )
    if config.views == "attention" and config.shared_output:
        raise ConfigError("views=attention weighs views for each finding; shared_output knows no finding. Choose one.")
    head = HEADS[config.name](config)
    if text is not None:
        if not isinstance(head, MLDecoder):
            raise ConfigError(f"Text vectors were given to the head {config.name}; only ml_decoder reads them.")
        head.set_text(text)
    if config.views == "attention":
        return ViewAttention(head, config.embed_dim * config.blocks, config.findings)
    return head


def on_meta(config: HeadConfig) -> Head:
    """A head without weights, to be asked for its shapes or to be given some."""
    with without_weights():
        return build_head(config)
