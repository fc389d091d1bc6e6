"""Any head, with the logits of a study's images weighted by learned attention over the images."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hilum.core.types import VIEW_KINDS
from hilum.heads.features import Features
from hilum.heads.standardise import Standardisation, fold
from hilum.heads.study_sets import first_of_study, same_study, shares

HIDDEN = 64
"""Width of the network that scores an image."""


class ViewAttention(nn.Module):
    """Attention over views: for each finding, softmax over the study's images of u_c . tanh(V [CLS] + view embedding).

    After Ilse et al. 2018, "Attention-based deep multiple instance learning", eq. 8, with scores for each finding and
    logits in place of features. Scores start at 0: training starts from the mean of the images' logits. Every image
    of a study gets the study's logits; an image alone keeps its own.

    Args:
        inner: a head for single images.
        memory_dim: n·D, channels of `Features.cls`.
        findings: C, outputs.
    """

    needs_studies = True

    def __init__(self, inner: nn.Module, memory_dim: int, findings: int) -> None:
        super().__init__()
        self.inner: Any = inner
        self.needs_patches: bool = inner.needs_patches  # type: ignore[assignment]
        self.embed_cls = nn.Linear(memory_dim, HIDDEN)
        self.view_embed = nn.Embedding(len(VIEW_KINDS), HIDDEN)
        self.scores = nn.Linear(HIDDEN, findings, bias=False)
        nn.init.zeros_(self.view_embed.weight)
        nn.init.zeros_(self.scores.weight)

    @property
    def bias(self) -> nn.Parameter:
        """One per finding."""
        return self.inner.bias

    def absorb(self, scaling: Standardisation) -> None:
        """Give for raw features the logits that it gives for standardised ones."""
        self.inner.absorb(scaling)
        fold(self.embed_cls, scaling.cls)

    def draw_masks(self, features: Features, generator: torch.Generator) -> Any:
        """Masks of the inner head."""
        return self.inner.draw_masks(features, generator)

    def forward(self, features: Features, masks: Any = None) -> Float[Tensor, "B C"]:
        """Logits of each image's study, float32; the same numbers in each of its rows."""
        same = same_study(features)
        share = shares(self._scores(features), same)  # B B C
        logits = (share * self.inner(features, masks)).sum(dim=1)
        return logits[first_of_study(same)]

    def view_weights(self, features: Features) -> Float[Tensor, "B C"]:
        """What each image weighs in its study, for each finding; sums to 1 over a study."""
        same = same_study(features)
        return shares(self._scores(features), same).diagonal(dim1=0, dim2=1).T

    @property
    def attention(self) -> Callable[[Features], Float[Tensor, "B C h w"]] | None:
        """The inner head's maps times the image's weight: they sum to 1 over a study. None where it has no maps."""
        attend = getattr(self.inner, "attention", None)
        if attend is None:
            return None
        return lambda features: attend(features) * self.view_weights(features)[:, :, None, None]

    def _scores(self, features: Features) -> Float[Tensor, "B C"]:
        assert features.view is not None, "attention over views needs features.view"
        return self.scores(torch.tanh(self.embed_cls(features.cls) + self.view_embed(features.view)))
