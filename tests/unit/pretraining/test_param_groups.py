"""Which parameter gets which rate, against the published rules applied by hand."""

import pytest
import torch

from hilum.backbones.layer_rates import layer_multiplier, takes_weight_decay
from hilum.backbones.vit import ViTConfig
from hilum.pretraining.dinov2 import HeadConfig, Network, make_networks
from hilum.pretraining.param_groups import parameter_groups, set_values
from hilum.pretraining.schedules import Values

TINY = ViTConfig(8, 3, 2, patch_size=4, image_size=16, registers=2, feed_forward="swiglu")
HEADS = HeadConfig(prototypes=6, hidden=5, dino_bottleneck=4, ibot_bottleneck=3)


@pytest.fixture
def student() -> Network:
    return make_networks(TINY, HEADS, seed=0)[0]


def test_every_parameter_is_in_exactly_one_group_under_its_name(student: Network) -> None:
    groups = parameter_groups(student, TINY.depth, 0.9, 0.2)
    found = [(name, id(p)) for group in groups for name, p in zip(group["names"], group["params"], strict=True)]
    assert sorted(found) == sorted((name, id(parameter)) for name, parameter in student.named_parameters())


def test_layers_decay_from_the_top(student: Network) -> None:
    expected = {
        "cls_token": 0.9**4, "pos_embed": 0.9**4, "mask_token": 0.9**4, "register_tokens": 0.9**4,
        "patch_embed.proj.weight": 0.9**4, "blocks.0.attn.qkv.weight": 0.9**3, "blocks.2.ls1.gamma": 0.9,
        "norm.weight": 1.0,
    }  # fmt: skip
    for name, factor in expected.items():
        assert layer_multiplier(name, 3, 0.9) == pytest.approx(factor)
    factors = {
        name: group["learning_rate_factor"]
        for group in parameter_groups(student, TINY.depth, 0.9, 0.2)
        for name in group["names"]
    }
    assert factors["backbone.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.9**4)
    assert factors["backbone.patch_embed.proj.bias"] == pytest.approx(0.2 * 0.9**4)
    assert factors["backbone.blocks.1.mlp.w12.weight"] == pytest.approx(0.9**2)
    assert {factor for name, factor in factors.items() if "head" in name} == {1.0}


def test_what_weight_decay_leaves_alone(student: Network) -> None:
    decayed = {name for name, _ in student.named_parameters() if takes_weight_decay(name)}
    assert {f"backbone.{name}" for name in ("cls_token", "pos_embed", "register_tokens", "mask_token")} <= decayed
    assert {"dino_head.last_layer.weight_g", "ibot_head.last_layer.weight_v", "dino_head.mlp.0.weight"} <= decayed
    left = {name for name, _ in student.named_parameters()} - decayed
    assert left == {
        name for name, _ in student.named_parameters() if name.endswith(("bias", "gamma")) or ".norm" in name
    }


def test_values_of_a_step_reach_the_groups(student: Network) -> None:
    groups = parameter_groups(student, TINY.depth, 0.5, 0.2)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_values(optimizer, Values(1e-2, 1e-2, 0.0, 0.1, 0.99, 0.04))
    by_name = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert by_name["dino_head.last_layer.weight_v"]["lr"] == 0.0
    assert by_name["dino_head.mlp.0.weight"]["lr"] == 1e-2
    assert by_name["backbone.blocks.2.attn.proj.weight"]["lr"] == pytest.approx(5e-3)
    assert by_name["backbone.blocks.2.attn.proj.weight"]["weight_decay"] == 0.1
    assert by_name["backbone.norm.weight"]["weight_decay"] == 0.0
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer.step()
    still = {name for name, parameter in student.named_parameters() if torch.equal(before[name], parameter)}
    assert still == {f"{head}.last_layer.weight_{part}" for head in ("dino_head", "ibot_head") for part in "gv"}


def test_while_heads_warm_up_the_backbone_stays(student: Network) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(student, TINY.depth, 0.8, 0.2), lr=0.0)
    set_values(optimizer, Values(1e-2, 0.0, 1e-2, 0.1, 0.99, 0.04))
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer.step()
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == {name for name, _ in student.named_parameters() if not name.startswith("backbone.")}
