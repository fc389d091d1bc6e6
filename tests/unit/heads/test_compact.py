"""Reduced, rounded tokens, and heads that lose the reduction again."""

import pytest
import torch

from hilum.core.errors import ConfigError
from hilum.heads.candidates import grid
from hilum.heads.compact import fit_reduction
from hilum.heads.features import Features
from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.sweep import Sweep


def tokens(images: int, seed: int = 0) -> Features:
    """12 channels of which 5 matter, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    hidden = torch.randn(images, 9, 5, generator=generator) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2])
    patches = hidden @ mixing + 0.01 * torch.randn(images, 9, 12, generator=generator) + 3.0
    return Features(torch.zeros(images, 12), torch.zeros(images, 12), patches, (3, 3))


def test_directions_are_those_of_a_singular_value_decomposition() -> None:
    features = [tokens(20, seed) for seed in range(3)]
    reduction = fit_reduction(iter(features), 5)
    whole = torch.cat([one.patches.flatten(0, 1) for one in features]).double()
    _, values, vectors = torch.linalg.svd(whole - whole.mean(dim=0), full_matrices=False)
    products = (reduction.directions.double() * vectors[:5]).sum(dim=1)
    assert torch.allclose(products.abs(), torch.ones(5).double(), atol=1e-4)
    assert reduction.explained == pytest.approx(float(values[:5].square().sum() / values.square().sum()), abs=1e-6)
    assert torch.allclose(reduction.mean.double(), whole.mean(dim=0), atol=1e-5)


def test_what_is_kept_is_close_and_eight_bits() -> None:
    features = tokens(30)
    reduction = fit_reduction([features], 5)
    kept = reduction.keep(features.patches)
    assert kept.values.dtype == torch.int8
    error = kept.tokens() - reduction.apply(features.patches)
    assert (error.abs() <= reduction.steps / 2 + 1e-6).all()
    assert error.square().mean().sqrt() < 0.03 * reduction.apply(features.patches).square().mean().sqrt()
    far = reduction.keep(features.patches * 1e4)
    assert far.values.abs().max() == 127


def test_a_head_loses_the_reduction_exactly() -> None:
    features = tokens(16)
    reduction = fit_reduction([features], 5)
    reduced = features._replace(patches=reduction.apply(features.patches), cls=torch.zeros(16, 5))
    config = HeadConfig("ml_decoder", 5, 3, 1, decoder_dim=8, decoder_feed_forward=8, decoder_heads=2)
    sweep = Sweep(grid([config], [1e-2]), 4)
    for _ in range(3):
        sweep.step(reduced, torch.randint(0, 2, (16, 3), generator=torch.Generator().manual_seed(0)))
    whole = build_head(HeadConfig("ml_decoder", 12, 3, 1, decoder_dim=8, decoder_feed_forward=8, decoder_heads=2))
    whole.load_state_dict(reduction.expand(sweep.state(0), "decoder.embed_standart"))
    with torch.no_grad():
        assert torch.allclose(whole(features), sweep.logits(reduced)[0], atol=1e-5)
    with pytest.raises(ConfigError, match="8 channels"):
        reduction.expand(sweep.state(0), "decoder.layers.0.linear1")


@pytest.mark.parametrize("channels", [0, 13])
def test_what_cannot_be_reduced_is_refused(channels: int) -> None:
    with pytest.raises(ConfigError, match="Cannot reduce"):
        fit_reduction([tokens(2)], channels)
    with pytest.raises(ConfigError, match="0 tokens"):
        fit_reduction([], 2)
