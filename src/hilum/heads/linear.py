"""The linear head: [CLS] of the last n blocks (and, by choice, the mean patch token) to one logit per finding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hilum.heads.features import Features
from hilum.heads.standardise import Scale, Standardisation, fold


class LinearHead(nn.Module):
    """A linear probe with n·D (+ D) inputs (RPIDIAL/CheXFound eval/utils.py; DINOv2 linear evaluation).

    Weights start from N(0, 0.01), biases from 0. Initialised from torch's global generator: build inside
    `core.seeding.forked`.

    Args:
        embed_dim: D, channels of a backbone token.
        blocks: n, how many last blocks' [CLS] are concatenated.
        findings: C, outputs.
        patch_mean: append the mean patch token of the last block.
    """

    needs_patches = False
    needs_studies = False

    def __init__(self, embed_dim: int, blocks: int, findings: int, patch_mean: bool = False) -> None:
        super().__init__()
        self.patch_mean = patch_mean
        self.linear = nn.Linear(embed_dim * (blocks + patch_mean), findings)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @property
    def bias(self) -> nn.Parameter:
        """One per finding."""
        return self.linear.bias

    @torch.no_grad()
    def absorb(self, scaling: Standardisation) -> None:
        """Give for raw features the logits that it gives for standardised ones."""
        scale = scaling.cls
        if self.patch_mean:
            scale = Scale(*(torch.cat(pair) for pair in zip(scaling.cls, scaling.patch_mean, strict=True)))
        fold(self.linear, scale)

    def draw_masks(self, features: Features, generator: torch.Generator) -> None:
        """Nothing: a linear head has no dropout."""

    def forward(self, features: Features, masks: None = None) -> Float[Tensor, "B C"]:
        """Logits, float32."""
        inputs = torch.cat([features.cls, features.patch_mean], dim=1) if self.patch_mean else features.cls
        return self.linear(inputs).float()
