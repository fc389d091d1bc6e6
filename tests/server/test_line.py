"""The line: a few places, an honest refusal beyond them, nothing done twice, nothing done for nobody; and no NaN."""

import asyncio
import copy
import json
import threading
from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture
def held_up(make_server, monkeypatch):
    """A server whose model waits until it is let go; and how often it was asked."""
    server = make_server()
    line, go, calls = server.service.line, threading.Event(), []
    judge = line.judge

    def wait(pictures, job):
        calls.append(job.digest)
        assert go.wait(20)
        return judge(pictures, job)

    monkeypatch.setattr(line, "judge", wait)
    yield server, go, calls
    go.set()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_full_line_refuses_with_a_time_to_try_again(held_up, make_film) -> None:
    server, go, calls = held_up

    async def many():
        jobs = server.service.line.jobs
        first = [asyncio.ensure_future(server.uploaded([make_film(seed)])) for seed in range(3)]
        await until(lambda: len(jobs) == 3)
        assert (await server.asked("GET", "/healthz")).json == {"status": "ok", "queue": 3, "limit": 3}
        refused = await asyncio.gather(*(server.uploaded([make_film(seed)]) for seed in range(50, 60)))
        assert len(jobs) == 3
        go.set()
        return await asyncio.gather(*first), refused

    served, refused = asyncio.run(many())
    assert [one.status for one in served] == [200] * 3
    assert {(one.status, one.code) for one in refused} == {(503, "busy")}
    assert all(1 <= int(one.headers["retry-after"]) <= 60 for one in refused)
    assert len(calls) == 3
    assert server.lives()
    assert server.upload([make_film(55)]).status == 200


def test_a_full_line_does_not_read_what_it_refuses(held_up, make_film) -> None:
    server, go, _ = held_up
    taken = []

    def body():
        for _ in range(1000):
            taken.append(1)
            yield bytes(2**16)

    async def run():
        first = [asyncio.ensure_future(server.uploaded([make_film(seed)])) for seed in range(3)]
        await until(lambda: len(server.service.line.jobs) == 3)
        kind = {"content-type": "multipart/form-data; boundary=b", "host": "localhost", "x-hilum": "page"}
        answer = await server.asked("POST", "/api/studies", kind, chunks=body())
        go.set()
        await asyncio.gather(*first)
        return answer

    assert asyncio.run(run()).status == 503
    assert len(taken) < 100  # what is listened to, so that the refusal is read


def test_the_same_upload_at_once_is_done_once(held_up, make_film) -> None:
    server, go, calls = held_up

    async def twice():
        both = [asyncio.ensure_future(server.uploaded([make_film(20)])) for _ in range(2)]
        await until(lambda: len(calls) == 1 and next(iter(server.service.line.jobs.values())).waiting == 2)
        go.set()
        return await asyncio.gather(*both)

    one, two = asyncio.run(twice())
    assert len(calls) == 1
    documents = [one.json, two.json]
    names = [f"/api/studies/{document['study'].pop('id')}" for document in documents]
    assert documents[0] == documents[1]
    assert server.ask("DELETE", names[0]).status == 204
    assert [server.ask("GET", name).status for name in names] == [404, 200]  # who forgets one leaves the other


def test_a_client_that_goes_away_leaves_the_line(held_up, make_film) -> None:
    server, go, calls = held_up

    async def leave():
        busy = asyncio.ensure_future(server.uploaded([make_film(30)]))
        await until(lambda: len(calls) == 1)  # the model is busy with another
        gone = await server.uploaded([make_film(31)], gone_after=0.05)
        await until(lambda: len(server.service.line.jobs) == 1)
        go.set()
        await busy
        return gone

    assert asyncio.run(leave()).code == "gone"
    assert len(calls) == 1  # nobody asked the model for the one who left
    assert server.lives()


def test_one_that_leaves_does_not_take_the_other_along(held_up, make_film) -> None:
    server, go, calls = held_up

    async def run():
        stays = asyncio.ensure_future(server.uploaded([make_film(32)]))
        await until(lambda: len(calls) == 1)
        await server.uploaded([make_film(32)], gone_after=0.05)
        go.set()
        return await stays

    assert asyncio.run(run()).status == 200


def test_who_leaves_and_comes_back_is_not_taken_for_gone(held_up, make_film) -> None:
    server, go, calls = held_up

    async def run():
        busy = asyncio.ensure_future(server.uploaded([make_film(33)]))
        await until(lambda: len(calls) == 1)
        await server.uploaded([make_film(34)], gone_after=0.05)
        again = asyncio.ensure_future(server.uploaded([make_film(34)]))
        await asyncio.sleep(0)
        go.set()
        await busy
        return await again

    assert asyncio.run(run()).status == 200
    assert server.lives()


def spoiled(model, change):
    """The model with another answer."""
    other = copy.copy(model)
    predict = model.predict

    def wrong(*arguments, **options):
        result = predict(*arguments, **options)
        return replace(result, probabilities=change(dict(result.probabilities)))

    other.predict = wrong
    return other


def test_what_is_no_probability_is_an_error_with_its_reason(make_server, model, make_film) -> None:
    value: list[float | None] = [0.5]
    server = make_server(of=spoiled(model, lambda values: {**values, "Hernia": value[0]}))
    assert server.upload([make_film(40)]).status == 200
    for number, wrong in enumerate((float("nan"), None, float("inf"), -0.1, 1.5), 1):
        value[0] = wrong
        answer = server.upload([make_film(40 + 100 * number)])
        assert (answer.status, answer.code) == (500, "not_a_number")
        assert "no number" in answer.json["error"]["message"]
        assert b"NaN" not in answer.body
        assert server.lives()


def test_untrained_findings_are_null_and_no_error(server, make_film) -> None:
    document = server.upload([make_film(41)]).json
    assert {one["name"] for one in document["findings"] if one["probability"] is None} == {"Never"}


def test_damaged_weights_are_found_out(make_server, model_folder, make_film) -> None:
    """NaN in the network itself, not in a stub."""
    import torch

    from hilum.deploy.predictor import load

    broken = load(model_folder / "model", "cpu")
    with torch.no_grad():
        next(iter(broken.networks[0].backbone.parameters())).fill_(float("nan"))
    answer = make_server(of=broken).upload([make_film(42)])
    assert (answer.status, answer.code) == (500, "not_a_number")
    assert b"NaN" not in answer.body


def test_an_error_that_nobody_expected_says_nothing_of_itself(make_server, model, make_film, caplog) -> None:
    server = make_server()

    def fails(*_):
        raise RuntimeError("MRN-77 Doe^Jane")

    server.service.line.judge = fails
    with caplog.at_level("DEBUG"):
        answer = server.upload([make_film(43)])
    assert (answer.status, answer.code) == (500, "internal")
    assert "Doe" not in caplog.text + answer.body.decode()
    assert "RuntimeError at test_line.py" in caplog.text
    assert server.lives()


def test_documents_are_json_that_every_reader_takes(server, make_film) -> None:
    content = server.upload([make_film(44)]).body.decode()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(content, parse_constant=refuse)
    assert np.isfinite(json.loads(content)["findings"][0]["probability"])
