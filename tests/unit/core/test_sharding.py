"""Divided weights, in one process: a group of one divides nothing, and every call must still do its work."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hilum.core.checkpoint import flatten_optimizer, load_strictly, restore_optimizer
from hilum.core.errors import CheckpointError
from hilum.core.sharding import is_divided, local_parameters, part_like, shard, whole, whole_tensors


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def features(self, inputs: Tensor) -> Tensor:
        """Another way in than `forward`."""
        for block in (self.first, *self.blocks):
            inputs = block(inputs).tanh()
        return inputs


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body.features(inputs))


@pytest.fixture
def group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_on_whole_tensors_every_call_is_the_identity() -> None:
    module = nn.Linear(3, 2)
    assert not is_divided(module.weight)
    assert whole(module.weight) is module.weight
    assert [parameter is local for parameter, local in zip(module.parameters(), local_parameters(module), strict=True)]
    tensors = whole_tensors(module.state_dict())
    assert tensors.keys() == {"weight", "bias"}
    assert tensors["weight"].data_ptr() == module.weight.data_ptr()
    assert part_like(tensors["bias"], module.bias) is tensors["bias"]


def test_divided_weights_learn_as_whole_ones_do(group: None) -> None:
    torch.manual_seed(0)
    plain = Network()
    divided = Network()
    divided.load_state_dict(plain.state_dict())
    assert shard(divided, "cpu", ("features",)) is divided
    assert all(is_divided(parameter) for parameter in divided.parameters())
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, fused=True) for module in (plain, divided)]
    for step in range(3):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for module, optimizer in zip((plain, divided), optimizers, strict=True):
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            optimizer.step()
    names = [{parameter: name for name, parameter in module.named_parameters()} for module in (plain, divided)]
    wanted, found = (
        module.state_dict() | flatten_optimizer(optimizer, name)
        for module, optimizer, name in zip((plain, divided), optimizers, names, strict=True)
    )
    found = whole_tensors(found)
    assert found.keys() == wanted.keys()
    assert not any(is_divided(tensor) for tensor in found.values())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=name)

    # And back: what is on disk is whole, and goes into divided weights.
    fresh = shard(Network(), "cpu", ("features",))
    load_strictly(fresh, {name: found[name] for name in fresh.state_dict()}, "the test")
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1, fused=True)
    names = {parameter: name for name, parameter in fresh.named_parameters()}
    restore_optimizer(
        other, names, {name: tensor for name, tensor in found.items() if "exp" in name or ".step" in name}
    )
    for name, tensor in whole_tensors(fresh.state_dict() | flatten_optimizer(other, names)).items():
        assert torch.equal(tensor, found[name]), name
    for module, optimizer in ((divided, optimizers[1]), (fresh, other)):
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
    again = whole_tensors(divided.state_dict())
    for name, tensor in whole_tensors(fresh.state_dict()).items():
        assert torch.equal(tensor, again[name]), name
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        load_strictly(fresh, {name: torch.zeros(1) for name in fresh.state_dict()}, "the test")


def test_what_changes_parts_in_place_is_seen_by_the_next_pass(group: None) -> None:
    """A teacher: no gradient, its children called by themselves, its weights moved between two passes."""
    teacher = Network().requires_grad_(False)
    inputs = torch.randn(4, 3)
    shard(teacher, "cpu", ("features",))
    before = teacher.head(inputs), teacher.body.features(inputs)
    torch._foreach_mul_(local_parameters(teacher), 2.0)
    torch.testing.assert_close(teacher.head(inputs), 2 * before[0])
    assert not torch.equal(teacher.body.features(inputs), before[1])
    student = shard(Network(), "cpu", ("features",))
    output = student(inputs)
    with torch.no_grad():
        for parameter in local_parameters(student):
            parameter.zero_()
    assert output.abs().sum() > 0
    assert student(inputs).abs().sum() == 0
