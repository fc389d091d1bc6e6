"""The projection head of DINO and iBOT: tokens of the backbone to unit vectors, and prototypes to compare them with.

Sits between the backbone and the losses, in student and teacher, one head for [CLS] and one for patches. The product
with the prototypes is left to `losses.py`, which can then run it a few rows at a time; nothing here knows a loss.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, so that tests can compute in it."""
    return values if values.dtype == torch.float64 else values.float()


class Projection(NamedTuple):
    """What a head makes of its tokens; `features @ prototypes.T` are the logits."""

    features: Float[Tensor, "rows E"]
    """Unit vectors, E the bottleneck width."""
    prototypes: Float[Tensor, "K E"]
    """Rows of length `weight_g` (1 at the start)."""

    def logits(self) -> Float[Tensor, "rows K"]:
        """Similarity of every row with every prototype: a cosine while `weight_g` is 1; in the autocast precision."""
        return F.linear(self.features, self.prototypes)


class Prototypes(nn.Module):
    """K directions with a trainable length each (weight normalisation: w = g v / |v|)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self) -> Float[Tensor, "K E"]:
        """The normalised weight."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))


class DINOHead(nn.Module):
    """Three linear layers with GELU, L2 normalisation, weight-normalised prototypes (DINO, Caron 2021, section 3.2).

    Parameter names follow facebookresearch/dinov2 layers/dino_head.py. The length of the prototypes is trainable, as
    in DINOv2; the first DINO kept it at 1. Parameters come from torch's global generator: build inside
    `core.seeding.forked`.

    Args:
        dim: channels of the backbone.
        prototypes: K.
        hidden: width of the two inner layers.
        bottleneck: E, width that is normalised.
    """

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = Prototypes(bottleneck, prototypes)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Float[Tensor, "rows D"]) -> Projection:
        """Project tokens; zero rows are allowed (a batch without a masked patch)."""
        features = at_least_float32(self.mlp(tokens))
        return Projection(F.normalize(features, dim=-1, eps=1e-12), self.last_layer())
