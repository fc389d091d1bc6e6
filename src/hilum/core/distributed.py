"""One process or several: devices, precision, gradient averaging, sums over ranks. The only module that uses Fabric.

A run on one device never imports Lightning Fabric, whose import alone takes seconds; a run on several processes
(devices > 1, torchrun, SLURM) goes through it, with DDP (every process holds all weights) or FSDP2 (each holds a part).
All kinds have the same few calls, so a loop is written once. How processes end together is `core.peers`' business, what
divided weights mean for the rest of the program `core.sharding`'s.

The sums (`sum_over_ranks` ...) are plain functions that do nothing in a single process; losses call them.
Past 300 lines: every kind of run behind the same few calls.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from hilum.core import sharding
from hilum.core.errors import ConfigError
from hilum.core.peers import Peers

Accelerator = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
"""Of matrix products. auto: bfloat16 where the hardware multiplies it natively, float32 elsewhere."""
Strategy = Literal["ddp", "fsdp2"]
"""ddp: every process holds all weights. fsdp2: each holds a part, and gathers a layer while it is used (ViT-g)."""
Gradients = Literal["auto", "fp32", "bf16"]
"""In what gradients are averaged over processes. auto: bfloat16 on CUDA, half the traffic; float32 on the CPU."""

_SECONDS_TO_DRAIN = 1.0
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another before it gives up; longer than any checkpoint takes to write. The environment's
HILUM_COLLECTIVE_TIMEOUT, in seconds, stands in its place."""


