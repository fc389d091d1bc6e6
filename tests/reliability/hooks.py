"""Faults that a program meets at a chosen place; called in its process before it begins, by name.

`rank` None means every process of the run.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any


def _is(rank: int | None) -> bool:
    return rank is None or os.environ.get("RANK", "0") == str(rank)


def _in_step(count: int, rank: int | None, what: Callable[[], None]) -> None:
    """Call `what` in the `count`-th step of this process, after its weights moved and before anything is written."""
    from hilum.pretraining import dinov2

    real, calls = dinov2.update_teacher, 0

    def update(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        real(*arguments, **options)
        if calls == count and _is(rank):
            what()

    dinov2.update_teacher = update  # type: ignore[assignment]


def signal_in_step(count: int, number: int, rank: int | None = None) -> None:
    """The process gets a signal in its `count`-th step."""
    _in_step(count, rank, lambda: os.kill(os.getpid(), number))


def sleep_in_step(count: int, rank: int | None = None) -> None:
    """The process sleeps for good."""
    _in_step(count, rank, lambda: time.sleep(3600))


def signal_as_step_begins(count: int, number: int) -> None:
    """A signal before the forward pass of the `count`-th step."""
    from hilum.pretraining import dinov2

    real, calls = dinov2.teacher_forward, 0

    def forward(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    dinov2.teacher_forward = forward  # type: ignore[assignment]


def signal_before_the_first_step(number: int) -> None:
    """A signal while images are chosen, before networks are made."""
    from hilum.pretraining import exposure

    real = exposure.select

    def select(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    exposure.select = select  # type: ignore[assignment]


def signal_in_probe(count: int, number: int) -> None:
    """A signal while features are measured for the `count`-th time; the first is before the first step."""
    from hilum.commands.pretrain_probe import Probe

    real, calls = Probe.measure, 0

    def measure(self: Probe, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    Probe.measure = measure  # type: ignore[method-assign]


def not_a_number(count: int, rank: int | None = None) -> None:
    """The loss of the `count`-th step is not a number."""
    from hilum.pretraining import dinov2

    real, calls = dinov2.compute_losses, 0

    def losses(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        found = real(*arguments, **options)
        return found._replace(total=found.total * float("nan")) if calls == count and _is(rank) else found

    dinov2.compute_losses = losses  # type: ignore[assignment]


def each_step_takes(seconds: float) -> None:
    """Every step sleeps a little, so that something else can happen meanwhile."""
    from hilum.pretraining import dinov2

    real = dinov2.update_teacher

    def update(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        time.sleep(seconds)

    dinov2.update_teacher = update  # type: ignore[assignment]


def file_size_limit(limit: int, rank: int | None = None) -> None:
    """No file may grow past `limit` bytes: the disk's end, as the kernel reports it."""
    if _is(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate", "os.chmod"}


def signal_at_file_operation(folder: str, count: int, number: int) -> None:
    """A signal at the `count`-th time that this process opens, makes, renames or removes something in a folder."""
    calls = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in FILE_EVENTS and folder in str(arguments[:2]):
            calls += 1
            if calls == count:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def fixed_temporary_names() -> None:
    """Temporary files have the same names in every run, so that a tracer can be told them beforehand."""
    import secrets

    secrets.token_hex = lambda size=16: "0" * 2 * size  # type: ignore[assignment]


def print_weights_at_end() -> None:
    """The digest of student and teacher in this process's memory, as the last line that it prints, however it ends."""
    import atexit

    from hilum.core.checkpoint import digest
    from hilum.pretraining import dinov2

    real, held = dinov2.make_networks, []

    def networks(*arguments: Any, **options: Any) -> Any:
        held.append(real(*arguments, **options))
        return held[-1]

    def show() -> None:
        for student, teacher in held:
            parts = (("student", student), ("teacher", teacher))
            print(
                "weights",
                digest({f"{part}.{name}": value for part, net in parts for name, value in net.state_dict().items()}),
                flush=True,
            )

    dinov2.make_networks = networks  # type: ignore[assignment]
    atexit.register(show)


def print_workers() -> None:
    """The numbers of the processes that make batches, before the first batch is asked for."""
    from torch.utils.data import dataloader

    real = dataloader._MultiProcessingDataLoaderIter.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        print("workers", *(worker.pid for worker in self._workers), flush=True)

    dataloader._MultiProcessingDataLoaderIter.__init__ = made  # type: ignore[method-assign]
