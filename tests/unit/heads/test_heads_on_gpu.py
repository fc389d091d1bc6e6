"""Heads and losses on a GPU say and learn what they do on the CPU."""

from dataclasses import replace

import pytest
import torch

from hilum.heads.features import Features
from hilum.heads.frequencies import Frequencies
from hilum.heads.loss_settings import LossSettings
from hilum.heads.losses import LOSSES, Targets, build_loss
from hilum.heads.registry import VIEWS_OF_HEADS, HeadConfig, build_head

BASE = HeadConfig("ml_decoder", 32, 9, 2, decoder_dim=64, decoder_feed_forward=96, decoder_heads=4)
CONFIGS = [
    *(replace(BASE, name=name, views=views) for name, choices in VIEWS_OF_HEADS.items() for views in choices),
    *(
        replace(BASE, views=views, decoder_layers=2, cat_cls=True, cls_memory=True, positions="sincos",
                attention_temperature=True, pyramid=True)
        for views in ("single", "memory")
    ),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logits_gradients_and_maps_are_those_of_the_cpu(make_features, config: HeadConfig) -> None:
    features = make_features(
        11, 32, 2, (8, 8), study=[0, 1, 0, 2, 1, 0, 3, 4, 4, 5, 4], view=[0, 2, 2, 1, 3, 1, 0] + [1] * 4
    )
    torch.manual_seed(0)
    head = build_head(config)
    there = build_head(config).cuda()
    there.load_state_dict(head.state_dict())
    moved = Features(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in features))
    masks = head.draw_masks(features, torch.Generator().manual_seed(0))
    carried = torch.utils._pytree.tree_map(lambda part: part.cuda() if isinstance(part, torch.Tensor) else part, masks)
    for ours, theirs in ((None, None), (masks, carried)):
        expected, found = head(features, ours), there(moved, theirs)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
        for logits, module in ((expected, head), (found, there)):
            module.zero_grad()
            logits.square().sum().backward()
        for one, other in zip(head.parameters(), there.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad.cpu(), one.grad, atol=1e-3, rtol=1e-3)
    if getattr(head, "attention", None) is not None:
        torch.testing.assert_close(there.attention(moved).cpu(), head.attention(features), atol=1e-5, rtol=1e-4)
    drawn = there.draw_masks(moved, torch.Generator("cuda").manual_seed(0))
    assert torch.isfinite(there(moved, drawn)).all()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.isfinite(there(moved, drawn)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_slopes_are_those_of_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(256, 3, generator=generator)
    targets, weights = torch.rand(256, 3, generator=generator), torch.rand(256, 3, generator=generator)
    weights[weights < 0.5] = 0  # unknown
    counts = Frequencies(torch.tensor([900.0, 40.0, 3.0]), torch.tensor([100.0, 960.0, 497.0]))
    values, slopes = [], []
    for device in ("cpu", "cuda"):
        moved = logits.to(device, copy=True).requires_grad_()
        cost = build_loss(LossSettings(name), counts.to(device))(moved, Targets(targets.to(device), weights.to(device)))
        cost.backward()
        values.append(cost.item())
        slopes.append(moved.grad.cpu())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-6)
    assert not slopes[1][weights == 0].any()
