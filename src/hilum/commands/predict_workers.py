"""Reading the parts of a prediction: in this process, or by one process for each device. A process that dies, or a
signal, costs the parts that were being read.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from hilum.commands.predict_parts import Part, Parts, Work, read_part
from hilum.core.children import end_with_parent
from hilum.core.errors import ConfigError, HilumError
from hilum.data.store import Store
from hilum.deploy.predictor import Model, load

STOPPED_STATUS = 75
"""Exit status after SIGTERM or SIGUSR1: run the same command again (EX_TEMPFAIL)."""


class Stopped(Exception):  # noqa: N818 (no error: somebody asked)
    """A signal has asked this program to stop."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Inside, SIGTERM and SIGUSR1 are noted; what is yielded raises `Stopped` when called after one."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def check() -> None:
        if asked.is_set():
            raise Stopped

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def devices_of(device: str, count: int) -> list[str]:
    """The device of each process.

    Args:
        device: auto, cpu or cuda.
        count: how many processes.

    Raises:
        ConfigError: fewer than 1, or more than there are CUDA devices.
    """
    if count < 1:
        raise ConfigError(f"--devices: expected at least 1, found {count}.")
    if count == 1:
        return [device]
    import torch

    there = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not there):
        return ["cpu"] * count
    if device not in ("auto", "cuda"):
        raise ConfigError(f"--device {device} names one device, and --devices asks for {count}.")
    if count > there:
        raise ConfigError(f"--devices {count}: torch finds {there} CUDA devices here.")
    return [f"cuda:{number}" for number in range(count)]


def read_here(
    model: Model, work: Work, chunks: Sequence[np.ndarray], parts: Parts | None, done: Callable[[int], None]
) -> list[Part]:
    """Read the parts one after the other, and keep each, where there is a folder for that.

    Args:
        model: loaded.
        work: what is to be read.
        chunks: positions of each part.
        parts: where they are kept; what is there is not read again.
        done: told how many images were finished, after each batch.

    Raises:
        HilumError: a part cannot be written.
    """
    store = None if work.store is None else Store.open(work.store)
    found = []
    for number, positions in enumerate(chunks):
        part = None if parts is None else parts.read(number)
        if part is None:
            part = read_part(model, work, positions, done, store)
            if parts is not None:
                parts.write(number, part)
        found.append(part)
    return found


def read_on_devices(
    work: Work,
    chunks: Sequence[np.ndarray],
    parts: Parts,
    devices: Sequence[str],
    done: Callable[[int], None],
    check: Callable[[], None],
) -> None:
    """Read the parts that are not there by one process a device; each takes the next one when it has finished its own.

    Args:
        work: what is to be read.
        chunks: positions of each part.
        parts: where they are kept.
        devices: of each process.
        done: told how many images were finished.
        check: called often; may raise.

    Raises:
        HilumError: a process has died, or met an error; the parts that are finished stay.
    """
    missing = [number for number in range(len(chunks)) if parts.read(number) is None]
    if not missing:
        return
    spawning = multiprocessing.get_context("spawn")
    threads = max((os.cpu_count() or 1) // len(devices), 1)
    running: dict[Connection, Any] = {}
    waiting = iter(missing)
    try:
        for device in devices[: len(missing)]:
            mine, its = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(its, work, chunks, parts, device, threads), daemon=True)
            with _deaf():
                process.start()
            its.close()
            running[mine] = process
            _send(mine, next(waiting))
        while running:
            for connection in wait(list(running), timeout=0.5):
                assert isinstance(connection, Connection)
                kind, value = _received(connection, running[connection])
                if kind == "images":
                    done(value)
                elif kind == "error":
                    raise HilumError(value)
                else:
                    following = next(waiting, None)
                    _send(connection, following)
                    if following is None:
                        running.pop(connection).join()
            check()
    finally:
        for process in running.values():
            process.kill()  # it is deaf to anything less; a part is whole or not there
        for process in running.values():
            process.join()


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that is started inside never hears what asks programs to stop, which terminals and schedulers send to
    all processes of a program: the one that started it hears it, and ends it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(connection: Connection, number: int | None) -> None:
    with suppress(OSError):  # a process that is dead is found out where it is listened to
        connection.send(number)


def _received(connection: Connection, process: Any) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with status {process.exitcode}"
        raise HilumError(
            f"A process that predicts has ended {how}. What is finished is kept: run the same command again to go on; "
            "if memory was short, with a smaller --batch-size or fewer --devices."
        ) from None


def _serve(
    connection: Connection, work: Work, chunks: Sequence[np.ndarray], parts: Parts, device: str, threads: int
) -> None:
    """A process of its own: reads the parts whose numbers come in, until None comes."""
    end_with_parent()
    import torch

    try:
        if device == "cpu":
            torch.set_num_threads(threads)
        model = load(work.model, device, work.engine, work.precision)
        store = None if work.store is None else Store.open(work.store)
        while (number := connection.recv()) is not None:
            part = read_part(model, work, chunks[number], lambda count: connection.send(("images", count)), store)
            parts.write(number, part)
            connection.send(("part", number))
    except (HilumError, OSError) as error:
        connection.send(("error", str(error)))
