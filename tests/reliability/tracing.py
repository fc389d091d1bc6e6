"""Faults at the system calls of a running program, by strace: real kills and real errors, Rust and C included.

A call is numbered within its thread, among those of its name, from 1: strace counts so. A kill strikes before the
call is made, so that kills before each of them leave every state of the disk that a thread passes through.
"""

import functools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import SECONDS, Child, Warm

CALLS = (
    "openat", "write", "pwrite64", "writev", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "unlink",
    "unlinkat", "rmdir", "fsync", "fdatasync", "ftruncate", "chmod", "fchmod", "link", "linkat", "fallocate",
)  # fmt: skip
"""What changes a file, a name or a folder; openat because it makes files."""


@functools.cache
def _why_not() -> str:
    if not shutil.which("strace"):
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()[:200]}"


def require() -> None:
    """Skip the test, with the reason, where programs may not be traced."""
    if reason := _why_not():
        pytest.skip(reason)


@dataclass(frozen=True)
class Call:
    """One system call of a program."""

    thread: int
    name: str
    text: str
    """With the paths of files in place of their numbers."""
    number: int
    """Among the calls of that name of its thread."""

    def paths(self) -> set[str]:
        """Names in its arguments, and of the files that it is given by number."""
        return {quoted or opened for quoted, opened in re.findall(r'"([^"]*)"|<(/[^>]*)>', self.text)}


def _attach(child: Child, log: Path, *options: str) -> subprocess.Popen[bytes]:
    command = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "signal=none", *options, "-p", str(child.pid)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def calls(warm: Warm, command: Sequence[object], log: Path, hooks: Sequence[Sequence[object]] = ()) -> list[Call]:
    """The calls of a run that nothing disturbs."""
    child = warm.start(command, hooks, traced=True)
    tracer = _attach(child, log, "-e", f"trace={','.join(CALLS)}")
    assert child.wait() == 0, child.said
    tracer.wait(SECONDS)
    found, numbers = [], Counter[tuple[int, str]]()
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match:
            thread, name = int(match[1]), match[2]
            numbers[thread, name] += 1
            found.append(Call(thread, name, match[3], numbers[thread, name]))
    return found


@dataclass(frozen=True)
class Place:
    """Where a fault strikes: the call of that number and name, in the thread that makes it first."""

    name: str
    number: int
    only: tuple[Path, ...] = ()
    """Count and hit only calls on these files."""


def places(found: Sequence[Call], folder: Path) -> list[Place]:
    """A place for every call on files of a folder.

    The main thread's are counted among all of its calls. Those of another thread are counted among the calls on files
    that no thread before it has touched: strace counts in every thread, and an earlier one would come first.
    """
    main, made, touched = found[0].thread, [], set[str]()
    for thread in dict.fromkeys(call.thread for call in found):
        ours = [call for call in found if call.thread == thread and str(folder) in call.text]
        named = {path for call in ours for path in call.paths() if path.startswith(str(folder))}
        own, numbers = sorted(named - touched), Counter[str]()
        touched |= named
        for call in ours:
            if thread == main:
                made.append(Place(call.name, call.number))
            elif not call.paths().isdisjoint(own):
                numbers[call.name] += 1
                made.append(Place(call.name, numbers[call.name], tuple(Path(path) for path in own)))
    return made


def disturbed(
    warm: Warm, command: Sequence[object], log: Path, fault: str, place: Place,
    hooks: Sequence[Sequence[object]] = (),
) -> Child:  # fmt: skip
    """Run a program that meets a fault.

    Args:
        warm: where it is forked.
        command: of the program.
        log: strace's.
        fault: "signal=KILL", "error=ENOSPC", ...
        place: where.
        hooks: as of `Warm.start`.
    """
    child = warm.start(command, hooks, traced=True)
    only = [option for path in place.only for option in ("-P", str(path))]
    tracer = _attach(
        child, log, *only, "-e", f"trace={place.name}", "-e", f"inject={place.name}:{fault}:when={place.number}"
    )
    try:
        child.wait()
    finally:
        tracer.wait(SECONDS)
    return child
