"""`make gpu-bench`: a stage that fails, hangs or is cut short costs that stage and no row."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("HILUM_PEER_PYTHON", "HILUM_PEER_WHEELS"):
        monkeypatch.delenv(name, raising=False)
    module = ModuleType("gpu_bench")
    module.__file__ = str(BENCHMARKS / "_gpu_bench.py")
    monkeypatch.setitem(sys.modules, "gpu_bench", module)
    exec(compile(Path(module.__file__).read_text(), module.__file__, "exec"), module.__dict__)
    return module


ROWS = "print('| a |'); print('| b |'); import json, sys; json.dump({'a': 1}, open(sys.argv[1], 'w'))"
SCRIPTS = {
    "good": ROWS,
    "broken": "print('| c |'); raise SystemExit('no')",
    "hanging": "import time; print('| d |', flush=True); time.sleep(60)",
    "last": "import os; print('|', *(os.environ.get(f'HILUM_PEER_{name}') for name in ('PYTHON', 'MISSING')), '|')",
}


def staged(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    def command_of(name: str, out: Path) -> list[str] | None:
        script = SCRIPTS.get(name)
        return script and [sys.executable, "-c", script, str(bench.results_file(name, out))]

    monkeypatch.setattr(bench, "STAGES", tuple((name, 3.0) for name in names))
    monkeypatch.setattr(bench, "command_of", command_of)


def test_each_stage_ends_by_itself_and_all_rows_are_kept(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    staged(bench, monkeypatch, ["good", "broken", "absent", "hanging", "last"])
    monkeypatch.setattr(bench, "find_peer", lambda out: ("", "no network"))
    assert bench.main(tmp_path, anyway=True) == 1
    stages = json.loads((tmp_path / "gpu-bench.json").read_text())["stages"]
    assert [stages[name]["status"] for name in stages] == [
        "ok", "failed (1)", "not in this checkout", "ended after 3 s", "ok",
    ]  # fmt: skip
    assert stages["good"]["results"] == {"a": 1}
    assert stages["broken"]["lines"] == ["| c |", "no"]
    assert stages["hanging"]["lines"] == ["| d |"]
    assert stages["last"]["lines"] == ["| None no network |"]
    text = (tmp_path / "gpu-bench.md").read_text()
    assert "## good: ok" in text
    assert "| a |\n| b |" in text
    assert "```\nno\n```\n\n| c |" in text
    assert (tmp_path / "gpu-bench.log").read_text().splitlines()[:2] == ["| a |", "| b |"]


def test_all_well_is_status_0(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    staged(bench, monkeypatch, ["good", "last"])
    monkeypatch.setenv("HILUM_PEER_PYTHON", "/somewhere/python")
    assert bench.main(tmp_path, anyway=True) == 0
    assert "| /somewhere/python None |" in (tmp_path / "gpu-bench.md").read_text()


def test_rows_survive_when_the_whole_program_is_killed(tmp_path: Path) -> None:
    """In the middle of a stage, as a time limit from outside would."""
    code = f"""
import sys
sys.argv = ["x"]
module = {{"__file__": {str(BENCHMARKS / "_gpu_bench.py")!r}, "__name__": "gpu_bench"}}
import types
sys.modules["gpu_bench"] = holder = types.ModuleType("gpu_bench")
holder.__dict__.update(module)
exec(compile(open(module["__file__"]).read(), module["__file__"], "exec"), holder.__dict__)
from pathlib import Path
holder.STAGES = (("hanging", 60),)
holder.find_peer = lambda out: ("", "")
holder.command_of = lambda name, out: [sys.executable, "-c", {SCRIPTS["hanging"]!r}]
holder.main(Path({str(tmp_path)!r}), True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    path = tmp_path / "gpu-bench.md"
    while time.monotonic() < deadline and not (path.exists() and "| d |" in path.read_text()):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert "| d |" in path.read_text()
    assert json.loads((tmp_path / "gpu-bench.json").read_text())["stages"]["hanging"]["status"] == "running"


def test_a_peer_that_cannot_be_installed_says_why(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        failed = "pip" in command
        return subprocess.CompletedProcess(command, int(failed), "", "WARNING: a\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert bench.find_peer(tmp_path) == (
        "",
        "lightly-train==0.18.* could not be installed: ERROR: No matching distribution",
    )
    assert "--system-site-packages" not in commands[0]
    commands.clear()
    monkeypatch.setenv("HILUM_PEER_WHEELS", "wheels")
    bench.find_peer(tmp_path)
    assert "--system-site-packages" in commands[0]
    assert commands[1][-4:] == ["--no-index", "--find-links", "wheels", "lightly-train==0.18.*"]
    assert not (tmp_path / "peer/.ready").exists()


def test_every_stage_has_its_program(bench: ModuleType, tmp_path: Path) -> None:
    found = {name: bench.command_of(name, tmp_path) for name, _ in bench.STAGES}
    assert all(found[name] for name in ("equality tests", "pretrain-step", "crops", "loader"))
    assert str(BENCHMARKS.parent / "tests/programs/test_pretrain.py") in found["equality tests"]


ABSENT = ["beartype", "fastapi", "gdcm", "hypothesis", "jsonschema", "polars", "psutil", "pydantic", "pydicom", "xdist"]
"""Of what the tests of a full installation import, what a GPU image does not have."""


def test_the_equality_tests_can_be_set_up_on_a_bare_gpu_image(bench: ModuleType, tmp_path: Path) -> None:
    """Their files import nothing that is not there, and every test finds its fixtures."""
    [_, module, pytest_, *words] = bench.command_of("equality tests", tmp_path)
    assert (module, pytest_) == ("-m", "pytest")
    program = "import sys; sys.modules.update(dict.fromkeys({}));import pytest; sys.exit(pytest.main({}))"
    done = subprocess.run(
        [sys.executable, "-c", program.format(ABSENT, [*words, "--setup-plan"])], cwd=BENCHMARKS.parent,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    planned = set(re.findall(r"^ +(\S+\.py)::", done.stdout, re.MULTILINE))
    assert {BENCHMARKS.parent / path for path in planned} == {Path(word) for word in words if word.endswith(".py")}


def test_the_calls_of_the_docstring_fit_into_ten_minutes(bench: ModuleType) -> None:
    calls = re.findall(r"HILUM_BENCH_STAGES='(.+?)'", str(bench.__doc__))
    chosen = [[(name, limit) for name, limit in bench.STAGES if re.search(call, name)] for call in calls]
    assert all(sum(limit for _, limit in stages) < 600 for stages in chosen)
    assert sorted(name for stages in chosen for name, _ in stages) == sorted(
        name for name, limit in bench.STAGES if limit < 600
    )


def test_without_a_device_it_says_so(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main(tmp_path / "out", anyway=False) == 2
    said = capsys.readouterr().out
    assert "needs a CUDA device" in said
    assert "-m pytest tests/programs/test_predict_on_gpus.py tests/programs/test_pretrain.py" in said
    assert not (tmp_path / "out").exists()
