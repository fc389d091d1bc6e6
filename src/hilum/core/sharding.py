"""Weights that are divided among processes (FSDP2), and how the rest of the program need not know.

Under FSDP2 each process holds a part of every parameter, gradient and optimizer state; a layer is gathered while it is
used. Three things must know of it, and use what is here: what changes weights in place (`local_parameters`), what
reads a norm (`whole`), and what writes or reads a checkpoint (`whole_tensors`, `part_like`). On tensors that are not
divided each of them is the identity, so that callers have one way. `core.distributed` alone calls `shard`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shard(module: nn.Module, device: str, methods: Sequence[str] = (), reduce_bf16: bool = False) -> nn.Module:
    """Divide a module's parameters among all processes, in place: blocks of lists, then children, then the rest.

    Every unit that the program calls by itself is one: the members of each `nn.ModuleList`, the direct children, and,
    if it is trained, the module.

    Args:
        module: equal on all processes.
        device: "cpu" or "cuda".
        methods: names of methods, beside `forward`, through which a unit may be called.
        reduce_bf16: average gradients in bfloat16.

    Returns:
        `module`; its parameters are other objects than before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Said of every output that is a view. Nothing here changes one in place, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    module.to(device)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (torch.distributed.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce_bf16 else None),
    }
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if not trained:  # no backward pass will ask for the weights again
        options["reshard_after_forward"] = True
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    units = [unit for part in lists for unit in part] + list(module.children()) + ([module] if trained else [])
    for unit in dict.fromkeys(units):
        if isinstance(unit, nn.ModuleList | nn.ModuleDict) or not any(True for _ in unit.parameters()):
            continue
        fully_shard(unit, **options)
        for method in methods:
            if hasattr(unit, method):
                register_fsdp_forward_method(unit, method)
    return module


def is_divided(tensor: Tensor) -> bool:
    """Whether a process holds only a part of this tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, without the import, which takes most of a second


def local_parameters(module: nn.Module) -> list[Tensor]:
    """This process's part of every parameter, to be changed in place; the parameters themselves if not divided.

    What a forward pass has gathered is let go first: it would be used again, and be older than the parts.
    """
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # type: ignore[operator]
    return [_local(parameter) for parameter in module.parameters()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process. All processes call it, if the tensor is divided."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divided tensors become whole, one at a time, on the CPU of process 0; the rest is as it was.

    All processes call it, with the same names in the same order. What process 0 gets does not depend on the number of
    processes, nor on whether anything was divided: the content of a checkpoint.

    Returns:
        On process 0 all tensors; on the others nothing.
    """
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if main:
            kept[name] = complete.cpu() if is_divided(tensor) else complete
    return kept


def part_like(complete: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as `like` is; the tensor itself if `like` is not divided.

    Args:
        complete: equal on all processes.
        like: same shape.

    Returns:
        On the device of `like`.
    """
    if not is_divided(like):
        return complete.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(complete.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
