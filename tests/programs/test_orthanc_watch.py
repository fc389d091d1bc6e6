"""The watcher of an Orthanc against a small server that speaks as much of its REST interface as the watcher uses.

No Orthanc was at hand: the routes are those of its documentation.
"""

import ast
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "orthanc_watch.py"
STAND_IN = """
import pathlib, sys
arguments = sys.argv[1:]
assert arguments[:2] == ["predict", "MODEL"], arguments
images = sorted(pathlib.Path(arguments[2]).iterdir())
if any(image.read_bytes() == b"broken" for image in images):
    sys.exit("Patient^Name cannot be read")
out = pathlib.Path(arguments[arguments.index("--reports") + 1]) / "study_0001"
out.mkdir(parents=True)
if images[0].read_bytes() == b"hand":
    (out / "study.json").write_text('{"status": "withheld"}')
    sys.exit("None of 1 inputs could be scored")
if images[0].read_bytes() == b"private":
    (out / "study.json").write_text('{"status": "scored"}')
    (out.parent / "not_written.csv").write_text("folder,what,reason,message\\nstudy_0001,sr,unknown_class,Doe\\n")
    sys.exit()
(out / "study.sr.dcm").write_bytes(b"report of " + b"+".join(image.read_bytes() for image in images))
(out / "study.json").write_text('{"status": "scored"}')
"""


