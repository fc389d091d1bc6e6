"""Real sockets: clients that are slow, half open, gone, or do not speak HTTP. And what the command line refuses."""

import contextlib
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hilum import cli
from hilum.commands.serve import check_exposure, is_loopback, read_token
from hilum.core.errors import ConfigError
from hilum.deploy.server.listening import make_server as make_listening
from hilum.deploy.server.listening import open_socket


@pytest.fixture(scope="module")
def address(make_server, small_limits):
    """Of a server that is patient for a moment only."""
    limits = replace(small_limits, header_seconds=0.5, body_seconds=0.5, send_seconds=0.5, connections=220)
    listening = open_socket("127.0.0.1", 0)
    running = make_listening(make_server(limits).app, limits)
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield listening.getsockname()
    running.should_exit = True
    thread.join(20)
    listening.close()
    assert not thread.is_alive()


def connect(address) -> socket.socket:
    connection = socket.create_connection(address, timeout=10)
    connection.settimeout(10)
    return connection


def until_closed(connection: socket.socket) -> tuple[bytes, float]:
    """Everything that is said until the other side closes, and how long that took."""
    start, said = time.monotonic(), b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
            said += part
    connection.close()
    return said, time.monotonic() - start


def say(address, content: bytes) -> bytes:
    with connect(address) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        return until_closed(connection)[0]


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = (
    b"POST /api/studies HTTP/1.1\r\nHost: localhost\r\nX-Hilum: page\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n"
)


def lives(address) -> bool:
    return b'"status": "ok"' in say(address, GET)


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize(
    "start", [b"", b"G", b"GET /healthz HTTP/1.1\r\nHost: loc", GET[:-2]], ids=["nothing", "letter", "header", "almost"]
)
def test_headers_that_do_not_come_are_not_waited_for(address, start: bytes) -> None:
    connection = connect(address)
    connection.sendall(start)
    said, took = until_closed(connection)
    assert said == b""
    assert took < 3


def test_headers_that_drip_are_not_waited_for(address) -> None:
    """A letter at a time does not start the clock again."""
    connection, start = connect(address), time.monotonic()
    with contextlib.suppress(ConnectionError):
        for letter in range(100):
            connection.sendall(b"X" if letter else b"GET / HTTP/1.1\r\nX: ")
            time.sleep(0.1)
    assert time.monotonic() - start < 3
    connection.close()


def test_a_second_request_is_not_waited_for_either(address) -> None:
    connection = connect(address)
    connection.sendall(GET.replace(b"Connection: close\r\n", b"") + b"GET /heal")
    said, took = until_closed(connection)
    assert status(said) == 200
    assert took < 3


def test_a_hundred_half_open_connections_are_no_trouble(address) -> None:
    half = [connect(address) for _ in range(100)]
    for number, connection in enumerate(half):
        connection.sendall(POST + b"Content-Length: 100000\r\n\r\n--b" if number % 2 else b"GET / HT")
    start = time.monotonic()
    assert lives(address)
    assert time.monotonic() - start < 10  # one after the other they would take 50 s
    for connection in half:
        until_closed(connection)
    assert lives(address)


def test_too_many_connections_are_refused_and_come_back(address) -> None:
    many = []
    with contextlib.suppress(OSError):
        many = [connect(address) for _ in range(230)]
    for connection in many:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HT")
    assert b" 503 " in say(address, GET).partition(b"\r\n")[0]
    for connection in many:
        until_closed(connection)
    assert lives(address)


@pytest.mark.parametrize("after", [0, 10, 100_000])
def test_a_reset_in_the_middle_of_an_upload_is_no_trouble(address, after: int) -> None:
    for _ in range(5):
        connection = connect(address)
        connection.sendall(POST + b"Content-Length: 200000\r\n\r\n" + b"--b\r\n"[:after] + bytes(max(0, after - 5)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert lives(address)


def test_a_body_that_stops_is_told_so(address) -> None:
    said = say(address, POST + b"Content-Length: 200000\r\n\r\n--b\r\n")
    assert status(said) == 408
    assert b'"too_slow"' in said


def test_a_body_without_end_is_refused(address) -> None:
    connection = connect(address)
    start = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
    connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(start), start))
    sent, piece = 0, b"10000\r\n" + bytes(2**16) + b"\r\n"
    with contextlib.suppress(OSError):
        while sent < 10 * 2**30:
            connection.sendall(piece)
            sent += 2**16
    assert sent < 64 * 2**20
    connection.close()
    assert lives(address)


