from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hilum.backbones.patch_kernels import fold_channels, resample_patches, resize_matrix
from hilum.core.errors import ConfigError
from hilum.core.seeding import torch_stream


def patches(count: int, side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=torch_stream(0, "patches", side), dtype=torch.float64)


def kernel(side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(8, channels, side, side, generator=torch_stream(0, "kernel", side), dtype=torch.float64)


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    matrix = resize_matrix(images.shape[-1], side)
    return matrix @ images @ matrix.T


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 32), (8, 16), (16, 17)])
def test_growing_answers_to_resized_patches_exactly(old: int, new: int) -> None:
    x, w = patches(5, old), kernel(old)
    before = torch.einsum("nchw,dchw->nd", x, w)
    after = torch.einsum("nchw,dchw->nd", resized(x, new), resample_patches(w, new))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (16, 8)])
def test_it_is_the_least_norm_least_squares_solution(old: int, new: int) -> None:
    """Against the definition: the whole matrix B of a patch, its pseudo-inverse by normal equations in float64."""
    one = resize_matrix(old, new)
    full = torch.kron(one, one)  # new^2 old^2: B
    w = kernel(old, channels=1)
    expected = torch.linalg.lstsq(full.T, w.flatten(1).T, driver="gelsd").solution.T  # min |B^T v - w|, least norm
    torch.testing.assert_close(resample_patches(w, new).flatten(1), expected, rtol=1e-7, atol=1e-9)


def test_plain_resizing_of_the_kernel_is_not_that() -> None:
    """The test of the tests: what one would do without thinking is wrong by a fifth and more."""
    x, w = patches(5, 14), kernel(14)
    before = torch.einsum("nchw,dchw->nd", x, w)
    after = torch.einsum("nchw,dchw->nd", resized(x, 16), resized(w, 16))
    assert float((after - before).abs().mean() / before.abs().mean()) > 0.2


def test_the_sum_over_a_constant_patch_is_kept() -> None:
    """So the mean that was absorbed into the bias stays right."""
    w = kernel(14)
    torch.testing.assert_close(resample_patches(w, 16).sum(dim=(1, 2, 3)), w.sum(dim=(1, 2, 3)), rtol=1e-10, atol=1e-10)


def test_resampling_and_folding_commute_when_growing() -> None:
    w, bias = kernel(14).float(), torch.randn(8, generator=torch_stream(0, "bias"))
    mean, std = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)
    first, first_bias = fold_channels(resample_patches(w, 16), bias, mean, std)
    folded, second_bias = fold_channels(w, bias, mean, std)
    torch.testing.assert_close(first, resample_patches(folded, 16), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first_bias, second_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 20), (7, 64), (5, 5)])
def test_growing_is_torch_bicubic(old: int, new: int) -> None:
    x = patches(2, old)
    expected = F.interpolate(x, size=(new, new), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized(x, new), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (18, 6), (21, 7)])
def test_shrinking_by_a_whole_number_is_the_mean(old: int, new: int) -> None:
    x = patches(2, old)
    torch.testing.assert_close(resized(x, new), F.avg_pool2d(x, old // new), rtol=1e-12, atol=1e-12)


def test_shrinking_is_what_the_images_are_resized_with() -> None:
    from hilum.data.transforms import resize

    x = torch.randint(0, 256, (16, 16), generator=torch_stream(0, "pixels")).double()
    ours = resize(x.numpy().astype(np.uint8), 14, 14)
    assert np.abs(resized(x, 14).numpy() - ours).max() <= 0.51  # whole grey levels


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_row_of_a_resize_is_a_weighted_mean(old: int, new: int) -> None:
    matrix = resize_matrix(old, new)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(new, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix.flip(0, 1), matrix, rtol=1e-9, atol=1e-9)  # it has no side


def test_the_own_size_is_left_alone() -> None:
    w = kernel(14)
    assert resample_patches(w, 14) is w
    with pytest.raises(ConfigError, match="at least 1 pixel, found 0"):
        resample_patches(w, 0)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.2,)), ((0.5,) * 3, (0.2,)), ((0.5,) * 3, (0.2, 0.0, 0.2))])
def test_a_normalisation_that_does_not_fit_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="each of 3 channels"):
        fold_channels(kernel(4).float(), torch.zeros(8), mean, std)


@pytest.mark.parametrize(("smooth", "limit"), [(False, 0.005), (True, 0.001)], ids=["white kernels", "smooth kernels"])
def test_real_images_resized_as_a_whole_come_close(nih_sample: Path, smooth: bool, limit: float) -> None:
    """518 to 592 pixels: what reaches over a patch's border is all that differs, and plain resizing is far worse."""
    import cv2

    w = torch.randn(32, 1, 14, 14, generator=torch_stream(0, "kernels"), dtype=torch.float64)
    if smooth:
        bell = torch.from_numpy(cv2.getGaussianKernel(9, 2.0))
        w = F.conv2d(F.pad(w, (4, 4, 4, 4)), (bell @ bell.T)[None, None])
    errors = []
    for file in sorted(nih_sample.glob("**/*.png"))[:10]:
        image = cv2.resize(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE), (518, 518)).astype(np.float64) / 127.5 - 1
        small = torch.from_numpy(image)[None, None]
        large = torch.from_numpy(cv2.resize(image, (592, 592), interpolation=cv2.INTER_CUBIC))[None, None]
        before = F.conv2d(small, w, stride=14)
        kernels = (resample_patches(w, 16), resized(w, 16) * (14 / 16) ** 2)
        errors.append([float((F.conv2d(large, one, stride=16) - before).norm() / before.norm()) for one in kernels])
    ours, plain = np.median(errors, axis=0)
    assert ours < limit
    assert plain > 5 * ours