class Fake:
    """A study of two radiographs and a CT, one that breaks, and what was stored."""

    def __init__(self) -> None:
        self.studies = {
            "aa": [("DX", ["i1"]), ("CR", ["i2"]), ("CT", ["i3"])],
            "bb": [("DX", ["broken"])],
            "cc": [("MR", ["i4"])],
        }
        self.changes = [("NewStudy", "aa"), ("StableStudy", "aa"), ("StableStudy", "bb"), ("StableStudy", "cc")]
        self.metadata: dict[str, str] = {}
        self.stored: list[bytes] = []
        self.authorization: set[str | None] = set()


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            state.authorization.add(self.headers.get("Authorization"))
            path, _, query = self.path.partition("?")
            parts = path.strip("/").split("/")
            if parts[0] == "changes":
                since = int(query.split("&")[0].removeprefix("since="))
                listed = [
                    {"ChangeType": kind, "ID": study, "Seq": number}
                    for number, (kind, study) in enumerate(state.changes, 1)
                    if number > since
                ]
                return self.reply(json.dumps({"Changes": listed, "Done": True, "Last": len(state.changes)}).encode())
            if parts[0] == "studies" and parts[2] == "series":
                found = [{"MainDicomTags": {"Modality": m}, "Instances": i} for m, i in state.studies[parts[1]]]
                return self.reply(json.dumps(found).encode())
            if parts[0] == "studies" and parts[2] == "metadata":
                found = state.metadata.get(parts[1])
                return self.reply(b"" if found is None else found.encode(), 404 if found is None else 200)
            if parts[0] == "instances":
                return self.reply(parts[1].encode())
            return self.reply(b"", 404)

        def do_POST(self) -> None:
            state.stored.append(self.rfile.read(int(self.headers["Content-Length"])))
            state.studies["aa"].append(("SR", [f"sr{len(state.stored)}"]))
            state.changes.append(("StableStudy", "aa"))  # a report is a new instance of its study
            self.reply(b'{"Status": "Success"}')

        def do_PUT(self) -> None:
            study = self.path.strip("/").split("/")[1]
            state.metadata[study] = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.reply(b"")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 11))
    spec = importlib.util.spec_from_file_location("orthanc_watch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = folder / "stand_in.py"
    stand_in.write_text(STAND_IN)
    command = f"{sys.executable} {stand_in}"
    options = ["--hilum", command, "--state", str(folder / "state.json"), "--once", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["orthanc_watch.py", address, "MODEL", *options])
    script.main()


def test_it_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    names = {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)


def test_a_stable_study_is_read_once_and_its_report_starts_nothing(script, fake, tmp_path, monkeypatch, capsys) -> None:
    state, address = fake
    run(script, address, tmp_path, monkeypatch)
    assert state.stored == [b"report of i1+i2"]  # the CT is no radiograph; the report did not start another reading
    assert set(state.metadata) == {"aa"}
    assert "aa: 1 objects stored" in capsys.readouterr().out
    run(script, address, tmp_path, monkeypatch)  # a restart
    (tmp_path / "state.json").unlink()
    run(script, address, tmp_path, monkeypatch)  # a restart that has forgotten
    assert len(state.stored) == 1


def test_a_study_of_no_chest_has_no_report_and_is_not_tried_again(script, fake, tmp_path, monkeypatch, capsys) -> None:
    state, address = fake
    state.studies["aa"] = [("DX", ["hand"])]
    for _ in range(2):
        run(script, address, tmp_path, monkeypatch)
    assert state.stored == []
    assert "aa" in state.metadata
    assert "aa" not in capsys.readouterr().err


def test_a_study_that_no_report_could_be_made_of_is_told_of(script, fake, tmp_path, monkeypatch, capsys) -> None:
    state, address = fake
    state.studies["aa"] = [("DX", ["private"])]
    run(script, address, tmp_path, monkeypatch)
    assert state.metadata == {}
    printed = capsys.readouterr()
    assert "aa: NoReportError (unknown_class), attempt 1 of 3" in printed.err
    assert "Doe" not in printed.err + printed.out


def test_a_study_that_grows_is_read_again(script, fake, tmp_path, monkeypatch) -> None:
    state, address = fake
    run(script, address, tmp_path, monkeypatch)
    state.studies["aa"].append(("DX", ["i9"]))
    state.changes.append(("StableStudy", "aa"))
    run(script, address, tmp_path, monkeypatch)
    assert state.stored == [b"report of i1+i2", b"report of i1+i2+i9"]


def test_a_study_that_fails_is_tried_three_times_and_says_nothing_of_anybody(
    script, fake, tmp_path, monkeypatch, capsys
) -> None:
    state, address = fake
    for _ in range(5):
        run(script, address, tmp_path, monkeypatch)
    printed = capsys.readouterr()
    assert printed.err.count("bb: CalledProcessError") == 3
    assert "attempt 3 of 3" in printed.err
    assert "Patient^Name" not in printed.err + printed.out
    assert "bb" not in state.metadata


def test_an_orthanc_that_is_not_there_is_waited_for(script, tmp_path, monkeypatch, capsys) -> None:
    run(script, "http://127.0.0.1:9", tmp_path, monkeypatch)
    assert "URLError" in capsys.readouterr().err


def test_the_password_goes_to_orthanc_alone(script, fake, tmp_path, monkeypatch, capsys) -> None:
    state, address = fake
    monkeypatch.setenv("ORTHANC_USER", "hilum")
    monkeypatch.setenv("ORTHANC_PASSWORD", "secret")
    run(script, address, tmp_path, monkeypatch)
    assert state.authorization == {"Basic aGlsdW06c2VjcmV0"}
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err


def test_the_command_that_it_gives_is_one_that_hilum_takes(script, fake, tmp_path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from hilum.cli import app
    from hilum.commands import predict

    _, address = fake
    given: list[list[str]] = []
    answer = script.subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: given.append(command) or answer)
    run(script, address, tmp_path, monkeypatch)
    taken: dict[str, object] = {}
    monkeypatch.setattr(predict, "run", lambda *arguments, **options: taken.update(options, arguments=arguments))
    place = given[0].index("predict")
    done = CliRunner().invoke(app, given[0][place:])
    assert done.exit_code == 0, done.output
    assert taken["arguments"][:2] == (Path("MODEL"), [given[0][place + 2]])
    assert (taken["reports"].formats, taken["reports"].captures) == (("sr", "sc"), "above")
