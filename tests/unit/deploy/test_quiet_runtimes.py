"""Exporting and predicting by ONNX Runtime and OpenVINO: nothing is sent, nothing appears in the home folder.

Without `runtimes.py`, importing them writes `~/intel/openvino_ga_cid` and `~/.cache/Microsoft` and opens connections
(seen with openvino-telemetry 2025.2 and onnxruntime 1.32).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxscript", reason="the extra [export] is not installed")
pytest.importorskip("openvino_telemetry", reason="the extra [openvino] is not installed")

CHILD = """
import sys
from pathlib import Path

tried = []

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        tried.append((event, args[1:]))

sys.addaudithook(watch)
import torch
from hilum.deploy import predictor
from hilum.deploy.exporting.comparing import fixtures
from hilum.deploy.exporting.directory import export_model

model, out = sys.argv[1:]
for engine in ("onnx", "openvino"):
    export_model(model, engine, Path(out) / engine)
    [network] = predictor.load(Path(out) / engine).networks
    network.read(torch.from_numpy(fixtures(network.config.resolution, 2)), attention=True)
print("tried", tried)
print("telemetry", [name for name in sys.modules if name.startswith("openvino_telemetry")])
import openvino_telemetry  # is found again by whoever wants it
"""


@pytest.mark.slow
def test_nothing_is_sent_and_nothing_appears_in_the_home_folder(fitted: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(fitted / "decoder"), str(tmp_path / "out")],
        env={**variables, "HOME": str(home), "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["tried []", "telemetry []"]
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("home", "out")) == []
