"""Attention over the images of a study, around every head."""

import pytest
import torch
from torch import nn

from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.view_attention import ViewAttention

STUDY, VIEW = [0, 1, 0, 2, 1, 0, 3], [0, 2, 2, 1, 3, 1, 0]
CONFIGS = {
    "linear": HeadConfig("linear", 6, 5, 2, patch_mean=True, views="attention"),
    "csra": HeadConfig("csra", 6, 5, 2, views="attention"),
    "ml_decoder": HeadConfig(
        "ml_decoder", 6, 5, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2, views="attention"
    ),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: HeadConfig, start: bool = False) -> ViewAttention:
    torch.manual_seed(1)
    head = build_head(config)
    assert isinstance(head, ViewAttention)
    if not start:
        nn.init.normal_(head.scores.weight)
        nn.init.normal_(head.view_embed.weight)
    return head


@EACH
def test_logits_are_means_of_the_images_weighted_by_softmax_in_float64(make_features, config) -> None:
    head, features = make(config), make_features(7, study=STUDY, view=VIEW)
    inner = head.inner(features).detach().double()
    hidden = torch.tanh(
        features.cls.double() @ head.embed_cls.weight.double().T
        + head.embed_cls.bias.double()
        + head.view_embed.weight.double()[VIEW]
    )
    scores = (hidden @ head.scores.weight.double().T).detach()
    weights = head.view_weights(features).detach()
    logits = head(features).detach()
    for number in set(STUDY):
        images = [place for place, one in enumerate(STUDY) if one == number]
        for finding in range(5):
            share = torch.softmax(scores[images, finding], dim=0)
            expected = float(share @ inner[images, finding])
            assert logits[images, finding].tolist() == pytest.approx([expected] * len(images), abs=1e-5)
            assert len(set(logits[images, finding].tolist())) == 1
            assert weights[images, finding].tolist() == pytest.approx(share.tolist(), abs=1e-6)


@EACH
def test_it_starts_as_the_mean_and_an_image_alone_keeps_its_logits(make_features, config) -> None:
    features = make_features(7, study=STUDY, view=VIEW)
    start = make(config, start=True)
    inner = start.inner(features)
    torch.testing.assert_close(start(features)[1], (inner[1] + inner[4]) / 2)
    assert torch.equal(make(config)(features)[[3, 6]], make(config).inner(features)[[3, 6]])


@EACH
def test_maps_of_a_study_sum_to_one_together(make_features, config) -> None:
    head, features = make(config), make_features(7, study=STUDY, view=VIEW)
    if config.name == "linear":
        assert head.attention is None
        return
    maps = head.attention(features)
    assert maps.shape == (7, 5, 3, 4)
    totals = torch.stack(
        [maps[[i for i, one in enumerate(STUDY) if one == number]].sum(dim=(0, 2, 3)) for number in range(4)]
    )
    torch.testing.assert_close(totals, torch.ones(4, 5))


@EACH
def test_other_studies_and_order_do_not_matter_and_the_second_view_does(make_features, only, config) -> None:
    """Defect C9."""
    head, features = make(config), make_features(7, study=STUDY, view=VIEW)
    logits = head(features)
    order = [5, 3, 1, 0, 6, 2, 4]
    turned = only(features, order)._replace(study=torch.tensor([3, 2, 0, 1])[features.study[order]])
    torch.testing.assert_close(head(turned), logits[order], atol=1e-6, rtol=1e-6)
    changed = features._replace(
        cls=features.cls.clone(), patches=features.patches.clone(), patch_mean=features.patch_mean.clone()
    )
    for part in changed[:3]:
        part[4] += 1
    moved = (head(changed) - logits).abs().amax(dim=1)
    assert moved[[1, 4]].min() > 1e-3
    assert moved[[0, 2, 3, 5, 6]].max() < 1e-6


def test_dropout_is_that_of_the_inner_head(make_features) -> None:
    head, features = make(CONFIGS["ml_decoder"]), make_features(7, study=STUDY, view=VIEW)
    head.train()
    first = head(features)
    assert torch.equal(first, head(features))
    dropped = head(features, head.draw_masks(features, torch.Generator().manual_seed(0)))
    assert (dropped - first).abs().max() > 1e-3
