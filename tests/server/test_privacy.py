"""Nothing of a patient comes out: 200 DICOM files full of marked text, and the mark is looked for everywhere."""

import contextlib
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from damage_inputs import mutate, phantom, radiograph, written
from pydicom import Dataset
from pydicom.datadict import DicomDictionary

MARK = "Zq7Mark"
TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
"""Value representations of free text."""
ENDINGS = ("", "/images/1.png", "/maps/0/1.png", "/report.json", "/report.fhir.json", "/report.html")
KEYWORDS = sorted(
    (row[4], row[0])
    for tag, row in DicomDictionary.items()
    if row[0] in TEXT and row[3] == "" and row[1] == "1" and tag >> 16 in (0x08, 0x10, 0x18, 0x20, 0x32, 0x38, 0x40)
    and row[4] not in ("PhotometricInterpretation", "Modality", "SpecificCharacterSet", "PixelPresentation")
)  # fmt: skip


def marked(number: int) -> bytes:
    """A radiograph with a mark in every text element there is, in a private one, in a sequence and behind the data."""
    data = radiograph(phantom(48, 40, number % 7), StudyDate=f"1999{1 + number % 12:02d}{1 + number % 28:02d}")
    for keyword, kind in KEYWORDS:
        text = f"{MARK}{kind}^{number:05d}"
        setattr(data, keyword, text.upper().replace("^", "_") if kind in ("CS", "UR") else text)
    inner = Dataset()
    inner.PatientName = f"{MARK}^inner"
    data.OtherPatientIDsSequence = [inner]
    data.private_block(0x0011, f"{MARK} private", create=True).add_new(0x01, "LO", f"{MARK}-{number}")
    data.StudyInstanceUID = f"1.2.826.0.1.{7770000 + number}"
    content = written(data)
    if number % 4 == 3:  # a quarter is damaged in some way: what is refused must be as silent
        content, _ = mutate(content, np.random.default_rng([5, number]))
    return content


def found(content: bytes) -> bool:
    """Whether the mark, in any case and in the encodings in which it could be written, or an id, is in some bytes."""
    lower = content.lower()
    needles = [MARK, f"{MARK}^inner", "1.2.826.0.1.777", "Doe^Jane"]
    return (
        any(
            needle.lower().encode(encoding) in lower
            for needle in needles
            for encoding in ("utf-8", "utf-16-le", "utf-16-be")
        )
        or b"1.2.826.0.1.777" in content
    )


def test_the_mark_is_in_the_files_and_is_found() -> None:
    """So that the tests below can fail."""
    content = marked(0)
    assert content.count(MARK.encode()) > 100
    assert found(content)
    assert found(b"x " + MARK.upper().encode())
    assert found(f"{MARK}".encode("utf-16-le"))
    assert not found(b"nothing of the kind")


