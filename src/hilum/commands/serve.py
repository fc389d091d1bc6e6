"""`hilum serve`: a model as a page and an HTTP API, on this machine alone unless it is told otherwise, twice."""

import resource
import socket
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from hilum.core.errors import ConfigError
from hilum.core.tracking import say, warn
from hilum.core.types import RESEARCH_NOTICE

EXTRA = 'hilum serve needs the extra: pip install "hilum[serve]"'
TOKEN_LETTERS = 16
"""A token is at least so long."""
EXPOSED = (
    "--host {host} would let other machines reach this server. It holds images of patients while it works: give it a "
    "token (--token-file FILE) and say that you mean it (--expose), and put TLS in front of it."
)


class ExposedError(ConfigError):
    """An address that others can reach, without a token or without having said so."""


def check_exposure(host: str, token: str | None, expose: bool) -> None:
    """Refuse to listen where other machines are, unless there is a token and somebody said so.

    Raises:
        ExposedError: one of the two is missing.
        ConfigError: no address at all.
    """
    if not is_loopback(host) and not (token and expose):
        raise ExposedError(EXPOSED.format(host=host))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone.

    Raises:
        ConfigError: neither an IP address nor localhost.
    """
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(f"--host {host!r}: expected an IP address, such as 127.0.0.1, or localhost.") from None


def read_token(path: Path) -> str:
    """The token in a file: its first line.

    Raises:
        ConfigError: nothing there, too short, letters that a header cannot hold, or a file that others may read.
    """
    try:
        mode, lines = path.stat().st_mode, path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: it cannot be read as a line of ASCII text.") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--token-file {path}: others may read it. Take that right away: chmod 600 {path}")
    token = lines[0].strip() if lines else ""
    if len(token) < TOKEN_LETTERS or not token.isprintable() or " " in token:
        raise ConfigError(
            f"--token-file {path}: expected at least {TOKEN_LETTERS} letters and digits in its first line. Make one: "
            f'python -c "import secrets; print(secrets.token_urlsafe(32))" > {path}'
        )
    return token


def run(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    index: Path | None = None,
    token_file: Path | None = None,
    expose: bool = False,
    allow_hosts: Sequence[str] = (),
    queue: int | None = None,
    accept_licence: bool = False,
    device: str = "auto",
) -> None:
    """Serve until interrupted.

    Args:
        model: a MODEL or an ensemble directory.
        host: address to listen at; any but this machine's own needs a token and `expose`.
        port: of it; 0: any that is free.
        index: similar cases, made by `hilum index` with the same backbone.
        token_file: a file whose first line every request has to show.
        expose: yes, other machines shall reach it.
        allow_hosts: further names by which the server may be called (behind a proxy, or in the local network).
        queue: studies that wait or are worked on before others are refused; None: as `Limits` has it.
        accept_licence: show other machines every case of the index, whatever its licence.
        device: auto, cpu or cuda.

    Raises:
        ExposedError: an address that others can reach without what that takes.
        ConfigError: an option that means nothing, a name that no request can have, or an extra that is not installed.
        CheckpointError: the model is incomplete or damaged, or the index is of another.
    """
    token = read_token(token_file) if token_file is not None else None
    check_exposure(host, token, expose)
    if queue is not None and queue < 1:
        raise ConfigError(f"--queue {queue}: expected at least 1.")
    try:
        from hilum.deploy.server.app import create_app
        from hilum.deploy.server.gate import host_name
        from hilum.deploy.server.listening import make_server, open_socket
        from hilum.deploy.server.logs import log_to_stderr
        from hilum.deploy.server.service import Service
        from hilum.deploy.server.settings import LOOPBACK, Limits, Settings
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "python_multipart", "h11"):
            raise
        raise ConfigError(EXTRA) from error
    from hilum.deploy.predictor import load
    from hilum.deploy.similar import Index

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump of this process would hold images
    limits = Limits() if queue is None else replace(Limits(), queue=queue)
    for name in allow_hosts:
        if host_name(name) != name.lower():
            raise ConfigError(f"--allow-host {name!r}: expected a name or an address alone, as in reading.example.org.")
    names = (*LOOPBACK, *(name.lower() for name in allow_hosts))
    if not is_loopback(host):
        names = (*names, host, socket.gethostname().lower())
    settings = Settings(token, names, limits)
    with ExitStack() as closing:
        listening = closing.enter_context(open_socket(host, port))
        shared = not is_loopback(host) or bool(allow_hosts)
        cases = Index.open(index) if index is not None else None
        service = Service(load(model, device), limits, cases, shared and not accept_licence)
        closing.callback(service.close)
        log_to_stderr()
        listening.listen()  # so that who reads the line below is not refused
        place = f"[{host}]" if ":" in host else host
        say(RESEARCH_NOTICE)
        say(f"Serving {model} at http://{place}:{listening.getsockname()[1]}/ (stop with Ctrl-C)")
        if token is not None:
            say("Open it as http://.../#token=TOKEN: what is behind # stays in the browser.")
        if allow_hosts and token is None:
            warn("whoever is let through to this server under another name can use it: there is no token")
        if not is_loopback(host):
            warn("other machines can reach this server, and what they send is not encrypted: put TLS in front of it")
        make_server(create_app(service, settings), limits).run([listening])
