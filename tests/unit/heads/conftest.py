"""Features drawn at random, of the shapes that a backbone gives."""

import pytest
import torch

from hilum.heads.features import Features


@pytest.fixture
def make_features():
    def make(
        batch: int,
        embed_dim: int = 6,
        blocks: int = 2,
        grid: tuple[int, int] = (3, 4),
        seed: int = 0,
        study: list[int] | None = None,
        view: list[int] | None = None,
    ) -> Features:
        generator = torch.Generator().manual_seed(seed)
        tokens = grid[0] * grid[1]
        return Features(
            cls=torch.randn(batch, blocks * embed_dim, generator=generator),
            patch_mean=torch.randn(batch, embed_dim, generator=generator),
            patches=torch.randn(batch, tokens, blocks * embed_dim, generator=generator),
            grid=grid,
            study=None if study is None else torch.tensor(study),
            view=None if view is None else torch.tensor(view),
        )

    return make


@pytest.fixture
def only():
    """Some images of a batch of features."""

    def only(features: Features, chosen: list[int]) -> Features:
        parts = {name: value[chosen] for name, value in features._asdict().items() if isinstance(value, torch.Tensor)}
        return features._replace(**parts)

    return only
