"""A backbone in bfloat16 on a CPU that has instructions for it, faster than autocast alone; only where it is asked for.

Three things: weights are cast and laid out for the matrix kernels once instead of at every call, GELU is part of the
product before it, and attention is torch's fused kernel where the processor multiplies tiles (AMX: 1 to 3 times as
fast as plain products), elsewhere plain products with a softmax that is read and written in bfloat16 (the fused
kernel is slower there). Inside, either sums in float32. The residual stream, LayerNorm and LayerScale stay in
float32. Names of the operators are torch's own for its compiler and may go: then, or where the result is another,
autocast is what remains.
"""

import copy
from typing import cast

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor, nn
from torch.nn import functional as F

from hilum.backbones.layers import MLP, Attention, Block, Shapes, SwiGLU
from hilum.backbones.vit import VisionTransformer
from hilum.core.seeding import torch_stream

SMALLEST_COSINE = 0.999
"""Between [CLS] tokens of this and of autocast, on a picture of noise; below it this is not used."""


class _PackedLinear(nn.Module):
    """A linear layer whose weight lies as the kernels want it; bfloat16 out, with GELU if asked."""

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = linear.bias.detach().to(torch.bfloat16)
        self.after = ("gelu", "none") if gelu else ("none", "")

    def forward(self, tokens: Float[Tensor, "*T E"]) -> BFloat16[Tensor, "*T F"]:
        after, algorithm = self.after
        given = tokens.to(torch.bfloat16)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(given, self.weight, self.bias, after, [], algorithm))


class _FastAttention(nn.Module):
    """`Attention` with packed projections, and torch's fused kernel between them or plain products."""

    def __init__(self, attention: Attention, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = attention.heads, fused
        self.qkv, self.proj = _PackedLinear(attention.qkv), _PackedLinear(attention.proj)

    def forward(self, tokens: Float[Tensor, "T D"], shapes: Shapes) -> Float[Tensor, "T D"]:
        outputs = []
        for group, (images, length) in zip(
            self.qkv(tokens).split([images * length for images, length in shapes]), shapes, strict=True
        ):
            query, key, value = group.view(images, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            if self.fused:
                attended = F.scaled_dot_product_attention(query, key, value)
            else:
                scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
                attended = F.softmax(scores, dim=-1) @ value
            outputs.append(attended.transpose(1, 2).reshape(images * length, -1))
        return cast(Tensor, self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs)))


class _FastSwiGLU(nn.Module):
    """`SwiGLU` with packed projections."""

    def __init__(self, layer: SwiGLU) -> None:
        super().__init__()
        self.w12, self.w3 = _PackedLinear(layer.w12), _PackedLinear(layer.w3)

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return cast(Tensor, self.w3(F.silu(gate) * value))


@torch.no_grad()
def fast_backbone(backbone: VisionTransformer) -> VisionTransformer | None:
    """A faster copy for use under `torch.autocast("cpu", torch.bfloat16)`; None where this torch or CPU has none.

    Args:
        backbone: in evaluation mode, on the CPU, float32. It is left alone.
    """
    try:
        fast = _packed(backbone, torch.cpu._is_amx_tile_supported())
        channels, side = backbone.config.in_channels, 2 * backbone.config.patch_size
        noise = torch.randn(2, channels, side, side, generator=torch_stream(0, "fast backbone"))
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = fast(noise).cls.float(), backbone(noise).cls.float()
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or not for this processor
        return None
    return fast if bool((F.cosine_similarity(found, expected) >= SMALLEST_COSINE).all()) else None


def _packed(backbone: VisionTransformer, fused: bool) -> VisionTransformer:
    shared = {id(parameter): parameter for parameter in backbone.parameters()}
    fast = copy.deepcopy(backbone, shared)  # parameters are the same tensors; modules are new
    for block in fast.blocks:
        assert isinstance(block, Block)
        layer = block.mlp
        block.attn = cast(Attention, _FastAttention(block.attn, fused))
        if isinstance(layer, MLP):
            block.mlp = cast(MLP, nn.Sequential(_PackedLinear(layer.fc1, gelu=True), _PackedLinear(layer.fc2)))
        else:
            assert isinstance(layer, SwiGLU)
            block.mlp = cast(SwiGLU, _FastSwiGLU(layer))
    return fast
