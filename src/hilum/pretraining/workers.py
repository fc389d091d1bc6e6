"""The processes that make batches ahead of time: how they behave, and what happens when one dies.

Nothing here knows what a batch is (`loading.py` does).
"""

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import cv2
from torch.utils.data import DataLoader

from hilum.core.errors import HilumError


def watched(loader: DataLoader) -> Iterator[Any]:
    """What a loader's workers make; a worker that dies is one error, raised where the next batch is asked for.

    Left alone, torch raises its own in whatever line the program is when the worker dies.

    Args:
        loader: with one worker or more.

    Raises:
        HilumError: a worker has died; says how, and what to do.
    """
    others = set(multiprocessing.active_children())
    with _unheard(signal.SIGTERM, signal.SIGUSR1):
        batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    main, torchs = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGCHLD)
    waiting = False

    def child_changed(_number: int, _frame: FrameType | None) -> None:
        if waiting and _dead(workers):  # perhaps for a message of which the dead worker wrote only a part
            raise _WorkerDiedError

    if main:
        signal.signal(signal.SIGCHLD, child_changed)
    try:
        while not _dead(workers):
            waiting = True
            try:
                batch = next(batches)
            except StopIteration:
                return
            except _WorkerDiedError:
                break
            except (RuntimeError, OSError, EOFError):
                waiting = False
                if not _dead_soon(workers):
                    raise
                break
            finally:
                waiting = False
            yield batch
        raise HilumError(_obituary(_dead(workers)[0], len(workers)))
    finally:
        if _dead(workers):  # the others may wait for it for ever
            for process in workers:
                process.kill()
                process.join()
        del batches  # asks the workers to end, and waits for them
        for process in workers:
            if process.is_alive():  # they do not listen to SIGTERM
                process.kill()
        if main and signal.getsignal(signal.SIGCHLD) is child_changed:
            signal.signal(signal.SIGCHLD, torchs)


@contextmanager
def _unheard(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that are started inside never get these signals, from their first moment: a blocked one stays blocked.

    A scheduler sends them to every process of a job. They are for the main one, which gets its own a moment later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerDiedError(Exception):
    """Leaves the line that waits for a dead worker."""


def _dead(workers: list[BaseProcess]) -> list[BaseProcess]:
    """Workers that have ended other than by being asked to."""
    return [process for process in workers if process.exitcode]


def _dead_soon(workers: list[BaseProcess], seconds: float = 5) -> list[BaseProcess]:
    """The dead, once those that are dying have died: a process lets go of its connections before it counts as ended."""
    dying = wait([process.sentinel for process in workers], timeout=seconds)
    for process in workers:
        if process.sentinel in dying:
            process.join()
    return _dead(workers)


def _obituary(process: BaseProcess, workers: int) -> str:
    status = process.exitcode or 0
    how, why = f"ended with status {status}", "Its own message, above, says why."
    if status < 0:
        how, why = f"was killed by signal {-status}", "Use workers=0 to see where."
        with suppress(ValueError):  # not every number has a name
            how = f"was killed by {signal.Signals(-status).name}"
    if status == -signal.SIGKILL:
        why = (
            "Most often the machine, the container or the job ran out of memory: ask for more, or use fewer workers "
            "or a smaller batch."
        )
    if status == -signal.SIGBUS:
        why = (
            "Most often /dev/shm, through which workers hand over batches, is full: make it larger, or use fewer "
            "workers or a smaller batch."
        )
    return (
        f"Loading: worker process {process.pid}, one of {workers}, {how}. {why} Then run the same command again: a run "
        "goes on from its last checkpoint."
    )


def in_worker(_worker: int) -> None:
    """One thread each; signals are for the main process, which saves and then stops its workers."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
