"""Tokens small enough to be kept: a fixed linear reduction of channels, 8 bits a number, and heads that lose it again.

Patch tokens of 4 blocks of ViT-L at 512 pixels are 8.4 MB an image in 16 bits, 2.2 TB for 258,871 images; of 768 of
their principal directions in 8 bits, 0.8 MB and 204 GB, which are read faster than a backbone computes them. What is
kept must be the same for every head and rate, so the reduction is of the tokens (principal components of training
tokens), not the decoder's own projection, which each head learns for itself.

A head trained on reduced tokens begins with a linear map, into which the reduction folds exactly (`expand`): the head
that is saved reads the backbone's own tokens. What is lost is what the components left out and the rounding.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from hilum.core.errors import ConfigError
from hilum.heads.features import Features

STEPS = 127
"""Largest magnitude of a kept number."""
REACH = 8
"""Standard deviations of a channel, in the training tokens, that the kept numbers span to either side."""


class KeptTokens(NamedTuple):
    """Reduced tokens as they are kept."""

    values: Int8[Tensor, "B N K"]
    steps: Float[Tensor, " K"]
    """What a 1 stands for, per channel."""

    def tokens(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "B N K"]:
        """As numbers again."""
        return self.values.to(dtype) * self.steps.to(dtype)


class Reduction(NamedTuple):
    """Tokens (E channels) to K of their principal directions, and how these are rounded."""

    mean: Float[Tensor, " E"]
    directions: Float[Tensor, "K E"]
    """Orthonormal rows, the largest variance first."""
    steps: Float[Tensor, " K"]
    """Of the 8-bit numbers, per channel."""
    explained: float
    """Share of the variance of the training tokens that is kept, 0 to 1."""

    def to(self, device: torch.device) -> "Reduction":
        """The same on a device."""
        return self._replace(
            mean=self.mean.to(device), directions=self.directions.to(device), steps=self.steps.to(device)
        )

    def apply(self, tokens: Float[Tensor, "*B E"]) -> Float[Tensor, "*B K"]:
        """Reduce, without rounding."""
        return (tokens - self.mean) @ self.directions.T

    def keep(self, tokens: Float[Tensor, "B N E"]) -> KeptTokens:
        """Reduce and round to 8 bits; values past the largest of training are cut to it."""
        scaled = (self.apply(tokens) / self.steps).round().clamp(-STEPS, STEPS)
        return KeptTokens(scaled.to(torch.int8), self.steps)

    @torch.no_grad()
    def expand(self, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """Weights of a head that gives for raw tokens what this one gives for reduced ones.

        Args:
            state: of a head whose linear map `name` reads reduced tokens: weight (d, K), bias (d,).
            name: of the map, as in "decoder.embed_standart".

        Raises:
            ConfigError: a map that reads another number of channels, or has no bias.
        """
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        if bias is None or weight.shape[1] != len(self.directions):
            raise ConfigError(
                f"{name} reads {weight.shape[1]} channels; expected {len(self.directions)}, and a map with a bias."
            )
        directions, mean = self.directions.double().cpu(), self.mean.double().cpu()
        whole = weight.double() @ directions  # d E
        return {**state, f"{name}.weight": whole.float(), f"{name}.bias": (bias.double() - whole @ mean).float()}


class Kept(NamedTuple):
    """What a `FeatureSource` keeps of features: standardised or not, patches reduced, in 8 bits."""

    prepare: Callable[[Features], Features]
    """What features go through before the reduction, which was fitted on what this gives."""
    reduction: Reduction
    """On the device of the features."""

    def keep(self, features: Features) -> Features:
        """Prepared features, patches as the 8-bit numbers of `KeptTokens`."""
        prepared = self.prepare(features)
        assert prepared.patches is not None, "only patch tokens are reduced"
        return prepared._replace(patches=self.reduction.keep(prepared.patches).values)

    def restore(self, features: Features) -> Features:
        """The same with patches as numbers again."""
        assert features.patches is not None, "only patch tokens are reduced"
        return features._replace(patches=KeptTokens(features.patches, self.reduction.steps).tokens())


@torch.no_grad()
def fit_reduction(batches: Iterable[Features], channels: int) -> Reduction:
    """Principal directions of training tokens, from one pass for the covariance.

    Args:
        batches: features of training images, read once and not kept.
        channels: K, at most E.

    Raises:
        ConfigError: more channels than there are, or no tokens.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        assert features.patches is not None, "only patch tokens are reduced"
        tokens = features.patches.flatten(0, 1).float()
        if not count:
            total, squares = (
                torch.zeros(shape, dtype=torch.float64) for shape in (tokens.shape[1:], (tokens.shape[1],) * 2)
            )
        count += len(tokens)
        total += tokens.sum(dim=0).double().cpu()
        squares += (tokens.T @ tokens).double().cpu()
    if not count or not 1 <= channels <= len(total):
        raise ConfigError(f"Cannot reduce {count} tokens of {total.numel()} channels to {channels}.")
    mean = total / count
    covariance = squares / count - torch.outer(mean, mean)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    variances, directions = variances.flip(0).clamp_min(0), vectors.T.flip(0)[:channels]
    reach = (REACH * variances[:channels].sqrt()).clamp_min(1e-6)
    explained = float(variances[:channels].sum() / variances.sum().clamp_min(1e-30))
    return Reduction(mean.float(), directions.float(), (reach / STEPS).float(), explained)
