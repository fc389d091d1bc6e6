"""Images of one study found in a batch, and means and softmaxes over them; what every multi-view head is made of.

A batch holds whole studies in any order. All sums run over the images of the batch with weight 0 outside the study:
no padding, no shape that depends on the data, the same result for every order of the images up to rounding. Values must
be finite: 0 times infinity would leave its study.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from hilum.core.types import VIEW_KINDS
from hilum.heads.features import Features

GROUPS: tuple[tuple[str, ...], ...] = (("PA", "AP"), ("lateral",), ("other",))
"""Kinds of views (`core.types.VIEW_KINDS`) that a set of views tells apart: frontal, lateral, other."""


def same_study(features: Features) -> Bool[Tensor, "B B"]:
    """Which images of the batch belong to one study; every image to its own."""
    assert features.study is not None, "a head that reads whole studies needs features.study"
    return features.study[:, None] == features.study[None, :]


def in_group(features: Features) -> Bool[Tensor, "3 B"]:
    """Which images are frontal, lateral, other."""
    assert features.view is not None, "a head that tells views apart needs features.view"
    view = features.view
    rows = [torch.stack([view == VIEW_KINDS.index(kind) for kind in kinds]).any(dim=0) for kinds in GROUPS]
    return torch.stack(rows)


def mean_where(
    member: Bool[Tensor, "*G B B"], values: Float[Tensor, "B E"]
) -> tuple[Float[Tensor, "*G B E"], Bool[Tensor, "*G B 1"]]:
    """For each image the mean of the values of its members, 0 without any; and whether there is one."""
    weights = member.to(values.dtype)
    count = weights.sum(dim=-1, keepdim=True)
    return weights @ values / count.clamp(min=1), count > 0


def shares(scores: Float[Tensor, "B ..."], same: Bool[Tensor, "B B"]) -> Float[Tensor, "B B ..."]:
    """Softmax of the images' scores over each study: row b holds what each image weighs in the study of image b."""
    outside = ~same.view(*same.shape, *(1 for _ in scores.shape[1:]))
    return scores.float().unsqueeze(0).masked_fill(outside, -torch.inf).softmax(dim=1)


def first_of_study(same: Bool[Tensor, "B B"]) -> Int64[Tensor, " B"]:
    """Place of the first image of each image's study, so that all rows of a study can be made one, to the last bit."""
    return same.to(torch.uint8).argmax(dim=1)
