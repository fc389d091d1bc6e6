"""CheXFound's backbone and GLoRI head again, in float64 and numpy, written from the facts of their papers and files.

Shares nothing with hilum: synthetic state dicts of the released names, the forward pass on one image, and the shapes of
the released files. For tests.
"""

from math import sqrt

import numpy as np

IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NAME = "linear:blocks={blocks}:avgpool=False:lr={rate}"


def backbone_shapes(dim=1024, depth=24, patch=16, side=512, registers=4, hidden=2736):
    """Names without wrappers and without chunks -> shapes, of a ViT with SwiGLU."""
    shapes = {
        "cls_token": (1, 1, dim), "register_tokens": (1, registers, dim), "mask_token": (1, dim),
        "pos_embed": (1, 1 + (side // patch) ** 2, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    for i in range(depth):
        block = {
            "norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,), "ls1.gamma": (dim,), "ls2.gamma": (dim,), "mlp.w12.weight": (2 * hidden, dim),
            "mlp.w12.bias": (2 * hidden,), "mlp.w3.weight": (dim, hidden), "mlp.w3.bias": (dim,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def head_shapes(embed=1024, blocks=4, dim=768, forward=2048, findings=40, cat_cls=False):
    """Names under the head's own -> shapes."""
    memory = embed * blocks
    width = dim + memory * cat_cls
    layer = {
        "norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
        "norm3.weight": (dim,), "norm3.bias": (dim,), "multihead_attn.in_proj_weight": (3 * dim, dim),
        "multihead_attn.in_proj_bias": (3 * dim,), "multihead_attn.out_proj.weight": (dim, dim),
        "multihead_attn.out_proj.bias": (dim,), "linear1.weight": (forward, dim), "linear1.bias": (forward,),
        "linear2.weight": (dim, forward), "linear2.bias": (dim,),
    }  # fmt: skip
    return {
        "decoder.embed_standart.weight": (dim, memory), "decoder.embed_standart.bias": (dim,),
        "decoder.query_embed.weight": (findings, dim), "decoder.duplicate_pooling": (findings, width, 1),
        "decoder.duplicate_pooling_bias": (findings,),
        **{f"decoder.layers.0.{name}": shape for name, shape in layer.items()},
    }  # fmt: skip


def random_state(shapes, seed, scale=0.3):
    """Numbers that leave no part near the identity."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0.05, scale, shape).astype(np.float32) for name, shape in shapes.items()}


def chunked(state, chunks=2):
    """`blocks.3.x` as FSDP's chunks have it: `blocks.<chunk>.3.x`."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    size = -(-depth // chunks)
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            name = ".".join(["blocks", str(int(parts[1]) // size), *parts[1:]])
        renamed[name] = value
    return renamed


def norm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def attend(query, key, value, heads):
    """(Q, d), (N, d), (N, d) -> (Q, d) and the weights (heads, Q, N)."""
    width = query.shape[1] // heads
    outputs, maps = [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = softmax(query[:, part] @ key[:, part].T / sqrt(width))
        outputs.append(weights @ value[:, part])
        maps.append(weights)
    return np.concatenate(outputs, axis=1), np.stack(maps)


def normalised(square):
    """uint8 (S, S) -> float64 (3, S, S): own range to [0, 1], the same in three channels, ImageNet's statistics."""
    x = square.astype(np.float64)
    x = (x - x.min()) / (x.max() - x.min())
    return (x[None] - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]


def backbone_tokens(state, image, patch, blocks, heads):
    """Of the last blocks, the final norm applied to each: [CLS] (n, D) and patches (n, N, D)."""
    s = {name: value.astype(np.float64) for name, value in state.items()}
    side = image.shape[1] // patch
    cells = [
        image[None, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        for r in range(side)
        for c in range(side)
    ]
    kernel, bias = s["patch_embed.proj.weight"], s["patch_embed.proj.bias"]
    patches = np.stack([(kernel * cell).sum((1, 2, 3)) for cell in cells]) + bias
    positions = s["pos_embed"][0]
    x = np.concatenate([s["cls_token"][0] + positions[:1], s["register_tokens"][0], patches + positions[1:]])
    depth = 1 + max(int(name.split(".")[1]) for name in s if name.startswith("blocks."))
    registers = len(s["register_tokens"][0])
    cls, tokens = [], []
    for i in range(depth):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in s.items() if name.startswith(f"blocks.{i}.")}
        qkv = norm(x, b["norm1.weight"], b["norm1.bias"], 1e-6) @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        mixed, _ = attend(*np.split(qkv, 3, axis=1), heads)
        x = x + b["ls1.gamma"] * (mixed @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        gate, up = np.split(
            norm(x, b["norm2.weight"], b["norm2.bias"], 1e-6) @ b["mlp.w12.weight"].T + b["mlp.w12.bias"], 2, axis=1
        )
        x = x + b["ls2.gamma"] * ((gate / (1 + np.exp(-gate)) * up) @ b["mlp.w3.weight"].T + b["mlp.w3.bias"])
        if i >= depth - blocks:
            out = norm(x, s["norm.weight"], s["norm.bias"], 1e-6)
            cls.append(out[0])
            tokens.append(out[1 + registers :])
    return np.stack(cls), np.stack(tokens)


def glori(state, cls, patches, cat_cls):
    """Logits (C,) and attention (C, N), mean over 8 heads, of tokens from `backbone_tokens`; no dropout."""
    s = {name.removeprefix("decoder."): value.astype(np.float64) for name, value in state.items()}
    layer = {name.removeprefix("layers.0."): value for name, value in s.items() if name.startswith("layers.0.")}
    memory = np.concatenate(list(patches), axis=1) @ s["embed_standart.weight"].T + s["embed_standart.bias"]
    memory = np.maximum(memory, 0)
    q = s["query_embed.weight"]
    q = norm(q + q, layer["norm1.weight"], layer["norm1.bias"], 1e-5)
    weights = np.split(layer["multihead_attn.in_proj_weight"], 3)
    biases = np.split(layer["multihead_attn.in_proj_bias"], 3)
    query, key, value = (x @ w.T + b for x, w, b in zip((q, memory, memory), weights, biases, strict=True))
    mixed, maps = attend(query, key, value, 8)
    mixed = mixed @ layer["multihead_attn.out_proj.weight"].T + layer["multihead_attn.out_proj.bias"]
    q = norm(q + mixed, layer["norm2.weight"], layer["norm2.bias"], 1e-5)
    hidden = np.maximum(q @ layer["linear1.weight"].T + layer["linear1.bias"], 0)
    q = norm(
        q + hidden @ layer["linear2.weight"].T + layer["linear2.bias"], layer["norm3.weight"], layer["norm3.bias"], 1e-5
    )
    if cat_cls:
        q = np.concatenate([np.repeat(cls.reshape(1, -1), len(q), axis=0), q], axis=1)
    return (q * s["duplicate_pooling"][:, :, 0]).sum(1) + s["duplicate_pooling_bias"], maps.mean(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
