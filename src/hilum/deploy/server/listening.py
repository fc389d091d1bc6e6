"""The HTTP library, told to be careful: one process, no proxies believed, no log of its own, and clients that are slow
to ask or slow to read are cut off.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hilum.core.errors import ConfigError
from hilum.deploy.server.gate import Gate
from hilum.deploy.server.settings import Limits

HEADER_BYTES = 16 * 1024
KEEP_ALIVE_SECONDS = 5
CLOSING_SECONDS = 5.0


def impatient(limits: Limits) -> type[H11Protocol]:
    """The protocol of one connection, with the time limits that the library lacks.

    Args:
        limits: `header_seconds` until the headers of a request are whole; `send_seconds` until a client reads on.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.header_alarm: asyncio.TimerHandle | None = None
            self.send_alarm: asyncio.TimerHandle | None = None
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.header_alarm = _cancel(self.header_alarm)
            self.send_alarm = _cancel(self.send_alarm)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self.send_alarm is None:
                self.send_alarm = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self.send_alarm = _cancel(self.send_alarm)
            super().resume_writing()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.loop.call_later(CLOSING_SECONDS, self.transport.abort)  # what it has not read by then is lost

        def _watch(self) -> None:
            """Wait so long, from the first moment on, for the headers of the next request."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.header_alarm = _cancel(self.header_alarm)
            elif self.header_alarm is None:
                self.header_alarm = self.loop.call_later(limits.header_seconds, self.transport.abort)

    return Impatient


def _cancel(alarm: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Nothing, in place of an alarm."""
    if alarm is not None:
        alarm.cancel()
    return None


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is known before anything else starts.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"{host}:{port} cannot be had ({error.strerror}). Choose another --port.") from error
    return listening


def make_server(app: Gate, limits: Limits) -> uvicorn.Server:
    """A server for a socket of `open_socket`: `make_server(app, limits).run([socket])`."""
    config = uvicorn.Config(
        app, http=impatient(limits), ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, h11_max_incomplete_event_size=HEADER_BYTES, limit_concurrency=limits.connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=10, loop="asyncio",
    )  # fmt: skip
    return uvicorn.Server(config)
