"""Images a second that two loader processes deliver, and what a GPU waits for them.

A store of JPEGs (512 x 512, quality 95); batches of 2 global and 8 local crops, masks included, made by two worker
processes and taken by this one, which does nothing else. The peer is the PIL RGB pipeline of `benchmarks/crops.py`
under torch's DataLoader with two workers. Contestants take turns, their workers asleep meanwhile; what was made ahead
is drained before a turn is timed. Shown: by the clock, which other programs on the machine slow down; the workers' CPU
time an image, which they hardly do, as the rate of two cores of their own; and the rate that an H200 at 45 % of its
peak needs, by `shared/reference/performance.md`, table N.

On a GPU, below: a real step of the published size between two batches, and which share of the time it waits for the
loader, ViT-L with crops from the CPU, ViT-B with crops cut on the GPU; and how long the cutting takes there. Each step
is awaited, so that all of the wait is seen. Without a GPU that is not measured.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where workers look for the classes of `crops`

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from crops import IMAGES, QUALITY, SIDE, PeerImages, example_images
from hilum.data.samplers import EndlessSampler
from hilum.data.store import Store, write_arrays
from hilum.data.transforms import normalise, preprocessing
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.loading import PretrainLoader, PretrainSource

WORKERS, AHEAD, ROUNDS, SECONDS = 2, 2, 3, 2.5
STORED = 512
"""Images in the store; `IMAGES` different ones."""
BATCH = 16
NEEDED = {(224, 96): {"ViT-L": 410, "ViT-B": 1107}, (512, 144): {"ViT-L": 90, "ViT-B": 240}}
"""Images a second for one GPU."""
GPU_CASES = (
    ("vitl16", (224, 96), 64, 0.4, "cpu"),
    ("vitl16", (512, 144), 24, 0.4, "cpu"),
    ("vitb16", (224, 96), 128, 0.2, "device"),
    ("vitb16", (512, 144), 32, 0.2, "device"),
)
GPU_WARM_UP, GPU_STEPS = 12, 30
WAIT_GOAL = 0.02


@dataclass
class Contestant:
    """A loader that is running, and what was measured of it."""

    batches: Iterator[Any]
    workers: list[Any]
    clock: list[float]
    """Images a second, one a round."""
    cpu: list[float]
    """Seconds of CPU time an image, one a round."""


def start(make: Callable[[], Iterator[Any]]) -> Contestant:
    """Start a loader's workers and take its first batch."""
    before = set(active_children())
    batches = make()
    next(batches)
    return Contestant(batches, [process for process in active_children() if process not in before], [], [])


def cpu_seconds(processes: list[Any]) -> float:
    """CPU time that processes have used."""
    ticks = 0
    for process in processes:
        values = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(values[11]) + int(values[12])  # in user mode, in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def turn(contestant: Contestant, images: int, seconds: float) -> None:
    """Time one turn."""
    for _ in range(WORKERS * AHEAD + 1):
        next(contestant.batches)
    taken, used, began = 0, cpu_seconds(contestant.workers), time.perf_counter()
    while time.perf_counter() - began < seconds or taken < 2 * WORKERS:
        next(contestant.batches)
        taken += 1
    contestant.clock.append(taken * images / (time.perf_counter() - began))
    contestant.cpu.append((cpu_seconds(contestant.workers) - used) / (taken * images))


def source(store: Store, sizes: tuple[int, int], images: int, preset: str, crops_on: str) -> PretrainSource:
    """Batches as a run would see them."""
    crops = CropConfig(*sizes, augmentation=preset)  # type: ignore[arg-type]
    sampler = EndlessSampler(np.arange(len(store)), images, 0)
    return PretrainSource(store, sampler, crops, 16, crops_on=crops_on)  # type: ignore[arg-type]


