import dataclasses

import pytest
import torch
from torch import nn

from hilum.core.errors import ConfigError
from hilum.core.seeding import forked
from hilum.core.types import VIEW_KINDS
from hilum.heads.decoupling import classifier_parameters
from hilum.heads.registry import VIEWS_OF_HEADS, HeadConfig, build_head
from hilum.heads.sources import SourceBiased

SMALL = HeadConfig("linear", 6, 4, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2)
EVERY = pytest.mark.parametrize(("name", "views"), [(name, view) for name, kinds in VIEWS_OF_HEADS.items()
                                                    for view in kinds])  # fmt: skip


def build(name: str, views: str) -> nn.Module:
    with forked(0, "test"):
        return build_head(dataclasses.replace(SMALL, name=name, views=views))


@EVERY
def test_the_classifier_of_every_head_is_known(name: str, views: str) -> None:
    head = build(name, views)
    parameters = dict(head.named_parameters())
    names = classifier_parameters(head)
    assert len(set(names)) == len(names)
    assert set(names) <= parameters.keys()
    assert any(parameters[name] is head.bias for name in names)
    if name == "ml_decoder":
        assert {name.rpartition(".")[2] for name in names} == {"duplicate_pooling", "duplicate_pooling_bias"}
    elif views != "attention":
        assert set(names) == parameters.keys()
    wrapped = SourceBiased(head, 3)
    assert classifier_parameters(wrapped) == ["source_bias", *(f"head.{name}" for name in names)]
    assert set(classifier_parameters(wrapped)) <= dict(wrapped.named_parameters()).keys()


@EVERY
def test_what_is_left_does_not_depend_on_the_classifier(make_features, name: str, views: str) -> None:
    """With the classifier at zero there are no scores: it is everything between the representation and them."""
    head = build(name, views)
    features = make_features(4)._replace(study=torch.tensor([0, 0, 1, 1]), view=torch.arange(4) % len(VIEW_KINDS))
    assert head(features).any()
    with torch.no_grad():
        for parameter in classifier_parameters(head):
            head.get_parameter(parameter).zero_()
    assert not head(features).any()


def test_a_head_of_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="classifier of a Identity"):
        classifier_parameters(nn.Identity())
