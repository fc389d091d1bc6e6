"""Every description builds the head that it names, or is refused; old descriptions still do."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from hilum.core.config import from_dict, to_dict
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.heads.multiview import MultiViewDecoder
from hilum.heads.registry import HEADS, VIEWS_OF_HEADS, HeadConfig, build_head
from hilum.heads.view_attention import ViewAttention

VIEWS = ("single", "concat", "set", "attention", "memory")
SMALL = {"decoder_dim": 8, "decoder_feed_forward": 12, "decoder_heads": 2}
STUDY, VIEW = [0, 1, 0, 2, 1, 0], [0, 2, 2, 1, 3, 1]


@pytest.mark.parametrize(("name", "views"), list(itertools.product(HEADS, VIEWS)))
def test_the_second_view_matters_or_the_setting_is_refused(make_features, name: str, views: str) -> None:
    """Defect C9: `--multiview` with the decoder read the first view and said nothing."""
    config = HeadConfig(name, 6, 5, 2, views=views, **SMALL)
    if views not in VIEWS_OF_HEADS[name]:
        with pytest.raises(ConfigError, match="would not read the other views"):
            build_head(config)
        return
    torch.manual_seed(0)
    head, features = build_head(config), make_features(6, study=STUDY, view=VIEW)
    assert head.needs_studies == (views != "single")
    logits = head(features)
    other = features._replace(cls=features.cls.clone(), patches=features.patches.clone())
    other.cls[4] += 1
    other.patches[4] += 1
    moved = (head(other) - logits).abs().amax(dim=1)
    assert moved[4] > 1e-4
    assert (moved[1] > 1e-4) == head.needs_studies
    assert moved[[0, 2, 3, 5]].max() < 1e-6
    assert torch.equal(head.train()(features), head.eval()(features))
    if head.needs_studies:
        with pytest.raises(AssertionError, match="study"):
            head(features._replace(study=None))


def test_views_choose_the_module() -> None:
    decoder = HeadConfig("ml_decoder", 6, 5, 2, **SMALL)
    assert isinstance(build_head(replace(decoder, views="memory")), MultiViewDecoder)
    head = build_head(replace(decoder, views="attention"))
    assert isinstance(head, ViewAttention)
    assert head.needs_patches
    assert not build_head(HeadConfig("linear", 6, 5, 2, views="attention")).needs_patches


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "linear", "embed_dim": 192, "findings": 14, "blocks": 4, "patch_mean": true, "decoder_dim": 768,'
        ' "decoder_feed_forward": 2048, "decoder_heads": 8, "dropout": 0.1, "learnable_queries": false,'
        ' "cat_cls": false}',
        '{"name": "ml_decoder", "embed_dim": 6, "findings": 5, "blocks": 1, "patch_mean": false, "decoder_dim": 8,'
        ' "decoder_feed_forward": 12, "decoder_heads": 2, "dropout": 0.1, "learnable_queries": true, "cat_cls": true}',
    ],
)
def test_a_description_from_before_the_options_is_the_head_without_them(content: str) -> None:
    config = from_dict(HeadConfig, json.loads(content), "architecture.head.")
    assert config == HeadConfig(**json.loads(content))
    assert (config.views, config.decoder_layers, config.shared_output) == ("single", 1, False)
    assert from_dict(HeadConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_option_comes_back_from_json() -> None:
    config = HeadConfig(
        "csra", 6, 5, 2, views="attention", decoder_layers=2, query_groups=3, text_dim=4, cls_memory=True,
        positions="sincos", attention_temperature=True, pyramid=True, shared_output=True, csra_lambda=0.3,
        csra_temperatures=(1.0, 99.0),
    )  # fmt: skip
    assert from_dict(HeadConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(UnknownNameError, match="Did you mean 'views'"):
        from_dict(HeadConfig, {**to_dict(config), "view": "set"})


def test_settings_that_do_not_go_together_are_refused() -> None:
    for config, message in (
        (HeadConfig("ml_decoder", 6, 5, 2, views="attention", shared_output=True, **SMALL), "Choose one"),
        (HeadConfig("linear", 6, 0, 2), "at least one finding"),
        (HeadConfig("linear", 6, 5, 2, positions="sincos"), "positions=sincos: a setting of the head ml_decoder"),
        (HeadConfig("csra", 6, 5, 2, decoder_layers=2), "which csra would ignore"),
        (HeadConfig("ml_decoder", 6, 5, 2, csra_lambda=0.2, **SMALL), "choose head=csra"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_head(config)
    with pytest.raises(ConfigError, match="only ml_decoder"):
        build_head(HeadConfig("csra", 6, 5, 2), torch.zeros(5, 3))
