"""What a person sees while a program runs, and what is kept of it: lines, progress with an estimate, `metrics.jsonl`.

The same numbers go to TensorBoard where that is asked for. On a terminal `progress` draws a bar with the time left;
elsewhere it prints a plain line now and then.
Patient identifiers never go through here.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hilum.core.errors import ConfigError, HilumError
from hilum.core.files import write_text

SECONDS_BETWEEN_LINES = 15.0
TENSORBOARD = "tensorboard"
"""Folder of event files, beside `metrics.jsonl`."""


def say(text: str = "") -> None:
    """Print one plain line (no markup) to standard output."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning line to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def next_step(command: str) -> None:
    """Print the command that usually follows."""
    say(f"Next: {command}")


@runtime_checkable
class Bar(Protocol):
    """What `progress` yields."""

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""

    def note(self, text: str) -> None:
        """Show a short text beside the bar (a loss, a count)."""


@contextmanager
def progress(label: str, total: int, unit: str = "") -> Iterator[Bar]:
    """Show progress over `total` units with the time left; yields a `Bar`."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _terminal(console) as display:
            yield _TerminalBar(display, label, total)
    else:
        bar = _PlainBar(label, total, unit)
        yield bar
        bar.finish()


def _terminal(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


class _TerminalBar:
    def __init__(self, display: Progress, label: str, total: int) -> None:
        self.display = display
        self.task = display.add_task(label, total=total, note="")

    def advance(self, count: int = 1) -> None:
        self.display.advance(self.task, count)

    def note(self, text: str) -> None:
        self.display.update(self.task, note=text)


class _PlainBar:
    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.text = 0, ""
        self.start = self.last_line = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.last_line = now
            left = (now - self.start) / max(self.done, 1) * (self.total - self.done)
            self._print(f"about {duration(left)} left")

    def note(self, text: str) -> None:
        self.text = text

    def finish(self) -> None:
        self._print(f"in {duration(time.monotonic() - self.start)}")

    def _print(self, timing: str) -> None:
        parts = [f"{self.label}: {self.done}/{self.total} {self.unit}".rstrip(), timing, self.text]
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A length of time for people: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its step; a resumed run drops the lines past its step.

    Args:
        path: the file; its folder exists.
        resume_step: steps that the run has behind it; 0 begins anew, and drops every line.
        tensorboard: also write the numbers of every line to the folder `tensorboard` beside the file.

    Raises:
        ConfigError: `tensorboard`, and its package is not installed.
        HilumError: the disk is full or fails; names the path.
    """

    def __init__(self, path: Path, resume_step: int = 0, tensorboard: bool = False) -> None:
        self.path = path
        self._events = _Events(path.parent / TENSORBOARD, resume_step) if tensorboard else None
        kept = [text for text, line in _whole_lines(path) if line["step"] <= resume_step] if resume_step else []
        write_text(path, "".join(f"{text}\n" for text in kept))

    def write(self, step: int, **values: Any) -> None:
        """Append one line.

        Raises:
            HilumError: the disk is full or fails; names the path.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise HilumError(f"Could not write {self.path}: {error.strerror or error}. Earlier lines stay.") from error
        if self._events is not None:
            self._events.write(step, values)

    def history(self) -> list[dict[str, Any]]:
        """All lines so far, oldest first: also those that an earlier process has written."""
        return read_history(self.path)

    def close(self) -> None:
        """Write out what TensorBoard's writer still holds. `metrics.jsonl` needs no closing."""
        if self._events is not None:
            self._events.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, oldest first; one cut off by a kill is passed over. Empty without a file.

    Warns of a line that is damaged, and passes it over.
    """
    return [line for _, line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line of a `metrics.jsonl` as text and as what it says."""
    whole = []
    for number, text in enumerate(read_lines(path), 1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError):
            warn(f"{path}: line {number} is damaged and was left out")
        else:
            whole.append((text, line))
    return whole


def read_lines(path: Path) -> list[str]:
    """The whole lines of a text file, without blank ones; none without a file."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]


class _Events:
    """TensorBoard's event files, written without torch. A resumed run tells readers to forget the steps past its own.

    The format is TensorBoard's: an event of status START at step s makes readers drop earlier events from s on
    (tensorflow/tensorboard event_accumulator.py).
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                f"tensorboard=true needs the package tensorboard ({error}): pip install 'hilum[tensorboard]', or leave "
                "it false; metrics.jsonl is written in any case."
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._folder = folder
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = resume_step + 1 if resume_step else 0
        with self._disk():
            self._writer = EventFileWriter(str(folder))
            self._writer.add_event(self._event(wall_time=time.time(), step=first, session_log=start))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars))
        with self._disk():
            self._writer.add_event(event)
            self._writer.flush()

    def close(self) -> None:
        with self._disk():
            self._writer.close()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HilumError(
                f"Could not write {self._folder}: {error.strerror or error}. metrics.jsonl has every line so far."
            ) from error