def test_a_large_declared_body_is_refused_unread_and_the_refusal_arrives(address) -> None:
    said = say(address, POST + b"Content-Length: 99999999999\r\n\r\n")
    assert status(said) == 413
    assert b'"study_too_large"' in said
    said = say(address, POST + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n")
    assert status(said) == 413  # and not 100, go on
    said = say(address, POST + b"Content-Length: 3000000\r\n\r\n" + bytes(3000000))
    assert status(said) == 413


def test_who_does_not_read_the_answer_is_left(address, make_film, make_multipart) -> None:
    """Asks for more than the buffers between us hold and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(10)
    connection.connect(address)
    with contextlib.suppress(OSError):
        for _ in range(4000):
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(1.5)
    cut_off = False
    for _ in range(2000):
        try:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        except OSError:  # reset, or broken pipe: it depends on what was in flight
            cut_off = True
            break
        time.sleep(0.001)
    assert cut_off
    connection.close()
    assert lives(address)


NO_HTTP = {
    "garbage": bytes(range(256)) * 4,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "newlines": b"\r\n" * 5000,
    "no_version": b"GET /\r\n\r\n",
    "http9": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "http10_without_host": b"GET /healthz HTTP/1.0\r\n\r\n",
    "two_lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "length_and_chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip_chunks": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "negative_length": POST + b"Content-Length: -1\r\n\r\n",
    "chunk_size": POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
    "negative_chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n",
    "long_path": b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long_header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
    "many_headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 10000 + b"\r\n",
    "folded": b"GET / HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n\r\n",
    "space_before_colon": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "nul": b"GET / HTTP/1.1\r\nHost: local\x00host\r\n\r\n",
    "two_hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "absolute": b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "connect": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "traversal": b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "encoded_traversal": b"GET /static/%2e%2e/%2e%2e/app.py HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "websocket": b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "request_in_body": POST + b"Content-Length: 0\r\n\r\n" + GET,
}  # fmt: skip


@pytest.mark.parametrize("case", NO_HTTP)
def test_what_is_no_request_is_no_trouble(address, case: str) -> None:
    said = say(address, NO_HTTP[case])
    assert b"HTTP/1.1 5" not in said
    assert b"root:" not in said
    assert b"import " not in said
    assert lives(address)


def mutated(rng: random.Random) -> bytes:
    """A sound request with a few bytes changed, doubled or left out."""
    start = rng.choice([GET, POST + b"Content-Length: 20\r\nConnection: close\r\n\r\n--b\r\nContent-Dispositi"])
    content = bytearray(start)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content))
        kind = rng.randrange(3)
        if kind == 0:
            content[at] = rng.randrange(256)
        elif kind == 1:
            del content[at : at + rng.randint(1, 5)]
        else:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 5))) * rng.choice([1, 1, 50])
    return bytes(content)


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_requests_are_no_trouble(address, count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        content = mutated(rng)
        with connect(address) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
            said = until_closed(connection)[0]
        assert b"HTTP/1.1 5" not in said, content
    assert lives(address)


# The command line


def run(words: list[str]) -> int:
    before, sys.argv = sys.argv, ["hilum", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("a-token-of-enough-letters\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::", "192.168.1.2", "fe80::1"])
@pytest.mark.parametrize("given", ["", "--expose", "--token-file"])
def test_other_machines_need_a_token_and_a_word(host: str, given: str, token_file: Path, capsys) -> None:
    options = [given, str(token_file)] if given == "--token-file" else [given] if given else []
    assert run(["serve", "model", "--host", host, *options]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "would let other machines reach this server" in said
    assert "--token-file FILE" in said
    assert "--expose" in said


def test_both_together_are_enough() -> None:
    check_exposure("0.0.0.0", "token", True)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_exposure(host, None, False)
        assert is_loopback(host)
    with pytest.raises(ConfigError, match="expected an IP address"):
        is_loopback("example.org")


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [("short", 0o600, "at least 16"), ("", 0o600, "at least 16"), ("with spaces in it, many", 0o600, "at least 16"),
     ("a-token-of-enough-letters", 0o644, "chmod 600"), ("a-token-of-enough-letters", 0o640, "chmod 600"),
     ("tökentökentökentöken", 0o600, "ASCII")],
)  # fmt: skip
def test_tokens_that_are_none(tmp_path: Path, content: str, mode: int, said: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=said) as refused:
        read_token(file)
    assert not content or content not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_a_token_is_the_first_line(token_file: Path) -> None:
    assert read_token(token_file) == "a-token-of-enough-letters"


def test_a_port_that_is_taken_is_said_so(capsys) -> None:
    with contextlib.closing(open_socket("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", "model", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port} cannot be had" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said_so(tmp_path: Path, capsys) -> None:
    assert run(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "error:" in capsys.readouterr().err
    assert run(["serve", "model", "--port", "70000"]) == 2
    assert run(["serve", "model", "--queue", "0"]) == 1


@pytest.mark.parametrize("name", ["http://reading.example.org", "reading.example.org:8000", "a b", "", "[::1]", "*"])
def test_names_that_no_request_can_have_are_said_so(name: str, capsys) -> None:
    assert run(["serve", "model", "--port", "0", "--allow-host", name]) == 1
    assert "expected a name or an address alone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_extra_is_one_sentence() -> None:
    for package in ("fastapi", "uvicorn", "python_multipart"):
        program = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['hilum', 'serve', 'model']"
        done = subprocess.run(
            [sys.executable, "-c", f"{program}; from hilum.cli import main; main()"], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == 'error: hilum serve needs the extra: pip install "hilum[serve]"\n'
