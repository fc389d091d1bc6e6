"""What a sweep tries side by side, and what a candidate of fewer blocks reads of features of more.

Several numbers of blocks come out of one pass over the backbone: features hold the largest, and tokens of the last n
blocks are the last n·D channels of both [CLS] and patches, in the order in which `features.extract` concatenates them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hilum.core.errors import ConfigError
from hilum.heads.features import Features
from hilum.heads.registry import HeadConfig
from hilum.heads.standardise import Scale, Standardisation


class Candidate(NamedTuple):
    """A head and the rate it learns at."""

    config: HeadConfig
    """Architecture, its number of blocks among it."""
    rate: float
    """Learning rate."""


def grid(configs: Sequence[HeadConfig], rates: Sequence[float]) -> tuple[Candidate, ...]:
    """Every architecture at every rate, architecture by architecture."""
    return tuple(Candidate(config, rate) for config in configs for rate in rates)


def last_blocks(features: Features, blocks: int, embed_dim: int) -> Features:
    """Of features of n blocks, those of the last `blocks`.

    Args:
        features: of at least so many blocks; the mean patch token is of the last block and stays as it is.
        blocks: how many to keep.
        embed_dim: D, channels of one block.

    Raises:
        ConfigError: features of fewer blocks.
    """
    width = blocks * embed_dim
    if features.cls.shape[1] == width:
        return features
    if features.cls.shape[1] < width:
        raise ConfigError(
            f"A head of {blocks} blocks of {embed_dim} channels was given {features.cls.shape[1]} channels. "
            "Extract as many blocks as the largest head reads."
        )
    patches = None if features.patches is None else features.patches[..., -width:]
    return features._replace(cls=features.cls[:, -width:], patches=patches)


def last_blocks_scaling(scaling: Standardisation, blocks: int, embed_dim: int) -> Standardisation:
    """The standardisation of `last_blocks`, for `absorb` of a head that was trained on them."""

    def cut(scale: Scale) -> Scale:
        return Scale(*(part[-blocks * embed_dim :] for part in scale))

    return scaling._replace(cls=cut(scaling.cls), patches=None if scaling.patches is None else cut(scaling.patches))
