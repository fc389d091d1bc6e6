"""Two-stage training ("cRT", Kang 2020, arXiv 1910.09217): representation first, then the classifier once more.

First everything learns from images as they come; then what turns a representation into scores learns alone, from images
of rare findings drawn more often. What the classifier is depends on the head. Kang starts it anew for the second stage;
whoever calls may do so or go on.
"""

from torch import nn

from hilum.core.errors import ConfigError
from hilum.heads.csra import CSRAHead
from hilum.heads.linear import LinearHead
from hilum.heads.ml_decoder import MLDecoder
from hilum.heads.sources import SourceBiased
from hilum.heads.view_attention import ViewAttention


def classifier_parameters(head: nn.Module) -> list[str]:
    """Names, as in `head.named_parameters()`, of what the second stage trains.

    Linear and CSRA: everything, since the representation is the frozen backbone's. ML-Decoder, for one image or a
    study: the weights and bias of each finding. Attention over views: those of the head inside. Biases by dataset
    belong to the classifier.

    Raises:
        ConfigError: a head of another kind.
    """
    if isinstance(head, SourceBiased):
        return ["source_bias", *(f"head.{name}" for name in classifier_parameters(head.head))]
    if isinstance(head, ViewAttention):
        return [f"inner.{name}" for name in classifier_parameters(head.inner)]
    if isinstance(head, MLDecoder):
        return ["decoder.duplicate_pooling", "decoder.duplicate_pooling_bias"]
    if isinstance(head, LinearHead | CSRAHead):
        return [name for name, _ in head.named_parameters()]
    raise ConfigError(f"What the classifier of a {type(head).__name__} is, is not said; see heads/decoupling.py.")
