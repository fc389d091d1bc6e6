"""Features of mean 0 and deviation 1 per channel while a head is trained, and a head that no longer needs them.

Tokens of a backbone share a large mean and channels of very different size, which a head with few steps to learn cannot
undo. The statistics come from training images alone. A head begins with a linear map, so what was done to its inputs
folds into that map exactly (`absorb` of each head): the head that is saved reads the backbone's own tokens.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hilum.heads.features import Features

SMALLEST_DEVIATION = 1e-4
"""Channels that vary less than this are centred and otherwise left as they are."""


class Scale(NamedTuple):
    """Of one kind of feature, per channel."""

    mean: Float[Tensor, " E"]
    deviation: Float[Tensor, " E"]

    def apply(self, values: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        """Standardise the last axis."""
        return (values - self.mean) / self.deviation

    @property
    def inverse(self) -> "Scale":
        """The scale whose `apply` undoes that of this one."""
        return Scale(-self.mean / self.deviation, 1 / self.deviation)


class Standardisation(NamedTuple):
    """Scales of the three kinds of features."""

    cls: Scale
    patch_mean: Scale
    patches: Scale | None

    def apply(self, features: Features) -> Features:
        """The same features, standardised."""
        patches = None
        if self.patches is not None and features.patches is not None:
            patches = self.patches.apply(features.patches)
        return features._replace(
            cls=self.cls.apply(features.cls), patch_mean=self.patch_mean.apply(features.patch_mean), patches=patches
        )

    @property
    def inverse(self) -> "Standardisation":
        """What undoes it: a head of raw features that absorbs this reads standardised ones."""
        patches = None if self.patches is None else self.patches.inverse
        return Standardisation(self.cls.inverse, self.patch_mean.inverse, patches)


def preparation(scaling: Standardisation | None) -> Callable[[Features], Features]:
    """What features go through before a head in training: standardised, or as they are."""
    return _unchanged if scaling is None else scaling.apply


def _unchanged(features: Features) -> Features:
    return features


def measure(batches: Iterable[Features]) -> Standardisation:
    """Statistics over all images (and, of patches, all positions), in one pass, in float64."""
    totals: list[list[Tensor] | None] = [None, None, None]
    for features in batches:
        for kind, values in enumerate(features[:3]):
            if values is None:
                continue
            flat = values.flatten(0, -2).double()  # rows E
            sums = [torch.tensor(float(len(flat))), flat.sum(dim=0), flat.square().sum(dim=0)]
            before = totals[kind]
            totals[kind] = sums if before is None else [old + new for old, new in zip(before, sums, strict=True)]
    cls, patch_mean, patches = (None if total is None else _scale(*total) for total in totals)
    assert cls is not None
    assert patch_mean is not None
    return Standardisation(cls, patch_mean, patches)


def _scale(count: Tensor, total: Tensor, squares: Tensor) -> Scale:
    mean = total / count.to(total.device)
    deviation = (squares / count.to(total.device) - mean.square()).clamp_min(0).sqrt()
    deviation = torch.where(deviation < SMALLEST_DEVIATION, torch.ones_like(deviation), deviation)
    return Scale(mean.float(), deviation.float())


@torch.no_grad()
def fold(linear: nn.Linear, scale: Scale) -> None:
    """Change a linear map of standardised inputs so that it gives the same outputs for raw ones."""
    mean, deviation = (part.double().cpu() for part in scale)
    weight = linear.weight.double() / deviation
    linear.bias.copy_((linear.bias.double() - weight @ mean).float())
    linear.weight.copy_(weight.float())
