import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hilum.backbones.layers import draw_subsets
from hilum.backbones.vit import SIZES, VisionTransformer, ViTConfig
from hilum.core.errors import ConfigError
from hilum.core.seeding import forked, torch_stream

SMALL = ViTConfig(48, 3, 3, patch_size=8, image_size=64, registers=2)


def redrawn(config: ViTConfig, seed: int = 0) -> VisionTransformer:
    """All parameters random, biases non-zero and LayerScale near 1, so that no block is near the identity."""
    with forked(seed, "redrawn"):
        model = VisionTransformer(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gamma" in name or ("norm" in name and name.endswith("weight")):
                    nn.init.normal_(parameter, 1.0, 0.2)
                elif name.endswith("bias"):
                    nn.init.normal_(parameter, 0.0, 0.3)
                elif name.endswith("weight"):
                    nn.init.normal_(parameter, 0.0, parameter[0].numel() ** -0.5)
                else:
                    nn.init.normal_(parameter, 0.0, 0.5)
    return model.eval()


def images(batch: int, height: int, width: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch_stream(seed, "images", height, width))


@pytest.mark.parametrize(
    ("size", "feed_forward", "image_size", "count"),
    [
        ("vits16", "mlp", 224, 21_676_800), ("vits16", "swiglu", 224, 21_682_944),
        ("vitb16", "mlp", 224, 85_820_928), ("vitb16", "swiglu", 224, 85_833_216),
        ("vitl16", "mlp", 224, 303_355_904), ("vitl16", "swiglu", 224, 303_782_144),
        ("vitl16_chexfound", "swiglu", 512, 304_630_016),
    ],
)  # fmt: skip
def test_parameter_counts_of_the_published_sizes(size: str, feed_forward: str, image_size: int, count: int) -> None:
    config = replace(SIZES[size], in_channels=3, feed_forward=feed_forward, image_size=image_size)
    with torch.device("meta"):
        model = VisionTransformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_names_and_shapes_of_the_chexfound_backbone() -> None:
    with torch.device("meta"):
        state = VisionTransformer(replace(SIZES["vitl16_chexfound"], in_channels=3)).state_dict()
    assert len(state) == 344
    expected = {
        "cls_token": (1, 1, 1024), "register_tokens": (1, 4, 1024), "mask_token": (1, 1024),
        "pos_embed": (1, 1025, 1024), "patch_embed.proj.weight": (1024, 3, 16, 16), "patch_embed.proj.bias": (1024,),
        "blocks.23.norm1.weight": (1024,), "blocks.0.norm2.bias": (1024,), "blocks.5.attn.qkv.weight": (3072, 1024),
        "blocks.5.attn.qkv.bias": (3072,), "blocks.5.attn.proj.weight": (1024, 1024), "blocks.7.ls1.gamma": (1024,),
        "blocks.7.ls2.gamma": (1024,), "blocks.9.mlp.w12.weight": (5472, 1024), "blocks.9.mlp.w12.bias": (5472,),
        "blocks.9.mlp.w3.weight": (1024, 2736), "blocks.9.mlp.w3.bias": (1024,), "norm.weight": (1024,),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in expected} == expected


@pytest.mark.parametrize("size", SIZES)
def test_every_named_size_has_64_channels_per_head(size: str) -> None:
    assert SIZES[size].embed_dim == 64 * SIZES[size].num_heads


def test_initial_distribution() -> None:
    with forked(3, "initial"):
        model = VisionTransformer(replace(SIZES["demo16"], registers=4, positions="normal", layer_scale=1e-5))
    state = model.state_dict()
    assert abs(state["blocks.0.attn.qkv.weight"].std().item() - 0.02) < 5e-4
    assert abs(state["pos_embed"].std().item() - 0.02) < 5e-4
    assert 0 < state["cls_token"].abs().max() < 1e-5
    assert 0 < state["register_tokens"].abs().max() < 1e-5
    assert not state["mask_token"].any()
    assert not state["blocks.1.mlp.fc1.bias"].any()
    assert state["patch_embed.proj.bias"].any()  # torch's own initialisation of convolutions
    assert torch.equal(state["blocks.2.ls2.gamma"], torch.full((128,), 1e-5))


def reference_forward(model: VisionTransformer, batch: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The method's formulas, token by token in float64, with none of the layers' code. Native grid only."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    p, d, heads = config.patch_size, config.embed_dim, config.num_heads
    b, _, height, width = batch.shape
    cut = batch.double().reshape(b, config.in_channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    patches = cut.reshape(b, -1, config.in_channels * p * p) @ w["patch_embed.proj.weight"].reshape(d, -1).T
    patches = patches + w["patch_embed.proj.bias"]
    if mask is not None:
        patches = torch.stack(
            [torch.stack([w["mask_token"][0] if m else t for t, m in zip(*row, strict=True)])
             for row in zip(patches, mask, strict=True)]
        )  # fmt: skip
    x = torch.cat([w["cls_token"].expand(b, -1, -1), patches], 1) + w["pos_embed"]
    x = torch.cat([x[:, :1], w["register_tokens"].expand(b, -1, -1), x[:, 1:]], 1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    for index in range(config.depth):
        at = f"blocks.{index}."
        query, key, value = linear(norm(x, at + "norm1"), at + "attn.qkv").chunk(3, -1)
        mixed = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            scores = query[..., part] @ key[..., part].mT / (d // heads) ** 0.5
            mixed.append(scores.softmax(-1) @ value[..., part])
        x = x + w[at + "ls1.gamma"] * linear(torch.cat(mixed, -1), at + "attn.proj")
        y = norm(x, at + "norm2")
        if config.feed_forward == "mlp":
            hidden = linear(y, at + "mlp.fc1")
            y = linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), at + "mlp.fc2")
        else:
            gate, value = linear(y, at + "mlp.w12").chunk(2, -1)
            y = linear(gate * torch.sigmoid(gate) * value, at + "mlp.w3")
        x = x + w[at + "ls2.gamma"] * y
    return norm(x, "norm")


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formulas_in_float64(feed_forward: str, masked: bool) -> None:
    model = redrawn(replace(SMALL, feed_forward=feed_forward)).double()
    batch = images(2, 64, 64).double()
    mask = torch.rand(2, 64, generator=torch_stream(0, "mask")) < 0.4 if masked else None
    tokens = model.forward_crops([batch], [mask])[0]
    expected = reference_forward(model, batch, mask)
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), expected)


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_packed_crops_equal_separate_forwards(feed_forward: str) -> None:
    model = redrawn(replace(SMALL, feed_forward=feed_forward))
    crops = [images(4, 64, 64), images(6, 32, 32), images(2, 40, 72)]
    masks = [torch.rand(4, 64, generator=torch_stream(1, "mask")) < 0.5, None, None]
    together = model.forward_crops(crops, masks)
    for crop, mask, packed in zip(crops, masks, together, strict=True):
        for a, b in zip(packed, model.forward_crops([crop], [mask])[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-6)
    for a, b in zip(together[1], model(crops[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-6)


def test_packed_gradients_equal_separate_gradients() -> None:
    model = redrawn(SMALL).double()
    crops = [images(3, 64, 64).double(), images(4, 32, 32).double()]

    def gradients(outputs: list) -> list[torch.Tensor]:
        loss = sum((tokens.cls.square().sum() + tokens.patches.sin().sum()) for tokens in outputs)
        used = [value for name, value in model.named_parameters() if name != "mask_token"]
        return list(torch.autograd.grad(loss, used))

    packed = gradients(model.forward_crops(crops, [None, None]))
    separate = gradients([model(crop) for crop in crops])
    for a, b in zip(packed, separate, strict=True):
        torch.testing.assert_close(a, b)


def test_another_image_of_the_batch_changes_nothing() -> None:
    model = redrawn(SMALL)
    batch = images(3, 64, 64)
    changed = batch.clone()
    changed[2] = 7.0
    for a, b in zip(model(batch), model(changed), strict=True):
        torch.testing.assert_close(a[:2], b[:2], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(a[2], b[2]) or a[2].numel() == 0


def test_masked_patches_do_not_see_the_image_and_keep_their_position() -> None:
    model = redrawn(SMALL)
    everything = torch.ones(2, 64, dtype=torch.bool)
    tokens = model.forward_crops([images(2, 64, 64)], [everything])[0]
    torch.testing.assert_close(tokens.patches[0], tokens.patches[1])
    assert not torch.allclose(tokens.patches[0, 0], tokens.patches[0, 1], atol=1e-2)


def test_rectangles_are_height_first() -> None:
    model = redrawn(SMALL)
    batch = images(1, 32, 64)
    assert model(batch).patches.shape == (1, 4 * 8, 48)
    # With one layout of positions for (4, 8) and its transpose for (8, 4), a transposed image in a transposed
    # transformer gives transposed patches.
    mirrored = redrawn(SMALL)
    with torch.no_grad():
        mirrored.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.mT)
        grid = model.pos_embed[:, 1:].reshape(1, 8, 8, 48).transpose(1, 2).reshape(1, 64, 48)
        mirrored.pos_embed[:, 1:] = grid
    found = mirrored(batch.mT.contiguous()).patches.reshape(8, 4, 48).transpose(0, 1).reshape(32, 48)
    torch.testing.assert_close(found, model(batch).patches[0], rtol=1e-4, atol=1e-4)


def test_intermediate_is_the_final_norm_of_each_of_the_last_blocks() -> None:
    model = redrawn(SMALL)
    batch = images(2, 64, 64)
    captured: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: captured.append(out)) for block in model.blocks]
    outputs = model.intermediate(batch, 2)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 2
    for tokens, block_output in zip(outputs, captured[-2:], strict=True):
        expected = F.layer_norm(
            block_output.view(2, -1, 48), (48,), model.norm.weight, model.norm.bias, eps=1e-6
        )  # B S D
        torch.testing.assert_close(tokens.cls, expected[:, 0])
        torch.testing.assert_close(tokens.registers, expected[:, 1:3])
        torch.testing.assert_close(tokens.patches, expected[:, 3:])
    for a, b in zip(outputs[-1], model(batch), strict=True):
        assert torch.equal(a, b)


def test_drop_path_runs_each_branch_on_a_scaled_part_of_each_batch() -> None:
    """One block, one branch at a time: images left out are unchanged, those kept move by b / kept times the branch."""
    model = redrawn(replace(SMALL, depth=1, registers=0)).double()
    block = model.blocks[0]
    shapes = [(5, 7), (4, 3)]
    tokens = torch.randn(5 * 7 + 4 * 3, 48, generator=torch_stream(0, "tokens"), dtype=torch.float64)
    attention, feed_forward = draw_subsets(shapes, 2, 0.4, torch_stream(0, "drop"), torch.device("cpu"))
    assert attention.shapes == [(3, 7), (2, 3)]
    out = block(tokens, shapes, attention, feed_forward)
    expected = tokens.clone()
    for subset, branch in (
        (attention, lambda x: block.ls1(block.attn(block.norm1(x), [(1, len(x))]))),
        (feed_forward, lambda x: block.ls2(block.mlp(block.norm2(x)))),
    ):
        before = expected.clone()
        start = 0
        for count, length in shapes:
            kept = max(int(count * 0.6), 1)
            for image in range(count):
                rows = slice(start + image * length, start + (image + 1) * length)
                if rows.start in subset.rows.tolist():
                    expected[rows] = before[rows] + branch(before[rows]) * count / kept
            start += count * length
    torch.testing.assert_close(out, expected)


def test_drop_path_draws_are_independent_fair_and_repeatable() -> None:
    shapes = [(8, 2), (6, 1)]
    draws = draw_subsets(shapes, 4000, 0.4, torch_stream(0, "drop"), torch.device("cpu"))
    chosen = torch.zeros(4000, 14)
    for index, subset in enumerate(draws):
        assert len(subset.rows) == 4 * 2 + 3
        chosen[index, subset.rows[:8:2] // 2] = 1
        chosen[index, 8 + subset.rows[8:] - 16] = 1
    rates = chosen.mean(0)
    torch.testing.assert_close(rates[:8], torch.full((8,), 4 / 8), atol=0.04, rtol=0)
    torch.testing.assert_close(rates[8:], torch.full((6,), 3 / 6), atol=0.04, rtol=0)
    assert abs(torch.corrcoef(torch.stack([chosen[:-1, 0], chosen[1:, 0]]))[0, 1]) < 0.06  # between branches
    assert abs(torch.corrcoef(torch.stack([chosen[:, 0], chosen[:, 8]]))[0, 1]) < 0.06  # between crop sizes
    again = draw_subsets(shapes, 4000, 0.4, torch_stream(0, "drop"), torch.device("cpu"))
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(draws, again, strict=True))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75])
def test_drop_path_keeps_the_mean_residual(rate: float) -> None:
    """On equal images one branch moves those kept by b / kept, so the mean over the batch moves as without dropping."""
    model = redrawn(replace(SMALL, depth=1)).double()
    with torch.no_grad():
        model.blocks[0].ls2.gamma.zero_()  # attention alone
    model.norm = nn.Identity()  # type: ignore[assignment]
    batch = images(1, 16, 16).double().expand(9, -1, -1, -1)
    with torch.no_grad():
        dropped = model.forward_crops([batch], [None], rate, torch_stream(0, "drop"))[0].cls
        straight = model(batch).cls
    assert len(dropped.round(decimals=9).unique(dim=0)) == 2
    torch.testing.assert_close(dropped.mean(0), straight[0])


