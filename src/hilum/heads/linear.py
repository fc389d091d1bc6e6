"""The linear head: [CLS] of the last n blocks (and, by choice, the mean patch token) to one logit per finding.

Alone, beside a partner of the same study, or beside the set of all images of the study.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from hilum.heads.features import Features
from hilum.heads.standardise import Scale, Standardisation, fold
from hilum.heads.study_sets import GROUPS, in_group, mean_where, same_study


class LinearHead(nn.Module):
    """A linear probe with n·D (+ D) inputs (RPIDIAL/CheXFound eval/utils.py; DINOv2 linear evaluation).

    Weights start from N(0, 0.01), biases from 0. Initialised from torch's global generator: build inside
    `core.seeding.forked`.

    Args:
        embed_dim: D, channels of a backbone token.
        blocks: n, how many last blocks' [CLS] are concatenated.
        findings: C, outputs.
        patch_mean: append the mean patch token of the last block.
        views: what of the other images of the study is read beside the image's own x.
            single: nothing.
            concat: [x; x of a partner] (the slides; CheXFound `--multiview`), an image alone being its own partner. In
            training the partner is drawn at random. In prediction it is the mean of the other images, whose logit is
            the mean over all partners: the same at every pass and in every order.
            set: [x; means of x over the study's frontal, lateral and other images], this image among them; a learned
            vector (from 0) stands for a kind that the study lacks.
    """

    needs_patches = False

    def __init__(
        self,
        embed_dim: int,
        blocks: int,
        findings: int,
        patch_mean: bool = False,
        views: Literal["single", "concat", "set"] = "single",
    ) -> None:
        super().__init__()
        self.patch_mean, self.views = patch_mean, views
        self.needs_studies = views != "single"
        width = embed_dim * (blocks + patch_mean)
        self.parts = {"single": 1, "concat": 2, "set": 1 + len(GROUPS)}[views]
        self.linear = nn.Linear(width * self.parts, findings)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        if views == "set":
            self.absent = nn.Parameter(torch.zeros(len(GROUPS), width))

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
        fold(self.linear, Scale(*(part.repeat(self.parts) for part in scale)))
        if self.views == "set":
            mean, deviation = (part.double().cpu() for part in scale)
            self.absent.copy_((self.absent.double() * deviation + mean).float())

    def draw_masks(self, features: Features, generator: torch.Generator) -> Int64[Tensor, " B"] | None:
        """Place of each image's partner in the batch (concat); nothing otherwise: a linear head has no dropout."""
        if self.views != "concat":
            return None
        same = same_study(features)
        draws = 1 + torch.rand(same.shape, generator=generator, device=generator.device)
        alone = torch.eye(len(same), dtype=torch.bool, device=draws.device)
        return torch.where(alone, 0.5, draws).where(same, 0.0).argmax(dim=1)

    def forward(self, features: Features, masks: Int64[Tensor, " B"] | None = None) -> Float[Tensor, "B C"]:
        """Logits, float32; with `masks`, beside these partners."""
        own = torch.cat([features.cls, features.patch_mean], dim=1) if self.patch_mean else features.cls
        inputs = self._inputs(own, features, masks)
        with torch.autocast(inputs.device.type, enabled=False):  # logits rounded to bfloat16 would tie
            return self.linear(inputs.float())

    def _inputs(self, own: Tensor, features: Features, partners: Tensor | None) -> Float[Tensor, "B I"]:
        if self.views == "single":
            return own
        same = same_study(features)
        if self.views == "set":
            means, present = mean_where(same & in_group(features)[:, None], own)  # 3 B E
            return torch.cat([own, *torch.where(present, means, self.absent[:, None])], dim=1)
        if partners is None:
            others, found = mean_where(same & ~torch.eye(len(own), dtype=torch.bool, device=own.device), own)
            return torch.cat([own, torch.where(found, others, own)], dim=1)
        return torch.cat([own, own[partners]], dim=1)

    def directions(self) -> Float[Tensor, "R C I"]:
        """Weights of each part that is read: the image's own tokens first, then those of its study (`views`)."""
        return torch.stack(self.linear.weight.detach().float().chunk(self.parts, dim=1))

    def share_of_image(self, features: Features) -> Float[Tensor, "B R"]:
        """How much of each part one image is, in the mean of the logits over its study's images.

        With x the image's own tokens, sum_r share_r (directions_r . x), summed over the images of a study, and the bias
        (and what stands for absent views), is the mean of the study's logits.
        """
        if self.views == "single":
            return torch.ones(features.cls.shape[0], 1, device=features.cls.device)
        same = same_study(features)
        of_study = 1 / same.sum(dim=1, dtype=torch.float32)
        if self.views == "concat":
            return of_study[:, None].expand(-1, 2)
        group = in_group(features)  # 3 B
        counts = (same & group[:, None]).sum(dim=2, dtype=torch.float32).clamp(min=1)
        return torch.cat([of_study[None], group / counts]).T
