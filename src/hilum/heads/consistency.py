"""What the images of one study are to agree on: a term beside a loss ("constraint of prediction consistency", slides).

Labels come from a study's report, so all its images have the same ones, and their predictions should not differ. The
term needs no labels: it is the one that also reaches findings which are unknown. It pulls predictions of such a finding
together and never towards "absent"; `weights` leaves them out.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from hilum.core.errors import ConfigError
from hilum.heads.losses import Loss, Targets

Difference = Literal["squared", "jensen_shannon"]
Reduction = Literal["sum", "mean"]


def consistency(
    logits: Float[Tensor, "B C"],
    study: Int64[Tensor, " B"],
    weights: Float[Tensor, "B C"] | None = None,
    kind: Difference = "squared",
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """How far the probabilities of images are from the mean over their study; exactly 0 for images alone.

    squared: (p - m)^2. jensen_shannon: the divergence of Bernoulli(p) from Bernoulli(m), whose mean over a study is the
    Jensen-Shannon divergence of its images, at most ln 2 (Lin 1991). Of both, m is the minimiser, so that the slope
    through m is zero and holding m fixed (as done here) changes no gradient.

    Args:
        logits: one row per image.
        study: study of each image, 0 to at most B - 1; not sorted.
        weights: entries of weight 0 are left out; None: all count.
        kind: which difference.
        reduction: sum over, or mean of, the entries (image, finding) of studies with at least two images.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = torch.ones_like(precise) if weights is None else (weights > 0).to(precise.dtype)

    def over_study(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add(0, study, values)[study]  # B C

    images = over_study(counted)
    several = counted * (images > 1)
    present, absent = precise.sigmoid(), (-precise).sigmoid()
    mean_present, mean_absent = (
        (over_study(counted * part) / images.clamp(min=1)).detach() for part in (present, absent)
    )
    if kind == "squared":
        difference = (present - mean_present).square()
    else:  # where a mean is smaller than any number there is, so is its probability: the product is 0
        smallest = torch.finfo(precise.dtype).tiny
        difference = present * (F.logsigmoid(precise) - mean_present.clamp(min=smallest).log()) + absent * (
            F.logsigmoid(-precise) - mean_absent.clamp(min=smallest).log()
        )
    total = (several * difference).sum()
    return total if reduction == "sum" else total / several.sum().clamp(min=1)


def with_consistency(loss: Loss, weight: float, kind: Difference = "squared", reduction: Reduction = "mean") -> Loss:
    """A loss plus `weight` times the consistency of the studies of a batch, over entries that are known.

    Unknown entries are left out, so that here too they have exactly zero gradient.

    Args:
        loss: what `build_loss` made.
        weight: 0 or more.
        kind: which difference.
        reduction: as the loss is reduced (`LossSettings.reduced`), so that one weight means the same for both.

    Raises:
        ConfigError: from the returned loss, for targets without studies.
    """

    def both(logits: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, ""]:
        if targets.study is None:
            raise ConfigError("A consistency term needs to know the study of each image; the batch has no studies.")
        term = consistency(logits, targets.study, targets.weights, kind, reduction)
        return loss(logits, targets) + weight * term

    return both
