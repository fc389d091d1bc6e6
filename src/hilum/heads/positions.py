"""Fixed two-dimensional positions of patches, for heads whose attention is otherwise blind to place."""

import torch
from jaxtyping import Float
from torch import Tensor

EXTENT = 32
"""Length of an image's side in the units of the waves: patches of a 512-pixel image, so that a place in the image has
the same code at every resolution."""
LONGEST_WAVE = 10_000.0
"""Ratio of the longest to the shortest wave (Vaswani 2017, "Attention is all you need", 3.5)."""


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | str | None = None) -> Float[Tensor, "N D"]:
    """Sines and cosines of the row (first half of the channels) and of the column (second half) of each patch centre.

    Args:
        grid: rows and columns.
        dim: D, channels; a multiple of 4.
        device: where the result is to be.
    """
    assert dim % 4 == 0, "two axes of sines and cosines"
    rates = LONGEST_WAVE ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    axes = []
    for cells in grid:
        places = (torch.arange(cells, device=device) + 0.5) * (EXTENT / cells)
        angles = places[:, None] * rates
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=1))  # cells D/2
    rows, columns = axes
    height, width = grid
    return torch.cat(
        [rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)], dim=-1
    ).flatten(0, 1)
