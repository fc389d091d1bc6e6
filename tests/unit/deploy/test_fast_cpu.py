"""The faster bf16 backbone says what autocast says, to rounding, and is used only where it is asked for."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.seeding import forked, torch_stream
from hilum.deploy import fast_cpu, predictor
from hilum.deploy.fast_cpu import fast_backbone


def backbone_of(feed_forward: str) -> VisionTransformer:
    with forked(0, "test"):
        model = VisionTransformer(
            ViTConfig(128, 3, 2, patch_size=8, image_size=32, registers=2, feed_forward=feed_forward)
        )
    generator = torch_stream(0, "redrawn")
    for name, parameter in model.named_parameters():
        spread = 0.2 if parameter.dim() != 2 else parameter.shape[1] ** -0.5
        gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(gain))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("tiles", [False, True], ids=["plain attention", "fused attention"])
@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_tokens_are_those_of_float32_to_rounding(
    feed_forward: str, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel gives the same on a processor for which it is not chosen."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    model = backbone_of(feed_forward)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = fast_backbone(model)
    if fast is None:
        pytest.skip("this torch or CPU has no packed bfloat16 products")
    assert fast.blocks[0].attn.fused is tiles
    images = torch.randn(5, 1, 48, 32, generator=torch_stream(0, "images"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, plain = fast.intermediate(images, 2), model.intermediate(images, 2)
    with torch.no_grad():
        exact = model.intermediate(images, 2)
    for one, autocast, right in zip(found, plain, exact, strict=True):
        for name in ("cls", "registers", "patches"):
            a, b, c = (getattr(tokens, name).float() for tokens in (one, autocast, right))
            assert F.cosine_similarity(a, c, dim=-1).min() > 0.999
            assert (a - c).abs().mean() < 2 * (b - c).abs().mean() + 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_result_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone_of("mlp")
    if fast_backbone(model) is None:
        pytest.skip("this torch or CPU has no packed bfloat16 products")
    real = fast_cpu._packed

    def wrong(*arguments):
        fast = real(*arguments)
        fast.blocks[0].mlp[0].after = ("none", "")  # GELU forgotten
        return fast

    monkeypatch.setattr(fast_cpu, "_packed", wrong)
    assert fast_backbone(model) is None

    def absent(*arguments):
        raise AttributeError("no such operator")

    monkeypatch.setattr(fast_cpu, "_packed", absent)
    assert fast_backbone(model) is None


def test_it_is_used_only_where_precision_is_asked_for(fitted: Path) -> None:
    for precision, wanted in ((None, False), ("fp32", False), ("bf16", True)):
        [network] = predictor.load(fitted / "decoder", "cpu", precision=precision).networks
        used = network.reads_with is not network.backbone
        assert not used or wanted
        assert used == network.speed_up()
