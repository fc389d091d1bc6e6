"""A disk that fills up while a result is written: the error says so, and what was there before is still there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A limit on the size of a file stands in for the disk's end. In a process of its own: it cannot be raised again.
PROGRAM = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
import torch
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.core.checkpoint import CheckpointWriter, save_checkpoint
from hilum.core.errors import HilumError
from hilum.deploy import model_files
from hilum.evaluation.predictions import Predictions, write_predictions
from hilum.heads.registry import HeadConfig, build_head
from hilum.pretraining.exposure import Seen, write_seen

out = Path(sys.argv[1])
ids = np.array([f"{number:016x}" for number in range(500)])
table = Predictions(ids, ids, ids, ids, ids, ids, ("Edema",), np.linspace(0, 1, 500)[:, None])
backbone, head = VisionTransformer(ViTConfig(32, 2, 2, image_size=32)), build_head(HeadConfig("linear", 32, 1, 2))
exposure = model_files.Exposure(*(np.arange(2000, dtype=np.uint64) for _ in range(3)))
numbers = np.arange(2000, dtype=np.uint64)

def behind_the_back():
    with CheckpointWriter() as writer:
        writer.save(out, 2, backbone.state_dict(), {})

writers = {
    "table.parquet": lambda: write_predictions(table, out / "table.parquet"),
    "table.csv": lambda: write_predictions(table, out / "table.csv"),
    "table.json": lambda: write_predictions(table, out / "table.json"),
    "model.safetensors": lambda: model_files.write_weights(out, backbone, head),
    "exposure.npz": lambda: model_files.write_exposure(out, exposure),
    "teacher.safetensors": lambda: save_backbone(backbone, out, "hilum-grey-1"),
    "seen.npz": lambda: write_seen(out, Seen(numbers, numbers)),
    "step_00000001": lambda: save_checkpoint(out, 1, backbone.state_dict(), {}),
    "step_00000002": behind_the_back,
}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
said = {}
for name, write in writers.items():
    try:
        write()
        said[name] = ["written", ""]
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""
FILES = (
    "table.parquet", "table.csv", "table.json", "model.safetensors", "exposure.npz", "seen.npz", "teacher.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The folder, and what became of each writer."""
    out = tmp_path_factory.mktemp("full")
    for name in FILES:
        (out / name).write_text(f"old {name}")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.parametrize("name", [*FILES, "step_00000001", "step_00000002"])
def test_the_error_names_the_file_and_the_old_one_stays(tried: tuple[Path, dict[str, list[str]]], name: str) -> None:
    out, said = tried
    kind, message = said[name]
    assert kind == "HilumError", message
    assert f"Could not write {'the checkpoint ' * name.startswith('step')}{out / name}: " in message
    assert "too large" in message
    if name in FILES:
        assert (out / name).read_text() == f"old {name}"


def test_nothing_half_written_is_left(tried: tuple[Path, dict[str, list[str]]]) -> None:
    assert {path.name for path in tried[0].iterdir()} == set(FILES)
