"""A build that is killed at any moment, and then run again, makes the same store as one that was left alone.

The build runs in a process of its own with two decoding processes, and kills itself with SIGKILL at the N-th thing that
it does to the disk: opening a file for writing, flushing it, renaming, removing, making a folder, or adding a record
(whose bytes are flushed first, so that half a shard is really there). Every such moment has a number, so a sweep
misses none.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from hilum.core.errors import StoreError
from hilum.core.types import image_uid
from hilum.data.build import build_store
from hilum.data.schema import Manifest, complete, label_column, write_manifest
from hilum.data.shards import IN_PLACE
from hilum.data.store import Store

PROGRAM = """
import os, signal, sys
from pathlib import Path
from hilum.data import shards
from hilum.data.build import build_store

if __name__ == "__main__":
    manifest, out, encoding = sys.argv[1:4]
    workers, fatal = map(int, sys.argv[4:])
    moments = []

    def moment(what):
        moments.append(what)
        if len(moments) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event, arguments):
        if event in ("os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(out):
            moment(f"{event} {Path(arguments[0]).name}")
        if event == "open" and str(arguments[0]).startswith(out) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            moment(f"open {Path(arguments[0]).name}")

    fsync, append = os.fsync, shards.ShardWriter.append

    def counted_fsync(descriptor):
        moment("fsync")
        fsync(descriptor)

    def counted_append(self, record):
        position = append(self, record)
        self.file.flush()
        moment("append")
        return position

    os.fsync, shards.ShardWriter.append = counted_fsync, counted_append
    sys.addaudithook(on_event)
    build_store(Path(manifest), Path(out), 32, encoding, workers, shard_bytes=32 * 32 * 4)
    print("\\n".join(moments))
"""


def pool(root: Path, count: int = 20) -> Path:
    (root / "films").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"films/{number:02d}.png"
        pixels = np.random.default_rng(number).integers(90, 160, (40 + number, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        dataset = "ab"[number % 2]
        rows.append(
            {
                "image_uid": image_uid(dataset, name),
                "dataset": dataset,
                "source_relpath": name,
                "source_root_key": "films",
                "patient_id": f"{dataset}/p{number}",
                "study_id": f"{dataset}/s{number}",
                "image_id": name,
                "view": "PA",
                "split_project": "train",
                "ssl_ok": True,
                "ssl_reason": "",
                label_column("Edema"): number % 2,
            }
        )
    (root / "films" / "07.png").write_bytes(b"")
    manifest = Manifest(
        complete(pl.DataFrame(rows), ["Edema"]), ("Edema",), {"roots": json.dumps({"films": str(root)})}
    )
    write_manifest(manifest, root / "manifest.parquet")
    return root / "manifest.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def build_and_die(
    program: Path, manifest: Path, out: Path, encoding: str, fatal: int, workers: int = 2
) -> Sequence[str]:
    """Run the build; `fatal` 0 lets it live, and gives its moments."""
    command = [sys.executable, str(program), str(manifest), str(out), encoding, str(workers), str(fatal)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if fatal else 0), done.stderr
    return done.stdout.splitlines()


def finish(manifest: Path, out: Path, encoding: str) -> None:
    build_store(manifest, out, 32, encoding, workers=1, shard_bytes=32 * 32 * 4)


class Sweep:
    """What one build does, and what it leaves when nobody kills it."""

    def __init__(self, root: Path, encoding: str) -> None:
        self.root, self.encoding = root, encoding
        self.manifest, self.program = pool(root / "raw"), root / "program.py"
        self.program.write_text(PROGRAM)
        self.moments = build_and_die(self.program, self.manifest, root / "straight", encoding, 0)
        self.expected = contents(root / "straight")

    def kill_at(self, moment: int) -> None:
        out = self.root / f"killed{moment}"
        build_and_die(self.program, self.manifest, out, self.encoding, moment)
        try:
            whole = len(Store.open(out)) == 19  # what opens is the whole store, never a part of it
        except StoreError:
            whole = True
        assert whole, self.moments[moment - 1]
        finish(self.manifest, out, self.encoding)
        assert contents(out) == self.expected, f"killed at {moment}: {self.moments[moment - 1]}"


def test_killed_at_five_moments_then_finished(tmp_path):
    sweep = Sweep(tmp_path, "jpeg95")
    moments = sweep.moments
    # Half a shard; a shard without its marker; a marker not yet in place; the same of store.json; all but the end.
    chosen = [
        moments.index("append") + 3,
        next(number for number, what in enumerate(moments, 1) if what.startswith("open .00000-a.done")),
        next(number for number, what in enumerate(moments, 1) if what.startswith("os.rename .00001-a.done")),
        next(number for number, what in enumerate(moments, 1) if what.startswith("os.rename .store.json")),
        len(moments),
    ]
    assert len(set(chosen)) == 5
    for moment in chosen:
        sweep.kill_at(moment)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["jpeg95", IN_PLACE])
def test_killed_at_every_moment_of_one_shard_and_of_the_end_then_finished(tmp_path, encoding):
    sweep = Sweep(tmp_path, encoding)
    last_shard = max(number for number, what in enumerate(sweep.moments, 1) if what == "append")
    rng = np.random.default_rng(0)
    chosen = {*range(1, 20), *range(last_shard - 4, len(sweep.moments) + 1)}
    chosen |= set(rng.choice(np.arange(20, last_shard - 4), 10, replace=False).tolist())
    assert len(chosen) >= 40
    for moment in sorted(chosen):
        sweep.kill_at(moment)


@pytest.mark.slow
def test_a_finished_store_stays_whole_at_every_moment_of_a_second_run(tmp_path):
    sweep = Sweep(tmp_path, "raw")
    out = tmp_path / "straight"
    again = build_and_die(sweep.program, sweep.manifest, out, "raw", 0, workers=1)
    assert contents(out) == sweep.expected
    assert 10 < len(again) < 60
    for moment in range(1, len(again) + 1):
        build_and_die(sweep.program, sweep.manifest, out, "raw", moment, workers=1)
        assert len(Store.open(out)) == 19, again[moment - 1]
    finish(sweep.manifest, out, "raw")
    assert contents(out) == sweep.expected


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """The same folder, killed at a random moment of each run, comes to its end all the same."""
    sweep = Sweep(tmp_path, "png")
    rng = np.random.default_rng(1)
    for _ in range(12):
        command = [
            sys.executable,
            sweep.program,
            sweep.manifest,
            tmp_path / "out",
            "png",
            "2",
            str(rng.integers(1, 60)),
        ]
        subprocess.run([os.fspath(word) for word in command], capture_output=True, check=False)
    finish(sweep.manifest, tmp_path / "out", "png")
    assert contents(tmp_path / "out") == sweep.expected
