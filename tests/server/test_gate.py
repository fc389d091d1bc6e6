"""Who may ask: names of this server, our own page, the token. And what every answer carries."""

import pytest

from hilum.deploy.server.gate import host_name

PAGE = {"host": "localhost:8000", "x-hilum": "page"}

# What the Host header says, and what becomes of it: 200, 400 (malformed) or 421 (another server's).
HOSTS = [
    ("localhost", 200), ("localhost:8000", 200), ("LOCALHOST:8000", 200), ("127.0.0.1", 200), ("127.0.0.1:8000", 200),
    ("127.0.0.1:9999", 200), ("[::1]", 200), ("[::1]:8000", 200),
    ("evil.example", 421), ("evil.example:8000", 421), ("localhost.evil.example", 421), ("evil.localhost", 421),
    ("127.0.0.1.evil.example", 421), ("127.0.0.1.nip.io", 421), ("localhost.", 421), ("0.0.0.0:8000", 421),
    ("169.254.169.254", 421), ("10.0.0.7:8000", 421), ("127.0.0.2", 421), ("127.1", 421), ("2130706433", 421),
    ("[::ffff:127.0.0.1]", 421), ("[fe80::1]", 421), ("xn--lcalhost-n4a", 421),
    ("", 400), ("localhost:", 400), ("localhost:port", 400), ("localhost:0", 400), ("localhost:99999", 400),
    ("localhost:80:80", 400), ("user@localhost", 400), ("localhost/evil", 400), ("[::1", 400), ("::1", 400),
    ("localhost evil.example", 400), ("localhost, evil.example", 400), ("lócalhost", 400), ("[localhost]", 400),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_only_our_names_are_answered(server, host: str, status: int) -> None:
    answer = server.ask("GET", "/metadata", {"host": host})
    assert answer.status == status
    if status != 200:
        assert answer.code == ("host" if status == 400 else "wrong_host")
        assert host == "" or host not in answer.body.decode()


@pytest.mark.parametrize(
    "headers", [[], [("host", "localhost"), ("host", "evil.example")], [("host", "localhost")] * 2]
)
def test_a_request_names_one_host(server, headers) -> None:
    assert server.ask("GET", "/metadata", headers).status == 400


def test_a_name_can_be_allowed(make_server) -> None:
    server = make_server(hosts=("reading-room.example", "localhost"))
    assert server.ask("GET", "/healthz", {"host": "Reading-Room.example:443"}).status == 200
    assert server.ask("GET", "/healthz", {"host": "reading-room.example.evil.example"}).status == 421
    assert server.ask("GET", "/healthz", {"host": "127.0.0.1:8000"}).status == 200  # where the connection arrived


def test_names_are_read_as_they_are() -> None:
    assert host_name("[2001:DB8::1]:8000") == "2001:db8::1"
    assert host_name("A.example") == "a.example"
    assert host_name("a_b-c.example:1") == "a_b-c.example"


# Who says that they sent a request that changes something: 422 got through the gate (there is no image in it).
ORIGINS = [
    ({}, 422), ({"origin": "http://localhost:8000"}, 422), ({"origin": "https://localhost:8000"}, 422),
    ({"origin": "HTTP://LOCALHOST:8000"}, 422), ({"sec-fetch-site": "same-origin"}, 422),
    ({"sec-fetch-site": "none"}, 422),
    ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": ""}, 403),
    ({"origin": "http://localhost:8001"}, 403), ({"origin": "http://localhost"}, 403),
    ({"origin": "http://127.0.0.1:8000"}, 403), ({"origin": "http://localhost:8000.evil.example"}, 403),
    ({"origin": "http://localhost:8000/"}, 403), ({"origin": "http://evil.example/http://localhost:8000"}, 403),
    ({"origin": "ftp://localhost:8000"}, 403), ({"origin": "file://"}, 403),
    ({"origin": "http://localhost:8000 http://evil.example"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site"}, 403), ({"sec-fetch-site": "x"}, 403),
    ({"origin": "http://localhost:8000", "sec-fetch-site": "cross-site"}, 403),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "status"), ORIGINS)
def test_only_our_page_sends(server, make_multipart, headers, status: int) -> None:
    body, kind = make_multipart([])
    answer = server.ask("POST", "/api/studies", {**PAGE, "content-type": kind, **headers}, body)
    assert answer.status == status
    assert answer.code == ("wrong_origin" if status == 403 else "no_image")
    assert server.ask("DELETE", "/api/studies/" + "a" * 22, {**PAGE, **headers}).status == (
        403 if status == 403 else 404
    )


def test_two_origins_are_none(server) -> None:
    pairs = [*PAGE.items(), ("origin", "http://localhost:8000"), ("origin", "http://localhost:8000")]
    assert server.ask("POST", "/api/studies", pairs).status == 403


def test_pictures_are_not_for_other_sites(server, make_film) -> None:
    study = server.upload([make_film(1)]).json["study"]["id"]
    path = f"/api/studies/{study}/images/1.png"
    assert server.ask("GET", path, {"host": "localhost:8000", "sec-fetch-site": "cross-site"}).status == 403
    answer = server.ask("GET", path, {"host": "localhost:8000", "sec-fetch-site": "same-origin"})
    assert answer.status == 200
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("value", ["", "Page", "pages", "1", "page, page"])
def test_what_a_form_of_another_site_could_send_is_refused(server, make_multipart, value: str) -> None:
    body, kind = make_multipart([])
    headers = {"host": "localhost:8000", "content-type": kind, **({"x-hilum": value} if value else {})}
    answer = server.ask("POST", "/api/studies", headers, body)
    assert (answer.status, answer.code) == (403, "header")
    assert server.ask("DELETE", "/api/studies/x", headers).status == 403


SHOWN = ["/", "/healthz", "/metadata", "/openapi.json", "/nothing", "/api/studies/x", "/static/../app.py"]


@pytest.mark.parametrize("path", SHOWN)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "TRACE", "HEAD", "X"])
def test_every_answer_carries_the_headers(server, path: str, method: str) -> None:
    answer = server.ask(method, path, {**PAGE, "origin": "http://localhost:8000"})
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert "server" not in answer.headers
    assert answer.status < 500


