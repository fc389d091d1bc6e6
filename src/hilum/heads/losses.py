"""Supervised losses over incomplete multi-label targets. Unknown and uncertain entries give exactly zero gradient.

The known entries are found once per batch (`known_targets`) and handed to every head; nothing here or in the sweep
rebinds the labels (in RPIDIAL/CheXFound a loop over heads does, and trains every head but the first on unknowns as
negatives).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor


class Targets(NamedTuple):
    """Clean targets of a batch and where they count."""

    values: Float[Tensor, "B C"]
    """1 positive, 0 otherwise, or between (pseudo-labels); meaningless where the weight is 0."""
    weights: Float[Tensor, "B C"]
    """How much an entry counts; 0 where unknown."""
    study: Int64[Tensor, " B"] | None = None
    """Study of each image in the batch (`Features.study`)."""


def known_targets(labels: Int[Tensor, "B C"], study: Int64[Tensor, " B"] | None = None) -> Targets:
    """Split label codes (1, 0, -1 unknown, -2 uncertain) into targets and weights; `labels` is left as it is."""
    return Targets(labels.clamp(min=0).float(), (labels >= 0).float(), study)


def masked_bce_sum(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, ""]:
    """Binary cross-entropy summed over findings and batch, known entries only.

    The loss of the slides' heads (RPIDIAL/CheXFound eval/losses.py: reduction "sum", weight 0 where unknown).
    """
    return _entries(logits, targets).sum()


def masked_bce_mean(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, ""]:
    """Binary cross-entropy averaged over the known entries; 0 when nothing in the batch is known."""
    return _entries(logits, targets).sum() / targets.weights.sum().clamp(min=1)


def _entries(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, "B C"]:
    entries = F.binary_cross_entropy_with_logits(logits.float(), targets.values, reduction="none")
    return torch.where(targets.weights > 0, entries * targets.weights, 0.0)


LOSSES: dict[str, Callable[[Tensor, Targets], Tensor]] = {
    "masked_bce_sum": masked_bce_sum,
    "masked_bce_mean": masked_bce_mean,
}
