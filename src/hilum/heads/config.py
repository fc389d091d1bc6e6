"""Settings of a head and its training; `commands/fit.py` runs them, `recipes.py` names them.

Past 300 lines: every setting says what it does, and every one that cannot be, or would do nothing, is refused here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.heads.loss_settings import LossSettings, second_stage
from hilum.heads.losses import LOSSES
from hilum.heads.protocol import RefitInit, Variant
from hilum.heads.registry import HeadConfig, HeadName
from hilum.heads.sweep import SLIDES_RATES
from hilum.heads.tune_settings import TuneSettings

SETTINGS_OF_ONE_HEAD: dict[str, tuple[str, ...]] = {
    "linear": ("patch_mean", "also_patch_mean"),
    "ml_decoder": (
        "queries", "text_vectors", "dropout", "decoder_layers", "query_groups", "cls_memory", "positions",
        "attention_temperature", "pyramid", "shared_output", "cat_cls",
    ),
    "csra": ("csra_lambda", "csra_temperatures"),
}  # fmt: skip
"""Settings of a fit that one head alone obeys; with another they are refused unless they are at their default.

The decoder's three sizes are not among them: recipes for small data set them, and may be given another head.
"""


def _differences(settings: Any, defaults: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings that are not at their default, by dotted name, with the default."""
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        value = getattr(settings, name)
        if is_dataclass(default):
            found |= _differences(value, vars(default), f"{where}{name}.")
        elif value != default:
            found[where + name] = default
    return found


