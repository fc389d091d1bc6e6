"""What each token adds to a direction of [CLS]: the attention part of the residual stream, taken apart token by token.

[CLS] after block l is the final LayerNorm of a sum: its embedding, and what the attention and the feed-forward of every
block up to l have added. With the scale of that LayerNorm held at its value for the image, a direction w reads this sum
linearly, and what attention adds is itself a sum over tokens: A_i · W_O v_i, for each head. These are the direct
contributions of Gandelsman et al. 2024, "Interpreting CLIP's Image Representation via Text-Based Decomposition" (ICLR,
arXiv 2310.05916, section 3), here for any direction and for [CLS] of several blocks at once. No gradients are taken.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hilum.backbones.layers import Block
from hilum.backbones.vit import Tokens, VisionTransformer


class Contributions(NamedTuple):
    """Direct contributions to [CLS] along K directions, and the tokens of the last block from the same pass."""

    values: Float[Tensor, "B K S"]
    """Of each token in the order [CLS], registers, patches; what feed-forwards, biases and the embedding add is not
    among them. Float32."""
    tokens: Tokens


@torch.no_grad()
def cls_contributions(
    backbone: VisionTransformer, images: Float[Tensor, "B C H W"], directions: Float[Tensor, "K E"], blocks: int
) -> Contributions:
    """Take directions . [CLS of the last n blocks] apart into what each token added by attention.

    Costs one pass of the backbone and a fifth more: each block's queries, keys and values are computed once more, and
    depth · n · K · D multiplications a token come on top.

    Args:
        backbone: in evaluation mode.
        images: normalised.
        directions: weights on the [CLS] of the n blocks, concatenated as in `heads.features.Features.cls`: E = n·D.
        blocks: n.
    """
    dim, depth, count = backbone.config.embed_dim, len(backbone.blocks), len(directions)
    scaled = directions.float().unflatten(1, (blocks, dim)) * backbone.norm.weight.float()  # K n D
    read = (scaled - scaled.mean(dim=2, keepdim=True)).transpose(0, 1)  # n K D; LayerNorm takes the mean away
    packed, shapes = backbone._embed([images.to(backbone.pos_embed.dtype)], [None])
    [(batch, length)] = shapes
    total = torch.zeros(blocks, batch, length, count, device=packed.device)
    deviation = torch.ones(blocks, batch, device=packed.device)
    for index, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        first = max(index - (depth - blocks), 0)  # of the [CLS] that are read, the first that this block has reached
        total[first:] += _of_block(block, packed.view(batch, length, dim), read[first:])
        packed = block(packed, shapes)
        if index >= depth - blocks:
            cls = packed.view(batch, length, dim)[:, 0].float()
            deviation[first] = (cls.var(dim=1, unbiased=False) + backbone.norm.eps).sqrt()
    values = (total / deviation[:, :, None, None]).sum(dim=0).transpose(1, 2)
    return Contributions(values, backbone._unpack(packed, shapes)[0])


def _of_block(block: Block, tokens: Float[Tensor, "B S D"], read: Float[Tensor, "n K D"]) -> Float[Tensor, "n B S K"]:
    """What each token adds to [CLS] by the attention of one block, along each direction."""
    attention = block.attn
    query, key, value = attention.qkv(block.norm1(tokens)).unflatten(2, (3, attention.heads, -1)).unbind(dim=2)
    scores = torch.einsum("bhe,bshe->bhs", query[:, 0].float(), key.float()) * query.shape[-1] ** -0.5
    weighted = value.float() * scores.softmax(dim=2).transpose(1, 2)[..., None]  # B S heads head_dim
    through = (read * block.ls1.gamma.float()) @ attention.proj.weight.float()  # n K D
    return torch.einsum("bsd,nkd->nbsk", weighted.flatten(2), through)
