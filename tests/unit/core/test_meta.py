"""Modules without weights: no memory, no random number, no compiler."""

import subprocess
import sys

import torch
from torch import nn

from hilum.core.meta import without_weights


def _network() -> nn.Module:
    layers = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Embedding(3, 7))
    nn.init.trunc_normal_(layers[0].weight, std=0.02)
    nn.init.normal_(tensor=layers[2].weight)
    return layers


def test_it_has_shapes_and_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with without_weights():
        hollow = _network()
    assert torch.equal(torch.get_rng_state(), before)
    real = _network()
    assert {name: value.shape for name, value in hollow.state_dict().items()} == {
        name: value.shape for name, value in real.state_dict().items()
    }
    assert all(value.is_meta for value in hollow.state_dict().values())
    assert not any(value.is_meta for value in real.state_dict().values())
    hollow.load_state_dict(real.state_dict(), assign=True)
    numbers = torch.randn(2, 5)
    assert torch.equal(hollow[1](hollow[0](numbers)), real[1](real[0](numbers)))


def test_a_module_that_fails_leaves_torch_as_it_was() -> None:
    try:
        with without_weights():
            raise RuntimeError("no such layer")
    except RuntimeError:
        pass
    drawn = torch.zeros(100).normal_()
    assert drawn.device.type == "cpu"
    assert drawn.std() > 0.5


def test_the_compiler_is_not_loaded() -> None:
    program = (
        "import sys, torch\n"
        "from hilum.core.meta import without_weights\n"
        "with without_weights(): torch.nn.Embedding(3, 4)\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
