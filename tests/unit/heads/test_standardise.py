from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.core.seeding import forked
from hilum.heads.features import Features
from hilum.heads.registry import VIEWS_OF_HEADS, HeadConfig, build_head
from hilum.heads.standardise import measure
from hilum.heads.sweep import Sweep, prior_log_odds

DIM, BLOCKS, IMAGES, GRID = 8, 2, 12, (3, 2)


def features(seed: int, patches: bool = True) -> Features:
    """Channels of very different mean and size, one of them constant."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, DIM)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, DIM, generator=generator) * sizes + 5 * sizes
        values[..., 3] = 0.7
        return values

    cls = torch.cat([draw(IMAGES) for _ in range(BLOCKS)], dim=1)
    tokens = torch.cat([draw(IMAGES, GRID[0] * GRID[1]) for _ in range(BLOCKS)], dim=2)
    study, view = torch.arange(IMAGES) // 3, torch.arange(IMAGES) % 4
    return Features(cls, draw(IMAGES), tokens if patches else None, GRID, study, view)


def test_statistics_are_those_of_all_images_and_positions() -> None:
    parts = [features(0), features(1)]
    measured = measure(parts)
    for kind, scale in enumerate(measured):
        assert scale is not None
        values = torch.cat([part[kind].flatten(0, -2) for part in parts]).double().numpy()
        expected = values.std(axis=0)
        np.testing.assert_allclose(scale.mean, values.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(scale.deviation, np.where(expected < 1e-4, 1.0, expected), rtol=1e-5)
    standard = measured.apply(parts[0])
    assert standard.grid == GRID
    assert standard.cls[:, 3].abs().max() < 1e-5


OPTIONS = (
    {}, {"cat_cls": True}, {"decoder_layers": 2, "positions": "sincos"}, {"query_groups": 2, "cat_cls": True},
    {"cls_memory": True}, {"attention_temperature": True}, {"pyramid": True}, {"shared_output": True, "cat_cls": True},
    {"text_dim": 4},
)  # fmt: skip
CONFIGS = [
    *(
        HeadConfig("linear", DIM, 3, BLOCKS, patch_mean=patch_mean, views=views)
        for patch_mean in (False, True)
        for views in VIEWS_OF_HEADS["linear"]
    ),
    *(
        HeadConfig("ml_decoder", DIM, 3, BLOCKS, decoder_dim=8, decoder_feed_forward=8, decoder_heads=2, views=views)
        for views in VIEWS_OF_HEADS["ml_decoder"]
    ),
    *(
        HeadConfig("csra", DIM, 3, BLOCKS, views=views, csra_lambda=0.5, csra_temperatures=(1.0, 2.0, 99.0))
        for views in VIEWS_OF_HEADS["csra"]
    ),
]
CONFIGS = [
    *(config for config in CONFIGS if config.name != "ml_decoder"),
    *(
        replace(config, **options)
        for config in CONFIGS
        if config.name == "ml_decoder"
        for options in OPTIONS
        if not (config.views == "attention" and "shared_output" in options)
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_folded_head_says_of_raw_features_what_it_said_of_standardised_ones_and_can_be_unfolded(
    config: HeadConfig,
) -> None:
    with forked(0, "head"):
        head = build_head(config, torch.randn(3, config.text_dim) if config.text_dim else None).eval()
        for parameter in head.parameters():
            parameter.data.normal_()
    measured = measure([features(0)])
    seen = features(2)
    with torch.no_grad():
        before = head(measured.apply(seen))
        head.absorb(measured)
        after = head(seen)
        head.absorb(measured.inverse)
        again = head(measured.apply(seen))
    assert before.std() > 0.02
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again, before, rtol=1e-3, atol=1e-3)


def test_features_without_patches_are_left_without() -> None:
    measured = measure([features(0, patches=False)])
    assert measured.patches is None
    assert measured.apply(features(0)).patches is None


def test_prior_log_odds_count_known_labels_only() -> None:
    labels = np.array([[1, -1], [0, -2], [0, 0], [0, -1]], np.int8)
    expected = [np.log(1.5 / 3.5), np.log(0.5 / 1.5)]
    np.testing.assert_allclose(prior_log_odds(labels), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("linear", "linear.bias"), ("ml_decoder", "decoder.duplicate_pooling_bias"), ("csra", "bias")],
)
def test_heads_start_from_the_prior(name: str, tensor: str) -> None:
    config = HeadConfig(name, DIM, 2, BLOCKS, decoder_dim=8, decoder_feed_forward=8, decoder_heads=2)  # type: ignore[arg-type]
    bias = torch.tensor([-2.0, 1.0])
    sweep = Sweep([(config, 1e-3)], 1, bias=bias)
    assert torch.equal(sweep.state(0)[tensor], bias)
    start = Sweep([(config, 1e-3)], 1, bias=bias, initial=Sweep([(config, 1e-3)], 1).state(0))
    assert torch.equal(start.state(0)[tensor], torch.zeros(2))
