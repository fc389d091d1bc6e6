"""Patch kernels made to fit: three channels folded to one, and a kernel for patches of another size.

Both are exact in float64 where mathematics allows it, and say where it does not. Knows nothing of files or layouts.
"""

from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hilum.core.errors import ConfigError

GREY_MEAN, GREY_STD = 0.5, 0.25
"""The normalisation that folded kernels expect; `hilum.data.transforms` applies it (a sibling layer: a test keeps
the two equal)."""

_CUBIC = -0.75
"""Sharpness of the cubic, as in OpenCV and torch."""


def fold_channels(
    kernel: Float[Tensor, "D C P P"], bias: Float[Tensor, " D"], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Float[Tensor, "D 1 P P"], Float[Tensor, " D"]]:
    """The one-channel patch kernel with equal outputs on grey images under Hilum's normalisation.

    With p the pixel, sum_c w_c (p - mean_c) / std_c + bias is linear in p = GREY_STD x + GREY_MEAN. Patches have no
    padding, so this is exact. The sums run in float64.

    Args:
        kernel: of a convolution whose stride is its kernel.
        bias: of the same.
        mean: per channel, subtracted from pixels in [0, 1]; one for each of C.
        std: per channel, divides what is left.

    Raises:
        ConfigError: other than one mean and one positive deviation per channel.
    """
    channels = kernel.shape[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(
            f"Expected a mean and a positive standard deviation for each of {channels} channels, found means {mean} "
            f"and deviations {std}."
        )
    channel_mean = torch.tensor(mean, dtype=torch.float64)[None, :, None, None]
    channel_std = torch.tensor(std, dtype=torch.float64)[None, :, None, None]
    scaled = kernel.double() / channel_std
    folded_bias = bias.double() + (scaled * (GREY_MEAN - channel_mean)).sum(dim=(1, 2, 3))
    return (GREY_STD * scaled.sum(dim=1, keepdim=True)).float(), folded_bias.float()


def resample_patches(kernel: Float[Tensor, "D C P P"], size: int) -> Float[Tensor, "D C size size"]:
    """A kernel for patches of `size` that answers to resized patches as the given one does to the original.

    Let B resize a patch of P x P pixels to size x size, per axis as Hilum's images are resized (area means where it
    shrinks, cubic where it grows). The new kernel is the least-norm least-squares solution of <B x, new> = <x, old>
    over white patches x: new = pinv(B^T) old ("PI-resize", Beyer 2023, "FlexiViT", section 3). B is separable, so
    pinv(B^T) is one matrix on each side. Growing (14 to 16) the equality is exact for every patch, so all tokens of
    an image resized patch by patch are those of the original; shrinking loses what the smaller patch cannot hold.
    Resizing a whole image differs from that only where the cubic reaches over a patch's border.

    Args:
        kernel: computed on in float64, returned in its own type.
        size: side of the new patch, pixels.

    Raises:
        ConfigError: a size below 1.
    """
    if size < 1:
        raise ConfigError(f"patch_size: expected at least 1 pixel, found {size}.")
    if kernel.shape[-2:] == (size, size):
        return kernel
    rows, columns = (torch.linalg.pinv(resize_matrix(side, size)) for side in kernel.shape[-2:])  # old, size each
    return (rows.T @ kernel.double() @ columns).to(kernel.dtype)


@cache
def resize_matrix(old: int, new: int) -> Float64[Tensor, "new old"]:
    """The linear map that resizes one axis of pixels: area means when shrinking, else cubic, edges repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    step = old / new
    for index in range(new):
        if step > 1:
            start, end = index * step, (index + 1) * step
            for pixel in range(int(start), min(int(end) + 1, old)):
                matrix[index, pixel] = max(min(end, pixel + 1) - max(start, pixel), 0.0) / step
            continue
        centre = (index + 0.5) * step - 0.5
        first = int(centre // 1) - 1
        for pixel in range(first, first + 4):
            matrix[index, min(max(pixel, 0), old - 1)] += _cubic(abs(centre - pixel))
    return matrix


def _cubic(distance: float) -> float:
    """Keys' cubic convolution kernel (Keys 1981)."""
    if distance <= 1:
        return ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    if distance < 2:
        return ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    return 0.0