def test_files_full_of_text_say_nothing(server, caplog, capfd, tmp_path, monkeypatch) -> None:
    """In this process, every logger at its most talkative but for those that no program of ours turns on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    codes = Counter()
    with caplog.at_level("INFO"):
        for number in range(12):
            name = f"{MARK}^{number}.dcm"
            answer = server.upload([marked(number)], names=[name])
            codes[answer.status] += 1
            assert not found(answer.body)
            assert not found(json.dumps(answer.headers).encode())
            if answer.status == 200:
                study = answer.json["study"]["id"]
                for path in ENDINGS[: 6 if number == 0 else 2]:
                    again = server.ask("GET", f"/api/studies/{study}{path}")
                    assert again.status == 200
                    assert not found(again.body + json.dumps(again.headers).encode())
    said = capfd.readouterr()
    assert not found((caplog.text + said.out + said.err).encode())
    assert "POST /api/studies" in caplog.text
    assert codes[200] >= 9
    assert sum(codes.values()) == 12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", f"/api/studies/{MARK}"), ("GET", f"/api/studies/{MARK}/images/{MARK}.png"), ("GET", f"/{MARK}"),
     ("GET", f"/api/studies/x/similar?count={MARK}&finding={MARK}"), ("GET", f"/static/{MARK}"),
     ("DELETE", f"/api/studies/{MARK}"), (MARK, "/"), ("POST", f"/api/studies?{MARK}={MARK}"),
     ("GET", f"/api/cases/{MARK}.png"), ("GET", f"/healthz?{MARK}")],
)  # fmt: skip
def test_what_is_asked_is_not_repeated(server, caplog, method: str, path: str) -> None:
    headers = {"host": "localhost", "x-hilum": "page", "content-type": f"multipart/form-data; boundary={MARK}",
               "user-agent": MARK, "referer": f"http://localhost/{MARK}", f"x-{MARK}": MARK}  # fmt: skip
    with caplog.at_level("INFO"):
        answer = server.ask(method, path, headers, f"--{MARK}\r\n{MARK}: {MARK}\r\n".encode())
        wrong = server.ask(method, path, {**headers, "host": f"{MARK}.example"})
    for one in (answer, wrong):
        assert not found(one.body + json.dumps(one.headers).encode())
    assert not found(caplog.text.encode())


@contextlib.contextmanager
def program(words: list[str], folder: Path, killed: bool = False) -> Iterator[tuple[int, list[bytes]]]:
    """`hilum serve` as a process of its own, in a folder of its own; its port, and what it said, once it has ended."""
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    for name in ("tmp", "home", "work"):
        (folder / name).mkdir()
    said: list[bytes] = []
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        command = [str(Path(sys.executable).parent / "hilum"), *words]
        child = subprocess.Popen(command, cwd=folder / "work", env=environment, stdout=out, stderr=err)
        try:
            for _ in itertools.repeat(None, 600):
                started = re.search(rb"http://127\.0\.0\.1:(\d+)/", (folder / "out").read_bytes())
                if started or child.poll() is not None:
                    break
                time.sleep(0.1)
            assert started, (folder / "err").read_bytes()
            yield int(started[1]), said
        finally:
            own = psutil.Process(child.pid).children(recursive=True)
            child.kill() if killed else child.terminate()
            child.wait(30)
            assert psutil.wait_procs(own, timeout=10)[1] == []  # the process that decodes has ended too
    said += [(folder / "out").read_bytes(), (folder / "err").read_bytes()]


@pytest.mark.slow
def test_200_files_leave_no_mark_anywhere(model_folder, make_multipart, tmp_path) -> None:
    """The real program: its answers, its output, its log, its temporary folder, its home, the folder of its model."""
    before = {path: path.stat().st_mtime_ns for path in model_folder.rglob("*")}
    hits, codes = [], Counter()
    with program(["serve", str(model_folder / "model"), "--port", "0", "--device", "cpu"], tmp_path) as (port, said):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in range(200):
            body, kind = make_multipart([marked(number)], names=[f"{MARK}^{number}.dcm"])
            connection.request("POST", "/api/studies", body, {"X-Hilum": "page", "Content-Type": kind, "X-Of": MARK})
            answer = connection.getresponse()
            content, headers = answer.read(), str(answer.headers).encode()
            codes[answer.status] += 1
            paths = []
            if answer.status == 200:
                study = json.loads(content)["study"]["id"]
                paths = [f"/api/studies/{study}{ending}" for ending in ENDINGS[: 6 if number % 10 == 0 else 2]]
            hits += [number for one in (content, headers) if found(one)]
            for path in paths:
                connection.request("GET", path)
                hits += [path] if found(connection.getresponse().read()) else []
        connection.close()
    assert not hits
    assert set(codes) <= {200, 413, 422}
    assert codes[200] >= 150
    assert not any(found(one) for one in said)
    assert said[1].count(b"POST /api/studies") == 200
    left = [path for name in ("tmp", "home", "work") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert [path for path in left if found(path.read_bytes()) or found(str(path).encode())] == []
    assert not list((tmp_path / "tmp").iterdir())
    assert {path: path.stat().st_mtime_ns for path in model_folder.rglob("*")} == before


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_was_killed(model_folder, make_multipart, make_film, tmp_path) -> None:
    words = ["serve", str(model_folder / "model"), "--port", "0", "--device", "cpu"]
    with program(words, tmp_path, killed=True) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body, kind = make_multipart([make_film(1)])
        connection.request("POST", "/api/studies", body, {"X-Hilum": "page", "Content-Type": kind})
        assert connection.getresponse().status == 200
        connection.close()
    assert not list((tmp_path / "tmp").iterdir())
