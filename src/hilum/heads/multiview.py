"""Decoder over all images of a study: one memory of all their patches, one answer."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hilum.core.types import VIEW_KINDS
from hilum.heads.decoder_parts import DropoutMasks
from hilum.heads.features import Features
from hilum.heads.ml_decoder import Masks, MLDecoder
from hilum.heads.study_sets import first_of_study, same_study


class MultiViewDecoder(MLDecoder):
    """A decoder whose memory is the tokens of all images of the study, each with an embedding of its kind of view.

    Every image of a study gets the study's logits. [CLS], where it is put before the outputs, is the mean over the
    study. With one image to a study and view embeddings of zero (where they start) it is `MLDecoder`.

    The memory is never padded to the largest study (`decoder_parts.CrossAttention`). What a step holds grows with the
    images of the batch as in a single-view decoder: B·A·Q·N attention weights, in prediction too; beside them B·B·A·Q
    shares of images in their studies.

    Args:
        embed_dim: D, channels of a backbone token.
        blocks: n, how many last blocks' tokens are concatenated on channels.
        findings: C, outputs.
        **settings: as `MLDecoder`.

    Raises:
        ConfigError: as `MLDecoder`.
    """

    needs_studies = True

    def __init__(self, embed_dim: int, blocks: int, findings: int, **settings: Any) -> None:
        super().__init__(embed_dim, blocks, findings, **settings)
        self.view_embed = nn.Embedding(len(VIEW_KINDS), self.shape[1])
        nn.init.zeros_(self.view_embed.weight)

    def draw_masks(self, features: Features, generator: torch.Generator) -> Masks | None:
        """Dropout masks for one step: of a study's queries the same in all its images, of attention for each token."""
        masks = super().draw_masks(features, generator)
        if masks is None:
            return None
        assert features.study is not None, "the multi-view decoder needs features.study"
        study = features.study
        layers = tuple(
            DropoutMasks(
                *(
                    mask if name == "attention" else mask[study]  # studies are fewer than images
                    for name, mask in layer._asdict().items()
                )
            )
            for layer in ((masks,) if isinstance(masks, DropoutMasks) else masks)
        )
        return layers[0] if len(layers) == 1 else layers

    def forward(self, features: Features, masks: Masks | None = None) -> Float[Tensor, "B C"]:
        """Logits of each image's study, float32; the same numbers in each of its rows."""
        same, views = self._studies(features)
        return self.decoder(features, masks, same, views).float()[first_of_study(same)]

    def pooled(self, features: Features) -> Float[Tensor, "B C D"]:
        """What each finding's query has taken from the study of each image, before the finding's weights."""
        same, views = self._studies(features)
        return self.decoder.spread(self.decoder.outputs(features, None, same, views)).float()[first_of_study(same)]

    def attention(self, features: Features) -> Float[Tensor, "B C h w"]:
        """Where each finding's query looks in each image; the maps of a study's images sum to 1 together."""
        same, views = self._studies(features)
        return self.decoder.weights(features, same, views).unflatten(-1, features.grid)

    def _studies(self, features: Features) -> tuple[Bool[Tensor, "B B"], Float[Tensor, "B D"]]:
        assert features.view is not None, "the multi-view decoder needs features.view"
        return same_study(features), self.view_embed(features.view)
