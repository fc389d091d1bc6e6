"""Position tables resampled to another patch grid. Used at every forward on another grid than the table's, and once
when a checkpoint moves to another resolution. Knows nothing of models or files.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hilum.core.errors import CheckpointError, ConfigError


def grid_side(table: Tensor) -> int:
    """Side of the square grid of a position table (1, 1 + side^2, D), whose first row is [CLS].

    Raises:
        CheckpointError: the number of patch rows is not a square.
    """
    patches = table.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        raise CheckpointError(
            f"The position table has {table.shape[1]} rows; expected 1 for [CLS] + a square number of patches. "
            "Hilum reads ViT weights whose table was trained on square images."
        )
    return side


def sincos_positions(dim: int, side: int) -> Float[Tensor, "1 rows dim"]:
    """A table of 2-D sines and cosines to start from: half the channels tell the row, half the column, [CLS] is 0.

    Wavelengths grow geometrically from 2 pi to 10,000 times that (Vaswani 2017; in two dimensions MoCo v3, MAE).

    Raises:
        ConfigError: a width that is not a multiple of 4.
    """
    if dim % 4:
        raise ConfigError(f"2-D sine positions need a width that is a multiple of 4, found {dim}.")
    rates = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates  # side dim/4
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # side dim/2
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    patches = torch.cat([rows, columns], dim=2).reshape(side * side, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches]).float()[None]


def resize_positions(
    table: Float[Tensor, "1 rows D"], grid: tuple[int, int], offset: float = 0.1, antialias: bool = False
) -> Float[Tensor, "1 new_rows D"]:
    """Resample the patch rows of a position table bicubically in float32; the [CLS] row is kept as it is.

    The table's own grid gives the table itself. With `offset` the resampling step is side / (size + offset), which
    is how DINOv2 and CheXFound resample (facebookresearch/dinov2 models/vision_transformer.py); with 0 the step
    is side / size.

    Args:
        table: row 0 is [CLS], then the patches, row-major.
        grid: wanted rows and columns of patches.
        offset: 0.1 for DINOv2 and CheXFound weights, 0.0 for DINOv2 weights with registers.
        antialias: low-pass before shrinking; true for DINOv2 weights with registers.
    """
    side = grid_side(table)
    if grid == (side, side):
        return table
    height, width = grid
    patches = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # 1 D side side
    if offset:
        factors = ((height + offset) / side, (width + offset) / side)
        resized = F.interpolate(patches, scale_factor=factors, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    assert resized.shape[-2:] == grid, "the offset moved the grid by a whole patch"
    rows = resized.permute(0, 2, 3, 1).reshape(1, height * width, -1).to(table.dtype)  # 1 N D
    return torch.cat([table[:, :1], rows], dim=1)