def test_no_other_origin_is_allowed_anything(server) -> None:
    asks = {**PAGE, "origin": "http://evil.example", "access-control-request-method": "POST",
            "access-control-request-headers": "x-hilum"}  # fmt: skip
    for path in ("/api/studies", "/metadata"):
        answer = server.ask("OPTIONS", path, asks)
        assert answer.status in (403, 405)
        assert not [name for name in answer.headers if name.startswith("access-control-")]


TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def guarded(make_server):
    return make_server(token=TOKEN)


@pytest.mark.parametrize("path", ["/metadata", "/openapi.json", "/api/studies/x", "/api/cases/0.png", "/nothing"])
def test_a_token_is_asked_for(guarded, path: str) -> None:
    assert guarded.ask("GET", path, PAGE).status == 401
    answer = guarded.ask("GET", path, {**PAGE, "authorization": f"Bearer {TOKEN}"})
    assert answer.status in (200, 404)


def test_a_page_without_content_needs_no_token(guarded) -> None:
    assert guarded.ask("GET", "/").status == 200
    assert guarded.ask("GET", "/healthz").status == 200
    assert guarded.ask("POST", "/").status == 401


@pytest.mark.parametrize(
    "shown", [TOKEN, f"bearer {TOKEN}", f"Basic {TOKEN}", f"Bearer  {TOKEN}", f"Bearer {TOKEN[:-1]}", "Bearer",
              f"Bearer {TOKEN} ", f"Bearer {TOKEN}, Bearer {TOKEN}", "Bearer \xff"]
)  # fmt: skip
def test_wrong_tokens_are_wrong(make_server, shown: str) -> None:
    answer = make_server(token=TOKEN).ask("GET", "/metadata", {**PAGE, "authorization": shown})
    assert (answer.status, answer.code) == (401, "token")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.body.decode()


def test_a_program_with_the_token_needs_no_other_header(guarded, make_film, make_multipart) -> None:
    body, kind = make_multipart([make_film(2)])
    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}", "content-type": kind}
    assert guarded.ask("POST", "/api/studies", headers, body).status == 200


def test_who_guesses_has_to_wait(make_server) -> None:
    server = make_server(token=TOKEN)
    for _ in range(5):
        assert server.ask("GET", "/metadata", {**PAGE, "authorization": "Bearer guess"}).status == 401
    answer = server.ask("GET", "/metadata", {**PAGE, "authorization": f"Bearer {TOKEN}"})
    assert (answer.status, answer.code) == (429, "too_many_tries")
    assert server.ask("GET", "/healthz").status == 200
