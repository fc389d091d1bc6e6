"""Under bf16 the tokens and the products over them are rounded; what orders the images, the logits, is not."""

import numpy as np
import pytest
import torch

from hilum.core.seeding import forked
from hilum.heads.features import Features
from hilum.heads.registry import HeadConfig, build_head

IMAGES = 3000
SMALL = {"decoder_dim": 8, "decoder_feed_forward": 16, "decoder_heads": 2}


def _features() -> Features:
    drawn = torch.Generator().manual_seed(0)
    cls = torch.randn(IMAGES, 24, generator=drawn)
    patches = torch.randn(IMAGES, 4, 24, generator=drawn)
    return Features(cls, patches.mean(dim=1), patches, (2, 2))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("linear", {}),
        ("linear", {"patch_mean": True}),
        ("csra", {}),
        ("ml_decoder", SMALL),
        ("ml_decoder", SMALL | {"query_groups": 2}),
        ("ml_decoder", SMALL | {"cat_cls": True}),
    ],
    ids=str,
)
def test_logits_of_rare_findings_do_not_tie(name: str, settings: dict) -> None:
    """At a logit of -6 the steps of bfloat16 are 1/32: a few hundred values for any number of images."""
    with forked(0, "precision"):
        head = build_head(HeadConfig(name, 24, 5, blocks=1, **settings)).eval()
    head.bias.data.fill_(-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(_features())
    assert logits.dtype == torch.float32
    distinct = [len(np.unique(column)) for column in logits.T.numpy()]
    assert min(distinct) > 0.95 * IMAGES
    with torch.no_grad():
        exact = head(_features())
    assert (logits - exact).abs().max() < 0.05 * exact.std()
