"""Where a head's answer came from, on the patch grid: one kind of map for every head, so that heads can be compared.

A decoder says it by its attention. A head whose logit is a sum over tokens says it by the terms of that sum (its
evidence): exactly, for mean patch tokens and for CSRA (class activation maps, Zhou et al. 2016); for [CLS], by what
each patch added to it directly through attention (`backbones/contributions.py`). From each term that of a blank image
is taken away (the difference from a reference, Shrikumar et al. 2017, "DeepLIFT"): what a place adds whatever is there
says nothing of the image. Every map is 0 or more and sums to 1: over an image, or over a study where the head looks at
whole studies. docs/explanation/where-it-looked.md says what these maps are and what they are not.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hilum.backbones.contributions import cls_contributions
from hilum.backbones.vit import VisionTransformer
from hilum.heads.extension import ExtendedHead
from hilum.heads.features import Features
from hilum.heads.linear import LinearHead
from hilum.heads.study_sets import same_study
from hilum.heads.view_attention import ViewAttention

MapKind = Literal["attention", "evidence"]
FLAT = 1e-5
"""Log-odds a patch, in the mean, below which evidence is rounding."""


def kind_of_maps(head: nn.Module) -> MapKind:
    """What the maps of a head are; of an extended one, those of its first head."""
    inner = head.main if isinstance(head, ExtendedHead) else head
    inner = inner.inner if isinstance(inner, ViewAttention) else inner
    return "evidence" if isinstance(inner, LinearHead) or hasattr(inner, "evidence") else "attention"


@torch.no_grad()
def maps_of(
    head: nn.Module,
    features: Features,
    backbone: VisionTransformer,
    images: Float[Tensor, "B _ H W"],
) -> Float[Tensor, "B C h w"]:
    """Maps of every finding, float32, 0 or more; each sums to 1, over a study where its head looks at whole studies.

    A head of another kind has the maps of its method `attention`, or of `evidence` (B, C, N); NaN where it has neither.

    Args:
        head: with its weights, in evaluation mode.
        features: of the images, as the head reads them.
        backbone: for all heads but the decoder it is run on a blank image, for those that read [CLS] once more on all.
        images: normalised; a blank one is 0, the mean of the recipe.
    """
    if isinstance(head, ExtendedHead):
        return torch.cat([maps_of(one, features, backbone, images) for one in head.heads], dim=1)
    if isinstance(head, ViewAttention):
        alone = maps_of(head.inner, features, backbone, images)
        return alone * head.view_weights(features)[:, :, None, None]
    same = same_study(features) if getattr(head, "needs_studies", False) else None
    if not isinstance(head, LinearHead):
        if (add := getattr(head, "evidence", None)) is not None:
            blank = read_patches(backbone, torch.zeros_like(images[:1]), features)
            return as_maps(add(features) - add(blank), same).unflatten(-1, features.grid)
        if (attend := getattr(head, "attention", None)) is not None:
            return attend(features).float()
        shape = (features.cls.shape[0], len(getattr(head, "bias")), *features.grid)  # noqa: B009
        return torch.full(shape, torch.nan, device=features.cls.device)
    terms = linear_terms(head, features, backbone, images)
    terms = terms - linear_terms(head, features, backbone, torch.zeros_like(images[:1]))
    evidence = torch.einsum("brcn,br->bcn", terms, head.share_of_image(features))
    return as_maps(evidence, same).unflatten(-1, features.grid)


def read_patches(backbone: VisionTransformer, images: Float[Tensor, "B _ H W"], like: Features) -> Features:
    """Patch tokens of other images, read as `like` was; the rest is as it was there."""
    blocks = like.cls.shape[1] // backbone.config.embed_dim
    tokens = backbone.intermediate(images.to(backbone.pos_embed.dtype), blocks)
    return like._replace(patches=torch.cat([block.patches.float() for block in tokens], dim=2))


@torch.no_grad()
def linear_terms(
    head: LinearHead, features: Features, backbone: VisionTransformer, images: Float[Tensor, "B _ H W"]
) -> Float[Tensor, "B R C N"]:
    """What each patch of an image adds to a logit by each part that the head reads, in log-odds; signed.

    Of the mean patch token all of it, exactly; of [CLS] what came directly from the patch by attention. Weighted by
    `LinearHead.share_of_image` they are what the patch adds to the mean of its study's logits.

    Args:
        head: a linear head.
        features: of any images; their shapes alone matter here.
        backbone: as for `maps_of`.
        images: normalised.
    """
    directions = head.directions()  # R C I
    parts, findings, _ = directions.shape
    width, count = features.cls.shape[1], features.grid[0] * features.grid[1]
    of_cls, of_mean = directions.split([width, directions.shape[2] - width], dim=2)
    found = cls_contributions(backbone, images, of_cls.flatten(0, 1), width // backbone.config.embed_dim)
    terms = found.values[:, :, -count:].unflatten(1, (parts, findings))  # B R C N
    if head.patch_mean:
        terms = terms + torch.einsum("bnd,rcd->brcn", found.tokens.patches.float(), of_mean) / count
    return terms


def as_maps(evidence: Float[Tensor, "B C N"], same: Bool[Tensor, "B B"] | None = None) -> Float[Tensor, "B C N"]:
    """Signed evidence as maps: what lies above the mean of its image, scaled to sum to 1.

    The mean goes because a constant added to every patch of an image cannot be told from a bias: a logit says nothing
    of it. Where nothing stands out the map is even.

    Args:
        evidence: log-odds that each patch adds.
        same: which images are one study, to share 1 among its images; None: each image has 1.
    """
    raised = (evidence - evidence.mean(dim=2, keepdim=True)).clamp(min=0)
    whole, count = raised.sum(dim=2), torch.full(evidence.shape[:2], float(evidence.shape[2]), device=evidence.device)
    if same is not None:
        together = same.to(raised.dtype)
        whole, count = together @ whole, together @ count
    flat = whole <= FLAT * count
    maps = raised / torch.where(flat, 1.0, whole)[..., None]
    return torch.where(flat[..., None], 1 / count[..., None], maps)
