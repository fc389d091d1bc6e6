"""Supervised losses over incomplete multi-label targets. Unknown and uncertain entries give exactly zero gradient.

The known entries are found once per batch (`known_targets`) and handed to every head; nothing here or in the sweep
rebinds the labels (in RPIDIAL/CheXFound a loop over heads does, and trains every head but the first on unknowns as
negatives). A loss is one function of logits and targets: choosing one adds no other, and none touches torch's grad mode
(there, choosing the focal loss adds it to cross-entropy and switches gradients off and on).

Every loss is y L+(z) + (1 - y) L-(z) for an entry of label y and logit z, so that labels between 0 and 1 have a meaning
in all of them; equations and sources in docs/explanation/long-tail.md. Nothing branches on the value of a tensor:
`torch.func.vmap` over a leading axis of logits gives the losses of many heads at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.heads.frequencies import Frequencies
from hilum.heads.loss_settings import (
    AsymmetricSettings,
    ClassBalancedSettings,
    DistributionBalancedSettings,
    LossSettings,
)


class Targets(NamedTuple):
    """Clean targets of a batch and where they count."""

    values: Float[Tensor, "B C"]
    """1 positive, 0 otherwise, or between (pseudo-labels); meaningless where the weight is 0."""
    weights: Float[Tensor, "B C"]
    """How much an entry counts; 0 where unknown."""
    study: Int64[Tensor, " B"] | None = None
    """Study of each image in the batch (`Features.study`)."""


Loss = Callable[[Tensor, Targets], Tensor]
"""(logits (B, C), targets) -> scalar, in float32 (float64 for float64 logits)."""


class Terms(NamedTuple):
    """What every entry would cost with either label."""

    positive: Float[Tensor, "B C"]
    """L+, were it positive."""
    negative: Float[Tensor, "B C"]
    """L-, were it negative."""

    def weighted(self, positive: Float[Tensor, "*B C"], negative: Float[Tensor, "*B C"]) -> "Terms":
        """The same, each label weighed."""
        return Terms(self.positive * positive, self.negative * negative)


def known_targets(labels: Int[Tensor, "B C"], study: Int64[Tensor, " B"] | None = None) -> Targets:
    """Split label codes (1, 0, -1 unknown, -2 uncertain) into targets and weights; `labels` is left as it is."""
    return Targets(labels.clamp(min=0).float(), (labels >= 0).float(), study)


def masked_bce_sum(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, ""]:
    """Binary cross-entropy summed over findings and batch, known entries only.

    The loss of the slides' heads (RPIDIAL/CheXFound eval/losses.py: reduction "sum", weight 0 where unknown).
    """
    return _known(_cross_entropy(logits, targets), targets).sum()


def masked_bce_mean(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, ""]:
    """Binary cross-entropy averaged over the known entries, by weight; 0 when nothing in the batch is known."""
    return _mean(_known(_cross_entropy(logits, targets), targets), targets)


def _cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    precise = _precise(logits)
    return F.binary_cross_entropy_with_logits(precise, targets.values.to(precise.dtype), reduction="none")


def _precise(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _known(entries: Tensor, targets: Targets) -> Tensor:
    return torch.where(targets.weights > 0, entries * targets.weights, 0.0)


def _mean(known: Tensor, targets: Targets) -> Tensor:
    total = targets.weights.sum()
    return known.sum() / torch.where(total > 0, total, 1.0)


def bce_terms(logits: Float[Tensor, "B C"], gamma: float = 0.0) -> Terms:
    """Cross-entropy, with the focal factor (1 - p_t)^gamma (Lin 2017, equation 4) unless gamma is 0.

    Logarithms and powers come from log-sigmoids: finite, as are their slopes, however large the logit.
    """
    positive, negative = F.softplus(-logits), F.softplus(logits)
    if gamma == 0:
        return Terms(positive, negative)
    return Terms((-gamma * negative).exp() * positive, (-gamma * positive).exp() * negative)


def asymmetric_terms(logits: Float[Tensor, "B C"], settings: AsymmetricSettings) -> Terms:
    """L+ = -(1 - p)^g+ ln p and L- = -p_m^g- ln(1 - p_m), p_m = max(p - m, 0) (Ridnik 2021, "Asymmetric loss")."""
    positive, negative = F.softplus(-logits), F.softplus(logits)
    positive_focus = (-settings.gamma_positive * negative).exp()
    if settings.clip > 0:
        shifted = (logits.sigmoid() - settings.clip).clamp(min=0)
        negative, negative_focus = -(-shifted).log1p(), shifted**settings.gamma_negative
    else:  # ln(1 - p) of a probability that rounds to 1 needs the logit
        negative_focus = (-settings.gamma_negative * positive).exp()
    if settings.detach_focus:
        positive_focus, negative_focus = positive_focus.detach(), negative_focus.detach()
    return Terms(positive_focus * positive, negative_focus * negative)


def effective_weights(frequencies: Frequencies, settings: ClassBalancedSettings) -> tuple[Tensor, Tensor]:
    """Weights (1 - beta) / (1 - beta^n) (Cui 2019, class-balanced term) of positives and negatives, (C,) each.

    A count of 0 is taken as 1, and takes no part in the mean. How they are scaled: `ClassBalancedSettings.over`.
    """

    def weigh(counts: Tensor) -> Tensor:
        exponent = counts.double().clamp(min=1)
        return (1 - settings.beta) / (1 - settings.beta**exponent)

    positive, negative = weigh(frequencies.positives), weigh(frequencies.negatives)
    if settings.over == "findings":
        present = frequencies.positives > 0  # one without any has nothing to learn, and a weight of hundreds of others
        negative = positive = positive / (positive[present] if present.any() else positive).mean()
    else:
        total = (positive + negative) / 2
        positive, negative = positive / total, negative / total
    return positive.float(), negative.float()


def exponential_weights(frequencies: Frequencies) -> tuple[Tensor, Tensor]:
    """exp(1 - prevalence) of positives and exp(prevalence) of negatives, (C,) each (dongkyunk/CheXFusion loss.py)."""
    return (1 - frequencies.prevalence).exp(), frequencies.prevalence.exp()


def distribution_balanced_terms(
    logits: Float[Tensor, "B C"], targets: Targets, frequencies: Frequencies, settings: DistributionBalancedSettings
) -> Terms:
    """Re-balanced weighting and negative-tolerant regularisation (Wu 2020).

    With n_i positives of finding i, r = (1 / n_i) / sum over the image's positive findings of 1 / n_j, and the weight
    of an entry is alpha + sigmoid(beta (r - mu)); of an image without a known positive r is infinite, and the weight
    alpha + 1 (alpha + 1/2, as every entry's, where beta is 0). The logit is moved by
    nu_i = kappa ln(negatives / positives): L+ = softplus(-(z - nu)), L- = softplus(lambda (z - nu)) / lambda.
    (wutong16/DistributionBalancedLoss divides nu by lambda.)
    """
    rarity = 1 / frequencies.positives.clamp(min=1)  # C
    positive = torch.where(targets.weights > 0, targets.values, 0.0)
    repeated = (positive * rarity).sum(dim=1, keepdim=True)  # B 1: how often sampling by class draws this image
    share = (rarity / repeated).clamp(max=torch.finfo(rarity.dtype).max)  # finite: 0 * inf is no number
    weight = settings.alpha + (settings.beta * (share - settings.mu)).sigmoid()
    moved = logits + settings.bias * frequencies.log_odds
    scale = settings.negative_scale
    plain, steep = bce_terms(moved, settings.gamma), bce_terms(scale * moved, settings.gamma)
    return Terms(plain.positive, steep.negative / scale).weighted(weight, weight)


def margins(frequencies: Frequencies, largest: float) -> tuple[Tensor, Tensor]:
    """Margins proportional to count^(-1/4) (Cao 2019, equation 12) of positives and negatives, (C,) each.

    The rarest label that there is has `largest`, as has one that there is not.
    """
    counts = torch.stack([frequencies.positives, frequencies.negatives])  # 2 C
    rarest = torch.where(counts > 0, counts, torch.inf).min()
    positive, negative = largest * (rarest / counts).clamp(max=1) ** 0.25
    return positive, negative


def adjust_logits(logits: Float[Tensor, "*B C"], frequencies: Frequencies, tau: float = 1.0) -> Float[Tensor, "*B C"]:
    """Post-hoc logit adjustment (Menon 2021, equation 9): logits less tau times the log-odds in training.

    For a head trained with cross-entropy. It moves thresholds and calibration; the order of images, and with it AP and
    AUC of each finding, stays.
    """
    return logits - tau * frequencies.log_odds


def _masked_bce_sum(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    return masked_bce_sum


def _masked_bce_mean(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    return masked_bce_mean


def _asymmetric(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    return _reduced(settings, lambda logits, _: asymmetric_terms(logits, settings.asymmetric))


def _weighted_asymmetric(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    weights = exponential_weights(_require(settings, frequencies))
    return _reduced(
        settings, lambda logits, _: asymmetric_terms(logits, settings.weighted_asymmetric).weighted(*weights)
    )


def _focal(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    gamma, alpha = settings.focal.gamma, settings.focal.alpha
    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def terms(logits: Tensor, targets: Targets) -> Terms:
        plain = bce_terms(logits, gamma)
        return Terms(positive * plain.positive, negative * plain.negative)

    return _reduced(settings, terms)


def _class_balanced(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    weights, gamma = (
        effective_weights(_require(settings, frequencies), settings.class_balanced),
        settings.class_balanced.gamma,
    )
    return _reduced(settings, lambda logits, _: bce_terms(logits, gamma).weighted(*weights))


def _distribution_balanced(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    counts = _require(settings, frequencies)
    return _reduced(
        settings,
        lambda logits, targets: distribution_balanced_terms(logits, targets, counts, settings.distribution_balanced),
    )


def _ldam(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    """L+ = softplus(-s (z - margin+)) and L- = softplus(s (z + margin-)): Cao 2019, equation 13, for two classes."""
    counts = _require(settings, frequencies)
    positive, negative = margins(counts, settings.ldam.max_margin)
    weights = effective_weights(counts, settings.class_balanced) if settings.ldam.reweight else None
    scale = settings.ldam.scale

    def terms(logits: Tensor, targets: Targets) -> Terms:
        held = Terms(
            F.softplus(-scale * (logits - positive)),
            F.softplus(scale * (logits + negative)),
        )
        return held if weights is None else held.weighted(*weights)

    return _reduced(settings, terms)


def _logit_adjusted(settings: LossSettings, frequencies: Frequencies | None) -> Loss:
    """Cross-entropy of z + tau ln(positives / negatives): what is learned is z, as if both labels were equally many."""
    shift = settings.logit_adjusted.tau * _require(settings, frequencies).log_odds
    return _reduced(settings, lambda logits, _: bce_terms(logits + shift))


def _reduced(settings: LossSettings, terms: Callable[[Tensor, Targets], Terms]) -> Loss:
    def loss(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, ""]:
        positive, negative = terms(_precise(logits), targets)
        entries = targets.values * positive + (1 - targets.values) * negative
        known = _known(entries, targets)
        return known.sum() if settings.reduction == "sum" else _mean(known, targets)

    return loss


def _require(settings: LossSettings, frequencies: Frequencies | None) -> Frequencies:
    if frequencies is None:
        raise ConfigError(f"The loss {settings.name!r} needs the frequencies of findings (`count_labels`); found none.")
    return frequencies


LOSSES: dict[str, Callable[[LossSettings, Frequencies | None], Loss]] = {
    "masked_bce_sum": _masked_bce_sum,
    "masked_bce_mean": _masked_bce_mean,
    "asymmetric": _asymmetric,
    "weighted_asymmetric": _weighted_asymmetric,
    "focal": _focal,
    "class_balanced": _class_balanced,
    "distribution_balanced": _distribution_balanced,
    "ldam": _ldam,
    "logit_adjusted": _logit_adjusted,
}


def build_loss(settings: LossSettings, frequencies: Frequencies | None = None) -> Loss:
    """The named loss, on the device of the frequencies.

    Args:
        settings: its name and settings.
        frequencies: of the training labels; may be None for losses that do not look at them (masked cross-entropy,
            asymmetric, focal).

    Raises:
        UnknownNameError: no loss of that name.
        ConfigError: a loss that needs frequencies, without.
    """
    if settings.name not in LOSSES:
        raise UnknownNameError("loss", settings.name, LOSSES)
    return LOSSES[settings.name](settings, frequencies)
