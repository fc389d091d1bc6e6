"""The processes of one run end together, with one message: nobody waits for a process that has failed.

A process that fails says so in the store through which the processes found each other; a thread in each of the others
looks there. A process whose collective breaks (its peer was killed) or takes longer than the timeout (its peer hangs)
fails with a sentence of its own. The first to fail speaks; the others leave without a word, and with status 1. What is
stuck (in a kernel that waits for a dead peer, in a sleep) is ended from the thread after a few seconds.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.distributed import DistError

from hilum.core.errors import PeerError

_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_TO_LEAVE = 5.0
"""How long a process whose peer has failed may take to come out of what it does."""
_GO_ON = "The same command goes on from the last checkpoint"


class Peers:
    """The other processes of this run, watched while the context is held.

    Leaving it waits for the others, so that none is ended by a launcher for being slower than the first to leave.

    Args:
        barrier: waits for all processes.
        children: those that this process has started.
    """

    def __init__(self, barrier: Callable[[], None], children: Sequence[subprocess.Popen] = ()) -> None:
        self._rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._barrier, self._children = barrier, list(children)
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: the main thread may block the other one
        self.in_order = False
        """All processes have left together, without an error."""
        self._out = threading.Event()  # the main thread has left the context
        self._lock = threading.Lock()
        self._speaks: bool | None = None
        self._reason = ""
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> "Peers":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit):  # leaving in order, perhaps to be run again
            try:
                self._barrier()
                self.in_order = True
                self._out.set()
                return
            except RuntimeError as broken:
                error = broken
        lost = PeerError(self._why() or _told(error)) if _is_of_a_collective(error) else None
        speaks = self._fail(str(lost or error))
        self._out.set()
        self._let_others_hear()
        if not speaks:
            raise SystemExit(1) from None
        if lost:
            raise lost from error

    def end_children(self) -> None:
        """Wait a little for the processes that this one has started; end those that stay."""
        deadline = time.monotonic() + 2 * _SECONDS_TO_LEAVE
        for child in self._children:
            try:
                child.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _watch(self) -> None:
        while not self._out.wait(_SECONDS_BETWEEN_LOOKS):
            reason = self._failure()
            if reason is None:
                continue
            speaks = self._fail(reason)
            if self._out.wait(_SECONDS_TO_LEAVE):
                return
            if speaks:
                print(f"error: {reason}", file=sys.stderr, flush=True)
            for child in self._children:
                child.kill()
            os._exit(1)

    def _failure(self) -> str | None:
        """Why this process must leave; None while all is well."""
        try:
            if self._store.check(["failed"]):
                self._store.set(f"heard by {self._rank}", "")
                return self._store.get("failed").decode()
        except (RuntimeError, DistError):
            return (
                f"Process 0 of this run, of {self._size}, was ended. The same command goes on from the last checkpoint."
            )
        return self._lost_child()

    def _lost_child(self) -> str | None:
        """The first process started here that did not end by itself: with a signal, or a status nobody explains."""
        for rank, child in enumerate(self._children, start=1):
            if (status := child.poll()) is not None and status < 0:
                name = signal.Signals(-status).name
                hint = " (perhaps for want of memory)" if name == "SIGKILL" else ""
                return f"Process {rank} of this run, of {self._size}, was ended by {name}{hint}. {_GO_ON}."
        return None

    def _why(self) -> str | None:
        """A better reason than that of the broken collective, if one is known within a few looks."""
        for _ in range(8):
            reason = self._reason or self._failure()
            if reason:
                return reason
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return None

    def _fail(self, reason: str) -> bool:
        """Tell the others; whether this process is the first and must say why."""
        with self._lock:
            if self._speaks is None:
                self._reason = reason
                try:
                    self._speaks = self._store.add("speakers", 1) == 1
                    if self._speaks:
                        self._store.set("failed", reason)
                except (RuntimeError, DistError):  # the store went with process 0
                    self._speaks = self._rank == 1
            return self._speaks

    def _let_others_hear(self) -> None:
        """The store goes with process 0, which therefore waits until the others know, or a little while."""
        if self._rank:
            return
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        while time.monotonic() < deadline:
            try:
                if self._store.check([f"heard by {rank}" for rank in range(1, self._size)]):
                    return
            except (RuntimeError, DistError):
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether an exchange with the other processes failed. Gloo raises plain RuntimeErrors that name its files."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _told(error: BaseException) -> str:
    text = str(error).splitlines()[0]
    what = "did not answer in time" if "tim" in text.lower() and "out" in text.lower() else "was lost"
    return (
        f"Another process of this run {what} ({text[:200]}). Look at what it printed. {_GO_ON}; "
        "HILUM_COLLECTIVE_TIMEOUT=SECONDS sets how long a process waits for another."
    )
