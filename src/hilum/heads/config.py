"""Settings of a head and its training; `commands/fit.py` runs them, `recipes.py` names them."""

import math
from dataclasses import dataclass
from typing import Literal

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.heads.losses import LOSSES
from hilum.heads.protocol import RefitInit
from hilum.heads.registry import HeadConfig
from hilum.heads.sweep import SLIDES_RATES


@dataclass(frozen=True)
class FitConfig:
    """Settings of a head and its training. Defaults: the slides' ML-Decoder, its stopping epoch left to validation."""

    head: Literal["linear", "ml_decoder"] = "ml_decoder"
    """Which head."""
    resolution: int | None = None
    """Side of the square images, pixels; None: the backbone's own."""
    blocks: int = 4
    """n, last blocks of the backbone whose tokens the head reads."""
    patch_mean: bool = False
    """Linear: append the mean patch token of the last block."""
    decoder_dim: int = 768
    """Decoder: width of queries and projected memory."""
    decoder_feed_forward: int = 2048
    """Decoder: hidden width of the feed-forward."""
    decoder_heads: int = 8
    """Decoder: attention heads; divides `decoder_dim`."""
    dropout: float = 0.1
    """Decoder: probability of dropping while training."""
    queries: Literal["fixed", "learnable"] = "fixed"
    """Decoder: random queries that stay (the slides), or are trained."""
    cat_cls: bool = False
    """Decoder: put the [CLS] of the n blocks before each query's output."""
    learning_rates: tuple[float, ...] = SLIDES_RATES
    """Tried side by side."""
    search_epochs: int = 10
    """Epochs of the search, and length of its cosine."""
    refit_epochs: int = 10
    """Length of the refit's cosine, epochs; the refit may stop before."""
    stop_epoch: int | None = None
    """Take the refit's weights after this epoch (2 in the slides); None: derived from the best search epoch."""
    refit_init: RefitInit = "cold"
    """cold: the refit starts from the initial weights; warm: from the search head, as the released code does."""
    loss: str = "masked_bce_sum"
    """A key of `hilum.heads.losses.LOSSES`."""
    batch_size: int = 256
    """Images a step; also of validation and prediction."""
    standardise: bool = False
    """Train on features of mean 0 and deviation 1 per channel (over training images), folded into the saved head."""
    prior_bias: bool = False
    """Start biases from the log-odds of each finding in the training images instead of 0."""
    weight_decay: float = 1e-4
    """AdamW, on every parameter of the head."""
    sampling: Literal["natural", "class_aware"] = "natural"
    """natural: every training image once an epoch. class_aware: images of rare findings more often, others less."""
    sampling_power: float = 0.5
    """Class-aware: an image's weight is 1 / frequency^power; 0 is as natural, 1 gives rare findings most."""
    sampling_over: Literal["max", "mean"] = "max"
    """Class-aware: over the positive findings of an image, the rarest counts, or their mean."""
    crop_scale: tuple[float, float] = (0.75, 1.0)
    """Share of the image that a training crop keeps."""
    flip: float = 0.5
    """Probability of a horizontal flip in training; 0 keeps laterality."""
    augmented_views: int = 0
    """K views of each image are kept in memory and used in turn; 0: a new view every epoch, features recomputed."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """What the views kept in memory are stored as."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products, in training and prediction; weights and losses are float32."""
    flip_average: bool = False
    """Predict the mean over an image and its mirror image."""
    findings: tuple[str, ...] | None = None
    """Which findings of the store, in this order; None: all."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice. Another number changes results in the last bits."""
    workers: int = 2
    """Threads that read images; 0: one, as 1."""
    seed: int = 0
    """Root of every random stream."""

    def __post_init__(self) -> None:
        for name in (
            "blocks", "search_epochs", "refit_epochs", "batch_size", "decoder_dim", "decoder_feed_forward",
            "decoder_heads", "resolution", "threads",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}.")
        for name in ("augmented_views", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}.")
        if self.decoder_dim % self.decoder_heads:
            raise ConfigError(
                f"decoder_dim: expected a multiple of {self.decoder_heads} heads, found {self.decoder_dim}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected a probability in [0, 1), found {self.dropout}.")
        rates = self.learning_rates
        if not rates or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise ConfigError(f"learning_rates: expected one or more, positive and all different, found {list(rates)}.")
        if self.stop_epoch is not None and not 1 <= self.stop_epoch <= self.refit_epochs:
            raise ConfigError(f"stop_epoch: expected 1 to refit_epochs = {self.refit_epochs}, found {self.stop_epoch}.")
        if not 0 <= self.sampling_power <= 2:
            raise ConfigError(f"sampling_power: expected 0 to 2, found {self.sampling_power}.")
        if self.loss not in LOSSES:
            raise UnknownNameError("loss", self.loss, LOSSES)
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1 or not 0 <= self.flip <= 1:
            raise ConfigError(f"crop_scale {self.crop_scale} and flip {self.flip}: expected shares between 0 and 1.")

    def describe_head(self, embed_dim: int, findings: int) -> HeadConfig:
        """The head on a backbone of that width."""
        return HeadConfig(
            self.head, embed_dim, findings, self.blocks, self.patch_mean, self.decoder_dim, self.decoder_feed_forward,
            self.decoder_heads, self.dropout, self.queries == "learnable", self.cat_cls,
        )  # fmt: skip
