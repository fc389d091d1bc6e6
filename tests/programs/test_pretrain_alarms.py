"""Alarms and probe in runs of the real program: silent when it is well, and named when it was made ill."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hilum.commands.pretrain import run
from hilum.core.checkpoint import load_newest
from hilum.data.store import write_arrays
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig, LossConfig
from hilum.pretraining.probing import ProbeConfig

CONFIG = PretrainConfig(
    architecture="demo8", embed_dim=32, depth=2, num_heads=2, crops=CropConfig(32, 16, local_crops=2),
    heads=HeadConfig(64, 64, 32, 32), batch_size=16, steps=180, learning_rate=0.02, momentum=(0.9, 1.0),
    teacher_temperature=(0.02, 0.02), drop_path=0.0, precision="fp32", accelerator="cpu", threads=1, log_every=1,
    checkpoint_every=1000, probe=ProbeConfig(every=45, images=64, resamples=50),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs of two sizes on a sloping ground: finding "large" can be seen, "few" has too few positives."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :40]
    images, labels = [], []
    for number in range(160):
        large = rng.random() < 0.5
        centre, radius = rng.uniform(12, 28, 2), 11 if large else 6
        ground = rng.uniform(40, 90) + rng.uniform(-1, 1) * rows + rng.uniform(-1, 1) * columns
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        images.append(np.clip(ground + 90 * disc + rng.normal(0, 6, (40, 40)), 0, 255).astype(np.uint8))
        labels.append([int(large), int(number == 0)])
    splits = ["train"] * 110 + ["val"] * 50
    folder = tmp_path_factory.mktemp("alarms") / "store"
    write_arrays(folder, images, np.array(labels, np.int8), ["large", "few"], splits=splits)
    return folder


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def heard(out: Path) -> set[str]:
    return {name for line in history(out) for name in line.get("alarms", ())}


def test_a_probe_changes_no_weight_and_is_logged_from_before_the_first_step(data: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, steps=6, probe=ProbeConfig(every=2, images=40, resamples=10))
    run(short, data, tmp_path / "with")
    run(dataclasses.replace(short, probe=ProbeConfig()), data, tmp_path / "without")
    a, b = load_newest(tmp_path / "with" / "checkpoints"), load_newest(tmp_path / "without" / "checkpoints")
    assert a is not None
    assert b is not None
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    probed = [line["step"] for line in history(tmp_path / "with") if "knn_mAP" in line]
    assert probed == [0, 2, 4, 6]
    first, *rest = (line for line in history(tmp_path / "with") if "knn_mAP" in line)
    assert "loss" not in first
    assert all(line["probe_findings"] == 1 for line in (first, *rest))
    assert all(line["knn_change"] == pytest.approx(line["knn_mAP"] - first["knn_mAP"], abs=1e-6) for line in rest)


@pytest.mark.slow
def test_two_processes_probe_together(data: Path, tmp_path: Path) -> None:
    """The first probe looks at the same network, whoever embeds its images."""
    program = str(Path(sys.executable).with_name("hilum"))  # a file, so that it can start its second process
    settings = ["steps=2", "batch_size=16", "accelerator=cpu", "precision=fp32", "threads=1"]
    settings += ["probe.every=1", "probe.images=41"]
    found = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        command = [program, "pretrain", "demo_128", *settings, "--data", str(data)]
        done = subprocess.run(
            [*command, "--out", str(out), "--devices", devices], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(history(out))
    one, two = found
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 2]
    for column in ("knn_mAP", "knn_mAUC", "linear_mAP", "linear_mAUC"):
        assert one[0][column] == pytest.approx(two[0][column], abs=1e-6)


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm(data: Path, tmp_path: Path) -> None:
    run(CONFIG, data, tmp_path / "run")
    assert heard(tmp_path / "run") - {"features_worse_than_at_start"} == set()


ILL = [
    ({"cls_collapse"}, {"learning_rate": 3.0, "clip": 0.0, "losses": LossConfig(koleo=0.0)}),
    ({"cls_targets_say_nothing", "patch_targets_say_nothing", "losses_flat"}, {"teacher_temperature": (2.0, 2.0)}),
    ({"teacher_stands_still"}, {"momentum": (1.0, 1.0)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("names", "changes"), ILL, ids=["runs away", "targets are flat", "teacher stands still"])
def test_a_run_that_was_made_ill_says_so(
    names: set[str], changes: dict[str, Any], data: Path, tmp_path: Path, capsys
) -> None:
    run(dataclasses.replace(CONFIG, **changes), data, tmp_path / "run")
    assert names <= heard(tmp_path / "run")
    assert "Try: " in capsys.readouterr().err
