"""Every head with every option trains beside others as it trains alone, batched or not."""

from dataclasses import replace

import pytest
import torch

from hilum.heads.registry import VIEWS_OF_HEADS, HeadConfig, build_head
from hilum.heads.sweep import Sweep

BASE = HeadConfig("ml_decoder", 6, 5, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2)
OPTIONS = (
    {"decoder_layers": 2}, {"query_groups": 2, "cat_cls": True}, {"text_dim": 7, "shared_output": True},
    {"cls_memory": True, "positions": "sincos", "attention_temperature": True, "pyramid": True},
)  # fmt: skip
CONFIGS = [
    *(replace(BASE, name=name, views=views) for name, choices in VIEWS_OF_HEADS.items() for views in choices),
    *(replace(BASE, views=views, **options) for views in ("single", "memory") for options in OPTIONS),
    replace(BASE, name="csra", csra_temperatures=(1.0, 2.0, 99.0)),
]
STUDY, VIEW = [0, 1, 0, 2, 1, 0, 3], [0, 2, 2, 1, 3, 1, 0]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_two_rates_together_are_two_rates_alone(make_features, config: HeadConfig) -> None:
    text = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) if config.text_dim else None

    def sweep(rates: tuple[float, ...], way: str) -> Sweep:
        return Sweep([(config, rate) for rate in rates], 3, way=way, build=lambda one: build_head(one, text))

    rates = (1e-3, 1e-2)
    both = [sweep(rates, "together"), sweep(rates, "in turn"), *(sweep((rate,), "in turn") for rate in rates)]
    for step in range(2):
        features = make_features(7, seed=step, study=STUDY, view=VIEW)
        labels = torch.randint(-2, 2, (7, 5), generator=torch.Generator().manual_seed(step)).to(torch.int8)
        together, turn, low, high = ([float(loss) for loss in one.step(features, labels)] for one in both)
        assert together == pytest.approx(low + high, rel=1e-5)
        assert turn == low + high
    logits = [one.logits(features) for one in both]
    torch.testing.assert_close(logits[0], torch.cat(logits[2:]), atol=2e-5, rtol=1e-4)
    assert torch.equal(logits[1], torch.cat(logits[2:]))
