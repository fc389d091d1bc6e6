import random

import numpy as np
import torch

from hilum.core.seeding import derive, forked, stream, torch_stream


def test_streams_are_named_and_independent_of_order() -> None:
    first = stream(7, "masking", 0, 3).random(4)
    stream(7, "other").random(100)
    assert np.array_equal(first, stream(7, "masking", 0, 3).random(4))
    seeds = {derive(root, name, step) for root in (0, 1) for name in ("a", "b") for step in range(50)}
    assert len(seeds) == 200
    assert derive(0, "a", 1) != derive(0, "a", "1")
    assert derive(0, "ab", "c") != derive(0, "a", "bc")


def test_torch_stream_repeats() -> None:
    assert torch.equal(torch.rand(3, generator=torch_stream(1, "x")), torch.rand(3, generator=torch_stream(1, "x")))


def test_forked_leaves_the_global_generators_alone() -> None:
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    with forked(3, "init"):
        one = (random.random(), np.random.rand(), torch.rand(2))
    with forked(3, "init"):
        two = (random.random(), np.random.rand(), torch.rand(2))
    assert one[:2] == two[:2]
    assert torch.equal(one[2], two[2])
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