@runtime_checkable
class Engine(Protocol):
    """What a training loop needs to know of the machine."""

    rank: int
    world_size: int
    device: torch.device

    def setup(self, module: nn.Module, methods: Sequence[str] = ()) -> nn.Module:
        """Move to the device; over several processes, average gradients in the backward pass.

        Before the optimizer is made: with FSDP2 the parameters become other objects. A teacher goes through here too.

        Args:
            module: equal on all processes; without a trained parameter it is moved, and with FSDP2 divided.
            methods: names of methods, of the module and its parts, that are called beside `forward`.

        Returns:
            What to call; weights are read from `module` itself.
        """

    def accumulating(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, backward passes add to the gradients of this process and average nothing over processes.

        For all micro-batches of a step but the last, around forward and backward pass; divide each loss by their
        number.

        Args:
            module: what `setup` returned.
            enabled: False changes nothing.
        """

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the run's precision; weights stay float32."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate."""

    def barrier(self) -> None:
        """Wait for the other processes."""


@contextmanager
def launch(
    devices: int = 1,
    precision: Precision = "fp32",
    accelerator: Accelerator = "auto",
    strategy: Strategy = "ddp",
    gradients: Gradients = "auto",
) -> Iterator[Engine]:
    """Join or start the processes of this run; leave them at the end.

    If one process fails, all end, and the first to fail says why; the others leave with `SystemExit(1)`.

    Args:
        devices: GPUs, or CPU processes, of this machine. Under torchrun or srun the launcher's count stands.
        precision: of matrix products.
        accelerator: "auto" takes CUDA where there is one.
        strategy: who holds the weights; of no effect in a single process.
        gradients: in what they are averaged over processes; of no effect in a single process.

    Raises:
        ConfigError: CUDA asked for and absent, more devices than there are, or a timeout that is none.
        PeerError: another process was killed or does not answer.
    """
    cuda = torch.cuda.is_available()
    if accelerator == "cuda" and not cuda:
        raise ConfigError("accelerator=cuda, and torch finds no CUDA device here; use accelerator=cpu or auto.")
    kind = "cuda" if cuda and accelerator != "cpu" else "cpu"
    if devices < 1 or (kind == "cuda" and devices > torch.cuda.device_count()):
        found = f", found {torch.cuda.device_count()} CUDA device(s) here" if kind == "cuda" else ""
        raise ConfigError(f"devices={devices}: expected 1 or more{found}.")
    if precision == "auto":
        precision = "bf16" if kind == "cuda" or torch.cpu._is_avx512_bf16_supported() else "fp32"
    if devices == 1 and _launched_processes() == 1:
        yield _SingleEngine(precision, kind)
        return
    if gradients == "auto":
        gradients = "bf16" if kind == "cuda" else "fp32"
    engine = _FabricEngine(devices, precision, kind, strategy, gradients)
    peers = Peers(engine.barrier, engine.children)
    try:
        with peers:
            yield engine
    finally:
        peers.end_children()
        if peers.in_order or kind == "cpu":  # with a dead peer, NCCL would wait for it here
            # Gloo's thread needs the interpreter lock to free its last work, and the group's destructor, which holds
            # that lock, waits for the thread: freed at once, the two can wait for each other for ever (torch 2.13).
            time.sleep(_SECONDS_TO_DRAIN)
            torch.distributed.destroy_process_group()


def _launched_processes() -> int:
    """Processes that torchrun or srun has started for this job; 1 when neither did.

    SLURM_NTASKS says nothing by itself: an allocation sets it for the batch script too, the step's count only srun.
    """
    counts = [os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")]
    return next((int(count) for count in counts if count.isdigit()), 1)


def _cluster(devices: int) -> tuple[str | None, int]:
    """Who starts the processes, and how many on this machine.

    Fabric would take every process in an allocation of SLURM for one that srun has started: without srun, a run of 4
    devices would be one of 1, or wait for ever for the others.

    Returns:
        The name of Fabric's environment, None for the one it finds (torchrun's); and the number.

    Raises:
        ConfigError: srun does not say how many it starts on a machine.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return None, int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if not tasks.isdigit() or int(tasks) == 1:
        return "LightningEnvironment", devices
    on_each = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if not on_each.isdigit():
        raise ConfigError(f"srun has started {tasks} processes: tell it --ntasks-per-node=N in place of --ntasks.")
    return "SLURMEnvironment", int(on_each)


def _timeout() -> timedelta:
    text = os.environ.get("HILUM_COLLECTIVE_TIMEOUT", "")
    if not text:
        return COLLECTIVE_TIMEOUT
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"HILUM_COLLECTIVE_TIMEOUT={text!r} in the environment: expected whole seconds, 1 or more.")
    return timedelta(seconds=int(text))


class _SingleEngine:
    """One process, one device."""

    def __init__(self, precision: Precision, kind: str) -> None:
        self.rank, self.world_size = 0, 1
        self.device = torch.device(kind)
        self.precision = precision

    def setup(self, module: nn.Module, methods: Sequence[str] = ()) -> nn.Module:
        return module.to(self.device)

    def accumulating(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def barrier(self) -> None:
        pass


class _FabricEngine:
    """Several processes, through Lightning Fabric under either of its package names."""

    def __init__(self, devices: int, precision: Precision, kind: str, strategy: Strategy, gradients: Gradients) -> None:
        home = next((name for name in ("lightning_fabric", "lightning") if find_spec(name)), None)
        if home is None:
            raise ConfigError("Several processes need Lightning Fabric: pip install lightning-fabric.")
        home = "lightning.fabric" if home == "lightning" else home
        ddp = import_module(f"{home}.strategies").DDPStrategy
        cluster, local = _cluster(devices)
        plugins = [getattr(import_module(f"{home}.plugins.environments"), cluster)()] if cluster else []
        self.fabric = import_module(home).Fabric(
            accelerator=kind,
            devices=local,
            num_nodes=max(_launched_processes() // local, 1),
            strategy=ddp(timeout=_timeout(), gradient_as_bucket_view=True),  # for fsdp2 it only starts the processes
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            plugins=plugins,
        )
        self.fabric.launch()
        self.rank, self.world_size = self.fabric.global_rank, self.fabric.world_size
        self.device = self.fabric.device
        self.divided, self.bf16_gradients = strategy == "fsdp2", gradients == "bf16"
        # Fabric's own observer ends this process with SIGKILL when a child leaves with any status but 0, as one does
        # that has saved and wants to be run again. `Peers` watches the children in its place.
        started = getattr(self.fabric.strategy.launcher, "procs", [])
        self.children = list(started)
        started.clear()

    def setup(self, module: nn.Module, methods: Sequence[str] = ()) -> nn.Module:
        if self.divided:
            return sharding.shard(module, self.device.type, methods, self.bf16_gradients)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module.to(self.device)
        model = self.fabric.setup_module(module)
        if self.bf16_gradients:
            model._forward_module.register_comm_hook(None, _average_in_bf16)
        return model

    @contextmanager
    def accumulating(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:
        if not self.divided:
            with self.fabric.no_backward_sync(module, enabled=enabled):
                yield
            return
        module.set_requires_gradient_sync(not enabled)  # type: ignore[operator]
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)  # type: ignore[operator]

    def autocast(self) -> AbstractContextManager[Any]:
        return self.fabric.autocast()

    def backward(self, loss: Tensor) -> None:
        if self.divided:
            loss.backward()
        else:
            self.fabric.backward(loss)

    def barrier(self) -> None:
        self.fabric.barrier()


def _average_in_bf16(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over processes of a bucket of gradients, rounded to bfloat16 for the way. Torch's own hook is for CUDA.

    Divided before it is rounded, so that it is rounded once here and once for each addition of the sum.
    """
    gradients = bucket.buffer()
    sent = (gradients / world_size()).to(torch.bfloat16)
    future = torch.distributed.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: gradients.copy_(done.value()[0]))  # its value: safe on the stream of the copy


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """Number of processes of the run."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each rank's tensor, in place; no gradient. In a single process: the tensor itself."""
    return _reduce(values, ReduceOp.SUM)


def max_over_ranks(values: Tensor) -> Tensor:
    """The largest of each rank's tensor, elementwise, in place; no gradient. In a single process: the tensor itself."""
    return _reduce(values, ReduceOp.MAX)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each rank's tensor; no gradient."""
    return sum_over_ranks(values) / world_size()


def rows_of_all_ranks(rows: Tensor, most: int) -> Tensor:
    """Every rank's rows, of equally many each, below one another in the order of ranks; no gradient.

    In a single process: the rows themselves, all of them.

    Args:
        rows: any shape with rows first.
        most: rows in all, about: of several ranks, each gives its first ones.
    """
    if not is_distributed():
        return rows
    mine = rows[: max(most // world_size(), 1)].contiguous()
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(gathered, mine)
    return torch.cat(gathered)


def _reduce(values: Tensor, operation: Any) -> Tensor:
    if is_distributed():
        torch.distributed.all_reduce(values, operation)
    return values
