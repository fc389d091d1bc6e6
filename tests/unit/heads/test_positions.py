import math

import torch

from hilum.heads.positions import sincos_positions


def test_codes_are_the_waves_written_out() -> None:
    codes = sincos_positions((2, 3), 12)
    assert codes.shape == (6, 12)
    row, column = 1, 2
    expected = []
    for place, cells in ((row, 2), (column, 3)):
        angles = [(place + 0.5) / cells * 32 / 10_000 ** (k / 3) for k in range(3)]
        expected += [*map(math.sin, angles), *map(math.cos, angles)]
    torch.testing.assert_close(codes[row * 3 + column], torch.tensor(expected))


def test_a_place_has_one_code_at_every_resolution() -> None:
    coarse, fine = sincos_positions((3, 3), 16).view(3, 3, 16), sincos_positions((9, 9), 16).view(9, 9, 16)
    torch.testing.assert_close(coarse, fine[1::3, 1::3])


def test_all_places_differ_and_near_ones_are_alike() -> None:
    codes = sincos_positions((32, 32), 64)
    distances = torch.cdist(codes, codes)
    assert distances[0, 1:].min() > 0.1
    assert distances[0, 1] < distances[0, 4] < distances[0, 12]
