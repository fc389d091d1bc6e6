"""A warm process from which programs are forked: importing torch costs seconds, a fork costs milliseconds.

Run as a program, it imports everything, starts no thread, and forks on request; a child is a process of its own, with
its own process group, signals, environment and output, in which `hilum.cli.main` runs as it does from a shell. Forking
is sound because the parent has one thread and has computed nothing: asserted at every fork.
"""

import atexit
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

NEEDED = (
    "lightning_fabric.strategies", "torch._dynamo", "typer._adapters", "hilum.recipes", "hilum.commands.fit",
    "hilum.commands.pretrain",
)  # fmt: skip
"""What programs import while they run, by name or on the way (an optimizer, a command line)."""

SECONDS = 60.0
"""No program here may take longer: the limit of "does not hang"."""


@dataclass
class Child:
    """A running or finished program."""

    warm: "Warm"
    pid: int
    folder: Path
    status: int | None = None

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit status, minus the signal's number where one ended it; a hang is killed, and fails the test."""
        if self.status is None:
            self.status = self.warm.ask({"wait": self.pid, "seconds": seconds})
            if self.status is None:
                self.kill_group()
                self.status = self.warm.ask({"wait": self.pid, "seconds": SECONDS})
                raise AssertionError(f"hung for {seconds} s:\n{self.said[-3000:]}")
        return self.status

    def poll(self, seconds: float = 0.0) -> int | None:
        """As `wait`, and None where it still runs."""
        if self.status is None:
            self.status = self.warm.ask({"wait": self.pid, "seconds": seconds})
        return self.status

    def send(self, number: int) -> bool:
        """Send it a signal; False where it has ended."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)  # not reaped yet, so the number is still its own
        return True

    def kill_group(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        """Standard output, then standard error."""
        return self.output + self.errors

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")


class Warm:
    """The test's end of the warm process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.ask({"ready": True})

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, arguments: Sequence[object], hooks: Sequence[Sequence[Any]] = (), traced: bool = False, **env: object
    ) -> Child:
        """Start `hilum ARGUMENTS` after calling the named functions of `hooks.py`.

        Args:
            arguments: of the command line.
            hooks: name and arguments of each.
            traced: wait until a tracer is attached.
            env: of the program, beside this process's.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        environment = {name: str(value) for name, value in env.items()}
        pid = self.ask(
            {
                "start": [str(argument) for argument in arguments],
                "hooks": [list(hook) for hook in hooks],
                "traced": traced,
                "env": environment,
                "folder": str(folder),
            }
        )
        return Child(self, pid, folder)

    def run(self, arguments: Sequence[object], hooks: Sequence[Sequence[Any]] = (), **env: object) -> Child:
        """`start`, and wait for the end."""
        child = self.start(arguments, hooks, **env)
        child.wait()
        return child

    def ranks(self, arguments: Sequence[object], hooks: Sequence[Sequence[Any]] = (), **env: object) -> list[Child]:
        """Start two processes of one run, as torchrun would."""
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "reliability",
        }  # fmt: skip
        return [self.start(arguments, hooks, RANK=rank, LOCAL_RANK=rank, **common, **env) for rank in (0, 1)]

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(SECONDS)


def serve() -> None:
    """The warm process: one request a line, one answer a line."""
    for name in NEEDED:
        import_module(name)
    from hilum.pretraining.loading import PretrainBatch

    for kind in (Mapping, Sequence):  # 0.1 s the first time, when every class of theirs is asked; the loader asks too
        assert not issubclass(PretrainBatch, kind)
    gc.collect()
    gc.freeze()  # a child's collections need not copy the parent's objects

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"  # noqa: PTH208
            pid = os.fork()
            if not pid:
                answers.close()
                _program(request)
            answer: object = pid
        elif "wait" in request:
            answer = _wait(request["wait"], request["seconds"])
        else:
            answer = True
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.005)


def _program(request: dict[str, Any]) -> None:
    """In the child; does not return."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.update(request["env"])
    sys.argv = ["hilum", *request["start"]]
    import hooks

    from hilum.cli import main

    chosen: list[tuple[Callable[..., None], list[Any]]] = [
        (getattr(hooks, name), arguments) for name, *arguments in request["hooks"]
    ]
    for hook, arguments in chosen:
        hook(*arguments)
    while request["traced"] and "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.005)
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 3  # what no program may show a user
    if "WORLD_SIZE" in os.environ:  # what the end of an interpreter does to a group of processes is worth its time
        sys.exit(code)
    # The same but for taking every module apart, which would copy all of the parent's memory.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
