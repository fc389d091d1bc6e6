"""Tuning: low-rank updates are what their paper says, rates fall layer by layer, frozen means frozen."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.config import from_dict
from hilum.core.errors import ConfigError
from hilum.core.seeding import forked, torch_stream
from hilum.heads import sweep, tuning
from hilum.heads.features import FeatureSource, freeze
from hilum.heads.linear import LinearHead
from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.tune_settings import TuneSettings
from hilum.heads.tuning import LowRankLinear, merge, parameter_groups, unfreeze, warm_cosine


@pytest.fixture
def backbone() -> VisionTransformer:
    with forked(0, "test"):
        return freeze(VisionTransformer(ViTConfig(12, 3, 2, patch_size=8, image_size=16, layer_scale=1.0)))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_an_update_is_the_product_of_two_maps_scaled() -> None:
    with forked(0, "test"):
        update = LowRankLinear(nn.Linear(5, 7), rank=2, alpha=6.0, dropout=0.0, generator=torch.Generator())
        update.up.data.normal_()
    inputs = torch.randn(4, 3, 5)
    weight, bias = update.linear.weight.detach().double().numpy(), update.linear.bias.detach().double().numpy()
    whole = weight + 3.0 * update.up.detach().double().numpy() @ update.down.detach().double().numpy()
    expected = inputs.double().numpy() @ whole.T + bias
    assert np.allclose(update(inputs).detach().numpy(), expected, atol=1e-5)
    assert np.allclose(update.merged()(inputs).detach().numpy(), expected, atol=1e-5)


def test_updates_change_nothing_at_first_and_merge_into_an_ordinary_backbone(backbone: VisionTransformer) -> None:
    before = backbone(images()).patches
    tuned = unfreeze(backbone, TuneSettings("lora", rank=2), seed=0, phase="tune")
    assert torch.equal(tuned(images()).patches, before)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith((".up", ".down")):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    merged = merge(tuned)
    assert torch.allclose(merged(images()).patches, tuned(images()).patches, atol=1e-5)
    assert not torch.allclose(merged(images()).patches, before, atol=1e-3)
    assert {n: v.shape for n, v in merged.state_dict().items()} == {
        n: v.shape for n, v in backbone.state_dict().items()
    }
    assert torch.equal(backbone(images()).patches, before)  # the original is not touched
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize(("method", "expected"), [
    ("lora", {f"blocks.{i}.attn.{n}.{p}" for i in range(3) for n in ("qkv", "proj") for p in ("down", "up")}),
    ("blocks", {"norm.weight", "norm.bias"}),
    ("full", {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}),
])  # fmt: skip
def test_what_asks_for_gradients(backbone: VisionTransformer, method: str, expected: set[str]) -> None:
    tuned = unfreeze(backbone, TuneSettings(method, blocks=1), seed=0, phase="tune")  # type: ignore[arg-type]
    asks = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert expected <= asks
    if method == "blocks":
        assert {name.split(".")[1] for name in asks if name.startswith("blocks.")} == {str(backbone.config.depth - 1)}
        assert not any(name.startswith(("patch_embed", "pos_embed", "cls_token")) for name in asks)
    if method == "lora":
        assert all(name.endswith((".down", ".up")) for name in asks)
    assert "mask_token" not in asks
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_rates_fall_from_the_top_of_the_backbone_to_the_pixels(backbone: VisionTransformer) -> None:
    settings = TuneSettings("full", learning_rate=1e-3, layer_decay=0.5, head_learning_rate=0.1, weight_decay=0.2)
    tuned = unfreeze(backbone, settings, seed=0, phase="tune")
    rates = {}
    for group in parameter_groups(tuned, LinearHead(12, 1, 3), settings):
        for name in group["names"]:
            assert name not in rates
            rates[name] = group["rate"]
            decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
            assert group["weight_decay"] == (0.2 if decays else 0.0)
    depth = backbone.config.depth
    assert rates["head.linear.weight"] == 0.1
    assert rates["backbone.norm.weight"] == pytest.approx(1e-3)
    for block in range(depth):
        assert rates[f"backbone.blocks.{block}.attn.qkv.weight"] == pytest.approx(1e-3 * 0.5 ** (depth - block))
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(1e-3 * 0.5 ** (depth + 1))


def test_no_bias_of_a_decoder_decays_whatever_its_name(backbone: VisionTransformer) -> None:
    """Their names end in _bias too: of the attention's projection in, and of the output rows."""
    head = build_head(HeadConfig("ml_decoder", 12, 3, 1, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2))
    groups = parameter_groups(unfreeze(backbone, TuneSettings("lora"), 0, "x"), head, TuneSettings("lora"))
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    biases = [name for name in decays if "bias" in name.rpartition(".")[2]]
    assert {name.rpartition(".")[2] for name in biases} == {"bias", "in_proj_bias", "duplicate_pooling_bias"}
    assert not any(decays[name] for name in biases)
    assert decays["head.decoder.duplicate_pooling"] > 0


def test_dropout_is_drawn_on_the_very_device_that_was_asked_for(backbone: VisionTransformer, monkeypatch) -> None:
    """cuda:1 is not cuda: a generator of another device cannot be drawn from there."""
    asked = []

    def watched(root: int, *names: str | int, device: str = "cpu") -> torch.Generator:
        asked.append((names[0], device))
        return torch_stream(root, *names, device=device)

    for module in (sweep, tuning):
        monkeypatch.setattr(module, "torch_stream", watched)
    sweep.Sweep([(HeadConfig("linear", 12, 3, 1), 0.1)], 1, device="cpu:0")
    settings = TuneSettings("lora")
    source = Mock(FeatureSource, device=torch.device("cpu:0"))
    tuned = unfreeze(backbone, settings, 0, "x")
    tuning.Tuner(settings, tuned, LinearHead(12, 1, 3), 1, source, 1, precision="fp32", seed=0, phase="x")
    # a tensor of cpu:0 says that it is on cpu, so of the low-rank updates this tells nothing
    assert asked == [("head dropout", "cpu:0"), ("low-rank dropout", "cpu"), ("tuning dropout", "cpu:0")]


def test_dropout_of_updates_follows_its_stream_and_only_in_training(backbone: VisionTransformer) -> None:
    update = LowRankLinear(nn.Linear(64, 8), 4, 4.0, 0.5, torch_stream(0, "low-rank dropout", "x"))
    update.up.data.fill_(1.0)
    inputs = torch.ones(2, 64)
    update.eval()
    assert torch.equal(update(inputs), update(inputs))
    update.train()
    torch.manual_seed(1)
    first = update(inputs)
    state = torch.get_rng_state()
    second = update(inputs)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not drawn from
    assert not any(module.training for module in unfreeze(backbone, TuneSettings("lora"), 0, "x").modules())


def test_rates_warm_up_and_follow_a_cosine_to_zero() -> None:
    factors = [warm_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert warm_cosine(0, 1, 0.0) == 1.0


@pytest.mark.parametrize("values", [
    {"rank": 0}, {"epochs": 0}, {"learning_rate": 0}, {"layer_decay": -1}, {"dropout": 1}, {"warmup": 1}, {"clip": -1},
])  # fmt: skip
def test_impossible_settings_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match="tune"):
        from_dict(TuneSettings, values)


def test_more_blocks_than_there_are_is_an_error(backbone: VisionTransformer) -> None:
    with pytest.raises(ConfigError, match=r"tune.blocks: 9 of a backbone that has \d"):
        unfreeze(backbone, TuneSettings("blocks", blocks=9), 0, "tune")
