"""Who may ask, and what every answer carries: the outermost layer, before any framework sees a request.

A page of another site, open in the same browser, must not reach the model: the Host header must name this server (DNS
rebinding), a request that changes something must come from our own page or show a token, no answer allows another
origin anything. Whatever goes wrong inside ends here, as a sentence without a word of the input.
"""

import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any

from hilum.deploy.server.errors import RefusedError, standard
from hilum.deploy.server.logs import RequestLog
from hilum.deploy.server.settings import Settings
from hilum.deploy.server.uploads import Intake

Scope = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = ("/", "/healthz", "/favicon.ico")
"""What needs no token, beside /static/: a page without content, which asks for it."""
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
_ADDRESSES = 1000
"""Of clients with wrong tokens, that are remembered."""


def host_name(value: str) -> str | None:
    """The name or address in a Host header, in lower case, without port and brackets; None where it is malformed."""
    name, _, port = value.rpartition(":") if not value.endswith("]") and ":" in value else (value, "", "")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        return None
    if value.endswith(":"):
        return None
    if name.startswith("["):
        inner = name.removeprefix("[").removesuffix("]")
        try:
            return str(ip_address(inner)) if name.endswith("]") and ":" in inner else None
        except ValueError:
            return None
    if not name or len(name) > 253 or not all(one.isascii() and (one.isalnum() or one in "-._") for one in name):
        return None
    return name.lower()


def check_host(values: list[str], hosts: tuple[str, ...], local: str = "") -> str:
    """The Host header of a request for this server.

    Args:
        values: every Host header of the request.
        hosts: names that are ours.
        local: the address at which the connection arrived; it is ours too.

    Raises:
        RefusedError: 400; none, several or a malformed one. 421; another server's.
    """
    if len(values) != 1:
        raise RefusedError(400, "host", "A request names its server in one Host header.")
    name = host_name(values[0].strip())
    if name is None:
        raise RefusedError(400, "host", "The Host header is malformed.")
    if name not in hosts and (not local or name != local):
        raise RefusedError(421, "wrong_host", "This server does not go by that name; start it with --allow-host NAME.")
    return values[0].strip().lower()


def check_origin(headers: list[tuple[str, str]], host: str, method: str, path: str) -> None:
    """That a request comes from our own page, or from no page at all.

    Args:
        headers: names in lower case.
        host: the Host header, checked.
        method: of the request.
        path: of the request.

    Raises:
        RefusedError: 403.
    """
    origins = [value for name, value in headers if name == "origin"]
    sites = {value.strip().lower() for name, value in headers if name == "sec-fetch-site"}
    ours = (f"http://{host}", f"https://{host}")
    changes = method not in SAFE_METHODS
    foreign_origin = any(origin.strip().lower() not in ours for origin in origins)
    foreign_site = bool(sites - {"same-origin", "none"})
    if (changes or path.startswith("/api/")) and (foreign_origin or foreign_site or len(origins) > 1):
        raise RefusedError(403, "wrong_origin", "Requests of other sites are not answered.")


class Tokens:
    """The one token, and those who tried others.

    Args:
        token: None: nobody needs one.
        most_wrong: tries in a minute from one address.
    """

    def __init__(self, token: str | None, most_wrong: int) -> None:
        self.token, self.most_wrong = token, most_wrong
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    def shown(self, headers: list[tuple[str, str]], client: str) -> bool:
        """Whether a request shows the token.

        Raises:
            RefusedError: 401 a wrong one, 429 too many wrong ones.
        """
        bearers = [value for name, value in headers if name == "authorization"]
        if self.token is None or not bearers:
            return False
        recent = [at for at in self._wrong.get(client, []) if time.monotonic() - at < 60]
        if len(recent) >= self.most_wrong:
            raise RefusedError(429, "too_many_tries", "Too many wrong tokens.", headers={"Retry-After": "60"})
        expected = f"Bearer {self.token}"
        if len(bearers) == 1 and hmac.compare_digest(bearers[0].encode(), expected.encode()):
            return True
        self._wrong[client] = [*recent, time.monotonic()]
        self._wrong.move_to_end(client)
        while len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)
        raise unauthorised()


def unauthorised() -> RefusedError:
    """401."""
    message = "This server wants its token, as Authorization: Bearer TOKEN."
    return RefusedError(401, "token", message, headers={"WWW-Authenticate": "Bearer"})


class Gate:
    """An ASGI application around another: checks first, security headers on every answer, no error gets past it.

    Args:
        inner: what answers.
        settings: who may ask.
        log: of requests.
    """

    def __init__(self, inner: Application, settings: Settings, log: RequestLog) -> None:
        self.inner, self.settings, self.log = inner, settings, log
        self.tokens = Tokens(settings.token, settings.limits.wrong_tokens)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        intake = Intake(scope, receive)
        answer = _Answer(send, intake)
        record = self.log.begin(scope)
        try:
            self._check(scope)
            await self.inner(scope, intake, answer)
        except RefusedError as refusal:
            await answer.refuse(refusal)
        except Exception as error:  # the last one who can keep it from a log that would quote the input
            self.log.failure(record, error)
            await answer.refuse(standard(500))
        finally:
            self.log.end(record, scope, answer.status, answer.sent)

    def _check(self, scope: Scope) -> None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        local = str((scope.get("server") or ("",))[0])
        host = check_host([value for name, value in headers if name == "host"], self.settings.hosts, local)
        method, path = scope["method"], scope["path"]
        if any(name == "content-encoding" and value.strip().lower() != "identity" for name, value in headers):
            raise RefusedError(415, "content_encoding", "Bodies are sent as they are, not compressed.")
        check_origin(headers, host, method, path)
        client = str((scope.get("client") or ("",))[0])
        shown = self.tokens.shown(headers, client)
        if self.tokens.token is not None and not shown and not _is_open(path, method):
            raise unauthorised()
        from_page = any(name == "x-hilum" and value.strip() == "page" for name, value in headers)
        if method not in SAFE_METHODS and not from_page and not shown:
            raise RefusedError(403, "header", "Send the header X-Hilum: page; pages of other sites cannot.")


def _is_open(path: str, method: str) -> bool:
    return method in SAFE_METHODS and (path in OPEN_PATHS or path.startswith("/static/"))


class _Answer:
    """`send` of ASGI with our headers, and a memory of what was said."""

    def __init__(self, send: Any, intake: Intake) -> None:
        self._send, self._intake = send, intake
        self.status, self.sent, self._started = 0, 0, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._started, self.status = True, message["status"]
            given = [(name.lower(), value) for name, value in message.get("headers", [])]
            names = {name for name, _ in given}
            added = [pair for pair in SECURITY_HEADERS if pair[0] not in names]
            if b"content-security-policy" not in names:
                added.append((b"content-security-policy", CONTENT_POLICY.encode()))
            given = [pair for pair in given if pair[0] != b"cache-control"] + [(b"cache-control", b"no-store")]
            if message["status"] >= 400 and message["status"] != 408:
                await self._intake.drain()
            if not self._intake.ended and b"connection" not in names:
                given.append((b"connection", b"close"))  # the rest of the body is not read
            message = {**message, "headers": [*given, *added]}
        else:
            self.sent += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refusal: RefusedError) -> None:
        """Say no, unless an answer has begun."""
        if self._started:
            return
        body = refusal.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        await self({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})
