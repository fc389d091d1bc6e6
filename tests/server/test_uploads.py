"""What comes in is counted while it comes, and refused at the limit: too much, too slow, malformed, compressed."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count

import numpy as np
import pytest
from PIL import Image

PAGE = {"host": "localhost:8000", "x-hilum": "page"}
START = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
KIND = {"content-type": "multipart/form-data; boundary=b"}


def counted(piece: bytes, most: int, taken: list[int]) -> Iterator[bytes]:
    """A body of `most` bytes in pieces; writes down how many of them were asked for."""
    yield START
    for _ in range(most // len(piece)):
        taken[0] += len(piece)
        yield piece


def test_a_chunked_body_of_ten_gigabytes_is_refused_after_a_file_s_worth(server) -> None:
    taken = [0]
    answer = server.ask("POST", "/api/studies", {**PAGE, **KIND}, chunks=counted(bytes(2**16), 10 * 2**30, taken))
    assert (answer.status, answer.code, answer.json["error"]["image"]) == (413, "file_too_large", 1)
    assert taken[0] <= 2**20 + 2**17 + 4 * 2**20  # the file limit, and what is listened to so that the refusal is read
    assert answer.headers["connection"] == "close"
    assert server.lives()


def test_files_that_are_each_small_enough_are_refused_together(server, make_multipart) -> None:
    body, kind = make_multipart([bytes(2**20 - 10)] * 3)
    answer = server.ask("POST", "/api/studies", {**PAGE, "content-type": kind}, chunks=[body])
    assert (answer.status, answer.code) == (413, "study_too_large")
    assert server.upload([b"x"] * 5).code == "too_many_files"
    assert server.lives()


@pytest.mark.parametrize(
    ("length", "status"),
    [("99999999999", 413), ("-1", 400), ("+5", 400), ("0x10", 400), ("1e9", 400), ("5 5", 400), ("", 400), ("٣", 400),
     ("9" * 30, 400)],
)  # fmt: skip
def test_a_lying_length_is_refused_before_anything_is_read(server, length: str, status: int) -> None:
    read = []

    def body() -> Iterator[bytes]:
        read.append(1)
        yield b""

    headers = [*{**PAGE, **KIND}.items(), ("content-length", length.encode().decode("latin-1"))]
    answer = asyncio.run(server.asked("POST", "/api/studies", headers, body=b"x"))
    assert answer.status == status
    assert not read
    assert server.lives()


def test_a_body_without_length_and_without_chunks_is_refused(server) -> None:
    pairs = [*{**PAGE, **KIND}.items()]
    scope_without_length = asyncio.run(_without_length(server, pairs))
    assert (scope_without_length.status, scope_without_length.code) == (411, "length_required")


async def _without_length(server, pairs):
    headers = [*pairs, ("transfer-encoding", "")]
    original = server.app

    async def app(scope, receive, send):
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"transfer-encoding"]
        await original(scope, receive, send)

    return await type(server)(app, server.service).asked("POST", "/api/studies", headers)


def test_a_body_of_one_byte_a_while_runs_out_of_time(server) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield START
        for _ in count():
            await asyncio.sleep(0.05)
            yield b"x"

    start = time.monotonic()
    answer = server.ask("POST", "/api/studies", {**PAGE, **KIND}, chunks=drip())
    assert (answer.status, answer.code) == (408, "too_slow")
    assert 0.3 < time.monotonic() - start < 2
    assert server.lives()


def test_a_body_that_stops_runs_out_of_time(server) -> None:
    async def stops() -> AsyncIterator[bytes]:
        yield START + b"abc"
        await asyncio.sleep(60)

    assert server.ask("POST", "/api/studies", {**PAGE, **KIND}, chunks=stops()).status == 408
    assert server.lives()


def test_a_large_body_that_keeps_coming_has_more_time(make_server, small_limits) -> None:
    """One second more for every mebibyte; so that a slow line can send a large study, and a trickle cannot."""
    from dataclasses import replace

    server = make_server(replace(small_limits, body_seconds=0.3))

    async def steady() -> AsyncIterator[bytes]:
        yield START
        for _ in range(6):
            await asyncio.sleep(0.1)
            yield bytes(2**17)
        yield b"\r\n--b--\r\n"

    assert server.ask("POST", "/api/studies", {**PAGE, **KIND}, chunks=steady()).code == "not_an_image"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "x-gzip", "compress"])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_compressed_bodies_are_refused(server, encoding: str, method: str) -> None:
    path = "/api/studies" if method == "POST" else "/healthz"
    answer = server.ask(method, path, {**PAGE, **KIND, "content-encoding": encoding}, b"\x1f\x8b")
    assert (answer.status, answer.code) == (415, "content_encoding")


def test_a_part_that_says_it_is_encoded_is_refused(server) -> None:
    part = START.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n") + b"AAAA\r\n--b--\r\n"
    assert server.ask("POST", "/api/studies", {**PAGE, **KIND}, part).code == "transfer_encoding"


@pytest.mark.parametrize(
    ("kind", "code"),
    [("application/json", "content_type"), ("", "content_type"), ("text/plain; boundary=b", "content_type"),
     ("application/zip", "content_type"), ("multipart/mixed; boundary=b", "content_type"),
     ("multipart/form-data", "boundary"), ("multipart/form-data; boundary=", "boundary"),
     ("multipart/form-data; boundary=" + "b" * 71, "boundary")],
)  # fmt: skip
def test_other_kinds_of_bodies_are_refused(server, kind: str, code: str) -> None:
    answer = server.ask("POST", "/api/studies", {**PAGE, "content-type": kind}, b"--b--\r\n")
    assert (answer.status, answer.code) == (415 if code == "content_type" else 400, code)


END = b"\r\n--b--\r\n"
MALFORMED = {
    "nothing": (b"", 400),
    "no_part": (b"--b--\r\n", 422),
    "no_end": (START + b"abc", 400),
    "end_in_boundary": (START + b"abc\r\n--b", 400),
    "no_boundary": (b"abc", 400),
    "other_boundary": (START.replace(b"--b", b"--c") + b"abc\r\n--c--\r\n", 400),
    "no_disposition": (b"--b\r\nContent-Type: image/png\r\n\r\nabc" + END, 400),
    "unknown_field": (START.replace(b'"files"', b'"password"') + b"abc" + END, 400),
    "no_name": (START.replace(b'; name="files"', b"") + b"abc" + END, 400),
    "nul_in_header": (START.replace(b'"x"', b'"x\0"') + b"abc" + END, 400),
    "many_headers": (START[:-2] + b"X-A: b\r\n" * 50 + b"\r\nabc" + END, 400),
    "long_header": (START[:-2] + b"X-A: " + b"b" * 10000 + b"\r\n\r\nabc" + END, 400),
    "long_view": (START.replace(b"files", b"views") + b"P" * 5000 + END, 422),
    "view_of_nobody": (START.replace(b"files", b"views") + b"SIDEWAYS" + END, 422),
    "only_views": (START.replace(b"files", b"views") + b"PA" + END, 422),
    "empty_file": (START + END, 422),
    "text": (START + b"hello, world" + END, 422),
    "zip": (START + b"PK\x03\x04" + bytes(100) + END, 422),
    "gif": (START + b"GIF89a" + bytes(100) + END, 422),
    "tiff": (START + b"II*\x00" + bytes(100) + END, 422),
    "pickle": (START + b"\x80\x04cos\nsystem\n" + bytes(100) + END, 422),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("whole", [True, False], ids=["at_once", "byte_by_byte"])
def test_malformed_bodies_are_refused(server, case: str, whole: bool) -> None:
    body, status = MALFORMED[case]
    if not whole and len(body) > 400:
        pytest.skip("the same, and slow")
    chunks = [body] if whole else [body[start : start + 1] for start in range(len(body))]
    answer = server.ask("POST", "/api/studies", {**PAGE, **KIND}, chunks=chunks)
    if (
        case == "nul_in_header"
    ):  # the parser lets it pass; the name of the file is not looked at, so nothing comes of it
        assert answer.status in (400, 422)
    else:
        assert answer.status == status, answer.body
    assert answer.json["error"]["message"]
    assert server.lives()


def test_names_of_files_are_not_looked_at(server, make_film, naughty) -> None:
    """Traversals, markup, control characters, a thousand letters: none of it comes back, and none of it matters."""
    first = server.upload([make_film(7)]).json
    studies = [first["study"].pop("id")]
    for name in naughty:
        clean = name.replace('"', "%22").replace("\r", "").replace("\n", "").encode("utf-8", "replace").decode()
        answer = server.upload([make_film(7)], names=[clean[:1000]])
        assert answer.status == 200
        document = answer.json
        studies.append(document["study"].pop("id"))
        assert document == first
    assert len(set(studies)) == len(studies)  # sent again, it is the same under a name of its own
    assert server.ask("DELETE", f"/api/studies/{studies[-1]}").status == 204


def test_more_than_all_uploads_may_hold_is_refused_for_a_moment(server, make_multipart) -> None:
    """Several clients that send large files at once, each within its limits."""

    async def together() -> list:
        body, kind = make_multipart([bytes(2**20 - 100)] * 2)

        async def slowly() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 2**18):
                yield body[start : start + 2**18]
                await asyncio.sleep(0.01)

        wanted = [
            server.asked("POST", "/api/studies", {**PAGE, "content-type": kind}, chunks=slowly()) for _ in range(4)
        ]
        return await asyncio.gather(*wanted)

    answers = asyncio.run(together())
    assert {answer.status for answer in answers} == {422, 503}
    assert all(int(one.headers["retry-after"]) >= 1 for one in answers if one.status == 503)
    assert server.lives()


def test_images_that_are_larger_than_fit_once_decoded_are_not_all_decoded(server, monkeypatch) -> None:
    """A study of small files is not a way to fill the memory."""
    decoded, decode = [], server.service.line.decoder.decode

    def counted(content: bytes, number: int):
        decoded.append(number)
        return decode(content, number)

    monkeypatch.setattr(server.service.line.decoder, "decode", counted)
    films = []
    for grey in range(4):
        buffer = io.BytesIO()
        Image.fromarray(np.full((1200, 1200), grey, np.uint8)).save(buffer, "PNG")
        films.append(buffer.getvalue())
    answer = server.upload(films)
    assert (answer.status, answer.code) == (413, "study_too_large")
    assert decoded == [1, 2]
    assert server.lives()
