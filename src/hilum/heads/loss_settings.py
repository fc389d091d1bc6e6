"""Settings of the supervised losses: a name and, for each loss that has any, a group of its own.

Defaults are those of the papers (or of their released configurations, where said); `heads/losses.py` has the equations.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from hilum.core.errors import ConfigError


@dataclass(frozen=True)
class AsymmetricSettings:
    """Asymmetric loss (Ridnik 2021, arXiv 2009.14119)."""

    gamma_negative: float = 4.0
    """Focusing of negatives, 0 or at least 1: a negative of probability p counts p_m^gamma."""
    gamma_positive: float = 0.0
    """Focusing of positives, 0 or more: a positive of probability p counts (1 - p)^gamma."""
    clip: float = 0.05
    """m, in [0, 1): p_m = max(p - m, 0), so that negatives below m cost nothing and have no gradient."""
    detach_focus: bool = False
    """Take no gradient through the two focusing factors, as an option of the released code does."""

    def __post_init__(self) -> None:
        # A power between 0 and 1 of p_m has an infinite slope where p = m.
        if not (self.gamma_negative == 0 or 1 <= self.gamma_negative < math.inf):
            raise ConfigError(f"gamma_negative: expected 0, or 1 or more, found {self.gamma_negative}.")
        _require_range("gamma_positive", self.gamma_positive, 0, math.inf)
        _require_range("clip", self.clip, 0, 1)


@dataclass(frozen=True)
class FocalSettings:
    """Focal loss (Lin 2017, arXiv 1708.02002, equation 5)."""

    gamma: float = 2.0
    """Focusing, 0 or more: an entry counts (1 - p_t)^gamma, p_t being the probability of its label."""
    alpha: float | None = 0.25
    """Weight of positives, 1 - alpha that of negatives; None: both 1."""

    def __post_init__(self) -> None:
        _require_range("gamma", self.gamma, 0, math.inf)
        if self.alpha is not None:
            _require_range("alpha", self.alpha, 0, 1)


@dataclass(frozen=True)
class ClassBalancedSettings:
    """Weights by the effective number of images (Cui 2019, arXiv 1901.05555)."""

    beta: float = 0.9999
    """In [0, 1): 0 weighs all alike, towards 1 an image counts 1 / (number of its kind)."""
    over: Literal["labels", "findings"] = "labels"
    """labels: present and absent are the two classes of each finding, their weights sum to 2. findings: findings are
    the classes, by their positives; both labels of a finding weigh the same, 1 on average over findings."""
    gamma: float = 0.0
    """Focal factor (1 - p_t)^gamma beside the weights; 0 is cross-entropy."""

    def __post_init__(self) -> None:
        _require_range("beta", self.beta, 0, 1)
        _require_range("gamma", self.gamma, 0, math.inf)


@dataclass(frozen=True)
class DistributionBalancedSettings:
    """Distribution-balanced loss (Wu 2020, arXiv 2007.09654); defaults of the released COCO-MLT configuration."""

    alpha: float = 0.1
    """Smallest weight of an entry."""
    beta: float = 10.0
    """Steepness of the smoothing of weights."""
    mu: float = 0.2
    """Where the smoothing is centred; 0.3 for VOC-MLT in the paper."""
    negative_scale: float = 2.0
    """lambda, above 0: negatives are scored on a logit so many times steeper, at 1 / lambda of the weight."""
    bias: float = 0.05
    """kappa: the logit of a finding is lowered by kappa times its log-odds of being absent."""
    gamma: float = 0.0
    """Focal factor (1 - p_t)^gamma; 0 is the equation of the paper, 2 the released configuration (which doubles the
    loss as well)."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "mu", "bias", "gamma"):
            _require_range(name, getattr(self, name), 0, math.inf)
        if not 0 < self.negative_scale < math.inf:
            raise ConfigError(f"negative_scale: expected more than 0, found {self.negative_scale}.")


@dataclass(frozen=True)
class LdamSettings:
    """Margins by label distribution (Cao 2019, arXiv 1906.07413), each finding a problem of two classes."""

    max_margin: float = 0.5
    """Margin of the rarest of all labels, in logits; others have (rarest / count)^(1/4) of it."""
    scale: float = 1.0
    """Logits less margins are multiplied by this. 30 in the paper, whose logits are cosines; those of heads are not."""
    reweight: bool = False
    """Weigh entries as `class_balanced` says: the second stage of deferred re-weighting (`second_stage`)."""

    def __post_init__(self) -> None:
        _require_range("max_margin", self.max_margin, 0, math.inf)
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale: expected more than 0, found {self.scale}.")


@dataclass(frozen=True)
class LogitAdjustedSettings:
    """Logit adjustment (Menon 2021, arXiv 2007.07314, equation 10) for two classes a finding."""

    tau: float = 1.0
    """The log-odds of a finding in training, times this, are added to its logit in the loss; 0 is cross-entropy."""

    def __post_init__(self) -> None:
        _require_range("tau", self.tau, 0, math.inf)


@dataclass(frozen=True)
class LossSettings:
    """Which supervised loss, and the settings of each. Only the named one's are read."""

    name: str = "masked_bce_sum"
    """A key of `hilum.heads.losses.LOSSES`."""
    reduction: Literal["sum", "mean"] = "sum"
    """sum: over known entries, as the slides' heads; mean: their weighted mean. masked_bce_sum and masked_bce_mean are
    what they are called."""
    asymmetric: AsymmetricSettings = field(default_factory=AsymmetricSettings)
    """Of asymmetric."""
    weighted_asymmetric: AsymmetricSettings = field(default_factory=lambda: AsymmetricSettings(gamma_positive=1.0))
    """Of weighted_asymmetric; defaults of dongkyunk/CheXFusion model/loss.py."""
    focal: FocalSettings = field(default_factory=FocalSettings)
    """Of focal."""
    class_balanced: ClassBalancedSettings = field(default_factory=ClassBalancedSettings)
    """Of class_balanced, and of the weights of ldam's second stage."""
    distribution_balanced: DistributionBalancedSettings = field(default_factory=DistributionBalancedSettings)
    """Of distribution_balanced."""
    ldam: LdamSettings = field(default_factory=LdamSettings)
    """Of ldam."""
    logit_adjusted: LogitAdjustedSettings = field(default_factory=LogitAdjustedSettings)
    """Of logit_adjusted."""

    @property
    def reduced(self) -> Literal["sum", "mean"]:
        """How the named loss is reduced."""
        named: dict[str, Literal["sum", "mean"]] = {"masked_bce_sum": "sum", "masked_bce_mean": "mean"}
        return named.get(self.name, self.reduction)


def second_stage(settings: LossSettings) -> LossSettings:
    """Deferred re-weighting (Cao 2019, algorithm 1): the settings for the last epochs, after those with `settings`.

    Raises:
        ConfigError: a loss other than ldam, which has no second stage.
    """
    if settings.name != "ldam":
        raise ConfigError(f"Deferred re-weighting is of the loss 'ldam', found {settings.name!r}; choose one of both.")
    return dataclasses.replace(settings, ldam=dataclasses.replace(settings.ldam, reweight=True))


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ConfigError(f"{name}: expected {low} or more, less than {high}, found {value}.")
