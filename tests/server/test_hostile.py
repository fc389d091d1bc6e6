"""Requests without end that nobody in their right mind would send: none is answered with 500, and the server lives.

Request number i is a function of i alone. 5,000 of them in the nightly run, a slice by default; schemathesis adds what
the description of the API makes it think of.
"""

import asyncio
import random
from collections import Counter

import numpy as np
import pytest
from damage_inputs import dicoms, mutate, rasters

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "GET\x00", "")
PATHS = (
    "/", "/healthz", "/metadata", "/openapi.json", "/static/{}", "/api/studies", "/api/studies/{}",
    "/api/studies/{}/images/{}.png", "/api/studies/{}/maps/{}/{}.png", "/api/studies/{}/similar?count={}&finding={}",
    "/api/studies/{}/report.html", "/api/studies/{}/report.json", "/api/studies/{}/report.fhir.json",
    "/api/cases/{}.png", "/{}", "/api/{}", "//{}", "/static/../{}", "/metadata?{}={}", "/healthz/{}", "*",
)  # fmt: skip
HEADERS = (
    "host", "origin", "x-hilum", "content-type", "content-length", "transfer-encoding", "content-encoding", "accept",
    "authorization", "cookie", "expect", "range", "if-none-match", "sec-fetch-site", "x-forwarded-for", "x-real-ip",
    "forwarded", "x-http-method-override", "x-original-url", "upgrade", "connection", "te", "x",
)  # fmt: skip
NUMBERS = (
    "0",
    "1",
    "2",
    "-1",
    "01",
    "1.0",
    "1e3",
    "2147483648",
    "99999999999999999999",
    "0x1",
    "NaN",
    "\uff11",
    "+1",
    "",
)
BOUNDARY = "b"


class Corpus:
    """Requests by number."""

    def __init__(self, naughty: list[str], studies: list[str]) -> None:
        self.words = [*naughty, *NUMBERS, *studies, *studies, *studies]
        self.files = [*rasters().values(), *dicoms().values()]

    def request(self, number: int) -> tuple[str, str, list[tuple[str, str]], bytes]:
        """Method, path, headers and body."""
        rng = random.Random(number)
        upload = number % 3 == 0
        method = "POST" if upload else rng.choice(METHODS) if rng.random() < 0.2 else "GET"
        template = "/api/studies" if upload else rng.choice(PATHS)
        words = [self._word(rng) for _ in range(template.count("{}"))]
        path = template.format(*words)
        headers = [("host", "localhost:8000"), ("x-hilum", "page")]
        body = self._body(rng, number) if upload or rng.random() < 0.3 else b""
        if body:
            headers.append(("content-type", f"multipart/form-data; boundary={BOUNDARY}"))
        while rng.random() < 0.4:
            headers.append((rng.choice(HEADERS), self._header(rng)))
        if rng.random() < 0.1:
            headers.pop(rng.randrange(len(headers)))
        return method, path, headers, body

    def _word(self, rng: random.Random) -> str:
        word = rng.choice(self.words)
        return word[:2000] if rng.random() < 0.9 else word * rng.choice([2, 20])

    def _header(self, rng: random.Random) -> str:
        kind = rng.randrange(4)
        if kind == 0:
            return rng.choice(
                ["gzip", "chunked", "page", "evil.example", "null", "Bearer x", "100-continue", "bytes=0-"]
            )
        if kind == 1:
            return rng.choice(NUMBERS).encode("utf-8").decode("latin-1")
        return self._word(rng).encode("utf-8", "surrogatepass").decode("latin-1")

    def _body(self, rng: random.Random, number: int) -> bytes:
        parts = []
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 9])):
            content = rng.choice(self.files)
            if rng.random() < 0.7:
                content, _ = mutate(content, np.random.default_rng([7, number, len(parts)]))
            name = rng.choice(["files", "files", "files", "views", "file", self._word(rng)])
            header = f'Content-Disposition: form-data; name="{name}"; filename="{self._word(rng)}"'
            parts.append(b"--b\r\n" + header.encode("utf-8", "surrogatepass") + b"\r\n\r\n" + content + b"\r\n")
        body = b"".join([*parts, b"--b--\r\n"])
        return mutate(body, np.random.default_rng([11, number]))[0] if len(body) > 400 and rng.random() < 0.3 else body


@pytest.mark.parametrize(
    ("start", "count"), [(0, 150), *(pytest.param(500 * n, 500, marks=pytest.mark.slow) for n in range(10))]
)
def test_hostile_requests_are_no_trouble(make_server, small_limits, naughty, make_film, start: int, count: int) -> None:
    server = make_server(small_limits)
    good = [make_film(seed) for seed in (71, 72)]
    study = server.upload(good).json["study"]["id"]
    corpus, statuses = Corpus(naughty, [study]), Counter()

    async def several(numbers: range) -> list:
        return await asyncio.gather(*(server.asked(*corpus.request(number)) for number in numbers))

    for first in range(start, start + count, 3):  # three at a time, as many as there are places
        for number, answer in enumerate(asyncio.run(several(range(first, min(first + 3, start + count)))), first):
            statuses[answer.status] += 1
            assert answer.status < 500 or answer.status == 503, (number, corpus.request(number)[:3], answer.body)
            if answer.status >= 400 and corpus.request(number)[0] != "HEAD":
                assert answer.json["error"]["code"]
            assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.lives()
    assert server.upload([make_film(73)]).status == 200  # and the next right question gets its answer
    assert server.service.line.decoder.replaced == 0
    assert len(statuses) > 5, statuses
    print(statuses)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_api_is_as_it_describes_itself(make_server, make_film, mode: str) -> None:
    """schemathesis on every route: what its checks make of the description, and of what breaks it."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.checks import negative_data_rejection, positive_data_acceptance

    server = make_server()
    server.upload([make_film(80)])
    page = {"host": "localhost", "x-hilum": "page"}
    described = schemathesis.openapi.from_asgi("/openapi.json", server.app, headers=page)
    tried: Counter[str] = Counter()
    for result in described.get_all_operations():
        operation = result.ok()
        cases = operation.as_strategy(generation_mode=GenerationMode(mode))

        @settings(
            max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases)
        def ask(case) -> None:
            tried[case.operation.label] += 1
            response = case.call(headers=page)
            assert response.status_code != 500
            # A name that is none, and bytes that are no image, are as the description asks, and yet refused. What is
            # not as it asks may be refused for its size first, which schemathesis does not count.
            case.validate_response(response, excluded_checks=[positive_data_acceptance, negative_data_rejection])
            assert mode == "positive" or response.status_code >= 400

        try:
            ask()
        except Unsatisfiable:  # a route that asks for nothing, or for any text: nothing can be wrong with it
            assert mode == "negative"
    assert len(tried) >= (12 if mode == "positive" else 5), tried
    assert server.lives()
