"""The process that decodes: small, silent, replaceable, and not believed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage_inputs import bombs, phantom, radiograph, rasters, written

from hilum.data.images import read_image
from hilum.deploy.server.decoding import Decoder
from hilum.deploy.server.errors import RefusedError
from hilum.deploy.server.settings import Limits

MOST_SECONDS, MOST_MEGABYTES = 2.0, 200.0


@pytest.fixture(scope="module")
def decoder():
    made = Decoder(None, "hilum-grey-1", Limits())
    made.start()
    yield made
    made.close()


def megabytes(pid: int, line: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(one for one in status.splitlines() if one.startswith(line)).split()[1]) / 1024


def seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("kind", bombs())
def test_bombs_are_refused_in_two_seconds_and_200_megabytes(decoder, kind: str, report) -> None:
    """Of processor time and of memory beyond what the process has; the process survives them all."""
    content, reason = bombs()[kind]
    decoder.decode(rasters()["png"], 1)
    pid = decoder.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the highest memory so far
    memory, used = megabytes(pid, "VmRSS"), seconds(pid)
    with pytest.raises(RefusedError) as refused:
        decoder.decode(content, 3)
    assert (refused.value.code, refused.value.image) == (reason, 3)
    assert decoder.pid == pid
    memory, used = megabytes(pid, "VmHWM") - memory, seconds(pid) - used
    report(f"bomb {kind}: {used:.2f} s of CPU, {memory:.0f} MB")
    assert memory < MOST_MEGABYTES
    assert used < MOST_SECONDS


def test_there_are_twelve_kinds_and_more() -> None:
    assert len(bombs()) >= 12


def test_bombs_are_refused_over_http(make_server, small_limits) -> None:
    server = make_server(replace(small_limits, file_bytes=2**24, study_bytes=2**24, held_bytes=2**25))
    for kind, (content, reason) in bombs().items():
        if len(content) <= 2**20:
            answer = server.upload([rasters()["png"], content])
            assert (answer.status, answer.code, kind) == (413 if reason == "too_large" else 422, reason, kind)
            assert answer.json["error"]["image"] == 2
    assert server.lives()
    assert server.service.line.decoder.replaced == 0


def test_pixels_are_those_of_the_reader(decoder) -> None:
    for content in (*rasters().values(), written(radiograph(phantom().astype(np.uint16) * 9))):
        picture = decoder.decode(content, 1)
        image = read_image(content)
        assert np.array_equal(picture.pixels, image.pixels)
        assert (picture.rows, picture.columns, picture.quality) == (image.rows, image.cols, image.quality)


def test_the_process_can_do_little(monkeypatch) -> None:
    monkeypatch.setenv("A_SECRET", "correct-horse")
    decoder = Decoder(None, "hilum-grey-1", Limits())
    decoder.decode(rasters()["png"], 1)
    limits = {
        line[:26].strip(): line[26:47].strip() for line in Path(f"/proc/{decoder.pid}/limits").read_text().splitlines()
    }
    assert limits["Max file size"] == "0"
    assert limits["Max core file size"] == "0"
    assert int(limits["Max open files"]) == 32
    assert int(limits["Max address space"]) < 8 * 2**30
    assert int(limits["Max cpu time"]) <= 12 + seconds(decoder.pid)
    environment = Path(f"/proc/{decoder.pid}/environ").read_bytes()
    assert {part.partition(b"=")[0] for part in environment.split(b"\0") if part} <= {
        b"PATH", b"LANG", b"OMP_NUM_THREADS", b"OPENBLAS_NUM_THREADS", b"LC_CTYPE", b"PYTHONPATH",
        b"LD_LIBRARY_PATH",
    }  # fmt: skip
    streams = {str(Path(f"/proc/{decoder.pid}/fd/{number}").readlink()) for number in (0, 1, 2)}
    assert streams == {"/dev/null"}  # what decoders print goes nowhere
    decoder.close()


def test_more_memory_than_allowed_is_not_had() -> None:
    """A sound picture of 64 megapixels, where there is room for a quarter of it."""
    from damage_inputs import packed_png, zeros

    small = Decoder(None, "hilum-grey-1", replace(Limits(), decode_memory=16 * 2**20))
    small.start()
    try:
        with pytest.raises(RefusedError) as refused:
            small.decode(packed_png(8000, 8000, 8, 0, zeros(8000 * 8001)), 1)
        assert refused.value.code in ("too_large", "decoder_crashed", "damaged")
        assert small.decode(rasters()["png"], 1).rows == 96
    finally:
        small.close()


@pytest.mark.slow
def test_the_largest_pictures_fit(decoder) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4000, (8192, 8192), dtype=np.uint16)
    content = written(radiograph(values, BitsStored=12, HighBit=11, WindowCenter=2000, WindowWidth=4000))
    large = Decoder(1024, "hilum-grey-1", replace(Limits(), decode_seconds=60.0))
    try:
        picture = large.decode(content, 1)
        assert (picture.rows, picture.columns, picture.pixels.shape) == (8192, 8192, (1024, 1024))
    finally:
        large.close()


def test_a_killed_process_costs_one_answer(server, make_film) -> None:
    """Killed while a request waits for it: that one is refused, the next is answered by another process."""
    decoder = server.service.line.decoder
    server.upload([make_film(11)])
    before, pid = decoder.replaced, decoder.pid

    async def killed():
        os.kill(pid, signal.SIGSTOP)
        waiting = asyncio.ensure_future(server.uploaded([make_film(12)]))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        os.kill(pid, signal.SIGKILL)
        return await waiting

    answer = asyncio.run(killed())
    assert (answer.status, answer.code, answer.json["error"]["image"]) == (422, "decoder_crashed", 1)
    assert server.upload([make_film(12)]).status == 200
    assert (decoder.replaced, decoder.pid != pid) == (before + 1, True)
    assert server.lives()


def test_a_process_that_died_while_nothing_was_asked_is_replaced(server, make_film) -> None:
    os.kill(server.service.line.decoder.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert server.upload([make_film(13)]).status == 200


def test_a_process_that_hangs_is_ended(make_server, small_limits, make_film) -> None:
    server = make_server(replace(small_limits, decode_seconds=0.3))
    assert server.upload([make_film(13)]).status == 200
    pid = server.service.line.decoder.pid
    os.kill(pid, signal.SIGSTOP)
    answer = server.upload([make_film(14)])
    assert (answer.status, answer.code) == (422, "decoder_slow")
    assert not Path(f"/proc/{pid}").exists()
    assert server.lives()


LIES = {
    "nothing": "pass",
    "garbage": "w(b'HTTP/1.1 200 OK')",
    "endless_line": "w(b'\\xff\\xff\\xff\\xff' + bytes(1000))",
    "not_json": "f(b'{')",
    "not_an_object": "f(b'[]')",
    "pickle": "f(b'\\x80\\x04cos\\nsystem\\n(S\"touch hit\"\\ntR.')",
    "no_pixels": "f(b'{}')",
    "huge": "j(pixels=[2**31, 2**31], display=[1, 1])",
    "negative": "j(pixels=[-1, -1], display=[1, 1])",
    "zero": "j(pixels=[0, 5], display=[1, 1])",
    "three": "j(pixels=[1, 1, 3], display=[1, 1])",
    "words": "j(pixels=['a', 'b'], display=[1, 1])",
    "none": "j(pixels=None, display=None)",
    "nan": "j(pixels=[float('nan'), 1], display=[1, 1])",
    "short": "j(pixels=[4, 4], display=[4, 4]); w(bytes(20))",
    "kind": "j(kind='<script>'); w(bytes(2))",
    "view": "j(view='Doe^Jane'); w(bytes(2))",
    "subject": "j(subject='Doe^Jane'); w(bytes(2))",
    "ids": "j(ids=['a', {}]); w(bytes(2))",
    "modality": "j(modality='CANARY'); w(bytes(2))",
    "rows": "j(rows=10**9, columns=10**9); w(bytes(2))",
    "reason": "j(reason='Doe^Jane', message='x')",
}
FAKE = """
import json, struct, sys
out = sys.stdout.buffer
def w(content): out.write(content)
def f(line): w(struct.pack(">I", len(line)) + line)
def j(**changed):
    f(json.dumps({"rows": 1, "columns": 1, "quality": [], "kind": "png", "pixels": [1, 1], "display": [1, 1],
                  **changed}).encode())
