"""What the tests of reliability run: a small store, `hilum pretrain` and `hilum fit` on it, and their straight results.

Everything goes through the command line and the files of a run folder, as a user's programs would.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from warm import Child, Warm

from hilum.commands.pretrain import STOPPED_STATUS
from hilum.core.checkpoint import Checkpoint, digest, load_checkpoint, load_newest
from hilum.core.config import override, write_yaml
from hilum.core.errors import CheckpointError
from hilum.data.store import write_arrays
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig

STEPS = 6
CONFIG = PretrainConfig(
    architecture="demo8", embed_dim=16, depth=2, num_heads=2, registers=1, layer_scale=0.1,
    crops=CropConfig(global_size=32, local_size=16, local_crops=2), heads=HeadConfig(16, 16, 8, 8),
    batch_size=4, steps=STEPS, learning_rate=0.02, momentum=(0.6, 1.0), drop_path=0.3, precision="fp32",
    accelerator="cpu", threads=1, log_every=1, checkpoint_every=1, keep=2,
)  # fmt: skip
FIT = override(
    FitConfig(
        head="linear", blocks=2, learning_rates=(1e-3, 1e-2), search_epochs=2, refit_epochs=2, batch_size=16, threads=1,
        workers=1,
    ),
    [],
)  # fmt: skip


OF_THE_CLOCK = ("images_per_second", "tflops", "mfu")
"""Columns of `metrics.jsonl` that differ from run to run."""


def size(name: str, default: int) -> int:
    """How many cases a test tries: RELIABILITY_<NAME>, or the default."""
    return int(os.environ.get(f"RELIABILITY_{name}", default))


class Bench:
    """A store, configurations as files, and the results of runs that nothing disturbed."""

    def __init__(self, warm: Warm, folder: Path) -> None:
        self.warm, self.folder = warm, folder
        self.data = folder / "store"
        self.seconds: dict[Path, float] = {}
        """How long each straight run took."""
        make_store(self.data)

    def config(self, **changes: Any) -> Path:
        """A `config.yaml` of the tiny run with these changes."""
        path = self.folder / f"pretrain_{_name(changes)}.yaml"
        if not path.exists():
            write_yaml(path, dataclasses.replace(CONFIG, **changes))
        return path

    def pretrain(self, out: Path, **changes: Any) -> list[object]:
        """The command line of a run."""
        return ["pretrain", self.config(**changes), "--data", self.data, "--out", out]

    def fit(self, out: Path, **changes: Any) -> list[object]:
        """The command line of a head on the straight run's backbone."""
        path = self.folder / f"fit_{_name(changes)}.yaml"
        if not path.exists():
            write_yaml(path, dataclasses.replace(FIT, **changes))
        backbone = self.straight(1)
        return ["fit", path, "--data", self.data, "--backbone", backbone, "--out", out, "--device", "cpu"]

    @functools.cache  # noqa: B019
    def straight(self, ranks: int = 1, **changes: Any) -> Path:
        """A run that nothing disturbed."""
        out = self.folder / f"straight_{ranks}_{_name(changes)}"
        command, began = self.pretrain(out, **changes), time.monotonic()
        children = [self.warm.start(command)] if ranks == 1 else self.warm.ranks(command)
        for child in children:
            assert child.wait() == 0, child.said
        self.seconds[out] = time.monotonic() - began
        return out

    @functools.cache  # noqa: B019
    def _stopped(self, steps: int) -> Path:
        out = self.folder / f"stopped_{steps}"
        child = self.warm.run(self.pretrain(out), [["signal_in_step", steps, signal.SIGTERM]])
        assert child.status == STOPPED_STATUS, child.said
        return out

    def stopped(self, out: Path, steps: int) -> Path:
        """A run that was told to stop after some steps, in a folder of its own."""
        shutil.copytree(self._stopped(steps), out)
        return out

    @functools.cache  # noqa: B019
    def straight_fit(self, **changes: Any) -> Path:
        """A model that nothing disturbed."""
        out = self.folder / f"straight_fit_{_name(changes)}"
        command, began = self.fit(out, **changes), time.monotonic()
        child = self.warm.run(command)
        assert child.status == 0, child.said
        self.seconds[out] = time.monotonic() - began
        return out


def _name(changes: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8]


def make_store(path: Path, images: int = 40) -> None:
    """Noise images: 24 for training, 12 for validation, 4 of no split; bright ones have the first of three findings."""
    generator = np.random.default_rng(0)
    labels = (generator.random((images, 3)) < 0.5).astype(np.int8)
    pixels = [
        generator.integers(0, 120, (36 + index % 5, 40), dtype=np.uint8) + np.uint8(100 * labels[index, 0])
        for index in range(images)
    ]
    splits = ["train"] * 24 + ["val"] * 12 + [""] * 4
    write_arrays(
        path, pixels, labels, ["Edema", "Mass", "Hernia"], splits=splits,
        patients=[f"p{index // 2}" for index in range(images)],
    )  # fmt: skip


def newest(out: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None before the first."""
    return load_newest(out / "checkpoints")


def whole_steps(out: Path) -> list[int]:
    """Steps of the checkpoints that are whole, of the folders that are there."""
    steps = []
    for path in sorted((out / "checkpoints").glob("step_*")):
        try:
            steps.append(load_checkpoint(path).step)
        except CheckpointError:
            continue
    return steps


def weights(out: Path) -> str:
    """One digest of everything that a run carries from step to step."""
    found = newest(out)
    assert found is not None
    return f"{found.step} {digest(found.tensors)}"


def lines(out: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_CLOCK} for line in found]


def same_run(out: Path, straight: Path) -> None:
    """Weights, averages and optimizer, backbone, images seen, and the log: each step once, equal in every column."""
    assert weights(out) == weights(straight)
    assert lines(out) == lines(straight)
    steps = [line["step"] for line in lines(out)]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    for name in ("teacher.safetensors", "config.json", "config.yaml"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    with np.load(out / "seen.npz") as ours, np.load(straight / "seen.npz") as theirs:
        assert ours.files == theirs.files
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)


def leftovers(out: Path) -> list[Path]:
    """Temporary files and folders of a program that was killed."""
    return [path for path in out.rglob(".*") if path.name != ".lock"]


def model_digest(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a model."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def ended_well(children: list[Child], status: int = 0) -> None:
    """All processes of a run end with this status."""
    for child in children:
        assert child.wait() == status, child.said
