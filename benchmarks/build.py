"""Films a second and core from original to store: `hilum build` beside a plain PIL loop.

Both read the same grey JPEG files of original size from disk and leave a JPEG of quality 95 whose shorter side is 512.
The loop is what the peers' preparation scripts do: open, convert to "L", LANCZOS to the new size, save. Hilum's side is
the function that the build's processes run, with its checks (structure of the file, declared size, quality flags) and
the store's checksum. Two sizes: 2048 x 2500 divides evenly into 512, 2544 x 3056 (a common detector) does not, and the
area filter is faster where it does.

What differs: the filter (area against LANCZOS with three lobes), a shard with an index against a file per image, and
memory, which the build's processes keep from image to image. A column with PIL's own area filter (BOX) shows how much
of the gain is the filter's, and one with the loop in a process that keeps its memory too, how much is the memory's.

The first table is CPU time of one thread, medians over the rounds; each side has a process of its own, which runs as it
would alone, and they take turns. The second is whole programs by the clock, from start to end: the loop with one
process, `hilum build` with one and with as many decoding processes as there are processors (at most 8), medians.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import polars as pl
from PIL import Image

from hilum.core.seeding import stream
from hilum.core.types import image_uid
from hilum.data.decoding import Settings, Task, decode_one, reuse_memory
from hilum.data.schema import Manifest, complete, write_manifest

SIZES = {"2500 x 2048": (2500, 2048), "3056 x 2544": (3056, 2544)}
IMAGES, ROUNDS, SHORT_SIDE = 6, 7, 512
BUILD_IMAGES, BUILD_ROUNDS = 480, 3
SERVE, LOOP = "--serve", "--loop"


def film(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth field with fine structure and grain: about 1.6 bits a pixel at JPEG quality 95, as originals have."""
    rng = stream(0, "build benchmark", seed)
    coarse = cv2.resize(rng.uniform(20, 235, (9, 8)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    fine = cv2.GaussianBlur(rng.normal(0, 60, (height, width)).astype(np.float32), (0, 0), 4)
    return np.clip(coarse + fine + rng.normal(0, 1.7, (height, width)), 0, 255).astype(np.uint8)


def write_films(folder: Path, shape: tuple[int, int], count: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    distinct = [film(*shape, number) for number in range(min(count, IMAGES))]
    for number, path in enumerate(paths):
        if number < len(distinct):
            Image.fromarray(distinct[number]).save(path, "JPEG", quality=95)
        else:
            path.hardlink_to(paths[number % len(distinct)])
    return paths


def with_pil(path: Path, resample: Image.Resampling = Image.Resampling.LANCZOS) -> int:
    with Image.open(path) as image:
        grey = image.convert("L")
    scale = SHORT_SIDE / min(grey.size)
    small = grey.resize((round(grey.width * scale), round(grey.height * scale)), resample)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue())


def with_hilum(path: Path) -> int:
    task = Task(path.stem, path.name, str(path.parent))
    record = decode_one(task, Settings(SHORT_SIDE, "jpeg95", ())).record
    return zlib.crc32(record)


PIPELINES: dict[str, tuple[Callable[[Path], int], bool]] = {
    "PIL, LANCZOS": (with_pil, False),
    "PIL, BOX": (lambda path: with_pil(path, Image.Resampling.BOX), False),
    "PIL, kept": (with_pil, True),
    "hilum build": (with_hilum, True),
}
"""What makes the small image, and whether its process keeps its memory."""


def serve(name: str) -> None:
    """One side, in a process of its own: takes a path a line, answers with the CPU milliseconds that it took."""
    run, keeps = PIPELINES[name]
    cv2.setNumThreads(1)
    if keeps:
        reuse_memory()
    for line in sys.stdin:
        start = time.process_time()
        run(Path(line.rstrip("\n")))
        print(1000 * (time.process_time() - start), flush=True)


def milliseconds(paths: list[Path]) -> dict[str, float]:
    """Median CPU milliseconds an image; the sides take turns, so that what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in PIPELINES}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, SERVE, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for name in PIPELINES
        }
        for round_number in range(-1, ROUNDS):  # the first is to warm up
            for path in paths:
                for name, side in sides.items():
                    assert side.stdin is not None
                    assert side.stdout is not None
                    print(path, file=side.stdin, flush=True)
                    taken = float(side.stdout.readline())
                    if round_number >= 0:
                        times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def manifest_of(paths: list[Path], root: Path) -> Path:
    rows = [
        {
            "image_uid": image_uid("films", path.name), "dataset": "films", "source_relpath": path.name,
            "source_root_key": "films", "patient_id": f"films/{path.stem}", "study_id": f"films/{path.stem}",
            "image_id": path.name, "view": "PA", "split_project": "train", "ssl_ok": True, "ssl_reason": "",
        }
        for path in paths
    ]  # fmt: skip
    manifest = Manifest(complete(pl.DataFrame(rows), ()), (), {"roots": json.dumps({"films": str(root)})})
    write_manifest(manifest, root / "manifest.parquet")
    return root / "manifest.parquet"


def whole_builds(films: Path, manifest: Path, temporary: Path) -> dict[str, float]:
    """Images a second of whole programs; the sides take turns."""
    hilum = str(Path(sys.executable).with_name("hilum"))
    commands = {"PIL loop": [sys.executable, __file__, LOOP, str(films)]}
    for workers in sorted({1, min(8, len(os.sched_getaffinity(0)))}):
        name = f"hilum build, {workers} process" + ("es" if workers > 1 else "")
        commands[name] = [hilum, "build", str(manifest), "--workers", str(workers)]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for round_number in range(BUILD_ROUNDS):
        for name, command in commands.items():
            out = ["--out", str(temporary / f"{name} {round_number}")] if command[0] == hilum else []
            start = time.perf_counter()
            subprocess.run([*command, *out], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    print(
        f"\n{BUILD_IMAGES} films of 2500 x 2048 by whole programs, images a second by the clock; ratios within rounds"
    )
    figures = {}
    for name, values in times.items():
        ratios = [loop / own for loop, own in zip(times["PIL loop"], values, strict=True)]
        figures[f"{name}, images/s"] = BUILD_IMAGES / statistics.median(values)
        figures[f"{name}, times the loop"] = statistics.median(ratios)
        shown = f"{statistics.median(ratios):6.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:>26} {figures[f'{name}, images/s']:7.1f} {shown}")
    return figures


def main() -> dict[str, float]:
    """Print both tables and return their figures."""
    cv2.setNumThreads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        print("CPU milliseconds an image, one thread (median)")
        print(f"{'original':>14} {'MB':>5} " + " ".join(f"{name:>13}" for name in PIPELINES) + f" {'gain':>6}")
        for name, shape in SIZES.items():
            paths = write_films(Path(temporary) / name, shape, IMAGES)
            found = milliseconds(paths)
            gain = found["PIL, LANCZOS"] / found["hilum build"]
            size = statistics.mean(path.stat().st_size for path in paths) / 1e6
            print(f"{name:>14} {size:5.2f} " + " ".join(f"{found[key]:13.1f}" for key in PIPELINES) + f" {gain:5.2f}x")
            figures |= {f"{name}: {key}": value for key, value in found.items()} | {f"{name}: gain": gain}
        root = Path(temporary) / "whole"
        paths = write_films(root, SIZES["2500 x 2048"], BUILD_IMAGES)
        manifest = manifest_of(paths, root)
        figures |= whole_builds(root, manifest, Path(temporary))
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2])
    elif sys.argv[1:2] == [LOOP]:
        for path in sorted(Path(sys.argv[2]).glob("*.jpg")):
            with_pil(path)
    else:
        main()