def measure(
    store: Store, files: list[bytes], sizes: tuple[int, int], rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, dict[str, float]]:
    """One table: each contestant's rates."""

    def peer() -> Iterator[Any]:
        dataset = PeerImages(files, CropConfig(*sizes, augmentation="dinov2_as_released"), 10**6)
        return iter(
            DataLoader(dataset, BATCH, num_workers=WORKERS, prefetch_factor=AHEAD, multiprocessing_context="spawn")
        )

    def ours(preset: str, crops_on: str) -> Callable[[], Iterator[Any]]:
        loader = PretrainLoader(source(store, sizes, BATCH, preset, crops_on), WORKERS, ahead=AHEAD)
        return lambda: loader.batches(0, 10**6)

    running = {
        "peer: PIL, RGB, torch DataLoader": start(peer),
        "hilum, same changes": start(ours("dinov2_as_released", "cpu")),
        "hilum, cxr preset": start(ours("cxr", "cpu")),
        "hilum, cxr, cut on the device": start(ours("cxr", "device")),
    }
    for _ in range(rounds):
        for contestant in running.values():
            turn(contestant, BATCH, seconds)
    rows = {}
    for name, contestant in running.items():
        rows[name] = {
            "images_per_second": statistics.median(contestant.clock),
            "lowest": min(contestant.clock),
            "highest": max(contestant.clock),
            "of_two_cores": 2 / statistics.median(contestant.cpu),
        }
    del running, contestant
    return rows


def measure_wait(store: Store, case: tuple[str, tuple[int, int], int, float, str]) -> dict[str, float]:
    """On a GPU: the share of the time that steps wait for data."""
    sys.path.insert(1, str(Path(__file__).resolve().parent / "peers"))
    import hilum_step

    model, sizes, images, drop_path, crops_on = case
    device, recipe = torch.device("cuda"), preprocessing(store.preprocess_id)
    chosen = {
        "model": model, "sizes": sizes, "images": images, "drop_path": drop_path, "registers": 4,
        "feed_forward": "mlp", "prototypes": 131072, "bottlenecks": (384, 256), "compile": "auto", "precision": "bf16",
        "batches": 2,
    }  # fmt: skip
    step, _ = hilum_step.build(chosen, device)
    loader = PretrainLoader(source(store, sizes, images, "cxr", crops_on), WORKERS, pin_memory=True, ahead=AHEAD)
    batches = loader.batches(0, 10**6)
    waits, moves, whole = [], [], []
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(GPU_WARM_UP + GPU_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        began.record()
        moved = batch.to(device)
        normalise(moved.global_crops, recipe), normalise(moved.local_crops, recipe)
        ended.record()
        step()
        torch.cuda.synchronize()
        if number >= GPU_WARM_UP:
            waits.append(waited)
            moves.append(began.elapsed_time(ended) / 1000)
            whole.append(time.perf_counter() - start)
    return {
        "images_per_second": images * len(whole) / sum(whole),
        "waiting": sum(waits) / sum(whole),
        "moving_and_cutting": sum(moves) / sum(whole),
    }


def main() -> dict[str, Any]:
    """Print the tables; return what they show."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    images = example_images(IMAGES)
    files = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes() for image in images]
    many = [images[number % IMAGES] for number in range(STORED)]
    print(
        f"{WORKERS} loader processes, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; JPEG store of "
        f"{SIDE} x {SIDE}; median of {ROUNDS} turns, in brackets their range"
    )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        labels = np.zeros((STORED, 1), np.int8)
        store = write_arrays(Path(folder) / "store", many, labels, ["Normal"], encoding="jpeg95")
        for sizes, needed in NEEDED.items():
            key = f"{sizes[0]}/{sizes[1]}"
            rows = results[key] = measure(store, files, sizes)
            wanted = ", ".join(f"{model} {rate}" for model, rate in needed.items())
            print(f"\n{key + ', images/s (needed: ' + wanted + ')':52}{'by the clock':>24}{'of two whole cores':>20}")
            for name, row in rows.items():
                spread = f"({row['lowest']:.0f}-{row['highest']:.0f})"
                print(f"{name:52}{row['images_per_second']:10.0f}  {spread:>12}{row['of_two_cores']:20.0f}", flush=True)
        print(f"\na GPU waiting for data with {WORKERS} loader processes (goal < {WAIT_GOAL:.0%})")
        if not torch.cuda.is_available():
            print("not measured: there is no GPU here")
        for case in GPU_CASES if torch.cuda.is_available() else ():
            name = f"{case[0]} {case[1][0]}/{case[1][1]}, batch {case[2]}, crops on {case[4]}"
            row = results[name] = measure_wait(store, case)
            print(
                f"{name:52}{row['waiting']:8.1%} of the time; {row['images_per_second']:.0f} images/s; copying and "
                f"cutting on the GPU {row['moving_and_cutting']:.1%}",
                flush=True,
            )
    print(f"load after {os.getloadavg()[0]:.1f}")
    return results


if __name__ == "__main__":
    main()
    sys.stdout.flush()
