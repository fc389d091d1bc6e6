import numpy as np
import pytest
import torch

from hilum.backbones.pos_embed import grid_side, resize_positions, sincos_positions
from hilum.backbones.vit import SIZES, VisionTransformer
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.seeding import forked, torch_stream


def table(side: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1 + side * side, dim, generator=torch_stream(seed, "table"))


def cubic_weights(size_in: int, size_out: int, step: float) -> np.ndarray:
    """Keys' cubic kernel (a = -0.75) at half-pixel centres, edges repeated: the definition, in float64."""
    a = -0.75
    weights = np.zeros((size_out, size_in))
    for out in range(size_out):
        centre = (out + 0.5) * step - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            x = abs(centre - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[out, min(max(tap, 0), size_in - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return weights


def test_native_grid_is_the_table_itself() -> None:
    positions = table(14)
    assert resize_positions(positions, (14, 14)) is positions


@pytest.mark.parametrize("pixels", [96, 128, 144, 336, 448, 512])
def test_shapes_of_all_stages_and_class_row_kept(pixels: int) -> None:
    positions = table(14)
    resized = resize_positions(positions, (pixels // 16, pixels // 16))
    assert resized.shape == (1, 1 + (pixels // 16) ** 2, 8)
    assert torch.equal(resized[:, 0], positions[:, 0])


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(6, 6), (21, 21), (10, 17), (14, 15)])
def test_equals_separable_cubic_resampling_in_float64(grid: tuple[int, int], offset: float) -> None:
    positions = table(14)
    patches = positions[0, 1:].double().numpy().reshape(14, 14, 8)
    vertical, horizontal = (cubic_weights(14, size, 14 / (size + offset)) for size in grid)
    expected = np.einsum("yi,xj,ijd->yxd", vertical, horizontal, patches).reshape(-1, 8)
    found = resize_positions(positions, grid, offset)[0, 1:].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_antialias_keeps_the_mean_of_a_fine_pattern_when_shrinking() -> None:
    positions = torch.zeros(1, 1 + 32 * 32, 1)
    rows, columns = np.divmod(np.arange(32 * 32), 32)
    positions[0, 1:, 0] = torch.from_numpy((rows % 2 == columns % 2).astype(np.float32))
    plain = resize_positions(positions, (11, 11), 0.0, antialias=False)[0, 1:]
    smooth = resize_positions(positions, (11, 11), 0.0, antialias=True)[0, 1:]
    assert (smooth - 0.5).abs().max() < 0.15 < (plain - 0.5).abs().max()


def test_half_precision_tables_are_resampled_in_float32() -> None:
    positions = table(14).half()
    expected = resize_positions(positions.float(), (9, 9)).half()
    assert torch.equal(resize_positions(positions, (9, 9)), expected)


def test_a_table_that_is_not_square_is_refused() -> None:
    with pytest.raises(CheckpointError, match="198 rows"):
        grid_side(torch.zeros(1, 198, 4))


def test_sine_positions_tell_rows_and_columns_apart() -> None:
    table = sincos_positions(16, 5)
    assert table.shape == (1, 26, 16)
    assert (table[0, 0] == 0).all()
    grid = table[0, 1:].reshape(5, 5, 16).double()
    rates = 10_000.0 ** (-np.arange(4) / 4)
    for row, column in [(0, 0), (2, 4), (3, 1)]:
        expected = [f(place * rate) for place in (row, column) for f in (np.sin, np.cos) for rate in rates]
        np.testing.assert_allclose(grid[row, column], expected, atol=1e-6)
    with pytest.raises(ConfigError, match="multiple of 4"):
        sincos_positions(10, 2)


def test_small_sizes_start_from_sine_positions() -> None:
    config = SIZES["demo16"]
    with forked(0, "model"):
        model = VisionTransformer(config)
    assert torch.equal(model.pos_embed.detach(), sincos_positions(config.embed_dim, config.grid))
