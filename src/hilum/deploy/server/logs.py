"""What is written down of a request: an id of ours, method, route, status, bytes, milliseconds, kinds of images.

Never an address, a query, a header, a name, a value or the message of an exception: each of them can hold a patient's.
"""

import logging
import secrets
import time
import traceback
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("hilum.server")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
NOTES = "hilum.notes"
"""Entry of a request's scope to which a route adds what may be written: counts, kinds, milliseconds."""


@dataclass
class Record:
    """One request, while it is answered."""

    request: str
    start: float
    notes: dict[str, Any] = field(default_factory=dict)


class RequestLog:
    """Writes a line for each request to the logger `hilum.server`."""

    def begin(self, scope: MutableMapping[str, Any]) -> Record:
        """Count the time from here."""
        record = Record(secrets.token_hex(4), time.monotonic())
        scope[NOTES] = record.notes
        return record

    def end(self, record: Record, scope: MutableMapping[str, Any], status: int, sent: int) -> None:
        """Write the line."""
        route = getattr(scope.get("route"), "path", "-")
        method = scope["method"] if scope["method"] in METHODS else "?"
        milliseconds = 1000 * (time.monotonic() - record.start)
        notes = "".join(f" {name}={value}" for name, value in record.notes.items())
        LOGGER.info("%s %s %s %d %d bytes %.0f ms%s", record.request, method, route, status, sent, milliseconds, notes)

    def failure(self, record: Record, error: BaseException) -> None:
        """Write where an error that nobody expected came from: its type and lines of code, not what it says."""
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        places = " < ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in reversed(frames))
        LOGGER.error("%s failed: %s at %s", record.request, type(error).__name__, places)


def log_to_stderr() -> None:
    """Send our lines to standard error, and of the HTTP library only its warnings, without tracebacks."""
    handler = logging.StreamHandler()
    handler.setFormatter(_NoTraceback("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("hilum.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger().handlers = [logging.NullHandler()]  # other libraries quote what they read


class _NoTraceback(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 - the name that logging calls
        return f"({ei[0].__name__})" if ei and ei[0] else ""

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return ""