def _refuse(changed: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    """Refuse the first changed setting of one of these names, or of a group if a name ends in a dot."""
    for name, default in changed.items():
        if name.startswith(names):
            raise ConfigError(f"{name} would do nothing: {why}, or leave it at {default}.")


@dataclass(frozen=True)
class FitConfig:
    """Settings of a head and its training. Defaults: the slides' ML-Decoder, its stopping epoch left to validation."""

    head: HeadName = "ml_decoder"
    """Which head."""
    views: Literal["single", "concat", "set", "attention", "memory"] = "single"
    """What a head makes of the other images of a study. single: nothing. concat (linear): [image; a partner], as on the
    slides. set (linear): own features and the means over the study's frontal, lateral and other images. attention
    (every head): logits of the study's images, weighted by learned attention. memory (ml_decoder): each query reads
    the patches of all images of the study."""
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
    queries: Literal["fixed", "learnable", "text"] = "fixed"
    """Decoder: random queries that stay (the slides), are trained, or are projected from `text_vectors`."""
    text_vectors: Path | None = None
    """Decoder with queries=text: file of one vector per finding (docs/how-to/add-findings.md)."""
    decoder_layers: int = 1
    """Decoder: layers."""
    query_groups: int | None = None
    """Decoder: queries, each for ceil(findings / queries) findings (ML-Decoder's groups); None: one per finding."""
    cls_memory: bool = False
    """Decoder: put the [CLS] of the n blocks into the memory, as one more token."""
    positions: Literal["none", "sincos"] = "none"
    """Decoder: add fixed 2-D sines and cosines of a patch's place to the memory."""
    attention_temperature: bool = False
    """Decoder: sharpen or soften attention by a factor in (1/e, e) that a small network gives for each image."""
    pyramid: bool = False
    """Decoder: add means over 8 x 8, 4 x 4 and 2 x 2 patches to the memory."""
    shared_output: bool = False
    """Decoder: one output row for all findings, which can score findings it has not seen."""
    csra_lambda: float = 0.1
    """CSRA: weight of the attended score beside the mean score."""
    csra_temperatures: tuple[float, ...] = (1.0,)
    """CSRA: one head for each temperature; 99 and more: the largest score."""
    cat_cls: bool = False
    """Decoder: put the [CLS] of the n blocks before each query's output."""
    learning_rates: tuple[float, ...] = SLIDES_RATES
    """Tried side by side."""
    also_blocks: tuple[int, ...] = ()
    """Further numbers of blocks, each tried at every rate in the same pass over the backbone."""
    also_patch_mean: bool = False
    """Linear: also try each of these with the other setting of `patch_mean`."""
    prune_after: tuple[int, ...] = ()
    """After these search epochs only the better half of what is tried goes on; empty: all go on to the end."""
    search_epochs: int = 10
    """Epochs of the search, and length of its cosine."""
    refit_epochs: int = 10
    """Length of the refit's cosine, epochs; the refit may stop before."""
    stop_epoch: int | None = None
    """Take the refit's weights after this epoch (2 in the slides); None: derived from the best search epoch."""
    refit: bool = True
    """False: the search head itself is the model; it has not seen validation, and can teach (`pseudo_labels`)."""
    refit_init: RefitInit = "cold"
    """cold: the refit starts from the initial weights; warm: from the search head, as the released code does."""
    loss: str = "masked_bce_sum"
    """A key of `hilum.heads.losses.LOSSES`."""
    losses: LossSettings = field(default_factory=LossSettings)
    """Settings of whichever loss `loss` names; those of the others are not read, and a fit refuses them."""
    deferred: float = 1.0
    """From this share of the search's epochs on the loss weighs findings by rarity (LDAM-DRW). If the chosen epoch is
    one of these, so does the refit, after as many steps or in its last epoch; what follows (`classifier_epochs`,
    `tune`) does from its start. 1: never."""
    hierarchy: bool = False
    """Fill unknown findings from parents and children alone (training and validation labels): a rib fracture is a
    fracture, and without a fracture there is none of a rib. Normal says nothing of other findings here."""
    batch_size: int = 256
    """Images a step; also of validation and prediction."""
    standardise: bool = False
    """Train on features of mean 0 and deviation 1 per channel (over training images), folded into the saved head."""
    prior_bias: bool = False
    """Start biases from the log-odds of each finding in the training images instead of 0."""
    weight_decay: float = 1e-4
    """AdamW, on every parameter of the head."""
    ema: float = 0.0
    """Decay per step of a running mean of the weights, which is what is judged and kept; 0: the weights themselves."""
    consistency: float = 0.0
    """Weight of the difference between the predictions of the images of one study; batches then hold whole studies."""
    classifier_epochs: int = 0
    """After the search and the refit, so many epochs more for the classifier alone, images drawn class-aware
    (Kang 2020, "Decoupling"); 0: none. The number of epochs before is then fixed, not chosen."""
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
    kept_channels: int | None = None
    """Decoder: keep so many principal directions of a patch token, in 8 bits, in place of the token; the head that is
    saved reads whole tokens again. None: tokens as they are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products, in training and prediction; weights and losses are float32."""
    flip_average: bool = False
    """Predict the mean over an image and its mirror image."""
    study: str = "mean"
    """Rule for the images of a study: mean, logit_mean, frontal_then_rest, frontal_weighted:0.8, or learned, whose
    weights by kind of view are fitted on validation (docs/reference/predictions.md)."""
    normal_damping: str = ""
    """power:0.5 or linear:0.5: hold abnormal findings down by the Normal score; empty: not."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    """Train the backbone too, after the head has converged; off by default."""
    findings: tuple[str, ...] | None = None
    """Which findings of the store, in this order; None: all."""
    datasets: tuple[str, ...] | None = None
    """Learn from images of these datasets alone; None: all of the store. Findings that a dataset does not annotate are
    unknown in its images, and train nothing."""
    target: str | None = None
    """The dataset that is predicted for: selection and calibration see its validation images alone, and the refit
    learns from them besides; None: those of all datasets that are learned from."""
    source_weights: tuple[str, ...] = ()
    """How much an image of a dataset counts in the loss, as in chexpert=0.5; others count 1."""
    source_bias: bool = False
    """In training, images of other datasets than the target have a bias of their own for every finding."""
    pseudo_labels: Path | None = None
    """A MODEL whose probabilities stand in for unknown labels of training images; one that has not seen validation
    (`refit=false`)."""
    pseudo_weight: float = 0.5
    """How much such an entry counts."""
    pseudo_certainty: float = 0.0
    """Entries count only where the teacher's probability is at least this far from 0.5, of 0.5 at most."""
    train_images: int | None = None
    """Learn from at most so many images, drawn by patient, in whole studies."""
    val_images: int | None = None
    """Select, calibrate and refit with at most so many validation images."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice. Another number changes results in the last bits."""
    workers: int = 2
    """Threads that read images; 0: one, as 1."""
    seed: int = 0
    """Root of every random stream."""

    def __post_init__(self) -> None:
        for name in (
            "blocks", "search_epochs", "refit_epochs", "batch_size", "decoder_dim", "decoder_feed_forward",
            "decoder_heads", "resolution", "threads", "train_images", "val_images", "kept_channels",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}.")
        for name in ("augmented_views", "weight_decay", "workers", "consistency", "classifier_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}.")
        if self.decoder_dim % self.decoder_heads:
            raise ConfigError(
                f"decoder_dim: expected a multiple of {self.decoder_heads} heads, found {self.decoder_dim}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected a probability in [0, 1), found {self.dropout}.")
        if self.kept_channels is not None and (
            self.head != "ml_decoder" or self.cat_cls or self.cls_memory or self.pyramid or self.also_blocks
            or self.views == "attention"
        ):  # fmt: skip
            raise ConfigError(
                "kept_channels: goes with a decoder that reads patch tokens alone, of one number of blocks; found "
                f"head {self.head}, views {self.views}, cat_cls {self.cat_cls}, cls_memory {self.cls_memory}, pyramid "
                f"{self.pyramid}, also_blocks {list(self.also_blocks)}."
            )
        rates = self.learning_rates
        if not rates or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise ConfigError(f"learning_rates: expected one or more, positive and all different, found {list(rates)}.")
        if self.stop_epoch is not None and not 1 <= self.stop_epoch <= self.refit_epochs:
            raise ConfigError(f"stop_epoch: expected 1 to refit_epochs = {self.refit_epochs}, found {self.stop_epoch}.")
        if any(blocks < 1 for blocks in self.also_blocks) or not 0 <= self.ema < 1:
            raise ConfigError(
                f"also_blocks {list(self.also_blocks)} and ema {self.ema}: expected 1 or more, a decay in [0, 1)."
            )
        if not 0 <= self.pseudo_weight <= 1 or not 0 <= self.pseudo_certainty <= 0.5:
            raise ConfigError(
                f"pseudo_weight {self.pseudo_weight} and pseudo_certainty {self.pseudo_certainty}: expected a weight "
                "in [0, 1] and a distance in [0, 0.5]."
            )
        if any(not 1 <= epoch < self.search_epochs for epoch in self.prune_after):
            raise ConfigError(
                f"prune_after: expected epochs before the last of {self.search_epochs}, found {list(self.prune_after)}."
            )
        if self.classifier_epochs and (self.refit_init == "warm" or self.stop_epoch is not None):
            raise ConfigError("classifier_epochs goes with neither refit_init=warm nor stop_epoch.")
        if not 0 <= self.sampling_power <= 2:
            raise ConfigError(f"sampling_power: expected 0 to 2, found {self.sampling_power}.")
        if self.loss not in LOSSES:
            raise UnknownNameError("loss", self.loss, LOSSES)
        if self.losses.name not in (LossSettings().name, self.loss):
            raise ConfigError("losses.name: name the loss by `loss`.")
        if not 0 <= self.deferred <= 1:
            raise ConfigError(f"deferred: expected a share in [0, 1], found {self.deferred}.")
        if self.deferred < 1:
            second_stage(self.describe_loss())  # refuses losses that have none
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1 or not 0 <= self.flip <= 1:
            raise ConfigError(f"crop_scale {self.crop_scale} and flip {self.flip}: expected shares between 0 and 1.")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Settings that would do nothing, or undo each other."""
        changed, method = self._changed(), self.tune.method
        for owner, names in SETTINGS_OF_ONE_HEAD.items():
            for name in names:
                if name in changed and self.head != owner:
                    raise ConfigError(
                        f"{name}: of the head {owner} alone, which {self.head} would ignore. Leave it at "
                        f"{changed[name]}, or say head={owner}."
                    )
        begins = self.deferred_from
        for names, idle, why in (
            (("sampling_power", "sampling_over"), self.sampling == "natural" and not self.classifier_epochs,
             "sampling=natural draws every image alike. Say sampling=class_aware"),
            (("cache_dtype",), not self.augmented_views,
             "augmented_views=0 keeps no view in memory. Say augmented_views=K"),
            (("pseudo_weight", "pseudo_certainty"), self.pseudo_labels is None,
             "there are no pseudo-labels. Say pseudo_labels=MODEL"),
            (("prune_after",), len(self.variants()) < 2, "a single head is tried. Say several learning_rates"),
            (("deferred",), begins == self.search_epochs and method == "none" and not self.classifier_epochs,
             f"it begins after epoch {begins} of {self.search_epochs}. Say a smaller share"),
            (("tune.",), method == "none", "tune.method=none trains no backbone. Say tune.method=lora, blocks or full"),
            (("tune.rank", "tune.alpha", "tune.dropout"), method != "lora",
             f"tune.method={method} makes no low-rank updates. Say tune.method=lora"),
            (("tune.blocks",), method != "blocks", f"tune.method={method} does not read it. Say tune.method=blocks"),
        ):  # fmt: skip
            if idle:
                _refuse(changed, names, why)
        if self.tune.method != "none" and (self.ema or self.source_bias or self.classifier_epochs):
            raise ConfigError(
                f"tune.method={self.tune.method} goes with none of ema, source_bias and classifier_epochs: tuning "
                "moves the whole head once more, without them."
            )
        if self.consistency and self.views in ("attention", "memory"):
            raise ConfigError(
                f"consistency: with views={self.views} all images of a study have one answer, and agree. Leave it out."
            )
        if begins is not None and self.stop_epoch is not None and self.stop_epoch <= begins:
            raise ConfigError(
                f"deferred={self.deferred:g} begins after epoch {begins} of {self.search_epochs}, "
                f"stop_epoch={self.stop_epoch} ends before it. Leave out one of both."
            )

    def refuse_unread_losses(self) -> None:
        """Refuse settings of losses that a fit by this one would not read.

        Not among the checks above: `hilum extend` takes up the settings of a model, and may change the loss.

        Raises:
            ConfigError: a setting of another loss, or a reduction other than the one in the loss's name.
        """
        changed = self._changed()
        read = (self.loss, "class_balanced") if self.loss == "ldam" else (self.loss,)  # weights of its second stage
        unread = tuple(f"losses.{name}." for name in LOSSES if name not in read)
        _refuse(changed, unread, f"loss={self.loss} does not read it. Name the loss that does")
        if self.describe_loss().reduced != self.losses.reduction:
            why = f"loss={self.loss} is reduced as it is called. Say loss=masked_bce_mean"
            _refuse(changed, ("losses.reduction",), why)

    def _changed(self) -> dict[str, Any]:
        """Settings that are not at their default, by name, with the default."""
        return _differences(self, {
            one.name: one.default_factory() if callable(one.default_factory) else one.default for one in fields(self)
        })  # fmt: skip

    @property
    def deferred_from(self) -> int | None:
        """Epochs of the search before the second stage of the loss; None: it has none."""
        if self.deferred == 1:
            return None
        return next(number for number in range(self.search_epochs + 1) if number / self.search_epochs >= self.deferred)

    @property
    def needs_studies(self) -> bool:
        """Whether batches have to hold whole studies."""
        return self.views != "single" or self.consistency > 0

    def describe_loss(self) -> LossSettings:
        """The loss by name with its settings."""
        return replace(self.losses, name=self.loss)

    def variants(self) -> tuple[Variant, ...]:
        """All that the search tries."""
        blocks = dict.fromkeys((self.blocks, *self.also_blocks))
        means = (self.patch_mean, not self.patch_mean) if self.also_patch_mean else (self.patch_mean,)
        return tuple(Variant(rate, n, mean) for n in blocks for mean in means for rate in self.learning_rates)

    def describe_searched_head(self, embed_dim: int, findings: int, variant: Variant, text_dim: int = 0) -> HeadConfig:
        """The head as it is trained: on reduced tokens where those are kept, else as `describe_head`."""
        whole = self.describe_head(embed_dim, findings, variant, text_dim)
        return whole if self.kept_channels is None else replace(whole, embed_dim=self.kept_channels, blocks=1)

    def describe_head(
        self, embed_dim: int, findings: int, variant: Variant | None = None, text_dim: int = 0
    ) -> HeadConfig:
        """The head on a backbone of that width; of a variant, or as the settings name it."""
        chosen = variant or Variant(self.learning_rates[0], self.blocks, self.patch_mean)
        return HeadConfig(
            self.head, embed_dim, findings, chosen.blocks, chosen.patch_mean, self.decoder_dim,
            self.decoder_feed_forward, self.decoder_heads, self.dropout, self.queries == "learnable", self.cat_cls,
            views=self.views, decoder_layers=self.decoder_layers, query_groups=self.query_groups,
            cls_memory=self.cls_memory, text_dim=text_dim, positions=self.positions,
            attention_temperature=self.attention_temperature, pyramid=self.pyramid, shared_output=self.shared_output,
            csra_lambda=self.csra_lambda, csra_temperatures=self.csra_temperatures,
        )  # fmt: skip