def test_one_image_is_always_kept() -> None:
    model = redrawn(SMALL)
    batch = images(1, 64, 64)
    dropped = model.forward_crops([batch], [None], 0.9, torch_stream(0, "drop"))[0]
    torch.testing.assert_close(dropped.cls, model(batch).cls)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 60, 64), "60 x 64 .* patches of 8; nearest .* 64 x 64"),
        ((1, 3, 64, 64), r"1 channel\(s\), found 3"),
    ],
)
def test_wrong_images_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        redrawn(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "multiple of the patch size"),
        ({"num_heads": 5}, "do not divide"),
        ({"in_channels": 2}, "1 or 3"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)


def test_wrong_rates_and_block_counts_are_refused() -> None:
    model = redrawn(SMALL)
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        model.forward_crops([images(1, 64, 64)], [None], 1.0, torch_stream(0, "drop"))
    with pytest.raises(ConfigError, match="1 to 3"):
        model.intermediate(images(1, 64, 64), 4)


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> those of transformers' Dinov2 models (version 5)."""
    outside = {
        "cls_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    }  # fmt: skip
    inside = {
        "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"], "attn.proj": ["attention.o_proj"],
        "ls1.gamma": ["layer_scale1.lambda1"], "ls2.gamma": ["layer_scale2.lambda1"],
        "mlp.w12": ["mlp.gate_proj", "mlp.up_proj"], "mlp.w3": ["mlp.down_proj"],
    }  # fmt: skip
    out = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            stem = next(stem for stem in outside if name == stem or name.startswith(stem + "."))
            out[outside[stem] + name.removeprefix(stem)] = value
            continue
        _, index, rest = name.split(".", 2)
        stem = next((stem for stem in inside if rest.startswith(stem)), rest)
        targets = inside.get(stem, [rest])
        for target, chunk in zip(targets, value.chunk(len(targets)), strict=True):
            out[f"encoder.layer.{index}.{target}{rest.removeprefix(stem)}"] = chunk
    return out


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (96, 96)])
def test_equals_transformers_dinov2(registers: int, feed_forward: str, size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(
        SMALL, registers=registers, feed_forward=feed_forward, in_channels=3, interpolate_offset=0.0,
        interpolate_antialias=registers > 0,
    )  # fmt: skip
    model = redrawn(config)
    kinds = ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel") if registers else ("Dinov2Config", "Dinov2Model")
    extra = {"num_register_tokens": registers} if registers else {}
    oracle_config = getattr(transformers, kinds[0])(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, patch_size=8, image_size=64, mlp_ratio=4,
        use_swiglu_ffn=feed_forward == "swiglu", **extra,
    )  # fmt: skip
    with forked(0, "oracle"):
        oracle = getattr(transformers, kinds[1])(oracle_config).eval()
    oracle.load_state_dict(to_transformers(model.state_dict()), strict=True)
    batch = images(2, *size, channels=3)
    with torch.no_grad():
        expected = oracle(batch, output_hidden_states=True)
        tokens = model(batch)
        blocks = model.intermediate(batch, 3)
    found = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    torch.testing.assert_close(found, expected.last_hidden_state, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(blocks, expected.hidden_states[1:], strict=True):
        normalised = oracle.layernorm(theirs)
        torch.testing.assert_close(ours.patches, normalised[:, 1 + registers :], rtol=1e-4, atol=2e-5)


COMPILED = """
import dataclasses, torch
from torch._dynamo.testing import CompileCounterWithBackend
from hilum.backbones.vit import VisionTransformer, ViTConfig

torch.manual_seed(0)
model = VisionTransformer(ViTConfig(48, 3, 3, patch_size=8, image_size=64, registers=2, layer_scale=0.5))
crops, masks = [torch.randn(4, 1, 64, 64), torch.randn(6, 1, 32, 32)], [torch.rand(4, 64) < 0.3, None]

def step():
    model.zero_grad()
    outputs = model.forward_crops(crops, masks, 0.4, torch.Generator().manual_seed(0))
    sum(tokens.cls.square().mean() + tokens.patches.abs().mean() for tokens in outputs).backward()
    student = [tokens.cls.detach() for tokens in outputs] + [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        return [*student, *model(crops[0])]

plain, names = step(), list(model.state_dict())
counter = CompileCounterWithBackend("aot_eager")
model.compile_blocks(counter)
for _ in range(3):
    compiled = step()
for ours, expected in zip(compiled, plain, strict=True):
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
assert list(model.state_dict()) == names
with torch.compiler.set_stance("force_eager"), torch.no_grad():
    model(torch.randn(1, 1, 32, 32))
print(counter.frame_count)
"""


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_in_one_graph_per_kind_of_call() -> None:
    """In a process of its own: the annotations that tests check would break the graphs."""
    done = subprocess.run([sys.executable, "-c", COMPILED], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"  # student and teacher; every block and every step uses the same two