"""


@pytest.mark.parametrize("lie", LIES)
def test_what_a_process_that_was_taken_over_says_is_not_believed(lie: str, monkeypatch) -> None:
    decoder = Decoder(None, "hilum-grey-1", Limits())
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", f"{FAKE}\n{LIES[lie]}\nout.flush()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    decoder._process = child
    monkeypatch.setattr(decoder, "_running", lambda: child)
    with pytest.raises(RefusedError) as refused:
        decoder.decode(b"x", 1)
    assert refused.value.code == "decoder_crashed"
    assert "Doe" not in refused.value.message
    assert child.poll() is not None


def test_the_fake_process_can_tell_the_truth(monkeypatch) -> None:
    """So the test above can fail."""
    decoder = Decoder(None, "hilum-grey-1", Limits())
    command = [sys.executable, "-S", "-c", f"{FAKE}\nj(quality=['constant', '<b>']); w(bytes([7, 8]))\nout.flush()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    monkeypatch.setattr(decoder, "_running", lambda: child)
    picture = decoder.decode(b"x", 1)
    assert (picture.pixels.tolist(), picture.display.tolist(), picture.quality) == ([[7]], [[8]], ("constant",))
    decoder._process = child
    decoder.close()


def test_whose_a_file_is_is_told_only_where_it_is_asked() -> None:
    film = written(radiograph(phantom(), PatientID="MRN-77", StudyInstanceUID="1.2.3"))
    for whose, ids in ((False, ()), (True, ("MRN-77", "1.2.3"))):
        decoder = Decoder(None, "hilum-grey-1", Limits(), whose)
        picture = decoder.decode(film, 1)
        decoder.close()
        assert picture.ids == ids
        assert "MRN" not in repr(picture)
